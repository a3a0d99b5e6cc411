"""Thirty odd, damaged and false MP4 files beside good ones, against what a full decode of each is known to give."""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import moving_square

from data.kinetics_video_dataset import DecodedFrames, VideoClipDataset
from data.video_index import prepare_videos
from utils.io import save_mp4

ODD = Path(__file__).parents[2] / "shared/data/odd_videos"
pytestmark = pytest.mark.skipif(not ODD.is_dir(), reason="needs the odd videos, which do not travel with the code")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """The odd files and six good ones, prepared as training does; returns its lines and every video's outcome."""
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(ODD, root / "videos")
    for i in range(6):
        save_mp4(root / "videos" / f"good{i}.mp4", moving_square(i, frames=30), fps=10)
    lines = []
    split = {"span": 8, "val_ratio": 0.1, "seed": 0}
    train, val = prepare_videos(root / "videos", **split, cache_dir=root / "cache", workers=2, log=lines.append)
    return {video.name: video for video in train + val}, "\n".join(lines)


def manifest():
    return list(csv.DictReader((ODD / "MANIFEST.tsv").open(), delimiter="\t"))


def test_frame_counts_sizes_and_rotations_match_a_full_decode(indexed):
    videos, _ = indexed
    for row in manifest():
        expected = int(row["frames_by_full_decode"])
        if row["file"] == "still.png.mp4":
            expected = 0  # a PNG: other programs guess so, we open MP4 and nothing else
        assert (row["file"] in videos) == (expected >= 8), row["file"]
        if expected >= 8:
            info = videos[row["file"]].info
            found = (info.frames, info.width, info.height, info.rotation, info.damage)
            shape = (int(row[name] or 0) for name in ("width", "height", "rotation"))
            assert found == (expected, *shape, row["error"])


def test_each_bad_file_has_its_reason_and_each_good_one_is_used(indexed):
    videos, text = indexed
    assert {f"good{i}.mp4" for i in range(6)} <= set(videos)
    assert "36 MP4 files: " in text and "usable but damaged: " in text
    for name, reason in (("corrupted.mp4", "1 packets failed: InvalidDataError"), ("seven_frames.mp4", "7 frames")):
        assert f"{name} ({reason})" in text
    unreadable = [row["file"] for row in manifest() if row["frames_by_full_decode"] == "0"] + ["still.png.mp4"]
    assert f"{len(unreadable)} unreadable" in text
    assert [name for name in unreadable if f"{name} (" not in text] == []


def test_clips_can_be_cut_from_every_usable_one(indexed):
    window = {"num_frames": 8, "frame_stride": 1, "seed": 0, "random_window": True}
    clips = VideoClipDataset(list(indexed[0].values()), DecodedFrames(16, "rgb"), **window)
    for i in range(len(clips)):
        read = clips[0, i]
        assert read.failures == [] and read.clip.shape == (3, 8, 16, 16)
