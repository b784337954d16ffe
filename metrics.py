"""Scores, their intervals and paired tests, in numpy.

Every classification score but AUROC is a function of a confusion matrix, counts (..., K, K) with labels as rows and
predictions as columns, so that many resampled test sets are scored by one matrix product. K classes, n test images in
G groups (patients, examinations, clips), S runs (fine-tuning seeds), E episodes, R bootstrap replicates.

A model's result on a test set is `scores` (S, n, K), probabilities say; its prediction is the largest, the first of
equal ones. Where only labels are known, scores are their one-hot rows and `ranked` is False: AUROC is then nan.
"""

from math import lcm
from statistics import NormalDist

import numpy as np

CLASSIFICATION_SCORES = ("accuracy", "balanced accuracy", "macro F1", "macro AUROC")


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
    return _mean_ratio(_diagonal(confusion).sum(-1, keepdims=True), confusion.sum((-2, -1))[..., None])


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


def per_class(confusion):
    """Counts (..., K, K) -> precision, recall, F1 and support of each class, arrays (..., K) in a dict.

    Precision is nan for a class never predicted, recall for one never a label, F1 for one that is neither: 0 / 0, as
    in scikit-learn's zero_division=nan. So F1 of a class that is only ever a label, or only ever predicted, is 0.
    """
    right, support, predicted = _diagonal(confusion), confusion.sum(-1), confusion.sum(-2)
    return {"precision": _ratio(right, predicted), "recall": _ratio(right, support),
            "f1": _ratio(2 * right, support + predicted), "support": support}


def auroc(labels, scores, weights=None):
    """One-vs-rest area under the ROC curve of each class: labels (n,), scores (n, K), weights (..., n) -> (..., K).

    The weighted share of pairs, one image of the class and one of another, in which the first scores higher; equal
    scores count half. nan where the class or its rest has no weight. Weights (1 + R, n) score every replicate.
    """
    labels, scores = _checked(labels, scores, 2)
    n, K = scores.shape
    weights = np.ones(n) if weights is None else np.asarray(weights)
    rows = weights.reshape(-1, n)
    plans = []
    for k in range(K):
        positives, negatives = np.flatnonzero(labels == k), np.flatnonzero(labels != k)
        negatives = negatives[scores[negatives, k].argsort(kind="stable")]
        plans.append((positives, negatives, *_ranks(scores[positives, k], scores[negatives, k])))
    result = np.empty((len(rows), K))
    step = max(1, 2_000_000 // n)  # replicates at a time: bounds the memory to some copies of 16 MB
    for start in range(0, len(rows), step):
        w = np.ascontiguousarray(rows[start:start + step].T, np.float64)  # (n, r): images are picked as whole rows
        for k, (positives, negatives, below, up_to) in enumerate(plans):
            passed = np.zeros((len(negatives) + 1, w.shape[1]))  # weight of the negatives that score less
            np.cumsum(w[negatives], axis=0, out=passed[1:])
            own = w[positives]
            won = (own * (passed[below] + passed[up_to])).sum(0) / 2
            result[start:start + step, k] = _ratio(won, own.sum(0) * passed[-1])
    return result.reshape(*weights.shape[:-1], K)


def macro_auroc(labels, scores, weights=None):
    """Mean `auroc` of the classes that have one -> (...); nan where none has. Of two classes it is the usual AUROC.

    scikit-learn's roc_auc_score(multi_class="ovr") is the same, but refuses a test set in which a class is absent.
    """
    values = auroc(labels, scores, weights)
    return _mean_ratio(np.nan_to_num(values), np.isfinite(values))


def _ranks(values, ordered):
    """How many of `ordered` lie below each value, and how many below it or equal to it."""
    return np.searchsorted(ordered, values, "left"), np.searchsorted(ordered, values, "right")


def _checked(labels, scores, axes=3):
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


def _checked_groups(groups, n, n_groups=np.inf):
    groups = np.asarray(groups)
    if groups.shape != (n,) or groups.min() < 0 or groups.max() >= n_groups:
        raise ValueError(f"groups must be {n} numbers from 0, one per image, below {n_groups}")
    return groups


def _diagonal(confusion):
    return np.diagonal(confusion, axis1=-2, axis2=-1)  # (..., K)


def _ratio(part, whole):
    """part / whole where whole > 0, else nan."""
    present = whole > 0
    return np.where(present, part / np.where(present, whole, 1).astype(np.float64), np.nan)


def _mean_ratio(part, whole):
    """Mean of part / whole over the last axis where whole > 0; nan where no whole is."""
    return _ratio(np.nan_to_num(_ratio(part, whole)).sum(-1), (whole > 0).sum(-1))


# ---------------------------------------------------------------- intervals

def resampling_weights(n_episodes, n_groups, seed=0, replicates=2000):
    """How often each replicate draws every episode (1 + R, E) and every group (1 + R, G). Row 0 draws each once.

    A test set is a sample twice over: another draw of support images, and other patients. Both are resampled, at once
    and independently; groups as a whole, because images of one patient err together. Give the same weights to all
    models that are to be compared: their differences are then paired.
    """
    rng = _philox(seed, n_episodes, n_groups)
    return _draw(rng, n_episodes, replicates), _draw(rng, n_groups, replicates)


def group_weights(n_groups, seed=0, replicates=2000):
    """How often each replicate of a cluster bootstrap draws every group, float32 (1 + R, G). Row 0 draws each once.

    Give the same weights to all models: their differences are then paired. With one group there is nothing to
    resample, and intervals have no width.
    """
    return _draw(_philox(seed, n_groups), n_groups, replicates)


def _philox(*key):
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _draw(rng, n, replicates):
    weights = np.ones((1 + replicates, n), np.float32)
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(n, size=n), minlength=n)
    return weights


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


