"""What must not be lost: kills, stops, full disks, hostile files, failures of what is optional."""

import functools
import itertools
import os
import signal
import sys
import time
from pathlib import Path

import hostile
import pytest
import soak
import torch
from conftest import check_refusal, last, lines, run, words
from soak import FORK, SMALL, same_end

import train_video_ddpm
import utils.io
from data.kinetics_video_dataset import ClipRead, VideoClipDataset
from data.training_clips import ClipLoader
from training.checkpointer import claim
from training.signals import StopRequest
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.flags import Parser

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


# --- what is optional never costs what was learned ------------------------------------------------


@pytest.mark.parametrize("broken", ["make_preview", "save_png", "save_mp4", "save_training_curves"])
def test_what_a_run_can_do_without_costs_one_line_once(train, monkeypatch, capsys, broken):
    def fail(*given, **named):
        raise RuntimeError("Encoder not found")

    module = train_video_ddpm if broken == "make_preview" else utils.io
    monkeypatch.setattr(module, broken, fail)
    out = train("a", "--epochs 3 --vis_every 1")
    assert capsys.readouterr().err.count("Encoder not found") == 1
    assert len(lines(out, "val")) == 3
    assert last(out)["epoch"] == 3


def test_the_checkpoint_of_an_epoch_is_written_before_its_preview(train, monkeypatch, tmp_path):
    saved = []

    def look(*given):
        saved.append(last(tmp_path / "a")["epoch"])
        raise ValueError

    monkeypatch.setattr(train_video_ddpm, "make_preview", look)
    train("a", "--epochs 2 --vis_every 1")
    assert saved == [1, 2]


def train_without_a_screen(command, is_closed):
    sys.stdout = None if is_closed else Path("/dev/full").open("w")  # noqa: SIM115
    sys.exit(train_video_ddpm.main(command))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("is_closed", [True, False])
def test_a_screen_that_is_closed_or_full_costs_no_run(square_videos, tmp_path, is_closed):
    flags = f"{SMALL} --max_steps 3 --out_dir {tmp_path / 'a'} --cache_dir {tmp_path / 'cache'}"
    command = ["--data_root", str(square_videos), *words(flags)]
    process = FORK.Process(target=train_without_a_screen, args=(command, is_closed))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert last(tmp_path / "a")["step"] == 3


def test_a_stop_during_validation_is_heeded_and_validation_comes_first_on_resume(
    train, monkeypatch, capfd
):
    flags = "--epochs 2 --ema_update_after_step 2"
    straight = train("straight", flags)
    held_out = ClipLoader.validation

    def stop_at_once(self):
        signal.raise_signal(signal.SIGTERM)
        yield from held_out(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ClipLoader, "validation", stop_at_once)
        stopped = train("stopped", flags, status=143)
    assert "SIGTERM" in capfd.readouterr().err
    assert last(stopped)["epoch"] == 1
    assert last(stopped)["history"]["epochs"] == []
    run(stopped, "--resume")
    assert same_end(straight, stopped)
    assert same_end(straight, stopped, "best.pt")
    assert lines(straight, "val") == lines(stopped, "val")


def test_a_closed_terminal_stops_a_run_unless_nohup_said_otherwise(train):
    # The tests themselves may run under nohup.
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        train("a", "--max_steps 4", stop=2, by=signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        request = StopRequest()
        signal.raise_signal(signal.SIGHUP)
        request.restore()
    finally:
        signal.signal(signal.SIGHUP, former)
    assert request.signal == 0


def test_data_that_is_away_ends_a_run_with_what_it_has_learned(train, monkeypatch):
    reads = itertools.count()
    read = VideoClipDataset.__getitem__

    def fail_later(self, key):
        if self.random_window and next(reads) >= 6:
            return ClipRead(None, ["0.mp4 (gone)"])
        return read(self, key)

    monkeypatch.setattr(VideoClipDataset, "__getitem__", fail_later)
    out = train("a", "--max_steps 50 --batch_size 2", status=2)
    assert last(out)["step"] == 3
    # Of a run that has learned nothing, no checkpoint is in the way of the next one.
    out = train("b", "--max_steps 50 --batch_size 2", status=2)
    assert not (out / "last.pt").exists()


def test_out_of_memory_in_the_first_step_leaves_the_folder_free(train, monkeypatch, capsys):
    def fail(*given):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(train_video_ddpm, "train_step", fail)
        train("a", "--max_steps 1", status=2)
    check_refusal(capsys, "--batch_size")
    train("a", "--max_steps 1")


def test_sigterm_removes_temporary_files_as_ctrl_c_does(tmp_path):
    # The tests themselves may run with it ignored.
    former = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with (
            pytest.raises(SystemExit) as stop,
            Parser("").one_line_errors(),
            utils.io.atomic_write(tmp_path / "video.mp4"),
        ):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert stop.value.code == 143
    assert list(tmp_path.iterdir()) == []


def claim_and_wait(out_dir, claimed):
    with claim(out_dir):
        claimed.set()
        time.sleep(600)


def test_a_folder_takes_one_run_at_a_time_and_a_killed_one_leaves_no_claim(train, tmp_path, capsys):
    claimed = FORK.Event()
    other = FORK.Process(target=claim_and_wait, args=(tmp_path / "a", claimed))
    other.start()
    claimed.wait()
    train("a", "--max_steps 1", status=2)
    check_refusal(capsys, f"--out_dir {tmp_path / 'a'}")
    other.kill()
    other.join()
    train("a", "--max_steps 1")
