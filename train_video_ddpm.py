"""Train the middle-frame diffusion model on a folder of video clips, or on built-in clips.

The first and last K frames of a clip are given, those between are learned. Stop with Ctrl-C at
any time; the same command with --resume goes on from there.
"""

import argparse
import contextlib
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from data.kinetics_video_dataset import ResumableBatchSampler, steps_per_epoch
from data.training_clips import ClipLoader, crop_to_length, open_clips
from diffusion.noise import LENGTH, TRAIN, generator_for
from diffusion.schedule import SCHEDULES
from training import distributed
from training.arguments import Start, plan_stages, resolve_stage
from training.checkpointer import Checkpointer, claim
from training.distributed import print0
from training.logger import Logger, describe_run
from training.objective import (
    Objective,
    build_network,
    compile_network,
    describe_objective,
    pick_objective,
)
from training.signals import StopRequest, end_loading_processes, name_dead_workers, worker_init_fn
from training.state import (
    TrainingState,
    get_lr,
    init_state,
    probe_loss,
    restore,
    to_checkpoint,
    update_ema,
)
from training.validation import make_preview, validate
from utils import flags
from utils.device import autocast, choose_amp_dtype, explain_oom, resolve_device, tune_kernels
from utils.flags import Parser, RunError, integer_up_to, non_negative_int, positive_int
from utils.video_utils import as_pair, split_clip

PREVIEW_CLIPS = 8
OOM_REMEDY = "--batch_size (and raise --grad_accum), --size or --T"

# Diffusion around a prediction: without guidance, as both of its branches would see the prediction.
REFINING = {
    "cfg_drop_prob": 0.0,
    "temporal_loss_weight": 0.0,
    "vis_steps": 2,
    "vis_guidance_scale": 1.0,
}
# A predictor is trained by regression, then diffusion learns what it misses; values from LOG.md.
PRESETS = {
    "refine": {
        "both": {
            "optimizer": "muon",
            "warmup_steps": 100,
            "ema_decay": 0.995,
        },
        "predictor": {
            "lr": 2e-3,
            "max_steps": 4000,
        },
        "diffusion": {
            **REFINING,
            "lr": 1e-3,
        },
    },
    # As `refine`, with a small network on 32x32 clips: some minutes of one CPU thread.
    "demo": {
        "both": {
            "out_dir": "outputs/demo",
            "size": 32,
            "cache_videos": True,
            "num_workers": 0,
            "optimizer": "muon",
            "lr": 2e-3,
            "warmup_steps": 50,
            "ema_decay": 0.99,
            "vis_every": 9,
            "log_every": 50,
        },
        "predictor": {
            "epochs": 50,
        },
        "diffusion": {
            **REFINING,
            "base_channels": 24,
            "channel_mults": [1, 2],
            "res_blocks": 1,
            "temporal_attn_levels": [1],
            "epochs": 12,
        },
    },
}


