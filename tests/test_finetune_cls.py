"""The comparison end to end on small networks: what is chosen by what, resuming, each kind of row, each output."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.distributed as dist
from cls_tools import CLASSES, QUICK, read_rows, run, save_predictions, save_set
from file_tools import load_grey
from PIL import Image
from stage_tools import one_thread  # noqa: F401
from stage_tools import (CONFIG, SPLITS, StopAfter, assert_a_signal_is_heeded, assert_files_hold_no_names,
                         assert_latex_is_whole, assert_same_run, assert_same_table, checkpoint, command, moved,
                         report_of, save_backbone, save_rows, spy)

import finetune_cls
import runtime
from frames.leakage import content_hash
from networks import baselines
from scores.metrics import CLASSIFICATION_SCORES
from training import classifier


@pytest.fixture
def folder(tmp_path):
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    return tmp_path


# ---------------------------------------------------------------- one run

@pytest.mark.parametrize("f1, best", [((0.1, 0.9, 0.3), 2), ((0.5, 0.5, 0.4), 1), ((0.1, 0.2, 0.3), 3)])
def test_best_epoch_is_the_first_maximum_of_validation(folder, monkeypatch, f1, best):
    """Its weights are tested and saved, whatever came later."""
    values, states, tested = iter(f1), [], []
    monkeypatch.setattr(finetune_cls, "validation_f1", lambda *_: next(values))

    def note(network, canvases, *_, result):
        states.append(runtime.cpu_copy(network.state_dict()))
        tested.append(result)

    spy(monkeypatch, classifier, "predict", note)
    _, report = run(folder, "--data", "set.csv", "--ckpt", "a.pt", *QUICK, "--epochs", 3)
    assert report["chosen"] == {"a": [{"validation macro F1": f1[best - 1], "epoch": best}]}
    assert len(states) == 4 and len(tested[3]) == 18  # three times validation, once test
    saved = checkpoint(folder / "cls" / "a-seed0.pt")
    for key, value in states[3].items():
        assert torch.equal(value, states[best - 1][key])
    assert all(torch.equal(value, states[best - 1][key]) for key, value in saved["teacher"].items())
    assert not torch.equal(states[0]["head.linear.weight"], states[1]["head.linear.weight"])
    assert torch.equal(saved["scores"], tested[3]) and saved["classes"] == list(CLASSES)


def test_statistics_are_each_files_own_in_training_validation_and_test(folder, monkeypatch):
    save_backbone(folder / "b.pt", mean=0.6, std=0.1)
    used = []
    for name in ("augment", "normalise_only"):
        spy(monkeypatch, classifier, name, lambda images, *stats, result: used.append((len(images), stats[-2:])))
    run(folder, "--data", "set.csv", "--ckpt", "a.pt", "b.pt", "none", *QUICK)
    per_run = 2 * (3 + 1) + 1  # epochs of three steps and a validation, a test
    assert len(used) == 3 * per_run and [n for n, _ in used[:per_run]] == [10, 10, 10, 12, 10, 10, 10, 12, 18]
    for first, stats in ((0, (0.3, 0.2)), (per_run, (0.6, 0.1)), (2 * per_run, (0.3, 0.2))):  # none: as the first file
        assert {own for _, own in used[first:first + per_run]} == {stats}


def fine_tune(folder, path, received, *flags):
    """finetune_cls.fine_tune alone, as main() calls it."""
    args = finetune_cls.get_args(["--data", str(folder / "set.csv"), *map(str, (*QUICK, *flags))])
    args.dtype = "float32"
    backbone, info = baselines.open_backbone(str(folder / "a.pt"), None, args.arch, 0, args.drop_path_rate)
    data, _ = finetune_cls.open_data(args)
    return finetune_cls.fine_tune(backbone, info, data, args, 0, str(path), torch.device("cpu"), 0, 1, received)


@pytest.mark.parametrize("stops", [(1,), (2, 1, 3), (3,), (4,), (5,), (6,)], ids=str)  # of 6 steps, 3 an epoch
def test_a_stopped_and_resumed_run_is_bit_equal(folder, stops, capsys):
    flags = ("--drop_path_rate", 0.3, "--save_every", 1)
    whole, best = fine_tune(folder, folder / "whole.pt", [], *flags)
    for steps in stops:
        assert fine_tune(folder, folder / "cut.pt", StopAfter(steps), *flags) is None
    resumed, resumed_best = fine_tune(folder, folder / "cut.pt", [], *flags)
    assert np.array_equal(whole, resumed) and best == resumed_best
    assert f"resuming {folder}/cut.pt at step {sum(stops)}" in capsys.readouterr().out
    log = assert_same_run(folder / "whole", folder / "cut")
    assert [record["epoch"] for record in log] == [1, 2]


def test_an_unfinished_file_of_earlier_code_goes_on(folder):
    """It calls the sum of losses `total`, a number."""
    whole, best = fine_tune(folder, folder / "whole.pt", [], "--save_every", 1)
    assert fine_tune(folder, folder / "cut.pt", StopAfter(4), "--save_every", 1) is None
    saved = checkpoint(folder / "cut.pt")
    saved["total"], = saved.pop("losses")
    runtime.save_checkpoint(folder / "cut.pt", saved)
    resumed, resumed_best = fine_tune(folder, folder / "cut.pt", [], "--save_every", 1)
    assert np.array_equal(whole, resumed) and best == resumed_best and saved["total"] > 0
    assert_same_run(folder / "whole", folder / "cut")


def test_a_signal_ends_the_command_and_the_same_command_goes_on(folder):
    assert_a_signal_is_heeded(finetune_cls, folder, "--data", "set.csv", "--ckpt", "a.pt", *QUICK)


def test_a_finished_run_is_not_trained_again(folder, monkeypatch):
    flags = ("--data", "set.csv", "--ckpt", "a.pt", "none", *QUICK)
    first = run(folder, *flags)
    monkeypatch.setattr(classifier, "train_step", None)  # cannot be called
    assert_same_table(first, run(folder, *flags))


def test_other_settings_are_another_run(folder):
    flags = ("--data", "set.csv", "--ckpt", "a.pt", *QUICK)
    first = load_after(folder, *flags)
    second = load_after(folder, *flags, "--lr", "1e-2")
    assert not torch.equal(first["scores"], second["scores"])
    assert torch.equal(checkpoint(folder / "cls" / "a-seed0.old-1.pt")["scores"], first["scores"])
    assert (folder / "cls" / "a-seed0.old-1.jsonl").exists()


def load_after(folder, *flags):
    output, _ = run(folder, *flags)
    assert ("(other lr)" in output) == ("1e-2" in flags)
    return checkpoint(folder / "cls" / "a-seed0.pt")


def test_none_is_another_run_where_the_first_file_is_another(folder):
    """It has no digest of its own, but the network and the statistics of that file."""
    save_backbone(folder / "b.pt", mean=0.6, std=0.1)
    run(folder, "--data", "set.csv", "--ckpt", "a.pt", "none", *QUICK)
    first = checkpoint(folder / "cls" / "from_scratch-seed0.pt")
    output, _ = run(folder, "--data", "set.csv", "--ckpt", "b.pt", "none", *QUICK)
    second = checkpoint(folder / "cls" / "from_scratch-seed0.pt")
    assert "(other mean, std)" in output and not torch.equal(first["scores"], second["scores"])
    assert (first["mean"], first["std"], second["mean"], second["std"]) == (0.3, 0.2, 0.6, 0.1)
    assert {key: first["config"][key] for key in CONFIG} == CONFIG
    assert first["identity"]["layer_decay"] == 1
    trained = [content_hash(load_grey(folder / row["image"])) for row in read_rows(folder, "train")]
    assert sorted(first["seen"]["content"].tolist()) == sorted(trained)  # all that these weights have seen
    assert checkpoint(folder / "cls" / "a-seed0.pt")["seen"] is None  # a.pt does not tell what it has seen


# ---------------------------------------------------------------- rows of the table

def test_seeds_are_runs_and_their_mean_is_scored(folder):
    output, report = run(folder, "--data", "set.csv", "--ckpt", "ours=a.pt", "none", *QUICK, "--seeds", 2)
    labels = [CLASSES.index(row["label"]) for row in read_rows(folder)]
    for name, file in (("ours", "ours"), ("from scratch", "from_scratch")):
        runs = [checkpoint(folder / "cls" / f"{file}-seed{seed}.pt")["scores"].numpy() for seed in (0, 1)]
        assert not np.array_equal(*runs) and report["models"][name]["runs"] == 2
        f1 = [sklearn.metrics.f1_score(labels, run.argmax(1), average="macro") for run in runs]
        area = [np.mean([sklearn.metrics.roc_auc_score(np.equal(labels, k), run[:, k]) for k in range(3)])
                for run in runs]
        scores, each = report["models"][name]["scores"], report["models"][name]["per run"]
        assert each["macro F1"] == pytest.approx(f1, abs=1e-6) and each["macro AUROC"] == pytest.approx(area, abs=1e-6)
        assert scores["macro F1"]["estimate"] == pytest.approx(np.mean(f1), abs=1e-6)
        assert scores["macro AUROC"]["estimate"] == pytest.approx(np.mean(area), abs=1e-6)
    assert output.count("sd of 2 runs") == 2 and "from scratch: 2 runs" in output
    starts = [checkpoint(folder / "cls" / f"from_scratch-seed{seed}.pt")["teacher"] for seed in (0, 1)]
    difference = starts[0]["backbone.pos_embed"] - starts[1]["backbone.pos_embed"]
    assert difference.abs().max() > 0.01  # initialisation is drawn anew, too


def test_files_of_one_name_are_pooled(folder):
    save_backbone(folder / "b.pt", seed=2)
    output, report = run(folder, "--data", "set.csv", "--ckpt", "ours=a.pt,b.pt", "none", *QUICK)
    assert report["models"]["ours"]["runs"] == 2 and report["models"]["from scratch"]["runs"] == 1
    starts = {checkpoint(folder / "cls" / f"ours-{number}-seed{number}.pt")["identity"]["start"] for number in (0, 1)}
    assert len(starts) == 2 and "ours: 2 runs, from scratch: 1 run" in report["methods"]
    assert [file["path"] for file in report["files"]["ours"]] == ["a.pt", "b.pt"]


@pytest.mark.parametrize("protocol", [("--linear", "--linear_steps", 30), ("--knn",)], ids=lambda flags: flags[0])
def test_frozen_protocols_choose_without_test_labels(folder, protocol):
    flags = ("--ckpt", "a.pt", "none", *QUICK, *protocol, "--seeds", 2)
    output, report = run(folder, "--data", "set.csv", *flags)
    per_file = 1 if "--knn" in flags else 2  # k-NN draws nothing
    assert {name: model["runs"] for name, model in report["models"].items()} == {"a": per_file, "random init": 2}
    assert len(report["chosen"]["a"]) == per_file and len(report["chosen"]["random init"]) == 2
    areas = report["models"]["random init"]["per run"]["macro AUROC"]
    assert areas[0] != areas[1]  # a network per seed
    rows = read_rows(folder, *SPLITS)
    turned = dict(zip(CLASSES, CLASSES[1:] + CLASSES[:1]))
    for row in rows:
        row["label"] = turned[row["label"]] if row["split"] == "test" else row["label"]
    save_rows(folder / "turned.csv", rows)
    _, other = run(folder, "--data", "turned.csv", *flags)
    assert other["chosen"] == report["chosen"]
    assert other["models"]["a"]["scores"] != report["models"]["a"]["scores"]
    assert len(list((folder / "features").iterdir())) == 1 and not list((folder / "cls").glob("*.pt"))


def test_frozen_features_are_made_by_one_process(folder, monkeypatch):
    """Under torchrun, too, where the other ones leave at once: no process may wait for them."""
    def join(*_, **__):
        raise AssertionError("would wait for the others")

    monkeypatch.setattr(dist, "init_process_group", join)
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ("--data", "set.csv", "--ckpt", "a.pt", *QUICK, "--knn")
    monkeypatch.setenv("RANK", "1")
    assert run(folder, *flags) == ("", None)
    monkeypatch.setenv("RANK", "0")
    assert run(folder, *flags)[1]["models"].keys() == {"a"}


def test_foreign_features_and_predictions_join(folder):
    test, every = read_rows(folder), read_rows(folder, *SPLITS)
    onehot = {label: np.eye(3)[k] for k, label in enumerate(CLASSES)}
    save_predictions(folder / "truth.csv", test[::-1], ["image", "c%l", *CLASSES[:2]],
                     lambda row: np.roll(onehot[row["label"]], 1))
    save_predictions(folder / "bare.csv", test, ["image", "label"], lambda row: [row["label"]])
    vectors = [onehot[row["label"]] + 0.01 * i / len(every) for i, row in enumerate(every)]
    np.savez(folder / "theirs.npz", name=[row["image"] for row in every][::-1], vector=vectors[::-1])
    output, report = run(folder, "--data", "set.csv", "--ckpt", "none", *QUICK, "--knn",
                         "--features", "theirs=theirs.npz", "--predictions", "nn_unet=truth.csv", "bare.csv")
    assert list(report["models"]) == ["random init", "theirs", "nn_unet", "bare"]
    assert list(report["differences"]) == ["theirs", "nn_unet", "bare"]
    for name in ("theirs", "nn_unet", "bare"):
        scores, difference = report["models"][name]["scores"], report["differences"][name]
        assert all(scores[score]["estimate"] == 1 for score in CLASSIFICATION_SCORES[:3])
        assert 0 < difference["macro F1"]["p"] <= difference["macro F1"]["p (Holm)"] < 0.1
        assert scores["macro AUROC"]["estimate"] == (None if name == "bare" else 1)
        assert (difference["macro AUROC"]["p"] is None) == (name == "bare")
    rows = output.split("random init minus ...")
    assert next(line for line in rows[0].split("\n") if line.startswith("bare")).endswith(" -")
    assert next(line for line in rows[1].split("\n") if line.startswith("  bare")).endswith(" -")
    assert ("Given were nn_unet by its test predictions, bare by its test predictions, theirs by vectors of 3 numbers "
            "that were made elsewhere. All models but these had the same protocol") in report["methods"]
    assert not re.search("nan|Warning", output)


# ---------------------------------------------------------------- what is written

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One command with every output: (folder, what it printed, its JSON)."""
    folder = tmp_path_factory.mktemp("finished")
    save_set(folder)
    test = read_rows(folder)
    seen = [content_hash(load_grey(folder / row["image"])) for row in test[:3]]
    save_backbone(folder / "a_b%c.pt", seen={"content": torch.from_numpy(np.array(seen, np.uint64))})
    save_backbone(folder / "b.pt", seed=2, seen={"content": torch.zeros(1, dtype=torch.uint64)})
    save_predictions(folder / "bare.csv", test, ["image", "label"], lambda row: [CLASSES[0]])
    output, report = run(folder, "--data", "machines.csv", "--ckpt", "a_b%c.pt", "b.pt", "none", *QUICK,
                         "--by", "machine", "--latex", "table.tex", "--predictions", "theirs=bare.csv")
    return folder, output, report


