"""What a comparison of segmenters says: numbers by hand, loops written out, every swap of few groups; tables, LaTeX."""

import itertools
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from scores import comparison, report, stats
from scores.mask_report import CIRCUMFERENCE, circumference_table, compare_masks, mask_class_table
from scores.metrics import dice, iou

K, CLASSES, N = 3, ["background", "head", "stomach"], 12
PER_IMAGE, POOLED = ("Dice", "IoU", "HD95 [mm]", "surface Dice"), ("pooled Dice", "pooled IoU")
WITH = ("pooled Dice with background", "pooled IoU with background")
WHOLE = ("Dice with background", "IoU with background")
GROUPS = np.array(list("ccaabbddeefc"))  # six, one of three images, one of one
MEASURED = np.r_[np.linspace(150, 350, N - 1), np.nan]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(comparison, "REPLICATES", 60)
    monkeypatch.setattr(comparison, "FLIPS", 64)  # all of six groups


def truths(seed=0):
    """Label maps (n, 8, 8): two images without the stomach, one without anything."""
    found = np.random.default_rng(seed).choice(K, (N, 8, 8), p=(0.6, 0.25, 0.15))
    found[[3, 4]] = np.where(found[[3, 4]] == 2, 0, found[[3, 4]])
    found[7] = 0
    return found


def model(truth, errors, runs, seed):
    """A segmenter that mistakes a share of the pixels; its scores, and circumferences of which two are missing."""
    rng = np.random.default_rng(seed)
    predicted = np.where(rng.random((runs, *truth.shape)) < errors, rng.integers(0, K, (runs, *truth.shape)), truth)
    counts = np.stack([np.stack([((truth == k) & (predicted == k)).sum((2, 3)),
                                 np.broadcast_to((truth == k).sum((1, 2)), (runs, N)),
                                 (predicted == k).sum((2, 3))], 2) for k in range(K)], 2)  # (S, n, K, 3)
    absent = counts[..., 1] == 0
    values = {"Dice": dice(counts), "IoU": iou(counts), "HD95": rng.gamma(2, 5 * errors, absent.shape),
              "surface Dice": rng.random(absent.shape) ** errors}
    for score, own in values.items():
        own[absent] = np.nan
        if score in ("HD95", "surface Dice"):
            own[..., 0] = np.nan
    circumference = MEASURED + rng.normal(2, 20 * errors, (runs, N))
    circumference[:, -1] = 200  # predicted where nothing was measured
    circumference[0, 2] = circumference[-1, 5] = np.nan
    return {"counts": counts, "values": values, "circumference": circumference}, predicted


def models(names=("ours", "none", "theirs")):
    truth = truths()
    return {name: model(truth, errors, runs, seed)[0]
            for name, errors, runs, seed in zip(names, (0.2, 0.3, 0.35), (2, 2, 1), (1, 2, 3))}


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "REPLICATES", 60)
        patch.setattr(comparison, "FLIPS", 64)
        return compare_masks(models(), GROUPS, CLASSES, "mm", 3, MEASURED)


# ---------------------------------------------------------------- numbers

def class_mean(values, weights, first=1):
    """Mean over classes from `first` on of the weighted mean over images that have each; values (n, K), weights (n,)."""
    means = []
    for k in range(first, K):
        total = weight = 0.0
        for value, w in zip(values[:, k], weights):
            if not np.isnan(value):
                total, weight = total + w * value, weight + w
        if weight:
            means.append(total / weight)
    return np.mean(means) if means else np.nan


def pooled(counts, weights, score, first):
    """counts (n, K, 3)"""
    values = []
    for k in range(first, K):
        both, truth, predicted = (sum(w * row[k, j] for row, w in zip(counts, weights)) for j in range(3))
        if truth + predicted:
            values.append(2 * both / (truth + predicted) if score == "Dice" else both / (truth + predicted - both))
    return np.mean(values) if values else np.nan


def errors_of(own):
    """Absolute errors (S, n) of circumferences."""
    found = np.full(own["circumference"].shape, np.nan)
    for s, i in np.ndindex(found.shape):
        value = own["circumference"][s, i]
        found[s, i] = MEASURED[i] if np.isnan(value) else abs(value - MEASURED[i])
    return found


def scores_of_run(own, s, weights):
    """Every score of one run, each image counted weights (n,) times, by loops."""
    found = {name: class_mean(own["values"][name.removesuffix(" [mm]")][s], weights) for name in PER_IMAGE}
    found.update({name: class_mean(own["values"][name.split()[0]][s], weights, 0) for name in WHOLE})
    for name, first in zip(POOLED + WITH, (1, 1, 0, 0)):
        found[name] = pooled(own["counts"][s], weights, name.split()[1], first)
    error = errors_of(own)[s]
    known = ~np.isnan(error)
    found[CIRCUMFERENCE] = (weights * np.nan_to_num(error)).sum() / (weights * known).sum()
    return found


