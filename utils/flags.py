"""Argument types with their ranges, and the parser that both scripts share.

Each type is what argparse calls on the text of a flag; the range is part of its error message.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

UNSET = object()


def ranged(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type that accepts what `holds`; `rule` completes "must be ..."."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (isinstance(value, float) and not math.isfinite(value)) or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule} (got {text})")
        return value

    return parse


positive_int = ranged(int, "an integer of at least 1", lambda value: value >= 1)
non_negative_int = ranged(int, "an integer of at least 0", lambda value: value >= 0)
positive_float = ranged(float, "a number above 0", lambda value: value > 0)
non_negative_float = ranged(float, "a number of at least 0", lambda value: value >= 0)
probability = ranged(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)
fraction = ranged(float, "a number in (0, 1)", lambda value: 0 < value < 1)
decay = ranged(float, "a number in [0, 1)", lambda value: 0 <= value < 1)


def nonempty_path(text: str) -> str:
    """A path that is not empty, as an unset shell variable would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def device_name(text: str) -> str:
    """The name of a device, or "auto"; kept as a name, so that a checkpoint moves between machines."""
    if text != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N (got {text})")
    return text


def resolve_device(text: str) -> torch.device:
    """The device of that name; "auto" is the GPU where there is one. Without any GPU, cuda becomes cpu and says so.

    Raises: ValueError: for a GPU number that this machine does not have.
    """
    count = torch.cuda.device_count()
    if text == "auto":
        return torch.device("cuda" if count else "cpu")
    device = torch.device(text)
    if device.type == "cuda" and not count:
        print(f"--device {text}: there is no CUDA device here, going on with cpu", file=sys.stderr)
        return torch.device("cpu")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"--device must name one of the {count} CUDA devices of this machine (got {text})")
    return device


class Parser(argparse.ArgumentParser):
    """argparse that refuses abbreviations, shows defaults, and puts an error on one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit status 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The flags that stand on the command line, by destination: what no checkpoint or preset may override."""
        blank = argparse.Namespace(**dict.fromkeys(vars(self.defaults()), UNSET))
        return {name: value for name, value in vars(self.parse_args(argv, blank)).items() if value is not UNSET}

    def defaults(self) -> argparse.Namespace:
        """The value of every flag that is not given."""
        return argparse.Namespace(
            **{a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS and a.dest != "help"}
        )
