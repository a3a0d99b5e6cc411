"""The sampler against closed forms and against diffusers, as whole trajectories."""

import pytest
import torch
from torch import nn

from diffusion.pipeline import forwards_per_clip
from diffusion.sampler import SPACINGS, dynamic_thresholding, sample_middle, visited_timesteps
from diffusion.schedule import DiffusionSchedule

SCHEDULE = DiffusionSchedule()
ORACLE = {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}  # diffusers' words for it


class CountingModel:
    """A small fixed network of x_t, t and the contexts that counts what it is asked."""

    def __init__(self):
        torch.manual_seed(0)
        self.conv = nn.Conv3d(3, 3, 3, padding=1)
        self.encoded, self.forwards = 0, []

    def encode_contexts(self, start_context, end_context):
        self.encoded += 1
        return start_context.mean((2, 3, 4)) - 0.5 * end_context.mean((2, 3, 4))  # [B,C]

    def denoise(self, x_t, t, features):
        self.forwards.append(len(x_t))
        with torch.no_grad():
            y = self.conv(x_t).tanh() + features[:, :, None, None, None]
        return y * (1 + t.float() / 1000).view(-1, 1, 1, 1, 1)


class ExactModel:
    """The exact velocity when every pixel of x0 is N(mean, std^2); std 0 is a point mass."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def encode_contexts(self, start_context, end_context):
        return None

    def denoise(self, x_t, t, features):
        alpha_t, sigma_t = SCHEDULE.alpha_sigma(t, x_t.double())
        gain = alpha_t * self.std**2 / (alpha_t**2 * self.std**2 + sigma_t**2)
        x0 = self.mean + gain * (x_t - alpha_t * self.mean)
        return (alpha_t * x_t - x0) / sigma_t  # v such that alpha_t x_t - sigma_t v = x0


def contexts(b=2, seed=0, size=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(b, 3, 2, size, size, generator=generator) * 2 - 1 for _ in range(2)]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(model=None, ends=None, **changes):
    """The middle that `sample_middle` draws, and the state that its callback saw at every step."""
    states, settings = [], {"num_middle": 2, "generator": generators(5, 6)}
    settings |= {"callback": lambda **state: states.append(state)} | changes
    return sample_middle(model or CountingModel(), SCHEDULE, *(ends or contexts()), **settings), states


def test_linspace_runs_evenly_from_full_noise_to_the_first_index():
    assert visited_timesteps(1000, 1) == [999]
    assert visited_timesteps(1000, 5) == [999, 749, 500, 250, 0]
    assert visited_timesteps(7, 7) == [6, 5, 4, 3, 2, 1, 0]


def test_quadratic_roots_run_evenly():
    visited = visited_timesteps(1000, 8, "quadratic")
    assert visited == [999, 734, 510, 326, 183, 82, 20, 0]
    roots = torch.tensor(visited).double().sqrt()
    # a timestep is rounded by 0.5, its root then by 0.25 over the root; the smallest here is 4.5
    torch.testing.assert_close(roots, torch.linspace(999**0.5, 0, 8).double(), rtol=0, atol=0.06)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_visits_distinct_falling_timesteps_from_full_noise(spacing):
    for steps in (1, 2, 40, 333, 1000):
        visited = visited_timesteps(1000, steps, spacing)
        assert visited[0] == 999 and len(set(visited)) == steps and visited == sorted(visited, reverse=True)
    assert visited_timesteps(1000, 1000, spacing) == list(range(999, -1, -1))
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=r"steps must lie in \[1, 1000\]"):
            visited_timesteps(1000, steps, spacing)


def test_spacings_are_those_that_diffusers_calls_by_these_names():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle: pip install -r requirements-dev.txt")
    for spacing in ("linspace", "trailing"):
        for steps in (5, 8, 10, 40, 100):
            oracle = diffusers.DDIMScheduler(1000, timestep_spacing=spacing)
            oracle.set_timesteps(steps)
            assert visited_timesteps(1000, steps, spacing) == oracle.timesteps.tolist()


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_returns_a_point_mass_exactly(clip_x0, eta):
    middle, _ = sample(ExactModel(0.3, 0.0), num_middle=3, steps=20, eta=eta, clip_x0=clip_x0)
    # the last clean prediction is returned as it is; float32 rounding of values near 1
    torch.testing.assert_close(middle, torch.full_like(middle, 0.3), rtol=0, atol=1e-6)


def gaussian_ddim_std(std, steps):
    """Standard deviation after DDIM with the exact denoiser of N(., std^2): every step scales it, in closed form."""
    visited = visited_timesteps(1000, steps)
    result = 1.0
    for t, t_prev in zip(visited, [*visited[1:], -1], strict=True):
        a, p = SCHEDULE.alpha_bar[t].item(), SCHEDULE.alpha_bar[t_prev].item() if t_prev >= 0 else 1.0
        gain = a**0.5 * std**2 / (a * std**2 + 1 - a)
        result *= p**0.5 * gain + (1 - p) ** 0.5 * (1 - a**0.5 * gain) / (1 - a) ** 0.5
    return result


@pytest.mark.parametrize(("steps", "published"), [(10, 0.42), (40, 0.48), (250, 0.497)])
def test_ddim_contracts_a_gaussian_as_its_closed_form_says(steps, published):
    settings = {"num_middle": 4, "clip_x0": False, "generator": torch.Generator().manual_seed(0)}
    middle, _ = sample(ExactModel(0.3, 0.5), contexts(4, size=32), steps=steps, **settings)
    expected = gaussian_ddim_std(0.5, steps)
    assert expected == pytest.approx(published, abs=2e-3)
    # 49,152 samples: standard errors 0.0023 of the mean and 0.0016 of the deviation; three of each
    assert middle.mean().item() == pytest.approx(0.3, abs=0.007)
    assert middle.std().item() == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [7, 40])
def test_whole_trajectory_agrees_with_diffusers(steps, eta):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle: pip install -r requirements-dev.txt")
    oracle = diffusers.DDIMScheduler(1000, **ORACLE, clip_sample=False, set_alpha_to_one=True)
    # its betas are those of our cosine; the lowest bound of 1e-5 is never reached
    torch.testing.assert_close(oracle.alphas_cumprod.double(), SCHEDULE.alpha_bar, rtol=1e-3, atol=1e-6)
    # at eta 1 it subtracts nearly equal numbers, which a float32 table would round to 0.1 %
    oracle.alphas_cumprod = SCHEDULE.alpha_bar
    model, (start, end) = CountingModel(), contexts()
    middle, trajectory = sample(model, (start, end), num_middle=4, steps=steps, eta=eta, clip_x0=False)

    noise = generators(5, 6)  # the same streams, drawn per clip as the sampler does
    draw = lambda: torch.stack([torch.randn(3, 4, 8, 8, generator=g) for g in noise])  # noqa: E731
    x = draw()
    features = model.encode_contexts(start, end)
    visited = visited_timesteps(1000, steps)
    for state, t, t_prev in zip(trajectory, visited, [*visited[1:], -1], strict=True):
        # float32 rounding of values up to about 4, accumulated over the steps
        torch.testing.assert_close(state["x_t"], x, rtol=1e-4, atol=1e-4)
        assert (state["t"] == t).all()
        oracle.num_inference_steps = 1  # its previous index is t - (training steps // inference steps)
        oracle.register_to_config(num_train_timesteps=t - t_prev)
        v = model.denoise(x, torch.full((2,), t), features)
        result = oracle.step(v, t, x, eta=eta, variance_noise=draw() if eta and t_prev >= 0 else torch.zeros_like(x))
        x = result.prev_sample if t_prev >= 0 else result.pred_original_sample
        torch.testing.assert_close(state["x0_hat"], result.pred_original_sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(middle, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [7, 40])
def test_dpm_solver_trajectory_agrees_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle: pip install -r requirements-dev.txt")
    rules = {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False}
    oracle = diffusers.DPMSolverMultistepScheduler(1000, **ORACLE, **rules, final_sigmas_type="zero")
    visited = visited_timesteps(1000, steps)
    oracle.set_timesteps(timesteps=visited)
    # its table of sigma / alpha, in float64 as ours, with the clean end
    level = SCHEDULE.alpha_bar[visited]
    oracle.sigmas = torch.cat([((1 - level) / level).sqrt(), torch.zeros(1, dtype=torch.float64)])
    model = CountingModel()
    middle, trajectory = sample(model, num_middle=4, sampler="dpmpp_2m", steps=steps, clip_x0=False)
    x = trajectory[0]["x_t"]
    features = model.encode_contexts(*contexts())
    for state, t in zip(trajectory, visited, strict=True):
        # float32 rounding of values up to about 4, accumulated over the steps
        torch.testing.assert_close(state["x_t"], x, rtol=1e-4, atol=1e-4)
        x = oracle.step(model.denoise(x, torch.full((2,), t), features), t, x).prev_sample
    torch.testing.assert_close(middle, x, rtol=1e-4, atol=1e-4)


def gaussian_error(sampler, steps):
    """How far off the deviation of an exactly denoised N(0.3, 0.5^2) is: the slope from noise to frames, less 0.5."""
    settings = {"num_middle": 4, "clip_x0": False, "generator": generators(1)}
    middle, states = sample(ExactModel(0.3, 0.5), contexts(1), sampler=sampler, steps=steps, **settings)
    x_t = states[0]["x_t"]
    slope = ((middle - middle.mean()) * (x_t - x_t.mean())).sum() / (x_t - x_t.mean()).square().sum()
    return abs(slope.item() - 0.5)


def test_dpm_solver_converges_in_second_order_where_ddim_does_in_first():
    # for a Gaussian the map from noise to frames is linear: an error of order p falls by 2^p where steps double
    ddim, dpm = ([gaussian_error(sampler, steps) for steps in (50, 100, 200)] for sampler in ("ddim", "dpmpp_2m"))
    for coarse, fine in zip(ddim, ddim[1:], strict=False):
        assert 1.8 < coarse / fine < 2.2
    for coarse, fine in zip(dpm, dpm[1:], strict=False):
        assert 3.5 < coarse / fine < 5
    assert dpm[2] < ddim[2] / 5


def test_contexts_are_encoded_once_and_plain_conditional_sampling_runs_one_branch():
    for guidance_scale, batch in ((1.0, 2), (0.0, 2), (1.8, 4)):
        model = CountingModel()
        sample(model, steps=6, guidance_scale=guidance_scale, generator=None)
        assert model.encoded == 1
        assert model.forwards == [batch] * 6


def test_guidance_extrapolates_from_the_unconditional_velocity():
    v_0, v_1, v_guided = (sample(steps=1, guidance_scale=scale)[1][0]["v"] for scale in (0.0, 1.0, 2.5))
    torch.testing.assert_close(v_guided, v_0 + 2.5 * (v_1 - v_0))
    blank, states = sample(ends=[torch.zeros_like(context) for context in contexts()], steps=1)
    assert blank.shape == (2, 3, 2, 8, 8)
    torch.testing.assert_close(states[0]["v"], v_0)  # the unconditional branch is the one of zero contexts


def test_outside_the_guidance_interval_one_branch_runs_with_the_result_of_scale_one():
    def run(guidance_scale, interval):
        model, guidance = CountingModel(), {"guidance_scale": guidance_scale, "guidance_interval": interval}
        _, states = sample(model, steps=5, **guidance)
        nfe = forwards_per_clip(1000, {"steps": 5, "spacing": "linspace", **guidance})
        assert sum(model.forwards) == 2 * nfe  # two clips
        return [state["v"] for state in states], model.forwards

    plain, _ = run(1.0, (0.0, 1.0))
    always, both = run(1.8, (0.0, 1.0))
    assert both == [4] * 5
    late, forwards = run(1.8, (0.0, 0.5))  # 999, 749, 500 lie above half of 999
    assert forwards == [2, 2, 2, 4, 4]
    for v, v_plain in zip(late[:4], plain[:3], strict=False):
        torch.testing.assert_close(v, v_plain)
    early, forwards = run(1.8, (1.0, 1.0))
    assert forwards == [4, 2, 2, 2, 2]
    torch.testing.assert_close(early[0], always[0])


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_clip_does_not_depend_on_its_batch(eta):
    start, end = contexts(4)
    settings = {"num_middle": 3, "steps": 5, "eta": eta}
    run = lambda rows, noise: sample(ends=(start[rows], end[rows]), generator=noise, **settings)[0]  # noqa: E731
    together = run([0, 1, 2, 3], generators(10, 11, 12, 13))
    for i in range(4):
        # convolutions of another batch size may round differently
        torch.testing.assert_close(run([i], generators(10 + i))[0], together[i], rtol=1e-4, atol=1e-5)
    one, halves = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    whole = run([0, 1, 2, 3], one)
    split = torch.cat([run([0, 1], halves), run([2, 3], halves)])
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole[0], whole[1])


def test_clipping_bounds_every_prediction_and_re_derives_eps():
    class Wild(CountingModel):
        def denoise(self, x_t, t, features):
            return 5 * super().denoise(x_t, t, features)

    middle, states = sample(Wild(), steps=5)
    assert middle.abs().max() <= 1
    for now, after in zip(states, states[1:], strict=False):
        assert now["x0_hat"].abs().max() <= 1
        # at eta 0 the next x_t is the noised x0_hat with the very eps that leads from x0_hat to this x_t
        eps = SCHEDULE.eps_from_x0(now["x_t"], now["x0_hat"], now["t"])
        expected = SCHEDULE.add_noise(now["x0_hat"], eps, after["t"])
        torch.testing.assert_close(after["x_t"], expected, rtol=1e-4, atol=1e-4)
    free, _ = sample(Wild(), steps=5, clip_x0=False)
    assert free.abs().max() > 1


def test_dynamic_threshold_scales_each_clip_by_its_own_percentile():
    x0 = torch.linspace(-3, 3, 2000).view(1, 1, 1, 40, 50)
    tame = x0 / 6  # already within [-1, 1]: left alone
    result = dynamic_thresholding(torch.cat([x0, tame]))
    bound = x0.abs().flatten().quantile(0.995).item()
    # the percentile is taken by rank, one of 1,000 distinct magnitudes 0.003 apart
    torch.testing.assert_close(result[:1], x0.clamp(-bound, bound) / bound, rtol=0, atol=0.002)
    torch.testing.assert_close(result[1:], tame)


WRONG = [
    ({"num_middle": 0}, "^num_middle must be at least 1"),
    ({"steps": 0}, "^steps must lie in"),
    ({"eta": 1.5}, "^eta must lie in"),
    ({"sampler": "euler"}, "^sampler must be one of ddim, dpmpp_2m"),
    ({"sampler": "dpmpp_2m", "eta": 0.5}, "^eta must be 0"),
    ({"spacing": "even"}, "^spacing must be one of linspace, quadratic, trailing"),
    ({"guidance_interval": (0.6, 0.2)}, "^guidance_interval must be two rising numbers"),
    ({"generator": generators(1)}, r"one per clip \(2\)"),
    ({"ends": (contexts()[0], contexts()[1][:, :, :1])}, "of one shape"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_arguments_name_the_rule_and_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        sample(**({"steps": 3} | change))