def replicate_scores(labels, scores, groups, weights, ranked=True):
    """{name: (1 + R,)} for CLASSIFICATION_SCORES: the mean over runs in every replicate, the estimate first.

    labels (n,), scores (S, n, K), groups (n,) and `group_weights` (1 + R, G). Runs are averaged, not resampled: the
    intervals are about other patients, not about other fine-tuning seeds. nan where nothing is left to score.
    """
    labels, scores = _checked(labels, scores)
    (n_runs, n, K), G = scores.shape, weights.shape[1]
    groups = _checked_groups(groups, n, G)
    images = weights[:, groups] if ranked else None  # (1 + R, n)
    total = np.zeros((len(CLASSIFICATION_SCORES), len(weights)))
    for run in scores:  # a run at a time bounds the memory
        cells = group_confusion(labels, run.argmax(1), groups, K, G).reshape(G, -1).astype(np.float32)  # (G, K * K)
        summed = (weights @ cells).reshape(-1, K, K)  # (1 + R, K, K); float32 is exact to 16 million
        for i, score in enumerate((accuracy, balanced_accuracy, macro_f1)):
            total[i] += score(summed)
        total[3] += macro_auroc(labels, run, images) if ranked else np.nan
    return dict(zip(CLASSIFICATION_SCORES, total / n_runs))


def mean_replicates(values, groups, weights):
    """Values of images (n,), or (S, n) of runs, and `group_weights` -> their mean in every replicate (1 + R,).

    A nan, an image without a value, is left out of its run's mean; runs are averaged.
    """
    values = _per_image(values)  # (S, n)
    sums = _group_sums(np.concatenate((np.nan_to_num(values), ~np.isnan(values))), groups, weights.shape[1])
    total, count = (weights @ sums).T.reshape(2, len(values), -1)  # (S, 1 + R) each
    return _ratio(total, count).mean(0)


def _per_image(values):
    values = np.atleast_2d(np.asarray(values, np.float64))  # (S, n)
    if not values.size or np.isinf(values).any():
        raise ValueError("values of images must be numbers, or nan where an image has none, and at least one")
    return values


def _group_sums(values, groups, n_groups):
    """Sums over the images of each group: values (m, n), groups (n,) -> (G, m)."""
    groups = _checked_groups(groups, values.shape[1], n_groups)
    return np.stack([np.bincount(groups, row, n_groups) for row in values], 1)


