"""Many tasks together or apart, on real frames, on a CPU: writes benchmarks/results/many_tasks.md.

    python benchmarks/many_tasks.py DATA OUT --pretrain
    python benchmarks/many_tasks.py DATA OUT

DATA holds fmc_uia (five tasks of four kinds on hc18's and busi's images), hc18, busi and pocus. 30 % of the groups (hc18's
examinations, busi's images) are the test set; what looks like a test image (busi holds copies under other names) is left
out, and no pretraining sees either. All the rest is pretrained on, without labels, with rotary positions; each of the
three paradigms then starts from there, with two seeds. The same command again goes on where it stopped.
"""

import csv
import glob
import os

import numpy as np

from comparison import get_args, pretraining, run, write_results  # first: it puts the project on the path
from frames.images import read_image
from frames.leakage import look_alikes
from labelled.fmc_uia import read_tasks, split_tasks
from labelled.store import Images

EXAMINATION = r"(\d+)_\d*HC"
GROUPS = {"breast_3cls": "breast", "breast_lesion": "breast", "breast_lesion_det": "breast", "fetal_head": "head",
          "fetal_head_ofd": "head"}
FLAGS = ["--preset", "cpu", "--img_size", "80", "--channels", "32", "--iters", "240", "--val_every", "40", "--seeds", "2"]


def hold_out(data, out):
    """Write OUT/test.csv, a CSV image,label,group of 30 % of the groups, and OUT/fmc_uia/csv_files, fmc_uia's CSVs with a
    column split, without the rows whose image looks like a test image. How many images those are."""
    found = read_tasks(f"{data}/fmc_uia", EXAMINATION)
    splits = np.array(split_tasks(found, seed=0, val=0.1, test=0.3)[0])
    images = Images(len(found.paths), lambda i: read_image(found.paths[i]))
    images.at(8)  # reads them
    copies = (splits != "test") & look_alikes(images.looks, images.looks[splits == "test"])
    with open(f"{out}/test.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "group"])
        writer.writerows((found.paths[i], "test", found.groups[i]) for i in np.flatnonzero(splits == "test"))
    split_of = {path: split for path, split, copy in zip(found.paths, splits, copies) if not copy}
    os.makedirs(f"{out}/fmc_uia/csv_files", exist_ok=True)
    for path in glob.glob(f"{found.csv_folder}/*.csv"):
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames
        for row in rows:
            row.update({name: os.path.normpath(os.path.join(found.csv_folder, row[name]))
                        for name in ("image_path", "mask_path") if name in row})
        with open(f"{out}/fmc_uia/csv_files/{os.path.basename(path)}", "w", newline="") as file:
            writer = csv.DictWriter(file, [*columns, "split"])
            writer.writeheader()
            writer.writerows({**row, "split": split_of[row["image_path"]]} for row in rows
                             if row["image_path"] in split_of)
    return int(copies.sum())


def main():
    args = get_args(__doc__, "train and score the paradigms")
    copies = hold_out(args.data, args.out)
    with open(f"{args.out}/groups.csv", "w", newline="") as file:
        csv.writer(file).writerows([("task", "group"), *GROUPS.items()])
    folders, training = pretraining(args, {"fmc_uia": f"{args.out}/test.csv"}, 1, ["--pos", "rope"])
    if args.pretrain:
        return run(training)
    scoring = ["python", "finetune_multi.py", "--data", f"{args.out}/fmc_uia", "--group_regex", EXAMINATION, "--groups",
               f"{args.out}/groups.csv", *FLAGS, "--paradigm", "task", "clinical", "all", "--ckpt",
               f"{folders[0]}/last.pt", "--output_dir", f"{args.out}/runs"]
    write_results(args, "many_tasks", "Many tasks together or apart, on real frames", training, folders, [scoring],
                  {"busi and hc18": copies})


if __name__ == "__main__":
    main()