def build_parser() -> Parser:
    """Every flag, with the reference design's defaults."""
    parser = Parser(__doc__)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--out_dir", type=flags.nonempty_path, default="outputs/train", help="folder of the run")
    add("--resume", action="store_true", help="go on from last.pt in --out_dir")
    add("--preset", choices=PRESETS, help="train a predictor, then diffusion of what it misses")
    add("--dry_run", action="store_true", help="two steps, a preview, a save in --out_dir/dry_run")
    add("--seed", type=flags.seed_int, default=42, help="for split, weights, windows and noise")
    add("--device", type=flags.device_name, default="auto", help="auto = cuda, else mps, else cpu")

    add = parser.add_argument_group("objective").add_argument
    add("--train", choices=("diffusion", "predictor"), default="diffusion", help="what is learned")
    add("--predictor", type=flags.nonempty_path, help="checkpoint of the predictor to refine")

    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=flags.nonempty_path, help="folder of videos; None = built-in clips")
    add("--val_ratio", type=flags.fraction, default=0.01, help="share held out, if not by folders")
    add("--max_videos", type=integer_up_to(2**31 - 1, low=2), help="use this many; None = all")
    add("--num_workers", type=non_negative_int, default=4, help="loading processes; 0 = none")
    add("--cache_videos", action=switch, default=False, help="decode every video once, to disk")
    add("--cache_dir", type=flags.nonempty_path, default="outputs/cache", help="index and frames")

    add = parser.add_argument_group("clip").add_argument
    add("--T", dest="num_frames", **flags.one_or_two("T"), default=8, help="frames, or a range")
    add("--endpoint_context", type=positive_int, default=2, help="observed frames K at each end")
    add("--size", **flags.one_or_two("PIXELS"), default=64, help="side, or height and width")
    add("--frame_stride", type=integer_up_to(65536), default=1, help="source frames per clip frame")
    add("--color_mode", choices=("rgb", "gray"), default="rgb", help="3 channels or 1")

    add = parser.add_argument_group("model").add_argument
    add("--base_channels", type=positive_int, default=96, help="width of level 0; use 3 * 2^n")
    add("--channel_mults", type=positive_int, nargs="+", default=[1, 2, 4], help="level widths")
    add("--res_blocks", type=positive_int, default=2, help="per level, down and up")
    levels = {"type": non_negative_int, "nargs": "*", "default": [1, 2]}
    add("--temporal_attn_levels", **levels, help="levels with temporal attention, 0 = full size")

    add = parser.add_argument_group("diffusion").add_argument
    add("--timesteps", type=integer_up_to(100_000), default=1000, help="length of the schedule")
    add("--beta_schedule", choices=SCHEDULES, default="cosine", help="shape of the schedule")
    add("--cfg_drop_prob", type=flags.probability, default=0.08, help="chance of zeroed contexts")
    add("--temporal_loss_weight", type=flags.non_negative_float, default=0.05, help="of motion L1")
    add("--noise_offset", type=flags.probability, default=0.0, help="scale of a constant per clip")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=integer_up_to(4096), default=8, help="per process; lower it on OOM")
    add("--grad_accum", type=integer_up_to(4096), default=1, help="batches per optimiser step")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon is for matrices")
    add("--lr", type=flags.positive_float, default=1e-4, help="peak learning rate, cosine to 0")
    add("--warmup_steps", type=non_negative_int, default=0, help="steps of linear rise; 0 = none")
    add("--epochs", type=positive_int, default=30, help="passes over the training clips")
    add("--max_steps", type=non_negative_int, default=0, help="length in steps; 0 = by --epochs")
    add("--grad_clip", type=flags.non_negative_float, default=1.0, help="largest norm; 0 = none")
    add("--ema_decay", type=flags.decay, default=0.999, help="EMA decay per optimiser step")
    add("--ema_update_after_step", type=non_negative_int, default=100, help="steps without EMA")
    add("--amp", action=switch, default=True, help="bf16 or fp16 autocast on CUDA")
    add("--compile", action=switch, default=False, help="torch.compile the training forward")

    add = parser.add_argument_group("validation and previews").add_argument
    add("--vis_every", type=non_negative_int, default=1, help="epochs per preview; 0 = none")
    add("--vis_guidance_scale", type=flags.non_negative_float, default=1.5, help="of previews")
    add("--vis_steps", type=positive_int, default=40, help="sampler steps of previews")

    add = parser.add_argument_group("output").add_argument
    add("--log_every", type=positive_int, default=20, help="steps per line of metrics.jsonl")
    add("--save_every", type=non_negative_int, default=0, help="steps per save; 0 = per epoch")
    add("--tensorboard", action=switch, default=False, help="log to TensorBoard, too")
    return parser


# --- one step -------------------------------------------------------------------------------------


