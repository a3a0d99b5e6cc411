"""The two training objectives, `diffusion_loss` and `predictor_loss`; a run has one of them.

A predictor's code stands for what the ends leave open. Of a few codes drawn for a clip the one
whose guess comes nearest learns that clip (Li & Malik 2018, arXiv:1809.09087), and diffusion learns
what its guess misses.

Both take (model, start_context, middle, end_context, generator) and return a loss per clip.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.noise import (
    VALIDATION,
    WHITE,
    NoiseConfig,
    correlated,
    generator_for,
    sample_noise,
)
from diffusion.residual import predict
from diffusion.schedule import DiffusionSchedule

# Weight of the squared error beside the absolute one; without it, 0.3 dB less (LOG.md).
SQUARED_WEIGHT = 2.0
# Weight of the likelihood that learns the expected error; it trains features, not frames.
ERROR_WEIGHT = 0.1
# Codes drawn for each clip, of which the nearest is used.
DRAWN_CODES = 4
# The predictor's lowest log error; it is subtracted, so that no loss is negative.
LOWEST_LOG_ERROR = -7.0
# Validation sees about this many (clip, t) pairs, so that few clips cover the noise levels, but
# each clip a few times at most.
VALIDATION_PAIRS = 64
VALIDATION_DRAWS = 8


class DiffusionTask(NamedTuple):
    """What a diffusion run learns: its forward process, its noise, what it refines around."""

    schedule: DiffusionSchedule
    noise: NoiseConfig = WHITE
    predictor: nn.Module | None = None  # frozen: its residuals are diffused; None = frames
    temporal_loss_weight: float = 0.0  # of the L1 on frame differences
    cfg_drop_prob: float = 0.0  # chance, per clip, that both contexts are zeroed
    part: tuple[int, int] = (0, 1)  # this process's number, and how many share a step's draws
    crop: tuple[int, int] | None = None  # height and width that training sees; None = whole frames


class TrainingNoise(NamedTuple):
    """What one batch draws."""

    t: Tensor  # diffusion index, [B] long
    eps: Tensor  # noise, [B,C,M,H,W]
    dropped: Tensor  # clips whose contexts are zeroed, [B] bool


def sample_training_noise(
    x0: Tensor, generator: torch.Generator, task: DiffusionTask
) -> TrainingNoise:
    """Draw indices, noise and dropped clips for a batch of the shape of x0, [B,C,M,H,W].

    Several processes draw from equal generators for all their clips and keep a part each: what a
    single process would have drawn.
    """
    b, c, m, h, w = x0.shape
    total = b * task.part[1]
    device = generator.device
    t = torch.randint(task.schedule.timesteps, (total,), generator=generator, device=device)
    eps = torch.randn(total, c, m, h, w, generator=generator, device=device)
    eps = correlated(eps, task.noise.correlation)
    dropped = torch.rand(total, generator=generator, device=device) < task.cfg_drop_prob
    if task.noise.offset:
        constant = torch.randn(total, c, 1, 1, 1, generator=generator, device=device)
        eps += task.noise.offset * constant
    return TrainingNoise(*(part_of(draw, task.part).to(x0.device) for draw in (t, eps, dropped)))


def part_of(draw: Tensor, part: tuple[int, int]) -> Tensor:
    """What a process keeps of a draw for the clips of all, [B*parts,...] -> [B,...].

    Args:
        part: this process's number, and how many share the draw.
    """
    return draw.chunk(part[1])[part[0]]


def crop_where_unsure(
    scale: Tensor, size: tuple[int, int], share: Tensor, clips: tuple[Tensor, ...]
) -> list[Tensor]:
    """Cut one window out of each clip, drawn in proportion to the prediction's mean scale in it.

    Most of a frame stands still and is predicted well: there is little to learn there.

    Args:
        scale: of the prediction, [B,1,M,H,W].
        size: height and width of the windows; they begin at even rows and columns.
        share: where in the cumulative distribution each window lies, uniform in [0, 1), [B].
        clips: [B,...,H,W] each, all cut alike.
    """
    weights = F.avg_pool2d(scale.mean(2), size, stride=2)  # [B,1,rows,columns]
    cumulative = weights.flatten(1).double().cumsum(1)
    chosen = torch.searchsorted(cumulative, share[:, None].double() * cumulative[:, -1:])[:, 0]
    chosen = chosen.clamp(max=cumulative.shape[1] - 1)
    columns = weights.shape[-1]
    # Without a copy to the host, which would wait for the device.
    device = scale.device
    top = 2 * (chosen // columns)
    left = 2 * (chosen % columns)
    rows = (top[:, None] + torch.arange(size[0], device=device))[:, :, None]  # [B,h,1]
    columns = (left[:, None] + torch.arange(size[1], device=device))[:, None]  # [B,1,w]
    batch = torch.arange(len(scale), device=device)[:, None, None]
    return [
        clip.permute(0, 3, 4, 1, 2)[batch, rows, columns].permute(0, 3, 4, 1, 2) for clip in clips
    ]


def drop_contexts(
    start_context: Tensor, end_context: Tensor, dropped: Tensor
) -> tuple[Tensor, Tensor]:
    """Zero both contexts of the `dropped` clips ([B] bool): guidance's unconditional branch."""
    kept = ~dropped.view(-1, 1, 1, 1, 1)
    return start_context * kept, end_context * kept


