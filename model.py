"""The vision transformer of DINOv2 and DINOv3: its block, then the whole.

State-dict keys, constructor keywords and results are those of facebookresearch/dinov2, so official weights load
strictly and ours load elsewhere. Differences, all invisible from outside: tokens of every crop size go through the
linear layers as one packed (T, C) matrix; LayerNorm's affine part and LayerScale are folded into the linear layers
beside them, so that a block keeps few activations; drop path gets its random indices from the caller.
networks/families.py renames the keys of others, DINOv3's among them.

B images, N tokens of an image (cls, registers, patches), T = sum of B * N over crop sizes, C width, H heads,
D head dim, P patches, K prototypes; an image is (B, in_chans, h, w), a map of its patches (B, C, rows, columns).
"""

import collections
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
    "vit_small_plus": dict(embed_dim=384, depth=12, num_heads=6, mlp_ratio=6.0, ffn_layer="swiglufused"),
    "vit_base": dict(embed_dim=768, depth=12, num_heads=12),
    "vit_large": dict(embed_dim=1024, depth=24, num_heads=16),
    "vit_large_plus": dict(embed_dim=1024, depth=24, num_heads=16, mlp_ratio=6.0, ffn_layer="swiglufused"),
    "vit_huge_plus": dict(embed_dim=1280, depth=32, num_heads=20, mlp_ratio=6.0, ffn_layer="swiglufused"),
    "vit_giant2": dict(embed_dim=1536, depth=40, num_heads=24, ffn_layer="swiglufused"),
}
DINOV3 = dict(pos="rope", norm_eps=1e-5, mask_k_bias=True)  # what its ViT has beside a size; DINOv2's are the defaults


# ---------------------------------------------------------------- a block on packed tokens

class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)

    def forward(self, x):
        # the convolution as a matrix product, whose gradient is deterministic on a GPU (cuDNN's need not be)
        p = self.proj.kernel_size[0]
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # (B, rows, columns, c, p, p)
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


def folded(linear, dtype, norm=None, scale=None, bias_mask=None):
    """Weight and bias of scale(linear(norm(x))) for an x that is normalised already; `bias_mask` multiplies its bias.

    LayerNorm's weight and bias and LayerScale are products with small matrices here, not passes over all tokens, and
    their gradients need no tokens kept: they come from the gradient of the folded weight.
    """
    weight, bias = linear.weight, linear.bias if bias_mask is None else linear.bias * bias_mask
    if norm is not None:
        weight, bias = weight * norm.weight, bias + (weight * norm.bias).sum(1)
    if scale is not None:
        weight, bias = weight * scale.gamma[:, None], bias * scale.gamma
    return weight.to(dtype), bias.to(dtype)


class Attention(nn.Module):
    """The weights of attention; Block.forward uses them. With `mask_k_bias` (DINOv3) keys have no bias of their own."""

    def __init__(self, dim, num_heads, mask_k_bias):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        mask = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(dim) if mask_k_bias else None  # (3C,)
        self.register_buffer("bias_mask", mask, persistent=False)  # in no file of ours: the config says it


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x, norm, scale, routing=None):
        x = F.linear(x, *folded(self.fc1, x.dtype, norm=norm))  # (T, hidden)
        return GeluLinear.apply(x, *folded(self.fc2, x.dtype, scale=scale))  # (T, C)


