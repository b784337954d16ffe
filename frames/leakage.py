"""Has this image been seen before? By its pixels, by its look, by the name of its group.

    content_hash     8 bytes of size and grey pixels: equal for the same picture in another lossless file
    perceptual_hash  256 bits of what a frame looks like: near for a re-exported frame, far for another patient's
    look_alikes, near_duplicates, overlap: the comparisons, exact and in bounded memory

A perceptual hash holds the signs of 256 low DCT coefficients of a 32 x 32 reduction. Three steps stand before the DCT,
since all ultrasound frames share a bright fan on a black border and re-exports differ in grey curve, text and margins:

1. subtract the local mean and divide by the local deviation plus FLOOR: what is left hardly depends on gain or gamma,
   and wide black areas stay 0 (their signs would be noise);
2. clip at CLIP deviations, so that burnt-in text and the fan's edge weigh no more than tissue;
3. weigh by a sine over each side: corners, where text lies and where a crop moves most, count least.
"""

import hashlib

import numpy as np
from PIL import Image

BITS = 256
WORDS = BITS // 64
SIDE = 32  # pixels of the reduction; a period of the highest coefficient used is about 3 of them
FLOOR, CLIP = 6.0, 1.0  # grey levels, local deviations
FLAT = 1.0  # grey levels of deviation from the local mean (rms) below which a frame has no structure

# Bits in which a re-export may differ. Frames of two patients differ in about 127; how near the nearest two come
# depends on how alike the views are: fetal heads in the standard plane come nearest. There one pair in a billion is
# expected within 28 bits, by the tail of 660,000 pairs of HC18; tests/frames/test_leakage.py looks at real pairs.
SAME = 28
NEAR = 28  # frames of one clip: nothing has visibly moved

WINDOW = 20_000  # frames kept of a group that a new one is compared with: two million of one group take minutes so
CHUNK = 1 << 16  # known hashes compared at a time: two words of each and the result fit the CPU's cache


def _smoothing(sigma):
    weights = np.exp(-0.5 * ((np.arange(SIDE)[:, None] - np.arange(SIDE)) / sigma) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _frequencies():
    """Rows and columns (BITS,) of the lowest DCT coefficients but the mean, by rising row + column."""
    pairs = sorted(((u, v) for u in range(SIDE) for v in range(SIDE)), key=lambda pair: (sum(pair), pair))
    return tuple(np.array(pairs[1:BITS + 1]).T)


SMOOTH = _smoothing(3.0)
COEFFICIENTS = _frequencies()
CENTRES = (np.arange(SIDE) + 0.5) / SIDE
DCT = np.cos(np.pi * CENTRES * np.arange(np.max(COEFFICIENTS) + 1)[:, None]) * np.sin(np.pi * CENTRES)  # (u, SIDE)
DCT = DCT.astype(np.float32)


# ---------------------------------------------------------------- what is kept of an image and of a group's name

def content_hash(grey):
    """8-byte digest of size and grey pixels, as an int that fits uint64."""
    digest = hashlib.blake2b(str(grey.shape).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(grey))
    return int.from_bytes(digest.digest(), "big")


def perceptual_hash(grey):
    """uint8 (h, w), any size and aspect -> uint64 (WORDS,), lowest frequencies first; zeros if there is no structure.

    The image is squashed to a square, so a frame and its square canvas have nearly the same hash. Flips and rotations
    are other images.
    """
    x = np.asarray(Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    x = x - SMOOTH @ x @ SMOOTH.T
    energy = x * x
    if energy.mean() < FLAT ** 2:
        return np.zeros(WORDS, np.uint64)
    x = np.clip(x / (np.sqrt(SMOOTH @ energy @ SMOOTH.T) + FLOOR), -CLIP, CLIP)
    bits = (DCT @ x @ DCT.T)[COEFFICIENTS] > 0
    return np.packbits(bits).view("<u8").astype(np.uint64)


def salted(name, salt):
    """8-byte digest of a group's name, keyed with `salt` (1 to 64 bytes), as an int that fits uint64.

    Names can be patients' names: a checkpoint keeps only these. Whoever has the salt can still try names one by one.
    """
    if not salt:
        raise ValueError("the salt of group names is empty: anyone could look the names up")
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), key=salt, digest_size=8)
    return int.from_bytes(digest.digest(), "big")


# ---------------------------------------------------------------- comparisons

def _any_within(query, known, threshold):
    """Whether one of known (WORDS, m) is within `threshold` bits of query (WORDS,).

    Two words of four rule out all but a few in ten thousand: the other two are read for those only.
    """
    distance = np.bitwise_count(known[0] ^ query[0])
    distance += np.bitwise_count(known[1] ^ query[1])  # at most 128: fits uint8, as 256 would not
    near = np.flatnonzero(distance <= threshold)
    if not len(near):
        return False
    return bool((np.bitwise_count(known[:, near] ^ query[:, None]).sum(0, dtype=np.int64) <= threshold).any())


