"""The shipped weights and their documented figures; checkpoints exported to such files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sample_video_ddpm
import train_video_ddpm
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from tools import export_weights
from utils.checkpoint import load_checkpoint
from utils.images import load_context
from utils.video_utils import psnr

ROOT = Path(__file__).parents[1]
# PSNR in dB of the prediction and of a sample with seed 0, on the frames of examples/.
FIGURES = {"robots": (22.82, 22.40), "droid": (23.39, 20.43)}
PARTS = ("start", "middle", "end")


@pytest.mark.parametrize("name", FIGURES)
def test_shipped_weights_reach_their_figures_on_the_examples(name):
    weights = ROOT / "weights" / f"{name}.pt"
    assert weights.stat().st_size <= 10e6
    places = [str(value) for value in load_checkpoint(weights)["args"].values()]
    assert not [place for place in places if place.startswith(("/", "~"))]  # of another machine
    pipe = MiddleFramePipeline.from_checkpoint(weights, "cpu")
    parts = [sorted((ROOT / "examples" / name).glob(f"{part}_*.png")) for part in PARTS]
    start, middle, end = (load_context(paths, 64, "rgb") for paths in parts)
    sample = pipe(start, end, generator=[generator_for(0, SAMPLE, 0, 0)])
    decibels = [psnr(frames, middle).item() for frames in (pipe(start, end, steps=0), sample)]
    assert decibels == pytest.approx(FIGURES[name], abs=0.05)


@pytest.fixture(scope="module")
def exported(ckpt, tmp_path_factory):
    """The weights of the shared checkpoint, exported."""
    out = tmp_path_factory.mktemp("weights") / "squares.pt"
    script = [sys.executable, export_weights.__file__]
    subprocess.run([*script, "--ckpt", ckpt, "--out", out], cwd=out.parent, check=True)
    return out


def test_exported_weights_are_the_ema_in_half_precision_and_sample_alike(exported, ckpt):
    weights = load_checkpoint(exported)
    ema = load_checkpoint(ckpt)["ema"]
    assert all(torch.equal(value, ema[name].half()) for name, value in weights["ema"].items())
    assert not {"model", "optimizer"} & weights.keys() and weights["args"]["data_root"] is None
    assert exported.stat().st_size < ckpt.stat().st_size / 5
    clip = torch.rand(1, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1
    pipes = [MiddleFramePipeline.from_checkpoint(path, "cpu") for path in (ckpt, exported)]
    one, other = (pipe(*clip.split(2, 2), steps=3, generator=[generator_for(1)]) for pipe in pipes)
    # Half precision has 11 bits; a network passes them on about as they are.
    assert 0 < (one - other).abs().mean() < 2e-3


def test_contrast_and_codes_of_samples_are_numbers_of_the_exported_predictor(tmp_path):
    out = tmp_path / "robots.pt"
    flags = f"--ckpt {ROOT / 'weights/robots.pt'} --out {out} --contrast 3 --code_scale 0"
    assert export_weights.main(flags.split()) == 0
    config = load_checkpoint(ROOT / "weights/robots.pt")["predictor"]["config"]
    changed = {**config, "contrast": 3.0, "code_scale": 0.0}
    assert load_checkpoint(out)["predictor"]["config"] == changed


def test_wrong_use_is_one_line_that_names_flag_or_file(exported, ckpt, tmp_path, capsys):
    before = exported.read_bytes()
    (tmp_path / "last.pt").write_bytes(before)
    cases = [
        (export_weights, f"--ckpt {ckpt} --out {exported}", "--overwrite"),
        (export_weights, f"--ckpt {ckpt} --out {tmp_path / 'a.pt'} --contrast 3", "--contrast"),
        (sample_video_ddpm, f"--ckpt {exported} --use_raw_model", "squares.pt"),
        (train_video_ddpm, f"--out_dir {tmp_path} --resume", "last.pt"),
    ]
    for script, flags, name in cases:
        with pytest.raises(SystemExit) as stop:
            script.main(flags.split())
        error = capsys.readouterr().err
        assert stop.value.code == 2 and name in error and error.count("\n") == 1
    assert exported.read_bytes() == before