def test_table_on_screen(finished):
    _, output, report = finished
    lines = output.split("\ntest: 18 images of 9 groups;")[1].split("\n\n")[1].split("\n")
    assert max(map(len, lines)) <= 120 and lines[0].split() == " ".join(CLASSIFICATION_SCORES).split()
    names = ["a_b%c", "b", "from scratch", "theirs"]
    assert [line[:24].strip() for line in lines[1:5]] == names and lines[5] == "a_b%c minus ..."
    assert [line[:24].strip() for line in lines[6::2]] == names[1:]
    for name, line in zip(names, lines[1:5]):
        values = report["models"][name]["scores"]["macro F1"]
        assert f"{values['estimate']:.3f} [{values['low']:.3f}, {values['high']:.3f}]" in line
    assert "smoke test" not in output and "alpha: " not in output


def test_files_and_their_overlap_with_pretraining_are_told(finished):
    folder, output, report = finished
    assert "a_b%c, a_b%c.pt: transductive: 3 of 18 test images were in the pretraining set (3 identical)" in output
    assert "b, b.pt: none of the 18 test images was in the pretraining set" in output
    files = {name: own[0] for name, own in report["files"].items()}
    assert {name: own["in pretraining set"] for name, own in files.items()} == {
        "a_b%c": {"images": 18, "identical": 3, "seen": 3}, "b": {"images": 18, "identical": 0, "seen": 0},
        "from scratch": None}
    for name, own in files.items():
        digest = hashlib.sha256((folder / own["path"]).read_bytes()).hexdigest() if name != "from scratch" else None
        assert own["sha256"] == digest and own["img_size"] == 16 and (own["mean"], own["std"]) == (0.3, 0.2)
    assert "transductive: 3 of 18" in report["methods"] and report["classes"] == list(CLASSES)
    assert report["phantom"] is False


