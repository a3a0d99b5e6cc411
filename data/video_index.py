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
from utils.distributed import print0
from utils.io import atomic_write

SPLIT_FOLDERS = (("videos_train", "videos_val"), ("train", "val"), ("train", "test"))
INDEX_VERSION = 2
NAMED_IN_SUMMARY = 20  # how many bad files of a kind a summary names


class Video(NamedTuple):
    """One file of the index: `info` is None where it cannot be read, and `reason` says why."""

    path: str
    name: str
    info: VideoInfo | None
    reason: str


# --- find -------------------------------------------------------------------------------------------------------------


def find_videos(root: str | Path) -> list[Path]:
    """Every .mp4 (any case) below the folder `root`, through symlinked folders, each real file once, sorted by path."""
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
    """What is in each file below `root`, found by one full decode and kept on disk, in `cache_dir`.

    An entry is reused while the file's size and modification time stay the same. The index also remembers which files
    were put on a side only because that side would have been empty (for a seed and a span), so that adding files later
    moves none across.
    """

    def __init__(self, root: str | Path, cache_dir: str | Path):
        self.root = Path(root)
        self.path = Path(cache_dir) / f"index_{stable_hash(os.path.realpath(root).encode()):016x}.json"
        self.entries: dict[str, list] = {}
        self.assigned: dict[str, dict[str, str]] = {}
        self.stored = ""  # the file's text
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text()
            stored = json.loads(text)
            if stored["version"] == INDEX_VERSION:
                self.entries, self.assigned, self.stored = stored["entries"], stored["assigned"], text
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            pass  # no index yet, or a damaged one: it is made anew
        except OSError as error:
            raise ValueError(f"--cache_dir {cache_dir}: cannot be used ({error.strerror})") from error

    def save(self) -> None:
        """Write the index, atomically, if it has changed."""
        content = {"version": INDEX_VERSION, "root": str(self.root), "assigned": self.assigned, "entries": self.entries}
        text = json.dumps(content)
        if text == self.stored:
            return
        try:
            with atomic_write(self.path) as file:
                file.write(text.encode())
            self.stored = text
        except OSError as error:
            raise ValueError(f"--cache_dir {self.path.parent}: cannot be written ({error.strerror})") from error

    def lookup(self, paths: Sequence[Path], workers: int) -> list[Video]:
        """The index's word on each file; those not known yet, or changed, are decoded first, `workers` at a time."""
        stamps = {path: stamp(path) for path in paths}
        unknown = [p for p in paths if self.entries.get(self.name(p), [None])[0] != stamps[p]]
        if unknown:
            probes = map_in_threads(probe_or_reason, unknown, workers=workers, title="indexing")
            for path, probe in zip(unknown, probes, strict=True):
                self.entries[self.name(path)] = [stamps[path], *probe]
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


def map_in_threads(function: Callable, *items: Sequence, workers: int, title: str) -> list:
    """list(map(function, *items)), `workers` calls at once (decoding releases the GIL), with a progress bar."""
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        return list(tqdm(pool.map(function, *items), title, len(items[0]), disable=None))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files in hand, not for all


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


def stable_hash(key: bytes) -> int:
    """An integer in [0, 2^64) that looks random and is a function of `key` alone."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")


def split_key(seed: int, name: str) -> float:
    """A file's fixed place in [0, 1), by hash: below --val_ratio it belongs to the validation split."""
    return stable_hash(f"{seed}/".encode() + os.fsencode(name)) / 2**64


def clip_span(num_frames: int, frame_stride: int) -> int:
    """Source frames that a clip spans."""
    return (num_frames - 1) * frame_stride + 1


def prepare_videos(
    data_root: str | Path,
    *,
    span: int,
    val_ratio: float,
    seed: int,
    cache_dir: str | Path,
    max_videos: int | None = None,
    workers: int = 1,
    log: Callable[[str], None] = print0,
) -> tuple[list[Video], list[Video]]:
    """The files of the training and the validation split with at least `span` frames, `max_videos` in all at most.

    Folders videos_train/ and videos_val/ (or train/ and val/, or train/ and test/) under the root are the splits;
    otherwise each file goes by the hash of (seed, relative path), about `val_ratio` of them to validation, so that
    adding files moves none across. If a split would be empty, a ValueError counts the files and names bad ones.
    """
    root = Path(data_root)
    index = VideoIndex(root, cache_dir)
    designated = next((pair for pair in SPLIT_FOLDERS if all((root / side).is_dir() for side in pair)), None)
    assigned: dict[str, str] = {}
    if designated:
        train, val = (find_videos(root / side) for side in designated)
        held_out = set(map(os.path.realpath, val))
        train = [path for path in train if os.path.realpath(path) not in held_out]
    else:
        assigned = index.assigned.setdefault(f"seed {seed}, span {span}", {})
        train, val = [], []
        for path in find_videos(root):
            natural = "val" if split_key(seed, index.name(path)) < val_ratio else "train"
            (val if assigned.get(index.name(path), natural) == "val" else train).append(path)

    seen, sides = [], []
    for paths, limit in zip((train, val), share_limit(max_videos, len(train), len(val)), strict=True):
        if limit < len(paths):  # by hash, not by name, so that the choice is spread over the folder
            paths.sort(key=lambda path: split_key(seed + 1, index.name(path)))
        sides.append(sorted(take_usable(index, paths, limit, span, workers, seen), key=lambda video: video.name))
    if not designated:
        fill_empty_side(sides, seed, assigned)
        index.save()
    summary = summarise_index(seen, span)
    for line in summary:
        log(line)
    if not all(sides):
        rule = "it must hold at least two usable MP4 files, one for validation"
        if designated:
            rule = f"{' and '.join(designated)} must each hold a usable MP4 file"
        raise ValueError(f"--data_root {root}: {rule}; {'; '.join(summary)}")
    return sides[0], sides[1]


