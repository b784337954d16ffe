"""pretrain.py as a user runs it: in a subprocess, on files, killed, resumed, on two and three processes, on bad input."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
# a model of a few thousand weights: what is tested is the run, not what it learns
SMALL = ["--arch", "vit_micro", "--head_n_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8",
         "--global_crops_size", "16", "--local_crops_size", "8", "--canvas", "24", "--drop_path_rate", "0.3",
         "--koleo_loss_weight", "0.1", "--log_every", "1"]


def command(*args, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launcher, str(ROOT / "pretrain.py"), *map(str, args)]


def environment():
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    env.pop("TRITON_INTERPRET", None)
    return env


def pretrain(folder, *args, processes=1, expect=0):
    done = subprocess.run(command(*args, processes=processes), cwd=folder, env=environment(), text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert done.returncode == expect, done.stdout
    return done.stdout


def kill_at(folder, step, *args, processes=1, signal_number=signal.SIGKILL):
    """Start a run and signal its whole process group once log.jsonl reaches `step`."""
    log = Path(folder) / "log.jsonl"
    with open(Path(folder) / "output.txt", "w") as output:
        run = subprocess.Popen(command(*args, processes=processes), cwd=folder, env=environment(), stdout=output,
                               stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)
        until = time.monotonic() + 240
        while not log.exists() or log.read_text().count("\n") < step:
            assert run.poll() is None and time.monotonic() < until, (Path(folder) / "output.txt").read_text()
            time.sleep(0.01)
        if signal_number != signal.SIGKILL:
            run.send_signal(signal_number)
            return run.wait(timeout=120)
        family = [run.pid, *descendants(run.pid)]  # torchrun gives every rank a session of its own
        for pid in family:
            with contextlib.suppress(ProcessLookupError):  # a short-lived helper may have ended since it was listed
                os.kill(pid, signal.SIGKILL)
        run.wait()
        wait_until_gone(family)


def descendants(pid):
    """Children, grandchildren, ... of a process by /proc; whatever ends while they are listed is not among them."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
    family = {pid}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return sorted(family - {pid})


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pids, seconds=20):
    until = time.monotonic() + seconds
    while any(map(alive, pids)):
        assert time.monotonic() < until, "processes are still running"
        time.sleep(0.05)


