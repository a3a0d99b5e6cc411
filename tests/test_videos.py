"""Finding, splitting, indexing, cutting, batching and caching, as promises to the user."""

import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import number_of
from torch.utils.data import DataLoader

from data import kinetics_video_dataset, video_index
from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import DecodedFrames, ReadFailures, ResumableBatchSampler, VideoClipDataset, collate
from data.video_index import VideoIndex, find_videos, prepare_videos, share_limit, split_key


@pytest.fixture
def prepare(tmp_path):
    """prepare_videos on tmp_path / "videos" with a cache beside it; what it logs is collected in `.lines`."""

    def run(**changes):
        run.lines = []
        settings = {"span": 8, "val_ratio": 0.2, "seed": 0, "cache_dir": tmp_path / "cache", "log": run.lines.append}
        return prepare_videos(tmp_path / "videos", **(settings | changes))

    return run


def names(videos):
    return [video.name for video in videos]


def make_copies(make_mp4, count, name="{:02d}.mp4", frames=12):
    """Files of that name, numbered, and all alike; returns their folder."""
    source = make_mp4(name.format(0), frames)
    for i in range(1, count):
        shutil.copy(source, source.parent / name.format(i).split("/")[-1])
    return source.parent


def test_every_mp4_is_found_once_through_links_and_loops(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for path in (root / "b.mp4", root / "deep" / "er" / "A.MP4", root / "note.txt", outside / "far.Mp4"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "link").symlink_to(outside)  # a folder elsewhere
    (root / "deep" / "loop").symlink_to(root)  # a loop
    (root / "again.mp4").symlink_to(root / "b.mp4")  # the same file twice
    found = [path.relative_to(root).as_posix() for path in find_videos(root)]
    assert found == ["b.mp4", "deep/er/A.MP4", "link/far.Mp4"]  # a link does not rename what it points to
    with pytest.raises(ValueError, match="--data_root must be a folder"):
        find_videos(root / "b.mp4")


@pytest.mark.parametrize("folders", [("videos_train", "videos_val"), ("train", "val")])
def test_folders_that_say_so_are_the_splits_and_a_file_linked_into_both_is_held_out(make_mp4, prepare, folders):
    path = make_copies(make_mp4, 3, folders[0] + "/{}.mp4") / "2.mp4"
    held_out = make_mp4(f"{folders[1]}/sub/9.mp4").parent
    make_mp4("stray.mp4")
    (held_out / "x.mp4").symlink_to(path)  # linked into both: held out
    train, val = prepare()
    assert names(train) == [f"{folders[0]}/{i}.mp4" for i in range(2)]
    assert names(val) == [f"{folders[1]}/sub/{name}.mp4" for name in "9x"]


def test_adding_files_moves_none_across_even_where_a_side_had_to_be_filled(make_mp4, prepare):
    sides = {}
    for count in (4, 12, 40):
        make_copies(make_mp4, count)
        train, val = prepare(val_ratio=0.03)
        assert train and val and len(train) + len(val) == count
        now = dict.fromkeys(names(train), "train") | dict.fromkeys(names(val), "val")
        assert sides.items() <= now.items()
        sides = now


def test_a_run_with_longer_clips_does_not_change_the_split_of_another(make_mp4, prepare):
    for i in range(12):
        make_mp4(f"{i:02d}.mp4", count=10 if split_key(0, f"{i:02d}.mp4") < 0.1 else 30)
    before = prepare(val_ratio=0.1)
    prepare(val_ratio=0.1, span=20)  # none of those held out is long enough: another file has to be
    assert prepare(val_ratio=0.1) == before


def test_the_hash_meets_the_ratio_and_depends_on_the_seed():
    places = np.array([split_key(0, f"{i}.mp4") for i in range(4000)])
    # binomial: standard deviation sqrt(0.1 * 0.9 / 4000) = 0.0047; four of them
    assert (places < 0.1).mean() == pytest.approx(0.1, abs=0.019)
    assert np.corrcoef(places, [split_key(1, f"{i}.mp4") for i in range(4000)])[0, 1] == pytest.approx(0, abs=0.07)


def test_max_videos_limits_the_total_and_keeps_both_sides(make_mp4, prepare):
    make_copies(make_mp4, 30)
    for limit in (2, 5, 17):
        train, val = prepare(max_videos=limit)
        assert len(train) + len(val) == limit and train and val
    assert sum(map(len, prepare(max_videos=100))) == 30
    small, large = prepare(max_videos=6)[0], prepare(max_videos=12)[0]
    assert set(names(small)) <= set(names(large))
    assert share_limit(None, 7, 3) == (7, 3)


def test_max_videos_looks_past_bad_files_and_no_further_than_needed(make_mp4, prepare):
    folder = make_copies(make_mp4, 40)
    for i in range(1, 40):
        (folder / f"bad{i:02d}.mp4").touch()
    train, val = prepare(max_videos=10, val_ratio=0.3)
    assert len(train) + len(val) == 10
    seen = int(prepare.lines[0].split()[0])
    assert 10 <= seen < 79 - 20


def test_the_index_is_reused_until_a_file_changes(make_mp4, tmp_path, monkeypatch):
    paths = [make_mp4("a.mp4", count=9), make_mp4("b.mp4", count=10)]
    look = lambda: VideoIndex(tmp_path / "videos", tmp_path / "cache").lookup(paths, 2)  # noqa: E731
    first, probed, probe = look(), [], video_index.probe_video
    assert [video.info.frames for video in first] == [9, 10]
    monkeypatch.setattr(video_index, "probe_video", lambda path: (probed.append(path.name), probe(path))[1])
    assert look() == first and probed == []
    make_mp4("b.mp4", count=11)
    os.utime(paths[1], ns=(1, 1))
    assert [video.info.frames for video in look()] == [9, 11] and probed == ["b.mp4"]


def test_a_damaged_index_is_made_anew(make_mp4, tmp_path):
    path = make_mp4("a.mp4")
    index = VideoIndex(tmp_path / "videos", tmp_path / "cache")
    index.lookup([path], 1)
    whole = index.path.read_bytes()
    for damaged in (whole[:50], b"\xff" + whole, b"[]"):
        index.path.write_bytes(damaged)
        assert VideoIndex(tmp_path / "videos", tmp_path / "cache").lookup([path], 1)[0].info.frames == 12


def test_bad_files_are_counted_and_named_with_their_reason(make_mp4, prepare):
    folder = make_copies(make_mp4, 4, "good{}.mp4")
    for name in ("empty.mp4", os.fsdecode(b"\xff.mp4")):
        (folder / name).touch()
    make_mp4("short.mp4", count=7)
    train, val = prepare()
    assert sorted(names(train + val)) == [f"good{i}.mp4" for i in range(4)]
    text = "\n".join(prepare.lines)
    assert "7 MP4 files: 4 usable, 1 too short, 2 unreadable" in text
    assert "too short for a clip of 8 frames: short.mp4 (7 frames)" in text
    assert "unreadable: empty.mp4 (InvalidDataError: " in text and r"\xff.mp4 (InvalidDataError: " in text
    text.encode()  # a name that is no text is printable all the same


def test_a_folder_without_a_usable_file_is_one_clear_error(make_mp4, prepare, tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match="two usable MP4 files.*0 MP4 files"):
        prepare()
    make_copies(make_mp4, 22, frames=7)
    first_few = r"too short .* \(7 frames\) and 2 more \(python tools/check_videos\.py lists all\)"
    with pytest.raises(ValueError, match=f"0 usable, 22 too short, 0 unreadable; {first_few}$"):
        prepare()
    make_mp4("good.mp4", count=14)
    with pytest.raises(ValueError, match="two usable MP4 files, one for validation; .* 1 usable, 22 too short"):
        prepare()
    with pytest.raises(ValueError, match="23 too short, 0 unreadable; too short for a clip of 15 frames"):
        prepare(span=video_index.clip_span(8, 2))  # the stride counts


@pytest.fixture
def videos(make_mp4, prepare):
    for i in range(8):
        make_mp4(f"{i}.mp4", count=30 + i)
    return prepare(val_ratio=0.01)[0]


def dataset(videos, source=None, **changes):
    settings = {"num_frames": 5, "frame_stride": 2, "seed": 3, "random_window": True}
    return VideoClipDataset(videos, source or DecodedFrames(64, "rgb"), **(settings | changes))


def shown(clip):
    return [number_of(frame) for frame in clip.unbind(1)]


def test_windows_are_a_function_of_seed_epoch_and_clip_alone(videos):
    clips = dataset(videos)
    keys = [(epoch, i) for epoch in range(4) for i in range(len(clips))]
    expected = {key: shown(clips[key].clip) for key in keys}
    for frames in expected.values():
        assert frames == list(range(frames[0], frames[0] + 9, 2))
    assert len({tuple(f) for f in expected.values()}) > 10  # the window moves from epoch to epoch
    for workers in (0, 2):
        for batch_size in (1, 3):
            batches = [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)][::-1]  # another order
            loader = DataLoader(clips, batch_sampler=batches, num_workers=workers, collate_fn=collate)
            for batch, (read, _, _) in zip(batches, loader, strict=True):
                assert [shown(clip) for clip in read] == [expected[key] for key in batch]
    other = dataset(videos, seed=4)
    assert any(shown(other[key].clip) != expected[key] for key in keys)


