"""Fill the gaps of a video: their frames are generated, all else stays.

Frames stream through, so that memory does not grow with the video. Nothing is
generated across a scene cut: such a gap stays as it was.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from data.video_reader import MATRICES, VideoFile, VideoInfo, to_rgb
from utils.io import add_h264_stream

# Mean difference of frames across a cut, in units of their contrast and in levels of 255. Within a
# scene of usual contrast, about 50 levels, it is rarely above 20 levels.
CUT = (0.8, 40)
GAP = (1.2, 60)  # between the ends of a gap, where a scene has moved on
NOISE_LEVELS = 4  # a smaller difference is none
# FFmpeg's fast conversion to RGB loses a level of brightness. After this one,
# the conversion back returns the same luma.
LUMA_KEPT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


class Frame(NamedTuple):
    """Upright RGB, uint8 [3,H,W], and its time in units of the stream's time base."""

    pixels: Tensor
    pts: int
    duration: int


# From K frames before and K after, a number of frames between them.
Generate = Callable[[Sequence[Tensor], Sequence[Tensor], int], Sequence[Tensor]]


def upright_size(info: VideoInfo) -> tuple[int, int]:
    """Height and width of a video's frames as they are shown."""
    if info.rotation % 180:
        return info.width, info.height
    return info.height, info.width


def fill_video(
    source: str | Path,
    target: BinaryIO,
    gaps: Sequence[range],
    k: int,
    generate: Generate,
    lossless: bool = False,
    progress: Callable[[Iterator[Frame]], Iterable[Frame]] = iter,
) -> int:
    """Write a video with its gaps filled and its sound copied; returns its frames.

    Args:
        gaps: rising frame numbers, with K frames before, between and after them.
        generate: takes and returns upright frames, uint8 [3,H,W].
        lossless: keep every bit of the other frames, as H.264 in RGB.
        progress: wraps the iterator of decoded frames.

    Raises: ValueError or av.FFmpegError: if the video changes its size, or cannot
        be read or written.
    """
    # The first frame says how large upright frames are.
    reformatter = VideoReformatter()
    with VideoFile(source) as video:
        first = next(video.decode(), None)
        if first is None:
            raise ValueError("no frame could be decoded")
        size = to_rgb(first, reformatter).shape[1:]

    with VideoFile(source) as video, av.open(target, "w", format="mp4") as output:
        # The new video has the clock, the pixel shape and the colours of the old one.
        base = video.stream.time_base
        rate = Fraction(video.stream.average_rate or 25)
        stream = add_h264_stream(output, size, rate, lossless)
        if not lossless and "444" in str(video.stream.pix_fmt):
            stream.pix_fmt = "yuv444p"  # all of its colours
        stream.options = {**stream.options, "bf": "0"}
        stream.codec_context.time_base = base
        shape = video.stream.sample_aspect_ratio
        if shape:
            stream.sample_aspect_ratio = 1 / shape if first.rotation % 180 else shape
        colours = {} if lossless else _copy_colours(video.stream, stream)

        # What stands beside the video is copied, or named where it is left out.
        output.metadata.update(video.container.metadata)
        output.set_chapters(video.container.chapters())
        copiers = {sound.index: _copier(sound, output) for sound in video.container.streams.audio}
        kept = (video.stream.index, *copiers)
        left_out = [other.type for other in video.container.streams if other.index not in kept]
        if left_out:
            print(f"note: tracks other than one video and sound are left out: {left_out}")

        def frames() -> Iterator[Frame]:
            usual = round(1 / rate / base)
            pts = None
            for decoded in video.decode(copiers):
                pixels = to_rgb(decoded, reformatter, None if lossless else LUMA_KEPT)
                if pixels.shape[1:] != size:
                    raise ValueError(f"its frames change their size at {decoded.time} s")
                # A time that is missing or does not rise follows at the usual rate.
                if pts is None:
                    pts = decoded.pts or 0
                elif decoded.pts is not None and decoded.pts > pts:
                    pts = decoded.pts
                else:
                    pts += usual
                yield Frame(pixels, pts, decoded.duration or usual)

        # Encode frame by frame.
        count = 0
        for filled in fill_gaps(progress(frames()), gaps, k, generate):
            rgb = filled.pixels.permute(1, 2, 0).contiguous().numpy()
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = reformatter.reformat(frame, format=stream.pix_fmt, **colours)
            frame.pts = filled.pts
            frame.time_base = base
            output.mux(stream.encode(frame))
            count += 1
        for packet in stream.encode(None):
            # Only the last one's counts: others are shown until the next.
            packet.duration = filled.duration
            output.mux(packet)
    return count


