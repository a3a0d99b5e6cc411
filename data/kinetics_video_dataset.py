"""Clips of T frames cut from videos, and the order in which training meets them.

All that is random here is a function of (seed, epoch, clip number): the number
of workers, the batch size, a resume or a crash change no clip.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.video_index import Video, central_start, clip_span, printable, reason_of, stable_hash
from data.video_reader import DECODE_ERRORS, read_frames
from utils.video_utils import FrameSize, as_pair, resize_and_crop, to_float, to_gray

MAX_ATTEMPTS = 8  # files tried for one clip
# Seconds of the first pause after a file system failed; each is twice the one before, two minutes
# in all.
FIRST_PAUSE = 1.0
MAX_FAILED = 0.1  # share of all reads


@dataclass
class DecodedFrames:
    """A source of frames that are decoded on demand, resized and reduced to gray.

    Another source is CachedFrames, which has the same `read`.
    """

    size: FrameSize
    color_mode: str  # "rgb" or "gray"

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """Frames by rising numbers, uint8 [C,T,H,W]; raises DECODE_ERRORS."""
        frames = []
        for decoded in read_frames(video.path, wanted, video.info):
            frame = resize_and_crop(decoded, self.size)
            frames.append(to_gray(frame) if self.color_mode == "gray" else frame)
        return torch.stack(frames, dim=1)


def read_clip(source: Any, video: Video, first: int, num_frames: int, frame_stride: int) -> Tensor:
    """The window that begins at frame `first`, uint8 [C,T,H,W]; raises DECODE_ERRORS."""
    end = first + num_frames * frame_stride
    return source.read(video, range(first, end, frame_stride))


class ClipRead(NamedTuple):
    """A clip, uint8 [C,T,H,W] or None, and the failures before it was found."""

    clip: Tensor | None
    failures: list[str]


@dataclass(eq=False, repr=False)
class VideoClipDataset(Dataset):
    """One clip per video and epoch, by keys (epoch, clip number).

    A file that cannot be read is replaced by another one of the list.
    """

    videos: Sequence[Video]
    source: Any  # of frames: DecodedFrames or CachedFrames
    _: KW_ONLY
    num_frames: int
    frame_stride: int
    seed: int  # of windows and replacements
    random_window: bool  # False = always the central window

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return as_pair(self.source.size)

    def fingerprint(self) -> str:
        """A short hash of the names and lengths of the files."""
        named = [(video.name, len(video.frames)) for video in self.videos]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16]

    def __getitem__(self, key: tuple[int, int]) -> ClipRead:
        epoch, i = key
        failures = []
        for attempt in range(MAX_ATTEMPTS):
            # To seed a generator takes longer than to read a cached clip.
            number = stable_hash(f"{self.seed},{epoch},{i},{attempt}".encode())
            video = self.videos[i]
            if attempt > 0:
                other = stable_hash(f"file {number}".encode())
                video = self.videos[other % len(self.videos)]
            first = self._window_start(video, number)
            try:
                clip = read_clip(self.source, video, first, self.num_frames, self.frame_stride)
                return ClipRead(clip, failures)
            except DECODE_ERRORS as error:
                failures.append(f"{printable(video.name)} ({reason_of(error)})")
                if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                    time.sleep(FIRST_PAUSE * 2**attempt)
        return ClipRead(None, failures)

    def _window_start(self, video: Video, number: int) -> int:
        span = clip_span(self.num_frames, self.frame_stride)
        if not self.random_window:
            return central_start(video, span)
        slack = len(video.frames) - span
        # To skip two bits keeps the windows of the shipped checkpoints.
        return video.frames.start + (number >> 2) % (slack + 1)


@dataclass
class ResumableBatchSampler:
    """Batches of (epoch, clip number) keys, from any optimiser step on.

    Each epoch is a fresh permutation by (seed, epoch), cut into whole steps;
    the remainder waits for another epoch. With fewer clips than a step needs,
    clips repeat within it.
    """

    clips: int
    batch_size: int
    batches_per_step: int
    seed: int
    first_step: int  # counted from the start of training
    last_step: int  # exclusive
    part: tuple[int, int] = (0, 1)  # rank and world size, which share a large batch

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step) * self.batches_per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rank, world_size = self.part
        large_batch = self.batch_size * world_size
        steps = steps_per_epoch(self.clips, large_batch * self.batches_per_step)
        batches_per_epoch = steps * self.batches_per_step
        first = self.first_step * self.batches_per_step
        ordered_epoch = None
        for batch in range(first, first + len(self)):
            epoch, place = divmod(batch, batches_per_epoch)
            if epoch != ordered_epoch:
                rng = np.random.default_rng([self.seed, epoch])
                permutation = rng.permutation(self.clips)
                order = np.resize(permutation, batches_per_epoch * large_batch)
                ordered_epoch = epoch
            start = place * large_batch + rank * self.batch_size
            chosen = order[start : start + self.batch_size]
            yield [(epoch, i) for i in chosen.tolist()]


def steps_per_epoch(clips: int, clips_per_step: int) -> int:
    """Whole optimiser steps in one pass over the clips, at least one."""
    return max(1, clips // clips_per_step)


def collate(reads: Sequence[ClipRead]) -> tuple[Tensor | None, list[str], int]:
    """Batch the reads of clips.

    Returns: clips uint8 [B,C,T,H,W], or None if one was not found; all
        failures; the number of attempts.
    """
    clips = [read.clip for read in reads if read.clip is not None]
    failures = [failure for read in reads for failure in read.failures]
    batch = torch.stack(clips) if len(clips) == len(reads) else None
    return batch, failures, len(failures) + len(clips)


@dataclass
class ReadErrors:
    """Failed reads of a run: each bad file is named once, too many stop the run."""

    log: Callable[[str], None] = print
    attempts: int = 0
    failed: int = 0
    named: set[str] = field(default_factory=set)

    def load(self, batches: Iterable, device: torch.device) -> Iterator[Tensor]:
        """Collated batches as float clips [B,C,T,H,W] in [-1, 1].

        Raises: ValueError: if too many reads have failed, or if a clip could
            not be replaced.
        """
        for clips, failures, attempts in batches:
            self.attempts += attempts
            self.failed += len(failures)
            for failure in failures:
                if failure not in self.named:
                    self.named.add(failure)
                    self.log(f"could not read {failure}; another file takes its place")
            # One bad file at the start must not stop a run.
            allowed = MAX_FAILED * max(self.attempts, 100)
            if clips is None or self.failed > allowed:
                got = f"{self.failed} of {self.attempts}; last: {failures[-1]}"
                raise ValueError(f"at most {MAX_FAILED:.0%} of reads may fail (got {got})")
            yield to_float(clips.to(device, non_blocking=True))
