"""The FMC_UIA challenge: its scores, sound ones beside them, and the files of its submissions, written and read.

The challenge's scores are those of evaluate.py (2d9dd74) of Foundation-Model-Challenge-for-Ultrasound-Image-Analysis.
They skip a row without a prediction, take a class that neither mask has for a perfect one, and a missing landmark for
one at [0, 0]. Of the sound ones, the truth alone says what counts, and a row without a prediction counts as wrong.

m images of a task, K as in fmc_uia.Task. `values` is what is kept of a run to score it, over and over:
    segmentation      DSC, HD (the challenge's), Dice, HD95 (metrics.mask_scores'), (m, K - 1) each: foreground classes
    classification    probabilities (m, K); predicted (m,), where these are not the largest ones
    detection         IoU (m,)
    regression        error, challenge error (m, K); error is nan where the truth lacks the point
Distances are in pixels of the original image.
"""

import json
import os
import posixpath
import sys

import numpy as np
from PIL import Image
from tqdm import tqdm

from frames.files import whole_file
from labelled.fmc_uia import read_task_mask
from scores import metrics
from scores.comparison import number
from scores.report import shorten

SCORES = {"segmentation": ("DSC", "HD"), "classification": ("Acc", "AUC", "F1_macro", "F1_weighted", "MCC"),
          "detection": ("IoU",), "regression": ("MRE",)}
SOUND = {"segmentation": ("Dice", "HD95"), "classification": ("balanced accuracy", "macro F1", "macro AUROC"),
         "detection": ("IoU",), "regression": ("MRE", "MRE / diagonal")}
PIXELS = ("HD", "HD95", "MRE")
JSON_FILES = {kind: f"{kind}_predictions.json" for kind in ("classification", "detection", "regression")}
FIELDS = {"classification": "predicted_probs", "detection": "bbox_pixels", "regression": "predicted_points_pixels"}
GREY = ("1", "L", "P", "LA", "RGB", "RGBA")  # Pillow's modes that have a grey level of 8 bits


# ---------------------------------------------------------------- values of images

def mask_values(truth, prediction, K):
    """Class numbers (h, w) of two masks of one image -> {"DSC", "HD", "Dice", "HD95": (K - 1,)}, see above."""
    counts, scores = metrics.mask_scores(truth, prediction, K, None, 0)
    diagonal = float(np.hypot(*np.shape(truth)))
    distances = [metrics.hausdorff(truth == k, prediction == k, diagonal) for k in range(1, K)]
    return {"DSC": np.nan_to_num(metrics.dice(counts[1:]), nan=1), "HD": np.nan_to_num(distances),
            "Dice": scores["Dice"][1:], "HD95": scores["HD95"][1:]}


def point_values(truth, prediction):
    """Points (m, K, 2) in pixels, true ones nan where missing -> {"error", "challenge error": (m, K)}."""
    truth, prediction = np.asarray(truth, np.float64), np.asarray(prediction, np.float64)
    if truth.shape != prediction.shape or truth.ndim != 3 or not np.isfinite(prediction).all():
        raise ValueError(f"predicted points of shape {prediction.shape} for true ones of {truth.shape}: expected "
                         f"(images, points, 2) of both, and finite predictions")
    known = ~np.isnan(truth).any(2, keepdims=True)
    return {"error": np.linalg.norm(prediction - truth, axis=2),
            "challenge error": np.linalg.norm(prediction - np.where(known, truth, 0), axis=2)}


def values_of(task, truth, prediction):
    """The `values` of a task's m images.

    truth and prediction: of segmentation, masks uint8 (h, w) one after the other, any two iterables, so that nobody
    need hold them all; a prediction None is all background. Of the others labels (m,) and probabilities (m, K), boxes
    (m, 4), points (m, K, 2).
    """
    if task.kind == "segmentation":
        values = [mask_values(true, np.zeros_like(true) if predicted is None else predicted, task.K)
                  for true, predicted in zip(truth, prediction, strict=True)]
        return {name: np.array([own[name] for own in values], np.float64).reshape(-1, task.K - 1)
                for name in ("DSC", "HD", "Dice", "HD95")}
    if task.kind == "classification":
        return {"probabilities": metrics.checked_scores(truth, np.asarray(prediction, np.float64), 2)[1]}
    return {"IoU": metrics.box_iou(truth, prediction)} if task.kind == "detection" else point_values(truth, prediction)


