"""Scores of generated middle frames against the true ones, and of samples against each other.

Frames are [B,C,M,H,W] and contexts [B,C,K,H,W], in [-1, 1]. A function scores each clip of a batch:
[B] float64, errors in units of the range from black to white. Only generated frames are scored.
"""

from collections.abc import Container
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.hub import get_dir

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
    """Mean absolute difference between pairs of samples [N,C,M,H,W] of a clip."""
    n = len(samples)
    # Over all pairs of sorted values, the i-th counts 2i - n + 1 times.
    ordered = (levels(samples) / 255).sort(dim=0).values
    weight = 2 * torch.arange(n).to(ordered) - n + 1
    total = (ordered * weight.view(-1, 1, 1, 1, 1)).sum(0).mean()
    return (total / max(1, n * (n - 1) / 2)).item()


class Scorer:
    """All scores of clips, without SSIM or LPIPS where `missing` names them.

    `like_mcvd`: PSNR (clip) is taken before rounding, and SSIM on luma.
    """

    def __init__(self, device: torch.device, like_mcvd: bool, missing: Container[str]):
        self.like_mcvd = like_mcvd
        self.has_ssim = "ssim" not in missing
        self.lpips_network = None
        if "lpips" not in missing:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            metric = LearnedPerceptualImagePatchSimilarity(net_type="alex")
            self.lpips_network = metric.net.to(device)

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
            columns["ssim"] = ssim(middle, truth, gray=self.like_mcvd)
        if self.lpips_network is not None:
            columns["lpips"] = lpips(self.lpips_network, middle, truth)
        columns["temporal_l1"] = temporal_error(middle, truth)
        columns["static_l1"] = static_error(middle, truth, start, end)
        columns["sharpness"] = sharpness(middle, truth)
        rows = range(len(middle))
        return [{name: x[i].tolist() for name, x in columns.items()} for i in rows]
