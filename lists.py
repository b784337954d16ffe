"""Which image files there are, and what is known of each: its group, its label, its split."""

import csv
import fnmatch
import importlib.util
import os
import re
from collections import namedtuple

import numpy as np

import dicom
from images import IMAGE_SUFFIXES, is_dicom_file

OWN_GROUP = "(each image is its own group)"
IMAGE_GROUPS = f"image {OWN_GROUP}"
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}  # of a column or of folders, in any case
# FETAL_PLANES_DB as downloaded (Zenodo 3904280): its table lies beside a folder Images
PLANES_TABLE, PLANES_SPLIT_WORDS = "FETAL_PLANES_DB_data.csv", {"1": "train", "0": "test"}
PLANES_COLUMNS = {"image": "Image_name", "label": "Plane", "group": "Patient_num", "split": "Train"}
MASK = re.compile(r"(.+)(_mask(?:_\d+)?)", re.IGNORECASE | re.DOTALL)  # stem of an image and what its mask's adds to it
DRAWS = 100  # of splits, at most, until every class reaches all of them


# ---------------------------------------------------------------- unlabelled: what a pack is made of

# paths: where to open; names: relative to the source, shown to the user; groups: one string per file, never split
# between train and test; grouped_by: how groups were found, in words; closed: (folder, reason) of folders that could
# not be opened
ImageList = namedtuple("ImageList", "paths names groups grouped_by closed")


def list_images(sources, exclude=(), group_regex=None, more=()):
    """Files of recursive folders (images, DICOM and suffixes in `more`), text lists (a path per line), CSVs (`image[,label][,group]`) or single files; one
    source or a list of them.

    A group is a patient, an examination or a clip: the CSV's `group` column, else the first capture of
    `group_regex` in the name, else the parent folder. When that leaves a single group, each file is a group of its own.
    With several sources, names and parent folders start with the source's name.
    Raises ValueError with one sentence that says what is wrong and where.
    """
    sources = [sources] if isinstance(sources, str) else sources
    roots, names, groups, closed = [], [], [], []
    for source, prefix in zip(sources, _prefixes(sources)):
        folder = _is_folder(source)
        if folder:
            rows = ((name, None) for name in walk(source, closed, IMAGE_SUFFIXES + dicom.SUFFIXES + more))
        elif source.lower().endswith(IMAGE_SUFFIXES + more) or is_dicom_file(source):
            rows = [(os.path.basename(source), None)]
        else:
            rows = _read_list(source)
        root = source if folder else os.path.dirname(source), prefix
        for name, group in rows:
            if not excluded(name, exclude):
                roots.append(root)
                names.append(name)
                groups.append(group)
    if not names:
        raise _nothing_found(", ".join(sources), exclude, closed)
    paths = [os.path.join(root, name) for (root, _), name in zip(roots, names)]
    _need_pydicom(paths)
    names = [os.path.join(prefix, name) for (_, prefix), name in zip(roots, names)]
    if all(groups):
        grouped_by = "group column"
    elif any(groups):
        raise ValueError(f"{', '.join(sources)}: some have a group column and some have none; give all of them one")
    elif group_regex:
        groups, grouped_by = regex_groups(names, group_regex), f"--group_regex {group_regex}"
    else:
        groups, grouped_by = folder_groups(names, [os.path.dirname(name) for name in names])
    return ImageList(paths, names, groups, grouped_by, closed)


def groups_have_names(grouped_by):
    """Whether a group's name is a patient's, an examination's or a clip's: folders elsewhere can be called alike."""
    return grouped_by.startswith(("group column", "--group_regex", "DICOM"))


def dicom_groups(images):
    """A list whose groups are DICOM's patients, or studies where all patients are called alike; files that name neither
    keep their group. A group column or --group_regex goes first."""
    if images.grouped_by not in ("parent folder", IMAGE_GROUPS) or not any(map(is_dicom_file, images.paths)):
        return images
    files = [dicom.open_dicom(path) if is_dicom_file(path) else None for path in images.paths]
    kind = "patient" if len({file.patient for file in files if file}) > 1 else "study"
    groups = [file and (getattr(file, kind) or file.patient or file.study) or group
              for file, group in zip(files, images.groups)]
    words = f"DICOM {kind}" if all(files) else f"DICOM {kind}, else {images.grouped_by}"
    return images._replace(groups=groups, grouped_by=words)


