"""Training as a user runs it: exact resume, honest refusals, records and previews."""

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from conftest import TINY_FLAGS, moving_square
from soak import same
from torch.utils._python_dispatch import TorchDispatchMode
from training.optimisation import learning_rate, plan_learning_rate
from utils.records import save_training_curves

import train_video_ddpm
import training.state
from benchmarks import bench_training
from data.video_reader import probe_video
from train_video_ddpm import PRESETS, build_parser, main
from training import optimisation
from utils.checkpoint import load_checkpoint
from utils.io import save_mp4


def run(out_dir, *flags, status=0):
    """Train in this process with tiny settings and check the exit status."""
    try:
        result = main(["--out_dir", str(out_dir), "--cache_dir", str(out_dir.parent / "cache"), *map(str, flags)])
    except SystemExit as stop:
        result = stop.code
    assert result == status
    return out_dir


def lines(out_dir):
    return [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def interrupted(step, number=signal.SIGTERM):
    """Deliver a signal right after the given optimiser step, as a terminal would."""
    optimise = train_video_ddpm.optimise

    def optimise_then_signal(state, *rest):
        result = optimise(state, *rest)
        if state.step == step:
            signal.raise_signal(number)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_video_ddpm, "optimise", optimise_then_signal)
        yield


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "flags"),
    [
        (3, []),  # in the middle of the first epoch (4 steps)
        (4, []),  # at its end
        (6, ["--num_workers", "2"]),
        (5, ["--cache_videos", "--hflip", "--time_reverse"]),
        (5, ["--grad_accum", "2", "--warmup_steps", "3", "--noise_offset", "0.1", "--ema_update_after_step", "2"]),
    ],
)
def test_resuming_is_exact(square_videos, tmp_path, k, flags):
    common = [
        "--data_root",
        square_videos,
        "--epochs",
        "4",
        "--log_every",
        "2",
        "--val_ratio",
        "0.1",
        *TINY_FLAGS,
        *flags,
    ]
    straight = run(tmp_path / "straight", *common)
    with interrupted(k):
        stopped = run(tmp_path / "stopped", *common, status=128 + signal.SIGTERM)
    assert load_checkpoint(stopped / "last.pt")["step"] == k
    run(stopped, "--data_root", square_videos, "--resume")
    a, b = (load_checkpoint(folder / "last.pt") for folder in (straight, stopped))
    for key in (
        "step",
        "epoch",
        "step_in_epoch",
        "history",
        "best_val_loss",
        "lr_scheduler",
        "model",
        "ema",
        "optimizer",
    ):
        assert same(a[key], b[key]), key
    timeless = [
        [{k: v for k, v in line.items() if k != "clips_per_second"} for line in lines(f)] for f in (straight, stopped)
    ]
    assert timeless[0] == timeless[1]


def test_a_run_goes_on_in_another_memory_layout(square_videos, tmp_path):
    common = ["--data_root", square_videos, "--epochs", "2", "--vis_every", "0", *TINY_FLAGS]
    straight = run(tmp_path / "straight", *common)
    with interrupted(3):
        out = run(tmp_path / "a", *common, status=128 + signal.SIGTERM)
    run(out, "--resume", "--no-channels_last")
    a, b = (load_checkpoint(folder / "last.pt") for folder in (straight, out))
    assert not a["model"]["stem.weight"].is_contiguous() and b["model"]["stem.weight"].is_contiguous()
    moments = a["optimizer"]["state"], b["optimizer"]["state"]
    for number in moments[0]:  # moments taken for those of other weights would be off by their own size
        one, other = (state[number]["exp_avg_sq"].sqrt() for state in moments)
        assert (one - other).abs().sum() <= 0.05 * one.abs().sum() + 1e-6


def test_no_step_waits_for_a_number():
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    args = bench_training.training_arguments("demo", "--base_channels", "12", "--size", "16", "--batch_size", "2")
    step, state = bench_training.our_step(args, torch.device("cpu"))
    step()
    with Watch():
        step()
    # what would make the host wait for a GPU: values, counts and comparisons as Python numbers
    assert "_fused_adamw_" in asked and not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(asked)
    with Watch():
        state.tally.values[0].item()
    assert "_local_scalar_dense" in asked  # so the watch does see such a question


def test_the_same_run_twice_gives_the_same_weights_for_any_number_of_workers(square_videos, tmp_path):
    common = ["--data_root", square_videos, "--max_steps", "3", "--vis_every", "0", *TINY_FLAGS]
    weights = [
        load_checkpoint(run(tmp_path / str(n), *common, "--num_workers", n) / "last.pt")["model"] for n in (0, 2)
    ]
    assert same(*weights)
    other = load_checkpoint(run(tmp_path / "seed", *common, "--seed", "1") / "last.pt")["model"]
    assert not same(weights[0], other)


