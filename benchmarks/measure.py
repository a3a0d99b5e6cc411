"""Timing of variants in turn, so that a machine whose speed drifts slows all of them alike."""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from utils.device import describe_machine, explain_oom
from utils.flags import Parser, device_name, nonempty_path, positive_int
from utils.io import make_out_dir, save_json

Row = dict[str, Any]


def add_common_flags(parser: Parser, sizes: list[int]) -> None:
    """The flags of both benchmarks."""
    add = parser.add_argument_group("measurement").add_argument
    add("--batch_sizes", type=positive_int, nargs="+", default=sizes, help="a table for each")
    add("--compile", action="store_true", help="time torch.compile of ours, too")
    add("--rounds", type=positive_int, default=5, help="timed runs of each variant, in turn")
    add("--device", type=device_name, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    add("--out_dir", type=nonempty_path, default="outputs/benchmarks", help="folder of the JSON")


def run_benchmark(
    parser: Parser, benchmark: Callable[[argparse.Namespace], None], argv: list[str] | None
) -> int:
    """Parse flags and run; exit status 0 = done, 2 = wrong input or OOM."""
    args = parser.parse_args(argv)
    with parser.one_line_errors(), explain_oom("--batch_sizes"):
        benchmark(args)
    return 0


def use_default_layout(module: nn.Module) -> nn.Module:
    """Give weights torch's default memory layout, as the original does; returns the module."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()
    return module


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of a run, until the device has finished."""
    wait = torch.cpu.synchronize if device.type == "cpu" else torch.accelerator.synchronize
    wait()
    clock = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - clock


def time_variants(
    variants: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each variant in every round: A B C, A B C, after a round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, run in variants.items():
            taken = seconds_of(run, device)
            if number > 0:
                seconds[name].append(taken)
    return seconds


def compare(seconds: Mapping[str, Sequence[float]], clips: int) -> list[Row]:
    """A row for each variant: its speed, and how many times faster than the first one it is.

    The ratio is taken within each round; its median and its range are given.

    Args:
        seconds: of each variant in every round; the first one is the reference.
        clips: how many a round works on.
    """
    rows = []
    reference = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratios = [slow / fast for slow, fast in zip(reference, values, strict=True)]
        row = {
            "variant": name,
            "clips_per_second": clips / statistics.median(values),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
        }
        rows.append(row)
    return rows


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Print the rows of `compare` as a Markdown table."""
    print(f"\n{title}, {torch.get_num_threads()} threads\n")
    print("| variant | s / clip | clips / s | times the reference | range |\n|---|---|---|---|---|")
    for row in rows:
        rate = row["clips_per_second"]
        spread = f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"
        print(f"| {row['variant']} | {1 / rate:.4g} | {rate:.4g} | {row['ratio']:.2f} | {spread} |")


def save_results(args: argparse.Namespace, name: str, device: torch.device, results: Row) -> None:
    """Write OUT_DIR/NAME.json: the command, the machine and everything measured."""
    path = make_out_dir(args.out_dir) / f"{name}.json"
    machine = {**describe_machine(device), "torch_threads": torch.get_num_threads()}
    save_json(path, {"command": shlex.join(sys.argv), "machine": machine, **results})
    print(f"\n{path}")
