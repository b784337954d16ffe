"""The picture of the gates: cells where they belong, shades by share, within its width, wrong shapes refused."""

import os

import numpy as np
import pytest
from picture_tools import pixels

from scores import plots


def gates(tmp_path, shares, tasks=None, layers=None, title="gates"):
    """The picture as int16 (h, w, 3); tasks and blocks are numbered unless named."""
    T, L, _ = np.shape(shares)
    path = tmp_path / "gates.png"
    plots.gates_png(path, shares, tasks or [f"task {t}" for t in range(T)], layers or [f"block {l}" for l in range(6, 6 + L)], title)
    return pixels(path)


def cells(image, T, E):
    """Brightness of the cells' corners, where no text is, panel by panel as they are read: (panels, T, E).

    Columns and rows of cells are found by the lines between them: each panel has E + 1 and T + 1.
    """
    lines = (np.abs(image - plots.LIGHT) <= 1).all(-1)
    lines[-80:] = False  # the key below
    rows = np.flatnonzero(lines.sum(1) > 0.8 * lines.sum(1).max())
    columns = np.flatnonzero(lines.sum(0) > 0.8 * lines.sum(0).max())
    assert len(rows) % (T + 1) == len(columns) % (E + 1) == 0
    found = []
    for ys in rows.reshape(-1, T + 1):
        for xs in columns.reshape(-1, E + 1):
            found.append([[image[y + 2:y + 5, x + 2:x + 5].mean() for x in xs[:-1]] for y in ys[:-1]])
    return np.array(found)


@pytest.mark.parametrize("T, L, E", [(1, 1, 2), (5, 6, 4), (2, 3, 8), (27, 6, 8), (3, 2, 40)])
def test_the_shade_is_the_share_of_the_largest(tmp_path, T, L, E):
    shares = np.random.default_rng(T).dirichlet(np.ones(E), (T, L))
    image = gates(tmp_path, shares)
    assert image.shape[1] <= plots.WIDTH
    shades = cells(image, T, E)[:L]  # the last row of panels may be short
    white_to_dark = 255 + shares / shares.max() * (np.mean(plots.DARKEST) - 255)
    assert np.abs(shades.transpose(1, 0, 2) - white_to_dark).max() < 1  # (T, L, E)


def test_the_largest_picture_is_readable(tmp_path):
    """27 tasks, 6 blocks, 8 experts: cells of 40 pixels and more, each with its percent, whatever tasks are called."""
    shares = np.full((27, 6, 8), 0.125)
    names = [f"a name that is far too long to be shown {t}" for t in range(27)]
    image = gates(tmp_path, shares, names)
    assert 1400 < image.shape[1] <= plots.WIDTH and image.shape[0] < 4000
    shares[13, 2, 5] = 0.05
    changed = np.argwhere((gates(tmp_path, shares, names) != image).any(-1))
    assert (np.ptp(changed, axis=0) >= 30).all()  # one cell, and no other pixel
    assert (np.ptp(changed, axis=0) <= (36, 72)).all()


def test_a_share_is_written_in_percent(tmp_path):
    """The same shades, other numbers: all cells equal, of 2 experts or of shares that sum to less."""
    half, third = (gates(tmp_path, np.full((1, 1, 2), share)) for share in (0.5, 0.33))
    assert half.shape == third.shape and np.array_equal(cells(half, 1, 2), cells(third, 1, 2))
    assert not np.array_equal(half[:-90], third[:-90])  # in the cells
    assert not np.array_equal(half[-90:], third[-90:])  # at the key's dark end
    narrow = [gates(tmp_path, np.full((1, 1, 60), share))[:-90] for share in (0.5, 0.33)]
    assert np.array_equal(*narrow)  # too narrow for numbers


def test_blocks_tasks_and_title_are_written(tmp_path):
    shares = np.full((2, 2, 3), 1 / 3)
    plain = gates(tmp_path, shares, ["aa", "bb"], [6, 7])
    for other in (gates(tmp_path, shares, ["aa", "bb"], [6, 8]), gates(tmp_path, shares, ["bb", "aa"], [6, 7]),
                  gates(tmp_path, shares, ["aa", "bb"], [6, 7], "other")):
        assert other.shape != plain.shape or not np.array_equal(other, plain)


def test_nothing_is_drawn_on_the_margin(tmp_path):
    shares = np.random.default_rng(0).dirichlet(np.ones(4), (3, 7))
    image = gates(tmp_path, shares, ["胎児 腹部", "line\nbreak", "x" * 900], title="a long title " * 40)
    for edge in (image[:10], image[-10:], image[:, :10], image[:, -10:]):
        assert (edge == 255).all()


def test_shares_of_nothing_are_white(tmp_path):
    assert (cells(gates(tmp_path, np.zeros((2, 2, 3))), 2, 3) == 255).all()


@pytest.mark.parametrize("shares, message", [
    (np.ones((2, 3)), "gates"), (np.full((3, 2, 4), 0.25), "of 2 tasks and 2 blocks"),
    (np.full((2, 3, 4), 0.25), "of 2 tasks and 2 blocks"), (np.ones((2, 2, 0)), "at least one of each"),
    (np.full((2, 2, 4), np.nan), "shares from 0 to 1"), (np.full((2, 2, 4), -0.1), "shares from 0 to 1"),
    (np.full((2, 2, 4), 25.0), "shares from 0 to 1, found 25 to 25"),
    (np.full((2, 2, 600), 0.1), "600 experts do not fit")])
def test_wrong_gates_are_refused(tmp_path, shares, message):
    with pytest.raises(ValueError, match=message):
        plots.gates_png(tmp_path / "x.png", shares, ["a", "b"], [0, 1], "title")
    assert not os.listdir(tmp_path)
