"""Work spread over processes, and their end."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def end_children() -> None:
    """Kill and reap the processes that multiprocessing started here and nobody will ask again."""
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would take it for an accident
    try:
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
    finally:
        signal.signal(signal.SIGCHLD, handler)


def loading_process_died(error: RuntimeError) -> bool:
    """Whether an error is a DataLoader's report that one of its processes was killed."""
    return str(error).startswith("DataLoader worker")


def map_in_processes(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    """function(task) of every task, in order, by so many processes; by this one where that is enough.

    Ctrl-C ends it after the tasks in hand. Processes start afresh, as OpenGL and torch's threads do not survive a fork.

    Raises: whatever the function raises; BrokenProcessPool (a RuntimeError) if a process is killed.
    """
    if workers <= 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(function, tasks)
    finally:
        pool.shutdown(cancel_futures=True)
