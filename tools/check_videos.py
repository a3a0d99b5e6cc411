"""Say what is wrong with the MP4 files of a folder, before a training run meets them. Nothing is deleted or changed.

    python data/check_videos.py --data_root /path/to/data_root

Every file is decoded once, as the index of training does, which then need not do it again: the findings are kept in
--cache_dir.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.kinetics_video_dataset import Video, VideoIndex, find_videos, printable
from utils.flags import Parser, nonempty_path, positive_int
from utils.io import save_json


def findings(videos: Sequence[Video], span: int) -> dict[str, str]:
    """What is wrong with each file that is unusable, too short for `span` frames, or damaged, by name."""
    found = {}
    for video in videos:
        if not video.info:
            found[video.name] = f"unreadable: {video.reason}"
        elif video.info.frames < span:
            found[video.name] = f"too short: {video.info.frames} of {span} frames"
        elif video.info.damage:
            found[video.name] = f"usable but damaged: {video.info.damage}"
    return found


def summary(videos: Sequence[Video], span: int) -> list[str]:
    """What the folder holds: counts, frame sizes, lengths and rates."""
    readable = [video.info for video in videos if video.info]
    lines = [f"{len(videos)} MP4 files, {sum(info.frames >= span for info in readable)} usable for {span} frames"]
    if readable:
        sizes = Counter(f"{info.width}x{info.height}" for info in readable).most_common(5)
        lengths = sorted(info.frames for info in readable)
        rates = Counter(f"{info.rate:g}" for info in readable).most_common(5)
        lines += [
            f"frames per file: {lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}",
            "most frequent sizes: " + ", ".join(f"{size} ({count})" for size, count in sizes),
            "most frequent frames per second: " + ", ".join(f"{rate} ({count})" for rate, count in rates),
        ]
    return lines


def build_parser() -> Parser:
    """Every flag."""
    parser = Parser(__doc__)
    parser.add_argument("--data_root", type=nonempty_path, required=True, help="folder of MP4 files, searched through")
    parser.add_argument("--T", dest="num_frames", type=positive_int, default=8, help="frames per clip")
    parser.add_argument("--frame_stride", type=positive_int, default=1, help="source frames between clip frames")
    parser.add_argument("--cache_dir", type=nonempty_path, default="outputs/cache", help="folder for the file index")
    parser.add_argument("--workers", type=positive_int, default=4, help="files decoded at once")
    parser.add_argument("--json", type=nonempty_path, metavar="FILE", help="write the findings to this file, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 reported, whatever was found, 2 wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        paths = find_videos(args.data_root)
        if not paths:
            raise ValueError(f"--data_root {args.data_root}: there is no MP4 file below it")
        videos = VideoIndex(args.data_root, args.cache_dir).lookup(paths, args.workers)
        span = (args.num_frames - 1) * args.frame_stride + 1
        found = findings(videos, span)
        for name, what in found.items():
            print(f"{printable(name)}: {what}")
        print("\n".join(summary(videos, span)))
        if args.json:
            save_json(args.json, {printable(name): what for name, what in found.items()})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
