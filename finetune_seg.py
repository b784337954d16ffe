"""Segmentation: train a decoder on several backbones, with all or few labelled images, and compare them in one table.

Each model sees the same images, splits and budget, is chosen by validation Dice, and is scored once on the test groups,
at each image's own size, in millimetres where they are known: means over runs with 95 % intervals, and paired tests
against the first one. After UltraDINO, sections on FASS and JNU-IFM.

    python finetune_seg.py                                                    # last.pt and from scratch, on phantoms
    python finetune_seg.py --data HC18 --ckpt last.pt none dinov2_vits14_reg4_pretrain.pth --seeds 3
    torchrun --nproc_per_node 8 finetune_seg.py --data FASS --ckpt last.pt none
    python finetune_seg.py --data FASS --ckpt last.pt none --shots 20 --split_seed 0 1 2 3 4 --predictions nnunet=DIR
"""

import argparse
import os

import numpy as np
import torch
from PIL import Image

import runtime
from arguments import add_run, by_data, stage_parser
from kernels import all_reduce
from labelled.mask_sets import PHANTOM_SIZE, class_shares, digest_of, draw_shots, open_data
from model import SIZES
from networks.baselines import (DEFAULT_SIZE, add_arguments, check_names, common_network, default_models,
                                full_layerscale, list_models, named_files, open_runs)
from networks.weights import trained_weights
from scores.exchange import read_predicted_masks
from scores.mask_report import circumference_table, compare_masks, mask_class_table
from scores.plots import best_median_worst, overlay_png
from scores.report import (check_output, count, counts_line, files_of, find_copies, latex, methods_text, report_lines,
                           slug, write_json, write_split, write_text)
from training import segmenter
from training.segmenter import digest_of_scores, mask_path, own_circumference, score_files, score_network, stack

SCRIPT = "finetune_seg.py"
PRESETS = {  # the recipe is UltraDINO's; `cpu` is one for phantoms and minutes on two cores
    "ultradino": {},
    "cpu": dict(arch="vit_micro", iters=300, warmup_iters=30, val_every=50, save_every=50, batch_size=16, lr=2e-3,
                layer_decay=0.9, drop_path_rate=0.0, channels=32),
}
# may differ between a run and its resumption; what the images and checkpoints are is checked by their digests
NOT_RECIPE = {"data", "masks", "mask_pattern", "classes", "exclude", "group_regex", "split", "pixel_sizes", "shots",
              "shots_by", "split_seed", "ckpt", "predictions", "seeds", "output_dir", "latex", "save_every", "preset",
              "eval_batch_size", "tolerance"}


def get_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    flag = dict(action=argparse.BooleanOptionalAction, default=False)
    add = p.add_argument_group("data").add_argument
    add("--data", help="images and masks: two folders, side by side, .mha, FASS, JNU-IFM or HC18 as "
        "downloaded; without it phantom planes")
    add("--masks", metavar="FOLDER", help="of the masks, where --data holds the images alone")
    add("--mask_pattern", help="of a mask's name, e.g. '{}_mask*.png', {} being its image's without suffix")
    add("--classes", nargs="+", metavar="NAME=VALUE",
        help="head=8 symphysis=7, tumour=255, vein=#ff0000, or names of 1, 2, ...")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out names that match")
    add("--group_regex", help="first capture in an image's name is its patient, clip or examination")
    add("--split", metavar="FILE.csv", help="image,split[,group]: which image is for what; others are left out")
    add("--pixel_sizes", metavar="FILE.csv", help="image,mm: width of a pixel, or image,mm_x,mm_y, for scores in mm")
    add("--val_fraction", type=float, default=0.2, help="share of train groups kept for validation if none is named")
    add("--test_fraction", type=float, default=0.2, help="share of all groups kept for the test if none is named")
    add("--test_seed", type=int, default=0, help="of groups drawn for validation and test where the data name none")
    add = p.add_argument_group("few shots").add_argument
    add("--shots", type=int, metavar="N", help="train on N images only; validation and test stay whole")
    add("--shots_by", choices=("image", "group"), default="image", help="N images, or all images of N groups")
    add("--split_seed", type=int, nargs="+", default=[0], help="of the draws of --shots: runs for each of them")
    models = p.add_argument_group("models")
    add_arguments(models, frozen=False)
    add = models.add_argument
    add("--predictions", nargs="+", default=[], metavar="NAME=FOLDER", help="anyone's masks of the test images, .png")
    add("--arch", choices=SIZES, default="vit_small", help="of `none` where no file tells")
    add("--decoder", choices=("upernet", "linear"), default="upernet", help="on four feature maps, or on the last")
    add("--channels", type=int, help="of UPerNet; default: the backbone's width")
    add("--decoder_norm", choices=("group", "none"), default="group", help="of UPerNet; none is the paper's")
    add("--frozen", **flag, help="train the decoder alone")
    add = p.add_argument_group("training").add_argument
    add("--iters", type=int, default=20_000, help="steps, the same for all models")
    add("--batch_size", type=int, default=64, help="images per step over all processes")
    add("--lr", type=float, default=1e-4, help="learning rate of the decoder and the last block")
    add("--warmup_iters", type=int, default=1500, help="of the learning rate")
    add("--layer_decay", type=float, default=0.99, help="rate factor per block towards the input; `none` has 1")
    add("--weight_decay", type=float, default=0.01, help="AdamW's, but for biases, norms and LayerScale")
    add("--drop_path_rate", type=float, default=0.4, help="share of images the last block skips; the first skips none")
    add("--dice_weight", type=float, default=1.0, help="of the Dice loss beside cross-entropy")
    add("--augment", action=argparse.BooleanOptionalAction, default=True,
        help="affine, light, gamma, noise, grid, flip")
    add("--val_every", type=int, default=450, help="steps between validations, of which the best counts")
    add = add_run(p, PRESETS, "seg", 32, 450, "steps").add_argument
    add("--tolerance", type=float, default=2.0, help="of surface Dice, in mm where pixel sizes are known, else pixels")
    add("--latex", metavar="FILE.tex", help="write the table and the methods text for a paper")
    args, _ = p.parse(argv, by_data(PRESETS))
    check_args(p, args)
    return args


