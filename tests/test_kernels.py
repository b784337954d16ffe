"""Every kernel against its plain-torch reference, and every reference against an independent definition.

Without a GPU Triton's interpreter runs the kernels; with one the same tests run on it, bfloat16 included.
Operands lie at the edge of mapped memory (`edge`): a read or write beyond the end is a segmentation fault.
"""
import ctypes
import importlib
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import kernels
from conftest import ON_GPU
from kernels import all_reduce, attention, cross_entropy, sinkhorn, softmax_center, update_center
from kernels.common import HAVE_TRITON

attention_ref = importlib.import_module("kernels.attention").attention_ref
column_sum = importlib.import_module("kernels.sinkhorn").column_sum
cross_entropy_ref = importlib.import_module("kernels.cross_entropy").cross_entropy_ref

GOLDEN = Path(__file__).parent / "golden" / "losses.npz"
HALF = [torch.float16] + [torch.bfloat16] * ON_GPU  # the interpreter's tl.dot returns garbage for bfloat16
FLOATS = [torch.float32] + HALF
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Lanes of padding may overflow; they are never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
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


# ---- attention ----

def check_attention(qkv, shapes, H, tolerance):
    dout = edge(torch.randn(len(qkv), qkv.shape[1] // 3, device=qkv.device).to(qkv.dtype))
    out, dqkv = with_grad(lambda x: attention(x, shapes, H), qkv, dout)
    assert out.dtype == dqkv.dtype == qkv.dtype
    want, want_grad = with_grad(lambda x: attention_ref(x, shapes, H), qkv.double(), dout.double())
    close("out", out, want, tolerance)
    C = qkv.shape[1] // 3
    for i, name in enumerate(("dq", "dk", "dv")):
        close(name, dqkv[:, i * C:(i + 1) * C], want_grad[:, i * C:(i + 1) * C], tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shapes, H, D", [
    ([(2, 41), (0, 201), (1, 1), (1, 37), (3, 0)], 2, 32),
    ([(1, 37)], 3, 32),
    ([(1, 1), (2, 41)], 2, 64),
    ([(1, 41)], 1, 128),
], ids=lambda x: str(x).replace(" ", ""))
def test_attention(shapes, H, D, dtype, device):
    T = sum(B * N for B, N in shapes)
    check_attention(edge(torch.randn(T, 3 * H * D, device=device).to(dtype)), shapes, H, TOLERANCE[dtype])


@needs_kernels
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shapes, H, D", [([(1, 201), (2, 41)], 1, 64), ([(1, 261)], 1, 32), ([(1, 201)], 1, 128)],
                         ids=lambda x: str(x).replace(" ", ""))
def test_attention_many_tokens(shapes, H, D, dtype, device):
    T = sum(B * N for B, N in shapes)
    check_attention(edge(torch.randn(T, 3 * H * D, device=device).to(dtype)), shapes, H, TOLERANCE[dtype])


@needs_kernels
def test_attention_reads_strided_qkv(device):
    wide = torch.full((2 * 41, 3 * 64 + 5), float("nan"), device=device)
    qkv = wide[:, 2:2 + 3 * 64].copy_(torch.randn(2 * 41, 3 * 64))
    check_attention(qkv, [(2, 41)], 2, TOLERANCE[torch.float32])


@needs_kernels
def test_attention_offsets_are_64_bit(device):
    check_attention(far_rows(torch.randn(4, 3 * 32, device=device).half()), [(1, 1), (1, 3)], 1, 1e-3)


@needs_kernels
@pytest.mark.parametrize("sign", [-1, 1])
def test_attention_extreme_scores(sign, device):
    # All scores of a row lie near sign * 1e4: exponentials over- and underflow unless the row's maximum is taken out.
    H, D, N = 1, 32, 41
    direction = torch.randn(1, D, device=device) * 10
    q = direction * (1 + 0.01 * torch.randn(N, 1, device=device))
    k = sign * direction * 1e4 * D ** 0.5 / direction.square().sum() + 0.05 * torch.randn(N, D, device=device)
    check_attention(edge(torch.cat([q, k, torch.randn(N, D, device=device)], 1)), [(1, N)], H, 1e-2)


