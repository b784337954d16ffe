"""The vision transformer of DINOv2, its projection head, and their learning rates.

State-dict keys, constructor keywords and results are those of facebookresearch/dinov2, so official weights load
strictly and ours load elsewhere. Differences, all invisible from outside: tokens of every crop size go through the
linear layers as one packed (T, C) matrix, and drop path gets its random indices from the caller.

B images, N tokens of an image (cls, registers, patches), T = sum of B * N over crop sizes, C width, H heads,
D head dim, P patches, K prototypes; an image is (B, in_chans, h, w).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from kernels import attention

SIZES = {
    "vit_micro": dict(embed_dim=128, depth=4, num_heads=4),  # the CPU preset's, for trying things
    "vit_tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "vit_small": dict(embed_dim=384, depth=12, num_heads=6),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24, ffn_layer="swiglufused"),
}


# ---------------------------------------------------------------- transformer

class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        # the convolution as a matrix product, whose gradient is deterministic on a GPU (cuDNN's need not be)
        p = self.proj.kernel_size[0]
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, in_chans, p, p)
        return F.linear(x.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)  # (B, P, C)


class Normalize(torch.autograd.Function):
    """LayerNorm before its weight and bias. All it keeps is its output, which the next linear layer keeps as well."""

    @staticmethod
    def forward(ctx, x, eps, dtype):
        y, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        y = y.to(dtype)
        ctx.save_for_backward(y, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        y, rstd = ctx.saved_tensors
        y, grad = y.to(rstd.dtype), grad.to(rstd.dtype)
        grad, _, _ = torch.ops.aten.native_layer_norm_backward(  # of an input y, whose mean is 0 and rstd 1
            grad, y, y.shape[-1:], torch.zeros_like(rstd), torch.ones_like(rstd), None, None, [True, False, False])
        return grad * rstd, None, None


class GeluLinear(torch.autograd.Function):
    """linear(gelu(x)). It keeps x alone: GELU, the widest matrix of a block, is computed again in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad @ weight, x), grad.T @ F.gelu(x), grad.sum(0)


def autocast_dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def normalize(x, norm):
    return Normalize.apply(x, norm.eps, autocast_dtype(x))


def folded(linear, dtype, norm=None, scale=None):
    """Weight and bias of scale(linear(norm(x))) for an x that is normalised already.

    LayerNorm's weight and bias and LayerScale are products with small matrices here, not passes over all tokens, and
    their gradients need no tokens kept: they come from the gradient of the folded weight.
    """
    weight, bias = linear.weight, linear.bias
    if norm is not None:
        weight, bias = weight * norm.weight, bias + (weight * norm.bias).sum(1)
    if scale is not None:
        weight, bias = weight * scale.gamma[:, None], bias * scale.gamma
    return weight.to(dtype), bias.to(dtype)


