"""Clips of T frames cut from MP4 files, and the order in which training meets them; any folder of videos serves.

Everything random here is a function of (seed, epoch, clip number): the number of workers, the batch size, a resume or
a crash change no clip.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.video_index import Video, clip_span, printable, reason_of, stable_hash
from data.video_reader import DECODE_ERRORS, read_frames
from utils.video_utils import resize_and_crop, to_float, to_gray

MAX_ATTEMPTS = 8  # files tried for one clip before giving up


class FrameSource(Protocol):
    """Where a dataset's frames come from: the files themselves or a cache of them."""

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """The frames numbered `wanted` as uint8 [C,T,size,size]; raises one of DECODE_ERRORS."""


class DecodedFrames:
    """Frames decoded on demand, resized and, for gray, reduced to luma."""

    def __init__(self, size: int, color_mode: str):
        self.size = size
        self.color_mode = color_mode

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """See FrameSource."""
        frames = (resize_and_crop(frame, self.size) for frame in read_frames(video.path, wanted, video.info))
        return torch.stack([to_gray(f) if self.color_mode == "gray" else f for f in frames], dim=1)


class ClipRead(NamedTuple):
    """One clip, uint8 [C,T,size,size], and what failed before it was found; no clip if every attempt failed."""

    clip: Tensor | None
    failures: list[str]


class VideoClipDataset(Dataset):
    """Clips of T frames from a list of videos, one per video and epoch.

    Items are asked for as (epoch, i). A file that fails is replaced by another, chosen by (seed, epoch, i, attempt).

    Args:
        videos: usable files.
        seed: of windows, flips and replacements.
        random_window: a new window every epoch (training) or always the central one (validation).
        hflip: mirror half of the clips left to right.
        time_reverse: play half of the clips backwards, which also swaps their contexts.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        source: FrameSource,
        *,
        num_frames: int,
        frame_stride: int,
        seed: int,
        random_window: bool,
        hflip: bool = False,
        time_reverse: bool = False,
    ):
        self.videos = list(videos)
        self.source = source
        self.num_frames = num_frames
        self.frame_stride = frame_stride
        self.seed = seed
        self.random_window = random_window
        self.hflip = hflip
        self.time_reverse = time_reverse

    def __len__(self) -> int:
        return len(self.videos)

    def fingerprint(self) -> str:
        """A short hash of the files' names and lengths."""
        named = [(video.name, video.info.frames) for video in self.videos]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def __getitem__(self, key: tuple[int, int]) -> ClipRead:
        epoch, i = key
        failures = []
        for attempt in range(MAX_ATTEMPTS):
            # a hash, as making a generator would take longer than reading a cached clip
            number = stable_hash(f"{self.seed},{epoch},{i},{attempt}".encode())
            video = self.videos[i if attempt == 0 else stable_hash(f"file {number}".encode()) % len(self.videos)]
            try:
                return ClipRead(self._cut(video, number), failures)
            except DECODE_ERRORS as error:
                failures.append(f"{printable(video.name)} ({reason_of(error)})")
        return ClipRead(None, failures)

    def _cut(self, video: Video, number: int) -> Tensor:
        slack = video.info.frames - clip_span(self.num_frames, self.frame_stride)
        first = (number >> 2) % (slack + 1) if self.random_window else slack // 2
        wanted = range(first, first + self.num_frames * self.frame_stride, self.frame_stride)
        clip = self.source.read(video, wanted)
        if self.hflip and number & 1:
            clip = clip.flip(3)
        if self.time_reverse and number & 2:
            clip = clip.flip(1)
        return clip


class ResumableBatchSampler:
    """Batches of (epoch, i) keys over many epochs, from any batch to any other.

    Each epoch is a fresh permutation by (seed, epoch), cut into whole optimiser steps; what is left over waits for
    another epoch's order. With fewer clips than a step needs, clips repeat within it.

    Args:
        clips: in the dataset.
        batches_per_step: batches per optimiser step.
        first_step: of the first batch, counted from the start of training.
        last_step: the one after the last.
        part: which of several processes asks, and how many there are: their batches together are one large batch.
    """

    def __init__(
        self,
        clips: int,
        batch_size: int,
        batches_per_step: int,
        seed: int,
        first_step: int,
        last_step: int,
        part: tuple[int, int] = (0, 1),
    ):
        self.clips = clips
        self.batch_size = batch_size
        self.number, self.parts = part
        self.batches_per_epoch = steps_per_epoch(clips, batch_size * self.parts * batches_per_step) * batches_per_step
        self.seed = seed
        self.first, self.last = first_step * batches_per_step, last_step * batches_per_step

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, ordered_epoch = None, None
        for number in range(self.first, self.last):
            epoch, place = divmod(number, self.batches_per_epoch)
            if epoch != ordered_epoch:
                permutation = np.random.default_rng([self.seed, epoch]).permutation(self.clips)
                whole = self.batches_per_epoch * self.parts * self.batch_size
                order, ordered_epoch = np.resize(permutation, whole), epoch
            start = (place * self.parts + self.number) * self.batch_size
            chosen = order[start : start + self.batch_size]
            yield [(epoch, int(i)) for i in chosen]


def steps_per_epoch(clips: int, clips_per_step: int) -> int:
    """Whole optimiser steps in one pass over the clips, at least one."""
    return max(1, clips // clips_per_step)


def collate(reads: Sequence[ClipRead]) -> tuple[Tensor | None, list[str], int]:
    """A batch: clips uint8 [B,C,T,H,W] (None if one could not be had), all failures, and how many reads were tried."""
    failures = [failure for read in reads for failure in read.failures]
    tried = len(failures) + sum(read.clip is not None for read in reads)
    whole = all(read.clip is not None for read in reads)
    return torch.stack([read.clip for read in reads]) if whole else None, failures, tried


class ReadFailures:
    """Counts failed reads over a run, names each bad file once, and stops the run when they are too many.

    Args:
        limit: share of reads that may fail.
        patience: reads before the share is judged, so that one bad file at the start does not stop a run.
    """

    def __init__(self, limit: float = 0.1, patience: int = 100, log: Callable[[str], None] = print):
        self.limit = limit
        self.patience = patience
        self.log = log
        self.tried = 0
        self.failed = 0
        self.named: set[str] = set()

    def clips(self, batches: Iterable, device: torch.device) -> Iterator[Tensor]:
        """Collated batches as float clips [B,C,T,H,W] in [-1, 1] on the device; raises as `check`."""
        for clips, failed, tried in batches:
            yield to_float(self.check(clips, failed, tried).to(device, non_blocking=True))

    def check(self, clips: Tensor | None, failures: Sequence[str], tried: int) -> Tensor:
        """Take note of a collated batch and return its clips.

        Raises: ValueError: if more than `limit` of all reads have failed, or a clip could not be replaced.
        """
        self.tried += tried
        self.failed += len(failures)
        for failure in failures:
            if failure not in self.named:
                self.named.add(failure)
                self.log(f"could not read {failure}; another file takes its place ({self.failed} failed reads so far)")
        too_many = self.failed > self.limit * max(self.tried, self.patience)
        if clips is None or too_many:
            raise ValueError(
                f"at most {self.limit:.0%} of reads may fail (got {self.failed} of {self.tried}; last: {failures[-1]})"
            )
        return clips
