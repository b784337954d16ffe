"""Fine-tuning's augmentations: light, noise and geometry of one image, with its mask or alone, mixup and cutmix of two.

UltraDINO's (classification/ and segmentation/ in its code; it calls albumentations and timm). As in data.py the CPU
draws a few floats per image, for the whole batch of all ranks, and the device makes the pixels, a batch at a time:

    own = BatchRows(philox(seed, step, AUGMENT), batch, images)  # images: this rank's numbers in the batch
    x = augment(canvases, draw_augment(own, len(images)), mean, std)  # the draws as tensors on the canvases' device
    mixing = draw_mix(philox(seed, step, MIX), size, mixup_alpha, cutmix_alpha)  # the same on all ranks
    x, targets = mix(x, soft_targets(labels, classes, smoothing), mixing)

An image with a mask is also moved as a whole, by draw_affine(own, len(images)) as draws["affine"]:

    x, masks = augment_pair(canvases, masks, draws, mean, std)

Points and boxes follow, as shares of the sides, by the same draws before they become tensors. A box needs upright=True,
which neither rotates nor shears; where left and right matter, draw_augment(own, len(images), flip=0):

    shown = move_points(points / [width, height], draws, *canvases.shape[1:])  # (b, k, 2) in pixels of the file's image
    shown = move_boxes(boxes / [width, height, width, height], draws, *canvases.shape[1:])  # (b, 4)

Grey levels are floats in 0..255 throughout, where albumentations rounds after each step. It augments the file's pixels
and then resizes; here the canvas has its final size before, so that no resizing smooths the noise.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

BRIGHTNESS, CONTRAST = 0.3, 0.3  # RandomBrightnessContrast's limits: brightness is a share of 255 that is added
GAMMA = (0.8, 1.2)
NOISE_VARIANCE = (10, 50)  # of grey levels
GRID_CELLS, GRID_LIMIT = 5, 0.3  # cells of an axis, and how much longer or shorter one becomes
SCALE, ROTATION, SHEAR, SHIFT = (0.8, 1.2), 30, 15, 0.2  # Affine's limits: degrees; the shift is a share of the side
SLICE = 32  # images augmented at once: what lies between the steps fits the cache of a large GPU


# ---------------------------------------------------------------- what is random: drawn on the CPU

def draw_augment(rng, batch, light=0.5, gamma=0.5, noise=0.5, distortion=0.5, flip=0.5):
    """Every random number of `batch` images; each keyword is the probability of one augmentation, 0 is never.

    rng: a numpy generator, or packed.BatchRows around one. The same numbers are drawn whatever the probabilities.
    Dict of arrays that begin with (batch,), float32 but for noise_seed (int64). An augmentation that an image does not
    get has the values that change nothing.
    """
    def uniform(low, high):
        return low + (high - low) * rng.random((batch,))

    def happens(probability):
        return rng.random((batch,)) < probability

    lit = happens(light)
    draws = dict(contrast=np.where(lit, 1 + uniform(-CONTRAST, CONTRAST), 1),
                 brightness=np.where(lit, 255 * uniform(-BRIGHTNESS, BRIGHTNESS), 0),  # grey levels
                 gamma=np.where(happens(gamma), uniform(*GAMMA), 1),
                 noise=np.where(happens(noise), np.sqrt(uniform(*NOISE_VARIANCE)), 0))  # standard deviation
    # Each cell of an axis is scaled on its own. albumentations lets the last one run over the border, or end before it,
    # and mirrors what is missing; here lengths are normalised, so that the borders stay and no tissue is seen twice.
    lengths = 1 + GRID_LIMIT * (2 * rng.random((batch, 2, GRID_CELLS)) - 1)
    edges = np.cumsum(lengths, axis=-1) / lengths.sum(axis=-1, keepdims=True)  # (batch, 2, cells): 1 at the far border
    shifts = np.insert(edges - np.arange(1, GRID_CELLS + 1) / GRID_CELLS, 0, 0, axis=-1)
    shifts[..., -1] = 0  # but for rounding it was
    draws["grid"] = np.where(happens(distortion)[:, None, None], shifts, 0)  # (batch, 2, cells + 1): rows, columns
    draws["flip"] = happens(flip)
    draws = {key: value.astype(np.float32) for key, value in draws.items()}
    draws["noise_seed"] = (rng.random((batch,)) * 2**53).astype(np.int64)
    return draws


def draw_affine(rng, batch, probability=0.5, upright=False):
    """How images are rotated, scaled, sheared and shifted, as albumentations' Affine: float32 (batch, 2, 3), [A | t].

    Pixel p = (row, column) of the result shows the place c + A (p - c - t * sides) of the image, c being its centre: A
    acts on pixels, so that rotating an image that is not square does not shear it, and t is a share of each side. It is
    [I | 0] where nothing happens. rng as above; the same numbers are drawn whatever the probability and upright, which
    leaves rotation and shear out, so that what lies along the axes still does.
    UltraDINO's code shifts each such image by exactly 0.2 of both sides; here the shift is uniform in -0.2 .. 0.2.
    """
    def uniform(low, high, *shape):
        return low + (high - low) * rng.random((batch, *shape))

    happens, scale = rng.random((batch,)) < probability, uniform(*SCALE)
    angle, shear = np.deg2rad(uniform(-ROTATION, ROTATION)), np.tan(np.deg2rad(uniform(-SHEAR, SHEAR, 2)))
    if upright:
        angle, shear = 0 * angle, 0 * shear
    shift, ones = uniform(-SHIFT, SHIFT, 2), np.ones_like(angle)
    rotated = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])  # (2, 2, batch)
    sheared = np.array([[ones, shear[:, 0]], [shear[:, 1], ones]])
    forward = np.einsum("ijb,jkb->bik", scale * sheared, rotated)  # rotated first, as there
    affine = np.concatenate((np.linalg.inv(forward), shift[:, :, None]), axis=2)
    return np.where(happens[:, None, None], affine, np.eye(2, 3)).astype(np.float32)


def draw_mix(rng, size, mixup_alpha, cutmix_alpha, prob=1.0):
    """How the images of a whole batch are mixed, as timm's "batch" mode: dict(share, box).

    share: of an image's own label, the rest being its partner's. box: None for mixup; for cutmix the top, left, bottom,
    right pixel of what the partner gives to images size x size. By a coin one or the other; an alpha of 0 is never.
    """
    if min(mixup_alpha, cutmix_alpha) < 0 or not 0 <= prob <= 1:
        raise ValueError(f"mixup_alpha {mixup_alpha} and cutmix_alpha {cutmix_alpha} must be 0 (never) or more, "
                         f"prob {prob} from 0 to 1")
    mixes, cuts = rng.random() < prob, rng.random() < 0.5
    if not mixes or mixup_alpha == cutmix_alpha == 0:
        return dict(share=1.0, box=None)
    if mixup_alpha == 0 or (cuts and cutmix_alpha > 0):
        share = rng.beta(cutmix_alpha, cutmix_alpha)
        half = int(size * math.sqrt(1 - share)) // 2
        y, x = (int(size * rng.random()) for _ in range(2))
        box = tuple(min(max(edge, 0), size) for edge in (y - half, x - half, y + half, x + half))
        return dict(share=1 - (box[2] - box[0]) * (box[3] - box[1]) / size**2, box=box)  # what is left after clipping
    return dict(share=float(rng.beta(mixup_alpha, mixup_alpha)), box=None)


# ---------------------------------------------------------------- what is computed: on the device

def augment(images, draws, mean, std):
    """uint8 (B, h, w) and draw_augment's dict, as tensors on their device -> float32 (B, 1, h, w), normalised.

    Light first, then geometry, as UltraDINO; mean and std are of 1, not 255.
    """
    parts = [slice(first, first + SLICE) for first in range(0, len(images), SLICE)]
    drawn = [{key: value[part] for key, value in draws.items()} for part in parts]
    return normalise_only(torch.cat([warp(relight(images[part].float(), own), own)
                                     for part, own in zip(parts, drawn)]), mean, std)


def augment_pair(images, masks, draws, mean, std):
    """Images with their masks: both uint8 (B, h, w) -> float32 (B, 1, h, w), normalised, and masks uint8 (B, h, w).

    draws: draw_augment's dict and draw_affine's "affine". Geometry first, in one interpolation, then light and noise,
    so that nothing smooths the noise. What comes from outside the image is black before the light, its mask is 0.
    """
    if images.shape != masks.shape:
        raise ValueError(f"images of shape {tuple(images.shape)} have masks of shape {tuple(masks.shape)}: "
                         "resize each mask as its image")
    pairs = []
    for first in range(0, len(images), SLICE):
        part = slice(first, first + SLICE)
        own = {key: value[part] for key, value in draws.items()}
        moved, moved_masks = warp_pair(images[part], masks[part], own)
        pairs.append((relight(moved, own), moved_masks))
    images, masks = (torch.cat(parts) for parts in zip(*pairs))
    return normalise_only(images, mean, std), masks


def normalise_only(images, mean, std):
    """What evaluation does, with the statistics of training: 0..255 (B, h, w) -> float32 (B, 1, h, w)."""
    return ((images / 255 - mean) / std)[:, None]


def relight(x, draws):
    """Contrast and brightness, gamma, noise, clamped after each: float (B, h, w) of 0..255 -> the same."""
    contrast, brightness, gamma, noise = (draws[key][:, None, None]
                                          for key in ("contrast", "brightness", "gamma", "noise"))  # (B, 1, 1)
    x = (x * contrast + brightness).clamp(0, 255)
    x = (255 * (x / 255) ** gamma).clamp(0, 255)
    normals = hashed_normals(draws["noise_seed"], x[0].numel()).view_as(x)
    return (x + noise * normals).clamp(0, 255)


def hashed_normals(seeds, count):
    """Standard normals (n, count) from seeds int64 (n,) below 2**53, an image each: a pure function of (seed, place).

    A hash of the place in integers, equal on every device, then Box-Muller: of two uniform numbers two normals.
    """
    half = -(-count // 2)
    bits = _scramble(torch.arange(1, 2 * half + 1, device=seeds.device))  # (2 * half,)
    # scattered before a seed joins: places that differ by what seeds differ by would give two images the same numbers
    bits = _scramble(bits ^ seeds[:, None] & 0xFFFFFFFF)  # (n, 2 * half)
    bits = _scramble(bits ^ seeds[:, None] >> 32)
    first, second = ((bits + 0.5) / 2**32).split(half, dim=1)  # (n, half), float32 in 0..1
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :count]


def _scramble(bits):
    """A 32-bit hash of integers 0 .. 2**32 - 1 in int64 (C. Wellons' lowbias32); bijective, every bit moves the others.

    The second factor is 0x846CA68B less 2**32, so that no product overflows: the low 32 bits are the same.
    """
    bits = (bits ^ bits >> 16) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ bits >> 15) * -0x7B935975 & 0xFFFFFFFF
    return bits ^ bits >> 16


# ---- geometry: rows and columns are moved each on their own, so an axis needs one position per pixel

def warp(images, draws):
    """Grid distortion and horizontal flip by bilinear interpolation: float (B, h, w) -> the same."""
    rows, columns = source_positions(draws, *images.shape[1:])
    return _interpolate(_interpolate(images, rows, 1), columns, 2)


def source_positions(draws, height, width):
    """Where each row and each column of the result comes from: (B, height), (B, width), in pixels of the input."""
    columns = _shifted(draws["grid"][:, 1], width)
    return _shifted(draws["grid"][:, 0], height), torch.where(draws["flip"][:, None] > 0, columns.flip(1), columns)


def _shifted(shifts, size):
    """Pixels of an axis, moved: between the borders of cells the shift (B, cells + 1), a share of size, is linear."""
    pixel = torch.arange(size, device=shifts.device)
    place = (pixel + 0.5) * (GRID_CELLS / size)  # in cells
    cell = place.long()
    shift = shifts[:, cell].lerp(shifts[:, cell + 1], place - cell)  # (B, size)
    return (pixel + size * shift).clamp(0, size - 1)


def _interpolate(x, positions, dim):
    """Linear interpolation of x (B, h, w) along dim at positions (B, new length), in pixels: exact at whole ones."""
    below = positions.floor()
    index, weight = below.long().unsqueeze(3 - dim), (positions - below).unsqueeze(3 - dim)
    above = (index + 1).clamp(max=x.shape[dim] - 1)
    return x.take_along_dim(index, dim).lerp(x.take_along_dim(above, dim), weight)


# ---- an affine map mixes rows and columns: two positions per pixel, and four neighbours of each

def warp_pair(images, masks, draws):
    """Affine, then grid distortion and flip: uint8 (B, h, w) twice -> float32 (B, h, w), masks as they came.

    Images by bilinear interpolation, masks by the nearest pixel (no new number appears); 0 all around both.
    """
    rows, columns = affine_positions(draws, *images.shape[1:])
    nearest = _pixel_number(rows.round(), columns.round(), masks.shape[2])
    masks = _framed(masks).gather(1, nearest.flatten(1)).view(masks.shape)
    top, left = rows.floor(), columns.floor()
    corner, framed = _pixel_number(top, left, images.shape[2]).flatten(1), _framed(images.float())
    line = images.shape[2] + 3
    a, b, c, d = (framed[:, offset:].gather(1, corner).view(images.shape) for offset in (0, 1, line, line + 1))
    return a.lerp(b, columns - left).lerp(c.lerp(d, columns - left), rows - top), masks


def affine_positions(draws, height, width):
    """Row and column of the image that each pixel of the result shows: (B, height, width) twice, in pixels.

    At most one pixel outside the image, where all is 0. Flip and grid distortion say which place of the image that
    draws["affine"] moved is shown, and draws["affine"] where that one came from.
    """
    rows, columns = source_positions(draws, height, width)
    linear, shift = draws["affine"].split((2, 1), dim=2)  # (B, 2, 2), (B, 2, 1)
    rows, columns = (rows - height * shift[:, 0])[:, :, None], (columns - width * shift[:, 1])[:, None]
    y, x = rows - (height - 1) / 2, columns - (width - 1) / 2  # from the centre
    # added to the position, what the map changes: nothing is rounded where it changes nothing
    change = (linear - torch.eye(2, device=linear.device))[..., None, None]  # (B, 2, 2, 1, 1)
    rows, columns = (rows + (change[:, 0, 0] * y + change[:, 0, 1] * x),
                     columns + (change[:, 1, 0] * y + change[:, 1, 1] * x))
    return rows.clamp(-1, height), columns.clamp(-1, width)


def _framed(x):
    """(B, h, w) -> (B, (h + 3) * (w + 3)) in a frame of zeros: rows and columns -1 to h + 1 and w + 1."""
    return F.pad(x, (1, 2, 1, 2)).flatten(1)


def _pixel_number(rows, columns, width):
    """The place in a framed image of whole positions, -1 or more."""
    return (rows.long() + 1) * (width + 3) + columns.long() + 1


# ---- points and boxes, on the CPU: the inverse of affine_positions, which asks where a pixel comes from

def move_points(points, draws, height, width):
    """Where augment_pair's geometry shows places of images height x width: float64 (B, k, 2) -> the same.

    Points are (x, y) in shares of the sides, 0..1 from border to border; nan stays nan, and what leaves the picture
    lies outside 0..1. draws: as augment_pair's, but in numpy. What nothing was drawn for stays the same to the bit.
    """
    points = np.array(points, np.float64)  # (B, k, 2): a copy
    borders = np.arange(GRID_CELLS + 1) / GRID_CELLS
    affine, grid = draws["affine"].astype(np.float64), draws["grid"].astype(np.float64)
    change = (np.linalg.inv(affine[:, :, :2]) - np.eye(2))[:, ::-1, ::-1]  # of x and y, as below; draws: row, column
    sides, shift = np.array([width, height]), affine[:, None, ::-1, 2]  # shift (B, 1, 2)
    points += np.einsum("bij,bkj->bki", change, (points - 0.5) * sides) / sides + shift  # A acts on pixels
    for own, shifts in zip(points, grid):
        for axis, of_axis in ((0, shifts[1]), (1, shifts[0])):
            # a place p of the result shows p + shift(p); back again is linear between the moved borders of cells too
            own[:, axis] -= np.interp(own[:, axis], borders + of_axis, of_axis)  # 0 outside the picture
    points[..., 0] = np.where(draws["flip"][:, None] > 0, 1 - points[..., 0], points[..., 0])
    return points


def move_boxes(boxes, draws, height, width):
    """The bounding boxes of moved corners, not clipped: float64 (B, 4) of x_min, y_min, x_max, y_max -> the same.

    Shares of the sides and draws as in move_points. Exact for draw_affine(upright=True), else too large.
    """
    corners = np.asarray(boxes, np.float64)[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(-1, 4, 2)
    corners = move_points(corners, draws, height, width)  # (B, 4, 2)
    return np.concatenate((corners.min(1), corners.max(1)), axis=1)


# ---- two images into one

def soft_targets(labels, classes, smoothing):
    """Smoothed labels, as timm: int (B,) -> float32 (B, classes), rows sum to 1.

    1 - smoothing + smoothing / classes for the label, smoothing / classes for the others.
    """
    return F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes


def mix(x, targets, draws):
    """Mixup or cutmix by draw_mix's dict: x (B, ..., h, w), targets (B, K) -> the same shapes.

    Images 2i and 2i + 1 are partners, where timm takes the first and the last: so a rank's share of a batch, an even
    number of images, holds them all. An odd one at the end stays itself.
    """
    partner = torch.arange(len(x), device=x.device) ^ 1
    partner = torch.where(partner < len(x), partner, partner - 1)
    share, box = draws["share"], draws["box"]
    targets = share * targets + (1 - share) * targets[partner]
    if box is None:
        return share * x + (1 - share) * x[partner], targets
    top, left, bottom, right = box
    mixed = x.clone()
    mixed[..., top:bottom, left:right] = x[partner, ..., top:bottom, left:right]
    return mixed, targets
