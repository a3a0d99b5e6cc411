"""Predict and refine: the predictor, its warp, and the change of variable around it."""

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from test_checkpoint import stored_network
from test_model import close, shaken

from diffusion.noise import generator_for
from diffusion.residual import Prediction, guide_channels, predict, smooth_colours
from models.predictor import FramePredictor, Guess, warp
from train_video_ddpm import build_parser
from training.objective import build_network, crop_size, pick_objective
from utils.video_utils import cross_fade


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator_for(seed)) * 2 - 1


def contexts(b=2, c=3, k=2, size=8):
    return noise(b, c, 2 * k, size, size).split(k, dim=2)


def test_residuals_are_what_the_guess_misses_in_scales_and_are_cut_at_the_limit():
    middle = noise(2, 3, 4, 8, 8)
    frames = noise(2, 3, 4, 8, 8, seed=1)
    scale = noise(2, 1, 4, 8, 8, seed=2).exp() / 4
    missed = (middle - frames) / scale
    assert missed.abs().max() > 4
    prediction = Prediction(frames, scale, limit=4.0)
    close(prediction.to_residual(middle), missed.clamp(-4, 4))
    # Nothing is cut on the way back, nor in the range that the sampler clips to.
    close(prediction.to_middle(missed), middle)
    for bound, edge in zip(prediction.residual_range, (-1.0, 1.0), strict=True):
        close(prediction.to_middle(bound), torch.full_like(middle, edge))
    # Without a predictor every number stays as it is.
    nothing = predict(None, *contexts(), 4)
    assert torch.equal(nothing.to_residual(9 * middle), 9 * middle)
    assert torch.equal(nothing.to_middle(middle), middle)
    assert nothing.residual_range == (-1, 1)


def test_a_prediction_is_clipped_and_its_scale_is_twice_the_expected_error():
    ends = contexts()
    frames = 3 * noise(2, 3, 4, 8, 8)
    log_error = noise(2, 1, 4, 8, 8, seed=1).requires_grad_()

    def predictor(*given):
        assert given == (*ends, 4, "code")
        return Guess(frames, log_error, torch.cat([frames, frames], dim=1), frames + 1)

    prediction = predict(predictor, *ends, 4, "code")
    assert torch.equal(prediction.frames, frames.clamp(-1, 1))
    close(prediction.scale, 2 * log_error.exp().detach())
    assert prediction.limit == 4
    assert not prediction.scale.requires_grad
    close(prediction.frames + prediction.detail, frames + 1)
    seen = torch.cat([frames.clamp(-1, 1), frames, frames, log_error / 4], dim=1)
    assert torch.equal(prediction.guide, seen)
    assert prediction.guide.shape[1] == guide_channels(3)


def test_colours_are_averaged_over_five_pixels_and_brightness_stays():
    residual = noise(2, 3, 4, 7, 6)
    smooth = smooth_colours(residual)
    close(smooth.mean(1), residual.mean(1))
    colours = residual - residual.mean(1, keepdim=True)
    near = colours[1, 2, 3, 1:6, :5]  # about row 3 and column 2
    close(smooth[1, 2, 3, 3, 2] - residual[1, :, 3, 3, 2].mean(), near.mean())
    corner = colours[0, 1, 0, :3, :3]  # the edge has fewer neighbours
    close(smooth[0, 1, 0, 0, 0] - residual[0, :, 0, 0, 0].mean(), corner.mean())
    assert torch.equal(smooth_colours(residual[:, :1]), residual[:, :1])  # gray frames


def test_refining_is_trained_on_half_of_each_side_and_frames_on_whole_ones():
    assert crop_size([64, 40], 8) == (32, 24) and crop_size(8, 8) == (8, 8)
    flags = [
        "--size",
        "32",
        "16",
        "--base_channels",
        "4",
        "--channel_mults",
        "1",
        "--temporal_attn_levels",
    ]
    args = argparse.Namespace(**{**build_parser().defaults(), **build_parser().parse_given(flags)})
    stored = stored_network(FramePredictor, {"width": 4})
    cases = ((None, None, None, 6), ("run.pt", stored, (16, 8), 10))
    for args.predictor, predictor, crop, beside in cases:
        network = build_network(args, torch.device("cpu"))
        objective = pick_objective(args, network, predictor, val_clips=1, amp_dtype=None)
        assert objective.loss.keywords["task"].crop == crop
        assert network.stem.in_channels == 3 + beside


def test_a_warp_samples_each_pixel_at_its_place_plus_its_displacement():
    frames = noise(1, 3, 5, 7)
    displacement = 3 * noise(1, 2, 5, 7, seed=1)  # x then y; some lead over the edge
    warped = warp(frames, displacement)
    for row in range(5):
        for column in range(7):
            x = min(max(column + displacement[0, 0, row, column].item(), 0), 6)
            y = min(max(row + displacement[0, 1, row, column].item(), 0), 4)
            left = min(int(x), 5)
            top = min(int(y), 3)
            corners = frames[0, :, top : top + 2, left : left + 2]  # [C,2,2]
            upper, lower = torch.lerp(corners[..., 0], corners[..., 1], x - left).unbind(1)
            close(warped[0, :, row, column], torch.lerp(upper, lower, y - top))


def test_an_untrained_predictor_is_the_cross_fade_whatever_autocast_rounds():
    start, end = contexts(size=40)
    with torch.autocast("cpu", torch.bfloat16):
        frames, log_error, *_ = FramePredictor(width=4)(start, end, 4)
    # A softmax of logarithms, and a bilinear sample at a pixel's own place.
    torch.testing.assert_close(frames, cross_fade(start, end, 4), rtol=0, atol=3e-5)
    assert torch.equal(log_error, torch.full((2, 1, 4, 40, 40), -3.0))


