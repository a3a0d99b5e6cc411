"""Where else a run's numbers go beside metrics.jsonl: TensorBoard, wandb or trackio, each an optional package."""

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "middle-frame-video"


def open_tracker(args: argparse.Namespace, out_dir: Path, step: int) -> "Tracker | None":
    """The tracker that a run asks for, from `step` on; None = none."""
    name = args.logger or ("tensorboard" if args.tensorboard else None)
    return Tracker(name, out_dir, out_dir.name, vars(args), step) if name else None


class Tracker:
    """Sends scalars and pictures to the package of that name; TensorBoard's and wandb's files are below `folder`.

    Raises: ValueError: if the package is absent, or wandb is neither logged in nor told to stay offline.
    """

    def __init__(self, name: str, folder: Path, run: str, config: Mapping[str, Any], step: int):
        if find_spec(name) is None:
            raise ValueError(f"--logger {name} needs the package {name}: pip install {name}")
        self.writer = self.run = None
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder / name), purge_step=step + 1 if step else None)
        elif name == "wandb":
            import wandb

            try:
                self.run, self.image = wandb.init(project=PROJECT, name=run, config=config, dir=folder), wandb.Image
            except wandb.Error as error:
                raise ValueError(f"--logger wandb: {error} WANDB_MODE=offline keeps the run here") from error
        else:
            import trackio

            self.run, self.image = trackio.init(PROJECT, run, config=config, embed=False), trackio.Image

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
