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
from av import FFmpegError
from tqdm import tqdm

from training.distributed import print0
from training.state import TrainingState
from training.validation import Preview
from utils import io
from utils.device import describe_machine
from utils.video_utils import to_uint8

# Of what a run can do without: a full disk, a missing encoder, a broken package, an OOM.
OPTIONAL_ERRORS = (OSError, ValueError, RuntimeError, MemoryError, FFmpegError)
OPTIONAL_ERRORS += (ImportError, AttributeError, TypeError, LookupError)


class Logger:
    """Writes a run's records, to TensorBoard too, and shows a progress bar or lines.

    Whatever fails here costs one line, never the run. Lines of metrics.jsonl of steps after the
    state's, which are of lost work, are removed.
    """

    def __init__(
        self, out_dir: Path, state: TrainingState, device: torch.device, tensorboard: bool
    ):
        self.out_dir = out_dir
        self.device = device
        self.path = out_dir / "metrics.jsonl"
        self.failed: set[str] = set()
        with self.optional(self.path):
            lines = kept_lines(self.path, state.step)
            with io.atomic_write(self.path) as file:
                file.write("".join(lines).encode())
        self.writer = None
        if tensorboard:
            with self.optional("TensorBoard"):
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

    @contextlib.contextmanager
    def optional(self, what: Any) -> Iterator[None]:
        """Around something that a run can do without; the first failure of a kind is printed."""
        try:
            yield
        except OPTIONAL_ERRORS as error:
            if str(what) not in self.failed:
                self.failed.add(str(what))
                words = " ".join(str(error).split())[:200] or type(error).__name__
                print0(f"WARNING: {what}: {words}; training goes on without it", file=sys.stderr)

    def restart_clock(self) -> None:
        """Begin to measure clips per second anew."""
        self.clips = 0
        self.since = time.perf_counter()

    def count_step(self, clips: int) -> None:
        """Count one more step, over the clips of all processes."""
        self.clips += clips
        with self.optional("the progress bar"):
            self.bar.update()

    def log_run(self, args: argparse.Namespace) -> None:
        """Write run.json: arguments, versions, git commit, device."""
        path = self.out_dir / "run.json"
        with self.optional(path):
            io.save_json(path, {"args": vars(args), **describe_machine(self.device)})

    def log_train(self, state: TrainingState, loss: float | None) -> None:
        """A line for the steps since the last one; a loss of None = no step was finite."""
        lr = state.optimizer.param_groups[0]["lr"]
        grad_norm = state.metrics.read()["grad_norm"]
        # The device is done with these steps, as their loss was read.
        speed = self.clips / (time.perf_counter() - self.since)
        values = {
            "epoch": state.data_step / state.epoch_steps,
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            **state.metrics.bad_steps(),
            "clips_per_second": speed,
        }
        if self.device.type == "cuda":
            values["gpu_memory_mib"] = torch.cuda.max_memory_allocated(self.device) / 2**20
        self._log("train", state.step, values)
        line = f"step {state.step}  loss {loss_text(loss)}  lr {lr:.2e}  {speed:.1f} clips/s"
        if self.bar.disable:
            print0(line)
        else:
            self.bar.set_postfix(loss=loss_text(loss))
        self.restart_clock()

    def log_epoch(self, entry: dict[str, Any], state: TrainingState) -> None:
        """A line for an epoch: losses and, where there is a preview, its scores and the curves."""
        line = f"epoch {entry['epoch']}  training loss {loss_text(entry['train_loss'])}"
        line += f"  validation loss {entry['val_loss']:.4f}"
        if "psnr" in entry:
            fade = entry["psnr_cross_fade"]
            line += f"  middle PSNR {entry['psnr']:.2f} dB (cross-fade {fade:.2f} dB)"
        self.bar.clear()
        print0(line)
        step = entry["step"]
        self._log("val", step, {name: value for name, value in entry.items() if name != "step"})
        if "psnr" in entry or state.finished:
            curves = self.out_dir / "training_curves.png"
            with self.optional(curves):
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
        with self.optional("preview pictures"):
            io.save_png(stem.with_suffix(".png"), sheet)
        with self.optional("preview videos"):
            # Clips beside each other, the truth above: [C,T,2H,B*W].
            above = torch.cat(list(truth), dim=3)
            below = torch.cat(list(generated), dim=3)
            video = io.enlarge(torch.cat([above, below], dim=2), truth.shape[-1])
            io.save_mp4(stem.with_suffix(".mp4"), video, fps=8)
        with self.optional("TensorBoard"):
            if self.writer is not None:
                self.writer.add_image("preview", sheet, step)
        return {"psnr": preview.psnr, "psnr_cross_fade": preview.psnr_cross_fade}

    def close(self) -> None:
        """Flush what is buffered."""
        with self.optional("the progress bar"):
            self.bar.close()
        with self.optional("TensorBoard"):
            if self.writer is not None:
                self.writer.close()

    def _log(self, kind: str, step: int, values: dict[str, float | None]) -> None:
        with self.optional(self.path), self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        with self.optional("TensorBoard"):
            for name, value in values.items() if self.writer else ():
                if value is not None:
                    self.writer.add_scalar(f"{kind}/{name}", value, step)


def describe_run(
    args: argparse.Namespace,
    state: TrainingState,
    clips: tuple[int, int],
    amp_dtype: torch.dtype | None,
) -> None:
    """Print what is about to happen, and what a flag does not do here.

    Args:
        clips: training and held-out clips of an epoch.
    """
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    device = state.metrics.values.device
    per_epoch = state.epoch_steps
    print0(f"{clips[0]} training and {clips[1]} held-out clips, {per_epoch} steps per epoch")
    epochs = state.total_steps / per_epoch
    if not state.finished:
        print0(f"steps {state.step + 1} to {state.total_steps}, {epochs:.3g} epochs")
    where = f"{args.processes} x {device}, {amp_dtype or 'float32'}"
    print0(f"{args.train}: {parameters:,} parameters; {where}")
    if args.train == "diffusion" and not args.cfg_drop_prob and args.vis_guidance_scale != 1:
        print0("note: without --cfg_drop_prob previews need --vis_guidance_scale 1")
    if (1 - args.ema_decay) * state.total_steps < 3:
        rule = f"averages over about {1 / (1 - args.ema_decay):.0f} steps"
        print0(f"note: --ema_decay {args.ema_decay} {rule}, so EMA lags in a run this short")


def loss_text(loss: float | None) -> str:
    """A mean loss as it is printed; None is that of no finite step."""
    return "not finite" if loss is None else f"{loss:.4f}"


def kept_lines(path: Path, last_step: int) -> list[str]:
    """The lines of metrics.jsonl up to a step; others are left out, damaged ones with a word."""
    if not last_step or not path.is_file():
        return []
    kept = []
    damaged = 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last_step:
                kept.append(f"{line}\n")
        except (ValueError, LookupError, TypeError):
            damaged += 1
    if damaged:
        print0(f"{path}: {damaged} damaged lines are left out", file=sys.stderr)
    return kept
