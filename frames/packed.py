"""A pack: the folder of memory-mapped square grey canvases that pretraining reads, and the order to read them in.

    canvases.u8  uint8 (images, canvas, canvas), row-major, no header: each image squashed to a square
    index.csv    a line per canvas: INDEX's columns; width and height are the image's before it was squashed
    groups.csv   group, digest, named: leakage.salted of its name, with pack.json's salt
    pack.json    version, images, canvas, mean and std of all pixels (of 1, not 255), groups, digest, counts, ...
    names.csv    name, frame of each canvas    } the two files that hold file names, which can be patients' names;
    skipped.txt  what was left out, and why    } nothing but messages needs them: delete them to share a pack

An image is a frame of a file. Nothing here needs torch: the processes that decode files import it, too.
"""

import contextlib
import csv
import hashlib
import json
import os

import numpy as np

from frames.files import whole_file
from frames.leakage import WORDS

PACK_VERSION = 2
# group numbers count from 0 in order of appearance; hash and looks are leakage.py's, in hex; colour: 1 if the frame was
# in colour; mm: millimetres per pixel of the original image, 0 where unknown
INDEX = np.dtype([("width", "i4"), ("height", "i4"), ("group", "i8"), ("hash", "S16"), ("looks", f"S{16 * WORDS}"),
                  ("colour", "i1"), ("mm_x", "f4"), ("mm_y", "f4")])
GROUPS = np.dtype([("group", "i8"), ("digest", "S16"), ("named", "i1")])  # named: a patient or clip, not a folder


# ---------------------------------------------------------------- reading

class Canvases:
    """What PretrainBatches reads: canvases uint8 (images, S, S), sizes (images, 2) and groups (images,)."""

    def __init__(self, canvases, sizes, groups):
        self.canvases, self.sizes, self.groups = canvases, sizes, groups

    def __len__(self):
        return len(self.canvases)


class Pack(Canvases):
    """A folder written by pack.py, read with numpy.memmap and csv alone."""

    def __init__(self, folder):
        info_path = os.path.join(folder, "pack.json")
        try:
            self.info = dict(load_json(info_path))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder}: not a readable pack ({error}); make one with: python pack.py SRC {folder}")
        needed = {"images", "canvas", "mean", "std", "groups"}
        if self.info.get("version") != PACK_VERSION or not needed <= {*self.info}:
            raise ValueError(f"{info_path}: pack version {self.info.get('version')}, this code reads version "
                             f"{PACK_VERSION}, whole; pack again with: python pack.py SRC OUT")
        self.folder, self.mean, self.std = folder, self.info["mean"], self.info["std"]
        images, canvas = self.info["images"], self.info["canvas"]
        data_path = os.path.join(folder, "canvases.u8")
        if not os.path.exists(data_path) or os.path.getsize(data_path) != images * canvas * canvas:
            raise ValueError(f"{data_path}: missing or not the {images} canvases of {canvas}x{canvas} that pack.json "
                             f"names; pack again")
        index = _read_table(os.path.join(folder, "index.csv"), INDEX, images)
        super().__init__(np.memmap(data_path, np.uint8, "r", shape=(images, canvas, canvas)),
                         np.stack((index["width"], index["height"]), axis=1),
                         index["group"].copy())  # a view would keep all of the table
        self.hashes, self.looks = index["hash"][:, 0], index["looks"]  # uint64 (images,), (images, WORDS)
        digests = _read_table(os.path.join(folder, "groups.csv"), GROUPS, self.info["groups"])
        self.group_digests, self.named = digests["digest"][:, 0], digests["named"] > 0  # uint64, bool (groups,)
        if images and (self.sizes.min() < 1 or self.groups.min() < 0 or self.groups.max() >= self.info["groups"]):
            raise ValueError(f"{folder}/index.csv: sizes or group numbers that cannot be; pack again")

    def __reduce__(self):  # a data worker that is not forked opens the pack again: pickle would copy all canvases
        return Pack, (self.folder,)

    def digests(self):
        """What a checkpoint keeps of the images, for leakage.overlap: arrays and a salt. No names; groups only where
        they are patients' or clips', not folders'."""
        seen = {"content": self.hashes, "looks": self.looks}
        if self.named.any():
            seen.update(group_digests=self.group_digests[self.named], salt=bytes.fromhex(self.info["salt"]))
        return seen

    def names(self, indices):
        """Names of a few images, for messages, read from disk: two million of them fill memory."""
        wanted, path = {int(index) for index in indices}, os.path.join(self.folder, "names.csv")
        if not os.path.exists(path):
            return [f"canvas {index}" for index in sorted(wanted)]
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            return [row["name"] + (f" (frame {row['frame']})" if row["frame"] != "0" else "")
                    for number, row in enumerate(csv.DictReader(file)) if number in wanted]


def _read_table(path, dtype, rows):
    """A CSV of numbers -> {column: (rows,)}; columns of hex digits become uint64 (rows, words)."""
    try:
        table = np.loadtxt(path, dtype, delimiter=",", skiprows=1, ndmin=1)
        columns = {name: table[name] for name in dtype.names}
        for name, column in columns.items():
            if column.dtype.kind == "S":
                words = np.frombuffer(bytes.fromhex(column.tobytes().decode()), ">u8")
                columns[name] = words.reshape(len(column), -1).astype(np.uint64)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); pack again")
    if len(table) != rows:
        raise ValueError(f"{path}: {len(table)} rows, pack.json names {rows}; pack again")
    return columns


