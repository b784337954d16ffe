"""Segmentation decoders: against torch's own operators on the same weights, block by block, for any image size."""

import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from frames.packed import BatchRows, philox
from model import VisionTransformer
from networks import decoders
from networks.decoders import LinearDecoder, Segmenter, UPerNet, resize
from runtime import flatten_parameters, parameter_groups

VIT = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=4, num_heads=2, num_register_tokens=3,
           init_values=0.5, init_std=0.2)


def random_weights(network):
    """In float64, so that tests compare to 1e-10; of a size that every part of the result shows."""
    for name, p in network.named_parameters():
        p.data.normal_(std=0.3)
        p.data += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return network.double()


def assert_same(ours, theirs, label="", tolerance=1e-10):
    assert ours.shape == theirs.shape, label
    assert (ours - theirs).norm() <= tolerance * theirs.norm().clamp(min=1e-6), label


# ---------------------------------------------------------------- fixed matrices for resizing and pooling

@pytest.mark.parametrize("pool", [False, True], ids=["bilinear", "pool"])
@pytest.mark.parametrize("height, width, size", [(1, 1, (4, 7)), (3, 5, (6, 6)), (7, 4, (3, 2)), (14, 14, (56, 56)),
                                                 (5, 2, (5, 9)), (2, 3, (6, 6)), (7, 11, (1, 1))])
def test_resize_is_torchs(pool, height, width, size):
    x = torch.randn(2, 3, height, width, requires_grad=True)
    want = F.adaptive_avg_pool2d(x, size) if pool else F.interpolate(x, size, mode="bilinear", align_corners=False)
    got, dout = resize(x, size, pool), torch.randn(2, 3, *size)
    assert_same(got, want, "values", 1e-6)
    assert_same(*(torch.autograd.grad(y, x, dout)[0] for y in (got, want)), "gradient", 1e-6)


def test_resize_keeps_the_type_and_is_exact_under_autocast():
    x = torch.randn(1, 2, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resize(x, (12, 9)), resize(x, (12, 9)).float())
        assert_same(resize(x, (12, 9)), F.interpolate(x, (12, 9), mode="bilinear"), tolerance=1e-6)
        assert resize(x.bfloat16(), (12, 9)).dtype == torch.bfloat16
    assert resize(x, (7, 7)) is x


@pytest.mark.parametrize("height, width", [(4, 6), (5, 6), (1, 1), (1, 4), (7, 3)])
def test_halve_is_max_pooling(height, width):
    x = torch.randn(2, 3, height, width, requires_grad=True)
    want = F.max_pool2d(x, 2, ceil_mode=True)
    got, dout = decoders.halve(x), torch.randn_like(want)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(y, x, dout)[0] for y in (got, want)))


# ---------------------------------------------------------------- UPerNet

