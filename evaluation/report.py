"""What a reader gets: the table as Markdown and one self-contained page with pictures."""

import base64
import html
import io
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import torch

from data.video_index import Video
from evaluation.evaluator import Evaluator
from evaluation.metrics import HIGHER_IS_BETTER
from evaluation.protocols import PROTOCOLS, differences, rules
from evaluation.results import SCORES, PerClipResults, Row, error_by_position, summarise
from utils.io import atomic_write, bordered, observed_frames, save_json, save_training_curves
from utils.video_utils import as_pair, cross_fade, join_clip, split_clip, to_float, to_uint8

Report = dict[str, Any]  # what an evaluation says: metrics.json, of which table and page are made
Curves = dict[str, tuple[Sequence[float], Sequence[float]]]  # name: x and y

ANIMATION_FPS = 6
COLUMNS = {  # score -> (title, decimals)
    "psnr": ("PSNR, dB", 2),
    "psnr_clip": ("PSNR (clip), dB", 2),
    "psnr_middle": ("PSNR (middle), dB", 2),
    "ssim": ("SSIM", 4),
    "ssim_middle": ("SSIM (middle)", 4),
    "lpips": ("LPIPS", 4),
    "temporal_l1": ("temporal error", 5),
    "static_l1": ("static error", 5),
    "sharpness": ("sharpness", 3),
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


def make_report(
    evaluator: Evaluator, results: PerClipResults, protocol: str, weights: list[str], settings: dict[str, Any]
) -> Report:
    """Summarise the scores over the clips.

    `weights` names the files that scores were computed with; `settings` are the evaluation's, and `trained_frames`.

    Raises: ValueError: if no clip could be read.
    """
    lines, failures, reader = results.scored(), results.failures(), evaluator.reader
    if not lines:
        raise ValueError(f"--data_root {settings['data_root']}: no clip could be read: {'; '.join(failures)}")
    features = results.features if evaluator.i3d and len(lines) > 1 else None
    if evaluator.i3d and features is None:
        print("fvd is left out: it needs two clips or more")
    names, k, t = [method.name for method in evaluator.methods], evaluator.endpoint_context, reader.num_frames
    height, width = as_pair(reader.size)
    shown = f"{t} frames ({k} + {k} given, {t - 2 * k} generated), {height}x{width} {reader.color_mode}"
    rows = [row for name in names for row in summarise(lines, name, names[0], features)]
    scores = {name for row in rows for name in row.scores}
    if any("psnr" in row.versus_first for row in rows):
        scores.add("versus_first")
    way = PROTOCOLS[protocol]
    return {
        "title": f"{len(lines)} clips of {shown}, protocol {protocol}",
        "rows": rows,
        "protocol": protocol,
        "differences": differences(way, settings, len(lines)) if way.rows else [],
        "failures": failures,
        "frames": list(range(k, t - k)),  # those that are generated
        "positions": {name: error_by_position(lines, name) for name in names} if "psnr" in scores else {},
        "rules": [*rules(way, scores), *weights],
        "published": way.rows,
    }


def write_report(report: Report, out_dir: Path, pictures: str, history: dict | None, facts: dict) -> None:
    """Print the table and write table.md, metrics.json, report.html and, of a sweep, its plot.

    `pictures` are HTML, `history` is that of training, if any, `facts` are settings, versions and fingerprints.
    """
    plot, table = quality_against_work(report), as_markdown(report)
    files = {"table.md": table, "report.html": as_page(report, pictures, plot, history, facts)}
    if plot:
        files["quality_against_work.svg"] = plot
    for name, text in files.items():
        with atomic_write(out_dir / name) as file:
            file.write(text.encode())
    save_json(out_dir / "metrics.json", report | {"rows": [row.as_json() for row in report["rows"]]} | facts)
    print(f"\n{table}")
    print(f"{out_dir / 'report.html'}, {out_dir / 'table.md'}, {out_dir / 'metrics.json'}")


def as_markdown(report: Report) -> str:
    """The table with all that belongs to it."""
    text = [report["title"], "", markdown(table_cells(report["rows"])), "", *(f"- {rule}" for rule in report["rules"])]
    if report["differences"]:
        text += [
            "",
            markdown(published_cells(report["published"])),
            "",
            "What still differs from the published rows:",
            "",
        ]
        text += [f"- {line}" for line in report["differences"]]
    if report["failures"]:
        text += ["", f"Left out, unreadable: {', '.join(report['failures'])}"]
    return "\n".join([*text, ""])


def as_page(report: Report, pictures: str, plot: str | None, history: dict | None, facts: dict) -> str:
    """The whole page, which loads nothing: table, clips, plots and settings; arguments as `write_report`."""
    sections = {"Scores": html_table(table_cells(report["rows"])) + bullet_list(report["rules"])}
    if report["failures"]:
        sections["Left out, unreadable"] = bullet_list(report["failures"])
    if report["differences"]:
        sections["Published"] = html_table(published_cells(report["published"])) + bullet_list(report["differences"])
    sections["Clips"] = pictures
    if plot:
        sections["Quality against work"] = plot

    # PSNR of each generated frame, as a table and a plot.
    if report["positions"]:
        cells = [["PSNR of frame, dB", *map(str, report["frames"])]]
        cells += [[name, *(f"{value:.2f}" for value in values)] for name, values in report["positions"].items()]
        curves = {name: (report["frames"], values) for name, values in report["positions"].items()}
        sections["Error per frame position"] = html_table(cells) + (line_plots({"PSNR, dB": curves}, "frame") or "")

    # The curves of training, or what would bring them.
    if history is not None:
        file = io.BytesIO()
        if not history["train"]:
            sections["Training"] = "<p>The checkpoint holds no history.</p>"
        elif save_training_curves(file, history, file_format="svg"):
            sections["Training"] = "<svg" + file.getvalue().decode().partition("<svg")[2]
        else:
            sections["Training"] = "<p>Curves need matplotlib: pip install matplotlib</p>"

    # Every setting, folded away.
    flat = {name: value for name, value in facts.items() if name != "settings"} | facts.get("settings", {})
    rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in flat.items())
    sections["Settings"] = f"<details><summary>all settings</summary><table>{rows}</table></details>"

    title = html.escape(report["title"])
    body = "\n".join(f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections.items())
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{STYLE}</style></head>\n<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table as text, its titles first; columns that no row has are left out."""
    columns = {name: column for name, column in COLUMNS.items() if any(name in row.scores for row in rows)}
    titles = ["method", "samples", *(title for title, _ in columns.values()), "forwards / sample", "s / sample"]
    compared = any("psnr" in row.versus_first for row in rows)
    cells = [[*titles[:3], "PSNR - first row", *titles[3:]] if compared else titles]
    for row in rows:
        shown = {name: value.show(columns[name][1]) for name, value in row.scores.items()}
        scores = [shown.get(name, "") for name in columns]
        if compared:
            scores.insert(1, row.versus_first["psnr"].show(2, sign="+") if row.versus_first else "")
        cells.append([row.method, row.samples, *scores, str(row.nfe), f"{row.seconds:.3g}"])
    return cells


def published_cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The published rows as text, their titles first."""
    return [list(rows[0]), *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows)]


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
    return "<svg" + text.getvalue().partition("<svg")[2]  # without what stands before the element


