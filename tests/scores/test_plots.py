"""Pictures: they open, hold what was asked for at the right place, and survive odd names and numbers."""

import math
import os

import numpy as np
import pytest
from picture_tools import pixels

from scores import plots


def of_colour(image, colour):
    """(row, column) of the pixels that have this colour."""
    return np.argwhere((np.abs(image - colour) <= 2).all(-1))


def blobs(image, colour, side=9):
    """Centres (row, column) of the markers of a colour, from left to right: where a square of pixels has it all."""
    mask = (np.abs(image - colour) <= 2).all(-1)
    for axis in (0, 1):
        mask = np.lib.stride_tricks.sliding_window_view(mask, side, axis).all(-1)
    found = np.argwhere(mask) + side // 2
    found = found[np.argsort(found[:, 1], kind="stable")]
    groups = np.split(found, np.flatnonzero(np.diff(found[:, 1]) > side) + 1)
    return [group.mean(0) for group in groups if len(group)]


# ---------------------------------------------------------------- the confusion matrix

def confusion(tmp_path, counts, names=None, title="a title"):
    path = tmp_path / "confusion.png"
    plots.confusion_png(path, counts, names or [f"class {i}" for i in range(len(counts))], title)
    return pixels(path)


def cell_shades(image, K):
    """Mean brightness of the corner of each cell, where no text is: (K, K). The grid is found by its lines."""
    lines = (np.abs(image - plots.LIGHT) <= 1).all(-1)
    rows, columns = np.flatnonzero(lines.mean(1) > 0.3), np.flatnonzero(lines.mean(0) > 0.3)
    assert len(rows) == len(columns) == K + 1
    return np.array([[image[y + 3:y + 6, x + 3:x + 6].mean() for x in columns[:-1]] for y in rows[:-1]])


def test_shade_is_the_share_of_the_row(tmp_path):
    """The row with few images is shaded as the others; truth runs down, prediction across."""
    counts = np.array([[900, 100, 0], [3, 1, 6], [0, 0, 0]])
    shades = cell_shades(confusion(tmp_path, counts), 3)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    white_to_dark = 255 + share * (np.mean(plots.DARKEST) - 255)
    assert np.abs(shades - white_to_dark).max() < 1
    assert shades.argmin() == share.argmax() == 0 and (shades[2] == 255).all()


@pytest.mark.parametrize("K", [1, 2, 3, 6, 10, 30])
def test_pictures_of_any_number_of_classes(tmp_path, K):
    rng = np.random.default_rng(K)
    counts = rng.integers(0, 2000, (K, K))
    counts[:, 0] += 1
    image = confusion(tmp_path, counts)
    shades = cell_shades(image, K)
    assert np.array_equal(np.unravel_index(shades.argmin(), (K, K)),
                          np.unravel_index((counts / counts.sum(1, keepdims=True)).argmax(), (K, K)))
    assert image.shape[0] < 2200 and image.shape[1] < 2200


def test_sizes_grow_with_the_classes(tmp_path):
    sizes = [confusion(tmp_path, np.eye(K) * 100).shape[1] for K in (2, 3, 5, 30)]
    assert sizes == sorted(set(sizes)) and sizes[2] > 1000


def test_long_names_are_cut_and_stay_inside(tmp_path):
    """Nothing is drawn on the margin, however long names and title are; the picture does not grow with them."""
    long = confusion(tmp_path, np.eye(4) * 5, ["a name without an end " * 9 + str(i) for i in range(4)], "title " * 80)
    longer = confusion(tmp_path, np.eye(4) * 5, ["a name without an end " * 900] * 4, "title " * 80)
    assert long.shape == longer.shape and long.shape[1] < 1600
    for edge in (long[:10], long[-10:], long[:, :10], long[:, -10:]):
        assert (edge == 255).all()


