"""Pack any pile of images, once, into the memory-mapped square grey canvases that pretraining reads.

    python pack.py /fus2m fus2m.pack
    python pack.py train_paths.csv train.pack --exclude '*_mask.png' --holdout test.csv
    python pack.py /clips clips.pack --group_regex '([^/]+)_frame[0-9]+' --holdout test.csv

SRC is a recursive folder, a text list or a CSV; the files of a pack are described at data.Pack. What cannot be read is
skipped, counted and listed in OUT/skipped.txt. --holdout keeps benchmark images out. An image is left out when

1. its grey pixels equal those of a holdout image: the same file under any name or link, or a lossless copy of it;
2. its group is held out. Where a `group` column or --group_regex names groups, a group is held out if the holdout names
   one alike, or if one of its images falls under rule 1. Where neither side names any, a source folder is held out if a
   holdout image lies in that very folder, unless the holdout's labels show that its folders are classes.

A line says where groups could not be compared, so that other images of a held-out patient may have stayed in.
"""

import argparse
import contextlib
import csv
import glob
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from data import PACK_VERSION, Pack, content_hash, list_images, load_grey, resize_square
from phantom import phantom_images

CHUNK = 8  # images a worker decodes per task: large enough to hide the round trip, small enough to bound memory
ROW = np.dtype([("image", "i8"), ("width", "i4"), ("height", "i4"), ("hash", "u8"), ("sum", "i8"), ("squares", "i8")])


def get_args(argv=None):
    parser = argparse.ArgumentParser(description="Pack images into square grey canvases.", allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="SRC", help="recursive folder, text list (a path per line) or CSV (image[,label][,group])")
    add("out", metavar="OUT", help="pack folder to write; must not exist")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out names that match, e.g. '*_mask.png'")
    add("--holdout", nargs="+", default=[], metavar="SRC", help="folders, lists, CSVs not to train on")
    add("--canvas", type=int, default=384, help="side of the stored square; smaller saves disk, blurs small crops")
    add("--group_regex", help="first (capture) in the name is the group: patient, examination or clip")
    add("--workers", type=int, help="decoding processes; default: all cores")
    args = parser.parse_args(argv)
    for flag in ("canvas", "workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag} is {getattr(args, flag)}, must be at least 1")
    return args


def recipe(source, exclude=(), holdout=(), canvas=384, group_regex=None):
    """What a pack was made from, as stored in pack.json: equal recipes make equal packs from unchanged files."""
    return {"source": os.path.realpath(source), "exclude": list(exclude),
            "holdout": [os.path.realpath(path) for path in holdout],
            "canvas": canvas, "group_regex": group_regex}


# ---------------------------------------------------------------- decoding, in worker processes

def measure(grey, canvas):
    """uint8 (h, w) -> square (canvas, canvas), width, height, hash, sum and sum of squares of the square's pixels."""
    square = resize_square(grey, canvas)
    flat = square.ravel().astype(np.int64)
    return square, grey.shape[1], grey.shape[0], int.from_bytes(content_hash(grey), "big"), flat.sum(), flat @ flat


