"""The challenge's scores against scikit-learn, SciPy and loops, and what is missing, for them and the sound ones."""

import math

import numpy as np
import pytest
import sklearn.metrics
from scipy.spatial.distance import directed_hausdorff

from labelled.fmc_uia import Task
from scores import challenge, metrics
from scores.challenge import mask_values, point_values

RNG = np.random.default_rng(0)
SEG, CLS = Task("seg", "segmentation", 3), Task("cls", "classification", 3)
DET, REG = Task("det", "detection", 1), Task("reg", "regression", 2)


# ---------------------------------------------------------------- classification

def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


PREDICTED = {  # labels, probabilities
    "binary": (RNG.integers(0, 2, 60), softmax(RNG.normal(size=(60, 2)))),
    "binary, ties": (RNG.integers(0, 2, 60), np.array([[0.75, 0.25], [0.25, 0.75]])[RNG.integers(0, 2, 60)]),
    "binary, one class": (np.ones(9, int), softmax(RNG.normal(size=(9, 2)))),
    "binary, no sum of 1": (RNG.integers(0, 2, 60), RNG.random((60, 2))),
    "five": (RNG.integers(0, 5, 90), softmax(RNG.normal(size=(90, 5)))),
    "five, one never a label": (RNG.integers(0, 4, 90), softmax(RNG.normal(size=(90, 5)))),
    "five, one in neither": (RNG.integers(0, 4, 90), softmax(np.append(RNG.normal(size=(90, 4)), [[-9]] * 90, 1))),
    "five, one class": (np.full(7, 3), softmax(RNG.normal(size=(7, 5)))),
    "five, all wrong": (np.arange(10) % 5, np.eye(5)[(np.arange(10) + 1) % 5]),
    "five, one prediction": (np.arange(10) % 5, np.eye(5)[np.full(10, 2)]),
    "three, no sum of 1": (np.arange(9) % 3, softmax(RNG.normal(size=(9, 3))) * 1.001),
    "three, float32": (np.arange(9) % 3, softmax(RNG.normal(size=(9, 3)).astype(np.float32)).astype(np.float64)),
    "one image": (np.array([1]), np.array([[0.2, 0.8]])),
}


@pytest.mark.parametrize("labels, probabilities", PREDICTED.values(), ids=PREDICTED)
@pytest.mark.filterwarnings("ignore:Only one class is present", "ignore:A single label was found")
def test_classification_is_scikit_learns(labels, probabilities):
    K, predicted = probabilities.shape[1], probabilities.argmax(1)
    try:
        area = (sklearn.metrics.roc_auc_score(labels, probabilities[:, 1]) if K == 2 else
                sklearn.metrics.roc_auc_score(labels, probabilities, average="macro", multi_class="ovr"))
    except ValueError:
        area = 0.0
    expected = {"Acc": np.mean(labels == predicted), "AUC": 0 if math.isnan(area) else area,
                "F1_macro": sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0),
                "F1_weighted": sklearn.metrics.f1_score(labels, predicted, average="weighted", zero_division=0),
                "MCC": sklearn.metrics.matthews_corrcoef(labels, predicted)}
    task = Task("x", "classification", K)
    found = challenge.challenge_scores(task, challenge.values_of(task, labels, probabilities), labels)
    assert list(found) == list(expected) and found == pytest.approx(expected, abs=1e-12)
    assert len(np.unique(labels)) == K or found["AUC"] == 0


def test_probabilities_that_do_not_add_up_cost_the_area_of_more_than_two_classes():
    labels, probabilities = PREDICTED["three, no sum of 1"]
    assert challenge.challenge_scores(CLS, {"probabilities": probabilities}, labels)["AUC"] == 0
    assert challenge.challenge_scores(CLS, {"probabilities": probabilities / 1.001}, labels)["AUC"] > 0


def test_a_submissions_own_class_goes_before_its_probabilities():
    values = {"probabilities": np.eye(3), "predicted": np.array([0, 1, 1])}
    found = challenge.challenge_scores(CLS, values, np.arange(3))
    assert found["Acc"] == 2 / 3 and found["AUC"] == 1
    assert challenge.sound_scores(CLS, values, np.arange(3))["balanced accuracy"] == 2 / 3


