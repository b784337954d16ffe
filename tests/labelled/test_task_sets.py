"""A set of many tasks: phantoms, parts, batches whose targets follow their images, digests."""

import argparse

import numpy as np
import pytest
import torch
from file_tools import save
from stage_tools import one_thread, save_rows  # noqa: F401

from labelled import task_sets
from labelled.fmc_uia import Task
from labelled.task_sets import Data, TaskData, digest_of, flips, make_batch, moved_target

CPU, STATS, SIDE = torch.device("cpu"), (0.4, 0.25), 64
KINDS = {"segmentation": 3, "classification": 4, "detection": 1, "regression": 2}
AUGMENTED = argparse.Namespace(augment=True, no_flip=["sides"])
PHANTOMS = {"phantom structures": "segmentation", "phantom planes": "classification", "phantom heart": "detection",
            "phantom femur": "regression"}


def arguments(**changes):
    return argparse.Namespace(**{**dict(data=None, tasks=None, group_regex=None, groups=None, skip_wrong_rows=False,
                                        img_size=32, test_seed=0, val_fraction=0.2, test_fraction=0.2), **changes})


@pytest.fixture(scope="module")
def phantoms():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task_sets, "PHANTOM_IMAGES", 216)
        patch.setattr(task_sets, "PHANTOM_SIZE", 48)
        yield task_sets.open_data(arguments(), clinical=True)


