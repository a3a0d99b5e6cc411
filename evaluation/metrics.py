"""Scores of generated middle frames against the true ones, and of samples against each other.

Frames are [B,C,M,H,W] and contexts [B,C,K,H,W], in [-1, 1]. A function scores each clip of a batch:
[B] float64, errors in units of the range from black to white. Only generated frames are scored.
"""

from collections.abc import Container
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import get_dir

from evaluation.st_lpips import BACKBONES, ShiftTolerantLPIPS, st_lpips
from utils.io import file_sha256
from utils.video_utils import (
    PSNR_CEILING,
    as_double,
    frame_psnr,
    join_clip,
    resize,
    to_float,
    to_gray,
    to_uint8,
)

SSIM_WINDOW = 11  # pixels: deviation 1.5, cut at 3.5 deviations
STILL_LEVELS = 4  # of 255; a smaller change is noise of the video
LPIPS_SIZE = 128  # pixels, as in MCVD's code
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"  # its first digits


def alexnet_path() -> Path:
    """Where torchvision looks for the backbone of LPIPS."""
    return Path(get_dir(), "checkpoints", Path(ALEXNET_URL).name)


def has_alexnet() -> bool:
    """Whether it is there and undamaged; torchmetrics would download it."""
    path = alexnet_path()
    return path.is_file() and file_sha256(path).startswith(ALEXNET_SHA256)


def levels(frames: Tensor) -> Tensor:
    """The 8-bit values of the pictures that a viewer gets, as float64."""
    return as_double(to_uint8(frames))


def clip_psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of the error averaged over a clip; frames are not rounded.

    The mean of the frames' PSNR is higher, since the logarithm is concave.
    """
    error = as_double(frames) - as_double(truth)
    mse = error.square().mean((1, 2, 3, 4)) / 4  # of a range of 1
    return (-10 * torch.log10(mse)).clamp(max=PSNR_CEILING)


def ssim(frames: Tensor, truth: Tensor, gray: bool) -> Tensor:
    """Structural similarity of colours, or with `gray` of luma.

    Source: Wang et al. 2004, with scikit-image's settings for it: Gaussian
    weights, biased covariances, 8-bit values, borders left out.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pictures = []
    for clip in (frames, truth):
        picture = to_uint8(clip).transpose(1, 2).flatten(0, 1)  # [B*M,C,H,W]
        pictures.append(as_double(to_gray(picture) if gray else picture))
    _, similarity = structural_similarity_index_measure(
        *pictures,
        sigma=1.5,
        data_range=255.0,
        reduction="none",
        return_full_image=True,
    )
    # torchmetrics pads where the window reaches over the border.
    edge = SSIM_WINDOW // 2
    inner = similarity[..., edge:-edge, edge:-edge]
    return inner.reshape(len(frames), -1).mean(1)


def lpips(network: nn.Module, frames: Tensor, truth: Tensor) -> Tensor:
    """Learned perceptual distance. Source: Zhang et al. 2018, arXiv:1801.03924."""
    pair = []
    for clip in (frames, truth):
        pictures = to_uint8(clip).transpose(1, 2).flatten(0, 1)  # [B*M,C,H,W]
        large = resize(pictures.expand(-1, 3, -1, -1), (LPIPS_SIZE, LPIPS_SIZE))
        pair.append(to_float(large))
    return network(*pair).view(len(frames), -1).mean(1)


def temporal_error(middle: Tensor, truth: Tensor) -> Tensor:
    """Mean absolute error of the differences between neighbouring frames.

    The nearest observed frames are neighbours, so a jump there is an error.
    """
    # Of a difference the error is the difference of errors; observed frames have none.
    error = F.pad(levels(middle) - levels(truth), (0, 0, 0, 0, 1, 1))
    return error.diff(dim=2).abs().mean((1, 2, 3, 4)) / 255


