"""What a comparison says: numbers equal to metrics' own, tables that fit a screen, LaTeX, files that appear whole."""

import json
import os
import re
from argparse import Namespace

import numpy as np
import pytest
from scipy.stats import norm
from seg_tools import arguments, data, read_rows  # noqa: F401

from labelled import mask_sets
from scores import class_report, comparison, metrics, report, stats
from scores.exchange import read_predictions
from scores.metrics import CLASSIFICATION_SCORES

K, CLASSES = 3, ["benign", "malignant", "normal"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(comparison, "REPLICATES", 300)
    monkeypatch.setattr(comparison, "FLIPS", 500)


def models(n_groups=8, per_group=3, seed=0, names=("ours", "none", "theirs", "bare")):
    """{name: (scores (S, n, K), ranked)}, labels, groups (names, unsorted): worse from model to model, 2 runs of the
    first two, labels alone of the last."""
    rng = np.random.default_rng(seed)
    groups = np.repeat([f"g{i}" for i in rng.permutation(n_groups)], per_group)
    labels = np.concatenate((np.arange(K), rng.integers(0, K, len(groups) - K)))
    found = {}
    for name, skill, runs in zip(names, (2.0, 1.0, 0.5, 1.0), (2, 2, 1, 1)):
        found[name] = skill * np.eye(K)[labels] + rng.normal(size=(runs, len(labels), K)), True
    bare = names[-1]
    found[bare] = np.eye(K)[found[bare][0].argmax(2)], False
    return found, labels, groups


# ---------------------------------------------------------------- numbers

def test_numbers_are_those_of_metrics():
    rows, labels, groups = models()
    found = class_report.compare(rows, labels, groups, CLASSES, seed=5)
    numbers = np.unique(groups, return_inverse=True)[1]
    weights = stats.group_weights(8, 5, 300)
    assert found["images"] == 24 and found["groups"] == 8 and list(found["models"]) == list(rows)
    assert found["order"] == list(CLASSIFICATION_SCORES) and found["primary"] == "macro F1"
    replicates = {name: stats.replicate_scores(labels, scores, numbers, weights, ranked)
                  for name, (scores, ranked) in rows.items()}
    for name, (scores, ranked) in rows.items():
        model = found["models"][name]
        assert model["runs"] == len(scores)
        for score in CLASSIFICATION_SCORES[:3 + ranked]:
            assert tuple(model["scores"][score].values()) == stats.interval(replicates[name][score])
            assert model["standard error"][score] == pytest.approx(replicates[name][score][1:].std(ddof=1))
            for value, run in zip(model["per run"][score], scores):
                assert value == stats.replicate_scores(labels, run[None], numbers, weights[:1], ranked)[score][0]
        counts = metrics.confusion(labels, scores.argmax(2), K)
        assert np.array_equal(model["confusion, mean of runs"], counts.mean(0))
        assert list(model["per class, pooled over runs"]) == found["classes"] == CLASSES
        for key, values in metrics.per_class(counts.sum(0)).items():
            assert [own[key] for own in model["per class, pooled over runs"].values()] == pytest.approx(values)
    assert list(found["differences"]) == ["none", "theirs", "bare"]
    for name in found["differences"]:
        (a, _), (b, ranked) = rows["ours"], rows[name]
        p = stats.sign_flip_test(labels, a, b, numbers, 5, 500, ranked)
        for score in CLASSIFICATION_SCORES[:3 + ranked]:
            difference, own = replicates["ours"][score] - replicates[name][score], found["differences"][name][score]
            assert (own["estimate"], own["low"], own["high"]) == stats.interval(difference)  # ours minus the other
            assert own["p"] == p[score]
            z = norm.ppf(0.975) + norm.ppf(0.8)
            assert own["detectable"] == pytest.approx(z * difference[1:].std(ddof=1))


def test_holm_is_over_the_comparisons_of_each_score():
    rows, labels, groups = models()
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)["differences"]
    for score in CLASSIFICATION_SCORES:
        tested = [name for name in found if found[name][score]["p"] is not None]  # bare labels have no AUROC
        assert len(tested) == (2 if score == "macro AUROC" else 3)
        order = sorted(tested, key=lambda name: found[name][score]["p"])
        largest = 0.0
        for place, name in enumerate(order):
            largest = max(largest, min(1.0, (len(order) - place) * found[name][score]["p"]))
            assert found[name][score]["p (Holm)"] == pytest.approx(largest)
    assert any(found[name]["macro F1"]["p (Holm)"] > found[name]["macro F1"]["p"] for name in found)


