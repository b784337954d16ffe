"""What --init's defaults are good for, on a CPU and real frames: writes benchmarks/results/init.md.

    python benchmarks/init.py DATA OUT

DATA as for real_cpu.py, with the same hold-outs. A parent is pretrained on breast and fetal heads; lung frames follow,
in the same short budget from scratch, from the parent with what --init changes, and from the parent as if it were
scratch. Few-shot classification of held-out lung videos tells what was learned, of breast what was kept.
"""

import argparse
import os
import shlex
import sys
import time

import numpy as np

from ablations import SHOTS, run, score  # first: it puts the project on the path
import pretrain
from real_cpu import FLAGS, GROUP, MASKS, hold_out_both
from record import ROOT, machine, write_part

NAIVE = ("base_lr", "momentum_teacher", "freeze_backbone_fraction")  # what --init changes in the cpu preset


def options(parent):
    """{name: flags} of the ways to train on lung frames; the last undoes what --init protects the parent with."""
    scratch = vars(pretrain.get_args(["--preset", "cpu"]))
    naive = [word for name in NAIVE for word in (f"--{name}", str(scratch[name]))]
    return {"from scratch": [], "--init": ["--init", parent], "--init, naive": ["--init", parent, *naive]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("data", metavar="DATA", help="folder with busi, pocus and hc18")
    parser.add_argument("out", metavar="OUT", help="folder for hold-out lists, packs and checkpoints")
    parser.add_argument("--parent", help="last.pt to start from, of other images than pocus; else one is trained")
    parser.add_argument("--parent_samples", default="10000", help="images seen in the parent's pretraining")
    parser.add_argument("--total_samples", default="3000", help="images seen in each run on lung frames")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way")
    args = parser.parse_args()
    begun, out = time.monotonic(), os.path.abspath(args.out)
    os.makedirs(out, exist_ok=True)
    tests = hold_out_both(args.data, out)
    for name, folders in (("parent", ("hc18", "busi")), ("lung", ("pocus",))):
        run("pack.py", *(f"{args.data}/{folder}" for folder in folders), f"{out}/{name}.pack", "--exclude", *MASKS,
            "--group_regex", GROUP, "--holdout", *tests.values(), *FLAGS[:2])
    parent = args.parent or f"{out}/parent/last.pt"
    if not args.parent:
        run("pretrain.py", "--data", f"{out}/parent.pack", "--output_dir", f"{out}/parent", "--preset", "cpu",
            "--total_samples", args.parent_samples, *FLAGS[2:])

    def scores(checkpoint, folder):
        """{(test, classifier): balanced accuracy}"""
        found = {}
        for name, test in tests.items():
            result = f"{folder}/{name}.json"
            run("fewshot.py", "--ckpt", checkpoint, "--data", test, "--shots", SHOTS, "--json", result)
            found.update({(name, classifier): value for classifier, value in score(result).items()})
        return found

    os.makedirs(f"{out}/parent", exist_ok=True)
    found = {"the parent as it is": [scores(parent, f"{out}/parent")]}
    for number, (option, flags) in enumerate(options(parent).items()):
        for seed in range(args.seeds):
            folder = f"{out}/{number}_{seed}"
            run("pretrain.py", "--data", f"{out}/lung.pack", "--output_dir", folder, "--preset", "cpu", "--seed",
                str(seed), "--total_samples", args.total_samples, *FLAGS[2:], *flags)
            found.setdefault(option, []).append(scores(f"{folder}/last.pt", folder))

    first, rows = found["the parent as it is"][0], []
    for option, runs in found.items():
        for key in first:
            values = np.array([one[key] for one in runs])
            rows.append({"start": option, "test": {"pocus": "lung (new)", "busi": "breast (the parent's)"}[key[0]],
                         "classifier": key[1], "balanced accuracy": values.mean(),
                         "per seed": " ".join(f"{value:.3f}" for value in values),
                         "to the parent": "" if len(rows) < len(first) else f"{values.mean() - first[key]:+.3f}"})
    changes = ", ".join(f"{name} {getattr(pretrain.get_args(['--preset', 'cpu', '--init', parent]), name)} "
                        f"({getattr(pretrain.get_args(['--preset', 'cpu']), name)})" for name in NAIVE)
    caption = (f"Parent: {args.parent_samples} samples of breast and fetal heads; then {args.total_samples} samples of "
               f"lung frames, {args.seeds} seeds; {SHOTS} shots, chance 0.333. --init and (naive): {changes}.")
    write_part(ROOT / "benchmarks/results/init", "Going on from a trained backbone", "a", {
        "title": "small pretraining runs on real frames", "machine": machine(),
        "command": shlex.join(["python", "benchmarks/init.py", "DATA", "OUT", *sys.argv[3:]]),
        "minutes": (time.monotonic() - begun) / 60, "tables": [(caption, rows)]})


if __name__ == "__main__":
    main()
