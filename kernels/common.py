"""What every kernel file shares: the one place that picks kernel or reference, and the guarded all-reduce.

A CUDA tensor takes the kernel. Any other tensor takes the plain-torch reference, except that with
TRITON_INTERPRET=1 in the environment Triton's interpreter runs the kernels on CPU tensors (slow: for tests).
Triton reads that variable when a kernel is defined, so set it before the first import of this package.
"""
import os
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
    HAVE_TRITON = True
except ImportError:  # e.g. on a Mac: `@triton.jit` and `tl.constexpr` still parse, nothing can be launched
    triton = SimpleNamespace(jit=lambda kernel: kernel, cdiv=lambda x, y: -(-x // y))
    tl = SimpleNamespace(constexpr=lambda x: x)
    HAVE_TRITON = False

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)  # a GPU has exp2 and log2 only
INTERPRET = HAVE_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
_reference_only = False


def use_reference(flag):
    """True: every op takes its plain-torch reference, on any device. False: the device decides."""
    global _reference_only
    _reference_only = bool(flag)


def takes_kernel(x):
    """Whether an op on tensor x runs the Triton kernel."""
    if _reference_only:
        return False
    if x.is_cuda and not HAVE_TRITON:
        raise RuntimeError("a CUDA tensor needs the Triton kernels: run `pip install triton`, or pass "
                           "--reference_ops to train with the plain-torch formulas")
    return x.is_cuda or INTERPRET or isinstance(x, FakeTensor)


def launch(kernel, grid, x, *args, **constants):
    """kernel[grid](x, ...); nothing where x is a shape without numbers, as when tools/dry_run.py predicts memory."""
    if not isinstance(x, FakeTensor):
        kernel[grid](x, *args, **constants)


def mode(device):
    """One phrase for the start-up print: what the ops run on this device."""
    device = torch.device(device)
    if not takes_kernel(SimpleNamespace(is_cuda=device.type == "cuda")):
        return f"plain-torch references ({device.type})"
    return f"triton kernels ({device.type if device.type == 'cuda' else 'interpreter'})"


def check_matrix(name, x):
    """Refuse what the kernels would silently misread: they know 2-D, half or single precision, unit last stride."""
    if x.dim() != 2 or x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"{name} must be a float16, bfloat16 or float32 matrix, not {x.dtype} {tuple(x.shape)}; "
                         "use_reference(True) computes the rest in plain torch")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"{name} must have its columns adjacent in memory (strides {x.stride()}); "
                         "call .contiguous() on it first")


def at_least_float32(x):
    """Half precision becomes float32, float64 stays: the precision of every reference."""
    return x if x.dtype == torch.float64 else x.float()


def slices(x, group=1):
    """Which rows of a matrix (rows, K) a reference takes at a time, whole groups: few on a CPU, for its cache."""
    step = 2 ** 20 // max(x.shape[1], 1) // group * group if x.device.type == "cpu" else len(x)
    step = max(step, group)
    return [slice(first, first + step) for first in range(0, max(len(x), 1), step)]


def all_reduce(x, op="sum"):
    """Sum or max of x over all ranks, in place; nothing to do in a single process."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x, op={"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[op])
    return x
