"""Training a backbone with a segmentation decoder: the network, its loss and schedule, one step, predictions, scores.

After UltraDINO's released segmentation code as it was configured (UPerNet, cross-entropy plus Dice, polynomial decay;
AdamW), without what kept its settings from having an effect. The network is in networks/decoders.py.
"""

import concurrent.futures
import hashlib
import os

import numpy as np
import torch
import torch.nn.functional as F

from frames.packed import AUGMENT, BatchRows, image_order, philox
from kernels import all_reduce
from labelled.augment import augment_pair, draw_affine, draw_augment, normalise_only
from labelled.mask_codes import mask_name
from model import VisionTransformer
from networks.decoders import LEAST_SHARE, LinearDecoder, Segmenter, UPerNet
from networks.weights import load_strict
from runtime import autocast, load_checkpoint
from scores.exchange import write_mask
from scores.metrics import MASK_SCORES, dice, head_circumference, mask_scores
from training.optimizer import build_optimizer, optimizer_step

DICE_EPS = 1e-3  # mmseg's, for each of the two sums of squares
FIRST_LR = 1e-6  # share of the learning rate that the warm-up starts from


# ---------------------------------------------------------------- network

def make_decoder(how, dim, n_classes):
    """how: dict(name, channels, norm), as a checkpoint keeps it."""
    if how["name"] == "linear":
        return LinearDecoder(dim, n_classes)
    return UPerNet(dim, n_classes, how["channels"], how["norm"])


def build(backbone, how, shares, frozen, seed, layer_decay, device):
    """(network, flat gradients, AdamW) for a fresh decoder on `backbone`.

    shares (K,): of the train pixels, what each class has; the decoder starts from them (Lin et al. 2017, section 3.3).
    Else the first hundreds of steps only learn that most pixels are background, and switch features off for it.
    """
    torch.manual_seed(seed)
    network = Segmenter(backbone, make_decoder(how, backbone.embed_dim, len(shares)), frozen).to(device).train()
    with torch.no_grad():
        network.decoder.classifier.bias.copy_(torch.from_numpy(np.log(np.maximum(shares, LEAST_SHARE))))
    return network, *build_optimizer(network, layer_decay)


def open_segmenter(path, device):
    """What finetune_seg.py saved -> (network in eval mode, its checkpoint); ValueError for any other file."""
    saved = load_checkpoint(path)
    if not {"decoder", "classes", "config", "head"} <= saved.keys():
        raise ValueError(f"{path}: no finished run of finetune_seg.py: it has no decoder")
    if "timm" in saved["config"]:
        raise ValueError(f"{path}: its backbone is timm's, which this command cannot build")
    backbone = VisionTransformer(**{**saved["config"], "in_chans": 1, "drop_path_rate": 0.0})
    network = Segmenter(backbone, make_decoder(saved["decoder"], backbone.embed_dim, len(saved["classes"])))
    load_strict(network, {**saved["teacher"], **saved["head"]}, path)
    return network.to(device).eval(), saved


# ---------------------------------------------------------------- loss and schedule

def segmentation_loss(logits, masks, dice_weight):
    """Cross-entropy plus dice_weight times Dice loss of each image: logits (b, K, h, w), masks int64 (b, h, w) -> (b,).

    The Dice is mmseg's default, V-Net's form (Milletari et al. 2016, equation 3) over sigmoid probabilities, classes
    and pixels of an image in one sum: 1 - 2 sum(p t) / (sum(p^2) + sum(t^2)).
    """
    ce = F.cross_entropy(logits, masks, reduction="none").mean((1, 2))  # (b,)
    if not dice_weight:
        return ce
    p = logits.sigmoid()
    own = p.gather(1, masks[:, None])  # (b, 1, h, w): p where t is 1
    squares = p.square().sum((1, 2, 3)) + masks[0].numel() + 2 * DICE_EPS  # of t, one class a pixel: the pixels
    return ce + dice_weight * (1 - 2 * own.sum((1, 2, 3)) / squares)


