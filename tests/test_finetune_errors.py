"""Bad input of finetune_cls.py: one sentence that says what is wrong and where, status 2, nothing written."""

from functools import partial

import numpy as np
import pytest
import torch
from cls_tools import CLASSES, QUICK, read_rows, run, save_predictions, save_set
from PIL import Image
from stage_tools import one_thread  # noqa: F401
from stage_tools import (SPLITS, assert_one_sentence, change_row, checkpoint, damage, keep_rows, output_errors,
                         save_backbone, write)

import finetune_cls
import runtime

DATA = ("--data", "set.csv")
change, keep = partial(change_row, "set.csv"), partial(keep_rows, "set.csv")  # line 5 is of p01, in train


def class_folders(*names):
    """A folder set/ with an image at each of the names."""
    def prepare(folder):
        for name in names:
            (folder / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "set" / name)
    return prepare


def foreign_file(folder):
    torch.save({"conv1.weight": torch.zeros(8, 3, 7, 7)}, folder / "a.pt")


def diverged_file(folder):
    state = checkpoint(folder / "a.pt")["teacher"]
    save_backbone(folder / "a.pt", teacher={key: value * torch.nan for key, value in state.items()})


def predictions(header=("image", *CLASSES), score=lambda row: [0.2, 0.3, 0.5], rows=slice(None)):
    def prepare(folder):
        save_predictions(folder / "theirs.csv", read_rows(folder)[rows], header, score)
    return prepare


def features(rows=slice(None), **arrays):
    def prepare(folder):
        names = [row["image"] for row in read_rows(folder, *SPLITS)][rows]
        np.savez(folder / "theirs.npz", **{"name": names, "vector": np.ones((len(names), 2), np.float32), **arrays})
    return prepare


WITH = (*DATA, "--ckpt", "a.pt", *QUICK)
ERRORS = {  # what is prepared (or None), flags, words of the sentence
    # data
    "no such data": (None, ("--data", "nowhere"), ["nowhere: no such file or folder"]),
    "unlabelled image in a folder": (class_folders("a/1.png", "b/2.png", "3.png"), ("--data", "set"),
                                     ["set/3.png", "not in a class folder", "CLASS"]),
    "row without label": (change(label=""), WITH, ["set.csv, line 5", "no label"]),
    "missing file": (change(image="png/9.png"), WITH, ["set.csv, line 5", "png/9.png", "No such file"]),
    "unreadable image": (write("png/SECRET000.png", "no image"), WITH,
                         ["png/SECRET000.png", "cannot be read", "--exclude"]),
    "unknown column": (None, ("--data", "machines.csv", *QUICK),
                       ["machine", "expected image,label[,group][,split]", "--by"]),
    "no such column": (None, (*WITH, "--by", "centre"), ["--by centre", "no such column"]),
    "columns of a folder": (class_folders("a/1.png", "b/2.png"), ("--data", "set", "--by", "centre"),
                            ["--by", "folder"]),
    "columns of phantoms": (None, ("--by", "centre"), ["--by need --data"]),
    "class missing from train": (keep(lambda row: row["split"] != "train" or row["label"] != "be_ta"), WITH,
                                 ["'be_ta'", "not in train", "png/SECRET1"]),
    "a group in two splits": (change(split="test"), WITH, ["group 'p01'", "train", "test", "must not share a group"]),
    "no test split": (keep(lambda row: row["split"] != "test"), WITH, ["no test"]),
    "one class": (keep(lambda row: row["label"] == "alpha"), WITH, ["one class", "'alpha'"]),
    "too few groups": (class_folders("a/p1/1.png", "b/p1/2.png", "a/p2/3.png", "b/p2/4.png"), ("--data", "set"),
                       ["2 groups", "do not fill train, val and test"]),
    "odd split": (change(split="later"), WITH, ["line 5", "'later'", "train"]),
    "no groups for validation": (class_folders("a/1.png", "b/2.png"), ("--data", "set", "--val_fraction", 0),
                                 ["shares of val", "above 0"]),
    # models
    "no checkpoint": (None, (*DATA, "--ckpt", "other.pt"), ["other.pt", "no such checkpoint"]),
    "damaged checkpoint": (damage("a.pt"), WITH, ["a.pt", "damaged"]),
    "foreign network": (foreign_file, WITH, ["a.pt", "conv1.weight"]),
    "diverged checkpoint": (diverged_file, (*WITH, "--knn"), ["a.pt", "not finite"]),
    "a checkpoint without a name": (None, (*DATA, "--ckpt", "ours="), ["--ckpt 'ours='", "names no file"]),
    "two models of one name": (None, (*DATA, "--ckpt", "x=a.pt", "x=none"), ["two models are called 'x'", "NAME=FILE"]),
    "two models in one file": (None, (*DATA, "--ckpt", "x/a.pt", "y/a.pt", "x_a.pt"),
                              ["two models are called", "'x_a'"]),
    "a model and predictions of one name": (predictions(), (*WITH, "--predictions", "a=theirs.csv"),
                                            ["two models", "'a'"]),
    # exchange
    "no predictions": (None, (*WITH, "--predictions", "theirs.csv"), ["theirs.csv", "cannot be read"]),
    "predictions lack an image": (predictions(rows=slice(1, None)), (*WITH, "--predictions", "theirs.csv"),
                                  ["theirs.csv", "1 of 18 images are missing", "png/SECRET070.png"]),
    "unknown class": (predictions(("image", "label"), lambda row: ["gamma"]), (*WITH, "--predictions", "theirs.csv"),
                      ["theirs.csv, line 2", "'gamma'", "alpha"]),
    "wrong header": (predictions(("image", "alpha", "beta", "c")), (*WITH, "--predictions", "theirs.csv"),
                     ["theirs.csv", "image,alpha,beta,c", "image,alpha,be_ta,c%l"]),
    "no number": (predictions(score=lambda row: [1, 0, "high"]), (*WITH, "--predictions", "theirs.csv"),
                  ["theirs.csv, line 2", "high"]),
    "not a finite number": (predictions(score=lambda row: [1, 0, "nan"]), (*WITH, "--predictions", "theirs.csv"),
                            ["theirs.csv, line 2", "not finite"]),
    "features lack an image": (features(rows=slice(5, None)), (*WITH, "--knn", "--features", "theirs.npz"),
                               ["theirs.npz", "5 of 60 images are missing", "png/SECRET000.png"]),
    "features of another length": (features(vector=np.ones((3, 2))), (*WITH, "--knn", "--features", "theirs.npz"),
                                   ["theirs.npz", "(60,)", "(3, 2)"]),
    "features of a fine-tuned model": (features(), (*WITH, "--features", "theirs.npz"),
                                       ["--linear or --knn", "--predictions"]),
    # flags
    "two protocols": (None, (*WITH, "--linear", "--knn"), ["--linear and --knn", "one at a time"]),
    "unknown flag": (None, (*WITH, "--epoch", 3), ["--epoch: no such option"]),
    "batch of one": (None, (*WITH, "--batch_size", 1), ["--batch_size must be at least 2, not 1"]),
    "no epochs": (None, (*WITH, "--epochs", 0), ["--epochs must be at least 1"]),
    "no seeds": (None, (*WITH, "--seeds", 0), ["--seeds must be at least 1"]),
    "negative mixup": (None, (*WITH, "--mixup", "-0.1"), ["--mixup must be at least 0"]),
    "all smoothed": (None, (*WITH, "--smoothing", 1), ["--smoothing is a share"]),
    "no rate": (None, (*WITH, "--lr", 0), ["--lr must be positive"]),
    "a rate that is none": (None, (*WITH, "--lr", "nan"), ["--lr must be positive, not nan"]),
    "endless mixup": (None, (*WITH, "--mixup", "inf"), ["--mixup must be at least 0, not inf"]),
    "no decay": (None, (*WITH, "--layer_decay", "-1"), ["--layer_decay must be positive"]),
    **output_errors(finetune_cls, "cls", WITH, "set.csv"),
}


