"""Segmentation sets: which image has which masks, what their pixel values mean, how large a pixel is.

    found = read_masked("busi")                 # understands what UNDERSTOOD says; found.layout is what it took it for
    splits, notes = split_masked(found, classes_present(found))
    image, mask = read_masked_image(found, 0).grey, read_mask(found, 0)  # uint8 (h, w); class numbers, 0 is background

A mask's values are grey levels, palette indices or colours. Everything is looked at once, when a set is read: a missing
mask, one of another size or a value in no class is a ValueError that names the file. FASS's pickles run no code.
"""

import concurrent.futures
import fnmatch
import math
import os
import re
import sys
from collections import namedtuple

import numpy as np
from tqdm import tqdm

from frames import dicom, lists
from frames.images import IMAGE_SUFFIXES
from labelled.labels import MASK, LabelledSet
from labelled.mask_codes import (META_SUFFIXES, choose_classes, class_numbers, pixels_text, read_codes, read_whole,
                                 size_and_mm, told)
from labelled.splits import SPLIT_WORDS, check_splits, split_groups

SUFFIXES = IMAGE_SUFFIXES + dicom.SUFFIXES + META_SUFFIXES + (".npy",)
IMAGE_FOLDERS = {"image", "images", "img", "imgs", "image_mha", "images_mha"}  # in any case
MASK_FOLDERS = {"mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentations",
                "label_mha", "labels_mha", "array_format"}
ENHANCED = "mask_enhance"  # JNU-IFM's masks in colour, for looking at
MASK_SUFFIX = re.compile(r"(.+)_(?:mask|segmentation|annotation|label|gt)(?:_\d+)?", re.IGNORECASE | re.DOTALL)
FASS, JNU, HC18 = "FASS as downloaded", "JNU-IFM as downloaded", "HC18"
FASS_CLASSES = ["artery=1", "liver=2", "stomach=3", "vein=4"]  # UltraDINO's order
JNU_CLASSES, JNU_VIDEO = ["pubic symphysis=7", "head=8"], re.compile(r"(\d{8}T\d{6}.*)_\d+")
HC18_CLASSES, HC18_HEAD = ["head=1,255"], re.compile(r"(\d+)_\d*HC", re.IGNORECASE)
HC18_TABLE = "training_set_pixel_size_and_HC.csv"
MIN_FOLDERS = 9  # fewer are no patients: three for each of train, val and test
UNDERSTOOD = ("folders images and masks (or labels, annotations, ...; within train, val and test too); --data IMAGES "
              "--masks MASKS; X_mask.png beside X.png; --mask_pattern '{}_gt*.png', {} being the image's name; as "
              f"downloaded: FASS (IMAGES, ARRAY_FORMAT), JNU-IFM (image, mask), HC18 (training_set, {HC18_TABLE})")

# paths, names: n image files, and their names below the source; masks: of each, a tuple of the files that hold its
# mask; splits: "train", "val" or "test" of each, or None; classes: K names, "background" first; values: {pixel value or
# (r, g, b): class number}; mm: float64 (n, 2), of a pixel, across and down, nan where unknown; circumference: float64
# (n,) mm, measured by hand, or None; layout: in words; present: bool (n, K), or None where it is not known yet
MaskedSet = namedtuple("MaskedSet", "paths names masks groups splits classes values mm circumference grouped_by layout "
                                    "present", defaults=(None,))


