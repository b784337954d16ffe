"""Mixture of experts: against experts written out one token after another, and against the dense block it came from."""

import copy
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stage_tools import one_thread  # noqa: F401

import model
from model import SIZES, VisionTransformer
from networks import moe
from networks.moe import MixtureOfExperts, Routing, add_experts, balance_loss, gate_shares
from runtime import parameter_groups

VIT = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=4, num_heads=2, num_register_tokens=3,
           init_values=0.5, init_std=0.2)
C, E, D_TASK, HIDDEN = 8, 4, 6, 16
TOP_K = [None, 1, 2, 3, 4]


def randomize(module):
    for p in module.parameters():
        p.data.normal_(std=0.5)
    return module


def mixture(ffn, top_k, dtype=torch.float64):
    """(mixture of E different experts, norm, LayerScale), all of random weights."""
    dense = model.Mlp(C, HIDDEN) if ffn == "mlp" else model.SwiGLU(C, HIDDEN)
    parts = MixtureOfExperts(dense, E, D_TASK, top_k), torch.nn.LayerNorm(C), model.LayerScale(C, 1.0)
    return [randomize(part.to(dtype)) for part in parts]


def mixture_backbone(top_k=None, **config):
    """(dense backbone, the same with copies as experts in its later half, random gates), float64"""
    dense = randomize(VisionTransformer(**{**VIT, **config}).double())
    net = copy.deepcopy(dense)
    add_experts(net, [2, 3], E, D_TASK, top_k)
    for block in net.blocks[2:]:
        randomize(block.mlp.gate), randomize(block.mlp.task_gate)
    return dense, net


def draw(*shape, **how):
    return torch.randn(*shape, **{"dtype": torch.float64, **how})


def slices(mix):
    """Each expert's (weight 1, bias 1, weight 2, bias 2), as the docstring says they lie."""
    first, second = (mix.w12, mix.w3) if hasattr(mix, "w12") else (mix.fc1, mix.fc2)
    n, m = first.weight.shape[0] // E, second.weight.shape[1] // E
    return [(first.weight[e * n:e * n + n], first.bias[e * n:e * n + n], second.weight[:, e * m:e * m + m],
             second.bias[e]) for e in range(E)]


