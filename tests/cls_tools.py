"""What the tests of finetune_cls.py share: a small labelled set, predictions of others, main() called here."""
import csv

import numpy as np
import stage_tools
from PIL import Image
from stage_tools import run_main, save_rows

import finetune_cls

CLASSES = ("alpha", "be_ta", "c%l")
QUICK = ("--epochs", 2, "--batch_size", 10, "--warmup_epochs", 0, "--lr", "1e-3", "--img_size", 16)
PATIENTS = {"train": 5, "val": 2, "test": 3}  # of each class, with two images each


def save_set(folder):
    """set.csv, machines.csv with a column more, and their images: brighter in later classes, SECRET in their names."""
    rng, rows = np.random.default_rng(0), []
    (folder / "png").mkdir(parents=True)
    for k, label in enumerate(CLASSES):
        splits = [split for split, patients in PATIENTS.items() for _ in range(patients)]
        for patient, split in enumerate(splits):
            for image in range(2):
                name = f"png/SECRET{k}{patient}{image}.png"
                grey = rng.integers(0, 80, (18, 20)) + 40 * k + rng.integers(0, 90)  # classes overlap
                Image.fromarray(grey.astype(np.uint8)).save(folder / name)
                rows.append(dict(image=name, label=label, group=f"p{k}{patient}", split=split,
                                 machine="one" if patient == 7 and k == 0 else "many"))
    save_rows(folder / "machines.csv", rows)
    return save_rows(folder / "set.csv", [{key: row[key] for key in row if key != "machine"} for row in rows])


def read_rows(folder, *splits):
    """Of set.csv, without a split those of the test."""
    return stage_tools.read_rows(folder / "set.csv", *(splits or ["test"]))


def save_predictions(path, rows, header, score):
    """score(row): what follows the image's name in its line."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *([row["image"], *score(row)] for row in rows)])


def run(folder, *flags, received=()):
    return run_main(finetune_cls, folder, *flags, received=received)
