"""The learned initial predictor: what guesses the middle from both ends, for a diffusion model to refine."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.modules.layers import ConvNormAct, zero_module
from models.modules.temporal_attention import sinusoidal_embedding

WIDTH_MULTS = (1, 2, 4, 4)
NORM_GROUPS = 4  # 32, as in the denoiser, norm each of 32 channels alone, erase its level and cost 1.3 dB
LOG_ERROR_RANGE = (-7.0, 0.0)  # of the natural logarithm of the expected error: from 0.1 grey levels to half the range
FIRST_LOG_ERROR = -3.0


class FramePredictor(nn.Module):
    """Warps the nearest observed frames to each time between, blends them by a mask, and adds a correction.

    A 2-D U-Net sees all observed frames as channels; its features, modulated by the time of a middle frame, give that
    frame's two displacements, mask, correction and expected error. It starts as the cross-fade.

    Source: synthesis by bidirectional warps and a mask as in Huang et al. 2022, arXiv:2011.06294 (RIFE).
    """

    def __init__(self, image_channels: int = 3, endpoint_context: int = 2, width: int = 32, timed: bool = False):
        super().__init__()
        self.image_channels = image_channels  # C; contexts of a timed predictor have one more, see `add_times`
        self.width = width  # channels at full size
        widths = [width * mult for mult in WIDTH_MULTS]
        inputs = [2 * endpoint_context * (image_channels + timed), *widths[:-1]]
        pairs, norm = list(zip(inputs, widths, strict=True)), {"groups": NORM_GROUPS}
        self.down = nn.ModuleList(
            nn.Sequential(ConvNormAct(i, w, stride=1 if n == 0 else 2, **norm), ConvNormAct(w, w, **norm))
            for n, (i, w) in enumerate(pairs)
        )
        self.up = nn.ModuleList(
            nn.Sequential(ConvNormAct(below + w, w, **norm), ConvNormAct(w, w, **norm))
            for w, below in reversed(list(zip(widths[:-1], widths[1:], strict=True)))
        )
        self.time = nn.Linear(width, 2 * width)
        self.out = zero_module(nn.Conv2d(width, 6 + image_channels, 3, padding=1))

    def forward(self, start_context: Tensor, end_context: Tensor, num_middle: int) -> tuple[Tensor, Tensor]:
        """The middle of contexts [B,C,K,H,W] in [-1, 1], and the log of its expected absolute error.

        Returns: [B,C,M,H,W] in about [-1, 1], and [B,1,M,H,W] in LOG_ERROR_RANGE;
        any M, and any size above 8 pixels.
        """
        b, c = len(start_context), self.image_channels
        features = self.encode(torch.cat([start_context, end_context], dim=2).flatten(1, 2))  # [B,width,H,W]

        # Modulate the features by the time of each middle frame, as a share of the way from start to end.
        share = torch.arange(1, num_middle + 1, device=features.device) / (num_middle + 1)  # [M]
        embedding = sinusoidal_embedding(100 * share, self.width).to(features.dtype)
        scale, shift = self.time(embedding)[:, :, None, None].chunk(2, dim=1)  # [M,width,1,1]
        maps = F.silu(features[:, None] * (1 + scale) + shift).flatten(0, 1)  # [B*M,width,H,W]
        maps = self.out(maps).float()  # [B*M,6+C,H,W]
        to_start, to_end, mask, log_error, correction = maps.split([2, 2, 1, 1, c], dim=1)

        # Warp and blend.
        start, end = start_context[:, :c, -1].float(), end_context[:, :c, 0].float()  # [B,C,H,W]
        start, end = (frame.repeat_interleave(num_middle, dim=0) for frame in (start, end))  # [B*M,C,H,W]
        weight = torch.sigmoid(mask + torch.logit(share).repeat(b)[:, None, None, None])  # the cross-fade's at first
        frames = torch.lerp(warp(start, to_start), warp(end, to_end), weight) + correction
        log_error = (log_error + FIRST_LOG_ERROR).clamp(*LOG_ERROR_RANGE)
        return tuple(x.unflatten(0, (b, num_middle)).transpose(1, 2) for x in (frames, log_error))

    def encode(self, x: Tensor) -> Tensor:
        """The U-Net: observed frames as channels [B,2*K*C,H,W] -> [B,width,H,W]."""
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        for up, skip in zip(self.up, reversed(skips[:-1]), strict=True):
            x = up(torch.cat([F.interpolate(x, size=skip.shape[-2:], mode="nearest"), skip], dim=1))
        return x


def warp(frames: Tensor, displacement: Tensor) -> Tensor:
    """Frames [B,C,H,W] sampled bilinearly at each pixel plus its displacement [B,2,H,W] (x, y), edges repeated."""
    h, w = frames.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h, device=frames.device), torch.arange(w, device=frames.device), indexing="ij")
    x, y = x + displacement[:, 0], y + displacement[:, 1]  # [B,H,W] in pixels
    there = torch.stack([(2 * x + 1) / w - 1, (2 * y + 1) / h - 1], dim=-1)  # [B,H,W,2] in [-1, 1]
    return F.grid_sample(frames, there, mode="bilinear", padding_mode="border", align_corners=False)
