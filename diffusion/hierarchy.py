"""Long gaps in several passes: keyframes across the gap first, then the frames between them.

Source: Harvey et al. 2022, arXiv:2205.11495 (FDM), whose hierarchy of keyframes beats growing from one side.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Levels = list[list[list[int]]]
Pass = Callable[[Tensor, Tensor, int, list[int]], Tensor]


def plan_levels(num_middle: int, most: int) -> Levels:
    """The passes that fill a gap, level by level: of each the frames it makes, counted from 0 after the start.

    A pass makes at most `most` frames, spread evenly over a part of the gap that is still open, and rests on those of
    the levels above alone, and on the observed ones. Numbers are rounded; the network takes them as evenly spread.
    """
    levels, gaps = [], [(-1, num_middle)]
    while gaps:
        marks = []
        for left, right in gaps:
            parts = min(most + 1, right - left)
            marks.append([left + round(i * (right - left) / parts) for i in range(parts + 1)])
        levels.append([numbers[1:-1] for numbers in marks])
        gaps = [(a, b) for numbers in marks for a, b in pairwise(numbers) if b - a > 1]
    return levels


def describe_plan(levels: Levels) -> str:
    """The plan on one line."""
    parts = [
        f"level {i}: {sum(map(len, passes))} frames in {len(passes)} passes" for i, passes in enumerate(levels, start=1)
    ]
    return "; ".join(parts).replace(" 1 passes", " 1 pass")


def fill_gap(generate: Pass, start_context: Tensor, end_context: Tensor, levels: Levels) -> Tensor:
    """The middle [B,C,M,H,W] between contexts [B,C,K,H,W], one pass after the other; memory is that of the longest.

    Args:
        generate: the middle of a pass, of its contexts, its number of frames and the numbers of all its frames.
        levels: of `plan_levels`.
    """
    k, num_middle = start_context.shape[2], sum(len(numbers) for passes in levels for numbers in passes)
    frames = dict(zip(range(-k, 0), start_context.unbind(2), strict=True))  # number -> [B,C,H,W]
    frames |= dict(zip(range(num_middle, num_middle + k), end_context.unbind(2), strict=True))
    for passes in levels:
        known, made = sorted(frames), {}
        for numbers in passes:
            before = [number for number in known if number < numbers[0]][-k:]
            after = [number for number in known if number > numbers[-1]][:k]
            ends = (torch.stack([frames[number] for number in side], dim=2) for side in (before, after))
            middle = generate(*ends, len(numbers), [*before, *numbers, *after])
            made |= dict(zip(numbers, middle.unbind(2), strict=True))
        frames |= made
    return torch.stack([frames[number] for number in range(num_middle)], dim=2)
