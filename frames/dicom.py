"""What frames, which patient and what pixel size does a DICOM file hold?

    file = open_dicom("1.2.840.113619.2")
    print(file.frames, file.patient, file.study, file.mm, file.box)
    for frame in file.pixels(first=3): ...  # uint8 (h, w) or (h, w, 3)

pydicom, an optional package (3.0 or newer), parses and decodes; Pillow decodes baseline JPEG. Frames are decoded one
by one; `box` is their 2-D tissue region. What cannot be read raises OSError or ValueError with a short reason.
"""

import contextlib
import functools
import io
import math
import struct
import warnings

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

SUFFIXES = (".dcm", ".dicom", ".ima")
DECODERS = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
MAX_PIXELS = 16_000_000  # of a frame, of any kind of file: more is a broken header, or made to fill memory
SCALE_FRAMES = 32  # frames, evenly spread, that a file's percentiles are taken from
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# the only elements read: private ones can hold hundreds of megabytes
TAGS = ["PatientID", "StudyInstanceUID", "SequenceOfUltrasoundRegions", "PixelSpacing",
        "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns",
        "BitsAllocated", "BitsStored", "PixelRepresentation", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
        "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
        "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
        *(f"{prefix}{colour}PaletteColorLookupTable{what}" for colour in ("Red", "Green", "Blue")
          for prefix, what in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data")))]


def is_dicom(path):
    """True if a file is DICOM by its suffix or its first bytes; False if it cannot be opened."""
    if str(path).lower().endswith(SUFFIXES):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


@contextlib.contextmanager
def plain_errors(where=""):
    """Silence pydicom's warnings; what it raises on a broken file becomes ValueError, but for OSError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"broken DICOM, {type(error).__name__}: "
        raise ValueError(f"{where}{kind}{' '.join(str(error).split())[:200]}") from error


def numbers(ds, keyword, count=1):
    """The first values of an element: a list of `count` floats, nan where missing or malformed."""
    try:
        values = np.array(ds.get(keyword), float).ravel().tolist()
    except Exception:
        values = []
    return (values + [math.nan] * count)[:count]


def look_up(values, item, order):
    """A modality or VOI LUT (PS3.3 C.11.1, C.11.2) -> mapped values (n,), the largest value that they can have."""
    entries, first, bits = (int(value) for value in item.LUTDescriptor)
    data, entries = item.LUTData, entries or 65536
    if isinstance(data, bytes):
        data = np.frombuffer(data, order + "u2" if len(data) >= 2 * entries else "u1")
    data = np.ravel(data)[:entries].astype(float)
    return data[np.clip(np.rint(values) - first, 0, len(data) - 1).astype(int)], 2 ** bits - 1


def window(values, center, width, function):
    """PS3.3 C.11.2.1.2 and .3: values (n,) -> grey, 0 to 1. Any other function than the two named is LINEAR."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function != "LINEAR_EXACT":
        center, width = center - 0.5, width - 1
    return np.clip((values - center) / max(width, 1e-9) + 0.5, 0, 1)


def decode_jpeg(data, size, kind):
    """A baseline JPEG -> uint8 (h, w), or RGB (h, w, 3).

    Not by pydicom: where the header says RGB it takes YCbCr for it if there is no JFIF mark. The JPEG's own marks
    count, as in viewers; without any the header does, unless chroma is subsampled: only YCbCr is.
    """
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    if image.size != size:  # before it is decoded: 20 bytes can claim any size
        raise ValueError(f"its JPEG has {image.width} x {image.height} pixels, the header says otherwise")
    if kind.startswith("MONO"):
        return np.array(image.convert("L"))
    unmarked = not {"jfif", "adobe_transform"} & image.info.keys() and image.layer[0][0] != ord("R")
    if kind == "RGB" and unmarked and get_sampling(image) == 0:
        image.draft("YCbCr", size)  # as stored, without a conversion
        return np.array(image)
    return np.array(image.convert("RGB"))


def tissue_region(ds, columns, rows):
    """The largest 2-D tissue region -> box (x0, y0, x1, y1) in pixels, ends excluded; (x, y) mm per pixel or None.

    What lies outside is text, spectra, M-mode. Without a region: the whole image, and PixelSpacing.
    """
    box, area = (0, 0, columns, rows), 0
    mm = numbers(ds, "PixelSpacing", 2)[::-1]  # it holds the distance of rows first
    for item in ds.get("SequenceOfUltrasoundRegions") or []:
        x0, y0, x1, y1, *kind = (numbers(item, keyword)[0] for keyword in (
            "RegionLocationMinX0", "RegionLocationMinY0", "RegionLocationMaxX1", "RegionLocationMaxY1",
            "RegionSpatialFormat", "RegionDataType"))
        if kind != [1, 1] or not np.isfinite([x0, y0, x1, y1]).all():  # 2-D, tissue
            continue
        x0, y0, x1, y1 = int(max(x0, 0)), int(max(y0, 0)), int(min(x1 + 1, columns)), int(min(y1 + 1, rows))
        if x0 < x1 and y0 < y1 and (x1 - x0) * (y1 - y0) > area:
            box, area = (x0, y0, x1, y1), (x1 - x0) * (y1 - y0)
            units = [numbers(item, f"PhysicalUnits{axis}Direction")[0] for axis in "XY"]
            delta = [10 * abs(numbers(item, f"PhysicalDelta{axis}")[0]) for axis in "XY"]
            if units == [3, 3] and np.isfinite(delta).all() and min(delta) > 0:  # 3: cm
                mm = delta
    return box, tuple(mm) if np.isfinite(mm).all() and min(mm) > 0 else None


def open_dicom(path):
    """The DicomFile of a path. ValueError where pydicom is missing too."""
    try:
        import pydicom.pixels  # noqa: F401
    except ImportError:
        raise ValueError(f"{path} is DICOM: reading it needs pydicom (pip install pydicom)") from None
    with plain_errors():
        return DicomFile(path)


class DicomFile:
    """frames: their count, as the header has it; patient, study: PatientID and StudyInstanceUID, "" if missing;
    mm: (x, y) millimetres per pixel or None; box: (x0, y0, x1, y1), the 2-D tissue region."""

    def __init__(self, path):
        import pydicom
        from pydicom.pixels import as_pixel_options, get_decoder

        self.path = path
        with open(path, "rb") as file:
            self.ds = ds = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=TAGS)
            self.syntax = ds.file_meta.TransferSyntaxUID
            if self.syntax.is_deflated:
                raise ValueError("deflated DICOM is not read")
            implicit, little = ds.original_encoding
            self.order = "<" if little else ">"
            head = file.read(8 if implicit else 12)  # of the Pixel Data element
            if len(head) < 8 or struct.unpack(self.order + "HH", head[:4]) != (0x7FE0, 0x0010):
                name = getattr(ds.file_meta.get("MediaStorageSOPClassUID"), "name", "of no known class")
                raise ValueError(f"no pixel data ({name})")
            self.start, length = file.tell(), struct.unpack(self.order + "I", head[-4:])[0]
            self.bytes = min(length, file.seek(0, io.SEEK_END) - self.start)
        self.decoder = get_decoder(self.syntax)
        if self.syntax != pydicom.uid.JPEGBaseline8Bit and not self.decoder.is_available:
            raise ValueError(f"{self.syntax.name} pixels need a decoder: {DECODERS}")
        self.options = as_pixel_options(ds, pixel_keyword="PixelData")
        if not implicit:
            self.options["pixel_vr"] = head[4:6].decode("latin-1")

        kind, samples, bits = ds.PhotometricInterpretation, ds.SamplesPerPixel, ds.BitsAllocated
        if bits not in (8, 16) or samples != (3 if kind in COLOURS else 1) or (
                kind not in (*COLOURS, "MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")):
            raise ValueError(f"{kind} pixels of {samples} x {bits} bits are not read")
        if not 0 < ds.Rows * ds.Columns <= MAX_PIXELS:
            raise ValueError(f"frames of {ds.Columns} x {ds.Rows} pixels are not read")
        self.frames = int(self.options["number_of_frames"])
        if self.frames < 1:
            raise ValueError(f"{self.frames} frames")
        size = ds.Rows * ds.Columns * samples * bits // 8
        if kind == "YBR_FULL_422" and not self.syntax.is_encapsulated:
            if self.bytes >= size * self.frames:  # would be read as a third more frames, sheared
                raise ValueError("YBR_FULL_422 pixels that are not subsampled are not read")
            size = size * 2 // 3
        self.frame_bytes = 0 if self.syntax.is_encapsulated else size  # 0: not known
        self.patient = str(ds.get("PatientID") or "").strip("\0 \t\r\n")
        self.study = str(ds.get("StudyInstanceUID") or "").strip("\0 \t\r\n")
        self.box, self.mm = tissue_region(ds, ds.Columns, ds.Rows)
        self.low = -2 ** (bits - 1) if ds.PixelRepresentation == 1 else 0  # the least stored value

    def pixels(self, first=0):
        """Yield the frames from number `first` on: uint8 (h, w) grey or (h, w, 3) RGB, all that the screen showed.

        Where a file holds fewer frames than its header says, those there are yielded before the error.
        """
        with open(self.path, "rb") as file:
            for index in range(first, self.frames):
                with plain_errors(f"frame {index + 1} of {self.frames}: "):
                    frame = self._decode(file, index)
                    if self._table is not None:
                        frame = self._table[frame.astype(np.int32) - self.low]
                    elif frame.dtype != np.uint8:  # colour of more than 8 bits
                        frame = np.clip(frame >> max(self.ds.BitsStored - 8, 0), 0, 255).astype(np.uint8)
                yield np.ascontiguousarray(frame)

    def _decode(self, file, index):
        """Stored values of a frame: integers (h, w), or RGB (h, w, 3)."""
        from pydicom.encaps import get_frame
        from pydicom.uid import JPEGBaseline8Bit, RLELossless

        data, size = b"", (self.ds.Columns, self.ds.Rows)
        if self.syntax.is_encapsulated:
            file.seek(self.start)
            data = get_frame(file, index, number_of_frames=self.frames,
                             extended_offsets=self.options.get("extended_offsets"))
        marked = not self.syntax.is_encapsulated or self.syntax == RLELossless
        if (index + 1) * self.frame_bytes > self.bytes or not (marked or b"\xff\xd9" in data.rstrip(b"\0")[-10:]):
            raise ValueError("the pixel data end before it does")  # without its end mark decoders fill in, silently
        if self.syntax == JPEGBaseline8Bit:
            frame = decode_jpeg(data, size, self.ds.PhotometricInterpretation)
        else:  # not by iter_pixels: in pydicom 3.0.2 it takes the second native YBR_FULL_422 frame for YBR_FULL
            file.seek(self.start)
            frame, _ = self.decoder.as_array(file, index=index, **self.options)
        return frame

    @functools.cached_property
    def _table(self):
        """What stored values, from self.low on, look like: uint8 (n,) grey, (n, 3) RGB; None: frames stay as they are.

        One table per file: its frames keep their relative brightness.
        """
        ds, stored = self.ds, np.arange(self.low, self.low + 2 ** self.ds.BitsAllocated)
        if ds.SamplesPerPixel == 3:
            return None
        if ds.PhotometricInterpretation == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut
            entries, start, _ = ds.RedPaletteColorLookupTableDescriptor
            # clipped here: pydicom's indices overflow beyond the last entry of an 8-bit palette
            rgb = apply_color_lut(stored.clip(start, start + (entries or 65536) - 1), ds)
            return (rgb >> 8 if rgb.max() > 255 else rgb).astype(np.uint8)
        (center,), (width,) = numbers(ds, "WindowCenter"), numbers(ds, "WindowWidth")
        (slope,), (intercept,) = numbers(ds, "RescaleSlope"), numbers(ds, "RescaleIntercept")
        function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
        windowed = math.isfinite(center) and 0 < width < math.inf and (width >= 1 or function != "LINEAR")
        values = stored.astype(float)
        if ds.get("ModalityLUTSequence"):
            values, _ = look_up(values, ds.ModalityLUTSequence[0], self.order)
        elif math.isfinite(slope * intercept) and slope != 0:
            values = values * slope + intercept
        if windowed:
            grey = window(values, center, width, function)
        elif ds.get("VOILUTSequence"):
            grey, most = look_up(values, ds.VOILUTSequence[0], self.order)
            grey = np.clip(grey / most, 0, 1)
        elif ds.BitsAllocated == 8 and self.low == 0:
            grey = stored / 255
        else:
            grey = self._percentile_scale(values)
        grey = np.rint(255 * grey).astype(np.uint8)
        return 255 - grey if ds.PhotometricInterpretation == "MONOCHROME1" else grey

    def _percentile_scale(self, values, ends=(0.005, 0.995)):
        """Grey, 0 to 1, of the table's values (n,): from the 0.5 to the 99.5 percentile of the file's boxes."""
        counts = np.zeros(len(values), np.int64)
        with open(self.path, "rb") as file:
            for index in range(0, self.frames, -(-self.frames // SCALE_FRAMES)):
                try:
                    frame = self._decode(file, index)
                except Exception:
                    if index == 0:
                        raise
                    break  # pixels() raises it when it gets there
                x0, y0, x1, y1 = self.box
                counts += np.bincount(frame[y0:y1, x0:x1].ravel().astype(np.int64) - self.low, minlength=len(values))
        order = np.argsort(values, kind="stable")
        share = np.cumsum(counts[order]) / counts.sum()
        low, high = values[order][np.searchsorted(share, ends)]
        if low == high:  # a small bright spot on black
            low, high = values[counts > 0].min(), values[counts > 0].max()
        return np.clip((values - low) / max(high - low, 1e-9), 0, 1)
