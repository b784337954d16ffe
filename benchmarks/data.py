"""What feeding a training step costs the CPU: reading a pack, making one, and DINOv2's way, ten crops of each file.

    python benchmarks/data.py                       # all parts, five minutes on two cores
    python benchmarks/data.py --parts reading       # one; the others' results stay

reading  images and bytes a second that arrive from DataLoader workers, as pretrain.py asks for them
packing  CPU time a frame of pack.py and of a ten-crop loader, on the same files; CPU time of a trained image either way
workers  how soon pack.py's processes decode and what they keep in memory, and the same where they import torch
scale    2,000,000 canvases against 10,000: cost of a step, start, memory
"""
import argparse
import contextlib
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from record import ROOT, reporter  # first: it puts the project on the path, whose data.py is not this file
import data
import pretrain
import runtime
from frames import phantom
from frames.packed import INDEX, PACK_VERSION, Pack, image_order
from pack import make_pack
from timing import goal

READING, START, MEMORY, ORDER = 2.2, 10.0, 1000.0, 2.0  # goals: GB/s at least; at most seconds, MB, seconds
JPEG, PNG, FLAT = 4.0, 1.3, 1.2  # times the ten-crop loader's rate at least; a step of a large pack, of a small one's
LEAN = 0.5  # of what processes cost that import torch
EPOCHS = 128  # the recipe: 256,000,000 images seen of 2,000,000


def median_of(rows, key):
    return statistics.median(row[key] for row in rows)


def spread(values):
    return f"{min(values):.2f} to {max(values):.2f}"


