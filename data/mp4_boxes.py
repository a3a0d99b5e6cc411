"""What the boxes of an MP4 file promise, before a demuxer believes it.

FFmpeg makes an index entry of some tens of bytes for every sample that a file names, and a file of a few kilobytes can
name billions where samples are all of one size. Source: ISO/IEC 14496-12.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_SAMPLES = 10**6  # that take no bytes in the file's tables, of all tracks: 9 hours at 30 frames per second
MAX_BOXES = 100_000
CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
SIZES_FOLLOW = 0x200 | 0x100 | 0x400 | 0x800  # of trun: a size, duration, flags or offset for each sample


def check_promises(path: Path) -> None:
    """Raises: ValueError: if a file names more samples, without a table entry for each, than a demuxer should index."""
    samples = 0
    with path.open("rb") as file:
        for number, (kind, start, end) in enumerate(boxes(file, 0, path.stat().st_size)):
            samples += promised(file, kind, start, end)
            if samples > MAX_SAMPLES or number > MAX_BOXES:
                raise ValueError(f"an MP4 may name {MAX_SAMPLES} samples without a table at most (got {samples})")


def boxes(file: BinaryIO, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Every box, those within others after them: its kind, and where its content starts and ends."""
    waiting = [(start, end)]
    while waiting:
        start, end = waiting.pop()
        while start + 8 <= end:
            file.seek(start)
            size, kind = struct.unpack(">I4s", file.read(8))
            header = 8
            if size == 1:  # a long size follows
                header, long_size = 16, file.read(8)
                size = struct.unpack(">Q", long_size)[0] if len(long_size) == 8 else 0
            inner, start = start + header, start + size if size else end
            if start < inner:  # smaller than its own header: what follows is no box
                break
            if kind in CONTAINERS:
                waiting.append((inner, min(start, end)))
            yield kind, inner, min(start, end)


def promised(file: BinaryIO, kind: bytes, start: int, end: int) -> int:
    """How many samples one box names without an entry of its own for each."""
    if kind not in (b"stsz", b"trun") or end - start < 12:
        return 0
    file.seek(start)
    flags, first, second = struct.unpack(">III", file.read(12))
    if kind == b"stsz":  # first = the size of every sample, 0 = a table of them follows
        return second if first else 0
    return max(0, first - (end - start) // 4) if flags & SIZES_FOLLOW else first
