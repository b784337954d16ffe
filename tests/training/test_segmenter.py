"""Segmentation's parts: loss against mmseg's formula, schedule, batches, each setting's effect, ranks against one."""

import argparse

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from stage_tools import one_thread  # noqa: F401

from labelled.augment import normalise_only
from model import VisionTransformer
from training import segmenter

CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=4, num_heads=2, num_register_tokens=1,
              init_values=0.5)
UPERNET = dict(name="upernet", channels=8, norm="group")
LINEAR = dict(name="linear", channels=None, norm="group")
K, CANVAS, STATS = 3, 16, (0.4, 0.25)
SHARES = np.array([0.5, 0.3, 0.2])
CPU = torch.device("cpu")


def arguments(**changes):
    return argparse.Namespace(**{**dict(augment=True, weight_decay=0.05, dice_weight=1.0, dtype="float32"), **changes})


def pairs(n=8, seed=0, side=CANVAS):
    """Speckle with a box of class 1 and a stripe of class 2, each brighter: images and masks uint8 (n, side, side)."""
    rng, masks = np.random.default_rng(seed), np.zeros((n, side, side), np.uint8)
    for mask in masks:
        y, x = rng.integers(0, side // 2, 2)
        mask[y:y + side // 2, x:x + side // 2] = 1
        mask[-side // 4:] = 2
    return (rng.integers(0, 60, masks.shape) + 80 * masks).astype(np.uint8), masks


def network(how=UPERNET, frozen=False, seed=0, layer_decay=0.5, drop_path_rate=0.0, **config):
    torch.manual_seed(7)
    backbone = VisionTransformer(**{**CONFIG, **config}, drop_path_rate=drop_path_rate, drop_path_uniform=False)
    return segmenter.build(backbone, how, SHARES, frozen, seed, layer_decay, CPU)


def batch_of(args, own=slice(0, 8), batch=8, step=0, seed=0):
    images, masks = pairs(batch)
    return segmenter.make_batch(images[own], masks[own], own, seed, step, batch, args, STATS, CPU)


def cut(batch, rank, world_size):
    return slice(batch * rank // world_size, batch * (rank + 1) // world_size)


# ---------------------------------------------------------------- the loss

def written_out(logits, masks, dice_weight):
    """Per image and by hand: cross-entropy of each pixel, and mmseg's DiceLoss with its defaults (use_sigmoid,
    naive_dice off, eps 1e-3): one-hot targets, classes and pixels of an image flattened together."""
    losses = []
    for own, mask in zip(logits.tolist(), masks.tolist()):
        own, onehot = np.array(own), np.eye(len(own))[mask].transpose(2, 0, 1)  # (K, h, w) each
        softmax = np.exp(own) / np.exp(own).sum(0)
        ce = [-np.log(softmax[label, i, j]) for i, row in enumerate(mask) for j, label in enumerate(row)]
        p, t = 1 / (1 + np.exp(-own.flatten())), onehot.flatten()
        a, b, c = (p * t).sum(), (p * p).sum() + 1e-3, (t * t).sum() + 1e-3
        losses.append(np.mean(ce) + dice_weight * (1 - 2 * a / (b + c)))
    return losses


@pytest.mark.parametrize("dice_weight", [0.0, 1.0, 2.5])
def test_loss_is_cross_entropy_and_mmsegs_dice(dice_weight):
    logits, masks = 3 * torch.randn(4, 5, 3, 6, dtype=torch.float64), torch.randint(5, (4, 3, 6))
    masks[1] = 0  # nothing but background
    loss = segmenter.segmentation_loss(logits, masks, dice_weight)
    assert loss.shape == (4,)
    np.testing.assert_allclose(loss, written_out(logits, masks, dice_weight), rtol=1e-10)


def test_loss_of_one_pixel_is_told_apart():
    """The two eps are seen where an image has one pixel."""
    logits = torch.tensor([[[[-40.0]], [[0.0]]]], dtype=torch.float64)
    p, masks = 0.5, torch.tensor([[[1]]])
    expected = np.log1p(np.exp(-40.0)) + 1 - 2 * p / (p * p + 1 + 2e-3)
    assert segmenter.segmentation_loss(logits, masks, 1.0).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dice_weight", [0.0, 1.0])
def test_gradient_of_the_loss(dice_weight):
    logits, masks = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True), torch.randint(3, (2, 3, 4))
    assert torch.autograd.gradcheck(lambda x: segmenter.segmentation_loss(x, masks, dice_weight), logits)


def test_loss_is_least_for_the_truth():
    masks = torch.randint(3, (2, 6, 6))
    truth = F.one_hot(masks, 3).permute(0, 3, 1, 2).float()
    perfect = segmenter.segmentation_loss(40 * truth - 20, masks, 1.0)
    assert (perfect >= 0).all() and (perfect < 1e-4).all()
    swapped = segmenter.segmentation_loss(40 * truth.roll(1, 1) - 20, masks, 1.0)
    unsure = segmenter.segmentation_loss(0 * truth, masks, 1.0)
    # p = 1/2 everywhere, of 3 classes: sum p t = n / 2, sum p^2 = 3 n / 4
    torch.testing.assert_close(unsure, torch.full((2,), np.log(3) + 1 - 1 / 1.75), atol=1e-4, rtol=0)
    assert (swapped > unsure).all() and (unsure > perfect).all()


# ---------------------------------------------------------------- schedule

def test_learning_rates_are_torchs_linear_and_polynomial():
    lr, steps, warmup = 0.3, 50, 12
    rates = segmenter.learning_rates(lr, steps, warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-6, total_iters=warmup)
    down = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps - warmup, power=1)
    oracle = torch.optim.lr_scheduler.SequentialLR(optimizer, [up, down], [warmup])
    for rate in rates:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-12)
        optimizer.step(), oracle.step()
    assert len(rates) == steps and rates[0] == pytest.approx(1e-6 * lr) and rates[warmup] == lr == rates.max()
    assert (rates > 0).all() and rates[-1] == pytest.approx(lr / (steps - warmup))
    assert np.ptp(np.diff(rates[:warmup + 1])) < 1e-12 and np.ptp(np.diff(rates[warmup:])) < 1e-12


def test_learning_rates_without_warmup():
    rates = segmenter.learning_rates(0.2, 4, 0)
    np.testing.assert_allclose(rates, [0.2, 0.15, 0.1, 0.05])
    np.testing.assert_allclose(segmenter.learning_rates(0.2, 2, 1), [2e-7, 0.2])


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("batch", [1, 4, 7, 10, 16, 25])
def test_batches_are_epochs_without_a_break(batch):
    """One after the other: each holds every image once, whatever the batch; another order each time."""
    groups, steps = np.arange(10) // 2, -(-60 // batch)
    whole = list(segmenter.batches(groups, 3, range(steps), batch))
    assert all(own.shape == (batch,) for own in whole)
    epochs = np.concatenate(whole)[:60].reshape(6, 10)
    assert (np.sort(epochs, 1) == np.arange(10)).all() and len({str(epoch) for epoch in epochs}) == 6
    for start in range(steps):  # as a run that was never stopped
        rest = list(segmenter.batches(groups, 3, range(start, steps), batch))
        assert np.array_equal(rest, whole[start:])
    other = np.concatenate(list(segmenter.batches(groups, 4, range(steps), batch)))[:60]
    assert not np.array_equal(other, epochs.flatten())


def test_siblings_are_spread_over_batches():
    groups = np.repeat(np.arange(4), 5)
    for rows in segmenter.batches(groups, 0, range(20), 4):
        assert len({*groups[rows]}) == 4


def test_one_image_fills_a_batch():
    assert [own.tolist() for own in segmenter.batches(np.zeros(1, int), 0, range(2), 3)] == [[0, 0, 0]] * 2


# ---------------------------------------------------------------- one batch

@pytest.mark.parametrize("batch, world_size", [(8, 2), (9, 2), (7, 3), (5, 5)])
def test_shares_are_the_rows_of_the_whole_batch(batch, world_size):
    for step in range(3):
        x, masks = batch_of(arguments(), slice(0, batch), batch, step)
        parts = [batch_of(arguments(), cut(batch, rank, world_size), batch, step) for rank in range(world_size)]
        torch.testing.assert_close(torch.cat([x for x, _ in parts]), x, atol=1e-6, rtol=1e-6)
        assert torch.equal(torch.cat([mask for _, mask in parts]), masks)


def test_without_augmentation_a_batch_is_what_evaluation_sees():
    images, masks = pairs()
    x, found = batch_of(arguments(augment=False))
    assert torch.equal(x, normalise_only(torch.from_numpy(images), *STATS))
    np.testing.assert_allclose(x, (images[:, None] / 255 - STATS[0]) / STATS[1], atol=1e-5, rtol=1e-5)
    assert found.dtype == torch.int64 and np.array_equal(found, masks)


def test_masks_move_with_their_images():
    """What is bright is what the mask says, wherever it went."""
    _, masks = pairs(32, side=32)
    images = np.where(masks > 0, 170, 70).astype(np.uint8)
    agreement, moved = [], []  # seven of eight images are turned, bent or flipped
    for step in range(3):
        x, found = segmenter.make_batch(images, masks, slice(0, 32), 0, step, 32, arguments(), STATS, CPU)
        assert found.dtype == torch.int64 and x.shape == (32, 1, 32, 32) and {*found.unique().tolist()} <= {0, 1, 2}
        for image, mask, before in zip(x[:, 0], found, masks):
            inside, outside = image[mask > 0], image[mask == 0]
            # outside the frame all is black: grey tissue lies between that and the bright classes
            threshold = (inside.median() + outside[outside > outside.median() - 0.5].median()) / 2
            agreement.append(((image > threshold) == (mask > 0)).float().mean().item())
            moved.append((mask.numpy() != before).any())
    assert np.mean(agreement) > 0.99 and np.mean(moved) > 0.8


def test_steps_and_seeds_differ():
    base = batch_of(arguments())
    for other, same in ((batch_of(arguments()), True), (batch_of(arguments(), step=1), False),
                        (batch_of(arguments(), seed=1), False)):
        assert torch.equal(base[0], other[0]) == torch.equal(base[1], other[1]) == same


# ---------------------------------------------------------------- the network and what is trained

@pytest.mark.parametrize("how", [UPERNET, {**UPERNET, "norm": "none"}, {**UPERNET, "channels": None}, LINEAR], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_trained_parameter_is_in_one_group(how, frozen):
    net, gradients, optimizer = network(how, frozen)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    expected = [id(p) for name, p in net.named_parameters() if name.startswith("decoder.") or not frozen]
    assert sorted(grouped) == sorted(expected) and len({*grouped}) == len(grouped)
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    assert len(gradients) == 2 - frozen and sum(len(grads) for grads in gradients) == sum(
        p.numel() for p in net.parameters() if p.requires_grad)
    with torch.no_grad():
        assert net(torch.zeros(1, 1, CANVAS, CANVAS)).shape == (1, K, CANVAS, CANVAS)  # no class that is never trained
    assert net.decoder.classifier.out_channels == K


def test_the_seed_draws_the_decoder_and_nothing_else():
    a, b, c = (network(seed=seed)[0].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[key], b[key]) for key in a)
    differ = {key for key in a if not torch.equal(a[key], c[key])}
    assert "decoder.classifier.weight" in differ and all(key.startswith("decoder.") for key in differ)


@pytest.mark.parametrize("how", [UPERNET, LINEAR], ids=lambda how: how["name"])
def test_a_fresh_decoder_says_how_often_classes_are(how):
    """To a pixel it knows nothing of; a class of no train pixel is possible, too."""
    torch.manual_seed(7)
    for shares, expected in ((SHARES, SHARES), (np.array([0.9, 0.1, 0.0]), [0.9, 0.1, 1e-6])):
        net, *_ = segmenter.build(VisionTransformer(**CONFIG), how, shares, False, 0, 1.0, CPU)
        np.testing.assert_allclose(net.decoder.classifier.bias.detach().exp(), expected, rtol=1e-5)
        with torch.no_grad():
            net.decoder.classifier.weight.zero_()
            found = net(torch.randn(4, 1, CANVAS, CANVAS)).softmax(1)
        np.testing.assert_allclose(found.amax((0, 2, 3)), shares, atol=1e-5)
        np.testing.assert_allclose(found.amin((0, 2, 3)), shares, atol=1e-5)


def first_move(args, layer_decay=0.5, lr=1e-3, how=UPERNET, **changes):
    """How far AdamW's first step moves each parameter: without weight decay lr times its multiplier, wherever the
    gradient is well above eps."""
    net, gradients, optimizer = network(how, layer_decay=layer_decay, **changes)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    segmenter.train_step(net, gradients, optimizer, *batch_of(args), 8, lr, args)
    return before, {name: p.detach() - before[name] for name, p in net.named_parameters()}


@pytest.mark.parametrize("layer_decay", [0.5, 1.0])
def test_layer_decay_has_effect(layer_decay):
    _, moves = first_move(arguments(weight_decay=0.0), layer_decay)
    depth, lowest = CONFIG["depth"], layer_decay ** (CONFIG["depth"] + 1)
    expected = {"decoder": 1, "backbone.norm": 1, "backbone.patch_embed": (1 if layer_decay == 1 else 0.2) * lowest,
                "backbone.cls_token": lowest, "backbone.pos_embed": lowest, "backbone.register_tokens": lowest,
                **{f"backbone.blocks.{i}.": layer_decay ** (depth - i) for i in range(depth)}}
    seen = set()
    for name, move in moves.items():
        if name == "backbone.mask_token":  # no patch is masked
            assert (move == 0).all()
            continue
        (part,) = [part for part in expected if name.startswith(part)]
        seen.add(part)
        assert move.abs().max().item() == pytest.approx(1e-3 * expected[part], rel=2e-2), name
    assert seen == expected.keys()


def test_weight_decay_is_of_weights_alone():
    before, moves = first_move(arguments(weight_decay=0.5))
    _, without = first_move(arguments(weight_decay=0.0))
    scaled = {name: 0.5 ** (CONFIG["depth"] - i) for i in range(CONFIG["depth"]) for name in moves
              if f"blocks.{i}." in name}
    decayed = 0
    for name, move in moves.items():
        if name.endswith("bias") or "norm" in name or "gamma" in name:
            assert torch.equal(move, without[name]), name
        elif name in scaled or name.startswith("decoder."):
            expected = -1e-3 * scaled.get(name, 1) * 0.5 * before[name]
            torch.testing.assert_close(move - without[name], expected, atol=5e-8, rtol=1e-3, msg=name)
            decayed += expected.abs().max() > 1e-6
    assert decayed == 4 * CONFIG["depth"] + 16  # UPerNet's: 3 ups, 4 pools, bottleneck, 3 + 3 convs, fusion, classifier


@pytest.mark.parametrize("how", [UPERNET, LINEAR], ids=lambda how: how["name"])
def test_a_frozen_backbone_stays_bit_equal(how):
    """Whatever drop path it was opened with, and all of its modules in eval mode."""
    net, gradients, optimizer = network(how, frozen=True, drop_path_rate=0.5)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    drops, keep = segmenter.draw_drops(net, 8, CANVAS, 0, 0, 0)
    assert drops is None and (keep is None) == (how is LINEAR)
    args = arguments(weight_decay=0.5)
    for step in range(2):
        segmenter.train_step(net, gradients, optimizer, *batch_of(args, step=step), 8, 0.1, args, drops, keep)
    assert net.training and not any(module.training for module in net.backbone.modules())
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("backbone."), key
    assert all(p.grad is None for p in net.backbone.parameters())


def test_a_step_is_the_mean_loss_of_the_batch():
    args = arguments(dice_weight=0.7)
    net, gradients, optimizer = network()
    x, masks = batch_of(args)
    with torch.no_grad():
        expected = np.mean(written_out(net(x).double(), masks, 0.7))
    loss = segmenter.train_step(net, gradients, optimizer, x, masks, 8, 1e-3, args)
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    assert all((grads == 0).all() for grads in gradients)
    part = segmenter.train_step(net, gradients, optimizer, x[:3], masks[:3], 8, 0.0, args).item()  # a rank's share
    with torch.no_grad():
        assert part == pytest.approx(np.sum(written_out(net(x[:3]).double(), masks[:3], 0.7)) / 8, abs=1e-5)


def test_dice_weight_and_precision_have_effect():
    moves = [torch.cat([move.flatten() for move in first_move(arguments(**changes))[1].values()])
             for changes in (dict(), dict(dice_weight=0.0), dict(dtype="bfloat16"), dict())]
    assert [torch.equal(moves[0], other) for other in moves[1:]] == [False, False, True]
    net, *_ = network()
    exact, rough = (segmenter.predict_logits(net, pairs()[0], STATS, CPU, dtype) for dtype in ("float32", "bfloat16"))
    assert exact.dtype == rough.dtype == torch.float32 and 0 < (exact - rough).abs().max() < 0.05


# ---------------------------------------------------------------- what is left out

def test_drop_path_grows_from_nothing_to_its_rate():
    net, *_ = network(drop_path_rate=0.6)
    drops, keep = segmenter.draw_drops(net, 10, CANVAS, 0, 0, 0)
    seen = {}
    for i, block in enumerate(net.backbone.blocks):
        block.mlp.register_forward_pre_hook(lambda _, x, i=i: seen.update({i: x[0].shape[0] // 6}))
    net(torch.randn(10, 1, CANVAS, CANVAS), drops, keep)
    assert seen == {0: 10, 1: 8, 2: 6, 3: 4}  # of ten images: 0, 0.2, 0.4, 0.6 are dropped; 6 tokens an image


def test_draws_are_of_seed_step_and_rank():
    net, *_ = network(drop_path_rate=0.5)
    x = torch.randn(8, 1, CANVAS, CANVAS)

    def logits(*key):
        drops, keep = segmenter.draw_drops(net, 8, CANVAS, *key)
        return net(x, drops, keep).detach(), keep

    a, keep = logits(0, 3, 0)
    again, same = logits(0, 3, 0)
    assert torch.equal(a, again) and torch.equal(keep, same)
    assert keep.shape == (8, 8) and {*keep.unique().tolist()} == {0, np.float32(1 / 0.9).item()}
    assert len({logits(*key)[0].sum().item() for key in ((0, 3, 0), (0, 4, 0), (1, 3, 0), (0, 3, 1))}) == 4
    assert not torch.equal(a, net(x).detach())


def test_without_drop_path_only_the_decoder_leaves_out():
    assert segmenter.draw_drops(network(LINEAR)[0], 8, CANVAS, 0, 0, 0) == (None, None)
    drops, keep = segmenter.draw_drops(network()[0], 200, CANVAS, 0, 0, 0)
    assert drops is None and 0.05 < (keep == 0).float().mean() < 0.15


@pytest.mark.parametrize("side", [13, 20])
def test_sides_that_are_no_multiple_of_the_patch_train(side):
    """The draws are of the padded image's tokens."""
    net, gradients, optimizer = network(drop_path_rate=0.5)
    images, masks = pairs(8, side=side)
    args = arguments()
    x, masks = segmenter.make_batch(images, masks, slice(0, 8), 0, 0, 8, args, STATS, CPU)
    drops, keep = segmenter.draw_drops(net, 8, side, 0, 0, 0)
    assert segmenter.train_step(net, gradients, optimizer, x, masks, 8, 1e-3, args, drops, keep).isfinite()
    assert segmenter.predict_logits(net, images, STATS, CPU, "float32").shape == (8, K, side, side)


# ---------------------------------------------------------------- predictions

def test_validation_is_f1_of_all_pixels(monkeypatch):
    """Of the images that are named; whatever the batch, however many processes share the work."""
    net, *_ = network()
    (images, masks), own = pairs(15), np.array([13, 2, 3, 5, 6, 7, 8, 9, 11, 12, 0])
    with torch.no_grad():
        net.decoder.classifier.weight.mul_(300)
        x = normalise_only(torch.from_numpy(images[own]), *STATS)
        found = net.eval()(x).argmax(1).numpy()
        net.train()
    assert len(np.unique(found)) == K
    before = {key: value.clone() for key, value in net.state_dict().items()}
    f1 = sklearn.metrics.f1_score(masks[own].flatten(), found.flatten(), labels=[1, 2], average=None)
    values = [segmenter.validate(net, images, masks, own, K, STATS, size, CPU, "float32") for size in (1, 4, 64)]
    np.testing.assert_allclose(values, f1.mean(), rtol=1e-12)
    assert net.training and all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for world_size in (2, 3, 16):  # of 16, some have no image
        tables = []
        monkeypatch.setattr(segmenter, "all_reduce", lambda table: tables.append(table.clone()) or table + 1)
        for rank in range(world_size):
            segmenter.validate(net, images, masks, own, K, STATS, 4, CPU, "float32", rank, world_size)
        assert sum(table.sum() for table in tables) == masks[own].size
        monkeypatch.setattr(segmenter, "all_reduce", lambda table: sum(tables))
        shared = segmenter.validate(net, images, masks, own, K, STATS, 4, CPU, "float32", 0, world_size)
        assert shared == pytest.approx(f1.mean(), rel=1e-12)


def test_a_class_that_validation_lacks_does_not_count():
    """Whether it is predicted or not; one that is there and never found is 0."""
    net, *_ = network()
    (images, masks), own = pairs(4), np.arange(4)
    masks = np.minimum(masks, 1)
    share = (masks == 1).mean()
    bias = net.decoder.classifier.bias
    for others, expected in (((0, 1e4, -1e4), 2 * share / (1 + share)), ((0, -1e4, 1e4), 0)):
        with torch.no_grad():
            bias[:] = torch.tensor(others)  # all is 1, then all is 2
        found = segmenter.validate(net, images, masks, own, K, STATS, 4, CPU, "float32")
        assert found == pytest.approx(expected)
    masks[0], share = 2, (masks[1:] == 1).sum() / masks.size
    with torch.no_grad():
        bias[:] = torch.tensor((0, 1e4, -1e4))
    found = segmenter.validate(net, images, masks, own, K, STATS, 4, CPU, "float32")
    assert found == pytest.approx(share / (1 + share))


def test_masks_at_their_own_size():
    """Bilinear between the centres of pixels, then the largest class."""
    logits, (h, w) = torch.randn(K, 6, 6), (9, 4)
    grown = np.zeros((K, h, w))
    for i in range(h):
        for j in range(w):
            y, x = (min(max((place + 0.5) * 6 / size - 0.5, 0), 5) for place, size in ((i, h), (j, w)))
            (a, v), (b, u) = divmod(y, 1), divmod(x, 1)
            a, b, c, d = int(a), int(b), min(int(a) + 1, 5), min(int(b) + 1, 5)
            own = logits.double().numpy()
            grown[:, i, j] = ((1 - v) * ((1 - u) * own[:, a, b] + u * own[:, a, d])
                              + v * ((1 - u) * own[:, c, b] + u * own[:, c, d]))
    mask = segmenter.at_own_size(logits, h, w)
    assert mask.dtype == np.uint8 and np.array_equal(mask, grown.argmax(0))
    assert np.array_equal(segmenter.at_own_size(logits, 6, 6), logits.argmax(0).numpy())


# ---------------------------------------------------------------- processes

def train(args, rank, world_size, batch, steps):
    """Steps on the same images: gradients of all, losses, the validation Dice at last."""
    net, gradients, optimizer = network()
    images, masks = pairs(12)
    rates, own = segmenter.learning_rates(1e-3, steps, 1), cut(batch, rank, world_size)
    before, losses = [], []
    optimizer.register_step_pre_hook(lambda *_: before.append(torch.cat(gradients)))
    for step, rows in enumerate(segmenter.batches(np.arange(12), 0, range(steps), batch)):
        rows = rows[own]
        x, targets = segmenter.make_batch(images[rows], masks[rows], own, 0, step, batch, args, STATS, CPU)
        losses.append(segmenter.train_step(net, gradients, optimizer, x, targets, batch, rates[step], args))
    found = segmenter.validate(net, images, masks, np.arange(12), K, STATS, 5, CPU, "float32", rank, world_size)
    return {"gradients": torch.stack(before), "losses": torch.stack(losses), "Dice": torch.tensor(found)}


def rank_of_two(rank, init, args, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    for batch in (8, 5):
        outcome = train(args, rank, 2, batch, 3)
        torch.save(outcome, f"{folder}/{batch}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_train_like_one(tmp_path):
    args = arguments(weight_decay=0.1)
    mp.spawn(rank_of_two, (f"file://{tmp_path}/init", args, tmp_path), 2)
    for batch in (8, 5):
        whole = train(args, 0, 1, batch, 3)
        assert whole["gradients"].abs().amax(1).min() > 1e-3
        for rank in (0, 1):
            two = torch.load(tmp_path / f"{batch}-{rank}.pt", weights_only=True)
            for key, value in whole.items():
                torch.testing.assert_close(two[key], value, atol=2e-5, rtol=0, msg=f"batch {batch}: {key}")