def test_matthews_and_weighted_f1_of_many_confusions_at_once():
    counts = RNG.integers(0, 9, (2, 3, 4, 4))
    for score in (metrics.matthews, metrics.weighted_f1):
        found = score(counts)
        assert found.shape == (2, 3)
        for i in np.ndindex(2, 3):
            labels, predicted = (np.repeat(own.ravel(), counts[i].ravel()) for own in np.indices((4, 4)))
            oracle = (sklearn.metrics.matthews_corrcoef(labels, predicted) if score is metrics.matthews else
                      sklearn.metrics.f1_score(labels, predicted, average="weighted"))
            assert found[i] == pytest.approx(oracle, abs=1e-12)


# ---------------------------------------------------------------- masks

def disk(shape, x, y, r, inner=-1.0):
    down, across = np.indices(shape)
    distance = np.hypot(across - x, down - y)
    return (distance <= r) & (distance > inner)


def stripes(shape, *columns):
    mask = np.zeros(shape, bool)
    mask[:, columns] = True
    return mask


SETS = {
    "ring and disk": (disk((50, 60), 30, 25, 20, 15), disk((50, 60), 30, 25, 20)),
    "disk and ring": (disk((50, 60), 30, 25, 20), disk((50, 60), 30, 25, 20, 15)),
    "far apart": (disk((50, 60), 5, 5, 4), disk((50, 60), 50, 40, 9)),
    "equal": (disk((50, 60), 30, 25, 20), disk((50, 60), 30, 25, 20)),
    "one pixel each": (disk((50, 60), 0, 0, 0), disk((50, 60), 59, 49, 0)),
    "a pixel in all": (np.ones((50, 60), bool), disk((50, 60), 3, 40, 0)),
    "stripes": (stripes((50, 60), 2, 30), stripes((50, 60), 3, 55)),
    "one row": (RNG.random((1, 60)) < 0.2, RNG.random((1, 60)) < 0.2),
    "one column": (RNG.random((60, 1)) < 0.2, RNG.random((60, 1)) < 0.2),
    **{f"noise {share}": tuple(RNG.random((2, 70, 90)) < share) for share in (0.001, 0.01, 0.3, 0.9)},
    **{f"blobs {i}": (disk((50, 60), *RNG.uniform(10, 40, 2), 12), disk((50, 60), *RNG.uniform(10, 40, 2), 15, 9))
       for i in range(6)},
}


@pytest.mark.parametrize("truth, prediction", SETS.values(), ids=SETS)
def test_hausdorff_is_that_of_all_pixels(truth, prediction):
    a, b = np.argwhere(truth), np.argwhere(prediction)
    expected = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])
    assert metrics.hausdorff(truth, prediction, -1) == pytest.approx(expected, abs=1e-12)
    values = mask_values(truth.astype(np.uint8), prediction.astype(np.uint8), 2)
    assert values["HD"] == pytest.approx([expected])
    assert values["DSC"] == values["Dice"] == pytest.approx([2 * (truth & prediction).sum() / (len(a) + len(b))])


def test_hausdorff_is_not_that_of_boundaries():
    truth, prediction = SETS["ring and disk"]
    of_boundaries = max(metrics.boundary_distances(truth, prediction)[1].max(),
                        metrics.boundary_distances(truth, prediction)[0].max())
    assert metrics.hausdorff(truth, prediction, -1) == np.hypot(15, 1) > of_boundaries


def test_classes_that_one_or_both_masks_lack():
    """Class 1 in both, 2 in the truth, 3 in the prediction, 4 in neither; 30 x 40 pixels: the diagonal is 50."""
    truth, prediction = np.zeros((30, 40), np.uint8), np.zeros((30, 40), np.uint8)
    truth[:10, :10], truth[20:, :5] = 1, 2
    prediction[:10, :5], prediction[20:, 20:] = 1, 3
    values = mask_values(truth, prediction, 5)
    assert list(values) == ["DSC", "HD", "Dice", "HD95"] and all(own.dtype == np.float64 for own in values.values())
    np.testing.assert_array_equal(values["DSC"], [2 / 3, 0, 0, 1])
    np.testing.assert_array_equal(values["HD"], [5, 50, 50, 0])
    np.testing.assert_array_equal(values["Dice"], [2 / 3, 0, np.nan, np.nan])
    np.testing.assert_array_equal(values["HD95"], [metrics.mask_scores(truth, prediction, 5, None, 1)[1]["HD95"][1],
                                                   50, np.nan, np.nan])


