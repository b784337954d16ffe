"""Cluster bootstrap, sign flips, Holm, agreement: against resampled or swapped test sets spelled out, scikit-learn and
SciPy; that p is uniform where models are equal and small where they are not."""

from itertools import product

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from scores import stats
from scores.metrics import CLASSIFICATION_SCORES
from scores.stats import group_weights, interval, replicate_scores, sign_flip_means, sign_flip_test

K = 3


def models(n_groups, per_group=4, runs=(2, 2), skill=(1.0, 1.0), shared=1.0, seed=0):
    """Labels (n,), the scores of two models (S, n, K), groups (n,).

    Scores are `skill` on the right class plus noise; `shared` is the noise that the images of a group have in common.
    """
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    labels = rng.integers(0, K, len(groups))
    labels[:K] = range(K)
    return labels, *(size * np.eye(K)[labels] + rng.normal(size=(n_runs, len(groups), K))
                     + shared * rng.normal(size=(n_runs, n_groups, K))[:, groups]
                     for n_runs, size in zip(runs, skill)), groups


def oracle(labels, run):
    """scikit-learn's scores of one run (n, K), in the order of CLASSIFICATION_SCORES; nan where it has none."""
    predictions = run.argmax(1)
    return np.array([sklearn.metrics.accuracy_score(labels, predictions),
                     sklearn.metrics.balanced_accuracy_score(labels, predictions),
                     sklearn.metrics.f1_score(labels, predictions, average="macro"), area(labels, run)])


def area(labels, run):
    areas = [sklearn.metrics.roc_auc_score(labels == k, run[:, k]) for k in range(run.shape[1])
             if 0 < (labels == k).sum() < len(labels)]
    return np.mean(areas) if areas else np.nan


# ---------------------------------------------------------------- the cluster bootstrap

def test_group_weights_draw_groups_with_replacement():
    weights = group_weights(50, seed=1, replicates=400)
    assert weights.shape == (401, 50) and weights.dtype == np.float32
    assert (weights[0] == 1).all() and (weights.sum(1) == 50).all()
    assert weights[1:].var() == pytest.approx(1 - 1 / 50, rel=0.05)  # multinomial
    assert (weights == group_weights(50, seed=1, replicates=400)).all()
    assert (weights[1:] != group_weights(50, seed=2, replicates=400)[1:]).any()
    assert (group_weights(1, replicates=5) == 1).all()


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_a_replicate_is_the_scores_of_the_resampled_test_set():
    labels, scores, _, groups = models(5)
    scores = scores.round(1)  # ties
    groups = groups + (groups > 2)  # group 3 is empty
    weights = group_weights(6, seed=3, replicates=8)
    actual = replicate_scores(labels, scores, groups, weights)
    assert list(actual) == list(CLASSIFICATION_SCORES)
    for r, weight in enumerate(weights):
        images = np.concatenate([np.flatnonzero(groups == g) for g in range(6) for _ in range(int(weight[g]))])
        expected = np.mean([oracle(labels[images], run[images]) for run in scores], axis=0)
        assert [actual[name][r] for name in CLASSIFICATION_SCORES] == pytest.approx(expected, abs=1e-6)


def test_labels_without_scores_have_no_auroc():
    labels, scores, _, groups = models(6)
    weights = group_weights(6, replicates=20)
    full, bare = (replicate_scores(labels, scores, groups, weights, ranked) for ranked in (True, False))
    for name in CLASSIFICATION_SCORES[:3]:
        assert (full[name] == bare[name]).all()
    assert np.isnan(bare["macro AUROC"]).all() and np.isnan(interval(bare["macro AUROC"])).all()


def test_the_first_of_equal_scores_is_the_prediction():
    scores = np.array([[[0.5, 0.5], [0.5, 0.5]]])
    assert replicate_scores(np.array([0, 1]), scores, np.array([0, 1]), group_weights(2))["accuracy"][0] == 0.5


