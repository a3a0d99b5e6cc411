"""Generate the frames between two observed ends: of images, held-out clips, or gaps in a video.

All that the checkpoint knows (network, frame size, colours, noise schedule) is taken from it.
"""

import argparse
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from av import FFmpegError
from torch import Tensor
from tqdm import tqdm

from data.gap_filler import fill_video, upright_size
from data.kinetics_video_dataset import DecodedFrames, read_clip
from data.video_index import central_start, clip_span, held_out_videos, reason_of
from data.video_reader import DECODE_ERRORS, VideoInfo, probe_video
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.sampler import SPACINGS, forwards_per_clip
from models.video_unet3d import check_size
from utils import flags, io
from utils.device import explain_oom
from utils.flags import Parser, nonempty_path, positive_int
from utils.images import load_frames
from utils.video_utils import (
    as_pair,
    cross_fade,
    join_clip,
    middle_length,
    psnr,
    resize,
    split_clip,
    to_float,
    to_gray,
    to_uint8,
)

BATCH_SIZE = 8  # clips per forward
OOM_REMEDY = "--num_clips, --size or --T"
# Of a sample, sample.json last; video.mp4 belongs to --video.
WRITTEN = ("frames", "sample.mp4", "sample.gif", "start_context.png", "end_context.png")
WRITTEN += ("sheet.png", "sample.json", "video.mp4")


def build_parser() -> Parser:
    """Every flag; those that default to None take the checkpoint's value."""
    parser = Parser(__doc__)

    add = parser.add_argument_group("checkpoint and output").add_argument
    add(
        "--ckpt",
        type=nonempty_path,
        required=True,
        help="checkpoint of train_video_ddpm.py: last.pt or best.pt",
    )
    add("--use_raw_model", action="store_true", help="use the weights, not their EMA")
    add("--device", type=flags.device_name, default="auto", help="auto = cuda, else mps, else cpu")
    add("--out_dir", type=nonempty_path, default="outputs/sample", help="folder of what is written")
    add("--overwrite", action="store_true", help="replace an earlier sample in --out_dir")
    add("--fps", type=positive_int, default=8, help="frames per second of sample.mp4 and .gif")

    add = parser.add_argument_group("contexts").add_argument
    add("--start_images", nargs="+", metavar="PNG", help="the K first frames, in time order")
    add("--end_images", nargs="+", metavar="PNG", help="the K last frames, in time order")
    add("--middle_images", nargs="+", metavar="PNG", help="the true frames between, for a score")
    add("--data_root", type=nonempty_path, help="take held-out clips of it; None = of training's")
    add("--num_clips", type=positive_int, default=1, help="held-out clips, evenly chosen")
    add("--video", type=nonempty_path, metavar="VIDEO", help="write it again, with its gaps filled")
    add("--gap", type=frame_range, action="append", help="frames to generate: 12:20 = 12 to 19")
    add("--lossless", action="store_true", help="keep every bit of the video's other frames")

    add = parser.add_argument_group("clip").add_argument
    add("--T", dest="num_frames", type=positive_int, help="frames per clip")
    add("--size", **flags.one_or_two("PIXELS"), help="side of square frames, or height and width")
    add("--endpoint_context", type=positive_int, help="observed frames K; fixed by training")
    add("--color_mode", choices=("rgb", "gray"), help="3 channels or 1; fixed by training")

    group = parser.add_argument_group("sampler")
    add = group.add_argument
    add("--num_samples", type=positive_int, default=1, help="different middles per context")
    flags.add_sampler_flags(group, SPACINGS)
    add("--dynamic_threshold", action="store_true", help="scale x0 by a percentile, not clip it")
    return parser


