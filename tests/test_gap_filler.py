"""Filling gaps: only the missing frames change; order, times, durations, shape and sound stay."""

from fractions import Fraction

import av
import hostile
import numpy as np
import pytest
import torch
from conftest import moving_square, write_mp4

from data.gap_filler import Frame, fill_gaps, fill_video, upright_size
from data.video_reader import VideoFile, probe_video, read_frames


def shown(count, height=24, width=32):
    """Frames [T,H,W,3] uint8 of a moving square."""
    return moving_square(3, count, 64)[:, :, :height, :width].permute(1, 2, 3, 0).numpy()


def decoded(path):
    """All frames, uint8 [T,3,H,W]."""
    info = probe_video(path)
    return torch.stack(list(read_frames(path, range(info.frames), info)))


def planes(path):
    """All frames as decoded, without a conversion."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray() for frame in file.decode(video=0)]).astype(float)


class Generator:
    """Returns frames of levels 200, 201, ... and keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, before, after, count):
        self.calls.append((before, after, count))
        return [torch.full_like(before[0], 200 + i) for i in range(count)]

    def levels(self):
        """The calls, each frame as the level of its first pixel."""
        first = [[[f[0, 0, 0].item() for f in side] for side in call[:2]] for call in self.calls]
        return [(*sides, call[2]) for sides, call in zip(first, self.calls, strict=True)]


def fill(source, gaps, k=2, generate=None, **settings):
    """The filled video, beside its source."""
    with source.with_name("out.mp4").open("wb") as file:
        count = fill_video(source, file, gaps, k, generate or Generator(), **settings)
    assert count == probe_video(source).frames == probe_video(file.name).frames
    return source.with_name("out.mp4")


def stream(levels):
    """Frames of one level each; times are squares and durations are unique."""
    pixels = [torch.full((3, 2, 2), level, dtype=torch.uint8) for level in levels]
    return [Frame(p, i * i, 100 + i) for i, p in enumerate(pixels)]


def levels_of(frames):
    return [frame.pixels[0, 0, 0].item() for frame in frames]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_gaps_are_filled_from_their_neighbours_and_all_else_stays(k):
    generate = Generator()
    frames = stream(range(16))
    out = list(fill_gaps(iter(frames), [range(3, 5), range(8, 11)], k, generate))
    assert levels_of(out) == [0, 1, 2, 200, 201, 5, 6, 7, 200, 201, 202, 11, 12, 13, 14, 15]
    assert [frame[1:] for frame in out] == [frame[1:] for frame in frames]
    first = ([*range(3 - k, 3)], [*range(5, 5 + k)], 2)
    assert generate.levels() == [first, ([*range(8 - k, 8)], [*range(11, 11 + k)], 3)]
    # A gap that lacks a frame after it stays as it was.
    assert list(fill_gaps(iter(frames), [range(9, 17 - k)], k, generate)) == frames


def test_no_more_frames_are_decoded_than_a_gap_needs():
    taken = []
    frames = (taken.append(i) or frame for i, frame in enumerate(stream(range(100))))
    out = fill_gaps(frames, [range(10, 12)], 1, lambda before, after, count: before * count)
    assert [len(taken) for _ in out] == [*range(1, 11), 13, 13, 13, *range(14, 101)]


@pytest.mark.parametrize(
    ("levels", "is_filled"),
    [
        ([100, 101, 0, 0, 102, 103], True),  # what is missing may be black
        ([1, 2, 3, 3, 61, 62], True),  # 59 levels across the gap are motion
        ([1, 2, 3, 3, 62, 63], False),
        ([1, 40, 41, 41, 42, 43], True),
        ([1, 41, 42, 42, 43, 44], False),  # a cut of 40 levels before the gap
        ([1, 2, 3, 3, 4, 44], False),
    ],
)
def test_a_gap_at_a_scene_cut_stays_as_it_was(levels, is_filled, capsys):
    out = list(fill_gaps(iter(stream(levels)), [range(2, 4)], 2, Generator()))
    assert levels_of(out) == ([*levels[:2], 200, 201, *levels[4:]] if is_filled else levels)
    assert ("a scene ends" in capsys.readouterr().out) != is_filled


@pytest.mark.parametrize(("cut", "is_filled"), [(3, True), (12, False)])
def test_a_cut_in_a_dark_scene_is_seen_by_its_contrast(cut, is_filled):
    # Levels 0 to 20 in stripes, and a step of so many levels across the gap.
    stripes = 20 * (torch.arange(16) % 2).expand(3, 16, 16)
    levels = [0, 0, 0, 0, cut, cut]
    frames = [Frame((stripes + level).to(torch.uint8), i, 1) for i, level in enumerate(levels)]
    out = list(fill_gaps(iter(frames), [range(2, 4)], 2, Generator()))
    assert (out[2] is not frames[2]) == is_filled


