"""Multi-head self-attention over the frames of one pixel, and the sinusoidal embedding of frames and timesteps."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(position: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sines, then cosines, of `position` ([N], any real numbers) at geometric frequencies: [N, width] float32.

    Wavelengths rise from 2*pi to 2*pi * max_period; an odd width ends in a zero.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position.device) / max(half, 1)
    angle = position.float()[:, None] * torch.exp(-math.log(max_period) * exponent)  # [N, width // 2]
    embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


class TemporalAttention(nn.Module):
    """Multi-head self-attention over the M frames of tokens [N,M,C]; ValueError unless heads divide channels.

    Scaled dot-product attention is written as two matrix products: with a handful of frames and tens of thousands of
    rows that is faster in training (benchmarks/LOG.md), and CUDA's fused kernels refuse more than 65,535 rows (pytorch
    issue 142228).
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attention needs channels divisible by its {heads} heads (got {channels})")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N,M,C] -> [N,M,C]; frame positions are added to the input."""
        n, m, c = tokens.shape
        frame_position = sinusoidal_embedding(torch.arange(m, device=tokens.device), c)  # [M,C]
        qkv = self.qkv(tokens + frame_position.to(tokens.dtype))  # [N,M,3C]
        q, k, v = qkv.view(n, m, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)  # each [N,heads,M,C/heads]
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)  # [N,heads,M,M]
        mixed = weights.to(v.dtype) @ v  # [N,heads,M,C/heads]
        return self.out(mixed.transpose(1, 2).reshape(n, m, c))
