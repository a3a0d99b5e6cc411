"""Convert the TFRecords of BAIR robot pushing to MP4, without loss.

    python tools/bair_to_mp4.py --source softmotion30_44k --out_dir bair

Unpack http://rail.eecs.berkeley.edu/datasets/bair_robot_pushing_dataset_v0.tar first. A record
becomes a clip of 30 frames, 64x64: H.264 in RGB with quantiser 0, decoded and compared before it
gets its name. Files below a folder test or val go to videos_val/, others to videos_train/. A
stopped run goes on where it was.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from av import FFmpegError
from torch import Tensor
from tqdm import tqdm

# As a script, Python searches this folder and not the repository.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.video_reader import probe_video, read_frames
from utils.flags import Parser, nonempty_path, positive_int
from utils.io import save_mp4, temporary_path

FRAMES = 30
SIZE = 64
FPS = 10
FRAME_BYTES = SIZE * SIZE * 3
CAMERA = "image_aux1"  # the view that the literature uses, of two

# A record is a protobuf map from names to values. Between a name and the pixels of a frame are the
# field numbers and lengths of three messages: feature (12,294 bytes), bytes_list (12,291), and its
# value (12,288).
BETWEEN_NAME_AND_PIXELS = bytes.fromhex("128660 0a8360 0a8060")


def read_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a TFRecord file; a cut one is the last.

    Source: tensorflow.org/tutorials/load_data/tfrecord
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        # Length, checksum of the length, data, checksum of the data. The checksums are skipped,
        # because Python has no CRC-32C.
        while head := file.read(12):
            length = int.from_bytes(head[:8], "little")
            yield file.read(min(length, size))
            file.seek(4, os.SEEK_CUR)


def read_clip(record: bytes) -> Tensor:
    """The frames of a record, uint8 [3,T,H,W]; ValueError if one is missing."""
    frames = []
    for i in range(FRAMES):
        name = f"{i}/{CAMERA}/encoded".encode()
        entry = b"\n" + bytes([len(name)]) + name + BETWEEN_NAME_AND_PIXELS
        pixels = record.partition(entry)[2][:FRAME_BYTES]
        if len(pixels) < FRAME_BYTES:
            raise ValueError(f"it has no {name.decode()} of {FRAME_BYTES} bytes")
        frames.append(torch.frombuffer(bytearray(pixels), dtype=torch.uint8))
    clip = torch.stack(frames).view(FRAMES, SIZE, SIZE, 3)
    return clip.permute(3, 0, 1, 2)


def convert(target: Path, record: bytes) -> str:
    """Write a record as a clip that decodes to its bits; returns the outcome."""
    if target.is_file():
        return "there before"
    try:
        clip = read_clip(record)
        with temporary_path(target) as temporary:
            save_mp4(temporary, clip, FPS, lossless=True)
            info = probe_video(temporary)
            decoded = list(read_frames(temporary, range(FRAMES), info))
            if not torch.equal(torch.stack(decoded, dim=1), clip):
                raise ValueError("its video differs from its source")
    except ValueError as error:
        tqdm.write(f"skipped {target.name}: {error}", file=sys.stderr)
        return "skipped"
    except FFmpegError as error:
        raise OSError(f"{target} cannot be written ({error})") from error
    return "converted"


def convert_all(source: Path, out_dir: Path, workers: int) -> Counter:
    """Convert a file or a folder of files; returns how many records had each outcome."""
    outcomes = Counter()
    paths = [source] if source.is_file() else sorted(source.rglob("*.tfrecords"))
    # The name of the folder that is given may tell the split, those above it do not.
    above = len(source.absolute().parts) - (2 if source.is_file() else 1)
    with ThreadPoolExecutor(workers) as pool:
        for path in paths:
            folders = path.absolute().parts[above:-1]
            split = "videos_val" if {"test", "val"}.intersection(folders) else "videos_train"
            folder = out_dir / split
            folder.mkdir(parents=True, exist_ok=True)
            # The 256 records of a file are 190 MB.
            records = list(read_records(path))
            targets = [folder / f"{path.stem}_{i:04d}.mp4" for i in range(len(records))]
            running = pool.map(convert, targets, records)
            outcomes.update(tqdm(running, path.stem, len(records), disable=None))
    return outcomes


def build_parser() -> Parser:
    """Define the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", type=nonempty_path, required=True, help="folder of *.tfrecords, or one file")
    add("--out_dir", type=nonempty_path, required=True, help="folder for the two splits")
    add("--workers", type=positive_int, default=1, help="clips converted at once")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run; exit status 0 = done, 2 = wrong input or no clip."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.one_line_errors("stopped; the same command goes on"):
        outcomes = convert_all(Path(args.source), Path(args.out_dir), args.workers)
        if outcomes.keys() <= {"skipped"}:
            raise ValueError(f"--source must hold whole BAIR records (got {args.source})")
        print(", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
