"""torchrun glue: who this process is among those of a run, and what they do together.

In a run of one process every function does what one process needs, so that callers have no
branches.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.flags import RunError

# A process that dies closes its connections, which the others see at once. These bounds are for
# a machine that vanishes silently, and for the first look at a large data folder.
STEP_TIMEOUT = timedelta(minutes=30)
PREPARATION_TIMEOUT = timedelta(days=1)
LOST_PEER_SIGNS = ("connection closed", "connection reset", "broken pipe", "timed out")
LOST_PEER_SIGNS += ("gloo/transport", "nccl")


class Silent:
    """Stands in for logger and checkpointer off rank 0: every method does nothing."""

    optional = staticmethod(contextlib.nullcontext)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def world_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return rank() == 0


def workers_per_process(wanted: int) -> int:
    """Loading processes for this process: no more than its share of the machine's cores."""
    processes = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
    return min(wanted, max(1, (os.cpu_count() or 1) // processes))


def rank_slice(count: int) -> range:
    """The stretch of range(count) that is this process's; sizes differ by one at most."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def print0(*values: Any, file: TextIO | None = None) -> None:
    """Print on rank 0 what all processes would print alike."""
    if not is_main():
        return
    file = file or sys.stdout
    try:
        print(*values, file=file, flush=True)
    except OSError:
        # The terminal is gone or the disk is full: the run goes on, and prints nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


# --- begin and end --------------------------------------------------------------------------------


def init_distributed(device: torch.device) -> torch.device:
    """Initialise the process group, NCCL on GPUs and gloo on CPUs; returns this process's device.

    Raises: ValueError: if there is not a GPU for each process, or they could not meet.
    """
    if world_size() == 1 or dist.is_initialized():
        return device
    if device.type == "cuda":
        number = int(os.environ["LOCAL_RANK"])
        count = torch.cuda.device_count()
        if device.index is not None or number >= count:
            rule = f"--device must be auto, with one of {count} GPUs for each process"
            raise ValueError(f"{rule} (got {device} for process {number})")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")  # gloo does not know MPS
    # What is on the CPU, such as a signal that came, never waits for a GPU.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=STEP_TIMEOUT)
    except RuntimeError as error:
        raise ValueError(f"the {world_size()} processes could not meet ({error})") from error
    return device


def cleanup() -> None:
    """Destroy the process group, if one was initialised."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def watch_peers() -> Iterator[None]:
    """Raises: RunError: in place of what torch says, if another process of the run is gone."""
    try:
        yield
    except RuntimeError as error:
        words = " ".join(str(error).split())[:200]
        is_lost = any(sign in words.lower() for sign in LOST_PEER_SIGNS)
        if not dist.is_initialized() or not is_lost:
            raise
        lost = f"process {rank()} of {world_size()} ends, as another one is gone ({words})"
        raise RunError(f"{lost}; --resume with the same command goes on") from error


# --- together -------------------------------------------------------------------------------------


def main_process_first(prepare: Callable[[], Any]) -> Any:
    """prepare() on rank 0, then on the first process of each machine, then on the others."""
    if world_size() == 1:
        return prepare()
    group = dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    mine = 0 if is_main() else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for turn in range(3):
        if turn == mine:
            result = prepare()
        dist.barrier(group)
    return result


def wait_for_all() -> None:
    """Wait until every process of the run is here, if they have met."""
    if dist.is_initialized():
        all_reduce_max(0)


def check_consistency(what: str, value: Any) -> None:
    """Raises: ValueError: unless what each process read from a disk is the same in all."""
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        got = ", ".join(map(str, values))
        raise ValueError(f"{what} must be the same for all processes of a run (got {got})")


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped so that each backward pass averages gradients over all processes."""
    if world_size() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Accumulate gradients in each process: for all batches of a step but the last."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of a tensor over all processes, on its device."""
    if world_size() > 1:
        dist.all_reduce(value)
        value /= world_size()
    return value


def all_reduce_sum(*values: float) -> list[float]:
    """The sum of each number over all processes."""
    sums = torch.tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def all_reduce_max(value: int) -> int:
    """The highest of a number over all processes."""
    number = torch.tensor(value)
    if world_size() > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gather(value: Any) -> list[Any]:
    """Every process's value in order, on rank 0; nothing on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values)
    return values or []