def data_as_trained(trained: Mapping[str, Any], data_root: str | None, cache_dir: str | None) -> tuple[str, str]:
    """The data folder and its index's: as given, or else those of a checkpoint's `args` (built-in clips included)."""
    cache_dir = cache_dir or trained.get("cache_dir") or "outputs/cache"
    return str(data_root or trained.get("data_root") or make_synthetic_videos(cache_dir)), cache_dir


def split_as_trained(
    trained: Mapping[str, Any], clip_config: Mapping[str, Any], data_root: str, cache_dir: str
) -> tuple[list[Video], list[Video]]:
    """As `prepare_videos`, dividing the folder as the training of a checkpoint with these `args` divides it."""
    span = clip_span(clip_config["num_frames"], clip_config["frame_stride"])
    split = {"val_ratio": trained["val_ratio"], "seed": trained["seed"], "max_videos": trained.get("max_videos")}
    return prepare_videos(data_root, span=span, cache_dir=cache_dir, **split)


def usable_videos(
    data_root: str | Path, span: int, cache_dir: str | Path, limit: int, log: Callable[[str], None] = print0
) -> list[Video]:
    """The first `limit` files below a folder, by name, that have `span` frames; a ValueError if there is none."""
    seen: list[Video] = []
    usable = take_usable(VideoIndex(data_root, cache_dir), find_videos(data_root), limit, span, 1, seen)
    summary = summarise_index(seen, span)
    if not usable:
        raise ValueError(f"--data_root {data_root}: it must hold a usable MP4 file; {'; '.join(summary)}")
    for line in summary:
        log(line)
    return usable


def share_limit(max_videos: int | None, train: int, val: int) -> tuple[int, int]:
    """--max_videos, at least 2, divided between both sides in proportion, with at least one for each with files."""
    if max_videos is None or max_videos >= train + val:
        return train, val
    for_val = min(max(1, round(max_videos * val / (train + val))), max_videos - 1) if val else 0
    return max_videos - for_val, for_val


def take_usable(
    index: VideoIndex, paths: Sequence[Path], limit: int, span: int, workers: int, seen: list[Video]
) -> list[Video]:
    """The first `limit` files that have `span` frames; no more are looked at, and those that are join `seen`."""
    waiting, usable = list(paths), []
    while waiting and len(usable) < limit:
        count = limit - len(usable)
        videos, waiting = index.lookup(waiting[:count], workers), waiting[count:]
        seen += videos
        usable += [video for video in videos if video.info and video.info.frames >= span]
    return usable


def fill_empty_side(sides: list[list[Video]], seed: int, assigned: dict[str, str]) -> None:
    """Move one file to a side that the hash left empty, and remember it in `assigned`; two files are needed."""
    train, val = sides
    for full, empty, name, nearest in ((train, val, "val", min), (val, train, "train", max)):
        if not empty and len(full) > 1:
            empty.append(nearest(full, key=lambda video: split_key(seed, video.name)))
            full.remove(empty[0])
            assigned[empty[0].name] = name


def printable(name: str) -> str:
    """A file's name as a terminal can show it on one line, whatever bytes it has."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def summarise_index(videos: Sequence[Video], span: int) -> list[str]:
    """A line of counts, then one for each kind of trouble with the first names and reasons."""
    readable = [video for video in videos if video.info]
    short = [(video, f"{video.info.frames} frames") for video in readable if video.info.frames < span]
    unreadable = [(video, video.reason) for video in videos if not video.info]
    damaged = [(video, video.info.damage) for video in readable if video.info.damage and video.info.frames >= span]
    usable = len(readable) - len(short)
    lines = [f"{len(videos)} MP4 files: {usable} usable, {len(short)} too short, {len(unreadable)} unreadable"]
    too_short = f"too short for a clip of {span} frames"
    for title, found in ((too_short, short), ("unreadable", unreadable), ("usable but damaged", damaged)):
        if found:
            names = [f"{printable(video.name)} ({reason})" for video, reason in found[:NAMED_IN_SUMMARY]]
            rest = len(found) - len(names)
            more = f" and {rest} more (python tools/check_videos.py lists all)" if rest else ""
            lines.append(f"{title}: {', '.join(names)}{more}")
    return lines
