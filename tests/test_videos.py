"""Finding, splitting, indexing, cutting, batching and caching of clips."""

import os
import pickle
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import number_of
from torch.utils.data import DataLoader

from data import kinetics_video_dataset as kvd
from data import synthetic_videos, video_index
from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import DecodedFrames, ResumableBatchSampler
from data.training_clips import check_shared_memory
from data.video_index import (
    VideoIndex,
    find_videos,
    pack,
    prepare_videos,
    split_key,
    stable_hash,
    unpack,
)


@pytest.fixture
def prepare(tmp_path):
    """prepare_videos on tmp_path / "videos"; what it logs is in `.text`."""

    def run(span=8, val_ratio=0.2, seed=0, **more):
        lines = []
        settings = {"span": span, "val_ratio": val_ratio, "seed": seed, "log": lines.append, **more}
        splits = prepare_videos(tmp_path / "videos", cache_dir=tmp_path / "cache", **settings)
        run.text = "\n".join(lines)
        return splits

    return run


def names(videos):
    return [video.name for video in videos]


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
    found = [path.relative_to(root).as_posix() for path in find_videos(root)]
    assert found == ["b.mp4", "c.mkv", "deep/er/A.MP4", "f.webm", "link/far.Mp4"]
    with pytest.raises(ValueError, match="--data_root"):
        find_videos(root / "b.mp4")


@pytest.mark.parametrize(
    "folders",
    [
        ("videos_train", "videos_val"),
        ("train", "test"),
        ("Training", "Valid"),
        ("a/train", "a/Testing"),
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


def test_reads_that_a_file_system_fails_are_tried_again_with_growing_pauses(videos, monkeypatch):
    pauses = []
    monkeypatch.setattr(kvd.time, "sleep", pauses.append)

    def fail(*given):
        raise OSError(5, "Input/output error")

    clips = dataset(videos, SimpleNamespace(read=fail))
    assert clips[0, 0].clip is None
    assert pauses == [2.0**attempt for attempt in range(len(pauses))]
    assert sum(pauses) > 60


def test_too_little_shared_memory_is_one_clear_error(monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    # Two batches of 40 frames of 12 KiB for each process.
    check_shared_memory(1, 40, 64)
    with pytest.raises(ValueError, match="--num_workers 2 needs 2 MiB .*1 MiB free"):
        check_shared_memory(2, 40, 64)


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


@pytest.fixture
def videos(make_mp4, prepare):
    for i in range(8):
        make_mp4(f"{i}.mp4", count=30 + i)
    return prepare(val_ratio=0.01)[0]


def dataset(videos, source=None, **changes):
    settings = {"num_frames": 5, "frame_stride": 2, "seed": 3, "random_window": True, **changes}
    return kvd.VideoClipDataset(videos, source or DecodedFrames(64, "rgb"), **settings)


def load(clips, batches, workers):
    return DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=kvd.collate)


def shown(clip):
    return [number_of(frame) for frame in clip.unbind(1)]


def drawn_window(video, key):
    """Numbers of the frames that the hash of a clip's key chooses."""
    first = (stable_hash(key.encode()) >> 2) % (video.info.frames - 9 + 1)
    return list(range(first, first + 9, 2))


def test_windows_are_a_function_of_seed_epoch_and_clip_only(videos):
    clips = dataset(videos)
    keys = [(epoch, i) for epoch in range(4) for i in range(len(clips))]
    expected = {(e, i): drawn_window(videos[i], f"3,{e},{i},0") for e, i in keys}
    for workers, batch_size in ((0, 1), (2, 3)):
        # In another order, too.
        batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)][::-1]
        for batch, (read, _, _) in zip(batches, load(clips, batches, workers), strict=True):
            assert [shown(clip) for clip in read] == [expected[key] for key in batch]


def test_validation_clips_show_one_fixed_central_window(videos):
    assert video_index.clip_span(5, 3) == 13 and video_index.clip_span(1, 9) == 1
    spans = (30, 29, 28, 8)
    assert [video_index.central_start(videos[0], span) for span in spans] == [0, 0, 1, 11]
    clips = dataset(videos, random_window=False)
    for i, video in enumerate(videos):
        first = (video.info.frames - 9) // 2
        assert [shown(clips[epoch, i].clip)[0] for epoch in (0, 5)] == [first, first]


def test_a_file_that_fails_later_is_replaced_by_a_fixed_other_one(videos):
    clips = dataset(videos)
    os.truncate(videos[2].path, 100)
    read = clips[1, 2]
    assert len(read.failures) == 1 and read.failures[0].startswith(videos[2].name)
    assert clips[1, 3].failures == []
    # The hash of the second attempt chooses the file and the window.
    number = stable_hash(b"3,1,2,1")
    other = videos[stable_hash(f"file {number}".encode()) % len(videos)]
    assert shown(read.clip) == drawn_window(other, "3,1,2,1")


def test_too_many_failed_reads_stop_the_run_and_few_do_not(videos):
    lines = []
    clip = torch.full((1, 3, 5, 8, 8), 255, dtype=torch.uint8)
    good, bad = (clip, [], 1), (clip, ["bad.mp4 (cut)"], 2)
    errors = kvd.ReadErrors(log=lines.append)
    # Exactly a tenth of all attempts fail.
    loaded = list(errors.load([*[good] * 8, bad] * 20, torch.device("cpu")))
    assert len(loaded) == 180 and all((batch == 1).all() for batch in loaded)
    assert (errors.failed, errors.attempts) == (20, 200)
    assert len(lines) == 1 and "bad.mp4 (cut)" in lines[0]
    with pytest.raises(ValueError, match="10%"):
        list(errors.load([bad] * 200, torch.device("cpu")))
    assert errors.failed == 21
    # A clip that no file can replace stops it, too.
    for video in videos:
        os.truncate(video.path, 100)
    batch = kvd.collate([dataset(videos)[0, 0]])
    assert batch[0] is None and len(batch[1]) == batch[2] == 8
    with pytest.raises(ValueError, match="8 of 8"):
        list(kvd.ReadErrors().load([batch], torch.device("cpu")))


