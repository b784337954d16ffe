"""What a step minimises: projection heads, DINO and iBOT against the teacher's targets, KoLeo, the targets' health.

DINOv2 (arXiv 2304.07193), section 4, with the scales of its released code. b images of a micro-batch, L local crops of
each, M masked patches, C width, K prototypes; the (rows, K) probabilities are never written.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from kernels import LogitChunks, prototype_loss, sinkhorn, softmax_center, update_center
from model import VisionTransformer, draw_rescale, init_linear

STUDENT_TEMP = 0.1  # DINOv2's constant that nobody tunes
KOLEO_EPS, KOLEO_MIN_DISTANCE = 1e-8, 1e-4
HEALTH_ROWS = 64  # teacher rows whose targets are looked at for the log
# Which of the teacher's rows of an image a student's row learns from; -1: there is no second one
GLOBAL_PAIRS = [(1, -1), (0, -1)]  # a global crop: from the other one
LOCAL_PAIR = (0, 1)  # a local crop: from both global ones
PATCH_PAIR = (0, -1)  # a masked patch: from itself


# ---------------------------------------------------------------- student and teacher

class Prototypes(nn.Module):
    """Weight-normed linear layer without bias: rows of weight_v have length one, times weight_g."""

    def __init__(self, in_dim, out_dim):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim).uniform_(-1, 1))

    def weight(self):
        return self.weight_g * F.normalize(self.weight_v, dim=1)  # (K, bottleneck)

    def forward(self, x):
        return F.linear(x, self.weight())  # (rows, K)


class DINOHead(nn.Module):
    """MLP of three layers to a unit-length bottleneck, then K prototypes: (rows, in_dim) -> logits (rows, K)."""

    def __init__(self, in_dim, out_dim, hidden_dim=2048, bottleneck_dim=256, init_std=0.02):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, hidden_dim), nn.GELU(),
                                 nn.Linear(hidden_dim, bottleneck_dim))
        init_linear(self.mlp, init_std)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)

    def bottleneck(self, x):
        x = self.mlp(x)  # (rows, bottleneck)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def forward(self, x):
        return self.last_layer(self.bottleneck(x))


class Network(nn.Module):
    """Backbone and heads of the student or the teacher; state-dict keys backbone.*, dino_head.*[, ibot_head.*]."""

    def __init__(self, config, args):
        super().__init__()
        self.backbone = VisionTransformer(**config)
        for name in ("dino_head", "ibot_head") if args.separate_head else ("dino_head",):
            setattr(self, name, DINOHead(config["embed_dim"], args.head_n_prototypes, hidden_dim=args.head_hidden_dim,
                                         bottleneck_dim=args.head_bottleneck_dim, init_std=args.init_std))
        crop_pairs = torch.tensor(GLOBAL_PAIRS + [LOCAL_PAIR] * args.local_crops_number)  # (2 + L, 2)
        self.register_buffer("crop_pairs", crop_pairs, persistent=False)
        self.register_buffer("patch_pair", torch.tensor([PATCH_PAIR]), persistent=False)  # (1, 2)

    def patch_head(self):
        return self.ibot_head if hasattr(self, "ibot_head") else self.dino_head


# ---------------------------------------------------------------- losses

def koleo_loss(x, groups):
    """Kozachenko-Leonenko spreading loss (DINOv2, section 4): -mean log distance to the nearest other row. x (b, C).

    Rows of one group (frames of a clip) are no neighbours. Nearly equal rows count in the value but give no
    gradient: 1 / distance of five identical frames would be the whole step. Float32 whatever the autocast says.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), eps=KOLEO_EPS, dim=-1)
        with torch.no_grad():
            siblings = groups[:, None] == groups[None, :]  # (b, b), the diagonal included
            nearest = (x @ x.T).masked_fill(siblings, -2).argmax(dim=1)  # (b,)
            counts = ~siblings.all(dim=1)  # rows that have a neighbour at all
        distance = F.pairwise_distance(x, x[nearest], p=2, eps=KOLEO_EPS)  # (b,)
        distance = torch.where(distance < KOLEO_MIN_DISTANCE, distance.detach(), distance)
        return -torch.where(counts, torch.log(distance + KOLEO_EPS), 0.0).sum() / counts.sum().clamp(min=1)


def prototypes_of(network):
    """Prototypes (K, bottleneck) of class and of patch rows: the same tensor where they share a head."""
    first, second = network.dino_head, network.patch_head()
    prototypes = first.last_layer.weight()
    return prototypes, prototypes if second is first else second.last_layer.weight()


