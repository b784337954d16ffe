"""Pretrain on real ultrasound with a CPU and score the held-out part: benchmarks/results/real_cpu.md.

DATA holds busi/{benign,malignant,normal}/*.jpg, pocus/labels.csv (image,label,group) and hc18/ (unlabelled), as public
sets of breast, lung and fetal-head frames. 40 % of the groups of pocus and of the images of busi are held out.

    python benchmarks/real_cpu.py DATA OUT
"""

import argparse
import csv
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data import list_images  # noqa: E402
from runtime import git_commit  # noqa: E402

MASKS = ["*_Mask.png", "*_mask.png", "fmc_uia/*"]
GROUP = r"([^/]+/[^/]+?)(?:_frame\d+|_\d*HC)?\.\w+$"  # a video of pocus, an examination of hc18, an image of busi
# the cpu preset with larger crops: what counts in these frames is small
FLAGS = ["--canvas", "192", "--global_crops_size", "64", "--log_every", "100"]


def hold_out(images, path, share=0.4):
    """Write a CSV image,label,group of a random `share` of every class's groups, with paths that can be opened."""
    rng = np.random.default_rng(0)
    groups = np.array(images.groups)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "group"])
        for label in sorted(set(images.labels)):
            own = np.unique(groups[np.array(images.labels) == label])
            chosen = set(rng.permutation(own)[:round(share * len(own))])
            writer.writerows((os.path.abspath(image), l, g) for image, l, g in zip(images.paths, images.labels, groups)
                             if g in chosen and l == label)


def run(words, report):
    """Run a command, show it with DATA and OUT for this machine's folders, and return its output."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True)
    command = shlex.join(["python", *map(str, words)])
    report.append((command, done.stdout, time.monotonic() - started))
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", help="folder with busi, pocus and hc18")
    parser.add_argument("out", help="folder for the hold-out lists, the pack and the checkpoint")
    parser.add_argument("--samples", type=int, default=64_000, help="images seen in pretraining")
    args = parser.parse_args()
    data, out = Path(args.data), Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    hold_out(list_images(str(data / "pocus/labels.csv"), labelled=True), out / "pocus_test.csv")
    hold_out(list_images(str(data / "busi"), exclude=MASKS, labelled=True), out / "busi_test.csv")
    report, tests = [], ("pocus", "busi")
    run(["pretrain.py", "--data", data, "--exclude", *MASKS, "--group_regex", GROUP, "--holdout",
         *(out / f"{name}_test.csv" for name in tests), "--output_dir", out, "--total_samples", args.samples, *FLAGS],
        report)
    for name in tests:
        run(["fewshot.py", "--ckpt", out / "last.pt", "--data", out / f"{name}_test.csv", "--shots", 1, 5, 10,
             "--json", out / f"{name}.json"], report)

    text = ["# Pretraining on real ultrasound, on a CPU", "",
            f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}, "
            f"commit {git_commit()}. Made by the command `python benchmarks/real_cpu.py DATA OUT`.", ""]
    for command, output, seconds in report:
        text += ["```", f"$ {command}", *output.rstrip().splitlines(), f"({seconds / 60:.1f} minutes)", "```", ""]
    text = "\n".join(text).replace(str(data), "DATA").replace(os.path.abspath(data), "DATA").replace(str(out), "OUT")
    (ROOT / "benchmarks/results/real_cpu.md").write_text(text)


if __name__ == "__main__":
    main()
