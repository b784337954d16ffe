"""Scores of labels, of boxes, and of masks in pixels and millimetres, in numpy.

Every classification score but AUROC is a function of a confusion matrix, counts (..., K, K) with labels as rows and
predictions as columns, so that many resampled test sets are scored by one matrix product. K classes, n test images in
G groups (patients, examinations, clips), S runs (fine-tuning seeds), E episodes, R bootstrap replicates.

A model's result on a test set is `scores` (S, n, K), probabilities say; its prediction is the largest, the first of
equal ones. Where only labels are known, scores are their one-hot rows and `ranked` is False: AUROC is then nan.

Of masks, `counts` (..., K, 3) are the pixels of each class in both, in the truth and in the prediction; class 0 is the
background. A pixel's size is (across, down): x, y as coordinates are.
"""

import numpy as np

from frames.shapes import fit_ellipse, label

CLASSIFICATION_SCORES = ("accuracy", "balanced accuracy", "macro F1", "macro AUROC")
MASK_SCORES = ("Dice", "IoU", "HD95", "surface Dice")


# ---------------------------------------------------------------- classification

def confusion(labels, predictions, n_classes):
    """Integer labels and predictions (..., n), broadcast against each other -> counts (..., K, K).

    A negative prediction means "not predicted" and is not counted.
    """
    return group_confusion(labels, predictions, np.zeros(np.shape(labels)[-1], np.int64), n_classes, 1)[..., 0, :, :]


def group_confusion(labels, predictions, groups, n_classes, n_groups):
    """`confusion` of every group of images: labels, predictions (..., n) and groups (n,) -> (..., G, K, K)."""
    labels, predictions, groups = np.broadcast_arrays(labels, predictions, groups)
    for name, values, low, end in (("labels", labels, 0, n_classes), ("predictions", predictions, -np.inf, n_classes),
                                   ("groups", groups, 0, n_groups)):
        if values.size and not (low <= values.min() and values.max() < end):
            raise ValueError(f"{name} lie in {values.min()}..{values.max()}, expected below {end}")
    leading = labels.shape[:-1]
    rows = np.arange(int(np.prod(leading))).reshape(*leading, 1)
    cells = ((rows * n_groups + groups) * n_classes + labels) * n_classes + predictions  # (..., n)
    counts = np.bincount(cells[predictions >= 0], minlength=rows.size * n_groups * n_classes ** 2)
    return counts.reshape(*leading, n_groups, n_classes, n_classes)


def accuracy(confusion):
    """Share of right predictions, counts (..., K, K) -> (...); nan where there is none."""
    return mean_ratio(diagonal(confusion).sum(-1, keepdims=True), confusion.sum((-2, -1))[..., None])


def balanced_accuracy(confusion):
    """Mean recall of the classes that have a label, counts (..., K, K) -> (...); nan where there is none.

    A class that is only ever predicted is left out, as in scikit-learn's balanced_accuracy_score.
    """
    return mean_ratio(diagonal(confusion), confusion.sum(-1))


def macro_f1(confusion):
    """Mean F1 of the classes that have a label or a prediction, counts (..., K, K) -> (...); nan where there is none.

    So a class that is only ever predicted counts as 0, as in scikit-learn's f1_score(average="macro").
    """
    return mean_ratio(2 * diagonal(confusion), confusion.sum(-1) + confusion.sum(-2))


def weighted_f1(confusion):
    """Mean F1 weighted by the labels of each class, counts (..., K, K) -> (...); nan where there is none."""
    right, support, predicted = diagonal(confusion), confusion.sum(-1), confusion.sum(-2)
    return ratio((np.nan_to_num(ratio(2 * right, support + predicted)) * support).sum(-1), support.sum(-1))


def matthews(confusion):
    """Matthews' correlation coefficient of K classes, counts (..., K, K) -> (...) from -1 to 1 (Gorodkin 2004).

    0 where all labels, or all predictions, are of one class, as in scikit-learn's matthews_corrcoef.
    """
    support, predicted, n = confusion.sum(-1), confusion.sum(-2), confusion.sum((-2, -1)).astype(np.float64)
    agreement = diagonal(confusion).sum(-1) * n - (support * predicted).sum(-1)
    spread = (n ** 2 - (support ** 2).sum(-1)) * (n ** 2 - (predicted ** 2).sum(-1))
    return np.nan_to_num(ratio(agreement, np.sqrt(spread)))


