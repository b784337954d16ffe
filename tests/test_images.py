"""Reading one file of any kind, reading many in worker processes, and listing them: known pixels, odd folders."""
import contextlib
import csv
import importlib.util
import os
import signal
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageFilter

import images
from fan import find_fan
from images import FRAMES, count_frames, decode_all, decode_chunk, list_images, load_grey, read_frames, resize_square
from leakage import content_hash, salted

ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def speckle(seed, shape=(20, 30)):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, *pages, **options):
    """Arrays or Pillow images, the pages of one file -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pages = [page if isinstance(page, Image.Image) else Image.fromarray(page) for page in pages]
    more = {"save_all": True, "append_images": pages[1:]} if len(pages) > 1 else {}
    pages[0].save(path, **more, **options)
    return str(path)


def save_dicom(path, frames, patient="P7", study="1.2.7", **elements):
    """uint8 (n, h, w) as DICOM with grey values as they are -> the path."""
    pydicom = pytest.importorskip("pydicom")
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
    ds.PatientID, ds.StudyInstanceUID = patient, study
    ds.PhotometricInterpretation, ds.SamplesPerPixel = "MONOCHROME2", 1
    ds.NumberOfFrames, ds.Rows, ds.Columns = frames.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.PixelData = frames.tobytes() + b"\0" * (frames.size % 2)
    ds["PixelData"].VR = "OB"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return str(path)


def greys(path, first=0):
    return [frame.grey for frame in read_frames(path, first)]


def assert_frames(path, expected, tolerance=0):
    """The file's frames are the expected, from whichever it is read on."""
    found = greys(path)
    assert [grey.shape for grey in found] == [grey.shape for grey in expected] and count_frames(path) == len(expected)
    for grey, other in zip(found, expected):
        assert grey.dtype == np.uint8 and np.abs(grey.astype(int) - other).max() <= tolerance
    for first in range(len(expected) + 1):
        rest = greys(path, first)
        assert len(rest) == len(expected) - first
        assert all(np.array_equal(grey, other) for grey, other in zip(rest, found[first:])), first


def scaled(pages):
    """Deep pages -> uint8, by one scale: the 0.5 and 99.5 percentile of them all."""
    pages = [page.astype(np.float32) for page in pages]
    low, high = np.percentile(np.concatenate([page.ravel() for page in pages]), (0.5, 99.5))
    return [(np.clip((page - low) / (high - low), 0, 1) * 255 + 0.5).astype(np.uint8) for page in pages]


@pytest.fixture
def alarm():
    """Whatever still waits after 5 s fails: a BaseException, which `except Exception` does not swallow."""
    def hang(*_):
        pytest.fail("still waiting after 5 s")
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------- several frames in a file

@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_tiff_pages(tmp_path, compression):
    pages = [speckle(i, shape) for i, shape in enumerate([(20, 30), (20, 30), (50, 7), (1, 1)])]
    assert_frames(save(tmp_path / "grey.tif", *pages, compression=compression), pages)
    rgb = [np.dstack([page] * 3) for page in pages]
    assert_frames(save(tmp_path / "rgb.tif", *rgb, compression=compression), pages)


def test_deep_tiff_pages_have_one_scale(tmp_path):
    dark = speckle(0).astype(np.uint16) * 10
    for dtype in (np.uint16, np.int32, np.float32):
        pages = [(dark * factor).astype(dtype) for factor in (1, 20, 5)]
        assert_frames(save(tmp_path / f"{dtype.__name__}.tif", *pages), scaled(pages), 1)
    found = greys(tmp_path / "uint16.tif")
    assert found[0].mean() < found[2].mean() / 4 < found[1].mean() / 12  # a scale per page would make all alike


def test_percentiles_of_a_single_frame_are_exact(tmp_path):
    page = np.random.default_rng(0).integers(0, 60000, (40, 50), np.uint16)
    for suffix in ("png", "tif"):
        assert_frames(save(tmp_path / f"a.{suffix}", page), scaled([page]))


def test_percentiles_of_many_frames_are_of_a_sample(tmp_path, monkeypatch):
    pages = [np.random.default_rng(i).integers(0, 60000, (40, 50), np.uint16) for i in range(4)]
    monkeypatch.setattr(images, "SCALE_FRAMES", 2)
    for grey, exact in zip(greys(save(tmp_path / "a.tif", *pages)), scaled(pages)):
        assert 0 < np.abs(grey.astype(int) - exact).max() < 4  # not the exact ones, and not far off


