"""Few-shot test: how much do k labelled images per class teach a pretrained backbone, frozen or fine-tuned?

Each checkpoint, a network at random initialisation and raw pixels meet the same classifiers on the same episodes. An
episode draws k support images per class, from k patients where there are that many, and is scored on every image of all
other patients. Beyond both papers: they report fine-tuning on whole training sets only.

    python fewshot.py                                     # last.pt on phantom planes, a smoke test
    python fewshot.py --ckpt last.pt --shots 5
    python fewshot.py --data DATA/labels.csv --exclude '*_mask.png' --shots 1 5 20
    python fewshot.py --data DATA/labels.csv --ckpt ours=last.pt dinov2_vitb14_reg4_pretrain.pth --classifiers linear
    python fewshot.py --data DATA/labels.csv --outside_fan  # is the label told by text and callipers?
"""

import argparse
import collections
import copy
import os
import sys

import numpy as np
import torch
from tqdm import tqdm

from arguments import Parser
from frames import phantom
from frames.images import Frame, read_image
from frames.leakage import overlap
from frames.lists import groups_have_names
from labelled.labels import LabelledSet, read_labelled
from labelled.splits import SPLITS
from labelled.store import Images, outside_fans
from networks.baselines import (DEFAULT_SIZE, Model, add_arguments, check_names, common_network, list_models,
                                named_files, open_backbone, own_size, split_name)
from runtime import clear_errors, cosine_schedule, setup
from scores.exchange import read_features
from scores.metrics import balanced_accuracy, group_confusion, macro_f1
from scores.plots import curves_png
from scores.report import check_output, shorten, write_json
from scores.stats import bootstrap, interval, resampling_weights
from training import classifier
from training.features import cached_features, few_shot_vector
from training.probes import linear_probe, logistic_regression, nearest_mean, nearest_neighbours

SCRIPT = "fewshot.py"
SCORES = {"balanced accuracy": balanced_accuracy, "macro F1": macro_f1}
CLASSIFIERS = {"nearest_mean": "nearest mean", "knn": "k-NN", "logreg": "logreg", "linear": "linear probe",
               "finetune": "fine-tuned"}  # words of --classifiers: what tables call them
PHANTOM_SEED, PHANTOM_IMAGES = 1_000_000, 1200  # pretraining draws its phantoms from --seed: no image is in both
FEWEST_OUTSIDE = 10  # images with pixels outside the fan, for a verdict on them
PIXELS_SIDE = 64  # of the pixel baseline; more is slower and no better
# of fine-tuning, as finetune_cls.py's; there is no validation set to choose an epoch by: the last step's weights count
RECIPE, FINETUNE_BATCH = dict(weight_decay=0.01, augment=True, mixup=0.8, cutmix=1.0, smoothing=0.1), 32

# a file of --ckpt; path: None where it is random; size: of its images; info: as weights.py tells
File = collections.namedtuple("File", "path backbone info size")


