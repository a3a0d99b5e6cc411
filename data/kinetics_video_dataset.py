"""Find, split and index MP4 files, and cut clips from them.

Everything random here is a function of (seed, epoch, clip number): the number of workers, the batch size, a resume or
a crash change no clip.
"""

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from data.synthetic_videos import make_synthetic_videos
from data.video_reader import DECODE_ERRORS, VideoInfo, probe_video, read_frames
from utils.video_utils import resize_and_crop, to_gray

SPLIT_FOLDERS = (("videos_train", "videos_val"), ("train", "val"), ("train", "test"))
INDEX_VERSION = 2
NAMED_IN_REPORT = 20  # how many bad files of a kind a report names
MAX_ATTEMPTS = 8  # files tried for one clip before giving up


class Video(NamedTuple):
    """One file of the index: `info` is None where it cannot be read, and `reason` says why."""

    path: str
    name: str
    info: VideoInfo | None
    reason: str


# --- find -------------------------------------------------------------------------------------------------------------


def find_videos(root: str | Path) -> list[Path]:
    """Every .mp4 (any case) below `root`, through symlinked folders, each real file once, sorted by path.

    Raises: ValueError: if root is not a folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data_root must be a folder (got {root})")
    found, visited = [], set()

    def tell(error: OSError) -> None:
        print(f"could not look into {error.filename} ({error.strerror})", file=sys.stderr)

    for folder, subfolders, names in os.walk(root, onerror=tell, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link to a folder above or beside: do not loop
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        found += [Path(folder, name) for name in names if name.lower().endswith(".mp4")]
    # of several names of one file a plain one wins over links, then the first: adding a link renames nothing
    by_preference = sorted(found, key=lambda path: (path.is_symlink(), path), reverse=True)
    return sorted({os.path.realpath(path): path for path in by_preference}.values())


# --- index ------------------------------------------------------------------------------------------------------------


class VideoIndex:
    """What is in each file below one root, found by one full decode and kept on disk.

    An entry is reused while the file's size and modification time stay the same. The index also remembers which files
    were put on a side only because that side would have been empty (for a seed and a span), so that adding files later
    moves none across.

    Args:
        root: the data folder; names in the index are relative to it.
        cache_dir: where the index file lives.

    Raises: ValueError: if cache_dir cannot be written.
    """

    def __init__(self, root: str | Path, cache_dir: str | Path):
        self.root = Path(root)
        key = hashlib.blake2b(os.path.realpath(root).encode(), digest_size=8).hexdigest()
        self.path = Path(cache_dir) / f"index_{key}.json"
        self.entries: dict[str, list] = {}
        self.assigned: dict[str, dict[str, str]] = {}
        self.stored: dict[str, Any] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stored = json.loads(self.path.read_text())
            if stored["version"] == INDEX_VERSION:
                self.entries, self.assigned = stored["entries"], stored["assigned"]
                self.stored = copy.deepcopy(stored)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # no index yet, or a damaged one: it is made anew
        except OSError as error:
            raise ValueError(f"--cache_dir {cache_dir}: cannot be used ({error.strerror})") from error

    def save(self) -> None:
        """Write the index, atomically, if it has changed."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        content = {
            "version": INDEX_VERSION,
            "root": str(self.root),
            "assigned": self.assigned,
            "entries": self.entries,
        }
        if content == self.stored:
            return
        try:
            temporary.write_text(json.dumps(content))
            temporary.replace(self.path)
            self.stored = copy.deepcopy(content)
        except OSError as error:
            raise ValueError(f"--cache_dir {self.path.parent}: cannot be written ({error.strerror})") from error

    def lookup(self, paths: Sequence[Path], workers: int) -> list[Video]:
        """The index's word on each file; those not known yet, or changed, are decoded first, `workers` at a time."""
        stamps = {path: stamp(path) for path in paths}
        unknown = [p for p in paths if self.entries.get(self.name(p), [None])[0] != stamps[p]]
        if unknown:
            with ThreadPoolExecutor(max(1, workers)) as pool:  # decoding releases the GIL
                try:
                    probes = pool.map(probe_or_reason, unknown)
                    for path, found in zip(unknown, tqdm(probes, "indexing", len(unknown), disable=None), strict=True):
                        self.entries[self.name(path)] = [stamps[path], *found]
                finally:
                    pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files in hand, not for the folder
            self.save()
        videos, shared = [], {}
        for path in paths:
            _, info, reason = self.entries[self.name(path)]
            if info is not None:
                info = VideoInfo(*info)
                times = tuple(info.timestamps)  # one for all files that have the same: every worker holds them
                info = info._replace(timestamps=shared.setdefault(times, times))
            videos.append(Video(str(path), self.name(path), info, reason))
        return videos

    def name(self, path: Path) -> str:
        """A file's path relative to the root, with forward slashes."""
        return path.relative_to(self.root).as_posix()


