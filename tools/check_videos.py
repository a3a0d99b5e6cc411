"""Say what is wrong with the MP4 files of a folder, before a training run meets them. Nothing is deleted or changed.

    python tools/check_videos.py --data_root /path/to/data_root

Every file is decoded once, as training does to index it: the index is kept in --cache_dir, so that training need not.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.video_index import Video, VideoIndex, clip_span, find_videos, printable
from utils.flags import Parser, nonempty_path, positive_int
from utils.io import save_json


def problem(video: Video, span: int) -> str | None:
    """What is wrong with a file that is unusable, too short for `span` frames, or damaged."""
    if not video.info:
        return f"unreadable: {video.reason}"
    if video.info.frames < span:
        return f"too short: {video.info.frames} of {span} frames"
    return f"usable but damaged: {video.info.damage}" if video.info.damage else None


def summary(videos: Sequence[Video], span: int) -> list[str]:
    """What the folder holds: counts, frame sizes, lengths and rates."""
    readable = [video.info for video in videos if video.info]
    lines = [f"{len(videos)} MP4 files, {sum(info.frames >= span for info in readable)} usable for {span} frames"]
    if readable:
        lengths = sorted(info.frames for info in readable)
        lines.append(f"frames per file: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}")
        sizes, rates = [f"{info.width}x{info.height}" for info in readable], [f"{info.rate:g}" for info in readable]
        for title, values in (("sizes", sizes), ("frames per second", rates)):
            counts = Counter(values).most_common(5)
            lines.append(f"most frequent {title}: " + ", ".join(f"{value} ({count})" for value, count in counts))
    return lines


def build_parser() -> Parser:
    """Every flag."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--data_root", type=nonempty_path, required=True, help="folder of MP4 files, searched through")
    add("--T", dest="num_frames", type=positive_int, default=8, help="frames per clip")
    add("--frame_stride", type=positive_int, default=1, help="source frames between clip frames")
    add("--cache_dir", type=nonempty_path, default="outputs/cache", help="folder for the file index")
    add("--workers", type=positive_int, default=4, help="files decoded at once")
    add("--json", type=nonempty_path, metavar="FILE", help="write what is wrong with each file as JSON, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 reported, whatever is wrong, 2 wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.one_line_end():
        paths = find_videos(args.data_root)
        if not paths:
            raise ValueError(f"--data_root {args.data_root}: there is no MP4 file below it")
        videos = VideoIndex(args.data_root, args.cache_dir).lookup(paths, args.workers)
        span = clip_span(args.num_frames, args.frame_stride)
        problems = {printable(video.name): what for video in videos if (what := problem(video, span))}
        print("\n".join([*(f"{name}: {what}" for name, what in problems.items()), *summary(videos, span)]))
        if args.json:
            save_json(args.json, problems)
    return 0


if __name__ == "__main__":
    sys.exit(main())
