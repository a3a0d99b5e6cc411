"""All that changes while training, and its way into a checkpoint and back."""

import argparse
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from diffusion.loss import diffusion_loss, predictor_loss
from diffusion.noise import INIT, generator_for
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import VideoUNet3D, build_model
from training.clip_shapes import clip_config_of, is_timed
from training.optimizer import Muon
from utils.checkpoint import load_weights
from utils.device import autocast
from utils.distributed import is_main, print0, wrap_ddp

UNSAVED_FLAGS = ("resume", "dry_run", "preset")  # what a command does, as against what a run is
MAX_BAD_IN_ROW = 20  # an fp16 loss scale starts too high by a few halvings; this many mean that the run is lost
DIVERGED = 10  # times the loss of a network that predicts nothing


class TrainMetrics:
    """Running sums over steps, kept on the device, so that no step waits for a number.

    Loss and steps since the last line of metrics.jsonl, and of this epoch (finite steps alone); the last gradient norm;
    steps skipped as not finite, steps of a loss above `threshold`, and either of them in a row.
    """

    NAMES = ("line_loss", "line_steps", "epoch_loss", "epoch_steps", "grad_norm", "skipped", "diverged", "bad_in_row")

    def __init__(self, device: torch.device, threshold: float):
        self.threshold = threshold
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.values = torch.zeros(len(self.NAMES), dtype=dtype, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, norm: Tensor) -> None:
        """Count one step: its loss and gradient norm, 0-dimensional, on the device."""
        finite = loss.isfinite() & norm.isfinite()
        counted, loss = finite.to(self.values), torch.where(finite, loss.to(self.values), 0.0)
        diverged = (loss > self.threshold).to(self.values)
        *sums, _, skipped, diverged_before, in_row = self.values.unbind()
        sums = [total + more for total, more in zip(sums, (loss, counted, loss, counted), strict=True)]
        bad = 1 - counted + diverged
        counts = (skipped + 1 - counted, diverged_before + diverged, (in_row + bad) * bad)
        self.values = torch.stack([*sums, norm.to(self.values), *counts])

    def read(self) -> dict[str, float]:
        """Every entry by name; this waits for the device.

        Raises: FloatingPointError: if too many steps in a row were skipped or diverged.
        """
        values = dict(zip(self.NAMES, self.values.tolist(), strict=True))
        if values["bad_in_row"] >= MAX_BAD_IN_ROW:
            raise FloatingPointError(
                f"of {MAX_BAD_IN_ROW} steps in a row one must have finite gradients and a loss of at most "
                f"{self.threshold:g} (got {values['bad_in_row']:.0f} without; a lower --lr or --warmup_steps may help)"
            )
        return values

    def take_mean(self, span: str) -> float | None:
        """The mean loss of a "line" or an "epoch", which then starts anew; None without any finite steps."""
        values, first = self.read(), self.NAMES.index(f"{span}_loss")
        self.values[first : first + 2] = 0
        return values[f"{span}_loss"] / values[f"{span}_steps"] if values[f"{span}_steps"] else None

    def bad_steps(self) -> dict[str, int]:
        """The counts of the whole run that every line of metrics.jsonl has."""
        values = self.read()
        return {"skipped_steps": int(values["skipped"]), "diverged_steps": int(values["diverged"])}


