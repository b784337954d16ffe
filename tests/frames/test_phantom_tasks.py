"""Phantom tasks of four types: masks, planes, a heart's box, a femur's ends, each of the image that shows it."""
import math

import numpy as np
import pytest

from frames import phantom

KINDS = {"phantom structures": ("segmentation", 5), "phantom planes": ("classification", 6),
         "phantom heart": ("detection", 1), "phantom femur": ("regression", 2)}
HEART, FEMUR = "phantom heart", "phantom femur"


@pytest.fixture(scope="module")
def drawn():
    return phantom.phantom_tasks(600, seed=4)


def values_of(indices, seed):
    """What was drawn for each image, as plain numbers."""
    parameters, _ = phantom.draw_parameters(np.asarray(indices), 4, seed)
    return [{name: float(values[i, 0, 0]) for name, values in parameters.items()} for i in range(len(indices))]


def anatomical(x, y, p):
    """A place of the picture, which spans -1..1, in the anatomy's own coordinates, written out."""
    turned = p["angle"] + p["turn"]
    dx, dy = (x - p["x"] - p["dx"]) / p["zoom"] / p["closer"], (y - p["y"] - p["dy"]) / p["zoom"] / p["closer"]
    v = dy * math.cos(turned) - dx * math.sin(turned)
    return dx * math.cos(turned) + dy * math.sin(turned), v if p["mirror"] > 0 else -v


def in_sight(x, y, p):
    """How far within picture and sector places are, negative outside; about a share of the picture's half side."""
    down = y + 0.95 + p["probe_radius"]
    depth, angle = np.hypot(x, down) - p["probe_radius"], np.arctan2(x, down)
    return np.min([depth, p["depth"] - depth, p["half_angle"] - abs(angle), 1 - abs(x), 1 - abs(y)], axis=0)


# ---------------------------------------------------------------- what is returned

def test_images_masks_and_planes_are_those_of_the_other_phantoms(drawn):
    images, groups, tasks = drawn
    expected, labels, expected_groups = phantom.phantom_images(600, seed=4)
    assert np.array_equal(images, expected) and np.array_equal(groups, expected_groups)
    kind, classes, rows, targets = tasks["phantom planes"]
    assert np.array_equal(rows, np.arange(600)) and np.array_equal(targets, labels)
    kind, classes, rows, targets = tasks["phantom structures"]
    with_masks, masks, mask_groups = phantom.phantom_masks(400, seed=4)
    assert np.array_equal(images[rows], with_masks) and np.array_equal(targets, masks)
    assert np.array_equal(groups[rows], mask_groups)


def test_kinds_shapes_and_enough_of_each():
    images, groups, tasks = phantom.phantom_tasks(120)
    assert images.shape == (120, 64, 64) and images.dtype == np.uint8 and groups.shape == (120,)
    assert {name: task[:2] for name, task in tasks.items()} == KINDS
    shapes = {"segmentation": ((64, 64), np.uint8), "classification": ((), np.int64), "detection": ((4,), np.float64),
              "regression": ((2, 2), np.float64)}
    for name, (kind, classes, rows, targets) in tasks.items():
        assert len(rows) >= 10 and rows.dtype == np.int64 and (np.diff(rows) > 0).all(), name
        assert targets.shape == (len(rows), *shapes[kind][0]) and targets.dtype == shapes[kind][1], name
        assert np.isfinite(targets).all(), name


@pytest.mark.parametrize("size", [32, 64])
def test_an_image_and_its_targets_do_not_depend_on_how_many_are_drawn(size):
    images, groups, tasks = phantom.phantom_tasks(101, size, seed=2)
    for n in (0, 1, 5, 49, 100, 101):
        fewer, fewer_groups, fewer_tasks = phantom.phantom_tasks(n, size, seed=2)
        assert np.array_equal(fewer, images[:n]) and np.array_equal(fewer_groups, groups[:n])
        for name, (_, _, rows, targets) in tasks.items():
            own = rows < n
            assert np.array_equal(fewer_tasks[name][2], rows[own]), (n, name)
            assert np.array_equal(fewer_tasks[name][3], targets[own]), (n, name)
    other = phantom.phantom_tasks(101, size, seed=3)[2]
    assert not np.array_equal(other[HEART][3], tasks[HEART][3])
    assert not np.array_equal(other[FEMUR][3][:5], tasks[FEMUR][3][:5])


def test_targets_scale_with_the_picture():
    small, large = (phantom.phantom_tasks(90, size, seed=1)[2] for size in (48, 144))
    for name, leeway in ((HEART, 3), (FEMUR, 1e-9)):  # a heart's box ends between pixels
        assert np.array_equal(small[name][2], large[name][2])
        assert np.abs(3 * small[name][3] - large[name][3]).max() <= leeway, name


# ---------------------------------------------------------------- boxes

