"""The schedule against its published formulas, and the algebra against itself."""

import math

import pytest
import torch

from diffusion.schedule import DiffusionSchedule


@pytest.fixture(params=["cosine", "linear"])
def schedule(request):
    return DiffusionSchedule(1000, request.param)


def clips(b=5, m=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(b, 3, m, 8, 8, generator=generator) for _ in range(2)]


def test_alpha_bar_decreases_inside_the_unit_interval(schedule):
    assert schedule.alpha_bar.dtype == torch.float64
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.alpha_bar.min() > 0 and schedule.alpha_bar.max() < 1


def test_cosine_table_is_the_closed_form_until_the_last_beta_is_clipped():
    def closed(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2

    table = DiffusionSchedule(1000, "cosine").alpha_bar
    for t in (0, 1, 499, 900, 998):
        assert table[t].item() == pytest.approx(closed(t + 1), rel=1e-9)
    assert table[999].item() == pytest.approx(closed(999) * 1e-3, rel=1e-9)  # beta clipped to 0.999


def test_linear_table_is_the_product_of_evenly_spaced_betas():
    product = 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    assert DiffusionSchedule(1000, "linear").alpha_bar[-1].item() == pytest.approx(product, rel=1e-9)


def test_v_x0_and_eps_invert_add_noise(schedule):
    x0, eps = clips()
    t = torch.tensor([0, 1, 400, 998, 999])
    x_t, v = schedule.add_noise(x0, eps, t), schedule.v_from(x0, eps, t)
    # alpha^2 + sigma^2 = 1 up to float32 rounding of values of a few units: 1e-6 relative
    torch.testing.assert_close(schedule.x0_from_v(x_t, v, t), x0, rtol=1e-5, atol=2e-6)
    alpha_t, sigma_t = schedule.alpha_sigma(t, x0)
    torch.testing.assert_close(sigma_t * x_t + alpha_t * v, eps, rtol=1e-5, atol=2e-6)
    t = torch.tensor([200, 400, 600, 800, 999])
    x_t = schedule.add_noise(x0, eps, t)
    # the division by sigma_t amplifies float32 rounding by 1 / sigma_t, at most 10 here
    torch.testing.assert_close(schedule.eps_from_x0(x_t, x0, t), eps, rtol=1e-4, atol=1e-5)


def test_velocity_is_the_derivative_of_x_t_along_the_angle(schedule):
    x0, eps = clips()
    t = torch.full((5,), 500)
    alpha_t, sigma_t = schedule.alpha_sigma(t, x0)
    angle, step = torch.atan2(sigma_t, alpha_t), 1e-2
    later = torch.cos(angle + step) * x0 + torch.sin(angle + step) * eps
    earlier = torch.cos(angle - step) * x0 + torch.sin(angle - step) * eps
    # central difference: error step^2 / 6 of the third derivative, about 2e-5 of values up to 5
    torch.testing.assert_close((later - earlier) / (2 * step), schedule.v_from(x0, eps, t), rtol=1e-3, atol=1e-3)


def test_noisy_frames_keep_unit_variance_for_unit_variance_data(schedule):
    x0, eps = (torch.randn(1, 1, 1, 500, 500, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for t in (0, 300, 999):
        # 250,000 samples: the standard error of a variance is sqrt(2 / n) = 0.003
        assert schedule.add_noise(x0, eps, torch.tensor([t])).var().item() == pytest.approx(1, abs=0.012)


def test_wrong_arguments_name_the_rule_and_the_value(schedule):
    x0, eps = clips()
    with pytest.raises(ValueError, match=r"one index per clip, shape \(5,\) \(got \(1,\)\)"):
        schedule.add_noise(x0, eps, torch.tensor([3]))
    with pytest.raises(ValueError, match="cosine, linear .*'sigmoid'"):
        DiffusionSchedule(1000, "sigmoid")
    with pytest.raises(ValueError, match="at least 1"):
        DiffusionSchedule(0)
