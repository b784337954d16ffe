"""Training on many tasks: groups of the optimizer, whose turn it is, one step against plain PyTorch."""

import copy

import numpy as np
import pytest
import torch
from multi_cases import CONFIG, CPU, HOW, TASKS, arguments, batch_of, built
from stage_tools import one_thread  # noqa: F401

from model import VisionTransformer
from networks.heads import task_loss
from training import many_tasks

EXPERTS = ("backbone.blocks.1.mlp.", "backbone.blocks.2.mlp.")
UNSEEN = "parts.2.head.cells.bias"  # a softmax does not see what is added to all cells: its gradient is rounding


def state_of(network, optimizer):
    names = {id(p): name for name, p in network.named_parameters()}
    return {**network.state_dict(), **{f"{names[id(p)]} {key}": value for p, own in optimizer.state.items()
                                       for key, value in own.items()}}


def copied(state):
    return {key: value.clone() for key, value in state.items()}


# ---------------------------------------------------------------- network, optimizer, turns

@pytest.mark.parametrize("how", [dict(), dict(experts=1)], ids=["experts", "dense"])
def test_groups_of_the_optimizer(how):
    network, gradients, optimizer = built(**how)
    names = {id(p): name for name, p in network.named_parameters()}
    placed = [(names[id(p)], group) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(name for name, _ in placed) == sorted({*names.values()} - {"backbone.mask_token"})  # each once
    for name, group in placed:
        expert = not how and name.startswith(EXPERTS)
        assert group["is_backbone"] == (name.startswith("backbone.") and not expert), name
        kept = name.endswith("bias") or "norm" in name or "gamma" in name
        assert group["wd_multiplier"] == (0.0 if kept else 1.0), name
    assert {group["lr_multiplier"] for group in optimizer.param_groups} == {1.0}
    assert [*gradients] == [network.backbone, network.decoder, *network.parts]
    for module, (flat, pairs) in gradients.items():
        flat.fill_(2.0)
        assert {id(p) for p, _ in pairs} == {id(p) for p in module.parameters() if p.requires_grad}
        assert all(grad.shape == p.shape and (grad == 2).all() for p, grad in pairs)


def test_shares_start_the_segmentation_head():
    network, _, _ = many_tasks.build(VisionTransformer(**CONFIG), TASKS, [np.array([0.9, 0.1, 0.0]), None, None, None],
                                      HOW, 0, CPU)
    assert torch.allclose(network.parts[0].head.bias, torch.tensor([0.9, 0.1, 1e-6]).log())


def test_every_task_has_one_turn_in_a_round():
    turns = many_tasks.whose_turn(5, 200, seed=4)
    rounds = turns.reshape(200, 5)
    assert (np.sort(rounds, 1) == np.arange(5)).all()
    first = np.bincount(rounds[:, 0], minlength=5)
    assert first.min() > 20 and len({tuple(order) for order in rounds.tolist()}) > 60  # of 120 orders
    assert np.array_equal(turns, many_tasks.whose_turn(5, 200, seed=4))
    assert np.array_equal(turns[:50], many_tasks.whose_turn(5, 10, seed=4))  # also of a shorter run
    assert not np.array_equal(turns, many_tasks.whose_turn(5, 200, seed=5))
    assert not many_tasks.whose_turn(1, 7, 0).any()


def test_rescale_is_drawn_per_step_and_rank():
    network, _, _ = built(config=dict(pos="rope", mask_k_bias=True))
    draws = {key: many_tasks.draw_scales(network, 2.0, *key) for key in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))}
    assert all(scale.shape == (3, 1) and (0.5 <= scale).all() and (scale <= 2).all() for scale in draws.values())
    assert len({scale.tobytes() for scale in draws.values()}) == 4
    assert np.array_equal(draws[0, 1, 0], many_tasks.draw_scales(network, 2.0, 0, 1, 0))
    assert many_tasks.draw_scales(network, 1.0, 0, 0, 0) is None
    assert many_tasks.draw_scales(built()[0], 2.0, 0, 0, 0) is None


# ---------------------------------------------------------------- one step

