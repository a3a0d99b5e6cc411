"""Clips per second of one loading process, from MP4 files and from cached frames, against a plain PyAV reader.

    python benchmarks/bench_loading.py --data_root /path/to/data_root

The reference opens a fresh decoder per clip with its default threads, converts frames one by one and normalises on the
CPU. --memory_clips also watches the memory of loading processes over so many clips.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks import measure
from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import DecodedFrames, FrameSource, ResumableBatchSampler, VideoClipDataset, collate
from data.synthetic_videos import make_synthetic_videos
from data.video_index import Video, usable_videos
from utils.flags import Parser, non_negative_int, nonempty_path, positive_int
from utils.video_utils import resize_and_crop

BATCH_SIZE = 8
REFERENCE = "reference: fresh decoder, default threads"


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("clips").add_argument
    add("--data_root", type=nonempty_path, help="folder of MP4 files; None = the built-in clips")
    add("--num_videos", type=positive_int, default=200, help="the first so many usable files")
    add("--clips", type=positive_int, default=200, help="clips per timed run")
    add("--size", type=positive_int, default=64, help="height and width in pixels")
    add("--cache_dir", type=nonempty_path, default="outputs/cache", help="folder for the index and the frames")
    memory = "load so many clips at the end and print the memory of the loading processes; 0 = do not"
    add("--memory_clips", type=non_negative_int, default=0, help=memory)
    add("--num_workers", type=positive_int, default=4, help="loading processes of --memory_clips")
    measure.add_common_flags(parser, rounds=7)
    return parser


def read_as_original(video: Video, wanted: Sequence[int], size: int) -> Tensor:
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


def loader(videos: list[Video], source: FrameSource, batches: int, num_workers: int = 0) -> DataLoader:
    """Batches of random windows, as training loads them."""
    clips = VideoClipDataset(videos, source, num_frames=8, frame_stride=1, seed=0, random_window=True)
    order = ResumableBatchSampler(len(clips), BATCH_SIZE, batches_per_step=1, seed=0, first_step=0, last_step=batches)
    return DataLoader(clips, batch_sampler=order, num_workers=num_workers, collate_fn=collate)


def load_all(videos: list[Video], source: FrameSource, batches: int) -> None:
    """Load so many batches and keep none."""
    for clips, failures, _ in loader(videos, source, batches):
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
            loaded, resident = number * BATCH_SIZE, sum(measure.resident_mib("VmRSS", process) for process in processes)
            points.append((loaded, resident))
            print(f"{loaded} clips: {resident:.1f} MiB resident in {num_workers} loading processes", flush=True)
    return points


def benchmark(args: argparse.Namespace) -> None:
    """From flags to the table; the dataset around the frames is the same for all three ways of reading them."""
    if not args.threads:
        torch.set_num_threads(1)  # as in a loading process
    root = args.data_root or make_synthetic_videos(args.cache_dir)
    videos = usable_videos(root, 8, args.cache_dir, args.num_videos)
    files = DecodedFrames(args.size, "rgb")
    cache = CachedFrames(videos, args.size, "rgb", args.cache_dir, os.cpu_count() or 1)
    original = SimpleNamespace(read=partial(read_as_original, size=args.size))
    sources = {REFERENCE: original, "MP4 files": files, "--cache_videos": cache}
    batches = max(1, args.clips // BATCH_SIZE)
    variants = {name: partial(load_all, videos, source, batches) for name, source in sources.items()}
    device = torch.device("cpu")
    rows = measure.compare(measure.interleave(variants, batches * BATCH_SIZE, args.rounds, device), REFERENCE)
    measure.print_rows(f"{len(videos)} files of {root}, clips of 8 frames, one process, PyAV {av.__version__}", rows)
    results = {"rows": rows, "files": len(videos), "data_root": str(root)}
    if args.memory_clips:
        print()
        results["memory"] = memory = watch_memory(videos, files, args.memory_clips, args.num_workers)
        growth = np.polyfit(*zip(*memory, strict=True), 1)[0] * 1000 if len(memory) > 1 else float("nan")
        print(f"{growth:+.3f} MiB per 1,000 clips")
    measure.save_results(args.out_dir, "loading", device, results)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return measure.run_benchmark(build_parser(), benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
