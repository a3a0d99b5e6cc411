"""Evaluating: which clips are read, what generates their middles, and the scoring of batches with it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import DecodedFrames
from data.video_index import Video, clip_span, printable, reason_of
from data.video_reader import DECODE_ERRORS
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline, describe_settings, forwards_per_clip
from evaluation.fvd import I3D
from evaluation.metrics import Scorer, diversity
from evaluation.results import PerClipResults
from utils import distributed
from utils.distributed import is_main, print0
from utils.interpolators import load_interpolator
from utils.io import file_sha256
from utils.video_utils import FrameSize, join_clip, split_clip, to_float


class ClipReader(NamedTuple):
    """Cuts one clip from a file; `window` is "central", "random" (by seed and number) or the first frame's number."""

    num_frames: int
    frame_stride: int
    size: FrameSize
    color_mode: str
    window: str | int
    seed: int
    linear_light: bool = False

    @property
    def needed(self) -> int:
        """Frames that a file must have."""
        return clip_span(self.num_frames, self.frame_stride) + (self.window if isinstance(self.window, int) else 0)

    def identify(self, video: Video, number: int) -> dict[str, Any]:
        """What one clip is: its file, the file's hash, and the first frame used."""
        slack, first = video.info.frames - clip_span(self.num_frames, self.frame_stride), self.window
        if first == "central":
            first = slack // 2
        elif first == "random":
            first = int(np.random.default_rng([self.seed, number]).integers(slack + 1))
        return {"name": printable(video.name), "sha256": file_sha256(video.path), "first_frame": first}

    def read(self, video: Video, first: int) -> Tensor | str:
        """One clip as uint8 [C,T,H,W], or why it cannot be read."""
        wanted = range(first, first + self.num_frames * self.frame_stride, self.frame_stride)
        try:
            return DecodedFrames(self.size, self.color_mode, self.linear_light).read(video, wanted)
        except DECODE_ERRORS as error:
            return reason_of(error)


class Method(NamedTuple):
    """A row of the table: draws middles [B,C,M,H,W] for contexts [B,C,K,H,W] and one (clip, sample) key for each."""

    name: str
    samples: int
    nfe: int
    generate: Callable[[Tensor, Tensor, Sequence[tuple[int, int]]], Tensor]


