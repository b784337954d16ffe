"""What the tests of finetune_seg.py share: a small set with masks, scores written out by hand, main() called here."""
import contextlib
import csv
import io
import json
import sys

import numpy as np
import pytest
import sklearn.metrics
import torch
from PIL import Image

import finetune_seg
import kernels
import runtime

CLASSES = ("bo_x", "s%tripe")
NAMED = ("--classes", "bo_x=1", "s%tripe=2")
DATA = ("--data", "set", "--split", "split.csv", *NAMED)
QUICK = ("--iters", 4, "--batch_size", 5, "--warmup_iters", 1, "--val_every", 2, "--save_every", 1, "--lr", "1e-3",
         "--img_size", 16, "--channels", 8)
SPLITS = ("test", "train", "val", "train", "train", "test", "train", "val", "train", "test")  # of patients, who have
# two images each, of which the second shows no stripe


def save_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def draw(rng, stripe, shape):
    """Speckle, a brighter box, a broad stripe brighter still: image and mask uint8 of that shape.

    Each is a third of all pixels, so that a network of a few steps says all three.
    """
    (h, w), mask = shape, np.zeros(shape, np.uint8)
    y, x = rng.integers(1, 4, 2)
    mask[y:y + 3 * h // 4, x:x + 7 * w // 9] = 1
    if stripe:
        mask[h // 3:] = 2
    return (rng.integers(0, 70, shape) + 85 * mask).astype(np.uint8), mask


def save_set(folder):
    """set/images, set/masks of class numbers, split.csv; images of two sizes, SECRET in their names."""
    rng, rows = np.random.default_rng(0), []
    for patient, split in enumerate(SPLITS):
        for k in range(2):
            name = f"SECRET{patient}_{k}.png"
            image, mask = draw(rng, k == 0, (20, 26) if patient % 2 else (18, 18))
            save_image(folder / "set" / "images" / name, image)
            save_image(folder / "set" / "masks" / name, mask)
            rows.append(dict(image=f"images/{name}", split=split, group=f"p{patient}"))
    return save_rows(folder / "split.csv", rows)


def save_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def read_rows(folder, split="test"):
    with open(folder / "split.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["split"] == split]


def load(path):
    with Image.open(path) as file:
        return np.asarray(file)


def masks_of(folder, split="test"):
    return [load(folder / "set" / row["image"].replace("images", "masks")) for row in read_rows(folder, split)]


def pooled_f1(truths, masks, labels=(1, 2)):
    """Mean Dice of the classes over the pixels of all images together, by scikit-learn."""
    truth, mask = (np.concatenate([own.ravel() for own in all_of]) for all_of in (truths, masks))
    return sklearn.metrics.f1_score(truth, mask, labels=labels, average=None, zero_division=0).mean()


def image_dice(truths, masks, labels=(1, 2)):
    """Mean over classes of the mean over the images whose truth shows the class, by scikit-learn."""
    return np.mean([np.mean([sklearn.metrics.f1_score((truth == k).ravel(), (mask == k).ravel())
                             for truth, mask in zip(truths, masks) if (truth == k).any()]) for k in labels])


def checkpoint(path):
    return torch.load(path, weights_only=True)


def spy(monkeypatch, owner, name, note):
    """Call note(arguments..., result) after each call of owner.name."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        note(*args, result=result)
        return result

    monkeypatch.setattr(owner, name, call)


def predicted(folder, name, split="test"):
    return [load(folder / "seg" / "masks" / name / row["image"]) for row in read_rows(folder, split)]


def equal(a, b):
    """Whether two dicts of tensors are, nan being equal to nan."""
    return a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(7), b[key].nan_to_num(7)) for key in a)


def run(folder, *flags, received=()):
    """main() in this process, in `folder`: what it prints, and its JSON, strictly read (None: it wrote none)."""
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    flags = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["finetune_seg.py", *flags])
        patch.setattr(runtime, "stop_on_signals", lambda: received)
        kernels.use_reference(True)
        finetune_seg.main(finetune_seg.get_args(flags))
    path = folder / "seg" / "finetune_seg.json"
    return out.getvalue(), json.loads(path.read_text(), parse_constant=refuse) if path.exists() else None
