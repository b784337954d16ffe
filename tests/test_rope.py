"""Rotary positions, their rescaling in training, pretraining with them. DINOv3's own numbers: test_golden_dinov3.py."""

import math
from collections import defaultdict

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from stage_tools import StopAfter, checkpoint, one_thread, read_log, spy  # noqa: F401  one_thread is for all tests here

import kernels
import losses
import pretrain
import runtime
from model import DINOV3, VisionTransformer, draw_rescale
from networks import baselines
from networks.weights import load_backbone
from tools import dry_run
from training import classifier, features

VIT = dict(DINOV3, patch_size=8, in_chans=1, embed_dim=64, depth=3, num_heads=2, num_register_tokens=4, init_values=0.5)
SMALL = ["--preset", "cpu", "--pos", "rope", "--head_n_prototypes", "32", "--head_hidden_dim", "16",
         "--head_bottleneck_dim", "8", "--global_crops_size", "16", "--local_crops_size", "8", "--patch_size", "4",
         "--canvas", "24", "--batch_size_per_gpu", "4", "--drop_path_rate", "0.3", "--layerscale", "1",
         "--reference_ops"]
CPU = torch.device("cpu")


def build(**changes):
    """A network whose positions show in its features."""
    vit = VisionTransformer(**{**VIT, **changes}).double()
    for p in vit.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return vit


def agree(got, want, tolerance=1e-6):
    assert got.shape == want.shape
    error = (got - want).norm() / want.norm()
    assert error <= tolerance, f"relative error {error:.1e}"