# ---------------------------------------------------------------- writing: from an unfinished pack to a pack

def write_tables(part, rows, groups, named, keep, names, canvas, salt, **info):
    """Write all of a pack but its canvases, which settle() brings into the order of the tables; pack.json comes last.

    The last kept canvases move into the gaps that dropped ones leave: what moves is never overwritten, so that a run
    killed amid the moves repeats them.
    """
    kept, order = np.flatnonzero(keep), np.arange(keep.sum())
    gaps = np.flatnonzero(~keep[:len(kept)])
    order[gaps] = kept[kept >= len(kept)]  # (images,): where each image's canvas lies now
    np.save(os.path.join(part, "moves.npy"), np.stack((gaps, order[gaps]), axis=1))
    rows, groups, named = rows[order], groups[order], named[order]
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    numbers = np.argsort(np.argsort(first))[group_of]  # groups counted in order of appearance
    digest = hashlib.sha256(str(canvas).encode())
    with open(os.path.join(part, "index.csv"), "w") as index:
        index.write(",".join(INDEX.names) + "\n")
        columns = (rows["width"], rows["height"], numbers, rows["hash"], rows["looks"], rows["colour"], rows["mm"])
        # one by one: as lists, the columns of two million images take gigabytes
        for width, height, number, content, looks, colour, mm in zip(*columns):
            line = (f"{width},{height},{number},{content:016x},{''.join(f'{word:016x}' for word in looks)},{colour},"
                    f"{mm[0]:.6g},{mm[1]:.6g}\n")
            index.write(line)
            digest.update(line.encode())
    with open(os.path.join(part, "groups.csv"), "w") as file:
        file.write(",".join(GROUPS.names) + "\n")
        first = np.sort(first)
        file.writelines(f"{number},{group:016x},{flag:d}\n" for number, (group, flag) in enumerate(
            zip(groups[first].tolist(), named[first].tolist())))
    with open(os.path.join(part, "names.csv"), "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "frame"])
        writer.writerows((names[image], frame) for image, frame in zip(rows["image"], rows["frame"]))
    for name in ("moves.npy", "index.csv", "groups.csv", "names.csv", "skipped.txt"):
        with open(os.path.join(part, name), "ab") as file:
            os.fsync(file.fileno())
    # Python integers are exact, so the moments depend neither on order nor on workers
    count = len(rows) * canvas * canvas
    total, squares = sum(rows["sum"].tolist()), sum(rows["squares"].tolist())
    std = (count * squares - total * total) ** 0.5 / count / 255
    save_json(os.path.join(part, "pack.json"), {
        "version": PACK_VERSION, "images": len(rows), "canvas": canvas, "mean": total / count / 255, "std": std,
        "groups": len(first), "digest": digest.hexdigest(), "salt": salt.hex(), **info})


def write_skipped(part, reasons):
    """skipped.txt: name, tab, reason, a line each."""
    escape = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})
    with open(os.path.join(part, "skipped.txt"), "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(f"{name.translate(escape)}\t{reason.translate(escape)}\n" for name, reason in reasons)


def settle(part, out):
    """Bring the canvases into the order of the tables, and give the pack its name; can be repeated after a crash."""
    info = load_json(os.path.join(part, "pack.json"))
    path, size = os.path.join(part, "canvases.u8"), info["canvas"] ** 2
    if os.path.getsize(path) > info["images"] * size:
        canvases = np.memmap(path, np.uint8, "r+").reshape(-1, size)
        for target, origin in np.load(os.path.join(part, "moves.npy")).tolist():
            canvases[target] = canvases[origin]
        canvases.flush()
        del canvases
        os.truncate(path, info["images"] * size)
    for name in ("rows", "failed", "begun.json", "moves.npy"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(part, name))
    os.rename(part, out)
    os.remove(os.path.join(out, "lock"))
    return info


def save_json(path, content):
    with whole_file(path, "w", sync=True) as file:
        json.dump(content, file, indent=1)


def load_json(path):
    with open(path) as file:
        return json.load(file)


# ---------------------------------------------------------------- draws and order

# streams of philox, one for each use, so that no two draw the same numbers
ORDER, CROPS, MASKS, AUGMENT, MIX, SHOTS, TURNS = range(7)


def philox(seed, step, stream, index=0):
    """A generator, a pure function of its arguments: no state is ever saved, and a resumed run draws the same."""
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, index, stream]))


class BatchRows:
    """A generator that draws for a whole batch and gives the rows of some images: so all ranks draw the same."""

    def __init__(self, rng, batch, images):
        self.rng, self.batch, self.images = rng, batch, images

    def random(self, shape):
        return self.rng.random((self.batch, *shape[1:]))[self.images]


def image_order(groups, seed, epoch):
    """Order of all images in an epoch, a function of (seed, epoch): each group's images are spread evenly over it.

    The j-th of a group's n images, in random order, sits near (j + u) / n of the epoch, u drawn once per group, so
    that neighbouring frames of a clip do not share a batch. Groups of one give a plain random permutation.
    """
    rng = philox(seed, epoch, ORDER)
    shuffled = rng.permutation(len(groups))
    _, member_of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    by_group = shuffled[np.argsort(member_of[shuffled], kind="stable")]  # groups one after the other, inside shuffled
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank_in_group = np.arange(len(groups)) - first
    offset = np.repeat(rng.random(len(counts)), counts)
    return by_group[np.argsort((rank_in_group + offset) / np.repeat(counts, counts), kind="stable")]
