"""Agreement with numbers computed by facebookresearch/dinov2 (b8931f7) on seeded random weights, to 1e-5 per tensor.

The error of a tensor is |ours - golden| / |golden| in the Euclidean norm: elementwise agreement cannot hold where the
true value is zero (the gradient of a key bias) and both sides store rounding noise.
"""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
import losses
import pretrain
from kernels import cross_entropy, sinkhorn, softmax_center, update_center
from losses import DINOHead
from model import VisionTransformer
from networks.weights import load_strict
from runtime import parameter_groups

GOLDEN = Path(__file__).parent / "golden"
VIT = dict(img_size=64, patch_size=16, in_chans=1, embed_dim=64, depth=2, num_heads=2, num_register_tokens=4)


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def part(tensors, prefix):
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def assert_agree(ours, theirs, label, tolerance=1e-5):
    assert ours.shape == theirs.shape, label
    error = (ours - theirs).norm() / theirs.norm()
    assert error <= tolerance, f"{label}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def vit():
    return golden("vit")


def test_vit_square_masked_and_interpolated(vit):
    model = load_strict(VisionTransformer(**VIT), part(vit, "state/"), "vit.npz")
    plain = model.forward_features(vit["x"])
    assert_agree(plain["x_norm_clstoken"], vit["cls"], "cls")
    assert_agree(plain["x_norm_regtokens"], vit["reg"], "registers")
    assert_agree(plain["x_norm_patchtokens"], vit["patch"], "patches")
    masked = model.forward_features(vit["x"], vit["mask"])
    assert_agree(masked["x_norm_clstoken"], vit["cls_masked"], "cls, masked")
    assert_agree(masked["x_norm_patchtokens"], vit["patch_masked"], "patches, masked")
    for size in ("96", "48x80"):  # larger, and not square
        resized = model.forward_features(vit[f"x{size}"])
        assert_agree(resized["x_norm_clstoken"], vit[f"cls{size}"], f"cls at {size}")
        assert_agree(resized["x_norm_patchtokens"], vit[f"patch{size}"], f"patches at {size}")


def test_vit_packed_groups_equal_separate_forwards(vit):
    model = load_strict(VisionTransformer(**VIT), part(vit, "state/"), "vit.npz")
    both = model.forward_features([vit["x"], vit["x48x80"]], [vit["mask"], None])
    assert_agree(both[0]["x_norm_patchtokens"], vit["patch_masked"], "first group")
    assert_agree(both[1]["x_norm_clstoken"], vit["cls48x80"], "second group")


def test_vit_intermediate_layers(vit):
    model = load_strict(VisionTransformer(**VIT), part(vit, "state/"), "vit.npz")
    (map0, cls0), (map1, _) = model.get_intermediate_layers(vit["x"], 2, reshape=True, return_class_token=True)
    assert_agree(map0, vit["layer0_map"], "map of block 0")
    assert_agree(cls0, vit["layer0_cls"], "cls of block 0")
    assert_agree(map1, vit["layer1_map"], "map of block 1")
    assert torch.equal(model.get_intermediate_layers(vit["x"], [1], reshape=True)[0], map1)


def test_head():
    z = golden("head")
    head = load_strict(DINOHead(64, 256, hidden_dim=96, bottleneck_dim=32), part(z, "state/"), "head.npz")
    assert_agree(head(z["x"]), z["y"], "logits")


@pytest.mark.parametrize("centering", ["centered", "sinkhorn"])
def test_dino_and_ibot_losses(centering):
    z = golden("losses")
    temp, center = z["teacher_temp"].item(), z["center"][0]

    def targets(logits):
        return softmax_center([logits], center, temp) if centering == "centered" else sinkhorn([logits], temp)

    def loss(student, teacher, a, r, rows_of, weight):
        return cross_entropy(student.clone(), teacher, a, r, torch.tensor(rows_of), weight, 0.1, temp)[0].sum()

    a, r = targets(z["teacher_logits"])
    assert_agree(torch.exp(z["teacher_logits"] / temp - a - r[:, None]), z[f"prob_{centering}"], "class targets")
    ce = loss(z["student_global"], z["teacher_logits"], a, r, [[0, -1]], torch.full((12,), 1 / 12))
    assert_agree(ce, z[f"dino_global_{centering}"], "global")
    # 4 local crops of 6 images learn from both teacher crops, mean over the images; rows are crop-major
    local, teacher = (z[name].unflatten(0, (-1, 6)).transpose(0, 1).flatten(0, 1) for name in ("student_local", "teacher_logits"))
    ce = loss(local, teacher, a, r.view(2, 6).T.flatten(), [[0, 1]] * 4, torch.full((24,), 1 / 6))
    assert_agree(ce, z[f"dino_local_{centering}"], "local")

    a, r = targets(z["teacher_patch"])
    assert_agree(torch.exp(z["teacher_patch"] / temp - a - r[:, None]), z[f"patch_prob_{centering}"], "patch targets")
    assert_agree(loss(z["student_patch"], z["teacher_patch"], a, r, [[0, -1]], z["mask_weight"] / 12), z[f"ibot_{centering}"], "ibot")


