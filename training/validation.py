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
from training.signals import StopRequest
from utils.video_utils import cross_fade, join_clip, psnr, split_clip


class Preview(NamedTuple):
    """Clips [B,C,T,H,W] in [-1, 1], and mean PSNR in dB of their middles."""

    truth: Tensor
    generated: Tensor
    endpoint_context: int
    psnr: float
    psnr_cross_fade: float


@torch.no_grad()
def validate(objective: Objective, ema: nn.Module, loader: Any, stop: StopRequest) -> float | None:
    """The loss of EMA over the held-out split, of which the ClipLoader has a share.

    Returns: None if a stop signal came; with several processes, which see it at different
        batches, that is not heeded.
    Raises: FloatingPointError: if the loss is not finite.
    """
    first = loader.held_out.start
    total = 0.0
    count = 0
    for clips in loader.validation():
        if stop.signal and distributed.world_size() == 1:
            return None
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
    parts = []
    for i in range(0, 0 if clips is None else len(clips), args.batch_size):
        batch = clips[i : i + args.batch_size]
        start, middle, end = split_clip(batch, pipe.endpoint_context)
        m = middle.shape[2]
        settings = {}
        if pipe.model is not None:
            settings = {"steps": args.vis_steps, "guidance_scale": args.vis_guidance_scale}
        numbers = range(first + i, first + i + len(batch))
        generated = pipe(
            start,
            end,
            num_middle=m,
            generator=[generator_for(args.seed, PREVIEW, number) for number in numbers],
            **settings,
        )
        scores = (psnr(generated, middle), psnr(cross_fade(start, end, m), middle))
        parts.append([part.cpu() for part in (batch, join_clip(start, generated, end), *scores)])
    gathered = [part for parts in distributed.gather(parts) for part in parts]
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
