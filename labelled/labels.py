"""Classification sets, folders or CSVs or FETAL_PLANES_DB as downloaded: label, group and split of each image."""

import os
import re
from collections import namedtuple

from frames.lists import (OWN_GROUP, csv_columns, dicom_groups, excluded, folder_groups, is_folder, need_pydicom,
                          nothing_found, read_csv, regex_groups, walk)
from labelled.splits import SPLIT_WORDS

# FETAL_PLANES_DB as downloaded (Zenodo 3904280): its table lies beside a folder Images
PLANES_TABLE, PLANES_SPLIT_WORDS = "FETAL_PLANES_DB_data.csv", {"1": "train", "0": "test"}
PLANES_COLUMNS = {"image": "Image_name", "label": "Plane", "group": "Patient_num", "split": "Train"}
MASK = re.compile(r"(.+)(_mask(?:_\d+)?)", re.IGNORECASE | re.DOTALL)  # stem of an image and what its mask's adds to it

# paths, names, groups, grouped_by: as of lists.ImageList; labels: strings; splits: "train", "val" or "test" of each, or
# None where the source names none; columns: {name: strings}, what read_labelled's `by` asked for
LabelledSet = namedtuple("LabelledSet", "paths names labels groups splits columns grouped_by")


def has_labels(source):
    """Whether read_labelled, not list_images, is what reads all there is in a CSV or a folder."""
    if os.path.isdir(source):
        return os.path.exists(os.path.join(source, PLANES_TABLE))
    columns = csv_columns(source)[0] if os.path.exists(source) else None
    return columns is not None and ("label" in columns or _is_planes(columns))


def _is_planes(columns):
    return {*PLANES_COLUMNS.values()} <= {*columns}


def read_labelled(source, exclude=(), group_regex=None, by=()):
    """A LabelledSet of a folder with a folder per class, perhaps inside folders train, val and test; of a CSV
    `image,label[,group][,split]`, with the further columns that `by` names (None: any, unread); or of FETAL_PLANES_DB.

    A group is what list_images says, but a class folder is no group: what lies below it is; and `group_regex` beside a
    group column is an error. Of FETAL_PLANES_DB it is the patient, called as in the images' names: a bare number would
    be any other set's patient, too.
    Raises ValueError with one sentence that says what is wrong and in which line.
    """
    source = os.path.join(source, PLANES_TABLE) if os.path.isdir(source) and has_labels(source) else source
    folder = is_folder(source)
    if folder and by:
        raise ValueError(f"--by {' '.join(by)}: {source} is a folder, which has no columns; give a CSV that has them")
    rows = list(_read_folders(source, exclude) if folder else _read_labels(source, exclude, group_regex, by))
    if not rows:
        raise nothing_found(source, exclude)
    lines, names, labels, groups, splits, values = map(list, zip(*rows))
    root = source if folder else os.path.dirname(source)
    paths = [os.path.join(root, name) for name in names]
    _check_files(source, paths, lines)
    need_pydicom(paths)
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
