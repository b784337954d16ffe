"""One file of a segmentation set in: a mask of any kind as codes, what codes mean, an image of any kind, MetaImage too.

A pixel's code is its grey level or palette index, or, where its channels differ, COLOUR and 0xrrggbb.
"""

import math
import os
import pickle
import re
import zlib

import numpy as np
from PIL import Image, ImageOps

from frames import dicom
from frames.images import FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, Frame, is_dicom_file, read_image
from frames.shapes import fit_ellipse

META_SUFFIXES = (".mha", ".mhd")
META_TYPES = {"MET_UCHAR": "u1", "MET_CHAR": "i1", "MET_USHORT": "u2", "MET_SHORT": "i2", "MET_UINT": "u4",
              "MET_INT": "i4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8"}
META_LINES, META_LINE = 100, 10_000  # of a header, and bytes of a line
COLOUR = 1 << 24
# FASS in UltraDINO's numbers. Where structures overlap, the later in this order wins: vessels lie in or before organs
FASS_NUMBERS = {"liver": 2, "stomach": 3, "vein": 4, "artery": 1}
MAX_VALUES = 32  # of masks whose classes are not named: more are no class numbers
OUTLINE_PIXELS = 3  # that a pixel of a head's outline may lie off the ellipse through all of them ...
REFINEMENTS = 20  # ... which is fitted directly, then by at most so many steps
# all that a pickle of arrays needs to call; numpy 1 and 2 name it differently
HARMLESS = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
            **{(f"numpy.{core}.multiarray", name): made.__reduce__()[0] for core in ("core", "_core")
               for name, made in (("_reconstruct", np.zeros(1)), ("scalar", np.float64(0)))}}


# ---------------------------------------------------------------- codes

def value_of(code):
    return tuple((code - COLOUR).to_bytes(3, "big")) if code >= COLOUR else code


def code_of(value):
    """Of a pixel value or (r, g, b): a colour of three equal channels is that grey level."""
    if isinstance(value, tuple):
        return value[0] if len({*value}) == 1 else COLOUR | int.from_bytes(bytes(value), "big")
    return value


def text_of(code):
    return f"#{code - COLOUR:06x}" if code >= COLOUR else str(code)


def mask_name(name):
    """What the mask of image `name` is called below a folder of masks: as the image, but .png. If that leads out of the
    folder, where the image itself may lie, / becomes _."""
    stem, suffix = os.path.splitext(name)
    known = suffix.lower() in IMAGE_SUFFIXES + dicom.SUFFIXES + META_SUFFIXES  # a DICOM file's name is full of dots
    name = (stem if known else name) + ".png"
    return name.replace("/", "_") if name.startswith("/") or ".." in name.split("/") else name


def pixels_text(mask):
    return f"{mask.shape[1]} x {mask.shape[0]}"


def read_codes(path, colours=False, outline=False):
    """A mask's codes (h, w), and those there are, a sorted list. colours: a palette's colours count, not its indices;
    outline: the ellipse through the mask's pixels is filled."""
    codes = told(_decode, path, colours)
    if outline:
        codes = told(lambda _: fill_outline(codes), path)
    there = np.flatnonzero(np.bincount(codes.ravel())) if codes.dtype == np.uint8 else np.unique(codes)
    return codes, there.tolist()


def told(read, path, *more):
    """read(path, ...), whose errors become a sentence with the file's name."""
    try:
        if not os.path.isfile(path):  # opening a named pipe would wait for ever
            raise ValueError("not a regular file")
        return read(path, *more)
    except Exception as error:  # whatever a decoder raises
        raise ValueError(f"{path}: cannot be read ({error}); repair it, or leave it out with --exclude") from error


def _decode(path, colours):
    if path.lower().endswith(".npy"):
        return read_structures(path)
    if path.lower().endswith(META_SUFFIXES):
        return _pack(read_meta_image(path)[0])
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        _check_size(*image.size)
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError("holds several frames")
        if image.format != "TIFF":  # which turns itself
            image = ImageOps.exif_transpose(image)
        mode = image.mode
        if mode in ("RGBA", "LA", "PA", "P" if colours else "PA"):  # what nobody sees is background
            rgba = np.asarray(image.convert("RGBA"))
            return _pack(rgba[..., :3] * (rgba[..., 3:] > 0))
        if mode not in ("1", "L", "P", "RGB") and mode[0] not in "IF":
            raise ValueError(f"{mode} pixels are no mask's")
        return _pack(np.asarray(image))


