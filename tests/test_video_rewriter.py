"""A video in, a video out: what is not made anew stays, frame by frame and packet by packet, and so do the times."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from conftest import moving_square, tiny_checkpoint, words, write_mp4

import sample_video_ddpm
from data.video_reader import probe_video, read_frames
from data.video_rewriter import Frame, fill_gaps, insert_frames

pytestmark = pytest.mark.usefixtures("quick")


def shown(count, height, width):
    """Frames [T,H,W,3] uint8 of a moving square."""
    return moving_square(3, count, 64)[:, :, :height, :width].permute(1, 2, 3, 0).numpy()


def stream(levels):
    """Frames of one level each, whose times are squares."""
    return [Frame(torch.full((3, 2, 2), level, dtype=torch.uint8), i * i) for i, level in enumerate(levels)]


def levels(frames):
    return [frame.pixels[0, 0, 0].item() for frame in frames]


@pytest.fixture
def make():
    """Makes frames of level 200 and keeps what it was asked."""

    def make(before, after, count):
        make.asked.append((levels(stream_of(before)), levels(stream_of(after)), count))
        return [torch.full((3, 2, 2), 200, dtype=torch.uint8)] * count

    def stream_of(frames):
        return [Frame(frame, 0) for frame in frames]

    make.asked = []
    return make


def test_gaps_are_filled_from_their_neighbours_and_all_else_stays(make):
    frames = stream(range(12))
    out = list(fill_gaps(iter(frames), [range(2, 4), range(6, 9)], 2, make))
    assert levels(out) == [0, 1, 200, 200, 4, 5, 200, 200, 200, 9, 10, 11]
    assert [frame.pts for frame in out] == [i * i for i in range(12)]
    assert make.asked == [([0, 1], [4, 5], 2), ([4, 5], [9, 10], 3)]


def test_black_frames_are_no_cut(make):
    out = fill_gaps(iter(stream([100, 101, 0, 0, 102, 103])), [range(2, 4)], 2, make)
    assert levels(out) == [100, 101, 200, 200, 102, 103]


def test_a_gap_across_a_cut_stays_as_it_was(make, capsys):
    frames = stream([1, 2, 3, 90, 91, 92, 93])
    assert list(fill_gaps(iter(frames), [range(2, 4)], 2, make)) == frames and make.asked == []
    assert "a scene ends in or beside the gap of 2 frames" in capsys.readouterr().out


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_frames_are_inserted_between_all_neighbours_at_even_times(make, length, k, count):
    out = list(insert_frames(iter(stream(range(length))), count, k, make))
    assert levels(out)[:: count + 1] == list(range(length)) and len(out) == (length - 1) * (count + 1) + 1
    expected = np.interp(np.arange(len(out)) / (count + 1), range(length), [i * i for i in range(length)])
    assert [frame.pts for frame in out] == pytest.approx((count + 1) * expected)
    clip = lambda values: [min(max(value, 0), length - 1) for value in values]  # noqa: E731
    sides = [(clip(range(i + 1 - k, i + 1)), clip(range(i + 1, i + 1 + k)), count) for i in range(length - 1)]
    assert make.asked == sides


def test_nothing_is_made_from_both_sides_of_a_cut(make):
    out = list(insert_frames(iter(stream([1, 2, 3, 90, 91])), 1, 2, make))
    assert levels(out) == [1, 200, 2, 200, 3, 3, 90, 200, 91]
    assert make.asked == [([1, 1], [2, 3], 1), ([1, 2], [3, 3], 1), ([90, 90], [91, 91], 1)]


def add_sound(path, seconds, codec="aac"):
    """The same file, as MOV, with a tone beside it."""
    frames = list(read_frames(path, range(probe_video(path).frames), probe_video(path)))
    info = probe_video(path)
    with av.open(str(path), "w", format="mov") as file:
        video = file.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = *frames[0].shape[1:], "yuv420p"
        sound = file.add_stream(codec, rate=8000)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            file.mux(video.encode(frame))
        tone = np.sin(np.arange(int(8000 * seconds)) / 5)[None] * 0.5
        form, tone = ("fltp", tone.astype("f4")) if codec == "aac" else ("s16", (tone * 2**15).astype("i2"))
        for start in range(0, tone.shape[1], 1024):
            block = av.AudioFrame.from_ndarray(tone[:, start : start + 1024], format=form, layout="mono")
            block.sample_rate, block.pts = 8000, start
            file.mux(sound.encode(block))
        for part in (video, sound):
            file.mux(part.encode(None))
    assert info.frames == len(frames)
    return path


def packets(path):
    """Bytes and times of the sound."""
    with av.open(str(path)) as file:
        return [(bytes(p), p.pts * p.time_base) for p in file.demux(audio=0) if p.dts is not None]


def decoded(path):
    info = probe_video(path)
    return torch.stack(list(read_frames(path, range(info.frames), info))), info


@pytest.fixture(scope="module")
def single(tmp_path_factory, square_videos):
    """A tiny model of one observed frame at each end."""
    return tiny_checkpoint(tmp_path_factory.mktemp("one"), square_videos, *words("--endpoint_context 1 --T 5"))


def run(ckpt, video, out, *flags, status=0):
    argv = ["--ckpt", str(ckpt), "--video", str(video), "--out_dir", str(out), *words("--steps 1 --guidance_scale 1")]
    with pytest.raises(SystemExit) as left:
        raise SystemExit(sample_video_ddpm.main([*argv, *flags]))
    assert left.value.code == status
    return out / "video.mp4"


def test_a_filled_video_keeps_frames_times_and_sound(ckpt, tmp_path):
    source = add_sound(write_mp4(tmp_path / "long.mp4", shown(40, 24, 32)), 4)
    before, info = decoded(source)
    after, made = decoded(run(ckpt, source, tmp_path / "out", *words("--gap 10:13 --gap 20:28 --lossless")))
    anew = [*range(10, 13), *range(20, 28)]
    kept = [i for i in range(40) if i not in anew]
    assert torch.equal(before[kept], after[kept])
    assert all((before[i].int() - after[i].int()).abs().max() > 3 for i in anew)
    assert list(made.timestamps) == list(info.timestamps) and len(packets(source)) > 30
    assert packets(source) == packets(tmp_path / "out" / "video.mp4")
    record = json.loads((tmp_path / "out" / "sample.json").read_text())
    assert record["made"] == 2 and record["made_at"] == [24, 32]
    lossy, _ = decoded(run(ckpt, source, tmp_path / "lossy", *words("--gap 10:13")))
    # colours at a quarter of the resolution, and crf 12
    assert (before[kept].float() - lossy[kept].float()).abs().mean() < 8


def test_inserted_frames_keep_variable_times_and_duration(single, tmp_path):
    times = [0, 1, 2, 5, 6, 9, 10, 11, 15, 16]
    options = {"options": {"bf": "0"}, "pts": times}
    source = write_mp4(tmp_path / "vfr.mp4", shown(10, 24, 32), **options)
    before, info = decoded(source)
    after, made = decoded(run(single, source, tmp_path / "out", *words("--insert 2 --lossless")))
    assert torch.equal(before, after[::3]) and made.frames == 28
    lengths = []
    for path, found in ((source, info), (tmp_path / "out" / "video.mp4", made)):
        with av.open(str(path)) as file:
            base = file.streams.video[0].time_base
            lengths.append([float(time * base) for time in found.timestamps])
            lengths[-1].append(float(file.streams.video[0].duration * base))
    assert lengths[0][:-1] == pytest.approx([time / 10 for time in times])
    assert lengths[1][:-1] == pytest.approx(np.interp(np.arange(28) / 3, range(10), np.array(times) / 10))
    assert lengths[1][-1] == pytest.approx(lengths[0][-1], abs=0.2)  # a frame at the average rate


def test_a_rotated_video_comes_out_upright(single, tmp_path):
    source = write_mp4(tmp_path / "turned.mp4", shown(8, 24, 40))
    data = bytearray(source.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # the matrix of version 0: a quarter turn
    matrix = [0, 0x10000, 0, -0x10000 & 0xFFFFFFFF, 0, 0, 0, 0, 0x40000000]
    data[place : place + 36] = b"".join(value.to_bytes(4, "big") for value in matrix)
    source.write_bytes(data)
    before, info = decoded(source)
    after, made = decoded(run(single, source, tmp_path / "out", *words("--gap 3:5 --lossless")))
    assert info.rotation in (90, -90, 270) and before.shape[2:] == (40, 24) and made.rotation == 0
    assert torch.equal(before[[0, 1, 2, 5, 6, 7]], after[[0, 1, 2, 5, 6, 7]])


@pytest.mark.parametrize("colours", [(1, 1, 1, 1), (5, 6, 6, 2)])  # BT.709, limited range; BT.601, full range
def test_colours_and_the_shape_of_pixels_stay(single, tmp_path, colours):
    source, names = tmp_path / "tagged.mp4", ("colorspace", "color_primaries", "color_trc", "color_range")
    with av.open(str(source), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "yuv420p"
        stream.sample_aspect_ratio = Fraction(16, 11)
        for name, value in zip(names, colours, strict=True):
            setattr(stream.codec_context, name, value)
        plane = np.full((36, 32), 128, np.uint8)
        plane[:24] = 150
        plane[24:30] = 100  # a colour, so that the matrix matters
        for _ in range(6):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(plane, format="yuv420p")))
        file.mux(stream.encode(None))
    found = []
    for path in (source, run(single, source, tmp_path / "out", *words("--gap 2:4"))):
        with av.open(str(path)) as file:
            stream = file.streams.video[0]
            tags = tuple(int(getattr(stream.codec_context, name)) for name in names)
            found.append((tags, stream.sample_aspect_ratio, next(file.decode(stream)).to_ndarray().astype(int)))
    (tags, shape, planes), (tags_after, shape_after, planes_after) = found
    assert tags == tags_after == colours and shape == shape_after == Fraction(16, 11)
    # two conversions that round, and crf 12; another matrix or range would be 8 levels or more off
    assert np.abs(planes - planes_after).max() <= 3


def test_a_damaged_video_is_refused_and_an_unknown_sound_left_out(single, tmp_path, capsys):
    source = add_sound(write_mp4(tmp_path / "a.mp4", shown(30, 24, 32)), 3)
    data = source.read_bytes()
    law = add_sound(write_mp4(tmp_path / "law.mp4", shown(30, 24, 32)), 3, codec="pcm_mulaw")  # not for MP4
    out = run(single, law, tmp_path / "out", *words("--gap 10:12"))
    assert "note: sound track 1 is left out" in capsys.readouterr().out
    with av.open(str(out)) as file:
        assert len(file.streams) == 1
    with av.open(str(source)) as file:
        places = [packet.pos for packet in file.demux(video=0) if packet.size > 50]
    torn = bytearray(data)
    torn[places[1] : places[1] + 40] = bytes(40)
    (tmp_path / "torn.mp4").write_bytes(torn)
    assert probe_video(tmp_path / "torn.mp4").damage
    run(single, tmp_path / "torn.mp4", tmp_path / "none", *words("--gap 10:12"), status=2)
    error = capsys.readouterr().err
    assert "packets failed" in error and error.count("\n") == 1 and not (tmp_path / "none" / "video.mp4").exists()


def test_frames_of_large_or_odd_videos_are_made_smaller_or_as_asked(single, tmp_path, capsys):
    source = write_mp4(tmp_path / "odd.mp4", shown(6, 27, 39), pix_fmt="yuv444p")
    for flags, size in (("", [28, 40]), ("--size 16", [16, 16])):
        run(single, source, tmp_path / "out", *words(f"--gap 2:4 {flags} --overwrite"))
        assert json.loads((tmp_path / "out" / "sample.json").read_text())["made_at"] == size
        assert decoded(tmp_path / "out" / "video.mp4")[0].shape == (6, 3, 27, 39)
    assert sample_video_ddpm.working_size(1080, 1920, 8) == (192, 344)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--video must be given with one of --gap and --insert"),
        ("--gap 3:5 --insert 1", "--video must be given with one of --gap and --insert"),
        ("--gap 5:3", "argument --gap: must be two rising frame numbers, as 12:20 (got 5:3)"),
        ("--gap 1:3", "--gap must leave 2 frames before it, after it and between two (the video has 12) (got 1:3)"),
        ("--gap 3:11", "(got 3:11)"),
        ("--gap 3:5 --gap 6:8", "(got 6:8)"),
        ("--insert 1", "--insert needs a model of --endpoint_context 1, or one that was trained on a range"),
        ("--gap 3:5 --start_images a b --end_images c d", "--video must be given without images"),
        ("--gap 3:5 --T 9", "--video must be given without images, --data_root, --T, --frame_stride"),
        ("--insert 300", "argument --insert: must be an integer in [1, 255] (got 300)"),
    ],
)
def test_wrong_use_is_one_line(ckpt, tmp_path, capsys, flags, message):
    run(ckpt, write_mp4(tmp_path / "a.mp4", shown(12, 24, 32)), tmp_path / "out", *words(flags), status=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "video.mp4").exists()


def test_what_is_no_video_is_one_line_and_a_stop_leaves_no_file(ckpt, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.mp4").write_text("hello")
    run(ckpt, tmp_path / "text.mp4", tmp_path / "out", "--gap", "3:5", status=2)
    error = capsys.readouterr().err
    assert f"--video {tmp_path / 'text.mp4'}: " in error and error.count("\n") == 1

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_video_ddpm, "to_uint8", stop)
    run(ckpt, write_mp4(tmp_path / "a.mp4", shown(12, 24, 32)), tmp_path / "stopped", "--gap", "3:5", status=130)
    assert list((tmp_path / "stopped").iterdir()) == []


def test_frames_that_stay_keep_their_brightness_without_lossless(ckpt, tmp_path):
    source = write_mp4(tmp_path / "v.mp4", shown(12, 24, 32), options={"crf": "4"})

    def luma(path):
        with av.open(str(path)) as file:
            return np.stack([frame.to_ndarray()[:24].astype(float) for frame in file.decode(video=0)])

    made = luma(run(ckpt, source, tmp_path / "out", "--gap", "5:7"))
    kept = [i for i in range(12) if i not in (5, 6)]
    # the fast conversion to RGB and back costs a whole level; what is left is the encoder's
    assert abs((made - luma(source))[kept].mean()) < 0.25
