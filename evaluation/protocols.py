"""How a table is taken: the native protocol, and MCVD's with its published rows."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Protocol(NamedTuple):
    """What a table fixes; the default, the native protocol, fixes nothing."""

    # num_frames and endpoint_context must be these; the rest is compared.
    clip: Mapping[str, Any] = {}
    window: str = "central"
    num_samples: int = 1
    # PSNR (clip) is taken before rounding to 8 bits, and SSIM on luma.
    like_mcvd: bool = False
    # The published table, its titles first.
    published: Sequence[Sequence[str]] = ()


# Voleti et al. 2022, arXiv:2205.09853: BAIR 64x64, frames given -> generated.
MCVD = Protocol(
    clip={
        "num_frames": 9,
        "endpoint_context": 2,
        "frame_stride": 1,
        "size": 64,
        "color_mode": "rgb",
    },
    window="random",
    num_samples=10,
    like_mcvd=True,
    published=(
        ("published, BAIR", "frames", "best of", "PSNR (clip), dB", "SSIM"),
        ("SVG-LP", "18 -> 7", "100", "18.648", "0.846"),
        ("SDVI", "16 -> 7", "100", "19.694", "0.852"),
        ("FSTN", "18 -> 7", "100", "19.908", "0.850"),
        ("SDVI full", "18 -> 7", "100", "21.432", "0.880"),
        ("SepConv", "18 -> 7", "100", "21.615", "0.877"),
        ("MCVD", "4 -> 5", "10", "23.408", "0.914"),
        ("MCVD", "4 -> 5", "100", "25.162", "0.932"),
    ),
)
PROTOCOLS = {"native": Protocol(), "mcvd": MCVD}


def notes(settings: Mapping[str, Any], clips: int) -> list[str]:
    """What the reader of a table must know, such as how it differs from published rows.

    Args:
        settings: of the evaluation, as its results keep them.
        clips: number of clips scored.
    """
    found = [
        "only generated frames are scored; [low, high]: 95 % bootstrap interval over clips",
        "PSNR - first row: mean of the differences per clip; metrics.json has every score's",
    ]
    if settings["protocol"] == "mcvd":
        for name, value in {**MCVD.clip, "window": "random", "trained_frames": 9}.items():
            if settings[name] not in (value, None):
                found.append(f"{name} is {settings[name]}, not {value} as published")
        found += [
            f"{clips} clips of {settings['data_root']}; published: 256 of BAIR's test set",
            f"{settings['num_samples']} samples for each; published: best of 10 or of 100",
            "as in MCVD's code, PSNR (clip) is taken before rounding, and SSIM on luma",
            "random windows follow our seed; MCVD's follow its own loader",
            "8-bit values are rounded; MCVD truncates them for SSIM and LPIPS",
            "the published digits were entered from notes: compare before citing them",
        ]
    return found
