"""Clip arithmetic against closed forms."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as transforms

from utils.video_utils import cross_fade, join_clip, psnr, resize_and_crop, split_clip, to_float, to_gray, to_uint8


def test_eight_bits_survive_the_trip_through_floats_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(levels)), levels)
    assert to_float(levels).min() == -1 and to_float(levels).max() == 1
    assert to_uint8(torch.tensor([-1.5, 0.0, 1.5])).tolist() == [0, 128, 255]


def test_resizing_in_linear_light_averages_intensities_and_not_their_codes():
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255  # half black, half white
    board = board.to(torch.uint8).expand(3, 64, 64)
    assert resize_and_crop(board, 16).float().mean() == pytest.approx(127.5, abs=1)
    # half the light of white is the code 188 by sRGB's curve
    assert (resize_and_crop(board, 16, linear_light=True)[:, 2:-2, 2:-2].float() - 188).abs().max() <= 1
    flat = torch.full((3, 20, 30), 77, dtype=torch.uint8)
    assert (resize_and_crop(flat, 10, linear_light=True) == 77).all()


@pytest.mark.parametrize(("t", "k"), [(8, 2), (3, 1), (7, 3), (12, 1)])
def test_splitting_and_joining_lose_nothing_and_need_a_middle(t, k):
    clip = torch.randn(2, 3, t, 4, 4)
    start, middle, end = split_clip(clip, k)
    assert start.shape[2] == end.shape[2] == k and middle.shape[2] == t - 2 * k
    assert torch.equal(join_clip(start, middle, end), clip)
    rule = r"^num_frames must exceed 2 \* endpoint_context .*\(got num_frames 4, endpoint_context 2\)"
    with pytest.raises(ValueError, match=rule):
        split_clip(torch.zeros(1, 3, 4, 8, 8), 2)


def test_cross_fade_blends_the_nearest_frames_linearly():
    start, end = torch.zeros(1, 1, 2, 2, 2), torch.ones(1, 1, 2, 2, 2)
    start[:, :, 0], end[:, :, 1] = 99, 99  # the far frames must not matter
    torch.testing.assert_close(cross_fade(start, end, 4)[0, 0, :, 0, 0], torch.tensor([0.2, 0.4, 0.6, 0.8]))


def test_psnr_is_the_mean_of_the_frames_decibels():
    truth = torch.zeros(2, 3, 2, 4, 4)
    frames = truth.clone()
    frames[0, :, 0] += 10 / 127.5
    frames[0, :, 1] += 20 / 127.5
    expected = (10 * math.log10(255**2 / 10**2) + 10 * math.log10(255**2 / 20**2)) / 2
    assert psnr(frames, truth)[0].item() == pytest.approx(expected, abs=1e-9)
    assert psnr(frames, truth)[1].item() == 100  # identical frames


def test_frames_of_the_right_size_pass_bit_for_bit():
    frames = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(resize_and_crop(frames, 16), frames)


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (100, 37), (8, 8), (20, 200), (300, 17)])
def test_resizing_keeps_the_centre_and_antialiases(shape):
    h, w = shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    short = min(h, w)
    # in units of the short side, 0 in the centre
    ramp = torch.stack([y * h / short, x * w / short, torch.zeros_like(x)])
    frames = ((ramp.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    result = to_float(resize_and_crop(frames, 16))
    edge = (torch.arange(16) + 0.5) / 8 - 1
    # one pixel of the source, half a pixel of the result where the crop cannot be central, and 8 bits
    tolerance = 2 / short + 2 / 16 / 2 + 0.02
    assert (result[0] - edge[:, None]).abs().max() < tolerance
    assert (result[1] - edge[None, :]).abs().max() < tolerance
    stripes = torch.zeros(3, 160, 160, dtype=torch.uint8)
    stripes[:, ::2] = 255
    assert (to_float(resize_and_crop(stripes, 16))).abs().max() < 0.1  # without antialiasing this would be -1 or 1


def test_resizing_is_torchvisions_shorter_side_then_centre_crop():
    frames = torch.randint(0, 256, (2, 3, 45, 80), dtype=torch.uint8)
    expected = transforms.center_crop(transforms.resize(frames, [16], antialias=True), [16, 16])
    assert torch.equal(resize_and_crop(frames, 16), expected)


@pytest.mark.parametrize("size", [(16, 24), (24, 16), (10, 60)])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (20, 200), (300, 17), (30, 40)])
def test_other_shapes_are_covered_and_then_cropped_in_the_centre(size, shape):
    rows, columns = (torch.linspace(0, 1, side) for side in shape)
    frames = torch.stack([rows[:, None].expand(shape), columns.expand(shape), torch.zeros(shape)])
    frames = resize_and_crop((frames * 255).round().to(torch.uint8), size) / 255
    assert frames.shape[1:] == size
    scale = max(wanted / side for wanted, side in zip(size, shape, strict=True))  # of what just covers the size
    for axis in (0, 1):
        kept = size[axis] / (shape[axis] * scale)  # share of the frame that is left
        places = 0.5 + kept * ((torch.arange(size[axis]) + 0.5) / size[axis] - 0.5)
        found = frames[axis].mean(1 - axis)
        # a pixel of the source, one of the result where the crop cannot be central, and 8 bits
        assert (found - places).abs().max() < 1 / shape[axis] + kept / size[axis] + 0.01


def test_gray_is_bt601_luma_and_leaves_gray_pictures_alone():
    frames = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    r, g, b = frames.double().unbind(1)
    # rounded, with weights of 16 bits: half a level and 255 * 2^-16
    assert (to_gray(frames)[:, 0].double() - (0.299 * r + 0.587 * g + 0.114 * b)).abs().max() <= 0.505
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(to_gray(levels.expand(3, -1, -1)), levels)
