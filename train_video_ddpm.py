"""Train the middle-frame diffusion model on a folder of MP4 clips, or on built-in clips when none is given.

The first and last K frames of a clip are given, those between are learned. Stop with Ctrl-C at any time; the same
command with --resume goes on from there.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import (
    DecodedFrames,
    ReadFailures,
    ResumableBatchSampler,
    VideoClipDataset,
    collate,
    steps_per_epoch,
)
from data.synthetic_videos import make_synthetic_videos
from data.video_index import clip_span, prepare_videos
from diffusion.loss import drop_contexts, sample_training_noise
from diffusion.noise import SHAPE, TRAIN, NoiseConfig, generator_for
from diffusion.pipeline import PREDICTORS, MiddleFramePipeline, resolve_scale
from diffusion.schedule import SCHEDULES, DiffusionSchedule
from models.video_unet3d import build_model, check_size
from training.checkpointer import Checkpointer, load_latest, make_out_dir
from training.clip_shapes import clip_config_of, cut_clips, is_timed, window_length
from training.logger import Logger, describe_run
from training.presets import FIXED_FLAGS, INHERITED_FLAGS, TRAIN_PRESETS
from training.state import (
    TrainingState,
    get_lr,
    init_state,
    loss_per_clip,
    model_config_of,
    probe_loss,
    restore,
    to_checkpoint,
    update_ema,
)
from training.trackers import TRACKERS, check_logger, open_tracker
from training.validation import measure_scale, preview, validate
from utils import distributed, flags
from utils.checkpoint import load_checkpoint
from utils.device import autocast, choose_amp_dtype, explain_oom, resolve_device
from utils.distributed import Silent, StopRequest, print0
from utils.flags import Parser, integer_up_to, non_negative_float, non_negative_int, positive_int, switch
from utils.interpolators import missing_package
from utils.video_utils import as_pair, middle_length

PREVIEW_CLIPS = 8
SCALE_CLIPS = 64  # training clips to measure a residual scale on, at most
OOM_REMEDY = "--batch_size (and raise --grad_accum), --size or --T, or pass --activation_checkpointing"


# --- flags ------------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Every flag, with the reference design's defaults."""
    parser = Parser(__doc__)

    add = parser.add_argument_group("run").add_argument
    add("--out_dir", type=flags.nonempty_path, default="outputs/train", help="folder of checkpoints and records")
    add("--resume", action="store_true", help="go on from last.pt in --out_dir; flags given override its arguments")
    values = "values of flags not given: refine = predict and refine; demo = that in five CPU minutes"
    add("--preset", choices=sorted(TRAIN_PRESETS), help=values)
    add("--init", type=flags.nonempty_path, help="checkpoint to start from: its network, clips, EMA; None = fresh")
    add("--dry_run", action="store_true", help="two steps, validation, preview and save, in --out_dir/dry_run")
    add("--seed", type=flags.seed_int, default=42, help="seed of split, weights, windows and noise")
    add("--device", type=flags.device_name, default="auto", help="auto = cuda where there is one, then mps, then cpu")

    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=flags.nonempty_path, help="folder of MP4 files; None = built-in clips, rendered once")
    add("--val_ratio", type=flags.fraction, default=0.01, help="share of files held out, unless folders split them")
    most = "use at most so many files in all; None = every file"
    add("--max_videos", type=integer_up_to(2**31 - 1, low=2), help=most)
    add("--num_workers", type=non_negative_int, default=4, help="loading processes; 0 = load in the main one")
    add("--cache_videos", **switch(False), help="decode every video once into a memory-mapped file in --cache_dir")
    add("--cache_dir", type=flags.nonempty_path, default="outputs/cache", help="folder of file index and cached frames")
    add("--hflip", **switch(False), help="mirror half of the training clips")
    add("--time_reverse", **switch(False), help="play half of the training clips backwards, which swaps their contexts")

    add = parser.add_argument_group("clip").add_argument
    length = "frames per clip, above 2 * K; two numbers = any length from the first to the second"
    add("--T", dest="num_frames", **flags.one_or_two("T"), default=8, help=length)
    add("--endpoint_context", type=integer_up_to(4096), default=2, help="observed frames K at each end")
    add("--size", **flags.one_or_two("PIXELS"), default=64, help="side of squares in pixels, or height and width")
    stride = "source frames between neighbouring clip frames; two numbers = any from the first to the second"
    add("--frame_stride", **flags.one_or_two("N"), default=1, help=stride)
    add("--color_mode", choices=("rgb", "gray"), default="rgb", help="3 channels or 1")

    add = parser.add_argument_group("model").add_argument
    add("--base_channels", type=positive_int, default=96, help="width of level 0, a multiple of 4, best 3 * 2^n")
    add("--channel_mults", type=positive_int, nargs="+", default=[1, 2, 4], help="level widths in --base_channels")
    add("--res_blocks", type=positive_int, default=2, help="residual blocks per level and direction")
    levels = "levels with temporal attention, 0 = full size; the bottleneck always has it"
    add("--temporal_attn_levels", type=non_negative_int, nargs="*", default=[1, 2], help=levels)

    add = parser.add_argument_group("diffusion").add_argument
    add("--timesteps", type=integer_up_to(100_000), default=1000, help="length of the noise schedule")
    add("--beta_schedule", choices=SCHEDULES, default="cosine", help="shape of the noise schedule")
    drop = "chance of zeroing both contexts of a clip, so guidance has an unconditional branch; 0 = never"
    add("--cfg_drop_prob", type=flags.probability, default=0.08, metavar="P", help=drop)
    add("--temporal_loss_weight", type=non_negative_float, default=0.05, help="weight of the L1 on frame differences")
    offset = "deviation of a constant added to the noise per clip and channel; 0 = none"
    up_to_100 = flags.ranged(float, "a number in [0, 100]", lambda value: 0 <= value <= 100)
    add("--noise_offset", type=up_to_100, default=0.0, help=offset)
    correlation = "what noise has in common with its neighbours in time, height, width and colour; 0 = white noise"
    add("--noise_correlation", type=flags.decay, default=0.0, help=correlation)

    add = parser.add_argument_group("predict and refine").add_argument
    guess = "what guesses the middle, so that diffusion refines the guess; flow and rife need optional packages"
    add("--predictor", choices=PREDICTORS, default="none", help=guess)
    scale = "of residuals: a number, measured = their deviation, pixel = what the learned predictor expects; None = one"
    add("--residual_scale", type=flags.residual_scale, help=f"{scale} of these two")
    alone = "optimiser steps in which the learned predictor is trained, before refining it begins"
    add("--predictor_steps", type=non_negative_int, default=4000, help=alone)
    add("--predictor_lr", type=flags.positive_float, default=2e-3, help="peak learning rate of those steps")
    add("--predictor_width", type=positive_int, default=32, help="channels of the learned predictor at full size")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=integer_up_to(4096), default=8, help="clips per forward of each process; lower it on OOM")
    add("--grad_accum", type=integer_up_to(4096), default=1, help="forward passes per optimiser step")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon is for matrices, adamw for the rest")
    add("--lr", type=flags.positive_float, default=1e-4, help="peak learning rate, cosine to 0")
    add("--warmup_steps", type=non_negative_int, default=0, help="steps of linear rise; 0 = none")
    add("--epochs", type=positive_int, default=30, help="passes over the training clips")
    add("--max_steps", type=non_negative_int, default=0, help="stop after so many optimiser steps; 0 = by --epochs")
    add("--grad_clip", type=non_negative_float, default=1.0, help="largest gradient norm; 0 = no clipping")
    add("--ema_decay", type=flags.decay, default=0.999, help="EMA decay per optimiser step")
    add("--ema_update_after_step", type=non_negative_int, default=100, help="steps for which EMA copies the weights")
    add("--amp", **switch(True), help="autocast the network on CUDA; does nothing elsewhere")
    add("--amp_dtype", choices=("auto", "bf16", "fp16"), default="auto", help="auto = bf16 where the GPU has it")
    add("--channels_last", **switch(None), help="channels innermost in memory; None = on a CPU, where it is faster")
    add("--activation_checkpointing", **switch(False), help="recompute activations: less memory, a third more work")
    add("--compile", **switch(False), help="torch.compile the training forward")

    add = parser.add_argument_group("validation and previews").add_argument
    add("--vis_every", type=non_negative_int, default=1, help="epochs between previews; 0 = none")
    add("--vis_guidance_scale", type=non_negative_float, default=1.5, help="guidance of previews; 1 = conditional")
    add("--vis_steps", type=positive_int, default=40, help="sampler steps of a preview")
    add("--dynamic_threshold", **switch(False), help="previews scale clean predictions by a percentile, not clip them")

    add = parser.add_argument_group("output").add_argument
    add("--log_every", type=positive_int, default=20, help="steps between lines of metrics.jsonl")
    add("--save_every", type=non_negative_int, default=0, help="steps between saves of last.pt; 0 = once an epoch")
    add("--save_minutes", type=non_negative_float, default=0.0, help="minutes between saves of last.pt; 0 = none")
    for flag, name in (("--tensorboard", "tensorboard"), ("--no-tensorboard", "none")):
        add(flag, dest="logger", action="store_const", const=name, default="none", help=f"the same as --logger {name}")
    add("--logger", choices=("none", *TRACKERS), default="none", help="package that also gets numbers and previews")
    add("--log_dir", help="folder of TensorBoard's or wandb's files; None = below --out_dir")
    return parser