def cpu_seconds():
    """Of this process and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def write_pack(folder, images, groups, canvas, noise=False):
    """A pack of unread images: canvases of noise, or a sparse file of zeros that takes no disk."""
    os.makedirs(folder)
    with open(os.path.join(folder, "canvases.u8"), "wb") as file:
        block = np.random.default_rng(0).integers(0, 256, (min(images, 500), canvas, canvas), np.uint8)
        for first in range(0, images if noise else 0, len(block)):
            file.write(block[:images - first])
        file.truncate(images * canvas ** 2)
    row = np.zeros((), INDEX)
    row["width"], row["height"], row["looks"] = 640, 480, b"0" * INDEX["looks"].itemsize
    with open(os.path.join(folder, "index.csv"), "w") as file:
        file.write(",".join(INDEX.names) + "\n")
        for index in range(images):
            row["group"], row["hash"] = index * groups // images, b"%016x" % index
            file.write(",".join(x.decode() if isinstance(x, bytes) else str(x) for x in row.tolist()) + "\n")
    with open(os.path.join(folder, "groups.csv"), "w") as file:
        file.write("group,digest,named\n" + "".join(f"{group},{group:016x},1\n" for group in range(groups)))
    info = dict(version=PACK_VERSION, images=images, canvas=canvas, mean=0.2, std=0.2, groups=groups, digest="",
                grouped_by="number")
    Path(folder, "pack.json").write_text(json.dumps(info))
    return folder


# ---------------------------------------------------------------- reading

def loader_row(batches, workers, steps, pinned=None, warmup=10):
    """What one pass gives; pinned: memory that the main process copies canvases into, as pinning them does."""
    used, args = cpu_seconds(), batches.args
    loader = batches.loader(range(warmup + steps), workers, worker_init_fn=runtime.ignore_signals)
    for step in range(warmup + steps):
        if step == warmup:
            started = time.monotonic()
        micros = next(loader)
        if pinned is not None:
            for micro in micros:
                pinned.copy_(micro["canvases"])
    images = steps * args.accum_iter * args.batch_size_per_gpu / (time.monotonic() - started)
    del loader  # the workers end
    return {"images/s": images, "GB/s": images * batches.pack.canvases[0].nbytes / 1e9, "CPU ms an image":
            1000 * (cpu_seconds() - used) / (warmup + steps) / args.accum_iter / args.batch_size_per_gpu}


def bare_row(pack, batch, steps):
    """Canvases of random images copied into memory that was written before, by one process."""
    out, order = np.ones((batch, *pack.canvases.shape[1:]), np.uint8), np.random.default_rng(0).permutation(len(pack))
    used, started = cpu_seconds(), time.monotonic()
    for step in range(steps):
        data.read_canvases(pack.canvases, order.take(np.arange(step * batch, (step + 1) * batch), mode="wrap"), out)
    images = steps * batch / (time.monotonic() - started)
    return {"images/s": images, "GB/s": images * out[0].nbytes / 1e9,
            "CPU ms an image": 1000 * (cpu_seconds() - used) / steps / batch}


def part_reading(report, folder, images=15_000, canvas=384, batch=128, steps=120, repeats=5):
    pack = Pack(write_pack(os.path.join(folder, "noise.pack"), images, max(images // 400, 1), canvas, noise=True))
    args = pretrain.get_args(["--preset", "ultradino", "--batch_size_per_gpu", str(batch)])
    pinned = torch.zeros(batch, canvas, canvas, dtype=torch.uint8)
    kinds = {"2 workers": lambda: loader_row(data.PretrainBatches(pack, args), 2, steps),
             "2 workers, copied again": lambda: loader_row(data.PretrainBatches(pack, args), 2, steps, pinned),
             "2 workers, rank 0 of 8": lambda: loader_row(data.PretrainBatches(pack, args, 0, 8), 2, steps),
             "1 worker": lambda: loader_row(data.PretrainBatches(pack, args), 1, steps),
             "1 process, bytes alone": lambda: bare_row(pack, batch, steps)}
    for name in kinds:  # once unmeasured: the file is in the page cache from here on
        kinds[name]()
    found = {name: [] for name in kinds}
    for _ in range(repeats):
        for name, measure in kinds.items():
            found[name].append(measure())
    report(f"{images:,} canvases of {canvas} in the page cache, batches of {batch}, 2 global and "
           f"{args.local_crops_number} local crops; medians of {repeats} rounds of {steps} steps. A loader row has all "
           "that PretrainBatches does: order, random draws, masks, canvases and the way through shared memory into the "
           "main process, which looks at none of them; in the second row it copies the canvases once more, as pinning "
           "does. Not: crops, which the training device makes. CPU time: all processes, the workers' start too.",
           [{"read by": name, **{key: median_of(rows, key) for key in rows[0]},
             "GB/s, lowest to highest": spread([row["GB/s"] for row in rows])} for name, rows in found.items()])
    report("Goal.", [goal("2 workers, all that a step needs: GB/s", READING, median_of(found["2 workers"], "GB/s"),
                          least=True)])
    return median_of(found["2 workers"], "CPU ms an image")


# ---------------------------------------------------------------- DINOv2's loader, by hand in Pillow

def resized_crop(image, size, scale):
    """torchvision's RandomResizedCrop, bicubic, then its horizontal flip of half of them."""
    W, H = image.size
    for _ in range(10):
        area, aspect = W * H * random.uniform(*scale), 2 ** random.uniform(np.log2(3 / 4), np.log2(4 / 3))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= W and 0 < h <= H:
            break
    else:
        w = h = min(W, H)
    left, top = random.randint(0, W - w), random.randint(0, H - h)
    image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BICUBIC)
    return ImageOps.mirror(image) if random.random() < 0.5 else image


def shift_hue(image, share):
    h, s, v = image.convert("HSV").split()
    h = Image.fromarray(np.asarray(h) + np.uint8(int(share * 255) % 256))
    return Image.merge("HSV", (h, s, v)).convert("RGB")


def colour_jitter(image):
    """ColorJitter(0.4, 0.4, 0.2, 0.1) of four in five, in random order; then one in five becomes grey."""
    if random.random() < 0.8:
        steps = [(enhancer, random.uniform(1 - amount, 1 + amount)) for enhancer, amount in (
            (ImageEnhance.Brightness, 0.4), (ImageEnhance.Contrast, 0.4), (ImageEnhance.Color, 0.2))]
        steps.append((None, random.uniform(-0.1, 0.1)))
        for enhancer, factor in random.sample(steps, 4):
            image = enhancer(image).enhance(factor) if enhancer else shift_hue(image, factor)
    return image.convert("L").convert("RGB") if random.random() < 0.2 else image


