"""Checkpoints: one dict of tensors and plain Python types, written atomically.

A checkpoint is trusted as the field trusts one: the archive's checksums, torch.load with
weights_only, the values that are read, strict loading. Whatever fails is one line that names the
file. A file made to exhaust memory is not refused.
"""

import contextlib
import math
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.io import atomic_write
from utils.video_utils import as_pair

FORMAT = 3
# What Python, torch and zipfile raise over damaged, foreign and mutated files.
LOAD_ERRORS = (RuntimeError, OSError, EOFError, LookupError, TypeError, ValueError)
LOAD_ERRORS += (AttributeError, AssertionError, ArithmeticError, MemoryError)
LOAD_ERRORS += (struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError)


@contextlib.contextmanager
def checkpoint_errors(path: str | Path) -> Iterator[None]:
    """Turn whatever goes wrong over a checkpoint into a ValueError that names its file."""
    try:
        yield
    except LOAD_ERRORS as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: not a usable checkpoint ({words or type(error).__name__})"
        ) from error


def save_checkpoint(path: str | Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write `state` atomically; what was at `path` is kept at `previous`.

    Raises: OSError: naming the file, the reason and the space that is left.
    """
    path = Path(path)
    try:
        with atomic_write(path, previous) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (RuntimeError, OSError) as error:
        # torch's zip writer reports a full disk as a RuntimeError in obscure words.
        first: BaseException = error
        while not isinstance(first, OSError) and first.__context__ is not None:
            first = first.__context__
        reason = getattr(first, "strerror", None) or str(first).splitlines()[0]
        free = shutil.disk_usage(path.parent).free / 2**20 if path.parent.is_dir() else 0
        raise OSError(f"{path} could not be written ({reason}; {free:.0f} MiB free)") from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is run.

    Raises: ValueError: naming a file that is absent, damaged or not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a checkpoint" if path.is_dir() else "no such checkpoint"
        raise ValueError(f"{path}: {what}")
    with checkpoint_errors(path):
        with zipfile.ZipFile(path) as archive:
            # torch packs nothing, and does not compare the checksums.
            if any(entry.compress_type or entry.external_attr for entry in archive.infolist()):
                raise ValueError("it is packed")
            if archive.testzip() is not None:
                raise ValueError(f"wrong checksum of {archive.testzip()}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"its format must be {FORMAT}, got {str(state['format'])[:40]}")
        check_values(state)
    return state


def check_values(state: dict[str, Any]) -> None:
    """Raises: ValueError and others of LOAD_ERRORS: unless the plain values can be worked with."""
    clip = state["clip_config"]
    height, width = as_pair(clip["size"])
    timesteps = state["diffusion_config"]["timesteps"]
    noise = state["diffusion_config"]
    counts = (clip["num_frames"], clip["frame_stride"], height, width, timesteps)
    if not all(type(count) is int and 0 < count < 2**31 for count in counts):
        raise ValueError(f"clip_config is {clip}, timesteps is {timesteps}")
    if clip["color_mode"] not in ("rgb", "gray") or type(state["step"]) is not int:
        raise ValueError(f"color_mode is {clip['color_mode']}, step is {state['step']}")
    if not (0 <= noise["noise_correlation"] < 1 and 0 <= noise["noise_offset"] <= 100):
        raise ValueError(f"diffusion_config is {noise}")
    history = state["history"]
    numbers = [number for pair in history["train"] for number in pair]
    numbers += [entry[name] for entry in history["epochs"] for name in ("step", "val_loss")]
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError("history holds what is not a number")


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Put weights into a module, strictly; half precision becomes float32.

    A module on "meta" takes the tensors themselves.

    Raises: ValueError: naming the file `source` and what is missing, unknown or of another shape.
    """
    with checkpoint_errors(source):
        floats = {name: weight.float() for name, weight in weights.items()}
        is_meta = next(module.parameters()).is_meta
        module.load_state_dict(floats, assign=is_meta)
