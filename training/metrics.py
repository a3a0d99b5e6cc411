"""Losses, gradient norms and bad steps, summed on the device, so that no step waits for it."""

import torch
from torch import Tensor

# An fp16 loss scale starts too high by a few halvings; this many mean that the run is lost.
MAX_BAD_IN_ROW = 20
# A loss is diverged when it is this many times that of a network that predicts nothing.
DIVERGED = 10


def divergence_threshold(noise_offset: float, temporal_loss_weight: float) -> float:
    """The loss above which training counts as diverged.

    v has at most the variance of eps, as clips lie in [-1, 1] and residuals are near their scale;
    frame differences of natural clips are below 1; a predictor's loss is near 1, too.
    """
    return DIVERGED * (1 + noise_offset**2 + temporal_loss_weight)


class TrainMetrics:
    """Running sums over steps.

    Losses and finite steps since the last line of metrics.jsonl and of this epoch, the last
    gradient norm, steps skipped as not finite, steps of a loss above the threshold, and either of
    these in a row.
    """

    NAMES = ("line_loss", "line_steps", "epoch_loss", "epoch_steps")
    NAMES += ("grad_norm", "skipped", "diverged", "bad_in_row")

    def __init__(self, device: torch.device, threshold: float):
        self.threshold = threshold
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(len(self.NAMES), dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count one step: its loss and gradient norm, 0-dimensional, on the device."""
        is_finite = loss.isfinite() & norm.isfinite()
        finite = is_finite.to(self.values)
        loss = torch.where(is_finite, loss.to(self.values), 0.0)
        diverged = (loss > self.threshold).to(self.values)
        bad = 1 - finite + diverged
        bad_in_row = (self.values[-1] + bad) * bad
        norm = norm.to(self.values)
        step = [loss, finite, loss, finite, norm, 1 - finite, diverged, bad_in_row]
        # The norm and the row are values of the newest step, all others are sums.
        self.values[4] = 0
        self.values[7] = 0
        self.values += torch.stack(step)

    def read(self) -> dict[str, float]:
        """Every entry by name; this waits for the device.

        Raises: FloatingPointError: if too many steps in a row were skipped or diverged.
        """
        values = dict(zip(self.NAMES, self.values.tolist(), strict=True))
        if values["bad_in_row"] >= MAX_BAD_IN_ROW:
            raise FloatingPointError(
                f"one of {MAX_BAD_IN_ROW} steps in a row must have finite gradients and a loss of "
                f"at most {self.threshold:g} (got {values['bad_in_row']:.0f} without; a lower "
                "--lr or --warmup_steps may help)"
            )
        return values

    def take_mean(self, span: str) -> float | None:
        """The mean loss of a "line" or "epoch", which then starts anew; None if there was none."""
        values = self.read()
        first = self.NAMES.index(f"{span}_loss")
        self.values[first : first + 2] = 0
        steps = values[f"{span}_steps"]
        return values[f"{span}_loss"] / steps if steps else None

    def bad_steps(self) -> dict[str, int]:
        """The counts of the whole run that every line of metrics.jsonl has."""
        values = self.read()
        return {f"{kind}_steps": int(values[kind]) for kind in ("skipped", "diverged")}