def test_a_replicate_that_leaves_nothing_to_score_is_left_out():
    """Of two groups one is empty, so a quarter of the replicates draw no image."""
    labels, scores, groups = np.array([0, 1]), np.array([[[1, 0], [1, 0]]]), np.array([1, 1])
    actual = replicate_scores(labels, scores, groups, group_weights(2, replicates=400))
    for name, value in zip(CLASSIFICATION_SCORES, (0.5, 0.5, 1 / 3, 0.5)):
        assert 60 < np.isnan(actual[name]).sum() < 140
        assert interval(actual[name]) == pytest.approx((value,) * 3, abs=1e-6)


def test_one_group_has_no_interval():
    labels, scores, _, groups = models(1, per_group=20)
    for replicates in replicate_scores(labels, scores, groups, group_weights(1)).values():
        assert np.ptp(interval(replicates)) < 1e-12


def coverage(n_groups, trials=200):
    """How many of the trials' intervals hold the truth, for each score; images of a group are alike."""
    truth = replicate_scores(*models(20_000, runs=(1, 1))[:2], models(20_000)[3], np.ones((1, 20_000), np.float32))
    covered = dict.fromkeys(CLASSIFICATION_SCORES, 0)
    for trial in range(trials):
        labels, scores, _, groups = models(n_groups, runs=(1, 1), seed=1 + trial)
        for name, replicates in replicate_scores(labels, scores, groups, group_weights(n_groups, trial, 300)).items():
            _, low, high = interval(replicates)
            covered[name] += low <= truth[name][0] <= high
    return covered


def test_the_interval_covers_the_truth():
    """Nominal 95 %; three standard deviations of 200 trials leave 90 %."""
    assert min(coverage(50).values()) >= 180


def test_of_few_groups_the_interval_is_too_narrow():
    """What a warning says of test sets with few groups: not an aim, but true."""
    covered = coverage(6)
    assert 140 < min(covered.values()) < 180, covered


def test_means_of_images():
    values, groups = np.random.default_rng(0).normal(size=(2, 12)), np.arange(12) // 3
    values[0, 4] = values[1, 5] = values[1, 6] = np.nan
    weights = group_weights(4, replicates=30)
    expected = [np.mean([np.nanmean(np.repeat(run, w[groups].astype(int))) for run in values]) for w in weights]
    assert stats.mean_replicates(values, groups, weights) == pytest.approx(expected, abs=1e-12)
    alone = stats.mean_replicates(values[1], groups, weights)
    assert alone[0] == pytest.approx(np.nanmean(values[1]), abs=1e-12)
    assert np.isnan(stats.mean_replicates(np.full(12, np.nan), groups, weights)).all()


@pytest.mark.parametrize("values, groups", [([1, np.inf], [0, 1]), ([], []), ([1, 2], [0, 4]), ([1, 2], [0, -1]),
                                            ([1, 2, 3], [0, 1])])
def test_values_or_groups_that_do_not_fit_raise(values, groups):
    with pytest.raises(ValueError, match="must be"):
        stats.mean_replicates(np.array(values, float), np.array(groups, int), group_weights(4, replicates=3))


# ---------------------------------------------------------------- sign flips

@pytest.mark.parametrize("runs", [(1, 1), (2, 2), (2, 3)])
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_p_is_the_share_of_all_swaps(runs):
    """Every one of the 32 swaps of five groups, scored by scikit-learn; ties, and a group of another size."""
    labels, a, b, groups = models(5, per_group=3, runs=runs, skill=(1.0, 0.4), seed=sum(runs))
    a, b, groups = a.round(1), b.round(1), np.where(np.arange(15) == 3, 0, groups)
    pairs = list(product(range(runs[0]), range(runs[1]))) if runs[0] != runs[1] else [(i, i) for i in range(runs[0])]
    rank_a, rank_b = (scipy.stats.rankdata(scores, axis=1) for scores in (a, b))  # each run's, of each class
    scores = []
    for pattern in product((True, False), repeat=5):
        keep = np.array(pattern)[groups][:, None]
        scores.append(np.mean([oracle(labels, np.where(keep, a[i], b[j])) for i, j in pairs], axis=0))
        scores[-1][3] = np.mean([area(labels, np.where(keep, rank_a[i], rank_b[j])) for i, j in pairs])
    statistics = np.abs(np.array(scores) - scores[::-1])  # the reverse order swaps the other groups
    expected = (statistics >= statistics[0] - 1e-9).mean(0)
    observed = np.mean([oracle(labels, x) for x in a], 0) - np.mean([oracle(labels, x) for x in b], 0)
    assert statistics[0] == pytest.approx(np.abs(observed), abs=1e-9)  # what is tested is what is reported
    actual = sign_flip_test(labels, a, b, groups)
    assert list(actual) == list(CLASSIFICATION_SCORES)
    assert list(actual.values()) == pytest.approx(expected, abs=1e-6)


