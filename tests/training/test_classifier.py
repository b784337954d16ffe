"""Fine-tuning's parts: the head against torch's batch norm, two processes against one, each setting on and off."""

import argparse
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from stage_tools import one_thread  # noqa: F401

from labelled.augment import normalise_only
from model import VisionTransformer
from training import classifier
from training.optimizer import build_optimizer

CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, num_register_tokens=1,
              init_values=0.5)
K, CANVAS, STATS = 3, 16, (0.4, 0.25)
CPU = torch.device("cpu")
PLAIN = dict(augment=False, mixup=0.0, cutmix=0.0, smoothing=0.0)


def arguments(**changes):
    return argparse.Namespace(**{**dict(augment=True, mixup=0.8, cutmix=1.0, smoothing=0.1, lr=1e-3, weight_decay=0.05,
                                        warmup_epochs=1.0, dtype="float32"), **changes})


def images(n=30, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, CANVAS, CANVAS), dtype=np.uint8), np.arange(n) % K


def network(layer_decay=0.5, seed=0, **config):
    torch.manual_seed(7)
    return classifier.build(VisionTransformer(**{**CONFIG, **config}), K, seed, layer_decay, CPU)


def batch_of(args, own=slice(0, 8), batch=8, step=0, seed=0):
    canvases, labels = images(batch)
    return classifier.make_batch(canvases[own], labels[own], own, seed, step, batch, K, args, STATS, CPU)


# ---------------------------------------------------------------- the head

