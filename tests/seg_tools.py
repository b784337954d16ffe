"""What the tests of finetune_seg.py share: a small set with masks, scores written out by hand, main() called here."""
import numpy as np
import pytest
import sklearn.metrics
import stage_tools
from file_tools import save
from PIL import Image
from stage_tools import run_main, save_rows

import finetune_seg
from labelled import mask_sets

CLASSES = ("bo_x", "s%tripe")
NAMED = ("--classes", "bo_x=1", "s%tripe=2")
DATA = ("--data", "set", "--split", "split.csv", *NAMED)
QUICK = ("--iters", 4, "--batch_size", 5, "--warmup_iters", 1, "--val_every", 2, "--save_every", 1, "--lr", "1e-3",
         "--img_size", 16, "--channels", 8)
PARTS = ("test", "train", "val", "train", "train", "test", "train", "val", "train", "test")  # of patients, who have
# two images each, of which the second shows no stripe


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
    for patient, split in enumerate(PARTS):
        for k in range(2):
            name = f"SECRET{patient}_{k}.png"
            image, mask = draw(rng, k == 0, (20, 26) if patient % 2 else (18, 18))
            save(folder / "set" / "images" / name, image)
            save(folder / "set" / "masks" / name, mask)
            rows.append(dict(image=f"images/{name}", split=split, group=f"p{patient}"))
    return save_rows(folder / "split.csv", rows)


def read_rows(folder, *splits):
    """Of split.csv, without a split those of the test."""
    return stage_tools.read_rows(folder / "split.csv", *(splits or ["test"]))


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


def predicted(folder, name, split="test"):
    return [load(folder / "seg" / "masks" / name / row["image"]) for row in read_rows(folder, split)]


def run(folder, *flags, received=()):
    return run_main(finetune_seg, folder, *flags, received=received)


def arguments(*flags, size=16):
    args = finetune_seg.get_args([*map(str, (*DATA, "--img_size", size, *flags))])
    args.dtype = "float32"
    return args


@pytest.fixture
def data(tmp_path, monkeypatch):
    save_set(tmp_path)
    monkeypatch.chdir(tmp_path)
    return mask_sets.open_data(arguments())
