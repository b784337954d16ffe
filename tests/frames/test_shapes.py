"""Connected parts against SciPy, ellipses against the unabridged eigenproblem, outlines where masks end."""
import numpy as np
import pytest
import scipy.linalg
from picture_tools import GREY, flat, is_colour, runs, square
from scipy import ndimage

from frames.shapes import CLASS_COLOURS, class_colour, fit_ellipse, label, outlined

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("density", [0.0, 0.3, 0.55, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (37, 53)], ids="{0[0]}x{0[1]}".format)
def test_label_equals_scipy(shape, density):
    for seed in range(5):
        mask = np.random.default_rng(seed).random(shape) < density
        ours, (theirs, count) = label(mask), ndimage.label(mask)
        assert np.array_equal(ours > 0, mask)
        pairs = np.unique(np.stack([ours[mask], theirs[mask]]), axis=1)
        assert pairs.shape[1] == count == len(np.unique(ours[mask]))  # one name of ours for each of theirs
        if count:
            assert np.bincount(ours[mask]).max() == np.bincount(theirs[mask]).max()


def test_label_follows_a_spiral():
    mask = np.zeros((61, 61), bool)
    y, x, dy, dx, length = 30, 30, 0, 1, 2
    while length < 58:
        for _ in range(length):
            mask[y, x], y, x = True, y + dy, x + dx
        dy, dx, length = dx, -dy, length + (dx == 0) * 2
    assert ndimage.label(mask)[1] == 1 and len(np.unique(label(mask))) == 2


# ---------------------------------------------------------------- ellipses

def on_ellipse(x, y, a, b, angle, m=40, start=0.0, turn=2 * np.pi):
    t = start + turn * np.arange(m) / m
    u, v = a * np.cos(t), b * np.sin(t)
    return np.stack((x + u * np.cos(angle) - v * np.sin(angle), y + u * np.sin(angle) + v * np.cos(angle)), 1)


@pytest.mark.parametrize("ellipse", [(0, 0, 2, 1, 0.5), (300, 150, 90, 70, 3.0), (1e5, -2e5, 40, 39, 1.5),
                                     (5, 5, 1000, 30, 0.7), (0, 0, 1e-4, 5e-5, 2.0), (7, 8, 1, 1, 0.0)])
@pytest.mark.parametrize("m, turn, error", [(40, 2 * np.pi, 1e-8), (5, 2 * np.pi, 1e-8), (40, 2.0, 1e-4)],
                         ids=["all around", "five points", "an arc"])
def test_points_on_an_ellipse_give_it_back(ellipse, m, turn, error):
    x, y, a, b, angle = fit_ellipse(on_ellipse(*ellipse, m, 0.3, turn))
    assert (x, y) == pytest.approx(ellipse[:2], abs=error * ellipse[2])
    assert (a, b) == pytest.approx(ellipse[2:4], rel=error)
    assert 0 <= angle < np.pi and a >= b > 0
    assert ellipse[2] == ellipse[3] or angle == pytest.approx(ellipse[4], abs=100 * error)


def conic(x, y, a, b, angle):
    """(6,): A x^2 + B x y + C y^2 + D x + E y + F = 0, scaled to 4 A C - B^2 = 1."""
    c, s = np.cos(angle), np.sin(angle)
    A, B, C = (c / a) ** 2 + (s / b) ** 2, 2 * c * s * (a ** -2 - b ** -2), (s / a) ** 2 + (c / b) ** 2
    all_of_it = np.array([A, B, C, -2 * A * x - B * y, -2 * C * y - B * x, A * x * x + B * x * y + C * y * y - 1])
    return all_of_it / np.sqrt(4 * A * C - B * B)


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.4])
def test_noisy_points_solve_fitzgibbons_eigenproblem(noise):
    """The 6 x 6 problem as first published, solved by SciPy: S v = lambda C v with the one positive lambda."""
    points = on_ellipse(0.2, -0.1, 1.5, 0.8, 0.6) + noise * RNG.normal(size=(40, 2))
    x, y = points.T
    design = np.stack((x * x, x * y, y * y, x, y, x * 0 + 1), 1)
    constraint = np.zeros((6, 6))
    constraint[0, 2] = constraint[2, 0] = 2
    constraint[1, 1] = -1
    values, vectors = scipy.linalg.eig(design.T @ design, constraint)
    chosen, = np.flatnonzero(np.isfinite(values) & (values.real > 0))
    v = vectors[:, chosen].real
    v = v * np.sign(v[0]) / np.sqrt(v @ constraint @ v)
    np.testing.assert_allclose(conic(*fit_ellipse(points)), v, atol=1e-6)


