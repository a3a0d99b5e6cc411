"""Decoding against files whose every picture says its number."""

import struct

import av
import hostile
import numpy as np
import pytest
import torch
from av.video.reformatter import Colorspace
from conftest import number_of, numbered_frames, write_mp4

from data import video_reader
from data.gap_filler import upright_size
from data.video_reader import DECODE_ERRORS, VideoFile, probe_video, read_frames
from utils.video_utils import to_gray

OPEN_GOP = "open-gop=1:b-adapt=0:keyint=9:scenecut=0"
VARIANTS = {
    "plain": {},
    "b_frames_open_gop": {"options": {"bf": "3", "g": "9", "x264-params": OPEN_GOP}},
    "intra_only": {"options": {"g": "1"}},
    "one_keyframe": {"options": {"g": "250", "bf": "4"}},
    "variable_rate": {"pts": [0, 1, 2, 7, 8, 20, 21, 22, 23, 30, *range(41, 71)]},
    "ten_bit": {"pix_fmt": "yuv420p10le"},
    "full_chroma": {"pix_fmt": "yuv444p"},
    "mpeg4": {"codec": "mpeg4"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_start_and_stride_gives_exactly_the_frames_wanted(make_mp4, variant):
    path = make_mp4(f"{variant}.mp4", count=40, **VARIANTS[variant])
    info = probe_video(path)
    assert (info.frames, info.width, info.height, info.rotation) == (40, 64, 64, 0)
    assert info.damage == "" and len(info.timestamps) == 40
    for known in (info, info._replace(timestamps=[])):
        for first in range(0, 33, 3):
            for stride in (1, 3):
                wanted = [first + n * stride for n in range(3)]
                found = [number_of(frame) for frame in read_frames(path, wanted, known)]
                assert found == wanted


def test_the_index_says_when_frames_are_shown(make_mp4):
    info = probe_video(make_mp4("a.mp4", count=5, pts=[0, 1, 3, 6, 10], options={"bf": "0"}))
    steps = np.array(info.timestamps) / info.timestamps[1]
    assert steps.tolist() == [0, 1, 3, 6, 10]
    assert info.rate == pytest.approx(5 / 1.1)  # the last frame is shown for 0.1 s


def test_seeking_is_used_and_a_wrong_index_does_not_shift_the_frames(make_mp4, monkeypatch):
    path = make_mp4("a.mp4", count=40, options={"g": "10", "bf": "0", "sc_threshold": "0"})
    info = probe_video(path)
    assert info.keyframes == [10, 20, 30]
    sought = []
    seek = VideoFile.seek
    monkeypatch.setattr(VideoFile, "seek", lambda self, t: (sought.append(t), seek(self, t)))
    for wanted, keyframe in (([25, 26], 20), ([30], 30), ([19, 39], 10)):
        assert [number_of(frame) for frame in read_frames(path, wanted, info)] == wanted
        assert sought.pop() == info.timestamps[keyframe] and sought == []
    list(read_frames(path, [9], info))
    assert sought == []
    for wrong in ([t + 1 for t in info.timestamps], [t - 1 for t in info.timestamps], range(40)):
        misled = info._replace(timestamps=list(wrong))
        found = [number_of(frame) for frame in read_frames(path, [25, 26, 39], misled)]
        assert found == [25, 26, 39]


def test_colours_survive_decoding(make_mp4):
    path = make_mp4("a.mp4", count=2, pix_fmt="yuv444p", options={"crf": "0"})
    frame = next(read_frames(path, [1], probe_video(path)))
    truth = torch.from_numpy(numbered_frames(2)[1]).permute(2, 0, 1)
    # 8-bit YUV rounds by two or three levels.
    assert (frame.int() - truth.int()).abs().max() <= 4


@pytest.mark.parametrize(
    ("tag", "matrix"),
    [
        (1, Colorspace.ITU709),
        (5, Colorspace.ITU601),
        (7, Colorspace.SMPTE240M),
        (9, Colorspace.BT2020),
    ],
)
def test_colours_are_read_by_the_matrix_that_the_file_names(tmp_path, tag, matrix):
    blocks = np.random.default_rng(0).integers(30, 226, (3, 3, 3))
    pixels = np.kron(blocks, np.ones((16, 16, 1))).astype(np.uint8)
    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    frame = frame.reformat(format="yuv444p", dst_colorspace=matrix)
    frame.colorspace = tag
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.height = stream.width = 48
        stream.pix_fmt = "yuv444p"
        stream.codec_context.colorspace = tag
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    found = next(read_frames(path, [0], probe_video(path))).permute(1, 2, 0).numpy()
    # 8-bit YUV rounds by one or two levels; another matrix is off by ten and more.
    assert np.abs(found.astype(int) - pixels).max() <= 2


@pytest.mark.parametrize("turn", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0)])
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_display_matrix_turns_and_mirrors_frames_as_players_do(tmp_path, turn, is_mirrored):
    a, b, c, d = turn if not is_mirrored else (-turn[0], -turn[1], *turn[2:])
    path, shown = tmp_path / "a.mp4", tmp_path / "shown.mp4"
    hostile.mp4(path, size=(32, 64))
    entries = [a * 2**16, b * 2**16, 0, c * 2**16, d * 2**16, 0, 0, 0, 2**30]
    matrix = hostile.put(b"tkhd", 44, struct.pack(">9i", *entries))
    shown.write_bytes(matrix(path.read_bytes()))
    plain = next(read_frames(path, [2], probe_video(path)))
    info = probe_video(shown)
    # A pixel (x, y) goes to (a x + c y, b x + d y), shifted into the picture.
    y, x = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
    to_x, to_y = a * x + c * y, b * x + d * y
    expected = torch.zeros(3, *((64, 32) if b else (32, 64)), dtype=torch.uint8)
    expected[:, to_y - to_y.min(), to_x - to_x.min()] = plain
    assert torch.equal(next(read_frames(shown, [2], info)), expected)
    assert upright_size(info) == expected.shape[1:]


