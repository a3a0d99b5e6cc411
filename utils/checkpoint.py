"""Checkpoints: one dict of tensors and plain Python types, written atomically, read without running code.

A checkpoint is not believed: torch.load(weights_only=True) runs nothing foreign, but takes a file's word for how much
there is, so the pickle is scanned first, and then every value that sampling and resuming read is checked.
"""

import io
import math
import pickle
import pickletools
import re
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.io import atomic_write

FORMAT = 1
# What Python, torch and zipfile raise over damaged or made-up files.
LOAD_ERRORS = (RuntimeError, EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, AssertionError)
LOAD_ERRORS += (ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, pickle.UnpicklingError)

# --- the pickle: what torch.load may be asked to read -----------------------------------------------------------------

ALLOWED_GLOBALS = {
    "collections OrderedDict": OrderedDict,
    "torch._utils _rebuild_tensor_v2": lambda *parts: None,
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch ByteStorage": "uint8",
}
ALLOWED_OPCODES = re.compile(
    "PROTO|MARK|STOP|NONE|NEWTRUE|NEWFALSE|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|EMPTY_DICT|SETITEMS?|EMPTY_LIST|"
    "APPENDS?|EMPTY_TUPLE|TUPLE[123]?|(LONG_)?BIN(PUT|GET)|GLOBAL|REDUCE|BUILD|BINPERSID"
)


class RestrictedUnpickler(pickle.Unpickler):
    """Reads a pickle without making a tensor: only ALLOWED_GLOBALS are known, and only members of the archive."""

    def __init__(self, data: bytes, storages: set[str]):
        super().__init__(io.BytesIO(data))
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """A stand-in for one of ALLOWED_GLOBALS."""
        return ALLOWED_GLOBALS[f"{module} {name}"]

    def persistent_load(self, key: Any) -> None:
        """Check that a storage is a member by exactly that name: torch's reader would ignore its case."""
        if key[2] not in self.storages:
            raise pickle.UnpicklingError(f"there is no storage {key[2]!r}")


def check_archive(archive: zipfile.ZipFile, size: int) -> None:
    """Refuse an archive, of `size` bytes, of which reading would take more than a few times its bytes.

    Raises: ValueError, or one of LOAD_ERRORS over what is no pickle.
    """
    entries = archive.infolist()
    names = [entry.filename.lower() for entry in entries]
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if len(set(names)) < len(names) or sum(entry.file_size for entry in entries) > size:
        raise ValueError("its members overlap")
    folder = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
    data = archive.read(f"{folder}data.pkl")
    before, tuples = "", set()
    for opcode, argument, _ in pickletools.genops(data):
        if not ALLOWED_OPCODES.fullmatch(opcode.name) or (opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS):
            raise ValueError(f"it may not contain {opcode.name} {str(argument or '')[:60]}")
        if opcode.name.endswith("BINPUT") and before.startswith("TUPLE"):
            tuples.add(argument)
        if (
            opcode.name.endswith("BINGET") and argument in tuples
        ):  # hashing a tuple of tuples, each met twice, never ends
            raise ValueError("it refers to a tuple twice")
        before = opcode.name
    RestrictedUnpickler(data, {name.removeprefix(f"{folder}data/") for name in archive.namelist()}).load()


# --- the contents: what sampling and resuming read --------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; an integer may not be one that no float can hold."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) <= 2**64


def is_integer(high: int, low: int = 0) -> Callable[[Any], bool]:
    """Whether a value is an integer in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def is_state_dict(value: Any) -> bool:
    """Whether a value is a dict of names to float32 (or, exported, float16) tensors."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(weight, Tensor) and weight.dtype in (torch.float32, torch.float16)
        for name, weight in value.items()
    )


def is_history(value: Any) -> bool:
    """Whether a value has the curves: [step, loss] pairs, and a dict of numbers or None per epoch."""
    train, epochs = value["train"], value["epochs"]
    numbers = [number for pair in train for number in pair if len(pair) == 2]
    numbers += [entry[key] for entry in epochs for key in ("step", "val_loss")]
    optional = [number for entry in epochs for number in entry.values() if number is not None]
    return len(numbers) == 2 * (len(train) + len(epochs)) and all(map(is_number, numbers + optional))


