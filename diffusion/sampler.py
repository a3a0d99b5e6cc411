"""The sampling loop: from noise to middle frames by DDIM, with classifier-free guidance."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion.noise import WHITE, NoiseConfig, generators_per_clip, sample_noise
from diffusion.schedule import DiffusionSchedule

# Of |x0|, as in the reference design; the paper only says a high percentile.
THRESHOLD_QUANTILE = 0.995
SPACINGS = ("linspace", "quadratic", "trailing")
REFERENCE_SAMPLER = {
    "steps": 40,
    "spacing": "linspace",
    "guidance_scale": 1.8,
    "guidance_interval": (0.0, 1.0),
    "eta": 0.0,
}
# Of a model that refines a prediction: nearest to the truth by ST-LPIPS of all that cost up to
# 0.8 dB against the prediction (LOG.md).
REFINING_SAMPLER = {
    "steps": 2,
    "spacing": "quadratic",
    "guidance_scale": 1.0,
    "guidance_interval": (0.0, 1.0),
    "eta": 0.0,
}


class Denoiser(Protocol):
    """All that the sampler knows of a network."""

    def encode_contexts(
        self, start_context: Tensor, end_context: Tensor, guide: Tensor | None
    ) -> Any:
        """Features of both contexts, whatever `denoise` takes."""

    def denoise(self, x_t: Tensor, t: Tensor, features: Any) -> Tensor:
        """Velocity of x_t, same shape."""


def visited_timesteps(timesteps: int, steps: int, spacing: str = "linspace") -> list[int]:
    """The diffusion indices that a sampler visits, falling from timesteps - 1.

    "linspace" = evenly, down to 0; "quadratic" = down to 0, closer together towards clean frames;
    "trailing" = evenly, the last step being as long as the others.

    Raises: ValueError: unless steps lie in [1, timesteps], and for another spacing.
    Source: Song et al. 2020, arXiv:2010.02502, appendix D.2 (quadratic); Lin et al. 2023,
        arXiv:2305.08891, table 2 (trailing).
    """
    if not 1 <= steps <= timesteps:
        rule = f"--steps must lie in [1, {timesteps}], the length of the noise schedule"
        raise ValueError(f"{rule} (got {steps})")
    if spacing not in SPACINGS:
        raise ValueError(f"--spacing must be one of {', '.join(SPACINGS)} (got {spacing})")
    last = timesteps / steps - 1 if spacing == "trailing" else 0
    visited = torch.linspace(timesteps - 1, last, steps, dtype=torch.float64)
    if spacing == "quadratic":
        # Where squares lie closer than whole numbers, the numbers keep the timesteps apart.
        squares = (visited**2 / max(1, timesteps - 1)).round()
        visited = torch.maximum(squares, torch.arange(steps - 1, -1, -1))
    return visited.round().long().tolist()


def check_sampler(
    timesteps: int, steps: int, spacing: str, guidance_interval: Sequence[float], eta: float
) -> None:
    """Raises: ValueError: for settings out of range, naming the flag, the rule and the value."""
    visited_timesteps(timesteps, steps, spacing)
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        rule = "--guidance_interval must be two rising numbers in [0, 1]"
        raise ValueError(f"{rule} (got {low} {high})")
    if not 0 <= eta <= 1:
        raise ValueError(f"--eta must lie in [0, 1] (got {eta})")


def is_guided(
    t: int, timesteps: int, guidance_scale: float, guidance_interval: tuple[float, float]
) -> bool:
    """Whether both branches run at index t: the scale needs it and the interval allows it.

    Source: the interval is that of Kynkaanniemi et al. 2024, arXiv:2404.07724.
    """
    low, high = guidance_interval
    return guidance_scale not in (0, 1) and low <= t / max(1, timesteps - 1) <= high


def forwards_per_clip(timesteps: int, settings: Mapping[str, Any]) -> int:
    """NFE of one sample: a network forward per step, two where the step is guided."""
    if settings["steps"] == 0:
        return 0
    visited = visited_timesteps(timesteps, settings["steps"], settings["spacing"])
    scale = settings["guidance_scale"]
    interval = settings["guidance_interval"]
    return len(visited) + sum(is_guided(t, timesteps, scale, interval) for t in visited)


def guided_denoiser(
    model: Denoiser,
    start_context: Tensor,
    end_context: Tensor,
    guide: Tensor | None,
    guidance_scale: float,
    guided: Sequence[bool],
) -> Callable[[Tensor, Tensor, bool], Tensor]:
    """The velocity as a function of (x_t, t, whether this step is guided).

    Contexts are encoded once, here; what no step to come needs is not encoded. A guided step runs
    both branches in one forward; any other step runs the conditional branch, or the unconditional
    one where the scale is 0. Both branches see the guide.

    Source: Ho & Salimans 2022, arXiv:2207.12598.
    """
    blank = torch.zeros_like(start_context)
    if not all(guided):
        ends = (start_context, end_context) if guidance_scale else (blank, blank)
        single = model.encode_contexts(*ends, guide)
    if any(guided):
        both = model.encode_contexts(
            torch.cat([blank, start_context]),
            torch.cat([blank, end_context]),
            None if guide is None else torch.cat([guide, guide]),
        )

    def denoise(x_t: Tensor, t: Tensor, is_guided: bool) -> Tensor:
        if not is_guided:
            return model.denoise(x_t, t, single).float()
        v = model.denoise(torch.cat([x_t, x_t]), torch.cat([t, t]), both)  # [2B,C,M,H,W]
        v_uncond, v_cond = v.float().chunk(2)
        return v_uncond + guidance_scale * (v_cond - v_uncond)

    return denoise


def dynamic_thresholding(x0: Tensor) -> Tensor:
    """Clamp each clip to the 99.5th percentile of its |x0| where above 1, and scale to [-1, 1].

    Source: Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    """
    magnitude = x0.abs().flatten(1)  # [B,C*M*H*W]
    rank = max(1, round(THRESHOLD_QUANTILE * magnitude.shape[1]))
    bound = magnitude.kthvalue(rank, dim=1).values.clamp(min=1).view(-1, 1, 1, 1, 1)
    return x0.clamp(-bound, bound) / bound


def ddim_step(
    x0_hat: Tensor,
    eps_hat: Tensor,
    alpha_bar: float,  # of the present noise level
    alpha_bar_prev: float,  # of the next one, which is less noisy; 1 = clean
    eta: float,
    draw_eps: Callable[[], Tensor],  # is called only if eta > 0
) -> Tensor:
    """One DDIM update to the next noise level.

    Source: Song et al. 2020, arXiv:2010.02502, eqs. 12 and 16.
    """
    if alpha_bar_prev == 1:
        return x0_hat
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)
    ddim_sigma = eta * variance**0.5
    direction = max(1 - alpha_bar_prev - ddim_sigma**2, 0.0) ** 0.5
    x_prev = alpha_bar_prev**0.5 * x0_hat + direction * eps_hat
    return x_prev + ddim_sigma * draw_eps() if ddim_sigma > 0 else x_prev


@torch.no_grad()
def sample_middle(
    model: Denoiser,  # in eval mode
    schedule: DiffusionSchedule,  # that it was trained with
    start_context: Tensor,  # [B,C,K,H,W] in [-1, 1]
    end_context: Tensor,  # the same shape
    *,
    num_middle: int,  # frames M to generate
    guide: Tensor | None = None,  # what the model sees beside each of them, [B,G,M,H,W]
    steps: int = 40,
    spacing: str = "linspace",
    guidance_scale: float = 1.0,  # 1 = conditional, 0 = unconditional, above 1 = guided
    guidance_interval: tuple[float, float] = (0.0, 1.0),  # shares of the schedule, 0 = clean
    eta: float = 0.0,  # 0 = deterministic DDIM .. 1 = DDPM's posterior noise
    clip_x0: bool = True,  # clamp clean predictions to x0_range, and derive eps from them again
    x0_range: tuple[Tensor | float, Tensor | float] = (-1.0, 1.0),
    dynamic_threshold: bool = False,  # scale clean predictions by a percentile instead
    noise: NoiseConfig = WHITE,  # as in training
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    callback: Callable[..., None] | None = None,  # gets i, t, x_t, v and x0_hat of every step
) -> Tensor:
    """Draw middle frames given both contexts.

    A clip has its own noise, so that its result does not depend on the batch that it is in.

    Returns: [B,C,M,H,W] float32, within x0_range if clean predictions are clipped.
    Raises: ValueError: for contexts of different shapes or an argument out of its range.
    """
    if start_context.dim() != 5 or start_context.shape != end_context.shape:
        got = f"{tuple(start_context.shape)} and {tuple(end_context.shape)}"
        raise ValueError(f"start_context and end_context must be [B,C,K,H,W] alike (got {got})")
    if num_middle < 1:
        raise ValueError(f"num_middle must be at least 1 (got {num_middle})")
    check_sampler(schedule.timesteps, steps, spacing, guidance_interval, eta)

    # Plan the steps and encode the contexts.
    visited = visited_timesteps(schedule.timesteps, steps, spacing)
    # alpha_bar before each step and, clean, after the last.
    levels = [*schedule.alpha_bar[visited].tolist(), 1.0]
    guided = [is_guided(t, schedule.timesteps, guidance_scale, guidance_interval) for t in visited]
    denoise = guided_denoiser(model, start_context, end_context, guide, guidance_scale, guided)
    b, c, _, h, w = start_context.shape
    shape = (c, num_middle, h, w)
    device = start_context.device
    generators = generators_per_clip(generator, b)

    def draw_more_eps() -> Tensor:
        # The offset is a constant of the clip, drawn once.
        return sample_noise(shape, generators, device, noise._replace(offset=0.0))

    # Draw all noise ahead, so that no step waits for a transfer.
    x_t = sample_noise(shape, generators, device, noise)  # [B,C,M,H,W]
    more_eps = iter([draw_more_eps() for _ in visited[1:]] if eta > 0 else [])

    # Denoise step by step.
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
        eps_hat = schedule.eps_from_x0(x_t, x0_hat, t)
        x_t = ddim_step(
            x0_hat=x0_hat,
            eps_hat=eps_hat,
            alpha_bar=levels[i],
            alpha_bar_prev=levels[i + 1],
            eta=eta,
            draw_eps=partial(next, more_eps),
        )
    return x_t
