"""Decoders of a backbone's patch maps: UPerNet and a linear layer for one segmentation set, and the blocks they share.

UltraDINO's segmenters; heads.py has those of many tasks. B images, C width, K classes; a map of an image's patches is
(B, C, rows, columns). What resizes is made of matrix products, whose gradients are deterministic on a GPU.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from model import to_device

LEAST_SHARE = 1e-6  # of pixels, of a class that no train image shows


# ---------------------------------------------------------------- blocks

@functools.lru_cache(maxsize=256)
def axis_matrix(length, size, pool, dtype, device):
    """Linear interpolation (align_corners False) or adaptive pooling of `length` places to `size`, as a matrix."""
    identity = torch.eye(length, dtype=torch.float64)[None]  # channel i is 1 at place i
    maps = F.adaptive_avg_pool1d(identity, size) if pool else F.interpolate(identity, size=size, mode="linear")
    return maps[0].T.to(device, dtype).contiguous()  # (size, length)


def resize(x, size, pool=False):
    """Maps (B, C, h, w) -> (B, C, *size), of x's dtype: as F.interpolate does it bilinearly, or with `pool` as adaptive
    average pooling. As position_matrix, products with fixed matrices: backward is then deterministic on a GPU."""
    if x.shape[2:] == tuple(size):
        return x
    dtype = torch.promote_types(x.dtype, torch.float32)  # whatever autocast says
    rows, columns = (axis_matrix(length, n, pool, dtype, x.device) for length, n in zip(x.shape[2:], size))
    with torch.autocast(x.device.type, enabled=False):
        return (rows @ (x.to(dtype) @ columns.T)).to(x.dtype)


def halve(x):
    """Max pooling 2x2, a last odd row or column by itself. By amax: torch's own backward adds in any order on a GPU."""
    x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), value=-torch.inf)
    return x.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).amax((3, 5))


def group_norm(channels):
    """Groups of 16 channels, the paper's second choice (Wu and He 2018): 32 groups leave a narrow network's maps of 1x1
    few numbers each, and of a group of one number nothing is left."""
    return nn.GroupNorm(channels // 16 if channels % 16 == 0 else 1, channels)


class ConvReLU(nn.Module):
    """Convolution that keeps the size, ReLU; with norm="group" a group norm between, and no bias, as in mmseg."""

    def __init__(self, in_dim, dim, kernel_size, norm):
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, padding=kernel_size // 2, bias=norm == "none")
        self.norm = group_norm(dim) if norm == "group" else nn.Identity()
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")  # mmseg's
        if norm == "none":
            nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class PixelClassifier(nn.Conv2d):
    """1x1 convolution to K logits, in float32 at least: they are resized before they are compared."""

    def __init__(self, dim, n_classes, std=0.01, bias=True):
        super().__init__(dim, n_classes, 1, bias=bias)
        nn.init.normal_(self.weight, std=std)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(torch.promote_types(x.dtype, torch.float32)))


# ---------------------------------------------------------------- segmentation

class Pyramid(nn.Module):
    """Four maps (B, C, rows, columns) of one grid -> maps of 4, 2, 1 and 1/2 times its sides, as in BEiT.

    The released code has a batch norm over all processes here whatever norm the decoder has; a group norm's statistics
    depend neither on the batch nor on who shares it.
    """

    def __init__(self, dim):
        super().__init__()
        self.up4, self.up4_again, self.up2 = (nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(3))
        self.norm = group_norm(dim)
        for up in (self.up4, self.up4_again, self.up2):
            nn.init.normal_(up.weight, std=dim ** -0.5)  # keeps a map's variance; torch's own divides it by 12
            nn.init.zeros_(up.bias)

    def forward(self, maps):
        return [self.up4_again(F.gelu(self.norm(self.up4(maps[0])))), self.up2(maps[1]), maps[2], halve(maps[3])]


