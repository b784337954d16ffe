"""A submission to the challenge written, read and scored: the truth is perfect, and what is wrong is told."""

import json
import math
import os

import numpy as np
import pytest
from PIL import Image
from stage_tools import run_tool

from labelled.fmc_uia import Task, read_task_mask, read_tasks
from scores import challenge
from scores.challenge import mask_place, records_of
from tools import score_submission

RNG = np.random.default_rng(0)
CLS, DET, REG = Task("cls", "classification", 3), Task("det", "detection", 1), Task("reg", "regression", 2)
SIZES = [(40, 30), (25, 50), (64, 20), (30, 30)]  # width, height


def write_tree(top):
    """The challenge's folders with tasks of all kinds, images of different sizes, names of all sorts -> their root."""
    names = ["a b, (1).png", "uterine\u00a0fibroid/x.png", "img/é '2'.jpg", "deep/IMG/3.bmp"]
    for i, name in enumerate(names):
        image = top / "Detection/One" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, SIZES[i][::-1], np.uint8)).save(image)
    lines = {name: ["image_path,task_id,task_name,num_classes," + columns] for name, columns in {
        "seg": "mask_path", "cls": "mask", "det": "x_min,y_min,x_max,y_max", "reg": "point_1_xy,point_2_xy"}.items()}
    for i, name in enumerate(names):
        width, height = SIZES[i]
        mask = np.zeros((height, width), np.uint8)
        mask[3:12, 4:15], mask[12:18, 5:9] = 1, 2 if i else 0
        place = f"Segmentation/Three/a\u00a0set, 2/{i}." + ("jpg" if i == 1 else "png")
        (top / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(top / place, "PNG")
        row = f'"../Detection/One/{name}",'
        lines["seg"].append(row + f'seg,segmentation,3,"../{place}"')
        lines["cls"].append(row + f"cls,classification,3,{i % 3}")
        lines["det"].append(row + f"det,detection,1,{i},2,{width - 5.5},{height}")
        lines["reg"].append(row + f'reg,Regression,2,"[{i}, 2.5]","[{width}, {height - 1}]"')
    (top / "csv_files").mkdir()
    for name, own in lines.items():
        (top / "csv_files" / f"{name}.csv").write_text("\n".join(own) + "\n", encoding="utf-8")
    return str(top)


def write_truth(out, found, tasks=("seg", "cls", "det", "reg")):
    """The truth of some tasks as a submission."""
    records = {kind: [] for kind in challenge.JSON_FILES}
    for task in found.tasks:
        rows = found.rows[task.name]
        if task.name not in tasks:
            continue
        if task.kind == "segmentation":
            for mask_path, image_path, target in zip(rows.mask_paths, rows.image_paths, rows.targets):
                challenge.write_submission_mask(out, mask_path, image_path, read_task_mask(target, task.K))
        else:
            truth = np.eye(task.K)[rows.targets] if task.kind == "classification" else rows.targets
            records[task.kind] += records_of(task, rows.image_paths, found.sizes[rows.images], truth)
    for kind, own in records.items():
        challenge.write_submission_json(out, kind, own)


@pytest.fixture
def found(tmp_path):
    return read_tasks(write_tree(tmp_path / "the data"))


PERFECT = {"seg": {"DSC": 1, "HD": 0}, "det": {"IoU": 1}, "reg": {"MRE": 0},
           "cls": {"Acc": 1, "AUC": 1, "F1_macro": 1, "F1_weighted": 1, "MCC": 1}}


def test_the_truth_is_a_perfect_submission(tmp_path, found):
    out = str(tmp_path / "a submission")
    write_truth(out, found)
    places = challenge.mask_places(found)["seg"]
    challenge.check_submission_folder(out, places)
    assert sorted(os.listdir(out)) == ["Segmentation", *sorted(challenge.JSON_FILES.values())]
    assert places[1] == "Segmentation/Three/a\u00a0set, 2/1.jpg"
    with Image.open(os.path.join(out, places[1])) as image:
        assert (image.format, image.mode) == ("PNG", "L")
    scores = challenge.score_submission(out, found)
    assert scores["challenge"] == PERFECT and scores["missing"] == dict.fromkeys(PERFECT, 0)
    assert scores["images"] == dict.fromkeys(PERFECT, 4)
    assert scores["sound"] == {"seg": {"Dice": 1, "HD95": 0}, "det": {"IoU": 1}, "reg": {"MRE": 0, "MRE / diagonal": 0},
                               "cls": dict.fromkeys(challenge.SOUND["classification"], 1)}
    assert scores["leaderboard"] == {name: value for own in PERFECT.values() for name, value in own.items()}
    records = json.loads((tmp_path / "a submission/detection_predictions.json").read_text(encoding="utf-8"))
    assert records[0] == {"image_path": found.rows["det"].image_paths[0], "task_id": "det",
                          "bbox_normalized": [0, 2 / 30, 34.5 / 40, 1], "bbox_pixels": [0, 2, 34.5, 30]}
    assert "uterine\u00a0fibroid" in (tmp_path / "a submission/detection_predictions.json").read_text(encoding="utf-8")
    records = json.loads((tmp_path / "a submission/regression_predictions.json").read_text(encoding="utf-8"))
    assert records[1]["predicted_points_pixels"] == [1, 2.5, 25, 49]
    assert records[1]["predicted_points_normalized"] == [1 / 25, 2.5 / 50, 1, 49 / 50]


def test_what_is_missing_is_skipped_by_the_one_and_counted_by_the_other(tmp_path, found):
    out = tmp_path / "out"
    write_truth(str(out), found, ("seg", "det", "cls"))
    (out / challenge.mask_places(found)["seg"][1]).unlink()
    (out / challenge.JSON_FILES["regression"]).unlink()
    for kind in ("detection", "classification"):
        path = out / challenge.JSON_FILES[kind]
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))[:-1]))
    scores = challenge.score_submission(str(out), found)
    assert scores["missing"] == {"seg": 1, "cls": 1, "det": 1, "reg": 4}
    assert scores["challenge"] == {**PERFECT, "reg": {"MRE": 0}} and "MRE" not in scores["leaderboard"]
    diagonals = [math.hypot(*size) for size in SIZES]
    assert scores["sound"]["seg"] == pytest.approx({  # class 1 in four masks, class 2 in three
        "Dice": (3 / 4 + 2 / 3) / 2, "HD95": (diagonals[1] / 4 + diagonals[1] / 3) / 2})
    assert scores["sound"]["det"] == {"IoU": 0.75} and scores["sound"]["cls"]["balanced accuracy"] == (0.5 + 1 + 1) / 3
    assert scores["sound"]["reg"] == pytest.approx({"MRE": np.mean(diagonals), "MRE / diagonal": 1})
    assert all(len(line) <= 120 for line in challenge.table(scores, found.tasks))
    with pytest.raises(ValueError, match="no prediction for any row"):
        challenge.score_submission(str(tmp_path / "the data/csv_files"), found)


