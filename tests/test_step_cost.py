"""What a step may cost: no waiting for the device, memory that checkpointing really saves, and what tools/dry_run.py says."""

import gc

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import kernels
import pretrain
from model import AddRows, KeepRows, VisionTransformer
from tools import dry_run

SMALL = ["--preset", "cpu", "--head_n_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8",
         "--global_crops_size", "16", "--local_crops_size", "8", "--patch_size", "4", "--canvas", "24",
         "--batch_size_per_gpu", "4", "--drop_path_rate", "0.3"]
VIT = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=32, depth=3, num_heads=2, num_register_tokens=2,
           init_values=0.5, drop_path_rate=0.3)


def test_drop_path_gathers_pass_gradcheck():
    """Rows kept and added back by the inverse index: values and gradients, of a branch in between too."""
    rows, inverse = torch.tensor([1, 2, 4]), torch.tensor([-1, 0, 1, -1, 2])
    x, kept = torch.randn(5, 3).double().requires_grad_(), torch.randn(3, 3).double().requires_grad_()
    assert torch.equal(KeepRows.apply(x, rows, inverse), x[rows])
    scale = torch.tensor([0, 2, 2, 0, 3]).double()[:, None]
    assert torch.equal(AddRows.apply(x, kept, rows, inverse, scale), x.detach().clone().index_add_(0, rows, kept * scale[rows]))
    assert torch.autograd.gradcheck(lambda x: KeepRows.apply(x, rows, inverse), x)
    assert torch.autograd.gradcheck(lambda x, kept: AddRows.apply(x, kept, rows, inverse, scale), (x, kept))


def test_drop_path_draws_describe_the_same_images():
    """rows and inverse agree, whole images are kept, and every branch has draws of its own."""
    drops = VisionTransformer(**VIT).draw_drop_path([(5, 3), (0, 7), (4, 2)], np.random.default_rng(0))
    assert len(drops) == 6 and len({tuple(rows.tolist()) for rows, *_ in drops}) > 1
    for rows, inverse, scale, kept_shapes in drops:
        assert kept_shapes == [(3, 3), (0, 7), (2, 2)] and len(rows) == 13 and len(inverse) == len(scale) == 23
        assert torch.equal(inverse[rows], torch.arange(13)) and (inverse >= 0).sum() == 13
        assert set(rows[:9].view(3, 3)[:, 0].tolist()) <= {0, 3, 6, 9, 12}
        assert torch.allclose(scale[rows][:, 0], torch.tensor([5 / 3] * 9 + [4 / 2] * 4)) and (scale != 0).sum() == 13


def gradients(model, crops, drops):
    model.zero_grad()
    sum(features["x_prenorm"].square().sum() for features in model.forward_features(crops, None, drops)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_and_crops():
    model, rng = VisionTransformer(**VIT), np.random.default_rng(0)
    crops = [torch.randn(4, 1, 32, 32), torch.randn(6, 1, 16, 16)]
    return model, crops, model.draw_drop_path([(4, 19), (6, 7)], rng)


def test_checkpointed_gradients_are_the_same():
    model, crops, drops = model_and_crops()
    plain = gradients(model, crops, drops)
    calls = []
    model.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    model.checkpoint_activations = True
    again = gradients(model, crops, drops)
    assert len(calls) == 2  # computed twice indeed
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


def test_compiled_blocks_are_two_graphs_once(monkeypatch):
    """A training step with --compile in bf16: attention between two graphs a network, none of them compiled again."""
    compile_blocks = VisionTransformer.compile_blocks
    monkeypatch.setattr(VisionTransformer, "compile_blocks", lambda self: compile_blocks(self, backend="aot_eager"))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before, args = graphs["unique_graphs"], pretrain.get_args([*SMALL, "--compile", "--dtype", "bfloat16"])
    student, teacher = pretrain.build_networks(args, torch.device("cpu"))
    state = pretrain.build_state(student, teacher, args)
    for number in range(3):
        batch = dry_run.noise_batch(args, 4)
        _, drops = dry_run.step(student, teacher, state, batch, args, torch.device("cpu"))
        assert drops is not None and graphs["unique_graphs"] - before == 4
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.slow
def test_compiled_gradients_are_the_same():
    model, crops, drops = model_and_crops()
    plain = gradients(model, crops, drops)
    model.compile_blocks()
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        compiled = gradients(model, crops, drops)
        for name in plain:
            assert (plain[name] - compiled[name]).norm() <= 1e-5 * plain[name].norm().clamp(min=1e-6), name
    assert list(model.state_dict()) == list(VisionTransformer(**VIT).state_dict())


# ---------------------------------------------------------------- a step on shapes without numbers

def fake_step(args, change=lambda student: None, reference=False):
    """Peak memory and work of a step; raises where the host would wait for a number from the device."""
    build = pretrain.build_networks

    def changed(*arguments):
        networks = build(*arguments)
        change(networks[0])
        return networks
    kernels.use_reference(reference)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "build_networks", changed)
        return dry_run.predict(args)


@pytest.mark.parametrize("more", [[], ["--centering", "centering"], ["--separate_head"], ["--dtype", "bfloat16"],
                                  ["--local_crops_number", "0"]], ids=str)
def test_no_step_waits_for_the_device(more):
    """A fake tensor has no numbers: .item(), nonzero() or a mask as an index would raise."""
    for reference in (False, True):
        peak, flops = fake_step(pretrain.get_args([*SMALL, *more]), reference=reference)
        assert peak > 0 and flops > 0


def test_a_wait_would_be_noticed():
    def wait(student):
        student.backbone.norm.register_forward_hook(lambda module, inputs, out: out * out.mean().item())
    with pytest.raises(DataDependentOutputException):
        fake_step(pretrain.get_args(SMALL), wait)


@pytest.mark.parametrize("arch, batch, more, most", [
    ("vit_small", 128, [], 9), pytest.param("vit_base", 64, [], 10.5, marks=pytest.mark.slow),
    pytest.param("vit_large", 32, ["--checkpoint_activations"], 11, marks=pytest.mark.slow)])
def test_full_sizes_fit(arch, batch, more, most):
    """The recipe's step at UltraDINO's sizes in so many GB, about half of what cards of 18, 20 and 22 GB have."""
    peak, _ = fake_step(pretrain.get_args(["--preset", "ultradino", "--arch", arch, "--batch_size_per_gpu", str(batch), *more]))
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
    args = pretrain.get_args([*SMALL, "--drop_path_rate", "0", "--mask_sample_probability", "0", "--global_crops_size", "64"])
    _, flops = fake_step(args, reference=reference)
    b, C, depth, P, local = 4, 128, 4, 256, 4
    rows_g, rows_l = 2 * b * (5 + P), 2 * b * (5 + local)  # tokens of global and local crops; five have no patch
    linear = depth * 12 * C * C * (2 * rows_g + 6 * (rows_g + rows_l))
    patch = 16 * C * (2 * 2 * b * P + 4 * 2 * b * (P + local))  # the pixels need no gradient
    products = (2, 2 + 7) if not reference else (2, 2 + 4)  # of the teacher, of the student: kernels compute S anew
    attention = depth * 2 * C * (products[0] * rows_g * (5 + P) + products[1] * (rows_g * (5 + P) + rows_l * (5 + local)))
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
