"""Finding, indexing and splitting of video files."""

import os
import shutil

import numpy as np
import pytest
from conftest import names

from data import video_index
from data.video_index import (
    VideoIndex,
    find_videos,
    pack,
    split_key,
    unpack,
)


def make_copies(make_mp4, count, name="{:02d}.mp4", frames=12):
    """Equal files under numbered names; returns their folder."""
    source = make_mp4(name.format(0), frames)
    for i in range(1, count):
        shutil.copy(source, source.parent / name.format(i).split("/")[-1])
    return source.parent


def test_every_mp4_is_found_once_through_links_and_loops(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for name in ("root/b.mp4", "root/deep/er/A.MP4", "root/note.txt", "outside/far.Mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (root / "link").symlink_to(outside)  # a folder elsewhere
    (root / "deep" / "loop").symlink_to(root)
    (root / "again.mp4").symlink_to(root / "b.mp4")
    found = [path.relative_to(root).as_posix() for path in find_videos(root)]
    assert found == ["b.mp4", "deep/er/A.MP4", "link/far.Mp4"]
    # A link renames nothing, and hidden and other files are left out.
    (root / "a_link").symlink_to(root / "deep")
    for name in ("c.mkv", "._c.mkv", ".trash/d.mp4", "e.txt", "f.webm"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    lines = []
    found = [path.relative_to(root).as_posix() for path in find_videos(root, lines.append)]
    assert found == ["b.mp4", "c.mkv", "deep/er/A.MP4", "f.webm", "link/far.Mp4"]
    assert lines[0].endswith("left out: 2 .txt")
    with pytest.raises(ValueError, match="--data_root"):
        find_videos(root / "b.mp4")


@pytest.mark.parametrize(
    "folders",
    [
        ("videos_train", "videos_val"),
        ("train", "test"),
        ("Training", "Valid"),
        ("train_256", "my-eval.2"),
        ("train_val/train", "train_val/val"),
        ("training_videos/train", "training_videos/val"),
        ("a/train", "a/Testing"),
        ("a/b/c/train", "a/b/c/held-out"),
    ],
)
def test_named_folders_are_the_splits_and_a_file_in_both_is_held_out(make_mp4, prepare, folders):
    path = make_copies(make_mp4, 3, folders[0] + "/{}.mp4") / "2.mp4"
    held_out = make_mp4(f"{folders[1]}/sub/9.mp4").parent
    make_mp4("stray.mp4")
    (held_out / "x.mp4").symlink_to(path)
    train, val = prepare()
    assert names(train) == [f"{folders[0]}/{i}.mp4" for i in range(2)]
    assert names(val) == [f"{folders[1]}/sub/{name}.mp4" for name in "9x"]


def test_files_go_by_the_hash_of_seed_and_name(make_mp4, prepare):
    make_copies(make_mp4, 30)
    for seed in (0, 1):
        train, val = prepare(seed=seed)
        assert all(split_key(seed, name) < 0.2 for name in names(val))
        assert all(split_key(seed, name) >= 0.2 for name in names(train))
        assert len(train) + len(val) == 30
    assert split_key(0, "a.mp4") == 0x25BBA27E285BB649 / 2**64  # of b2sum -l 64
    assert split_key(0, "caf\u00e9.mp4") == split_key(0, "cafe\u0301.mp4")
    places = [[split_key(seed, f"{i}.mp4") for i in range(4000)] for seed in (0, 1)]
    # Binomial, of a standard deviation sqrt(0.1 * 0.9 / 4000) = 0.0047; four of them.
    assert (np.array(places[0]) < 0.1).mean() == pytest.approx(0.1, abs=0.019)
    assert np.corrcoef(places)[0, 1] == pytest.approx(0, abs=0.07)


@pytest.mark.parametrize("val_ratio", [0.03, 0.97])
def test_files_added_later_move_none_across_even_if_a_split_was_empty(make_mp4, prepare, val_ratio):
    splits = {}
    for count in (4, 12, 40):
        make_copies(make_mp4, count)
        train, val = prepare(val_ratio=val_ratio)
        assert train and val and len(train) + len(val) == count
        now = dict.fromkeys(names(train), "train") | dict.fromkeys(names(val), "val")
        assert splits.items() <= now.items()
        if not splits:  # the file that comes nearest fills the empty split
            by_key = sorted(now, key=lambda name: split_key(0, name))
            assert by_key[0] in names(val) and by_key[-1] in names(train)
        splits = now


def test_longer_clips_of_another_run_do_not_change_a_split(make_mp4, prepare):
    for name in (f"{i:02d}.mp4" for i in range(12)):
        make_mp4(name, count=10 if split_key(0, name) < 0.1 else 30)
    before = prepare(val_ratio=0.1)
    prepare(val_ratio=0.1, span=20)  # none that is held out is long enough
    assert prepare(val_ratio=0.1) == before


def test_max_videos_bounds_the_total_in_proportion(make_mp4, prepare, tmp_path):
    make_copies(make_mp4, 30)
    for limit in (2, 5, 17):
        train, val = prepare(max_videos=limit)
        assert len(train) + len(val) == limit and train and val
    everything = prepare(max_videos=100)
    assert sum(map(len, everything)) == 30
    # Another hash than that of the split chooses.
    by_key = sorted(names(everything[0]), key=lambda name: split_key(1, name))
    few = names(prepare(max_videos=12)[0])
    assert set(few) == set(by_key[: len(few)])
    share = video_index.share_limit
    assert share(None, 7, 3) == share(10, 7, 3) == (7, 3)
    assert share(5, 80, 20) == (4, 1) and share(50, 80, 20) == (40, 10)
    assert share(2, 1000, 1) == share(2, 1, 1000) == (1, 1)
    assert share(5, 10, 0) == (5, 0)
    # Bad files are passed over, and no more are looked at than needed.
    for i in range(30):
        (tmp_path / "videos" / f"bad{i:02d}.mp4").touch()
    assert sum(map(len, prepare(max_videos=10, val_ratio=0.3))) == 10
    assert 10 <= int(prepare.text.split()[0]) < 60 - 15


def test_the_index_is_used_again_until_a_file_changes(make_mp4, tmp_path, monkeypatch):
    paths = [make_mp4("a.mp4", count=9), make_mp4("b.mp4", count=10)]
    probed = []
    probe = video_index.probe_video
    spy = lambda path: probed.append(path.name) or probe(path)  # noqa: E731
    monkeypatch.setattr(video_index, "probe_video", spy)

    def look():
        probed.clear()
        return VideoIndex(tmp_path / "videos", tmp_path / "cache", workers=2).lookup(paths)

    first = look()
    assert [video.info.frames for video in first] == [9, 10]
    assert look() == first and probed == []
    make_mp4("b.mp4", count=11)
    os.utime(paths[1], ns=(1, 1))
    assert [video.info.frames for video in look()] == [9, 11] and probed == ["b.mp4"]


def test_a_damaged_index_is_written_anew(make_mp4, tmp_path):
    path = make_mp4("a.mp4")
    index = VideoIndex(tmp_path / "videos", tmp_path / "cache")
    index.lookup([path])
    whole = index.path.read_bytes()
    for damaged in (whole[:50], b"\xff" + whole, b"[]"):
        index.path.write_bytes(damaged)
        again = VideoIndex(tmp_path / "videos", tmp_path / "cache")
        assert again.lookup([path])[0].info.frames == 12
        assert index.path.read_bytes() == whole


def test_the_index_keeps_what_it_found_when_it_is_stopped_and_no_passing_fault(
    make_mp4, tmp_path, monkeypatch
):
    for name in "abc":
        make_mp4(f"{name}.mp4")
    probe = video_index.probe_video

    def fail(path):
        if path.name == "b.mp4":
            raise OSError(5, "Input/output error")
        if path.name == "c.mp4":
            raise KeyboardInterrupt
        return probe(path)

    monkeypatch.setattr(video_index, "probe_video", fail)
    with pytest.raises(KeyboardInterrupt):
        video_index.usable_videos(tmp_path / "videos", 8, 9, tmp_path / "cache")
    read = []
    monkeypatch.setattr(video_index, "probe_video", lambda path: read.append(path) or probe(path))
    found = video_index.usable_videos(tmp_path / "videos", 8, 9, tmp_path / "cache")
    assert [path.name for path in read] == ["b.mp4", "c.mp4"]
    assert names(found) == ["a.mp4", "b.mp4", "c.mp4"]


def test_rising_numbers_are_packed_and_found_again():
    for numbers in ([], [0], [5, 6, 7, 20], list(range(0, 9000, 300))):
        assert unpack(pack(numbers)) == tuple(numbers)
    assert pack(range(0, 9000, 300)) == "0x1 300x29"


def test_bad_files_are_counted_and_named_with_their_reason(make_mp4, prepare):
    folder = make_copies(make_mp4, 4, "good{}.mp4")
    for name in ("empty.mp4", os.fsdecode(b"\xff.mp4")):
        (folder / name).touch()
    make_mp4("short.mp4", count=7)
    assert sorted(names(sum(prepare(), []))) == [f"good{i}.mp4" for i in range(4)]
    assert "7 video files: 4 usable, 1 too short, 2 unreadable" in prepare.text
    for bad in ("short.mp4 (7 of 8", "empty.mp4 (InvalidDataError: ", r"\xff.mp4 (InvalidData"):
        assert bad in prepare.text
    prepare.text.encode()  # a name that is no text can be printed all the same
    # A whole folder is taken by name.
    found = video_index.usable_videos(folder, 12, 2, folder.parent / "cache")
    assert names(found) == ["good0.mp4", "good1.mp4"]
    with pytest.raises(ValueError, match="--data_root .*0 usable"):
        video_index.usable_videos(folder, 13, 2, folder.parent / "cache")


def test_a_folder_without_usable_files_is_one_clear_error(make_mp4, prepare, tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="--data_root .*0 video files"):
        prepare()
    make_copies(make_mp4, 22, frames=7)
    with pytest.raises(ValueError, match=r"0 usable, 22 too short.* and 2 more"):
        prepare()
    make_mp4("good.mp4", count=14)
    with pytest.raises(ValueError, match="1 usable, 22 too short"):
        prepare()


def test_held_out_files_are_those_of_the_training_run(make_mp4, prepare, tmp_path, monkeypatch):
    folder = make_copies(make_mp4, 20, frames=14)
    split = {"val_ratio": 0.3, "seed": 5, "max_videos": 12}
    args = {"data_root": str(folder), "cache_dir": str(tmp_path / "cache"), **split}
    config = {"num_frames": 5, "frame_stride": 3}
    held_out = video_index.held_out_videos
    train, val = prepare(span=13, **split)
    assert held_out(args, config) == (val, str(folder))
    assert held_out(args, config, split="train")[0] == train
    # The same rule holds files of another folder out.
    other = shutil.copytree(folder, tmp_path / "other")
    videos, root = held_out(args, config, data_root=str(other))
    assert names(videos) == names(val) and root == str(other)
    # A run without a folder had the built-in clips.
    monkeypatch.setattr(video_index, "make_synthetic_videos", {args["cache_dir"]: other}.get)
    assert held_out({**args, "data_root": None}, config)[0] == videos
