"""What the parts of both networks share: norm, 2-D convolution, zero start, memory layout."""

import math

import torch
from torch import nn

NORM_GROUPS = 32


def group_norm(channels: int, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm with gcd(groups, channels) groups."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


class ConvNormAct(nn.Sequential):
    """Conv2d of an odd kernel, GroupNorm, SiLU: [B,C_in,H,W] -> [B,C_out,H/stride,W/stride]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = NORM_GROUPS,
    ):
        padding = kernel_size // 2
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding)
        super().__init__(conv, group_norm(out_channels, groups), nn.SiLU())


def zero_module(module: nn.Module) -> nn.Module:
    """Zero a module's parameters, so that the branch it ends adds nothing at first; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def use_fast_layout(module: nn.Module) -> nn.Module:
    """Lay out convolution weights channels-last where they are on a CPU; returns the module.

    This is faster there. On CUDA torch's GroupNorm undoes it, so the default layout stays (LOG.md).
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in module.parameters():
        if parameter.is_cpu and parameter.dim() in formats:
            layout = formats[parameter.dim()]
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return module
