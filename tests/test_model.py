"""The transformer's promises beyond the golden numbers: sizes, keys, the block as a formula, drop path."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
import model
from losses import DINOHead
from model import SIZES, VisionTransformer

TINY = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=64, depth=2, num_heads=1, num_register_tokens=4)


@pytest.mark.parametrize("size, parameters", [("vit_small", 21_480_192), ("vit_base", 85_427_712)])
def test_parameter_counts_are_ultradinos(size, parameters):
    with torch.device("meta"):
        vit = VisionTransformer(in_chans=1, num_register_tokens=4, **SIZES[size])
    assert sum(p.numel() for p in vit.parameters()) == parameters
    assert len(vit.state_dict()) == 176


def test_head_parameter_counts_are_ultradinos():
    with torch.device("meta"):
        assert sum(p.numel() for p in DINOHead(384, 65536).parameters()) == 22_352_128
        assert sum(p.numel() for p in DINOHead(768, 65536).parameters()) == 23_138_560


def test_giant2_has_dinov2s_swiglu():
    with torch.device("meta"):
        vit = VisionTransformer(img_size=518, patch_size=14, **{**SIZES["vit_giant2"], "depth": 1})
    assert vit.blocks[0].mlp.w12.weight.shape == (8192, 1536) and vit.blocks[0].mlp.w3.weight.shape == (1536, 4096)


def test_swiglu_formula():
    ffn, x = model.SwiGLU(8, 32), torch.randn(5, 8)
    norm, scale = random_norm(8), model.LayerScale(8, 0.3)
    first, second = ffn.w12(norm(x)).chunk(2, dim=1)
    assert torch.allclose(ffn(F.layer_norm(x, (8,), eps=1e-6), norm, scale), ffn.w3(first * torch.sigmoid(first) * second) * 0.3, atol=1e-6)


def random_norm(dim):
    norm = torch.nn.LayerNorm(dim, eps=1e-6)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    return norm


def block_formula(block, y, shapes):
    """The two residual branches of a block as one reads them in the paper, without what is folded or computed again."""
    def attn(y):
        out = kernels.attention(block.attn.qkv(block.norm1(y)), shapes, block.attn.num_heads)
        return block.attn.proj(out) * (block.ls1.gamma if block.ls1 else 1)
    return attn, lambda y: block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(y)))) * (block.ls2.gamma if block.ls2 else 1)


@pytest.mark.parametrize("init_values", [0.3, None])
def test_block_is_the_formula(init_values):
    """Output and every gradient, in float64: folded norms and LayerScale, GELU computed again."""
    block = model.Block(32, 2, 4, "mlp", init_values).double()
    for p in block.parameters():
        p.data.normal_(std=0.5)
    x, dout = torch.randn(2 * 9, 32).double().requires_grad_(), torch.randn(18, 32).double()
    attn, mlp = block_formula(block, x, [(2, 9)])
    want = x + attn(x)
    want = want + mlp(want)
    inputs = (x, *block.parameters())
    got = block(x, [(2, 9)])
    assert torch.allclose(got, want, rtol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout)):
        assert (ours - theirs).norm() <= 1e-10 * theirs.norm().clamp(min=1e-3)


def test_block_in_half_precision_is_as_exact_as_autocast():
    """Under autocast, against float64: errors like the formula's (1.3 times at most), which keeps more, folds nothing."""
    block = model.Block(64, 2, 4, "mlp", 0.5)
    for name, p in block.named_parameters():
        p.data.normal_(std=0.3 if "norm" in name else 0.1)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    exact = copy.deepcopy(block).double()
    x, dout = torch.randn(40, 64), torch.randn(40, 64)

    def run(block, x, formula):
        x = x.clone().requires_grad_()
        attn, mlp = block_formula(block, x, [(4, 10)])
        out = x + attn(x) if formula else block(x, [(4, 10)])
        out = out + mlp(out) if formula else out
        return torch.autograd.grad(out, (x, *block.parameters()), dout.to(x.dtype))

    want = run(exact, x.double(), True)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(block, x, False), run(block, x, True)
    errors = [[((g - w).norm() / w.norm()).item() for g, w in zip(grads, want) if w.norm() > 1e-6] for grads in (ours, theirs)]
    assert np.mean(errors[0]) < 1.3 * np.mean(errors[1]) and max(errors[0]) < 0.05


def test_each_block_runs_exactly_once():
    vit, runs = VisionTransformer(**TINY), [0, 0]
    for i, block in enumerate(vit.blocks):
        block.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    vit.forward_features(torch.randn(2, 1, 32, 32))
    assert runs == [1, 1]
    vit.forward_features([torch.randn(2, 1, 32, 32), torch.randn(3, 1, 16, 16)])
    assert runs == [2, 2]


def test_wrong_image_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match="3 channels, 32x30: this model takes 1 channels .* patch size 8"):
        VisionTransformer(**TINY).forward_features(torch.randn(1, 3, 32, 30))


def test_positions_equal_direct_interpolation():
    """The fixed matrix does what F.interpolate does, values and gradient."""
    vit = VisionTransformer(**TINY)
    ours = vit.positions((3, 7))[0, 1:]
    patches = vit.pos_embed[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    direct = torch.nn.functional.interpolate(patches, scale_factor=(3.1 / 4, 7.1 / 4), mode="bicubic")[0].flatten(1).T
    assert torch.allclose(ours, direct, atol=1e-6)
    weight = torch.randn_like(ours)
    gradients = [torch.autograd.grad((x * weight).sum(), vit.pos_embed, retain_graph=True)[0] for x in (ours, direct)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_residual_stream_stays_float32_under_autocast():
    vit = VisionTransformer(**TINY)  # LayerScale 1e-5: in bf16 the residual would vanish
    with torch.autocast("cpu", torch.bfloat16):
        out = vit.forward_features(torch.randn(2, 1, 32, 32))
    assert out["x_prenorm"].dtype == out["x_norm_clstoken"].dtype == torch.float32


# ---------------------------------------------------------------- drop path

def test_drop_path_is_batch_subset_stochastic_depth():
    """Against the formula, image by image: x + images / kept * branch(x) for kept images, x for the others."""
    vit = VisionTransformer(**{**TINY, "depth": 1, "init_values": 0.7}, drop_path_rate=0.4)
    crops = [torch.randn(5, 1, 32, 32), torch.randn(7, 1, 16, 16)]
    packed, shapes = vit.pack(crops, [None, None])
    drops = vit.draw_drop_path(shapes, np.random.default_rng(0))
    out = vit.blocks[0](packed, shapes, drops)
    block, offset, dropped = vit.blocks[0], 0, 0
    for B, N in shapes:
        kept = max(int(B * 0.6), 1)
        for start in range(offset, offset + B * N, N):
            x = packed[start:start + N]
            for (rows, _, _, kept_shapes), branch in zip(drops, block_formula(block, x, [(1, N)])):
                assert (kept, N) in kept_shapes
                if start in rows:
                    x = x + B / kept * branch(x)
                else:
                    dropped += 1
            assert torch.allclose(out[start:start + N], x, atol=1e-5)
        offset += B * N
    assert dropped == 2 * (5 - 3) + 2 * (7 - 4)


def test_drop_path_draws_differ_by_branch_and_rng_only():
    vit = VisionTransformer(**TINY, drop_path_rate=0.5)
    first, again, other = (vit.draw_drop_path([(16, 21)], np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, again))
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(first, other))
    assert len({tuple(rows.tolist()) for rows, *_ in first}) == 4
    assert VisionTransformer(**TINY).draw_drop_path([(16, 21)], np.random.default_rng(0)) is None
