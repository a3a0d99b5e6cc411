"""Clips per second of training, against the original design's step; memory, arithmetic rate and time to the first step.

    python benchmarks/bench_training.py --configuration demo

The reference step keeps torch's default memory layout, float frames normalised before the transfer, fp16 autocast where
the other uses bf16 (none on a CPU), unfused AdamW, an EMA updated parameter by parameter, and reads the loss twice.
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count, repeat
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_video_ddpm
from benchmarks import measure
from diffusion.loss import diffusion_loss, drop_contexts, sample_training_noise
from diffusion.noise import TRAIN, NoiseConfig, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import build_model
from training.clip_shapes import clip_config_of
from training.state import TrainingState, init_state, make_lr_schedule, model_config_of
from utils.device import autocast, choose_amp_dtype, resolve_device
from utils.flags import Parser, positive_int
from utils.video_utils import as_pair, middle_length, split_clip, to_float

WITHOUT_PREDICTOR = ["--predictor", "none", "--optimizer", "adamw"]
CONFIGURATIONS = {"demo": ["--preset", "demo", *WITHOUT_PREDICTOR], "default": []}
REFERENCE = "reference"
MATRIX = 8192  # rows of the matrix product that measures what the device can do


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to train").add_argument
    network = "network of the demo preset, or the default"
    add("--configuration", choices=tuple(CONFIGURATIONS), default="demo", help=network)
    add("--batch_sizes", type=positive_int, nargs="+", help="clips per step; None = the configuration's own")
    add("--compile", action="store_true", help="time torch.compile of ours, too")
    add("--memory", action="store_true", help="only the memory of a step, with and without --activation_checkpointing")
    first = "only the seconds from the start of train_video_ddpm.py --preset demo to its first optimiser step"
    add("--first_step", action="store_true", help=first)
    add("--T", dest="num_frames", type=positive_int, default=8, help="frames per clip of --memory")
    measure.add_common_flags(parser, rounds=5)
    return parser


def training_arguments(configuration: str, *flags: str) -> argparse.Namespace:
    """The arguments of a training run of that configuration."""
    argv = [*CONFIGURATIONS[configuration], "--dry_run", *flags]
    return train_video_ddpm.resolve_args(train_video_ddpm.build_parser(), argv)[0]


def random_clips(args: argparse.Namespace) -> Tensor:
    """A batch as a loading process hands it over: uint8 [B,C,T,H,W]."""
    channels = 1 if args.color_mode == "gray" else 3
    shape = (args.batch_size, channels, args.num_frames, *as_pair(args.size))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def our_step(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], None], TrainingState]:
    """A function that takes one optimiser step as train_video_ddpm.py does, and its state."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    amp_dtype = choose_amp_dtype(device, args.amp_dtype) if args.amp else None
    state = init_state(args, device, amp_dtype)
    state.lr_schedule = make_lr_schedule(args.lr, args.warmup_steps, total_steps=1000, step=0, stored={})
    schedule = DiffusionSchedule(args.timesteps, args.beta_schedule).to(device)
    clips = random_clips(args).pin_memory() if device.type == "cuda" else random_clips(args)
    batches = (to_float(batch.to(device, non_blocking=True)) for batch in repeat(clips))
    if args.compile:
        state.model.compile(dynamic=False)
    noise = NoiseConfig(args.noise_offset, args.noise_correlation)
    pipe = MiddleFramePipeline(state.ema, schedule, clip_config_of(args), noise)
    return lambda: train_video_ddpm.train_step(state, pipe, batches, args, amp_dtype), state


