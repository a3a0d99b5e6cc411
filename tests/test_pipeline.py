"""MiddleFramePipeline: what it takes, what it draws, what it refuses."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoint import SMALLEST, make_state, same, stored_network, with_value
from test_refining import contexts

from diffusion.noise import SAMPLE, NoiseConfig, generator_for
from diffusion.pipeline import MiddleFramePipeline
from diffusion.residual import smooth_colours
from diffusion.sampler import sample_middle
from diffusion.schedule import DiffusionSchedule
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from utils.checkpoint import save_checkpoint
from utils.io import read_image
from utils.video_utils import resize_and_crop, to_float

REFERENCE = {
    "steps": 40,
    "spacing": "linspace",
    "guidance_scale": 1.8,
    "guidance_interval": (0.0, 1.0),
    "eta": 0.0,
}
REFINING = {**REFERENCE, "steps": 2, "spacing": "quadratic", "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    predictor = stored_network(FramePredictor, {"width": 4})
    plain = with_value(make_state(), "diffusion_config.noise_offset", 0.1)
    plain = with_value(plain, "diffusion_config.schedule", "linear")
    refining = with_value(plain, "diffusion_config.noise_correlation", 0.5)
    refining["predictor"] = predictor
    refining["model_config"] = {**SMALLEST, "guide_channels": 10}
    refining["ema"] = stored_network(VideoUNet3D, refining["model_config"], seed=2)["weights"]
    own = with_value(plain, "args.train", "predictor")
    own["model_config"] = predictor["config"]
    own["ema"] = predictor["weights"]
    for name, state in (("plain", plain), ("refining", refining), ("predictor", own)):
        save_checkpoint(folder / f"{name}.pt", state)
    return folder


@pytest.fixture(scope="module")
def pipes(saved):
    files = saved.glob("*.pt")
    return {path.stem: MiddleFramePipeline.from_checkpoint(path, "cpu") for path in files}


def generators(count, clip=0):
    return [generator_for(7, SAMPLE, clip, sample) for sample in range(count)]


def test_a_setting_replaces_one_value_of_the_checkpoints_default_sampler(pipes):
    defaults = {"plain": REFERENCE, "refining": REFINING, "predictor": {**REFINING, "steps": 0}}
    for name, default in defaults.items():
        assert pipes[name].settings({}) == default
        for change in ({"spacing": "trailing"}, {"guidance_scale": 2.0}, {"eta": 0.5}):
            assert pipes[name].settings(change) == {**default, **change}
    assert pipes["plain"].settings({"steps": 5}) == {**REFERENCE, "steps": 5}
    assert pipes["refining"].settings({"steps": 0}) == {**REFINING, "steps": 0}


@pytest.mark.parametrize("change", [{}, {"steps": 2, "eta": 1.0, "dynamic_threshold": True}])
def test_a_plain_checkpoint_samples_frames_under_its_own_noise(pipes, change):
    pipe = pipes["plain"]
    settings = {**REFERENCE, **change, "noise": NoiseConfig(offset=0.1), "num_middle": 4}
    trained = (pipe.model, DiffusionSchedule(100, "linear"))
    expected = sample_middle(*trained, *contexts(1), generator=generators(1), **settings)
    assert torch.equal(pipe(*contexts(1), generator=generators(1), **change), expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 0.0, 2.0])
@pytest.mark.parametrize("clip_x0", [True, False])
def test_a_refining_checkpoint_adds_residuals_to_its_prediction(pipes, guidance_scale, clip_x0):
    pipe = pipes["refining"]
    start, end = contexts(1)
    # Of a sample's stream the code is drawn first, then the noise.
    noise = generators(1)
    code = 0.7 * torch.randn(1, 8, generator=noise[0])
    # Guidance keeps contexts from the denoiser, never from the predictor.
    frames, log_error, warped, sharp = pipe.predictor(start, end, 4, code)
    frames = frames.clamp(-1, 1)
    scale = 2 * log_error.exp()
    change = {"guidance_scale": guidance_scale, "clip_x0": clip_x0}
    settings = {
        **REFINING,
        **change,
        "num_middle": 4,
        "guide": torch.cat([frames, warped, log_error / 4], dim=1),
        "x0_range": ((-1 - frames) / scale, (1 - frames) / scale),
        "noise": NoiseConfig(offset=0.1, correlation=0.5),
        "generator": noise,
    }
    residual = sample_middle(pipe.model, pipe.schedule, start, end, **settings)
    middle = pipe(start, end, generator=generators(1), **change)
    sample = sharp + scale * smooth_colours(residual)
    torch.testing.assert_close(
        middle, sample.clamp(-1, 1) if clip_x0 else sample, rtol=0, atol=1e-6
    )
    assert residual.abs().max() > 1 and sample.abs().max() > 1
    assert (sharp - frames).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["refining", "predictor"])
def test_no_steps_give_the_prediction(pipes, name):
    frames = pipes[name].predictor(*contexts(2), 3)[0].clamp(-1, 1)
    settings = {} if name == "predictor" else {"steps": 0}
    middle = pipes[name](*contexts(2), num_middle=3, num_samples=2, **settings)
    torch.testing.assert_close(middle, frames.repeat_interleave(2, dim=0))


def test_samples_of_a_clip_differ_and_stand_beside_each_other(pipes):
    start, end = contexts(2)
    keyed = generators(2, clip=0) + generators(2, clip=1)
    settings = {"num_middle": 7, "num_samples": 2, "steps": 2}
    middles = pipes["plain"](start, end, generator=keyed, **settings)
    assert middles.shape == (4, 3, 7, 8, 8)
    for clip, samples in enumerate(middles.split(2)):
        assert (samples[0] - samples[1]).abs().max() > 0.02
        ends = (start[clip], end[clip])
        single = pipes["plain"](*ends, generator=generators(2, clip), **settings)
        # Convolutions of another batch size may round differently.
        torch.testing.assert_close(single, samples, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[(20, 30, 3), (20, 30)], ids=["colour", "gray"])
def images(tmp_path, request):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        pixels = np.random.default_rng(i).integers(0, 256, request.param, dtype=np.uint8)
        iio.imwrite(path, pixels)
    return paths


def test_every_form_of_the_same_frames_gives_equal_bits(pipes, images):
    frames = torch.stack([resize_and_crop(read_image(path), 16) for path in images], dim=1)
    floats = to_float(frames)  # [C,4,H,W]
    lists = [[form(path) for path in images] for form in (str, Image.open, iio.imread)]
    ends = [(form[:2], form[2:]) for form in (images, *lists)]
    ends += [form.split(2, dim=-3) for form in (frames, frames[None], floats, floats[None])]
    drawn = [pipes["plain"](*pair, steps=2, generator=generators(1)) for pair in ends]
    assert drawn[0].shape == (1, 3, 4, 16, 16)
    assert drawn[0].dtype == torch.float32
    assert all(torch.equal(drawn[0], other) for other in drawn)


@pytest.mark.parametrize(("use_raw_model", "name"), [(False, "ema"), (True, "model")])
def test_weights_are_ema_or_raw_and_half_precision_becomes_float32(tmp_path, use_raw_model, name):
    half = {key: weight.half() for key, weight in make_state()[name].items()}
    save_checkpoint(tmp_path / "half.pt", with_value(make_state(), name, half))
    pipe = MiddleFramePipeline.from_checkpoint(tmp_path / "half.pt", "cpu", use_raw_model)
    weights = {key: weight.float() for key, weight in half.items()}
    assert same(dict(pipe.model.state_dict()), weights)


PICTURES = [np.full((20, 30, 3), level, np.uint8) for level in (0, 80)]
START, END = contexts(1)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (PICTURES[:1], PICTURES),
        ([], []),
        (["/frame.png"] * 2, PICTURES),
        (PICTURES, [np.zeros((8, 8, 3))] * 2),
        (START.long(), END.long()),
        (START[0, 0], END[0, 0]),
        (START.expand(2, -1, -1, -1, -1), END),
        (START[:, :1], END[:, :1]),
    ],
)
def test_frames_that_do_not_fit_are_refused(pipes, start, end):
    with pytest.raises(ValueError, match="frame|context"):
        pipes["plain"](start, end, steps=2)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("plain", "num_middle", 0),
        ("plain", "num_samples", 0),
        ("plain", "steps", 0),
        ("plain", "generator", generators(2)),
        ("refining", "eta", 2.0),
        ("refining", "steps", -1),
        ("refining", "dynamic_threshold", True),
        ("predictor", "steps", 3),
        ("predictor", "num_middle", 0),
    ],
)
def test_settings_out_of_range_are_refused_by_name(pipes, kind, name, value):
    with pytest.raises(ValueError, match=name):
        pipes[kind](START, END, **{name: value})
