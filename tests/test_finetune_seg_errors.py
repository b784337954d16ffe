"""Bad input of finetune_seg.py: one sentence that says what is wrong and where, status 2, nothing written."""

from functools import partial

import numpy as np
import pytest
import torch
from file_tools import save
from seg_tools import DATA, NAMED, QUICK, draw, load, read_rows, run, save_set
from stage_tools import one_thread  # noqa: F401
from stage_tools import (assert_one_sentence, change_row, checkpoint, damage, keep_rows, output_errors, save_backbone,
                         write)

import finetune_seg
import runtime
from training import segmenter

WITH = (*DATA, "--ckpt", "a.pt", *QUICK)
TEST, TRAIN = "SECRET0_0.png", "SECRET1_0.png"
splits, keep = partial(change_row, "split.csv"), partial(keep_rows, "split.csv")  # line 5 is of p3, in train


def change(name, pixels):
    """Other pixels in a file of set/."""
    def prepare(folder):
        save(folder / "set" / name, np.array(pixels(load(folder / "set" / name))))
    return prepare


def remove(name):
    return lambda folder: (folder / "set" / name).unlink()


def few_groups(n):
    """few/ with n images, each a group of its own."""
    def prepare(folder):
        rng = np.random.default_rng(1)
        for i in range(n):
            image, mask = draw(rng, True, (18, 18))
            save(folder / "few" / "images" / f"{i}.png", image)
            save(folder / "few" / "masks" / f"{i}.png", mask)
    return prepare


def without_class(k):
    """No image of split.csv shows class k."""
    def prepare(folder):
        for path in (folder / "set" / "masks").iterdir():
            mask = load(path)
            save(path, np.where(mask == k, 0, mask).astype(np.uint8))
    return prepare


def nothing_in(split):
    """Masks of a part that are empty."""
    def prepare(folder):
        for row in read_rows(folder, split):
            path = folder / "set" / row["image"].replace("images", "masks")
            save(path, 0 * load(path))
    return prepare


def theirs(pixels=lambda mask: mask, names=slice(None)):
    """Predictions of the test images in theirs/."""
    def prepare(folder):
        for row in read_rows(folder)[names]:
            mask = load(folder / "set" / row["image"].replace("images", "masks"))
            save(folder / "theirs" / row["image"], pixels(mask))
    return prepare


def empty_folder(folder):
    (folder / "empty").mkdir()


THEIRS = (*WITH, "--predictions", "theirs")
ERRORS = {  # what is prepared (or None), flags, words of the sentence
    # data
    "no such folder": (None, ("--data", "nowhere"), ["nowhere", "no such"]),
    "empty folder": (empty_folder, ("--data", "empty"), ["empty", "understood"]),
    "unknown class id": (change(f"masks/{TRAIN}", lambda mask: mask + np.uint8(7) * (mask == 2)), WITH,
                         [f"masks/{TRAIN}", "9"]),
    "missing mask": (remove(f"masks/{TEST}"), WITH, [f"images/{TEST}", "no mask"]),
    "mask without image": (remove(f"images/{TEST}"), ("--data", "set", *NAMED), [f"masks/{TEST}", "without an image"]),
    "mask of another size": (change(f"masks/{TRAIN}", lambda mask: mask[:, :-1]), WITH,
                             [f"masks/{TRAIN}", "25 x 20", "26 x 20"]),
    "damaged mask": (write(f"set/masks/{TRAIN}", "no image"), WITH, [f"masks/{TRAIN}", "cannot"]),
    "damaged image": (write(f"set/images/{TRAIN}", "no image"), WITH, [f"images/{TRAIN}", "cannot"]),
    "a class in no mask": (without_class(2), WITH, ["s%tripe", "in no mask"]),
    "a class missing from train": (keep(lambda row: row["split"] != "train" or row["image"].endswith("_1.png")), WITH,
                                   ["s%tripe", "not in train"]),
    "nothing to validate by": (nothing_in("val"), WITH, ["no validation image shows anything but background"]),
    "nothing to test": (nothing_in("test"), WITH, ["no test image shows anything but background"]),
    "fewer groups than parts": (few_groups(2), ("--data", "few", *NAMED),
                                ["2 groups", "do not fill train, val and test"]),
    "no such split file": (None, ("--data", "set", "--split", "other.csv"), ["other.csv", "no such file"]),
    "odd split": (splits(split="later"), WITH, ["split.csv, line 5", "'later'"]),
    "unknown image": (splits(image="images/x.png"), WITH, ["split.csv, line 5", "no image images/x.png"]),
    "a group in two parts": (splits(split="test"), WITH, ["group 'p3'", "train", "test", "must not share a group"]),
    "no test part": (keep(lambda row: row["split"] != "test"), WITH, ["no test"]),
    "no pixel size of an image": (write("mm.csv", f"image,mm\nimages/{TRAIN},0.2\n"),
                                  (*WITH, "--pixel_sizes", "mm.csv"), ["mm.csv", "no pixel size"]),
    "too many shots": (None, (*WITH, "--shots", 11), ["--shots 11: there are 10 train images"]),
    "too many groups": (None, (*WITH, "--shots", 6, "--shots_by", "group"), ["--shots 6: there are 5 train groups"]),
    # models and predictions
    "no checkpoint": (None, (*DATA, "--ckpt", "other.pt"), ["other.pt", "no such checkpoint"]),
    "damaged checkpoint": (damage("a.pt"), WITH, ["a.pt", "damaged"]),
    "two models of one name": (None, (*DATA, "--ckpt", "x=a.pt", "x=none"), ["two models are called 'x'", "NAME=FILE"]),
    "no predictions": (None, THEIRS, ["theirs", "not a folder"]),
    "predictions lack an image": (theirs(names=slice(1, None)), THEIRS, ["theirs", "1 of 6 masks", f"images/{TEST}"]),
    "predictions of another size": (theirs(lambda mask: mask[:-1]), THEIRS,
                                    [f"theirs/images/{TEST}", "18 x 17", "18 x 18"]),
    "predictions of another class": (theirs(lambda mask: mask + np.uint8(2)), THEIRS,
                                     [f"theirs/images/{TEST}", "classes"]),
    # flags
    "features": (None, (*WITH, "--features", "x.npz"), ["--features: no such option"]),
    "unknown flag": (None, (*WITH, "--iter", 3), ["--iter: no such option"]),
    "no steps": (None, (*WITH, "--iters", 0), ["--iters must be at least 1"]),
    "all warm-up": (None, (*WITH, "--warmup_iters", 4), ["--warmup_iters 4 must be fewer than --iters 4"]),
    "no images in a batch": (None, (*WITH, "--batch_size", 0), ["--batch_size must be at least 1"]),
    "no shots": (None, (*WITH, "--shots", 0), ["--shots must be at least 1"]),
    "a split seed twice": (None, (*WITH, "--shots", 2, "--split_seed", 1, 1), ["--split_seed", "each once", "1 1"]),
    "negative Dice": (None, (*WITH, "--dice_weight", -1), ["--dice_weight must be at least 0"]),
    "no rate": (None, (*WITH, "--lr", 0), ["--lr must be positive"]),
    "all is dropped": (None, (*WITH, "--drop_path_rate", 1), ["--drop_path_rate is a share"]),
    **output_errors(finetune_seg, "seg", WITH, "split.csv"),
}
FLAGS = dict(masks="m", mask_pattern="{}_m.png", classes="head", exclude="*.jpg", group_regex="(.)", split="s.csv",
             pixel_sizes="mm.csv")
