"""The 3x3x3 convolution of the network, in the form that is fastest on its device."""

from torch import Tensor, nn
from torch.nn import functional as F

# torch's own bound (ConvParams::use_mkldnn in aten/src/ATen/native/Convolution.cpp): on a CPU a
# batch of one clip with at most this many rows (channels * frames * height) runs in an unblocked
# loop. The form below samples a single clip of the shipped networks three times faster (LOG.md).
SLOW_ROWS = 20_480


class FrameConv3d(nn.Conv3d):
    """Conv3d 3x3x3, zero-padded by one; for one small clip on a CPU, a sum of 2-D convolutions."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C_in,M,H,W] -> [B,C_out,M,H,W]."""
        b, c, m, h, _ = x.shape
        if not x.is_cpu or b != 1 or c * m * h > SLOW_ROWS:
            return super().forward(x)
        # The frames become the batch; each kernel slice meets frame m - 1, m or m + 1.
        frames = x[0].transpose(0, 1)  # [M,C_in,H,W]
        before, here, after = self.weight.unbind(2)  # each [C_out,C_in,3,3]
        y = F.conv2d(frames, here, self.bias, padding=1)  # [M,C_out,H,W]
        if m > 1:
            y[1:] += F.conv2d(frames[:-1], before, padding=1)
            y[:-1] += F.conv2d(frames[1:], after, padding=1)
        return y.transpose(0, 1)[None]