def interval(replicates, level=0.95):
    """Replicates (1 + R,), the estimate first -> (estimate, low, high), the percentiles that hold `level` of them.

    Replicates that are nan are left out; of nothing but nan, low and high are nan.
    """
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    low, high = np.percentile(drawn, [50 - 50 * level, 50 + 50 * level]) if len(drawn) else (np.nan, np.nan)
    return float(replicates[0]), float(low), float(high)


def detectable_difference(replicates):
    """The smallest true difference that a two-sided test at 5 % finds with a power of 80 %: 2.80 standard errors.

    Replicates (1 + R,) of the difference of two models, the estimate first; their standard deviation is the standard
    error of the difference on a test set of this size.
    """
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.80)
    return float(z * drawn.std(ddof=1)) if len(drawn) > 1 else float("nan")


def limits_of_agreement(differences, weights=None, groups=None):
    """Bland-Altman: {"bias", "lower", "upper": (estimate, low, high)}, in the unit of the differences (n,).

    Bias is their mean, the limits are bias -+ 1.96 standard deviations (n - 1 below), each with the 95 % interval of
    the bootstrap over groups (n,), by default every measurement its own. Differences all alike: both limits equal the
    bias. One measurement has no standard deviation: its limits are nan.
    """
    x = np.asarray(differences, np.float64)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise ValueError("differences must be a row of at least one finite number: leave out images without a "
                         "measurement, and report how many")
    groups = _checked_groups(np.arange(len(x)) if groups is None else groups, len(x))
    weights = group_weights(int(groups.max()) + 1) if weights is None else weights
    center = np.median(x)  # the spread of x - center loses no digits to its mean
    x = x - center
    count, total, squares = (weights @ _group_sums(np.stack((x * 0 + 1, x, x * x)), groups, weights.shape[1])).T
    mean = _ratio(total, count)
    spread = 1.96 * np.sqrt(_ratio(np.maximum(squares - total * np.nan_to_num(mean), 0), count - 1))
    bias = center + mean
    return {"bias": interval(bias), "lower": interval(bias - spread), "upper": interval(bias + spread)}


# ---------------------------------------------------------------- paired tests

