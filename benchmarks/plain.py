"""DINOv2's training step as one writes it from the paper with stock torch: what the benchmarks compare this project to.

Written after facebookresearch/dinov2 without xFormers: one forward per crop size, scaled_dot_product_attention, drop
path on a random subset of each crop size's images, (rows, K) logits of all rows at once, targets and log-softmax as
(rows, K) matrices in float32, autocast, fused AdamW, EMA by foreach. Where torch has a faster way to say the same,
it is taken (index_select instead of indexing). No code is shared with model.py and kernels/; only names of weights are,
so that both can start from the same state dict, and tests/benchmarks can show that both compute the same.
"""
import contextlib
import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import sdpa_kernel

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9


def wide(x):
    return x if x.dtype == torch.float64 else x.float()


# ---------------------------------------------------------------- network

class Attention(nn.Module):
    backend = None  # of scaled_dot_product_attention; None: torch chooses

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, N, D)
        with sdpa_kernel(self.backend) if self.backend is not None else contextlib.nullcontext():
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Mlp(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return x * self.gamma


def add_residual(x, kept, branch):
    """x + branch(x), on the images `kept` (indices) only and scaled up accordingly, or on all (None)."""
    if kept is None:
        return x + branch(x)
    residual = branch(x.index_select(0, kept))
    return torch.index_add(x, 0, kept, residual.to(x.dtype), alpha=len(x) / len(kept))


class Block(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads), Mlp(dim)
        self.ls1, self.ls2 = LayerScale(dim), LayerScale(dim)

    def forward(self, x, kept1=None, kept2=None):
        x = add_residual(x, kept1, lambda y: self.ls1(self.attn(self.norm1(y))))
        return add_residual(x, kept2, lambda y: self.ls2(self.mlp(self.norm2(y))))


class ViT(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, num_register_tokens,
                 drop_path_rate):
        super().__init__()
        self.patch_size, self.registers, self.drop_path_rate = patch_size, num_register_tokens, drop_path_rate
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def positions(self, rows, columns):
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if (rows, columns) == (side, side):
            return self.pos_embed
        patches = wide(self.pos_embed[:, 1:]).unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, C, side, side)
        patches = F.interpolate(patches, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        return torch.cat((self.pos_embed[:, :1], patches.flatten(2).transpose(1, 2)), dim=1)

    def forward(self, images, masks=None, kept=None):
        """Normalised tokens (B, N, C): cls, registers, patches. kept: which images each residual branch works on."""
        x = self.patch_embed["proj"](images)  # (B, C, rows, columns)
        B, _, rows, columns = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, P, C)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1) + self.positions(rows, columns)
        if self.registers:
            x = torch.cat((x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]), dim=1)
        if kept is None and self.training and self.drop_path_rate:
            subset = max(int(B * (1 - self.drop_path_rate)), 1)
            kept = [torch.randperm(B, device=x.device)[:subset] for _ in range(2 * len(self.blocks))]
        for i, block in enumerate(self.blocks):
            x = block(x, *(kept[2 * i:2 * i + 2] if kept else ()))
        return self.norm(x)


class Prototypes(nn.Module):
    def __init__(self, dim, K):
        super().__init__()
        self.weight_g, self.weight_v = nn.Parameter(torch.ones(K, 1)), nn.Parameter(torch.ones(K, dim))

    def forward(self, x):
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))  # what nn.utils.weight_norm calls


class Head(nn.Module):
    def __init__(self, dim, hidden, bottleneck, K):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.last_layer = Prototypes(bottleneck, K)

    def forward(self, x):
        return self.last_layer(F.normalize(wide(self.mlp(x)), dim=-1, eps=1e-12))  # (rows, K)


class Network(nn.Module):
    """config, args: as for the project's network; one head for class tokens and patches."""

    def __init__(self, config, args):
        super().__init__()
        names = "img_size patch_size in_chans embed_dim depth num_heads num_register_tokens drop_path_rate".split()
        self.backbone = ViT(**{name: config[name] for name in names})
        self.dino_head = Head(config["embed_dim"], args.head_hidden_dim, args.head_bottleneck_dim,
                              args.head_n_prototypes)


def networks(config, args, student_state, teacher_state, device="cpu"):
    """Student and teacher with these weights."""
    student, teacher = (Network(config, args).to(device, next(iter(student_state.values())).dtype) for _ in range(2))
    student.load_state_dict(student_state)
    teacher.load_state_dict(teacher_state)
    return student, teacher.requires_grad_(False).eval()


# ---------------------------------------------------------------- losses

def centered_targets(logits, center, temp):
    return F.softmax((wide(logits) - center) / temp, dim=-1)


def sinkhorn_targets(logits, temp, n_iterations=3):
    Q = torch.exp(wide(logits) / temp).t()  # (K, rows)
    K, rows = Q.shape
    Q /= Q.sum()
    for _ in range(n_iterations):
        Q /= Q.sum(dim=1, keepdim=True)
        Q /= K
        Q /= Q.sum(dim=0, keepdim=True)
        Q /= rows
    Q *= rows
    return Q.t()


def dino_loss(student_chunks, teacher_chunks):
    loss = 0
    for s in student_chunks:
        log_q = F.log_softmax(s / STUDENT_TEMP, dim=-1)  # in float32 under autocast, without a float32 copy of s
        for t in teacher_chunks:
            loss = loss - (t * log_q).sum(dim=-1).mean()
    return loss