@needs_kernels
def test_attention_keeps_images_apart(device):
    # One broken image must not touch its neighbours, whose padding reaches into it.
    qkv = torch.randn(3 * 37, 3 * 32, device=device)
    qkv[37:74] = float("nan")
    out, dqkv = with_grad(lambda x: attention(x, [(3, 37)], 1), qkv, torch.ones(3 * 37, 32, device=device))
    for x in (out, dqkv):
        assert x[:37].isfinite().all() and x[74:].isfinite().all()


@needs_kernels
def test_attention_without_tokens(device):
    qkv = torch.randn(0, 3 * 32, device=device)
    out, dqkv = with_grad(lambda x: attention(x, [(0, 41), (3, 0)], 1), qkv, torch.randn(0, 32, device=device))
    assert out.shape == (0, 32) and dqkv.shape == (0, 96)


@needs_kernels
def test_attention_takes_an_expanded_gradient(device):
    qkv = torch.randn(41, 3 * 32, device=device, requires_grad=True)
    attention(qkv, [(1, 41)], 1).sum().backward()
    want = with_grad(lambda x: attention_ref(x, [(1, 41)], 1), qkv, torch.ones(41, 32, device=device))[1]
    close("dqkv", qkv.grad, want, 3e-6)


@needs_kernels
def test_attention_refuses(device):
    x = torch.randn(41, 3 * 48, device=device)
    with pytest.raises(ValueError, match="head dims 32, 64 and 128, not 48"):
        attention(x, [(1, 41)], 1)
    with pytest.raises(ValueError, match="float64"):
        attention(torch.randn(41, 96, device=device).double(), [(1, 41)], 1)
    with pytest.raises(ValueError, match="adjacent"):
        attention(torch.randn(96, 41, device=device).T, [(1, 41)], 1)
    for shapes, H in (([(1, 40)], 1), ([(1, 41)], 5)):
        with pytest.raises(ValueError, match="one row per token"):
            attention(x, shapes, H)


@pytest.mark.parametrize("shapes, H, D", [([(2, 5), (0, 9), (3, 1)], 2, 6), ([(1, 201)], 3, 32)], ids=str)
def test_attention_reference_is_sdpa(shapes, H, D):
    def sdpa(qkv):
        outs, first = [], 0
        for B, N in shapes:
            q, k, v = qkv[first:first + B * N].view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
            outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B * N, H * D))
            first += B * N
        return torch.cat(outs)
    qkv = torch.randn(sum(B * N for B, N in shapes), 3 * H * D).double()
    dout = torch.randn(len(qkv), H * D).double()
    for label, got, want in zip(("out", "dqkv"), with_grad(lambda x: attention_ref(x, shapes, H), qkv, dout),
                                with_grad(sdpa, qkv, dout)):
        close(label, got, want, 1e-12)