def sign_flip_test(labels, a, b, groups, seed=0, flips=10_000, ranked=True):
    """Two-sided p, {name: p} for CLASSIFICATION_SCORES, that models a (S, n, K) and b (S', n, K) score alike.

    If they do, what they said of a group might as well have come from the other one. So each flip swaps a random
    half of the groups, in all runs at once, and p is the share of flips that leave a difference of scores, of either
    sign, as large as the one observed: of all 2**G patterns where these are no more than `flips`, else
    (1 + count) / (1 + flips). With one group p is 1. Runs are swapped in pairs; of unequal numbers, both are repeated
    until they are equal, which leaves the mean over runs as it is. AUROC is tested on the ranks of each run's scores
    (Bandos et al. 2005, Stat. Med. 24:2873): a model surer of itself than the other one is not thereby different.
    """
    (labels, a), (_, b) = _checked(labels, a), _checked(labels, b)
    groups = _checked_groups(groups, len(labels))
    if a.shape[2] != b.shape[2]:
        raise ValueError(f"models with {a.shape[2]} and {b.shape[2]} classes cannot be compared")
    n, K = a.shape[1:]
    G, n_runs = int(groups.max()) + 1, lcm(len(a), len(b))
    a, b = (np.tile(scores, (n_runs // len(scores), 1, 1)) for scores in (a, b))  # (S, n, K)
    right_a, right_b = ((scores.argmax(2) == labels).mean(0) for scores in (a, b))  # (n,)
    counts, difference = np.bincount(labels, minlength=K), right_a - right_b
    areas = sum(_auroc_shares(labels, *pair) for pair in zip(a, b)) if ranked else np.full(n, np.nan)
    # these three differences of scores are sums over images, but for a factor, which changes no p: (G, 3)
    shares = _group_sums(np.stack((difference, difference / counts[labels], areas)), groups, G)
    p = [_flip_p(share[:, None], lambda x: x[:, 0], seed, flips) for share in shares.T]

    # that of macro F1 is no such sum: it needs the totals of right and of predicted images of each class
    cells = np.empty((2, G, n_runs, 2, K))
    for i, scores in enumerate((a, b)):
        for run in range(n_runs):
            confusions = group_confusion(labels, scores[run].argmax(1), groups, K, G)  # (G, K, K)
            cells[i, :, run] = np.stack((_diagonal(confusions), confusions.sum(1)), 1)
    middle = cells.sum((0, 1)) / 2  # (S, 2, K)

    def f1(totals):  # (flips, S, 2, K) -> (flips,)
        return _mean_ratio(2 * totals[:, :, 0], counts + totals[:, :, 1]).mean(1)

    def f1_difference(x):
        x = x.reshape(-1, *middle.shape)
        return f1(middle + x) - f1(middle - x)

    p.insert(2, _flip_p((cells[0] - cells[1]).reshape(G, -1) / 2, f1_difference, seed, flips))
    return dict(zip(CLASSIFICATION_SCORES, p))


def sign_flip_means(a, b, groups, seed=0, flips=10_000):
    """Two-sided p that values of images, a and b (n,) or (S, n) of runs, have equal means; `sign_flip_test` otherwise.

    Runs are averaged first. An image without a value, a nan in any run of either, is left out; of none left, p is nan.
    """
    a, b = _per_image(a).mean(0), _per_image(b).mean(0)  # (n,) each
    if a.shape != b.shape:
        raise ValueError(f"values of {len(a)} and of {len(b)} images cannot be compared: both must be of the same ones")
    difference, groups = a - b, _checked_groups(groups, len(a))
    known = ~np.isnan(difference)
    sums = _group_sums(np.where(known, difference, 0)[None], groups, int(groups.max()) + 1)  # (G, 1)
    return _flip_p(sums, lambda x: x[:, 0], seed, flips) if known.any() else float("nan")


def _auroc_shares(labels, a, b):
    """What each image adds to the difference of macro AUROC of a and b, both (n, K) -> (n,), but for a factor.

    After a flip images of a are compared with images of b too. Half of every pair's result counted to either image
    makes the difference a sum over images, each set against both models' other side, and a swap turns an image's sign.
    """
    classes = np.unique(labels)
    if len(classes) == 1:
        return np.full(len(labels), np.nan)
    shares = np.zeros(len(labels))
    for k in classes:
        own = labels == k
        ranks = np.stack([sum(_ranks(x, np.sort(x))) for x in (a[:, k], b[:, k])])  # (2, n): twice the mid-ranks
        for side, sign in ((own, 1), (~own, -1)):
            lower = sum(_ranks(ranks[:, side], np.sort(ranks[:, ~side], axis=None)))  # (2, images): twice the count
            shares[side] += sign * (lower[0] - lower[1]) / (own.sum() * (~own).sum())
    return shares


def _flip_p(parts, statistic, seed, flips):
    """p of parts (G, m): statistic of their sums (flips, m) under random signs against that of their plain sum."""
    if np.isnan(parts).any():
        return float("nan")
    parts = parts[parts.any(1)]  # the sign of a group in which the models agree changes nothing
    G = len(parts)
    exact = 2 ** G <= flips
    rng, total, values = _philox(seed, G), 2 ** G if exact else flips, []
    for start in range(0, total, 500):
        size = min(500, total - start)
        if exact:
            bits = np.arange(start, start + size)[:, None] >> np.arange(G) & 1  # (flips, G)
        else:
            bits = rng.integers(2, size=(size, G), dtype=np.int8)
        values.append(np.abs(statistic((1.0 - 2 * bits) @ parts)))
    values, observed = np.concatenate(values), np.abs(statistic(parts.sum(0, keepdims=True)))[0]
    extreme = values >= observed - 1e-10 * max(values.max(), observed)  # equal but for rounding
    return float(extreme.mean() if exact else (1 + extreme.sum()) / (1 + flips))


def holm(p):
    """p values (m,) -> adjusted by Holm's step-down method, in their order; nan stays and does not count."""
    p = np.asarray(p, np.float64)
    order = p.argsort()[:(~np.isnan(p)).sum()]  # nan sorts last
    adjusted = np.full(p.shape, np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1)
    return adjusted
