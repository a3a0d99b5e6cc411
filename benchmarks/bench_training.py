"""Clips per second of training, against the original's training step.

    python benchmarks/bench_training.py --configuration default --device cuda --compile

The reference has our network, loss and noise in the original's loop: torch's default memory
layout, float frames that are normalised before the transfer, on CUDA fp16 autocast where ours has
bf16, unfused AdamW, an EMA updated parameter by parameter, and two reads of the loss per step.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import count, repeat
from pathlib import Path
from typing import Any

# As a script, Python searches this folder and not the repository.
if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import train_video_ddpm
from benchmarks import measure
from diffusion.noise import TRAIN, generator_for
from models.video_unet3d import VideoUNet3D
from training.objective import Objective, build_network, describe_network, pick_objective
from training.state import TrainingState, init_state
from utils.device import autocast, choose_amp_dtype, resolve_device, tune_kernels
from utils.flags import Parser
from utils.video_utils import split_clip, to_float

CONFIGURATIONS = {
    "default": {},
    "demo": {**train_video_ddpm.PRESETS["demo"]["diffusion"], "size": 32},
}
Step = tuple[Callable[[], None], TrainingState]


def build_parser() -> Parser:
    """Define the flags."""
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to train").add_argument
    add("--configuration", choices=CONFIGURATIONS, default="demo", help="of the network")
    measure.add_common_flags(parser, sizes=[8])
    return parser


def training_args(configuration: str, **given: Any) -> argparse.Namespace:
    """The arguments of a run that trains diffusion without a predictor."""
    defaults = train_video_ddpm.build_parser().defaults()
    return argparse.Namespace(**{**defaults, **CONFIGURATIONS[configuration], **given})


def random_clips(args: argparse.Namespace) -> Tensor:
    """A batch as loading processes hand it over, uint8 [B,3,T,H,W]."""
    shape = (args.batch_size, 3, args.num_frames, args.size, args.size)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def start_run(
    args: argparse.Namespace, device: torch.device, amp_dtype: torch.dtype | None
) -> tuple[TrainingState, Objective]:
    """Fresh weights by the seed, and what they are to learn."""
    state = init_state(args, build_network(args, device), device, amp_dtype)
    state.epoch_steps = 10**6
    state.plan_steps(args)
    return state, pick_objective(args, state.ema, None, 1, amp_dtype)


def our_step(args: argparse.Namespace, device: torch.device) -> Step:
    """An optimiser step of train_video_ddpm.py, and what it changes."""
    amp_dtype = choose_amp_dtype(device)
    state, objective = start_run(args, device, amp_dtype)
    if args.compile:
        state.model.compile(dynamic=False)
    clips = random_clips(args)
    if device.type == "cuda":
        clips = clips.pin_memory()
    batches = (to_float(batch.to(device, non_blocking=True)) for batch in repeat(clips))

    def step() -> None:
        train_video_ddpm.train_step(state, objective, batches, args, amp_dtype)

    return step, state


def original_step(args: argparse.Namespace, device: torch.device) -> Step:
    """An optimiser step as the original takes it, and what it changes."""
    amp_dtype = torch.float16 if device.type == "cuda" else None
    state, objective = start_run(args, device, amp_dtype)
    model = measure.use_default_layout(state.model)
    ema = measure.use_default_layout(state.ema)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    clips = random_clips(args)
    numbers = count()

    def step() -> None:
        start, middle, end = split_clip(to_float(clips).to(device), args.endpoint_context)
        generator = generator_for(args.seed, TRAIN, next(numbers), device=device)
        with autocast(device, amp_dtype):
            loss = objective.loss(model, start, middle, end, generator).mean()
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        state.scaler.step(optimizer)
        state.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                average.mul_(args.ema_decay).add_(parameter, alpha=1 - args.ema_decay)
        # For the mean, and for the progress bar.
        loss.item()
        loss.item()

    return step, state


def forward_flops(args: argparse.Namespace) -> int:
    """Floating-point operations of a forward of one clip, counted without data."""
    k = args.endpoint_context
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        clip = torch.empty(1, 3, args.num_frames, args.size, args.size)
        start, middle, end = split_clip(clip, k)
        t = torch.zeros(1, dtype=torch.long)
        VideoUNet3D(**describe_network(args))(middle, t, start, end)
    return counter.get_total_flops()


def matrix_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product: the most that the device can do."""
    on_gpu = device.type == "cuda"
    rows = 8192 if on_gpu else 2048
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = torch.randn(2, rows, rows, device=device, dtype=dtype)
    return 2 * rows**3 / min(measure.seconds_of(lambda: a @ b, device) for _ in range(10))


def benchmark(args: argparse.Namespace) -> None:
    """Print and save a table for each batch size."""
    device = resolve_device(args.device)
    tune_kernels(device)
    flops = forward_flops(training_args(args.configuration))
    best = matrix_rate(device)
    print(f"forward of a clip: {flops / 1e9:.4g} GFLOP; a training step does three times that")
    print(f"matrix products on {device}: {best / 1e12:.4g} TFLOP/s")
    results = {"forward_flops": flops, "matrix_flops_per_second": best}
    for size in args.batch_sizes:
        eager = training_args(args.configuration, batch_size=size)
        variants = {
            "reference": original_step(eager, device)[0],
            "ours": our_step(eager, device)[0],
        }
        if args.compile:
            compiled = argparse.Namespace(**{**vars(eager), "compile": True})
            variants["ours, --compile"] = our_step(compiled, device)[0]
        seconds = measure.time_variants(variants, args.rounds, device)
        rows = measure.compare(seconds, clips=size)
        measure.print_rows(f"{args.configuration} network, batch {size}, {device}", rows)
        print()
        for row in rows:
            row["share_of_matrix_rate"] = 3 * flops * row["clips_per_second"] / best
            print(f"{row['variant']}: {row['share_of_matrix_rate']:.0%} of the matrix rate")
        results[f"batch {size}"] = rows
    measure.save_results(args, f"training_{args.configuration}", device, results)


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit status."""
    return measure.run_benchmark(build_parser(), benchmark, argv)


if __name__ == "__main__":
    sys.exit(main())