def test_areas_of_unlike_classes_weigh_alike():
    """Few images of class 0, many of class 2: what flips make of the shares, against scikit-learn's areas of ranks."""
    rng = np.random.default_rng(0)
    labels = np.repeat(range(K), (3, 10, 60))
    a, b = scipy.stats.rankdata(rng.normal(size=(2, len(labels), K)).round(1) + np.eye(K)[labels], axis=1)
    shares = stats._auroc_shares(labels, a, b)
    signs = rng.choice([1, -1], (6, len(labels)))
    actual = [area(labels, np.where(row[:, None] > 0, a, b)) - area(labels, np.where(row[:, None] > 0, b, a))
              for row in signs]
    factor = (area(labels, a) - area(labels, b)) / shares.sum()
    assert signs @ shares * factor == pytest.approx(actual, abs=1e-9)


def test_p_of_accuracy_is_scipys():
    """Groups of one image: the difference of accuracies is a mean of paired differences."""
    labels, a, b, _ = models(12, per_group=1, runs=(3, 3), skill=(2.0, 0.0), seed=4)
    right = [(scores.argmax(2) == labels).mean(0) for scores in (a, b)]
    expected = scipy.stats.permutation_test(right, lambda x, y, axis: (x - y).mean(axis), permutation_type="samples",
                                            vectorized=True, n_resamples=np.inf).pvalue
    assert 0 < expected < 0.5
    assert sign_flip_test(labels, a, b, np.arange(12))["accuracy"] == pytest.approx(expected, abs=1e-6)


def test_random_flips_are_near_all_flips():
    labels, a, b, groups = models(12, skill=(1.1, 0.9), seed=1)
    exact, drawn, again, other = (sign_flip_test(labels, a, b, groups, seed, flips)
                                  for seed, flips in ((0, 4096), (0, 4095), (0, 4095), (1, 4095)))
    assert drawn == again != other
    for name, p in exact.items():
        assert 0.02 < p < 0.9 and p * 4096 == pytest.approx(round(p * 4096), abs=1e-9)
        assert abs(drawn[name] - p) < 4 * (p * (1 - p) / 4095) ** 0.5


def test_random_flips_never_give_zero():
    labels, a, b, groups = models(60, skill=(9.0, 0.0))
    assert set(sign_flip_test(labels, a, b, groups, flips=999).values()) == {1 / 1000}


def test_groups_that_agree_are_not_flipped():
    """Thirty groups of which three differ: the eight patterns of these three, not random ones."""
    labels, a, _, groups = models(30, runs=(1, 1), skill=(9.0, 9.0), shared=0)
    b = a.copy()
    b[:, groups < 3] = np.roll(a[:, groups < 3], 1, axis=2)  # all wrong
    p = sign_flip_test(labels, a, b, groups)
    assert p["accuracy"] == p["balanced accuracy"] == p["macro F1"] == 2 / 8


def test_identical_models_and_one_group():
    labels, a, b, groups = models(30)
    assert set(sign_flip_test(labels, a, a, groups).values()) == {1}
    assert set(sign_flip_test(labels, a[:1], a[[0, 0]], groups).values()) == {1}
    assert set(sign_flip_test(labels, a, b, groups * 0).values()) == {1}


