"""The FMC_UIA challenge's data as downloaded: tasks of four kinds over one pile of images, told by CSVs.

    found = read_tasks("fmc_uia", group_regex=r"(\\d+)_\\d*HC")
    splits, notes = split_tasks(found, seed=0, val=0.2, test=0.2)  # of images, whatever task they serve
    rows = found.rows["fetal_head"]
    mask = read_task_mask(rows.targets[0], K=2)  # uint8 (h, w) of the image found.paths[rows.images[0]]

Coordinates are pixels of the original image: x to the right, y down, pixel (0, 0) covers 0..1 by 0..1. When the data
are read, every row is looked at, images and masks decoded: what is wrong is told by file and line.
"""

import concurrent.futures
import json
import math
import os
import re
import sys
from collections import namedtuple

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from frames import lists
from frames.images import IMAGE_SUFFIXES, load_frame
from labelled.labels import LabelledSet
from labelled.mask_codes import pixels_text, read_codes, text_of
from labelled.splits import SPLIT_WORDS, SPLITS, split_groups

# the least and most num_classes of each kind; a mask is uint8, an image of a detection task has one box
KINDS = {"segmentation": (2, 256), "classification": (2, 1000), "detection": (1, 1), "regression": (1, 1000)}
NEEDED = ["image_path", "task_id", "task_name", "num_classes"]
BOX = ["x_min", "y_min", "x_max", "y_max"]
SHOWN = 20  # wrong rows that an error names
GROUPS_FILE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fmc_uia_groups.csv")  # clinical, FMC_UIA's

# K: classes, with background in segmentation; 1 in detection; points in regression
Task = namedtuple("Task", "name kind K")
# of a task's m rows; images: int64 (m,) numbers in TaskSet.paths; targets: segmentation m absolute paths of masks,
# classification int64 (m,), detection float64 (m, 4) as in BOX, regression float64 (m, K, 2) x, y, nan where a point is
# missing; None if read unlabelled; image_paths, mask_paths: as the CSV has them, None without a mask path; lines: where
# the rows stand, in words
Rows = namedtuple("Rows", "images targets image_paths mask_paths lines")
# tasks: by name; paths, names: n image files, absolute, and as seen from the root; sizes: int64 (n, 2) width, height;
# groups: n texts; splits: "train", "val" or "test" of each image, or None where the CSVs name none; rows: {task's name:
# Rows}; wrong: a sentence for each row left out; csv_folder: absolute
TaskSet = namedtuple("TaskSet", "tasks paths names sizes groups grouped_by splits rows wrong csv_folder")
# a row of a CSV: where it stands, its task, its image's absolute path or None, {column: text}, its split or None
Line = namedtuple("Line", "where task path cells split")


# ---------------------------------------------------------------- reading