def upernet_formula(w, maps, keep, groups):
    """The network of the paper's section 4.2 from weights by name `w`; norms have `groups` groups, or 0: no norm."""
    def up(x, name):
        return F.conv_transpose2d(x, w[f"pyramid.{name}.weight"], w[f"pyramid.{name}.bias"], stride=2)

    def conv(x, name, padding):
        x = F.conv2d(x, w[f"{name}.conv.weight"], w.get(f"{name}.conv.bias"), padding=padding)
        return F.relu(F.group_norm(x, groups, w[f"{name}.norm.weight"], w[f"{name}.norm.bias"]) if groups else x)

    def bilinear(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    first = F.group_norm(up(maps[0], "up4"), maps[0].shape[1] // 16, w["pyramid.norm.weight"], w["pyramid.norm.bias"])
    maps = [up(F.gelu(first), "up4_again"), up(maps[1], "up2"), maps[2], F.max_pool2d(maps[3], 2, ceil_mode=True)]
    pooled = [F.adaptive_avg_pool2d(maps[3], n) for n in (1, 2, 3, 6)]
    pooled = [bilinear(conv(x, f"pools.{i}", 0), maps[3]) for i, x in enumerate(pooled)]
    p4 = conv(torch.cat([maps[3], *pooled], 1), "bottleneck", 1)
    p3 = conv(maps[2], "laterals.2", 0) + bilinear(p4, maps[2])
    p2 = conv(maps[1], "laterals.1", 0) + bilinear(p3, maps[1])
    p1 = conv(maps[0], "laterals.0", 0) + bilinear(p2, maps[0])
    levels = [conv(p1, "convs.0", 1), conv(p2, "convs.1", 1), conv(p3, "convs.2", 1), p4]
    out = conv(torch.cat([bilinear(level, p1) for level in levels], 1), "fusion", 1)
    if keep is not None:
        out = out * keep[:, :, None, None]
    return F.conv2d(out, w["classifier.weight"], w["classifier.bias"])


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("grid, channels, dropped", [((4, 4), None, True), ((3, 5), 48, False), ((1, 1), 16, True),
                                                     ((1, 6), None, False)])
def test_upernet_is_the_formula(norm, grid, channels, dropped):
    """Logits and the gradient of every weight and map."""
    net = random_weights(UPerNet(32, 3, channels, norm))
    maps = [torch.randn(2, 32, *grid).double().requires_grad_() for _ in range(4)]
    keep = net.draw_dropout(2, np.random.default_rng(0)) if dropped else None
    weights = dict(net.named_parameters())
    got, want = net(maps, keep), upernet_formula(weights, maps, keep, net.channels // 16 if norm == "group" else 0)
    assert got.shape == (2, 3, 4 * grid[0], 4 * grid[1])
    assert_same(got, want, "logits")
    inputs, dout = {**weights, **{f"map {i}": x for i, x in enumerate(maps)}}, torch.randn_like(got)
    gradients = [torch.autograd.grad(out, list(inputs.values()), dout) for out in (got, want)]
    for name, ours, theirs in zip(inputs, *gradients):
        assert theirs.norm() > 0 or norm == "group", f"{name} does not reach the logits"
        assert (ours - theirs).norm() <= 1e-9 * theirs.norm() + 1e-9, name


def test_each_map_reaches_the_logits():
    """Of fresh weights, whatever the norm: each map, each weight."""
    for norm in ("group", "none"):
        net, maps = UPerNet(32, 3, norm=norm), [torch.randn(2, 32, 4, 4, requires_grad=True) for _ in range(4)]
        net(maps).square().sum().backward()
        assert all(x.grad.abs().sum() > 0 for x in [*maps, *net.parameters()]), norm


@pytest.mark.parametrize("dim, pyramid, head", [(384, 1.77, 16.96), (768, 7.08, 67.84)])
def test_parameter_counts_are_ultradinos(dim, pyramid, head):
    """In millions, with FASS's five classes; K more or less is K * dim."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in UPerNet(dim, 5, norm="none").named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith("pyramid."))
    assert (round(own / 1e6, 2), round((sum(sizes.values()) - own) / 1e6, 2)) == (pyramid, head)
    assert [name for name in sizes if "norm" in name] == ["pyramid.norm.weight", "pyramid.norm.bias"]


def test_group_norms_of_upernet():
    net = UPerNet(64, 2, 48)
    norms = {name: m for name, m in net.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    assert len(norms) == 1 + 4 + 1 + 3 + 3 + 1
    assert {m.num_channels // m.num_groups for m in norms.values()} == {16}
    assert not any("conv.bias" in name for name, _ in net.named_parameters())
    assert decoders.group_norm(24).num_groups == 1
    with pytest.raises(ValueError, match="norm is 'batch': group, or none as in UltraDINO's released decoder"):
        UPerNet(64, 2, norm="batch")


def test_an_image_does_not_depend_on_its_batch():
    net, maps = UPerNet(32, 3).train(), [torch.randn(3, 32, 4, 4) for _ in range(4)]
    assert_same(net(maps)[1:2], net([x[1:2] for x in maps]), tolerance=1e-5)


def test_initialisation():
    """After a norm logits are of unit scale, else classifiers start small; the pyramid keeps a map's scale."""
    net, x = UPerNet(64, 40), torch.randn(4, 64, 8, 8)
    for first, std in ((net, 1 / 8), (UPerNet(64, 40, norm="none"), 0.01), (LinearDecoder(64, 40), 0.01)):
        assert first.classifier.weight.std().item() == pytest.approx(std, rel=0.05) and not first.classifier.bias.any()
    assert net.pyramid.up2(x).std().item() == pytest.approx(1, rel=0.05)
    assert net.fusion.conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    assert UPerNet(64, 40, norm="none")([x] * 4).softmax(1).max() < 0.1  # of 40 classes
    assert 0.3 < net([x] * 4).std(1).mean() < 1.5


def test_linear_decoder_is_a_product():
    net, maps = random_weights(LinearDecoder(16, 3)), [torch.randn(2, 16, 2, 5).double() for _ in range(4)]
    want = torch.einsum("kc,bcij->bkij", net.classifier.weight[:, :, 0, 0], maps[3])
    assert_same(net(maps), want + net.classifier.bias[:, None, None])


# ---------------------------------------------------------------- dropout

def test_dropout_draws():
    net = UPerNet(32, 2, 48)
    keep = net.draw_dropout(200, np.random.default_rng(0))
    assert keep.shape == (200, 48) and keep.dtype == torch.float32
    assert keep.unique().tolist() == [0.0, pytest.approx(1 / 0.9)]
    assert (keep == 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(keep, net.draw_dropout(200, np.random.default_rng(0)))
    assert not torch.equal(keep, net.draw_dropout(200, np.random.default_rng(1)))
    halves = [net.draw_dropout(2, BatchRows(philox(0, 3, 1), 4, np.arange(4)[part])) for part in (slice(0, 2), slice(2, 4))]
    assert torch.equal(torch.cat(halves), net.draw_dropout(4, philox(0, 3, 1)))  # ranks can share one draw
    assert (UPerNet(32, 2, dropout=0.0).draw_dropout(4, philox(0, 3, 1)) == 1).all()


def test_nothing_random_happens_in_the_forward():
    net = Segmenter(VisionTransformer(**VIT, drop_path_rate=0.5), UPerNet(32, 2)).train()
    x, state = torch.randn(2, 1, 32, 32), torch.get_rng_state()
    assert torch.equal(net(x), net(x)) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(net(x), net.eval()(x))


# ---------------------------------------------------------------- the whole network

@pytest.mark.parametrize("decoder", [UPerNet, LinearDecoder])
@pytest.mark.parametrize("height, width", [(32, 32), (8, 8), (1, 3), (24, 40), (29, 33), (9, 50)])
def test_logits_have_the_images_size(decoder, height, width):
    """An image whose sides are no multiples of the patch size is one padded at right and bottom."""
    net = Segmenter(VisionTransformer(**VIT), decoder(32, 3)).eval()
    x = torch.randn(2, 1, height, width)
    padded = torch.zeros(2, 1, -(-height // 8) * 8, -(-width // 8) * 8)
    padded[:, :, :height, :width] = x
    logits = net(x)
    assert logits.shape == (2, 3, height, width) and logits.dtype == torch.float32
    assert torch.equal(logits, net(padded)[:, :, :height, :width])


class Maps(torch.nn.Module):
    """A decoder that keeps what it is given."""

    def forward(self, maps, keep=None):
        self.maps = maps
        return maps[-1][:, :2]


@pytest.mark.parametrize("depth, blocks", [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 2, 3]),
                                           (40, [12, 19, 26, 39]), (3, [0, 1, 1, 2]), (2, [0, 0, 0, 1]),
                                           (1, [0, 0, 0, 0])])
def test_the_four_maps(depth, blocks):
    """Patches after these blocks through the last norm, row by row, without class token and registers."""
    vit = VisionTransformer(**{**VIT, "depth": depth})
    net, x, B = Segmenter(vit, Maps()), torch.randn(2, 1, 16, 24), 2
    logits = net(x)
    tokens, want = vit.prepare_tokens(x), {}
    for i, block in enumerate(vit.blocks):
        tokens = block(tokens.flatten(0, 1), [(B, 1 + 3 + 6)]).view(B, 10, 32)
        want[i] = torch.zeros(B, 32, 2, 3)
        for row in range(2):
            for column in range(3):
                want[i][:, :, row, column] = vit.norm(tokens[:, 4 + 3 * row + column])
    assert len(net.decoder.maps) == 4
    for block, ours in zip(blocks, net.decoder.maps):
        assert_same(ours, want[block], f"block {block}", 1e-5)
    assert_same(logits, F.interpolate(want[depth - 1][:, :2], (16, 24), mode="bilinear"), tolerance=1e-5)


def test_registers_stay_in_the_network_and_out_of_the_maps():
    with_registers, without = VisionTransformer(**VIT), VisionTransformer(**{**VIT, "num_register_tokens": 0})
    without.load_state_dict({k: v for k, v in with_registers.state_dict().items() if k != "register_tokens"})
    x, nets = torch.randn(1, 1, 24, 32), [Segmenter(vit, Maps()) for vit in (with_registers, without)]
    with torch.no_grad():
        nets[0](x), nets[1](x)
        assert not torch.allclose(nets[0].decoder.maps[0], nets[1].decoder.maps[0], atol=1e-3)  # they are attended to
        for net in nets:  # blocks that do nothing: the maps are the patches, in their places
            for block in net.backbone.blocks:
                block.ls1.gamma.zero_(), block.ls2.gamma.zero_()
            net(x)
    assert all(torch.equal(*maps) for maps in zip(*(net.decoder.maps for net in nets)))


def test_rope_and_any_size():
    net = Segmenter(VisionTransformer(**VIT, pos="rope"), UPerNet(32, 2))
    assert net(torch.randn(1, 1, 20, 45)).shape == (1, 2, 20, 45)


def test_half_precision_gives_float32_logits():
    net, x = Segmenter(VisionTransformer(**VIT), UPerNet(32, 3)), torch.randn(2, 1, 30, 32)
    for decoder in (net.decoder, LinearDecoder(32, 3)):
        torch.nn.init.normal_(decoder.classifier.weight, std=0.5)
        net.decoder, want = decoder, Segmenter(net.backbone, decoder)(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(x)
        assert logits.dtype == torch.float32
        assert_same(logits, want, tolerance=0.03)
        assert not torch.equal(logits, logits.bfloat16().float()), "logits were rounded to bfloat16"


def test_gradients_by_finite_differences():
    vit = VisionTransformer(**{**VIT, "depth": 2, "embed_dim": 16, "init_values": None})
    net = random_weights(Segmenter(vit, UPerNet(16, 2)))
    x = torch.randn(1, 1, 11, 14).double().requires_grad_()
    some = [net.backbone.patch_embed.proj.bias, net.decoder.pyramid.norm.weight, net.decoder.pools[0].norm.bias]
    assert torch.autograd.gradcheck(lambda *_: net(x), (x, *some), eps=1e-6, atol=1e-4, fast_mode=True)


def test_gradients_repeat_to_the_bit(device):
    """On a GPU as well, where torch's own resizing and pooling add in any order."""
    net, x = Segmenter(VisionTransformer(**VIT), UPerNet(32, 3)).to(device), torch.randn(4, 1, 45, 61, device=device)
    trained = [p for name, p in net.named_parameters() if "mask_token" not in name]

    def gradients():
        return torch.autograd.grad(net(x).square().sum(), trained)

    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients()))


# ---------------------------------------------------------------- learning rates, frozen backbones

def test_layer_wise_decay_reaches_the_backbone_and_spares_the_decoder():
    net = Segmenter(VisionTransformer(**VIT), UPerNet(32, 3))
    names = {id(p): name for name, p in net.named_parameters()}
    found = {names[id(p)]: group for group in parameter_groups(net, 0.5) for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, group in found.items():
        rate = 1.0
        if name.startswith("backbone.blocks."):
            rate = 0.5 ** (4 - int(name.split(".")[2]))
        elif name.startswith("backbone.patch_embed."):
            rate = 0.2 * 0.5 ** 5
        elif name.startswith("backbone.") and "norm." not in name:
            rate = 0.5 ** 5
        assert group["lr_multiplier"] == pytest.approx(rate), name
        weight = name.endswith(".weight") and ".norm" not in name or name.endswith(("token", "tokens", "pos_embed"))
        assert group["wd_multiplier"] == float(weight), name
    decayed = {name for name, group in found.items() if name.startswith("decoder.") and group["wd_multiplier"]}
    assert {"decoder.pyramid.up4.weight", "decoder.fusion.conv.weight", "decoder.classifier.weight"} <= decayed
    assert len(decayed) == 3 + 4 + 1 + 3 + 3 + 1 + 1


@pytest.mark.parametrize("decoder", [UPerNet, LinearDecoder])
def test_a_frozen_backbone_stays_and_its_decoder_learns(decoder):
    """Two squares on dark ground, 20 steps of AdamW; weight decay must not touch what is frozen either."""
    net = Segmenter(VisionTransformer(**VIT, drop_path_rate=0.5), decoder(32, 2), frozen=True).train()
    buffers = flatten_parameters(net)
    assert buffers[0][1] is None and not net.backbone.training and net.decoder.training
    before = {name: p.clone() for name, p in net.backbone.named_parameters()}
    masks = torch.zeros(2, 32, 32, dtype=torch.int64)
    masks[0, 8:16, 8:16] = masks[1, 16:32, 0:16] = 1
    x = masks[:, None] * 2.0 - 1
    drops = net.backbone.draw_drop_path([(2, 1 + 3 + 16)], np.random.default_rng(0))
    optimizer = torch.optim.AdamW(parameter_groups(net, 1.0), lr=0.02, weight_decay=0.1)
    assert torch.equal(net(x, drops), net(x))
    for _ in range(20):
        loss = F.cross_entropy(net(x), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.3
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in net.backbone.named_parameters())
    assert not Segmenter(VisionTransformer(**VIT), decoder(32, 2)).eval().backbone.training


def test_a_whole_network_learns():
    net = Segmenter(VisionTransformer(**VIT), UPerNet(32, 2)).train()
    assert net.backbone.training
    F.cross_entropy(net(torch.randn(2, 1, 32, 32)), torch.zeros(2, 32, 32, dtype=torch.int64)).backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["backbone.mask_token"]


# ---------------------------------------------------------------- drop path

def uniform_formula(depth, rate, shapes, rng):
    """Rows kept, their inverse and their scale of each of 2 * depth branches, one after the other."""
    draws = [rng.random((2 * depth, B)).argsort(axis=1) for B, _ in shapes]
    drops = []
    for branch in range(2 * depth):
        rows, scale, start = [], [], 0
        for (B, N), order in zip(shapes, draws):
            kept = max(int(B * (1 - rate)), 1)
            chosen = sorted(order[branch][:kept].tolist())
            rows += [start + image * N + token for image in chosen for token in range(N)]
            scale += [B / kept if image in chosen else 0.0 for image in range(B) for _ in range(N)]
            start += B * N
        inverse = torch.full((start,), -1)
        inverse[rows] = torch.arange(len(rows))
        drops.append((torch.tensor(rows), inverse, torch.tensor(scale)[:, None]))
    return drops


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_uniform_drop_path_is_what_it_was(rate):
    shapes = [(5, 21), (16, 7)]
    vit = VisionTransformer(**VIT, drop_path_rate=rate)
    ours, rng = vit.draw_drop_path(shapes, rng := np.random.default_rng(3)), rng
    twin = np.random.default_rng(3)
    want = uniform_formula(4, rate, shapes, twin)
    assert len(ours) == len(want) == 8
    assert all(torch.equal(a, b) for drop, expected in zip(ours, want) for a, b in zip(drop, expected))
    assert all(drop.shapes == [(max(int(B * (1 - rate)), 1), N) for B, N in shapes] for drop in ours)
    assert rng.random() == twin.random()  # no number more or less was drawn


def test_linear_drop_path_grows_with_depth():
    vit = VisionTransformer(**{**VIT, "depth": 5}, drop_path_rate=0.4, drop_path_uniform=False)
    drops = vit.draw_drop_path([(20, 7), (2, 3)], np.random.default_rng(0))
    assert drops[:2] == [None, None] and len(drops) == 10
    kept = [(18, 2), (16, 2), (14, 1), (12, 1)]
    assert [drop.shapes for drop in drops[2::2]] == [[(first, 7), (second, 3)] for first, second in kept]
    for rows, inverse, scale, ((first, _), (second, _)) in drops[2:]:
        assert len(rows) == 7 * first + 3 * second and (inverse >= 0).sum() == len(rows)
        assert scale[:140].unique().tolist() == [0.0, pytest.approx(20 / first)]
        assert scale[140:].max() == pytest.approx(2 / second)
    kept = [{tuple(drop.rows.tolist()) for drop in drops[2 * i:2 * i + 2]} for i in range(1, 5)]
    assert all(len(pair) == 2 for pair in kept)  # each branch its own
    vit.drop_path_uniform = True
    assert [drop.shapes[0] for drop in vit.draw_drop_path([(20, 7)], np.random.default_rng(0))] == [(12, 7)] * 10


def test_small_batches_are_not_dropped_more_than_asked():
    vit = VisionTransformer(**{**VIT, "depth": 12}, drop_path_rate=0.4, drop_path_uniform=False)
    drops = vit.draw_drop_path([(8, 2)], np.random.default_rng(0))[2:]
    assert np.mean([1.0] * 2 + [drop.shapes[0][0] / 8 for drop in drops]) == pytest.approx(0.8, abs=0.02)
    assert vit.draw_drop_path([(1, 2)], np.random.default_rng(0))[-1].shapes == [(1, 2)]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("checkpointed", [True, False])
def test_maps_with_drop_path_are_the_features(uniform, checkpointed):
    """One way through the blocks: the last map is forward_features's patches, gradients too."""
    vit = VisionTransformer(**VIT, drop_path_rate=0.5, drop_path_uniform=uniform)
    x, drops = torch.randn(4, 1, 32, 32), vit.draw_drop_path([(4, 20)], np.random.default_rng(0))
    want = vit.forward_features(x, drops=drops)["x_norm_patchtokens"]
    weight = torch.randn_like(want)
    gradient, = torch.autograd.grad((want * weight).sum(), vit.blocks[0].attn.qkv.weight)
    vit.checkpoint_activations = checkpointed
    got, = vit.get_intermediate_layers(x, [3], drops=drops)
    assert torch.equal(got, want) and not torch.equal(got, vit.get_intermediate_layers(x, [3])[0])
    assert_same(torch.autograd.grad((got * weight).sum(), vit.blocks[0].attn.qkv.weight)[0], gradient, tolerance=1e-6)
    net = Segmenter(vit, Maps())
    net(x, drops)
    assert torch.equal(net.decoder.maps[3].flatten(2).mT, got)


# ---------------------------------------------------------------- models of timm

class TimmTransformer(torch.nn.Module):
    """What timm's vision transformers show: prefix tokens first, forward_intermediates of any blocks, as maps."""
    num_features, num_prefix_tokens = 16, 2
    pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.2,) * 3}

    def __init__(self, widths=(16, 16, 16, 16, 16, 16)):
        super().__init__()
        self.patch_embed = torch.nn.Conv2d(3, 16, 4, stride=4)
        self.patch_embed.patch_size = (4, 4)
        self.cls_token = torch.nn.Parameter(torch.randn(1, 2, 16))
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(a, b) for a, b in zip((16, *widths), widths))
        self.drop = torch.nn.Dropout(0.5)

    def forward_intermediates(self, x, indices, norm, intermediates_only, return_prefix_tokens):
        assert norm and intermediates_only and return_prefix_tokens
        x = self.patch_embed(x)
        grid = x.shape[2:]
        x, outputs = torch.cat((self.cls_token.expand(len(x), -1, -1), x.flatten(2).mT), 1), []
        for i, block in enumerate(self.blocks):
            x = torch.tanh(self.drop(block(x + x.mean(1, keepdim=True))) if i else block(x))
            if i in (range(len(self.blocks) - indices, len(self.blocks)) if isinstance(indices, int) else indices):
                outputs.append((x[:, 2:].mT.unflatten(2, grid), x[:, :2]))
        return outputs


class TimmConvolution(torch.nn.Module):
    """Stages that halve the map and widen it."""
    num_features, pretrained_cfg = 16, TimmTransformer.pretrained_cfg

    def forward_intermediates(self, x, indices, norm, intermediates_only):
        return [x.new_zeros(len(x), 4 * 2 ** i, 8 >> i, 8 >> i) for i in indices]


class TimmLast(torch.nn.Module):
    num_features, pretrained_cfg = 16, TimmTransformer.pretrained_cfg


@pytest.fixture
def timm_backbone(monkeypatch):
    from networks.families import TimmBackbone
    made = {"vit": TimmTransformer, "stages": lambda: TimmTransformer((16, 16, 8, 8)), "convolution": TimmConvolution,
            "last": TimmLast}
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=lambda name, **how: made[name]()))
    return TimmBackbone


