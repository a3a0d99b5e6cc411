"""Sampling as a user runs it: observed frames stay exact, noise is keyed, wrong input is a line."""

import itertools
import json

import hostile
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from test_gap_filler import decoded, packets, with_sound

import sample_video_ddpm
from data.video_index import prepare_videos
from data.video_reader import probe_video
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from models.predictor import FramePredictor
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.images import load_context
from utils.io import read_image, save_mp4
from utils.video_utils import resize, resize_and_crop, to_gray, to_uint8

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def sample(tmp_path, ckpt):
    """Run the script in few steps (None = its default); returns its output folder."""

    def run(*flags, status=0, checkpoint=ckpt, out="out", steps=3):
        argv = ["--ckpt", checkpoint, "--out_dir", tmp_path / out, "--device", "cpu"]
        if steps is not None:
            argv += ["--steps", steps]
        try:
            result = sample_video_ddpm.main([str(word) for word in (*argv, *flags)])
        except SystemExit as stop:
            result = stop.code
        assert result == status
        return tmp_path / out

    return run


@pytest.fixture
def pngs(tmp_path):
    """Four random pictures of the checkpoint's size."""
    rng = np.random.default_rng(5)
    paths = [tmp_path / f"{name}.png" for name in ("start_0", "start_1", "end_0", "end_1")]
    for path in paths:
        iio.imwrite(path, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return paths


@pytest.fixture(scope="module")
def predictor(tmp_path_factory, square_videos):
    """A checkpoint of --train predictor."""
    return tiny_checkpoint(tmp_path_factory.mktemp("one"), square_videos, "--train", "predictor")


@pytest.fixture(scope="module")
def refining(tmp_path_factory, square_videos, predictor):
    """A checkpoint that refines around that predictor."""
    flags = ("--predictor", str(predictor))
    return tiny_checkpoint(tmp_path_factory.mktemp("two"), square_videos, *flags)


@pytest.fixture(scope="module")
def gray(tmp_path_factory, square_videos):
    """A checkpoint of gray clips of three frames, the middle one generated."""
    flags = ("--color_mode", "gray", "--endpoint_context", "1", "--T", "3")
    return tiny_checkpoint(tmp_path_factory.mktemp("gray"), square_videos, *flags)


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Five held-out videos: everywhere in frame i of video v the level is 40 * v + i."""
    root = tmp_path_factory.mktemp("levels")
    for name in ("train/0", *(f"val/{v}" for v in range(5))):
        path = root / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        clip = 40 * int(path.stem) + torch.arange(21, dtype=torch.uint8)
        clip = clip.view(1, -1, 1, 1).expand(3, -1, 16, 16)
        save_mp4(path, clip, fps=10, lossless=True)
    return root


def copy_with(ckpt, path, args=(), clip=()):
    """A copy of a checkpoint with other values."""
    state = load_checkpoint(ckpt)
    state["args"].update(args)
    state["clip_config"].update(clip)
    save_checkpoint(path, state)
    return path


def ends(paths):
    half = len(paths) // 2
    return ["--start_images", *paths[:half], "--end_images", *paths[half:]]


def frames(folder):
    """The written clip, uint8 [T,H,W,3] or, in gray, [T,H,W]."""
    return np.stack([iio.imread(path) for path in sorted((folder / "frames").glob("*.png"))])


def record(folder):
    return json.loads((folder / "sample.json").read_text())


def pixels(middle):
    """What a sample [1,C,M,H,W] becomes in files: [M,H,W,C]."""
    return to_uint8(middle)[0].permute(1, 2, 3, 0).numpy()


def near(a, b):
    """Whether no pixel differs by more than a rounding."""
    return np.abs(a.astype(int) - b).max() <= 1


def decibels(made, truth):
    """Mean PSNR of frames [M,H,W,3] of 0..255."""
    error = (made.astype(float) - truth) ** 2
    return np.mean(10 * np.log10(255**2 / error.mean((1, 2, 3))))


# --- observed frames and files ---


def test_observed_frames_pass_bit_for_bit_and_every_form_is_written(sample, pngs):
    out = sample(*ends(pngs), "--fps", 5)
    given = [iio.imread(path) for path in pngs]
    made = frames(out)
    assert len(made) == 8 and np.array_equal(made[[0, 1, 6, 7]], given)
    pictures = {"frames", "start_context.png", "end_context.png", "sheet.png"}
    videos = {"sample.mp4", "sample.gif"}
    assert {path.name for path in out.iterdir()} == {"sample.json", *pictures, *videos}
    info = probe_video(out / "sample.mp4")
    assert (info.frames, info.width, info.height, info.rate) == (8, 16, 16, 5)
    assert len(iio.imread(out / "sample.gif")) == 8
    assert np.array_equal(iio.imread(out / "start_context.png"), np.hstack(given[:2]))
    assert np.array_equal(iio.imread(out / "end_context.png"), np.hstack(given[2:]))


def test_true_middle_images_give_a_score_and_a_row_of_the_sheet(sample, pngs):
    middles = [pngs[i] for i in (3, 0, 1, 2)]
    out = sample(*ends(pngs), "--middle_images", *middles)
    truth = np.stack([iio.imread(path) for path in middles])
    start, end = (iio.imread(path).astype(float) for path in pngs[1:3])
    faded = np.stack([start + (end - start) * i / 5 for i in range(1, 5)]).round()
    scores = record(out)["scores"]
    assert scores["psnr"] == pytest.approx(decibels(frames(out)[2:-2], truth), abs=1e-3)
    assert scores["psnr_cross_fade"] == pytest.approx(decibels(faded, truth), abs=1e-3)
    assert record(out)["checkpoint_step"] == 2 and record(out)["size"] == 16
    plain = sample(*ends(pngs), out="plain")
    assert record(plain)["scores"] is None
    sheets = [iio.imread(folder / "sheet.png") for folder in (out, plain)]
    assert len(sheets[0]) == 2 * len(sheets[1])
    assert np.array_equal(sheets[0][len(sheets[1]) :], sheets[1])  # truth above, generated below


def test_images_are_resized_and_cropped_to_sizes_that_are_not_square(sample, ckpt, tmp_path):
    rng = np.random.default_rng(1)
    paths = []
    for i, (h, w) in enumerate([(40, 24), (16, 64), (33, 47), (20, 20)]):
        paths.append(tmp_path / f"{i}.png")
        iio.imwrite(paths[i], rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
    wide = copy_with(ckpt, tmp_path / "wide.pt", clip={"size": [16, 24]})
    outs = {
        (16, 24): sample(*ends(paths), "--T", 5, checkpoint=wide),
        (24, 16): sample(*ends(paths), "--T", 5, "--size", 24, 16, checkpoint=wide, out="tall"),
    }
    for size, out in outs.items():
        made = frames(out)
        assert made.shape == (5, *size, 3) and record(out)["size"] == list(size)
        for path, frame in zip(paths, made[[0, 1, 3, 4]], strict=True):
            expected = resize_and_crop(read_image(path), size).permute(1, 2, 0)
            assert np.array_equal(frame, expected)


def test_gray_checkpoints_take_luma_and_leave_gray_images_as_they_are(sample, gray, pngs):
    given = [pngs[0], pngs[3]]
    made = frames(sample(*ends(given), checkpoint=gray))
    assert made.shape == (3, 16, 16)
    luma = [to_gray(read_image(path))[0] for path in given]
    assert np.array_equal(made[[0, 2]], torch.stack(luma))
    for path in given:
        iio.imwrite(path, iio.imread(path)[..., 0])
    made = frames(sample(*ends(given), checkpoint=gray, out="gray"))
    assert np.array_equal(made[[0, 2]], [iio.imread(path) for path in given])


# --- held-out clips ---


@pytest.mark.parametrize(("stride", "observed"), [(1, [6, 7, 12, 13]), (2, [3, 5, 15, 17])])
def test_clips_are_central_windows_of_evenly_chosen_files(
    sample, ckpt, levels, tmp_path, stride, observed
):
    checkpoint = copy_with(ckpt, tmp_path / "a.pt", clip={"frame_stride": stride})
    out = sample("--data_root", levels, "--num_clips", 2, checkpoint=checkpoint)
    for clip, video in ((0, 0), (1, 2)):
        folder = out / f"clip_{clip:03d}_sample_000"
        made = frames(folder)
        expected = [40 * video + i for i in observed]
        assert made[[0, 1, 6, 7], 3, 5, 0].tolist() == expected
        truth = np.arange(expected[1] + stride, expected[2], stride).reshape(4, 1, 1, 1)
        psnr = decibels(made[2:-2], truth)
        assert record(folder)["scores"]["psnr"] == pytest.approx(psnr, abs=1e-3)
        assert record(folder)["source"] == f"val/{video}.mp4"


@pytest.mark.parametrize("seed", [0, 1])
def test_clips_are_those_that_training_held_out(sample, ckpt, square_videos, tmp_path, seed):
    split = {"val_ratio": 0.5, "seed": seed}
    checkpoint = copy_with(ckpt, tmp_path / "a.pt", args=split)
    _, held_out = prepare_videos(square_videos, span=8, cache_dir=tmp_path, **split)
    out = sample("--num_clips", len(held_out), checkpoint=checkpoint)
    folders = [out / f"clip_{clip:03d}_sample_000" for clip in range(len(held_out))]
    assert [record(folder)["source"] for folder in folders] == [video.name for video in held_out]


def test_noise_depends_on_seed_clip_and_sample_only(sample, ckpt, levels, monkeypatch):
    flags = ("--data_root", levels, "--num_clips", 3, "--num_samples", 2, "--seed", 7)
    out = sample(*flags)
    monkeypatch.setattr(sample_video_ddpm, "BATCH_SIZE", 2)
    other = sample(*flags, out="batches")
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    for clip, number in itertools.product(range(3), range(2)):
        name = f"clip_{clip:03d}_sample_{number:03d}"
        made = frames(out / name)
        noise = generator_for(7, SAMPLE, clip, number)
        middle = pipe(made[:2], made[-2:], steps=3, generator=[noise])
        assert near(made[2:-2], pixels(middle))
        assert near(made, frames(other / name))


# --- sampler and weights ---

# A value for each flag, and the forwards of one sample with it.
SETTINGS = {
    "steps": (5, 10),
    "spacing": ("quadratic", 80),
    "guidance_scale": (1.0, 40),
    "guidance_interval": ([0.3, 0.9], 64),
    "eta": (0.5, 80),
    "dynamic_threshold": (True, 80),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_flag_replaces_one_value_of_the_default_sampler(sample, ckpt, pngs, name):
    value, nfe = SETTINGS[name]
    words = [] if value is True else np.ravel(value)
    out = sample(*ends(pngs), f"--{name}", *words, steps=None)
    expected = {
        "steps": 40,
        "spacing": "linspace",
        "guidance_scale": 1.8,
        "guidance_interval": [0, 1],
        "eta": 0,
        "nfe": nfe,
        name: value,
    }
    assert expected.items() <= record(out).items()
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    noise = [generator_for(0, SAMPLE, 0, 0) for _ in range(2)]
    middle = pipe(pngs[:2], pngs[2:], generator=noise[:1], **{name: value})
    assert near(frames(out)[2:-2], pixels(middle))
    default = pipe(pngs[:2], pngs[2:], generator=noise[1:])
    assert not near(pixels(default), pixels(middle))


def predicted(network, weights, pngs):
    """The frames that a predictor with these weights gives."""
    network = FramePredictor(**network)
    network.load_state_dict(weights)
    start, end = (load_context(paths, 16, "rgb") for paths in (pngs[:2], pngs[2:]))
    with torch.no_grad():
        return pixels(network.eval()(start, end, 4)[0])


def test_zero_steps_give_the_prediction_that_a_checkpoint_refines(sample, refining, pngs):
    stored = load_checkpoint(refining)["predictor"]
    out = sample(*ends(pngs), checkpoint=refining, steps=0)
    assert near(frames(out)[2:-2], predicted(stored["config"], stored["weights"], pngs))
    assert record(out)["nfe"] == 0
    refined = sample(*ends(pngs), checkpoint=refining, steps=None, out="refined")
    assert {"steps": 3, "spacing": "quadratic", "nfe": 3}.items() <= record(refined).items()
    assert not near(frames(out), frames(refined))


@pytest.mark.parametrize(("flags", "key"), [((), "ema"), (("--use_raw_model",), "model")])
def test_a_predictors_own_checkpoint_predicts(sample, predictor, pngs, flags, key):
    stored = load_checkpoint(predictor)
    out = sample(*ends(pngs), *flags, checkpoint=predictor, steps=None)
    assert near(frames(out)[2:-2], predicted(stored["model_config"], stored[key], pngs))


def test_use_raw_model_takes_the_weights_that_are_no_average(sample, ckpt, pngs, tmp_path):
    state = load_checkpoint(ckpt)
    state["ema"] = state["model"]
    save_checkpoint(tmp_path / "raw.pt", state)
    raw = frames(sample(*ends(pngs), "--use_raw_model"))
    assert np.array_equal(raw, frames(sample(*ends(pngs), checkpoint=tmp_path / "raw.pt", out="b")))
    assert not near(raw, frames(sample(*ends(pngs), out="c")))


def test_the_checkpoint_moves_without_its_data(sample, ckpt, pngs, tmp_path):
    places = dict.fromkeys(("data_root", "cache_dir", "out_dir"), str(tmp_path / "gone"))
    moved = copy_with(ckpt, tmp_path / "moved.pt", args=places)
    assert np.array_equal(
        frames(sample(*ends(pngs), checkpoint=moved)), frames(sample(*ends(pngs), out="b"))
    )
    assert not (tmp_path / "gone").exists()


# --- a video with gaps ---


def test_gaps_of_a_video_are_filled_and_all_else_stays(sample, ckpt, tmp_path):
    source = with_sound(tmp_path / "in.mp4")
    gaps = (range(10, 13), range(20, 28))
    out = sample("--video", source, "--gap", "20:28", "--gap", "10:13", "--lossless", "--seed", 3)
    before = decoded(source)
    after = decoded(out / "video.mp4")
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    expected = before.clone()
    for number, gap in enumerate(gaps):
        start = before[gap.start - 2 : gap.start].transpose(0, 1)
        end = before[gap.stop : gap.stop + 2].transpose(0, 1)
        noise = [generator_for(3, SAMPLE, number)]
        middle = pipe(start, end, num_middle=len(gap), steps=3, generator=noise)
        expected[gap.start : gap.stop] = to_uint8(middle)[0].transpose(0, 1)
    assert torch.equal(after, expected)
    assert packets(out / "video.mp4", "audio") == packets(source, "audio")
    facts = {"frames": 40, "gaps_filled": 2, "generated_at": [24, 32]}
    assert facts.items() <= record(out).items()


def test_a_gap_may_be_generated_at_another_size_and_in_gray(sample, gray, tmp_path):
    source = with_sound(tmp_path / "in.mp4")
    out = sample("--video", source, "--gap", "5:7", "--size", 16, "--lossless", checkpoint=gray)
    small = to_gray(resize(decoded(source), (16, 16))).transpose(0, 1)  # [1,T,16,16]
    pipe = MiddleFramePipeline.from_checkpoint(gray, "cpu")
    noise = [generator_for(0, SAMPLE, 0)]
    middle = pipe(small[:, 4:5], small[:, 7:8], num_middle=2, steps=3, generator=noise)
    expected = resize(to_uint8(middle)[0].transpose(0, 1), (24, 32)).expand(-1, 3, -1, -1)
    assert torch.equal(decoded(out / "video.mp4")[5:7], expected)


def test_large_videos_are_generated_at_about_256_by_256():
    sizes = [(24, 32), (27, 39), (480, 640), (1080, 1920)]
    working = [sample_video_ddpm.working_size(*size, 4) for size in sizes]
    assert working == [(24, 32), (28, 40), (220, 296), (192, 340)]


def test_a_video_that_fails_half_way_leaves_no_file(sample, tmp_path, capsys):
    hostile.two_sizes(tmp_path / "two.mp4")
    out = sample("--video", tmp_path / "two.mp4", "--gap", "3:5", status=2)
    error = capsys.readouterr().err
    assert "two.mp4" in error and error.count("\n") == 1
    assert list(out.iterdir()) == []


# --- wrong input ---


def test_an_earlier_sample_stays_without_overwrite(sample, pngs, capsys):
    out = sample(*ends(pngs), "--T", 9)
    before = frames(out)
    for flags in (ends(pngs), ["--num_samples", 2]):
        sample(*flags, "--seed", 1, status=2)
        assert "--overwrite" in capsys.readouterr().err
    assert np.array_equal(frames(out), before)
    sample(*ends(pngs), "--seed", 1, "--overwrite")
    assert frames(out).shape[0] == 8  # no frame of the longer sample is left
    several = sample(*ends(pngs), "--num_samples", 2, out="several")
    sample(*ends(pngs), status=2, out="several")
    assert sorted(path.name[-10:] for path in several.iterdir()) == ["sample_000", "sample_001"]


def wrong(pngs, tmp_path, ckpt, refining):
    """(flags, the flag or file that the line names) of wrong uses."""
    text = tmp_path / "text.png"
    text.write_text("hello")
    cut = tmp_path / "cut.pt"
    cut.write_bytes(ckpt.read_bytes()[:5000])
    state = load_checkpoint(ckpt)
    state["model_config"]["base_channels"] = 24
    save_checkpoint(tmp_path / "other.pt", state)
    clip = save_mp4(tmp_path / "in.mp4", torch.zeros(3, 12, 16, 16, dtype=torch.uint8), fps=10)
    clip = ["--video", tmp_path / "in.mp4"]
    good = ends(pngs)
    yield [*good, "--ckpt", cut], "cut.pt"
    yield [*good, "--ckpt", tmp_path / "no.pt"], "no.pt"
    yield [*good, "--ckpt", tmp_path / "other.pt"], "other.pt"
    yield [*good, "--ckpt", refining, "--dynamic_threshold"], "--dynamic_threshold"
    yield [*good, "--device", "cuda:99"], "--device"
    yield ["--start_images", pngs[0], "--end_images", *pngs[2:]], "--start_images"
    yield ["--start_images", *pngs[:2]], "--end_images"
    yield ["--start_images", pngs[0], tmp_path / "no.png", "--end_images", *pngs[2:]], "no.png"
    yield ["--start_images", pngs[0], text, "--end_images", *pngs[2:]], "text.png"
    yield [*good, "--num_clips", 2], "--num_clips"
    yield [*good, "--data_root", tmp_path], "--data_root"
    yield ["--middle_images", *pngs], "--middle_images"
    yield [*good, "--middle_images", pngs[0]], "--middle_images"
    yield [*good, "--T", 4], "--T"
    yield [*good, "--size", 18], "--size"
    yield [*good, "--endpoint_context", 3], "--endpoint_context"
    yield [*good, "--color_mode", "gray"], "--color_mode"
    yield [*good, "--steps", 1001], "--steps"
    yield [*good, "--steps", 0], "--steps"
    yield [*good, "--eta", 2], "--eta"
    yield [*good, "--guidance_interval", 0.9, 0.3], "--guidance_interval"
    yield [*good, "--num_sample", 2], "--num_sample"
    yield [*good, "--out_dir", text / "out"], "--out_dir"
    yield ["--num_clips", 99], "--num_clips"
    yield ["--T", 99], "--num_clips"
    yield ["--data_root", ""], "--data_root"
    yield ["--data_root", tmp_path / "nowhere"], "--data_root"
    yield clip, "--gap"
    yield ["--gap", "4:6"], "--video"
    yield ["--lossless"], "--video"
    yield ["--video", text, "--gap", "4:6"], "text.png"
    for gap in ("1:3", "9:11", "6:6", "4-6"):
        yield [*clip, "--gap", gap], "--gap"
    yield [*clip, "--gap", "3:4", "--gap", "5:6"], "--gap"
    yield [*clip, "--gap", "4:6", "--T", 8], "--T"
    yield [*clip, "--gap", "4:6", "--num_samples", 2], "--num_samples"


def test_wrong_input_is_one_line_and_writes_nothing(sample, pngs, tmp_path, ckpt, refining, capsys):
    for flags, name in wrong(pngs, tmp_path, ckpt, refining):
        out = sample(*flags, status=2, out="wrong")
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, (flags, error)
        assert list(out.rglob("*")) == [], flags
