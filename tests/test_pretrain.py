"""The training step: what must not change a run (ranks, accumulation), and what must not reach the weights."""

import copy
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import data
import losses
import pretrain
import runtime
from runtime import parameter_groups

SMALL = ["--preset", "cpu", "--head_n_prototypes", "32", "--head_hidden_dim", "16", "--head_bottleneck_dim", "8",
         "--global_crops_size", "16", "--local_crops_size", "8", "--patch_size", "4", "--koleo_loss_weight", "0",
         "--num_register_tokens", "2"]


class FakePack:
    def __init__(self, images=40, canvas=24, black=0):
        rng = np.random.default_rng(0)
        self.canvases = rng.integers(0, 255, (images, canvas, canvas), dtype=np.uint8)
        self.canvases[:, :black] = 0
        self.sizes, self.groups = np.tile([40, 30], (images, 1)), np.arange(images)

    def __len__(self):
        return len(self.canvases)


def unmasked_second_half(batches):
    """At step 1 no image of the global batch's second half is masked: with two ranks, one has no masked patch."""
    def micro(step, indices, global_draws, local_draws, share):
        micro = original(step, indices, global_draws, local_draws, share)
        if step == 1:
            image = torch.arange(batches.batch)[share].repeat(2)  # crop-major
            keep = image[micro["mask_indices"] // micro["masks"].shape[1]] < batches.batch // 2
            micro["mask_weight"][~keep] = 0
            micro["masks"][image >= batches.batch // 2] = False
        return micro

    original, batches._micro = batches._micro, micro
    return batches


def networks(args):
    torch.manual_seed(0)
    config = dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=4, in_chans=1, num_register_tokens=2,
                  init_values=0.5, drop_path_rate=args.drop_path_rate)
    student = pretrain.Network(config, args).double()
    teacher = copy.deepcopy(student).requires_grad_(False)
    buffers = runtime.flatten_parameters(student), runtime.flatten_parameters(teacher)
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.9), lr=0.0, fused=True)
    return student, teacher, buffers, optimizer


SUMMED = ("dino_local", "dino_global", "ibot", "koleo", "grad_norm_backbone", "grad_norm_heads", "finite")


