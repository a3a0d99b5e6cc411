"""What a run measures and shows of itself: the loss on held-out clips, and previews."""

import argparse
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.noise import PREVIEW, generator_for
from diffusion.pipeline import MiddleFramePipeline
from training import distributed
from training.objective import Objective
from utils.video_utils import cross_fade, join_clip, psnr, split_clip


class Preview(NamedTuple):
    """True and generated clips [B,C,T,H,W] in [-1, 1], and mean PSNR in dB of their middles."""

    truth: Tensor
    generated: Tensor
    endpoint_context: int
    psnr: float
    psnr_cross_fade: float


@torch.no_grad()
def validate(objective: Objective, ema: nn.Module, loader: Any) -> float:
    """The loss of EMA over the whole held-out split, of which the ClipLoader has a share.

    Raises: FloatingPointError: if the loss is not finite.
    """
    first = loader.held_out.start
    total = 0.0
    count = 0
    for clips in loader.validation():
        start, middle, end = split_clip(clips, objective.pipe.endpoint_context)
        numbers = range(first, first + len(clips))
        losses = objective.validation_losses(ema, start, middle, end, numbers)
        total += sum(losses.tolist())
        count += len(losses)
        first = numbers.stop
    total, count = distributed.all_reduce_sum(total, count)
    if not math.isfinite(total):
        raise FloatingPointError(f"the validation loss must stay finite (got {total / count})")
    return total / count


def make_preview(
    pipe: MiddleFramePipeline, clips: Tensor | None, first: int, args: argparse.Namespace
) -> Preview | None:
    """Regenerate the middles of this process's clips [B,C,T,H,W], the `first` of all and on.

    Returns: on rank 0, those of all processes.
    """
    parts = None
    if clips is not None:
        start, middle, end = split_clip(clips, pipe.endpoint_context)
        m = middle.shape[2]
        settings = {}
        if pipe.model is not None:
            settings = {"steps": args.vis_steps, "guidance_scale": args.vis_guidance_scale}
        numbers = range(first, first + len(clips))
        generated = pipe(
            start,
            end,
            num_middle=m,
            generator=[generator_for(args.seed, PREVIEW, number) for number in numbers],
            **settings,
        )
        parts = (
            clips.cpu(),
            join_clip(start, generated, end).cpu(),
            psnr(generated, middle).cpu(),
            psnr(cross_fade(start, end, m), middle).cpu(),
        )
    gathered = [part for part in distributed.gather(parts) if part is not None]
    if not gathered:
        return None
    truth, generated, scores, faded = (torch.cat(group) for group in zip(*gathered, strict=True))
    return Preview(
        truth=truth,
        generated=generated,
        endpoint_context=pipe.endpoint_context,
        psnr=scores.mean().item(),
        psnr_cross_fade=faded.mean().item(),
    )
