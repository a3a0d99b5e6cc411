"""What tests/soak.py tries at length, in small: kills, stops, a full disk, hostile files."""

import functools
import os

import hostile
import pytest
import soak
import torch
from conftest import run, words
from soak import SMALL

from utils.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("quick", "narrow_predictor")


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_runs_that_are_killed_or_stopped_at_random_end_as_the_undisturbed_one(tmp_path, how):
    counts = soak.disturb(how, 2, tmp_path, steps=6)
    assert counts["disturbed"] >= 2
    assert soak.broken(counts) == {}


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path):
    try:
        counts = soak.disk(tmp_path, steps=4)
    except OSError as error:
        pytest.skip(str(error))
    assert soak.broken(counts) == {}


@pytest.mark.parametrize(("kind", "count"), [("video", 20), ("image", 20), ("resume", 12)])
def test_mutated_files_crash_hang_and_trace_nothing(tmp_path, kind, count):
    counts = soak.fuzz(kind, count, tmp_path)
    assert soak.broken(counts) == {}
    assert counts["refused"] + counts["used"] == count
    # Otherwise nothing was mutated.
    assert counts["refused"] > 0


def test_values_of_another_kind_deep_in_a_checkpoint_are_refused(tmp_path):
    whole = soak.make_bases("resume", tmp_path)[0]
    path = tmp_path / "last.pt"
    odd = {"epoch": 1.5, "step_in_epoch": torch.zeros(3), "best_val_loss": torch.zeros(3)}
    odd |= {"lr_scheduler.total_steps": None, "optimizer": 1, "model": {}, "history.epochs": 1}
    odd |= {"args": [], "args.processes": "x", "history.sums.skipped": [1]}
    odd |= {"predictor.config.endpoint_context": "", "predictor.weights": None}
    for place, value in odd.items():
        path.write_bytes(whole)
        checkpoint = load_checkpoint(path)
        *outer, key = place.split(".")
        functools.reduce(dict.get, outer, checkpoint)[key] = value
        save_checkpoint(path, checkpoint)
        with pytest.raises(ValueError, match="(last|best).pt"):
            soak.resume(path)


def test_training_on_a_folder_of_hostile_files_uses_the_good_and_names_the_bad(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    files = {**hostile.GOOD, **hostile.BAD}
    for name in ("frames_of_8192x8192", "frames_as_large_as_is_allowed"):
        del files[name]  # these take seconds
    for name, write in files.items():
        write(videos / f"{name}.mp4")
    for name in hostile.NAMES:
        hostile.mp4(videos / name)
    before = sorted((path.name, path.lstat().st_mtime_ns) for path in videos.iterdir())
    run(tmp_path / "run", "--max_steps 2", "--data_root", videos, *words(SMALL))
    printed = capsys.readouterr().out
    # Root may read everything.
    used = len(hostile.GOOD) - 1 + len(hostile.NAMES) + (os.geteuid() == 0)
    assert f" {used} usable" in printed
    for name in files.keys() - hostile.GOOD.keys() - {"no_permission"}:
        if (videos / f"{name}.mp4").is_file():
            assert f"{name}.mp4" in printed
    assert sorted((path.name, path.lstat().st_mtime_ns) for path in videos.iterdir()) == before
