"""Means of masks' scores and pooled scores of every replicate against resampled test sets spelled out; their sign flips
against all swaps, SciPy's permutation test and the p of equal models."""

from itertools import product

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from scores.metrics import dice, iou, mask_counts
from scores.stats import (class_mean_replicates, group_weights, interval, mean_replicates, pooled_replicates,
                          sign_flip_class_means, sign_flip_means, sign_flip_pooled)

K = 4


def masks(n_groups, per_group=3, runs=(2, 2), errors=(0.3, 0.3), seed=0, side=6):
    """Truth (n, side, side) of K classes, two models' masks (S, n, side, side), groups. Class 3 is in few images.

    A model's share of wrong pixels is drawn for each group, about `errors`.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    truth = rng.integers(0, K - 1, (len(groups), side, side))
    truth[1, :2] = truth[-1, 0] = K - 1
    found = []
    for n_runs, error in zip(runs, errors):
        wrong = rng.random((n_runs, len(groups), side, side)) < (2 * error * rng.random(n_groups))[groups, None, None]
        found.append(np.where(wrong, rng.integers(0, K, wrong.shape), truth))
    return truth, *found, groups


def counts_of(truth, model):
    return np.array([[mask_counts(*pair, K) for pair in zip(truth, run)] for run in model])  # (S, n, K, 3)


def values_of(counts, score=dice):
    return np.where(counts[..., 1] > 0, score(counts), np.nan)  # (S, n, K)


def drawn(weight, groups):
    """The images of a replicate, as often as it holds them."""
    return np.concatenate([np.flatnonzero(groups == g) for g, times in enumerate(weight) for _ in range(int(times))])


def mean_of_classes(values):
    """Written out: values (S, n, K) -> mean over runs of the mean over classes of the mean over images."""
    of_runs = []
    for run in values:
        means = [np.mean([x for x in column if x == x]) for column in run.T if any(x == x for x in column)]
        of_runs.append(np.mean(means) if means else np.nan)
    return np.mean(of_runs)


# ---------------------------------------------------------------- replicates

@pytest.mark.parametrize("first", [0, 1], ids=["with background", "foreground"])
def test_class_means_of_the_resampled_test_set(first):
    truth, model, _, groups = masks(6)
    groups = groups + (groups > 3)  # group 4 is empty
    values, weights = values_of(counts_of(truth, model), iou)[:, :, first:], group_weights(7, 3, 60)
    actual = class_mean_replicates(values, groups, weights)
    expected = [mean_of_classes(values[:, drawn(weight, groups)]) for weight in weights]
    assert actual.shape == (61,) and actual == pytest.approx(expected, abs=1e-6)
    rare = [np.isnan(values[0, drawn(weight, groups), -1]).all() for weight in weights]
    assert 3 < sum(rare) < 40  # replicates without class 3, whose mean is that of the others


def test_class_means_are_not_those_of_images():
    """Class 1 in one image, class 2 in three: each class weighs a half. By hand."""
    values = np.array([[[1.0, 0.2], [np.nan, 0.4], [np.nan, 0.6]]])
    weights = np.array([[1, 1, 1], [0, 1, 1], [2, 1, 0], [0, 0, 0]], np.float32)
    actual = class_mean_replicates(values, np.arange(3), weights)
    np.testing.assert_allclose(actual, [0.7, 0.5, (1 + 0.8 / 3) / 2, np.nan], atol=1e-6)
    assert np.isnan(class_mean_replicates(values * np.nan, np.arange(3), weights)).all()


def test_one_class_is_a_mean_over_images():
    values = np.random.default_rng(1).normal(size=(3, 12, 1))
    values[:, 4] = np.nan
    weights, groups = group_weights(4, replicates=30), np.arange(12) // 3
    expected = mean_replicates(values[:, :, 0], groups, weights)
    np.testing.assert_allclose(class_mean_replicates(values, groups, weights), expected, atol=1e-12)


@pytest.mark.parametrize("score", [dice, iou])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
def test_pooled_scores_of_the_resampled_test_set(score):
    """scikit-learn's F1 and Jaccard index of all pixels; a class in neither mask is left out."""
    truth, model, _, groups = masks(5, per_group=2)
    model[:, :8] %= K - 1  # the first groups have no false alarms of class 3
    truth[1] %= K - 1
    weights = group_weights(5, 1, 25)
    actual = pooled_replicates(counts_of(truth, model)[:, :, 1:], groups, weights, score)
    oracle = {dice: sklearn.metrics.f1_score, iou: sklearn.metrics.jaccard_score}[score]
    absent = 0
    for replicate, weight in zip(actual, weights):
        images, of_runs = drawn(weight, groups), []
        for run in model:
            pair = truth[images].ravel(), run[images].ravel()
            known = [k for k in range(1, K) if (pair[0] == k).any() or (pair[1] == k).any()]
            absent += len(known) < K - 1
            of_runs.append(np.mean(oracle(*pair, average=None, labels=known)))
        assert replicate == pytest.approx(np.mean(of_runs), abs=1e-6)
    assert 4 < absent < 40


