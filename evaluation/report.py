"""What a reader gets: a table as Markdown, numbers as JSON, and a sheet of clips."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.evaluator import Evaluator
from evaluation.protocols import PUBLISHED, notes
from evaluation.results import Line, PerClipResults, summarise
from utils.io import atomic_write, contact_sheet, observed_frames, save_json, save_png
from utils.video_utils import cross_fade, join_clip, split_clip, to_float, to_uint8

# Score -> title and decimals; docs/evaluation.md defines them.
COLUMNS = {
    "psnr": ("PSNR, dB", 2),
    "psnr_clip": ("PSNR (clip), dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "st_lpips_alex": ("ST-LPIPS (alex)", 4),
    "st_lpips_vgg": ("ST-LPIPS (vgg)", 4),
    "temporal_l1": ("temporal error", 5),
    "static_l1": ("static error", 5),
    "sharpness": ("sharpness", 3),
    "diversity": ("diversity", 4),
    "calibration": ("calibration", 2),
    "calibration_blurred": ("calibration, blurred", 2),
    "fvd": ("FVD", 1),
}


def write_report(
    evaluator: Evaluator,
    results: PerClipResults,
    lines: Sequence[Line],
    failures: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Print the table, and write table.md, metrics.json and clips.png.

    Args:
        lines: of the clips that were scored.
        failures: clips that could not be read.
        facts: what else metrics.json holds, such as versions.
    """
    settings = results.settings
    names = settings["methods"]
    rows = [row for name in names for row in summarise(lines, name, names[0])]
    text = [*table_lines(score_cells(rows)), ""]
    text += [f"- {note}" for note in notes(settings, len(lines))]
    text += [f"- left out, unreadable: {failure}" for failure in failures]
    if settings["protocol"] in PUBLISHED:
        text += ["", *table_lines(PUBLISHED[settings["protocol"]])]
    table = "\n".join([*text, ""])
    folder = results.path.parent
    with atomic_write(folder / "table.md") as file:
        file.write(table.encode())
    facts = {"clips": len(lines), "failures": failures, "settings": settings, **facts}
    save_json(folder / "metrics.json", {**facts, "rows": rows})
    save_clips(folder / "clips.png", evaluator, lines)
    print(f"\n{table}\n{folder}")


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


def save_clips(path: Path, evaluator: Evaluator, lines: Sequence[Line]) -> None:
    """The best, median and worst clip by PSNR: truth, the first method's sample, cross-fade."""
    method = evaluator.methods[0]
    k = evaluator.clip["endpoint_context"]
    ranked = sorted(lines, key=lambda line: line["methods"][method.name]["samples"][0]["psnr"])
    rows = []
    for line in (ranked[-1], ranked[len(ranked) // 2], ranked[0]):
        clip = to_float(evaluator.read(line["clip"], line["source"]))[None].to(evaluator.device)
        start, truth, end = split_clip(clip, k)
        generated = method.generate(start, end, [(line["clip"], 0)])
        for middle in (truth, generated, cross_fade(start, end, truth.shape[2])):
            rows.append(to_uint8(join_clip(start, middle, end))[0])
    save_png(path, contact_sheet(rows, observed_frames(rows[0].shape[1], k)))
