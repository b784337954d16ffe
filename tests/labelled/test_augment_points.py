"""Points and boxes that move with their images: against where augment_pair shows dots, ramps and rectangles."""

import numpy as np
import pytest
import torch

from frames.packed import AUGMENT, BatchRows, philox
from labelled import augment as fine

NEVER = dict(light=0, gamma=0, noise=0, distortion=0, flip=0)
SIZES = [(64, 64), (61, 97), (97, 61)]  # height, width
KINDS = {"flip": dict(flip=1), "grid": dict(distortion=1), "affine": dict(affine=1),
         "upright": dict(affine=1, upright=True), "all": dict(flip=0.5, distortion=1, affine=1)}


def drawn(batch, affine=0, upright=False, seed=0, **probabilities):
    """A batch's draws in numpy, in make_batch's order, nothing but the named augmentations."""
    rng = philox(seed, 0, AUGMENT)
    draws = fine.draw_augment(rng, batch, **{**NEVER, **probabilities})
    return {**draws, "affine": fine.draw_affine(rng, batch, affine, upright)}


def shown(images, masks, draws):
    """What augment_pair makes of one image and one mask (h, w) by each row of the draws: grey (B, h, w), masks."""
    draws = {key: torch.from_numpy(value) for key, value in draws.items()}
    many = [torch.from_numpy(x.astype(np.uint8)).expand(len(draws["flip"]), -1, -1) for x in (images, masks)]
    x, moved = fine.augment_pair(*many, draws, 0.0, 1 / 255)
    return x[:, 0].double().numpy(), moved.numpy()


def in_rows(points, batch):
    """The same points (k, 2) for each image: (B, k, 2)."""
    return np.tile(np.asarray(points, np.float64), (batch, 1, 1))


# ---------------------------------------------------------------- points

@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_dot_is_where_its_point_says(kind, size):
    """The centroid of a small blob, wherever it is still whole; a border of the grid's cells bends it."""
    (height, width), seen = size, 0
    y, x = np.mgrid[:height, :width] + 0.5  # of pixel centres
    for number, (row, column) in enumerate([(0.31, 0.73), (0.5, 0.5), (0.78, 0.27), (0.22, 0.18)]):
        at = np.array([column * width, row * height])
        dot = 255 * np.exp(-((x - at[0]) ** 2 + (y - at[1]) ** 2) / (2 * 0.8**2))
        draws = drawn(40, **KINDS[kind], seed=number)
        grey, _ = shown(dot.round(), dot > 99, draws)
        moved = fine.move_points(in_rows([at / [width, height]], 40), draws, height, width)[:, 0] * [width, height]
        whole = ((moved > 6) & (moved < np.array([width, height]) - 6)).all(1)
        grey, moved = grey[whole], moved[whole]
        found = np.stack([(grey * x).sum((1, 2)), (grey * y).sum((1, 2))], 1) / grey.sum((1, 2))[:, None]
        assert np.hypot(*(found - moved).T).max() < (0.5 if "distortion" in KINDS[kind] else 0.15)
        seen += whole.sum()
    assert seen > 110  # of 160


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_exact_inverse(kind, size):
    """Ramps tell each pixel of the result which place it shows; that place moves to the pixel's own centre."""
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    draws = drawn(12, **KINDS[kind], seed=1)
    (y, _), (x, _), (full, _) = (shown(ramp, rows, draws) for ramp in (2 * rows, 2 * columns, np.full(size, 250)))
    places = np.stack(((x / 2 + 0.5) / width, (y / 2 + 0.5) / height), 3).reshape(12, -1, 2)
    moved = fine.move_points(places, draws, height, width).reshape(12, height, width, 2) * [width, height]
    inner = full > 249.999  # nothing of it comes from outside
    inner[:, [0, -1]], inner[:, :, [0, -1]] = False, False  # at the border the grid repeats the last pixel
    error = moved - np.stack((columns, rows), 2) - 0.5
    assert np.abs(error[inner]).max() < 0.005 and inner.mean() > 0.6  # grey levels and positions are float32
    assert np.abs(moved.reshape(places.shape) / [width, height] - places).max() > 0.05


def test_nothing_drawn_changes_nothing_and_the_input_stays():
    points = np.random.default_rng(0).uniform(-0.5, 1.5, (6, 40, 2))
    before, boxes = points.copy(), np.array([[0.1, 0.2, 0.7, 0.3]] * 6)
    assert np.array_equal(fine.move_points(points, drawn(6), 37, 53), points)
    assert np.array_equal(fine.move_boxes(boxes, drawn(6), 37, 53), boxes)
    moved = fine.move_points(points, drawn(6, **KINDS["all"]), 37, 53)
    assert np.array_equal(points, before) and moved.dtype == np.float64 and not (moved == points).any()
    assert fine.move_points(points[:, :0], drawn(6, **KINDS["all"]), 37, 53).shape == (6, 0, 2)


def test_flip_mirrors_left_and_right_alone():
    points = np.random.default_rng(0).uniform(0, 1, (20, 5, 2))
    draws = drawn(20, flip=0.5)
    moved, flipped = fine.move_points(points, draws, 30, 40), draws["flip"] > 0
    assert 3 < flipped.sum() < 17
    assert np.array_equal(moved[flipped], np.stack((1 - points[flipped, :, 0], points[flipped, :, 1]), 2))
    assert np.array_equal(moved[~flipped], points[~flipped])