def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def assert_same(a, b, where=""):
    """torch.equal through nested dicts and lists."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A messy export: 3 clips of 8 frames, a truncated PNG, text named .png, 16-bit TIFF, CMYK JPEG, a mask."""
    folder, rng = tmp_path_factory.mktemp("frames"), np.random.default_rng(0)
    for clip in range(3):
        (folder / f"clip {clip}").mkdir()
        for frame in range(8):
            pixels = (rng.random((20, 30)) * 60 + 60 * clip + np.arange(30) * 3).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"clip {clip}" / f"{frame}.png")
    whole = (folder / "clip 0" / "0.png").read_bytes()
    (folder / "clip 0" / "truncated.png").write_bytes(whole[:len(whole) // 2])
    (folder / "clip 0" / "text.png").write_text("not an image")
    Image.fromarray((rng.random((20, 30)) * 4000).astype(np.uint16)).save(folder / "clip 1" / "deep.tif")
    Image.fromarray((rng.random((20, 30, 4)) * 255).astype(np.uint8), mode="CMYK").save(folder / "clip 1" / "cmyk.jpg")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(folder / "clip 2" / "0_mask.png")
    return folder


@pytest.fixture(scope="module")
def packed(frames, tmp_path_factory):
    """The same frames packed once, so that the runs below start quickly."""
    pack = tmp_path_factory.mktemp("packs") / "frames.pack"
    subprocess.run([sys.executable, str(ROOT / "pack.py"), str(frames), str(pack), "--canvas", "24", "--exclude",
                    "*_mask.png"], check=True, env=environment(), capture_output=True)
    return pack


def test_folder_to_checkpoint_to_finished(frames, tmp_path):
    """A messy folder is packed, trained on and can be scored; the same command again says that it is finished."""
    args = ["--data", frames, "--exclude", "*_mask.png", *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 40]
    out = pretrain(tmp_path, *args)
    assert "26 images, 3 groups by parent folder" in out and "saved ./last.pt at step 5 of 5" in out
    skipped = next(tmp_path.glob("*.pack/skipped.txt")).read_text()
    assert "truncated.png" in skipped and "text.png" in skipped and "deep.tif" not in skipped and "cmyk" not in skipped
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 2, 3, 4, 5] and log[-1]["samples"] == 40
    assert all(np.isfinite(list(record.values())).all() for record in log)
    saved = checkpoint(tmp_path)
    assert str(frames) not in str(saved) and "*_mask.png" not in str(saved)  # paths, too, can name patients
    assert saved["seen"]["content"].shape == (26,) and saved["step"] == 5 and 0 < saved["mean"] < 1
    assert not any(name in str(saved) for name in ("clip 0", "0.png", "deep.tif"))  # names can be patients' names
    before = (tmp_path / "last.pt").read_bytes()
    assert "finished: 5 of 5 steps" in pretrain(tmp_path, *args)
    assert (tmp_path / "last.pt").read_bytes() == before
    fewshot = subprocess.run([sys.executable, str(ROOT / "fewshot.py"), "--ckpt", "last.pt", "--shots", "5", "--episodes",
                              "5"], cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=300)
    assert fewshot.returncode == 0 and "pretrained" in fewshot.stdout, fewshot.stdout + fewshot.stderr


def test_killed_and_resumed_equals_uninterrupted(packed, tmp_path):
    """SIGKILL at step 4 with checkpoints every 3, data workers and drop path on: bit-equal weights, moments and log."""
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 320, "--save_every", 3,
            "--num_workers", 2]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    pretrain(tmp_path / "whole", *args)
    kill_at(tmp_path / "killed", 4, *args)
    assert 3 <= checkpoint(tmp_path / "killed")["step"] < 30
    assert "resuming ./last.pt at step" in pretrain(tmp_path / "killed", *args, "--log_every", 1, "--num_workers", 1)
    a, b = (checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert a["step"] == 40
    del a["args"], b["args"]  # workers may differ
    assert_same(a, b)
    losses = [[json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
              for name in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 40


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_before_leaving(packed, tmp_path, signal_number):
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 80_000, "--save_every", 100_000]
    assert kill_at(tmp_path, 3, *args, signal_number=signal_number) == 0
    assert checkpoint(tmp_path)["step"] >= 3
    assert "saved ./last.pt at step" in (tmp_path / "output.txt").read_text()


def test_another_run_is_kept_aside_and_a_damaged_file_is_refused(packed, tmp_path):
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 16]
    pretrain(tmp_path, *args)
    before = (tmp_path / "last.pt").read_bytes()
    out = pretrain(tmp_path, *args, "--seed", 1)
    assert "other seed" in out and "kept as ./last.old-1.pt" in out
    assert (tmp_path / "last.old-1.pt").read_bytes() == before and (tmp_path / "log.old-1.jsonl").exists()
    content = bytearray((tmp_path / "last.pt").read_bytes())
    weight = checkpoint(tmp_path)["student"]["backbone.blocks.0.mlp.fc1.weight"].numpy().tobytes()
    content[content.index(weight[:64])] ^= 1  # one bit of one weight
    (tmp_path / "last.pt").write_bytes(content)
    assert "damaged" in pretrain(tmp_path, *args, expect=2)
    assert (tmp_path / "last.pt").read_bytes() == content


def test_two_processes_train_one_model(packed, tmp_path):
    """torchrun on CPU: half the batch each gives the weights of one process (no drop path, no KoLeo)."""
    args = ["--data", packed, *SMALL, "--drop_path_rate", 0, "--koleo_loss_weight", 0, "--total_samples", 32]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pretrain(tmp_path / "one", *args, "--batch_size_per_gpu", 8)
    pretrain(tmp_path / "two", *args, "--batch_size_per_gpu", 4, processes=2)
    a, b = (json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[-1]) for name in ("one", "two"))
    assert a["samples"] == b["samples"] == 32
    for term in ("dino_local", "dino_global", "ibot", "grad_norm_backbone", "grad_norm_heads"):
        assert a[term] == pytest.approx(b[term], rel=1e-3), term


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_data_worker_ends_the_run(packed, tmp_path, processes):
    """As the kernel does when memory runs out: a sentence, no hang, nobody left, and the run goes on from last.pt."""
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 160_000, "--save_every", 2,
            "--num_workers", 2]
    with open(tmp_path / "output.txt", "w") as output:
        run = subprocess.Popen(command(*args, processes=processes), cwd=tmp_path, env=environment(), stdout=output,
                               stderr=output, stdin=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "last.pt").exists():
        assert run.poll() is None and time.monotonic() < until, (tmp_path / "output.txt").read_text()
        time.sleep(0.1)
    family = descendants(run.pid)
    os.kill(max(pid for pid in family if "pretrain.py" in Path(f"/proc/{pid}/cmdline").read_text()), signal.SIGKILL)
    status = run.wait(timeout=30)
    out = (tmp_path / "output.txt").read_text()
    assert re.search(r"pretrain.py: error: a data worker died \(.*\): out of memory .* try fewer --num_workers", out), out
    assert status == (2 if processes == 1 else 1) and (processes > 1 or "Traceback" not in out), out
    wait_until_gone(family)
    step = checkpoint(tmp_path)["step"]
    kill_at(tmp_path, step + 3, *args, processes=processes)
    assert f"resuming ./last.pt at step {step}" in (tmp_path / "output.txt").read_text()