def look_alikes(queries, known, threshold=SAME):
    """Whether some known hash is within `threshold` bits: uint64 (n, WORDS), (m, WORDS) -> bool (n,).

    Hashes of frames without structure (zeros) match nothing. Exact: every pair is compared, at about 1.6 ns of a core.
    """
    found = np.zeros(len(queries), bool)
    structured = queries.any(1)
    for start in range(0, len(known), CHUNK):
        chunk = known[start:start + CHUNK]
        chunk = np.ascontiguousarray(chunk[chunk.any(1)].T)  # (WORDS, chunk)
        for index in np.flatnonzero(structured & ~found):
            found[index] = _any_within(queries[index], chunk, threshold)
    return found


def near_duplicates(hashes, content, groups):
    """Images that repeat an earlier one: uint64 (n, WORDS), (n,), n group names -> exact bool (n,), near bool (n,).

    exact: an earlier image, of whatever group, has the same pixels. near: not exact, and within NEAR bits of an earlier
    image of its group that was kept, that is neither exact nor near; of very large groups, the last WINDOW of those. So
    of a slow clip a frame stays wherever the picture has moved on from the last one kept.
    """
    exact = np.ones(len(hashes), bool)
    exact[np.unique(content, return_index=True)[1]] = False
    near = np.zeros(len(hashes), bool)
    members = {}
    for index in np.flatnonzero(~exact & hashes.any(1)).tolist():
        members.setdefault(groups[index], []).append(index)
    for indices in members.values():
        kept, count = np.empty((WORDS, len(indices)), np.uint64), 0
        for index in indices:
            near[index] = _any_within(hashes[index], kept[:, max(0, count - WINDOW):count], NEAR)
            if not near[index]:
                kept[:, count] = hashes[index]
                count += 1
    return exact, near


COMPARED = {"identical": "by pixels", "look_alike": "by look", "pretraining_group": "by group name"}
CALLED = {"identical": "identical", "look_alike": "look alike", "pretraining_group": "of a pretraining group"}


def overlap(seen, content, looks, groups=None):
    """Which of n test images a checkpoint was pretrained on: counts (or None), a sentence, bool (n,).

    seen: what the checkpoint records, with any of `content` uint64 (m,), `looks` uint64 (m, WORDS), `group_digests`
    uint64 (G,) with their `salt`; a missing or None entry is not compared, and the sentence says what was. seen None is
    a checkpoint that records nothing. content (n,), looks (n, WORDS), groups: of the test images; groups None where
    they mean nothing. An image counts once: as identical, else as a look-alike, else as of a pretraining group.
    """
    def recorded(name, shape):
        array = np.asarray(seen[name])
        if array.dtype not in (np.uint64, np.int64) or array.shape[1:] != shape:  # int64: the same bits
            raise ValueError(f"the checkpoint's {name}: {array.dtype} {array.shape}, expected uint64 {('m', *shape)}")
        return array.view(np.uint64)

    n, seen, same = len(content), seen or {}, {}
    if seen.get("content") is not None:
        # as uint64: next to int64 numpy would compare as float64, which rounds hashes
        same["identical"] = np.isin(np.asarray(content, np.uint64), recorded("content", ()))
    if seen.get("looks") is not None:
        same["look_alike"] = look_alikes(looks, recorded("looks", (WORDS,)))
    if groups is not None and seen.get("group_digests") is not None and seen.get("salt"):
        digests = {name: salted(name, seen["salt"]) for name in set(groups)}
        digests = np.array([digests[name] for name in groups], np.uint64)
        same["pretraining_group"] = np.isin(digests, recorded("group_digests", ()))

    found, counts = np.zeros(n, bool), {"images": n}
    if not same:
        return None, ("cannot tell whether test images were in the pretraining set: the checkpoint does not record its "
                      "images"), found
    for kind, mask in same.items():
        counts[kind] = int((mask & ~found).sum())
        found |= mask
    counts["seen"] = int(found.sum())
    if not counts["seen"]:
        *most, last = [COMPARED[kind] for kind in same]
        how = " and ".join([", ".join(most), last] if most else [last])
        return counts, f"none of the {n:,} test images was in the pretraining set (compared {how})", found
    parts = ", ".join(f"{counts[kind]:,} {CALLED[kind]}" for kind in same)
    return counts, (f"transductive: {counts['seen']:,} of {n:,} test images {'was' if counts['seen'] == 1 else 'were'} "
                    f"in the pretraining set ({parts}): a score on them is no evidence about unseen patients"), found
