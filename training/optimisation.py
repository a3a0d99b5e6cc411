"""One optimiser step and what belongs to it: learning rate, precision, running sums, EMA.

Nothing here waits for the device: losses and norms are summed where they are computed and read when a line is written.
"""

import argparse
import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from diffusion.loss import diffusion_loss, drop_contexts, sample_training_noise
from diffusion.noise import TRAIN, generator_for
from diffusion.schedule import DiffusionSchedule
from training.state import TrainingState
from utils import distributed
from utils.video_utils import split_clip


def learning_rate(step: int, plan: dict[str, float]) -> float:
    """Linear warm-up, then half a cosine from (start_step, start_lr) to zero at total_steps."""
    if step < plan["warmup_steps"]:
        return plan["start_lr"] * (step + 1) / plan["warmup_steps"]
    start = max(plan["start_step"], plan["warmup_steps"])
    share = (step - start) / max(1, plan["total_steps"] - start)
    return plan["start_lr"] * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def plan_learning_rate(
    args: argparse.Namespace, total_steps: int, step: int, stored: dict[str, float] | None
) -> dict[str, float]:
    """The plan of `learning_rate`. A resumed run whose length changed bends the curve from where it is: no jump."""
    fresh = {
        "peak_lr": args.lr, "start_lr": args.lr, "start_step": 0, "warmup_steps": args.warmup_steps,
        "total_steps": total_steps,
    }  # fmt: skip
    if stored is None:
        return fresh
    if args.lr != stored["peak_lr"]:
        return fresh | {"start_step": step, "warmup_steps": 0}
    if total_steps == stored["total_steps"] or step < stored["warmup_steps"]:
        return stored | {"total_steps": total_steps}
    if step >= stored["total_steps"]:
        print("the learning rate has decayed to 0 with the former end of the run; give another --lr to train on")
    return fresh | {"start_step": step, "start_lr": learning_rate(step, stored), "warmup_steps": 0}


def choose_amp_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype | None:
    """What the network computes in under autocast; None = float32. bf16 on a CPU can be hundreds of times slower."""
    if not args.amp or device.type != "cuda":
        return None
    if args.amp_dtype == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[args.amp_dtype]


def use_fast_kernels(device: torch.device) -> None:
    """On CUDA: let cuDNN choose its algorithms by trying, and float32 matrix products use TF32."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """The network's precision: autocast to dtype, or plain float32 for None."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


def optimise(
    state: TrainingState,
    schedule: DiffusionSchedule,
    batches: Iterator[Tensor],
    args: argparse.Namespace,
    amp_dtype: torch.dtype | None,
) -> None:
    """One optimiser step over --grad_accum batches of every process.

    Where the loss or the gradient norm is not finite, weights and moments stay as they were, and the tally counts a
    skipped step.
    """
    device = state.tally.values.device
    generator = generator_for(args.seed, TRAIN, state.position, device=device)
    part = (distributed.rank(), distributed.world_size())
    total = torch.zeros((), device=device)
    for number in range(1, args.grad_accum + 1):
        start, middle, end = split_clip(next(batches), args.endpoint_context)
        noise = sample_training_noise(middle, args.timesteps, generator, args.cfg_drop_prob, args.noise_offset, part)
        start, end = drop_contexts(start, end, noise.dropped)
        inputs = (start, middle, end, noise.t, noise.eps)
        state.trial = state.trial or inputs
        whole = number == args.grad_accum
        with contextlib.nullcontext() if whole else distributed.without_averaging(state.parallel):
            with autocast(device, amp_dtype):
                terms = diffusion_loss(state.parallel, schedule, *inputs, args.temporal_loss_weight)
            loss = terms.total.mean() / args.grad_accum
            state.scaler.scale(loss).backward()
        total += loss.detach()
    total = distributed.mean(total)
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), args.grad_clip or math.inf)

    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, state.plan)
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        # where this is 1, the fused step changes nothing
        state.optimizer.found_inf = (total.isfinite() & norm.isfinite()).logical_not().float()
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.tally.add(total, norm)
    state.position += 1
    state.step += 1
    update_ema(state.ema, state.model, args.ema_decay if state.step > args.ema_update_after_step else 0.0)


@torch.no_grad()
def trial_loss(
    state: TrainingState, schedule: DiffusionSchedule, args: argparse.Namespace, amp_dtype: torch.dtype | None
) -> float:
    """The loss of the first batch since the start under the weights as they are now: are they sound?

    0 before the first step. The host waits for the device.
    """
    if state.trial is None:
        return 0.0
    with autocast(state.tally.values.device, amp_dtype):
        # not called by its name: torch.compile would make another version, without gradients
        terms = diffusion_loss(state.model.forward, schedule, *state.trial, args.temporal_loss_weight)
    return terms.total.mean().item()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * model, over all parameters at once."""
    get_ema_multi_avg_fn(decay)(list(ema.parameters()), list(model.parameters()), None)
