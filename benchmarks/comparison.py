"""Is pretraining worth it? Pretrained on real frames against the same network from scratch and at random, on a CPU:
writes benchmarks/results/comparison.md.

    python benchmarks/comparison.py DATA OUT --pretrain
    python benchmarks/comparison.py DATA OUT

DATA as for real_cpu.py, with the same hold-outs: 40 % of pocus' videos and of busi's images are the test sets, and no
pretraining sees them, nor their copies. The rest are pretrained on, unlabelled, together with hc18, three times; its labels
are for training and validation. Three runs of every model. The same command again goes on where it stopped.
"""

import argparse
import csv
import json
import os
import shlex
import subprocess
import sys

import numpy as np

from real_cpu import FLAGS, GROUP, MASKS, hold_out_both  # first: it puts the project on the path
from frames.images import read_image
from frames.leakage import look_alikes
from labelled.labels import read_labelled
from labelled.store import Images
from record import ROOT, record
from runtime import load_checkpoint

SEEDS = 3
PROTOCOLS = {"tune": ["--preset", "cpu", "--epochs", "40"], "linear": ["--linear", "--linear_steps", "3000"],
             "knn": ["--knn"]}


def held_out(images, test):
    """Of a whole set: absolute paths; which are listed by the CSV `test`, bool (n,); and which others look like one of
    those (busi holds copies under other names), bool (n,)."""
    with open(test, newline="") as file:
        listed = {row["image"] for row in csv.DictReader(file)}
    paths = list(map(os.path.abspath, images.paths))
    own, found = np.array([name in listed for name in paths]), Images(len(paths), lambda i: read_image(paths[i]))
    found.at(8)  # reads them
    return paths, own, ~own & look_alikes(found.looks, found.looks[own])


def write_splits(images, test, path):
    """CSV image,label,group,split of a whole set: what the CSV `test` lists is its test part, the rest its train part but
    for what looks like a test image; how many those are."""
    paths, own, copies = held_out(images, test)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "group", "split"])
        for i in np.flatnonzero(~copies):
            writer.writerow([paths[i], images.labels[i], images.groups[i], "test" if own[i] else "train"])
    return int(copies.sum())


def get_args(doc, then):
    """Of this script and of segmentation.py, whose docstring is `doc`; then: what it does with pretrained networks."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", help="folder with busi, pocus and hc18")
    parser.add_argument("out", metavar="OUT", help="folder for lists, pack, checkpoints and results")
    parser.add_argument("--pretrain", action="store_true", help=f"pretrain only; without it: {then}")
    parser.add_argument("--total_samples", default="30000", help="images seen in each pretraining")
    args = parser.parse_args()
    os.makedirs(args.out, exist_ok=True)
    return args


def pretraining(args, tests, seeds=SEEDS, more=()):
    """Folders of the pretrained networks, and the commands that make them of all frames that no CSV of `tests` lists;
    more: flags of pretrain.py."""
    folders, pack = [f"{args.out}/seed{seed}" for seed in range(seeds)], f"{args.out}/frames.pack"
    commands = [["python", "pack.py", args.data, pack, "--exclude", *MASKS, "--group_regex", GROUP, "--holdout",
                 *tests.values(), *FLAGS[:2]]]
    commands += [["python", "pretrain.py", "--data", pack, "--output_dir", folder, "--seed", str(seed),
                  "--total_samples", args.total_samples, "--flip", "horizontal", "--num_workers", "1", *FLAGS[2:], *more]
                 for seed, folder in enumerate(folders)]
    return folders, commands


def run(commands):
    for words in commands:
        subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)


def made(folder):
    """What a checkpoint and its log say of their making."""
    checkpoint = load_checkpoint(f"{folder}/last.pt")
    with open(f"{folder}/log.jsonl") as file:
        last = json.loads(file.readlines()[-1])
    return (f"commit {checkpoint['commit']}, torch {checkpoint['torch']}, step {checkpoint['step']}, "
            f"{checkpoint['samples']:,} samples, loss {last['loss']:.3f}, dino {last['dino']:.3f}, ibot {last['ibot']:.3f}")


def write_results(args, name, title, training, folders, scoring, copies):
    """Run the commands `scoring` and write benchmarks/results/`name`.md; copies: {set: how many images were left out}."""
    before = [f"The networks were pretrained before, by `python benchmarks/{name}.py DATA OUT --pretrain`, which is:", "",
              "```", *(f"$ {shlex.join(words)}" for words in training), "```", "",
              *(f"- {folder}/last.pt: {made(folder)}" for folder in folders), "",
              "Left out of train and validation, since they look like test images: "
              + ", ".join(f"{number} of {own}" for own, number in copies.items()) + ". busi names no patients: its "
              "intervals are over images. A run that was finished before is not trained again: its time is not in the "
              "figure."]
    names = [(path, shown) for own, shown in ((args.data, "DATA"), (args.out, "OUT"))
             for path in (os.path.abspath(own), own)]
    record(ROOT / f"benchmarks/results/{name}.md", title, scoring, names, before)


def main():
    args = get_args(__doc__, "score what was pretrained")
    data, out = args.data, args.out
    tests = hold_out_both(data, out)
    sets = {"busi": read_labelled(f"{data}/busi", exclude=MASKS),
            "pocus": read_labelled(f"{data}/pocus/labels.csv")}
    copies = {name: write_splits(images, tests[name], f"{out}/{name}.csv") for name, images in sets.items()}
    folders, training = pretraining(args, tests)
    if args.pretrain:
        return run(training)
    files, nothing, scoring = ",".join(f"{folder}/last.pt" for folder in folders), ",".join(["none"] * SEEDS), []
    for name in sets:
        for protocol, flags in PROTOCOLS.items():
            random = "scratch" if protocol == "tune" else "random"
            scoring.append(["python", "finetune_cls.py", "--data", f"{out}/{name}.csv", "--ckpt", f"pretrained={files}",
                            f"{random}={nothing}", *flags, "--output_dir", f"{out}/{name}_{protocol}",
                            "--cache", f"{out}/features", "--latex", f"{out}/{name}_{protocol}.tex"])
        shots = ["python", "fewshot.py", "--ckpt", f"pretrained={files}", f"random={nothing}", "--data", tests[name],
                 "--shots", "1", "5", "10", "--cache", f"{out}/features"]
        scoring.append([*shots, "--json", f"{out}/{name}.json"])
        scoring.append([*shots, "--outside_fan", "--json", f"{out}/{name}_outside.json"])
    write_results(args, "comparison", "Pretrained, from scratch and at random, on real frames", training, folders, scoring,
                  copies)


if __name__ == "__main__":
    main()