def test_probabilities_may_be_left_out(tmp_path, found):
    records = [{"image_path": path, "task_id": "cls", "predicted_class": int(label)}
               for path, label in zip(found.rows["cls"].image_paths, found.rows["cls"].targets)]
    challenge.write_submission_json(str(tmp_path / "out"), "classification", records)
    scores = challenge.score_submission(str(tmp_path / "out"), found)
    assert scores["challenge"]["cls"] == {**PERFECT["cls"], "AUC": 0} and scores["sound"]["cls"]["macro AUROC"] is None
    assert json.dumps(scores, allow_nan=False)
    assert any(line.startswith("cls") and line.endswith(" -") for line in challenge.table(scores, found.tasks))


@pytest.mark.parametrize("mask_path, image_path, place", [
    ("../Segmentation/Two/a b.png", "x.png", "Segmentation/Two/a b.png"),
    ("../../Segmentation/../Two/a.jpg", "x.png", "Segmentation/Two/a.jpg"),
    ("..\\Segmentation\\a.png", "x.png", "Segmentation/a.png"),
    (None, "../Two/img/3.png", "Two/mask/3.png"), (None, "../IMG/3.bmp", "MASK/3.bmp"),
    ("a/../../", "x.png", "a"), (None, "../Two/a.b/3.jpg", "Two/a.b/3_mask.jpg"), ("", "3", "3_mask")])
