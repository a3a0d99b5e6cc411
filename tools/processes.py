"""Work spread over processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from utils.flags import BrokenRunError


def map_in_processes(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    """function(task) of every task, in order, by so many processes; by this one where that is enough.

    Ctrl-C ends it after the tasks in hand. Processes start afresh, as OpenGL and torch's threads do not survive a fork.

    Raises: whatever the function raises; BrokenRunError if a process is killed.
    """
    if workers <= 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield from pool.map(function, tasks)
    except BrokenProcessPool as error:
        raise BrokenRunError(str(error)) from error
    finally:
        pool.shutdown(cancel_futures=True)
