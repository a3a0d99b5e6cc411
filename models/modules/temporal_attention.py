"""Self-attention over the frames of one pixel, and the embedding of frames and timesteps."""

import math

import torch
from torch import Tensor, nn


def sinusoidal_embedding(position: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Sines, then cosines, of positions at geometric frequencies.

    Args:
        position: any real numbers, [N].
        width: of the embedding; an odd width ends in a zero.
        max_period: wavelengths rise from 2*pi to 2*pi * max_period.

    Returns: [N,width] float32.
    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=position.device) / max(half, 1)
    frequency = torch.exp(-math.log(max_period) * exponent)
    angle = position.float()[:, None] * frequency  # [N,width//2]
    embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


class TemporalAttention(nn.Module):
    """Multi-head self-attention over the M frames of tokens [N,M,C].

    Scaled dot-product attention is written as two matrix products: with a handful of frames and
    tens of thousands of rows this trains faster (LOG.md), and CUDA's fused kernels refuse more
    than 65,535 rows (pytorch issue 142228).

    Raises: ValueError: unless the heads divide the channels.
    """

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        if channels % heads:
            rule = f"attention needs channels divisible by its {heads} heads"
            raise ValueError(f"{rule} (got {channels})")
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N,M,C] -> [N,M,C]; frame positions are added to the input."""
        n, m, c = tokens.shape
        frames = torch.arange(m, device=tokens.device)
        position = sinusoidal_embedding(frames, c).to(tokens.dtype)  # [M,C]
        qkv = self.qkv(tokens + position).view(n, m, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [N,heads,M,C/heads]
        scale = q.shape[-1] ** -0.5
        weights = (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)  # [N,heads,M,M]
        mixed = weights.to(v.dtype) @ v  # [N,heads,M,C/heads]
        return self.out(mixed.transpose(1, 2).reshape(n, m, c))
