"""Phantoms: seeded drawings that look like fetal B-mode frames, so that every stage runs with no download.

A smoke test, not evidence: whatever prints a phantom score says so. tools/phantom_sheet.py shows them.

A frame is made as a scanner makes it, along beams. Anatomy is a few smooth shapes in its own coordinates (u, v), about
1 in radius; each sample (depth, beam) of a curved probe looks up the echo there, in log amplitude:

    log echo = tissue + shapes - attenuation * depth - absorbed above + log |speckle|

Then gain, dynamic range and scan conversion of (depth, beam) to pixels. The planes differ in their shapes alone:
position, rotation, zoom, probe, clutter, shadows, speckle and the final brightness and contrast are drawn from one
distribution for all planes, so that no classifier lives off brightness or the sector's outline.

Masks are the same shapes looked up at pixels instead of samples: exact, whatever speckle and shadow hide. So are the
box of the heart and the ends of the femur.
"""

import numpy as np

PLANES = ("brain", "abdomen", "femur", "thorax", "cervix", "face")
FRAMES = np.repeat([0, 1, 2], [3, 2, 4])  # of 9 frames in a row of one plane: three patients with 3, 2 and 4 frames
MASK_PLANES = ("brain", "abdomen", "femur", "thorax")  # of images with masks; a femur's mask is empty
PROBE = -0.95  # y of its face in the picture, which spans -1..1
FLUID, WALL, BONE = -2.4, 1.2, 2.2  # log echo amplitudes; tissue's is 0
ABSORPTION = 16.0  # log amplitude lost per unit of path in bone
HEART_AXES = 0.64, 0.5  # half axes of its ellipse
HEART_PIXELS = 12  # and half of its area, at least, that a box needs
FEMUR_END = 0.85  # |u| of both ends

# (low, high) of uniform draws. A patient's hold for all of its frames; a view's are drawn anew for each.
PATIENT = {"half_angle": (0.5, 0.8), "probe_radius": (0.15, 0.7), "depth": (1.75, 2.0),  # of the sector
           "x": (-0.4, 0.4), "y": (-0.25, 0.4), "angle": (-np.pi, np.pi), "zoom": (0.45, 0.72), "mirror": (-1, 1),
           "aspect": (0.76, 0.96), "shape1": (-1, 1), "shape2": (-1, 1), "shape3": (-1, 1),  # of the anatomy
           "skin": (0.04, 0.16), "waves": (1.5, 3)}
VIEW = {"dx": (-0.08, 0.08), "dy": (-0.08, 0.08), "turn": (-0.3, 0.3), "closer": (0.92, 1.08),
        "attenuation": (0.0, 1.4), "speckle": (0.3, 0.9), "level": (0.22, 0.42), "contrast": (0.15, 0.22),
        "shadow_beam": (-1.2, 1.2), "shadow_width": (0.05, 0.25), "shadow": (0.0, 2.0),
        "blob1_x": (-1, 1), "blob1_y": (-0.8, 1), "blob1_r": (0.1, 0.35), "blob1": (FLUID, WALL),
        "blob2_x": (-1, 1), "blob2_y": (-0.8, 1), "blob2_r": (0.1, 0.35), "blob2": (FLUID, WALL),
        "blob3_x": (-1, 1), "blob3_y": (-0.8, 1), "blob3_r": (0.1, 0.35), "blob3": (FLUID, WALL)}


def patients(indices):
    """Image numbers -> labels, groups, frames. Planes take turns, so that any number of images is balanced."""
    labels, turn = indices % len(PLANES), indices // len(PLANES)
    patient = turn // len(FRAMES) * 3 + FRAMES[turn % len(FRAMES)]  # of this plane
    frames = turn % len(FRAMES) - np.searchsorted(FRAMES, FRAMES[turn % len(FRAMES)])
    return labels, patient * len(PLANES) + labels, frames


def draw_parameters(indices, size, seed):
    """Geometry and view of each image: {name: float32 (n, 1, 1)}, and its speckle noise (2, n, size, size)."""
    low, high = np.array([*PATIENT.values(), *VIEW.values()]).T
    uniform = np.empty((len(indices), len(low)))
    noise = np.empty((2, len(indices), size, size), np.float32)
    _, groups, frames = patients(indices)
    for row, (group, frame) in enumerate(zip(groups.tolist(), frames.tolist())):
        # keyed, not consecutive: an image depends on seed, group and frame, never on how many are drawn
        uniform[row, :len(PATIENT)] = np.random.default_rng((seed, group)).random(len(PATIENT))
        generator = np.random.default_rng((seed, group, 1 + frame))
        uniform[row, len(PATIENT):] = generator.random(len(VIEW))
        for part in noise:
            generator.standard_normal(out=part[row], dtype=np.float32)
    values = (low + uniform * (high - low)).astype(np.float32).T[:, :, None, None]
    return dict(zip((*PATIENT, *VIEW), values)), noise