def mean_of_runs(own, weights):
    runs = [scores_of_run(own, s, weights) for s in range(len(own["counts"]))]
    return {name: np.mean([run[name] for run in runs]) for name in runs[0]}


def test_scores_and_intervals_are_those_of_loops(found):
    numbers = np.unique(GROUPS, return_inverse=True)[1]
    weights = stats.group_weights(6, 3, 60)[:, numbers]  # (1 + R, n)
    expected = {name: [mean_of_runs(own, row) for row in weights] for name, own in models().items()}
    assert found["images"] == 12 and found["groups"] == 6 and found["classes"] == CLASSES and found["primary"] == "Dice"
    assert found["order"] == ["Dice", "IoU", "pooled Dice", "HD95 [mm]", "surface Dice", CIRCUMFERENCE]
    for name, own in models().items():
        told = found["models"][name]
        assert told["runs"] == len(own["counts"])
        assert set(told["scores"]) == {*PER_IMAGE, *WHOLE, *POOLED, *WITH, CIRCUMFERENCE}
        for score, value in told["scores"].items():
            replicates = np.array([row[score] for row in expected[name]])
            bounds = np.percentile(replicates[1:], [2.5, 97.5])
            assert list(value) == ["estimate", "low", "high"]
            assert list(value.values()) == pytest.approx([replicates[0], *bounds], rel=1e-9)
            assert told["standard error"][score] == pytest.approx(replicates[1:].std(ddof=1), rel=1e-6)
            assert told["per run"][score] == pytest.approx([scores_of_run(own, s, np.ones(N))[score]
                                                            for s in range(told["runs"])])
    for name in ("none", "theirs"):
        for score, own in found["differences"][name].items():
            replicates = np.array([ours[score] - row[score] for ours, row in zip(expected["ours"], expected[name])])
            bounds = np.percentile(replicates[1:], [2.5, 97.5])
            assert list(own.values())[:3] == pytest.approx([replicates[0], *bounds], rel=1e-9, abs=1e-12)
            assert own["detectable"] == pytest.approx(2.8015851 * replicates[1:].std(ddof=1), rel=1e-6)


def swap(a, b, groups):
    """Models whose results on these groups are exchanged, in all runs at once."""
    own = np.isin(GROUPS, groups)
    pair = []
    for x, y in ((a, b), (b, a)):
        pair.append({"counts": np.where(own[:, None, None], y["counts"], x["counts"]),
                     "values": {score: np.where(own[:, None], y["values"][score], x["values"][score])
                                for score in x["values"]},
                     "circumference": np.where(own, y["circumference"], x["circumference"])})
    return pair


def test_p_is_the_share_of_swaps_that_differ_as_much():
    first, second = (model(truths(), errors, 2, seed)[0] for errors, seed in ((0.2, 1), (0.22, 5)))  # nearly as good
    told = compare_masks({"a": first, "b": second}, GROUPS, CLASSES, "mm", 3, MEASURED)["differences"]["b"]
    differences = {score: [] for score in told}
    for size in range(7):
        for groups in itertools.combinations("abcdef", size):
            a, b = (mean_of_runs(own, np.ones(N)) for own in swap(first, second, groups))
            for score in differences:
                differences[score].append(abs(a[score] - b[score]))
    for score, values in differences.items():
        share = np.mean(np.array(values) >= values[0] * (1 - 1e-9))
        assert told[score]["p"] == pytest.approx(share), score
    assert len({told[score]["p"] for score in POOLED + WITH}) == 4  # so that none can pass for another


def test_pooled_scores_are_those_of_all_pixels():
    truth = truths()
    own, predicted = model(truth, 0.3, 2, 9)
    told = compare_masks({"a": own}, GROUPS, CLASSES, "mm", 0)["models"]["a"]["scores"]
    for name, score, labels in (("pooled Dice", f1_score, [1, 2]), ("pooled IoU", jaccard_score, [1, 2]),
                                (WITH[0], f1_score, [0, 1, 2]), (WITH[1], jaccard_score, [0, 1, 2])):
        expected = [score(truth.ravel(), run.ravel(), labels=labels, average="macro") for run in predicted]
        assert told[name]["estimate"] == pytest.approx(np.mean(expected), abs=1e-12)


