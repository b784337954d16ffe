"""Paradigms compared: loops written out for every kind of task, gains of the right sign, shared units, missing runs."""

import copy
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score

from scores import multi_report, stats
from scores.multi_report import Truth, compare_paradigms, methods_sentences, table_of_paradigms

HEAD, PLANE, NODULE, FEMUR = "fetal_head", "fetal_plane_cls", "thyroid_nodule_det", "fetal_femur"
GROUPS = {HEAD: "OB", PLANE: "OB", FEMUR: "OB", NODULE: "Thyroid"}
REPLICATES, FLIPS = 80, 100  # of 7 units or more not every pattern


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(multi_report, "REPLICATES", REPLICATES)
    monkeypatch.setattr(multi_report, "FLIPS", FLIPS)


def values_of(kind, quality, m, K, labels, missing, rng):
    """Values of a run whose quality goes from 0, bad, to 1, good."""
    if kind == "segmentation":
        return {"Dice": np.where(missing, np.nan, rng.beta(2 + 20 * quality, 5, (m, K - 1)))}
    if kind == "classification":
        scores = np.exp(3 * quality * np.eye(K)[labels] + rng.normal(size=(m, K)))
        return {"probabilities": scores / scores.sum(1, keepdims=True)}
    if kind == "detection":
        return {"IoU": rng.beta(2 + 20 * quality, 5, m)}
    return {"error": np.where(missing, np.nan, rng.gamma(2, 1 + 30 * (1 - quality), (m, K)))}


def task(kind, K, units, qualities, runs=(2, 2, 2), seed=0):
    """Truth and a list of runs for each quality, of 0.1 the trivial predictor."""
    rng, units = np.random.default_rng(seed), np.asarray(units)
    m = len(units)
    labels = np.r_[np.arange(K), rng.integers(0, K, m - K)] if kind == "classification" else None
    missing = rng.random((m, K - 1 if kind == "segmentation" else K)) < 0.25
    missing[0] = True  # an image without any foreground, or without a point
    makes = [[values_of(kind, quality, m, K, labels, missing, rng) for _ in range(n)]
             for quality, n in zip((0.1, *qualities), (1, *runs))]
    return Truth(kind, K, units, labels, np.full(m, 500.0), makes[0][0]), makes[1:]


def tasks(qualities=(0.7, 0.7, 0.8), runs=(2, 2, 2)):
    """Paradigms and truth of four tasks, the first three of which share units; their numbers have gaps."""
    made = {HEAD: task("segmentation", 3, np.repeat([9, 3, 4, 7, 20, 11], 3), qualities, runs, 1),
            PLANE: task("classification", 3, [3, 3, 4, 30, 31, 32, 33, 33, 34, 3, 9, 9, 20, 31], qualities, runs, 2),
            FEMUR: task("regression", 2, [11, 11, 20, 40, 41, 42, 43, 44, 3], qualities, runs, 3),
            NODULE: task("detection", 1, np.repeat(np.arange(50, 58), 2), qualities, runs, 4)}
    return ({name: {key: made[key][1][i] for key in made} for i, name in enumerate(("task", "clinical", "all"))},
            {key: made[key][0] for key in made})


# ---------------------------------------------------------------- loops

def loop_score(truth, run, weights):
    """A task's score of one run, each image counted weights (m,) times."""
    if truth.kind == "classification":
        predicted = [max(range(truth.K), key=lambda k: row[k]) for row in run["probabilities"]]
        chosen = np.repeat(np.arange(len(weights)), weights)
        return f1_score(truth.labels[chosen], np.array(predicted)[chosen], average="macro")
    if truth.kind == "segmentation":
        means = []
        for column in run["Dice"].T:
            known = [(w, value) for w, value in zip(weights, column) if w and not np.isnan(value)]
            if known:
                means.append(sum(w * value for w, value in known) / sum(w for w, _ in known))
        return sum(means) / len(means)
    total = count = 0
    for i, w in enumerate(weights):
        points = [run["IoU"][i]] if truth.kind == "detection" else [x for x in run["error"][i] if not np.isnan(x)]
        if points:
            total, count = total + w * sum(points) / len(points), count + w
    return total / count


