"""The training objective, shared by training and validation."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.noise import VALIDATION, WHITE, NoiseConfig, correlated, generator_for, sample_noise
from diffusion.schedule import DiffusionSchedule

SQUARED_WEIGHT = 2.0  # of the squared error beside the absolute one, which alone gives 0.3 dB less on built-in clips
ERROR_WEIGHT = 0.1  # of the term that learns the expected error, which reaches the features, but not the frames
LOWEST_LOG_ERROR = -7.0  # of a predictor: taken off, so that no loss is negative
VALIDATION_PAIRS = 64  # at least so many (clip, t) pairs, so that few clips still cover the noise levels


class TrainingNoise(NamedTuple):
    """What one training step draws."""

    t: Tensor  # [B] long
    eps: Tensor  # [B,C,M,H,W]
    dropped: Tensor  # [B] bool: clips whose contexts are zeroed


def sample_training_noise(
    middle: Tensor,  # [B,C,M,H,W]; only its shape and device count
    timesteps: int,
    generator: torch.Generator,
    cfg_drop_prob: float = 0.0,
    config: NoiseConfig = WHITE,
    part: tuple[int, int] = (0, 1),  # which part of the draw is that of `middle`, and how many parts there are
) -> TrainingNoise:
    """Draw a training step's indices, noise and dropped clips on the generator's device, and move them to `middle`'s.

    Several processes draw for all their clips from equal generators and keep a part each: what one would have drawn.
    """
    number, parts = part
    b, c = middle.shape[0] * parts, middle.shape[1]
    where = {"generator": generator, "device": generator.device}
    t = torch.randint(timesteps, (b,), **where)
    eps = correlated(torch.randn(b, *middle.shape[1:], **where), config.correlation)
    dropped = torch.rand(b, **where) < cfg_drop_prob
    if config.offset:
        eps += config.offset * torch.randn(b, c, 1, 1, 1, **where)
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
    model: nn.Module,  # (x_t, t, start_context, end_context) -> v
    schedule: DiffusionSchedule,
    start_context: Tensor,  # [B,C,K,H,W] in [-1, 1]; zeros for a dropped clip
    middle: Tensor,  # the x0 to predict, [B,C,M,H,W]: frames in [-1, 1], or residuals of them
    end_context: Tensor,  # as start_context
    t: Tensor,  # diffusion index per clip, [B] long; ValueError for another shape
    eps: Tensor,  # noise, [B,C,M,H,W]
    temporal_loss_weight: float = 0.0,
) -> Tensor:
    """MSE on v plus temporal_loss_weight * `temporal_l1`, per clip, in float32 whatever the network computed in."""
    x_t = schedule.add_noise(middle, eps, t)
    v_hat = model(x_t, t, start_context, end_context).float()
    v_mse = (v_hat - schedule.v_from(middle, eps, t)).square().flatten(1).mean(1)  # [B]
    motion = temporal_l1(schedule.x0_from_v(x_t, v_hat, t), middle)  # [B]
    return v_mse + temporal_loss_weight * motion


def predictor_loss(predictor: nn.Module, start_context: Tensor, middle: Tensor, end_context: Tensor) -> Tensor:
    """The regression loss of a learned predictor, per clip [B]: of its frames, and of the error that it expects.

    `predictor` maps both contexts and M to the frames [B,C,M,H,W] and the log of their absolute error [B,1,M,H,W]. That
    is learned as the logarithm of the width of a Laplace distribution, by its likelihood of the error made. The loss is
    0 for exact frames that are expected to be so, and never negative if log errors are at least LOWEST_LOG_ERROR.

    Source: of the likelihood Kendall & Gal 2017, arXiv:1703.04977, section 3.
    """
    frames, log_error = predictor(start_context, end_context, middle.shape[2])
    error = frames - middle
    made = error.detach().abs().mean(1, keepdim=True)  # [B,1,M,H,W]
    regression = error.abs().mean(1, keepdim=True) + SQUARED_WEIGHT * error.square().mean(1, keepdim=True)
    expected = made * (-log_error).exp() + log_error - LOWEST_LOG_ERROR
    return (regression + ERROR_WEIGHT * expected).flatten(1).mean(1)


@torch.no_grad()
def validation_sum(
    model: nn.Module,
    schedule: DiffusionSchedule,
    parts: Iterable[tuple[Tensor, Tensor, Tensor]],  # (start, middle, end) batches of a split or a stretch of it
    clips: int,  # of the whole split; few of them are seen at several t each
    seed: int,
    temporal_loss_weight: float = 0.0,
    noise: NoiseConfig = WHITE,
    first: int = 0,  # number in the split of the first clip of `parts`
) -> tuple[float, int]:
    """Sum of the losses of (clip, t) pairs, and their number, at fixed, evenly spread t and fixed noise per clip.

    A function of the weights alone. Both add up over stretches of a split; sum / number of all is the validation loss.
    """
    draws = math.ceil(VALIDATION_PAIRS / clips)
    pairs, total, seen = draws * clips, 0.0, 0
    for start, middle, end in parts:
        for draw in range(draws):
            strata = [draw * clips + first + seen + n for n in range(len(middle))]  # out of `pairs`
            t = torch.tensor([int((n + 0.5) / pairs * schedule.timesteps) for n in strata], device=middle.device)
            generators = [generator_for(seed, VALIDATION, n) for n in strata]
            eps = sample_noise(middle.shape[1:], generators, middle.device, noise)
            losses = diffusion_loss(model, schedule, start, middle, end, t, eps, temporal_loss_weight)
            total += losses.sum().item()
        seen += len(middle)
    return total, draws * seen
