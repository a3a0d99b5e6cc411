"""The norm, the 2-D convolution and the zero initialisation that the parts of the network share."""

import math

from torch import nn

NORM_GROUPS = 32


def group_norm(channels: int, groups: int = NORM_GROUPS) -> nn.GroupNorm:
    """GroupNorm with gcd(groups, channels) groups."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


class ConvNormAct(nn.Sequential):
    """Conv2d of an odd kernel size, GroupNorm, SiLU: [B,C_in,H,W] -> [B,C_out,H/stride,W/stride]."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, groups: int = NORM_GROUPS
    ):
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2)
        super().__init__(conv, group_norm(out_channels, groups), nn.SiLU())


def zero_module(module: nn.Module) -> nn.Module:
    """Zero the parameters of a module, so that the branch it ends adds nothing at first; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
