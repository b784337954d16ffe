"""What a pretraining run would cost, before it starts: pretrain.py's own flags, without the run.

    python -m tools.dry_run --preset ultradino --arch vit_base

Parameters, work per image after drop path and peak memory come from one step on tensors that have shapes but no
numbers; images per second from real steps on this machine, on noise. Nothing is written, no data are needed.
"""

import copy
import time
import weakref
from datetime import datetime, timedelta
from types import SimpleNamespace

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import kernels
import pretrain
import runtime
from data import PretrainBatches
from frames.packed import Canvases

MEASURED_SECONDS, CPU_IMAGES = 10, 32  # real steps take at least so long; on a CPU they have at most so many images
MEAN, STD = 0.2, 0.2  # of the noise: they change no cost


class Cost(TorchDispatchMode):
    """Counts, while it is entered, the work of matrix products and the bytes of tensors that live at the same time."""

    def __init__(self):
        super().__init__()
        self.flops = self.live = self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op._overloadpacket in flop_registry:
            self.flops += flop_registry[op._overloadpacket](*args, **(kwargs or {}), out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.seen:
                storage = x.untyped_storage()
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, num_bytes):
        self.live -= num_bytes


def attention_flops(backbone, micro, drops, recomputed):
    """Of a whole step: the kernels are no operation that `Cost` sees. Forward 2 products of N x N x C, backward 7."""
    everyone = [(len(crops), 1 + backbone.num_register_tokens + (crops.shape[-1] // backbone.patch_size) ** 2)
                for crops in (micro["global_crops"], micro["local_crops"])]
    B, N = everyone[0]
    teacher = len(backbone.blocks) * B * N ** 2 * 2
    kept = [drop.shapes for drop in drops[::2]] if drops else [everyone] * len(backbone.blocks)
    student = sum(B * N ** 2 for shapes in kept for B, N in shapes) * (2 + 7 + 2 * recomputed)
    return 2 * backbone.embed_dim * (teacher + student)


def noise_batch(args, images):
    """What PretrainBatches gives for one micro-batch, of canvases of noise."""
    rng = np.random.default_rng(0)
    canvases = rng.integers(0, 256, (images, args.canvas, args.canvas), dtype=np.uint8)
    frames = Canvases(canvases, np.tile([4, 3], (images, 1)) * args.canvas, np.arange(images))
    return PretrainBatches(frames, SimpleNamespace(**{**vars(args), "accum_iter": 1, "batch_size_per_gpu": images}))[0]


def step(student, teacher, state, batch, args, device):
    """One optimizer step of one micro-batch, from its canvases on."""
    buffers, centers, optimizer = state
    micros = pretrain.to_device(batch, device, args, MEAN, STD)
    draws = list(pretrain.draw_drops(student.backbone, micros, args.seed, 0, 0, args.rope_rescale))
    values = {name: array[-1].item() for name, array in pretrain.schedules(args, 10, len(micros[0]["groups"])).items()}
    pretrain.train_step(student, teacher, optimizer, buffers, centers, micros, values, args, len(micros[0]["groups"]),
                        draws)
    return micros[0], draws[0][0]


def predicted_cost(args, start=None):
    """(peak bytes, FLOPs) of a step, by a second step: the optimizer's moments are there. start: open_init's."""
    args = SimpleNamespace(**{**vars(args), "compile": False})
    images, cpu = args.batch_size_per_gpu, torch.device("cpu")
    batch, fake = noise_batch(args, images), FakeTensorMode()
    with FakeCopyMode(fake):
        student, teacher = copy.deepcopy(pretrain.build_networks(args, cpu, start))
    with fake, Cost() as cost:
        batch = [{key: fake.from_tensor(value) for key, value in micro.items()} for micro in batch]
        state = pretrain.build_state(student, teacher, args)
        step(student, teacher, state, batch, args, cpu)
        cost.flops = 0
        micro, drops = step(student, teacher, state, batch, args, cpu)
    if kernels.takes_kernel(state[1]):
        cost.flops += attention_flops(student.backbone, micro, drops, args.checkpoint_activations)
    return cost.peak, cost.flops


def measure(args, device, start=None):
    """Images per second of real steps, the first one (it compiles kernels) left out."""
    images = args.batch_size_per_gpu if device.type == "cuda" else min(args.batch_size_per_gpu, CPU_IMAGES)
    student, teacher = pretrain.build_networks(args, device, start)
    state, batch, steps = pretrain.build_state(student, teacher, args), noise_batch(args, images), -1
    since = time.monotonic()
    while steps < 1 or time.monotonic() - since < MEASURED_SECONDS:
        step(student, teacher, state, batch, args, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        steps += 1
        if steps == 0:
            since = time.monotonic()
    return steps * images / (time.monotonic() - since)


def main(args):
    _, world_size, device = runtime.setup()
    if world_size > 1:
        raise ValueError("tools.dry_run is for one process: start it with python, not torchrun")
    kernels.use_reference(args.reference_ops)
    start = pretrain.open_init(args, MEAN, STD) if args.init else None
    plain = SimpleNamespace(**{**vars(args), "compile": False})
    network, _ = pretrain.build_networks(plain, torch.device("meta"), start)
    backbone, heads = (sum(p.numel() for p in module.parameters()) for module in (
        network.backbone, torch.nn.ModuleList(m for m in network.children() if m is not network.backbone)))
    peak, flops = predicted_cost(args, start)
    images = args.batch_size_per_gpu
    print(f"{args.arch}: {backbone:,} parameters in the backbone, {heads:,} in the heads")
    print(f"{flops / images / 1e9:.1f} GFLOP per image, forward and backward of student, forward of teacher, drop path "
          f"{args.drop_path_rate} left out")
    print(f"predicted peak memory {peak / 2 ** 30:.1f} GiB per process at batch_size_per_gpu {images}, {args.dtype}; "
          f"keep a tenth more free for the allocator and the libraries")
    print(f"measuring on {device} ({kernels.mode(device)}), without the data loader ...", flush=True)
    rate = measure(args, device, start)
    print(f"measured {rate:.1f} images/s, {rate * flops / images / 1e12:.2f} TFLOP/s")
    if device.type == "cuda":
        print(f"measured peak memory {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB")
    for processes in (1, 2, 4, 8):
        batch = images * args.accum_iter * processes
        hours = args.total_samples / (rate * processes) / 3600
        end = datetime.now() + timedelta(hours=hours)
        print(f"{processes} x {device.type}: {max(1, round(args.total_samples / batch)):,} steps of {batch}, "
              f"{hours:,.1f} h{' if no time is lost between them' if processes > 1 else ''}, until "
              f"{end:%Y-%m-%d %H:%M}")


if __name__ == "__main__":
    with runtime.clear_errors():
        main(pretrain.get_args())
