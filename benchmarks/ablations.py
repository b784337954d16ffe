"""What ultrasound's own options do, on a CPU and real frames: writes benchmarks/results/ablations.md.

    python benchmarks/ablations.py DATA OUT

DATA as for real_cpu.py, with the same hold-outs. Each option is one change to the same short pretraining, with the same
images, crops and seeds, scored by few-shot classification of what was held out.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time

import numpy as np

from real_cpu import FLAGS, GROUP, MASKS, hold_out_both  # first: it puts the project on the path
from record import ROOT, machine, write_part

OPTIONS = {"as the paper (--flip vertical)": [], "--flip horizontal": ["--flip", "horizontal"],
           "--flip none": ["--flip", "none"], "--mask_tissue": ["--mask_tissue"], "--crop_fan": []}
SHOTS = "5"


def run(*words):
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def score(path):
    """{classifier: balanced accuracy} of the pretrained features in a fewshot.json."""
    with open(path) as file:
        return {record["classifier"]: record["estimate"] for record in json.load(file)["results"]
                if record["features"] == "pretrained" and record["score"] == "balanced accuracy"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", help="folder with busi, pocus and hc18")
    parser.add_argument("out", metavar="OUT", help="folder for hold-out lists, packs and checkpoints")
    parser.add_argument("--total_samples", default="10000", help="images seen in each pretraining")
    parser.add_argument("--seeds", type=int, default=2, help="pretraining runs per option")
    args = parser.parse_args()
    begun, out = time.monotonic(), os.path.abspath(args.out)
    os.makedirs(out, exist_ok=True)
    tests = hold_out_both(args.data, out)
    packs = {}
    for trimmed in (False, True):
        packs[trimmed] = f"{out}/{'fan' if trimmed else 'whole'}.pack"
        run("pack.py", args.data, packs[trimmed], "--exclude", *MASKS, "--group_regex", GROUP, "--holdout",
            *tests.values(), *FLAGS[:2], *["--crop_fan"][:trimmed])

    scores = {}  # option: per seed, [score of each test and classifier]
    for number, (option, flags) in enumerate(OPTIONS.items()):
        for seed in range(args.seeds):
            folder = f"{out}/{number}_{seed}"
            run("pretrain.py", "--data", packs[option == "--crop_fan"], "--output_dir", folder, "--seed", str(seed),
                "--total_samples", args.total_samples, *FLAGS[2:], *flags)
            found = {}
            for name, test in tests.items():
                result = f"{folder}/{name}.json"
                run("fewshot.py", "--ckpt", f"{folder}/last.pt", "--data", test, "--shots", SHOTS, "--json", result)
                found.update({(name, classifier): value for classifier, value in score(result).items()})
            scores.setdefault(option, []).append(found)

    first, rows = scores[next(iter(OPTIONS))], []
    for option, runs in scores.items():
        for key in first[0]:
            values = np.array([found[key] for found in runs])
            change = values - [found[key] for found in first]
            rows.append({"option": option, "test": key[0], "classifier": key[1], "balanced accuracy": values.mean(),
                         "per seed": " ".join(f"{value:.3f}" for value in values),
                         "change": "" if runs is first else f"{change.mean():+.3f}",
                         "per seed ": "" if runs is first else " ".join(f"{value:+.3f}" for value in change)})
    with open(f"{packs[False]}/pack.json") as file:
        info = json.load(file)
    caption = (f"{info['images']:,} training images of {info['groups']:,} groups; {args.total_samples} samples a run, "
               f"{args.seeds} seeds, {SHOTS} shots, chance 0.333. Changes are to the first option, seed by seed.")
    write_part(ROOT / "benchmarks/results/ablations", "Options for ultrasound, one at a time", "a", {
        "title": "small pretraining runs on real frames", "machine": machine(),
        "command": shlex.join(["python", "benchmarks/ablations.py", "DATA", "OUT", *sys.argv[3:]]),
        "minutes": (time.monotonic() - begun) / 60, "tables": [(caption, rows)]})


if __name__ == "__main__":
    main()
