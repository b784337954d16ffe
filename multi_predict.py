"""Predictions in the layout of FMC_UIA's submission, from images alone, by finished runs of finetune_multi.py."""

import concurrent.futures

import numpy as np
import torch
from tqdm import tqdm

import segmenter
from challenge import (JSON_FILES, check_submission_folder, mask_places, records_of, write_submission_json,
                       write_submission_mask)
from features import read_image
from fmc_uia import read_tasks
from heads import open_network
from images import resize_square
from multi_train import as_shares, in_pixels, predict
from report import count


def predict_all(args):
    """--predict: every task of --data by the first of --ckpt's runs that has it; nothing but images is read."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, owners = read_tasks(args.data, tasks=args.tasks, skip_wrong_rows=args.skip_wrong_rows, labelled=False), {}
    check_submission_folder(args.predict, [place for places in mask_places(found).values() for place in places])
    for sentence in found.wrong:
        print(f"left out: {sentence}")
    for path in args.ckpt:
        for task in open_network(path, "cpu")[0].tasks:
            owners.setdefault(task.name, (path, task))
    for task in found.tasks:
        if task.name not in owners:
            raise ValueError(f"no run of --ckpt has the task {task.name}: they have {', '.join(owners)}; give one that "
                             f"has it, or name others by --tasks")
        path, other = owners[task.name]
        if other != task:
            raise ValueError(f"{path}: {task.name} is {other.kind} with num_classes {other.K} there, {task.kind} with "
                             f"{task.K} in --data")
    records = {kind: [] for kind in JSON_FILES}
    for kind in JSON_FILES:  # of no task an empty list: no file of an earlier run stays
        write_submission_json(args.predict, kind, [])
    for path in dict.fromkeys(args.ckpt):  # one network at a time
        own = [task for task in found.tasks if owners[task.name][0] == path]
        network, saved = open_network(path, device) if own else (None, None)
        for task in own:
            print(f"{task.name}: {len(found.rows[task.name].images):,} images by {path}", flush=True)
            rows = predict_task(network, network.tasks.index(task), saved, task, found, args, device)
            if task.kind in records:
                records[task.kind] += rows
                write_submission_json(args.predict, task.kind, records[task.kind])
    print(f"wrote {args.predict}: {count(len(found.tasks), 'task')}")


def predict_task(network, number, saved, task, found, args, device):
    """Records of a task's rows, in their order, for its JSON file; of segmentation none: its masks are written."""
    rows, size, stats, records = found.rows[task.name], saved["img_size"], (saved["mean"], saved["std"]), []

    def read(row):
        return resize_square(read_image(found.paths[rows.images[row]]).grey, size)

    def write(row, logits):
        width, height = found.sizes[rows.images[row]]
        mask = segmenter.at_own_size(logits, int(height), int(width))
        write_submission_mask(args.predict, rows.mask_paths[row], rows.image_paths[row], mask)

    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # a batch at a time bounds the memory
        for start in tqdm(range(0, len(rows.images), args.eval_batch_size), desc=task.name, leave=False, disable=None):
            part = range(start, min(start + args.eval_batch_size, len(rows.images)))
            output, _ = predict(network, number, np.stack(list(pool.map(read, part))), stats, device, args.dtype)
            if task.kind == "segmentation":
                list(pool.map(write, part, output))
                continue
            sizes = found.sizes[rows.images[part]]
            records += records_of(task, [rows.image_paths[row] for row in part], sizes,
                                  in_pixels(task, as_shares(task, output), sizes))
    return records