def test_windows_reach_both_ends_of_a_video(videos):
    starts = Counter(shown(dataset(videos, num_frames=29, frame_stride=1)[epoch, 0].clip)[0] for epoch in range(60))
    slack = videos[0].info.frames - 29
    assert set(starts) == set(range(slack + 1))


def test_validation_clips_show_one_fixed_central_window(videos):
    clips = dataset(videos, random_window=False)
    for i, video in enumerate(videos):
        first = (video.info.frames - 9) // 2
        assert [shown(clips[epoch, i].clip)[0] for epoch in (0, 5)] == [first, first]


def test_flip_and_reversal_happen_to_half_of_the_clips(videos):
    plain, reversed_, flipped = dataset(videos), dataset(videos, time_reverse=True), dataset(videos, hflip=True)
    keys = [(epoch, i) for epoch in range(12) for i in range(len(videos))]
    backwards = mirrored = 0
    for key in keys:
        clip, turned, mirror = (clips[key].clip for clips in (plain, reversed_, flipped))
        assert torch.equal(turned, clip) or torch.equal(turned, clip.flip(1))
        assert torch.equal(mirror, clip) or torch.equal(mirror, clip.flip(3))
        backwards += not torch.equal(turned, clip)
        mirrored += not torch.equal(mirror, clip)
    # 84 fair coins: standard deviation 4.6; three of them
    assert abs(backwards - 42) < 14 and abs(mirrored - 42) < 14


