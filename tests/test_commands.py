"""What README and docs promise: commands, links, line counts and tables; slow ones as a newcomer types them."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewshot
import finetune_cls
import finetune_multi
import finetune_seg
import pack
import predict
import pretrain
from tools import phantom_sheet, score_submission

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md",
                                              *sorted((ROOT / "docs").glob("*.md")))}
ROOMS = ("kernels", "frames", "labelled", "networks", "training", "scores", "tools", "benchmarks")


def run(line, cwd, timeout=900, **env):
    """A shell line with this Python in front of PATH; its output."""
    env = dict(os.environ, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="",
               **env)
    done = subprocess.run(line, shell=True, cwd=cwd, env=env, text=True, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A copy of the project as git would check it out, and nothing else."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    for name in filter(None, files):
        target = tmp_path / "project" / os.fsdecode(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / os.fsdecode(name), target)
    return tmp_path / "project"


def promised_commands(pages=PAGES.values()):
    """Every python and torchrun line of the pages' code blocks, comments cut off."""
    for block in re.findall(r"^```\n(.*?)^```", "\n".join(pages), re.M | re.S):
        for line in block.splitlines():
            if re.match(r"(python|torchrun) ", line):
                yield line.split("  #")[0].strip()


@pytest.mark.parametrize("line", sorted(set(promised_commands())))
def test_commands_parse(line):
    words = shlex.split(line)
    script = next(i for i, word in enumerate(words) if word.endswith(".py") or words[i - 1] == "-m")
    parse = {"pretrain.py": pretrain, "fewshot.py": fewshot, "pack.py": pack, "finetune_cls.py": finetune_cls,
             "finetune_seg.py": finetune_seg, "finetune_multi.py": finetune_multi, "predict.py": predict,
             "tools.dry_run": pretrain, "tools.preview": pretrain, "tools.score_submission": score_submission,
             "tools.phantom_sheet": phantom_sheet}
    parse[words[script]].get_args(words[script + 1:])


def test_readme_promises_the_two_commands():
    assert {"torchrun --nproc_per_node 8 pretrain.py --data /fus2m",
            "python fewshot.py --ckpt last.pt --shots 5"} <= set(promised_commands([README]))


def test_the_algorithm_names_functions_that_exist():
    design = (ROOT / "docs/design.md").read_text()
    algorithm = design[design.index("## The algorithm"):design.index("## Kernels")]
    named = re.findall(r"`(\w+)\.(\w+)(?:\.(\w+))?[`:]", algorithm)
    assert len(named) >= 8
    for module, name, *method in named:
        if name != "py":
            found = getattr(importlib.import_module(module), name)
            assert not method[0] or hasattr(found, method[0])


def headings(path):
    return {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in path.read_text().splitlines() if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]) if not link.startswith("https://")]
    assert links
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_in_backticks_exist(page):
    """Of files of the project, which have a folder in their name."""
    for name in re.findall(r"`((?:frames|labelled|networks|training|scores|kernels|tools|benchmarks|tests)/[^`*]*)`", PAGES[page]):
        assert (ROOT / name).exists(), name


def test_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 250


def test_file_maps_are_true():
    """Each file of the maps exists with the stated number of lines, and no source file is missing from the design's."""
    found = {page.name: dict(re.findall(r"^\|(?: \d* \|)? `([^`]+\.py)` \| (\d+) \|", text, re.M))
             for page, text in PAGES.items()}
    for rows in found.values():
        assert rows == {name: str(len((ROOT / name).read_text().splitlines())) for name in rows}
    sources = {str(path.relative_to(ROOT)) for room in (".", *ROOMS) for path in (ROOT / room).glob("*.py")}
    assert {name for name in sources if not name.endswith("__init__.py")} <= found["design.md"].keys()
    assert {"pretrain.py", "losses.py", "model.py", "data.py", "runtime.py"} <= found["README.md"].keys()


