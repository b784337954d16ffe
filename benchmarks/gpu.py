"""All that only a GPU can show, by one command; tables go to benchmarks/results/gpu.md and gpu.json.

    python benchmarks/gpu.py                       # every part, about half an hour on one card
    python benchmarks/gpu.py --parts a b c         # some; what other parts found before stays

a   what the card can do: copy, bf16 matrix product
b   every kernel against its formula in float64; memory and race checks
c   every kernel's speed against the best that torch offers
d   whole steps: images/s, memory, share of the product's ceiling; d1, d2 and d3 are ViT-S, B and L
e   where a step's time goes, and whether the CPU ever waits for the GPU in it
f   steps with the input pipeline
g   experts and steps of finetune_multi.py

Each part is a process of its own and has eight minutes; one that fails costs the others nothing.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

import torch

from record import ROOT, machine, read_results, write_part  # first: it puts the project on the path
import data
import gpu_kernels
import gpu_tasks
import plain
import pretrain
import runtime
from gpu_kernels import BACKENDS, ceilings, share
from steps import Canvases, Ours, Plain, arguments, one_batch, step_flops
from timing import divided, first_line, free, goal, peak_of, step_times, waits

MINUTES = 8
# size: batch, images/s, times faster than plain, share of plain's memory, (batch, flags, GB) that a run must fit
GOALS = {"vit_small": (128, 2400, 1.7, 0.5, (128, [], 18)), "vit_base": (64, 950, 1.4, 0.65, (64, [], 20)),
         "vit_large": (64, 320, 1.25, 0.75, (32, ["--checkpoint_activations"], 22))}


def best_backend(args, device):
    """The fastest SDPA of torch for this step's global crops, forward and backward, as a ViT calls it."""
    c, shapes = pretrain.backbone_config(args), [(2 * args.batch_size_per_gpu, 201)]
    times = {row["by"]: row["forward + backward ms"] for row in gpu_kernels.attention_speed(
        shapes, c["num_heads"], c["embed_dim"] // c["num_heads"], device, dict(copy=1, matmul=1), repeats=10)}
    times = {name: times[f"SDPA {name}"] for name in BACKENDS if isinstance(times[f"SDPA {name}"], float)}
    return min(times, key=times.get)


# ---------------------------------------------------------------- d: whole steps

def build(kind, *args):
    """What kind(*args) makes, after an eager step, and the bytes that it keeps."""
    before = torch.cuda.memory_allocated()
    made = kind(*args[:-1])
    try:
        made.step(args[-1])()
    except Exception as error:  # its own row will say so, too
        print(first_line(error))
    free()
    return made, torch.cuda.memory_allocated() - before


def whole_steps(arch, device="cuda", rounds=6):
    """Rows of one size, steps taken in turn in one process: first eager ones, then again with compiled ones."""
    args = arguments(arch, GOALS[arch][0])
    backend, matmul, micro = best_backend(args, device), ceilings(device)["matmul"], one_batch(args, device)
    plain.Attention.backend = BACKENDS[backend]
    flops = step_flops(args, plain.prepare(micro)["n_masked"])
    ours, our_bytes = build(Ours, args, device, micro)
    other, other_bytes = build(Plain, args, device, ours, micro)
    both = {"ours": (ours.step(micro), other_bytes), "plain": (other.step(micro), our_bytes)}
    steps = {**both, "ours --reference_ops": (ours.step(micro, reference=True), other_bytes)}, {
        **both, "ours --compile": (ours.step(micro, compiled=True), other_bytes),
        "plain compiled": (other.step(micro, compiled=True), our_bytes)}
    for some in steps:
        peaks = {name: peak_of(call) for name, (call, _) in some.items()}
        peaks = {name: peak - some[name][1] if isinstance(peak, int) else peak for name, peak in peaks.items()}
        calls = {name: call for name, (call, _) in some.items() if isinstance(peaks[name], int)}
        times = peaks | step_times(calls, device, rounds)  # of a failed one: why
        shown = {name: f"{name}, {backend} SDPA" if "plain" in name else name for name in some}
        yield [{"step": f"{arch}, batch {args.batch_size_per_gpu}", "by": shown[name],
                "ms": times[name], "images/s": divided(1000 * args.batch_size_per_gpu, times[name]),
                "of matmul": share(flops, divided(times[name], 1000), matmul), "peak GB": divided(peaks[name], 1e9),
                "times faster than plain": divided(times["plain"], times[name]),
                "memory of plain": divided(peaks[name], peaks["plain"])} for name in some]


def fit(arch, batch, gigabytes, flags):
    """Run steps with the allocator held to so many GB (10^9 bytes): prints a JSON line."""
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    args = arguments(arch, batch, *flags)
    ours, micro = Ours(args, "cuda"), one_batch(args, "cuda")
    call = ours.step(micro)
    peak = peak_of(call)
    ms = step_times({"step": call}, "cuda")["step"]
    print(json.dumps({"step": " ".join([arch, "batch", str(batch), *flags]), "allowed GB": gigabytes,
                      "peak GB": divided(peak, 1e9), "reserved GB": torch.cuda.max_memory_reserved() / 1e9,
                      "images/s": divided(1000 * batch, ms),
                      "result": "met" if isinstance(ms, float) else f"missed: {ms}"}))


def fit_elsewhere(arch, batch, flags, gigabytes):
    """fit in a process of its own."""
    command = [sys.executable, __file__, "--worker", "fit", arch, str(batch), str(gigabytes), *flags]
    try:
        done = subprocess.run(command, text=True, capture_output=True, timeout=120)
        return json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
        return {"step": f"{arch} batch {batch}", "allowed GB": gigabytes,
                "result": f"not measured: {first_line(error)}"}


def against_goals(arch, row):
    batch, speed, faster, memory, _ = GOALS[arch]
    for what, limit, least in (("images/s", speed, True), ("times faster than plain", faster, True),
                               ("memory of plain", memory, False)):
        yield goal(f"{arch}, batch {batch}: {what}", limit, row[what], least)


def part_d(report, arch, device="cuda"):
    for rows in whole_steps(arch, device):
        report("A training step on one fixed batch of UltraDINO's crops (2 x 224, 8 x 96, K = 65,536, drop path 0.3), "
               "bf16. Peak: allocated memory, all of it. Of matmul: of the operations that the step needs.", rows)
        ours = next(row for row in reversed(rows) if row["by"] in ("ours", "ours --compile"))
        report(f"Goals, by {ours['by']}.", list(against_goals(arch, ours)))
    free()
    fitted = fit_elsewhere(arch, *GOALS[arch][4])
    report("Goal: our step in so much memory. In a process of its own, with the allocator held to it.", [fitted])


# ---------------------------------------------------------------- e: where the time goes

GROUPS = (  # the first that matches a kernel's name, in small letters
    ("attention", ("attention_", "flash", "fmha", "sdpa")),
    ("losses over prototypes", ("logsumexp_kernel", "cross_entropy_kernel", "softmax")),
    ("matrix products", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "wgmma", "splitk", "gemv")),
    ("optimizer", ("adam", "multi_tensor", "foreach")),
    ("copies and fills", ("memcpy", "memset")),
)


def group_of(name):
    return next((group for group, parts in GROUPS if any(part in name.lower() for part in parts)),
                "elementwise, norms, gathers")


def profiled(call, steps=5):
    """[(kernel's name, milliseconds per step, calls per step)], longest first."""
    call(), torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            call()
        torch.cuda.synchronize()
    found = [(event.key, event.self_device_time_total / 1000 / steps, event.count / steps)
             for event in profile.key_averages()
             if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    return sorted(found, key=lambda row: -row[1])


def grouped(columns):
    """{variant: what profiled found} -> a row per group, milliseconds per step in a column per variant."""
    names = [group for group, _ in GROUPS] + ["elementwise, norms, gathers"]
    rows = [{"group": name, **{variant: sum(ms for kernel, ms, _ in found if group_of(kernel) == name)
                               for variant, found in columns.items()}} for name in names]
    return rows + [{"group": "sum", **{variant: sum(ms for _, ms, _ in found) for variant, found in columns.items()}}]


def part_e(report, device="cuda", rounds=4):
    for arch in ("vit_small", "vit_base"):
        args = arguments(arch, GOALS[arch][0])
        micro = one_batch(args, device)
        ours = Ours(args, device)
        other = Plain(args, device, ours)
        calls = {"ours": ours.step(micro), "ours --compile": ours.step(micro, compiled=True),
                 "plain": other.step(micro)}
        wall = step_times(calls, device, rounds)
        columns = {name: profiled(call) for name, call in calls.items() if isinstance(wall[name], float)}
        rows = grouped(columns) + [{"group": "a step, without the profiler", **wall}]
        report(f"{arch}, batch {args.batch_size_per_gpu}: milliseconds per step. Plain's losses are mostly elementwise "
               "kernels.", rows)
        report(f"{arch}, ours: the longest kernels.", [
            {"kernel": name[:90], "group": group_of(name), "ms": ms, "calls": count}
            for name, ms, count in columns.get("ours", [])[:20]])
        del ours, other, calls
        free()
    rows = []
    for centering in ("centering", "sinkhorn_knopp"):
        args = arguments("vit_small", 64, "--centering", centering)
        ours, batches = Ours(args, device), data.PretrainBatches(Canvases(128), args)
        pinned = [{key: value.pin_memory() for key, value in micro.items()} for micro in batches[0]]
        micro = pretrain.to_device(pinned, torch.device(device), args, 0.5, 0.25)[0]
        for name, step in (("", ours.step(micro)), (" --compile", ours.step(micro, compiled=True))):
            step(), step()
            rows.append(waits(f"draw_drops and train_step, {centering}{name}", step))
        rows.append(waits("to_device", lambda: pretrain.to_device(pinned, torch.device(device), args, 0.5, 0.25)))
    report('Does the CPU ever wait for the GPU inside a step (torch.cuda.set_sync_debug_mode("error"))?', rows)


# ---------------------------------------------------------------- f: with the input pipeline

def pipeline(args, pack, workers, compiled, device="cuda", steps=60, warmup=10):
    """One row: the loop of pretrain.main, with events around its two halves."""
    ours = Ours(args, device)
    micro = pretrain.to_device(data.PretrainBatches(pack, args)[0], torch.device(device), args, 0.5, 0.25)[0]
    step = ours.step(micro, compiled)
    step()
    fixed = step_times({"step": step}, device)["step"]
    loader = data.PretrainBatches(pack, args).loader(range(steps), workers, pin_memory=True,
                                                     worker_init_fn=runtime.ignore_signals)
    marks, waited, pending = [], 0.0, None
    for number in range(steps):
        if number == warmup:
            torch.cuda.synchronize()
            waited, since = 0.0, time.monotonic()
        asked = time.monotonic()
        loaded = next(loader)
        waited += time.monotonic() - asked
        marks.append([torch.cuda.Event(enable_timing=True) for _ in range(3)])
        marks[-1][0].record()
        micros = pretrain.to_device(loaded, torch.device(device), args, 0.5, 0.25)
        marks[-1][1].record()
        stats = step(micros)
        marks[-1][2].record()
        previous, pending = pending, runtime.host_copy(torch.stack(list(stats.values())))
        if previous is not None:
            previous[1].synchronize()  # as the loop reads its log: one step late
    torch.cuda.synchronize()
    seconds, marks = time.monotonic() - since, marks[warmup:]
    idle = sum(one[2].elapsed_time(two[0]) for one, two in zip(marks, marks[1:])) / 1000
    crops = statistics.median(mark[0].elapsed_time(mark[1]) for mark in marks)
    whole = statistics.median(mark[0].elapsed_time(mark[2]) for mark in marks)
    b = args.batch_size_per_gpu
    return {"step": f"{args.arch}, batch {b}{', --compile' if compiled else ''}", "workers": workers,
            "images/s": len(marks) * b / seconds, "images/s, one fixed batch": 1000 * b / fixed,
            "GPU idle between steps": f"{100 * idle / seconds:.1f} %",
            "CPU waits for data": f"{100 * waited / seconds:.1f} %", "crops ms": crops,
            "crops' share": crops / whole}


def part_f(report, device="cuda", images=12_000):
    with tempfile.TemporaryDirectory() as folder:
        pack, rows = Canvases(images, folder=folder), []
        for workers, compiled in ((4, False), (8, False), (8, True)):
            rows.append(pipeline(arguments("vit_small", GOALS["vit_small"][0]), pack, workers, compiled, device))
            free()
    report(f"Training steps fed by DataLoader workers from a file of {images:,} canvases of 384 pixels, which is in "
           "the page cache.", rows)
    report("Goal.", [goal("crops, share of a ViT-S step", 0.05, rows[0]["crops' share"])])


# ---------------------------------------------------------------- parts and processes

PARTS = {"a": ("Ceilings", gpu_kernels.part_a), "b": ("Correctness", gpu_kernels.part_b),
         "c": ("Speed of kernels", gpu_kernels.part_c),
         **{f"d{i}": (f"Whole steps, {arch}", lambda report, arch=arch: part_d(report, arch))
            for i, arch in enumerate(GOALS, 1)},
         "e": ("Where a step's time goes", part_e), "f": ("With the input pipeline", part_f),
         "g": ("Experts and many tasks", gpu_tasks.part_g)}


def save(args, part, tables, started):
    command = f"python benchmarks/gpu.py --parts {part}"
    write_part(args.output, "Measured on a GPU", part, dict(
        title=PARTS[part][0], machine=machine(args.commit), command=command, minutes=(time.monotonic() - started) / 60,
        tables=tables))


def work(args, part):
    """Run one part in this process; every table is saved as soon as it is there."""
    tables, started = [], time.monotonic()

    def report(caption, rows):
        tables.append((caption, rows))
        save(args, part, tables, started)
        print(caption, *rows, sep="\n  ", flush=True)

    PARTS[part][1](report)


def start(args, part):
    """Run one part in a process of its own; returns what went wrong, which also becomes a table of the part."""
    command = [sys.executable, __file__, "--output", args.output, *(["--commit", args.commit] if args.commit else [])]
    started = time.monotonic()
    save(args, part, [("Started.", [])], started)  # nothing of an earlier run stays under this part's name
    try:
        done = subprocess.run([*command, "--worker", part], stderr=subprocess.PIPE, text=True, timeout=60 * MINUTES)
        sys.stderr.write(done.stderr)
        last = (done.stderr.splitlines() or [""])[-1]
        problem = f"exit status {done.returncode}: {last}" if done.returncode else None
    except subprocess.TimeoutExpired:
        problem = f"not finished after {MINUTES} minutes"
    if problem:
        save(args, part, [*read_results(args.output)[part]["tables"], ("Not finished.", [{"why": problem}])], started)
        print(f"part {part}: {problem}", file=sys.stderr)
    return problem


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "d"], default=list(PARTS), help="which; d is d1 d2 d3")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/gpu"), help="path without .md and .json")
    parser.add_argument("--commit", help="what to write down where there is no git")
    parser.add_argument("--worker", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py measures a GPU and torch sees none here.", file=sys.stderr)
        return 2
    if not args.worker:
        parts = [name for part in args.parts for name in PARTS if name == part or (part == "d" and name[0] == "d")]
        return int(any([start(args, part) for part in parts]))
    what, *more = args.worker
    if what == "touch":
        gpu_kernels.touch()
    elif what == "fit":
        fit(more[0], int(more[1]), float(more[2]), more[3:])
    else:
        work(args, what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
