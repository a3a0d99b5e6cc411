"""The training objective, shared by training and validation."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.noise import VALIDATION, generator_for, sample_noise
from diffusion.schedule import DiffusionSchedule

VALIDATION_PAIRS = 64  # at least so many (clip, t) pairs, so that few clips still cover the noise levels


class LossTerms(NamedTuple):
    """Per-clip losses, each [B] float32; `total` is what training averages and differentiates."""

    total: Tensor
    v_mse: Tensor
    temporal_l1: Tensor


class TrainingNoise(NamedTuple):
    """What one training step draws: t [B] long, eps [B,C,M,H,W], dropped [B] bool (contexts to be blanked)."""

    t: Tensor
    eps: Tensor
    dropped: Tensor


def sample_training_noise(
    middle: Tensor,
    timesteps: int,
    generator: torch.Generator,
    cfg_drop_prob: float = 0.0,
    noise_offset: float = 0.0,
    part: tuple[int, int] = (0, 1),
) -> TrainingNoise:
    """Draw a training step's indices, noise and dropped clips, on the device of `generator`, moved to that of `middle`.

    Several processes draw for all their clips from equal generators and keep a part each: what one would have drawn.

    Args:
        middle: clean middle frames, [B,C,M,H,W]; only its shape and device count.
        noise_offset: standard deviation of a constant added to eps per clip and channel; 0 = none.
        part: which part of the draw is `middle`'s, and how many parts there are.
    """
    number, parts = part
    b, c = middle.shape[0] * parts, middle.shape[1]
    device = generator.device
    t = torch.randint(timesteps, (b,), generator=generator, device=device)
    eps = torch.randn(b, *middle.shape[1:], generator=generator, device=device)
    dropped = torch.rand(b, generator=generator, device=device) < cfg_drop_prob
    if noise_offset:
        eps += noise_offset * torch.randn(b, c, 1, 1, 1, generator=generator, device=device)
    mine = slice(number * len(middle), (number + 1) * len(middle))
    return TrainingNoise(*(drawn[mine].to(middle.device) for drawn in (t, eps, dropped)))


def drop_contexts(start_context: Tensor, end_context: Tensor, dropped: Tensor) -> tuple[Tensor, Tensor]:
    """Both contexts with those of the `dropped` clips ([B] bool) replaced by zeros: guidance's unconditional branch."""
    kept = ~dropped.view(-1, 1, 1, 1, 1)
    return start_context * kept, end_context * kept


def temporal_l1(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """L1 between the frame differences of predicted and true middle, [B]; 0 for a single frame, which has none."""
    if x0.shape[2] == 1:
        return x0.new_zeros(x0.shape[0])
    return (x0_hat.diff(dim=2) - x0.diff(dim=2)).abs().flatten(1).mean(1)


def diffusion_loss(
    model: nn.Module,
    schedule: DiffusionSchedule,
    start_context: Tensor,
    middle: Tensor,
    end_context: Tensor,
    t: Tensor,
    eps: Tensor,
    temporal_loss_weight: float = 0.0,
) -> LossTerms:
    """MSE on v plus the weighted temporal term, per clip, in float32 whatever the network computed in.

    Args:
        model: called as model(x_t, t, start_context, end_context) -> v.
        start_context: [B,C,K,H,W] in [-1, 1], as end_context; zeros for a dropped clip.
        middle: the x0 to predict, [B,C,M,H,W] in [-1, 1].
        t: diffusion index per clip, [B] long.
        eps: noise, the shape of `middle`.
        temporal_loss_weight: factor of the L1 between frame differences; 0 = v alone.

    Raises: ValueError: if t is not one index per clip.
    """
    x_t = schedule.add_noise(middle, eps, t)
    v_hat = model(x_t, t, start_context, end_context).float()
    v_mse = (v_hat - schedule.v_from(middle, eps, t)).square().flatten(1).mean(1)  # [B]
    motion = temporal_l1(schedule.x0_from_v(x_t, v_hat, t), middle)  # [B]
    return LossTerms(v_mse + temporal_loss_weight * motion, v_mse, motion)


@torch.no_grad()
def validation_sum(
    model: nn.Module,
    schedule: DiffusionSchedule,
    parts: Iterable[tuple[Tensor, Tensor, Tensor]],
    clips: int,
    seed: int,
    temporal_loss_weight: float = 0.0,
    noise_offset: float = 0.0,
    first: int = 0,
) -> tuple[float, int]:
    """Losses of a split at fixed, evenly spread t and fixed noise per clip: a function of the weights alone.

    Args:
        parts: the split, or a stretch of it, in order and in batches of any size: start_context, middle, end_context.
        clips: how many the split has; few of them are seen at several t each.
        first: number of the clip in the split with which `parts` begins.

    Returns: the sum over all pairs of a clip and a t, and their number. Those of the stretches of a split add up, and
        the split's sum by its number is the validation loss.
    """
    draws = math.ceil(VALIDATION_PAIRS / clips)
    total, seen = 0.0, 0
    for start, middle, end in parts:
        for draw in range(draws):
            strata = [draw * clips + first + seen + n for n in range(len(middle))]  # out of draws * clips
            t = [int((stratum + 0.5) / (draws * clips) * schedule.timesteps) for stratum in strata]
            generators = [generator_for(seed, VALIDATION, stratum) for stratum in strata]
            eps = sample_noise(middle.shape[1:], generators, middle.device, noise_offset)
            t = torch.tensor(t, device=middle.device)
            terms = diffusion_loss(model, schedule, start, middle, end, t, eps, temporal_loss_weight)
            total += terms.total.sum().item()
        seen += len(middle)
    return total, draws * seen
