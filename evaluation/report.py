"""What a reader gets: tables as Markdown, numbers as JSON, and a page with pictures."""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import imageio.v3 as iio
import torch

from evaluation.evaluator import Evaluator
from evaluation.protocols import PUBLISHED, notes
from evaluation.results import Line, PerClipResults, summarise
from utils.io import atomic_write, bordered, observed_frames, save_json, save_training_curves
from utils.video_utils import cross_fade, join_clip, split_clip, to_float, to_uint8

# Score -> title and decimals; docs/evaluation.md defines them.
COLUMNS = {
    "psnr": ("PSNR, dB", 2),
    "psnr_clip": ("PSNR (clip), dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "temporal_l1": ("temporal error", 5),
    "static_l1": ("static error", 5),
    "sharpness": ("sharpness", 3),
    "diversity": ("diversity", 4),
    "fvd": ("FVD", 1),
}
FRAME_MS = 167  # of animations
STYLE = "img { width: 38rem; image-rendering: pixelated; } pre { overflow-x: auto; }"


def write_report(
    evaluator: Evaluator,
    results: PerClipResults,
    lines: Sequence[Line],
    failures: Sequence[str],
    facts: Mapping[str, Any],
    history: Mapping[str, Any] | None,
) -> None:
    """Print the table, and write table.md, report.html and metrics.json.

    Args:
        lines: of the clips that were scored.
        failures: clips that could not be read.
        facts: what else metrics.json holds, such as versions.
        history: of training; None without a model.
    """
    settings = results.settings
    names = settings["methods"]
    rows = [row for name in names for row in summarise(lines, name, names[0])]
    text = [*table_lines(score_cells(rows)), ""]
    text += [f"- {note}" for note in notes(settings, len(lines))]
    text += [f"- left out, unreadable: {failure}" for failure in failures]
    if settings["protocol"] == "mcvd":
        text += ["", *table_lines(PUBLISHED)]
    table = "\n".join([*text, ""])
    facts = {"clips": len(lines), "failures": failures, "settings": settings, **facts}
    parts = {
        "Scores": f"<pre>{html.escape(table)}</pre>",
        "Clips": animations(evaluator, lines),
        "Curves": plot_curves(rows, settings["endpoint_context"], history),
        "Settings": f"<pre>{html.escape(json.dumps(facts, indent=2))}</pre>",
    }
    body = "".join(f"<h2>{name}</h2>\n{part}\n" for name, part in parts.items())
    page = f'<!DOCTYPE html>\n<meta charset="utf-8"><style>{STYLE}</style>\n{body}'
    folder = results.path.parent
    for name, text in (("table.md", table), ("report.html", page)):
        with atomic_write(folder / name) as file:
            file.write(text.encode())
    save_json(folder / "metrics.json", {**facts, "rows": rows})
    print(f"\n{table}\n{folder / 'report.html'}")


def score_cells(rows: Sequence[Line]) -> list[list[str]]:
    """The table of scores as text, without columns that no row has."""
    columns = {k: v for k, v in COLUMNS.items() if any(k in row["scores"] for row in rows)}
    titles = [title for title, _ in columns.values()]
    cells = [["method", "samples", *titles, "PSNR - first row", "NFE / sample", "s / sample"]]
    for row in rows:
        samples = "1" if row["count"] == 1 else f"{row['kind']} of {row['count']}"
        scores = [show(row["scores"].get(name), f".{d}f") for name, (_, d) in columns.items()]
        difference = show(row["versus_first"].get("psnr"), "+.2f")
        cost = [str(row["nfe"]), f"{row['seconds']:.3g}"]
        cells.append([row["method"], samples, *scores, difference, *cost])
    return cells


def show(estimate: Mapping[str, float | None] | None, spec: str) -> str:
    """An estimate as "mean [low, high]", its numbers by a format spec."""
    if estimate is None:
        return ""
    numbers = [format(x, spec) for x in estimate.values() if x is not None]
    return numbers[0] if len(numbers) == 1 else "{} [{}, {}]".format(*numbers)


def table_lines(cells: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, titles first, padded so that it reads as it is."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * width for width in widths]
    lines = []
    for line in (cells[0], rule, *cells[1:]):
        padded = [text.ljust(width) for text, width in zip(line, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    return lines


def plot_curves(rows: Sequence[Line], k: int, history: Mapping[str, Any] | None) -> str:
    """PSNR of each frame from `k` on, PSNR against NFE, and training's curves, as SVG."""
    if find_spec("matplotlib") is None:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    by_frame, by_work = figure.subplots(1, 2)
    for row in rows:
        if row["kind"] == "mean":
            values = row["psnr_frames"]
            by_frame.plot(range(k, k + len(values)), values, "o-", label=row["method"])
            by_work.plot(row["nfe"], row["scores"]["psnr"]["mean"], "o")
    by_frame.set(xlabel="generated frame", ylabel="PSNR, dB")
    by_work.set(xlabel="NFE per sample")
    figure.legend(fontsize="small", loc="outside right upper")
    files = [io.BytesIO()]
    figure.savefig(files[0], format="svg", metadata={"Date": None})
    if history and history["train"]:
        files.append(io.BytesIO())
        save_training_curves(files[1], history, "svg")
    # The elements, without the heads of SVG files.
    return "".join("<svg" + x.getvalue().decode().partition("<svg")[2] for x in files)


def animations(evaluator: Evaluator, lines: Sequence[Line]) -> str:
    """The best, median and worst clip by PSNR, as HTML with embedded pictures.

    Side by side: the truth, the first method's first sample, the cross-fade.
    """
    method = evaluator.methods[0]
    k = evaluator.clip["endpoint_context"]

    def psnr(line: Line) -> float:
        return line["methods"][method.name]["samples"][0]["psnr"]

    lines = sorted(lines, key=psnr)
    parts = []
    for title, i in (("best", -1), ("median", len(lines) // 2), ("worst", 0)):
        number, source = lines[i]["clip"], lines[i]["source"]
        clip = to_float(evaluator.read(number, source))[None].to(evaluator.device)
        start, truth, end = split_clip(clip, k)
        generated = method.generate(start, end, [(number, 0)])
        faded = cross_fade(start, end, truth.shape[2])
        columns = []
        for middle in (truth, generated, faded):
            whole = to_uint8(join_clip(start, middle, end))[0]
            columns.append(bordered(whole, observed_frames(clip.shape[2], k)))
        frames = torch.cat(columns, dim=3).permute(1, 2, 3, 0)  # [T,H,3W,3]
        # An animated PNG is lossless, unlike a GIF.
        options = {"plugin": "pillow", "extension": ".png", "duration": FRAME_MS, "loop": 0}
        file = iio.imwrite("<bytes>", frames.numpy(), **options)
        data = base64.b64encode(file).decode()
        caption = f"{title}, {psnr(lines[i]):.2f} dB: truth, {method.name}, cross-fade"
        caption = html.escape(f"{source['name']} - {caption}")
        parts.append(f'<p><img src="data:image/png;base64,{data}"><br>{caption}</p>')
    return "\n".join(parts)
