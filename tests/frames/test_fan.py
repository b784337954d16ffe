"""The fan is found, nothing of it is lost or changed, and what is burnt in beside it goes; or nothing is trimmed."""
import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from frames import fan
from frames.phantom import phantom_images

H, W = 480, 640
NEAR = 28  # pixels by which what touches the fan may stay: 4 reduced ones regrown, 1 of margin, and a JPEG block


def sector(x0, y0, near, far, half_angle, shape=(H, W)):
    y, x = np.mgrid[:shape[0], :shape[1]]
    radius = np.hypot(x - x0, y - y0)
    return (radius >= near) & (radius <= far) & (np.abs(np.arctan2(x - x0, y - y0)) <= half_angle)


def rectangle(left, top, right, bottom, shape=(H, W)):
    mask = np.zeros(shape, bool)
    mask[top:bottom, left:right] = True
    return mask


SHAPES = {"sector": sector(320, -20, 60, 470, 0.6), "wide": sector(320, -60, 120, 460, 0.65),
          "narrow": sector(320, 20, 10, 430, 0.45), "linear": rectangle(150, 40, 490, 440)}
BACKGROUNDS = {"black": 0, "grey": 40, "white": 255}


def echoes(truth, level=40.0, seed=0):
    """Speckle in `truth`, at least 1, black elsewhere."""
    noise = np.random.default_rng(seed).gamma(2.0, level / 2, truth.shape)
    return np.where(truth, np.clip(noise, 1, 255), 0).astype(np.uint8)


def overlay(*kinds):
    """uint8 (H, W) of what screens show beside the fan."""
    image = Image.new("L", (W, H))
    draw = ImageDraw.Draw(image)
    for kind in kinds:
        if kind == "text":
            for line, text in enumerate(("DOE^JANE 1990-01-01", "GENERAL HOSPITAL", "MI 1.1 TIs 0.2")):
                draw.text((12, 14 + 20 * line), text, fill=255, font_size=15)
            draw.text((W - 120, 440), "BPD 5.61 cm", fill=230, font_size=15)
        elif kind == "bar":
            for step in range(256):
                draw.line((W - 24, 100 + step, W - 7, 100 + step), fill=255 - step)
        elif kind == "ruler":
            for y in range(40, 440, 10):
                draw.line((W - 60, y, W - (44 if y % 50 else 34), y), fill=255)
        elif kind == "logo":
            draw.ellipse((W - 110, 12, W - 50, 62), fill=200)
        elif kind == "thumbnail":
            draw.rectangle((8, 180, 68, 240), fill=120)
        elif kind == "trace":
            draw.line([(x, 474 - 20 * (x % 90 < 4)) for x in range(0, W, 2)], fill=200, width=2)
        elif kind == "strip":
            draw.rectangle((0, H - 12, W, H), fill=90)
        elif kind == "frame":
            draw.rectangle((2, 2, W - 3, H - 3), outline=128)
    return np.asarray(image)


OVERLAYS = [(), ("text",), ("bar",), ("ruler",), ("logo",), ("thumbnail",), ("trace",), ("strip",), ("frame",),
            ("text", "bar", "logo", "trace")]


def jpeg(grey, quality):
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def far_from(truth):
    return ndimage.distance_transform_edt(~truth) > NEAR


# ---------------------------------------------------------------- screens

@pytest.mark.parametrize("quality", [None, 75], ids=["lossless", "jpeg"])
@pytest.mark.parametrize("kinds", OVERLAYS, ids=["+".join(kinds) or "bare" for kinds in OVERLAYS])
@pytest.mark.parametrize("shape", SHAPES)
def test_fan_is_kept_and_its_surroundings_go(shape, kinds, quality):
    truth, burnt = SHAPES[shape], overlay(*kinds)
    grey = np.where(truth, echoes(truth), burnt)
    if quality:
        grey = jpeg(grey, quality)
    found = fan.find_fan(grey)
    assert not (truth & ~found).any(), "sector pixels lost"
    ideal = fan.fill(fan.hull(fan.outline(truth)), truth.shape, 1)
    assert overlap(found, ideal) > (0.82 if quality else 0.85)  # the margin, and what 8 x 8 JPEG blocks smear
    beside = (burnt > 0) & far_from(ideal)
    kept = (found & beside).sum() / max(1, beside.sum())
    assert kept <= 0.02, f"{kept:.0%} of the overlay kept"
    trimmed, (left, top, right, bottom) = fan.apply_fan(grey, found)
    crop = np.s_[top:bottom, left:right]
    assert trimmed.dtype == np.uint8 and trimmed.flags.owndata
    assert np.array_equal(trimmed[found[crop]], grey[found]) and not trimmed[~found[crop]].any()
    assert found[top].any() and found[bottom - 1].any() and found[:, left].any() and found[:, right - 1].any()


