"""The BAIR converter on records in the published layout, whole and damaged."""

import struct
import sys

import numpy as np
import pytest
import torch

from data.video_index import prepare_videos
from data.video_reader import read_frames
from tools import bair_to_mp4


def delimited(number, payload):
    """A field of a protobuf message; its length has seven bits a byte, the lowest first."""
    length = [len(payload)]
    while length[-1] > 127:
        length[-1:] = [length[-1] & 127 | 128, length[-1] >> 7]
    return bytes([number << 3 | 2, *length]) + payload


def framed(payload):
    """A record of a TFRecord file; nobody reads the two checksums."""
    return struct.pack("<QI", len(payload), 123) + payload + struct.pack("<I", 456)


def pictures(seed):
    """30 frames [T,H,W,3] of noise: the hardest thing to keep through a video codec."""
    return np.random.default_rng(seed).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)


def record(seed, **changes):
    """The other camera comes first, and frame 10 before frame 0, whose name ends alike."""
    features = {}
    for camera, frames in (("image_main", pictures(seed + 1000)), ("image_aux1", pictures(seed))):
        for i in reversed(range(30)):
            features[f"{i}/{camera}/encoded"] = frames[i].tobytes()
    entries = b""
    for name, value in {**features, **changes}.items():
        feature = delimited(1, delimited(1, value))  # of Feature.bytes_list
        entries += delimited(1, delimited(1, name.encode()) + delimited(2, feature))
    return framed(delimited(1, entries))


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(records))
    return path


def convert(source, *flags, status=0):
    """Run the converter into the folder mp4 beside `source`; returns its clips."""
    out = source.parent / "mp4"
    with pytest.raises(SystemExit) as stop:
        sys.exit(bair_to_mp4.main(["--source", str(source), "--out_dir", str(out), *flags]))
    assert stop.value.code == status
    return sorted(path for path in out.rglob("*") if path.is_file())


def test_clips_convert_without_loss_and_are_found_split_and_read(tmp_path):
    write(tmp_path / "bair/train/traj_0_to_3.tfrecords", *map(record, range(4)))
    write(tmp_path / "bair/test/traj_4_to_5.tfrecords", *map(record, range(4, 6)))
    convert(tmp_path / "bair", "--workers", "2")
    out = tmp_path / "mp4"
    train, val = prepare_videos(out, span=30, val_ratio=0.1, seed=0, cache_dir=tmp_path)
    assert [len(train), len(val)] == [4, 2]
    assert val[1].name == "videos_val/traj_4_to_5_0001.mp4"
    for seed, video in enumerate([*train, *val]):
        decoded = torch.stack(list(read_frames(video.path, range(30), video.info)))  # [T,3,H,W]
        assert torch.equal(decoded, torch.from_numpy(pictures(seed)).permute(0, 3, 1, 2))
        assert video.info.rate == 10


def test_damaged_records_are_skipped_and_the_others_convert(tmp_path, capsys):
    short = record(1, **{"7/image_aux1/encoded": b"short"})
    foreign = framed(b"\xff\xff\xff no protobuf")
    endless = struct.pack("<QI", 2**63, 0)
    for name, last in (("a", record(4)[:-5000]), ("b", endless)):
        write(tmp_path / f"bair/{name}.tfrecords", record(0), short, foreign, record(3), last)
    names = [path.name for path in convert(tmp_path / "bair")]
    assert names == ["a_0000.mp4", "a_0003.mp4", "b_0000.mp4", "b_0003.mp4"]
    assert "a_0001.mp4: it has no 7/image_aux1/encoded" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_a_lossy_clip_gets_no_name(tmp_path, monkeypatch):
    source = write(tmp_path / "a.tfrecords", record(0), record(1))
    save_mp4 = bair_to_mp4.save_mp4

    def stopped(path, *rest, **more):
        save_mp4(path, *rest, **more)
        if "a_0001" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(bair_to_mp4, "save_mp4", lambda *clip, lossless: save_mp4(*clip))
    assert convert(source, status=2) == []
    monkeypatch.setattr(bair_to_mp4, "save_mp4", stopped)
    (first,) = convert(source, status=130)
    before = first.stat().st_mtime_ns
    monkeypatch.setattr(bair_to_mp4, "save_mp4", save_mp4)
    assert [path.name for path in convert(source)] == ["a_0000.mp4", "a_0001.mp4"]
    assert first.stat().st_mtime_ns == before


@pytest.mark.parametrize("given", ["test", "test/a.tfrecords", "test/b"])
def test_the_folder_that_is_given_may_name_the_split_and_those_above_do_not(tmp_path, given):
    write(tmp_path / "test/a.tfrecords", record(0))
    write(tmp_path / "test/b/a.tfrecords", record(0))
    folders = {path.parent.name for path in convert(tmp_path / given)}
    assert folders == {"videos_train" if given == "test/b" else "videos_val"}