@dataclass
class TrainingState:
    """What a checkpoint carries on, and how far the run is to go.

    `step` counts optimiser steps, skipped ones included; `data_step` counts steps' worth of clips since the first epoch
    began: they differ once a run goes on with another batch size. Data and noise follow `data_step`; learning rate and
    EMA follow `step`, and begin anew where refining does. Weights are tried on `probe_batch`, the inputs of the first
    loss, before they are saved.

    A learned predictor is trained alone in the first `predictor_steps`; it is then fixed, and the network refines it.
    """

    model: VideoUNet3D
    ddp_model: nn.Module
    ema: VideoUNet3D
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    metrics: TrainMetrics
    predictor_steps: int = 0
    residual_scale: float | str = 1.0  # "measured" until it is
    step: int = 0
    data_step: int = 0
    best_val_loss: float = math.inf
    lr_schedule: dict[str, float] = field(default_factory=dict)
    probe_batch: tuple[Tensor, ...] | None = None
    history: dict[str, Any] = field(default_factory=lambda: {"train": [], "epochs": [], "sums": {}})
    total_steps: int = 0
    total_data_steps: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run has all its steps."""
        return self.step >= self.total_steps or self.data_step >= self.total_data_steps

    @property
    def predicting(self) -> bool:
        """Whether the learned predictor is being trained, and not the network that refines it."""
        return self.step < self.predictor_steps

    @property
    def phase_step(self) -> int:
        """Steps done of what the last step changed: of the predictor, or of what refines it."""
        return self.step - (self.predictor_steps if self.step > self.predictor_steps else 0)

    @property
    def trained_part(self) -> nn.Module:
        """What the present step changes."""
        return self.model.predictor if self.predicting else self.model

    def plan_steps(self, args: argparse.Namespace, epoch_steps: int) -> None:
        """Decide how far the run goes and along which learning rates, from where it stands now."""
        self.total_data_steps = self.data_step + 2 if args.dry_run else args.epochs * epoch_steps
        # steps and data steps differ once a run went on with other clips per step: the latter say what is left
        self.total_steps = self.step + max(0, self.total_data_steps - self.data_step)
        if args.max_steps and not args.dry_run:
            self.total_steps = min(self.total_steps, args.max_steps)
        if self.predictor_steps >= max(1, self.total_steps) and not self.finished:
            steps = f"the {self.total_steps} steps of the run, as refining needs some; more --epochs make it longer"
            raise ValueError(f"--predictor_steps must be below {steps} (got {self.predictor_steps})")
        self.plan_lr(args, self.lr_schedule)

    def plan_lr(self, args: argparse.Namespace, stored: dict[str, float]) -> None:
        """Decide the learning rates of what is trained now, from `stored` if it has begun, to its last step."""
        lr, first, total = args.lr, self.predictor_steps, self.total_steps
        if self.predicting:
            lr, first, total = args.predictor_lr, 0, self.predictor_steps
        self.lr_schedule = make_lr_schedule(lr, args.warmup_steps, total, self.step, stored, first)

    def wrap_trained_part(self, device: torch.device) -> None:
        """Make `ddp_model` of what is trained now, the only part that needs gradients."""
        if self.model.predictor is not None:
            self.model.predictor.requires_grad_(self.predicting)
        self.ddp_model = wrap_ddp(self.trained_part, device)

    def begin_refining(self, args: argparse.Namespace, device: torch.device) -> None:
        """Fix the predictor at its EMA, as which it is sampled from, and begin to train the network around it."""
        self.model.predictor.load_state_dict(self.ema.predictor.state_dict())
        self.best_val_loss, self.probe_batch = math.inf, None  # of another loss
        self.plan_lr(args, {})
        self.wrap_trained_part(device)
        if is_main():
            tqdm.write(f"step {self.step}: the predictor is trained; refining begins")


def divergence_threshold(noise_offset: float, temporal_loss_weight: float, residual_scale: float | str = 1.0) -> float:
    """The loss above which training counts as diverged: ten times the most that predicting 0 can have.

    v has at most the variance of eps, as clips lie in [-1, 1]; frame differences of natural clips are below 1.
    Residuals are 1 / scale times as large; in measured or expected units they are near 1, as is the predictor's loss.
    """
    larger = residual_scale**-2 if isinstance(residual_scale, float) else 1.0
    return DIVERGED * (1 + noise_offset**2 + temporal_loss_weight) * max(1.0, larger)


def get_lr(step: int, schedule: Mapping[str, float]) -> float:
    """Linear warm-up from start_step, then half a cosine from start_lr to zero at total_steps."""
    start, warmup = schedule["start_step"], schedule["warmup_steps"]
    if start <= step < start + warmup:
        return schedule["start_lr"] * (step - start + 1) / warmup
    share = (step - start - warmup) / max(1, schedule["total_steps"] - start - warmup)
    return schedule["start_lr"] * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def make_lr_schedule(
    lr: float, warmup_steps: int, total_steps: int, step: int, stored: dict, first_step: int = 0
) -> dict[str, float]:
    """The schedule of `get_lr`. A resumed run whose length changed bends the curve from where it is: no jump."""
    fresh = {"peak_lr": lr, "start_lr": lr, "start_step": first_step}
    fresh |= {"warmup_steps": warmup_steps, "total_steps": total_steps}
    if not stored:
        return fresh
    if lr != stored["peak_lr"]:
        return fresh | {"start_step": step, "warmup_steps": 0}
    if total_steps == stored["total_steps"] or step < stored["start_step"] + stored["warmup_steps"]:
        return stored | {"total_steps": total_steps}
    if step >= stored["total_steps"]:
        print0("the learning rate has decayed to 0 with the former end of the run; give another --lr to train on")
    return fresh | {"start_step": step, "start_lr": get_lr(step, stored), "warmup_steps": 0}


def model_config_of(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `build_model`."""
    names = ("base_channels", "channel_mults", "res_blocks", "temporal_attn_levels", "endpoint_context")
    config = {"image_channels": 1 if args.color_mode == "gray" else 3, **{name: getattr(args, name) for name in names}}
    config |= {"timed": True} if is_timed(args) else {}
    return config | ({"predictor_width": args.predictor_width} if args.predictor == "learned" else {})


