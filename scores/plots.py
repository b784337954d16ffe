"""Pictures for a report, drawn with Pillow alone: a confusion matrix, gates, curves with error bars, masks on images.

    confusion_png("confusion.png", counts, ["benign", "malignant", "normal"], "BUSI, 780 images")
    gates_png("gates.png", shares, ["HC18", "BUSI"], ["block 10", "block 11"], "M2DINO, step 20,000")
    curves_png("shots.png", {"ours": [(1, 0.61, 0.57, 0.66), (5, 0.72, 0.69, 0.75)]}, "BUSI", "shots", "accuracy")
    overlay_png("masks.png", [("best: 012_HC, Dice 0.98", image, truth, prediction)], ["background", "head"], "HC18")

At most about 1,600 pixels wide: 13 cm at 300 dpi. A file appears whole or not at all.
"""

import math
import numbers
import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from frames.files import whole_file
from frames.shapes import class_colour, outlined

WIDTH, MARGIN = 1600, 36
INK, GREY, LIGHT = (25, 25, 25), (110, 110, 110), (222, 222, 222)
DARKEST = (8, 48, 107)  # of a confusion matrix: a row's share of 1, of gates: the largest; white is 0
# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow: too light on white. With 5 markers 35
# curves differ.
COLOURS = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (230, 159, 0), (204, 121, 167), (86, 180, 233), (0, 0, 0))
MARKERS = (None,  # a circle, and outlines in radii: square, triangle, diamond, triangle on its head
           [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], [(0, -1.1), (1.1, 0.9), (-1.1, 0.9)],
           [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)], [(0, 1.1), (1.1, -0.9), (-1.1, -0.9)])
TILE_WIDTH, TILE_HEIGHT = 498, 240  # at most, of an image under its mask


# ---------------------------------------------------------------- text and files

def _clean(text):
    """One line: a name from disk may hold line breaks."""
    return " ".join(str(text).split())


def _shorten(text, font, width):
    """The text, its end replaced by an ellipsis if it is longer than `width` pixels."""
    text = _clean(text)[:120]  # more fits nowhere, and would be measured letter by letter
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _wrap(text, font, width):
    """The text as lines of about `width` pixels, broken between words or inside one that is longer."""
    text = _clean(text)
    characters = max(8, int(0.92 * width * len(text) / max(1, font.getlength(text))))
    return textwrap.fill(text, characters, break_on_hyphens=False)


def _write_upright(picture, x, y, text, font):
    """Text that reads upwards, its middle at (x, y)."""
    width, height = math.ceil(font.getlength(text)) + 2, sum(font.getmetrics())
    strip = Image.new("L", (width, height))
    ImageDraw.Draw(strip).text((1, height / 2), text, 255, font, "lm")
    picture.paste(INK, (round(x - height / 2), round(y - width / 2)), strip.transpose(Image.Transpose.ROTATE_90))


def _save(picture, path):
    with whole_file(path) as file:
        picture.save(file, "PNG", dpi=(300, 300))


# ---------------------------------------------------------------- the confusion matrix

