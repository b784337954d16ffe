"""Intervals and paired tests of what metrics.py scores: other patients, and which model is better, in numpy.

K classes, n test images in G groups (patients, examinations, clips), S runs (fine-tuning seeds), E episodes, R
bootstrap replicates. Groups are resampled, and swapped between models, as a whole: images of one patient err together.
"""

from math import lcm
from statistics import NormalDist

import numpy as np

from scores.metrics import (CLASSIFICATION_SCORES, accuracy, balanced_accuracy, checked_scores, diagonal, dice,
                            group_confusion, macro_auroc, macro_f1, mean_ratio, rank_bounds, ratio)

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
    labels, scores = checked_scores(labels, scores)
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
    return class_mean_replicates(_per_image(values)[..., None], groups, weights)


def class_mean_replicates(values, groups, weights):
    """`mask_scores` of images (S, n, K), `group_weights` -> mean over classes of each one's mean over images (1 + R,).

    A nan is left out of its class's mean, a class with nothing but nan in a replicate out of that replicate's; runs
    are averaged. Give the classes that count: values[:, :, 1:] leaves out the background.
    """
    values = _per_image_and_class(values)
    known = ~np.isnan(values)
    sums = np.stack((np.where(known, values, 0), known)).transpose(0, 1, 3, 2)  # (2, S, K, n)
    total, count = _replicate_sums(sums, groups, weights)  # (1 + R, S, K) each
    return mean_ratio(total, count).mean(1)


def pooled_replicates(counts, groups, weights, score=dice):
    """`mask_counts` of images (S, n, K, 3), `group_weights` -> mean over classes of the score of all pixels (1 + R,).

    score(counts (..., 3)) is dice or iou of the sums over a replicate's images. A class that neither the truth nor the
    prediction has in a replicate is left out of that replicate's mean; runs are averaged.
    """
    counts = _checked_counts(counts)
    summed = np.moveaxis(_replicate_sums(counts.transpose(3, 0, 2, 1), groups, weights), 0, -1)  # (1 + R, S, K, 3)
    return _known_mean(score(summed)).mean(1)


def _replicate_sums(values, groups, weights):
    """Sums over the images that each replicate draws: values (..., S, K, n) -> (..., 1 + R, S, K)."""
    *leading, n_runs, K, n = values.shape
    sums = weights @ _group_sums(values.reshape(-1, n), groups, weights.shape[1])
    return np.moveaxis(sums.reshape(-1, *leading, n_runs, K), 0, -3)


def _known_mean(values):
    """Mean over the last axis of what is not nan; nan where all is."""
    return mean_ratio(np.nan_to_num(values), ~np.isnan(values))


def _per_image_and_class(values):
    values = np.asarray(values, np.float64)
    if values.ndim != 3 or not values.size or np.isinf(values).any():
        raise ValueError(f"values of shape {values.shape}: expected (runs, images, classes), at least one of each, "
                         f"numbers or nan")
    return values


def _checked_counts(counts):
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 4 or counts.shape[3] != 3 or not counts.size:
        raise ValueError(f"pixel counts of shape {counts.shape}: expected (runs, images, classes, 3), at least one of "
                         f"each")
    return counts


def _per_image(values):
    values = np.atleast_2d(np.asarray(values, np.float64))  # (S, n)
    if not values.size or np.isinf(values).any():
        raise ValueError("values of images must be numbers, or nan where an image has none, and at least one")
    return values


def _group_sums(values, groups, n_groups):
    """Sums over the images of each group: values (m, n), groups (n,) -> (G, m)."""
    groups = _checked_groups(groups, values.shape[1], n_groups)
    return np.stack([np.bincount(groups, row, n_groups) for row in values], 1)


def _checked_groups(groups, n, n_groups=np.inf):
    groups = np.asarray(groups)
    if groups.shape != (n,) or groups.min() < 0 or groups.max() >= n_groups:
        raise ValueError(f"groups must be {n} numbers from 0, one per image, below {n_groups}")
    return groups


def interval(replicates, level=0.95):
    """Replicates (1 + R,), the estimate first -> (estimate, low, high), the percentiles that hold `level` of them.

    Replicates that are nan are left out; of nothing but nan, low and high are nan.
    """
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    low, high = np.percentile(drawn, [50 - 50 * level, 50 + 50 * level]) if len(drawn) else (np.nan, np.nan)
    return float(replicates[0]), float(low), float(high)


def standard_error(replicates):
    """Standard deviation of replicates (1 + R,) but the estimate, the first, and nan; of fewer than two left, nan."""
    drawn = replicates[1:][~np.isnan(replicates[1:])]
    return drawn.std(ddof=1) if len(drawn) > 1 else np.nan


