"""Training one network on many tasks: the optimizer, whose turn it is, one step, predictions, validation, test."""

import concurrent.futures

import numpy as np
import torch
from torch import nn

from frames.packed import TURNS, philox
from kernels import all_reduce
from labelled.augment import normalise_only
from labelled.task_sets import blind_guess, guessed_mask
from model import draw_rescale
from networks.heads import boxes_of, build_network, points_of, start_from_shares, task_loss
from networks.moe import balance_loss, gate_shares
from runtime import autocast, flatten_parameters, parameter_groups
from scores.challenge import mask_values, values_of
from scores.metrics import confusion, dice, macro_f1, mask_counts, mean_ratio
from scores.multi_report import normalised_score
from training import segmenter
from training.optimizer import adamw, optimizer_step


# ---------------------------------------------------------------- network and optimizer

def build(backbone, tasks, shares, how, seed, device):
    """(network, gradients, AdamW). shares: of each task's classes in the train pixels, or None.

    gradients: {module: (its flat gradient, [(parameter, its place in it)])}, the modules being backbone, decoder and
    each task's part. Groups of the optimizer have is_backbone: whether pretraining made them, and so not the experts,
    whose copies are to part.
    """
    torch.manual_seed(seed)
    network = build_network(backbone, tasks, how).to(device).train()
    for part, share in zip(network.parts, shares):
        if share is not None:
            start_from_shares(part, share)
    modules = [module for module in (network.backbone, network.decoder, *network.parts) if module is not None]
    flat = [grads for _, grads in flatten_parameters(nn.ModuleList(modules))]
    gradients = {module: (grads, [(p, p.grad) for p in module.parameters() if p.requires_grad])
                 for module, grads in zip(modules, flat)}
    mixtures = [] if how["experts"] == 1 else [p for i in how["blocks"] for p in backbone.blocks[i].mlp.parameters()]
    pretrained = {*backbone.parameters()} - {*mixtures}
    groups = [{**group, "params": own, "is_backbone": where} for group in parameter_groups(network, 1.0, 1.0)
              for where in (True, False)
              if (own := [p for p in group["params"] if (p in pretrained) == where])]
    return network, gradients, adamw(groups)


def whose_turn(n_tasks, rounds, seed):
    """(rounds * n_tasks,): number of the task that each step serves. In a round every task has one turn, in random
    order: uniform sampling, and each task has the same number of steps whatever its company."""
    order = [philox(seed, number, TURNS).permutation(n_tasks) for number in range(rounds)]
    return np.concatenate(order)


# ---------------------------------------------------------------- one step

def draw_scales(network, limit, seed, step, rank):
    """DINOv3's rescaling of patch coordinates, for every block; None where it is off or positions are learned."""
    if network.backbone.pos != "rope":
        return None
    rng = np.random.default_rng(np.random.SeedSequence((seed, step, rank)))
    return draw_rescale(len(network.backbone.blocks), 1, limit, rng)


def train_step(network, gradients, optimizer, number, x, target, batch, share, args, rescale=None):
    """One AdamW step on a batch of task `number`; its loss, summed over processes: the mean over the `batch` images.

    share: of the learning rates. Heads, and the decoder, of which the task has no use have no gradient at all, so that
    AdamW leaves them, and what it remembers of them, as they are.
    """
    active = network.trained(number)
    for module, (_, pairs) in gradients.items():
        for p, grad in pairs:
            p.grad = grad if module in active else None
    with autocast(x.device, args.dtype):
        output, gates = network(x, number, rescale)
    loss = task_loss(network.tasks[number], output, target).sum() / batch
    total = loss
    if args.top_k and args.balance_weight and gates:
        total = loss + args.balance_weight * balance_loss(gates, args.top_k) * len(x) / batch
    optimizer_step(optimizer, total, [gradients[module][0] for module in active], float(share) * args.lr,
                   args.weight_decay, float(share) * args.backbone_lr, args.clip_grad)
    return all_reduce(loss.detach())


