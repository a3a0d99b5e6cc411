"""MiddleFramePipeline: what it takes, what it draws, what it refuses."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import FRAMES, make_state, same, stored_network, with_value

from diffusion.noise import SAMPLE, NoiseConfig, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.sampler import sample_middle
from models.predictor import FramePredictor
from sample_video_ddpm import main
from utils.checkpoint import save_checkpoint
from utils.io import read_image
from utils.video_utils import resize_and_crop, to_float, to_gray, to_uint8

REFERENCE = {
    "steps": 40,
    "spacing": "linspace",
    "guidance_scale": 1.8,
    "guidance_interval": (0.0, 1.0),
    "eta": 0.0,
}
REFINING = {**REFERENCE, "steps": 3, "spacing": "quadratic", "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Files of the three kinds of checkpoint, by name."""
    predictor = stored_network(FramePredictor, {**FRAMES, "width": 8})
    plain = with_value(make_state(), "diffusion_config.noise_offset", 0.1)
    refining = with_value(plain, "diffusion_config.noise_correlation", 0.5)
    states = {
        "plain": plain,
        "refining": {**refining, "predictor": predictor},
        "predictor": {
            **plain,
            "args": {"train": "predictor"},
            "model_config": predictor["config"],
            "ema": predictor["weights"],
        },
    }
    files = {name: tmp_path_factory.mktemp("saved") / f"{name}.pt" for name in states}
    for name, state in states.items():
        save_checkpoint(files[name], state)
    return files


@pytest.fixture(scope="module")
def pipes(saved):
    return {
        name: MiddleFramePipeline.from_checkpoint(path, "cpu") for name, path in saved.items()
    }


