"""FMC_UIA's groups and splits: no image and no group is on two sides, whatever task it serves."""
import os
import re
from collections import Counter

import numpy as np
import pytest
import scipy.sparse
from test_fmc_uia import CLS, DET, REG, boxed, images, table

from frames import lists
from labelled.fmc_uia import GROUPS_FILE, Task, read_groups, read_tasks, split_tasks
from labelled.splits import SPLITS

REAL = os.environ.get("ULTRASOUND_DATA")
TASKS = {"cls": CLS, "det": dict(DET, **boxed(0, 0, 1, 1)), "reg": dict(REG, point_1_xy="[1, 1]", point_2_xy="")}


def row(task, name, mask=0, **more):
    return dict(image_path=name, **TASKS[task], mask=mask, **more)


def read(top, rows, **how):
    """Write rows, a CSV for each task, and their images, and read them."""
    images(top, {own["image_path"] for own in rows if own["image_path"]}, (4, 4))
    for task in TASKS:
        own = [one for one in rows if one["task_id"] == task]
        if own:
            table(top / f"csv_files/{task}.csv", own)
    return read_tasks(top, **how)


def groups_of(found):
    return {os.path.basename(name): group for name, group in zip(found.names, found.groups)}


# ---------------------------------------------------------------- groups

def test_groups_that_share_an_image_are_one(tmp_path):
    """Over tasks and between column and --group_regex; the smallest name is the group's."""
    rows = [row("cls", "p1_a.png", group="k"), row("cls", "p1_b.png", group=" "), row("cls", "p2_a.png", group="m"),
            row("det", "p2_a.png", group="k"), row("det", "x.png", group="m "), row("det", "y.png", group="z"),
            row("reg", "w.png")]
    found = read(tmp_path / "a", rows)
    assert groups_of(found) == {"p1_a.png": "k", "p1_b.png": "csv_files/p1_b.png", "p2_a.png": "k", "x.png": "k",
                                "y.png": "z", "w.png": "csv_files/w.png"}
    assert found.grouped_by == "group column, 4 of 6 images; the others are each their own"
    found = read(tmp_path / "b", rows, group_regex=r"(p\d)_")
    assert groups_of(found) == {"p1_a.png": "k", "p1_b.png": "k", "p2_a.png": "k", "x.png": "k", "y.png": "z",
                                "w.png": "csv_files/w.png"}
    assert found.grouped_by == (r"group column and --group_regex (p\d)_, 5 of 6 images; the others are each their own")
    assert lists.groups_have_names(found.grouped_by)
    found = read(tmp_path / "c", [row("cls", "d1\\a.png"), row("cls", "d1/b.png"), row("det", "d2/q7.png")],
                 group_regex=r"(d1)/|/(q\d)")  # whichever captures
    assert found.groups == ["d1", "d1", "q7"] and found.grouped_by == r"--group_regex (d1)/|/(q\d)"


def test_a_wrong_row_still_says_whose_its_image_is(tmp_path):
    rows = [row("cls", "1.png", group="a"), row("cls", "2.png", group="b"), row("det", "1.png", group="b"),
            row("det", "3.png")]
    rows[2]["x_max"] = 0
    found = read(tmp_path, rows, skip_wrong_rows=True)
    assert len(found.wrong) == 1 and groups_of(found) == {"1.png": "a", "2.png": "a", "3.png": "csv_files/3.png"}


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_the_connected_components(tmp_path, seed):
    rng = np.random.default_rng(seed)
    pairs = np.unique(np.stack([rng.integers(0, 40, 55), rng.integers(0, 3, 55), rng.integers(0, 30, 55)], 1), axis=0)
    pairs = pairs[np.unique(pairs[:, :2], axis=0, return_index=True)[1]]  # an image once in each task
    found = read(tmp_path, [row([*TASKS][task], f"{image}.png", group=f"g{group:02}") for image, task, group in pairs])
    edges = scipy.sparse.coo_array((np.ones(len(pairs)), (pairs[:, 0], 40 + pairs[:, 2])), shape=(70, 70))
    component = scipy.sparse.csgraph.connected_components(edges, directed=False)[1]
    expected = {f"{image}.png": min(f"g{group:02}" for group in range(30) if component[40 + group] == component[image])
                for image in pairs[:, 0]}
    assert groups_of(found) == expected and found.grouped_by == "group column"


@pytest.mark.parametrize("pattern, sentence", [
    ("p(", "--group_regex 'p(': missing ), unterminated"), ("p\\d", "its first (capture) is the group, but it"), ("(q)",
     "captures nothing in any image_path, as in 'p1.png'"), ("p()1", "captures nothing")])
