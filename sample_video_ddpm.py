"""Generate the frames between two observed ends, from start and end images or from held-out clips of a dataset.

Everything that the checkpoint knows (network, frame size, colours, noise schedule) is taken from it.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import DecodedFrames, VideoClipDataset, data_as_trained, split_as_trained
from diffusion.noise import SAMPLE, generator_for
from diffusion.sampler import (
    PRESETS,
    SAMPLERS,
    SPACINGS,
    branches,
    check_sampler,
    describe_settings,
    forwards_per_clip,
    sample_middle,
    settings_grid,
)
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import VideoUNet3D, build_model, forward_memory
from utils.checkpoint import load_checkpoint, load_weights
from utils.flags import (
    Parser,
    add_checkpoint_flags,
    add_clip_flags,
    add_sampler_flags,
    nonempty_path,
    positive_int,
    resolve_device,
    settle_clip_flags,
)
from utils.io import contact_sheet, observed_frames, read_image, save_gif, save_json, save_mp4, save_png
from utils.memory import check_memory, explaining_shortage
from utils.video_utils import cross_fade, join_clip, psnr, resize_and_crop, split_clip, to_float, to_gray, to_uint8

MEMORY_FLAGS = "--batch_size, --size or --T"


def build_parser() -> Parser:
    """Every flag; those that default to None take the checkpoint's value."""
    parser = Parser(__doc__)

    group = parser.add_argument_group("checkpoint and output")
    add_checkpoint_flags(group, required=True)
    group.add_argument("--out_dir", type=nonempty_path, default="outputs/sample", help="folder for everything written")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier sample in --out_dir")
    group.add_argument("--fps", type=positive_int, default=8, help="frames per second of sample.mp4 and sample.gif")

    group = parser.add_argument_group("contexts")
    group.add_argument(
        "--start_images", nargs="+", metavar="PNG", help="the K first frames in time order; with --end_images"
    )
    group.add_argument("--end_images", nargs="+", metavar="PNG", help="the K last frames in time order")
    group.add_argument(
        "--data_root",
        type=nonempty_path,
        help="without images: contexts of held-out clips of this folder; None = the checkpoint's own data",
    )
    group.add_argument("--num_clips", type=positive_int, default=1, help="held-out clips, evenly chosen")
    group.add_argument(
        "--cache_dir",
        type=nonempty_path,
        help="folder for the file index and built-in clips; None = as in training",
    )

    add_clip_flags(parser.add_argument_group("clip"))

    group = parser.add_argument_group("sampler")
    group.add_argument("--num_samples", type=positive_int, default=1, help="different middles for each context")
    presets = {name: describe_settings(settings) for name, settings in PRESETS.items()}
    add_sampler_flags(group, SAMPLERS, SPACINGS, presets)
    return parser


class Contexts(NamedTuple):
    """What is observed, uint8 on the CPU: contexts [B,C,K,H,W], and the true middle [B,C,M,H,W] where it is known."""

    start: Tensor
    end: Tensor
    middle: Tensor | None
    sources: list[str]