# ---------------------------------------------------------------- shapes: weights in 0..1 over (u, v)

def line(distance, width):
    return np.maximum(0, 1 - np.abs(distance) / width)


def hump(distance, width):
    return np.maximum(0, 1 - (distance / width) ** 2)


def inside(distance, blur=0.08):
    """1 where distance < 0, 0 outside, linear over the rim."""
    return np.clip(0.5 - distance / blur, 0, 1)


def ellipse(u, v, u0, v0, a, b):
    """About the distance to the rim of an ellipse around (u0, v0) with half axes a, b; negative inside."""
    return (np.sqrt(((u - u0) / a) ** 2 + ((v - v0) / b) ** 2) - 1) * b


def paint(echo, weight, level):
    echo += weight * (level - echo)


# ---------------------------------------------------------------- structures: negative inside, for echo and mask alike

def body(u, v, p):
    """Of head, abdomen and thorax; its edge is the middle of the skull, the wall or the ribs."""
    return ellipse(u, v, 0, 0, 1, p["aspect"])


def stomach(u, v, p):
    return ellipse(u, v, -0.1 + 0.15 * p["shape1"], 0.45, 0.34, 0.24)


def heart_axes(u, v, p):
    tilt = 0.7 + 0.3 * p["shape1"]
    a, b = u + 0.15, v - 0.1
    return np.cos(tilt) * a + np.sin(tilt) * b, np.cos(tilt) * b - np.sin(tilt) * a


def heart(u, v, p):
    return ellipse(*heart_axes(u, v, p), 0, 0, *HEART_AXES)


def femur_bow(u, p):
    """v of the middle of the bone, along it."""
    return 0.16 * p["shape1"] * (u * u - 0.5)


STRUCTURES = ("background", "head", "abdomen", "stomach", "heart")  # class numbers of masks
DRAWN_AS = (None, ("brain", body), ("abdomen", body), ("abdomen", stomach), ("thorax", heart))  # outer before inner


# ---------------------------------------------------------------- planes: paint the echo, return what absorbs sound

def brain(echo, u, v, p):
    """Skull ellipse; midline, broken by the box of the cavum; a bright choroid plexus behind."""
    rim = body(u, v, p)
    skull = line(rim, 0.12)
    paint(echo, inside(rim), -1.0)
    paint(echo, line(v, 0.09) * inside(np.abs(u) - 0.85), WALL)
    box = np.maximum(np.abs(u - 0.45 - 0.1 * p["shape1"]) - 0.2, np.abs(v) - 0.17)
    paint(echo, inside(box), FLUID)
    paint(echo, line(box, 0.08), WALL)
    paint(echo, inside(ellipse(u, v, -0.4, 0.38, 0.3, 0.15)), WALL)
    paint(echo, skull, BONE)
    return 0.4 * skull


def abdomen(echo, u, v, p):
    """Soft round wall; stomach bubble, umbilical vein as a dark hook, spine of three bright points with a shadow."""
    rim = body(u, v, p)
    paint(echo, inside(rim), -0.2)
    paint(echo, line(rim, 0.14), WALL)
    paint(echo, inside(stomach(u, v, p)), FLUID)
    bend = v + 0.2 - 0.5 * (u + 0.1) ** 2 * (1 + 0.3 * p["shape2"])
    paint(echo, line(bend, 0.17) * inside(np.abs(u + 0.35) - 0.4), FLUID)
    spine = sum(inside(ellipse(u, v, u0, v0, 0.12, 0.12)) for u0, v0 in ((0.82, 0.0), (0.6, 0.16), (0.6, -0.16)))
    paint(echo, np.minimum(spine, 1), BONE)
    return 0.8 * spine


