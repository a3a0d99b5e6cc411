"""Seconds per clip of the default sampler, against the reference design as the original runs it.

    python benchmarks/bench_sampling.py --ckpt outputs/demo/best.pt

The reference takes 40 DDIM steps at guidance 1.8 in float32: two forwards per step, one for each
branch, each of which encodes both contexts anew, in torch's default memory layout. The contexts
are noise, as time does not depend on them; evaluate_video_ddpm.py measures quality.
"""

import argparse
import copy
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# As a script, Python searches this folder and not the repository.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from benchmarks import measure
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.sampler import REFERENCE_SAMPLER, forwards_per_clip
from evaluation.evaluator import describe_settings
from models.video_unet3d import VideoUNet3D
from utils.flags import Parser, nonempty_path
from utils.video_utils import as_pair


def build_parser() -> Parser:
    """Define the flags."""
    parser = Parser(__doc__)
    parser.add_argument("--ckpt", type=nonempty_path, required=True, help="of --train diffusion")
    measure.add_common_flags(parser, sizes=[1, 8])
    return parser


class OriginalDenoiser(nn.Module):
    """A network as the original runs it: a forward per branch, each encoding both contexts."""

    def __init__(self, model: VideoUNet3D):
        super().__init__()
        self.model = measure.use_default_layout(copy.deepcopy(model))
        self.endpoint_context = model.endpoint_context
        self.image_channels = model.image_channels

    def encode_contexts(
        self, start_context: Tensor, end_context: Tensor, guide: None
    ) -> tuple[Tensor, Tensor]:
        """Leave the contexts for `denoise`; the original has no guide."""
        return start_context, end_context

    def denoise(self, x_t: Tensor, t: Tensor, contexts: tuple[Tensor, Tensor]) -> Tensor:
        """The velocities of both branches of a guided step, [2B,C,M,H,W]."""
        branches = zip(*(part.chunk(2) for part in (x_t, t, *contexts)), strict=True)
        return torch.cat([self.model(*branch) for branch in branches])


def random_contexts(pipe: MiddleFramePipeline, clips: int) -> Tensor:
    """Both contexts, float [2,B,C,K,H,W] in [-1, 1]."""
    size = as_pair(pipe.clip_config["size"])
    shape = (2, clips, pipe.model.image_channels, pipe.endpoint_context, *size)
    return torch.rand(shape, generator=generator_for(0)).to(pipe.device) * 2 - 1


def sample(pipe: MiddleFramePipeline, settings: Mapping[str, Any], contexts: Tensor) -> Tensor:
    """Middle frames, each clip from noise of its own."""
    noise = [generator_for(0, SAMPLE, i) for i in range(contexts.shape[1])]
    return pipe(*contexts, generator=noise, **settings)


def benchmark(args: argparse.Namespace) -> None:
    """Print and save a table for each batch size."""
    pipe = MiddleFramePipeline.from_checkpoint(args.ckpt, args.device)
    if pipe.model is None:
        raise ValueError(f"--ckpt must be of --train diffusion (got {args.ckpt})")
    original = replace(pipe, model=OriginalDenoiser(pipe.model), amp_dtype=None)
    variants = {"reference": partial(sample, original, REFERENCE_SAMPLER)}
    for settings in (REFERENCE_SAMPLER, pipe.sampler):
        nfe = forwards_per_clip(pipe.schedule.timesteps, settings)
        name = f"ours, {describe_settings(settings)}: {nfe} NFE"
        variants[name] = partial(sample, pipe, settings)
    if args.compile:
        model = copy.deepcopy(pipe.model)
        model.denoise = torch.compile(model.denoise, dynamic=False)
        compiled = replace(pipe, model=model)
        variants["ours, default, --compile"] = partial(sample, compiled, pipe.sampler)

    results = {}
    for size in args.batch_sizes:
        contexts = random_contexts(pipe, size)
        runs = {name: partial(run, contexts) for name, run in variants.items()}
        rows = measure.compare(measure.time_variants(runs, args.rounds, pipe.device), size)
        measure.print_rows(f"clips at once: {size}, {pipe.device}", rows)
        results[f"batch {size}"] = rows
    measure.save_results(args, "sampling", pipe.device, results)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    return measure.run_benchmark(build_parser(), benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