def test_copies_across_parts_are_told(folder):
    train, test = read_rows(folder, "train"), read_rows(folder)
    shutil.copy(folder / train[0]["image"], folder / test[0]["image"])
    output, report = run(folder, "--data", "set.csv", "--ckpt", "none", *QUICK, "--knn")
    assert "1 test image (1 by pixels, the others by look) also lay in train or validation" in output
    assert report["copies"]["identical"] == 1 and "1 test image (1 by pixels" in report["methods"]


def test_own_predictions_are_given_as_others_are_taken(folder):
    flags = ("--data", "set.csv", "--ckpt", "a.pt", "none", *QUICK, "--knn")
    _, first = run(folder, *flags)
    output, second = run(folder, *flags, "--predictions", "again=cls/predictions-a-0.csv")
    assert second["models"]["again"]["scores"]["macro F1"] == first["models"]["a"]["scores"]["macro F1"]
    assert second["differences"]["again"]["macro F1"]["p"] == 1
    assert "finetune_cls.json is of other arguments: kept as" in output
    assert (folder / "cls/finetune_cls.old-1.json").exists()


def test_scores_by_column(finished):
    _, output, report = finished
    assert {value: (part["images"], part["groups"]) for value, part in report["by"]["machine"].items()} == {
        "many": (16, 8), "one": (2, 1)}
    lines = output.split("by machine")[1].split("\n")
    assert lines[1].startswith("  many") and "16, 8" in lines[1] and "from scratch" in lines[3]
    assert lines[5].startswith("  one") and "2, 1" in lines[5] and max(map(len, lines)) <= 120
    theirs = {value: part["models"]["theirs"]["scores"]["accuracy"] for value, part in report["by"]["machine"].items()}
    assert theirs["one"]["estimate"] == 1 and theirs["many"]["estimate"] == 4 / 16  # they say alpha; `one` is alpha's