def decode(path, canvas):
    """What measure() returns, or a string that says why the file cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, thousands of times
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return measure(load_grey(path), canvas)
    except UnidentifiedImageError:
        return "not an image, or cut off in its first bytes"
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        return getattr(error, "strerror", None) or str(error) or type(error).__name__


def decode_chunk(paths, canvas):
    return [decode(path, canvas) for path in paths]


def start_worker():
    """Ctrl-C is the parent's to handle; a parent that was killed must not leave its workers waiting for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def decode_all(paths, canvas, workers=None):
    """Yield decode() of every path, in order, with a bounded number in flight."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    chunks = [paths[start:start + CHUNK] for start in range(0, len(paths), CHUNK)]
    workers = min(workers or cores, len(chunks))
    if workers <= 1:
        for chunk in chunks:
            yield from decode_chunk(chunk, canvas)
        return
    # not fork: the caller may run threads (torch, CUDA), whose locks a forked child would inherit locked
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), start_worker)
    pending = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(decode_chunk, chunk, canvas))
            if len(pending) > 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool:
        raise ChildProcessError(f"a decoding process died (killed, perhaps out of memory); try again with fewer "
                                f"--workers than {workers}")
    except BaseException:  # Ctrl-C may strike before the pool has noted a worker that it started: it would wait on it
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- hold-out

class Holdout:
    """Group names, folders and image hashes that must stay out of a pack."""

    def __init__(self, sources, group_regex, workers):
        self.names, self.folders, paths = set(), set(), []
        for source in sources:
            try:
                images = list_images(source, labelled=source.lower().endswith(".csv"))  # labels tell class folders
            except ValueError:  # no label column
                images = list_images(source)
            paths += images.paths
            if images.grouped_by == "group column":
                self.names |= set(images.groups)
            elif group_regex:  # names are relative to the holdout here: one without a match still counts by its pixels
                matches = [re.search(group_regex, name) for name in images.names]
                self.names |= {match[1] for match in matches if match}
            elif images.labels is None or images.grouped_by == "parent folder":
                self.folders |= {os.path.realpath(folder) for folder in set(map(os.path.dirname, images.paths))}
        hashes = []
        with contextlib.closing(decode_all(paths, 1, workers)) as results:  # canvas 1: only the hash is wanted
            for path, result in zip(paths, results):
                if isinstance(result, str):
                    raise ValueError(f"--holdout: cannot read {path} ({result}), so its copies cannot be kept out; "
                                     f"mend or remove it (paths in a list are relative to the list's folder)")
                hashes.append(result[3])
        self.hashes = np.unique(np.array(hashes, np.uint64))

    def groups(self, images):
        """The source's groups that are held out by name or folder."""
        if images.grouped_by.startswith("image"):
            return set()
        held = set(images.groups) & self.names
        if images.grouped_by == "parent folder":
            folders = {group: os.path.dirname(path) for group, path in zip(images.groups, images.paths)}
            held |= {group for group, folder in folders.items() if os.path.realpath(folder) in self.folders}
        return held


# ---------------------------------------------------------------- writing

def check_out(out, images, canvas):
    """Raise unless `out` is free and its disk has room."""
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; delete it or choose another OUT")
    parent = os.path.dirname(os.path.abspath(out))
    os.makedirs(parent, exist_ok=True)
    need, free = images * (canvas * canvas + 100), shutil.disk_usage(parent).free  # 100: a line of the index
    if need > free:
        raise ValueError(f"{parent}: {images:,} canvases of {canvas}x{canvas} need {_size(need)}, {_size(free)} are "
                         f"free; free some or choose a smaller --canvas")