def test_boxes_bound_the_hearts_pixels(drawn):
    _, _, tasks = drawn
    _, _, rows, masks = tasks["phantom structures"]
    masks = dict(zip(rows.tolist(), masks))
    _, _, rows, boxes = tasks[HEART]
    assert set(rows % 6) == {phantom.PLANES.index("thorax")}
    for row, box in zip(rows.tolist(), boxes.tolist()):
        y, x = np.nonzero(masks[row] == phantom.STRUCTURES.index("heart"))
        assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]


def test_a_heart_mostly_out_of_sight_has_no_box(monkeypatch):
    """Patients further aside than usual; all of a heart's pixels counted on a plane that goes on beyond the picture."""
    monkeypatch.setitem(phantom.PATIENT, "x", (-1.2, 1.2))
    size, thorax = 32, np.arange(3, 480, 6)
    rows = phantom.phantom_tasks(480, size, seed=7)[2][HEART][2]
    y, x = (np.mgrid[-size:2 * size, -size:2 * size] + 0.5) * 2 / size - 1  # of pixel centres
    kept, left_out = 0, 0
    for row, p in zip(thorax.tolist(), values_of(thorax, 7)):
        u, v = anatomical(x, y, p)
        tilt = 0.7 + 0.3 * p["shape1"]
        along = math.cos(tilt) * (u + 0.15) + math.sin(tilt) * (v - 0.1)
        aside = math.cos(tilt) * (v - 0.1) - math.sin(tilt) * (u + 0.15)
        inside = (along / 0.64) ** 2 + (aside / 0.5) ** 2 < 1
        share = (inside & (in_sight(x, y, p) > 0)).sum() / inside.sum()
        if abs(share - 0.5) > 0.02:  # an area is not exactly a number of pixels
            assert (row in rows) == (share > 0.5), (row, share)
            kept, left_out = kept + (row in rows), left_out + (row not in rows)
    assert kept > 30 and left_out > 10
    assert len(phantom.phantom_tasks(480, 4, seed=7)[2][HEART][2]) == 0  # no heart has 12 of so few pixels


# ---------------------------------------------------------------- points

def test_points_are_the_ends_of_the_bone(drawn):
    """Back in the anatomy's coordinates they are at u = -0.85 and 0.85 on the bowed axis; the left one is first."""
    _, _, rows, points = drawn[2][FEMUR]
    first_is_far = 0
    for p, ends in zip(values_of(rows, 4), points.tolist()):
        (u1, v1), (u2, v2) = (anatomical(2 * x / 64 - 1, 2 * y / 64 - 1, p) for x, y in ends)
        assert ends[0][0] <= ends[1][0]
        assert sorted((u1, u2)) == pytest.approx([-0.85, 0.85], abs=1e-5)
        bow = 0.16 * p["shape1"] * (0.85**2 - 0.5)
        assert (v1, v2) == pytest.approx((bow, bow), abs=1e-5)
        first_is_far += u1 > 0
    assert 0.3 < first_is_far / len(rows) < 0.7  # mirrored and turned every way


def test_a_femur_with_an_end_out_of_sight_has_no_points(drawn):
    rows = drawn[2][FEMUR][2]
    femurs = np.arange(2, 600, 6)
    assert set(rows) < set(femurs.tolist())
    for row, p in zip(femurs.tolist(), values_of(femurs, 4)):
        turned = p["angle"] + p["turn"]
        v = 0.16 * p["shape1"] * (0.85**2 - 0.5) * (1 if p["mirror"] > 0 else -1)
        depths = []
        for u in (-0.85, 0.85):
            x, y = (p["zoom"] * p["closer"] * part for part in (math.cos(turned) * u - math.sin(turned) * v,
                                                                math.sin(turned) * u + math.cos(turned) * v))
            depths.append(in_sight(x + p["x"] + p["dx"], y + p["y"] + p["dy"], p))
        if abs(min(depths)) > 1e-5:
            assert (row in rows) == (min(depths) > 0), row


def test_the_images_show_the_bone_between_the_points(drawn):
    """From one to the other brighter than what is seen elsewhere, a tenth beyond either dark again."""
    images, _, tasks = drawn
    _, _, rows, points = tasks[FEMUR]
    along = np.array([-0.1, 0.1, 0.3, 0.5, 0.7, 0.9, 1.1])  # shares of the way from the left to the right one
    grey, elsewhere = [], []
    for image, (left, right) in zip(images[rows].astype(np.float64), points):
        places = np.clip(left + along[:, None] * (right - left), 1, 62).astype(int)
        grey.append([image[row - 1:row + 2, column - 1:column + 2].mean() for column, row in places])
        elsewhere.append(image[image > 0].mean())
    grey, elsewhere = np.array(grey), np.array(elsewhere)
    mean = grey.mean(0) - elsewhere.mean()
    assert (mean[[1, -2]] > 30).all() and (mean[[0, -1]] < -15).all() and (mean[2:-2] > 15).all()
    assert (grey[:, 1:-1].mean(1) > elsewhere).mean() > 0.75
