"""Agreement with numbers computed by facebookresearch/dinov3 (6876159) on seeded random weights, to 1e-5 per tensor.

A plain DINOv3 forward around kernels.attention with rotary positions, both image sizes packed into one matrix.
"""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels
from kernel_tools import close, needs_kernels, rope_table

PREFIX = 5  # the class token and four storage tokens have no place


def part(tensors, prefix):
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def norm(x, z, name):
    return F.layer_norm(x, x.shape[-1:], z[f"{name}.weight"], z[f"{name}.bias"], eps=1e-5)


def linear(x, z, name):
    return F.linear(x, z[f"{name}.weight"].flatten(1), z[f"{name}.bias"])


def ffn(x, z):
    if "mlp.w1.weight" in z:
        return linear(F.silu(linear(x, z, "mlp.w1")) * linear(x, z, "mlp.w2"), z, "mlp.w3")
    return linear(F.gelu(linear(x, z, "mlp.fc1")), z, "mlp.fc2")


def forward(z, images):
    """Normalised tokens (B, N, C) of every size."""
    tokens, rope = [], []
    for x in images:
        patches = linear(F.unfold(x, 16, stride=16).mT, z, "patch_embed.proj")                 # (B, P, C)
        prefix = torch.cat([z["cls_token"], z["storage_tokens"]], 1).expand(len(x), -1, -1)
        tokens.append(torch.cat([prefix, patches], 1))                                         # (B, N, C)
        table = rope_table(x.shape[2] // 16, x.shape[3] // 16, PREFIX, D=64)
        rope.append(tuple(t.to(x.device) for t in table))
    shapes = [x.shape[:2] for x in tokens]
    x = torch.cat([x.flatten(0, 1) for x in tokens])                                           # (T, C)
    for block in (part(z, "blocks.0."), part(z, "blocks.1.")):
        # DINOv3 keeps a bias of the keys and a mask that removes it.
        qkv = F.linear(norm(x, block, "norm1"), block["attn.qkv.weight"],
                       block["attn.qkv.bias"] * block["attn.qkv.bias_mask"])                   # (T, 3C)
        y = kernels.attention(qkv, shapes, 1, rope)                                            # (T, C)
        x = x + block["ls1.gamma"] * linear(y, block, "attn.proj")
        x = x + block["ls2.gamma"] * ffn(norm(x, block, "norm2"), block)
    features = norm(x, z, "norm").split([B * N for B, N in shapes])
    return [y.view(B, N, -1) for y, (B, N) in zip(features, shapes)]


@pytest.mark.parametrize("ops", ["references", pytest.param("kernels", marks=needs_kernels)])
@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_vit(ffn, ops, device):
    kernels.use_reference(ops == "references")
    assert ("references" in kernels.mode(device)) == (ops == "references")
    with np.load(Path(__file__).parent / "golden" / "vit_dinov3.npz") as file:
        z = part({key: torch.from_numpy(file[key]).to(device) for key in file.files}, f"{ffn}/")
    sizes = "64", "48x96"
    for size, x in zip(sizes, forward(part(z, "state/"), [z[f"x{size}"] for size in sizes])):
        close(f"cls at {size}", x[:, 0], z[f"cls{size}"], 1e-5)
        close(f"storage tokens at {size}", x[:, 1:PREFIX], z[f"storage{size}"], 1e-5)
        close(f"patches at {size}", x[:, PREFIX:], z[f"patch{size}"], 1e-5)
