"""Randomness keyed by purpose, as (seed, SAMPLE, clip, sample): resuming, batching and workers change no draw."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

# Purposes under which one user seed is split, so that no two of them ever share a stream.
INIT, TRAIN, VALIDATION, PREVIEW, SAMPLE, SHAPE = range(6)


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
    shape: Sequence[int], generators: Sequence[torch.Generator], device: torch.device | str, noise_offset: float = 0.0
) -> Tensor:
    """Gaussian noise [B,C,M,H,W] float32 on `device`, each clip's, of shape (C,M,H,W), from its own generator.

    noise_offset is the standard deviation of a constant added per clip and channel; 0 = none.
    """
    clips = []
    for generator in generators:
        eps = torch.randn(tuple(shape), generator=generator, device=generator.device)
        if noise_offset:
            eps += noise_offset * torch.randn(shape[0], 1, 1, 1, generator=generator, device=generator.device)
        clips.append(eps)
    return torch.stack(clips).to(device)
