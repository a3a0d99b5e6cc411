"""Generate the frames between two observed ends: from images, held-out clips of a dataset, or a video with gaps.

Everything that the checkpoint knows (network, frame size, colours, noise schedule) is taken from it.
"""

import argparse
import re
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from av import FFmpegError
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import DecodedFrames, VideoClipDataset
from data.video_index import clip_span, data_as_trained, reason_of, split_as_trained
from data.video_reader import DECODE_ERRORS, probe_video
from data.video_rewriter import Frame, fill_gaps, insert_frames, rewrite_video, upright_size
from diffusion.hierarchy import describe_plan
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline, add_sampler_flags, forwards_per_clip, load_frames
from utils import distributed, flags
from utils.device import explain_oom, resolve_device
from utils.distributed import is_main, print0
from utils.flags import Parser, nonempty_path, positive_int
from utils.io import atomic_write, contact_sheet, observed_frames, save_gif, save_json, save_mp4, save_png
from utils.video_utils import (
    as_pair,
    clip_times,
    cross_fade,
    join_clip,
    psnr,
    resize,
    split_clip,
    to_float,
    to_gray,
    to_uint8,
)

OOM_REMEDY = "--batch_size, --size or --T"
WORKING_PIXELS = 256 * 256  # frames of larger videos are made at about so many and enlarged
WRITTEN = ("sample.json", "sample.mp4", "sample.gif", "sheet.png", "start_context.png", "end_context.png", "frames")
WRITTEN += ("video.mp4",)


