"""Masks as files: written with a palette and whole, read back from anyone, and a sentence for each way not to fit."""

import os

import numpy as np
import pytest
from PIL import Image

from frames.shapes import CLASS_COLOURS
from labelled.mask_codes import mask_name
from scores.exchange import read_predicted_masks, write_mask

CLASSES = ["background", "head", "vène"]
NAMES, SHAPES = ["a/1.jpg", "a/2.png", "b.c/1"], [(4, 6), (5, 5), (1, 1)]


def masks(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 3, shape, dtype=np.uint8) for shape in SHAPES]


def save(folder, flat=False):
    for name, mask in zip(NAMES, masks()):
        path = folder / (mask_name(name).replace("/", "_") if flat else mask_name(name))
        write_mask(str(path), mask, CLASSES)
    return str(folder)


# ---------------------------------------------------------------- names

@pytest.mark.parametrize("name, own", [
    ("a/1.jpg", "a/1.png"), ("1.PNG", "1.png"), ("a.b/c.d.tiff", "a.b/c.d.png"), ("x.mha", "x.png"), ("x.dcm", "x.png"),
    ("1.2.840.1", "1.2.840.1.png"), ("a.b/c", "a.b/c.png"), ("phantom 3", "phantom 3.png"), ("é (1).png", "é (1).png"),
    ("/data/x.png", "_data_x.png"), ("../x.png", ".._x.png"), ("a/../../x.png", "a_.._.._x.png"),
    ("a..b/x.png", "a..b/x.png"),
])
def test_a_mask_is_called_as_its_image_and_stays_in_its_folder(name, own):
    assert mask_name(name) == own


# ---------------------------------------------------------------- written

def test_a_mask_comes_back_and_shows_its_classes(tmp_path):
    path, mask = tmp_path / "new" / "folder" / "x.png", masks()[0]
    write_mask(str(path), mask, CLASSES)
    with Image.open(path) as image:
        assert image.mode == "P" and image.text["classes"] == "0 background\n1 head\n2 vène"
        assert np.array_equal(np.asarray(image), mask)
        colours = np.asarray(image.convert("RGB"))
    for k, colour in enumerate([(0, 0, 0), *CLASS_COLOURS[1:3]]):
        assert (mask == k).any() and (colours[mask == k] == colour).all()
    assert path.read_bytes()[24] == 8  # bits of a pixel
    assert os.listdir(path.parent) == ["x.png"]


def test_more_classes_than_colours(tmp_path):
    mask = np.arange(200, dtype=np.uint8).reshape(10, 20)
    write_mask(str(tmp_path / "x.png"), mask, list(map(str, range(200))))
    assert np.array_equal(read_predicted_masks(str(tmp_path), ["x.png"], [(10, 20)], 200)(0), mask)
    with Image.open(tmp_path / "x.png") as image:
        colours = np.asarray(image.convert("RGB")).reshape(200, 3)
    assert not colours[0].any() and colours[1:].any(1).all()  # none but the background is black


def test_a_name_that_is_not_utf8(tmp_path):
    write_mask(str(tmp_path / "x.png"), masks()[0], ["background", "\udce9", "c"])
    with Image.open(tmp_path / "x.png") as image:
        assert image.text["classes"] == "0 background\n1 ?\n2 c"


def test_a_mask_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    write_mask(str(path), masks()[0], CLASSES)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_mask(str(path), 2 - masks()[0], CLASSES)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


# ---------------------------------------------------------------- read

@pytest.mark.parametrize("flat", [False, True])
def test_masks_come_in_the_order_of_the_names(tmp_path, flat):
    read = read_predicted_masks(save(tmp_path, flat), NAMES, SHAPES, 3)
    for i in (2, 0, 1):
        found = read(i)
        assert found.dtype == np.uint8 and np.array_equal(found, masks()[i])