def frame_range(text: str) -> range:
    """Type of --gap: FIRST:END, where END is the first frame that stays."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        rule = "must be two rising frame numbers, as 12:20"
        raise argparse.ArgumentTypeError(f"{rule} (got {text})")
    return range(int(match[1]), int(match[2]))


class Contexts(NamedTuple):
    """What is observed, uint8 on the CPU, and the true middle [B,C,M,H,W] where it is known."""

    start: Tensor  # [B,C,K,H,W]
    end: Tensor  # [B,C,K,H,W]
    middle: Tensor | None
    sources: list[str]


def check_flags(args: argparse.Namespace) -> None:
    """Raises: ValueError: for flags that do not go together."""
    others = (args.start_images, args.data_root, args.num_frames)
    if (args.start_images is None) != (args.end_images is None):
        raise ValueError("--start_images and --end_images must be given together")
    if args.start_images and (args.data_root or args.num_clips > 1):
        raise ValueError("--start_images must be given without --data_root and --num_clips")
    if args.middle_images and not args.start_images:
        raise ValueError("--middle_images needs --start_images and --end_images")
    if (args.video is None) != (args.gap is None) or (args.lossless and not args.video):
        raise ValueError("--video needs --gap, and --gap and --lossless need --video")
    if args.video and (any(others) or args.num_samples > 1):
        raise ValueError("--video excludes images, --data_root, --T and --num_samples")


def fill_from_checkpoint(args: argparse.Namespace, pipe: MiddleFramePipeline) -> None:
    """Settle the flags that were not given as in training, and check those that were.

    Raises: ValueError: naming the flag, the rule and the value.
    """
    trained = {**pipe.clip_config, "endpoint_context": pipe.endpoint_context}
    for name in ("num_frames", "size", "endpoint_context", "color_mode"):
        given = getattr(args, name)
        if given is None and not (name == "size" and args.video):
            setattr(args, name, trained[name])
        elif name in ("endpoint_context", "color_mode") and given != trained[name]:
            rule = f"--{name} is fixed by {args.ckpt}"
            raise ValueError(f"{rule} (got {given}, trained with {trained[name]})")
    k = args.endpoint_context
    m = middle_length(args.num_frames, k)
    if args.size and pipe.model is not None:
        check_size(args.size, pipe.model.size_multiple)
    for name, count in (("start_images", k), ("end_images", k), ("middle_images", m)):
        paths = getattr(args, name)
        if paths is not None and len(paths) != count:
            raise ValueError(f"--{name} must be {count} images (got {len(paths)})")


def load_contexts(args: argparse.Namespace, pipe: MiddleFramePipeline) -> Contexts:
    """From the images given, or from the central window of held-out clips, split as in training.

    Raises: ValueError: for a missing or unreadable file, or too few clips.
    """
    if args.start_images:
        load = partial(load_frames, size=args.size, color_mode=args.color_mode)
        middle = load(args.middle_images) if args.middle_images else None
        source = " ".join([*args.start_images, *args.end_images])
        return Contexts(load(args.start_images), load(args.end_images), middle, [source])

    stride = pipe.clip_config["frame_stride"]
    span = clip_span(args.num_frames, stride)
    held_out, root = held_out_videos(pipe.trained["args"], pipe.clip_config, args.data_root)
    videos = [video for video in held_out if len(video.frames) >= span]
    if args.num_clips > len(videos):
        rule = f"--num_clips must be at most {len(videos)}, the held-out clips of {root}"
        raise ValueError(f"{rule} with {span} frames or more (got {args.num_clips})")
    chosen = [videos[i * len(videos) // args.num_clips] for i in range(args.num_clips)]
    source = DecodedFrames(args.size, args.color_mode)
    clips = []
    for video in chosen:
        try:
            first = central_start(video, span)
            clips.append(read_clip(source, video, first, args.num_frames, stride))
        except DECODE_ERRORS as error:
            raise ValueError(f"{video.path}: could not be read ({reason_of(error)})") from error
    start, middle, end = split_clip(torch.stack(clips), args.endpoint_context)
    return Contexts(start, end, middle, [video.name for video in chosen])


def find_earlier(out_dir: Path) -> list[Path]:
    """What earlier runs have written to a folder."""
    folders = [out_dir, *out_dir.glob("clip_*_sample_*")]
    return [folder / name for folder in folders for name in WRITTEN if (folder / name).exists()]


def remove_earlier(out_dir: Path, but: str = "") -> None:
    """Delete what `find_earlier` finds, but for one name, so that no two samples mix."""
    for path in find_earlier(out_dir):
        if path.name == "frames":
            for frame in path.glob("[0-9][0-9][0-9]*.png"):
                frame.unlink()
        elif path.name != but:
            path.unlink()
    for folder in out_dir.glob("clip_*_sample_*"):
        for empty in (folder / "frames", folder):
            with contextlib.suppress(OSError):  # it holds something of the user's
                empty.rmdir()


def save_sample(
    folder: Path, contexts: Contexts, clip: int, middle: Tensor, fps: int, facts: dict[str, Any]
) -> dict[str, float] | None:
    """Write one clip in every form: its middle, uint8 [C,M,H,W], between the observed frames.

    Returns: PSNR in dB of the middle and of the cross-fade; None where the truth is unknown.
    """
    start = contexts.start[clip, None]
    end = contexts.end[clip, None]
    middle = middle[None]
    whole = join_clip(start, middle, end)[0]  # [C,T,H,W]
    frames = io.make_out_dir(folder / "frames")
    for i, frame in enumerate(whole.unbind(1)):
        io.save_png(frames / f"{i:03d}.png", frame)
    io.save_mp4(folder / "sample.mp4", whole, fps)
    io.save_gif(folder / "sample.gif", whole, fps)
    # Observed frames beside each other.
    io.save_png(folder / "start_context.png", torch.cat(list(start[0].unbind(1)), dim=2))
    io.save_png(folder / "end_context.png", torch.cat(list(end[0].unbind(1)), dim=2))

    # Score against the truth, where it is known.
    rows = [whole]
    scores = None
    if contexts.middle is not None:
        truth = contexts.middle[clip, None]
        rows.insert(0, join_clip(start, truth, end)[0])
        faded = to_uint8(cross_fade(to_float(start), to_float(end), truth.shape[2]))
        scores = {
            "psnr": psnr(to_float(middle), to_float(truth)).item(),
            "psnr_cross_fade": psnr(to_float(faded), to_float(truth)).item(),
        }
    observed = io.observed_frames(whole.shape[1], start.shape[2])
    io.save_png(folder / "sheet.png", io.contact_sheet(rows, observed))
    about = {"source": contexts.sources[clip], "clip": clip, "scores": scores}
    io.save_json(folder / "sample.json", {**facts, **about})
    return scores


def score_text(scores: dict[str, float]) -> str:
    """Scores in words, the model's beside the baseline's."""
    fade = scores["psnr_cross_fade"]
    return f"middle PSNR {scores['psnr']:.2f} dB (cross-fade {fade:.2f} dB)"


# --- a video with gaps ----------------------------------------------------------------------------


def probe_gaps(args: argparse.Namespace, k: int) -> tuple[VideoInfo, list[range]]:
    """What is in --video, and its gaps in order.

    Raises: ValueError: if the video cannot be read, or a gap lacks frames on either side.
    """
    try:
        info = probe_video(args.video)
    except DECODE_ERRORS as error:
        raise ValueError(f"--video {args.video}: {reason_of(error)}") from error
    if info.damage:
        raise ValueError(f"--video {args.video}: {info.damage}")
    gaps = sorted(args.gap, key=lambda gap: gap.start)
    before = 0
    for gap in gaps:
        if gap.start < before + k or gap.stop + k > info.frames:
            rule = f"--gap must leave {k} frames before it, after it and between two"
            got = f"got {gap.start}:{gap.stop}, {args.video} has {info.frames} frames"
            raise ValueError(f"{rule} ({got})")
        before = gap.stop
    return info, gaps


def working_size(
    height: int, width: int, trained: tuple[int, int], multiple: int
) -> tuple[int, int]:
    """The size at which frames of a video are generated: reduced as clips of training are."""
    scale = min(1.0, max(trained[0] / height, trained[1] / width))
    sides = [max(1, round(side * scale / multiple)) * multiple for side in (height, width)]
    return sides[0], sides[1]


def at_full_size(middle: Tensor, small_ends: Sequence[Tensor], ends: Sequence[Tensor]) -> Tensor:
    """Small middle frames [1,C,M,h,w] at the size of the ends, [1,3,1,H,W]; all in [-1, 1].

    What they change of their cross-fade is enlarged and added to that of the ends, which keeps the
    ends' detail where nothing moves (LOG.md).

    Args:
        small_ends: the nearest observed frames as the network saw them, [1,C,K,h,w].
    """
    fade = cross_fade(*ends, middle.shape[2])
    if middle.shape == fade.shape:
        return middle
    change = middle - cross_fade(*small_ends, middle.shape[2]).to(middle.device)
    return fade + resize(change.cpu(), fade.shape[-2:])


def write_video(
    args: argparse.Namespace, pipe: MiddleFramePipeline, settings: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Write --video with its gaps filled; returns facts for the record."""
    # Settle at which size frames are made.
    info, gaps = probe_gaps(args, pipe.endpoint_context)
    height, width = upright_size(info)
    multiple = pipe.model.size_multiple if pipe.model is not None else 1
    trained = as_pair(pipe.clip_config["size"])
    size = as_pair(args.size) if args.size else working_size(height, width, trained, multiple)
    m = middle_length(pipe.clip_config["num_frames"], pipe.endpoint_context)
    if size != trained or any(len(gap) != m for gap in gaps):
        print(f"note: frames are generated at {size[0]}x{size[1]} pixels; {args.ckpt} was trained")
        print(f"at {trained[0]}x{trained[1]}, {m} frames at once")

    # What the gap filler calls for each gap.
    filled = []

    def as_context(frames: Sequence[Tensor]) -> Tensor:
        pictures = torch.stack([resize(frame, size) for frame in frames])  # [K,3,H,W]
        if args.color_mode == "gray":
            pictures = to_gray(pictures)
        return to_float(pictures.transpose(0, 1)[None])

    def generate(before: Sequence[Tensor], after: Sequence[Tensor], count: int) -> list[Tensor]:
        generator = generator_for(args.seed, SAMPLE, len(filled))
        filled.append(count)
        small_ends = (as_context(before), as_context(after))
        middle = pipe(
            *small_ends,
            num_middle=count,
            generator=[generator],
            dynamic_threshold=args.dynamic_threshold,
            **settings,
        )
        ends = [to_float(frame)[None, :, None] for frame in (before[-1], after[0])]
        frames = to_uint8(at_full_size(middle, small_ends, ends))[0].cpu().unbind(1)
        # A gray video stays gray, whatever colours the model knows.
        if all(torch.equal(frame[:1].expand(3, -1, -1), frame) for frame in (*before, *after)):
            frames = [to_gray(frame).expand(3, -1, -1) for frame in frames]
        return list(frames)

    # Write, and say what was written.
    try:
        with io.atomic_write(path) as file:
            count = fill_video(
                source=args.video,
                target=file,
                gaps=gaps,
                k=pipe.endpoint_context,
                generate=generate,
                lossless=args.lossless,
                progress=partial(tqdm, total=info.frames, unit="frame", disable=None),
            )
    except (FFmpegError, ValueError) as error:
        # What fails where PyAV writes, such as a full disk, stands behind an error of its own.
        cause = error.__context__
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise ValueError(f"--video {args.video}: {reason_of(error)}") from error
    print(f"{path}: {count} frames")
    return {
        "gap": [f"{gap.start}:{gap.stop}" for gap in gaps],
        "frames": count,
        "gaps_filled": len(filled),
        "generated_at": list(size),
    }