def test_patterns_that_group_nothing_are_refused(tmp_path, pattern, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(tmp_path, [row("cls", "p1.png"), row("cls", "p2.png")], group_regex=pattern)


# ---------------------------------------------------------------- splits

def shared_rows(rng):
    """120 images of 60 patients in 1 to 3 tasks each; a patient's two images have nothing in common but the name."""
    rows = []
    for k in range(120):
        for task in rng.permutation([*TASKS])[:rng.integers(1, 4)]:
            rows.append(row(task, f"p{k // 2}_{k}.png", k % 3))
    return rows


def test_no_image_and_no_group_is_on_two_sides(tmp_path):
    found = read(tmp_path, shared_rows(np.random.default_rng(0)), group_regex=r"(p\d+)_")
    drawn = set()
    for seed in range(30):
        splits, notes = split_tasks(found, seed, 0.2, 0.25)
        assert len(splits) == len(found.paths) and not notes
        drawn.add(tuple(splits))
        sides = {}
        for group, split in zip(found.groups, splits):
            sides.setdefault(group, set()).add(split)
        assert len(sides) == 60 and all(len(own) == 1 for own in sides.values())
        for task in found.tasks:
            images = found.rows[task.name].images
            groups = {split: len({found.groups[i] for i in images if splits[i] == split}) for split in SPLITS}
            n = sum(groups.values())
            assert abs(groups["val"] - 0.2 * n) <= n / 10 and abs(groups["test"] - 0.25 * n) <= n / 10, (seed, groups)
    assert len(drawn) == 30 and splits == split_tasks(found, seed, 0.2, 0.25)[0]


def test_splits_depend_on_names_only(tmp_path):
    """Not on where the folder is, nor on the order of rows."""
    rows = shared_rows(np.random.default_rng(1))
    first, second = read(tmp_path / "a", rows), read(tmp_path / "b/c d", rows[::-1])
    assert first.names == second.names and first.groups == first.names
    assert split_tasks(first, 3, 0.2, 0.2) == split_tasks(second, 3, 0.2, 0.2)


def test_splits_of_the_csvs(tmp_path):
    words = ["train", "Training", "val", "test"]
    rows = [row(task, f"{k}.png", split=word) for task in ("cls", "det") for k, word in enumerate(words)]
    found = read(tmp_path, rows)
    assert found.splits == split_tasks(found, 0, 0.2, 0.2)[0] == ["train", "train", "val", "test"]
    rows = [row("cls", f"{k}.png", group=k // 2, split="test" if k < 4 else "train") for k in range(40)]
    found = read(tmp_path / "drawn", rows)
    for seed in range(10):
        splits, _ = split_tasks(found, seed, 0.25, 0.2)
        assert [split == "test" for split in splits] == [split == "test" for split in found.splits]
        assert splits.count("val") in (8, 10)  # of 18 groups 4.5, whole ones
        assert len({*zip(found.groups, splits)}) == 20
    assert read(tmp_path / "drawn", rows, labelled=False).splits is None


def test_splits_that_share_an_image_or_a_group_are_refused(tmp_path):
    rows = [row("cls", "1.png", split="train"), row("det", "1.png", split="test")]
    with pytest.raises(ValueError) as error:
        read(tmp_path / "a", rows)
    one = tmp_path / "a/csv_files/1.png"
    assert str(error.value) == (f"cls.csv, line 2 puts {one} into train, and det.csv, line 2 {one} into test: an image "
                                f"or a group, here 'csv_files/1.png', must not be in two")
    rows = [row("cls", "1.png", group="g", split="val"), row("det", "2.png", group="g", split="test")]
    with pytest.raises(ValueError, match=r"1.png into val, and det.csv, line 2 .*2.png into test: .* here 'g', must"):
        read(tmp_path / "b", rows)
    images(tmp_path / "c", ["1.png", "2.png"])
    table(tmp_path / "c/csv_files/cls.csv", [row("cls", "1.png", split="train")])
    table(tmp_path / "c/csv_files/det.csv", [row("det", "2.png")])
    with pytest.raises(ValueError, match="one of cls.csv, line 2 and det.csv, line 2 has a split, one has none; fill"):
        read_tasks(tmp_path / "c")
    with pytest.raises(ValueError, match="the splits name train but no test images"):
        split_tasks(read(tmp_path / "d", [row("cls", f"{k}.png", split="train") for k in range(9)]), 0, 0.2, 0.2)


def test_what_cannot_be_learned_or_tested_is_told(tmp_path):
    many = [row("cls", f"{k}.png", k % 2) for k in range(20)]
    found = read(tmp_path / "a", many)
    assert split_tasks(found, 0, 0.2, 0.2)[1] == [f"class 2 of cls has no {split} image" for split in SPLITS]
    found = read(tmp_path / "b", many + [row("cls", f"z{k}.png", 2) for k in range(2)])
    splits, notes = split_tasks(found, 0, 0.2, 0.2)
    assert {splits[-2], splits[-1]} == {"train", "test"} and notes == ["class 2 of cls has no val image"]
    kept = found._replace(names=[*found.names, "unused"], groups=[*found.groups, "unused"])
    assert split_tasks(kept, 0, 0.2, 0.2) == ([*splits, None], notes)
    found = read(tmp_path / "c", many + [row("det", f"z{k}.png") for k in range(2)])
    with pytest.raises(ValueError, match=r"task det has no val image: its groups, 2 by image \(each image is its own "
                                         "group\\), do not fill train, val and test; give it more, or leave the task"):
        split_tasks(found, 0, 0.2, 0.2)
    rows = [row("cls", f"{k}.png", k % 3, split=split) for k, split in enumerate(["train", "train", "val", "test"])]
    with pytest.raises(ValueError, match="class 2 of cls has no train image, so that it cannot be learned; give train"):
        split_tasks(read(tmp_path / "d", rows), 0, 0.2, 0.2)
    for val, test in ((0, 0.2), (0.5, 0.5)):
        with pytest.raises(ValueError, match="shares of val and test"):
            split_tasks(found, 0, val, test)


# ---------------------------------------------------------------- clinical groups

def test_clinical_groups_of_the_27_tasks():
    with open(GROUPS_FILE) as file:
        names = [line.split(",")[0] for line in file][1:]
    groups = read_groups(GROUPS_FILE, [Task(name, "classification", 2) for name in names])
    assert Counter(groups.values()) == {"OB": 12, "Breast": 3, "Lung": 3, "Thyroid": 2, "Gyn": 2, "Cardiovascular": 2,
                                        "Other": 3}
    assert read_groups(GROUPS_FILE, [Task("FUGC", "regression", 2), Task("lung", "segmentation", 2)]) == {
        "FUGC": "OB", "lung": "Lung"}


@pytest.mark.parametrize("text, sentence", [
    ("task,group\nlung,Lung\n", "g.csv: has no group of my task, other; add a line TASK,GROUP, as my task,Other"),
    ("task,group\nmy task,A\nlung,A\n my task,B\n", "g.csv, line 4:  my task is listed twice; remove one of them"),
    ("task,group\nmy task,A\nother,\n", "g.csv, line 3: no group in"),
    ("task,clinic\nmy task,A\n", "columns are task,clinic; expected task,group"), ("", "columns are none")])
def test_groups_without_a_task_or_with_two(tmp_path, text, sentence):
    (tmp_path / "g.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_groups(str(tmp_path / "g.csv"), [Task("my task", "detection", 1), Task("other", "detection", 1)])
    (tmp_path / "g.csv").write_text("group,task\nA b , my task\nB,other\nC,unused\n")
    assert read_groups(str(tmp_path / "g.csv"), [Task("other", "detection", 1), Task("my task", "detection", 1)]) == {
        "other": "B", "my task": "A b"}
    assert read_groups(str(tmp_path / "g.csv"), [Task("new", "detection", 1)], "none") == {"new": "none"}
    with pytest.raises(ValueError, match="none.csv: no such file; expected a CSV task,group"):
        read_groups(str(tmp_path / "none.csv"), [])


# ---------------------------------------------------------------- real data

@pytest.mark.skipif(not REAL, reason="set ULTRASOUND_DATA to a folder with fmc_uia/")
def test_real_tasks():
    found = read_tasks(os.path.join(REAL, "fmc_uia"), group_regex=r"(\d+)_\d*HC")
    assert {task: len(found.rows[task.name].images) for task in found.tasks} == {
        Task("breast_3cls", "classification", 3): 613, Task("breast_lesion", "segmentation", 2): 507,
        Task("breast_lesion_det", "detection", 1): 507, Task("fetal_head", "segmentation", 2): 816,
        Task("fetal_head_ofd", "regression", 2): 816}
    assert found.grouped_by == r"--group_regex (\d+)_\d*HC, 816 of 1,429 images; the others are each their own"
    assert len(found.paths) == 1429 and not found.wrong and found.splits is None
    heads = {}
    for name, group in zip(found.names, found.groups):
        number = re.match(r"(\d+)_\d*HC", os.path.basename(name))
        assert group == (number[1] if number else name)
        heads.setdefault(group, []).append(name)
    assert sum(len(own) > 1 for own in heads.values()) > 5  # examinations of several images
    for seed in range(3):
        splits, notes = split_tasks(found, seed, 0.2, 0.2)
        assert not notes and len({*zip(found.groups, splits)}) == len(heads)
