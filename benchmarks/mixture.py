"""What a mixture of experts costs against the dense blocks it replaces; tables go to
benchmarks/results/mixture.md and .json.

    python benchmarks/mixture.py                     # both networks, two minutes on one core
    python benchmarks/mixture.py --parts vit_micro   # one; the other's results stay

Forward and backward of a backbone whose later half of blocks has E experts: 2, 4 or 8 that see every token, or 4 of
which a token meets its best two or its best one. Time, memory, parameters, and their ratios to the dense network's.
"""
import argparse
import statistics
import time

import torch

from record import ROOT, machine, write_part  # first: it puts the project on the path
from model import SIZES, VisionTransformer
from networks.moe import Routing, add_experts
from timing import divided, free, peak_bytes, rounds

MIXTURES = {"dense": None, "2": (2, None), "4": (4, None), "8": (8, None), "4, top 2": (4, 2), "4, top 1": (4, 1)}
SIDE, TASK_DIM = 224, 64


def network_of(arch, mixture, side, device):
    torch.manual_seed(0)
    backbone = VisionTransformer(**SIZES[arch], img_size=side, patch_size=16, num_register_tokens=4, pos="rope",
                                 norm_eps=1e-5, mask_k_bias=True).to(device)
    depth = len(backbone.blocks)
    if mixture:
        experts, top_k = mixture
        add_experts(backbone, range(depth // 2, depth), experts, TASK_DIM, top_k)
        for block in backbone.blocks[depth // 2:]:
            torch.nn.init.normal_(block.mlp.gate.weight, std=0.2)  # as if trained: tokens go to different experts
    return backbone


def forward(backbone, x, task, dtype):
    with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
        features, = backbone.get_intermediate_layers(x, 1, routing=Routing(task, []))  # (B, P, C)
        return features.float().square().mean()


def kept_bytes(call):
    """Bytes of distinct tensors that a forward keeps for backward, parameters aside (folded copies of them count)."""
    kept = {}

    def keep(x):
        if not isinstance(x, torch.nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x  # and its memory, so that none takes the same place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = call()
    del result
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def measure(report, arch, batch, side=SIDE, repeats=5, warmup=1):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, task = torch.randn(batch, 3, side, side, device=device), torch.randn(TASK_DIM, device=device)
    networks = {name: network_of(arch, mixture, side, device) for name, mixture in MIXTURES.items()}

    def step(name):
        forward(networks[name], x, task, dtype).backward()
        networks[name].zero_grad()

    times = rounds({name: lambda name=name: step(name) for name in networks}, device, repeats, warmup)
    rows = []
    for name, network in networks.items():
        spent = times[name]
        row = {"experts": name, "parameters, M": sum(p.numel() for p in network.parameters()) / 1e6,
               "ms per image": spent if isinstance(spent, str) else statistics.median(spent) / batch}
        if device == "cuda":
            row["peak MB"] = divided(peak_bytes(lambda: step(name)), 2 ** 20)
        else:
            row["kept for backward, MB"] = kept_bytes(lambda: forward(network, x, task, dtype)) / 2 ** 20
        rows.append(row)
        free()
    memory = next(key for key in rows[0] if key.endswith("MB"))
    for row in rows:
        for key in ("parameters, M", "ms per image", memory):
            row[f"{key.split(',')[0]}, of dense"] = divided(row[key], rows[0][key])
        if not isinstance(times[row["experts"]], str):  # lowest and highest round against the same round's dense one
            ratios = [a / b for a, b in zip(times[row["experts"]], times["dense"])]
            row["rounds"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
    what = "time on the GPU" if device == "cuda" else "CPU time on one thread"
    depth = SIZES[arch]["depth"]
    report(f"Forward and backward of {arch}, {batch} images of {side} pixels, patches of 16, {str(dtype)[6:]}: {what}, "
           f"medians of {repeats} rounds in turn. Experts in blocks {depth // 2} to {depth - 1} of {depth} "
           f"(counted from 0), random gates.", rows)


PARTS = {"vit_micro": dict(batch=8, repeats=7), "vit_small": dict(batch=2, repeats=3)}
QUICK = dict(batch=2, side=32, repeats=1, warmup=0)  # what a test can wait for; its figures mean nothing


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which networks")
    parser.add_argument("--output", default=str(ROOT / "benchmarks/results/mixture"), help="path without .md and .json")
    parser.add_argument("--quick", action="store_true", help="two small images, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts:
        started = time.monotonic()

        def report(caption, rows):
            print(caption, *rows, sep="\n  ", flush=True)
            command = f"python benchmarks/mixture.py --parts {part}" + " --quick" * args.quick
            write_part(args.output, "Measured: the mixture of experts", part, dict(
                title="what experts cost", machine=machine(), command=command,
                minutes=(time.monotonic() - started) / 60, tables=[(caption, rows)]))

        measure(report, part, **(QUICK if args.quick else PARTS[part]))


if __name__ == "__main__":
    main()