def resolve_args(
    parser: Parser, argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, Any] | None, Path | None]:
    """What the run will be: flags given, over the checkpoint's on --resume, over the preset's, over the defaults.

    Returns: the arguments, and the checkpoint to go on from with its file; without a file its weights alone are to be
        started from (--init), and both are None for a fresh run.
    Raises: ValueError: for a missing or present last.pt, or a flag that contradicts the checkpoint or another flag.
    """
    given = parser.parse_given(argv)
    defaults = vars(parser.defaults())
    values = defaults | TRAIN_PRESETS.get(given.get("preset"), {})
    former = {name: defaults[name] for name in FIXED_FLAGS}  # of checkpoints from before there was such a flag
    folder = Path(given.get("out_dir", values["out_dir"]))
    there = [path for path in (folder / "last.pt", folder / "prev.pt") if path.exists()]
    checkpoint = source = None
    if given.get("resume"):
        if not there:
            raise ValueError(f"--resume: there is no {folder / 'last.pt'}; without --resume a new run starts")
        checkpoint, source = load_latest(folder)
        stored = former | parser.parse_stored(checkpoint["args"], source)
        for name, value in given.items():
            was, flag = stored.get(name), "T" if name == "num_frames" else name
            if name in FIXED_FLAGS and value != was:
                raise ValueError(f"--{flag} is fixed by {source} (got {value}, the checkpoint has {was})")
            if name in checkpoint["args"] and value != was:
                print0(f"--{flag} {value} overrides the checkpoint's {was}")
        values |= stored | {"out_dir": str(folder)}  # a run may have been moved
    elif there and not given.get("dry_run"):
        raise ValueError(f"--out_dir {folder} already holds a {there[0].name}; pass --resume or choose another folder")
    elif given.get("init"):
        checkpoint = load_checkpoint(given["init"])
        stored = former | parser.parse_stored(checkpoint["args"], given["init"])
        values |= {name: stored[name] for name in INHERITED_FLAGS}
    args = argparse.Namespace(**(values | given))

    # The rules that join several flags.
    config = model_config_of(args)
    if checkpoint and checkpoint["model_config"] != config:
        differing = sorted(name for name, value in checkpoint["model_config"].items() if config.get(name) != value)
        raise ValueError(f"{source or args.init}: its network is not that of the flags (they differ in {differing})")
    check_logger(args.logger)
    args.residual_scale = resolve_scale(args.predictor, args.residual_scale)
    if args.dry_run:  # of its two steps one is the predictor's
        args.predictor_steps = min(args.predictor_steps, 1)
    if args.predictor != "none" and args.dynamic_threshold:
        raise ValueError("--dynamic_threshold must be off with --predictor, whose residuals have no range")
    if (missing := missing_package(args.predictor)) is not None:
        raise ValueError(f"--predictor {args.predictor} cannot run here: {missing}")
    for name in ("num_frames", "frame_stride"):
        low, high = as_pair(getattr(args, name))
        if low > high:
            raise ValueError(f"--{'T' if name == 'num_frames' else name} must be two rising numbers (got {low} {high})")
    middle_length(as_pair(args.num_frames)[0], args.endpoint_context)
    build_model(config, "meta")  # refuses what cannot be built
    check_size(args.size, 2 ** len(args.channel_mults))
    if args.vis_every and args.vis_steps > args.timesteps:
        raise ValueError(f"--vis_steps must be at most --timesteps {args.timesteps} (got {args.vis_steps})")
    return args, checkpoint, source


