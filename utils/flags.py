"""Argument types with their ranges, flags that several scripts share, and their parser."""

import argparse
import difflib
import io
import math
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn


class RunError(RuntimeError):
    """Ends a program by no fault of its input; the message is the line that says why."""


def ranged(kind: type, rule: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type that accepts what `holds`; `rule` completes "must be ..."."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule} (got {text})")
        return value

    return parse


def integer_up_to(high: int, low: int = 1) -> Callable[[str], int]:
    """An argparse type for integers in [low, high]."""
    return ranged(int, f"an integer in [{low}, {high}]", lambda value: low <= value <= high)


positive_int = integer_up_to(2**31 - 1)
non_negative_int = integer_up_to(2**31 - 1, low=0)
seed_int = integer_up_to(2**63 - 1, low=0)
positive_float = ranged(float, "a number above 0", lambda value: value > 0)
non_negative_float = ranged(float, "a number of at least 0", lambda value: value >= 0)
probability = ranged(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)
fraction = ranged(float, "a number in (0, 1)", lambda value: 0 < value < 1)
decay = ranged(float, "a number in [0, 1)", lambda value: 0 <= value < 1)


class OneOrTwo(argparse.Action):
    """One number, or a list of two, such as height and width; two equal numbers are one."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: D102
        if len(values) > 2:
            parser.error(f"argument {option_string}: must be 1 or 2 numbers (got {len(values)})")
        is_one = values[0] == values[-1]
        setattr(namespace, self.dest, values[0] if is_one else values)


def one_or_two(metavar: str) -> dict[str, Any]:
    """Arguments of `add_argument` for a flag that takes one or two numbers."""
    return {
        "type": integer_up_to(65536),
        "nargs": "+",
        "action": OneOrTwo,
        "metavar": metavar,
    }


MNIST_PREFIX = "smmnist:"  # of --data_root, before the folder of MNIST's files


def nonempty_path(text: str) -> str:
    """A path that is not empty, as that of an unset shell variable would be; "~" is expanded."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return str(Path.home() / text[2:]) if text.startswith("~/") else text


def device_name(text: str) -> str:
    """The name of a device, or "auto"; a name, so that a checkpoint moves between machines."""
    if text != "auto" and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N (got {text})")
    return text


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    # As Ctrl-C does, so that temporary files are removed.
    raise KeyboardInterrupt(number)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, with defaults in the help and errors on one line."""

    def __init__(self, description: str):
        super().__init__(
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit status 2."""
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions)
            message += f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    @contextmanager
    def one_line_errors(self, stopped: str = "stopped") -> Iterator[None]:
        """Around a program's body, whose errors become one line on stderr and the exit status.

        2 = ValueError and OSError, which the user can mend; 1 = RunError and FloatingPointError;
        128 + n = stopped by signal n, for which the line is `stopped`. A warning is one line, once.
        """
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:  # it was closed
                setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
            # A console that lacks a character shows its code; a notebook's has all.
            if isinstance(getattr(sys, name), io.TextIOWrapper):
                getattr(sys, name).reconfigure(errors="backslashreplace")
        former = {}
        show_warning = warnings.showwarning
        shown = set()

        def show_once(message: Warning, *place: Any) -> None:
            line = f"note: {' '.join(str(message).split())}"
            if line not in shown:
                print(line, file=sys.stderr)
            shown.add(line)

        warnings.showwarning = show_once
        for name in ("SIGTERM", "SIGHUP"):
            number = getattr(signal, name, signal.SIGTERM)
            if signal.getsignal(number) is signal.SIG_DFL:
                former[number] = signal.signal(number, _interrupt)
        try:
            yield
        except (RunError, FloatingPointError) as error:
            self.exit(1, f"{self.prog}: {error}\n")
        except (ValueError, OSError) as error:
            self.error(str(error))
        except KeyboardInterrupt as stop:
            number = stop.args[0] if stop.args else signal.SIGINT
            self.exit(128 + number, f"{stopped}\n")
        finally:
            warnings.showwarning = show_warning
            for number, handler in former.items():
                signal.signal(number, handler)

    def flags(self) -> list[argparse.Action]:
        """Every flag but --help."""
        return [action for action in self._actions if action.dest != "help"]

    def defaults(self) -> dict[str, Any]:
        """The value of every flag that is not given, by destination."""
        return {action.dest: action.default for action in self.flags()}

    def parse_given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The flags on the command line, by destination."""
        unset = object()
        blank = argparse.Namespace(**dict.fromkeys(self.defaults(), unset))
        parsed = vars(self.parse_args(argv, blank))
        return {name: value for name, value in parsed.items() if value is not unset}

    def check_stored(self, values: dict[str, Any]) -> None:
        """Raises: ValueError: unless values that a file brings would pass as flags."""
        for action in self.flags():
            value = values[action.dest]
            several = value if isinstance(value, list) else [value]
            try:
                if action.nargs == 0:
                    sound = isinstance(value, bool)
                elif value is None:
                    sound = action.default is None
                else:
                    parsed = [self._get_value(action, str(item)) for item in several]
                    sound = parsed == several and (action.nargs or several is not value)
                    sound = sound and (not isinstance(action, OneOrTwo) or len(several) in (1, 2))
            except argparse.ArgumentError:
                sound = False
            if not sound or (action.choices and value not in [None, *action.choices]):
                raise ValueError(f"its {action.option_strings[0]} is {value!r}")


def add_sampler_flags(
    group: argparse._ArgumentGroup, spacings: Sequence[str], several: bool = False
) -> None:
    """How middle frames are sampled; with `several`, for any number of --steps and scales."""
    add = group.add_argument
    nargs = "+" if several else None
    add("--steps", type=non_negative_int, nargs=nargs, help="DDIM steps; 0 = the prediction")
    add("--spacing", choices=spacings, help="of the timesteps; quadratic = denser towards clean")
    add(
        "--guidance_scale",
        type=non_negative_float,
        nargs=nargs,
        help="weight of the contexts: 1 = conditional, above 1 = guided, two forwards per step",
    )
    add(
        "--guidance_interval",
        type=probability,
        nargs=2,
        metavar=("LO", "HI"),
        help="guide between these shares of the schedule only; 0 = clean, 1 = noise",
    )
    add("--eta", type=probability, help="0 = deterministic DDIM .. 1 = DDPM's posterior noise")
    add("--seed", type=seed_int, default=0, help="of the noise, by clip and sample")


def sampler_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The sampler settings that were given, to replace those of a checkpoint's default."""
    names = ("steps", "spacing", "guidance_scale", "guidance_interval", "eta")
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}
