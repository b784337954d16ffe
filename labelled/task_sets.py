"""A set of many tasks as a run sees it: images and targets, squashed; its parts; batches; what a blind guess is."""

import collections
import hashlib

import numpy as np
import torch
from PIL import Image

from frames import phantom
from frames.images import Frame, read_image
from frames.packed import AUGMENT, BatchRows, philox
from labelled.augment import augment_pair, draw_affine, draw_augment, move_boxes, move_points, normalise_only
from labelled.fmc_uia import Rows, Task, TaskSet, read_groups, read_task_mask, read_tasks, split_tasks
from labelled.mask_sets import squash
from labelled.store import Images

PHANTOM_SEED, PHANTOM_IMAGES, PHANTOM_SIZE = 4_000_000, 720, 64  # none of the other stages' phantoms
PHANTOM_GROUPS = {"phantom structures": "torso", "phantom heart": "torso", "phantom planes": "others",
                  "phantom femur": "others"}
NO_GROUP = "no group"  # clinical, of tasks that the file of groups does not list
LEVELS = 20  # thresholds that a mean mask is cut at
KEPT = 0.25  # share of a moved box that must stay in the image, else this image is not moved

# tasks: [Task]; n different images: names, groups, units (n,) numbers of groups, sizes (n, 2) width and height, images:
# store.Images; per: a TaskData for each task; clinical: {task: group} or None; notes: sentences for the screen
Data = collections.namedtuple("Data", "tasks names groups grouped_by units sizes images per clinical layout notes")
# m rows: images (m,) into Data's. target: masks uint8 (m, S, S), labels int64 (m,), boxes (m, 4) or points (m, K, 2) as
# shares of the sides. truth: the same at the image's own size, in pixels; truth[row] is one. train, val, test: rows
TaskData = collections.namedtuple("TaskData", "images target truth train val test")


# ---------------------------------------------------------------- images, targets, parts

def open_data(args, clinical):
    """The set of args.data, split by groups; `clinical`: whether each task must have a clinical group."""
    found, load = open_phantoms(args) if args.data is None else open_files(args)
    splits, notes = split_tasks(found, args.test_seed, args.val_fraction, args.test_fraction)
    units = np.unique(found.groups, return_inverse=True)[1]
    per = [task_data(task, found.rows[task.name], found.sizes, np.array(splits), args.img_size) for task in found.tasks]
    for task, own in zip(found.tasks, per):
        check_parts(task, own)
    if args.data is None:
        groups = PHANTOM_GROUPS
    else:
        groups = read_groups(args.groups, found.tasks, None if clinical else NO_GROUP)
    return Data(found.tasks, found.names, found.groups, found.grouped_by, units, found.sizes,
                Images(len(found.names), load), per, groups, args.data or "phantoms", [*found.wrong, *notes])


def open_files(args):
    found = read_tasks(args.data, args.group_regex, args.tasks, args.skip_wrong_rows)
    return found, lambda i: read_image(found.paths[i])


def open_phantoms(args):
    canvases, groups, drawn = phantom.phantom_tasks(PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED)
    if unknown := {*(args.tasks or ())} - {*drawn}:
        raise ValueError(f"--tasks {' '.join(sorted(unknown))}: phantoms have {', '.join(drawn)}")
    kept = {name: own for name, own in drawn.items() if not args.tasks or name in args.tasks}
    used = np.unique(np.concatenate([rows for _, _, rows, _ in kept.values()]))  # by any of these tasks
    found = TaskSet([Task(name, kind, K) for name, (kind, K, _, _) in kept.items()], paths=None,
                    names=[f"phantom {i}" for i in used], sizes=np.full((len(used), 2), PHANTOM_SIZE),
                    groups=[str(groups[i]) for i in used], grouped_by="phantom patient", splits=None, wrong=[],
                    csv_folder=None,
                    rows={name: Rows(np.searchsorted(used, rows), targets, None, None, None)
                          for name, (_, _, rows, targets) in kept.items()})
    return found, lambda i: Frame(canvases[used[i]], canvases[used[i]])


def task_data(task, rows, sizes, splits, size):
    own, truth = sizes[rows.images], rows.targets  # (m, 2)
    if task.kind == "segmentation":
        if isinstance(truth, list):  # of files
            truth = FileMasks(truth, task.K)
        target = squash(truth.__getitem__, len(own), size)
    elif task.kind == "classification":
        target = truth
    else:
        target = truth / (np.tile(own, 2) if task.kind == "detection" else own[:, None])
    parts = [np.flatnonzero(splits[rows.images] == part) for part in ("train", "val", "test")]
    return TaskData(rows.images, target, truth, *parts)


def check_parts(task, own):
    """ValueError where a part shows nothing to learn or to score."""
    other = "give more images, or take another --test_seed, or leave the task out"
    for name, rows in (("train", own.train), ("validation", own.val), ("test", own.test)):
        if task.kind == "segmentation" and not any(own.target[row].any() for row in rows):
            raise ValueError(f"task {task.name}: no {name} image shows anything but background; {other}")
        if task.kind == "regression":
            lacking = np.isnan(own.target[rows]).all((0, 2))  # (K,)
            if lacking.all() or name == "train" and lacking.any():
                raise ValueError(f"task {task.name}: no {name} image has point {lacking.argmax() + 1}; {other}")


class FileMasks:
    """Masks that are read from their files when asked for: masks[row] -> uint8 (h, w)."""

    def __init__(self, paths, K):
        self.paths, self.K = paths, K

    def __getitem__(self, row):
        return read_task_mask(self.paths[row], self.K)