HAND = {  # two runs of three images; the stomach is in none but the last
    "counts": np.array([[[[50, 50, 50], [10, 10, 10], [0, 0, 4]], [[50, 60, 50], [5, 10, 10], [0, 0, 0]],
                         [[60, 60, 90], [0, 0, 0], [1, 4, 6]]],
                        [[[50, 50, 50], [10, 10, 10], [0, 0, 0]], [[50, 60, 50], [5, 10, 30], [0, 0, 0]],
                         [[60, 60, 90], [0, 0, 9], [0, 4, 0]]]]),
    "values": {"Dice": np.array([[[1, 1, np.nan], [0.9, 0.5, np.nan], [0.8, np.nan, 0.2]],
                                 [[1, 1, np.nan], [0.9, 0.25, np.nan], [0.8, np.nan, 0]]]),
               "IoU": np.array([[[1, 1, np.nan], [0.9, 0.4, np.nan], [0.8, np.nan, 0.1]]] * 2),
               "HD95": np.array([[[np.nan, 0, np.nan], [np.nan, 3, np.nan], [np.nan, np.nan, 40]]] * 2),
               "surface Dice": np.array([[[np.nan, 1, np.nan], [np.nan, 0.6, np.nan], [np.nan, np.nan, 0]]] * 2)},
    "circumference": np.array([[110, np.nan, 80.0], [96, 203, 80.0]])}


def test_numbers_by_hand():
    told = compare_masks({"a": HAND}, ["p", "q", "r"], CLASSES, "pixels", 0, np.array([100, 200, np.nan]))
    own = told["models"]["a"]
    alone = {score: value["estimate"] for score, value in own["scores"].items()}
    assert own["per run"]["Dice"] == pytest.approx([(0.75 + 0.2) / 2, (0.625 + 0) / 2])
    assert alone["Dice"] == pytest.approx(0.39375) and alone["IoU"] == pytest.approx((0.7 + 0.1) / 2)
    assert alone["HD95 [pixels]"] == pytest.approx((1.5 + 40) / 2) and alone["surface Dice"] == pytest.approx(0.4)
    assert own["per run"]["pooled Dice"] == pytest.approx([(30 / 40 + 2 / 14) / 2, (30 / 69 + 0) / 2])
    assert own["per run"]["pooled IoU"] == pytest.approx([(15 / 25 + 1 / 13) / 2, (15 / 54 + 0) / 2])
    assert own["per run"][CIRCUMFERENCE] == [(10 + 200) / 2, (4 + 3) / 2]
    assert own["per class"]["head"] == {
        "Dice": pytest.approx((1 + 0.5 + 1 + 0.25) / 4), "IoU": pytest.approx(0.7), "HD95 [pixels]": 1.5,
        "surface Dice": pytest.approx(0.8), "pooled Dice": pytest.approx((30 / 40 + 30 / 69) / 2), "images": 2,
        "false alarms": 0.5}  # in the last image, by run 1
    assert own["per class"]["stomach"] == {
        "Dice": pytest.approx(0.1), "IoU": pytest.approx(0.1), "HD95 [pixels]": 40, "surface Dice": 0,
        "pooled Dice": pytest.approx(1 / 14), "images": 1, "false alarms": 0.25}  # in the first, by run 0
    background = own["per class"]["background"]
    assert background["images"] == 3 and background["false alarms"] is background["HD95 [pixels]"] is None
    assert background["Dice"] == pytest.approx(0.9) and background["surface Dice"] is None


def test_limits_of_agreement_of_single_runs():
    told = compare_masks({"a": HAND}, ["p", "q", "r"], CLASSES, "mm", 0, np.array([100, 200, np.nan]))
    own = told["models"]["a"]["circumference [mm]"]
    assert own["heads"] == 2 and own["no ellipse"] == 1
    bias, spread = np.mean([10, -4, 3]), 1.96 * np.std([10, -4, 3], ddof=1)
    assert [own[key]["estimate"] for key in ("bias", "lower", "upper")] == pytest.approx(
        [bias, bias - spread, bias + spread])
    assert own["bias"]["low"] == own["bias"]["high"] == pytest.approx(3)  # of p's two, of q's one, or of both


@pytest.mark.filterwarnings("error")
def test_heads_that_were_never_found():
    """The whole circumference is the error; there is nothing to agree."""
    nothing = {**HAND, "circumference": np.full((2, 3), np.nan)}
    found = compare_masks({"a": HAND, "b": nothing}, ["p", "q", "r"], CLASSES, "mm", 0, np.array([100, 200, np.nan]))
    own = found["models"]["b"]
    assert own["scores"][CIRCUMFERENCE]["estimate"] == 150 and own["circumference [mm]"]["no ellipse"] == 4
    assert {*own["circumference [mm]"]["lower"].values()} == {None}
    assert circumference_table(found)[2].split() == ["b", "-", "-", "-", "4", "of", "4"]
    json.dumps(found, allow_nan=False)


