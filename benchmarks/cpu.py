"""What a CPU can show of the training step, as ratios in one run; tables go to benchmarks/results/cpu.md and cpu.json.

    python benchmarks/cpu.py                                  # all parts, ten minutes on two cores
    python benchmarks/cpu.py --parts logits --ckpt last.pt    # one; the others' results stay

steps    CPU time of a float32 step on one thread and its peak memory, ours against plain.py's
memory   of the loss over prototypes, against all logits at once; each in its own process
logits   what rounding logits to half precision does to the teacher's choice of prototype
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from record import ROOT, reporter  # first: it puts the project on the path
import gpu_kernels
import plain
from frames import phantom
from gpu_kernels import ONE, TEMP, whole_loss
from losses import DINOHead
from networks import weights
from runtime import load_checkpoint
from steps import Ours, Plain, arguments, one_batch
from timing import divided, goal, rounds

FLOAT = ["--dtype", "float32"]
SIZES = {  # name: arguments, rounds, kinds of plain (compiling a large one takes minutes)
    "vit_micro, batch 32, the cpu preset": (("vit_micro", 32, {"preset": "cpu"}), 15, ("plain", "plain compiled")),
    "vit_small, batch 4, K = 65,536": (("vit_small", 4, {}), 4, ("plain",)),
}
VARIANTS = {"ours": {}, "ours --compile": dict(compiled=True),
            "ours --checkpoint_activations": dict(checkpointing=True)}
LOSSES = [(2048, 16384), (8192, 16384), (16384, 16384), (4096, 65536), (8192, 65536)]  # rows, K
SLOWER, MEMORY = 1.0, 1 / 3  # goals: a step at most as long as plain's, the loss in at most a third of its memory


# ---------------------------------------------------------------- children: peak memory of one thing

def peak_mb():
    """Of this process, by Linux: getrusage would start from what the process that started it had."""
    return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024


def child(*words):
    """This script again in a process of its own: the number that it prints."""
    done = subprocess.run([sys.executable, __file__, "--child", *map(str, words)], text=True, stdout=subprocess.PIPE)
    return float(done.stdout.splitlines()[-1]) if done.returncode == 0 else f"exit status {done.returncode}"


def step_child(size, variant):
    """Peak memory in MB of a process that takes two steps, or has no more than their batch."""
    arch, batch, more = SIZES[size][0]
    args = arguments(arch, batch, *FLOAT, **more)
    micro = one_batch(args, "cpu")
    if variant == "batch":
        return peak_mb()
    made = Ours(args, "cpu")
    if variant == "plain":
        made = Plain(args, "cpu", made)  # the other one is gone before the first step
    step = made.step(micro, **VARIANTS.get(variant, {}))
    step(), step()
    return peak_mb()


def loss_child(kind, rows, K, d=256):
    """Peak memory in MB of a loss over `rows` masked patches and K prototypes, with its gradients; or of its inputs."""
    torch.manual_seed(0)
    f, W, f_t, W_t = (gpu_kernels.unit(n, d, device="cpu") for n in (rows, K, rows, K))
    f, f_t, weight, center = f[:, None].requires_grad_(), f_t[:, None], torch.rand(rows, 1), torch.zeros(K)
    W.requires_grad_()
    if kind == "ours":
        whole_loss(f, W, f_t, W_t, center, torch.tensor(ONE), weight, torch.float32)
    elif kind == "plain":
        with torch.no_grad():
            targets = plain.centered_targets(F.linear(f_t[:, 0], W_t), center, TEMP)
        torch.autograd.grad(plain.ibot_loss(F.linear(f[:, 0], W), targets, weight[:, 0], 1), (f, W))
    return peak_mb()


# ---------------------------------------------------------------- parts

def compare_steps(size):
    (arch, batch, more), repeats, kinds = SIZES[size]
    torch.set_num_threads(1)
    args = arguments(arch, batch, *FLOAT, **more)
    ours, micro = Ours(args, "cpu"), one_batch(args, "cpu")
    other = Plain(args, "cpu", ours)
    calls = {name: ours.step(micro, **how) for name, how in VARIANTS.items()}
    calls.update({kind: other.step(micro, compiled=kind != "plain") for kind in kinds})
    times = rounds(calls, "cpu", repeats, 1)
    batch_mb = child("step", size, "batch")
    memory = {name: child("step", size, name) for name in calls if name != "plain compiled"}
    extra = {name: peak - batch_mb for name, peak in memory.items() if isinstance(peak, float)}
    for name, spent in times.items():
        row = {"step": size, "by": name, "ms": spent}
        if not isinstance(spent, str):
            ratios = sorted(mine / theirs for mine, theirs in zip(spent, times["plain"]))
            row.update({"ms": statistics.median(spent), "times plain's": statistics.median(ratios),
                        "lowest to highest": f"{ratios[0]:.2f} to {ratios[-1]:.2f}"})
        yield {**row, "peak MB": extra.get(name), "memory of plain's": divided(extra.get(name), extra.get("plain"))}


def part_steps(report):
    goals = []
    for size, (_, repeats, _) in SIZES.items():
        rows = list(compare_steps(size))
        report(f"CPU time of a float32 step on one thread, which other programs disturb least; {repeats} rounds in "
               "which each takes one step, ratios of the same round, medians. Peak: networks, optimizer and step, in a "
               "process of its own, beyond one that has only the batch.", rows)
        goals.append(goal(f"{size}: a step's time, of plain's", SLOWER, rows[0].get("times plain's")))
    report("Goals.", goals)


def part_memory(report):
    rows = []
    for n, K in LOSSES:
        inputs = child("loss", "inputs", n, K)
        ours, theirs = (divided(child("loss", kind, n, K) - inputs, 1) for kind in ("ours", "plain"))
        rows.append({"rows": n, "K": K, "one float32 matrix (rows, K), MB": n * K * 4 / 2 ** 20, "ours MB": ours,
                     "plain MB": theirs, "ours / plain": divided(ours, theirs)})
    report("Peak memory of targets, loss and gradients of (rows, 256) features and (K, 256) prototypes, beyond a "
           "process that holds only these; float32, the references that a CPU runs.", rows)
    report("Goal.", [goal(f"memory of the loss, {row['rows']:,} rows x {row['K']:,}, of plain's", MEMORY,
                          row["ours / plain"]) for row in rows])


def rounding_row(what, features, prototypes):
    """How the teacher's targets change when the logits of unit vectors are rounded."""
    logits = features @ prototypes.T  # (rows, K) float32
    top, row = logits.argmax(1), {"features": what, "rows": len(features), "K": len(prototypes)}
    p = (logits / TEMP).softmax(1)
    for dtype in (torch.float16, torch.bfloat16):
        name, rounded = gpu_kernels.name_of(dtype), logits.to(dtype).float()
        row[f"{name}: other top prototype"] = f"{100 * (rounded.argmax(1) != top).float().mean().item():.2f} %"
        moved = 0.5 * ((rounded / TEMP).softmax(1) - p).abs().sum(1).mean().item()
        row[f"{name}: target moved"] = f"{100 * moved:.3f} %"
    return row


