"""What the tests of all fine-tuning stages share: small backbones, scripts run here or by torchrun, what must be equal.

A stage is given as its module (finetune_cls, finetune_seg, ...): it has get_args() and main(), and writes NAME.json.
"""
import contextlib
import csv
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import kernels
import runtime
from model import VisionTransformer
from networks.weights import load_backbone

CONFIG = dict(img_size=16, patch_size=8, in_chans=1, embed_dim=16, depth=2, num_heads=2, init_values=0.5)
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Of a network this small, two threads on busy cores mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------- files

def checkpoint(path):
    return torch.load(path, weights_only=True)


def read_log(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def save_backbone(path, seed=1, **changes):
    torch.manual_seed(seed)
    state = {f"backbone.{key}": value for key, value in VisionTransformer(**CONFIG).state_dict().items()}
    saved = {"teacher": state, "config": CONFIG, "mean": 0.3, "std": 0.2, "step": 12, "seen": None}
    runtime.save_checkpoint(path, {**saved, **changes})
    return path


def save_rows(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return rows


def read_rows(path, *splits):
    """Rows of a CSV with a column `split`: those of each of the splits in turn."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for split in splits for row in rows if row["split"] == split]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- running a stage

def run_main(script, folder, *flags, received=()):
    """main() in this process, in `folder`: what it prints, and its JSON, strictly read (None: it wrote none).

    received: the signals that have come, as runtime.stop_on_signals returns them.
    """
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    flags = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
        patch.setattr(runtime, "stop_on_signals", lambda: received)
        kernels.use_reference(True)
        args = script.get_args(flags)
        script.main(args)
    path = folder / args.output_dir / f"{script.__name__}.json"
    return out.getvalue(), json.loads(path.read_text(), parse_constant=refuse) if path.exists() else None


class StopAfter(list):
    """Signals, as runtime.stop_on_signals returns them: one comes in the given step of this process."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps

    def __bool__(self):
        self.steps -= 1
        return self.steps <= 0


def spy(monkeypatch, owner, name, note):
    """Call note(arguments..., result) after each call of owner.name."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        note(*args, result=result)
        return result

    monkeypatch.setattr(owner, name, call)


def command(script, folder, *flags, processes=1):
    """The script as a user starts it in `folder`, without a GPU: the finished process. More processes: by torchrun."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"] * (processes > 1)
    start = [sys.executable, *torchrun, pathlib.Path(script.__file__).resolve(), *map(str, flags)]
    return subprocess.run(start, cwd=folder, env=env, capture_output=True, text=True)


def run_tool(name, folder, *flags):
    """python -m tools.NAME, in `folder`: the finished process."""
    env = {**os.environ, "PYTHONPATH": str(pathlib.Path(runtime.__file__).parent), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", f"tools.{name}", *map(str, flags)], cwd=folder, env=env,
                          capture_output=True, text=True, encoding="utf-8", timeout=120)


def report_of(script, folder, *flags, processes=1):
    """The JSON of such a command, which must end well; it goes to a folder called as the number of processes."""
    done = command(script, folder, *flags, "--output_dir", processes, processes=processes)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / str(processes) / f"{script.__name__}.json").read_text())


# ---------------------------------------------------------------- what must be equal

def equal(a, b):
    """Whether two dicts of tensors are, nan being equal to nan."""
    return a.keys() == b.keys() and all(torch.equal(a[key].nan_to_num(7), b[key].nan_to_num(7)) for key in a)


def assert_same_run(a, b):
    """Two finished runs, FILE of FILE.pt and FILE.jsonl: finite weights equal to the bit, and logs -> the log."""
    one, two = (checkpoint(f"{path}.pt") for path in (a, b))
    for part in ("teacher", "head"):
        assert one[part] and equal(one[part], two[part]), f"{part} of {a} and {b}"
        assert all(value.isfinite().all() for value in one[part].values()), f"{part} of {a}"
    logs = [read_log(f"{path}.jsonl") for path in (a, b)]
    assert logs[0] == logs[1], logs
    return logs[0]


def assert_a_signal_is_heeded(script, folder, *flags):
    """It comes in the second step of the first model, a.pt; the command ends, and the same command goes on there."""
    output, report = run_main(script, folder, *flags, received=StopAfter(2))
    assert report is None and output.endswith("stopped before the end: the same command goes on\n"), output
    output, report = run_main(script, folder, *flags)
    assert "at step 2\n" in output and report["models"]["a"]["runs"] == 1, output


