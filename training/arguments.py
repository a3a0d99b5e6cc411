"""What a training command means: its stages, and the values of its flags on --resume."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from models.video_unet3d import check_architecture, check_size
from training.checkpointer import has_checkpoint, load_latest
from training.distributed import is_main, print0, wait_for_all
from utils.checkpoint import checkpoint_errors, load_checkpoint
from utils.flags import MNIST_PREFIX, Parser
from utils.video_utils import as_pair, middle_length

MODEL_FLAGS = ("base_channels", "channel_mults", "res_blocks", "temporal_attn_levels")
# What a run is; --resume may not change it.
FIXED_FLAGS = {
    *("train", "predictor", "optimizer"),
    *("seed", "val_ratio", "max_videos"),
    *("num_frames", "endpoint_context", "size", "frame_stride", "color_mode"),
    *MODEL_FLAGS,
    *("timesteps", "beta_schedule", "cfg_drop_prob", "temporal_loss_weight", "noise_offset"),
}
UNSAVED_FLAGS = ("resume", "dry_run")  # what a command does, as against what a run is


class Stage(NamedTuple):
    """One run of a command: a network, an objective, a folder."""

    out_dir: Path  # of its checkpoints
    given: dict[str, Any]  # flags on the command line
    preset: dict[str, Any]  # values of flags that are not given
    resume: bool  # whether it goes on from a checkpoint


class Start(NamedTuple):
    """Where a run starts: its arguments, and what they lead to on disk."""

    args: argparse.Namespace
    checkpoint: dict[str, Any] | None  # to go on from; None = a fresh run
    source: Path | None  # the checkpoint's file
    predictor: dict[str, Any] | None  # config and weights of what the run refines around


def plan_stages(
    parser: Parser,
    argv: Sequence[str] | None,
    presets: Mapping[str, Mapping[str, dict[str, Any]]],
) -> list[Stage]:
    """The runs of a command: one, or with --preset the predictor's and then the diffusion's.

    Raises: ValueError: for a missing or present last.pt, before anything is trained.
    """
    given = parser.parse_given(argv)
    resume = given.pop("resume", False)
    preset = presets.get(given.get("preset"), {})
    out_dir = Path({**parser.defaults(), **preset.get("both", {}), **given}["out_dir"])
    if "dry_run" in given:
        if resume:
            raise ValueError("--dry_run must be given without --resume")
        out_dir = out_dir / "dry_run"
        if is_main():
            shutil.rmtree(out_dir, ignore_errors=True)
    if preset and ("train" in given or "predictor" in given):
        raise ValueError("--preset sets --train and --predictor: give it without them")

    # The second stage refines around what the first has learned.
    runs = {out_dir: {}}
    if preset:
        first = out_dir / "predictor"
        second = {"predictor": str(first / "best.pt")}
        runs = {
            first: {**preset["both"], **preset["predictor"], "train": "predictor"},
            out_dir: {**preset["both"], **preset["diffusion"], **second},
        }
    begun = [folder for folder in runs if has_checkpoint(folder)]
    if resume and not begun:
        missing = f"there is no {out_dir / 'last.pt'}; without --resume a new run starts"
        raise ValueError(f"--resume: {missing}")
    # Another process than the main one may see an earlier dry run, which is being removed.
    if begun and not resume and "dry_run" not in given:
        remedy = "pass --resume or choose another folder"
        raise ValueError(f"--out_dir {begun[0]} already holds a checkpoint; {remedy}")
    stages = [Stage(folder, given, values, resume=False) for folder, values in runs.items()]
    if resume:
        # What comes before the newest stage that has begun is done.
        stages = stages[list(runs).index(begun[-1]) :]
        stages[0] = stages[0]._replace(resume=True)
    return stages


def resolve_stage(parser: Parser, stage: Stage) -> Start:
    """Settle the flags: given ones, over the checkpoint's, over the preset's, over defaults.

    Raises: ValueError: for a flag that contradicts the checkpoint or another flag.
    """
    # What a stage before has saved must be on disk in every process's eyes.
    wait_for_all()
    values = {**parser.defaults(), **stage.preset}
    checkpoint = None
    source = None
    if stage.resume:
        checkpoint, source = load_latest(stage.out_dir)
        with checkpoint_errors(source):
            values.update(checkpoint["args"])
            parser.check_stored(values)
        for name, value in stage.given.items():
            flag = "T" if name == "num_frames" else name
            if name == "data_root":
                value = absolute_root(value)
            stored = checkpoint["args"].get(name, value)
            if name in FIXED_FLAGS and value != stored:
                got = f"got {value}, the checkpoint has {stored}"
                raise ValueError(f"--{flag} is fixed by {source} ({got})")
            if value != stored and name != "out_dir":
                print0(f"--{flag} {value} overrides the checkpoint's {stored}")
    values.update(stage.given)
    values["out_dir"] = str(stage.out_dir)
    if values["data_root"]:
        # A checkpoint finds its clips from any folder.
        values["data_root"] = absolute_root(values["data_root"])
    args = argparse.Namespace(**values)
    check_args(args)
    predictor = checkpoint["predictor"] if checkpoint else load_predictor(args)
    return Start(args=args, checkpoint=checkpoint, source=source, predictor=predictor)


def absolute_root(root: str) -> str:
    """A data root from any working folder: a folder, or one with "smmnist:" before it."""
    prefix = MNIST_PREFIX if root.startswith(MNIST_PREFIX) else ""
    return prefix + str(Path(root.removeprefix(prefix)).absolute())


def check_args(args: argparse.Namespace) -> None:
    """Raises: ValueError: for the rules that join several flags."""
    shortest, longest = as_pair(args.num_frames)
    if shortest > longest:
        raise ValueError(f"--T must be one number or two rising ones (got {shortest} {longest})")
    middle_length(shortest, args.endpoint_context)
    if args.train == "predictor" and args.predictor:
        raise ValueError(f"--predictor is for --train diffusion (got {args.predictor})")
    if args.train == "predictor" and args.batch_size < 2:
        # Every second clip of a batch is learned with a code.
        raise ValueError(f"--batch_size must be at least 2 for a predictor (got {args.batch_size})")
    if args.vis_every and args.vis_steps > args.timesteps:
        rule = f"--vis_steps must be at most --timesteps {args.timesteps}"
        raise ValueError(f"{rule} (got {args.vis_steps})")
    if args.train == "diffusion":
        levels = args.channel_mults
        check_size(args.size, 2 ** len(levels))
        check_architecture(args.base_channels, levels, args.res_blocks, args.temporal_attn_levels)
    if args.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package: pip install tensorboard")


def load_predictor(args: argparse.Namespace) -> dict[str, Any] | None:
    """Config and weights of --predictor: of its own checkpoint, or of one that refines around it.

    Raises: ValueError: if there is none, or it is for other clips.
    """
    path = args.predictor
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    predictor = checkpoint["predictor"]
    if checkpoint["args"]["train"] == "predictor":
        predictor = {"config": checkpoint["model_config"], "weights": checkpoint["ema"]}
    if predictor is None:
        raise ValueError(f"--predictor {path}: this checkpoint holds no predictor")
    k = predictor["config"]["endpoint_context"]
    color_mode = checkpoint["clip_config"]["color_mode"]
    if (k, color_mode) != (args.endpoint_context, args.color_mode):
        needs = f"--endpoint_context {k} and --color_mode {color_mode}"
        raise ValueError(f"--predictor {path} needs {needs}")
    return predictor
