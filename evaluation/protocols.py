"""How a table was taken, item by item: the native protocol, and the published one with its published rows."""

from collections.abc import Collection
from typing import Any

PROTOCOLS = ("native", "mcvd")

# The interpolation table of MCVD (Voleti et al. 2022, arXiv:2205.09853), BAIR 64x64, entered from notes.
COLUMNS = ("method", "frames", "best_of", "psnr", "ssim")  # frames given -> generated, best of so many samples, dB
ROWS = (
    ("SVG-LP", "18 -> 7", 100, 18.648, 0.846),
    ("SDVI", "16 -> 7", 100, 19.694, 0.852),
    ("FSTN", "18 -> 7", 100, 19.908, 0.850),
    ("SDVI full", "18 -> 7", 100, 21.432, 0.880),
    ("SepConv", "18 -> 7", 100, 21.615, 0.877),
    ("MCVD", "4 -> 5", 10, 23.408, 0.914),
    ("MCVD", "4 -> 5", 100, 25.162, 0.932),
)
PUBLISHED = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
MCVD = {"num_frames": 9, "endpoint_context": 2, "frame_stride": 1, "size": 64, "color_mode": "rgb"}
MCVD_CLIPS = 256

NATIVE_RULES = {
    "psnr": "PSNR: mean over frames of each frame's dB on 8-bit values",
    "psnr_clip": "PSNR (clip): dB of the error averaged over the clip's frames, on 8-bit values",
    "ssim": "SSIM: 8-bit values, Gaussian weights of deviation 1.5, mean over colour channels, borders left out",
    "lpips": "LPIPS: AlexNet v0.1, frames resized to 128 pixels",
    "temporal_l1": "temporal error: mean |frame difference - true one|, observed neighbours included, of a range of 1",
    "static_l1": "static error: mean |error| where the true clip, ends included, changes by less than 4 of 255 levels",
    "sharpness": "sharpness: energy of differences between neighbouring pixels over the truth's; 1 is as sharp",
    "diversity": "diversity: mean |difference| between pairs of samples, of a range of 1",
    "fvd": "FVD: whole clips (observed frames included), I3D logits, frames at 224 pixels, mean over samples",
}
MCVD_RULES = NATIVE_RULES | {
    "psnr_clip": "PSNR (clip), the published one: dB of the error averaged over the clip, before rounding to 8 bits",
    "ssim": "SSIM: 8-bit luma, Gaussian weights of deviation 1.5, borders left out",
}


def rules(protocol: str, scores: Collection[str]) -> list[str]:
    """What the columns of a table with these scores mean; "versus_first" is the difference from the first row."""
    meanings = MCVD_RULES if protocol == "mcvd" else NATIVE_RULES
    lines = [meaning for name, meaning in meanings.items() if name in scores]
    if "versus_first" in scores:
        lines.append("PSNR - first row: mean of the differences per clip; metrics.json has those of every score")
    return [*lines, "only generated frames are scored; [low, high]: 95 % bootstrap interval over clips"]


def differences_from_mcvd(settings: dict[str, Any], clips: int) -> list[str]:
    """What still differs from how the published rows were taken, so that nobody has to guess.

    `settings` has the names of `MCVD`, num_samples, window, data_root, and trained_frames: T in training, if any.
    """
    found = [f"{name} is {settings[name]}, not {value}" for name, value in MCVD.items() if settings[name] != value]
    if clips != MCVD_CLIPS:
        found.append(f"{clips} clips, not the {MCVD_CLIPS} of BAIR's test set")
    found.append(f"the clips are those of {settings['data_root']}; the published ones are BAIR's test set, raw frames")
    if settings["num_samples"] not in (10, 100):
        found.append(f"{settings['num_samples']} samples per clip, where the published rows take 10 and 100")
    random = "random windows of our own seed; MCVD's are those of its own loader, seed 1234"
    found.append(random if settings["window"] == "random" else f"windows are {settings['window']}, not random")
    if settings["trained_frames"] not in (None, MCVD["num_frames"]):
        found.append(f"the model was trained on clips of {settings['trained_frames']} frames, not 9")
    return [
        *found,
        "FVD, if any, is of 9 frames; MCVD's code takes it from 10 on and prints none for this task",
        "the published digits were entered from notes: compare with the paper before citing them",
        "8-bit values are rounded; MCVD's conversion to pictures truncates them (SSIM and LPIPS)",
    ]
