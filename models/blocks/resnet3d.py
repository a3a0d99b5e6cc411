"""Residual convolution block and the two changes of spatial size."""

from torch import Tensor, nn

from models.modules.frame_conv import FrameConv3d
from models.modules.layers import group_norm, zero_module


class ResBlock3D(nn.Module):
    """Two 3x3x3 convolutions, the time embedding added between them, plus the input.

    The second convolution starts at zero, so that an untrained block is its shortcut: the input,
    or a 1x1x1 convolution of it where the widths differ.
    """

    def __init__(self, in_channels: int, out_channels: int, time_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = FrameConv3d(in_channels, out_channels)
        self.time = nn.Linear(time_channels, out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_module(FrameConv3d(out_channels, out_channels))
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv3d(in_channels, out_channels, 1)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """x [B,C_in,M,H,W], time_embedding [B,time_channels] -> [B,C_out,M,H,W]."""
        h = self.conv1(self.activation(self.norm1(x)))
        h = h + self.time(time_embedding)[:, :, None, None, None]
        h = self.conv2(self.activation(self.norm2(h)))
        return self.shortcut(x) + h


class Downsample(nn.Conv3d):
    """Halve height and width, keep the frames: [B,C,M,H,W] -> [B,C,M,H/2,W/2]."""

    def __init__(self, channels: int):
        super().__init__(
            channels, channels, kernel_size=(1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)
        )


class Upsample(nn.ConvTranspose3d):
    """Double height and width, keep the frames: [B,C_in,M,H,W] -> [B,C_out,M,2H,2W]."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(
            in_channels, out_channels, kernel_size=(1, 4, 4), stride=(1, 2, 2), padding=(0, 1, 1)
        )