def test_pooled_scores_of_nothing():
    counts = np.zeros((1, 3, 2, 3))
    assert np.isnan(pooled_replicates(counts, np.arange(3), group_weights(3, replicates=5))).all()
    counts[0, 0, 0] = (3, 4, 6)
    replicates = pooled_replicates(counts, np.arange(3), group_weights(3, replicates=50))
    assert interval(replicates) == pytest.approx((0.6,) * 3) and 5 < np.isnan(replicates).sum() < 30
    counts[0, 1, 1] = (0, 0, 1)  # only predicted: 0, as in scikit-learn
    assert pooled_replicates(counts, np.arange(3), group_weights(3, replicates=5))[0] == pytest.approx(0.3)


def test_large_sums_are_exact():
    """Ten thousand images of a million pixels: float32 would lose some."""
    counts = np.full((1, 10_000, 1, 3), 1_000_001)
    counts[0, 0, 0] = 999_999, 1_000_003, 1_000_000
    expected = (2 * (9999 * 1_000_001 + 999_999)) / (2 * 9999 * 1_000_001 + 2_000_003)
    actual = pooled_replicates(counts, np.arange(10_000), np.ones((1, 10_000), np.float32))
    assert actual[0] == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("function, shape", [(class_mean_replicates, (2, 9)), (class_mean_replicates, (0, 9, 2)),
                                             (class_mean_replicates, (2, 9, 0)), (pooled_replicates, (2, 9, 3)),
                                             (pooled_replicates, (2, 9, 2, 2)), (pooled_replicates, (2, 9, 0, 3))])
def test_shapes_that_do_not_fit_raise(function, shape):
    with pytest.raises(ValueError, match=r"expected \(runs, images, classes"):
        function(np.ones(shape), np.arange(9), group_weights(9, replicates=3))


def test_infinite_values_and_foreign_groups_raise():
    with pytest.raises(ValueError, match="numbers or nan"):
        class_mean_replicates(np.full((1, 9, 2), np.inf), np.arange(9), group_weights(9, replicates=3))
    for bad in (np.arange(8), np.arange(9) + 1, np.arange(9) - 1):
        with pytest.raises(ValueError, match="groups must be"):
            class_mean_replicates(np.ones((1, 9, 2)), bad, group_weights(9, replicates=3))
        with pytest.raises(ValueError, match="groups must be"):
            pooled_replicates(np.ones((1, 9, 2, 3)), bad, group_weights(9, replicates=3))


# ---------------------------------------------------------------- sign flips

