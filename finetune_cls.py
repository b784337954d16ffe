"""Classification: fine-tune, probe or ask the neighbours of several backbones, and compare them in one table.

Each model sees the same images, splits and budget, is chosen by validation macro F1, and is scored once on the test
groups: means over runs with 95 % intervals, and paired tests against the first one. After UltraDINO, sections on
FETAL_PLANES_DB; linear probe and k-NN after DINOv2's evaluation.

    python finetune_cls.py                                              # last.pt and from scratch, on phantoms
    python finetune_cls.py --data FETAL_PLANES_DB --ckpt last.pt none dinov2_vitb14_reg4_pretrain.pth --seeds 3
    torchrun --nproc_per_node 8 finetune_cls.py --data LABELLED.csv --ckpt last.pt none
    python finetune_cls.py --data LABELLED.csv --ckpt last.pt none --linear --predictions nnunet=THEIRS.csv
"""

import argparse
import collections
import hashlib
import os

import numpy as np
import torch

import runtime
from arguments import add_run, by_data, stage_parser
from frames import phantom
from frames.images import Frame, read_image
from labelled.labels import LabelledSet, read_labelled
from labelled.splits import check_splits, split_groups
from labelled.store import Images
from model import SIZES
from networks.baselines import (DEFAULT_SIZE, add_arguments, check_names, common_network, default_models,
                                files_and_seeds, list_models, named_files, open_backbone, open_runs, own_size)
from networks.weights import trained_weights
from scores.class_report import by_column, by_table, class_table, compare
from scores.exchange import read_features, read_predictions
from scores.plots import confusion_png
from scores.report import (check_output, counts_line, files_of, find_copies, latex, methods_text, report_lines, slug,
                           write_json, write_predictions, write_split, write_text)
from training import classifier
from training.features import BLOCKS, cached_features
from training.probes import knn, linear_grid, validation_f1

PHANTOM_SEED, PHANTOM_IMAGES, PHANTOM_SIZE = 2_000_000, 1200, 64  # none of pretraining's phantoms, nor of fewshot.py's
SCRIPT = "finetune_cls.py"
PRESETS = {  # the recipe is UltraDINO's; `cpu` is one for phantoms and minutes on two cores
    "ultradino": {},
    "cpu": dict(arch="vit_micro", epochs=12, batch_size=32, lr=1e-3, warmup_epochs=1.0, layer_decay=0.9,
                linear_steps=1000),
}
# may differ between a run and its resumption; what the images and checkpoints are is checked by their digests
NOT_RECIPE = {"data", "exclude", "group_regex", "by", "ckpt", "features", "predictions", "seeds", "output_dir", "latex",
              "cache", "save_every", "preset", "linear", "knn", "linear_steps", "eval_batch_size"}

# of n images: names, labels (ints into classes), groups; indices of the parts; columns for --by; images: store.Images
Data = collections.namedtuple("Data", "names labels classes groups grouped_by train val test columns images")


