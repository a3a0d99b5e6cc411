"""All that changes while training, and its way into a checkpoint and back."""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion.noise import INIT, generator_for
from models.video_unet3d import VideoUNet3D, build_model
from utils import distributed
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint

UNSAVED_FLAGS = ("resume", "dry_run", "preset")  # what a command does, as against what a run is
MAX_BAD_IN_ROW = 20  # an fp16 loss scale starts too high by a few halvings; this many mean that the run is lost
DIVERGED = 10  # times the loss of a network that predicts nothing


class Tally:
    """Running sums over steps, kept on the device in float64, so that no step waits for a number.

    Its entries: loss and steps since the last line of metrics.jsonl, loss and steps of this epoch (steps whose loss
    and gradient are finite count in both), the last gradient norm, steps skipped as not finite and steps of a diverged
    loss in the whole run, and either of them in a row.

    Args:
        device: where the losses are.
        bound: above it a loss is diverged.
    """

    NAMES = ("line_loss", "line_steps", "epoch_loss", "epoch_steps", "grad_norm", "skipped", "diverged", "bad_in_row")

    def __init__(self, device: torch.device, bound: float):
        self.bound = bound
        self.values = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count one step: its loss and gradient norm, 0-dimensional, on the device."""
        finite = loss.isfinite() & norm.isfinite()
        counted, loss = finite.double(), torch.where(finite, loss.double(), 0.0)
        diverged = (loss > self.bound).double()
        *sums, _, skipped, diverged_before, in_row = self.values.unbind()
        sums = [total + more for total, more in zip(sums, (loss, counted, loss, counted), strict=True)]
        bad = 1 - counted + diverged
        self.values = torch.stack(
            [*sums, norm.double(), skipped + 1 - counted, diverged_before + diverged, (in_row + bad) * bad]
        )

    def read(self) -> dict[str, float]:
        """Every entry by name; this waits for the device.

        Raises: FloatingPointError: if too many steps in a row were skipped or diverged.
        """
        values = dict(zip(self.NAMES, self.values.tolist(), strict=True))
        if values["bad_in_row"] >= MAX_BAD_IN_ROW:
            raise FloatingPointError(
                f"of {MAX_BAD_IN_ROW} steps in a row one must have finite gradients and a loss of at most "
                f"{self.bound:g} (got {values['bad_in_row']:.0f} without; a lower --lr or --warmup_steps may help)"
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
    learning rate and EMA follow `step`. `parallel` is the model, or the wrapper of it that averages gradients over
    processes, and `trial` the inputs of the first loss, on which weights are tried before they are saved.
    """

    model: VideoUNet3D
    parallel: nn.Module
    ema: VideoUNet3D
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    tally: Tally
    step: int = 0
    position: int = 0
    best_val_loss: float = math.inf
    plan: dict[str, float] | None = None
    trial: tuple[Tensor, ...] | None = None
    history: dict[str, Any] = field(default_factory=lambda: {"train": [], "epochs": [], "sums": {}})