def test_one_image_and_absent_classes():
    a, b = np.array([[[0.2, 0.8]]]), np.array([[[0.8, 0.2]]])
    p = sign_flip_test(np.array([1]), a, b, np.array([0]))
    assert p.pop("macro AUROC") != p["accuracy"] == p["balanced accuracy"] == p["macro F1"] == 1  # nan, the others 1
    labels, a, b, groups = models(40, skill=(2.0, 1.0))
    wide = [np.concatenate((x, np.full((2, 160, 1), -9.0)), 2) for x in (a, b)]  # a class that nobody knows
    assert sign_flip_test(labels, *wide, groups) == sign_flip_test(labels, a, b, groups)


def test_without_scores_auroc_is_not_tested():
    labels, a, b, groups = models(20)
    with_scores, without = (sign_flip_test(labels, a, b, groups, ranked=ranked) for ranked in (True, False))
    assert np.isnan(without.pop("macro AUROC")) and 0 < with_scores.pop("macro AUROC") <= 1
    assert with_scores == without


def test_confidence_is_no_difference_in_auroc():
    """b ranks the images of each class as a does, from probabilities near 1/K."""
    labels, a, _, groups = models(30)
    assert sign_flip_test(labels, a, np.tanh(a / 20), groups)["macro AUROC"] == 1


@pytest.mark.parametrize("runs, surer", [((1, 1), 1), ((1, 1), 20), ((2, 2), 1), ((1, 3), 1)],
                         ids=["alike", "b surer of itself", "two runs", "more runs of b"])
def test_p_is_uniform_where_models_are_equal(runs, surer):
    """Errors come by group. Shares of p below 5 % and 50 % in 300 trials, within 3.5 standard deviations."""
    p = []
    for trial in range(300):
        labels, a, b, groups = models(30, per_group=6, runs=runs, seed=trial)
        p.append(list(sign_flip_test(labels, a, surer * b, groups, trial, 400).values()))
    for level, slack in ((0.05, 0.044), (0.5, 0.101)):
        assert np.abs((np.array(p) <= level).mean(0) - level).max() < slack


def test_a_real_difference_is_found():
    p = np.array([list(sign_flip_test(*models(60, skill=(1.6, 1.0), runs=(2, 2), seed=trial), trial, 400).values())
                  for trial in range(30)])
    assert (np.median(p, axis=0) < 0.01).all() and ((p < 0.05).mean(0) > 0.8).all()


def test_what_cannot_be_compared_raises():
    labels, a, b, groups = models(6)
    with pytest.raises(ValueError, match="3 and 2 classes"):
        sign_flip_test(labels % 2, a, b[:, :, :2], groups)
    with pytest.raises(ValueError, match="scores are nan"):
        sign_flip_test(labels, a, np.where(b > 0, np.nan, b), groups)
    for bad in (groups[1:], groups[:1], groups - 1, groups[:0]):
        with pytest.raises(ValueError, match="groups must be"):
            sign_flip_test(labels, a, b, bad)
        with pytest.raises(ValueError, match="groups must be"):
            sign_flip_means(a[0, :, 0], b[0, :, 0], bad)
    for bad in (groups + 1, groups[:1], groups - 1):
        with pytest.raises(ValueError, match="groups must be"):
            replicate_scores(labels, a, bad, group_weights(6))
    with pytest.raises(ValueError, match="24 and of 23 images"):
        sign_flip_means(a[0, :, 0], b[0, 1:, 0], groups)
    for bad in (a[:, 1:], a[0], a[:0]):
        with pytest.raises(ValueError, match=r"expected \(runs, images, classes\)"):
            replicate_scores(labels, bad, groups, group_weights(6))
    with pytest.raises(ValueError, match="scores are nan"):
        replicate_scores(labels, np.where(a > 0, np.nan, a), groups, group_weights(6))