def loops(paradigms, truth, weights):
    """{task: {paradigm: (score, gain over trivial, normalised, gain over "task"), each (1 + R,)}}"""
    known = sorted({unit for own in truth.values() for unit in own.units})
    found = {}
    for key, own in truth.items():
        columns = [known.index(unit) for unit in own.units]
        rows = [[int(row[column]) for column in columns] for row in weights]
        drawn = {name: np.array([np.mean([loop_score(own, run, row) for run in part[key]]) if sum(row) else np.nan
                                 for row in rows]) for name, part in {**paradigms, "": {key: [own.trivial]}}.items()}
        trivial, sign = drawn.pop(""), -1 if own.kind == "regression" else 1
        room = trivial if own.kind == "regression" else 1 - trivial
        found[key] = {name: (score, sign * (score - trivial), np.maximum(sign * (score - trivial) / room, -1),
                             sign * (score - drawn["task"])) for name, score in drawn.items()}
    return found


def same(told, replicates):
    expected = [replicates[0], *np.nanpercentile(replicates[1:], [2.5, 97.5])]
    assert [told[key] for key in ("estimate", "low", "high")] == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_scores_gains_and_group_means_are_those_of_loops():
    paradigms, truth = tasks(runs=(2, 3, 1))
    found = compare_paradigms(paradigms, truth, GROUPS, 5)
    n_units = len({unit for own in truth.values() for unit in own.units})
    expected = loops(paradigms, truth, stats.group_weights(n_units, 5, REPLICATES))
    assert found["units"] == n_units == 24 and list(found["tasks"]) == [HEAD, PLANE, FEMUR, NODULE]
    for key, own in truth.items():
        about = found["tasks"][key]
        assert about["images"] == len(own.units) and about["units"] == len(set(own.units.tolist()))
        assert about["kind"] == own.kind and about["group"] == GROUPS[key]
        for name, part in paradigms.items():
            told, (score, over, normalised, gained) = about["paradigms"][name], expected[key][name]
            same(told["score"], score)
            same(told["gain over trivial"], over)
            same(told["normalised"], normalised)
            alone = [loop_score(own, run, [1] * len(own.units)) for run in part[key]]
            assert told["per run"] == pytest.approx(alone) and told["runs"] == len(alone)
            assert told["sd"] == (None if len(alone) == 1 else pytest.approx(np.std(alone, ddof=1)))
            assert ("gain" in told) == (name != "task")
            if name != "task":
                same(told["gain"], gained)
    for keys, about in (((HEAD, PLANE, FEMUR), found["groups"]["OB"]), ((NODULE,), found["groups"]["Thyroid"]),
                        (tuple(truth), found["all tasks"])):
        assert about["tasks"] == list(keys)
        assert about["units"] == len({unit for key in keys for unit in truth[key].units})
        for name in paradigms:
            told = about["paradigms"][name]
            same(told["normalised"], np.mean([expected[key][name][2] for key in keys], axis=0))
            if name != "task":
                same(told["gain"], np.mean([expected[key][name][2] - expected[key]["task"][2] for key in keys], axis=0))


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_p_is_that_of_stats_and_holm_is_over_the_tasks_of_a_paradigm():
    paradigms, truth = tasks()
    found = compare_paradigms(paradigms, truth, GROUPS, 5)["tasks"]
    places = {key: np.unique(own.units, return_inverse=True)[1] for key, own in truth.items()}
    for name in ("clinical", "all"):
        both = {key: [[run[multi_report.VALUES[truth[key].kind]] for run in paradigms[which][key]]
                      for which in ("task", name)] for key in truth}
        p = {HEAD: stats.sign_flip_class_means(*both[HEAD], places[HEAD], 5, FLIPS),
             PLANE: stats.sign_flip_test(truth[PLANE].labels, *both[PLANE], places[PLANE], 5, FLIPS)["macro F1"],
             NODULE: stats.sign_flip_means(*both[NODULE], places[NODULE], 5, FLIPS)}
        p[FEMUR] = stats.sign_flip_means(*(np.nanmean(runs, 2) for runs in both[FEMUR]), places[FEMUR], 5, FLIPS)
        told = {key: found[key]["paradigms"][name]["gain"] for key in truth}
        assert {key: own["p"] for key, own in told.items()} == p and len(set(p.values())) == 4
        adjusted = dict(zip(p, stats.holm(list(p.values()))))
        assert {key: own["p (Holm)"] for key, own in told.items()} == pytest.approx(adjusted)