def test_each_epoch_is_a_fresh_permutation_in_whole_steps():
    sampler = ResumableBatchSampler(23, 4, 2, seed=0, first_step=0, last_step=6)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 12 and kvd.steps_per_epoch(23, 8) == 2
    for epoch in range(3):
        keys = [key for batch in batches[epoch * 4 : epoch * 4 + 4] for key in batch]
        order = np.random.default_rng([0, epoch]).permutation(23)[:16]
        assert keys == [(epoch, i) for i in order]


@pytest.mark.parametrize("first", [1, 5, 17])
def test_batches_from_any_step_of_all_ranks_are_those_of_the_whole_run(first):
    whole = list(ResumableBatchSampler(50, 6, 3, seed=5, first_step=0, last_step=40))
    steps = {"first_step": first, "last_step": 40}
    ranks = [ResumableBatchSampler(50, 2, 3, seed=5, **steps, part=(r, 3)) for r in range(3)]
    assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole[first * 3 :]
    assert [len(sampler) for sampler in ranks] == [(40 - first) * 3] * 3


def test_fewer_clips_than_a_step_needs_repeat_within_it():
    batches = list(ResumableBatchSampler(3, 8, 1, seed=0, first_step=0, last_step=2))
    for epoch, batch in enumerate(batches):
        assert len(batch) == 8 and {key[0] for key in batch} == {epoch}
        assert set(Counter(i for _, i in batch).values()) == {2, 3}


@pytest.mark.parametrize("color_mode", ["rgb", "gray"])
def test_cached_clips_equal_decoded_ones_and_are_shared(videos, tmp_path, color_mode):
    def cache(size=16):
        return CachedFrames(videos, size, color_mode, tmp_path / "cache", workers=2)

    first = cache()
    decoded = dataset(videos, DecodedFrames(16, color_mode))
    keys = [(epoch, i) for epoch in range(3) for i in range(len(videos))]
    for workers in (0, 2):
        loader = load(dataset(videos, first), [[key] for key in keys], workers)
        for key, (clips, failed, _) in zip(keys, loader, strict=True):
            assert failed == [] and torch.equal(clips[0], decoded[key].clip)
    assert clips.shape == (1, 1 if color_mode == "gray" else 3, 5, 16, 16)
    # The map does not travel to other processes.
    pickled = pickle.dumps(first)
    assert len(pickled) < first.path.stat().st_size / 4
    sent = dataset(videos, pickle.loads(pickled))
    assert torch.equal(sent[keys[5]].clip, decoded[keys[5]].clip)
    # Later runs find it; one that was cut short is written anew.
    written = first.path.stat().st_mtime_ns
    assert cache().path.stat().st_mtime_ns == written and cache(8).path != first.path
    os.truncate(first.path, 1000)
    assert torch.equal(dataset(videos, cache())[keys[5]].clip, decoded[keys[5]].clip)


def test_what_cannot_be_cached_is_replaced_or_refused(videos, tmp_path, monkeypatch):
    os.truncate(videos[1].path, 100)
    clips = dataset(videos, CachedFrames(videos, 16, "rgb", tmp_path / "cache"))
    assert clips[0, 1].clip is not None and videos[1].name in clips[0, 1].failures[0]
    assert clips[0, 0].failures == []
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"--cache_videos needs 0\.3 GiB .*0\.0 GiB free"):
        CachedFrames(videos, 8, "rgb", tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*frames_*"))) == 1


def test_built_in_clips_are_rendered_once_and_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic_videos, "TRAIN_CLIPS", 3)
    monkeypatch.setattr(synthetic_videos, "VAL_CLIPS", 2)
    render = synthetic_videos.render_clip
    seeds = []

    def stop_at_the_fourth(seed):
        seeds.append(seed)
        if len(seeds) == 4:
            raise KeyboardInterrupt
        return render(seed)

    monkeypatch.setattr(synthetic_videos, "render_clip", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        synthetic_videos.make_synthetic_videos(tmp_path)
    assert list(tmp_path.iterdir()) == []
    folder = synthetic_videos.make_synthetic_videos(tmp_path)
    assert seeds[-5:] == [0, 1, 2, 1_000_000, 1_000_001]
    found = [path.relative_to(folder).as_posix() for path in find_videos(folder)]
    assert found == [*(f"train/{i:05d}.mp4" for i in range(3)), "val/00000.mp4", "val/00001.mp4"]
    count = len(seeds)
    assert synthetic_videos.make_synthetic_videos(tmp_path) == folder and len(seeds) == count


def test_blocks_move_by_contact_and_stay_on_the_table():
    # The gripper overlaps the first block by 0.03, the others overlap by 0.05.
    centres = np.array([[0.5, 0.5], [0.3, 0.8], [0.45, 0.8], [0.95, 0.2]])
    gripper = np.array([0.3, 0.5])
    radius = np.full(4, 0.1)
    synthetic_videos.resolve_contacts(gripper, centres, np.zeros(4), radius)
    expected = np.array([[0.53, 0.5], [0.275, 0.8], [0.475, 0.8], [0.9, 0.2]])
    assert np.allclose(centres, expected)
    _, centres, _ = synthetic_videos.simulate(np.random.default_rng(0), radius)  # [T,N,2]
    assert np.abs(np.diff(centres, axis=0)).max() > 0.01
    assert (np.minimum(centres, 1 - centres)[1:] >= 0.1 - 1e-6).all()