def test_a_connection_that_breaks_as_a_worker_dies_is_no_riddle(packed, tmp_path):
    """What is read from a worker in its last moment fails before torch has noticed that it is gone."""
    (tmp_path / "planted.py").write_text(
        "import runpy, sys\n"
        "from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter\n"
        "def planted(self, timeout=0):\n    raise ConnectionResetError(104, 'Connection reset by peer')\n"
        "_MultiProcessingDataLoaderIter._try_get_data = planted\n"
        "sys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--num_workers", 1]
    done = subprocess.run([sys.executable, "planted.py", *map(str, [ROOT / "pretrain.py", *args])], cwd=tmp_path,
                          env={**environment(), "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and "error: a data worker died" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr


def test_the_death_of_a_worker_is_told_once(packed, tmp_path):
    """torch's handler of a dead child raises wherever it interrupts; while the run is leaving, nobody can catch that."""
    (tmp_path / "planted.py").write_text(
        "import os, runpy, signal, sys\n"
        "from tqdm import tqdm\n"
        "from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter\n"
        "close = tqdm.__del__\n"
        "def planted_del(self):\n"
        "    os.kill(os.getpid(), signal.SIGCHLD)\n    close(self)\n"
        "def planted(self, timeout=0):\n"
        "    handler = signal.signal(signal.SIGCHLD, lambda *_: None)  # the signal comes later, in planted_del\n"
        "    os.kill(self._workers[0].pid, signal.SIGKILL)\n"
        "    os.waitid(os.P_PID, self._workers[0].pid, os.WEXITED | os.WNOWAIT)\n"
        "    signal.signal(signal.SIGCHLD, handler)\n"
        "    raise ConnectionResetError(104, 'Connection reset by peer')\n"
        "tqdm.__del__, _MultiProcessingDataLoaderIter._try_get_data = planted_del, planted\n"
        "sys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--num_workers", 1]
    done = subprocess.run([sys.executable, "planted.py", *map(str, [ROOT / "pretrain.py", *args])], cwd=tmp_path,
                          env={**environment(), "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=60)
    assert done.returncode == 2 and "error: a data worker died" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr


def test_an_error_inside_a_data_worker_keeps_its_traceback(packed, tmp_path):
    """And the run ends: its workers ignore SIGTERM, so that an exit that left them to it would wait for ever."""
    (tmp_path / "planted.py").write_text(
        "import runpy, sys, data\n"
        "def planted(self, step):\n    raise RuntimeError('not this step')\n"
        "data.PretrainBatches.__getitem__ = planted\n"
        "sys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--num_workers", 1]
    done = subprocess.run([sys.executable, "planted.py", *map(str, [ROOT / "pretrain.py", *args])], cwd=tmp_path,
                          env={**environment(), "PYTHONPATH": str(ROOT)}, text=True, capture_output=True, timeout=60)
    assert done.returncode == 1 and "in planted" in done.stderr and "not this step" in done.stderr, done.stderr


def test_tissue_and_flip_reach_the_run(packed, tmp_path):
    """A run with --mask_tissue logs the share of masked patches with tissue; it and --flip make another run."""
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 24]
    pretrain(tmp_path, *args)
    assert all("tissue" not in json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    out = pretrain(tmp_path, *args, "--mask_tissue", "--flip", "horizontal")
    assert "(other flip, mask_tissue)" in out and "saved ./last.pt at step 3 of 3" in out
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(log) == 3 and all(0.5 < record["tissue"] <= 1 and np.isfinite(record["ibot"]) for record in log)


@pytest.mark.slow
def test_ranks_leave_when_torchrun_is_killed(packed, tmp_path):
    """SIGKILL to torchrun alone: its ranks notice, so that a new run does not share last.pt with orphans."""
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 160_000]
    run = subprocess.Popen(command(*args, processes=2), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    while not (tmp_path / "log.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.1)
    family = descendants(run.pid)
    assert len(family) >= 2
    run.kill()
    run.wait()
    wait_until_gone(family)


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_on_two_processes(packed, tmp_path, signal_number):
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 160_000, "--save_every", 100_000]
    kill_at(tmp_path, 3, *args, processes=2, signal_number=signal_number)
    assert checkpoint(tmp_path)["step"] >= 3
    assert "saved ./last.pt at step" in (tmp_path / "output.txt").read_text()


def test_a_missing_folder_stops_all_processes_at_once(tmp_path):
    started = time.monotonic()
    out = pretrain(tmp_path, "--data", "none", processes=2, expect=1)
    assert "none: no such file or folder" in out and time.monotonic() - started < 25


def test_a_non_finite_step_stops_with_its_files(packed, tmp_path):
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 160, "--save_every", 1,
            "--clip_grad", "1e30", "--warmup_fraction", 0.5, "--base_lr", "1e36", "--layerscale", "1"]
    out = pretrain(tmp_path, *args, expect=2)
    assert "is not finite" in out and "Its images: " in out and ".png" in out and "dino_global" in out
    saved = checkpoint(tmp_path)
    assert all(value.isfinite().all() for value in [*saved["student"].values(), *saved["teacher"].values()])


def test_a_log_without_its_checkpoint_is_kept_aside(packed, tmp_path):
    """Killed before the first checkpoint: the new run's log starts anew, the old one is kept."""
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 8, "--total_samples", 320, "--save_every", 1000]
    kill_at(tmp_path, 4, *args)
    old = (tmp_path / "log.jsonl").read_text()
    assert "log.old-1.jsonl" in pretrain(tmp_path, *args)
    assert (tmp_path / "log.old-1.jsonl").read_text() == old
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == list(range(1, 41))


@pytest.mark.parametrize("args, says", [
    (["--seed", "-1"], "--seed must be at least 0"),
    (["--teacher_temp", "0"], "--teacher_temp must be positive"),
    (["--data", "none"], "none: no such file or folder"),
    (["--data", "empty"], "no images found"),
    (["--local_crops_numbers", "3"], "--local_crops_numbers: no such option"),
    (["--local_crops_size", "30"], "--local_crops_size 30 is not a multiple of --patch_size 8"),
    (["--drop_path_rate", "1.0"], "--drop_path_rate is a share from 0 to below 1, not 1.0")])
def test_bad_arguments_get_a_sentence(tmp_path, args, says):
    (tmp_path / "empty").mkdir()
    out = pretrain(tmp_path, *args, expect=2)
    assert says in out and "Traceback" not in out
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3])
def test_kill_series(packed, tmp_path, processes):
    """Killed again and again, at most a few steps apart; still bit-equal to the uninterrupted run."""
    args = ["--data", packed, *SMALL, "--batch_size_per_gpu", 4, "--total_samples", 4 * 60 * processes, "--save_every", 2,
            "--num_workers", 2]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    pretrain(tmp_path / "whole", *args, processes=processes)
    for step in (3, 4, 12, 20, 21, 30):
        kill_at(tmp_path / "killed", step, *args, processes=processes)
        assert checkpoint(tmp_path / "killed")["step"] < 60
    pretrain(tmp_path / "killed", *args, processes=processes)
    a, b = (checkpoint(tmp_path / name) for name in ("whole", "killed"))
    assert a["step"] == 60
    assert_same(a, b)
