"""Several processes do what one would, stop at one step, and do not wait for one that is gone."""

import os
import signal
import socket
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import words, write_squares
from soak import FORK, SMALL, same

import train_video_ddpm
from training import distributed
from training.checkpointer import Checkpointer
from utils.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("quick", "narrow_predictor")
FLAGS = words(f"{SMALL} --lr 1e-4 --ema_update_after_step 5 --log_every 1")


@pytest.fixture(scope="module")
def uneven_videos(tmp_path_factory):
    """11 training and 3 validation clips, which two processes at batch 2 cannot share evenly."""
    root = tmp_path_factory.mktemp("uneven")
    write_squares(root / "train", 11)
    write_squares(root / "val", 3, first=100)
    return root


def one_of_several(rank, count, port, out_dir, flags, act):
    """Train as torchrun would start it, keep the weights of every step, and act after it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    os.environ.update(TORCHELASTIC_RUN_ID="test")
    os.environ.update(WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count), MASTER_PORT=str(port))
    sys.stdout = sys.stderr = out_dir.with_suffix(f".{rank}.log").open("w", buffering=1)
    train_step = train_video_ddpm.train_step

    def step_and_act(state, *rest):
        train_step(state, *rest)
        weights = {"model": state.model.state_dict(), "ema": state.ema.state_dict()}
        torch.save(weights, out_dir.with_suffix(f".{rank}.pt"))
        act(rank, state.step)

    train_video_ddpm.train_step = step_and_act
    sys.exit(train_video_ddpm.main([str(flag) for flag in flags]))


@pytest.fixture
def train_on(uneven_videos, tmp_path):
    """A function that trains on so many processes at once and tells how they ended."""

    def train(count, name, flags="", act=lambda rank, step: None, given=None):
        out_dir = tmp_path / name
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = given or ["--data_root", uneven_videos, *FLAGS]
        given = ["--out_dir", out_dir, "--cache_dir", tmp_path / "cache", *given, *words(flags)]
        processes = [
            FORK.Process(target=one_of_several, args=(rank, count, port, out_dir, given, act))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(300)
            assert process.exitcode is not None, "a process hangs"
        kept = [out_dir.with_suffix(f".{rank}.pt") for rank in range(count)]
        return SimpleNamespace(
            statuses=[process.exitcode for process in processes],
            logs=[path.with_suffix(".log").read_text() for path in kept],
            weights=[torch.load(path) if path.is_file() else None for path in kept],
        )

    return train


def at(rank, step, do):
    """An `act` that does something in one process after one step."""
    return lambda *place: do() if place == (rank, step) else None


def fail(*args, **settings):
    raise ValueError("--data_root: too many reads failed")


def distance(a, b):
    return max((a[part][name] - b[part][name]).abs().max() for part in a for name in a[part])


@pytest.mark.parametrize(
    "flags", ["--grad_accum 2 --T 6 9 --vis_every 2 --max_steps 4", "--train predictor --epochs 2"]
)
def test_two_processes_are_one_of_twice_the_batch(train_on, tmp_path, flags):
    one = train_on(1, "one", f"{flags} --batch_size 4")
    two = train_on(2, "two", f"{flags} --batch_size 2")
    assert (one.statuses, two.statuses) == ([0], [0, 0])
    assert same(*two.weights)
    # float32 sums in another order; a step of AdamW is up to 1e-4, so wrong gradients would show.
    assert distance(one.weights[0], two.weights[0]) < 1e-5
    histories = [load_checkpoint(tmp_path / name / "last.pt")["history"] for name in ("one", "two")]
    for alone, together in zip(*(history["epochs"] for history in histories), strict=True):
        assert together == {name: pytest.approx(value, rel=1e-4) for name, value in alone.items()}
    # What both would say, one says.
    assert two.logs[1] == ""


def test_a_signal_to_one_process_stops_all_at_one_step_and_one_goes_on_by_itself(
    train_on, tmp_path
):
    straight = train_on(1, "one", "--max_steps 6 --batch_size 4")
    stop = at(1, 3, lambda: signal.raise_signal(signal.SIGTERM))
    two = train_on(2, "two", "--max_steps 6 --batch_size 2", act=stop)
    assert two.statuses == [143, 143]
    assert same(*two.weights)
    saved = load_checkpoint(tmp_path / "two" / "last.pt")
    assert (saved["step"], saved["args"]["processes"]) == (3, 2)
    alone = train_on(1, "two", given=["--resume", "--batch_size", "4"])
    assert alone.statuses == [0]
    assert distance(straight.weights[0], alone.weights[0]) < 1e-5
    assert load_checkpoint(tmp_path / "two" / "last.pt")["args"]["processes"] == 1


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other(train_on, tmp_path, killed):
    die = at(killed, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    run = train_on(2, "run", "--save_every 1 --max_steps 4000", act=die)
    assert run.statuses[killed] == -signal.SIGKILL
    assert run.statuses[1 - killed] == 1
    assert "--resume" in run.logs[1 - killed].splitlines()[-1]
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] in (2, 3)


def only_second(monkeypatch, name, change):
    """Let a function of the script return something else in process 1."""
    function = getattr(train_video_ddpm, name)

    def changed(*args, **settings):
        result = function(*args, **settings)
        return change(result) if distributed.rank() == 1 else result

    monkeypatch.setattr(train_video_ddpm, name, changed)


def test_an_error_of_one_process_ends_the_other(train_on, monkeypatch):
    run = train_on(2, "run", "--max_steps 4000", act=at(1, 2, fail))
    assert run.statuses == [1, 2]
    assert "--data_root" in run.logs[1]
    only_second(monkeypatch, "open_clips", fail)
    assert train_on(2, "prepared").statuses == [1, 2]


def test_processes_that_see_other_files_are_refused(train_on, monkeypatch):
    only_second(monkeypatch, "open_clips", lambda clips: clips[0].videos.pop() and clips)
    run = train_on(2, "run")
    assert run.statuses == [2, 2]
    assert "--data_root" in run.logs[0]


def test_all_processes_refine_around_what_the_first_has_saved(train_on, tmp_path, monkeypatch):
    save_best = Checkpointer.save_best
    pick_objective = train_video_ddpm.pick_objective

    def save_late(self, *rest):  # on rank 0, which is the only one to save
        time.sleep(1)
        save_best(self, *rest)

    def pick_and_tell(args, ema, predictor, *rest):
        torch.save(predictor, tmp_path / f"predictor.{distributed.rank()}.pt")
        return pick_objective(args, ema, predictor, *rest)

    monkeypatch.setattr(Checkpointer, "save_best", save_late)
    monkeypatch.setattr(train_video_ddpm, "pick_objective", pick_and_tell)
    assert train_on(2, "run", "--preset refine --max_steps 2").statuses == [0, 0]
    found = [torch.load(tmp_path / f"predictor.{rank}.pt") for rank in range(2)]
    assert same(found[0]["weights"], load_checkpoint(tmp_path / "run/predictor/best.pt")["ema"])
    assert same(*found)