# --- one step ---------------------------------------------------------------------------------------------------------


def train_step(
    state: TrainingState,
    pipe: MiddleFramePipeline,  # its prediction is what the network refines, in its schedule and noise
    batches: Iterator[Tensor],
    args: argparse.Namespace,
    amp_dtype: torch.dtype | None,
) -> None:
    """One optimiser step over --grad_accum batches of every process. Nothing in it waits for the device.

    Where the loss or the gradient norm is not finite, weights and moments stay as they were, and the metrics count a
    skipped step.
    """
    device = state.metrics.values.device
    generator = generator_for(args.seed, TRAIN, state.data_step, device=device)
    part = (distributed.rank(), distributed.world_size())
    trained, averaged = state.trained_part, state.ema.predictor if state.predicting else state.ema

    # Evaluate the loss and accumulate gradients.
    total_loss = torch.zeros((), device=device)
    for number in range(1, args.grad_accum + 1):
        shape = generator_for(args.seed, SHAPE, state.data_step, number)  # the same in every process
        start, middle, end = inputs = cut_clips(next(batches), args, shape)
        if not state.predicting:
            with autocast(device, amp_dtype):
                residual = pipe.predict(start, end, middle.shape[2]).to_residual(middle)
            drawn = (generator, args.cfg_drop_prob, pipe.noise, part)
            noise = sample_training_noise(middle, args.timesteps, *drawn)
            start, end = drop_contexts(start, end, noise.dropped)  # for the network: the prediction keeps them
            inputs = (start, residual, end, noise.t, noise.eps)
        state.probe_batch = state.probe_batch or inputs
        is_last = number == args.grad_accum
        with contextlib.nullcontext() if is_last else distributed.no_sync(state.ddp_model):
            with autocast(device, amp_dtype):
                losses = loss_per_clip(state, state.ddp_model, pipe.schedule, inputs, args.temporal_loss_weight)
            loss = losses.mean() / args.grad_accum
            state.scaler.scale(loss).backward()
        total_loss += loss.detach()
    total_loss = distributed.all_reduce_mean(total_loss)

    # Clip gradients and update weights.
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(trained.parameters(), args.grad_clip or math.inf)
    for group in state.optimizer.param_groups:
        group["lr"] = get_lr(state.step, state.lr_schedule)
    if state.scaler.is_enabled():
        state.scaler.step(state.optimizer)
        state.scaler.update()
    else:
        finite = total_loss.isfinite() & norm.isfinite()
        state.optimizer.found_inf = finite.logical_not().float()  # where this is 1, the fused step changes nothing
        if device.type != "mps" or finite:  # MPS's may not heed it
            state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)

    # Count the step and update EMA.
    state.metrics.add(total_loss, norm)
    state.data_step += 1
    state.step += 1
    update_ema(averaged, trained, args.ema_decay if state.phase_step > args.ema_update_after_step else 0.0)


