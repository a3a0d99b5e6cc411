"""Seconds per clip of sampling, and what the default's fewer steps cost in quality, against the original design's way.

    python benchmarks/bench_sampling.py --ckpt outputs/demo/best.pt

The reference runs 40 DDIM steps at guidance 1.8 eagerly: two forwards per step, one per guidance branch, each after
encoding both contexts anew, convolutions in torch's default memory layout. At guidance 1 it runs both branches, too.
On a GPU it samples in float32, as the original does, and ours under bf16 autocast. Scores are taken in float32.
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks import measure
from data.video_index import data_as_trained, split_as_trained, usable_videos
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import SAMPLER_PRESETS, MiddleFramePipeline, describe_settings, forwards_per_clip
from evaluation.evaluator import ClipReader
from evaluation.metrics import HIGHER_IS_BETTER, Scorer, missing_for
from evaluation.protocols import PROTOCOLS
from evaluation.results import estimate
from models.video_unet3d import VideoUNet3D
from utils.flags import Parser, non_negative_int, nonempty_path, positive_int
from utils.video_utils import split_clip, to_float

SLOW = SAMPLER_PRESETS["reference"]
UNGUIDED = SLOW | {"guidance_scale": 1.0}
REFERENCE = "reference: " + describe_settings(SLOW)
REFERENCE_UNGUIDED = "reference at guidance 1"
OURS_UNGUIDED = "ours at guidance 1, as many steps (times the reference at guidance 1)"
METRICS = {"psnr": "psnr", "ssim": "ssim", "temporal": "temporal_l1"}  # metric: the score it gives
Way = tuple[MiddleFramePipeline, Mapping[str, Any]]  # of sampling: a network, and settings


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("model and clips").add_argument
    add("--ckpt", required=True, help="checkpoint of train_video_ddpm.py: last.pt or best.pt")
    add("--data_root", type=nonempty_path, help="folder of MP4 files; None = the checkpoint's own held-out clips")
    add("--cache_dir", type=nonempty_path, help="folder for the file index; None = as in training")
    add("--batch_sizes", type=positive_int, nargs="+", default=[1, 8], help="clips at once; a table for each")
    add("--quality_clips", type=non_negative_int, default=32, help="clips to score default and reference on; 0 = none")
    add("--compile", action="store_true", help="time torch.compile of the default, too")
    measure.add_common_flags(parser, rounds=5)
    return parser


class OriginalWay(nn.Module):
    """A network sampled as the original does: both branches at every step, apart, each with its own encoding.

    Args:
        model: whose weights are used, in torch's default memory layout.
        guided: whether x_t comes with both branches (blank contexts first); if not, the blank one is run and dropped.
    """

    def __init__(self, model: VideoUNet3D, guided: bool):
        super().__init__()
        self.model = copy.deepcopy(model).set_memory_format(channels_last=False)
        self.endpoint_context, self.check_contexts = model.endpoint_context, model.check_contexts
        self.predictor, self.timed, self.image_channels = model.predictor, model.timed, model.image_channels
        self.guided = guided

    def encode_contexts(self, start_context: Tensor, end_context: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing yet: the contexts themselves."""
        return start_context, end_context

    def denoise(self, x_t: Tensor, t: Tensor, features: tuple[Tensor, Tensor]) -> Tensor:
        """The velocity of x_t, two forwards whatever the guidance."""
        start, end = features
        if not self.guided:
            self.forward(x_t, t, torch.zeros_like(start), torch.zeros_like(end))
            return self.forward(x_t, t, start, end)
        halves = zip(*(part.chunk(2) for part in (x_t, t, start, end)), strict=True)
        return torch.cat([self.forward(*half) for half in halves])

    def forward(self, x_t: Tensor, t: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """Encode and denoise."""
        return self.model.denoise(x_t, t, self.model.encode_contexts(start, end))


def load_clips(args: argparse.Namespace, pipe: MiddleFramePipeline, count: int) -> Tensor:
    """Central windows of so many clips, or of all if there are fewer, uint8 [B,C,T,size,size].

    Raises: ValueError: if one cannot be read.
    """
    trained, reader = pipe.trained["args"], ClipReader(**pipe.clip_config, window="central", seed=0)
    if args.data_root:
        videos = usable_videos(args.data_root, reader.needed, args.cache_dir or "outputs/cache", count)
    else:
        root, cache_dir = data_as_trained(trained, None, args.cache_dir)
        videos = split_as_trained(trained, pipe.clip_config, root, cache_dir)[1][:count]
    clips = [reader.read(video, reader.identify(video, i)["first_frame"]) for i, video in enumerate(videos)]
    for video, clip in zip(videos, clips, strict=True):
        if isinstance(clip, str):
            raise ValueError(f"--data_root: could not read {video.name} ({clip})")
    return torch.stack(clips)


def sample(way: Way, clips: Tensor, first: int = 0) -> Tensor:
    """Middles of float clips [B,C,T,H,W] from fixed noise, that of clip `first` and those after it."""
    pipe, settings = way
    start, middle, end = split_clip(clips, pipe.endpoint_context)
    generators = [generator_for(0, SAMPLE, first + i) for i in range(len(clips))]
    return pipe(start, end, num_middle=middle.shape[2], generator=generators, **settings)


def compare_quality(reference: Way, ours: Way, clips: Tensor) -> dict[str, Any]:
    """Means of every score, and the difference paired over clips with its 95 % bootstrap interval."""
    metrics = [name for name in METRICS if not missing_for(name, clips.shape[-1])]
    scorer = Scorer(metrics, PROTOCOLS["native"], clips.device)
    lines: tuple[list, list] = ([], [])  # of both ways, a dict of scores per clip
    for first in range(0, len(clips), 8):
        batch = clips[first : first + 8]
        start, middle, end = split_clip(batch, ours[0].endpoint_context)
        for found, way in zip(lines, (reference, ours), strict=True):
            found += scorer(sample(way, batch, first), middle, start, end)
    print(f"\nquality on {len(clips)} clips; differences are paired, with their 95 % bootstrap interval\n")
    print("| score | reference | default | difference |\n|---|---|---|---|")
    rows = {}
    for name in (METRICS[metric] for metric in metrics):
        values = [[line[name] for line in found] for found in lines]
        means = [estimate(of_way).mean for of_way in values]
        difference = estimate([b - a for a, b in zip(*values, strict=True)])
        rows[name] = {"reference": means[0], "default": means[1], "difference": difference._asdict()}
        sign = "" if name in HIGHER_IS_BETTER else " (lower is better)"
        interval = f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
        print(f"| {name}{sign} | {means[0]:.4f} | {means[1]:.4f} | {interval} |")
    return rows


@torch.no_grad()
def benchmark(args: argparse.Namespace) -> None:
    """From flags to tables."""
    pipe = MiddleFramePipeline.from_checkpoint(args.ckpt, args.device)
    clips = to_float(load_clips(args, pipe, max(*args.batch_sizes, args.quality_clips))).to(pipe.device)
    rest = {"predictor": pipe.predictor, "residual_scale": pipe.residual_scale, "noise": pipe.noise}
    rest |= {"schedule": pipe.schedule, "clip_config": pipe.clip_config}  # and no autocast
    original, unguided = (MiddleFramePipeline(OriginalWay(pipe.model, guided), **rest) for guided in (True, False))
    default = SAMPLER_PRESETS[pipe.default_preset or "fast"]
    ways = {
        REFERENCE: (original, SLOW),
        "ours, as many steps": (pipe, SLOW),
        REFERENCE_UNGUIDED: (unguided, UNGUIDED),
        OURS_UNGUIDED: (pipe, UNGUIDED),
        "ours, default: " + describe_settings(default): (pipe, default),
    }
    if args.compile:
        compiled = MiddleFramePipeline.from_checkpoint(args.ckpt, args.device, compile=True)
        ways["ours, default, compiled"] = (compiled, default)

    # Time every way at every batch size.
    nfe = {name: forwards_per_clip(pipe.schedule.timesteps, settings) for name, settings in SAMPLER_PRESETS.items()}
    results: dict[str, Any] = {"nfe": nfe}
    for size in args.batch_sizes:
        batch = clips[torch.arange(size) % len(clips)]  # for the clock, clips may repeat
        variants = {name: partial(sample, way, batch) for name, way in ways.items()}
        timings = measure.interleave(variants, size, args.rounds, pipe.device)
        at_1 = {row["variant"]: row for row in measure.compare(timings, REFERENCE_UNGUIDED)}
        rows = measure.compare(timings, REFERENCE)
        rows = [at_1[row["variant"]] if "at guidance 1" in row["variant"] else row for row in rows]
        threads = torch.get_num_threads()
        measure.print_rows(f"{size} clip{'s' * (size > 1)} at once, {pipe.device}, {threads} threads", rows)
        results[f"batch {size}"] = rows

    in_float32 = MiddleFramePipeline(pipe.model, **rest)
    if args.quality_clips:
        results["quality"] = compare_quality((original, SLOW), (in_float32, default), clips[: args.quality_clips])
    measure.save_results(args.out_dir, "sampling", pipe.device, results)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return measure.run_benchmark(build_parser(), benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
