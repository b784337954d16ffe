"""Normalised scores at their edges, values that do not fit, and the table of paradigms as a screen shows it."""

import numpy as np
import pytest

from scores import multi_report
from scores.multi_report import Truth, compare_paradigms, methods_sentences, normalised_score, table_of_paradigms

LONG = "a_task_with_a_name_that_has_no_end_" * 4


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(multi_report, "REPLICATES", 50)
    monkeypatch.setattr(multi_report, "FLIPS", 200)


# ---------------------------------------------------------------- normalised scores

@pytest.mark.parametrize("kind, score, trivial, expected", [
    ("segmentation", 0.75, 0.5, 0.5), ("classification", 1, 0.25, 1), ("detection", 0.5, 0.5, 0),
    ("detection", 0.4, 0.5, -0.2), ("classification", 0, 0.9, -1), ("segmentation", 1, 1, 0),
    ("segmentation", 0.999, 1, -1), ("regression", 5, 20, 0.75), ("regression", 0, 20, 1), ("regression", 20, 20, 0),
    ("regression", 30, 20, -0.5), ("regression", 500, 20, -1), ("regression", 0, 0, 0), ("regression", 0.1, 0, -1),
    ("detection", np.nan, 0.5, np.nan), ("regression", 3, np.nan, np.nan)])
@pytest.mark.filterwarnings("error")
def test_normalised_scores(kind, score, trivial, expected):
    assert normalised_score(kind, score, trivial) == pytest.approx(expected, nan_ok=True)
    assert np.ndim(normalised_score(kind, score, trivial)) == 0
    both = normalised_score(kind, np.array([score, trivial]), np.array([trivial, trivial]))
    assert both == pytest.approx([expected, trivial * 0], nan_ok=True)


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'Regression' is no kind of task: expected one of segmentation, "):
        normalised_score("Regression", 1, 2)


# ---------------------------------------------------------------- values that do not fit

def boxes(m, mean, seed):
    return {"IoU": np.clip(mean + 0.1 * np.random.default_rng(seed).normal(size=m), 0, 1)}


def errors(m, mean, seed):
    return {"error": np.random.default_rng(seed).gamma(4, mean / 4, (m, 2))}


def given():
    """Paradigms, truth and groups of a detection, a regression and a task of a long name."""
    truth = {"box": Truth("detection", 1, np.arange(40), None, None, boxes(40, 0.4, 0)),
             "femur": Truth("regression", 2, np.arange(9), None, None, errors(9, 900, 1)),
             LONG: Truth("detection", 1, np.arange(40, 80), None, None, boxes(40, 0.4, 2))}
    paradigms = {name: {"box": [boxes(40, 0.5 + 0.1 * i, 10 * i + s) for s in (3, 4)],
                        "femur": [errors(9, 1000 + 3000 * i, 10 * i + s) for s in (5, 6)],
                        LONG: [boxes(40, 0.5, 10 * i + 7)]}
                 for i, name in enumerate(("task", "clinical", "all of them, and more"))}
    return paradigms, truth, {"box": "Thyroid", "femur": "OB", LONG: "Thyroid"}


@pytest.mark.parametrize("change, message", [
    (lambda p, t, g: p.clear(), "no paradigm has a task to compare"),
    (lambda p, t, g: t.pop("box"), "no truth of box: give one for every task"),
    (lambda p, t, g: g.pop("femur"), "no clinical group of femur"),
    (lambda p, t, g: p["task"].update(box=[]), "box, paradigm task: no run"),
    (lambda p, t, g: p["task"]["box"].append(boxes(39, 0.5, 0)),
     r"box, paradigm task, run 2: IoU of shape \(39,\), needs \(40,\)"),
    (lambda p, t, g: p["clinical"]["femur"].append({"DSC": 1}),
     r"clinical, run 2: error of shape \(0,\), needs \(9, 2\)"),
    (lambda p, t, g: t["box"].trivial["IoU"].__setitem__(3, np.nan), "box, trivial predictor: IoU holds nan"),
    (lambda p, t, g: p["task"]["femur"][0]["error"].__setitem__((2, 0), np.nan),
     "femur, paradigm task, run 0: error is nan at other places"),
    (lambda p, t, g: t.update(box=t["box"]._replace(kind="tracking")), "box: 40 test images of kind 'tracking'"),
    (lambda p, t, g: t.update(box=t["box"]._replace(units=np.arange(0))), "box: 0 test images of kind 'detection'")])
