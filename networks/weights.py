"""Weights from files into a VisionTransformer: ours and those of families.py. Strictly, or with a sentence why not.

A grey image goes into an RGB network through one folded channel: `grey_backbone`.
"""

import argparse
import hashlib
import json
import math
import os

import numpy as np
import torch
from torch import nn

from model import VisionTransformer, position_matrix
from networks.families import JOIN, TimmBackbone, backbone_tensors, check_config, convert, refuse
from runtime import cpu_copy, load_checkpoint

ULTRADINO_MEAN_STD = (0.1842924807, 0.2187705424)  # of FUS13M, what UltraDINO's files were trained with (its code)
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SNAPSHOT_FILES = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder, config.json beside them


def load_strict(model, state, what):
    """Load `state` into `model`; only `pos_embed` may have another size and is interpolated. Returns the model.

    Raises ValueError with the first tensors that are missing, left over or of another shape, and their number.
    """
    own, state = model.state_dict(), dict(state)
    if "pos_embed" in state and "pos_embed" in own and state["pos_embed"].shape != own["pos_embed"].shape:
        state["pos_embed"] = resize_positions(state["pos_embed"], model)
    problems = [f"missing {key}" for key in own if key not in state]
    problems += [f"left over {key}" for key in state if key not in own]
    problems += [f"{key} is {tuple(state[key].shape)}, the model has {tuple(own[key].shape)}"
                 for key in own if key in state and own[key].shape != state[key].shape]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise ValueError(f"{what} does not fit this model: " + "; ".join(problems[:6]) + more)
    model.load_state_dict(state)
    return model


def resize_positions(positions, model):
    """pos_embed (1, 1 + a^2, C) -> the model's (1, 1 + b^2, C), as `positions` would at an image of b x b patches."""
    old, new = math.isqrt(positions.shape[1] - 1), math.isqrt(model.pos_embed.shape[1] - 1)
    if positions.shape[2] != model.embed_dim or old * old + 1 != positions.shape[1]:
        return positions  # the caller reports the shapes
    matrix = position_matrix(old, (new, new), model.interpolate_offset, model.interpolate_antialias)
    return torch.cat((positions[:, :1], (matrix.to(positions) @ positions[0, 1:])[None]), dim=1)


def load_backbone(path):
    """Read a file of any family, a Hugging Face folder or timm:NAME: (backbone in eval mode, info).

    info: `config` (the constructor's keywords), `mean`, `std` (of pixels in 0..1, one value per channel if several),
    `img_size`, `seen` (digests of the images it was trained on, as leakage.overlap takes them), `step`, `args` (or
    None), `family` (for tables) and `digest` (sha256 of the weights' file; of the tensors of timm).
    """
    path = os.fspath(path)
    if path.startswith("timm:"):
        return timm_backbone(path[len("timm:"):])
    file = weight_file(path)
    checkpoint = read_tensors(file)
    if checkpoint.get("network_of", {}).get("experts", 1) > 1:
        raise ValueError(f"{path}: a run of finetune_multi.py, whose blocks have experts: only predict.py takes it; "
                         f"start from the backbone that it started from")
    state = backbone_tensors(checkpoint, path)
    mean_std, ours = None, checkpoint.get("config")
    if ours:
        family, config = "pretrain.py", ours
    else:
        family, state, config = convert(state, path)
        if os.path.basename(file) in SNAPSHOT_FILES and "Hugging Face" in family:
            mean_std = read_snapshot(os.path.dirname(file), config, path)
    try:
        model = load_strict(VisionTransformer(**config), state, path).eval()
    except TypeError as error:
        raise ValueError(f"{path}: its config is not of this vision transformer ({error})")
    except ValueError as error:
        raise error if ours else ValueError(f"{error}; {JOIN}")
    mean, std = mean_std or (ULTRADINO_MEAN_STD if config["in_chans"] == 1 else IMAGENET_MEAN_STD)
    return model, {"config": config, "mean": checkpoint.get("mean", mean), "std": checkpoint.get("std", std),
                   "img_size": config["img_size"], "seen": checkpoint.get("seen"), "step": checkpoint.get("step"),
                   "args": checkpoint.get("args"), "family": family, "digest": file_digest(file)}


def timm_backbone(name):
    model, digest = TimmBackbone(name).eval(), hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    facts = model.model.pretrained_cfg
    config = {"timm": name, "in_chans": model.in_chans, "embed_dim": model.embed_dim}
    return model, {"config": config, "mean": tuple(facts["mean"]), "std": tuple(facts["std"]),
                   "img_size": facts["input_size"][1], "seen": None, "step": None, "args": None,
                   "family": "timm", "digest": digest.hexdigest()}


# ---------------------------------------------------------------- files