def settle_with_checkpoint(args: argparse.Namespace, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Fill the flags that were not given from the checkpoint, and check those that were.

    Returns: the settings of the sampling loop.
    Raises: ValueError: naming the flag, the rule and the value.
    """
    settle_clip_flags(args, checkpoint)
    settings = settings_grid(vars(args))[0]
    check_sampler(checkpoint["diffusion_config"]["timesteps"], settings)
    if not checkpoint["args"].get("cfg_drop_prob") and settings["guidance_scale"] != 1:
        print(
            f"note: {args.ckpt} has no trained unconditional branch: it needs --guidance_scale 1 (and --preset fast)",
            file=sys.stderr,
        )
    if (args.start_images is None) != (args.end_images is None):
        raise ValueError("--start_images and --end_images must be given together")
    k = args.endpoint_context
    for flag in ("start_images", "end_images"):
        paths = getattr(args, flag)
        if paths is not None and len(paths) != k:
            raise ValueError(f"--{flag} must be {k} images, the checkpoint's endpoint_context (got {len(paths)})")
    return settings


def load_images(paths: Sequence[str], size: int, color_mode: str) -> Tensor:
    """Images in time order as one context, uint8 [1,C,K,size,size], treated as clip frames are."""
    frames = torch.stack([resize_and_crop(read_image(path), size) for path in paths])  # [K,3,H,W]
    return (to_gray(frames) if color_mode == "gray" else frames).transpose(0, 1)[None]


def load_contexts(args: argparse.Namespace, checkpoint: dict[str, Any]) -> Contexts:
    """From the images given, or from the middle window of held-out clips, split as in training.

    Raises: ValueError: for a missing or unreadable file, or too few clips.
    """
    if args.start_images:
        start, end = (load_images(paths, args.size, args.color_mode) for paths in (args.start_images, args.end_images))
        return Contexts(start, end, None, [" ".join([*args.start_images, *args.end_images])])

    root, cache_dir = data_as_trained(checkpoint, args.data_root, args.cache_dir, save_mp4)
    _, held_out = split_as_trained(checkpoint, root, cache_dir)
    span = (args.num_frames - 1) * args.frame_stride + 1
    videos = [video for video in held_out if video.info.frames >= span]
    if args.num_clips > len(videos):
        raise ValueError(
            f"--num_clips must be at most the {len(videos)} held-out clips of {root} with {span} frames or more "
            f"(got {args.num_clips})"
        )
    chosen = [videos[i * len(videos) // args.num_clips] for i in range(args.num_clips)]
    source = DecodedFrames(args.size, args.color_mode)
    clips = VideoClipDataset(
        chosen, source, num_frames=args.num_frames, frame_stride=args.frame_stride, seed=0, random_window=False
    )
    reads = [clips[0, i] for i in range(len(clips))]
    for read in reads:
        if read.failures:
            raise ValueError(f"--data_root {root}: could not read {read.failures[0]}")
    start, middle, end = split_clip(torch.stack([read.clip for read in reads]), args.endpoint_context)
    return Contexts(start, end, middle, [video.name for video in chosen])


def refuse_to_overwrite(out_dir: Path, overwrite: bool) -> None:
    """Make the folder, or say why not.

    Raises: ValueError: if something that would be written is there, or the folder cannot be made.
    """
    names = ("sample.json", "sample.mp4", "sample.gif", "sheet.png", "start_context.png", "end_context.png", "frames")
    earlier = [path for name in names for path in (out_dir / name, *out_dir.glob(f"clip_*_sample_*/{name}"))]
    there = [path for path in earlier if path.exists()]
    if there and not overwrite:
        raise ValueError(f"--out_dir {out_dir} already holds {there[0]}; pass --overwrite or choose another folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir}: cannot be made ({error.strerror})") from error


def load_model(args: argparse.Namespace, checkpoint: dict[str, Any], device: torch.device) -> VideoUNet3D:
    """The network with the checkpoint's averaged (or, if asked, raw) weights, ready to sample."""
    model = build_model(checkpoint["model_config"], "meta")
    load_weights(model, checkpoint["model" if args.use_raw_model else "ema"], args.ckpt)
    model = model.to(device).lay_out().eval()
    return model.compile_for_sampling() if args.compile else model


def generate(
    args: argparse.Namespace,
    settings: dict[str, Any],
    checkpoint: dict[str, Any],
    model: VideoUNet3D,
    contexts: Contexts,
    sample: int,
) -> Tensor:
    """The `sample`-th middle of every context, uint8 [B,C,M,H,W] on the CPU."""
    device = next(model.parameters()).device
    diffusion = checkpoint["diffusion_config"]
    schedule = DiffusionSchedule(diffusion["timesteps"], diffusion["schedule"]).to(device)
    generators = [generator_for(args.seed, SAMPLE, clip, sample) for clip in range(len(contexts.start))]
    amp = args.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
    chunks = [slice(i, i + args.batch_size) for i in range(0, len(generators), args.batch_size)]
    title, total = f"sample {sample + 1}/{args.num_samples}", settings["steps"] * len(chunks)
    middles = []
    with (
        tqdm(total=total, desc=title, unit="step", disable=None) as bar,
        torch.autocast(device.type, torch.bfloat16, enabled=amp),
    ):
        for chunk in chunks:
            start, end = (to_float(context[chunk]).to(device) for context in (contexts.start, contexts.end))
            middle = sample_middle(
                model, schedule, start, end, num_middle=args.num_frames - 2 * args.endpoint_context,
                noise_offset=diffusion["noise_offset"], generator=generators[chunk],
                callback=lambda **_: bar.update(), **settings,
            )  # fmt: skip
            middles.append(to_uint8(middle).cpu())
    return torch.cat(middles)


def save_sample(folder: Path, contexts: Contexts, clip: int, middle: Tensor, args: argparse.Namespace) -> None:
    """Write one generated clip in every form, its middle uint8 [C,M,H,W] between the untouched observed frames."""
    start, end = contexts.start[clip], contexts.end[clip]
    whole = join_clip(start[None], middle[None], end[None])[0]  # [C,T,H,W]
    frames = folder / "frames"
    frames.mkdir(parents=True, exist_ok=True)
    for old in frames.glob("[0-9][0-9][0-9].png"):  # with --overwrite: of an earlier, longer sample
        old.unlink()
    for i, frame in enumerate(whole.unbind(1)):
        save_png(frames / f"{i:03d}.png", frame)
    save_mp4(folder / "sample.mp4", whole, args.fps)
    save_gif(folder / "sample.gif", whole, args.fps)
    for name, context in (("start_context", start), ("end_context", end)):
        save_png(folder / f"{name}.png", torch.cat(list(context.unbind(1)), dim=2))  # frames side by side
    truth = [] if contexts.middle is None else [join_clip(start[None], contexts.middle[clip][None], end[None])[0]]
    observed = observed_frames(whole.shape[1], args.endpoint_context)
    save_png(folder / "sheet.png", contact_sheet([*truth, whole], observed))


def score(contexts: Contexts, clip: int, middle: Tensor) -> dict[str, float] | None:
    """PSNR in dB of one generated middle and of the cross-fade; None where the truth is not known."""
    if contexts.middle is None:
        return None
    truth, start, end = (to_float(part[clip : clip + 1]) for part in (contexts.middle, contexts.start, contexts.end))
    faded = cross_fade(start, end, truth.shape[2])
    return {"psnr": psnr(to_float(middle[None]), truth).item(), "psnr_cross_fade": psnr(faded, truth).item()}


def describe(scores: dict[str, float]) -> str:
    """Scores as a reader wants them, the model's beside the baseline's."""
    return f"middle PSNR {scores['psnr']:.2f} dB (cross-fade {scores['psnr_cross_fade']:.2f} dB)"


def sample(args: argparse.Namespace) -> None:
    """From flags to files.

    Raises: ValueError or OSError: for what the user can mend.
    """
    checkpoint = load_checkpoint(args.ckpt)
    settings = settle_with_checkpoint(args, checkpoint)
    nfe = forwards_per_clip(checkpoint["diffusion_config"]["timesteps"], settings)
    device = resolve_device(args.device)
    at_once = min(args.batch_size, 1 if args.start_images else args.num_clips)
    check_memory(
        forward_memory(
            checkpoint["model_config"], at_once * branches(settings),
            args.num_frames - 2 * args.endpoint_context, args.size,
        ),
        device, f"sampling {at_once} clips with --T {args.num_frames} and --size {args.size}", MEMORY_FLAGS,
    )  # fmt: skip
    out_dir = Path(args.out_dir)
    refuse_to_overwrite(out_dir, args.overwrite)
    contexts = load_contexts(args, checkpoint)
    model = load_model(args, checkpoint, device)
    clips = len(contexts.start)

    scores = []
    for n in range(args.num_samples):
        clock = time.perf_counter()
        middles = generate(args, settings, checkpoint, model, contexts, n)
        seconds = (time.perf_counter() - clock) / clips
        for clip in range(clips):
            alone = clips == args.num_samples == 1
            folder = out_dir if alone else out_dir / f"clip_{clip:03d}_sample_{n:03d}"
            save_sample(folder, contexts, clip, middles[clip], args)
            found = score(contexts, clip, middles[clip])
            scores.append(found)
            description = vars(args) | settings | {
                "device": str(device), "checkpoint_step": checkpoint["step"], "source": contexts.sources[clip],
                "clip": clip, "sample": n, "scores": found, "nfe": nfe,
                "seconds": seconds,
            }  # fmt: skip
            save_json(folder / "sample.json", description)
            print(f"{folder}: {describe(found)}" if found else folder)
    if len(scores) > 1 and all(scores):
        mean = {name: sum(entry[name] for entry in scores) / len(scores) for name in scores[0]}
        print(f"mean of {len(scores)}: {describe(mean)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 wrong input."""
    parser = build_parser()
    try:
        with explaining_shortage(MEMORY_FLAGS):
            sample(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