@pytest.mark.filterwarnings("error")
def test_labels_alone_have_no_auroc_and_json_has_no_nan():
    rows, labels, groups = models()
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)
    bare = found["models"]["bare"]
    assert bare["scores"]["macro AUROC"] == {"estimate": None, "low": None, "high": None}
    assert bare["per run"]["macro AUROC"] == [None] and bare["standard error"]["macro AUROC"] is None
    assert set(found["differences"]["bare"]["macro AUROC"].values()) == {None}
    json.dumps(found, allow_nan=False)
    lines = report.table(found)
    for start in ("bare", "  bare"):
        assert next(line for line in lines if line.startswith(start)).endswith(" -")
    assert lines[-1].strip().endswith(" -")  # its p


@pytest.mark.filterwarnings("error")
def test_replicates_that_lack_a_class_are_left_out():
    """Half of the draws of two groups, one of each class, have no AUROC."""
    labels, groups = np.array([0, 0, 1, 1]), np.array(list("aabb"))
    scores = np.array([[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.3, 0.7]]])
    found = class_report.compare({"ours": (scores, True), "other": (scores[:, ::-1], True)}, labels, groups, "ab", seed=0)
    model = found["models"]["ours"]
    assert model["scores"]["macro AUROC"]["estimate"] == model["scores"]["macro AUROC"]["low"] == 0.5
    assert model["standard error"]["macro AUROC"] == 0


def test_one_model_alone():
    rows, labels, groups = models()
    found = class_report.compare({"ours": rows["ours"]}, labels, groups, CLASSES, seed=0)
    assert found["differences"] == {} and not any("minus" in line for line in report.table(found))
    error = found["models"]["ours"]["standard error"]["macro F1"]
    assert comparison.detectable_sentence(found) == f"Standard error of the macro F1 of ours over groups: {error:.3f}."


def test_detectable_difference_is_said_of_each_comparison():
    rows, labels, groups = models()
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)
    values = {name: difference["macro F1"]["detectable"] for name, difference in found["differences"].items()}
    assert comparison.detectable_sentence(found).endswith(
        "80 % power: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + ".")
    assert all(0.01 < value < 1 for value in values.values())


@pytest.mark.filterwarnings("error")
def test_values_of_a_column():
    """Also one with a single image, in which AUROC does not exist, and one with a single group."""
    rows, labels, groups = models()
    values = np.array(["few"] * 1 + ["one group"] * 2 + ["rest"] * 21)
    groups = np.array(groups, object)
    groups[:3] = "g"
    found = class_report.by_column(rows, labels, groups.astype(str), CLASSES, values.tolist(), seed=0)
    assert {value: (part["images"], part["groups"]) for value, part in found.items()} == {
        "few": (1, 1), "one group": (2, 1), "rest": (21, 7)}
    alone = found["few"]["models"]["ours"]["scores"]
    assert alone["macro AUROC"]["estimate"] is None
    assert alone["accuracy"]["estimate"] in (0, 0.5, 1) and alone["accuracy"]["low"] is alone["accuracy"]["high"] is None
    own = values == "rest"
    expected = class_report.compare({name: (scores[:, own], ranked) for name, (scores, ranked) in rows.items()}, labels[own],
                              groups[own].astype(str), CLASSES, 0, tests=False)
    assert found["rest"] == expected and expected["differences"]["none"]["accuracy"]["p"] is None
    json.dumps(found, allow_nan=False)
    lines = class_report.by_table("column", found)
    assert len(lines) == 1 + 3 * 4 and [line.split()[0] for line in lines[1::4]] == ["few", "one", "rest"]
    assert "1, 1" in lines[1] and all("1, 1" not in line for line in lines[2:5]) and "21, 7" in lines[9]
    assert [line[48:72].strip() for line in lines[1:5]] == list(rows)


# ---------------------------------------------------------------- text

LONG = ("checkpoints/of/a/very/deep/folder/with/a/long/name/ours.pt", "from scratch " * 5, "x" * 200, "théirs " * 9)


def test_tables_fit_a_screen():
    rows, labels, groups = models(names=LONG)
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)
    lines = report.table(found)
    assert max(map(len, lines)) <= 120 and len(lines) == 1 + 4 + 2 + 1 + 3 * 2
    assert lines[0].split("  ")[-1] == "macro AUROC" and lines[1].startswith("checkpoint…") and "ours.pt " in lines[1]
    starts = [lines[0].index(score) for score in CLASSIFICATION_SCORES]
    for line in lines[1:]:
        if "minus" not in line:
            assert all(line[start - 1] == " " and line[start] != " " for start in starts if start < len(line)), line
    columns = class_report.by_column(rows, labels, groups, CLASSES, ["a value as long as a sentence, or two of them"] * 24, seed=0)
    assert max(map(len, class_report.by_table("a column of a long name, too long", columns))) <= 120


