"""One transformer block on packed tokens: patch projection, attention, MLP or SwiGLU, LayerScale, drop path.

LayerNorm's affine part and LayerScale are folded into the linear layers beside them, so that a block keeps few
activations. T tokens of all crops in one matrix, C width, H heads; an image is (B, in_chans, h, w).
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from kernels import attention


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


def keep_images(x, shapes, drop):
    """The tokens (kept, C) that a residual branch works on, and their shapes: all, or those of some random images.

    Stochastic depth as DINOv2 does it: each crop size keeps a share of its images, the residual is scaled by
    images / kept, and the dropped images cost nothing. drop = (rows, inverse, scale, kept_shapes), or None.
    """
    return (x, shapes) if drop is None else (KeepRows.apply(x, *drop[:2]), drop[3])


def add_residual(x, residual, drop):
    """x + residual. x stays float32 whatever the branch computed in: at a LayerScale of 1e-5 bf16 would lose it all."""
    return x + residual if drop is None else AddRows.apply(x, residual, *drop[:3])


class Block(nn.Module):
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
        y = self.attend(y, kept_shapes, self.attn.num_heads, rope)
        x = add_residual(x, F.linear(y, *folded(self.attn.proj, y.dtype, scale=self.ls1)), drops[0])  # (T, C)
        y, _ = keep_images(x, shapes, drops[1])
        return add_residual(x, self.mlp(normalize(y, self.norm2), self.norm2, self.ls2, routing), drops[1])


def init_linear(module, std):
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