def bright(n):
    """n images of a bright rectangle on black, each the mask of itself: canvases, boxes (n, 4) in shares."""
    rng, canvases = np.random.default_rng(0), np.zeros((n, SIDE, SIDE), np.uint8)
    low = rng.integers(6, SIDE // 2 - 8, (n, 2))
    high = low + rng.integers(12, SIDE // 2, (n, 2))
    for canvas, (x_min, y_min), (x_max, y_max) in zip(canvases, low, high):
        canvas[y_min:y_max, x_min:x_max] = 250
    return canvases, np.concatenate((low, high), 1) / SIDE


def task_of(kind, n, name="any"):
    """(Task, TaskData, canvases) whose targets are of the bright rectangles."""
    canvases, boxes = bright(n)
    target = {"segmentation": (canvases > 0).astype(np.uint8), "classification": np.arange(n) % 4, "detection": boxes,
              "regression": boxes.reshape(n, 2, 2)}[kind]  # points: upper left and lower right
    rows = np.arange(n)
    return Task(name, kind, KINDS[kind]), TaskData(rows, target, target, rows, rows[:1], rows[:1]), canvases


def batch_of(task, own, canvases, part=slice(None), seed=3, turn=5, args=AUGMENTED):
    n = len(own.images)
    rows = np.arange(n)[part]
    return make_batch(task, own, canvases, rows, part, seed, turn, n, args, STATS, CPU)


def grey_of(x):
    return ((x[:, 0] * STATS[1] + STATS[0]) * 255).numpy()


# ---------------------------------------------------------------- what is opened

def test_phantoms_without_flags(phantoms):
    assert {task.name: task.kind for task in phantoms.tasks} == PHANTOMS
    assert set(phantoms.clinical) == set(PHANTOMS) and phantoms.layout == "phantoms" and phantoms.notes == []
    home, canvases = {}, phantoms.images.at(32)
    for task, own in zip(phantoms.tasks, phantoms.per):
        m = len(own.images)
        shape = {"segmentation": (m, 32, 32), "classification": (m,), "detection": (m, 4), "regression": (m, 2, 2)}
        assert own.target.shape == shape[task.kind] and canvases.shape == (216, 32, 32)
        assert sorted(np.concatenate((own.train, own.val, own.test))) == list(range(m))
        for part in ("train", "val", "test"):
            images = own.images[getattr(own, part)]
            assert len(images) >= 2
            for image in images:  # of all tasks together, no image and no patient on two sides
                for key in (("image", image), ("group", phantoms.groups[image]), ("unit", phantoms.units[image])):
                    assert home.setdefault(key, part) == part, key
        if task.kind in ("detection", "regression"):
            assert 0 <= own.target.min() and own.target.max() <= 1
            np.testing.assert_allclose(own.truth, own.target * 48)
    number = phantoms.tasks.index(Task("phantom structures", "segmentation", 5))
    segmented = phantoms.per[number]
    shares = task_sets.class_shares(phantoms.tasks[number], segmented)
    want = [(segmented.target[segmented.train] == k).mean() for k in range(5)]
    np.testing.assert_allclose(shares, want)
    assert task_sets.class_shares(Task("any", "detection", 1), segmented) is None


def test_phantom_tasks_can_be_chosen(monkeypatch):
    monkeypatch.setattr(task_sets, "PHANTOM_IMAGES", 60)
    found, _ = task_sets.open_phantoms(arguments(tasks=["phantom femur"]))
    assert [task.name for task in found.tasks] == ["phantom femur"]
    with pytest.raises(ValueError, match="--tasks liver: phantoms have phantom structures, phantom planes"):
        task_sets.open_phantoms(arguments(tasks=["phantom heart", "liver"]))


def test_files_are_opened_at_their_own_size(tmp_path):
    """Sizes differ: targets are shares of each image's own sides, truth its pixels; masks are read when asked for."""
    rng, det, seg = np.random.default_rng(0), [], []
    for i in range(9):
        shape = (20 + i, 50 - 3 * i)
        mask = np.zeros(shape, np.uint8)
        mask[4:, :20] = 1
        save(tmp_path / f"images/{i}.png", rng.integers(0, 255, shape).astype(np.uint8))
        save(tmp_path / f"masks/{i}.png", mask)
        about = dict(image_path=f"../images/{i}.png", group=f"p{i}")
        det.append({**about, "task_id": "box", "task_name": "detection", "num_classes": 1, "x_min": 2, "y_min": 5,
                    "x_max": 20, "y_max": 15})
        seg.append({**about, "task_id": "fetal_head", "task_name": "segmentation", "num_classes": 2,
                    "mask_path": f"../masks/{i}.png"})
    (tmp_path / "csv_files").mkdir()
    save_rows(tmp_path / "csv_files/det.csv", det)
    save_rows(tmp_path / "csv_files/seg.csv", seg)
    save_rows(tmp_path / "groups.csv", [dict(task="fetal_head", group="OB")])
    args = arguments(data=str(tmp_path), groups=str(tmp_path / "groups.csv"), img_size=16)
    data = task_sets.open_data(args, clinical=False)
    box, head = (data.per[[task.name for task in data.tasks].index(name)] for name in ("box", "fetal_head"))
    assert data.sizes.tolist() == [[50 - 3 * i, 20 + i] for i in range(9)]
    np.testing.assert_allclose(box.target, [[2 / (50 - 3 * i), 5 / (20 + i), 20 / (50 - 3 * i), 15 / (20 + i)]
                                            for i in range(9)])
    assert [head.truth[row].shape for row in range(9)] == [(20 + i, 50 - 3 * i) for i in range(9)]
    assert head.target.shape == (9, 16, 16) and head.target[0, :, 5].tolist() == [0] * 3 + [1] * 13
    assert head.target[0, 15].tolist() == [1] * 6 + [0] * 10
    assert data.clinical == {"box": task_sets.NO_GROUP, "fetal_head": "OB"}
    with pytest.raises(ValueError, match="has no group of box"):
        task_sets.open_data(args, clinical=True)


def test_a_part_that_shows_nothing_is_named():
    task, own, _ = task_of("segmentation", 6)
    target = own.target.copy()
    target[4:] = 0
    blank = own._replace(target=target, train=np.arange(3), val=np.array([3, 4]), test=np.array([4, 5]))
    for changed, part in ((blank, "test"), (blank._replace(val=np.array([5])), "validation")):
        with pytest.raises(ValueError, match=f"task any: no {part} image shows anything but background; give more"):
            task_sets.check_parts(task, changed)
    task_sets.check_parts(task, blank._replace(test=np.array([0, 5])))
    task, own, _ = task_of("regression", 6)
    target = own.target.copy()
    target[:3, 1], target[3] = np.nan, np.nan
    rows = own._replace(target=target, train=np.arange(2, 5), val=np.array([0, 5]), test=np.array([0]))
    task_sets.check_parts(task, rows)  # an image of the test may lack a point
    for changed, part, point in ((dict(train=np.arange(3)), "train", 2), (dict(test=np.array([3])), "test", 1)):
        with pytest.raises(ValueError, match=f"task any: no {part} image has point {point}; give more"):
            task_sets.check_parts(task, rows._replace(**changed))


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("kind", KINDS)
def test_no_augmentation_is_the_canvas_itself(kind):
    task, own, canvases = task_of(kind, 6)
    x, target = batch_of(task, own, canvases, args=argparse.Namespace(augment=False, no_flip=[]))
    assert x.shape == (6, 1, SIDE, SIDE) and x.dtype == torch.float32
    np.testing.assert_allclose(x[:, 0], (canvases / 255 - 0.4) / 0.25, atol=1e-6)
    np.testing.assert_allclose(target, own.target, atol=1e-7)
    assert target.dtype == (torch.int64 if kind in ("segmentation", "classification") else torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_cut_one_batch_of_the_tasks_own_turn(kind):
    """Draws depend on seed and on how many batches the task had; not on which task it is, nor on those beside it."""
    task, own, canvases = task_of(kind, 9)
    x, target = batch_of(task, own, canvases)
    for part in (slice(0, 4), slice(4, 9), slice(8, 9)):
        part_x, part_target = batch_of(task, own, canvases, part)
        assert torch.equal(part_x, x[part]) and torch.equal(part_target.nan_to_num(7), target[part].nan_to_num(7))
    for how in ({}, dict(turn=6), dict(seed=4)):
        assert torch.equal(batch_of(task, own, canvases, **how)[0], x) == (not how)
    renamed = Task("another", kind, task.K)
    assert torch.equal(batch_of(renamed, own, canvases)[0], x)


@pytest.mark.parametrize("kind, name, mirrored", [
    ("segmentation", "any", True), ("classification", "any", True), ("detection", "any", True),
    ("regression", "any", False), ("segmentation", "sides", False), ("classification", "sides", False),
    ("detection", "sides", False)])
def test_mirror_images(kind, name, mirrored):
    """Of an image that is bright on its left: no other augmentation changes which half is the brighter one."""
    task, own, _ = task_of(kind, 40, name)
    canvases = np.full((40, SIDE, SIDE), 20, np.uint8)
    canvases[:, :, :SIDE // 2] = 220
    grey = grey_of(batch_of(task, own, canvases)[0])
    halves = [half[:, :, 8:].mean((1, 2)) for half in (grey[:, 16:48, :24], grey[:, 16:48, ::-1][:, :, :24])]
    turned = (halves[1] > halves[0]).sum()
    assert flips(task, AUGMENTED) == mirrored and not flips(task, argparse.Namespace(augment=False, no_flip=[]))
    assert (10 < turned < 30) if mirrored else turned <= 2, turned


def seen_boxes(grey):
    """Of what is bright in each image: (n, 4) in shares, nan of none."""
    boxes = np.full((len(grey), 4), np.nan)
    for box, image in zip(boxes, grey > 70):
        rows, columns = np.nonzero(image)
        if len(rows):
            box[:] = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / SIDE
    return boxes


@pytest.mark.parametrize("kind", ["segmentation", "detection", "regression"])
def test_targets_follow_what_is_seen(kind, monkeypatch):
    """The box of what is bright in the augmented picture, of which two corners are the points."""
    draw = task_sets.draw_augment
    monkeypatch.setattr(task_sets, "draw_augment", lambda rng, n, flip: draw(rng, n, light=0, gamma=0, flip=flip))
    task, own, canvases = task_of(kind, 120)
    x, target = batch_of(task, own, canvases)
    grey, target = grey_of(x), target.double().numpy()
    assert (np.abs(grey - canvases).max((1, 2)) > 60).mean() > 0.6  # most are moved
    if kind == "segmentation":
        assert ((grey > 125) != target.astype(bool)).mean() < 0.015
        return
    target, seen = target.reshape(120, 4), seen_boxes(grey)
    known = ~np.isnan(target)
    assert np.abs(seen - target)[known].max() < 2 / SIDE and 0 <= target[known].min() and target[known].max() <= 1
    assert (np.abs(target - own.target.reshape(120, 4)).max(1) > 0.05).mean() > 0.5
    assert known.all() if kind == "detection" else 0.8 < known.mean() < 1  # a corner that has left is missing


def test_images_that_would_lose_their_target_stay():
    """Shifted out of sight: target and draws of that image alone are put back; a point outside becomes nan."""
    n, eye = 4, np.tile(np.eye(2, 3, dtype=np.float32), (4, 1, 1))
    base = dict(affine=eye, grid=np.zeros((n, 2, 6), np.float32), flip=np.ones(n, np.float32))
    base["grid"][2] = 0.02
    base["affine"][1:3, 1, 2] = -0.45, -0.55  # to the left, share of the width: rows 1 and 2; x is mirrored after that
    boxes = np.tile([0.1, 0.2, 0.6, 0.4], (n, 1))
    draws = {key: value.copy() for key, value in base.items()}
    moved = moved_target(Task("det", "detection", 1), boxes, draws, SIDE)
    np.testing.assert_allclose(moved, [[0.4, 0.2, 0.9, 0.4], [0.85, 0.2, 1.0, 0.4], [0.1, 0.2, 0.6, 0.4],
                                       [0.4, 0.2, 0.9, 0.4]], atol=1e-6)  # 0.3 of row 1 is left, 0.1 of row 2
    assert draws["flip"].tolist() == [1, 1, 0, 1] and np.array_equal(draws["affine"][2], np.eye(2, 3))
    assert not draws["grid"].any()
    assert np.array_equal(draws["affine"][[0, 1, 3]], base["affine"][[0, 1, 3]])
    points = np.tile([[0.1, 0.2], [0.5, 0.5]], (n, 1, 1))
    points[3, 0] = np.nan
    draws = {key: value.copy() for key, value in base.items()}
    moved = moved_target(Task("reg", "regression", 2), points, draws, SIDE)
    gone = [np.nan, np.nan]
    np.testing.assert_allclose(moved, [[[0.9, 0.2], [0.5, 0.5]], [gone, [0.95, 0.5]], [[0.1, 0.2], [0.5, 0.5]],
                                       [gone, [0.5, 0.5]]], atol=1e-6)
    assert draws["flip"].tolist() == [1, 1, 0, 1] and np.array_equal(draws["affine"][2], np.eye(2, 3))
    assert not draws["grid"].any()


def test_classes_are_not_moved_and_boxes_and_points_stay_upright(monkeypatch):
    for kind in KINDS:
        made, draw = [], task_sets.draw_affine
        monkeypatch.setattr(task_sets, "draw_affine", lambda *a, **how: made.append(draw(*a, **how)) or made[0])
        batch_of(*task_of(kind, 50))
        monkeypatch.undo()
        moved = (made[0] != np.eye(2, 3)).any((1, 2)).mean()
        slanted = (made[0][:, [0, 1], [1, 0]] != 0).any(1).mean()
        assert moved == 0 if kind == "classification" else 0.3 < moved < 0.7
        assert slanted == (moved if kind == "segmentation" else 0)


# ---------------------------------------------------------------- digests

def test_a_digest_is_of_all_that_a_run_sees():
    made = [task_of(kind, 8, kind) for kind in KINDS]
    canvases = np.concatenate([own for _, _, own in made])
    per = [own._replace(images=own.images + 8 * i) for i, (_, own, _) in enumerate(made)]
    tasks, units, sizes = [task for task, _, _ in made], np.arange(32) // 2, np.full((32, 2), 40)
    data = Data(tasks, None, None, "", units, sizes, None, per, None, "", [])
    whole, first = digest_of(data, range(4), canvases), digest_of(data, [0], canvases)
    assert whole == digest_of(data._replace(units=5 * data.units + 3), range(4), canvases)  # whoever else has a number
    assert whole == digest_of(data, range(4), canvases.copy()) != first != digest_of(data, [1], canvases)
    for number in range(4):
        image, target, units, sizes = (x.copy() for x in (canvases, per[number].target, data.units, data.sizes))
        image[8 * number + 2, 5, 7] ^= 1
        target.flat[3] += 1
        units[8 * number + 3], sizes[8 * number] = 99, 41
        changed = [(data, image), (data._replace(units=units), canvases), (data._replace(sizes=sizes), canvases),
                   (data._replace(tasks=[*tasks[:number], tasks[number]._replace(K=9), *tasks[number + 1:]]), canvases)]
        for change in (dict(target=target), dict(train=per[number].train[:-1]), dict(val=np.array([1])),
                       dict(test=np.array([1]))):
            parts = [*per[:number], per[number]._replace(**change), *per[number + 1:]]
            changed.append((data._replace(per=parts), canvases))
        for other, images in changed:
            assert digest_of(other, range(4), images) != whole
            assert (digest_of(other, [0], images) != first) == (number == 0)  # another task's data is nothing to it