# ---------------------------------------------------------------- predictions

@torch.no_grad()
def predict(network, number, canvases, stats, device, dtype):
    """uint8 (b, S, S) -> (the head's output, float32, gate shares (L, E) or None)."""
    x = normalise_only(torch.from_numpy(canvases).to(device), *stats)
    with autocast(device, dtype):
        output, gates = network(x, number)
    return output.float(), gate_shares(gates) if gates else None


def as_shares(task, output):
    """A head's output -> float64 on the CPU: probabilities (b, K), boxes (b, 4) or points (b, K, 2), as shares."""
    if task.kind == "classification":
        return output.softmax(1).double().cpu().numpy()
    found = boxes_of(output)[0].clamp(0, 1) if task.kind == "detection" else points_of(output)[0]
    return found.double().cpu().numpy()


def in_pixels(task, shares, sizes):
    """Shares of boxes (m, 4) or points (m, K, 2) -> pixels of images of sizes (m, 2), width and height."""
    if task.kind == "classification":
        return shares
    return shares * (np.tile(sizes, 2) if task.kind == "detection" else sizes[:, None])


def run_rows(network, number, own, canvases, rows, stats, args, device, rank, world_size, finish):
    """Predict rows of a task, each process its share: finish(places in rows, output). Gate shares (L, E), the mean over
    images of all processes, or None without experts."""
    total, places = 0.0, np.array_split(np.arange(len(rows)), world_size)[rank]
    for start in range(0, len(places), args.eval_batch_size):
        part = places[start:start + args.eval_batch_size]
        output, shares = predict(network, number, canvases[own.images[rows[part]]], stats, device, args.dtype)
        finish(part, output)
        if shares is not None:
            total = total + shares.double() * len(part)
    first = next((block.mlp for block in network.backbone.blocks if hasattr(block.mlp, "gate")), None)
    if first is None:
        return None
    if not len(places):
        layers = sum(hasattr(block.mlp, "gate") for block in network.backbone.blocks)
        total = torch.zeros(layers, first.gate.out_features, dtype=torch.float64, device=device)
    return (all_reduce(total) / len(rows)).cpu().numpy()


# ---------------------------------------------------------------- validation and test

def gathered(values, device):
    """{name: array that is 0 where another process filled it} -> the whole ones."""
    return {name: all_reduce(torch.from_numpy(value).to(device)).cpu().numpy() for name, value in values.items()}


def validate(network, numbers, data, canvases, guesses, stats, args, device, rank, world_size):
    """({task: its primary score on validation}, mean normalised score, {task: gate shares}) of the tasks `numbers`, at
    the size of the canvases. guesses: {number: the primary score of the blind guess}."""
    network.eval()
    scores, normalised, gates = {}, [], {}
    for position, number in enumerate(numbers):
        task, own = data.tasks[number], data.per[number]
        values, shares = predicted_values(network, position, task, own, data, canvases, own.val, stats, args, device,
                                          rank, world_size)
        score = primary_score(task, values, labels_of(task, own, own.val))
        scores[task.name] = score
        normalised.append(float(normalised_score(task.kind, score, guesses[number])))
        if shares is not None:
            gates[task.name] = shares.tolist()
    network.train()
    return scores, float(np.mean(normalised)), gates


def labels_of(task, own, rows):
    return own.truth[rows] if task.kind == "classification" else None


def primary_score(task, values, labels):
    """What a task is judged by: mean Dice of the foreground classes, macro F1, mean IoU, or mean error in pixels."""
    if task.kind == "classification":
        return float(macro_f1(confusion(labels, values["probabilities"].argmax(1)[None], task.K))[0])
    if task.kind == "detection":
        return float(values["IoU"].mean())
    each = known_mean(values["Dice"].T if task.kind == "segmentation" else values["error"])  # of classes, of images
    return float(known_mean(each))


def known_mean(x):
    """Mean over the last axis of what is not nan."""
    return mean_ratio(np.nan_to_num(x), ~np.isnan(x))


