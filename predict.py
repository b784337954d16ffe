"""Apply finished runs to images: masks of any folder, or FMC_UIA's submission. The checkpoints say which.

A run of finetune_seg.py tells network, classes and image size; its masks are PNG files of class numbers, one with the
size and name of each image; a file of several frames has one for each, NAME_frame00000.png and so on. Masks that are
there are left: the same command goes on where it stopped. What cannot be read is listed in skipped.csv beside them.

Runs of finetune_multi.py predict every task of --data, each by the first run that has it, in the layout of FMC_UIA's
submission; nothing but images is read.

    python predict.py                                                       # seg/last-seed0.pt, on phantoms
    python predict.py --ckpt seg/last-seed0.pt --data FOLDER --output_dir masks
    python predict.py --ckpt multi/all-seed0.pt --data FMC_UIA_VAL --output_dir submission
"""

import argparse
import collections
import concurrent.futures
import contextlib
import csv
import hashlib
import itertools
import json
import os
import re
import time
import warnings

import numpy as np
import torch
from PIL import UnidentifiedImageError
from tqdm import tqdm

import runtime
from arguments import Parser
from frames import phantom
from frames.files import whole_file
from frames.images import Frame, count_frames, read_frames, read_image, resize_square
from frames.lists import list_images
from labelled.fmc_uia import read_tasks
from labelled.mask_codes import META_SUFFIXES, mask_name, read_whole
from networks.heads import open_network
from networks.weights import file_digest
from scores.challenge import (JSON_FILES, check_submission_folder, mask_places, records_of, write_submission_json,
                              write_submission_mask)
from scores.exchange import write_mask
from scores.report import count
from training import many_tasks, segmenter

PHANTOM_SEED, PHANTOM_IMAGES, PHANTOM_SIZE = 4_000_000, 60, 64  # none that finetune_seg.py trains on
DEFAULTS = "seg/last-seed0.pt", "seg/from_scratch-seed0.pt"
READERS, WRITERS = 8, 4  # threads: decoding and compressing leave Python's lock
PART, MOST_FILES = 8, 256  # frames that are read of a file before it is the next one's turn; files open at once


def get_args(argv=None):
    p = Parser(__doc__.split("\n")[0])
    add = p.add_argument_group("what").add_argument
    add("--ckpt", nargs="+", metavar="FILE", help="finished run of finetune_seg.py, or runs of finetune_multi.py; "
        "default: what finetune_seg.py leaves where it is given no --ckpt, " + " or ".join(DEFAULTS))
    add("--data", help="folder, list or file of images; of many tasks the folder with csv_files/; without it phantoms")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="masks: leave out names that match")
    add("--tasks", nargs="+", metavar="TASK", help="many tasks: only these")
    add("--skip_wrong_rows", action=argparse.BooleanOptionalAction, default=False,
        help="many tasks: leave out rows that are wrong, instead of stopping")
    add = p.add_argument_group("the run").add_argument
    add("--output_dir", help="a new folder, or the same command's of an earlier day; default: masks, or submission")
    add("--batch_size", type=int, default=32, help="images per forward pass")
    add("--dtype", choices=("bfloat16", "float32"), help="of matrix products; default: bfloat16 on a GPU")
    args, _ = p.parse(argv)
    p.check(args, dict(batch_size=1))
    if args.exclude and args.data is None:
        p.error("--exclude needs --data")
    return args


def look_at(paths):
    """{path: tasks, or None of a segmenter} of finished runs; ValueError for a file that is none, or for two kinds."""
    kinds = {}
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such file; a run of finetune_seg.py or finetune_multi.py leaves one, to be "
                             f"named by --ckpt")
        saved = runtime.load_checkpoint(path)
        if "decoder" not in saved and "network_of" not in saved:
            raise ValueError(f"{path}: no finished run of finetune_seg.py or finetune_multi.py: it has neither a "
                             f"decoder nor task heads")
        kinds[path] = None if "decoder" in saved else open_network(path, "cpu")[0].tasks  # told before the work
    if len(kinds) > 1 and None in kinds.values():
        raise ValueError(f"--ckpt {' '.join(kinds)}: masks are made by one run of finetune_seg.py; give it alone")
    return kinds


