"""Residual convolution block and the two changes of spatial size."""

import math

from torch import Tensor, nn

from models.modules.frame_conv import FrameConv3d


class ResBlock3D(nn.Module):
    """Two 3x3x3 convolutions around an added time embedding, plus the input (1x1x1 where the widths differ).

    The second convolution starts at zero, so that an untrained block is its shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(math.gcd(32, in_channels), in_channels)
        self.conv1 = FrameConv3d(in_channels, out_channels)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(math.gcd(32, out_channels), out_channels)
        self.conv2 = FrameConv3d(out_channels, out_channels)
        self.shortcut = nn.Identity() if in_channels == out_channels else nn.Conv3d(in_channels, out_channels, 1)
        self.activation = nn.SiLU()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """x [B,C_in,M,H,W], time_embedding [B,time_channels] -> [B,C_out,M,H,W]."""
        h = self.conv1(self.activation(self.norm1(x)))
        h = h + self.time(time_embedding)[:, :, None, None, None]
        h = self.conv2(self.activation(self.norm2(h)))
        return self.shortcut(x) + h


class Downsample(nn.Conv3d):
    """Halves height and width, keeps the frames: [B,C,M,H,W] -> [B,C,M,H/2,W/2]."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, kernel_size=(1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))


class Upsample(nn.ConvTranspose3d):
    """Doubles height and width, keeps the frames: [B,C_in,M,H,W] -> [B,C_out,M,2H,2W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=(1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1))
