"""The BAIR converter on records that the tests write in the published layout, whole and damaged."""

import struct
import sys

import numpy as np
import pytest
import torch

from data.video_index import prepare_videos
from data.video_reader import probe_video, read_frames
from tools import bair_to_mp4
from tools.bair_to_mp4 import bytes_features, crc32c, main, masked_crc32c


def varint(value):
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def delimited(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def example(features):
    """A tf.train.Example of bytes features, with a float feature among them as the original has."""
    entries = {name: delimited(1, delimited(1, value)) for name, value in features.items()}
    entries["0/action"] = delimited(2, delimited(1, struct.pack("<4f", 0, 1, 2, 3)))
    return delimited(1, b"".join(delimited(1, delimited(1, k.encode()) + delimited(2, v)) for k, v in entries.items()))


def framed(payload):
    head = struct.pack("<Q", len(payload))
    return head + struct.pack("<I", masked_crc32c(head)) + payload + struct.pack("<I", masked_crc32c(payload))


def pictures(seed):
    """30 frames [T,H,W,3] of noise: the hardest thing to keep through a video codec."""
    return np.random.default_rng(seed).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)


def record(seed, **changes):
    features = {f"{i}/image_aux1/encoded": frame.tobytes() for i, frame in enumerate(pictures(seed))}
    features |= {f"{i}/image_main/encoded": frame.tobytes() for i, frame in enumerate(pictures(seed + 1000)[:2])}
    return framed(example(features | changes))


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(records))
    return path


def convert(source, *flags, status=0):
    """Run the converter into the folder mp4 beside `source`; returns its folder of training clips."""
    out = source.parent / "mp4"
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(["--source", str(source), "--out_dir", str(out), *flags]))
    assert stop.value.code == status
    return out / "videos_train"


def test_the_checksum_is_that_of_the_standard():
    # RFC 3720, appendix B.4, and the check value of the CRC catalogue
    checks = {b"123456789": 0xE3069283, bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, b"": 0, b"a": 0xC1D04330}
    checks[bytes(range(32))] = 0x46DD794E
    assert {data: crc32c(data) for data in checks} == checks


@pytest.mark.parametrize("size", [3, 4, 5, 1023, 1024, 1025, 3000])
def test_the_checksum_of_lanes_is_that_of_one_byte_after_another(size):
    data = np.random.default_rng(size).bytes(size)
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    assert crc32c(data) == state ^ 0xFFFFFFFF


def test_twenty_clips_convert_without_loss_and_are_found_split_and_read(tmp_path):
    write(tmp_path / "bair/train/traj_0_to_15.tfrecords", *map(record, range(16)))
    write(tmp_path / "bair/test/traj_16_to_19.tfrecords", *map(record, range(16, 20)))
    out = convert(tmp_path / "bair").parent
    train, val = prepare_videos(out, span=30, val_ratio=0.1, seed=0, cache_dir=tmp_path / "cache")
    assert [len(train), len(val)] == [16, 4]
    assert all(video.name.startswith("videos_val/traj_16_to_19_") for video in val)
    for video, seed in ((train[3], 3), (val[0], 16)):
        decoded = torch.stack(list(read_frames(video.path, range(30), video.info)))  # [T,3,H,W]
        assert torch.equal(decoded, torch.from_numpy(pictures(seed)).permute(0, 3, 1, 2))
        assert video.info.rate == 10


def test_damaged_records_are_named_and_skipped(tmp_path, capsys):
    flipped = bytearray(record(1))
    flipped[20_000] ^= 4  # one bit of a pixel
    missing = record(2, **{"7/image_aux1/encoded": b"short"})
    foreign = framed(b"\xff\xff\xff no protobuf")
    cut = record(5)[:-5000]
    folder = convert(write(tmp_path / "a.tfrecords", record(0), bytes(flipped), missing, foreign, record(4), cut))
    out, err = capsys.readouterr()
    assert sorted(p.name for p in folder.iterdir()) == ["a_0000.mp4", "a_0004.mp4"]
    assert "2 converted, 0 there before, 4 skipped" in out
    reasons = {1: "wrong checksum of its data", 2: "7/image_aux1/encoded must be 12288 bytes"}
    reasons |= {3: "not a protobuf message", 5: "the file is cut within this record"}
    assert [n for n, reason in reasons.items() if f"record {n}: {reason}" not in err] == []


