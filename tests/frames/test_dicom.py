"""DICOM files made by pydicom, read back: known pixels, windows by the standard's formulas, regions, broken files."""
import io
import sys

import numpy as np
import pytest
from PIL import Image

from frames import dicom
from frames.dicom import is_dicom, open_dicom


def speckle(seed, shape, high=256, dtype=np.uint8):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


GREY = speckle(0, (3, 12, 20))  # (frames, h, w)
COLOUR = speckle(1, (2, 12, 20, 3))
DEEP = speckle(2, (2, 12, 20), 4096, np.uint16)


@pytest.fixture
def make(tmp_path):
    """Write a DICOM file of frames (n, h, w[, 3]) or encoded bytes -> its path."""
    pydicom = pytest.importorskip("pydicom")

    def write(pixels=GREY, kind="MONOCHROME2", syntax=pydicom.uid.ExplicitVRLittleEndian, compress=None, encoded=None,
              name="a.dcm", vr=None, **elements):
        ds = pydicom.Dataset()
        ds.file_meta = pydicom.dataset.FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = syntax
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = pydicom.uid.UltrasoundMultiFrameImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = "1.2.3"
        ds.PatientID, ds.StudyInstanceUID, ds.PhotometricInterpretation = " P7 ", "1.2.840.7", kind
        ds.NumberOfFrames, ds.Rows, ds.Columns = pixels.shape[:3]
        ds.SamplesPerPixel = 3 if pixels.ndim == 4 else 1
        if pixels.ndim == 4:
            ds.PlanarConfiguration = 0
        ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
        ds.PixelRepresentation = int(pixels.dtype.kind == "i")
        order = "<" if syntax.is_little_endian else ">"
        native = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
        ds.PixelData = encoded or native + b"\0" * (len(native) % 2)
        ds["PixelData"].VR = vr or ("OB" if pixels.itemsize == 1 else "OW")
        if syntax.is_encapsulated:
            ds["PixelData"].is_undefined_length = True
        for keyword, value in elements.items():
            setattr(ds, keyword, value)
        ds.BitsStored = elements.get("BitsStored", ds.BitsStored)
        ds.HighBit = ds.BitsStored - 1
        if compress:
            ds.compress(compress, generate_instance_uid=False)
        path = tmp_path / name
        ds.save_as(path, enforce_file_format=True)
        return path
    return write


def read(path, first=0):
    """The frames' tissue regions."""
    file = open_dicom(path)
    frames, (x0, y0, x1, y1) = list(file.pixels(first)), file.box
    assert all(frame.dtype == np.uint8 and frame.flags.c_contiguous for frame in frames)
    return np.stack(frames)[:, y0:y1, x0:x1]


def sequence(*items):
    from pydicom import Dataset, Sequence
    made = []
    for item in items:
        made.append(Dataset())
        for keyword, value in item.items():
            setattr(made[-1], keyword, value)
    return Sequence(made)


def region(x0=2, y0=3, x1=11, y1=8, **others):
    return dict(RegionSpatialFormat=1, RegionDataType=1, RegionLocationMinX0=x0, RegionLocationMinY0=y0,
                RegionLocationMaxX1=x1, RegionLocationMaxY1=y1, **others)


# ---------------------------------------------------------------- which files

def test_is_dicom(tmp_path, make):
    for name in ("a.dcm", "b.DCM", "c.Dicom", "d.IMA"):
        assert is_dicom(tmp_path / name), "by the suffix alone"
    path = make(name="1.2.840.113619")
    assert is_dicom(path) and is_dicom(str(path))
    path.write_bytes(bytes(128) + b"DICN" + bytes(99))
    assert not is_dicom(path)
    path.write_bytes(b"DICM")
    assert not is_dicom(path) and not is_dicom(tmp_path) and not is_dicom(tmp_path / "none")


