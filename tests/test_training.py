"""Training as a user runs it: exact resume, honest refusals, records and previews."""

import errno
import importlib.machinery
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from conftest import TINY_FLAGS, run, words, write_squares
from soak import same
from torch.utils._python_dispatch import TorchDispatchMode

import train_video_ddpm
import utils.io
from data.kinetics_video_dataset import ReadFailures
from data.video_reader import probe_video
from diffusion.pipeline import MiddleFramePipeline
from diffusion.schedule import DiffusionSchedule
from train_video_ddpm import TRAIN_PRESETS, build_parser, main, resolve_args, train_step
from training import checkpointer
from training.clip_shapes import clip_config_of
from training.state import get_lr, init_state, make_lr_schedule
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.io import save_training_curves

pytestmark = pytest.mark.usefixtures("quick")
ROOT = Path(__file__).parents[1]


def last(out_dir, name="last.pt"):
    return load_checkpoint(out_dir / name)


def lines(out_dir, *kinds):
    """The lines of metrics.jsonl, of these kinds alone if any are given."""
    found = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if not kinds or line["kind"] in kinds]


def all_finite(weights):
    return all(value.isfinite().all() for value in weights.values())


def full_disk(*args, **settings):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- resume -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "flags"),
    [
        (3, ""),  # in the middle of the first epoch (4 steps)
        (4, ""),  # at its end
        (6, "--num_workers 2"),
        (5, "--cache_videos --hflip --time_reverse"),
        (5, "--T 6 9 --frame_stride 1 2"),
        (5, "--grad_accum 2 --warmup_steps 3 --noise_offset 0.1 --ema_update_after_step 2"),
    ],
)
def test_resuming_is_exact(train, k, flags):
    common = f"--epochs 4 --log_every 2 --val_ratio 0.1 --vis_every 1 {flags}"
    straight, stopped = train("straight", common), train("stopped", common, stop=k)
    assert last(stopped)["step"] == k
    run(stopped, "--resume")
    a, b = last(straight), last(stopped)
    for key in words("step epoch step_in_epoch history best_val_loss lr_scheduler model ema optimizer"):
        assert same(a[key], b[key]), key
    a, b = ([line | {"clips_per_second": None} for line in lines(folder)] for folder in (straight, stopped))
    assert a == b


def test_a_run_goes_on_in_another_memory_layout(train):
    straight, out = train("straight", "--epochs 2"), train("a", "--epochs 2", stop=3)
    run(out, "--resume --no-channels_last")
    a, b = last(straight), last(out)
    assert not a["model"]["stem.weight"].is_contiguous() and b["model"]["stem.weight"].is_contiguous()
    moments = a["optimizer"]["state"], b["optimizer"]["state"]
    for number in moments[0]:  # moments taken for those of other weights would be off by their own size
        one, other = (state[number]["exp_avg_sq"].sqrt() for state in moments)
        assert (one - other).abs().sum() <= 0.05 * one.abs().sum() + 1e-6


def test_ema_copies_the_weights_at_first_and_decays_towards_them_then(train, monkeypatch):
    weights = []

    def step_and_remember(state, *rest):
        train_step(state, *rest)
        weights.append(state.model.time_mlp[0].weight.detach().clone())

    monkeypatch.setattr(train_video_ddpm, "train_step", step_and_remember)
    out = train("a", "--max_steps 4 --ema_decay 0.75 --ema_update_after_step 2")
    expected = weights[1]
    for later in weights[2:]:
        expected = 0.75 * expected + 0.25 * later
    # three float32 sums; the weights move by 1e-3 a step, so a wrong decay would be off by 2e-4 or more
    torch.testing.assert_close(last(out)["ema"]["time_mlp.0.weight"], expected, rtol=0, atol=1e-7)
    assert (expected - weights[-1]).abs().max() > 1e-4


def test_each_step_has_its_learning_rate_and_a_bounded_gradient(train, monkeypatch):
    rates, moved = [], []

    def step_and_measure(state, *rest):
        weight = state.model.out[-1].weight  # which has a gradient from the first step on
        before = weight.detach().clone()
        train_step(state, *rest)
        rates.append(state.optimizer.param_groups[0]["lr"])
        moved.append((weight - before).abs().max().item())

    monkeypatch.setattr(train_video_ddpm, "train_step", step_and_measure)
    for clip in ("0", "1e-12"):
        train(f"clip {clip}", f"--max_steps 3 --warmup_steps 2 --lr 1e-3 --grad_clip {clip}")
    assert rates == 2 * [5e-4, 1e-3, 1e-3]
    # Adam's first step is the learning rate whatever the gradient, unless it drowns in the eps of 1e-8; decay is 1e-5
    assert moved[0] == pytest.approx(5e-4, rel=0.02) and max(moved[3:]) < 2e-5