def test_a_wrong_length_loses_the_rest_of_the_file_and_no_other(tmp_path, capsys):
    damaged = bytearray(record(0))
    damaged[2] ^= 1  # the length
    write(tmp_path / "train/a.tfrecords", bytes(damaged), record(1))
    write(tmp_path / "train/b.tfrecords", record(2))
    assert [p.name for p in convert(tmp_path / "train", "--workers", "2").iterdir()] == ["b_0000.mp4"]
    assert "record 0: wrong checksum of its length, so the rest of the file is lost" in capsys.readouterr().err


def test_a_stopped_conversion_goes_on_and_rewrites_nothing(tmp_path, monkeypatch, capsys):
    source = write(tmp_path / "a.tfrecords", *map(record, range(3)))
    whole = bair_to_mp4.save_mp4

    def stopped(path, *rest, **more):
        whole(path, *rest, **more)
        if ".a_0001" in path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(bair_to_mp4, "save_mp4", stopped)
    folder = convert(source, status=130)
    assert [p.name for p in folder.iterdir()] == ["a_0000.mp4"]
    before = (folder / "a_0000.mp4").stat().st_mtime_ns
    monkeypatch.setattr(bair_to_mp4, "save_mp4", whole)
    convert(source)
    assert "2 converted, 1 there before" in capsys.readouterr().out
    assert (folder / "a_0000.mp4").stat().st_mtime_ns == before and len(list(folder.iterdir())) == 3


def test_a_lossy_encoder_is_noticed_and_a_full_disk_ends_the_run(tmp_path, monkeypatch, capsys):
    source, whole = write(tmp_path / "a.tfrecords", record(0), record(1)), bair_to_mp4.save_mp4

    def lossy(path, clip, fps, lossless):
        whole(path, clip, fps)

    def full(path, *rest, **more):
        raise OSError(28, "No space left on device", str(path))

    for writer, message in ((lossy, "differs from its source"), (full, "No space left on device")):
        monkeypatch.setattr(bair_to_mp4, "save_mp4", writer)
        assert not list(convert(source, status=2).iterdir())
        assert message in capsys.readouterr().err


def test_folders_anywhere_above_say_the_split_and_links_are_not_followed(tmp_path):
    write(tmp_path / "far/away.tfrecords", record(0))
    for place in ("test/part1/a.tfrecords", "train/b.tfrecord-00000-of-00002", "train/b.tfrecord-00001-of-00002"):
        write(tmp_path / "bair" / place, record(0))
    (tmp_path / "bair/test/c.tfrecords").symlink_to(tmp_path / "far/away.tfrecords")
    tasks = bair_to_mp4.find_tasks(tmp_path / "bair", tmp_path, "image_aux1")
    assert [task.folder.name for task in tasks] == ["videos_val"] * 2 + ["videos_train"] * 2
    assert [bair_to_mp4.clip_stem(task.source) for task in tasks] == ["c", "a", "b-00000-of-00002", "b-00001-of-00002"]
    alone = bair_to_mp4.find_tasks(tmp_path / "bair/test/part1", tmp_path, "image_aux1")
    assert alone[0].folder.name == "videos_train"  # what stands above the folder that is given says nothing
    for given in (tmp_path / "bair/test", tmp_path / "bair/test/c.tfrecords"):
        assert bair_to_mp4.find_tasks(given, tmp_path, "image_aux1")[0].folder.name == "videos_val"


def test_every_feature_of_an_example_is_found():
    assert bytes_features(example({"a": b"1", "b": b"22"})) == {"a": b"1", "b": b"22"}


@pytest.mark.parametrize("source", ["missing", "empty"])
def test_wrong_sources_are_one_line(tmp_path, capsys, source):
    (tmp_path / "empty").mkdir()
    convert(tmp_path / source, status=2)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "--source" in err


def test_the_view_can_be_chosen(tmp_path):
    both = {f"{i}/image_main/encoded": frame.tobytes() for i, frame in enumerate(pictures(5))}
    source = write(tmp_path / "a.tfrecords", record(0, **both))
    path = convert(source, "--view", "image_main") / "a_0000_image_main.mp4"
    frame = next(read_frames(path, [0], probe_video(path)))
    assert torch.equal(frame, torch.from_numpy(pictures(5)[0]).permute(2, 0, 1))