def get_args(argv=None):
    p = Parser(__doc__.split("\n")[0])
    add = p.add_argument_group("test set").add_argument
    add("--data", help="folder with a folder per class, CSV image,label[,group][,split], or FETAL_PLANES_DB as "
        "downloaded; all its splits together, but for --split; default: phantom planes")
    add("--split", choices=SPLITS, help="draw support and query from this split only")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out names that match, e.g. '*_mask.png'")
    add("--group_regex", help="first capture in an image's name is its patient, clip or examination")
    add("--outside_fan", action=argparse.BooleanOptionalAction, default=False,
        help="show only what lies outside the ultrasound fan: a score above chance is text, callipers, layout")
    models = p.add_argument_group("models")
    add_arguments(models, ckpt=["last.pt"])
    add = models.add_argument
    add("--batch_size", type=int, default=64, help="images per forward pass; lower it when memory runs out")
    add = p.add_argument_group("protocol").add_argument
    add("--shots", type=int, nargs="+", default=[1, 5], metavar="N", help="support images per class")
    add("--episodes", type=int, default=100, help="support draws per number of shots; more narrow the interval")
    add("--classifiers", nargs="+", choices=CLASSIFIERS, default=["nearest_mean", "knn", "logreg"], metavar="NAME",
        help="of nearest_mean, knn, logreg, linear (logreg on the best of DINOv2's four inputs, chosen with C on each "
        "support set), finetune (the whole network on each support set); default: the first three")
    add("--C", type=inverse_penalty, default=1.0, metavar="C",
        help="logreg's inverse L2 penalty, or 'support': cross-validated on each support set")
    add("--finetune_steps", type=int, default=100, help="of finetune, the same for all models")
    add("--finetune_episodes", type=int, default=10, help="finetune sees the first ones only: each trains a network")
    add("--lr", type=float, default=1e-4, help="finetune's learning rate of the head and the last block")
    add("--layer_decay", type=float, default=0.65, help="finetune's rate factor per block towards the input; 1 from "
        "random initialisation")
    add("--seed", type=int, default=0, help="of episodes, random initialisation, fine-tuning and bootstrap")
    add("--json", default="fewshot.json", help="where all numbers go beside the table")
    add("--png", help="accuracy against several shots, a picture per classifier, named after it; default beside --json")
    args, _ = p.parse(argv)
    for name in ("shots", "episodes", "batch_size", "img_size", "finetune_steps", "finetune_episodes"):
        if min(np.atleast_1d(1 if getattr(args, name) is None else getattr(args, name))) < 1:
            p.error(f"--{name} must be at least 1")
    p.check(args, dict(seed=0), positive=("lr", "layer_decay"))
    if args.data is None and (args.exclude or args.group_regex or args.split):
        p.error("--exclude, --group_regex and --split need --data: the phantom planes have no file names")
    args.shots, args.classifiers = (list(dict.fromkeys(given)) for given in (args.shots, args.classifiers))
    args.png = args.png or os.path.splitext(args.json)[0] + ".png"
    return args


def inverse_penalty(text):
    if text == "support":
        return text
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a positive number or 'support'")
    return value


# ---------------------------------------------------------------- images and models

def labelled_images(args, img_size):
    """A LabelledSet, and a function from index to images.Frame."""
    if args.data is None:
        # at least the 64 pixels of pretraining's phantoms: finer speckle would be another kind of image
        canvases, labels, groups = phantom.phantom_images(PHANTOM_IMAGES, max(img_size, PIXELS_SIDE), PHANTOM_SEED)
        found = LabelledSet(None, [f"phantom {i}" for i in range(len(canvases))], [phantom.PLANES[i] for i in labels],
                            groups.tolist(), None, {}, "phantom patient")
        return found, lambda i: Frame(canvases[i], canvases[i])
    found = read_labelled(args.data, args.exclude, args.group_regex)
    if args.split:
        own = [i for i, split in enumerate(found.splits or []) if split == args.split]
        if not own:
            raise ValueError(f"--split {args.split}: {args.data} has no such split; there "
                             f"{'are ' + ', '.join(sorted({*found.splits})) if found.splits else 'is none'}")
        found = found._replace(**{field: [getattr(found, field)[i] for i in own]
                                  for field in ("paths", "names", "labels", "groups", "splits")})
    return found, lambda i: read_image(found.paths[i])


def list_rows(args):
    """Models of --ckpt and, unless it is among them, the first file's network at random initialisation; [(name, file)]
    of --features. The one file that is given without a name is "pretrained"."""
    models, foreign = list_models(args.ckpt, "random init"), named_files(args.features)
    files = [i for i, model in enumerate(models) if any(model.paths)]
    if len(files) == 1 and split_name(args.ckpt[files[0]])[0] is None:
        models[files[0]] = models[files[0]]._replace(name="pretrained")
    if len(files) == len(models):
        models.append(Model("random init", [None]))
    check_names([model.name for model in models] + ["pixels"] + [name for name, _ in foreign])
    return models, foreign


