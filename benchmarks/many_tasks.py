"""Many tasks together or apart, on real frames, on a CPU: writes benchmarks/results/many_tasks.md.

    python benchmarks/many_tasks.py DATA OUT --pretrain
    python benchmarks/many_tasks.py DATA OUT

DATA holds fmc_uia (five tasks of four kinds on hc18's and busi's images), hc18, busi and pocus. 30 % of the groups (hc18's
examinations, busi's images) are the test set, and no pretraining sees them, nor their copies. All the rest is pretrained
on, without labels, with rotary positions; each of the three paradigms then starts from it, with two seeds. The same
command again goes on where it stopped.
"""

import csv
import os

import numpy as np
from comparison import get_args, pretraining, run, write_results  # first: it puts the project on the path
from features import Images, read_image
from fmc_uia import read_tasks, split_tasks
from leakage import look_alikes

EXAMINATION = r"(\d+)_\d*HC"
GROUPS = {"breast_3cls": "breast", "breast_lesion": "breast", "breast_lesion_det": "breast", "fetal_head": "head",
          "fetal_head_ofd": "head"}
SPLIT = dict(test_seed=0, val_fraction=0.1, test_fraction=0.3)
FLAGS = ["--preset", "cpu", "--img_size", "80", "--channels", "32", "--iters", "240", "--val_every", "40", "--seeds", "2"]


def hold_out(data, path):
    """Write a CSV image,label,group of the test images that finetune_multi.py draws; how many train or validation images
    look like one of them."""
    found = read_tasks(f"{data}/fmc_uia", EXAMINATION)
    splits, _ = split_tasks(found, *SPLIT.values())
    test = np.array(splits) == "test"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "group"])
        writer.writerows((found.paths[i], "test", found.groups[i]) for i in np.flatnonzero(test))
    images = Images(len(found.paths), lambda i: read_image(found.paths[i]))
    images.at(8)  # reads them
    return int((~test & look_alikes(images.looks, images.looks[test])).sum())


def main():
    args = get_args(__doc__, "train and score the paradigms")
    data, out = args.data, args.out
    copies = hold_out(data, f"{out}/test.csv")
    with open(f"{out}/groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("task", "group"), *GROUPS.items()])
    folders, training = pretraining(args, {"fmc_uia": f"{out}/test.csv"}, 1, ["--pos", "rope"])
    if args.pretrain:
        return run(training)
    split = [word for name, value in SPLIT.items() for word in (f"--{name}", str(value))]
    common = ["python", "finetune_multi.py", "--data", f"{data}/fmc_uia", "--group_regex", EXAMINATION, "--groups",
              f"{out}/groups.csv", *split, *FLAGS, "--paradigm", "task", "clinical", "all"]
    scoring = [[*common, "--ckpt", f"{folders[0]}/last.pt", "--output_dir", f"{out}/pretrained"]]
    write_results(args, "many_tasks", "Many tasks together or apart, on real frames", training, folders, scoring,
                  {"busi and hc18": copies})


if __name__ == "__main__":
    main()
