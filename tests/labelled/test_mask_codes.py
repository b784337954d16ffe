"""One mask file in: values, palettes and colours; FASS's pickles, HC18's outlines, MetaImage; damaged ones of each."""
import io
import os
import pickle
import tracemalloc
import zlib

import numpy as np
import pytest
from file_tools import save, save_dicom, speckle
from PIL import Image, ImageDraw

from labelled.mask_codes import (COLOUR, choose_classes, class_numbers, code_of, fill_outline, parse_classes,
                                 read_codes, read_meta_image, read_whole, size_and_mm, value_of)

IDS = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
NAN = (np.nan, np.nan)


def palette(ids, colours):
    image = Image.fromarray(ids)
    image.putpalette([level for colour in colours for level in colour])
    return image


# ---------------------------------------------------------------- codes

@pytest.mark.parametrize("kind, suffix", [
    *((kind, suffix) for kind in ("L", "P", "1", "RGB") for suffix in ("png", "tif", "bmp")),
    *((kind, suffix) for kind in ("RGBA", "I;16") for suffix in ("png", "tif"))])
def test_codes_of_every_kind_of_image(tmp_path, kind, suffix):
    image, expected = {
        "L": (Image.fromarray(IDS), IDS),
        "P": (palette(IDS, [(0, 0, 0), (255, 0, 0), (9, 9, 9)]), IDS),
        "1": (Image.fromarray(IDS == 1), (IDS == 1) * 1),
        "RGB": (Image.fromarray(np.stack([IDS * 100] * 3, 2)), IDS * 100),
        "RGBA": (Image.fromarray(np.dstack([IDS, IDS, IDS, (IDS == 1) * np.uint8(255)])), (IDS == 1) * 1),
        "I;16": (Image.fromarray(IDS.astype(np.uint16) * 1000), IDS.astype(int) * 1000),
    }[kind]
    codes, levels = read_codes(save(tmp_path / f"a.{suffix}", image))
    assert np.array_equal(codes, expected) and levels == np.unique(expected).tolist()


def test_colours_and_palettes(tmp_path):
    colours = [(0, 0, 0), (255, 0, 0), (9, 9, 9)]
    expected = np.array([0, COLOUR | 0xff0000, 9])[IDS]
    image = palette(IDS, colours)
    paths = [save(tmp_path / "p.png", image), save(tmp_path / "c.png", image.convert("RGB")),
             save(tmp_path / "a.png", image.convert("RGBA"))]
    for path in paths:
        codes, levels = read_codes(path, colours=True)
        assert np.array_equal(codes, expected) and levels == [0, 9, COLOUR | 0xff0000], path
    assert np.array_equal(read_codes(paths[0])[0], IDS) and np.array_equal(read_codes(paths[1])[0], expected)
    for value, code in ((7, 7), ((1, 2, 3), COLOUR | 0x010203), ((0, 0, 1), COLOUR | 1)):
        assert code_of(value) == code and value_of(code) == value
    assert code_of((200, 200, 200)) == 200


def test_masks_turn_as_their_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = speckle(0, (5, 8))
    image = save(tmp_path / "i.png", grey, exif=exif)
    mask = save(tmp_path / "m.png", (grey > 99) * np.uint8(255), exif=exif)
    assert size_and_mm(image)[0] == (5, 8) and read_whole(image).grey.shape == (8, 5)
    assert np.array_equal(read_codes(mask)[0] > 0, read_whole(image).grey > 99)


def test_files_that_are_no_masks(tmp_path):
    clip = save(tmp_path / "clip.tif", IDS, IDS)
    cmyk = save(tmp_path / "cmyk.tif", Image.new("CMYK", (3, 2)))
    fractions = save(tmp_path / "f.tif", Image.fromarray(np.float32([[0, 0.5]])))
    negative = save(tmp_path / "n.tif", Image.fromarray(np.int32([[0, -1]])))
    whole = save(tmp_path / "whole.tif", Image.fromarray(np.float32([[0, 300]])))
    (tmp_path / "text.png").write_text("no image")
    good = save(tmp_path / "good.png", speckle(0, (50, 50)))
    (tmp_path / "cut.png").write_bytes(open(good, "rb").read()[:700])
    os.mkfifo(tmp_path / "pipe.png")
    for path, words in ((clip, "several frames"), (cmyk, "CMYK pixels"), (fractions, "fractions"),
                        (negative, "values from -1 to 0"), (tmp_path / "text.png", "cannot identify"),
                        (tmp_path / "cut.png", "truncated"), (tmp_path / "pipe.png", "not a regular file")):
        with pytest.raises(ValueError, match=f"^{path}: cannot be read .*{words}.*--exclude$"):
            read_codes(str(path))
    assert read_codes(whole)[0].tolist() == [[0, 300]]


