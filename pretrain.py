"""Pretrain a vision transformer on a folder of unlabelled ultrasound frames: DINOv2 with UltraDINO's recipe.

A student sees two global and several local crops of an image and learns to predict, through K prototypes, what a
teacher (its own running average) says of the other crop (DINO) and of patches hidden from it (iBOT); KoLeo spreads
the images apart. UltraDINO: arXiv 2506.19552; DINOv2: arXiv 2304.07193. Writes last.pt and log.jsonl.

    python pretrain.py                                                  # phantom images, minutes on a CPU
    python pretrain.py --data FOLDER                                    # one GPU
    torchrun --nproc_per_node 8 pretrain.py --data FOLDER               # eight
    python pretrain.py --data FOLDER --init FILE                        # go on from DINOv2, DINOv3, another last.pt ...
"""

import argparse
import copy
import math
import os
import signal
import time
import traceback

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import kernels
import pack
import runtime
from arguments import Parser, in_words
from data import PretrainBatches, to_device
from kernels import all_reduce
from losses import Network, draw_drops, student_losses, target_health, teacher_targets
from model import DINOV3, SIZES
from networks.weights import grey_backbone, load_strict, merge_seen
from runtime import parameter_groups

# DINOv2's constants that nobody tunes (its ssl_default_config)
FINAL_MOMENTUM, MIN_LR, ADAM_BETAS = 1.0, 1e-6, (0.9, 0.999)
DINO_WEIGHT, IBOT_WEIGHT = 1.0, 1.0  # of the losses
WEIGHT_DECAY_END = 0.4
WARMUP_TEACHER_TEMP_FRACTION, FREEZE_LAST_LAYER_FRACTION = 0.3, 0.01  # shares of the run
ROPE_RESCALE = 2.0  # DINOv3's
LR_BATCH = 1024  # the learning rate is base_lr * sqrt(batch / LR_BATCH)
PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED = 12_000, 64, 0

# The recipe is UltraDINO's; `cpu` is a small one that learns something of phantom images in minutes on two cores.
PRESETS = {
    "ultradino": {},
    "cpu": dict(
        arch="vit_micro", patch_size=8, layerscale=0.3, init_std=0.08, drop_path_rate=0.0, head_n_prototypes=256,
        head_hidden_dim=256, head_bottleneck_dim=32, global_crops_size=48, global_crops_scale=[0.5, 1.0],
        local_crops_number=2, local_crops_size=32, local_crops_scale=[0.25, 0.6], centering="sinkhorn_knopp",
        warmup_teacher_temp=0.02, teacher_temp=0.02, momentum_teacher=0.9, layerwise_decay=1.0, base_lr=5e-3,
        batch_size_per_gpu=32, total_samples=30_000, dtype="float32", num_workers=1, save_every=200, log_every=25),
}
# What --init adds to a preset: fresh heads tell a trained backbone nothing at first, and the rate of a run from scratch
# can undo it (a user's released ViT-L: k-NN from 80 to 10 % in 20,000 images, warm heads; facebookresearch/dinov2#204).
INIT = {"ultradino": dict(freeze_backbone_fraction=0.05, base_lr=1e-3, momentum_teacher=0.996, drop_path_rate=0.1),
        "cpu": dict(freeze_backbone_fraction=0.05, base_lr=1.25e-3, momentum_teacher=0.98)}
FROM_FILE = ("arch", "pos", "patch_size", "num_register_tokens", "layerscale", "init_std")  # no flags beside --init
WORKER_GONE = (ConnectionResetError, ConnectionRefusedError, EOFError)  # instead of torch's own message
CROP_SIZES = ("global_crops_size", "local_crops_size")
# May differ between a run and its resumption. The data count by their digest, the batch by its total.
PATHS = {"data", "exclude", "holdout", "group_regex", "output_dir", "init"}  # can name patients: not in last.pt
NOT_RECIPE = PATHS | {*pack.OPTIONS, "num_workers", "log_every", "save_every", "reference_ops", "preset",
                      "batch_size_per_gpu", "accum_iter", "compile", "checkpoint_activations"}


