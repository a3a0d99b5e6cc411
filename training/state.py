"""All that changes while training, and its way into a checkpoint and back."""

import argparse
import copy
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.noise import INIT, generator_for
from models.video_unet3d import VideoUNet3D, build_model
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint

UNSAVED_FLAGS = ("resume", "dry_run", "preset")  # what a command does, as against what a run is
MAX_SKIPPED_IN_ROW = 20  # an fp16 loss scale starts too high by a few halvings; this many mean that the run is lost


class Tally:
    """Running sums over steps, kept on the device in float64, so that no step waits for a number.

    Its entries: loss and steps since the last line of metrics.jsonl, loss and steps of this epoch (steps whose loss
    and gradient are finite count in both), the last gradient norm, and skipped steps, of the whole run and in a row.
    """

    NAMES = ("line_loss", "line_steps", "epoch_loss", "epoch_steps", "grad_norm", "skipped", "skipped_in_row")

    def __init__(self, device: torch.device):
        self.values = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count one step: its loss and gradient norm, 0-dimensional, on the device."""
        fine = loss.isfinite() & norm.isfinite()
        counted, loss = fine.double(), torch.where(fine, loss.double(), 0.0)
        *sums, _, skipped, in_row = self.values.unbind()
        sums = [total + more for total, more in zip(sums, (loss, counted, loss, counted), strict=True)]
        self.values = torch.stack([*sums, norm.double(), skipped + 1 - counted, (in_row + 1) * (1 - counted)])

    def read(self) -> dict[str, float]:
        """Every entry by name; this waits for the device.

        Raises: FloatingPointError: if too many steps in a row were skipped.
        """
        values = dict(zip(self.NAMES, self.values.tolist(), strict=True))
        if values["skipped_in_row"] >= MAX_SKIPPED_IN_ROW:
            raise FloatingPointError(
                f"gradients must be finite in at least one of {MAX_SKIPPED_IN_ROW} steps in a row "
                f"(got {values['skipped_in_row']:.0f} that are not)"
            )
        return values

    def take_mean(self, span: str) -> float | None:
        """The mean loss since the last call, of a "line" or an "epoch", which starts anew; None without any steps."""
        values, first = self.read(), self.NAMES.index(f"{span}_loss")
        self.values[first : first + 2] = 0
        return values[f"{span}_loss"] / values[f"{span}_steps"] if values[f"{span}_steps"] else None


@dataclass
class TrainingState:
    """What a checkpoint carries on.

    `step` counts optimiser steps, those that were skipped included; `position` counts steps' worth of clips since the
    first epoch began: they differ once a run goes on with another batch size. Data and noise follow `position`,
    learning rate and EMA follow `step`.
    """

    model: VideoUNet3D
    ema: VideoUNet3D
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tally: Tally
    step: int = 0
    position: int = 0
    best_val_loss: float = math.inf
    plan: dict[str, float] | None = None
    history: dict[str, Any] = field(default_factory=lambda: {"train": [], "epochs": [], "sums": {}})


class Saver:
    """Writes a run's checkpoints when they are due; one that cannot be written costs a line, not the run.

    Args:
        out_dir: the run's folder.
        args: the run's arguments.
        epoch_steps: optimiser steps of an epoch.
        last_is_whole: whether last.pt is known to be readable, and so worth keeping as prev.pt.

    Attributes:
        failed: whether the newest attempt at last.pt failed.
    """

    def __init__(self, out_dir: Path, args: argparse.Namespace, epoch_steps: int, last_is_whole: bool):
        self.out_dir = out_dir
        self.args = args
        self.epoch_steps = epoch_steps
        self.last_is_whole = last_is_whole
        self.failed = False
        self.tried_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether --save_every or --save_minutes ask for a save after this step."""
        minutes = (time.monotonic() - self.tried_at) / 60
        by_steps = self.args.save_every and step % self.args.save_every == 0
        return bool(by_steps or (self.args.save_minutes and minutes >= self.args.save_minutes))

    def save_best(self, state: TrainingState) -> None:
        """Write best.pt."""
        self._save("best.pt", state, None)

    def save_last(self, state: TrainingState) -> None:
        """Write last.pt, and keep the one before it as prev.pt."""
        self.tried_at = time.monotonic()
        self.failed = not self._save("last.pt", state, self.out_dir / "prev.pt" if self.last_is_whole else None)
        self.last_is_whole |= not self.failed

    def _save(self, name: str, state: TrainingState, previous: Path | None) -> bool:
        try:
            save(self.out_dir / name, state, self.args, self.epoch_steps, previous)
        except OSError as error:
            tqdm.write(f"WARNING: {error}; what was saved before is untouched", file=sys.stderr)
            return False
        return True


