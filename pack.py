"""Pack any pile of images, once, into the memory-mapped square grey canvases that pretraining reads.

    python pack.py /fus2m fus2m.pack
    python pack.py /export_2023 train_paths.csv train.pack --exclude '*_mask.png' --holdout test.csv
    python pack.py /clips clips.pack --group_regex '([^/]+)_frame[0-9]+' --dedup --max_per_group 200

SRC is a recursive folder, a text list or a CSV; the files of a pack are described in frames/packed.py. What cannot be
read is skipped, counted and listed in OUT/skipped.txt. Until a pack is complete it is called OUT.part; the same command
goes on with it after an interruption or a full disk. --holdout keeps benchmark images out. An image is left out when

1. its grey pixels equal those of a holdout image, or its perceptual hash is that of one: another export of the frame;
2. its group is held out. Where a `group` column, --group_regex or DICOM names groups, a group is held out if the
   holdout names one alike, or if one of its images falls under rule 1. Where neither side names any, a source folder is
   held out if a holdout image lies in that very folder, unless the holdout's labels show that its folders are classes.

A line says where groups could not be compared, so that other images of a held-out patient may have stayed in.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
from tqdm import tqdm

from arguments import Parser
from frames.images import ROW, Frame, count_frames, decode_all, measure
from frames.leakage import salted
from frames.lists import list_images
from frames.packed import PACK_VERSION, Pack, load_json, save_json, settle, write_skipped, write_tables
from frames.phantom import phantom_images
from frames.selection import Holdout, choose, groups_of, list_reasons, report, size_text
from labelled.labels import has_labels, read_labelled

try:
    import fcntl
except ImportError:  # Windows: two processes may not pack into one folder, but nothing stops them
    fcntl = None

OPTIONS = ("exclude", "holdout", "group_regex", "canvas", "dedup", "max_per_group", "drop_colour", "crop_fan",
           "max_skipped")
ENOUGH = 10_000  # files whose unreadable share says enough to stop; of fewer, all count
PATIENCE = 300  # seconds that a process waits for another one to begin packing
SAVE_EVERY = 10  # seconds between entries into the journal of an unfinished pack: what a killed run loses


def add_arguments(parser):
    """What a pack is made by; pretrain.py, which packs a folder by itself, takes the same flags."""
    add, flag = parser.add_argument, dict(action=argparse.BooleanOptionalAction, default=False)
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out names that match, e.g. '*_mask.png'")
    add("--holdout", nargs="+", default=[], metavar="SRC", help="CSVs, lists, folders: what must stay out")
    add("--group_regex", help="first (capture) in an image's name is its patient, examination or clip")
    add("--canvas", type=int, default=384, help="side of the stored squares, pixels")
    add("--dedup", **flag, help="leave out copies, and frames nearly equal to one of their group")
    add("--max_per_group", type=int, metavar="N", help="keep N images of a group, evenly spaced: caps long clips")
    add("--drop_colour", **flag, help="leave out colour frames: Doppler, 3-D renders")
    add("--crop_fan", **flag, help="trim what lies outside the ultrasound fan: border, burnt-in text")
    add("--max_skipped", type=float, default=0.5, metavar="SHARE", help="stop if more of the files cannot be read")


def check_arguments(parser, args):
    parser.check(args, dict(canvas=1, max_per_group=1))
    if not 0 <= args.max_skipped <= 1:
        parser.error(f"--max_skipped is a share from 0 to 1, not {args.max_skipped}")


def options(args):
    """make_pack's keyword arguments."""
    return {name: getattr(args, name) for name in OPTIONS}


def get_args(argv=None):
    parser = Parser("Pack images into square grey canvases.", usage="%(prog)s SRC [SRC ...] OUT [OPTION ...]")
    parser.add_argument("sources", nargs="+", metavar="SRC",
                        help="recursive folder, text list (a path per line) or CSV (image[,label][,group])")
    parser.add_argument("out", metavar="OUT", help="pack folder to write; must not exist")
    add_arguments(parser)
    parser.add_argument("--workers", type=int, help="decoding processes; all cores if not given")
    args, _ = parser.parse(argv)
    check_arguments(parser, args)
    parser.check(args, dict(workers=1))
    return args