def test_p_of_means_is_scipys():
    rng = np.random.default_rng(2)
    a, b, groups = rng.normal(0.6, 1, (2, 30)), rng.normal(0, 1, 30), rng.integers(0, 10, 30)
    a[1, 3] = b[17] = np.nan
    difference = np.nan_to_num(a.mean(0) - b)  # left out: nothing to the sums
    sums = np.bincount(groups, difference)
    expected = scipy.stats.permutation_test((sums, sums * 0), lambda x, y, axis: (x - y).sum(axis), vectorized=True,
                                            permutation_type="samples", n_resamples=np.inf).pvalue
    assert 0 < expected < 0.5
    assert sign_flip_means(a, b, groups) == pytest.approx(expected, abs=1e-6)
    assert sign_flip_means(a * 1e-12, b * 1e-12, groups) == pytest.approx(expected, abs=1e-6)  # whatever the unit
    assert sign_flip_means(a, a, groups) == sign_flip_means(a, b, groups * 0) == 1
    assert np.isnan(sign_flip_means(a * np.nan, b, groups))


# ---------------------------------------------------------------- many tests, power, agreement

def test_holm():
    p = [0.04, np.nan, 0.01, 0.03, 0.005, 0.9, 0.03]
    known = sorted((x, i) for i, x in enumerate(p) if x == x)
    expected = [np.nan] * 7
    for rank, (_, i) in enumerate(known):  # the largest so far of the smallest p times all, the next times one less ...
        expected[i] = max(min(1, (6 - j) * known[j][0]) for j in range(rank + 1))
    np.testing.assert_allclose(stats.holm(p), expected, atol=1e-12)
    np.testing.assert_allclose(stats.holm([0.01, 0.02, 0.03]), [0.03, 0.04, 0.04], atol=1e-12)  # by hand
    assert stats.holm([0.6, 0.7]).tolist() == [1, 1] and stats.holm([0.2]).tolist() == [0.2]
    assert stats.holm([]).shape == (0,) and np.isnan(stats.holm([np.nan])).all()


def test_detectable_difference_is_found_four_times_in_five():
    replicates = np.concatenate(([9.0], np.random.default_rng(0).normal(size=2000), [np.nan]))  # standard error 1
    difference = stats.detectable_difference(replicates)
    assert difference == pytest.approx(2.801585 * np.nanstd(replicates[1:], ddof=1), abs=1e-5)
    power = scipy.stats.norm.sf(1.959964 - 2.801585) + scipy.stats.norm.cdf(-1.959964 - 2.801585)
    assert power == pytest.approx(0.8, abs=1e-4)
    assert np.isnan(stats.detectable_difference(np.array([0.1, np.nan, np.nan])))


def test_limits_of_agreement():
    rng = np.random.default_rng(5)
    x, groups = rng.normal(100, 2, 40), np.arange(40) // 4
    weights = group_weights(10, seed=2, replicates=200)
    actual = stats.limits_of_agreement(x, weights, groups)
    drawn = [np.repeat(x, weight[groups].astype(int)) for weight in weights]
    bias, spread = np.array([(y.mean(), 1.96 * y.std(ddof=1)) for y in drawn]).T
    for name, replicates in (("bias", bias), ("lower", bias - spread), ("upper", bias + spread)):
        assert actual[name] == pytest.approx(interval(replicates), abs=1e-6)
    alone = stats.limits_of_agreement(x)  # every measurement its own group
    assert alone == stats.limits_of_agreement(x, group_weights(40), np.arange(40))
    assert alone["upper"][0] == actual["upper"][0] and alone["upper"] != actual["upper"]


def test_limits_of_little():
    assert stats.limits_of_agreement([0.1] * 7) == {name: (0.1, 0.1, 0.1) for name in ("bias", "lower", "upper")}
    one = stats.limits_of_agreement([3.0])
    assert one["bias"] == (3, 3, 3) and np.isnan(one["lower"]).all() and np.isnan(one["upper"]).all()
    same = stats.limits_of_agreement([1.0, 2.0], groups=[0, 0])
    assert same["lower"] == pytest.approx((1.5 - 1.96 * 0.5 ** 0.5,) * 3, abs=1e-12)
    for bad in ([], [1, np.nan], [[1, 2]]):
        with pytest.raises(ValueError, match="finite number"):
            stats.limits_of_agreement(bad)
