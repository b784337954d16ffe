"""The attention kernels against their plain-torch reference, and the reference against an independent definition.

Without a GPU Triton's interpreter runs the kernels; with one the same tests run on it, bfloat16 included.
Operands lie at the edge of mapped memory (`edge`): a read or write beyond the end is a segmentation fault.
"""
import importlib

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import (FLOATS, HALF, TOLERANCE, close, edge, far_rows, needs_kernels,  # noqa: F401
                          outputs_at_the_edge, rope_table, with_grad)

import kernels
from kernels import attention

attention_ref = importlib.import_module("kernels.attention").attention_ref
# Lanes of padding may overflow; they are never stored.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check_attention(qkv, shapes, H, tolerance, rope=None):
    dout = edge(torch.randn(len(qkv), qkv.shape[1] // 3, device=qkv.device).to(qkv.dtype))
    out, dqkv = with_grad(lambda x: attention(x, shapes, H, rope), qkv, dout)
    assert out.dtype == dqkv.dtype == qkv.dtype
    want, want_grad = with_grad(lambda x: attention_ref(x, shapes, H, rope), qkv.double(), dout.double())
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


def tables(N, D, device):
    """(cos, sin) of random angles, the first token unturned."""
    angles = 10 * torch.rand(N, D // 2, device=device)
    angles[0] = 0
    return edge(angles.cos()), edge(angles.sin())


@needs_kernels
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shapes, with_rope, H, D", [
    ([(2, 41), (0, 201), (1, 9), (1, 37)], [True, True, False, True], 2, 32),
    ([(1, 5), (1, 67)], [False, True], 1, 64),
    ([(1, 41)], [True], 1, 128),
], ids=lambda x: str(x).replace(" ", ""))
def test_attention_rope(shapes, with_rope, H, D, dtype, device):
    rope = [tables(N, D, device) if turns else None for (_, N), turns in zip(shapes, with_rope)]
    qkv = edge(torch.randn(sum(B * N for B, N in shapes), 3 * H * D, device=device).to(dtype))
    check_attention(qkv, shapes, H, TOLERANCE[dtype], rope)


@needs_kernels
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("D", [64, 128])
def test_attention_rope_many_tokens(D, dtype, device):
    rope = [tuple(edge(x.to(device)) for x in rope_table(14, 14, 5, D)), None]
    check_attention(edge(torch.randn(201 + 41, 3 * D, device=device).to(dtype)), [(1, 201), (1, 41)], 1,
                    TOLERANCE[dtype], rope)


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
    cos = torch.ones(41, 24, device=device)
    wrong = cos[1:], cos[:, 1:], cos.double(), cos.T.contiguous().T, cos.to("meta")
    for rope in ([], [None, None], *[[(cos, x)] for x in wrong], *[[(x, cos)] for x in wrong]):
        with pytest.raises(ValueError, match=r"float32 tensors \(N, 24\)"):
            attention(x, [(1, 41)], 1, rope)


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


def test_attention_reference_rope_is_a_complex_product():
    B, N, H, D = 2, 7, 3, 8
    qkv, angles = torch.randn(B * N, 3 * H * D).double(), torch.randn(N, D // 2).double()
    got = attention_ref(qkv, [(B, N)], H, [(angles.cos(), angles.sin())])
    q, k, v = qkv.view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
    q, k = (torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles) for x in (q, k))
    p = ((q @ k.mH).real / D ** 0.5).softmax(-1)  # Re(q conj(k)) is the product of the pairs
    close("out", got, (p @ v).transpose(1, 2).reshape(B * N, H * D), 1e-12)
    further = angles + torch.randn(D // 2).double()  # only differences of places count
    close("moved", attention_ref(qkv, [(B, N)], H, [(further.cos(), further.sin())]), got, 1e-12)


def test_attention_reference_ignores_autocast():
    kernels.use_reference(True)
    qkv = torch.randn(9, 3 * 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attention(qkv, [(1, 9)], 1)
    assert torch.equal(inside, attention(qkv, [(1, 9)], 1))


def test_attention_reference_passes_gradcheck():
    qkv = torch.randn(4, 3 * 2 * 2).double().requires_grad_()
    angles = torch.randn(3, 1).double()
    for rope in (None, [(angles.cos(), angles.sin()), None]):
        assert torch.autograd.gradcheck(lambda x: attention_ref(x, [(1, 3), (1, 1)], 2, rope), qkv)


@needs_kernels
def test_attention_twice_agrees_bit_by_bit(device):
    qkv = torch.randn(2 * 41 + 37, 3 * 64, device=device)
    rope = [None, tables(37, 32, device)]
    first, second = (with_grad(lambda x: attention(x, [(2, 41), (1, 37)], 2, rope), qkv,
                               torch.ones(119, 64, device=device)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
