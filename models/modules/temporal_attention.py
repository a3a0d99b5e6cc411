"""Multi-head self-attention over the frames of one pixel, and the sinusoids that tell frames and timesteps apart."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(position: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sines and cosines of `position` at geometrically spaced frequencies.

    Args:
        position: [N], any real numbers.
        width: channels of the result; an odd one ends in a zero.
        max_period: longest wavelength, in units of 2*pi positions.

    Returns: [N, width] float32.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position.device) / max(half, 1)
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # [N, width // 2]
    embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


class TemporalAttention(nn.Module):
    """Self-attention with a fused qkv projection and an output projection over tokens [N,M,C].

    The attention is written as two matrix products: with a handful of frames and tens of thousands of rows it is the
    faster form in training (benchmarks/LOG.md), and CUDA's fused kernels refuse more than 65,535 rows (pytorch
    issue 142228).

    Raises: ValueError: if the channels do not divide into the heads.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention needs channels divisible by its {heads} heads (got {channels})")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mix each row's frames: tokens [N,M,C] -> [N,M,C]; frame positions are added to the input."""
        n, m, c = tokens.shape
        frame_position = sinusoidal_embedding(torch.arange(m, device=tokens.device), c)
        tokens = tokens + frame_position.to(tokens.dtype)
        qkv = self.qkv(tokens).view(n, m, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N, heads, M, C / heads]
        mixed = self.attend(q, k, v).transpose(1, 2).reshape(n, m, c)
        return self.out(mixed)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, each [N, heads, M, d]."""
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [N, heads, M, M]
        return weights.to(v.dtype) @ v
