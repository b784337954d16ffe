"""Shapes in masks: connected parts, the ellipse through points, and outlines drawn over an image."""

import math

import numpy as np
from PIL import Image

# Of classes over grey images, by number; 0, the background, is never drawn. Okabe and Ito's again, then each as far as
# could be in CIELAB from those before it, as colour-blind readers see it, too; none is grey or dark.
CLASS_COLOURS = [
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167),
    (0, 114, 178), (135, 60, 255), (0, 255, 150), (0, 255, 255), (225, 15, 75), (120, 135, 255), (225, 150, 90),
    (165, 240, 195), (180, 255, 120), (210, 0, 180), (60, 195, 210), (255, 135, 150), (210, 60, 45), (120, 165, 255),
    (180, 210, 75), (105, 90, 225), (60, 210, 180), (210, 0, 135), (90, 210, 120), (165, 105, 210), (255, 30, 120)]


def runs(mask):
    """bool (h, w) -> for each True pixel, row by row, the number of the horizontal run that it lies in."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return np.cumsum(starts)[mask.ravel()] - 1


def label(mask):
    """bool (h, w) -> int (h, w): 0 where False, else a number > 0 of the 4-connected part."""
    labels = np.zeros(mask.shape, np.int64)
    if not mask.any():
        return labels
    row = runs(mask)
    labels.T[mask.T] = runs(mask.T)
    column = labels[mask]
    # a pixel ties its horizontal to its vertical run: hand the largest number on until nothing changes
    of_row, of_column = np.arange(row.max() + 1), np.zeros(column.max() + 1, np.int64)
    while True:
        before = of_row.copy()
        np.maximum.at(of_column, column, of_row[row])
        np.maximum.at(of_row, row, of_column[column])
        if np.array_equal(before, of_row):
            labels[mask] = of_row[row] + 1
            return labels


def fit_ellipse(points):
    """Points (m, 2), x and y, -> (x, y, a, b, angle): centre, half axes a >= b, angle of a to the x axis in radians.

    Direct least squares: Fitzgibbon et al. 1999, IEEE PAMI 21:476, in the stable form of Halir and Flusser 1998. It
    makes an ellipse of any other points; ValueError where these are less than five, a line, two, or a parabola.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all() or len(np.unique(points, axis=0)) < 5:
        raise ValueError(f"points of shape {points.shape} make no ellipse: expected at least five, finite pairs x, y")
    center, scale = points.mean(0), points.std()
    x, y = ((points - center) / scale).T  # near 1: the sums below keep their digits
    quadratic, linear = np.stack((x * x, x * y, y * y), 1), np.stack((x, y, x * 0 + 1), 1)  # (m, 3)
    cross, square = quadratic.T @ linear, linear.T @ linear
    if np.linalg.cond(square) > 1e12:
        raise ValueError(f"{len(points)} points on a line make no ellipse")
    to_linear = -np.linalg.solve(square, cross.T)
    reduced = quadratic.T @ quadratic + cross @ to_linear
    vectors = np.linalg.eig(np.stack((reduced[2] / 2, -reduced[1], reduced[0] / 2)))[1].real
    discriminants = 4 * vectors[0] * vectors[2] - vectors[1] ** 2
    best = discriminants.argmax()  # of the three solutions the one that is an ellipse
    if discriminants[best] < 1e-6:  # a > 2000 b, and of two lines or a parabola nothing but rounding
        raise ValueError(f"{len(points)} points of a parabola or of two lines make no ellipse")
    A, B, C = vectors[:, best] * np.sign(vectors[0, best])
    D, E, F = to_linear @ (A, B, C)  # A x^2 + B x y + C y^2 + D x + E y + F = 0
    form = np.array([[A, B / 2], [B / 2, C]])
    middle = -np.linalg.solve(2 * form, [D, E])
    eigenvalues, axes = np.linalg.eigh(form)
    level = middle @ form @ middle - F
    a, b = np.sqrt(level / eigenvalues) * scale  # the smaller eigenvalue is the longer axis'
    x, y = middle * scale + center
    return float(x), float(y), float(a), float(b), float(np.arctan2(axes[1, 0], axes[0, 0]) % np.pi)


# ---------------------------------------------------------------- outlines

def class_colour(number):
    return CLASS_COLOURS[(number - 1) % (len(CLASS_COLOURS) - 1) + 1]


def outlined(image, mask, size, fill=0.0):
    """Image and mask, uint8 (h, w) -> RGB picture of size (width, height): each class outlined, and filled faintly.

    Lines are about 2.5 pixels wide whatever the scale, so that a single pixel of the mask still shows.
    """
    picture = Image.fromarray(image).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    up = max(math.ceil(2 * shown / own) for shown, own in zip(size, mask.shape[::-1]))
    mask = mask.repeat(up, 0).repeat(up, 1)  # drawn at twice the size or more, then reduced: smooth lines
    r = round(1.2 * max(own / shown for own, shown in zip(mask.shape, size[::-1])))
    layer = np.zeros((mask.shape[0] + 2 * r, mask.shape[1] + 2 * r, 4), np.uint8)  # colour and opacity
    disc = [(y, x) for y, x in np.ndindex(2 * r + 1, 2 * r + 1) if (y - r) ** 2 + (x - r) ** 2 <= r * r + 1]
    numbers, counts = np.unique(mask, return_counts=True)
    classes = [number for number in numbers[np.argsort(-counts)].tolist() if number]  # the smaller ones on top
    for number in classes:
        layer[r:-r, r:-r][mask == number] = (*class_colour(number), round(255 * fill))
    for number in classes:
        own = np.pad(mask == number, 1)
        core = own[:-2, 1:-1] & own[2:, 1:-1] & own[1:-1, :-2] & own[1:-1, 2:]
        rows, columns = np.nonzero(own[1:-1, 1:-1] & ~core)
        for y, x in disc:
            layer[rows + y, columns + x] = (*class_colour(number), 255)
    layer = Image.fromarray(layer[r:-r, r:-r]).resize(size, Image.Resampling.BOX)
    picture.paste(layer, mask=layer)
    return picture
