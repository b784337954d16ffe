"""Plumbing that every stage needs and no reader wants twice: processes, signals, checkpoints, schedules, the log."""

import contextlib
import dataclasses
import datetime
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from frames.files import whole_file
from kernels import all_reduce

PATCH_EMBED_LR_MULT = 0.2  # DINOv2's, on top of the layer-wise decay


# ---------------------------------------------------------------- processes

def setup():
    """Join the process group that torchrun describes in the environment, or none: (rank, world size, device)."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} "
                         f"here): use --nproc_per_node {torch.cuda.device_count()}, or CUDA_VISIBLE_DEVICES= for CPU")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        leave_with_parent()
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=datetime.timedelta(minutes=30))
        return dist.get_rank(), dist.get_world_size(), device
    return 0, 1, device


def leave_with_parent():
    """End this process when torchrun is gone: killed by SIGKILL it cannot stop its ranks, which would write on."""
    def watch(parent=os.getppid()):
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def is_first_on_machine():
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


@contextlib.contextmanager
def clear_errors():
    """Turn what is wrong with the user's input (ValueError, OSError) into one sentence on stderr and exit status 2."""
    try:
        yield
    except BrokenPipeError:  # whoever read our output left, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the interpreter's last flush is quiet
        raise SystemExit(1)
    except (ValueError, OSError) as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        raise SystemExit(2)
    if "RANK" in os.environ:
        # [2026-11-23] torch 2.13, gloo: one run in 30 ended in "terminate called without an active exception": a thread
        # of the process group was still at work while the interpreter was taken down
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def stop_on_signals():
    """Returns a list that Ctrl-C or SIGTERM appends to, so that the loop can save before leaving; twice is at once."""
    received = []

    def handle(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)
        # os.write, since print may be interrupted inside another print
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving after this step, then leaving (again: at once)\n".encode())

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)
    return received


def ignore_signals(_worker=0):
    """For data workers: Ctrl-C reaches the whole terminal, but only the main process decides when to leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def goes_on(rank, stopped):
    """Leave the process group; whether this process goes on to the report: the first one, of runs that have ended."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if stopped and rank == 0:
        print("stopped before the end: the same command goes on")
    return rank == 0 and not stopped


def autocast(device, dtype):
    """Matrix products in `dtype`, "bfloat16" or "float32"."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def git_commit():
    """Commit of this code, or "unknown" outside a git checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=os.path.dirname(os.path.abspath(__file__)),
                              capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------- checkpoints

def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values; a crash or a full disk leaves the file that was there before."""
    with whole_file(path, sync=True) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, every record's CRC checked, plain numbers and tensors only (nothing is run).

    Raises FileNotFoundError or ValueError with a sentence.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such checkpoint; train one with: python pretrain.py --data FOLDER")
    try:
        if zipfile.is_zipfile(path):  # torch.load itself does not compare the CRCs that torch.save wrote
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{path}: record {damaged} is damaged (its CRC does not match)")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path}: damaged, or not a checkpoint of tensors and plain values ({reason})")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: holds a {type(checkpoint).__name__}, expected a dict of tensors")
    return checkpoint


def resume(path, log_path, identity, is_main):
    """The checkpoint to go on from, or None: it must have been saved with an equal `identity` (a dict).

    A checkpoint of another run is moved aside, never overwritten, and named on screen; so is its log. The log of the
    run that goes on is cut back to the checkpoint's step.
    """
    checkpoint = load_checkpoint(path) if os.path.exists(path) else {}
    theirs = checkpoint.get("identity", {})
    differ = sorted(key for key in {*identity, *theirs} if identity.get(key) != theirs.get(key))
    if dist.is_initialized():
        dist.barrier()  # every rank has read the file before it is moved
    if checkpoint and not differ:
        if is_main:
            cut_log(log_path, checkpoint["step"])
            print(f"resuming {path} at step {checkpoint['step']}")
        return checkpoint
    if is_main:
        if checkpoint:
            print(f"{path} belongs to another run (other {', '.join(differ)}): kept as {rename_aside(path)}")
        if os.path.exists(log_path):
            print(f"{log_path} belongs to no checkpoint of this run: kept as {rename_aside(log_path)}")
    return None


def rename_aside(path):
    """Rename a file to the first free NAME.old-N.EXT beside it; returns the new name."""
    stem, extension = os.path.splitext(path)
    number = 1
    while os.path.exists(f"{stem}.old-{number}{extension}"):
        number += 1
    os.rename(path, f"{stem}.old-{number}{extension}")
    return f"{stem}.old-{number}{extension}"


# ---------------------------------------------------------------- a run that can be stopped and goes on

@dataclasses.dataclass
class Run:
    """How far a fine-tuning run is: `training_steps` counts, saves and logs, a stage's loop fills in the rest."""
    path: str  # of its checkpoint; the log is beside it, .jsonl
    identity: dict  # what makes a run this one
    is_main: bool  # whether this process writes
    parts: list  # names of the losses that the log keeps apart, [""] of a single one
    best: dict  # the largest score of validation so far (first), what else is said of it, "state": those weights
    losses: torch.Tensor  # (parts,) sums since the last validation
    saved: dict  # the checkpoint that it goes on from, {} at the beginning
    step: int = 0  # steps done
    validates: bool = False  # whether the step being done ends with a validation
    found: dict = None  # that validation: the score first, then what else `best` is to tell
    record: dict = None  # what the log keeps of it
    stopped: bool = False  # by a signal, in any process

    @property
    def log_path(self):
        return self.path[:-len(".pt")] + ".jsonl"


