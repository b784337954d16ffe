"""Image files in, grey frames out: reading one file of any kind, and reading many on all cores."""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import stat
import sys
import threading
import warnings
from collections import deque, namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from frames import dicom
from frames.dicom import MAX_PIXELS, SCALE_FRAMES
from frames.fan import apply_fan, find_fan
from frames.leakage import WORDS, content_hash, perceptual_hash, salted

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff")
MAX_FRAMES = 5_000  # of a file: minutes; opening a longer one anew for each chunk would take hours
COLOUR_SPREAD, COLOUR_SHARE = 24, 0.01  # in colour: over 1 % of the pixels have channels further apart than 24
CLIPS = ("GIF", "TIFF")  # Pillow's formats whose frames are read; a phone's JPEG holds its own thumbnail
DEEP = ("I", "F")  # its modes of 16-bit, 32-bit and float grey begin so
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF")  # Pillow's others would run PostScript, for one
ORIENTATION, TILE = 0x0112, (0x0142, 0x0143)  # tags of EXIF and TIFF
CHUNK = 8  # files a worker decodes per task: large enough to hide the round trip ...
FRAMES = 128  # ... but it comes back after so many frames: long clips must not pile up in memory
FAN_FRAMES = 16  # the first frames of a clip that show where its fan is


# ---------------------------------------------------------------- one file

# grey uint8 (h, w); whole: all that the screen showed, which DICOM's tissue region is a part of; colour: whether it was
# in colour (Doppler, 3-D renders); mm: (x, y) millimetres per pixel, 0 where unknown; patient, study: DICOM's, or empty
Frame = namedtuple("Frame", "grey whole colour mm patient study", defaults=(False, (0, 0), "", ""))


def read_frames(path, first=0):
    """Yield the frames of an image file from number `first` on; OSError, ValueError or another error of Pillow's tells
    why it, or its next frame, cannot be read.

    Deep pixels become 8 bits by one scale per file, never per frame: brightness must not flicker along a clip.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a named pipe would wait for ever
        raise ValueError("not a regular file")
    if is_dicom_file(path):
        file = dicom.open_dicom(path)
        x0, y0, x1, y1 = file.box
        for number, pixels in enumerate(file.pixels(first), first):  # uint8 (h, w) or (h, w, 3)
            _check_number(number)
            whole, colour = _grey_and_colour(Image.fromarray(pixels))
            grey = whole[y0:y1, x0:x1]
            if grey.shape != whole.shape:  # what is in colour beside the region does not count
                _, colour = _grey_and_colour(Image.fromarray(np.ascontiguousarray(pixels[y0:y1, x0:x1])))
            yield Frame(grey, whole, colour, file.mm or (0, 0), file.patient, file.study)
        return
    # not by its path: an uncompressed TIFF that lies on its side would be mapped into memory and come out scrambled
    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        scale = None
        for number in itertools.count(first) if image.format in CLIPS else [0][first:]:
            try:
                frame = _upright(_seek(image, number))
            except EOFError:
                return
            _check_number(number)
            if frame.mode.startswith(DEEP):
                scale = _percentiles(path, number) if scale is None else scale
                grey, colour = _scaled(frame, *scale), False
            else:
                grey, colour = _grey_and_colour(frame)
            yield Frame(grey, grey, colour)


def count_frames(path):
    """Frames of a file by its header, at most MAX_FRAMES or its bytes, for headers lie; 1 where it cannot be read."""
    frames = 1
    with warnings.catch_warnings(), contextlib.suppress(Exception):  # told when the file is read in earnest
        warnings.simplefilter("ignore")
        if not stat.S_ISREG(os.stat(path).st_mode):
            return 1
        if is_dicom_file(path):
            frames = dicom.open_dicom(path).frames
        else:
            with Image.open(path, formats=FORMATS) as image:
                frames = image.n_frames if image.format in CLIPS else 1
    return min(frames, MAX_FRAMES, os.path.getsize(path) if os.path.isfile(path) else 1)


def is_dicom_file(path):
    suffix = os.path.splitext(path)[1].lower()
    return suffix in dicom.SUFFIXES or suffix not in IMAGE_SUFFIXES and os.path.isfile(path) and dicom.is_dicom(path)


def _check_number(number):
    if number == MAX_FRAMES:
        raise ValueError(f"a file of more than {MAX_FRAMES:,} frames")


def _seek(image, number):
    image.seek(number)
    width, height = image.size
    if image.format == "TIFF":  # a small image can be of huge tiles
        width, height = max(width, image.tag_v2.get(TILE[0], 0)), max(height, image.tag_v2.get(TILE[1], 0))
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, over {MAX_PIXELS:,}: no ultrasound frame")
    return image


def _upright(image):
    image.load()  # now: getexif() loads a PNG, and its errors must not pass for those of a tag
    try:
        turned = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged tag of a camera is no reason to lose the image
        turned = 1
    return ImageOps.exif_transpose(image) if turned != 1 and image.format != "TIFF" else image  # TIFF turns itself


def _grey_and_colour(image):
    """Pillow image of 8-bit channels -> uint8 grey (h, w), whether it is a colour image."""
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:  # shown on black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L")), False
    image = image if image.mode == "RGB" else image.convert("RGB")
    red, green, blue = image.split()
    highest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    lowest = ImageChops.darker(ImageChops.darker(red, green), blue)
    spread = ImageChops.difference(highest, lowest).histogram()  # (256,) pixels by distance of their channels
    colour = sum(spread[COLOUR_SPREAD + 1:]) > COLOUR_SHARE * sum(spread)
    return np.asarray(image.convert("L")), colour


def _percentiles(path, number):
    """0.5 and 99.5 % of the deep grey levels of a whole file: of SCALE_FRAMES frames, evenly spread, or else of frame
    `number`; of a single frame exactly, of many from MAX_PIXELS pixels."""
    frames, values = count_frames(path), []
    spread = range(0, frames, -(-frames // SCALE_FRAMES))
    with Image.open(path, formats=FORMATS) as image:
        with contextlib.suppress(Exception):  # told when this frame is read in earnest
            for sampled in spread:
                if _seek(image, sampled).mode.startswith(DEEP):
                    pixels = _finite(image).ravel()
                    step = 1 + pixels.size * len(spread) // MAX_PIXELS if frames > 1 else 1
                    values.append(pixels[::step].copy())  # a view would keep the whole frame
        values = values or [_finite(_seek(image, number)).ravel()]
    return np.percentile(np.concatenate(values), (0.5, 99.5))


def _scaled(image, low, high):
    return (np.clip((_finite(image) - low) / max(high - low, 1e-9), 0, 1) * 255 + 0.5).astype(np.uint8)


def _finite(image):
    pixels = np.asarray(image, dtype=np.float32)
    if not np.isfinite(pixels).all():
        raise ValueError("image has non-finite pixels")
    return pixels


def load_frame(path):
    """The one Frame of a file, for labelled sets; raises as read_frames does."""
    frames = list(itertools.islice(read_frames(path), 2))
    if len(frames) != 1:
        raise ValueError("holds several frames, a label needs a file of its own" if frames else "holds no frame")
    return frames[0]


def read_image(path):
    """load_frame, whose errors become a sentence with the file's name."""
    try:
        return load_frame(path)
    except Exception as error:  # whatever a decoder raises: a labelled set must be whole
        raise ValueError(f"{path}: cannot be read ({error}); repair it, or leave it out with --exclude") from error


