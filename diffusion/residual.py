"""The change of variable of a refining model, which diffuses not the middle but what a predictor misses of it.

    residual = (middle - prediction) / scale

Loss and sampler work on residuals as they work on frames, and know nothing of it. A scale near the predictor's error
gives the residual about the variance of the noise; one per pixel keeps the noise away from where the predictor is sure.
Where it is sure and wrong, residuals of hundreds of scales would outweigh all others in the loss: `limit` cuts them.

Source: Whang et al. 2022, arXiv:2112.02475 (initial predictor); Mardani et al. 2023, arXiv:2309.15214 (CorrDiff).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Prediction(NamedTuple):
    """A guess of the middle, and how far off it may be; the default leaves every number as it is: no predictor."""

    frames: Tensor | float = 0.0  # [B,C,M,H,W] in about [-1, 1]
    scale: Tensor | float = 1.0  # above 0, a number or [B,1,M,H,W]
    limit: float = math.inf  # of residuals, in scales

    def to_residual(self, middle: Tensor) -> Tensor:
        """What the guess misses of middle frames [B,C,M,H,W], in units of the scale, cut at the limit."""
        return ((middle - self.frames) / self.scale).clamp(-self.limit, self.limit)

    def to_middle(self, residual: Tensor) -> Tensor:
        """The middle frames [B,C,M,H,W] of a residual; within the limit the inverse of `to_residual`."""
        return self.frames + self.scale * residual

    @property
    def residual_range(self) -> tuple[Tensor | float, Tensor | float]:
        """The residuals of frames at -1 and at 1, not cut: where clean predictions of the sampler are clipped."""
        return (-1 - self.frames) / self.scale, (1 - self.frames) / self.scale


Predictor = Callable[[Tensor, Tensor, int], Prediction]  # of both contexts [B,C,K,H,W] and the number of frames M