def assert_same_table(one, two):
    """(what was printed, its JSON) of two commands: the same choices, scores and lines of the table."""
    assert one[1]["models"] == two[1]["models"] and one[1]["chosen"] == two[1]["chosen"]
    assert one[0].split("\ntest: ")[1] == two[0].split("\ntest: ")[1]


# ---------------------------------------------------------------- what a stage writes

def assert_latex_is_whole(path, script):
    """One table whose braces match, nothing left unescaped, and the script's mark -> its text."""
    text = path.read_text()
    bare = re.sub(r"\\[\\%&_#${}]", "", text).replace(r"$\pm$", "")
    assert bare.count("{") == bare.count("}") and not re.search("[#$^~]", bare), bare
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [("begin", "table"), ("begin", "tabular"), ("end", "tabular"),
                                                           ("end", "table")]
    lines = text.split("\n")
    assert [line for line in lines if "%" in line.replace("\\%", "")] == [f"% written by {script.__name__}.py"]
    assert "%" in lines[0] and not any("_" in line.replace("\\_", "") for line in lines[1:]), text
    return text


def assert_files_hold_no_names(folder, number, forbidden, held):
    """`number` checkpoints in a folder: none of the bytes `forbidden` in any of them, `held` in each."""
    files = list(folder.glob("*.pt"))
    assert len(files) == number
    for file in files:
        content = file.read_bytes()
        assert held in content and not any(word in content for word in forbidden), file


def moved(path, start):
    """A fine-tuned file as a backbone: its model, what is told of it, names of the tensors that differ from `start`."""
    (model, info), (first, _) = (load_backbone(str(file)) for file in (path, start))
    names = [name for name, value in model.state_dict().items() if not torch.equal(value, first.state_dict()[name])]
    return model, info, names


# ---------------------------------------------------------------- bad input: prepare(folder) makes it

def change_row(name, **values):
    """Other values in the fourth row of a CSV with splits, which becomes line 5 of the file."""
    def prepare(folder):
        rows = read_rows(folder / name, *SPLITS)
        rows[3].update(values)
        save_rows(folder / name, rows)
    return prepare


def keep_rows(name, which):
    """Only the rows of such a CSV for which which(row)."""
    def prepare(folder):
        save_rows(folder / name, [row for row in read_rows(folder / name, *SPLITS) if which(row)])
    return prepare


def write(name, text):
    def prepare(folder):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return prepare


def damage(name):
    """One bit flipped in the middle of a file."""
    def prepare(folder):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    return prepare


def output_errors(script, output_dir, flags, file):
    """{what: (prepare, flags, words of the sentence)} of outputs that are others' files or have no place; file: any
    file of the prepared folder."""
    name = f"{script.__name__}.json"
    return {
        "foreign json": (write(f"{output_dir}/{name}", '{"mine": 1}'), flags,
                         [f"{output_dir}/{name}", f"not written by {script.__name__}.py"]),
        "foreign latex": (write("thesis.tex", "\\documentclass{book}\n"), (*flags, "--latex", "thesis.tex"),
                          ["thesis.tex", f"not written by {script.__name__}.py"]),
        "latex nowhere": (None, (*flags, "--latex", "nowhere/t.tex"), ["nowhere/t.tex", "folder does not exist"]),
        "output folder is a file": (None, (*flags, "--output_dir", file), [file, "File exists"])}


def assert_one_sentence(script, folder, flags, words, capsys, may_write=()):
    """The command ends with status 2 and one sentence that has all the words; no file changes, none comes that is
    not called as `may_write` says."""
    before = contents(folder)
    with pytest.raises(SystemExit) as left, runtime.clear_errors():
        run_main(script, folder, *flags)
    assert left.value.code == 2
    sentence, = capsys.readouterr().err.strip().split("\n")
    assert "error: " in sentence and all(word in sentence for word in words), sentence
    after = contents(folder)
    written = {path.name for path in after.keys() - before.keys()}
    assert written <= {*may_write}, written
    assert {path: content for path, content in after.items() if path in before} == before, "a file changed or is gone"