def open_files(models, like, img_size, seed):
    """{name: [File]}; each random initialisation of a model has a seed of its own."""
    files = {}
    for model in models:
        files[model.name] = []
        for number, path in enumerate(model.paths):
            backbone, info = open_backbone(path, like, "vit_small", seed + number)
            files[model.name].append(File(path, backbone, info, own_size(img_size, backbone)))
    return files


# ---------------------------------------------------------------- episodes

# counts (G, K): images of each class in each group; an order: all groups in a row

def reserve(counts, order):
    """The groups kept for the query, the last of `order` to hold each class, and the images left per class (K,)."""
    last_first = order[::-1]
    reserved = np.unique(last_first[(counts[last_first] > 0).argmax(0)])
    return reserved, counts.sum(0) - counts[reserved].sum(0)


def sparing_order(counts):
    """Groups that hold many classes, then groups of few images, come last: kept for the query they cost least."""
    return np.lexsort((-counts.sum(1), (counts > 0).sum(1)))


def check_shots(counts, shots, names):
    """Raise ValueError unless every class can give `shots` support images and still has a query image.

    Exact where groups hold one class; where they hold several, a better choice of query groups may exist.
    """
    if len(names) < 2:
        raise ValueError(f"all images are of one class, {names[0]!r}: a few-shot test needs two or more")
    left = reserve(counts, sparing_order(counts))[1]
    if left.min() < shots:
        images = counts[:, left.argmin()]
        advice = f"--shots up to {left.min()} works" if left.min() else "it needs images of further groups"
        raise ValueError(f"--shots {shots}: class {names[left.argmin()]!r} has {images.sum()} images in "
                         f"{(images > 0).sum()} groups, and support and query must not share a group; {advice}")


def draw_episode(labels, groups, counts, shots, seed, episode):
    """Support (K, shots) image indices and query (n,) bool, a pure function of the last three numbers and the set.

    All groups are put in one random order. The last ones are kept for the query; from the first ones every class takes
    its support, an image of each of `shots` groups, or where there are fewer, further images of them in turn. As the
    order is the same for all classes, groups that hold several serve all of them, and few are used up.
    """
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, shots, episode])))
    for _ in range(50):
        order = rng.permutation(len(counts))
        reserved, left = reserve(counts, order)
        if left.min() >= shots:
            break
    else:  # a tight set, where few choices of query groups leave enough images: take the one that check_shots proved
        order = sparing_order(counts)
        reserved = reserve(counts, order)[0]
    position, free, support = np.argsort(order), ~np.isin(groups, reserved), []
    for label in range(counts.shape[1]):
        images = rng.permutation(np.flatnonzero(free & (labels == label)))
        where = position[groups[images]]
        images, where = images[np.argsort(where, kind="stable")], np.sort(where)  # group by group
        turn = np.arange(len(where)) - np.searchsorted(where, where)  # 0 for the first image of a group, 1, 2, ...
        support.append(images[np.lexsort((where, turn))][:shots])
    return np.array(support), ~np.isin(groups, groups[np.concatenate(support)])


# ---------------------------------------------------------------- classifiers: support (E, K, k) -> predictions (E, n)

def frozen(word, features, support, C):
    """What a word of --classifiers, other than finetune, makes of features (n, L + 1, C)."""
    if word == "linear":
        return linear_probe(features, support)
    x = few_shot_vector(features)  # (n, d)
    if word == "logreg":
        return logistic_regression(x, support, C)
    return {"nearest_mean": nearest_mean, "knn": nearest_neighbours}[word](x, support)


