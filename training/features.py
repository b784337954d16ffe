"""What frozen backbones say of labelled images: features, and their cache.

Features of an image are float32 (L + 1, C): the class token after each of the last L = min(4, depth) blocks, normalised
by the final norm, and last the mean of the last block's patch tokens. Every frozen protocol is made of these: k-NN
takes the last class token, DINOv2's linear grid 1 or L class tokens with or without the mean patch, few-shot the last
class token and the mean patch.
"""

import hashlib
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from frames.leakage import content_hash
from labelled.augment import normalise_only

BLOCKS = 4  # DINOv2's linear evaluation looks at the last one or the last four
VERSION = 1  # of what features are: cached ones of another version are not read


@torch.no_grad()
def embed(backbone, x):
    """Images (B, 1, h, w) -> features float32 (B, L + 1, C)."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        layers = backbone.get_intermediate_layers(x, max(1, min(BLOCKS, len(backbone.blocks))), return_class_token=True)
    tokens = [cls for _, cls in layers] + [layers[-1][0].float().mean(1)]  # the last: (B, C) over patches
    return torch.stack(tokens, dim=1).float()


def extract(backbone, canvases, mean, std, batch_size, device):
    """uint8 (n, S, S) -> features float32 (n, L + 1, C) on the CPU."""
    rows = []
    starts = range(0, len(canvases), batch_size)
    for start in tqdm(starts, desc="features", disable=not sys.stderr.isatty(), leave=False):
        part = torch.from_numpy(canvases[start:start + batch_size]).to(device)
        rows.append(embed(backbone, normalise_only(part, mean, std)).cpu())
    return torch.cat(rows)


def cached_features(backbone, info, canvases, batch_size, device, folder):
    """`extract`, but what was computed before is read: float32 (n, L + 1, C).

    folder: of the cache, or None. A file per checkpoint (its digest, and how it is built and fed), image size and
    precision; a row per image, found by the digest of its canvas. Without a digest (a random network) nothing is kept.
    """
    if folder is None or info.get("digest") is None:
        return finite(extract(backbone, canvases, info["mean"], info["std"], batch_size, device), info)
    precision = "bf16" if device.type == "cuda" else "fp32"
    own = hashlib.sha256(repr([info.get(key) for key in ("digest", "config", "mean", "std")]).encode()).hexdigest()[:16]
    path = os.path.join(folder, f"{own}-{canvases.shape[1]}-{precision}-v{VERSION}.npz")
    known, digests = read_cache(path), [content_hash(canvas) for canvas in canvases]
    missing = {digest: i for i, digest in enumerate(digests) if digest not in known}  # of equal images one
    if missing:
        new = extract(backbone, canvases[list(missing.values())], info["mean"], info["std"], batch_size, device)
        known.update(zip(missing, finite(new, info).numpy()))
        write_cache(path, known)
    return torch.from_numpy(np.stack([known[digest] for digest in digests]))


def finite(features, info):
    if not features.isfinite().all():
        raise ValueError(f"{info['path']}: features are not finite, its pretraining diverged; take an earlier "
                         f"checkpoint")
    return features


def read_cache(path):
    """{digest of a canvas: features (L + 1, C)}; empty where there is no such file, or a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(zip(file["digests"].tolist(), file["features"]))
    except Exception:  # a damaged archive raises one of a dozen kinds
        return {}


def write_cache(path, known):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        np.savez(file, digests=np.array(list(known), np.uint64), features=np.stack(list(known.values())))
    os.replace(temporary, path)


def few_shot_vector(features):
    """Features (n, L + 1, C) -> (n, 2C): the last class token and the mean patch; foreign ones (n, 1, d) -> (n, d)."""
    return features[:, -2:].flatten(1)