def train(args, rank, world_size, steps=3):
    """A few steps: (stats of each step, weights, first moments of the gradients, centers)."""
    batches = unmasked_second_half(data.PretrainBatches(FakePack(black=14 * args.mask_tissue), args, rank, world_size))
    student, teacher, buffers, optimizer = networks(args)
    centers = torch.zeros(2, args.head_n_prototypes, dtype=torch.float64)
    values = dict(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
    stats = []
    for step in range(steps):
        micros = pretrain.to_device(batches[step], torch.device("cpu"), args, 0.5, 0.25)
        micros = [{key: value.double() if value.is_floating_point() else value for key, value in micro.items()}
                  for micro in micros]
        drops = list(pretrain.draw_drops(student.backbone, micros, args.seed, step, rank))
        found = pretrain.train_step(student, teacher, optimizer, buffers, centers, micros, values, args, batches.batch,
                                    drops)
        stats.append(torch.stack([found[name] for name in SUMMED]))
    moments = {f"moment {i}": state["exp_avg"] for i, state in enumerate(optimizer.state_dict()["state"].values())}
    return {"stats": torch.stack(stats), "dino center": centers[0], "ibot center": centers[1],
            **student.state_dict(), **{f"teacher {key}": value for key, value in teacher.state_dict().items()}, **moments}


def rank_of_two(rank, init, args, result):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    outcome = train(args, rank, 2)
    if rank == 0:
        torch.save(outcome, result)
    dist.barrier()  # gloo can abort where one process leaves while another is still at it
    dist.destroy_process_group()
    os._exit(0)  # as runtime.clear_errors leaves, and why


@pytest.mark.parametrize("centering, tissue", [("centering", []), ("sinkhorn_knopp", []),
                                               ("centering", ["--mask_tissue"]), ("sinkhorn_knopp", ["--mask_tissue"])])
def test_ranks_and_accumulation_do_not_change_the_run(centering, tissue, tmp_path):
    """1 process x 16, 4 micro-batches x 4 and 2 processes x 8 (one without masks at step 1): equal to 1e-5."""
    def arguments(*more):
        return pretrain.get_args([*SMALL, "--centering", centering, *tissue, *more])

    whole = train(arguments("--batch_size_per_gpu", "16"), 0, 1)
    accumulated = train(arguments("--batch_size_per_gpu", "4", "--accum_iter", "4"), 0, 1)
    mp.spawn(rank_of_two, (f"file://{tmp_path}/init", arguments("--batch_size_per_gpu", "8"), tmp_path / "two.pt"), 2)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    if centering == "centering":
        assert whole["dino center"].norm() > 0.01 and whole["ibot center"].norm() > 0.01
    for name, other in (("accumulated", accumulated), ("two ranks", two)):
        assert other.keys() == whole.keys()
        for key in whole:
            error = (other[key] - whole[key]).norm() / whole[key].norm().clamp(min=1e-12)
            assert error < 1e-5, f"{name}: {key} differs by {error:.2e}"


def test_a_different_batch_does_change_the_run():
    """The comparison above can fail: other images, other weights."""
    whole, other = (train(pretrain.get_args([*SMALL, "--batch_size_per_gpu", "16", "--seed", seed]), 0, 1)
                    for seed in ("0", "1"))
    assert (whole["stats"] - other["stats"]).norm() > 1e-3 * whole["stats"].norm()


# ---------------------------------------------------------------- a step that is not finite

@pytest.mark.parametrize("where", ["canvas", "gradient"])
def test_non_finite_step_reaches_nothing(where):
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "4", "--centering", "centering"])  # centers move, too
    student, teacher, buffers, optimizer = networks(args)
    centers = torch.zeros(2, 32, dtype=torch.float64)
    values = dict(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
    batches = data.PretrainBatches(FakePack(), args)

    def step(number, spoil=False):
        micros = pretrain.to_device(batches[number], torch.device("cpu"), args, 0.5, 0.25)
        micros = [{k: v.double() if v.is_floating_point() else v for k, v in micro.items()} for micro in micros]
        if spoil and where == "canvas":
            micros[0]["global_crops"][0, 0, 3, 3] = math.nan
        hook = None
        if spoil and where == "gradient":
            hook = student.backbone.blocks[0].attn.proj.weight.register_hook(lambda grad: grad * math.inf)
        stats = pretrain.train_step(student, teacher, optimizer, buffers, centers, micros, values, args, 4, [None])
        if hook:
            hook.remove()
        return stats

    def state():
        moments = [value.clone() for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
        return [p.clone() for p in (*student.state_dict().values(), *teacher.state_dict().values())] + moments + [centers.clone()]

    assert step(0)["finite"] == 1
    before = state()
    assert step(1, spoil=True)["finite"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, state()))
    assert step(2)["finite"] == 1  # and the gradients did not stay poisoned
    assert any(not torch.equal(a, b) for a, b in zip(before, state())) and all(p.isfinite().all() for p in state())


def test_the_recipes_constants_make_a_run_what_it_is(monkeypatch):
    """A run of other constants is another one; of the same ones it goes on, whatever has become of their flags."""
    args = pretrain.get_args([])
    before = pretrain.identity_of(args, "digest", 32, None)
    assert (before["weight_decay_end"], before["base_lr"], before["init"]) == (0.4, args.base_lr, None)
    assert not {"output_dir", "num_workers", "holdout"} & before.keys()
    for name in ("DINO_WEIGHT", "IBOT_WEIGHT", "WEIGHT_DECAY_END", "WARMUP_TEACHER_TEMP_FRACTION",
                 "FREEZE_LAST_LAYER_FRACTION"):
        with monkeypatch.context() as patch:
            patch.setattr(pretrain, name, 0.123)
            assert pretrain.identity_of(args, "digest", 32, None) != before, name
    assert pretrain.identity_of(args, "digest", 32, None) == before


# ---------------------------------------------------------------- losses

def test_koleo_duplicates_count_but_do_not_blow_up_the_step():
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).double()
    x[:5] = x[0]  # five identical frames
    x.requires_grad_(True)
    loss = losses.koleo_loss(x, torch.arange(16))
    loss.backward()
    assert loss > 3 and x.grad.isfinite().all()  # 5 of 16 rows at log 1e-8
    assert (x.grad[1:5].norm(dim=1) == 0).all() and x.grad.norm() < 1
    assert x.grad[8:].norm() > 1e-3


def test_koleo_ignores_siblings():
    """The nearest row of another group is the neighbour; by brute force."""
    x = torch.nn.functional.normalize(torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3, 4, 4, 4, 4, 5])
    nearest = [min((x[i] - x[j]).norm().item() for j in range(12) if groups[j] != groups[i]) for i in range(12)]
    assert losses.koleo_loss(x, groups).item() == pytest.approx(-np.log(nearest).mean(), rel=1e-4)
    assert losses.koleo_loss(x, torch.zeros(12)) == 0  # nobody has a neighbour


