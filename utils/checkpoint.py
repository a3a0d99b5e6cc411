"""Checkpoints: one dict of tensors and plain Python types, written atomically, read without running code."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
KEYS = (
    "format", "step", "epoch", "step_in_epoch", "model", "ema", "optimizer", "lr_scheduler", "scaler", "rng",
    "model_config", "diffusion_config", "clip_config", "args", "history", "best_val_loss",
)  # fmt: skip
MAPPINGS = ("model", "ema", "optimizer", "scaler", "model_config", "diffusion_config", "clip_config", "args", "history")


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state` (all of KEYS but `format`) so that `path` is at any instant the previous or the next whole file.

    Raises: OSError: if the disk is full or the folder not writable; the file at `path` is then untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except RuntimeError as error:  # torch's zip writer reports a full disk so
        raise OSError(f"{path}: could not be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with `weights_only=True`: nothing in the file is ever executed.

    Raises: ValueError: naming the file, if it is missing, damaged, of another format or lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train_video_ddpm.py (it has no 'format')")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format must be {FORMAT} (got {state['format']!r})")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    wrong = [key for key in MAPPINGS if not isinstance(state[key], dict)]
    if wrong:
        raise ValueError(f"{path}: in a checkpoint {', '.join(wrong)} must be a dict")
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Put weights into a model, whole and fitting.

    Raises: ValueError: naming `source` and the first disagreement.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"{source}: the weights do not fit its model_config ({reason})") from error