def test_tables_come_from_result_files():
    text = "\n".join(PAGES.values())
    blocks = re.findall(r"<!-- from (\S+) -->\n```\n(.*?)```", text, re.S)
    tables = re.findall(r"<!-- from (\S+) -->\n((?:\|.*\n)+)", text)
    assert len(blocks) == 4 and len(tables) == 2
    for source, block in blocks + tables:
        result = (ROOT / source).read_text()
        assert all(line in result for line in block.splitlines()), source
        assert ("$ " in result or "`python " in result) and "commit" in result and "torch" in result  # says how and where


@pytest.mark.slow
def test_the_two_commands_in_a_row(checkout, tmp_path):
    """torchrun with eight processes on a folder, then few-shot, from the project's folder (a small budget)."""
    rng = np.random.default_rng(0)
    for clip in range(8):
        (tmp_path / "fus2m" / f"clip{clip}").mkdir(parents=True)
        for frame in range(8):
            Image.fromarray(rng.integers(0, 255, (60, 80), dtype=np.uint8)).save(tmp_path / f"fus2m/clip{clip}/{frame}.png")
    out = run(f"torchrun --nproc_per_node 8 pretrain.py --data {tmp_path}/fus2m --total_samples 1024 --batch_size_per_gpu 8",
              checkout, OMP_NUM_THREADS="1")
    assert "64 images, 8 groups by parent folder" in out and "step 16 of 16" in out
    out = run("python fewshot.py --ckpt last.pt --shots 5", checkout)
    assert "pretrained" in out and "smoke test" in out
    assert json.loads((checkout / "fewshot.json").read_text())["results"]


@pytest.mark.slow
def test_tools_from_the_projects_folder(checkout):
    """As the README types them, and without a run's data."""
    out = run("python -m tools.dry_run --preset cpu --batch_size_per_gpu 8", checkout)
    assert "GFLOP per image" in out and "8 x cpu" in out
    assert "wrote ./preview.png: 6 images" in run("python -m tools.preview", checkout)
    run("python -m tools.phantom_sheet sheet.png --size 40", checkout)
    assert (checkout / "sheet.png").exists()


@pytest.mark.slow
def test_two_processes_without_flags(checkout):
    """Phantoms, two gloo processes; stopped after a budget of a few steps."""
    out = run("torchrun --nproc_per_node 2 pretrain.py --total_samples 640", checkout, OMP_NUM_THREADS="1")
    assert "phantom" in out and "step 10 of 10" in out
    assert torch.load(checkout / "last.pt", weights_only=True)["samples"] == 640


@pytest.mark.slow
def test_demo(checkout):
    """make demo in a fresh copy, its own .venv and all: learned something, and says what phantoms are worth."""
    out = run("make demo", checkout, timeout=1500)
    assert "smoke test" in out and "demo/last.pt" in out
    report = json.loads((checkout / "demo" / "fewshot.json").read_text())
    best = {name: max(row["estimate"] for row in report["results"]
                      if row["shots"] == 5 and row["features"] == name and row["score"] == "balanced accuracy")
            for name in ("pretrained", "random init", "pixels")}
    assert best["random init"] > 1 / 6 and best["pixels"] > 1 / 6
    assert best["pretrained"] > best["random init"] + 0.05 and best["pretrained"] > best["pixels"] + 0.05, best
    log = [json.loads(line) for line in (checkout / "demo" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["dino"] < log[1]["dino"] - 0.1


@pytest.mark.slow
def test_flagless_runs(checkout):
    """Each script with nothing at all, after one another."""
    assert "saved ./last.pt" in run("python pretrain.py", checkout, timeout=1200)
    assert "finished" in run("python pretrain.py", checkout)
    assert "1 shot" in run("python fewshot.py", checkout)
    out = run("python finetune_cls.py", checkout, timeout=600)
    assert "last minus ..." in out and "from scratch" in out and "smoke test" in out
    out = run("python finetune_seg.py", checkout, timeout=600)
    assert "last minus ..." in out and "from scratch" in out and "smoke test" in out
    report = json.loads((checkout / "seg" / "finetune_seg.json").read_text())
    last, scratch = (report["models"][name]["scores"]["pooled Dice"]["estimate"] for name in ("last", "from scratch"))
    assert last > scratch + 0.05 and scratch > 0.05, (last, scratch)  # all background: 0
    assert "60 masks written" in run("python predict.py", checkout)