def test_koleo_is_averaged_over_micro_batches():
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "4", "--accum_iter", "4", "--koleo_loss_weight", "0.1"])
    student, teacher, buffers, optimizer = networks(args)
    micros = pretrain.to_device(data.PretrainBatches(FakePack(), args)[0], torch.device("cpu"), args, 0.5, 0.25)
    micros = [{k: v.double() if v.is_floating_point() else v for k, v in micro.items()} for micro in micros]
    with torch.no_grad():
        tokens = [student.backbone.forward_features(m["global_crops"], m["masks"])["x_norm_clstoken"] for m in micros]
        each = [losses.koleo_loss(cls[:4], m["groups"]) + losses.koleo_loss(cls[4:], m["groups"])
                for cls, m in zip(tokens, micros)]
    stats = pretrain.train_step(student, teacher, optimizer, buffers, torch.zeros(2, 32).double(), micros,
                                dict(lr=1e-3, weight_decay=0, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False),
                                args, 16, [None] * 4)
    assert stats["koleo"].item() == pytest.approx(0.1 * torch.stack(each).mean().item(), rel=1e-6)


def test_koleo_is_float32_under_autocast():
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = losses.koleo_loss(x, torch.arange(16))
    assert torch.equal(inside, losses.koleo_loss(x, torch.arange(16)))


def test_target_health_tells_collapse_from_learning():
    prototypes, zero = torch.eye(32, 8), torch.zeros(32)

    def health(features):
        features = features.unflatten(0, (2, -1)).transpose(0, 1)  # (images, crops, 8)
        logits = features @ prototypes.T / 0.01
        return losses.target_health((features, prototypes, zero, torch.logsumexp(logits, 2)), 0.01)

    different = torch.eye(8).repeat(2, 1)  # 8 images, each its own prototype; two crops
    entropy, information = health(different)
    assert entropy < 1e-3 and information == pytest.approx(math.log(8), abs=1e-3)
    entropy, information = health(different[:1].repeat(16, 1))  # collapsed onto one prototype
    assert entropy < 1e-3 and information == pytest.approx(0, abs=1e-3)
    entropy, information = health(torch.zeros(16, 8))  # uniform: nothing learned
    assert entropy == pytest.approx(math.log(32), abs=1e-3) and information == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("more", [["--separate_head"], ["--local_crops_number", "0"], ["--drop_path_rate", "0.5"],
                                  ["--mask_sample_probability", "0"], ["--dtype", "bfloat16"], ["--mask_tissue"],
                                  ["--flip", "horizontal"]])
def test_variants_train(more):
    """Each option runs a step with finite gradients in every parameter it should reach."""
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "4", "--koleo_loss_weight", "0.1", *more])
    student = pretrain.Network(dict(embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=4, in_chans=1,
                                    num_register_tokens=2, init_values=0.5, drop_path_rate=args.drop_path_rate), args)
    teacher = copy.deepcopy(student).requires_grad_(False)
    buffers = runtime.flatten_parameters(student), runtime.flatten_parameters(teacher)
    optimizer = torch.optim.AdamW(parameter_groups(student, 0.9), lr=0.0, fused=True)
    before = {name: p.clone() for name, p in student.named_parameters()}
    batches = data.PretrainBatches(FakePack(), args)
    centers = torch.zeros(2, 32)
    for number in range(2):
        micros = pretrain.to_device(batches[number], torch.device("cpu"), args, 0.5, 0.25)
        drops = list(pretrain.draw_drops(student.backbone, micros, 0, number, 0))
        stats = pretrain.train_step(student, teacher, optimizer, buffers, centers, micros,
                                    dict(lr=1e-3, weight_decay=0, momentum=0.9, teacher_temp=0.05,
                                         freeze_last_layer=False), args, 4, drops)
        assert stats["finite"] == 1
    still = {name for name, p in student.named_parameters() if torch.equal(p, before[name])}
    unmasked = "--mask_sample_probability" in more
    assert still == ({"backbone.mask_token"} if unmasked else set())


# ---------------------------------------------------------------- masked patches without tissue

