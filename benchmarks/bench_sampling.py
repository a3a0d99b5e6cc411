"""Seconds per clip of sampling, and what the default's fewer steps cost in quality, against the original design's way.

    python benchmarks/bench_sampling.py --ckpt outputs/demo/best.pt

The reference runs 40 DDIM steps at guidance 1.8 eagerly: two forwards per step, one per guidance branch, each after
encoding both contexts anew, convolutions in torch's default memory layout. At guidance 1 it runs both branches, too.
On a GPU it samples in float32, as the original does, and ours under bf16 autocast. Scores are taken in float32.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from benchmarks.measure import Variant, add_common_flags, compare, interleave, print_rows, save_findings
from data.kinetics_video_dataset import (
    DecodedFrames,
    VideoClipDataset,
    collate,
    data_as_trained,
    split_as_trained,
    usable_videos,
)
from diffusion.noise import SAMPLE, generator_for
from diffusion.sampler import PRESETS, describe_settings, forwards_per_clip, sample_middle
from diffusion.schedule import DiffusionSchedule
from evaluation.metrics import HIGHER_IS_BETTER, Scorer, missing_for
from evaluation.results import estimate
from models.video_unet3d import VideoUNet3D, build_model
from utils.checkpoint import load_checkpoint, load_weights
from utils.flags import Parser, non_negative_int, nonempty_path, positive_int, resolve_device
from utils.io import save_mp4
from utils.video_utils import split_clip, to_float

UNGUIDED = {"guidance_scale": 1.0}
REFERENCE = "reference: " + describe_settings(PRESETS["reference"])
REFERENCE_UNGUIDED = "reference at guidance 1"
OURS_UNGUIDED = "ours at guidance 1, as many steps (times the reference at guidance 1)"
METRICS = {"psnr": "psnr", "ssim": "ssim", "temporal": "temporal_l1"}  # metric: the score it gives


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("model and clips")
    group.add_argument("--ckpt", required=True, help="checkpoint of train_video_ddpm.py: last.pt or best.pt")
    group.add_argument(
        "--data_root", type=nonempty_path, help="folder of MP4 files; None = the checkpoint's own held-out clips"
    )
    group.add_argument("--cache_dir", type=nonempty_path, help="folder for the file index; None = as in training")
    group.add_argument(
        "--batch_sizes", type=positive_int, nargs="+", default=[1, 8], help="clips at once; a table for each"
    )
    group.add_argument(
        "--quality_clips", type=non_negative_int, default=32,
        help="clips on which the default and the reference are scored; 0 = none",
    )  # fmt: skip
    group.add_argument("--compile", action="store_true", help="time torch.compile of the default, too")
    add_common_flags(parser, rounds=5)
    return parser


class OriginalWay:
    """A Denoiser that does what the original does: both branches at every step, apart, each with its own encoding.

    Args:
        model: whose weights are used, in torch's default memory layout.
        guided: whether x_t comes with both branches (blank contexts first); if not, the blank one is run and dropped.
    """

    def __init__(self, model: VideoUNet3D, guided: bool):
        self.model = copy.deepcopy(model).lay_out(channels_last=False)
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


def load_clips(args: Any, checkpoint: dict[str, Any], count: int) -> Tensor:
    """Central windows of so many clips, or of all if there are fewer, uint8 [B,C,T,size,size].

    Raises: ValueError: if one cannot be read.
    """
    clip = checkpoint["clip_config"]
    span = (clip["num_frames"] - 1) * clip["frame_stride"] + 1
    if args.data_root:
        videos = usable_videos(args.data_root, span, args.cache_dir or "outputs/cache", count)
    else:
        root, cache_dir = data_as_trained(checkpoint, None, args.cache_dir, save_mp4)
        videos = split_as_trained(checkpoint, root, cache_dir)[1][:count]
    source = DecodedFrames(clip["size"], clip["color_mode"])
    windows = {"num_frames": clip["num_frames"], "frame_stride": clip["frame_stride"]}
    dataset = VideoClipDataset(videos, source, **windows, seed=0, random_window=False)
    clips, failures, _ = collate([dataset[0, i] for i in range(len(videos))])
    if failures:
        raise ValueError(f"--data_root: could not read {failures[0]}")
    return clips


def sampling(
    model: Any, schedule: DiffusionSchedule, clips: Tensor, k: int, settings: dict[str, Any], amp: bool, first: int = 0
) -> Callable[[], Tensor]:
    """A function that generates the middles of float clips [B,C,T,H,W] from fixed noise, that of clip `first` on."""
    start, middle, end = split_clip(clips, k)

    def run() -> Tensor:
        generators = [generator_for(0, SAMPLE, first + i) for i in range(len(clips))]
        with torch.autocast(clips.device.type, torch.bfloat16, enabled=amp):
            return sample_middle(
                model, schedule, start, end, num_middle=middle.shape[2], generator=generators, **settings
            )

    return run


def score(
    generate: Callable[[Tensor, int], Tensor], clips: Tensor, k: int, metrics: Sequence[str]
) -> dict[str, list[float]]:
    """Per-clip scores of what `generate` makes of a batch of eight and the number of its first clip."""
    scorer = Scorer(metrics, published=False, device=clips.device)
    found: dict[str, list[float]] = {METRICS[name]: [] for name in metrics}
    for first in range(0, len(clips), 8):
        batch = clips[first : first + 8]
        start, middle, end = split_clip(batch, k)
        for line in scorer(generate(batch, first), middle, start, end):
            for name, values in found.items():
                values.append(line[name])
    return found


def print_quality(reference: dict[str, list[float]], ours: dict[str, list[float]], clips: int) -> dict[str, Any]:
    """Means of both and their difference paired over clips, with its 95 % bootstrap interval."""
    print(f"\nquality on {clips} clips; differences are paired, with their 95 % bootstrap interval\n")
    print("| score | reference | default | difference |\n|---|---|---|---|")
    rows = {}
    for name in ours:
        sign = "" if name in HIGHER_IS_BETTER else " (lower is better)"
        difference = estimate([b - a for a, b in zip(reference[name], ours[name], strict=True)])
        means = [estimate(values).mean for values in (reference[name], ours[name])]
        rows[name] = {"reference": means[0], "default": means[1], "difference": difference._asdict()}
        print(
            f"| {name}{sign} | {means[0]:.4f} | {means[1]:.4f} | "
            f"{difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}] |"
        )
    return rows


@torch.no_grad()
def benchmark(args: Any) -> None:
    """From flags to tables.

    Raises: ValueError: for what the user can mend.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    device = resolve_device(args.device)
    checkpoint = load_checkpoint(args.ckpt)
    diffusion, k = checkpoint["diffusion_config"], checkpoint["model_config"]["endpoint_context"]
    schedule = DiffusionSchedule(diffusion["timesteps"], diffusion["schedule"]).to(device)
    model = build_model(checkpoint["model_config"])
    load_weights(model, checkpoint["ema"], args.ckpt)
    model = model.to(device).lay_out().eval()
    amp = device.type == "cuda" and torch.cuda.is_bf16_supported()
    original, unguided = OriginalWay(model, guided=True), OriginalWay(model, guided=False)
    reference = PRESETS["reference"]
    ways = [
        (REFERENCE, original, reference),
        ("ours, as many steps", model, reference),
        (REFERENCE_UNGUIDED, unguided, reference | UNGUIDED),
        (OURS_UNGUIDED, model, reference | UNGUIDED),
        ("ours, default: " + describe_settings(PRESETS["fast"]), model, PRESETS["fast"]),
    ]
    if args.compile:
        compiled = copy.deepcopy(model).compile_for_sampling()
        ways.append(("ours, default, compiled", compiled, PRESETS["fast"]))
    clips = to_float(load_clips(args, checkpoint, max(*args.batch_sizes, args.quality_clips))).to(device)

    findings: dict[str, Any] = {"nfe": {name: forwards_per_clip(schedule.timesteps, s) for name, s in PRESETS.items()}}
    for size in args.batch_sizes:
        batch = clips[torch.arange(size) % len(clips)]  # for the clock, clips may repeat
        variants = [
            Variant(name, sampling(net, schedule, batch, k, s, amp and not isinstance(net, OriginalWay)), size)
            for name, net, s in ways
        ]
        timings = interleave(variants, args.rounds, device)
        versus_unguided = {row["variant"]: row for row in compare(timings, REFERENCE_UNGUIDED)}
        rows = [
            versus_unguided[row["variant"]] if row["variant"] in (REFERENCE_UNGUIDED, OURS_UNGUIDED) else row
            for row in compare(timings, REFERENCE)
        ]
        print_rows(f"{size} clip{'s' * (size > 1)} at once, {device}, {torch.get_num_threads()} threads", rows)
        findings[f"batch {size}"] = rows
    clips = clips[: args.quality_clips]
    if len(clips):
        metrics = [name for name in METRICS if not missing_for(name, clips.shape[-1])]
        found = [
            score(lambda batch, i, n=net, s=s: sampling(n, schedule, batch, k, s, False, i)(), clips, k, metrics)
            for net, s in ((original, reference), (model, PRESETS["fast"]))
        ]
        findings["quality"] = print_quality(*found, len(clips))
    save_findings(args.out_dir, "sampling", device, findings)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    try:
        benchmark(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
