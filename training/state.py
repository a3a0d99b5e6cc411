"""All that changes while training, and how it gets into a checkpoint and back."""

import argparse
import copy
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion.noise import TRAIN, generator_for
from training.distributed import print0, wrap_ddp
from training.metrics import TrainMetrics, divergence_threshold
from training.optimizer import Muon
from utils.checkpoint import checkpoint_errors, load_weights
from utils.device import autocast

MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum"})  # of AdamW and of Muon


@dataclass
class TrainingState:
    """What a checkpoint carries on, and how far the run is to go.

    `step` counts optimiser steps; `data_step` counts steps' worth of clips since the first epoch
    began. They differ once a run goes on with another batch size. Data and noise follow
    `data_step`; learning rate and EMA follow `step`.
    """

    model: nn.Module  # a VideoUNet3D or a FramePredictor
    ddp_model: nn.Module  # the same, wrapped for several processes
    ema: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    metrics: TrainMetrics
    step: int = 0
    data_step: int = 0
    total_steps: int = 0
    epoch_steps: int = 1
    best_val_loss: float = math.inf
    # Start, middle, end and data_step of the first batch, on which weights are tried.
    probe: tuple[Tensor, Tensor, Tensor, int] | None = None
    history: dict[str, Any] = field(default_factory=lambda: {"train": [], "epochs": [], "sums": {}})

    @property
    def finished(self) -> bool:
        """Whether the run has all its steps."""
        return self.step >= self.total_steps

    @property
    def at_epoch_end(self) -> bool:
        """Whether the newest step ends an epoch, or the run."""
        return self.step > 0 and (self.data_step % self.epoch_steps == 0 or self.finished)

    @property
    def validated(self) -> bool:
        """Whether the newest step has its validation loss."""
        epochs = self.history["epochs"]
        return bool(epochs) and epochs[-1]["step"] == self.step

    def add_epoch(self, val_loss: float) -> dict[str, Any]:
        """Put the losses of the epoch that ends into the history, and return that entry of it."""
        entry = {
            "step": self.step,
            "epoch": math.ceil(self.data_step / self.epoch_steps),
            "train_loss": self.metrics.take_mean("epoch"),
            "val_loss": val_loss,
            **self.metrics.bad_steps(),
        }
        self.history["epochs"].append(entry)
        return entry

    def plan_steps(self, args: argparse.Namespace) -> None:
        """Decide how far the run goes from where it stands."""
        before = self.total_steps
        left = args.epochs * self.epoch_steps - self.data_step
        if args.max_steps:
            left = args.max_steps - self.step
        self.total_steps = 2 if args.dry_run else self.step + max(0, left)
        if self.step and self.total_steps != before:
            print0(f"the learning rate now falls to 0 at step {self.total_steps}, not {before}")


def init_state(
    args: argparse.Namespace,
    model: nn.Module,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> TrainingState:
    """A network on its device, its EMA copy, optimiser and loss scaler, at step 0."""
    if args.optimizer == "muon":
        optimizer = Muon(model, args.lr)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)
    threshold = divergence_threshold(args.noise_offset, args.temporal_loss_weight)
    return TrainingState(
        model=model.train(),
        ddp_model=wrap_ddp(model, device),
        ema=copy.deepcopy(model).requires_grad_(False).eval(),
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16),
        metrics=TrainMetrics(device, threshold),
    )


def get_lr(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to the peak, then half a cosine to 0 at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, over all parameters at once."""
    average = get_ema_multi_avg_fn(decay)
    average(list(ema.parameters()), list(model.parameters()), None)


@torch.no_grad()
def probe_loss(
    state: TrainingState, loss: Callable[..., Tensor], seed: int, amp_dtype: torch.dtype | None
) -> float:
    """The loss of the first batch under the present weights; 0 before the first step."""
    if state.probe is None:
        return 0.0
    start, middle, end, data_step = state.probe
    generator = generator_for(seed, TRAIN, data_step, device=middle.device)
    with autocast(middle.device, amp_dtype):
        # By its forward, as torch.compile would make another version without gradients.
        return loss(state.model.forward, start, middle, end, generator).mean().item()


# --- checkpoints ----------------------------------------------------------------------------------


def to_checkpoint(state: TrainingState, configs: Mapping[str, Any]) -> dict[str, Any]:
    """What `restore` and sampling read; `configs`, of `describe_objective`, do not change."""
    epoch, step_in_epoch = divmod(state.data_step, state.epoch_steps)
    return {
        "step": state.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        "model": state.model.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict()["state"],
        "scaler": state.scaler.state_dict(),
        "lr_scheduler": {"total_steps": state.total_steps},
        "history": state.history,
        "best_val_loss": state.best_val_loss,
        **configs,
    }


def restore(
    state: TrainingState, checkpoint: dict[str, Any], clips_per_step: int, source: Path
) -> None:
    """Go on where a checkpoint stands, at the same clip of the epoch whatever the batch size.

    Raises: ValueError: naming the file `source`, if something in it does not fit.
    """
    load_weights(state.model, checkpoint["model"], source)
    load_weights(state.ema, checkpoint["ema"], source)
    with checkpoint_errors(source):
        restore_optimizer(state.optimizer, checkpoint["optimizer"])
        if checkpoint["scaler"] and state.scaler.is_enabled():
            state.scaler.load_state_dict(checkpoint["scaler"])
        stored = checkpoint["args"]
        stored_clips = stored["batch_size"] * stored["grad_accum"] * stored["processes"]
        step_in_epoch = checkpoint["step_in_epoch"] * stored_clips // clips_per_step
        state.step = checkpoint["step"]
        step_in_epoch = min(step_in_epoch, state.epoch_steps)
        data_step = checkpoint["epoch"] * state.epoch_steps + step_in_epoch
        state.data_step = operator.index(data_step)
        state.total_steps = operator.index(checkpoint["lr_scheduler"]["total_steps"])
        state.best_val_loss = float(checkpoint["best_val_loss"])
        history = checkpoint["history"]
        state.history = {"train": [*history["train"]], "epochs": [*history["epochs"]], "sums": {}}
        sums = [float(history["sums"].get(name, 0)) for name in TrainMetrics.NAMES]
        state.metrics.values = state.metrics.values.new_tensor(sums)


def restore_optimizer(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Take the moments of a checkpoint; settings such as the learning rate stay this command's."""
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": stored, "param_groups": groups})
    for parameter, moments in optimizer.state.items():
        if set(moments) not in MOMENTS:
            raise ValueError(f"an optimizer's state holds {sorted(moments)}")
        for name in moments.keys() - {"step"}:
            # A run on another device may have saved another memory layout.
            moment = moments[name].view_as(parameter)
            moments[name] = torch.empty_like(parameter).copy_(moment)