def to_tensor(image, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
    return x.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def ten_crops(path):
    """The file's 2 global and 8 local crops, as DINOv2's released code augments them."""
    image, crops = Image.open(path).convert("RGB"), []
    for size, scale, blur, solarize in (224, (0.32, 1.0), 0.0, 0.0), (224, (0.32, 1.0), 0.9, 0.2), *8 * [
            (96, (0.05, 0.32), 0.5, 0.0)]:
        crop = colour_jitter(resized_crop(image, size, scale))
        if random.random() < blur:
            crop = crop.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        if random.random() < solarize:
            crop = ImageOps.solarize(crop, 128)
        crops.append(to_tensor(crop))
    return crops


# ---------------------------------------------------------------- packing

def save_frames(folder, frames, height=480, width=640):
    """Phantom frames as files: {kind: folder}; grey and colour, as an export program may have written either."""
    pixels = phantom.phantom_images(frames, width)[0][:, (width - height) // 2:][:, :height]
    folders = {}
    for kind, suffix, mode, how in (("PNG", "png", "L", {}), ("PNG, RGB", "png", "RGB", {}),
                                    ("JPEG", "jpg", "L", {"quality": 90}),
                                    ("JPEG, RGB", "jpg", "RGB", {"quality": 90})):
        folders[kind] = os.path.join(folder, kind.replace(", ", "_"))
        os.makedirs(folders[kind])
        for number, grey in enumerate(pixels):
            Image.fromarray(grey).convert(mode).save(os.path.join(folders[kind], f"{number:04d}.{suffix}"), **how)
    return folders


def frame_times(source, out):
    """CPU ms a frame of pack.make_pack, in this process, and of ten_crops."""
    paths = sorted(Path(source).iterdir())
    started = time.process_time()
    make_pack([str(source)], out, workers=1, log=lambda _: None)
    packed = time.process_time()
    for path in paths:
        ten_crops(path)
    times = [1000 * seconds / len(paths) for seconds in (packed - started, time.process_time() - packed)]
    shutil.rmtree(out)
    return times


def part_packing(report, folder, frames=120, repeats=5, reading_ms=None):
    sources = save_frames(folder, frames)
    frame_times(sources["PNG"], os.path.join(folder, "frames.pack"))  # once unmeasured
    found = {kind: [] for kind in sources}
    for _ in range(repeats):
        for kind, source in sources.items():
            found[kind].append(frame_times(source, os.path.join(folder, "frames.pack")))
    rows = []
    for kind, times in found.items():
        pack_ms, crops_ms = (statistics.median(column) for column in zip(*times))
        rows.append({"files": kind, "KB a file": sum(path.stat().st_size for path in Path(sources[kind]).iterdir())
                     / 1000 / frames, "pack.py ms": pack_ms, "ten crops ms": crops_ms,
                     "times faster": statistics.median(crops / packed for packed, crops in times),
                     "lowest to highest": spread([crops / packed for packed, crops in times])})
    report(f"CPU time a frame on one core: {frames} phantom frames of 640x480 with speckle, JPEG quality 90, medians "
           f"of {repeats} rounds. pack.py: all of make_pack in one process, so decoding, hashes, squashing to 384, "
           "writing and tables. Ten crops: decoding to RGB, two crops of 224 and eight of 96 with DINOv2's "
           "augmentation in Pillow (its Gaussian blur, where torchvision's takes longer), to normalised tensors; not "
           "collating, not the way to the main process, not masks.", rows)
    if reading_ms is not None:
        report(f"CPU time of an image each time it is trained on, ms: packing once in {EPOCHS} epochs and reading by 2 "
               "workers, draws and masks included, against ten crops each time.",
               [{"files": row["files"], "packed": row["pack.py ms"] / EPOCHS + reading_ms,
                 "ten crops": row["ten crops ms"],
                 "times less": row["ten crops ms"] / (row["pack.py ms"] / EPOCHS + reading_ms)} for row in rows])
    report("Goals.", [goal(f"{row['files']}: frames packed in the time of one's ten crops",
                           JPEG if "JPEG" in row["files"] else PNG, row["times faster"], True) for row in rows])


# ---------------------------------------------------------------- packing's processes

# pack.py by a script that imports torch, as pretrain.py does, and whose processes import it again
WITH_TORCH = """import contextlib
import sys
sys.path.insert(0, {root!r})
import torch
import pack
from frames import images
images.without_script = contextlib.nullcontext
if __name__ == "__main__":
    pack.main(pack.get_args())
"""


def private_mb(pid):
    """What a process alone keeps in memory, by Linux; 0 if it has just ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    return sum(map(int, re.findall(r"^Private_(?:Clean|Dirty):\s*(\d+) kB", text, re.M))) / 1024


def decoding_processes(pid):
    """Of a pack.py that runs: the children of its fork server."""
    children = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            children.setdefault(int(status.read_text().rsplit(")", 1)[1].split()[1]), []).append(int(status.parent.name))
    return [own for child in children.get(pid, ()) for own in children.get(child, ())]


def packing_row(script, source, out, workers):
    """How soon the first canvases of a packing are on disk, and the largest of its decoding processes."""
    command = [sys.executable, script, source, out, "--canvas", "64", "--workers", str(workers)]
    started, first, most = time.monotonic(), None, 0.0
    running, canvases = subprocess.Popen(command, stdout=subprocess.DEVNULL), Path(f"{out}.part/canvases.u8")
    while running.poll() is None:
        with contextlib.suppress(OSError):
            if first is None and canvases.stat().st_size:
                first = time.monotonic() - started
        if first is not None:  # before it, looking would slow what is timed
            most = max([most, *map(private_mb, decoding_processes(running.pid))])
        time.sleep(0.005)
    if running.returncode:
        raise ChildProcessError(f"{' '.join(command)}: exit status {running.returncode}")
    shutil.rmtree(out)
    return {"first canvases, s": first or time.monotonic() - started, "private MB of a process": most}


def part_workers(report, folder, frames=1000, workers=2, repeats=5):
    source, script = save_frames(folder, frames, 240, 320)["PNG"], os.path.join(folder, "with_torch.py")
    Path(script).write_text(WITH_TORCH.format(root=str(ROOT)))
    rows = {"pack.py": [], "with torch": []}
    for number in range(repeats + 1):  # the first time unmeasured
        for (name, found), path in zip(rows.items(), (str(ROOT / "pack.py"), script)):
            row = packing_row(path, source, os.path.join(folder, "frames.pack"), workers)
            found += [row] * (number > 0)
    keys = list(rows["pack.py"][0])
    report(f"{frames:,} phantom PNG files of 320x240, {workers} processes, medians of {repeats} rounds in turn: from the "
           f"command's start to the first canvases on disk, and the largest private memory of a decoding process. With "
           f"torch: the same by a script that imports torch, and that each process imports anew.",
           [{"script": name, **{key: median_of(found, key) for key in keys}} for name, found in rows.items()])
    report("Goals.", [goal(f"{key}, of the script's with torch", LEAN, statistics.median(
        own[key] / other[key] for own, other in zip(*rows.values()))) for key in keys])


# ---------------------------------------------------------------- scale

def memory_mb(key):
    """Of this process, by Linux: Private_Dirty has no page cache, as Rss does; VmPTE is what mapping the pack takes."""
    text = "".join(Path("/proc/self", name).read_text() for name in ("smaps_rollup", "status"))
    return int(re.search(rf"{key}:\s*(\d+) kB", text).group(1)) / 1024


def step_ms(batches, first, steps):
    """CPU ms of a step in this process: canvases that nobody has read yet, so zeros that the kernel makes."""
    started = time.process_time()
    for step in range(first, first + steps):
        batches[step]
    return 1000 * (time.process_time() - started) / steps


def part_scale(report, folder, small=10_000, large=2_000_000, groups=5_000, canvas=384, steps=10, repeats=5):
    args = pretrain.get_args(["--preset", "ultradino"])
    args.batch_size_per_gpu = min(args.batch_size_per_gpu, small // (steps * (repeats + 1)))
    folders = [write_pack(os.path.join(folder, f"{images}.pack"), images, min(groups, images), canvas)
               for images in (small, large)]
    few = data.PretrainBatches(Pack(folders[0]), args)
    few.indices(0)
    before = memory_mb("Private_Dirty")
    started = time.monotonic()
    pack = Pack(folders[1])
    opened = time.monotonic()
    many = data.PretrainBatches(pack, args)
    many.indices(0)
    ordered = time.monotonic()
    loader = many.loader(range(2), 1, worker_init_fn=runtime.ignore_signals)
    next(loader)
    arrived = time.monotonic()
    del loader
    private = memory_mb("Private_Dirty")
    mixed = np.random.default_rng(0).permutation(pack.groups)
    shuffled = time.monotonic()
    image_order(mixed, 0, 1)
    shuffled = time.monotonic() - shuffled
    times = []
    for number in range(repeats + 1):
        times.append([step_ms(batches, number * steps, steps) for batches in (few, many)])
    times = times[1:]
    arrays = sum(array.nbytes for array in (pack.sizes, pack.groups, pack.hashes, pack.looks, *many.orders.values()))
    report(f"A sparse pack of {large:,} canvases in {groups:,} groups, {large * canvas ** 2 / 1e9:.0f} GB apparent, "
           f"and one of {small:,}. Private memory is dirty pages of this process, Python and torch included, no page "
           "cache; forked workers share it.",
           [{"what": what, "found": value} for what, value in (
               ("opening the pack, s", opened - started), ("first order, s", ordered - opened),
               ("order, groups not stored together, s", shuffled), ("first batch from a worker, s", arrived - ordered),
               ("private memory before, MB", before), ("private memory after, MB", private),
               ("arrays of index and order, MB", arrays / 2 ** 20),
               ("page tables after the steps, MB", memory_mb("VmPTE")))])
    ratio = statistics.median(many_ms / few_ms for few_ms, many_ms in times)
    report(f"CPU time of a step of {args.batch_size_per_gpu} images in one process, canvases that it has not read "
           f"before; medians of {repeats} rounds in turn.",
           [{"canvases": images, "ms a step": statistics.median(column)} for images, column in
            zip((small, large), zip(*times))])
    report("Goals.", [goal("a step of the large pack, of the small one's", FLAT, ratio),
                      goal("start: pack, order, first batch, s", START, arrived - started),
                      goal("private memory of the process, MB", MEMORY, private),
                      goal("order, s", ORDER, max(ordered - opened, shuffled))])


# quick: what a test can wait for; its figures mean nothing
QUICK = {"reading": dict(images=60, canvas=32, batch=4, steps=4, repeats=2), "packing": dict(frames=3, repeats=2),
         "workers": dict(frames=20, repeats=1), "scale": dict(small=300, large=3000, groups=30, canvas=32, steps=2, repeats=2)}
PARTS = {"reading": ("Reading", part_reading), "packing": ("Packing", part_packing),
         "workers": ("Packing's processes", part_workers), "scale": ("Scale", part_scale)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/data"), help="path without .md and .json")
    parser.add_argument("--folder", help="where temporary packs go (2.5 GB); default: the system's")
    parser.add_argument("--quick", action="store_true", help="a handful of small images, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)  # as DataLoader's workers and its pinning thread have
    reading_ms = None
    for part in [name for name in PARTS if name in args.parts]:  # reading first: packing's second table needs it
        title, run = PARTS[part]
        command = f"python benchmarks/data.py --parts {' '.join(args.parts)}" + " --quick" * args.quick
        report = reporter(args.output, "Measured: data", part, title, command)
        more = {"reading_ms": reading_ms} if part == "packing" else {}
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found = run(report, folder, **more, **(QUICK[part] if args.quick else {}))
        reading_ms = found if part == "reading" else reading_ms


if __name__ == "__main__":
    main()