class SwiGLU(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8  # as many parameters as the MLP, in multiples of 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x, norm, scale, routing=None):
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


# What one residual branch keeps where images skip it at random: the kept rows of the packed tokens (kept,); their
# inverse (T,), the place of each row among the kept ones or -1; the factor of each row's residual (T, 1); and the
# (B, N) of what is kept of each crop group.
Drop = collections.namedtuple("Drop", "rows inverse scale shapes")


def keep_images(x, shapes, drop):
    """The tokens (kept, C) that a residual branch works on, and their shapes: all, or those of some random images.

    Stochastic depth as DINOv2 does it: each crop size keeps a share of its images, the residual is scaled by
    images / kept, and the dropped images cost nothing.
    """
    return (x, shapes) if drop is None else (KeepRows.apply(x, drop.rows, drop.inverse), drop.shapes)


def add_residual(x, residual, drop):
    """x + residual. x stays float32 whatever the branch computed in: at a LayerScale of 1e-5 bf16 would lose it all."""
    return x + residual if drop is None else AddRows.apply(x, residual, drop.rows, drop.inverse, drop.scale)


class Block(nn.Module):
    """The transformer's block as everybody knows it:

        x = x + drop_path(ls1(attn(norm1(x))))
        x = x + drop_path(ls2(mlp(norm2(x))))

    What runs is the same, folded: drop_path comes first, as the choice of the images that a branch works on at all, and
    the weights of norm and ls are part of the linear layers next to them, so that neither is a pass over the tokens.
    """

    def __init__(self, dim, num_heads, mlp_ratio, ffn_layer, init_values, norm_eps=1e-6, mask_k_bias=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, mask_k_bias)
        self.ls1 = LayerScale(dim, init_values) if init_values else None
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = FFN_LAYERS[ffn_layer](dim, int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values else None
        self.attend = attention

    def forward(self, x, shapes, drops=(None, None), rope=None, routing=None):
        """Packed tokens (T, C) -> the same. routing: what moe.MixtureOfExperts takes in place of `mlp` asks for."""
        y, kept_shapes = keep_images(x, shapes, drops[0])  # (kept tokens, C)
        y = normalize(y, self.norm1)
        y = F.linear(y, *folded(self.attn.qkv, y.dtype, self.norm1, bias_mask=self.attn.bias_mask))  # (kept tokens, 3C)
        y = self.attend(y, kept_shapes, self.attn.num_heads, rope)  # (kept tokens, C)
        y = F.linear(y, *folded(self.attn.proj, y.dtype, scale=self.ls1))
        x = add_residual(x, y, drops[0])  # (T, C)

        y, _ = keep_images(x, shapes, drops[1])
        y = self.mlp(normalize(y, self.norm2), self.norm2, self.ls2, routing)  # folds them as attention does
        return add_residual(x, y, drops[1])


def init_linear(module, std):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)


# ---------------------------------------------------------------- the transformer

class VisionTransformer(nn.Module):
    """DINOv2's ViT. `drop_path_rate` is the same for every block (DINOv2's drop_path_uniform, UltraDINO's choice in
    pretraining); drop_path_uniform=False grows it evenly from 0 at the first block (its choice in segmentation).

    `init_std` of the linear layers is DINOv2's 0.02; networks much narrower than its start faster near width ** -0.5.
    With pos="rope" (DINOV3) queries and keys of patches turn by their place, nothing is learned; `rope_dtype` is what
    the periods are rounded to: official files hold them in bfloat16.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4.0,
                 ffn_layer="mlp", num_register_tokens=0, drop_path_rate=0.0, init_values=1e-5,
                 interpolate_offset=0.1, interpolate_antialias=False, init_std=0.02, pos="learned", norm_eps=1e-6,
                 mask_k_bias=False, rope_dtype="float32", drop_path_uniform=True):
        super().__init__()
        if pos not in ("learned", "rope"):
            raise ValueError(f"pos is {pos!r}: learned (DINOv2) or rope (DINOv3)")
        self.embed_dim, self.patch_size, self.in_chans = embed_dim, patch_size, in_chans
        self.num_heads, self.num_register_tokens = num_heads, num_register_tokens
        self.drop_path_rate, self.drop_path_uniform = drop_path_rate, drop_path_uniform
        self.interpolate_offset, self.interpolate_antialias = interpolate_offset, interpolate_antialias
        self.pos, self.rope_dtype = pos, rope_dtype
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        if pos == "learned":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, ffn_layer, init_values, norm_eps, mask_k_bias) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.checkpoint_activations = False  # True: backward computes each block again instead of remembering it
        self._resize = {}  # (grid, device, dtype) -> matrix that interpolates pos_embed, see position_matrix
        self._rope = {}  # (grid, device) -> angles, their cos and sin, see rope_table
        self.init_weights(init_std)

    def init_weights(self, init_std):
        if self.pos == "learned":
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        token_std = 1e-6 if self.pos == "learned" else 0.02  # DINOv2's, DINOv3's
        nn.init.normal_(self.cls_token, std=token_std)
        if self.num_register_tokens:
            nn.init.normal_(self.register_tokens, std=token_std)
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

    def turns(self, crops, rescale=None):
        """What each block's kernels.attention takes as `rope`: per block, (cos, sin) of each crop group. None if
        positions are learned.

        `rescale` (depth, groups), what draw_rescale drew: a factor of all coordinates, hence of all angles.
        """
        if self.pos == "learned":
            return None
        tables, device = [], self.cls_token.device
        rescale = None if rescale is None else to_device(rescale, device)
        for group, x in enumerate(crops):
            key = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size), device
            if key not in self._rope:
                table = rope_table(key[0], self.embed_dim // self.num_heads, self.rope_dtype)
                still = table.new_zeros(1 + self.num_register_tokens, table.shape[1])  # cls, registers have no place
                angles = torch.cat((still, table))  # (N, D/2)
                self._rope[key] = (angles.to(device), angles.cos().to(device, torch.float32),
                                   angles.sin().to(device, torch.float32))
            angles, cos, sin = self._rope[key]
            if rescale is None:
                tables.append([(cos, sin)] * len(self.blocks))
            else:
                angles = rescale[:, group, None, None] * angles  # (depth, N, D/2)
                tables.append(list(zip(angles.cos().float(), angles.sin().float())))
        return [list(block) for block in zip(*tables)]

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
        if self.pos == "learned":
            x = x + self.positions((h // self.patch_size, w // self.patch_size))
        if self.num_register_tokens:  # registers come after the positions are added: they have none
            x = torch.cat((x[:, :1], self.register_tokens.expand(B, -1, -1), x[:, 1:]), dim=1)
        return x

    def pack(self, crops, masks):
        """Tokens of every crop group as one matrix (T, C), and the (B, N) of each group."""
        tokens = [self.prepare_tokens(x, mask) for x, mask in zip(crops, masks)]
        return torch.cat([x.flatten(0, 1) for x in tokens]), [tuple(x.shape[:2]) for x in tokens]

    def run_blocks(self, packed, shapes, drops, rope, routing=None):
        """Yield the packed tokens (T, C) after each block in turn. `rope` is what `turns` gives."""
        for i, block in enumerate(self.blocks):
            own = drops[2 * i:2 * i + 2] if drops else (None, None), rope[i] if rope else None, routing
            if self.checkpoint_activations and torch.is_grad_enabled():  # nothing random happens in a block
                packed = checkpoint(block, packed, shapes, *own, use_reentrant=False, preserve_rng_state=False)
            else:
                packed = block(packed, shapes, *own)
            yield packed

    def forward_features(self, x, masks=None, drops=None, rescale=None):
        """Tensor (B, in_chans, h, w) -> DINOv2's dict of normalised tokens; a list of crop groups -> a list of dicts.

        `masks` replaces patches by the mask token, one (B, P) bool tensor (or None) per group. `drops` is what
        `draw_drop_path` drew for these groups; without it no image is dropped. `rescale`: see `turns`.
        """
        if not isinstance(x, (list, tuple)):
            return self.forward_features([x], [masks], drops, rescale)[0]
        masks = masks or [None] * len(x)
        packed, shapes = self.pack(x, masks)  # (T, C)
        for packed in self.run_blocks(packed, shapes, drops, self.turns(x, rescale)):
            pass
        sizes, R = [B * N for B, N in shapes], self.num_register_tokens
        outputs = []
        for shape, mask, prenorm, normed in zip(shapes, masks, packed.split(sizes), self.norm(packed).split(sizes)):
            normed = normed.view(*shape, self.embed_dim)  # (B, N, C)
            outputs.append({"x_norm_clstoken": normed[:, 0], "x_norm_regtokens": normed[:, 1:1 + R],
                            "x_norm_patchtokens": normed[:, 1 + R:], "x_prenorm": prenorm.view(*shape, self.embed_dim),
                            "masks": mask})
        return outputs

    def forward(self, x, masks=None):
        return self.forward_features(x, masks)["x_norm_clstoken"]  # (B, C)

    def draw_drop_path(self, shapes, rng):
        """Which images of each group (B, N) every residual branch keeps: a Drop for each of 2 * depth, or None. That
        of a branch that keeps all is None.

        Drawn on the CPU from numpy generator `rng` before the forward, so that nothing random happens inside it.
        """
        if not self.drop_path_rate:
            return None
        depth, device, drops = len(self.blocks), self.cls_token.device, []
        if self.drop_path_uniform:
            kept = [min(B, max(int(B * (1 - self.drop_path_rate)), 1)) for B, _ in shapes]  # DINOv2's rounding
            return draw_kept(2 * depth, shapes, kept, rng, device)
        for rate in np.linspace(0, self.drop_path_rate, depth):
            kept = [min(B, max(round(B * (1 - rate)), 1)) for B, _ in shapes]  # down, every rate would drop an image
            drops += draw_kept(2, shapes, kept, rng, device) if rate else [None, None]
        return drops

    def compile_blocks(self, **how):
        """torch.compile each block: two graphs, which fuse what lies between matrix products, around attention."""
        for block in self.blocks:
            block.attend = torch.compiler.disable(attention)  # it stays the kernel it is
            block.compile(dynamic=False, **how)

    def get_intermediate_layers(self, x, n=1, reshape=False, return_class_token=False, norm=True, drops=None,
                                routing=None, rescale=None):
        """Patch tokens after the last n blocks (or after the blocks named in the list n), registers left out.

        Each (B, P, C), or (B, C, rows, columns) with `reshape`; with `return_class_token` pairs (patches, cls). `drops`
        and `rescale` as in forward_features; `routing` as in moe.MixtureOfExperts, for a backbone that has some.
        """
        wanted = range(len(self.blocks) - n, len(self.blocks)) if isinstance(n, int) else n
        packed, shapes = self.pack([x], [None])
        outputs = []
        for i, packed in enumerate(self.run_blocks(packed, shapes, drops, self.turns([x], rescale), routing)):
            if i in wanted:
                tokens = (self.norm(packed) if norm else packed).view(*shapes[0], self.embed_dim)  # (B, N, C)
                patches, cls = tokens[:, 1 + self.num_register_tokens:], tokens[:, 0]
                if reshape:
                    grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()  # (B, C, rows, columns)
                outputs.append((patches, cls) if return_class_token else patches)
        return tuple(outputs)


# ---------------------------------------------------------------- drop path

def draw_kept(branches, shapes, kept_images, rng, device):
    """A Drop for each of `branches`: random `kept_images` images of each group (B, N)."""
    first_row, first_kept, rows, inverse, scale, kept_shapes = 0, 0, [], [], [], []
    for (B, N), kept in zip(shapes, kept_images):
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
    return [Drop(*drop, kept_shapes) for drop in zip(rows, inverse, scale[..., None])]


def to_device(array, device):
    """A numpy array as a tensor there; through pinned memory, so that the CPU does not wait for a GPU."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


# ---------------------------------------------------------------- positions

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


def rope_periods(head_dim, dtype="float32"):
    """DINOv3's periods 100^(4i / D) of i = 0 .. D/4 - 1, rounded to `dtype`: float64 (D/4,)."""
    periods = 100 ** (torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
    return periods.to(getattr(torch, dtype)).double()


def rope_table(grid, head_dim, dtype="float32"):
    """float64 angles (P, D/2) by which DINOv3 turns the halves of queries and keys: of the row, then of the column.

    A patch's centre has coordinates -1 .. 1 across the image; its angles are 2 pi coordinate / period.
    """
    row, column = [(torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1 for n in grid]
    places = torch.stack(torch.meshgrid(row, column, indexing="ij"), dim=-1)  # (rows, columns, 2)
    return (2 * torch.pi * places[..., None] / rope_periods(head_dim, dtype)).flatten(2).flatten(0, 1)


def draw_rescale(depth, groups, limit, rng):
    """By how much DINOv3 stretches the coordinates of patches in training, both axes alike: exp(U(-ln limit, ln limit))
    for each block and crop group, float64 (depth, groups). None where limit is 1: positions as in evaluation.
    """
    return None if limit == 1 else np.exp(rng.uniform(-math.log(limit), math.log(limit), (depth, groups)))
