"""Randomness keyed by purpose, as (seed, SAMPLE, clip, sample): resuming, batching and workers change no draw.

And what noise is like: white, or with what neighbours have in common.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Purposes under which one user seed is split, so that no two of them ever share a stream.
INIT, TRAIN, VALIDATION, PREVIEW, SAMPLE, SHAPE = range(6)


class NoiseConfig(NamedTuple):
    """What noise is like; the default is white. Each value has the variance 1, beside the constant of `offset`."""

    # deviation of a constant added per clip and channel; 0 = none
    offset: float = 0.0
    # in [0, 1), of neighbours in time, height and width (n apart, its n-th power), and of any two colours; 0 = white
    correlation: float = 0.0


WHITE = NoiseConfig()


@lru_cache(maxsize=64)
def correlation_factor(size: int, correlation: float, fading: bool, device: torch.device) -> Tensor:
    """A matrix [size,size] that turns white noise into noise of that correlation: its square root, float32.

    `fading` with the distance, or the same between any two. Kept on the device, so that no later call waits for it.
    """
    distance = (torch.arange(size)[:, None] - torch.arange(size)).abs().clamp(max=size if fading else 1)
    return torch.linalg.cholesky(torch.tensor(correlation, dtype=torch.float64) ** distance).float().to(device)


def correlated(eps: Tensor, correlation: float) -> Tensor:
    """White noise [...,C,M,H,W] with what neighbours have in common, see NoiseConfig; 0 = as it is."""
    with torch.autocast(eps.device.type, enabled=False):  # of samplers, which run under it
        for axis in range(-4, 0) if correlation else ():
            factor = correlation_factor(eps.shape[axis], correlation, axis > -4, eps.device)
            eps = torch.tensordot(eps, factor, dims=([axis], [1])).movedim(-1, axis)
    return eps.contiguous()


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the integers of `key`, on `device`; equal keys give equal streams."""
    digest = hashlib.blake2b(",".join(str(int(k)) for k in key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def generators_per_clip(
    generator: torch.Generator | Sequence[torch.Generator] | None, clips: int
) -> list[torch.Generator]:
    """One generator per clip: those given (ValueError for another number), or new ones on the CPU.

    New ones are seeded in order from the one given, or from torch's global one, so that two batches of two draw what
    one batch of four would.
    """
    if isinstance(generator, Sequence):
        if len(generator) != clips:
            raise ValueError(f"generator must be one per clip ({clips}) or a single one (got {len(generator)})")
        return list(generator)
    device = generator.device if generator is not None else "cpu"
    seeds = [torch.randint(2**62, (), generator=generator, device=device).item() for _ in range(clips)]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample_noise(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str,
    config: NoiseConfig = WHITE,
) -> Tensor:
    """Gaussian noise [B,C,M,H,W] float32 on `device`, each clip's, of shape (C,M,H,W), from its own generator."""
    clips = []
    for generator in generators:
        eps = torch.randn(tuple(shape), generator=generator, device=generator.device)
        eps = correlated(eps, config.correlation)
        if config.offset:
            eps += config.offset * torch.randn(shape[0], 1, 1, 1, generator=generator, device=generator.device)
        clips.append(eps)
    return torch.stack(clips).to(device)
