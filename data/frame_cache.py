"""Decoded, resized frames of all videos in one memory-mapped file, shared by every worker and by later runs."""

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
from data.video_index import Video, map_in_threads, printable, reason_of, stable_hash, stamp
from data.video_reader import DECODE_ERRORS
from utils.io import save_json
from utils.video_utils import FrameSize, as_pair

CACHE_VERSION = 1  # part of every cache's name: change it whenever decoding or resizing changes
DISK_MARGIN = 2**28  # bytes that a cache leaves free


class CachedFrames:
    """A FrameSource that takes frames out of a memory map: uint8, frame after frame, video after video.

    The cache, of all videos that will be asked for, is made on first use and found again by the files' paths, sizes and
    times, the frame size and the colours. Only its path travels to worker processes; each maps it for itself.
    """

    def __init__(
        self, videos: Sequence[Video], size: FrameSize, color_mode: str, cache_dir: str | Path, workers: int = 1
    ):
        self.frame_shape = (1 if color_mode == "gray" else 3, *as_pair(size))
        identity = [[os.path.realpath(v.path), *stamp(Path(v.path)), v.info.frames] for v in videos]
        identity = json.dumps([CACHE_VERSION, identity, size, color_mode]).encode()
        self.path = Path(cache_dir) / f"frames_{stable_hash(identity):016x}.u8"
        *starts, self.total = accumulate((video.info.frames for video in videos), initial=0)
        self.bytes = self.total * math.prod(self.frame_shape)
        try:
            counts = json.loads(self.path.with_suffix(".json").read_text())  # frames cached of each video
            sound = len(counts) == len(videos) and self.path.stat().st_size == self.bytes
        except (OSError, ValueError, TypeError):
            sound = False  # not made yet, or damaged
        if not sound:
            counts = self._write(videos, DecodedFrames(size, color_mode), starts, workers)
        self.places = {video.path: place for video, *place in zip(videos, starts, counts, strict=True)}
        self._map: Tensor | None = None

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """See FrameSource."""
        start, count = self.places[video.path]
        if wanted[-1] >= count:
            raise ValueError(f"only {count} of {video.info.frames} frames could be cached")
        if self._map is None:  # read-only: a private map of a file larger than the memory would be refused
            frames = np.memmap(self.path, np.uint8, "r", shape=(self.total, *self.frame_shape))
            with warnings.catch_warnings(action="ignore"):  # "not writable": whoever batches clips copies
                self._map = torch.from_numpy(frames)
        if isinstance(wanted, range):  # evenly spaced, so no copy is needed
            return self._map[start + wanted[0] : start + wanted[-1] + 1 : wanted.step].transpose(0, 1)
        return self._map[[start + number for number in wanted]].transpose(0, 1)  # [C,T,H,W]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_map": None}

    def _write(self, videos: Sequence[Video], source: DecodedFrames, starts: Sequence[int], workers: int) -> list[int]:
        """Decode everything and return the frames cached per video; the cache takes its name last, once it is whole."""
        needed, free = self.bytes + DISK_MARGIN, shutil.disk_usage(self.path.parent).free
        if needed > free:
            rule = f"--cache_videos needs {needed / 2**30:.1f} GiB in --cache_dir {self.path.parent}"
            raise ValueError(f"{rule} (got {free / 2**30:.1f} GiB free)")
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            memory = np.memmap(temporary, np.uint8, "w+", shape=(self.total, *self.frame_shape))

            def fill(video: Video, start: int) -> int:
                try:
                    clip = source.read(video, range(video.info.frames))
                except DECODE_ERRORS as error:  # it changed since it was indexed: the dataset will replace it
                    tqdm.write(f"could not cache {printable(video.name)} ({reason_of(error)})")
                    return 0
                memory[start : start + video.info.frames] = clip.transpose(0, 1).numpy()
                return video.info.frames

            counts = map_in_threads(fill, videos, starts, workers=workers, title="caching")
            memory.flush()
            save_json(self.path.with_suffix(".json"), counts)
            temporary.replace(self.path)
            return counts
        finally:
            temporary.unlink(missing_ok=True)