def build_parser() -> Parser:
    """Every flag; those that default to None take the checkpoint's value."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("checkpoint and output")
    flags.add_checkpoint_flags(group, required=True)
    add = group.add_argument
    add("--out_dir", type=nonempty_path, default="outputs/sample", help="folder for everything written")
    add("--overwrite", action="store_true", help="replace an earlier sample in --out_dir")
    add("--fps", type=positive_int, default=8, help="frames per second of sample.mp4 and sample.gif")

    add = parser.add_argument_group("contexts").add_argument
    add("--start_images", nargs="+", metavar="PNG", help="the K first frames in time order; with --end_images")
    add("--end_images", nargs="+", metavar="PNG", help="the K last frames in time order")
    add("--middle_images", nargs="+", metavar="PNG", help="the frames between, where known, to score the sample by")
    add("--data_root", type=nonempty_path, help="without images: use held-out clips of it; None = those of training")
    add("--num_clips", type=positive_int, default=1, help="held-out clips, evenly chosen")
    video = "a video to write again, as video.mp4, with --gap or --insert; its sound is copied"
    add("--video", type=nonempty_path, metavar="MP4", help=video)
    gap = "frames to make anew, as 12:20 for the eight from number 12 on; may be given several times"
    add("--gap", type=frame_range, action="append", metavar="FIRST:END", help=gap)
    add("--insert", type=flags.integer_up_to(255), metavar="N", help="new frames between all neighbours of --video")
    add("--lossless", action="store_true", help="keep every bit of the frames of --video that are not made anew")
    add("--cache_dir", type=nonempty_path, help="folder for the file index and built-in clips; None = as in training")
    flags.add_clip_flags(parser.add_argument_group("clip"))

    group = parser.add_argument_group("sampler")
    group.add_argument("--num_samples", type=positive_int, default=1, help="different middles for each context")
    add_sampler_flags(group)
    return parser


def frame_range(text: str) -> range:
    """Type of --gap: FIRST:END, of which END is the first frame that stays."""
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"must be two rising frame numbers, as 12:20 (got {text})")
    return range(int(match[1]), int(match[2]))


class Contexts(NamedTuple):
    """What is observed, uint8 on the CPU: contexts [B,C,K,H,W], and the true middle [B,C,M,H,W] where it is known."""

    start: Tensor
    end: Tensor
    middle: Tensor | None
    sources: list[str]


class Job(NamedTuple):
    """Clips that are made in one batch, and which of their samples."""

    sample: int
    clips: range


def resolve_args(args: argparse.Namespace) -> tuple[MiddleFramePipeline, dict[str, Any]]:
    """Load the checkpoint, fill the flags that were not given from it, and check them all.

    Returns: the pipeline, and the settings of the sampling loop.
    Raises: ValueError: naming the flag, the rule and the value.
    """
    if (args.start_images is None) != (args.end_images is None):
        raise ValueError("--start_images and --end_images must be given together")
    if args.start_images and (args.data_root or args.num_clips > 1):
        raise ValueError("--start_images must be given without --data_root and --num_clips")
    if args.middle_images and not args.start_images:
        raise ValueError("--middle_images needs --start_images and --end_images")
    if (args.video is None) != (args.gap is None and args.insert is None) or (args.gap and args.insert):
        raise ValueError("--video must be given with one of --gap and --insert, and these with it")
    alone = ("start_images", "data_root", "num_frames", "frame_stride")
    if args.video and (any(getattr(args, name) for name in alone) or args.num_samples > 1):
        raise ValueError("--video must be given without images, --data_root, --T, --frame_stride and --num_samples")
    if args.video and distributed.world_size() > 1:
        raise ValueError("--video is written by one process: start it without torchrun")
    if args.lossless and not args.video:
        raise ValueError("--lossless needs --video")
    keep_size = args.size is None
    device = distributed.init_distributed(resolve_device(args.device))
    pipe = MiddleFramePipeline.from_checkpoint(
        args.ckpt, str(device), use_raw_model=args.use_raw_model, amp=args.amp, compile=args.compile
    )
    (settings,) = pipe.resolve_flags(args)
    k = pipe.endpoint_context
    observed, between = (k, "the checkpoint's endpoint_context"), (args.num_frames - 2 * k, "those between the ends")
    args.size = None if args.video and keep_size else args.size  # that of the video
    if args.insert and k > 1 and not isinstance(pipe.trained["args"].get("frame_stride"), list):
        rule = "--insert needs a model of --endpoint_context 1, or one that was trained on a range of --frame_stride"
        raise ValueError(f"{rule} (got {args.ckpt})")
    for flag, (count, why) in {"start_images": observed, "end_images": observed, "middle_images": between}.items():
        paths = getattr(args, flag)
        if paths is not None and len(paths) != count:
            raise ValueError(f"--{flag} must be {count} images, {why} (got {len(paths)})")
    return pipe, settings


def load_contexts(args: argparse.Namespace, trained: dict[str, Any]) -> Contexts:
    """From the images given, or from the middle window of held-out clips, split as in training.

    Raises: ValueError: for a missing or unreadable file, or too few clips.
    """
    if args.start_images:
        groups = (args.start_images, args.end_images, args.middle_images)
        start, end, middle = (load_frames(paths, args.size, args.color_mode) if paths else None for paths in groups)
        return Contexts(start, end, middle, [" ".join([*args.start_images, *args.end_images])])

    root, cache_dir = data_as_trained(trained["args"], args.data_root, args.cache_dir)
    _, held_out = split_as_trained(trained["args"], trained["clip_config"], root, cache_dir)
    span = clip_span(args.num_frames, args.frame_stride)
    videos = [video for video in held_out if video.info.frames >= span]
    if args.num_clips > len(videos):
        there = f"the {len(videos)} held-out clips of {root} with {span} frames or more"
        raise ValueError(f"--num_clips must be at most {there} (got {args.num_clips})")
    chosen = [videos[i * len(videos) // args.num_clips] for i in range(args.num_clips)]
    window = {"num_frames": args.num_frames, "frame_stride": args.frame_stride, "seed": 0, "random_window": False}
    clips = VideoClipDataset(chosen, DecodedFrames(args.size, args.color_mode), **window)
    reads = [clips[0, i] for i in range(len(clips))]
    failures = [failure for read in reads for failure in read.failures]
    if failures:
        raise ValueError(f"--data_root {root}: could not read {failures[0]}")
    start, middle, end = split_clip(torch.stack([read.clip for read in reads]), args.endpoint_context)
    return Contexts(start, end, middle, [video.name for video in chosen])


def refuse_to_overwrite(out_dir: Path, overwrite: bool) -> None:
    """Make the folder, or say why not.

    Raises: ValueError: if something that would be written is there, or the folder cannot be made.
    """
    earlier = [path for name in WRITTEN for path in (out_dir / name, *out_dir.glob(f"clip_*_sample_*/{name}"))]
    there = [path for path in earlier if path.exists()]
    if there and not overwrite:
        raise ValueError(f"--out_dir {out_dir} already holds {there[0]}; pass --overwrite or choose another folder")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir}: cannot be made ({error.strerror})") from error


def generate(
    args: argparse.Namespace, pipe: MiddleFramePipeline, settings: dict[str, Any], contexts: Contexts, job: Job
) -> Tensor:
    """The middles of a job's clips, uint8 [B,C,M,H,W] on the CPU."""
    title, steps = f"sample {job.sample + 1}/{args.num_samples}", settings["steps"]
    num_middle = args.num_frames - 2 * args.endpoint_context
    if args.hierarchy:
        steps *= sum(map(len, pipe.plan(num_middle)))
    with tqdm(total=steps, desc=title, unit="step", disable=None if is_main() else True) as bar:
        generators = [generator_for(args.seed, SAMPLE, clip, job.sample) for clip in job.clips]
        draw = {"num_middle": num_middle, "generator": generators, "callback": lambda **_: bar.update()}
        draw |= {"times": clip_times(args.num_frames, args.frame_stride), "hierarchy": args.hierarchy}
        ends = (end[job.clips.start : job.clips.stop] for end in (contexts.start, contexts.end))
        return to_uint8(pipe(*ends, **draw, **settings)).cpu()