@pytest.mark.filterwarnings("error")
def test_a_class_that_no_image_has_and_a_set_without_any():
    rows = models()
    lacking = {"counts": rows["ours"]["counts"].copy(),
               "values": {score: own.copy() for score, own in rows["ours"]["values"].items()}}
    lacking["counts"][:, :, 2, :2] = 0
    for own in lacking["values"].values():
        own[..., 2] = np.nan
    found = compare_masks({"a": lacking, "b": lacking}, GROUPS, CLASSES, "pixels", 0)
    stomach, scores = found["models"]["a"]["per class"]["stomach"], found["models"]["a"]["scores"]
    assert stomach["Dice"] is None and stomach["images"] == 0 and stomach["pooled Dice"] == 0 < stomach["false alarms"]
    assert scores["Dice"]["estimate"] == pytest.approx(np.nanmean(lacking["values"]["Dice"][..., 1]))
    assert scores["pooled Dice"]["estimate"] == found["models"]["a"]["per class"]["head"]["pooled Dice"] / 2
    assert CIRCUMFERENCE not in scores and "circumference [mm]" not in found["models"]["a"]
    assert found["differences"]["b"]["Dice"]["p"] == 1 and found["differences"]["b"]["Dice"]["detectable"] is None
    assert mask_class_table(found)[3].split() == ["stomach,", "0", "a", "-", "-"] + (
        f"{stomach['false alarms']:.3f} of 12".split())
    lacking["counts"][:, :, 1:] = 0
    for own in lacking["values"].values():
        own[..., 1] = np.nan
    found = compare_masks({"a": lacking, "b": lacking}, GROUPS, CLASSES, "pixels", 0)
    assert {*found["models"]["a"]["scores"]["Dice"].values()} == {None} == {*found["differences"]["b"]["Dice"].values()}
    assert found["models"]["a"]["scores"]["pooled Dice"]["estimate"] is None
    assert found["models"]["a"]["scores"][WITH[0]]["estimate"] > 0.8
    json.dumps(found, allow_nan=False)
    assert report.table(found)[1].split()[1:] == ["-"] * 3 and comparison.detectable_sentence(found)


@pytest.mark.filterwarnings("error")
def test_one_group_has_no_interval_and_no_test():
    found = compare_masks(models(), ["p"] * N, CLASSES, "mm", 0, MEASURED)
    for score, own in found["differences"]["none"].items():
        assert own["estimate"] is not None and {own[key] for key in own if key != "estimate"} == {None}, score
    limits = found["models"]["ours"]["circumference [mm]"]["upper"]
    assert limits["estimate"] > 0 and limits["low"] is None
    assert "one group" in comparison.few_groups(found) and "unknown" in comparison.detectable_sentence(found)
    assert "[-]" in report.table(found)[1] and report.table(found)[8].split()[-3:] == ["-"] * 3  # p
    json.dumps(found, allow_nan=False)


def test_tests_can_be_left_out(found):
    plain = compare_masks(models(), GROUPS, CLASSES, "mm", 3, MEASURED, tests=False)
    assert plain["models"] == found["models"]
    for score, own in plain["differences"]["none"].items():
        assert own["p"] is None and own["low"] == found["differences"]["none"][score]["low"]


# ---------------------------------------------------------------- as text

LONG = ("checkpoints/of/a/very/deep/folder/with/a/long/name/ours.pt", "from scratch " * 5, "x" * 200)


def test_tables_fit_a_screen():
    rows = models(LONG)
    found = compare_masks(rows, GROUPS, ["background", "a head " * 9, "stomach"], "pixels", 0, MEASURED)
    lines = report.table(found)
    assert max(map(len, lines)) <= 120
    blank = lines.index("")
    assert blank == 1 + 3 + 2 + 1 + 2 * 2 and len(lines) == 2 * blank + 1  # two blocks of three scores
    for block, shown in ((lines[:blank], found["order"][:3]), (lines[blank + 1:], found["order"][3:])):
        starts = [block[0].index(score) for score in shown]
        assert starts == [24, 48, 72] and block[0].split("  ")[-1].strip() == shown[-1]
        for line in block[1:]:
            if "minus" not in line:
                assert all(line[start - 1] == " " and line[start] != " " for start in starts), line
    for lines in (mask_class_table(found), circumference_table(found)):
        assert max(map(len, lines)) <= 120
        for start in range(24, 120, 24):
            assert all(line[start - 1] == " " and line[start] != " " for line in lines), start