def read_masked(data, masks=None, mask_pattern=None, classes=None, exclude=(), group_regex=None, split=None,
                pixel_sizes=None):
    """The MaskedSet of a folder. data, masks: folders; mask_pattern: a glob with {}; classes: words of parse_classes;
    split: a CSV image,split[,group]; pixel_sizes: a CSV image,mm or image,mm_x,mm_y.

    A group is the CSV's, group_regex's, the patient of FASS, JNU-IFM's video, HC18's examination or DICOM's patient;
    else the parent folder, unless there are fewer than MIN_FOLDERS: then each image is its own.
    Raises ValueError with one sentence that says what is wrong and where.
    """
    for folder in filter(None, (data, masks)):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder}: no such folder; a set with masks is a folder")
    if mask_pattern and (mask_pattern.count("{}") != 1 or re.search(r"[*?[]", mask_pattern.split("{}")[0])):
        raise ValueError(f"--mask_pattern {mask_pattern!r}: expected the image's name as {{}}, once, and *, ? after it "
                         f"only, as in '{{}}_mask*.png'")
    images, found, layout, table = _find(data, masks, mask_pattern)
    found = {path: at for path, at in found.items()
             if not lists.excluded(os.path.relpath(path, masks or data), exclude)}
    owned = _pair(data, images, found, mask_pattern)  # of excluded images too: their masks are no strays
    names, notes = [name for name in sorted(images) if not lists.excluded(name, exclude)], []
    if not names:
        raise ValueError(f"{data}: no image that could have a mask; understood are {UNDERSTOOD}"
                         + (f"; excluded: {' '.join(exclude)}" if exclude else ""))
    splits, own_groups = None if split else _split_folders(data, [images[name][0] for name in names]), None
    if split:
        listed = _read_split(split, {*names})
        if len(listed) < len(names):
            notes = [f"{len(names) - len(listed):,} of {len(names):,} images left out, which {split} does not list"]
        names = [name for name in names if name in listed]
        splits, own_groups = map(list, zip(*(listed[name] for name in names)))
    for name in names:
        if not owned[name]:
            raise ValueError(f"{os.path.join(data, name)}: has no mask; add it, or leave the image out with --exclude")
    files = [tuple(owned[name]) for name in names]
    if layout.startswith(HC18):  # a filled mask, where there is one, goes before the outline
        files = [tuple(path for path in own if not _is_outline(path)) or own for own in files]
        notes.append("outlines filled" if any(_is_outline(path) for own in files for path in own) else "filled masks")
    paths, colours = [os.path.join(data, name) for name in names], any("#" in word for word in classes or ())
    mm, levels = _look_at_all(paths, files, colours, layout)
    default = next((own for own, name in ((FASS_CLASSES, FASS), (HC18_CLASSES, HC18)) if layout.startswith(name)), None)
    videos = [JNU_VIDEO.fullmatch(_stem(os.path.basename(name))) for name in names]
    if all(videos) and {7, 8} & set().union(*(own for of_image in levels for own in of_image)):
        layout, default = JNU, JNU_CLASSES
    classes, values = choose_classes(classes or default, files, levels)
    groups, grouped_by, note = _groups(names, [images[name][0] for name in names], own_groups, group_regex, splits,
                                       layout, videos)
    mm, circumference = _pixel_sizes(table, names, mm)
    mm, measured = _pixel_sizes(pixel_sizes, names, mm)
    circumference = circumference if measured is None else measured
    layout = "; ".join([layout, *notes, *([note] if note else [])])
    found = MaskedSet(paths, names, files, groups, splits, classes, values, mm, circumference, grouped_by, layout)
    return lists.dicom_groups(found._replace(present=_present(found, levels)))


# ---------------------------------------------------------------- layouts: which files are images, which are masks

def _find(data, masks, pattern):
    """({image's name: (folder, stem)}, {mask's path: (folder, file)}, layout, HC18's table or None).

    Folder and stem are what an image and its mask share.
    """
    names, top = _walk(data), os.path.abspath(data)
    split = {name: os.path.split(name) for name in names}
    if masks:
        inside = os.path.relpath(os.path.abspath(masks), top) + os.sep
        images = {name: (folder, _stem(file)) for name, (folder, file) in split.items()
                  if not name.startswith(inside) and not name.endswith(".npy")}
        found = {os.path.join(masks, name): os.path.split(name) for name in _walk(masks)}
        return images, found, FASS if any(path.endswith(".npy") for path in found) else "two folders", None
    table = _hc18_table(data)
    if table:
        own = {name: at for name, at in split.items() if not name.startswith("test_set" + os.sep)}
        images = {name: (folder, _stem(file)) for name, (folder, file) in own.items()
                  if HC18_HEAD.fullmatch(_stem(file))}
        found = {os.path.join(data, name): at for name, at in own.items() if MASK_SUFFIX.fullmatch(_stem(at[1]))}
        return images, found, HC18, table
    sides = {name: _side(folder.split(os.sep)) for name, (folder, _) in split.items()}
    if {"image", "mask"} <= {side for side, _ in sides.values()}:
        images = {name: (folder, _stem(split[name][1])) for name, (side, folder) in sides.items()
                  if side == "image" and not name.endswith(".npy")}
        found = {os.path.join(data, name): (folder, split[name][1]) for name, (side, folder) in sides.items()
                 if side == "mask"}
        other = len(names) - len(images) - len(found)
        layout = FASS if any(path.endswith(".npy") for path in found) else "two folders"
        return images, found, layout + (f", other files: {other:,}" if other else ""), None
    found = {os.path.join(data, name): at for name, at in split.items() if (
        any(_stems(at[1], pattern)) if pattern else MASK.fullmatch(_stem(at[1])))}
    if not found:
        raise ValueError(f"{data}: no masks found; understood are {UNDERSTOOD}")
    images = {name: (folder, _stem(file)) for name, (folder, file) in split.items()
              if os.path.join(data, name) not in found and not name.endswith(".npy")}
    return images, found, f"masks beside images, {pattern or 'X_mask beside X'}", None