def save_sample(
    folder: Path, contexts: Contexts, clip: int, middle: Tensor, fps: int, facts: dict[str, Any]
) -> dict[str, float] | None:
    """Write one generated clip in every form, its middle uint8 [C,M,H,W] between the untouched observed frames.

    Returns: PSNR in dB of the middle and of the cross-fade, which sample.json has too; None where the truth is unknown.
    """
    start, end = contexts.start[clip], contexts.end[clip]
    whole = join_clip(start[None], middle[None], end[None])[0]  # [C,T,H,W]
    frames = folder / "frames"
    frames.mkdir(parents=True, exist_ok=True)
    for old in frames.glob("[0-9][0-9][0-9]*.png"):  # with --overwrite: of an earlier, longer sample
        old.unlink()
    for i, frame in enumerate(whole.unbind(1)):
        save_png(frames / f"{i:03d}.png", frame)
    save_mp4(folder / "sample.mp4", whole, fps)
    save_gif(folder / "sample.gif", whole, fps)
    for name, context in (("start_context", start), ("end_context", end)):
        save_png(folder / f"{name}.png", torch.cat(list(context.unbind(1)), dim=2))  # frames side by side
    rows, scores = [whole], None
    if contexts.middle is not None:
        truth = contexts.middle[clip]
        rows.insert(0, join_clip(start[None], truth[None], end[None])[0])
        faded = cross_fade(to_float(start[None]), to_float(end[None]), truth.shape[1])
        scores = {"psnr": middle, "psnr_cross_fade": to_uint8(faded[0])}
        scores = {name: psnr(to_float(m[None]), to_float(truth[None])).item() for name, m in scores.items()}
    save_png(folder / "sheet.png", contact_sheet(rows, observed_frames(whole.shape[1], start.shape[1])))
    about = {"source": contexts.sources[clip], "clip": clip, "scores": scores}
    save_json(folder / "sample.json", facts | about)
    return scores


def working_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """The size at which frames of a video are made: its own, or what the network takes of at most WORKING_PIXELS."""
    scale = min(1.0, (WORKING_PIXELS / (height * width)) ** 0.5)
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))


