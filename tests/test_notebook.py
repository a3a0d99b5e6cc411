"""The notebook runs from top to bottom on the shipped weights, and stores what they give."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples/middle_frames.ipynb"


def outputs(notebook):
    """The kinds of its pictures, and its figures in dB."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in found for kind in output.get("data", {}) if "image" in kind]
    text = "".join(output.get("text", "") for output in found)
    return kinds, [float(value) for value in re.findall(r"([\d.]+) dB", text)]


def test_the_notebook_runs_and_shows_what_is_stored_in_it(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    for name in ("weights", "examples", "train_video_ddpm.py"):
        (tmp_path / name).symlink_to(ROOT / name)  # so that it writes nothing into the repository
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    stored = outputs(notebook)
    settings = {"timeout": None, "startup_timeout": 3600, "kernel_name": "python3"}
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, resources=resources, **settings).execute()
    pictures, decibels = outputs(notebook)
    assert pictures == stored[0] and len(pictures) == 3
    assert decibels == pytest.approx(stored[1], abs=0.05) and len(decibels) == 2
    assert (tmp_path / "outputs/notebook.gif").is_file() and NOTEBOOK.stat().st_size < 460_000
