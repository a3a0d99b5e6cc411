"""Feature-wise linear modulation by a 2-D condition map."""

from torch import Tensor, nn


class FiLM(nn.Module):
    """x * (1 + scale) + shift, with scale and shift predicted per pixel from the condition and shared by all frames.

    Both projections start at zero, so that an untrained layer passes x through unchanged.

    Source: Perez et al. 2018, arXiv:1709.07871.
    """

    def __init__(self, condition_channels: int, channels: int):
        super().__init__()
        self.scale = nn.Conv2d(condition_channels, channels, 1)
        self.shift = nn.Conv2d(condition_channels, channels, 1)
        for projection in (self.scale, self.shift):
            nn.init.zeros_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Modulate x, [B,C,M,H,W], by condition, [B,condition_channels,H,W]."""
        scale = self.scale(condition).unsqueeze(2)  # [B,C,1,H,W]: the same for every frame
        shift = self.shift(condition).unsqueeze(2)
        return x * (1 + scale) + shift
