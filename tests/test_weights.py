"""The shipped weights and their documented figures; checkpoints exported to such files."""

from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS

import sample_video_ddpm
import train_video_ddpm
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from tools import export_weights
from utils.checkpoint import load_checkpoint
from utils.images import load_context
from utils.video_utils import psnr

ROOT = Path(__file__).parents[1]
# PSNR in dB of the prediction and of a sample with seed 0, between the frames of examples/.
FIGURES = {"robots": (23.16, 23.02), "droid": (22.99, 22.70)}


@pytest.mark.parametrize("name", FIGURES)
def test_shipped_weights_reach_their_figures_on_the_examples(name):
    weights = ROOT / "weights" / f"{name}.pt"
    assert weights.stat().st_size <= 10e6
    pipe = MiddleFramePipeline.from_checkpoint(weights, "cpu")
    paths = {part: sorted((ROOT / "examples" / name).glob(f"{part}_*.png")) for part in PARTS}
    start, middle, end = (load_context(paths[part], 64, "rgb") for part in PARTS)
    prediction = pipe(start, end, steps=0)
    sample = pipe(start, end, generator=[generator_for(0, SAMPLE, 0, 0)])
    found = [psnr(frames, middle).item() for frames in (prediction, sample)]
    assert found == pytest.approx(FIGURES[name], abs=0.05)


PARTS = ("start", "middle", "end")


def test_shipped_weights_say_nothing_of_the_machine_they_were_trained_on():
    for weights in (ROOT / "weights").glob("*.pt"):
        values = load_checkpoint(weights)["args"].values()
        assert not [value for value in values if str(value).startswith(("/", "~"))]


def test_a_shipped_predictor_can_be_refined_around(square_videos, tmp_path):
    weights = ROOT / "weights" / "robots.pt"
    folders = ["--data_root", square_videos, "--out_dir", tmp_path, "--cache_dir", tmp_path]
    flags = ["--predictor", weights, "--max_steps", 1, "--vis_every", 0]
    argv = [str(word) for word in (*folders, *TINY_FLAGS, *flags)]
    assert train_video_ddpm.main(argv) == 0
    frozen = [load_checkpoint(path)["predictor"] for path in (weights, tmp_path / "last.pt")]
    assert frozen[0]["config"] == frozen[1]["config"]
    pairs = zip(*(predictor["weights"].values() for predictor in frozen), strict=True)
    assert all(torch.equal(one.float(), other.float()) for one, other in pairs)


# --- export ---


@pytest.fixture(scope="module")
def exported(ckpt, tmp_path_factory):
    """The weights of the shared checkpoint, exported."""
    out = tmp_path_factory.mktemp("weights") / "squares.pt"
    assert export_weights.main(["--ckpt", str(ckpt), "--out", str(out)]) == 0
    return out


def test_exported_weights_are_the_ema_in_half_precision_and_sample_alike(exported, ckpt):
    weights = load_checkpoint(exported)
    source = load_checkpoint(ckpt)
    assert not {"model", "optimizer"} & weights.keys()
    assert all(
        torch.equal(value, source["ema"][name].half()) for name, value in weights["ema"].items()
    )
    assert weights["args"]["data_root"] is None
    assert exported.stat().st_size < ckpt.stat().st_size / 5  # of an eighth, and the rest
    clip = torch.rand(1, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1
    samples = []
    for path in (ckpt, exported):
        pipe = MiddleFramePipeline.from_checkpoint(path, "cpu")
        samples.append(pipe(clip[:, :, :2], clip[:, :, 2:], steps=3, generator=[generator_for(1)]))
    # Half precision has 11 bits; a network passes them on about as they are.
    assert (samples[0] - samples[1]).abs().mean() < 2e-3


def test_wrong_use_is_one_line_that_names_flag_or_file(exported, ckpt, tmp_path, capsys):
    (tmp_path / "last.pt").write_bytes(exported.read_bytes())
    before = exported.read_bytes()
    cases = [
        (export_weights, ["--ckpt", ckpt, "--out", exported], "--overwrite"),
        (export_weights, ["--ckpt", tmp_path / "no.pt", "--out", tmp_path / "b.pt"], "no.pt"),
        (sample_video_ddpm, ["--ckpt", exported, "--use_raw_model"], "squares.pt"),
        (train_video_ddpm, ["--out_dir", tmp_path, "--resume"], "last.pt"),
    ]
    for script, argv, name in cases:
        with pytest.raises(SystemExit) as stop:
            script.main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and name in error and error.count("\n") == 1
    assert exported.read_bytes() == before
