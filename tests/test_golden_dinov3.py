"""Agreement with numbers computed by facebookresearch/dinov3 (6876159) on seeded random weights, to 1e-5 per tensor.

The file's keys go through the converter into VisionTransformer; both image sizes are packed into one matrix. Then
DINOv3's sizes and the layout of its files.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kernel_tools import close, needs_kernels, rope_table

import kernels
import pretrain
from model import DINOV3, SIZES, Drop, VisionTransformer, rope_periods
from networks.families import convert
from networks.weights import load_backbone, load_strict

IMAGES = "64", "48x96"


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
    features = vit.forward_features([z[f"x{size}"].to(device) for size in IMAGES])
    for size, x in zip(IMAGES, features):
        close(f"cls at {size}", x["x_norm_clstoken"], z[f"cls{size}"], 1e-5)
        close(f"storage tokens at {size}", x["x_norm_regtokens"], z[f"storage{size}"], 1e-5)
        close(f"patches at {size}", x["x_norm_patchtokens"], z[f"patch{size}"], 1e-5)
    for size in IMAGES:
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
        features = vit.forward_features([z[f"x{size}"].to(device) for size in IMAGES], None, drops)
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
    drop = Drop(token[21:], (token - 21).clamp(min=-1), (token >= 21).float()[:, None], [(1, 21)])
    out = vit.blocks[0](packed, shapes, [drop, drop], vit.turns([x])[0])
    alone = vit.blocks[0](vit.pack([x[1:]], [None])[0], [(1, 21)], rope=vit.turns([x[1:]])[0])
    close("the kept image", out[21:], alone, 1e-6)
    assert torch.equal(out[:21], packed[:21])


def test_tables_are_the_formula():
    vit = VisionTransformer(pos="rope", embed_dim=128, num_heads=1, depth=1, patch_size=8, num_register_tokens=2)
    image = torch.zeros(1, 3, 24, 56)
    ((cos, sin),), = vit.turns([image])
    want = rope_table(3, 7, 3, D=128)
    assert cos.dtype == sin.dtype == torch.float32
    assert torch.allclose(cos, want[0], atol=1e-6) and torch.allclose(sin, want[1], atol=1e-6)
    assert vit.turns([image])[0][0][0] is cos  # made once
    assert not hasattr(vit, "pos_embed") and VisionTransformer(depth=1).turns([image]) is None


def test_official_files_round_the_periods():
    """The sixteen numbers in Meta's files."""
    assert rope_periods(64, "bfloat16").tolist() == [1.0, 1.3359375, 1.78125, 2.375, 3.15625, 4.21875, 5.625, 7.5, 10.0,
                                                     13.3125, 17.75, 23.75, 31.625, 42.25, 56.25, 75.0]
    assert rope_periods(64)[-1].item() == pytest.approx(74.98942, abs=1e-5)


# ---------------------------------------------------------------- DINOv3's sizes and files

@pytest.mark.parametrize("size, parameters", [  # of Meta's models, counted
    ("vit_small", 21_601_152), ("vit_small_plus", 28_697_472), ("vit_base", 85_669_632), ("vit_large", 303_154_176),
    ("vit_huge_plus", 840_633_600)])
def test_sizes_are_dinov3s(size, parameters):
    vit = VisionTransformer(num_register_tokens=4, **{**SIZES[size], **DINOV3, "depth": 1})
    whole, block = (sum(p.numel() for p in module.parameters()) for module in (vit, vit.blocks[0]))
    assert whole + (SIZES[size]["depth"] - 1) * block == parameters


def test_large_plus_has_dinov3s_swiglu():
    vit = VisionTransformer(**{**SIZES["vit_large_plus"], **DINOV3, "depth": 1})
    assert vit.blocks[0].mlp.w3.weight.shape == (1024, 4096) and vit.num_heads == 16


