"""Turn the public BAIR robot-pushing TFRecords into folders of MP4 files, without TensorFlow and without loss.

    python data/bair_to_mp4.py --source softmotion30_44k --out_dir bair --workers 4

The records are those of http://rail.eecs.berkeley.edu/datasets/bair_robot_pushing_dataset_v0.tar, unpacked. Files below
a folder named test or val go to videos_val/, all others to videos_train/, a clip per record: 30 frames of 64x64 from
image_aux1, the view that the literature uses. The video is H.264 in RGB (libx264rgb, pixel format gbrp) with
quantiser 0, which loses nothing: every clip is read back and compared before it gets its name. Both checksums of each
record are tested; damaged records are named and skipped. A stopped run goes on where it was.
"""

import functools
import os
import re
import struct
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils.processes import map_in_processes

from data.video_reader import DECODE_ERRORS, probe_video, read_frames
from utils.flags import Parser, nonempty_path, positive_int
from utils.io import save_mp4

FRAMES, SIZE, FPS = 30, 64, 10
LITERATURE_VIEW = "image_aux1"
HELD_OUT = {"test", "val", "valid", "validation"}  # names of folders
CRC_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), bit-reversed
CRC_MASK = 0xA282EAD8  # TFRecord stores checksums rotated by 15 bits plus this
CRC_LANES = 1024  # stretches of a record whose checksums are computed side by side


# --- TFRecord ---------------------------------------------------------------------------------------------------------


@functools.cache
def crc_table() -> np.ndarray:
    """The checksum's step for each byte, [256] uint32."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = (table >> 1) ^ np.where(table & 1, np.uint32(CRC_POLYNOMIAL), np.uint32(0))
    return table


def crc_advance(state: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Checksum registers [L] after the bytes of columns [W,L], side by side."""
    table = crc_table()
    for column in columns:
        state = table[(state ^ column) & 0xFF] ^ (state >> 8)
    return state


@functools.cache
def crc_zeros(count: int) -> np.ndarray:
    """What `count` zero bytes make of each bit of a register, [32] uint32: the step is linear over bits."""
    bits = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32))
    return crc_advance(bits, np.zeros((count, 1), np.uint8))


def crc32c(data: bytes) -> int:
    """CRC-32C of some bytes.

    The bytes are cut into equal lanes whose registers advance together, and a lane's register is carried over the next
    lane by linearity. Zeros in front change nothing, and a register of ones in front of the data is the same as
    inverting its first four bytes.

    Source: RFC 3720, appendix B.4.
    """
    if len(data) < 4:
        state = crc_advance(np.array([0xFFFFFFFF], np.uint32), np.frombuffer(data, np.uint8)[:, None])
        return int(state[0]) ^ 0xFFFFFFFF
    width = -(-len(data) // CRC_LANES)
    padded = np.zeros(width * CRC_LANES, np.uint8)
    padded[-len(data) :] = np.frombuffer(data, np.uint8)
    padded[-len(data) :][:4] ^= 0xFF
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
    remaining = path.stat().st_size
    with path.open("rb") as file:
        while remaining:
            head = file.read(12)
            if len(head) < 12:
                yield "the file is cut within the length of this record"
                return
            length, length_crc = struct.unpack("<QI", head)
            remaining -= 12
            if masked_crc32c(head[:8]) != length_crc:
                yield "wrong checksum of its length, so the rest of the file is lost"
                return
            if length + 4 > remaining:
                yield f"the file is cut within this record ({remaining} of {length + 4} bytes)"
                return
            data, (data_crc,) = file.read(length), struct.unpack("<I", file.read(4))
            remaining -= length + 4
            yield data if masked_crc32c(data) == data_crc else "wrong checksum of its data"


def count_records(path: Path) -> int:
    """How many records a file seems to hold, from their lengths alone; for a progress bar."""
    count, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(12)) == 12:
            count += 1
            place = file.tell() + struct.unpack("<Q", head[:8])[0] + 4
            if place > size:
                break
            file.seek(place)
    return count


def fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The length-delimited fields of a protobuf message as (number, payload); others are passed over.

    Raises: ValueError: if the message is cut or no protobuf.
    Source: protobuf.dev/programming-guides/encoding.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(message) or shift > 63:
                raise ValueError("not a protobuf message")
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            varint()
            continue
        size = {1: 8, 2: None, 5: 4}.get(wire, -1)
        size = varint() if size is None else size
        if size < 0 or at + size > len(message):
            raise ValueError("not a protobuf message")
        if wire == 2:
            yield number, message[at : at + size]
        at += size


def bytes_features(record: bytes) -> dict[str, memoryview]:
    """The first bytes value of every feature of a tf.train.Example, by name.

    Raises: ValueError: if the record is none.
    """
    found = {}
    for _, features in fields(memoryview(record)):  # Example.features
        for _, entry in fields(features):  # Features.feature, a map
            pair = dict(fields(entry))  # 1 key, 2 value
            for kind, values in fields(pair.get(2, memoryview(b""))):  # Feature: 1 is a BytesList
                value = next((payload for _, payload in fields(values)), None) if kind == 1 else None
                if value is not None and 1 in pair:
                    found[bytes(pair[1]).decode(errors="replace")] = value
    return found


