"""Scores against scikit-learn; the bootstrap against resampled test sets spelled out, and for what it must notice."""

import numpy as np
import pytest
import sklearn.metrics

from scores import metrics, stats

K = 4
RNG = np.random.default_rng(0)
CASES = {  # labels, predictions
    "random": (RNG.integers(0, K, 300), RNG.integers(0, K, 300)),
    "class never a label": (RNG.integers(0, K - 1, 60), RNG.integers(0, K, 60)),
    "class never predicted": (RNG.integers(0, K, 60), RNG.integers(0, K - 1, 60)),
    "class in neither": (RNG.integers(1, K, 60), RNG.integers(1, K, 60)),
    "one sample, right": (np.array([2]), np.array([2])),
    "one sample, wrong": (np.array([2]), np.array([0])),
    "all one prediction": (np.arange(40) % K, np.full(40, 1)),
    "each class half right": (np.repeat(np.arange(K), 2), np.repeat(np.arange(K), 2) // np.array([1, 2] * K)),
}


@pytest.mark.parametrize("labels, predictions", CASES.values(), ids=CASES)
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true", "ignore:A single label was found")
def test_scores_are_scikit_learns(labels, predictions):
    counts = metrics.confusion(labels, predictions, K)
    assert (counts == sklearn.metrics.confusion_matrix(labels, predictions, labels=range(K))).all()
    expected = sklearn.metrics.balanced_accuracy_score(labels, predictions)
    assert metrics.balanced_accuracy(counts) == pytest.approx(expected, abs=1e-6)
    expected = sklearn.metrics.f1_score(labels, predictions, average="macro")
    assert metrics.macro_f1(counts) == pytest.approx(expected, abs=1e-6)
    assert metrics.accuracy(counts) == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions), abs=1e-6)
    expected = sklearn.metrics.precision_recall_fscore_support(labels, predictions, labels=range(K),
                                                               zero_division=np.nan)
    actual = metrics.per_class(counts)
    assert list(actual) == ["precision", "recall", "f1", "support"]
    for values, oracle in zip(actual.values(), expected):
        np.testing.assert_allclose(values, oracle, atol=1e-6)


def test_what_is_undefined_of_a_class():
    """Class 0 is only predicted, class 1 only a label, class 2 neither, class 3 both."""
    scores = metrics.per_class(metrics.confusion(np.array([1, 3]), np.array([0, 3]), K))
    np.testing.assert_array_equal(scores["precision"], [0, np.nan, np.nan, 1])
    np.testing.assert_array_equal(scores["recall"], [np.nan, 0, np.nan, 1])
    np.testing.assert_array_equal(scores["f1"], [0, 0, np.nan, 1])
    np.testing.assert_array_equal(scores["support"], [0, 1, 0, 1])


def test_leading_axes_and_unpredicted_images():
    labels, predictions = RNG.integers(0, K, 50), RNG.integers(-1, K, (2, 3, 50))
    counts = metrics.confusion(labels, predictions, K)
    assert counts.shape == (2, 3, K, K)
    for i in np.ndindex(2, 3):
        seen = predictions[i] >= 0
        assert (counts[i] == sklearn.metrics.confusion_matrix(labels[seen], predictions[i][seen])).all()
        for score in (metrics.accuracy, metrics.balanced_accuracy, metrics.macro_f1):
            assert score(counts)[i] == score(counts[i])
        for name, values in metrics.per_class(counts).items():
            np.testing.assert_array_equal(values[i], metrics.per_class(counts[i])[name])


def test_groups_sum_to_the_whole():
    labels, predictions, groups = RNG.integers(0, K, 90), RNG.integers(-1, K, (5, 90)), RNG.integers(0, 7, 90)
    counts = metrics.group_confusion(labels, predictions, groups, K, 8)  # group 7 is empty
    assert counts.shape == (5, 8, K, K) and not counts[:, 7].any()
    assert (counts.sum(1) == metrics.confusion(labels, predictions, K)).all()
    own = groups == 3
    assert (counts[:, 3] == metrics.confusion(labels[own], predictions[:, own], K)).all()


def test_nothing_to_score_is_nan_not_zero():
    for score in (metrics.accuracy, metrics.balanced_accuracy, metrics.macro_f1):
        assert np.isnan(score(np.zeros((K, K))))


@pytest.mark.parametrize("labels, predictions", [([4], [0]), ([-1], [0]), ([0], [4])])
def test_a_class_out_of_range_raises(labels, predictions):
    with pytest.raises(ValueError, match="expected"):
        metrics.confusion(np.array(labels), np.array(predictions), K)


# ---------------------------------------------------------------- AUROC

