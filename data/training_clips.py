"""The clips of a training run: both splits of a folder, loaded in batches, cut to any length."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import (
    DecodedFrames,
    ReadErrors,
    ResumableBatchSampler,
    VideoClipDataset,
    collate,
)
from data.moving_mnist import MovingMNIST, open_moving_mnist
from data.synthetic_videos import make_synthetic_videos
from data.video_index import clip_span, prepare_videos
from utils.flags import MNIST_PREFIX
from utils.io import remove_stale_temporaries
from utils.video_utils import FrameSize


def open_clips(
    *,
    data_root: str | Path | None,
    num_frames: int,
    frame_stride: int,
    size: FrameSize,
    color_mode: str,
    seed: int,
    cache_dir: str | Path,
    cache_videos: bool,
    **split: Any,
) -> tuple[VideoClipDataset, VideoClipDataset] | tuple[MovingMNIST, MovingMNIST]:
    """The training clips, at random windows, and the held-out clips, at their central ones.

    Args:
        data_root: folder of videos, or "smmnist:" and MNIST's folder; None = the built-in clips,
            which are rendered once.
        cache_videos: decode every video once, to disk.
        split: val_ratio, max_videos and log of `prepare_videos`.

    Raises: ValueError: if there are none, or no room for the cache.
    """
    if data_root and str(data_root).startswith(MNIST_PREFIX):
        return open_moving_mnist(data_root, num_frames, frame_stride, size, color_mode, seed)
    # Other machines may write there, whose processes cannot be seen.
    remove_stale_temporaries(Path(cache_dir), untouched=3600)
    threads = os.cpu_count() or 1  # for rendering, indexing and caching
    train_videos, val_videos = prepare_videos(
        data_root or make_synthetic_videos(cache_dir, threads),
        span=clip_span(num_frames, frame_stride),
        seed=seed,
        cache_dir=cache_dir,
        workers=threads,
        **split,
    )
    source = DecodedFrames(size, color_mode)
    if cache_videos:
        videos = train_videos + val_videos
        source = CachedFrames(videos, size, color_mode, cache_dir, threads)
    cut = partial(
        VideoClipDataset,
        source=source,
        num_frames=num_frames,
        frame_stride=frame_stride,
        seed=seed,
    )
    return cut(train_videos, random_window=True), cut(val_videos, random_window=False)


class ClipLoader:
    """Batches of float clips [B,C,T,H,W] in [-1, 1] on the device of a run."""

    def __init__(
        self,
        train_clips: VideoClipDataset,
        val_clips: VideoClipDataset,
        *,
        order: ResumableBatchSampler,  # of the training batches
        held_out: range,  # numbers of the held-out clips that this process validates on
        batch_size: int,  # of held-out clips
        device: torch.device,
        workers: int,  # loading processes per loader; 0 = the main process loads
        worker_init_fn: Callable[[int], None],
        log: Callable[[str], None],  # gets a line for each file that cannot be read
    ):
        self.val_clips = val_clips
        self.held_out = held_out
        self.device = device
        self.errors = ReadErrors(log=log)
        frames = batch_size * train_clips.num_frames
        check_shared_memory(workers, frames * math.prod(train_clips.frame_size))
        load = partial(
            DataLoader,
            pin_memory=device.type == "cuda",
            collate_fn=collate,
            worker_init_fn=worker_init_fn,
        )
        self.train_loader = load(train_clips, batch_sampler=order, num_workers=workers)
        keys = [(0, clip) for clip in held_out]
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]
        # One process more is enough, and lives only while it is needed.
        self.val_loader = load(val_clips, batch_sampler=batches, num_workers=min(1, workers))

    def train(self) -> Iterator[Tensor]:
        """The training batches of this process, in order."""
        return self.errors.load(self.train_loader, self.device)

    def validation(self) -> Iterator[Tensor]:
        """The held-out clips of this process, in order."""
        return self.errors.load(self.val_loader, self.device)

    def read_evenly(self, shown: range, count: int) -> Tensor | None:
        """Held-out clips in one batch, out of `count` that are evenly spread; None of none."""
        total = len(self.val_clips)
        count = min(count, total)
        reads = [self.val_clips[0, number * total // count] for number in shown]
        return next(self.errors.load([collate(reads)], self.device)) if reads else None


def check_shared_memory(workers: int, pixels: int) -> None:
    """Raises: ValueError: if the batches that wait do not fit; loading would wait for ever."""
    folder = Path("/dev/shm")
    if workers and folder.is_dir():
        # Each process has two batches ready.
        needed = 2 * workers * 3 * pixels
        free = shutil.disk_usage(folder).free
        if needed > free:
            got = f"got {free / 2**20:.0f} MiB free in {folder}"
            rule = f"--num_workers {workers} needs {needed / 2**20:.0f} MiB of shared memory"
            raise ValueError(f"{rule} ({got}); --num_workers 0 needs none")


def crop_to_length(clips: Tensor, lengths: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cut clips [B,C,T,H,W] to a length from the shortest to the longest, T, at any place.

    Both are drawn for the whole batch; of equal lengths nothing is drawn.
    """
    shortest, longest = lengths
    if shortest == longest:
        return clips
    length = int(torch.randint(shortest, longest + 1, (), generator=generator))
    first = int(torch.randint(longest - length + 1, (), generator=generator))
    return clips[:, :, first : first + length]
