"""Other people's models by file: their features for frozen protocols, their test predictions for any.

    np.savez("theirs.npz", name=names, vector=vectors)                      # (n,) as in --data, (n, d): --features
    image,benign,malignant                                                  # a header; per test image probabilities of
    malignant/17.png,0.31,0.69                                              # each, or image,label: --predictions
"""

import csv

import numpy as np
import torch


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
                         f"the README has the two lines that write one")
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