def checkpoint_rows(path, images=64):
    """Features of class tokens and of patches of phantom images, and prototypes, by the teacher in a checkpoint."""
    backbone, info = weights.load_backbone(path)
    state = {key.removeprefix("dino_head."): value for key, value in load_checkpoint(path)["teacher"].items()
             if key.startswith("dino_head.")}
    (K, d), hidden = state["last_layer.weight_v"].shape, state["mlp.0.bias"].shape[0]
    head = weights.load_strict(DINOHead(backbone.embed_dim, K, hidden_dim=hidden, bottleneck_dim=d), state, path)
    frames = torch.from_numpy(phantom.phantom_images(images, info["img_size"])[0])[:, None]
    tokens = backbone.forward_features((frames / 255 - info["mean"]) / info["std"])
    for name in ("x_norm_clstoken", "x_norm_patchtokens"):
        features = head.bottleneck(tokens[name].flatten(0, -2)[:4096])
        yield f"{name}, {os.path.basename(path)}", features, head.last_layer.weight()


@torch.no_grad()
def part_logits(report, ckpt=None, rows=4096, K=65536, d=256):
    torch.manual_seed(0)
    found = [rounding_row(f"random unit vectors, d = {d}", *(gpu_kernels.unit(n, d, device="cpu") for n in (rows, K)))]
    if ckpt:
        found += [rounding_row(*pair) for pair in checkpoint_rows(ckpt)]
    report("Logits rounded to half precision. Target moved: half the sum of absolute changes of "
           f"softmax(logits / {TEMP}).", found)


PARTS = {"steps": ("Steps", part_steps), "memory": ("Memory of the loss", part_memory),
         "logits": ("Rounding of logits", part_logits)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/cpu"), help="path without .md and .json")
    parser.add_argument("--ckpt", help="a checkpoint of pretrain.py, for part logits")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *more = args.child
        print(step_child(*more) if what == "step" else loss_child(more[0], int(more[1]), int(more[2])))
        return
    for part in args.parts:
        title, run = PARTS[part]
        command = f"python benchmarks/cpu.py --parts {part}" + (f" --ckpt {args.ckpt}" if args.ckpt else "")
        report = reporter(args.output, "Measured on a CPU", part, title, command)
        run(report, **({"ckpt": args.ckpt} if part == "logits" else {}))


if __name__ == "__main__":
    main()