# ---------------------------------------------------------------- masks: names

def open_images(args):
    """(names of files, load(file, first) -> its Frames from number `first` on, [(folder, reason)] of closed ones)."""
    if args.data is None:
        canvases, _, _ = phantom.phantom_masks(PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED)
        return [f"phantom_{i:02d}" for i in range(PHANTOM_IMAGES)], lambda i, _: [Frame(canvases[i], canvases[i])], []
    found = list_images(args.data, args.exclude, more=META_SUFFIXES)
    check_names(found.names, found.paths)

    def load(i, first):
        path = found.paths[i]
        return [read_whole(path)][first:] if path.lower().endswith(META_SUFFIXES) else read_frames(path, first)

    return found.names, load, found.closed


def check_names(names, paths):
    """ValueError where two files would have one mask."""
    owners, advice = {}, "leave one of them out, by --exclude for example"
    for i, name in enumerate(names):
        other = owners.setdefault(mask_name(name), i)
        if other != i:
            raise ValueError(f"{names[other]} and {name} would have one mask, {mask_name(name)}: {advice}")
    for mask, i in owners.items():
        frame = re.fullmatch(r"(.+)_frame\d{5,}\.png", mask, re.S)
        clip = owners.get(f"{frame[1]}.png") if frame else None
        if clip is not None and count_frames(paths[clip]) > 1:
            raise ValueError(f"{names[i]} is called like a frame of {names[clip]}, which has several: {advice}")


def mask_path(folder, name, number):
    """number: of the frame, None for a file's only one."""
    path = os.path.join(folder, mask_name(name))
    return path if number is None else f"{path[:-len('.png')]}_frame{number:05d}.png"


def open_output(folder, data, identity):
    """Make the folder of masks, or enter one that was begun with an equal `identity`; ValueError for any other."""
    if data and os.path.join(os.path.realpath(folder), "").startswith(os.path.join(os.path.realpath(data), "")):
        raise ValueError(f"--output_dir {folder} is in --data {data}: its masks would be taken for images the next "
                         f"time; choose a folder elsewhere")
    path = os.path.join(folder, "segment.json")  # its name of old: folders of masks begun by segment.py go on
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            theirs = json.load(file)
        differ = [key for key in identity if identity[key] != theirs.get(key)]
        if differ:
            raise ValueError(f"--output_dir {folder}: its masks are of another {' and '.join(differ)}; choose another "
                             f"folder")
        return
    os.makedirs(folder, exist_ok=True)
    if any(not name.startswith(".") for name in os.listdir(folder)):
        raise ValueError(f"--output_dir {folder}: holds files that predict.py did not write; choose a new folder")
    with whole_file(path, "w", encoding="utf-8") as file:
        json.dump(identity, file, indent=1)


# ---------------------------------------------------------------- masks: images in, masks out

def unfinished(names, folder, count, bar):
    """Yield (file, first frame without a mask)."""
    for i, name in enumerate(names):
        if os.path.exists(mask_path(folder, name, None)):
            count["there"] += 1
            bar.update()
            continue
        first = next(number for number in itertools.count() if not os.path.exists(mask_path(folder, name, number)))
        count["there"] += first
        yield i, first


def read_part(frames, size):
    """The next PART of an iterator of Frames: [((h, w), canvas uint8 (size, size))], and what broke it off, or None."""
    part = []
    try:
        for frame in itertools.islice(frames, PART):
            part.append((frame.whole.shape, resize_square(frame.whole, size)))  # as masks.py: masks fit the screen
    except UnidentifiedImageError:
        return part, "not an image, or cut off in its first bytes"
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        return part, getattr(error, "strerror", None) or str(error) or type(error).__name__
    return part, None


