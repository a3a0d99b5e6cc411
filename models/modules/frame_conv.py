"""The 3x3x3 convolution of the network, in the form that is fastest on its device."""

from torch import Tensor, nn
from torch.nn import functional

# torch's own bound (ConvParams::use_mkldnn in aten/src/ATen/native/Convolution.cpp): on a CPU, a batch of one with at
# most so many rows (channels * frames * height) goes to an unblocked loop, 1.3 to 5 times slower than the form here.
SLOW_ROWS = 20_480


class FrameConv3d(nn.Conv3d):
    """Conv3d 3x3x3, zero-padded by one; a single small clip on a CPU takes one 2-D convolution per kernel frame."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C_in,M,H,W] -> [B,C_out,M,H,W]."""
        b, c, m, h, _ = x.shape
        if not x.is_cpu or b != 1 or c * m * h > SLOW_ROWS:
            return super().forward(x)
        frames = x[0].transpose(0, 1)  # [M,C_in,H,W]: frames are the batch, and the sum is taken in another order
        before, here, after = self.weight.unbind(2)  # each [C_out,C_in,3,3], meets frame m - 1, m, m + 1
        y = functional.conv2d(frames, here, self.bias, padding=1)  # [M,C_out,H,W]
        if m > 1:
            y[1:] += functional.conv2d(frames[:-1], before, padding=1)
            y[:-1] += functional.conv2d(frames[1:], after, padding=1)
        return y.transpose(0, 1)[None]