def chapter(number, title):
    """A chapter of two seconds, as PyAV takes it."""
    place = {"id": number, "start": 2000 * number, "end": 2000 * (number + 1)}
    return {**place, "time_base": Fraction(1, 1000), "metadata": {"title": title}}


def chapters(path):
    """Start and title of each chapter, and the languages of the sound."""
    with av.open(str(path)) as file:
        found = [(c["start"] * c["time_base"], c["metadata"]["title"]) for c in file.chapters()]
        return found, [sound.metadata["language"] for sound in file.streams.audio]


def with_sound(path, codec="mp2"):
    """A video of 40 frames with a tone beside it, and two chapters."""
    with av.open(str(path), "w", format="mov") as file:
        video = file.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 24, 32, "yuv420p"
        sound = file.add_stream(codec, rate=16_000)
        sound.metadata["language"] = "ger"
        file.set_chapters([chapter(0, "one"), chapter(1, "two")])
        for i, pixels in enumerate(shown(40)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            file.mux(video.encode(frame))
        tone = (np.sin(np.arange(64_000) / 5)[None] * 2**14).astype("i2")
        for start in range(0, 64_000, 1152):
            block = tone[:, start : start + 1152]
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, start
            file.mux(sound.encode(frame))
        file.mux([*video.encode(None), *sound.encode(None)])
    return path


def packets(path, kind):
    """Time and duration in seconds, and the bytes, of the packets of a stream."""
    with av.open(str(path)) as file:
        stream = next(s for s in file.streams if s.type == kind)
        found = [p for p in file.demux(stream) if p.dts is not None]
        return sorted((p.pts * p.time_base, p.duration * p.time_base, bytes(p)) for p in found)


def times(path):
    return [packet[:2] for packet in packets(path, "video")]


def test_frames_outside_the_gaps_and_the_sound_stay_bit_for_bit(tmp_path, capsys):
    source = with_sound(tmp_path / "long.mp4")
    generate = Generator()
    gaps = [range(10, 13), range(20, 28)]
    out = fill(source, gaps, generate=generate, lossless=True)
    before, after = decoded(source), decoded(out)
    assert "left out: ['data']" in capsys.readouterr().out  # the chapters' titles are one, too
    assert chapters(out) == chapters(source) == ([(0, "one"), (2, "two")], ["ger"])
    missing = [i for gap in gaps for i in gap]
    kept = [i for i in range(40) if i not in missing]
    assert torch.equal(before[kept], after[kept])
    levels = torch.tensor([*range(200, 203), *range(200, 208)])
    assert torch.equal(after[missing], levels.view(-1, 1, 1, 1).expand_as(after[missing]))
    for (start, end, _), gap in zip(generate.calls, gaps, strict=True):
        assert torch.equal(torch.stack(start), before[gap.start - 2 : gap.start])
        assert torch.equal(torch.stack(end), before[gap.stop : gap.stop + 2])
    assert len(packets(source, "audio")) > 30
    assert packets(source, "audio") == packets(out, "audio")


@pytest.mark.parametrize("lossless", [False, True])
def test_times_and_durations_of_a_variable_rate_stay_exactly(tmp_path, lossless):
    pts = [3, 4, 5, 8, 9, 12, 13, 14, 18, 19]
    # Reordered frames would have no durations of their own in the file.
    source = write_mp4(tmp_path / "vfr.mp4", shown(10), options={"bf": "0"}, pts=pts)
    # The last frame is shown for 1/10 s, though frames last 1/6 s on average.
    tenths = zip(pts, [*np.diff(pts).tolist(), 1], strict=True)
    expected = [(Fraction(time, 10), Fraction(duration, 10)) for time, duration in tenths]
    assert times(source) == expected
    assert times(fill(source, [range(4, 7)], lossless=lossless)) == expected


def test_times_of_reordered_frames_stay_and_false_ones_follow_the_rate(tmp_path, monkeypatch):
    options = {"bf": "3", "x264-params": "b-adapt=0"}
    source = write_mp4(tmp_path / "b.mp4", shown(20), options=options)
    start = times(source)[0][0]
    expected = [(start + Fraction(i, 10), Fraction(1, 10)) for i in range(20)]
    assert times(fill(source, [range(4, 7)])) == expected
    decode = VideoFile.decode

    def with_wrong_times(self, *copiers):
        for number, frame in enumerate(decode(self, *copiers)):
            frame.pts = {2: None, 3: 0}.get(number, frame.pts)
            yield frame

    monkeypatch.setattr(VideoFile, "decode", with_wrong_times)
    assert times(fill(source, [range(4, 7)])) == expected


def write_colour(path, shape=Fraction(1), tags=(2, 2, 2, 0)):
    """Six frames of one colour, with a shape of pixels and tags of colours."""
    names = ("colorspace", "color_primaries", "color_trc", "color_range")
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
        stream.sample_aspect_ratio = shape
        for name, value in zip(names, tags, strict=True):
            setattr(stream.codec_context, name, value)
        frame = np.full((36, 32), 128, np.uint8)
        frame[:24] = 150
        frame[24:30] = 100  # a colour, so that the matrix matters
        for _ in range(6):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="yuv420p")))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("is_turned", [False, True])
