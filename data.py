"""Images in, batches out: reading image files, packs, labelled folders, and every augmentation.

The CPU only decodes files (once, in pack.py) and reads bytes; random draws are a few floats per crop, and the
pixels are cropped, jittered, blurred and normalised as batches on the training device.
"""

import csv
import fnmatch
import hashlib
import json
import math
import os
import re
from collections import namedtuple

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
PACK_VERSION = 1


# ---------------------------------------------------------------- image files

def load_grey(path):
    """Read one image file as uint8 grey (h, w); OSError or ValueError says why it cannot be read."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith(("I", "F")):  # 16-bit, 32-bit or float grey: scale by the file's own percentiles
            pixels = np.asarray(image, dtype=np.float64)
            if not np.isfinite(pixels).all():
                raise ValueError("image has non-finite pixels")
            low, high = np.percentile(pixels, (0.5, 99.5))
            return (np.clip((pixels - low) / max(high - low, 1e-9), 0, 1) * 255 + 0.5).astype(np.uint8)
        if image.mode in ("P", "PA", "LA", "RGBA"):  # transparency is shown on black, the background of B-mode
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        return np.asarray(image.convert("L"))


def content_hash(grey):
    """8-byte digest of size and grey pixels: equal for the same picture stored in another lossless file."""
    digest = hashlib.blake2b(str(grey.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(grey))
    return digest.digest()


def resize_square(grey, size):
    """uint8 (h, w) -> uint8 (size, size), antialiased bicubic; squashes the aspect."""
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------- lists of images

# paths: where to open; names: relative to the source, shown to the user; groups: one string per image, never split
# between train and test; labels: strings, or None for unlabelled sources; grouped_by: how groups were found, in words
ImageList = namedtuple("ImageList", "paths names groups labels grouped_by")


def list_images(source, exclude=(), group_regex=None, labelled=False):
    """Images of a recursive folder, a text list (a path per line) or a CSV (`image[,label][,group]`).

    A group is a patient, an examination or a clip: the CSV's `group` column, else the first capture of
    `group_regex` in the name, else the parent folder (for a labelled folder, the path below the class). When that
    leaves a single group, or for images directly in a class folder, each image is a group of its own.
    Raises ValueError with one sentence that says what is wrong and where.
    """
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or folder")
    if os.path.isdir(source):
        root, rows = source, _walk(source, labelled)
    else:
        root, rows = os.path.dirname(source), _read_list(source, labelled)
    rows = [row for row in rows if not any(fnmatch.fnmatch(row["image"], pattern) for pattern in exclude)]
    if not rows:
        raise ValueError(f"{source}: no images found ({', '.join(IMAGE_SUFFIXES)}"
                         + (f"; excluded: {' '.join(exclude)})" if exclude else ")"))
    names = [row["image"] for row in rows]
    if all(row.get("group") for row in rows):
        groups, grouped_by = [row["group"] for row in rows], "group column"
    elif group_regex:
        groups, grouped_by = _regex_groups(names, group_regex, source), f"--group_regex {group_regex}"
    else:
        groups, grouped_by = [os.path.dirname(name) for name in names], "parent folder"
        if labelled and os.path.isdir(source):  # what lies below the class: a patient can be in several classes
            groups = [os.sep.join(name.split(os.sep)[1:-1]) or name for name in names]
        elif labelled and len({*groups}) == len({*zip(groups, (row["label"] for row in rows))}) == len(
                {row["label"] for row in rows}):
            groups = names  # a folder per class: no folder is a patient
        if len(set(groups)) == 1 or set(groups) == set(names):
            groups, grouped_by = names, "image (each image is its own group)"
    labels = [row["label"] for row in rows] if labelled else None
    return ImageList([os.path.join(root, name) for name in names], names, groups, labels, grouped_by)


def _walk(folder, labelled):
    rows = []
    for parent, folders, files in os.walk(folder, followlinks=False):
        folders.sort()
        for file in sorted(files):
            name = os.path.relpath(os.path.join(parent, file), folder)
            if file.lower().endswith(IMAGE_SUFFIXES) and not file.startswith("."):
                if labelled and os.sep not in name:
                    raise ValueError(f"{os.path.join(folder, name)}: not in a class folder; expected "
                                     f"{folder}/CLASS/image, or a CSV with the columns image,label[,group]")
                rows.append({"image": name, "label": name.split(os.sep)[0]})
    return rows


def _read_list(path, labelled):
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.readline()
        file.seek(0)
        # UltraDINO's train_paths_2m.csv, too, is a path per line without a header
        if not path.lower().endswith(".csv") or ("," not in first and first.strip() != "image"):
            if labelled:
                raise ValueError(f"{path}: labels need a folder per class or a .csv with the columns image,label")
            return [{"image": line.rstrip("\r\n")} for line in file if line.strip()]
        reader = csv.DictReader(file)
        known, needed = {"image", "label", "group"}, {"image", "label"} if labelled else {"image"}
        columns = set(reader.fieldnames or ())
        if not needed <= columns or not columns <= known:
            raise ValueError(f"{path}: columns are {','.join(reader.fieldnames or ())}; expected "
                             + ("image,label[,group]" if labelled else "image[,group]"))
        rows = list(reader)
    for number, row in enumerate(rows, start=2):
        if any(not row.get(column) for column in columns) or None in row:
            raise ValueError(f"{path}, line {number}: expected {len(columns)} filled columns, got {list(row.values())}")
    return rows


def _regex_groups(names, pattern, source):
    try:
        pattern = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--group_regex {pattern!r}: {error}")
    groups = []
    for name in names:
        match = pattern.search(name)
        if not match or not match.groups() or not match.group(1):
            raise ValueError(f"{source}: --group_regex {pattern.pattern!r} "
                             f"{'has no (capture) in' if match else 'does not match'} {name!r}")
        groups.append(match.group(1))
    return groups


# ---------------------------------------------------------------- packs

class Pack:
    """A folder written by pack.py, read with numpy.memmap and csv alone.

    canvases.u8  uint8 (images, canvas, canvas), row-major, no header: each image squashed to a square
    index.csv    name,width,height,group,hash: original size, group number, content_hash in hex
    pack.json    version, images, canvas, mean and std of all pixels (of 1, not 255), groups, digest of the index, ...
    skipped.txt  what could not be read or was held out, and why
    """

    def __init__(self, folder):
        info_path = os.path.join(folder, "pack.json")
        try:
            with open(info_path) as file:
                self.info = json.load(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: not a readable pack ({error}); make one with: python pack.py SRC {folder}")
        if self.info.get("version") != PACK_VERSION:
            raise ValueError(f"{info_path}: pack version {self.info.get('version')}, this code reads version "
                             f"{PACK_VERSION}; pack again with: python pack.py SRC OUT")
        self.folder, self.mean, self.std = folder, self.info["mean"], self.info["std"]
        images, canvas = self.info["images"], self.info["canvas"]
        data_path = os.path.join(folder, "canvases.u8")
        if not os.path.exists(data_path) or os.path.getsize(data_path) != images * canvas * canvas:
            raise ValueError(f"{data_path}: missing or not the {images} canvases of {canvas}x{canvas} that pack.json "
                             f"names; pack again")
        self.canvases = np.memmap(data_path, np.uint8, "r", shape=(images, canvas, canvas))
        self.sizes = np.empty((images, 2), np.int32)  # width, height of the original image
        self.groups = np.empty(images, np.int64)
        hashes = bytearray()
        rows = -1
        with open(os.path.join(folder, "index.csv"), newline="", encoding="utf-8", errors="surrogateescape") as file:
            for rows, row in enumerate(csv.DictReader(file)):
                if rows < images:
                    self.sizes[rows] = int(row["width"]), int(row["height"])
                    self.groups[rows] = int(row["group"])
                    hashes += bytes.fromhex(row["hash"])
        if rows + 1 != images:
            raise ValueError(f"{folder}/index.csv: {rows + 1} rows, pack.json names {images}; pack again")
        self.hashes = np.frombuffer(bytes(hashes), np.uint8).reshape(images, 8)

    def __len__(self):
        return len(self.canvases)

    def __reduce__(self):  # a data worker that is not forked opens the pack again: pickle would copy all canvases
        return Pack, (self.folder,)

    def names(self, indices):
        """Names of a few images, read from disk: they can be patients' names and two million of them fill memory."""
        wanted = set(int(index) for index in indices)
        with open(os.path.join(self.folder, "index.csv"), newline="", encoding="utf-8",
                  errors="surrogateescape") as file:
            return [row["name"] for number, row in enumerate(csv.DictReader(file)) if number in wanted]


