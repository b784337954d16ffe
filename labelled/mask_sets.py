"""A segmentation set as a run sees it: its parts, masks squashed as the images are, few-shot draws."""

import collections
import concurrent.futures
import hashlib
import sys

import numpy as np
from PIL import Image
from tqdm import tqdm

from frames import phantom
from frames.images import Frame
from frames.packed import SHOTS, philox
from labelled.mask_codes import mask_name
from labelled.masks import MaskedSet, classes_present, read_mask, read_masked, read_masked_image, split_masked
from labelled.store import Images

PHANTOM_SEED, PHANTOM_IMAGES, PHANTOM_SIZE = 3_000_000, 600, 64  # none of the other stages' phantoms
SHOT_DRAWS = 1000  # of a few-shot set, at most, until it holds every class

# of n images: names, groups; indices of the parts; images: store.Images; masks: uint8 (n, S, S), squashed likewise;
# truth(i), grey(i): at the image's own size; mm: (n, 2), or None where not all are known; measured: (n,) mm, or None
Data = collections.namedtuple("Data", "names classes groups grouped_by train val test images masks truth grey mm "
                                      "measured layout")


# ---------------------------------------------------------------- images, masks, parts

def open_data(args):
    """The set, split by groups, with masks squashed to --img_size, and what was noticed, in sentences."""
    if args.data is None:
        canvases, drawn, groups = phantom.phantom_masks(PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED)
        n = len(canvases)
        found = MaskedSet(paths=None, names=[f"phantom {i}" for i in range(n)], masks=None,
                          groups=list(map(str, groups)), splits=None, classes=list(phantom.STRUCTURES), values=None,
                          mm=np.full((n, 2), np.nan), circumference=None, grouped_by="phantom patient",
                          layout="phantoms")
        frame, truth = (lambda i: Frame(canvases[i], canvases[i])), (lambda i: drawn[i])
        present = np.stack([(drawn == k).any((1, 2)) for k in range(len(found.classes))], 1)
    else:
        found = read_masked(args.data, args.masks, args.mask_pattern, args.classes, args.exclude, args.group_regex,
                            args.split, args.pixel_sizes)
        frame, truth = (lambda i: read_masked_image(found, i)), (lambda i: read_mask(found, i))
        present = classes_present(found)
    splits, notes = split_masked(found, present, args.test_seed, args.val_fraction, args.test_fraction)
    parts = [np.flatnonzero(np.array(splits) == part) for part in ("train", "val", "test")]
    for part, own in zip(("validation", "test"), parts[1:]):
        if not present[own, 1:].any():
            raise ValueError(f"no {part} image shows anything but background: give other parts by --split, or another "
                             f"--test_seed")
    owners = {}
    for name in found.names:  # their masks are written
        if owners.setdefault(mask_name(name), name) != name:
            raise ValueError(f"{owners[mask_name(name)]} and {name} differ in suffix only: their masks would be one "
                             f"file; rename one")
    unknown = np.isnan(found.mm[parts[2]]).any(1)
    if unknown.any() and not unknown.all():
        notes = [*notes, f"{unknown.sum():,} of {len(unknown):,} test images have no pixel size: distances are in "
                         f"pixels"]
    mm = None if unknown.any() else found.mm
    heads = mm is not None and len(found.classes) == 2  # the one structure is what was measured
    data = Data(found.names, list(found.classes), np.array(found.groups), found.grouped_by, *parts,
                Images(len(found.names), frame), squash(truth, len(found.names), args.img_size), truth,
                lambda i: frame(i).grey, mm, found.circumference if heads else None, found.layout)
    return data, notes, present


def squash(truth, n, size):
    """Masks at their images' sizes -> uint8 (n, size, size), the nearest pixel of each."""
    masks = np.empty((n, size, size), np.uint8)

    def read(i):
        masks[i] = Image.fromarray(truth(i)).resize((size, size), Image.Resampling.NEAREST)

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # decoding leaves Python's lock
        list(tqdm(pool.map(read, range(n)), total=n, desc="masks", disable=not sys.stderr.isatty(), leave=False))
    return masks


def draw_shots(data, present, shots, by, seed):
    """(indices of the train images that --shots leaves, a sentence on classes that they lack or None).

    Drawn anew until every class of the train set is there; if that never happens, the draw that lacks fewest.
    """
    rng, keys = philox(seed, shots, SHOTS), np.arange(len(data.train)) if by == "image" else data.groups[data.train]
    units = np.unique(keys)
    if shots > len(units):
        raise ValueError(f"--shots {shots}: there are {len(units)} train {by}s")
    wanted, best = present[data.train].any(0), None
    for _ in range(SHOT_DRAWS):
        own = np.isin(keys, rng.permutation(units)[:shots])
        lacks = wanted & ~present[data.train[own]].any(0)
        if best is None or lacks.sum() < best[1].sum():
            best = own, lacks
        if not lacks.any():
            break
    own, lacks = best
    missing = [data.classes[k] for k in np.flatnonzero(lacks)]
    return data.train[own], f"--split_seed {seed}: no image shows {', '.join(missing)}" if missing else None


def class_shares(data):
    """(K,): share of the train pixels that each class has."""
    counts = sum(np.bincount(data.masks[i].ravel(), minlength=len(data.classes)) for i in data.train)
    return counts / counts.sum()


def digest_of(data, canvases):
    """Of all that a run sees of the data: images, masks, parts."""
    digest = hashlib.sha256(canvases)
    digest.update(data.masks)
    for array in (np.unique(data.groups, return_inverse=True)[1], data.train, data.val, data.test):
        digest.update(np.ascontiguousarray(array, np.int64))
    return digest.hexdigest()
