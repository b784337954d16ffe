"""Scores of masks against scikit-learn, SciPy's distance transform and by hand; what is empty, one pixel, cut off;
circumferences against the elliptic integral."""

import csv
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt

from scores import metrics
from scores.metrics import boundary, boundary_distances, head_circumference, mask_counts

RNG = np.random.default_rng(0)


def disk(shape, x, y, a, b=None, angle=0.0, mm=(1.0, 1.0)):
    """bool (h, w): pixels whose centre is in the ellipse; x, y, a and b in mm, pixel (0, 0) reaches to mm."""
    down, across = np.indices(shape) + 0.5
    across, down = across * mm[0] - x, down * mm[1] - y
    u, v = across * np.cos(angle) + down * np.sin(angle), down * np.cos(angle) - across * np.sin(angle)
    return (u / a) ** 2 + (v / (b or a)) ** 2 <= 1


def mask_scores(truth, prediction, n_classes, mm=None, tolerance=2):
    return metrics.mask_scores(truth, prediction, n_classes, mm, tolerance)


def pixel(shape, *where):
    mask = np.zeros(shape, bool)
    mask[where] = True
    return mask


# ---------------------------------------------------------------- pixels

PAIRS = {  # class numbers below 5, truth and prediction
    "random": RNG.integers(0, 5, (2, 30, 40)),
    "class 4 only predicted": (RNG.integers(0, 4, (30, 40)), RNG.integers(0, 5, (30, 40))),
    "class 4 never predicted": (RNG.integers(0, 5, (30, 40)), RNG.integers(0, 4, (30, 40))),
    "class 4 in neither": RNG.integers(0, 4, (2, 30, 40)),
    "no background": RNG.integers(1, 5, (2, 30, 40)),
    "all background": np.zeros((2, 30, 40), int),
    "equal": np.stack([RNG.integers(0, 5, (30, 40))] * 2),
    "nothing in common": np.stack((np.full((30, 40), 1), np.full((30, 40), 2))),
    "one pixel": RNG.integers(0, 5, (2, 1, 1)),
}


@pytest.mark.parametrize("truth, prediction", PAIRS.values(), ids=PAIRS)
def test_dice_and_iou_are_scikit_learns(truth, prediction):
    counts = mask_counts(truth.astype(np.uint8), prediction.astype(np.uint8), 5)
    assert counts.shape == (5, 3) and counts.dtype == np.int64 and (counts[:, 1:].sum(0) == truth.size).all()
    expected = sklearn.metrics.f1_score(truth.ravel(), prediction.ravel(), average=None, labels=range(5),
                                        zero_division=np.nan)
    np.testing.assert_allclose(metrics.dice(counts), expected, atol=1e-6)
    for k in range(5):
        if (truth == k).any() or (prediction == k).any():
            expected = sklearn.metrics.jaccard_score((truth == k).ravel(), (prediction == k).ravel())
            assert metrics.iou(counts)[k] == pytest.approx(expected, abs=1e-6)
        else:
            assert np.isnan(metrics.iou(counts)[k])


def test_counts_of_bool_masks_and_of_many():
    truth, prediction = RNG.random((2, 9, 8)) < 0.4
    expected = [[(~truth & ~prediction).sum(), (~truth).sum(), (~prediction).sum()],
                [(truth & prediction).sum(), truth.sum(), prediction.sum()]]
    counts = mask_counts(truth, prediction, 2)
    assert counts.tolist() == expected
    both = np.stack((counts, counts[::-1]))  # leading axes
    for score in (metrics.dice, metrics.iou):
        assert score(both).tolist() == [score(counts).tolist(), score(counts[::-1]).tolist()]


@pytest.mark.parametrize("truth, prediction, message", [
    (np.zeros((4, 5), int), np.zeros((5, 4), int), r"shape \(5, 4\) for one of shape \(4, 5\)"),
    (np.zeros(4, int), np.zeros(4, int), "expected"),
    (np.zeros((0, 4), int), np.zeros((0, 4), int), "expected"),
    (np.full((2, 2), 3), np.zeros((2, 2), int), r"true mask holds int64 3\.\.3, expected class numbers below 3"),
    (np.zeros((2, 2), int), np.full((2, 2), 255, np.uint8), r"predicted mask holds uint8 255\.\.255"),
    (np.zeros((2, 2), int), np.full((2, 2), -1), r"predicted mask holds int64 -1\.\.-1"),
    (np.zeros((2, 2), int), np.zeros((2, 2)), "predicted mask holds float64"),
])
def test_masks_that_do_not_fit_raise(truth, prediction, message):
    with pytest.raises(ValueError, match=message):
        mask_counts(truth, prediction, 3)


