"""Other people's models by file: their features for frozen protocols, their test predictions for any.

    np.savez("theirs.npz", name=names, vector=vectors)                      # (n,) as in --data, (n, d): --features
    image,benign,malignant                                                  # a header; per test image probabilities of
    malignant/17.png,0.31,0.69                                              # each, or image,label: --predictions
    Image.fromarray(mask.astype("uint8")).save("theirs/malignant/17.png")   # class numbers, a PNG called as each test
                                                                            # image: --predictions of masks
"""

import csv
import os

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from frames.files import whole_file
from frames.shapes import class_colour
from labelled.mask_codes import mask_name


def read_features(path, names):
    """An .npz with `name` (m,) and `vector` (m, d), made by any model -> features float32 (n, 1, d) in the order of
    `names`; other images in it do not matter."""
    try:
        with np.load(path, allow_pickle=False) as file:
            theirs, vectors = file["name"].astype(str), np.asarray(file["vector"], np.float32)
    except Exception as error:  # a damaged archive raises one of a dozen kinds
        if "Object arrays" in str(error):  # of paths, or of vectors of several lengths
            error = "arrays of objects: names must be strings, list(map(str, names)), and vectors of one length"
        raise ValueError(f"--features {path}: expected an .npz with the arrays name (n,) and vector (n, d) ({error}); "
                         f"docs/comparing.md has the two lines that write one")
    if theirs.ndim != 1 or vectors.ndim != 2 or len(theirs) != len(vectors):
        raise ValueError(f"--features {path}: name {theirs.shape} and vector {vectors.shape}, expected (n,) and (n, d)")
    rows = match_names(theirs.tolist(), names, f"--features {path}")
    if not np.isfinite(vectors[rows]).all():
        raise ValueError(f"--features {path}: vectors that are not finite")
    return torch.from_numpy(vectors[rows])[:, None]


def match_names(theirs, names, what):
    """Where each of `names` is in `theirs`; ValueError if one is missing or there twice."""
    rows = {name: i for i, name in enumerate(theirs)}
    if len(rows) < len(theirs):
        twice = next(name for i, name in enumerate(theirs) if rows[name] != i)
        raise ValueError(f"{what}: {twice} is there twice")
    missing = [name for name in names if name not in rows]
    if missing:
        raise ValueError(f"{what}: {len(missing)} of {len(names)} images are missing, the first is {missing[0]}; names "
                         f"are as in --data, below its folder" + (f" (here: {theirs[0]})" if theirs else ""))
    return [rows[name] for name in names]


def read_predictions(path, names, classes):
    """A CSV of test predictions, `image,label` or `image,CLASS,CLASS,...` with a probability per class -> scores
    float64 (1, n, K) in the order of `names`, and whether they rank (a bare label gives no ROC curve)."""
    what = f"--predictions {path}"
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.reader(file)
            (_, header), *rows = [(reader.line_num, row) for row in reader if row]
    except (OSError, ValueError, csv.Error) as error:
        raise ValueError(f"{what}: cannot be read ({error}); expected a CSV image,label or image,{','.join(classes)}")
    ranked = header != ["image", "label"]
    if ranked and (header[:1] != ["image"] or sorted(header[1:]) != sorted(classes)):
        raise ValueError(f"{what}: columns are {','.join(header)}; expected image,label or image,{','.join(classes)}")
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{what}, line {line}: {len(row)} columns, the header has {len(header)}")
    order = match_names([row[0] for _, row in rows], names, what)
    scores = np.zeros((1, len(names), len(classes)))
    for i, (line, row) in enumerate(rows[number] for number in order):
        if ranked:
            try:
                values = np.array(row[1:], np.float64)
            except ValueError:
                raise ValueError(f"{what}, line {line}: not all numbers: {row[1:]}")
            if not np.isfinite(values).all():
                raise ValueError(f"{what}, line {line}: not finite: {row[1:]}")
            if values.min() < 0 or values.max() > 1 or abs(values.sum() - 1) > 1e-3:  # of logits, AUROC would be wrong
                raise ValueError(f"{what}, line {line}: probabilities expected, from 0 to 1 with sum 1, not "
                                 f"{', '.join(row[1:])}; apply softmax first")
            scores[0, i, [classes.index(name) for name in header[1:]]] = values
        elif row[1] not in classes:
            raise ValueError(f"{what}, line {line}: label {row[1]!r}; expected one of {', '.join(classes)}")
        else:
            scores[0, i, classes.index(row[1])] = 1
    return scores, ranked


