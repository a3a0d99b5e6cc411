"""Checkpoints: one dict of tensors and plain Python types, written atomically, read without running code."""

import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from utils.io import replacing

FORMAT = 1
KEYS = (
    "format", "step", "epoch", "step_in_epoch", "model", "ema", "optimizer", "lr_scheduler", "scaler", "rng",
    "model_config", "diffusion_config", "clip_config", "args", "history", "best_val_loss",
)  # fmt: skip
NUMBER, TEXT, LIST = (int, float), str, (list, tuple)
CONTENTS = {  # what sampling and resuming read, with its type and, for a number, its range
    "model": {}, "ema": {}, "optimizer": {"state": dict, "param_groups": LIST}, "scaler": {},
    "rng": {"torch": torch.Tensor}, "history": {"train": LIST, "epochs": LIST, "sums": dict},
    "lr_scheduler": dict.fromkeys(("peak_lr", "start_lr", "start_step", "warmup_steps", "total_steps"), NUMBER),
    "model_config": {"image_channels": (1, 3), "channel_mults": LIST, "endpoint_context": (1, 4096)},
    "clip_config": {"num_frames": (3, 65536), "size": (1, 65536), "frame_stride": (1, 65536), "color_mode": TEXT},
    "diffusion_config": {"timesteps": (1, 100_000), "schedule": TEXT, "noise_offset": NUMBER},
    "args": {"batch_size": (1, 2**31), "grad_accum": (1, 2**31), "seed": (0, 2**63), "val_ratio": NUMBER},
}  # fmt: skip


def save_checkpoint(path: str | Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write `state` (all of KEYS but `format`) so that `path` is at any instant the previous or the next whole file.

    Args:
        path: the checkpoint to be.
        state: its contents.
        previous: where the checkpoint that is at `path` now is kept; None = it goes.

    Raises: OSError: naming the folder and its free space, if the disk is full or the folder not writable; the file at
        `path` is then untouched.
    """
    path = Path(path)
    try:
        with replacing(path, previous) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (RuntimeError, OSError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        free = f"{shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free" if path.parent.is_dir() else "no folder"
        raise OSError(f"{path} could not be written ({reason}; {free} in {path.parent})") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, with `weights_only=True`: nothing in the file is ever executed.

    Raises: ValueError: naming the file, if it is missing, damaged, of another format or lacks a key.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch does not compare the checksums
        if damaged is not None:
            raise ValueError(f"{path}: damaged checkpoint (wrong checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train_video_ddpm.py (it has no 'format')")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(f"{path}: checkpoint format must be {FORMAT} (got {state['format']!r})")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    for key, entries in CONTENTS.items():
        if not isinstance(state[key], dict):
            raise ValueError(f"{path}: in a checkpoint {key} must be a dict")
        for name, expected in entries.items():
            if not fits(state[key].get(name), expected):
                raise ValueError(f"{path}: {key}[{name!r}] is missing or out of range")
    return state


def fits(value: Any, expected: Any) -> bool:
    """Whether a value is of a type, or, where `expected` is a pair of numbers, an integer between them."""
    if expected not in (NUMBER, LIST) and isinstance(expected, tuple):
        return type(value) is int and expected[0] <= value <= expected[1]
    return isinstance(value, expected)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Put weights into a model, whole and fitting.

    Raises: ValueError: naming `source` and the first disagreement.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"{source}: the weights do not fit its model_config ({reason})") from error