# ---------------------------------------------------------------- boundaries

MASKS = {
    "blobs": disk((60, 80), 25, 30, 14) | disk((60, 80), 60, 20, 17, 9, 0.5),
    "disk": disk((60, 80), 33, 28, 20, 12, 0.3),
    "cut off": disk((60, 80), 3, 50, 30),
    "noise": RNG.random((60, 80)) < 0.5,
    "sparse noise": RNG.random((60, 80)) < 0.01,
    "all": np.ones((60, 80), bool),
    "a row": pixel((60, 80), 59),
    "a column": pixel((60, 80), slice(None), 0),
    "a ring": disk((60, 80), 40, 30, 20) & ~disk((60, 80), 40, 30, 15),
    "a pixel": pixel((60, 80), 12, 70),
    "a corner": pixel((60, 80), 0, 0),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_boundary_is_the_mask_less_its_erosion(mask):
    assert (boundary(mask) == mask & ~binary_erosion(mask)).all() and boundary(mask).any()


def test_boundary_of_little():
    assert boundary(np.ones((1, 1), bool)).all() and boundary(np.ones((2, 9), bool)).all()
    assert not boundary(np.zeros((5, 5), bool)).any()
    assert boundary(np.ones((3, 3), bool)).sum() == 8  # all but the middle


def distances_by_transform(truth, prediction, spacing):
    a, b = (mask & ~binary_erosion(mask) for mask in (truth, prediction))
    return [distance_transform_edt(~other, sampling=spacing[::-1])[own] for own, other in ((a, b), (b, a))]


@pytest.mark.parametrize("spacing", [(1, 1), (0.31, 0.12), (0.1, 2.0)])
@pytest.mark.parametrize("name", MASKS)
def test_distances_are_scipys(name, spacing):
    for other in MASKS.values():
        actual, expected = (function(MASKS[name], other, spacing)
                            for function in (boundary_distances, distances_by_transform))
        for a, b in zip(actual, expected):
            np.testing.assert_allclose(a, b, atol=1e-6)
        scores = mask_scores(MASKS[name].astype(np.uint8), other.astype(np.uint8), 2, spacing, 0.7)[1]
        assert scores["HD95"][1] == pytest.approx(max(np.percentile(side, 95) for side in expected), abs=1e-6)
        # one that lies at the tolerance but for rounding may fall to either side
        low, high = (np.mean(np.concatenate(expected) <= 0.7 + slack) for slack in (-1e-9, 1e-9))
        assert low <= scores["surface Dice"][1] <= high


def test_distances_of_nothing():
    empty, one = np.zeros((5, 6), bool), pixel((5, 6), 2, 3)
    assert [side.tolist() for side in boundary_distances(empty, empty)] == [[], []]
    assert [side.tolist() for side in boundary_distances(one, empty)] == [[np.inf], []]
    assert [side.tolist() for side in boundary_distances(empty, one)] == [[], [np.inf]]


def test_large_noisy_masks_stay_small_in_memory():
    """Some 600,000 boundary pixels against as many, whose pairs would be 3 TB, and against one."""
    noise = RNG.random((2, 1026, 1295)) < 0.5
    tracemalloc.start()
    try:
        for other in (noise[1], pixel((1026, 1295), 1025, 1294)):
            actual, expected = (function(noise[0], other, (0.3, 0.2))
                                for function in (boundary_distances, distances_by_transform))
            assert len(actual[0]) > 600_000
            for a, b in zip(actual, expected):
                np.testing.assert_allclose(a, b, atol=1e-6)
        tracemalloc.reset_peak()
        held = tracemalloc.get_traced_memory()[0]
        boundary_distances(*noise)
        assert tracemalloc.get_traced_memory()[1] - held < 200e6
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------- the scores of an image

def test_one_pixel_masks():
    """Three across and four down: 5 pixels, or in mm by hand; no pixel in common."""
    truth, prediction = pixel((20, 30), 4, 5).astype(np.uint8), pixel((20, 30), 8, 8).astype(np.uint8)
    counts, scores = mask_scores(truth, prediction, 2)
    assert counts.tolist() == [[598, 599, 599], [0, 1, 1]]
    assert (scores["HD95"][1], scores["surface Dice"][1], scores["Dice"][1], scores["IoU"][1]) == (5, 0, 0, 0)
    assert mask_scores(truth, prediction, 2, tolerance=5)[1]["surface Dice"][1] == 1
    for tolerance, share in ((0.72, 0), (0.73, 1)):
        scores = mask_scores(truth, prediction, 2, (0.2, 0.1), tolerance)[1]
        assert scores["HD95"][1] == pytest.approx(np.hypot(0.6, 0.4), abs=1e-9)
        assert scores["surface Dice"][1] == share
    same = mask_scores(truth, truth, 2)[1]
    assert [same[name][1] for name in metrics.MASK_SCORES] == [1, 1, 0, 1]


def test_surface_dice_is_the_share_of_both_boundaries():
    """A square of 8 boundary pixels and one pixel in its middle, 1 and 2 ** 0.5 away from them: 4 + 1 of 9."""
    square, middle = pixel((9, 9), slice(3, 6), slice(3, 6)), pixel((9, 9), 4, 4)
    for pair in ((square, middle), (middle, square)):
        truth, prediction = (mask.astype(np.uint8) for mask in pair)
        scores = mask_scores(truth, prediction, 2, tolerance=1)[1]
        assert scores["surface Dice"][1] == pytest.approx(5 / 9, abs=1e-9)
        assert scores["HD95"][1] == pytest.approx(np.percentile([1] * 4 + [2 ** 0.5] * 4, 95), abs=1e-9)


def test_hd95_leaves_out_the_farthest():
    """A disk and the same one with a speck far away: of its boundary pixels less than a twentieth."""
    truth = disk((100, 200), 40, 50, 25)
    prediction = truth | pixel((100, 200), 50, 190)
    scores = mask_scores(truth.astype(np.uint8), prediction.astype(np.uint8), 2)[1]
    assert scores["HD95"][1] == 0 and scores["surface Dice"][1] < 1
    speck = truth | disk((100, 200), 180, 50, 5)  # more than a twentieth
    back, there = (mask_scores(a.astype(np.uint8), b.astype(np.uint8), 2)[1]["HD95"][1]
                   for a, b in ((truth, speck), (speck, truth)))
    assert back == there > 100


def test_what_is_missing():
    """Classes: 1 in both, 2 missed, 3 a false alarm, 4 in neither; the background has no distances."""
    truth, prediction = np.zeros((2, 30, 40), np.uint8)
    truth[5:9, 5:9] = prediction[5:9, 5:9] = 1
    truth[20:22, 30:32], prediction[25, 3] = 2, 3
    counts, scores = mask_scores(truth, prediction, 5, (0.3, 0.2))
    assert counts.tolist() == [[1179, 1180, 1183], [16, 16, 16], [0, 4, 0], [0, 0, 1], [0, 0, 0]]
    diagonal = np.hypot(40 * 0.3, 30 * 0.2)  # from corner to corner: further than any two pixels
    expected = {"Dice": [2 * 1179 / 2363, 1, 0, np.nan, np.nan], "IoU": [1179 / 1184, 1, 0, np.nan, np.nan],
                "HD95": [np.nan, 0, diagonal, np.nan, np.nan], "surface Dice": [np.nan, 1, 0, np.nan, np.nan]}
    assert tuple(scores) == metrics.MASK_SCORES
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, atol=1e-9)
    nothing, everything = np.zeros((30, 40), np.uint8), np.ones((30, 40), np.uint8)
    assert np.isnan(mask_scores(nothing, prediction, 5)[1]["Dice"]).tolist() == [False] + [True] * 4
    assert np.isnan(mask_scores(everything, prediction, 5)[1]["IoU"]).tolist() == [True, False] + [True] * 3
    assert metrics.hd95(*boundary_distances(nothing > 0, nothing > 0), 9) is np.nan
    assert metrics.hd95(*boundary_distances(nothing > 0, everything > 0), 9) == 9
    assert np.isnan(metrics.surface_dice(*boundary_distances(nothing > 0, nothing > 0), 1))
    assert metrics.surface_dice(*boundary_distances(nothing > 0, everything > 0), 1) == 0


