"""Where on the screen is the ultrasound? Finds the sector or rectangle of a frame, so that text and rulers can go.

    fan = find_fan(grey)                  # of a clip: find_fan(frames.max(0)), since its fan does not move
    trimmed, box = apply_fan(grey, fan)   # cut to the fan's bounding box, black beside the fan

The rule, on a copy of the frame reduced to at most SIDE pixels a side:

1. The background is the most frequent level along the frame's edge, be it black, grey or white.
2. What differs from it is echo or overlay. An opening takes away what is thin: text, rulers, grey bars, traces.
3. Of the connected parts left, the heaviest is the fan. Another joins it (what lies behind a shadow, a second view) if
   it is heavy too, or if their common convex hull has little else in it; logos, thumbnails and bars do not.
4. The fan is the convex hull, which holds shadows, cysts and a dark far field, and MARGIN around it.

In doubt nothing is trimmed: a frame with no flat background or no large part, or filled by one, is all fan. Echoes as
dark as the background cannot be told from it at the fan's rim: a clip's maximum shows more of them than a still. What
touches the fan and is thick, or within some 20 pixels of a 640 x 480 screen, stays.
"""

import numpy as np
from PIL import Image, ImageDraw

from frames.shapes import label

SIDE = 160  # longest side of the reduced frame; the lengths below are in its pixels, 4 of a 640 x 480 screen's each
OPENING = 3 / 160  # of the longest side: what is no thicker than twice that goes, 24 pixels of a 640 x 480 screen
TOLERANCE = 2  # grey levels around the background's that still are background
MARGIN = 1  # around the hull: a dim pixel at the rim, or one that the fan covers by a twentieth, is not in the hull
SMALLEST = 0.01  # share of the frame: what is smaller is no fan, and beside one not worth trimming
SECOND = 0.2  # a part joins the heaviest if it weighs this share of it,
BRIDGE = 3.0  # or if the hull grows by no more than this times the part's area


