"""Clips of T frames cut from MP4 files, and the order in which training meets them; any folder of videos serves.

Everything random here is a function of (seed, epoch, clip number): the number of workers, the batch size, a resume or
a crash change no clip.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.video_index import Video, clip_span, printable, reason_of, stable_hash
from data.video_reader import DECODE_ERRORS, read_frames
from utils.video_utils import FrameSize, resize_and_crop, to_float, to_gray

MAX_ATTEMPTS = 8  # files tried for one clip before giving up


class FrameSource(Protocol):
    """Where a dataset's frames come from: the files themselves or a cache of them."""

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """The frames numbered `wanted` as uint8 [C,T,H,W]; raises one of DECODE_ERRORS."""


@dataclass
class DecodedFrames:
    """Frames decoded on demand, resized (if asked for, in linear light) and, for gray, reduced to luma."""

    size: FrameSize
    color_mode: str
    linear_light: bool = False

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """See FrameSource."""
        decoded = read_frames(video.path, wanted, video.info)
        frames = (resize_and_crop(frame, self.size, self.linear_light) for frame in decoded)
        return torch.stack([to_gray(f) if self.color_mode == "gray" else f for f in frames], dim=1)


class ClipRead(NamedTuple):
    """One clip, uint8 [C,T,H,W], and what failed before it was found; no clip if every attempt failed."""

    clip: Tensor | None
    failures: list[str]


@dataclass(eq=False, repr=False)
class VideoClipDataset(Dataset):
    """Clips of T frames from a list of usable videos, one per video and epoch.

    Items are asked for as (epoch, i). A file that fails is replaced by another, chosen by (seed, epoch, i, attempt).
    """

    videos: Sequence[Video]
    source: FrameSource
    _: KW_ONLY
    num_frames: int
    frame_stride: int
    seed: int  # of windows, flips and replacements
    random_window: bool  # a new window every epoch (training) or always the central one (validation)
    hflip: bool = False  # mirror half of the clips left to right
    time_reverse: bool = False  # play half of the clips backwards, which also swaps their contexts

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
            # a hash: to make a generator would take longer than to read a cached clip
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
        clip = self.source.read(video, range(first, first + self.num_frames * self.frame_stride, self.frame_stride))
        if self.hflip and number & 1:
            clip = clip.flip(3)
        if self.time_reverse and number & 2:
            clip = clip.flip(1)
        return clip


@dataclass
class ResumableBatchSampler:
    """Batches of (epoch, i) keys over many epochs, from any optimiser step to any other.

    Each epoch is a fresh permutation by (seed, epoch), cut into whole optimiser steps; what is left over waits for
    another epoch's order. With fewer clips than a step needs, clips repeat within it.
    """

    clips: int
    batch_size: int
    batches_per_step: int
    seed: int
    first_step: int  # counted from the start of training
    last_step: int  # the one after the last
    part: tuple[int, int] = (0, 1)  # which of how many processes asks; their batches together are one large batch

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.batches_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        process, processes = self.part
        large_batch = self.batch_size * processes
        batches_per_epoch = steps_per_epoch(self.clips, large_batch * self.batches_per_step) * self.batches_per_step
        order, ordered_epoch = None, None
        for batch in range(self.first_step * self.batches_per_step, self.last_step * self.batches_per_step):
            epoch, place = divmod(batch, batches_per_epoch)
            if epoch != ordered_epoch:
                permutation = np.random.default_rng([self.seed, epoch]).permutation(self.clips)
                order, ordered_epoch = np.resize(permutation, batches_per_epoch * large_batch), epoch
            start = place * large_batch + process * self.batch_size
            yield [(epoch, int(i)) for i in order[start : start + self.batch_size]]


def steps_per_epoch(clips: int, clips_per_step: int) -> int:
    """Whole optimiser steps in one pass over the clips, at least one."""
    return max(1, clips // clips_per_step)


def collate(reads: Sequence[ClipRead]) -> tuple[Tensor | None, list[str], int]:
    """A batch: clips uint8 [B,C,T,H,W] (None if one could not be had), all failures, and how many reads were tried."""
    clips = [read.clip for read in reads if read.clip is not None]
    failures = [failure for read in reads for failure in read.failures]
    return torch.stack(clips) if len(clips) == len(reads) else None, failures, len(failures) + len(clips)


@dataclass
class ReadFailures:
    """Counts failed reads over a run, names each bad file once, and stops the run when they are too many."""

    limit: float = 0.1  # share of reads that may fail
    patience: int = 100  # reads before the share is judged, so that one bad file at the start does not stop a run
    log: Callable[[str], None] = print
    tried: int = 0
    failed: int = 0
    named: set[str] = field(default_factory=set)

    def clips(self, batches: Iterable, device: torch.device) -> Iterator[Tensor]:
        """Collated batches as float clips [B,C,T,H,W] in [-1, 1] on the device; raises as `check`."""
        for clips, failed, tried in batches:
            yield to_float(self.check(clips, failed, tried).to(device, non_blocking=True))

    def check(self, clips: Tensor | None, failures: Sequence[str], tried: int) -> Tensor:
        """A collated batch's clips; a ValueError if too many of all reads have failed, or a clip was not replaced."""
        self.tried += tried
        self.failed += len(failures)
        for failure in failures:
            if failure not in self.named:
                self.named.add(failure)
                self.log(f"could not read {failure}; another file takes its place ({self.failed} failed reads so far)")
        if clips is None or self.failed > self.limit * max(self.tried, self.patience):
            got = f"{self.failed} of {self.tried}; last: {failures[-1]}"
            raise ValueError(f"at most {self.limit:.0%} of reads may fail (got {got})")
        return clips
