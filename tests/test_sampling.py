"""Sampling as a user runs it: images in, exact observed frames out, nothing overwritten."""

import json
import shutil
import sys

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint

import evaluate_video_ddpm
from data.video_reader import probe_video
from diffusion.pipeline import SAMPLER_PRESETS, forwards_per_clip, settings_grid
from sample_video_ddpm import build_parser, main
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.io import read_image
from utils.video_utils import resize_and_crop, to_gray

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def sample(tmp_path, ckpt):
    """Run the script with few steps (0 = its own number of them); returns its output folder."""

    def run(*flags, status=0, checkpoint=ckpt, out="out", steps=3):
        argv = ["--ckpt", checkpoint, "--out_dir", tmp_path / out, "--cache_dir", tmp_path / "cache"]
        argv += ["--steps", steps] * bool(steps) + list(flags)
        with pytest.raises(SystemExit) as stop:
            sys.exit(main(list(map(str, argv))))
        assert stop.value.code == status
        return tmp_path / out

    return run


@pytest.fixture
def pngs(tmp_path):
    """Four random pictures at native size, as paths."""
    rng = np.random.default_rng(5)
    paths = [tmp_path / f"{name}.png" for name in ("start_0", "start_1", "end_0", "end_1")]
    for path in paths:
        iio.imwrite(path, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return paths


def ends(paths):
    half = len(paths) // 2
    return ["--start_images", *paths[:half], "--end_images", *paths[half:]]


def frames(folder):
    """The written clip, [T,H,W,3] or [T,H,W]."""
    return np.stack([iio.imread(path) for path in sorted((folder / "frames").glob("*.png"))])


def record_of(folder):
    return json.loads((folder / "sample.json").read_text())


def assert_observed(made, paths):
    """The ends of a clip are the given images, byte for byte."""
    k = len(paths) // 2
    assert np.array_equal(np.concatenate([made[:k], made[-k:]]), [iio.imread(path) for path in paths])


def test_observed_frames_come_out_byte_for_byte_and_every_form_is_written(sample, pngs):
    out = sample(*ends(pngs))
    made = frames(out)
    assert len(made) == 8
    assert_observed(made, pngs)
    pictures = {"frames", "start_context.png", "end_context.png", "sheet.png"}
    assert {path.name for path in out.iterdir()} == {"sample.mp4", "sample.gif", "sample.json"} | pictures
    info = probe_video(out / "sample.mp4")
    assert (info.frames, info.width, info.height, info.rate) == (8, 16, 16, 8)
    assert iio.imread(out / "sample.gif").shape[0] == 8
    assert np.array_equal(iio.imread(out / "end_context.png"), np.hstack([iio.imread(path) for path in pngs[2:]]))


def test_true_middle_images_are_scored_and_shown(sample, pngs, capsys):
    truth = [pngs[0]] * 4
    out = sample(*ends(pngs), "--middle_images", *truth)
    made, true = frames(out)[2:-2] / 255, iio.imread(pngs[0]) / 255
    decibels = np.mean([-10 * np.log10(np.mean((frame - true) ** 2)) for frame in made])
    assert record_of(out)["scores"]["psnr"] == pytest.approx(decibels, abs=1e-3)
    assert f"middle PSNR {decibels:.2f} dB (cross-fade " in capsys.readouterr().out
    rows = iio.imread(sample(*ends(pngs), out="alone") / "sheet.png").shape[0]
    assert iio.imread(out / "sheet.png").shape[0] > 1.5 * rows  # a row more, that of the truth


def test_the_record_holds_every_setting_by_default_the_fast_presets(sample, pngs):
    record = record_of(sample(*ends(pngs), "--seed", 7, "--eta", 0.5))
    expected = {"seed": 7, "eta": 0.5, "steps": 3, "guidance_scale": 1.8, "nfe": 6, "checkpoint_step": 2}
    assert expected.items() <= record.items()
    assert record["num_frames"] == 8 and record["size"] == 16 and record["seconds"] > 0
    assert set(vars(build_parser().defaults())) <= set(record)
    assert record_of(sample(*ends(pngs), "--guidance_scale", 1, out="plain"))["nfe"] == 3
    fast = {"nfe": 6, "steps": 5, "spacing": "quadratic", "guidance_interval": [0.3, 0.9], "guidance_scale": 1.8}
    assert fast.items() <= record_of(sample(steps=0, out="default")).items()  # the fast preset


def test_the_ends_the_seed_and_the_weights_decide_the_middle(sample, pngs):
    def middle(*flags, images=pngs, out):
        return frames(sample(*ends(images), *flags, out=out))[2:-2].astype(int)

    base = middle(out="a")
    assert np.array_equal(base, middle(out="again"))
    swapped = middle(images=[*pngs[2:], *pngs[:2]], out="b")
    for other in (swapped, middle("--seed", 1, out="c"), middle("--use_raw_model", out="d")):
        assert np.abs(base - other).max() > 2
    assert np.abs(base - middle("--guidance_scale", 0, out="e")).max() > 2
    unconditional = middle("--guidance_scale", 0, images=[*pngs[2:], *pngs[:2]], out="f")
    assert np.array_equal(unconditional, middle("--guidance_scale", 0, out="g"))


def test_batches_and_compilation_change_no_frame(sample, monkeypatch):
    compiled = []

    def compile_nothing(function, **options):  # the real one needs a compiler and minutes; --compile must only call it
        compiled.append((function.__name__, options))
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    common = ["--num_clips", 1, "--num_samples", 2]
    plain = sample(*common, "--batch_size", 1, out="plain")
    fast = sample(*common, "--compile", out="compiled")
    assert compiled == [("encode_contexts", {"dynamic": False}), ("denoise", {"dynamic": False})]
    for name in ("clip_000_sample_000", "clip_000_sample_001"):
        one, other = (frames(folder / name).astype(int) for folder in (plain, fast))
        assert np.abs(one - other).max() <= 1  # a pixel may round the other way


def test_images_are_treated_as_clip_frames_are(sample, tmp_path):
    rng = np.random.default_rng(1)
    paths = []
    for i, (h, w) in enumerate([(40, 24), (16, 64), (33, 47), (20, 20)]):
        paths.append(tmp_path / f"{i}.{'jpg' if i == 2 else 'png'}")
        iio.imwrite(paths[-1], rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    made = frames(sample(*ends(paths)))
    for path, got in zip(paths, [*made[:2], *made[-2:]], strict=True):
        assert np.array_equal(resize_and_crop(read_image(path), 16).permute(1, 2, 0).numpy(), got)


def test_gray_checkpoints_take_colour_images_as_luma(sample, pngs, square_videos, tmp_path):
    checkpoint = tiny_checkpoint(tmp_path, square_videos, "--color_mode", "gray")
    made = frames(sample(*ends(pngs), checkpoint=checkpoint))
    assert made[0].shape == (16, 16)
    assert np.array_equal(made[0], to_gray(read_image(pngs[0]))[0].numpy())
    for path in pngs:
        iio.imwrite(path, iio.imread(path)[..., 0])
    assert_observed(frames(sample(*ends(pngs), checkpoint=checkpoint, out="gray")), pngs)  # gray is not touched


@pytest.mark.parametrize(("k", "t"), [(1, 3), (3, 8)])
def test_other_numbers_of_observed_and_generated_frames(sample, pngs, square_videos, tmp_path, k, t):
    checkpoint = tiny_checkpoint(tmp_path, square_videos, "--endpoint_context", str(k), "--T", str(t))
    images = [pngs[i % 4] for i in range(2 * k)]
    made = frames(sample(*ends(images), checkpoint=checkpoint, out="k"))
    assert len(made) == t
    assert_observed(made, images)


def test_another_length_and_size_than_trained(sample, pngs):
    assert len(frames(sample(*ends(pngs), "--T", 5, out="short"))) == 5
    assert len(frames(sample(*ends(pngs), "--T", 13, out="long"))) == 13
    assert frames(sample(*ends(pngs), "--size", 24, out="large"))[0].shape == (24, 24, 3)


def test_without_images_held_out_clips_are_continued_and_scored_each_sample_by_itself(sample, capsys):
    out = sample("--num_clips", 1, "--num_samples", 2)
    assert sorted(path.name for path in out.iterdir()) == ["clip_000_sample_000", "clip_000_sample_001"]
    first, second = (frames(out / f"clip_000_sample_00{n}") for n in (0, 1))
    assert np.array_equal(first[[0, 1, -2, -1]], second[[0, 1, -2, -1]]) and not np.array_equal(first[3], second[3])
    printed = capsys.readouterr().out
    assert printed.count("cross-fade") == 3 and "mean of 2: middle PSNR" in printed
    record = record_of(out / "clip_000_sample_001")
    assert record["scores"]["psnr"] > 0 and record["source"].endswith(".mp4")
    sheet = iio.imread(out / "clip_000_sample_000" / "sheet.png")
    assert sheet.shape == (2 * (6 * 16 + 6), 8 * (6 * 16 + 6), 3)  # truth above, generated below
    assert np.array_equal(first, frames(sample(out="alone")))  # whatever is drawn beside it


def test_an_earlier_sample_is_never_overwritten_unasked(sample, pngs, capsys):
    out = sample(*ends(pngs), "--T", 9)
    before = (out / "sample.mp4").read_bytes()
    sample(*ends(pngs), "--seed", 1, status=2)
    assert "pass --overwrite" in capsys.readouterr().err
    assert (out / "sample.mp4").read_bytes() == before
    sample(*ends(pngs), "--seed", 1, "--overwrite")
    assert len(frames(out)) == 8 and (out / "sample.mp4").read_bytes() != before
    mine = out.parent / "mine"
    (mine / "frames").mkdir(parents=True)
    (mine / "frames" / "001.png").write_text("my picture")
    sample(*ends(pngs), out="mine", status=2)
    assert (mine / "frames" / "001.png").read_text() == "my picture"


def wrong(pngs, tmp_path, ckpt):
    """(flags, message) of wrong uses."""
    text, cut, other = (tmp_path / name for name in ("text.png", "cut.pt", "other.pt"))
    text.write_text("hello")
    cut.write_bytes(ckpt.read_bytes()[:5000])
    checkpoint = load_checkpoint(ckpt)
    save_checkpoint(other, checkpoint | {"model_config": checkpoint["model_config"] | {"base_channels": 24}})
    for path, message in ((cut, "not a readable checkpoint"), (tmp_path / "no.pt", "no such"), (other, "do not fit")):
        yield [*ends(pngs), "--ckpt", path], message
    yield ["--start_images", pngs[0], "--end_images", *pngs[2:]], "--start_images must be 2 images"
    yield ["--start_images", *pngs[:2]], "must be given together"
    yield [*ends(pngs), "--num_clips", "2"], "--start_images must be given without --data_root and --num_clips"
    yield ["--middle_images", *pngs], "--middle_images needs --start_images and --end_images"
    yield [*ends(pngs), "--middle_images", pngs[0]], "--middle_images must be 4 images, those between the ends (got 1)"
    yield ["--start_images", pngs[0], tmp_path / "no.png", "--end_images", *pngs[2:]], "no.png: no such image file"
    yield ["--start_images", pngs[0], text, "--end_images", *pngs[2:]], "text.png: not a readable image"
    yield [*ends(pngs), "--T", 4], "--T must exceed 2 * --endpoint_context so that a middle exists (got --T 4"
    yield [*ends(pngs), "--size", 18], "--size must be divisible by 4"
    yield [*ends(pngs), "--endpoint_context", 3], "--endpoint_context is fixed by"
    yield [*ends(pngs), "--color_mode", "gray"], "--color_mode is fixed by"
    yield [*ends(pngs), "--steps", 5000], "--steps must lie in [1, 1000]"
    yield [*ends(pngs), "--eta", 2], "argument --eta: must be a number in [0, 1]"
    yield ["--num_clips", 99], "--num_clips must be at most the 1 held-out clips"
    yield ["--T", 99], "--num_clips must be at most the 0 held-out clips"
    yield ["--data_root", ""], "argument --data_root: must not be empty"
    yield ["--data_root", tmp_path / "nowhere"], "--data_root must be a folder"
    yield [*ends(pngs), "--out_dir", text / "out"], "text.png/out: cannot be made"


def test_wrong_use_is_one_line_and_status_two(sample, pngs, tmp_path, ckpt, capsys):
    for flags, message in wrong(pngs, tmp_path, ckpt):
        sample(*flags, status=2, out="wrong")
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_frames_need_not_be_square(square_videos, tmp_path, pngs):
    ckpt = tiny_checkpoint(tmp_path, square_videos, "--size", "16", "24")
    out = ["--out_dir", str(tmp_path / "made"), "--cache_dir", str(tmp_path / "cache"), "--steps", "2"]
    clips = ["--num_clips", "1"]
    for flags, shape in ((clips, (16, 24)), (ends(pngs), (16, 24)), ([*clips, "--size", "24", "16"], (24, 16))):
        assert main(["--ckpt", str(ckpt), *out, *map(str, flags), "--overwrite"]) == 0
        assert frames(tmp_path / "made").shape == (8, *shape, 3)
        assert record_of(tmp_path / "made")["size"] == list(shape)
    few = ["--metrics", "psnr", "ssim", "--baselines", "flow", "cross_fade"]
    assert evaluate_video_ddpm.main(["--ckpt", str(ckpt), *out, *few]) == 0
    assert "16x24 rgb" in (tmp_path / "made" / "report.html").read_text()


def test_the_checkpoint_moves_without_its_data(sample, pngs, ckpt, tmp_path):
    moved = shutil.copy(ckpt, tmp_path / "moved.pt")
    assert len(frames(sample(*ends(pngs), checkpoint=moved))) == 8


def test_the_original_flags_mean_the_original_sampler_and_no_flag_the_fast_one():
    reference = {"sampler": "ddim", "steps": 40, "spacing": "linspace", "guidance_scale": 1.8, "eta": 0.0}
    reference |= {"guidance_interval": (0.0, 1.0), "clip_x0": True, "dynamic_threshold": False}
    fast = reference | SAMPLER_PRESETS["fast"]
    parsed = lambda *flags: settings_grid(vars(build_parser().parse_args(["--ckpt", "x.pt", *flags])))[0]  # noqa: E731
    assert parsed("--steps", "40", "--eta", "0.0", "--guidance_scale", "1.8") == reference
    assert parsed("--preset", "reference") == reference
    for flag, value in (("steps", 12), ("guidance_scale", 1.0), ("eta", 0.5), ("sampler", "dpmpp_2m")):
        assert parsed(f"--{flag}", str(value)) == reference | {flag: value}
    assert parsed() == parsed("--preset", "fast") == fast
    assert parsed("--preset", "fast", "--steps", "12") == fast | {"steps": 12}
    assert forwards_per_clip(1000, reference) >= 6 * forwards_per_clip(1000, fast)
