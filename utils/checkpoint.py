"""Checkpoints: one dict of tensors and plain Python types, written atomically, read without running code.

A checkpoint is not believed: torch.load(weights_only=True) runs nothing foreign, but takes a file's word for how much
there is, so the pickle is scanned first, and then every value that sampling and resuming read is checked.
"""

import io
import json
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
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.io import atomic_write

FORMAT = 1
SAFE_SUFFIX = ".safetensors"
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
    """Reads a pickle without making a tensor: it knows ALLOWED_GLOBALS alone, and only `storages` of the archive."""

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
    """Refuse an archive, of `size` bytes, that is damaged or would take more than a few times its bytes to read."""
    entries, names = archive.infolist(), archive.namelist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed")
    if len({name.lower() for name in names}) < len(names) or sum(entry.file_size for entry in entries) > size:
        raise ValueError("its members overlap")
    folder = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
    data = archive.read(f"{folder}data.pkl")
    before, tuples = "", set()
    for opcode, argument, _ in pickletools.genops(data):
        if not ALLOWED_OPCODES.fullmatch(opcode.name) or (opcode.name == "GLOBAL" and argument not in ALLOWED_GLOBALS):
            raise ValueError(f"it may not contain {opcode.name} {str(argument or '')[:60]}")
        if opcode.name.endswith("BINPUT") and before.startswith("TUPLE"):
            tuples.add(argument)
        if opcode.name.endswith("BINGET") and argument in tuples:  # such tuples in one another are endless to hash
            raise ValueError("it refers to a tuple twice")
        before = opcode.name
    RestrictedUnpickler(data, {name.removeprefix(f"{folder}data/") for name in names}).load()
    if (damaged := archive.testzip()) is not None:  # torch does not compare the checksums
        raise ValueError(f"wrong checksum of {damaged}")


# --- the contents: what sampling and resuming read --------------------------------------------------------------------


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; an integer may not be one that no float can hold."""
    return abs(value) <= 2**64 if type(value) is int else type(value) is float and math.isfinite(value)


def is_integer(high: int, low: int = 0) -> Callable[[Any], bool]:
    """Whether a value is an integer in [low, high]."""
    return lambda value: type(value) is int and low <= value <= high


def is_frame_size(value: Any) -> bool:
    """Whether a value is the side of square frames, or height and width."""
    return all(map(is_integer(65536, 1), value if isinstance(value, list) and len(value) == 2 else [value]))


def is_state_dict(*dtypes: torch.dtype) -> Callable[[Any], bool]:
    """Whether a value is a dict of names to tensors of these types."""
    return lambda value: (
        isinstance(value, dict)
        and all(
            isinstance(name, str) and isinstance(weight, Tensor) and weight.dtype in dtypes
            for name, weight in value.items()
        )
    )


def has_numbers(*names: str) -> Callable[[Any], bool]:
    """Whether a value is a dict of numbers in which these names are."""
    return lambda value: isinstance(value, dict) and {*names} <= {*value} and all(map(is_number, value.values()))


def is_history(value: Any) -> bool:
    """Whether a value has the curves: [step, loss] pairs, and for each epoch numbers, or None where there was none."""
    train, epochs = value["train"], value["epochs"]
    return (
        isinstance(train, list)
        and isinstance(epochs, list)
        and sum(map(len, epochs)) <= 10**7  # one entry met many times is a small file
        and all(len(pair) == 2 and all(map(is_number, pair)) for pair in train)
        and all(is_number(entry["step"]) and is_number(entry["val_loss"]) for entry in epochs)
        and all(x is None or is_number(x) for entry in epochs for x in entry.values())
    )


def is_a(*kinds: type) -> Callable[[Any], bool]:
    """Whether a value is of one of these types."""
    return lambda value: isinstance(value, kinds)


Rules = dict[str, Callable[[Any], bool]]  # of dotted keys; a missing value counts as None

SAMPLING: Rules = {  # what every checkpoint holds
    "step": is_integer(2**53),
    "ema": is_state_dict(torch.float32, torch.float16),
    "model_config": is_a(dict),
    "model_config.image_channels": lambda value: type(value) is int and value in (1, 3),
    "model_config.endpoint_context": is_integer(4096, 1),
    **dict.fromkeys(("clip_config.num_frames", "clip_config.frame_stride"), is_integer(65536, 1)),
    "clip_config.size": is_frame_size,
    "clip_config.color_mode": lambda value: value in ("rgb", "gray"),
    "diffusion_config.timesteps": is_integer(100_000, 1),
    "diffusion_config.schedule": lambda value: isinstance(value, str) and len(value) < 40,
    "diffusion_config.noise_offset": lambda value: is_number(value) and 0 <= value <= 100,
    "diffusion_config.noise_correlation": lambda value: value is None or (is_number(value) and 0 <= value < 1),
    "diffusion_config.predictor": lambda value: value in (None, "none", "cross_fade", "learned", "flow", "rife"),
    "diffusion_config.residual_scale": lambda value: value in (None, "pixel") or (is_number(value) and value > 0),
    "args.cfg_drop_prob": lambda value: value is None or is_number(value),
    "args.seed": is_integer(2**63 - 1),
    "args.val_ratio": is_number,
    **dict.fromkeys(("args.data_root", "args.cache_dir"), is_a(str, type(None))),
    "args.max_videos": lambda value: value is None or is_integer(2**31, 2)(value),
    "args.predictor_steps": lambda value: value is None or is_integer(2**53)(value),
    "history": is_history,
}
TRAINING: Rules = {  # what resuming needs beside it, and exported weights are without
    **dict.fromkeys(("epoch", "step_in_epoch"), is_integer(2**53)),
    "best_val_loss": lambda value: is_number(value) or value == math.inf,
    **dict.fromkeys(("model", "ema"), is_state_dict(torch.float32)),
    "optimizer.state": is_a(dict),
    "lr_scheduler": has_numbers("peak_lr", "start_lr", "start_step", "warmup_steps", "total_steps"),
    "scaler": has_numbers(),
    "rng.torch": is_a(Tensor),
    **dict.fromkeys(("args.batch_size", "args.grad_accum"), is_integer(4096, 1)),
    "args.processes": lambda value: value is None or is_integer(2**20, 1)(value),
    "history.sums": lambda value: has_numbers()(value | {"grad_norm": 0}),  # that alone may be infinite
    "history.sums.grad_norm": is_a(float, type(None)),
}


def check_contents(state: dict[str, Any], path: Path, rules: Rules) -> None:
    """Refuse a checkpoint that breaks one of `rules`, in a ValueError that names the file and the key."""
    for key, holds in rules.items():
        try:
            sound = bool(holds(reduce(dict.get, key.split("."), state)))
        except LOAD_ERRORS:  # of a rule that met another kind of value
            sound = False
        if not sound:
            raise ValueError(f"{path}: {key} is missing or out of range")
    if (state["model_config"]["image_channels"] == 1) != (state["clip_config"]["color_mode"] == "gray"):
        raise ValueError(f"{path}: its image_channels and its color_mode disagree")
    claimed, size = 0, path.stat().st_size
    moments = state["optimizer"]["state"].values() if rules is TRAINING else ()
    for group in (state["ema"], state["model"] if rules is TRAINING else {}, *moments):
        for value in group.values() if isinstance(group, dict) else ():
            claimed += 1 + (value.nbytes if isinstance(value, Tensor) else 0)
            if claimed > size:
                raise ValueError(f"{path}: its tensors claim more than the file holds")


# --- files ------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, state: dict[str, Any], previous: Path | None = None) -> None:
    """Write `state` atomically; what was at `path` is kept at `previous`. An OSError names the folder's free space."""
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