def detectable_difference(replicates):
    """The smallest true difference that a two-sided test at 5 % finds with a power of 80 %: 2.80 standard errors.

    Replicates (1 + R,) of the difference of two models, the estimate first; their standard deviation is the standard
    error of the difference on a test set of this size.
    """
    z = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(0.80)
    return float(z * standard_error(replicates))


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
    mean = ratio(total, count)
    spread = 1.96 * np.sqrt(ratio(np.maximum(squares - total * np.nan_to_num(mean), 0), count - 1))
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
    (labels, a), (_, b) = checked_scores(labels, a), checked_scores(labels, b)
    groups = _checked_groups(groups, len(labels))
    if a.shape[2] != b.shape[2]:
        raise ValueError(f"models with {a.shape[2]} and {b.shape[2]} classes cannot be compared")
    n, K = a.shape[1:]
    G, n_runs = int(groups.max()) + 1, lcm(len(a), len(b))
    a, b = (np.tile(scores, (n_runs // len(scores), 1, 1)) for scores in (a, b))  # (S, n, K)
    right_a, right_b = ((scores.argmax(2) == labels).mean(0) for scores in (a, b))  # (n,)
    counts, difference = np.bincount(labels, minlength=K), right_a - right_b
    areas = sum(_auroc_shares(labels, *pair) for pair in zip(a, b)) if ranked else np.full(n, np.nan)
    # these three differences of scores are sums over images, but for a factor, which changes no p
    p = [_flip_p_of_sum(shares, groups, seed, flips) for shares in (difference, difference / counts[labels], areas)]

    # that of macro F1 is no such sum: it needs the totals of right and of predicted images of each class
    cells = np.empty((2, G, n_runs, 2, K))
    for i, scores in enumerate((a, b)):
        for run in range(n_runs):
            confusions = group_confusion(labels, scores[run].argmax(1), groups, K, G)  # (G, K, K)
            cells[i, :, run] = np.stack((diagonal(confusions), confusions.sum(1)), 1)
    middle = cells.sum((0, 1)) / 2  # (S, 2, K)

    def f1(totals):  # (flips, S, 2, K) -> (flips,)
        return mean_ratio(2 * totals[:, :, 0], counts + totals[:, :, 1]).mean(1)

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
    shares = np.where(known, difference, 0)
    return _flip_p_of_sum(shares, groups, seed, flips) if known.any() else float("nan")


def sign_flip_class_means(a, b, groups, seed=0, flips=10_000):
    """Two-sided p that `mask_scores` of images, a (S, n, K) and b (S', n, K), have equal means over images and classes.

    The means are those of `class_mean_replicates`, the test is that of `sign_flip_test`. Values must be nan for the
    same images and classes in every run of both; of nothing but nan, p is nan.
    """
    a, b = _per_image_and_class(a), _per_image_and_class(b)
    known = ~np.isnan(a[0])  # (n, K)
    if a.shape[1:] != b.shape[1:] or any((np.isnan(run) == known).any() for run in (*a, *b)):
        raise ValueError("values to compare must be of the same images and classes, nan where these lack a value")
    groups = _checked_groups(groups, len(known))
    difference = np.where(known, a.mean(0) - b.mean(0), 0)
    shares = (difference / known.sum(0).clip(1)).sum(1)  # (n,): of the sum over classes of their means' differences
    return _flip_p_of_sum(shares, groups, seed, flips) if known.any() else float("nan")


def sign_flip_pooled(a, b, groups, seed=0, flips=10_000, score=dice):
    """Two-sided p that `mask_counts` of images, a (S, n, K, 3) and b (S', n, K, 3), have equal pooled scores.

    The scores are those of `pooled_replicates`, the test is that of `sign_flip_test`. The truth must be the same in
    every run of both; if it has none of the classes anywhere, p is nan.
    """
    a, b = _checked_counts(a), _checked_counts(b)
    if a.shape[1:] != b.shape[1:] or any((run[..., 1] != a[0, ..., 1]).any() for run in (*a, *b)):
        raise ValueError("pixel counts to compare must be of the same images and classes, with as many pixels each")
    groups = _checked_groups(groups, a.shape[1])
    n_runs, G = lcm(len(a), len(b)), int(groups.max()) + 1
    sums = [_group_sums(np.tile(counts, (n_runs // len(counts), 1, 1, 1)).swapaxes(0, 1).reshape(len(groups), -1).T,
                        groups, G) for counts in (a, b)]  # (G, S * K * 3) each
    middle = (sums[0] + sums[1]).sum(0) / 2

    def pooled(totals):  # (flips, S * K * 3) -> (flips,)
        return _known_mean(score(totals.reshape(-1, n_runs, a.shape[2], 3))).mean(1)

    def difference(x):
        return pooled(middle + x) - pooled(middle - x)

    return _flip_p((sums[0] - sums[1]) / 2, difference, seed, flips) if a[..., 1].any() else float("nan")


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
        ranks = np.stack([sum(rank_bounds(x, np.sort(x))) for x in (a[:, k], b[:, k])])  # (2, n): twice the mid-ranks
        for side, sign in ((own, 1), (~own, -1)):
            # (2, images): twice the count
            lower = sum(rank_bounds(ranks[:, side], np.sort(ranks[:, ~side], axis=None)))
            shares[side] += sign * (lower[0] - lower[1]) / (own.sum() * (~own).sum())
    return shares


def _flip_p_of_sum(shares, groups, seed, flips):
    """p of a difference that is the sum of the shares of images (n,)."""
    sums = _group_sums(shares[None], groups, int(groups.max()) + 1)  # (G, 1)
    return _flip_p(sums, lambda x: x[:, 0], seed, flips)


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