# ---------------------------------------------------------------- classes

@pytest.mark.parametrize("words, names, values", [
    (["head=8", "symphysis=7"], ["head", "symphysis"], {0: 0, 8: 1, 7: 2}),
    (["vein", "artery"], ["vein", "artery"], {0: 0, 1: 1, 2: 2}),
    (["background", "vein"], ["vein"], {0: 0, 1: 1}),
    (["tumour=1,255", "background=0,7"], ["tumour"], {1: 1, 255: 1, 0: 0, 7: 0}),
    (["background=255", "a=0"], ["a"], {255: 0, 0: 1}),
    (["vein=#ff0000", "gray=#0A0a0a"], ["vein", "gray"], {0: 0, (255, 0, 0): 1, (10, 10, 10): 2}),
    (["background=9", "vein"], ["vein"], {9: 0, 1: 1}),
])
def test_words_name_classes(words, names, values):
    assert parse_classes(words) == (["background", *names], values)


@pytest.mark.parametrize("words, error", [
    (["a=1", "b"], "give all classes values"), (["a=1", "a=2"], "'a' is named twice"),
    (["a=1", "b=1"], "two classes of value 1"),
    (["a=x"], "'x' is neither a number nor"), (["a=#ff00"], "'#ff00' is neither"), (["a=0"], "0 is the background"),
    (["=1"], "'' is named twice, or empty"), (["background=0"], "0 classes"), (["a=-1"], "'-1' is neither"),
    (["a=255", "b=#ffffff"], "two classes of value #ffffff"), (["a=#000000"], "0 is the background"),
    (["background=1", "background=2", "a=3"], "'background' is named twice"),
    ([f"c{k}" for k in range(256)], "256 classes"),
])
def test_words_that_name_no_classes(words, error):
    with pytest.raises(ValueError, match=f"--classes .*{error}"):
        parse_classes(words)


@pytest.mark.parametrize("levels, words, names, values", [
    ([{0, 255}, {0}], None, ["foreground"], {0: 0, 255: 1}),
    ([{0, 255}, {0}], ["lesion"], ["lesion"], {0: 0, 255: 1}),
    ([{0, 1}, {255}], None, ["foreground"], {0: 0, 1: 1, 255: 1}),
    ([{0, 1}, {1, 255}], None, ["class 1", "class 255"], {0: 0, 1: 1, 255: 2}),
    ([{0, 1}, {0, 2}], None, ["class 1", "class 2"], {0: 0, 1: 1, 2: 2}),
    ([{0, 1}, {0, 2}], ["lesion"], ["lesion"], {0: 0, 1: 1}),
    ([{3, 9}], None, ["class 3", "class 9"], {0: 0, 3: 1, 9: 2}),
    ([{0, COLOUR | 0x00ff00, COLOUR | 0xff0000}], None, ["#00ff00", "#ff0000"], {0: 0, (0, 255, 0): 1, (255, 0, 0): 2}),
    ([set(range(32))], None, [f"class {k}" for k in range(1, 32)], {k: k for k in range(32)}),
])
def test_classes_by_what_masks_hold(levels, words, names, values):
    files = [(f"{i}.png",) for i in range(len(levels))]
    assert choose_classes(words, files, [[own] for own in levels]) == (["background", *names], values)


def test_masks_that_hold_no_classes():
    with pytest.raises(ValueError, match="b.png: holds 31 different values, and all masks 33; .* JPEG"):
        choose_classes(None, [("a.png",), ("b.png",)], [[{0, 1}], [set(range(2, 33))]])
    with pytest.raises(ValueError, match="a.png and all other masks hold nothing but 0"):
        choose_classes(["lesion"] * 0, [("a.png",)], [[{0}]])
    with pytest.raises(ValueError, match="a.png: holds the value #0000ff, which is in no class; .*=0,#0000ff"):
        class_numbers("a.png", [0, COLOUR | 255], {0: 0, (255, 0, 0): 1})
    assert class_numbers("a.png", [0, 9, COLOUR | 255], {0: 0, (9, 9, 9): 2, (0, 0, 255): 1}) == [0, 2, 1]


# ---------------------------------------------------------------- FASS

def structures(*names):
    masks = {name: np.zeros((3, 4), np.uint8) for name in names}
    for k, mask in enumerate(masks.values()):
        mask[:, k] = mask[0] = 1  # all overlap in the first row
    return masks