def test_a_paradigm_equal_to_task_gains_nothing():
    paradigms, truth = tasks()
    found = compare_paradigms({"task": paradigms["task"], "all": copy.deepcopy(paradigms["task"])}, truth, GROUPS, 0)
    for own in found["tasks"].values():
        assert own["paradigms"]["all"]["gain"] == {"estimate": 0, "low": 0, "high": 0, "p": None, "p (Holm)": None,
                                                   "mark": ""}
    for about in (*found["groups"].values(), found["all tasks"]):
        own = about["paradigms"]["all"]["gain"]
        assert own == {"estimate": 0, "low": 0, "high": 0, "tasks": len(about["tasks"]), "mark": ""}


def test_holm_does_not_count_networks_that_both_paradigms_have():
    paradigms, truth = tasks()
    shared = {"task": paradigms["task"], "all": {**paradigms["all"], NODULE: copy.deepcopy(paradigms["task"][NODULE])}}
    found = compare_paradigms(shared, truth, GROUPS, 0)["tasks"]
    gains = {key: own["paradigms"]["all"]["gain"] for key, own in found.items()}
    assert gains[NODULE]["p"] is None and gains[NODULE]["estimate"] == 0
    others = [key for key in truth if key != NODULE]
    assert [gains[key]["p (Holm)"] for key in others] == pytest.approx(stats.holm([gains[key]["p"] for key in others]))