def table(rows, columns, scale, prefix=5, D=32):
    """(cos, sin) as DINOv3 computes them, number by number: coordinates -1 .. 1, all times `scale`, by the periods."""
    angles = [[0.0] * (D // 2) for _ in range(prefix)]
    for row in range(rows):
        for column in range(columns):
            place = (2 * (row + 0.5) / rows - 1) * scale, (2 * (column + 0.5) / columns - 1) * scale
            angles.append([2 * math.pi * c / 100 ** (2 * i / (D // 2)) for c in place for i in range(D // 4)])
    angles = torch.tensor(angles, dtype=torch.float64)
    return angles.cos().float(), angles.sin().float()


# ---------------------------------------------------------------- positions

@pytest.mark.parametrize("factor", [None, 0.6, 1.9])
def test_scores_depend_on_relative_places_alone(factor):
    """And those of class token and registers on nothing. Values are unit vectors: what comes out is the softmax."""
    vit = VisionTransformer(**{**VIT, "num_heads": 1, "embed_dim": 32, "depth": 1})
    rope, = vit.turns([torch.zeros(1, 1, 24, 40)], None if factor is None else np.array([[factor]]))
    rows, columns, N, D = 3, 5, 20, 32
    q, k = torch.randn(2, 1, D).double().expand(-1, N, -1)  # every token asks for and offers the same
    p = kernels.attention(torch.cat((q, k, torch.eye(N, D).double()), dim=1), [(1, N)], 1, rope)[:, :N]
    scores = p.log() - p.log().diagonal()[:, None]  # against a token's score with itself
    assert scores[:5, :5].abs().max() < 1e-6
    by_offset = defaultdict(list)
    for i in range(5, N):
        for j in range(5, N):
            offset = np.subtract(divmod(i - 5, columns), divmod(j - 5, columns))
            by_offset[tuple(offset)].append(scores[i, j].item())
    assert len(by_offset) == 5 * 9 and sum(map(len, by_offset.values())) == (rows * columns) ** 2
    assert max(np.ptp(same) for same in by_offset.values()) < 1e-5
    assert np.std([same[0] for same in by_offset.values()]) > 0.1


def test_prefix_does_not_turn_whatever_the_rescale():
    tables = build().turns([torch.zeros(1, 1, 24, 40), torch.zeros(1, 1, 16, 16)], np.full((3, 2), 1.7))
    assert len(tables) == 3 and all(len(groups) == 2 for groups in tables)
    for cos, sin in (group for groups in tables for group in groups):
        assert (cos[:5] == 1).all() and (sin[:5] == 0).all() and sin[5:].abs().min(1).values.max() > 0


def test_rescaled_features_are_the_written_out_loop():
    """Every block and every crop size has a factor of its own; without `rescale` the factor is 1, in training too."""
    vit, crops = build(), [torch.randn(2, 1, 24, 40).double(), torch.randn(3, 1, 16, 16).double()]
    factors = draw_rescale(3, 2, 2.0, np.random.default_rng(0))
    plain = vit.forward_features(crops)
    for rescale, used in ((factors, factors), (None, np.ones((3, 2)))):
        packed, shapes = vit.pack(crops, [None, None])
        for block, (a, b) in zip(vit.blocks, used):
            packed = block(packed, shapes, rope=[table(3, 5, a), table(2, 2, b)])
        got = vit.forward_features(crops, None, None, rescale)
        agree(torch.cat([x["x_prenorm"].flatten(0, 1) for x in got]), packed)
        for x, same, rescaled in zip(got, plain, (rescale is not None,) * 2):
            assert torch.equal(x["x_norm_clstoken"], same["x_norm_clstoken"]) != rescaled
    (last,) = vit.get_intermediate_layers(crops[0], [2], rescale=factors[:, :1])
    assert torch.equal(last, vit.forward_features(crops[0], rescale=factors[:, :1])["x_norm_patchtokens"])
    assert torch.equal(vit.eval()(crops[0]), plain[0]["x_norm_clstoken"])
    learned = VisionTransformer(**{**VIT, "pos": "learned", "img_size": 16}).double()
    assert torch.equal(learned.forward_features(crops[1], rescale=factors)["x_prenorm"],
                       learned.forward_features(crops[1])["x_prenorm"])


def test_factors_are_uniform_in_their_logarithm():
    factors = draw_rescale(400, 5, 2.0, np.random.default_rng(0))
    assert factors.shape == (400, 5) and factors.dtype == np.float64 and 0.5 <= factors.min() and factors.max() <= 2
    assert scipy.stats.kstest(np.log(factors).ravel() / math.log(2), scipy.stats.uniform(-1, 2).cdf).pvalue > 0.05
    rng = np.random.default_rng(0)
    assert draw_rescale(3, 2, 1, rng) is None and rng.random() == np.random.default_rng(0).random()


def test_checkpointed_and_compiled_blocks_turn_alike():
    vit, crops = build(), [torch.randn(2, 1, 24, 40).double(), torch.randn(3, 1, 16, 16).double()]

    def gradients(seed=0):
        vit.zero_grad()
        rescale = draw_rescale(3, 2, 2.0, np.random.default_rng(seed))
        sum(x["x_prenorm"].square().sum() for x in vit.forward_features(crops, rescale=rescale)).backward()
        return [p.grad for block in vit.blocks for p in block.parameters()]

    plain = gradients()
    assert not torch.equal(plain[0], gradients(1)[0])
    vit.checkpoint_activations = True
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))
    vit.checkpoint_activations = False
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    vit.compile_blocks(backend="aot_eager")
    for seed in (2, 1, 0):
        compiled = gradients(seed)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # around attention; no block again
    keys = torch.cat([torch.zeros(64), torch.ones(64), torch.zeros(64)]).bool()  # their bias has no gradient
    for a, b in zip(plain, compiled):
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8 * a.abs().max().item())
        assert a.shape != keys.shape or not a[keys].any()


def test_images_need_not_be_square():
    vit, x = build(patch_size=16), torch.randn(2, 1, 224, 256).double()
    tokens, (map_,) = vit.forward_features(x), vit.get_intermediate_layers(x, 1, reshape=True)
    assert map_.shape == (2, 64, 14, 16) and tokens["x_norm_regtokens"].shape == (2, 4, 64)
    for row, column in ((0, 0), (3, 15), (13, 1)):
        assert torch.equal(map_[:, :, row, column], tokens["x_norm_patchtokens"][:, 16 * row + column])


# ---------------------------------------------------------------- pretraining

def micro(images=4):
    return dict(global_crops=torch.zeros(2 * images, 1, 16, 16), local_crops=torch.zeros(3 * images, 1, 8, 8))


def test_draws_hang_on_seed_step_rank_and_micro_batch_alone():
    """Drop path comes first: it is what it was without rescaling, and with learned positions nothing else is drawn."""
    vit, learned = build(drop_path_rate=0.5), VisionTransformer(**{**VIT, "pos": "learned", "drop_path_rate": 0.5})
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    factors = [scale for key in keys for _, scale in losses.draw_drops(vit, [micro(), micro()], *key, 2.0)]
    assert len({scale.tobytes() for scale in factors}) == 8 and all(scale.shape == (3, 2) for scale in factors)
    again = [scale for key in keys for _, scale in losses.draw_drops(vit, [micro(), micro()], *key, 2.0)]
    assert all(np.array_equal(a, b) for a, b in zip(factors, again))
    (drops, _), = losses.draw_drops(vit, [micro()], 0, 0, 0, 2.0)
    for network, limit in ((vit, 1.0), (learned, 2.0)):
        (others, scale), = losses.draw_drops(network, [micro()], 0, 0, 0, limit)
        assert scale is None and all(torch.equal(a[0], b[0]) for a, b in zip(drops, others, strict=True))


def test_only_the_student_is_rescaled(monkeypatch):
    def step(*flags):
        args = pretrain.get_args([*SMALL, "--base_lr", "1", *flags])
        student, teacher = pretrain.build_networks(args, CPU)
        before, state = teacher.backbone.blocks[0].mlp.fc1.weight.clone(), pretrain.build_state(student, teacher, args)
        dry_run.step(student, teacher, state, dry_run.noise_batch(args, 4), args, CPU)
        assert not torch.equal(before, student.backbone.blocks[0].mlp.fc1.weight)
        return student.state_dict()

    seen = []
    spy(monkeypatch, VisionTransformer, "turns", lambda vit, crops, rescale=None, result=None: seen.append(
        (len(crops), rescale is not None)))
    first, again, other, none = step(), step(), step("--rope_rescale", "1.5"), step("--rope_rescale", "1")
    assert seen == [(1, False), (2, True)] * 3 + [(1, False), (2, False)]  # teacher on global crops, student on all
    key = "backbone.blocks.0.mlp.fc1.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert len({state[key].numpy().tobytes() for state in (first, other, none)}) == 3


def test_flags(capsys):
    args = pretrain.get_args(SMALL)
    config = pretrain.backbone_config(args)
    assert (args.rope_rescale, config["pos"], config["norm_eps"], config["mask_k_bias"]) == (2.0, "rope", 1e-5, True)
    plain = pretrain.get_args([])
    assert plain.pos == "learned" and not DINOV3.keys() & pretrain.backbone_config(plain).keys()
    with pytest.raises(ValueError, match="--rope_rescale 1.5 is for --pos rope"):
        pretrain.get_args(["--rope_rescale", "1.5"])
    for flags, message in ((["--pos", "rope", "--rope_rescale", "0.5"], "--rope_rescale must be at least 1, not 0.5"),
                           (["--init", "a.pt", "--pos", "rope"], "--pos beside --init: the file decides")):
        with pytest.raises(SystemExit):
            pretrain.get_args(flags)
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (24, 30), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def run(frames, folder, *flags, received=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "stop_on_signals", lambda: received)
        pretrain.main(pretrain.get_args([*SMALL, "--data", str(frames), "--output_dir", str(folder), "--log_every", "1",
                                         "--total_samples", "24", "--num_workers", "0", *flags]))
    return checkpoint(folder / "last.pt"), [record["loss"] for record in read_log(folder / "log.jsonl")]


def test_a_stopped_and_resumed_run_is_bit_equal_and_loads(frames, tmp_path):
    whole, losses_ = run(frames, tmp_path / "whole")
    assert whole["step"] == len(losses_) == 6
    stopped, _ = run(frames, tmp_path / "cut", received=StopAfter(2))
    assert stopped["step"] == 3
    resumed, resumed_losses = run(frames, tmp_path / "cut")
    assert resumed["step"] == 6 and resumed_losses == losses_
    for who in ("student", "teacher"):
        assert all(torch.equal(resumed[who][key], value) for key, value in whole[who].items())
    assert run(frames, tmp_path / "none", "--rope_rescale", "1", "--total_samples", "4")[1] != losses_[:1]

    path = str(tmp_path / "whole" / "last.pt")
    vit, info = load_backbone(path)
    assert info["config"] | DINOV3 == info["config"] and "pos_embed" not in vit.state_dict()
    assert torch.equal(vit.blocks[1].attn.qkv.weight, whole["teacher"]["backbone.blocks.1.attn.qkv.weight"])
    backbone, _ = baselines.open_backbone(path, None, "vit_small", 0)  # as few-shot and fine-tuning open it
    x = torch.randn(3, 1, 20, 28)
    assert torch.equal(features.embed(backbone, x)[:, 3], vit(x))
    assert classifier.build(backbone, 2, 0, 0.9, CPU)[0](x).shape == (3, 2)
    args = pretrain.get_args(["--init", path])
    pretrain.open_init(args)
    assert (args.arch, args.pos) == ("vit_micro", "rope")
