"""Checkpoints: one dict of tensors and plain Python types, written atomically, read without running code."""

import math
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils.io import replacing
from utils.safe_pickle import check_archive

FORMAT = 1
KEYS = (
    "format", "step", "epoch", "step_in_epoch", "model", "ema", "optimizer", "lr_scheduler", "scaler", "rng",
    "model_config", "diffusion_config", "clip_config", "args", "history", "best_val_loss",
)  # fmt: skip
# A checkpoint is somebody's word until it is checked: every number has bounds, every tensor the bytes it claims.
LARGEST_COUNT, LARGEST_NUMBER = 2**53, 2**64
LIMITS = {  # of a run's arguments
    "num_frames": 65536, "size": 65536, "frame_stride": 65536, "endpoint_context": 4096, "timesteps": 100_000,
    "batch_size": 4096, "grad_accum": 4096, "max_videos": 2**31, "seed": 2**63, "noise_offset": 100,
    "epochs": 2**31, "max_steps": 2**53, "warmup_steps": 2**53,
}  # fmt: skip
LARGEST_TREE = 10**7  # values in all: lists that hold themselves many times over are small files, but endless to walk
# What Python, torch and zipfile raise over damaged or made-up files.
LOAD_ERRORS = (
    RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, AssertionError,
    ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError,
)  # fmt: skip


def integer(low: int, high: int) -> Callable[[Any], bool]:
    """Whether a value is an integer in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def within(name: str) -> Callable[[Any], bool]:
    """Whether a value is an integer from 1 to one of LIMITS."""
    return integer(1, LIMITS[name])


def number(value: Any) -> bool:
    """Whether a value is a finite number; an integer may not be one that no float can hold."""
    if type(value) is int:
        return abs(value) <= LARGEST_NUMBER
    return type(value) is float and math.isfinite(value)


def numbers(value: Any) -> bool:
    """Whether a value is a dict of names to numbers, or to None where there was none."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and (entry is None or number(entry)) for name, entry in value.items()
    )


def sums(value: Any) -> bool:
    """Whether a value is a tally: numbers, of which the last gradient norm alone may be anything."""
    return (
        isinstance(value, dict)
        and numbers({**value, "grad_norm": 0})
        and isinstance(value.get("grad_norm", 0.0), (int, float))
    )


def pairs(value: Any) -> bool:
    """Whether a value is a list of pairs of numbers."""
    return isinstance(value, list) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(number, pair)) for pair in value
    )


def epochs(value: Any) -> bool:
    """Whether a value is the history of epochs."""
    return isinstance(value, list) and all(
        numbers(entry) and number(entry.get("step")) and number(entry.get("val_loss")) for entry in value
    )


def weights(value: Any) -> bool:
    """Whether a value is a dict of names to float32 tensors."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) and weight.dtype == torch.float32
        for name, weight in value.items()
    )


def levels(value: Any) -> bool:
    """Whether a value is a list with an entry for each level of a network, as many as sizes can be halved."""
    return isinstance(value, (list, tuple)) and 0 < len(value) <= 16


def word(value: Any) -> bool:
    """Whether a value is a short text."""
    return isinstance(value, str) and len(value) < 40


def offset(value: Any) -> bool:
    """Whether a value may be a --noise_offset."""
    return number(value) and 0 <= value <= LIMITS["noise_offset"]


def is_a(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is of one of these types."""
    return lambda value: isinstance(value, kinds)