def resize_square(grey, size):
    """uint8 (h, w) -> uint8 (size, size), antialiased bicubic; squashes the aspect."""
    return np.asarray(Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------- many files, in worker processes

# image: number of the frame's file; width, height: of what was squashed to the canvas; hash, looks: leakage.py's;
# patient, study: DICOM's, salted, 0 where there are none; mm: per pixel, x and y; sum, squares: of the canvas's levels
ROW = np.dtype([("image", "i8"), ("frame", "i4"), ("width", "i4"), ("height", "i4"), ("hash", "u8"),
                ("looks", "u8", WORDS), ("patient", "u8"), ("study", "u8"), ("colour", "i1"), ("mm", "f4", 2),
                ("sum", "i8"), ("squares", "i8")])


def measure(frame, canvas, fan, salt):
    """A Frame -> its ROW but for file and frame number, and its square canvas uint8 (canvas, canvas).

    The hashes are of all that the screen showed, so that it is found again where nobody trimmed it.
    """
    grey, row = frame.grey, np.zeros((), ROW)
    row["hash"], row["looks"] = content_hash(frame.whole), perceptual_hash(frame.whole)
    row["colour"], row["mm"] = frame.colour, frame.mm
    for name in ("patient", "study"):
        row[name] = salted(getattr(frame, name), salt) if getattr(frame, name) else 0
    if fan is not None:
        grey, _ = apply_fan(grey, fan if fan.shape == grey.shape else find_fan(grey))
    row["height"], row["width"] = grey.shape
    square = resize_square(grey, canvas)
    levels, counts = np.arange(256), np.array(Image.fromarray(square).histogram())
    row["sum"], row["squares"] = levels @ counts, levels ** 2 @ counts
    return row, square


def frames_and_fan(path, first, crop_fan):
    """The frames of a file from number `first` on, and where the fan is in all of them (None: not asked for)."""
    frames = read_frames(path, first)
    if not crop_fan:
        return frames, None
    head, failure, start = [], None, read_frames(path) if first else frames
    try:
        head.extend(itertools.islice(start, FAN_FRAMES))
    except Exception as error:
        failure = error

    def again():
        yield from head
        if failure is not None:
            raise failure
        yield from start

    highest = head[0].grey if head else None
    for frame in head[1:]:  # the border of a clip stands still: one fan for all, that of its brightest pixels
        highest = np.maximum(highest, frame.grey) if frame.grey.shape == highest.shape else highest
    return frames if first else again(), find_fan(highest) if head else None


def decode_chunk(paths, first, canvas, crop_fan, salt):
    """Decode files, the first one from its frame `first`, until FRAMES frames are read.

    Returns rows (n,) ROW, `image` counting from 0, canvases uint8 (n, canvas, canvas), a list of (file, frame, reason)
    of what cannot be read, and the (file, frame) to go on from, or None.
    """
    rows, squares, failed = [], [], []
    for number, path in enumerate(paths):
        done = 0 if number else first
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata, thousands of times
                frames, fan = frames_and_fan(path, done, crop_fan)
                for frame in frames:
                    if len(rows) == FRAMES:
                        return np.array(rows, ROW), np.stack(squares), failed, (number, done)
                    row, square = measure(frame, canvas, fan, salt)
                    row["image"], row["frame"] = number, done
                    rows.append(row)
                    squares.append(square)
                    done += 1
            if not done:
                failed.append((number, 0, "holds no frame"))
        except UnidentifiedImageError:
            failed.append((number, done, "not an image, or cut off in its first bytes"))
        except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
            failed.append((number, done, getattr(error, "strerror", None) or str(error) or type(error).__name__))
    squares = np.stack(squares) if squares else np.zeros((0, canvas, canvas), np.uint8)
    return np.array(rows, ROW), squares, failed, None


def start_worker():
    """Ctrl-C is the parent's to handle; a parent that was killed must not leave its workers waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders in C print there what is wrong with a file, but not which
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


@contextlib.contextmanager
def without_script():
    """While processes are started: they would import the script that runs, and torch with it, for nothing."""
    script = vars(sys.modules["__main__"])
    hidden = {name: script.pop(name) for name in ("__file__", "__spec__") if name in script}
    script["__spec__"] = None
    try:
        yield
    finally:
        script.update(hidden)


def decode_all(paths, canvas, crop_fan, salt, workers=None):
    """Yield (files ended so far, *decode_chunk's first three) over all paths, in order; files are numbers in `paths`.

    `workers` processes, all cores by default, with a bounded number of frames in flight.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    starts = range(0, len(paths), CHUNK)
    workers = min(workers or cores, len(starts))
    # not fork: the caller may run threads (torch, CUDA), whose locks a forked child would inherit locked
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), start_worker) if workers > 1 else None
    todo, pending, ours = ((start, min(start + CHUNK, len(paths)), 0) for start in starts), deque(), set()

    def submit(start, end, frame):
        work = functools.partial(decode_chunk, paths[start:end], frame, canvas, crop_fan, salt)
        if not pool:
            return start, end, work
        with without_script():  # the first call starts processes, in Python 3.10 later ones too
            future = pool.submit(work)
        ours.update(set(multiprocessing.active_children()) - others)  # at once: a dead one is not among them any more
        return start, end, functools.partial(wait, future)

    def wait(future):
        """A future's result. The pool does not notice a worker that dies while it sends one: we look for ourselves."""
        while True:
            try:
                return future.result(timeout=1)
            except concurrent.futures.TimeoutError:
                if not all(worker.is_alive() for worker in ours):
                    raise BrokenProcessPool

    try:
        while True:
            pending.extend(submit(*task) for task in itertools.islice(todo, 1 + 3 * workers - len(pending)))
            if not pending:
                return
            start, end, result = pending[0]
            rows, canvases, failed, resume = result()
            pending.popleft()
            if resume:  # the rest of a long clip comes next
                pending.appendleft(submit(start + resume[0], end, resume[1]))
                end = start + resume[0]
            rows["image"] += start
            yield end, rows, canvases, [(start + number, frame, reason) for number, frame, reason in failed]
    except BaseException as error:
        # Ctrl-C may strike before the pool has noted a worker that it started: it would wait on it
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        if pool:  # it would wait for ever for the rest of what a killed worker was just sending: now it meets an end
            pool._result_queue._writer.close()
        if isinstance(error, BrokenProcessPool):
            raise ChildProcessError(
                f"a decoding process died: out of memory (fewer --workers than {workers} need less), or a decoder "
                f"crashed (--exclude the file, one of {paths[pending[0][0]]} to {paths[pending[-1][1] - 1]})")
        raise
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
