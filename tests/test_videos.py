"""Cutting, batching and caching of clips, and the built-in ones."""

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
    find_videos,
    stable_hash,
)


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


def test_an_epoch_sees_a_long_video_part_by_part(make_mp4, prepare):
    make_mp4("train/long.mp4", count=210)
    make_mp4("train/short.mp4", count=40)
    make_mp4("val/other.mp4", count=110)
    videos, held_out = prepare(span=4)
    # A part has at least sixteen clips' lengths; together they are the video.
    assert [video.frames for video in videos if "long" in video.name] == [
        *(range(0, 70), range(70, 140), range(140, 210))
    ]
    assert [video.part for video in held_out + videos[3:]] == [None, None]
    clips = dataset(videos, num_frames=4, frame_stride=1)
    for i, video in enumerate(videos):
        drawn = [shown(clips[epoch, i].clip) for epoch in range(40)]
        assert all(set(numbers) <= set(video.frames) for numbers in drawn)
        assert len({numbers[0] for numbers in drawn}) > 15
    central = dataset(videos, num_frames=4, frame_stride=1, random_window=False)
    assert [shown(central[0, i].clip)[0] for i in range(4)] == [33, 103, 173, 18]


def test_one_film_is_divided_in_time(make_mp4, prepare, tmp_path):
    make_mp4("film.mp4", count=100)
    train, val = prepare(val_ratio=0.2)
    assert [video.frames.start for video in train + val] == [*range(0, 100, 10)]
    assert len(val) == 2
    cached = CachedFrames(train + val, 16, "rgb", tmp_path / "cache")
    plain = DecodedFrames(16, "rgb")
    assert torch.equal(cached.read(val[1], [91, 97]), plain.read(val[1], [91, 97]))
    assert cached.shape[0] == 100  # the file is there once


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
    check_shared_memory(1, 40 * 64 * 64)
    with pytest.raises(ValueError, match="--num_workers 2 needs 2 MiB .*1 MiB free"):
        check_shared_memory(2, 40 * 64 * 64)
