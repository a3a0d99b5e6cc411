"""Exported weights: small, equal in every form, taken wherever a checkpoint is, and refused where it must be whole."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import words

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from diffusion.noise import generator_for
from diffusion.pipeline import MiddleFramePipeline
from tools.export_weights import main
from utils.checkpoint import load_checkpoint
from utils.video_utils import cross_fade, psnr

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def exported(ckpt, tmp_path_factory):
    """The shared checkpoint's weights, exported."""
    out = tmp_path_factory.mktemp("weights") / "squares.pt"
    assert main(["--ckpt", str(ckpt), "--out", str(out)]) == 0
    return out


def sampled(path):
    start, end = (torch.rand(1, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1).split(2, dim=2)
    return MiddleFramePipeline.from_checkpoint(path, "cpu")(start, end, steps=3, generator=[generator_for(1)])


def test_exported_weights_are_the_ema_in_half_precision_and_sample_like_their_source(exported, ckpt):
    weights, source = load_checkpoint(exported), load_checkpoint(ckpt)
    assert "model" not in weights and "optimizer" not in weights
    assert all(torch.equal(value, source["ema"][name].half()) for name, value in weights["ema"].items())
    assert weights["model_config"] == source["model_config"] and weights["args"]["data_root"] is None
    assert exported.stat().st_size < 0.2 * ckpt.stat().st_size  # of float32 weights, EMA and two moments: an eighth
    # half precision has 11 bits; a network passes them on about as they are
    assert (sampled(exported) - sampled(ckpt)).abs().mean() < 2e-3


def test_both_forms_of_weights_give_the_same_bits(exported):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    assert torch.equal(sampled(exported), sampled(exported.with_suffix(".safetensors")))


def test_scripts_take_exported_weights(exported, square_videos, tmp_path, capsys):
    data = f"--ckpt {exported} --data_root {square_videos} --cache_dir {tmp_path / 'cache'} --steps 2"
    assert sample_video_ddpm.main(words(f"{data} --out_dir {tmp_path / 'a'}")) == 0
    few = "--num_videos 1 --baselines cross_fade --metrics psnr"
    assert evaluate_video_ddpm.main(words(f"{data} --out_dir {tmp_path / 'b'} {few}")) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        sample_video_ddpm.main(words(f"{data} --out_dir {tmp_path / 'c'} --use_raw_model"))
    assert left.value.code == 2 and "holds EMA weights alone" in capsys.readouterr().err


def test_training_does_not_go_on_from_exported_weights(exported, tmp_path, capsys):
    shutil.copy(exported, tmp_path / "last.pt")
    with pytest.raises(SystemExit) as left:
        train_video_ddpm.main(words(f"--out_dir {tmp_path} --resume"))
    assert left.value.code == 2 and "last.pt: epoch is missing or out of range" in capsys.readouterr().err


def test_wrong_use_is_one_line_and_overwrites_nothing(exported, ckpt, tmp_path, capsys):
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"{}" * 40)
    for flags, message in (
        (f"--ckpt {ckpt} --out {exported}", f"--out {exported} exists; pass --overwrite"),
        (f"--ckpt {ckpt} --out {tmp_path / 'a.bin'}", "--out must end in .pt"),
        (f"--ckpt {tmp_path / 'none.pt'} --out {tmp_path / 'b.pt'}", "none.pt: no such checkpoint"),
        (f"--ckpt {damaged} --out {tmp_path / 'b.pt'}", "damaged.safetensors: not a readable checkpoint"),
    ):
        before = exported.read_bytes()
        with pytest.raises(SystemExit) as left:
            main(words(flags))
        error = capsys.readouterr().err
        assert left.value.code == 2 and message in error and len(error.splitlines()) == 1
        assert exported.read_bytes() == before


@pytest.mark.parametrize("name", ["robots", "droid"])
def test_shipped_weights_beat_the_cross_fade_between_the_examples(name):
    weights, folder = ROOT / "weights" / f"{name}.pt", ROOT / "examples" / name
    assert weights.stat().st_size <= 10e6
    pipe = MiddleFramePipeline.from_checkpoint(weights, "cpu")
    start, middle, end = (pipe.context(sorted(folder.glob(f"{part}_*.png"))) for part in ("start", "middle", "end"))
    made = pipe(start, end, generator=[generator_for(0)])
    assert psnr(made, middle).item() > psnr(cross_fade(start, end, 4), middle).item() + 1


def test_shipped_weights_say_nothing_of_the_machine_they_were_trained_on():
    for weights in (ROOT / "weights").glob("*.pt"):
        assert not [value for value in load_checkpoint(weights)["args"].values() if "/" in str(value)]