def test_a_rotated_video_becomes_upright_and_so_do_its_pixels(tmp_path, is_turned):
    source = write_colour(tmp_path / "turned.mp4", Fraction(16, 11))
    if is_turned:
        turn = hostile.put(b"tkhd", 44, hostile.QUARTER_TURN)
        source.write_bytes(turn(source.read_bytes()))
    out = fill(source, [range(2, 4)], lossless=True)
    before, after = decoded(source), decoded(out)
    size = (32, 24) if is_turned else (24, 32)
    assert upright_size(probe_video(source)) == before.shape[2:] == after.shape[2:] == size
    assert torch.equal(before[[0, 1, 4, 5]], after[[0, 1, 4, 5]])
    assert probe_video(out).rotation == 0
    with av.open(str(out)) as file:
        shape = Fraction(11, 16) if is_turned else Fraction(16, 11)
        assert file.streams.video[0].sample_aspect_ratio == shape


# BT.709 in limited range, BT.601 in full range, and no tags.
@pytest.mark.parametrize("tags", [(1, 1, 1, 1), (5, 6, 6, 2), (2, 2, 2, 0)])
def test_planes_of_luma_and_colour_come_back_as_they_were(tmp_path, tags):
    source = write_colour(tmp_path / "tagged.mp4", tags=tags)
    out = fill(source, [range(2, 4)])
    with av.open(str(out)) as file:
        context = file.streams.video[0].codec_context
        assert (int(context.colorspace), int(context.color_range)) == (tags[0], tags[3])
    # Two conversions that round, and crf 12. Another matrix or range would be
    # off by 8 levels or more.
    kept = [0, 1, 4, 5]
    assert np.abs(planes(out) - planes(source))[kept].max() <= 3


def test_colours_of_every_pixel_stay_where_the_source_has_them(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    frames = np.broadcast_to(pixels, (8, 24, 32, 3))
    source = write_mp4(tmp_path / "v.mp4", frames, pix_fmt="yuv444p", options={"crf": "1"})
    change = decoded(fill(source, [range(3, 5)]))[0].int() - decoded(source)[0]
    # With colours of every second pixel it would be 46 levels.
    assert change.abs().float().mean() < 4


def test_frames_that_stay_keep_their_brightness(tmp_path):
    source = write_mp4(tmp_path / "v.mp4", shown(12), options={"crf": "4"})
    change = (planes(fill(source, [range(5, 7)])) - planes(source))[:, :24]
    # FFmpeg's fast conversion would cost a whole level; the encoder's error stays.
    assert abs(np.delete(change, [5, 6], axis=0).mean()) < 0.25


def test_odd_sizes_stay_and_progress_sees_every_frame(tmp_path):
    source = write_mp4(tmp_path / "odd.mp4", shown(6, 27, 39), pix_fmt="yuv444p")
    seen = []
    progress = lambda frames: (seen.append(frame) or frame for frame in frames)  # noqa: E731
    assert decoded(fill(source, [range(2, 4)], progress=progress)).shape == (6, 3, 27, 39)
    assert len(seen) == 6


def test_a_video_that_changes_its_size_is_refused(tmp_path):
    hostile.two_sizes(tmp_path / "two.mp4")
    with pytest.raises(ValueError, match="size"):
        fill(tmp_path / "two.mp4", [range(2, 4)])


def test_sound_that_mp4_cannot_hold_is_left_out_with_a_note(tmp_path, capsys):
    out = fill(with_sound(tmp_path / "law.mp4", "pcm_mulaw"), [range(10, 12)])
    assert "sound track 1 is left out" in capsys.readouterr().out
    with av.open(str(out)) as file:
        assert not file.streams.audio