@pytest.mark.parametrize("clip", [1e9, 0.3], ids=["free", "clipped"])
def test_a_step_is_plain_adamw_of_what_the_task_uses(clip):
    """Against torch's own clipping and AdamW on a copy; all else stays as it was, AdamW's memory too."""
    network, gradients, optimizer = built()
    args, plain, groups = arguments(clip_grad=clip), copy.deepcopy(network), []
    for name, p in plain.named_parameters():
        fresh = not name.startswith("backbone.") or name.startswith(EXPERTS)
        kept = name.endswith("bias") or "norm" in name or "gamma" in name
        groups.append(dict(params=[p], lr=0.5 * (1e-2 if fresh else 1e-3), weight_decay=0.0 if kept else 0.05))
    other = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False)
    for turn in (0, 1, 2, 3, 3, 2, 1, 0):
        before, (x, target) = copied(state_of(network, optimizer)), batch_of(turn)
        loss = many_tasks.train_step(network, gradients, optimizer, turn, x, target, 4, np.float64(0.5), args)
        other.zero_grad(set_to_none=True)
        want = task_loss(TASKS[turn], plain(x, turn)[0], target).mean()
        want.backward()
        assert (torch.nn.utils.clip_grad_norm_(plain.parameters(), clip) > clip) == (clip < 1)
        other.step()
        assert abs(loss.item() - want.item()) < 1e-4 * want.item()
        assert not any(flat.any() for flat, _ in gradients.values())
        after, dense = state_of(network, optimizer), TASKS[turn].kind in ("segmentation", "regression")
        for name in before:
            idle = name.startswith("parts.") and not name.startswith(f"parts.{turn}.") or "mask_token" in name
            assert torch.equal(after[name], before[name]) == (idle or name.startswith("decoder.") and not dense), name
    for (name, p), q in zip(network.named_parameters(), plain.parameters()):
        if name != UNSEEN:
            assert (p - q).abs().max() < 2e-4, name
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.5e-3, 0.5e-2]


@pytest.mark.parametrize("how", [dict(), dict(top_k=1), dict(experts=1)], ids=["soft", "top 1", "dense"])
def test_all_that_is_trainable_is_trained(how):
    """From the start, where the second convolutions of residual units are 0: after two rounds; no decay helps."""
    network, gradients, optimizer = built(random=False, **how)
    before = copied(network.state_dict())
    for turn in (0, 1, 2, 3) * 2:
        many_tasks.train_step(network, gradients, optimizer, turn, *batch_of(turn), 4, 1.0,
                               arguments(weight_decay=0.0, balance_weight=0.01, top_k=how.get("top_k")))
    same = {name for name, value in network.state_dict().items() if torch.equal(value, before[name])}
    assert same == {"backbone.mask_token"}
    assert all(value.isfinite().all() for value in network.state_dict().values())


def gradients_of(number, x, target, monkeypatch, args=None, **how):
    """(loss, {module: flat gradient}) of a step that changes nothing."""
    network, gradients, optimizer = built(**how)
    found = []
    monkeypatch.setattr(optimizer, "step", lambda: found.extend(flat.clone() for flat, _ in gradients.values()))
    loss = many_tasks.train_step(network, gradients, optimizer, number, x, target, 4, 1.0, args or arguments())
    return loss, found


@pytest.mark.parametrize("number", range(4), ids=[task.kind for task in TASKS])
def test_two_halves_are_the_whole(number, monkeypatch):
    x, target = batch_of(number)
    whole, *halves = (gradients_of(number, x[part], target[part], monkeypatch)
                      for part in (slice(0, 4), slice(0, 1), slice(1, 4)))
    assert abs(whole[0] - halves[0][0] - halves[1][0]) < 1e-5 * whole[0]
    for module, (all_of, one, two) in enumerate(zip(whole[1], halves[0][1], halves[1][1])):
        assert (all_of - one - two).norm() <= 1e-4 * all_of.norm(), module


def test_balance_reaches_the_gates_and_is_not_told_as_loss(monkeypatch):
    x, target = batch_of(1)
    loss, plain = gradients_of(1, x, target, monkeypatch, arguments(top_k=1), top_k=1)
    same, balanced = gradients_of(1, x, target, monkeypatch, arguments(top_k=1, balance_weight=0.5), top_k=1)
    soft, unmoved = gradients_of(1, x, target, monkeypatch, arguments(balance_weight=0.5))
    assert torch.equal(loss, same) and not torch.equal(plain[0], balanced[0])
    assert all(torch.equal(a, b) for a, b in zip(unmoved, gradients_of(1, x, target, monkeypatch)[1]))


def test_bfloat16_is_near_float32(monkeypatch):
    for number in range(4):
        x, target = batch_of(number)
        (loss, exact), (rounded, near) = (gradients_of(number, x, target, monkeypatch, arguments(dtype=dtype))
                                          for dtype in ("float32", "bfloat16"))
        assert loss != rounded and abs(loss - rounded) < 0.1 * loss and rounded.dtype == torch.float32
        for a, b in zip(exact, near):
            assert (a - b).norm() <= 0.3 * a.norm() and b.dtype == torch.float32
