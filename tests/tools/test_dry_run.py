"""What tools/dry_run.py says: memory of the full sizes, work by hand, the plan on screen."""
import gc

import pytest
import torch
from stage_tools import run_tool
from step_tools import SMALL, fake_step

import pretrain
import runtime
from tools import dry_run, preview


@pytest.mark.parametrize("arch, batch, more, most", [
    ("vit_small", 128, [], 9), pytest.param("vit_base", 64, [], 10.5, marks=pytest.mark.slow),
    pytest.param("vit_large", 32, ["--checkpoint_activations"], 11, marks=pytest.mark.slow)])
def test_full_sizes_fit(arch, batch, more, most):
    """The recipe's step at UltraDINO's sizes in so many GB, about half of what cards of 18, 20 and 22 GB have."""
    peak, _ = fake_step(pretrain.get_args(
        ["--preset", "ultradino", "--arch", arch, "--batch_size_per_gpu", str(batch), *more]))
    assert 0.8 * most * 1e9 < peak < most * 1e9


def test_predicted_memory_and_work_follow_the_flags():
    large = [*SMALL, "--batch_size_per_gpu", "16", "--global_crops_size", "48", "--local_crops_size", "24"]
    peak, flops = fake_step(pretrain.get_args(large))
    less, more_work = fake_step(pretrain.get_args([*large, "--checkpoint_activations"]))
    assert less < 0.6 * peak and 1.05 * flops < more_work < 4 / 3 * flops
    _, all_images = fake_step(pretrain.get_args([*large, "--drop_path_rate", "0"]))
    assert flops < 0.85 * all_images
    gc.collect()


@pytest.mark.parametrize("reference", [False, True], ids=["kernels", "references"])
def test_counted_work_is_the_formula(reference):
    """Matrix products of a step counted by hand: 2 operations a weight and token forward, 4 backward."""
    args = pretrain.get_args(
        [*SMALL, "--drop_path_rate", "0", "--mask_sample_probability", "0", "--global_crops_size", "64"])
    _, flops = fake_step(args, reference=reference)
    b, C, depth, P, local = 4, 128, 4, 256, 4
    rows_g, rows_l = 2 * b * (5 + P), 2 * b * (5 + local)  # tokens of global and local crops; five have no patch
    linear = depth * 12 * C * C * (2 * rows_g + 6 * (rows_g + rows_l))
    patch = 16 * C * (2 * 2 * b * P + 4 * 2 * b * (P + local))  # the pixels need no gradient
    products = (2, 2 + 7) if not reference else (2, 2 + 4)  # of the teacher, of the student: kernels compute S anew
    attention = depth * 2 * C * (
        products[0] * rows_g * (5 + P) + products[1] * (rows_g * (5 + P) + rows_l * (5 + local)))
    head, prototypes = C * 16 + 16 * 16 + 16 * 8, 8 * 32
    heads = head * (2 * 2 * b + 6 * 4 * b) + prototypes * (2 * 2 * b + 2 * 2 * b + 6 * 4 * b)
    assert flops == pytest.approx(linear + patch + attention + heads, rel=0.02)


def test_dry_run_prints_the_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "MEASURED_SECONDS", 0)
    dry_run.main(pretrain.get_args([*SMALL, "--reference_ops", "--total_samples", "4000"]))
    out = capsys.readouterr().out
    for text in ("parameters in the backbone", "GFLOP per image", "predicted peak memory", "images/s",
                 "1 x cpu: 1,000 steps of 4", "8 x cpu: 125 steps of 32"):
        assert text in out
    assert not list(tmp_path.iterdir())  # nothing written


@pytest.mark.parametrize("tool", [dry_run, preview], ids=["dry_run", "preview"])
def test_tools_are_for_one_process(tool, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "setup", lambda: (0, 2, torch.device("cpu")))
    with pytest.raises(ValueError, match="is for one process: start it with python, not torchrun"):
        tool.main(pretrain.get_args(SMALL))
    assert not list(tmp_path.iterdir())


def test_a_wrong_flag_starts_nothing(tmp_path):
    done = run_tool("dry_run", tmp_path, "--dryrun")
    assert done.returncode == 2 and "--dryrun" in done.stderr and not done.stdout
