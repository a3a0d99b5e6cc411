"""What a reader gets: the table as Markdown and one self-contained page with pictures."""

import base64
import html
import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
from torch import Tensor

from data.video_index import Video
from evaluation.evaluator import Evaluator
from evaluation.metrics import HIGHER_IS_BETTER
from evaluation.protocols import PUBLISHED, differences_from_mcvd, rules
from evaluation.results import SCORES, Estimate, PerClipResults, Row, error_by_position, summarise
from utils.io import atomic_write, observed_frames, save_json, save_training_curves, side_by_side
from utils.video_utils import cross_fade, join_clip, split_clip, to_float, to_uint8

ANIMATION_FPS = 6
COLUMNS = {  # score -> (title, decimals)
    "psnr": ("PSNR, dB", 2),
    "psnr_clip": ("PSNR (clip), dB", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 4),
    "temporal_l1": ("temporal error", 5),
    "diversity": ("diversity", 4),
    "fvd": ("FVD", 1),
}
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 95rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; }
th, td { padding: .2rem .5rem; text-align: right; }
th { border-bottom: 2px solid #444; } td { border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } figure { margin: 1.5rem 0; } figcaption, li, details { color: #555; }
img { width: 38rem; max-width: 100%; image-rendering: pixelated; } svg { max-width: 100%; height: auto; }
"""


class Report(NamedTuple):
    """All that an evaluation found.

    Attributes:
        title: clips, frames and protocol in one line.
        rows: of the table.
        curves: of the methods that differ in their number of steps only, the name that they share.
        protocol: its name.
        differences: what differs from the published protocol, if that is the one.
        weights: files that scores were computed with, with their hashes.
        failures: clips left out, with the reason.
        frames: numbers of the generated frames within a clip.
        positions: PSNR in dB of each generated frame, by method; {} if it was not measured.
    """

    title: str
    rows: list[Row]
    curves: dict[str, str]
    protocol: str
    differences: list[str]
    weights: list[str]
    failures: list[str]
    frames: Sequence[int]
    positions: dict[str, list[float]]

    def rules(self) -> list[str]:
        """What the columns of the table mean, and what they were computed with."""
        scores = {name for row in self.rows for name in row.scores}
        compared = {"versus_first"} if any("psnr" in row.versus_first for row in self.rows) else set()
        return [*rules(self.protocol, scores | compared), *self.weights]

    def as_json(self) -> dict[str, Any]:
        """The report as plain types."""
        return self._asdict() | {
            "rows": [row.as_json() for row in self.rows],
            "frames": list(self.frames),
            "rules": self.rules(),
            "published": [row._asdict() for row in PUBLISHED] if self.differences else [],
        }


def make_report(
    evaluator: Evaluator, results: PerClipResults, protocol: str, weights: list[str], settings: dict[str, Any]
) -> Report:
    """Summarise the scores over the clips.

    Args:
        weights: files that scores were computed with.
        settings: of the evaluation; `trained_frames` among them is T in training, or None.

    Raises: ValueError: if no clip could be read.
    """
    lines, methods = results.scored(), [method.name for method in evaluator.methods]
    if not lines:
        failures = "; ".join(results.failures())
        raise ValueError(f"--data_root {settings['data_root']}: no clip could be read: {failures}")
    k, reader = evaluator.endpoint_context, evaluator.reader
    m = reader.num_frames - 2 * k
    features = results.features if evaluator.i3d and len(lines) > 1 else None
    if evaluator.i3d and features is None:
        print("fvd is left out: it needs two clips or more")
    with_psnr = "psnr" in evaluator.scorer.metrics
    differences = []
    if protocol == "mcvd":
        differences = differences_from_mcvd(settings, len(lines), settings["trained_frames"])
    return Report(
        title=f"{len(lines)} clips of {reader.num_frames} frames ({k} + {k} given, {m} generated), "
        f"{reader.size}x{reader.size} {reader.color_mode}, protocol {protocol}",
        rows=[row for name in methods for row in summarise(lines, name, methods[0], features)],
        curves={method.name: method.curve for method in evaluator.methods if method.curve},
        protocol=protocol,
        differences=differences,
        weights=weights,
        failures=results.failures(),
        frames=range(k, k + m),
        positions={name: error_by_position(lines, name) for name in methods} if with_psnr else {},
    )


def write_report(
    report: Report, out_dir: Path, pictures: str, history: dict[str, Any] | None, facts: dict[str, Any]
) -> None:
    """Print the table and write table.md, metrics.json, report.html and, of a sweep, its plot."""
    files = {"table.md": as_markdown(report), "report.html": as_page(report, pictures, history, facts)}
    plot = quality_against_work(report)
    if plot:
        files["quality_against_work.svg"] = plot
    for name, text in files.items():
        with atomic_write(out_dir / name) as file:
            file.write(text.encode())
    save_json(out_dir / "metrics.json", report.as_json() | facts)
    print(f"\n{files['table.md']}")
    print(f"{out_dir / 'report.html'}, {out_dir / 'table.md'}, {out_dir / 'metrics.json'}")


def as_markdown(report: Report) -> str:
    """The table with all that belongs to it."""
    text = [report.title, "", markdown(table_cells(report.rows)), "", *(f"- {rule}" for rule in report.rules())]
    if report.differences:
        text += ["", markdown(published_cells()), "", "What still differs from the published rows:", ""]
        text += [f"- {line}" for line in report.differences]
    if report.failures:
        text += ["", f"Left out, unreadable: {', '.join(report.failures)}"]
    return "\n".join([*text, ""])


def as_page(report: Report, pictures: str, history: dict[str, Any] | None, facts: dict[str, Any]) -> str:
    """The whole page: table, clips, plots and settings; it loads nothing.

    Args:
        pictures: animations, as HTML.
        history: of training, as checkpoints keep it; None without a checkpoint.
        facts: settings, versions and fingerprints.
    """
    sections = [("Scores", html_table(table_cells(report.rows)) + bullet_list(report.rules()))]
    if report.failures:
        sections.append(("Left out, unreadable", bullet_list(report.failures)))
    if report.differences:
        sections.append(("Published", html_table(published_cells()) + bullet_list(report.differences)))
    sections.append(("Clips", pictures))
    plot = quality_against_work(report)
    if plot:
        sections.append(("Quality against work", plot))
    if report.positions:
        sections.append(("Error per frame position", error_by_frame(report)))
    if history is not None:
        sections.append(("Training", training_curves(history)))
    sections.append(("Settings", settings_list(facts)))
    return page(report.title, sections)


def error_by_frame(report: Report) -> str:
    """PSNR of each generated frame, as a table and a plot."""
    cells = [["PSNR of frame, dB", *map(str, report.frames)]]
    cells += [[name, *(f"{value:.2f}" for value in values)] for name, values in report.positions.items()]
    curves = {name: (list(report.frames), values) for name, values in report.positions.items()}
    return html_table(cells) + (line_plots({"PSNR, dB": curves}, "frame") or "")


def show(value: Estimate | None, decimals: int, signed: bool = False) -> str:
    """A mean with its interval, if it has one."""
    if value is None:
        return ""
    mean, low, high = (f"{number:{'+' if signed else ''}.{decimals}f}" for number in value)
    return mean if math.isnan(value.low) else f"{mean} [{low}, {high}]"


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its titles first; columns that no row has are left out."""
    used = [name for name in COLUMNS if any(name in row.scores for row in rows)]
    titles = ["method", "samples", *(COLUMNS[name][0] for name in used), "forwards / sample", "s / sample"]
    compared = any("psnr" in row.versus_first for row in rows)
    cells = [[*titles[:3], "PSNR - first row", *titles[3:]] if compared else titles]
    for row in rows:
        scores = [show(row.scores.get(name), COLUMNS[name][1]) for name in used]
        if compared:
            scores.insert(1, show(row.versus_first.get("psnr"), 2, signed=True))
        cells.append([row.method, row.samples, *scores, str(row.nfe), f"{row.seconds:.3g}"])
    return cells


def published_cells() -> list[list[str]]:
    """The published rows as text, their titles first."""
    rows = [[row.method, row.frames, str(row.best_of), f"{row.psnr:.3f}", f"{row.ssim:.3f}"] for row in PUBLISHED]
    return [["published, BAIR", "frames", "best of", "PSNR (clip), dB", "SSIM"], *rows]


def markdown(cells: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads in a terminal."""
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def html_table(cells: Sequence[Sequence[str]]) -> str:
    """The same table for the page."""
    head, *body = ["".join(f"<td>{html.escape(text)}</td>" for text in line) for line in cells]
    rows = "\n".join(f"<tr>{line}</tr>" for line in body)
    return f'<div class="wide"><table><tr>{head.replace("td>", "th>")}</tr>\n{rows}</table></div>'


Curves = dict[str, tuple[Sequence[float], Sequence[float]]]  # name: x and y


def line_plots(panels: dict[str, Curves], xlabel: str, log_x: bool = False) -> str | None:
    """Named curves side by side, a panel per quantity, as an SVG element; None where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = Figure(figsize=(max(6, 4 * len(panels)), 3.4 + 0.2 * len(names)), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, (ylabel, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, (x, y) in curves.items():
            axes.plot(x, y, "o-", label=name, markersize=4)
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if log_x else "linear")
        ticks: list[float] = []
        for value in sorted({value for x, _ in curves.values() for value in x}):
            if not (log_x and ticks and value < 1.4 * ticks[-1]):  # where labels would touch
                ticks.append(value)
        axes.set_xticks(ticks, labels=list(map(str, ticks)))
        axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="outside lower center")
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return svg_element(text.getvalue())


def quality_against_work(report: Report) -> str | None:
    """Scores against network forwards, as an SVG element; None where no two numbers of steps were run."""
    panels: dict[str, Curves] = {}
    for score in ("psnr", "ssim", "temporal_l1"):
        points: dict[str, list[tuple[int, float]]] = {}
        for row in report.rows:
            if row.method in report.curves and row.kind == "mean" and score in row.scores:
                points.setdefault(report.curves[row.method], []).append((row.nfe, row.scores[score].mean))
        if max(map(len, points.values()), default=0) >= 2:
            lines = {name: tuple(zip(*sorted(values), strict=True)) for name, values in points.items()}
            panels[COLUMNS[score][0]] = lines
    return line_plots(panels, "network forwards per sample", log_x=True) if panels else None


def training_curves(history: dict[str, Any]) -> str:
    """The curves of training for the page, or what would bring them."""
    file = io.BytesIO()
    if not history["train"]:
        return "<p>The checkpoint holds no history.</p>"
    if not save_training_curves(file, history, file_format="svg"):
        return "<p>Curves need matplotlib: pip install matplotlib</p>"
    return svg_element(file.getvalue().decode())


def svg_element(document: str) -> str:
    """An SVG document without what stands before its element, for use inside a page."""
    return document[document.index("<svg") :]


def page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """The whole page of (heading, HTML) sections; it loads nothing."""
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def bullet_list(lines: Sequence[str]) -> str:
    """Lines as an HTML list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def settings_list(settings: dict[str, Any]) -> str:
    """Every setting, folded away."""
    flat = settings | settings.get("settings", {})
    flat.pop("settings", None)
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in flat.items())
    return f"<details><summary>all settings</summary><table>{rows}</table></details>"


def animations(evaluator: Evaluator, videos: Sequence[Video], results: PerClipResults) -> str:
    """The best, median and worst clip of the first method: truth, the method's first sample, and the cross-fade.

    Best by the first score that was measured; the clips are the first, the middle and the last where none was.
    """
    method, k = evaluator.methods[0], evaluator.endpoint_context
    lines = results.scored()
    titles = ("first", "middle", "last")
    first_sample = {line["clip"]: line["methods"][method.name]["samples"][0] for line in lines}
    score = next((name for name in SCORES if name in first_sample[lines[0]["clip"]]), None)
    if score is not None:
        titles = ("best", "median", "worst")
        lines.sort(key=lambda line: first_sample[line["clip"]][score], reverse=score in HIGHER_IS_BETTER)
    parts = []
    for title, line in zip(titles, (lines[0], lines[len(lines) // 2], lines[-1]), strict=True):
        number = line["clip"]
        clip = evaluator.reader.read(videos[number], line["source"]["first_frame"])
        if isinstance(clip, str):
            continue
        start, truth, end = split_clip(to_float(clip[None]).to(evaluator.device), k)
        faded = cross_fade(start, end, truth.shape[2])
        middles = (truth, method.generate(start, end, [(number, 0)]), faded)
        wholes = [to_uint8(join_clip(start, middle, end))[0] for middle in middles]
        frames = side_by_side(wholes, observed_frames(clip.shape[1], k))
        value = first_sample[number].get(score)
        quality = "" if value is None else f", {COLUMNS[score][0]}: {value:.{COLUMNS[score][1]}f}"
        caption = f"{title}: {line['source']['name']}{quality} - truth, {method.name}, cross-fade (orange = given)"
        parts.append(animation(frames, caption, ANIMATION_FPS))
    return "\n".join(parts)


def animation(frames: Tensor, caption: str, fps: float) -> str:
    """Frames uint8 [3,T,H,W] as a looping picture inside the page, with its caption."""
    file = io.BytesIO()  # an animated PNG: lossless, unlike a GIF
    pictures = frames.permute(1, 2, 3, 0).numpy()  # [T,H,W,3]
    iio.imwrite(file, pictures, plugin="pillow", extension=".png", duration=1000 / fps, loop=0)
    data = base64.b64encode(file.getvalue()).decode()
    picture = f'<img alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"
