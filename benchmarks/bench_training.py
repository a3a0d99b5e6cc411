"""Clips per second of training, against the original design's step; memory, arithmetic rate and time to the first step.

    python benchmarks/bench_training.py --configuration demo

The reference step keeps torch's default memory layout, float frames normalised before the transfer, fp16 autocast where
the other uses bf16 (none on a CPU), unfused AdamW, an EMA updated parameter by parameter, and reads the loss twice.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training.optimisation import autocast, choose_amp_dtype, optimise, plan_learning_rate, use_fast_kernels

import train_video_ddpm
from benchmarks.measure import (
    Variant,
    add_common_flags,
    compare,
    interleave,
    print_rows,
    resident_mib,
    save_findings,
    seconds_of,
)
from diffusion.loss import diffusion_loss, drop_contexts, sample_training_noise
from diffusion.noise import TRAIN, generator_for
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import build_model
from training.state import TrainingState, model_config_of, new_state
from utils.flags import Parser, positive_int, resolve_device
from utils.video_utils import split_clip, to_float

CONFIGURATIONS = {"demo": ["--preset", "demo"], "default": []}
REFERENCE = "reference"
MATRIX = 8192  # rows of the matrix product that measures what the device can do


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("what to train")
    group.add_argument(
        "--configuration",
        choices=tuple(CONFIGURATIONS),
        default="demo",
        help="the demo preset's network, or the default",
    )
    group.add_argument(
        "--batch_sizes", type=positive_int, nargs="+", help="clips per step; None = the configuration's own"
    )
    group.add_argument("--compile", action="store_true", help="time torch.compile of ours, too")
    group.add_argument(
        "--memory", action="store_true",
        help="only the memory of one step, with and without --activation_checkpointing, each in its own process",
    )  # fmt: skip
    group.add_argument(
        "--first_step", action="store_true",
        help="only the seconds from the start of train_video_ddpm.py --preset demo to its first optimiser step",
    )  # fmt: skip
    group.add_argument("--T", dest="num_frames", type=positive_int, default=8, help="frames per clip of --memory")
    group.add_argument(
        "--memory_of", choices=("kept", "checkpointed"), help="one row of --memory, as JSON, for this process alone"
    )
    add_common_flags(parser, rounds=5)
    return parser


def training_arguments(configuration: str, *flags: str) -> argparse.Namespace:
    """The arguments of a training run of that configuration."""
    return train_video_ddpm.resolve_arguments(
        train_video_ddpm.build_parser(), [*CONFIGURATIONS[configuration], "--dry_run", *flags]
    )[0]


def random_clips(args: argparse.Namespace) -> Tensor:
    """A batch as a loading process hands it over: uint8 [B,C,T,H,W]."""
    channels = 1 if args.color_mode == "gray" else 3
    shape = (args.batch_size, channels, args.num_frames, args.size, args.size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def our_step(args: argparse.Namespace, device: torch.device) -> tuple[Callable[[], None], TrainingState]:
    """A function that takes one optimiser step as train_video_ddpm.py does, and its state."""
    use_fast_kernels(device)
    amp_dtype = choose_amp_dtype(args, device)
    state = new_state(args, model_config_of(args), device, amp_dtype)
    state.plan = plan_learning_rate(args, total_steps=1000, step=0, stored=None)
    schedule = DiffusionSchedule(args.timesteps, args.beta_schedule).to(device)
    clips = random_clips(args).pin_memory() if device.type == "cuda" else random_clips(args)
    batches: Iterator[Tensor] = (to_float(batch.to(device, non_blocking=True)) for batch in repeat(clips))
    if args.compile:
        state.model.compile(dynamic=False)
    return lambda: optimise(state, schedule, batches, args, amp_dtype), state


def original_step(args: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """A function that takes one optimiser step the original's way, with our network, loss and noise."""
    amp_dtype = torch.float16 if device.type == "cuda" else None
    state = new_state(args, model_config_of(args), device, amp_dtype)
    model, ema = state.model.lay_out(channels_last=False), state.ema.lay_out(channels_last=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = DiffusionSchedule(args.timesteps, args.beta_schedule).to(device)
    clips, position = random_clips(args), iter(range(10**9))

    def step() -> None:
        batch = to_float(clips).to(device)
        start, middle, end = split_clip(batch, args.endpoint_context)
        generator = generator_for(args.seed, TRAIN, next(position), device=device)
        noise = sample_training_noise(middle, args.timesteps, generator, args.cfg_drop_prob)
        start, end = drop_contexts(start, end, noise.dropped)
        with autocast(device, amp_dtype):
            terms = diffusion_loss(model, schedule, start, middle, end, noise.t, noise.eps, args.temporal_loss_weight)
            loss = terms.total.mean()
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
    with torch.device("meta"):
        model = build_model(model_config_of(args))
        k, m = args.endpoint_context, args.num_frames - 2 * args.endpoint_context
        x_t = torch.empty(1, model.image_channels, m, args.size, args.size)
        context = torch.empty(1, model.image_channels, k, args.size, args.size)
        with FlopCounterMode(display=False) as counter:
            model(x_t, torch.zeros(1, dtype=torch.long), context, context)
    return counter.get_total_flops()


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large bf16 (on a CPU float32) matrix product: what the device can do at best."""
    rows = MATRIX if device.type == "cuda" else MATRIX // 4
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    repeats = 10 if device.type == "cuda" else 2
    run = lambda: [a @ b for _ in range(repeats)]  # noqa: E731
    run()
    return max(2 * rows**3 * repeats / seconds_of(run, device) for _ in range(5))


def time_steps(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Tables of clips per second, one for each batch size."""
    sizes = args.batch_sizes or [training_arguments(args.configuration).batch_size]
    flops = forward_flops(training_arguments(args.configuration))
    best = matrix_rate(device)
    print(f"{flops / 1e9:.4g} GFLOP per clip forward, three times that per training step; ", end="")
    print(f"matrix products reach {best / 1e12:.4g} TFLOP/s on {device}")
    findings: dict[str, Any] = {"forward_flops": flops, "matrix_flops_per_second": best}
    for size in sizes:
        flags = ["--batch_size", str(size)]
        settings = training_arguments(args.configuration, *flags)
        variants = [
            Variant(REFERENCE, original_step(settings, device), size),
            Variant("ours", our_step(settings, device)[0], size),
        ]
        extra = {
            "ours, --channels_last": ["--channels_last"],
            "ours, --no-channels_last": ["--no-channels_last"],
            "ours, --activation_checkpointing": ["--activation_checkpointing"],
        }
        if args.compile:
            extra["ours, --compile"] = ["--compile"]
        for name, more in extra.items():
            step = our_step(training_arguments(args.configuration, *flags, *more), device)[0]
            variants.append(Variant(name, step, size))
        rows = compare(interleave(variants, args.rounds, device), REFERENCE)
        for row in rows:
            row["share_of_matrix_rate"] = 3 * flops * row["clips_per_second"] / best
        print_rows(f"{args.configuration} network, batch {size}, {device}, {torch.get_num_threads()} threads", rows)
        print(f"\nours runs at {rows[1]['share_of_matrix_rate']:.0%} of the matrix rate")
        findings[f"batch {size}"] = rows
    return findings


# --- memory -----------------------------------------------------------------------------------------------------------


def rest_and_peak(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """MiB in use before a step, and the most during it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        rest = torch.cuda.memory_allocated(device) / 2**20
        step()
        return rest, torch.cuda.max_memory_allocated(device) / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    rest = resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    step()
    return rest, resident_mib("VmHWM")


def step_memory(args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """MiB of a step at batch 1: the most it needs, and how much of that is activations.

    For the second, gradients are there before the step, as zeros: what comes on top of them is what the forward pass
    keeps and both passes need on the way.
    """
    flags = ["--batch_size", "1", "--T", str(args.num_frames)]
    flags += ["--activation_checkpointing"] * (args.memory_of == "checkpointed")
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
    found: dict[str, Any] = {}
    # freed memory then leaves the process at once, so that what is resident is what is in use
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    print(f"\nmemory of one training step, {args.configuration} network, --T {args.num_frames}, batch 1, {device}\n")
    print("| activations | activations, MiB | between steps, MiB | peak, MiB |\n|---|---|---|---|")
    for name in ("kept", "checkpointed"):
        command = [sys.executable, __file__, "--configuration", args.configuration, "--device", str(device)]
        command += ["--T", str(args.num_frames), "--threads", str(args.threads), "--memory_of", name]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        row = [f"{found[name][key]:.0f}" for key in ("activations", "between_steps", "peak")]
        print(f"| {name} | {' | '.join(row)} |", flush=True)
    for key, words in (("activations", "for activations"), ("peak", "in all")):
        found[f"saved_{key}"] = 1 - found["checkpointed"][key] / found["kept"][key]
        print(f"{found[f'saved_{key}']:.0%} less {words}")
    return found


# --- first step -------------------------------------------------------------------------------------------------------


def first_step(rounds: int) -> list[float]:
    """Seconds from starting the training script to its first optimiser step, in a fresh folder and then again."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            flags = ["--preset", "demo", "--max_steps", "1", "--vis_every", "0", "--cache_dir", f"{folder}/cache"]
            script = Path(train_video_ddpm.__file__)
            clock = time.perf_counter()
            command = [sys.executable, "-u", str(script), *flags, "--out_dir", f"{folder}/{number}"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
                if not any(line.startswith("step 1 ") for line in run.stdout):
                    raise ValueError(f"--first_step: {' '.join(command)} took no step")
                seconds.append(time.perf_counter() - clock)
                run.stdout.read()
            made = "its built-in clips rendered first" if not number else "its clips found in the cache"
            print(f"{seconds[-1]:.1f} s to the first optimiser step, {made}", flush=True)
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.memory_of:
            print(json.dumps(step_memory(args, device)))
        elif args.memory:
            save_findings(args.out_dir, f"training_memory_T{args.num_frames}", device, compare_memory(args, device))
        elif args.first_step:
            save_findings(args.out_dir, "first_step", device, {"seconds": first_step(args.rounds)})
        else:
            save_findings(args.out_dir, f"training_{args.configuration}", device, time_steps(args, device))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
