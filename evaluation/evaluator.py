"""What generates middles, and the scoring of batches of clips with it."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.fvd import I3D
from evaluation.metrics import Scorer, diversity
from utils.video_utils import join_clip, split_clip, to_float


class Method(NamedTuple):
    """A row of the table: draws middles [B,C,M,H,W] for contexts [B,C,K,H,W] and one (clip, sample) key for each.

    Methods of one `curve` differ in their number of steps only.
    """

    name: str
    curve: str
    samples: int
    nfe: int
    generate: Callable[[Tensor, Tensor, Sequence[tuple[int, int]]], Tensor]


class Evaluator:
    """Scores batches of clips with every method.

    Args:
        methods: what to score.
        scorer: of single clips.
        i3d: features for FVD; None = no FVD.
        batch_size: samples generated at once.
        endpoint_context: K.
        device: where it happens.
    """

    def __init__(
        self, methods: Sequence[Method], scorer: Scorer, i3d: I3D | None, batch_size: int, endpoint_context: int,
        device: torch.device,
    ):  # fmt: skip
        self.methods = methods
        self.scorer = scorer
        self.i3d = i3d
        self.batch_size = batch_size
        self.endpoint_context = endpoint_context
        self.device = device

    def generate(self, method: Method, start: Tensor, end: Tensor, numbers: Sequence[int]) -> tuple[Tensor, float]:
        """All samples of a batch of clips, [B,N,C,M,H,W], and the seconds that one took."""
        keys = [(row, sample) for row in range(len(numbers)) for sample in range(method.samples)]
        clock = time.perf_counter()
        parts = []
        for i in range(0, len(keys), self.batch_size):
            chunk = keys[i : i + self.batch_size]
            rows = [row for row, _ in chunk]
            parts.append(method.generate(start[rows], end[rows], [(numbers[row], sample) for row, sample in chunk]))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = (time.perf_counter() - clock) / len(keys)
        return torch.cat(parts).unflatten(0, (len(numbers), method.samples)), seconds

    def score(
        self, clips: Tensor, numbers: Sequence[int], advance: Callable[[int], Any]
    ) -> tuple[list[dict[str, Any]], dict[int, dict[str, np.ndarray]]]:
        """Lines for per_clip.jsonl, and the FVD features by clip and method, of clips uint8 [B,C,T,H,W].

        `advance` is told how many samples have been scored.
        """
        start, truth, end = split_clip(to_float(clips).to(self.device), self.endpoint_context)
        lines = [{"clip": number, "methods": {}} for number in numbers]
        features: dict[int, dict[str, np.ndarray]] = {}
        if self.i3d is not None:
            wholes = zip(start, truth, end, strict=True)
            features = {n: {"truth": self.features(*parts)} for n, parts in zip(numbers, wholes, strict=True)}
        for method in self.methods:
            samples, seconds = self.generate(method, start, end, numbers)
            for row, line in enumerate(lines):
                n = method.samples
                ends = (start[row].expand(n, -1, -1, -1, -1), end[row].expand(n, -1, -1, -1, -1))
                scores = self.scorer(samples[row], truth[row].expand(n, -1, -1, -1, -1), *ends)
                entry = {"samples": scores, "nfe": method.nfe, "seconds": seconds}
                if n > 1:
                    image = samples[row].mean(0, keepdim=True)
                    entry["mean_image"] = self.scorer(image, truth[row, None], start[row, None], end[row, None])[0]
                    if "diversity" in self.scorer.metrics:
                        entry["diversity"] = diversity(samples[row])
                line["methods"][method.name] = entry
                if self.i3d is not None:
                    whole = [self.features(start[row], sample, end[row]) for sample in samples[row]]
                    features[numbers[row]][method.name] = np.stack(whole)
                advance(n)
        return lines, features

    def features(self, start: Tensor, middle: Tensor, end: Tensor) -> np.ndarray:
        """FVD features [D] of one whole clip of three parts, each [C,.,H,W]."""
        return self.i3d(join_clip(start[None], middle[None], end[None]))[0]