ERRORS.update({f"--{name} without --data": (None, (f"--{name}", value), [f"--{name}", "need --data"])
               for name, value in FLAGS.items()})


@pytest.mark.parametrize("prepare, flags, words", ERRORS.values(), ids=ERRORS)
def test_bad_input_is_one_sentence(tmp_path, capsys, prepare, flags, words):
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    if prepare:
        prepare(tmp_path)
    late = f"images/{TRAIN}" in words  # images are read when they are needed
    assert_one_sentence(finetune_seg, tmp_path, flags, words, capsys, ["split.csv"] * late)


def test_more_processes_than_images_in_a_batch(tmp_path, monkeypatch):
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    monkeypatch.setattr(runtime, "setup", lambda: (0, 6, torch.device("cpu")))
    with pytest.raises(ValueError, match="6 processes for batches of 5 images: --nproc_per_node 5 is the most"):
        run(tmp_path, *WITH)


@pytest.mark.parametrize("save_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, save_every):
    """Nothing of it is ever saved, however often that is done."""
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    flags = (*WITH, "--lr", "1e30", "--decoder_norm", "none", "--iters", 6, "--val_every", 6, "--save_every",
             save_every)
    with pytest.raises(ValueError, match=r"seg/a-seed0.pt, step \d: the loss is not finite; a lower --lr"):
        run(tmp_path, *flags)
    for path in (tmp_path / "seg").glob("*.pt"):
        state = checkpoint(path)["network"]
        assert all(value.isfinite().all() for value in state.values())


def test_a_file_that_is_no_segmenter(tmp_path):
    save_backbone(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: no finished run of finetune_seg.py"):
        segmenter.open_segmenter(str(tmp_path / "a.pt"), torch.device("cpu"))


def test_classes_missing_elsewhere_are_told(tmp_path):
    """In validation or test a class may be missing: one sentence for each."""
    save_set(tmp_path)
    save_backbone(tmp_path / "a.pt")
    keep(lambda row: row["split"] != "val" or row["image"].endswith("_1.png"))(tmp_path)
    output, report = run(tmp_path, *WITH)
    assert "class 's%tripe' has no val image" in output
    assert report["chosen"]["a"][0]["validation Dice"] >= 0


def test_defaults_follow_the_data():
    args = finetune_seg.get_args(["--data", "x"])
    assert (args.preset, args.iters, args.batch_size, args.warmup_iters) == ("ultradino", 20_000, 64, 1500)
    assert args.lr == 1e-4 and args.dice_weight == 1
    assert (args.drop_path_rate, args.layer_decay, args.weight_decay, args.val_every) == (0.4, 0.99, 0.01, 450)
    assert finetune_seg.get_args([]).preset == "cpu" and finetune_seg.get_args([]).iters <= 500
    assert finetune_seg.get_args(["--iters", "300"]).iters == 300  # a flag goes before a preset
