"""Few-shot test of a frozen backbone: how much do k labelled images per class teach, using its features as they are?

Three feature sets (the checkpoint, the same network at random initialisation, raw pixels) meet three classifiers on the
same episodes. An episode draws k support images per class, from k patients where there are that many, and is scored on
every image of all other patients. Beyond both papers: they report fine-tuning only.

    python fewshot.py                                     # last.pt on phantom planes, a smoke test
    python fewshot.py --ckpt last.pt --shots 5
    python fewshot.py --data DATA/labels.csv --exclude '*_mask.png' --shots 1 5 20
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import sys

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from tqdm import tqdm

import phantom
from images import Frame, dicom_groups, list_images, load_frame, resize_square
from leakage import WORDS, content_hash, overlap, perceptual_hash
from metrics import balanced_accuracy, bootstrap, group_confusion, interval, macro_f1, resampling_weights
from model import VisionTransformer
from runtime import clear_errors, git_commit, setup
from weights import load_backbone

SCORES = {"balanced accuracy": balanced_accuracy, "macro F1": macro_f1}
PHANTOM_SEED, PHANTOM_IMAGES = 1_000_000, 1200  # pretraining draws its phantoms from --seed: no image is in both
PIXELS_SIDE = 64  # of the pixel baseline; more is slower and no better


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    # test set
    add("--data", help="folder with a folder per class, or CSV image,label[,group]; default: phantom planes")
    add("--exclude", nargs="+", default=[], metavar="GLOB", help="leave out names that match, e.g. '*_mask.png'")
    add("--group_regex", help="first capture in an image's name is its patient, clip or examination")
    # features
    add("--ckpt", default="last.pt", help="last.pt of pretrain.py, a DINOv2 or an UltraDINO file")
    add("--img_size", type=int, help="side the images are resized to; default: what the checkpoint was trained at")
    add("--batch_size", type=int, default=64, help="images per forward pass; lower it when memory runs out")
    # protocol
    add("--shots", type=int, nargs="+", default=[1, 5], metavar="N", help="support images per class")
    add("--episodes", type=int, default=100, help="support draws per number of shots; more narrow the interval")
    add("--C", type=inverse_penalty, default=1.0, metavar="C",
        help="logistic regression's inverse L2 penalty, or 'support': cross-validated on each support set")
    add("--seed", type=int, default=0, help="of episodes, random initialisation and bootstrap")
    add("--json", default="fewshot.json", help="where all numbers go beside the table")
    args = parser.parse_args(argv)
    if min(args.shots + [args.episodes, args.batch_size, args.img_size or 1, args.seed + 1]) < 1:
        parser.error("--shots, --episodes, --batch_size and --img_size must be at least 1, --seed at least 0")
    if args.data is None and (args.exclude or args.group_regex):
        parser.error("--exclude and --group_regex need --data: the phantom planes have no file names")
    args.shots = list(dict.fromkeys(args.shots))
    return args


def inverse_penalty(text):
    if text == "support":
        return text
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a positive number or 'support'")
    return value


# ---------------------------------------------------------------- images and features

def read_image(path):
    try:
        return load_frame(path)
    except Exception as error:  # whatever a decoder raises: a labelled test set must be whole
        raise ValueError(f"{path}: cannot be read ({error}); repair it, or leave it out with --exclude") from error


def labelled_images(args, img_size):
    """(n, function from index to images.Frame, label strings, group strings, how groups were found)."""
    if args.data is None:
        # at least the 64 pixels of pretraining's phantoms: finer speckle would be another kind of image
        images, labels, groups = phantom.phantom_images(PHANTOM_IMAGES, size=max(img_size, PIXELS_SIDE), seed=PHANTOM_SEED)
        return (len(images), lambda i: Frame(images[i], images[i]), [phantom.PLANES[label] for label in labels], groups,
                "phantom patient")
    listed = dicom_groups(list_images(args.data, args.exclude, args.group_regex, labelled=True))
    return len(listed.paths), lambda i: read_image(listed.paths[i]), listed.labels, listed.groups, listed.grouped_by


def extract(n, load, img_size, backbones, mean, std, batch_size, device):
    """Load every image once -> float32 features (n, d), one matrix per backbone and one of pixels; leakage.py's hashes
    of pixels (n,) and of looks (n, WORDS), uint64."""
    mean, std = (torch.tensor(value, dtype=torch.float32).view(1, -1, 1, 1) for value in (mean, std))
    features, content, looks = [[] for _ in range(len(backbones) + 1)], [], []
    with concurrent.futures.ThreadPoolExecutor(max_workers=8) as pool:  # decoding leaves Python's lock
        for start in tqdm(range(0, n, batch_size), desc="features", disable=not sys.stderr.isatty(), leave=False):
            frames = list(pool.map(load, range(start, min(start + batch_size, n))))
            content += [content_hash(frame.whole) for frame in frames]
            looks += [perceptual_hash(frame.whole) for frame in frames]
            images = [frame.grey for frame in frames]
            canvases = [resize_square(image, img_size) for image in images]
            x = normalise(canvases, mean, std)  # (B, 1 or 3, h, w)
            for rows, backbone in zip(features, backbones):
                rows.append(embed(backbone, x.expand(-1, backbone.in_chans, -1, -1).to(device)).cpu())
            thumbnails = [resize_square(image, PIXELS_SIDE) for image in images]
            features[-1].append(normalise(thumbnails, mean.mean(), std.mean()).flatten(1))  # (B, side * side)
    return [torch.cat(rows) for rows in features], np.array(content, np.uint64), np.array(looks).reshape(n, WORDS)


def normalise(canvases, mean, std):
    return (torch.from_numpy(np.stack(canvases))[:, None].float() / 255 - mean) / std  # (B, 1, h, w)


@torch.no_grad()
def embed(backbone, x):
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        tokens = backbone.forward_features(x)
    return torch.cat((tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"].mean(1)), dim=1).float()  # (B, 2C)


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


# ---------------------------------------------------------------- classifiers: x (n, d), support (E, K, k) -> (E, n)

def nearest_mean(x, support):
    """Class of the nearest mean of L2-normalised support features."""
    x, predictions = F.normalize(x, dim=1), []
    for rows in support:  # (K, k)
        means = x[rows].mean(1)  # (K, d)
        predictions.append((x @ means.T - means.square().sum(1) / 2).argmax(1))  # |x - m|^2 without |x|^2
    return torch.stack(predictions)


def nearest_neighbours(x, support, temperature=0.07):
    """The min(k, 5) support images of largest cosine vote with weight exp(cosine / temperature), as in DINO."""
    x, predictions = F.normalize(x, dim=1), []
    K, k = support.shape[1:]
    for rows in support:
        cosines, nearest = (x @ x[rows.flatten()].T).topk(min(k, 5), dim=1)  # (n, min(k, 5))
        votes = x.new_zeros(len(x), K).scatter_add_(1, nearest // k, (cosines / temperature).exp())  # (n, K)
        predictions.append(votes.argmax(1))
    return torch.stack(predictions)


def logistic_regression(x, support, C):
    """Multinomial logistic regression on features standardised by the support set, as `fit_logistic` fits it."""
    x = x.double()
    C = choose_C(x, support) if C == "support" else torch.tensor(C, dtype=torch.float64)
    weight, bias = fit_logistic(x, support, C.expand(len(support)))
    return torch.stack([(x @ w + b).argmax(1) for w, b in zip(weight, bias)])


def fit_logistic(x, support, C):
    """Minimise |W|^2 / 2 + C * cross-entropy on E support sets: weights (E, d, K), biases (E, K) for float64 x as is.

    |W| is of standardised features; this is scikit-learn's LogisticRegression(C) after StandardScaler, with a C (E,)
    for each set. The best W is a combination of the support rows (a part of W orthogonal to them costs penalty and
    changes no logit), so it is found exactly in their span, of at most K * k dimensions instead of d.
    """
    E, K, k = support.shape
    limit = max(1, 2 ** 24 // (K * k * x.shape[1]))  # episodes at a time, for memory
    if E > limit:
        parts = [fit_logistic(x, rows, c) for rows, c in zip(support.split(limit), C.split(limit))]
        return tuple(torch.cat(part) for part in zip(*parts))
    z = x[support.flatten(1)]  # (E, S, d), S = K * k rows sorted by class
    center, scale = z.mean(1, keepdim=True), z.std(1, correction=0, keepdim=True)  # (E, 1, d)
    scale = torch.where(scale > 1e-6 * (1 + center.abs()), scale, 1.0)  # a constant feature stays zero
    # two classes: scikit-learn has one weight vector for both, which is penalised half as much as softmax's two
    root = (C / 2 if K == 2 else C).sqrt().view(-1, 1, 1)
    basis, coordinates = torch.linalg.qr(((z - center) / scale).mT)  # (E, d, r), (E, r, S)
    z = root * coordinates.mT  # (E, S, r): in units of W / sqrt(C) the penalty has curvature one whatever C is
    z = torch.cat((z, torch.ones_like(z[..., :1])), dim=2)  # (E, S, r + 1), the bias last
    ridge = torch.ones(z.shape[2], 1, dtype=torch.float64)
    ridge[-1] = 0  # the bias is not penalised
    solution = minimise(z, torch.eye(K, dtype=torch.float64).repeat_interleave(k, dim=0), ridge)  # (E, r + 1, K)
    weight = basis @ (root * solution[:, :-1]) / scale.mT  # (E, d, K)
    return weight, solution[:, -1] - (center @ weight)[:, 0]


def minimise(z, targets, ridge):
    """Newton's method for cross-entropy(z @ w, targets) + ridge * w^2 / 2 of E problems side by side: w (E, r, K).

    Steps come from conjugate gradients: no Hessian is stored, and a step shrinks until its problem's loss falls.
    """
    def loss(w):
        logits = z @ w  # (E, S, K)
        return (logits.logsumexp(2) - (logits * targets).sum(2)).sum(1) + (ridge * w * w).sum((1, 2)) / 2  # (E,)

    w = z.new_zeros(len(z), z.shape[2], targets.shape[1])
    for _ in range(100):
        p = (z @ w).softmax(2)  # (E, S, K)
        gradient = z.mT @ (p - targets) + ridge * w
        if gradient.abs().max() < 1e-8:
            return w

        def curvature(v):  # Hessian times v
            v_logits = p * (z @ v)
            return z.mT @ (v_logits - p * v_logits.sum(2, keepdim=True)) + ridge * v

        step = conjugate_gradients(curvature, gradient)
        before, slope, size = loss(w), (gradient * step).sum((1, 2)), z.new_ones(len(z))
        for _ in range(30):
            after = loss(w - size.view(-1, 1, 1) * step)
            uphill = after > before - 1e-4 * size * slope + 1e-12 * before.abs()  # rounding is no ascent
            if not uphill.any():
                break
            size[uphill] /= 2
        w = w - size.view(-1, 1, 1) * step
    raise ValueError(f"logistic regression did not converge (gradient {gradient.abs().max():.0e}): lower --C")


def conjugate_gradients(matrix, right, iterations=200):
    """Solve matrix(x) = right for symmetric positive semi-definite operators on (E, r, K), to a thousandth."""
    def dot(a, b):
        return (a * b).sum((1, 2), keepdim=True)  # (E, 1, 1)

    x, residual = torch.zeros_like(right), right
    direction, square = right, dot(right, right)
    goal = (1e-6 * square).clamp(min=1e-20)
    for _ in range(iterations):
        active = square > goal  # a solved system stands still: what is left of its residual is rounding
        if not active.any():
            break
        product = matrix(direction)
        size = torch.where(active, square / dot(direction, product), 0)
        x, residual = x + size * direction, residual - size * product
        square, old = torch.where(active, dot(residual, residual), square), square
        direction = residual + square / old * direction
    return x


def choose_C(x, support, candidates=10.0 ** np.arange(-4, 4)):
    """Per episode the C of the least cross-entropy on left-out support images, (E,); 1 where a class has one image.

    min(k, 5) folds, each leaving out the same number of images of every class. Where a class has fewer than k
    patients, folds share patients, and C comes out large; the scores are still of other patients.
    """
    E, K, k = support.shape
    if k == 1:
        return torch.ones(E, dtype=torch.float64)
    losses = torch.zeros(len(candidates), E, dtype=torch.float64)
    targets = torch.arange(K)[:, None]
    for fold in range(min(k, 5)):
        out = torch.arange(k) % min(k, 5) == fold
        held = x[support[:, :, out].flatten(1)]  # (E, K * left out, d)
        for i, C in enumerate(candidates):
            weight, bias = fit_logistic(x, support[:, :, ~out], torch.full((E,), C, dtype=torch.float64))
            logits = held @ weight + bias[:, None]  # (E, K * left out, K)
            labels = targets.expand(K, int(out.sum())).flatten().expand(E, -1)
            losses[i] += F.cross_entropy(logits.mT, labels, reduction="none").sum(1)
    return torch.from_numpy(candidates)[losses.argmin(0)]


# ---------------------------------------------------------------- scores

def evaluate(features, labels, groups, counts, shots, args):
    """{(feature set, classifier): replicates (scores, 1 + R)}, also for the differences of feature sets."""
    classifiers = {"nearest mean": nearest_mean, "k-NN": nearest_neighbours,
                   "logreg": lambda x, support: logistic_regression(x, support, args.C)}
    drawn = [draw_episode(labels, groups, counts, shots, args.seed, i) for i in range(args.episodes)]
    support, query = zip(*drawn)
    support, query = torch.from_numpy(np.stack(support)), np.stack(query)  # (E, K, k), (E, n)
    G, K = counts.shape
    weights = resampling_weights(args.episodes, G, args.seed)  # the same for all: differences are paired
    results = {}
    for name, x in features.items():
        for classifier, predict in classifiers.items():
            predictions = np.where(query, predict(x, support).numpy(), -1)  # (E, n)
            confusions = group_confusion(labels, predictions, groups, K, G)  # (E, G, K, K)
            results[name, classifier] = bootstrap(confusions, weights, SCORES.values())
    first, *baselines = features
    for name in baselines:
        for classifier in classifiers:
            results[f"{first} - {name}", classifier] = results[first, classifier] - results[name, classifier]
    return results


def table(results, shots, chance):
    """Lines of the table for one number of shots: a block per score, a row per feature set, a column per classifier."""
    rows, columns = (list(dict.fromkeys(key[i] for key in results)) for i in (0, 1))
    lines = []
    for i, score in enumerate(SCORES):
        title = f"{shots} shot{'s' * (shots > 1)}: {score}" + (f" (chance {chance:.3f})" if i == 0 else "")
        lines += ["", f"{title:43}" + "".join(f"{column:25}" for column in columns).rstrip()]
        for row in rows:
            form = "{:+.3f} [{:+.3f}, {:+.3f}]" if " - " in row else " {:.3f} [{:.3f}, {:.3f}]"
            cells = (form.format(*interval(results[row, column][i])) for column in columns)
            lines.append(f"  {row:40}" + "".join(f"{cell:25}" for cell in cells).rstrip())
    return lines


def records(results, shots):
    for (name, classifier), replicates in results.items():
        for i, score in enumerate(SCORES):
            estimate, low, high = interval(replicates[i])
            yield {"shots": shots, "features": name, "classifier": classifier, "score": score,
                   "estimate": estimate, "low": low, "high": high}


# ---------------------------------------------------------------- report

def check_json(path):
    """Fail before the work, not after it; an earlier fewshot.json may be overwritten, nothing else may."""
    if not os.access(os.path.dirname(path) or ".", os.W_OK):
        raise ValueError(f"--json {path}: its folder does not exist or cannot be written to")
    if os.path.exists(path):
        try:
            with open(path, encoding="utf-8") as file:
                own = json.load(file).get("written_by") == "fewshot.py"
        except (OSError, ValueError, AttributeError):
            own = False
        if not own:
            raise ValueError(f"--json {path}: exists and was not written by fewshot.py; name another file")


def file_digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def main(args):
    check_json(args.json)
    device = setup()[2]
    backbone, info = load_backbone(args.ckpt)
    img_size = args.img_size or info["img_size"]
    if img_size % backbone.patch_size:
        raise ValueError(f"--img_size {img_size}: must be a multiple of the patch size {backbone.patch_size}")
    torch.manual_seed(args.seed)
    random_backbone = VisionTransformer(**info["config"]).eval()

    # ---- data ----
    n, load, labels, group_names, grouped_by = labelled_images(args, img_size)
    names, labels = np.unique(labels, return_inverse=True)
    groups = np.unique(group_names, return_inverse=True)[1]
    counts = group_confusion(labels, labels, groups, len(names), groups.max() + 1).diagonal(axis1=1, axis2=2)  # (G, K)
    for shots in args.shots:
        check_shots(counts, shots, names.tolist())

    # ---- features ----
    backbones = [backbone.to(device), random_backbone.to(device)]
    features, content, looks = extract(n, load, img_size, backbones, info["mean"], info["std"], args.batch_size, device)
    features = dict(zip(("pretrained", "random init", "pixels"), features))
    if not all(x.isfinite().all() for x in features.values()):
        raise ValueError(f"{args.ckpt}: features are not finite, its pretraining diverged; take an earlier checkpoint")
    named = grouped_by.startswith(("group column", "--group_regex", "DICOM"))  # a folder's name elsewhere tells nothing
    seen, seen_line, _ = overlap(info["seen"], content, looks, group_names if named else None)
    copies = len(set(zip(content.tolist(), groups.tolist()))) - len(set(content.tolist()))

    # ---- report ----
    print(seen_line)
    print(f"{n} images, {len(names)} classes, {len(counts)} groups by {grouped_by}, "
          f"{args.episodes} episodes; support and query share no group")
    if copies:
        print(f"{copies} copies of images lie in other groups, so support and query can share an image: group them")
    print("mean over episodes [95 % interval: episodes and groups resampled together]")
    all_records = []
    for shots in args.shots:
        results = evaluate(features, labels, groups, counts, shots, args)
        print("\n".join(table(results, shots, 1 / len(names))))
        all_records += records(results, shots)
    if args.data is None:
        print("\nphantom images: a smoke test of the code, no evidence about ultrasound")
    report = {"written_by": "fewshot.py", "args": vars(args), "device": str(device), "results": all_records,
              "checkpoint": {"sha256": file_digest(args.ckpt), "step": info["step"]},
              "test_set": {"phantom": args.data is None, "images": n, "classes": names.tolist(),
                           "groups": len(counts), "grouped_by": grouped_by, "img_size": img_size,
                           "in_pretraining_set": seen, "copies_across_groups": copies},
              "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__,
                           "pillow": PIL.__version__, "commit": git_commit()}}
    with open(args.json + ".tmp", "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1, allow_nan=False)
    os.replace(args.json + ".tmp", args.json)


if __name__ == "__main__":
    with clear_errors():
        main(get_args())