def quality_against_work(report: Report) -> str | None:
    """Scores against network forwards, as an SVG element; None where no two numbers of steps were run."""
    panels: dict[str, Curves] = {}
    for score in ("psnr", "ssim", "temporal_l1"):
        points: dict[str, list[tuple[int, float]]] = {}
        for row in report["rows"]:
            if row.nfe and row.kind == "mean" and score in row.scores:
                curve = re.sub(r" \d+", "", row.method.removeprefix("ours, "), count=1)  # any number of steps
                points.setdefault(curve, []).append((row.nfe, row.scores[score].mean))
        if max(map(len, points.values()), default=0) >= 2:
            panels[COLUMNS[score][0]] = {name: tuple(zip(*sorted(xy), strict=True)) for name, xy in points.items()}
    return line_plots(panels, "network forwards per sample", log_x=True) if panels else None


def bullet_list(lines: Sequence[str]) -> str:
    """Lines as an HTML list."""
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"


def animations(evaluator: Evaluator, videos: Sequence[Video], results: PerClipResults) -> str:
    """The best, median and worst clip of the first method: truth, the method's first sample, and the cross-fade.

    Best by the first score that was measured; the clips are the first, the middle and the last where none was.
    """
    method, k, lines = evaluator.methods[0], evaluator.endpoint_context, results.scored()
    scores = {line["clip"]: line["methods"][method.name]["samples"][0] for line in lines}
    score = next((name for name in SCORES[:-1] if name in scores[lines[0]["clip"]]), None)
    titles = ("best", "median", "worst") if score else ("first", "middle", "last")
    if score:
        lines.sort(key=lambda line: scores[line["clip"]][score], reverse=score in HIGHER_IS_BETTER)
    parts = []
    for title, line in zip(titles, (lines[0], lines[len(lines) // 2], lines[-1]), strict=True):
        number, source = line["clip"], line["source"]
        clip = evaluator.reader.read(videos[number], source["first_frame"])
        if isinstance(clip, str):
            continue
        start, truth, end = split_clip(to_float(clip[None]).to(evaluator.device), k)
        middles = (truth, method.generate(start, end, [(number, 0)]), cross_fade(start, end, truth.shape[2]))
        wholes = [to_uint8(join_clip(start, middle, end))[0] for middle in middles]
        frames = torch.cat([bordered(whole, observed_frames(clip.shape[1], k)) for whole in wholes], dim=3)
        frames = frames.permute(1, 2, 3, 0)  # [T,H,3W,3]
        quality = f", {COLUMNS[score][0]}: {scores[number][score]:.{COLUMNS[score][1]}f}" if score else ""
        caption = f"{title}: {source['name']}{quality} - truth, {method.name}, cross-fade (orange = given)"
        file = io.BytesIO()  # an animated PNG: lossless, unlike a GIF
        iio.imwrite(file, frames.numpy(), plugin="pillow", extension=".png", duration=1000 / ANIMATION_FPS, loop=0)
        picture = f'<img alt="" src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
        parts.append(f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return "\n".join(parts)