class Saver:
    """Writes a run's checkpoints when they are due, if this is the main process.

    One that cannot be written costs a line, not the run. One whose weights are diverged is not written.

    Args:
        out_dir: the run's folder.
        args: the run's arguments.
        epoch_steps: optimiser steps of an epoch.
        last_is_whole: whether last.pt is known to be readable, and so worth keeping as prev.pt.
        trial_loss: gives the loss of some batch under the weights that are to be saved.

    Attributes:
        failure: why the newest attempt at last.pt failed, or None.
    """

    def __init__(
        self,
        out_dir: Path,
        args: argparse.Namespace,
        epoch_steps: int,
        last_is_whole: bool,
        trial_loss: Callable[[], float],
    ):
        self.out_dir = out_dir
        self.args = args
        self.epoch_steps = epoch_steps
        self.last_is_whole = last_is_whole
        self.trial_loss = trial_loss
        self.failure: OSError | FloatingPointError | None = None
        self.tried_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether --save_every or --save_minutes ask for a save after this step."""
        minutes = (time.monotonic() - self.tried_at) / 60
        by_steps = self.args.save_every and step % self.args.save_every == 0
        return bool(by_steps or (self.args.save_minutes and minutes >= self.args.save_minutes))

    def save_best(self, state: TrainingState, val_loss: float) -> None:
        """Write best.pt; if that fails, the best before stays the one to beat."""
        before, state.best_val_loss = state.best_val_loss, val_loss
        if self._save("best.pt", state, None):
            state.best_val_loss = before

    def save_last(self, state: TrainingState) -> None:
        """Write last.pt, and keep the one before it as prev.pt."""
        self.tried_at = time.monotonic()
        self.failure = self._save("last.pt", state, self.out_dir / "prev.pt" if self.last_is_whole else None)
        self.last_is_whole |= self.failure is None

    def _save(self, name: str, state: TrainingState, previous: Path | None) -> OSError | FloatingPointError | None:
        state.history["sums"] = state.tally.read()  # in every process, so that a lost run ends in all of them
        if not distributed.is_main():
            return None
        failure: OSError | FloatingPointError
        try:
            loss = self.trial_loss()
            if loss <= state.tally.bound:  # not so where it is no number
                save(self.out_dir / name, state, self.args, self.epoch_steps, previous)
                return None
            failure = FloatingPointError(
                f"{self.out_dir / name} is not written: the weights after step {state.step} are diverged, their loss "
                f"must be at most {state.tally.bound:g} (got {loss:g}; a lower --lr or --warmup_steps may help)"
            )
        except OSError as error:
            failure = error
        tqdm.write(f"WARNING: {failure}; what was saved before is untouched", file=sys.stderr)
        return failure


def diverged_loss(args: argparse.Namespace) -> float:
    """The loss above which training counts as diverged; a network that predicts 0 has a tenth of it at most.

    v has at most the variance of a noise eps, 1 + noise_offset^2, as clips lie in [-1, 1]; frame differences of natural
    clips are below 1.
    """
    return DIVERGED * (1 + args.noise_offset**2 + args.temporal_loss_weight)


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
    tally = Tally(device, diverged_loss(args))
    return TrainingState(model.train(), model, ema, optimizer, scaler, tally)


def restore(state: TrainingState, checkpoint: dict[str, Any], args: argparse.Namespace, epoch_steps: int) -> None:
    """Go on where a checkpoint stands; another batch size or number of processes goes on
    at the same clip of the epoch.

    Raises: ValueError: if its weights, moments or random state do not fit its model_config.
    """
    source = f"{args.out_dir}/last.pt"
    load_weights(state.model, checkpoint["model"], source)
    load_weights(state.ema, checkpoint["ema"], source)
    check_moments(state, checkpoint, source)
    ours = state.optimizer.state_dict()["param_groups"]  # settings are this command's, moments the checkpoint's
    state.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": ours})
    for parameter, moments in state.optimizer.state.items():  # a run of another memory layout may have saved them
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    if checkpoint["scaler"]:  # that of a run without fp16 is empty
        state.scaler.load_state_dict(checkpoint["scaler"])
    stored = checkpoint["args"]
    clips_done = (
        checkpoint["step_in_epoch"] * stored["batch_size"] * stored["grad_accum"] * (stored.get("processes") or 1)
    )
    step_in_epoch = clips_done // (args.batch_size * args.grad_accum * args.processes)
    state.step = checkpoint["step"]
    state.position = checkpoint["epoch"] * epoch_steps + min(step_in_epoch, epoch_steps)
    state.best_val_loss, state.history = checkpoint["best_val_loss"], checkpoint["history"]
    sums = [float(state.history["sums"].get(name) or 0) for name in Tally.NAMES]
    state.tally.values = torch.tensor(sums, dtype=torch.float64, device=state.tally.values.device)
    state.plan = checkpoint["lr_scheduler"]
    torch.set_rng_state(checkpoint["rng"]["torch"])


def check_moments(state: TrainingState, checkpoint: dict[str, Any], source: str) -> None:
    """Raises: ValueError: unless the optimiser's, the scaler's and the random state are those of this network."""
    moments = checkpoint["optimizer"]["state"]
    parameters = list(state.model.parameters())
    fine = not moments or list(moments) == list(range(len(parameters)))
    for entry, parameter in zip(moments.values(), parameters, strict=False):
        fine = fine and isinstance(entry, dict) and set(entry) == {"step", "exp_avg", "exp_avg_sq"}
        fine = fine and all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in entry.values())
        fine = fine and entry["exp_avg"].shape == entry["exp_avg_sq"].shape == parameter.shape
        fine = fine and entry["step"].shape == ()
    if not fine:
        raise ValueError(f"{source}: the optimizer's state does not fit its model_config")
    known = set(torch.amp.GradScaler("cpu").state_dict())
    if checkpoint["scaler"] and (set(checkpoint["scaler"]) != known or None in checkpoint["scaler"].values()):
        raise ValueError(f"{source}: scaler must hold {', '.join(sorted(known))}")
    if checkpoint["rng"]["torch"].shape != torch.get_rng_state().shape:
        raise ValueError(f"{source}: rng['torch'] must be a state of torch's generator")


def load_resumable(folder: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from, and its file: last.pt, or prev.pt with a loud line where last.pt is damaged.

    Raises: ValueError: naming the file, if neither can be read.
    """
    last, previous = folder / "last.pt", folder / "prev.pt"
    try:
        return load_trained(last), last
    except ValueError as error:
        if not previous.is_file():
            raise
        checkpoint = load_trained(previous)
        print(f"WARNING: {error}: going on from {previous}, step {checkpoint['step']}", file=sys.stderr)
        return checkpoint, previous


def load_trained(path: Path) -> dict[str, Any]:
    """A checkpoint whose weights are those of its model_config.

    Raises: ValueError: naming the file, if it cannot be read or they are not.
    """
    checkpoint = load_checkpoint(path)
    for name in ("model", "ema"):
        try:
            model = build_model(checkpoint["model_config"], "meta")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        load_weights(model, checkpoint[name], path)
    return checkpoint


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

    Raises: OSError: if the file cannot be written.
    """
    epoch, step_in_epoch = divmod(state.position, epoch_steps)
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