def ibot_loss(s, t, weight, crops):
    log_q = F.log_softmax(s / STUDENT_TEMP, dim=-1)
    return -((t * log_q).sum(dim=-1) * weight).sum() / crops


def koleo_loss(x):
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(wide(x), eps=1e-8, dim=-1)
        with torch.no_grad():
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
        return -torch.log(F.pairwise_distance(x, x[nearest], 2, eps=1e-8) + 1e-8).mean()


@torch.no_grad()
def teacher_targets(teacher, micro, centers, temp, centering, use):
    """(targets of both crops as [for crop 1, for crop 2], targets of masked patches, new centers)."""
    n, bound = micro["n_masked"], len(micro["mask_indices"])
    tokens = teacher.backbone(micro["global_crops"])
    first, second = tokens[:, 0].chunk(2)
    cls = torch.cat((second, first))  # crop A learns from crop B
    buffer = tokens.new_zeros(len(cls) + bound, tokens.shape[-1])  # padded, so that its size is the same at every step
    buffer[:len(cls)] = cls
    patches = tokens[:, -micro["masks"].shape[1]:].flatten(0, 1)
    buffer[len(cls):len(cls) + n] = patches.index_select(0, micro["mask_indices"][:n])
    logits = teacher.dino_head(buffer)
    cls_logits, patch_logits = logits[:len(cls)], logits[len(cls):len(cls) + n]
    if centering == "sinkhorn_knopp":
        return use.sinkhorn_targets(cls_logits, temp).chunk(2), use.sinkhorn_targets(patch_logits, temp), centers
    targets = [use.centered_targets(x, center, temp) for x, center in zip((cls_logits, patch_logits), centers)]
    means = torch.stack([wide(x).mean(0) for x in (cls_logits, patch_logits)])
    return targets[0].chunk(2), targets[1], centers * CENTER_MOMENTUM + means * (1 - CENTER_MOMENTUM)


def losses(student, micro, targets, args, kept, use):
    """The four weighted terms: local DINO, global DINO, iBOT, KoLeo."""
    n, bound, cls_targets, patch_targets = micro["n_masked"], len(micro["mask_indices"]), *targets
    tokens = student.backbone(micro["global_crops"], micro["masks"], kept[0])
    cls = tokens[:, 0]  # (2b, C)
    local_cls = student.backbone(micro["local_crops"], None, kept[1])[:, 0]  # (L * b, C)
    L = 2 * len(local_cls) // len(cls)
    patches = tokens[:, -micro["masks"].shape[1]:].flatten(0, 1)
    buffer = patches.new_zeros(bound, patches.shape[1])
    buffer[:n] = patches.index_select(0, micro["mask_indices"][:n])
    logits = student.dino_head(torch.cat((local_cls, cls, buffer))).split([len(local_cls), len(cls), bound])
    local_term = use.dino_loss(logits[0].chunk(L), cls_targets) / (2 * L + 2)
    global_term = 2 * use.dino_loss([logits[1]], [torch.cat(cls_targets)]) / (2 * L + 2)
    ibot = use.ibot_loss(logits[2][:n], patch_targets, micro["mask_weight"][:n], len(cls))
    koleo = sum(koleo_loss(x) for x in cls.chunk(2))
    return torch.stack((local_term, global_term, ibot, koleo * args.koleo_loss_weight))


# ---------------------------------------------------------------- the step

def prepare(micro):
    """DINOv2's loader knows on the host how many patches are masked, which saves the step a synchronisation."""
    return dict(micro, n_masked=int((micro["mask_weight"] > 0).sum()))


EAGER = SimpleNamespace(centered_targets=centered_targets, sinkhorn_targets=sinkhorn_targets, dino_loss=dino_loss,
                        ibot_loss=ibot_loss)


def compiled(student, teacher):
    """torch.compile each block and head, and return the functions of EAGER, which make (rows, K) matrices, compiled."""
    for network in (student, teacher):
        for module in (*network.backbone.blocks, network.dino_head):
            module.compile(dynamic=False)
    return SimpleNamespace(**{name: torch.compile(function, dynamic=False) for name, function in vars(EAGER).items()})


def train_step(student, teacher, optimizer, centers, micro, values, args, kept=(None, None), use=EAGER):
    """One step on one micro-batch (of prepare); centers (2, K) change in place. Returns the four weighted terms."""
    dtype = getattr(torch, args.dtype)
    with torch.autocast(centers.device.type, dtype, enabled=dtype != torch.float32):
        *targets, new_centers = teacher_targets(teacher, micro, centers, values["teacher_temp"], args.centering, use)
        terms = losses(student, micro, targets, args, kept, use)
    terms.sum().backward()
    for module in (student.backbone, student.dino_head):
        nn.utils.clip_grad_norm_(module.parameters(), args.clip_grad, foreach=True)
    for group in optimizer.param_groups:
        frozen = group["is_last_layer"] and values["freeze_last_layer"]
        group["lr"] = 0.0 if frozen else values["lr"] * group["lr_multiplier"]
        group["weight_decay"] = values["weight_decay"] * group["wd_multiplier"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        slow, fast = list(teacher.parameters()), list(student.parameters())
        torch._foreach_mul_(slow, values["momentum"])
        torch._foreach_add_(slow, fast, alpha=1 - values["momentum"])
    centers.copy_(new_centers)
    return terms.detach()