def test_attention_reference_ignores_autocast():
    kernels.use_reference(True)
    qkv = torch.randn(9, 3 * 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention(qkv, [(1, 9)], 1)
    assert torch.equal(inside, attention(qkv, [(1, 9)], 1))


# ---- centering ----

def logits(rows, K, dtype, device, scale=1.0, shift=0.0):
    return edge((torch.randn(rows, K, device=device) * scale + shift).to(dtype))


def probabilities(x, a, r, temp):
    return (x.double() / temp - a.double() - r.double()[:, None]).exp()


@needs_kernels
@pytest.mark.parametrize("rows, K", [(3, 1), (5, 300), (2, 2048), (3, 5000), (2, 65536)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_softmax_center(rows, K, dtype, device):
    x = logits(rows, K, dtype, device, shift=-5)  # far below 0: a zero in the padding would outweigh them all
    center = edge(torch.randn(K, device=device))
    a, r = softmax_center(x, center, 0.04)
    assert a.dtype == r.dtype == torch.float32 and not r.requires_grad
    close("p", probabilities(x, a, r, 0.04), ((x.double() - center.double()) / 0.04).softmax(1), 3e-5)
    close("r", r, (x.double() / 0.04 - a.double()).logsumexp(1), 1e-6)


@needs_kernels
@pytest.mark.parametrize("scale", [-1e4, 1e4])
def test_softmax_center_extreme_logits(scale, device):
    a, r = softmax_center(logits(4, 300, torch.float32, device, 1, scale), torch.zeros(300, device=device), 0.04)
    close("r", r, torch.full((4,), scale / 0.04), 1e-3)


@needs_kernels
def test_softmax_center_offsets_are_64_bit(device):
    x, center = torch.randn(3, 70, device=device).half(), torch.randn(70, device=device)
    _, r = softmax_center(far_rows(x), center, 0.1)
    close("r", r, (x.double() / 0.1 - center.double() / 0.1).logsumexp(1), 1e-5)


def test_softmax_center_reference_is_softmax():
    kernels.use_reference(True)
    x, center = torch.randn(7, 33).double(), torch.randn(33).double()
    a, r = softmax_center(x, center, 0.07)
    assert a.dtype == r.dtype == torch.float64
    close("p", probabilities(x, a, r, 0.07), ((x - center) / 0.07).softmax(1), 1e-12)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_update_center(as_tensor, device):
    center, total = torch.randn(9, device=device), torch.randn(9, device=device)
    count = (lambda n: torch.tensor(n, device=device)) if as_tensor else (lambda n: n)
    close("center", update_center(center, total, count(4), 0.7), 0.7 * center + 0.3 * total / 4, 1e-6)
    assert torch.equal(update_center(center, total * 0, count(0)), center)


# ---- Sinkhorn-Knopp ----

def sinkhorn_matrix(x, temp, n_iterations):
    """Sinkhorn-Knopp as one normalises a matrix: columns to 1 / K in all, then rows to 1 / rows in all."""
    Q = (x.double() / temp - (x.double() / temp).max()).exp()
    for _ in range(n_iterations):
        Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
        Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
    return Q * Q.shape[0]


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows, K, n_iterations", [(1, 70, 3), (37, 300, 3), (4, 1100, 2)])
def test_sinkhorn(rows, K, n_iterations, dtype, device):
    x = logits(rows, K, dtype, device, 0.3, -1)
    a, r = sinkhorn(x, 0.06, n_iterations)
    assert a.shape == (K,) and r.shape == (rows,) and a.dtype == r.dtype == torch.float32
    p = probabilities(x, a, r, 0.06)
    close("p", p, sinkhorn_matrix(x, 0.06, n_iterations), 2e-5)
    close("row sums", p.sum(1), torch.ones(rows), 2e-5)


@needs_kernels
def test_sinkhorn_many_rows(device):
    x = logits(530, 131, torch.float16, device, 0.3, -1)  # more rows than one program sums
    close("p", probabilities(x, *sinkhorn(x, 0.06, 1), 0.06), sinkhorn_matrix(x, 0.06, 1), 2e-5)


@needs_kernels
def test_sinkhorn_column_sum(device):
    x, a, r = edge(torch.randn(5, 131, device=device)), edge(torch.randn(131, device=device)), torch.randn(5)
    got = column_sum(x, a, edge(r.to(device)), 0.5)
    close("sum", got, (x.double() / 0.5 - a.double() - r.to(device).double()[:, None]).exp().sum(0), 1e-5)


@needs_kernels
def test_sinkhorn_offsets_are_64_bit(device):
    x = torch.randn(3, 70, device=device).half()
    a, r = sinkhorn(far_rows(x), 0.1)
    close("p", probabilities(x, a, r, 0.1), sinkhorn_matrix(x, 0.1, 3), 1e-5)


@needs_kernels
def test_sinkhorn_extreme_logits(device):
    a, r = sinkhorn(logits(20, 300, torch.float32, device).sign() * 1e4, 0.04)
    assert a.isfinite().all() and r.isfinite().all()


@pytest.mark.parametrize("n_iterations", [1, 3, 50])
def test_sinkhorn_reference_is_the_matrix_algorithm(n_iterations):
    kernels.use_reference(True)
    x = torch.randn(12, 30).double()
    a, r = sinkhorn(x, 0.3, n_iterations)
    p = probabilities(x, a, r, 0.3)
    close("p", p, sinkhorn_matrix(x, 0.3, n_iterations), 1e-12)
    close("row sums", p.sum(1), torch.ones(12), 1e-12)
    if n_iterations == 50:
        close("column sums", p.sum(0), torch.full((30,), 12 / 30), 1e-6)


def rank_main(rank, rows, folder):
    """One of three ranks: its rows' targets and the shared vectors, saved for the test to compare."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(rows))
    first = sum(rows[:rank])
    x = torch.load(f"{folder}/x.pt")[first:first + rows[rank]]
    for flag in (False, True):
        kernels.use_reference(flag)
        a, r = sinkhorn(x, 0.1)
        center = update_center(torch.ones(x.shape[1]), x.sum(0), len(x))
        unmoved = update_center(torch.ones(x.shape[1]), 0 * x.sum(0), 0)
        torch.save((a, r, center, unmoved, kernels.mode("cpu")), f"{folder}/{rank}_{flag}.pt")
    dist.destroy_process_group()


def test_three_ranks_equal_one(tmp_path, monkeypatch):
    rows = [5, 0, 8]
    x = torch.randn(13, 40)
    torch.save(x, tmp_path / "x.pt")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(rank_main, (rows, str(tmp_path)), nprocs=3)
    kernels.use_reference(True)
    a, r = sinkhorn(x, 0.1)
    for flag in (False, True):
        ranks = [torch.load(tmp_path / f"{rank}_{flag}.pt") for rank in range(3)]
        assert ("references" in ranks[0][4]) == (flag or not HAVE_TRITON or ON_GPU)
        for other in ranks[1:]:
            assert torch.equal(other[0], ranks[0][0]) and torch.equal(other[2], ranks[0][2])
        close("a", ranks[0][0], a, 1e-6)
        close("r", torch.cat([x[1] for x in ranks]), r, 1e-6)
        close("center", ranks[1][2], 0.9 + 0.1 * x.mean(0), 1e-6)
        assert torch.equal(ranks[2][3], torch.ones(40))


def test_all_reduce_alone_changes_nothing():
    x = torch.arange(3.0)
    assert all_reduce(x) is x and all_reduce(x, "max") is x and x.tolist() == [0, 1, 2]


# ---- cross-entropy ----

def loss_inputs(R, S, K, dtype, device, shift=0.0):
    """Student and the other tensors: rows with one and two teacher rows, the last row in both columns, a weight 0."""
    student, teacher = logits(R, K, dtype, device, 0.5, shift), logits(S, K, dtype, device, 0.2, shift)
    a = torch.randn(K, device=device)
    r = (teacher.double() / 0.05 - a.double()).logsumexp(1).float()
    rows = torch.stack([torch.arange(R) % max(S, 1), S - 1 - torch.arange(R) % (S + 1)], 1).to(device)
    weight = torch.rand(R, device=device)
    weight[1:2] = 0
    return student, (teacher, *[edge(x) for x in (a, r, rows, weight)])


def check_cross_entropy(student, inputs, tolerance):
    dloss = edge(torch.randn(len(student), device=student.device))
    loss, grad = with_grad(lambda s: cross_entropy(s, *inputs, 0.1, 0.05), student, dloss)
    assert loss.dtype == torch.float32 and grad.dtype == student.dtype
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    want, want_grad = with_grad(lambda s: cross_entropy_ref(s, *exact, 0.1, 0.05), student.double(), dloss.double())
    close("loss", loss, want, 2e-5)
    close("gradient", grad, want_grad, tolerance)


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("R, S, K", [(7, 3, 300), (4, 2, 2048), (5, 2, 5000), (3, 2, 37)])
def test_cross_entropy(R, S, K, dtype, device):
    # Student logits far below 0: a zero in the padding would outweigh them all.
    student, inputs = loss_inputs(R, S, K, dtype, device, shift=-3)
    check_cross_entropy(student, inputs, max(2e-5, TOLERANCE[dtype]))


@needs_kernels
@pytest.mark.parametrize("R, S, K", [(2, 2, 65536), (1, 1, 262144)])
def test_cross_entropy_many_prototypes(R, S, K, device):
    student, inputs = loss_inputs(R, S, K, torch.float16, device)
    check_cross_entropy(student, inputs, 1e-3)


@needs_kernels
@pytest.mark.parametrize("S", [0, 3])
def test_cross_entropy_without_rows(S, device):
    student, inputs = loss_inputs(0, S, 300, torch.float32, device)
    loss, grad = with_grad(lambda s: cross_entropy(s, *inputs, 0.1, 0.05), student, torch.zeros(0, device=device))
    assert loss.shape == (0,) and grad.shape == (0, 300)


@needs_kernels
def test_cross_entropy_offsets_are_64_bit(device):
    student, (teacher, *vectors) = loss_inputs(3, 3, 70, torch.float16, device)
    check_cross_entropy(far_rows(student), [far_rows(teacher), *vectors], 1e-3)


@needs_kernels
def test_cross_entropy_extreme_logits(device):
    student = edge(torch.randn(6, 5000, device=device).sign() * 1e4)
    teacher = edge(torch.randn(3, 5000, device=device).sign() * 1e4)
    teacher[2] = -1e4  # its r is so low that any number but -inf in the padding overflows
    a, r = softmax_center(teacher, torch.zeros(5000, device=device), 0.04)
    rows = torch.tensor([[0, 1], [1, 2], [2, -1], [0, -1], [1, -1], [2, 2]], device=device)
    loss, grad = with_grad(lambda s: cross_entropy(s, teacher, a, r, rows, torch.ones(6, device=device), 0.1, 0.04),
                           student, torch.ones(6, device=device))
    assert loss.isfinite().all() and grad.isfinite().all()


def test_cross_entropy_reference_is_torch():
    kernels.use_reference(True)
    student, (teacher, a, r, rows, weight) = loss_inputs(7, 3, 50, torch.float64, "cpu")
    a, r, weight, dloss = a.double(), r.double(), weight.double(), torch.randn(7).double()
    p = probabilities(teacher, a, r, 0.05)

    def explicit(s):
        return torch.stack([sum(weight[i] * F.cross_entropy(s[i] / 0.1, p[j]) for j in rows[i] if j >= 0)
                            for i in range(7)])
    ours = with_grad(lambda s: cross_entropy(s, teacher, a, r, rows, weight, 0.1, 0.05), student, dloss)
    for label, got, want in zip(("loss", "gradient"), ours, with_grad(explicit, student, dloss)):
        close(label, got, want, 1e-12)


def test_cross_entropy_refuses(device):
    student, inputs = loss_inputs(4, 2, 30, torch.float32, device)
    for i, name in enumerate(("teacher", "a", "r", "teacher_rows", "weight")):
        wrong = [x[..., :-1] if j == i else x for j, x in enumerate(inputs)]
        with pytest.raises(ValueError, match=f"^{name} must be"):
            cross_entropy(student, *wrong, 0.1, 0.05)


# ---- all together ----

def test_references_pass_gradcheck():
    kernels.use_reference(True)
    qkv = torch.randn(4, 3 * 2 * 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: attention_ref(x, [(1, 3), (1, 1)], 2), qkv)
    student, (teacher, a, r, rows, weight) = loss_inputs(3, 2, 5, torch.float64, "cpu")
    inputs = teacher, a.double(), r.double(), rows, weight.double(), 0.5, 0.4
    assert torch.autograd.gradcheck(lambda s: cross_entropy(s, *inputs), student.requires_grad_())


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "references"])
@pytest.mark.parametrize("prefix", ["", "patch_"])
def test_targets_are_dinov2s(prefix, reference, device):
    kernels.use_reference(reference)
    g = {name: x.to(device) for name, x in golden().items()}
    x, center = g["teacher_patch" if prefix else "teacher_logits"], g["center"][0]
    close("centered", probabilities(x, *softmax_center(x, center, 0.05), 0.05), g[prefix + "prob_centered"], 3e-6)
    close("sinkhorn", probabilities(x, *sinkhorn(x, 0.05), 0.05), g[prefix + "prob_sinkhorn"], 1e-6)
    close("center", update_center(center, x.sum(0), len(x)), g[prefix + "center_after"][0], 1e-6)


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "references"])
@pytest.mark.parametrize("kind", ["centered", "sinkhorn"])
def test_losses_are_dinov2s(kind, reference, device):
    kernels.use_reference(reference)
    g = {name: x.to(device) for name, x in golden().items()}

    def loss(student, x, rows, weight):
        a, r = softmax_center(x, g["center"][0], 0.05) if kind == "centered" else sinkhorn(x, 0.05)
        return cross_entropy(student, x, a, r, rows, weight, 0.1, 0.05).sum()

    x, one_row = g["teacher_logits"], torch.full((70,), -1, device=device)
    rows = torch.arange(70, device=device)
    same = torch.stack([rows, one_row], 1)
    ones = torch.ones(24, device=device)
    close("global", loss(g["student_global"], x, same[:12], ones[:12]) / 12, g["dino_global_" + kind], 1e-6)
    # 4 local crops of 6 images, each against both global crops of its image
    both = torch.stack([rows[:24] % 6, rows[:24] % 6 + 6], 1)
    close("local", loss(g["student_local"], x, both, ones) / 6, g["dino_local_" + kind], 1e-6)
    close("ibot", loss(g["student_patch"], g["teacher_patch"], same, g["mask_weight"]) / 12, g["ibot_" + kind], 1e-6)


@needs_kernels
def test_two_runs_agree_bit_by_bit(device):
    qkv = torch.randn(2 * 41 + 37, 3 * 64, device=device)
    student, inputs = loss_inputs(5, 3, 5000, torch.float32, device)

    def everything():
        return [*with_grad(lambda x: attention(x, [(2, 41), (1, 37)], 2), qkv, torch.ones(119, 64, device=device)),
                *with_grad(lambda s: cross_entropy(s, *inputs, 0.1, 0.05), student, torch.ones(5, device=device)),
                *sinkhorn(student, 0.1), *softmax_center(student, inputs[1], 0.1)]
    assert all(torch.equal(x, y) for x, y in zip(everything(), everything()))


@needs_kernels
def test_dispatch(device):
    qkv = torch.randn(6, 3 * 5, device=device)
    with pytest.raises(ValueError, match="head dims"):  # proves that the kernel was chosen
        attention(qkv, [(2, 3)], 1)
    assert kernels.mode(device) == f"triton kernels ({'cuda' if ON_GPU else 'interpreter'})"
    kernels.use_reference(True)
    assert attention(qkv, [(2, 3)], 1).shape == (6, 5)
    assert kernels.mode(device) == f"plain-torch references ({device})"


def test_without_triton(tmp_path):
    # A machine without Triton imports the package, takes references on the CPU and explains itself on CUDA.
    (tmp_path / "triton.py").write_text("raise ImportError('no triton here')")
    root = Path(kernels.__file__).parents[1]
    code = ("import torch, kernels; from types import SimpleNamespace\n"
            "print(kernels.attention(torch.ones(4, 9), [(2, 2)], 1).shape, kernels.mode('cpu'))\n"
            "try: kernels.common.takes_kernel(SimpleNamespace(is_cuda=True))\n"
            "except RuntimeError as error: print(error)")
    env = dict(os.environ, PYTHONPATH=f"{tmp_path}{os.pathsep}{root}")
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "[4, 3]" in out and "plain-torch references (cpu)" in out
    assert "pip install triton" in out and "--reference_ops" in out