@contextlib.contextmanager
def new_folder(out, log):
    """A temporary folder beside `out` that becomes `out` if all goes well and vanishes if anything does not."""
    prefix = f"{out}.tmp-{socket.gethostname()}-"
    for old in glob.glob(glob.escape(prefix) + "*"):
        if not _alive(old[len(prefix):]):
            shutil.rmtree(old)
            log(f"removed {old}, left by a run that was killed")
    folder = prefix + str(os.getpid())
    os.mkdir(folder)
    try:
        yield folder
        os.rename(folder, out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _alive(pid):
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:  # another user's
        return True
    return int(pid) != os.getpid()  # our own number on a folder that we did not make: its owner is gone


def write_canvases(folder, decoded, indices):
    """Append what decode() yields to canvases.u8 -> rows (ROW, per readable image), {index: reason of the others}."""
    rows, reasons = np.zeros(len(indices), ROW), {}
    count = 0
    with contextlib.closing(decoded), open(os.path.join(folder, "canvases.u8"), "wb") as file:
        for index, result in tqdm(zip(indices, decoded), total=len(indices), unit=" images", disable=None):
            if isinstance(result, str):
                reasons[index] = result
                continue
            square, *numbers = result
            file.write(square)
            rows[count] = (index, *numbers)
            count += 1
    return rows[:count], reasons


def drop_rows(folder, rows, keep, canvas):
    """Close the gaps that dropped rows leave in canvases.u8, in place -> the kept rows."""
    path, kept = os.path.join(folder, "canvases.u8"), np.flatnonzero(keep)
    canvases = np.memmap(path, np.uint8, "r+", shape=(len(rows), canvas * canvas))
    for target, origin in enumerate(kept):
        if target != origin:
            canvases[target] = canvases[origin]
    canvases.flush()
    os.truncate(path, len(kept) * canvas * canvas)
    return rows[kept]


def write_index(folder, rows, names, groups, canvas, **info):
    """Write index.csv and pack.json; groups are numbered in order of appearance -> the number of groups."""
    numbers, digest = {}, hashlib.sha256(str(canvas).encode())
    with open(os.path.join(folder, "index.csv"), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "width", "height", "group", "hash"])
        for image, width, height, pixels_hash, _, _ in rows.tolist():
            row = [width, height, numbers.setdefault(groups[image], len(numbers)), f"{pixels_hash:016x}"]
            writer.writerow([names[image], *row])
            digest.update((",".join(map(str, row)) + "\n").encode())
    # Python integers are exact, so the moments depend neither on order nor on workers
    count = len(rows) * canvas * canvas
    total, squares = sum(rows["sum"].tolist()), sum(rows["squares"].tolist())
    std = (count * squares - total * total) ** 0.5 / count / 255
    info = {"version": PACK_VERSION, "images": len(rows), "canvas": canvas, "mean": total / count / 255, "std": std,
            "groups": len(numbers), "digest": digest.hexdigest(), **info}
    with open(os.path.join(folder, "pack.json"), "w") as file:
        json.dump(info, file, indent=1)
    return len(numbers)


def _write_skipped(folder, names, reasons):
    escape = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    with open(os.path.join(folder, "skipped.txt"), "w", encoding="utf-8", errors="surrogateescape") as file:
        for index in sorted(reasons):
            file.write(f"{names[index].translate(escape)}\t{reasons[index].translate(escape)}\n")