def recipe(sources, *, exclude=(), holdout=(), max_skipped=None, **how):
    """What a pack was made from, as stored in pack.json: equal recipes make equal packs from unchanged files.

    Paths, which can hold patients' names, are there as one digest: of --data, --exclude and --holdout.
    """
    paths = [[os.path.realpath(path) for path in sources], list(exclude), [os.path.realpath(path) for path in holdout]]
    return {"paths": hashlib.sha256(json.dumps(paths).encode()).hexdigest(), **how}


def differing(one, other):
    """The arguments in which two recipes differ, in words."""
    names = sorted(name for name in {*one, *other} if one.get(name) != other.get(name))
    return ", ".join("--data, --exclude or --holdout" if name == "paths" else f"--{name}" for name in names)


# ---------------------------------------------------------------- an unfinished pack

class Journal:
    """The folder OUT.part, which goes on where the run before was stopped.

    canvases.u8  the canvases so far
    rows         images.ROW of each, written after its canvas has reached the disk
    failed       JSON lines: file, frame, reason
    begun.json   what the pack is made from, and its salt

    The last file in the journal is read again: its later frames may be missing.
    """

    def __init__(self, part, made_from, names, canvas):
        self.paths = [os.path.join(part, name) for name in ("canvases.u8", "rows", "failed")]
        begun_path = os.path.join(part, "begun.json")
        files = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()
        begun = {"version": PACK_VERSION, "files": files, "recipe": made_from}
        if not os.path.exists(begun_path):
            save_json(begun_path, {**begun, "salt": os.urandom(16).hex()})
        found = load_json(begun_path)
        self.salt = bytes.fromhex(found.pop("salt"))
        if found != begun:
            raise ValueError(f"{part}: was begun with other arguments or other files "
                             f"({differing(found['recipe'], made_from) or 'files'}); delete it to pack anew, or choose "
                             f"another OUT")
        for path in self.paths:
            open(path, "ab").close()
        rows = np.fromfile(self.paths[1], ROW)
        with open(self.paths[2]) as file:
            failed = [json.loads(line) for line in file if line.endswith("\n")]
        self.next = max([0, *rows["image"][-1:].tolist(), *(image for image, _, _ in failed[-1:])])
        self.rows, self.failed = [rows[rows["image"] < self.next]], [entry for entry in failed if entry[0] < self.next]
        self.canvas, self.frames = canvas, len(self.rows[0])
        self.waiting = [], []  # rows and failures whose canvases may not have reached the disk
        lines = "".join(json.dumps(entry) + "\n" for entry in self.failed)
        self.saved, self.sizes = time.monotonic(), [self.frames * canvas ** 2, self.rows[0].nbytes, len(lines)]
        for path, size in zip(self.paths[:2], self.sizes):
            os.truncate(path, size)
        with open(self.paths[2], "w") as file:
            file.write(lines)

    def add(self, rows, canvases, failed):
        with open(self.paths[0], "ab") as file:
            file.write(canvases)
        self.frames += len(rows)
        self.waiting[0].append(rows)
        self.waiting[1].extend(failed)
        if time.monotonic() - self.saved > SAVE_EVERY:
            self.save()

    def save(self):
        rows = np.concatenate([np.zeros(0, ROW), *self.waiting[0]])
        lines = "".join(json.dumps(entry) + "\n" for entry in self.waiting[1])
        for number, new in enumerate((b"", rows.tobytes(), lines.encode())):
            if number:
                os.truncate(self.paths[number], self.sizes[number])  # of half an entry, left by a full disk
            with open(self.paths[number], "ab") as file:
                file.write(new)
                file.flush()
                os.fsync(file.fileno())
        self.sizes[1:] = self.sizes[1] + rows.nbytes, self.sizes[2] + len(lines)
        self.rows.append(rows)
        self.failed += self.waiting[1]
        self.waiting, self.saved = ([], []), time.monotonic()

    def __str__(self):
        return f"{self.frames:,} images, {size_text(self.frames * self.canvas ** 2)}"