@pytest.mark.parametrize("protocol, core", [(3, b"_core"), (3, b"core"), (4, b"_core")])  # numpy 1 has no _core
def test_structures_are_painted_vessels_last(tmp_path, protocol, core):
    path = tmp_path / "P01_IMG1.npy"
    for names, first, rest in ((("artery", "liver", "stomach", "vein"), 1, [1, 2, 3, 4]),
                               (("vein", "liver"), 4, [4, 2, 0, 0]), (("stomach", "liver"), 3, [3, 2, 0, 0])):
        found = np.array({"image": speckle(0, (3, 4)), "structures": structures(*names), "note": "x"}, dtype=object)
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(found))
            file.write(pickle.dumps(found, protocol).replace(b"numpy._core.m", b"numpy." + core + b".m"))
        codes, levels = read_codes(str(path))
        assert codes.tolist() == [[first] * 4, rest, rest] and levels == sorted({first, *rest})
        np.save(path, found)  # as numpy itself writes it
        assert np.array_equal(read_codes(str(path))[0], codes)


class Malicious:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(os.system, ("touch {}",)), (eval, ("open({!r}, 'w')",)), (io.open, ("{}", "w"))])
def test_a_pickle_runs_no_code(tmp_path, call):
    mark = tmp_path / "ran"
    call = call[0], tuple(word.format(str(mark)) for word in call[1])
    for content in ({"structures": Malicious(call)}, Malicious(call)):
        path = tmp_path / "P01_IMG1.npy"
        np.save(path, np.array(content, dtype=object))
        with pytest.raises(ValueError, match="P01_IMG1.npy: cannot be read .*asks for .* it could run code"):
            read_codes(str(path))
        assert not mark.exists()
        np.load(path, allow_pickle=True)  # the same file does run it
        assert mark.exists()
        mark.unlink()