def test_no_step_waits_for_a_number():
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    args = resolve_args(build_parser(), [*TINY_FLAGS, "--out_dir", "nowhere"])[0]
    state = init_state(args, torch.device("cpu"), None)
    state.plan_steps(args, epoch_steps=4)
    clips = itertools.repeat((torch.zeros(2, 3, 8, 16, 16, dtype=torch.uint8), [], 2))  # as collated
    pipe = MiddleFramePipeline(state.ema, DiffusionSchedule(), clip_config_of(args))
    of_step = (pipe, ReadFailures().clips(clips, torch.device("cpu")), args, None)
    train_step(state, *of_step)
    with Watch():
        train_step(state, *of_step)
    # what would make the host wait for a GPU: values, counts and comparisons as Python numbers
    assert "_fused_adamw_" in asked and not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero"} & set(asked)
    with Watch():
        state.metrics.values[0].item()
    assert "_local_scalar_dense" in asked  # so the watch does see such a question


def test_the_same_run_twice_gives_the_same_weights_for_any_number_of_workers(train):
    variants = ("--num_workers 0", "--num_workers 2", "--seed 1")
    one, two, other = (last(train(str(i), f"--max_steps 3 {flags}"))["model"] for i, flags in enumerate(variants))
    assert same(one, two) and not same(one, other)