def femur(echo, u, v, p):
    """One bowed bright bar with thick ends and a shadow, in muscle between two skin lines."""
    bow = v - femur_bow(u, p)
    bar = inside(np.maximum(np.abs(bow) - 0.1 - 0.12 * u ** 4, np.abs(u) - FEMUR_END))
    paint(echo, inside(np.maximum(np.abs(v) - 0.6, np.abs(u) - 1.05)), -0.7)
    paint(echo, line(np.abs(v) - 0.6 - 0.1 * p["shape2"] * u, 0.1) * inside(np.abs(u) - 1.05), WALL)
    paint(echo, bar, BONE)
    return 0.8 * bar


def thorax(echo, u, v, p):
    """Wall of separate ribs, each with a shadow; a heart of four dark chambers parted by a bright cross."""
    rim = body(u, v, p)
    paint(echo, inside(rim), -0.1)
    ribs = line(rim, 0.13) * np.clip(1.5 * np.cos(9 * np.arctan2(v, u)) + 0.3, 0, 1)
    a, b = heart_axes(u, v, p)
    chambers = heart(u, v, p)
    paint(echo, inside(chambers), FLUID)
    paint(echo, np.maximum(line(b, 0.11), line(a - 0.1 * p["shape2"], 0.11)) * inside(chambers), WALL)
    paint(echo, line(chambers, 0.11), WALL)
    paint(echo, ribs, BONE)
    return 0.4 * ribs


def cervix(echo, u, v, p):
    """A grey column with a dark canal and a bright line in it, ending at amniotic fluid; the bladder beside it."""
    bow = v - 0.25 * p["shape1"] * (u * u - 0.5)
    column = np.maximum(np.abs(bow) - 0.45, np.abs(u + 0.2) - 0.8)
    paint(echo, inside(ellipse(u, v, 0.85, 0.05, 0.42, 0.6)), FLUID)
    paint(echo, inside(ellipse(u, v, -0.3 + 0.2 * p["shape2"], -0.78, 0.6, 0.24)), FLUID)
    paint(echo, inside(column), 0.5)
    paint(echo, inside(np.maximum(np.abs(bow) - 0.2, np.abs(u + 0.2) - 0.8)), -1.5)
    paint(echo, line(bow, 0.09) * inside(np.abs(u + 0.2) - 0.8), WALL)
    return 0


def face(echo, u, v, p):
    """Profile against fluid: forehead, nose, lips and chin along one bright edge; bone of brow and jaw behind it."""
    nose = line(u - 0.05 * p["shape1"], 0.28)
    skin = v - 0.45 * u * u + 0.05 + 0.45 * nose * nose + 0.2 * hump(u - 0.36, 0.13) + 0.18 * hump(u - 0.6, 0.13)
    near = inside(np.abs(u) - 0.9)
    paint(echo, inside(np.maximum(skin, ellipse(u, v, 0, 0, 1, 1))), FLUID)
    paint(echo, line(skin, 0.15) * near, WALL)
    bone = np.maximum(line(skin - 0.4, 0.12) * inside(np.abs(u - 0.5) - 0.3),
                      line(skin - 0.3, 0.12) * inside(np.abs(u + 0.5) - 0.3))
    paint(echo, bone, BONE)
    return 0.6 * bone


SHAPES = (brain, abdomen, femur, thorax, cervix, face)


# ---------------------------------------------------------------- the scanner

def blur(noise):
    """Speckle is wider across the beams than along them."""
    noise = noise[..., :-1] + noise[..., 1:]
    noise = noise[..., :-1] + noise[..., 1:]
    return noise[..., :-1, :] + noise[..., 1:, :]


def anatomical(x, y, p):
    """Places in the picture -> (u, v)."""
    cos, sin = np.cos(p["angle"] + p["turn"]), np.sin(p["angle"] + p["turn"])
    scale = 1 / (p["zoom"] * p["closer"])
    dx, dy = (x - p["x"] - p["dx"]) * scale, (y - p["y"] - p["dy"]) * scale
    return cos * dx + sin * dy, (cos * dy - sin * dx) * np.sign(p["mirror"])


def pictorial(u, v, p):
    """(u, v) -> places in the picture, the inverse of anatomical."""
    cos, sin = np.cos(p["angle"] + p["turn"]), np.sin(p["angle"] + p["turn"])
    scale, v = p["zoom"] * p["closer"], v * np.sign(p["mirror"])
    return (cos * u - sin * v) * scale + p["x"] + p["dx"], (sin * u + cos * v) * scale + p["y"] + p["dy"]