def stamp(path: Path) -> list[int]:
    """What tells that a file changed: its size in bytes and its modification time in nanoseconds; [] if unreadable."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def probe_or_reason(path: Path) -> tuple[VideoInfo | None, str]:
    """A file's VideoInfo and "", or None and the reason why it cannot be used."""
    try:
        return probe_video(path), ""
    except DECODE_ERRORS as error:
        return None, reason_of(error)


def reason_of(error: Exception) -> str:
    """An exception as half a line: its kind, and its words without the path."""
    words = getattr(error, "strerror", None) or str(error)
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"


# --- split ------------------------------------------------------------------------------------------------------------


def hashed(key: bytes) -> int:
    """An integer in [0, 2^64) that looks random and is a function of `key` alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def position(seed: int, name: str) -> float:
    """A file's fixed place in [0, 1), by hash: below --val_ratio it belongs to the validation split."""
    return hashed(f"{seed}/".encode() + os.fsencode(name)) / 2**64


def prepare_videos(
    data_root: str | Path,
    *,
    span: int,
    val_ratio: float,
    seed: int,
    cache_dir: str | Path,
    max_videos: int | None = None,
    workers: int = 1,
    log: Callable[[str], None] = print,
) -> tuple[list[Video], list[Video]]:
    """The usable files of the training and the validation split, both non-empty.

    Folders videos_train/ and videos_val/ (or train/ and val/, or train/ and test/) under the root are the splits;
    otherwise each file goes by the hash of (seed, relative path), so that adding files moves none across.

    Args:
        data_root: folder of MP4 files.
        span: source frames that a clip needs, (T - 1) * frame_stride + 1.
        val_ratio: share of files for validation where folders do not say.
        seed: of the hash.
        cache_dir: where the index is kept.
        max_videos: upper bound on the files of both splits together; None = all.
        workers: files decoded at once while indexing.
        log: receives the findings, a line at a time.

    Raises: ValueError: if a split would be empty; it counts the files and names the first bad ones.
    """
    root = Path(data_root)
    index = VideoIndex(root, cache_dir)
    designated = next((pair for pair in SPLIT_FOLDERS if all((root / side).is_dir() for side in pair)), None)
    if designated:
        train, val = (find_videos(root / side) for side in designated)
        held_out = set(map(os.path.realpath, val))
        train = [path for path in train if os.path.realpath(path) not in held_out]
        assigned = {}
    else:
        assigned = index.assigned.setdefault(f"seed {seed}, span {span}", {})
        train, val = [], []
        for path in find_videos(root):
            natural = "val" if position(seed, index.name(path)) < val_ratio else "train"
            (val if assigned.get(index.name(path), natural) == "val" else train).append(path)

    seen: list[Video] = []
    limits = share_limit(max_videos, len(train), len(val))
    sides = [
        take_usable(index, paths, limit, span, seed, workers, seen)
        for paths, limit in zip((train, val), limits, strict=True)
    ]
    if not designated:
        fill_empty_side(sides, seed, assigned)
        index.save()
    for line in report(seen, span):
        log(line)
    if not all(sides):
        rule = f"{' and '.join(designated)} must each hold" if designated else "it must hold"
        needed = "a usable MP4 file" if designated else "at least two usable MP4 files, one for validation"
        raise ValueError(f"--data_root {root}: {rule} {needed}; {'; '.join(report(seen, span))}")
    return sides[0], sides[1]


