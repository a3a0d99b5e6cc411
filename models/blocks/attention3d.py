"""Temporal attention as a residual unit."""

from torch import Tensor, nn

from models.modules.layers import group_norm, zero_module
from models.modules.temporal_attention import TemporalAttention


class TemporalAttentionBlock(nn.Module):
    """GroupNorm, attention of each pixel over its frames, 1x1x1 convolution, plus the input."""

    def __init__(self, channels: int, heads: int = 4):
        super().__init__()
        self.norm = group_norm(channels)
        self.attention = TemporalAttention(channels, heads)
        self.proj = zero_module(nn.Conv3d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,M,H,W] -> the same shape."""
        b, c, m, h, w = x.shape
        tokens = self.norm(x).permute(0, 3, 4, 2, 1).reshape(b * h * w, m, c)  # [B*H*W,M,C]
        mixed = self.attention(tokens).reshape(b, h, w, m, c)
        return x + self.proj(mixed.permute(0, 4, 3, 1, 2))  # [B,C,M,H,W]