def area(labels, scores, weights=None):
    """scikit-learn's AUROC of 0/1 labels, nan where one of the two has no weight."""
    weights = np.ones(len(labels)) if weights is None else weights
    if not (weights[labels == 1].sum() and weights[labels == 0].sum()):
        return np.nan
    return sklearn.metrics.roc_auc_score(labels, scores, sample_weight=weights)


@pytest.mark.parametrize("levels", [None, 4], ids=["no ties", "ties"])
def test_auroc_is_scikit_learns(levels):
    labels, scores = RNG.integers(0, K - 1, 80), RNG.random((80, K))  # class 3 is absent
    scores = scores if levels is None else np.round(scores * levels)
    weights = RNG.integers(0, 3, (2, 5, 80)).astype(np.float32)
    weights[0, 0], weights[0, 1, labels == 1], weights[0, 2, labels != 1] = 1, 0, 0
    weights[1] *= RNG.random((5, 80), np.float32)  # no integers either
    actual = metrics.auroc(labels, scores, weights)
    assert actual.shape == (2, 5, K) and np.isnan(actual[0, 1, 1]) and np.isnan(actual[0, 2]).all()
    expected = [[[area(labels == k, scores[:, k], w) for k in range(K)] for w in row] for row in weights]
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_allclose(metrics.auroc(labels, scores), actual[0, 0], atol=1e-12)
    macro = metrics.macro_auroc(labels, scores, weights)
    assert macro.shape == (2, 5) and np.isnan(macro[0, 2])
    some = ~np.isnan(macro)
    np.testing.assert_allclose(macro[some], np.nanmean(np.array(expected)[some], axis=1), atol=1e-6)


def test_macro_auroc_is_scikit_learns_where_every_class_is_there():
    labels, scores = np.arange(90) % K, RNG.dirichlet(np.ones(K), 90)
    expected = sklearn.metrics.roc_auc_score(labels, scores, multi_class="ovr", average="macro")
    assert metrics.macro_auroc(labels, scores) == pytest.approx(expected, abs=1e-6)
    both = RNG.dirichlet(np.ones(2), 90)
    expected = sklearn.metrics.roc_auc_score(labels % 2, both[:, 1])
    assert metrics.macro_auroc(labels % 2, both) == pytest.approx(expected, abs=1e-6)


def test_auroc_of_many_replicates_is_that_of_each():
    """More replicates than are scored at a time: 2,000,000 weights."""
    labels, scores = np.arange(2000) % 3, RNG.random((2000, 3))
    weights = RNG.integers(0, 3, (1501, 2000)).astype(np.float32)
    actual = metrics.auroc(labels, scores, weights)
    for r in (0, 999, 1000, 1500):
        np.testing.assert_allclose(actual[r], metrics.auroc(labels, scores, weights[r]), atol=1e-12)


def test_auroc_of_extremes():
    labels = np.array([0, 0, 1])
    assert (metrics.auroc(labels, np.eye(2)[labels]) == 1).all()
    assert (metrics.auroc(labels, 1 - np.eye(2)[labels]) == 0).all()
    assert (metrics.auroc(labels, np.full((3, 2), 0.3)) == 0.5).all()  # all alike: a coin
    assert (metrics.auroc(labels, np.array([[0, -np.inf], [0, -np.inf], [-1, -1]])) == 1).all()  # log probabilities
    assert np.isnan(metrics.auroc(np.array([1]), np.array([[0.2, 0.8]]))).all()  # one image
    assert np.isnan(metrics.macro_auroc(np.array([1]), np.array([[0.2, 0.8]])))


@pytest.mark.parametrize("labels, scores, message", [
    ([0, 1], [[0.5, np.nan], [0.1, 0.9]], "1 scores are nan"),
    ([0, 2], [[0.5, 0.5], [0.1, 0.9]], "labels lie in 0..2"),
    ([0, -1], [[0.5, 0.5], [0.1, 0.9]], "labels lie in -1..0"),
    ([0, 1, 1], [[0.5, 0.5], [0.1, 0.9]], "expected"),
    ([], np.zeros((0, 2)), "at least one"),
])
def test_scores_that_cannot_be_ranked_raise(labels, scores, message):
    with pytest.raises(ValueError, match=message):
        metrics.auroc(np.array(labels, int), np.array(scores))


# ---------------------------------------------------------------- the bootstrap of episodes

