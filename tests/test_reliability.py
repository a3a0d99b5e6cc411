"""What tests/soak.py tries at length, in small: kills, stops, hostile and mutated files, a full disk."""

import functools
import io
import os
import signal
import stat
from pathlib import Path

import hostile
import pytest
import soak
import torch
from conftest import TINY_FLAGS, write_squares

import train_video_ddpm
from data.video_index import find_videos, prepare_videos

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def forked(monkeypatch):
    """Training processes of the trials as forks of this one, which take seconds less to start."""
    monkeypatch.setattr(soak, "FORK", True)


needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


def test_runs_that_are_killed_at_random_instants_end_as_the_undisturbed_one(tmp_path, forked):
    counts = soak.kill(4, tmp_path, steps=8)
    assert counts["kills"] == 4 and counts["runs"] >= 1
    assert [counts[name] for name in ("lost", "different", "failed", "left behind")] == [0, 0, 0, 0]


def test_runs_that_are_stopped_at_random_steps_end_as_the_undisturbed_one(tmp_path, forked):
    counts = soak.stop(2, tmp_path, steps=16, workers=2)
    assert counts["stops"] >= 2 and counts["status_143"] == counts["stops"]
    assert [counts[name] for name in ("different", "failed", "tracebacks")] == [0, 0, 0]


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, forked):
    try:
        found = soak.disk(tmp_path, steps=4)
    except OSError as error:
        pytest.skip(str(error))
    assert found["status"] == 2 and found["steps_saved"] == 2 and found["temporaries"] == 0
    warnings = [line for line in found["said"] if "WARNING" in line]
    assert len(warnings) >= 2
    assert all("No space left on device" in line for line in warnings)
    assert all(f"MiB free in {tmp_path / 'room' / 'run'}" in line for line in warnings)
    assert found["status_with_room"] == 0 and found["same_end"]


@needs_linux
def test_every_hostile_file_is_used_or_refused_with_a_reason_in_bounded_time_and_memory(tmp_path):
    found = {name: rest for name, *rest in soak.hostile(tmp_path)}
    assert [(name, *rest) for name, rest in found.items() if soak.broken(*rest)] == []
    outcomes = {Path(name).stem: rest[0] for name, rest in found.items()}
    used = [*hostile.GOOD, *hostile.GOOD_IMAGES]
    refused = [*hostile.BAD, *hostile.BAD_IMAGES]
    if os.geteuid() == 0:
        refused.remove("no_permission")  # root may read everything
    assert [name for name in used if not outcomes[name].startswith("completed")] == []
    assert [name for name in refused if name in outcomes and not outcomes[name].startswith("refused: ")] == []
    assert all(found[name][0].startswith("completed: 24 frames") for name in hostile.NAMES)
    reasons = {"frames_of_8192x8192": "8192x8192", "fifo": "not a regular file", "audio_only": "no video stream"}
    reasons |= {"forty_million_frames_of_one_byte": "got 40000000", "jpeg_of_10000_scans": "200 scans"}
    reasons |= {"bomb_of_64_megapixels": "8000x8000", "postscript_renamed": "neither PNG", "too_short": "3 frames"}
    reasons |= {"link_to_nothing": "no", "zero_bytes": "InvalidDataError", "bomb_of_text": "too large"}
    assert {name: outcomes[name] for name, reason in reasons.items() if reason not in outcomes[name]} == {}
    assert stat.S_ISFIFO((tmp_path / "videos" / "fifo.mp4").stat().st_mode)  # nobody waited for it, nobody changed it


