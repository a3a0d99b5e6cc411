"""Noise schedule tables and the algebra between x0, eps, v and x_t: every square root is here."""

import math

import torch
from torch import Tensor

SCHEDULES = ("cosine", "linear")


def cosine_betas(timesteps: int, offset: float = 0.008) -> Tensor:
    """Betas whose cumulative product follows a squared cosine, [timesteps] in [1e-5, 0.999].

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; the offset keeps the first steps
    from vanishing.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(1e-5, 0.999)


def linear_betas(timesteps: int) -> Tensor:
    """Betas rising evenly from 1e-4 to 0.02, [timesteps] float64.

    Source: Ho et al. 2020, arXiv:2006.11239.
    """
    return torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)


class DiffusionSchedule:
    """The forward process q(x_t | x0) = N(alpha_t * x0, sigma_t^2), alpha_t^2 + sigma_t^2 = 1.

    `alpha_bar` is alpha_t squared, [timesteps] float64, decreasing in (0, 1). In the algebra x0,
    eps, x_t and v are [B,C,M,H,W], and t is one index per clip, [B] long in [0, timesteps);
    a ValueError refuses another shape.

    Source: Ho et al. 2020, arXiv:2006.11239; of the velocity Salimans & Ho 2022, arXiv:2202.00512.
    """

    def __init__(self, timesteps: int = 1000, schedule: str = "cosine"):
        if timesteps < 1:
            raise ValueError(f"timesteps must be at least 1 (got {timesteps})")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} (got {schedule!r})")
        self.timesteps = timesteps
        self.schedule = schedule
        betas = cosine_betas(timesteps) if schedule == "cosine" else linear_betas(timesteps)
        self.alpha_bar = torch.cumprod(1 - betas, dim=0)

    def to(self, device: torch.device | str) -> "DiffusionSchedule":
        """Move the table to a device, so that lookups there need no transfer; returns self."""
        if torch.device(device).type != "mps":  # which has no float64
            self.alpha_bar = self.alpha_bar.to(device)
        return self

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each [B,1,1,1,1] in the dtype and on the device of `like`."""
        if t.shape != like.shape[:1]:
            rule = f"t must hold one index per clip, shape ({like.shape[0]},)"
            raise ValueError(f"{rule} (got {tuple(t.shape)})")
        alpha_bar = self.alpha_bar[t.to(self.alpha_bar.device)]
        alpha_bar = alpha_bar.view(-1, *[1] * (like.dim() - 1))
        return alpha_bar.sqrt().to(like), (1 - alpha_bar).sqrt().to(like)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noisy frames x_t = alpha_t * x0 + sigma_t * eps."""
        alpha_t, sigma_t = self.alpha_sigma(t, x0)
        return alpha_t * x0 + sigma_t * eps

    def v_from(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Velocity v = alpha_t * eps - sigma_t * x0."""
        alpha_t, sigma_t = self.alpha_sigma(t, x0)
        return alpha_t * eps - sigma_t * x0

    def x0_from_v(self, x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        """Clean frames x0 = alpha_t * x_t - sigma_t * v; near [-1, 1] but not clamped."""
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        return alpha_t * x_t - sigma_t * v

    def eps_from_x0(self, x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Noise eps = (x_t - alpha_t * x0) / sigma_t that leads from given clean frames to x_t."""
        alpha_t, sigma_t = self.alpha_sigma(t, x_t)
        return (x_t - alpha_t * x0) / sigma_t