def test_where_a_mask_goes(mask_path, image_path, place):
    assert mask_place(mask_path, image_path) == place


@pytest.mark.parametrize("mask_path", ["/etc/x.png", "....//x.png", "a/..", "..", ".", "./.", "../"])
def test_no_mask_leaves_the_submission(tmp_path, mask_path):
    with pytest.raises(ValueError, match="outside the submission"):
        challenge.write_submission_mask(str(tmp_path / "out"), mask_path, "x.png", np.zeros((2, 2), np.uint8))
    assert os.listdir(tmp_path) == []


def test_two_masks_at_one_place(found):
    rows = found.rows["seg"]

    def with_places(*places):
        return found._replace(rows={**found.rows, "seg": rows._replace(mask_paths=list(places))})

    with pytest.raises(ValueError, match=r"seg.csv, line 5: its mask would be a/x.png, as that of seg.csv, line 3"):
        challenge.mask_places(with_places("b.png", "../a/x.png", "c.png", "a/./x.png"))
    with pytest.raises(ValueError, match="the submission's own file"):
        challenge.mask_places(with_places("../detection_predictions.json", "a", "b", "c"))
    derived = challenge.mask_places(with_places(None, None, None, None))["seg"]  # from the names of the images
    assert derived == ["Detection/One/a b, (1)_mask.png", "Detection/One/uterine\u00a0fibroid/x_mask.png",
                       "Detection/One/mask/é '2'.jpg", "Detection/One/deep/MASK/3.bmp"]
    other = Task("seg 2", "segmentation", 3)
    with pytest.raises(ValueError, match="seg.csv, line 2"):
        challenge.mask_places(found._replace(tasks=[*found.tasks, other], rows={**found.rows, "seg 2": rows}))


def test_a_folder_of_anything_else_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    challenge.check_submission_folder(str(out))
    (out / "Segmentation").mkdir(parents=True)
    for name in ("regression_predictions.json", "Segmentation/a.png", "Segmentation/b.png.tmp"):  # of a killed run
        (out / name).touch()
    challenge.check_submission_folder(str(out), ["Segmentation/a.png", "Segmentation/b.png"])
    for places, name in (((), "Segmentation/a.png"), (["Segmentation/b.png"], "Segmentation/a.png")):
        with pytest.raises(ValueError, match=f"holds {name}, which is no part"):
            challenge.check_submission_folder(str(out), places)
    (out / "notes.txt").touch()
    with pytest.raises(ValueError, match="holds notes.txt"):
        challenge.check_submission_folder(str(out), ["Segmentation/a.png", "Segmentation/b.png"])
    with pytest.raises(ValueError, match="is a file"):
        challenge.check_submission_folder(str(out / "notes.txt"))


@pytest.mark.parametrize("write", [
    lambda out: challenge.write_submission_mask(out, "a.png", "", np.ones((3, 4), np.uint8)),
    lambda out: challenge.write_submission_json(out, "detection", [{"image_path": "x"}])], ids=["mask", "json"])
def test_files_appear_whole_or_not_at_all(tmp_path, monkeypatch, write):
    write(str(tmp_path))
    (name,) = os.listdir(tmp_path)
    before = (tmp_path / name).read_bytes()
    assert before and not name.endswith(".tmp")

    def fail(source, target):
        assert os.path.getsize(source) == len(before)
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "replace", fail)
    (tmp_path / name).write_bytes(b"earlier")
    with pytest.raises(OSError, match="disk is full"):
        write(str(tmp_path))
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_bytes() == b"earlier"