def test_frames_shown_at_an_angle_are_refused(tmp_path):
    entries = [46341, 46341, 0, -46341, 46341, 0, 0, 0, 2**30]  # an eighth of a turn
    matrix = hostile.put(b"tkhd", 44, struct.pack(">9i", *entries))
    hostile.video(matrix)(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="angle"):
        probe_video(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.avi", "a.ts", "a.MOV"])
def test_other_containers_are_read_frame_by_frame(tmp_path, name):
    path = tmp_path / name
    codec = {"a.webm": "libvpx", "a.avi": "mpeg4"}.get(name, "libx264")
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 10**6
        for pixels in numbered_frames(12):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
    info = probe_video(path)
    assert info.frames == 12
    assert [number_of(frame) for frame in read_frames(path, [3, 7, 11], info)] == [3, 7, 11]


@pytest.mark.parametrize("shape", [(51, 77), (8, 8), (256, 16)])
def test_odd_sizes_and_gray_decode_to_three_channels(make_mp4, shape):
    path = make_mp4("a.mp4", count=5, height=shape[0], width=shape[1], pix_fmt="gray")
    frame = next(read_frames(path, [4], probe_video(path)))
    assert frame.shape == (3, *shape)
    assert torch.equal(to_gray(frame).expand(3, -1, -1), frame)


@pytest.mark.parametrize("hazard", sorted(hostile.BAD.keys() - {"too_short", "no_permission"}))
def test_what_is_no_video_is_refused(tmp_path, hazard):
    path = tmp_path / f"{hazard}.mp4"
    hostile.BAD[hazard](path)
    with pytest.raises(DECODE_ERRORS):
        probe_video(path)


def test_huge_frames_are_refused_before_decoding(make_mp4, monkeypatch):
    path = make_mp4("a.mp4", count=2)
    monkeypatch.setattr(video_reader, "MAX_FRAME_BYTES", 64 * 64 * 3 // 2)
    assert probe_video(path).frames == 2
    monkeypatch.setattr(video_reader, "MAX_FRAME_BYTES", 64 * 64 * 3 // 2 - 1)
    with pytest.raises(ValueError, match="64x64 in yuv420p"):
        probe_video(path)


@pytest.mark.parametrize(("limit", "value"), [("DECODED_PIXELS", 20 * 64 * 64), ("FRAMES", 20)])
def test_the_beginning_of_an_endless_video_is_used(make_mp4, monkeypatch, limit, value):
    path = make_mp4("a.mp4", count=30)
    monkeypatch.setattr(video_reader, f"MAX_{limit}", value)
    info = probe_video(path)
    assert info.frames == 20 and "its first 20 frames" in info.damage
    assert [number_of(frame) for frame in read_frames(path, [7, 19], info)] == [7, 19]


def test_a_damaged_middle_costs_packets_and_not_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3)).astype(np.uint8)
    # Every packet is large and decodes on its own.
    path = write_mp4(tmp_path / "noisy.mp4", noise, options={"g": "1"})
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    info = probe_video(path)
    assert 20 < info.frames < 30 and "packets failed: InvalidDataError" in info.damage
    assert info.timestamps == info.keyframes == []
    assert len(list(read_frames(path, range(info.frames), info))) == info.frames
    with pytest.raises(ValueError, match=f"ended after {info.frames} frames"):
        list(read_frames(path, [0, info.frames], info))
