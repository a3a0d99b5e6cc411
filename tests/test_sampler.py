"""The sampler against closed forms and against diffusers, as whole trajectories."""

import pytest
import torch
from test_refining import contexts
from torch import nn

from diffusion.noise import NoiseConfig, correlated, sample_noise
from diffusion.sampler import (
    SPACINGS,
    dynamic_thresholding,
    forwards_per_clip,
    sample_middle,
    visited_timesteps,
)
from diffusion.schedule import DiffusionSchedule

SCHEDULE = DiffusionSchedule()


class SmallModel:
    """A fixed function of x_t, t and the contexts that counts what it is asked."""

    def __init__(self, gain=1.0):
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 3, 3, padding=1).requires_grad_(False)
        self.gain = gain
        self.encoded = 0
        self.forwards = []

    def encode_contexts(self, start_context, end_context, guide=None):
        self.encoded += 1
        features = start_context.mean((2, 3, 4)) - 0.5 * end_context.mean((2, 3, 4))  # [B,C]
        return features if guide is None else features + guide.mean((2, 3, 4))

    def denoise(self, x_t, t, features):
        self.forwards.append(len(x_t))
        v = self.conv(x_t).tanh() + features[:, :, None, None, None]
        return self.gain * v * (1 + t.float() / 1000).view(-1, 1, 1, 1, 1)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def white_noise(streams):
    return torch.stack([torch.randn(3, 2, 8, 8, generator=stream) for stream in streams])


def close(actual, expected):
    # float32 rounding of values up to about 4, accumulated over steps.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def sample(model=None, ends=None, **changes):
    states = []
    settings = {
        "num_middle": 2,
        "steps": 5,
        "generator": generators(5, 6),
        "callback": lambda **state: states.append(state),
        **changes,
    }
    model = model or SmallModel()
    return sample_middle(model, SCHEDULE, *(ends or contexts()), **settings), states


def test_timesteps_or_their_roots_fall_evenly_from_full_noise():
    assert visited_timesteps(1000, 5) == [999, 749, 500, 250, 0]
    assert visited_timesteps(1000, 5, "trailing") == [999, 799, 599, 399, 199]
    assert visited_timesteps(1000, 8, "quadratic") == [999, 734, 510, 326, 183, 82, 20, 0]
    for spacing in SPACINGS:
        for steps in (1, 2, 40, 333, 1000):
            visited = visited_timesteps(1000, steps, spacing)
            assert visited[0] == 999
            assert len(visited) == steps
            assert visited == sorted(set(visited), reverse=True)


@pytest.mark.parametrize(("steps", "eta"), [(7, 0.0), (7, 0.5), (40, 1.0)])
def test_whole_trajectory_agrees_with_diffusers(steps, eta):
    diffusers = pytest.importorskip("diffusers", reason="the oracle of requirements-dev.txt")
    oracle = diffusers.DDIMScheduler(
        1000,
        prediction_type="v_prediction",
        beta_schedule="squaredcos_cap_v2",
        clip_sample=False,
    )
    table = oracle.alphas_cumprod.double()
    torch.testing.assert_close(table, SCHEDULE.alpha_bar, rtol=1e-3, atol=1e-6)
    # At eta 1 it subtracts nearly equal numbers, which its float32 table rounds to 0.1 %.
    oracle.alphas_cumprod = SCHEDULE.alpha_bar

    model = SmallModel()
    middle, trajectory = sample(model, steps=steps, eta=eta, clip_x0=False)
    streams = generators(5, 6)
    x = white_noise(streams)
    features = model.encode_contexts(*contexts())
    visited = visited_timesteps(1000, steps)
    for state, t, t_prev in zip(trajectory, visited, [*visited[1:], -1], strict=True):
        close(state["x_t"], x)
        assert state["t"].tolist() == [t, t]
        v = model.denoise(x, state["t"], features)
        # Its previous index is t - (training steps // inference steps).
        oracle.num_inference_steps = 1
        oracle.register_to_config(num_train_timesteps=t - t_prev)
        is_last = t_prev < 0
        fresh = white_noise(streams) if eta and not is_last else torch.zeros_like(x)
        result = oracle.step(v, t, x, eta=eta, variance_noise=fresh)
        x = result.pred_original_sample if is_last else result.prev_sample
        close(state["x0_hat"], result.pred_original_sample)
    close(middle, x)


def test_every_draw_is_correlated_as_in_training_and_the_first_has_the_offset():
    config = NoiseConfig(offset=0.5, correlation=0.5)
    _, states = sample(eta=1.0, noise=config, clip_x0=False)
    streams = generators(5, 6)
    assert torch.equal(states[0]["x_t"], sample_noise((3, 2, 8, 8), streams, "cpu", config))
    for now, after in zip(states, states[1:], strict=False):
        a = SCHEDULE.alpha_bar[now["t"][0]].item()
        p = SCHEDULE.alpha_bar[after["t"][0]].item()
        variance = (1 - p) / (1 - a) * (1 - a / p)  # of DDPM's posterior
        eps = SCHEDULE.eps_from_x0(now["x_t"], now["x0_hat"], now["t"])
        mean = p**0.5 * now["x0_hat"] + (1 - p - variance) ** 0.5 * eps
        close(after["x_t"], mean + variance**0.5 * correlated(white_noise(streams), 0.5))