def test_spread_over_runs():
    rows, labels, groups = models()
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)
    line = report.table(found)[2]
    assert line.startswith("  sd of 2 runs")
    spreads = [np.std(found["models"]["ours"]["per run"][score], ddof=1) for score in CLASSIFICATION_SCORES]
    assert line.split()[4:] == [f"{spread:.3f}" for spread in spreads] and max(spreads) > 0.001


@pytest.mark.parametrize("width", [5, 6, 23])
def test_shorten(width):
    for length in range(40):
        name = "".join(chr(97 + i % 26) for i in range(length))
        short = report.shorten(name, width)
        assert len(short) <= width and (short == name if length <= width else len(short) == width)
        if length > width:
            first, last = short.split("…")
            assert name.startswith(first) and name.endswith(last) and abs(len(first) - len(last)) <= 2


def test_p_values():
    assert [report.p_value(p) for p in (1.0, 0.05, 0.0001, 0.00009)] == ["1.0000", "0.0500", "0.0001", "<0.0001"]


def test_escape():
    assert report.escape("a_b%c&d#e$f{g}") == r"a\_b\%c\&d\#e\$f\{g\}"
    assert report.escape("\\~^<>") == r"\textbackslash{}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
    assert report.escape("--by a-b ---") == "-{}-by a-b -{}-{}-"  # no dashes
    assert report.escape("[1]") == "{[}1]"  # \\ would take it for its argument


def test_latex_has_a_row_for_each_model_and_difference():
    rows, labels, groups = models(names=("our_s", "[none", "theirs", "bare"))
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)
    found.update(methods="Methods of 50 % of us.", phantom=True)
    text = report.latex(found, "script.py")
    lines = text.split("\n")
    assert lines[0] == "% written by script.py" and lines[-2] == r"Methods of 50 \% of us."
    assert r"\begin{tabular}{lcccc}" in lines and rf"\caption{{{report.PHANTOMS} Test set of 24 images of 8 groups" in text
    table = [line.removesuffix(r" \\").split(" & ") for line in lines if line.endswith(r" \\")]
    assert [row[0] for row in table] == ["", r"our\_s", "{[}none", "theirs", "bare"] + [
        text for name in ("{[}none", "theirs", "bare") for text in (rf"our\_s minus {name}", r"\quad p after Holm")]
    assert all(len(row) == 5 for row in table) and table[4][4] == table[-1][4] == "--"
    values, p = found["models"]["theirs"]["scores"]["macro F1"], found["differences"]["theirs"]["macro F1"]
    assert table[3][3] == rf"\shortstack{{{values['estimate']:.3f}\\{{[}}{values['low']:.3f}, {values['high']:.3f}{{]}}}}"
    assert table[8][3] == f"{p['p (Holm)']:.4f}" and f"{p['low']:.3f}, {p['high']:.3f}" in table[7][3]
    spread = np.std(found["models"]["our_s"]["per run"]["accuracy"], ddof=1)
    assert rf" $\pm$ {spread:.3f}\\" in table[1][1]
    assert report.escape(comparison.detectable_sentence(found)) in text and report.escape(comparison.few_groups(found)) in text
    bare = re.sub(r"\\[\\{}]", "", text)
    assert bare.count("{") == bare.count("}")