def test_lines_of_work_that_was_lost_leave_the_record(train):
    out = train("a", "--max_steps 2 --log_every 1")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "loss": 9}\n{"kind": "tra')
    run(out, "--resume --max_steps 3")
    assert [line["step"] for line in lines(out, "train")] == [1, 2, 3]


def test_resume_takes_the_arguments_of_the_checkpoint_and_says_what_overrides_them(train, capsys):
    out = train("a", "--max_steps 2 --color_mode gray --vis_every 1")
    capsys.readouterr()
    run(out, "--resume --max_steps 4 --batch_size 3 --size 16")
    printed = capsys.readouterr().out
    assert "--max_steps 4 overrides the checkpoint's 2" in printed
    assert "--batch_size 3 overrides the checkpoint's 2" in printed
    assert "--size" not in printed
    resumed = last(out)
    assert resumed["step"] == 4 and resumed["args"]["color_mode"] == "gray" and resumed["args"]["batch_size"] == 3


def test_what_could_not_be_resumed_is_refused_at_the_start(train, capsys):
    limits = {"epochs": 2**31 - 1, "max_steps": 2**53 - 1, "seed": 2**63 - 1, "max_videos": 2**31 - 1}
    limits |= {"batch_size": 4096, "noise_offset": 100, "timesteps": 100_000}
    for flag, limit in limits.items():
        train("a", f"--{flag} {limit + 1}", status=2)
        rule, value = capsys.readouterr().err.split("(got ")
        assert f"--{flag}" in rule and str(limit) in rule and str(limit + 1) in value


def test_flags_that_contradict_the_checkpoint_are_refused_with_both_values(train, capsys):
    out = train("a", "--max_steps 1")
    changes = {"T": (9, 8), "size": (32, 16), "frame_stride": (2, 1), "color_mode": ("gray", "rgb"), "seed": (1, 42)}
    changes |= {"endpoint_context": (1, 2), "base_channels": (24, 12), "channel_mults": (1, "[1, 2]")}
    changes |= {"res_blocks": (2, 1), "temporal_attn_levels": (0, "[1]"), "timesteps": (500, 1000)}
    changes |= {"beta_schedule": ("linear", "cosine"), "noise_offset": (0.1, 0.0), "cfg_drop_prob": (0.5, 0.08)}
    changes |= {"temporal_loss_weight": (0.5, 0.05), "val_ratio": (0.5, 0.01), "noise_correlation": (0.5, 0.0)}
    changes |= {"max_videos": (5, None)}
    for flag, (value, stored) in changes.items():
        capsys.readouterr()
        run(out, f"--resume --max_steps 2 --{flag} {value}", status=2)
        error = capsys.readouterr().err
        assert f"--{flag} is fixed by {out / 'last.pt'}" in error and f"the checkpoint has {stored})" in error


def test_a_moved_run_goes_on_where_it_is_now(train, tmp_path):
    old = train("old", "--max_steps 1")
    new = shutil.copytree(old, tmp_path / "new")
    before = (old / "last.pt").read_bytes()
    run(new, "--resume --max_steps 2")
    assert (old / "last.pt").read_bytes() == before and last(new)["step"] == 2


def test_a_killed_run_goes_on_from_its_last_save(train, monkeypatch):
    straight = train("straight", "--epochs 2")

    def die_in_step_six(state, *rest):
        if state.step == 5:
            raise KeyboardInterrupt  # nothing is saved on the way out
        train_step(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_video_ddpm, "train_step", die_in_step_six)
        killed = train("killed", "--epochs 2 --save_every 3", status=130)
    assert last(killed)["step"] == 4  # the epoch's end, after the third step's save
    run(killed, "--resume")
    a, b = last(straight), last(killed)
    assert all(same(a[key], b[key]) for key in a if key not in ("args", "rng"))


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before_it_and_nothing_else(train, capsys):
    straight, out = train("straight", "--epochs 2"), train("a", "--epochs 2 --save_every 1", stop=3)
    assert last(out, "prev.pt")["step"] == 2  # the third step is saved once, though its turn and a signal ask for it
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    kept = (out / "prev.pt").read_bytes()
    capsys.readouterr()
    run(out, "--resume --save_every 0", stop=3)
    warning = capsys.readouterr().err
    assert "WARNING" in warning and f"going on from {out / 'prev.pt'}, step 2" in warning
    assert (out / "prev.pt").read_bytes() == kept  # the damaged file did not take its place
    run(out, "--resume --save_every 0")
    assert same(last(straight)["model"], last(out)["model"])
    for name in ("last.pt", "prev.pt"):
        (out / name).write_bytes(b"PK")
    run(out, "--resume", status=2)
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_moments_that_do_not_fit_are_a_damage_like_any_other_and_messages_name_the_file_that_is_used(train, capsys):
    out = train("a", "--max_steps 2 --save_every 1")
    whole, damaged, kept = last(out), last(out), out / "prev.pt"
    damaged["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    save_checkpoint(out / "last.pt", damaged)
    said = {}
    for flags, status in (("--size 32", 2), ("--epochs 9 --max_steps 0 --lr 1e30", 1), ("", 0)):
        capsys.readouterr()
        run(out, f"--resume {flags}", status=status)
        said[status] = capsys.readouterr().err
        assert f"{out / 'last.pt'}: the optimizer's state does not fit its model_config: going on" in said[status]
        assert f"going on from {kept}, step 1" in said[status]
    assert f"--size is fixed by {kept} (got 32, the checkpoint has 16)" in said[2]
    assert f"the last good checkpoint is {kept}" in said[1]
    assert same(last(out)["model"], whole["model"])


def test_a_full_disk_costs_a_line_and_the_attempt_but_not_the_run(train, capsys, monkeypatch):
    straight = train("straight", "--epochs 2 --save_every 1")
    save, calls = torch.save, []

    def full(failing):
        def write(content, file):
            calls.append(1)
            file.write(bytes(1000))
            if failing(len(calls)):
                full_disk()
            file.seek(0)
            save(content, file)

        return write

    monkeypatch.setattr(torch, "save", full(lambda call: call in (2, 3)))
    out = train("a", "--epochs 2 --save_every 1")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert len(warnings) == 2 and "No space left on device" in warnings[0]
    assert f"MiB free in {out}" in warnings[0] and "untouched" in warnings[0]
    assert same(last(straight)["model"], last(out)["model"])
    assert not list(out.glob(".*.tmp"))

    calls.clear()
    monkeypatch.setattr(torch, "save", full(lambda call: call > 2))
    out = train("b", "--epochs 2 --save_every 1", status=2)
    assert "the work since the last save is lost" in capsys.readouterr().err
    assert last(out)["step"] == 2 and last(out, "prev.pt")["step"] == 1


def test_a_disk_that_is_full_throughout_costs_lines_alone(train, capsys, monkeypatch):
    # not only checkpoints: run.json, metrics.jsonl, previews and curves are written, too
    out = train("a", "--epochs 1 --vis_every 1", stop=2)
    before = {name: (out / name).read_bytes() for name in ("last.pt", "metrics.jsonl")}
    for place, name in ((os, "fsync"), (Path, "write_bytes"), (utils.io, "save_training_curves")):
        monkeypatch.setattr(place, name, full_disk)
    capsys.readouterr()
    run(out, "--resume", status=2)
    error = capsys.readouterr().err
    for name in words("run.json epoch_0001_sample training_curves.png last.pt best.pt"):
        assert f"{out / name} could not be written (No space left on device" in error
    assert "the work since the last save is lost" in error and "Traceback" not in error
    assert (out / "last.pt").read_bytes() == before["last.pt"]
    assert (out / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])


def test_a_best_checkpoint_that_could_not_be_written_is_still_to_be_beaten(train, monkeypatch):
    failed = []

    def fail_once(path, *rest):
        if path.name == "best.pt" and not failed:
            failed.append(path)
            full_disk()
        save_checkpoint(path, *rest)

    monkeypatch.setattr(checkpointer, "save_checkpoint", fail_once)
    out = train("a", "--epochs 2 --lr 1e-9 --ema_decay 0.5")
    assert failed and last(out, "best.pt")["epoch"] == 2  # no better than the first, but there is no other


def test_saves_come_by_the_clock_too(train, monkeypatch):
    now = iter(range(0, 10**6, 40))  # every look at the clock finds it 40 seconds later
    monkeypatch.setattr(checkpointer, "time", SimpleNamespace(monotonic=lambda: next(now)))
    saved = []
    monkeypatch.setattr(checkpointer, "save_checkpoint", lambda path, contents, *_: saved.append(contents["step"]))
    train("a", "--epochs 3 --max_steps 11 --save_minutes 1 --batch_size 1")
    # a look per step and one per save, so 80 seconds have gone by every other step: 2, 4, ...; an epoch has 9 steps
    assert saved[:4] == [2, 4, 6, 8] and saved[-1] == 11


def test_what_a_killed_process_left_behind_is_removed_and_that_of_a_running_one_is_not(train, tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone, cache = int(gone.stdout), tmp_path / "cache"  # which another machine may be writing to
    stale, running = (tmp_path / "a" / f".last.pt.{process}.tmp" for process in (gone, os.getppid()))
    old, new = (cache / f".{name}.u8.{gone}.tmp" for name in ("old", "new"))
    for path in (stale, running, old, new):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    train("a", "--max_steps 1")
    assert not stale.exists() and running.exists()
    assert not old.exists() and new.exists()


def test_a_run_is_never_started_over_or_overwritten_silently(train, capsys):
    train("none", "--resume", status=2)
    assert "there is no" in capsys.readouterr().err
    out = train("a", "--max_steps 1")
    before = (out / "last.pt").read_bytes()
    train("a", status=2)
    assert "already holds a last.pt; pass --resume" in capsys.readouterr().err
    train("a", "--dry_run")  # keeps to a folder of its own
    assert (out / "last.pt").read_bytes() == before and (out / "dry_run" / "last.pt").is_file()


# --- learning rate ----------------------------------------------------------------------------------------------------


def test_the_learning_rate_is_a_cosine_over_the_steps_that_will_run():
    plan = make_lr_schedule(0.01, 0, 100, 0, {})
    for step in (0, 25, 50, 99):
        assert get_lr(step, plan) == pytest.approx(0.005 * (1 + math.cos(math.pi * step / 100)))
    warm = make_lr_schedule(0.01, 10, 100, 0, {})
    assert [get_lr(step, warm) for step in (0, 4, 9, 10)] == pytest.approx([0.001, 0.005, 0.01, 0.01])
    assert get_lr(100, warm) == pytest.approx(0)


@pytest.mark.parametrize("total", [60, 200, 1000])
def test_another_length_on_resume_never_makes_the_learning_rate_jump(total):
    before = make_lr_schedule(0.01, 0, 100, 0, {})
    after = make_lr_schedule(0.01, 0, total, 40, before)
    rates = [get_lr(step, before) for step in range(40)] + [get_lr(step, after) for step in range(40, total)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates))
    assert rates[40] == pytest.approx(get_lr(40, before))
    assert get_lr(total, after) == pytest.approx(0)
    assert make_lr_schedule(0.01, 0, 100, 40, before) == before  # the same length: the same curve, exactly


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_other_clips_per_step_on_resume_change_no_epoch_and_still_end_at_a_rate_of_zero(train, before, after):
    stop, rest = 2 * (9 // before), 2 * (9 // after)  # two epochs of nine clips each
    out = train("a", f"--epochs 4 --log_every 1 --batch_size {before}", stop=stop)
    run(out, f"--resume --batch_size {after}")
    saved = last(out)
    assert (saved["epoch"], saved["step_in_epoch"], saved["step"]) == (4, 0, stop + rest)
    assert saved["lr_scheduler"]["total_steps"] == stop + rest


def test_another_length_during_warm_up_keeps_the_peak():
    after = make_lr_schedule(0.01, 100, 2000, 10, make_lr_schedule(0.01, 100, 1000, 0, {}))
    assert max(get_lr(step, after) for step in range(10, 2000)) == pytest.approx(0.01)


def test_a_new_peak_on_resume_starts_its_own_cosine():
    after = make_lr_schedule(0.002, 0, 200, 100, make_lr_schedule(0.01, 0, 100, 0, {}))
    assert get_lr(100, after) == 0.002 and get_lr(150, after) == pytest.approx(0.001)


def test_the_schedule_counts_max_steps(train):
    out = train("a", "--max_steps 6 --epochs 50 --log_every 1")
    rates = [line["lr"] for line in lines(out, "train")]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)])