def share_of_swaps(a, b, groups, statistic):
    """p by every swap of groups between a (S, n, ...) and b: the share with a difference as large as the first's."""
    differences = []
    for pattern in product((True, False), repeat=groups.max() + 1):
        keep = np.array(pattern)[groups].reshape(-1, *[1] * (a.ndim - 2))
        differences.append(abs(statistic(np.where(keep, a, b)) - statistic(np.where(keep, b, a))))
    return (np.array(differences) >= differences[0] - 1e-9).mean(), differences[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("runs", [(1, 1), (2, 2), (2, 3)])
def test_p_is_the_share_of_all_swaps(runs, seed):
    truth, a, b, groups = masks(6, per_group=2, runs=runs, errors=(0.2, 0.3), seed=seed)
    groups = np.where(np.arange(12) == 3, 0, groups)
    a, b = counts_of(truth, a), counts_of(truth, b)
    every = [np.repeat(a, 6 // len(a), 0), np.tile(b, (6 // len(b), 1, 1, 1))]  # each run of a meets each of b
    one = group_weights(6, replicates=0)
    expected, observed = share_of_swaps(*(values_of(x)[:, :, 1:] for x in every), groups, mean_of_classes)
    x, y = values_of(a)[:, :, 1:], values_of(b)[:, :, 1:]
    assert sign_flip_class_means(x, y, groups) == pytest.approx(expected, abs=1e-6)
    difference = class_mean_replicates(x, groups, one) - class_mean_replicates(y, groups, one)
    assert abs(difference[0]) == pytest.approx(observed, abs=1e-9)  # what is tested is what is reported
    for score in (dice, iou):
        def pooled(counts):
            return np.nanmean(score(counts.sum(1)), 1).mean()

        expected, observed = share_of_swaps(*every, groups, pooled)
        assert sign_flip_pooled(a, b, groups, score=score) == pytest.approx(expected, abs=1e-6)
        difference = pooled_replicates(a, groups, one, score) - pooled_replicates(b, groups, one, score)
        assert abs(difference[0]) == pytest.approx(observed, abs=1e-9)


def test_p_of_class_means_is_scipys():
    """Groups of one image; an image's share of the difference is what it adds to its classes' means."""
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 12, 3)), rng.random((1, 12, 3)) * 0.9
    absent = rng.random((12, 3)) < 0.3
    a[:, absent] = b[:, absent] = np.nan
    shares = [np.nansum(x.mean(0) / (~absent).sum(0), axis=1) for x in (a, b)]
    expected = scipy.stats.permutation_test(shares, lambda x, y, axis: (x - y).sum(axis), permutation_type="samples",
                                            vectorized=True, n_resamples=np.inf).pvalue
    assert 0 < expected < 0.7
    assert sign_flip_class_means(a, b, np.arange(12)) == pytest.approx(expected, abs=1e-6)
    assert sign_flip_class_means(90 * a, 90 * b, np.arange(12)) == pytest.approx(expected, abs=1e-6)  # HD95 too


def test_one_class_is_tested_as_means_are():
    a, b, groups = *np.random.default_rng(0).normal(size=(2, 2, 30, 1)), np.arange(30) // 3
    a[:, 5] = b[:, 5] = np.nan
    assert sign_flip_class_means(a, b, groups) == sign_flip_means(a[:, :, 0], b[:, :, 0], groups)


def test_random_flips_are_near_all_flips():
    truth, a, b, groups = masks(12, runs=(1, 1), errors=(0.28, 0.3), seed=2)
    a, b = counts_of(truth, a), counts_of(truth, b)
    for test, pair in ((sign_flip_class_means, (values_of(a), values_of(b))), (sign_flip_pooled, (a, b))):
        exact, few, again, other = (test(*pair, groups, seed, flips)
                                    for seed, flips in ((0, 4096), (0, 4095), (0, 4095), (1, 4095)))
        assert few == again != other and 0.01 < exact < 0.9
        assert exact * 4096 == pytest.approx(round(exact * 4096), abs=1e-9)
        assert abs(few - exact) < 4 * (exact * (1 - exact) / 4095) ** 0.5


def test_identical_models_one_group_and_nothing():
    truth, a, b, groups = masks(20)
    a, b = counts_of(truth, a), counts_of(truth, b)
    x, y = values_of(a), values_of(b)
    assert sign_flip_class_means(x, x, groups) == sign_flip_class_means(x, y, groups * 0) == 1
    assert sign_flip_pooled(a, a, groups) == sign_flip_pooled(a, b, groups * 0) == 1
    assert sign_flip_pooled(a[:1], a[[0, 0]], groups) == sign_flip_class_means(x[:1], x[[0, 0]], groups) == 1
    assert np.isnan(sign_flip_class_means(x * np.nan, y * np.nan, groups))
    alarms = np.zeros((1, 60, 1, 3))
    alarms[:, :, :, 2] = 5  # predicted where the truth has nothing
    assert np.isnan(sign_flip_pooled(alarms, alarms * 0, groups))


def test_a_class_only_predicted_counts_as_zero():
    """A class that the truth lacks and one model sees: any swap but none and all gives both models a 0."""
    counts = np.zeros((1, 8, 2, 3))
    counts[:, :, 0] = 8, 10, 9
    alarms = counts.copy()
    alarms[:, :, 1, 2] = 3
    assert sign_flip_pooled(counts, alarms, np.arange(8)) == 2 / 2 ** 8


def test_p_is_uniform_where_models_are_equal_and_small_where_not():
    """Shares of p below 5 % and 50 % in 200 trials of equal models, within 3.5 standard deviations."""
    def p_of(errors, trial):
        truth, a, b, groups = masks(25, 2, (2, 2), errors, trial, side=4)
        a, b = counts_of(truth, a), counts_of(truth, b)
        return [sign_flip_class_means(values_of(a), values_of(b), groups, trial, 400),
                sign_flip_pooled(a, b, groups, trial, 400), sign_flip_pooled(a, b, groups, trial, 400, iou)]

    p = np.array([p_of((0.3, 0.3), trial) for trial in range(200)])
    for level, slack in ((0.05, 0.054), (0.5, 0.124)):
        assert np.abs((p <= level).mean(0) - level).max() < slack
    p = np.array([p_of((0.15, 0.4), trial) for trial in range(20)])
    assert (np.median(p, axis=0) < 0.01).all()


def test_what_cannot_be_compared_raises():
    truth, a, b, groups = masks(6)
    a, b = counts_of(truth, a), counts_of(truth, b)
    x, y = values_of(a), values_of(b)
    for bad in (y[:, 1:], y[:, :, 1:], np.where(y > 0.8, np.nan, y), np.nan_to_num(y),
                np.stack((y[0], np.where(y[1] > 0.8, np.nan, y[1])))):
        with pytest.raises(ValueError, match="must be of the same images and classes"):
            sign_flip_class_means(x, bad, groups)
        with pytest.raises(ValueError, match="must be of the same images and classes"):
            sign_flip_class_means(bad, x, groups)
    other = b.copy()
    other[1, 4, 2, 1] += 1  # another truth in one run
    for bad in (b[:, 1:], b[:, :, 1:], other):
        with pytest.raises(ValueError, match="must be of the same images and classes"):
            sign_flip_pooled(a, bad, groups)
    for bad in (groups[1:], groups - 1):
        with pytest.raises(ValueError, match="groups must be"):
            sign_flip_class_means(x, y, bad)
        with pytest.raises(ValueError, match="groups must be"):
            sign_flip_pooled(a, b, bad)