def contexts(clips=1):
    """Start and end, float [B,3,2,16,16], random."""
    return (torch.rand(clips, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1).split(2, dim=2)


def generators(count, clip=0):
    return [generator_for(7, SAMPLE, clip, sample) for sample in range(count)]


# --- what is drawn ---


def test_a_setting_replaces_one_value_of_the_checkpoints_default_sampler(pipes):
    defaults = {"plain": REFERENCE, "refining": REFINING, "predictor": {**REFINING, "steps": 0}}
    for name, default in defaults.items():
        assert pipes[name].settings({}) == default
        for change in ({"spacing": "trailing"}, {"guidance_scale": 2.0}, {"eta": 0.5}):
            assert pipes[name].settings(change) == {**default, **change}
    assert pipes["plain"].settings({"steps": 5}) == {**REFERENCE, "steps": 5}
    assert pipes["refining"].settings({"steps": 0}) == {**REFINING, "steps": 0}


def test_a_plain_checkpoint_samples_frames_under_its_own_noise(pipes):
    pipe = pipes["plain"]
    for change in ({"steps": 3}, {"steps": 2, "guidance_scale": 1.0, "eta": 1.0}):
        expected = sample_middle(
            pipe.model,
            pipe.schedule,
            *contexts(),
            num_middle=4,
            noise=NoiseConfig(offset=0.1),
            generator=generators(1),
            **{**REFERENCE, **change},
        )
        assert torch.equal(pipe(*contexts(), generator=generators(1), **change), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("clip_x0", [True, False])
def test_a_refining_checkpoint_adds_sampled_residuals_to_its_prediction(
    pipes, guidance_scale, clip_x0
):
    pipe = pipes["refining"]
    start, end = contexts()
    frames, log_error = pipe.predictor(start, end, 4)
    frames = frames.clamp(-1, 1)
    scale = 2 * log_error.exp()
    # Guidance keeps contexts from the denoiser, never from the predictor.
    residual = sample_middle(
        pipe.model,
        pipe.schedule,
        start,
        end,
        num_middle=4,
        clip_x0=clip_x0,
        x0_range=((-1 - frames) / scale, (1 - frames) / scale),
        noise=NoiseConfig(offset=0.1, correlation=0.5),
        generator=generators(1),
        **{**REFINING, "guidance_scale": guidance_scale},
    )
    expected = frames + scale * residual
    assert residual.abs().max() > 1
    settings = {"guidance_scale": guidance_scale, "clip_x0": clip_x0}
    middle = pipe(start, end, generator=generators(1), **settings)
    torch.testing.assert_close(middle, expected, rtol=0, atol=1e-6)
    if clip_x0:
        assert middle.abs().max() <= 1


@pytest.mark.parametrize("name", ["refining", "predictor"])
def test_no_steps_give_the_prediction(pipes, name):
    pipe = pipes[name]
    for m in (1, 4):
        middle = pipe(*contexts(2), num_middle=m, num_samples=2, steps=0)
        frames = pipe.predictor(*contexts(2), m)[0].clamp(-1, 1)
        torch.testing.assert_close(middle, frames.repeat_interleave(2, dim=0))
    assert (pipe.model is None) == (name == "predictor")
    if pipe.model is None:
        assert torch.equal(pipe(*contexts()), pipe(*contexts(), steps=0))


def test_samples_of_a_clip_differ_and_stand_beside_each_other(pipes):
    pipe = pipes["plain"]
    start, end = contexts(clips=2)
    keyed = generators(3, clip=0) + generators(3, clip=1)
    middles = pipe(start, end, num_samples=3, steps=2, generator=keyed)
    assert middles.shape == (6, 3, 4, 16, 16)
    for clip, samples in enumerate(middles.split(3)):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert (samples[i] - samples[j]).abs().max() > 0.02
        streams = generators(3, clip)
        single = pipe(start[clip], end[clip], num_samples=3, steps=2, generator=streams)
        # Convolutions of another batch size may round differently.
        torch.testing.assert_close(single, samples, rtol=1e-4, atol=1e-4)


def test_number_and_size_of_frames_may_differ_from_training(pipes):
    start, end = (torch.zeros(1, 3, 2, 24, 8) for _ in range(2))
    assert pipes["plain"](start, end, num_middle=7, steps=1).shape == (1, 3, 7, 24, 8)


# --- what is taken ---


@pytest.fixture(params=[(20, 30, 3), (20, 30)], ids=["colour", "gray"])
def images(tmp_path, request):
    """Paths of four random pictures, which the pipeline resizes to 16x16."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, request.param, dtype=np.uint8)
        iio.imwrite(path, pixels)
    return paths


def test_every_form_of_the_same_frames_gives_equal_bits(pipes, images):
    frames = torch.stack([resize_and_crop(read_image(path), 16) for path in images], dim=1)
    floats = to_float(frames)  # [C,4,H,W]
    lists = [images]
    for form in (str, Image.open, iio.imread):
        lists.append(list(map(form, images)))
    ends = [(form[:2], form[2:]) for form in lists]
    ends += [form.split(2, dim=-3) for form in (frames, frames[None], floats, floats[None])]
    first, *others = (
        pipes["plain"](*pair, steps=2, generator=generators(1)) for pair in ends
    )
    assert first.shape == (1, 3, 4, 16, 16)
    assert first.dtype == torch.float32
    for other in others:
        assert torch.equal(first, other)
    backwards = pipes["plain"](images[2:], images[:2], steps=2, generator=generators(1))
    assert (first - backwards).abs().max() > 0.01


def test_a_generator_per_sample_reproduces_what_the_script_writes(saved, pipes, images, tmp_path):
    flags = f"--ckpt {saved['plain']} --out_dir {tmp_path} --steps 3 --seed 7 --num_samples 2"
    ends = ["--start_images", *map(str, images[:2]), "--end_images", *map(str, images[2:])]
    assert main([*flags.split(), *ends]) == 0
    for sample, generator in enumerate(generators(2)):
        middle = pipes["plain"](images[:2], images[2:], steps=3, generator=[generator])
        folder = tmp_path / f"clip_000_sample_{sample:03d}" / "frames"
        written = [iio.imread(path) for path in sorted(folder.glob("*.png"))[2:-2]]
        assert np.array_equal(to_uint8(middle)[0].permute(1, 2, 3, 0), written)


def test_weights_are_the_ema_unless_the_raw_ones_are_chosen(saved):
    for use_raw_model, name in ((False, "ema"), (True, "model")):
        pipe = MiddleFramePipeline.from_checkpoint(saved["plain"], "cpu", use_raw_model)
        assert same(dict(pipe.model.state_dict()), make_state()[name])
        assert not pipe.model.training
        assert pipe.clip_config == make_state()["clip_config"]
        assert pipe.trained["step"] == 3


def test_gray_checkpoints_take_colour_pictures(images, tmp_path):
    state = with_value(make_state(), "clip_config.color_mode", "gray")
    config = {**FRAMES, "image_channels": 1}
    predictor = stored_network(FramePredictor, {**config, "width": 8})
    state["args"] = {"train": "predictor"}
    state["model_config"] = predictor["config"]
    state["ema"] = predictor["weights"]
    save_checkpoint(tmp_path / "gray.pt", state)
    pipe = MiddleFramePipeline.from_checkpoint(tmp_path / "gray.pt", "cpu")
    pictures = [to_float(to_gray(resize_and_crop(read_image(path), 16))) for path in images]
    start, end = torch.stack(pictures, dim=1)[None].split(2, dim=2)
    assert torch.equal(pipe(images[:2], images[2:]), pipe(start, end))


# --- what is refused ---

PICTURES = [np.full((20, 30, 3), level, np.uint8) for level in (0, 80)]
START, END = contexts()
WRONG_FRAMES = {
    "one picture": (PICTURES[:1], PICTURES),
    "three pictures": (PICTURES + PICTURES[:1], PICTURES + PICTURES[:1]),
    "no picture": ([], []),
    "no such file": (["/no.png", "/no.png"], PICTURES),
    "float arrays": (PICTURES, [np.zeros((8, 8, 3))] * 2),
    "four colours": ([np.zeros((8, 8, 4), np.uint8)] * 2, PICTURES),
    "integers": (START.long(), END.long()),
    "an axis missing": (START[0, 0], END[0, 0]),
    "another batch": (START.expand(2, -1, -1, -1, -1), END),
    "one channel": (START[:, :1], END[:, :1]),
}


@pytest.mark.parametrize("wrong", WRONG_FRAMES)
def test_frames_that_do_not_fit_are_refused(pipes, wrong):
    with pytest.raises(ValueError, match=r"frame|context|start|no\.png"):
        pipes["plain"](*WRONG_FRAMES[wrong], steps=2)


@pytest.mark.parametrize(
    ("kind", "settings", "name"),
    [
        ("plain", {"num_middle": 0}, "num_middle"),
        ("plain", {"num_samples": 0}, "num_samples"),
        ("plain", {"steps": 0}, "--steps"),
        ("plain", {"steps": 101}, "--steps"),
        ("plain", {"num_samples": 3, "generator": generators(2)}, "generator"),
        ("refining", {"eta": 2.0}, "--eta"),
        ("refining", {"steps": -1}, "--steps"),
        ("refining", {"dynamic_threshold": True}, "--dynamic_threshold"),
        ("predictor", {"steps": 3}, "--steps"),
        ("predictor", {"num_middle": 0}, "num_middle"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(pipes, kind, settings, name):
    with pytest.raises(ValueError, match=name):
        pipes[kind](START, END, **settings)