def find_fan(grey):
    """uint8 (h, w) -> bool (h, w), True in the fan, a filled convex shape; all True where there is nothing to trim."""
    if grey.ndim != 2 or grey.dtype != np.uint8 or not grey.size:
        raise ValueError(f"fan: need a grey uint8 image (h, w), got {grey.dtype} {grey.shape}")
    factor = -(-max(grey.shape) // SIDE)
    means = np.asarray(Image.fromarray(grey).reduce(factor)).astype(np.int16)  # of factor x factor pixels
    level = background(grey[::factor, ::factor])  # pixels, not means: they have the speckle that tells tissue
    corners = [] if level is None else hull_of_parts(np.abs(means - level))
    if not corners or np.mean(fill(corners, means.shape, 1)) > 1 - SMALLEST:
        return np.ones(grey.shape, bool)
    return fill(corners, grey.shape, factor)


def apply_fan(grey, fan):
    """(h, w), bool (h, w) -> the fan's bounding box cut out of grey, 0 beside the fan; (left, top, right, bottom).

    Pixels in the fan keep their value. Where all is fan: grey itself, no copy. ValueError if none is.
    """
    if grey.shape != fan.shape or not fan.any():
        raise ValueError(f"fan: {fan.sum()} pixels of {fan.shape} cannot be cut out of an image {grey.shape}")
    rows, columns = np.flatnonzero(fan.any(1)), np.flatnonzero(fan.any(0))
    left, top, right, bottom = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
    if not fan.all():
        grey = grey[top:bottom, left:right] * fan[top:bottom, left:right]
    return grey, (left, top, right, bottom)


def background(pixels):
    """The most frequent level of the frame's edge; None where it is tissue, most of whose levels lie further off."""
    ring = np.concatenate([pixels[:3].ravel(), pixels[-3:].ravel(), pixels[:, :3].ravel(), pixels[:, -3:].ravel()])
    counts = np.pad(np.bincount(ring, minlength=256), 14)  # level 0 is at 14
    near = np.convolve(counts, np.ones(5), "same")  # of a level and the two on either side
    middle = near.argmax()
    if near[middle] < 0.5 * counts[middle - 12:middle + 13].sum():
        return None
    return int(middle - 2 + counts[middle - 2:middle + 3].argmax()) - 14


def hull_of_parts(difference):
    """Difference to the background (h, w) -> corners [(y, x), ...] of the fan's hull, [] if there is none."""
    mask = difference > TOLERANCE
    widest = round(OPENING * max(mask.shape))
    for radius in range(widest, min(widest, 1) - 1, -1):  # all that is lit of a dark image may be a thin stripe
        labels = label(dilate(erode(mask, radius), radius))
        areas = np.bincount(labels.ravel())
        areas[0] = 0
        if areas.max() >= SMALLEST * mask.size:
            break
    else:
        return []
    # weighed by contrast up to 25 grey levels: a bright stripe counts against faint noise, a logo not against a dim fan
    weights = np.bincount(labels.ravel(), np.minimum(difference, 25).ravel()) * (areas > 0)
    corners, size = [], 0.0
    for part in np.argsort(-weights, kind="stable")[:min(8, np.count_nonzero(areas))]:
        pixels = dilate(labels == part, radius + 1) & mask  # the opening has cut its corners: regrow them
        joint = hull(corners + outline(pixels))
        y, x = np.array(joint, float).T
        joint_size = abs(y @ np.roll(x, 1) - x @ np.roll(y, 1)) / 2
        if weights[part] >= SECOND * weights.max() or joint_size - size <= BRIDGE * areas[part]:
            corners, size = joint, joint_size
    return corners


# ---------------------------------------------------------------- masks and polygons

def erode(mask, steps, beyond=False):
    """Take `steps` pixels off all around, nearly a disk's worth; what lies beyond the image is `beyond`."""
    for step in range(steps):  # by crosses and 3 x 3 squares in turn
        padded = np.pad(mask, 1, constant_values=beyond)
        tall, wide = padded[:-2] & padded[1:-1] & padded[2:], padded[1:-1]
        if step % 2:
            wide = tall
        mask = tall[:, 1:-1] & wide[:, :-2] & wide[:, 2:]
    return mask


def dilate(mask, steps):
    return ~erode(~mask, steps, True)


def outline(mask):
    """bool (h, w) -> the four corners (y, x) of each row's first and last pixel; pixel (0, 0) reaches to (1, 1)."""
    rows = np.flatnonzero(mask.any(1))
    first, last = mask[rows].argmax(1), mask.shape[1] - mask[rows, ::-1].argmax(1)
    ends = np.stack([rows, first, rows + 1, first, rows, last, rows + 1, last], 1)
    return list(map(tuple, ends.reshape(-1, 2).tolist()))


def hull(points):
    """Points [(y, x), ...] -> corners of their convex hull, in order (Andrew's monotone chain)."""
    points, corners = sorted(set(points)), []
    for way in (points, points[::-1]):
        chain = []
        for y, x in way:
            while len(chain) > 1 and ((chain[-1][0] - chain[-2][0]) * (x - chain[-2][1])
                                      <= (chain[-1][1] - chain[-2][1]) * (y - chain[-2][0])):
                chain.pop()
            chain.append((y, x))
        corners += chain[:-1]
    return corners


def fill(corners, shape, factor):
    """Corners of a convex polygon, moved out by MARGIN, times factor -> bool (h, w), True inside."""
    moved = hull([(y + dy, x + dx) for y, x in corners for dy in (-MARGIN, MARGIN) for dx in (-MARGIN, MARGIN)])
    image = Image.new("L", shape[::-1])
    ImageDraw.Draw(image).polygon([(x * factor, y * factor) for y, x in moved], fill=1)
    return np.asarray(image).astype(bool)
