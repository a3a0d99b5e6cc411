"""What clips a run is made of: one length and stride, or any of a range (--T 6 12, --frame_stride 1 4)."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from utils.distributed import print0
from utils.video_utils import add_times, as_pair, clip_times, split_clip


def is_timed(args: argparse.Namespace) -> bool:
    """Whether a length or a stride is a range, so that the network must be told the times of its frames."""
    return isinstance(args.num_frames, list) or isinstance(args.frame_stride, list)


def clip_config_of(args: argparse.Namespace) -> dict[str, Any]:
    """What sampling takes a clip to be unless told: of ranges the longest clip, at the smallest stride."""
    length, stride = as_pair(args.num_frames)[1], as_pair(args.frame_stride)[0]
    return {"num_frames": length, "size": args.size, "frame_stride": stride, "color_mode": args.color_mode}


def window_length(args: argparse.Namespace, lengths: Sequence[int]) -> int:
    """Frames from which a timed run cuts its clips: what the longest clip spans, or the shortest video has."""
    (_, longest), (_, stride) = as_pair(args.num_frames), as_pair(args.frame_stride)
    wanted, shortest = (longest - 1) * stride + 1, min(lengths)
    if shortest < wanted:
        print0(f"note: strides are drawn as they fit the shortest video ({shortest} frames; all need {wanted})")
    return min(shortest, wanted)


def cut_clips(
    clips: Tensor, args: argparse.Namespace, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """start_context, middle, end_context of a batch [B,C,T,H,W]; of a timed run the contexts have their times.

    With a generator, T are neighbouring frames of a timed run's videos, from which `draw_times` takes some. Without,
    they are those of clips as validation and sampling have them.
    """
    k = args.endpoint_context
    if not is_timed(args):
        return split_clip(clips, k)
    times = list(clip_times(clips.shape[2], as_pair(args.frame_stride)[0]))
    if generator is not None:
        times = draw_times(clips.shape[2], as_pair(args.num_frames), as_pair(args.frame_stride), k, generator)
        clips = clips[:, :, times]
    start, middle, end = split_clip(clips, k)
    start, end = add_times(start, end, times)
    return start, middle, end


def draw_times(
    window: int, lengths: tuple[int, int], strides: tuple[int, int], k: int, generator: torch.Generator
) -> list[int]:
    """Frame numbers below `window` for the T frames of a clip, K of them observed at each end.

    T is drawn from its range, then a stride that fits; of every other clip the contexts have strides of their own, if
    these fit, as keyframes have that are to be filled in between.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    m = draw(*lengths) - 2 * k
    longest = (window - 1) // (m + 2 * k - 1)
    stride = draw(strides[0], max(strides[0], min(strides[1], longest)))
    ends = [draw(*strides) if mixed else stride for mixed in [draw(0, 1)] * 2]
    if (k - 1) * sum(ends) + (m + 1) * stride >= window:
        ends = [stride, stride]
    steps = [ends[0]] * (k - 1) + [stride] * (m + 1) + [ends[1]] * (k - 1)
    first = draw(0, window - 1 - sum(steps))
    return [first, *(first + sum(steps[: i + 1]) for i in range(len(steps)))]
