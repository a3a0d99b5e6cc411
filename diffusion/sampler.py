"""The one sampling loop: from noise to middle frames, by DDIM or DPM-Solver++(2M), with classifier-free guidance."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion.noise import WHITE, NoiseConfig, generators_per_clip, sample_noise
from diffusion.schedule import DiffusionSchedule

THRESHOLD_QUANTILE = 0.995  # of |x0|, as in the reference design; Imagen only says a high percentile
SAMPLERS = ("ddim", "dpmpp_2m")
SPACINGS = ("linspace", "quadratic", "trailing")


class Denoiser(Protocol):
    """All that the sampler knows of a network."""

    def encode_contexts(self, start_context: Tensor, end_context: Tensor) -> Any:
        """Features of both contexts, whatever `denoise` wants, batch first."""

    def denoise(self, x_t: Tensor, t: Tensor, features: Any) -> Tensor:
        """Velocity of x_t, same shape."""


def visited_timesteps(timesteps: int, steps: int, spacing: str = "linspace") -> list[int]:
    """The indices that a sampler visits, falling from timesteps - 1; ValueError unless steps and spacing fit.

    "linspace" = evenly, down to 0; "quadratic" = down to 0, the closer together the nearer to clean; "trailing" =
    evenly, ending one stride above clean, so that the last step is as long as the others.

    Source: Song et al. 2020, arXiv:2010.02502, appendix D.2 (quadratic); Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps must lie in [1, {timesteps}], the length of the noise schedule (got {steps})")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing must be one of {', '.join(SPACINGS)} (got {spacing})")
    last = timesteps / steps - 1 if spacing == "trailing" else 0
    visited = torch.linspace(timesteps - 1, last, steps, dtype=torch.float64)
    if spacing == "quadratic":
        # where squares lie closer than whole numbers, the numbers themselves keep the timesteps apart
        visited = torch.maximum((visited**2 / max(1, timesteps - 1)).round(), torch.arange(steps - 1, -1, -1))
    return visited.round().long().tolist()


def check_sampler(
    timesteps: int, *, sampler: str, steps: int, spacing: str, guidance_interval: tuple[float, float], eta: float
) -> None:
    """Refuse settings that no sampler or schedule takes: ValueError, naming the argument, the rule and the value."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)} (got {sampler})")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie in [0, 1] (got {eta})")
    if sampler == "dpmpp_2m" and eta > 0:
        raise ValueError(f"eta must be 0 with sampler dpmpp_2m, which adds no noise (got {eta})")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be two rising numbers in [0, 1] (got {low} {high})")
    visited_timesteps(timesteps, steps, spacing)


def is_guided(t: int, timesteps: int, guidance_scale: float, guidance_interval: tuple[float, float]) -> bool:
    """Whether both branches run at index t: the scale asks for it, and t / (timesteps - 1) lies in the interval.

    Source: Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """
    low, high = guidance_interval
    return guidance_scale not in (0, 1) and low <= t / max(1, timesteps - 1) <= high


def guided_denoiser(
    model: Denoiser, start_context: Tensor, end_context: Tensor, guidance_scale: float, guided: Sequence[bool]
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """The velocity as a function of (x_t, t, whether this step is guided): contexts are encoded once, here.

    A guided step runs both branches in one forward; another runs the conditional one, or the unconditional one if the
    scale is 0. `guided` has an entry for each step to come; what none of them needs is not encoded.

    Source: Ho & Salimans 2022, arXiv:2207.12598.
    """
    blank = torch.zeros_like(start_context)
    single = both = None
    if not all(guided):
        single = model.encode_contexts(*((start_context, end_context) if guidance_scale else (blank, blank)))
    if any(guided):
        both = model.encode_contexts(torch.cat([blank, start_context]), torch.cat([blank, end_context]))

    def denoise(x_t: Tensor, t: Tensor, guide: bool) -> Tensor:
        if not guide:
            return model.denoise(x_t, t, single).float()
        v = model.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both).float()  # [2B,C,M,H,W]
        v_uncond, v_cond = v.chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    return denoise


def dynamic_thresholding(x0: Tensor) -> Tensor:
    """Each clip clamped to the 99.5th percentile of its own |x0|, where that exceeds 1, and scaled back into [-1, 1].

    Source: Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    """
    magnitude = x0.abs().flatten(1)  # [B, C*M*H*W]
    rank = max(1, round(THRESHOLD_QUANTILE * magnitude.shape[1]))
    bound = magnitude.kthvalue(rank, dim=1).values.clamp(min=1).view(-1, 1, 1, 1, 1)
    return x0.clamp(-bound, bound) / bound


def ddim_step(
    x0_hat: Tensor, eps_hat: Tensor, alpha_bar: float, alpha_bar_prev: float, eta: float, draw_eps: Callable[[], Tensor]
) -> Tensor:
    """One DDIM update to the next noise level, where alpha_bar_prev = 1 is clean; noise is drawn only if eta > 0.

    Source: Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16.
    """
    if alpha_bar_prev == 1:
        return x0_hat
    ddim_sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)) ** 0.5
    x_prev = alpha_bar_prev**0.5 * x0_hat + max(1 - alpha_bar_prev - ddim_sigma**2, 0.0) ** 0.5 * eps_hat
    return x_prev + ddim_sigma * draw_eps() if ddim_sigma > 0 else x_prev


def extrapolated_x0(x0_hat: Tensor, x0_before: Tensor, levels: Sequence[float]) -> Tensor:
    """The clean prediction half a step ahead, on a line in log-SNR through this one and that of one step earlier.

    A DDIM step with it is DPM-Solver++(2M)'s. `levels` are alpha_bar one step earlier, now and one step ahead, below 1.

    Source: Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    before, now, ahead = (0.5 * math.log(level / (1 - level)) for level in levels)  # log(alpha_t / sigma_t)
    return x0_hat + (ahead - now) / (2 * (now - before)) * (x0_hat - x0_before)