def model_config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `build_model`."""
    names = ("base_channels", "channel_mults", "res_blocks", "temporal_attn_levels", "endpoint_context")
    return {"image_channels": 1 if args.color_mode == "gray" else 3} | {name: getattr(args, name) for name in names}


def new_state(
    args: argparse.Namespace, model_config: dict[str, Any], device: torch.device, amp_dtype: torch.dtype | None
) -> TrainingState:
    """Fresh weights (by the seed), their EMA copy and an optimiser."""
    torch.manual_seed(generator_for(args.seed, INIT).initial_seed())
    model = build_model(model_config).to(device).lay_out(args.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    model.activation_checkpointing = args.activation_checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    return TrainingState(model.train(), ema, optimizer, scaler, Tally(device))


def restore(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace, epoch_steps: int) -> None:
    """Go on where a checkpoint stands; a changed batch size goes on at the same clip of the epoch.

    Raises: ValueError: if its weights do not fit its model_config.
    """
    source = f"{args.out_dir}/last.pt"
    load_weights(state.model, checkpoint["model"], source)
    load_weights(state.ema, checkpoint["ema"], source)
    ours = state.optimizer.state_dict()["param_groups"]  # settings are this command's, moments the checkpoint's
    state.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": ours})
    for parameter, moments in state.optimizer.state.items():  # a run of another memory layout may have saved them
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    if checkpoint["scaler"]:  # that of a run without fp16 is empty
        state.scaler.load_state_dict(checkpoint["scaler"])
    stored = checkpoint["args"]
    clips_done = checkpoint["step_in_epoch"] * stored["batch_size"] * stored["grad_accum"]
    step_in_epoch = clips_done // (args.batch_size * args.grad_accum)
    state.step = checkpoint["step"]
    state.position = checkpoint["epoch"] * epoch_steps + min(step_in_epoch, epoch_steps)
    state.best_val_loss, state.history = checkpoint["best_val_loss"], checkpoint["history"]
    sums = [float(state.history["sums"].get(name, 0)) for name in Tally.NAMES]
    state.tally.values = torch.tensor(sums, dtype=torch.float64, device=state.tally.values.device)
    state.plan = checkpoint["lr_scheduler"]
    torch.set_rng_state(checkpoint["rng"]["torch"])


def load_resumable(folder: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from, and its file: last.pt, or prev.pt with a loud line where last.pt is damaged.

    Raises: ValueError: naming the file, if neither can be read.
    """
    last, previous = folder / "last.pt", folder / "prev.pt"
    try:
        return load_checkpoint(last), last
    except ValueError as error:
        if not previous.is_file():
            raise
        checkpoint = load_checkpoint(previous)
        print(f"WARNING: {error}: going on from {previous}, step {checkpoint['step']}", file=sys.stderr)
        return checkpoint, previous


def save(
    path: Path, state: TrainingState, args: argparse.Namespace, epoch_steps: int, previous: Path | None = None
) -> None:
    """Write a checkpoint from which training goes on exactly, and sampling needs no flag.

    Args:
        path: the file to be.
        state: what it carries on.
        args: the run's arguments.
        epoch_steps: optimiser steps of an epoch.
        previous: where the checkpoint that is at `path` now is kept; None = it goes.

    Raises: FloatingPointError: if the run is lost; OSError: if the file cannot be written.
    """
    epoch, step_in_epoch = divmod(state.position, epoch_steps)
    state.history["sums"] = state.tally.read()
    contents = {
        "step": state.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "lr_scheduler": state.plan,
        "scaler": state.scaler.state_dict(),
        "rng": {"torch": torch.get_rng_state()},  # for completeness: every draw of ours has a generator of its own
        "model_config": model_config_of(args),
        "diffusion_config": {
            "timesteps": args.timesteps,
            "schedule": args.beta_schedule,
            "noise_offset": args.noise_offset,
        },
        "clip_config": {name: getattr(args, name) for name in ("num_frames", "size", "frame_stride", "color_mode")},
        "args": {name: value for name, value in vars(args).items() if name not in UNSAVED_FLAGS},
        "history": state.history,
        "best_val_loss": state.best_val_loss,
    }
    save_checkpoint(path, contents, previous)