def test_names_that_are_not_utf8_come_back(tmp_path):
    name = os.fsdecode(b"../caf\xe9.png")
    challenge.write_submission_json(str(tmp_path), "detection", records_of(DET, [name], [[9, 9]], [[1, 2, 3, 4]]))
    assert b"caf\xe9.png" in (tmp_path / "detection_predictions.json").read_bytes()
    assert list(challenge.read_records(str(tmp_path), "detection")) == [("det", name)]


@pytest.mark.parametrize("task, predictions, words", [
    (CLS, [[0.5, 0.5]], "(1, 2)"), (CLS, [[3, -2, 0]], "softmax"), (CLS, [[0.2, 0.2, 0.2]], "softmax"),
    (CLS, [[np.nan, 0, 1]], "finite"), (DET, [[0, 0, 1]], "(1, 3)"), (DET, [[0, 0, 1, np.inf]], "finite"),
    (REG, [[[1, 2]]], "(1, 1, 2)"), (REG, [[[1, 2], [3, 4]]] * 2, "for 1 images")])
def test_predictions_that_no_record_can_be_made_of(task, predictions, words):
    with pytest.raises(ValueError) as error:
        records_of(task, ["x.png"], [[8, 8]], predictions)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_written_probabilities_add_up():
    """The challenge gives an AUC of 0 to rows of three classes that add up to 0.9999."""
    (record,) = records_of(CLS, ["x.png"], [[8, 8]], np.array([[0.2, 0.7, 0.0999]]))
    assert sum(record["predicted_probs"]) == pytest.approx(1, abs=1e-12) and record["predicted_class"] == 1


# ---------------------------------------------------------------- other people's submissions

def test_a_mask_of_another_size_is_resized_by_nearest_neighbour(tmp_path, found):
    out = str(tmp_path / "out")
    for (height, width), shape in (((7, 5), (20, 33)), ((40, 64), (13, 30)), ((9, 9), (9, 9)), ((1, 1), (4, 3))):
        small = RNG.integers(0, 3, (height, width), np.uint8)
        challenge.write_submission_mask(out, "a.png", "", small)
        expected = [[small[min(int(y * (1 / (shape[0] / height))), height - 1),
                           min(int(x * (1 / (shape[1] / width))), width - 1)] for x in range(shape[1])]
                    for y in range(shape[0])]
        np.testing.assert_array_equal(challenge.read_submission_mask(os.path.join(out, "a.png"), shape, 3), expected)
    write_truth(out, found)
    rows = found.rows["seg"]
    half = read_task_mask(rows.targets[0], 3)
    challenge.write_submission_mask(out, rows.mask_paths[0], "", half[::2, ::2])
    expected = challenge.mask_values(half, half[::2, ::2].repeat(2, 0).repeat(2, 1), 3)
    os.remove(os.path.join(out, "a.png"))
    scores = challenge.score_submission(out, found)["challenge"]["seg"]
    assert scores == pytest.approx({name: ((expected[name] + 3 * PERFECT["seg"][name]) / 4).mean() for name in scores})


def test_masks_are_read_as_grey_levels(tmp_path):
    mask, path = RNG.integers(0, 3, (6, 7), np.uint8), str(tmp_path / "a.png")
    for image in (Image.fromarray(mask), Image.fromarray(np.stack([mask] * 3, 2))):
        image.save(path)
        np.testing.assert_array_equal(challenge.read_submission_mask(path, mask.shape, 3), mask)
    for image, words in ((Image.fromarray(mask * 127), "holds a pixel of 254"), (Image.fromarray(mask > 0), "of 255"),
                         (Image.fromarray(mask.astype(np.uint16)), "pixels of mode I;16")):
        image.save(path)
        with pytest.raises(ValueError, match=words):
            challenge.read_submission_mask(path, mask.shape, 3)
    palette = Image.fromarray(mask)
    palette.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0])  # the challenge sees the greys of red and of green
    palette.save(path)
    with pytest.raises(ValueError, match="class numbers 0 to 2"):
        challenge.read_submission_mask(path, mask.shape, 3)
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="a.png: cannot be read as an image"):
        challenge.read_submission_mask(path, mask.shape, 3)