# ---------------------------------------------------------------- scores of a task

def challenge_scores(task, values, labels=None):
    """{name: score} for SCORES, as the challenge computes them, of `values` of the images that have a prediction.

    labels: int (m,) in classification. Without any image, all are 0.
    """
    if not len(next(iter(values.values()))):
        return dict.fromkeys(SCORES[task.kind], 0.0)
    if task.kind == "classification":
        counts = metrics.confusion(labels, _predicted(values), task.K)
        found = (metrics.accuracy(counts), _challenge_auc(labels, values["probabilities"]), metrics.macro_f1(counts),
                 metrics.weighted_f1(counts), metrics.matthews(counts))
    elif task.kind == "segmentation":
        found = values["DSC"].mean(0).mean(), values["HD"].mean(0).mean()
    else:
        found = [values["IoU" if task.kind == "detection" else "challenge error"].mean()]
    return dict(zip(SCORES[task.kind], map(float, found), strict=True))


def _predicted(values):
    return values.get("predicted", values["probabilities"].argmax(1))


def _challenge_auc(labels, probabilities):
    """AUROC of class 1 of two, else the mean of all classes; 0 where scikit-learn's roc_auc_score has no answer: a
    class without a label, probabilities that are not finite or, of more than two classes, do not add up to 1."""
    K = probabilities.shape[1]
    if len(np.unique(labels)) < K or not np.isfinite(probabilities).all():
        return 0.0
    if K == 2:
        return metrics.auroc(labels, probabilities)[1]
    return metrics.macro_auroc(labels, probabilities) if np.allclose(1, probabilities.sum(1)) else 0.0


def sound_scores(task, values, labels=None, diagonals=None, missing=None):
    """{name: score} for SOUND; nan where no image has what a score needs.

    labels: int (m,) in classification; diagonals: (m,), of the images in pixels, which "MRE / diagonal" and missing
    masks and points need; missing: bool (m,), rows without a prediction. Of these, `values` say only what the truth
    has: Dice and IoU are 0, distances the diagonal. Their label is wrong, in equal shares each of the other classes
    that the truth has (all others if it has one), and their probabilities are 0, the lowest rank, for all classes.
    """
    missing = np.zeros(len(next(iter(values.values()))), bool) if missing is None else missing
    if diagonals is None:
        if task.kind in ("segmentation", "regression") and missing.any():
            raise ValueError(f"{task.name}: missing masks and points count as far off as the image is large: give "
                             f"diagonals")
        diagonals = np.full(len(missing), np.nan)
    worst, lost = diagonals[:, None], missing[:, None]  # (m, 1)
    if task.kind == "classification":
        counts = metrics.confusion(labels, np.where(missing, -1, _predicted(values)), task.K)
        true = np.isin(np.arange(task.K), labels)
        others = ~np.eye(task.K, dtype=bool) & (true | (true.sum() == 1))  # (K, K): what a wrong label of each may be
        unknown = np.bincount(labels[missing], minlength=task.K)
        counts = counts + unknown[:, None] * others / others.sum(1, keepdims=True)
        probabilities = np.where(lost, 0, values["probabilities"])
        ranked = np.isfinite(probabilities).all()
        found = (metrics.balanced_accuracy(counts), metrics.macro_f1(counts),
                 metrics.macro_auroc(labels, probabilities) if ranked else np.nan)
    elif task.kind == "segmentation":
        known = ~np.isnan(values["Dice"])
        found = (_known_mean(np.where(lost & known, 0, values["Dice"]).T),
                 _known_mean(np.where(lost & known, worst, values["HD95"]).T))
    elif task.kind == "detection":
        found = [np.where(missing, 0, values["IoU"]).mean()]
    else:
        error = np.where(lost & ~np.isnan(values["error"]), worst, values["error"])
        found = _known_mean(error), _known_mean(error / worst)
    return dict(zip(SOUND[task.kind], map(float, found), strict=True))


