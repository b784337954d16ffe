"""The chunked prototype layer and loss against the unchunked formula, and what it holds in memory."""
import importlib

import pytest
import torch
import torch.nn.functional as F
from kernel_tools import ONE, PAIRS, close, explicit_loss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
from kernels import LogitChunks, prototype_loss, sinkhorn

FILE = importlib.import_module("kernels.prototype_loss")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # interpreted lanes of padding


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(FILE, "CHUNK", 16)


def prototype_inputs(items, rows_of, K, d, device, dtype=torch.float32):
    def unit(*shape):
        return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype).to(device)
    S, M = len(rows_of), max(max(pair) for pair in rows_of) + 1
    f, W, f_t, W_t = unit(items, S, d), unit(K, d), unit(items, M, d), unit(K, d)
    a, r = sinkhorn([(f_t @ W_t.T).flatten(0, 1)], 0.05)
    return [f.requires_grad_(), W.requires_grad_(), f_t, W_t, a, r.view(items, M), torch.tensor(rows_of, device=device),
            torch.rand(items, S, dtype=dtype, device=device)]


def unchunked(f, W, f_t, W_t, a, r, rows_of, weight):
    return explicit_loss((f @ W.T).flatten(0, 1), (f_t @ W_t.T).flatten(0, 1), a, r.flatten(), rows_of, weight.flatten())


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "references"])
@pytest.mark.parametrize("rows_of", [PAIRS, ONE], ids=str)
def test_equals_the_unchunked_formula(rows_of, reference, device):
    inputs = prototype_inputs(37 // len(rows_of), rows_of, 300, 8, device)
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    want = unchunked(*exact)
    kernels.use_reference(reference)
    loss, losses = prototype_loss(*inputs, 0.1, 0.05)
    close("losses", losses.flatten(), want, 1e-5)
    close("loss", loss, want.sum(), 1e-5)
    for got, gradient in zip(torch.autograd.grad(3 * loss, inputs[:2]), torch.autograd.grad(3 * want.sum(), exact[:2])):
        close("gradient", got, gradient, 1e-5)


def test_gradcheck():
    kernels.use_reference(True)
    f, W, *inputs = prototype_inputs(9, [[1, -1], [0, 1]], 5, 3, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda f, W: prototype_loss(f, W, *inputs, 0.1, 0.05)[0], (f, W))


def test_half_precision(device):
    """float16 logits, bfloat16 gradients: gradients good to a percent although the weights are tiny."""
    inputs = prototype_inputs(11, PAIRS, 300, 32, device)
    inputs[-1] = inputs[-1] * 1e-6
    want = unchunked(*inputs)
    with torch.autocast(torch.device(device).type, torch.bfloat16):  # as in training; it must not round anything else
        loss, losses = prototype_loss(*inputs, 0.1, 0.05, torch.bfloat16)
    close("losses", losses.flatten(), want, 2e-3)
    for got, gradient in zip(torch.autograd.grad(loss, inputs[:2]), torch.autograd.grad(want.sum(), inputs[:2])):
        assert got.dtype == torch.float32
        close("gradient", got, gradient, 1e-2)


def test_holds_a_chunk_of_logits_at_most(device):
    """With kernels, no tensor made on the way is larger than a chunk, and only two are as large: student's, teacher's."""
    inputs, chunk, made = prototype_inputs(70, ONE, 900, 8, device), 16 * 900, []

    class Storages(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel() >= chunk
                        and x.is_floating_point())  # the interpreter copies bytes
            return out

    with Storages():
        loss, _ = prototype_loss(*inputs, 0.1, 0.05)
        loss.backward()
    assert max(x.numel() for x in made) == chunk
    assert len({x.untyped_storage().data_ptr() for x in made}) == 2


def test_without_rows(device):
    f, W, f_t, W_t, a, r, rows_of, weight = prototype_inputs(1, ONE, 30, 8, device)
    loss, losses = prototype_loss(f[:0], W, f_t[:0], W_t, a, r[:0], rows_of, weight[:0], 0.1, 0.05)
    loss.backward()
    assert loss == 0 and losses.shape == (0, 1) and (W.grad == 0).all()


def test_refuses(device):
    inputs = prototype_inputs(2, PAIRS, 30, 8, device)
    for i, name in enumerate(("prototypes", "teacher_features", "teacher_prototypes", "a", "r", "rows_of", "weight"), 1):
        wrong = [x[..., :-1] if j == i else x for j, x in enumerate(inputs)]
        with pytest.raises(ValueError, match=f"^{name} must be"):
            prototype_loss(*wrong, 0.1, 0.05)


@pytest.mark.parametrize("kept", [True, False])
def test_logit_chunks(kept, device, monkeypatch):
    """The same rows in the same order on every pass, whether kept or computed again."""
    monkeypatch.setattr(FILE, "KEPT_BYTES", 2 ** 30 if kept else 0)
    features, prototypes = torch.randn(37, 8, device=device), torch.randn(50, 8, device=device)
    chunks = LogitChunks(features, prototypes, torch.float32)
    for _ in range(2):
        sizes, rows = zip(*((len(x), x.clone()) for x in chunks))
        assert sizes == ((37,) if kept else (16, 16, 5))
        close("logits", torch.cat(rows), features @ prototypes.T, 1e-6)
    assert next(iter(LogitChunks(features, prototypes, torch.bfloat16))).dtype == torch.float16
    assert [len(x) for x in LogitChunks(features[:0], prototypes, torch.float32)] == [0]


def test_sinkhorn_of_recomputed_chunks(device, monkeypatch):
    features, prototypes = F.normalize(torch.randn(37, 8, device=device), dim=1), torch.randn(50, 8, device=device)
    want = sinkhorn([features @ prototypes.T], 0.05)
    monkeypatch.setattr(FILE, "KEPT_BYTES", 0)
    for name, got, expected in zip("ar", sinkhorn(LogitChunks(features, prototypes, torch.float32), 0.05), want):
        close(name, got, expected, 3e-6)