def render(p, noise, labels):
    """Parameters (n, 1, 1), noise (2, n, size, size), labels (n,) -> uint8 (n, size, size)."""
    size = noise.shape[-1]
    noise = blur(noise)  # (2, n, depths, beams)
    depths, beams = noise.shape[-2:]
    depth = np.linspace(0, 1, depths, dtype=np.float32)[:, None]
    beam = np.linspace(-1, 1, beams, dtype=np.float32)[None]
    radius = p["probe_radius"] + depth * p["depth"]  # (n, depths, 1)
    top = PROBE - p["probe_radius"]  # the probe's centre of curvature lies above the picture
    x, y = radius * np.sin(beam * p["half_angle"]), top + radius * np.cos(beam * p["half_angle"])  # (n, depths, beams)

    echo = np.zeros_like(x)
    for blob in ("blob1", "blob2", "blob3"):
        distance = np.sqrt((x - p[blob + "_x"]) ** 2 + (y - p[blob + "_y"]) ** 2) - p[blob + "_r"]
        paint(echo, inside(distance, 0.15), p[blob])
    layers = line(np.sin(p["waves"] * depth / 0.05), 0.6) * inside(depth - p["skin"], 0.04)
    paint(echo, layers, WALL)  # skin and fat under the probe

    u, v = anatomical(x, y, p)
    absorbed = np.zeros_like(echo)
    for label, shape in enumerate(SHAPES):
        own = labels == label
        own_echo = echo[own]
        absorbed[own] = shape(own_echo, u[own], v[own], {name: value[own] for name, value in p.items()})
        echo[own] = own_echo
    absorbed = np.cumsum(absorbed, 1) - absorbed  # what lies above shadows what lies below
    echo -= ABSORPTION * p["depth"] / depths * absorbed
    echo -= p["attenuation"] * depth
    echo -= p["shadow"] * line(beam - p["shadow_beam"], p["shadow_width"]) * inside(0.1 - depth, 0.1)
    echo += p["speckle"] * 0.5 * np.log(noise[0] ** 2 + noise[1] ** 2 + 1e-6)
    echo -= echo.mean((1, 2), keepdims=True)
    echo /= echo.std((1, 2), keepdims=True)  # automatic gain: no plane is brighter than another
    grey = np.clip(p["level"] + p["contrast"] * echo, 0, 1) * 255
    return scan_convert(grey, p, size)


def pixels(p, size):
    """Of each pixel's centre: x (1, size), y (size, 1), then (n, size, size): shares of depth and of beams, visible."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    x, y = axis[None, :], axis[:, None]
    return x, y, *sector(x, y, p)


def sector(x, y, p):
    """Places in the picture -> shares of depth and of beams, and whether the sector holds them."""
    down = y - (PROBE - p["probe_radius"])
    depth = (np.sqrt(x * x + down * down) - p["probe_radius"]) / p["depth"]
    beam = (np.arctan2(x, down) / p["half_angle"] + 1) / 2
    return depth, beam, (depth >= 0) & (depth <= 1) & (beam >= 0) & (beam <= 1)


def scan_convert(grey, p, size):
    """(n, depths, beams) -> uint8 (n, size, size), bilinear; black outside the sector."""
    n, depths, beams = grey.shape
    _, _, depth, beam, visible = pixels(p, size)
    row, column = depth * (depths - 1), beam * (beams - 1)
    i, j = np.clip(row, 0, depths - 1.01).astype(np.int32), np.clip(column, 0, beams - 1.01).astype(np.int32)
    row, column = row - i, column - j
    flat, at = grey.ravel(), (np.arange(n, dtype=np.int32)[:, None, None] * depths + i) * beams + j
    above = flat[at] * (1 - column) + flat[at + 1] * column
    below = flat[at + beams] * (1 - column) + flat[at + beams + 1] * column
    return np.where(visible, above * (1 - row) + below * row + 0.5, 0).astype(np.uint8)


def draw_masks(p, labels, size):
    """Parameters (n, 1, 1), labels (n,) -> uint8 (n, size, size): the structure at a pixel, 0 outside the sector."""
    x, y, _, _, visible = pixels(p, size)
    u, v = anatomical(x, y, p)
    masks = np.zeros(u.shape, np.uint8)
    for number, (plane, shape) in enumerate(DRAWN_AS[1:], 1):
        masks[(labels == PLANES.index(plane))[:, None, None] & visible & (shape(u, v, p) < 0)] = number
    return masks


def femur_ends(p, size):
    """Parameters (n, 1, 1) -> ends of a femur (n, 2, 2): x, y in pixels, the left one first; both visible (n,)."""
    u = np.array([-FEMUR_END, FEMUR_END])
    x, y = pictorial(u, femur_bow(u, p), p)  # (n, 1, 2)
    visible = sector(x, y, p)[2] & (np.abs(x) < 1) & (np.abs(y) < 1)
    ends = (np.stack((x, y), 3)[:, 0] + 1) * size / 2  # (n, 2, 2)
    order = ends[:, :, 0].argsort(1)[:, :, None]
    return np.take_along_axis(ends, order, 1), visible.all((1, 2))


def bounding_boxes(masks):
    """bool (m, h, w), none empty -> float64 (m, 4): x_min, y_min, x_max, y_max, the last pixel's far border."""
    columns, rows = masks.any(1), masks.any(2)  # (m, w), (m, h)
    far = [line.shape[1] - line[:, ::-1].argmax(1) for line in (columns, rows)]
    return np.stack((columns.argmax(1), rows.argmax(1), *far), 1).astype(np.float64)


