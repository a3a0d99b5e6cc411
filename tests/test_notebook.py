"""The notebook runs top to bottom on the shipped weights, and what is stored in it is what they give."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/middle_frames.ipynb"


def pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [kind for output in outputs for kind in output.get("data", {}) if kind.startswith("image/")]


def decibels(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [float(value) for output in outputs for value in re.findall(r"([\d.]+) dB", output.get("text", ""))]


def test_the_notebook_runs_top_to_bottom_and_shows_its_pictures(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbclient ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install nbclient ipykernel")
    pytest.importorskip("ipykernel", reason="pip install nbclient ipykernel")
    for name in ("weights", "examples", "train_video_ddpm.py"):
        (tmp_path / name).symlink_to(ROOT / name)  # so that it writes nothing into the repository
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = nbformat.read(NOTEBOOK, as_version=4)
    ran = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(ran, timeout=100, kernel_name="python3", resources=where).execute()  # raises on any error
    assert pictures(ran) == pictures(stored) and len(pictures(ran)) == 3
    assert decibels(ran) == pytest.approx(decibels(stored), abs=0.05) and len(decibels(ran)) == 2
    assert (tmp_path / "outputs/notebook.gif").is_file()
