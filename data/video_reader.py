"""Frame-exact decoding of video files with PyAV.

Frames are numbered by what a full decode yields, never by timestamps times rate:
variable rates, edit lists and damaged packets then need no special case. Where
that decode gave rising timestamps, they find a frame again. Decoders run on one
thread, because loading is parallel over files.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from torch import Tensor

# Of each file name's end, the one FFmpeg format that is tried: others may be playlists, which
# name further files.
FORMATS = {
    ".mp4": "mp4",
    ".m4v": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "matroska",
    ".avi": "avi",
    ".ts": "mpegts",
}

# Checked before decoding, because a decoder may keep 16 frames for reference:
# 3840x2160 in 8 bits, with colours at half the resolution.
MAX_FRAME_BYTES = 3840 * 2160 * 3 // 2
# Of longer videos the beginning is used: 18 minutes of 1080p, or 3.7 hours of
# small frames, at 30 frames per second.
MAX_DECODED_PIXELS = 2**36
MAX_FRAMES = 400_000
DECODE_ERRORS = (av.FFmpegError, OSError, ValueError)
# FFmpeg's numbers of the colour matrices that PyAV must be told; others are read right.
MATRICES = {
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,
}


class VideoInfo(NamedTuple):
    """What a full decode found."""

    frames: int
    width: int  # as coded, in pixels, before rotation
    height: int
    rotation: int  # degrees counter-clockwise to turn a frame for display
    rate: float  # average frames per second; 0 = unknown
    timestamps: Sequence[int]  # rising, in the stream's time base; empty = count frames
    keyframes: list[int]  # frames after the first where decoding can start
    damage: str  # why packets were lost or frames left out; "" = neither


class VideoFile:
    """An open local video whose frames have a bounded size, decoded on one thread."""

    def __init__(self, path: str | Path):
        path = Path(path).absolute()
        if not path.is_file():  # a FIFO or a device would block for ever
            raise ValueError("not a regular file" if path.exists() else "no such file")
        known = FORMATS.get(path.suffix.lower(), "mp4")
        self.lost: list[str] = []  # errors of packets that could not be decoded
        self.container = av.open(str(path), format=known, options={"protocol_whitelist": "file"})
        try:
            self.stream = self._first_video_stream()
        except BaseException:
            self.container.close()
            raise

    def _first_video_stream(self) -> av.VideoStream:
        # As players choose: not a cover picture, if there is anything else.
        stream = self.container.streams.best("video")
        if stream is None:
            raise ValueError("no video stream")
        context = stream.codec_context
        if context is None:
            raise ValueError("unknown video codec")
        stream.thread_type = "NONE"
        context.thread_count = 1
        bits = context.format.padded_bits_per_pixel if context.format else 24
        if context.width * context.height * bits > 8 * MAX_FRAME_BYTES:
            rule = f"a frame may take {MAX_FRAME_BYTES / 2**20:.1f} MiB at most"
            got = f"{context.width}x{context.height} in {context.pix_fmt}"
            raise ValueError(f"{rule} (got {got})")
        # Frames may change their size in mid-stream.
        context.options = {"max_pixels": str(8 * MAX_FRAME_BYTES // bits)}
        return stream

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.container.close()

    def decode(
        self, copiers: Mapping[int, Callable[[av.Packet], None]] = MappingProxyType({})
    ) -> Iterator[av.VideoFrame]:
        """Every frame, in display order; packets that fail are noted in `lost`.

        Args:
            copiers: what takes the packets of other streams, by stream index.
        """
        for packet in self.container.demux([self.stream.index, *copiers]):
            index = packet.stream.index
            if index in copiers:
                if packet.dts is not None:  # the last packet of a stream is empty
                    copiers[index](packet)
                continue
            try:
                yield from packet.decode()
            except DECODE_ERRORS as error:
                self.lost.append(type(error).__name__)

    def seek(self, timestamp: int) -> None:
        """Go to the last place at or before it where decoding can start."""
        self.container.seek(timestamp, stream=self.stream, backward=True)


def probe_video(path: str | Path) -> VideoInfo:
    """Decode a whole file once; raises one of DECODE_ERRORS if no frame comes out."""
    timestamps = []
    keyframes = []
    pixels = 0
    damage = ""
    form = None
    reformatter = VideoReformatter()
    with VideoFile(path) as video:
        for frame in video.decode():
            # What the index calls usable can be converted, whatever changes in mid-stream.
            before = form
            form = (frame.width, frame.height, frame.format.name, frame.colorspace)
            if form != before:
                to_rgb(frame, reformatter)
            pixels += frame.width * frame.height
            if pixels > MAX_DECODED_PIXELS or len(timestamps) == MAX_FRAMES:
                damage = f"longer than is looked at: its first {len(timestamps)} frames are used"
                break
            if not timestamps:
                width, height, rotation = frame.width, frame.height, frame.rotation
            elif frame.key_frame:
                keyframes.append(len(timestamps))
            timestamps.append(frame.pts)
        rate = float(video.stream.average_rate or 0)

    if video.lost:
        damage = f"{len(video.lost)} packets failed: {video.lost[0]}"
    frames = len(timestamps)
    if frames == 0:
        raise ValueError(damage or "no frame could be decoded")
    if video.lost or None in timestamps or any(b <= a for a, b in pairwise(timestamps)):
        timestamps, keyframes = [], []
    return VideoInfo(frames, width, height, rotation, rate, timestamps, keyframes, damage)


def read_frames(path: str | Path, wanted: Sequence[int], info: VideoInfo) -> Iterator[Tensor]:
    """Yield the frames numbered `wanted`, rising, as upright RGB, uint8 [3,H,W].

    Raises: one of DECODE_ERRORS: if a frame cannot be had.
    """
    # One for each call, because forked processes must not share it.
    reformatter = VideoReformatter()
    remaining = list(wanted)

    # Find them by their timestamps.
    if info.timestamps and remaining[-1] < info.frames:
        with VideoFile(path) as video:
            start = max((k for k in info.keyframes if k <= remaining[0]), default=0)
            if start:
                video.seek(info.timestamps[start])
            for frame in video.decode():
                if frame.pts == info.timestamps[remaining[0]]:
                    yield to_rgb(frame, reformatter)
                    remaining.pop(0)
                    if not remaining:
                        return

    # Or count from the start, if the file is not what the index says.
    count = 0
    with VideoFile(path) as video:
        for frame in video.decode():
            if count == remaining[0]:
                yield to_rgb(frame, reformatter)
                remaining.pop(0)
                if not remaining:
                    return
            count += 1
    raise ValueError(f"ended after {count} frames, {info.frames} were expected")


def to_rgb(
    frame: av.VideoFrame, reformatter: VideoReformatter, scaling: Interpolation | None = None
) -> Tensor:
    """A decoded frame as it is shown, uint8 [3,H,W]; `scaling` None = FFmpeg's own."""
    rgb = reformatter.reformat(
        frame,
        format="rgb24",
        src_colorspace=MATRICES.get(frame.colorspace),
        interpolation=scaling,
        threads=1,
    )
    pixels = as_shown(rgb.to_ndarray(), frame)  # [H,W,3]
    # Colours stay interleaved in memory: torch resizes that four times faster.
    return torch.from_numpy(pixels).permute(2, 0, 1)


def as_shown(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Turn and flip pixels [H,W,3] by the display matrix of their frame, if it has one.

    Raises: ValueError: if it turns them by another angle than quarters.
    """
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # A pixel (x, y) is shown at (a x + c y, b x + d y), but for a shift.
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    if min(abs(a), abs(b)) > max(abs(a), abs(b)) / 100:
        raise ValueError("its frames are shown at an angle")
    if abs(b) > abs(a):
        pixels = pixels.transpose(1, 0, 2)
        a = c
        d = b
    pixels = pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
    return np.ascontiguousarray(pixels)
