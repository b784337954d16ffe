"""What a comparison says: numbers equal to metrics' own, tables that fit a screen, LaTeX, files that appear whole."""

import json
import os
import re

import numpy as np
import pytest
from scipy.stats import norm

import metrics
import report
from metrics import CLASSIFICATION_SCORES

K = 3


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(report, "REPLICATES", 300)
    monkeypatch.setattr(report, "FLIPS", 500)


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
    found = report.compare(rows, labels, groups, seed=5)
    numbers = np.unique(groups, return_inverse=True)[1]
    weights = metrics.group_weights(8, 5, 300)
    assert found["images"] == 24 and found["groups"] == 8 and list(found["models"]) == list(rows)
    replicates = {name: metrics.replicate_scores(labels, scores, numbers, weights, ranked)
                  for name, (scores, ranked) in rows.items()}
    for name, (scores, ranked) in rows.items():
        model = found["models"][name]
        assert model["runs"] == len(scores)
        for score in CLASSIFICATION_SCORES[:3 + ranked]:
            assert tuple(model["scores"][score].values()) == metrics.interval(replicates[name][score])
            assert model["standard error"][score] == pytest.approx(replicates[name][score][1:].std(ddof=1))
            for value, run in zip(model["per run"][score], scores):
                assert value == metrics.replicate_scores(labels, run[None], numbers, weights[:1], ranked)[score][0]
        counts = metrics.confusion(labels, scores.argmax(2), K)
        assert np.array_equal(model["confusion, mean of runs"], counts.mean(0))
        recall = metrics.per_class(counts.sum(0))["recall"]
        assert model["per class, pooled over runs"]["recall"] == pytest.approx(recall)
    assert list(found["differences"]) == ["none", "theirs", "bare"]
    for name in found["differences"]:
        (a, _), (b, ranked) = rows["ours"], rows[name]
        p = metrics.sign_flip_test(labels, a, b, numbers, 5, 500, ranked)
        for score in CLASSIFICATION_SCORES[:3 + ranked]:
            difference, own = replicates["ours"][score] - replicates[name][score], found["differences"][name][score]
            assert (own["estimate"], own["low"], own["high"]) == metrics.interval(difference)  # ours minus the other
            assert own["p"] == p[score]
            z = norm.ppf(0.975) + norm.ppf(0.8)
            assert own["detectable"] == pytest.approx(z * difference[1:].std(ddof=1))


def test_holm_is_over_the_comparisons_of_each_score():
    rows, labels, groups = models()
    found = report.compare(rows, labels, groups, seed=0)["differences"]
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
    found = report.compare(rows, labels, groups, seed=0)
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
    found = report.compare({"ours": (scores, True), "other": (scores[:, ::-1], True)}, labels, groups, seed=0)
    model = found["models"]["ours"]
    assert model["scores"]["macro AUROC"]["estimate"] == model["scores"]["macro AUROC"]["low"] == 0.5
    assert model["standard error"]["macro AUROC"] == 0


def test_one_model_alone():
    rows, labels, groups = models()
    found = report.compare({"ours": rows["ours"]}, labels, groups, seed=0)
    assert found["differences"] == {} and not any("minus" in line for line in report.table(found))
    error = found["models"]["ours"]["standard error"]["macro F1"]
    assert report.detectable_sentence(found) == f"Standard error of the macro F1 of ours over groups: {error:.3f}."