def _known_mean(values):
    """Mean over rows of each one's mean over columns, of what is not nan; nan where all is."""
    known = ~np.isnan(values)
    return metrics.mean_ratio(np.nan_to_num(values).sum(1), known.sum(1))


def leaderboard(scores, tasks):
    """{task's name: its scores}, Tasks -> {column: mean over those of the tasks that have it}."""
    return {column: float(np.mean([scores[task.name][column] for task in tasks if column in SCORES[task.kind]]))
            for kind in SCORES if any(task.kind == kind for task in tasks) for column in SCORES[kind]}


# ---------------------------------------------------------------- a submission, written

def mask_place(mask_path, image_path):
    """Where below a submission's folder the mask of a row lies: at its mask_path, every ../ removed.

    A row without one takes its image_path, img turned into mask, or _mask added where that changes nothing.
    ValueError where the place would not be inside the folder.
    """
    place = (mask_path or image_path).replace("\\", "/").replace("../", "")
    if not mask_path:
        renamed, (stem, suffix) = place.replace("img", "mask").replace("IMG", "MASK"), posixpath.splitext(place)
        place = f"{stem}_mask{suffix}" if renamed == place else renamed
    inside = posixpath.normpath(place)
    if not place or inside.startswith("/") or inside.split("/")[0] in (".", ".."):
        raise ValueError(f"the mask of {image_path} would be outside the submission, at {place!r}; mend its mask_path")
    return inside


def mask_places(found):
    """{segmentation task's name: `mask_place` of each row}; ValueError where two rows, of any tasks, have the same."""
    places, owners = {}, dict.fromkeys(JSON_FILES.values(), "the submission's own file")
    for task in found.tasks:
        if task.kind == "segmentation":
            rows = found.rows[task.name]
            places[task.name] = [mask_place(*paths) for paths in zip(rows.mask_paths, rows.image_paths, strict=True)]
            for place, line in zip(places[task.name], rows.lines, strict=True):
                if place in owners:
                    raise ValueError(f"{line}: its mask would be {place}, as that of {owners[place]}; a submission has "
                                     f"one mask at a place: give the rows mask_paths that differ")
                owners[place] = line
    return places


def check_submission_folder(out, places=()):
    """ValueError if the folder holds any file but a submission's, whose masks lie at `places`: it may be overwritten.

    A mask that is not among them would be another submission's.
    """
    if os.path.exists(out) and not os.path.isdir(out):
        raise ValueError(f"{out}: is a file; a submission is a folder")
    own = {*places, *JSON_FILES.values()}
    for folder, folders, files in os.walk(out):
        folders.sort()
        for file in sorted(files):
            name = os.path.relpath(os.path.join(folder, file), out)
            if name.replace(os.sep, "/").removesuffix(".tmp") not in own:
                raise ValueError(f"{out}: holds {name}, which is no part of this submission; name a new folder")


def write_submission_mask(out, mask_path, image_path, mask):
    """Class numbers uint8 (h, w) at `mask_place`, a grey PNG: the challenge would read a palette's colours.

    It is one also where the name ends in .jpg, which would blur the classes: readers go by the content.
    """
    if mask.dtype != np.uint8 or mask.ndim != 2:
        raise ValueError(f"a mask of {mask.dtype} {mask.shape}: expected uint8 (h, w)")
    with whole_file(os.path.join(out, mask_place(mask_path, image_path))) as file:
        Image.fromarray(mask).save(file, "PNG")