def get_args(argv=None):
    p = Parser(__doc__.split("\n")[0], epilog="Defaults are those of --preset ultradino. "
               f"cpu has {in_words(PRESETS['cpu'])}. --init adds {in_words(INIT['ultradino'])}; "
               f"with cpu {in_words(INIT['cpu'])}.")
    flag = dict(action=argparse.BooleanOptionalAction, default=False)
    add = p.add_argument_group("recipe").add_argument
    add("--preset", choices=PRESETS, help="ultradino with a GPU and --data, else cpu, a small one")
    add("--init", metavar="FILE", help="go on from this backbone, with fresh heads; needed to resume, too")
    data = p.add_argument_group("data")
    data.add_argument("--data", nargs="+", help="folders, text or CSV lists, or a pack; without it phantom images")
    pack.add_arguments(data)
    add = data.add_argument
    add("--output_dir", default=".", help="where last.pt, log.jsonl and a new pack go")
    add("--num_workers", type=int, default=4, help="processes that read the pack, per GPU")
    add = p.add_argument_group("model").add_argument
    add("--arch", choices=SIZES, default="vit_small", help="size of the transformer")
    add("--pos", choices=("learned", "rope"), default="learned", help="positions: DINOv2's or DINOv3's")
    add("--rope_rescale", type=float, default=ROPE_RESCALE, help="--pos rope: most stretching; 1 is none")
    add("--patch_size", type=int, default=16, help="pixels; crop sizes must be multiples of it")
    add("--num_register_tokens", type=int, default=4, help="extra tokens without a position")
    add("--layerscale", type=float, default=1e-5, help="initial LayerScale; larger learns faster when small")
    add("--init_std", type=float, default=0.02,
        help="of linear layers; narrow networks start faster near width ** -0.5")
    add("--drop_path_rate", type=float, default=0.3, help="share of images each student block skips")
    add("--head_n_prototypes", type=int, default=65536, help="K; fewer for small data or small batches")
    add("--head_hidden_dim", type=int, default=2048, help="width of the projection head")
    add("--head_bottleneck_dim", type=int, default=256, help="width before the prototypes")
    add("--separate_head", **flag, help="patches get a head of their own (DINOv2's long recipe)")
    add = p.add_argument_group("crops and masks").add_argument
    add("--global_crops_size", type=int, default=224, help="pixels")
    add("--global_crops_scale", type=float, nargs=2, default=[0.32, 1.0], help="share of the image's area")
    add("--local_crops_number", type=int, default=8, help="local crops per image")
    add("--local_crops_size", type=int, default=96, help="pixels")
    add("--local_crops_scale", type=float, nargs=2, default=[0.05, 0.32], help="share of the image's area")
    add("--flip", choices=("vertical", "horizontal", "none"), default="vertical",
        help="of half the crops: vertical is UltraDINO's, horizontal is what turning a probe does")
    add("--blur_compat", action=argparse.BooleanOptionalAction, default=True,
        help="blur crops as DINOv2's released code does (probabilities 0, 0.9, 0.5), not as written "
        "(1, 0.1, 0.5)")
    add("--mask_sample_probability", type=float, default=0.5, help="share of global crops that are masked")
    add("--mask_ratio_min_max", type=float, nargs=2, default=[0.1, 0.5], help="share of patches masked in them")
    add("--mask_tissue", **flag, help="masked patches that are black count in no iBOT loss or target")
    add = p.add_argument_group("losses").add_argument
    add("--centering", choices=("centering", "sinkhorn_knopp"), default="centering",
        help="how teacher targets are balanced; sinkhorn_knopp is steadier with small batches")
    add("--teacher_temp", type=float, default=0.07, help="sharpness of the targets after the warm-up")
    add("--warmup_teacher_temp", type=float, default=0.04, help="the same at the start")
    add("--koleo_loss_weight", type=float, default=0.1, help="weight of the spreading loss")
    add = p.add_argument_group("optimisation").add_argument
    add("--total_samples", type=int, default=256_000_000, help="budget in images seen, over all GPUs")
    add("--batch_size_per_gpu", type=int, default=128, help="images per GPU and micro-batch")
    add("--accum_iter", type=int, default=1, help="micro-batches per step; equals a larger batch, but for KoLeo")
    add("--base_lr", type=float, default=4e-3, help="learning rate at a batch of 1024; scales as its square root")
    add("--warmup_fraction", type=float, default=0.1, help="learning-rate warm-up, share of the run")
    add("--weight_decay", type=float, default=0.04, help="at the start")
    add("--momentum_teacher", type=float, default=0.992, help="of the teacher's average; rises to 1")
    add("--layerwise_decay", type=float, default=0.9, help="learning-rate factor per block towards the input")
    add("--freeze_backbone_fraction", type=float, default=0.0, help="only heads learn, share of the run; for --init")
    add("--clip_grad", type=float, default=3.0, help="largest gradient norm, for backbone and heads apart")
    add = p.add_argument_group("the run").add_argument
    add("--seed", type=int, default=0, help="of everything random")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of matrix products")
    add("--compile", **flag, help="torch.compile the blocks: fewer passes over memory, after minutes of compiling")
    add("--checkpoint_activations", **flag,
        help="compute each block twice instead of remembering it: less memory, slower")
    add("--save_every", type=int, default=1000, help="steps between checkpoints")
    add("--log_every", type=int, default=20, help="steps between log lines")
    add("--reference_ops", **flag, help="plain torch instead of the Triton kernels, to compare the two")

    def preset(args):
        name = args.preset or ("ultradino" if torch.cuda.is_available() and args.data else "cpu")
        return {**PRESETS[name], **(INIT[name] if args.init else {}), "preset": name}

    args, given = p.parse(argv, preset)
    if args.init:
        if decided := [f"--{name}" for name in FROM_FILE if name in given]:
            p.error(f"{', '.join(decided)} beside --init: the file decides; leave it out")
        if args.init.startswith("timm:"):
            p.error(f"--init {args.init}: training goes on in this project's own transformer only; name a file")
        args.fit_crops = [name for name in CROP_SIZES if name not in given]  # until open_init knows the patch size
    check_args(p, args)
    return args


