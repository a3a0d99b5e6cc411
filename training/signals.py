"""Stopping a run: signals that end it after a step, and loading processes that would outlive it."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from types import FrameType

from torch import Tensor

from utils.flags import RunError

# SIGHUP comes when a terminal closes, SIGUSR1 from batch systems ahead of time; Windows has
# neither.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class StopRequest:
    """Remembers the first stop signal, so that the loop ends between steps; a second acts at once.

    Attributes:
        signal: the number of the signal that came; 0 = none.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.previous = {}
        for number in STOP_SIGNALS:
            # What nohup has told the system to ignore stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self.restore()
        # A handler may interrupt a print, so it writes past Python's buffers.
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            text = f"\n{name}: saving and stopping; a second signal stops at once\n"
            os.write(2, text.encode())

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def worker_init_fn(worker: int) -> None:
    """Leave stopping to the main process: a loading process that died would break its save.

    The second SIGTERM ends it, as torch's own shutdown of a stuck process needs.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_next_time(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, end_next_time)


def name_dead_workers(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same batches.

    Raises: RunError: in place of what torch says, if a loading process was killed.
    """
    try:
        for batch in batches:
            forget_children()
            yield batch
    except (RuntimeError, ConnectionError, EOFError) as error:
        # One that is killed while it hands a clip over breaks the connection.
        is_known = not isinstance(error, RuntimeError)
        if not is_known and not str(error).startswith("DataLoader worker"):
            raise
        reason = "too little memory for --num_workers, or a video that crashes its decoder"
        raise RunError(f"a loading process was killed: {reason}") from error


@contextlib.contextmanager
def end_loading_processes() -> Iterator[None]:
    """At the end kill loading processes, which outlive a signal and for which Python would wait."""
    try:
        yield
    finally:
        forget_children()
        for child in multiprocessing.active_children():
            child.kill()
            child.join()


def forget_children() -> None:
    """Leave the end of a loading process to the loader, which looks while it waits for a clip.

    torch's handler of the signal would raise wherever the run is, in the middle of a save too.
    """
    # Windows has no such signal.
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