def test_a_file_that_fails_later_is_replaced_by_a_fixed_other_one(videos):
    clips = dataset(videos)
    os.truncate(videos[2].path, 100)
    first, again = clips[1, 2], clips[1, 2]
    assert torch.equal(first.clip, again.clip)
    assert len(first.failures) == 1 and first.failures[0].startswith(f"{videos[2].name} (InvalidDataError")
    assert clips[1, 3].failures == []


def test_too_many_failed_reads_stop_the_run_and_few_do_not(videos):
    lines = []
    failures = ReadFailures(log=lines.append)
    clip = torch.zeros(1, 3, 5, 8, 8)
    for n in range(200):
        failed = ["bad.mp4 (cut)"] if n % 10 == 0 else []
        assert failures.check(clip, failed, 1 + len(failed)) is clip  # 20 of 220 reads
    assert lines == ["could not read bad.mp4 (cut); another file takes its place (1 failed reads so far)"]
    with pytest.raises(ValueError, match="at most 10% of reads may fail"):
        for _ in range(200):
            failures.check(clip, ["bad.mp4 (cut)"], 2)
    for video in videos:
        os.truncate(video.path, 100)
    read = collate([dataset(videos)[0, 0]])
    assert read[0] is None and len(read[1]) == 8
    with pytest.raises(ValueError, match="got 8 of 8; last: "):
        ReadFailures(log=lines.append).check(*read)