def test_latex_is_whole(finished):
    folder, _, report = finished
    text = assert_latex_is_whole(folder / "table.tex", finetune_cls)
    assert "--" not in re.sub("& -- ", "", text)
    body = text.split(r"\hline")[2].strip().split("\n")
    assert len(body) == 4 and all(line.count("&") == 4 and line.endswith("\\\\") for line in body)
    assert body[0].startswith(r"a\_b\%c & ") and "-- " in body[3].split(" & ")[4]
    values, difference = report["models"]["b"]["scores"]["accuracy"], text.split(r"\hline")[3].strip().split("\n")
    assert f"{values['estimate']:.3f}" in body[1] and f"{values['low']:.3f}, {values['high']:.3f}" in body[1]
    assert difference[0].startswith(r"a\_b\%c minus b & ")
    assert difference[1].split(" & ")[3] == f"{report['differences']['b']['macro F1']['p (Holm)']:.4f}"
    assert "Test set of 18 images of 9 groups" in text and "Smallest difference in macro F1" in text
    for words in ("train 30 images of 15 groups, validation 12 images of 6 groups, test 18 images of 9 groups",
                  "alpha 10, 4, 6; be\\_ta 10, 4, 6; c\\%l 10, 4, 6", "2,000 replicates", "sign-flip", "Holm",
                  "Only 9 test groups", "-{}-data machines.csv -{}-ckpt", "2 epochs", "layer decay 0.65"):
        assert words in text, words