def test_lines_of_work_that_was_lost_leave_the_record(square_videos, tmp_path):
    out = run(tmp_path / "a", "--data_root", square_videos, "--max_steps", "2", "--log_every", "1", *TINY_FLAGS)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "loss": 9}\n{"kind": "tra')
    run(out, "--resume", "--max_steps", "3")
    assert [line["step"] for line in lines(out) if line["kind"] == "train"] == [1, 2, 3]


def test_resume_takes_the_arguments_of_the_checkpoint_and_says_what_overrides_them(square_videos, tmp_path, capsys):
    out = run(tmp_path / "a", "--data_root", square_videos, "--max_steps", "2", "--color_mode", "gray", *TINY_FLAGS)
    capsys.readouterr()
    run(out, "--resume", "--max_steps", "4", "--batch_size", "3", "--size", "16")
    printed = capsys.readouterr().out
    assert "--max_steps 4 overrides the checkpoint's 2" in printed
    assert "--batch_size 3 overrides the checkpoint's 2" in printed
    assert "--size" not in printed
    resumed = load_checkpoint(out / "last.pt")
    assert resumed["step"] == 4 and resumed["args"]["color_mode"] == "gray" and resumed["args"]["batch_size"] == 3


def test_what_could_not_be_resumed_is_refused_at_the_start(square_videos, tmp_path, capsys):
    limits = {
        "epochs": 2**31,
        "max_steps": 2**53,
        "seed": 2**63,
        "max_videos": 2**31,
        "batch_size": 4096,
        "noise_offset": 100,
        "timesteps": 100_000,
    }
    for flag, limit in limits.items():
        run(tmp_path / "a", "--data_root", square_videos, *TINY_FLAGS, f"--{flag}", limit + 1, status=2)
        assert f"--{flag} must be at most {limit} (got {limit + 1}" in capsys.readouterr().err


def test_flags_that_contradict_the_checkpoint_are_refused_with_both_values(square_videos, tmp_path, capsys):
    out = run(tmp_path / "a", "--data_root", square_videos, "--max_steps", "1", "--vis_every", "0", *TINY_FLAGS)
    changes = {
        "T": (9, 8), "size": (32, 16), "frame_stride": (2, 1), "color_mode": ("gray", "rgb"),
        "endpoint_context": (1, 2),
        "base_channels": (24, 12), "channel_mults": (1, "[1, 2]"), "res_blocks": (2, 1),
        "temporal_attn_levels": (0, "[1]"), "timesteps": (500, 1000), "beta_schedule": ("linear", "cosine"),
        "noise_offset": (0.1, 0.0), "cfg_drop_prob": (0.5, 0.08), "temporal_loss_weight": (0.5, 0.05), "seed": (1, 42),
        "val_ratio": (0.5, 0.01),
    }  # fmt: skip
    for flag, (value, stored) in changes.items():
        capsys.readouterr()
        run(out, "--resume", "--max_steps", "2", f"--{flag}", value, status=2)
        error = capsys.readouterr().err
        assert f"--{flag} is fixed by" in error and f"the checkpoint has {stored})" in error


def test_a_moved_run_goes_on_where_it_is_now(square_videos, tmp_path):
    old = run(tmp_path / "old", "--data_root", square_videos, "--max_steps", "1", "--vis_every", "0", *TINY_FLAGS)
    new = shutil.copytree(old, tmp_path / "new")
    before = (old / "last.pt").read_bytes()
    run(new, "--resume", "--max_steps", "2")
    assert (old / "last.pt").read_bytes() == before and load_checkpoint(new / "last.pt")["step"] == 2


def test_a_killed_run_goes_on_from_its_last_save(square_videos, tmp_path, monkeypatch):
    common = ["--data_root", square_videos, "--epochs", "2", "--vis_every", "0", *TINY_FLAGS]
    straight = run(tmp_path / "straight", *common)
    optimise = train_video_ddpm.optimise

    def die_in_step_six(state, *rest):
        if state.step == 5:
            raise KeyboardInterrupt  # nothing is saved on the way out
        return optimise(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_video_ddpm, "optimise", die_in_step_six)
        killed = run(tmp_path / "killed", *common, "--save_every", "3", status=130)
    assert load_checkpoint(killed / "last.pt")["step"] == 4  # the epoch's end, after the third step's save
    run(killed, "--resume")
    a, b = (load_checkpoint(folder / "last.pt") for folder in (straight, killed))
    assert all(same(a[key], b[key]) for key in a if key not in ("args", "rng"))


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before_it_and_nothing_else(square_videos, tmp_path, capsys):
    common = ["--data_root", square_videos, "--epochs", "2", "--vis_every", "0", *TINY_FLAGS]
    straight = run(tmp_path / "straight", *common)
    with interrupted(3):
        out = run(tmp_path / "a", *common, "--save_every", "1", status=128 + signal.SIGTERM)
    assert load_checkpoint(out / "prev.pt")["step"] == 3  # the third step's own save, then that of the signal
    with interrupted(2):
        out = run(tmp_path / "b", *common, "--save_every", "1", status=128 + signal.SIGTERM)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    kept = (out / "prev.pt").read_bytes()
    capsys.readouterr()
    with interrupted(3):
        run(out, "--resume", "--save_every", "0", status=128 + signal.SIGTERM)
    warning = capsys.readouterr().err
    assert "WARNING" in warning and f"going on from {out / 'prev.pt'}, step 2" in warning
    assert (out / "prev.pt").read_bytes() == kept  # the damaged file did not take its place
    run(out, "--resume", "--save_every", "0")
    assert same(load_checkpoint(straight / "last.pt")["model"], load_checkpoint(out / "last.pt")["model"])
    for name in ("last.pt", "prev.pt"):
        (out / name).write_bytes(b"PK")
    run(out, "--resume", status=2)
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_a_full_disk_costs_a_line_and_the_attempt_but_not_the_run(square_videos, tmp_path, capsys, monkeypatch):
    common = ["--data_root", square_videos, "--epochs", "2", "--vis_every", "0", "--save_every", "1", *TINY_FLAGS]
    straight = run(tmp_path / "straight", *common)
    save, calls = torch.save, []

    def full(failing):
        def write(content, file):
            calls.append(1)
            file.write(bytes(1000))
            if failing(len(calls)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            file.seek(0)
            save(content, file)

        return write

    monkeypatch.setattr(torch, "save", full(lambda call: call in (2, 3)))
    out = run(tmp_path / "a", *common)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 2 and "No space left on device" in warnings[0]
    assert f"MiB free in {out}" in warnings[0] and "untouched" in warnings[0]
    assert same(load_checkpoint(straight / "last.pt")["model"], load_checkpoint(out / "last.pt")["model"])
    assert not list(out.glob(".*.tmp"))

    calls.clear()
    monkeypatch.setattr(torch, "save", full(lambda call: call > 2))
    out = run(tmp_path / "b", *common, status=2)
    assert "the work since the last save is lost" in capsys.readouterr().err
    assert load_checkpoint(out / "last.pt")["step"] == 2 and load_checkpoint(out / "prev.pt")["step"] == 1


def test_a_disk_that_is_full_throughout_costs_lines_alone(square_videos, tmp_path, capsys, monkeypatch):
    # not only checkpoints: run.json, metrics.jsonl, previews and curves are written, too
    flags = ["--data_root", square_videos, "--epochs", "1", *TINY_FLAGS, "--vis_every", "1"]
    with interrupted(2):
        out = run(tmp_path / "a", *flags, status=128 + signal.SIGTERM)
    before = {name: (out / name).read_bytes() for name in ("last.pt", "metrics.jsonl")}

    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(train_video_ddpm, "save_training_curves", full)
    capsys.readouterr()
    run(out, "--resume", status=2)
    error = capsys.readouterr().err
    for name in ("run.json", "epoch_0001_sample", "training_curves.png", "last.pt", "best.pt"):
        assert f"{out / name} could not be written (No space left on device" in error
    assert "the work since the last save is lost" in error and "Traceback" not in error
    assert (out / "last.pt").read_bytes() == before["last.pt"]
    assert (out / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])


def test_a_best_checkpoint_that_could_not_be_written_is_still_to_be_beaten(square_videos, tmp_path, monkeypatch):
    save, failed = training.state.save, []

    def fail_once(path, *rest):
        if path.name == "best.pt" and not failed:
            failed.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *rest)

    monkeypatch.setattr(training.state, "save", fail_once)
    flags = ["--data_root", square_videos, "--epochs", "2", "--vis_every", "0", *TINY_FLAGS, "--lr", "1e-9"]
    out = run(tmp_path / "a", *flags, "--ema_decay", "0.5")
    assert failed and load_checkpoint(out / "best.pt")["epoch"] == 2  # no better than the first, but there is no other