def test_head_is_torchs_batch_norm_and_a_linear_layer():
    head, oracle = classifier.Head(6, K), torch.nn.BatchNorm1d(6, affine=False, eps=1e-6)
    for step in range(4):
        x = (3 * torch.randn(5 + step, 6) + 2).requires_grad_(True)
        twin = x.detach().clone().requires_grad_(True)
        weight = torch.randn(5 + step, K)
        actual, expected = head(x), head.linear(oracle(twin))
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)
        (actual * weight).sum().backward()
        (expected * weight).sum().backward()
        torch.testing.assert_close(x.grad, twin.grad, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(head.running_mean, oracle.running_mean, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(head.running_var, oracle.running_var, atol=1e-6, rtol=1e-6)
    head.eval(), oracle.eval()
    x, before = torch.randn(1, 6), head.running_mean.clone()
    torch.testing.assert_close(head(x), head.linear(oracle(x)), atol=1e-6, rtol=1e-5)
    assert torch.equal(head.running_mean, before)


def test_head_is_float32_under_autocast():
    head, x = classifier.Head(6, K), torch.randn(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        inside = head(x)
    assert inside.dtype == torch.float32 and torch.equal(inside, head(x))


# ---------------------------------------------------------------- a step

def test_loss_is_soft_cross_entropy():
    args = arguments()
    net, gradients, optimizer = network()
    x, targets = batch_of(args)
    logits = net(x).detach()
    expected = 0.0
    for row, target in zip(logits.double().tolist(), targets.double().tolist()):
        log_sum = np.log(np.exp(row).sum())
        expected -= sum(t * (logit - log_sum) for t, logit in zip(target, row)) / len(logits)
    loss = classifier.train_step(net, gradients, optimizer, x, targets, 8, 1e-3, args)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert all((grads == 0).all() for grads in gradients)


def first_move(args, layer_decay, lr=1e-3):
    """How far AdamW's first step moves each parameter: without weight decay lr times its multiplier, wherever the
    gradient is well above eps."""
    net, gradients, optimizer = network(layer_decay)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    classifier.train_step(net, gradients, optimizer, *batch_of(args), 8, lr, args)
    return before, {name: p.detach() - before[name] for name, p in net.named_parameters()}


@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_layer_decay_has_effect(layer_decay):
    _, moves = first_move(arguments(weight_decay=0.0), layer_decay)
    depth = CONFIG["depth"]
    expected = {"head.linear": 1, "backbone.patch_embed": (1 if layer_decay == 1 else 0.2) * layer_decay ** (depth + 1),
                "backbone.cls_token": layer_decay ** (depth + 1), "backbone.pos_embed": layer_decay ** (depth + 1),
                "backbone.register_tokens": layer_decay ** (depth + 1),
                **{f"backbone.blocks.{i}.": layer_decay ** (depth - i) for i in range(depth)}}
    seen = set()
    for name, move in moves.items():
        if name.startswith(("backbone.mask_token", "backbone.norm")):  # no mask; batch norm takes the norm back
            assert "norm" in name or (move == 0).all()
            continue
        (part,) = [part for part in expected if name.startswith(part)]
        seen.add(part)
        assert move.abs().max().item() == pytest.approx(1e-3 * expected[part], rel=2e-2), name
    assert seen == expected.keys()


def test_weight_decay_is_of_weights_alone():
    args = arguments(weight_decay=0.5)
    before, moves = first_move(args, 0.5)
    _, without = first_move(arguments(weight_decay=0.0), 0.5)
    multipliers = {name: 0.5 ** (2 - i) for i in range(2) for name in moves if f"blocks.{i}." in name}
    for name, move in moves.items():
        if name.endswith("bias") or "norm" in name or "gamma" in name:
            assert torch.equal(move, without[name]), name
        elif name in multipliers or name == "head.linear.weight":
            expected = -1e-3 * multipliers.get(name, 1) * 0.5 * before[name]
            torch.testing.assert_close(move - without[name], expected, atol=2e-8, rtol=1e-3, msg=name)
            assert expected.abs().max() > 1e-6


def test_drop_path_has_effect_and_is_reproducible():
    net, *_ = network(drop_path_rate=0.5)
    x = torch.randn(6, 1, CANVAS, CANVAS)

    def logits(*key):
        return net(x, classifier.draw_drops(net.backbone, 6, CANVAS, *key)).detach()

    assert torch.equal(logits(0, 3, 0), logits(0, 3, 0))
    assert len({logits(*key).sum().item() for key in ((0, 3, 0), (0, 4, 0), (1, 3, 0), (0, 3, 1))}) == 4
    assert not torch.equal(logits(0, 3, 0), net(x).detach())
    assert classifier.draw_drops(network()[0].backbone, 6, CANVAS, 0, 0, 0) is None


# ---------------------------------------------------------------- processes

def train(args, rank, world_size, batch, steps):
    """Steps on the same images: gradients of the first one, then weights and running statistics of all.

    In float64: the true gradient of the final norm is 0, since batch norm takes scale and shift back, and AdamW would
    make steps of full length out of float32's rounding.
    """
    torch.manual_seed(7)
    net = classifier.Classifier(VisionTransformer(**CONFIG), K).double()
    gradients, optimizer = build_optimizer(net, 0.5)
    canvases, labels = images()
    rates = classifier.learning_rates(args, steps + 1, 2)[1:]
    first = []
    optimizer.register_step_pre_hook(lambda *_: first.append([grads.clone() for grads in gradients]))
    own, losses = classifier.share(batch, rank, world_size), []
    for step, rows in enumerate(classifier.batches(np.arange(len(labels)), 0, range(steps), batch)):
        rows = rows[own]
        x, targets = classifier.make_batch(canvases[rows], labels[rows], own, 0, step, batch, K, args, STATS, CPU)
        losses.append(classifier.train_step(net, gradients, optimizer, x.double(), targets, batch, rates[step], args))
    net.float()
    scores = classifier.predict(net, canvases[:7], STATS, 2, CPU, "float32", rank, world_size)
    return {"losses": torch.stack(losses), "gradients": torch.cat(first[0]), "scores": scores, **net.state_dict()}


def rank_of_two(rank, init, args, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    for batch in (8, 7, 2):
        outcome = train(args, rank, 2, batch, 3) if batch > 2 else classifier.share(2, rank, 2)
        if rank == 0:
            torch.save(str(outcome) if batch == 2 else outcome, f"{folder}/{batch}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # as runtime.clear_errors leaves, and why


def test_two_processes_train_like_one(tmp_path):
    """Gradients, batch-norm statistics and three whole steps of an even and an odd batch."""
    args = arguments(lr=1e-2)
    mp.spawn(rank_of_two, (f"file://{tmp_path}/init", args, tmp_path), 2)
    for batch in (8, 7):
        whole, two = train(args, 0, 1, batch, 3), torch.load(tmp_path / f"{batch}.pt", weights_only=True)
        assert whole["gradients"].abs().max() > 1e-3 and whole.keys() == two.keys()
        for key in whole:
            torch.testing.assert_close(two[key], whole[key], atol=1e-6, rtol=0, msg=f"batch {batch}: {key}")


def test_shares_cover_the_batch_in_pairs():
    for batch in range(2, 40):
        for world_size in range(1, 9):
            parts = [classifier.share(batch, rank, world_size) for rank in range(world_size)]
            assert [i for part in parts for i in range(batch)[part]] == list(range(batch))
            assert all(part.start % 2 == 0 and (part.stop % 2 == 0 or part.stop == batch) for part in parts)
            sizes = [len(range(batch)[part]) for part in parts]
            assert max(sizes) - min(sizes) <= 3 and (min(sizes) > 0 or -(-batch // 2) < world_size)


def test_a_ranks_batch_is_its_rows_of_the_whole():
    args = arguments()
    for step in range(6):  # mixup and cutmix both
        x, targets = batch_of(args, slice(0, 9), 9, step)
        for own in (slice(0, 4), slice(4, 8), slice(8, 9)):
            part = batch_of(args, own, 9, step)
            torch.testing.assert_close(part[0], x[own], atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(part[1], targets[own])


# ---------------------------------------------------------------- batches

def test_without_augmentation_a_batch_is_what_evaluation_sees():
    canvases, labels = images(8)
    x, targets = batch_of(arguments(**PLAIN))
    assert torch.equal(x, normalise_only(torch.from_numpy(canvases), *STATS))
    expected = (canvases[:, None] / 255 - STATS[0]) / STATS[1]
    torch.testing.assert_close(x.double().numpy(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(targets, F.one_hot(torch.from_numpy(labels), K).float())


def is_half_of(mixed, x, partner):
    """Whether each image is share * x + (1 - share) * partner, with one share for all."""
    difference = (partner - x).flatten()
    share = (mixed - x).flatten() @ difference / (difference @ difference)
    return torch.allclose(mixed, x + share * (partner - x), atol=1e-4) and 0 < share < 1


@pytest.mark.parametrize("name, value", [("augment", True), ("mixup", 0.8), ("cutmix", 1.0), ("smoothing", 0.1)])
def test_each_setting_alone_has_its_effect_and_no_other(name, value):
    plain_x, plain_targets = batch_of(arguments(**PLAIN), step=1)
    x, targets = batch_of(arguments(**{**PLAIN, name: value}), step=1)
    partners = torch.arange(8) ^ 1
    if name == "augment":
        assert (x != plain_x).flatten(1).any(1).sum() >= 6  # of 8; one in 32 images gets nothing
        assert torch.equal(targets, plain_targets)
    elif name == "smoothing":
        assert torch.equal(x, plain_x)
        torch.testing.assert_close(targets, plain_targets * 0.9 + 0.1 / K)
    else:
        assert is_half_of(targets, plain_targets, plain_targets[partners])
        from_partner = ((x == plain_x[partners]) & (x != plain_x)).float().mean()
        if name == "mixup":
            assert is_half_of(x, plain_x, plain_x[partners]) and from_partner < 0.01
        else:
            assert ((x == plain_x) | (x == plain_x[partners])).all() and from_partner > 0.01
            box = (x != plain_x).any(0)[0]
            rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
            area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) / CANVAS ** 2
            kept = targets[0, plain_targets[0].argmax()].item()
            assert kept == pytest.approx(1 - area.item(), abs=1e-5)  # labels in proportion to pixels


def test_steps_and_seeds_differ():
    args = arguments()
    base = batch_of(args)[0]
    assert torch.equal(base, batch_of(args)[0])
    assert not torch.equal(base, batch_of(args, step=1)[0]) and not torch.equal(base, batch_of(args, seed=1)[0])


def test_an_epoch_shows_no_image_twice():
    groups, batch = np.arange(23) // 2, 5  # 4 batches an epoch, 3 images left out

    def epoch(number, seed=0):
        steps = range(4 * number, 4 * number + 4)
        return [rows.tolist() for rows in classifier.batches(groups, seed, steps, batch)]

    epochs = [epoch(number) for number in range(30)]
    for batches in epochs:
        assert all(len(rows) == batch for rows in batches) and len({i for rows in batches for i in rows}) == 20
    assert len({str(batches) for batches in epochs}) == 30
    whole = [rows.tolist() for rows in classifier.batches(groups, 0, range(12), batch)]  # as a run that never stopped
    assert whole == epochs[0] + epochs[1] + epochs[2]
    assert [rows.tolist() for rows in classifier.batches(groups, 0, range(6, 12), batch)] == whole[6:]  # amid an epoch
    assert {i for batches in epochs for rows in batches for i in rows} == set(range(23))  # another rest each epoch
    assert epoch(2) == epochs[2] and epoch(2, seed=1) != epochs[2]


# ---------------------------------------------------------------- schedule, predictions

def test_learning_rates():
    rates = classifier.learning_rates(arguments(lr=0.3, warmup_epochs=2.0), 50, 5)
    assert len(rates) == 50 and rates[0] == 0 and rates[9] == pytest.approx(0.3) and rates.argmax() in (9, 10)
    assert (np.diff(rates[:10]) > 0).all() and (np.diff(rates[10:]) < 0).all() and rates[-1] < 0.003
    np.testing.assert_allclose(rates[10:], 0.15 * (1 + np.cos(np.pi * np.arange(40) / 40)))
    assert classifier.learning_rates(arguments(lr=0.3, warmup_epochs=0.0), 50, 5)[0] == 0.3
    short = classifier.learning_rates(arguments(lr=0.3, warmup_epochs=20.0), 10, 5)  # no run is all warm-up
    assert len(short) == 10 and short[5] == 0.3 and short[-1] < 0.1


def test_predictions_do_not_depend_on_the_batch_and_change_nothing():
    net, gradients, optimizer = network()
    canvases, _ = images(11)
    for step in range(3):  # running statistics of its own
        classifier.train_step(net, gradients, optimizer, *batch_of(arguments(), step=step), 8, 1e-2, arguments())
    before = {key: value.clone() for key, value in net.state_dict().items()}
    whole, parts = (classifier.predict(net, canvases, STATS, size, CPU, "float32") for size in (64, 3))
    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-6)
    assert net.training and all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net.eval()
    with torch.no_grad():
        expected = net(normalise_only(torch.from_numpy(canvases), *STATS)).softmax(1)
    torch.testing.assert_close(whole, expected, atol=1e-6, rtol=1e-6)
    assert whole.shape == (11, K) and not whole.requires_grad
    torch.testing.assert_close(whole.sum(1), torch.ones(11))


def test_bfloat16_is_close_and_not_the_same():
    net, *_ = network()
    canvases, _ = images(6)
    exact, rough = (classifier.predict(net, canvases, STATS, 8, CPU, dtype) for dtype in ("float32", "bfloat16"))
    assert 0 < (exact - rough).abs().max() < 0.02


def test_the_seed_draws_the_head_and_nothing_else():
    a, b, c = (network(seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert {key for key in a if not torch.equal(a[key], c[key])} == {"head.linear.weight"}
