"""What a reader gets: the table as Markdown and one self-contained page with pictures."""

import base64
import html
import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import imageio.v3 as iio
from torch import Tensor

from evaluation.protocols import PUBLISHED, rules
from evaluation.results import Estimate, Row
from utils.records import save_training_curves

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


class Findings(NamedTuple):
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
        """The findings as plain types."""
        return self._asdict() | {
            "rows": [row.as_json() for row in self.rows],
            "frames": list(self.frames),
            "rules": self.rules(),
            "published": [row._asdict() for row in PUBLISHED] if self.differences else [],
        }


def as_markdown(findings: Findings) -> str:
    """The table with all that belongs to it."""
    text = [findings.title, "", markdown(table_cells(findings.rows)), "", *(f"- {rule}" for rule in findings.rules())]
    if findings.differences:
        text += ["", markdown(published_cells()), "", "What still differs from the published rows:", ""]
        text += [f"- {line}" for line in findings.differences]
    if findings.failures:
        text += ["", f"Left out, unreadable: {', '.join(findings.failures)}"]
    return "\n".join([*text, ""])


def as_page(findings: Findings, pictures: str, history: dict[str, Any] | None, facts: dict[str, Any]) -> str:
    """The whole page: table, clips, plots and settings; it loads nothing.

    Args:
        findings: what was found.
        pictures: animations, as HTML.
        history: of training, as checkpoints keep it; None without a checkpoint.
        facts: settings, versions and fingerprints.
    """
    sections = [("Scores", html_table(table_cells(findings.rows)) + bullet_list(findings.rules()))]
    if findings.failures:
        sections.append(("Left out, unreadable", bullet_list(findings.failures)))
    if findings.differences:
        sections.append(("Published", html_table(published_cells()) + bullet_list(findings.differences)))
    sections.append(("Clips", pictures))
    plot = quality_against_work(findings)
    if plot:
        sections.append(("Quality against work", plot))
    if findings.positions:
        sections.append(("Error per frame position", error_by_frame(findings)))
    if history is not None:
        sections.append(("Training", training_curves(history)))
    sections.append(("Settings", settings_list(facts)))
    return page(findings.title, sections)


def error_by_frame(findings: Findings) -> str:
    """PSNR of each generated frame, as a table and a plot."""
    cells = [["PSNR of frame, dB", *map(str, findings.frames)]]
    cells += [[name, *(f"{value:.2f}" for value in values)] for name, values in findings.positions.items()]
    curves = {name: (list(findings.frames), values) for name, values in findings.positions.items()}
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


def quality_against_work(findings: Findings) -> str | None:
    """Scores against network forwards, as an SVG element; None where no two numbers of steps were run."""
    panels: dict[str, Curves] = {}
    for score in ("psnr", "ssim", "temporal_l1"):
        points: dict[str, list[tuple[int, float]]] = {}
        for row in findings.rows:
            if row.method in findings.curves and row.kind == "mean" and score in row.scores:
                points.setdefault(findings.curves[row.method], []).append((row.nfe, row.scores[score].mean))
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


def animation(frames: Tensor, caption: str, fps: float) -> str:
    """Frames uint8 [3,T,H,W] as a looping picture inside the page, with its caption."""
    file = io.BytesIO()  # an animated PNG: lossless, unlike a GIF
    pictures = frames.permute(1, 2, 3, 0).numpy()  # [T,H,W,3]
    iio.imwrite(file, pictures, plugin="pillow", extension=".png", duration=1000 / fps, loop=0)
    data = base64.b64encode(file.getvalue()).decode()
    picture = f'<img alt="" src="data:image/png;base64,{data}">'
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"
