"""Turn the public BAIR robot-pushing TFRecords into folders of MP4 files, without TensorFlow and without loss.

    python tools/bair_to_mp4.py --source softmotion30_44k --out_dir bair --workers 4

The records are those of http://rail.eecs.berkeley.edu/datasets/bair_robot_pushing_dataset_v0.tar, unpacked. Files below
a folder named test or val go to videos_val/, all others to videos_train/, a clip per record: 30 frames of 64x64 from
image_aux1, the view that the literature uses. The video is H.264 in RGB (libx264rgb, pixel format gbrp) with
quantiser 0, which loses nothing: every clip is read back and compared before it gets its name. Both checksums of each
record are tested; damaged records are named and skipped. A stopped run goes on where it was.
"""

import functools
import io
import math
import os
import re
import struct
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from av import FFmpegError
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.video_reader import probe_video, read_frames
from tools.processes import map_in_processes
from utils.flags import Parser, nonempty_path, positive_int
from utils.io import save_mp4

FRAMES, SIZE, FPS = 30, 64, 10
LITERATURE_VIEW = "image_aux1"
HELD_OUT = {"test", "val", "valid", "validation"}  # names of folders
CRC_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bit-reversed
CRC_START = b"\x54\x64\x1f\x64"  # turns a register of zeros into one of ones, with which the checksum begins
CRC_MASK = 0xA282EAD8  # TFRecord stores checksums rotated by 15 bits plus this
CRC_LANES = 1024  # stretches of a record whose checksums are computed side by side
CONVERTED, THERE_BEFORE = "converted", "there before"


# --- TFRecord ---------------------------------------------------------------------------------------------------------


CRC_TABLE = np.arange(256, dtype=np.uint32)  # the checksum's step for each byte
for _ in range(8):
    CRC_TABLE = CRC_TABLE >> 1 ^ CRC_POLYNOMIAL * (CRC_TABLE & 1)


