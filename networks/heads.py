"""The network of many tasks: a backbone with experts, a DPT decoder for what has a place, a head per task; losses.

After M2DINO (arXiv 2603.18123), whose heads all read spatial feature maps, never the class token; it names a DPT-style
decoder for segmentation and says no more: all else is this project's choice. B images, C width, K of a task: classes,
points, or 1 box. A map of an image's patches is (B, C, rows, columns). Places are shares of an image's sides, 0..1, x
to the right, y down.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from labelled.fmc_uia import Task
from model import VisionTransformer
from networks.decoders import LEAST_SHARE, ConvReLU, PixelClassifier, resize
from networks.moe import Routing, add_experts
from networks.weights import load_strict
from runtime import load_checkpoint

DENSE = ("segmentation", "regression")  # kinds of tasks whose heads look at the decoder's map of the whole image
FEATURES = 32  # channels of that map, DPT's
SIGMA = 1 / 16  # of a landmark's target, share of a side: 4 of 64 cells
POINT_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 10.0, 5.0, 2.0  # of distances beside the heat map; DETR's for boxes
TASK_STD = 0.02  # of a task's embedding at the start


# ---------------------------------------------------------------- DPT

class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x)))); the second convolution starts at 0, the unit as the identity."""

    def __init__(self, dim):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(dim, dim, 3, padding=1) for _ in range(2))
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv2.weight)
        for conv in (self.conv1, self.conv2):
            nn.init.zeros_(conv.bias)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Reassemble(nn.Module):
    """A tap (B, C, rows, columns) -> (B, dim, ...) at `scale` (4, 2, 1 or 1/2) times its sides."""

    def __init__(self, in_dim, dim, scale):
        super().__init__()
        self.project = nn.Conv2d(in_dim, dim, 1)
        self.rescale = nn.Identity()
        if scale > 1:
            self.rescale = nn.ConvTranspose2d(dim, dim, scale, stride=scale)
            nn.init.normal_(self.rescale.weight, std=dim ** -0.5)  # each place of the result sees dim numbers
        elif scale < 1:
            self.rescale = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(self.rescale(self.project(x)))


