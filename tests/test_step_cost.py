"""What a step may cost: no waiting for the device, and memory that checkpointing really saves."""
import numpy as np
import pytest
import torch
from step_tools import SMALL, fake_step
from torch._subclasses.fake_tensor import DataDependentOutputException

import pretrain
from model import AddRows, KeepRows, VisionTransformer
from tools import dry_run

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