def read_tasks(data, group_regex=None, tasks=None, skip_wrong_rows=False, labelled=True):
    """The TaskSet of a folder: the root, its csv_files, or any folder of CSVs, from which their paths start.

    group_regex: its capture in an image_path is a group, beside those of a column `group`; groups that share an image,
    whatever task it serves, are one. tasks: names of those to keep; runs over different tasks that are to be compared
    need splits drawn over all of them. labelled=False: for prediction, the columns NEEDED will do.
    Raises ValueError with one sentence that says what is wrong and where; of wrong rows, all are found first.
    """
    folder, root = _folders(data)
    lines = _read_lines(folder, labelled)
    known = sorted({line.task.name for line in lines})
    for name in tasks or ():
        if name not in known:
            raise ValueError(f"{folder}: has no task {name!r}; there are {', '.join(known)}")
    lines = [line for line in lines if not tasks or line.task.name in tasks]
    groups, grouped_by = _groups(lines, root, group_regex)  # of wrong rows, too: what they say of groups holds
    sizes = dict(zip(groups, _in_threads(_image_size, list(groups), "images")))
    targets = _in_threads(lambda line: _target(line, sizes, folder, labelled), lines, "rows")

    sound, wrong, seen = {line.task: [] for line in lines}, [], {}
    for line, target in zip(lines, targets):
        if isinstance(target, ValueError):
            wrong.append(f"{line.where}: {target}")
        elif seen.setdefault((line.task, line.path), line) is not line:
            wrong.append(f"{line.where}: {line.path} is listed twice for {line.task.name}, first in "
                         f"{seen[line.task, line.path].where}")
        else:
            sound[line.task].append((line, target))
    empty = [task.name for task in sound if not sound[task]]
    if wrong and (empty or not skip_wrong_rows):
        more = [f"and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else []
        way = f" and leave out {', '.join(empty)}, which would be empty" if empty else ""
        raise ValueError(f"{folder}: {len(wrong):,} of {len(lines):,} rows are wrong: {'; '.join(wrong[:SHOWN] + more)}"
                         f"; mend them, or add --skip_wrong_rows{way}")

    lines = [line for pairs in sound.values() for line, _ in pairs]
    splits, paths = _splits(lines, groups), sorted({line.path for line in lines})
    number = {path: i for i, path in enumerate(paths)}
    rows = {task.name: _rows(task, sound[task], number, labelled) for task in sorted(sound)}
    return TaskSet(sorted(sound), paths, [os.path.relpath(path, root) for path in paths],
                   np.array([sizes[path] for path in paths], np.int64), [groups[path] for path in paths], grouped_by,
                   splits and [splits[path] for path in paths], rows, wrong, folder)


def _folders(data):
    """(folder of the CSVs, root), absolute."""
    folder = os.path.abspath(data)
    if not os.path.isdir(folder):
        raise ValueError(f"{data}: no such folder; expected the challenge's, with csv_files in it")
    if os.path.isdir(os.path.join(folder, "csv_files")):
        return os.path.join(folder, "csv_files"), folder
    return folder, os.path.dirname(folder) if os.path.basename(folder) == "csv_files" else folder


def _read_lines(folder, labelled):
    """The Lines of all CSVs of a folder; ValueError where they do not say what is asked of which image."""
    files = sorted(name for name in os.listdir(folder) if name.lower().endswith(".csv") and name[0] != ".")
    lines, first = [], {}  # of each task
    for file in files:
        path = os.path.join(folder, file)
        columns, delimiter = lists.csv_columns(path)
        for column in NEEDED:
            if column not in (columns or ()):
                raise ValueError(f"{path}: has no column {column}; expected {', '.join(NEEDED)} and those of the "
                                 f"task; take other CSVs out of this folder")
        for number, cells in lists.read_csv(path, columns, delimiter, NEEDED[1:]):
            where, split = f"{path}, line {number}", cells.get("split", "").strip().lower() if labelled else ""
            line = Line(f"{file}, line {number}", _task(where, cells, labelled),
                        _absolute(folder, cells["image_path"]), cells, SPLIT_WORDS.get(split))
            name, kind, K = line.task
            known = first.setdefault(name, line)
            if known.task != line.task:
                raise ValueError(f"{where}: {name} is {kind} with num_classes {K}, but {known.task.kind} with "
                                 f"{known.task.K} in {known.where}; a task has one of both")
            if split and line.split is None:
                raise ValueError(f"{where}: split is {split!r}, expected one of {', '.join(SPLIT_WORDS)}")
            lines.append(line)
            if bool(line.split) != bool(lines[0].split):
                raise ValueError(f"{folder}: one of {lines[0].where} and {line.where} has a split, one has none; fill "
                                 f"the column split in all rows of all CSVs, or leave it out")
    if not lines:
        raise ValueError(f"{folder}: {len(files)} CSVs, no rows; expected csv_files, or the folder above it")
    return lines


def _task(where, cells, labelled):
    """The Task of a row, which must have the columns of its kind."""
    kind, K = cells["task_name"].strip().lower(), _whole(cells["num_classes"])
    if kind not in KINDS:  # the challenge writes Regression
        raise ValueError(f"{where}: task_name is {cells['task_name']!r}, expected one of {', '.join(KINDS)}")
    low, high = KINDS[kind]
    if K is None or not low <= K <= high:
        raise ValueError(f"{where}: num_classes is {cells['num_classes']!r}, in {kind} expected "
                         + (f"a whole number from {low} to {high}" if low < high else str(low)))
    for column in _columns(kind, K) if labelled else ():
        if column not in cells:
            raise ValueError(f"{where}: there is no column {column}, which {kind} with num_classes {K} needs")
    return Task(cells["task_id"].strip(), kind, K)


def _columns(kind, K):
    return {"segmentation": ["mask_path"], "classification": ["mask"], "detection": BOX,
            "regression": [f"point_{k}_xy" for k in range(1, K + 1)]}[kind]


def _whole(text):
    """The whole number from 0 in a text, also in "2.0", as pandas writes beside empty cells; None if it is none."""
    match = re.fullmatch(r"\s*([0-9]{1,9})(\.0*)?\s*", text)
    return int(match[1]) if match else None


def _absolute(folder, path):
    return os.path.normpath(os.path.join(folder, path.replace("\\", "/"))) if path else None


def _in_threads(look, items, what):
    """look(item) of each, or the ValueError that it raised."""
    def caught(item):
        try:
            return look(item)
        except ValueError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # decoding leaves Python's lock
        return list(tqdm(pool.map(caught, items), total=len(items), desc=what, disable=not sys.stderr.isatty(),
                         leave=False))


def _rows(task, pairs, number, labelled):
    """The Rows of a task's (Line, target)."""
    lines, targets = map(list, zip(*pairs))
    if labelled and task.kind != "segmentation":
        targets = np.array(targets, np.int64 if task.kind == "classification" else np.float64)
    return Rows(np.array([number[line.path] for line in lines], np.int64), targets if labelled else None,
                [line.cells["image_path"] for line in lines], [line.cells.get("mask_path") or None for line in lines],
                [line.where for line in lines])


# ---------------------------------------------------------------- one row

def _image_size(path):
    """(width, height) of an image as it is shown."""
    if not os.path.isfile(path) or not path.lower().endswith(IMAGE_SUFFIXES):
        raise ValueError(f"{path} is not there, or is no image ({', '.join(IMAGE_SUFFIXES)})")
    try:
        height, width = load_frame(path).grey.shape  # the header alone would not tell of a file that is cut off
    except Exception as error:  # Pillow raises OSError, ValueError, SyntaxError, struct.error, ...
        why = "not an image, or cut off" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(f"{path} cannot be read ({why})") from error
    return width, height


def _target(line, sizes, folder, labelled):
    """What a Line says of its image, as in Rows.targets; ValueError where it cannot be so."""
    task, cells, size = line.task, line.cells, sizes.get(line.path)
    if line.path is None:
        raise ValueError("no image_path")
    if isinstance(size, ValueError):
        raise size
    if not labelled:
        return None
    if task.kind == "segmentation":
        path = _absolute(folder, cells["mask_path"])
        if path is None or not os.path.isfile(path):
            raise ValueError(f"there is no mask {path}" if path else "no mask_path")
        mask = read_task_mask(path, task.K)
        if mask.shape[::-1] != size:
            raise ValueError(f"mask {path} has {pixels_text(mask)} pixels, its image {size[0]} x {size[1]}")
        return path
    if task.kind == "detection":
        return _box([cells[column] for column in BOX], size)
    if task.kind == "regression":
        points = [_point(column, cells[column], size) for column in _columns(task.kind, task.K)]
        if np.isnan(points).all():
            raise ValueError("all points are missing")
        return points
    label = _whole(cells["mask"])
    if label is None or label >= task.K:
        raise ValueError(f"mask, the class, is {cells['mask']!r}, expected a whole number from 0 to {task.K - 1}")
    return label


def read_task_mask(path, K):
    """Class numbers uint8 (h, w), 0 to K - 1: grey levels or a palette's indices, as they are."""
    try:
        codes, levels = read_codes(path)
    except ValueError as error:  # the advice in it is another stage's
        raise ValueError(f"mask {path} cannot be read ({error.__cause__})") from error
    if levels[-1] >= K:
        raise ValueError(f"mask {path} holds {text_of(levels[-1])}, expected class numbers from 0 to {K - 1}")
    return codes.astype(np.uint8, copy=False)


def _box(texts, size):
    """[x_min, y_min, x_max, y_max] of four cells."""
    try:
        x_min, y_min, x_max, y_max = [float(text) for text in texts]
    except ValueError:
        x_min = y_min = x_max = y_max = math.nan
    if not (0 <= x_min < x_max <= size[0] and 0 <= y_min < y_max <= size[1]):
        raise ValueError(f"the box is {', '.join(texts)}, expected {', '.join(BOX)} of some extent inside its image of "
                         f"{size[0]} x {size[1]} pixels")
    return [x_min, y_min, x_max, y_max]


def _point(column, text, size):
    """[x, y] of a cell; nan, nan where it is empty: the point is missing."""
    if not text.strip():
        return [math.nan, math.nan]
    try:
        x, y = json.loads(text)
    except (ValueError, TypeError, RecursionError):  # the last of "[[[[…"
        x = y = None
    if not ({type(x), type(y)} <= {int, float} and 0 <= x <= size[0] and 0 <= y <= size[1]):
        raise ValueError(f"{column} is {text[:40]!r}, expected two numbers, as in [12.5, 40], inside its image of "
                         f"{size[0]} x {size[1]} pixels")
    return [x, y]


# ---------------------------------------------------------------- groups

def _groups(lines, root, group_regex):
    """{path of an image: its group}, how they were found. Groups that share an image are one, of the smallest name."""
    try:
        pattern = re.compile(group_regex or "")
    except re.error as error:
        raise ValueError(f"--group_regex {group_regex!r}: {error}") from error
    own, above, ways = {line.path: set() for line in lines if line.path}, {}, set()

    def top(name):
        while above.setdefault(name, name) != name:
            name = above[name]
        return name

    for line in lines:
        match = pattern.search(line.cells["image_path"].replace("\\", "/"))
        captured = next(filter(None, match.groups()), None) if match else None
        for way, name in (("group column", line.cells.get("group", "").strip()),
                          (f"--group_regex {group_regex}", captured)):
            if name and line.path:
                ways.add(way)
                own[line.path].add(name)
                low, high = min(map(top, own[line.path])), max(map(top, own[line.path]))  # two at most: others are one
                above[high] = low
    if group_regex and not any(way.startswith("--") for way in ways):
        raise ValueError(f"--group_regex {group_regex!r}: its first (capture) is the group, but it captures nothing in "
                         f"any image_path, as in {lines[0].cells['image_path']!r}")
    groups = {path: top(min(names)) if names else os.path.relpath(path, root) for path, names in own.items()}
    grouped, grouped_by = sum(map(bool, own.values())), " and ".join(sorted(ways, reverse=True)) or lists.IMAGE_GROUPS
    if 0 < grouped < len(own):
        grouped_by += f", {grouped:,} of {len(own):,} images; the others are each their own"
    return groups, grouped_by


def read_groups(path, tasks, other=None):
    """{a task's name: its clinical group} of the Tasks `tasks`, by a CSV task,group, which may list others, too. other:
    the group of those that it does not list; None: there must be none."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; expected a CSV task,group")
    columns, delimiter = lists.csv_columns(path)
    if columns is None or {*columns} != {"task", "group"}:
        raise ValueError(f"{path}: columns are {','.join(columns or ['none'])}; expected task,group")
    groups = {}
    for line, row in lists.read_csv(path, columns, delimiter, columns):
        if groups.setdefault(row["task"].strip(), row) is not row:
            raise ValueError(f"{path}, line {line}: {row['task']} is listed twice; remove one of them")
    missing = [task.name for task in tasks if task.name not in groups]
    if missing and other is None:
        raise ValueError(f"{path}: has no group of {', '.join(missing)}; add a line TASK,GROUP, as {missing[0]},Other")
    return {task.name: groups[task.name]["group"].strip() if task.name in groups else other for task in tasks}


# ---------------------------------------------------------------- train, val and test

def _splits(lines, groups):
    """{path: split} as the lines name it, or None where they do not; ValueError for an image or a group in two."""
    if lines[0].split is None:
        return None
    home = {}
    for line in lines:
        other = home.setdefault(groups[line.path], line)
        if other.split != line.split:
            raise ValueError(f"{other.where} puts {other.path} into {other.split}, and {line.where} {line.path} into "
                             f"{line.split}: an image or a group, here {groups[line.path]!r}, must not be in two")
    return {line.path: line.split for line in lines}


def split_tasks(found, seed, val, test):
    """The split of each image, "train", "val" or "test" (None: no task has it), and sentences on classes that lack one.

    As split_groups says: shares of the groups, drawn at once over all tasks, alike in each of them and in each
    class of a classification; or what the CSVs say. So no image and no group is in two, whatever task it serves.
    ValueError for a task that has no image in one of the three, or a class in val or test that is not in train.
    """
    images = np.concatenate([found.rows[task.name].images for task in found.tasks]).tolist()  # a row for each use
    labels = [f"{task.name} {label}" for task in found.tasks for label in (
        found.rows[task.name].targets if task.kind == "classification" else [""] * len(found.rows[task.name].images))]
    drawn = split_groups(LabelledSet(
        None, [found.names[i] for i in images], labels, [found.groups[i] for i in images],
        found.splits and [found.splits[i] for i in images], {}, found.grouped_by), seed, val, test)
    of_image, notes = dict(zip(images, drawn)), []
    splits = [of_image.get(i) for i in range(len(found.names))]
    for task in found.tasks:
        rows = found.rows[task.name]
        there = np.array([splits[i] for i in rows.images])
        for split in SPLITS:
            if split not in there:
                groups = len({found.groups[i] for i in rows.images})
                raise ValueError(f"task {task.name} has no {split} image: its groups, {groups} by {found.grouped_by}, "
                                 f"do not fill train, val and test; give it more, or leave the task out")
        for label in range(task.K) if task.kind == "classification" else ():
            own = {*there[rows.targets == label]}
            if own and "train" not in own:
                raise ValueError(f"class {label} of {task.name} has no train image, so that it cannot be learned; give "
                                 f"train images of it, or leave the task out")
            notes += [f"class {label} of {task.name} has no {split} image" for split in SPLITS
                      if split not in own]
    return splits, notes