def test_the_own_folder_goes_before_the_flat_name(tmp_path):
    save(tmp_path)
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / "a_1.png")
    assert np.array_equal(read_predicted_masks(str(tmp_path), NAMES, SHAPES, 3)(0), masks()[0])


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_masks_of_other_programs(tmp_path, mode):
    """A palette's colours say nothing; two classes may be black and white."""
    mask = masks()[0] if mode != "1" else masks()[0] > 0
    image = Image.fromarray(np.uint8(mask))
    if mode == "P":
        image.putpalette([255, 255, 255, 0, 0, 0, 90, 90, 90])
    (Image.fromarray(mask) if mode == "1" else image).save(tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as saved:
        assert saved.mode == mode
    assert np.array_equal(read_predicted_masks(str(tmp_path), ["x.jpg"], [np.array((4, 6))], 3)(0), mask)


def shape_of(grey):
    return lambda folder: Image.fromarray(grey).save(folder / "a" / "1.png")


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "a" / "2.png").unlink(), ["1 of 3 masks are missing, the first is a/2.png", "(here: a)"]),
    (lambda folder: [(folder / name).unlink() for name in ("a/1.png", "a/2.png", "b.c/1.png")],
     ["3 of 3 masks are missing, the first is a/1.png"]),
    (lambda folder: ((folder / "a" / "2.png").rename(folder / "a" / "2"), (folder / "zz.nii.gz").write_bytes(b"")),
     ["a/2.png", ".nii.gz is not read: write PNG"]),
    (shape_of(np.zeros((6, 4), np.uint8)), ["a/1.png has 4 x 6 pixels, its image 6 x 4"]),
    (shape_of(np.zeros((5, 6), np.uint8)), ["a/1.png has 6 x 5 pixels, its image 6 x 4"]),
    (shape_of(np.full((4, 6), 3, np.uint8)), ["a/1.png has a pixel of 3;", "to 2"]),
    (shape_of(np.full((4, 6), 255, np.uint8)), ["a/1.png has a pixel of 255"]),
    (shape_of(np.zeros((4, 6, 3), np.uint8)), ["a/1.png is of mode RGB; expected 8-bit"]),
    (shape_of(np.zeros((4, 6), np.uint16)), ["a/1.png is of mode I;16"]),
    (lambda folder: (folder / "a" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes().split(b"IDAT")[0]),
     ["a/1.png cannot be read as a PNG"]),
    (lambda folder: (folder / "a" / "1.png").write_bytes(b""), ["a/1.png cannot be read as a PNG"]),
    (lambda folder: Image.fromarray(masks()[0]).save(folder / "a" / "1.png", "BMP"),
     ["a/1.png cannot be read as a PNG"]),
    (lambda folder: ((folder / "a" / "1.png").unlink(), (folder / "a" / "1.png").mkdir()),
     ["a/1.png cannot be read as a PNG"]),
], ids=range(13))
def test_masks_that_do_not_fit(tmp_path, spoil, words):
    """Told at once, not when the mask is asked for."""
    save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as error:
        read_predicted_masks(str(tmp_path), NAMES, SHAPES, 3)
    assert str(error.value).startswith(f"--predictions {tmp_path}: ") and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("make", [None, lambda path: path.write_bytes(b"")])
def test_no_folder(tmp_path, make):
    if make:
        make(tmp_path / "x")
    with pytest.raises(ValueError, match="x: not a folder; masks come as a folder with a PNG for each test image"):
        read_predicted_masks(str(tmp_path / "x"), NAMES, SHAPES, 3)


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"3 of 3 masks are missing.*\(here: nothing\)"):
        read_predicted_masks(str(tmp_path), NAMES, SHAPES, 3)


@pytest.mark.parametrize("names", [["x.jpg", "x.png"], ["a/b.png", "a_b.png"]])
def test_one_mask_is_not_that_of_two_images(tmp_path, names):
    flat = mask_name(names[-1])
    write_mask(str(tmp_path / flat), masks()[0], CLASSES)
    with pytest.raises(ValueError, match=f"{flat} would be the mask of {names[0]} and of {names[1]};"):
        read_predicted_masks(str(tmp_path), names, [(4, 6)] * 2, 3)


def test_a_mask_does_not_replace_its_image(tmp_path):
    """Names in a list can be whole paths: of a PNG, the mask's would be the same."""
    image = tmp_path / "set" / "x.png"
    write_mask(str(image), masks()[0], CLASSES)
    before = image.read_bytes()
    path = os.path.join(tmp_path / "masks", mask_name(str(image)))
    write_mask(path, masks()[0] * 0, CLASSES)
    assert image.read_bytes() == before and os.path.dirname(path) == str(tmp_path / "masks")
    assert not read_predicted_masks(str(tmp_path / "masks"), [str(image)], [(4, 6)], 3)(0).any()