def _hc18_table(data):
    """HC18's table, if the folder is its top or its training_set."""
    above, name = os.path.split(os.path.abspath(data))
    for folder in [data, os.path.join(data, "training_set")] + [above] * (name == "training_set"):
        if os.path.isfile(os.path.join(folder, HC18_TABLE)):
            return os.path.join(folder, HC18_TABLE)
    return None


def _walk(top):
    closed = []
    names = [name for name in lists.walk(top, closed, SUFFIXES) if ENHANCED not in name.lower().split(os.sep)]
    for folder, reason in closed:
        raise ValueError(f"{folder}: cannot be opened ({reason}), and a set with masks must be whole")
    return names


def _side(parts):
    """("image" or "mask", the folder without the part that says so), by the deepest such part; (None, None) without."""
    for at in reversed(range(len(parts))):
        for side, words in (("image", IMAGE_FOLDERS), ("mask", MASK_FOLDERS)):
            if parts[at].lower() in words:
                return side, os.sep.join(parts[:at] + parts[at + 1:])
    return None, None


def _stem(file):
    """A file's name without its suffix; the dots of a DICOM's number are none."""
    stem, suffix = os.path.splitext(file)
    return stem if suffix.lower() in SUFFIXES else file


def _stems(file, pattern):
    """What a mask's image may be called, likeliest first."""
    if not pattern:
        match = MASK_SUFFIX.fullmatch(_stem(file))
        yield from (_stem(file), match[1]) if match else (_stem(file),)
        return
    head, tail = pattern.split("{}")
    tail = re.compile(fnmatch.translate(tail))
    if file.startswith(head):
        yield from (file[len(head):end] for end in range(len(file), len(head), -1) if tail.match(file[end:]))


def _pair(data, images, mask_files, pattern):
    """{image's name: the paths of its masks}; none may be left over."""
    owners, found = {}, {name: [] for name in images}
    for name, key in images.items():
        if owners.setdefault(key, name) != name:
            raise ValueError(f"{os.path.join(data, name)}: called as {owners[key]}, so that a mask could be of either; "
                             f"rename one, or leave it out of the folder")
    for path, (folder, file) in sorted(mask_files.items()):
        name = next((owners[folder, stem] for stem in _stems(file, pattern) if (folder, stem) in owners), None)
        if name is None:
            likely = [*_stems(file, pattern), file][0 if pattern else -2]
            raise ValueError(f"{path}: a mask without an image, which would be called {likely}; add it, or leave the "
                             f"mask out with --exclude")
        found[name].append(path)
    return found


def _is_outline(path):
    return _stem(path).lower().endswith("_annotation")


# ---------------------------------------------------------------- what CSVs and names say of images

def _split_folders(data, folders):
    """The split of each image where the first folders are train, val and test; else None."""
    first = [folder.split(os.sep)[0] for folder in folders]
    splits = [SPLIT_WORDS.get(part.lower()) for part in first]
    if all(splits):
        return splits
    if {"train", "test"} <= {*splits}:
        other = first[splits.index(None)] or "an image"
        raise ValueError(f"{data}: {other} stands beside train and test; these must be all there is, or --exclude it")
    return None


