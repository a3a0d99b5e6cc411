"""Both training objectives, the noise they draw and their clips, against their definitions."""

import math
from collections import Counter

import pytest
import torch
from test_model import shaken

from data.training_clips import crop_to_length
from diffusion import noise
from diffusion.loss import (
    DiffusionTask,
    crop_where_unsure,
    diffusion_loss,
    diffusion_validation_losses,
    draw_codes,
    guess_losses,
    nearest_code,
    predictor_loss,
    predictor_validation_losses,
    sample_training_noise,
    velocity_loss,
)
from diffusion.noise import NoiseConfig, correlated, generator_for, sample_noise
from diffusion.schedule import DiffusionSchedule
from models.predictor import FramePredictor, Guess

SCHEDULE = DiffusionSchedule()
PLAIN = DiffusionTask(SCHEDULE)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def batch(b=3, m=4):
    clips = torch.rand(b, 3, m + 4, 8, 8, generator=generator(0)) * 2 - 1
    return clips.split([2, m, 2], dim=2)


class Recorder(torch.nn.Module):
    """A fixed function of each clip, in half precision, that remembers what it was given."""

    def forward(self, *given):
        self.given = given
        x_t, _, start, end = given[:4]
        v = 0.3 * x_t + (start[:, :, :1] - 2 * end[:, :, :1]).mean((3, 4), keepdim=True)
        return v.bfloat16()


class Overconfident(torch.nn.Module):
    """A predictor that is sure, and often wrong; it remembers what it was given."""

    code_size = 8

    def forward(self, start, end, num_middle, code=None):
        self.given = (start, end, code)
        frames = 2 * (start[:, :, -1:] - end[:, :, :1]).expand(-1, -1, num_middle, -1, -1)
        if code is not None:
            frames = frames + 0.1 * code[:, :1, None, None, None]
        return Guess(frames, frames[:, :1] - 1, torch.cat([frames, -frames], dim=1), frames)

    def residual(self, start, middle, end, codes):
        """(middle - prediction) / (2 expected errors), cut at 4, of each clip's nearest code."""
        code = nearest_code(self, start, middle, end, codes)
        frames, log_error, *_ = self(start, end, middle.shape[2], code)
        missed = (middle - frames.clamp(-1, 1)) / (2 * log_error.exp())
        assert missed.abs().max() > 4
        return missed.clamp(-4, 4)


@pytest.mark.parametrize("m", [1, 4])
def test_the_loss_is_v_mse_plus_the_weighted_l1_of_frame_differences(m):
    start, x0, end = batch(m=m)
    eps = torch.randn(x0.shape, generator=generator(1))
    t = torch.tensor([10, 500, 990])
    losses = velocity_loss(Recorder(), SCHEDULE, start, x0, end, t, eps, 0.05)
    assert losses.dtype == torch.float32
    x_t = SCHEDULE.add_noise(x0, eps, t)
    v_hat = Recorder()(x_t, t, start, end, None).float()
    v_error = v_hat - SCHEDULE.v_from(x0, eps, t)
    x0_error = SCHEDULE.x0_from_v(x_t, v_hat, t) - x0
    for i in range(3):
        motion = (x0_error[i, :, 1:] - x0_error[i, :, :-1]).abs().mean() if m > 1 else 0
        torch.testing.assert_close(losses[i], v_error[i].square().mean() + 0.05 * motion)


@pytest.mark.parametrize("predictor", [None, Overconfident()])
def test_the_network_loses_dropped_contexts_and_the_predictor_keeps_them(predictor):
    start, middle, end = batch(b=6)
    task = DiffusionTask(SCHEDULE, NoiseConfig(0.1, 0.5), predictor, 0.05, cfg_drop_prob=0.5)
    model = Recorder()
    losses = diffusion_loss(model, start, middle, end, generator(1), task=task)
    x_t, t, seen_start, seen_end, guide = model.given
    stream = generator(1)
    x0 = middle
    if predictor is not None:
        given_start, given_end, code = predictor.given
        assert torch.equal(given_start, start)
        assert torch.equal(given_end, end)
        x0 = predictor.residual(start, middle, end, draw_codes(6, 8, stream))
        frames, log_error, warped, _ = predictor(start, end, 4, code)
        seen = torch.cat([frames.clamp(-1, 1), warped, log_error / 4], dim=1)
        torch.testing.assert_close(guide, seen)
    drawn = sample_training_noise(middle, stream, task)
    assert torch.equal(t, drawn.t)
    torch.testing.assert_close(x_t, SCHEDULE.add_noise(x0, drawn.eps, t))
    assert 0 < drawn.dropped.sum() < 6
    for seen, context in ((seen_start, start), (seen_end, end)):
        assert seen[drawn.dropped].eq(0).all()
        assert torch.equal(seen[~drawn.dropped], context[~drawn.dropped])
    given = (seen_start, x0, seen_end, t, drawn.eps)
    torch.testing.assert_close(losses, velocity_loss(model, SCHEDULE, *given, 0.05))