def save_weights(path: str | Path, checkpoint: dict[str, Any]) -> None:
    """Write what sampling needs of a loaded checkpoint: its EMA in half precision, its configuration.

    Raises: ValueError: for a name that ends in .safetensors where that package is absent.
    """
    kept = ("step", "model_config", "diffusion_config", "clip_config", "args", "history")
    state = {name: checkpoint[name] for name in kept}
    ema = {name: weight.half() for name, weight in checkpoint["ema"].items()}
    if Path(path).suffix != SAFE_SUFFIX:
        save_checkpoint(path, state | {"ema": ema})
        return
    from safetensors.torch import save

    contiguous = {name: weight.contiguous() for name, weight in ema.items()}
    with atomic_write(Path(path)) as file:
        file.write(save(contiguous, {"checkpoint": json.dumps({"format": FORMAT, **state})}))


def load_safetensors(path: Path) -> dict[str, Any]:
    """Exported weights in that form, as `load_checkpoint` gives them; it cannot hold code."""
    if find_spec("safetensors") is None:
        raise ValueError("it needs pip install safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            ema = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return json.loads(file.metadata()["checkpoint"]) | {"ema": ema}
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def load_checkpoint(path: str | Path, resumable: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, executing nothing in it; a ValueError names a file that is not to be used.

    Weights of `save_weights` are a checkpoint, too, unless it is to be `resumable`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint")
    try:
        if path.suffix == SAFE_SUFFIX:
            state = load_safetensors(path)
        else:
            with zipfile.ZipFile(path) as archive:
                check_archive(archive, path.stat().st_size)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except LOAD_ERRORS as error:
        reason = str(error)[:120] if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a checkpoint of train_video_ddpm.py (it has no 'format')")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        got = state["format"] if is_number(state["format"]) else type(state["format"]).__name__
        raise ValueError(f"{path}: checkpoint format must be {FORMAT} (got {got})")
    check_contents(state, path, SAMPLING)
    if resumable or "optimizer" in state:
        check_contents(state, path, TRAINING)
    return state


def load_weights(model: torch.nn.Module, weights: dict[str, Tensor], source: str | Path) -> None:
    """Put weights into a model; a ValueError names `source` and the first that is missing, unknown or does not fit.

    A "meta" model takes the tensors themselves: nothing is allocated for a model_config that does not fit its weights.
    """
    try:
        # a plain dict, as torch notes "assign" in the metadata of a state dict and would heed it in every later loading
        floats = {name: weight.float() for name, weight in weights.items()}  # of half precision, too
        model.load_state_dict(floats, assign=next(model.parameters()).is_meta)
    except RuntimeError as error:
        reason = " ".join(str(error).splitlines()[1:2]).strip()
        raise ValueError(f"{source}: the weights do not fit its model_config ({reason[:200]})") from error
