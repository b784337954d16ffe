"""Does a change alter what any command computes? Fixed, short runs of every command, and a digest of what each leaves.

    python benchmarks/digests.py DATA OUT                         # writes OUT/digests.json; OUT must not exist
    python benchmarks/digests.py DATA OLD --code OTHER_CHECKOUT   # the same, by a checkout that has these commands
    diff OLD/digests.json OUT/digests.json

Equal files, made on one machine: the change altered no weight, score, mask, picture or pack. Digests are of numbers,
not of texts: tensors of .pt files, numbers of .json files, pixels of pictures; times and versions do not count.
DATA has hc18, busi, pocus and fmc_uia, of which a few images are taken. Some five minutes of one core.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# keys that differ between two runs of one code, or hold its arguments
UNSTABLE = {"args", "identity", "commit", "torch", "versions", "salt", "images_per_s", "data_wait", "hours_left"}
# files that hold names, random salts or texts alone
SKIPPED = ("groups.csv", "skipped.txt", "segment.json", "printed.txt", "table.tex")
TINY = "--preset cpu --img_size 32 --batch_size 8 --output_dir ."
PACKED = "--canvas 64 --workers 1"
# name of a run: its command, in a folder of its own; {data}: small sets, {runs}: the folder of all runs
COMMANDS = {
    "pack": "pack.py {data}/hc18 {data}/pocus packed --exclude *_Mask.png --holdout {data}/holdout.csv --dedup "
            "--crop_fan --drop_colour --max_per_group 5 " + PACKED,
    "pretrain": "pretrain.py --total_samples 960 --save_every 10 --log_every 5",
    "pretrain_rope": "pretrain.py --data {data}/hc18 --exclude *_Mask.png --preset cpu --total_samples 256 "
                     "--batch_size_per_gpu 8 --accum_iter 2 --canvas 96 --pos rope --mask_tissue --separate_head "
                     "--centering centering --drop_path_rate 0.3 --layerwise_decay 0.9 --log_every 4",
    "pretrain_init": "pretrain.py --init {runs}/pretrain/last.pt --preset cpu --total_samples 256 --flip horizontal",
    "pretrain_two": "torchrun pretrain.py --total_samples 640 --batch_size_per_gpu 16",
    "dry_run": "-m tools.dry_run --preset cpu --drop_path_rate 0.3 --batch_size_per_gpu 8",
    "preview": "-m tools.preview --data {data}/hc18 --exclude *_Mask.png --preset cpu --canvas 96 --mask_tissue "
               "--output_dir .",
    "fewshot": "fewshot.py --ckpt {runs}/pretrain/last.pt --img_size 64 --episodes 8 --classifiers nearest_mean knn "
               "logreg linear finetune --finetune_steps 4 --finetune_episodes 1",
    "fewshot_fan": "fewshot.py --ckpt {runs}/pretrain_rope/last.pt none --img_size 64 --data {data}/pocus.csv "
                   "--episodes 5 --shots 1 2 --outside_fan",
    "cls": "finetune_cls.py --ckpt {runs}/pretrain/last.pt none --epochs 2 --warmup_epochs 1 "
           "--drop_path_rate 0.1 " + TINY,
    "cls_data": "finetune_cls.py --data {data}/pocus.csv --ckpt {runs}/pretrain_init/last.pt none --epochs 2 --seeds 2 "
                "--warmup_epochs 1 --latex table.tex " + TINY,
    "cls_linear": "finetune_cls.py --ckpt {runs}/pretrain/last.pt none --linear --linear_steps 50 " + TINY,
    "cls_knn": "finetune_cls.py --ckpt {runs}/pretrain/last.pt none --knn " + TINY,
    "seg": "finetune_seg.py --ckpt {runs}/pretrain/last.pt none --iters 12 --warmup_iters 3 --val_every 6 "
           "--drop_path_rate 0.2 " + TINY,
    "seg_data": "finetune_seg.py --data {data}/hc18 --ckpt {runs}/pretrain_rope/last.pt --iters 8 --warmup_iters 2 "
                "--val_every 4 --shots 10 --split_seed 0 1 --latex table.tex " + TINY,
    "seg_predict": "predict.py --ckpt {runs}/seg/pretrain-seed0.pt --data {data}/hc18 --exclude *_Mask.png "
                   "--output_dir masks",
    "multi": "finetune_multi.py --ckpt {runs}/pretrain/last.pt --iters 6 --val_every 3 "
             "--paradigm task clinical all " + TINY,
    "multi_data": "finetune_multi.py --data {data}/challenge/fmc_uia --ckpt none --iters 3 --val_every 3 "
                  "--paradigm all --top_k 2 --arch vit_micro " + TINY,
    "multi_predict": "predict.py --ckpt {runs}/multi_data/all-seed0.pt --data {data}/challenge/fmc_uia "
                     "--output_dir submission",
}


def small_sets(data, folder):
    """Links to a few of DATA's images: hc18 with masks, pocus.csv, a hold-out list of both, fmc_uia."""
    (folder / "hc18").mkdir(parents=True)
    for path in sorted((data / "hc18/training_set").glob("0[0-3]*")):
        (folder / "hc18" / path.name).symlink_to(path)
    (folder / "hc18/training_set_pixel_size_and_HC.csv").symlink_to(data / "hc18/training_set_pixel_size_and_HC.csv")
    with open(data / "pocus/labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))[::12]
    with open(folder / "pocus.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "group"), *(
            (data / "pocus" / row["image"], row["label"], row["group"]) for row in rows)])
    for row in rows:
        path = folder / "pocus" / row["group"] / Path(row["image"]).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(data / "pocus" / row["image"])
    with open(folder / "holdout.csv", "w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "group"), *(
            (data / "pocus" / row["image"], row["label"], row["group"]) for row in rows[::9])])
    (folder / "challenge/fmc_uia/csv_files").mkdir(parents=True)  # its paths are relative
    for name in ("busi", "hc18", "fmc_uia/Segmentation"):
        (folder / "challenge" / name).symlink_to(data / name)
    for path in (data / "fmc_uia/csv_files").glob("*.csv"):
        with open(path, newline="") as file:
            head, *lines = csv.reader(file)
        with open(folder / "challenge/fmc_uia/csv_files" / path.name, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines[::12]])


