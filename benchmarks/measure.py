"""Timing variants in turn, so that a machine whose speed drifts slows them all alike, and saying what came out."""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.device import describe_machine
from utils.flags import Parser, device_name, non_negative_int, nonempty_path, positive_int
from utils.io import save_json


class Timing(NamedTuple):
    """What was measured of a variant: seconds per clip in each round, and on CUDA the MiB it needs above rest."""

    name: str
    seconds: list[float]
    peak_mib: float | None


def add_common_flags(parser: Parser, rounds: int) -> None:
    """--rounds, --device, --threads and --out_dir, which every benchmark has."""
    add = parser.add_argument_group("measurement").add_argument
    add("--rounds", type=positive_int, default=rounds, help="timed runs of each variant, in turn")
    add("--device", type=device_name, default="auto", help="auto = cuda where there is one, then mps, then cpu")
    add("--threads", type=non_negative_int, default=0, help="threads of torch on the CPU; 0 = its own choice")
    add("--out_dir", type=nonempty_path, default="outputs/benchmarks", help="folder for the JSON file")


def run_benchmark(parser: Parser, benchmark: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse flags and run; what the user can mend is one line. Returns the exit status."""
    args = parser.parse_args(argv)
    with parser.one_line_end():
        if args.threads:
            torch.set_num_threads(args.threads)
        benchmark(args)
    return 0


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one run, up to the end of what it asked of the device."""
    wait = (lambda: None) if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    wait()
    clock = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - clock


def interleave(
    variants: Mapping[str, Callable[[], Any]], clips: int, rounds: int, device: torch.device
) -> list[Timing]:
    """Each variant, which works on so many clips, once to warm up, then in turn: A B C, A B C, ..."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    peaks: dict[str, float] = {}
    for number in range(rounds + 1):
        for name, run in variants.items():
            rest = 0
            if device.type == "cuda":  # other variants' weights lie there, too
                torch.cuda.reset_peak_memory_stats(device)
                rest = torch.cuda.memory_allocated(device)
            taken = seconds_of(run, device) / clips
            if number:
                seconds[name].append(taken)
            if device.type == "cuda":
                peaks[name] = (torch.cuda.max_memory_allocated(device) - rest) / 2**20
    return [Timing(name, values, peaks.get(name)) for name, values in seconds.items()]


def compare(timings: Sequence[Timing], reference: str) -> list[dict[str, Any]]:
    """A row per variant: median seconds per clip, clips/s, and how many times faster than the reference it is.

    The ratio is taken within each round; its median and its smallest and largest value are given.
    """
    base = next(timing for timing in timings if timing.name == reference)
    rows = []
    for timing in timings:
        ratios = [slow / fast for slow, fast in zip(base.seconds, timing.seconds, strict=True)]
        median = statistics.median(timing.seconds)
        row = {"variant": timing.name, "seconds_per_clip": median, "clips_per_second": 1 / median}
        row |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
        rows.append(row | {"peak_mib": timing.peak_mib})
    return rows


def resident_mib(field: str, process: int | str = "self") -> float:
    """VmRSS (now) or VmHWM (the most since it was reset) of a process, in MiB; Linux."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """The rows of `compare` as a Markdown table."""
    peaks = any(row["peak_mib"] is not None for row in rows)
    print(f"\n{title}\n")
    print("| variant | s / clip | clips / s | times the reference | lowest to highest |" + " MiB above rest |" * peaks)
    print("|---|---|---|---|---|" + "---|" * peaks)
    for row in rows:
        peak = f" {row['peak_mib']:.0f} |" if peaks else ""
        speed = f"{row['seconds_per_clip']:.4g} | {row['clips_per_second']:.4g}"
        ratio = f"{row['ratio']:.2f} | {row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        print(f"| {row['variant']} | {speed} | {ratio} |{peak}", flush=True)


def save_results(out_dir: str, name: str, device: torch.device, results: dict[str, Any]) -> None:
    """Write OUT_DIR/NAME.json: the command, the machine and everything measured."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir}: cannot be made ({error.strerror})") from error
    machine = describe_machine(device) | {"torch_threads": torch.get_num_threads()}
    save_json(folder / f"{name}.json", {"command": shlex.join(sys.argv), "machine": machine, **results})
    print(f"\n{folder / f'{name}.json'}")