def by_token(mix, norm, scale, x, task):
    """(y, gates) of x (T, C) before any norm: one token after another, one expert after another, W [h ; e] + b."""
    W, rows, gates = torch.cat((mix.gate.weight, mix.task_gate.weight), dim=1), [], []
    for token in x:
        h = F.layer_norm(token, (C,), norm.weight, norm.bias, norm.eps)
        g = torch.softmax(W @ torch.cat((h, task)) + mix.gate.bias, 0)
        kept, y = sorted(range(E), key=lambda e: -g[e].item())[:mix.top_k or E], 0
        for e in kept:
            w1, b1, w2, b2 = slices(mix)[e]
            a = w1 @ h + b1
            a = F.silu(a[:len(a) // 2]) * a[len(a) // 2:] if hasattr(mix, "w12") else F.gelu(a)
            y = y + g[e] / sum(g[i] for i in kept) * (w2 @ a + b2)
        rows.append(y * scale.gamma)
        gates.append(g)
    return torch.stack(rows), torch.stack(gates)


def run(mix, norm, scale, x, task):
    routing = Routing(task, [])
    return mix(model.normalize(x, norm), norm, scale, routing), *routing.gates


def assert_same(got, want, label="", tolerance=1e-11):
    assert got.shape == want.shape, label
    assert (got - want).norm() <= tolerance * want.norm().clamp(min=1), (label, (got - want).norm())


# ---------------------------------------------------------------- one mixture

@pytest.mark.parametrize("idle", [False, True], ids=["all", "two experts without tokens"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=["split", "grouped"])
@pytest.mark.parametrize("top_k", TOP_K)
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_equals_experts_token_by_token(ffn, top_k, dtype, tolerance, idle, monkeypatch):
    mix, norm, scale = mixture(ffn, top_k, dtype)
    if idle:  # the first and one in the middle
        mix.gate.bias.data[[0, 2]] -= 50.0
    x, task = (draw(*shape, dtype=dtype, requires_grad=True) for shape in ((11, C), (D_TASK,)))
    calls, grouped_mm = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **how: calls.append(a) or grouped_mm(*a, **how))
    (y, gates), (want, want_gates) = (f(mix, norm, scale, x, task) for f in (run, by_token))
    assert_same(y, want, "y", tolerance)
    assert_same(gates, want_gates, "gates", tolerance)
    assert idle == {0, 2}.isdisjoint(gates.argmax(1).tolist())
    inputs = dict(x=x, task=task, **dict(norm.named_parameters()), gamma=scale.gamma,
                  **{f"mix.{name}": p for name, p in mix.named_parameters()})
    dy, dgates = torch.randn_like(y), torch.randn_like(gates)  # the gates' own gradient is the balance loss's
    got, want = (torch.autograd.grad((a * dy).sum() + (b * dgates).sum(), list(inputs.values()))
                 for a, b in ((y, gates), (want, want_gates)))
    for name, a, b in zip(inputs, got, want):
        assert_same(a, b, name, tolerance)
    assert bool(calls) == (top_k is not None and dtype == torch.float32)  # which way the products went


@pytest.mark.parametrize("gated", [False, True], ids=["gelu", "swiglu"])
@pytest.mark.parametrize("routed", [False, True])
def test_gradcheck_of_the_second_layer(gated, routed):
    width, ends = 6 if gated else 3, torch.tensor([2, 2, 5], dtype=torch.int32) if routed else None
    shapes = [(5, width), (5, 1), (3, 3, 4)] if routed else [(5, 3, width), (5, 3, 1), (4, 9)]
    inputs = [draw(*shape, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: moe.SecondLayer.apply(*x, ends, gated), inputs)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_top_k_of_all_is_the_soft_mixture_and_of_one_a_single_expert(ffn):
    mix, norm, scale = mixture(ffn, None)
    inputs = mix, norm, scale, draw(9, C), draw(D_TASK)
    soft, _ = run(*inputs)
    mix.top_k = E
    assert_same(run(*inputs)[0], soft)
    mix.top_k, mix.gate.bias.data[2] = 1, 60.0
    before, _ = run(*inputs)
    for e, weights in enumerate(slices(mix)):
        for w in weights:
            w.data += 1.0
        after, _ = run(*inputs)
        assert torch.equal(after, before) == (e != 2)
        before = after


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_bfloat16_is_near_float32_and_its_gates_are_float32(ffn, top_k, device):
    """On a GPU also grouped products of bfloat16 against those expert by expert of float32."""
    mix, norm, scale = (part.to(device) for part in mixture(ffn, top_k, torch.float32))
    mix.gate.bias.data += 40.0  # in bfloat16 the logits would be whole multiples of a quarter
    x, task = (draw(*shape, dtype=torch.float32, device=device) for shape in ((64, C), (D_TASK,)))
    x = x[run(mix, norm, scale, x, task)[1].sort(dim=1).values.diff(dim=1).amin(1) > 0.02]  # no gates near a tie
    parameters, results = list(mix.parameters()), []
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y, gates = run(mix, norm, scale, x, task)
            h = model.normalize(x, norm)
        assert y.dtype == h.dtype == (torch.bfloat16 if autocast else torch.float32)
        grads = torch.autograd.grad(y.float().square().sum(), parameters, allow_unused=top_k == 1)
        results.append((y.float(), *grads))
    for want, got in zip(*results):
        assert want is None or (got - want).norm() <= 0.03 * want.norm() + 1e-3
    want = mix.double().probabilities(h.double(), norm.double(), task.double())
    assert len(x) > 20 and gates.dtype == torch.float32 and (gates - want).abs().max() < 1e-5
    assert (gates.sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("top_k, wide", [(None, E), (2, 2)])
def test_keeps_one_wide_matrix(top_k, wide):
    mix, norm, scale = mixture("mlp", top_k)
    x, kept = draw(50, C, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(mix, norm, scale, x, draw(D_TASK))
    found = {t.data_ptr() for t in kept if t.numel() == 50 * wide * HIDDEN}
    assert len(found) == 1 and max(t.numel() for t in kept) == 50 * wide * HIDDEN


# ---------------------------------------------------------------- in a backbone

@pytest.mark.parametrize("config", [dict(), dict(ffn_layer="swiglu", init_values=None),
                                    dict(pos="rope", norm_eps=1e-5, mask_k_bias=True)], ids=["mlp", "swiglu", "rope"])
@pytest.mark.parametrize("top_k", TOP_K)
def test_copies_equal_the_dense_backbone(top_k, config):
    dense, net = mixture_backbone(top_k, **config)
    x, seen = draw(3, 1, 32, 24), []
    wanted = dense.get_intermediate_layers(x, [1, 3], return_class_token=True)
    for task in draw(2, D_TASK):
        routing = Routing(task, [])
        found = net.get_intermediate_layers(x, [1, 3], return_class_token=True, routing=routing)
        for got, want in zip(sum(found, ()), sum(wanted, ())):
            assert_same(got, want, tolerance=1e-12)
        assert [g.shape for g in routing.gates] == [(3 * (1 + 3 + 12), E)] * 2  # cls and registers too
        seen.append(torch.stack(routing.gates))
    assert (seen[0] - seen[1]).abs().max() > 1e-3  # whatever the gates were


def test_gradients_reach_all_and_tell_copies_apart_and_then_tasks_differ():
    net = VisionTransformer(**VIT).double()
    add_experts(net, [2, 3], E, D_TASK)  # gates as they start
    mix, x, tasks = net.blocks[2].mlp, draw(2, 1, 32, 32), draw(2, D_TASK, requires_grad=True)
    for equal in (True, False):
        first, second = (net.get_intermediate_layers(x, 1, routing=Routing(task, []))[0] for task in tasks)
        assert ((first - second).norm() < 1e-12 * first.norm()) == equal
        if equal:
            first[..., 0].sum().backward()  # of copies
            randomize(mix)
    assert tasks.grad[0].norm() > 0 and tasks.grad[1].norm() == 0
    for grads in (mix.fc1.weight.grad.chunk(E), mix.fc2.weight.grad.chunk(E, dim=1), mix.fc2.bias.grad):
        assert all((a - b).norm() > 1e-3 * a.norm() > 0 for i, a in enumerate(grads) for b in grads[:i])
    assert all(p.grad.norm() > 0 for p in mix.parameters())


def test_checkpointed_blocks_with_drop_path_have_the_same_gradients():
    _, net = mixture_backbone(2, drop_path_rate=0.5)
    x, task, found = draw(4, 1, 32, 32), draw(D_TASK), []
    drops = net.draw_drop_path([(4, 20)], np.random.default_rng(0))
    for net.checkpoint_activations in (False, True):
        net.zero_grad()
        routing = Routing(task, [])
        y, = net.get_intermediate_layers(x, 1, drops=drops, routing=routing)
        assert [g.shape for g in routing.gates] == [(2 * 20, E)] * 2  # of the images that are kept
        (y.square().mean() + balance_loss(routing.gates, 2)).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 40
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_state_dict_of_a_trained_mixture_loads():
    dense, net = mixture_backbone(2)
    randomize(net)
    assert set(net.state_dict()) == set(dense.state_dict()) | {
        f"blocks.{i}.mlp.{name}" for i in (2, 3) for name in ("gate.weight", "gate.bias", "task_gate.weight")}
    again = mixture_backbone(2)[1]
    again.load_state_dict(net.state_dict())
    x, task = draw(1, 1, 32, 32), draw(D_TASK)
    got, want = (n.get_intermediate_layers(x, 4, routing=Routing(task, []))[3] for n in (again, net))
    assert torch.equal(got, want)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_learning_rates_and_decay(ffn):
    net = torch.nn.Module()
    net.backbone = mixture_backbone(ffn_layer=ffn)[1]
    groups = {id(p): group for group in parameter_groups(net, 0.5) for p in group["params"]}
    own = {name: groups[id(p)] for name, p in net.backbone.blocks[2].mlp.named_parameters()}
    assert len(own) == 7 and {group["lr_multiplier"] for group in own.values()} == {0.5 ** 2}
    assert all((group["wd_multiplier"] == 0) == name.endswith("bias") for name, group in own.items())


@pytest.mark.parametrize("arch, dense, mixed", [("vit_base", 85.67, {2: 28.4, 4: 85.0, 8: 198}),
                                                ("vit_small", 21.60, {4: 21.3, 8: 49.7})])
def test_parameters_that_six_mixtures_add(arch, dense, mixed):
    """To those of DINOv3's ViT, from one of its twelve blocks; in millions, and to the last one."""
    for experts, added in mixed.items():
        net = VisionTransformer(**{**SIZES[arch], "depth": 1}, num_register_tokens=4, pos="rope", mask_k_bias=True)
        total, block = (sum(p.numel() for p in part.parameters()) for part in (net, net.blocks))
        add_experts(net, [0], experts, 64)
        count, width = 6 * (sum(p.numel() for p in net.blocks.parameters()) - block), net.embed_dim
        assert abs((total + 11 * block) / 1e6 - dense) < 0.006 and abs(count / 1e6 - added) < 0.006 * added
        assert count == 6 * ((experts - 1) * (8 * width * width + 5 * width) + experts * (width + 1 + 64))


# ---------------------------------------------------------------- balance and shares

@pytest.mark.parametrize("top_k", TOP_K)
def test_balance_loss_and_shares_written_out(top_k):
    gates, losses, grads = [draw(7, E).softmax(-1).requires_grad_() for _ in range(2)], [], []
    shares = gate_shares(gates)
    assert shares.shape == (2, E) and not shares.requires_grad
    for p, share in zip(gates, shares):
        k, total, grad = top_k or E, 0.0, torch.zeros_like(p)
        for e in range(E):
            f = sum(e in sorted(range(E), key=lambda i: -row[i].item())[:k] for row in p) / (7 * k)
            mean = sum(row[e].item() for row in p) / 7
            assert abs(share[e].item() - mean) < 1e-12
            total += f * mean
            grad[:, e] = E * f / 7 / len(gates)
        losses.append(E * total)
        grads.append(grad)
    got = balance_loss(gates, top_k)
    assert abs(got.item() - sum(losses) / 2) < 1e-12
    for found, want in zip(torch.autograd.grad(got, gates), grads):
        assert_same(found, want)


@pytest.mark.parametrize("top_k", TOP_K)
def test_balance_losses_of_two_processes_make_that_of_the_whole_batch(top_k, monkeypatch):
    """Their mean by tokens, and so the sum of their gradients: shares of places are counted over both."""
    gates = [draw(9, E).softmax(-1).requires_grad_() for _ in range(2)]
    whole = balance_loss(gates, top_k)
    parts, counts = [[p[:6] for p in gates], [p[6:] for p in gates]], []
    monkeypatch.setattr(moe, "all_reduce", lambda x: counts.append(x) or x)
    for part in parts:
        balance_loss(part, top_k)
    monkeypatch.setattr(moe, "all_reduce", lambda x: sum(counts))
    halves = (6 * balance_loss(parts[0], top_k) + 3 * balance_loss(parts[1], top_k)) / 9
    assert abs(halves.item() - whole.item()) < 1e-12
    for found, want in zip(torch.autograd.grad(halves, gates), torch.autograd.grad(whole, gates)):
        assert_same(found, want)


def test_balance_loss_is_1_when_even_and_E_when_one_expert_has_all():
    assert balance_loss([torch.eye(E).repeat(3, 1)], 1).item() == 1.0
    assert balance_loss([torch.eye(E)[[0] * 5]], 1).item() == E


def test_benchmark_runs(tmp_path):
    script = Path(moe.__file__).parents[1] / "benchmarks/mixture.py"
    words = [sys.executable, script, "--quick", "--parts", "vit_micro", "--output", tmp_path / "r"]
    subprocess.run(words, check=True, stdout=subprocess.PIPE)
    assert "| 4, top 2 | 1.69 |" in (tmp_path / "r.md").read_text()


# ---------------------------------------------------------------- wrong input

def test_wrong_input_is_named():
    _, net = mixture_backbone()
    x = draw(1, 1, 32, 32)
    with pytest.raises(ValueError, match="needs to know the task: pass routing="):
        net(x)
    for shape in ((1, D_TASK), (D_TASK + 1,)):
        with pytest.raises(ValueError, match=r"shape \(.*\); a mixture of experts takes that of one task: \(6,\)"):
            net.get_intermediate_layers(x, 1, routing=Routing(draw(*shape), []))
    with pytest.raises(ValueError, match="no gates to balance"):
        balance_loss([], 1)
    keys = net.state_dict().keys()
    for blocks, experts, top_k, said in [
            ([0, 4], 2, None, "from 0 to 3"), ([-1], 2, None, "from 0 to 3"), ([1, 1], 2, None, "give each once"),
            ([1], 0, None, "0 experts"), ([1], 2, 3, "top_k 3"), ([1], 2, 0, "top_k 0"),
            ([0, 2], 2, None, "block 2 has experts already")]:
        with pytest.raises(ValueError, match=said):
            add_experts(net, blocks, experts, D_TASK, top_k)
    assert net.state_dict().keys() == keys  # nothing half done
    for blocks in ([], [torch.nn.Linear(2, 2)]):  # as families.TimmBackbone has them, of a convolutional network none
        with pytest.raises(ValueError, match="timm's networks take no mixture"):
            add_experts(types.SimpleNamespace(blocks=blocks), [0], 2, D_TASK)