def class_shares(task, own):
    """(K,): share of the train pixels of each class; None for a task without masks."""
    if task.kind != "segmentation":
        return None
    counts = sum(np.bincount(own.target[row].ravel(), minlength=task.K) for row in own.train)
    return counts / counts.sum()


def digest_of(data, numbers, canvases):
    """Of all that a run on these tasks sees: images, targets, parts."""
    digest = hashlib.sha256()
    for number in numbers:
        own = data.per[number]
        digest.update(repr(data.tasks[number]).encode())
        digest.update(np.ascontiguousarray(canvases[own.images]))
        digest.update(np.ascontiguousarray(own.target))
        units = np.unique(data.units[own.images], return_inverse=True)[1]
        for array in (data.sizes[own.images], units, own.train, own.val, own.test):
            digest.update(np.ascontiguousarray(array, np.int64))
    return digest.hexdigest()


# ---------------------------------------------------------------- one batch

def flips(task, args):
    """Whether images may be mirrored: not where labels tell left from right, nor where landmarks have an order."""
    return args.augment and task.kind != "regression" and task.name not in args.no_flip


def make_batch(task, own, canvases, rows, part, seed, turn, batch, args, stats, device):
    """A rank's part (a slice) of a task's batch, augmented: x (b, 1, S, S), what heads.task_loss takes as target.

    rows (b,): of this part; the draws are those of the whole batch, of the task's own number `turn` of batches: the
    same whichever tasks a network has beside it.
    """
    images, target = canvases[own.images[rows]], own.target[rows]
    if not args.augment:
        x = normalise_only(torch.from_numpy(images).to(device), *stats)
        return x, to_tensor(task, target, device)
    rng = BatchRows(philox(seed, turn, AUGMENT), batch, np.arange(batch)[part])
    draws = draw_augment(rng, len(rows), flip=0.5 if flips(task, args) else 0.0)
    placed = task.kind in ("detection", "regression")
    # upright: a box keeps its sides along the axes, and of two points the left one stays the left one
    draws["affine"] = draw_affine(rng, len(rows), 0.0 if task.kind == "classification" else 0.5, upright=placed)
    if placed:
        target = moved_target(task, target, draws, images.shape[1])
    draws = {key: torch.from_numpy(value).to(device) for key, value in draws.items()}
    masks = target if task.kind == "segmentation" else np.zeros_like(images)
    x, masks = augment_pair(torch.from_numpy(images).to(device), torch.from_numpy(masks).to(device), draws, *stats)
    return x, masks.long() if task.kind == "segmentation" else to_tensor(task, target, device)


def moved_target(task, target, draws, size):
    """Boxes, cut at the image's border, or points, missing where they left it, as `draws` move them. An image that
    would lose its box or all of its points is not moved: its draws are changed in place."""
    if task.kind == "detection":
        moved = move_boxes(target, draws, size, size)  # (b, 4)
        cut = moved.clip(0, 1)
        lost = area(cut) < KEPT * area(moved)
    else:
        cut = move_points(target, draws, size, size)  # (b, K, 2)
        cut[((cut < 0) | (cut > 1)).any(2)] = np.nan
        lost = np.isnan(cut).all((1, 2))
    for key, still in dict(affine=np.eye(2, 3), grid=0, flip=0).items():
        draws[key][lost] = still
    return np.where(lost.reshape(-1, *[1] * (target.ndim - 1)), target, cut)


def area(boxes):
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


def to_tensor(task, target, device):
    target = torch.from_numpy(target).to(device)
    return target.long() if task.kind in ("segmentation", "classification") else target.float()


# ---------------------------------------------------------------- what a guess without looking is

def blind_guess(task, own):
    """From the train rows alone: the mean mask (S, S), the classes' frequencies (K,), the mean box (4,) or the mean
    points (K, 2), as shares."""
    target = own.target[own.train]
    if task.kind == "segmentation":
        return mean_mask(target, task.K)
    if task.kind == "classification":
        return np.bincount(target, minlength=task.K) / len(target)
    return target.mean(0) if task.kind == "detection" else np.nanmean(target, axis=0)


def mean_mask(masks, K):
    """uint8 (n, S, S) -> (S, S): a class is where it is frequent enough, by the threshold of the best mean Dice on
    these masks; of several the one furthest above its own. (The most frequent class alone would leave out whatever
    has no fixed place.)"""
    ratio = np.zeros((K, *masks.shape[1:]))
    for k in range(1, K):
        frequency, shown = np.mean(masks == k, axis=0), np.flatnonzero((masks == k).any((1, 2)))  # (S, S), (m,)
        levels = frequency.max() * np.arange(1, LEVELS + 1) / LEVELS
        guesses = (frequency.ravel()[:, None] >= levels).astype(np.float32)  # (pixels, LEVELS)
        total = np.zeros(LEVELS)
        for start in range(0, len(shown), 64):  # bounds the memory
            true = (masks[shown[start:start + 64]] == k).reshape(-1, len(guesses)).astype(np.float32)  # (64, pixels)
            total += (2 * true @ guesses / (true.sum(1, keepdims=True) + guesses.sum(0))).sum(0)
        if len(shown):
            ratio[k] = frequency / levels[total.argmax()]
    return np.where(ratio.max(0) >= 1, ratio.argmax(0), 0).astype(np.uint8)


def guessed_mask(guess, height, width):
    return np.asarray(Image.fromarray(guess).resize((width, height), Image.Resampling.NEAREST))
