"""Reading one file of any kind: known pixels."""
import tracemalloc

import numpy as np
import pytest
from file_tools import greys, load_grey, save, save_dicom, speckle
from PIL import Image, ImageFilter

from frames import images
from frames.images import FRAMES, count_frames, decode_all, read_frames
from labelled import store


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


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png: cannot be read .*--exclude"):
        store.Images(1, lambda i: images.read_image(str(tmp_path / "a.png"))).at(8)
