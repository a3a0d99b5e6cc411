"""Find MP4 files, index what is in them, and split them into training and validation."""

import copy
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
        content = {"version": INDEX_VERSION, "root": str(self.root), "assigned": self.assigned, "entries": self.entries}
        if content == self.stored:
            return
        try:
            with atomic_write(self.path) as file:
                file.write(json.dumps(content).encode())
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
    log: Callable[[str], None] = print,
) -> tuple[list[Video], list[Video]]:
    """The usable files of the training and the validation split, both non-empty.

    Folders videos_train/ and videos_val/ (or train/ and val/, or train/ and test/) under the root are the splits;
    otherwise each file goes by the hash of (seed, relative path), so that adding files moves none across.

    Args:
        span: source frames that a clip needs, see `clip_span`.
        val_ratio: share of files for validation where folders do not say.
        max_videos: upper bound on the files of both splits together; None = all.
        workers: files decoded at once while indexing.
        log: receives the summary, a line at a time.

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
            natural = "val" if split_key(seed, index.name(path)) < val_ratio else "train"
            (val if assigned.get(index.name(path), natural) == "val" else train).append(path)

    seen: list[Video] = []
    limits = share_limit(max_videos, len(train), len(val))
    sides = []
    for paths, limit in zip((train, val), limits, strict=True):
        if limit < len(paths):  # by hash, not by name, so that the choice is spread over the folder
            paths.sort(key=lambda path: split_key(seed + 1, index.name(path)))
        sides.append(sorted(take_usable(index, paths, limit, span, workers, seen), key=lambda video: video.name))
    if not designated:
        fill_empty_side(sides, seed, assigned)
        index.save()
    for line in summarise_index(seen, span):
        log(line)
    if not all(sides):
        rule = f"{' and '.join(designated)} must each hold" if designated else "it must hold"
        needed = "a usable MP4 file" if designated else "at least two usable MP4 files, one for validation"
        raise ValueError(f"--data_root {root}: {rule} {needed}; {'; '.join(summarise_index(seen, span))}")
    return sides[0], sides[1]


def data_as_trained(trained: Mapping[str, Any], data_root: str | None, cache_dir: str | None) -> tuple[str, str]:
    """The data folder and the folder of its index: as given, or else those of the training of a checkpoint.

    Args:
        trained: a checkpoint's `args`.
        data_root: folder of MP4 files; None = that of training, the built-in clips included.
        cache_dir: where the index is kept; None = as in training.
    """
    cache_dir = cache_dir or trained.get("cache_dir") or "outputs/cache"
    return str(data_root or trained.get("data_root") or make_synthetic_videos(cache_dir)), cache_dir


def split_as_trained(
    trained: Mapping[str, Any], clip_config: Mapping[str, Any], data_root: str, cache_dir: str
) -> tuple[list[Video], list[Video]]:
    """The usable files of both splits, divided as the training of a checkpoint divides this folder.

    Raises: ValueError: as `prepare_videos`.
    """
    span = clip_span(clip_config["num_frames"], clip_config["frame_stride"])
    split = {"val_ratio": trained["val_ratio"], "seed": trained["seed"], "max_videos": trained.get("max_videos")}
    return prepare_videos(data_root, span=span, cache_dir=cache_dir, **split)


def usable_videos(
    data_root: str | Path, span: int, cache_dir: str | Path, limit: int, log: Callable[[str], None] = print
) -> list[Video]:
    """The first files below a folder, by name, that can give a clip of `span` frames; no more are looked at than that.

    Raises: ValueError: if there is none; it counts the files and names the first bad ones.
    """
    seen: list[Video] = []
    usable = take_usable(VideoIndex(data_root, cache_dir), find_videos(data_root), limit, span, 1, seen)
    summary = summarise_index(seen, span)
    if not usable:
        raise ValueError(f"--data_root {data_root}: it must hold a usable MP4 file; {'; '.join(summary)}")
    for line in summary:
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
    index: VideoIndex, paths: Sequence[Path], limit: int, span: int, workers: int, seen: list[Video]
) -> list[Video]:
    """The first `limit` files that can give a clip of `span` frames, looking at no more files than that takes.

    All files looked at join `seen`.
    """
    waiting, usable = list(paths), []
    while waiting and len(usable) < limit:
        count = limit - len(usable)
        videos = index.lookup(waiting[:count], workers)
        waiting = waiting[count:]
        seen += videos
        usable += [video for video in videos if video.info and video.info.frames >= span]
    return usable


def fill_empty_side(sides: list[list[Video]], seed: int, assigned: dict[str, str]) -> None:
    """Move one file to a side that the hash left empty, and remember it in `assigned`; two files are needed."""
    train, val = sides

    def place(video: Video) -> float:
        return split_key(seed, video.name)

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


def summarise_index(videos: Sequence[Video], span: int) -> list[str]:
    """A line of counts, then one for each kind of trouble with the first names and reasons."""

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
            rest = len(names) - NAMED_IN_SUMMARY
            more = f" and {rest} more (python tools/check_videos.py lists all)" if rest > 0 else ""
            lines.append(f"{title}: {', '.join(names[:NAMED_IN_SUMMARY])}{more}")
    return lines
