"""The initial predictor: guesses the middle from both ends, for a diffusion model to refine."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modules.layers import ConvNormAct, zero_module
from models.modules.temporal_attention import sinusoidal_embedding

# With the denoiser's 32 groups, each pair of channels would be normed by itself, which erases its
# mean; at full size this cost 1.3 dB (LOG.md).
NORM_GROUPS = 4
# Natural logarithm of the expected error: from 0.1 grey levels to half the range.
LOG_ERROR_RANGE = (-7.0, 0.0)
FIRST_LOG_ERROR = -3.0
# Each end is warped twice. At first the second warp has a weight of exp(-2), as two equal ones
# would learn the same.
WARPS = 2
SECOND_WARP = -2.0
# Differences of details below it count as none: a tenth of a grey level between neighbours.
ROUNDING = 1e-6


class Guess(NamedTuple):
    """What the predictor makes of a gap."""

    frames: Tensor  # the middle, [B,C,M,H,W] in about [-1, 1]
    log_error: Tensor  # natural log of its expected absolute error, [B,1,M,H,W] in LOG_ERROR_RANGE
    warped: Tensor  # both nearest observed frames, moved to each time, [B,2*C,M,H,W]
    sharp: Tensor  # as `frames`, but leaning to one of the warps: what samples are made of


class FramePredictor(nn.Module):
    """Warps the nearest observed frames to each time between, blends them, adds a correction.

    A 2-D U-Net of three levels sees all observed frames as channels, a patch of pixels at each
    place of the finest level. The features of its medium level are modulated by the time of a
    middle frame and by a code; from there each frame is decoded by itself into displacements,
    blending weights, a correction and its expected error. The code of zeros gives the mean, any
    other code one possible middle. An untrained predictor is the cross-fade.

    Args:
        image_channels: C, 3 or 1.
        endpoint_context: observed frames K at each end.
        width: channels of the finest level; the others have twice as many.
        patch: side in pixels of what the finest level sees at each place.
        any_length: whether a channel tells the length of the gap, for training on several.
        code_size: numbers in a code.
        contrast: factor on the weights' logits in sharp frames; 1 = the blend, more = one warp.
        code_scale: standard deviation of the codes of samples; more = samples differ more.

    The last two change neither training nor `frames`; LOG.md says how they were chosen.
    Source: warps from both ends and a mask, as in Huang et al. 2022, arXiv:2011.06294 (RIFE).
    """

    def __init__(
        self,
        image_channels: int = 3,
        endpoint_context: int = 2,
        width: int = 64,
        patch: int = 4,
        any_length: bool = False,
        code_size: int = 8,
        contrast: float = 2.0,
        code_scale: float = 0.7,
    ):
        super().__init__()
        self.image_channels = image_channels
        self.endpoint_context = endpoint_context
        self.width = width
        self.patch = patch
        self.any_length = any_length
        self.code_size = code_size
        self.contrast = contrast
        self.code_scale = code_scale
        wide = 2 * width
        pixels = patch**2 * 2 * endpoint_context * image_channels

        # The encoder sees all observed frames at once.
        self.fine = double_conv(pixels + any_length, width)
        self.medium = double_conv(width, wide, stride=2)
        self.coarse = double_conv(wide, wide, stride=2)
        self.deep = double_conv(wide, wide)
        self.up = ConvNormAct(wide, wide, groups=NORM_GROUPS)

        # The decoder makes each frame by itself.
        self.modulation = nn.Linear(width + code_size, 2 * wide)
        self.frame_medium = double_conv(wide, wide)
        self.to_fine = nn.Conv2d(wide, width, 1)
        self.skip = nn.Conv2d(width, width, 1)
        self.frame_fine = double_conv(width, width)
        # Per patch the displacements (x, y) of both ends; per pixel the weights of the warps, an
        # expected error, and a correction of each channel.
        per_pixel = 2 * WARPS + 1 + image_channels
        self.out = zero_module(nn.Conv2d(width, 4 * WARPS + patch**2 * per_pixel, 3, padding=1))

    def forward(
        self,
        start_context: Tensor,
        end_context: Tensor,
        num_middle: int,
        code: Tensor | None = None,
    ) -> Guess:
        """Predict the middle frames and how far off each pixel is expected to be.

        Args:
            start_context: [B,C,K,H,W] in [-1, 1], sides of 8 pixels or more.
            end_context: the same shape.
            num_middle: frames M to predict.
            code: selects one of the possible middles, [B,code_size]; None = zeros, their mean.
        """
        b, *_, h, w = start_context.shape
        if code is None:
            code = start_context.new_zeros(b, self.code_size)
        times = torch.arange(1, num_middle + 1, device=code.device) / (num_middle + 1)  # [M]
        fine, medium = self.encode(start_context, end_context, num_middle)
        motion, maps = self.decode(fine, medium, times, code)
        motion = motion[..., :h, :w]
        weights, log_error, correction = maps[..., :h, :w].split(
            [2 * WARPS, 1, self.image_channels], dim=1
        )

        # Warp both nearest frames; weights of zero are the cross-fade's.
        start = start_context[:, :, -1].float().repeat_interleave(num_middle, dim=0)  # [B*M,C,H,W]
        end = end_context[:, :, 0].float().repeat_interleave(num_middle, dim=0)
        ends = [start] * WARPS + [end] * WARPS
        warps = torch.stack(
            [warp(*pair) for pair in zip(ends, motion.split(2, dim=1), strict=True)]
        )
        offsets = SECOND_WARP * torch.arange(WARPS, device=times.device)
        cross_fade = torch.stack([(1 - times).log(), times.log()], dim=1)  # [M,2]
        cross_fade = (cross_fade[:, :, None] + offsets).flatten(1)  # [M,2*WARPS]
        weights = weights + cross_fade.repeat(b, 1)[:, :, None, None]
        frames = blend(warps, weights) + correction
        log_error = (log_error + FIRST_LOG_ERROR).clamp(*LOG_ERROR_RANGE)
        # For the denoiser: each end's warps, blended.
        warped = [
            blend(side, weight)
            for side, weight in zip(warps.chunk(2), weights.chunk(2, dim=1), strict=True)
        ]

        # Undecided weights dissolve a moving object, so sharp frames lean to one warp; where a
        # correction smooths them it is left out.
        sharp = blend(warps, self.contrast * weights)
        smooths = detail_energy(sharp + correction) < detail_energy(sharp) - ROUNDING
        sharp = sharp + correction * ~smooths

        # From [B*M,...] to [B,...,M,H,W].
        maps = (frames, log_error, torch.cat(warped, dim=1), sharp)
        return Guess(*(x.unflatten(0, (b, num_middle)).transpose(1, 2) for x in maps))

    def encode(
        self, start_context: Tensor, end_context: Tensor, num_middle: int
    ) -> tuple[Tensor, Tensor]:
        """Features of the fine and medium level: [B,width,h,w] and [B,2*width,h/2,w/2].

        h = H / patch, w = W / patch; all sides are rounded up.
        """
        observed = torch.cat([start_context, end_context], dim=2).flatten(1, 2)  # [B,2*K*C,H,W]
        h, w = observed.shape[-2:]
        observed = F.pad(observed, (0, -w % self.patch, 0, -h % self.patch), mode="replicate")
        patches = F.pixel_unshuffle(observed, self.patch)
        if self.any_length:
            gap = torch.full_like(patches[:, :1], math.log2(num_middle + 1) / 4)
            patches = torch.cat([patches, gap], dim=1)
        fine = self.fine(patches)
        medium = self.medium(fine)
        coarse = self.coarse(medium)
        coarse = coarse + self.deep(coarse)
        above = F.interpolate(coarse, size=medium.shape[-2:], mode="nearest")
        return fine, self.up(above + medium)

    def decode(
        self, fine: Tensor, medium: Tensor, times: Tensor, code: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Displacements [B*M,4*WARPS,H,W] in pixels, and all maps of full size [B*M,...,H,W]."""
        b, m = len(code), len(times)
        embedding = sinusoidal_embedding(100 * times, self.width).to(medium.dtype)
        given = torch.cat([embedding.repeat(b, 1), code.repeat_interleave(m, dim=0)], dim=1)
        scale, shift = self.modulation(given)[:, :, None, None].chunk(2, dim=1)  # [B*M,wide,1,1]
        maps = medium.repeat_interleave(m, dim=0)
        maps = self.frame_medium(F.silu(maps * (1 + scale) + shift))
        maps = F.interpolate(self.to_fine(maps), size=fine.shape[-2:], mode="nearest")
        maps = self.frame_fine(maps + self.skip(fine).repeat_interleave(m, dim=0))
        maps = self.out(maps).float()
        motion, maps = maps.split([4 * WARPS, maps.shape[1] - 4 * WARPS], dim=1)
        motion = F.interpolate(motion, scale_factor=self.patch, mode="bilinear")
        return motion, F.pixel_shuffle(maps, self.patch)


def double_conv(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Two ConvNormAct, the first of them with the stride."""
    return nn.Sequential(
        ConvNormAct(in_channels, out_channels, stride=stride, groups=NORM_GROUPS),
        ConvNormAct(out_channels, out_channels, groups=NORM_GROUPS),
    )


def blend(warps: Tensor, weights: Tensor) -> Tensor:
    """The mean of warps [N,B,C,H,W] by the softmax of weights [B,N,H,W]: [B,C,H,W]."""
    return (warps * weights.softmax(dim=1).movedim(1, 0)[:, :, None]).sum(0)


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
