"""Every Triton kernel compiles for the cards people own, without spilling: shown on a machine that has none of them.

compile_kernels.py, in a process of its own, records what training launches and compiles it; here its report is judged.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels to compile")

MOST_SHARED = 101_376  # bytes a program can have on an RTX 30, 40 or 50; the other cards have more


def report_of(cache, *arguments):
    """What compile_kernels.py says. Its cache is empty, so that every answer is the compiler's."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= dict(TRITON_CACHE_DIR=str(cache), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def problems_of(report):
    """A sentence for each JIT function that is never launched and each launch that CUDA cards cannot take well."""
    problems, launched = [], {name for name, _ in report["launches"]}
    reached, ahead = set(), list(launched)
    while ahead:
        name = ahead.pop()
        if name not in reached:
            reached.add(name)
            ahead += report["functions"].get(name, [])
    problems += [f"{name} is never launched, nor called by a kernel that is"
                 for name in report["functions"] if name not in reached]
    if not launched:
        problems.append("nothing was launched")
    found = {(result["launch"], result["target"]): result for result in report["compiled"]}
    for number, (name, specialised) in enumerate(report["launches"]):
        for target in report["targets"]:
            result, what = found[number, target], f"{name} ({specialised}) for {target}"
            if not target.startswith("cuda"):
                continue
            if "error" in result:
                problems.append(f"{what} does not compile: {result['error']}")
                continue
            if result["stack"] or result["local"]:
                problems.append(f"{what} spills: {result['stack']} bytes of stack, {result['local']} of local memory")
            if result["shared"] > MOST_SHARED:
                problems.append(f"{what} needs {result['shared']:,} bytes of shared memory, more than {MOST_SHARED:,}")
    return problems


def table_of(report):
    """Registers (stack) / bytes of shared memory of each launch for each target."""
    def cell(result):
        if "error" in result:
            return "failed"
        stack = result.get("stack", 0) + result.get("local", 0)
        return f"{result.get('registers', '')}{f'({stack})' if stack else ''}/{result['shared']}"

    width = max(len(" ".join(launch)) for launch in report["launches"])
    lines = ["registers (stack) / shared memory".ljust(width) + "".join(f"{t:>15}" for t in report["targets"])]
    for number, launch in enumerate(report["launches"]):
        cells = {result["target"]: cell(result) for result in report["compiled"] if result["launch"] == number}
        lines.append(" ".join(launch).ljust(width) + "".join(f"{cells[t]:>15}" for t in report["targets"]))
    errors = {f"{r['target']}: {r['error']}" for r in report["compiled"] if "error" in r}
    seconds = "recorded in {:.1f} s, compiled in {:.1f} s".format(*report["seconds"])
    return "\n".join([*lines, *sorted(errors), seconds])


@pytest.mark.parametrize("targets", [  # about 7 s a target; 8.0 and 10.0 are the ones that ran out of registers first
    ["cuda:80", "cuda:100"],
    pytest.param(["cuda:86", "cuda:89", "cuda:90", "cuda:120", "hip:gfx942"], marks=pytest.mark.slow)], ids=" ".join)
def test_every_kernel_compiles_for_every_card(targets, tmp_path):
    report = report_of(tmp_path, "--targets", *targets)
    assert report["targets"] == targets
    print("\n" + table_of(report))
    problems = problems_of(report)
    assert not problems, "\n".join(problems)


# ---------------------------------------------------------------- the check can fail

PLANTED = """
import torch
import triton
import triton.language as tl

@triton.jit
def helper(x):
    return x * 2

@triton.jit
def sound(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, helper(tl.load(x_ptr + i)))

@triton.jit
def spilling(x_ptr, SIZE: tl.constexpr):  # a warp holds all of x while it is summed: 512 registers a thread
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x / tl.sum(x, 0))

@triton.jit
def hoarding(x_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):  # both factors in shared memory: 128 KB
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(x_ptr + m[:, None] * K + k[None, :]), tl.load(x_ptr + k[:, None] * N + n[None, :])
    tl.store(x_ptr + m[:, None] * N + n[None, :], tl.dot(x, y))

@triton.jit
def broken(x_ptr, SIZE: tl.constexpr):  # three is no power of two
    tl.store(x_ptr + tl.arange(0, SIZE), 0.0)

@triton.jit
def forgotten(x_ptr):
    tl.store(x_ptr, forgotten_helper())

@triton.jit
def forgotten_helper():
    return 0.0

def launch():
    x = torch.zeros(2 ** 16)
    sound[(1,)](x, SIZE=128)
    spilling[(1,)](x, SIZE=16384, num_warps=1)
    hoarding[(1,)](x.half(), M=128, N=128, K=256, num_warps=8)
    broken[(1,)](x, SIZE=3)
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    (folder / "planted.py").write_text(PLANTED)
    return problems_of(report_of(folder / "cache", "--module", folder / "planted.py", "--targets", "cuda:80"))


@pytest.mark.parametrize("name, problem", [
    ("spilling", "bytes of stack"), ("hoarding", "bytes of shared memory"), ("broken", "does not compile"),
    ("forgotten", "is never launched"), ("forgotten_helper", "is never launched")])
def test_planted_failure_is_named(planted, name, problem):
    named = [sentence for sentence in planted if sentence.startswith(f"planted.{name} ")]
    assert len(named) == 1 and problem in named[0]


def test_sound_kernel_among_planted_failures_is_not_named(planted):
    assert not [sentence for sentence in planted if sentence.startswith(("planted.sound", "planted.helper"))]