def test_saves_come_by_the_clock_too(square_videos, tmp_path, monkeypatch):
    now = iter(range(0, 10**6, 40))  # every look at the clock finds it 40 seconds later
    monkeypatch.setattr(training.state, "time", SimpleNamespace(monotonic=lambda: next(now)))
    saved = []
    monkeypatch.setattr(training.state, "save", lambda path, state, *rest: saved.append(state.step))
    common = ["--data_root", square_videos, "--epochs", "3", "--vis_every", "0", *TINY_FLAGS]
    run(tmp_path / "a", *common, "--max_steps", "11", "--save_minutes", "1", "--batch_size", "1")
    # a look per step and one per save, so 80 seconds have gone by every other step: 2, 4, ...; an epoch has 9 steps
    assert saved[:4] == [2, 4, 6, 8] and saved[-1] == 11


def test_what_a_killed_process_left_behind_is_removed_and_that_of_a_running_one_is_not(square_videos, tmp_path):
    out = tmp_path / "a"
    out.mkdir()
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    stale, running = (out / f".last.pt.{process}.tmp" for process in (int(gone.stdout), os.getppid()))
    stale.write_bytes(b"half")
    running.write_bytes(b"half")
    cache = tmp_path / "cache"  # which another machine may be writing to
    cache.mkdir()
    old, new = (cache / f".{name}.u8.{int(gone.stdout)}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    run(out, "--data_root", square_videos, "--max_steps", "1", "--vis_every", "0", *TINY_FLAGS)
    assert not stale.exists() and running.exists()
    assert not old.exists() and new.exists()


def test_a_run_is_never_started_over_or_overwritten_silently(square_videos, tmp_path, capsys):
    run(tmp_path / "none", "--data_root", square_videos, "--resume", status=2)
    assert "there is no" in capsys.readouterr().err
    out = run(tmp_path / "a", "--data_root", square_videos, "--max_steps", "1", "--vis_every", "0", *TINY_FLAGS)
    before = (out / "last.pt").read_bytes()
    run(out, "--data_root", square_videos, *TINY_FLAGS, status=2)
    assert "already holds a last.pt; pass --resume" in capsys.readouterr().err
    run(out, "--data_root", square_videos, "--dry_run", *TINY_FLAGS)  # keeps to a folder of its own
    assert (out / "last.pt").read_bytes() == before and (out / "dry_run" / "last.pt").is_file()


# --- learning rate ----------------------------------------------------------------------------------------------------


def arguments(*flags):
    return build_parser().parse_args(list(flags))


def test_the_learning_rate_is_a_cosine_over_the_steps_that_will_run():
    plan = plan_learning_rate(arguments("--lr", "0.01"), 100, 0, None)
    for step in (0, 25, 50, 99):
        assert learning_rate(step, plan) == pytest.approx(0.005 * (1 + math.cos(math.pi * step / 100)))
    warm = plan_learning_rate(arguments("--lr", "0.01", "--warmup_steps", "10"), 100, 0, None)
    assert [learning_rate(step, warm) for step in (0, 4, 9, 10)] == pytest.approx([0.001, 0.005, 0.01, 0.01])
    assert learning_rate(100, warm) == pytest.approx(0)


@pytest.mark.parametrize("total", [60, 200, 1000])
def test_another_length_on_resume_never_makes_the_learning_rate_jump(total):
    args = arguments("--lr", "0.01")
    before = plan_learning_rate(args, 100, 0, None)
    after = plan_learning_rate(args, total, 40, before)
    rates = [learning_rate(step, before) for step in range(40)] + [learning_rate(s, after) for s in range(40, total)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))
    assert rates[40] == pytest.approx(learning_rate(40, before))
    assert learning_rate(total, after) == pytest.approx(0)
    assert plan_learning_rate(args, 100, 40, before) == before  # the same length: the same curve, exactly


