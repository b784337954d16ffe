"""Which image files a folder, a list or a CSV holds, and which of them belong together."""

import csv
import fnmatch
import importlib.util
import os
import re
from collections import namedtuple

from frames import dicom
from frames.images import IMAGE_SUFFIXES, is_dicom_file

OWN_GROUP = "(each image is its own group)"
IMAGE_GROUPS = f"image {OWN_GROUP}"


# ---------------------------------------------------------------- images and their groups

# paths: where to open; names: relative to the source, shown to the user; groups: one string per file, never split
# between train and test; grouped_by: how groups were found, in words; closed: (folder, reason) of folders that could
# not be opened
ImageList = namedtuple("ImageList", "paths names groups grouped_by closed")


def list_images(sources, exclude=(), group_regex=None, more=()):
    """Files of recursive folders (images, DICOM and suffixes in `more`), text lists (a path per line), CSVs
    (`image[,label][,group]`) or single files; one source or a list of them.

    A group is a patient, an examination or a clip: the CSV's `group` column, else the first capture of
    `group_regex` in the name, else the parent folder. When that leaves a single group, each file is a group of its own.
    With several sources, names and parent folders start with the source's name.
    Raises ValueError with one sentence that says what is wrong and where.
    """
    sources = [sources] if isinstance(sources, str) else sources
    roots, names, groups, closed = [], [], [], []
    for source, prefix in zip(sources, _prefixes(sources)):
        folder = is_folder(source)
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
        raise nothing_found(", ".join(sources), exclude, closed)
    paths = [os.path.join(root, name) for (root, _), name in zip(roots, names)]
    need_pydicom(paths)
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


# ---------------------------------------------------------------- reading folders and lists

def is_folder(source):
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or folder")
    if os.path.exists(os.path.join(source, "pack.json")):
        raise ValueError(f"{source} is a pack, not a source of images")
    return os.path.isdir(source)


def excluded(name, patterns):
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def nothing_found(sources, exclude, closed=()):
    return ValueError(f"{sources}: no images found ({', '.join(IMAGE_SUFFIXES)}, DICOM)"
                      + (f"; excluded: {' '.join(exclude)}" if exclude else "")
                      + "".join(f"; {name}: {reason}" for name, reason in closed[:1]))


def need_pydicom(paths):
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