@pytest.mark.parametrize("noise", [0, 2])
@pytest.mark.parametrize("level", BACKGROUNDS.values(), ids=BACKGROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_background(shape, level, noise):
    truth = SHAPES[shape]
    grey = np.where(truth, echoes(truth, 90.0), level)
    grey = np.clip(grey + noise * np.random.default_rng(1).standard_normal(truth.shape), 0, 255).astype(np.uint8)
    found = fan.find_fan(grey)
    assert (truth & ~found).mean() < 1e-4 and overlap(found, truth) > 0.85


@pytest.mark.parametrize("text", ["left", "right"])
def test_text_that_touches_the_fan(text):
    truth = SHAPES["linear"]
    image = Image.fromarray(echoes(truth))
    x = 70 if text == "left" else 478
    ImageDraw.Draw(image).text((x, 200), "LIVER 12.3", fill=255, font_size=16)
    found = fan.find_fan(np.asarray(image))
    assert not (truth & ~found).any() and overlap(found, truth) > 0.85
    assert not found[:, :120].any() and not found[:, 520:].any()


def test_callipers_stay():
    truth = SHAPES["sector"]
    image = Image.fromarray(echoes(truth))
    draw = ImageDraw.Draw(image)
    draw.line((250, 250, 380, 300), fill=255)
    draw.text((245, 240), "+", fill=255, font_size=16)
    grey = np.asarray(image)
    found = fan.find_fan(grey)
    assert np.array_equal(np.where(found, grey, 0), grey)


def test_holes_shadows_and_a_second_part():
    truth = SHAPES["wide"]
    grey = echoes(truth)
    grey[200:300, 260:380] = 0  # a cyst
    assert not (truth & ~fan.find_fan(grey)).any()
    grey = echoes(truth)
    grey[sector(320, -60, 0, 999, 0.15)] = 0  # a shadow from the probe down: two parts
    assert ndimage.label(grey > 0)[1] == 2
    found = fan.find_fan(grey)
    assert not ((grey > 0) & ~found).any() and overlap(found, truth) > 0.85
    near, far = sector(320, -60, 120, 250, 0.8), sector(320, -60, 400, 500, 0.8)
    assert not ((near | far) & ~fan.find_fan(echoes(near | far))).any()  # fluid between


def test_a_small_part_joins_over_a_narrow_gap_only():
    truth = sector(320, 0, 30, 440, 0.6)
    shadow = sector(320, 0, 0, 999, 0.5) & ~sector(320, 0, 0, 999, 0.42) & (np.arange(W) > 320)
    grey = np.where(shadow, 0, echoes(truth))
    assert not ((grey > 0) & ~fan.find_fan(grey)).any()
    assert ndimage.label(grey > 0)[1] == 2
    logo = rectangle(0, 0, 80, 70)
    found = fan.find_fan(np.where(logo, 255, echoes(truth, level=8.0)))  # bright, beside a dim fan
    assert not found[logo].any() and (truth & ~found).sum() < 1e-3 * truth.sum()


def test_a_heavy_part_joins_over_any_gap():
    near, far = rectangle(240, 20, 400, 70), rectangle(190, 330, 450, 430)
    assert not ((near | far) & ~fan.find_fan(echoes(near | far))).any()
    stripe, faint = rectangle(250, 20, 390, 50), rectangle(150, 300, 490, 440)  # heavy by its contrast, not its area
    grey = np.where(faint, np.random.default_rng(0).uniform(3, 7, faint.shape), echoes(stripe)).astype(np.uint8)
    assert not ((stripe | faint) & ~fan.find_fan(grey)).any()


def test_dual_view():
    both = sector(160, 0, 30, 400, 0.35) | sector(480, 0, 30, 400, 0.35)
    assert not (both & ~fan.find_fan(echoes(both))).any()
    both = rectangle(20, 60, 300, 420) | rectangle(340, 60, 620, 420)
    assert not (both & ~fan.find_fan(echoes(both))).any()


@pytest.mark.parametrize("height", [12, 30, 60])
def test_only_a_stripe_is_bright(height):
    """A black far field cannot be seen; what can be seen is kept, and a faint far field counts as seen."""
    truth, stripe = SHAPES["linear"], rectangle(150, 40, 490, 40 + height)
    found = fan.find_fan(echoes(stripe))
    assert not (stripe & ~found).any() and overlap(found, stripe) > 0.4
    faint = np.maximum(echoes(stripe), (truth * np.random.default_rng(0).uniform(3, 6, truth.shape)).astype(np.uint8))
    found = fan.find_fan(faint)
    assert not (truth & ~found).any() and overlap(found, truth) > 0.9


def test_a_clip_shows_more_than_a_frame():
    truth = SHAPES["sector"]
    frames = np.stack([echoes(truth, seed=seed) for seed in range(3)])
    frames[0, :, :300] = frames[1, :, 340:] = frames[2, 250:] = 0  # each shows another part of the fan
    assert all((truth & ~fan.find_fan(frame)).any() for frame in frames)
    found = fan.find_fan(frames.max(0))
    assert not (truth & ~found).any() and overlap(found, truth) > 0.85


@pytest.mark.parametrize("scale", [0.1, 0.25, 0.5, 2.0])
def test_any_size(scale):
    size = round(W * scale), round(H * scale)
    truth = np.asarray(Image.fromarray(SHAPES["sector"]).resize(size, Image.Resampling.NEAREST))
    found = fan.find_fan(echoes(truth))
    assert not (truth & ~found).any() and overlap(found, truth) > (0.8 if scale < 0.25 else 0.88)


@pytest.mark.parametrize("size", [16, 32, 64, 224])
def test_phantoms(size):
    """Their sector fills the picture but for the corners. Only a thin strip of echo behind a shadow may be lost."""
    images, _, _ = phantom_images(18, size, seed=3)
    trimmed = []
    for grey in images:
        found = fan.find_fan(grey)
        bright = grey > 40
        assert (bright & ~found).sum() <= 0.01 * bright.sum()
        trimmed.append(1 - found.mean())
    if size > 16:
        assert np.mean(trimmed) > 0.1


# ---------------------------------------------------------------- nothing to trim

def speckle(shape=(H, W), level=60.0):
    return np.clip(np.random.default_rng(0).gamma(3.0, level / 3, shape), 0, 255).astype(np.uint8)


FULL = {"tissue to the edge": speckle(), "dark tissue": speckle(level=12.0),
        "dark below": (speckle() * np.linspace(1.8, 0.15, H)[:, None]).clip(0, 255).astype(np.uint8),
        "brighter above": (speckle() * np.linspace(1.5, 0.3, H)[:, None]).clip(0, 255).astype(np.uint8),
        "black": np.zeros((H, W), np.uint8), "white": np.full((H, W), 255, np.uint8),
        "noisy black": np.abs(6 * np.random.default_rng(0).standard_normal((H, W))).astype(np.uint8),
        "one line of text": overlay("text") * (np.arange(H)[:, None] < 34).astype(np.uint8),
        "a trace alone": overlay("trace"), "a thin bar of black": speckle() * (np.arange(W) > 3).astype(np.uint8)}


@pytest.mark.parametrize("name", FULL)
def test_nothing_to_trim(name):
    grey = FULL[name]
    found = fan.find_fan(grey)
    assert found.all()
    trimmed, box = fan.apply_fan(grey, found)
    assert trimmed is grey and box == (0, 0, W, H)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 3), (3, 2), (1, 1000), (1000, 1), (5, 5), (16, 16), (7, 300)],
                         ids="{0[0]}x{0[1]}".format)
