"""What the tests of finetune_cls.py share: a small labelled set, checkpoints of small networks, main() called here."""
import contextlib
import csv
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import finetune_cls
import kernels
import runtime
from model import VisionTransformer

CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, init_values=0.5)
CLASSES = ("alpha", "be_ta", "c%l")
QUICK = ("--epochs", 2, "--batch_size", 10, "--warmup_epochs", 0, "--lr", "1e-3", "--img_size", 16)
PATIENTS = {"train": 5, "val": 2, "test": 3}  # of each class, with two images each


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of a network this small, two threads on busy cores mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_backbone(path, seed=1, **changes):
    torch.manual_seed(seed)
    state = {f"backbone.{key}": value for key, value in VisionTransformer(**CONFIG).state_dict().items()}
    checkpoint = {"teacher": state, "config": CONFIG, "mean": 0.3, "std": 0.2, "step": 12, "seen": None}
    runtime.save_checkpoint(path, {**checkpoint, **changes})
    return path


def save_rows(folder, rows, name="set.csv"):
    with open(folder / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


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
    save_rows(folder, rows, "machines.csv")
    return save_rows(folder, [{key: row[key] for key in row if key != "machine"} for row in rows])


def read_rows(folder, split="test"):
    with open(folder / "set.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def save_predictions(path, rows, header, score):
    """score(row): what follows the image's name in its line."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *([row["image"], *score(row)] for row in rows)])


def run(folder, *flags, received=()):
    """main() in this process, in `folder`: what it prints, and its JSON, strictly read (None: it wrote none)."""
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    flags = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["finetune_cls.py", *flags])
        patch.setattr(runtime, "stop_on_signals", lambda: received)
        kernels.use_reference(True)
        finetune_cls.main(finetune_cls.get_args(flags))
    path = folder / "cls" / "finetune_cls.json"
    return out.getvalue(), json.loads(path.read_text(), parse_constant=refuse) if path.exists() else None