# ---------------------------------------------------------------- digests

def numbers(value, digest):
    """Feed all numbers of nested plain values and tensors, and the keys of dicts, into a digest; texts do not count."""
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            if key not in UNSTABLE:
                digest.update(str(key).encode())
                numbers(value[key], digest)
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for one in value:
            numbers(one, digest)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    elif not isinstance(value, (str, bytes)):
        digest.update(f"{value!r} ".encode())


def digest_of(path):
    digest = hashlib.sha256()
    if path.suffix == ".pt":
        numbers(torch.load(path, map_location="cpu", weights_only=True), digest)
    elif path.suffix == ".json":
        numbers(json.loads(path.read_text()), digest)
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines():
            numbers(json.loads(line), digest)
    elif path.suffix == ".png":
        with Image.open(path) as image:
            digest.update(repr((image.mode, image.size)).encode())
            digest.update(np.ascontiguousarray(np.asarray(image)))
    else:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(name, command, code, runs, data):
    folder = runs / name
    folder.mkdir(parents=True)
    words = [word.format(data=data, runs=runs) for word in command.split()]
    start = [sys.executable]
    if words[0] == "torchrun":
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        words = words[1:]
    if words[0] != "-m":
        words[0] = str(code / words[0])
    started = time.monotonic()
    done = subprocess.run([*start, *words], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"})
    (folder / "printed.txt").write_text(done.stdout)
    if done.returncode:
        sys.exit(f"{name}: exit status {done.returncode}\n{done.stdout[-3000:]}")
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    found = {str(path.relative_to(folder)): digest_of(path) for path in sorted(folder.rglob("*"))
             if path.is_file() and not path.is_symlink() and path.name not in SKIPPED}
    if name == "dry_run":
        found["printed"] = done.stdout.splitlines()[:3]
    # one line for a folder of masks; caches of features are called as digests of files that hold a commit
    many = [path for path in found if path.endswith((".png", ".npz")) and "/" in path]
    for parent in sorted({os.path.dirname(path) for path in many}):
        own = [(path * path.endswith(".png"), found.pop(path)) for path in many if os.path.dirname(path) == parent]
        found[f"{parent}/*"] = f"{len(own)} files {hashlib.sha256(repr(own).encode()).hexdigest()[:16]}"
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("data", type=Path, help="real images")
    p.add_argument("out", type=Path, help="folder of all runs, to be made")
    p.add_argument("--code", type=Path, default=ROOT, help="checkout whose commands are run")
    args = p.parse_args()
    runs, found = args.out.resolve(), {}
    small_sets(args.data.resolve(), runs / "data")
    for name, command in COMMANDS.items():
        found[name] = run(name, command, args.code.resolve(), runs, runs / "data")
        (runs / "digests.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