class UPerNet(nn.Module):
    """Four maps (B, dim, rows, columns) of one grid -> logits (B, K, 4 rows, 4 columns) (Xiao et al. 2018).

    mmseg's UPerHead on a pyramid: pooling of the smallest map, sums from the top down, one convolution over all levels.
    norm="none" is the decoder that UltraDINO ran, with `channels` = dim; "group" stands for mmseg's usual batch norm.
    """

    SCALES = (1, 2, 3, 6)  # of pyramid pooling

    def __init__(self, dim, n_classes, channels=None, norm="group", dropout=0.1):
        super().__init__()
        if norm not in ("group", "none"):
            raise ValueError(f"norm is {norm!r}: group, or none as in UltraDINO's released decoder")
        self.dropout, self.channels = dropout, channels or dim
        channels = self.channels
        self.pyramid = Pyramid(dim)
        self.pools = nn.ModuleList(ConvReLU(dim, channels, 1, norm) for _ in self.SCALES)
        self.bottleneck = ConvReLU(dim + len(self.SCALES) * channels, channels, 3, norm)
        self.laterals = nn.ModuleList(ConvReLU(dim, channels, 1, norm) for _ in range(3))  # of the largest map first
        self.convs = nn.ModuleList(ConvReLU(channels, channels, 3, norm) for _ in range(3))
        self.fusion = ConvReLU(4 * channels, channels, 3, norm)
        # mmseg's 0.01 after group norm: for hundreds of steps all is background, on small sets for good
        self.classifier = PixelClassifier(channels, n_classes, channels ** -0.5 if norm == "group" else 0.01)

    def draw_dropout(self, B, rng):
        """What forward takes as `keep`, from numpy generator `rng`: float32 (B, channels), 0 or 1 / (1 - dropout)."""
        keep = (rng.random((B, self.channels)) >= self.dropout) / (1 - self.dropout)
        return to_device(keep.astype(np.float32), self.classifier.weight.device)

    def forward(self, maps, keep=None):
        *maps, top = self.pyramid(maps)
        pooled = [resize(conv(resize(top, (scale, scale), pool=True)), top.shape[2:])
                  for scale, conv in zip(self.SCALES, self.pools)]
        x = self.bottleneck(torch.cat([top, *pooled], dim=1))  # (B, channels, rows / 2, columns / 2)
        levels, size = [x], maps[0].shape[2:]
        for level, lateral, conv in reversed(list(zip(maps, self.laterals, self.convs))):
            x = lateral(level) + resize(x, level.shape[2:])  # (B, channels, rows, columns), then twice and four times
            levels.insert(0, conv(x))
        x = self.fusion(torch.cat([resize(level, size) for level in levels], dim=1))  # (B, channels, 4 rows, 4 columns)
        return self.classifier(x if keep is None else x * keep[:, :, None, None])


class LinearDecoder(nn.Module):
    """The last map alone, patch by patch -> logits (B, K, rows, columns). Nothing is dropped: `keep` is None."""

    def __init__(self, dim, n_classes):
        super().__init__()
        self.classifier = PixelClassifier(dim, n_classes)

    def forward(self, maps, keep=None):
        return self.classifier(maps[-1])


class Segmenter(nn.Module):
    """Images (B, in_chans, h, w) of any size -> logits float32 (B, K, h, w).

    The patches after the blocks at 1/3, 1/2, 2/3 and the end of the depth, through the backbone's last norm, go to
    `decoder`; registers stay in the network. A `frozen` backbone has no gradient, no drop path, and stays in eval mode.
    """

    def __init__(self, backbone, decoder, frozen=False):
        super().__init__()
        self.backbone, self.decoder, self.frozen = backbone, decoder, frozen
        depth = len(backbone.blocks)
        self.blocks = [max(1, round(depth * share)) - 1 for share in (1 / 3, 1 / 2, 2 / 3, 1)]  # 3, 5, 7, 11 of 12
        if frozen:
            backbone.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.frozen)
        return self

    def forward(self, x, drops=None, keep=None):
        """`drops`: backbone.draw_drop_path for the tokens of the padded images; `keep`: decoder.draw_dropout."""
        (h, w), p = x.shape[2:], self.backbone.patch_size
        x = F.pad(x, (0, -w % p, 0, -h % p))  # right and bottom, with 0: the mean grey
        blocks = sorted(set(self.blocks))  # a network of fewer than four has some of them twice
        how = dict(drops=drops) if drops and not self.frozen else {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            found = self.backbone.get_intermediate_layers(x, blocks, reshape=True, **how)
        maps = [found[blocks.index(block)] for block in self.blocks]  # four of (B, C, rows, columns)
        return resize(self.decoder(maps, keep), x.shape[2:])[:, :, :h, :w]