def init_state(
    args: argparse.Namespace,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    weights: Mapping[str, Tensor] | None = None,
) -> TrainingState:
    """The weights given (ValueError if they do not fit), or fresh ones by the seed; their EMA copy and an optimiser."""
    config = model_config_of(args)
    torch.manual_seed(generator_for(args.seed, INIT).initial_seed())
    model = build_model(config)
    if weights:
        load_weights(model, weights, args.init)
    model = model.to(device).set_memory_format(args.channels_last)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    model.activation_checkpointing = args.activation_checkpointing
    optimizer = make_optimizer(model, args.optimizer, args.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype == torch.float16)
    threshold = divergence_threshold(args.noise_offset, args.temporal_loss_weight, args.residual_scale)
    alone = args.predictor_steps if args.predictor == "learned" else 0
    parts = (model.train(), model, ema, optimizer, scaler, TrainMetrics(device, threshold))
    return TrainingState(*parts, alone, args.residual_scale)


def make_optimizer(model: nn.Module, name: str, lr: float) -> torch.optim.AdamW:
    """The optimiser of all parameters of a network, "adamw" or "muon"."""
    return Muon(model, lr) if name == "muon" else torch.optim.AdamW(model.parameters(), lr=lr, fused=True)


def to_checkpoint(state: TrainingState, args: argparse.Namespace, epoch_steps: int) -> dict[str, Any]:
    """What `restore` and sampling read: training goes on exactly, and sampling needs no flag."""
    epoch, step_in_epoch = divmod(state.data_step, epoch_steps)
    diffusion = {"timesteps": args.timesteps, "schedule": args.beta_schedule, "noise_offset": args.noise_offset}
    diffusion |= {"noise_correlation": args.noise_correlation}
    diffusion |= {"predictor": args.predictor, "residual_scale": state.residual_scale}
    modules = {"model": state.model, "ema": state.ema, "optimizer": state.optimizer, "scaler": state.scaler}
    return {
        "step": state.step,
        "epoch": epoch,
        "step_in_epoch": step_in_epoch,
        **{name: module.state_dict() for name, module in modules.items()},
        "lr_scheduler": state.lr_schedule,
        "rng": {"torch": torch.get_rng_state()},  # for completeness: every draw of ours has a generator of its own
        "model_config": model_config_of(args),
        "diffusion_config": diffusion,
        "clip_config": clip_config_of(args),
        "args": {name: value for name, value in vars(args).items() if name not in UNSAVED_FLAGS},
        "history": state.history,
        "best_val_loss": state.best_val_loss,
    }


