"""Frame-accurate decoding of MP4 files with PyAV.

Frames are numbered by what a full decode yields, never by timestamps times rate: variable rates, edit lists and
damaged packets then need no special case. Where that decode also gave rising timestamps, they find a frame again.
Every decoder runs on one thread, since loading is parallel over files.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch import Tensor

# Refused before decoding: a decoder may keep 16 frames for reference, and loading runs in several processes. This is a
# frame of 3840x2160 in 8 bits with colours at half the size (4:2:0); in 10 bits it is 2560x1620.
MAX_FRAME_BYTES = 3840 * 2160 * 3 // 2
# Of a longer video the beginning is used: 6.9e10 pixels are 18 minutes of 1080p at 30 frames per second.
MAX_DECODED_PIXELS = 2**36
MAX_FRAMES = 400_000  # likewise: 3.7 hours at 30 frames per second
# FFmpeg makes an index entry of some tens of bytes for every sample that a file names, and a small file can name
# billions where samples are all of one size. So many, of all tracks, may take no bytes in the file's tables.
MAX_SAMPLES = 10**6  # 9 hours at 30 frames per second
MAX_BOXES = 100_000
CONTAINERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
SIZES_FOLLOW = 0x200 | 0x100 | 0x400 | 0x800  # of trun: a size, duration, flags or offset for each sample
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError)


class VideoInfo(NamedTuple):
    """What one full decode found."""

    frames: int  # how many came out
    width: int  # of a frame as coded, in pixels, before rotation
    height: int
    rotation: int  # degrees counter-clockwise that a frame is to be turned for display
    rate: float  # average frames per second, 0 if the file does not say
    timestamps: Sequence[int]  # of every frame, rising, in the stream's time base; empty = frames must be counted
    keyframes: list[int]  # numbers of the frames where decoding can start, but for the first; needs timestamps
    damage: str  # why packets were lost, or that the file is too long to be used whole; "" if neither


class VideoFile:
    """An open MP4: forced demuxer, local files only, one decoding thread, frame size checked before decoding."""

    def __init__(self, path: str | Path):
        path = Path(path).absolute()
        if not path.is_file():  # a FIFO or device would block for ever
            raise ValueError("not a regular file")
        check_promises(path)
        self.container = av.open(str(path), format="mp4", options={"protocol_whitelist": "file"})
        try:
            if not self.container.streams.video:
                raise ValueError("no video stream")
            self.stream = self.container.streams.video[0]
            context = self.stream.codec_context
            if context is None:
                raise ValueError("unknown video codec")
            self.stream.thread_type = "NONE"
            context.thread_count = 1
            bits = context.format.padded_bits_per_pixel if context.format else 24
            if context.width * context.height * bits > 8 * MAX_FRAME_BYTES:
                got = f"{context.width}x{context.height} in {context.pix_fmt}"
                raise ValueError(f"a frame may take {MAX_FRAME_BYTES / 2**20:.1f} MiB at most (got {got})")
            context.options = {"max_pixels": str(8 * MAX_FRAME_BYTES // bits)}  # for a change of size in mid-stream
        except BaseException:
            self.container.close()
            raise
        self.lost: list[str] = []

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.container.close()

    def decode(
        self, needed_from: int | None = None, copy: Mapping[int, Callable[[av.Packet], None]] | None = None
    ) -> Iterator[av.VideoFrame]:
        """Every frame that comes out, in display order; packets that fail are noted in `lost` and skipped.

        Of the frames before the timestamp `needed_from`, those that no other frame refers to are not decoded. `copy`
        gets the packets of other streams, by their index, as they come along.
        """
        context = self.stream.codec_context
        may_skip = needed_from is not None and context.name == "h264"  # others may not heed it for each packet
        skipping = False
        for packet in self.container.demux([self.stream.index, *(copy or {})]):
            if packet.stream.index != self.stream.index:
                if packet.dts is not None:  # the last one of a stream is empty
                    copy[packet.stream.index](packet)
                continue
            if may_skip and skipping != (packet.pts is not None and packet.pts < needed_from):
                skipping = not skipping
                context.skip_frame = "NONREF" if skipping else "DEFAULT"
            try:
                yield from packet.decode()
            except DECODE_ERRORS as error:
                self.lost.append(type(error).__name__)

    def seek(self, timestamp: int) -> None:
        """Go to the last place at or before `timestamp` (stream time base) where decoding can start."""
        self.container.seek(timestamp, stream=self.stream, backward=True)


def probe_video(path: str | Path) -> VideoInfo:
    """Decode a whole file once and say what is in it; one of DECODE_ERRORS if that is nothing."""
    with VideoFile(path) as video:
        timestamps, keyframes, pixels, damage = [], [], 0, ""
        for frame in video.decode():
            pixels += frame.width * frame.height
            if pixels > MAX_DECODED_PIXELS or len(timestamps) == MAX_FRAMES:
                damage = f"longer than is looked at: its first {len(timestamps)} frames are used"
                break
            if not timestamps:
                width, height, rotation = frame.width, frame.height, frame.rotation
            elif frame.key_frame:
                keyframes.append(len(timestamps))
            timestamps.append(frame.pts)
        if video.lost:
            damage = f"{len(video.lost)} packets failed: {video.lost[0]}"
        frames = len(timestamps)
        if frames == 0:
            raise ValueError(damage or "no frame could be decoded")
        if video.lost or None in timestamps or any(b <= a for a, b in pairwise(timestamps)):
            timestamps, keyframes = [], []
        rate = video.stream.average_rate
        return VideoInfo(frames, width, height, rotation, float(rate) if rate else 0.0, timestamps, keyframes, damage)


def read_frames(path: str | Path, wanted: Sequence[int], info: VideoInfo) -> Iterator[Tensor]:
    """Yield the frames numbered `wanted`, ascending, as uint8 [3,H,W] RGB, upright; raises one of DECODE_ERRORS."""
    reformatter = VideoReformatter()  # one per read: it must never be shared between forked processes
    remaining = list(wanted)
    if info.timestamps and remaining[-1] < info.frames:
        with VideoFile(path) as video:
            start = max((number for number in info.keyframes if number <= remaining[0]), default=0)
            if start:
                video.seek(info.timestamps[start])
            for frame in video.decode(needed_from=info.timestamps[remaining[0]]):
                due = info.timestamps[remaining[0]]
                if frame.pts == due:
                    yield to_rgb(frame, reformatter)
                    remaining.pop(0)
                    if not remaining:
                        return
                elif frame.pts is None or frame.pts > due:
                    break  # the file is not what the index says: below, count from the start

    number = -1
    with VideoFile(path) as video:
        for number, frame in enumerate(video.decode()):  # noqa: B007
            if number == remaining[0]:
                yield to_rgb(frame, reformatter)
                remaining.pop(0)
                if not remaining:
                    return
    raise ValueError(f"ended after {number + 1} frames, {info.frames} were expected")


def to_rgb(frame: av.VideoFrame, reformatter: VideoReformatter, scaling: Interpolation | None = None) -> Tensor:
    """One decoded frame of any pixel format as RGB, uint8 [3,H,W], upright; `scaling` None = FFmpeg's own."""
    pixels = reformatter.reformat(frame, format="rgb24", interpolation=scaling, threads=1).to_ndarray()  # [H,W,3]
    if frame.rotation:
        pixels = np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    # The colours stay interleaved in memory: torch resizes that in a quarter of the time, to the same pixels.
    return torch.from_numpy(pixels).permute(2, 0, 1)


# --- boxes: what an MP4 file promises, before a demuxer believes it; ISO/IEC 14496-12 ---------------------------------


def check_promises(path: Path) -> None:
    """Refuse a file that names more samples, without a table entry for each, than a demuxer should index."""
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
                header, size = 16, int.from_bytes(file.read(8), "big")
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
