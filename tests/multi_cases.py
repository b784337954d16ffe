"""What the tests of training on many tasks share: a small set of four tasks in memory, its batches, a small network."""
import argparse

import numpy as np
import torch

from labelled import task_sets
from labelled.fmc_uia import Task
from labelled.mask_sets import squash
from labelled.task_sets import Data, TaskData
from model import VisionTransformer
from training import many_tasks

CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=3, num_heads=2, num_register_tokens=1,
              init_values=0.5, init_std=0.2)
HOW = dict(experts=2, blocks=[1, 2], top_k=None, task_dim=5, channels=32)
TASKS = [Task("seg", "segmentation", 3), Task("cls", "classification", 3), Task("det", "detection", 1),
         Task("reg", "regression", 2)]
SIDE, IMAGES, STATS, CPU = 16, 14, (0.4, 0.25), torch.device("cpu")


def arguments(**changes):
    return argparse.Namespace(**{**dict(lr=1e-2, backbone_lr=1e-3, weight_decay=0.05, clip_grad=1e9, dtype="float32",
                                        top_k=None, balance_weight=0.0, eval_batch_size=3), **changes})


def small_data(seed=0):
    """(Data, canvases) of 14 images of many sizes; tasks share some. Rows of val and test are not in order."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(14, 34, (IMAGES, 2))
    own = [np.arange(10), np.arange(IMAGES), np.arange(2, 12), np.arange(3, IMAGES)[::-1]]
    masks = [np.zeros((sizes[i, 1], sizes[i, 0]), np.uint8) for i in own[0]]
    for i, mask in enumerate(masks):
        mask[3:9, 2:12] = 1
        mask[rng.integers(8, 12):, rng.integers(0, 8):] = 2 if i % 3 else 0  # some images lack class 2
    low = rng.random((10, 2)) * 0.5
    boxes = np.concatenate((low, low + 0.1 + 0.4 * rng.random((10, 2))), 1) * np.tile(sizes[own[2]], 2)
    points = rng.random((11, 2, 2)) * sizes[own[3]][:, None]
    points[1, 0] = points[4, 1] = points[8, 0] = np.nan
    truth = [masks, rng.permutation(np.arange(IMAGES) % 3), boxes, points]
    target = [squash(masks.__getitem__, 10, SIDE), truth[1], boxes / np.tile(sizes[own[2]], 2),
              points / sizes[own[3]][:, None]]
    per = []
    for parts in zip(own, target, truth):
        order = rng.permutation(len(parts[0]))
        per.append(TaskData(*parts, np.sort(order[:4]), order[4:8], order[5:]))
    canvases = rng.integers(0, 256, (IMAGES, SIDE, SIDE), dtype=np.uint8)
    return Data(TASKS, None, None, "", np.arange(IMAGES), sizes, None, per, None, "", []), canvases


def built(random=True, tasks=TASKS, config=(), **how):
    """(network, gradients, optimizer); random: no weight is 0, so that all of the network matters."""
    torch.manual_seed(3)
    backbone = VisionTransformer(**{**CONFIG, **dict(config)})
    made = many_tasks.build(backbone, tasks, [None] * len(tasks), {**HOW, **how}, 1, CPU)
    for p in made[0].parameters() if random else ():
        p.data.normal_(std=0.25)
    return made


def batch_of(number, n=4):
    data, canvases = small_data()
    own = data.per[number]
    return task_sets.make_batch(TASKS[number], own, canvases, own.train[:n], slice(0, n), 0, 0, n,
                                 argparse.Namespace(augment=False), STATS, CPU)