def has_numbers(*names: str) -> Callable[[Any], bool]:
    """Whether a value is a dict of numbers, or of None where there was none, in which these names are."""
    return lambda value: set(names) <= set(value) and all(x is None or is_number(x) for x in value.values())


def is_a(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is of one of these types."""
    return lambda value: isinstance(value, kinds)


COUNT = is_integer(2**53)
CONTENTS: dict[str, Callable[[Any], bool]] = {  # dotted keys; a missing value counts as None
    "step": COUNT,
    "epoch": COUNT,
    "step_in_epoch": COUNT,
    "best_val_loss": lambda value: is_number(value) or value == math.inf,
    "model": is_state_dict,
    "ema": is_state_dict,
    "optimizer.state": is_a(dict),
    "lr_scheduler": has_numbers("peak_lr", "start_lr", "start_step", "warmup_steps", "total_steps"),
    "scaler": has_numbers(),
    "rng.torch": is_a(Tensor),
    "model_config": is_a(dict),
    "model_config.image_channels": lambda value: value in (1, 3),
    "model_config.endpoint_context": is_integer(4096, 1),
    "clip_config.num_frames": is_integer(65536, 1),
    "clip_config.size": is_integer(65536, 1),
    "clip_config.frame_stride": is_integer(65536, 1),
    "clip_config.color_mode": lambda value: value in ("rgb", "gray"),
    "diffusion_config.timesteps": is_integer(100_000, 1),
    "diffusion_config.schedule": is_a(str),
    "diffusion_config.noise_offset": lambda value: is_number(value) and 0 <= value <= 100,
    "args.seed": is_integer(2**63 - 1),
    "args.val_ratio": is_number,
    "args.data_root": is_a(str, type(None)),
    "args.cache_dir": is_a(str, type(None)),
    "args.max_videos": lambda value: value is None or is_integer(2**31, 2)(value),
    "args.processes": lambda value: value is None or is_integer(2**20, 1)(value),
    "history": is_history,
    "history.sums": is_a(dict),
}


def check_contents(state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that sampling or resuming could not use.

    Raises: ValueError: naming the file, the key and the rule.
    """
    for key, holds in CONTENTS.items():
        try:
            value: Any = state
            for name in key.split("."):
                value = value.get(name)
            sound = holds(value)
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
            sound = False
        if not sound:
            raise ValueError(f"{path}: {key} is missing or out of range")
    if (state["model_config"]["image_channels"] == 1) != (state["clip_config"]["color_mode"] == "gray"):
        raise ValueError(f"{path}: its image_channels and its color_mode disagree")
    groups = [state["model"], state["ema"], *state["optimizer"]["state"].values()]
    tensors = [value for group in groups if isinstance(group, dict) for value in group.values() if is_a(Tensor)(value)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > path.stat().st_size:
        raise ValueError(f"{path}: its tensors claim more than the file holds")


# --- files ------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write `state` so that `path` is at any instant the previous or the next whole file.

    Args:
        previous: where the checkpoint that is at `path` now is kept; None = it goes.

    Raises: OSError: naming the folder and its free space, if the disk is full or the folder not writable; the file at
        `path` is then untouched.
    """
    path = Path(path)
    try:
        with atomic_write(path, previous) as file:
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

    Raises: ValueError: naming the file, if it is missing, damaged, of another format, or lacks what is needed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            check_archive(archive, path.stat().st_size)
            damaged = archive.testzip()  # torch does not compare the checksums
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = str(error)[:120] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train_video_ddpm.py (it has no 'format')")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        got = state["format"] if is_number(state["format"]) else type(state["format"]).__name__
        raise ValueError(f"{path}: checkpoint format must be {FORMAT} (got {got})")
    check_contents(state, path)
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
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