def _pack(pixels):
    """Levels (h, w), or colours (h, w, 3) uint8 -> codes, uint8 where they fit."""
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]
    if pixels.ndim == 3:
        if pixels.dtype != np.uint8:
            raise ValueError("colours of more than 8 bits are no mask's")
        red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
        return np.where((red == green) & (green == blue), red, COLOUR | red << 16 | green << 8 | blue)
    if pixels.dtype == bool:
        return pixels.astype(np.uint8)
    if pixels.dtype.kind == "f" and not (pixels == np.rint(pixels)).all():
        raise ValueError("holds fractions, which are no class numbers")
    if pixels.dtype != np.uint8:
        if not 0 <= pixels.min() <= pixels.max() < COLOUR:
            raise ValueError(f"holds values from {pixels.min()} to {pixels.max()}, which are no class numbers")
        pixels = pixels.astype(np.int32 if pixels.max() > 255 else np.uint8)
    return pixels


def _check_size(width, height):
    if min(width, height) < 1 or width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, expected 1 to {MAX_PIXELS:,}")


# ---------------------------------------------------------------- classes

def parse_classes(words):
    """Words NAME=VALUE[,VALUE...], a value being a number or #rrggbb; or plain names, of the values 1, 2, ... in order
    -> K names, "background" first, and {pixel value or (r, g, b): class number}. Background is 0, unless named."""
    parts = [word.partition("=") for word in words]
    plain = [name for name, sign, _ in parts if not sign and name != "background"]
    named = [(name, text) for name, sign, text in parts if sign]
    if plain and any(name != "background" for name, _ in named):
        raise ValueError(f"--classes {' '.join(words)}: give all classes values as NAME=VALUE, or none of them")
    names, values = ["background"], {}
    for name, text in named + [(name, str(k)) for k, name in enumerate(plain, 1)]:
        if not name or name in names[1:] or name == "background" and 0 in values.values():
            raise ValueError(f"--classes {' '.join(words)}: {name!r} is named twice, or empty")
        if name != "background":
            names.append(name)
        number = names.index(name)
        for value in text.split(","):
            if not re.fullmatch(r"\d+|#[0-9a-fA-F]{6}", value):
                raise ValueError(f"--classes {name}={text}: {value!r} is neither a number nor a colour #rrggbb")
            value = tuple(bytes.fromhex(value[1:])) if value[0] == "#" else int(value)
            if code_of(value) in map(code_of, values):
                raise ValueError(f"--classes {' '.join(words)}: two classes of value {text}")
            values[value] = number
    if 0 not in values.values():
        if 0 in map(code_of, values):
            raise ValueError(f"--classes {' '.join(words)}: 0 is the background, unless background=VALUE names another")
        values[0] = 0
    if not 2 <= len(names) <= 256:
        raise ValueError(f"--classes {' '.join(words)}: {len(names) - 1} classes; 1 to 255 are possible")
    return names, values


def choose_classes(words, files, levels):
    """parse_classes(words); without words, or with one plain name, by the codes that masks hold: levels of each image's
    files, sets. One value beside 0 is one class; so is 1 in some masks and 255 in others, both of which mean true."""
    own = [(path, found) for paths, of_image in zip(files, levels) for path, found in zip(paths, of_image)]
    every = set().union(*(found for _, found in own))
    marks = every - {0}
    single = len(marks) == 1 or marks == {1, 255} and not any(marks <= found for _, found in own)
    alone = len(words or ()) == 1 and "=" not in words[0]
    if words and not (alone and single):
        return parse_classes(words)
    if not marks:
        raise ValueError(f"{own[0][0]} and all other masks hold nothing but 0: there is nothing to outline")
    if len(every) > MAX_VALUES:
        path, most = max(own, key=lambda pair: len(pair[1]))
        raise ValueError(f"{path}: holds {len(most)} different values, and all masks {len(every)}; were they saved as "
                         f"JPEG, or smoothed? Save class numbers as PNG, or name values by --classes")
    names = [words[0] if words else "foreground"] * len(marks) if single else [
        text_of(code) if code >= COLOUR else f"class {code}" for code in sorted(marks)]
    values = {0: 0, **{value_of(code): 1 if single else k for k, code in enumerate(sorted(marks), 1)}}
    return ["background", *dict.fromkeys(names)], values


