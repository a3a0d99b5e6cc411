"""The training objective against its definition."""

import pytest
import torch

from diffusion.loss import (
    VALIDATION_PAIRS,
    diffusion_loss,
    drop_contexts,
    sample_training_noise,
    temporal_l1,
    validation_sum,
)
from diffusion.noise import NoiseConfig, generator_for, sample_noise
from diffusion.schedule import DiffusionSchedule

SCHEDULE = DiffusionSchedule()


def generator(seed):
    return torch.Generator().manual_seed(seed)


def batch(b=3, m=4):
    """Start, middle and end of random clips [B,3,m+4,8,8]."""
    return (torch.rand(b, 3, m + 4, 8, 8, generator=generator(0)) * 2 - 1).split([2, m, 2], dim=2)


def noised(m=4):
    """The arguments of `diffusion_loss` after the schedule: a batch with its t and eps."""
    start, middle, end = batch(m=m)
    t, eps, _ = sample_training_noise(middle, 1000, generator(1))
    return start, middle, end, t, eps


class Recorder(torch.nn.Module):
    """A fixed function of what each clip gives that remembers what it was called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t, start, end):
        self.calls.append((x_t, t, start, end))
        return 0.3 * x_t + (start[:, :, :1] - 2 * end[:, :, :1]).mean((3, 4), keepdim=True)


def test_the_network_is_asked_for_the_noisy_middle_at_its_t_between_its_ends():
    (start, middle, end, t, eps), model = noised(), Recorder()
    diffusion_loss(model, SCHEDULE, start, middle, end, t, eps)
    ((x_t, *given),) = model.calls
    assert torch.equal(x_t, SCHEDULE.add_noise(middle, eps, t)) and not torch.equal(start, end)
    assert all(torch.equal(got, wanted) for got, wanted in zip(given, (t, start, end), strict=True))


def test_the_true_velocity_has_no_loss():
    _, middle, _, t, eps = parts = noised()
    truth = lambda x_t, t, start, end: SCHEDULE.v_from(middle, eps, t)  # noqa: E731
    assert diffusion_loss(truth, SCHEDULE, *parts).eq(0).all()
    # x0 is recovered from v in float32: rounding of a few 1e-7
    assert diffusion_loss(truth, SCHEDULE, *parts, temporal_loss_weight=1.0).max() < 1e-6


def test_the_loss_is_v_mse_plus_the_weighted_temporal_term():
    _, middle, _, t, eps = parts = noised()
    zero = lambda x_t, t, start, end: torch.zeros_like(x_t)  # noqa: E731
    losses = diffusion_loss(zero, SCHEDULE, *parts, temporal_loss_weight=0.05)
    v = SCHEDULE.v_from(middle, eps, t)
    x0_hat = SCHEDULE.x0_from_v(SCHEDULE.add_noise(middle, eps, t), torch.zeros_like(v), t)
    for i in range(3):
        made, true = x0_hat[i], middle[i]  # [C,M,H,W]
        motion = (made[:, 1:] - made[:, :-1] - true[:, 1:] + true[:, :-1]).abs().mean()
        torch.testing.assert_close(losses[i], v[i].pow(2).mean() + 0.05 * motion)


def test_a_single_middle_frame_has_no_temporal_term():
    _, middle, *_ = parts = noised(m=1)
    assert temporal_l1(torch.zeros_like(middle), middle).tolist() == [0, 0, 0]
    assert diffusion_loss(Recorder(), SCHEDULE, *parts, 0.05).isfinite().all()


def test_the_network_may_compute_in_half_precision():
    half = lambda x_t, t, start, end: x_t.bfloat16()  # noqa: E731
    assert diffusion_loss(half, SCHEDULE, *noised(), 0.05).dtype == torch.float32


def test_clips_drop_their_contexts_at_the_asked_rate():
    middle = torch.zeros(4000, 1, 1, 1, 1)
    dropped = sample_training_noise(middle, 1000, generator(0), cfg_drop_prob=0.08).dropped
    # binomial: standard deviation sqrt(0.08 * 0.92 / 4000) = 0.0043; three of them
    assert dropped.float().mean().item() == pytest.approx(0.08, abs=0.013)
    assert not sample_training_noise(middle, 1000, generator(0)).dropped.any()


def test_a_dropped_clip_loses_both_its_ends_and_no_other_clip_any():
    start, _, end = batch(b=4)
    dropped = torch.tensor([True, False, True, False])
    for whole, context in zip((start, end), drop_contexts(start, end, dropped), strict=True):
        assert context[dropped].eq(0).all() and torch.equal(context[~dropped], whole[~dropped])


def test_timesteps_cover_the_schedule_evenly():
    t = sample_training_noise(torch.zeros(20000, 1, 1, 1, 1), 10, generator(0)).t
    # 2,000 expected each, standard deviation 42; four of them
    assert (torch.bincount(t, minlength=10) - 2000).abs().max() < 170


def test_noise_offset_adds_one_constant_per_clip_and_channel():
    middle = torch.zeros(3000, 2, 2, 4, 4)
    plain = sample_training_noise(middle, 10, generator(0)).eps
    shifted = sample_training_noise(middle, 10, generator(0), config=NoiseConfig(offset=0.5)).eps
    offset = shifted - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1, :1].expand_as(offset), rtol=0, atol=1e-5)
    # 6,000 draws: standard error of the deviation 0.5 / sqrt(12000) = 0.0046
    assert offset[:, :, 0, 0, 0].std().item() == pytest.approx(0.5, abs=0.015)


def test_correlated_noise_has_the_covariance_that_it_claims():
    r, count, where = 0.5, 4000, torch.device("cpu")
    generators = [generator_for(0, clip) for clip in range(count)]
    trained = sample_training_noise(torch.zeros(count, 3, 4, 6, 5), 10, generator(0), config=NoiseConfig(correlation=r))
    for eps in (sample_noise((3, 4, 6, 5), generators, where, NoiseConfig(correlation=r)), trained.eps):
        c, m, h, w = torch.meshgrid(*map(torch.arange, (3, 4, 6, 5)), indexing="ij")
        apart = sum((i.flatten()[:, None] - i.flatten()).abs() for i in (m, h, w)) + (
            c.flatten()[:, None] != c.flatten()
        )
        expected = r**apart  # neighbours of one axis r, n apart r to the n-th; two colours r
        covariance = eps.flatten(1).T @ eps.flatten(1) / count
        # a covariance of n draws has a standard error of at most sqrt(2 / n) = 0.022; of 130,000 numbers the largest
        # is within 5.5 of them, their mean within a hundredth
        assert (covariance - expected).abs().max() < 0.13 and (covariance - expected).mean().abs() < 0.01


def test_noise_without_correlation_is_what_it_was():
    plain = sample_noise((3, 2, 4, 4), [generator(0)], "cpu")
    assert torch.equal(plain[0], torch.randn(3, 2, 4, 4, generator=generator(0)))


def test_keyed_generators_repeat_and_differ_by_key():
    draw = lambda *key: torch.randn(4, generator=generator_for(*key)).tolist()  # noqa: E731
    assert draw(42, 1, 7) == draw(42, 1, 7)
    assert len({tuple(draw(*key)) for key in [(42, 1, 7), (42, 7, 1), (421, 7), (42, 17), (43, 1, 7)]}) == 5


def validate(clips, batch_size, seed=0, model=None):
    parts = (tuple(part[i : i + batch_size] for part in clips) for i in range(0, len(clips[1]), batch_size))
    total, pairs = validation_sum(model or Recorder(), SCHEDULE, parts, len(clips[1]), seed, temporal_loss_weight=0.05)
    return total / pairs


@pytest.mark.parametrize("count", [3, 10])
def test_validation_is_a_function_of_the_weights_alone(count):
    clips = batch(b=count)
    # summed in another order: float32 rounding of the clips' losses
    assert validate(clips, 1) == pytest.approx(validate(clips, 4), rel=1e-5)
    assert validate(clips, 4) == validate(clips, 4)
    assert validate(clips, 4) != validate(clips, 4, seed=1)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_validation_spreads_t_evenly_over_the_schedule(count):
    model = Recorder()
    validate(batch(b=count), 7, model=model)
    asked = [int(t) for _, batch_t, _, _ in model.calls for t in batch_t]
    pairs = len(asked)
    assert pairs >= VALIDATION_PAIRS and pairs % count == 0
    expected = (torch.arange(pairs) + 0.5) / pairs * 1000
    assert sorted(asked) == expected.int().tolist()


def test_validation_is_the_mean_over_all_clips():
    clips, total = batch(b=70), 0.0  # one t each
    for i in range(70):
        t = torch.tensor([int((i + 0.5) / 70 * 1000)])
        eps = torch.randn(3, 4, 8, 8, generator=generator_for(0, 2, i))[None]
        total += diffusion_loss(Recorder(), SCHEDULE, *(p[i : i + 1] for p in clips), t, eps, 0.05).item()
    assert validate(clips, 16) == pytest.approx(total / 70, rel=1e-5)


def test_the_sums_of_stretches_of_a_split_add_up_to_its_own():
    clips = batch(b=10)
    whole = validation_sum(Recorder(), SCHEDULE, [clips], 10, seed=3)
    stretches = [
        validation_sum(Recorder(), SCHEDULE, [tuple(part[i:j] for part in clips)] if j > i else [], 10, 3, first=i)
        for i, j in ((0, 3), (3, 3), (3, 10))
    ]
    total, pairs = map(sum, zip(*stretches, strict=True))
    assert total == pytest.approx(whole[0], rel=1e-5) and pairs == whole[1] == 70


def test_several_processes_draw_what_one_would():
    middle = torch.zeros(6, 3, 2, 4, 4)
    draw = lambda x, **part: sample_training_noise(x, 1000, generator(5), 0.5, NoiseConfig(0.1, 0.5), **part)  # noqa: E731
    parts = [draw(middle[:2], part=(i, 3)) for i in range(3)]
    for whole, *pieces in zip(draw(middle), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))
