"""Clip arithmetic against closed forms and torchvision."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from utils import video_utils as vu


def test_eight_bits_survive_the_trip_through_floats_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(vu.to_uint8(vu.to_float(levels)), levels)
    assert vu.to_float(levels).min() == -1 and vu.to_float(levels).max() == 1
    assert vu.to_uint8(torch.tensor([-1.5, 0.0, 1.5])).tolist() == [0, 128, 255]


@pytest.mark.parametrize(("t", "k"), [(8, 2), (3, 1), (7, 3), (12, 1)])
def test_splitting_and_joining_lose_nothing_and_need_a_middle(t, k):
    clip = torch.randn(2, 3, t, 4, 4)
    start, middle, end = vu.split_clip(clip, k)
    assert torch.equal(start, clip[:, :, :k]) and torch.equal(end, clip[:, :, t - k :])
    assert torch.equal(vu.join_clip(start, middle, end), clip)
    with pytest.raises(ValueError, match="must exceed"):
        vu.split_clip(torch.zeros(1, 3, 2 * k, 8, 8), k)


def test_cross_fade_blends_the_nearest_frames_linearly():
    start, end = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    start[:, :, 0] = end[:, :, 1] = 99  # the far frames must not matter
    blend = vu.cross_fade(start, end, 4)[0, 0, :, 0, 0]
    torch.testing.assert_close(blend, torch.tensor([0.2, 0.4, 0.6, 0.8]))


def test_psnr_is_the_mean_of_the_frames_decibels():
    truth = torch.zeros(2, 3, 2, 4, 4)
    frames = truth.clone()
    frames[0, :, 0] += 10 / 127.5
    frames[0, :, 1] += 20 / 127.5
    expected = [10 * math.log10(255**2 / error**2) for error in (10, 20)]
    assert vu.frame_psnr(frames, truth)[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert vu.psnr(frames, truth)[0].item() == pytest.approx(sum(expected) / 2, abs=1e-9)
    assert vu.psnr(frames, truth)[1].item() == 100  # identical frames


def test_resizing_is_torchvisions_shorter_side_then_centre_crop():
    for shape in ((45, 80), (80, 45), (33, 33), (9, 20), (16, 16)):
        frames = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8)
        expected = transforms.resize(frames, [16], antialias=True)
        assert torch.equal(
            vu.resize_and_crop(frames, 16), transforms.center_crop(expected, [16, 16])
        )


@pytest.mark.parametrize("size", [(16, 16), (16, 24), (24, 16), (10, 60)])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (8, 8), (20, 200), (300, 17), (30, 40)])
def test_other_shapes_are_covered_and_then_cropped_in_the_centre(size, shape):
    rows, columns = (torch.linspace(0, 1, side) for side in shape)
    frames = [rows[:, None].expand(shape), columns.expand(shape), torch.zeros(shape)]
    frames = (torch.stack(frames) * 255).round().to(torch.uint8)
    frames = vu.resize_and_crop(frames, size) / 255
    assert frames.shape[1:] == size
    # The scale of what just covers the size.
    scale = max(wanted / side for wanted, side in zip(size, shape, strict=True))
    for axis in (0, 1):
        kept = size[axis] / (shape[axis] * scale)  # share of the frame that is left
        places = 0.5 + kept * ((torch.arange(size[axis]) + 0.5) / size[axis] - 0.5)
        # One pixel of the source, one of the result where the crop cannot be
        # central, and 8 bits.
        tolerance = 1 / shape[axis] + kept / size[axis] + 0.01
        assert (frames[axis].mean(1 - axis) - places).abs().max() < tolerance


def test_gray_is_bt601_luma_and_leaves_gray_pictures_as_they_are():
    frames = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    r, g, b = frames.double().unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    # Half a level, and 255 * 2^-16 for weights of 16 bits.
    assert (vu.to_gray(frames)[:, 0].double() - luma).abs().max() <= 0.505
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(vu.to_gray(levels.expand(3, -1, -1)), levels)