# ---------------------------------------------------------------- labelled: what a classifier learns and is tested on

# paths, names, groups, grouped_by: as above; labels: strings; splits: one of SPLITS each, or None where the source
# names none; columns: {name: strings}, what read_labelled's `by` asked for
LabelledSet = namedtuple("LabelledSet", "paths names labels groups splits columns grouped_by")


def has_labels(source):
    """Whether read_labelled, not list_images, is what reads all there is in a CSV or a folder."""
    if os.path.isdir(source):
        return os.path.exists(os.path.join(source, PLANES_TABLE))
    columns = csv_columns(source)[0] if os.path.exists(source) else None
    return columns is not None and ("label" in columns or _is_planes(columns))


def read_labelled(source, exclude=(), group_regex=None, by=()):
    """A LabelledSet of a folder with a folder per class, perhaps inside folders train, val and test; of a CSV
    `image,label[,group][,split]`, with the further columns that `by` names (None: any, unread); or of FETAL_PLANES_DB.

    A group is what list_images says, but a class folder is no group: what lies below it is; and `group_regex` beside a
    group column is an error. Of FETAL_PLANES_DB it is the patient, called as in the images' names: a bare number would
    be any other set's patient, too.
    Raises ValueError with one sentence that says what is wrong and in which line.
    """
    source = os.path.join(source, PLANES_TABLE) if os.path.isdir(source) and has_labels(source) else source
    folder = _is_folder(source)
    if folder and by:
        raise ValueError(f"--by {' '.join(by)}: {source} is a folder, which has no columns; give a CSV that has them")
    rows = list(_read_folders(source, exclude) if folder else _read_labels(source, exclude, group_regex, by))
    if not rows:
        raise _nothing_found(source, exclude)
    lines, names, labels, groups, splits, values = map(list, zip(*rows))
    root = source if folder else os.path.dirname(source)
    paths = [os.path.join(root, name) for name in names]
    _check_files(source, paths, lines)
    _need_pydicom(paths)
    splits = splits if all(splits) else None
    if all(groups):  # as many groups as images are hardly patients: reports say so
        grouped_by = f"group column {OWN_GROUP}" if len({*groups}) == len(groups) else "group column"
    elif group_regex:
        groups, grouped_by = regex_groups(names, group_regex), f"--group_regex {group_regex}"
    else:
        groups, grouped_by = folder_groups(names, _below_classes(names, labels, folder, splits))
    columns = {column: [row[column] for row in values] for column in by or ()}
    return dicom_groups(LabelledSet(paths, names, labels, groups, splits, columns, grouped_by))


def _read_folders(top, exclude):
    """Rows (None, name, label, None, split, None) of a folder of class folders, or of one of train, val and test."""
    closed = []
    names = [name for name in walk(top, closed) if not excluded(name, exclude)]
    for folder, reason in closed:
        raise ValueError(f"{folder}: cannot be opened ({reason}), and a labelled set must be whole")
    parts = [name.split(os.sep) for name in names]
    splits = [SPLIT_WORDS.get(part[0].lower()) for part in parts]
    depth = 1 if all(splits) else 0  # of the class's folder
    for name, part, split in zip(names, parts, splits):
        if not split and {"train", "test"} <= {*splits}:
            raise ValueError(f"{os.path.join(top, part[0])}: stands beside train and test; these must be all there is, "
                             f"or a folder per class")
        if len(part) < depth + 2:
            above = os.path.join(top, *part[:-1])
            raise ValueError(f"{os.path.join(top, name)}: not in a class folder; expected "
                             f"{os.path.join(above, 'CLASS', 'image')}, or a CSV with the columns image,label[,group]")
    _check_masks(top, names)
    for name, part, split in zip(names, parts, splits):
        yield None, name, part[depth], None, split if depth else None, None


def _check_masks(top, names):
    """ValueError where X_mask or X_mask_1 stands beside the image X: a mask shows the label, and is no image."""
    stems, masks = {os.path.splitext(name)[0] for name in names}, {}
    for name in names:
        stem, suffix = os.path.splitext(name)
        match = MASK.fullmatch(stem)
        if match and match[1] in stems:
            masks.setdefault("'*" + re.sub(r"\d+", "*", match[2]) + suffix + "'", name)
    if masks:
        first = os.path.join(top, next(iter(masks.values())))
        raise ValueError(f"{first}: a mask beside its image, and no image; leave masks out with --exclude "
                         f"{' '.join(masks)}")


