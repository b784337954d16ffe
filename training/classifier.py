"""Fine-tuning a whole backbone with a classification head: the network, one step, predictions.

After UltraDINO's released classification code as it was configured (class token, batch norm without weights, linear
layer; AdamW, mixup and cutmix, soft targets), without what kept its settings from having an effect.
"""

import numpy as np
import torch
from torch import nn

from frames.packed import AUGMENT, MIX, BatchRows, image_order, philox
from kernels import all_reduce
from labelled.augment import augment, draw_augment, draw_mix, mix, normalise_only, soft_targets
from runtime import autocast, cosine_schedule
from training.optimizer import build_optimizer, optimizer_step


class SumOverRanks(torch.autograd.Function):
    """The sum of x over all processes; the gradient, too, is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone())


class Head(nn.Module):
    """Features (b, C) -> logits (b, K): batch norm over the whole batch of all processes, without weights, and a linear
    layer. The norm makes one learning rate fit backbones whose features differ in scale."""

    def __init__(self, dim, n_classes, eps=1e-6, momentum=0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.linear = nn.Linear(dim, n_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if not self.training:
                mean, var = self.running_mean, self.running_var
            else:
                B = SumOverRanks.apply(x.new_tensor(float(len(x))))
                mean = SumOverRanks.apply(x.sum(0)) / B  # (C,)
                var = SumOverRanks.apply((x - mean).square().sum(0)) / B
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_var.lerp_(var * B / (B - 1).clamp(min=1), self.momentum)
            return self.linear((x - mean) * (var + self.eps).rsqrt())  # (b, K)


class Classifier(nn.Module):
    def __init__(self, backbone, n_classes):
        super().__init__()
        self.backbone, self.head = backbone, Head(backbone.embed_dim, n_classes)

    def forward(self, x, drops=None):
        features = self.backbone.forward_features(x, drops=drops) if drops else self.backbone.forward_features(x)
        return self.head(features["x_norm_clstoken"])


def build(backbone, n_classes, seed, layer_decay, device):
    """(network, flat gradients, AdamW) for a fresh head on `backbone`."""
    torch.manual_seed(seed)
    network = Classifier(backbone, n_classes).to(device).train()
    return network, *build_optimizer(network, layer_decay)


def learning_rates(args, steps, per_epoch):
    """(steps,): linear warm-up over --warmup_epochs, then cosine to 0, step by step."""
    return cosine_schedule(args.lr, 0.0, steps, min(round(args.warmup_epochs * per_epoch), steps // 2))


def batches(groups, seed, steps, batch):
    """Yield which train images the whole batch of each of `steps`, a range, holds (batch,): epochs in a random order,
    siblings spread apart; the rest of an epoch that fills no batch is left out of it."""
    for step in steps:
        epoch, place = divmod(step, len(groups) // batch)
        if place == 0 or step == steps.start:
            order = image_order(groups, seed, epoch)
        yield order[place * batch:(place + 1) * batch]


def share(batch, rank, world_size):
    """A rank's part of a batch: whole pairs, since neighbours are mixed with each other."""
    first, end = (2 * (-(-batch // 2) * part // world_size) for part in (rank, rank + 1))
    return slice(first, min(end, batch))


def make_batch(canvases, labels, own, seed, step, batch, n_classes, args, stats, device):
    """Images of a rank's part `own` (a slice) of the batch, augmented and mixed: x (b, 1, S, S), soft targets (b, K).

    canvases uint8 (batch or fewer, S, S) and labels are of that part; the draws are those of the whole batch.
    """
    rng = BatchRows(philox(seed, step, AUGMENT), batch, np.arange(batch)[own])
    draws = {key: torch.from_numpy(value).to(device) for key, value in draw_augment(rng, len(labels)).items()}
    images = torch.from_numpy(canvases).to(device)
    x = augment(images, draws, *stats) if args.augment else normalise_only(images, *stats)
    targets = soft_targets(torch.from_numpy(labels).to(device), n_classes, args.smoothing)
    return mix(x, targets, draw_mix(philox(seed, step, MIX), x.shape[-1], args.mixup, args.cutmix))


def train_step(network, gradients, optimizer, x, targets, batch, lr, args, drops=None):
    """One AdamW step; the loss, summed over processes: the mean over the `batch` images."""
    with autocast(x.device, args.dtype):
        logits = network(x, drops)
    loss = -(targets * logits.log_softmax(1)).sum() / batch
    optimizer_step(optimizer, loss, gradients, lr, args.weight_decay)
    return all_reduce(loss.detach())


def draw_drops(backbone, images, side, seed, step, rank):
    """Drop-path draws for a rank's part of a batch, or None."""
    if not getattr(backbone, "drop_path_rate", 0):
        return None
    N = 1 + backbone.num_register_tokens + (side // backbone.patch_size) ** 2
    return backbone.draw_drop_path([(images, N)], np.random.default_rng(np.random.SeedSequence((seed, step, rank))))


@torch.no_grad()
def predict(network, canvases, stats, batch_size, device, dtype, rank=0, world_size=1):
    """uint8 (n, S, S) -> class probabilities (n, K) on the CPU; each process looks at its share."""
    network.eval()
    own = np.array_split(np.arange(len(canvases)), world_size)[rank]
    out = torch.zeros(len(canvases), network.head.linear.out_features, device=device)
    for start in range(0, len(own), batch_size):
        part = own[start:start + batch_size]
        x = normalise_only(torch.from_numpy(canvases[part]).to(device), *stats)
        with autocast(device, dtype):
            out[torch.from_numpy(part).to(device)] = network(x).float().softmax(1)
    network.train()
    return all_reduce(out).cpu()