def confusion_png(path, confusion, names, title):
    """Counts (K, K), rows the truth, columns the prediction: each cell shows its count and its share of the row.

    The shade is the row's share; a row without images stays white. Counts may be fractions, means over runs.
    """
    confusion = np.asarray(confusion)
    K = len(names)
    if confusion.shape != (K, K) or K == 0:
        raise ValueError(f"confusion matrix: {confusion.shape} for {K} class names, needs ({K}, {K}) and a class")
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1e-9)  # 0 in a row without images
    cell = max(48, min(200, 1200 // K))  # pixels
    side = K * cell
    name_font, axis_font, title_font = (ImageFont.load_default(size) for size in (min(34, max(20, cell // 3)), 34, 40))
    names = [_shorten(name, name_font, 380) for name in names]
    longest = math.ceil(max(name_font.getlength(name) for name in names))
    upright = longest > cell - 10
    left, below = MARGIN + 60 + longest + 16, (longest if upright else 40) + 80
    lines = _wrap(title, title_font, left + side)
    top = MARGIN + 52 * (lines.count("\n") + 1) + 16
    picture = Image.new("RGB", (left + side + MARGIN, top + side + below + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((MARGIN, MARGIN), lines, INK, title_font, spacing=12)
    counts = [[f"{count:.4g}" if count % 1 else f"{count:.0f}" for count in row] for row in confusion]
    widest = max(ImageFont.load_default(100).getlength(count) for row in counts for count in row) / 100
    size = max(8, int(min(0.34, 0.86 / widest) * cell))  # so that the longest count fits
    count_font, share_font = ImageFont.load_default(size), ImageFont.load_default(max(8, min(size, int(0.26 * cell))))
    for row, column in np.ndindex(K, K):
        x, y, dark = left + column * cell, top + row * cell, share[row, column]
        draw.rectangle((x, y, x + cell, y + cell), _shade(dark), LIGHT)
        ink = "white" if dark > 0.5 else INK
        if confusion[row, column]:
            draw.text((x + cell / 2, y + 0.35 * cell), counts[row][column], ink, count_font, "mm")
            percent = f"{100 * dark:.0f}%" if dark >= 0.005 else "<1%"
            draw.text((x + cell / 2, y + 0.71 * cell), percent, ink, share_font, "mm")
        else:
            draw.text((x + cell / 2, y + cell / 2), "0", GREY, share_font, "mm")
    for number, name in enumerate(names):
        middle = (number + 0.5) * cell
        draw.text((left - 16, top + middle), name, INK, name_font, "rm")
        if upright:
            _write_upright(picture, left + middle, top + side + 14 + name_font.getlength(name) / 2, name, name_font)
        else:
            draw.text((left + middle, top + side + 14), name, INK, name_font, "ma")
    _write_upright(picture, MARGIN + 18, top + side / 2, "truth", axis_font)
    draw.text((left + side / 2, top + side + below), "prediction", INK, axis_font, "ms")
    _save(picture, path)


# ---------------------------------------------------------------- gates of experts

def gates_png(path, shares, tasks, layers, title):
    """Shares (T, L, E), the mean gate of each expert in each mixture block for each task: a panel per block.

    Rows are tasks, columns experts, the shade is the share, darkest for the largest of the picture, because soft gates
    lie close to 1 / E. Shares are also written in percent where cells are wide enough. layers: the panels' titles.
    """
    shares = np.asarray(shares, np.float64)
    if shares.shape[:2] != (len(tasks), len(layers)) or shares.ndim != 3 or not shares.size:
        raise ValueError(f"{path}: gates {shares.shape} of {len(tasks)} tasks and {len(layers)} blocks, needs (tasks, "
                         f"blocks, experts), at least one of each")
    if not (shares >= 0).all() or shares.max() > 1 + 1e-4:
        raise ValueError(f"{path}: gates must be shares from 0 to 1, found {shares.min():.3g} to {shares.max():.3g}")
    T, L, E = shares.shape
    font, small, title_font = (ImageFont.load_default(size) for size in (26, 20, 40))
    names = [_shorten(name, font, 380) for name in tasks]
    left = MARGIN + math.ceil(max(font.getlength(name) for name in names)) + 16
    gap, height, head = 28, 36, 76  # between panels; of a cell; above a panel
    room = WIDTH - left - MARGIN + gap
    abreast = max(1, min(L, room // (44 * E + gap)))  # so that a share of two digits fits, if it can
    width = min(72, (room // abreast - gap) // E)
    if width < 3:
        raise ValueError(f"{path}: {E} experts do not fit side by side into {WIDTH} pixels")
    across = max(left + abreast * (E * width + gap) - gap, 860 - MARGIN)  # room for the key, however few the cells
    lines = _wrap(title, title_font, across - MARGIN)
    top = MARGIN + 52 * (lines.count("\n") + 1) + 16
    bottom = top + math.ceil(L / abreast) * (head + T * height + gap)
    picture = Image.new("RGB", (across + MARGIN, bottom + 40 + MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((MARGIN, MARGIN), lines, INK, title_font, spacing=12)
    largest = max(shares.max(), 1e-9)
    for l in range(L):
        x0, y0 = left + l % abreast * (E * width + gap), top + l // abreast * (head + T * height + gap)
        draw.text((x0, y0), _shorten(layers[l], font, E * width + gap - 4), INK, font)
        for e in range(E):
            if width >= 26 or e == 0:  # the numbers of experts
                draw.text((x0 + (e + 0.5) * width, y0 + head - 8), str(e), GREY, small, "ms")
        for t, e in np.ndindex(T, E):
            x, y, dark = x0 + e * width, y0 + head + t * height, shares[t, l, e] / largest
            draw.rectangle((x, y, x + width, y + height), _shade(dark), LIGHT)
            if width >= 40:
                percent = f"{100 * shares[t, l, e]:.0f}"
                draw.text((x + width / 2, y + height / 2), percent, "white" if dark > 0.65 else INK, small, "mm")
        if l % abreast == 0:
            for t, name in enumerate(names):
                draw.text((left - 16, y0 + head + (t + 0.5) * height), name, INK, font, "rm")
    _shares_key(draw, bottom, across, largest)
    _save(picture, path)


def _shade(dark):
    """White for 0, the darkest for 1."""
    return tuple(round(255 + dark * (level - 255)) for level in DARKEST)


def _shares_key(draw, y, right, largest):
    """What the shades of gates mean: a strip from 0 to the largest share."""
    font = ImageFont.load_default(26)
    draw.text((MARGIN, y + 16), "mean gate in percent, by expert", GREY, font, "lm")
    end = right - math.ceil(font.getlength("100.0")) - 16
    draw.text((end - 216, y + 16), "0", INK, font, "rm")
    for step in range(200):
        draw.line((end - 200 + step, y, end - 200 + step, y + 32), _shade(step / 199))
    draw.rectangle((end - 201, y - 1, end, y + 33), None, LIGHT)
    draw.text((end + 16, y + 16), f"{100 * largest:.3g}", INK, font, "lm")


# ---------------------------------------------------------------- curves

def curves_png(path, curves, title, x_label, y_label, chance=None):
    """Curves with error bars: {name: [(x, y, low, high), ...]}; what is nan is left out; chance: a dashed line at y.

    x on a logarithmic axis if all are numbers above 0 (shots: 1, 5, 20), else in equal steps as they first appear.
    Curves stand a few pixels apart, so that their bars do not cover one another.
    """
    curves = {name: [point for point in points if math.isfinite(point[1])] for name, points in curves.items()}
    points = [point for some in curves.values() for point in some]
    if not points:
        raise ValueError(f"{path}: no curve has a point to draw")
    xs = list(dict.fromkeys(x for x, *_ in points))
    logarithmic = all(isinstance(x, numbers.Real) and x > 0 for x in xs)
    along = {x: math.log(x) if logarithmic else number for number, x in enumerate(xs)}
    y_low, y_high, y_ticks = _y_axis([value for _, *values in points for value in values if math.isfinite(value)]
                                     + [chance] * (chance is not None))

    # all lengths below are twice those of the picture, which is reduced at the end: smooth lines
    font, axis_font, title_font = (ImageFont.load_default(size) for size in (60, 68, 80))
    width, margin = 2 * WIDTH, 2 * MARGIN
    texts = [_shorten(name, font, 800) for name in curves] + ["chance"] * (chance is not None)
    lines = _wrap(title, title_font, width - 2 * margin)
    height = max(2000, 84 * len(texts) + 600)
    left = margin + 110 + max(font.getlength(text) for text in y_ticks.values())
    right = width - margin - 160 - max(font.getlength(text) for text in texts)
    top, bottom = margin + 104 * (lines.count("\n") + 1) + 30, height - margin - 210
    first, last = min(along.values()), max(along.values())

    def place(x, y):
        share = (along[x] - first) / (last - first) if last > first else 0.5
        return left + (0.08 + 0.84 * share) * (right - left), bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((margin, margin), lines, INK, title_font, spacing=24)
    for value, text in y_ticks.items():
        y = place(xs[0], value)[1]
        draw.line((left, y, right, y), LIGHT, 2)
        draw.text((left - 24, y), text, INK, font, "rm")
    written = -math.inf  # where the last label of the x axis ended
    for x in sorted(xs, key=along.get):
        text, (centre, _) = _shorten(f"{x:g}" if logarithmic else x, font, 400), place(x, y_low)
        draw.line((centre, top, centre, bottom + 20), LIGHT, 2)
        half = font.getlength(text) / 2
        if centre - half > written:
            draw.text((centre, bottom + 32), text, INK, font, "ma")
            written = centre + half + 24
    draw.rectangle((left, top, right, bottom), None, GREY, 2)
    draw.text(((left + right) / 2, height - margin), _shorten(x_label, axis_font, right - left), INK, axis_font, "ms")
    _write_upright(picture, margin + 30, (top + bottom) / 2, _shorten(y_label, axis_font, bottom - top), axis_font)

    if chance is not None:
        _dash(draw, left, right, place(xs[0], chance)[1])
    centres = sorted(place(x, y_low)[0] for x in xs)
    room = min([0.14 * (right - left)] + [0.6 * (b - a) for a, b in zip(centres, centres[1:])])
    gap = min(36, room / len(curves))  # between neighbouring curves
    spots = []  # of each curve a list of points, each the places of y, low and high, None where nan
    for number, some in enumerate(curves.values()):
        aside = gap * (number - (len(curves) - 1) / 2)
        spots.append([[(place(x, value)[0] + aside, place(x, value)[1]) if math.isfinite(value) else None
                       for value in values] for x, *values in sorted(some, key=lambda point: along[point[0]])])
        if len(some) > 1:
            draw.line([y for y, *_ in spots[-1]], COLOURS[number % len(COLOURS)], 6, "curve")
    for number, some in enumerate(spots):  # over all lines
        _mark(draw, some, number)
    for number, text in enumerate(texts):  # the legend, beside the plot
        y = top + 40 + 84 * number
        if number < len(curves):
            _mark(draw, [[(right + 90, y), None, None]], number)
        else:
            _dash(draw, right + 44, right + 140, y)
        draw.text((right + 160, y), text, INK, font, "lm")
    _save(picture.reduce(2), path)


def _y_axis(values):
    """(lowest, highest, {tick: its text}): a little more than the values need, ticks at round numbers."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - 0.06 * spread, high + 0.06 * spread
    power = 10 ** math.floor(math.log10((high - low) / 4))
    step = power * max(factor for factor in (1, 2, 5) if factor == 1 or factor * power <= (high - low) / 4)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return low, high, {tick: f"{tick:.{decimals}f}" for tick in ticks}


def _dash(draw, left, right, y):
    """A dashed line from left to right."""
    for x in range(round(left), round(right), 40):
        draw.line((x, y, min(x + 24, right), y), GREY, 4)


def _mark(draw, points, number):
    """Error bars and markers of curve `number`."""
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    for _, low, high in points:
        if low and high:
            draw.line((low, high), colour, 4)
            for x, y in (low, high):
                draw.line((x - 12, y, x + 12, y), colour, 4)
    for (x, y), *_ in points:
        if marker is None:
            draw.ellipse((x - 18, y - 18, x + 18, y + 18), colour, "white", 2)
        else:
            draw.polygon([(x + 20 * dx, y + 20 * dy) for dx, dy in marker], colour, "white", 2)


# ---------------------------------------------------------------- masks on their images

def best_median_worst(scores):
    """Of (n,) scores the indices of the largest, the median (the lower of two) and the smallest; nan has no rank."""
    scores = np.asarray(scores, np.float64)
    valid = np.sort(scores[~np.isnan(scores)])
    if not len(valid):
        raise ValueError("best, median and worst: no image has a score; score another class")
    return [int(np.argmax(scores == value)) for value in (valid[-1], valid[(len(valid) - 1) // 2], valid[0])]


def overlay_png(path, rows, classes, title):
    """A row for each (text, image, truth or None, prediction), uint8 (h, w): image, outlined truth, filled prediction.

    `classes` names all class numbers, the background, 0, first; the legend holds those that are drawn.
    """
    if not rows:
        raise ValueError(f"{path}: no image to draw")
    for text, image, *masks in rows:
        for mask in masks:
            if mask is not None and (mask.shape != image.shape or mask.max() >= len(classes)):
                raise ValueError(f"{path}: {_clean(text)}: mask {mask.shape} with classes up to {mask.max()}, needs "
                                 f"{image.shape} and classes below {len(classes)}")
    font, title_font, line, gap = ImageFont.load_default(30), ImageFont.load_default(40), 44, 16
    kinds = ["image"] + ["truth"] * any(truth is not None for *_, truth, _ in rows) + ["prediction"]
    sizes = []
    for _, image, *_ in rows:
        scale = min(TILE_HEIGHT / image.shape[0], TILE_WIDTH / image.shape[1])
        sizes.append(tuple(max(1, round(scale * side)) for side in image.shape[::-1]))
    cell = max(240, *(width for width, _ in sizes))  # room for title and texts, however narrow the images
    width = len(kinds) * (cell + gap) - gap
    drawn = np.unique(np.concatenate([np.unique(mask) for row in rows for mask in row[2:] if mask is not None]))
    names = {number: _shorten(classes[number], font, 400) for number in drawn.tolist() if number}
    entry = 80 + math.ceil(max([font.getlength(name) for name in names.values()], default=0))  # pixels, in the legend
    abreast = max(1, (width + 40) // entry)
    lines = _wrap(title, title_font, width)
    top = MARGIN + 52 * (lines.count("\n") + 1) + 8
    bottom = top + line + sum(line + height + gap for _, height in sizes) + gap  # where the legend starts
    below = line * math.ceil(len(names) / abreast) + MARGIN - gap
    picture = Image.new("RGB", (width + 2 * MARGIN, bottom + below), "white")
    draw = ImageDraw.Draw(picture)
    draw.multiline_text((MARGIN, MARGIN), lines, INK, title_font, spacing=12)
    left = {kind: MARGIN + column * (cell + gap) for column, kind in enumerate(kinds)}
    for kind, x in left.items():
        draw.text((x, top), kind, GREY, font)
    for (text, image, truth, prediction), size in zip(rows, sizes):
        top += line
        draw.text((MARGIN, top), _shorten(text, font, width), INK, font)
        tiles = {"image": (np.zeros_like(image), 0), "truth": (truth, 0), "prediction": (prediction, 0.2)}
        for kind, x in left.items():
            mask, fill = tiles[kind]
            if mask is not None:
                picture.paste(outlined(image, mask, size, fill), (x, top + line))
        top += size[1] + gap
    for place, (number, name) in enumerate(names.items()):
        x, y = MARGIN + place % abreast * entry, bottom + place // abreast * line
        draw.rectangle((x, y + 4, x + 26, y + 30), class_colour(number))
        draw.text((x + 40, y), name, INK, font)
    _save(picture, path)