@torch.no_grad()
def teacher_targets(teacher, micros, centers, temp, centering, dtype=torch.float32):
    """The teacher's view of a step's micro-batches, before any student sees them: (targets, new centers (2, K)).

    Targets are two lists, of class and of patch rows, with (features (items, M, bottleneck), prototypes, a, r (items,
    M)) per micro-batch: p = exp(features @ prototypes.T / temp - a - r). `a` comes from the whole batch on all ranks.
    """
    class_rows, patch_rows, valid = [], [], []
    for micro in micros:
        b, tokens = len(micro["groups"]), teacher.backbone.forward_features(micro["global_crops"])
        cls = tokens["x_norm_clstoken"].unflatten(0, (2, b)).transpose(0, 1)  # (b, 2, C)
        patches = tokens["x_norm_patchtokens"].flatten(0, 1).index_select(0, micro["mask_indices"])  # (M, C)
        class_rows.append(teacher.dino_head.bottleneck(cls))  # (b, 2, bottleneck)
        patch_rows.append(teacher.patch_head().bottleneck(patches[:, None]))  # (M, 1, bottleneck)
        valid.append(micro["mask_weight"] > 0)
    valid = [torch.ones_like(centers[0, :1], dtype=torch.bool).expand(sum(map(len, class_rows)) * 2), torch.cat(valid)]
    targets, new_centers, prototypes = [], centers.clone(), prototypes_of(teacher)
    for i, (weight, rows) in enumerate(zip(prototypes, (class_rows, patch_rows))):
        features = torch.cat([x.flatten(0, 1) for x in rows])
        if centering == "centering":
            a, r = softmax_center(LogitChunks(features, weight, dtype, passes=1), centers[i], temp)
            r = torch.where(valid[i], r, math.inf)
            with torch.autocast(centers.device.type, enabled=False):  # sum of logits = prototypes(sum of features)
                total = weight @ (features * valid[i][:, None]).sum(0)
            new_centers[i] = update_center(centers[i], total, valid[i].sum())
        else:
            a, r = sinkhorn(LogitChunks(features, weight, dtype), temp, valid=valid[i])
        r = r.split([x.shape[0] * x.shape[1] for x in rows])
        targets.append([(x, weight, a, part.view(x.shape[:2])) for x, part in zip(rows, r)])
    return targets, new_centers


def draw_drops(backbone, micros, seed, step, rank, rope_rescale=1.0):
    """Draws of a rank's micro-batches, before any forward: (drop path, rescaling of rotary positions) of each."""
    for number, micro in enumerate(micros):
        rng = np.random.default_rng(np.random.SeedSequence((seed, step, rank, number)))
        shapes = [(len(crops), 1 + backbone.num_register_tokens + (crops.shape[-1] // backbone.patch_size) ** 2)
                  for crops in (micro["global_crops"], micro["local_crops"])]
        limit = rope_rescale if backbone.pos == "rope" else 1
        yield backbone.draw_drop_path(shapes, rng), draw_rescale(len(backbone.blocks), len(shapes), limit, rng)


def student_losses(student, micro, class_target, patch_target, temp, batch, draws=None, dtype=torch.float32):
    """(DINO, iBOT, KoLeo) of one micro-batch, DINOv2's scales but for the weights, and how much of DINO is local.

    Each is this micro-batch's part of the mean over the `batch` images of the step (KoLeo: of this micro-batch).
    draws: draw_drops's; without it no image is dropped and no position rescaled.
    """
    b, L = len(micro["groups"]), len(micro["local_crops"]) // len(micro["groups"])
    tokens, local_tokens = student.backbone.forward_features(
        [micro["global_crops"], micro["local_crops"]], [micro["masks"], None], *(draws or ()))
    global_cls = tokens["x_norm_clstoken"]  # (2b, C)
    cls = torch.cat((global_cls, local_tokens["x_norm_clstoken"])).unflatten(0, (2 + L, b))  # (2 + L, b, C)
    patches = tokens["x_norm_patchtokens"].flatten(0, 1).index_select(0, micro["mask_indices"])  # (M, C)
    prototypes = prototypes_of(student)

    weight = cls.new_full((b, 2 + L), 1 / (batch * (2 * L + 2)), dtype=class_target[3].dtype)
    dino, losses = prototype_loss(student.dino_head.bottleneck(cls).transpose(0, 1), prototypes[0], *class_target,
                                  student.crop_pairs, weight, STUDENT_TEMP, temp, dtype)
    weight = micro["mask_weight"][:, None] / (2 * batch)  # (M, 1)
    ibot, _ = prototype_loss(student.patch_head().bottleneck(patches[:, None]), prototypes[1], *patch_target,
                             student.patch_pair, weight, STUDENT_TEMP, temp, dtype)
    koleo = koleo_loss(global_cls[:b], micro["groups"]) + koleo_loss(global_cls[b:], micro["groups"])
    return torch.stack((dino, ibot, koleo)), losses[:, 2:].sum()


# ---------------------------------------------------------------- for the log

@torch.no_grad()
def target_health(target, temp):
    """(mean entropy of the targets, what they tell about the image), in nats, from HEALTH_ROWS class rows.

    The second is the mutual information of image and prototype, at most log(rows). At 0 every image has the same
    target: a collapse, or a teacher that has not learned anything yet.
    """
    features, prototypes, a, r = target
    features, r = features[:HEALTH_ROWS, 0], r[:HEALTH_ROWS, :1]  # one crop of each image
    p = torch.exp((features @ prototypes.T).to(a.dtype) / temp - a - r)  # (rows, K)
    entropy = torch.special.entr(p).sum(1).mean()
    return torch.stack((entropy, torch.special.entr(p.mean(0)).sum() - entropy))