def test_a_length_has_two_decimals_and_a_share_three(found):
    lines, scores = report.table(found), found["models"]["ours"]["scores"]
    for line, score, form in ((lines[1], "Dice", ".3f"), (lines[13], "HD95 [mm]", ".2f")):
        value = scores[score]
        assert line[24:48].strip() == f"{value['estimate']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
    difference = found["differences"]["none"]["HD95 [mm]"]
    assert lines[19][24:48].strip() == (f"{difference['estimate']:+.2f} [{difference['low']:+.2f}, "
                                        f"{difference['high']:+.2f}]")
    assert lines[14][24:48].strip() == f"{np.std(found['models']['ours']['per run']['HD95 [mm]'], ddof=1):.2f}"
    assert lines[20][24:48].strip() == f"{difference['p']:.4f}, {difference['p (Holm)']:.4f}"


def test_a_row_of_long_cells_does_not_run_together():
    cells = [report.cell(dict(estimate=123.4, low=-1000.12, high=1652.3), "HD95 [pixels]", signed=True)] * 2
    assert report.row("x", cells).split("] ") == ["x                       +123.40 [-1000.12, +1652.30",
                                                   "+123.40 [-1000.12, +1652.30]"]


def test_classes_in_rows(found):
    lines = mask_class_table(found)
    assert lines[0].split("  ")[0] == "class, images with it" and len(lines) == 1 + 2 * 3  # not the background
    assert [line[:24].strip() for line in lines[1:]] == ["head, 11", "", "", "stomach, 9", "", ""]
    assert [line[24:48].strip() for line in lines[1:]] == ["ours", "none", "theirs"] * 2
    own = found["models"]["none"]["per class"]["stomach"]
    assert lines[5].split() == ["none", *f"{own['Dice']:.3f} {own['HD95 [mm]']:.2f} {own['false alarms']:.3f} of 3".split()]


def test_limits_in_rows(found):
    lines, own = circumference_table(found), found["models"]["ours"]["circumference [mm]"]
    assert [line[:24].strip() for line in lines] == ["circumference [mm]", "ours", "none", "theirs"]
    for start, key in ((24, "bias"), (48, "lower"), (72, "upper")):
        assert lines[1][start:start + 24].strip() == (f"{own[key]['estimate']:+.2f} [{own[key]['low']:+.2f}, "
                                                      f"{own[key]['high']:+.2f}]")
    assert [line.split("]")[-1].strip() for line in lines[1:]] == ["2 of 22", "2 of 22", "2 of 11"]


def test_sentences_speak_of_dice(found):
    values = {name: found["differences"][name]["Dice"]["detectable"] for name in ("none", "theirs")}
    assert comparison.detectable_sentence(found) == (
        "Smallest difference in Dice that a two-sided 5 % test, before any correction, finds with 80 % power: "
        + ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + ".")
    assert report.runs_text(found) == "ours: 2 runs, none: 2 runs, theirs: 1 run"


def test_latex_has_a_cell_for_each_score(found):
    found.update(methods="Methods of 50 % of us.", phantom=True)
    text = report.latex(found, "script.py")
    lines = text.split("\n")
    assert r"\begin{tabular}{lcccccc}" in lines and lines[-2] == r"Methods of 50 \% of us."
    table = [line.removesuffix(r" \\").split(" & ") for line in lines if line.endswith(r" \\")]
    assert all(len(row) == 7 for row in table) and len(table) == 1 + 3 + 2 * 2
    assert table[0][1:] == ["Dice", "IoU", "pooled Dice", "HD95 {[}mm]", "surface Dice", "circumference error {[}mm]"]
    value, difference = found["models"]["theirs"]["scores"]["HD95 [mm]"], found["differences"]["theirs"]["HD95 [mm]"]
    assert table[3][4] == rf"\shortstack{{{value['estimate']:.2f}\\{{[}}{value['low']:.2f}, {value['high']:.2f}{{]}}}}"
    assert table[6][4].startswith(rf"\shortstack{{{difference['estimate']:.2f}\\")
    assert table[7][4] == f"{difference['p (Holm)']:.4f}"
    spread = np.std(found["models"]["ours"]["per run"]["HD95 [mm]"], ddof=1)
    assert rf" $\pm$ {spread:.2f}\\" in table[1][4]
    five = compare_masks({"ours": models()["ours"]}, GROUPS, CLASSES, "mm", 3)
    assert r"\begin{tabular}{lccccc}" in report.latex({**five, "methods": "", "phantom": False}, "script.py")


def test_json_has_no_nan(found):
    assert json.loads(json.dumps(found, allow_nan=False)) == found
