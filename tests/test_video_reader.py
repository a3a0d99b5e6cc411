"""Decoding against files whose every picture says its number."""

import os

import av
import numpy as np
import pytest
import torch
from conftest import number_of, numbered_frames, write_mp4

from data import video_reader
from data.video_reader import DECODE_ERRORS, probe_video, read_frames
from utils.video_utils import to_gray

VARIANTS = {
    "plain": {},
    "b_frames_open_gop": {"options": {"bf": "3", "g": "9", "x264-params": "open-gop=1:b-adapt=0:keyint=9:scenecut=0"}},
    "intra_only": {"options": {"g": "1"}},
    "one_keyframe": {"options": {"g": "250", "bf": "4"}},
    "variable_rate": {"pts": [0, 1, 2, 7, 8, 20, 21, 22, 23, 30, *range(41, 71)]},
    "ten_bit": {"pix_fmt": "yuv420p10le"},
    "full_chroma": {"pix_fmt": "yuv444p"},
    "mpeg4": {"codec": "mpeg4"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_start_and_stride_gives_exactly_the_frames_asked_for(make_mp4, variant):
    path = make_mp4(f"{variant}.mp4", count=40, **VARIANTS[variant])
    info = probe_video(path)
    assert (info.frames, info.width, info.height, info.rotation, info.damage) == (40, 64, 64, 0, "")
    for first in range(0, 33, 3):
        for stride in (1, 3):
            wanted = [first + n * stride for n in range(3)]
            assert [number_of(frame) for frame in read_frames(path, wanted, info)] == wanted


def test_seeking_is_used_and_a_container_that_seeks_elsewhere_is_decoded_from_its_start(make_mp4, monkeypatch):
    path = make_mp4("a.mp4", count=40, options={"g": "10", "bf": "0", "sc_threshold": "0"})
    info = probe_video(path)
    assert info.keyframes == [10, 20, 30]
    sought = []
    seek = video_reader.VideoFile.seek
    monkeypatch.setattr(video_reader.VideoFile, "seek", lambda self, pts: (sought.append(pts), seek(self, pts)))
    assert [number_of(f) for f in read_frames(path, [25, 26], info)] == [25, 26]
    assert sought == [info.timestamps[20]]
    # an index that is wrong about timestamps must not shift the frames
    for wrong in ([t + 1 for t in info.timestamps], [t - 1 for t in info.timestamps], list(range(40))):
        misled = info._replace(timestamps=wrong)
        assert [number_of(f) for f in read_frames(path, [25, 26, 39], misled)] == [25, 26, 39]


def test_frames_that_are_skipped_on_the_way_change_no_pixel_of_those_wanted(tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 64, 64, 3)) + np.arange(36).reshape(-1, 1, 1, 1) * 3  # motion in every block
    frames = np.stack([np.roll(frame, 2 * i, axis=1) for i, frame in enumerate(frames)]) % 256
    options = {"bf": "6", "g": "250", "x264-params": "b-pyramid=normal:b-adapt=0:ref=4"}
    path = write_mp4(tmp_path / "a.mp4", frames.astype(np.uint8), options=options)
    info = probe_video(path)
    assert len(info.timestamps) == 36 and info.keyframes == []
    with video_reader.VideoFile(path) as video:
        assert len(list(video.decode(needed_from=info.timestamps[30]))) < 36  # something is skipped at all
    counted = list(read_frames(path, range(36), info._replace(timestamps=[])))
    for first in range(0, 34, 3):
        for frame, truth in zip(read_frames(path, [first, first + 2], info), counted[first::2], strict=False):
            assert torch.equal(frame, truth)


def test_colours_survive_decoding(make_mp4):
    path = make_mp4("a.mp4", count=2, pix_fmt="yuv444p", options={"crf": "0"})
    frame = next(read_frames(path, [1], probe_video(path)))
    truth = torch.from_numpy(numbered_frames(2)[1]).permute(2, 0, 1)
    # 8-bit YUV rounds: two or three levels
    assert (frame.int() - truth.int()).abs().max() <= 4


def test_rotation_metadata_turns_the_frame_upright(make_mp4, tmp_path):
    path = make_mp4("a.mp4", count=3, height=32, width=64, pix_fmt="yuv444p")
    data = bytearray(path.read_bytes())
    identity = b"".join(n.to_bytes(4, "big") for n in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30))
    quarter = b"".join((n % 2**32).to_bytes(4, "big") for n in (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30))
    place = data.index(identity, data.index(b"tkhd"))
    data[place : place + 36] = quarter  # a display matrix of 90 degrees clockwise
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    plain, info = probe_video(path), probe_video(turned)
    assert (info.frames, info.width, info.height, abs(info.rotation)) == (3, 64, 32, 90)
    upright = next(read_frames(path, [2], plain))
    shown = next(read_frames(turned, [2], info))
    assert shown.shape == (3, 64, 32)
    assert torch.equal(shown, torch.rot90(upright, -1, (1, 2)))  # clockwise, as players show it