def records_of(task, image_paths, sizes, predictions):
    """What the JSON file of a task's kind says of its m images: sizes (m, 2), width and height; predictions
    probabilities (m, K), boxes (m, 4) or points (m, K, 2) in pixels."""
    predictions = np.asarray(predictions, np.float64)
    shape = {"classification": (task.K,), "detection": (4,), "regression": (task.K, 2)}[task.kind]
    if predictions.shape != (len(image_paths), *shape) or not np.isfinite(predictions).all():
        raise ValueError(f"{task.name}: predictions of shape {predictions.shape} for {len(image_paths)} images, "
                         f"expected (images, {', '.join(map(str, shape))}), all finite")
    if task.kind == "classification":
        if predictions.min() < 0 or np.abs(predictions.sum(1) - 1).max() > 1e-3:
            raise ValueError(f"{task.name}: probabilities expected, from 0 with sum 1; apply softmax first")
        return [{"image_path": path, "task_id": task.name, "predicted_class": int(own.argmax()),
                 "predicted_probs": (own / own.sum()).tolist()}  # of a sum off by 1e-5 the challenge would make AUC 0
                for path, own in zip(image_paths, predictions, strict=True)]
    flat = predictions.reshape(len(predictions), -1)  # (m, 4) or (m, 2 K): x, y, x, y, ...
    shares = flat / np.tile(sizes, flat.shape[1] // 2)
    names = ("bbox_normalized" if task.kind == "detection" else "predicted_points_normalized"), FIELDS[task.kind]
    return [{"image_path": path, "task_id": task.name, names[0]: share.tolist(), names[1]: own.tolist()}
            for path, share, own in zip(image_paths, shares, flat, strict=True)]


def write_submission_json(out, kind, records):
    """All records of a kind, over those of an earlier submission: an empty list, too, says what there is."""
    text = json.dumps(records, ensure_ascii=False, indent=1, allow_nan=False)
    with whole_file(os.path.join(out, JSON_FILES[kind])) as file:
        file.write(text.encode("utf-8", "surrogateescape"))  # names need not be UTF-8


# ---------------------------------------------------------------- a submission, read and scored

def read_submission_mask(path, shape, K):
    """A predicted mask as the challenge reads it: grey levels, resized to (h, w) by nearest neighbour."""
    try:
        with Image.open(path) as image:
            mode, mask = image.mode, np.asarray(image.convert("L")) if image.mode in GREY else None
    except Exception as error:  # a damaged file raises one of a dozen kinds
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error
    if mask is None or mask.max() >= K:
        held = f"a pixel of {mask.max()}" if mode in GREY else f"pixels of mode {mode}"
        raise ValueError(f"{path}: holds {held}; expected 8-bit grey, class numbers 0 to {K - 1}")
    # OpenCV's nearest neighbour, rounding included, takes the pixel at the upper left corner, Pillow's the middle
    rows, columns = (np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(np.intp), old - 1)
                     for new, old in zip(shape, mask.shape))
    return mask[rows][:, columns]


def read_records(out, kind):
    """{(task's name, image_path): record} of a submission's JSON file; without the file, none."""
    path, records = os.path.join(out, JSON_FILES[kind]), {}
    if not os.path.exists(path):
        return records
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            content = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not JSON ({error})") from error
    for i, record in enumerate(content if isinstance(content, list) else [None]):
        if not isinstance(record, dict) or not {"task_id", "image_path"} <= {*record}:
            raise ValueError(f"{path}, record {i}: expected a list of objects with task_id, image_path and "
                             f"{FIELDS[kind]}")
        key = str(record["task_id"]), str(record["image_path"])
        if key in records:
            raise ValueError(f"{path}, record {i}: a second prediction of {key[1]} for {key[0]}; remove one")
        records[key] = record
    return records


def predictions_of(task, image_paths, records, what):
    """The records of a task's m images -> predictions (m, numbers), predicted classes and whether missing, (m,) each.

    A missing prediction is 0. Probabilities may be left out: they are nan.
    """
    width = {"classification": task.K, "detection": 4, "regression": 2 * task.K}[task.kind]
    found, classes = np.zeros((len(image_paths), width)), np.zeros(len(image_paths), np.int64)
    missing, field = np.array([(task.name, path) not in records for path in image_paths]), FIELDS[task.kind]
    for i in np.flatnonzero(~missing):
        record, where = records[task.name, image_paths[i]], f"{what}: of {image_paths[i]} for {task.name}"
        if task.kind == "classification":
            if record.get("predicted_class") not in range(task.K):
                raise ValueError(f"{where} predicted_class is {record.get('predicted_class')!r}, expected 0 to "
                                 f"{task.K - 1}")
            classes[i] = record["predicted_class"]
        numbers = record.get(field)
        if numbers is None and task.kind == "classification":
            found[i] = np.nan
        elif (not isinstance(numbers, list) or len(numbers) != width
              or not all(type(value) in (int, float) and abs(value) < 1e12 for value in numbers)):  # nan is not
            raise ValueError(f"{where} {field} is not {width} numbers")
        else:
            found[i] = numbers
    return found, classes, missing