def test_a_fit_moves_with_its_points():
    points = on_ellipse(0, 0, 3, 2, 0.4) + 0.1 * RNG.normal(size=(40, 2))
    x, y, a, b, angle = fit_ellipse(points)
    c, s = np.cos(1.0), np.sin(1.0)
    turn = np.array([[c, s], [-s, c]])  # of row vectors, by 1 radian
    moved = fit_ellipse(50 * points @ turn + (4000, -7000))
    middle = 50 * np.array([x, y]) @ turn + (4000, -7000)
    assert moved == pytest.approx((*middle, 50 * a, 50 * b, (angle + 1) % np.pi), rel=1e-7)


@pytest.mark.parametrize("points", [np.zeros((0, 2)), on_ellipse(0, 0, 2, 1, 0, 4), np.ones((9, 2)),
                                    np.stack((np.arange(9), 3 - 2 * np.arange(9)), 1), np.full((9, 2), np.nan),
                                    np.repeat([[0, 0], [1, 5]], 9, 0), np.ones((9, 3)),
                                    np.repeat([[0, 0], [1, 5], [3, 2]], 9, 0), np.argwhere(np.ones((9, 2))),
                                    np.stack((np.linspace(-1, 1, 9), np.linspace(-1, 1, 9) ** 2), 1)],
                         ids=["none", "four", "one place", "a line", "nan", "two places", "three axes", "three places",
                              "two lines", "a parabola"])
def test_points_that_make_no_ellipse_raise(points):
    with pytest.raises(ValueError, match="no ellipse"):
        fit_ellipse(points)


# ---------------------------------------------------------------- outlines

def test_outline_of_a_square_runs_along_its_edge():
    """40 x 60 pixels shown four times as large: a line of 2 to 3 pixels over the edge, all else untouched."""
    shown = np.asarray(outlined(flat(40, 60), square((40, 60), 10, 30, 15, 45), (240, 160)))
    colour = CLASS_COLOURS[1]
    untouched = is_colour(shown, (GREY,) * 3)
    for line, edges in ((80, (60, 180)), (120, (40, 120))):  # a row of the picture, then a column
        across = ~untouched[line] if line == 80 else ~untouched[:, line]
        exact = is_colour(shown, colour)[line] if line == 80 else is_colour(shown, colour)[:, line]
        assert len(runs(across)) == 2
        for (first, end), edge in zip(runs(across), edges):
            assert first <= edge <= end and 2 <= end - first <= 4 and exact[first:end].sum() >= 1
    assert untouched[44:116, 64:176].all() and untouched[:37].all() and untouched[:, 184:].all()


@pytest.mark.parametrize("size", [(60, 40), (240, 160), (30, 20)])
def test_outlines_of_turned_masks_are_turned(size):
    """No line leans to a side, not even by a part of a pixel."""
    mask = square((40, 60), 7, 30, 11, 45)
    shown = np.asarray(outlined(flat(40, 60), mask, size))
    assert np.array_equal(np.asarray(outlined(flat(40, 60), mask[::-1].copy(), size)), shown[::-1])
    assert np.array_equal(np.asarray(outlined(flat(40, 60), mask[:, ::-1].copy(), size)), shown[:, ::-1])