def _read_split(path, names):
    """{image's name: (split, group or None)} of a CSV image,split[,group]."""
    columns, delimiter = _columns(path, "--split", "image,split[,group]")
    if not {"image", "split"} <= {*columns} <= {"image", "split", "group"}:
        raise ValueError(f"--split {path}: columns are {','.join(columns)}; expected image,split[,group]")
    listed = {}
    for line, row in lists.read_csv(path, columns, delimiter, columns):
        name, word = os.path.normpath(row["image"]), row["split"].strip().lower()
        if word not in SPLIT_WORDS:
            raise ValueError(f"{path}, line {line}: split is {row['split']!r}, expected one of "
                             f"{', '.join(SPLIT_WORDS)}")
        if name not in names:
            raise ValueError(f"{path}, line {line}: there is no image {name}; names are below the folder of --data, "
                             f"as {min(names, default='...')}")
        if name in listed:
            raise ValueError(f"{path}, line {line}: {name} is listed twice")
        listed[name] = SPLIT_WORDS[word], row["group"].strip() if "group" in row else None
    if not listed:
        raise ValueError(f"--split {path}: lists no image")
    return listed


def _columns(path, flag, expected):
    if not os.path.isfile(path):
        raise ValueError(f"{flag} {path}: no such file")
    columns, delimiter = lists.csv_columns(path)
    if columns is None:
        raise ValueError(f"{flag} {path}: expected a .csv with the columns {expected}")
    return columns, delimiter


def _groups(names, folders, own, group_regex, splits, layout, videos):
    """Groups, how they were found, a note for the layout."""
    stems = [_stem(os.path.basename(name)) for name in names]
    if own and own[0] is not None:
        if group_regex:
            raise ValueError(f"--group_regex {group_regex}: the CSV of --split names groups; drop one of them")
        return own, "group column" + (f" {lists.OWN_GROUP}" if len({*own}) == len(own) else ""), ""
    if group_regex:
        return lists.regex_groups(names, group_regex), f"--group_regex {group_regex}", ""
    if layout.startswith(HC18):
        return [HC18_HEAD.match(stem)[1] for stem in stems], "HC18's leading number", ""
    if all(videos):
        return [match[1] for match in videos], "video, a name's part before its last _", ""
    if layout.startswith(FASS):
        patients = [re.match(r"(.+?)_IMG", stem, re.IGNORECASE) for stem in stems]
        if not all(patients):
            raise ValueError(f"{names[patients.index(None)]}: names no patient before _IMG, as FASS does; give "
                             f"--group_regex")
        return [match[1] for match in patients], "FASS's patient, a name's part before _IMG", ""
    parts = [folder.split(os.sep)[1 if splits and not own else 0:] for folder in folders]
    if len({part[0] for part in parts if part}) < MIN_FOLDERS and all(len(part) > 1 for part in parts):
        parts = [part[1:] for part in parts]  # class folders: what lies below them may be patients
    groups = [os.sep.join(part) for part in parts]
    if len({*groups}) >= MIN_FOLDERS:
        return *lists.folder_groups(names, groups), ""
    few = len({*groups})
    return names, lists.IMAGE_GROUPS, f"{few} folders are too few to be groups" if few > 1 else ""