def temporal_l1(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """L1 between frame differences of predicted and true middle, [B]; 0 for a single frame."""
    if x0.shape[2] == 1:
        return x0.new_zeros(x0.shape[0])
    return (x0_hat.diff(dim=2) - x0.diff(dim=2)).abs().flatten(1).mean(1)


def velocity_loss(
    model: nn.Module,  # (x_t, t, start_context, end_context) -> v
    schedule: DiffusionSchedule,
    start_context: Tensor,  # [B,C,K,H,W] in [-1, 1]; zeros for a dropped clip
    x0: Tensor,  # what is diffused, [B,C,M,H,W]: frames in [-1, 1], or residuals of them
    end_context: Tensor,
    t: Tensor,  # diffusion index per clip, [B] long
    eps: Tensor,  # noise, the shape of x0
    temporal_loss_weight: float = 0.0,
    guide: Tensor | None = None,  # [B,G,M,H,W], for a model that was built for one
) -> Tensor:
    """MSE on v plus temporal_loss_weight * `temporal_l1`, [B], in float32 under any autocast."""
    x_t = schedule.add_noise(x0, eps, t)
    v_hat = model(x_t, t, start_context, end_context, guide).float()
    v_mse = (v_hat - schedule.v_from(x0, eps, t)).square().flatten(1).mean(1)  # [B]
    motion = temporal_l1(schedule.x0_from_v(x_t, v_hat, t), x0)  # [B]
    return v_mse + temporal_loss_weight * motion


def diffusion_loss(
    model: nn.Module,
    start_context: Tensor,
    middle: Tensor,
    end_context: Tensor,
    generator: torch.Generator,
    *,
    task: DiffusionTask,
) -> Tensor:
    """The denoiser's loss, at noise levels and noise drawn from the generator.

    Args:
        model: (x_t, t, start_context, end_context, guide) -> v.
        start_context: [B,C,K,H,W] in [-1, 1], as `end_context`.
        middle: true frames, [B,C,M,H,W] in [-1, 1].
    """
    code = None
    if task.predictor is not None:
        codes = draw_codes(len(middle), task.predictor.code_size, generator, task.part).to(
            middle.device
        )
        code = nearest_code(task.predictor, start_context, middle, end_context, codes)
    prediction = predict(task.predictor, start_context, end_context, middle.shape[2], code)
    x0 = prediction.to_residual(middle)
    guide = prediction.guide
    if task.crop is not None:
        clips = len(middle) * task.part[1]
        share = torch.rand(clips, generator=generator, device=generator.device)
        share = part_of(share, task.part).to(middle.device)
        whole = (start_context, end_context, x0, guide)
        start_context, end_context, x0, guide = crop_where_unsure(
            prediction.scale, task.crop, share, whole
        )
    noise = sample_training_noise(x0, generator, task)
    # The network loses the contexts of dropped clips; the prediction that it refines keeps them.
    start, end = drop_contexts(start_context, end_context, noise.dropped)
    return velocity_loss(
        model=model,
        schedule=task.schedule,
        start_context=start,
        x0=x0,
        end_context=end,
        t=noise.t,
        eps=noise.eps,
        temporal_loss_weight=task.temporal_loss_weight,
        guide=guide,
    )


def guess_losses(guess: Sequence[Tensor], middle: Tensor) -> Tensor:
    """Error of a guess (frames, log_error, ...) of the middle, [B,C,M,H,W]: a loss per clip, [B].

    The expected error is learned as the width of a Laplace distribution, by its likelihood of the
    error. The loss is 0 for exact frames that are expected to be exact, and never negative.

    Source: the likelihood is that of Kendall & Gal 2017, arXiv:1703.04977, section 3.
    """
    frames, log_error, *_ = guess
    error = frames - middle
    absolute = error.abs().mean(1, keepdim=True)  # [B,1,M,H,W]
    squared = error.square().mean(1, keepdim=True)
    likelihood = absolute.detach() * (-log_error).exp() + log_error - LOWEST_LOG_ERROR
    loss = absolute + SQUARED_WEIGHT * squared + ERROR_WEIGHT * likelihood
    return loss.flatten(1).mean(1)


def draw_codes(
    clips: int, code_size: int, generator: torch.Generator, part: tuple[int, int] = (0, 1)
) -> Tensor:
    """Candidate codes of each clip, standard normal, [B,DRAWN_CODES,code_size]."""
    shape = (clips * part[1], DRAWN_CODES, code_size)
    return part_of(torch.randn(shape, generator=generator, device=generator.device), part)


@torch.no_grad()
def nearest_code(
    predictor: nn.Module,
    start_context: Tensor,
    middle: Tensor,
    end_context: Tensor,
    codes: Tensor,
) -> Tensor:
    """Of the codes of each clip, [B,N,code_size], the one with the least loss, [B,code_size]."""
    b, n, _ = codes.shape
    start, truth, end = (
        x.repeat_interleave(n, dim=0) for x in (start_context, middle, end_context)
    )
    losses = guess_losses(predictor(start, end, truth.shape[2], codes.flatten(0, 1)), truth)
    nearest = losses.view(b, n).argmin(1)
    return codes[torch.arange(b, device=codes.device), nearest]


def predictor_loss(
    model: nn.Module,
    start_context: Tensor,
    middle: Tensor,
    end_context: Tensor,
    generator: torch.Generator,
    *,
    code_size: int,
    part: tuple[int, int] = (0, 1),
) -> Tensor:
    """The predictor's regression loss: every second clip trains the nearest of its codes.

    The others train the code of zeros, which thus gives the mean.

    Args:
        model: (start_context, end_context, M, code) -> Guess, as FramePredictor.
        start_context: [B,C,K,H,W] in [-1, 1], as `end_context`.
        middle: true frames, [B,C,M,H,W] in [-1, 1].
        part: this process's number, and how many share a step's draws.

    Returns: [B].
    Source: Li & Malik 2018, arXiv:1809.09087, of a few drawn codes.
    """
    codes = draw_codes(len(middle), code_size, generator, part).to(middle.device)
    code = torch.zeros_like(codes[:, 0])
    clips = (start_context, middle, end_context, codes)
    # Every second clip of the batch of all processes; this process's part may start at an odd one.
    first = 1 - part[0] * len(middle) % 2
    code[first::2] = nearest_code(model, *(x[first::2] for x in clips))
    return guess_losses(model(start_context, end_context, middle.shape[2], code), middle)


@torch.no_grad()
def predictor_validation_losses(
    model: nn.Module,
    start_context: Tensor,
    middle: Tensor,
    end_context: Tensor,
    clips: range,
) -> Tensor:
    """Losses of the mean guess of held-out clips, [B]; nothing is random."""
    return guess_losses(model(start_context, end_context, middle.shape[2]), middle)


@torch.no_grad()
def diffusion_validation_losses(
    model: nn.Module,
    start_context: Tensor,
    middle: Tensor,
    end_context: Tensor,
    clips: range,
    *,
    task: DiffusionTask,
    total_clips: int,
    seed: int,
) -> Tensor:
    """Losses of held-out clips at fixed, evenly spread t and fixed noise: comparable over epochs.

    Args:
        clips: numbers, in the whole split, of the clips of this batch.
        total_clips: of the split; where they are few, each is seen at several t.

    Returns: [B * draws].
    """
    draws = min(-(-VALIDATION_PAIRS // total_clips), VALIDATION_DRAWS)
    code = None
    if task.predictor is not None:
        # A stream of its own for each clip, after those of the pairs.
        streams = [generator_for(seed, VALIDATION, draws * total_clips + clip) for clip in clips]
        size = task.predictor.code_size
        codes = torch.cat([draw_codes(1, size, stream) for stream in streams])
        codes = codes.to(middle.device)
        code = nearest_code(task.predictor, start_context, middle, end_context, codes)
    prediction = predict(task.predictor, start_context, end_context, middle.shape[2], code)
    x0 = prediction.to_residual(middle)
    losses = []
    for draw in range(draws):
        # Each pair owns one stratum of the noise levels, and its own noise.
        strata = [draw * total_clips + clip for clip in clips]
        levels = [(stratum + 0.5) / (draws * total_clips) for stratum in strata]
        t = torch.tensor([int(level * task.schedule.timesteps) for level in levels])
        generators = [generator_for(seed, VALIDATION, stratum) for stratum in strata]
        eps = sample_noise(middle.shape[1:], generators, middle.device, task.noise)
        loss = velocity_loss(
            model=model,
            schedule=task.schedule,
            start_context=start_context,
            x0=x0,
            end_context=end_context,
            t=t.to(middle.device),
            eps=eps,
            temporal_loss_weight=task.temporal_loss_weight,
            guide=prediction.guide,
        )
        losses.append(loss)
    return torch.cat(losses)