def _read_labels(path, exclude, group_regex, by):
    """Rows (line, name, label, group, split, {column: text}) of a CSV; group, split None where there is no column."""
    columns, delimiter = csv_columns(path)
    if columns is None:
        raise ValueError(f"{path}: labels need a folder per class or a .csv with the columns image,label")
    planes = _is_planes(columns)
    known = {name: PLANES_COLUMNS[name] if planes else name for name in ("image", "label", "group", "split")}
    known = {name: column for name, column in known.items() if column in columns}
    unknown = [] if planes or by is None else [name for name in columns if name not in (*known, *by)]
    if unknown or not {"image", "label"} <= known.keys():
        raise ValueError(f"{path}: columns are {','.join(columns)}; expected image,label[,group][,split]"
                         + "".join(f": name {name!r} in --by, or remove it" for name in unknown[:1]))
    for name in by or ():
        if name not in columns:
            raise ValueError(f"--by {name}: {path} has no such column; there are {', '.join(columns)}")
    if group_regex and "group" in known:
        raise ValueError(f"--group_regex {group_regex}: {path} names groups in its column {known['group']}; drop "
                         f"--group_regex" + ("" if planes else ", or the column"))
    words = PLANES_SPLIT_WORDS if planes else SPLIT_WORDS
    for line, row in read_csv(path, columns, delimiter, [*known.values(), *(by or ())]):
        found = {name: row[column].strip() for name, column in known.items()}
        if "split" in found and found["split"].lower() not in words:
            raise ValueError(f"{path}, line {line}: {known['split']} is {found['split']!r}, expected one of "
                             f"{', '.join(words)}")
        split, group, name = words.get(found.get("split", "").lower()), found.get("group"), row[known["image"]]
        if planes:
            name, group = os.path.join("Images", f"{found['image']}.png"), f"Patient{group.zfill(5)}"
        if not excluded(name, exclude):
            yield line, name, found["label"], group, split, {column: text.strip() for column, text in row.items()}


def _check_files(source, paths, lines):
    """Every file is there, and once."""
    first = {}
    for path, line in zip(paths, lines):
        try:
            os.stat(path)
        except OSError as error:
            where = f"{source}, line {line}: " if line else ""
            raise ValueError(f"{where}{path} ({error.strerror}); mend the path, which starts from the list's folder, "
                             f"or leave it out with --exclude")
        earlier = first.setdefault(os.path.normpath(path), line)
        if earlier != line:
            raise ValueError(f"{source}, lines {earlier} and {line}: {path} is listed twice; remove one of them")


def _below_classes(names, labels, folder, splits):
    """What lies between the folder of an image's class and the image, for a patient can be in several classes; the
    parent folder where classes have no folders."""
    parents = [os.path.dirname(name).split(os.sep) for name in names]
    if folder:
        depths = [2 if splits else 1] * len(names)
    elif all(label in parent for label, parent in zip(labels, parents)):
        depths = [parent.index(label) + 1 for label, parent in zip(labels, parents)]
    else:
        groups = [os.path.dirname(name) for name in names]
        folders, classes = len({*groups}), len({*labels})
        return names if folders == len({*zip(groups, labels)}) == classes else groups  # class folders of another name
    return [os.sep.join(parent[depth:]) or name for name, parent, depth in zip(names, parents, depths)]


# ---------------------------------------------------------------- train, val and test

def split_groups(labelled, seed=0, val=0.2, test=0.2):
    """The split of each image, "train", "val" or "test": what the source says, and what it leaves open drawn by group.

    Without splits, shares `val` and `test` of the groups are drawn; with train and test, a share `val` of train's
    groups. Depends on `seed`, group names and labels only, not on the files' order.
    """
    if min(val, test) <= 0 or val + test >= 1:
        raise ValueError(f"shares of val and test groups must be above 0 and leave some to train, not {val} and {test}")
    if labelled.splits is None:
        return _draw(labelled.groups, labelled.labels, seed, {"train": 1 - val - test, "test": test, "val": val})
    there = [split for split in SPLITS if split in labelled.splits]
    for needed in ("train", "test"):
        if needed not in there:
            raise ValueError(f"the splits name {' and '.join(there)} but no {needed} images; name some, or leave the "
                             f"splits out to have all of them drawn")
    if "val" in there:
        return list(labelled.splits)
    drawn, splits = np.flatnonzero(np.array(labelled.splits) == "train"), np.array(labelled.splits)
    groups, labels = ([texts[i] for i in drawn] for texts in (labelled.groups, labelled.labels))
    splits[drawn] = _draw(groups, labels, seed, {"train": 1 - val, "val": val})
    return splits.tolist()


