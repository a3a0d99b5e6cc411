"""When a run's checkpoints are written, and which of them a run goes on from."""

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from training.state import TrainingState, check_resumable
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.distributed import print0
from utils.io import remove_stale_temporaries


@dataclass
class Checkpointer:
    """Writes last.pt (keeping the one before as prev.pt) and best.pt.

    One that cannot be written costs a line, not the run. One whose weights are diverged is not written.
    """

    out_dir: Path
    last_is_whole: bool  # whether last.pt is known to be readable, and so worth keeping as prev.pt
    contents: Callable[[], dict[str, Any]]  # what is to be saved
    probe_loss: Callable[[], float]  # the loss of some batch under the weights that are to be saved
    every_steps: int = 0  # steps between saves of last.pt; 0 = none
    every_minutes: float = 0.0  # likewise
    failure: OSError | FloatingPointError | None = None  # of the newest attempt at last.pt
    tried_at: float = field(default_factory=lambda: time.monotonic())  # of the newest attempt

    def due(self, step: int) -> bool:
        """Whether a save is due after this step."""
        minutes = (time.monotonic() - self.tried_at) / 60
        by_steps = self.every_steps and step % self.every_steps == 0
        return bool(by_steps or (self.every_minutes and minutes >= self.every_minutes))

    def save_best(self, state: TrainingState, val_loss: float) -> None:
        """Write best.pt if this is the lowest loss; if that fails, the best before stays the one to beat."""
        before = state.best_val_loss
        if val_loss < before:
            state.best_val_loss = val_loss
            if self._save("best.pt", state, None):
                state.best_val_loss = before

    def save_last(self, state: TrainingState) -> bool:
        """Write last.pt, and keep the one before it as prev.pt; returns whether it could be written."""
        self.tried_at = time.monotonic()
        self.failure = self._save("last.pt", state, self.out_dir / "prev.pt" if self.last_is_whole else None)
        self.last_is_whole |= self.failure is None
        return self.failure is None

    def raise_failure(self) -> None:
        """Raises: FloatingPointError or ValueError: if the newest attempt at last.pt failed."""
        if isinstance(self.failure, OSError):
            lost = "the work since the last save is lost, as it could not be written"
            raise ValueError(f"--out_dir {self.out_dir}: {lost}")
        if self.failure:
            raise self.failure

    def _save(self, name: str, state: TrainingState, previous: Path | None) -> OSError | FloatingPointError | None:
        failure: OSError | FloatingPointError
        try:
            loss, threshold = self.probe_loss(), state.metrics.threshold
            if loss <= threshold:  # not so where it is no number
                save_checkpoint(self.out_dir / name, self.contents(), previous)
                return None
            failure = FloatingPointError(
                f"{self.out_dir / name} is not written: the weights after step {state.step} are diverged, their loss "
                f"must be at most {threshold:g} (got {loss:g}; a lower --lr or --warmup_steps may help)"
            )
        except OSError as error:
            failure = error
        tqdm.write(f"WARNING: {failure}; what was saved before is untouched", file=sys.stderr)
        return failure


def load_latest(folder: Path) -> tuple[dict[str, Any], Path]:
    """The checkpoint to go on from, and its file: last.pt, or prev.pt with a loud line where last.pt is damaged.

    Raises: ValueError: naming last.pt, if neither can be resumed from.
    """
    failures: list[ValueError] = []
    for path in (folder / "last.pt", folder / "prev.pt"):
        try:
            checkpoint = load_checkpoint(path, resumable=True)
            check_resumable(checkpoint, path)
        except ValueError as error:
            failures.append(error)
            continue
        if failures:
            print0(f"WARNING: {failures[0]}: going on from {path}, step {checkpoint['step']}", file=sys.stderr)
        return checkpoint, path
    raise failures[0]


def make_out_dir(out_dir: Path, cache_dir: str, empty: bool) -> None:
    """Make the run's folder, or ValueError; remove what killed processes left behind there and in the cache."""
    if empty:
        shutil.rmtree(out_dir, ignore_errors=True)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir}: cannot be made ({error.strerror})") from error
    remove_stale_temporaries(out_dir)
    remove_stale_temporaries(Path(cache_dir), untouched=3600)  # half a cache of frames is large
