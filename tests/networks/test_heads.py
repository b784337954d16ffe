"""The network of many tasks: its decoder written out, equality with the dense one, what a task's gradient reaches."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from stage_tools import one_thread  # noqa: F401

from labelled.fmc_uia import Task
from model import VisionTransformer
from networks import heads
from networks.heads import DPT, MultiTask, build_network
from runtime import save_checkpoint

CONFIG = dict(img_size=32, patch_size=8, in_chans=1, embed_dim=16, depth=4, num_heads=2, num_register_tokens=2,
              init_values=0.5, init_std=0.2)
TASKS = [Task("seg", "segmentation", 3), Task("cls", "classification", 4), Task("det", "detection", 1),
         Task("reg", "regression", 2), Task("seg 2", "segmentation", 2)]
DENSE = {"seg", "reg", "seg 2"}
HOW = dict(experts=3, blocks=[2, 3], top_k=None, task_dim=6, channels=32)
f64 = torch.float64


def randomize(module):
    for p in module.parameters():
        p.data.normal_(std=0.3)
    return module


def network(tasks=TASKS, random=True, config=(), **how):
    net = build_network(VisionTransformer(**{**CONFIG, **dict(config)}), tasks, {**HOW, **how}).double()
    return randomize(net) if random else net


def draw(*shape):
    return torch.randn(*shape, dtype=f64)


# ---------------------------------------------------------------- DPT

@pytest.mark.parametrize("patch", [8, 16])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 1), (1, 6), (7, 2)], ids=str)
def test_dpt_has_the_size_of_the_image(grid, patch):
    dpt, sizes = randomize(DPT(16, 32).double()), []
    for module in dpt.reassemble:
        module.register_forward_hook(lambda module, x, y: sizes.append(tuple(y.shape)))
    taps = [draw(2, 16, *grid).requires_grad_() for _ in range(4)]
    size = tuple(patch * n for n in grid)
    features = dpt(taps, size)
    assert features.shape == (2, heads.FEATURES, *size)
    rows, columns = grid
    assert sizes == [(2, 32, 4 * rows, 4 * columns), (2, 32, 2 * rows, 2 * columns), (2, 32, rows, columns),
                     (2, 32, -(-rows // 2), -(-columns // 2))]  # half of an odd side: the larger half
    (features * draw(*features.shape)).sum().backward()
    for name, p in [*dpt.named_parameters(), *((f"tap {i}", tap) for i, tap in enumerate(taps))]:
        assert p.grad.abs().max() > 0, name


def test_dpt_written_out():
    """Ranftl et al.'s: from the deepest level up, each but that one joined by its own residual unit."""
    dpt, taps = randomize(DPT(16, 32).double()), [draw(1, 16, 3, 5) for _ in range(4)]

    def conv(layer, x):
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)

    def unit(own, x):
        return x + conv(own.conv2, conv(own.conv1, x.relu()).relu())

    x, levels = 0, []
    for own, tap, scale in zip(dpt.reassemble, taps, (4, 2, 1, 0)):
        level = conv(own.project, tap)
        if scale > 1:
            level = F.conv_transpose2d(level, own.rescale.weight, own.rescale.bias, scale)
        levels.append(conv(own.conv, level if scale else conv(own.rescale, level)))
    for i, size in ((3, (3, 5)), (2, (6, 10)), (1, (12, 20)), (0, (24, 40))):
        x = levels[i] if i == 3 else x + unit(dpt.skips[i], levels[i])
        x = F.interpolate(conv(dpt.outs[i], unit(dpt.units[i], x)), size, mode="bilinear")
    for last in (dpt.first, dpt.last):
        x = F.group_norm(conv(last.conv, x), last.norm.num_groups, last.norm.weight, last.norm.bias).relu()
        x = F.interpolate(x, (48, 80), mode="bilinear")
    assert (dpt(taps, (48, 80)) - x).abs().max() < 1e-10 * x.abs().max()


def test_residual_units_start_as_the_identity():
    unit, x = heads.ResidualUnit(8).double(), draw(2, 8, 5, 3)
    assert torch.equal(unit(x), x)
    units = [module for module in DPT(16, 32).modules() if isinstance(module, heads.ResidualUnit)]
    assert len(units) == 7 and all(not unit.conv2.weight.any() and unit.conv1.weight.any() for unit in units)


# ---------------------------------------------------------------- one network