def original_step(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A function that takes one optimiser step the original's way, with our network, loss and noise."""
    amp_dtype = torch.float16 if device.type == "cuda" else None
    state = init_state(args, device, amp_dtype)
    model, ema = (network.set_memory_format(channels_last=False) for network in (state.model, state.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = DiffusionSchedule(args.timesteps, args.beta_schedule).to(device)
    clips, steps = random_clips(args), count()

    def step() -> None:
        start, middle, end = split_clip(to_float(clips).to(device), args.endpoint_context)
        generator = generator_for(args.seed, TRAIN, next(steps), device=device)
        config = NoiseConfig(args.noise_offset, args.noise_correlation)
        noise = sample_training_noise(middle, args.timesteps, generator, args.cfg_drop_prob, config)
        start, end = drop_contexts(start, end, noise.dropped)
        with autocast(device, amp_dtype):
            losses = diffusion_loss(model, schedule, start, middle, end, noise.t, noise.eps, args.temporal_loss_weight)
            loss = losses.mean()
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        state.scaler.step(optimizer)
        state.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.mul_(args.ema_decay).add_(parameter, alpha=1 - args.ema_decay)
        loss.item(), loss.item()  # once for the mean, once for the progress bar

    return step


def forward_flops(args: argparse.Namespace) -> int:
    """Floating-point operations of one forward of one clip, counted on tensors without data."""
    k, m = args.endpoint_context, middle_length(args.num_frames, args.endpoint_context)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(model_config_of(args))
        frames = torch.empty(1, model.image_channels, m + k, *as_pair(args.size))
        x_t, context = frames.split((m, k), dim=2)
        model(x_t, torch.zeros(1, dtype=torch.long), context, context)
    return counter.get_total_flops()


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large bf16 (on a CPU float32) matrix product: what the device can do at best."""
    on_gpu = device.type == "cuda"
    rows, repeats = (MATRIX, 10) if on_gpu else (MATRIX // 4, 2)
    a, b = torch.randn(2, rows, rows, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    seconds = [measure.seconds_of(lambda: [a @ b for _ in range(repeats)], device) for _ in range(6)]
    return 2 * rows**3 * repeats / min(seconds[1:])


def time_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Tables of clips per second, one for each batch size."""
    defaults = training_arguments(args.configuration)
    flops, best = forward_flops(defaults), matrix_rate(device)
    print(f"{flops / 1e9:.4g} GFLOP per clip forward, three times that per training step; ", end="")
    print(f"matrix products reach {best / 1e12:.4g} TFLOP/s on {device}")
    results: dict[str, Any] = {"forward_flops": flops, "matrix_flops_per_second": best}
    compared = ["", "--channels_last", "--no-channels_last", "--activation_checkpointing"]
    compared += ["--compile"] * args.compile
    for size in args.batch_sizes or [defaults.batch_size]:
        batch = ["--batch_size", str(size)]
        variants = {REFERENCE: original_step(training_arguments(args.configuration, *batch), device)}
        for flag in compared:
            settings = training_arguments(args.configuration, *batch, *flag.split())
            variants[f"ours, {flag}" if flag else "ours"] = our_step(settings, device)[0]
        rows = measure.compare(measure.interleave(variants, size, args.rounds, device), REFERENCE)
        for row in rows:
            row["share_of_matrix_rate"] = 3 * flops * row["clips_per_second"] / best
        title = f"{args.configuration} network, batch {size}, {device}, {torch.get_num_threads()} threads"
        measure.print_rows(title, rows)
        print(f"\nours runs at {rows[1]['share_of_matrix_rate']:.0%} of the matrix rate")
        results[f"batch {size}"] = rows
    return results


def rest_and_peak(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """MiB in use before a step, and the most during it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device) / 2**20
        step()
        return rest, torch.cuda.max_memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    rest = measure.resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step()
    return rest, measure.resident_mib("VmHWM")


def step_memory(args: argparse.Namespace, device: torch.device, *flags: str) -> dict[str, float]:
    """MiB of a step at batch 1: between steps, at most, and for activations.

    For the last, gradients are there before the step, as zeros: what comes on top is what both passes need.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    flags = ("--batch_size", "1", "--T", str(args.num_frames), *flags)
    step, state = our_step(training_arguments(args.configuration, *flags), device)
    step()  # AdamW makes its moments in the first one
    rest, peak = rest_and_peak(step, device)
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.add_(0)  # touched, so that it counts as used
    with_gradients, peak_with_gradients = rest_and_peak(step, device)
    return {"between_steps": rest, "peak": peak, "activations": peak_with_gradients - with_gradients}


def compare_memory(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Memory of a step at batch 1 with activations kept and with checkpointing, each in a process of its own."""
    results: dict[str, Any] = {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # there freed memory leaves the process at once: resident = in use
    print(f"\nmemory of one training step, {args.configuration} network, --T {args.num_frames}, batch 1, {device}\n")
    print("| activations | activations, MiB | between steps, MiB | peak, MiB |\n|---|---|---|---|")
    for name, flags in (("kept", ()), ("checkpointed", ("--activation_checkpointing",))):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            results[name] = pool.submit(step_memory, args, device, *flags).result()
        row = [f"{results[name][key]:.0f}" for key in ("activations", "between_steps", "peak")]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    for key, words in (("activations", "for activations"), ("peak", "in all")):
        results[f"saved_{key}"] = 1 - results["checkpointed"][key] / results["kept"][key]
        print(f"{results[f'saved_{key}']:.0%} less {words}")
    return results


def first_step(rounds: int) -> list[float]:
    """Seconds from starting the training script to its first optimiser step, in a fresh folder and then again."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", train_video_ddpm.__file__, *CONFIGURATIONS["demo"], "--max_steps", "1"]
        command += ["--vis_every", "0", "--cache_dir", f"{folder}/cache", "--out_dir"]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        for number in range(rounds):
            clock = time.perf_counter()
            with subprocess.Popen([*command, f"{folder}/{number}"], **streams) as run:
                if not any(line.startswith("step 1 ") for line in run.stdout):
                    raise ValueError(f"--first_step: {' '.join(run.args)} took no step")
                seconds.append(time.perf_counter() - clock)
                run.stdout.read()
            clips = "its clips found in the cache" if number else "its built-in clips rendered first"
            print(f"{seconds[-1]:.1f} s to the first optimiser step, {clips}", flush=True)
    return seconds


def benchmark(args: argparse.Namespace) -> None:
    """From flags to the tables asked for."""
    device = resolve_device(args.device)
    if args.memory:
        name, results = f"training_memory_T{args.num_frames}", compare_memory(args, device)
    elif args.first_step:
        name, results = "first_step", {"seconds": first_step(args.rounds)}
    else:
        name, results = f"training_{args.configuration}", time_steps(args, device)
    measure.save_results(args.out_dir, name, device, results)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    return measure.run_benchmark(build_parser(), benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