def test_masks_are_taken_one_after_the_other():
    masks = RNG.integers(0, 3, (4, 9, 11), np.uint8)
    masks[2] = masks[2].clip(0, 1)  # class 2 is absent
    alive = []

    def stream(values):
        for value in values:
            alive.append(len(alive))
            yield value

    values = challenge.values_of(SEG, stream(masks), stream([masks[1], None, masks[2], masks[3]]))
    assert alive == list(range(8)) and all(own.shape == (4, 2) for own in values.values())
    for i, prediction in enumerate([masks[1], np.zeros((9, 11), np.uint8), masks[2], masks[3]]):
        for name, own in mask_values(masks[i], prediction, 3).items():
            np.testing.assert_array_equal(values[name][i], own)
    found = challenge.challenge_scores(SEG, values)
    assert found == pytest.approx({name: np.mean([np.mean(values[name][:, k]) for k in (0, 1)]) for name in found})
    with pytest.raises(ValueError):
        challenge.values_of(SEG, masks, masks[:3])


# ---------------------------------------------------------------- boxes and points

BOXES = {  # two boxes, their IoU
    "equal": ([1, 2, 4, 8], [1, 2, 4, 8], 1),
    "one in the other": ([0, 0, 10, 10], [2, 2, 4, 7], 0.1),
    "corners": ([0, 0, 4, 4], [2, 3, 6, 5], 2 / 22),
    "touching": ([0, 0, 4, 4], [4, 0, 8, 4], 0),
    "apart": ([0, 0, 1, 1], [5, 5, 6, 6], 0),
    "no width": ([0, 0, 4, 4], [2, 0, 2, 4], 0),
    "both empty": ([2, 0, 2, 4], [2, 0, 2, 4], 0),
    "x swapped": ([0, 0, 4, 4], [4, 0, 0, 4], 0),
    "x and y swapped": ([0, 0, 4, 4], [4, 4, 0, 0], 0),
    "fractions": ([0.5, 0.5, 1.5, 1.5], [1, 0.5, 2, 1.5], 1 / 3),
}


def test_box_iou_by_hand():
    a, b, expected = map(np.array, zip(*BOXES.values()))
    np.testing.assert_allclose(metrics.box_iou(a, b), expected, atol=1e-15)
    np.testing.assert_allclose(metrics.box_iou(b, a), expected, atol=1e-15)
    assert metrics.box_iou(a[:, None], b).shape == (len(a), len(b))
    assert not np.signbit(metrics.box_iou(a, b)).any()


def test_box_iou_counts_pixels():
    for a, b in RNG.integers(0, 12, (200, 2, 4)):
        inside = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (a, b)]
        either = len(inside[0] | inside[1])
        assert metrics.box_iou(a, b) == pytest.approx(len(inside[0] & inside[1]) / either if either else 0, abs=1e-15)


def test_a_missing_point_is_at_the_corner_for_the_challenge_only():
    truth = np.array([[[3, 4], [np.nan, np.nan]], [[0, 0], [6, 8]]])
    values = point_values(truth, np.array([[[0, 0], [3, 4]], [[3, 4], [6, 8]]]))
    np.testing.assert_array_equal(values["error"], [[5, np.nan], [5, 0]])
    np.testing.assert_array_equal(values["challenge error"], [[5, 5], [5, 0]])
    assert challenge.challenge_scores(REG, values) == {"MRE": 15 / 4}
    assert challenge.sound_scores(REG, values, diagonals=np.array([10, 20])) == pytest.approx(
        {"MRE": (5 + 2.5) / 2, "MRE / diagonal": (0.5 + 0.125) / 2})
    with pytest.raises(ValueError, match="finite"):
        point_values(truth, truth)


# ---------------------------------------------------------------- missing predictions

def test_without_any_prediction_the_challenge_gives_zeros():
    for task, values in ((SEG, {"DSC": np.empty((0, 2)), "HD": np.empty((0, 2))}), (DET, {"IoU": np.empty(0)}),
                         (CLS, {"probabilities": np.empty((0, 3))}), (REG, {"challenge error": np.empty((0, 2))})):
        assert challenge.challenge_scores(task, values, np.empty(0, int)) == dict.fromkeys(
            challenge.SCORES[task.kind], 0)