def fine_tuned(file, canvases, labels, groups, support, query, seed, args, device):
    """Predictions (n,), -1 off the query bool (n,), of the whole network after --finetune_steps on one support (K, k).

    A copy of the file's backbone learns: each episode starts anew, and `seed` alone decides its head and batches.
    """
    rows, K, stats = support.flatten(), len(support), (file.info["mean"], file.info["std"])
    recipe = argparse.Namespace(**RECIPE, dtype="bfloat16" if device.type == "cuda" else "float32")
    decay = 1.0 if file.info["digest"] is None else args.layer_decay  # nothing below is worth keeping
    network, gradients, optimizer = classifier.build(copy.deepcopy(file.backbone), K, seed, decay, device)
    batch = min(FINETUNE_BATCH, len(rows))
    rates = cosine_schedule(args.lr, 0.0, args.finetune_steps, args.finetune_steps // 10)
    drawn = classifier.batches(groups[rows], seed, range(args.finetune_steps), batch)
    for step, (lr, indices) in enumerate(zip(rates, drawn)):
        own = rows[indices]  # (batch,)
        x, targets = classifier.make_batch(canvases[own], labels[own], slice(0, batch), seed, step, batch, K, recipe,
                                           stats, device)
        loss = classifier.train_step(network, gradients, optimizer, x, targets, batch, lr, recipe)
    if not loss.isfinite():
        raise ValueError(f"{file.info['path']}: fine-tuning's loss is not finite; a lower --lr?")
    predictions = np.full(len(labels), -1)
    scores = classifier.predict(network, canvases[query], stats, args.batch_size, device, recipe.dtype)  # (query, K)
    predictions[query] = scores.argmax(1).numpy()
    return predictions


# ---------------------------------------------------------------- scores

def evaluate(rows, squares, labels, groups, counts, shots, args, device):
    """{(row, classifier): replicates (scores, 1 + R)}. rows: {name: [(features (n, L + 1, C), File or None)]}.

    Files of one row, pretraining seeds, see the same episodes. Their scores, not their counts, are averaged in each
    replicate, as metrics.py does with runs: what to expect of one such file. The interval is over episodes and groups.
    """
    drawn = [draw_episode(labels, groups, counts, shots, args.seed, i) for i in range(args.episodes)]
    support, query = (np.stack(part) for part in zip(*drawn))  # (E, K, k), (E, n)
    (G, K), tuned = counts.shape, min(args.episodes, args.finetune_episodes)
    weights = {E: resampling_weights(E, G, args.seed) for E in (args.episodes, tuned)}  # the same for all rows: paired

    def predict(word, name, features, file):
        if word != "finetune":
            return np.where(query, frozen(word, features, torch.from_numpy(support), args.C).numpy(), -1)
        predictions = []
        for i in tqdm(range(tuned), desc=f"{name}, shots {shots}", disable=not sys.stderr.isatty(), leave=False):
            seed = int(np.random.SeedSequence([args.seed, shots, i]).generate_state(1)[0])
            predictions.append(fine_tuned(file, squares[file.size], labels, groups, support[i], query[i], seed, args,
                                          device))
        return np.stack(predictions)

    results = {}
    for name, files in rows.items():
        for word in args.classifiers:
            if word == "finetune" and not files[0][1]:
                continue  # vectors and pixels have no network
            confusions = [group_confusion(labels, predict(word, name, *file), groups, K, G) for file in files]
            results[name, CLASSIFIERS[word]] = np.mean([bootstrap(own, weights[len(own)], SCORES.values())
                                                        for own in confusions], axis=0)
    return results


def lines_of(results):
    """[(title, is a difference, {classifier: replicates})]: every row, then the first one minus each other one."""
    rows = {}
    for (name, column), replicates in results.items():
        rows.setdefault(name, {})[column] = replicates
    first, *others = rows
    return [(name, False, cells) for name, cells in rows.items()] + [
        (f"{first} - {name}", True, {column: rows[first][column] - other for column, other in rows[name].items()})
        for name in others]


def table(results, shots, chance):
    """Lines of the table for one number of shots: a block per score and three classifiers, a row per feature set."""
    rows, columns = lines_of(results), list(dict.fromkeys(column for _, column in results))
    lines = []
    for shown in (columns[start:start + 3] for start in range(0, len(columns), 3)):
        for i, score in enumerate(SCORES):
            title = f"{shots} shot{'s' * (shots > 1)}: {score}" + (f" (chance {chance:.3f})" if i == 0 else "")
            lines += ["", f"{title:42} " + "".join(f"{column:25}" for column in shown).rstrip()]
            for name, is_difference, cells in rows:
                if cells.keys() & {*shown}:
                    form = "{:+.3f} [{:+.3f}, {:+.3f}]" if is_difference else " {:.3f} [{:.3f}, {:.3f}]"
                    texts = (form.format(*interval(cells[column][i])) if column in cells else " -" for column in shown)
                    lines.append(f"  {shorten(name, 39):40}" + "".join(f"{text:25}" for text in texts).rstrip())
    return lines


def records(results, shots):
    for name, _, cells in lines_of(results):
        for column, replicates in cells.items():
            for i, score in enumerate(SCORES):
                estimate, low, high = interval(replicates[i])
                yield {"shots": shots, "features": name, "classifier": column, "score": score,
                       "estimate": estimate, "low": low, "high": high}


def what_tells(results, chance, partly):
    """results {(shots, row, classifier): replicates} of pixels outside the fan, partly (n,) bool: which images have
    any -> a sentence and a dict, whose verdict is "told", "not shown" or "cannot be tested".

    Told: the lower end of some row is above chance, in intervals that allow for so many rows (Bonferroni). If none is,
    that says little of a set where few images have an outside.
    """
    ends = {key: interval(replicates[0], 1 - 0.05 / len(results)) for key, replicates in results.items()}
    surest, best = (max(ends, key=lambda key: ends[key][place]) for place in (1, 0))
    n, outside = len(partly), int(partly.sum())
    if outside >= FEWEST_OUTSIDE and ends[surest][1] > chance + 1e-6:  # 1e-6: rounding
        verdict, key = "told", surest
    else:
        verdict, key = "not shown" if outside >= max(FEWEST_OUTSIDE, n / 2) else "cannot be tested", best
    estimate, low, high = ends[key]
    shots, row, column = key
    found = {"verdict": verdict, "images_with_outside": outside, "shots": shots, "features": row, "classifier": column,
             "estimate": estimate, "low": low, "high": high, "chance": chance}
    score = (f"balanced accuracy {estimate:.3f} [{low:.3f}, {high:.3f}] against chance {chance:.3f} ({row}, {column}, "
             f"{shots} shot{'s' * (shots > 1)}; interval widened for {len(results)} rows)")
    if verdict == "told":
        return (f"from pixels outside the ultrasound fan alone the label is told: {score}; callipers, text or the "
                f"machine's layout give it away"), found
    if verdict == "not shown":
        return (f"that pixels outside the ultrasound fan tell the label is not shown: at best {score}; up to "
                f"{high:.3f} is not ruled out"), found
    return (f"whether pixels outside the ultrasound fan tell the label cannot be tested: {outside} of {n} images have "
            f"any, and a verdict needs half of them and {FEWEST_OUTSIDE}"), found


def shots_png(path, results, chance, title):
    """Balanced accuracy against shots, a picture per classifier; results {(shots, row, classifier): replicates}."""
    columns = list(dict.fromkeys(column for *_, column in results))
    for column in columns:
        curves = {}
        for (shots, name, own), replicates in results.items():
            if own == column:
                curves.setdefault(name, []).append((shots, *interval(replicates[0])))
        stem, suffix = os.path.splitext(path)
        name = f"{stem}-{column.replace(' ', '_')}{suffix}" if len(columns) > 1 else path
        curves_png(name, curves, f"{title}: {column}", "shots", "balanced accuracy", chance)


def main(args):
    check_output(args.json, "--json", SCRIPT)
    if not os.access(os.path.dirname(args.png) or ".", os.W_OK):
        raise ValueError(f"--png {args.png}: its folder does not exist or cannot be written to")
    device = setup()[2]
    models, foreign = list_rows(args)
    img_size, like = common_network(models, args.img_size, DEFAULT_SIZE if args.data else PIXELS_SIDE)
    files = open_files(models, like, img_size, args.seed)
    every = [(name, file) for name, own in files.items() for file in own]
    loaded = [(name, file) for name, file in every if file.path is not None]

    # ---- data ----
    found, load = labelled_images(args, img_size)
    n, (names, labels) = len(found.labels), np.unique(found.labels, return_inverse=True)
    groups = np.unique(found.groups, return_inverse=True)[1]
    counts = group_confusion(labels, labels, groups, len(names), groups.max() + 1).diagonal(axis1=1, axis2=2)  # (G, K)
    for shots in args.shots:
        check_shots(counts, shots, names.tolist())
    vectors = {name: read_features(path, found.names) for name, path in foreign}
    show, partly = outside_fans(load, groups) if args.outside_fan else (None, None)

    # ---- features ----
    images = Images(n, load, show)
    squares = images.read({PIXELS_SIDE, *(file.size for _, file in every)})
    cache, rows = args.cache if args.data else None, {name: [] for name in files}  # phantoms take seconds
    for name, file in every:
        backbone, canvases = file.backbone.to(device), squares[file.size]
        rows[name].append((cached_features(backbone, file.info, canvases, args.batch_size, device, cache), file))
        file.backbone.cpu()
    first = every[0][1].info
    pixels = (torch.from_numpy(squares[PIXELS_SIDE]).float() / 255 - first["mean"]) / first["std"]  # (n, side, side)
    rows["pixels"] = [(pixels.flatten(1)[:, None], None)]  # (n, 1, side * side)
    rows.update({name: [(vector, None)] for name, vector in vectors.items()})

    # ---- what is known of the set ----
    named = groups_have_names(found.grouped_by)
    checkpoints = []
    for name, file in loaded:
        seen, line, _ = overlap(file.info["seen"], images.content, images.looks, found.groups if named else None)
        print(line if len(loaded) == 1 else f"{name}, {file.path}: {line}")
        checkpoints.append({"model": name, "path": file.path, "family": file.info["family"],
                            "sha256": file.info["digest"], "step": file.info["step"], "in_pretraining_set": seen})
    copies = len(set(zip(images.content.tolist(), groups.tolist()))) - len(set(images.content.tolist()))
    print(f"{n} images, {len(names)} classes, {len(counts)} groups by {found.grouped_by}, "
          f"{args.episodes} episodes; support and query share no group")
    if copies:
        print(f"{copies} copies of images lie in other groups, so support and query can share an image: group them")
    if args.outside_fan:
        print(f"outside the fan: {partly.sum()} of {n} images have pixels there; all models see nothing else"
              + ("; vectors of --features are as they come" if vectors else ""))
    if "finetune" in args.classifiers:
        print(f"fine-tuned: {min(args.episodes, args.finetune_episodes)} episodes, {args.finetune_steps} steps each")
    print("mean over episodes" + " and files" * any(len(own) > 1 for own in rows.values())
          + " [95 % interval: episodes and groups resampled together]")

    # ---- report ----
    results, all_records, chance = {}, [], 1 / len(names)
    for shots in args.shots:
        scored = evaluate(rows, squares, labels, groups, counts, shots, args, device)
        print("\n".join(table(scored, shots, chance)), flush=True)
        all_records += records(scored, shots)
        results.update({(shots, *key): replicates for key, replicates in scored.items()})
    verdict = None
    if args.outside_fan:
        own = {key: value for key, value in results.items() if key[1] not in vectors}
        sentence, verdict = what_tells(own, chance, partly)
        print(f"\n{sentence}")
    if args.data is None:
        print("\nphantom images: a smoke test of the code, no evidence about ultrasound")
    if len(args.shots) > 1:
        shots_png(args.png, results, chance, "outside the fan" if args.outside_fan else "few-shot")
    of_first = (checkpoints or [dict.fromkeys(("sha256", "step", "in_pretraining_set"))])[0]
    write_json(args.json, SCRIPT, args, device, {
        "results": all_records, "outside_fan": verdict,
        "checkpoint": {key: of_first[key] for key in ("sha256", "step")}, "checkpoints": checkpoints,
        "test_set": {"phantom": args.data is None, "images": n, "classes": names.tolist(), "groups": len(counts),
                     "grouped_by": found.grouped_by, "img_size": img_size,
                     "in_pretraining_set": of_first["in_pretraining_set"], "copies_across_groups": copies}})


if __name__ == "__main__":
    with clear_errors():
        main(get_args())