def learning_rates(lr, steps, warmup_steps):
    """(steps,): linear warm-up from 1e-6 lr, then linear to 0 (polynomial of power 1), step by step."""
    warmup = lr * np.linspace(FIRST_LR, 1, warmup_steps, endpoint=False)
    return np.concatenate((warmup, lr * (1 - np.arange(steps - warmup_steps) / (steps - warmup_steps))))


# ---------------------------------------------------------------- one step

def batches(groups, seed, steps, batch):
    """Yield which train images the whole batch of each of `steps`, a range, holds (batch,): epochs in a random order
    one after the other, without a break, so that a batch may be larger than the train set."""
    orders = {}
    for step in steps:
        places = np.arange(step * batch, (step + 1) * batch)
        epochs = places // len(groups)
        orders = {epoch: orders[epoch] if epoch in orders else image_order(groups, seed, epoch)
                  for epoch in np.unique(epochs).tolist()}
        yield np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places % len(groups))])


def make_batch(canvases, masks, own, seed, step, batch, args, stats, device):
    """A rank's part `own` (a slice) of the batch, augmented: x (b, 1, S, S), masks int64 (b, S, S).

    canvases and masks uint8 (b, S, S) are of that part; the draws are those of the whole batch.
    """
    images, masks = torch.from_numpy(canvases).to(device), torch.from_numpy(masks).to(device)
    if not args.augment:
        return normalise_only(images, *stats), masks.long()
    rng = BatchRows(philox(seed, step, AUGMENT), batch, np.arange(batch)[own])
    draws = {**draw_augment(rng, len(images)), "affine": draw_affine(rng, len(images))}
    draws = {key: torch.from_numpy(value).to(device) for key, value in draws.items()}
    x, masks = augment_pair(images, masks, draws, *stats)
    return x, masks.long()