@pytest.mark.parametrize("kind, K", [("segmentation", 3), ("classification", 3), ("detection", 1), ("regression", 2)])
def test_a_better_paradigm_gains_and_a_worse_one_loses(kind, K):
    truth, runs = task(kind, K, np.arange(40) // 2, (0.5, 0.95, 0.2))
    paradigms = {name: {"x": own} for name, own in zip(("task", "clinical", "all"), runs)}
    found = compare_paradigms(paradigms, {"x": truth}, {"x": "one"}, 0)
    own = found["tasks"]["x"]["paradigms"]
    assert [own[name]["gain"]["mark"] for name in ("clinical", "all")] == ["gain", "loss"]
    assert own["clinical"]["gain"]["low"] > 0 > own["all"]["gain"]["high"]
    assert own["clinical"]["beats trivial"] == "yes" and own["clinical"]["gain over trivial"]["low"] > 0
    scores = [own[name]["score"]["estimate"] for name in ("all", "task", "clinical")]
    assert scores == sorted(scores, reverse=kind == "regression")
    group = found["groups"]["one"]["paradigms"]
    assert [group[name]["gain"]["mark"] for name in ("clinical", "all")] == ["gain", "loss"]
    assert group["all"]["normalised"] == own["all"]["normalised"]  # of one task, the mean is its own
    swapped = truth._replace(trivial=runs[1][0])  # a trivial predictor that cannot be beaten
    worse = compare_paradigms(paradigms, {"x": swapped}, {"x": "one"}, 0)["tasks"]["x"]["paradigms"]["all"]
    assert worse["beats trivial"] == "worse" and worse["normalised"]["high"] < 0
    even = compare_paradigms({"task": {"x": [truth.trivial]}}, {"x": truth}, {"x": "one"}, 0)["tasks"]["x"]["paradigms"]
    assert even["task"]["beats trivial"] == "not shown" and even["task"]["normalised"]["estimate"] == 0


def test_marks_follow_p_after_holm_else_the_interval():
    def tasks_of(*gains):
        return {str(i): {"paradigms": {"all": {"gain": dict(zip(("estimate", "low", "high", "p"), own))}}}
                for i, own in enumerate(gains)}
    found = tasks_of((0.1, -0.1, 0.3, 0.01), (0.1, 0.05, 0.2, 0.03), (-0.1, -0.3, -0.05, 0.001), (0.1, 0.05, 0.2, None),
                     (-0.1, -0.2, -0.05, None), (0.1, -0.05, 0.2, None), (0.1, None, None, None))
    found["without"] = {"paradigms": {}}
    multi_report.correct(found, "all")
    told = [own["paradigms"]["all"]["gain"] for own in list(found.values())[:-1]]
    assert [own["mark"] for own in told] == ["gain", "gain", "loss", "gain", "loss", "", ""]
    assert [own["p (Holm)"] for own in told] == pytest.approx([0.02, 0.03, 0.003, None, None, None, None])
    more = tasks_of((0.1, 0.05, 0.2, 0.03), (0.1, 0.05, 0.2, 0.04))
    multi_report.correct(more, "all")
    assert [own["paradigms"]["all"]["gain"]["mark"] for own in more.values()] == ["", ""]  # 0.06 both


def test_units_of_two_tasks_are_resampled_together():
    """Two equal tasks of the same units vary as one does; of other units their mean varies by less."""
    truth, runs = task("detection", 1, np.arange(30), (0.5, 0.6, 0.6))
    def width(other):
        paradigms = {"task": {"a": runs[0], "b": runs[0]}, "all": {"a": runs[1], "b": runs[1]}}
        found = compare_paradigms(paradigms, {"a": truth, "b": truth._replace(units=other)}, {"a": "g", "b": "g"}, 0)
        own, alone = found["groups"]["g"]["paradigms"]["all"], found["tasks"]["a"]["paradigms"]["all"]
        return [part["high"] - part["low"] for part in (own["normalised"], own["gain"], alone["normalised"])]
    mean, gained, alone = width(truth.units)
    assert mean == pytest.approx(alone, rel=1e-9)
    mean, apart, alone = width(truth.units + 30)
    assert mean < 0.85 * alone and apart < 0.85 * gained


# ---------------------------------------------------------------- what is missing

def test_paradigms_of_some_tasks():
    """A mean is over the tasks a paradigm has, a gain over those that "task" has, too."""
    paradigms, truth = tasks()
    whole = compare_paradigms(paradigms, truth, GROUPS, 0)
    del paradigms["clinical"][PLANE], paradigms["clinical"][NODULE], paradigms["task"][FEMUR]
    found = compare_paradigms(paradigms, truth, GROUPS, 0)
    own = found["groups"]["OB"]["paradigms"]
    assert (own["clinical"]["tasks"], own["task"]["tasks"], own["all"]["tasks"]) == (2, 2, 3)
    assert (own["clinical"]["gain"]["tasks"], own["all"]["gain"]["tasks"]) == (1, 2)
    alone = {key: {name: part["normalised"]["estimate"] for name, part in own["paradigms"].items()}
             for key, own in whole["tasks"].items()}
    assert own["clinical"]["normalised"]["estimate"] == pytest.approx(
        (alone[HEAD]["clinical"] + alone[FEMUR]["clinical"]) / 2)
    assert own["clinical"]["gain"]["estimate"] == pytest.approx(alone[HEAD]["clinical"] - alone[HEAD]["task"])
    assert "clinical" not in found["groups"]["Thyroid"]["paradigms"]
    assert "gain" not in found["tasks"][FEMUR]["paradigms"]["all"]
    lines = table_of_paradigms(found)
    assert lines[-1] == 'Without a run of paradigm "task" to compare with: fetal_femur.'
    assert sum("clinical (2 of 3)" in line and line.rstrip().endswith("of 1 task") for line in lines) == 1


def test_without_one_model_per_task_nothing_is_compared():
    paradigms, truth = tasks()
    found = compare_paradigms({"all": paradigms["all"]}, truth, GROUPS, 0)
    assert found["compared with"] is None and "gain\"" not in json.dumps(found)
    assert 'no run of paradigm "task"' in table_of_paradigms(found)[-1]
    text = methods_sentences(found)
    assert 'no run of paradigm "task"' in text and "Holm" not in text
    assert found["all tasks"]["paradigms"]["all"]["normalised"]["low"] > 0


@pytest.mark.filterwarnings("error")
def test_a_task_that_cannot_be_scored_and_one_of_one_unit():
    paradigms, truth = tasks()
    for part in (*paradigms.values(), {HEAD: [truth[HEAD].trivial]}):
        for run in part[HEAD]:
            run["Dice"][:] = np.nan
    truth[NODULE] = truth[NODULE]._replace(units=np.full(16, 50))
    found = compare_paradigms(paradigms, truth, GROUPS, 0)
    own = found["tasks"][HEAD]["paradigms"]["all"]
    assert {*own["score"].values(), *own["normalised"].values(), *own["gain"].values(), own["sd"]} == {None, ""}
    assert own["beats trivial"] == "not shown" and own["per run"] == [None, None]
    assert found["groups"]["OB"]["paradigms"]["all"]["tasks"] == 2
    alone = [found["tasks"][key]["paradigms"]["all"]["normalised"]["estimate"] for key in (PLANE, FEMUR)]
    assert found["groups"]["OB"]["paradigms"]["all"]["normalised"]["estimate"] == pytest.approx(np.mean(alone))
    single = found["tasks"][NODULE]["paradigms"]["all"]
    assert single["score"]["estimate"] > 0 and single["score"]["low"] is single["gain"]["p"] is None
    assert single["beats trivial"] == "not shown" and single["gain"]["mark"] == ""
    for about in (found["groups"]["Thyroid"], found["all tasks"]):
        assert about["paradigms"]["all"]["normalised"]["estimate"] and about["paradigms"]["all"]["gain"]["low"] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert any(line.split()[:2] == ["all", "-"] for line in table_of_paradigms(found))


def test_a_class_or_point_that_some_images_lack_counts_where_it_is():
    dice = {"Dice": np.array([[1.0, np.nan], [0.5, np.nan], [np.nan, 0.2]])}
    error = {"error": np.array([[1.0, 5.0], [np.nan, 6.0], [np.nan, np.nan]])}
    units, far = np.arange(3), {"error": error["error"] * 10}
    truth = {"s": Truth("segmentation", 3, units, None, None, dice),
             "r": Truth("regression", 2, units, None, None, far)}
    found = compare_paradigms({"task": {"s": [dice], "r": [error]}}, truth, {"s": "g", "r": "g"}, 0)["tasks"]
    assert found["s"]["paradigms"]["task"]["score"]["estimate"] == pytest.approx((0.75 + 0.2) / 2)
    assert found["r"]["paradigms"]["task"]["score"]["estimate"] == pytest.approx((3 + 6) / 2)
    assert found["r"]["paradigms"]["task"]["normalised"]["estimate"] == pytest.approx(0.9)


def test_spread_of_a_mean_is_over_runs_of_the_same_number():
    paradigms, truth = tasks()
    found = compare_paradigms(paradigms, truth, GROUPS, 0)
    runs = [found["tasks"][key]["paradigms"]["all"]["normalised per run"] for key in (HEAD, PLANE, FEMUR)]
    assert found["groups"]["OB"]["paradigms"]["all"]["sd"] == pytest.approx(np.std(np.mean(runs, axis=0), ddof=1))
    del paradigms["all"][PLANE][1]
    assert compare_paradigms(paradigms, truth, GROUPS, 0)["groups"]["OB"]["paradigms"]["all"]["sd"] is None