# --- the story --------------------------------------------------------------------------------------------------------


def open_clips(args: argparse.Namespace) -> tuple[VideoClipDataset, VideoClipDataset]:
    """The training and the validation clips.

    Raises: ValueError: if there are none, or no room for the cache.
    """
    config, threads = clip_config_of(args), os.cpu_count() or 1
    span = clip_span(config["num_frames"], config["frame_stride"])
    root = args.data_root or make_synthetic_videos(args.cache_dir, threads)
    split = {"val_ratio": args.val_ratio, "seed": args.seed, "max_videos": args.max_videos}
    videos = prepare_videos(root, span=span, **split, cache_dir=args.cache_dir, workers=threads)
    if args.cache_videos:
        source = CachedFrames(sum(videos, []), args.size, args.color_mode, args.cache_dir, threads)
    else:
        source = DecodedFrames(args.size, args.color_mode)
    window = {"num_frames": config["num_frames"], "frame_stride": config["frame_stride"], "seed": args.seed}
    val_clips = VideoClipDataset(videos[1], source, random_window=False, **window)
    if is_timed(args):  # stretches of neighbouring frames, of which `cut_clips` takes some
        window |= {"num_frames": window_length(args, [video.info.frames for video in videos[0]]), "frame_stride": 1}
    augmentation = {"hflip": args.hflip, "time_reverse": args.time_reverse}
    return VideoClipDataset(videos[0], source, random_window=True, **window, **augmentation), val_clips


