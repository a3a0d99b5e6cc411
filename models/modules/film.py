"""Feature-wise linear modulation by a 2-D condition map."""

from torch import Tensor, nn

from models.modules.layers import zero_module


class FiLM(nn.Module):
    """x * (1 + scale) + shift, both predicted per pixel; zero at first, shared by all frames.

    Source: Perez et al. 2018, arXiv:1709.07871.
    """

    def __init__(self, condition_channels: int, channels: int):
        super().__init__()
        self.scale = zero_module(nn.Conv2d(condition_channels, channels, 1))
        self.shift = zero_module(nn.Conv2d(condition_channels, channels, 1))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate x, [B,C,M,H,W], by condition, [B,condition_channels,H,W]."""
        scale = self.scale(condition).unsqueeze(2)  # [B,C,1,H,W]
        shift = self.shift(condition).unsqueeze(2)  # [B,C,1,H,W]
        return x * (1 + scale) + shift