# ---------------------------------------------------------------- what is random: drawn on the CPU, a few floats a crop

def philox(seed, step, stream, index=0):
    """A generator that is a pure function of its arguments: no state is ever saved, and a resumed run draws the same."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, index, stream]))


ORDER, CROPS, MASKS = range(3)  # streams


def image_order(groups, seed, epoch):
    """Order of all images in an epoch, a function of (seed, epoch): each group's images are spread evenly over it.

    The j-th of a group's n images, in random order, sits near (j + u) / n of the epoch, u drawn once per group, so
    that neighbouring frames of a clip do not share a batch. Groups of one give a plain random permutation.
    """
    rng = philox(seed, epoch, ORDER)
    shuffled = rng.permutation(len(groups))
    _, member_of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    by_group = shuffled[np.argsort(member_of[shuffled], kind="stable")]  # groups one after the other, inside shuffled
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank_in_group = np.arange(len(groups)) - first
    offset = np.repeat(rng.random(len(counts)), counts)
    return by_group[np.argsort((rank_in_group + offset) / np.repeat(counts, counts), kind="stable")]


def draw_boxes(rng, sizes, n, scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's draw, n boxes per image of width, height `sizes` (B, 2) -> (B, n, 4): left, top, width, height.

    As torchvision: ten tries of a random area share and log-uniform aspect, else the largest centred box.
    """
    W, H = (sizes[:, i, None].astype(np.float64) for i in (0, 1))  # (B, 1)
    tries = rng.random((len(sizes), n, 10, 2))
    area = (W * H)[..., None] * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])  # (B, n, 10)
    aspect = np.exp(np.log(ratio[0]) + np.log(ratio[1] / ratio[0]) * tries[..., 1])
    w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= W[..., None]) & (h <= H[..., None])
    first = fits.argmax(-1)[..., None]  # first try that fits
    w, h = (np.take_along_axis(side, first, -1)[..., 0] for side in (w, h))  # (B, n)
    position = rng.random((len(sizes), n, 2))
    left, top = np.floor(position[..., 0] * (W - w + 1)), np.floor(position[..., 1] * (H - h + 1))
    none = ~fits.any(-1)
    largest_w, largest_h = np.minimum(W, np.round(H * ratio[1])), np.minimum(H, np.round(W / ratio[0]))
    w, h = np.where(none, largest_w, w), np.where(none, largest_h, h)
    left, top = np.where(none, (W - w) // 2, left), np.where(none, (H - h) // 2, top)
    return np.stack((left, top, w, h), axis=-1)


# UltraDINO's and DINOv2's colour jitter and blur (UltraDINO's code, augmentations.py)
FLIP_PROBABILITY, JITTER_PROBABILITY, BRIGHTNESS, CONTRAST = 0.5, 0.8, 0.4, 0.4
BLUR_SIGMA, SOLARIZE_PROBABILITY = (0.1, 2.0), 0.2
# The intended blur probabilities of global crop 1, global crop 2 and local crops. DINOv2 passes 1 - p to RandomApply,
# whose argument is the probability of applying, so its published models (and UltraDINO's) saw 0, 0.9 and 0.5.
BLUR_PROBABILITY = (1.0, 0.1, 0.5)
CROP_SLICE = 32  # images whose crops are made at once: what lies between the steps fits the cache of a large GPU


def draw_crops(rng, sizes, canvas, n, scale, blur_probability, solarize_probability):
    """Every random number of n crops per image: dict of float32 (B, n) arrays, `box` (B, n, 4) in canvas pixels."""
    def factor(amount):
        return np.where(jitter, 1 + amount * (2 * rng.random(shape) - 1), 1)

    shape = (len(sizes), n)
    stretch = canvas / np.tile(sizes, 2)[:, None]  # (B, 1, 4): from original to canvas pixels, per axis
    box = draw_boxes(rng, sizes, n, scale) * stretch
    flip = rng.random(shape) < FLIP_PROBABILITY
    jitter = rng.random(shape) < JITTER_PROBABILITY
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * rng.random(shape)
    draws = dict(box=box, flip=flip, brightness=factor(BRIGHTNESS), contrast=factor(CONTRAST),
                 contrast_first=rng.random(shape) < 0.5,
                 sigma=np.where(rng.random(shape) < blur_probability, sigma, 0),  # 0: no blur
                 solarize=rng.random(shape) < solarize_probability)
    return {key: value.astype(np.float32) for key, value in draws.items()}


def block_mask(rng, grid, target):
    """iBOT's block-wise mask: rectangles are added until about `target` patches are masked. bool (rows, columns)."""
    mask, count = np.zeros(grid, bool), 0
    while count < target:
        remaining = min(target - count, mask.size // 2)
        for _ in range(10):
            area = rng.uniform(min(4, remaining), max(4, remaining))
            aspect = np.exp(rng.uniform(np.log(0.3), -np.log(0.3)))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h < grid[0] and w < grid[1]:
                top, left = rng.integers(grid[0] - h + 1), rng.integers(grid[1] - w + 1)
                block = mask[top:top + h, left:left + w]
                added = block.size - block.sum()
                if 0 < added <= remaining:
                    block[:] = True
                    count += added
                    break
        else:
            return mask  # nothing fitted in ten tries
    return mask


def deal_strata(rng, images, masked):
    """Which stratum of mask ratios each crop of a batch gets: int (2, images), -1 for no mask; row 0 is first crops.

    Images have equal shares of the `masked` crops, the first or second crop by a coin. Neighbours get strata that
    mirror each other, a light and a heavy mask: so every stretch of images has nearly the same number of masked patches.
    """
    light = rng.permutation(masked // 2)
    strata = np.append(np.stack((light, masked - 1 - light), axis=1).ravel(), [masked // 2] * (masked % 2))
    image = np.arange(masked) * images // max(masked, 1)
    again = np.append(False, image[1:] == image[:-1])[:masked]  # with more masks than images some have both crops masked
    dealt = np.full((2, images), -1)
    dealt[((rng.random(images) < 0.5)[image] ^ again).astype(int), image] = strata
    return dealt


def mask_bound(images, batch, patches, probability, ratio):
    """An upper bound of the masked patches of `images` neighbours in a batch, whatever is drawn."""
    masked = int(2 * batch * probability)
    share = -(-images * masked // batch)  # masked crops of these images: pairs, and at the ends halves of torn ones
    torn = share % 2 if images == batch or images * masked % (2 * batch) == 0 else 2
    pair = ratio[0] + ratio[1] + (ratio[1] - ratio[0]) / max(masked, 1)
    return int(min(np.ceil(patches * (share // 2 * pair + torn * ratio[1])), 2 * images * patches)) if masked else 0


def draw_masks(seed, step, batch, images, grid, probability, ratio):
    """Masks of both global crops of some images (numbers in the batch): bool (2 * images, P), crop-major.

    A share `probability` of the batch's crops is masked; their target ratios are stratified over the range `ratio`,
    one stratum each (DINOv2's collate). Every crop has its own stream.
    """
    masked = int(2 * batch * probability)
    edges = np.linspace(*ratio, masked + 1)
    dealt = deal_strata(philox(seed, step, MASKS, 0), batch, masked)  # (2, batch)
    masks = np.zeros((2, len(images), *grid), bool)
    for crop in (0, 1):
        for row, image in enumerate(images):
            stratum = dealt[crop, image]
            if stratum >= 0:
                rng = philox(seed, step, MASKS, 1 + crop * batch + int(image))
                share = rng.uniform(edges[stratum], edges[stratum + 1])
                masks[crop, row] = block_mask(rng, grid, int(grid[0] * grid[1] * share))
    return masks.reshape(2 * len(images), -1)


class PretrainBatches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of the global batch of that step, as a list of micro-batches (dicts).

    Each: canvases uint8 (b, S, S), draws of 2 global and L local crops, masks bool (2b, P) crop-major (all first
    crops, then all second ones), mask_indices (M,) into the flattened masks, mask_weight (M,) = 1 / masked patches of
    that crop, groups (b,). M is mask_bound, the same at every step: padding has index 0 and weight 0. A pure function of (pack, seed, step): 1 process of 16 images, 2 of 8 and 4 micro-batches
    of 4 see the same crops of the same images.
    """

    def __init__(self, pack, args, rank=0, world_size=1):
        self.pack, self.args, self.rank = pack, args, rank
        self.batch = args.batch_size_per_gpu * args.accum_iter * world_size  # images of a step over all ranks
        self.orders = {}

    def indices(self, step):
        """Numbers of the images of the whole global batch of a step: (batch,)."""
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs = positions // len(self.pack)
        for epoch in np.unique(epochs):
            if epoch not in self.orders:  # a step can span epochs; the old ones are forgotten
                self.orders = {old: order for old, order in self.orders.items() if old in epochs}
                self.orders[epoch] = image_order(self.pack.groups, self.args.seed, int(epoch))
        return np.array([self.orders[epoch][position % len(self.pack)] for epoch, position in zip(epochs, positions)])

    def __getitem__(self, step):
        args, canvas = self.args, self.pack.canvases.shape[1]
        indices = self.indices(step)
        sizes = self.pack.sizes[indices]
        rng = philox(args.seed, step, CROPS)
        blur = [1 - p if args.blur_compat else p for p in BLUR_PROBABILITY]
        global_draws = draw_crops(rng, sizes, canvas, 2, args.global_crops_scale, blur[:2], (0, SOLARIZE_PROBABILITY))
        local_draws = draw_crops(rng, sizes, canvas, args.local_crops_number, args.local_crops_scale, blur[2], 0)
        size = args.batch_size_per_gpu
        first = self.rank * args.accum_iter * size
        return [self._micro(step, indices, global_draws, local_draws, slice(start, start + size))
                for start in range(first, first + args.accum_iter * size, size)]

    def _micro(self, step, indices, global_draws, local_draws, share):
        args, images = self.args, np.arange(self.batch)[share]
        side = args.global_crops_size // args.patch_size
        masks = draw_masks(args.seed, step, self.batch, images, (side, side), args.mask_sample_probability,
                           args.mask_ratio_min_max)  # (2b, P)
        bound = mask_bound(len(images), self.batch, side * side, args.mask_sample_probability, args.mask_ratio_min_max)
        mask_indices, mask_weight = np.zeros(bound, np.int64), np.zeros(bound, np.float32)
        count = masks.sum()
        mask_indices[:count] = masks.reshape(-1).nonzero()[0]
        mask_weight[:count] = (masks / masks.sum(1, keepdims=True).clip(1))[masks]
        micro = dict(canvases=self.pack.canvases[indices[share]], masks=masks, mask_indices=mask_indices,
                     mask_weight=mask_weight, groups=self.pack.groups[indices[share]])
        micro.update({f"global_{key}": value[share] for key, value in global_draws.items()})
        micro.update({f"local_{key}": value[share] for key, value in local_draws.items()})
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in micro.items()}


# ---------------------------------------------------------------- what is computed: on the device, as matrix products

def band_matrix(weights, columns, width):
    """Matrices (n, rows, width), zero but for weights (n, rows, taps) at columns; weights that share one are added.

    Few taps are not zero: computing them and spreading them out moves a tenth of what computing all columns would.
    """
    matrix = weights.new_zeros(*weights.shape[:2], width)
    return matrix.scatter_add_(2, columns.expand_as(weights), weights)


def resize_weights(start, length, out_size, in_size, flip=None):
    """Weights (n, out, in) of antialiased bicubic resizing of [start, start + length) of an axis to `out` pixels.

    start, length (n,) in pixels, fractions allowed; where flip (n,) is not 0 the output runs backwards. Pillow's rule (a = -0.5, support 2 output pixels when shrinking);
    pixels whose centre is outside the box get no weight and the rest is renormalised, as after a crop.
    """
    outputs = torch.arange(out_size, device=start.device) + 0.5  # (out,)
    if flip is not None:
        outputs = torch.where(flip[:, None] > 0, out_size - outputs, outputs)  # (n, out)
    step = (length / out_size)[:, None]  # (n, 1) input pixels per output pixel
    centre = start[:, None] + outputs * step  # (n, out)
    taps = torch.arange(math.ceil(4 * max(1, in_size / out_size)) + 1, device=start.device)  # as many as step can reach
    columns = (centre - 2 * step.clamp(min=1)).floor()[..., None] + taps  # (n, out, taps)
    d = ((columns + 0.5 - centre[..., None]) / step.clamp(min=1)[..., None]).abs()
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
    # a box thinner than a pixel (very long frames) still holds the pixel at its middle
    middle, reach = (start + length / 2)[:, None, None], length.clamp(min=1)[:, None, None] / 2
    inside = ((columns + 0.5 - middle).abs() <= reach) & (columns >= 0) & (columns < in_size)
    weights = weights * inside
    weights = weights / weights.sum(-1, keepdim=True)
    return band_matrix(weights, columns.long().clamp(0, in_size - 1), in_size)


def blur_weights(sigma, size):
    """Matrices (n, size, size) of a 9-tap Gaussian blur with reflected borders; sigma (n,), 0 gives the identity."""
    taps = torch.arange(-4, 5, device=sigma.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)  # (n, 9)
    weights = weights / weights.sum(-1, keepdim=True)
    columns = (torch.arange(size, device=sigma.device)[:, None] + taps).abs()  # (size, 9), mirrored at 0 ...
    columns = (size - 1 - (size - 1 - columns).abs()).clamp(min=0)  # ... and at the other end
    return band_matrix(weights[:, None].expand(-1, size, -1), columns, size)


def adjust_contrast(x, factor):
    mean = x.mean((-2, -1), keepdim=True)
    return (mean + factor * (x - mean)).clamp(0, 255)


def make_crops(canvases, draws, size, mean, std):
    """Crop, flip, jitter, blur, solarize and normalise: uint8 (B, S, S) -> float32 (n * B, 1, size, size), crop-major.

    `draws` is draw_crops' dict as tensors on the canvases' device; grey levels are floats in 0..255 throughout.
    """
    slices = [slice(first, first + CROP_SLICE) for first in range(0, len(canvases), CROP_SLICE)]
    crops = [_crop_slice(canvases[some], {key: value[some] for key, value in draws.items()}, size) for some in slices]
    crops = (torch.cat(crops) / 255 - mean) / std  # (B, n, 1, size, size)
    return crops.transpose(0, 1).flatten(0, 1)


def _crop_slice(canvases, draws, size):
    B, n = draws["flip"].shape
    S = canvases.shape[-1]
    left, top, width, height = draws["box"].flatten(0, 1).unbind(-1)  # each (B * n,)
    flip, brightness, contrast, first, sigma, solarize = (
        draws[key].flatten()[:, None, None]
        for key in ("flip", "brightness", "contrast", "contrast_first", "sigma", "solarize"))  # each (B * n, 1, 1)
    # the flip is vertical: UltraDINO's, it has no horizontal one
    rows = resize_weights(top, height, size, S, flip[:, 0, 0])  # (B * n, size, S)
    columns = resize_weights(left, width, size, S)
    x = rows.view(B, n * size, S) @ canvases.float()  # (B, n * size, S): one product serves all crops of an image
    x = x.view(B * n, size, S) @ columns.transpose(1, 2)  # (B * n, size, size)
    x = x.clamp(0, 255)
    x = adjust_contrast(x, torch.where(first > 0, contrast, 1.0))
    x = (x * brightness).clamp(0, 255)
    x = adjust_contrast(x, torch.where(first > 0, 1.0, contrast))
    blur = blur_weights(sigma[:, 0, 0], size)
    x = blur @ x @ blur.transpose(1, 2)
    x = torch.where((solarize > 0) & (x >= 128), 255 - x, x)
    return x.view(B, n, 1, size, size)


def to_device(batch, device, args, mean, std):
    """A step's micro-batches on the device, with their crops made there."""
    micros = []
    for micro in batch:
        micro = {key: value.to(device, non_blocking=True) for key, value in micro.items()}
        canvases = micro.pop("canvases")
        for kind, size in (("global", args.global_crops_size), ("local", args.local_crops_size)):
            draws = {key[len(kind) + 1:]: micro.pop(key) for key in list(micro) if key.startswith(f"{kind}_")}
            micro[f"{kind}_crops"] = make_crops(canvases, draws, size, mean, std)  # (n * b, 1, size, size)
        micros.append(micro)
    return micros