def train(args: argparse.Namespace, checkpoint: dict[str, Any] | None, source: Path | None) -> int:
    """Train to the end or a stop signal, from where the checkpoint of the file `source` stands; returns the status.

    Without a file, a checkpoint is one whose weights the run starts from.

    Raises: ValueError or OSError: for what the user can mend. FloatingPointError: if the loss is not finite or
        diverged. PeerLostError: if another process of the run is gone.
    """
    # Resolve device, precision and folder.
    device = distributed.init_distributed(resolve_device(args.device))
    args.processes = distributed.world_size()
    amp_dtype = choose_amp_dtype(device, args.amp_dtype) if args.amp else None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32
    out_dir = Path(args.out_dir) / "dry_run" if args.dry_run else Path(args.out_dir)
    if distributed.is_main():
        make_out_dir(out_dir, args.cache_dir, empty=args.dry_run)

    # Find the clips.
    train_clips, val_clips = distributed.main_process_first(partial(open_clips, args))
    distributed.check_consistency("--data_root: the files", train_clips.fingerprint() + val_clips.fingerprint())
    clips_per_step = args.batch_size * args.grad_accum * args.processes
    epoch_steps = steps_per_epoch(len(train_clips), clips_per_step)

    # Make network, optimiser and schedules, and go on where the checkpoint stands.
    state = init_state(args, device, amp_dtype, checkpoint["ema"] if checkpoint and not source else None)
    schedule = DiffusionSchedule(args.timesteps, args.beta_schedule).to(device)
    if source:
        restore(state, checkpoint, clips_per_step, epoch_steps, source)
    distributed.check_consistency(f"{source or out_dir}: the step", state.step)
    state.plan_steps(args, epoch_steps)
    if state.finished:
        print0(f"nothing to do: the run has all its {state.step} steps; more --epochs or --max_steps make it longer")
        return 0
    describe_run(args, state, f"{len(train_clips)} training and {len(val_clips)} validation clips", amp_dtype)
    if args.compile:
        for module in {state.model, state.trained_part}:
            module.compile(dynamic=False)  # in place: the state dict keeps its names
    state.wrap_trained_part(device)

    # Load clips ahead, in an order that any step can be resumed at.
    failures = ReadFailures(log=partial(tqdm.write, file=sys.stderr))  # every process reads other files
    workers = min(args.num_workers, max(1, (os.cpu_count() or 1) // distributed.local_world_size()))
    loading = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
    loading |= {"collate_fn": collate, "worker_init_fn": distributed.worker_init_fn}
    batch, part = (args.batch_size, args.grad_accum, args.seed), (distributed.rank(), args.processes)
    order = ResumableBatchSampler(len(train_clips), *batch, state.data_step, state.total_data_steps, part=part)
    batches = failures.clips(DataLoader(train_clips, batch_sampler=order, **loading), device)
    mine = distributed.rank_slice(len(val_clips))
    val_keys = [[(0, j) for j in mine[i : i + args.batch_size]] for i in range(0, len(mine), args.batch_size)]
    val_loader = DataLoader(val_clips, batch_sampler=val_keys, **loading)
    shown = range(0, len(val_clips), math.ceil(len(val_clips) / PREVIEW_CLIPS))
    first = distributed.rank_slice(len(shown)).start
    reads = [val_clips[0, shown[i]] for i in distributed.rank_slice(len(shown)) if args.vis_every or args.dry_run]
    preview_clips = next(failures.clips([collate(reads)], device)) if reads else None
    if state.residual_scale == "measured":
        chosen = range(0, len(train_clips), math.ceil(len(train_clips) / SCALE_CLIPS))
        clips = failures.clips((collate([train_clips[0, i]]) for i in chosen), device)
        parts = (cut_clips(clip, args, generator_for(args.seed, SHAPE, i)) for i, clip in enumerate(clips))
        state.residual_scale = measure_scale(parts, args.predictor, state.ema)
    refining = {"predictor": args.predictor, "residual_scale": state.residual_scale}
    noise = NoiseConfig(args.noise_offset, args.noise_correlation)
    pipe = MiddleFramePipeline(state.ema, schedule, clip_config_of(args), noise, amp_dtype, **refining)

    # Log and save on rank 0.
    logger, checkpointer = Silent(), Silent()
    if distributed.is_main():
        logger = Logger(out_dir, state, device, open_tracker(args, out_dir, state.step))
        contents = partial(to_checkpoint, state, args, epoch_steps)
        probe = partial(probe_loss, state, schedule, args.temporal_loss_weight, amp_dtype)
        last_is_whole = source is not None and source.name == "last.pt"
        checkpointer = Checkpointer(out_dir, last_is_whole, contents, probe, args.save_every, args.save_minutes)
    logger.log_run(vars(args))

    stop, stopped_by, saved = StopRequest(), 0, source
    try:
        while not (state.finished or stopped_by):
            train_step(state, pipe, batches, args, amp_dtype)
            if state.step == state.predictor_steps:
                state.begin_refining(args, device)
            logger.count_step(clips_per_step)

            # Log the steps since the last line: between saves, the only place that waits for the device.
            if state.step % args.log_every == 0 or state.step == 1:
                norm, loss = state.metrics.read()["grad_norm"], state.metrics.take_mean("line")
                if loss is not None:
                    state.history["train"].append([state.step, loss])
                logger.log_train(state, state.data_step / epoch_steps, loss, norm)

            # Validate and preview at the end of an epoch.
            stopped_by, due = distributed.all_reduce_max(stop.signal, bool(checkpointer.due(state.step)))
            epoch_ends = state.data_step % epoch_steps == 0 or state.finished
            if epoch_ends:
                epoch = math.ceil(state.data_step / epoch_steps)
                with autocast(device, amp_dtype):
                    held_out = failures.clips(val_loader, device)
                    val_loss = validate(state, pipe, held_out, len(val_clips), args)
                entry = {"step": state.step, "epoch": epoch, "train_loss": state.metrics.take_mean("epoch")}
                entry |= {"val_loss": val_loss, **state.metrics.bad_steps()}
                if args.dry_run or (args.vis_every and (epoch % args.vis_every == 0 or state.finished)):
                    log = partial(logger.log_preview, f"epoch_{epoch:04d}_sample", state.step, args.endpoint_context)
                    entry |= preview(pipe, preview_clips, first, 0 if state.predicting else args.vis_steps, args, log)
                state.history["epochs"].append(entry)
                logger.log_epoch(entry, args.epochs, state)

            # Save at the end of an epoch, when due, and before stopping: while our handlers stand, as another process's
            # signal may come to this one only now.
            if epoch_ends or due or stopped_by:
                state.history["sums"] = state.metrics.read()  # in every process, so that a lost run ends in all of them
                if epoch_ends:
                    checkpointer.save_best(state, val_loss)
                if checkpointer.save_last(state) is not False:
                    saved = out_dir / "last.pt"
                logger.restart_clock()
    except FloatingPointError as error:
        good = f"the last good checkpoint is {saved}" if saved and saved.is_file() else "no checkpoint was saved yet"
        good = f"; {good}" if distributed.is_main() else ""  # which alone knows
        raise FloatingPointError(f"after step {state.step}: {error}{good}") from error
    finally:
        logger.close()
        stop.restore()

    checkpointer.raise_failure()
    if state.finished:
        print0(f"done: {state.step} steps, {out_dir / 'last.pt'}")
        return 0
    command = distributed.launch_command("train_video_ddpm.py", "--out_dir", args.out_dir, "--resume")
    print0(f"stopped by {signal.Signals(stopped_by).name} after step {state.step}; go on with: {command}")
    return 128 + stopped_by


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0 = done, 1 = diverged or lost another process, 2 = wrong input, 128 + n = stopped by signal n.
    """
    parser = build_parser()
    resume = "--resume goes on from the last save"
    with parser.one_line_end("stopped at once, without saving"):
        try:
            with distributed.watch_peers(f"{resume}, if there is one"), explain_oom(OOM_REMEDY):
                status = train(*resolve_args(parser, argv))
                distributed.cleanup()
                return status
        except FloatingPointError as error:
            raise flags.BrokenRunError(str(error)) from error
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            reason = "too little memory for --num_workers, or a video that crashes its decoder"
            raise flags.BrokenRunError(f"a loading process was killed: {reason}; {resume}") from error
        finally:
            distributed.kill_loading_processes()


if __name__ == "__main__":
    sys.exit(main())