def run_identity(args, not_recipe, info, **more):
    """What must be equal for a run to go on: the recipe, the weights that it starts from, and `more`."""
    recipe = {key: value for key, value in vars(args).items() if key not in not_recipe}
    return {**recipe, "start": info["digest"], "config": info["config"], "mean": info["mean"], "std": info["std"],
            **more}


def open_run(path, identity, network, optimizer, worst, device, is_main, parts=("",)):
    """The Run of `path`; where its file holds an unfinished one, network and optimizer go on from there.

    worst: a `best` below any validation. A finished run's file has no optimizer: what it has is in `saved`.
    """
    best, losses = {**worst, "state": None}, torch.zeros(len(parts), device=device)
    run = Run(path, identity, is_main, list(parts), best, losses, {})
    if saved := resume(path, run.log_path, identity, is_main):
        run.saved, run.best, run.step = saved, saved["best"], saved["step"]
        if "optimizer" in saved:
            network.load_state_dict(saved["network"])
            optimizer.load_state_dict(saved["optimizer"])
            # `total` is what files of before this class call a single loss
            run.losses.copy_(torch.tensor(saved["losses"] if "losses" in saved else [saved["total"]]))
    return run


def training_steps(run, network, optimizer, steps, val_every, save_every, received):
    """Yield the number of each step that is left; the loop's body does the step and gives its loss to `add_loss`.

    Where run.validates, the body also fills in run.found and run.record. After it the best weights are kept and a line
    is logged; the run is saved every `save_every` steps, at the end, and when `received` holds a signal.
    """
    since = time.monotonic()
    with tqdm(total=steps, initial=run.step, unit="step", disable=None if run.is_main else True,
              dynamic_ncols=True) as bar:
        while run.step < steps and not run.stopped:
            done = run.step + 1
            run.validates = done % val_every == 0 or done == steps
            yield run.step
            run.step = done
            bar.update()
            run.stopped = all_reduce(torch.tensor(float(bool(received)), device=run.losses.device)).item() > 0
            if run.validates:
                score = next(iter(run.found))
                if run.found[score] > run.best[score]:
                    run.best = {**run.found, "state": cpu_copy(network.state_dict())}
                if run.is_main:
                    turns = ((done - 1) % val_every + 1) // len(run.parts)  # of each part since the last validation
                    losses = {part: loss / turns for part, loss in zip(run.parts, run.losses.tolist())}
                    kept = {"losses": losses} if run.parts != [""] else {"loss": losses[""]}
                    log_line(run.log_path, bar, {"step": done, **kept, **run.record}, (
                        f"step {done}/{steps} | loss {np.mean(list(losses.values())):.3f} | {score} "
                        f"{run.found[score]:.3f}, best {run.best[score]:.3f} | {time.monotonic() - since:.0f} s"))
                run.losses.zero_()
            if run.stopped or done == steps or done % save_every == 0:
                check_finite(run, done)
                save_run(run, losses=run.losses.tolist(), network=cpu_copy(network.state_dict()),
                         optimizer=optimizer.state_dict())


def add_loss(run, loss, part=0):
    """Count a step's loss, of one of the run's parts; before a validation all must be finite."""
    run.losses[part] += loss
    if run.validates:
        check_finite(run, run.step + 1)


