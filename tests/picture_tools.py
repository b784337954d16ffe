"""Images and masks to draw, and what is found of them in pictures."""
import numpy as np
from PIL import Image

GREY = 97  # of test images: no other large patch of an overlay has it


def pixels(path):
    """The PNG as int16 (h, w, 3)."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(np.int16)


def is_colour(image, colour):
    return (np.abs(np.asarray(image).astype(np.int16) - colour) <= 1).all(-1)


def square(shape, top, bottom, left, right, number=1):
    mask = np.zeros(shape, np.uint8)
    mask[top:bottom, left:right] = number
    return mask


def flat(*shape):
    return np.full(shape, GREY, np.uint8)


def runs(flags):
    """(first, last + 1) of each run of true flags."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(int), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def noise(n, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), np.uint8)