class DPT(nn.Module):
    """Four taps (B, C, rows, columns) -> features (B, FEATURES, h, w) of images h x w (Ranftl et al. 2021).

    As DINOv3 has it: strides of 4, 8, 16 and 32 pixels (of patches of 16), fused from the deepest up, twice as large at
    each level, class token ignored. Different: as many channels in all levels, a group norm before the last two ReLUs,
    resizing by fixed matrices with align_corners False.
    """

    def __init__(self, in_dim, dim):
        super().__init__()
        self.reassemble = nn.ModuleList(Reassemble(in_dim, dim, scale) for scale in (4, 2, 1, 0.5))
        self.skips = nn.ModuleList(ResidualUnit(dim) for _ in range(3))  # of all levels but the deepest
        self.units = nn.ModuleList(ResidualUnit(dim) for _ in range(4))
        self.outs = nn.ModuleList(nn.Conv2d(dim, dim, 1) for _ in range(4))
        self.first = ConvReLU(dim, dim // 2, 3, "group")
        self.last = ConvReLU(dim // 2, FEATURES, 3, "group")

    def forward(self, taps, size):
        levels = [own(tap) for own, tap in zip(self.reassemble, taps)]  # (B, dim, ...): 4, 2, 1, 1/2 times the grid
        rows, columns = taps[0].shape[2:]
        x = levels[3]
        for i in (3, 2, 1, 0):  # to 1, 2, 4, 8 times the grid
            if i < 3:
                x = x + self.skips[i](levels[i])
            x = resize(self.outs[i](self.units[i](x)), (rows << 3 - i, columns << 3 - i))
        return self.last(resize(self.first(x), size))  # (B, FEATURES, h, w)


# ---------------------------------------------------------------- a head per task

class ImageHead(nn.Module):
    """Classification: mean over the last map, LayerNorm, linear: (B, C, rows, columns) -> logits (B, K)."""

    def __init__(self, dim, n_classes):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, n_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        return self.linear(self.norm(x.flatten(2).mean(2)))


class BoxHead(nn.Module):
    """Detection of the one box of an image: (B, C, rows, columns) -> (B, 5, rows, columns), what boxes_of reads."""

    def __init__(self, in_dim, dim):
        super().__init__()
        self.convs = nn.Sequential(ConvReLU(in_dim, dim, 3, "group"), ConvReLU(dim, dim, 3, "group"))
        self.cells = PixelClassifier(dim, 5)

    def forward(self, x):
        return self.cells(self.convs(x))


class TaskPart(nn.Module):
    """All that belongs to one task: its embedding, which the experts' gates see (None without them), and its head."""

    def __init__(self, task, dim, channels, task_dim):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(task_dim).normal_(std=TASK_STD)) if task_dim else None
        if task.kind == "classification":
            self.head = ImageHead(dim, task.K)
        elif task.kind == "detection":
            self.head = BoxHead(dim, channels)
        else:  # logits of classes, or of places of points: there a softmax over places takes no notice of a bias
            self.head = PixelClassifier(FEATURES, task.K, FEATURES ** -0.5, bias=task.kind == "segmentation")


class MultiTask(nn.Module):
    """Images (B, in_chans, h, w) and a task's number -> its head's output and the gates of its experts.

    The output: segmentation logits (B, K, h, w), of float32; regression the same, a heat map per point; classification
    logits (B, K); detection (B, 5, rows, columns). Taps are after the blocks at quarters of the depth, through the
    backbone's last norm. Sides must be multiples of the patch size.
    """

    def __init__(self, backbone, tasks, channels, task_dim):
        super().__init__()
        self.backbone, self.tasks = backbone, list(tasks)
        self.decoder = DPT(backbone.embed_dim, channels) if any(task.kind in DENSE for task in tasks) else None
        self.parts = nn.ModuleList(TaskPart(task, backbone.embed_dim, channels, task_dim) for task in tasks)
        depth = len(backbone.blocks)
        self.taps = [max(1, round(depth * share)) - 1 for share in (1 / 4, 1 / 2, 3 / 4, 1)]  # 2, 5, 8, 11 of 12
        backbone.mask_token.requires_grad_(False)  # nothing is masked here

    def trained(self, number):
        """The modules that a batch of this task trains."""
        dense = self.tasks[number].kind in DENSE
        return [self.backbone, *([self.decoder] if dense else []), self.parts[number]]

    def forward(self, x, number, rescale=None):
        if not 0 <= number < len(self.tasks):
            raise ValueError(f"task number {number}: this network has {len(self.tasks)} tasks, "
                             f"{', '.join(task.name for task in self.tasks)}")
        task, part = self.tasks[number], self.parts[number]
        routing, blocks = Routing(part.embedding, []), sorted(set(self.taps))
        found = self.backbone.get_intermediate_layers(x, blocks, reshape=True, routing=routing, rescale=rescale)
        taps = [found[blocks.index(block)] for block in self.taps]  # four of (B, C, rows, columns)
        output = part.head(self.decoder(taps, x.shape[2:]) if task.kind in DENSE else taps[-1])
        return output, routing.gates


# ---------------------------------------------------------------- a network, made and saved

def build_network(backbone, tasks, how):
    """how: dict(experts, blocks, top_k, task_dim, channels), as a checkpoint keeps it; one expert is a dense block."""
    if how["experts"] > 1:
        add_experts(backbone, how["blocks"], how["experts"], how["task_dim"], how["top_k"])
    return MultiTask(backbone, tasks, how["channels"], how["task_dim"] if how["experts"] > 1 else 0)


def start_from_shares(part, shares):
    """A segmentation head's bias from the classes' shares of the train pixels (K,), as segmenter.build does it."""
    with torch.no_grad():
        part.head.bias.copy_(torch.from_numpy(np.log(np.maximum(shares, LEAST_SHARE))))


def open_network(path, device):
    """What finetune_multi.py saved -> (network in eval mode, its checkpoint); ValueError for any other file."""
    saved = load_checkpoint(path)
    if not {"tasks", "network_of", "config", "head"} <= saved.keys():
        raise ValueError(f"{path}: no finished run of finetune_multi.py: it has no task heads")
    backbone = VisionTransformer(**{**saved["config"], "in_chans": 1, "drop_path_rate": 0.0})
    network = build_network(backbone, [Task(*task) for task in saved["tasks"]], saved["network_of"])
    load_strict(network, {**saved["teacher"], **saved["head"]}, path)
    return network.to(device).eval(), saved


# ---------------------------------------------------------------- boxes and points from maps

def centers(length, like):
    """Of cells or pixels along a side, as shares of it: (length,)."""
    return (torch.arange(length, device=like.device, dtype=like.dtype) + 0.5) / length


def boxes_of(maps):
    """(B, 5, rows, columns) -> boxes (B, 4), (x_min, y_min, x_max, y_max), and each cell's log weight (B, cells).

    A cell says how far, as a share of the way from its centre to each border of the image, its box reaches: so a box
    has its corners in order and lies in the image, whatever the numbers. The result is the mean of the cells' boxes by
    their weights, a softmax over cells: it keeps that, and a cell is learned against all the others.
    """
    rows, columns = maps.shape[2:]
    y, x = torch.meshgrid(centers(rows, maps), centers(columns, maps), indexing="ij")
    x, y = x.flatten(), y.flatten()  # (cells,)
    left, top, right, bottom = maps[:, :4].flatten(2).sigmoid().unbind(1)  # (B, cells) each
    boxes = torch.stack((x - x * left, y - y * top, x + (1 - x) * right, y + (1 - y) * bottom), dim=1)  # (B, 4, cells)
    weights = maps[:, 4].flatten(1).log_softmax(1)
    return (boxes * weights.exp()[:, None]).sum(2), weights


def points_of(maps):
    """Heat maps (B, K, h, w) -> points (B, K, 2), (x, y): the mean place under a softmax over pixels, and the logarithm
    of that softmax (B, K, h, w)."""
    heat = maps.flatten(2).log_softmax(2).view(maps.shape)
    share = heat.exp()
    return torch.stack((share.sum(2) @ centers(maps.shape[3], maps), share.sum(3) @ centers(maps.shape[2], maps)),
                       dim=2), heat


# ---------------------------------------------------------------- losses, one number per image

def task_loss(task, output, target):
    """Of a head's output -> (B,). target: masks int64 (B, h, w), labels int64 (B,), boxes (B, 4), points (B, K, 2)."""
    output = output.float()
    if task.kind == "segmentation":
        return mask_loss(output, target)
    if task.kind == "classification":
        return F.cross_entropy(output, target, reduction="none")
    return box_loss(output, target) if task.kind == "detection" else point_loss(output, target)


def mask_loss(logits, masks):
    """Cross-entropy plus Dice loss, the mean over the classes that an image shows, background too, of 1 - 2 sum(p t) /
    (sum(p) + sum(t)), p a softmax: a small structure weighs as much as a large one. (B, K, h, w), (B, h, w) -> (B,).

    The challenge's baseline has this Dice, over a whole batch; here it is of each image, whoever shares the batch.
    """
    p, t = logits.softmax(1).flatten(2), F.one_hot(masks.flatten(1), logits.shape[1]).transpose(1, 2)  # (B, K, pixels)
    size, shown = t.sum(2), t.any(2)  # (B, K)
    missed = 1 - 2 * (p * t).sum(2) / (p.sum(2) + size)
    return F.cross_entropy(logits, masks, reduction="none").mean((1, 2)) + (missed * shown).sum(1) / shown.sum(1)


def box_loss(maps, boxes):
    """5 L1 + 2 (1 - GIoU) (DETR's) + cross-entropy of the cells: those whose centre is in the true box share weight 1,
    all others, the negatives, have 0. maps (B, 5, rows, columns), boxes (B, 4) -> (B,)."""
    found, weights = boxes_of(maps)
    x, y = centers(maps.shape[3], maps), centers(maps.shape[2], maps)
    x_min, y_min, x_max, y_max = boxes.unsqueeze(2).unbind(1)  # (B, 1) each
    across, down = (x >= x_min) & (x <= x_max), (y >= y_min) & (y <= y_max)
    # a box between two centres: the nearest one
    nearest_x = F.one_hot((x - (x_min + x_max) / 2).abs().argmin(1), len(x)).bool()
    nearest_y = F.one_hot((y - (y_min + y_max) / 2).abs().argmin(1), len(y)).bool()
    across = torch.where(across.any(1, keepdim=True), across, nearest_x)  # (B, columns)
    down = torch.where(down.any(1, keepdim=True), down, nearest_y)  # (B, rows)
    inside = (down[:, :, None] & across[:, None]).flatten(1).to(maps.dtype)  # (B, cells)
    cells = -(weights * inside).sum(1) / inside.sum(1)
    return L1_WEIGHT * (found - boxes).abs().sum(1) + GIOU_WEIGHT * (1 - giou(found, boxes)) + cells


def giou(a, b):
    """Boxes (B, 4) twice -> (B,), from -1 to 1: IoU less the share of the hull that neither covers (Rezatofighi et al.
    2019, algorithm 1)."""
    area_a, area_b = ((box[:, 2:] - box[:, :2]).prod(1) for box in (a, b))
    both = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).prod(1)
    either, least = area_a + area_b - both, torch.finfo(a.dtype).tiny
    return both / either.clamp(min=least) - (hull - either) / hull.clamp(min=least)


def point_loss(maps, points):
    """KL divergence of the heat map from a Gaussian of SIGMA around the point, plus 10 times the distance |dx| + |dy|
    of the soft-argmax to it; the mean over points. maps (B, K, h, w), points (B, K, 2) -> (B,).

    After DSNT (Nibali et al. 2018), with KL for its Jensen-Shannon divergence. A missing point (nan) counts nothing.
    """
    known = ~points.isnan().any(2)  # (B, K)
    points = points.nan_to_num(0.5)
    found, heat = points_of(maps)
    x, y = centers(maps.shape[3], maps), centers(maps.shape[2], maps)
    across = (-(x - points[:, :, :1]).square() / (2 * SIGMA ** 2)).log_softmax(2)  # (B, K, w)
    down = (-(y - points[:, :, 1:]).square() / (2 * SIGMA ** 2)).log_softmax(2)  # (B, K, h)
    target = down[:, :, :, None] + across[:, :, None]  # (B, K, h, w), log of a Gaussian that sums to 1
    divergence = (target.exp() * (target - heat)).sum((2, 3))  # (B, K)
    loss = divergence + POINT_WEIGHT * (found - points).abs().sum(2)
    return (loss * known).sum(1) / known.sum(1).clamp(min=1)
