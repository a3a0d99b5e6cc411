"""How a table was taken, item by item: the native protocol, and published ones with their rows."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

RULES = {
    "psnr": "PSNR: mean over frames of each frame's dB on 8-bit values",
    "psnr_clip": "PSNR (clip): dB of the error averaged over the clip's frames, on 8-bit values",
    "psnr_middle": "PSNR (middle): of the frame in the middle alone",
    "ssim_middle": "SSIM (middle): likewise",
    "ssim": "SSIM: 8-bit values, Gaussian weights of deviation 1.5, mean over colour channels, borders left out",
    "lpips": "LPIPS: AlexNet v0.1, frames resized to 128 pixels",
    "temporal_l1": "temporal error: mean |frame difference - true one|, observed neighbours included, of a range of 1",
    "static_l1": "static error: mean |error| where the true clip, ends included, changes by less than 4 of 255 levels",
    "sharpness": "sharpness: energy of differences between neighbouring pixels over the truth's; 1 is as sharp",
    "diversity": "diversity: mean |difference| between pairs of samples, of a range of 1",
    "fvd": "FVD: whole clips (observed frames included), I3D logits, frames at 224 pixels, mean over samples",
}


class Protocol(NamedTuple):
    """What a published table fixes, and its rows; the default is our own way, which fixes nothing."""

    settings: Mapping[str, Any] = {}  # of a clip; --T and --endpoint_context may not be others
    window: str = "central"
    num_samples: Sequence[int] = (1,)  # that the published rows take; the first is the default
    rules: Mapping[str, str] = RULES
    like_mcvd: bool = False  # PSNR (clip) before rounding, SSIM on luma
    linear_light: bool = False  # frames are resampled in linear light
    middle_frame: bool = False  # the frame in the middle is scored alone, too
    clips: Sequence[int] = ()  # how many the published rows are of
    source: str = ""  # whose
    rows: Sequence[Mapping[str, Any]] = ()
    remarks: Sequence[str] = ()  # what differs always


def published_rows(columns: Sequence[str], *rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of a published table by its columns."""
    return [dict(zip(columns, row, strict=True)) for row in rows]


# The interpolation table of MCVD (Voleti et al. 2022, arXiv:2205.09853), BAIR 64x64: frames given -> generated, best of
# so many samples.
MCVD = Protocol(
    settings={"num_frames": 9, "endpoint_context": 2, "frame_stride": 1, "size": 64, "color_mode": "rgb"},
    window="random",
    num_samples=(10, 100),
    rules=RULES
    | {
        "psnr_clip": "PSNR (clip), the published one: dB of the error averaged over the clip, not rounded to 8 bits",
        "ssim": "SSIM: 8-bit luma, Gaussian weights of deviation 1.5, borders left out",
    },
    like_mcvd=True,
    clips=(256,),
    source="BAIR's test set, raw frames",
    rows=published_rows(
        ("published, BAIR", "frames", "best of", "PSNR (clip), dB", "SSIM"),
        ("SVG-LP", "18 -> 7", 100, 18.648, 0.846),
        ("SDVI", "16 -> 7", 100, 19.694, 0.852),
        ("FSTN", "18 -> 7", 100, 19.908, 0.850),
        ("SDVI full", "18 -> 7", 100, 21.432, 0.880),
        ("SepConv", "18 -> 7", 100, 21.615, 0.877),
        ("MCVD", "4 -> 5", 10, 23.408, 0.914),
        ("MCVD", "4 -> 5", 100, 25.162, 0.932),
    ),
    remarks=(
        "random windows are of our own seed; MCVD's are those of its own loader, seed 1234",
        "FVD, if any, is of 9 frames; MCVD's code takes it from 10 on and prints none for this task",
        "8-bit values are rounded; MCVD's conversion to pictures truncates them (SSIM and LPIPS)",
    ),
)

# Nine frames, of which the ends are given (Jain et al. 2024, arXiv:2404.01203): its base model, which makes 64x64.
VIDIM = Protocol(
    settings={"num_frames": 9, "endpoint_context": 1, "frame_stride": 1, "size": 64, "color_mode": "rgb"},
    linear_light=True,
    middle_frame=True,
    clips=(357, 400),
    source="nine frames each of DAVIS (357) and of UCF101 (400)",
    rows=published_rows(
        ("published, 64x64", "clips", "PSNR, dB", "SSIM", "LPIPS", "FVD"),
        ("VIDIM's base, 1.6 B parameters", "DAVIS-7", 24.06, 0.699, 0.094, 116.4),
        ("VIDIM's base, 1.6 B parameters", "UCF101-7", 23.04, 0.697, 0.085, 194.6),
    ),
    remarks=(
        "the published model was trained on other and far larger data",
        "settings of the published PSNR, SSIM and LPIPS are not known to us; FID, which it has, is not measured here",
        "no published score of the middle frame alone is known to us at 64x64",
    ),
)
PROTOCOLS = {"native": Protocol(), "mcvd": MCVD, "vidim": VIDIM}


def rules(protocol: Protocol, scores: Collection[str]) -> list[str]:
    """What the columns of a table with these scores mean; "versus_first" is the difference from the first row."""
    lines = [meaning for name, meaning in protocol.rules.items() if name in scores]
    if "versus_first" in scores:
        lines.append("PSNR - first row: mean of the differences per clip; metrics.json has those of every score")
    if protocol.linear_light:
        lines.append("frames of another size: the central part, resampled with antialiasing in linear light")
    return [*lines, "only generated frames are scored; [low, high]: 95 % bootstrap interval over clips"]


def differences(protocol: Protocol, settings: Mapping[str, Any], clips: int) -> list[str]:
    """What still differs from how published rows were taken, so that nobody has to guess.

    `settings` has the names of Protocol.settings, num_samples, window, data_root, and trained_frames: T in training.
    """
    wanted, trained = protocol.settings, settings["trained_frames"]
    found = [f"{name} is {settings[name]}, not {value}" for name, value in wanted.items() if settings[name] != value]
    if clips not in protocol.clips:
        found.append(f"{clips} clips, not {' or '.join(map(str, protocol.clips))}")
    found.append(f"the clips are those of {settings['data_root']}; the published ones are {protocol.source}")
    if settings["num_samples"] not in protocol.num_samples:
        taken = " and ".join(map(str, protocol.num_samples))
        found.append(f"{settings['num_samples']} samples per clip, where the published rows take {taken}")
    if settings["window"] != protocol.window:
        found.append(f"windows are {settings['window']}, not {protocol.window}")
    if trained not in (None, wanted["num_frames"]):
        found.append(f"the model was trained on clips of {trained} frames, not {wanted['num_frames']}")
    return [*found, *protocol.remarks, "the published digits were entered from notes: compare before citing them"]