def batches(n, size):
    step = len(PLANES) * max(1, 8 * 64 ** 2 // size ** 2)  # images drawn at once: few enough for the CPU's cache
    return [slice(start, start + step) for start in range(0, n, step)]


def phantom_images(n, size=64, seed=0):
    """images uint8 (n, size, size), labels (n,) into PLANES, groups (n,): frames of one group show one patient."""
    images, indices = np.empty((n, size, size), np.uint8), np.arange(n)
    labels, groups, _ = patients(indices)
    for batch in batches(n, size):
        images[batch] = render(*draw_parameters(indices[batch], size, seed), labels[batch])
    return images, labels, groups


def phantom_masks(n, size=64, seed=0):
    """images of MASK_PLANES among phantom_images(), masks uint8 (n, size, size) of class numbers, groups (n,)."""
    turn, plane = np.divmod(np.arange(n), len(MASK_PLANES))
    indices = turn * len(PLANES) + np.array([PLANES.index(name) for name in MASK_PLANES])[plane]
    images, masks = np.empty((2, n, size, size), np.uint8)
    labels, groups, _ = patients(indices)
    for batch in batches(n, size):
        parameters, noise = draw_parameters(indices[batch], size, seed)
        images[batch] = render(parameters, noise, labels[batch])
        masks[batch] = draw_masks(parameters, labels[batch], size)
    return images, masks, groups


def phantom_tasks(n, size=64, seed=0):
    """phantom_images() with a task of each type: images uint8 (n, size, size), groups (n,), tasks.

    tasks: {name: (kind, K, rows, targets)}; rows (m,) are the images that have the target. Targets are masks uint8
    (m, size, size), labels (m,), boxes (m, 4) or points (m, K, 2) in pixels. A heart that is mostly out of sight has
    no box, a femur no points if an end is.
    """
    images, masks = np.empty((2, n, size, size), np.uint8)
    ends, whole, area = np.empty((n, 2, 2)), np.empty(n, bool), np.empty(n)  # as if each image showed femur and heart
    labels, groups, _ = patients(np.arange(n))
    for batch in batches(n, size):
        parameters, noise = draw_parameters(np.arange(n)[batch], size, seed)
        images[batch] = render(parameters, noise, labels[batch])
        masks[batch] = draw_masks(parameters, labels[batch], size)
        ends[batch], whole[batch] = femur_ends(parameters, size)
        scale = (parameters["zoom"] * parameters["closer"])[:, 0, 0] * size / 2  # pixels per unit of u
        area[batch] = np.pi * np.prod(HEART_AXES) * scale ** 2
    heart = masks == STRUCTURES.index("heart")
    shown = np.flatnonzero(np.isin(labels, [PLANES.index(name) for name in MASK_PLANES]))
    hearts = np.flatnonzero(heart.sum((1, 2)) >= np.maximum(HEART_PIXELS, area / 2))
    femurs = np.flatnonzero((labels == PLANES.index("femur")) & whole)
    return images, groups, {
        "phantom structures": ("segmentation", len(STRUCTURES), shown, masks[shown]),
        "phantom planes": ("classification", len(PLANES), np.arange(n), labels),
        "phantom heart": ("detection", 1, hearts, bounding_boxes(heart[hearts])),
        "phantom femur": ("regression", 2, femurs, ends[femurs])}
