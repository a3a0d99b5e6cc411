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
from diffusion.noise import generator_for
from diffusion.schedule import DiffusionSchedule

SCHEDULE = DiffusionSchedule()


def batch(b=3, m=4):
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(b, 3, m + 4, 8, 8, generator=generator) * 2 - 1
    return clip[:, :, :2], clip[:, :, 2:-2], clip[:, :, -2:]


def test_the_true_velocity_has_no_loss():
    start, middle, end = batch()
    t, eps, _ = sample_training_noise(middle, 1000, torch.Generator().manual_seed(1))
    truth = lambda x_t, t, start, end: SCHEDULE.v_from(middle, eps, t)  # noqa: E731
    terms = diffusion_loss(truth, SCHEDULE, start, middle, end, t, eps, temporal_loss_weight=1.0)
    assert terms.v_mse.eq(0).all()
    # x0 is recovered from v in float32: rounding of a few 1e-7
    assert terms.total.max() < 1e-6


def test_the_loss_is_v_mse_plus_the_weighted_temporal_term():
    start, middle, end = batch()
    t, eps, _ = sample_training_noise(middle, 1000, torch.Generator().manual_seed(1))
    zero = lambda x_t, t, start, end: torch.zeros_like(x_t)  # noqa: E731
    terms = diffusion_loss(zero, SCHEDULE, start, middle, end, t, eps, temporal_loss_weight=0.05)
    v = SCHEDULE.v_from(middle, eps, t)
    x0_hat = SCHEDULE.x0_from_v(SCHEDULE.add_noise(middle, eps, t), torch.zeros_like(v), t)
    for i in range(3):
        motion = torch.stack(
            [(x0_hat[i, :, f + 1] - x0_hat[i, :, f] - middle[i, :, f + 1] + middle[i, :, f]).abs() for f in range(3)]
        ).mean()
        torch.testing.assert_close(terms.v_mse[i], v[i].pow(2).mean())
        torch.testing.assert_close(terms.total[i], v[i].pow(2).mean() + 0.05 * motion)


def test_a_single_middle_frame_has_no_temporal_term():
    start, middle, end = batch(m=1)
    assert temporal_l1(torch.zeros_like(middle), middle).tolist() == [0, 0, 0]
    t, eps, _ = sample_training_noise(middle, 1000, torch.Generator().manual_seed(1))
    model = lambda x_t, t, start, end: x_t  # noqa: E731
    assert diffusion_loss(model, SCHEDULE, start, middle, end, t, eps, 0.05).total.isfinite().all()


def test_the_network_may_compute_in_half_precision():
    start, middle, end = batch()
    t, eps, _ = sample_training_noise(middle, 1000, torch.Generator().manual_seed(1))
    half = lambda x_t, t, start, end: x_t.bfloat16()  # noqa: E731
    assert diffusion_loss(half, SCHEDULE, start, middle, end, t, eps, 0.05).total.dtype == torch.float32


def test_contexts_are_dropped_together_and_at_the_asked_rate():
    middle = torch.zeros(4000, 1, 1, 1, 1)
    dropped = sample_training_noise(middle, 1000, torch.Generator().manual_seed(0), cfg_drop_prob=0.08).dropped
    # binomial: standard deviation sqrt(0.08 * 0.92 / 4000) = 0.0043; three of them
    assert dropped.float().mean().item() == pytest.approx(0.08, abs=0.013)
    start, end = drop_contexts(torch.ones(2, 3, 2, 4, 4), torch.ones(2, 3, 2, 4, 4), torch.tensor([True, False]))
    for context in (start, end):
        assert context[0].eq(0).all() and context[1].eq(1).all()
    assert not sample_training_noise(middle, 1000, torch.Generator().manual_seed(0)).dropped.any()


def test_timesteps_cover_the_schedule_evenly():
    t = sample_training_noise(torch.zeros(20000, 1, 1, 1, 1), 10, torch.Generator().manual_seed(0)).t
    # 2,000 expected each, standard deviation 42; four of them
    assert (torch.bincount(t, minlength=10) - 2000).abs().max() < 170


def test_noise_offset_adds_one_constant_per_clip_and_channel():
    middle = torch.zeros(3000, 2, 2, 4, 4)
    plain = sample_training_noise(middle, 10, torch.Generator().manual_seed(0)).eps
    shifted = sample_training_noise(middle, 10, torch.Generator().manual_seed(0), noise_offset=0.5).eps
    offset = shifted - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1, :1].expand_as(offset), rtol=0, atol=1e-5)
    # 6,000 draws: standard error of the deviation 0.5 / sqrt(12000) = 0.0046
    assert offset[:, :, 0, 0, 0].std().item() == pytest.approx(0.5, abs=0.015)


def test_keyed_generators_repeat_and_differ_by_key():
    draw = lambda *key: torch.randn(4, generator=generator_for(*key)).tolist()  # noqa: E731
    assert draw(42, 1, 7) == draw(42, 1, 7)
    assert len({tuple(draw(*key)) for key in [(42, 1, 7), (42, 7, 1), (421, 7), (42, 17), (43, 1, 7)]}) == 5


class Recorder(torch.nn.Module):
    """A fixed function of its inputs that remembers every t it was asked for."""

    def __init__(self):
        super().__init__()
        self.t = []

    def forward(self, x_t, t, start, end):
        self.t += t.tolist()
        return 0.3 * x_t + start.mean() * 0


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
    pairs = len(model.t)
    assert pairs >= VALIDATION_PAIRS and pairs % count == 0
    expected = (torch.arange(pairs) + 0.5) / pairs * 1000
    assert sorted(model.t) == expected.int().tolist()


def test_validation_is_the_mean_over_all_clips():
    clips = batch(b=70)  # one t each

    def one_at_a_time():
        total = 0.0
        for i in range(70):
            t = torch.tensor([int((i + 0.5) / 70 * 1000)])
            eps = torch.randn(3, 4, 8, 8, generator=generator_for(0, 2, i))[None]
            total += diffusion_loss(Recorder(), SCHEDULE, *(p[i : i + 1] for p in clips), t, eps, 0.05).total.item()
        return total / 70

    assert validate(clips, 16) == pytest.approx(one_at_a_time(), rel=1e-5)


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
    draw = lambda frames, **part: sample_training_noise(  # noqa: E731
        frames, 1000, torch.Generator().manual_seed(5), 0.5, 0.1, **part
    )
    parts = [draw(middle[:2], part=(i, 3)) for i in range(3)]
    for whole, *pieces in zip(draw(middle), *parts, strict=True):
        assert torch.equal(whole, torch.cat(pieces))