@pytest.mark.parametrize("shape", [(51, 77), (8, 8), (256, 16)])
def test_odd_sizes_decode(make_mp4, shape):
    height, width = shape
    path = make_mp4("a.mp4", count=5, height=height, width=width, pix_fmt="yuv444p")
    assert next(read_frames(path, [4], probe_video(path))).shape == (3, height, width)


def test_gray_files_decode_to_three_equal_channels(tmp_path):
    frames = np.repeat(numbered_frames(4)[..., :1], 3, axis=3)
    path = write_mp4(tmp_path / "gray.mp4", frames, pix_fmt="gray")
    frame = next(read_frames(path, [3], probe_video(path)))
    assert torch.equal(frame[0], frame[1])
    assert torch.equal(to_gray(frame), frame[:1])


def test_everything_that_is_no_video_is_refused_at_once(tmp_path, make_mp4):
    whole = make_mp4("whole.mp4", count=30).read_bytes()
    contents = [b"", b"not a video\n" * 50, whole[: len(whole) // 3]]  # the last: its index stands at the end
    contents += [b"\x89PNG\r\n\x1a\n" + bytes(200), b"ffconcat version 1.0\nfile whole.mp4\n"]
    *files, folder, pipe, missing = paths = [tmp_path / "videos" / f"{i}.mp4" for i in range(8)]
    for path, content in zip(files, contents, strict=True):
        path.write_bytes(content)
    folder.mkdir()
    os.mkfifo(pipe)
    assert not missing.exists()
    for path in paths:
        with pytest.raises(DECODE_ERRORS):
            probe_video(path)


def test_sound_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="no video stream"):
        probe_video(path)


def test_huge_frames_are_refused_before_decoding(make_mp4, monkeypatch):
    path = make_mp4("a.mp4", count=2)
    monkeypatch.setattr(video_reader, "MAX_FRAME_BYTES", 64 * 64 * 3 // 2)
    assert probe_video(path).frames == 2
    monkeypatch.setattr(video_reader, "MAX_FRAME_BYTES", 64 * 64 * 3 // 2 - 1)
    with pytest.raises(ValueError, match="a frame may take 0.0 MiB at most .got 64x64 in yuv420p"):
        probe_video(path)


def test_of_an_endless_video_the_beginning_is_used(make_mp4, monkeypatch):
    path = make_mp4("a.mp4", count=30)
    monkeypatch.setattr(video_reader, "MAX_DECODED_PIXELS", 20 * 64 * 64)
    info = probe_video(path)
    assert info.frames == 20 and info.damage == "longer than is looked at: its first 20 frames are used"
    assert [number_of(frame) for frame in read_frames(path, [7, 19], info)] == [7, 19]


def test_a_damaged_middle_costs_packets_not_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3)).astype(np.uint8)
    path = write_mp4(tmp_path / "noisy.mp4", noise, options={"g": "1"})  # big packets, each on its own
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 9000] = bytes(9000)
    path.write_bytes(data)
    info = probe_video(path)
    assert 20 < info.frames < 30 and "packets failed: InvalidDataError" in info.damage and info.keyframes == []
    assert len(list(read_frames(path, list(range(info.frames)), info))) == info.frames
    with pytest.raises(ValueError, match=f"ended after {info.frames} frames"):
        list(read_frames(path, [0, info.frames], info))
