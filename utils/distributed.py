"""torchrun glue: who this process is among those of a run, and the few things that they do together.

In a run of one process every function does what one process needs, so that callers have no branches.
"""

import contextlib
import multiprocessing
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.flags import BrokenRunError

# A process that dies closes its connections, which the others see at once. These bounds are for a machine that
# vanishes without a word, and for the first look at a large data folder, during which the others wait.
STEP_TIMEOUT = timedelta(minutes=30)
PREPARATION_TIMEOUT = timedelta(days=1)
PREPARATION_GROUP: list[dist.ProcessGroup] = []  # of the one run of this process
LOST_PEER_SIGNS = ("connection closed", "connection reset", "broken pipe", "timed out", "gloo/transport", "nccl")


class PeerLostError(BrokenRunError):
    """Another process of the run ended or fell silent."""


class Silent:
    """Stands in for a logger or a checkpointer off rank 0: every method does nothing and returns None."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


# --- who this process is ----------------------------------------------------------------------------------------------


def world_size() -> int:
    """How many processes the run has, by torchrun's environment; 1 without it."""
    under_torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ)
    return int(os.environ["WORLD_SIZE"]) if under_torchrun else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return int(os.environ["RANK"]) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which writes and prints."""
    return rank() == 0


def local_world_size() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world_size() > 1 else 1


def rank_slice(count: int) -> range:
    """The stretch of range(count) that is this process's; their sizes differ by one at most."""
    return range(count * rank() // world_size(), count * (rank() + 1) // world_size())


def print0(*values: Any, file: TextIO | None = None) -> None:
    """Print on rank 0 alone what all processes would print alike."""
    if is_main():
        print(*values, file=file, flush=True)


def launch_command(script: str, *words: str) -> str:
    """The command line that starts a script as this run was started."""
    if world_size() == 1:
        return shlex.join([Path(sys.executable).name, script, *words])
    if local_world_size() < world_size():
        return f"torchrun (with its options of before, on every machine) {shlex.join([script, *words])}"
    return shlex.join(["torchrun", "--nproc_per_node", str(local_world_size()), script, *words])


# --- begin and end ----------------------------------------------------------------------------------------------------


def init_distributed(device: torch.device) -> torch.device:
    """Initialise the process group, NCCL on GPUs and gloo on CPUs; returns the device of this process.

    Raises: ValueError: if there is not a GPU for each process, one was named for all, or they could not meet.
    """
    if world_size() == 1:
        return device
    if device.type == "mps":  # which gloo does not know
        device = torch.device("cpu")
    if device.type == "cuda":
        count, number = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        if device.index is not None:
            raise ValueError(f"--device must be auto, cuda or cpu for several processes (got {device})")
        if number >= count:
            raise ValueError(f"--nproc_per_node must be at most {count}, the GPUs of this machine (got {number + 1})")
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
    try:
        # what is on the CPU, such as a signal that came, never waits for a GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=STEP_TIMEOUT)
    except RuntimeError as error:
        raise ValueError(f"the {world_size()} processes could not meet ({str(error)[:200]})") from error
    PREPARATION_GROUP[:] = [
        dist.new_group(backend="gloo", timeout=PREPARATION_TIMEOUT)
    ]  # they have met: one may be lost
    return device


def cleanup() -> None:
    """Destroy the process group, if one was initialised."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def watch_peers(remedy: str) -> Iterator[None]:
    """Raises: PeerLostError: in place of what torch says, if another process is gone.

    `remedy` completes "the same torchrun command with ...".
    """
    try:
        yield
    except RuntimeError as error:
        words = " ".join(str(error).split())
        if not dist.is_initialized() or not any(sign in words.lower() for sign in LOST_PEER_SIGNS):
            raise
        raise PeerLostError(
            f"process {rank()} of {world_size()} ends, as another one is gone or cannot be reached; the same torchrun "
            f"command with {remedy} (torch says: {words[:200]})"
        ) from error


def kill_loading_processes() -> None:
    """Kill and reap what multiprocessing started here: it outlives a signal, and Python would wait for it."""
    # torch's handler would take it for an accident; Windows has no such signal
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if hasattr(signal, "SIGCHLD") else None
    try:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
    finally:
        if handler is not None:
            signal.signal(signal.SIGCHLD, handler)


# --- stopping ---------------------------------------------------------------------------------------------------------

# The last is what batch systems send ahead of time; Windows does not have it.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class StopRequest:
    """Remembers the first of STOP_SIGNALS, so that the loop can stop between two steps; a second one acts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self.previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def worker_init_fn(worker: int) -> None:
    """Leave stopping to the main process, which the death of a loading process would break in the middle of a save.

    The second SIGTERM ends it, as torch's own shutdown of a stuck process needs.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


# --- together ---------------------------------------------------------------------------------------------------------


def main_process_first(prepare: Callable[[], Any]) -> Any:
    """prepare() by the first process of all, then by the first of every machine, then by those that find it done."""
    if world_size() == 1:
        return prepare()
    mine = 0 if is_main() else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for turn in range(3):
        if turn == mine:
            result = prepare()
        dist.barrier(PREPARATION_GROUP[0])
    return result


def check_consistency(what: str, value: Any) -> None:
    """Raises: ValueError: unless `value`, which each process read from a disk, is the same in all of them."""
    if world_size() == 1:
        return
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    if any(other != values[0] for other in values):
        raise ValueError(f"{what} must be the same for all processes of a run (got {', '.join(map(str, values))})")


def wrap_ddp(model: nn.Module, device: torch.device) -> nn.Module:
    """The model, wrapped so that each backward pass averages its gradients over all processes."""
    if world_size() == 1:
        return model
    devices = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager:
    """Within it, gradients only add up in each process: for all backward passes of a step but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


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


def all_reduce_max(*values: int) -> list[int]:
    """The highest of each number over all processes."""
    numbers = torch.tensor(values)
    if world_size() > 1:
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def from_main(value: Any) -> Any:
    """Rank 0's value, in every process."""
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def in_turns(jobs: Sequence[Any], work: Callable[[Any], Any]) -> Iterator[Any]:
    """Share jobs out, a turn of one for each process after the other; yields each one's result, in order, on rank 0."""
    patient = PREPARATION_GROUP[0] if world_size() > 1 else None  # who has no job waits for a whole one
    for i in range(0, len(jobs), world_size()):
        turn = jobs[i : i + world_size()]
        results = gather(work(turn[rank()]) if rank() < len(turn) else None, patient)
        yield from results[: len(turn)]


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every process's value in order, on rank 0; nothing on the others."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, group=group)
    return values or []