# --- what a run does --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A short but real run on clips of one moving square."""
    root = tmp_path_factory.mktemp("learned")
    write_squares(root / "videos" / "train", 24)
    write_squares(root / "videos" / "val", 3, first=100)
    flags = "--epochs 12 --ema_decay 0.9 --log_every 3 --ema_update_after_step 10 --lr 2e-3 --batch_size 4"
    return run(root / "out", f"{flags} --vis_every 5 --cache_videos", "--data_root", root / "videos", *TINY_FLAGS)


def test_training_lowers_the_validation_loss_and_best_follows_it(learned):
    losses = [line["val_loss"] for line in lines(learned, "val")]
    assert len(losses) == 12
    # a step with the wrong sign, or weights that are not the trained ones, would leave it where it was
    assert losses[-1] < 0.8 * losses[0]
    best = last(learned, "best.pt")
    assert best["best_val_loss"] == best["history"]["epochs"][-1]["val_loss"] == min(losses)


def test_records_say_what_happened(learned):
    train = lines(learned, "train")
    assert [line["step"] for line in train] == [1, *range(3, 73, 3)]
    for line in train:
        assert set(words("epoch loss lr grad_norm clips_per_second gpu_memory_mib")) <= set(line)
    shown = [line for line in lines(learned, "val") if "psnr" in line]
    assert [line["epoch"] for line in shown] == [5, 10, 12]  # and always at the end
    assert all(math.isfinite(line["psnr"]) and line["psnr_cross_fade"] > 5 for line in shown)
    described = json.loads((learned / "run.json").read_text())
    assert described["args"]["size"] == 16 and described["versions"]["torch"] and "device" in described
    assert described["git"] is None or set(described["git"]) == {"commit", "dirty"}