def train_step(
    state: TrainingState,
    objective: Objective,
    batches: Iterator[Tensor],
    args: argparse.Namespace,
    amp_dtype: torch.dtype | None,
) -> None:
    """One optimiser step over --grad_accum batches in every process.

    On CUDA it never waits for the device. Where the loss or the gradient norm is not finite,
    weights and moments stay as they were, and the metrics count a skipped step.
    """
    device = state.metrics.values.device
    generator = generator_for(args.seed, TRAIN, state.data_step, device=device)

    # Accumulate gradients over the batches of the step.
    total_loss = torch.zeros((), device=device)
    for number in range(1, args.grad_accum + 1):
        # All processes draw the same length.
        draw = generator_for(args.seed, LENGTH, state.data_step, number)
        clips = crop_to_length(next(batches), as_pair(args.num_frames), draw)
        start, middle, end = split_clip(clips, args.endpoint_context)
        if state.probe is None:  # the checkpointer compares losses of a saved model on it
            state.probe = (start, middle, end, state.data_step)
        # Average gradients across processes once, with the last batch.
        is_last = number == args.grad_accum
        with contextlib.nullcontext() if is_last else distributed.no_sync(state.ddp_model):
            with autocast(device, amp_dtype):
                losses = objective.loss(state.ddp_model, start, middle, end, generator)
            mean_loss = losses.mean() / args.grad_accum
            state.scaler.scale(mean_loss).backward()
        total_loss += mean_loss.detach()
    total_loss = distributed.all_reduce_mean(total_loss)

    # Clip the gradients and set the learning rate.
    state.scaler.unscale_(state.optimizer)
    max_norm = args.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)
    for group in state.optimizer.param_groups:
        group["lr"] = get_lr(state.step, args.lr, args.warmup_steps, state.total_steps)

    # Update the weights, unless a number is not finite; with float16 the scaler sees to that.
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        is_finite = total_loss.isfinite() & norm.isfinite()
        # The fused step changes nothing where found_inf is 1; that of MPS may ignore it.
        state.optimizer.found_inf = is_finite.logical_not().float()
        if device.type != "mps" or is_finite:
            state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)

    # Count the step and update EMA.
    state.metrics.add(total_loss, norm)
    state.data_step += 1
    state.step += 1
    is_averaging = state.step > args.ema_update_after_step
    update_ema(state.ema, state.model, decay=args.ema_decay if is_averaging else 0.0)


# --- a run ----------------------------------------------------------------------------------------


