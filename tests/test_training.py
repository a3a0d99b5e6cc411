"""Training as a user runs it: exact resume, two stages, and clear refusals."""

import argparse
import errno
import itertools
import json
import math
import multiprocessing
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    check_refusal,
    last,
    leave_out_what_is_slow,
    lines,
    run,
    words,
    write_squares,
)
from soak import SMALL, same, same_end
from torch.utils._python_dispatch import TorchDispatchMode

import train_video_ddpm
import training.objective
from data.kinetics_video_dataset import VideoClipDataset
from data.training_clips import open_clips
from train_video_ddpm import build_parser, train_step
from training.arguments import FIXED_FLAGS
from training.metrics import MAX_BAD_IN_ROW
from training.objective import build_network, pick_objective
from training.state import get_lr, init_state
from training.validation import validate
from utils.checkpoint import save_checkpoint

pytestmark = pytest.mark.usefixtures("quick", "narrow_predictor")
CPU = torch.device("cpu")
REFINE = "--preset refine --max_steps 5 --warmup_steps 2 --ema_update_after_step 1 --log_every 1"


@pytest.fixture
def train(train):
    """The fixture of that name, with a smaller network."""
    return lambda name, flags="", **how: train(name, f"{SMALL} {flags}", **how)


@pytest.mark.parametrize(
    ("step", "flags", "on_resume"),
    [
        (3, "--vis_every 1 --grad_accum 2 --noise_offset 0.1 --optimizer muon", ""),
        (4, "--num_workers 1 --cache_videos --color_mode gray", "--num_workers 0"),
        (5, "--T 3 9 --endpoint_context 1 --warmup_steps 7", "--num_workers 1"),
        (6, "--train predictor --optimizer muon --size 8 12", ""),
    ],
)
def test_resuming_is_exact(train, step, flags, on_resume):
    common = f"--epochs 2 --log_every 2 --ema_update_after_step 2 {flags}"
    straight = train("straight", common)
    stopped = train("stopped", common, stop=step)
    assert last(stopped)["step"] == step
    run(stopped, f"--resume {on_resume}")
    assert same_end(straight, stopped)
    assert same_end(straight, stopped, "best.pt")
    for kind in ("train", "val"):
        assert lines(straight, kind) == lines(stopped, kind) != []


@pytest.fixture(scope="module")
def refined(tmp_path_factory, square_videos, narrow_predictor):
    """A predictor, and diffusion that refines around it."""
    given = ["--data_root", square_videos, *words(f"{SMALL} {REFINE}")]
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_is_slow(patch)
        return run(tmp_path_factory.mktemp("refined") / "run", "", *given)


@pytest.mark.parametrize("flags", [REFINE, ""])
def test_a_preset_resumes_exactly_in_either_stage(train, refined, flags):
    stopped = train("stopped", REFINE, stage="predictor", stop=2)
    assert not (stopped / "last.pt").exists()
    # The first stage knows nothing of a second one, so the whole command is repeated.
    train("stopped", f"--resume {REFINE}", stage="diffusion", stop=3)
    assert last(stopped)["step"] == 3
    run(stopped, f"--resume {flags}")
    for name in ("last.pt", "best.pt"):
        assert same_end(refined / "predictor", stopped / "predictor", name)
        assert same_end(refined, stopped, name)


def test_a_damaged_checkpoint_costs_the_work_since_the_one_before_it(train, capsys):
    straight = train("straight", "--epochs 2 --log_every 1")
    out = train("a", "--epochs 2 --log_every 1 --save_every 1", stop=3)
    (out / "last.pt").write_bytes((out / "last.pt").read_bytes()[:5000])
    kept = (out / "prev.pt").read_bytes()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    run(out, "--resume --save_every 0", stop=3)
    # The damaged file has not taken its place.
    assert (out / "prev.pt").read_bytes() == kept
    assert last(out, "prev.pt")["step"] == 2
    run(out, "--resume")
    assert same_end(straight, out)
    # Lines of the work that was lost are gone.
    assert lines(straight, "train") == lines(out, "train")
    for name in ("last.pt", "prev.pt"):
        (out / name).write_bytes(b"PK")
    capsys.readouterr()
    run(out, "--resume", status=2)
    check_refusal(capsys, f"{out / 'last.pt'}")