def test_previews_show_truth_above_generated_with_the_observed_frames_untouched(learned):
    previews = sorted(path.name for path in learned.glob("epoch_*"))
    assert previews == [f"epoch_{e:04d}_sample.{kind}" for e in (5, 10, 12) for kind in ("mp4", "png")]
    sheet = iio.imread(learned / "epoch_0012_sample.png")
    side = 6 * 16 + 6
    assert sheet.shape == (3 * 2 * side, 8 * side, 3)
    rows = sheet.reshape(3, 2, side, 8, side, 3)
    for clip, frame in itertools.product(range(3), range(8)):
        equal = (rows[clip, 0, :, frame] == rows[clip, 1, :, frame]).all()
        assert equal == (frame in (0, 1, 6, 7))
    assert probe_video(learned / "epoch_0012_sample.mp4").frames == 8


def test_curves_are_drawn_where_matplotlib_is(learned):
    pytest.importorskip("matplotlib", reason="optional: pip install matplotlib")
    assert iio.imread(learned / "training_curves.png").shape[2] >= 3


def test_the_checkpoint_holds_what_the_design_lists(learned):
    checkpoint = last(learned)
    assert checkpoint["clip_config"] == {"num_frames": 8, "size": 16, "frame_stride": 1, "color_mode": "rgb"}
    assert checkpoint["diffusion_config"] == {
        **{"timesteps": 1000, "schedule": "cosine", "noise_offset": 0.0, "noise_correlation": 0.0},
        **{"predictor": "none", "residual_scale": 1.0},
    }
    assert checkpoint["model_config"]["endpoint_context"] == 2
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in checkpoint["model"])
    assert checkpoint["model"].keys() == checkpoint["ema"].keys()
    assert (checkpoint["step"], checkpoint["epoch"], checkpoint["step_in_epoch"]) == (72, 12, 0)


def test_a_dry_run_takes_two_steps_a_preview_and_a_save(train):
    out = train("a", "--dry_run")
    made = {path.name for path in (out / "dry_run").iterdir()}
    assert {"last.pt", "metrics.jsonl", "run.json"} < made and any(name.endswith("sample.png") for name in made)
    assert last(out / "dry_run")["step"] == 2 and not (out / "last.pt").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--T 3 --endpoint_context 1",  # M = 1
        "--T 7 --endpoint_context 3",
        "--frame_stride 2 --T 6 --color_mode gray",
        "--beta_schedule linear --timesteps 50 --dynamic_threshold --noise_offset 0.05",
        "--max_videos 3 --batch_size 8",  # fewer clips than a step needs
        "--amp --save_every 1 --grad_clip 0",
        "--activation_checkpointing --no-channels_last",
        "--T 6 9 --frame_stride 1 2 --predictor learned --predictor_width 8 --predictor_steps 1",
        "--size 16 24 --predictor learned --predictor_width 8 --predictor_steps 1 --cache_videos",
    ],
)
def test_every_shape_of_run_works(train, capsys, flags):
    out = train("a", f"--max_steps 2 --vis_every 1 {flags}")
    printed = capsys.readouterr().out
    assert "2 steps" in printed and "--amp does nothing on cpu" in printed
    assert all_finite(last(out)["ema"])


