"""Seen before? Re-exports are near, other patients far; every comparison equals brute force; what overlap() says."""

import csv
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from frames import leakage
from frames.leakage import NEAR, SAME, WORDS, look_alikes, near_duplicates, overlap, perceptual_hash, salted
from frames.phantom import phantom_images

# ---------------------------------------------------------------- re-exports of a frame

def grey_curve(function):
    table = np.clip(function(np.arange(256.0)), 0, 255).round().astype(np.uint8)
    return lambda grey: table[grey]


def jpeg(quality):
    def export(grey):
        file = io.BytesIO()
        Image.fromarray(grey).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))
    return export


def rescale(x, y):
    return lambda grey: np.asarray(
        Image.fromarray(grey).resize((round(grey.shape[1] * x), round(grey.shape[0] * y)), Image.Resampling.BILINEAR))


def crop(share):
    def export(grey):
        rows, columns = round(grey.shape[0] * share), round(grey.shape[1] * share)
        return grey[rows:-rows, columns:-columns]
    return export


def burn_text(grey):
    image = Image.fromarray(grey)
    ImageDraw.Draw(image).text((6, 6), "12:34:56 ABDOMEN\nGAIN 60%", fill=230, font_size=max(10, grey.shape[0] // 24))
    return np.asarray(image)


def chain(*steps):
    def export(grey):
        for step in steps:
            grey = step(grey)
        return grey
    return export


EXPORTS = {  # name: (re-export, least share recognised: of phantoms, of real frames)
    "jpeg 30": (jpeg(30), 1.0, 0.99),
    "jpeg 95": (jpeg(95), 1.0, 1.0),
    "half size": (rescale(0.5, 0.5), 1.0, 1.0),
    "double size": (rescale(2, 2), 1.0, 1.0),
    "other aspect": (rescale(1.3, 1), 1.0, 1.0),
    "gamma 0.8": (grey_curve(lambda v: 255 * (v / 255) ** 0.8), 1.0, 0.98),
    "gamma 1.25": (grey_curve(lambda v: 255 * (v / 255) ** 1.25), 1.0, 0.98),
    "darker": (grey_curve(lambda v: 0.8 * v), 1.0, 1.0),
    "brighter": (grey_curve(lambda v: v + 20), 1.0, 1.0),
    "window": (grey_curve(lambda v: 1.2 * (v - 20)), 0.95, 0.65),  # what was below 20 is lost: much of a dark frame
    "text": (burn_text, 1.0, 0.98),
    "crop 1 %": (crop(0.01), 0.95, 0.98),
    "half, gamma, jpeg": (chain(rescale(0.5, 0.5), grey_curve(lambda v: 255 * (v / 255) ** 1.25), jpeg(40)), 0.95, 0.9),
}


@pytest.fixture(scope="module")
def frames():
    """Phantoms of 256 pixels: images (n, 256, 256), groups (n,), hashes (n, WORDS)."""
    images, _, groups = phantom_images(135, 256, seed=0)
    return images, groups, hash_all(images)


def hash_all(images):
    return np.stack([perceptual_hash(image) for image in images])


def distances(a, b):
    """Bits between every two hashes: (n, WORDS), (m, WORDS) -> (n, m)."""
    return np.bitwise_count(a[:, None] ^ b[None]).sum(-1, dtype=int)


@pytest.mark.parametrize("name", EXPORTS)
def test_reexport_is_recognised(frames, name):
    export, least, _ = EXPORTS[name]
    images, _, hashes = frames
    bits = np.bitwise_count(hashes[::2] ^ hash_all([export(image) for image in images[::2]])).sum(1, dtype=int)
    assert (bits <= SAME).mean() >= least, f"{name}: bits {np.quantile(bits, (0.5, 0.9, 1))}"


def test_other_patients_are_far(frames):
    _, groups, hashes = frames
    bits = distances(hashes, hashes)[groups[:, None] != groups]
    assert bits.min() > SAME + 8 and 120 < np.median(bits) < 136


@pytest.mark.parametrize("n", [2400, pytest.param(12000, marks=pytest.mark.slow)])
def test_no_phantom_of_the_smoke_test_looks_like_a_pretraining_phantom(n):
    """fewshot.py's phantoms against those that pretrain.py draws by default (12,000), of 64 pixels."""
    known, queries = (hash_all(phantom_images(n, 64, seed)[0]) for n, seed in ((n, 0), (1200, 1_000_000)))
    assert known.any(1).all() and queries.any(1).all()
    assert not look_alikes(queries, known, SAME + 8).any()
    assert look_alikes(known[:100], known).all()


def test_flipped_frame_is_another(frames):
    images, _, hashes = frames
    assert np.bitwise_count(hashes ^ hash_all(images[:, :, ::-1])).sum(1).min() > SAME


@pytest.mark.parametrize("shape", [(1, 1), (5, 300), (480, 640), (384, 384)])
def test_blank_frames_have_no_look(shape):
    rng = np.random.default_rng(0)
    for grey in np.zeros(shape, np.uint8), np.full(shape, 200, np.uint8), rng.integers(9, 11, shape, dtype=np.uint8):
        assert not perceptual_hash(grey).any()
    assert perceptual_hash(np.zeros(shape, np.uint8)).dtype == np.uint64


def test_hash_of_the_canvas_and_of_a_view_in_memory(frames):
    wide = np.asarray(Image.fromarray(frames[0][0]).resize((640, 480)))
    canvas = np.asarray(Image.fromarray(wide).resize((384, 384), Image.Resampling.BICUBIC))
    assert np.bitwise_count(perceptual_hash(wide) ^ perceptual_hash(canvas)).sum() <= 6
    assert (perceptual_hash(wide[:, ::2]) == perceptual_hash(wide[:, ::2].copy())).all()  # not row-major


def test_content_hash_is_of_size_and_pixels(frames):
    for grey in frames[0][0], frames[0][0][:, ::2], np.zeros((3, 5), np.uint8):
        digest = hashlib.blake2b(str(grey.shape).encode() + grey.tobytes(), digest_size=8).digest()
        assert leakage.content_hash(grey) == int.from_bytes(digest, "big")  # packs and checkpoints hold these
    assert leakage.content_hash(np.zeros((2, 8), np.uint8)) != leakage.content_hash(np.zeros((4, 4), np.uint8))


# ---------------------------------------------------------------- comparisons against brute force

def flip_bits(hashes, counts, rng):
    """Copies with exactly counts (n,) bits changed, anywhere."""
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    for row, count in zip(bits, counts):
        row[rng.permutation(bits.shape[1])[:count]] ^= 1
    return np.packbits(bits, axis=1).view(np.uint64)


@pytest.mark.parametrize("threshold", [0, 1, SAME, 64, 100, 256])
def test_look_alikes_is_brute_force(monkeypatch, threshold):
    monkeypatch.setattr(leakage, "CHUNK", 64)
    rng = np.random.default_rng(threshold)
    known = rng.integers(0, 2 ** 64, (500, WORDS), dtype=np.uint64)
    counts = rng.integers(max(0, threshold - 3), threshold + 4, 300).clip(0, 256)
    queries = flip_bits(known[rng.integers(0, 500, 300)], counts, rng)
    queries[:20, :2] = known[:20, :2]  # the screened words agree, the others do not
    known[::7], queries[::5] = 0, 0
    bits = distances(queries, known)
    bits[~queries.any(1)] = bits[:, ~known.any(1)] = 999
    found = look_alikes(queries, known, threshold)
    assert (found == (bits.min(1) <= threshold)).all()
    assert found.any() and not found.all()


def test_the_threshold_is_inclusive_wherever_the_bits_differ():
    known = np.zeros((1, WORDS), np.uint64)
    known[0] = 0x0123456789abcdef
    for words in ([0], [1], [2], [3], [0, 3], [0, 1, 2, 3]):
        for bits, expected in ((SAME, True), (SAME + 1, False)):
            query = known.copy()
            for bit in range(bits):
                query[0, words[bit % len(words)]] ^= np.uint64(1 << bit // len(words))
            assert look_alikes(query, known)[0] == expected


def test_look_alikes_of_nothing():
    some, none = np.ones((3, WORDS), np.uint64), np.zeros((0, WORDS), np.uint64)
    assert not look_alikes(some, none).any() and look_alikes(none, some).shape == (0,)
    blank = np.zeros((3, WORDS), np.uint64)
    assert not look_alikes(blank, blank, 256).any() and not look_alikes(some, blank, 256).any()
    assert not look_alikes(some, ~some, 255).any() and look_alikes(some, ~some, 256).all()  # 256 bits overflow a byte


def plain_near_duplicates(hashes, content, groups):
    exact, near = np.zeros(len(hashes), bool), np.zeros(len(hashes), bool)
    for i in range(len(hashes)):
        exact[i] = content[i] in content[:i]
        near[i] = not exact[i] and hashes[i].any() and any(
            groups[j] == groups[i] and not exact[j] and not near[j] and hashes[j].any()
            and sum(int(a ^ b).bit_count() for a, b in zip(hashes[i].tolist(), hashes[j].tolist())) <= NEAR
            for j in range(i))
    return exact, near


def test_near_duplicates_is_brute_force():
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 2 ** 64, (1, WORDS), dtype=np.uint64)]
    for _ in range(299):  # clips that drift: each frame some bits from one before
        hashes.append(flip_bits(hashes[rng.integers(max(0, len(hashes) - 3), len(hashes))], [rng.integers(0, 30)], rng))
    hashes = np.concatenate(hashes)
    hashes[rng.integers(0, 300, 15)] = 0
    content = rng.integers(0, 1500, 300).astype(np.uint64) + np.uint64(2 ** 63)
    groups = [f"clip {number}" for number in rng.integers(0, 6, 300)]
    groups[7], groups[200] = "alone", "bad \udcff name"
    exact, near = near_duplicates(hashes, content, groups)
    expected = plain_near_duplicates(hashes, content, groups)
    assert (exact == expected[0]).all() and (near == expected[1]).all()
    assert 5 < exact.sum() < 295 and 5 < near.sum() < 295 and not near[7] and not near[200]


def test_near_duplicates_are_greedy_and_within_a_group():
    a = np.random.default_rng(0).integers(1, 2 ** 64, (1, WORDS), dtype=np.uint64)
    b, c = (a.copy() for _ in "bc")
    b[0, 0] ^= np.uint64(2 ** 20 - 1)  # 20 bits from a
    c[0, 0] ^= np.uint64(2 ** 40 - 1)  # 20 bits from b, 40 from a
    hashes, content = np.concatenate((a, b, c, a, a)), np.array([1, 2, 3, 4, 1], np.uint64)
    exact, near = near_duplicates(hashes, content, ["x", "x", "x", "y", "z"])
    assert exact.tolist() == [False, False, False, False, True]  # in another group: still the same pixels
    assert near.tolist() == [False, True, False, False, False]  # c is near b only, and b was not kept
    empty = near_duplicates(hashes[:0], content[:0], [])
    assert [mask.shape for mask in empty] == [(0,), (0,)]


# ---------------------------------------------------------------- names, and what is reported

def test_salted_names():
    names = ["Müller^Anna", "clip 1", "clip 2", "", os.fsdecode(b"\xff\xfe.mp4")]
    digests = [salted(name, b"salt") for name in names]
    assert digests == [salted(name, b"salt") for name in names] and len(set(digests)) == len(names)
    assert not set(digests) & {salted(name, b"other salt") for name in names}
    assert digests[0] != int.from_bytes(hashlib.blake2b(names[0].encode(), digest_size=8).digest(), "big")
    assert all(0 <= digest < 2 ** 64 for digest in digests)
    with pytest.raises(ValueError, match="salt .* empty"):
        salted("a", b"")


@pytest.fixture
def checkpoint():
    """What a checkpoint records of 50 images in five groups, and the hashes themselves."""
    rng = np.random.default_rng(1)
    content = rng.integers(2 ** 63, 2 ** 64, 50, dtype=np.uint64)
    looks = rng.integers(0, 2 ** 64, (50, WORDS), dtype=np.uint64)
    digests = [salted(name, b"salt") for name in ("p0", "p1", "p2", "p3", "bad \udcff name")]
    return dict(content=content, looks=looks, group_digests=np.array(digests, np.uint64), salt=b"salt")


def strangers(n):
    """Content hashes, looks and groups of n images that no checkpoint has seen."""
    rng = np.random.default_rng(2)
    return (rng.integers(2 ** 63, 2 ** 64, n, dtype=np.uint64), rng.integers(0, 2 ** 64, (n, WORDS), dtype=np.uint64),
            [f"q{i}" for i in range(n)])


def test_overlap_none(checkpoint):
    counts, line, found = overlap(checkpoint, *strangers(1200))
    assert line == ("none of the 1,200 test images was in the pretraining set "
                    "(compared by pixels, by look and by group name)")
    assert counts == dict(images=1200, identical=0, look_alike=0, pretraining_group=0, seen=0) and not found.any()


def test_overlap_counts_an_image_once(checkpoint):
    content, looks, groups = strangers(1200)
    content[:5], looks[:5] = checkpoint["content"][:5], checkpoint["looks"][:5]
    looks[5:9] = flip_bits(checkpoint["looks"][5:9], [0, 1, SAME, SAME + 1], np.random.default_rng(0))
    groups[3:6], groups[20:22] = ["p0"] * 3, ["bad \udcff name", "p3"]
    counts, line, found = overlap(checkpoint, content, looks, groups)
    assert counts == dict(images=1200, identical=5, look_alike=3, pretraining_group=2, seen=10)
    assert np.flatnonzero(found).tolist() == [*range(8), 20, 21]
    assert line == ("transductive: 10 of 1,200 test images were in the pretraining set (5 identical, 3 look alike, "
                    "2 of a pretraining group): a score on them is no evidence about unseen patients")
    as_int64 = {name: array if name == "salt" else array.view(np.int64) for name, array in checkpoint.items()}
    again = overlap(as_int64, content, looks, groups)
    assert again[:2] == (counts, line) and (again[2] == found).all()


def test_overlap_of_neighbouring_hashes_is_not_rounded(checkpoint):
    """Content hashes one apart are equal as float64."""
    counts, _, found = overlap(dict(content=checkpoint["content"]), checkpoint["content"] ^ np.uint64(1), None)
    assert counts["identical"] == 0 and not found.any()


@pytest.mark.parametrize("missing, groups, compared", [
    ((), None, "by pixels and by look"), (("looks",), None, "by pixels"), (("salt",), True, "by pixels and by look"),
    (("looks", "group_digests"), True, "by pixels"), (("content",), True, "by look and by group name")])
def test_overlap_says_what_was_compared(checkpoint, missing, groups, compared):
    content, looks, names = strangers(7)
    for name in missing:
        checkpoint[name] = None
    _, line, _ = overlap(checkpoint, content, looks, names if groups else None)
    assert line == f"none of the 7 test images was in the pretraining set (compared {compared})"


def test_overlap_without_a_record(checkpoint):
    for seen in None, {}, dict(content=None, looks=None), dict(group_digests=checkpoint["group_digests"]):
        counts, line, found = overlap(seen, *strangers(4))
        assert counts is None and found.shape == (4,) and not found.any()
        assert line.startswith("cannot tell") and "does not record its images" in line
    with pytest.raises(ValueError, match="looks"):
        overlap(dict(looks=checkpoint["looks"][:, :2]), *strangers(4))


def test_overlap_of_one(checkpoint):
    content, looks, _ = strangers(1)
    line = overlap(checkpoint, checkpoint["content"][:1], looks)[1]
    assert line.startswith("transductive: 1 of 1 test images was in the pretraining set (1 identical, 0 look alike)")


# ---------------------------------------------------------------- real frames

def real_frames(root):
    """Lung videos and fetal heads: grey images, examinations."""
    with open(root / "pocus" / "labels.csv", newline="") as file:
        rows = [(root / "pocus" / row["image"], row["group"]) for row in csv.DictReader(file)]
    for path in sorted((root / "hc18" / "training_set").glob("*.jpg")):
        rows.append((path, "hc18 " + path.name.split("_")[0]))
    return [np.asarray(Image.open(path).convert("L")) for path, _ in rows], np.array([group for _, group in rows])


@pytest.mark.skipif("ULTRASOUND_DATA" not in os.environ, reason="ULTRASOUND_DATA names no folder with hc18/ and pocus/")
def test_real_frames():
    images, groups = real_frames(Path(os.environ["ULTRASOUND_DATA"]))
    hashes = hash_all(images)
    assert hashes.any(1).all()
    nearest = min(distances(hashes[start:start + 100], hashes)[groups[start:start + 100, None] != groups].min()
                  for start in range(0, len(hashes), 100))
    assert nearest > SAME + 8, "two examinations look alike"  # 1.9 million pairs
    some = np.random.default_rng(0).permutation(len(images))[:100]
    for name, (export, _, least) in EXPORTS.items():
        again = hash_all([export(images[index]) for index in some])
        recall = (np.bitwise_count(hashes[some] ^ again).sum(1, dtype=int) <= SAME).mean()
        assert recall >= least, f"{name}: {recall:.1%} recognised"
