"""Clips per second of one loading process, from MP4 files and from cached frames, against a plain PyAV reader.

    python benchmarks/bench_loading.py --data_root /path/to/data_root

The reference opens a fresh decoder per clip with its default threads, converts frames one by one and normalises on the
CPU. --memory_clips also watches the memory of loading processes over so many clips.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.measure import Variant, add_common_flags, compare, interleave, print_rows, resident_mib, save_findings
from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import (
    ClipBatches,
    DecodedFrames,
    FrameSource,
    Video,
    VideoClipDataset,
    collate,
    usable_videos,
)
from data.synthetic_videos import make_synthetic_videos
from utils.flags import Parser, non_negative_int, nonempty_path, positive_int
from utils.io import save_mp4
from utils.video_utils import resize_and_crop

BATCH_SIZE = 8
REFERENCE = "reference: fresh decoder, default threads"


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("clips")
    group.add_argument("--data_root", type=nonempty_path, help="folder of MP4 files; None = the built-in clips")
    group.add_argument("--num_videos", type=positive_int, default=200, help="the first so many usable files")
    group.add_argument("--clips", type=positive_int, default=200, help="clips per timed run")
    group.add_argument("--size", type=positive_int, default=64, help="height and width in pixels")
    group.add_argument("--cache_dir", type=nonempty_path, default="outputs/cache", help="for the index and the frames")
    group.add_argument(
        "--memory_clips", type=non_negative_int, default=0,
        help="afterwards load so many clips with --num_workers processes and print their memory; 0 = do not",
    )  # fmt: skip
    group.add_argument("--num_workers", type=positive_int, default=4, help="processes of --memory_clips")
    add_common_flags(parser, rounds=7)
    return parser


def read_as_original(video: Video, wanted: list[int], size: int) -> Tensor:
    """The frames numbered `wanted` as PyAV gives them when nothing is set: float32 [3,T,size,size] in [-1, 1]."""
    frames = []
    with av.open(video.path) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
            if len(frames) == len(wanted):
                break
    clip = resize_and_crop(torch.stack(frames).permute(0, 3, 1, 2), size)  # [T,3,size,size]
    return clip.transpose(0, 1).float() / 127.5 - 1


class FloatFrames:
    """A FrameSource that reads as the reference does; the dataset around it then costs the same for all."""

    def __init__(self, size: int):
        self.size = size

    def read(self, video: Video, wanted: list[int]) -> Tensor:
        """Float frames where the other sources give uint8."""
        return read_as_original(video, list(wanted), self.size)


def loader(videos: list[Video], source: FrameSource, batches: int, num_workers: int = 0) -> DataLoader:
    """Batches of random windows, as training loads them."""
    clips = VideoClipDataset(videos, source, num_frames=8, frame_stride=1, seed=0, random_window=True)
    order = ClipBatches(len(clips), BATCH_SIZE, batches_per_step=1, seed=0, first=0, last=batches)
    return DataLoader(clips, batch_sampler=order, num_workers=num_workers, collate_fn=collate)


def drain(batches: DataLoader) -> None:
    """Load everything and keep nothing."""
    for clips, failures, _ in batches:
        if clips is None:
            raise ValueError(f"--data_root: could not read {failures[-1]}")


def watch_memory(videos: list[Video], source: FrameSource, clips: int, num_workers: int) -> list[tuple[int, float]]:
    """(clips loaded, resident MiB of all loading processes) at ten points of one long run over one loader."""
    batches = max(1, clips // BATCH_SIZE)
    iterator = iter(loader(videos, source, batches, num_workers))
    processes = [worker.pid for worker in iterator._workers]
    points = []
    for number in range(1, batches + 1):
        next(iterator)
        if number % max(1, batches // 10) == 0:
            points.append((number * BATCH_SIZE, sum(resident_mib("VmRSS", process) for process in processes)))
            print(
                f"{points[-1][0]} clips: {points[-1][1]:.1f} MiB resident in {num_workers} loading processes",
                flush=True,
            )
    return points


def sources(videos: list[Video], size: int, cache_dir: str) -> Iterator[tuple[str, FrameSource]]:
    """The three ways of reading frames, by name."""
    yield REFERENCE, FloatFrames(size)
    yield "MP4 files", DecodedFrames(size, "rgb")
    yield "--cache_videos", CachedFrames(videos, size, "rgb", cache_dir, os.cpu_count() or 1)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        torch.set_num_threads(args.threads or 1)  # as in a loading process
        root = args.data_root or make_synthetic_videos(args.cache_dir, save_mp4)
        videos = usable_videos(root, 8, args.cache_dir, args.num_videos)
        batches = max(1, args.clips // BATCH_SIZE)
        ways = dict(sources(videos, args.size, args.cache_dir))
        variants = [
            Variant(name, lambda source=source: drain(loader(videos, source, batches)), batches * BATCH_SIZE)
            for name, source in ways.items()
        ]
        device = torch.device("cpu")
        rows = compare(interleave(variants, args.rounds, device), REFERENCE)
        print_rows(f"{len(videos)} files of {root}, clips of 8 frames, one process, PyAV {av.__version__}", rows)
        findings = {"rows": rows, "files": len(videos), "data_root": str(root)}
        if args.memory_clips:
            print()
            memory = watch_memory(videos, ways["MP4 files"], args.memory_clips, args.num_workers)
            findings["memory"] = memory
            growth = np.polyfit(*zip(*memory, strict=True), 1)[0] * 1000 if len(memory) > 1 else float("nan")
            print(f"{growth:+.3f} MiB per 1,000 clips")
        save_findings(args.out_dir, "loading", device, findings)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