def class_numbers(path, levels, values):
    """Codes -> class numbers, lists; ValueError for one that is in no class."""
    known = {code_of(value): number for value, number in values.items()}
    for level in levels:
        if level not in known:
            value = text_of(level)
            raise ValueError(f"{path}: holds the value {value}, which is in no class; name it by --classes, as "
                             f"NAME={value} or background=0,{value}")
    return [known[level] for level in levels]


# ---------------------------------------------------------------- FASS's structures, HC18's outlines

class ArrayUnpickler(pickle.Unpickler):
    """Unpickles dicts of arrays; a pickle that would call anything else is refused before it does."""

    def find_class(self, module, name):
        if (module, name) not in HARMLESS:
            raise ValueError(f"its pickle asks for {module}.{name}, and may only hold arrays: it could run code")
        return HARMLESS[module, name]


def read_structures(path):
    """A FASS file, a pickled dict with `structures` {name: array (h, w), not 0 inside} -> codes of FASS_NUMBERS."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        found = ArrayUnpickler(file).load() if shape == () and dtype.hasobject else None
    found = found.item() if isinstance(found, np.ndarray) and found.shape == () else None
    structures = found.get("structures") if isinstance(found, dict) else None
    if not isinstance(structures, dict) or not structures:
        raise ValueError("holds no dict with `structures`, as FASS's files do")
    unknown = [name for name in structures if name not in FASS_NUMBERS]
    if unknown:
        raise ValueError(f"structure {unknown[0]!r} is none of {', '.join(FASS_NUMBERS)}")
    masks = {name: np.asarray(structure) for name, structure in structures.items()}
    shapes = {mask.shape for mask in masks.values()}
    if len(shapes) > 1 or len(*shapes) != 2:
        raise ValueError(f"structures of the shapes {sorted(shapes)}, expected one (h, w)")
    codes = np.zeros(*shapes, np.uint8)
    for name, number in FASS_NUMBERS.items():
        if name in masks:
            codes[masks[name] != 0] = number
    return codes


def fill_outline(outline):
    """The outline of a head (h, w), not 0 on it -> uint8 (h, w), 255 within the ellipse along the middle of its line:
    with the whole line, which is some pixels wide, every circumference would be too large."""
    y, x = np.nonzero(outline)
    if not len(x):
        raise ValueError("holds no outline")
    ellipse = np.array(fit_ellipse(np.stack([x, y], 1).astype(np.float64)))
    distances = off_ellipse(ellipse, x, y)
    for _ in range(REFINEMENTS):  # Gauss-Newton: of a line that the image's border cuts, a direct fit is too small
        slopes = np.stack([off_ellipse(ellipse + step, x, y) - distances for step in 1e-4 * np.eye(5)], 1) / 1e-4
        better = ellipse - np.linalg.lstsq(slopes, distances)[0]
        off = off_ellipse(better, x, y)
        if min(better[2:4]) <= 0 or not off @ off < 0.9999 * (distances @ distances):
            break
        ellipse, distances = better, off
    if np.abs(distances).max() > OUTLINE_PIXELS:
        raise ValueError(f"its pixels lie up to {min(np.abs(distances).max(), 9999):.1f} pixels off any ellipse: no "
                         f"outline of a head")
    inside = off_ellipse(ellipse, *np.meshgrid(np.arange(outline.shape[1]), np.arange(outline.shape[0]))) <= 0
    return np.where(inside, np.uint8(255), np.uint8(0))


def off_ellipse(ellipse, x, y):
    """How far points lie outside an ellipse (x, y, a, b, angle), to first order (Sampson): f / |grad f| of
    f = (u / a)^2 + (v / b)^2 - 1, u and v along its axes."""
    center_x, center_y, a, b, angle = ellipse
    x, y = x - center_x, y - center_y
    u, v = (x * math.cos(angle) + y * math.sin(angle)) / a, (y * math.cos(angle) - x * math.sin(angle)) / b
    return (u ** 2 + v ** 2 - 1) / np.maximum(2 * np.hypot(u / a, v / b), 1e-9)


# ---------------------------------------------------------------- images

def size_and_mm(path):
    """(width, height) of all that an image file shows, (x, y) mm of a pixel, nan where unknown; by its header."""
    unknown = (math.nan, math.nan)
    if path.lower().endswith(META_SUFFIXES):
        pixels, mm = read_meta_image(path)
        return pixels.shape[1::-1], mm
    if is_dicom_file(path):
        file = dicom.open_dicom(path)
        return (file.ds.Columns, file.ds.Rows), file.mm or unknown
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        turned = image.format != "TIFF" and image.getexif().get(0x0112, 1) >= 5
        return image.size[::-1] if turned else image.size, unknown


def read_whole(path):
    """The images.Frame of an image file. Of DICOM all that the screen shows, not its tissue region: so are masks."""
    if not path.lower().endswith(META_SUFFIXES):
        frame = read_image(path)
        return frame._replace(grey=frame.whole)
    pixels, mm = told(read_meta_image, path)
    if pixels.dtype != np.uint8:
        low, high = np.percentile(pixels, (0.5, 99.5))
        pixels = (np.clip((pixels - low) / max(high - low, 1e-9), 0, 1) * 255 + 0.5).astype(np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    return Frame(grey, grey, mm=(0, 0) if np.isnan(mm).any() else mm)


def read_meta_image(path):
    """A MetaImage -> pixels (h, w) or (h, w, 3), (x, y) mm of a pixel, nan where unknown.

    A spacing of exactly 1 by 1 is what programs write that know none, and counts as unknown.
    """
    header = {}
    with open(path, "rb") as file:
        for _ in range(META_LINES):
            key, sign, value = file.readline(META_LINE).decode("latin-1").partition("=")
            if not sign:
                break
            header[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                break
        data = file.read() if header.get("ElementDataFile") == "LOCAL" else None
    missing = [key for key in ("DimSize", "ElementType", "ElementDataFile") if key not in header]
    if missing:
        raise ValueError(f"its MetaImage header has no {missing[0]}")

    def numbers(key, kind, default=""):
        try:
            return [kind(word) for word in header.get(key, default).split()]
        except ValueError:
            raise ValueError(f"its {key} is {header[key]!r}") from None

    sides, spacing, kind = numbers("DimSize", int), numbers("ElementSpacing", float), header["ElementType"]
    channels = sum(numbers("ElementNumberOfChannels", int, "1"))
    if kind not in META_TYPES or header.get("BinaryData", "True") != "True" or header.get("HeaderSize", "0") != "0":
        raise ValueError(f"{kind} pixels, text or a HeaderSize are not read")
    across, planar = 0, False
    if len(sides) == 3 and channels == 1 and sides[2] != 1 and 3 in (sides[0], sides[2]):  # channels are a side
        planar, channels = sides[2] == 3, 3
        across = 0 if planar else 1
    elif len(sides) != 2 and sides[2:] != [1] or channels not in (1, 3):
        raise ValueError(f"{header['DimSize']} pixels of {channels} channels: expected one image of 1 or 3")
    width, height = sides[across:across + 2]
    shape = (3, height, width) if planar else (height, width, channels)
    _check_size(width, height)
    big = "true" in (header.get(key, "").lower() for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"))
    dtype = np.dtype(META_TYPES[kind]).newbyteorder(">" if big else "<")
    size = math.prod(shape) * dtype.itemsize
    if data is None:
        with open(os.path.join(os.path.dirname(path), os.path.basename(header["ElementDataFile"])), "rb") as file:
            data = file.read()
    if header.get("CompressedData", "False").lower() == "true":
        data = zlib.decompressobj().decompress(data, size + 1)
    if len(data) != size:
        raise ValueError(f"its pixels are {'more than ' * (len(data) > size)}{min(len(data), size)} bytes, its header "
                         f"says {size}")
    pixels = np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    if dtype.kind == "f" and not np.isfinite(pixels).all():
        raise ValueError("has pixels that are not finite")
    pixels = np.moveaxis(pixels, 0, 2) if planar else pixels
    mm = spacing[across:across + 2]
    known = len(mm) == 2 and all(0 < side < math.inf for side in mm) and mm != [1, 1]
    pixels = np.ascontiguousarray(pixels[..., 0] if channels == 1 else pixels)
    return pixels, tuple(mm) if known else (math.nan, math.nan)
