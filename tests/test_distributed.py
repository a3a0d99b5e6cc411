"""Several processes do what one would: the same weights, stops and validation; and none waits for one that is gone."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from typing import NamedTuple

import pytest
import torch
from conftest import TINY_FLAGS, words, write_squares
from torch.nn.parallel import DistributedDataParallel

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import DecodedFrames
from evaluation.evaluator import Evaluator
from training.checkpointer import Checkpointer
from utils import distributed
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("quick")
FLAGS = [*TINY_FLAGS, *words("--lr 1e-4 --ema_update_after_step 5 --log_every 1 --vis_every 0")]


@pytest.fixture(scope="module")
def uneven_videos(tmp_path_factory):
    """11 training and 3 validation clips, which two processes at batch 2 cannot share evenly."""
    root = tmp_path_factory.mktemp("uneven")
    write_squares(root / "train", 11)
    write_squares(root / "val", 3, first=100)
    return root


def one_of_several(rank, count, port, log, body, arguments):
    """The body of one process, as torchrun would start it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    try:
        status = body(rank, *arguments)
    except SystemExit as stop:
        status = stop.code
    sys.stdout.flush()
    os._exit(status)


def on_processes(count, logs, body, *arguments):
    """body(rank, *arguments) in so many processes at once; returns their exit statuses and what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [logs.with_suffix(f".{rank}.log") for rank in range(count)]
    fork = multiprocessing.get_context("fork").Process
    own = [(rank, count, port, logs[rank], body, arguments) for rank in range(count)]
    processes = [fork(target=one_of_several, args=arguments) for arguments in own]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes], [log.read_text() for log in logs]


def train_and_act(rank, kept, act, flags):
    """Train, with the last weights kept for comparison."""
    train_step = train_video_ddpm.train_step

    def step_and_act(state, *rest):
        train_step(state, *rest)
        torch.save({"model": state.model.state_dict(), "ema": state.ema.state_dict()}, kept[rank])
        act(rank, state.step)

    train_video_ddpm.train_step = step_and_act
    return train_video_ddpm.main(list(map(str, flags)))


class Ended(NamedTuple):
    statuses: list
    logs: list
    weights: list
    seconds: float


@pytest.fixture
def train_on(uneven_videos, tmp_path):
    """A function that trains on so many processes at once, tmp_path / name, and tells how they ended."""

    def train(count, name, flags="", act=lambda rank, step: None, resume=False):
        out_dir = tmp_path / name
        kept = [out_dir.with_suffix(f".{rank}.pt") for rank in range(count)]
        given = ["--out_dir", out_dir, "--cache_dir", tmp_path / "cache"]
        given += ["--resume"] if resume else ["--data_root", uneven_videos, *FLAGS]
        clock = time.monotonic()
        statuses, logs = on_processes(count, out_dir, train_and_act, kept, act, [*given, *words(flags)])
        weights = [torch.load(path) if path.is_file() else None for path in kept]
        return Ended(statuses, logs, weights, time.monotonic() - clock)

    return train


def at(rank, step, do):
    """An `act` that does something in one process, once it has taken so many steps."""
    return lambda *place: do() if place == (rank, step) else None


def terminate():
    signal.raise_signal(signal.SIGTERM)


def fail(*_, **__):
    raise ValueError("--data_root: too many reads failed")


def differ_by(a, b):
    return max((a[part][name] - b[part][name]).abs().max().item() for part in ("model", "ema") for name in a[part])


REFINE = "--predictor learned --predictor_width 8 --predictor_steps 8 --predictor_lr 1e-4"


@pytest.mark.parametrize(("accumulated", "flags"), [(1, ""), (2, ""), (1, REFINE)])
def test_two_processes_are_one_of_twice_the_batch(train_on, tmp_path, accumulated, flags):
    common = f"--grad_accum {accumulated} --max_steps {20 // accumulated} --vis_every 5 {flags}"
    one, two = train_on(1, "one", f"{common} --batch_size 4"), train_on(2, "two", f"{common} --batch_size 2")
    assert one.statuses == [0] and two.statuses == [0, 0], two.logs
    assert differ_by(*two.weights) == 0
    # float32 sums in another order; AdamW's step is at most lr = 1e-4, so a wrong gradient would show
    assert differ_by(one.weights[0], two.weights[0]) < 1e-5
    epochs = [load_checkpoint(tmp_path / name / "last.pt")["history"]["epochs"] for name in ("one", "two")]
    for alone, together in zip(*epochs, strict=True):
        assert alone.keys() == together.keys()
        assert all(together[name] == pytest.approx(value, rel=1e-4) for name, value in alone.items())
    assert "2 processes, 4 clips at once" in two.logs[0]
    assert two.logs[1] == ""  # what both would say, one says


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_goes_on_alone(train_on, tmp_path):
    straight = train_on(1, "one", "--max_steps 14 --batch_size 4")
    # the end of the fifth epoch of two steps
    two = train_on(2, "two", "--max_steps 14 --batch_size 2", act=at(1, 10, terminate))
    assert two.statuses == [143, 143] and differ_by(*two.weights) == 0
    going_on = "stopped by SIGTERM after step 10; go on with: torchrun --nproc_per_node 2 train_video_ddpm.py"
    assert going_on in two.logs[0]
    saved = load_checkpoint(tmp_path / "two" / "last.pt")
    assert (saved["step"], saved["step_in_epoch"], saved["args"]["processes"]) == (10, 0, 2)
    alone = train_on(1, "two", "--batch_size 4", resume=True)
    assert alone.statuses == [0]
    assert differ_by(straight.weights[0], alone.weights[0]) < 1e-5
    assert load_checkpoint(tmp_path / "two" / "last.pt")["args"]["processes"] == 1


def test_signals_that_come_one_after_another_disturb_no_save(train_on, tmp_path, monkeypatch):
    # both processes of a machine get their SIGTERM, but not in the same instant
    save_last = Checkpointer.save_last

    def signalled_in_between(self, state):  # of rank 0, which alone saves
        terminate()
        save_last(self, state)

    monkeypatch.setattr(Checkpointer, "save_last", signalled_in_between)
    run = train_on(2, "run", "--epochs 50 --batch_size 1", act=at(1, 4, terminate))  # epochs of five steps
    assert run.statuses == [143, 143], run.logs
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other_with_a_clear_line(train_on, tmp_path, killed):
    die = at(killed, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run, other = train_on(2, "run", "--save_every 1 --max_steps 400", act=die), 1 - killed
    assert run.statuses[killed] == -signal.SIGKILL and run.statuses[other] == 1 and run.seconds < 60
    end = run.logs[other].strip().splitlines()[-1]
    assert f"process {other} of 2 ends, as another one is gone" in end and "with --resume goes on from" in end
    assert "Traceback" not in run.logs[other]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] in (4, 5)


def only_second(monkeypatch, place, name, act):
    """Let process 1 alone do something else in place of a function, with what that function returns."""
    function = getattr(place, name)

    def changed(*args):
        return act(function(*args)) if distributed.rank() == 1 else function(*args)

    monkeypatch.setattr(place, name, changed)


def test_an_error_of_one_process_ends_the_other(train_on, monkeypatch):
    run = train_on(2, "run", "--max_steps 400", act=at(1, 3, fail))
    assert run.statuses == [1, 2] and run.seconds < 60
    assert "too many reads failed" in run.logs[1] and "another one is gone" in run.logs[0]

    with monkeypatch.context() as patch:  # of the first, before any data is looked at
        patch.setattr(train_video_ddpm, "make_out_dir", fail)
        run = train_on(2, "early")
    assert run.statuses == [2, 1] and run.seconds < 60 and "another one is gone" in run.logs[1]

    only_second(monkeypatch, train_video_ddpm, "open_clips", fail)  # while the data is prepared
    run = train_on(2, "prepared")
    assert run.statuses == [1, 2] and run.seconds < 60 and "another one is gone" in run.logs[0]


def test_each_process_names_the_bad_files_it_meets(train_on, monkeypatch):
    read = DecodedFrames.read

    def fail_often(self, video, wanted):
        return fail() if wanted[0] % 3 == 0 else read(self, video, wanted)

    monkeypatch.setattr(DecodedFrames, "read", fail_often)
    run = train_on(2, "run", "--max_steps 2 --batch_size 4")
    assert all("could not read" in log for log in run.logs)


def test_processes_that_see_other_files_are_refused(train_on, monkeypatch):
    def one_file_less(clips):
        clips[0].videos.pop()
        return clips

    only_second(monkeypatch, train_video_ddpm, "open_clips", one_file_less)
    run = train_on(2, "run")
    assert run.statuses == [2, 2] and "must be the same for all processes of a run" in run.logs[0]


def test_the_first_of_all_prepares_before_any_other(train_on, tmp_path, monkeypatch):
    write = CachedFrames._write

    def write_and_tell(self, *rest):
        (tmp_path / f"written_by_{distributed.rank()}").touch()
        return write(self, *rest)

    monkeypatch.setattr(CachedFrames, "_write", write_and_tell)
    run = train_on(2, "run", "--cache_videos --max_steps 2 --batch_size 1")
    assert run.statuses == [0, 0], run.logs
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
                shares.append(distributed.rank_slice(count))
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("accumulated", [1, 3])
def test_gradients_are_exchanged_once_per_step(train_on, tmp_path, monkeypatch, accumulated):
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
        (tmp_path / f"counts.{rank}").write_text(str(Counting.exchanged))

    monkeypatch.setattr(distributed, "DistributedDataParallel", Counting)
    run = train_on(2, "run", f"--batch_size 1 --max_steps 3 --grad_accum {accumulated}", act=report)
    assert run.statuses == [0, 0], run.logs
    assert {(tmp_path / f"counts.{rank}").read_text() for rank in range(2)} == {"3"}  # one bucket holds this network


def bytes_below(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sample_and_tell(rank, flags):
    """Sample, and print the jobs that this process does."""
    generate = sample_video_ddpm.generate
    sample_video_ddpm.generate = lambda *given: print("job", given[-1].sample) or generate(*given)
    return sample_video_ddpm.main(flags)


def evaluate_and_tell(rank, flags):
    read = Evaluator.read_and_score
    Evaluator.read_and_score = lambda self, *given: print("job", given[-1][0]) or read(self, *given)
    return evaluate_video_ddpm.main(flags)


def jobs(log):
    return {int(number) for number in re.findall(r"^job (\d+)$", log, re.M)}


def test_two_processes_sample_the_files_of_one(ckpt, square_videos, tmp_path):
    given = ["--ckpt", ckpt, "--data_root", square_videos, "--cache_dir", tmp_path / "cache"]
    given += words("--num_clips 1 --num_samples 3 --steps 2 --batch_size 1")
    printed = {}
    for count in (1, 2):
        flags = [str(word) for word in [*given, "--out_dir", tmp_path / str(count)]]
        statuses, logs = on_processes(count, tmp_path / f"n{count}", sample_and_tell, flags)
        assert statuses == [0] * count
        lines = [line for line in logs[0].splitlines() if not line.startswith("job")]
        printed[count] = [line.replace(str(tmp_path / str(count)), "") for line in lines]
        assert [jobs(log) for log in logs] == ([{0, 1, 2}] if count == 1 else [{0, 2}, {1}])
    assert printed[1] == printed[2] and len(printed[1]) == 5  # files, three samples and their mean
    one, two = (bytes_below(tmp_path / str(count)) for count in (1, 2))
    records = [path for path in one if path.name == "sample.json"]  # with out_dir and seconds
    assert len(records) == 3 and one.keys() == two.keys()
    assert all(one[path] == two[path] for path in one.keys() - set(records))


def test_two_processes_evaluate_to_the_lines_of_one(ckpt, square_videos, tmp_path):
    given = ["--ckpt", ckpt, "--data_root", square_videos, "--cache_dir", tmp_path / "cache", "--split", "all"]
    given += words("--steps 2 --batch_size 2 --num_videos 7 --num_samples 2 --baselines cross_fade --metrics psnr")
    lines = {}
    for count in (1, 2):
        flags = [str(word) for word in [*given, "--out_dir", tmp_path / str(count)]]
        statuses, logs = on_processes(count, tmp_path / f"n{count}", evaluate_and_tell, flags)
        assert statuses == [0] * count and (count == 1 or "scoring" not in logs[1])
        assert [jobs(log) for log in logs] == ([{0, 1, 2, 3, 4, 5, 6}] if count == 1 else [{0, 2, 4, 6}, {1, 3, 5}])
        lines[count] = list(map(json.loads, (tmp_path / str(count) / "per_clip.jsonl").read_text().splitlines()))
        for line in lines[count]:
            for entry in line.get("methods", {}).values():
                assert entry.pop("seconds") > 0
    assert lines[1] == lines[2] and len(lines[1]) == 8  # the settings, and seven clips