def score_submission(out, found):
    """A submission's folder against a labelled fmc_uia.TaskSet -> {"challenge", "sound": {task: {name: score}},
    "images", "missing": {task: count}, "leaderboard": {column: mean}}, for JSON: None where a score is nan.

    The leaderboard, as the challenge's, leaves out tasks of which nothing was predicted.
    """
    if not os.path.isdir(out):
        raise ValueError(f"{out}: no such folder; expected masks and {', '.join(JSON_FILES.values())}")
    places, records = mask_places(found), {kind: read_records(out, kind) for kind in JSON_FILES}
    result = {name: {} for name in ("challenge", "sound", "images", "missing")}
    for task in found.tasks:
        rows, labels = found.rows[task.name], None
        sizes = found.sizes[rows.images]  # (m, 2)
        if task.kind == "segmentation":
            paths = [os.path.join(out, place) for place in places[task.name]]
            missing = np.array([not os.path.isfile(path) for path in paths])
            truth = (read_task_mask(path, task.K) for path in tqdm(rows.targets, task.name, leave=False,
                                                                   disable=not sys.stderr.isatty()))
            values = values_of(task, truth, (
                None if absent else read_submission_mask(path, size[::-1], task.K)
                for path, absent, size in zip(paths, missing, sizes.tolist(), strict=True)))
        else:
            what = os.path.join(out, JSON_FILES[task.kind])
            predictions, classes, missing = predictions_of(task, rows.image_paths, records[task.kind], what)
            if task.kind == "classification":
                labels, values = rows.targets, {"probabilities": predictions, "predicted": classes}
            else:
                values = values_of(task, rows.targets, predictions.reshape(rows.targets.shape))
        there = ~missing
        result["challenge"][task.name] = challenge_scores(task, {name: own[there] for name, own in values.items()},
                                                          None if labels is None else labels[there])
        sound = sound_scores(task, values, labels, np.hypot(*sizes.T), missing)
        result["sound"][task.name] = {name: number(score) for name, score in sound.items()}
        result["images"][task.name], result["missing"][task.name] = len(missing), int(missing.sum())
    predicted = [task for task in found.tasks if result["missing"][task.name] < result["images"][task.name]]
    if not predicted:
        raise ValueError(f"{out}: has no prediction for any row of {found.csv_folder}: task_id and image_path must be "
                         f"as in its CSVs, masks lie at their mask_path without ../")
    return {**result, "leaderboard": leaderboard(result["challenge"], predicted)}


def table(found, tasks):
    """Lines: of each kind a row per task, the challenge's scores left of the bar, sound ones right of it."""
    lines = []
    for kind in SCORES:
        own = [task.name for task in tasks if task.kind == kind]
        names = {"challenge": SCORES[kind], "sound": SOUND[kind]}
        if own:
            lines += [""] * bool(lines) + [_row(kind, "images", "missing", *names.values())]
        for task in own:
            images, missing = found["images"][task], found["missing"][task]
            shown = {"challenge": {} if missing == images else found["challenge"][task],  # 0 would be the best error
                     "sound": found["sound"][task]}
            lines.append(_row(task, f"{images:,}", f"{missing:,}", *(
                [_cell(name, shown[side].get(name)) for name in names[side]] for side in names)))
        if own and SCORES[kind][0] in found["leaderboard"]:
            means = [_cell(name, found["leaderboard"][name]) for name in SCORES[kind]]
            lines.append(_row("leaderboard", "", "", means))
    return lines


def _cell(name, score):
    text = "-" if score is None or np.isnan(score) else f"{score:.{2 if name in PIXELS else 4}f}"
    return f"{text:>{len(name)}}"


def _row(title, images, missing, left, right=()):
    left, right = ("".join(f"{text:>7} " for text in side) for side in (left, right))
    return f"{shorten(title, 18):18}{images:>7}{missing:>8}  {left}| {right}".rstrip("| ")
