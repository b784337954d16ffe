"""Scores and their intervals, in numpy.

Every classification score is a function of a confusion matrix, counts (..., K, K) with labels as rows and predictions
as columns, so that many resampled test sets are scored by one matrix product. K classes, E episodes, G groups of test
images (patients, examinations, clips), R bootstrap replicates.
"""

import numpy as np


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


def balanced_accuracy(confusion):
    """Mean recall of the classes that have a label, counts (..., K, K) -> (...); nan where there is none.

    A class that is only ever predicted is left out, as in scikit-learn's balanced_accuracy_score.
    """
    return _mean_ratio(_diagonal(confusion), confusion.sum(-1))


def macro_f1(confusion):
    """Mean F1 of the classes that have a label or a prediction, counts (..., K, K) -> (...); nan where there is none.

    So a class that is only ever predicted counts as 0, as in scikit-learn's f1_score(average="macro").
    """
    return _mean_ratio(2 * _diagonal(confusion), confusion.sum(-1) + confusion.sum(-2))


def _diagonal(confusion):
    return np.diagonal(confusion, axis1=-2, axis2=-1)  # (..., K)


def _mean_ratio(part, whole):
    """Mean of part / whole over the last axis where whole > 0; nan where no whole is."""
    present = whole > 0
    ratio = np.where(present, part, 0) / np.where(present, whole, 1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return ratio.sum(-1) / present.sum(-1)


# ---------------------------------------------------------------- intervals

def resampling_weights(n_episodes, n_groups, seed=0, replicates=2000):
    """How often each replicate draws every episode (1 + R, E) and every group (1 + R, G). Row 0 draws each once.

    A test set is a sample twice over: another draw of support images, and other patients. Both are resampled, at once
    and independently; groups as a whole, because images of one patient err together. Give the same weights to all
    models that are to be compared: their differences are then paired.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, n_episodes, n_groups])))

    def draw(n):
        weights = np.ones((1 + replicates, n), np.float32)
        for row in weights[1:]:
            row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
        return weights

    return draw(n_episodes), draw(n_groups)


def bootstrap(counts, weights, scores=(balanced_accuracy, macro_f1)):
    """Counts (E, G, K, K) and `resampling_weights` -> mean score over episodes of every replicate (scores, 1 + R).

    Column 0 is the estimate itself. An episode without a query image left in a replicate is left out of its mean.
    """
    episode_weights, group_weights = weights
    total, drawn = np.zeros((2, len(scores), len(group_weights)))
    for episode, weight in zip(counts, episode_weights.T):  # an episode at a time bounds the memory
        cells = episode.reshape(len(episode), -1).astype(np.float32)  # (G, K * K); float32 is exact to 16 million
        summed = (group_weights @ cells).reshape(-1, *episode.shape[1:])  # (1 + R, K, K)
        for i, score in enumerate(scores):
            values = score(summed)  # (1 + R,)
            total[i] += weight * np.nan_to_num(values)
            drawn[i] += weight * np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return total / drawn


def interval(replicates, level=0.95):
    """Replicates (1 + R,), the estimate first -> (estimate, low, high), the percentiles that hold `level` of them."""
    low, high = np.nanpercentile(replicates[1:], [50 - 50 * level, 50 + 50 * level])
    return float(replicates[0]), float(low), float(high)
