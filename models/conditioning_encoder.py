"""What the network knows of the observed frames: one 2-D encoder for both contexts, fused level by level."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class ContextFeatures(NamedTuple):
    """Fused features of both contexts, and the two observed frames nearest to the middle.

    Attributes:
        stem: [B,C,H,W].
        levels: one per U-Net level, [B,L[i],H/2^i,W/2^i].
        bottleneck: [B,L[-1],H/2^n,W/2^n] for n levels.
        nearest: last start frame and first end frame, [B,2*image_channels,H,W].
    """

    stem: Tensor
    levels: list[Tensor]
    bottleneck: Tensor
    nearest: Tensor


class ConvNormAct(nn.Sequential):
    """Conv2d 3x3, GroupNorm, SiLU: [B,C_in,H,W] -> [B,C_out,H/stride,W/stride]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1),
            nn.GroupNorm(math.gcd(32, out_channels), out_channels),
            nn.SiLU(),
        )


class Fusion(nn.Sequential):
    """Start and end feature, concatenated and mixed by a 1x1 convolution: [B,2C,H,W] -> [B,C,H,W]."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(2 * channels, channels, 1),
            nn.GroupNorm(math.gcd(32, channels), channels),
            nn.SiLU(),
        )


class ContextEncoder(nn.Module):
    """One context to features at every resolution of the U-Net; the same weights serve both ends."""

    def __init__(self, in_channels: int, base_channels: int, widths: list[int]):
        super().__init__()
        self.stem = ConvNormAct(in_channels, base_channels)
        inputs = [base_channels, *widths[1:]]
        self.project = nn.ModuleList(nn.Conv2d(i, width, 1) for i, width in zip(inputs, widths, strict=True))
        self.down = nn.ModuleList(
            ConvNormAct(i, o, stride=2) for i, o in zip(inputs, [*widths[1:], widths[-1]], strict=True)
        )
        self.project_bottleneck = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(self, context: Tensor) -> list[Tensor]:
        """[B,C_img*K,H,W] -> stem, one feature per level, bottleneck: in all len(widths) + 2 maps."""
        x = self.stem(context)
        features = [x]
        for project, down in zip(self.project, self.down, strict=True):
            features.append(project(x))
            x = down(x)
        return [*features, self.project_bottleneck(x)]


class EndpointEncoder(nn.Module):
    """Both contexts through the shared encoder, then fused with weights of each resolution's own."""

    def __init__(self, image_channels: int, endpoint_context: int, base_channels: int, widths: list[int]):
        super().__init__()
        self.encoder = ContextEncoder(image_channels * endpoint_context, base_channels, widths)
        self.fuse = nn.ModuleList(Fusion(width) for width in [base_channels, *widths, widths[-1]])

    def forward(self, start_context: Tensor, end_context: Tensor) -> ContextFeatures:
        """Two contexts [B,C_img,K,H,W] -> their ContextFeatures."""
        start_maps = self.encoder(start_context.flatten(1, 2))  # K frames as channels: [B,C_img*K,H,W]
        end_maps = self.encoder(end_context.flatten(1, 2))
        stem, *levels, bottleneck = (
            fuse(torch.cat(pair, dim=1)) for fuse, *pair in zip(self.fuse, start_maps, end_maps, strict=True)
        )
        nearest = torch.cat([start_context[:, :, -1], end_context[:, :, 0]], dim=1)
        return ContextFeatures(stem, levels, bottleneck, nearest)
