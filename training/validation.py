"""What a run measures and shows of itself: the loss on held-out clips, previews, the scale of residuals."""

import argparse
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from diffusion.loss import predictor_loss, validation_sum
from diffusion.noise import PREVIEW, generator_for
from diffusion.pipeline import MiddleFramePipeline, make_predictor
from training.clip_shapes import cut_clips
from training.state import TrainingState
from utils import distributed
from utils.video_utils import cross_fade, join_clip, psnr, split_clip


@torch.no_grad()
def validate(
    state: TrainingState,
    pipe: MiddleFramePipeline,
    batches: Iterable[Tensor],
    clips: int,
    args: argparse.Namespace,
) -> float:
    """The loss of EMA over the whole split of so many clips, or FloatingPointError; `batches` are this process's."""
    parts = (cut_clips(clip, args) for clip in batches)
    if state.predicting:
        losses = [predictor_loss(state.ema.predictor, *part).sum().item() for part in parts]
        sums = (sum(losses), len(distributed.rank_slice(clips)))
    else:
        parts = ((start, pipe.predict(start, end, x0.shape[2]).to_residual(x0), end) for start, x0, end in parts)
        first, weights = distributed.rank_slice(clips).start, (args.temporal_loss_weight, pipe.noise)
        sums = validation_sum(state.ema, pipe.schedule, parts, clips, args.seed, *weights, first=first)
    loss, pairs = distributed.all_reduce_sum(*sums)
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss must stay finite (got {loss / pairs})")
    return loss / pairs


def preview(
    pipe: MiddleFramePipeline,
    clip: Tensor | None,
    first: int,
    steps: int,
    args: argparse.Namespace,
    log: Callable[..., None],
) -> dict[str, float]:
    """Regenerate the middle of this process's preview clips [B,C,T,H,W], the `first` of all on, from fixed noise.

    Returns: on rank 0, which logs true and generated clips, the mean PSNR in dB of the middle and of the cross-fade.
    """
    made = None
    if clip is not None:
        start, middle, end = split_clip(clip, args.endpoint_context)
        generators = [generator_for(args.seed, PREVIEW, first + i) for i in range(len(clip))]
        how = {"steps": steps, "guidance_scale": args.vis_guidance_scale}
        generated = pipe(start, end, generator=generators, dynamic_threshold=args.dynamic_threshold, **how)
        scores = (psnr(generated, middle), psnr(cross_fade(start, end, middle.shape[2]), middle))
        made = [part.cpu() for part in (clip, join_clip(start, generated, end), *scores)]
    parts = [part for part in distributed.gather(made) if part]
    if not parts:
        return {}
    clip, generated, scores, faded_scores = map(torch.cat, zip(*parts, strict=True))
    log(clip, generated)
    return {"psnr": scores.mean().item(), "psnr_cross_fade": faded_scores.mean().item()}


@torch.no_grad()
def measure_scale(parts: Iterable[tuple[Tensor, Tensor, Tensor]], predictor: str, model: nn.Module) -> float:
    """The deviation of what a predictor that needs no training misses, on batches of (start, middle, end)."""
    predict, squares = make_predictor(predictor, 1.0, model), []
    for start, middle, end in parts:
        squares.append(predict(start, end, middle.shape[2]).to_residual(middle).square().mean().item())
    return max(2 / 255, math.sqrt(sum(squares) / len(squares)))  # not below a grey level, where nothing moves