def read_ahead(todo, load, size, ahead):
    """Yield (file, number of its first frame here or None for its only one, part, whether it has ended, why or None).

    todo: (file, first frame). Threads read at most `ahead` parts that nobody has taken; clips take turns, and the order
    is always the same.
    """
    pending, todo = collections.deque(), iter(todo)
    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        try:
            while True:
                for i, first in itertools.islice(todo, ahead - len(pending)):
                    frames = iter(load(i, first))
                    pending.append((i, first, frames, pool.submit(read_part, frames, size)))
                if not pending:
                    return
                i, first, frames, reading = pending.popleft()
                part, reason = reading.result()
                ended, end = len(part) < PART, first + len(part)
                if not ended:
                    pending.append((i, end, frames, pool.submit(read_part, frames, size)))
                elif reason or not end:
                    reason = f"frame {end}: {reason}" if end else reason or "holds no frame"
                yield i, None if end == 1 and ended and not reason else first, part, ended, reason
        finally:
            pool.shutdown(cancel_futures=True)


def make_batches(parts, names, folder, size, count, skipped, bar):
    """Yield lists of `size` (path of the mask, (h, w), canvas), and one of what is left."""
    batch = []
    for i, first, part, ended, reason in parts:
        for k, (shape, canvas) in enumerate(part):
            path = mask_path(folder, names[i], None if first is None else first + k)
            if os.path.exists(path):  # of a clip that was stopped with later masks written before earlier ones
                count["there"] += 1
                continue
            batch.append((path, shape, canvas))
            if len(batch) == size:
                yield batch
                batch = []
        if reason:
            skipped.append((names[i], reason))
        bar.update(ended)
    if batch:
        yield batch


def predict_masks(args, device):
    """Masks of every image of --data by the one run of --ckpt."""
    # ---- setup ----
    received = runtime.stop_on_signals()
    network, saved = segmenter.open_segmenter(args.ckpt[0], device)
    stats = saved["mean"], saved["std"]
    names, load, skipped = open_images(args)
    source = os.fsencode(os.path.realpath(args.data)) if args.data else b"phantoms"
    identity = {"--ckpt": file_digest(args.ckpt[0]), "--data": hashlib.sha256(source).hexdigest(),  # paths can be names
                "classes": saved["classes"]}
    open_output(args.output_dir, args.data, identity)
    runtime.show_run(args, device, 1)
    print(f"{len(names):,} {'files' if args.data else 'phantoms'}; classes {', '.join(saved['classes'])}; images are "
          f"squashed to {saved['img_size']} pixels a side", flush=True)
    bar = tqdm(total=len(names), unit=" files", disable=None, dynamic_ncols=True)
    count, writing, waited, folder = collections.Counter(), [], 0.0, args.output_dir
    todo, ahead = unfinished(names, folder, count, bar), READERS + min(args.batch_size, MOST_FILES)

    def write(path, shape, logits):
        write_mask(path, segmenter.at_own_size(logits, *shape), saved["classes"])

    # ---- loop ----
    started = time.monotonic()
    with (warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(WRITERS) as writers,
          contextlib.closing(read_ahead(todo, load, saved["img_size"], ahead)) as parts, bar):
        warnings.simplefilter("ignore")  # odd metadata, thousands of times
        batches = make_batches(parts, names, folder, args.batch_size, count, skipped, bar)
        while not received:
            asked = time.monotonic()
            batch = next(batches, None)
            waited += time.monotonic() - asked
            if batch is None:
                break
            paths, shapes, canvases = zip(*batch)
            logits = segmenter.predict_logits(network, np.stack(canvases), stats, device, args.dtype)
            if device.type == "cuda":
                torch.cuda.synchronize()  # else it would still be at work while we wait for reading
            for future in writing:  # of the batch before: there are never logits of more than two
                future.result()
            writing = [writers.submit(write, *one) for one in zip(paths, shapes, logits)]
            count["written"] += len(batch)
        for future in writing:
            future.result()
    spent = time.monotonic() - started

    # ---- report ----
    path = os.path.join(folder, "skipped.csv")
    with whole_file(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("name", "reason"), *skipped])
    if skipped and not (count["there"] or count["written"] or received):
        raise ValueError(f"none of {len(names):,} files could be read, {path} lists them; the first: "
                         f"{': '.join(skipped[0])}")
    print(f"{count['written']:,} masks written to {folder}, {count['there']:,} were there; "
          f"{count['written'] / spent:.1f} images/s, {100 * waited / spent:.0f} % of the time waited for reading; "
          f"{len(skipped):,} files skipped" + (f", see {path}" if skipped else ""))
    if received:
        print("stopped before the end: the same command goes on")
    if args.data is None:
        print("phantom images: a smoke test of the code, no evidence about ultrasound.")


