"""finetune_multi.py stopped, crashed and started again: to the bit as without; what is kept and what is not redone."""

import shutil

import pytest
import torch
from multi_tools import BASIC, assert_equal, few_replicates, run, save_all  # noqa: F401
from stage_tools import StopAfter, assert_same_run, checkpoint, equal, one_thread  # noqa: F401

from training import many_tasks

EVERY = ("--paradigm", "task", "clinical", "all")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, output, reports) of a run of all paradigms that nothing stopped."""
    folder = save_all(tmp_path_factory.mktemp("finished"))
    return folder, *run(folder, *BASIC, *EVERY)


@pytest.fixture
def fresh(finished, tmp_path):
    """The same data and checkpoint, and no run."""
    (tmp_path / "fmc").symlink_to(finished[0] / "fmc")
    shutil.copy(finished[0] / "a.pt", tmp_path)
    return tmp_path


@pytest.mark.parametrize("stops", [(), (1,), (8,), (16,), (7, 2, 4), (3, 5, 7)], ids=str)
def test_a_stopped_and_resumed_run_is_bit_equal(finished, fresh, stops):
    """Between validations, right at one, at the last step, within a round; saved at other steps. No stop: once more."""
    folder, _, reports = finished
    every = ("--save_every", 1 + len(stops))
    for steps in stops:
        output, found = run(fresh, *BASIC, *every, received=StopAfter(steps))
        assert not found and output.endswith("stopped before the end: the same command goes on\n"), output
    output, found = run(fresh, *BASIC, *every)
    assert (f"resuming multi/all-seed0.pt at step {sum(stops)}\n" in output) == bool(stops)
    assert_same_run(folder / "multi" / "all-seed0", fresh / "multi" / "all-seed0")
    one, two = (checkpoint(path / "multi" / "all-seed0.pt") for path in (folder, fresh))
    for key in ("values", "best", "gates", "step", "seen"):
        assert_equal(one[key], two[key], key)
    for key in ("values", "scores", "chosen", "gates", "settings"):
        assert_equal(reports["all"][key], found["all"][key], key)


def test_a_checkpoint_holds_all_that_the_next_step_needs(fresh):
    """Stopped at step 11 at once, or at 2, 8 and then 11: network, optimizer, losses and best are the same; also with
    what is drawn by the step, factors of the coordinates."""
    flags = (*BASIC, "--ckpt", "none", "--arch", "vit_micro", "--rope_rescale", 2, "--top_k", 1)
    for name, stops in dict(once=(11,), often=(2, 6, 3)).items():
        for steps in stops:
            run(fresh, *flags, "--output_dir", name, received=StopAfter(steps))
    one, two = (checkpoint(fresh / name / "all-seed0.pt") for name in ("once", "often"))
    assert one["step"] == 11 and one["best"]["step"] == 8 and len(one["optimizer"]["state"]) > 40
    assert {"network", "optimizer", "losses", "best", "identity", "step"} == one.keys()
    assert_equal(one, two)


def test_what_a_killed_run_leaves_is_no_harm(finished, fresh):
    """Killed while it wrote: half a checkpoint under another name, records of steps after the last whole one."""
    run(fresh, *BASIC, received=StopAfter(5))
    (fresh / "multi" / "all-seed0.pt.tmp").write_bytes(b"half of it")
    (fresh / "multi" / "all-seed0.jsonl").write_text('{"step": 8, "normalised": 7}\n{"step": 1')
    output, _ = run(fresh, *BASIC)
    assert "resuming multi/all-seed0.pt at step 5\n" in output
    assert_same_run(finished[0] / "multi" / "all-seed0", fresh / "multi" / "all-seed0")


@pytest.mark.parametrize("which", [1, 2, 3])
def test_a_full_disk_costs_no_more_than_what_was_not_saved(finished, fresh, monkeypatch, which):
    """At the first saving, the second or the last: the one before it is whole, and the log is cut back to it."""
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) == which:
            file.write(b"half of it")
            raise OSError("No space left on device")
        save(state, file)

    flags = (*BASIC, "--save_every", 2)  # at steps 8, 16 and the end
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full)
        run(fresh, *flags)
    assert not list((fresh / "multi").glob("*.tmp"))
    output, _ = run(fresh, *flags)
    assert (f"resuming multi/all-seed0.pt at step {8 * (which - 1)}\n" in output) == (which > 1), output
    assert_same_run(finished[0] / "multi" / "all-seed0", fresh / "multi" / "all-seed0")


def test_a_crash_in_the_test_costs_no_training(finished, fresh, monkeypatch):
    def too_large(*_):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(many_tasks, "test_values", too_large)
        run(fresh, *BASIC)
    output, _ = run(fresh, *BASIC)
    assert "resuming multi/all-seed0.pt at step 16\n" in output  # the last, where nothing else would be saved
    assert_same_run(finished[0] / "multi" / "all-seed0", fresh / "multi" / "all-seed0")


def test_a_finished_run_is_not_trained_again(finished, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    monkeypatch.setattr(many_tasks, "train_step", None)  # cannot be called
    output, reports = run(folder, *BASIC, *EVERY)
    assert "kept as" not in output and output.count("resuming ") == 4 + 2 + 1
    assert output.split("\ntask: test")[1] == finished[1].split("\ntask: test")[1]
    assert_equal({name: {**report, "versions": 0} for name, report in reports.items()},
                 {name: {**report, "versions": 0} for name, report in finished[2].items()})


def test_other_settings_are_another_run(finished, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished[0], folder)
    first, log = (folder / "multi" / name for name in ("all-seed0.pt", "all-seed0.jsonl"))
    weights, records, report = first.read_bytes(), log.read_bytes(), (folder / "multi" / "all.json").read_bytes()
    output, reports = run(folder, *BASIC, "--lr", "2e-3", "--iters", 2)
    assert "multi/all-seed0.pt belongs to another run (other iters, lr): kept as multi/all-seed0.old-1.pt" in output
    for name, content in {"all-seed0.old-1.pt": weights, "all-seed0.old-1.jsonl": records,
                          "all.old-1.json": report}.items():
        assert (folder / "multi" / name).read_bytes() == content
    assert not equal(checkpoint(first)["head"], checkpoint(folder / "multi" / "all-seed0.old-1.pt")["head"])
    for name in ("task", "clinical"):  # of the first recipe
        assert f"multi/{name}.json is of another iters, lr: left out of the table" in output
    assert reports["paradigms"]["paradigms"] == ["all"] and reports["paradigms"]["compared with"] is None