def test_files_beside_the_json(finished):
    folder, _, report = finished
    for name in ("a_b_c", "b", "from_scratch", "theirs"):
        with Image.open(folder / "cls" / f"confusion-{name}.png") as picture:
            assert picture.width > 400
    assert report["written_by"] == "finetune_cls.py" and report["args"]["ckpt"][0] == "a_b%c.pt"
    counts = np.array(report["models"]["theirs"]["confusion, mean of runs"])
    assert (counts == [[6, 0, 0], [6, 0, 0], [6, 0, 0]]).all()
    split = (folder / "cls" / "split.csv").read_text().split()
    assert split[0] == "image,label,group,split" and len(split) == 61 and "png/SECRET070.png,alpha,p07,test" in split


def test_no_name_of_an_image_is_in_a_checkpoint(finished):
    folder, *_ = finished
    assert_files_hold_no_names(folder / "cls", 3, [b"SECRET", b"machines.csv"], b"alpha")


def test_a_fine_tuned_file_is_a_backbone(finished, tmp_path):
    folder, *_ = finished
    model, info, names = moved(folder / "cls" / "b-seed0.pt", folder / "b.pt")
    assert (info["mean"], info["std"], info["img_size"]) == (0.3, 0.2, 16) and model.in_chans == 1
    assert {"patch_embed.proj.weight", "blocks.1.mlp.fc2.weight"} <= {*names}
    save_set(tmp_path)
    output, report = run(tmp_path, "--data", "set.csv", "--ckpt", folder / "cls" / "b-seed0.pt", *QUICK, "--knn")
    assert "none of the 18 test images was in the pretraining set" in output  # seen is handed on