def static_error(middle: Tensor, truth: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Mean absolute error where nothing moves in the true clip, ends included.

    A pixel is still if each of its colours changes by less than STILL_LEVELS;
    a clip without still pixels has no error.
    """
    whole = levels(join_clip(start, truth, end))  # [B,C,T,H,W]
    still = (whole.amax(2) - whole.amin(2)).amax(1) < STILL_LEVELS  # [B,H,W]
    error = (levels(middle) - levels(truth)).abs().mean((1, 2))  # [B,H,W]
    return (error * still).sum((1, 2)) / still.sum((1, 2)).clamp(min=1) / 255


def sharpness(middle: Tensor, truth: Tensor) -> Tensor:
    """Energy of the differences between neighbouring pixels, over the truth's.

    1 is as sharp as the truth, less is blurred, more is speckled.
    """
    frames = torch.stack([levels(middle), levels(truth)])  # [2,B,C,M,H,W]
    energy = frames.diff(dim=-2).square().sum((2, 3, 4, 5))
    energy = energy + frames.diff(dim=-1).square().sum((2, 3, 4, 5))
    generated, true = energy.clamp(min=1)  # [B]; flat frames have none
    return generated / true


def diversity(samples: Tensor) -> float:
    """Mean absolute difference between pairs of samples [N,C,M,H,W] of a clip, in levels."""
    n = len(samples)
    # Over all pairs of sorted values, the i-th counts 2i - n + 1 times.
    ordered = samples.sort(dim=0).values
    weight = 2 * torch.arange(n).to(ordered) - n + 1
    total = (ordered * weight.view(-1, 1, 1, 1, 1)).sum(0).mean()
    return (total / max(1, n * (n - 1) / 2)).item()


def spread(samples: Tensor, truth: Tensor) -> dict[str, float]:
    """How far samples [N,C,M,H,W] are from each other and from the truth [1,C,M,H,W].

    The ratio of both, over many clips, is the calibration: 1 for samples of the true
    distribution. After a blur of 5x5 pixels it is that of poses, and not of grain.
    """
    found = {}
    for kind in ("", "_blurred"):
        pictures = []
        for clip in (samples, truth):
            values = levels(clip) / 255
            pictures.append(F.avg_pool3d(values, (1, 5, 5), 1) if kind else values)
        found[f"diversity{kind}"] = diversity(pictures[0])
        found[f"error{kind}"] = (pictures[0] - pictures[1]).abs().mean().item()
    return found


class Scorer:
    """All scores of clips, without those that `missing` names.

    For the protocols of MCVD's paper, "mcvd" and "smmnist", PSNR (clip) is taken before rounding,
    and SSIM on luma; on digits after every pixel is made black or white.
    """

    def __init__(self, device: torch.device, protocol: str, missing: Container[str]):
        self.protocol = protocol
        self.like_mcvd = protocol != "native"
        self.has_ssim = "ssim" not in missing
        self.distances = {}  # score -> function (frames, truth) -> [B]
        if "lpips" not in missing:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)
            self.distances["lpips"] = partial(lpips, network)
        if "st_lpips" not in missing:
            for backbone in BACKBONES:
                network = ShiftTolerantLPIPS(backbone).to(device)
                self.distances[f"st_lpips_{backbone}"] = partial(st_lpips, network)

    @torch.no_grad()
    def __call__(self, middle: Tensor, truth: Tensor, start: Tensor, end: Tensor) -> list[dict]:
        """Per clip, its scores by name; psnr_frames is a list of M."""
        frames = frame_psnr(middle, truth)  # [B,M]
        seen = middle.clamp(-1, 1) if self.like_mcvd else to_float(to_uint8(middle))
        columns = {
            "psnr": frames.mean(1),
            "psnr_clip": clip_psnr(seen, truth),
            "psnr_frames": frames,
        }
        if self.has_ssim:
            pair = (middle, truth)
            if self.protocol == "smmnist":
                pair = [torch.where(frames > 0, 1.0, -1.0) for frames in pair]
            columns["ssim"] = ssim(*pair, gray=self.like_mcvd)
        for name, distance in self.distances.items():
            columns[name] = distance(middle, truth)
        columns["temporal_l1"] = temporal_error(middle, truth)
        columns["static_l1"] = static_error(middle, truth, start, end)
        columns["sharpness"] = sharpness(middle, truth)
        rows = range(len(middle))
        return [{name: x[i].tolist() for name, x in columns.items()} for i in rows]