def test_windows_are_cut_out_of_all_alike_in_proportion_to_the_expected_error():
    scale = torch.rand(1, 1, 4, 12, 16, generator=generator(0))
    scale[..., :6, :] *= 9
    # Rows and columns as pictures, so that a window tells its place.
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(16.0), indexing="ij")
    share = (torch.arange(2000) + 0.5) / 2000
    many = [part.expand(2000, 1, 1, 12, 16) for part in (rows, columns)]
    cut_rows, cut_columns = crop_where_unsure(
        scale.expand(2000, -1, -1, -1, -1), (6, 8), share, tuple(many)
    )
    assert cut_rows.shape == (2000, 1, 1, 6, 8)
    top, left = cut_rows[:, 0, 0, 0, 0], cut_columns[:, 0, 0, 0, 0]
    assert torch.equal(
        cut_rows[:, 0, 0], (top[:, None] + torch.arange(6.0))[..., None].expand(-1, -1, 8)
    )
    assert torch.equal(
        cut_columns[:, 0, 0], (left[:, None] + torch.arange(8.0))[:, None].expand(-1, 6, -1)
    )
    places = [(y, x) for y in range(0, 7, 2) for x in range(0, 9, 2)]
    means = torch.stack([scale[..., y : y + 6, x : x + 8].mean() for y, x in places])
    seen = Counter(zip(top.tolist(), left.tolist(), strict=True))
    counts = torch.tensor([float(seen[place]) for place in places])
    # Evenly spread shares meet every place within one of its expectation.
    assert (counts - 2000 * means / means.sum()).abs().max() <= 1.01


def test_refining_learns_on_windows_and_processes_share_their_draw():
    start, middle, end = batch(b=4)
    task = DiffusionTask(SCHEDULE, NoiseConfig(0.0, 0.5), Overconfident(), crop=(4, 4))
    whole = Recorder()
    losses = diffusion_loss(whole, start, middle, end, generator(1), task=task)
    assert [tuple(part.shape[-2:]) for part in whole.given if part.dim() == 5] == [(4, 4)] * 4
    parts = []
    for number in range(2):
        mine = slice(2 * number, 2 * number + 2)
        ends = (start[mine], middle[mine], end[mine])
        share = task._replace(part=(number, 2))
        parts.append(diffusion_loss(Recorder(), *ends, generator(1), task=share))
    torch.testing.assert_close(torch.cat(parts), losses)


def test_windows_lie_where_the_predictor_is_unsure(monkeypatch):
    def unsure_in_a_corner(self, *given):
        guess = guess_surely(self, *given)
        guess.log_error[:] = -7.0
        guess.log_error[..., 6:, 6:] = 0.0
        return guess

    guess_surely = Overconfident.forward
    monkeypatch.setattr(Overconfident, "forward", unsure_in_a_corner)
    start, middle, end = batch(b=4)
    task = DiffusionTask(SCHEDULE, predictor=Overconfident(), crop=(4, 4))
    model = Recorder()
    diffusion_loss(model, start, middle, end, generator(1), task=task)
    assert torch.equal(model.given[2], start[..., 4:, 4:])