def fill_gaps(
    frames: Iterable[Frame], gaps: Sequence[range], k: int, generate: Generate
) -> Iterator[Frame]:
    """Replace the pixels of the frames in the gaps; see `fill_video`."""
    before = deque(maxlen=k)
    missing = []
    after = []
    waiting = deque(gaps)
    for number, frame in enumerate(frames):
        if not waiting or number < waiting[0].start:
            before.append(frame)
            yield frame
        elif number < waiting[0].stop:
            missing.append(frame)
        else:
            after.append(frame)
            if len(after) == k:
                yield from _fill_gap(before, missing, after, generate)
                yield from after
                before.extend(after)
                missing = []
                after = []
                waiting.popleft()
    yield from chain(missing, after)


def _fill_gap(
    before: Sequence[Frame], missing: Sequence[Frame], after: Sequence[Frame], generate: Generate
) -> Iterator[Frame]:
    # What is missing may be black or torn, so it is not looked at.
    steps = chain(pairwise(before), pairwise(after))
    if _is_cut(before[-1], after[0], *GAP) or any(_is_cut(*pair, *CUT) for pair in steps):
        gap = f"the gap of {len(missing)} frames"
        print(f"note: a scene ends in or beside {gap}: they stay as they were")
        yield from missing
        return
    sides = [[frame.pixels for frame in side] for side in (before, after)]
    for pixels, frame in zip(generate(*sides, len(missing)), missing, strict=True):
        yield frame._replace(pixels=pixels)


def _is_cut(a: Frame, b: Frame, share: float, levels: float) -> bool:
    pixels = torch.stack([a.pixels, b.pixels]).float()
    contrast = (pixels - pixels.mean((1, 2, 3), keepdim=True)).abs().mean()
    difference = (pixels[0] - pixels[1]).abs().mean()
    if contrast < 1:  # frames of one colour, as in a fade
        return bool(difference >= levels)
    return bool(difference >= max(NOISE_LEVELS, min(levels, share * contrast)))


def _copy_colours(source: av.VideoStream, target: av.VideoStream) -> dict[str, Any]:
    """Copy the tags of colours; returns how to convert RGB to them."""
    tags = source.codec_context
    for name in ("colorspace", "color_trc", "color_primaries", "color_range"):
        setattr(target.codec_context, name, getattr(tags, name))
    # All others are read as BT.601.
    matrices = {1: Colorspace.ITU709, **MATRICES}
    full = tags.color_range == ColorRange.JPEG
    return {
        "dst_colorspace": matrices.get(tags.colorspace, Colorspace.ITU601),
        "dst_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
    }


def _copier(sound: av.AudioStream, output: Any) -> Callable[[av.Packet], None]:
    """A function that writes packets of a sound track, or drops what MP4 cannot hold."""
    try:
        track = output.add_stream_from_template(sound)
        track.metadata.update(sound.metadata)
    except (av.FFmpegError, ValueError) as error:
        print(f"note: sound track {sound.index} is left out: {error}")
        return lambda packet: None

    def copy(packet: av.Packet) -> None:
        packet.stream = track
        output.mux(packet)

    return copy