def test_fill_is_faint_and_inside():
    mask = square((40, 60), 10, 30, 15, 45, 2)
    shown = np.asarray(outlined(flat(40, 60), mask, (240, 160), 0.2)).astype(int)
    blend = np.round(0.8 * GREY + 0.2 * np.array(CLASS_COLOURS[2]))
    assert np.abs(shown[44:116, 64:176] - blend).max() <= 1
    assert (shown[:37] == GREY).all() and (shown[:, :56] == GREY).all()


def test_image_shows_through_in_its_place():
    image = np.zeros((50, 50), np.uint8)
    image[:, 25:] = 200
    shown = np.asarray(outlined(image, np.zeros_like(image), (100, 100))).astype(int)
    assert np.abs(shown[:, :46]).max() <= 2 and np.abs(shown[:, 54:] - 200).max() <= 2
    assert shown[:, 40:60].mean() == pytest.approx(100, abs=3)


@pytest.mark.parametrize("shape", [(600, 900), (37, 53), (3000, 2000), (240, 240)])
def test_a_single_pixel_still_shows(shape):
    row, column = shape[0] // 3, shape[1] // 4
    size = (round(240 * shape[1] / shape[0]), 240)
    shown = np.asarray(outlined(flat(*shape), square(shape, row, row + 1, column, column + 1), size)).astype(int)
    touched = np.argwhere((shown != GREY).any(-1))
    centre = (np.array([row, column]) + 0.5) * 240 / shape[0]
    assert np.abs(touched.mean(0) + 0.5 - centre).max() < 1 and np.ptp(touched, axis=0).max() <= 240 / shape[0] + 4
    share = (shown[..., 0] - GREY) / (CLASS_COLOURS[1][0] - GREY)  # of the colour: a dot may lie astride pixels
    assert share.max() > 0.8 and share.sum() > 3


def test_what_the_border_cuts_is_outlined_there_too():
    shown = outlined(flat(50, 50), square((50, 50), 0, 50, 0, 50), (100, 100))
    seen = is_colour(shown, CLASS_COLOURS[1])
    assert seen[0].all() and seen[-1].all() and seen[:, 0].all() and seen[:, -1].all() and not seen[3:-3, 3:-3].any()


@pytest.mark.parametrize("inner, outer", [(1, 2), (2, 1)])
def test_a_small_structure_lies_on_top_of_the_one_around_it(inner, outer):
    mask = square((80, 80), 10, 70, 10, 70, outer)
    mask[36:44, 36:44] = inner
    shown = np.asarray(outlined(flat(80, 80), mask, (240, 240)))
    line = shown[120, 95:125]  # from within the outer one into the inner one, whose edge is at 108
    assert is_colour(line, CLASS_COLOURS[inner])[12:15].any() and not is_colour(
        line, CLASS_COLOURS[outer])[12:16].any()
    assert is_colour(shown[120, 25:35], CLASS_COLOURS[outer]).any()


def test_many_classes_have_colours_of_their_own():
    """At least 27, none grey or dark, all apart as CIELAB tells; further classes start over."""
    colours = np.array(CLASS_COLOURS[1:])
    assert len(colours) >= 27 and tuple(CLASS_COLOURS[0]) == (0, 0, 0)
    linear = np.where(colours <= 10, colours / 255 / 12.92, ((colours / 255 + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    x, y, z = np.cbrt(xyz / [0.9505, 1, 1.089]).T
    lab = np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)
    apart = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
    assert apart.min() > 17 and lab[:, 0].min() > 40 and np.hypot(lab[:, 1], lab[:, 2]).min() > 30
    again = [class_colour(number) for number in range(1, 256)]
    assert again[:len(colours)] == again[len(colours):2 * len(colours)] == CLASS_COLOURS[1:]