def _size(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


# ---------------------------------------------------------------- the two packs

def make_pack(source, out, exclude=(), holdout=(), canvas=384, group_regex=None, workers=None, log=print):
    """Write the pack `out` of all images of `source`; OSError or ValueError says in a sentence what went wrong."""
    out = os.path.normpath(out)
    images = list_images(source, exclude, group_regex)
    check_out(out, len(images.paths), canvas)
    held = Holdout(holdout, group_regex, workers)
    held_groups = held.groups(images)
    todo = [index for index, group in enumerate(images.groups) if group not in held_groups]
    with new_folder(out, log) as folder:
        decoded = decode_all([images.paths[index] for index in todo], canvas, workers)
        rows, reasons = write_canvases(folder, decoded, todo)
        unreadable = len(reasons)
        if todo and unreadable == len(todo):
            first = min(reasons)
            raise ValueError(f"{source}: none of {unreadable:,} images can be read; first: {images.names[first]}: "
                             f"{reasons[first]}")

        identical = np.isin(rows["hash"], held.hashes)
        named = images.grouped_by != "parent folder" and not images.grouped_by.startswith("image")
        if named:  # a blank frame is identical to blank frames of other patients: it goes, its group stays
            blank = rows["sum"] ** 2 == rows["squares"] * canvas ** 2
            held_groups |= {images.groups[index] for index in rows["image"][identical & ~blank]}
        reasons.update((index, "held out (identical image)") for index in rows["image"][identical].tolist())
        for index, group in enumerate(images.groups):
            if group in held_groups:
                reasons.setdefault(index, f"held out (group {group})")
        keep = np.array([index not in reasons for index in rows["image"].tolist()], bool)
        if not keep.any():
            raise ValueError(f"{source}: all {len(images.paths) - unreadable:,} images are held out; see --holdout")
        rows = drop_rows(folder, rows, keep, canvas)

        by_pixels = int(identical.sum())
        by_group = len(reasons) - unreadable - by_pixels
        groups = write_index(folder, rows, images.names, images.groups, canvas, grouped_by=images.grouped_by,
                             skipped=unreadable, held_out_by_group=by_group, held_out_identical=by_pixels,
                             recipe=recipe(source, exclude, holdout, canvas, group_regex))
        _write_skipped(folder, images.names, reasons)

    log(f"{len(rows):,} images, {groups:,} groups by {images.grouped_by} -> {out} ({_size(len(rows) * canvas ** 2)})")
    if holdout:
        log(f"held out: {by_group:,} images of {len(held_groups):,} groups, {by_pixels:,} identical images")
        if by_group and images.grouped_by == "parent folder":
            log("  whole folders are held out; if a folder is not one patient or clip, name groups by --group_regex")
        elif not named and (by_pixels or held.names):
            log(f"  WARNING: the source's groups go by {images.grouped_by}: other images of held-out patients or clips "
                f"may remain in; name groups by --group_regex or a group column")
    if unreadable:
        log(f"skipped: {unreadable:,} unreadable images")
    if reasons:
        log(f"  listed in {os.path.join(out, 'skipped.txt')}")
    if 2 * unreadable > len(images.paths):
        log(f"WARNING: {unreadable:,} of {len(images.paths):,} images cannot be read: is {source} what you meant?")


def pack_phantoms(out, images=12000, canvas=64, seed=0, log=print):
    """Write a pack of drawn images, phantom.py's, instead of real ones."""
    out = os.path.normpath(out)
    check_out(out, images, canvas)
    pixels, _, groups = phantom_images(images, canvas, seed)
    with new_folder(out, log) as folder:
        rows, _ = write_canvases(folder, (measure(grey, canvas) for grey in pixels), range(images))
        names = [f"phantom_{index:06d}" for index in range(images)]
        count = write_index(folder, rows, names, groups.tolist(), canvas, grouped_by="phantom patient", skipped=0,
                            held_out_by_group=0, held_out_identical=0,
                            recipe={"phantoms": images, "canvas": canvas, "seed": seed})
        _write_skipped(folder, names, {})
    log(f"{images:,} phantom images, {count:,} groups by phantom patient -> {out} ({_size(images * canvas ** 2)})")


def open_pack(source, folder, is_first, **how):
    """What pretraining reads: `source` if it is a pack, else the pack `folder`, made from `source` if not there yet.

    Only the first process of a machine makes it; the others wait for the folder, which appears when it is complete.
    """
    if os.path.exists(os.path.join(source, "pack.json")):
        if how["exclude"] or how["holdout"] or how["group_regex"]:
            raise ValueError(f"{source} is a pack already: give --exclude, --holdout and --group_regex to pack.py")
        return Pack(source)
    if is_first:
        if os.path.exists(folder):
            print(f"using {folder}, packed earlier (delete it to pack {source} again)", flush=True)
        else:
            print(f"packing {source} once, into {folder}", flush=True)
            make_pack(source, folder, **how)
    data = _wait_for(folder)
    if data.info["recipe"] != recipe(source, **how):
        raise ValueError(f"{folder} was packed with other arguments ({data.info['recipe']}): delete it to pack again, "
                         f"or choose another --output_dir")
    return data


def open_phantoms(folder, images, canvas, seed, is_first):
    """The pack `folder` of phantom images, drawn if not there yet."""
    if is_first and not os.path.exists(folder):
        pack_phantoms(folder, images, canvas, seed)
    data = _wait_for(folder)
    if data.info["recipe"] != {"phantoms": images, "canvas": canvas, "seed": seed}:
        raise ValueError(f"{folder} holds other images ({data.info['recipe']}): delete it, or choose another --output_dir")
    return data


def _wait_for(folder):
    while not os.path.exists(folder):
        time.sleep(0.5)
    return Pack(folder)


def main(args):
    def terminate(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)  # both leave no half pack
    try:
        make_pack(**vars(args))
    except (OSError, ValueError) as error:
        sys.exit(f"pack.py: {error}")
    except KeyboardInterrupt:
        sys.exit("pack.py: interrupted, nothing written")


if __name__ == "__main__":
    main(get_args())