def test_few_groups_are_warned_of():
    def sentence(n_groups):
        rows, labels, groups = models(n_groups)
        return comparison.few_groups(class_report.compare(rows, labels, groups, CLASSES, seed=0, tests=False))

    assert sentence(30) == "" and "one group" in sentence(1)
    assert sentence(8).startswith("Only 8 test groups") and "p of a sign-flip test is 0.0078." in sentence(8)


def test_one_group_has_no_interval_and_no_test():
    rows, labels, groups = models(1, per_group=9)
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0)
    lines = report.table(found)
    assert lines[1].split()[1] == f"{found['models']['ours']['scores']['accuracy']['estimate']:.3f}" and "[-]" in lines[1]
    assert found["differences"]["none"]["macro F1"]["p"] is found["differences"]["none"]["macro F1"]["detectable"] is None
    assert "unknown" in comparison.detectable_sentence(found)


def test_equal_models_have_no_detectable_difference():
    rows, labels, groups = models()
    found = class_report.compare({"a": rows["ours"], "b": rows["ours"]}, labels, groups, CLASSES, seed=0)
    assert found["differences"]["b"]["macro F1"]["detectable"] is None and found["differences"]["b"]["macro F1"]["p"] == 1


def test_f1_of_each_class_in_blocks_of_four_models():
    rows, labels, groups = models()
    rows["fifth"] = rows["ours"]
    found = class_report.compare(rows, labels, groups, CLASSES, seed=0, tests=False)
    lines = class_report.class_table(found)
    assert len(lines) == 2 * (1 + K) and lines[0].split()[4:] == list(rows)[:4] and lines[4].split()[4:] == ["fifth"]
    value = found["models"]["theirs"]["per class, pooled over runs"]["malignant"]["f1"]
    assert lines[2].split() == ["malignant"] + [f"{found['models'][name]['per class, pooled over runs']['malignant']['f1']:.3f}"
                                                for name in list(rows)[:4]] and f"{value:.3f}" in lines[2]


# ---------------------------------------------------------------- what the models had seen of the test set

def data_of(content, looks, groups="aabbc", by="group column"):
    parts = dict(train=np.array([0, 1]), val=np.array([2]), test=np.array([3, 4]))
    return Namespace(images=Namespace(content=np.array(content, np.uint64), looks=np.array(looks, np.uint64)),
                     groups=np.array(list(groups)), grouped_by=by, names=[f"{i}.png" for i in range(5)], classes=CLASSES,
                     **parts)


def test_copies_of_test_images_in_train_and_validation_are_found():
    looks = np.random.default_rng(0).integers(0, 2**63, (5, 4))
    assert report.find_copies(data_of(range(5), looks))["sentence"].startswith("No test image")
    found = report.find_copies(data_of([0, 1, 2, 2, 4], looks))  # as one of validation
    assert found["identical"] == 1 and found["names"] == ["3.png"] and found["sentence"].startswith("1 test image (1 by pixels")
    looks[4] = looks[0] ^ 5  # two bits off one of train
    found = report.find_copies(data_of([0, 1, 2, 2, 4], looks))
    assert (found["identical"], found["look_alike"]) == (1, 1) and found["sentence"].startswith("2 test images (1 by pixels")


def test_files_tell_what_they_are_and_had_seen():
    looks = np.random.default_rng(0).integers(0, 2**63, (5, 4))
    info = dict(path="a.pt", family="DINOv2", digest="ab", mean=0.1, std=0.2, fed=16, config={}, seen=None)
    ours = dict(info, seen={"content": np.array([3, 9], np.uint64), "looks": looks[:1].astype(np.uint64)})
    files = report.files_of({"ours": [ours], "theirs": [info], "none": [dict(info, digest=None)]}, data_of(range(5), looks))
    assert files["ours"][0]["in pretraining set"]["seen"] == 1 and "transductive: 1 of 2" in files["ours"][0]["pretraining set"]
    assert files["theirs"][0]["pretraining set"].startswith("cannot tell") and files["none"][0]["pretraining set"] is None
    assert files["ours"][0]["sha256"] == "ab" and files["ours"][0]["img_size"] == 16


