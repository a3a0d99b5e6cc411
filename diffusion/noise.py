"""Random numbers keyed by purpose, and noise that is white or correlated between neighbours.

A key such as (seed, SAMPLE, clip, sample) names a stream of its own, so that resuming, batching
and the number of workers change no draw.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# Purposes under which one user seed is split: no two of them share a stream.
INIT, TRAIN, VALIDATION, PREVIEW, SAMPLE, LENGTH = range(6)


class NoiseConfig(NamedTuple):
    """The noise's distribution: variance 1 per value, beside the offset; white by default.

    Attributes:
        offset: deviation of a constant that is added per clip and channel; 0 = none.
        correlation: of neighbours in time, height and width, in [0, 1): its n-th power between
            values n apart, and the same between any two colours; 0 = white.
    """

    offset: float = 0.0
    correlation: float = 0.0


WHITE = NoiseConfig()


def generator_for(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device` seeded by the integers of `key`; equal keys give equal streams."""
    text = ",".join(str(int(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def generators_per_clip(
    generator: torch.Generator | Sequence[torch.Generator] | None, clips: int
) -> list[torch.Generator]:
    """One generator per clip.

    Args:
        generator: one per clip; or one, or None for torch's global one, from which CPU generators
            are seeded in order: two batches of two clips then draw what one batch of four draws.
        clips: how many generators are needed.

    Raises: ValueError: for a sequence of another length.
    """
    if isinstance(generator, Sequence):
        if len(generator) != clips:
            rule = f"generator must be one per clip ({clips}) or a single one"
            raise ValueError(f"{rule} (got {len(generator)})")
        return list(generator)
    device = generator.device if generator is not None else "cpu"
    seeds = [
        torch.randint(2**62, (), generator=generator, device=device).item() for _ in range(clips)
    ]
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@lru_cache(maxsize=64)
def correlation_factor(size: int, correlation: float, fading: bool, device: torch.device) -> Tensor:
    """The Cholesky factor [size,size] of a correlation matrix, float32.

    Args:
        fading: whether correlation falls with the distance, or is the same between any two.
        device: where the factor is kept, so that no later call waits for a transfer.
    """
    index = torch.arange(size)
    distance = (index[:, None] - index).abs().clamp(max=size if fading else 1)
    covariance = torch.tensor(correlation, dtype=torch.float64) ** distance
    return torch.linalg.cholesky(covariance).float().to(device)


def correlated(eps: Tensor, correlation: float) -> Tensor:
    """Correlate white noise [...,C,M,H,W] between neighbours, see NoiseConfig; 0 = as it is."""
    if not correlation:
        return eps.contiguous()
    # Samplers run under autocast, which would round the products.
    with torch.autocast(eps.device.type, enabled=False):
        for axis in (-4, -3, -2, -1):
            is_colour = axis == -4
            factor = correlation_factor(eps.shape[axis], correlation, not is_colour, eps.device)
            eps = torch.tensordot(eps, factor, dims=([axis], [1])).movedim(-1, axis)
    return eps.contiguous()


def sample_noise(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str,
    config: NoiseConfig = WHITE,
) -> Tensor:
    """Draw noise for clips, each from its own generator.

    Args:
        shape: of one clip, (C,M,H,W).
        generators: one per clip, on any device.
        device: of the result.
        config: the noise's distribution.

    Returns: [B,C,M,H,W] float32.
    """
    clips = []
    for generator in generators:
        eps = torch.randn(tuple(shape), generator=generator, device=generator.device)
        eps = correlated(eps, config.correlation)
        if config.offset:
            constant = torch.randn(shape[0], 1, 1, 1, generator=generator, device=generator.device)
            eps += config.offset * constant
        clips.append(eps)
    return torch.stack(clips).to(device)
