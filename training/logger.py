"""What a run leaves behind beside its weights: metrics.jsonl, run.json, previews, curves, and what the screen shows."""

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
from torch import Tensor
from tqdm import tqdm

from training.state import TrainingState
from training.trackers import Tracker
from utils import io
from utils.device import describe_machine
from utils.distributed import print0
from utils.video_utils import to_uint8


class Logger:
    """Writes a run's records, passes them on to a tracker, if any, and shows a progress bar or lines.

    What cannot be written costs a warning, not the run. Lines of metrics.jsonl after `state`, of lost work, go.
    """

    def __init__(self, out_dir: Path, state: TrainingState, device: torch.device, tracker: Tracker | None = None):
        self.out_dir = out_dir
        self.device = device
        self.path = out_dir / "metrics.jsonl"
        lines = self.path.read_text().splitlines() if state.step and self.path.is_file() else []
        kept = "".join(f"{line}\n" for line in lines if step_of(line) <= state.step)
        with warn_if_unwritable(self.path), io.atomic_write(self.path) as file:
            file.write(kept.encode())
        self.tracker = tracker
        self.bar = tqdm(total=state.total_steps, initial=state.step, desc="training", unit="step", disable=None)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Begin to measure clips per second anew."""
        self.clips, self.since = 0, time.perf_counter()

    def count_step(self, clips: int) -> None:
        """One more step is done, over so many clips of all processes."""
        self.clips += clips
        self.bar.update()

    def log_run(self, args: dict[str, Any]) -> None:
        """Write run.json: arguments, versions, git commit and whether the tree was clean, device."""
        with warn_if_unwritable(self.out_dir / "run.json"):
            io.save_json(self.out_dir / "run.json", {"args": args} | describe_machine(self.device))

    def log_train(self, state: TrainingState, epoch: float, loss: float | None, grad_norm: float) -> None:
        """A line for the steps since the last one; a loss of None = no step had a finite one."""
        lr = state.optimizer.param_groups[0]["lr"]
        speed = self.clips / (time.perf_counter() - self.since)  # the device is done with them: the loss was read
        memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else None
        values = {"epoch": epoch, "loss": loss, "lr": lr, "grad_norm": grad_norm if math.isfinite(grad_norm) else None}
        values |= {**state.metrics.bad_steps(), "clips_per_second": speed, "gpu_memory_mib": memory}
        self._log("train", state.step, values)
        self.bar.set_postfix(loss=loss_text(loss))
        if self.bar.disable:
            print(f"step {state.step}  loss {loss_text(loss)}  lr {lr:.2e}  {speed:.1f} clips/s", flush=True)
        self.restart_clock()

    def log_epoch(self, entry: dict[str, Any], epochs: int, state: TrainingState) -> None:
        """A line for an epoch: losses and, where a preview was made, its scores; the curves then, and at the end."""
        losses = f"training loss {loss_text(entry['train_loss'])}  validation loss {entry['val_loss']:.4f}"
        scores = ""
        if "psnr" in entry:
            scores = f"  middle PSNR {entry['psnr']:.2f} dB (cross-fade {entry['psnr_cross_fade']:.2f} dB)"
        tqdm.write(f"epoch {entry['epoch']}/{epochs}  {losses}{scores}")
        self._log("val", entry["step"], {name: value for name, value in entry.items() if name != "step"})
        if "psnr" in entry or state.finished:
            with warn_if_unwritable(self.out_dir / "training_curves.png"):
                io.save_training_curves(self.out_dir / "training_curves.png", state.history)

    def log_preview(self, name: str, step: int, endpoint_context: int, clip: Tensor, generated: Tensor) -> None:
        """Write NAME.png, true rows above generated ones, and NAME.mp4 of the same; clips [B,C,T,H,W] in [-1, 1]."""
        stem = self.out_dir / name
        truth, made = to_uint8(clip).cpu(), to_uint8(generated).cpu()
        rows = [row for pair in zip(truth, made, strict=True) for row in pair]
        sheet = io.contact_sheet(rows, io.observed_frames(clip.shape[2], endpoint_context))
        video = torch.cat([torch.cat(list(truth), dim=3), torch.cat(list(made), dim=3)], dim=2)  # [C,T,2H,B*W]
        with warn_if_unwritable(stem):
            io.save_png(stem.with_suffix(".png"), sheet)
            io.save_mp4(stem.with_suffix(".mp4"), io.enlarge(video, clip.shape[-1]), fps=8)
            if self.tracker is not None:
                self.tracker.log_picture(sheet, step)

    def close(self) -> None:
        """Flush what is buffered."""
        self.bar.close()
        if self.tracker is not None:
            self.tracker.close()

    def _log(self, kind: str, step: int, values: dict[str, float | None]) -> None:
        with warn_if_unwritable(self.path), self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self.tracker is not None:
            self.tracker.log(kind, values, step)


def describe_run(args: argparse.Namespace, state: TrainingState, clips: str, amp_dtype: torch.dtype | None) -> None:
    """Print what is about to happen, and what a flag does not do here."""
    parameters, device = sum(p.numel() for p in state.model.parameters()), state.metrics.values.device
    precision = {None: "float32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast"}[amp_dtype]
    at_once = f"; {args.processes} processes, {args.processes * args.batch_size} clips at once"
    print0(
        f"{clips}; {parameters:,} parameters; {device}, {precision}; steps {state.step + 1} to {state.total_steps}"
        + at_once * (args.processes > 1)
    )
    if args.amp and device.type != "cuda":
        print0(f"--amp does nothing on {device.type}: training in float32")
    if not args.cfg_drop_prob and args.vis_every and args.vis_guidance_scale != 1:
        print0("note: --cfg_drop_prob 0 trains no unconditional branch: previews need --vis_guidance_scale 1")
    blind = ", ".join(map(str, state.model.blind_levels))
    if blind:
        remedy = "--base_channels of 3 * 2^n, such as 24, 48 or 96, keeps it"
        print0(f"note: at level {blind} norms have one channel per group and erase the time embedding; {remedy}")


@contextlib.contextmanager
def warn_if_unwritable(path: Path) -> Iterator[None]:
    """Something that a run can do without: if it cannot be written, a line says so."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"WARNING: {path} could not be written ({error.strerror or error})", file=sys.stderr)


def loss_text(loss: float | None) -> str:
    """A mean loss as it is printed; None is that of no finite step."""
    return "not finite" if loss is None else f"{loss:.4f}"


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
