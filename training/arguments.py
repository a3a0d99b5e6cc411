"""What a training command means: its stages, and the values of its flags on --resume."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from models.video_unet3d import check_architecture, check_size
from training.checkpointer import has_checkpoint, load_latest
from training.distributed import is_main, print0
from utils.checkpoint import checkpoint_errors, load_checkpoint
from utils.flags import Parser
from utils.video_utils import as_pair

# What a run is; --resume may not change it.
FIXED_FLAGS = {
    "train",
    "predictor",
    "seed",
    "val_ratio",
    "max_videos",
    "num_frames",
    "endpoint_context",
    "size",
    "frame_stride",
    "color_mode",
    "base_channels",
    "channel_mults",
    "res_blocks",
    "temporal_attn_levels",
    "timesteps",
    "beta_schedule",
    "cfg_drop_prob",
    "temporal_loss_weight",
    "noise_offset",
    "optimizer",
}
UNSAVED_FLAGS = ("resume", "dry_run")  # what a command does, as against what a run is


class Stage(NamedTuple):
    """One run of a command: a network, an objective, a folder.

    Attributes:
        out_dir: of its checkpoints.
        given: flags on the command line.
        preset: values of flags that are not given.
    """

    out_dir: Path
    given: dict[str, Any]
    preset: dict[str, Any]


class Start(NamedTuple):
    """Where a run starts: its arguments, and what they lead to on disk.

    Attributes:
        checkpoint: to go on from, with its file `source`; None = a fresh run.
        predictor: config and weights of the frozen predictor to refine around, or None.
    """

    args: argparse.Namespace
    checkpoint: dict[str, Any] | None
    source: Path | None
    predictor: dict[str, Any] | None


def plan_stages(
    parser: Parser,
    argv: Sequence[str] | None,
    presets: Mapping[str, Mapping[str, dict[str, Any]]],
) -> list[Stage]:
    """The runs of a command: one, or with --preset the predictor's and then the diffusion's.

    Args:
        argv: the command line.
        presets: by name, values of both stages and of each.

    Raises: ValueError: for a missing or present last.pt, before anything is trained.
    """
    given = parser.parse_given(argv)
    stages = presets.get(given.get("preset"), {})
    values = {**parser.defaults(), **stages.get("both", {}), **given}
    out_dir = Path(values["out_dir"])
    if given.get("dry_run"):
        out_dir = prepare_dry_run(out_dir, given)
    predictor_dir = out_dir / "predictor"
    if given.get("resume"):
        # Also without the flag, a preset that was stopped in its first stage goes on to the second.
        if not has_checkpoint(out_dir) and has_checkpoint(predictor_dir):
            stored = load_latest(predictor_dir)[0]["args"]
            given = {**stored["given"], **given}
            stages = presets[given["preset"]]
        elif not has_checkpoint(out_dir):
            missing = f"there is no {out_dir / 'last.pt'}; without --resume a new run starts"
            raise ValueError(f"--resume: {missing}")
    else:
        for folder in (out_dir, predictor_dir) if stages else (out_dir,):
            if has_checkpoint(folder):
                remedy = "pass --resume or choose another folder"
                raise ValueError(f"--out_dir {folder} already holds a checkpoint; {remedy}")
    if not stages:
        return [Stage(out_dir, given, {})]
    if "train" in given or "predictor" in given:
        raise ValueError("--preset sets --train and --predictor: give it without them")

    predictor = {**stages["both"], **stages["predictor"], "train": "predictor"}
    # The second stage refines around what the first has learned.
    diffusion = {
        **stages["both"],
        **stages["diffusion"],
        "predictor": str(predictor_dir / "best.pt"),
    }
    if has_checkpoint(out_dir):
        return [Stage(out_dir, given, diffusion)]
    return [
        Stage(predictor_dir, given, predictor),
        Stage(out_dir, {**given, "resume": False}, diffusion),
    ]


def prepare_dry_run(out_dir: Path, given: Mapping[str, Any]) -> Path:
    """The emptied folder of a dry run, away from the real run's checkpoints."""
    if given.get("resume"):
        raise ValueError("--dry_run must be given without --resume")
    if is_main():
        shutil.rmtree(out_dir / "dry_run", ignore_errors=True)
    return out_dir / "dry_run"


def resolve_stage(parser: Parser, stage: Stage) -> Start:
    """Settle the values of a stage's flags.

    A flag that is given comes before the checkpoint's value, that before the preset's, and that
    before the default.

    Raises: ValueError: for a flag that contradicts the checkpoint.
    """
    values = {**parser.defaults(), **stage.preset}
    checkpoint = None
    source = None
    if stage.given.get("resume"):
        checkpoint, source = load_latest(stage.out_dir)
        with checkpoint_errors(source):
            values.update(checkpoint["args"])
            parser.check_stored(values)
        for name, value in stage.given.items():
            flag = "T" if name == "num_frames" else name
            stored = checkpoint["args"].get(name, value)
            if name in FIXED_FLAGS and value != stored:
                got = f"got {value}, the checkpoint has {stored}"
                raise ValueError(f"--{flag} is fixed by {source} ({got})")
            if value != stored and name != "out_dir":
                print0(f"--{flag} {value} overrides the checkpoint's {stored}")
    stored_given = values.get("given", {})
    values.update(stage.given)
    values["out_dir"] = str(stage.out_dir)
    values["given"] = {**stored_given, **stage.given}
    args = argparse.Namespace(**values)
    check_args(args)
    if checkpoint is not None:
        predictor = checkpoint["predictor"]
    else:
        predictor = load_predictor(args.predictor)
    return Start(args=args, checkpoint=checkpoint, source=source, predictor=predictor)


def check_args(args: argparse.Namespace) -> None:
    """Raises: ValueError: for the rules that join several flags."""
    shortest, longest = as_pair(args.num_frames)
    k = args.endpoint_context
    if shortest > longest:
        raise ValueError(f"--T must be one number or two rising ones (got {shortest} {longest})")
    if shortest <= 2 * k:
        rule = "--T must exceed 2 * --endpoint_context so that a middle exists"
        raise ValueError(f"{rule} (got --T {shortest}, --endpoint_context {k})")
    if args.train == "predictor" and args.predictor:
        raise ValueError("--predictor is for --train diffusion")
    if args.vis_every and args.vis_steps > args.timesteps:
        rule = f"--vis_steps must be at most --timesteps {args.timesteps}"
        raise ValueError(f"{rule} (got {args.vis_steps})")
    if args.train == "diffusion":
        check_size(args.size, 2 ** len(args.channel_mults))
        check_architecture(
            base_channels=args.base_channels,
            channel_mults=args.channel_mults,
            res_blocks=args.res_blocks,
            temporal_attn_levels=args.temporal_attn_levels,
        )
    if args.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package: pip install tensorboard")


def load_predictor(path: str | None) -> dict[str, Any] | None:
    """Config and weights of the predictor in a checkpoint: its own, or what it refines around."""
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    if checkpoint["args"]["train"] == "predictor":
        return {"config": checkpoint["model_config"], "weights": checkpoint["ema"]}
    if checkpoint["predictor"] is None:
        raise ValueError(f"--predictor {path}: this checkpoint holds no predictor")
    return checkpoint["predictor"]