# --- the story ------------------------------------------------------------------------------------


def sample(args: argparse.Namespace) -> None:
    """From flags to files; a ValueError or OSError is for the user to mend."""
    # Settle the flags, and what an earlier sample has left.
    check_flags(args)
    pipe = MiddleFramePipeline.from_checkpoint(args.ckpt, args.device, args.use_raw_model)
    fill_from_checkpoint(args, pipe)
    settings = pipe.settings(flags.sampler_settings(args))
    if settings["guidance_scale"] != 1 and not pipe.trained["args"]["cfg_drop_prob"]:
        remedy = "it needs --guidance_scale 1"
        print(f"note: {args.ckpt} has no unconditional branch: {remedy}", file=sys.stderr)
    out_dir = io.make_out_dir(args.out_dir)
    earlier = find_earlier(out_dir)
    if earlier and not args.overwrite:
        remedy = "pass --overwrite or choose another folder"
        raise ValueError(f"--out_dir {out_dir} already holds {earlier[0]}; {remedy}")
    facts = {
        **vars(args),
        **settings,
        "device": str(pipe.device),
        "checkpoint_step": pipe.trained["step"],
    }
    if args.video:
        facts.update(write_video(args, pipe, settings, out_dir / "video.mp4"))
        remove_earlier(out_dir, but="video.mp4")
        io.save_json(out_dir / "sample.json", facts)
        return

    # Draw samples of each clip, a batch of clips at a time.
    contexts = load_contexts(args, pipe)
    count = len(contexts.start)
    facts["nfe"] = forwards_per_clip(pipe.schedule.timesteps, settings)
    scores = []
    for number in range(args.num_samples):
        for first in range(0, count, BATCH_SIZE):
            # Draw this sample of a batch of clips.
            clips = range(first, min(first + BATCH_SIZE, count))
            title = f"sample {number + 1}/{args.num_samples}"
            clock = time.perf_counter()
            with tqdm(total=settings["steps"], desc=title, unit="step", disable=None) as bar:
                middles = pipe(
                    contexts.start[clips.start : clips.stop],
                    contexts.end[clips.start : clips.stop],
                    num_middle=args.num_frames - 2 * args.endpoint_context,
                    generator=[generator_for(args.seed, SAMPLE, clip, number) for clip in clips],
                    callback=lambda bar=bar, **step: bar.update(),
                    dynamic_threshold=args.dynamic_threshold,
                    **settings,
                )
            facts["sample"] = number
            facts["seconds"] = (time.perf_counter() - clock) / len(clips)

            # Write it, clip by clip, in place of what was there.
            if not scores:
                remove_earlier(out_dir)
            for clip, middle in zip(clips, to_uint8(middles).cpu(), strict=True):
                folder = out_dir
                if count > 1 or args.num_samples > 1:
                    folder = out_dir / f"clip_{clip:03d}_sample_{number:03d}"
                entry = save_sample(folder, contexts, clip, middle, args.fps, facts)
                print(f"{folder}: {score_text(entry)}" if entry else folder, flush=True)
                scores.append(entry)
    if len(scores) > 1 and all(scores):
        mean = {name: sum(entry[name] for entry in scores) / len(scores) for name in scores[0]}
        print(f"mean of {len(scores)}: {score_text(mean)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 wrong input, 130 stopped."""
    parser = build_parser()
    with parser.one_line_errors(), explain_oom(OOM_REMEDY):
        sample(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
