"""The norm and the zero initialisation that every part of the network shares."""

import math

from torch import nn

NORM_GROUPS = 32


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with gcd(32, channels) groups."""
    return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Zero the parameters of a module, so that the branch it ends adds nothing at first; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
