"""MiddleFramePipeline, a checkpoint as something to call: what it takes, what it draws, what it refuses."""

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.noise import SAMPLE, NoiseConfig, generator_for
from diffusion.pipeline import SAMPLER_PRESETS, MiddleFramePipeline
from diffusion.sampler import sample_middle
from sample_video_ddpm import build_parser, main
from utils.checkpoint import load_checkpoint
from utils.io import read_image
from utils.video_utils import resize_and_crop, to_float, to_uint8


@pytest.fixture(scope="module")
def pipe(ckpt):
    return MiddleFramePipeline.from_checkpoint(ckpt, "cpu")


@pytest.fixture(params=[(20, 30, 3), (20, 30)], ids=["colour", "gray"])
def images(tmp_path, request):
    """Paths of four random pictures, which the pipeline resizes to 16x16."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        iio.imwrite(path, np.random.default_rng(i).integers(0, 256, request.param, dtype=np.uint8))
    return paths


def contexts(clips=1):
    """Start and end, float [B,3,2,16,16], random."""
    return (torch.rand(clips, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1).split(2, dim=2)


def generators(count, seed=0, clip=0):
    return [generator_for(seed, SAMPLE, clip, sample) for sample in range(count)]


def test_paths_pil_images_arrays_and_tensors_of_the_same_frames_give_equal_bits(pipe, images):
    frames = torch.stack([resize_and_crop(read_image(path), 16) for path in images], dim=1)  # [C,4,H,W]
    forms = [images, list(map(str, images)), list(map(Image.open, images)), list(map(iio.imread, images))]
    ends = [(form[:2], form[2:]) for form in forms]
    ends += [form.split(2, dim=-3) for form in (frames, frames[None], to_float(frames), to_float(frames)[None])]
    first, *others = (pipe(*pair, steps=2, generator=generators(1)) for pair in ends)
    assert first.shape == (1, 3, 4, 16, 16) and first.dtype == torch.float32 and first.abs().max() <= 1
    assert [torch.equal(first, other) for other in others] == [True] * 7
    backwards = pipe(images[2:], images[:2], steps=2, generator=generators(1))
    assert (first - backwards).abs().max() > 0.02  # the ends are not alike, nor is their order nothing


def test_samples_of_a_clip_differ_and_stand_beside_each_other(pipe):
    start, end = contexts(clips=2)
    keyed = [generator for clip in range(2) for generator in generators(3, clip=clip)]
    middles = pipe(start, end, num_samples=3, steps=2, generator=keyed)
    assert middles.shape == (6, 3, 4, 16, 16)
    for clip, samples in enumerate(middles.split(3)):
        assert all((samples[i] - samples[j]).abs().max() > 0.02 for i, j in ((0, 1), (0, 2), (1, 2)))
        alone = pipe(start[clip], end[clip], num_samples=3, steps=2, generator=generators(3, clip=clip))
        assert alone.shape == (3, 3, 4, 16, 16)
        # convolutions of another batch size may round differently
        torch.testing.assert_close(alone, samples, rtol=1e-4, atol=1e-4)


def test_a_generator_per_sample_reproduces_what_the_script_writes(pipe, ckpt, images, tmp_path):
    argv = f"--ckpt {ckpt} --out_dir {tmp_path} --steps 3 --seed 7 --num_samples 2".split()
    argv += ["--start_images", *map(str, images[:2]), "--end_images", *map(str, images[2:])]
    assert main(argv) == 0
    for sample, generator in enumerate(generators(2, seed=7)):
        middle = pipe(images[:2], images[2:], steps=3, generator=[generator])
        written = sorted((tmp_path / f"clip_000_sample_{sample:03d}" / "frames").glob("*.png"))[2:-2]
        assert np.array_equal(to_uint8(middle)[0].permute(1, 2, 3, 0), [iio.imread(path) for path in written])


def test_the_number_of_middle_frames_may_differ_from_training(pipe):
    for count in (1, 7):
        middle = pipe(*contexts(), num_middle=count, steps=2)
        assert middle.shape == (1, 3, count, 16, 16) and middle.isfinite().all()


def test_any_setting_follows_the_reference_preset_and_none_the_fast_one(pipe):
    def same(given, expected, pipe=pipe):
        draw = {"num_middle": 4, "generator": generators(1), **expected}
        drawn = sample_middle(pipe.model, pipe.schedule, *contexts(), **draw)
        return torch.equal(drawn, pipe(*contexts(), generator=generators(1), **given))

    fast, reference = SAMPLER_PRESETS["fast"], SAMPLER_PRESETS["reference"]
    for given in ({}, {"clip_x0": False}):
        assert same(given, fast | given) and not same(given, reference | given)
    for given in ({"steps": 3}, {"steps": 3, "spacing": "quadratic"}, {"steps": 4, "guidance_scale": 1.0}):
        assert same(given, reference | given) and not same(given, fast | given)
        assert same({"preset": "fast"} | given, fast | given)
    pipe = MiddleFramePipeline(pipe.model, pipe.schedule, pipe.clip_config, NoiseConfig(offset=0.5))
    assert same({}, fast | {"noise": NoiseConfig(offset=0.5)}, pipe) and not same({}, fast, pipe)  # that of training


def test_images_fit_another_size_than_in_training(pipe, images):
    start, end = (pipe.context(paths, size=24) for paths in (images[:2], images[2:]))
    assert start.shape == (1, 3, 2, 24, 24) and pipe(start, end, steps=1).shape == (1, 3, 4, 24, 24)


def test_weights_are_the_ema_unless_the_raw_ones_are_asked_for(ckpt, tmp_path):
    for raw, name in ((False, "ema"), (True, "model")):
        model = MiddleFramePipeline.from_checkpoint(ckpt, "cpu", use_raw_model=raw).model
        weights = load_checkpoint(ckpt)[name]
        assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"no\.pt: no such checkpoint"):
        MiddleFramePipeline.from_checkpoint(tmp_path / "no.pt")


RANDOM = [np.full((20, 30, 3), level, np.uint8) for level in (0, 80, 160)]
START, END = contexts()
WRONG = {
    "one image": ((RANDOM[:1], RANDOM[:2]), {}, r"^start_context and end_context must be \[B,C,K,H,W\] of one shape"),
    "three images": ((RANDOM, RANDOM), {}, r"^start_context must be \[B,3,2,H,W\] for this network"),
    "no image": (([], []), {}, "start|frame"),
    "no such image": ((["/no.png"] * 2, RANDOM[:2]), {}, r"^/no\.png: no such image file"),
    "float arrays": (
        (RANDOM[:2], [np.zeros((8, 8, 3))] * 2),
        {},
        r"frame must be uint8 \[H,W\] or \[H,W,3\] .*float64",
    ),
    "RGBA arrays": (([np.zeros((8, 8, 4), np.uint8)] * 2, RANDOM[:2]), {}, r"frame must be uint8 .*\[8, 8, 4\]"),
    "integer tensor": ((START.long(), END.long()), {}, "start|frame"),
    "axis missing": ((START[0, 0], END[0, 0]), {}, r"^start_context and end_context must be \[B,C,K,H,W\]"),
    "one channel": ((START[:, :1], END[:, :1]), {}, r"^start_context must be \[B,3,2,H,W\]"),
    "another batch": ((START.expand(2, -1, -1, -1, -1), END), {}, "^start_context and end_context must be .*one shape"),
    "odd size": ((START[..., :15, :15], END[..., :15, :15]), {}, "^size must be divisible by 4"),
    "no middle": ((START, END), {"num_middle": 0}, "^num_middle must be at least 1"),
    "no sample": ((START, END), {"num_samples": 0}, "^num_samples must"),
    "no step": ((START, END), {"steps": 0}, "^steps must be at least 1 for a model without a predictor"),
    "no such preset": ((START, END), {"preset": "slow"}, "^preset must"),
    "two generators": (
        (START, END),
        {"num_samples": 3, "generator": generators(2)},
        r"^generator must be one per clip",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_refused_by_name(pipe, wrong):
    ends, settings, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        pipe(*ends, **settings)


def test_a_checkpoint_fills_no_flag_but_those_of_clips(pipe):
    foreign = MiddleFramePipeline(
        pipe.model, pipe.schedule, {**pipe.clip_config, "start_images": ["/etc/hostname"]}, trained=pipe.trained
    )
    args = build_parser().parse_args(["--ckpt", "any.pt"])
    (settings,) = foreign.resolve_flags(args)
    assert args.start_images is None and (args.num_frames, args.size, args.endpoint_context) == (8, 16, 2)
    assert settings == SAMPLER_PRESETS["fast"] | {"clip_x0": True, "dynamic_threshold": False}