def restore(
    state: TrainingState, checkpoint: dict[str, Any], clips_per_step: int, epoch_steps: int, source: object
) -> None:
    """Go on where a checkpoint (of `load_latest`, its file `source`) stands.

    With another number of clips per step (batch size, processes) at the same clip of the epoch.
    """
    load_weights(state.model, checkpoint["model"], source)
    load_weights(state.ema, checkpoint["ema"], source)
    ours = state.optimizer.state_dict()["param_groups"]  # settings are this command's, moments the checkpoint's
    state.optimizer.load_state_dict({"state": checkpoint["optimizer"]["state"], "param_groups": ours})
    for parameter, moments in state.optimizer.state.items():  # a run of another memory layout may have saved them
        for name in moments.keys() - {"step"}:
            moments[name] = torch.empty_like(parameter).copy_(moments[name])
    if checkpoint["scaler"]:  # that of a run without fp16 is empty
        state.scaler.load_state_dict(checkpoint["scaler"])
    stored = checkpoint["args"]
    stored_clips_per_step = stored["batch_size"] * stored["grad_accum"] * (stored.get("processes") or 1)
    step_in_epoch = checkpoint["step_in_epoch"] * stored_clips_per_step // clips_per_step
    state.step = checkpoint["step"]
    state.data_step = checkpoint["epoch"] * epoch_steps + min(step_in_epoch, epoch_steps)
    state.best_val_loss, state.history = checkpoint["best_val_loss"], checkpoint["history"]
    sums = [float(state.history["sums"].get(name) or 0) for name in TrainMetrics.NAMES]
    state.metrics.values = state.metrics.values.new_tensor(sums)
    state.lr_schedule = checkpoint["lr_scheduler"]
    state.residual_scale = checkpoint["diffusion_config"].get("residual_scale", 1.0)
    torch.set_rng_state(checkpoint["rng"]["torch"])


def check_resumable(checkpoint: dict[str, Any], source: object) -> None:
    """Refuse weights, moments, scaler or random state that do not fit the checkpoint's model_config.

    Raises: ValueError: naming the file.
    """
    for name in ("model", "ema"):  # a network each, as a "meta" one takes the tensors themselves
        try:
            model = build_model(checkpoint["model_config"], "meta")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        load_weights(model, checkpoint[name], source)
    moments = checkpoint["optimizer"]["state"]
    groups = make_optimizer(model, checkpoint["args"].get("optimizer", "adamw"), 1.0).param_groups
    kinds = [{"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum"}]  # of AdamW, and of Muon's matrices
    parameters = [(p, kind) for group, kind in zip(groups, kinds, strict=False) for p in group["params"]]
    sound = all(type(number) is int and 0 <= number < len(parameters) for number in moments)
    for number, entry in moments.items() if sound else ():
        parameter, kind = parameters[number]
        sound = sound and isinstance(entry, dict) and set(entry) == kind
        sound = sound and all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in entry.values())
        sound = sound and all(entry[name].shape == (() if name == "step" else parameter.shape) for name in kind)
    if not sound:
        raise ValueError(f"{source}: the optimizer's state does not fit its model_config")
    known = set(torch.amp.GradScaler("cpu").state_dict())
    if checkpoint["scaler"] and set(checkpoint["scaler"]) != known:
        raise ValueError(f"{source}: scaler must hold {', '.join(sorted(known))}")
    rng = checkpoint["rng"]["torch"]
    if rng.dtype != torch.uint8 or rng.shape != torch.get_rng_state().shape:
        raise ValueError(f"{source}: rng.torch must be a state of torch's generator")


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, over all parameters at once."""
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)


def loss_per_clip(
    state: TrainingState, network: nn.Module, schedule: DiffusionSchedule, inputs: tuple[Tensor, ...], weight: float
) -> Tensor:
    """The loss [B] of what is being trained, `network` being its module: the predictor, or the model that refines it.

    `inputs` are the arguments of `predictor_loss`, or of `diffusion_loss`; `weight` is that of its temporal term.
    """
    if state.predicting:
        return predictor_loss(network, *inputs)
    return diffusion_loss(network, schedule, *inputs, weight)


@torch.no_grad()
def probe_loss(state: TrainingState, schedule: DiffusionSchedule, weight: float, dtype: torch.dtype | None) -> float:
    """The loss of the first batch since the start (of refining) under the present weights, 0 before the first step.

    The host waits for it.
    """
    if state.probe_batch is None:
        return 0.0
    with autocast(state.metrics.values.device, dtype):
        # not called by its name: torch.compile would make another version, without gradients
        loss = loss_per_clip(state, state.trained_part.forward, schedule, state.probe_batch, weight)
    return loss.mean().item()
