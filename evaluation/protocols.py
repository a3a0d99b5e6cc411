"""The published protocol that can be followed: MCVD's on BAIR, with its table."""

from collections.abc import Mapping
from typing import Any

# Voleti et al. 2022, arXiv:2205.09853. The first two are required, the rest is compared.
MCVD = {
    "num_frames": 9,
    "endpoint_context": 2,
    "frame_stride": 1,
    "size": 64,
    "color_mode": "rgb",
    "window": "random",
    "trained_frames": 9,
}
# Frames given -> frames generated.
PUBLISHED = (
    ("published, BAIR", "frames", "best of", "PSNR (clip), dB", "SSIM"),
    ("SVG-LP", "18 -> 7", "100", "18.648", "0.846"),
    ("SDVI", "16 -> 7", "100", "19.694", "0.852"),
    ("FSTN", "18 -> 7", "100", "19.908", "0.850"),
    ("SDVI full", "18 -> 7", "100", "21.432", "0.880"),
    ("SepConv", "18 -> 7", "100", "21.615", "0.877"),
    ("MCVD", "4 -> 5", "10", "23.408", "0.914"),
    ("MCVD", "4 -> 5", "100", "25.162", "0.932"),
)


def notes(settings: Mapping[str, Any], clips: int) -> list[str]:
    """What the reader of a table must know, such as how it differs from published rows.

    Args:
        settings: of the evaluation, as its results keep them.
        clips: number of clips scored.
    """
    names = ("num_frames", "endpoint_context", "size", "protocol", "split", "data_root")
    found = [
        f"{clips} clips: {', '.join(f'{name} {settings[name]}' for name in names)}",
        "only generated frames are scored; [low, high]: 95 % bootstrap interval over clips",
        "PSNR - first row: mean of the differences per clip; metrics.json has every score's",
    ]
    if settings["protocol"] == "mcvd":
        for name, value in MCVD.items():
            if settings[name] not in (value, None):
                found.append(f"{name} is {settings[name]}, not {value} as published")
        found += [
            "published: 256 clips of BAIR's test set, the best of 10 or of 100 samples",
            "as in MCVD's code, PSNR (clip) is taken before rounding, and SSIM on luma",
            "random windows follow our seed; MCVD's follow its own loader",
            "8-bit values are rounded; MCVD truncates them for SSIM and LPIPS",
            "the published digits were entered from notes: compare before citing them",
        ]
    return found