def test_tiny_images(shape):
    for seed in range(20):
        generator = np.random.default_rng(seed)
        grey = (generator.integers(0, 256, shape) * (generator.random(shape) < seed / 20)).astype(np.uint8)
        found = fan.find_fan(grey)
        assert found.shape == shape and found.dtype == bool and found.any()
        trimmed, (left, top, right, bottom) = fan.apply_fan(grey, found)
        assert trimmed.shape == (bottom - top, right - left)


def test_refusals():
    for grey in (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4)), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ValueError, match="grey uint8"):
            fan.find_fan(grey)
    for mask in (np.zeros((4, 4), bool), np.ones((4, 5), bool)):
        with pytest.raises(ValueError, match="cannot be cut"):
            fan.apply_fan(np.zeros((4, 4), np.uint8), mask)


# ---------------------------------------------------------------- the parts

@pytest.mark.parametrize("level", [0, 1, 40, 254, 255])
def test_background_is_the_most_frequent_level(level):
    noisy = np.random.default_rng(0).choice([level - 1, level, level + 1], (60, 80), p=[0.2, 0.6, 0.2]).clip(0, 255)
    assert fan.background(np.full((60, 80), level, np.uint8)) == fan.background(noisy.astype(np.uint8)) == level
    assert fan.background(speckle((60, 80))) is None


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_erosion_and_dilation_equal_scipy(steps):
    mask = np.random.default_rng(0).random((41, 60)) < 0.97
    point = np.zeros((2 * steps + 1,) * 2, bool)
    point[steps, steps] = True
    for step in range(steps):
        point = ndimage.binary_dilation(point, ndimage.generate_binary_structure(2, 1 + step % 2))
    assert np.array_equal(fan.erode(mask, steps), ndimage.binary_erosion(mask, point))
    assert np.array_equal(fan.dilate(~mask, steps), ndimage.binary_dilation(~mask, point))