def pipeline_method(
    pipe: MiddleFramePipeline, settings: Mapping[str, Any], gap: Mapping[str, Any], samples: int, seed: int
) -> Method:
    """A trained model under one combination of sampler settings; each sample has its own noise.

    `gap` are the arguments of a call that say what is missing: num_middle, times and hierarchy.
    """

    def generate(start: Tensor, end: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
        generators = [generator_for(seed, SAMPLE, *key) for key in keys]
        return pipe(start, end, **gap, generator=generators, **settings)

    nfe = forwards_per_clip(pipe.schedule.timesteps, settings)
    if gap["hierarchy"]:
        nfe *= sum(map(len, pipe.plan(gap["num_middle"])))
    if settings["steps"] == 0:
        samples = 1  # nothing of a prediction is random
    return Method(f"ours, {describe_settings(settings)}", samples, nfe, generate)


def baseline_method(name: str, device: torch.device, num_middle: int) -> Method:
    """A baseline, which has one answer and runs no network of ours."""
    baseline = load_interpolator(name, device)
    return Method(name.replace("_", "-"), 1, 0, lambda start, end, keys: baseline(start, end, num_middle))


@dataclass
class Evaluator:
    """Scores clips with every method, `batch_size` samples at once; with FVD's features where there is an `i3d`."""

    reader: ClipReader
    methods: Sequence[Method]
    scorer: Scorer
    i3d: I3D | None
    batch_size: int
    endpoint_context: int
    device: torch.device

    def score_all(self, videos: Sequence[Video], results: PerClipResults) -> None:
        """Score every clip that `results` does not hold yet, in batches that do not depend on what it holds.

        Several processes take a batch each in turn; the first of them, whose `results` count, writes.
        """
        group = max(1, self.batch_size // max(method.samples for method in self.methods))
        per_clip = sum(method.samples for method in self.methods)
        batches = [range(i, min(i + group, len(videos))) for i in range(0, len(videos), group)]
        waiting = distributed.from_main([batch for batch in batches if not results.has(batch)])
        done = len(videos) - sum(map(len, waiting))
        if done:
            print0(f"{done} of {len(videos)} clips were scored before")
        total, hidden = {"total": len(videos) * per_clip, "initial": done * per_clip}, None if is_main() else True
        with tqdm(**total, unit="sample", disable=hidden) as bar:
            read_and_score = partial(self.read_and_score, videos, results.clips)
            for lines, features in distributed.in_turns(waiting, read_and_score):
                results.add(lines, features)
                bar.update(per_clip * len(lines))
        if is_main():
            results.tidy()

    def read_and_score(
        self, videos: Sequence[Video], about: Sequence[Mapping[str, Any]], batch: Sequence[int]
    ) -> tuple[list[dict], dict[int, dict]]:
        """What `score` gives of the clips of these numbers, with a line for each that could not be read."""
        reads = {i: self.reader.read(videos[i], about[i]["first_frame"]) for i in batch}
        failed = [{"clip": i, "failure": read} for i, read in reads.items() if isinstance(read, str)]
        for line in failed:
            name = printable(videos[line["clip"]].name)
            tqdm.write(f"could not read {name} ({line['failure']}); it is left out")
        clips = {i: read for i, read in reads.items() if torch.is_tensor(read)}
        lines, features = self.score(clips) if clips else ([], {})
        return [*lines, *failed], features

    def score(self, clips: Mapping[int, Tensor]) -> tuple[list[dict], dict[int, dict]]:
        """Lines for per_clip.jsonl, and the FVD features by clip and method, of clips uint8 [C,T,H,W] by number."""
        batch = to_float(torch.stack(list(clips.values()))).to(self.device)
        start, truth, end = split_clip(batch, self.endpoint_context)
        lines, features = [{"clip": number, "methods": {}} for number in clips], {}
        if self.i3d is not None:
            whole = join_clip(start, truth, end)
            features = {number: {"truth": self.i3d(whole[row, None])[0]} for row, number in enumerate(clips)}
        for method in self.methods:
            generated, seconds = self.generate(method, start, end, list(clips))
            for row, (line, samples) in enumerate(zip(lines, generated, strict=True)):
                clip = [part[row].expand(len(samples), -1, -1, -1, -1) for part in (truth, start, end)]
                entry = {"samples": self.scorer(samples, *clip), "nfe": method.nfe, "seconds": seconds}
                if len(samples) > 1:
                    image, once = samples.mean(0, keepdim=True), (part[:1] for part in clip)
                    entry["mean_image"] = self.scorer(image, *once)[0]
                    if "diversity" in self.scorer.metrics:
                        entry["diversity"] = diversity(samples)
                line["methods"][method.name] = entry
                if self.i3d is not None:
                    whole = join_clip(clip[1], samples, clip[2])
                    features[line["clip"]][method.name] = np.stack([self.i3d(sample[None])[0] for sample in whole])
        return lines, features

    def generate(self, method: Method, start: Tensor, end: Tensor, numbers: Sequence[int]) -> tuple[Tensor, float]:
        """All samples of a batch of clips, [B,N,C,M,H,W], and the seconds that one took."""
        keys = [(row, sample) for row in range(len(numbers)) for sample in range(method.samples)]
        clock, parts = time.perf_counter(), []
        for i in range(0, len(keys), self.batch_size):
            chunk = keys[i : i + self.batch_size]
            rows = [row for row, _ in chunk]
            parts.append(method.generate(start[rows], end[rows], [(numbers[row], sample) for row, sample in chunk]))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = (time.perf_counter() - clock) / len(keys)
        return torch.cat(parts).unflatten(0, (len(numbers), method.samples)), seconds