def canvas_dice(truth, found, K):
    """Masks (b, S, S) on a device -> Dice of the foreground classes (b, K - 1), nan where the truth lacks one."""
    image = torch.arange(len(truth), device=truth.device)[:, None, None]
    cells = ((image * K + truth) * K + found).flatten()
    cells = torch.bincount(cells, minlength=len(truth) * K * K)
    table = cells.view(-1, K, K).cpu().numpy()  # truth x prediction
    counts = np.stack((table.diagonal(axis1=1, axis2=2), table.sum(2), table.sum(1)), 2)[:, 1:]  # (b, K - 1, 3)
    return known_dice(counts)


def known_dice(counts):
    """metrics.mask_counts (..., 3) -> Dice (...), nan where the truth lacks the class."""
    return np.where(counts[..., 1] > 0, dice(counts), np.nan)


def predicted_values(network, position, task, own, data, canvases, rows, stats, args, device, rank, world_size):
    """`values` of validation rows, as challenge.values_of has them but of segmentation Dice alone, and gate shares."""
    sizes = data.sizes[own.images[rows]]
    if task.kind == "segmentation":
        found = {"Dice": np.zeros((len(rows), task.K - 1))}

        def finish(part, output):
            truth = torch.from_numpy(own.target[rows[part]]).to(device)
            found["Dice"][part] = canvas_dice(truth, output.argmax(1), task.K)
    else:
        found = {"shares": np.zeros((len(rows), *own_shape(task)))}

        def finish(part, output):
            found["shares"][part] = as_shares(task, output)

    gates = run_rows(network, position, own, canvases, rows, stats, args, device, rank, world_size, finish)
    found = gathered(found, device)
    if task.kind != "segmentation":
        found = values_of(task, own.truth[rows], in_pixels(task, found["shares"], sizes))
    return found, gates


def own_shape(task):
    return {"classification": (task.K,), "detection": (4,), "regression": (task.K, 2)}[task.kind]


def test_values(network, position, task, own, data, canvases, stats, args, device, rank, world_size):
    """`values` (challenge.py) of the test rows, masks at each image's own size, and gate shares (L, E) or None."""
    if task.kind != "segmentation":
        return predicted_values(network, position, task, own, data, canvases, own.test, stats, args, device, rank,
                                world_size)
    found = {}

    def score(row, logits):
        truth = own.truth[own.test[row]]
        mask_scores = mask_values(truth, segmenter.at_own_size(logits, *truth.shape), task.K)
        for name, value in mask_scores.items():
            found[name][row] = value

    for name in ("DSC", "HD", "Dice", "HD95"):
        found[name] = np.zeros((len(own.test), task.K - 1))
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        gates = run_rows(network, position, own, canvases, own.test, stats, args, device, rank, world_size,
                         lambda part, output: list(pool.map(score, part, output)))
    return gathered(found, device), gates


def guessed_score(task, own, data):
    """The primary score of the blind guess on validation, masks as squashed."""
    return primary_score(task, guess_values(task, own, data, own.val, False), labels_of(task, own, own.val))


def guess_values(task, own, data, rows, own_size):
    """`values` of the blind guess on rows, of segmentation Dice alone; masks at their own size, or as squashed."""
    guess, sizes = blind_guess(task, own), data.sizes[own.images[rows]]
    if task.kind != "segmentation":
        shares = np.broadcast_to(guess, (len(rows), *guess.shape))
        return values_of(task, own.truth[rows], in_pixels(task, shares, sizes))
    if not own_size:
        guess = torch.from_numpy(guess)[None].expand(len(rows), -1, -1)
        return {"Dice": canvas_dice(torch.from_numpy(own.target[rows]), guess.long(), task.K)}
    truths = (own.truth[row] for row in rows)
    counts = np.stack([mask_counts(truth, guessed_mask(guess, *truth.shape), task.K) for truth in truths])[:, 1:]
    return {"Dice": known_dice(counts)}
