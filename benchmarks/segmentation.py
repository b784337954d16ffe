"""Does pretraining help to outline? Pretrained on real frames against the same network from scratch, on a CPU: writes
benchmarks/results/segmentation.md.

    python benchmarks/segmentation.py DATA OUT --pretrain
    python benchmarks/segmentation.py DATA OUT

DATA holds hc18 (fetal heads), busi (breast lesions) and pocus (lung). 30 % of hc18's examinations and 40 % of busi's images
are the test sets, and no pretraining sees them, nor their copies. All the rest is pretrained on, three times, without masks.
The same command again goes on where it stopped.
"""

import argparse
import csv
import os
import shlex
import subprocess
import sys

import numpy as np
from real_cpu import FLAGS, GROUP, MASKS, hold_out  # first: it puts the project on the path
from comparison import held_out, made
from lists import list_images, read_labelled
from record import ROOT, record

SEEDS = 3
COMMON = ["--preset", "cpu", "--img_size", "80", "--channels", "32", "--lr", "0.001", "--val_every", "50"]
LINEAR, FEW = ["--frozen", "--decoder", "linear", "--lr", "0.01"], ["--shots", "20", "--split_seed", "0", "1", "2"]
PROTOCOLS = {"upernet": ["--iters", "250", "--warmup_iters", "25"],
             "linear": ["--iters", "250", "--warmup_iters", "25", *LINEAR],
             "upernet_20": ["--iters", "150", "--warmup_iters", "15", *FEW],
             "linear_20": ["--iters", "150", "--warmup_iters", "15", *FEW, *LINEAR]}


def hold_out_heads(images, path, share=0.3):
    """Write a CSV image,label,group of a random `share` of hc18's examinations, with absolute paths."""
    rng, groups = np.random.default_rng(0), np.unique(images.groups)
    chosen = {*rng.permutation(groups)[:round(share * len(groups))]}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "group"])
        writer.writerows((os.path.abspath(image), "head", group) for image, group in zip(images.paths, images.groups)
                         if group in chosen)


def write_split(images, test, path):
    """CSV image,split of a whole set: what the CSV `test` lists is its test part; of the rest, what looks like a test
    image is left out, and a fifth of the groups is for validation. How many were left out."""
    _, own, copies = held_out(images, test)
    groups = np.unique(np.array(images.groups)[~own & ~copies])
    val = {*np.random.default_rng(1).permutation(groups)[:round(0.2 * len(groups))]}
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "split"])
        for i in np.flatnonzero(~copies):
            writer.writerow([images.names[i], "test" if own[i] else "val" if images.groups[i] in val else "train"])
    return int(copies.sum())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", help="folder with hc18, busi and pocus")
    parser.add_argument("out", metavar="OUT", help="folder for lists, pack, checkpoints and results")
    parser.add_argument("--pretrain", action="store_true", help="pretrain only; without it: train and score decoders")
    parser.add_argument("--total_samples", default="30000", help="images seen in each pretraining")
    args = parser.parse_args()
    data, out = args.data, args.out
    os.makedirs(out, exist_ok=True)
    sets = {"hc18": list_images(f"{data}/hc18/training_set", MASKS, r"(\d+)_\d*HC"),
            "busi": read_labelled(f"{data}/busi", exclude=MASKS)}
    tests = {name: f"{out}/{name}_test.csv" for name in sets}
    hold_out_heads(sets["hc18"], tests["hc18"])
    hold_out(sets["busi"], tests["busi"])
    copies = {name: write_split(images, tests[name], f"{out}/{name}.csv") for name, images in sets.items()}

    folders = [f"{out}/seed{seed}" for seed in range(SEEDS)]
    training = [["python", "pack.py", data, f"{out}/frames.pack", "--exclude", *MASKS, "--group_regex", GROUP, "--holdout",
                 *tests.values(), *FLAGS[:2]]]
    training += [["python", "pretrain.py", "--data", f"{out}/frames.pack", "--output_dir", folder, "--seed", str(seed),
                  "--total_samples", args.total_samples, "--flip", "horizontal", "--num_workers", "1", *FLAGS[2:]]
                 for seed, folder in enumerate(folders)]
    if args.pretrain:
        for words in training:
            subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)
        return
    files, nothing, scoring = ",".join(f"{folder}/last.pt" for folder in folders), ",".join(["none"] * SEEDS), []
    folder_of = {"hc18": f"{data}/hc18/training_set", "busi": f"{data}/busi"}
    for name in sets:
        for protocol, flags in PROTOCOLS.items():
            scoring.append(["python", "finetune_seg.py", "--data", folder_of[name], "--split", f"{out}/{name}.csv", "--ckpt",
                            f"pretrained={files}", f"scratch={nothing}", *COMMON, *flags, "--output_dir",
                            f"{out}/{name}_{protocol}", "--latex", f"{out}/{name}_{protocol}.tex"])
    before = ["The networks were pretrained before, by `python benchmarks/segmentation.py DATA OUT --pretrain`, which is:", "",
              "```", *(f"$ {shlex.join(words)}" for words in training), "```", "",
              *(f"- {folder}/last.pt: {made(folder)}" for folder in folders), "",
              "Left out of train and validation, since they look like test images: "
              + ", ".join(f"{number} of {name}" for name, number in copies.items()) + ". busi names no patients: its "
              "intervals are over images. A run that was finished before is not trained again: its time is not in the figure."]
    record(ROOT / "benchmarks/results/segmentation.md", "Segmentation, pretrained and from scratch, on real frames", scoring,
           [(os.path.abspath(data), "DATA"), (data, "DATA"), (os.path.abspath(out), "OUT"), (out, "OUT")], before)


if __name__ == "__main__":
    main()
