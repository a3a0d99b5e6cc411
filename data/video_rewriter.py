"""A video in, a video out: frames of gaps, or between neighbours, are made anew; all others and the sound are copied.

Frames stream through, so that memory does not grow with the video. Scene cuts, where neighbours differ by CUT_LEVELS or
more on average (the ends of a gap by GAP_LEVELS), are left alone: no frame is made from both sides of one.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import av
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from torch import Tensor

from data.video_reader import VideoFile, VideoInfo, to_rgb

CUT_LEVELS = 40  # of 255, mean over pixels and colours; neighbours of one scene are rarely beyond 20
# FFmpeg's fast conversion to RGB, which clips are read with, loses one of 255 levels of brightness; this one gives luma
# back to the bit when it is converted again.
LUMA_KEPT = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
GAP_LEVELS = 60  # between the ends of a gap, where a scene has moved on


class Frame(NamedTuple):
    """A decoded frame, uint8 [3,H,W] RGB and upright, and its time in units of the stream's time base."""

    pixels: Tensor
    pts: int


Make = Callable[[Sequence[Tensor], Sequence[Tensor], int], Sequence[Tensor]]  # K before, K after, how many -> frames


def is_cut(a: Tensor, b: Tensor, levels: int = CUT_LEVELS) -> bool:
    """Whether two frames uint8 [3,H,W] belong to different scenes."""
    return (a.float() - b.float()).abs().mean().item() >= levels


def fill_gaps(frames: Iterable[Frame], gaps: Sequence[range], k: int, make: Make) -> Iterator[Frame]:
    """The frames with those of the gaps made anew from the K frames before and after; they keep their times.

    Gaps rise, and K frames or more are before, between and after them. A gap across a scene cut stays as it was.
    """
    before, missing, after, todo = deque(maxlen=k), [], [], deque(gaps)
    for number, frame in enumerate(frames):
        if not todo or number < todo[0].start:
            before.append(frame)
            yield frame
        elif number < todo[0].stop:
            missing.append(frame)
        else:
            after.append(frame)
            if len(after) == k:
                yield from filled(before, missing, after, make)
                yield from after
                before.extend(after)
                missing, after = [], []
                todo.popleft()
    yield from chain(missing, after)


def filled(before: Sequence[Frame], missing: Sequence[Frame], after: Sequence[Frame], make: Make) -> Iterator[Frame]:
    """The missing frames made anew, or as they were if a scene ends among the observed ones."""
    # what is missing may be black or torn, and does not count
    neighbours = chain(pairwise(before), pairwise(after))
    across = is_cut(before[-1].pixels, after[0].pixels, GAP_LEVELS)
    if across or any(is_cut(a.pixels, b.pixels) for a, b in neighbours):
        print(f"note: a scene ends in or beside the gap of {len(missing)} frames: they stay as they were")
        yield from missing
        return
    made = make([frame.pixels for frame in before], [frame.pixels for frame in after], len(missing))
    yield from (Frame(pixels, frame.pts) for pixels, frame in zip(made, missing, strict=True))


def insert_frames(frames: Iterable[Frame], count: int, k: int, make: Make) -> Iterator[Frame]:
    """The frames with `count` new ones between each pair of neighbours, in a time base finer by count + 1.

    Where fewer than K frames of the scene come before or after, the outermost stands for those that are missing; across
    a scene cut the frame before it is repeated.
    """
    last = None

    def seen() -> Iterator[Frame]:
        nonlocal last
        for frame in frames:
            last = frame
            yield frame

    for window in windows(seen(), k):
        left, right = window[k - 1], window[k]
        yield Frame(left.pixels, left.pts * (count + 1))
        if is_cut(left.pixels, right.pixels):
            made = [left.pixels] * count
        else:
            before, after = ([frame.pixels for frame in side] for side in (window[k - 1 :: -1], window[k:]))
            made = make(within_scene(before)[::-1], within_scene(after), count)
        step = right.pts - left.pts
        yield from (Frame(pixels, left.pts * (count + 1) + i * step) for i, pixels in enumerate(made, start=1))
    if last is not None:
        yield Frame(last.pixels, last.pts * (count + 1))


def windows(frames: Iterable[Frame], k: int) -> Iterator[list[Frame]]:
    """Each pair of neighbours in the middle of 2 * K frames, where the first and the last stand for what is beyond."""
    frames = iter(frames)
    window = deque([next(frames)] * k, maxlen=2 * k)
    for frame in frames:
        window.append(frame)
        if len(window) == 2 * k:
            yield list(window)
    for _ in range(k - 1):
        window.append(window[-1])
        if len(window) == 2 * k:
            yield list(window)