def check_finite(run, step):
    """Nothing that is not finite is ever saved, or chosen."""
    if not run.losses.isfinite().all():
        parts = [part for part, loss in zip(run.parts, run.losses.tolist()) if not np.isfinite(loss)]
        of = f" of {', '.join(parts)}" if parts != [""] else ""
        raise ValueError(f"{run.path}, step {step}: the loss{of} is not finite; a lower --lr?")


def save_run(run, **content):
    if run.is_main:
        save_checkpoint(run.path, {"step": run.step, "identity": run.identity, "best": run.best, **content})


# ---------------------------------------------------------------- parameters and tensors

def parameter_groups(network, layerwise_decay, patch_embed_lr_mult=PATCH_EMBED_LR_MULT):
    """AdamW's groups after DINOv2: a rate that falls towards the input, no decay of biases, norms and LayerScale.

    A network around timm's model says backbone.model.blocks.
    """
    depth, groups = len(network.backbone.blocks), {}
    for name, parameter in network.named_parameters():
        layer = depth + 1  # heads and the final norm
        if block := re.match(r"backbone\.(?:model\.)?blocks\.(\d+)\.", name):
            layer = 1 + int(block[1])
        elif any(part in name for part in ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")):
            layer = 0
        lr_multiplier = layerwise_decay ** (depth + 1 - layer) * (patch_embed_lr_mult if "patch_embed" in name else 1)
        wd_multiplier = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
        key = (lr_multiplier, wd_multiplier, "last_layer" in name)
        groups.setdefault(key, []).append(parameter)
    return [dict(params=parameters, lr_multiplier=lr, wd_multiplier=wd, is_last_layer=last)
            for (lr, wd, last), parameters in groups.items()]


def flatten_parameters(network):
    """Move each sub-module's parameters, and gradients, into one flat buffer each: [(parameters, gradients), ...].

    One buffer means one all-reduce in an order that never changes, one norm to clip by, one line of EMA.
    """
    buffers = []
    for module in network.children():
        parameters = list(module.parameters())
        sizes = [p.numel() for p in parameters]
        flat = torch.cat([p.detach().flatten() for p in parameters])
        trained = parameters[0].requires_grad  # all of a module or none
        grads = torch.zeros_like(flat) if trained else None
        for p, values in zip(parameters, flat.split(sizes)):
            p.data = values.view_as(p)
        for p, grad in zip(parameters, grads.split(sizes) if trained else ()):
            p.grad = grad.view_as(p)
        buffers.append((flat, grads))
    return buffers


def host_copy(x):
    """Start copying a tensor to the host without waiting: (copy, event to synchronize on before reading, or None)."""
    copied = torch.cuda.Event() if x.is_cuda else None
    x = x.to("cpu", non_blocking=True)
    if copied:
        copied.record()
    return x, copied


def cpu_copy(state):
    """A state dict whose tensors are the host's own."""
    return {key: value.detach().cpu().clone() for key, value in state.items()}


# ---------------------------------------------------------------- schedules

def cosine_schedule(base, final, steps, warmup_steps=0):
    """float64 (steps,): linear from 0 to `base` over the warm-up (both ends included), then cosine to `final`."""
    warmup = np.linspace(0, base, warmup_steps)
    phase = np.arange(steps - warmup_steps) / max(steps - warmup_steps, 1)
    return np.concatenate((warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * phase))))


def linear_then_constant(start, value, steps, warmup_steps):
    """float64 (steps,): linear from `start` to `value` over the warm-up, then `value`."""
    return np.concatenate((np.linspace(start, value, warmup_steps), np.full(steps - warmup_steps, value)))


# ---------------------------------------------------------------- the log

def cut_log(path, step):
    """Drop log.jsonl's records after `step`: a resumed run writes them again. A half-written last line goes too."""
    if not os.path.exists(path):
        return
    with open(path) as file:
        lines = file.readlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break
        kept.append(line)
    with whole_file(path, "w") as file:
        file.writelines(kept)


def show_run(args, device, world_size):
    """Print every argument, the code's and torch's version and the device, before anything long starts."""
    for key, value in sorted(vars(args).items()):
        print(f"  {key} {value}")
    print(f"commit {git_commit()} | torch {torch.__version__} | {device} x {world_size}")


def log_line(path, bar, record, text):
    """Append `record` to the JSON-lines log and show `text`: a bar's description on a terminal, else a plain line."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
    if bar.disable:
        print(text, flush=True)
    else:
        bar.set_description_str(text)