@pytest.mark.parametrize(("before", "after"), [("2", "4"), ("4", "2")])
def test_other_clips_per_step_on_resume_change_no_epoch_and_still_end_at_a_rate_of_zero(
    square_videos, tmp_path, before, after
):
    common = ["--data_root", square_videos, "--epochs", "4", "--vis_every", "0", "--log_every", "1", *TINY_FLAGS]
    stop = 2 * (9 // int(before))  # after two epochs of nine clips
    with interrupted(stop):
        out = run(tmp_path / "a", *common, "--batch_size", before, status=128 + signal.SIGTERM)
    run(out, "--resume", "--batch_size", after)
    saved = load_checkpoint(out / "last.pt")
    rest = 2 * (9 // int(after))
    assert (saved["epoch"], saved["step_in_epoch"], saved["step"]) == (4, 0, stop + rest)
    assert saved["lr_scheduler"]["total_steps"] == stop + rest


def test_another_length_during_warm_up_keeps_the_peak():
    args = arguments("--lr", "0.01", "--warmup_steps", "100")
    after = plan_learning_rate(args, 2000, 10, plan_learning_rate(args, 1000, 0, None))
    assert max(learning_rate(step, after) for step in range(10, 2000)) == pytest.approx(0.01)


def test_a_new_peak_on_resume_starts_its_own_cosine():
    before = plan_learning_rate(arguments("--lr", "0.01"), 100, 0, None)
    after = plan_learning_rate(arguments("--lr", "0.002"), 200, 100, before)
    assert learning_rate(100, after) == 0.002 and learning_rate(150, after) == pytest.approx(0.001)


def test_the_schedule_counts_max_steps(square_videos, tmp_path):
    out = run(
        tmp_path / "a", "--data_root", square_videos, "--max_steps", "6", "--epochs", "50", "--log_every", "1",
        "--vis_every", "0", *TINY_FLAGS,
    )  # fmt: skip
    rates = [line["lr"] for line in lines(out) if line["kind"] == "train"]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


# --- what a run does --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A short but real run on clips of one moving square."""
    root = tmp_path_factory.mktemp("learned")
    for side, first, count in (("train", 0, 24), ("val", 100, 3)):
        (root / "videos" / side).mkdir(parents=True)
        for i in range(count):
            save_mp4(root / "videos" / side / f"{i}.mp4", moving_square(first + i, size=16), fps=10)
    return run(
        root / "out", "--data_root", root / "videos", "--epochs", "12", "--ema_decay", "0.9", "--log_every", "3",
        "--ema_update_after_step", "10", *TINY_FLAGS, "--lr", "2e-3", "--batch_size", "4", "--vis_every", "5",
        "--cache_videos",
    )  # fmt: skip


def test_training_lowers_the_validation_loss(learned):
    losses = [line["val_loss"] for line in lines(learned) if line["kind"] == "val"]
    assert len(losses) == 12
    # a step with the wrong sign, or weights that are not the trained ones, would leave it where it was
    assert losses[-1] < 0.8 * losses[0]


def test_best_follows_the_validation_loss(learned):
    losses = [line["val_loss"] for line in lines(learned) if line["kind"] == "val"]
    best = load_checkpoint(learned / "best.pt")
    assert best["best_val_loss"] == min(losses)
    assert best["history"]["epochs"][-1]["val_loss"] == min(losses)


def test_records_say_what_happened(learned):
    train = [line for line in lines(learned) if line["kind"] == "train"]
    assert [line["step"] for line in train] == [1, *range(3, 73, 3)]
    for line in train:
        assert {"epoch", "loss", "lr", "grad_norm", "clips_per_second", "gpu_memory_mib"} <= set(line)
    val = [line for line in lines(learned) if line["kind"] == "val"]
    shown = [line["epoch"] for line in val if "psnr" in line]
    assert shown == [5, 10, 12]  # and always at the end
    assert all(math.isfinite(line["psnr"]) and line["psnr_cross_fade"] > 5 for line in val if "psnr" in line)
    described = json.loads((learned / "run.json").read_text())
    assert described["args"]["size"] == 16 and described["versions"]["torch"] and "device" in described
    assert described["git"] is None or set(described["git"]) == {"commit", "dirty"}


def test_previews_show_truth_above_generated_with_the_observed_frames_untouched(learned):
    previews = sorted(path.name for path in learned.glob("epoch_*"))
    assert previews == [f"epoch_{e:04d}_sample.{kind}" for e in (5, 10, 12) for kind in ("mp4", "png")]
    sheet = iio.imread(learned / "epoch_0012_sample.png")
    side = 6 * 16 + 6
    assert sheet.shape == (3 * 2 * side, 8 * side, 3)
    for clip in range(3):
        rows = sheet[clip * 2 * side : (clip + 1) * 2 * side].reshape(2, side, 8, side, 3)
        for frame in range(8):
            equal = (rows[0, :, frame] == rows[1, :, frame]).all()
            assert equal == (frame in (0, 1, 6, 7))
    assert probe_video(learned / "epoch_0012_sample.mp4").frames == 8


def test_curves_are_drawn_where_matplotlib_is(learned):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    assert iio.imread(learned / "training_curves.png").shape[2] >= 3


def test_the_checkpoint_holds_what_the_design_lists(learned):
    checkpoint = load_checkpoint(learned / "last.pt")
    assert checkpoint["clip_config"] == {"num_frames": 8, "size": 16, "frame_stride": 1, "color_mode": "rgb"}
    assert checkpoint["diffusion_config"] == {"timesteps": 1000, "schedule": "cosine", "noise_offset": 0.0}
    assert checkpoint["model_config"]["endpoint_context"] == 2
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in checkpoint["model"])
    assert checkpoint["model"].keys() == checkpoint["ema"].keys()
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["step_in_epoch"]) == (72, 12, 0)