def test_a_full_disk_costs_neither_the_run_nor_the_checkpoint_before(train, monkeypatch):
    straight = train("straight", "--epochs 2 --save_every 1")
    save = torch.save
    calls = itertools.count(1)

    def save_twice(content, file):
        if next(calls) in (1, 3):
            return save(content, file)
        file.write(bytes(1000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save_twice)
        out = train("a", "--epochs 2 --save_every 1", status=2)
    assert next(calls) > 8
    assert last(out)["step"] == 3
    assert last(out, "prev.pt")["step"] == 1
    run(out, "--resume")
    assert same_end(straight, out)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2)])
def test_another_batch_size_goes_on_at_the_same_clip(train, monkeypatch, before, after):
    seen = []
    read = VideoClipDataset.__getitem__

    def read_and_tell(self, key):
        if self.random_window:
            seen.append(key)
        return read(self, key)

    monkeypatch.setattr(VideoClipDataset, "__getitem__", read_and_tell)
    train("straight", f"--epochs 2 --batch_size {after}")
    straight = list(seen)
    seen.clear()
    out = train("a", f"--epochs 2 --batch_size {before}", stop=4 // before)
    assert seen == straight[:4]
    run(out, f"--resume --batch_size {after}")
    assert seen == straight
    saved = last(out)
    assert (saved["epoch"], saved["step_in_epoch"]) == (2, 0)
    # The learning rate still ends at zero.
    assert saved["lr_scheduler"]["total_steps"] == saved["step"] == 4 // before + 12 // after


def test_given_flags_override_stored_ones_but_for_what_a_run_is(train, refined, capsys):
    out = train("a", "--max_steps 1 --color_mode gray --grad_clip 0.5")
    run(out, "--resume --max_steps 2 --batch_size 3 --size 8 --grad_clip 0.25")
    run(out, "--resume --max_steps 3")
    args = last(out)["args"]
    assert (args["color_mode"], args["batch_size"], args["grad_clip"]) == ("gray", 3, 0.25)
    changed = {"num_frames": 9, "channel_mults": 2, "temporal_attn_levels": "", "size": 16}
    changed |= {"seed": 1, "val_ratio": 0.5, "max_videos": 5, "endpoint_context": 1}
    changed |= {"frame_stride": 2, "color_mode": "rgb", "base_channels": 8, "res_blocks": 2}
    changed |= {"timesteps": 500, "beta_schedule": "linear", "cfg_drop_prob": 0.5}
    changed |= {"temporal_loss_weight": 0.5, "noise_offset": 0.1, "optimizer": "muon"}
    changed |= {"train": "predictor", "predictor": refined / "predictor" / "best.pt"}
    assert changed.keys() == FIXED_FLAGS
    for name, value in changed.items():
        flag = {"num_frames": "--T"}.get(name, f"--{name}")
        capsys.readouterr()
        run(out, f"--resume --max_steps 9 {flag} {value}", status=2)
        check_refusal(capsys, f"{flag} ", f"{out / 'last.pt'}")


def test_no_run_is_overwritten_and_a_dry_run_keeps_to_its_own_folder(train, capsys):
    out = train("a", "--preset refine --dry_run --vis_every 1")
    for folder in (out / "dry_run" / "predictor", out / "dry_run"):
        assert last(folder)["step"] == 2
        assert list(folder.glob("*_sample.png"))
    train("a", "--resume", status=2)
    assert "--resume" in capsys.readouterr().err
    train("a", "--max_steps 1")
    before = (out / "last.pt").read_bytes()
    train("a", status=2)
    check_refusal(capsys, "--out_dir")
    train("a", "--dry_run --epochs 9")
    assert (out / "last.pt").read_bytes() == before


def test_stored_arguments_of_another_kind_are_one_line(train, capsys):
    out = train("a", "--max_steps 1")
    whole = last(out)
    odd = {"lr": "fast", "batch_size": None, "grad_accum": [1], "num_frames": [6, 7, 8]}
    odd |= {"cfg_drop_prob": torch.zeros(3), "color_mode": "sepia", "processes": "a"}
    for name, value in odd.items():
        changed = {**whole, "args": {**whole["args"], name: value}}
        save_checkpoint(out / "last.pt", changed)
        capsys.readouterr()
        run(out, "--resume --max_steps 2", status=2)
        check_refusal(capsys, f"{out / 'last.pt'}")


def test_a_resumed_run_of_another_length_or_peak_follows_its_own_curve(train):
    out = train("a", "--max_steps 2 --log_every 1")
    run(out, "--resume --max_steps 4 --lr 0.002")
    rates = [line["lr"] for line in lines(out, "train")[2:]]
    assert rates == pytest.approx([get_lr(step, 0.002, 0, 4) for step in (2, 3)])


@pytest.mark.parametrize("epochs", [1, 50])
def test_max_steps_overrides_epochs(train, epochs):
    out = train("a", f"--max_steps 6 --epochs {epochs} --log_every 1")
    rates = [line["lr"] for line in lines(out, "train")]
    cosines = [math.cos(math.pi * step / 6) for step in range(6)]
    assert rates == pytest.approx([0.5e-3 * (1 + cosine) for cosine in cosines])


def test_a_run_that_has_lost_its_gradients_ends_and_is_never_saved_so(train, monkeypatch, capsys):
    loss = training.objective.diffusion_loss
    calls = itertools.count(1)

    def lose_after_two_steps(*args, **settings):
        # The loss that is looked at before a save has no gradients.
        is_lost = torch.is_grad_enabled() and next(calls) > 2
        return loss(*args, **settings) * (math.nan if is_lost else 1)

    monkeypatch.setattr(training.objective, "diffusion_loss", lose_after_two_steps)
    out = train("a", "--save_every 21 --epochs 9", status=1)
    check_refusal(capsys, f"{out}")
    kept = last(out)
    assert kept["step"] == 2 + MAX_BAD_IN_ROW - 1
    assert kept["history"]["sums"]["skipped"] == MAX_BAD_IN_ROW - 1
    assert all(value.isfinite().all() for part in ("model", "ema") for value in kept[part].values())


@pytest.mark.parametrize("rate", ["1e4", "1e30"])
def test_diverged_weights_are_never_saved_and_end_the_run(train, rate):
    out = train("a", "--save_every 1 --epochs 9", stop=2)
    before = (out / "last.pt").read_bytes()
    # The loss of the first step is still a good one; the weights that it leaves are not.
    run(out, f"--resume --lr {rate} --max_steps 5", status=1)
    assert (out / "last.pt").read_bytes() == before
    assert not (out / "best.pt").exists()
    short = train("short", f"--max_steps 1 --lr {rate}", status=1)
    assert not (short / "last.pt").exists()


def test_the_second_stage_refines_around_the_first_and_begins_anew(refined):
    first = last(refined / "predictor", "best.pt")
    assert first["predictor"] is None
    assert not same(first["model"], first["ema"])
    expected = {"config": first["model_config"], "weights": first["ema"]}
    for checkpoint in (last(refined), last(refined, "best.pt")):
        assert same(checkpoint["predictor"], expected)
        assert checkpoint["diffusion_config"]["noise_correlation"] == 0.5
    assert [line["step"] for line in lines(refined, "train")] == [1, 2, 3, 4, 5]


def test_best_is_of_the_lowest_loss_of_its_stage(train, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 7.0, 5.0, 6.0])
    monkeypatch.setattr(train_video_ddpm, "validate", lambda *given: next(losses))
    # An epoch has one step.
    flags = "--preset refine --max_steps 3 --batch_size 8"
    out = train("a", flags, stage="diffusion", stop=2)
    run(out, "--resume")
    first = last(out / "predictor", "best.pt")
    second = last(out, "best.pt")
    assert (first["step"], first["best_val_loss"]) == (2, 1.0)
    assert (second["step"], second["best_val_loss"]) == (2, 5.0)
    assert last(out)["best_val_loss"] == 5.0
    assert same(last(out)["predictor"]["weights"], first["ema"])