def train(start: Start) -> int:
    """Train from the current step to the end of the run, or to a stop signal.

    Returns: the exit status: 0, or 128 + the signal's number.
    Raises: FloatingPointError: if the loss is not finite or diverged.
    """
    args = start.args

    # Settle device and precision.
    device = distributed.init_distributed(resolve_device(args.device))
    args.processes = distributed.world_size()
    amp_dtype = choose_amp_dtype(device) if args.amp else None
    tune_kernels(device)
    out_dir = Path(args.out_dir)

    # Find the clips.
    prepare = partial(
        open_clips,
        data_root=args.data_root,
        num_frames=as_pair(args.num_frames)[1],
        frame_stride=args.frame_stride,
        size=args.size,
        color_mode=args.color_mode,
        val_ratio=args.val_ratio,
        max_videos=args.max_videos,
        seed=args.seed,
        cache_dir=args.cache_dir,
        cache_videos=args.cache_videos,
        log=print0,
    )
    train_clips, val_clips = distributed.main_process_first(prepare)
    distributed.check_consistency("--data_root: the files", train_clips.fingerprint())
    clips_per_step = args.batch_size * args.grad_accum * args.processes

    # Make network, optimiser and objective, and restore the checkpoint.
    state = init_state(args, build_network(args, device), device, amp_dtype)
    state.epoch_steps = steps_per_epoch(len(train_clips), clips_per_step)
    if start.checkpoint is not None:
        restore(state, start.checkpoint, clips_per_step, start.source)
    state.plan_steps(args)
    if state.finished and state.validated:
        print0(f"nothing to do: the run in {out_dir} has all its {state.step} steps")
        return 0
    objective = pick_objective(args, state.ema, start.predictor, len(val_clips), amp_dtype)
    describe_run(args, state, (len(train_clips), len(val_clips)), amp_dtype)
    if args.compile:
        compile_network(state.model, args.num_frames)

    # Load clips ahead, in an order that can be resumed at any step.
    order = ResumableBatchSampler(
        clips=len(train_clips),
        batch_size=args.batch_size,
        batches_per_step=args.grad_accum,
        seed=args.seed,
        first_step=state.data_step,
        last_step=state.data_step + state.total_steps - state.step,
        part=(distributed.rank(), args.processes),
    )
    loader = ClipLoader(
        train_clips,
        val_clips,
        order=order,
        held_out=distributed.rank_slice(len(val_clips)),
        device=device,
        batch_size=args.batch_size,
        workers=distributed.workers_per_process(args.num_workers),
        worker_init_fn=worker_init_fn,
        log=partial(print0, file=sys.stderr),
    )
    batches = name_dead_workers(loader.train())
    shown = distributed.rank_slice(min(PREVIEW_CLIPS, len(val_clips)))
    preview_clips = loader.read_evenly(shown, PREVIEW_CLIPS) if args.vis_every else None

    # Log and save on rank 0.
    logger = distributed.Silent()
    checkpointer = distributed.Silent()
    if distributed.is_main():
        logger = Logger(out_dir, state, device, args.tensorboard)
        configs = describe_objective(args, objective, start.predictor)
        checkpointer = Checkpointer(
            out_dir=out_dir,
            last_is_whole=start.source is not None and start.source.name == "last.pt",
            contents=partial(to_checkpoint, state, configs),
            probe_loss=partial(probe_loss, state, objective.loss, args.seed, amp_dtype),
        )
    logger.log_run(args)

    stop = StopRequest()
    stopped_by = 0
    try:
        while not stopped_by and not (state.finished and state.validated):
            # A run that was stopped during validation validates first.
            if state.validated or not state.at_epoch_end:
                train_step(state, objective, batches, args, amp_dtype)
                logger.count_step(clips_per_step)

                # Log. Between saves, only this waits for the device.
                if state.step % args.log_every == 0 or state.step == 1:
                    line_loss = state.metrics.take_mean("line")
                    if line_loss is not None:
                        state.history["train"].append([state.step, line_loss])
                    logger.log_train(state, line_loss)

            # At the end of an epoch: validate (all ranks participate).
            val_loss = None
            if state.at_epoch_end:
                with autocast(device, amp_dtype):
                    val_loss = validate(objective, state.ema, loader, stop)
            stopped_by = distributed.all_reduce_max(stop.signal)
            if val_loss is not None:
                entry = state.add_epoch(val_loss)

            # Save at the end of an epoch, when due, and before stopping.
            is_due = args.save_every > 0 and state.step % args.save_every == 0
            if state.at_epoch_end or stopped_by or is_due:
                state.history["sums"] = state.metrics.read()
                if val_loss is not None:
                    checkpointer.save_best(state, val_loss)
                checkpointer.save_last(state)
                logger.restart_clock()

            # Preview and log; if that fails the run goes on.
            if val_loss is not None:
                epoch = entry["epoch"]
                if args.vis_every and (epoch % args.vis_every == 0 or state.finished):
                    with logger.optional("preview"):
                        preview = make_preview(objective.pipe, preview_clips, shown.start, args)
                        entry.update(logger.log_preview(epoch, state.step, preview) or {})
                logger.log_epoch(entry, state)
    except FloatingPointError as error:
        raise FloatingPointError(f"{out_dir}, after step {state.step}: {error}") from error
    except (ValueError, OSError, RunError):
        # The data failed between two steps: save what was learned.
        if state.data_step > order.first_step:
            checkpointer.save_last(state)
            print0(f"after step {state.step}: --resume goes on from {out_dir}", file=sys.stderr)
        raise
    finally:
        logger.close()
        stop.restore()

    checkpointer.raise_failure()
    if state.finished and state.validated:
        print0(f"done: {state.step} steps, {out_dir / 'last.pt'}")
        return 0
    print0(f"stopped after step {state.step}; --resume with the same command goes on")
    return 128 + stopped_by


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0 = done, 1 = diverged or lost another process, 2 = wrong input, 128 + n = stopped by signal n.
    """
    parser = build_parser()
    with (
        parser.one_line_errors("stopped at once, without saving"),
        explain_oom(OOM_REMEDY),
        distributed.watch_peers(),
        end_loading_processes(),
    ):
        for stage in plan_stages(parser, argv, PRESETS):
            with claim(stage.out_dir):
                status = train(resolve_stage(parser, stage))
            if status:
                break
        distributed.cleanup()
    return status


if __name__ == "__main__":
    sys.exit(main())