def test_percentiles_of_many_large_frames_fit_memory(tmp_path, monkeypatch):
    """They take a few times the memory of the largest frame allowed, not that of SCALE_FRAMES of them."""
    path = save(tmp_path / "a.tif", *(speckle(i, (300, 300)).astype(np.uint16) for i in range(images.SCALE_FRAMES)))
    monkeypatch.setattr(images, "MAX_PIXELS", 300 * 300)
    tracemalloc.start()
    next(read_frames(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 300 * 300 * 4 < peak < 300 * 300 * 4 * 8


def test_a_deep_page_that_is_not_sampled(tmp_path):
    """The one deep page of a long file is scaled by itself, not by the levels of another page."""
    pages, deep = [speckle(i) for i in range(2 * images.SCALE_FRAMES)], speckle(1).astype(np.uint16) * 200
    path = save(tmp_path / "a.tif", pages[0], deep, *pages[2:])
    assert np.array_equal(greys(path)[1], scaled([deep])[0])


def test_deep_clips_are_not_decoded_over_and_over(tmp_path, monkeypatch):
    """A resumed chunk needs the scale of the whole file again: not by decoding all of it again."""
    pages = [speckle(i, (4, 4)).astype(np.uint16) for i in range(8 * FRAMES)]
    path, seek, seeks = save(tmp_path / "a.tif", *pages), images._seek, []
    monkeypatch.setattr(images, "_seek", lambda image, number: seeks.append(number) or seek(image, number))
    rows = np.concatenate([rows for _, rows, _, _ in decode_all([path], 4, False, b"s", 1)])
    assert rows["frame"].tolist() == list(range(len(pages)))
    assert len(seeks) <= 3 * len(pages)


def test_tiff_pages_of_several_depths(tmp_path):
    """Each page is what it would be alone, or the file ends there with an error: nothing saturated, nothing black."""
    grey, deep, rgb = speckle(0), speckle(1).astype(np.uint16) * 200, np.dstack([speckle(2)] * 3)
    for number, order in enumerate([(grey, deep, rgb), (deep, grey, rgb), (rgb, deep, grey)]):
        alone = {id(grey): grey, id(deep): scaled([deep])[0], id(rgb): rgb[..., 0]}
        frames = read_frames(save(tmp_path / f"{number}.tif", *order))
        assert np.array_equal(next(frames).grey, alone[id(order[0])])
        try:
            for frame, page in zip(frames, order[1:]):
                assert np.array_equal(frame.grey, alone[id(page)])
        except ValueError as error:
            assert "depth" in str(error)


def test_gif_frames_that_store_only_what_changed(tmp_path):
    frames = [speckle(0)]
    for step in range(1, 5):
        frames.append(frames[-1].copy())
        frames[-1][step:step + 3, 2 * step:2 * step + 4] = speckle(step, (3, 4))
    path = save(tmp_path / "a.gif", *frames)
    with Image.open(path) as image:
        image.seek(2)
        assert image.dispose_extent != (0, 0, 30, 20)  # the file does hold deltas
    assert_frames(path, frames)


@pytest.mark.parametrize("disposal", [0, 2])
def test_gif_of_a_palette_with_transparency(tmp_path, disposal):
    """Transparent pixels show the frame before, or after disposal 2 the background: black."""
    frames, levels = [], np.array([99, 0, 60, 120, 255], np.uint8)
    indices = [np.random.default_rng(i).integers(0 if i else 1, 5, (20, 30), np.uint8) for i in range(3)]
    for index in indices:
        frames.append(Image.fromarray(index, "P"))
        frames[-1].putpalette(np.repeat(levels, 3).tobytes())
    path = save(tmp_path / "a.gif", *frames, transparency=0, disposal=disposal, optimize=False)
    expected, shown = [], np.zeros((20, 30), np.uint8)
    for index in indices:
        shown = np.where(index, levels[index], 0 if disposal else shown)
        expected.append(shown)
    assert_frames(path, expected)


def test_a_phones_jpeg_is_one_frame(tmp_path):
    smooth = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8)
    path = save(tmp_path / "a.jpg", smooth, smooth[:20, :20], format="MPO", quality=95)
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert_frames(path, [smooth], 3)


def test_load_grey_wants_one_frame(tmp_path):
    page = speckle(0)
    assert np.array_equal(load_grey(save(tmp_path / "one.tif", page)), page)
    with pytest.raises(ValueError, match="several frames"):
        load_grey(save(tmp_path / "two.tif", page, page))
    with pytest.raises(ValueError, match="several frames"):
        load_grey(save_dicom(tmp_path / "two.dcm", np.stack((page, page))))


# ---------------------------------------------------------------- kinds of pixels

@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_orientation(tmp_path, suffix):
    smooth, exif = np.add.outer(3 * np.arange(20), np.arange(30)).astype(np.uint8), Image.Exif()
    for orientation, turned in ((3, np.rot90(smooth, 2)), (6, np.rot90(smooth, -1)), (8, np.rot90(smooth))):
        exif[0x0112] = orientation
        for dtype in (np.uint8, np.uint16)[:1 if suffix == "jpg" else 2]:
            for packed in ({"compression": kind} for kind in ((None, "tiff_lzw") if suffix == "tif" else (None,))):
                path = save(tmp_path / f"{orientation}.{suffix}", smooth.astype(dtype), exif=exif, **packed)
                assert_frames(path, [turned] if dtype == np.uint8 else scaled([turned]), 3 * (suffix == "jpg"))


def test_damaged_exif_loses_no_image(tmp_path):
    assert_frames(save(tmp_path / "a.png", speckle(0), exif=b"Exif\0\0no TIFF at all"), [speckle(0)])


def test_bits_palettes_and_transparency(tmp_path):
    grey, rng = speckle(0), np.random.default_rng(1)
    bits = Image.fromarray(grey > 99)
    assert bits.mode == "1"
    assert_frames(save(tmp_path / "bits.png", bits), [np.where(grey > 99, 255, 0)])
    assert_frames(save(tmp_path / "bits.tif", bits, compression="group4"), [np.where(grey > 99, 255, 0)])
    palette, order = Image.fromarray(grey, "P"), rng.permutation(256).astype(np.uint8)
    palette.putpalette(np.repeat(order, 3).tobytes())
    for suffix in ("png", "bmp", "gif", "tif"):
        assert_frames(save(tmp_path / f"palette.{suffix}", palette), [order[grey]])
    alpha = rng.integers(0, 256, 256, np.uint8)
    path = save(tmp_path / "alpha.png", palette, transparency=alpha.tobytes())
    assert_frames(path, [np.rint(order[grey] * (alpha[grey] / 255))], 1)
    mask = speckle(2)
    assert_frames(save(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(mask)])),
                  [np.rint(grey * (mask / 255))], 1)
    assert_frames(save(tmp_path / "cmyk.tif", Image.fromarray(np.dstack([grey] * 3)).convert("CMYK")), [grey])


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_one_transparent_level_is_black(tmp_path, mode):
    grey = np.where(speckle(0) > 99, 255, 60).astype(np.uint8)
    image = Image.fromarray(grey).convert("1" if mode == "1" else "L", dither=0).convert(mode)
    path = save(tmp_path / "a.png", image, transparency=(255, 255, 255) if mode == "RGB" else 255)
    with Image.open(path) as image:
        assert image.mode == mode and "transparency" in image.info
    assert_frames(path, [np.where(grey == 255, 0, 0 if mode == "1" else 60)])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_refused(tmp_path, bad):
    page = speckle(0).astype(np.float32)
    page[3, 4] = bad
    for pages in ([page], [speckle(1).astype(np.float32), page]):
        with pytest.raises(ValueError, match="non-finite"):
            greys(save(tmp_path / "a.tif", *pages))