def check_args(p, args):
    pack.check_arguments(p, args)
    if not args.init:
        check_crops(args, "--patch_size")
        check_rescale(args)
    p.check(args, dict(batch_size_per_gpu=1, accum_iter=1, total_samples=1, save_every=1, log_every=1, seed=0,
                       head_n_prototypes=2, local_crops_number=0, num_workers=0, num_register_tokens=0, rope_rescale=1),
            shares=("drop_path_rate",),
            positive=("teacher_temp", "warmup_teacher_temp", "clip_grad", "base_lr", "init_std"))
    for name in ("mask_sample_probability", "warmup_fraction", "freeze_backbone_fraction", "momentum_teacher"):
        if not 0 <= getattr(args, name) <= 1:
            p.error(f"--{name} is a share from 0 to 1, not {getattr(args, name)}")
    for name in ("global_crops_scale", "local_crops_scale", "mask_ratio_min_max"):
        low, high = getattr(args, name)
        if not 0 <= low <= high <= 1:
            p.error(f"--{name} {low} {high}: two shares, the smaller first, between 0 and 1")


def check_crops(args, whose):
    for name in CROP_SIZES:
        if getattr(args, name) % args.patch_size:
            raise ValueError(f"--{name} {getattr(args, name)} is not a multiple of {whose} {args.patch_size}")


def check_rescale(args):
    if args.pos == "learned" and args.rope_rescale != ROPE_RESCALE:
        raise ValueError(f"--rope_rescale {args.rope_rescale} is for --pos rope, positions here are learned: leave it "
                         f"out")


# ---------------------------------------------------------------- networks

