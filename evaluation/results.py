"""Scores per clip on disk, so that a stopped evaluation goes on, and their statistics."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.fvd import feature_distance
from utils.io import atomic_write

RESAMPLES = 2000  # the ends of an interval vary by a few percent of its width
CONFIDENCE = 0.95
# Which of several samples is the best; sharpness is best at 1 and has none.
BEST = {
    "psnr": np.max,
    "psnr_clip": np.max,
    "ssim": np.max,
    "lpips": np.min,
    "st_lpips_alex": np.min,
    "st_lpips_vgg": np.min,
    "temporal_l1": np.min,
    "static_l1": np.min,
}
Line = dict[str, Any]


class PerClipResults:
    """The file per_clip.jsonl: a line of settings, then one of scores per clip.

    Args:
        settings: all that changes a score.
        overwrite: discard what is there.

    Raises: ValueError: if results of other settings are there.
    """

    def __init__(self, folder: Path, settings: Line, overwrite: bool):
        self.path = folder / "per_clip.jsonl"
        # As they come back from a file: tuples become lists.
        settings = json.loads(json.dumps(settings))
        stored = [] if overwrite else read_lines(self.path)
        self.settings = settings
        before = stored[0]["settings"] if stored else settings
        for name, value in settings.items():
            if before.get(name) != value:
                there = f"results of {name} = {before.get(name)} (now {value})"
                raise ValueError(f"--out_dir {folder} holds {there}; pass --overwrite")
        self.lines = {line["clip"]: line for line in stored[1:]}
        self.tidy()

    def tidy(self) -> None:
        """Write the file again: clips in order, each once, no line cut short."""
        clips = [self.lines[number] for number in sorted(self.lines)]
        with atomic_write(self.path) as file:
            file.write(as_jsonl([{"settings": self.settings}, *clips]))

    def add(self, lines: Sequence[Line]) -> None:
        """Append the lines of a batch."""
        with self.path.open("ab") as file:
            file.write(as_jsonl(lines))
        self.lines.update((line["clip"], line) for line in lines)

    def scored(self, sources: Sequence[Line]) -> list[Line]:
        """The lines of these very clips, as far as they are there, in order."""
        lines = [self.lines.get(number) for number in range(len(sources))]
        return [x for x in lines if x and x["source"] == sources[x["clip"]]]


def as_jsonl(lines: Sequence[Line]) -> bytes:
    """A line of JSON for each."""
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def read_lines(path: Path) -> list[Line]:
    """The lines of a JSONL file, if any, up to the first that was cut short."""
    lines = []
    with suppress(FileNotFoundError, json.JSONDecodeError):
        for text in path.read_text().splitlines():
            lines.append(json.loads(text))
    return lines


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """The mean over clips and its bootstrap interval, of the same resamples always.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, 13.3.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if n < 2:
        return without_interval(values.mean())
    rng = np.random.default_rng(0)
    means = []
    # In blocks, which bound the memory.
    for _ in range(RESAMPLES // 50):
        chosen = rng.integers(n, size=(50, n))
        means.append(values[chosen].mean(axis=1))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def summarise(lines: Sequence[Line], method: str, first: str) -> list[Line]:
    """The rows of one method.

    A single sample has one. N have the mean of their scores, the scores of their mean image, and
    the best of 10 and of N for each clip and score. The mean has psnr_frames, too, of each middle
    frame in time order, and the differences from the method `first`, paired by clip.
    """
    entries = [line["methods"][method] for line in lines]
    table = score_table(lines, method)
    n = len(entries[0]["samples"])
    seconds = float(np.median([entry["seconds"] for entry in entries]))

    def row(kind: str, count: int, scores: Mapping[str, Sequence[float]]) -> Line:
        return {
            "method": method,
            "kind": kind,
            "count": count,
            "scores": {name: estimate(values) for name, values in scores.items()},
            "versus_first": {},
            "nfe": entries[0]["nfe"],
            "seconds": seconds,
        }

    means = {name: values.mean(axis=1) for name, values in table.items()}
    mean = row("mean", n, means)
    samples = [sample for entry in entries for sample in entry["samples"]]
    mean["psnr_frames"] = np.mean([x["psnr_frames"] for x in samples], axis=0).tolist()
    if method != first:
        for name, values in score_table(lines, first).items():
            mean["versus_first"][name] = estimate(means[name] - values.mean(axis=1))
    if "features" in entries[0] and len(lines) > 1:
        mean["scores"]["fvd"] = without_interval(video_distance(lines, method))
    if n == 1:
        return [mean]

    spread = {name: [entry["spread"][name] for entry in entries] for name in entries[0]["spread"]}
    mean["scores"]["diversity"] = estimate(spread["diversity"])
    for kind in ("", "_blurred"):
        ratio = np.sum(spread[f"diversity{kind}"]) / max(np.sum(spread[f"error{kind}"]), 1e-9)
        mean["scores"][f"calibration{kind}"] = without_interval(ratio)
    images = [entry["mean_image"] for entry in entries]
    rows = [mean, row("mean image", n, {name: [x[name] for x in images] for name in table})]
    for count in sorted({min(10, n), n}):
        best = {k: BEST[k](table[k][:, :count], axis=1) for k in table if k in BEST}
        rows.append(row("best", count, best))
    return rows


def without_interval(value: float) -> Line:
    """A number of all clips together, as an estimate."""
    return {"mean": float(value), "low": None, "high": None}


def score_table(lines: Sequence[Line], method: str) -> dict[str, np.ndarray]:
    """The scores of every clip and sample, [clips,N] by name."""
    clips = [line["methods"][method]["samples"] for line in lines]
    names = [name for name in clips[0][0] if name != "psnr_frames"]
    return {name: np.array([[x[name] for x in samples] for samples in clips]) for name in names}


def video_distance(lines: Sequence[Line], method: str) -> float:
    """FVD: the mean over samples of each one's distance, as MCVD averages."""
    truth = np.array([line["features"] for line in lines])  # [clips,D]
    generated = np.array([line["methods"][method]["features"] for line in lines])
    samples = generated.swapaxes(0, 1)  # [N,clips,D]
    return float(np.mean([feature_distance(sample, truth) for sample in samples]))