def test_distances_scale_with_the_pixel():
    truth, prediction = MASKS["disk"].astype(np.uint8), MASKS["blobs"].astype(np.uint8)
    pixels, mm = mask_scores(truth, prediction, 2)[1], mask_scores(truth, prediction, 2, (0.25, 0.25))[1]
    assert mm["HD95"][1] == pytest.approx(pixels["HD95"][1] / 4, abs=1e-9) and mm["Dice"][1] == pixels["Dice"][1]


@pytest.mark.parametrize("mm", [0.1, (0.1,), (0.1, 0), (0.1, -1), (0.1, np.nan), (np.inf, 1)])
def test_a_pixel_without_a_size_raises(mm):
    mask = MASKS["disk"]
    for function, arguments in ((mask_scores, (mask, mask, 2)), (head_circumference, (mask,))):
        with pytest.raises(ValueError, match="expected two lengths in mm, across and down"):
            function(*arguments, mm)


# ---------------------------------------------------------------- ellipses

@pytest.mark.parametrize("a, b", [(1, 1), (3, 2), (2, 3), (90.5, 70.25), (1, 0.01), (1, 1e-8), (1e6, 5e5), (7, 0)])
def test_circumference_is_the_elliptic_integral(a, b):
    long, short = max(a, b), min(a, b)
    expected = 4 * long * scipy.special.ellipe(1 - (short / long) ** 2)
    assert metrics.ellipse_circumference(a, b) == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------- heads

