"""Where else a run's numbers go beside metrics.jsonl: TensorBoard, wandb or trackio, each an optional package."""

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "middle-frame-video"


def check_logger(name: str) -> None:
    """Refuse one of TRACKERS, or "none", whose package is not installed: ValueError, naming it."""
    spec = None if name == "none" else find_spec(name)
    if name != "none" and (spec is None or spec.loader is None):  # a folder of that name is no package
        raise ValueError(f"--logger {name} needs the package {name}: pip install {name}")


def open_tracker(args: argparse.Namespace, out_dir: Path, step: int) -> "Tracker | None":
    """The tracker of --logger for a run that stands at `step`, or None."""
    if args.logger == "none":
        return None
    below = out_dir / "tensorboard" if args.logger == "tensorboard" else out_dir  # wandb makes a folder of its name
    return Tracker(args.logger, Path(args.log_dir or below), out_dir.name, vars(args), step)


class Tracker:
    """Sends scalars and pictures to the package of that name; TensorBoard's and wandb's files go to `folder`.

    A run that goes on at `step` goes on in TensorBoard and trackio; in wandb it is another run of the same name.

    Raises: ValueError: if wandb is neither logged in nor told to stay offline.
    """

    def __init__(self, name: str, folder: Path, run: str, config: Mapping[str, Any], step: int):
        self.writer = self.run = None
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        elif name == "wandb":
            import wandb

            try:
                self.run, self.image = wandb.init(project=PROJECT, name=run, config=config, dir=folder), wandb.Image
            except wandb.Error as error:
                raise ValueError(f"--logger wandb: {error} WANDB_MODE=offline keeps the run here") from error
        else:
            import trackio

            resume = "allow" if step else "never"
            self.run, self.image = trackio.init(PROJECT, run, config=config, resume=resume, embed=False), trackio.Image

    def log(self, kind: str, values: Mapping[str, float | None], step: int) -> None:
        """Numbers as KIND/NAME; those that are None are left out."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        if self.writer is None:
            self.run.log(numbers, step=step)
        for name, value in numbers.items() if self.writer else ():
            self.writer.add_scalar(name, value, step)

    def log_picture(self, picture: Tensor, step: int) -> None:
        """A picture, uint8 [3,H,W]."""
        if self.writer is None:
            self.run.log({"preview": self.image(picture.permute(1, 2, 0).numpy())}, step=step)
        else:
            self.writer.add_image("preview", picture, step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self.writer is None:
            self.run.finish()
        else:
            self.writer.close()