def within_scene(frames: Sequence[Tensor]) -> list[Tensor]:
    """Frames from the nearest on; from a scene cut on, the last one before it stands for all others."""
    for i, (near, far) in enumerate(pairwise(frames), start=1):
        if is_cut(near, far):
            return [*frames[:i], *[near] * (len(frames) - i)]
    return list(frames)


def upright_size(info: VideoInfo) -> tuple[int, int]:
    """Height and width of a video's frames as they are shown."""
    return (info.width, info.height) if info.rotation % 180 else (info.height, info.width)


def rewrite_video(
    source: str | Path,
    target: BinaryIO,
    info: VideoInfo,
    change: Callable[[Iterator[Frame]], Iterator[Frame]],
    finer: int = 1,
    lossless: bool = False,
) -> int:
    """Write a video whose frames went through `change`, with the sound of the source copied; returns their number.

    Args:
        info: of `probe_video`; without rising timestamps, frames come at an even rate.
        finer: how many times finer the time base of what `change` gives is.
        lossless: H.264 in RGB, every bit kept; otherwise its usual colours at a quarter of the resolution.

    Raises: ValueError or av.FFmpegError: if the video changes its size, or cannot be read or written.
    """
    reformatter = VideoReformatter()
    height, width = upright_size(info)
    pix_fmt = "rgb24" if lossless else "yuv444p" if height % 2 or width % 2 else "yuv420p"
    with VideoFile(source) as video, av.open(target, "w", format="mp4") as output:
        base, rate = video.stream.time_base, Fraction(video.stream.average_rate or 25)
        base = base if info.timestamps else 1 / rate
        stream = output.add_stream("libx264rgb" if lossless else "libx264", rate=rate * finer)
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        # one thread and no macroblock tree: the same bytes every time, see save_mp4
        stream.options = ({"qp": "0"} if lossless else {"crf": "12"}) | {"bf": "0", "threads": "1", "mbtree": "0"}
        stream.codec_context.time_base = base / finer
        colours = describe_picture(video.stream, stream, info.rotation, lossless)
        copy = {sound.index: copier(sound, output) for sound in video.container.streams.audio}

        def frames() -> Iterator[Frame]:
            for number, frame in enumerate(video.decode(copy={i: mux for i, mux in copy.items() if mux})):
                pixels = to_rgb(frame, reformatter, None if lossless else LUMA_KEPT)
                if pixels.shape[1:] != (height, width):
                    raise ValueError(f"frame {number} has another size than the first")
                yield Frame(pixels, frame.pts if info.timestamps else number)

        count, shown_last = 0, round(finer / rate / base)
        for pixels, pts in change(frames()):
            frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            frame = reformatter.reformat(frame, format=pix_fmt, **colours)
            frame.pts, frame.time_base = pts, base / finer
            output.mux(stream.encode(frame))
            count += 1
        for packet in stream.encode(None):
            packet.duration = shown_last  # counts for the last one alone: others are shown until the next
            output.mux(packet)
    return count


def describe_picture(source: Any, target: Any, rotation: int, lossless: bool) -> dict[str, Any]:
    """Tell a new stream the shape of the pixels and the meaning of the colours; returns how to convert RGB to them."""
    shape = source.sample_aspect_ratio
    if shape:
        target.sample_aspect_ratio = 1 / shape if rotation % 180 else shape
    if lossless:
        return {}
    ours, theirs = target.codec_context, source.codec_context
    for name in ("colorspace", "color_primaries", "color_trc", "color_range"):
        setattr(ours, name, getattr(theirs, name))
    hd = theirs.colorspace == Colorspace.ITU709  # all else is converted as BT.601, which is what it was read as
    full = theirs.color_range == ColorRange.JPEG
    return {
        "dst_colorspace": Colorspace.ITU709 if hd else Colorspace.ITU601,
        "dst_color_range": ColorRange.JPEG if full else ColorRange.MPEG,
    }


def copier(sound: Any, output: Any) -> Callable[[av.Packet], None] | None:
    """What writes the packets of a sound track to another file, or None, and a note, where MP4 cannot hold them."""
    try:
        track = output.add_stream_from_template(sound)
    except (av.FFmpegError, ValueError) as error:
        print(f"note: sound track {sound.index} is left out: {error}")
        return None

    def copy(packet: av.Packet) -> None:
        packet.stream = track
        output.mux(packet)

    return copy
