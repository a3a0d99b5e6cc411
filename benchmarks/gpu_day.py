"""Everything that a GPU is needed for, in pieces that resume: does it work, how fast is it, how well does it train?

    python benchmarks/gpu_day.py --train_root sim_push/train --test_root sim_push/test --minutes 9

Run the same command until it says that all is done: what is finished is not run again, and training goes on where it
stopped. Each piece leaves its output in --out_dir/NAME.log, and summary.md has the tables of all.
"""

import argparse
import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import train_video_ddpm
from benchmarks.bench_training import our_step, training_arguments
from diffusion.loss import diffusion_loss
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.schedule import DiffusionSchedule
from training.state import init_state
from utils.device import resolve_device
from utils.flags import Parser, device_name, nonempty_path, positive_float
from utils.video_utils import split_clip

ROOT = Path(__file__).resolve().parents[1]
TRAIN, SAMPLE_SCRIPT, EVALUATE = (f"{name}_video_ddpm.py" for name in ("train", "sample", "evaluate"))
SPEED, SAMPLING = "benchmarks/bench_training.py", "benchmarks/bench_sampling.py"
SYNCHRONISING = re.compile("cuda(Stream|Device|Event)Synchronize")
# Allowed differences between a GPU and the CPU, both in float32 without TF32, of the loss and gradients of one batch
# (relative) and of sampled frames (levels of 255): sums of up to 10^4 products in another order, through 40 layers.
GRADIENT_TOLERANCE, LEVEL_TOLERANCE = 1e-3, 1.0
PROBE_SECONDS = 60
WARM_UP_STEPS, WATCHED_STEPS = 3, 20
SAVE_SECONDS = 60  # before a deadline at which training is asked to stop, so that its save is done by then
# Small enough for a CPU and the tests.
DRY = "--size 16 --base_channels 12 --channel_mults 1 2 --res_blocks 1 --temporal_attn_levels 1 --predictor_width 8"
DRY += " --batch_size 2 --num_workers 0 --vis_steps 2"


class Piece(NamedTuple):
    """Something to do: commands (words after python), of which those of training may be stopped and go on."""

    name: str
    commands: list[list[str]]