def test_heads_of_known_circumference():
    """Pixels are counted as in or out; the ellipse through the edges between them is not moved by it."""
    ratios = []
    for _ in range(30):
        a, angle, mm = RNG.uniform(40, 60), RNG.uniform(0, np.pi), RNG.uniform(0.3, 0.9, 2)
        b, (x, y) = a * RNG.uniform(0.65, 1), RNG.uniform(65, 75, 2)
        mask = disk([int(140 / size) for size in mm[::-1]], x, y, a, b, angle, mm)
        expected = metrics.ellipse_circumference(a, b)
        ratios.append(head_circumference(mask, mm) / expected)
    assert np.abs(np.array(ratios) - 1).max() < 1e-3 and abs(np.mean(ratios) - 1) < 1e-4


def test_a_head_cut_off_by_the_rim():
    mask = disk((200, 320), 150, 60, 110, 80, 0.3)
    assert mask[0].sum() > 100
    expected = metrics.ellipse_circumference(110, 80)
    assert head_circumference(mask, (1, 1)) == pytest.approx(expected, rel=2e-3)
    whole = head_circumference(disk((400, 320), 150, 160, 110, 80, 0.3), (1, 1))
    assert whole == pytest.approx(expected, rel=1e-3)


def test_holes_and_specks_are_no_head():
    head = disk((200, 200), 100, 90, 60, 45, 1.0)
    alone = head_circumference(head, (0.2, 0.3))
    holed = head & ~disk((200, 200), 110, 80, 15) & ~pixel((200, 200), 90, 70)
    assert head_circumference(holed, (0.2, 0.3)) == alone
    specked = head | disk((200, 200), 15, 180, 12) | pixel((200, 200), 3, slice(100, 200))
    assert head_circumference(specked, (0.2, 0.3)) == alone
    nearer = pixel((200, 200), 90, slice(130, 160))  # touches the head: a spike of it, which moves the ellipse
    assert head_circumference(head | nearer, (0.2, 0.3)) != alone


@pytest.mark.parametrize("mask", [np.zeros((9, 9), bool), np.ones((9, 9), bool), pixel((9, 9), 4, 4),
                                  pixel((9, 9), 0, 0), pixel((9, 9), slice(4, 9)), np.ones((1, 1), bool),
                                  pixel((40, 60), slice(10, 20)),
                                  np.abs(np.subtract.outer(np.arange(40), np.arange(60))) < 8],
                         ids=["empty", "full", "a pixel", "a corner", "half", "1 x 1", "a band", "a slanting band"])
def test_a_mask_without_an_ellipse_has_no_circumference(mask):
    assert np.isnan(head_circumference(mask, (1, 1)))


@pytest.mark.skipif("ULTRASOUND_DATA" not in os.environ, reason="needs ULTRASOUND_DATA, a folder of real ultrasound")
def test_real_heads():
    """HC18's masks hold the drawn outline itself: all are one pixel larger than what was measured, and nothing else."""
    folder = Path(os.environ["ULTRASOUND_DATA"]) / "hc18"
    with open(folder / "training_set_pixel_size_and_HC.csv") as file:
        rows = list(csv.reader(file))[1::5]
    further = []  # pixels between the ellipse of the mask and the one measured
    for name, mm, measured in rows:
        with Image.open(folder / "training_set" / name.replace(".jpg", "_Mask.png")) as image:
            mask = np.asarray(image.convert("L")) > 127
        further.append((head_circumference(mask, (float(mm),) * 2) - float(measured)) / (2 * np.pi * float(mm)))
    assert len(further) > 160 and np.abs(np.array(further) - 0.95).max() < 0.12 and np.std(further) < 0.03