# ---------------------------------------------------------------- many tasks: a submission

def predict_tasks(args, kinds, device):
    """The submission for --data; kinds: {path of a run: its tasks}."""
    found, owners = read_tasks(args.data, tasks=args.tasks, skip_wrong_rows=args.skip_wrong_rows, labelled=False), {}
    check_submission_folder(args.output_dir, [place for places in mask_places(found).values() for place in places])
    for sentence in found.wrong:
        print(f"left out: {sentence}")
    for path, tasks in kinds.items():
        for task in tasks:
            owners.setdefault(task.name, (path, task))
    for task in found.tasks:
        if task.name not in owners:
            raise ValueError(f"no run of --ckpt has the task {task.name}: they have {', '.join(owners)}; give one that "
                             f"has it, or name others by --tasks")
        path, other = owners[task.name]
        if other != task:
            raise ValueError(f"{path}: {task.name} is {other.kind} with num_classes {other.K} there, {task.kind} with "
                             f"{task.K} in --data")
    records = {kind: [] for kind in JSON_FILES}
    for kind in JSON_FILES:  # of no task an empty list: no file of an earlier run stays
        write_submission_json(args.output_dir, kind, [])
    for path in kinds:  # one network at a time
        own = [task for task in found.tasks if owners[task.name][0] == path]
        network, saved = open_network(path, device) if own else (None, None)
        for task in own:
            print(f"{task.name}: {len(found.rows[task.name].images):,} images by {path}", flush=True)
            rows = predict_task(network, network.tasks.index(task), saved, task, found, args, device)
            if task.kind in records:
                records[task.kind] += rows
                write_submission_json(args.output_dir, task.kind, records[task.kind])
    print(f"wrote {args.output_dir}: {count(len(found.tasks), 'task')}")


def predict_task(network, number, saved, task, found, args, device):
    """Records of a task's rows, in their order, for its JSON file; of segmentation none: its masks are written."""
    rows, size, stats, records = found.rows[task.name], saved["img_size"], (saved["mean"], saved["std"]), []

    def read(row):
        return resize_square(read_image(found.paths[rows.images[row]]).grey, size)

    def write(row, logits):
        width, height = found.sizes[rows.images[row]]
        mask = segmenter.at_own_size(logits, int(height), int(width))
        write_submission_mask(args.output_dir, rows.mask_paths[row], rows.image_paths[row], mask)

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # a batch at a time bounds the memory
        for start in tqdm(range(0, len(rows.images), args.batch_size), desc=task.name, leave=False, disable=None):
            part = range(start, min(start + args.batch_size, len(rows.images)))
            canvases = np.stack(list(pool.map(read, part)))
            output, _ = many_tasks.predict(network, number, canvases, stats, device, args.dtype)
            if task.kind == "segmentation":
                list(pool.map(write, part, output))
                continue
            sizes = found.sizes[rows.images[part]]
            records += records_of(task, [rows.image_paths[row] for row in part], sizes,
                                  many_tasks.in_pixels(task, many_tasks.as_shares(task, output), sizes))
    return records


def main(args):
    args.ckpt = args.ckpt or [next(filter(os.path.exists, DEFAULTS), DEFAULTS[0])]
    kinds, device = look_at(args.ckpt), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    segments = kinds[args.ckpt[0]] is None
    args.output_dir = args.output_dir or ("masks" if segments else "submission")
    others = ("tasks", "skip_wrong_rows") if segments else ("exclude",)
    if unused := [f"--{name}" for name in others if getattr(args, name)]:
        raise ValueError(f"{' and '.join(unused)}: not of {args.ckpt[0]}, a run of "
                         f"{'finetune_seg.py' if segments else 'finetune_multi.py'}; leave it out")
    if segments:
        return predict_masks(args, device)
    if args.data is None:
        raise ValueError(f"{args.ckpt[0]} needs --data: phantoms have no files, and a submission names files")
    predict_tasks(args, kinds, device)


if __name__ == "__main__":
    with runtime.clear_errors():
        main(get_args())
