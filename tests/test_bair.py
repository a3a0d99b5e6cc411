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
    payload = delimited(1, entries)
    return struct.pack("<QI", len(payload), 123) + payload + b"crc!"  # nobody reads checksums


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
    # A folder above the one that is given does not name the split.
    bair = tmp_path / "test/bair"
    write(bair / "train/traj_0_to_2.tfrecords", *map(record, range(3)))
    write(bair / "val/traj_3_to_4.tfrecords", *map(record, range(3, 5)))
    convert(bair, "--workers", "2")
    out = bair.parent / "mp4"
    train, val = prepare_videos(out, span=30, val_ratio=0.1, seed=0, cache_dir=tmp_path)
    assert len(train) == 3 and val[1].name == "videos_val/traj_3_to_4_0001.mp4"
    for seed, video in enumerate([*train, *val]):
        decoded = torch.stack(list(read_frames(video.path, range(30), video.info)))  # [T,3,H,W]
        assert torch.equal(decoded, torch.from_numpy(pictures(seed)).permute(0, 3, 1, 2))
        assert video.info.rate == 10


def test_damaged_records_are_skipped_and_the_others_convert(tmp_path, capsys):
    short = record(1, **{"7/image_aux1/encoded": b"short"})
    foreign = struct.pack("<QI", 8, 0) + b"\xff protob" + b"crc!"
    endless = struct.pack("<QI", 2**63, 0)
    for name, last in (("a", record(4)[:-5000]), ("b", endless)):
        write(tmp_path / f"test/{name}.tfrecords", record(0), short, foreign, record(3), last)
    names = [f"{path.parent.name}/{path.name}" for path in convert(tmp_path / "test")]
    assert names == [f"videos_val/{name}.mp4" for name in ("a_0000", "a_0003", "b_0000", "b_0003")]
    assert "a_0001.mp4: it has no 7/image_aux1/encoded" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_a_lossy_clip_gets_no_name(tmp_path, monkeypatch):
    source = write(tmp_path / "a.tfrecords", record(0), record(1))
    save_mp4 = bair_to_mp4.save_mp4

    def stopped(path, *clip, lossless):
        save_mp4(path, *clip, lossless=lossless)
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