def test_hull_holds_its_points_and_is_convex():
    for seed in range(20):
        points = list(map(tuple, np.random.default_rng(seed).integers(0, 30, (40, 2)).tolist()))
        corners = np.array(fan.hull(points))
        edges = np.roll(corners, -1, 0) - corners
        turns = edges[:, 0] * np.roll(edges, -1, 0)[:, 1] - edges[:, 1] * np.roll(edges, -1, 0)[:, 0]
        assert (turns > 0).all() and set(map(tuple, corners.tolist())) <= set(points)
        to_points = np.array(points)[None] - corners[:, None]  # (corners, points, 2)
        assert (edges[:, None, 0] * to_points[..., 1] - edges[:, None, 1] * to_points[..., 0] >= 0).all()


def test_cost():
    truth = SHAPES["sector"]
    grey = jpeg(np.where(truth, echoes(truth), overlay("text", "bar", "logo")), 75)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        fan.find_fan(grey)
        times.append(time.perf_counter() - start)
    print(f"find_fan: {min(times) * 1e3:.1f} ms per {W} x {H} frame")
    assert min(times) < 0.05  # some 3 ms on an idle core


# ---------------------------------------------------------------- real frames

REAL = os.environ.get("ULTRASOUND_DATA")


@pytest.mark.skipif(not REAL, reason="set ULTRASOUND_DATA to a folder with hc18/ and busi/ to check real frames")
@pytest.mark.parametrize("pattern", ["hc18/training_set/*_Mask.png", "busi/*/*_mask.png"])
def test_real_masks_lie_inside(pattern):
    masks = sorted(Path(REAL).glob(pattern))
    assert masks
    lost, trimmed = [], []
    for path in masks[::3]:
        grey = np.asarray(Image.open(path.with_name(path.name[:-9] + ".jpg")).convert("L"))
        mask = np.asarray(Image.open(path).convert("L")) > 127
        found = fan.find_fan(grey)
        trimmed.append(1 - found.mean())
        if (grey[mask & ~found] > 8).any():  # HC18's publisher has blanked boxes, which may reach into a head
            lost.append(path.name)
    print(f"{len(trimmed)} images, {np.mean(trimmed):.1%} trimmed, {len(lost)} masks cut")
    assert not lost