def data_as_trained(
    checkpoint: dict[str, Any], data_root: str | None, cache_dir: str | None, save_mp4: Callable[..., None]
) -> tuple[str, str]:
    """The data folder and the folder of its index: as given, or else those of the training of a checkpoint.

    Args:
        checkpoint: whose `args` are used.
        data_root: folder of MP4 files; None = that of training, the built-in clips included.
        cache_dir: where the index is kept; None = as in training.
        save_mp4: writer of the built-in clips, as `make_synthetic_videos` wants it.
    """
    trained = checkpoint["args"]
    cache_dir = cache_dir or trained.get("cache_dir") or "outputs/cache"
    return str(data_root or trained.get("data_root") or make_synthetic_videos(cache_dir, save_mp4)), cache_dir


def split_as_trained(checkpoint: dict[str, Any], data_root: str, cache_dir: str) -> tuple[list[Video], list[Video]]:
    """The usable files of both splits, divided as the training of a checkpoint divides this folder.

    Raises: ValueError: as `prepare_videos`.
    """
    trained, clip = checkpoint["args"], checkpoint["clip_config"]
    return prepare_videos(
        data_root, span=(clip["num_frames"] - 1) * clip["frame_stride"] + 1, val_ratio=trained["val_ratio"],
        seed=trained["seed"], cache_dir=cache_dir, max_videos=trained.get("max_videos"),
    )  # fmt: skip


def usable_videos(
    data_root: str | Path, span: int, cache_dir: str | Path, limit: int, log: Callable[[str], None] = print
) -> list[Video]:
    """The first files below a folder, by name, that can give a clip of `span` frames; no more are looked at than that.

    Raises: ValueError: if there is none; it counts the files and names the first bad ones.
    """
    index, waiting = VideoIndex(data_root, cache_dir), find_videos(data_root)
    seen: list[Video] = []
    usable: list[Video] = []
    while waiting and len(usable) < limit:
        count = limit - len(usable)
        videos = index.lookup(waiting[:count], workers=1)
        waiting = waiting[count:]
        seen += videos
        usable += [video for video in videos if video.info and video.info.frames >= span]
    findings = report(seen, span)
    if not usable:
        raise ValueError(f"--data_root {data_root}: it must hold a usable MP4 file; {'; '.join(findings)}")
    for line in findings:
        log(line)
    return usable


def share_limit(max_videos: int | None, train: int, val: int) -> tuple[int, int]:
    """--max_videos divided between both sides in proportion, with at least one for each that has files."""
    if max_videos is None or max_videos >= train + val:
        return train, val
    if max_videos < 2:
        raise ValueError(f"--max_videos must be at least 2, one file for each split (got {max_videos})")
    for_val = min(max(1, round(max_videos * val / (train + val))), max_videos - 1) if val else 0
    return max_videos - for_val, for_val


def take_usable(
    index: VideoIndex, paths: Sequence[Path], limit: int, span: int, seed: int, workers: int, seen: list[Video]
) -> list[Video]:
    """Up to `limit` files that can give a clip of `span` frames, looking at no more files than that takes.

    A limited choice goes by hash, not by name, so that it is spread over the folder. All files looked at join `seen`.
    """
    waiting = list(paths)
    if limit < len(waiting):
        waiting.sort(key=lambda path: position(seed + 1, index.name(path)))
    usable: list[Video] = []
    while waiting and len(usable) < limit:
        count = limit - len(usable)
        videos = index.lookup(waiting[:count], workers)
        waiting = waiting[count:]
        seen += videos
        usable += [video for video in videos if video.info and video.info.frames >= span]
    return sorted(usable, key=lambda video: video.name)