def test_the_expected_error_is_learned_as_the_width_of_a_laplace_distribution():
    middle = batch()[1]
    frames = (middle + 0.2).requires_grad_()
    log_error = torch.zeros(3, 1, 4, 8, 8, requires_grad=True)
    loss = guess_losses((frames, log_error), middle)
    # |error| + 2 error^2 + 0.1 (|error| / width + log width + 7)
    torch.testing.assert_close(loss, torch.full((3,), 0.2 + 2 * 0.04 + 0.1 * (0.2 + 7)))
    loss.sum().backward()
    # The likelihood pulls the expected error and leaves the frames to the other two terms.
    of_frames = torch.full_like(frames, (1 + 4 * 0.2) / frames[0].numel())
    torch.testing.assert_close(frames.grad, of_frames)
    of_error = torch.full_like(log_error, 0.1 * (1 - 0.2) / log_error[0].numel())
    torch.testing.assert_close(log_error.grad, of_error)
    # The best is its logarithm; the loss of an exact prediction, known to be exact, is 0.
    best = torch.full_like(log_error, math.log(0.2)).requires_grad_()
    guess_losses((frames.detach(), best), middle).sum().backward()
    assert best.grad.abs().max() < 1e-6
    lowest = torch.full_like(log_error, -7.0)
    assert guess_losses((middle, lowest), middle).eq(0).all()


def test_every_second_clip_is_learned_by_the_nearest_of_its_codes_and_the_others_by_zeros():
    start, middle, end = batch(b=6)
    predictor = Overconfident()
    losses = predictor_loss(predictor, start, middle, end, generator(1), code_size=8)
    used = predictor.given[2]
    assert torch.equal(used[::2], torch.zeros(3, 8))
    codes = draw_codes(6, 8, generator(1))
    assert codes.shape == (6, 4, 8)
    for clip in (1, 3, 5):
        of_clip = [x[clip : clip + 1] for x in (start, end, middle)]
        found = [
            guess_losses(predictor(*of_clip[:2], 4, code[None]), of_clip[2]) for code in codes[clip]
        ]
        assert torch.equal(used[clip], codes[clip, torch.cat(found).argmin()])
        torch.testing.assert_close(losses[clip], torch.cat(found).min())
    torch.testing.assert_close(
        losses[::2], predictor_validation_losses(predictor, start, middle, end, range(6))[::2]
    )
    # Two processes draw what one would.
    parts = []
    for number in range(2):
        mine = slice(3 * number, 3 * number + 3)
        clips = (start[mine], middle[mine], end[mine])
        parts.append(predictor_loss(predictor, *clips, generator(1), code_size=8, part=(number, 2)))
    torch.testing.assert_close(torch.cat(parts), losses)