def test_detectable_difference_is_said_of_each_comparison():
    rows, labels, groups = models()
    found = report.compare(rows, labels, groups, seed=0)
    values = {name: difference["macro F1"]["detectable"] for name, difference in found["differences"].items()}
    assert report.detectable_sentence(found).endswith(
        "80 % power: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + ".")
    assert all(0.01 < value < 1 for value in values.values())


@pytest.mark.filterwarnings("error")
def test_values_of_a_column():
    """Also one with a single image, in which AUROC does not exist, and one with a single group."""
    rows, labels, groups = models()
    values = np.array(["few"] * 1 + ["one group"] * 2 + ["rest"] * 21)
    groups = np.array(groups, object)
    groups[:3] = "g"
    found = report.by_column(rows, labels, groups.astype(str), values.tolist(), seed=0)
    assert {value: (part["images"], part["groups"]) for value, part in found.items()} == {
        "few": (1, 1), "one group": (2, 1), "rest": (21, 7)}
    alone = found["few"]["models"]["ours"]["scores"]
    assert alone["macro AUROC"]["estimate"] is None
    assert alone["accuracy"]["low"] == alone["accuracy"]["estimate"] == alone["accuracy"]["high"]
    assert found["one group"]["differences"]["none"]["accuracy"]["p"] == 1
    own = values == "rest"
    expected = report.compare({name: (scores[:, own], ranked) for name, (scores, ranked) in rows.items()}, labels[own],
                              groups[own].astype(str), 0)
    assert found["rest"] == expected
    json.dumps(found, allow_nan=False)
    lines = report.by_table("column", found)
    assert len(lines) == 1 + 3 * 4 and [line.split()[0] for line in lines[1::4]] == ["few", "one", "rest"]
    assert "1, 1" in lines[1] and all("1, 1" not in line for line in lines[2:5]) and "21, 7" in lines[9]
    assert [line[48:72].strip() for line in lines[1:5]] == list(rows)


# ---------------------------------------------------------------- text

LONG = ("checkpoints/of/a/very/deep/folder/with/a/long/name/ours.pt", "from scratch " * 5, "x" * 200, "théirs " * 9)


def test_tables_fit_a_screen():
    rows, labels, groups = models(names=LONG)
    found = report.compare(rows, labels, groups, seed=0)
    lines = report.table(found)
    assert max(map(len, lines)) <= 120 and len(lines) == 1 + 4 + 2 + 1 + 3 * 2
    assert lines[0].split("  ")[-1] == "macro AUROC" and lines[1].startswith("checkpoint…") and "ours.pt " in lines[1]
    starts = [lines[0].index(score) for score in CLASSIFICATION_SCORES]
    for line in lines[1:]:
        if "minus" not in line:
            assert all(line[start - 1] == " " and line[start] != " " for start in starts if start < len(line)), line
    columns = report.by_column(rows, labels, groups, ["a value as long as a sentence, or two of them"] * 24, seed=0)
    assert max(map(len, report.by_table("a column of a long name, too long", columns))) <= 120


def test_spread_over_runs():
    rows, labels, groups = models()
    found = report.compare(rows, labels, groups, seed=0)
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


def test_latex_has_a_row_for_each_model():
    rows, labels, groups = models(names=("our_s", "[none", "theirs", "bare"))
    found = report.compare(rows, labels, groups, seed=0)
    text = report.latex(found, "Methods of 50 % of us.", "script.py")
    lines = text.split("\n")
    assert lines[0] == "% written by script.py" and lines[-2] == r"Methods of 50 \% of us."
    assert r"\begin{tabular}{lccccc}" in lines
    table = {line.split(" & ")[0]: line.removesuffix(r" \\").split(" & ") for line in lines if line.endswith(r" \\")}
    assert list(table) == ["model", r"our\_s", "{[}none", "theirs", "bare"]
    assert all(len(row) == 6 for row in table.values())
    assert table[r"our\_s"][5] == "--" and table["bare"][4] == "--"
    assert table["theirs"][5] == f"{found['differences']['theirs']['macro F1']['p (Holm)']:.4f}"
    values = found["models"]["theirs"]["scores"]["macro F1"]
    assert table["theirs"][3] == f"{values['estimate']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
    assert "Test set of 24 images of 8 groups" in text and report.escape(report.detectable_sentence(found)) in text
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")


# ---------------------------------------------------------------- files

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

    report.write_json(tmp_path / "a.json", "script.py", Arguments(), "cpu", {"models": {}})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["written_by"] == "script.py" and found["args"] == {"seed": 3} and found["models"] == {}
    assert found["versions"]["numpy"] == np.__version__ and found["versions"]["commit"]
    with pytest.raises(ValueError):
        report.write_json(tmp_path / "b.json", "script.py", Arguments(), "cpu", {"score": float("nan")})
    assert not (tmp_path / "b.json").exists()