def fill_empty_side(sides: list[list[Video]], seed: int, assigned: dict[str, str]) -> None:
    """Move one file to a side that the hash left empty, and remember it in `assigned`; two files are needed."""
    train, val = sides
    place = lambda video: position(seed, video.name)  # noqa: E731
    if not val and len(train) > 1:
        val.append(train.pop(train.index(min(train, key=place))))
        assigned[val[0].name] = "val"
    elif not train and len(val) > 1:
        train.append(val.pop(val.index(max(val, key=place))))
        assigned[train[0].name] = "train"


def printable(name: str) -> str:
    """A file's name as a terminal can show it on one line, whatever bytes it has."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def report(videos: Sequence[Video], span: int) -> list[str]:
    """The index's findings: a line of counts, then one for each kind of trouble with the first names and reasons."""

    def named(video: Video, reason: str) -> str:
        return f"{printable(video.name)} ({reason})"

    unreadable = [named(v, v.reason) for v in videos if not v.info]
    short = [named(v, f"{v.info.frames} frames") for v in videos if v.info and v.info.frames < span]
    damaged = [named(v, v.info.damage) for v in videos if v.info and v.info.damage and v.info.frames >= span]
    usable = len(videos) - len(unreadable) - len(short)
    lines = [f"{len(videos)} MP4 files: {usable} usable, {len(short)} too short, {len(unreadable)} unreadable"]
    for title, names in (
        (f"too short for a clip of {span} frames", short),
        ("unreadable", unreadable),
        ("usable but damaged", damaged),
    ):
        if names:
            rest = len(names) - NAMED_IN_REPORT
            more = f" and {rest} more (python data/check_videos.py lists all)" if rest > 0 else ""
            lines.append(f"{title}: {', '.join(names[:NAMED_IN_REPORT])}{more}")
    return lines


# --- clips ------------------------------------------------------------------------------------------------------------


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
        source: where the frames come from.
        num_frames: T.
        frame_stride: source frames between neighbouring clip frames.
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

    def __getitem__(self, key: tuple[int, int]) -> ClipRead:
        epoch, i = key
        failures = []
        for attempt in range(MAX_ATTEMPTS):
            # a hash, as making a generator would take longer than reading a cached clip
            number = hashed(f"{self.seed},{epoch},{i},{attempt}".encode())
            video = self.videos[i if attempt == 0 else hashed(f"file {number}".encode()) % len(self.videos)]
            try:
                return ClipRead(self._cut(video, number), failures)
            except DECODE_ERRORS as error:
                failures.append(f"{printable(video.name)} ({reason_of(error)})")
        return ClipRead(None, failures)

    def _cut(self, video: Video, number: int) -> Tensor:
        slack = video.info.frames - ((self.num_frames - 1) * self.frame_stride + 1)
        first = (number >> 2) % (slack + 1) if self.random_window else slack // 2
        wanted = range(first, first + self.num_frames * self.frame_stride, self.frame_stride)
        clip = self.source.read(video, wanted)
        if self.hflip and number & 1:
            clip = clip.flip(3)
        if self.time_reverse and number & 2:
            clip = clip.flip(1)
        return clip


class ClipBatches:
    """Batches of (epoch, i) keys over many epochs, from any batch to any other.

    Each epoch is a fresh permutation by (seed, epoch), cut into whole optimiser steps; what is left over waits for
    another epoch's order. With fewer clips than a step needs, clips repeat within it.

    Args:
        clips: in the dataset.
        batch_size: clips per batch.
        batches_per_step: batches per optimiser step.
        seed: of the permutations.
        first: number of the first batch, counted from the start of training.
        last: number after the last batch.
        part: which of several processes asks, and how many there are: their batches together are one large batch.
    """

    def __init__(
        self,
        clips: int,
        batch_size: int,
        batches_per_step: int,
        seed: int,
        first: int,
        last: int,
        part: tuple[int, int] = (0, 1),
    ):
        self.clips = clips
        self.batch_size = batch_size
        self.number, self.parts = part
        self.batches_per_epoch = steps_per_epoch(clips, batch_size * self.parts * batches_per_step) * batches_per_step
        self.seed = seed
        self.first = first
        self.last = last

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
