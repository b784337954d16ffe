"""Batches of a pack for pretraining: what is drawn at random, and every augmentation.

The CPU only reads bytes and draws a few floats per crop; the pixels are cropped, jittered, blurred and normalised as
batches on the training device.
"""

import itertools
import math
import mmap

import numpy as np
import torch
import torch.nn.functional as F

from frames.packed import CROPS, MASKS, BatchRows, image_order, philox


# ---------------------------------------------------------------- what is random: drawn on the CPU, a few floats a crop

def draw_boxes(rng, sizes, n, scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's draw, n boxes per image: `sizes` (B, 2), width, height -> (B, n, 4) left, top, width, height.

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
TISSUE_GREY, TISSUE_SHARE = 10, 0.02  # a patch shows tissue if its 98th percentile of grey levels is above 10
MASK_TRIES = 32  # rectangles: a mask of 14 x 14 patches takes 8, rarely 20; of 37 x 37 one in a thousand takes more
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


def block_masks(tries, grid, targets):
    """iBOT's block-wise masks: rectangles are added to each until about targets (n,) patches are masked.

    tries (n, MASK_TRIES, 4): uniform numbers, for area, aspect, top and left of each rectangle that is tried, in all
    masks at once; one that has found no room for ten in a row is left as it is. bool (n, rows, columns).
    """
    row, column = np.arange(grid[0])[:, None], np.arange(grid[1])
    masks, count, failed = np.zeros((len(tries), *grid), bool), np.zeros(len(tries), int), np.zeros(len(tries), int)
    for number in range(MASK_TRIES):
        live = np.flatnonzero((count < targets) & (failed < 10))
        area, aspect, top, left = tries[live, number].T
        remaining = np.minimum(targets[live] - count[live], row.size * column.size // 2)
        area, aspect = np.minimum(4, remaining) + abs(4 - remaining) * area, 0.3 ** (1 - 2 * aspect)
        h, w = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        top, left = np.floor(top * (row.size - h + 1)), np.floor(left * (column.size - w + 1))
        smaller = (h < row.size) & (w < column.size)
        h, w, top, left = (side[:, None, None] for side in (h, w, top, left))
        added = (row >= top) & (row < top + h) & (column >= left) & (column < left + w) & ~masks[live]
        size = added.sum((1, 2))
        fits = smaller & (0 < size) & (size <= remaining)
        masks[live[fits]] |= added[fits]
        count[live] += fits * size
        failed[live] = np.where(fits, 0, failed[live] + 1)
    return masks


def deal_strata(rng, images, masked):
    """Which stratum of mask ratios each crop of a batch gets: int (2, images), -1 for no mask; row 0 is first crops.

    Images have equal shares of the `masked` crops, the first or second crop by a coin. Neighbours get strata that
    mirror each other, a light and a heavy mask: so every stretch of images has nearly as many masked patches.
    """
    light = rng.permutation(masked // 2)
    strata = np.append(np.stack((light, masked - 1 - light), axis=1).ravel(), [masked // 2] * (masked % 2))
    image = np.arange(masked) * images // max(masked, 1)
    again = np.append(False, image[1:] == image[:-1])[:masked]  # more masks than images: some have both crops masked
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
    one stratum each (DINOv2's collate). A stratum's numbers are drawn whoever asks; only what is asked for is built.
    """
    masked, rng = int(2 * batch * probability), philox(seed, step, MASKS)
    dealt = deal_strata(rng, batch, masked)[:, images]  # (2, b)
    shares = ratio[0] + (ratio[1] - ratio[0]) * (np.arange(masked) + rng.random(masked)) / max(masked, 1)
    tries, strata = rng.random((masked, MASK_TRIES, 4)), dealt[dealt >= 0]
    masks = np.zeros((2, len(images), *grid), bool)
    masks[dealt >= 0] = block_masks(tries[strata], grid, (grid[0] * grid[1] * shares[strata]).astype(int))
    return masks.reshape(2 * len(images), -1)


# ---------------------------------------------------------------- batches

PREFETCH = 2  # steps that a worker has ready


def read_canvases(canvases, indices, out=None):
    """Copies of some canvases, of a file or in memory: uint8 (n, S, S), in `out` if it is given.

    The disk is asked for all of them first: left to itself the kernel waits for one after the other, and reads much
    around each that nobody will ask for soon.
    """
    if isinstance(canvases, np.memmap):
        size = canvases[0].nbytes
        for start in (indices * size).tolist():
            within = start % mmap.PAGESIZE  # advice begins on a page
            canvases.base.madvise(mmap.MADV_WILLNEED, start - within, size + within)
    return np.take(canvases, indices, axis=0, out=out, mode="clip")  # mode "raise" would make a copy of its own


def in_one_storage(arrays):
    """Dict of arrays -> of tensors in one storage: a worker then sends one block of shared memory, not one for each."""
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].itemsize))  # so that each is aligned
    whole = torch.from_numpy(np.concatenate([np.frombuffer(array.tobytes(), np.uint8) for array in arrays.values()]))
    parts = whole.split([array.nbytes for array in arrays.values()])
    return {key: part.view(torch.from_numpy(array).dtype).view(array.shape)
            for part, (key, array) in zip(parts, arrays.items())}


class PretrainBatches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of the global batch of that step, as a list of micro-batches (dicts).

    Each: canvases uint8 (b, S, S), draws of 2 global and L local crops, masks bool (2b, P) crop-major (all first
    crops, then all second ones), mask_indices (M,) into the flattened masks, mask_weight (M,) = 1 / masked patches of
    that crop, groups (b,). M is mask_bound, the same at every step: padding has index 0 and weight 0. A pure function
    of (pack, seed, step): 1 process of 16 images, 2 of 8 and 4 micro-batches of 4 see the same crops of the same ones.
    """

    def __init__(self, pack, args, rank=0, world_size=1):
        self.pack, self.args, self.rank = pack, args, rank
        self.batch = args.batch_size_per_gpu * args.accum_iter * world_size  # images of a step over all ranks
        self.orders, self.blocks = {}, None

    def loader(self, steps, num_workers, **how):
        """Iterator over the items of a range of steps; how: more arguments of DataLoader.

        Canvases that a worker read are overwritten after the next item but one is asked for: copy what you keep.
        """
        self.indices(steps[0])  # the workers, forked from here, share the pack's index and this epoch's order
        fork = num_workers and "fork" in torch.multiprocessing.get_all_start_methods()
        return iter(torch.utils.data.DataLoader(self, batch_size=None, sampler=steps, num_workers=num_workers,
                                                prefetch_factor=PREFETCH if num_workers else None,
                                                multiprocessing_context="fork" if fork else None, **how))

    def indices(self, step):
        """Numbers of the images of the whole global batch of a step: (batch,)."""
        epochs, places = np.divmod(np.arange(step * self.batch, (step + 1) * self.batch), len(self.pack))
        present = np.unique(epochs).tolist()  # a step can span epochs; old ones are forgotten
        self.orders = {epoch: self.orders[epoch] if epoch in self.orders else
                       image_order(self.pack.groups, self.args.seed, epoch) for epoch in present}
        return np.concatenate([self.orders[epoch][places[epochs == epoch]] for epoch in present])

    def __getitem__(self, step):
        args, S, size = self.args, self.pack.canvases.shape[1], self.args.batch_size_per_gpu
        images = np.arange(args.accum_iter * size) + self.rank * args.accum_iter * size  # this rank's, in the batch
        indices = self.indices(step)[images]
        rng, sizes = BatchRows(philox(args.seed, step, CROPS), self.batch, images), self.pack.sizes[indices]
        blur = [1 - p if args.blur_compat else p for p in BLUR_PROBABILITY]
        global_draws = draw_crops(rng, sizes, S, 2, args.global_crops_scale, blur[:2], (0, SOLARIZE_PROBABILITY))
        local_draws = draw_crops(rng, sizes, S, args.local_crops_number, args.local_crops_scale, blur[2], 0)
        canvases, micros = self._canvases(indices), []
        for first in range(0, len(images), size):
            own = slice(first, first + size)
            draws = [{key: value[own] for key, value in draws.items()} for draws in (global_draws, local_draws)]
            micros.append({"canvases": canvases[own], **self._micro(step, indices[own], *draws, images[own])})
        return micros

    def _canvases(self, indices):
        """A worker reads them into memory that it shares with the main process, a few blocks in turn: touching fresh
        memory costs several times what copying canvases into it does."""
        if torch.utils.data.get_worker_info() is None:
            return torch.from_numpy(read_canvases(self.pack.canvases, indices))
        if self.blocks is None:  # PREFETCH steps wait, one is in use, and one more
            shape = len(indices), *self.pack.canvases.shape[1:]
            self.blocks = itertools.cycle(torch.empty(shape, dtype=torch.uint8).share_memory_()
                                          for _ in range(PREFETCH + 2))
        block = next(self.blocks)
        read_canvases(self.pack.canvases, indices, block.numpy())
        return block

    def _micro(self, step, indices, global_draws, local_draws, images):
        """One dict but for the canvases: of the images `indices` of the pack, which are `images` of the batch."""
        args, side = self.args, self.args.global_crops_size // self.args.patch_size
        masks = draw_masks(args.seed, step, self.batch, images, (side, side), args.mask_sample_probability,
                           args.mask_ratio_min_max)  # (2b, P)
        bound = mask_bound(len(images), self.batch, side * side, args.mask_sample_probability, args.mask_ratio_min_max)
        mask_indices, mask_weight = np.zeros(bound, np.int64), np.zeros(bound, np.float32)
        count = masks.sum()
        mask_indices[:count] = masks.reshape(-1).nonzero()[0]
        mask_weight[:count] = (masks / masks.sum(1, keepdims=True).clip(1))[masks]
        micro = dict(masks=masks, mask_indices=mask_indices, mask_weight=mask_weight, groups=self.pack.groups[indices])
        micro.update({f"global_{key}": value for key, value in global_draws.items()})
        micro.update({f"local_{key}": value for key, value in local_draws.items()})
        return in_one_storage(micro)


# ---------------------------------------------------------------- what is computed: on the device, as matrix products

def band_matrix(weights, columns, width):
    """Matrices (n, rows, width), zero but for weights (n, rows, taps) at columns; weights that share one are added.

    Few taps are not zero: computing them and spreading them out moves a tenth of what computing all columns would.
    """
    matrix = weights.new_zeros(*weights.shape[:2], width)
    return matrix.scatter_add_(2, columns.expand_as(weights), weights)


def resize_weights(start, length, out_size, in_size, flip=None):
    """Weights (n, out, in) of antialiased bicubic resizing of [start, start + length) of an axis to `out` pixels.

    start, length (n,) in pixels, fractions allowed; where flip (n,) is not 0 the output runs backwards. Pillow's rule
    (a = -0.5, support 2 output pixels when shrinking);
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


def make_crops(canvases, draws, size, mean, std, flip="vertical"):
    """Crop, flip, jitter, blur, solarize and normalise: uint8 (B, S, S) -> float32 (n * B, 1, size, size), crop-major.

    `draws` is draw_crops' dict as tensors on the canvases' device; grey levels are floats in 0..255 throughout.
    flip: "vertical", "horizontal" or "none", what becomes of crops that are drawn to be flipped.
    """
    crops = [jitter(cut_crops(*some, size, flip), some[1]) for some in _slices(canvases, draws)]
    crops = (torch.cat(crops) / 255 - mean) / std  # (B, n, size, size)
    return crops.transpose(0, 1).flatten(0, 1)[:, None]


def tissue_patches(canvases, draws, size, flip, patch_size):
    """Which patches of the crops show tissue: bool (n * B, P), crop-major.

    More than TISSUE_SHARE of their pixels are brighter than TISSUE_GREY, before the jitter: contrast lifts black.
    """
    bright = [(cut_crops(*some, size, flip) > TISSUE_GREY).float() for some in _slices(canvases, draws)]
    tissue = F.avg_pool2d(torch.cat(bright), patch_size) > TISSUE_SHARE  # (B, n, size / patch_size, the same)
    return tissue.flatten(2).transpose(0, 1).flatten(0, 1)


def weigh_tissue(micro, tissue):
    """(mask_weight (M,), share of masked patches that show tissue ()), for tissue (2b, P) of the global crops.

    A masked patch weighs 1 / those with tissue in its crop, and nothing without tissue.
    """
    counted = micro["masks"] & tissue
    weight = counted / counted.sum(1, keepdim=True).clamp(min=1)
    padding = micro["mask_weight"] == 0  # it has the index of the first patch, which may well be masked
    weight = weight.flatten()[micro["mask_indices"]].masked_fill(padding, 0)
    return weight, counted.sum() / micro["masks"].sum().clamp(min=1)


def _slices(canvases, draws):
    """(canvases, draws) of CROP_SLICE images at a time."""
    slices = [slice(first, first + CROP_SLICE) for first in range(0, len(canvases), CROP_SLICE)]
    return [(canvases[some], {key: value[some] for key, value in draws.items()}) for some in slices]


def cut_crops(canvases, draws, size, flip):
    """The crops as they lie in the image, flipped: float32 (B, n, size, size) of 0..255."""
    B, n = draws["flip"].shape
    S = canvases.shape[-1]
    left, top, width, height = draws["box"].flatten(0, 1).unbind(-1)  # each (B * n,)
    flips = draws["flip"].flatten()
    rows = resize_weights(top, height, size, S, flips if flip == "vertical" else None)  # (B * n, size, S)
    columns = resize_weights(left, width, size, S, flips if flip == "horizontal" else None)
    x = rows.view(B, n * size, S) @ canvases.float()  # (B, n * size, S): one product serves all crops of an image
    x = x.view(B * n, size, S) @ columns.transpose(1, 2)  # (B * n, size, size)
    return x.clamp(0, 255).view(B, n, size, size)


def jitter(x, draws):
    """Brightness and contrast in the order drawn, blur, solarize: crops (B, n, size, size) of 0..255 -> the same."""
    B, n, size, _ = x.shape
    brightness, contrast, first, sigma, solarize = (
        draws[key].flatten()[:, None, None]
        for key in ("brightness", "contrast", "contrast_first", "sigma", "solarize"))  # each (B * n, 1, 1)
    x = x.flatten(0, 1)
    x = adjust_contrast(x, torch.where(first > 0, contrast, 1.0))
    x = (x * brightness).clamp(0, 255)
    x = adjust_contrast(x, torch.where(first > 0, 1.0, contrast))
    blur = blur_weights(sigma[:, 0, 0], size)
    x = blur @ x @ blur.transpose(1, 2)
    x = torch.where((solarize > 0) & (x >= 128), 255 - x, x)
    return x.view(B, n, size, size)


def to_device(batch, device, args, mean, std):
    """A step's micro-batches on the device, with their crops made there; with --mask_tissue weigh_tissue's, too."""
    micros = []
    for micro in batch:
        micro = {key: value.to(device, non_blocking=True) for key, value in micro.items()}
        canvases = micro.pop("canvases")
        for kind, size in (("global", args.global_crops_size), ("local", args.local_crops_size)):
            draws = {key[len(kind) + 1:]: micro.pop(key) for key in list(micro) if key.startswith(f"{kind}_")}
            micro[f"{kind}_crops"] = make_crops(canvases, draws, size, mean, std, args.flip)  # (n * b, 1, size, size)
            if kind == "global" and args.mask_tissue:
                tissue = tissue_patches(canvases, draws, size, args.flip, args.patch_size)
                micro["mask_weight"], micro["tissue"] = weigh_tissue(micro, tissue)
        micros.append(micro)
    return micros