def test_what_does_not_fit_is_refused(change, message):
    paradigms, truth, groups = given()
    change(paradigms, truth, groups)
    with pytest.raises(ValueError, match=message):
        compare_paradigms(paradigms, truth, groups, 0)


# ---------------------------------------------------------------- the table

def part(line, title):
    """The cell of a line below a column's title."""
    start = 0
    for name, width in multi_report.COLUMNS:
        if name == title:
            return line[start:start + width].strip()
        start += width


def test_the_table_says_what_was_found_and_fits_a_screen():
    found = compare_paradigms(*given(), 0)
    lines = table_of_paradigms(found)
    assert max(map(len, lines)) <= 120
    titles = [title for title, _ in multi_report.COLUMNS]
    assert [part(lines[0], title) for title in titles] == titles
    starts = [i for i, line in enumerate(lines) if ": mean normalised score" in line]
    assert [lines[i].split(":")[0] for i in starts] == ["Thyroid", "OB", "all tasks"]
    assert lines[starts[0]].endswith("of 2 tasks, 80 units") and lines[starts[1]].endswith("of 1 task, 9 units")
    assert [starts[1] - starts[0], starts[2] - starts[1]] == [4 + 2 * 4 + 1, 4 + 4 + 1]  # and a line between
    row = next(i for i, line in enumerate(lines) if line.startswith("  femur: regression by MRE [pixels], 9 im"))
    about = found["tasks"]["femur"]
    assert lines[row].endswith(f"units; trivial {about['trivial']['estimate']:.2f}")
    own = about["paradigms"]["clinical"]
    score, gained = own["score"], own["gain"]
    assert [part(lines[row + 2], title) for title in titles] == [
        "clinical", f"{score['estimate']:.2f} [{score['low']:.2f}, {score['high']:.2f}]", f"{own['sd']:.2f}", "worse",
        f"{gained['estimate']:+.2f} [{gained['low']:+.2f}, {gained['high']:+.2f}]", f"{gained['p (Holm)']:.4f}", "loss"]
    assert gained["low"] < gained["high"] < -1000
    thyroid = found["groups"]["Thyroid"]["paradigms"]
    mean = thyroid["task"]["normalised"]
    assert part(lines[starts[0] + 1], titles[1]) == f"{mean['estimate']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}]"
    assert all(part(lines[i + 1], titles[4]) == "" for i in (*starts, row))  # "task" is not compared with itself
    assert part(lines[starts[0] + 2], "mark") == "gain" == thyroid["clinical"]["gain"]["mark"]
    assert any(line.startswith("  a_task_with") and "…" in line and "40 images" in line for line in lines)
    assert lines[-1].startswith("Of fewer than 30 test units") and lines[-1].endswith("femur 9.")


def test_no_warning_where_units_are_many():
    paradigms, truth, groups = given()
    found = compare_paradigms({name: {"box": own["box"]} for name, own in paradigms.items()}, truth, groups, 0)
    assert list(found["tasks"]) == ["box"] and found["units"] == 40
    assert not multi_report.few_units(found) and not multi_report.nothing_compared(found)
    assert table_of_paradigms(found)[-1].split()[0] == "all" and "1 task, 40 units" in table_of_paradigms(found)[-4]


def test_methods_name_the_numbers_in_use():
    text = methods_sentences(compare_paradigms(*given(), 0))
    for words in ("over the 80 units", "50 replicates", "up to 200 flips", "never below -1",
                  "Holm's correction over all tasks of a paradigm"):
        assert words in text
    assert "  " not in text
