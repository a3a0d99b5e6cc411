"""What a run leaves beside its weights: metrics.jsonl, run.json, previews, curves, the screen."""

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.distributed import print0
from training.state import TrainingState
from training.validation import Preview
from utils import io
from utils.device import describe_machine
from utils.video_utils import to_uint8


class Logger:
    """Writes a run's records, to TensorBoard too, and shows a progress bar or lines.

    What cannot be written costs a warning, not the run. Lines of metrics.jsonl of steps after the
    state's, which are of lost work, are removed.
    """

    def __init__(
        self, out_dir: Path, state: TrainingState, device: torch.device, tensorboard: bool
    ):
        self.out_dir = out_dir
        self.device = device
        self.path = out_dir / "metrics.jsonl"
        lines = []
        if state.step and self.path.is_file():
            lines = self.path.read_text().splitlines()
        kept = [f"{line}\n" for line in lines if step_of(line) <= state.step]
        with warn_if_unwritable(self.path), io.atomic_write(self.path) as file:
            file.write("".join(kept).encode())
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = state.step + 1 if state.step else None
            self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=purge_step)
        self.bar = tqdm(
            total=state.total_steps,
            initial=state.step,
            desc="training",
            unit="step",
            disable=None,
        )
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to measure clips per second anew."""
        self.clips = 0
        self.since = time.perf_counter()

    def count_step(self, clips: int) -> None:
        """Count one more step, over the clips of all processes."""
        self.clips += clips
        self.bar.update()

    def log_run(self, args: argparse.Namespace) -> None:
        """Write run.json: arguments, versions, git commit, device."""
        path = self.out_dir / "run.json"
        with warn_if_unwritable(path):
            io.save_json(path, {"args": vars(args), **describe_machine(self.device)})

    def log_train(self, state: TrainingState, epoch: float, loss: float | None) -> None:
        """A line for the steps since the last one; a loss of None = no step was finite."""
        lr = state.optimizer.param_groups[0]["lr"]
        grad_norm = state.metrics.read()["grad_norm"]
        # The device is done with these steps, as their loss was read.
        speed = self.clips / (time.perf_counter() - self.since)
        values = {
            "epoch": epoch,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **state.metrics.bad_steps(),
            "clips_per_second": speed,
        }
        if self.device.type == "cuda":
            values["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        self._log("train", state.step, values)
        self.bar.set_postfix(loss=loss_text(loss))
        if self.bar.disable:
            line = f"step {state.step}  loss {loss_text(loss)}  lr {lr:.2e}  {speed:.1f} clips/s"
            print(line, flush=True)
        self.restart_clock()

    def log_epoch(self, entry: dict[str, Any], state: TrainingState) -> None:
        """A line for an epoch: losses and, where there is a preview, its scores and the curves."""
        line = f"epoch {entry['epoch']}  training loss {loss_text(entry['train_loss'])}"
        line += f"  validation loss {entry['val_loss']:.4f}"
        if "psnr" in entry:
            fade = entry["psnr_cross_fade"]
            line += f"  middle PSNR {entry['psnr']:.2f} dB (cross-fade {fade:.2f} dB)"
        tqdm.write(line)
        step = entry["step"]
        self._log("val", step, {name: value for name, value in entry.items() if name != "step"})
        if "psnr" in entry or state.finished:
            curves = self.out_dir / "training_curves.png"
            with warn_if_unwritable(curves):
                io.save_training_curves(curves, state.history)

    def log_preview(self, epoch: int, step: int, preview: Preview) -> dict[str, float]:
        """Write the epoch's sample as PNG, true rows above generated ones, and as MP4.

        Returns: mean PSNR in dB of the middles and of their cross-fades.
        """
        stem = self.out_dir / f"epoch_{epoch:04d}_sample"
        truth = to_uint8(preview.truth)
        generated = to_uint8(preview.generated)
        rows = [row for pair in zip(truth, generated, strict=True) for row in pair]
        observed = io.observed_frames(truth.shape[2], preview.endpoint_context)
        sheet = io.contact_sheet(rows, observed)
        # Clips beside each other, the truth above: [C,T,2H,B*W].
        above = torch.cat(list(truth), dim=3)
        below = torch.cat(list(generated), dim=3)
        video = io.enlarge(torch.cat([above, below], dim=2), truth.shape[-1])
        with warn_if_unwritable(stem):
            io.save_png(stem.with_suffix(".png"), sheet)
            io.save_mp4(stem.with_suffix(".mp4"), video, fps=8)
            if self.writer is not None:
                self.writer.add_image("preview", sheet, step)
        return {"psnr": preview.psnr, "psnr_cross_fade": preview.psnr_cross_fade}

    def close(self) -> None:
        """Flush what is buffered."""
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def _log(self, kind: str, step: int, values: dict[str, float | None]) -> None:
        with warn_if_unwritable(self.path), self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        for name, value in values.items() if self.writer else ():
            if value is not None:
                self.writer.add_scalar(f"{kind}/{name}", value, step)


def describe_run(
    args: argparse.Namespace, state: TrainingState, clips: str, amp_dtype: torch.dtype | None
) -> None:
    """Print what is about to happen, and what a flag does not do here."""
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    device = state.metrics.values.device
    print0(f"{clips}; steps {state.step + 1} to {state.total_steps}")
    where = f"{args.processes} x {device}, {amp_dtype or 'float32'}"
    print0(f"{args.train}: {parameters:,} parameters; {where}")
    if args.train == "diffusion" and not args.cfg_drop_prob and args.vis_guidance_scale != 1:
        print0("note: without --cfg_drop_prob previews need --vis_guidance_scale 1")


@contextlib.contextmanager
def warn_if_unwritable(path: Path) -> Iterator[None]:
    """Something that a run can do without: if it cannot be written, a line says so."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        tqdm.write(f"WARNING: {path} could not be written ({reason})", file=sys.stderr)


def loss_text(loss: float | None) -> str:
    """A mean loss as it is printed; None is that of no finite step."""
    return "not finite" if loss is None else f"{loss:.4f}"


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
