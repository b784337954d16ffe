"""Compiles every kernel launch of a training step for many GPUs, on a machine without one; test_compile.py runs it.

    python tests/kernels/compile_kernels.py [--module FILE] [--targets cuda:80 ...]        prints one line of JSON

It is a process of its own because Triton decides when a kernel is defined whether to interpret it. Training steps run
on CPU tensors while launches are recorded instead of executed (so their results are garbage), and one launch of each
specialisation is compiled for every target. With --module: the JIT functions of that file and what its launch() does.

    targets      as given
    functions    {JIT function: the JIT functions it calls}
    launches     [[JIT function, what it is specialised on], ...]
    compiled     [{"launch": its number, "target", and "registers", "stack", "local", "shared" or "error"}, ...]
    seconds      [recording, compiling]
"""
import argparse
import copy
import gc
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

# A100; RTX 30, A10; RTX 40, L4; H100, H200; B200; RTX 50; MI300
TARGETS = ["cuda:80", "cuda:86", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"]


class Driver:
    """In place of a GPU's driver. Each target is a device of its own: Triton keeps what it compiled per device."""

    def __init__(self, targets):
        self.targets, self.device = targets, 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        backend, arch = self.targets[self.device].split(":")
        return GPUTarget(backend, int(arch), 32) if backend == "cuda" else GPUTarget(backend, arch, 64)


# ---------------------------------------------------------------- what there is

def name_of(function):
    return f"{function.fn.__module__}.{function.fn.__qualname__}"


def jit_functions(modules):
    """{name: names of those it calls} of every JIT function defined in these modules, wherever it is kept."""
    found = [x for x in gc.get_objects() if issubclass(type(x), JITFunction) and x.fn.__module__ in modules]
    return {name_of(x): sorted(name_of(y) for y in called(x) if y.fn.__module__ in modules) for x in found}


def called(function):
    names, scope = function.fn.__code__.co_names, inspect.getclosurevars(function.fn)
    values = [*scope.globals.values(), *scope.nonlocals.values()]
    values += [getattr(x, name, None) for x in values if inspect.ismodule(x) for name in names]  # module.helper(...)
    return [x for x in values if isinstance(x, JITFunction)]


# ---------------------------------------------------------------- what is launched

def record(work):
    """Run work() without executing a kernel: [(function, arguments, keywords), ...] and [[name, description], ...].

    A launch goes Triton's own way up to the compiler, with this hook standing there: it is asked once for each key,
    that is for each set of types, hints, constants and options, and says that somebody else compiles.
    """
    keys, launches, descriptions = set(), [], []

    def hook(key, fn, compile, **_):
        if (fn.jit_function, key) not in keys:
            keys.add((fn.jit_function, key))
            descriptions.append([name_of(fn.jit_function), describe(fn.jit_function, compile)])
        return True

    def launch(function, *args, grid, warmup=False, **keywords):
        run(function, *args, grid=grid, warmup=True, **keywords)
        if len(descriptions) > len(launches):
            launches.append((function, args, dict(keywords, grid=grid)))

    run, JITFunction.run, triton.knobs.runtime.jit_cache_hook = JITFunction.run, launch, hook
    try:
        work()
    finally:
        JITFunction.run, triton.knobs.runtime.jit_cache_hook = run, None
    return launches, descriptions


def describe(function, compile):
    """Element types, constants, and the pointers and integers that 16 is not known to divide."""
    names, signature = function.arg_names, compile["signature"]
    types = sorted({kind[1:] for kind in signature.values() if kind.startswith("*")})
    constants = [f"{names[path[0]]}={value}" for path, value in compile["constants"].items()]
    divisible = {names[path[0]] for path, hints in compile["configs"][0].items() if hints}
    odd = [name for name, kind in signature.items() if name not in divisible and re.match(r"\*|[iu]\d", kind)]
    return " ".join([",".join(types), *constants, f"warps={compile['num_warps']}", f"stages={compile['num_stages']}",
                     *(["odd:" + ",".join(odd)] if odd else [])])


class Images:
    """A pack of noise."""
    canvases = np.random.default_rng(0).integers(0, 255, (32, 40, 40), dtype=np.uint8)
    sizes, groups = np.tile([40, 30], (32, 1)), np.arange(32)

    def __len__(self):
        return len(self.canvases)


def training_steps():
    """One optimizer step for each dtype and each head dim that the kernels know, with either way of centering."""
    import data
    import kernels
    import pretrain
    import runtime
    from runtime import parameter_groups

    kernels.common.INTERPRET = True  # what lets CPU tensors take the kernels
    if not kernels.common.takes_kernel(torch.empty(0)):
        sys.exit("kernels.common.INTERPRET no longer sends CPU tensors to the kernels: nothing would be recorded")
    for dtype in ("bfloat16", "float32"):
        for head_dim, centering in ((32, "sinkhorn_knopp"), (64, "centering"), (128, "sinkhorn_knopp")):
            # What a kernel is specialised on is as in UltraDINO's recipe: its K, token counts (86 and 9 for 201 and
            # 41) that 16 does not divide, image counts that it does, before drop path (32) and after (16).
            args = pretrain.get_args([
                "--preset", "ultradino", "--dtype", dtype, "--centering", centering, "--batch_size_per_gpu", "16",
                "--drop_path_rate", "0.5", "--patch_size", "8", "--global_crops_size", "72", "--local_crops_size",
                "16", "--local_crops_number", "2", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8"])
            config = dict(pretrain.backbone_config(args), depth=1, num_heads=2, embed_dim=2 * head_dim)
            student = pretrain.Network(config, args)
            teacher = copy.deepcopy(student).requires_grad_(False)
            buffers = runtime.flatten_parameters(student), runtime.flatten_parameters(teacher)
            optimizer = torch.optim.AdamW(parameter_groups(student, 0.9), lr=0.0, fused=True)
            micros = pretrain.to_device(data.PretrainBatches(Images(), args)[0], torch.device("cpu"), args, 0.5, 0.25)
            drops = list(pretrain.draw_drops(student.backbone, micros, args.seed, 0, 0))
            values = dict(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
            pretrain.train_step(student, teacher, optimizer, buffers, torch.zeros(2, args.head_n_prototypes), micros,
                                values, args, args.batch_size_per_gpu, drops)
            shapes = [(16, 86), (16, 9)]  # with rotary positions, which the steps above have not
            qkv = torch.zeros(16 * (86 + 9), 6 * head_dim, dtype=getattr(torch, dtype), requires_grad=True)
            rope = [(torch.zeros(N, head_dim // 2), torch.zeros(N, head_dim // 2)) for _, N in shapes]
            kernels.attention(qkv, shapes, 2, rope).sum().backward()


# ---------------------------------------------------------------- what comes out

def compile_launch(job):
    number, device = job
    (function, args, keywords), DRIVER.device = LAUNCHES[number], device
    report = dict(launch=number, target=DRIVER.targets[device])
    try:
        kernel = function.run(*args, warmup=True, **keywords)
    except Exception as error:
        return dict(report, error=f"{type(error).__name__}: {error}"[:2000])
    report["shared"] = kernel.metadata.shared
    return dict(report, **resources(kernel.asm["cubin"])) if "cubin" in kernel.asm else report


def resources(cubin):
    """What a thread takes, by the compiled code itself. A spilled register is part of the stack or of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name], check=True,
                               capture_output=True, text=True).stdout
    return {name: max(map(int, re.findall(rf"\b{key}:(\d+)", usage)))
            for name, key in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))}


def import_file(path):
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--module", help="file with JIT functions and a launch() in place of kernels and training")
    p.add_argument("--targets", nargs="+", default=TARGETS)
    options = p.parse_args()
    try:
        triton.knobs.nvidia.cuobjdump.path
    except RuntimeError as error:
        sys.exit(f"{error}: registers and spills are read with the cuobjdump that Triton's Linux wheels bring")
    triton.runtime.driver.set_active(DRIVER := Driver(options.targets))
    start = time.monotonic()
    if options.module:
        module = import_file(options.module)
        modules, work = {module.__name__}, module.launch
    else:
        import kernels
        modules = {"kernels", *(info.name for info in pkgutil.walk_packages(kernels.__path__, "kernels."))}
        work = training_steps
        for name in modules:
            importlib.import_module(name)
    LAUNCHES, descriptions = record(work)
    recorded = time.monotonic()
    jobs = [(number, device) for number in range(len(LAUNCHES)) for device in range(len(options.targets))]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:  # inherits LAUNCHES
        compiled = pool.map(compile_launch, jobs, chunksize=1)
    print(json.dumps(dict(targets=options.targets, functions=jit_functions(modules), launches=descriptions,
                          compiled=compiled, seconds=[recorded - start, time.monotonic() - recorded])))