def test_a_clip_does_not_depend_on_its_batch():
    start, end = contexts(4)

    def run(rows, noise):
        return sample(ends=(start[rows], end[rows]), generator=noise, eta=0.7)[0]

    together = run([0, 1, 2, 3], generators(10, 11, 12, 13))
    close(run([2], generators(12))[0], together[2])
    one, halves = generators(3, 3)
    whole = run([0, 1, 2, 3], one)
    close(torch.cat([run([0, 1], halves), run([2, 3], halves)]), whole)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("scale", "interval", "branches"),
    [
        (1.0, (0.0, 1.0), [1, 1, 1, 1, 1]),
        (0.0, (0.0, 1.0), [1, 1, 1, 1, 1]),
        (1.8, (0.0, 1.0), [2, 2, 2, 2, 2]),
        (1.8, (0.0, 0.5), [1, 1, 1, 2, 2]),  # of 999, 749, 500, 250 and 0
        (1.8, (1.0, 1.0), [2, 1, 1, 1, 1]),
    ],
)
def test_guidance_extrapolates_from_zero_contexts_in_its_interval(scale, interval, branches):
    model = SmallModel()
    guidance = {"guidance_scale": scale, "guidance_interval": interval}
    guide = torch.randn(2, 3, 2, 8, 8, generator=generators(7)[0])
    _, states = sample(model, guide=guide, **guidance)
    assert model.encoded == len(set(branches))
    assert model.forwards == [2 * number for number in branches]  # of two clips
    settings = {"steps": 5, "spacing": "linspace", **guidance}
    assert forwards_per_clip(1000, settings) == sum(branches)
    assert forwards_per_clip(1000, {**settings, "steps": 0}) == 0

    # Both branches see the guide.
    cond = model.encode_contexts(*contexts(), guide)
    uncond = model.encode_contexts(*map(torch.zeros_like, contexts()), guide)
    for state, number in zip(states, branches, strict=True):
        v_cond = model.denoise(state["x_t"], state["t"], cond)
        v_uncond = model.denoise(state["x_t"], state["t"], uncond)
        assert (v_cond - v_uncond).abs().max() > 0.01
        weight = scale if number == 2 or scale == 0 else 1
        torch.testing.assert_close(state["v"], v_uncond + weight * (v_cond - v_uncond))


@pytest.mark.parametrize("x0_range", [(-1.0, 1.0), (-0.2, 3.0)])
def test_clipping_bounds_every_clean_prediction_and_derives_eps_again(x0_range):
    wild = SmallModel(gain=5.0)
    middle, states = sample(wild, x0_range=x0_range)
    assert (middle.min(), middle.max()) == x0_range
    for now, after in zip(states, states[1:], strict=False):
        free = SCHEDULE.x0_from_v(now["x_t"], now["v"], now["t"])
        close(now["x0_hat"], free.clamp(*x0_range))
        # The next x_t is x0_hat with the eps that leads from x0_hat to this x_t.
        eps = SCHEDULE.eps_from_x0(now["x_t"], now["x0_hat"], now["t"])
        close(after["x_t"], SCHEDULE.add_noise(now["x0_hat"], eps, after["t"]))
    unbounded, _ = sample(wild, x0_range=x0_range, clip_x0=False)
    assert unbounded.abs().max() > 3


def test_dynamic_threshold_scales_each_clip_by_its_own_percentile():
    x0 = torch.linspace(-3, 3, 2000).view(1, 1, 1, 40, 50)
    tame = x0 / 6  # within [-1, 1] already
    result = dynamic_thresholding(torch.cat([x0, tame]))
    bound = x0.abs().flatten().quantile(0.995).item()
    # The percentile is taken by rank, among 1,000 magnitudes 0.003 apart.
    torch.testing.assert_close(result[:1], x0.clamp(-bound, bound) / bound, rtol=0, atol=0.002)
    torch.testing.assert_close(result[1:], tame)
    # In the sampler it stands in place of clipping.
    _, states = sample(SmallModel(gain=5.0), dynamic_threshold=True)
    for state in states:
        free = SCHEDULE.x0_from_v(state["x_t"], state["v"], state["t"])
        close(state["x0_hat"], dynamic_thresholding(free))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("num_middle", {"num_middle": 0}),
        ("--steps", {"steps": 1001}),
        ("--eta", {"eta": 1.5}),
        ("--spacing", {"spacing": "even"}),
        ("--guidance_interval", {"guidance_interval": (0.6, 0.2)}),
        ("generator", {"generator": generators(1)}),
        ("end_context", {"ends": (contexts(2)[0], contexts(3)[1])}),
    ],
)
def test_wrong_arguments_are_refused_by_name(name, change):
    with pytest.raises(ValueError, match=name):
        sample(**change)