@torch.no_grad()
def sample_middle(
    model: Denoiser,  # in eval mode
    schedule: DiffusionSchedule,  # that it was trained with
    start_context: Tensor,  # [B,C,K,H,W] in [-1, 1]
    end_context: Tensor,  # [B,C,K,H,W] in [-1, 1]
    *,
    num_middle: int,  # frames to generate, M >= 1
    channels: int | None = None,  # of a frame; None = those of the contexts
    sampler: str = "ddim",  # or "dpmpp_2m": second order, deterministic, so that eta must be 0
    steps: int = 40,  # in [1, timesteps]
    spacing: str = "linspace",  # of the timesteps that are visited, see `visited_timesteps`
    guidance_scale: float = 1.0,  # 1 = plain conditional, 0 = unconditional, above 1 = guided, two branches per step
    guidance_interval: tuple[float, float] = (0.0, 1.0),  # guide at these shares of the schedule only, 0 = clean
    eta: float = 0.0,  # 0 = deterministic DDIM .. 1 = DDPM's posterior noise
    clip_x0: bool = True,  # clamp every clean prediction to x0_range and re-derive eps from it
    x0_range: tuple[Tensor | float, Tensor | float] = (-1.0, 1.0),  # lowest and highest x0, numbers or [B,C,M,H,W]
    dynamic_threshold: bool = False,  # scale by a percentile instead of clamping; replaces clip_x0
    noise: NoiseConfig = WHITE,  # as in training
    generator: torch.Generator | Sequence[torch.Generator] | None = None,  # one, or one per clip; None = torch's global
    callback: Callable[..., None] | None = None,  # called at every step with i, t, x_t, v (guided), x0_hat (clipped)
) -> Tensor:
    """Draw middle frames given both contexts: [B,C,M,H,W] float32, within x0_range unless clip_x0 is off.

    A clip has its own noise, so its result is independent of the batch it is in. ValueError for contexts of different
    shapes or an argument out of its range.
    """
    if start_context.dim() != 5 or start_context.shape != end_context.shape:
        got = f"{tuple(start_context.shape)} and {tuple(end_context.shape)}"
        raise ValueError(f"start_context and end_context must be [B,C,K,H,W] of one shape (got {got})")
    if num_middle < 1:
        raise ValueError(f"num_middle must be at least 1 (got {num_middle})")
    spaced = {"sampler": sampler, "steps": steps, "spacing": spacing}
    check_sampler(schedule.timesteps, **spaced, guidance_interval=guidance_interval, eta=eta)

    # Plan the steps and encode the contexts.
    visited = visited_timesteps(schedule.timesteps, steps, spacing)
    levels = [*schedule.alpha_bar[visited].tolist(), 1.0]  # alpha_bar before each step and, clean, after the last
    guided = [is_guided(t, schedule.timesteps, guidance_scale, guidance_interval) for t in visited]
    b, c, _, h, w = start_context.shape
    device = start_context.device
    draw_eps = partial(sample_noise, (channels or c, num_middle, h, w), generators_per_clip(generator, b), device)
    draw_more_eps = partial(draw_eps, noise._replace(offset=0.0))
    denoise = guided_denoiser(model, start_context, end_context, guidance_scale, guided)

    # Denoise step by step.
    x_t = draw_eps(noise)  # [B,C,M,H,W]
    x0_before = None
    for i, t_now in enumerate(visited):
        t = torch.full((b,), t_now, device=device)
        v = denoise(x_t, t, guided[i])
        x0_hat = schedule.x0_from_v(x_t, v, t)
        if dynamic_threshold:
            x0_hat = dynamic_thresholding(x0_hat)
        elif clip_x0:
            x0_hat = x0_hat.clamp(*x0_range)
        if callback is not None:
            callback(i=i, t=t, x_t=x_t, v=v, x0_hat=x0_hat)
        second_order = sampler == "dpmpp_2m" and 0 < i < steps - 1
        x0_used = extrapolated_x0(x0_hat, x0_before, levels[i - 1 : i + 2]) if second_order else x0_hat
        eps_hat = schedule.eps_from_x0(x_t, x0_used, t)
        x_t = ddim_step(x0_used, eps_hat, levels[i], levels[i + 1], eta, draw_more_eps)
        x0_before = x0_hat
    return x_t