# ---------------------------------------------------------------- the command

@pytest.mark.slow
def test_two_processes_give_the_table_of_one(folder):
    flags = ("--data", "set.csv", "--ckpt", "a.pt", "none", *QUICK)
    one, two = reports = [report_of(finetune_cls, folder, *flags, processes=processes) for processes in (1, 2)]
    assert one["models"].keys() == two["models"].keys()
    for file in ("a-seed0.pt", "from_scratch-seed0.pt"):
        scores = [checkpoint(folder / str(processes) / file)["scores"] for processes in (1, 2)]
        torch.testing.assert_close(*scores, atol=1e-4, rtol=0)
    for name in one["models"]:
        for score in CLASSIFICATION_SCORES:
            a, b = (report["models"][name]["scores"][score]["estimate"] for report in reports)
            assert a == pytest.approx(b, abs=1e-3)
    shutil.rmtree(folder / "2")
    assert report_of(finetune_cls, folder, *flags, "--linear", "--linear_steps", 20, processes=2)["models"]


@pytest.mark.slow
def test_without_flags_phantoms_take_less_than_three_minutes(tmp_path):
    done = command(finetune_cls, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "phantom images: a smoke test of the code" in done.stdout and "from scratch" in done.stdout
    report = json.loads((tmp_path / "cls" / "finetune_cls.json").read_text())
    assert report["args"]["data"] is None and report["images"] > 200