def test_each_epoch_is_a_fresh_permutation_in_whole_steps():
    batches = list(ResumableBatchSampler(23, 4, 2, seed=0, first_step=0, last_step=6))  # 2 batches of 4 a step
    assert len(batches) == 12 and kinetics_video_dataset.steps_per_epoch(23, 8) == 2
    epochs = [[key for batch in batches[e * 4 : e * 4 + 4] for key in batch] for e in range(3)]
    for e, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {e}
        assert len({i for _, i in keys}) == 16
    assert [i for _, i in epochs[0]] != [i for _, i in epochs[1]]


def test_batches_from_any_point_are_those_of_the_whole_run():
    for per_step in (1, 3):
        whole = list(ResumableBatchSampler(23, 4, per_step, seed=5, first_step=0, last_step=40))
        for first in (1, 5, 17):
            rest = ResumableBatchSampler(23, 4, per_step, seed=5, first_step=first, last_step=40)
            assert list(rest) == whole[first * per_step :] and len(rest) == (40 - first) * per_step


def test_fewer_clips_than_a_step_needs_repeat_within_it():
    batches = list(ResumableBatchSampler(3, 8, 1, seed=0, first_step=0, last_step=2))
    for epoch, batch in enumerate(batches):
        assert len(batch) == 8 and {key[0] for key in batch} == {epoch}
        assert set(Counter(i for _, i in batch).values()) == {2, 3}


@pytest.mark.parametrize("color_mode", ["rgb", "gray"])
def test_cached_clips_equal_decoded_ones_and_are_shared_by_later_runs(videos, tmp_path, color_mode):
    make = lambda: CachedFrames(videos, 16, color_mode, tmp_path / "cache", workers=2)  # noqa: E731
    cache, decoded = make(), dataset(videos, DecodedFrames(16, color_mode))
    keys = [(epoch, i) for epoch in range(3) for i in range(len(videos))]
    for workers in (0, 2) if color_mode == "rgb" else (0,):
        processes = {"num_workers": workers, "multiprocessing_context": "spawn" if workers else None}
        batches = {"batch_sampler": [[key] for key in keys], "collate_fn": collate}
        loader = DataLoader(dataset(videos, cache), **batches, **processes)
        for key, (clips, failed, _) in zip(keys, loader, strict=True):
            assert failed == [] and torch.equal(clips[0], decoded[key].clip)
    assert clips.shape == (1, 1 if color_mode == "gray" else 3, 5, 16, 16) and clips.dtype == torch.uint8
    written = cache.path.stat().st_mtime_ns
    assert make().path.stat().st_mtime_ns == written  # found again
    assert CachedFrames(videos, 8, color_mode, tmp_path / "cache").path != cache.path
    os.truncate(cache.path, 1000)  # a cache cut short is made anew
    assert torch.equal(dataset(videos, make())[keys[5]].clip, decoded[keys[5]].clip)


def test_a_cache_that_does_not_fit_the_disk_is_refused(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(ValueError, match=r"--cache_videos needs 0\.3 GiB in --cache_dir .*0\.0 GiB free"):
        CachedFrames(videos, 16, "rgb", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("frames_*"))


def test_a_video_that_cannot_be_cached_whole_is_replaced_when_asked_for(videos, tmp_path):
    os.truncate(videos[1].path, 100)
    clips = dataset(videos, CachedFrames(videos, 16, "rgb", tmp_path / "cache"), frame_stride=1)
    assert "only 0 of" in clips[0, 1].failures[0] and clips[0, 1].clip is not None
    assert clips[0, 0].failures == []
