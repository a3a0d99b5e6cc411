"""How much memory is free, and one clear line where it is or would be too little."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a GPU or, for a CPU, of the machine and its container; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return None
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        figures = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(figures["inactive_file"]) + int(figures["active_file"])  # is given back when asked for
        return min(free, int(limit) - int(used) + cached)
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return free


def check_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Raises: ValueError: if `what` needs more bytes than are free; `remedy` completes "lower ..."."""
    free = free_memory(device)
    if free is not None and needed > free:
        raise ValueError(
            f"{what} needs about {needed / 2**30:.1f} GiB at once on {device} (got {free / 2**30:.1f} GiB free); "
            f"lower {remedy}"
        )


@contextlib.contextmanager
def explaining_shortage(remedy: str) -> Iterator[None]:
    """Raises: ValueError: in place of an error for want of memory, host's or device's; `remedy` completes "lower ...".

    torch's allocator for the CPU reports a plain RuntimeError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = " ".join(str(error).split())
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in words:
            raise
        asked = re.search(r"ried (to allocate [\d.]+ \w+)", words)
        raise ValueError(f"memory ran out ({asked[1] if asked else 'no figure'}); lower {remedy}") from error
