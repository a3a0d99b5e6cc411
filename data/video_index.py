"""Find MP4 files, index what is in them, and split them into training and validation."""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.synthetic_videos import make_synthetic_videos
from data.video_reader import DECODE_ERRORS, VideoInfo, probe_video
from utils.io import atomic_write

DEFAULT_CACHE_DIR = "outputs/cache"
SPLIT_FOLDERS = (("videos_train", "videos_val"), ("train", "val"), ("train", "test"))
INDEX_VERSION = 2  # change it whenever VideoInfo or its meaning changes
MAX_NAMED = 20  # bad files that a report names

Log = Callable[[str], None]


class Video(NamedTuple):
    """A file of the index."""

    path: str
    name: str  # its path below the root
    info: VideoInfo | None
    reason: str  # why there is no info, or what is damaged, or ""


def find_videos(root: str | Path) -> list[Path]:
    """Every .mp4 (any case) below a folder and its links: each file once, sorted."""
    if not Path(root).is_dir():
        raise ValueError(f"--data_root must be a folder (got {root})")
    found = []
    visited = set()
    for folder, subfolders, names in os.walk(root, onerror=_warn, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link led back here
            subfolders.clear()
            continue
        visited.add(real)
        subfolders.sort()
        found += [Path(folder, name) for name in names if name.lower().endswith(".mp4")]
    # Of several names of one file, the last in this order stays. Plain names
    # come after links, so that a new link renames nothing.
    found.sort(key=lambda path: (path.is_symlink(), path), reverse=True)
    return sorted({os.path.realpath(path): path for path in found}.values())


def _warn(error: OSError) -> None:
    print(f"could not look into {error.filename} ({error.strerror})", file=sys.stderr)


class VideoIndex:
    """What a full decode found in each file below `root`, kept in `cache_dir`.

    An entry stays valid while the size and modification time of its file do.
    """

    def __init__(self, root: str | Path, cache_dir: str | Path | None, workers: int = 1):
        self.root = Path(root)
        self.workers = workers
        self.seen: list[Video] = []  # all that `take` looked at
        self.entries: dict[str, list] = {}
        # Files moved into a split that the hash left empty, by seed and span.
        self.assigned: dict[str, dict[str, str]] = {}
        key = stable_hash(os.path.realpath(root).encode())
        self.path = Path(cache_dir or DEFAULT_CACHE_DIR) / f"index_{key:016x}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            content = json.loads(self.path.read_text())
            if content["version"] == INDEX_VERSION:
                self.entries, self.assigned = content["entries"], content["assigned"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # there is no index yet, or a damaged one

    def save(self) -> None:
        """Write the index."""
        content = {
            "version": INDEX_VERSION,
            "entries": self.entries,
            "assigned": self.assigned,
        }
        with atomic_write(self.path) as file:
            file.write(json.dumps(content).encode())

    def name(self, path: Path) -> str:
        """A file's path below the root."""
        return path.relative_to(self.root).as_posix()

    def lookup(self, paths: Sequence[Path]) -> list[Video]:
        """The entries of these files; new and changed ones are decoded first."""
        stamps = {path: stamp(path) for path in paths}
        unknown = [p for p in paths if self.entries.get(self.name(p), [None])[0] != stamps[p]]
        if unknown:
            probes = map_in_threads(_probe, unknown, workers=self.workers, title="indexing")
            for path, (info, reason) in zip(unknown, probes, strict=True):
                self.entries[self.name(path)] = [stamps[path], info, reason]
            self.save()

        videos = []
        shared = {}
        for path in paths:
            _, info, reason = self.entries[self.name(path)]
            if info is not None:
                info = VideoInfo(*info)
                # Every worker holds all timestamps, so equal ones are shared.
                times = tuple(info.timestamps)
                info = info._replace(timestamps=shared.setdefault(times, times))
                reason = info.damage
            videos.append(Video(str(path), self.name(path), info, reason))
        return videos

    def take(self, paths: Sequence[Path], limit: int, span: int) -> list[Video]:
        """The first `limit` files of `span` frames or more; others are not looked at."""
        waiting = list(paths)
        usable = []
        while waiting and len(usable) < limit:
            count = limit - len(usable)
            videos = self.lookup(waiting[:count])
            waiting = waiting[count:]
            self.seen += videos
            usable += [video for video in videos if video.info and video.info.frames >= span]
        return usable

    def report(self, span: int, log: Log, broken_rule: str | None = None) -> None:
        """Log how many files are usable and name bad ones, or raise that as a ValueError."""
        counts = {"usable": 0, "too short": 0, "unreadable": 0}
        bad = []
        for video in self.seen:
            kind, reason = "usable", video.reason
            if video.info is None:
                kind = "unreadable"
            elif video.info.frames < span:
                kind, reason = "too short", f"{video.info.frames} of {span} frames"
            counts[kind] += 1
            if reason:
                bad.append(f"{printable(video.name)} ({reason})")
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        text = f"{len(self.seen)} MP4 files: {kinds}"
        if bad:
            more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
            text += f"; short, unreadable or damaged: {', '.join(bad[:MAX_NAMED])}{more}"
        if broken_rule:
            raise ValueError(f"--data_root {self.root}: {broken_rule} (got {text})")
        log(text)


def map_in_threads(function: Callable, *items: Sequence, workers: int, title: str) -> list:
    """list(map(function, *items)) in threads, since decoding releases the GIL."""
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        return list(tqdm(pool.map(function, *items), title, len(items[0]), disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files in hand only


def stamp(path: Path) -> list[int]:
    """A file's size and modification time; [] if it cannot be told."""
    try:
        status = path.stat()
    except OSError:
        return []
    return [status.st_size, status.st_mtime_ns]


def _probe(path: Path) -> tuple[VideoInfo | None, str]:
    try:
        return probe_video(path), ""
    except DECODE_ERRORS as error:
        return None, reason_of(error)


def reason_of(error: Exception) -> str:
    """An exception as half a line, without the path."""
    words = getattr(error, "strerror", None) or str(error)
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"


def printable(name: str) -> str:
    """A file's name on one line of a terminal, whatever bytes it has."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def stable_hash(key: bytes) -> int:
    """An integer in [0, 2^64) that is a function of `key` only."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def split_key(seed: int, name: str) -> float:
    """A file's fixed place in [0, 1); below --val_ratio it is held out."""
    return stable_hash(f"{seed}/".encode() + os.fsencode(name)) / 2**64


def clip_span(num_frames: int, frame_stride: int) -> int:
    """Source frames that a clip spans."""
    return (num_frames - 1) * frame_stride + 1


def central_start(video: Video, span: int) -> int:
    """First frame of the central window of `span` frames."""
    return (video.info.frames - span) // 2


def prepare_videos(
    data_root: str | Path,
    *,
    span: int,
    val_ratio: float,
    seed: int,
    cache_dir: str | Path,
    max_videos: int | None = None,
    workers: int = 1,
    log: Log = print,
) -> tuple[list[Video], list[Video]]:
    """Training and validation files of `span` frames or more, sorted by name.

    Folders named as in SPLIT_FOLDERS are the splits. Otherwise the hash of
    (seed, name) holds out about `val_ratio` of the files, so that files added
    later move none across.

    Args:
        max_videos: bound on the files of both splits; None = all.

    Raises: ValueError: if a split is empty; it names bad files.
    """
    root = Path(data_root)
    index = VideoIndex(root, cache_dir, workers)
    folders = [pair for pair in SPLIT_FOLDERS if all((root / side).is_dir() for side in pair)]
    assigned = index.assigned.setdefault(f"seed {seed}, span {span}", {})
    if folders:
        train, val = (find_videos(root / side) for side in folders[0])
        held_out = {os.path.realpath(path) for path in val}
        train = [path for path in train if os.path.realpath(path) not in held_out]
        rule = f"{' and '.join(folders[0])} must each hold a usable MP4 file"
    else:
        train, val = [], []
        for path in find_videos(root):
            name = index.name(path)
            by_hash = "val" if split_key(seed, name) < val_ratio else "train"
            (val if assigned.get(name, by_hash) == "val" else train).append(path)
        rule = "it must hold at least two usable MP4 files, one for validation"

    splits = []
    limits = share_limit(max_videos, len(train), len(val))
    for paths, limit in zip((train, val), limits, strict=True):
        if limit < len(paths):
            # By hash, so that the choice is spread over the folder.
            paths.sort(key=lambda path: split_key(seed + 1, index.name(path)))
        usable = index.take(paths, limit, span)
        splits.append(sorted(usable, key=lambda video: video.name))
    train, val = splits
    if not folders and not (train and val) and len(train) + len(val) > 1:
        assigned.update(_fill_empty_split(train, val, seed))
        index.save()
    index.report(span, log, broken_rule=None if train and val else rule)
    return train, val


def share_limit(max_videos: int | None, train: int, val: int) -> tuple[int, int]:
    """--max_videos, at least 2, in proportion to the splits, at least one for each."""
    if max_videos is None or max_videos >= train + val:
        return train, val
    share = max(1, round(max_videos * val / (train + val)))
    for_val = min(share, max_videos - 1) if val else 0
    return max_videos - for_val, for_val


def _fill_empty_split(train: list[Video], val: list[Video], seed: int) -> dict[str, str]:
    # The file that comes nearest moves.
    full = sorted(train + val, key=lambda video: split_key(seed, video.name))
    empty, moved = (train, full[-1]) if val else (val, full[0])
    (val if val else train).remove(moved)
    empty.append(moved)
    return {moved.name: "train" if empty is train else "val"}


def usable_videos(
    data_root: str | Path, span: int, limit: int, cache_dir: str | Path | None, log: Log = print
) -> list[Video]:
    """The first `limit` files by name that have `span` frames; ValueError if none has."""
    index = VideoIndex(data_root, cache_dir)
    usable = index.take(find_videos(data_root), limit, span)
    index.report(span, log, broken_rule=None if usable else "it must hold a usable MP4 file")
    return usable


def held_out_videos(
    trained_args: Mapping[str, Any],
    clip_config: Mapping[str, Any],
    data_root: str | None = None,
    split: str = "val",
    log: Log = print,
) -> tuple[list[Video], str]:
    """The "val" or "train" files as the run of a checkpoint split them, and their root.

    Without a `data_root` it is that of the run, or the built-in clips.
    """
    cache_dir = trained_args["cache_dir"] or DEFAULT_CACHE_DIR
    root = data_root or trained_args["data_root"] or make_synthetic_videos(cache_dir)
    train, val = prepare_videos(
        root,
        span=clip_span(clip_config["num_frames"], clip_config["frame_stride"]),
        val_ratio=trained_args["val_ratio"],
        seed=trained_args["seed"],
        cache_dir=cache_dir,
        max_videos=trained_args["max_videos"],
        log=log,
    )
    return train if split == "train" else val, str(root)