def test_timm_transformers_have_maps(timm_backbone):
    backbone = timm_backbone("vit").eval()
    net, x = Segmenter(backbone, Maps()), torch.randn(2, 3, 10, 23)
    assert net(x).shape == (2, 2, 10, 23)
    assert net.blocks == [1, 2, 3, 5]
    padded = F.pad(x, (0, 1, 0, 2))
    want = backbone.model.forward_intermediates(padded, [1, 2, 3, 5], True, True, True)
    assert all(torch.equal(ours, maps) for ours, (maps, _) in zip(net.decoder.maps, want))
    patches, cls = backbone.get_intermediate_layers(padded, [5], return_class_token=True)[0]
    assert torch.equal(patches, want[3][0].flatten(2).mT) and torch.equal(cls, want[3][1][:, 0])
    learnt = Segmenter(timm_backbone("vit"), UPerNet(16, 2))
    learnt(x).sum().backward()
    assert learnt.backbone.model.blocks[0].weight.grad.any()


def test_a_frozen_timm_transformer_stays_in_eval_mode(timm_backbone):
    net, x = Segmenter(timm_backbone("vit").train(), UPerNet(16, 2), frozen=True).train(), torch.randn(1, 3, 16, 16)
    assert torch.equal(net(x), net(x)) and not net.backbone.model.drop.training
    assert not torch.equal(*(Segmenter(timm_backbone("vit"), UPerNet(16, 2)).train()(x) for _ in range(2)))


@pytest.mark.parametrize("name, sentence", [
    ("stages", r"timm:stages: a map of \(8, 4, 4\) where one of \(16, 4, 4\) was expected; use a plain vision"),
    ("convolution", r"timm:convolution: a map of \(4, 8, 8\) where .* use a plain vision transformer"),
    ("last", "timm:last: gives its last features only")])
def test_timm_networks_without_such_maps_are_refused(timm_backbone, name, sentence):
    with pytest.raises(ValueError, match=sentence):
        Segmenter(timm_backbone(name), LinearDecoder(16, 2))(torch.randn(1, 3, 16, 16))
