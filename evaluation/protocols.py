"""The published protocols that can be followed: MCVD's on BAIR and on moving digits."""

from collections.abc import Mapping
from typing import Any

# Voleti et al. 2022, arXiv:2205.09853: what its clips are, and the longest that it generates.
MCVD = {
    "num_frames": 9,
    "endpoint_context": 2,
    "frame_stride": 1,
    "size": 64,
    "color_mode": "rgb",
    "window": "random",
    "trained_frames": 9,
}
SMMNIST = {"endpoint_context": 5, "frame_stride": 1, "size": 64, "color_mode": "gray"}
# Frames given -> frames generated.
TITLES = ("frames", "best of", "PSNR (clip), dB", "SSIM")
PUBLISHED = {}
PUBLISHED["mcvd"] = (
    ("published, BAIR", *TITLES),
    ("SVG-LP", "18 -> 7", "100", "18.648", "0.846"),
    ("SDVI", "16 -> 7", "100", "19.694", "0.852"),
    ("FSTN", "18 -> 7", "100", "19.908", "0.850"),
    ("SDVI full", "18 -> 7", "100", "21.432", "0.880"),
    ("SepConv", "18 -> 7", "100", "21.615", "0.877"),
    ("MCVD", "4 -> 5", "10", "23.408", "0.914"),
    ("MCVD", "4 -> 5", "100", "25.162", "0.932"),
)
PUBLISHED["smmnist"] = (
    ("published, Stochastic Moving MNIST", *TITLES),
    ("SuperSloMo", "18 -> 7", "100", "13.387", "0.749"),
    ("SVG-LP", "18 -> 7", "100", "13.543", "0.741"),
    ("FSTN", "18 -> 7", "100", "14.730", "0.765"),
    ("SepConv", "18 -> 7", "100", "14.759", "0.775"),
    ("SDVI", "16 -> 7", "100", "14.857", "0.782"),
    ("SDVI full", "18 -> 7", "100", "16.025", "0.842"),
    ("MCVD", "10 -> 10", "10", "18.385", "0.802"),
    ("MCVD", "10 -> 10", "100", "20.944", "0.854"),
    ("MCVD", "10 -> 5", "10", "27.693", "0.941"),
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
    if settings["protocol"] == "smmnist":
        found += [
            "published: 256 clips, 5 frames given at each end, the best of 10 or of 100 samples",
            "the clips are drawn by our seed from the published distribution, not the same clips",
            "PSNR (clip) is taken before rounding; SSIM after each pixel is made black or white",
            "the published digits were entered from memory: compare before citing them",
        ]
    return found
