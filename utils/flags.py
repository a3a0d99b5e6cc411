"""Argument types with their ranges, the flags that several scripts share, and their parser.

Each type is what argparse calls on the text of a flag; the range is part of its error message.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
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


def add_checkpoint_flags(group: argparse._ArgumentGroup, required: bool) -> None:
    """--ckpt, --use_raw_model and --device, of the scripts that use a trained model."""
    group.add_argument("--ckpt", required=required, help="checkpoint of train_video_ddpm.py: last.pt or best.pt")
    group.add_argument("--use_raw_model", action="store_true", help="the trained weights instead of their EMA")
    group.add_argument("--device", type=device_name, default="auto", help="auto = cuda where there is one, else cpu")


def add_clip_flags(group: argparse._ArgumentGroup) -> None:
    """What a clip is made of; each is the checkpoint's unless given."""
    group.add_argument("--T", dest="num_frames", type=positive_int, help="frames per clip; may differ from training")
    group.add_argument("--size", type=positive_int, help="height and width in pixels; may differ from training")
    group.add_argument("--frame_stride", type=positive_int, help="source frames from one clip frame to the next")
    group.add_argument("--endpoint_context", type=positive_int, help="observed frames K at each end; fixed by training")
    group.add_argument("--color_mode", choices=("rgb", "gray"), help="fixed by training")


def add_sampler_flags(
    group: argparse._ArgumentGroup,
    samplers: Sequence[str],
    spacings: Sequence[str],
    presets: Mapping[str, str],
    several: bool = False,
) -> None:
    """How middles are sampled.

    Args:
        group: where the flags go.
        samplers: choices of --sampler.
        spacings: choices of --spacing.
        presets: choices of --preset, each with its description.
        several: whether --preset, --sampler, --steps and --guidance_scale take any number of values.
    """
    grid = {"nargs": "+"} if several else {}
    each = "; several values = every combination" if several else ""
    described = "; ".join(f"{name} = {description}" for name, description in presets.items())
    group.add_argument(
        "--preset", choices=tuple(presets), **grid,
        help=f"the values of those flags below that are not given: {described}; None = fast, or reference where "
        "--sampler, --steps, --spacing, --guidance_scale, --guidance_interval or --eta is given",
    )  # fmt: skip
    group.add_argument(
        "--sampler", choices=tuple(samplers), **grid,
        help=f"ddim, or dpmpp_2m: second order, DPM-Solver++(2M); None = the preset's{each}",
    )  # fmt: skip
    group.add_argument(
        "--steps", type=positive_int, **grid,
        help=f"sampler steps, at most the schedule's length; None = the preset's{each}",
    )  # fmt: skip
    group.add_argument(
        "--spacing", choices=tuple(spacings),
        help="timesteps visited: linspace = evenly, quadratic = closer together towards clean frames, trailing = "
        "evenly and ending a stride above clean; None = the preset's",
    )  # fmt: skip
    group.add_argument(
        "--guidance_scale", type=non_negative_float, **grid,
        help="1 = plain conditional (half the work), above 1 = contexts weigh more, 0 = contexts ignored; "
        f"None = the preset's{each}",
    )  # fmt: skip
    group.add_argument(
        "--guidance_interval", type=probability, nargs=2, metavar=("LO", "HI"),
        help="guide between these shares of the noise schedule only, 0 = clean, 1 = noise; elsewhere one forward per "
        "step does; None = the preset's",
    )  # fmt: skip
    group.add_argument(
        "--eta", type=probability, help="0 = deterministic .. 1 = DDPM's noise, ddim only; None = the preset's"
    )
    group.add_argument("--seed", type=non_negative_int, default=0, help="of the noise, per clip and sample")
    group.add_argument(
        "--clip_x0", action=argparse.BooleanOptionalAction, default=True,
        help="clip clean predictions to the range of pixels at every step",
    )  # fmt: skip
    group.add_argument(
        "--dynamic_threshold", action=argparse.BooleanOptionalAction, default=False,
        help="scale clean predictions by a percentile instead of clipping them",
    )  # fmt: skip
    group.add_argument(
        "--batch_size", type=positive_int, default=8, help="clips at once; results depend on it by rounding only"
    )
    group.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=True,
        help="bf16 autocast on a GPU that has it; does nothing on CPU",
    )  # fmt: skip
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile the network: a minute or more at the start, for many clips",
    )  # fmt: skip


def warn_of_guidance(ckpt: str) -> None:
    """Say that a checkpoint was trained without the branch that guidance needs."""
    print(
        f"note: {ckpt} has no trained unconditional branch: it needs --guidance_scale 1 (--preset fast beside it)",
        file=sys.stderr,
    )


def settle_clip_flags(args: argparse.Namespace, checkpoint: dict[str, Any]) -> None:
    """Fill the clip flags that were not given from the checkpoint, and check those that were.

    Raises: ValueError: naming the flag, the rule and the value.
    """
    fixed = {
        "endpoint_context": checkpoint["model_config"]["endpoint_context"],
        "color_mode": checkpoint["clip_config"]["color_mode"],
    }
    for name, value in fixed.items():
        if getattr(args, name) not in (None, value):
            raise ValueError(f"--{name} is fixed by {args.ckpt} (got {getattr(args, name)}, trained with {value})")
        setattr(args, name, value)
    for name in ("num_frames", "size", "frame_stride"):
        if getattr(args, name) is None:
            setattr(args, name, checkpoint["clip_config"][name])
    check_frame_count(args)
    multiple = 2 ** len(checkpoint["model_config"]["channel_mults"])
    if args.size % multiple:
        raise ValueError(f"--size must be divisible by {multiple}, as the network's levels halve it (got {args.size})")


def check_frame_count(args: argparse.Namespace) -> None:
    """Raises: ValueError: unless --T leaves a middle between the observed ends."""
    t, k = args.num_frames, args.endpoint_context
    if t <= 2 * k:
        raise ValueError(f"--T must exceed 2 * {k} observed frames so that a middle exists (got {t})")


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

    def check_stored(self, values: Mapping[str, Any], source: object) -> None:
        """Hold values that a file brings to the rules of the command line.

        Args:
            values: by destination; those of no flag are left out.
            source: the file, for the error.

        Raises: ValueError: naming the file, the flag and the value.
        """
        for action in self._actions:
            if action.dest not in values or values[action.dest] is None and action.default is None:
                continue
            value = values[action.dest]
            if action.nargs in ("+", "*"):
                fine = isinstance(value, list) and all(self._accepts(action, entry) for entry in value)
            else:
                fine = self._accepts(action, value)
            if not fine:
                raise ValueError(
                    f"{source}: its args hold no value for {action.option_strings[0]}: {str(value)[:60]!r}"
                )

    @staticmethod
    def _accepts(action: argparse.Action, value: Any) -> bool:
        if isinstance(action, argparse.BooleanOptionalAction):
            return type(value) is bool
        if type(value) not in (int, float, str):
            return False
        try:
            parsed = (action.type or str)(str(value))
        except argparse.ArgumentTypeError:
            return False
        return parsed == value and (not action.choices or value in action.choices)

    def defaults(self) -> argparse.Namespace:
        """The value of every flag that is not given."""
        return argparse.Namespace(
            **{a.dest: a.default for a in self._actions if a.default is not argparse.SUPPRESS and a.dest != "help"}
        )
