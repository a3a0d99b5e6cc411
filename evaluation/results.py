"""Scores per clip as they come, kept on disk so that a stopped evaluation goes on, and what they say together."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evaluation.fvd import feature_distance
from evaluation.metrics import HIGHER_IS_BETTER
from utils.distributed import is_main
from utils.io import atomic_write

# Numbers that a single sample of a clip has; of the last, which is best at 1, there is no best sample.
SCORES = ("psnr", "psnr_clip", "psnr_middle", "ssim", "ssim_middle", "lpips")
SCORES += ("temporal_l1", "static_l1", "sharpness")
RESAMPLES = 2000  # of the bootstrap; the ends of an interval then vary by a few percent of its width
CONFIDENCE = 0.95


class PerClipResults:
    """The file per_clip.jsonl: a line of settings, then a line per clip, and features/ with what FVD needs.

    Lines are written a batch at a time, and a batch of which any line is missing is evaluated again: whatever moment a
    run was stopped at, with the same batch size the scores become those of an undisturbed run, bit for bit. Lines of
    clips that are not asked for now are kept.

    `settings` are all that changes a score: results of others are refused, unless to `overwrite`. `clips` says what
    identifies each clip (name, sha256, first frame): a line of another clip is not used.
    """

    def __init__(self, out_dir: Path, settings: dict[str, Any], clips: Sequence[dict[str, Any]], overwrite: bool):
        self.path = out_dir / "per_clip.jsonl"
        self.features = out_dir / "features"
        self.settings = json.loads(json.dumps(settings))
        self.clips = list(clips)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            head, *lines = (read_lines(self.path) if not overwrite else []) or [{"settings": self.settings}]
            before = head.get("settings", {})
            for name in self.settings | before:
                was, now = before.get(name), self.settings.get(name)
                if was != now:
                    there = f"--out_dir {out_dir} holds an evaluation with {name} = {was} (now {now})"
                    raise ValueError(f"{there}; choose another folder or pass --overwrite")
            self.stored = {line["clip"]: line for line in lines}
            if is_main():  # others only read
                self.tidy()
        except OSError as error:
            raise ValueError(f"--out_dir {out_dir}: cannot be used ({error.strerror})") from error

    def tidy(self) -> None:
        """Write the file anew, in order and each clip once, without what was cut short."""
        lines = [{"settings": self.settings}, *(self.stored[number] for number in sorted(self.stored))]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())

    def lines_with(self, key: str, numbers: Iterable[int]) -> list[dict[str, Any]]:
        """The lines with `key` for these very clips, in order."""
        found = [self.stored[number] for number in numbers if key in self.stored.get(number, {})]
        return [line for line in found if line["source"] == self.clips[line["clip"]]]

    def has(self, numbers: Sequence[int]) -> bool:
        """Whether all of these clips are scored; one that could not be read is worth another try."""
        return len(self.lines_with("methods", numbers)) == len(numbers)

    def add(self, lines: Sequence[dict[str, Any]], features: dict[int, dict[str, np.ndarray]]) -> None:
        """Write a batch: its FVD features first, by clip and method, then its lines in one go."""
        for number, arrays in features.items():
            self.features.mkdir(exist_ok=True)
            np.savez(self.features / f"{number:05d}.npz", **arrays)
        lines = [line | {"source": self.clips[line["clip"]]} for line in lines]
        with self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.stored |= {line["clip"]: line for line in lines}

    def scored(self) -> list[dict[str, Any]]:
        """The lines of all clips that are asked for and could be read, in order."""
        return self.lines_with("methods", range(len(self.clips)))

    def failures(self) -> list[str]:
        """Clips that could not be read, with the reason."""
        lines = self.lines_with("failure", range(len(self.clips)))
        return [f"{line['source']['name']} ({line['failure']})" for line in lines]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file, up to the first that was cut short; none if there is no file."""
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Estimate(NamedTuple):
    """A mean over clips and its 95 % bootstrap interval, whose ends are NaN where there is none."""

    mean: float
    low: float
    high: float

    def show(self, decimals: int, sign: str = "") -> str:
        """The mean, with its interval if it has one; "+" as the sign shows it always."""
        mean, low, high = (f"{number:{sign}.{decimals}f}" for number in self)
        return mean if math.isnan(self.low) else f"{mean} [{low}, {high}]"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and percentile-bootstrap interval over clips, always from the same resamples.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return Estimate(float(values.mean()), float("nan"), float("nan"))
    rng = np.random.default_rng(0)
    blocks = [values[rng.integers(len(values), size=(50, len(values)))].mean(axis=1) for _ in range(RESAMPLES // 50)]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(blocks), [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


class Row(NamedTuple):
    """One line of the table."""

    method: str
    kind: str  # "mean" over samples, "mean image" of them, or "best" of them per clip and score
    count: int  # of samples that it is about
    scores: dict[str, Estimate]
    versus_first: dict[str, Estimate]  # of the mean: differences from the first row, paired over the clips; else {}
    nfe: int  # network forwards per sample
    seconds: float  # per sample, the median over clips

    @property
    def samples(self) -> str:
        """Which samples count, in words."""
        return "1" if self.count == 1 else f"{self.kind} of {self.count}"

    def as_json(self) -> dict[str, Any]:
        """The row as plain types; an interval that does not exist is null."""
        groups = {"scores": self.scores, "versus_first": self.versus_first}
        for name, group in groups.items():
            ends = {score: value._asdict().items() for score, value in group.items()}
            groups[name] = {score: {k: None if math.isnan(x) else x for k, x in pairs} for score, pairs in ends.items()}
        return self._asdict() | {"samples": self.samples, **groups}


def summarise(lines: Sequence[dict[str, Any]], method: str, first: str, features: Path | None) -> list[Row]:
    """The rows of one method.

    A single sample has one row. Of N there are the mean over all samples, the score of their mean image, and the best
    of 10 and of N per clip and metric, which flatters a method the more the larger N is, so it never stands alone.
    `first` is the method of the first row, `features` the folder of FVD features, None = no FVD.
    """
    found = [line["methods"][method] for line in lines]
    cost = {"nfe": found[0]["nfe"], "seconds": float(np.median([entry["seconds"] for entry in found]))}
    table, reference = score_table(lines, method), score_table(lines, first)
    n = len(found[0]["samples"])
    mean = {name: estimate(values.mean(axis=1)) for name, values in table.items()}
    differences = {name: values.mean(axis=1) - reference[name].mean(axis=1) for name, values in table.items()}
    versus_first = {name: estimate(values) for name, values in differences.items()} if method != first else {}
    if n > 1 and "diversity" in found[0]:
        mean["diversity"] = estimate([entry["diversity"] for entry in found])
    if features is not None:
        distance = video_distance(features, [line["clip"] for line in lines], method)
        mean["fvd"] = Estimate(distance, float("nan"), float("nan"))
    rows = [Row(method, "mean", n, mean, versus_first, **cost)]
    if n > 1:
        image = {name: estimate([entry["mean_image"][name] for entry in found]) for name in table}
        rows.append(Row(method, "mean image", n, image, {}, **cost))
        for count in sorted({min(10, n), n}):
            best = {}
            for name, values in table.items():
                if name == SCORES[-1]:
                    continue
                choose = np.max if name in HIGHER_IS_BETTER else np.min
                best[name] = estimate(choose(values[:, :count], axis=1))
            rows.append(Row(method, "best", count, best, {}, **cost))
    return rows


def score_table(lines: Sequence[dict[str, Any]], method: str) -> dict[str, np.ndarray]:
    """The scores of every clip and sample, [clips,N] by name."""
    samples = [line["methods"][method]["samples"] for line in lines]
    names = [name for name in SCORES if name in samples[0][0]]
    return {name: np.array([[sample[name] for sample in row] for row in samples]) for name in names}


def video_distance(features: Path, clips: Sequence[int], method: str) -> float:
    """FVD of whole clips: the mean over samples of each sample's distance from the truth, as MCVD averages."""
    truth, generated = [], []
    for clip in clips:
        with np.load(features / f"{clip:05d}.npz") as arrays:
            truth.append(arrays["truth"])
            generated.append(arrays[method])  # [N,D]
    per_sample = np.stack(generated, axis=1)  # [N,clips,D]
    return float(np.mean([feature_distance(sample, np.stack(truth)) for sample in per_sample]))


def error_by_position(lines: Sequence[dict[str, Any]], method: str) -> list[float]:
    """Mean PSNR in dB of each middle frame, in time order."""
    frames = [sample["psnr_frames"] for line in lines for sample in line["methods"][method]["samples"]]
    return np.mean(frames, axis=0).tolist()