def open_init(args, mean=None, std=None):
    """weights.grey_backbone of --init; sets the arguments that the file decides, in info["config"] the run's own."""
    backbone, info = grey_backbone(args.init, mean, std)
    plain = dict(mlp_ratio=4.0, ffn_layer="mlp")  # where nothing else is said
    named = [name for name, size in SIZES.items() if {**plain, **size}.items() <= {**plain, **info["config"]}.items()]
    args.arch = named[0] if named else f"width {backbone.embed_dim}, depth {len(backbone.blocks)}"
    args.patch_size, args.num_register_tokens = backbone.patch_size, backbone.num_register_tokens
    args.layerscale, args.pos = info["config"].get("init_values"), info["config"].get("pos", "learned")
    check_rescale(args)
    for name in vars(args).pop("fit_crops", ()):
        setattr(args, name, max(1, round(getattr(args, name) / args.patch_size)) * args.patch_size)
    check_crops(args, f"the patch size of --init {args.init},")
    info["config"].update(img_size=args.global_crops_size, drop_path_rate=args.drop_path_rate)
    return backbone, info


def backbone_config(args):
    return dict(SIZES[args.arch], img_size=args.global_crops_size, patch_size=args.patch_size, in_chans=1,
                num_register_tokens=args.num_register_tokens, drop_path_rate=args.drop_path_rate,
                init_values=args.layerscale, init_std=args.init_std, **(DINOV3 if args.pos == "rope" else {}))


def build_networks(args, device, start=None):
    torch.manual_seed(args.seed)
    student = Network(start[1]["config"] if start else backbone_config(args), args)
    if start:
        state, side = start[0].state_dict(), args.global_crops_size // args.patch_size
        if "pos_embed" in state:  # at the size of global crops, interpolated as the file's own family does
            state["pos_embed"] = start[0].positions((side, side)).detach()
        load_strict(student.backbone, state, args.init)
    student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.backbone.checkpoint_activations = args.checkpoint_activations
    if args.compile:
        student.backbone.compile_blocks()
        teacher.backbone.compile_blocks()
    return student, teacher


def build_state(student, teacher, args):
    """What a step changes beside: flat buffers of both networks, centers of class and patch rows, optimizer."""
    buffers = runtime.flatten_parameters(student), runtime.flatten_parameters(teacher)
    centers = torch.zeros(2, args.head_n_prototypes, device=buffers[0][0][0].device)
    optimizer = torch.optim.AdamW(optimizer_groups(student, args.layerwise_decay), lr=0.0, betas=ADAM_BETAS, fused=True)
    return buffers, centers, optimizer


def optimizer_groups(student, layerwise_decay):
    """parameter_groups, each split into backbone, which --freeze_backbone_fraction holds, and heads."""
    backbone = {*student.backbone.parameters()}
    return [{**group, "params": own, "is_backbone": where} for group in parameter_groups(student, layerwise_decay)
            for where in (True, False) if (own := [p for p in group["params"] if (p in backbone) == where])]


# ---------------------------------------------------------------- one step

