"""Agreement with numbers computed by facebookresearch/dinov3 (6876159) on seeded random weights, to 1e-5 per tensor.

The file's keys go through the converter into VisionTransformer; both image sizes are packed into one matrix.
"""
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from families import convert
from kernel_tools import close, needs_kernels, rope_table
from model import VisionTransformer, rope_periods
from weights import load_strict

SIZES = "64", "48x96"


def golden(ffn):
    with np.load(Path(__file__).parent / "golden" / "vit_dinov3.npz") as file:
        return {key[len(ffn) + 1:]: torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{ffn}/")}


def build(z):
    state = {key[len("state/"):]: value for key, value in z.items() if key.startswith("state/")}
    family, state, config = convert(state, "vit_dinov3.npz")
    assert family == "DINOv3" and config["num_heads"] == 1
    return load_strict(VisionTransformer(**config), state, "vit_dinov3.npz")


@pytest.mark.parametrize("ops", ["references", pytest.param("kernels", marks=needs_kernels)])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_vit(ffn, ops, device):
    kernels.use_reference(ops == "references")
    assert ("references" in kernels.mode(device)) == (ops == "references")
    z = golden(ffn)
    vit = build(z).to(device)
    features = vit.forward_features([z[f"x{size}"].to(device) for size in SIZES])
    for size, x in zip(SIZES, features):
        close(f"cls at {size}", x["x_norm_clstoken"], z[f"cls{size}"], 1e-5)
        close(f"storage tokens at {size}", x["x_norm_regtokens"], z[f"storage{size}"], 1e-5)
        close(f"patches at {size}", x["x_norm_patchtokens"], z[f"patch{size}"], 1e-5)
    for size in SIZES:
        (patches, cls), = vit.get_intermediate_layers(z[f"x{size}"].to(device), 1, return_class_token=True)
        close(f"last block's cls at {size}", cls, z[f"cls{size}"], 1e-5)
        close(f"last block's patches at {size}", patches, z[f"patch{size}"], 1e-5)


def test_keys_learn_no_bias(device):
    """The masked third of the bias has no gradient, all else has one; blocks computed twice give the same ones."""
    kernels.use_reference(True)
    z = golden("swiglu")
    vit, gradients = build(z).to(device), []
    vit.drop_path_rate = 0.5
    drops = vit.draw_drop_path([(2, 21), (1, 23)], np.random.default_rng(0))
    for vit.checkpoint_activations in (False, True):
        vit.zero_grad()
        features = vit.forward_features([z[f"x{size}"].to(device) for size in SIZES], None, drops)
        sum((x["x_norm_patchtokens"] ** 3).sum() for x in features).backward()
        gradients.append({name: p.grad.clone() for name, p in vit.named_parameters() if name != "mask_token"})
    assert vit.mask_token.grad is None
    assert all(torch.equal(gradients[0][name], grad) for name, grad in gradients[1].items())
    for block in range(2):
        q, k, v = gradients[0][f"blocks.{block}.attn.qkv.bias"].chunk(3)
        assert not k.any() and q.abs().min() > 0 and v.abs().min() > 0


def test_kept_images_turn_alike(device):
    """With drop path, each kept image is what it is alone: tables belong to the crop size, not to the batch."""
    z = golden("mlp")
    vit, x = build(z).to(device), z["x64"].to(device)
    packed, shapes = vit.pack([x], [None])
    token = torch.arange(42, device=device)  # the first image's 21 are dropped
    drop = token[21:], (token - 21).clamp(min=-1), (token >= 21).float()[:, None], [(1, 21)]
    out = vit.blocks[0](packed, shapes, [drop, drop], vit.turns([x]))
    alone = vit.blocks[0](vit.pack([x[1:]], [None])[0], [(1, 21)], rope=vit.turns([x[1:]]))
    close("the kept image", out[21:], alone, 1e-6)
    assert torch.equal(out[:21], packed[:21])


def test_tables_are_the_formula():
    vit = VisionTransformer(pos="rope", embed_dim=128, num_heads=1, depth=1, patch_size=8, num_register_tokens=2)
    image = torch.zeros(1, 3, 24, 56)
    (cos, sin), = vit.turns([image])
    want = rope_table(3, 7, 3, D=128)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.allclose(cos, want[0], atol=1e-6) and torch.allclose(sin, want[1], atol=1e-6)
    assert vit.turns([image])[0][0] is cos  # made once
    assert not hasattr(vit, "pos_embed") and VisionTransformer(depth=1).turns([image]) is None


def test_official_files_round_the_periods():
    """The sixteen numbers in Meta's files."""
    assert rope_periods(64, "bfloat16").tolist() == [1.0, 1.3359375, 1.78125, 2.375, 3.15625, 4.21875, 5.625, 7.5, 10.0,
                                                     13.3125, 17.75, 23.75, 31.625, 42.25, 56.25, 75.0]
    assert rope_periods(64)[-1].item() == pytest.approx(74.98942, abs=1e-5)