def draw_drops(network, images, side, seed, step, rank):
    """What the network leaves out for a rank's part of a batch: drop path and the decoder's channels, or None."""
    rng, backbone = np.random.default_rng(np.random.SeedSequence((seed, step, rank))), network.backbone
    drops = None
    if getattr(backbone, "drop_path_rate", 0) and not network.frozen:
        N = 1 + backbone.num_register_tokens + (-(-side // backbone.patch_size)) ** 2
        drops = backbone.draw_drop_path([(images, N)], rng)
    keep = network.decoder.draw_dropout(images, rng) if hasattr(network.decoder, "draw_dropout") else None
    return drops, keep


def train_step(network, gradients, optimizer, x, masks, batch, lr, args, drops=None, keep=None):
    """One AdamW step; the loss, summed over processes: the mean over the `batch` images."""
    with autocast(x.device, args.dtype):
        logits = network(x, drops, keep)
    loss = segmentation_loss(logits.float(), masks, args.dice_weight).sum() / batch
    optimizer_step(optimizer, loss, gradients, lr, args.weight_decay)
    return all_reduce(loss.detach())


# ---------------------------------------------------------------- predictions

@torch.no_grad()
def predict_logits(network, canvases, stats, device, dtype):
    """uint8 (b, S, S) -> float32 logits (b, K, S, S) on the device."""
    x = normalise_only(torch.from_numpy(canvases).to(device), *stats)
    with autocast(device, dtype):
        return network(x).float()


def at_own_size(logits, height, width):
    """Logits (K, S, S) of a squashed image -> its mask uint8 (height, width): bilinear, then the largest."""
    logits = F.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]
    return logits.argmax(0).to(torch.uint8).cpu().numpy()


def validate(network, canvases, masks, images, n_classes, stats, batch_size, device, dtype, rank=0, world_size=1):
    """Pooled Dice of `images`, indices into canvases and masks uint8 (n, S, S), at their size: the mean over the
    foreground classes that the masks show, so that a class which validation lacks does not choose the step.

    Each process looks at its share of the images.
    """
    network.eval()
    own = np.array_split(images, world_size)[rank]
    table = torch.zeros(n_classes * n_classes, dtype=torch.int64, device=device)  # truth x prediction
    for start in range(0, len(own), batch_size):
        part = own[start:start + batch_size]
        found = predict_logits(network, canvases[part], stats, device, dtype).argmax(1)  # (b, S, S)
        truth = torch.from_numpy(masks[part]).to(device).long()
        table += torch.bincount((truth * n_classes + found).flatten(), minlength=n_classes * n_classes)
    network.train()
    table = all_reduce(table).view(n_classes, n_classes).cpu().numpy()
    counts = np.stack((table.diagonal(), table.sum(1), table.sum(0)), 1)  # (K, 3)
    return float(dice(counts[1:][counts[1:, 1] > 0]).mean())


# ---------------------------------------------------------------- scores at each image's own size

def digest_of_scores(data, tolerance):
    """Of what scores depend on beside the masks: a run that was scored otherwise is scored again."""
    texts = [None if x is None else x[data.test].tolist() for x in (data.mm, data.measured)] + [tolerance, data.classes]
    return hashlib.sha256(repr(texts).encode()).hexdigest()


def empty_scores(data):
    n, K = len(data.test), len(data.classes)
    scores = {"counts": np.zeros((n, K, 3), np.int64), **{name: np.zeros((n, K)) for name in MASK_SCORES}}
    return scores if data.measured is None else {**scores, "circumference": np.zeros(n)}


def score(scores, row, truth, mask, data, tolerance):
    """Fill in what the mask of test image `row`, at its own size, is worth."""
    mm = None if data.mm is None else tuple(data.mm[data.test[row]])
    scores["counts"][row], values = mask_scores(truth, mask, len(data.classes), mm, tolerance)
    for name in MASK_SCORES:
        scores[name][row] = values[name]
    if data.measured is not None:
        scores["circumference"][row] = head_circumference(mask == 1, mm)


def score_network(network, data, canvases, stats, args, folder, device, rank, world_size):
    """Scores of the test images, whose masks are written into `folder`; each process does its share."""
    network.eval()
    scores, own = empty_scores(data), np.array_split(np.arange(len(data.test)), world_size)[rank]

    def finish(row, logits):
        i = data.test[row]
        truth = data.truth(i)
        mask = at_own_size(logits, *truth.shape)
        write_mask(mask_path(folder, data.names[i]), mask, data.classes)
        score(scores, row, truth, mask, data, args.tolerance)

    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        for start in range(0, len(own), args.eval_batch_size):
            rows = own[start:start + args.eval_batch_size]
            logits = predict_logits(network, canvases[data.test[rows]], stats, device, args.dtype)
            list(pool.map(finish, rows, logits))
    network.train()
    return {name: all_reduce(torch.from_numpy(values).to(device)).cpu() for name, values in scores.items()}


def mask_path(folder, name):
    return os.path.join(folder, mask_name(name))


def score_files(read, data, args):
    """Scores of anyone's masks: read(row) -> uint8 (h, w) of a test image."""
    scores = empty_scores(data)
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        list(pool.map(lambda row: score(scores, row, data.truth(data.test[row]), read(row), data, args.tolerance),
                      range(len(data.test))))
    return {name: torch.from_numpy(values) for name, values in scores.items()}


def own_circumference(data):
    """How far the test set's own masks are from the circumferences measured by hand, in words."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        found = list(pool.map(lambda i: head_circumference(data.truth(i) == 1, tuple(data.mm[i])), data.test))
    errors = np.array(found) - data.measured[data.test]
    return f"bias {np.nanmean(errors):+.2f} mm, mean absolute error {np.nanmean(np.abs(errors)):.2f} mm"


def stack(runs):
    """Scores of several runs -> what compare_masks takes."""
    found = {name: np.stack([run[name].numpy() for run in runs]) for name in runs[0]}
    return {"values": {name: found.pop(name) for name in MASK_SCORES}, **found}