def test_predictions_are_written_as_they_are_read(tmp_path):
    data, scores = data_of(range(5), np.zeros((5, 4))), np.random.default_rng(0).dirichlet(np.ones(K), (2, 2))
    report.write_predictions(tmp_path, "our model", scores, data)
    for run in range(2):
        path = tmp_path / f"predictions-our_model-{run}.csv"
        read, ranked = read_predictions(str(path), ["3.png", "4.png"], CLASSES)
        assert ranked and np.abs(read[0] - scores[run]).max() < 1e-6


# ---------------------------------------------------------------- files

def test_split_file(data, tmp_path):
    data = data[0]
    report.write_split("out.csv", {"image": data.names, "group": data.groups}, data)
    expected = [f"{row['image']},{row['group']},{row['split']}" for split in ("train", "val", "test")
                for row in read_rows(tmp_path, split)]
    lines = (tmp_path / "out.csv").read_text().split()
    assert lines[0] == "image,group,split" and sorted(lines[1:]) == sorted(expected)
    found, *_ = mask_sets.open_data(arguments("--split", "out.csv"))
    assert all(np.array_equal(getattr(found, part), getattr(data, part)) for part in ("train", "val", "test"))
    assert np.array_equal(found.groups, data.groups)


def test_another_split_is_kept_aside(data, tmp_path, capsys):
    (tmp_path / "out.csv").write_text("mine")
    columns = {"image": data[0].names, "group": data[0].groups}
    report.write_split("out.csv", columns, data[0])
    assert (tmp_path / "out.old-1.csv").read_text() == "mine" and "another split: kept as" in capsys.readouterr().out
    report.write_split("out.csv", columns, data[0])
    assert not (tmp_path / "out.old-2.csv").exists()


def test_text_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.tex"
    report.write_text(path, "one é \udce9")  # a name that is not UTF-8 is no reason to lose the rest
    assert path.read_text(encoding="utf-8") == "one é ?"
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        report.write_text(path, "two")
    assert path.read_text(encoding="utf-8") == "one é ?"


def test_outputs_of_others_are_left_alone(tmp_path):
    def check(name):
        report.check_output(str(tmp_path / name), "--flag", "script.py")

    check("new.json")
    check("new.tex")
    (tmp_path / "own.json").write_text('{"written_by": "script.py"}')
    (tmp_path / "own.tex").write_text("% written by script.py\n")
    check("own.json")
    check("own.tex")
    for name, content in {"a.json": '{"written_by": "other.py"}', "b.json": "[1]", "c.json": "no json", "d.json": "",
                          "e.tex": "\\documentclass{book}\n% script.py", "f.tex": ""}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"--flag .*{name}: exists and was not written by script.py"):
            check(name)
    (tmp_path / "folder.tex").mkdir()
    with pytest.raises(ValueError, match="was not written by"):
        check("folder.tex")
    with pytest.raises(ValueError, match="its folder does not exist"):
        check("nowhere/a.json")


def test_json_names_what_made_it(tmp_path):
    class Arguments:
        def __init__(self):
            self.seed = 3

    report.write_json(str(tmp_path / "a.json"), "script.py", Arguments(), "cpu", {"models": {}})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["written_by"] == "script.py" and found["args"] == {"seed": 3} and found["models"] == {}
    assert found["versions"]["numpy"] == np.__version__ and found["versions"]["commit"]
    with pytest.raises(ValueError):
        report.write_json(str(tmp_path / "b.json"), "script.py", Arguments(), "cpu", {"score": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_a_report_of_other_arguments_is_kept(tmp_path, capsys):
    path = str(tmp_path / "a.json")
    for seed in (3, 3, 4):
        report.write_json(path, "script.py", Namespace(seed=seed), "cpu", {})
    assert json.loads((tmp_path / "a.old-1.json").read_text())["args"] == {"seed": 3}
    assert json.loads((tmp_path / "a.json").read_text())["args"] == {"seed": 4}
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.old-1.json"] and "kept as" in capsys.readouterr().out
