"""Bad input of finetune_multi.py: one sentence that says what is wrong and where, status 2, no file changed."""

import csv
import shutil

import numpy as np
import pytest
import torch
from file_tools import save
from multi_tools import BASIC, DATA, NAMES, QUICK, few_replicates, name_of, run, save_all  # noqa: F401
from PIL import Image
from stage_tools import assert_one_sentence, checkpoint, damage, one_thread, save_rows, write  # noqa: F401

import finetune_multi
import runtime


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with fmc/, a.pt and a finished run, multi/task-FUGC-seed0.pt."""
    folder = save_all(tmp_path_factory.mktemp("whole"))
    run(folder, *BASIC, "--iters", 1, "--tasks", "FUGC")
    shutil.move(folder / "multi" / "task-FUGC-seed0.pt", folder / "finished.pt")
    shutil.rmtree(folder / "multi")
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "here")


def change(task, which, **cells):
    """Other cells in those rows of a task's CSV for which which(number, row); number 0 is line 2."""
    def prepare(folder):
        path = folder / "fmc" / "csv_files" / f"{task}.csv"
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for i, row in enumerate(rows):
            if which(i, row):
                row.update({key: value(row) if callable(value) else value for key, value in cells.items()})
        save_rows(path, rows)
    return prepare


def third(i, row):
    return i == 2


def with_splits(task, part, **cells):
    """Patients take turns in the splits; other cells in a task's rows of one part."""
    def prepare(folder):
        for name in NAMES:
            change(name, lambda i, row: True, split=lambda row: split_of(row))(folder)
        change(task, lambda i, row: split_of(row) == part, **cells)(folder)
    return prepare