def _draw(groups, labels, seed, shares):
    """Splits {name: share of the groups}, the one that needs a class most first -> the name for each image.

    Several draws where groups hold several classes and a first one leaves a class out of a split.
    """
    groups, labels = (np.unique(texts, return_inverse=True)[1] for texts in (groups, labels))
    has = np.zeros((groups.max() + 1, labels.max() + 1), bool)  # (G, K)
    has[groups, labels] = True
    best, fewest, unavoidable = None, np.inf, np.maximum(len(shares) - has.sum(0), 0).sum()
    for draw in range(DRAWS):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, draw])))
        drawn = _stratify(has, list(shares.values()), rng)
        missing = [~has[drawn == split].any(0) for split in range(len(shares))]  # bool (K,) each
        weight = 1000 * missing[0].sum() + sum(classes.sum() for classes in missing[1:])  # no training: an error
        if weight < fewest:
            best, fewest = drawn, weight
        if fewest == unavoidable:
            break
    return np.array(list(shares))[best[groups]].tolist()


def _stratify(has, shares, rng):
    """Split number (G,) of groups that hold classes (G, K) bool: iterative stratification (Sechidis et al. 2011).

    The classes of fewest groups go first. Of a class, each split gets a group, as long as there are groups; then a
    group goes where most of this class are wanting, then where most groups are.
    """
    drawn, order, splits = np.full(len(has), -1), rng.permutation(len(has)), range(len(shares))
    wanted = np.outer(shares, has.sum(0))  # (S, K) groups
    reached = np.zeros(wanted.shape, bool)
    room = np.array(shares) * len(has)
    for k in np.argsort(has.sum(0), kind="stable"):
        for group in order[has[order, k] & (drawn[order] < 0)]:
            split = max(splits, key=lambda s: (not reached[s, k], wanted[s, k] if reached[s, k] else -s, room[s]))
            drawn[group] = split
            wanted[split] -= has[group]
            reached[split] |= has[group]
            room[split] -= 1
    return drawn


def check_splits(labelled, splits):
    """Sentences on classes that val or test lack, for the caller to print; ValueError for splits that prove nothing:
    a group in two of them, an empty one, a class that is not in train, one class only."""
    home = {}
    for group, split, name in zip(labelled.groups, splits, labelled.names):
        other, there = home.setdefault(group, (split, name))
        if other != split:
            raise ValueError(f"group {group!r} is in {other} ({there}) and in {split} ({name}): splits must not share "
                             f"a group; mend the splits, or name groups by --group_regex or a group column")
    classes = {split: {label for label, own in zip(labelled.labels, splits) if own == split} for split in SPLITS}
    every = sorted(set(labelled.labels))
    if len(every) < 2:
        raise ValueError(f"all images are of one class, {every[0]!r}: a classifier needs two or more")
    for split in SPLITS:
        if not classes[split]:
            raise ValueError(f"no image is in {split}: {len(home)} groups by {labelled.grouped_by} do not fill train, "
                             f"val and test")
    for label in every:
        if label not in classes["train"]:
            name, split = next((name, split) for name, split, own in zip(labelled.names, splits, labelled.labels)
                               if own == label)
            raise ValueError(f"class {label!r} is in {split} ({name}) but not in train: it cannot be learned; give "
                             f"train images of it, or leave it out")
    return [f"class {label!r} has no {split} image"
            for split in SPLITS for label in every if label not in classes[split]]


# ---------------------------------------------------------------- reading folders and lists

def _is_folder(source):
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or folder")
    if os.path.exists(os.path.join(source, "pack.json")):
        raise ValueError(f"{source} is a pack, not a source of images")
    return os.path.isdir(source)


