"""Several processes do what one would: the same weights, stops and validation; and none waits for one that is gone."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS, moving_square
from torch.nn.parallel import DistributedDataParallel

import train_video_ddpm
from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import DecodedFrames
from training import state as training_state
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.io import save_mp4

FLAGS = [*TINY_FLAGS, "--lr", "1e-4", "--ema_update_after_step", "5", "--log_every", "1", "--vis_every", "5"]


@pytest.fixture(scope="module")
def uneven_videos(tmp_path_factory):
    """11 training and 3 validation clips, which two processes at batch 2 cannot share evenly."""
    root = tmp_path_factory.mktemp("uneven")
    for side, first, count in (("train", 0, 11), ("val", 100, 3)):
        (root / side).mkdir()
        for i in range(count):
            save_mp4(root / side / f"{i}.mp4", moving_square(first + i, size=16), fps=10)
    return root


def one_of_several(rank, count, port, log, weights, act, flags):
    """The body of one process: as torchrun would start it, with its last weights kept for comparison."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    save_last, optimise = training_state.Saver.save_last, train_video_ddpm.optimise

    def save_and_keep(self, state):
        save_last(self, state)
        torch.save({"model": state.model.state_dict(), "ema": state.ema.state_dict()}, weights)

    def optimise_and_act(state, *rest):
        optimise(state, *rest)
        act(rank, state.step)

    training_state.Saver.save_last = save_and_keep
    train_video_ddpm.optimise = optimise_and_act
    try:
        status = train_video_ddpm.main(list(map(str, flags)))
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    os._exit(status)