def write_video(
    args: argparse.Namespace, pipe: MiddleFramePipeline, settings: dict[str, Any], path: Path
) -> dict[str, Any]:
    """Write --video with its gaps filled, or with frames inserted; returns facts for the record.

    Raises: ValueError: if the video cannot be read, or a gap lacks frames on either side.
    """
    try:
        info = probe_video(args.video)
    except DECODE_ERRORS as error:
        raise ValueError(f"--video {args.video}: {reason_of(error)}") from error
    if info.damage:
        raise ValueError(f"--video {args.video}: {info.damage}")
    k, gaps = pipe.endpoint_context, sorted(args.gap or [], key=lambda gap: gap.start)
    for gap, before in zip(gaps, [0, *(gap.stop for gap in gaps)], strict=False):
        if gap.start < before + k or gap.stop + k > info.frames:
            rule = f"--gap must leave {k} frames before it, after it and between two (the video has {info.frames})"
            raise ValueError(f"{rule} (got {gap.start}:{gap.stop})")
    if args.hierarchy:
        pipe.plan(1)  # refuses a model that cannot, before a frame is read
    height, width = upright_size(info)
    size = as_pair(args.size) if args.size else working_size(height, width, pipe.model.size_multiple)
    if size != (height, width):
        print(f"new frames are made at {size[0]}x{size[1]} and resized to {height}x{width}; --size chooses")
    stride = args.insert + 1 if args.insert else 1
    made = 0

    def make(before: Sequence[Tensor], after: Sequence[Tensor], count: int) -> list[Tensor]:
        nonlocal made
        ends = [torch.stack([resize(frame, size) for frame in side], dim=1)[None] for side in (before, after)]
        ends = [to_gray(end.transpose(1, 2)).transpose(1, 2) if args.color_mode == "gray" else end for end in ends]
        steps = [stride] * (k - 1) + [1] * (count + 1) + [stride] * (k - 1)
        draw = {"num_middle": count, "times": [0, *accumulate(steps)], "hierarchy": args.hierarchy}
        middle = pipe(*ends, generator=[generator_for(args.seed, SAMPLE, made)], **draw, **settings)
        made += 1
        frames = to_uint8(middle)[0].cpu().expand(3, -1, -1, -1).unbind(1)
        return [resize(frame, (height, width)) for frame in frames]

    def change(frames: Iterator[Frame]) -> Iterator[Frame]:
        frames = tqdm(frames, total=info.frames, unit="frame", disable=None)
        return insert_frames(frames, args.insert, k, make) if args.insert else fill_gaps(frames, gaps, k, make)

    try:
        with atomic_write(path) as file:
            count = rewrite_video(args.video, file, info, change, stride, args.lossless)
    except FFmpegError as error:
        raise ValueError(f"--video {args.video}: {reason_of(error)}") from error
    print(f"{path}: {count} frames")
    return {"frames": count, "made": made, "made_at": list(size)}


def score_text(scores: dict[str, float]) -> str:
    """Scores as a reader wants them, the model's beside the baseline's."""
    return f"middle PSNR {scores['psnr']:.2f} dB (cross-fade {scores['psnr_cross_fade']:.2f} dB)"


def sample(args: argparse.Namespace) -> None:
    """From flags to files; a ValueError or OSError is for the user to mend."""
    pipe, settings = resolve_args(args)
    facts = vars(args) | settings | {"device": str(pipe.device), "checkpoint_step": pipe.trained["step"]}
    out_dir = Path(args.out_dir)
    if is_main():
        refuse_to_overwrite(out_dir, args.overwrite)
    if args.video:
        facts |= write_video(args, pipe, settings, out_dir / "video.mp4")
        save_json(out_dir / "sample.json", facts | {"gap": [f"{gap.start}:{gap.stop}" for gap in args.gap or []]})
        return
    facts["nfe"] = forwards_per_clip(pipe.schedule.timesteps, settings)
    if args.hierarchy:
        levels = pipe.plan(args.num_frames - 2 * args.endpoint_context)
        facts["nfe"] *= sum(map(len, levels))
        print0(describe_plan(levels))
    contexts = distributed.main_process_first(partial(load_contexts, args, pipe.trained))
    count = len(contexts.start)
    batches = [range(i, min(i + args.batch_size, count)) for i in range(0, count, args.batch_size)]

    def make(job: Job) -> list[tuple[str, dict[str, float] | None]]:
        clock = time.perf_counter()
        middles = generate(args, pipe, settings, contexts, job)
        about = facts | {"sample": job.sample, "seconds": (time.perf_counter() - clock) / len(job.clips)}
        made = []
        for clip, middle in zip(job.clips, middles, strict=True):
            alone = count == args.num_samples == 1
            folder = out_dir if alone else out_dir / f"clip_{clip:03d}_sample_{job.sample:03d}"
            made.append((str(folder), save_sample(folder, contexts, clip, middle, args.fps, about)))
        return made

    scores = []
    jobs = [Job(n, clips) for n in range(args.num_samples) for clips in batches]
    for made in distributed.in_turns(jobs, make):
        for folder, entry in made:
            scores.append(entry)
            print(f"{folder}: {score_text(entry)}" if entry else folder, flush=True)
    if len(scores) > 1 and all(scores):
        mean = {name: sum(entry[name] for entry in scores) / len(scores) for name in scores[0]}
        print(f"mean of {len(scores)}: {score_text(mean)}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 lost another process, 2 wrong input, 130 stopped."""
    parser = build_parser()
    with parser.one_line_end(), distributed.watch_peers("--overwrite begins anew"), explain_oom(OOM_REMEDY):
        sample(parser.parse_args(argv))
        distributed.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
