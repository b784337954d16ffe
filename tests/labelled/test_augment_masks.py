"""Masks that move with their images: against loops over one image, SciPy's affine_transform, and what was drawn."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from frames.packed import AUGMENT, BatchRows, philox
from labelled import augment as fine

NEVER = dict(light=0, gamma=0, noise=0, distortion=0, flip=0)
SIZES = [(40, 40), (31, 52), (52, 31), (1, 1), (1, 9)]
IDENTITY = [[1, 0, 0], [0, 1, 0]]


def pairs(batch, height, width, classes=27, seed=0):
    """Images of structure and speckle, none of them black, and masks of blobs 6 pixels wide: uint8 (B, h, w) twice."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.arange(height), 2 * np.arange(width)) * 1.5
    blobs = rng.integers(0, classes, (batch, height // 6 + 1, width // 6 + 1)).repeat(6, 1).repeat(6, 2)
    return (torch.from_numpy((ramp + 20 + 60 * rng.random((batch, height, width))).clip(0, 255).astype(np.uint8)),
            torch.from_numpy(blobs[:, :height, :width].astype(np.uint8)))


def drawn(batch, affine=1.0, seed=0, **probabilities):
    """The dict that augment_pair takes, nothing but the named augmentations; affine is a probability or a matrix."""
    draws = fine.draw_augment(philox(seed, 0, AUGMENT), batch, **{**NEVER, **probabilities})
    if isinstance(affine, list):
        draws["affine"] = np.tile(np.float32(affine), (batch, 1, 1))
    else:
        draws["affine"] = fine.draw_affine(philox(seed, 1, AUGMENT), batch, affine)
    return {key: torch.from_numpy(value) for key, value in draws.items()}


def in_grey(images, masks, draws):
    """augment_pair without normalisation: images in 0..255 (B, h, w), masks."""
    x, moved = fine.augment_pair(images, masks, draws, 0.0, 1 / 255)
    return x[:, 0], moved


def about_centre(linear, shift=(0, 0)):
    return [[*row, share] for row, share in zip(np.asarray(linear).tolist(), shift)]


# ---------------------------------------------------------------- draws

def test_draws_are_a_function_of_seed_and_step_and_ranks_take_rows():
    whole = fine.draw_affine(philox(3, 7, AUGMENT), 12)
    assert whole.dtype == np.float32 and whole.shape == (12, 2, 3)
    for images in (np.arange(0, 4), np.arange(4, 12), np.array([11])):
        own = fine.draw_affine(BatchRows(philox(3, 7, AUGMENT), 12, images), len(images))
        assert np.array_equal(own, whole[images])
    for seed, step in ((3, 8), (4, 7)):
        assert not np.array_equal(fine.draw_affine(philox(seed, step, AUGMENT), 12), whole)


def test_the_same_numbers_are_drawn_whatever_the_probability():
    generators = [philox(0, 0, AUGMENT) for _ in range(3)]
    never, half, always = (fine.draw_affine(rng, 200, p) for rng, p in zip(generators, (0, 0.5, 1)))
    assert len({rng.random() for rng in generators}) == 1
    moved = (half != IDENTITY).any((1, 2))
    assert np.array_equal(never, np.tile(np.float32(IDENTITY), (200, 1, 1)))
    assert np.array_equal(half[moved], always[moved]) and np.array_equal(half[~moved], never[~moved])
    assert (always != IDENTITY).any((1, 2)).all() and 70 < moved.sum() < 130  # 4 standard deviations


def test_ranges_of_scale_angle_shear_and_shift():
    """The parts of the forward map s [[1, a], [b, 1]] R(angle), found again from its four entries."""
    affine = fine.draw_affine(philox(0, 0, AUGMENT), 40_000).astype(np.float64)
    moved = (affine != IDENTITY).any((1, 2))
    assert abs(moved.mean() - 0.5) < 0.0125  # 5 standard deviations
    affine = affine[moved]
    (p, q), (r, s) = np.linalg.inv(affine[:, :, :2]).transpose(1, 2, 0)
    # rotated back, both diagonal entries are equal, which tells the angle, but not where a + b is 0
    sure = np.hypot(q + r, s - p) > 0.005
    angle = np.arctan((s - p) / (q + r))
    cos, sin = np.cos(angle), np.sin(angle)
    scale = p * cos + q * sin
    assert np.allclose(scale[sure], (s * cos - r * sin)[sure], atol=1e-4)
    a, b = np.degrees(np.arctan((q * cos - p * sin) / scale)), np.degrees(np.arctan((r * cos + s * sin) / scale))
    parts = [(scale - 0.8) / 0.4, (np.degrees(angle) + 30) / 60, (a + 15) / 30, (b + 15) / 30]
    parts = [part[sure] for part in parts] + [(affine[:, axis, 2] + 0.2) / 0.4 for axis in (0, 1)]
    for values in parts:
        assert stats.kstest(values, "uniform").pvalue > 1e-3
        assert values.min() > -0.001 and values.max() < 1.001
        assert values.min() < 0.001 and values.max() > 0.999 and abs(values.mean() - 0.5) < 0.011  # both signs alike
    parts[4:] = [part[sure] for part in parts[4:]]
    assert abs(np.corrcoef(parts) - np.eye(6)).max() < 0.04


# ---------------------------------------------------------------- geometry

def pixel(image, row, column):
    return float(image[row, column]) if 0 <= row < image.shape[0] and 0 <= column < image.shape[1] else 0.0


def written_out(image, mask, draws, number):
    """One image and its mask, every pixel on its own, in float64: grey levels, ids, and where rounding decides."""
    own = {key: value[number].double().numpy() for key, value in draws.items()}
    (height, width), moved = image.shape, np.zeros(image.shape)
    ids, unsure = np.zeros(image.shape), np.zeros(image.shape, bool)
    bent = []
    for shifts, size in zip(own["grid"], image.shape):
        borders = np.linspace(0, size, 6)
        bent.append(np.interp(np.arange(size) + 0.5, borders, borders + size * shifts).clip(0.5, size - 0.5) - 0.5)
    for i in range(height):
        for j in range(width):
            place = np.array([bent[0][i], bent[1][width - 1 - j if own["flip"] else j]])
            centre = np.array([height - 1, width - 1]) / 2
            y, x = centre + own["affine"][:, :2] @ (place - centre - own["affine"][:, 2] * image.shape)
            top, left = math.floor(y), math.floor(x)
            for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
                for column, right in ((left, 1 - (x - left)), (left + 1, x - left)):
                    moved[i, j] += down * right * pixel(image, row, column)
            ids[i, j] = pixel(mask, round(y), round(x))
            unsure[i, j] = min(abs(y % 1 - 0.5), abs(x % 1 - 0.5)) < 1e-4
    moved = np.clip(moved * own["contrast"] + own["brightness"], 0, 255)
    return np.clip(255 * (moved / 255) ** own["gamma"], 0, 255), ids, unsure


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("names", [[], ["distortion", "flip", "light", "gamma"]])
def test_equals_a_written_out_loop(size, names):
    images, masks = pairs(4, *size)
    draws = drawn(4, **dict.fromkeys(names, 1))
    ours, moved = in_grey(images, masks, draws)
    assert ours.shape == images.shape and moved.dtype == torch.uint8
    for number in range(4):
        grey, ids, unsure = written_out(images[number].numpy(), masks[number].numpy(), draws, number)
        assert np.abs(ours[number].numpy() - grey).max() < 0.05  # positions are float32
        assert unsure.mean() < 0.01 and np.array_equal(moved[number].numpy()[~unsure], ids[~unsure])


@pytest.mark.parametrize("size", SIZES)
def test_affine_alone_equals_scipy(size):
    images, masks = pairs(6, *size)
    draws = drawn(6)
    ours, moved = in_grey(images, masks, draws)
    for number, affine in enumerate(draws["affine"].double().numpy()):
        centre = (np.array(size) - 1) / 2
        offset = centre - affine[:, :2] @ (centre + affine[:, 2] * size)
        expected, ids = (ndimage.affine_transform(x[number].numpy().astype(np.float64), affine[:, :2], offset,
                                                  order=order, mode="grid-constant")
                         for x, order in ((images, 1), (masks, 0)))
        assert np.abs(ours[number].numpy() - expected).max() < 0.05
        assert (moved[number].numpy() != ids).mean() < 0.002  # where a place is half way between two pixels


@pytest.mark.parametrize("size", SIZES)
def test_without_an_affine_map_the_geometry_is_that_of_classification(size):
    images, masks = pairs(6, *size)
    draws = drawn(6, affine=0, distortion=1, flip=0.5)
    ours, moved = in_grey(images, masks, draws)
    assert (ours - fine.warp(images.float(), draws)).abs().max() < 1e-3
    rows, columns = (positions.numpy() for positions in fine.source_positions(draws, *size))
    for number in range(6):
        nearest = np.ix_(np.rint(rows[number]).astype(int), np.rint(columns[number]).astype(int))
        assert np.array_equal(moved[number], masks[number].numpy()[nearest])


@pytest.mark.parametrize("size", SIZES)
def test_nothing_drawn_changes_nothing(size):
    images, masks = pairs(3, *size)
    before = images.clone(), masks.clone()
    x, moved = fine.augment_pair(images, masks, drawn(3, affine=0), 0.3, 0.2)
    assert torch.equal(x, fine.normalise_only(images, 0.3, 0.2)) and torch.equal(moved, masks)
    assert torch.equal(images, before[0]) and torch.equal(masks, before[1])


def test_a_shift_is_a_share_of_each_side():
    """By 2 of 8 rows down and 6 of 12 columns to the left; what comes from outside is black and of class 0."""
    images, masks = pairs(1, 8, 12)
    masks += 1
    ours, moved = fine.warp_pair(images, masks, drawn(1, affine=about_centre(np.eye(2), (0.25, -0.5))))
    for before, after in ((images.float(), ours), (masks, moved)):
        assert torch.equal(after[:, 2:, :6], before[:, :-2, 6:])
        assert not after[:, :2].any() and not after[:, :, 6:].any()


def test_rotation_and_scale_keep_a_disc_round():
    """In an image three times as wide as high; its second moments are those of a disc, and grow with the scale."""
    rows, columns = np.mgrid[:60, :180]
    disc = torch.from_numpy(((rows - 29.5) ** 2 + (columns - 89.5) ** 2 < 20**2).astype(np.uint8))[None]
    turn = np.array([[math.cos(0.5), math.sin(0.5)], [-math.sin(0.5), math.cos(0.5)]])
    for scale in (0.8, 1.2):
        _, moved = in_grey(255 * disc, disc, drawn(1, affine=about_centre(turn / scale)))
        covariance = np.cov(np.argwhere(moved[0].numpy()).T)
        assert np.allclose(covariance, np.eye(2) * (20 * scale) ** 2 / 4, atol=1.5)
        assert moved.sum() / disc.sum() == pytest.approx(scale**2, rel=0.02)


def test_a_pixel_goes_where_the_forward_map_says():
    """One spot of 3 x 3 pixels, each part of the map by itself: rotated, sheared along one axis or the other."""
    angle = math.radians(30)
    turn, across, down = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], \
        [[1, math.tan(0.25)], [0, 1]], [[1, 0], [math.tan(0.25), 1]]
    mask = torch.zeros(1, 61, 101, dtype=torch.uint8)
    mask[:, 19:22, 69:72] = 5  # its middle is 10 above and 20 right of the centre
    for forward in (turn, across, down):
        image, moved = in_grey(50 * mask, mask, drawn(1, affine=about_centre(np.linalg.inv(forward))))
        expected = np.array([30, 50]) + forward @ np.array([-10, 20])
        assert np.allclose(np.argwhere(moved[0].numpy()).mean(0), expected, atol=0.5)
        assert np.allclose(ndimage.center_of_mass(image[0].numpy()), expected, atol=0.05)


# ---------------------------------------------------------------- image and mask together

@pytest.mark.parametrize("names", [[], ["distortion"], ["distortion", "flip"]])
def test_a_mask_moves_with_its_image(names):
    """The mask as the image: where its levels are pure both agree, elsewhere is a border, one pixel wide."""
    rows, columns = np.mgrid[:96, :80]
    mask = torch.from_numpy((((rows - 40) / 25) ** 2 + ((columns - 45) / 14) ** 2 < 1).astype(np.uint8)).repeat(8, 1, 1)
    mask[4:, 70:90, 5:30] = 1
    image, moved = in_grey(255 * mask, mask, drawn(8, **dict.fromkeys(names, 1)))
    pure = (image < 0.01) | (image > 254.99)
    assert torch.equal(moved[pure] == 1, image[pure] > 128)
    assert (~pure).float().mean() < 0.06 and ((image > 127.5) == (moved == 1)).float().mean() > 0.98
    for number in range(8):
        inside = moved[number].numpy() == 1
        clear = ndimage.minimum_filter(inside, 3) == ndimage.maximum_filter(inside, 3)  # no border among its neighbours
        assert np.array_equal(image[number].numpy()[clear] > 127.5, inside[clear])
    assert (moved != mask).flatten(1).any(1).all()


def test_no_new_id_appears():
    """Numbers far apart, side by side: any mean of two would be a third one; 26 classes and 255 too."""
    ids = torch.tensor([0, 3, 26, 200, 255], dtype=torch.uint8)
    masks = ids[torch.from_numpy(np.random.default_rng(0).integers(0, 5, (12, 33, 47)))]
    _, moved = in_grey(masks, masks, drawn(12, distortion=1, flip=0.5, light=1, noise=1))
    assert set(moved.unique().tolist()) == set(ids.tolist())
    images, masks = pairs(8, 60, 60)
    assert set(masks.unique().tolist()) == set(range(27))
    assert set(in_grey(images, masks, drawn(8, distortion=1))[1].unique().tolist()) == set(range(27))


def test_light_and_noise_leave_the_mask_alone():
    images, masks = pairs(5, 40, 31)
    plain, bright = drawn(5, distortion=1, flip=0.5), drawn(5, distortion=1, flip=0.5, light=1, gamma=1, noise=1)
    (x, moved), (y, again) = in_grey(images, masks, plain), in_grey(images, masks, bright)
    assert torch.equal(moved, again) and (x - y).abs().mean() > 5


def test_noise_is_not_smoothed():
    """Neighbours stay independent and the deviation is the drawn one, which interpolating noise would not leave."""
    grey = torch.full((4, 96, 96), 128, dtype=torch.uint8)
    draws = drawn(4, affine=about_centre(np.array([[0.9, 0.2], [-0.2, 0.9]])), noise=1, distortion=1)
    noise = (in_grey(grey, grey, draws)[0] - 128)[:, 24:72, 24:72]
    assert torch.allclose(noise.std((1, 2)), draws["noise"], rtol=0.08)  # 5 standard errors of 48 x 48 values
    for a, b in ((noise[:, 1:], noise[:, :-1]), (noise[:, :, 1:], noise[:, :, :-1])):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 5 / 96


# ---------------------------------------------------------------- batches

def test_slices_of_the_batch_give_the_same_rows(monkeypatch):
    images, masks = pairs(7, 20, 33)
    draws = drawn(7, affine=0.5, light=0.5, gamma=0.5, noise=1, distortion=0.5, flip=0.5)
    x, moved = fine.augment_pair(images, masks, draws, 0.2, 0.2)
    assert x.shape == (7, 1, 20, 33) and x.dtype == torch.float32
    for own in (slice(0, 1), slice(1, 7)):
        part = fine.augment_pair(images[own], masks[own], {key: value[own] for key, value in draws.items()}, 0.2, 0.2)
        assert torch.equal(part[0], x[own]) and torch.equal(part[1], moved[own])
    monkeypatch.setattr(fine, "SLICE", 3)
    again = fine.augment_pair(images, masks, draws, 0.2, 0.2)
    assert torch.equal(again[0], x) and torch.equal(again[1], moved)


def test_a_mask_of_another_shape_is_refused():
    images, masks = pairs(2, 20, 30)
    for wrong in (masks[:1], masks[:, :, 1:], masks.mT):
        with pytest.raises(ValueError, match=r"\(2, 20, 30\).*resize each mask"):
            fine.augment_pair(images, wrong, drawn(2), 0.2, 0.2)