def test_missing_masks_boxes_and_points_are_as_bad_as_can_be():
    missing, diagonals = np.array([False, True, True]), np.array([50.0, 60, 70])
    dice = np.array([[0.5, np.nan], [1, 0.9], [np.nan, 0.8]])
    found = challenge.sound_scores(SEG, {"DSC": dice, "HD": dice, "Dice": dice, "HD95": 10 * dice}, None, diagonals,
                                   missing)
    assert found == pytest.approx({"Dice": ((0.5 + 0) / 2 + 0) / 2, "HD95": ((5 + 60) / 2 + (60 + 70) / 2) / 2})
    assert challenge.sound_scores(DET, {"IoU": np.array([0.6, 1, 1])}, missing=missing) == pytest.approx({"IoU": 0.2})
    error = np.array([[1, 3], [0, np.nan], [0, 0]])
    found = challenge.sound_scores(REG, {"error": error, "challenge error": error}, None, diagonals, missing)
    assert found == pytest.approx({"MRE": (2 + 60 + 70) / 3, "MRE / diagonal": (2 / 50 + 1 + 1) / 3})
    with pytest.raises(ValueError, match="diagonals"):
        challenge.sound_scores(REG, {"error": error, "challenge error": error}, missing=missing)
    assert math.isnan(challenge.sound_scores(REG, {"error": error, "challenge error": error})["MRE / diagonal"])


def test_a_missing_label_is_shared_by_the_other_classes():
    """Labels 0 0 1 1 2, right but for the missing second and last: counts are 1 1/2 1/2, 0 2 0, 1/2 1/2 0."""
    labels, missing = np.array([0, 0, 1, 1, 2]), np.array([False, True, False, False, True])
    found = challenge.sound_scores(CLS, {"probabilities": np.eye(3)[labels]}, labels, missing=missing)
    pairs = [[(0.5 if missing[i] else 1) if missing[j] or labels[j] != k else 0
              for i in np.flatnonzero(labels == k) for j in np.flatnonzero(labels != k)] for k in range(3)]
    assert found == pytest.approx({"balanced accuracy": 0.5, "macro F1": (2 / 3.5 + 4 / 5 + 0) / 3,
                                   "macro AUROC": np.mean([np.mean(own) for own in pairs])})
    everything = challenge.sound_scores(CLS, {"probabilities": np.eye(3)[labels]}, labels, missing=np.ones(5, bool))
    assert everything == {"balanced accuracy": 0, "macro F1": 0, "macro AUROC": 0.5}


def test_a_missing_label_of_two_is_the_other_one():
    labels, missing = np.arange(20) % 2 * (np.arange(20) < 14), np.arange(20) % 3 == 0
    for K in (2, 4):  # classes that no image has are not drawn in
        found = challenge.sound_scores(CLS._replace(K=K), {"probabilities": np.eye(K)[labels]}, labels, missing=missing)
        oracle = np.where(missing, 1 - labels, labels)
        assert found["macro F1"] == pytest.approx(sklearn.metrics.f1_score(labels, oracle, average="macro"))
        assert found["balanced accuracy"] == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, oracle))
    alone = challenge.sound_scores(CLS, {"probabilities": np.eye(3)[np.ones(4, int)]}, np.ones(4, int),
                                   missing=np.arange(4) < 1)
    assert alone["balanced accuracy"] == 0.75 and alone["macro F1"] == pytest.approx(6 / 7 / 3)
    assert math.isnan(alone["macro AUROC"])


@pytest.mark.parametrize("task, name, sign", [(SEG, "DSC", 1), (DET, "IoU", 1), (REG, "MRE", -1)])
def test_leaving_out_the_worst_helps_the_challenges_score_and_harms_the_sound_one(task, name, sign):
    good = np.linspace(1, 0.1, 6)
    pair = np.stack((good, good), 1)
    values = {SEG: {"DSC": pair, "HD": 9 - 9 * pair, "Dice": pair, "HD95": 9 - 9 * pair}, DET: {"IoU": good},
              REG: {"error": 9 - 9 * pair, "challenge error": 9 - 9 * pair}}[task]
    kept = {key: own[:5] for key, own in values.items()}
    assert sign * challenge.challenge_scores(task, kept)[name] > sign * challenge.challenge_scores(task, values)[name]
    whole, without = (challenge.sound_scores(task, values, None, np.full(6, 40), missing)
                      for missing in (None, np.arange(6) == 5))
    for score in whole:
        assert (without[score] < whole[score]) == (score in ("Dice", "IoU")) and without[score] != whole[score], score


def test_leaderboard_is_the_mean_over_the_tasks_of_a_kind():
    other = Task("det 2", "detection", 1)
    scores = {"det": {"IoU": 0.5}, "det 2": {"IoU": 0.75}, "seg": {"DSC": 0.9, "HD": 3.0}}
    assert challenge.leaderboard(scores, [DET, other, SEG]) == {"DSC": 0.9, "HD": 3.0, "IoU": 0.625}
    assert challenge.leaderboard(scores, [other]) == {"IoU": 0.75}