def _pixel_sizes(path, names, mm):
    """Pixel sizes float64 (n, 2) with those of a CSV, if any, filled in; circumferences (n,) or None."""
    if path is None:
        return mm, None
    columns, delimiter = _columns(path, "--pixel_sizes", "image,mm")
    image = "filename" if "filename" in columns else "image"  # HC18's names know no folder
    sizes = next((own for own in (["mm_x", "mm_y"], ["mm"], ["pixel size(mm)"]) if {*own} <= {*columns}), None)
    around = next((name for name in columns if name.startswith("head circumference")), None)
    if sizes is None or image not in columns:
        raise ValueError(f"--pixel_sizes {path}: columns are {','.join(columns)}; expected image,mm or image,mm_x,mm_y")
    known, needed = {}, [*sizes, *([around] if around else [])]
    for line, row in lists.read_csv(path, columns, delimiter, [image, *needed]):
        try:
            values = [float(row[name]) for name in needed]
        except ValueError:
            values = [math.nan]
        if not all(0 < value < math.inf for value in values):
            raise ValueError(f"{path}, line {line}: {', '.join(needed)} must be numbers above 0, not "
                             f"{', '.join(row[name] for name in needed)}")
        name = os.path.normpath(row[image])
        if known.setdefault(name, values) is not values:
            raise ValueError(f"{path}, line {line}: {name} is listed twice")
    rows = [known.get(os.path.basename(name) if image == "filename" else name) for name in names]
    mm = np.array([row[:len(sizes)] * (2 // len(sizes)) if row else own for row, own in zip(rows, mm)])
    for name, size in zip(names, mm):
        if np.isnan(size).any():
            raise ValueError(f"{path}: has no pixel size of {name}; give all images one")
    return mm, np.array([row[-1] if row else math.nan for row in rows]) if around else None


# ---------------------------------------------------------------- classes of an image

def _present(found, levels):
    present = np.zeros((len(found.names), len(found.classes)), bool)
    for i, (paths, of_image) in enumerate(zip(found.masks, levels)):
        for path, own in zip(paths, of_image):
            present[i, class_numbers(path, sorted(own), found.values)] = True
        if len(paths) > 1:  # one may hide what another shows
            present[i] = np.isin(np.arange(len(found.classes)), read_mask(found, i))
    return present


def classes_present(found):
    """bool (n, K): whether image i shows class k."""
    if found.present is not None:
        return found.present
    return _present(found, _look_at_all(found.paths, found.masks, _has_colours(found), found.layout)[1])


# ---------------------------------------------------------------- train, val and test

def split_masked(found, present, seed=0, val=0.2, test=0.2):
    """The split of each image as split_groups says, stratified over the classes in it, present bool (n, K); and
    sentences on classes that val or test lack. ValueError as of check_splits, and for a class in no mask."""
    for k in np.flatnonzero(~present[:, 1:].any(0)) + 1:
        raise ValueError(f"class {found.classes[k]!r} is in no mask, so that it cannot be learned; name the others by "
                         f"--classes")
    images, classes = np.nonzero(present)  # a row for each image and class in it, images in order
    rows = LabelledSet(None, [found.names[i] for i in images], [found.classes[k] for k in classes],
                       [found.groups[i] for i in images], found.splits and [found.splits[i] for i in images], {},
                       found.grouped_by)
    splits = split_groups(rows, seed, val, test)
    notes = check_splits(rows, splits)
    first = np.searchsorted(images, np.arange(len(found.names)))  # every image has a class: each of its pixels has one
    return [splits[row] for row in first], notes


# ---------------------------------------------------------------- reading an image, a mask

def read_masked_image(found, i):
    """The images.Frame of image i."""
    return read_whole(found.paths[i])


def read_mask(found, i):
    """Class numbers uint8 (h, w) of image i; of several files, a later one's classes lie over an earlier one's."""
    mask = None
    for path in found.masks[i]:
        codes, levels = read_codes(path, _has_colours(found), found.layout.startswith(HC18) and _is_outline(path))
        mask = np.zeros(codes.shape, np.uint8) if mask is None else mask
        if codes.shape != mask.shape:
            raise ValueError(f"{path}: {pixels_text(codes)} pixels, but {found.masks[i][0]} has {pixels_text(mask)}")
        for level, number in zip(levels, class_numbers(path, levels, found.values)):
            if number:
                mask[codes == level] = number
    return mask


def _has_colours(found):
    return any(isinstance(value, tuple) for value in found.values)


def _look_at_all(paths, masks, colours, layout):
    """Pixel sizes float64 (n, 2); of each image, of each of its masks, the set of its codes. Sizes must agree."""
    def look(i):
        size, mm = told(size_and_mm, paths[i])
        levels = []
        for path in masks[i]:
            codes, own = read_codes(path, colours, layout.startswith(HC18) and _is_outline(path))
            if codes.shape[::-1] != tuple(size):
                raise ValueError(f"{path}: {pixels_text(codes)} pixels, but its image {paths[i]} has {size[0]} x "
                                 f"{size[1]}")
            levels.append(set(own))
        return mm, levels

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # decoding leaves Python's lock
        looked = list(tqdm(pool.map(look, range(len(paths))), total=len(paths), desc="masks",
                           disable=not sys.stderr.isatty(), leave=False))
    return np.array([mm for mm, _ in looked], np.float64), [levels for _, levels in looked]