def excluded(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _nothing_found(sources, exclude, closed=()):
    return ValueError(f"{sources}: no images found ({', '.join(IMAGE_SUFFIXES)}, DICOM)"
                      + (f"; excluded: {' '.join(exclude)}" if exclude else "")
                      + "".join(f"; {name}: {reason}" for name, reason in closed[:1]))


def _need_pydicom(paths):
    if importlib.util.find_spec("pydicom") is None:
        for path in filter(is_dicom_file, paths):
            raise ValueError(f"{path} is DICOM: reading it needs pydicom (pip install pydicom); or --exclude such "
                             f"files")


def _prefixes(sources):
    """What tells names of several sources apart: the last part of their paths, or all of it where two are alike."""
    if len(sources) == 1:
        return [""]
    last = [os.path.basename(os.path.abspath(source)) for source in sources]
    whole = [os.path.abspath(source).lstrip(os.sep) for source in sources]
    if len(set(whole)) < len(whole):
        raise ValueError(f"a source is given twice: {' '.join(sources)}")
    return last if len(set(last)) == len(last) else whole


def walk(top, closed, suffixes=IMAGE_SUFFIXES + dicom.SUFFIXES):
    """Yield the names of a folder's images; links to folders are followed, but no folder is entered twice.

    What cannot be opened is noted in the list `closed`: (folder, reason).
    """
    def note(error):
        closed.append((error.filename, error.strerror))

    seen, start = set(), len(os.path.join(top, ""))
    for parent, folders, files in os.walk(top, followlinks=True, onerror=note):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we came from, or to what was read already
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for file in sorted(files):
            suffix = os.path.splitext(file)[1].lower()
            if file.startswith(".") or not (suffix in suffixes or (
                    not suffix.strip(".0123456789") and os.path.isfile(os.path.join(parent, file))
                    and dicom.is_dicom(os.path.join(parent, file)))):
                continue
            yield os.path.join(parent, file)[start:]


def _read_list(path):
    """Yield (name, group) of a text list's or CSV's lines; group is None where there is no column."""
    columns, delimiter = csv_columns(path)
    if columns is None:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            yield from ((line.rstrip("\r\n"), None) for line in file if line.strip())
        return
    if not {"image"} <= {*columns} <= {"image", "label", "group"}:
        raise ValueError(f"{path}: columns are {','.join(columns)}; expected image[,group]")
    for _, row in read_csv(path, columns, delimiter, columns):
        yield row["image"], row["group"].strip() if "group" in row else None


def csv_columns(path):
    """(column names, delimiter) of a CSV; (None, None) for a list of a path per line, such as UltraDINO's
    train_paths_2m.csv, which has no header."""
    if not path.lower().endswith(".csv"):
        return None, None
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        first = file.readline()
    delimiter = max(",;", key=first.count)  # Excel writes ; where a comma is the decimal sign
    if delimiter not in first and first.strip().strip('"') != "image":
        return None, None
    columns = [name.strip() for name in next(csv.reader([first], delimiter=delimiter))]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path}: columns are {','.join(columns)}; each must be there once")
    return columns, delimiter


def _is_planes(columns):
    return {*PLANES_COLUMNS.values()} <= {*columns}


def read_csv(path, columns, delimiter, needed):
    """Yield (line, {column: text}) of a CSV's rows, in which `needed` columns must be filled."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter=delimiter)
        try:
            next(reader)
            for values in reader:
                if not "".join(values).strip():  # an empty line
                    continue
                if len(values) != len(columns):
                    raise ValueError(f"{path}, line {reader.line_num}: expected {len(columns)} columns, got {values}")
                row = dict(zip(columns, values))
                for column in needed:
                    if not row[column].strip():
                        raise ValueError(f"{path}, line {reader.line_num}: no {column} in {values}")
                yield reader.line_num, row
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; does a quotation mark lack its end?")


def folder_groups(names, groups):
    """Groups by folders, how they were found; where all images are in one folder, each is its own group."""
    if len(set(groups)) == 1 or set(groups) == set(names):
        return names, IMAGE_GROUPS
    return groups, "parent folder"


def regex_groups(names, pattern):
    try:
        pattern = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--group_regex {pattern!r}: {error}")
    groups = []
    for name in names:
        match = pattern.search(name)
        if not match or not match.groups() or not match.group(1):
            failure = "has no (capture) in" if match else "does not match"
            raise ValueError(f"--group_regex {pattern.pattern!r} {failure} {name!r}")
        groups.append(match.group(1))
    return groups