@pytest.mark.parametrize(("rate", "expected"), [(0, {False}), (1, {True}), (0.5, {False, True})])
def test_contexts_are_dropped_in_training_as_often_as_asked(train, monkeypatch, rate, expected):
    blank, loss = [], train_video_ddpm.loss_per_clip

    def watch(state, network, schedule, inputs, weight):
        blank.extend([bool(s.eq(0).all() and e.eq(0).all()) for s, e in zip(inputs[0], inputs[2], strict=True)])
        return loss(state, network, schedule, inputs, weight)

    monkeypatch.setattr(train_video_ddpm, "loss_per_clip", watch)
    train("a", f"--max_steps 6 --cfg_drop_prob {rate}")
    assert set(blank) == expected and len(blank) == 12


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the losses of the given training steps, counted from 1, not a number."""
    loss, calls = train_video_ddpm.loss_per_clip, itertools.count(1)

    def choose(poisoned):
        def poisoned_loss(*args):
            return loss(*args) * (math.nan if poisoned(next(calls)) else 1)

        monkeypatch.setattr(train_video_ddpm, "loss_per_clip", poisoned_loss)

    return choose


def test_a_step_without_finite_gradients_changes_no_weight_and_is_counted(train, poison):
    out = train("a", "--epochs 2 --log_every 1", stop=2)
    before = last(out)
    poison(lambda call: call == 1)
    run(out, "--resume", stop=3)
    after = last(out)
    assert after["step"] == 3 and same(before["model"], after["model"])
    assert same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert after["history"]["sums"]["skipped"] == 1
    run(out, "--resume")
    at = {line["step"]: line for line in lines(out, "train")}
    assert [at[n]["skipped_steps"] for n in (2, 3, 4)] == [0, 1, 1]
    assert at[3]["loss"] is None and at[3]["grad_norm"] is None and math.isfinite(at[4]["loss"])
    assert not same(after["model"], last(out)["model"])


def test_a_run_that_has_lost_its_gradients_ends_and_is_never_saved(train, capsys, poison):
    poison(lambda call: call > 2)
    out = train("a", "--save_every 1 --epochs 9", status=1)
    error = capsys.readouterr().err
    assert "of 20 steps in a row one must have finite gradients and a loss of at most 10.5 (got 20 without" in error
    assert error.count("\n") == 1
    assert f"the last good checkpoint is {out / 'last.pt'}" in error
    kept = last(out)
    assert kept["history"]["sums"]["skipped"] == 19 and kept["step"] == 21
    assert all_finite(kept["model"]) and all_finite(kept["ema"])


@pytest.mark.parametrize("rate", ["1e4", "1e30"])
def test_diverged_weights_are_never_saved_and_end_the_run(train, capsys, rate):
    common = "--log_every 1 --save_every 1"
    out = train("a", f"{common} --epochs 9", stop=2)
    before = (out / "last.pt").read_bytes()
    capsys.readouterr()
    run(out, f"--resume --lr {rate}", status=1)
    error = capsys.readouterr().err
    # the first step's own loss was still a good one; the weights that it left behind are not
    assert "last.pt is not written: the weights after step 3 are diverged" in error and "a lower --lr" in error
    assert f"the last good checkpoint is {out / 'last.pt'}" in error
    assert (out / "last.pt").read_bytes() == before
    assert not (out / "best.pt").is_file() or all_finite(last(out, "best.pt")["ema"])
    final = lines(out, "train")[-1]
    assert final["skipped_steps"] + final["diverged_steps"] >= 1
    short = train("short", f"{common} --max_steps 3 --lr {rate}", status=1)  # over before it is ended
    assert "is not written" in capsys.readouterr().err and not (short / "last.pt").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(train, capsys, number):
    out = train("a", "--epochs 9", stop=2, by=number)
    assert last(out)["step"] == 2
    printed = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name} after step 2; go on with: " in printed
    assert printed.rstrip().endswith("--resume")


def test_compiled_training_keeps_clean_names(train, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    out = train("a", "--max_steps 1 --compile")
    assert compiled == ["VideoUNet3D"]  # in place, so the state dict is untouched
    assert not any("_orig_mod" in name for name in last(out)["model"])


def test_presets_do_not_fill_what_an_older_checkpoint_does_not_know(train, tmp_path):
    out = train("a", "--max_steps 1")
    older = last(out)
    del older["args"]["noise_correlation"], older["diffusion_config"]["noise_correlation"]
    save_checkpoint(out / "last.pt", older)
    run(out, "--resume --preset refine --max_steps 2")
    assert last(out)["diffusion_config"]["noise_correlation"] == 0
    save_checkpoint(out / "last.pt", older)
    args, *_ = resolve_args(build_parser(), words(f"--preset refine --init {out / 'last.pt'} --out_dir nowhere"))
    assert args.noise_correlation == 0


def test_presets_fill_only_what_was_not_given():
    parser, demo = build_parser(), TRAIN_PRESETS["demo"]
    assert parser.parse_given(["--preset", "demo", "--size", "64"]) == {"preset": "demo", "size": 64}
    assert set(demo) <= set(vars(parser.defaults()))
    args, *_ = resolve_args(parser, words("--preset demo --size 64 --out_dir nowhere"))
    assert args.size == 64 and args.base_channels == demo["base_channels"] and args.out_dir == "nowhere"


def test_a_run_starts_from_the_ema_of_given_weights_and_their_network(ckpt, square_videos, tmp_path, capsys):
    given = ["--data_root", str(square_videos), "--cache_dir", str(tmp_path / "cache"), "--init", str(ckpt)]
    given += words("--num_workers 0 --vis_every 0 --max_steps 1 --lr 1e-30")  # which moves no float32
    assert main([*given, "--out_dir", str(tmp_path / "a")]) == 0
    begun, source = load_checkpoint(tmp_path / "a" / "last.pt"), load_checkpoint(ckpt)
    assert begun["model_config"] == source["model_config"] and begun["clip_config"] == source["clip_config"]
    assert all(torch.equal(begun["model"][name], value) for name, value in source["ema"].items())
    for more, message in (
        ("--base_channels 24", "its network is not that of the flags (they differ in ['base_channels'])"),
        ("--predictor learned", "its network is not that of the flags"),
        ("--init nowhere.pt", "nowhere.pt: no such checkpoint"),
    ):
        with pytest.raises(SystemExit) as left:
            main([*given, "--out_dir", str(tmp_path / "b"), *words(more)])
        assert left.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out_dir", str(tmp_path / "a"), "--resume", "--init", "other.pt"])
    assert "--init is fixed by" in capsys.readouterr().err


def test_defaults_are_those_of_the_original_design():
    design = "--val_ratio 0.01 --out_dir outputs/train --T 8 --size 64 --frame_stride 1 --color_mode rgb"
    design += " --endpoint_context 2 --batch_size 8 --lr 1e-4 --epochs 30 --timesteps 1000 --beta_schedule cosine"
    design += " --cfg_drop_prob 0.08 --ema_decay 0.999 --ema_update_after_step 100 --base_channels 96"
    design += " --channel_mults 1 2 4 --res_blocks 2 --temporal_attn_levels 1 2 --temporal_loss_weight 0.05 --seed 42"
    design += " --num_workers 4 --log_every 20 --max_steps 0 --grad_clip 1 --vis_every 1 --vis_guidance_scale 1.5 --amp"
    design += " --vis_steps 40 --noise_offset 0 --no-dynamic_threshold --no-tensorboard --no-cache_videos"
    design += " --noise_correlation 0"
    defaults = vars(build_parser().defaults())
    given = build_parser().parse_given(words(design)) | {"max_videos": None, "resume": False}
    assert {name: defaults[name] for name in given} == given


MIDDLE = "--T must exceed 2 * --endpoint_context so that a middle exists (got --T 4, --endpoint_context 2)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--T 4", MIDDLE),
        ("--T 4 8", MIDDLE),
        ("--T 8 6", "--T must be two rising numbers (got 8 6)"),
        ("--frame_stride 4 2", "--frame_stride must be two rising numbers (got 4 2)"),
        ("--channel_mults 1 2 4 --size 60", "--size must be divisible by 8"),
        ("--channel_mults 1 2 4 --size 64 36", "--size must be divisible by 8"),
        ("--size 8 8 8", "argument --size: must be 1 or 2 numbers (got 3)"),
        ("--size 0", "argument --size: must be an integer in [1, 65536] (got 0)"),
        ("--lr nan", "argument --lr: must be a number above 0 (got nan)"),
        ("--val_ratio 1.5", "argument --val_ratio: must be a number in (0, 1) (got 1.5)"),
        ("--cfg_drop_prob -1", "argument --cfg_drop_prob: must be a number in [0, 1] (got -1)"),
        ("--color_mode sepia", "argument --color_mode: invalid choice: 'sepia'"),
        ("--max_videos 1", "--max_videos: must be an integer in [2, 2147483647] (got 1)"),
        ("--base_channels 30", "--base_channels must be a positive multiple of 4 (got 30)"),
        ("--channel_mults 1 2 4 --temporal_attn_levels 3", "--temporal_attn_levels must lie in [0, 2]"),
        ("--vis_every 1 --vis_steps 2000", "--vis_steps must be at most --timesteps 1000 (got 2000)"),
        ("--device tpu", "argument --device: must be auto, cpu, mps, cuda or cuda:N (got tpu)"),
        ("--base 8", "unrecognized arguments: --base 8"),
        ("--data_root /nowhere", "--data_root must be a folder (got /nowhere)"),
    ],
)
def test_wrong_use_is_one_line_and_status_two(train, capsys, flags, message):
    train("a", flags, status=2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_out_dir_that_cannot_be_made_is_one_line(train, tmp_path, capsys):
    (tmp_path / "file").touch()
    train("file/out", status=2)
    error = capsys.readouterr().err
    assert "file/out" in error and error.count("\n") == 1


# --- in a process of its own ------------------------------------------------------------------------------------------


def start(program, square_videos, tmp_path, flags):
    """A fresh Python with these words, training a tiny run tmp_path / "a" in a process group of its own."""
    given = ["--data_root", square_videos, "--out_dir", tmp_path / "a", "--cache_dir", tmp_path / "cache", *TINY_FLAGS]
    command = [sys.executable, *program, *given, "--vis_every", "0", *words(flags)]
    said = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), cwd=ROOT, start_new_session=True, **said)


def test_a_sigterm_to_the_whole_process_group_is_a_clean_stop_even_with_loading_processes(square_videos, tmp_path):
    process = start(["train_video_ddpm.py"], square_videos, tmp_path, "--epochs 10000 --num_workers 2")
    for line in process.stdout:
        if line.startswith("step 20 "):
            os.killpg(process.pid, signal.SIGTERM)
            break
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert "stopped by SIGTERM after step" in printed and "Traceback" not in errors
    step = last(tmp_path / "a")["step"]
    run(tmp_path / "a", f"--resume --num_workers 0 --max_steps {step + 1}")
    assert last(tmp_path / "a")["step"] == step + 1


def test_training_works_where_the_system_has_no_sigusr1(square_videos, tmp_path):
    program = "import signal, sys; del signal.SIGUSR1; import train_video_ddpm; sys.exit(train_video_ddpm.main())"
    process = start(["-c", program], square_videos, tmp_path, "--max_steps 2 --num_workers 1")
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert last(tmp_path / "a")["step"] == 2


# --- optional packages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--tensorboard", "--logger tensorboard"])
def test_tensorboard_gets_scalars_and_previews(train, flag):
    pytest.importorskip("tensorboard", reason="optional: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = train("a", f"--max_steps 2 {flag} --vis_every 1")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "val/val_loss", "val/psnr"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["preview"]
    recorded = [line["val_loss"] for line in lines(out, "val")]
    assert [event.value for event in events.Scalars("val/val_loss")] == pytest.approx(recorded)
    before = len(list((out / "tensorboard").iterdir()))
    run(out, "--resume --max_steps 3 --lr 1e-3 --no-tensorboard")
    assert len(list((out / "tensorboard").iterdir())) == before


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_packages_with_the_calls_of_wandb_get_scalars_and_previews(train, name, monkeypatch):
    class Standin(types.ModuleType):
        logged, finished, Error, Image = [], 0, RuntimeError, staticmethod(lambda array: array.shape)

        def init(self, project, run=None, name=None, config=None, dir=None, resume="never", embed=True):
            assert (run or name) == "a" and config["max_steps"] == 2
            return self

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished += 1

    standin = Standin(name)
    standin.__spec__ = importlib.machinery.ModuleSpec(name, loader=object())
    monkeypatch.setitem(sys.modules, name, standin)
    out = train("a", f"--max_steps 2 --logger {name} --vis_every 1")
    recorded = [line["val_loss"] for line in lines(out, "val")]
    assert [values["val/val_loss"] for _, values in standin.logged if "val/val_loss" in values] == recorded
    assert any(values.get("preview", (0,))[-1] == 3 for _, values in standin.logged) and standin.finished == 1


def test_wandb_that_is_not_logged_in_costs_one_line(train, monkeypatch, capsys):
    wandb = types.ModuleType("wandb")
    wandb.__spec__, wandb.Error, wandb.Image = (
        importlib.machinery.ModuleSpec("wandb", loader=object()),
        RuntimeError,
        None,
    )

    def init(**settings):
        raise RuntimeError("No API key configured.")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    train("a", "--logger wandb", status=2)
    assert "--logger wandb: No API key configured. WANDB_MODE=offline keeps the run here" in capsys.readouterr().err


def test_an_optional_package_that_is_missing_is_named(train, tmp_path, capsys, monkeypatch):
    for module in ("training.trackers", "utils.io"):
        monkeypatch.setattr(f"{module}.find_spec", lambda name: None)
    train("a", "--tensorboard", status=2)
    assert "pip install tensorboard" in capsys.readouterr().err
    curves = tmp_path / "training_curves.png"  # drawn where matplotlib is, and never required
    assert not save_training_curves(curves, {"train": [(1, 0.5)], "epochs": []}) and not curves.exists()