def train_on(count, out_dir, *flags, act=lambda rank, step: None):
    """Train on so many processes at once; returns their exit statuses, logs, last weights, and the seconds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs, kept = ([out_dir.with_suffix(f".{rank}.{kind}") for rank in range(count)] for kind in ("log", "pt"))
    flags = ["--out_dir", out_dir, "--cache_dir", out_dir.parent / "cache", *flags]
    processes = [
        multiprocessing.get_context("fork").Process(
            target=one_of_several, args=(rank, count, port, logs[rank], kept[rank], act, flags)
        )
        for rank in range(count)
    ]
    clock = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode is not None, "a process hangs"
    weights = [torch.load(path) if path.is_file() else None for path in kept]
    return [p.exitcode for p in processes], [log.read_text() for log in logs], weights, time.monotonic() - clock


def differ_by(a, b):
    return max((a[part][name] - b[part][name]).abs().max().item() for part in ("model", "ema") for name in a[part])


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes_are_one_of_twice_the_batch(uneven_videos, tmp_path, accumulated):
    common = ["--data_root", uneven_videos, *FLAGS, "--grad_accum", accumulated, "--max_steps", 20 // accumulated]
    _, _, _, _ = one = train_on(1, tmp_path / "one", *common, "--batch_size", 4)
    two = train_on(2, tmp_path / "two", *common, "--batch_size", 2)
    assert one[0] == [0] and two[0] == [0, 0], two[1]
    assert differ_by(*two[2]) == 0
    # float32 sums in another order; AdamW's step is at most lr = 1e-4, so a wrong gradient would show
    assert differ_by(one[2][0], two[2][0]) < 1e-5
    saved = [load_checkpoint(tmp_path / name / "last.pt")["history"] for name in ("one", "two")]
    for alone, together in zip(saved[0]["epochs"], saved[1]["epochs"], strict=True):
        assert alone.keys() == together.keys()
        assert all(together[name] == pytest.approx(value, rel=1e-4) for name, value in alone.items())
    assert "2 processes, 4 clips at once" in two[1][0]
    assert two[1][1] == ""  # what both would say, one says


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_goes_on_alone(uneven_videos, tmp_path):
    def stop_second(rank, step):
        if (rank, step) == (1, 10):  # the end of the fifth epoch of two steps
            signal.raise_signal(signal.SIGTERM)

    common = ["--data_root", uneven_videos, *FLAGS, "--vis_every", 0, "--max_steps", 14]
    straight = train_on(1, tmp_path / "one", *common, "--batch_size", 4)
    statuses, logs, weights, _ = train_on(2, tmp_path / "two", *common, "--batch_size", 2, act=stop_second)
    assert statuses == [143, 143] and differ_by(*weights) == 0
    assert "stopped by SIGTERM after step 10; go on with: torchrun --nproc_per_node 2 train_video_ddpm.py" in logs[0]
    saved = load_checkpoint(tmp_path / "two" / "last.pt")
    assert (saved["step"], saved["step_in_epoch"], saved["args"]["processes"]) == (10, 0, 2)
    alone = train_on(1, tmp_path / "two", "--resume", "--batch_size", 4)
    assert alone[0] == [0]
    assert differ_by(straight[2][0], alone[2][0]) < 1e-5
    assert load_checkpoint(tmp_path / "two" / "last.pt")["args"]["processes"] == 1


def test_signals_that_come_one_after_another_disturb_no_save(uneven_videos, tmp_path, monkeypatch):
    # both processes of a machine get their SIGTERM, but not in the same instant
    def stop_second(rank, step):
        if (rank, step) == (1, 4):
            signal.raise_signal(signal.SIGTERM)

    save_last = training_state.Saver.save_last

    def signalled_in_between(self, state):
        if distributed.rank() == 0:
            signal.raise_signal(signal.SIGTERM)
        save_last(self, state)

    monkeypatch.setattr(training_state.Saver, "save_last", signalled_in_between)
    common = ["--data_root", uneven_videos, *FLAGS, "--vis_every", 0, "--epochs", 50]  # of five steps
    statuses, logs, _, _ = train_on(2, tmp_path / "run", *common, "--batch_size", 1, act=stop_second)
    assert statuses == [143, 143], logs
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_clear_line(uneven_videos, tmp_path, killed):
    def die(rank, step):
        if (rank, step) == (killed, 5):
            os.kill(os.getpid(), signal.SIGKILL)

    common = ["--data_root", uneven_videos, *FLAGS, "--vis_every", 0, "--save_every", 1, "--max_steps", 400]
    statuses, logs, _, seconds = train_on(2, tmp_path / "run", *common, "--batch_size", 2, act=die)
    other = 1 - killed
    assert statuses[killed] == -signal.SIGKILL and statuses[other] == 1 and seconds < 60
    last = logs[other].strip().splitlines()[-1]
    assert f"process {other} of 2 ends, as another one is gone" in last and "--resume goes on from" in last
    assert "Traceback" not in logs[other]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] in (4, 5)


def test_an_error_of_one_process_ends_the_other(uneven_videos, tmp_path):
    def fail(rank, step):
        if (rank, step) == (1, 3):
            raise ValueError("--data_root: too many reads failed")

    common = ["--data_root", uneven_videos, *FLAGS, "--vis_every", 0, "--max_steps", 400]
    statuses, logs, _, seconds = train_on(2, tmp_path / "run", *common, act=fail)
    assert statuses == [1, 2] and seconds < 60
    assert "too many reads failed" in logs[1] and "another one is gone" in logs[0]


def test_a_process_that_fails_while_data_is_prepared_ends_the_other(uneven_videos, tmp_path, monkeypatch):
    def fail_second(*args):
        if distributed.rank() == 1:
            raise ValueError("--size needs more memory")

    monkeypatch.setattr(train_video_ddpm, "check_memory", fail_second)
    statuses, logs, _, seconds = train_on(2, tmp_path / "run", "--data_root", uneven_videos, *FLAGS)
    assert statuses == [1, 2] and seconds < 60 and "another one is gone" in logs[0]


def test_each_process_names_the_bad_files_it_meets(uneven_videos, tmp_path, monkeypatch):
    read = DecodedFrames.read

    def fail_often(self, video, wanted):
        if wanted[0] % 3 == 0:
            raise ValueError("broken")
        return read(self, video, wanted)

    monkeypatch.setattr(DecodedFrames, "read", fail_often)
    flags = ["--data_root", uneven_videos, *FLAGS, "--vis_every", 0, "--max_steps", 2, "--batch_size", 4]
    _, logs, _, _ = train_on(2, tmp_path / "run", *flags)
    assert all("could not read" in log for log in logs)


def test_processes_that_see_other_files_are_refused(uneven_videos, tmp_path, monkeypatch):
    open_clips = train_video_ddpm.open_clips

    def one_file_less(args):
        train_clips, val_clips = open_clips(args)
        if distributed.rank() == 1:
            train_clips.videos.pop()
        return train_clips, val_clips

    monkeypatch.setattr(train_video_ddpm, "open_clips", one_file_less)
    statuses, logs, _, _ = train_on(2, tmp_path / "run", "--data_root", uneven_videos, *FLAGS)
    assert statuses == [2, 2] and "must be the same for all processes of a run" in logs[0]


def test_the_first_of_all_prepares_before_any_other(tmp_path, monkeypatch):
    write = CachedFrames._write

    def write_and_tell(self, *rest):
        (tmp_path / f"written_by_{distributed.rank()}").touch()
        return write(self, *rest)

    monkeypatch.setattr(CachedFrames, "_write", write_and_tell)
    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(6):
        save_mp4(videos / f"{i}.mp4", moving_square(i, size=16), fps=10)
    flags = ["--data_root", videos, *FLAGS, "--cache_videos", "--max_steps", 2, "--batch_size", 1]
    statuses, logs, _, _ = train_on(2, tmp_path / "run", *flags)
    assert statuses == [0, 0], logs
    assert [path.name for path in tmp_path.glob("written_by_*")] == ["written_by_0"]


def test_shares_are_whole_and_even(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    for count in (0, 1, 3, 8, 11):
        for processes in (1, 2, 3, 5):
            monkeypatch.setenv("WORLD_SIZE", str(processes))
            shares = []
            for rank in range(processes):
                monkeypatch.setenv("RANK", str(rank))
                shares.append(distributed.share(count))
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gradients_are_exchanged_once_per_step(uneven_videos, tmp_path):
    counts = tmp_path / "counts"

    class Counting(DistributedDataParallel):
        exchanged = 0

        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            self.register_comm_hook(None, self.count)

        def count(self, _, bucket):
            Counting.exchanged += 1
            future = torch.futures.Future()
            torch.distributed.all_reduce(bucket.buffer().div_(2))
            future.set_result(bucket.buffer())
            return future

    def report(rank, step):
        Path(f"{counts}.{rank}").write_text(str(Counting.exchanged))

    steps = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "DistributedDataParallel", Counting)
        for accumulated in (1, 3):
            flags = ["--data_root", uneven_videos, *FLAGS, "--batch_size", 1, "--vis_every", 0, "--max_steps", steps]
            out = tmp_path / str(accumulated)
            statuses, logs, _, _ = train_on(2, out, *flags, "--grad_accum", accumulated, act=report)
            assert statuses == [0, 0], logs
            per_rank = [int(Path(f"{counts}.{rank}").read_text()) for rank in range(2)]
            assert per_rank == [steps, steps]  # one bucket holds this network