def set_up(checkpoint, **changes):
    """Arguments, fresh state and objective of the run that a checkpoint is of."""
    args = argparse.Namespace(**{**checkpoint["args"], "dry_run": False, **changes})
    state = init_state(args, build_network(args, CPU), CPU, None)
    state.plan_steps(args)
    return args, state, pick_objective(args, state.ema, checkpoint["predictor"], 1, None)


def test_the_predictor_that_is_refined_around_stays_as_it_is(refined):
    checkpoint = last(refined)
    args, state, objective = set_up(checkpoint)
    train_step(state, objective, iter([torch.rand(2, 3, 8, 8, 8)]), args, None)
    predictor = objective.pipe.predictor
    assert all(weight.grad is None for weight in predictor.parameters())
    assert same(dict(predictor.state_dict()), checkpoint["predictor"]["weights"])


def test_a_run_refines_around_the_predictor_of_any_checkpoint_that_has_one(train, refined, capsys):
    for name, path in (("a", refined / "best.pt"), ("b", refined / "predictor" / "best.pt")):
        out = train(name, f"--max_steps 1 --predictor {path}")
        assert same(last(out)["predictor"], last(refined)["predictor"])
    plain = train("plain", "--max_steps 1") / "last.pt"
    capsys.readouterr()
    train("c", f"--predictor {plain}", status=2)
    check_refusal(capsys, f"--predictor {plain}")


