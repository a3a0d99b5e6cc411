"""The change of variable of a refining model, which diffuses what a predictor misses.

    residual = (middle - prediction) / scale

Loss and sampler treat residuals as they treat frames. The scale, one per pixel and near the
predictor's error, gives residuals about the variance of the noise and keeps the noise away from
where the predictor is sure. Where it is sure and wrong, residuals of hundreds of scales would
outweigh all others in the loss: they are cut at RESIDUAL_LIMIT.

Source: Whang et al. 2022, arXiv:2112.02475; Mardani et al. 2023, arXiv:2309.15214 (CorrDiff).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The deviation of a Laplace distribution is 1.4 mean absolute errors; 2 leaves room for outliers.
ERRORS_PER_SCALE = 2.0
# In scales. Beyond it lies one value in 3,000 of that distribution; chosen in LOG.md.
RESIDUAL_LIMIT = 4.0
# Correlation of the noise between neighbouring pixels, frames and colours. Residuals have about
# the same: samples then err in patches instead of speckle (LOG.md).
RESIDUAL_CORRELATION = 0.5
# Brings the logarithm of an error to the range of the other maps.
LOG_ERROR_SCALE = 0.25


class Prediction(NamedTuple):
    """A guess of the middle and its error per pixel; the default is the identity.

    Attributes:
        frames: [B,C,M,H,W] in [-1, 1].
        scale: above 0, [B,1,M,H,W].
        limit: of residuals, in scales.
        guide: what the model is to see of it, [B,3*C+1,M,H,W]: the frames, both warped ends and
            the expected error.
        detail: what the sharp guess adds to the frames, [B,C,M,H,W]. It is added to a sample in
            the end, as few steps of diffusion hardly sharpen a blurred guess.
    """

    frames: Tensor | float = 0.0
    scale: Tensor | float = 1.0
    limit: float = math.inf
    guide: Tensor | None = None
    detail: Tensor | float = 0.0

    def to_residual(self, middle: Tensor) -> Tensor:
        """What the guess misses of middle frames [B,C,M,H,W], in scales, cut at the limit."""
        return ((middle - self.frames) / self.scale).clamp(-self.limit, self.limit)

    def to_middle(self, residual: Tensor) -> Tensor:
        """The middle frames of a residual: within the limit the inverse of `to_residual`."""
        return self.frames + self.scale * residual

    @property
    def residual_range(self) -> tuple[Tensor | float, Tensor | float]:
        """The residuals, not cut, of frames at -1 and at 1: the sampler clips x0 to these."""
        return (-1 - self.frames) / self.scale, (1 - self.frames) / self.scale


@torch.no_grad()
def predict(
    predictor: nn.Module | None,
    start_context: Tensor,
    end_context: Tensor,
    num_middle: int,
    code: Tensor | None = None,
) -> Prediction:
    """The frozen predictor's guess, clipped to [-1, 1]; the trivial one without a predictor.

    Args:
        predictor: a FramePredictor, or None where frames themselves are diffused.
        start_context: [B,C,K,H,W] in [-1, 1].
        end_context: the same shape.
        num_middle: frames M to predict.
        code: of the predictor, [B,code_size]; None = the mean.
    """
    if predictor is None:
        return Prediction()
    guess = predictor(start_context, end_context, num_middle, code)
    frames = guess.frames.clamp(-1, 1)
    return Prediction(
        frames=frames,
        scale=ERRORS_PER_SCALE * guess.log_error.exp(),
        limit=RESIDUAL_LIMIT,
        guide=torch.cat([frames, guess.warped, LOG_ERROR_SCALE * guess.log_error], dim=1),
        detail=guess.sharp - frames,
    )


def sample_codes(
    predictor: nn.Module, generators: Sequence[torch.Generator], device: torch.device
) -> Tensor:
    """A code for each generator's sample, [B,code_size], of deviation `code_scale`."""
    codes = [torch.randn(predictor.code_size, generator=g, device=g.device) for g in generators]
    return predictor.code_scale * torch.stack(codes).to(device)


def smooth_colours(residual: Tensor) -> Tensor:
    """Average chroma over 5x5 pixels; the mean of a pixel's colours stays as it is.

    Few steps left twice the truth's grain in the colours of real clips (LOG.md).

    Args:
        residual: [B,C,M,H,W].

    Returns: the same shape; gray residuals as they are.
    """
    gray = residual.mean(1, keepdim=True)
    return gray + F.avg_pool3d(
        residual - gray,
        kernel_size=(1, 5, 5),
        stride=1,
        padding=(0, 2, 2),
        count_include_pad=False,
    )


def guide_channels(image_channels: int) -> int:
    """Maps of each frame in a prediction's guide."""
    return 3 * image_channels + 1
