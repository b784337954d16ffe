"""What frozen backbones say of labelled images: reading the images once, features, and their cache.

Features of an image are float32 (L + 1, C): the class token after each of the last L = min(4, depth) blocks, normalised
by the final norm, and last the mean of the last block's patch tokens. Every frozen protocol is made of these: k-NN
takes the last class token, DINOv2's linear grid 1 or L class tokens with or without the mean patch, few-shot the last
class token and the mean patch.
"""

import concurrent.futures
import hashlib
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from augment import normalise_only
from fan import background, find_fan
from images import load_frame, resize_square
from leakage import WORDS, content_hash, perceptual_hash

BLOCKS = 4  # DINOv2's linear evaluation looks at the last one or the last four
VERSION = 1  # of what features are: cached ones of another version are not read


# ---------------------------------------------------------------- images

def read_image(path):
    try:
        return load_frame(path)
    except Exception as error:  # whatever a decoder raises: a labelled set must be whole
        raise ValueError(f"{path}: cannot be read ({error}); repair it, or leave it out with --exclude") from error


class Images:
    """n images of a labelled set as square canvases. `load(i)` -> images.Frame; show(i, grey): what becomes of the grey
    image before it is squared.

    Files are read when a size is first asked for. After that: content uint64 (n,) and looks (n, WORDS), leakage.py's
    hashes of all that the screen showed.
    """

    def __init__(self, n, load, show=None):
        self.n, self.load, self.show, self.squares = n, load, show, {}
        self.content, self.looks = np.empty(n, np.uint64), np.empty((n, WORDS), np.uint64)

    def read(self, sizes):
        """Read all files once for several sizes: {size: uint8 (n, size, size)}, and forget other sizes."""
        squares = {size: self.squares.get(size) for size in sizes}
        missing = {size: np.empty((self.n, size, size), np.uint8) for size, known in squares.items() if known is None}

        def read(i):
            frame = self.load(i)
            self.content[i], self.looks[i] = content_hash(frame.whole), perceptual_hash(frame.whole)
            grey = frame.grey if self.show is None else self.show(i, frame.grey)
            for size, canvas in missing.items():
                canvas[i] = resize_square(grey, size)

        if missing:
            with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # decoding leaves Python's lock
                list(tqdm(pool.map(read, range(self.n)), total=self.n, desc="images", disable=not sys.stderr.isatty(),
                          leave=False))
        self.squares = {**squares, **missing}
        return self.squares

    def at(self, size):
        return self.read([size])[size]


def outside_fans(load, groups):
    """A function (i, grey) -> what grey shows outside the ultrasound fan, the fan filled with the background's level,
    and whether image i has such an outside at all, bool (n,). groups (n,)

    A clip's fan stands still, and its brightest pixels show more of it than a still: images of one group and size share
    the fan of their maximum.
    """
    members, fans, partly = {}, {}, np.empty(len(groups), bool)
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)

    def read(group):  # a group at a time bounds the memory
        brightest, shapes = {}, []
        for i in members[group]:
            grey = load(i).grey
            shapes.append(grey.shape)
            brightest[grey.shape] = np.maximum(brightest.get(grey.shape, grey), grey)
        found = {shape: find_fan(grey) for shape, grey in brightest.items()}
        fans.update({(group, shape): np.packbits(fan) for shape, fan in found.items()})
        partly[members[group]] = [not found[shape].all() for shape in shapes]

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        list(tqdm(pool.map(read, members), total=len(members), desc="fans", disable=not sys.stderr.isatty(),
                  leave=False))

    def outside(i, grey):
        fan, level = np.unpackbits(fans[groups[i], grey.shape], count=grey.size).reshape(grey.shape), background(grey)
        return np.where(fan, np.uint8(0 if level is None else level), grey)

    return outside, partly


# ---------------------------------------------------------------- features

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
