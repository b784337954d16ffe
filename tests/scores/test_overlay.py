"""Masks drawn over images: outlines where the masks end, in the legend's colours, whatever sizes and names come."""
import os

import numpy as np
import pytest
from picture_tools import GREY, flat, is_colour, pixels, runs, square

from frames.shapes import CLASS_COLOURS, outlined
from scores import plots


def overlay(tmp_path, rows, classes=("background", "head"), title="a title"):
    plots.overlay_png(tmp_path / "overlay.png", rows, list(classes), title)
    return pixels(tmp_path / "overlay.png")


def tiles(image):
    """(top, bottom, left, right) of the images in an overlay, from left to right and down: found by their grey."""
    mask = is_colour(image, GREY)
    for axis in (0, 1):  # letters have no squares of 7 pixels of it
        mask = np.lib.stride_tricks.sliding_window_view(mask, 7, axis).all(-1)
    found = []
    for top, bottom in runs(mask.any(1)):
        found += [(top, bottom + 6, left, right + 6) for left, right in runs(mask[top:bottom].any(0))]
    return found


# ---------------------------------------------------------------- the whole picture

def test_a_row_holds_image_truth_and_prediction(tmp_path):
    rows = [(f"image {i}", flat(30, 40), square((30, 40), 5, 20, 5, 20), square((30, 40), 8, 25, 15, 38))
            for i in range(2)]
    image = overlay(tmp_path, rows)
    tops = [top for top, _ in runs(is_colour(image, GREY).sum(1) > 250)]
    assert len(tops) == 2  # two rows
    first = is_colour(image[tops[0]], GREY)
    lefts = [left for left, right in runs(first) if right - left > 100]
    assert len(lefts) == 3 and np.ptp(np.diff(lefts)) <= 1
    for top in tops:
        bare, truth, prediction = (image[top:top + 240, left:left + 320] for left in lefts)  # eight times as large
        assert (bare == GREY).all()
        assert np.array_equal(truth, np.asarray(outlined(*rows[0][1:3], (320, 240))))
        seen = np.argwhere(is_colour(prediction, CLASS_COLOURS[1]))
        assert np.abs(seen.min(0) - (64, 120)).max() <= 3 and np.abs(seen.max(0) - (200, 304)).max() <= 3
        assert np.abs(prediction[130, 200] - (0.8 * GREY + 0.2 * np.array(CLASS_COLOURS[1]))).max() <= 1
    same = overlay(tmp_path, [(name, bare, truth, truth) for name, bare, truth, _ in rows])
    assert not np.array_equal(image, same) and image.shape == same.shape


@pytest.mark.parametrize("shape, shown", [((30, 40), (240, 320)), ((600, 900), (240, 360)), ((900, 300), (240, 80)),
                                          ((20, 2000), (5, 498)), ((2000, 3), (240, 1)), ((1, 1), (240, 240)),
                                          ((1, 3000), (1, 498)), ((240, 498), (240, 498))])
def test_images_of_any_size_share_a_height(tmp_path, shape, shown):
    empty = np.zeros(shape, np.uint8)
    image = overlay(tmp_path, [("x", flat(*shape), empty, empty)])
    found = is_colour(image, GREY)
    left, top = plots.MARGIN, np.flatnonzero(found[:, plots.MARGIN])[-shown[0]]  # the tiles are the last of this grey
    assert found[top:top + shown[0], left:left + shown[1]].all()
    assert not found[top:top + shown[0], left + shown[1]].any() and not found[top + shown[0]:].any()
    ones = np.ones(shape, np.uint8)
    assert overlay(tmp_path, [("x", flat(*shape), ones, ones)]).shape[1] == image.shape[1] <= 1600


def test_rows_of_different_sizes_share_columns(tmp_path):
    shapes = [(30, 40), (100, 415), (40, 30)]
    image = overlay(tmp_path, [("x", flat(*shape), None, np.zeros(shape, np.uint8)) for shape in shapes])
    found = tiles(image)
    assert len(found) == 6 and len({left for _, _, left, _ in found}) == 2
    assert [(right - left, bottom - top) for top, bottom, left, right in found[::2]] == [
        (320, 240), (498, 120), (180, 240)]
    first, second, third = found[::2]
    assert second[0] - first[1] == third[0] - second[1] < 80  # a low image leaves no hole below it


def test_without_truth_its_column_is_left_out_or_its_place_empty(tmp_path):
    empty = np.zeros((24, 24), np.uint8)
    assert len(tiles(overlay(tmp_path, [("x", flat(24, 24), None, empty)]))) == 2
    some = overlay(tmp_path, [("x", flat(24, 24), None, empty), ("y", flat(24, 24), empty, empty)])
    lefts = [left for _, _, left, _ in tiles(some)]
    assert len(lefts) == 5 and lefts[0] == lefts[2] and lefts[1] == lefts[4] > lefts[3]