def test_programs_are_no_images(tmp_path, monkeypatch):
    """PostScript, by whatever name, is not handed to Ghostscript."""
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    (tmp_path / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises((OSError, ValueError)):
        greys(str(tmp_path / "a.png"))


# ---------------------------------------------------------------- colour

def in_colour(path):
    frame, = read_frames(path)
    return frame.colour


@pytest.mark.parametrize("mode, suffix", [("RGB", "png"), ("RGB", "tif"), ("P", "png"), ("P", "gif"), ("CMYK", "tif"),
                                          ("RGBA", "png")])
@pytest.mark.parametrize("pixels, spread, colour", [(100, 25, False), (101, 25, True), (10000, 24, False),
                                                    (10000, 25, True), (0, 0, False)])
def test_colour_is_over_1_percent_with_spread_over_24(tmp_path, mode, suffix, pixels, spread, colour):
    rgb = np.full((100, 100, 3), 200, np.uint8)
    rgb.reshape(-1, 3)[:pixels, 0] -= spread
    image = Image.fromarray(rgb)
    if mode == "P":
        image = image.quantize(4, dither=Image.Dither.NONE)
        assert np.array_equal(image.convert("RGB"), rgb)
    path = save(tmp_path / f"a.{suffix}", image.convert(mode))
    assert in_colour(path) is colour
    if mode != "RGBA":  # of 255
        assert greys(path)[0].ravel()[-1] == (200 - round(0.299 * spread) if pixels == 10000 else 200)


def test_colour_on_transparent_ground_is_not_seen(tmp_path):
    rgba = np.full((100, 100, 4), 255, np.uint8)
    rgba[..., 0] = 0
    rgba[..., 3] = np.arange(100) < 1  # next to nothing is opaque
    assert not in_colour(save(tmp_path / "a.png", rgba))


@pytest.mark.parametrize("quality", [10, 40, 90])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_chroma_noise_of_jpeg_is_no_colour(tmp_path, quality, subsampling):
    texture = np.asarray(Image.fromarray(speckle(0, (200, 200))).filter(ImageFilter.GaussianBlur(1)))
    path = save(tmp_path / "a.jpg", np.dstack([texture] * 3), quality=quality, subsampling=subsampling)
    assert not in_colour(path)
    doppler = np.dstack([texture] * 3)
    doppler[80:120, 80:120] = (220, 40, 30)  # 4 %
    assert in_colour(save(tmp_path / "b.jpg", doppler, quality=quality, subsampling=subsampling))


def test_colour_of_a_clip_is_told_by_frame(tmp_path):
    red = np.zeros((20, 30, 3), np.uint8)
    red[..., 0] = 200
    path = save(tmp_path / "a.tif", np.dstack([speckle(0)] * 3), red)
    assert [frame.colour for frame in read_frames(path)] == [False, True]


# ---------------------------------------------------------------- folders

def touch(folder, *names):
    for name in names:
        save(folder / name, np.zeros((1, 1), np.uint8))
    return folder


def test_links_to_folders_are_followed_once(tmp_path):
    src, far = touch(tmp_path / "src", "m/1.png", "m/2.png", "x.png"), touch(tmp_path / "far", "deep/3.png")
    (src / "m" / "up").symlink_to(src)  # a link to the parent
    (src / "z").symlink_to(src / "m")  # to a sibling
    (src / "far1").symlink_to(far)
    (src / "far2").symlink_to(far)
    (far / "back").symlink_to(src)
    (far / "deep" / "self").symlink_to(far / "deep")
    for source in (src, f"{src}/", f"{src}/.//"):
        found = list_images(str(source))
        assert found.names == ["x.png", "far1/deep/3.png", "m/1.png", "m/2.png"], source
        assert [os.path.exists(path) for path in found.paths] == [True] * 4 and found.closed == []


def test_two_links_to_each_other(tmp_path):
    src = touch(tmp_path / "src", "1.png")
    for here, there in ("ab", "ba"):
        touch(src / here, "1.png")
        (src / here / "other").symlink_to(src / there)
    (src / "loop1").symlink_to(src / "loop2")
    (src / "loop2").symlink_to(src / "loop1")
    (src / "loop.png").symlink_to(src / "loop.png")
    assert list_images(str(src)).names == ["1.png", "loop.png", "a/1.png", "a/other/1.png"]
    assert [reason for _, _, reason in decode_chunk([str(src / "loop.png")], 0, 8, False, b"s")[2]] == [
        os.strerror(40)]


def test_files_that_are_listed(tmp_path):
    src = touch(tmp_path / "src", "A.PNG", "b.jpeg", "c.Tif", ".hidden.png", "._b.jpeg")
    (src / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (src / "link.png").symlink_to(src / "A.PNG")
    (src / "folder.png").mkdir()
    for name in ("notes.txt", "README", "1.2.840", "png", "a.png.part", "Thumbs.db"):
        (src / name).write_text("no image")
    found = list_images(str(src))
    assert found.names == ["A.PNG", "b.jpeg", "c.Tif", "gone.png", "link.png"]  # what is gone is told when it is read
    assert found.grouped_by == images.IMAGE_GROUPS
    assert decode_chunk(found.paths[3:4], 0, 8, False, b"s")[2] == [(0, 0, "No such file or directory")]


@pytest.mark.parametrize("name", ["x.png", "x", "1.2.3", "x.dcm"])
@pytest.mark.parametrize("listed", [False, True])
def test_a_pipe_does_not_hang(tmp_path, alarm, monkeypatch, name, listed):
    src = touch(tmp_path / "src", "a.png")
    os.mkfifo(src / name)
    (src / "list.txt").write_text(f"a.png\n{name}\n")
    source = str(src / "list.txt" if listed else src)
    with monkeypatch.context() as patch:  # is_dicom is asked for all files then
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with contextlib.suppress(ValueError):  # x.dcm is DICOM, by its name
            list_images(source)
    found = list_images(source)
    assert found.names == ["a.png"] + [name] * (listed or name in ("x.png", "x.dcm"))
    path = str(src / name)
    assert count_frames(path) == 1
    with pytest.raises((ValueError, OSError), match="not a regular file"):
        greys(path)


def test_unreadable_folders_are_told(tmp_path, monkeypatch):
    src, scan = touch(tmp_path / "src", "a/1.png", "b/2.png", "c/3.png"), os.scandir
    if ROOT_USER:
        def scandir(path):
            if os.path.basename(path) == "b":
                raise PermissionError(13, "Permission denied", path)
            return scan(path)
        monkeypatch.setattr(os, "scandir", scandir)
    else:
        (src / "b").chmod(0)
    try:
        found = list_images(str(src))
        assert found.names == ["a/1.png", "c/3.png"] and found.closed == [(str(src / "b"), "Permission denied")]
        with pytest.raises(ValueError, match="b: no images found .*; .*b: Permission denied"):
            list_images(str(src / "b"))
    finally:
        (src / "b").chmod(0o755)


# ---------------------------------------------------------------- several sources

def test_several_sources_prefix_names_and_groups(tmp_path):
    one, two = touch(tmp_path / "one", "p/1.png", "q/1.png"), touch(tmp_path / "two", "p/1.png", "1.png")
    (tmp_path / "list.txt").write_text("one/p/1.png\n")
    found = list_images([str(one), str(two), str(tmp_path / "list.txt")])
    assert found.names == ["one/p/1.png", "one/q/1.png", "two/1.png", "two/p/1.png", "list.txt/one/p/1.png"]
    assert found.groups == ["one/p", "one/q", "two", "two/p", "list.txt/one/p"] and found.grouped_by == "parent folder"
    assert [os.path.samefile(path, tmp_path / name) for path, name in zip(found.paths, found.names[:4])] == [True] * 4
    assert list_images([str(one), str(two)], exclude=["p/*"]).names == ["one/q/1.png", "two/1.png"]


def test_sources_of_equal_names_keep_apart(tmp_path, monkeypatch):
    touch(tmp_path / "x" / "data", "p/1.png", "q/1.png")
    touch(tmp_path / "y" / "data", "p/1.png")
    monkeypatch.chdir(tmp_path)
    for sources in (["x/data", "y/data/"], ["x/data", "./y/data"], [f"{tmp_path}/x/data", f"{tmp_path}/y/data"]):
        found = list_images(sources)
        assert len({*found.names}) == len({*found.groups}) == 3, found
        assert all(name.endswith(("x/data/p/1.png", "x/data/q/1.png", "y/data/p/1.png")) for name in found.names)
    monkeypatch.chdir(tmp_path / "x")  # one relative, one absolute
    assert len({*list_images(["data", str(tmp_path / "y/data")]).groups}) == 3


def write_csv(path, *rows, **options):
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file, **options).writerows(rows)
    return str(path)


def test_group_columns_of_several_sources(tmp_path):
    touch(tmp_path, "1.png", "2.png")
    one = write_csv(tmp_path / "1.csv", ("image", "group"), ("1.png", "P"))
    two = write_csv(tmp_path / "2.csv", ("group", "image"), ("P", "2.png"))
    bare = write_csv(tmp_path / "3.csv", ("image",), ("2.png",))
    found = list_images([one, two])
    assert found.groups == ["P", "P"] and found.names == ["1.csv/1.png", "2.csv/2.png"]  # one patient in two lists
    assert found.grouped_by == "group column"
    for sources in ([one, bare], [bare, one], [one, str(tmp_path)]):
        with pytest.raises(ValueError, match="some have a group column and some have none; give all of them one"):
            list_images(sources)


# ---------------------------------------------------------------- DICOM in folders

@pytest.fixture
def dicoms(tmp_path):
    frames = speckle(0, (2, 12, 20))
    for name in ("a.dcm", "b.IMA", "1.2.840.113619.2", "IM0001", "sub/I_5."):
        save_dicom(tmp_path / "src" / name, frames)
    (tmp_path / "src" / "1.2.9").write_bytes(bytes(200))
    (tmp_path / "src" / "notes.v2").write_bytes((tmp_path / "src" / "IM0001").read_bytes())  # a suffix of another kind
    return touch(tmp_path / "src", "z.png")


def test_dicom_is_found_by_suffix_or_magic(dicoms):
    found = list_images(str(dicoms))
    assert found.names == ["1.2.840.113619.2", "IM0001", "a.dcm", "b.IMA", "z.png", "sub/I_5."]
    for path in found.paths:
        assert count_frames(path) == (1 if path.endswith("z.png") else 2)
        if not path.endswith("z.png"):
            frames = list(read_frames(path))
            assert np.array_equal([frame.grey for frame in frames], speckle(0, (2, 12, 20)))
            assert {frame[2:] for frame in frames} == {(False, (0, 0), "P7", "1.2.7")}
            assert all(np.array_equal(frame.grey, frame.whole) for frame in frames)


def test_missing_pydicom_is_told_at_listing(dicoms, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as error:
        list_images(str(dicoms))
    assert str(error.value) == (f"{dicoms / '1.2.840.113619.2'} is DICOM: reading it needs pydicom (pip install "
                                f"pydicom); or --exclude such files")
    with pytest.raises(ValueError, match="IM0001 is DICOM"):
        list_images(str(dicoms), exclude=["1.*", "*.dcm", "*.IMA"])
    assert list_images(str(dicoms), exclude=["1.*", "I*", "*.dcm", "*.IMA", "*/I*"]).names == ["z.png"]


# ---------------------------------------------------------------- lists

def test_text_lists_keep_names_as_they_are(tmp_path):
    odd = ["a b.png", " lead.png", "trail.png ", "tab.png\t", "comma,quote\".png", "ä.png", os.fsdecode(b"\xff.png")]
    touch(tmp_path, *(name for name in odd if name.endswith("png")))
    for end in (b"\n", b"\r\n"):
        for mark in (b"", b"\xef\xbb\xbf"):
            for last in (b"", end, 3 * end):
                text = mark + (2 * end).join(map(os.fsencode, odd)) + last
                for name in ("list.txt", "list"):
                    (tmp_path / name).write_bytes(text)
                    found = list_images(str(tmp_path / name))
                    assert found.names == odd and found.paths == [str(tmp_path / name) for name in odd]
    assert found.labels is None and found.grouped_by == images.IMAGE_GROUPS
    assert found.groups == odd


def test_a_path_per_line_may_be_called_csv(tmp_path):
    (tmp_path / "paths.csv").write_text("/data/a.png\r\nsub/b.png\r\n")
    found = list_images(str(tmp_path / "paths.csv"))
    assert found.names == ["/data/a.png", "sub/b.png"] and found.paths == ["/data/a.png", str(tmp_path / "sub/b.png")]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("columns", [("image",), ("image", "group"), ("group", "image")])
def test_csv_names_with_newlines(tmp_path, quoting, columns):
    odd = ["a\nb.png", "c\r\nd.png", "e,f.png", 'g"h.png', " i.png ", os.fsdecode(b"\xff.png"), "ä.png"]
    rows = [[name if column == "image" else f"group\n{name}" for column in columns] for name in odd]
    path = write_csv(tmp_path / "a.csv", columns, *rows, quoting=quoting)
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.csv").read_bytes())
    for source in (path, str(tmp_path / "bom.csv")):
        found = list_images(source)
        assert found.names == odd and found.paths == [str(tmp_path / name) for name in odd]
        assert found.groups == ([f"group\n{name}" for name in odd] if len(columns) == 2 else odd)


@pytest.mark.parametrize("text, line, got", [
    ('image,group\na.png,1\nb.png\n', 3, r"\['b.png', None\]"),
    ('image,group\r\n"a\nb.png",1\r\n\r\nc.png,\r\n', 5, r"\['c.png', ''\]"),
    ('image,group\n,1\n', 2, r"\['', '1'\]"),
    ('image,group\na.png,1,2\n', 2, r"\['a.png', '1', \['2'\]\]"),
])
def test_csv_errors_name_the_line(tmp_path, text, line, got):
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(ValueError, match=f"a.csv, line {line}: expected 2 filled columns, got {got}"):
        list_images(str(tmp_path / "a.csv"))


def test_a_quote_that_never_ends_is_a_sentence(tmp_path):
    (tmp_path / "a.csv").write_text('image,group\n"a.png,1\n' + "b.png,2\n" * 30_000)
    with pytest.raises(ValueError, match="a.csv"):
        list_images(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("text, labelled, complaint", [
    ("picture,group\na.png,1\n", False, r"columns are picture,group; expected image\[,group\]"),
    ("image,group\na.png,1\n", True, r"columns are image,group; expected image,label\[,group\]"),
    ("image,side\na.png,1\n", False, "columns are image,side"),
    ("a.png\nb.png\n", True, "labels need a folder per class or a .csv"),
    ("", False, "no images found"),
    ("image,group\n", False, "no images found"),
])
def test_lists_that_are_refused(tmp_path, text, labelled, complaint):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        list_images(str(tmp_path / "a.csv"), labelled=labelled)


# ---------------------------------------------------------------- many files in worker processes

@pytest.fixture
def mixed(tmp_path):
    """Stills and clips, one of over two chunks' frames -> paths, (name, frame, canvas) of all that is in them."""
    expected = []
    for number, count in enumerate([1, 1, 2 * FRAMES + 9, 1, FRAMES, 5, FRAMES + 1, 1, 1, 1, 3]):
        pages = [speckle(1000 * number + frame) for frame in range(count)]
        path = save(tmp_path / f"{number:02}.tif", *pages)
        expected += [(path, frame, resize_square(page, 8)) for frame, page in enumerate(pages)]
    return sorted({path for path, _, _ in expected}), expected


def decode(paths, canvas=8, crop_fan=False, workers=1):
    """All of decode_all -> rows, canvases, failures, and the files ended after each step."""
    steps = list(decode_all(paths, canvas, crop_fan, b"salt", workers))
    return (np.concatenate([step[1] for step in steps]), np.concatenate([step[2] for step in steps]),
            [entry for step in steps for entry in step[3]], [step[0] for step in steps])


def assert_all(found, paths, expected):
    rows, canvases, failed, ended = found
    assert [(paths[row["image"]], row["frame"]) for row in rows] == [entry[:2] for entry in expected]
    assert np.array_equal(canvases, [square for _, _, square in expected]) and failed == []
    assert ended == sorted(ended) and ended[-1] == len(paths)
    assert rows["sum"].tolist() == canvases.astype(int).sum((1, 2)).tolist()
    assert rows["squares"].tolist() == (canvases.astype(int) ** 2).sum((1, 2)).tolist()
    assert {*zip(rows["width"].tolist(), rows["height"].tolist())} == {(30, 20)}


@pytest.mark.parametrize("workers", [1, 3])
def test_order_and_completeness(mixed, monkeypatch, workers):
    monkeypatch.setattr(images, "CHUNK", 3)
    assert_all(decode(mixed[0], workers=workers), *mixed)


@pytest.mark.parametrize("chunk, frames", [(1, 1), (2, 7), (100, 3), (4, 1000)])
def test_any_size_of_chunk(mixed, monkeypatch, chunk, frames):
    monkeypatch.setattr(images, "CHUNK", chunk)
    monkeypatch.setattr(images, "FRAMES", frames)
    for _, rows, canvases, _ in decode_all(mixed[0], 8, False, b"salt", 1):
        assert len(rows) == len(canvases) <= frames
    assert_all(decode(mixed[0]), *mixed)


def test_a_chunk_goes_on_where_it_stopped(mixed, monkeypatch):
    paths, expected = mixed
    reads, read = [], images.read_frames
    monkeypatch.setattr(images, "read_frames", lambda path, first=0: reads.append((path, first)) or read(path, first))
    rows, _, failed, resume = decode_chunk(paths[:3], 0, 8, False, b"s")
    assert len(rows) == FRAMES and failed == [] and resume == (2, FRAMES - 2)
    rows, canvases, _, resume = decode_chunk(paths[2:3], FRAMES - 2, 8, False, b"s")
    assert rows["frame"].tolist() == list(range(FRAMES - 2, 2 * FRAMES - 2)) and resume == (0, 2 * FRAMES - 2)
    assert np.array_equal(canvases[0], expected[FRAMES][2])
    assert reads == [(paths[0], 0), (paths[1], 0), (paths[2], 0), (paths[2], FRAMES - 2)]  # no frame from the start
    for first in (2 * FRAMES + 8, 2 * FRAMES + 9):  # the last frame; none
        rows, _, failed, resume = decode_chunk(paths[2:3], first, 8, False, b"s")
        assert len(rows) == 2 * FRAMES + 9 - first and failed == [] and resume is None


def test_no_paths_are_no_steps():
    assert list(decode_all([], 8, False, b"s", 3)) == []


def test_frames_in_flight_are_bounded(mixed, monkeypatch):
    class Counting(images.ProcessPoolExecutor):
        def submit(self, *args):
            outstanding.append(1)
            most.append(len(outstanding))
            return super().submit(*args)
    outstanding, most = [], []
    monkeypatch.setattr(images, "ProcessPoolExecutor", Counting)
    monkeypatch.setattr(images, "CHUNK", 1)
    for _ in decode_all(mixed[0] * 4, 8, False, b"s", 2):
        outstanding.pop()
    assert not outstanding and len(most) == 4 * (len(mixed[0]) + 3)  # files, and three resumed clips
    assert max(most) == 1 + 3 * 2 + 1  # and that which is handed over


def broken_clip(folder, kind):
    """A clip of 6 frames, whose fourth is damaged -> path, its frames."""
    pages = [speckle(i, (30, 40)) for i in range(6)]
    if kind == "dicom":
        path = save_dicom(folder / "a.dcm", np.stack(pages))
        size = os.path.getsize(path)
        os.truncate(path, size - 3 * 1200 + 600)
    elif kind == "gif":
        path = save(folder / "a.gif", *pages)
        os.truncate(path, os.path.getsize(path) * 6 // 10)
    else:
        dtype = np.uint16 if kind == "deep" else np.uint8
        path = save(folder / "a.tif", *(page.astype(dtype) for page in pages),
                    compression="tiff_adobe_deflate" if kind == "deflate" else None)
        with Image.open(path) as image:
            image.seek(3)
            offset, length = image.tag_v2[273][0], image.tag_v2[279][0]
        if kind == "deflate":  # the other pages stay where they are
            with open(path, "r+b") as file:
                file.seek(offset)
                file.write(b"\xff" * length)
        else:
            os.truncate(path, offset + length // 2)
    return path, pages


@pytest.mark.parametrize("crop_fan", [False, True])
@pytest.mark.parametrize("kind", ["tiff", "deflate", "deep", "gif", "dicom"])
def test_frames_before_damage_stay(tmp_path, kind, crop_fan):
    path, pages = broken_clip(tmp_path, kind)
    good = save(tmp_path / "good.png", speckle(9))
    rows, canvases, failed, ended = decode([path, good], crop_fan=crop_fan)
    assert [tuple(row) for row in rows[["image", "frame"]].tolist()] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    (number, frame, reason), = failed
    assert (number, frame) == (0, 3) and reason and ended[-1] == 2
    if kind != "deep":
        assert rows["hash"].tolist() == [content_hash(page) for page in (*pages[:3], speckle(9))]


def test_reasons_are_words(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").write_bytes(b"")
    paths = [str(tmp_path / name) for name in ("text.png", "empty.png", "gone.png", "")]
    assert decode(paths)[2] == [(0, 0, "not an image, or cut off in its first bytes"),
                                (1, 0, "not an image, or cut off in its first bytes"),
                                (2, 0, "No such file or directory"), (3, 0, "not a regular file")]


def screen(level, text):
    """A clip's frame: a wedge of speckle in one place, burnt-in text at the border that changes."""
    y, x = np.mgrid[:120, :160]
    inside = (np.hypot(x - 80, y + 20) < 120) & (np.abs(x - 80) < 0.6 * (y + 20))
    grey = np.where(inside, speckle(level, (120, 160)) % level + 1, 0).astype(np.uint8)
    grey[text:text + 2, 2:12] = 200
    return grey


@pytest.mark.parametrize("workers", [1, 2])
def test_a_clip_has_one_fan(tmp_path, workers):
    """Its dark frames would show less of it; that of the first frames holds for resumed chunks, too."""
    clip = [screen(level, 5 + number % 3) for number, level in enumerate([20, 200, 60] + [30] * (FRAMES + 5))]
    still = screen(99, 5)
    paths = [save(tmp_path / "clip.tif", *clip), save(tmp_path / "still.png", still)]
    fans = [find_fan(np.maximum.reduce(clip[:images.FAN_FRAMES])), find_fan(still)]
    assert not fans[0].all()
    rows, canvases, failed, _ = decode(paths, 32, True, workers)
    assert len(rows) == len(clip) + 1 and not failed
    for row, canvas, grey in zip(rows, canvases, [*clip, still]):
        trimmed, _ = images.apply_fan(grey, fans[row["image"]])
        assert (row["height"], row["width"]) == trimmed.shape and np.array_equal(canvas, resize_square(trimmed, 32))
    plain, other, _, _ = decode(paths, 32, False, workers)
    assert np.array_equal(rows["hash"], plain["hash"]) and np.array_equal(rows["looks"], plain["looks"])
    assert rows["hash"].tolist() == [content_hash(grey) for grey in [*clip, still]]
    assert not np.array_equal(canvases, other) and (plain["width"] == 160).all()


def test_frames_of_other_sizes_have_a_fan_of_their_own(tmp_path):
    pages = [screen(99, 5), np.pad(screen(99, 5), ((0, 0), (40, 0))), speckle(0, (9, 9))]
    rows, _, failed, _ = decode([save(tmp_path / "a.tif", *pages)], 16, True)
    assert not failed
    for row, page in zip(rows, pages):
        assert (row["height"], row["width"]) == images.apply_fan(page, find_fan(page))[0].shape


def test_patients_and_studies_are_salted(tmp_path):
    paths = [save_dicom(tmp_path / f"{number}.dcm", speckle(number, (1, 12, 20)), patient, study)
             for number, (patient, study) in enumerate([("P1", "1.2"), ("P1", "1.3"), ("", "1.2"), ("P1 ", "")])]
    paths.append(save(tmp_path / "a.png", speckle(9)))
    rows, *_ = decode(paths)
    one, two, three = salted("P1", b"salt"), salted("1.2", b"salt"), salted("1.3", b"salt")
    assert rows["patient"].tolist() == [one, one, 0, one, 0] and rows["study"].tolist() == [two, three, two, 0, 0]
    other = next(decode_all(paths, 8, False, b"pepper", 1))[1]
    assert not np.isin(other["patient"][:2], rows["patient"]).any() and np.array_equal(other["hash"], rows["hash"])


def test_a_header_that_claims_too_many_frames_is_not_believed(tmp_path):
    """count_frames foretells the disk space: one damaged file must not stop all the others."""
    path = save_dicom(tmp_path / "a.dcm", speckle(0, (2, 12, 20)), NumberOfFrames=2_000_000_000)
    assert count_frames(path) <= os.path.getsize(path)
    rows, _, failed, _ = decode([path])
    assert len(rows) == 2 and failed[0][:2] == (0, 2) and "frame 3 of 2000000000" in failed[0][2]