def check_args(p, args):
    of_data = ("masks", "mask_pattern", "classes", "exclude", "group_regex", "split", "pixel_sizes")
    if args.data is None and any(getattr(args, name) for name in of_data):
        p.error(f"--{', --'.join(of_data)} need --data: phantoms have no files")
    least = dict(seeds=1, seed=0, test_seed=0, iters=1, batch_size=1, eval_batch_size=1, save_every=1, val_every=1,
                 img_size=1, warmup_iters=0, weight_decay=0, dice_weight=0, shots=1, channels=1, tolerance=0)
    p.check(args, least, shares=("val_fraction", "test_fraction", "drop_path_rate"), positive=("lr", "layer_decay"))
    if min(args.split_seed) < 0 or len({*args.split_seed}) < len(args.split_seed):
        p.error(f"--split_seed must be numbers from 0, each once, not {' '.join(map(str, args.split_seed))}")
    if args.warmup_iters >= args.iters:
        p.error(f"--warmup_iters {args.warmup_iters} must be fewer than --iters {args.iters}")


# ---------------------------------------------------------------- one model

def fine_tune(backbone, info, data, args, seed, path, folder, device, rank, world_size, received):
    """One run: (scores of the test images, best step and validation score), or None if it was stopped. `path` keeps its
    state, and at last its best step's weights; `folder` the test images' masks."""
    canvases = data.images.at(args.img_size)
    stats, K, steps, batch = (info["mean"], info["std"]), len(data.classes), args.iters, args.batch_size
    decay = 1.0 if info["digest"] is None else args.layer_decay  # nothing below is worth keeping
    how = dict(name=args.decoder, channels=args.channels, norm=args.decoder_norm)
    network, gradients, optimizer = segmenter.build(backbone, how, class_shares(data), args.frozen, seed, decay, device)
    rates = segmenter.learning_rates(args.lr, steps, args.warmup_iters)

    # ---- resume ----
    identity = runtime.run_identity(args, NOT_RECIPE, info, seed=seed, layer_decay=decay,
                                    drop_path_rate=backbone.drop_path_rate, images=digest_of(data, canvases))
    run = runtime.open_run(path, identity, network, optimizer, {"validation Dice": -1.0, "step": 0}, device, rank == 0)
    if "scores" in run.saved:
        there = all(os.path.exists(mask_path(folder, data.names[i])) for i in data.test)
        there = all_reduce(torch.tensor(float(there), device=device)).item() == world_size  # one answer for all
        if there and run.saved["scored"] == digest_of_scores(data, args.tolerance):
            return run.saved["scores"], run.best
        run.best["state"] = {**run.saved["teacher"], **run.saved["head"]}  # predict once more

    # ---- loop ----
    own = slice(batch * rank // world_size, batch * (rank + 1) // world_size)
    drawn = segmenter.batches(data.groups[data.train], seed, range(run.step, steps), batch)
    for step in runtime.training_steps(run, network, optimizer, steps, args.val_every, args.save_every, received):
        indices = data.train[next(drawn)[own]]
        x, masks = segmenter.make_batch(canvases[indices], data.masks[indices], own, seed, step, batch, args, stats,
                                        device)
        drops, keep = segmenter.draw_drops(network, len(x), args.img_size, seed, step, rank)
        loss = segmenter.train_step(network, gradients, optimizer, x, masks, batch, rates[step], args, drops, keep)
        runtime.add_loss(run, loss)
        if run.validates:
            found = segmenter.validate(network, canvases, data.masks, data.val, K, stats, args.eval_batch_size, device,
                                       args.dtype, rank, world_size)
            run.found = {"validation Dice": found, "step": step + 1}
            run.record = {**run.found, "lr": float(rates[step])}
    if run.stopped:
        return None

    # ---- test, once, with the best step's weights ----
    network.load_state_dict(run.best.pop("state"))
    scores = score_network(network, data, canvases, stats, args, folder, device, rank, world_size)
    runtime.save_run(run, scores=scores, classes=data.classes, decoder=how, img_size=args.img_size,
                     scored=digest_of_scores(data, args.tolerance),
                     **trained_weights(network, info, data.images, data.train))
    return scores, run.best


def run_models(models, like, data, draws, args, device, rank, world_size, received):
    """Every row of --ckpt: ({name: scores of its runs}, {name: [what was chosen, per run]}, {name: [info of each file,
    and the side of the images it was fed with]}, {name: folder of the first run's masks}); stopped by a signal: None.

    draws: {split seed, or None: train images}.
    """
    scores, chosen, infos, folders = {}, {}, {}, {}
    rate = 0.0 if args.frozen else args.drop_path_rate
    for start in open_runs(models, like, args, rank == 0, rate, draws=draws):
        start.backbone.drop_path_uniform = False
        if start.info["digest"] is None:  # from scratch the paper's segmenters begin with whole blocks
            full_layerscale(start.backbone)
        folder = os.path.join(args.output_dir, "masks", start.name)
        found = fine_tune(start.backbone, start.info, data._replace(train=draws[start.draw]), args, start.seed,
                          os.path.join(args.output_dir, f"{start.name}.pt"), folder, device, rank, world_size, received)
        if found is None:
            return None
        scores.setdefault(start.model, []).append(found[0])
        chosen.setdefault(start.model, []).append(found[1])
        infos.setdefault(start.model, {})[start.file] = {**start.info, "fed": args.img_size}
        folders.setdefault(start.model, folder)
    return ({name: stack(runs) for name, runs in scores.items()}, chosen,
            {name: list(files.values()) for name, files in infos.items()}, folders)


# ---------------------------------------------------------------- what is said about it

def protocol(args):
    decoder = "a linear head on the last block" if args.decoder == "linear" else (
        f"UPerNet on four blocks ({'group norm' if args.decoder_norm == 'group' else 'no norm'}, "
        f"{args.channels or 'as many'} channels{'' if args.channels else ' as the backbone'})")
    backbone = "frozen backbone" if args.frozen else (
        f"whole network trained (layer decay {args.layer_decay:g}, drop path 0 to {args.drop_path_rate:g}; from "
        f"scratch no layer decay, and LayerScale starts at 1)")
    return (f"{decoder}, {backbone}; {args.iters:,} steps of {args.batch_size} images (AdamW, learning rate "
            f"{args.lr:g}, {count(args.warmup_iters, 'step')} of warm-up, then linear to 0; weight decay "
            f"{args.weight_decay:g}; cross-entropy plus {args.dice_weight:g} Dice loss; augmentation "
            f"{'on' if args.augment else 'off'}), the step of the largest pooled foreground Dice on validation, at "
            f"{args.img_size} pixels, looked at every {args.val_every:,}")


def sentences(found, data, draws, args):
    """The methods text."""
    few = "" if args.shots is None else (
        f"Of the train images {count(args.shots, args.shots_by)} were used, drawn by split seeds "
        f"{', '.join(map(str, draws))}, again until they showed every class; validation and test were whole. ")
    images = (f"{few}{found['copies']['sentence']} Images were squashed to {args.img_size} pixels a side, and padded "
              f"to a multiple of a model's patch size; masks were scored at each image's own size. ")
    given = [name for name, _ in named_files(args.predictions)]
    given = [f"the test masks of {', '.join(given)}"] if given else []
    scores = (f"Dice, IoU, HD95 and surface Dice (tolerance {args.tolerance:g} {found['unit']}) are of each image and "
              f"class that the truth shows, a missing one counting 0, HD95 the image's diagonal; pooled scores are of "
              f"all pixels together. {circumference_text(found)}")
    return methods_text(found, data, SCRIPT, images, given, protocol(args), scores)


def circumference_text(found):
    """How circumferences were measured, and each model's limits of agreement; nothing where none were."""
    if "own masks" not in found:
        return ""
    limits = []
    for name, model in found["models"].items():
        own = model["circumference [mm]"]
        bias, lower, upper = (own[key]["estimate"] for key in ("bias", "lower", "upper"))
        if bias is not None:
            limits.append(f"{name} {bias:+.1f} [{lower:+.1f}, {upper:+.1f}] mm, {own['no ellipse']:,} without")
    return (f"Circumferences are of the ellipse fitted to the edge of a mask's largest part; a head without one is off "
            f"by all that was measured. Bias [limits of agreement], heads without an ellipse: {'; '.join(limits)}. The "
            f"test set's own masks: {found['own masks']}. ")


def write_overlays(rows, folders, data, args):
    """A picture of the best, the median and the worst test image of each model's first run."""
    for name, folder in folders.items():
        own = rows[name]["values"]["Dice"][0][:, 1:]  # (n, K - 1)
        dices = np.array([np.nanmean(values) if not np.isnan(values).all() else np.nan for values in own])
        shown = []
        for word, row in zip(("best", "median", "worst"), best_median_worst(dices)):
            i = data.test[row]
            with Image.open(mask_path(folder, data.names[i])) as file:
                mask = np.asarray(file)
            shown.append((f"{word}: {data.names[i]}, Dice {dices[row]:.3f}", data.grey(i), data.truth(i), mask))
        overlay_png(os.path.join(args.output_dir, f"overlay-{slug(name)}.png"), shown, data.classes,
                    f"{name}: {'phantom' if args.data is None else 'test'} images, first run")


def main(args):
    # ---- setup ----
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.ckpt = args.ckpt or default_models()
    models, foreign = list_models(args.ckpt, "from scratch"), named_files(args.predictions)
    check_names([slug(name) for name in [model.name for model in models] + [name for name, _ in foreign]])
    args.img_size, like = common_network(models, args.img_size, PHANTOM_SIZE if args.data is None else DEFAULT_SIZE)
    data, notes, present = open_data(args)
    draws = {None: data.train}
    if args.shots is not None:
        found = {seed: draw_shots(data, present, args.shots, args.shots_by, seed) for seed in args.split_seed}
        draws = {seed: own for seed, (own, _) in found.items()}
        notes = [*notes, *(note for _, note in found.values() if note)]
    names, shapes = [data.names[i] for i in data.test], [data.truth(i).shape for i in data.test if foreign]
    theirs = {name: [read_predicted_masks(folder, names, shapes, len(data.classes)) for folder in folders.split(",")]
              for name, folders in foreign}
    os.makedirs(args.output_dir, exist_ok=True)
    json_path = os.path.join(args.output_dir, "finetune_seg.json")
    check_output(json_path, "--output_dir's", SCRIPT)
    if args.latex:
        check_output(args.latex, "--latex", SCRIPT)
    received, (rank, world_size, device) = runtime.stop_on_signals(), runtime.setup()
    torch.backends.cudnn.deterministic = True  # convolutions, or no run could be repeated to the bit
    if args.batch_size < world_size:
        raise ValueError(f"{world_size} processes for batches of {args.batch_size} images: --nproc_per_node "
                         f"{args.batch_size} is the most")
    if rank == 0:
        runtime.show_run(args, device, world_size)
        print(f"{data.layout}: {len(data.names):,} images, classes {', '.join(data.classes)}; groups by "
              f"{data.grouped_by}: {counts_line(data)}; no group is in two parts")
        print("\n".join([*notes, protocol(args)]), flush=True)
        write_split(os.path.join(args.output_dir, "split.csv"), {"image": data.names, "group": data.groups}, data)

    # ---- models ----
    found = run_models(models, like, data, draws, args, device, rank, world_size, received)
    if not runtime.goes_on(rank, found is None):
        return
    rows, chosen, infos, folders = found
    rows.update({name: stack([score_files(read, data, args) for read in runs]) for name, runs in theirs.items()})

    # ---- report ----
    measured = None if data.measured is None else data.measured[data.test]
    unit = "pixels" if data.mm is None else "mm"
    found = compare_masks(rows, data.groups[data.test], data.classes, unit, args.seed, measured)
    if measured is not None:
        found["own masks"] = own_circumference(data)
    found.update(phantom=args.data is None, chosen=chosen, files=files_of(infos, data), copies=find_copies(data),
                 train={str(seed): len(own) for seed, own in draws.items()})
    measures = [] if measured is None else [
        *circumference_table(found), f"the test set's own masks: {found['own masks']}", ""]
    print("\n".join(report_lines(found, "splits times seeds", [*measures, *mask_class_table(found)])))
    found["methods"] = sentences(found, data, draws, args)
    write_json(json_path, SCRIPT, args, device, found)
    if args.latex:
        write_text(args.latex, latex(found, SCRIPT))
    write_overlays(rows, folders, data, args)
    print(f"\nwrote {json_path}, overlay-*.png, masks/ and split.csv beside it"
          + (f", {args.latex}" if args.latex else ""))


if __name__ == "__main__":
    with runtime.clear_errors():
        main(get_args())