def test_legend_names_what_is_drawn(tmp_path):
    """A patch of each colour below the images, in order of the classes; without structures there is no legend."""
    classes = ["background"] + [f"structure {i}" for i in range(1, 28)]
    shape = (60, 60)
    truth, prediction = square(shape, 5, 20, 5, 20, 3), square(shape, 5, 20, 5, 20, 12)
    image = overlay(tmp_path, [("x", flat(*shape), truth, prediction)], classes)
    legend = image[tiles(image)[0][1]:]
    patches = {number: np.argwhere(is_colour(legend, CLASS_COLOURS[number])) for number in range(1, 28)}
    assert [number for number, found in patches.items() if len(found) > 400] == [3, 12]
    assert patches[3][:, 1].max() < patches[12][:, 1].min() and patches[3][0, 0] == patches[12][0, 0]
    empty = overlay(tmp_path, [("x", flat(*shape), truth * 0, truth * 0)], classes)
    assert empty.shape[0] < image.shape[0] and (empty[tiles(empty)[0][1]:] == 255).all()
    every = np.arange(60 * 60).reshape(shape) // 120 % 28  # two rows of each class
    full = overlay(tmp_path, [("x", flat(*shape), None, every.astype(np.uint8))], classes)
    below = full[tiles(full)[0][1]:]
    assert all(is_colour(below, colour).sum() >= 400 for colour in CLASS_COLOURS[1:])
    assert (full[:, -10:] == 255).all() and (full[-10:] == 255).all()


ODD = ["Überlänge ß", "胎児 頭部", "голова", "رأس", "👶 head", "line\nbreak\tand tab", "\udcff not UTF-8", "",
       "\x00\x1b"]


def test_odd_and_long_names_stay_inside(tmp_path):
    mask = np.arange(10, dtype=np.uint8).repeat(40).reshape(20, 20)
    rows = [(name, flat(20, 20), mask, mask) for name in ODD]
    image = overlay(tmp_path, rows, ["background", *ODD], "\n".join(ODD))
    assert len(runs(is_colour(image, GREY).sum(1) > 100)) >= len(ODD)
    long = overlay(tmp_path, [("a text without an end " * 50, flat(20, 20), mask, mask)],
                   ["background"] + ["a name without an end " * 50] * 9, "a title " * 30)
    short = overlay(tmp_path, [("a text", flat(20, 20), mask, mask)], ["background"] + ["a name"] * 9)
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0]
    for edge in (long[:10], long[-10:], long[:, :10], long[:, -10:]):
        assert (edge == 255).all()


def test_texts_are_written(tmp_path):
    empty = np.zeros((20, 20), np.uint8)
    pictures = [overlay(tmp_path, [(text, flat(20, 20), empty, empty)], title=title).tobytes()
                for text, title in (("Dice 0.91", "HC18"), ("Dice 0.92", "HC18"), ("Dice 0.91", "BUSI"))]
    assert len(set(pictures)) == 3


def test_wrong_masks_are_refused(tmp_path):
    good = square((20, 30), 2, 5, 2, 5)
    for rows, message in (([], "no image to draw"), ([("one", flat(20, 30), good.T, good)], "one: mask .*30, 20"),
                          ([("two", flat(20, 30), None, good.T)], "two: mask .*30, 20.*needs .*20, 30"),
                          ([("a", flat(20, 30), good, good), ("b", flat(20, 30), good, good * 2)], "b: .* up to 2")):
        with pytest.raises(ValueError, match=message):
            overlay(tmp_path, rows)
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- which images

@pytest.mark.parametrize("scores, expected", [
    ([0.5], [0, 0, 0]), ([0.2, 0.9], [1, 0, 0]), ([0.3, 0.1, 0.2], [0, 2, 1]), ([0.7, 0.7, 0.7], [0, 0, 0]),
    ([0.1, 0.9, 0.9, 0.5, 0.1], [1, 3, 0]), ([np.nan, 0.4, np.nan, 0.6, 0.5], [3, 4, 1]),
    ([0, np.nan, 0, 0, 1], [4, 0, 0]), ([1, 2, 3, 4], [3, 1, 0])])
def test_best_median_worst(scores, expected):
    found = plots.best_median_worst(scores)
    assert list(found) == expected and all(type(index) is int for index in found)


def test_the_median_is_numpys_lower_median():
    rng = np.random.default_rng(0)
    for n in range(1, 40):
        scores = rng.integers(0, 12, n) / 12
        scores[rng.random(n) < 0.3] = np.nan
        if np.isnan(scores).all():
            continue
        best, median, worst = plots.best_median_worst(scores)
        assert scores[median] == np.nanpercentile(scores, 50, method="inverted_cdf")
        assert best == np.nanargmax(scores) and worst == np.nanargmin(scores)


@pytest.mark.parametrize("scores", [[], [np.nan, np.nan]])
def test_without_any_score_there_is_no_best(scores):
    with pytest.raises(ValueError, match="no image has a score"):
        plots.best_median_worst(scores)