@pytest.mark.parametrize("logits, after", [("teacher_logits", "center_after"), ("teacher_patch", "patch_center_after")])
def test_center_update(logits, after):
    z = golden("losses")
    ours = update_center(z["center"][0], z[logits].sum(0), len(z[logits]), z["center_momentum"].item())
    assert_agree(ours, z[after][0], after)


@pytest.mark.parametrize("name", ["koleo", "koleo_dup"])
def test_koleo(name):
    z = golden("losses")
    assert_agree(losses.koleo_loss(z[f"{name}_x"], torch.arange(16)), z[name], name)


@pytest.mark.parametrize("ops", ["references", "kernels"])  # kernels: through the interpreter, called as training does
@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_whole_step(centering, ops):
    kernels.use_reference(ops == "references")
    assert ("references" in kernels.mode("cpu")) == (ops == "references")
    z = golden("step")
    args = Namespace(head_n_prototypes=256, head_hidden_dim=96, head_bottleneck_dim=32, separate_head=False,
                     init_std=0.02, local_crops_number=len(z["local_crops"]) // 6)
    student, teacher = (pretrain.Network(VIT, args) for _ in range(2))
    for network, who in ((student, "student"), (teacher, "teacher")):
        load_strict(network.backbone, part(z, f"{who}/"), who)
        load_strict(network.dino_head, part(z, f"{who}_head/"), f"{who}_head")
    masks, temp, b = z["masks"], z["teacher_temp"].item(), 6
    micro = dict(global_crops=z["global_crops"], local_crops=z["local_crops"], masks=masks, groups=torch.arange(b),
                 mask_indices=masks.flatten().nonzero()[:, 0],
                 mask_weight=(masks / masks.sum(1, keepdim=True).clamp(min=1))[masks])
    (class_target, ), (patch_target, ) = losses.teacher_targets(
        teacher, [micro], z["center"].expand(2, -1), temp, centering)[0]
    (dino, ibot, koleo), local = losses.student_losses(student, micro, class_target, patch_target, temp, b)
    for ours, name in ((local, "dino_local"), (dino - local, "dino_global"), (ibot, "ibot"),
                       (0.1 * koleo, "koleo_weighted"), (dino + ibot + 0.1 * koleo, "total")):
        assert_agree(ours, z[f"{centering}/{name}"], name)
    (dino + ibot + 0.1 * koleo).backward()
    grads = part(z, f"{centering}/grad/")
    ours = {**{name: p.grad for name, p in student.backbone.named_parameters()},
            **{f"head.{name}": p.grad for name, p in student.dino_head.named_parameters()}}
    assert grads.keys() == ours.keys()
    for name, grad in grads.items():
        assert_agree(ours[name], grad, f"gradient of {name}")


def test_schedules():
    z = golden("schedules")
    args = pretrain.get_args(["--preset", "ultradino"])
    steps = z["iterations_per_epoch"].item() * z["epochs"].item()
    ours = pretrain.schedules(args, steps, batch=128)
    for name in ("lr", "weight_decay", "momentum", "teacher_temp"):
        assert_agree(torch.from_numpy(ours[name][z["iteration"].numpy()]), z[name], name, 1e-9)
    assert ours["freeze_last_layer"].sum() == 50  # one epoch of a hundred


def test_schedules_at_ultradino_length():
    """Values that UltraDINO's code gives for batch 128 and 100 epochs of 20,000 iterations."""
    ours = pretrain.schedules(pretrain.get_args(["--preset", "ultradino"]), 2_000_000, batch=128)
    for epoch, lr, wd, momentum, temp in ((1, 1.4142e-4, .040089, .9920020, .041), (10, 1.41421e-3, .0488098, .9921958, .05),
                                          (50, 8.30308e-4, .22, .996, .07), (99, 1.43045e-6, .399911, .999998, .07)):
        ours_then = [ours[name][epoch * 20_000] for name in ("lr", "weight_decay", "momentum", "teacher_temp")]
        assert ours_then == pytest.approx((lr, wd, momentum, temp), rel=1e-4)


def test_parameter_groups():
    expected = json.loads((GOLDEN / "param_groups_vit_small.json").read_text())
    args = pretrain.get_args(["--preset", "ultradino", "--head_n_prototypes", "16"])
    network = pretrain.Network(pretrain.backbone_config(args), args)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)]: group for group in parameter_groups(network, 0.9) for p in group["params"]}
    assert found.keys() == {f"backbone.{name}" for name in expected} | {
        name for name in found if name.startswith("dino_head.")}
    for name, group in expected.items():
        ours = found[f"backbone.{name}"]
        assert ours["lr_multiplier"] == pytest.approx(group["lr_multiplier"], rel=1e-12), name
        assert ours["wd_multiplier"] == group["wd_multiplier"] and ours["is_last_layer"] == group["is_last_layer"], name
    heads = {name: found[name] for name in found if name.startswith("dino_head.")}
    assert all(group["lr_multiplier"] == 1 for group in heads.values())
    assert {name for name, group in heads.items() if group["is_last_layer"]} == {
        "dino_head.last_layer.weight_g", "dino_head.last_layer.weight_v"}
