"""The methods that generate middles, and the scoring of clips with them, batch by batch."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import DecodedFrames, read_clip
from data.moving_mnist import MovingMNIST
from data.video_index import Video, central_start, clip_span, printable, reason_of
from data.video_reader import DECODE_ERRORS
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.sampler import forwards_per_clip
from evaluation.baselines import BASELINES
from evaluation.fvd import I3D
from evaluation.metrics import Scorer, spread
from evaluation.results import Line, PerClipResults
from utils.io import file_sha256
from utils.video_utils import join_clip, split_clip, to_float


class Method(NamedTuple):
    """A row of the table.

    `generate` maps contexts [B,C,K,H,W] and B keys (clip, sample) to middles.
    """

    name: str
    samples: int
    nfe: int
    generate: Callable[[Tensor, Tensor, Sequence[tuple[int, int]]], Tensor]


def pipeline_method(
    pipe: MiddleFramePipeline, settings: Line, num_middle: int, samples: int, seed: int
) -> Method:
    """A model under one combination of sampler settings."""

    def generate(start, end, keys):
        # Each sample has its own noise, in whatever batch it is.
        noise = [generator_for(seed, SAMPLE, *key) for key in keys]
        return pipe(start, end, num_middle=num_middle, generator=noise, **settings)

    # Nothing of a prediction is random.
    samples = samples if settings["steps"] else 1
    nfe = forwards_per_clip(pipe.schedule.timesteps, settings)
    return Method(f"ours, {describe_settings(settings)}", samples, nfe, generate)


def baseline_method(name: str, num_middle: int) -> Method:
    """A baseline, which has one answer and no network of ours."""

    def generate(start, end, keys):
        return BASELINES[name](start, end, num_middle)

    return Method(name.replace("_", "-"), samples=1, nfe=0, generate=generate)


def describe_settings(settings: Mapping[str, Any]) -> str:
    """A sampler's settings in few words: "5 steps, quadratic, guidance 1.8"."""
    if settings["steps"] == 0:
        return "predictor"
    text = f"{settings['steps']} steps"
    if settings["spacing"] != "linspace":
        text += f", {settings['spacing']}"
    text += f", guidance {settings['guidance_scale']:g}"
    low, high = settings["guidance_interval"]
    if (low, high) != (0, 1):
        text += f" in [{low:g}, {high:g}]"
    if settings["eta"]:
        text += f", eta {settings['eta']:g}"
    return text


@dataclass
class Evaluator:
    """Scores a clip of each file with every method.

    Attributes:
        clip: num_frames, endpoint_context, frame_stride, size and color_mode.
        window: "central", "random" (by seed and number) or the first frame.
        batch_size: samples at once.
        i3d: None = no FVD.
    """

    videos: Sequence[Video] | MovingMNIST
    clip: Line
    window: str | int
    seed: int
    methods: Sequence[Method]
    scorer: Scorer
    i3d: I3D | None
    batch_size: int
    device: torch.device

    def identify(self, number: int) -> Line:
        """The name and hash of a clip's file, and the first frame used."""
        if isinstance(self.videos, MovingMNIST):
            return {"name": f"digits {number}", "sha256": None, "first_frame": 0}
        video = self.videos[number]
        span = clip_span(self.clip["num_frames"], self.clip["frame_stride"])
        first = self.window
        if first == "central":
            first = central_start(video, span)
        elif first == "random":
            rng = np.random.default_rng([self.seed, number])
            first = video.frames.start + int(rng.integers(len(video.frames) - span + 1))
        sha256 = file_sha256(video.path)
        return {"name": printable(video.name), "sha256": sha256, "first_frame": first}

    def read(self, number: int, source: Line) -> Tensor:
        """A clip, uint8 [C,T,H,W]; raises one of DECODE_ERRORS."""
        if isinstance(self.videos, MovingMNIST):
            return self.videos[0, number].clip
        frames = DecodedFrames(self.clip["size"], self.clip["color_mode"])
        shape = (self.clip["num_frames"], self.clip["frame_stride"])
        return read_clip(frames, self.videos[number], source["first_frame"], *shape)

    def score_all(self, results: PerClipResults) -> tuple[list[Line], list[str]]:
        """Score every clip that `results` does not hold.

        Returns: the lines of all, and the clips that could not be read.
        Raises: ValueError: if none could.
        """
        # A batch with a clip missing is scored whole: after a stop, scores are
        # those of an undisturbed run, bit for bit.
        numbers = range(len(self.videos))
        sources = [self.identify(number) for number in numbers]
        group = max(1, self.batch_size // max(method.samples for method in self.methods))
        batches = [numbers[i : i + group] for i in numbers[::group]]
        done = {line["clip"] for line in results.scored(sources)}
        failures = []
        for batch in tqdm(batches, "scoring", unit="batch"):
            if done.issuperset(batch):
                continue
            clips = {}
            for number in batch:
                try:
                    clips[number] = self.read(number, sources[number])
                except DECODE_ERRORS as error:
                    failures.append(f"{sources[number]['name']} ({reason_of(error)})")
            if clips:
                lines = self.score(clips)
                results.add([{**line, "source": sources[line["clip"]]} for line in lines])
        results.tidy()
        lines = results.scored(sources)
        if not lines:
            raise ValueError(f"--data_root: no clip could be read: {'; '.join(failures)}")
        return lines, failures

    def score(self, clips: Mapping[int, Tensor]) -> list[Line]:
        """Lines of scores of clips uint8 [C,T,H,W] by number."""
        batch = to_float(torch.stack(list(clips.values()))).to(self.device)
        start, truth, end = split_clip(batch, self.clip["endpoint_context"])
        lines = [{"clip": number, "methods": {}} for number in clips]
        if self.i3d is not None:
            for line, whole in zip(lines, batch, strict=True):
                line["features"] = self.i3d(whole[None])[0].tolist()

        for method in self.methods:
            generated, seconds = self.generate(method, start, end, list(clips))
            for row, samples in enumerate(generated):  # [N,C,M,H,W]
                given = [part[row, None] for part in (truth, start, end)]
                repeated = [part.expand(len(samples), -1, -1, -1, -1) for part in given]
                entry = {
                    "samples": self.scorer(samples, *repeated),
                    "nfe": method.nfe,
                    "seconds": seconds,
                }
                if len(samples) > 1:
                    image = samples.mean(0, keepdim=True)
                    entry["mean_image"] = self.scorer(image, *given)[0]
                    entry["spread"] = spread(samples, given[0])
                if self.i3d is not None:
                    # One by one: batches of other sizes are rounded differently.
                    wholes = join_clip(repeated[1], samples, repeated[2])
                    entry["features"] = [self.i3d(x[None])[0].tolist() for x in wholes]
                lines[row]["methods"][method.name] = entry
        return lines

    def generate(
        self, method: Method, start: Tensor, end: Tensor, numbers: Sequence[int]
    ) -> tuple[Tensor, float]:
        """All samples [B,N,C,M,H,W] of a batch, and the seconds that one took."""
        n = method.samples
        keys = [(number, sample) for number in numbers for sample in range(n)]
        start = start.repeat_interleave(n, dim=0)  # [B*N,C,K,H,W]
        end = end.repeat_interleave(n, dim=0)
        clock = time.perf_counter()
        parts = []
        for i in range(0, len(keys), self.batch_size):
            part = slice(i, i + self.batch_size)
            parts.append(method.generate(start[part], end[part], keys[part]))
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        seconds = (time.perf_counter() - clock) / len(keys)
        return torch.cat(parts).unflatten(0, (len(numbers), n)), seconds