def split_of(row):
    return ("train", "train", "val", "test")[int(row["group"][1:]) // 6 % 4]  # each plane's patients in turn


def without_classes(part, *classes):
    """No mask of that part shows them."""
    def prepare(folder):
        with_splits("fetal_head", part)(folder)
        with open(folder / "fmc" / "csv_files" / "fetal_head.csv", newline="") as file:
            for row in csv.DictReader(file):
                path = folder / "fmc" / "csv_files" / row["mask_path"]
                mask = np.asarray(Image.open(path))
                if row["split"] == part:
                    save(path, np.where(np.isin(mask, classes), 0, mask).astype(np.uint8))
    return prepare


def two_names(folder):
    change("FUGC", lambda i, row: True, task_id="a b")(folder)
    change("thyroid_nodule", lambda i, row: True, task_id="a_b")(folder)


def remove(name):
    return lambda folder: (folder / name).unlink()


CLINICAL = (*BASIC, "--paradigm", "clinical", "--groups", "groups.csv")
ERRORS = {  # what is prepared (or None), flags, words of the sentence
    # data
    "no such folder": (None, ("--data", "nowhere"), ["nowhere", "no such folder"]),
    "a point outside": (change("FUGC", third, point_2_xy="[3, 400]"), BASIC,
                        ["1 of 143 rows are wrong", "FUGC.csv, line 4: point_2_xy is '[3, 400]'", "--skip_wrong"]),
    "a box turned round": (change("thyroid_nodule", third, x_min="31", x_max="3"), BASIC,
                           ["thyroid_nodule.csv, line 4", "the box is 31, ", "inside its image of"]),
    "no such class": (change("fetal_plane_cls", third, mask="3"), BASIC,
                      ["fetal_plane_cls.csv, line 4", "is '3', expected a whole number from 0 to 2"]),
    "no such mask": (change("fetal_head", third, mask_path="../x.png"), BASIC, ["fetal_head.csv, line 4", "no mask"]),
    "missing image": (remove(f"fmc/{name_of(0, 0)}"), BASIC,
                      ["fetal_head.csv, line 2", "fetal_plane_cls.csv, line 2", name_of(0, 0), "is not there"]),
    "all rows wrong": (change("FUGC", lambda i, row: True, point_1_xy="?"), (*BASIC, "--skip_wrong_rows"),
                       ["rows are wrong", "leave out FUGC, which would be empty"]),
    "unknown task": (None, (*BASIC, "--tasks", "FUGC", "liver"), ["has no task 'liver'", "fetal_plane_cls"]),
    "unknown phantom": (None, ("--tasks", "liver"), ["--tasks liver: phantoms have phantom structures"]),
    "pattern without groups": (None, (*BASIC, "--group_regex", "liver(.)"), ["--group_regex 'liver(.)'", "nothing"]),
    "no clinical group": (write("groups.csv", "task,group\nFUGC,OB\nfetal_head,OB\n"), CLINICAL,
                          ["groups.csv", "has no group of fetal_plane_cls, thyroid_nodule", "TASK,GROUP"]),
    "no groups file": (None, CLINICAL, ["groups.csv", "no such file"]),
    "nothing to validate by": (without_classes("val", 1, 2), BASIC,
                               ["fetal_head: no validation image shows anything but background"]),
    "nothing to test": (without_classes("test", 1, 2), BASIC, ["fetal_head: no test image shows anything but"]),
    "a point in no train row": (with_splits("FUGC", "train", point_2_xy=""), BASIC,
                                ["FUGC: no train image has point 2"]),
    "two tasks of one file name": (two_names, (*BASIC, "--paradigm", "task"),
                                   ["two networks would be called task-a_b"]),
    "no validation": (None, (*BASIC, "--val_fraction", 0), ["must be above 0", "not 0.0 and 0.25"]),
    "nothing to train on": (None, (*BASIC, "--val_fraction", 0.5, "--test_fraction", 0.5), ["leave some to train"]),
    # models
    "no checkpoint": (None, (*DATA, "--ckpt", "other.pt"), ["other.pt", "no such checkpoint"]),
    "damaged checkpoint": (damage("a.pt"), BASIC, ["a.pt", "damaged"]),
    "a finished run to start from": (None, (*DATA, "--ckpt", "finished.pt", *QUICK),
                                     ["finished.pt: a run of finetune_multi.py, whose blocks have experts",
                                      "only predict.py takes it"]),
    "no task of that name": (None, (*BASIC, "--no_flip", "fetal_heads"),
                             ["--no_flip fetal_heads: the tasks are FUGC, "]),
    "rescaling of learned positions": (None, (*BASIC, "--rope_rescale", 2), ["--rope_rescale 2", "a.pt are learned"]),
    "timm": (None, (*DATA, "--ckpt", "timm:resnet18", *QUICK), ["--ckpt timm:resnet18: timm's networks know no tasks"]),
    "two checkpoints": (None, (*DATA, "--ckpt", "a.pt", "none"), ["--ckpt: one backbone to start from"]),
    "two files of one name": (None, (*DATA, "--ckpt", "x=a.pt,finished.pt", *QUICK),
                              ["--ckpt x=a.pt,finished.pt", "one backbone"]),
    "no such block": (None, (*BASIC, "--moe_blocks", 2), ["--moe_blocks 2: blocks are 0 to 1"]),
    # outputs
    "foreign json": (write("multi/all.json", '{"mine": 1}'), BASIC,
                     ["multi/all.json", "not written by finetune_multi.py"]),
    "foreign table": (write("multi/paradigms.json", "[1]"), BASIC,
                      ["multi/paradigms.json", "not written by finetune_multi.py"]),
    "foreign json of a paradigm that is not run": (write("multi/task.json", '{"mine": 1}'), BASIC,
                                                   ["multi/task.json", "not written by finetune_multi.py"]),
    "output folder is a file": (None, (*BASIC, "--output_dir", "a.pt"), ["a.pt", "File exists"]),
    # flags
    "unknown flag": (None, (*BASIC, "--iter", 3), ["--iter: no such option"]),
    "unknown paradigm": (None, (*BASIC, "--paradigm", "some"), ["--paradigm", "'some'"]),
    "too many of the experts": (None, (*BASIC, "--top_k", 3), ["--top_k 3: there are 2 experts"]),
    "odd channels": (None, (*BASIC, "--channels", 48), ["--channels must be a multiple of 32, not 48"]),
    "negative share": (None, (*BASIC, "--test_fraction", -0.1), ["--test_fraction is a share", "-0.1"]),
    "no rate": (None, (*BASIC, "--lr", 0), ["--lr must be positive"]),
    "no gradient": (None, (*BASIC, "--clip_grad", 0), ["--clip_grad must be positive"]),
}
LEAST = dict(iters=(0, 1), batch_size=(0, 1), eval_batch_size=(0, 1), val_every=(0, 1), save_every=(0, 1), seeds=(0, 1),
             seed=(-1, 0), test_seed=(-1, 0), experts=(0, 1), top_k=(0, 1), task_dim=(0, 1), channels=(0, 32),
             img_size=(0, 1), backbone_lr=(-1.0, 0), weight_decay=(-1.0, 0), balance_weight=("nan", 0),
             rope_rescale=(0.5, 1))
ERRORS.update({f"--{name} {value}": (None, (*BASIC, f"--{name}", value),
                                     [f"--{name} must be at least {least}, not {value}"])
               for name, (value, least) in LEAST.items()})


@pytest.mark.parametrize("prepare, flags, words", ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_sentence(folder, capsys, prepare, flags, words):
    if prepare:
        prepare(folder)
    assert_one_sentence(finetune_multi, folder, flags, words, capsys)


def test_more_processes_than_images_in_a_batch(folder, monkeypatch):
    monkeypatch.setattr(runtime, "setup", lambda: (0, 6, torch.device("cpu")))
    with pytest.raises(ValueError, match="6 processes for batches of 5 images: --nproc_per_node 5 is the most"):
        run(folder, *BASIC)


@pytest.mark.parametrize("save_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(folder, save_every):
    """Nothing of it is ever saved, however often that is done; the tasks are named."""
    with pytest.raises(ValueError, match=r"multi/all-seed0.pt, step \d+: the loss of .*(FUGC|fetal|thyroid).* is not "
                                         r"finite; a lower --lr\?"):
        run(folder, *BASIC, "--lr", "1e30", "--backbone_lr", "1e30", "--iters", 6, "--val_every", 6, "--save_every",
            save_every)
    for path in (folder / "multi").glob("*.pt"):
        assert all(value.isfinite().all() for value in checkpoint(path)["network"].values())


def test_wrong_rows_can_be_left_out(folder):
    """They are named on screen; the others make the run."""
    change("FUGC", third, point_2_xy="[3, 400]")(folder)
    change("thyroid_nodule", third, x_min="31", x_max="3")(folder)
    output, reports = run(folder, *BASIC, "--iters", 1, "--skip_wrong_rows")
    for words in ("FUGC.csv, line 4: point_2_xy is '[3, 400]'", "thyroid_nodule.csv, line 4: the box is 31, "):
        assert words in output
    assert set(reports["all"]["values"]) == {*NAMES}


def test_a_class_or_point_that_a_part_lacks_is_no_error(folder):
    """The others make the score; a class that train alone lacks is nowhere shown, and counts as wrong."""
    without_classes("test", 2)(folder)
    change("FUGC", lambda i, row: row["split"] == "val", point_1_xy="")(folder)
    _, reports = run(folder, *BASIC, "--iters", 1)
    dice = np.array(reports["all"]["values"]["fetal_head"][0]["Dice"], np.float64)  # None: nan
    assert np.isnan(dice[:, 1]).all() and reports["all"]["scores"]["sound"]["fetal_head"]["Dice"] == pytest.approx(
        np.nanmean(dice[:, 0]))
    assert np.isfinite(reports["all"]["chosen"]["all"][0]["normalised"])


def test_defaults_follow_the_data():
    args = finetune_multi.get_args(["--data", "x"])
    assert (args.preset, args.iters, args.batch_size, args.val_every, args.save_every) == ("m2dino", 2000, 16, 200, 200)
    assert (args.lr, args.backbone_lr, args.weight_decay, args.experts, args.top_k) == (1e-4, 1e-5, 0.05, 4, None)
    assert args.paradigm == ["all"] and args.img_size == 256 and "cardiac_multi" in args.no_flip
    assert {*finetune_multi.get_args(["--no_flip", "mine"]).no_flip} == {*finetune_multi.SIDES, "mine"}
    args = finetune_multi.get_args([])
    assert args.preset == "cpu" and args.iters <= 200 and args.paradigm == ["all"] and args.arch == "vit_micro"
    assert finetune_multi.get_args(["--iters", "300"]).iters == 300  # a flag goes before a preset
    assert finetune_multi.get_args(["--paradigm", "all", "task", "all"]).paradigm == ["all", "task"]