def test_a_dry_run_takes_two_steps_a_preview_and_a_save(square_videos, tmp_path):
    out = run(tmp_path / "a", "--data_root", square_videos, "--dry_run", *TINY_FLAGS)
    made = {path.name for path in (out / "dry_run").iterdir()}
    assert {"last.pt", "metrics.jsonl", "run.json"} < made and any(name.endswith("sample.png") for name in made)
    assert load_checkpoint(out / "dry_run" / "last.pt")["step"] == 2 and not (out / "last.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--T", "3", "--endpoint_context", "1"],  # M = 1
        ["--T", "7", "--endpoint_context", "3"],
        ["--frame_stride", "2", "--T", "6", "--color_mode", "gray"],
        ["--beta_schedule", "linear", "--timesteps", "50", "--dynamic_threshold", "--noise_offset", "0.05"],
        ["--max_videos", "3", "--batch_size", "8"],  # fewer clips than a step needs
        ["--amp", "--save_every", "1", "--grad_clip", "0"],
        ["--activation_checkpointing", "--no-channels_last"],
    ],
)
def test_every_shape_of_run_works(square_videos, tmp_path, capsys, flags):
    run(tmp_path / "a", "--data_root", square_videos, "--max_steps", "2", *TINY_FLAGS, *flags)
    printed = capsys.readouterr().out
    assert "2 steps" in printed and ("--amp does nothing on cpu" in printed)
    checkpoint = load_checkpoint(tmp_path / "a" / "last.pt")
    assert all(value.isfinite().all() for value in checkpoint["ema"].values())