def test_every_count_and_share_is_written(tmp_path):
    """Cells that differ by their count alone look different, with their share alone, too; fractions are allowed."""
    def cell(counts):
        image = confusion(tmp_path, counts)
        return image[:, image.shape[1] // 2:]  # of two classes the right column
    assert not np.array_equal(cell([[5, 5], [0, 1]]), cell([[6, 6], [0, 1]]))
    assert not np.array_equal(cell([[5, 5], [0, 1]]), cell([[1000, 5], [0, 1]]))
    assert not np.array_equal(cell([[5, 5.5], [0, 1]]), cell([[5, 5.25], [0, 1]]))


def test_wrong_matrices_are_refused(tmp_path):
    for counts, names in ((np.eye(3), ["a", "b"]), (np.ones((2, 3)), ["a", "b"]), (np.zeros((0, 0)), [])):
        with pytest.raises(ValueError, match="confusion matrix"):
            plots.confusion_png(tmp_path / "x.png", counts, names, "title")
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- curves

def curves(tmp_path, curves, title="title", chance=None):
    path = tmp_path / "curves.png"
    plots.curves_png(path, curves, title, "shots", "balanced accuracy", chance)
    return pixels(path)


def in_plot(image):
    """The plot without its legend: left of the frame's right-hand side."""
    return image[:, :np.flatnonzero((image.mean(-1) < 200).sum(0) > 600).max()]


def test_markers_stand_at_their_values(tmp_path):
    """Across: the logarithm of shots. Upwards: a straight line in y. The dashed line at 0.6 is as high as 0.6."""
    bare = float("nan")
    image = in_plot(curves(tmp_path, {"ours": [(1, 0.2, bare, bare), (100, 0.4, bare, bare), (10, 0.6, bare, bare)]},
                           chance=0.6))
    (y1, x1), (y10, x10), (y100, x100) = blobs(image, plots.COLOURS[0])
    assert abs((x10 - x1) - (x100 - x10)) < 1.5 and x10 - x1 > 300
    assert abs((y1 - y10) - 2 * (y1 - y100)) < 1.5 and y1 - y10 > 400
    dashes = of_colour(image[:, :int(x1)], plots.GREY)
    rows, counts = np.unique(dashes[:, 0], return_counts=True)
    assert abs(rows[counts > 20][1:].mean() - y10) < 1.5  # the first row is the frame's


def test_error_bars_reach_from_low_to_high(tmp_path):
    """The ends of the bar of one curve are as high as the markers of the other."""
    bare = float("nan")
    image = in_plot(curves(tmp_path, {"a": [(1, 0.5, 0.3, 0.8)], "b": [(1, 0.3, bare, bare), (2, 0.8, bare, bare)]}))
    bar = of_colour(image, plots.COLOURS[0])[:, 0]
    markers = blobs(image, plots.COLOURS[1])
    assert abs(bar.max() - markers[0][0]) < 3 and abs(bar.min() - markers[1][0]) < 3
    assert len(np.unique(bar)) > 0.95 * np.ptp(bar)  # and everything between is drawn, but for the marker's white edge


def test_nan_points_are_left_out(tmp_path):
    nan = float("nan")
    full = curves(tmp_path, {"a": [(1, 0.5, 0.4, 0.6), (20, 0.7, 0.6, 0.8)], "b": [(1, nan, nan, nan)]})
    with_nan = curves(tmp_path, {"a": [(1, 0.5, 0.4, 0.6), (5, nan, 0, 9), (20, 0.7, 0.6, 0.8)], "b": []})
    assert np.array_equal(full, with_nan) and len(blobs(in_plot(full), plots.COLOURS[0])) == 2
    assert not blobs(in_plot(full), plots.COLOURS[1])
    half = curves(tmp_path, {"a": [(1, 0.5, 0.4, nan), (20, 0.7, nan, 0.8)]})  # half a bar is none
    bare = curves(tmp_path, {"a": [(1, 0.5, nan, nan), (20, 0.7, nan, nan)]})
    assert len(of_colour(in_plot(half), plots.COLOURS[0])) < 1.1 * len(of_colour(in_plot(bare), plots.COLOURS[0]))
    for nothing in ({}, {"a": []}, {"a": [(1, nan, nan, nan)]}):
        with pytest.raises(ValueError, match="no curve has a point"):
            curves(tmp_path, nothing)


def test_names_of_x_stand_in_equal_steps_and_shots_may_be_numpy_numbers(tmp_path):
    shares = [("1 %", 0.5, 0.4, 0.6), ("10 %", 0.6, 0.4, 0.7), ("all", 0.7, 0.6, 0.8)]
    named = in_plot(curves(tmp_path, {"a": shares}))
    first, second, third = (column for _, column in blobs(named, plots.COLOURS[0]))
    assert abs((second - first) - (third - second)) < 1.5
    shots = [[(kind(x), 0.5, 0.4, 0.6) for x in (1, 5, 20)] for kind in (int, np.int64, np.float32)]
    images = [curves(tmp_path, {"a": some}) for some in shots]
    assert np.array_equal(images[0], images[1]) and np.array_equal(images[0], images[2])
    first, second, third = (column for _, column in blobs(in_plot(images[0]), plots.COLOURS[0]))
    assert abs((second - first) / (third - first) - math.log(5) / math.log(20)) < 0.01


def test_curves_differ_by_colour_and_marker_and_do_not_cover_one_another(tmp_path):
    same = {f"model {i}": [(x, 0.5, 0.4, 0.6) for x in (1, 5, 20)] for i in range(6)}
    image = in_plot(curves(tmp_path, same))
    columns = [[column for _, column in blobs(image, plots.COLOURS[i], side=9)] for i in range(6)]
    assert all(len(some) == 3 for some in columns)
    assert (np.diff(np.array(columns), axis=0) > 8).all()  # side by side, in their order
    pairs = {(i % len(plots.COLOURS), i % len(plots.MARKERS)) for i in range(35)}
    assert len(pairs) == 35


def test_close_shots_keep_their_curves_apart(tmp_path):
    """With many shots the curves of one do not reach into the next."""
    nan = float("nan")
    points = {i: [(x, 0.5 + 0.05 * i, nan, nan) for x in range(40, 64)] for i in range(5)}
    image = in_plot(curves(tmp_path, points))
    first, last = (blobs(image, plots.COLOURS[i]) for i in (0, 4))
    assert len(first) == len(last) == 24
    assert all(a[1] < b[1] < c[1] for a, b, c in zip(first, last, first[1:]))


def test_legend_holds_every_curve_and_chance(tmp_path):
    """Colours found right of the plot; thirty names make the picture taller, long ones do not push the plot away."""
    image = curves(tmp_path, {f"model {i}": [(1, 0.1 * i, 0, 1)] for i in range(5)}, chance=0.2)
    legend = image[:, in_plot(image).shape[1] + 5:]
    rows = [blobs(legend, plots.COLOURS[i])[0][0] for i in range(5)]
    assert rows == sorted(rows) and min(np.diff(rows)) > 30
    assert image.shape == (1000, 1600, 3)
    many = curves(tmp_path, {f"{i} " * 90: [(1, 0.1, 0, 1), (9, 0.2, 0, 1)] for i in range(30)})
    frame = np.flatnonzero((many.mean(-1) < 200).sum(0) > 900)  # the columns of its left and its right side
    beside = np.delete(many, np.s_[frame.min():frame.max()], axis=1)[:, :frame.min() + 5]
    assert all(len(of_colour(beside, colour)) == 0 for colour in plots.COLOURS[:6])  # no curve outside
    assert many.shape[0] > 1500 and in_plot(many).shape[1] > 700 and (many[:, -10:] == 255).all()


@pytest.mark.parametrize("values, expected", [
    ([0.31, 0.9], "0.3 0.4 0.5 0.6 0.7 0.8 0.9"), ([0, 1], "0.0 0.2 0.4 0.6 0.8 1.0"), ([40, 90], "40 50 60 70 80 90"),
    ([-0.2, 0.1], "-0.20 -0.15 -0.10 -0.05 0.00 0.05 0.10"), ([0.5], "0.47 0.48 0.49 0.50 0.51 0.52 0.53")])
def test_ticks_are_round_numbers(values, expected):
    low, high, ticks = plots._y_axis(values)
    assert list(ticks.values()) == expected.split()
    assert all(float(text) == pytest.approx(tick) for tick, text in ticks.items())
    assert low < min(values) and max(values) < high


@pytest.mark.parametrize("exponent", range(-9, 9))
def test_ticks_at_powers_of_ten(exponent):
    for factor in (1, 3.5714285714285716, 4 / 1.12, 2, 5):
        low, high, ticks = plots._y_axis([0, factor * 10.0**exponent])
        assert 4 <= len(ticks) <= 12 and low <= min(ticks) and max(ticks) <= high
        assert len(set(ticks.values())) == len(ticks)


# ---------------------------------------------------------------- text and files

ODD = ["Überlänge ß", "胎児 腹部", "ультразвук", "عربي", "👶 baby", "line\nbreak\tand tab",
       "\udcff not UTF-8", "", "\x00\x1b"]


def test_odd_names_do_not_crash(tmp_path):
    confusion(tmp_path, np.eye(len(ODD)) * 3, ODD, "\n".join(ODD))
    image = curves(tmp_path, {name: [("all", 0.1 * i, 0, 1), (name, 0.5, 0.4, 0.6)] for i, name in enumerate(ODD)},
                   "\n".join(ODD))
    assert image.shape[1] == 1600
    confusion(tmp_path, [[1]], [""], "")


def test_shortened_text_fits_and_short_text_stays():
    font = plots.ImageFont.load_default(30)
    assert plots._shorten("fetal brain", font, 400) == "fetal brain"
    short = plots._shorten("fetal brain, trans-thalamic, third trimester", font, 300)
    assert short.startswith("fetal brain") and short.endswith("…") and font.getlength(short) <= 300
    assert len(short) > 15


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    before = confusion(tmp_path, np.eye(2))
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        confusion(tmp_path, np.eye(3))
    assert os.listdir(tmp_path) == ["confusion.png"] and np.array_equal(pixels(tmp_path / "confusion.png"), before)
    with pytest.raises(OSError):
        plots.confusion_png(tmp_path / "nowhere" / "x.png", np.eye(2), ["a", "b"], "title")