class Attention(nn.Module):
    """The weights of attention; Block.forward uses them."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x, norm, scale):
        x = F.linear(x, *folded(self.fc1, x.dtype, norm=norm))  # (T, hidden)
        return GeluLinear.apply(x, *folded(self.fc2, x.dtype, scale=scale))  # (T, C)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8  # as many parameters as the MLP, in multiples of 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x, norm, scale):
        gate, value = F.linear(x, *folded(self.w12, x.dtype, norm=norm)).chunk(2, dim=-1)  # (T, hidden) each
        return F.linear(F.silu(gate) * value, *folded(self.w3, x.dtype, scale=scale))


FFN_LAYERS = {"mlp": Mlp, "swiglu": SwiGLU, "swiglufused": SwiGLU}  # DINOv2's names


class LayerScale(nn.Module):
    def __init__(self, dim, init_values):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))


class KeepRows(torch.autograd.Function):
    """x[rows]. rows are distinct, so backward is a gather by their inverse too: no atomic additions into zeros."""

    @staticmethod
    def forward(ctx, x, rows, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(0, rows)  # (kept, C)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inverse, = ctx.saved_tensors
        return torch.where(inverse[:, None] >= 0, grad.index_select(0, inverse.clamp(min=0)), 0.0), None, None


class AddRows(torch.autograd.Function):
    """x + scale * residual where a row was kept, x elsewhere; scale (T, 1) is 0 there."""

    @staticmethod
    def forward(ctx, x, residual, rows, inverse, scale):
        ctx.save_for_backward(rows, scale)
        ctx.dtype = residual.dtype
        return torch.addcmul(x, residual.index_select(0, inverse.clamp(min=0)).to(x.dtype), scale)  # (T, C), like x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, scale = ctx.saved_tensors
        return grad, (grad.index_select(0, rows) * scale.index_select(0, rows)).to(ctx.dtype), None, None, None


def keep_images(x, shapes, drop):
    """The tokens (kept, C) that a residual branch works on, and their shapes: all, or those of a random subset of images.

    Stochastic depth as DINOv2 does it: each crop size keeps a share of its images, the residual is scaled by
    images / kept, and the dropped images cost nothing. drop = (rows, inverse, scale, kept_shapes), or None.
    """
    return (x, shapes) if drop is None else (KeepRows.apply(x, *drop[:2]), drop[3])


def add_residual(x, residual, drop):
    """x + residual. x stays float32 whatever the branch computed in: at a LayerScale of 1e-5 bf16 would lose it all."""
    return x + residual if drop is None else AddRows.apply(x, residual, *drop[:3])


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, ffn_layer, init_values):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim, init_values) if init_values else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FFN_LAYERS[ffn_layer](dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values else None
        self.attend = attention

    def forward(self, x, shapes, drops=(None, None)):
        y, kept_shapes = keep_images(x, shapes, drops[0])  # (kept tokens, C)
        y = normalize(y, self.norm1)
        y = F.linear(y, *folded(self.attn.qkv, y.dtype, norm=self.norm1))  # (kept tokens, 3C)
        y = self.attend(y, kept_shapes, self.attn.num_heads)
        x = add_residual(x, F.linear(y, *folded(self.attn.proj, y.dtype, scale=self.ls1)), drops[0])  # (T, C)
        y, _ = keep_images(x, shapes, drops[1])
        return add_residual(x, self.mlp(normalize(y, self.norm2), self.norm2, self.ls2), drops[1])


class VisionTransformer(nn.Module):
    """DINOv2's ViT. `drop_path_rate` is the same for every block (DINOv2's drop_path_uniform, UltraDINO's choice).

    `init_std` of the linear layers is DINOv2's 0.02; networks much narrower than its start faster near width ** -0.5.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 ffn_layer="mlp", num_register_tokens=0, drop_path_rate=0.0, init_values=1e-5,
                 interpolate_offset=0.1, interpolate_antialias=False, init_std=0.02):
        super().__init__()
        self.embed_dim, self.patch_size, self.in_chans = embed_dim, patch_size, in_chans
        self.num_heads, self.num_register_tokens, self.drop_path_rate = num_heads, num_register_tokens, drop_path_rate
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, ffn_layer, init_values) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.checkpoint_activations = False  # True: backward computes each block again instead of remembering it
        self._resize = {}  # (grid, device, dtype) -> matrix that interpolates pos_embed, see position_matrix
        self.init_weights(init_std)

    def init_weights(self, init_std):
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=1e-6)
        init_linear(self.blocks, init_std)  # the patch projection keeps nn.Conv2d's own initialisation

    def positions(self, grid):
        """Position of cls and patches for a grid of (rows, columns) patches: (1, 1 + P, C)."""
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        if grid == (side, side):
            return self.pos_embed
        key = (grid, self.pos_embed.device, self.pos_embed.dtype)
        if key not in self._resize:
            self._resize[key] = position_matrix(side, grid, self.interpolate_offset, self.interpolate_antialias).to(
                self.pos_embed)
        with torch.autocast(self.pos_embed.device.type, enabled=False):  # positions stay float32
            patches = self._resize[key] @ self.pos_embed[0, 1:]  # (P, C)
        return torch.cat((self.pos_embed[:, :1], patches[None]), dim=1)

    def prepare_tokens(self, x, masks=None):
        """(B, in_chans, h, w), masks (B, P) bool or None -> (B, N, C): cls, registers, patches."""
        B, _, h, w = x.shape
        if x.shape[1] != self.in_chans or h % self.patch_size or w % self.patch_size:
            raise ValueError(f"image of {x.shape[1]} channels, {h}x{w}: this model takes {self.in_chans} channels and "
                             f"sides that are multiples of its patch size {self.patch_size}")
        x = self.patch_embed(x)  # (B, P, C)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype), x)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)
        x = x + self.positions((h // self.patch_size, w // self.patch_size))
        if self.num_register_tokens:  # registers come after the positions are added: they have none
            x = torch.cat((x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]), dim=1)
        return x

    def pack(self, crops, masks):
        """Tokens of every crop group as one matrix (T, C), and the (B, N) of each group."""
        tokens = [self.prepare_tokens(x, mask) for x, mask in zip(crops, masks)]
        return torch.cat([x.flatten(0, 1) for x in tokens]), [tuple(x.shape[:2]) for x in tokens]

    def forward_features(self, x, masks=None, drops=None):
        """Tensor (B, in_chans, h, w) -> DINOv2's dict of normalised tokens; a list of crop groups -> a list of dicts.

        `masks` replaces patches by the mask token, one (B, P) bool tensor (or None) per group. `drops` is what
        `draw_drop_path` drew for these groups; without it no image is dropped.
        """
        if not isinstance(x, (list, tuple)):
            return self.forward_features([x], [masks], drops)[0]
        masks = masks or [None] * len(x)
        packed, shapes = self.pack(x, masks)  # (T, C)
        for i, block in enumerate(self.blocks):
            drop = drops[2 * i:2 * i + 2] if drops else (None, None)
            if self.checkpoint_activations and torch.is_grad_enabled():  # nothing random happens in a block
                packed = checkpoint(block, packed, shapes, drop, use_reentrant=False, preserve_rng_state=False)
            else:
                packed = block(packed, shapes, drop)
        sizes, R = [B * N for B, N in shapes], self.num_register_tokens
        outputs = []
        for shape, mask, prenorm, normed in zip(shapes, masks, packed.split(sizes), self.norm(packed).split(sizes)):
            normed = normed.view(*shape, self.embed_dim)  # (B, N, C)
            outputs.append({"x_norm_clstoken": normed[:, 0], "x_norm_regtokens": normed[:, 1:1 + R],
                            "x_norm_patchtokens": normed[:, 1 + R:], "x_prenorm": prenorm.view(*shape, self.embed_dim),
                            "masks": mask})
        return outputs

    def forward(self, x, masks=None, is_training=False):
        features = self.forward_features(x, masks)
        return features if is_training else features["x_norm_clstoken"]  # (B, C)

    def draw_drop_path(self, shapes, rng):
        """Which images of each group (B, N) every residual branch keeps: a list of 2 * depth entries, or None.

        Drawn on the CPU from numpy generator `rng` before the forward, so that nothing random happens inside it.
        """
        if not self.drop_path_rate:
            return None
        branches, device, first_row, first_kept, rows, inverse, scale, kept_shapes = (
            2 * len(self.blocks), self.pos_embed.device, 0, 0, [], [], [], [])
        for B, N in shapes:
            kept = min(B, max(int(B * (1 - self.drop_path_rate)), 1))
            chosen = np.sort(rng.random((branches, B)).argsort(axis=1)[:, :kept], axis=1)  # (branches, kept)
            place = np.full((branches, B), -N)  # of an image's first token among the kept ones; below 0: dropped
            np.put_along_axis(place, chosen, first_kept + N * np.arange(kept), axis=1)
            token = torch.arange(N, device=device)
            rows.append((to_device(first_row + N * chosen, device)[..., None] + token).flatten(1))
            inverse.append((to_device(place, device)[..., None] + token).clamp(min=-1).flatten(1))
            scale.append((inverse[-1] >= 0) * (B / max(kept, 1)))
            kept_shapes.append((kept, N))
            first_row, first_kept = first_row + B * N, first_kept + kept * N
        rows, inverse, scale = (torch.cat(x, dim=1) for x in (rows, inverse, scale))
        # (branches, kept tokens), (branches, T), (branches, T, 1)
        return [(*drop, kept_shapes) for drop in zip(rows, inverse, scale[..., None])]

    def compile_blocks(self, **how):
        """torch.compile each block: two graphs, which fuse what lies between matrix products, around attention."""
        for block in self.blocks:
            block.attend = torch.compiler.disable(attention)  # it stays the kernel it is
            block.compile(dynamic=False, **how)

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True):
        """Patch tokens after the last n blocks (or after the blocks named in the list n), registers left out.

        Each (B, P, C), or (B, C, rows, columns) with `reshape`; with `return_class_token` pairs (patches, cls).
        """
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        packed, shapes = self.pack([x], [None])
        outputs = []
        for i, block in enumerate(self.blocks):
            packed = block(packed, shapes)
            if i in wanted:
                tokens = (self.norm(packed) if norm else packed).view(*shapes[0], self.embed_dim)  # (B, N, C)
                patches, cls = tokens[:, 1 + self.num_register_tokens:], tokens[:, 0]
                if reshape:
                    grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()  # (B, C, rows, columns)
                outputs.append((patches, cls) if return_class_token else patches)
        return tuple(outputs)