def get_args(argv=None):
    p = stage_parser(__doc__, PRESETS)
    flag = dict(action=argparse.BooleanOptionalAction, default=False)
    add = p.add_argument_group("data").add_argument
    add("--data", help="folder with a folder per class, CSV image,label[,group][,split], or "
        "FETAL_PLANES_DB as downloaded; without it phantom planes")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out names that match, e.g. '*_mask.png'")
    add("--group_regex", help="first capture in an image's name is its patient, clip or examination")
    add("--by", nargs="+", default=[], metavar="COLUMN",
        help="score each value of these columns apart: US_Machine, ...")
    add("--split_seed", type=int, default=0, help="of groups drawn for validation and test where the data name none")
    add("--val_fraction", type=float, default=0.2, help="share of train groups kept for validation if none is named")
    add("--test_fraction", type=float, default=0.2, help="share of all groups kept for the test if none is named")
    models = p.add_argument_group("models")
    add_arguments(models)
    add = models.add_argument
    add("--predictions", nargs="+", default=[], metavar="NAME=FILE", help="another model's test predictions, .csv")
    add("--arch", choices=SIZES, default="vit_small", help="of `none` where no file tells")
    add = p.add_argument_group("protocol, fine-tuning of the whole network if not one of these").add_argument
    add("--linear", **flag, help="linear heads on frozen features, DINOv2's grid, the best on validation")
    add("--knn", **flag, help="nearest neighbours on frozen features, k by validation")
    add = p.add_argument_group("fine-tuning").add_argument
    add("--epochs", type=int, default=200, help="the same for all models")
    add("--batch_size", type=int, default=128, help="images per step over all processes")
    add("--lr", type=float, default=1e-4, help="learning rate of the head and the last block")
    add("--warmup_epochs", type=float, default=5.0, help="of the learning rate")
    add("--layer_decay", type=float, default=0.65, help="rate factor per block towards the input; `none` has 1")
    add("--weight_decay", type=float, default=0.01, help="AdamW's, but for biases, norms and LayerScale")
    add("--drop_path_rate", type=float, default=0.0, help="share of images each block skips")
    add("--augment", action=argparse.BooleanOptionalAction, default=True, help="brightness, gamma, noise, grid, flip")
    add("--mixup", type=float, default=0.8, help="alpha of its Beta distribution, 0 for none")
    add("--cutmix", type=float, default=1.0, help="alpha of its Beta distribution, 0 for none")
    add("--smoothing", type=float, default=0.1, help="of labels")
    add("--linear_steps", type=int, default=12_500, help="of --linear; 12,500 are DINOv2's")
    add = add_run(p, PRESETS, "cls", 64, 10, "epochs").add_argument
    add("--latex", metavar="FILE.tex", help="write the table and the methods text for a paper")
    args, _ = p.parse(argv, by_data(PRESETS))
    check_args(p, args)
    return args


def check_args(p, args):
    if args.linear and args.knn:
        p.error("--linear and --knn are two protocols: one at a time")
    if args.features and not (args.linear or args.knn):
        p.error("--features are frozen: they need --linear or --knn; fine-tuned models join by --predictions")
    if args.data is None and (args.exclude or args.group_regex or args.by):
        p.error("--exclude, --group_regex and --by need --data: phantoms have no names")
    least = dict(seeds=1, seed=0, split_seed=0, epochs=1, batch_size=2, linear_steps=1, eval_batch_size=1, save_every=1,
                 img_size=1, mixup=0, cutmix=0, warmup_epochs=0, weight_decay=0)
    p.check(args, least, shares=("val_fraction", "test_fraction", "drop_path_rate", "smoothing"),
            positive=("lr", "layer_decay"))


# ---------------------------------------------------------------- data

def open_data(args):
    """The labelled set, split by groups, and what was noticed, in sentences."""
    if args.data is None:
        canvases, labels, groups = phantom.phantom_images(PHANTOM_IMAGES, PHANTOM_SIZE, PHANTOM_SEED)
        found = LabelledSet(None, [f"phantom {i}" for i in range(len(canvases))], [phantom.PLANES[i] for i in labels],
                            [str(group) for group in groups], None, {}, "phantom patient")
        images = Images(len(canvases), lambda i: Frame(canvases[i], canvases[i]))
    else:
        found = read_labelled(args.data, args.exclude, args.group_regex, args.by)
        images = Images(len(found.paths), lambda i: read_image(found.paths[i]))
    found = found._replace(splits=split_groups(found, args.split_seed, args.val_fraction, args.test_fraction))
    notes = check_splits(found, found.splits)
    classes, labels = np.unique(found.labels, return_inverse=True)
    parts = [np.flatnonzero(np.array(found.splits) == part) for part in ("train", "val", "test")]
    return Data(found.names, labels, classes.tolist(), np.array(found.groups), found.grouped_by, *parts, found.columns,
                images), notes