def build_parser() -> Parser:
    """Every flag with its default."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--out_dir", type=nonempty_path, default="outputs/gpu_day", help="folder of logs, checkpoints and tables")
    add("--train_root", type=nonempty_path, help="clips to train on; None = built-in clips")
    add("--test_root", type=nonempty_path, help="clips to score, none of --train_root; None = held-out ones")
    add("--cache_dir", type=nonempty_path, default="outputs/cache", help="folder of file index and cached frames")
    add("--minutes", type=positive_float, default=9.0, help="stop after so many minutes; the same command goes on")
    add("--train_hours", type=positive_float, default=0.3, help="time for each of the two trainings at 64x64")
    add("--device", type=device_name, default="auto", help="auto = cuda where there is one, then mps, then cpu")
    add("--check", choices=("agreement", "synchronisation"), help="only this check, which a piece runs")
    add("--dry_run", action="store_true", help="tiny sizes: does this program work? No figure of it counts")
    return parser


# --- the pieces -------------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace) -> list[Piece]:
    """All pieces in order: the checks first, then what needs the most time."""
    out, tiny = Path(args.out_dir), DRY.split() if args.dry_run else []
    data = ["--cache_dir", args.cache_dir, *(["--data_root", args.train_root] if args.train_root else [])]
    device = ["--device", args.device]
    steps = 4 if args.dry_run else 60
    short = ["--preset", "demo", *tiny, *data, *device, "--predictor_steps", str(steps // 2)]
    short += ["--epochs", "1000", "--vis_every", "0"]
    this = [str(Path(__file__)), "--out_dir", str(out), *device, *["--dry_run"] * args.dry_run]

    # a. Does everything work?
    pieces = [Piece(f"check_{name}", [[*this, "--check", name]]) for name in ("agreement", "synchronisation")]
    ways = {"bf16": "--amp_dtype bf16", "fp16": "--amp_dtype fp16", "float32": "--no-amp", "gray": "--color_mode gray"}
    ways |= {"checkpointing": "--activation_checkpointing", "compile": "--compile"}
    for name, flags in list(ways.items())[: 1 if args.dry_run else None]:
        folder = ["--out_dir", str(out / f"smoke_{name}")]
        first, rest = (["--max_steps", str(n)] for n in (steps - 1, steps))
        ckpt = ["--ckpt", str(out / f"smoke_{name}" / "last.pt"), "--cache_dir", args.cache_dir, *device]
        few = ["--num_videos", "2", "--baselines", "cross_fade"]
        commands = [[TRAIN, *short, *folder, *first, *flags.split()], [TRAIN, *folder, "--resume", *rest]]
        commands += [[SAMPLE_SCRIPT, *ckpt, "--out_dir", str(out / f"smoke_{name}" / "sample"), "--overwrite"]]
        commands += [[EVALUATE, *ckpt, "--out_dir", str(out / f"smoke_{name}" / "scores"), "--overwrite", *few]]
        pieces.append(Piece(f"smoke_{name}", commands))

    # b. How fast is it, and what memory does it take?
    measured = [*device, "--out_dir", str(out / "benchmarks"), *["--rounds", "1"] * args.dry_run]
    network = ["--configuration", "demo" if args.dry_run else "default"]
    for size in [1] if args.dry_run else [8, 32, 64]:
        compiled = [] if args.dry_run else ["--compile"]
        pieces.append(Piece(f"speed_{size}", [[SPEED, *network, "--batch_sizes", str(size), *compiled, *measured]]))
    lengths = [] if args.dry_run else [8, 16, 32]
    pieces += [Piece(f"memory_{t}", [[SPEED, *network, "--memory", "--T", str(t), *measured]]) for t in lengths]

    # c. How well does it train? The default network, then that of the weights to ship.
    small = tiny or ["--base_channels", "24", "--res_blocks", "1", "--num_workers", "8", "--batch_size", "32"]
    large = tiny or ["--lr", "3e-4", "--num_workers", "8", "--batch_size", "32"]
    for name, flags in ({"small": small} if args.dry_run else {"default": large, "small": small}).items():
        folder = str(out / f"train_{name}")
        begin = [TRAIN, "--preset", "refine", *flags, *data, *device, "--out_dir", folder, "--cache_videos"]
        begin += ["--val_ratio", "0.04", "--vis_every", "0", "--save_minutes", "2"]
        begin += ["--predictor_steps", "2", "--max_steps", "4"] if args.dry_run else []
        pieces.append(Piece(f"train_{name}", [begin]))
        ckpt = ["--ckpt", f"{folder}/last.pt", "--cache_dir", args.cache_dir, *device]
        test = ["--data_root", args.test_root, "--split", "all"] if args.test_root else []
        few = ["--num_videos", "2", "--baselines", "cross_fade"] if args.dry_run else []
        pieces.append(Piece(f"score_{name}", [[EVALUATE, *ckpt, *test, "--out_dir", f"{folder}/scores", *few]]))
        sizes, few = (["1"], ["--quality_clips", "2"]) if args.dry_run else (["1", "64"], [])
        again = [SAMPLING, *ckpt, "--batch_sizes", *sizes, *measured, *few, *["--compile"] * (not args.dry_run)]
        pieces.append(Piece(f"sampling_{name}", [again]))
    return pieces


# --- the checks -------------------------------------------------------------------------------------------------------


def check_agreement(args: argparse.Namespace, device: torch.device) -> None:
    """Loss, gradients and samples of one network on this device and on the CPU; AssertionError where they differ."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    flags = ["--predictor", "learned", "--optimizer", "adamw", *(DRY.split() if args.dry_run else ["--preset", "demo"])]
    settings = train_video_ddpm.resolve_args(train_video_ddpm.build_parser(), [*flags, "--out_dir", "nowhere"])[0]
    found = []
    for where in (torch.device("cpu"), device):
        state = init_state(settings, torch.device("cpu"), None)
        generator = generator_for(0)
        for parameter in state.model.parameters():  # an untrained network is zero at its end
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        model, schedule = state.model.to(where), DiffusionSchedule().to(where)
        shape = (2, 3, 8, settings.size, settings.size)
        start, middle, end = split_clip(torch.rand(shape, generator=generator).to(where) * 2 - 1, 2)
        eps, t = torch.randn(middle.shape, generator=generator).to(where), torch.tensor([100, 800], device=where)
        loss = diffusion_loss(model, schedule, start, middle, end, t, eps, 0.05).mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).cpu()
        pipe = MiddleFramePipeline(model.eval(), schedule, vars(settings), predictor="learned", residual_scale="pixel")
        made = pipe(start, end, generator=[generator_for(0, SAMPLE, i) for i in range(2)]).cpu()
        found.append((loss.item(), gradient, made))
    (a, b), (g, h), (x, y) = zip(*found, strict=True)
    off = {"loss": abs(a - b) / abs(a), "gradient": ((g - h).norm() / g.norm()).item()}
    levels = ((x - y).abs().max() * 127.5).item()
    print(f"| {device} against cpu | relative difference |\n|---|---|")
    print("\n".join(f"| {name} | {value:.2e} |" for name, value in off.items()))
    print(f"| sampled frames, levels of 255 at most | {levels:.3f} |")
    assert max(off.values()) <= GRADIENT_TOLERANCE and levels <= LEVEL_TOLERANCE, "the devices disagree"