def train_step(student, teacher, optimizer, buffers, centers, micros, values, args, batch, draws, stop=False):
    """One optimizer step over a list of micro-batches; nothing here waits for the device.

    buffers: (student's, teacher's) flatten_parameters. values: this step's schedules. centers (2, K), changed in place.
    Returns {name: number on the device}: the four weighted terms, entropy and information of targets, gradient norms
    of backbone and heads, `finite` (0: nothing was changed), ranks that want to `stop`; with --mask_tissue the share of
    masked patches that show `tissue`.
    """
    dtype, temp, terms, student_buffers = getattr(torch, args.dtype), values["teacher_temp"], [], buffers[0]
    cast = runtime.autocast(centers.device, args.dtype)
    weights = DINO_WEIGHT, IBOT_WEIGHT, args.koleo_loss_weight * args.batch_size_per_gpu / batch
    with cast:
        targets, new_centers = teacher_targets(teacher, micros, centers, temp, args.centering, dtype)
    for micro, *target, draw in zip(micros, *targets, draws):
        with cast:
            losses, local = student_losses(student, micro, *target, temp, batch, draw, dtype)
        dino, ibot, koleo = (weight * loss for weight, loss in zip(weights, losses))
        (dino + ibot + koleo).backward()  # outside autocast: what was kept in float32 stays there
        terms.append(torch.stack((weights[0] * local, dino - weights[0] * local, ibot, koleo)).detach())
    health = dict(zip(("target_entropy", "target_information"), target_health(targets[0][0], temp)))
    if args.mask_tissue:
        health["tissue"] = torch.stack([micro["tissue"] for micro in micros]).mean()

    sums = dict(zip(("dino_local", "dino_global", "ibot", "koleo"), torch.stack(terms).sum(0)))
    for name, value in health.items():  # means of a rank's images
        sums[name] = value * len(micros) * args.batch_size_per_gpu / batch
    sums["stop"] = centers.new_full((), float(stop))
    summed = all_reduce(torch.stack(list(sums.values())))
    stats = dict(zip(sums, summed))
    norms = torch.stack([all_reduce(grads).norm() for _, grads in student_buffers])
    finite = (norms.isfinite().all() & summed.isfinite().all()).float()
    for (_, grads), norm in zip(student_buffers, norms):
        grads.mul_((args.clip_grad / (norm + 1e-6)).clamp(max=1))
    for group in optimizer.param_groups:
        frozen = (group["is_last_layer"] and values["freeze_last_layer"]
                  or group.get("is_backbone") and values["freeze_backbone"])
        group["lr"] = 0.0 if frozen else values["lr"] * group["lr_multiplier"]
        group["weight_decay"] = values["weight_decay"] * group["wd_multiplier"]
    optimizer.found_inf, optimizer.grad_scale = 1 - finite, None  # fused AdamW skips the step where found_inf is 1
    optimizer.step()
    for (student_flat, grads), (teacher_flat, _) in zip(*buffers):
        teacher_flat.lerp_(student_flat, (1 - values["momentum"]) * finite)
        grads.zero_()
    centers.copy_(torch.where(finite > 0, new_centers, centers))
    return {**stats, "grad_norm_backbone": norms[0], "grad_norm_heads": norms[1:].max(), "finite": finite}


def schedules(args, steps, batch):
    """Every value that changes over the run: dict of arrays (steps,)."""
    warmup, temp_warmup, last_layer, backbone = (int(share * steps) for share in (
        args.warmup_fraction, WARMUP_TEACHER_TEMP_FRACTION, FREEZE_LAST_LAYER_FRACTION, args.freeze_backbone_fraction))
    return {
        "lr": runtime.cosine_schedule(args.base_lr * math.sqrt(batch / LR_BATCH), MIN_LR, steps, warmup),
        "weight_decay": runtime.cosine_schedule(args.weight_decay, WEIGHT_DECAY_END, steps),
        "momentum": runtime.cosine_schedule(args.momentum_teacher, FINAL_MOMENTUM, steps),
        "teacher_temp": runtime.linear_then_constant(args.warmup_teacher_temp, args.teacher_temp, steps, temp_warmup),
        "freeze_last_layer": np.arange(steps) < last_layer,
        "freeze_backbone": np.arange(steps) < backbone,
    }


# ---------------------------------------------------------------- the run

def open_data(args):
    """The pack to train on, made first, once, if --data is a folder or a list or absent."""
    name = os.path.basename(os.path.abspath(args.data[0])) if args.data else "phantoms"
    folder = os.path.join(args.output_dir, f"{name}.pack")
    if not args.data:
        return pack.open_phantoms(folder, PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED, runtime.is_first_on_machine())
    return pack.open_pack(args.data, folder, runtime.is_first_on_machine(), **pack.options(args))


def identity_of(args, data, batch, init):
    """What must be equal for a run to go on: recipe, its constants too, digests of data and --init, the batch."""
    recipe = {key: value for key, value in vars(args).items() if key not in NOT_RECIPE}
    return {**recipe, "data": data, "batch": batch, "init": init, "dino_loss_weight": DINO_WEIGHT,
            "ibot_loss_weight": IBOT_WEIGHT, "weight_decay_end": WEIGHT_DECAY_END,
            "warmup_teacher_temp_fraction": WARMUP_TEACHER_TEMP_FRACTION,
            "freeze_last_layer_fraction": FREEZE_LAST_LAYER_FRACTION}


