"""Decoded, resized frames of all videos in one memory-mapped file, shared by every worker and by later runs."""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import DecodedFrames
from data.video_index import Video, printable, reason_of, stamp
from data.video_reader import DECODE_ERRORS
from utils.io import save_json

CACHE_VERSION = 1  # part of every cache's name: change it whenever decoding or resizing changes
DISK_MARGIN = 2**28  # bytes that a cache leaves free


class CachedFrames:
    """A FrameSource that takes frames out of a memory map: uint8, frame after frame, video after video.

    The cache is made on first use and found again by the files' paths, sizes and times, the frame size and the
    colours. Only its path travels to worker processes; each maps it for itself.

    Args:
        videos: usable files, all that will be asked for.
        workers: files decoded at once while it is made.

    Raises: ValueError: if the disk has no room for it.
    """

    def __init__(self, videos: Sequence[Video], size: int, color_mode: str, cache_dir: str | Path, workers: int = 1):
        self.frame_shape = (1 if color_mode == "gray" else 3, size, size)
        identity = [[os.path.realpath(v.path), *stamp(Path(v.path)), v.info.frames] for v in videos]
        identity = json.dumps([CACHE_VERSION, identity, size, color_mode]).encode()
        key = hashlib.blake2b(identity, digest_size=8).hexdigest()
        self.path = Path(cache_dir) / f"frames_{key}.u8"
        counts_path = self.path.with_suffix(".json")
        total = sum(video.info.frames for video in videos)
        whole = total * int(np.prod(self.frame_shape))
        cached = self._counts(counts_path) if self.path.is_file() and self.path.stat().st_size == whole else []
        if len(cached) != len(videos):
            self._check_disk(whole)
            cached = self._write(videos, DecodedFrames(size, color_mode), total, counts_path, workers)
        starts = np.cumsum([0] + [video.info.frames for video in videos]).tolist()
        self.places = {
            video.path: (start, count) for video, start, count in zip(videos, starts[:-1], cached, strict=True)
        }
        self.total = total
        self._map: Tensor | None = None

    def read(self, video: Video, wanted: Sequence[int]) -> Tensor:
        """See FrameSource."""
        start, count = self.places[video.path]
        if wanted[-1] >= count:
            raise ValueError(f"only {count} of {video.info.frames} frames could be cached")
        if self._map is None:
            self._map = self._open()
        if isinstance(wanted, range):  # evenly spaced, so no copy is needed
            return self._map[start + wanted[0] : start + wanted[-1] + 1 : wanted.step].transpose(0, 1)
        return self._map[[start + number for number in wanted]].transpose(0, 1)  # [C,T,H,W]

    def _open(self) -> Tensor:
        """The file as a read-only tensor: a private map of a file larger than the memory would be refused."""
        frames = np.memmap(self.path, np.uint8, "r", shape=(self.total, *self.frame_shape))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # whoever batches clips copies
            return torch.from_numpy(frames)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_map": None}

    @staticmethod
    def _counts(path: Path) -> list[int]:
        """Frames cached per video; nothing where the record is missing or damaged, so that the cache is made anew."""
        try:
            return list(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return []

    def _check_disk(self, whole: int) -> None:
        needed, free = whole + DISK_MARGIN, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ValueError(
                f"--cache_videos needs {needed / 2**30:.1f} GiB in --cache_dir {self.path.parent} "
                f"(got {free / 2**30:.1f} GiB free)"
            )

    def _write(
        self, videos: Sequence[Video], source: DecodedFrames, total: int, counts_path: Path, workers: int
    ) -> list[int]:
        """Decode everything and return the frames cached per video; the cache takes its name last, once it is whole."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        starts = np.cumsum([0] + [video.info.frames for video in videos])
        try:
            memory = np.memmap(temporary, np.uint8, "w+", shape=(total, *self.frame_shape))

            def fill(i: int) -> int:
                video = videos[i]
                try:
                    clip = source.read(video, range(video.info.frames))
                except DECODE_ERRORS as error:  # it changed since it was indexed: the dataset will replace it
                    tqdm.write(f"could not cache {printable(video.name)} ({reason_of(error)})")
                    return 0
                memory[starts[i] : starts[i + 1]] = clip.transpose(0, 1).numpy()
                return video.info.frames

            with ThreadPoolExecutor(max(1, workers)) as pool:
                try:
                    cached = list(tqdm(pool.map(fill, range(len(videos))), "caching", len(videos), disable=None))
                finally:
                    pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files in hand, not for all
            memory.flush()
            save_json(counts_path, cached)
            temporary.replace(self.path)
            return cached
        finally:
            temporary.unlink(missing_ok=True)