def crc_advance(state: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Checksum registers [L] after the bytes of columns [W,L], side by side."""
    for column in columns:
        state = CRC_TABLE[(state ^ column) & 0xFF] ^ (state >> 8)
    return state


@functools.cache
def crc_zeros(count: int) -> np.ndarray:
    """What `count` zero bytes make of each bit of a register, [32] uint32: the step is linear over bits."""
    bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
    return crc_advance(bits, np.zeros((count, 1), np.uint8))


def crc32c(data: bytes) -> int:
    """CRC-32C of some bytes, cut into equal lanes (zeros in front change nothing) whose registers advance together.

    Then each lane's register is carried over the next lane by linearity. Source: RFC 3720, appendix B.4.
    """
    data = np.frombuffer(CRC_START + data, np.uint8)
    width = -(-len(data) // CRC_LANES)
    padded = np.zeros(width * CRC_LANES, np.uint8)
    padded[-len(data) :] = data
    lanes = crc_advance(np.zeros(CRC_LANES, np.uint32), padded.reshape(CRC_LANES, width).T)
    carry, bits, total = crc_zeros(width), np.arange(32, dtype=np.uint32), np.uint32(0)
    for lane in lanes:
        total = np.bitwise_xor.reduce(carry[(total >> bits & 1).astype(bool)], initial=np.uint32(0)) ^ lane
    return int(total) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The checksum as TFRecord stores it."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + CRC_MASK) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[bytes | str]:
    """The payload of every record of a TFRecord file, or what is wrong with it.

    After a wrong length there is no telling where the next record begins: that is the last one.

    Source: tensorflow.org/tutorials/load_data/tfrecord, "TFRecords format details".
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            while head := file.read(12):
                if len(head) < 12:
                    yield "the file is cut within the length of this record"
                    return
                length, length_crc = struct.unpack("<QI", head)
                if masked_crc32c(head[:8]) != length_crc:
                    yield "wrong checksum of its length, so the rest of the file is lost"
                    return
                data = file.read(min(length + 4, size))
                if len(data) < length + 4:
                    yield f"the file is cut within this record ({len(data)} of {length + 4} bytes)"
                    return
                record, (data_crc,) = data[:-4], struct.unpack("<I", data[-4:])
                yield record if masked_crc32c(record) == data_crc else "wrong checksum of its data"
    except OSError as error:
        yield f"cannot be read ({error.strerror})"


def count_records(path: Path) -> int:
    """How many records a file seems to hold, from their lengths alone; for a progress bar."""
    count, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            count += 1
            file.seek(min(struct.unpack("<Q", head[:8])[0] + 4, size), os.SEEK_CUR)
    return count


def varint(stream: io.BytesIO) -> int:
    """The next integer of a protobuf message: seven bits a byte, the lowest first."""
    value = shift = 0
    while shift < 70 and (byte := stream.read(1)):
        value |= (byte[0] & 0x7F) << shift
        shift += 7
        if byte[0] < 0x80:
            return value
    raise ValueError("not a protobuf message")


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protobuf message as (number, payload); others are passed over.

    Raises: ValueError: if the message is cut or no protobuf.
    Source: protobuf.dev/programming-guides/encoding.
    """
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, wire = divmod(varint(stream), 8)
        if wire == 0:
            varint(stream)
            continue
        size = varint(stream) if wire == 2 else {1: 8, 5: 4}.get(wire, math.inf)
        if stream.tell() + size > len(message):
            raise ValueError("not a protobuf message")
        payload = stream.read(size)
        if wire == 2:
            yield number, payload


def bytes_features(record: bytes) -> dict[str, bytes]:
    """The first bytes value of every feature of a tf.train.Example, by name.

    Raises: ValueError: if the record is none.
    """
    found = {}
    for _, features in fields(record):  # Example.features
        for _, entry in fields(features):  # Features.feature, a map
            pair = dict(fields(entry))  # 1 key, 2 value
            for kind, values in fields(pair.get(2, b"")):  # Feature: 1 is a BytesList
                value = next((payload for _, payload in fields(values)), None) if kind == 1 else None
                if value is not None and 1 in pair:
                    found[pair[1].decode(errors="replace")] = value
    return found


# --- conversion -------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One TFRecord file, the folder of its clips, and the camera."""

    source: Path
    folder: Path
    view: str


def convert(task: Task) -> list[tuple[str, str]]:
    """Convert one file; returns every record's name with CONVERTED, THERE_BEFORE or why it was skipped.

    Raises: OSError: if a clip cannot be written.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    camera = "" if task.view == LITERATURE_VIEW else f"_{task.view}"  # two views never share a name
    for number, record in enumerate(read_records(task.source)):
        target = task.folder / f"{clip_stem(task.source)}_{number:04d}{camera}.mp4"
        if target.is_file():
            outcome = THERE_BEFORE
        else:
            outcome = record if isinstance(record, str) else write_clip(target, record, task.view)
        outcomes.append((f"{task.source}, record {number}", outcome))
    return outcomes


def clip_stem(source: Path) -> str:
    """A TFRecord file's name without its ending, which may stand before a shard's number."""
    return re.sub(r"\.tfrecords?(?=-|$)", "", source.name)


def write_clip(target: Path, record: bytes, view: str) -> str:
    """Write one record as a clip, compared with its source before it gets its name; returns what became of it."""
    try:
        features = bytes_features(record)
    except ValueError as error:
        return str(error)
    frames = []
    for name in (f"{i}/{view}/encoded" for i in range(FRAMES)):
        if name not in features:
            return f"it has no {name}"
        if len(features[name]) != SIZE * SIZE * 3:
            return f"{name} must be {SIZE * SIZE * 3} bytes of raw RGB (got {len(features[name])})"
        frames.append(np.frombuffer(features[name], np.uint8).reshape(SIZE, SIZE, 3))
    clip = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)  # [3,T,H,W]
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_mp4(temporary, clip, FPS, lossless=True)
        decoded = torch.stack(list(read_frames(temporary, range(FRAMES), probe_video(temporary))), dim=1)
        if not torch.equal(decoded, clip):
            return "the encoded clip differs from its source: this build of FFmpeg is not lossless"
        temporary.replace(target)
    except FFmpegError as error:
        raise OSError(f"{target} cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)
    return CONVERTED


def find_tasks(source: Path, out_dir: Path, view: str) -> list[Task]:
    """Every TFRecord file at or below `source`, with the folder that its split gets.

    Raises: ValueError: if there is none, or if two of one split share a name.
    """
    if not source.exists():
        raise ValueError(f"--source must be a TFRecord file or a folder of them (got {source})")
    paths = [source] if source.is_file() else sorted(p for p in source.rglob("*tfrecord*") if p.is_file())
    if not paths:
        raise ValueError(f"--source {source}: there is no *.tfrecord or *.tfrecords below it")
    tasks: dict[tuple[str, str], Task] = {}
    above = (source.absolute().parent if source.is_file() else source.absolute()).parent
    for path in paths:
        folders = path.absolute().relative_to(above).parts[:-1]  # from the one that is given, or holds the file, on
        side = "videos_val" if HELD_OUT & {folder.lower() for folder in folders} else "videos_train"
        key = side, clip_stem(path)
        if key in tasks:
            raise ValueError(f"--source: {path} and {tasks[key].source} would give clips of one name")
        tasks[key] = Task(path, out_dir / side, view)
    return list(tasks.values())


def build_parser() -> Parser:
    """Every flag."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--source", type=nonempty_path, required=True, help="folder of TFRecords (softmotion30_44k), or one file")
    add("--out_dir", type=nonempty_path, required=True, help="folder that gets videos_train/, videos_val/")
    add("--view", default=LITERATURE_VIEW, help="camera: image_aux1, as the literature, or image_main")
    add("--workers", type=positive_int, default=1, help="files converted at once")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 1 a process was killed, 2 wrong input or nothing converted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    counts = {CONVERTED: 0, THERE_BEFORE: 0, "skipped": 0}
    with parser.one_line_end("stopped; the same command goes on where it was"):
        tasks = find_tasks(Path(args.source), Path(args.out_dir), args.view)
        total = sum(count_records(task.source) for task in tasks)
        outcomes = chain.from_iterable(map_in_processes(convert, tasks, args.workers))
        for record, outcome in tqdm(outcomes, "converting", total, unit="clip", disable=None):
            counts[outcome if outcome in counts else "skipped"] += 1
            if outcome not in counts:
                tqdm.write(f"skipped {record}: {outcome}", file=sys.stderr)
    print(f"{args.out_dir}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if not counts[CONVERTED] + counts[THERE_BEFORE]:
        parser.error(f"--source {args.source}: no record could be converted")
    print("lossless (libx264rgb, gbrp, quantiser 0): every converted clip was read back and equals its source")
    return 0


if __name__ == "__main__":
    sys.exit(main())