OWN = {"task_id": "cls", "image_path": "../Detection/One/a b, (1).png"}


@pytest.mark.parametrize("kind, text, words", [
    ("classification", "{", ["is not JSON"]), ("classification", "{}", ["record 0", "list of objects"]),
    ("classification", "[" * 100_000, ["is not JSON"]),
    ("detection", '[{"task_id": "det"}]', ["record 0", "image_path and bbox_pixels"]),
    ("classification", json.dumps([{**OWN, "predicted_class": 0}] * 2), ["record 1: a second prediction"]),
    ("classification", json.dumps([{**OWN, "predicted_class": 3}]), ["predicted_class is 3, expected 0 to 2"]),
    ("classification", json.dumps([{**OWN, "predicted_class": [0]}]), ["predicted_class is [0]"]),
    ("classification", json.dumps([OWN]), ["predicted_class is None"]),
    ("classification", json.dumps([{**OWN, "predicted_class": 0, "predicted_probs": [1, 0]}]), ["not 3 numbers"]),
    ("classification", json.dumps([{**OWN, "predicted_class": 0, "predicted_probs": "100"}]), ["not 3 numbers"]),
    ("detection", json.dumps([{**OWN, "task_id": "det"}]), ["bbox_pixels is not 4 numbers"]),
    ("detection", json.dumps([{**OWN, "task_id": "det", "bbox_pixels": [0, 0, 1, math.nan]}]), ["not 4 numbers"]),
    ("regression", json.dumps([{**OWN, "task_id": "reg", "predicted_points_pixels": [1, 2, 3, 10 ** 400]}]),
     ["predicted_points_pixels is not 4 numbers"]),
    ("regression", json.dumps([{**OWN, "task_id": "reg", "predicted_points_pixels": [[1, 2], [3, 4]]}]),
     ["of ../Detection/One/a b, (1).png for reg", "not 4 numbers"]),
], ids=range(14))
def test_records_that_do_not_fit(tmp_path, found, kind, text, words):
    out = tmp_path / "out"
    out.mkdir()
    (out / challenge.JSON_FILES[kind]).write_text(text)
    with pytest.raises(ValueError) as error:
        challenge.score_submission(str(out), found)
    assert str(error.value).startswith(str(out / challenge.JSON_FILES[kind])) and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_script_scores_a_folder(tmp_path, found, monkeypatch, capsys):
    out, data = str(tmp_path / "out"), str(tmp_path / "the data")
    write_truth(out, found, ("seg", "cls"))
    monkeypatch.chdir(tmp_path)
    score_submission.main(score_submission.get_args([out, "--json", "scores.json", "--data", data]))
    words = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["seg", "4", "0", "1.0000", "0.00", "|", "1.0000", "0.00"] in words
    assert ["det", "4", "4", "-", "|", "0.0000"] in words and ["leaderboard", "1.0000", "0.00"] in words
    written = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert written["leaderboard"] == {**PERFECT["seg"], **PERFECT["cls"]} and written["missing"]["reg"] == 4
    assert {key: written[key] for key in ("challenge", "sound")} == {
        key: challenge.score_submission(out, found)[key] for key in ("challenge", "sound")}
    done = run_tool("score_submission", tmp_path, "nowhere", "--data", data)
    assert done.returncode == 2 and done.stderr.startswith("score_submission.py: error: nowhere: no such folder")
