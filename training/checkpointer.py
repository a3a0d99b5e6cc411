"""When a run's checkpoints are written, and which of them a run goes on from."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.distributed import is_main, print0
from training.state import TrainingState
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.io import make_out_dir, remove_stale_temporaries

NAMES = ("last.pt", "prev.pt")


@dataclass
class Checkpointer:
    """Writes last.pt (keeping the one before as prev.pt) and best.pt.

    A checkpoint that cannot be written costs a line, not the run; diverged weights are not saved.
    """

    out_dir: Path
    last_is_whole: bool  # whether last.pt is readable, and so worth keeping as prev.pt
    contents: Callable[[], dict[str, Any]]
    probe_loss: Callable[[], float]  # of some batch under the weights that are to be saved
    failure: OSError | FloatingPointError | None = None  # of the newest attempt at last.pt

    def save_best(self, state: TrainingState, val_loss: float) -> None:
        """Write best.pt if the loss is the lowest; if that fails, the one before stays to beat."""
        before = state.best_val_loss
        if val_loss < before:
            state.best_val_loss = val_loss
            if self._save("best.pt", state, previous=None):
                state.best_val_loss = before

    def save_last(self, state: TrainingState) -> None:
        """Write last.pt, and keep the one before it as prev.pt."""
        previous = self.out_dir / "prev.pt" if self.last_is_whole else None
        self.failure = self._save("last.pt", state, previous)
        if self.failure is None:
            self.last_is_whole = True

    def raise_failure(self) -> None:
        """Raises: FloatingPointError or ValueError: if the newest attempt at last.pt failed."""
        if isinstance(self.failure, OSError):
            lost = "the work since the last save is lost, as last.pt could not be written"
            raise ValueError(f"--out_dir {self.out_dir}: {lost}")
        if self.failure:
            raise self.failure

    def _save(
        self, name: str, state: TrainingState, previous: Path | None
    ) -> OSError | FloatingPointError | None:
        failure: OSError | FloatingPointError
        path = self.out_dir / name
        threshold = state.metrics.threshold
        try:
            loss = self.probe_loss()
            if loss <= threshold:  # which no NaN is
                save_checkpoint(path, self.contents(), previous)
                return None
            failure = FloatingPointError(
                f"{path} is not written: the weights after step {state.step} are diverged, their "
                f"loss must be at most {threshold:g} (got {loss:g}; a lower --lr may help)"
            )
        except OSError as error:
            failure = error
        print0(f"WARNING: {failure}; earlier checkpoints are untouched", file=sys.stderr)
        return failure


@contextlib.contextmanager
def claim(out_dir: Path) -> Iterator[None]:
    """Make a run's folder, and keep other runs out of it for as long as this process lives.

    Raises: ValueError: if the folder cannot be made, or another run has it.
    """
    if not is_main():
        yield
        return
    make_out_dir(out_dir)
    with (out_dir / ".lock").open("w") as file:
        # Windows has no such locks, and not every file system has.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            try:
                # Loading processes, which may live longer, do not inherit it.
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"--out_dir {out_dir} is in use by another run") from error
        remove_stale_temporaries(out_dir)
        yield


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint to go on from."""
    return any((folder / name).exists() for name in NAMES)


def load_latest(folder: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from, and its file: last.pt, or where that is damaged prev.pt.

    Raises: ValueError: naming last.pt, if neither can be read.
    """
    failures: list[ValueError] = []
    for name in NAMES:
        try:
            checkpoint = load_checkpoint(folder / name)
        except ValueError as error:
            failures.append(error)
            continue
        if failures:
            step = checkpoint["step"]
            note = f"WARNING: {failures[0]}: going on from {folder / name}, step {step}"
            print0(note, file=sys.stderr)
        return checkpoint, folder / name
    raise failures[0]