def test_training_on_a_folder_of_hostile_files_uses_the_good_and_names_the_bad(tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in (hostile.GOOD | hostile.BAD).keys() - {"frames_of_8192x8192", "frames_as_large_as_is_allowed"}:
        (hostile.GOOD | hostile.BAD)[name](videos / f"{name}.mp4")
    for name in hostile.NAMES:
        hostile.mp4(videos / name)
    before = sorted((path.name, path.lstat().st_mtime_ns) for path in videos.iterdir())
    flags = ["--data_root", videos, "--cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "run", *TINY_FLAGS]
    assert train_video_ddpm.main([*map(str, flags), "--epochs", "1", "--vis_every", "0"]) == 0
    printed = capsys.readouterr().out
    used = len(hostile.GOOD) - 1 + len(hostile.NAMES) + (os.geteuid() == 0)
    assert f": {used} usable, 1 too short, " in printed
    for name in ("fifo", "zero_bytes", "hls_renamed", "playlist_renamed", "audio_only", "index_cut_off"):
        assert f"{name}.mp4 (" in printed
    assert sorted((path.name, path.lstat().st_mtime_ns) for path in videos.iterdir()) == before


@needs_linux
@pytest.mark.parametrize(("kind", "count"), [("video", 45), ("image", 45), ("checkpoint", 30)])
def test_mutated_files_crash_hang_and_trace_nothing(tmp_path, kind, count):
    counts, bad = soak.fuzz(kind, count, tmp_path)
    assert bad == [] and sum(counts.values()) == count
    assert any("refused" in outcome for outcome in counts)  # or nothing was mutated


def test_values_of_another_kind_deep_in_a_checkpoint_are_used_or_refused(tmp_path):
    cases = [(name, torch.zeros(3)) for name in ("scaler", "best_val_loss", "model_config.image_channels")]
    cases += [(f"lr_scheduler.{name}", None) for name in ("start_lr", "start_step", "warmup_steps", "total_steps")]
    cases += [("args.batch_size", None), ("args.grad_accum", [1]), ("args.cfg_drop_prob", torch.zeros(3))]
    cases += [("history.epochs", {}), ("history.sums.skipped", float("inf")), ("history.sums.skipped", [1])]
    whole = soak.checkpoint_bases(tmp_path)[0]
    for name, value in cases:
        state, (*places, key) = torch.load(io.BytesIO(whole)), name.split(".")
        functools.reduce(dict.get, places, state)[key] = value
        torch.save(state, tmp_path / "odd.pt")
        assert not soak.broken(soak.look_at_checkpoint(tmp_path / "odd.pt")), (name, value)


def test_bad_files_change_no_window_of_the_good_ones(tmp_path):
    counts = soak.clips(400, tmp_path)
    assert counts["bad"] == 20 and counts["windows"] > 700 and counts["replaced"] > 20
    assert counts["different"] == counts["replaced_differently"] == 0


def test_a_folder_that_may_not_be_entered_is_named(tmp_path, capsys, monkeypatch):
    for name in ("open", "closed"):
        hostile.mp4(tmp_path / "videos" / name / "a.mp4")
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert [path.parent.name for path in find_videos(tmp_path / "videos")] == ["open"]
    assert f"could not look into {tmp_path / 'videos' / 'closed'} (Permission denied)" in capsys.readouterr().err


def test_files_beyond_those_named_are_listed_by_the_checker(tmp_path):
    for i in range(3):
        hostile.mp4(tmp_path / "videos" / f"good{i}.mp4")
    for i in range(22):
        hostile.BAD["text"](tmp_path / "videos" / f"bad{i:02d}.mp4")
    said = []
    prepare_videos(tmp_path / "videos", span=8, val_ratio=0.5, seed=0, cache_dir=tmp_path, log=said.append)
    assert said[1].endswith("and 2 more (python tools/check_videos.py lists all)")


def test_a_second_ctrl_c_stops_at_once(tmp_path, forked):
    write_squares(tmp_path / "clips")
    (tmp_path / "run").mkdir()
    # one step of so many batches takes minutes, which the first signal waits for
    flags = ["--num_workers", "2", "--grad_accum", "4000"]
    process = soak.start_training(tmp_path, tmp_path / "run", *flags)
    log = tmp_path / "run.log"
    try:
        for _ in range(2):
            soak.wait_for(lambda: "steps 1 to" in log.read_text(), seconds=60)
            soak.time.sleep(1)  # the loop begins after that line
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    assert "stopped at once, without saving" in log.read_text() and "Traceback" not in log.read_text()
    assert not (tmp_path / "run" / "last.pt").exists()
