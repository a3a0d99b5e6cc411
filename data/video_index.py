"""Find video files, index what is in them, and split them into training and validation."""

import hashlib
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.synthetic_videos import make_synthetic_videos
from data.video_reader import DECODE_ERRORS, FORMATS, VideoInfo, probe_video
from utils.flags import MNIST_PREFIX
from utils.io import atomic_write

DEFAULT_CACHE_DIR = "outputs/cache"
# A folder with one of these words in its name, as in "train_256", holds the files of a split.
SPLITS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "eval", "dev", "holdout", "held"},
    "test": {"test", "testing"},
}
INDEX_VERSION = 3  # change it whenever VideoInfo or its meaning changes
PART_SPANS = 16  # clips' lengths that a part of a long video has at least
FILM_PARTS = 10  # of a single short video, so that the last can be held out
SAVE_EVERY = 1000  # files that are new to the index
MAX_NAMED = 20  # bad files that a report names

Log = Callable[[str], None]


class Video(NamedTuple):
    """A file of the index, or a part of a long one."""

    path: str
    name: str  # its path below the root
    info: VideoInfo | None
    reason: str  # why there is no info, or what is damaged, or ""
    part: range | None = None  # the frames that clips are taken from; None = all

    @property
    def frames(self) -> range:
        """The frames that clips are taken from."""
        return self.part or range(self.info.frames)


def find_videos(root: str | Path, log: Log = lambda text: None) -> list[Path]:
    """Every video below a folder and its links: each file once, sorted; hidden ones are left out.

    A file's plain name stays, so that adding a link renames nothing; held-out names come first.
    Other files are counted in a line of the log.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"--data_root must be a folder (got {root})")
    found = []
    others = Counter()
    visited = set()
    waiting = [root]
    while waiting:
        # Linked folders wait until all plain ones are done.
        for folder, subfolders, names in os.walk(waiting.pop(0), onerror=_warn):
            real = os.path.realpath(folder)
            shown = sorted(name for name in subfolders if not name.startswith("."))
            subfolders[:] = [] if real in visited else shown
            if real in visited:  # a link led back here
                continue
            visited.add(real)
            paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
            found += [path for path in paths if path.suffix.lower() in FORMATS]
            others.update(path.suffix for path in paths if path.suffix.lower() not in FORMATS)
            waiting += [
                Path(folder, name) for name in subfolders if Path(folder, name).is_symlink()
            ]

    if others:
        kinds = ", ".join(f"{count} {kind or 'without a suffix'}" for kind, count in others.items())
        log(f"note: files that are no videos are left out: {kinds}")

    def rank(path: Path) -> tuple[bool, bool]:
        is_held_out = split_of(path.relative_to(root)) in ("val", "test")
        return not is_held_out, path.is_symlink()

    unique = {}
    for path in sorted(found, key=rank):
        unique.setdefault(os.path.realpath(path), path)
    return sorted(unique.values())


def split_of(name: Path) -> str | None:
    """The split that one of the folders of a path below the root names, if any.

    Of several such folders the one of fewest words counts: "training_videos/val" holds "val".
    """
    words = [re.findall("[a-z]+", folder.lower()) for folder in name.parts[:-1]]
    for folder in sorted(words, key=len):
        found = [split for split, names in SPLITS.items() if names.intersection(folder)]
        if len(found) == 1:  # "train_val" names none
            return found[0]
    return None


def _warn(error: OSError) -> None:
    print(f"could not look into {error.filename} ({error.strerror})", file=sys.stderr)


class VideoIndex:
    """What a full decode found in each file below `root`, kept in `cache_dir`.

    An entry stays valid while the size and modification time of its file do. A file that could
    not be read has none, as it may be readable the next time.
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
        failures = {}
        probes = in_threads(_probe, unknown, workers=self.workers, title="indexing")
        try:
            for number, (path, (info, reason)) in enumerate(zip(unknown, probes, strict=True)):
                self.entries.pop(self.name(path), None)
                if info is None:
                    failures[path] = reason
                else:
                    packed = (pack(info.timestamps), pack(info.keyframes))
                    info = info._replace(timestamps=packed[0], keyframes=packed[1])
                    self.entries[self.name(path)] = [stamps[path], info]
                if number % SAVE_EVERY == SAVE_EVERY - 1:
                    self.save()
        finally:
            if unknown:
                self.save()

        videos = []
        for path in paths:
            info = None
            reason = failures.get(path)
            if reason is None:
                info = VideoInfo(*self.entries[self.name(path)][1])
                # Equal lists are one in memory, as every loading process holds all.
                times = unpack(info.timestamps)
                info = info._replace(timestamps=times, keyframes=unpack(info.keyframes))
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
        text = f"{len(self.seen)} video files: {kinds}"
        if bad:
            more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
            text += f"; short, unreadable or damaged: {', '.join(bad[:MAX_NAMED])}{more}"
        if broken_rule:
            raise ValueError(f"--data_root {self.root}: {broken_rule} (got {text})")
        log(text)


def in_threads(function: Callable, *items: Sequence, workers: int, title: str) -> Iterator:
    """map(function, *items) in threads, since decoding releases the GIL."""
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        yield from tqdm(pool.map(function, *items), title, len(items[0]), disable=None)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the files in hand only


