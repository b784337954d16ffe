"""What a mask costs: a segmenter's forward pass, and predict.py over a folder; tables go to
benchmarks/results/segment_speed.md and .json.

    python benchmarks/segment_speed.py                       # both parts, six minutes on one core
    python benchmarks/segment_speed.py --parts folder        # one; the other's results stay

forward  ViT-S/16 at 224 pixels with each decoder, random weights: ms per image, batches of 1, 8 and 32
folder   predict.py over 200 and 800 files, each in a process of its own: ms per image, and that memory does not grow
"""
import argparse
import contextlib
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from record import ROOT, reporter  # first: it puts the project on the path
import predict
import runtime
from frames import phantom
from model import SIZES, VisionTransformer
from networks.decoders import Segmenter
from timing import divided, goal, rounds
from training import segmenter

DECODERS = {"UPerNet, as wide as the backbone": dict(name="upernet", channels=None, norm="group"),
            "UPerNet, 128 channels": dict(name="upernet", channels=128, norm="group"),
            "linear": dict(name="linear", channels=None, norm="group")}
CLASSES, SIDE, GROWTH = 5, 224, 1.1  # goal: peak memory of the larger folder, of the smaller one's


def network_of(decoder, arch, side):
    """(network in eval mode with random weights, how it is built)"""
    torch.manual_seed(0)
    config = dict(SIZES[arch], img_size=side, patch_size=16, in_chans=1, num_register_tokens=4)
    backbone = VisionTransformer(**config)
    return Segmenter(backbone, segmenter.make_decoder(DECODERS[decoder], backbone.embed_dim, CLASSES)).eval(), config


# ---------------------------------------------------------------- the forward pass

def part_forward(report, arch="vit_small", side=SIDE, batches=(1, 8, 32), repeats=2):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, repeats, rows = "bfloat16" if device == "cuda" else "float32", repeats if device == "cpu" else 20, []
    for decoder in DECODERS:
        network = network_of(decoder, arch, side)[0].to(device)
        x = torch.randn(max(batches), 1, side, side, device=device)

        def call(batch):
            with torch.no_grad(), torch.autocast(device, getattr(torch, dtype), enabled=device == "cuda"):
                network(x[:batch])

        call(1)
        times = rounds({batch: lambda batch=batch: call(batch) for batch in batches}, device, repeats, device == "cuda")
        row = {"decoder": decoder, "parameters, M": sum(p.numel() for p in network.decoder.parameters()) / 1e6}
        rows.append({**row, **{f"batch {batch}": statistics.median(times[batch]) / batch for batch in batches}})
    last = f"batch {batches[-1]}"
    for row in rows:
        row["of linear"] = divided(row[last], rows[-1][last])
    what = "CPU time on one thread" if device == "cpu" else "time on the GPU"
    size = sum(p.numel() for p in network.backbone.parameters()) / 1e6
    report(f"ms per image: {what} of a forward pass, {dtype}, {arch} ({size:.1f} M parameters) at {side} pixels with "
           f"patches of 16 and 4 registers, {CLASSES} classes; medians of {repeats} rounds in turn. The last column: "
           f"{last}.", rows)


# ---------------------------------------------------------------- a folder

def save_frames(folder, number, distinct=25, height=480, width=640):
    """`number` PNG files, the same few pictures under many names."""
    pictures, rng = phantom.phantom_images(distinct, 320, 1)[0], np.random.default_rng(0)
    os.makedirs(folder)
    for index in range(number):
        path = os.path.join(folder, f"{index:05d}.png")
        if index < distinct:
            frame = np.array(Image.fromarray(pictures[index]).resize((width, height), Image.Resampling.BICUBIC), float)
            frame = np.where(frame > 4, frame + rng.normal(0, 12, frame.shape), 0).clip(0, 255)  # speckle in the fan
            Image.fromarray(frame.astype(np.uint8)).save(path)
        else:
            os.link(os.path.join(folder, f"{index % distinct:05d}.png"), path)
    return folder


def child(ckpt, folder, out, batch_size):
    """predict.py in this process: print what it took."""
    torch.set_num_threads(1)
    words = ["--ckpt", ckpt, "--data", folder, "--output_dir", out, "--batch_size", batch_size]
    started = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        predict.main(predict.get_args(words))
    spent, used = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    # by Linux: ru_maxrss would start from what the process that started this one had
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024
    waited = re.search(r"(\d+ %) of the time waited for reading", said.getvalue()).group(1)
    print(json.dumps({"s": spent, "CPU s": used.ru_utime + used.ru_stime, "waited for reading": waited,
                      "peak MB": peak}))


def part_folder(report, arch="vit_small", side=SIDE, sizes=(200, 800), batch_size=8, decoder="linear"):
    network, config = network_of(decoder, arch, side)
    state, rows = network.state_dict(), []
    with tempfile.TemporaryDirectory() as top:
        ckpt = os.path.join(top, "run.pt")
        runtime.save_checkpoint(ckpt, {
            "classes": ["background", *map(str, range(1, CLASSES))], "decoder": DECODERS[decoder], "config": config,
            "mean": 0.2, "std": 0.2, "img_size": side,
            **{part: {key: value for key, value in state.items() if key.startswith(own)}
               for part, own in (("teacher", "backbone."), ("head", "decoder."))}})
        for number in (1, *sizes):  # of one image: what starting costs
            words = [ckpt, save_frames(os.path.join(top, f"{number}"), number), os.path.join(top, f"{number}-masks")]
            done = subprocess.run([sys.executable, __file__, "--child", *words, str(batch_size)], text=True, check=True,
                                  stdout=subprocess.PIPE, env=dict(os.environ, OMP_NUM_THREADS="1"))
            rows.append({"images": number, **json.loads(done.stdout.splitlines()[-1])})
            assert len(os.listdir(words[2])) == number + 2  # segment.json, skipped.csv
    start, *rows = rows
    for row in rows:
        for name in ("s", "CPU s"):
            row[name.replace("s", "ms an image")] = 1000 * (row.pop(name) - start[name]) / (row["images"] - 1)
    small, large = rows
    for name in ("ms an image", "CPU ms an image", "peak MB"):
        large[f"{name}, ratio"] = large[name] / small[name]
    device = "GPU" if torch.cuda.is_available() else "CPU, one thread of torch"
    report(f"predict.py on a {device}: {arch} at {side} pixels, {decoder} decoder, batches of {batch_size}; PNG files "
           f"of 640x480 in the page cache, masks of that size. Times are beyond those of a folder of one image, CPU "
           f"time is of all threads, reading and writing too; ratios to the smaller folder.", rows)
    report("Goal.", [goal(f"peak memory, {large['images']} images, of {small['images']} images'", GROWTH,
                          large["peak MB"] / small["peak MB"])])


PARTS = {"forward": ("Forward pass", part_forward), "folder": ("A folder", part_folder)}
# what a test can wait for; its figures mean nothing
QUICK = {"forward": dict(arch="vit_micro", side=32, batches=(1, 2)),
         "folder": dict(arch="vit_micro", side=32, sizes=(3, 9))}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/segment_speed"),
                        help="path without .md and .json")
    parser.add_argument("--quick", action="store_true", help="a small network and few images, to see that it runs")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    torch.set_num_threads(1)
    for part in args.parts:
        title, run = PARTS[part]
        command = f"python benchmarks/segment_speed.py --parts {part}" + " --quick" * args.quick
        report = reporter(args.output, "Measured: masks", part, title, command)
        run(report, **(QUICK[part] if args.quick else {}))


if __name__ == "__main__":
    main()
