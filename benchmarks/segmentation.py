"""Does pretraining help to outline? Pretrained on real frames against the same network from scratch, on a CPU: writes
benchmarks/results/segmentation.md.

    python benchmarks/segmentation.py DATA OUT --pretrain
    python benchmarks/segmentation.py DATA OUT

DATA holds hc18 (fetal heads), busi (breast lesions) and pocus (lung). 30 % of hc18's examinations and 40 % of busi's images
are the test sets, and no pretraining sees them, nor their copies. All the rest is pretrained on, three times, without
masks. The same command again goes on where it stopped.
"""

import csv
import os

import numpy as np

from real_cpu import MASKS, hold_out  # first: it puts the project on the path
from comparison import SEEDS, get_args, held_out, pretraining, run, write_results
from frames.lists import list_images
from labelled.labels import read_labelled

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
    args = get_args(__doc__, "train and score decoders")
    data, out = args.data, args.out
    sets = {"hc18": list_images(f"{data}/hc18/training_set", MASKS, r"(\d+)_\d*HC"),
            "busi": read_labelled(f"{data}/busi", exclude=MASKS)}
    tests = {name: f"{out}/{name}_test.csv" for name in sets}
    hold_out_heads(sets["hc18"], tests["hc18"])
    hold_out(sets["busi"], tests["busi"])
    copies = {name: write_split(images, tests[name], f"{out}/{name}.csv") for name, images in sets.items()}
    folders, training = pretraining(args, tests)
    if args.pretrain:
        return run(training)
    files, nothing, scoring = ",".join(f"{folder}/last.pt" for folder in folders), ",".join(["none"] * SEEDS), []
    folder_of = {"hc18": f"{data}/hc18/training_set", "busi": f"{data}/busi"}
    for name in sets:
        for protocol, flags in PROTOCOLS.items():
            scoring.append(["python", "finetune_seg.py", "--data", folder_of[name], "--split", f"{out}/{name}.csv",
                            "--ckpt", f"pretrained={files}", f"scratch={nothing}", *COMMON, *flags, "--output_dir",
                            f"{out}/{name}_{protocol}", "--latex", f"{out}/{name}_{protocol}.tex"])
    write_results(args, "segmentation", "Segmentation, pretrained and from scratch, on real frames", training, folders,
                  scoring, copies)


if __name__ == "__main__":
    main()