def optional(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Whether a value is None, or missing, or what another rule says."""
    return lambda value: value is None or holds(value)


CONTENTS: dict[str, Any] = {  # what sampling and resuming read, and what each value must be
    "step": integer(0, LARGEST_COUNT), "epoch": integer(0, LARGEST_COUNT), "step_in_epoch": integer(0, LARGEST_COUNT),
    "best_val_loss": lambda value: number(value) or (type(value) is float and value == math.inf),
    "model": weights, "ema": weights, "scaler": numbers, "optimizer": {"state": is_a(dict), "param_groups": is_a(list)},
    "rng": {"torch": lambda value: isinstance(value, torch.Tensor) and value.dtype == torch.uint8},
    "history": {"train": pairs, "epochs": epochs, "sums": sums},
    "lr_scheduler": dict.fromkeys(("peak_lr", "start_lr", "start_step", "warmup_steps", "total_steps"), number),
    "model_config": {
        "image_channels": lambda value: integer(1, 3)(value) and value != 2, "channel_mults": levels,
        "endpoint_context": within("endpoint_context"),
    },
    "clip_config": {
        "num_frames": within("num_frames"), "size": within("size"), "frame_stride": within("frame_stride"),
        "color_mode": lambda value: isinstance(value, str) and value in ("rgb", "gray"),
    },
    "diffusion_config": {"timesteps": within("timesteps"), "schedule": word, "noise_offset": offset},
    "args": {
        "batch_size": within("batch_size"), "grad_accum": within("grad_accum"), "seed": integer(0, LIMITS["seed"]),
        "val_ratio": number, "processes": optional(integer(1, 2**20)), "max_videos": optional(within("max_videos")),
        "data_root": optional(is_a(str)), "cache_dir": optional(is_a(str)),
    },
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
        first: BaseException = error
        while not isinstance(first, OSError) and first.__context__ is not None:  # that writer's own words are obscure
            first = first.__context__
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0]
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
            check_archive(archive, path.stat().st_size)
            damaged = archive.testzip()  # torch does not compare the checksums
        if damaged is not None:
            raise ValueError(f"{path}: damaged checkpoint (wrong checksum of {damaged})")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        if str(error).startswith(f"{path}: "):
            raise
        reason = str(error)[:120] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train_video_ddpm.py (it has no 'format')")
    if not integer(FORMAT, FORMAT)(state["format"]):
        got = state["format"] if number(state["format"]) else type(state["format"]).__name__
        raise ValueError(f"{path}: checkpoint format must be {FORMAT} (got {got})")
    missing = [key for key in KEYS if key not in state]
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {', '.join(missing)}")
    check_plain(state, path)
    for key, rule in CONTENTS.items():
        for name, holds in rule.items() if isinstance(rule, dict) else ((None, rule),):
            if isinstance(rule, dict) and not isinstance(state[key], dict):
                raise ValueError(f"{path}: in a checkpoint {key} must be a dict")
            if not holds(state[key] if name is None else state[key].get(name)):
                where = key if name is None else f"{key}[{name!r}]"
                raise ValueError(f"{path}: {where} is missing or out of range")
    if (state["model_config"]["image_channels"] == 1) != (state["clip_config"]["color_mode"] == "gray"):
        raise ValueError(f"{path}: its image_channels and its color_mode disagree")
    return state


def check_plain(state: dict[str, Any], path: Path) -> None:
    """Refuse what is no tree of plain values, or too large for its file.

    Raises: ValueError: naming the file.
    """
    waiting, seen, claimed = [state], 0, 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if isinstance(value, (dict, list, tuple)):
            if seen + len(waiting) + 2 * len(value) > LARGEST_TREE:
                raise ValueError(f"{path}: a checkpoint may hold {LARGEST_TREE} values at most")
            waiting += [*value.keys(), *value.values()] if isinstance(value, dict) else value
        elif isinstance(value, torch.Tensor):
            claimed += value.numel() * value.element_size()
            if value.layout != torch.strided or not value.is_cpu or claimed > path.stat().st_size:
                raise ValueError(f"{path}: its tensors claim more than the file holds")
        elif not isinstance(value, (str, int, float, type(None))):
            raise ValueError(f"{path}: a checkpoint may not hold a {type(value).__name__}")


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], source: str | Path) -> None:
    """Put weights into a model, whole and fitting.

    A model on the "meta" device, which has shapes alone, takes the tensors themselves: nothing is allocated for a
    model_config before it was found to be that of the weights.

    Raises: ValueError: naming `source` and the first disagreement.
    """
    try:
        # a plain dict, as torch notes "assign" in the metadata of a state dict and would heed it in every later loading
        model.load_state_dict(dict(weights), assign=next(model.parameters()).is_meta)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"{source}: the weights do not fit its model_config ({reason[:200]})") from error