def check_synchronisation(args: argparse.Namespace, device: torch.device) -> None:
    """Count the host's waits for the GPU within steps; AssertionError unless there is none between log lines."""
    flags = [*(DRY.split() if args.dry_run else []), "--device", str(device)]
    step, _ = our_step(training_arguments("demo", *flags), device)
    for _ in range(WARM_UP_STEPS):
        step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(WATCHED_STEPS):
            step()
    waits = sum(bool(SYNCHRONISING.fullmatch(event.name)) for event in profile.events())
    print(f"| steps | host's waits for {device} |\n|---|---|\n| {WATCHED_STEPS} | {waits} |")
    # the profiler itself waits at its end: once per stream
    assert waits <= 2, f"{waits} waits in {WATCHED_STEPS} steps"


# --- running them -----------------------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    """The time of this call is over; the next one goes on."""


def run_command(words: list[str], log: Path, deadline: float) -> None:
    """One command, its output in `log`; it is asked to stop at the deadline.

    Raises: OutOfTimeError: if it was. ValueError: if it failed.
    """
    with log.open("a") as file:
        file.write(f"$ python {' '.join(words)}\n")
        file.flush()
        run = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            status = run.wait(max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.wait(SAVE_SECONDS)
            run.kill()
            run.wait()
            raise OutOfTimeError from None
    if status:
        raise ValueError(f"{log}: python {' '.join(words)} ended with status {status}")


def planned_length(begin: list[str], folder: Path, hours: float, log: Path, deadline: float) -> list[str]:
    """The flags that make a training last so many hours, half of them for the predictor.

    The speed of both halves is taken from a minute of each, once.
    """
    plan_file, batch = folder / "length.txt", int(begin[begin.index("--batch_size") + 1])
    if not plan_file.exists():
        steps = []
        for predictor_steps in (10**6, 1):
            probe = folder / f"speed_of_{predictor_steps}"
            if not (probe / "metrics.jsonl").exists():
                length = ["--predictor_steps", str(predictor_steps), "--max_steps", str(10**7), "--epochs", str(10**8)]
                with contextlib.suppress(OutOfTimeError):
                    until = min(deadline, time.monotonic() + PROBE_SECONDS)
                    run_command([*begin, *length, "--out_dir", str(probe), "--log_every", "20"], log, until)
            speeds = re.findall(r'"clips_per_second": ([\d.]+)', (probe / "metrics.jsonl").read_text())
            steps.append(int(hours / 2 * 3600 * float(speeds[-1]) / batch))
        plan_file.write_text(f"--predictor_steps {steps[0]} --max_steps {sum(steps)} --epochs {10**8}")
    return plan_file.read_text().split()


def train(piece: Piece, args: argparse.Namespace, log: Path, deadline: float) -> None:
    """A training over several calls, of --train_hours in all."""
    (begin,) = piece.commands
    folder = Path(begin[begin.index("--out_dir") + 1])
    if (folder / "last.pt").exists():
        run_command([TRAIN, "--out_dir", str(folder), "--resume"], log, deadline)
        return
    length = [] if args.dry_run else planned_length(begin, folder, args.train_hours, log, deadline)
    run_command([*begin, *length], log, deadline)


def tables(out: Path, pieces: list[Piece]) -> Iterator[str]:
    """The tables of every finished piece, as they were printed."""
    for piece in pieces:
        log = out / f"{piece.name}.log"
        if (out / f"{piece.name}.done").exists():
            lines = [line for line in log.read_text().splitlines() if line.startswith(("|", "ours runs", "done:"))]
            yield "\n".join([f"## {piece.name}", "", *lines, ""])


def run(args: argparse.Namespace) -> bool:
    """Run what is not done yet until the time is over; returns whether all is."""
    out, deadline = Path(args.out_dir), time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    pieces = plan(args)
    failed = []
    try:
        for piece in pieces:
            log, done = (out / f"{piece.name}.{suffix}" for suffix in ("log", "done"))
            if done.exists():
                continue
            print(piece.name, flush=True)
            try:
                if piece.name.startswith("train_"):
                    train(piece, args, log, deadline - SAVE_SECONDS)
                else:
                    log.unlink(missing_ok=True)
                    for words in piece.commands:
                        run_command(words, log, deadline)
            except ValueError as error:  # the others may still work
                print(f"FAILED: {error}", flush=True)
                failed.append(piece.name)
                continue
            done.touch()
    except OutOfTimeError:
        print("the time is over: the same command goes on", flush=True)
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    summary = f"# GPU day on {machine}, torch {torch.__version__}\n\n" + "\n".join(tables(out, pieces))
    (out / "summary.md").write_text(summary + "".join(f"\nFAILED: {name}\n" for name in failed))
    print(out / "summary.md")
    return all((out / f"{piece.name}.done").exists() for piece in pieces)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 all is done, 1 something is left or failed, 2 wrong input."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with parser.one_line_end("stopped; the same command goes on"):
        if not args.check:
            return 0 if run(args) else 1
        check = {"agreement": check_agreement, "synchronisation": check_synchronisation}[args.check]
        try:
            check(args, resolve_device(args.device))
        except AssertionError as error:
            parser.exit(1, f"FAILED: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