@pytest.mark.parametrize("size", SIZES)
def test_every_size_is_named_from_a_files_config(size, monkeypatch):
    vit = SimpleNamespace(patch_size=16, num_register_tokens=4)
    config = dict(mlp_ratio=4.0, ffn_layer="mlp") | SIZES[size] | DINOV3 | dict(init_values=1e-5)
    monkeypatch.setattr(pretrain, "grey_backbone", lambda *_: (vit, {"config": config}))
    args = pretrain.get_args(["--init", "any.pt"])
    pretrain.open_init(args)
    assert (args.arch, args.pos, args.patch_size) == (size, "rope", 16)


def official(depth=12, D=64):
    """A state dict with the 188 keys of Meta's ViT-B/16, narrower; its keys' bias is not 0 but masked."""
    def linear(name, rows, columns):
        return {f"{name}.weight": torch.randn(rows, columns) * 0.1, f"{name}.bias": torch.randn(rows)}

    state = {"cls_token": torch.randn(1, 1, D), "storage_tokens": torch.randn(1, 4, D), "mask_token": torch.zeros(1, D),
             "patch_embed.proj.weight": torch.randn(D, 3, 16, 16) * 0.1, "patch_embed.proj.bias": torch.randn(D),
             "rope_embed.periods": torch.tensor([100 ** (i / 16) for i in range(16)]).bfloat16()}
    for i in range(depth):
        block = {**linear("attn.qkv", 3 * D, D), "attn.qkv.bias_mask": torch.tensor([1.0, 0, 1]).repeat_interleave(D),
                 **linear("attn.proj", D, D), **linear("mlp.fc1", 4 * D, D), **linear("mlp.fc2", D, 4 * D)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            block[name] = torch.rand(D)
        state.update({f"blocks.{i}.{name}": value for name, value in block.items()})
    return {**state, "norm.weight": torch.rand(D), "norm.bias": torch.rand(D)}


def test_the_188_keys_load_strictly(tmp_path):
    state, path = official(), tmp_path / "dinov3.pth"
    assert len(state) == 188
    torch.save(state, path)
    vit, info = load_backbone(path)
    assert info["family"] == "DINOv3" and {**DINOV3, "depth": 12}.items() <= info["config"].items()
    assert torch.equal(vit.register_tokens, state["storage_tokens"])
    q, k, v = vit.blocks[11].attn.qkv.bias.chunk(3)
    assert torch.equal(q, state["blocks.11.attn.qkv.bias"][:64]) and not k.any() and v.all()
    for key in ("norm.bias", "blocks.7.mlp.fc2.bias", "blocks.0.ls2.gamma", "mask_token", "blocks.3.attn.qkv.weight"):
        with pytest.raises(ValueError, match=f"missing {key}"):
            torch.save({name: value for name, value in state.items() if name != key}, path), load_backbone(path)
    with pytest.raises(ValueError, match="left over blocks.3.attn.gate"):
        torch.save({**state, "blocks.3.attn.gate": torch.ones(1)}, path), load_backbone(path)


def test_key_bias_has_no_effect(tmp_path):
    """In a file, where it is masked, and in the network's own parameter."""
    state, x, found = official(depth=2), torch.randn(1, 3, 32, 48), []
    for bias in (0.0, 5.0):
        for i in range(2):
            state[f"blocks.{i}.attn.qkv.bias"][64:128] = bias
        torch.save(state, tmp_path / "dinov3.pth")
        vit, _ = load_backbone(tmp_path / "dinov3.pth")
        found.append(vit.forward_features(x)["x_prenorm"])
        for block in vit.blocks:
            block.attn.qkv.bias.data[64:128] = 7
        found.append(vit.forward_features(x)["x_prenorm"])
    assert all(torch.equal(one, found[0]) for one in found)
    vit.blocks[0].attn.qkv.bias.data[128:] += 1
    assert not torch.equal(vit.forward_features(x)["x_prenorm"], found[0])