def checkpoint_of(student, teacher, optimizer, centers, step, constant):
    """What last.pt holds: tensors and plain values only, and no file names (they can be patients' names)."""
    return {"teacher": runtime.cpu_copy(teacher.state_dict()), "student": runtime.cpu_copy(student.state_dict()),
            "optimizer": optimizer.state_dict(), "centers": centers.cpu(), "step": step,
            "samples": step * constant["identity"]["batch"], **constant}


def read_stats(pending, batches, data):
    """Wait for a step's stats on the host; a non-finite one ends the run, naming the terms and the batch's files."""
    step, names, stats, copied = pending
    if copied:
        copied.synchronize()
    values = dict(zip(names, stats.tolist()))
    if not values["finite"]:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items() if name not in ("finite", "stop"))
        raise ValueError(f"step {step} is not finite ({terms}): its update was not applied and the last checkpoint is "
                         f"unharmed. Its images: {', '.join(data.names(batches.indices(step)))}")
    return values


def show_start(args, network, start, data, steps, batch, schedule, device, world_size):
    runtime.show_run(args, device, world_size)
    if start:
        kept = ", ".join(f"{name} {getattr(args, name)}" for name in {**INIT["ultradino"], **INIT["cpu"]})
        print(f"from {start[1]['family']}: {args.arch}, patch {args.patch_size}, sha256 {start[1]['digest'][:12]}, "
              f"with fresh heads; what keeps them from undoing it: {kept}")
    print(f"{kernels.mode(device)} | {args.arch}: {sum(p.numel() for p in network.backbone.parameters()):,} parameters "
          f"in the backbone | {len(data):,} images, {data.info['groups']:,} groups by {data.info['grouped_by']} | "
          f"mean {data.mean:.4f} std {data.std:.4f}")
    print(f"{steps:,} steps of {batch} images = {steps * batch:,} ({steps * batch / len(data):.1f} epochs) | "
          f"lr {schedule['lr'].max():.3g} | log K = {math.log(args.head_n_prototypes):.3f}: a dino loss that stays "
          f"there has learned nothing", flush=True)