def pack(numbers: Sequence[int]) -> str:
    """Rising numbers as their differences and how often each follows: "0x1 512x29"."""
    steps = [after - before for before, after in pairwise([0, *numbers])]
    return " ".join(f"{step}x{len(list(group))}" for step, group in groupby(steps))


@cache
def unpack(text: str) -> tuple[int, ...]:
    """The numbers of `pack`."""
    runs = [part.split("x") for part in text.split()]
    return tuple(accumulate(int(step) for step, count in runs for _ in range(int(count))))


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
    except (*DECODE_ERRORS, MemoryError) as error:
        return None, reason_of(error)


def reason_of(error: BaseException) -> str:
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
    """A file's place in [0, 1), however accents are encoded; below --val_ratio it is held out."""
    name = unicodedata.normalize("NFC", name)
    return stable_hash(f"{seed}/".encode() + os.fsencode(name)) / 2**64


def clip_span(num_frames: int, frame_stride: int) -> int:
    """Source frames that a clip spans."""
    return (num_frames - 1) * frame_stride + 1


def central_start(video: Video, span: int) -> int:
    """First frame of the central window of `span` frames."""
    return video.frames.start + (len(video.frames) - span) // 2


def divide(video: Video, count: int) -> list[Video]:
    """A video as `count` parts of about one length, in order of time."""
    if count < 2:
        return [video]
    n = video.info.frames
    parts = [range(n * i // count, n * (i + 1) // count) for i in range(count)]
    names = [f"{video.name}, frames {part.start} to {part.stop - 1}" for part in parts]
    return [video._replace(name=name, part=p) for name, p in zip(names, parts, strict=True)]


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

    Folders that SPLITS names are the splits; "test" is held out where there is no "val".
    Otherwise the hash of (seed, name) holds out about `val_ratio` of the files, so that files
    added later move none across. Long videos are divided into parts, so that an epoch sees them
    in proportion to their length; of a single one the last parts are held out.

    Args:
        max_videos: bound on the files of both splits; None = all.

    Raises: ValueError: if a split is empty; it names bad files.
    """
    root = Path(data_root)
    index = VideoIndex(root, cache_dir, workers)
    assigned = index.assigned.setdefault(f"seed {seed}, span {span}", {})
    paths = find_videos(root, log)

    # Divide the files by the names of their folders, or else by their hash.
    by_folder = {split: [] for split in (*SPLITS, None)}
    for path in paths:
        by_folder[split_of(path.relative_to(root))].append(path)
    train = by_folder["train"]
    val = by_folder["val"] or by_folder["test"]
    has_folders = bool(train and val)
    if has_folders:
        rule = "its folders of training and held-out clips must each hold a usable file"
        others = len(paths) - len(train) - len(val)
        if others:
            log(f"note: {others} files outside the folders of both splits are left out")
    else:
        train, val = [], []
        for path in paths:
            name = index.name(path)
            by_hash = "val" if split_key(seed, name) < val_ratio else "train"
            (val if assigned.get(name, by_hash) == "val" else train).append(path)
        rule = "it must hold two usable video files, one for validation, or one of two clips"

    # Look into the files, and leave out what cannot be used.
    splits = []
    limits = share_limit(max_videos, len(train), len(val))
    for paths, limit in zip((train, val), limits, strict=True):
        if limit < len(paths):
            # By hash, so that the choice is spread over the folder.
            paths.sort(key=lambda path: split_key(seed + 1, index.name(path)))
        usable = index.take(paths, limit, span)
        splits.append(sorted(usable, key=lambda video: video.name))
    train, val = splits

    # Let no split be empty.
    if not has_folders and not (train and val) and len(train) + len(val) > 1:
        assigned.update(_fill_empty_split(train, val, seed))
        index.save()

    # Divide long videos, and a single one between both splits.
    if not has_folders and len(train) + len(val) == 1:
        (film,) = train or val
        count = min(film.info.frames // span, max(FILM_PARTS, parts_of(film, span)))
        parts = divide(film, count)
        held_out = max(1, round(val_ratio * count))
        train, val = parts[:-held_out], parts[-held_out:]
    else:
        train, val = (
            [part for video in split for part in divide(video, parts_of(video, span))]
            for split in (train, val)
        )
    index.report(span, log, broken_rule=None if train and val else rule)
    return train, val


def parts_of(video: Video, span: int) -> int:
    """Into how many parts a video is divided."""
    return video.info.frames // (PART_SPANS * span)


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
    index.report(span, log, broken_rule=None if usable else "it must hold a usable video file")
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
    stored = trained_args["data_root"]
    if str(data_root or stored).startswith(MNIST_PREFIX):
        rule = "must be a folder of videos; digits are drawn by evaluation's --protocol smmnist"
        raise ValueError(f"--data_root {rule} (got {data_root or stored})")
    if not data_root and stored and not Path(stored).is_dir():
        raise ValueError(f"--data_root must be given: the checkpoint's own, {stored}, is not here")
    root = data_root or stored or make_synthetic_videos(cache_dir)
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