@contextlib.contextmanager
def unfinished(out):
    """The folder OUT.part, ours alone while we are in it; it vanishes if nothing was packed into it."""
    if os.path.lexists(out):
        raise ValueError(f"{out}: exists already; delete it or choose another OUT")
    part = f"{out}.part"
    os.makedirs(part, exist_ok=True)
    with open(os.path.join(part, "lock"), "w") as lock:
        if not _lock(lock):
            raise BlockingIOError(f"{part}: another process is packing there")
        try:
            if os.path.lexists(out):
                raise BlockingIOError(f"{out}: another process has just packed it")
            yield part
        finally:
            canvases = os.path.join(part, "canvases.u8")
            if os.path.exists(part) and not (os.path.exists(canvases) and os.path.getsize(canvases)):
                shutil.rmtree(part)


def _lock(file):
    """Whether the lock is ours now; the system takes it back when this process ends, however that happens."""
    with contextlib.suppress(BlockingIOError):
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def check_disk(part, paths, canvas):
    """Raise unless the disk has room for all frames of the files, judged by the frames of some of them."""
    some = paths[::max(1, len(paths) // 64)]
    frames = sum(map(count_frames, some)) * len(paths) / max(len(some), 1)
    need, free = frames * (canvas * canvas + 400), shutil.disk_usage(part).free  # 400: lines of journal and tables
    if need > free:
        raise ValueError(f"{os.path.dirname(os.path.abspath(part))}: about {frames:,.0f} canvases of {canvas}x{canvas} "
                         f"need {size_text(need)}, {size_text(free)} are free; free some or choose a smaller --canvas")


def decode_into(journal, images, todo, crop_fan, max_skipped, workers, log):
    """Decode the files `todo` (ascending numbers in `images`), those the journal has not, into the journal."""
    before = np.searchsorted(todo, journal.next)
    todo = todo[before:]
    bad, done, shown = len({image for image, _, _ in journal.failed}), 0, time.monotonic()
    begun, paths = shown, [images.paths[number] for number in todo]
    bar = tqdm(total=len(todo), unit=" files", disable=None, dynamic_ncols=True, smoothing=0.05)
    try:
        with bar, contextlib.closing(decode_all(paths, journal.canvas, crop_fan, journal.salt, workers)) as decoded:
            for ended, rows, canvases, failed in decoded:
                rows["image"] = todo[rows["image"]]
                journal.add(rows, canvases, [(int(todo[number]), frame, reason) for number, frame, reason in failed])
                bad, read = bad + len(failed), before + ended
                if failed and bad > max_skipped * max(read, min(before + len(todo), ENOUGH)):
                    number, _, reason = failed[-1]
                    raise ValueError(f"{bad:,} of the first {read:,} files cannot be read, over --max_skipped "
                                     f"{max_skipped}; the last: {paths[number]!r}: {reason}. Is this the source you "
                                     f"meant? With a higher --max_skipped the same command goes on")
                bar.set_postfix_str(str(journal), refresh=False)
                bar.update(ended - done)
                done = ended
                if bar.disable and time.monotonic() - shown > 60:
                    shown, rate = time.monotonic(), done / (time.monotonic() - begun)
                    log(f"{done:,} of {len(todo):,} files | {journal} | {rate:.0f} files/s | "
                        f"{(len(todo) - done) / max(rate, 1e-9) / 3600:.2f} h left")
        journal.save()
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk: what was saved before stays
            journal.save()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(f"{journal.paths[0]}: the disk is full after {journal}; free some room, then the same "
                          f"command goes on from there") from error
        raise


# ---------------------------------------------------------------- what is held out

def read_holdout(sources, group_regex):
    """(paths of images, names of groups, real paths of folders) that --holdout keeps out of a pack."""
    paths, names, folders = [], set(), set()
    for source in sources:
        labelled = has_labels(source)  # labels tell class folders; rows of all splits are held out
        images = read_labelled(source, by=None) if labelled else list_images(source)
        paths += images.paths
        if images.grouped_by.startswith("group column"):
            names |= set(images.groups)
        elif group_regex:  # names are relative to the holdout here: one without a match still counts by its pixels
            matches = [re.search(group_regex, name) for name in images.names]
            names |= {match[1] for match in matches if match and match[1]}
        elif not labelled or images.grouped_by.endswith("parent folder"):
            folders |= {os.path.realpath(folder) for folder in set(map(os.path.dirname, images.paths))}
    return paths, names, folders


# ---------------------------------------------------------------- the two packs

def make_pack(sources, out, *, exclude=(), holdout=(), canvas=384, group_regex=None, dedup=False, max_per_group=None,
              drop_colour=False, crop_fan=False, max_skipped=0.5, workers=None, log=print):
    """Write the pack `out` of all images of the sources; OSError or ValueError says in a sentence what went wrong."""
    out = os.path.normpath(out)
    made_from = recipe(sources, exclude=exclude, holdout=holdout, canvas=canvas, group_regex=group_regex, dedup=dedup,
                       max_per_group=max_per_group, drop_colour=drop_colour, crop_fan=crop_fan)
    images = list_images(sources, exclude, group_regex)
    with unfinished(out) as part:
        tables = os.path.join(part, "pack.json")
        if not os.path.exists(tables):
            fill(part, images, made_from, holdout, max_skipped, workers, log)
        elif load_json(tables)["recipe"] != made_from:
            differ = differing(load_json(tables)["recipe"], made_from)
            raise ValueError(f"{part}: was begun with other arguments ({differ}); delete it to pack anew, or choose "
                             f"another OUT")
        info = settle(part, out)
    report(info, out, log)


def fill(part, images, made_from, holdout, max_skipped, workers, log):
    """Read what the journal has not, choose what stays and write the tables."""
    canvas, names = made_from["canvas"], images.names
    journal = Journal(part, made_from, names, canvas)
    if journal.next:
        log(f"going on with {part}: {journal.next:,} of {len(names):,} files are read ({journal})")
    check_disk(part, images.paths[journal.next:], canvas)
    digests = np.array([salted(group, journal.salt) for group in images.groups], np.uint64)  # (files,)
    say = log if len(names) > 100_000 else lambda _: None  # what takes minutes then
    if holdout:
        say("reading what is held out")
    held = Holdout(*read_holdout(holdout, made_from["group_regex"]), journal.salt, workers)
    held_groups = held.known_groups(images, digests)
    skip = np.isin(digests, held_groups)  # not even read
    decode_into(journal, images, np.flatnonzero(~skip), made_from["crop_fan"], max_skipped, workers, log)

    rows, failed = np.concatenate(journal.rows), journal.failed
    say("comparing images")
    groups, named, grouped_by = groups_of(rows, images, digests)
    held_groups = np.union1d(held_groups, held.groups[np.isin(held.groups, groups[named])])
    why, counts = choose(rows, groups, named, held, held_groups, canvas,
                         *(made_from[name] for name in ("dedup", "max_per_group", "drop_colour")))
    if not (why == 0).any():
        os.remove(journal.paths[0])  # nothing to go on with
        if not len(rows) and failed:
            raise ValueError(f"none of {len(failed):,} files can be read; first: {names[failed[0][0]]!r}: "
                             f"{failed[0][2]}")
        raise ValueError(f"all {len(rows) + skip.sum():,} images are held out or dropped; see --holdout, --drop_colour")
    counts["held_out_by_group"] += int(skip.sum())
    write_skipped(part, list_reasons(rows, why, groups == digests[rows["image"]], failed, np.flatnonzero(skip), images))
    say("writing tables")
    write_tables(part, rows, groups, named, why == 0, names, canvas, journal.salt, grouped_by=grouped_by,
                 files=len(names), skipped=len(failed), closed=len(images.closed),
                 held_out_groups=counts.pop("held_groups"),
                 groups_missed=bool(not named.all() and (len(held.groups) or counts["held_out_identical"])),
                 recipe=made_from, held_against=len(held.hashes), **counts)


def pack_phantoms(out, images=12000, canvas=64, seed=0, log=print):
    """Write a pack of drawn images, phantom.py's, instead of real ones."""
    out = os.path.normpath(out)
    pixels, _, groups = phantom_images(images, canvas, seed)
    names = [f"phantom_{index:06d}" for index in range(images)]
    made_from = {"phantoms": images, "canvas": canvas, "seed": seed}
    with unfinished(out) as part:
        journal = Journal(part, made_from, names, canvas)
        rows = np.zeros(images, ROW)
        for number, grey in enumerate(pixels):
            rows[number], _ = measure(Frame(grey, grey), canvas, None, b"")
        rows["image"] = np.arange(images)
        pixels.tofile(journal.paths[0])
        digests = np.array([salted(str(group), journal.salt) for group in groups], np.uint64)
        write_skipped(part, [])
        everyone = np.ones(images, bool)
        write_tables(part, rows, digests, ~everyone, everyone, names, canvas, journal.salt,
                     grouped_by="phantom patient", recipe=made_from)
        settle(part, out)
    log(f"{images:,} phantom images, {len(set(groups.tolist())):,} groups by phantom patient -> {out} "
        f"({size_text(images * canvas ** 2)})")


def open_pack(sources, folder, is_first, **how):
    """What pretraining reads: the one source if it is a pack, else the pack `folder`, made if it is not there.

    Only the first process of a machine makes it, and of several machines that share the folder only one; the others
    wait for the folder, which appears when it is complete.
    """
    packs = [source for source in sources if os.path.exists(os.path.join(source, "pack.json"))]
    if packs:
        if len(sources) > 1:
            raise ValueError(f"{packs[0]} is a pack: it must be the only --data; pack all images into one by pack.py")
        wanted = [f"--{name}" for name, value in how.items() if value and name not in ("canvas", "max_skipped")]
        if wanted:
            raise ValueError(f"{packs[0]} is a pack already: give {', '.join(wanted)} to pack.py")
        return Pack(packs[0])

    if is_first and not os.path.exists(folder):
        print(f"packing {', '.join(sources)} once, into {folder}", flush=True)
    log = functools.partial(print, flush=True)
    data = make_or_wait(folder, is_first, lambda: make_pack(sources, folder, **how, log=log))
    differ = differing(data.info["recipe"], recipe(sources, **how))
    if differ:
        raise ValueError(f"{folder} was packed with other arguments ({differ}): delete it to pack again, choose "
                         f"another --output_dir, or take it as it is by --data {folder}")
    return data


def open_phantoms(folder, images, canvas, seed, is_first):
    """The pack `folder` of phantom images, drawn if not there yet."""
    data = make_or_wait(folder, is_first, lambda: pack_phantoms(folder, images, canvas, seed))
    if data.info["recipe"] != {"phantoms": images, "canvas": canvas, "seed": seed}:
        raise ValueError(f"{folder} holds other images ({data.info['recipe']}): delete it, or choose another "
                         f"--output_dir")
    return data


def make_or_wait(folder, is_first, make):
    """The pack `folder`, made by one process; the others look for it every half second, however long it takes.

    If the process at it dies, which frees its lock, a first one takes over and another one leaves after PATIENCE s.
    """
    if os.path.exists(folder) and is_first:
        print(f"using {folder}, packed earlier (delete it to pack again)", flush=True)
    seen = time.monotonic()
    while not os.path.exists(folder):
        if is_first:
            try:
                make()
            except (BlockingIOError, ValueError) as error:  # a process of another machine is at it, or just finished
                if isinstance(error, ValueError) and not os.path.exists(folder):
                    raise
        elif _is_locked(folder):
            seen = time.monotonic()
        elif time.monotonic() - seen > PATIENCE:
            raise ChildProcessError(f"nobody packs {folder}: the process that should has ended, or never began")
        time.sleep(0.5)
    return Pack(folder)


def _is_locked(out):
    try:
        with open(os.path.join(f"{out}.part", "lock"), "r+") as file:
            return not _lock(file)
    except OSError:
        return False


def main(args):
    def terminate(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    try:
        make_pack(args.sources, args.out, **options(args), workers=args.workers)
    except (OSError, ValueError) as error:
        sys.exit(f"pack.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"pack.py: interrupted; the same command goes on from what {os.path.normpath(args.out)}.part holds")


if __name__ == "__main__":
    main(get_args())