@pytest.mark.parametrize("prepare, flags, words", ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_sentence(tmp_path, capsys, prepare, flags, words):
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    if prepare:
        prepare(tmp_path)
    late = "not finite" in words or "cannot be read" in words  # what must be computed first, or read
    assert_one_sentence(finetune_cls, tmp_path, flags, words, capsys, ["split.csv"] * late)


def test_more_processes_than_pairs(tmp_path, monkeypatch):
    """Each of them must get a pair of each batch: what has none could not take part."""
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    monkeypatch.setattr(runtime, "setup", lambda: (0, 3, torch.device("cpu")))
    with pytest.raises(ValueError, match="3 processes for batches of 4 images .* --nproc_per_node 2 is the most"):
        run(tmp_path, *WITH, "--batch_size", 4)
    monkeypatch.setattr(runtime, "setup", lambda: (0, 16, torch.device("cpu")))
    with pytest.raises(ValueError, match="16 processes for batches of 30 images .* --nproc_per_node 15"):
        run(tmp_path, *WITH, "--batch_size", 500)  # of 30 train images


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    diverged_file(tmp_path)
    with pytest.raises(ValueError, match=r"cls/a-seed0.pt, step \d: the loss is not finite; a lower --lr"):
        run(tmp_path, *WITH)
    assert not list((tmp_path / "cls").glob("*.pt"))


def test_another_split_is_kept_aside(tmp_path):
    save_set(tmp_path)
    (tmp_path / "cls").mkdir()
    (tmp_path / "cls" / "split.csv").write_text("mine")
    output, _ = run(tmp_path, *DATA, "--ckpt", "none", *QUICK, "--arch", "vit_micro", "--knn")
    assert "is another split: kept as cls/split.old-1.csv" in output
    assert (tmp_path / "cls" / "split.old-1.csv").read_text() == "mine"
    output, _ = run(tmp_path, *DATA, "--ckpt", "none", *QUICK, "--arch", "vit_micro", "--knn")
    assert "another split" not in output


def test_defaults_follow_the_data():
    args = finetune_cls.get_args(["--data", "x"])
    assert (args.preset, args.epochs, args.batch_size, args.lr, args.layer_decay) == ("ultradino", 200, 128, 1e-4, 0.65)
    assert finetune_cls.get_args([]).preset == "cpu" and finetune_cls.get_args([]).epochs < 20
    assert finetune_cls.get_args(["--epochs", "3"]).epochs == 3  # a flag goes before a preset