def main(args):
    # ---- setup ----
    if args.init:
        open_init(args)  # first: it sets crop sizes, and whatever is wrong with the file shows before hours of packing
    os.makedirs(args.output_dir, exist_ok=True)
    data = open_data(args)  # before the process group: packing takes longer than a collective waits
    start = open_init(args, data.mean, data.std) if args.init else None
    received = runtime.stop_on_signals()
    rank, world_size, device = runtime.setup()
    is_main = rank == 0
    kernels.use_reference(args.reference_ops)
    batch = args.batch_size_per_gpu * args.accum_iter * world_size
    steps = max(1, round(args.total_samples / batch))
    schedule = schedules(args, steps, batch)

    # ---- networks ----
    student, teacher = build_networks(args, device, start)
    buffers, centers, optimizer = build_state(student, teacher, args)

    # ---- resume ----
    path, log_path = (os.path.join(args.output_dir, name) for name in ("last.pt", "log.jsonl"))
    identity = identity_of(args, data.info["digest"], batch, start and start[1]["digest"])
    constant = {"config": start[1]["config"] if start else backbone_config(args), "mean": data.mean, "std": data.std,
                "args": {key: value for key, value in vars(args).items() if key not in PATHS}, "identity": identity,
                "seen": merge_seen(data.digests(), start and start[1]["seen"]), "commit": runtime.git_commit(),
                "torch": str(torch.__version__)}
    checkpoint, first = runtime.resume(path, log_path, identity, is_main), 0
    if checkpoint:
        for state, saved in ((student, "student"), (teacher, "teacher"), (optimizer, "optimizer")):
            state.load_state_dict(checkpoint[saved])
        centers.copy_(checkpoint["centers"])
        first = checkpoint["step"]
    if first >= steps:
        if is_main:
            print(f"{path} is finished: {steps} of {steps} steps. Score it: python fewshot.py --ckpt {path} --shots 5; "
                  f"train anew in another --output_dir")
        if world_size > 1:
            dist.destroy_process_group()
        return
    if is_main:
        show_start(args, student, start, data, steps, batch, schedule, device, world_size)

    # ---- data ----
    batches = PretrainBatches(data, args, rank, world_size)
    loader = batches.loader(range(first, steps), args.num_workers, pin_memory=device.type == "cuda",
                            worker_init_fn=runtime.ignore_signals)

    # ---- loop ----
    bar = tqdm(total=steps, initial=first, unit="step", disable=None if is_main else True, dynamic_ncols=True)
    pending, seen, waited, since = None, 0, 0.0, time.monotonic()
    for step in range(first, steps):
        asked = time.monotonic()
        loaded = next(loader)
        waited += time.monotonic() - asked
        micros = to_device(loaded, device, args, data.mean, data.std)
        values = {name: array[step].item() for name, array in schedule.items()}
        draws = list(draw_drops(student.backbone, micros, args.seed, step, rank, args.rope_rescale))
        stats = train_step(student, teacher, optimizer, buffers, centers, micros, values, args, batch, draws,
                           bool(received))
        previous, pending = pending, (step, list(stats), *runtime.host_copy(torch.stack(list(stats.values()))))
        stop = previous is not None and read_stats(previous, batches, data)["stop"] > 0  # one step late: no waiting
        done, last, seen = step + 1, step + 1 == steps, seen + batch
        bar.update()
        if done % args.log_every == 0 or done == first + 1 or last or stop:
            record, seconds = read_stats(pending, batches, data), time.monotonic() - since
            if is_main:
                log_step(log_path, bar, done, steps, batch, record, values, seen / seconds, waited / seconds)
            seen, waited, since = 0, 0.0, time.monotonic()
        if done % args.save_every == 0 or last or stop:
            read_stats(pending, batches, data)  # nothing that is not finite is ever saved
            if is_main:
                runtime.save_checkpoint(path, checkpoint_of(student, teacher, optimizer, centers, done, constant))
        if stop:
            break
    bar.close()
    if is_main:
        print(f"saved {path} at step {done} of {steps}"
              + (f"; score it: python fewshot.py --ckpt {path} --shots 5" if last else "; the same command goes on"))
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def log_step(log_path, bar, step, steps, batch, record, values, images_per_s, waiting):
    dino = record["dino_local"] + record["dino_global"]
    record = dict(step=step, samples=step * batch, loss=dino + record["ibot"] + record["koleo"], dino=dino, **record,
                  **{name: values[name] for name in ("lr", "weight_decay", "momentum", "teacher_temp")},
                  images_per_s=images_per_s, data_wait=waiting, hours_left=(steps - step) * batch / images_per_s / 3600)
    runtime.log_line(log_path, bar, record, (
        f"step {step:06d}/{steps} ({100 * step / steps:.1f}%) | loss {record['loss']:.3f} | dino {dino:.3f} "
        f"ibot {record['ibot']:.3f} koleo {record['koleo']:.3f} | targets: entropy {record['target_entropy']:.2f} "
        f"info {record['target_information']:.2f} | lr {values['lr']:.1e} | {images_per_s:.0f} img/s | "
        f"wait {100 * waiting:.0f}% | {record['hours_left']:.2f} h left"))


if __name__ == "__main__":
    with runtime.clear_errors():
        try:
            main(get_args())
        except BaseException as error:
            if hasattr(signal, "SIGCHLD"):  # torch's handler raises wherever it interrupts, here in somebody's __del__
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            traceback.clear_frames(error.__traceback__)  # ends the data workers: no exit waits for them in vain
            # raised anywhere, by a signal handler of torch's; or by what was reading from the worker as it died
            if str(error).startswith("DataLoader worker (pid") or isinstance(error, WORKER_GONE):
                raise ChildProcessError(f"a data worker died ({str(error).strip()}): out of memory or of shared memory "
                                        f"(/dev/shm)? try fewer --num_workers; the last checkpoint is unharmed")
            raise
