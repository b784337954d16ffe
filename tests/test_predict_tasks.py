"""Predictions of images alone, in the challenge's layout: what is written, its scores, who predicts which task."""

import json
import shutil

import numpy as np
import pytest
import torch
from multi_tools import (BASIC, NAMES, assert_equal, few_replicates, names_in_test, run, save_all,  # noqa: F401
                         save_tree)
from stage_tools import checkpoint, contents, one_thread, run_main, save_rows, spy  # noqa: F401
from test_predict import save_segmenter

import predict
from labelled.fmc_uia import read_tasks
from scores import challenge
from scores.challenge import score_submission
from training import many_tasks

KINDS = ("classification", "detection", "regression")  # that have a JSON file
EACH = tuple(f"multi/task-{name}-seed0.pt" for name in NAMES)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, reports) of runs per task and for all; beside fmc/ the test images: tested/ with labels, bare/ without
    labels and masks."""
    folder = save_all(tmp_path_factory.mktemp("finished"))
    _, reports = run(folder, *BASIC, "--paradigm", "task", "all")
    for name, labelled in (("tested", True), ("bare", False)):
        save_tree(folder / name, names_in_test(folder / "multi"), labelled)
    return folder, reports


def submit(folder, out, *flags, data="bare"):
    """What the command prints; the submission is in folder/out."""
    return run_main(predict, folder, "--data", data, "--output_dir", out, *flags)[0]


def score(folder, out):
    return score_submission(str(folder / out), read_tasks(str(folder / "tested")))


@pytest.mark.parametrize("paradigm, ckpt", [("all", ("multi/all-seed0.pt",)), ("task", EACH), ("task", EACH[::-1])],
                         ids=["one for all", "one per task", "in another order"])
def test_a_submission_of_images_alone_scores_as_the_run_did(finished, tmp_path, paradigm, ckpt):
    """No label or mask is there to be read; scored by the challenge's rules, it has the run's own test scores."""
    folder, reports = finished
    assert not list((folder / "bare").rglob("masks"))
    assert "point_1_xy" not in (folder / "bare/csv_files/FUGC.csv").read_text()
    output = submit(folder, tmp_path / "out", "--ckpt", *ckpt)
    found, told = score(folder, tmp_path / "out"), reports[paradigm]["scores"]
    assert_equal(json.loads(json.dumps(found)), told, rel=1e-6)
    assert set(found["missing"].values()) == {0} and found["sound"]["fetal_head"]["Dice"] > 0
    for task, own in zip(NAMES, EACH):
        assert f"{task}: {found['images'][task]} images by {ckpt[0] if len(ckpt) == 1 else own}\n" in output
    assert f"wrote {tmp_path / 'out'}: " in output


def test_the_layout(finished, tmp_path):
    folder, _ = finished
    submit(folder, tmp_path / "out", "--ckpt", "multi/all-seed0.pt", "--batch_size", 5)
    found = read_tasks(str(folder / "tested"))
    masks = {path.removeprefix("../") for path in found.rows["fetal_head"].mask_paths}
    assert {str(path.relative_to(tmp_path / "out")) for path in contents(tmp_path / "out")} == masks | {
        f"{kind}_predictions.json" for kind in KINDS}
    for task in [task for task in found.tasks if task.kind != "segmentation"]:
        name, rows = task.name, found.rows[task.name]
        records = json.loads((tmp_path / "out" / f"{task.kind}_predictions.json").read_text())
        assert [record["image_path"] for record in records] == rows.image_paths and {
            record["task_id"] for record in records} == {name}
        for record, (width, height) in zip(records, found.sizes[rows.images].tolist()):
            if name == "fetal_plane_cls":
                assert sum(record["predicted_probs"]) == pytest.approx(1)
                assert record["predicted_class"] == np.argmax(record["predicted_probs"])
                continue
            key = "bbox" if name == "thyroid_nodule" else "predicted_points"
            pixels, shares = (np.array(record[f"{key}_{unit}"]) for unit in ("pixels", "normalized"))  # of two points
            assert (0 <= shares).all() and (shares <= 1).all()
            np.testing.assert_allclose(pixels, shares * [width, height, width, height])
            assert name == "FUGC" or (pixels[:2] < pixels[2:]).all()


def test_every_image_of_the_data_is_predicted_whatever_the_batch(finished, tmp_path):
    """Train images too; how many at a time changes no more than rounding."""
    folder, _ = finished
    for size in (1, 7):
        submit(folder, tmp_path / str(size), "--ckpt", "multi/all-seed0.pt", "--batch_size", size, data="fmc")
    one, two = (score_submission(str(tmp_path / size), read_tasks(str(folder / "fmc"))) for size in ("1", "7"))
    assert one["images"] == {"FUGC": 11, "fetal_head": 48, "fetal_plane_cls": 72, "thyroid_nodule": 12}
    assert_equal(one, two, rel=1e-5)


def test_the_first_checkpoint_that_has_a_task_predicts_it(finished, tmp_path):
    folder, reports = finished
    output = submit(folder, tmp_path / "out", "--ckpt", EACH[1], "multi/all-seed0.pt")
    assert f"fetal_head: 12 images by {EACH[1]}\n" in output and "by multi/all-seed0.pt\n" in output
    found = score(folder, tmp_path / "out")
    for name in NAMES:
        told = reports["task" if name == "fetal_head" else "all"]["scores"]
        assert_equal(found["challenge"][name], told["challenge"][name], name, rel=1e-6)


def test_a_checkpoint_named_twice_predicts_once(finished, tmp_path):
    folder, reports = finished
    submit(folder, tmp_path / "out", "--ckpt", "multi/all-seed0.pt", "multi/all-seed0.pt")
    assert_equal(json.loads(json.dumps(score(folder, tmp_path / "out"))), reports["all"]["scores"], rel=1e-6)


def test_the_same_command_twice(finished, tmp_path):
    """Files are the same to the byte; one that was cut off is made good."""
    folder, _ = finished
    flags = (tmp_path / "out", "--ckpt", "multi/all-seed0.pt")
    submit(folder, *flags)
    before = contents(tmp_path / "out")
    next((tmp_path / "out").rglob("*.png")).write_bytes(b"half")
    (tmp_path / "out" / "detection_predictions.json.tmp").write_text("[")
    submit(folder, *flags)
    assert contents(tmp_path / "out") == before


def test_some_tasks_alone(finished, tmp_path):
    folder, reports = finished
    output = submit(folder, tmp_path / "out", "--ckpt", EACH[0], EACH[3], "--tasks", "FUGC", "thyroid_nodule")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"{kind}_predictions.json" for kind in KINDS}
    assert json.loads((tmp_path / "out" / "classification_predictions.json").read_text()) == []
    found = score(folder, tmp_path / "out")
    assert found["missing"]["fetal_head"] == 12 and "fetal_head" not in output
    assert_equal(found["sound"]["FUGC"], reports["task"]["scores"]["sound"]["FUGC"], rel=1e-6)


def refused(folder, tmp_path, words, *flags, **how):
    """One sentence with these words; nothing is written."""
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        submit(folder, tmp_path / "out", *flags, **how)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert contents(tmp_path) == before


def test_a_task_that_no_checkpoint_has(finished, tmp_path):
    refused(finished[0], tmp_path, ["no run of --ckpt has the task fetal_plane_cls", "they have FUGC, fetal_head",
                                    "--tasks"], "--ckpt", *EACH[:2])


def test_a_task_of_another_kind(finished, tmp_path):
    """A task is called as one of a run, but is another."""
    folder, _ = finished
    shutil.copytree(folder / "bare", tmp_path / "other")
    save_rows(tmp_path / "other/csv_files/FUGC.csv", [
        {"image_path": f"../{name}", "task_id": "FUGC", "task_name": "Regression", "num_classes": 3} for name in
        sorted(names_in_test(folder / "multi"))])
    refused(folder, tmp_path, [EACH[0], "FUGC is regression with num_classes 2 there", "regression with 3 in --data"],
            "--ckpt", *EACH, data=tmp_path / "other")


def test_a_checkpoint_that_is_no_finished_run(finished, tmp_path):
    refused(finished[0], tmp_path, ["a.pt", "no finished run of finetune_seg.py or finetune_multi.py"], "--ckpt", "a.pt")


@pytest.mark.parametrize("words, flags", [
    (["masks are made by one run of finetune_seg.py; give it alone"], ("--ckpt", EACH[0], "seg.pt")),
    (["masks are made by one run of finetune_seg.py; give it alone"], ("--ckpt", "seg.pt", "seg.pt.copy")),
    (["--tasks and --skip_wrong_rows: not of seg.pt, a run of finetune_seg.py"],
     ("--ckpt", "seg.pt", "--tasks", "FUGC", "--skip_wrong_rows")),
    (["--exclude: not of multi/all-seed0.pt, a run of finetune_multi.py"],
     ("--ckpt", "multi/all-seed0.pt", "--exclude", "*.png")),
    (["nowhere.pt: no such file"], ("--ckpt", EACH[0], "nowhere.pt")),
], ids=["two kinds", "two segmenters", "flags of many tasks", "flags of masks", "no file"])
def test_what_does_not_go_together(finished, tmp_path, words, flags):
    folder, _ = finished
    for name in ("seg.pt", "seg.pt.copy"):
        save_segmenter(folder / name)
    refused(folder, tmp_path, words, *flags)


def test_all_runs_are_opened_before_the_work(finished, tmp_path):
    """The second file has a task less than it says, or says nothing of its tasks."""
    folder, _ = finished
    saved = checkpoint(folder / EACH[1])
    torch.save({**saved, "tasks": saved["tasks"] * 2}, folder / "other.pt")
    refused(folder, tmp_path, ["other.pt"], "--ckpt", EACH[0], "other.pt")
    torch.save({key: value for key, value in saved.items() if key != "tasks"}, folder / "other.pt")
    refused(folder, tmp_path, ["other.pt: no finished run of finetune_multi.py"], "--ckpt", EACH[0], "other.pt")


def test_a_submission_needs_data(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(finished[0])
    with pytest.raises(ValueError, match="multi/all-seed0.pt needs --data"):
        predict.main(predict.get_args(["--ckpt", "multi/all-seed0.pt", "--output_dir", str(tmp_path / "out")]))


def test_a_folder_of_other_things_is_left_alone(finished, tmp_path, monkeypatch):
    folder, _ = finished
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    monkeypatch.setattr(many_tasks, "predict", None)  # told before the work
    refused(folder, tmp_path, ["holds thesis.tex, which is no part of this submission"], "--ckpt", *EACH)
    assert list(contents(tmp_path / "out")) == [tmp_path / "out" / "thesis.tex"]


def test_no_label_is_looked_at(finished, tmp_path, monkeypatch):
    """On the labelled data masks could be read: they are not."""
    folder, _ = finished
    monkeypatch.setattr(challenge, "read_task_mask", None)
    monkeypatch.setattr("labelled.fmc_uia.read_task_mask", None)
    read = []
    spy(monkeypatch, predict, "read_image", lambda path, result: read.append(path))
    submit(folder, tmp_path / "out", "--ckpt", "multi/all-seed0.pt", data="tested")
    monkeypatch.undo()
    assert len(read) == 4 + 12 + 18 + 2 and not any("masks" in path for path in read)
    assert set(score(folder, tmp_path / "out")["missing"].values()) == {0}