@pytest.mark.parametrize("content, words", [
    ({"structures": {}}, "no dict with"), ({"image": 1}, "no dict with"), ([1], "no dict with"),
    ({"structures": {"kidney": np.zeros((2, 2))}}, "'kidney' is none of liver"),
    ({"structures": {"vein": np.zeros((2, 2)), "liver": np.zeros((2, 3))}}, r"shapes \[\(2, 2\), \(2, 3\)\]"),
    ({"structures": {"vein": np.zeros(4)}}, r"shapes \[\(4,\)\]"), (np.zeros((2, 2)), "no dict with"),
])
def test_arrays_that_hold_no_structures(tmp_path, content, words):
    path = tmp_path / "a.npy"
    np.save(path, content if isinstance(content, np.ndarray) else np.array(content, dtype=object))
    with pytest.raises(ValueError, match=f"a.npy: cannot be read .*{words}"):
        read_codes(str(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="a.npy: cannot be read"):
        read_codes(str(path))


# ---------------------------------------------------------------- outlines

def ring(shape, x, y, a, b, angle, width=3):
    """An ellipse's line, uint8 (h, w), drawn through many points of it; and which pixels lie within the ellipse."""
    image, t = Image.new("L", shape[::-1]), np.linspace(0, 2 * np.pi, 721)
    points = np.stack([x + a * np.cos(t) * np.cos(angle) - b * np.sin(t) * np.sin(angle),
                       y + a * np.cos(t) * np.sin(angle) + b * np.sin(t) * np.cos(angle)], 1)
    ImageDraw.Draw(image).line([tuple(point) for point in points], 255, width)
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    turned = (columns - x + 1j * (rows - y)) * np.exp(-1j * angle)
    return np.array(image), (turned.real / a) ** 2 + (turned.imag / b) ** 2 <= 1


@pytest.mark.parametrize("ellipse", [(80, 60, 60, 40, 0.4), (70.5, 55.2, 30, 29, 0), (20, 60, 60, 40, 1.2),
                                     (150, 110, 90, 70, -0.7)])
def test_outlines_are_filled_cut_ones_too(tmp_path, ellipse):
    line, inside = ring((120, 160), *ellipse)
    filled = fill_outline(line)
    assert {*np.unique(filled)} == {0, 255}
    wrong = (filled > 0) != inside
    assert not wrong[line == 0].any() and wrong.sum() < 0.2 * (line > 0).sum()  # Pillow's lines lean by a part of a pixel
    whole = np.abs((filled > 0).sum() - inside.sum()), np.abs(((filled > 0) | (line > 0)).sum() - inside.sum())
    assert 3 * whole[0] < whole[1]  # with the line's outer half every head would be too large
    codes, levels = read_codes(save(tmp_path / "a_Annotation.png", line), outline=True)
    assert np.array_equal(codes, filled) and levels == [0, 255]
    assert np.array_equal(read_codes(str(tmp_path / "a_Annotation.png"))[0], line)


def test_what_is_no_outline(tmp_path):
    line, inside = ring((120, 160), 80, 60, 60, 40, 0.4)
    stray = line.copy()
    stray[3, 3] = 255
    square = np.zeros((120, 160), np.uint8)
    square[20:100, 30:130] = 255
    square[22:98, 32:128] = 0
    for name, mask, words in (("stray", stray, "pixels off any ellipse"), ("square", square, "pixels off any ellipse"),
                              ("empty", line * 0, "holds no outline"),
                              ("filled", inside * np.uint8(255), "pixels off any ellipse"),
                              ("dot", np.eye(120, 160, dtype=np.uint8), "line make no ellipse")):
        path = save(tmp_path / f"{name}.png", mask)
        with pytest.raises(ValueError, match=f"{name}.png: cannot be read .*{words}"):
            read_codes(path, outline=True)
    near = line.copy()
    near[np.argmax(line[:, 80] > 0) - 1, 80] = 255  # within 3 pixels
    fill_outline(near)


# ---------------------------------------------------------------- MetaImage, DICOM

def save_meta(path, pixels, data=None, kind="MET_UCHAR", sides=None, raw=None, compress=False, big=False, **more):
    """pixels: what follows the header, in the order of the file -> the path."""
    data = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<")).tobytes() if data is None else data
    data = zlib.compress(data) if compress else data
    lines = {"ObjectType": "Image", "NDims": 2, "BinaryData": "True", "BinaryDataByteOrderMSB": big,
             "CompressedData": compress, "ElementSpacing": "0.5 0.25",
             "DimSize": " ".join(map(str, sides or pixels.shape[::-1])), "ElementType": kind, **more,
             "ElementDataFile": raw or "LOCAL"}
    header = "".join(f"{key} = {value}\n" for key, value in lines.items() if value is not None).encode()
    path.write_bytes(header + (b"" if raw else data))
    if raw:
        (path.parent / raw).write_bytes(data)
    return str(path)


GREY = speckle(4, (5, 7))
COLOURS = speckle(5, (5, 7, 3))


@pytest.mark.parametrize("name, pixels, more, expected", [
    ("plain", GREY, {}, GREY), ("zlib", GREY, dict(compress=True), GREY), ("raw", GREY, dict(raw="a.raw"), GREY),
    ("slice", GREY, dict(sides=(7, 5, 1), ElementSpacing="0.5 0.25 9"), GREY),
    ("planes", COLOURS.transpose(2, 0, 1), dict(ElementSpacing="0.5 0.25 1"), COLOURS),
    ("first", COLOURS, dict(ElementSpacing="1 0.5 0.25"), COLOURS),
    ("channels", COLOURS, dict(sides=(7, 5), ElementNumberOfChannels=3, compress=True), COLOURS),
    ("short", GREY.astype(np.int16) - 9, dict(kind="MET_SHORT", big=True), GREY.astype(int) - 9),
    ("ushort", GREY.astype(np.uint16) * 200, dict(kind="MET_USHORT"), GREY.astype(int) * 200),
    ("float", GREY / np.float32(3), dict(kind="MET_FLOAT", big=True, compress=True), GREY / np.float32(3)),
])
def test_meta_images(tmp_path, name, pixels, more, expected):
    path = save_meta(tmp_path / f"{name}.mha", pixels, **more)
    found, mm = read_meta_image(path)
    assert np.array_equal(found, expected) and found.dtype.isnative and mm == (0.5, 0.25)
    assert size_and_mm(path) == ((7, 5), (0.5, 0.25))
    frame = read_whole(path)
    assert frame.grey.shape == (5, 7) and frame.grey.dtype == np.uint8 and frame.mm == (0.5, 0.25)
    if expected.ndim == 3:
        assert np.array_equal(frame.grey, np.array(Image.fromarray(expected).convert("L")))
    elif name in ("short", "ushort", "float"):
        low, high = np.percentile(expected, (0.5, 99.5))
        assert np.abs(frame.grey - np.clip((expected - low) / (high - low), 0, 1) * 255).max() <= 0.501
    else:
        assert np.array_equal(frame.grey, expected)


def test_meta_images_as_masks_and_unknown_spacing(tmp_path):
    path = save_meta(tmp_path / "a.mha", IDS.astype(np.int16), kind="MET_SHORT")
    assert np.array_equal(read_codes(path)[0], IDS) and read_codes(path)[0].dtype == np.uint8
    for spacing in ("1 1", "1.0 1.000", None, "0.5", "0 0.5", "nan 1", "-1 2"):
        _, mm = read_meta_image(save_meta(tmp_path / "b.mha", GREY, ElementSpacing=spacing))
        assert np.isnan(mm).all(), spacing
    assert read_whole(str(tmp_path / "b.mha")).mm == (0, 0)


@pytest.mark.parametrize("more, words", [
    (dict(DimSize=None), "has no DimSize"), (dict(ElementType=None), "has no ElementType"),
    (dict(DimSize="7 x"), "DimSize is '7 x'"),
    (dict(ElementSpacing="a b"), "ElementSpacing is 'a b'"), (dict(kind="MET_LONG_ARRAY"), "MET_LONG_ARRAY pixels"),
    (dict(DimSize="7 5 4"), "7 5 4 pixels of 1 channels"), (dict(DimSize="35"), "35 pixels of 1"),
    (dict(DimSize=""), "pixels of 1 channels"),
    (dict(ElementNumberOfChannels=2), "of 2 channels"), (dict(ElementNumberOfChannels=""), "of 0 channels"),
    (dict(DimSize="-7 -5"), "-7 x -5 pixels"), (dict(DimSize="99999 99999"), "99999 x 99999 pixels"),
    (dict(DimSize="7 6"), "35 bytes, its header says 42"),
    (dict(DimSize="7 4"), "more than 28 bytes, its header says 28"),
    (dict(CompressedData="True"), "header check|decompress"), (dict(BinaryData="False"), "text or"),
    (dict(HeaderSize="-1"), "HeaderSize"),
    (dict(compress=True, DimSize="7 4"), "more than 28 bytes"),
])
def test_damaged_meta_images(tmp_path, more, words):
    path = save_meta(tmp_path / "a.mha", GREY, **more)
    with pytest.raises(ValueError, match=f"a.mha: cannot be read .*({words})"):
        read_whole(path)


def test_other_damage_to_meta_images(tmp_path):
    fractions = save_meta(tmp_path / "f.mha", np.float32([[0.5, 1]]), kind="MET_FLOAT")
    with pytest.raises(ValueError, match="f.mha: cannot be read .*fractions"):
        read_codes(fractions)
    endless = save_meta(tmp_path / "n.mha", np.float32([[np.nan, 1]]), kind="MET_FLOAT")
    with pytest.raises(ValueError, match="n.mha: cannot be read .*not finite"):
        read_whole(endless)
    (tmp_path / "b.mha").write_bytes(bytes(range(256)) * 50)
    with pytest.raises(ValueError, match="b.mha: cannot be read .*has no DimSize"):
        read_whole(str(tmp_path / "b.mha"))
    alone = save_meta(tmp_path / "r.mha", GREY, raw="r.raw")
    (tmp_path / "r.raw").unlink()
    with pytest.raises(ValueError, match="r.mha: cannot be read .*No such file"):
        read_whole(alone)
    whole = open(save_meta(tmp_path / "z.mha", GREY, compress=True), "rb").read()
    (tmp_path / "z.mha").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="z.mha: cannot be read .*bytes"):
        read_whole(str(tmp_path / "z.mha"))


def test_a_header_bounds_what_is_decompressed(tmp_path):
    path = save_meta(tmp_path / "a.mha", GREY, data=bytes(32 << 20), compress=True)
    tracemalloc.start()
    with pytest.raises(ValueError, match="more than 35 bytes"):
        read_whole(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_of_dicom_the_whole_screen(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    region = pydicom.Dataset()
    region.RegionSpatialFormat = region.RegionDataType = 1
    region.RegionLocationMinX0, region.RegionLocationMinY0 = 2, 1
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = 6, 5
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = 3
    region.PhysicalDeltaX, region.PhysicalDeltaY = 0.02, 0.03
    frames = speckle(0, (1, 8, 9))
    path = save_dicom(tmp_path / "a.dcm", frames, SequenceOfUltrasoundRegions=[region])
    size, mm = size_and_mm(path)
    assert size == (9, 8) and np.allclose(mm, (0.2, 0.3))
    assert np.array_equal(read_whole(path).grey, frames[0])
    assert np.isnan(size_and_mm(save_dicom(tmp_path / "b.dcm", frames))[1]).all()
    assert size_and_mm(save(tmp_path / "c.png", frames[0]))[0] == (9, 8)
