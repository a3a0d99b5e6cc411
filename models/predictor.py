"""The initial predictor: guesses the middle from both ends, for a diffusion model to refine."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modules.layers import ConvNormAct, zero_module
from models.modules.temporal_attention import sinusoidal_embedding

WIDTH_MULTS = (1, 2, 4, 4)
# With the denoiser's 32 groups, each of the 32 channels at full size would be normed by itself,
# which erases its level and costs 1.3 dB (LOG.md).
NORM_GROUPS = 4
# Of the natural logarithm of the expected error: from 0.1 grey levels to half the range.
LOG_ERROR_RANGE = (-7.0, 0.0)
FIRST_LOG_ERROR = -3.0
# Of the mask in sharp frames: 1 = the blend, more = nearer to one end alone; chosen in LOG.md.
CONTRAST = 2.25


class Guess(NamedTuple):
    """What the predictor makes of a gap."""

    frames: Tensor  # the middle, [B,C,M,H,W] in about [-1, 1]
    log_error: Tensor  # natural log of its expected absolute error, [B,1,M,H,W] in LOG_ERROR_RANGE
    warped: Tensor  # both nearest observed frames, moved to each time, [B,2*C,M,H,W]
    sharp: Tensor  # the middle with less of a mean in it, as `frames`: what samples show


class FramePredictor(nn.Module):
    """Warps the nearest observed frames to each time between, blends them, adds a correction.

    A 2-D U-Net sees all observed frames as channels. Its features, modulated by the time of a
    middle frame, give that frame's two displacements, blending mask, correction and expected
    error. An untrained predictor is the cross-fade.

    Args:
        image_channels: C, 3 or 1.
        endpoint_context: observed frames K at each end.
        width: channels at full size.
        any_length: whether a channel tells the length of the gap, for training on several.

    Source: warps from both ends and a mask, as in Huang et al. 2022, arXiv:2011.06294 (RIFE).
    """

    def __init__(
        self,
        image_channels: int = 3,
        endpoint_context: int = 2,
        width: int = 32,
        any_length: bool = False,
    ):
        super().__init__()
        self.image_channels = image_channels
        self.endpoint_context = endpoint_context
        self.width = width
        self.any_length = any_length
        widths = [width * mult for mult in WIDTH_MULTS]
        inputs = [2 * endpoint_context * image_channels + any_length, *widths[:-1]]
        self.down = nn.ModuleList(
            double_conv(channels, below, stride=1 if level == 0 else 2)
            for level, (channels, below) in enumerate(zip(inputs, widths, strict=True))
        )
        self.up = nn.ModuleList(
            double_conv(below + above, above)
            for above, below in reversed(list(zip(widths[:-1], widths[1:], strict=True)))
        )
        self.time = nn.Linear(width, 2 * width)
        # Two displacements (x, y), a mask, an expected error, a correction of each channel.
        self.out = zero_module(nn.Conv2d(width, 6 + image_channels, 3, padding=1))

    def forward(self, start_context: Tensor, end_context: Tensor, num_middle: int) -> Guess:
        """Predict the middle frames and how far off each pixel is expected to be.

        Args:
            start_context: [B,C,K,H,W] in [-1, 1], sides of 8 pixels or more.
            end_context: the same shape.
            num_middle: frames M to predict.
        """
        b = len(start_context)
        observed = torch.cat([start_context, end_context], dim=2).flatten(1, 2)  # [B,2*K*C,H,W]
        if self.any_length:
            gap = torch.full_like(observed[:, :1], math.log2(num_middle + 1) / 4)
            observed = torch.cat([observed, gap], dim=1)
        features = self.encode(observed)  # [B,width,H,W]

        # Modulate the features by the time of each middle frame, 0 at the start and 1 at the end.
        times = torch.arange(1, num_middle + 1, device=features.device) / (num_middle + 1)  # [M]
        embedding = sinusoidal_embedding(100 * times, self.width).to(features.dtype)
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)  # [M,width,1,1]
        maps = F.silu(features[:, None] * (1 + scale) + shift).flatten(0, 1)  # [B*M,width,H,W]
        maps = self.out(maps).float()  # [B*M,6+C,H,W]
        to_start, to_end, mask, log_error, correction = maps.split(
            [2, 2, 1, 1, self.image_channels], dim=1
        )

        # Warp both nearest frames and blend them; a mask of zero is the cross-fade's weight.
        start = start_context[:, :, -1].float().repeat_interleave(num_middle, dim=0)  # [B*M,C,H,W]
        end = end_context[:, :, 0].float().repeat_interleave(num_middle, dim=0)
        cross_fade = torch.logit(times).repeat(b)[:, None, None, None]
        weight = torch.sigmoid(mask + cross_fade)
        start = warp(start, to_start)
        end = warp(end, to_end)
        frames = torch.lerp(start, end, weight) + correction
        log_error = (log_error + FIRST_LOG_ERROR).clamp(*LOG_ERROR_RANGE)

        # Where the mask is in doubt an arm dissolves between both ends, so sharp frames lean to one
        # of them. A correction within the expected error is left out where it only smooths.
        sharp = torch.lerp(start, end, torch.sigmoid(CONTRAST * (mask + cross_fade)))
        is_certain = correction.abs().amax(1, keepdim=True) > log_error.exp()
        adds_detail = detail_energy(sharp + correction) >= detail_energy(sharp)
        sharp = sharp + correction * (is_certain | adds_detail)

        # From [B*M,...] to [B,...,M,H,W].
        maps = (frames, log_error, torch.cat([start, end], dim=1), sharp)
        return Guess(*(x.unflatten(0, (b, num_middle)).transpose(1, 2) for x in maps))

    def encode(self, x: Tensor) -> Tensor:
        """The U-Net: observed frames as channels [B,2*K*C,H,W] -> [B,width,H,W]."""
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = up(torch.cat([x, skip], dim=1))
        return x


def double_conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Two ConvNormAct, the first of them with the stride."""
    return nn.Sequential(
        ConvNormAct(in_channels, out_channels, stride=stride, groups=NORM_GROUPS),
        ConvNormAct(out_channels, out_channels, groups=NORM_GROUPS),
    )


def detail_energy(frames: Tensor) -> Tensor:
    """Mean square of the differences to the next row and column about each pixel.

    Args:
        frames: [N,C,H,W].

    Returns: [N,1,H,W], a mean over 5x5 pixels.
    """
    rows = F.pad(frames.diff(dim=-2), (0, 0, 0, 1))
    columns = F.pad(frames.diff(dim=-1), (0, 1))
    energy = (rows.square() + columns.square()).mean(1, keepdim=True)
    return F.avg_pool2d(energy, 5, stride=1, padding=2)


def warp(frames: Tensor, displacement: Tensor) -> Tensor:
    """Sample frames bilinearly at each pixel plus its displacement; edges are repeated.

    Args:
        frames: [B,C,H,W].
        displacement: [B,2,H,W] in pixels, x then y.

    Returns: [B,C,H,W].
    """
    h, w = frames.shape[-2:]
    rows = torch.arange(h, device=frames.device)
    columns = torch.arange(w, device=frames.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    x = x + displacement[:, 0]  # [B,H,W]
    y = y + displacement[:, 1]
    # Pixel centres lie half a pixel inside the grid's range of [-1, 1].
    grid = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], dim=-1)  # [B,H,W,2]
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)