def digest_of(data, canvases):
    """Of all that a run sees of the data: images, labels, parts."""
    digest = hashlib.sha256(canvases)
    for array in (data.labels, np.unique(data.groups, return_inverse=True)[1], data.train, data.val, data.test):
        digest.update(np.ascontiguousarray(array, np.int64))
    return digest.hexdigest()


# ---------------------------------------------------------------- one model

def probe(features, data, args, seeds, device):
    """Features (n, L + 1, C) -> class probabilities of the test images (runs, n, K), and each run's choice."""
    scores, chosen = [], []
    for seed in seeds[:1] if args.knn else seeds:  # k-NN draws nothing
        if args.knn:
            found, how = knn(features, data.labels, data.train, data.val, len(data.classes))
        else:
            found, how = linear_grid(features, data.labels, data.train, data.val, len(data.classes), args.linear_steps,
                                     args.batch_size, seed, device)
        scores.append(found[torch.from_numpy(data.test)].numpy())
        chosen.append(how)
    return np.stack(scores), chosen


def fine_tune(backbone, info, data, args, seed, path, device, rank, world_size, received):
    """One run of full fine-tuning: (probabilities of the test images (n, K), epoch and validation score), or None if
    it was stopped. `path` keeps its state, and at last its best epoch's weights."""
    canvases = data.images.at(own_size(args.img_size, backbone))
    stats, K, batch = (info["mean"], info["std"]), len(data.classes), args.batch_size
    labels, groups = data.labels[data.train], data.groups[data.train]
    per_epoch = len(data.train) // batch
    steps = args.epochs * per_epoch
    decay = 1.0 if info["digest"] is None else args.layer_decay  # nothing below is worth keeping
    network, gradients, optimizer = classifier.build(backbone, K, seed, decay, device)
    rates = classifier.learning_rates(args, steps, per_epoch)

    def predict(part):
        return classifier.predict(network, canvases[part], stats, args.eval_batch_size, device, args.dtype, rank,
                                  world_size)

    # ---- resume ----
    identity = runtime.run_identity(args, NOT_RECIPE, info, seed=seed, layer_decay=decay,
                                    images=digest_of(data, canvases))
    run = runtime.open_run(path, identity, network, optimizer, {"validation macro F1": -1.0, "epoch": 0}, device,
                           rank == 0)
    if "scores" in run.saved:
        return run.saved["scores"].numpy(), run.best

    # ---- loop ----
    own = classifier.share(batch, rank, world_size)
    drawn = classifier.batches(groups, seed, range(run.step, steps), batch)
    for step in runtime.training_steps(run, network, optimizer, steps, per_epoch, args.save_every * per_epoch,
                                       received):
        indices = next(drawn)[own]
        x, targets = classifier.make_batch(canvases[data.train[indices]], labels[indices], own, seed, step, batch, K,
                                           args, stats, device)
        drops = classifier.draw_drops(backbone, len(x), x.shape[-1], seed, step, rank)
        loss = classifier.train_step(network, gradients, optimizer, x, targets, batch, rates[step], args, drops)
        runtime.add_loss(run, loss)
        if run.validates:
            f1 = float(validation_f1(predict(data.val), data.labels[data.val]))
            run.found = {"validation macro F1": f1, "epoch": 1 + step // per_epoch}
            run.record = {**run.found, "lr": float(rates[step])}
    if run.stopped:
        return None

    # ---- test, once, with the best epoch's weights ----
    network.load_state_dict(run.best.pop("state"))
    scores = predict(data.test)
    runtime.save_run(run, scores=scores, classes=data.classes,
                     **trained_weights(network, info, data.images, data.train))
    return scores.numpy(), run.best


def fine_tune_models(models, like, data, args, device, rank, world_size, received):
    """Every row of --ckpt: ({name: scores (runs, n, K)}, {name: [what was chosen, per run]}, {name: [info of each file,
    and the side of the images it was fed with]}); stopped early by a signal it returns None."""
    scores, chosen, infos = {}, {}, {}
    for start in open_runs(models, like, args, rank == 0, args.drop_path_rate):
        path = os.path.join(args.output_dir, f"{start.name}.pt")
        found = fine_tune(start.backbone, start.info, data, args, start.seed, path, device, rank, world_size, received)
        if found is None:
            return None
        scores.setdefault(start.model, []).append(found[0])
        chosen.setdefault(start.model, []).append(found[1])
        fed = own_size(args.img_size, start.backbone)
        infos.setdefault(start.model, {})[start.file] = {**start.info, "fed": fed}
    return ({name: np.stack(runs).astype(np.float64) for name, runs in scores.items()}, chosen,
            {name: list(files.values()) for name, files in infos.items()})


def probe_models(models, like, data, args, device):
    """The same by frozen features. Of random initialisation there is a network per seed."""
    scores, chosen, infos = {}, {}, {}
    for model in models:
        runs, how, infos[model.name] = [], [], []
        for _, path, seeds in files_and_seeds(model, args):
            for own in [[seed] for seed in seeds] if path is None else [seeds]:
                backbone, info = open_backbone(path, like, args.arch, own[0])
                canvases = data.images.at(own_size(args.img_size, backbone))
                features = cached_features(backbone.to(device), info, canvases, args.eval_batch_size, device,
                                           args.cache)
                found, settings = probe(features, data, args, own, device)
                runs, how = [*runs, *found], [*how, *settings]
            infos[model.name].append({**info, "fed": canvases.shape[1]})
        scores[model.name], chosen[model.name] = np.stack(runs).astype(np.float64), how
    return scores, chosen, infos


# ---------------------------------------------------------------- what is said about it

def protocol(args):
    if args.knn:
        return "k nearest neighbours of the frozen class token (cosine, temperature 0.07), k by validation macro F1"
    if args.linear:
        return (f"linear heads on frozen features (SGD, {args.linear_steps:,} steps of {args.batch_size}; learning "
                f"rate, last 1 or {BLOCKS} blocks, average pool: the best by validation macro F1)")
    return (f"full fine-tuning for {args.epochs} epochs (AdamW, learning rate {args.lr:g}, batch {args.batch_size}, "
            f"layer decay {args.layer_decay:g}, 1 from scratch, weight decay {args.weight_decay:g}, mixup "
            f"{args.mixup:g}, cutmix {args.cutmix:g}, label smoothing {args.smoothing:g}, augmentation "
            f"{'on' if args.augment else 'off'}), the epoch of the largest validation macro F1")


def sentences(found, data, args, vectors):
    """The methods text."""
    parts = data.train, data.val, data.test
    classes = "; ".join(f"{name} {', '.join(str((data.labels[part] == i).sum()) for part in parts)}"
                        for i, name in enumerate(data.classes))
    images = (f"{found['copies']['sentence']} Images per class in train, validation, test: {classes}. Images were "
              f"squashed to {args.img_size} pixels a side, or the nearest multiple of a model's patch size. ")
    given = [f"{name} by its test predictions" for name, _ in named_files(args.predictions)]
    given += [f"{name} by vectors of {vector.shape[-1]:,} numbers that were made elsewhere"
              for name, vector in vectors.items()]
    return methods_text(found, data, SCRIPT, images, given, protocol(args))


def main(args):
    # ---- setup ----
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    frozen = args.linear or args.knn
    if frozen and int(os.environ.get("RANK", 0)) > 0:
        return  # frozen features are quick: one process makes them
    args.ckpt = args.ckpt or default_models()
    models = list_models(args.ckpt, "random init" if frozen else "from scratch")
    if timm := [path for model in models for path in model.paths if str(path).startswith("timm:")]:
        if args.drop_path_rate and not frozen:
            raise ValueError(f"{timm[0]}: --drop_path_rate is not for timm's networks")
    foreign = named_files(args.features), named_files(args.predictions)
    names = [model.name for model in models] + [name for files in foreign for name, _ in files]
    check_names([slug(name) for name in names])  # what their files are called
    args.img_size, like = common_network(models, args.img_size, PHANTOM_SIZE if args.data is None else DEFAULT_SIZE)
    data, notes = open_data(args)
    test = [data.names[i] for i in data.test]
    theirs = {name: read_predictions(path, test, data.classes) for name, path in foreign[1]}
    vectors = {name: read_features(path, data.names) for name, path in foreign[0]}
    args.batch_size = min(args.batch_size, len(data.train))
    os.makedirs(args.output_dir, exist_ok=True)
    json_path = os.path.join(args.output_dir, "finetune_cls.json")
    check_output(json_path, "--output_dir's", SCRIPT)
    if args.latex:
        check_output(args.latex, "--latex", SCRIPT)
    if frozen:
        received, rank, world_size, device = [], 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    else:
        received, (rank, world_size, device) = runtime.stop_on_signals(), runtime.setup()
        if (most := -(-args.batch_size // 2)) < world_size:  # neighbours are mixed: a process needs a pair
            raise ValueError(f"{world_size} processes for batches of {args.batch_size} images (--batch_size, or all "
                             f"there are to train): --nproc_per_node {most} is the most")
    if rank == 0:
        runtime.show_run(args, device, world_size)
        print("\n".join([f"{len(data.names):,} images, {len(data.classes)} classes, groups by {data.grouped_by}: "
                         f"{counts_line(data)}; no group is in two parts", *notes, protocol(args)]), flush=True)
        columns = {"image": data.names, "label": [data.classes[label] for label in data.labels], "group": data.groups}
        write_split(os.path.join(args.output_dir, "split.csv"), columns, data)

    # ---- models ----
    found = (probe_models(models, like, data, args, device) if frozen
             else fine_tune_models(models, like, data, args, device, rank, world_size, received))
    if not runtime.goes_on(rank, found is None):
        return
    scores, chosen, infos = found
    rows = {name: (value, True) for name, value in scores.items()}
    for name, features in vectors.items():
        value, chosen[name] = probe(features, data, args, range(args.seed, args.seed + args.seeds), device)
        rows[name] = value.astype(np.float64), True
    rows.update(theirs)

    # ---- report ----
    labels, groups = data.labels[data.test], data.groups[data.test]
    found = compare(rows, labels, groups, data.classes, args.seed)
    found.update(phantom=args.data is None, chosen=chosen, files=files_of(infos, data), copies=find_copies(data), by={})
    print("\n".join(report_lines(found, "fine-tuning or probe seeds", class_table(found))))
    for column in args.by:
        values = [data.columns[column][i] for i in data.test]
        found["by"][column] = by_column(rows, labels, groups, data.classes, values, args.seed)
        print("\n" + "\n".join(by_table(column, found["by"][column])))
    found["methods"] = sentences(found, data, args, vectors)
    for name, model in found["models"].items():
        path = os.path.join(args.output_dir, f"confusion-{slug(name)}.png")
        confusion_png(path, np.array(model["confusion, mean of runs"]), data.classes,
                      f"{name}: {'phantom' if args.data is None else 'test'} images, mean of runs")
    for name, value in scores.items():
        write_predictions(args.output_dir, name, value, data)
    if args.latex:
        write_text(args.latex, latex(found, SCRIPT))
    write_json(json_path, SCRIPT, args, device, found)
    print(f"\nwrote {json_path}, confusion-*.png, predictions-*.csv and split.csv beside it"
          + (f", {args.latex}" if args.latex else ""))


if __name__ == "__main__":
    with runtime.clear_errors():
        main(get_args())
