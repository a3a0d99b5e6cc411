"""Decoded, resized frames of all videos, shared by all processes and later runs."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import DecodedFrames
from data.video_index import Video, in_threads, printable, reason_of, stable_hash, stamp
from data.video_reader import DECODE_ERRORS
from utils.io import save_json, temporary_path
from utils.video_utils import FrameSize, as_pair

CACHE_VERSION = 1  # change it whenever decoding or resizing changes
DISK_MARGIN = 2**28  # bytes that stay free


class CachedFrames:
    """A source of frames in a memory-mapped file: uint8, video after video.

    It is written on first use and found again by the paths, sizes and times of the
    videos, the frame size and the colours. Every process maps it for itself.
    """

    def __init__(
        self,
        videos: Sequence[Video],
        size: FrameSize,
        color_mode: str,
        cache_dir: str | Path,
        workers: int = 1,
    ):
        self.size = size
        videos = list({video.path: video for video in videos}.values())  # parts have one file
        *starts, total = accumulate((video.info.frames for video in videos), initial=0)
        self.shape = (total, 1 if color_mode == "gray" else 3, *as_pair(size))
        identity = [[os.path.realpath(v.path), *stamp(Path(v.path)), v.info.frames] for v in videos]
        identity = json.dumps([CACHE_VERSION, identity, size, color_mode]).encode()
        self.path = Path(cache_dir) / f"frames_{stable_hash(identity):016x}.u8"
        self._map: Tensor | None = None
        try:
            # Of each video, the number of frames that could be cached.
            counts = json.loads(self.path.with_suffix(".json").read_text())
            file_size = self.path.stat().st_size
            whole = len(counts) == len(videos) and file_size == math.prod(self.shape)
        except (OSError, ValueError, TypeError):
            whole = False  # not written yet, or damaged
        if not whole:
            counts = self._write(videos, DecodedFrames(size, color_mode), starts, workers)
        self.places = {v.path: place for v, *place in zip(videos, starts, counts, strict=True)}

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """Frames by rising numbers, uint8 [C,T,H,W]; ValueError if they are not cached."""
        start, count = self.places[video.path]
        if wanted[-1] >= count:
            raise ValueError(f"only {count} of {video.info.frames} frames could be cached")
        if self._map is None:
            # Read-only: a private map of a file larger than the memory fails.
            frames = np.memmap(self.path, np.uint8, "r", shape=self.shape)
            # Torch warns that one could not write to it.
            with warnings.catch_warnings(action="ignore"):
                self._map = torch.from_numpy(frames)
        return self._map[[start + number for number in wanted]].transpose(0, 1)  # [C,T,H,W]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def _write(
        self, videos: Sequence[Video], source: DecodedFrames, starts: Sequence[int], workers: int
    ) -> list[int]:
        """Decode everything; returns the number of frames cached of each video."""
        needed = math.prod(self.shape) + DISK_MARGIN
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            rule = f"--cache_videos needs {needed / 2**30:.1f} GiB in --cache_dir"
            raise ValueError(f"{rule} {self.path.parent} (got {free / 2**30:.1f} GiB free)")
        with temporary_path(self.path) as temporary:
            with temporary.open("wb") as file:
                # A full disk is an error here, and the end of the process in a mapped file.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, math.prod(self.shape))
                else:
                    file.truncate(math.prod(self.shape))
            memory = np.memmap(temporary, np.uint8, "r+", shape=self.shape)

            def fill(video: Video, start: int) -> int:
                count = video.info.frames
                try:
                    clip = source.read(video, range(count))
                except DECODE_ERRORS as error:  # the dataset will replace it
                    tqdm.write(f"could not cache {printable(video.name)} ({reason_of(error)})")
                    return 0
                memory[start : start + count] = clip.transpose(0, 1).numpy()
                return count

            counts = list(in_threads(fill, videos, starts, workers=workers, title="caching"))
            memory.flush()
            # After a failure, which may pass, the next run tries again.
            if all(counts):
                save_json(self.path.with_suffix(".json"), counts)
        return counts