@pytest.mark.parametrize("size", [(32, 32), (24, 40)], ids=str)
@pytest.mark.parametrize("config", [dict(), dict(pos="rope", mask_k_bias=True)], ids=["learned", "rope"])
def test_copies_as_experts_are_the_dense_network(config, size):
    """Before training, whatever gates and embeddings say; and the shape of each kind's output."""
    dense = network(experts=1, config=config)
    mixed = build_network(copy.deepcopy(dense.backbone), TASKS, HOW).double()
    mixed.decoder.load_state_dict(dense.decoder.state_dict())
    for part, own in zip(mixed.parts, dense.parts):
        part.head.load_state_dict(own.head.state_dict())
        assert own.embedding is None  # nothing would learn it
    for i in HOW["blocks"]:
        randomize(mixed.backbone.blocks[i].mlp.gate), randomize(mixed.backbone.blocks[i].mlp.task_gate)
    x, grid = draw(2, 1, *size), (size[0] // 8, size[1] // 8)
    for number, shape in enumerate([(2, 3, *size), (2, 4), (2, 5, *grid), (2, 2, *size), (2, 2, *size)]):
        (want, none), (got, gates) = dense(x, number), mixed(x, number)
        assert got.shape == shape and none == [] and len(gates) == 2
        assert (got - want).abs().max() < 1e-10 * want.abs().max().clamp(min=1), TASKS[number]
        assert gates[0].shape == (2 * (1 + 2 + grid[0] * grid[1]), 3) and gates[0].std() > 0.01


def test_a_task_is_told_by_its_number():
    """Two tasks of equal heads: the embedding alone, through the gates of unequal experts, makes them differ."""
    net, x = network([TASKS[0], TASKS[0]]), draw(2, 1, 32, 32)
    net.parts[1].load_state_dict(net.parts[0].state_dict())
    assert torch.equal(net(x, 0)[0], net(x, 1)[0])
    net.parts[1].embedding.data += 1.0
    (a, gates), (b, others) = net(x, 0), net(x, 1)
    assert (a - b).abs().max() > 1e-3 and all((p - q).abs().max() > 1e-3 for p, q in zip(gates, others))
    for mlp in (net.backbone.blocks[i].mlp for i in HOW["blocks"]):
        mlp.task_gate.weight.data.zero_()
    assert torch.equal(net(x, 0)[0], net(x, 1)[0])


@pytest.mark.parametrize("size", [(32, 32), (16, 24)], ids=str)
def test_only_the_active_task_and_the_trunk_get_gradients(size):
    net, reached = network(), set()
    x = draw(2, 1, *size)
    for number, task in enumerate(TASKS):
        net.zero_grad(set_to_none=True)
        output, _ = net(x, number)
        (output * draw(*output.shape)).sum().backward()
        got = {name for name, p in net.named_parameters() if p.grad is not None}
        assert {name.split(".")[0] for name in got} == {"backbone", "parts", *["decoder"] * (task.name in DENSE)}, task
        assert {name.split(".")[1] for name in got if name.startswith("parts")} == {str(number)}
        trained = {p for module in net.trained(number) for p in module.parameters()}
        assert got == {name for name, p in net.named_parameters() if p in trained and "mask_token" not in name}
        reached |= {name for name in got if net.get_parameter(name).grad.abs().max() > 1e-6}
    trainable = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in net.named_parameters()} - {"backbone.mask_token"}
    assert reached == trainable


@pytest.mark.parametrize("depth, taps", [(1, [0] * 4), (2, [0, 0, 1, 1]), (4, [0, 1, 2, 3]), (12, [2, 5, 8, 11]),
                                         (24, [5, 11, 17, 23])])
def test_taps_are_at_quarters_of_the_depth(depth, taps):
    net = MultiTask(VisionTransformer(**{**CONFIG, "depth": depth}), TASKS, 32, 6).double()
    assert net.taps == taps
    if depth <= 4:
        x, seen = draw(1, 1, 16, 16), []
        net.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        assert net(x, 0)[0].shape == (1, 3, 16, 16)
        for tap, block in zip(seen[0], taps):
            assert torch.equal(tap, net.backbone.get_intermediate_layers(x, [block], reshape=True)[0])


def test_unknown_tasks_and_sizes_raise_and_only_dense_tasks_have_a_decoder():
    sparse, net, x = network(TASKS[1:3]), network(), draw(1, 1, 16, 16)
    assert sparse.decoder is None and sparse.trained(1) == [sparse.backbone, sparse.parts[1]]
    assert sparse(x, 0)[0].shape == (1, 4)
    for number in (-1, 5):
        with pytest.raises(ValueError, match=f"task number {number}: this network has 5 tasks, seg, cls, det, reg,"):
            net(x, number)
    with pytest.raises(ValueError, match="sides that are multiples of its patch size 8"):
        net(draw(1, 1, 20, 16), 0)


def test_a_finished_run_is_opened_again(tmp_path):
    config, x = {**CONFIG, "in_chans": 3, "drop_path_rate": 0.1}, torch.randn(2, 1, 16, 16)  # as its pretraining had it
    net = network(config=dict(drop_path_rate=0.1)).float().eval()
    heads.start_from_shares(net.parts[0], np.array([0.5, 0.5, 0.0]))
    assert torch.allclose(net.parts[0].head.bias, torch.tensor([0.5, 0.5, 1e-6]).log())
    state = net.state_dict()
    saved = dict(tasks=[list(task) for task in TASKS], network_of=HOW, config=config,
                 teacher={key: value for key, value in state.items() if key.startswith("backbone.")},
                 head={key: value for key, value in state.items() if not key.startswith("backbone.")})
    save_checkpoint(tmp_path / "a.pt", saved)
    opened, _ = heads.open_network(tmp_path / "a.pt", "cpu")
    assert opened.tasks == TASKS and not opened.training
    assert all(torch.equal(opened(x, number)[0], net(x, number)[0]) for number in range(5))
    save_checkpoint(tmp_path / "b.pt", {key: saved[key] for key in ("config", "teacher")})
    with pytest.raises(ValueError, match="no finished run of finetune_multi.py: it has no task heads"):
        heads.open_network(tmp_path / "b.pt", "cpu")
