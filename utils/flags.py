"""Argument types with their ranges, the flags that several scripts share, and their parser.

Each type is what argparse calls on the text of a flag; the range is part of its error message.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

UNSET = object()


class BrokenRunError(RuntimeError):
    """Ends a program by no fault of its input; the message is the line that says why."""


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


def integer_up_to(high: int, low: int = 1) -> Callable[[str], int]:
    """An argparse type for integers in [low, high]."""
    return ranged(int, f"an integer in [{low}, {high}]", lambda value: low <= value <= high)


# Counts end where a file could ask for absurd amounts of memory or time, or where an integer no longer fits.
positive_int = integer_up_to(2**31 - 1)
non_negative_int = integer_up_to(2**53 - 1, low=0)
seed_int = integer_up_to(2**63 - 1, low=0)
positive_float = ranged(float, "a number above 0", lambda value: value > 0)
non_negative_float = ranged(float, "a number of at least 0", lambda value: value >= 0)
probability = ranged(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)
fraction = ranged(float, "a number in (0, 1)", lambda value: 0 < value < 1)
decay = ranged(float, "a number in [0, 1)", lambda value: 0 <= value < 1)


class OneOrTwo(argparse.Action):
    """One number, or a list of two, such as height and width or the ends of a range; two equal ones are one."""

    def __call__(self, parser, namespace, values, option_string=None):  # noqa: D102 (argparse calls it)
        if len(values) > 2:
            parser.error(f"argument {option_string}: must be 1 or 2 numbers (got {len(values)})")
        setattr(namespace, self.dest, values[0] if values[0] == values[-1] else values)


def one_or_two(metavar: str) -> dict[str, Any]:
    """Arguments of `add_argument` for such a flag."""
    return {"type": integer_up_to(65536), "nargs": "+", "action": OneOrTwo, "metavar": metavar}


def residual_scale(text: str) -> float | str:
    """Type of --residual_scale: measured, pixel, or a number above 0."""
    return text if text in ("measured", "pixel") else positive_float(text)


def nonempty_path(text: str) -> str:
    """A path that is not empty, as an unset shell variable would be."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def device_name(text: str) -> str:
    """The name of a device, or "auto"; kept as a name, so that a checkpoint moves between machines."""
    if text != "auto" and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, mps, cuda or cuda:N (got {text})")
    return text


def switch(default: bool | None) -> dict[str, Any]:
    """Arguments of `add_argument` for a flag --NAME that has a --no-NAME."""
    return {"action": argparse.BooleanOptionalAction, "default": default}


class Parser(argparse.ArgumentParser):
    """argparse that refuses abbreviations, shows defaults, and puts an error on one line."""

    def __init__(self, description: str):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)
        self.stored_in: object = None

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit status 2; a library's words for an argument become the flag of that name."""
        if self.stored_in is not None:
            raise ValueError(f"{self.stored_in}: its args hold no valid value: {message}")
        self.exit(2, f"{self.prog}: error: {' '.join(self.in_flags(message).split())}\n")

    @contextmanager
    def one_line_end(self, stopped: str = "stopped") -> Iterator[None]:
        """Around a program's body, whose errors become one line on stderr and the exit status.

        ValueError and OSError, what the user can mend, are status 2, BrokenRunError 1, Ctrl-C is `stopped` and 130.
        """
        try:
            yield
        except BrokenRunError as error:
            self.exit(1, f"{self.prog}: {error}\n")
        except (ValueError, OSError) as error:
            self.error(str(error))
        except KeyboardInterrupt:
            self.exit(130, f"{stopped}\n")

    def in_flags(self, message: str) -> str:
        """In "NAME must ..." or "NAME may ...", replace NAME and all names with a "_", as "num_frames" by "--T"."""
        flags = {action.dest: action.option_strings[0] for action in self._actions}
        first = re.match(r"(\w+) (must|may) ", message)
        if first is None:
            return message
        names = [name for name in flags if "_" in name or first[1] == name]
        return re.sub(rf"(?<![\w/.'-])({'|'.join(names)})(?![\w/.'-])", lambda match: flags[match[1]], message)

    def parse_given(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """The flags that stand on the command line, by destination: what no checkpoint or preset may override."""
        blank = argparse.Namespace(**dict.fromkeys(vars(self.defaults()), UNSET))
        return {name: value for name, value in vars(self.parse_args(argv, blank)).items() if value is not UNSET}

    def parse_stored(self, values: Mapping[str, Any], source: object) -> dict[str, Any]:
        """Arguments that a file brings, through the rules of the command line; those of no flag are left out.

        Raises: ValueError: naming the file, the flag and the value.
        """
        words: list[str] = []
        for action in self._actions:
            value, flag = values.get(action.dest), action.option_strings[0]
            several = value if isinstance(value, list) else [value]
            is_switch = isinstance(action, argparse.BooleanOptionalAction)
            if value is None or (action.nargs == 0 and not is_switch):  # what a command does is no file's to say
                continue
            if is_switch and isinstance(value, bool):
                words.append(flag if value else f"--no-{flag.removeprefix('--')}")
            elif action.nargs in ("+", "*") and all(type(x) in (int, float) for x in several):
                words += [flag, *map(str, several)]
            elif not is_switch and action.nargs is None and type(value) in (int, float, str):
                words.append(f"{flag}={value}")
            else:
                raise ValueError(f"{source}: its args hold no valid value for {flag}")
        self.stored_in = source
        try:
            return self.parse_given(words)
        finally:
            self.stored_in = None

    def defaults(self) -> argparse.Namespace:
        """The value of every flag that is not given."""
        actions = [action for action in self._actions if action.dest != "help"]
        return argparse.Namespace(**{action.dest: action.default for action in actions})


# --- flags of the scripts that use a trained model --------------------------------------------------------------------


def add_checkpoint_flags(group: argparse._ArgumentGroup, required: bool) -> None:
    """--ckpt, --use_raw_model and --device."""
    add = group.add_argument
    add("--ckpt", required=required, help="checkpoint of train_video_ddpm.py: last.pt or best.pt")
    add("--use_raw_model", action="store_true", help="use the trained weights instead of their EMA")
    add("--device", type=device_name, default="auto", help="auto = cuda where there is one, then mps, then cpu")


def add_clip_flags(group: argparse._ArgumentGroup) -> None:
    """What a clip is made of; each is the checkpoint's unless given."""
    add = group.add_argument
    add("--T", dest="num_frames", type=positive_int, help="frames per clip; may differ from training")
    add("--size", **one_or_two("PIXELS"), help="side of squares, or height and width; may differ from training")
    add("--frame_stride", type=positive_int, help="source frames from one clip frame to the next")
    add("--endpoint_context", type=positive_int, help="observed frames K at each end; fixed by training")
    add("--color_mode", choices=("rgb", "gray"), help="3 channels or 1; fixed by training")
