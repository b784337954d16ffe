"""What the kernel tests share: operands at the edge of mapped memory, tolerances, golden numbers.

A read or write beyond the end of an operand made by `edge` is a segmentation fault.
"""
import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU

import kernels
from kernels.common import HAVE_TRITON

GOLDEN = Path(__file__).parent / "golden" / "losses.npz"
HALF = [torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's tl.dot returns garbage for bfloat16
FLOATS = [torch.float32] + HALF
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
needs_kernels = pytest.mark.skipif(not HAVE_TRITON, reason="Triton is not installed: there are only references here")


def close(label, got, want, tolerance):
    """Relative RMS error of a tensor; NaN fails."""
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    assert got.shape == want.shape, f"{label}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = ((got - want).norm() / want.norm().clamp(min=1e-30)).item()
    assert error <= tolerance, f"{label}: relative RMS error {error:.2e} > {tolerance:.0e}"


def memory(num_bytes, front=mmap.PAGESIZE):
    """A buffer whose last byte is the last before a page that nobody may touch, and the offset of its first byte."""
    size = -(-(front + num_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    buffer = mmap.mmap(-1, size + mmap.PAGESIZE, flags=lazily)
    start = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return buffer, size - num_bytes


def edge(x):
    """A copy of x that ends at the edge of mapped memory and has NaN before it (as it is on a GPU, or if empty)."""
    if x.is_cuda or not x.numel():
        return x
    buffer, offset = memory(x.numel() * x.element_size())
    buffer[:offset] = b"\xff" * offset  # all bits set: NaN in every float type
    return torch.frombuffer(buffer, dtype=x.dtype, count=x.numel(), offset=offset).view(x.shape).copy_(x.detach())


def far_rows(x):
    """x with rows 2^30 numbers apart: the third row is out of reach of a 32-bit offset. Only touched pages exist."""
    rows, (stride, width) = len(x), (2 ** 30, x.shape[1])
    count = (rows - 1) * stride + width
    if x.is_cuda:
        flat = torch.zeros(count, dtype=x.dtype, device=x.device)
    else:
        buffer, offset = memory(count * x.element_size())
        flat = torch.frombuffer(buffer, dtype=x.dtype, count=count, offset=offset)
    return flat.as_strided((rows, width), (stride, 1)).copy_(x)


@pytest.fixture(autouse=True)
def outputs_at_the_edge(monkeypatch, poisoned_empty):
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: edge(new_empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: edge(empty_like(*args, **kwargs)))


def golden():
    return {name: torch.from_numpy(np.asarray(x)) for name, x in np.load(GOLDEN).items()}


def with_grad(op, x, dout):
    """op(x) and the gradient of sum(op(x) * dout)."""
    x = x.detach().requires_grad_()
    out = op(x)
    return out, torch.autograd.grad(out, x, dout)[0]


# ---- inputs of the losses ----

PAIRS, ONE = [[1, -1], [0, -1], [0, 1], [2, 0], [1, 1]], [[0, -1]]  # rows_of: 5 student rows of 3 teacher rows; 1 of 1


def logits(rows, K, dtype, device, scale=1.0, shift=0.0):
    return edge((torch.randn(rows, K, device=device) * scale + shift).to(dtype))


def loss_inputs(items, rows_of, K, dtype, device, shift=0.0):
    """Student and the other tensors; one weight is 0, and one item is padding (r = inf, weight 0) if there are several."""
    S, M = len(rows_of), max(max(pair) for pair in rows_of) + 1
    student = logits(items * S, K, dtype, device, 0.5, shift)
    teacher = logits(items * M, K, dtype, device, 0.2, shift)
    a = torch.randn(K, device=device)
    r = (teacher.double() / 0.05 - a.double()).logsumexp(1).to(torch.promote_types(dtype, torch.float32))
    weight = torch.rand(items * S, device=device)
    weight[1:2] = 0
    if items > 1:
        r[M:2 * M], weight[S:2 * S] = float("inf"), 0
    return student, (teacher, edge(a), edge(r), edge(torch.tensor(rows_of, device=device)), edge(weight))


def explicit_loss(student, teacher, a, r, rows_of, weight, student_temp=0.1, teacher_temp=0.05):
    """The losses of all rows as torch writes them, (items * S,), with gradient."""
    items, S = len(student) // len(rows_of), len(rows_of)
    p = (teacher / teacher_temp - a - r[:, None]).exp().unflatten(0, (items, -1))
    return torch.stack([weight[i] * sum(F.cross_entropy(student[i] / student_temp, p[i // S, j])
                                        for j in rows_of[i % S] if j >= 0) for i in range(items * S)])


def check_cross_entropy(student, inputs, tolerance):
    exact = student.double().requires_grad_()
    want = explicit_loss(exact, *[x.double() if x.is_floating_point() else x for x in inputs])
    want_gradient, = torch.autograd.grad(want.sum(), exact)
    loss, gradient = kernels.cross_entropy(student, *inputs, 0.1, 0.05)
    assert loss.dtype == torch.float32 and gradient.data_ptr() == student.data_ptr()
    assert gradient.dtype == (torch.bfloat16 if student.dtype == torch.float16 else student.dtype)
    close("loss", loss, want, 2e-5)
    close("gradient", gradient, want_gradient, tolerance)


def rope_table(h, w, prefix, D, base=100.0):
    """DINOv3's (cos, sin), float32 (prefix + h * w, D/2): row angles, then column angles; the prefix does not turn."""
    periods = base ** (2 * torch.arange(D // 4).double() / (D // 2))                          # (D/4,)
    row, column = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in (h, w)]                       # -1 .. 1
    places = torch.stack(torch.meshgrid(row, column, indexing="ij"), -1).view(h * w, 2, 1)
    angles = (2 * torch.pi * places / periods).flatten(1)                                     # (h * w, D/2)
    angles = torch.cat([torch.zeros(prefix, D // 2), angles])
    return angles.cos().float(), angles.sin().float()
