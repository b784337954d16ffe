"""The images of a labelled set, read once and kept as squares of the sizes that networks look at."""

import concurrent.futures
import sys

import numpy as np
from tqdm import tqdm

from frames.fan import background, find_fan
from frames.images import resize_square
from frames.leakage import WORDS, content_hash, perceptual_hash


class Images:
    """n images of a labelled set as square canvases. `load(i)` -> images.Frame; show(i, grey): what becomes of the grey
    image before it is squared.

    Files are read when a size is first asked for. After that: content uint64 (n,) and looks (n, WORDS), leakage.py's
    hashes of all that the screen showed.
    """

    def __init__(self, n, load, show=None):
        self.n, self.load, self.show, self.squares = n, load, show, {}
        self.content, self.looks = np.empty(n, np.uint64), np.empty((n, WORDS), np.uint64)

    def read(self, sizes):
        """Read all files once for several sizes: {size: uint8 (n, size, size)}, and forget other sizes."""
        squares = {size: self.squares.get(size) for size in sizes}
        missing = {size: np.empty((self.n, size, size), np.uint8) for size, known in squares.items() if known is None}

        def read(i):
            frame = self.load(i)
            self.content[i], self.looks[i] = content_hash(frame.whole), perceptual_hash(frame.whole)
            grey = frame.grey if self.show is None else self.show(i, frame.grey)
            for size, canvas in missing.items():
                canvas[i] = resize_square(grey, size)

        if missing:
            with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # decoding leaves Python's lock
                list(tqdm(pool.map(read, range(self.n)), total=self.n, desc="images", disable=not sys.stderr.isatty(),
                          leave=False))
        self.squares = {**squares, **missing}
        return self.squares

    def at(self, size):
        return self.read([size])[size]


def outside_fans(load, groups):
    """A function (i, grey) -> what grey shows outside the ultrasound fan, the fan filled with the background's level,
    and whether image i has such an outside at all, bool (n,). groups (n,)

    A clip's fan stands still, and its brightest pixels show more of it than a still: images of one group and size share
    the fan of their maximum.
    """
    members, fans, partly = {}, {}, np.empty(len(groups), bool)
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)

    def read(group):  # a group at a time bounds the memory
        brightest, shapes = {}, []
        for i in members[group]:
            grey = load(i).grey
            shapes.append(grey.shape)
            brightest[grey.shape] = np.maximum(brightest.get(grey.shape, grey), grey)
        found = {shape: find_fan(grey) for shape, grey in brightest.items()}
        fans.update({(group, shape): np.packbits(fan) for shape, fan in found.items()})
        partly[members[group]] = [not found[shape].all() for shape in shapes]

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:
        list(tqdm(pool.map(read, members), total=len(members), desc="fans", disable=not sys.stderr.isatty(),
                  leave=False))

    def outside(i, grey):
        fan, level = np.unpackbits(fans[groups[i], grey.shape], count=grey.size).reshape(grey.shape), background(grey)
        return np.where(fan, np.uint8(0 if level is None else level), grey)

    return outside, partly