def per_class(confusion):
    """Counts (..., K, K) -> precision, recall, F1 and support of each class, arrays (..., K) in a dict.

    Precision is nan for a class never predicted, recall for one never a label, F1 for one that is neither: 0 / 0, as
    in scikit-learn's zero_division=nan. So F1 of a class that is only ever a label, or only ever predicted, is 0.
    """
    right, support, predicted = diagonal(confusion), confusion.sum(-1), confusion.sum(-2)
    return {"precision": ratio(right, predicted), "recall": ratio(right, support),
            "f1": ratio(2 * right, support + predicted), "support": support}


def auroc(labels, scores, weights=None):
    """One-vs-rest area under the ROC curve of each class: labels (n,), scores (n, K), weights (..., n) -> (..., K).

    The weighted share of pairs, one image of the class and one of another, in which the first scores higher; equal
    scores count half. nan where the class or its rest has no weight. Weights (1 + R, n) score every replicate.
    """
    labels, scores = checked_scores(labels, scores, 2)
    n, K = scores.shape
    weights = np.ones(n) if weights is None else np.asarray(weights)
    rows = weights.reshape(-1, n)
    plans = []
    for k in range(K):
        positives, negatives = np.flatnonzero(labels == k), np.flatnonzero(labels != k)
        negatives = negatives[scores[negatives, k].argsort(kind="stable")]
        plans.append((positives, negatives, *rank_bounds(scores[positives, k], scores[negatives, k])))
    result = np.empty((len(rows), K))
    step = max(1, 2_000_000 // n)  # replicates at a time: bounds the memory to some copies of 16 MB
    for start in range(0, len(rows), step):
        w = np.ascontiguousarray(rows[start:start + step].T, np.float64)  # (n, r): images are picked as whole rows
        for k, (positives, negatives, below, up_to) in enumerate(plans):
            passed = np.zeros((len(negatives) + 1, w.shape[1]))  # weight of the negatives that score less
            np.cumsum(w[negatives], axis=0, out=passed[1:])
            own = w[positives]
            won = (own * (passed[below] + passed[up_to])).sum(0) / 2
            result[start:start + step, k] = ratio(won, own.sum(0) * passed[-1])
    return result.reshape(*weights.shape[:-1], K)


def macro_auroc(labels, scores, weights=None):
    """Mean `auroc` of the classes that have one -> (...); nan where none has. Of two classes it is the usual AUROC.

    scikit-learn's roc_auc_score(multi_class="ovr") is the same, but refuses a test set in which a class is absent.
    """
    values = auroc(labels, scores, weights)
    return mean_ratio(np.nan_to_num(values), np.isfinite(values))


def rank_bounds(values, ordered):
    """How many of `ordered` lie below each value, and how many below it or equal to it."""
    return np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")


def checked_scores(labels, scores, axes=3):
    """Labels (n,) and scores (S, n, K), or (n, K) of two axes, as arrays, or the reason why they cannot be scored."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or scores.ndim != axes or scores.shape[-2] != len(labels) or not scores.size:
        raise ValueError(f"scores of shape {scores.shape} for labels of shape {labels.shape}: expected "
                         f"({'runs, ' * (axes == 3)}images, classes) for (images,), at least one of each")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} scores are nan: mend the model that gave them")
    if labels.min() < 0 or labels.max() >= scores.shape[-1]:
        raise ValueError(f"labels lie in {labels.min()}..{labels.max()}, expected below {scores.shape[-1]}, "
                         f"the number of columns of the scores")
    return labels, scores


def diagonal(confusion):
    return np.diagonal(confusion, axis1=-2, axis2=-1)  # (..., K)


def ratio(part, whole):
    """part / whole where whole > 0, else nan."""
    present = whole > 0
    return np.where(present, part / np.where(present, whole, 1).astype(np.float64), np.nan)


def mean_ratio(part, whole):
    """Mean of part / whole over the last axis where whole > 0; nan where no whole is."""
    return ratio(np.nan_to_num(ratio(part, whole)).sum(-1), (whole > 0).sum(-1))


# ---------------------------------------------------------------- masks

def mask_counts(truth, prediction, n_classes):
    """Class numbers (h, w) of two masks -> int64 (K, 3): pixels of each class in both, the truth, the prediction."""
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape or truth.ndim != 2 or not truth.size:
        raise ValueError(f"a predicted mask of shape {prediction.shape} for one of shape {truth.shape}: expected "
                         f"(h, w), the same of both")
    for name, mask in (("true", truth), ("predicted", prediction)):
        if mask.dtype.kind not in "bui" or mask.min() < 0 or mask.max() >= n_classes:
            raise ValueError(f"a {name} mask holds {mask.dtype} {mask.min()}..{mask.max()}, expected class numbers "
                             f"below {n_classes}")
    cells = truth.ravel().astype(np.intp) * n_classes + prediction.ravel().astype(np.intp)
    cells = np.bincount(cells, minlength=n_classes ** 2).reshape(n_classes, n_classes)
    return np.stack((diagonal(cells), cells.sum(1), cells.sum(0)), 1)


def dice(counts):
    """2 both / (truth + prediction), counts (..., 3) -> (...); nan where both masks are empty, 0 where one is."""
    return ratio(2 * counts[..., 0], counts[..., 1] + counts[..., 2])


def iou(counts):
    """both / (truth or prediction), counts (..., 3) -> (...); nan where both masks are empty, 0 where one is."""
    return ratio(counts[..., 0], counts[..., 1] + counts[..., 2] - counts[..., 0])


def boundary(mask):
    """bool (h, w) -> its pixels of which one of the four neighbours is not in it, as none beyond the image is."""
    padded = np.pad(mask, 1)
    return mask & ~(padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:])


def boundary_distances(truth, prediction, spacing=(1, 1)):
    """bool (h, w) twice -> distances of each boundary pixel of the truth to the nearest of the prediction, and back.

    Between pixels' centres, in the unit of spacing, the size of a pixel across and down. An empty mask has no boundary
    pixel, and those of the other one are inf away from it.
    """
    window = _window(truth | prediction)  # beyond it is neither: no new boundary
    a, b = boundary(truth[window]), boundary(prediction[window])
    return _nearest(a, b, spacing), _nearest(b, a, spacing)


def _window(mask):
    """The smallest part, two slices, of bool (h, w) that holds all of it; an empty part of an empty one."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)) if len(rows) else (slice(0), slice(0))


def _nearest(points, targets, spacing, enough=0):
    """Distance of each True of points (h, w) to the nearest True of targets (h, w), exactly; inf where there is none.

    One up to `enough` may come out as any number from its own to that, which is quicker. First along each column, for
    all rows at once, then from column to column, left and right of a point at the same time, for as long as the next
    one could still be nearer. Memory is that of a few images, whatever is in the masks.
    """
    columns = np.flatnonzero(targets.any(0))
    rows, inside = np.arange(len(targets))[:, None], targets[:, columns]
    above = np.maximum.accumulate(np.where(inside, rows, -np.inf))
    below = np.minimum.accumulate(np.where(inside, rows, np.inf)[::-1])[::-1]
    squares = (np.minimum(rows - above, below - rows) * spacing[1]) ** 2  # (h, columns)
    y, x = np.nonzero(points)
    first, best, pending = np.searchsorted(columns, x), np.full(len(y), np.inf), np.arange(len(y))
    for step in range(len(columns)):
        # columns not seen yet are at least so far away
        pending = pending[best[pending] > max(step * spacing[0], enough) ** 2]
        if not len(pending):
            break
        for column in (first[pending] + step, first[pending] - 1 - step):
            column = column.clip(0, len(columns) - 1)  # past the last one: one seen before
            across = (columns[column] - x[pending]) * spacing[0]
            best[pending] = np.minimum(best[pending], squares[y[pending], column] + across ** 2)
    return np.sqrt(best)


def hd95(to_prediction, to_truth, farthest):
    """The larger of the 95th percentiles of both `boundary_distances`; `farthest` if one mask is empty, nan if both."""
    if not len(to_prediction) or not len(to_truth):
        return farthest if len(to_prediction) or len(to_truth) else np.nan
    return float(max(np.percentile(to_prediction, 95), np.percentile(to_truth, 95)))


def hausdorff(truth, prediction, farthest):
    """Hausdorff distance in pixels of two sets of pixels, bool (h, w) each; `farthest` if one is empty, nan if both.

    The larger of both ways: how far from the other one the pixel is that is furthest from it, centre to centre. All
    pixels count, not boundaries alone: the middle of a disk is far from a ring around it, though their rims are close.
    """
    if not truth.any() or not prediction.any():
        return farthest if truth.any() or prediction.any() else np.nan
    window = _window(truth | prediction)
    truth, prediction = truth[window], prediction[window]
    found = 0.0
    for step in (16, 1):  # a sixteenth of the rows and columns tells which of the others need not be followed
        for points, targets in ((truth, prediction), (prediction, truth)):
            sample = np.zeros_like(points)
            sample[::step, ::step] = (points & ~targets)[::step, ::step]
            if sample.any():
                found = max(found, float(_nearest(sample, targets, (1, 1), found).max()))
    return found


def surface_dice(to_prediction, to_truth, tolerance):
    """Share of both masks' boundary pixels no further than tolerance from the other's; 0 if one is empty, nan if both.

    Nikolov et al. 2018, arXiv 1809.04430, who weigh by the length of boundary; here each pixel of it counts once.
    """
    distances = np.concatenate((to_prediction, to_truth))
    return float(np.mean(distances <= tolerance)) if len(distances) else np.nan


def mask_scores(truth, prediction, n_classes, mm, tolerance):
    """Class numbers (h, w) of two masks -> `mask_counts`, {name: (K,)} for MASK_SCORES.

    nan where the truth lacks the class, so that the truth alone says which images count; of a class that it has and the
    prediction lacks, Dice, IoU and surface Dice are 0 and HD95 is the image's diagonal, from corner to corner.
    Distances, and the tolerance of surface Dice, are in mm where mm, the size of a pixel across and down, is given, in
    pixels where it is None. The background has no distances.
    """
    counts = mask_counts(truth, prediction, n_classes)
    spacing = np.ones(2) if mm is None else checked_pixel_size(mm)
    farthest = float(np.hypot(*spacing * np.shape(truth)[::-1]))
    values = {"Dice": dice(counts), "IoU": iou(counts), "HD95": np.full(n_classes, np.nan),
              "surface Dice": np.full(n_classes, np.nan)}
    for k in range(n_classes):
        if not counts[k, 1]:
            values["Dice"][k] = values["IoU"][k] = np.nan
        elif k > 0:
            distances = boundary_distances(truth == k, prediction == k, spacing)
            values["HD95"][k] = hd95(*distances, farthest)
            values["surface Dice"][k] = surface_dice(*distances, tolerance)
    return counts, values


def checked_pixel_size(mm):
    mm = np.asarray(mm, np.float64)
    if mm.shape != (2,) or not np.isfinite(mm).all() or mm.min() <= 0:
        raise ValueError(f"the size of a pixel is {mm}: expected two lengths in mm, across and down")
    return mm


# ---------------------------------------------------------------- boxes

def box_iou(a, b):
    """Boxes (..., 4), x_min, y_min, x_max, y_max -> intersection over union (...); 0 where the union is empty.

    A box whose sides are swapped, x_max < x_min, holds nothing.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]  # of swapped sides it does not matter: both is 0
    both = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
    return np.nan_to_num(ratio(both, areas[0] + areas[1] - both))


# ---------------------------------------------------------------- ellipses

def ellipse_circumference(a, b):
    """Circumference of the ellipse with half axes a and b, by the arithmetic-geometric mean."""
    a, b = max(a, b), min(a, b)
    if not b:
        return 4.0 * a
    squares, weight, difference = a * a, 0.5, (a * a - b * b) ** 0.5
    while difference > 1e-9 * a:  # what counts is its square; every round doubles the digits
        squares -= weight * difference ** 2
        weight, difference, a, b = 2 * weight, (a - b) / 2, (a + b) / 2, (a * b) ** 0.5
    return 2 * np.pi * squares / a


def head_circumference(mask, mm):
    """bool (h, w) and the size of a pixel in mm, across and down -> circumference of the head's ellipse in mm.

    The head is the largest 4-connected part, its holes filled. The ellipse is fitted to the middles of the edges
    between pixels in it and beside it, of which the image's rim, where a head is cut off, is none. nan where these
    make no ellipse: of an empty mask, a full one, a single pixel, a band from rim to rim.
    """
    mm = checked_pixel_size(mm)
    parts = label(mask)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    head = parts == sizes.argmax() if sizes.any() else mask
    around = label(~head)
    rim = np.concatenate((around[0], around[-1], around[:, 0], around[:, -1]))
    head = head | ~np.isin(around, rim)  # what does not reach the rim is a hole
    points = []
    for ahead, behind, step in ((head[:, 1:], head[:, :-1], (1, 0.5)), (head[1:], head[:-1], (0.5, 1))):
        y, x = np.nonzero(ahead != behind)
        points.append(np.stack((x + step[0], y + step[1]), 1))  # pixel (0, 0) reaches to (1, 1)
    try:
        _, _, a, b, _ = fit_ellipse(np.concatenate(points) * mm)
    except ValueError:
        return np.nan
    return ellipse_circumference(a, b)