def constant_predictor(*, motion=(0.0,) * 8, weights=(0.0,) * 4, log_error=0.0, correction=(0.0,)):
    """A predictor that gives these numbers everywhere, whatever it sees."""
    per_pixel = torch.tensor([*weights, log_error, *correction])
    predictor = FramePredictor(len(correction), width=4)
    predictor.out.bias.data = torch.cat([torch.tensor(motion), per_pixel.repeat_interleave(16)])
    return predictor


def test_frames_are_four_warps_blended_by_time_and_weight_and_corrected():
    start, end = contexts(c=1)
    motion = (3.0, -1.0, 0.5, 2.0, -2.0, 4.0, 1.0, 1.0)
    weights = (0.7, -0.3, 0.2, 1.5)
    predictor = constant_predictor(motion=motion, weights=weights, log_error=9.0, correction=(0.1,))
    frames, log_error, warped, sharp = predictor(start, end, 3)
    displacements = torch.tensor(motion).view(4, 1, 2, 1, 1).expand(4, 2, 2, 8, 8)
    nearest = (start[:, :, -1], start[:, :, -1], end[:, :, 0], end[:, :, 0])
    warps = [warp(*pair) for pair in zip(nearest, displacements, strict=True)]
    for i, time in enumerate((0.25, 0.5, 0.75)):
        # The second warp of each end counts less, until it is learned.
        share = [1 - time, (1 - time) * math.exp(-2), time, time * math.exp(-2)]
        share = [x * math.exp(weight) for x, weight in zip(share, weights, strict=True)]

        def mean(numbers, power=1.0, share=share):
            terms = [(share[n] ** power, warps[n]) for n in numbers]
            return sum(x * frame for x, frame in terms) / sum(x for x, _ in terms)

        close(frames[:, :, i], mean(range(4)) + 0.1)
        close(warped[:, :, i], torch.cat([mean([0, 1]), mean([2, 3])], dim=1))
        # Sharp frames lean to one warp; a constant neither smooths nor adds detail.
        close(sharp[:, :, i], mean(range(4), power=2.0) + 0.1)
    assert log_error.eq(0).all()  # the highest
    assert constant_predictor(log_error=-9.0, correction=(0.1,))(start, end, 3)[1].eq(-7).all()


def test_a_correction_is_left_out_of_sharp_frames_where_it_smooths():
    rows = torch.arange(16)[:, None] % 2
    stripes = (0.4 * rows - 0.2).expand(1, 1, 2, 16, 16)
    per_pixel = torch.zeros(1, 6, 16, 16)
    # On the left the correction halves the stripes, on the right it doubles them.
    per_pixel[:, 5] = stripes[0, 0, 0]
    per_pixel[:, 5, :, :8] *= -0.5
    predictor = FramePredictor(1, width=4)
    maps = torch.cat([torch.zeros(1, 8, 4, 4), F.pixel_unshuffle(per_pixel, 4)], dim=1)
    predictor.out.forward = lambda features: maps
    frames, *_, sharp = predictor(stripes, stripes, 1)
    close(frames[0, 0, 0, :, :8], stripes[0, 0, 0, :, :8] / 2)
    close(sharp[0, 0, 0, :, :5], stripes[0, 0, 0, :, :5])
    close(sharp[0, 0, 0, :, 11:], 2 * stripes[0, 0, 0, :, 11:])


def test_a_code_is_one_of_the_possible_middles_and_none_is_the_code_of_zeros():
    predictor = shaken(FramePredictor(width=4), by=0.1)
    ends = contexts(size=32)
    codes = noise(2, 8)
    by_code = predictor(*ends, 3, codes)
    mean = predictor(*ends, 3)
    assert torch.equal(predictor(*ends, 3, 0 * codes).frames, mean.frames)
    assert (by_code.frames - mean.frames).abs().max() > 1e-3
    one = predictor(*(end[1:] for end in ends), 3, codes[1:])
    close(one.frames, by_code.frames[1:])


def test_each_frame_is_modulated_by_its_own_time():
    predictor = shaken(FramePredictor(width=4), by=0.1)
    three = predictor(*contexts(size=32), 3)
    seven = predictor(*contexts(size=32), 7)
    for few, many in zip(three, seven, strict=True):
        close(few, many[:, :, 1::2])  # a quarter, a half and three quarters of the gap
    log_error = three[1]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (log_error[:, :, i] - log_error[:, :, j]).abs().max() > 1e-3


def test_a_predictor_of_any_length_is_told_the_gap():
    predictor = shaken(FramePredictor(width=4, any_length=True), by=0.1)
    three, seven = (predictor(*contexts(size=32), gap).log_error for gap in (3, 7))
    assert (three[:, :, 1] - seven[:, :, 3]).abs().max() > 1e-3  # both are half-way


@pytest.mark.parametrize(
    ("c", "k", "patch", "size"), [(3, 2, 4, 16), (1, 1, 4, 24), (3, 3, 4, 21), (3, 2, 2, 21)]
)
def test_a_predictor_takes_any_number_of_frames_and_every_weight_of_it_learns(c, k, patch, size):
    predictor = shaken(FramePredictor(c, k, width=4, patch=patch))
    start, end = contexts(c=c, k=k, size=size)
    codes = noise(2, 8)
    frames, log_error, *others = predictor(start, end, 5, codes)
    assert frames.shape == (2, c, 5, size, size)
    (frames.square().mean() + log_error.mean()).backward()
    for name, weight in predictor.named_parameters():
        assert weight.grad.any(), name
    # Clips of a batch do not see each other.
    single = predictor(start[1:], end[1:], 5, codes[1:])
    close(tuple(single), (frames[1:], log_error[1:], *(x[1:] for x in others)))