def test_set_of(n_groups, per_group=6, episodes=8, spread=0.0, accuracy=0.7, seed=0):
    """Labels, predictions (E, n), groups; `spread` makes the images of a group right or wrong together."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), per_group)
    labels = groups % 3
    easy = np.clip(accuracy + spread * rng.choice([-1, 1], n_groups), 0, 1)[groups]
    right = rng.random((episodes, len(groups))) < easy
    return labels, np.where(right, labels, (labels + 1) % 3), groups


test_set_of.__test__ = False


def replicates_of(labels, predictions, groups, seed=0, replicates=500):
    counts = metrics.group_confusion(labels, predictions, groups, 3, groups.max() + 1)
    return stats.bootstrap(counts, stats.resampling_weights(len(counts), groups.max() + 1, seed, replicates))


def width(replicates):
    _, low, high = stats.interval(replicates)
    return high - low


def test_a_replicate_is_the_score_of_the_resampled_test_set():
    labels, predictions, groups = test_set_of(12)
    predictions[:, RNG.random(len(groups)) < 0.2] = -1
    weights = stats.resampling_weights(8, 12, seed=3, replicates=5)
    assert (weights[0].sum(1) == 8).all() and (weights[1].sum(1) == 12).all() and weights[1].max() > 1
    actual = stats.bootstrap(metrics.group_confusion(labels, predictions, groups, 3, 12), weights)
    for r, (episode_weights, group_weights) in enumerate(zip(*weights)):
        images = np.concatenate([np.flatnonzero(groups == group) for group in range(12)
                                 for _ in range(int(group_weights[group]))])
        scores = []
        for episode in np.repeat(np.arange(8), episode_weights.astype(int)):
            seen = images[predictions[episode, images] >= 0]
            pair = labels[seen], predictions[episode, seen]
            scores.append((sklearn.metrics.balanced_accuracy_score(*pair),
                           sklearn.metrics.f1_score(*pair, average="macro")))
        assert actual[:, r] == pytest.approx(np.mean(scores, axis=0), abs=1e-6)


def test_the_estimate_is_the_mean_over_episodes():
    labels, predictions, groups = test_set_of(12)
    expected = np.mean([sklearn.metrics.balanced_accuracy_score(labels, row) for row in predictions])
    assert stats.interval(replicates_of(labels, predictions, groups)[0])[0] == pytest.approx(expected, abs=1e-6)


def test_interval_is_the_percentiles_of_all_but_the_estimate():
    assert stats.interval(np.concatenate(([1000.0], np.arange(101)))) == (1000.0, 2.5, 97.5)


def test_constant_predictions_have_no_interval():
    labels, predictions, groups = test_set_of(60)
    assert stats.interval(replicates_of(labels, predictions * 0, groups)[0]) == pytest.approx((1 / 3,) * 3, abs=1e-12)


def test_fewer_groups_widen_the_interval():
    """The same 900 images and the same errors, as 300 patients or as 30: images of a patient are no new evidence."""
    labels, predictions, groups = test_set_of(30, per_group=30, spread=0.3)
    many = np.arange(900) // 3
    assert width(replicates_of(labels, predictions, groups)[0]) > 2 * width(replicates_of(labels, predictions, many)[0])


def test_episodes_are_resampled_too():
    """Patients all alike, draws of the support not: without resampling episodes the interval would have no width."""
    labels, predictions, groups = test_set_of(60, episodes=6)
    predictions = np.where(np.arange(6)[:, None] % 2, labels, (labels + 1) % 3)
    assert width(replicates_of(labels, predictions, groups)[0]) > 0.3


def test_the_interval_covers_the_truth():
    """Nominal 95 %. Three standard deviations of 200 trials leave 90 %; crossed resampling errs on the wide side."""
    covered = 0
    for trial in range(200):
        replicates = replicates_of(*test_set_of(60, spread=0.25, seed=trial), seed=trial, replicates=300)
        _, low, high = stats.interval(replicates[0])
        covered += low <= 0.7 <= high
    assert covered >= 180


def test_differences_are_paired():
    labels, predictions, groups = test_set_of(30, spread=0.3)
    worse = predictions.copy()
    worse[:, ::9] = (labels[::9] + 1) % 3  # wrong where the other one may be right
    a, b = replicates_of(labels, predictions, groups)[0], replicates_of(labels, worse, groups)[0]
    assert not (a - replicates_of(labels, predictions, groups)[0]).any()
    assert width(a - b) < 0.5 * width(a - replicates_of(labels, worse, groups, seed=1)[0])


def test_an_episode_without_query_images_is_left_out_of_its_replicate():
    """Two groups, each the query of one episode: half of the replicates draw one of them twice and the other never."""
    replicates = replicates_of(np.array([0, 1]), np.array([[0, -1], [-1, 1]]), np.array([0, 1]))[0]
    assert (replicates[np.isfinite(replicates)] == 1).all() and stats.interval(replicates) == (1, 1, 1)
