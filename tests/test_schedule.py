"""The schedule against its published formulas, and the algebra against itself."""

import math

import pytest
import torch

from diffusion.schedule import DiffusionSchedule


@pytest.fixture(params=["cosine", "linear"])
def schedule(request):
    return DiffusionSchedule(1000, request.param)


def draw():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, 3, 4, 8, 8, generator=generator, dtype=torch.float64)


def test_cosine_table_is_the_closed_form_until_the_last_beta_is_clipped():
    def closed(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    table = DiffusionSchedule(1000, "cosine").alpha_bar
    for t in (0, 1, 499, 900, 998):
        assert table[t].item() == pytest.approx(closed(t + 1) / closed(0), rel=1e-9)
    # The last beta is clipped to 0.999.
    assert table[999].item() == pytest.approx(closed(999) / closed(0) * 1e-3, rel=1e-9)


def test_linear_table_is_the_product_of_evenly_spaced_betas():
    product = 1.0
    for i, alpha_bar in enumerate(DiffusionSchedule(1000, "linear").alpha_bar.tolist()):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert alpha_bar == pytest.approx(product, rel=1e-9)


def test_v_x0_and_eps_invert_add_noise(schedule):
    x0, eps = draw()
    t = torch.tensor([0, 1, 400, 998, 999])
    x_t = schedule.add_noise(x0, eps, t)
    alpha_t = schedule.alpha_bar[t].sqrt().view(5, 1, 1, 1, 1)
    sigma_t = (1 - schedule.alpha_bar[t]).sqrt().view(5, 1, 1, 1, 1)
    torch.testing.assert_close(x_t, alpha_t * x0 + sigma_t * eps)
    v = schedule.v_from(x0, eps, t)
    torch.testing.assert_close(schedule.x0_from_v(x_t, v, t), x0)
    torch.testing.assert_close(schedule.eps_from_x0(x_t, x0, t), eps)


def test_velocity_is_the_derivative_of_x_t_along_the_angle(schedule):
    x0, eps = draw()
    t = torch.full((5,), 500)
    alpha_t, sigma_t = schedule.alpha_sigma(t, x0)
    angle = torch.atan2(sigma_t, alpha_t)
    step = 1e-4
    later = torch.cos(angle + step) * x0 + torch.sin(angle + step) * eps
    earlier = torch.cos(angle - step) * x0 + torch.sin(angle - step) * eps
    # A central difference is off by step^2 / 6 of the third derivative.
    slope = (later - earlier) / (2 * step)
    torch.testing.assert_close(slope, schedule.v_from(x0, eps, t), rtol=0, atol=1e-7)


def test_wrong_arguments_are_refused(schedule):
    x0, eps = draw()
    with pytest.raises(ValueError, match="one index per clip"):
        schedule.add_noise(x0, eps, torch.tensor([3]))
    with pytest.raises(ValueError, match="sigmoid"):
        DiffusionSchedule(1000, "sigmoid")