def test_nan_stays_nan_and_does_not_spread():
    draws, points = drawn(8, **KINDS["all"]), np.random.default_rng(0).uniform(0, 1, (8, 3, 2))
    missing = points.copy()
    missing[2, 1], missing[5] = np.nan, np.nan
    moved, whole = (fine.move_points(x, draws, 30, 50) for x in (missing, points))
    assert np.array_equal(np.isnan(moved), np.isnan(missing))
    assert np.array_equal(moved[~np.isnan(missing)], whole[~np.isnan(missing)])
    boxes = np.array([[0.1, 0.2, 0.5, 0.6]] * 8)
    boxes[3] = np.nan
    assert np.array_equal(np.isnan(fine.move_boxes(boxes, draws, 30, 50)).all(1), np.arange(8) == 3)


def test_a_point_may_leave_the_picture():
    """A shift is a share of each side; beyond the border the grid changes nothing."""
    draws = drawn(1, distortion=1)
    draws["affine"] = np.float32([[[1, 0, 0.25], [0, 1, -0.5]]])  # a quarter down, a half to the left
    moved = fine.move_points([[[0.25, 0.875], [0.0, 0.75]]], draws, 30, 50)
    assert np.array_equal(moved, [[[-0.25, 1.125], [-0.5, 1.0]]])


# ---------------------------------------------------------------- boxes

@pytest.mark.parametrize("size", SIZES)
def test_boxes_of_filled_rectangles(size):
    """Half a pixel at most lies between a side and the first pixel centre beyond it; at the picture's border, where the
    grid repeats the last pixel, a whole one."""
    (height, width), sides = size, np.array(size[::-1] * 2)
    for left, top, right, bottom in [(20, 12, 41, 40), (4, 25, 30, 50), (0, 0, 12, 18), (33, 20, 61, 61)]:
        mask = np.zeros(size, np.uint8)
        mask[top:bottom, left:right] = 1
        draws = drawn(60, flip=0.5, distortion=0.7, affine=0.9, upright=True, seed=left)
        _, masks = shown(mask, mask, draws)
        box = np.array([left, top, right, bottom]) / sides
        moved = fine.move_boxes(np.tile(box, (60, 1)), draws, height, width) * sides
        assert (moved[:, 2:] > moved[:, :2]).all()
        clipped, compared = moved.clip(0, sides), 0
        for number in range(60):
            if (clipped[number, 2:] - clipped[number, :2]).min() < 2:
                continue  # hardly any of it is left
            rows, columns = np.nonzero(masks[number])
            found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            leeway = np.where((found == 0) | (found == sides), 1, 0.51)
            assert (np.abs(found - clipped[number]) < leeway).all(), number
            compared += 1
        assert compared > 45


def test_a_box_holds_its_rotated_contents():
    rows, columns = np.mgrid[:80, :60]
    disc = (rows - 39.5) ** 2 + (columns - 29.5) ** 2 < 12**2
    draws = drawn(40, affine=1, distortion=0.5, flip=0.5)
    _, masks = shown(disc, disc, draws)
    box = np.tile(np.array([18, 28, 42, 52]) / [60, 80, 60, 80], (40, 1))
    moved, larger = fine.move_boxes(box, draws, 80, 60) * [60, 80, 60, 80], 0
    for mask, (left, top, right, bottom) in zip(masks, moved):
        y, x = np.argwhere(mask).T + 0.5
        assert left < x.min() and x.max() < right and top < y.min() and y.max() < bottom
        larger += right - left > np.ptp(x) + 4
    assert larger > 20


# ---------------------------------------------------------------- draws

def test_upright_draws_the_same_numbers():
    generators = [philox(4, 2, AUGMENT) for _ in range(2)]
    turned, upright = (fine.draw_affine(rng, 500, 0.7, flag) for rng, flag in zip(generators, (False, True)))
    assert generators[0].random() == generators[1].random()
    assert upright.dtype == np.float32 and np.array_equal(upright[:, :, 2], turned[:, :, 2])
    moved = (turned != np.eye(2, 3)).any((1, 2))
    assert np.array_equal((upright != np.eye(2, 3)).any((1, 2)), moved) and 300 < moved.sum() < 400
    assert not upright[:, 0, 1].any() and not upright[:, 1, 0].any()
    assert np.array_equal(upright[:, 0, 0], upright[:, 1, 1])
    # the forward map s [[1, a], [b, 1]] R(angle), rotated back, has s on its diagonal; where a + b is near 0 none tells
    (p, q), (r, s) = np.linalg.inv(turned[moved, :, :2].astype(np.float64)).transpose(1, 2, 0)
    sure, angle = np.hypot(q + r, s - p) > 0.005, np.arctan((s - p) / (q + r))
    scale = p * np.cos(angle) + q * np.sin(angle)
    assert np.allclose(scale[sure], 1 / upright[moved, 0, 0][sure], atol=1e-4) and sure.mean() > 0.9


def test_ranks_move_their_rows():
    images = np.array([1, 4, 5])
    points = np.random.default_rng(0).uniform(0, 1, (8, 3, 2))
    parts = []
    for rng in (philox(0, 0, AUGMENT), BatchRows(philox(0, 0, AUGMENT), 8, images)):
        batch = 8 if not parts else 3
        draws = {**fine.draw_augment(rng, batch), "affine": fine.draw_affine(rng, batch)}
        parts.append(fine.move_points(points if batch == 8 else points[images], draws, 40, 60))
    assert np.array_equal(parts[0][images], parts[1])