def weight_file(path):
    """The file itself, or the one with the weights in a Hugging Face folder."""
    if not os.path.isdir(path):
        return path
    names = os.listdir(path)
    for name in SNAPSHOT_FILES:
        if name in names:
            return os.path.join(path, name)
    if any(name.endswith(".index.json") for name in names):
        raise ValueError(f"{path}: its weights are in several files; write one: save_pretrained(FOLDER, "
                         "max_shard_size='100GB')")
    raise ValueError(f"{path}: a folder without {' or '.join(SNAPSHOT_FILES)}; name a file")


def read_tensors(file):
    if not file.endswith(".safetensors"):
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's and iBOT's checkpoints hold their args
            return load_checkpoint(file)
    if not os.path.exists(file):
        raise FileNotFoundError(f"{file}: no such file")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{file}: needs the package safetensors; install it with: pip install safetensors")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged, or not a safetensors file ({error})")


def read_snapshot(folder, config, path):
    """Hold config.json beside the weights against `config`; mean and std of preprocessor_config.json, or None."""
    found = []
    for name in ("config.json", "preprocessor_config.json"):
        file, content = os.path.join(folder, name), {}
        if os.path.exists(file):
            try:
                with open(file, encoding="utf-8") as opened:
                    content = json.load(opened)
            except ValueError as error:
                raise ValueError(f"{file}: not a JSON file ({error})")
        found.append(content)
    check_config(found[0], config, path)
    mean, std = found[1].get("image_mean"), found[1].get("image_std")
    if mean is None or std is None:
        return None
    if not len(mean) == len(std) == config["in_chans"]:
        refuse(path, f"preprocessor_config.json has {len(mean)} means for {config['in_chans']} channels")
    return tuple(mean), tuple(std)


def file_digest(file):
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---------------------------------------------------------------- grey images

def grey_backbone(path, mean=None, std=None):
    """load_backbone for grey images through one channel: info's mean and std are numbers, by default of all channels.

    Features of (g - mean) / std equal those of grey repeated over the channels with the file's own statistics m, s:
    channel c would get (g - m_c) / s_c = x * std / s_c + (mean - m_c) / s_c, which the patch projection takes over.
    """
    model, info = load_backbone(path)
    m, s = (torch.tensor(info[key], dtype=torch.float64).view(-1) for key in ("mean", "std"))
    mean, std = (float(own.mean() if value is None else value) for own, value in ((m, mean), (s, std)))
    if not std > 0:
        raise ValueError(f"{path}: std of grey images must be above 0, got {std}")
    scale, shift = std / s, (mean - m) / s  # (in_chans,)
    if isinstance(model, TimmBackbone):
        model.fold_grey(scale.float(), shift.float())
    elif model.in_chans > 1 or (scale - 1).abs().max() > 0 or shift.abs().max() > 0:
        projection = model.patch_embed.proj
        weight = projection.weight.detach().double()  # (C, in_chans, p, p)
        bias = projection.bias.detach() + (weight.sum((2, 3)) * shift).sum(1)  # (C,)
        weight = (weight * scale.view(-1, 1, 1)).sum(1, keepdim=True)  # (C, 1, p, p)
        projection.weight, projection.bias = nn.Parameter(weight.float()), nn.Parameter(bias.float())
        projection.in_channels = model.in_chans = 1
    return model, {**info, "config": {**info["config"], "in_chans": 1}, "mean": mean, "std": std}


# ---------------------------------------------------------------- what a network has been trained on

def trained_weights(network, info, images, rows):
    """What the file of a finished run holds for whoever starts from it or predicts with it: tensors and plain values.

    network has a backbone, whose info is given; it was trained on `rows` of `images` (store.Images).
    """
    seen = {kind: torch.from_numpy(getattr(images, kind)[rows]) for kind in ("content", "looks")}
    if info["digest"] is not None:  # what a file does not tell of its images cannot be told of these weights
        seen = info["seen"] and merge_seen(seen, info["seen"])
    state = cpu_copy(network.state_dict())
    return {"teacher": {key: value for key, value in state.items() if key.startswith("backbone.")},
            "head": {key: value for key, value in state.items() if not key.startswith("backbone.")},
            "config": info["config"], "mean": info["mean"], "std": info["std"], "seen": seen}


def merge_seen(seen, before):
    """Digests of images, as leakage.overlap takes them, with those of an earlier training (None: nothing is known of
    it), in tensors, as checkpoints keep them.

    Groups compare under one salt only: where both name some under two, the earlier images count by pixels and look.
    """
    seen, before = dict(seen), before or {}
    kinds = {"content", "looks"} & before.keys()
    if "salt" in before and seen.setdefault("salt", before["salt"]) == before["salt"]:
        kinds.add("group_digests")
    for kind in kinds:
        rows = [np.asarray(part[kind]).view(np.uint64) for part in (seen, before) if kind in part]
        seen[kind] = np.unique(np.concatenate(rows), axis=0)
    return {kind: torch.from_numpy(own) if isinstance(own, np.ndarray) else own for kind, own in seen.items()}