def clip_of(record: bytes, view: str) -> Tensor:
    """A record's frames, uint8 [3,T,H,W].

    Raises: ValueError: saying which frame is missing or of another size.
    """
    features = bytes_features(record)
    frames = []
    for i in range(FRAMES):
        raw = features.get(f"{i}/{view}/encoded")
        if raw is None:
            raise ValueError(f"it has no {i}/{view}/encoded")
        if len(raw) != SIZE * SIZE * 3:
            raise ValueError(f"{i}/{view}/encoded must be {SIZE * SIZE * 3} bytes of raw RGB (got {len(raw)})")
        frames.append(np.frombuffer(raw, np.uint8).reshape(SIZE, SIZE, 3))
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)


# --- conversion -------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of one record: "converted", "there before", or why it was skipped."""

    record: str
    what: str


CONVERTED, THERE_BEFORE = "converted", "there before"


class Task(NamedTuple):
    """One TFRecord file, the folder of its clips, and the camera."""

    source: Path
    folder: Path
    view: str


def convert(task: Task) -> Iterator[Outcome]:
    """Convert one file, a record at a time.

    Raises: OSError or av.FFmpegError: if a clip cannot be written.
    """
    camera = "" if task.view == LITERATURE_VIEW else f"_{task.view}"  # two views never share a name
    records = enumerate(read_records(task.source))
    while True:
        try:
            number, record = next(records)
        except StopIteration:
            return
        except OSError as error:
            yield Outcome(str(task.source), f"cannot be read ({error.strerror})")
            return
        target = task.folder / f"{clip_stem(task.source)}_{number:04d}{camera}.mp4"
        name = f"{task.source}, record {number}"
        if target.is_file():
            yield Outcome(name, THERE_BEFORE)
        elif isinstance(record, str):
            yield Outcome(name, record)
        else:
            yield Outcome(name, write_clip(target, record, task.view))


def clip_stem(source: Path) -> str:
    """A TFRecord file's name without its ending, which may stand before a shard's number."""
    return re.sub(r"\.tfrecords?(?=-|$)", "", source.name)


def write_clip(target: Path, record: bytes, view: str) -> str:
    """Write one record as a clip, compared with its source before it gets its name; returns what became of it."""
    try:
        clip = clip_of(record, view)
    except ValueError as error:
        return str(error)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save_mp4(temporary, clip, FPS, lossless=True)
        decoded = torch.stack(list(read_frames(temporary, range(FRAMES), probe_video(temporary))), dim=1)
        if not torch.equal(decoded, clip):
            return "the encoded clip differs from its source: this build of FFmpeg is not lossless"
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return CONVERTED


def convert_whole(task: Task) -> list[Outcome]:
    """All of one file, for a process of its own."""
    return list(convert(task))


def outcomes(tasks: Sequence[Task], workers: int) -> Iterator[Outcome]:
    """What becomes of every record, converted by so many processes, a file each."""
    if workers <= 1 or len(tasks) < 2:
        for task in tasks:  # here, a record at a time, so that the progress bar moves with each
            yield from convert(task)
        return
    for finished in map_in_processes(convert_whole, tasks, workers):
        yield from finished


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
    parser.add_argument(
        "--source", type=nonempty_path, required=True, help="folder of TFRecords (softmotion30_44k), or one file"
    )
    parser.add_argument(
        "--out_dir", type=nonempty_path, required=True, help="folder that gets videos_train/, videos_val/"
    )
    parser.add_argument("--view", default=LITERATURE_VIEW, help="camera: image_aux1, as the literature, or image_main")
    parser.add_argument("--workers", type=positive_int, default=1, help="files converted at once")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 wrong input or nothing converted."""
    parser = build_parser()
    args = parser.parse_args(argv)
    counts = {CONVERTED: 0, THERE_BEFORE: 0, "skipped": 0}
    try:
        tasks = find_tasks(Path(args.source), Path(args.out_dir), args.view)
        for task in tasks:
            task.folder.mkdir(parents=True, exist_ok=True)
        total = sum(count_records(task.source) for task in tasks)
        for outcome in tqdm(outcomes(tasks, args.workers), "converting", total, unit="clip", disable=None):
            counts[outcome.what if outcome.what in counts else "skipped"] += 1
            if outcome.what not in counts:
                tqdm.write(f"skipped {outcome.record}: {outcome.what}", file=sys.stderr)
    except (*DECODE_ERRORS, BrokenProcessPool) as error:
        parser.error(f"{error}")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on where it was\n")
    print(f"{args.out_dir}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    if not counts[CONVERTED] + counts[THERE_BEFORE]:
        parser.error(f"--source {args.source}: no record could be converted")
    print("lossless (libx264rgb, gbrp, quantiser 0): every converted clip was read back and equals its source")
    return 0


if __name__ == "__main__":
    sys.exit(main())