def to_device(array, device):
    """A numpy array as a tensor there; through pinned memory, so that the CPU does not wait for a GPU."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def init_linear(module, std):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


def position_matrix(side, grid, offset=0.0, antialias=False):
    """The matrix (P, side^2) that bicubic interpolation applies to a side x side map to give `grid` = (rows, columns).

    Interpolating the identity once makes every later forward and backward a matrix product, which is deterministic
    on a GPU (the backward of F.interpolate is not). `offset` 0.1 is DINOv2's way of asking for a size.
    """
    identity = torch.eye(side * side).view(1, side * side, side, side)
    if offset:
        how = dict(scale_factor=tuple((length + offset) / side for length in grid))
    else:
        how = dict(size=grid)
    maps = F.interpolate(identity, mode="bicubic", antialias=antialias, **how)  # (1, side^2, rows, columns)
    if maps.shape[2:] != grid:
        raise ValueError(f"positions of {side}x{side} patches cannot be interpolated to {grid}")
    return maps[0].flatten(1).T.contiguous()


# ---------------------------------------------------------------- projection head

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
    """MLP to a unit-length bottleneck, then K prototypes: (rows, in_dim) -> logits (rows, K)."""

    def __init__(self, in_dim, out_dim, nlayers=3, hidden_dim=2048, bottleneck_dim=256, init_std=0.02):
        super().__init__()
        if nlayers == 1:
            self.mlp = nn.Linear(in_dim, bottleneck_dim)
        else:
            layers = [nn.Linear(in_dim, hidden_dim), nn.GELU()]
            for _ in range(nlayers - 2):
                layers += [nn.Linear(hidden_dim, hidden_dim), nn.GELU()]
            self.mlp = nn.Sequential(*layers, nn.Linear(hidden_dim, bottleneck_dim))
        init_linear(self.mlp, init_std)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)

    def bottleneck(self, x):
        x = self.mlp(x)  # (rows, bottleneck)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def forward(self, x):
        return self.last_layer(self.bottleneck(x))


# ---------------------------------------------------------------- learning rates

PATCH_EMBED_LR_MULT = 0.2  # DINOv2's, on top of the layer-wise decay


def parameter_groups(network, layerwise_decay):
    """AdamW's groups after DINOv2: a rate that falls towards the input, no decay of biases, norms and LayerScale."""
    depth, groups = len(network.backbone.blocks), {}
    for name, parameter in network.named_parameters():
        layer = depth + 1  # heads and the final norm
        if name.startswith("backbone.blocks."):
            layer = 1 + int(name.split(".")[2])
        elif any(part in name for part in ("pos_embed", "patch_embed", "mask_token", "cls_token", "register_tokens")):
            layer = 0
        lr_multiplier = layerwise_decay ** (depth + 1 - layer) * (PATCH_EMBED_LR_MULT if "patch_embed" in name else 1)
        wd_multiplier = 0.0 if name.endswith(".bias") or "norm" in name or "gamma" in name else 1.0
        key = (lr_multiplier, wd_multiplier, "last_layer" in name)
        groups.setdefault(key, []).append(parameter)
    return [dict(params=parameters, lr_multiplier=lr, wd_multiplier=wd, is_last_layer=last)
            for (lr, wd, last), parameters in groups.items()]