def test_a_predictor_learns_under_autocast_though_the_search_for_codes_keeps_no_gradients():
    # Weights that autocast had rounded without gradients must not be used again with them.
    predictor = shaken(FramePredictor(width=4), by=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        predictor_loss(predictor, *batch(b=4), generator(1), code_size=8).sum().backward()
    for name, weight in predictor.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


def test_correlated_noise_has_the_covariance_that_it_claims():
    places = torch.meshgrid(*map(torch.arange, (3, 4, 6, 5)), indexing="ij")
    c, m, h, w = ((index.flatten()[:, None] - index.flatten()).abs() for index in places)
    # Values n apart along an axis share the n-th power; any two colours share the first.
    expected = 0.5 ** (m + h + w + c.clamp(max=1))
    # Noise is a matrix times white noise: unit vectors give the matrix.
    matrix = correlated(torch.eye(360).view(360, 3, 4, 6, 5), 0.5).flatten(1)
    torch.testing.assert_close(matrix.T @ matrix, expected, rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(correlated(torch.eye(360).view(360, 3, 4, 6, 5), 0.5).flatten(1), matrix)


def test_training_and_sampling_draw_correlated_noise_and_a_constant_per_clip_and_channel():
    config = NoiseConfig(offset=0.5, correlation=0.5)
    drawn = sample_noise((3, 2, 4, 4), [generator(0)], "cpu", config)
    stream = generator(0)
    white = torch.randn(1, 3, 2, 4, 4, generator=stream)
    constant = torch.randn(1, 3, 1, 1, 1, generator=stream)
    assert torch.equal(drawn, correlated(white, 0.5) + 0.5 * constant)
    # Training draws t before, and between the two which clips are dropped.
    stream = generator(0)
    t = torch.randint(1000, (8,), generator=stream)
    white = torch.randn(8, 3, 2, 4, 4, generator=stream)
    dropped = torch.rand(8, generator=stream) < 0.5
    constant = torch.randn(8, 3, 1, 1, 1, generator=stream)
    task = PLAIN._replace(noise=config, cfg_drop_prob=0.5)
    drawn = sample_training_noise(torch.zeros(8, 3, 2, 4, 4), generator(0), task)
    assert torch.equal(drawn.t, t)
    assert torch.equal(drawn.eps, correlated(white, 0.5) + 0.5 * constant)
    assert torch.equal(drawn.dropped, dropped)


def test_keyed_generators_repeat_and_differ_by_key():
    def draw(*key):
        return tuple(torch.randn(4, generator=generator_for(*key)).tolist())

    assert draw(42, 1, 7) == draw(42, 1, 7)
    keys = [(42, 1, 7), (42, 7, 1), (421, 7), (42, 17), (43, 1, 7)]
    assert len({draw(*key) for key in keys}) == 5
    purposes = ["INIT", "TRAIN", "VALIDATION", "PREVIEW", "SAMPLE", "LENGTH"]
    assert len({getattr(noise, purpose) for purpose in purposes}) == 6


def test_several_processes_draw_what_one_would():
    middle = torch.zeros(6, 3, 2, 4, 4)
    task = DiffusionTask(SCHEDULE, noise=NoiseConfig(0.1, 0.5), cfg_drop_prob=0.5)
    whole = sample_training_noise(middle, generator(5), task)
    tasks = [task._replace(part=(i, 3)) for i in range(3)]
    parts = [sample_training_noise(middle[:2], generator(5), task) for task in tasks]
    for together, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(pieces))


@pytest.mark.parametrize(("count", "draws"), [(1, 8), (20, 4), (70, 1)])
def test_validation_gives_each_pair_of_clip_and_draw_its_own_noise_level_and_noise(count, draws):
    clips = batch(b=count)
    config = NoiseConfig(offset=0.1, correlation=0.5)
    guess = Overconfident()
    task = DiffusionTask(SCHEDULE, config, guess, 0.05, cfg_drop_prob=1.0)
    for first in range(0, count, 32):
        numbers = range(first, min(first + 32, count))
        start, middle, end = (part[first : numbers.stop] for part in clips)
        streams = [generator_for(5, noise.VALIDATION, draws * count + clip) for clip in numbers]
        codes = torch.cat([draw_codes(1, 8, stream) for stream in streams])
        x0 = guess.residual(start, middle, end, codes)
        pairs = [draw * count + clip for draw in range(draws) for clip in numbers]
        t = torch.tensor([int((pair + 0.5) / (draws * count) * 1000) for pair in pairs])
        generators = [generator_for(5, noise.VALIDATION, pair) for pair in pairs]
        eps = sample_noise(middle.shape[1:], generators, "cpu", config)
        # No context is dropped, whatever training does.
        start, x0, end = (part.repeat(draws, 1, 1, 1, 1) for part in (start, x0, end))
        expected = velocity_loss(Recorder(), SCHEDULE, start, x0, end, t, eps, 0.05)
        parts = [part[first : numbers.stop] for part in clips]
        settings = {"task": task, "total_clips": count, "seed": 5}
        losses = diffusion_validation_losses(Recorder(), *parts, numbers, **settings)
        torch.testing.assert_close(losses, expected)


def test_a_batch_is_cut_to_a_length_and_a_place_drawn_evenly():
    clips = torch.arange(9.0).view(1, 1, 9, 1, 1).expand(2, 3, 9, 4, 4)  # frame i shows i
    drawn = Counter()
    for i in range(1200):
        shown = crop_to_length(clips, (6, 9), generator_for(i))[1, 2, :, 3, 3].tolist()
        first = int(shown[0])
        assert shown == list(range(first, first + len(shown)))
        drawn[len(shown), first] += 1
    # 300 expected of each length, shared by its places; four standard deviations of 15 at most.
    for length in range(6, 10):
        for first in range(10 - length):
            assert abs(drawn[length, first] - 300 / (10 - length)) < 60
    assert drawn.total() == 1200
    assert crop_to_length(clips, (9, 9), None) is clips