def tissue_micro(args, black):
    batches = data.PretrainBatches(FakePack(black=black), args)
    return pretrain.to_device(batches[0], torch.device("cpu"), args, 0.5, 0.25)[0]


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_patches_without_tissue_are_no_rows_of_the_targets(centering):
    """Center, Sinkhorn-Knopp and loss are those of a batch in which only the masked patches with tissue exist."""
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "16", "--mask_tissue", "--centering", centering])
    student, teacher = pretrain.build_networks(args, torch.device("cpu"))
    micro = tissue_micro(args, black=14)
    counted = micro["mask_weight"] > 0
    masked = micro["masks"].sum()
    assert 0.2 * masked < counted.sum() < 0.8 * masked
    alone = dict(micro, mask_indices=micro["mask_indices"][counted], mask_weight=micro["mask_weight"][counted])
    everyone = dict(micro, mask_weight=(torch.arange(len(counted)) < masked).float())
    centers = torch.randn(2, 32, generator=torch.Generator().manual_seed(0)) / 10

    def outcome(micro):
        (class_rows, patch_rows), new = losses.teacher_targets(teacher, [micro], centers, 0.05, centering)
        (_, _, a, r), = patch_rows
        terms, _ = losses.student_losses(student, micro, class_rows[0], patch_rows[0], 0.05, 16)
        return a, r, new[1], terms

    a, r, center, terms = outcome(micro)
    assert (r[~counted] == math.inf).all()
    for ours, want in zip((a, r[counted], center, terms), outcome(alone)):
        assert torch.allclose(ours, want, rtol=1e-5, atol=1e-6)
    other = outcome(everyone)  # with all masked patches it is another batch
    assert not torch.allclose(center, other[2], atol=1e-4) or not torch.allclose(a, other[0], atol=1e-3)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_black_frames_train(centering):
    """No masked patch shows tissue: no iBOT loss, its center stays, everything is finite."""
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "4", "--mask_tissue", "--centering", centering])
    student, teacher, buffers, optimizer = networks(args)
    micro = {k: v.double() if v.is_floating_point() else v for k, v in tissue_micro(args, black=24).items()}
    centers = torch.ones(2, 32).double()
    values = dict(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False)
    stats = pretrain.train_step(student, teacher, optimizer, buffers, centers, [micro], values, args, 4, [None])
    assert all(value.isfinite() for value in stats.values()) and stats["finite"] == 1
    assert stats["ibot"] == 0 and stats["dino_local"] > 0 and stats["tissue"] == 0
    assert (centers[1] == 1).all()
    assert all(p.isfinite().all() for p in student.parameters())


def test_frozen_last_layer_and_ema():
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "4"])
    student, teacher, buffers, optimizer = networks(args)
    start = {name: p.clone() for name, p in student.named_parameters()}
    micros = pretrain.to_device(data.PretrainBatches(FakePack(), args)[0], torch.device("cpu"), args, 0.5, 0.25)
    micros = [{k: v.double() if v.is_floating_point() else v for k, v in micro.items()} for micro in micros]
    pretrain.train_step(student, teacher, optimizer, buffers, torch.zeros(2, 32).double(), micros,
                        dict(lr=1e-3, weight_decay=0.1, momentum=0.9, teacher_temp=0.05, freeze_last_layer=True), args,
                        4, [None])
    teacher_weights = dict(teacher.named_parameters())
    for name, p in student.named_parameters():
        assert torch.equal(p, start[name]) == ("last_layer" in name), name
        assert torch.allclose(teacher_weights[name], 0.9 * start[name] + 0.1 * p, rtol=0, atol=1e-9), name  # float32 (1 - m)


def test_half_precision_stays_where_it_belongs():
    """Under bf16 the center's mean logit is float32's, and backward runs outside autocast, which would round it."""
    args = pretrain.get_args([*SMALL, "--batch_size_per_gpu", "4", "--dtype", "bfloat16", "--centering", "centering"])
    student, teacher = pretrain.build_networks(args, torch.device("cpu"))
    buffers, centers, optimizer = pretrain.build_state(student, teacher, args)
    micros = data.to_device(data.PretrainBatches(FakePack(), args)[0], torch.device("cpu"), args, 0.5, 0.25)
    with torch.autocast("cpu", torch.bfloat16):
        (class_rows, patch_rows), new_centers = losses.teacher_targets(teacher, micros, centers, 0.05, "centering",
                                                                         torch.bfloat16)
    valid = micros[0]["mask_weight"] > 0
    for center, (features, prototypes, _, r), real in zip(new_centers, (class_rows[0], patch_rows[0]), (slice(None), valid)):
        want = 0.1 * (features[real].flatten(0, 1).double() @ prototypes.double().T).mean(0)
        assert (center - want).norm() < 1e-6 * want.norm()
    assert (patch_rows[0][3][~valid] == math.inf).all() and patch_rows[0][3][valid].isfinite().all() and not valid.all()
    seen = []
    student.backbone.pos_embed.register_hook(lambda grad: seen.append(torch.is_autocast_enabled("cpu")))
    pretrain.train_step(student, teacher, optimizer, buffers, centers, micros,
                        dict(lr=1e-3, weight_decay=0, momentum=0.9, teacher_temp=0.05, freeze_last_layer=False,
                             freeze_backbone=False), args, 4, [None])
    assert seen == [False]