# ---------------------------------------------------------------- masks

def write_mask(path, mask, classes):
    """Class numbers uint8 (h, w) as an 8-bit palette PNG, class names in its text. It appears whole or not at all."""
    picture, names = Image.fromarray(mask), PngInfo()
    picture.putpalette([0, 0, 0] + [level for k in range(1, 256) for level in class_colour(k)])
    lines = "\n".join(f"{k} {name}" for k, name in enumerate(classes))
    names.add_text("classes", lines.encode(errors="replace").decode())  # names need not be UTF-8
    with whole_file(path) as file:
        picture.save(file, "PNG", pnginfo=names)


def read_predicted_masks(folder, names, shapes, n_classes):
    """A folder of masks as `write_mask` writes them: a function of i that gives the mask of `names[i]`, uint8 (h, w) of
    class numbers below n_classes. All are read once here, so that one that does not fit is told of before the work.

    shapes: (h, w) of each image. A PNG is called as its image, below the same folders, or with _ for their /.
    """
    what = f"--predictions {folder}"
    if not os.path.isdir(folder):
        raise ValueError(f"{what}: not a folder; masks come as a folder with a PNG for each test image")
    paths, owners = [], {}
    for name in names:
        own, flat = (os.path.join(folder, mask_name(name)), os.path.join(folder, mask_name(name).replace("/", "_")))
        paths.append(own if os.path.exists(own) or not os.path.exists(flat) else flat)
        if owners.setdefault(paths[-1], name) != name:
            raise ValueError(f"{what}: {os.path.relpath(paths[-1], folder)} would be the mask of {owners[paths[-1]]} "
                             f"and of {name}; keep the folders of --data, and names that differ by more than a suffix")
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        there = sorted(os.listdir(folder))
        nifti = "; .nii.gz is not read: write PNG" if any(name.endswith((".nii", ".nii.gz")) for name in there) else ""
        raise ValueError(f"{what}: {len(missing)} of {len(names)} masks are missing, the first is "
                         f"{os.path.relpath(missing[0], folder)}; a mask is called as its image in --data, but .png "
                         f"(here: {there[0] if there else 'nothing'}){nifti}")

    def read(i):
        return _read_class_numbers(paths[i], tuple(shapes[i]), n_classes, what)

    for i in range(len(names)):
        read(i)
    return read


def _read_class_numbers(path, shape, n_classes, what):
    try:
        with Image.open(path, formats=("PNG",)) as image:
            size, mode = image.size, image.mode
            mask = np.asarray(image, np.uint8) if size == shape[::-1] and mode in ("1", "L", "P") else None
    except Exception as error:  # a damaged file raises one of a dozen kinds
        raise ValueError(f"{what}: {path} cannot be read as a PNG ({error})")
    if size != shape[::-1]:
        raise ValueError(f"{what}: {path} has {size[0]} x {size[1]} pixels, its image {shape[1]} x {shape[0]}")
    if mask is None:
        raise ValueError(f"{what}: {path} is of mode {mode}; expected 8-bit grey or palette, a class number per pixel")
    if mask.max() >= n_classes:
        raise ValueError(f"{what}: {path} has a pixel of {mask.max()}; classes are 0, the background, to "
                         f"{n_classes - 1}")
    return mask
