"""Pretrain on real ultrasound with a CPU and score what was held out: writes benchmarks/results/real_cpu.md.

DATA holds busi/{benign,malignant,normal}/*.jpg (breast), pocus/labels.csv (lung; image,label,group) and hc18/ (fetal
head, unlabelled), copies of public sets. 40 % of the groups of pocus and of the images of busi are held out.

    python benchmarks/real_cpu.py DATA OUT
"""

import argparse
import csv
import os

import numpy as np

from record import ROOT, record  # first: it puts the project on the path
from labelled.labels import read_labelled

MASKS = ["*_Mask.png", "*_mask.png", "fmc_uia/*"]
GROUP = r"([^/]+/[^/]+?)(?:_frame\d+|_\d*HC)?\.\w+$"  # a video of pocus, an examination of hc18, an image of busi
FLAGS = ["--canvas", "192", "--global_crops_size", "64", "--log_every", "100"]  # else the cpu preset


def hold_out(images, path, share=0.4):
    """Write a CSV image,label,group of a random `share` of every class's groups, with absolute paths."""
    rng, rows = np.random.default_rng(0), np.array(list(zip(map(os.path.abspath, images.paths), images.labels, images.groups)))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "group"])
        for label in np.unique(rows[:, 1]):
            own = rows[rows[:, 1] == label]
            groups = np.unique(own[:, 2])
            writer.writerows(own[np.isin(own[:, 2], rng.permutation(groups)[:round(share * len(groups))])])


def hold_out_both(data, out):
    """Write the two hold-out lists into `out` -> {name: path}."""
    tests = {"pocus": f"{out}/pocus_test.csv", "busi": f"{out}/busi_test.csv"}
    hold_out(read_labelled(f"{data}/pocus/labels.csv"), tests["pocus"])
    hold_out(read_labelled(f"{data}/busi", exclude=MASKS), tests["busi"])
    return tests


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", help="folder with busi, pocus and hc18")
    parser.add_argument("out", metavar="OUT", help="folder for hold-out lists, pack and checkpoint")
    parser.add_argument("--total_samples", default="60000", help="images seen in pretraining")
    args = parser.parse_args()
    data, out = args.data, args.out
    os.makedirs(out, exist_ok=True)
    tests = hold_out_both(data, out)
    commands = [["python", "pretrain.py", "--data", data, "--exclude", *MASKS, "--group_regex", GROUP, "--holdout",
                 *tests.values(), "--output_dir", out, "--total_samples", args.total_samples, *FLAGS]]
    commands += [["python", "fewshot.py", "--ckpt", f"{out}/last.pt", "--data", test, "--shots", "1", "5", "10",
                  "--json", f"{out}/{name}.json"] for name, test in tests.items()]
    record(ROOT / "benchmarks/results/real_cpu.md", "Pretraining on real ultrasound, on a CPU", commands,
           [(os.path.abspath(data), "DATA"), (data, "DATA"), (os.path.abspath(out), "OUT"), (out, "OUT")])


if __name__ == "__main__":
    main()