@pytest.mark.parametrize("module", ["pydicom", "pydicom.pixels"])  # not installed; older than 3.0
def test_pydicom_is_missing(monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:
        open_dicom(tmp_path / "x.dcm")
    assert str(error.value) == f"{tmp_path / 'x.dcm'} is DICOM: reading it needs pydicom (pip install pydicom)"


# ---------------------------------------------------------------- pixels

@pytest.mark.parametrize("syntax", ["ImplicitVRLittleEndian", "ExplicitVRLittleEndian", "ExplicitVRBigEndian"])
def test_native_grey(make, syntax):
    import pydicom
    path = make(syntax=getattr(pydicom.uid, syntax))
    file = open_dicom(path)
    assert (file.frames, file.patient, file.study, file.mm, file.box) == (3, "P7", "1.2.840.7", None, (0, 0, 20, 12))
    np.testing.assert_array_equal(read(path), GREY)
    deep = make(DEEP, syntax=getattr(pydicom.uid, syntax), BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_array_equal(read(deep), np.rint(DEEP / 4095 * 255))


def test_words_of_two_pixels(make):
    from pydicom.uid import ExplicitVRBigEndian
    swapped = GREY.reshape(-1, 2)[:, ::-1].tobytes()
    np.testing.assert_array_equal(read(make(syntax=ExplicitVRBigEndian, encoded=swapped, vr="OW")), GREY)


def test_first(make, monkeypatch):
    path, decoded, decode = make(), [], dicom.DicomFile._decode
    monkeypatch.setattr(dicom.DicomFile, "_decode",
                        lambda self, file, index: decoded.append(index) or decode(self, file, index))
    np.testing.assert_array_equal(read(path, 1), GREY[1:])
    assert list(open_dicom(path).pixels(3)) == []
    assert decoded == [1, 2]
    next(open_dicom(path).pixels())
    assert decoded == [1, 2, 0], "frames are decoded when they are asked for"


def test_odd_size_and_one_frame(make):
    pixels = speckle(3, (1, 5, 7))
    np.testing.assert_array_equal(read(make(pixels)), pixels)
    np.testing.assert_array_equal(read(make(pixels, NumberOfFrames=None)), pixels)
    file = open_dicom(make(pixels, PatientID="", StudyInstanceUID=None))
    assert (file.patient, file.study, file.frames) == ("", "", 1)


def test_monochrome1(make):
    np.testing.assert_array_equal(read(make(kind="MONOCHROME1")), 255 - GREY)
    wide = dict(WindowCenter=2048, WindowWidth=4096, BitsStored=12)
    np.testing.assert_array_equal(read(make(DEEP, "MONOCHROME1", **wide)), 255 - read(make(DEEP, **wide)))


def test_rgb(make):
    np.testing.assert_array_equal(read(make(COLOUR, "RGB")), COLOUR)
    planes = np.ascontiguousarray(COLOUR.transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(read(make(COLOUR, "RGB", encoded=planes.tobytes(), PlanarConfiguration=1)), COLOUR)
    wide = speckle(4, COLOUR.shape, 1024, np.uint16)
    np.testing.assert_array_equal(read(make(wide, "RGB", BitsStored=10)), wide >> 2)


def ybr_to_rgb(ybr):
    """PS3.3 C.7.6.3.1.2, solved for RGB."""
    y, b, r = (ybr[..., i].astype(float) for i in range(3))
    b, r = b - 128, r - 128
    return np.clip(np.stack((y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b), -1), 0, 255)


def test_ybr(make):
    assert np.abs(read(make(COLOUR, "YBR_FULL")) - ybr_to_rgb(COLOUR)).max() <= 1
    ybr = COLOUR.copy()
    ybr[:, :, 1::2, 1:] = ybr[:, :, ::2, 1:]  # two neighbours share their chroma
    pairs = np.stack((ybr[:, :, ::2, 0], ybr[:, :, 1::2, 0], ybr[:, :, ::2, 1], ybr[:, :, ::2, 2]), -1)
    path = make(COLOUR, "YBR_FULL_422", encoded=pairs.tobytes())
    assert np.abs(read(path) - ybr_to_rgb(ybr)).max() <= 1, "the second frame too"
    with pytest.raises(ValueError, match="not subsampled"):
        open_dicom(make(COLOUR, "YBR_FULL_422"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_palette(make, dtype):
    palette = speckle(5, (256, 3))
    luts = {f"{name}PaletteColorLookupTable{what}": value for i, name in enumerate(("Red", "Green", "Blue")) for
            what, value in (("Descriptor", [256, 0, 8 * dtype().itemsize]),
                            ("Data", (palette[:, i].astype(dtype) << (8 * dtype().itemsize - 8)).tobytes()))}
    np.testing.assert_array_equal(read(make(GREY, "PALETTE COLOR", **luts)), palette[GREY])
    wide = GREY.astype(np.uint16) + 99  # beyond the last entry too
    np.testing.assert_array_equal(read(make(wide, "PALETTE COLOR", **luts)), palette[np.minimum(wide, 255)])


def test_rle(make):
    from pydicom.uid import RLELossless
    np.testing.assert_array_equal(read(make(compress=RLELossless)), GREY)
    np.testing.assert_array_equal(read(make(COLOUR, "RGB", compress=RLELossless), 1), COLOUR[1:])
    wide = dict(BitsStored=12, WindowCenter=2048, WindowWidth=4096)
    np.testing.assert_array_equal(read(make(DEEP, compress=RLELossless, **wide)), read(make(DEEP, **wide)))


@pytest.mark.parametrize("kind", ["YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("offsets", [True, False])
def test_jpeg(make, kind, marked, offsets):
    """Vendors write RGB into the header of YCbCr JPEGs, and leave the JFIF mark out: the colours must survive."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[40:200:12j, 30:220:20j], 90.0), -1).astype(np.uint8)
    frames = np.stack((smooth, smooth[::-1]))
    jpegs = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=95)
        jpegs.append(file.getvalue() if marked else b"\xff\xd8" + file.getvalue()[20:])  # 18 bytes of JFIF mark
    assert (b"JFIF" in jpegs[0]) == marked
    path = make(frames, kind, JPEGBaseline8Bit, encoded=encapsulate(jpegs, has_bot=offsets))
    assert np.abs(read(path).astype(int) - frames).mean() < 5  # wrong colours: 40 and more
    assert np.abs(read(path, 1).astype(int) - frames[1:]).mean() < 5
    with pytest.raises(ValueError, match="header says otherwise"):  # 20 x 12 pixels might be any number
        read(make(frames, kind, JPEGBaseline8Bit, encoded=encapsulate(jpegs), Rows=11))


def test_jpeg_of_rgb(make):
    """RGB that was compressed as it is, with no mark that says so but the header and three full-size components."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit
    file = io.BytesIO()
    pixels = np.repeat(np.repeat(COLOUR[:1, ::4, ::4], 8, 1), 8, 2)
    Image.fromarray(pixels[0]).convert("YCbCr").save(file, "JPEG", quality=95, subsampling=0)
    data = file.getvalue()
    unmarked = b"\xff\xd8" + data[20:]
    stored = np.asarray(Image.fromarray(pixels[0]).convert("YCbCr"))
    path = make(pixels, "RGB", JPEGBaseline8Bit, encoded=encapsulate([unmarked]))
    assert np.abs(read(path)[0].astype(int) - stored).mean() < 2
    path = make(pixels, "YBR_FULL", JPEGBaseline8Bit, encoded=encapsulate([unmarked]))
    assert np.abs(read(path).astype(int) - pixels).mean() < 2
    path = make(pixels, "RGB", JPEGBaseline8Bit, encoded=encapsulate([data]))  # JFIF: YCbCr
    assert np.abs(read(path).astype(int) - pixels).mean() < 2


def test_jpeg2000(make):
    pytest.importorskip("openjpeg")
    from pydicom.uid import JPEG2000Lossless
    grey, colour, deep = (np.tile(pixels, (1, 3, 2, 1)[:pixels.ndim]) for pixels in (GREY, COLOUR, DEEP))  # 32 or more
    np.testing.assert_array_equal(read(make(grey, compress=JPEG2000Lossless)), grey)
    np.testing.assert_array_equal(read(make(colour, "YBR_RCT", compress=JPEG2000Lossless)), colour)
    wide, deep = dict(WindowCenter=0, WindowWidth=4096, BitsStored=12), deep.astype(np.int16) - 2048
    np.testing.assert_array_equal(read(make(deep, compress=JPEG2000Lossless, **wide)), read(make(deep, **wide)))
    path = make(grey, compress=JPEG2000Lossless)
    path.write_bytes(path.read_bytes()[:-120])  # in the last frame
    reads_then_fails(path, "frame 3 of 3: the pixel data end", grey[:2])


# ---------------------------------------------------------------- grey levels

def linear(x, c, w):  # the standard's pseudo code, value by value
    if x <= c - 0.5 - (w - 1) / 2:
        return 0
    return 255 if x > c - 0.5 + (w - 1) / 2 else ((x - (c - 0.5)) / (w - 1) + 0.5) * 255


def linear_exact(x, c, w):
    if x <= c - w / 2:
        return 0
    return 255 if x > c + w / 2 else ((x - c) / w + 0.5) * 255


def sigmoid(x, c, w):
    return 255 / (1 + np.exp(-4 * (x - c) / w))


@pytest.mark.parametrize("function, formula", [(None, linear), ("LINEAR", linear), ("LINEAR_EXACT", linear_exact),
                                               ("SIGMOID", sigmoid)])
@pytest.mark.parametrize("slope, intercept", [(1, 0), (0.5, -300), (-1, 3000)])
def test_window(make, function, formula, slope, intercept):
    elements = dict(WindowCenter=["700", "1"], WindowWidth=["900.5", "2"], BitsStored=12, RescaleSlope=str(slope),
                    RescaleIntercept=str(intercept), **({"VOILUTFunction": function} if function else {}))
    for pixels in (DEEP, DEEP.astype(np.int16) - 2048):
        expected = [formula(x * slope + intercept, 700, 900.5) for x in pixels.ravel().tolist()]
        error = read(make(pixels, **elements)).ravel() - np.array(expected)
        assert np.abs(error).max() <= 0.5 + 1e-9


def test_window_of_8_bits(make):
    expected = [linear(x, 100, 50) for x in GREY.ravel().tolist()]
    assert np.abs(read(make(WindowCenter=100, WindowWidth=50)).ravel() - np.array(expected)).max() <= 0.5


@pytest.mark.parametrize("window", [dict(WindowCenter=100, WindowWidth=0), dict(WindowCenter=100),
                                    dict(WindowCenter=100, WindowWidth=0.5)])
def test_windows_that_are_none(make, window):
    np.testing.assert_array_equal(read(make(**window)), GREY)


def test_lookup_tables(make):
    table = np.sort(speckle(6, 100, 1024, np.uint16))
    voi = sequence(dict(LUTDescriptor=[100, 50, 10], LUTData=table.tobytes()))
    voi[0]["LUTData"].VR = "OW"
    expected = np.rint(table[np.clip(GREY.astype(int) - 50, 0, 99)] / 1023 * 255)
    np.testing.assert_array_equal(read(make(VOILUTSequence=voi)), expected)
    modality = sequence(dict(LUTDescriptor=[100, 50, 16], LUTData=table.tolist(), ModalityLUTType="US"))
    modality[0]["LUTData"].VR = "US"
    path = make(ModalityLUTSequence=modality, WindowCenter=512, WindowWidth=1024)
    np.testing.assert_array_equal(read(path), expected)


def test_percentiles_of_the_whole_file(make):
    """A bright and a dark frame keep their ratio; 0.5 % at either end saturate."""
    ramp = np.linspace(0, 1000, 240).reshape(1, 12, 20)
    pixels = np.concatenate((ramp, 3 * ramp)).astype(np.uint16)
    low, high = np.percentile(pixels, (0.5, 99.5), method="inverted_cdf")
    expected = np.rint(np.clip((pixels - low.astype(float)) / (high - low), 0, 1) * 255)
    found = read(make(pixels, BitsStored=12))
    np.testing.assert_array_equal(found, expected)
    assert found[0].max() < 100 and found[1].max() == 255
    np.testing.assert_array_equal(read(make(pixels, BitsStored=12), 1), expected[1:])
    inverted = make(pixels, BitsStored=12, RescaleSlope="-2", RescaleIntercept="70")
    assert np.abs(read(inverted) - (255 - expected)).max() <= 3  # the percentiles are those of other pixels
    signed = make((pixels.astype(np.int16) - 1500))
    np.testing.assert_array_equal(read(signed), expected)
    np.testing.assert_array_equal(read(make(pixels * 0 + 9)), 0)
    spot = np.zeros((1, 40, 40), np.uint16)
    spot[0, 7, 7:9] = 250, 500  # less than 0.5 % of the pixels
    assert read(make(spot))[0, 7, 6:9].tolist() == [0, 128, 255]


def test_percentiles_of_a_long_file(make, monkeypatch):
    monkeypatch.setattr(dicom, "SCALE_FRAMES", 3)
    ramp = np.arange(240).reshape(1, 12, 20)
    pixels = (ramp * np.arange(1, 9)[:, None, None]).astype(np.uint16)  # frames 0, 3 and 6 are looked at
    low, high = np.percentile(pixels[::3], (0.5, 99.5), method="inverted_cdf")
    expected = np.rint(np.clip((pixels - float(low)) / (float(high) - low), 0, 1) * 255)
    np.testing.assert_array_equal(read(make(pixels)), expected)


# ---------------------------------------------------------------- regions and sizes

CM = dict(PhysicalUnitsXDirection=3, PhysicalUnitsYDirection=3, PhysicalDeltaX=0.05, PhysicalDeltaY=-0.02)


def test_region(make):
    file = open_dicom(path := make(SequenceOfUltrasoundRegions=sequence(region(**CM)), PixelSpacing=[9, 9]))
    assert file.box == (2, 3, 12, 9) and file.mm == pytest.approx((0.5, 0.2))
    np.testing.assert_array_equal(read(path), GREY[:, 3:9, 2:12])
    bright = DEEP.copy()
    bright[:, :3] = 4095  # outside: it must not move the scale
    crop = np.ascontiguousarray(DEEP[:, 3:9, 2:12])
    np.testing.assert_array_equal(read(make(bright, SequenceOfUltrasoundRegions=sequence(region()))), read(make(crop)))


@pytest.mark.parametrize("items, box", [
    ([region(0, 0, 4, 4), region(3, 2, 12, 9), region(5, 5, 7, 7)], (3, 2, 13, 10)),  # the largest
    ([region(4, 5, 4000, 4000)], (4, 5, 20, 12)),  # clamped
    ([region(8, 8, 3, 3)], (0, 0, 20, 12)),  # empty
    ([region(25, 2, 30, 8)], (0, 0, 20, 12)),  # outside
    ([{**region(), "RegionDataType": 2}, {**region(), "RegionSpatialFormat": 2}], (0, 0, 20, 12)),  # flow, M-mode
    ([dict(RegionSpatialFormat=1, RegionDataType=1)], (0, 0, 20, 12)),
    ([], (0, 0, 20, 12)),
])
def test_boxes(make, items, box):
    assert open_dicom(make(SequenceOfUltrasoundRegions=sequence(*items))).box == box


@pytest.mark.parametrize("change", [dict(PhysicalUnitsXDirection=4), dict(PhysicalDeltaY=0.0),
                                    dict(PhysicalDeltaX=float("nan"))])
def test_pixel_spacing(make, change):
    assert open_dicom(make(PixelSpacing=["0.3", "0.7"])).mm == (0.7, 0.3), "rows come first in PixelSpacing"
    items = sequence(region(**{**CM, **change}))
    assert open_dicom(make(SequenceOfUltrasoundRegions=items)).mm is None
    assert open_dicom(make(SequenceOfUltrasoundRegions=items, PixelSpacing=["0.3", "0.7"])).mm == (0.7, 0.3)
    assert open_dicom(make(PixelSpacing=["0", "0.7"])).mm is None


# ---------------------------------------------------------------- what cannot be read

def reads_then_fails(path, match, expected):
    file = open_dicom(path)
    frames = []
    with pytest.raises((OSError, ValueError), match=match):
        for frame in file.pixels():
            frames.append(frame)
    assert len(frames) == len(expected)
    for frame, wanted in zip(frames, expected):
        np.testing.assert_array_equal(frame, wanted)


def test_truncated(make):
    path = make()
    path.write_bytes(path.read_bytes()[:-250])
    reads_then_fails(path, "frame 2 of 3: the pixel data end", GREY[:1])


def test_number_of_frames_lies(make):
    from pydicom.uid import RLELossless
    reads_then_fails(make(NumberOfFrames=9), "frame 4 of 9: the pixel data end", GREY)
    reads_then_fails(make(DEEP, NumberOfFrames=9, WindowCenter=0, WindowWidth=1), "frame 3 of 9", DEEP * 0 + 255)
    reads_then_fails(make(speckle(7, (2, 30, 30), 4096, np.uint16) * 0, NumberOfFrames=999), "frame 3 of 999",
                     np.zeros((2, 30, 30)))
    import pydicom
    ds = pydicom.dcmread(path := make(compress=RLELossless))
    ds.NumberOfFrames = 9
    ds.save_as(path)
    reads_then_fails(path, "frame 4 of 9", GREY)
    with pytest.raises(ValueError, match="-3 frames"):
        open_dicom(make(NumberOfFrames=-3))


def test_missing_decoder(make, monkeypatch):
    import pydicom
    from pydicom.encaps import encapsulate
    path = make(syntax=pydicom.uid.JPEGLosslessSV1, encoded=encapsulate([b"ab"] * 3))
    monkeypatch.setattr(pydicom.pixels.decoders.JPEGLosslessSV1Decoder, "_available", {})
    with pytest.raises(ValueError, match="^JPEG Lossless.*pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg$"):
        open_dicom(path)
    path = make(syntax=pydicom.uid.MPEG4HP41, encoded=encapsulate([b"ab"]))
    with pytest.raises(ValueError, match="MPEG-4"):
        open_dicom(path)


def test_no_pixels(make):
    import pydicom
    ds = pydicom.dcmread(path := make())
    del ds.PixelData
    ds.file_meta.MediaStorageSOPClassUID = pydicom.uid.ComprehensiveSRStorage
    ds.save_as(path)
    with pytest.raises(ValueError, match=r"^no pixel data \(Comprehensive SR Storage\)$"):
        open_dicom(path)
    ds.FloatPixelData = bytes(4 * 720)
    ds.save_as(path)
    with pytest.raises(ValueError, match="^no pixel data"):
        open_dicom(path)


@pytest.mark.parametrize("elements, match", [
    (dict(Rows=10000, Columns=5001), "5001 x 10000"), (dict(Rows=0), "20 x 0"), (dict(BitsAllocated=32), "1 x 32 bits"),
    (dict(PhotometricInterpretation="HSV"), "HSV"), (dict(SamplesPerPixel=3), "3 x 8 bits"),
])
def test_refused_before_decoding(make, elements, match):
    with pytest.raises(ValueError, match=match):
        open_dicom(make(**elements))


def test_not_dicom(make, tmp_path):
    make()
    for content in (b"", b"hello\n" * 99, bytes(128) + b"DICM", bytes(128) + b"DICMhello" * 40):
        (tmp_path / "b.dcm").write_bytes(content)
        with pytest.raises(ValueError):
            open_dicom(tmp_path / "b.dcm")
    with pytest.raises(FileNotFoundError):
        open_dicom(tmp_path / "none.dcm")


@pytest.mark.parametrize("kind", ["native", "rle", "deep", "jpeg"])
def test_mutations(make, kind, recwarn):
    """Random bytes changed in a valid file: frames, OSError or ValueError, never anything else, and no warnings."""
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGBaseline8Bit, RLELossless
    items = sequence(region(**CM))
    if kind == "jpeg":
        file = io.BytesIO()
        Image.fromarray(GREY[0]).save(file, "JPEG")
        path = make(syntax=JPEGBaseline8Bit, encoded=encapsulate([file.getvalue()] * 3))
    elif kind == "deep":
        path = make(DEEP, SequenceOfUltrasoundRegions=items, RescaleSlope="2", RescaleIntercept="1")
    else:
        path = make(SequenceOfUltrasoundRegions=items, compress=RLELossless if kind == "rle" else None,
                    WindowCenter=99, WindowWidth=100)
    original, rng, outcomes = path.read_bytes(), np.random.default_rng(0), set()
    header = original.index(b"\xe0\x7f\x10\x00") + 40
    for _ in range(50):
        content = bytearray(original)
        for place in rng.integers(128, header, rng.integers(1, 4)):
            content[place] = rng.integers(256)
        path.write_bytes(content[:rng.integers(len(content))] if rng.random() < 0.1 else content)
        try:
            for frame in open_dicom(path).pixels():
                assert frame.dtype == np.uint8 and frame.size
            outcomes.add("frames")
        except (OSError, ValueError) as error:
            assert len(str(error)) < 300 and "\n" not in str(error)
            outcomes.add("error")
    assert outcomes == {"frames", "error"} and not recwarn.list