def test_ema_copies_first_and_then_averages(square_videos, tmp_path):
    common = ["--data_root", square_videos, "--vis_every", "0", "--ema_decay", "0.9", "--ema_update_after_step", "2"]
    out = run(tmp_path / "a", *common, "--epochs", "1", "--save_every", "1", "--max_steps", "2", *TINY_FLAGS)
    early = load_checkpoint(out / "last.pt")
    assert same(early["ema"], early["model"])
    run(out, "--resume", "--max_steps", "3", "--lr", "1e-3")
    late = load_checkpoint(out / "last.pt")
    for name, value in late["ema"].items():
        torch.testing.assert_close(value, 0.9 * early["ema"][name] + 0.1 * late["model"][name], rtol=1e-5, atol=1e-7)


def test_contexts_are_dropped_in_training_as_often_as_asked(square_videos, tmp_path, monkeypatch):
    blank = []
    loss = optimisation.diffusion_loss

    def watch(model, schedule, start, middle, end, *rest):
        if torch.is_grad_enabled():  # not a trial of the weights before they are saved
            blank.extend([bool(s.eq(0).all() and e.eq(0).all()) for s, e in zip(start, end, strict=True)])
        return loss(model, schedule, start, middle, end, *rest)

    monkeypatch.setattr(optimisation, "diffusion_loss", watch)
    for rate, expected in (("0", {False}), ("1", {True}), ("0.5", {False, True})):
        blank.clear()
        common = ["--data_root", square_videos, "--max_steps", "6", "--vis_every", "0", *TINY_FLAGS]
        run(tmp_path / rate, *common, "--cfg_drop_prob", rate)
        assert set(blank) == expected and len(blank) == 12


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the losses of the given calls, counted from 1, not a number."""
    loss, calls = optimisation.diffusion_loss, []

    def choose(poisoned):
        def poisoned_loss(*args):
            terms = loss(*args)
            if not torch.is_grad_enabled():  # a trial of the weights before they are saved
                return terms
            calls.append(1)
            return terms._replace(total=terms.total * float("nan")) if poisoned(len(calls)) else terms

        monkeypatch.setattr(optimisation, "diffusion_loss", poisoned_loss)

    return choose


def test_a_step_without_finite_gradients_changes_no_weight_and_is_counted(square_videos, tmp_path, poison):
    common = ["--data_root", square_videos, "--epochs", "2", "--vis_every", "0", "--log_every", "1", *TINY_FLAGS]
    with interrupted(2):
        out = run(tmp_path / "a", *common, status=128 + signal.SIGTERM)
    before = load_checkpoint(out / "last.pt")
    poison(lambda call: call == 1)
    with interrupted(3):
        run(out, "--resume", status=128 + signal.SIGTERM)
    after = load_checkpoint(out / "last.pt")
    assert after["step"] == 3 and same(before["model"], after["model"])
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert after["history"]["sums"]["skipped"] == 1
    run(out, "--resume")
    at = {line["step"]: line for line in lines(out) if line["kind"] == "train"}
    assert [at[n]["skipped_steps"] for n in (2, 3, 4)] == [0, 1, 1]
    assert at[3]["loss"] is None and at[3]["grad_norm"] is None and math.isfinite(at[4]["loss"])
    assert not same(after["model"], load_checkpoint(out / "last.pt")["model"])


def test_a_run_that_has_lost_its_gradients_ends_and_is_never_saved(square_videos, tmp_path, capsys, poison):
    poison(lambda call: call > 2)
    common = ["--data_root", square_videos, "--save_every", "1", "--vis_every", "0", *TINY_FLAGS]
    out = run(tmp_path / "a", *common, "--epochs", "9", "--batch_size", "2", status=1)
    error = capsys.readouterr().err
    assert "of 20 steps in a row one must have finite gradients and a loss of at most 10.5 (got 20 without" in error
    assert error.count("\n") == 1
    assert f"the last good checkpoint is {out / 'last.pt'}" in error
    kept = load_checkpoint(out / "last.pt")
    assert kept["history"]["sums"]["skipped"] == 19 and kept["step"] == 21
    assert all(value.isfinite().all() for weights in (kept["model"], kept["ema"]) for value in weights.values())


@pytest.mark.parametrize("rate", ["1e4", "1e30"])
def test_diverged_weights_are_never_saved_and_end_the_run(square_videos, tmp_path, capsys, rate):
    common = ["--data_root", square_videos, "--vis_every", "0", "--log_every", "1", "--save_every", "1", *TINY_FLAGS]
    with interrupted(2):
        out = run(tmp_path / "a", *common, "--epochs", "9", status=128 + signal.SIGTERM)
    before = (out / "last.pt").read_bytes()
    capsys.readouterr()
    run(out, "--resume", "--lr", rate, status=1)
    error = capsys.readouterr().err
    # the first step's own loss was still a good one; the weights that it left behind are not
    assert "last.pt is not written: the weights after step 3 are diverged" in error and "a lower --lr" in error
    assert f"the last good checkpoint is {out / 'last.pt'}" in error
    assert (out / "last.pt").read_bytes() == before
    if (out / "best.pt").is_file():
        assert all(value.isfinite().all() for value in load_checkpoint(out / "best.pt")["ema"].values())
    last = [line for line in lines(out) if line["kind"] == "train"][-1]
    assert last["skipped_steps"] + last["diverged_steps"] >= 1
    short = run(tmp_path / "short", *common, "--max_steps", "3", "--lr", rate, status=1)  # over before it is ended
    assert "is not written" in capsys.readouterr().err and not (short / "last.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(square_videos, tmp_path, capsys, number):
    with interrupted(2, number):
        out = run(tmp_path / "a", "--data_root", square_videos, "--epochs", "9", *TINY_FLAGS, status=128 + number)
    assert load_checkpoint(out / "last.pt")["step"] == 2
    printed = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name} after step 2; go on with: " in printed
    assert printed.rstrip().endswith("--resume")


def test_compiled_training_keeps_clean_names(square_videos, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    out = run(
        tmp_path / "a", "--data_root", square_videos, "--max_steps", "1", "--compile", "--vis_every", "0", *TINY_FLAGS
    )
    assert compiled == ["VideoUNet3D"]  # in place, so the state dict is untouched
    assert not any("_orig_mod" in name for name in load_checkpoint(out / "last.pt")["model"])


def test_presets_fill_only_what_was_not_given():
    parser = build_parser()
    given = parser.parse_given(["--preset", "demo", "--size", "64"])
    assert given == {"preset": "demo", "size": 64}
    assert set(PRESETS["demo"]) <= set(vars(parser.defaults()))
    args, *_ = train_video_ddpm.resolve_arguments(parser, ["--preset", "demo", "--size", "64", "--out_dir", "nowhere"])
    assert args.size == 64 and args.base_channels == PRESETS["demo"]["base_channels"] and args.out_dir == "nowhere"


def test_defaults_are_those_of_the_original_design():
    expected = {
        "val_ratio": 0.01, "out_dir": "outputs/train", "num_frames": 8, "size": 64, "frame_stride": 1,
        "color_mode": "rgb", "endpoint_context": 2, "batch_size": 8, "lr": 1e-4, "epochs": 30, "timesteps": 1000,
        "beta_schedule": "cosine", "cfg_drop_prob": 0.08, "ema_decay": 0.999, "ema_update_after_step": 100,
        "base_channels": 96, "channel_mults": [1, 2, 4], "res_blocks": 2, "temporal_attn_levels": [1, 2],
        "temporal_loss_weight": 0.05, "log_every": 20, "num_workers": 4, "seed": 42, "max_videos": None, "max_steps": 0,
        "grad_clip": 1.0, "amp": True, "vis_every": 1, "vis_guidance_scale": 1.5, "vis_steps": 40, "noise_offset": 0.0,
        "dynamic_threshold": False, "tensorboard": False, "cache_videos": False, "resume": False,
    }  # fmt: skip
    defaults = vars(build_parser().defaults())
    assert {name: defaults[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--T", "4"],
            "--T must exceed 2 * --endpoint_context so that a middle exists (got --T 4, --endpoint_context 2)",
        ),
        (["--size", "60"], "--size must be divisible by 8"),
        (["--size", "0"], "argument --size: must be an integer of at least 1 (got 0)"),
        (["--lr", "nan"], "argument --lr: must be a number above 0 (got nan)"),
        (["--val_ratio", "1.5"], "argument --val_ratio: must be a number in (0, 1) (got 1.5)"),
        (["--cfg_drop_prob", "-1"], "argument --cfg_drop_prob: must be a number in [0, 1] (got -1)"),
        (["--color_mode", "sepia"], "argument --color_mode: invalid choice: 'sepia'"),
        (["--max_videos", "1"], "--max_videos must be at least 2"),
        (["--base_channels", "30"], "--base_channels must be a positive multiple of 4 (got 30)"),
        (["--temporal_attn_levels", "3"], "--temporal_attn_levels must lie in [0, 2]"),
        (["--vis_steps", "2000"], "--vis_steps must be at most --timesteps 1000 (got 2000)"),
        (["--device", "tpu"], "argument --device: must be auto, cpu, cuda or cuda:N (got tpu)"),
        (["--base", "8"], "unrecognized arguments: --base 8"),
        (["--data_root", "/nowhere"], "--data_root must be a folder (got /nowhere)"),
    ],
)
def test_wrong_use_is_one_line_and_status_two(square_videos, tmp_path, capsys, flags, message):
    if "--data_root" not in flags:
        flags = ["--data_root", square_videos, *flags]
    run(tmp_path / "a", *flags, status=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_out_dir_that_cannot_be_made_is_one_line(square_videos, tmp_path, capsys):
    (tmp_path / "file").touch()
    run(tmp_path / "file" / "out", "--data_root", square_videos, *TINY_FLAGS, status=2)
    error = capsys.readouterr().err
    assert "file/out" in error and error.count("\n") == 1


def test_every_flag_is_documented(capsys):
    parser = build_parser()
    for action in parser._actions:
        assert action.help and len(action.help) > 5, action.option_strings
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--help"])
    assert stop.value.code == 0 and "--endpoint_context" in capsys.readouterr().out


def test_a_sigterm_to_the_whole_process_group_is_a_clean_stop_even_with_loading_processes(square_videos, tmp_path):
    script = Path(train_video_ddpm.__file__)
    flags = ["--data_root", square_videos, "--out_dir", tmp_path / "a", "--cache_dir", tmp_path / "cache"]
    flags += ["--epochs", "10000", *TINY_FLAGS, "--num_workers", "2", "--vis_every", "0"]
    process = subprocess.Popen(
        [sys.executable, script, *map(str, flags)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("step 20 "):
            os.killpg(process.pid, signal.SIGTERM)
            break
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM after step" in printed and "Traceback" not in errors
    step = load_checkpoint(tmp_path / "a" / "last.pt")["step"]
    run(tmp_path / "a", "--resume", "--num_workers", "0", "--max_steps", step + 1)
    assert load_checkpoint(tmp_path / "a" / "last.pt")["step"] == step + 1


def test_tensorboard_gets_scalars_and_previews(square_videos, tmp_path):
    pytest.importorskip("tensorboard", reason="optional: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run(tmp_path / "a", "--data_root", square_videos, "--max_steps", "2", "--tensorboard", *TINY_FLAGS)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "val/val_loss", "val/psnr"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["preview"]
    recorded = [line["val_loss"] for line in lines(out) if line["kind"] == "val"]
    assert [event.value for event in events.Scalars("val/val_loss")] == pytest.approx(recorded)


def test_an_optional_package_that_is_missing_is_named(square_videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("utils.records.find_spec", lambda name: None)
    run(tmp_path / "a", "--data_root", square_videos, "--tensorboard", *TINY_FLAGS, status=2)
    assert "pip install tensorboard" in capsys.readouterr().err
    curves = tmp_path / "training_curves.png"  # drawn where matplotlib is, and never required
    assert not save_training_curves(curves, {"train": [(1, 0.5)], "epochs": []}) and not curves.exists()
