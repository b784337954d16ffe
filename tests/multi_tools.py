"""What the tests of finetune_multi.py share: a small FMC_UIA tree on disk, main() called here, strict equality."""
import csv
import functools
import json
import pathlib

import numpy as np
import pytest
import stage_tools
import torch
from file_tools import save
from stage_tools import run_main, save_rows

import finetune_multi
from frames import phantom
from labelled.fmc_uia import Task
from scores import multi_report

SIDE, PATIENTS = 32, 36
TASKS = [Task("FUGC", "regression", 2), Task("fetal_head", "segmentation", 3),
         Task("fetal_plane_cls", "classification", 3), Task("thyroid_nodule", "detection", 1)]  # as they are read
NAMES = [task.name for task in TASKS]
CLINICAL = {"clinical-OB": NAMES[:3], "task-thyroid_nodule": NAMES[3:]}  # as the project's file has them
DATA = ("--data", "fmc")
QUICK = ("--img_size", 16, "--iters", 4, "--batch_size", 5, "--val_every", 2, "--save_every", 3, "--channels", 32,
         "--experts", 2, "--task_dim", 4, "--lr", "1e-3", "--backbone_lr", "1e-3", "--val_fraction", 0.25,
         "--test_fraction", 0.25)
BASIC = (*DATA, "--ckpt", "a.pt", *QUICK)


@pytest.fixture(autouse=True, scope="module")
def few_replicates():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_report, "REPLICATES", 50)
        patch.setattr(multi_report, "FLIPS", 50)
        yield


# ---------------------------------------------------------------- a tree as the challenge's

@functools.cache
def drawn():
    """Two phantoms of each patient: {number: (image uint8 (h, w), patient)} of many sizes, {task: {number: target}}."""
    images, groups, tasks = phantom.phantom_tasks(3 * PATIENTS, SIDE, seed=11)
    kept = [i for i, patient in enumerate(groups) if (groups[:i] == patient).sum() < 2]
    sizes = {i: (SIDE + i % 7, SIDE + 2 * (i % 5)) for i in kept}  # height, width

    def larger(image, i):  # black at the right and below: no coordinate changes
        return np.pad(image, [(0, own - SIDE) for own in sizes[i]])

    found = {}
    for task, own in zip(TASKS, ("femur", "structures", "planes", "heart")):
        _, _, rows, targets = tasks[f"phantom {own}"]
        found[task.name] = {i: target for i, target in zip(rows.tolist(), targets) if i in sizes}
    found["fetal_head"] = {i: larger(thirds(mask), i) for i, mask in found["fetal_head"].items()}
    found["fetal_plane_cls"] = {i: int(label) // 2 for i, label in found["fetal_plane_cls"].items()}
    return {i: (larger(images[i], i), int(groups[i])) for i in kept}, found


def thirds(mask):
    """A phantom's structures as three classes of about a third of all pixels each, so that networks of a few steps say
    all of them; the second is missing where the phantom has no structure."""
    shape, found = np.array(mask.shape), np.zeros_like(mask)
    found[shape[0] // 8:] = 2 * mask.any()
    found[:, :shape[1] // 3][mask[:, :shape[1] // 3] == 0] = 1
    return np.where(mask > 0, 1, found).astype(np.uint8)


def name_of(i, patient):
    return f"Classification/fetal planes/case {patient:02} (view {i}).png"


def save_tree(root, kept=None, labelled=True, grouped=True):
    """Images, masks and a CSV per task. kept: only these images, named from the root. labelled False: places alone;
    grouped False: patients stand in the images' names only."""
    (images, targets), rows = drawn(), {}
    for i, (image, patient) in images.items():
        if kept is None or name_of(i, patient) in kept:
            save(root / name_of(i, patient), image)
    for task in TASKS:
        for i, target in targets[task.name].items():
            name, mask = name_of(i, images[i][1]), f"Segmentation/fetal head/masks/{i}.png"
            if kept is not None and name not in kept:
                continue
            row = dict(image_path=f"../{name}", task_id=task.name, num_classes=task.K,
                       task_name="Regression" if task.kind == "regression" else task.kind)
            if grouped:
                row["group"] = f"p{images[i][1]}"
            if task.kind == "segmentation":
                row["mask_path"] = f"../{mask}"
            rows.setdefault(task.name, []).append(row)
            if labelled:
                row.update(label_cells(task, target))
                if task.kind == "segmentation":
                    save(root / mask, target)
    (root / "csv_files").mkdir(parents=True)
    for name, own in rows.items():
        save_rows(root / "csv_files" / f"{name}.csv", own)
    return root


def label_cells(task, target):
    """The columns of one row's label."""
    if task.kind == "classification":
        return dict(mask=target)
    if task.kind == "detection":
        return dict(zip(("x_min", "y_min", "x_max", "y_max"), target.tolist()))
    return {f"point_{k + 1}_xy": json.dumps(point.tolist()) for k, point in enumerate(target)} \
        if task.kind == "regression" else {}


def save_all(folder):
    """fmc/ and a.pt, a backbone."""
    save_tree(folder / "fmc")
    stage_tools.save_backbone(folder / "a.pt")
    return folder


# ---------------------------------------------------------------- running, and what is left

def strict_json(text):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def run(folder, *flags, received=()):
    """main() in this process, in `folder`: what it prints, {name: report} of its JSON files."""
    output, _ = run_main(finetune_multi, folder, *flags, received=received)
    flags = [str(flag) for flag in flags]
    return output, reports_of(folder / (flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else "multi"))


def reports_of(folder):
    return {path.stem: strict_json(path.read_text()) for path in folder.glob("*.json")}


def read_log(path):
    return [strict_json(line) for line in pathlib.Path(path).read_text().splitlines()]


def read_split(folder):
    """split.csv: [{image, group, split}]."""
    with open(folder / "split.csv", newline="") as file:
        return list(csv.DictReader(file))


def names_in_test(folder):
    return {row["image"] for row in read_split(folder) if row["split"] == "test"}


def assert_equal(a, b, where="", rel=0.0):
    """Nested dicts and lists of tensors and plain values, to the bit, or numbers within a share; nan equals nan."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where} {key}", rel)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f"{where} {i}", rel)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), where
    elif rel and isinstance(a, float) and isinstance(b, float):
        assert a == pytest.approx(b, rel=rel, abs=rel), where
    else:
        assert a == b, (where, a, b)
