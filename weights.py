"""Weights from files into a VisionTransformer: ours, DINOv2's and UltraDINO's. Strictly, or with a sentence why not."""

import math
import re

import torch

from model import VisionTransformer, position_matrix
from runtime import load_checkpoint

ULTRADINO_MEAN_STD = (0.1842924807, 0.2187705424)  # of FUS13M, what UltraDINO's files were trained with (its code)
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_strict(model, state, what):
    """Load `state` into `model`; only `pos_embed` may have another size and is interpolated. Returns the model.

    Raises ValueError naming every tensor that is missing, left over or of another shape.
    """
    own, state = model.state_dict(), dict(state)
    if "pos_embed" in state and "pos_embed" in own and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = resize_positions(state["pos_embed"], own["pos_embed"])
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"left over {key}" for key in state if key not in own]
    problems += [f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
                 for key in own if key in state and own[key].shape != state[key].shape]
    if problems:
        raise ValueError(f"{what} does not fit this model: " + "; ".join(problems))
    model.load_state_dict(state)
    return model


def resize_positions(positions, like):
    """pos_embed (1, 1 + a^2, C) -> (1, 1 + b^2, C)."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(like.shape[1] - 1)
    if positions.shape[2] != like.shape[2] or old * old + 1 != positions.shape[1]:
        return positions  # the caller reports the shapes
    patches = position_matrix(old, (new, new)).to(positions) @ positions[0, 1:]
    return torch.cat((positions[:, :1], patches[None]), dim=1)


def load_backbone(path):
    """Read last.pt, a DINOv2 file or an UltraDINO teacher file: (VisionTransformer in eval mode, info).

    info: `config` (the constructor's keywords), `mean`, `std` (of pixels in 0..1, one value per channel if several),
    `img_size`, `seen` (digests of the images it was trained on, as leakage.overlap takes them), `step`, `args` (or None).
    """
    checkpoint = load_checkpoint(path)
    state = backbone_state(checkpoint, path)
    config = checkpoint.get("config") or infer_config(state, path)
    try:
        model = VisionTransformer(**config)
    except TypeError as error:
        raise ValueError(f"{path}: its config is not of this vision transformer ({error})")
    load_strict(model, state, path).eval()
    foreign = ULTRADINO_MEAN_STD if config["in_chans"] == 1 else IMAGENET_MEAN_STD
    return model, {"config": config, "mean": checkpoint.get("mean", foreign[0]), "std": checkpoint.get("std", foreign[1]),
                   "img_size": config["img_size"], "seen": checkpoint.get("seen"),
                   "step": checkpoint.get("step"), "args": checkpoint.get("args")}


def backbone_state(checkpoint, path):
    """The teacher's backbone tensors, without their prefix, from any layout that we, DINOv2 and UltraDINO write."""
    if isinstance(checkpoint.get("teacher"), dict):  # {"teacher": {"backbone.*", "dino_head.*"}}
        state = {key: value for key, value in checkpoint["teacher"].items() if key.startswith("backbone.")}
    elif isinstance(checkpoint.get("model"), dict):  # {"model": {"teacher.backbone.*", "student.*", ...}}
        state = {key[len("teacher."):]: value for key, value in checkpoint["model"].items()
                 if key.startswith("teacher.backbone.")}
    else:  # DINOv2's released backbones: the tensors themselves
        state = checkpoint
    state = {key[len("backbone."):] if key.startswith("backbone.") else key: value for key, value in state.items()}
    # files saved with block_chunks > 0 say blocks.CHUNK.i; i counts through all chunks
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", key): value for key, value in state.items()}
    if "cls_token" not in state:
        raise ValueError(f"{path}: no DINOv2 backbone in this file (looked for teacher.backbone.*, model and cls_token; "
                         f"it has {', '.join(sorted(map(str, checkpoint))[:5])})")
    return state


def infer_config(state, path):
    """Constructor keywords from tensor shapes, for files that do not store them. Every DINOv2 size has 64 a head."""
    try:
        embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        swiglu = "blocks.0.mlp.w12.weight" in state
        hub = in_chans == 3 and registers > 0  # DINOv2's files with registers use exact sizes and antialiasing
        return dict(
            img_size=math.isqrt(state["pos_embed"].shape[1] - 1) * patch_size, patch_size=patch_size,
            in_chans=in_chans, embed_dim=embed_dim, num_heads=embed_dim // 64, num_register_tokens=registers,
            depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
            mlp_ratio=4.0 if swiglu else state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
            ffn_layer="swiglufused" if swiglu else "mlp", init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
            interpolate_offset=0.0 if hub else 0.1, interpolate_antialias=hub)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a DINOv2 vision transformer (looked for {error})")