class HostReads(TorchDispatchMode):
    """Counts where a value leaves its device, or a constant goes there."""

    def __init__(self):
        super().__init__()
        self.reads = 0
        self.constants = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        self.constants += function is torch.ops.aten.lift_fresh.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["predictor", "diffusion"])
def test_no_step_waits_for_the_device(refined, stage):
    checkpoint = last(refined / "predictor" if stage == "predictor" else refined)
    args, state, objective = set_up(checkpoint, num_frames=[6, 8])
    assert args.optimizer == "muon"
    clips = itertools.repeat(torch.rand(2, 3, 8, 8, 8))
    # The first step makes what later ones keep.
    train_step(state, objective, clips, args, None)
    with HostReads() as mode:
        train_step(state, objective, clips, args, None)
    # The two draws of a length are on the CPU; the metrics set two of their values to 0.
    assert (mode.reads, mode.constants) == (2, 2)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A short run on clips of one moving square that does learn."""
    root = tmp_path_factory.mktemp("learned")
    write_squares(root / "videos" / "train", 16)
    write_squares(root / "videos" / "val", 3, first=100)
    flags = f"{SMALL} --epochs 9 --ema_decay 0.9 --log_every 3 --ema_update_after_step 10"
    flags += " --lr 1e-2 --batch_size 4 --vis_every 4 --cache_videos --base_channels 8"
    with pytest.MonkeyPatch.context() as patch:
        leave_out_what_is_slow(patch)
        return run(root / "out", flags, "--data_root", root / "videos")


def test_training_lowers_the_validation_loss_and_records_how(learned):
    epochs = lines(learned, "val")
    losses = [line["val_loss"] for line in epochs]
    # A step with the wrong sign would leave it where it was.
    assert losses[-1] < 0.8 * losses[0]
    # Previews come at the end, too.
    assert [line["epoch"] for line in epochs if "psnr" in line] == [4, 8, 9]
    assert len(list(learned.glob("epoch_*_sample.mp4"))) == 3
    steps = lines(learned, "train")
    assert [line["step"] for line in steps] == [1, *range(3, 37, 3)]
    assert set(words("epoch loss lr grad_norm skipped_steps diverged_steps")) <= steps[0].keys()
    assert json.loads((learned / "run.json").read_text())["args"]["size"] == 8


def test_validation_and_best_are_of_the_average(learned):
    best = last(learned, "best.pt")
    args = argparse.Namespace(**best["args"])
    names = words("data_root num_frames frame_stride size color_mode val_ratio max_videos seed")
    names += words("cache_dir cache_videos")
    _, clips = open_clips(**{name: getattr(args, name) for name in names})
    frames = torch.stack([clips[0, number].clip for number in range(3)])
    loader = SimpleNamespace(held_out=range(3), validation=lambda: [frames / 127.5 - 1])
    losses = {}
    for kind in ("ema", "model"):
        network = build_network(args, CPU)
        network.load_state_dict(best[kind])
        losses[kind] = validate(
            pick_objective(args, network, None, 3, None), network, loader, SimpleNamespace(signal=0)
        )
    assert losses["ema"] == pytest.approx(best["best_val_loss"], rel=1e-4)
    assert losses["model"] != pytest.approx(best["best_val_loss"], rel=1e-3)


def test_a_seed_decides_split_and_weights(train, monkeypatch):
    opened = []

    def open_and_tell(**settings):
        opened.append(open_clips(**settings))
        return opened[-1]

    monkeypatch.setattr(train_video_ddpm, "open_clips", open_and_tell)
    folders = [train(f"{i}", f"--max_steps 1 --seed {seed}") for i, seed in enumerate([3, 3, 4, 5])]
    weights = [last(folder)["model"] for folder in folders]
    assert len({clips[1].videos[0].name for clips in opened}) > 1
    assert same(weights[0], weights[1])
    assert not same(weights[0], weights[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(train, number):
    out = train("a", "--epochs 9", stop=2, by=number)
    assert last(out)["step"] == 2


def test_a_second_signal_stops_at_once(train, monkeypatch):
    def step_and_stop_twice(*given):
        train_step(*given)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_video_ddpm, "train_step", step_and_stop_twice)
    out = train("a", status=130)
    assert not (out / "last.pt").exists()


def test_the_end_of_a_loading_process_ends_the_run_with_one_line(train, monkeypatch, capsys):
    def step_and_kill(*given):
        train_step(*given)
        for child in multiprocessing.active_children():
            child.kill()

    monkeypatch.setattr(train_video_ddpm, "train_step", step_and_kill)
    out = train("a", "--num_workers 1 --epochs 99", status=1)
    assert "--num_workers" in capsys.readouterr().err.splitlines()[-1]
    assert last(out)["step"] >= 1


def test_defaults_are_those_of_the_original_design():
    design = (
        "--val_ratio 0.01 --out_dir outputs/train --T 8 --size 64 --frame_stride 1"
        " --color_mode rgb --endpoint_context 2 --batch_size 8 --lr 1e-4 --epochs 30"
        " --timesteps 1000 --beta_schedule cosine --cfg_drop_prob 0.08 --ema_decay 0.999"
        " --ema_update_after_step 100 --base_channels 96 --channel_mults 1 2 4 --res_blocks 2"
        " --temporal_attn_levels 1 2 --temporal_loss_weight 0.05 --seed 42 --num_workers 4"
        " --log_every 20 --max_steps 0 --grad_clip 1 --vis_every 1 --vis_guidance_scale 1.5"
        " --vis_steps 40 --noise_offset 0 --amp --no-tensorboard --no-cache_videos"
    )
    defaults = build_parser().defaults()
    given = {**build_parser().parse_given(words(design)), "max_videos": None, "resume": False}
    assert {name: defaults[name] for name in given} == given


def test_a_predictor_of_large_frames_sees_large_patches():
    for size, patch in (([64], 4), ([96, 64], 4), ([64, 48], 2), ([32], 2)):
        flags = ["--train", "predictor", "--size", *map(str, size)]
        args = build_parser().parse_args(flags)
        assert build_network(args, CPU).patch == patch


WRONG = "--T 4, --T 8 6, --size 9, --size 8 8 8, --size 0, --lr nan, --val_ratio 1.5"
WRONG += ", --cfg_drop_prob -1, --color_mode sepia, --max_videos 1, --base_channels 30"
WRONG += ", --temporal_attn_levels 3, --vis_steps 2000 --vis_every 1, --device tpu, --base 8"
WRONG += ", --data_root /nowhere, --out_dir, --out_dir /dev/null/a, --predictor /nowhere.pt"
WRONG += ", --predictor a.pt --train predictor, --preset refine --train predictor"
WRONG += ", --dry_run --resume"


@pytest.mark.parametrize("flags", WRONG.split(", "))
def test_wrong_flags_are_one_line_and_status_two(train, capsys, flags):
    train("a", flags, status=2)
    check_refusal(capsys, "/nowhere" if "/nowhere" in flags else words(flags)[0])
