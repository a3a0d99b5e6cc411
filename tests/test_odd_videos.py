"""Thirty odd, damaged and false MP4 files, against what a full decode of each is known to give."""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import moving_square

from data.kinetics_video_dataset import DecodedFrames, VideoClipDataset
from data.video_index import prepare_videos
from utils.io import save_mp4

ODD = Path(__file__).parents[2] / "shared/data/odd_videos"
pytestmark = pytest.mark.skipif(not ODD.is_dir(), reason="the odd videos are not in the repository")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """The usable ones of the odd files and six good ones, and what was logged."""
    root = tmp_path_factory.mktemp("odd")
    shutil.copytree(ODD, root / "videos")
    for i in range(6):
        save_mp4(root / "videos" / f"good{i}.mp4", moving_square(i, frames=30), fps=10)
    lines = []
    settings = {"span": 8, "val_ratio": 0.1, "seed": 0, "cache_dir": root / "cache", "workers": 2}
    train, val = prepare_videos(root / "videos", **settings, log=lines.append)
    return {video.name: video for video in train + val}, "\n".join(lines)


def test_frame_counts_sizes_and_rotations_match_a_full_decode(indexed):
    videos, text = indexed
    assert {f"good{i}.mp4" for i in range(6)} <= set(videos)
    for row in csv.DictReader((ODD / "MANIFEST.tsv").open(), delimiter="\t"):
        name, frames = row["file"], int(row["frames_by_full_decode"])
        # Other programs read the PNG as a video; here only MP4 is opened.
        if frames < 8 or name == "still.png.mp4":
            assert name not in videos and f"{name} (" in text
            continue
        info = videos[name].info
        found = (info.frames, info.width, info.height, info.rotation, info.damage)
        shape = (int(row[key] or 0) for key in ("width", "height", "rotation"))
        assert found == (frames, *shape, row["error"])
    assert f"36 video files: {len(videos)} usable" in text
    assert "corrupted.mp4 (1 packets failed: InvalidDataError)" in text


def test_clips_can_be_cut_from_every_usable_one(indexed):
    window = {"num_frames": 8, "frame_stride": 1, "seed": 0, "random_window": True}
    clips = VideoClipDataset(list(indexed[0].values()), DecodedFrames(16, "rgb"), **window)
    for i in range(len(clips)):
        read = clips[0, i]
        assert read.failures == [] and read.clip.shape == (3, 8, 16, 16)
