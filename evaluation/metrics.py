"""Scores of generated middle frames against the true ones, and of samples against each other.

Only generated frames are scored. Frames are compared as the 8-bit pictures that a viewer gets, but for the PSNR of the
published protocol, which is taken before rounding.
"""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.protocols import Protocol
from utils.io import file_sha256
from utils.video_utils import PSNR_CEILING, as_double, frame_psnr, join_clip, resize, to_float, to_gray, to_uint8

METRICS = ("psnr", "ssim", "lpips", "temporal", "static", "sharpness", "diversity", "fvd")
HIGHER_IS_BETTER = {"psnr", "psnr_clip", "psnr_middle", "ssim", "ssim_middle"}
SSIM_WINDOW = 11  # pixels: a Gaussian of deviation 1.5 cut at 3.5 deviations, as scikit-image's
STILL_LEVELS = 4  # of 255: true values that differ by less in all of a clip show noise of the video, no motion
LPIPS_SIZE = 128  # pixels, as MCVD's code; AlexNet needs more than small frames have
ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"  # its first digits, which torchvision puts into the name


def alexnet_path() -> Path:
    """Where torchvision looks for the backbone of LPIPS before it would download it."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_URL.rsplit("/", 1)[1]


def missing_for(metric: str, side: int) -> str | None:
    """Why a metric is left out of frames with this shorter side, and what would bring it; None where it is not."""
    if metric in ("ssim", "lpips") and find_spec("torchmetrics") is None:
        return f"{metric} is left out: it needs pip install torchmetrics"
    if metric == "ssim" and side < SSIM_WINDOW:
        return f"ssim is left out: its window needs frames of {SSIM_WINDOW} pixels (got --size {side})"
    if metric == "lpips":
        path = alexnet_path()
        if not path.is_file():
            return f"lpips is left out: it needs {ALEXNET_URL} as {path}"
        if not file_sha256(path).startswith(ALEXNET_SHA256):
            return f"lpips is left out: {path} is damaged (its sha256 must begin with {ALEXNET_SHA256})"
    return None


def clip_psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """The dB of each clip's mean squared error, of frames as they are, not rounded: [B,C,T,H,W] in [-1, 1] to [B].

    Errors of frames are averaged before the logarithm, which gives less than the mean of their dB; no error is 100 dB.
    """
    mse = (as_double(frames) - as_double(truth)).square().mean(dim=(1, 2, 3, 4)) / 4  # of a range of 1
    return (-10 * torch.log10(mse)).clamp(max=PSNR_CEILING)


def ssim(frames: Tensor, truth: Tensor, gray: bool) -> Tensor:
    """Structural similarity of clips [B,C,T,H,W] in [-1, 1], the mean over frames, channels and pixels: [B] float64.

    With `gray`, luma is compared. Source: Wang et al. 2004, with scikit-image's settings for it: Gaussian weights of
    deviation 1.5, biased covariances, 8-bit values, borders left out.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pictures = [to_uint8(clip).transpose(1, 2).flatten(0, 1) for clip in (frames, truth)]  # [B*T,C,H,W]
    settings = {"gaussian_kernel": True, "sigma": 1.5, "data_range": 255.0, "reduction": "none"}
    pictures = [as_double(to_gray(picture) if gray else picture) for picture in pictures]
    _, similarity = structural_similarity_index_measure(*pictures, **settings, return_full_image=True)
    edge = SSIM_WINDOW // 2  # where the window would reach over the border, which torchmetrics pads
    return similarity[..., edge:-edge, edge:-edge].reshape(len(frames), -1).mean(1)


def temporal_error(middle: Tensor, truth: Tensor, start_context: Tensor, end_context: Tensor) -> Tensor:
    """How wrongly pixels change from frame to frame: mean |difference - true difference|, [B] in units of the range.

    The steps from and to the nearest observed frames count, too: a clip that jumps there has an error.
    """

    def changes(frames: Tensor) -> Tensor:
        return as_double(to_uint8(join_clip(start_context[:, :, -1:], frames, end_context[:, :, :1]))).diff(dim=2)

    return (changes(middle) - changes(truth)).abs().mean(dim=(1, 2, 3, 4)) / 255


def static_error(middle: Tensor, truth: Tensor, start_context: Tensor, end_context: Tensor) -> Tensor:
    """Mean absolute error where nothing moves in the true clip, observed frames included: [B] in units of the range.

    A pixel is still if each of its colours changes by less than STILL_LEVELS; 0 for a clip without still pixels.
    """
    whole = as_double(to_uint8(join_clip(start_context, truth, end_context)))  # [B,C,T,H,W]
    still = (whole.amax(2) - whole.amin(2)).amax(1) < STILL_LEVELS  # [B,H,W]
    error = (as_double(to_uint8(middle)) - as_double(to_uint8(truth))).abs().mean((1, 2))  # [B,H,W]
    return (error * still).sum((1, 2)) / still.sum((1, 2)).clamp(min=1) / 255


def sharpness(middle: Tensor, truth: Tensor) -> Tensor:
    """Energy of the differences between neighbouring pixels over that of the true frames, [B].

    1 is as sharp as the truth, less is blurred, more is speckled or too sharp.
    """
    frames = torch.stack([as_double(to_uint8(clip)) for clip in (middle, truth)])  # [2,B,C,M,H,W]
    energy = sum(frames.diff(dim=axis).square().sum((2, 3, 4, 5)) for axis in (-2, -1)).clamp(min=1)  # [2,B]
    return energy[0] / energy[1]


def diversity(samples: Tensor) -> float:
    """Mean absolute difference between pairs of samples [N,C,M,H,W] in [-1, 1], in units of the range; 0 for one."""
    n = len(samples)
    # of sorted values, the sum over all pairs counts the i-th (2i - n + 1) times
    ordered = (as_double(to_uint8(samples)) / 255).sort(dim=0).values
    weight = 2 * torch.arange(n).to(ordered) - n + 1
    return ((ordered * weight.view(-1, 1, 1, 1, 1)).sum(0).mean() / max(1, n * (n - 1) / 2)).item()


def lpips(network: nn.Module, frames: Tensor, truth: Tensor) -> Tensor:
    """Learned perceptual distance of clips [B,C,T,H,W] in [-1, 1], [B]. Source: Zhang et al. 2018, arXiv:1801.03924."""
    pair = []
    for clip in (frames, truth):
        pictures = to_uint8(clip).transpose(1, 2).flatten(0, 1).expand(-1, 3, -1, -1)  # [B*T,3,H,W]
        pair.append(to_float(resize(pictures, (LPIPS_SIZE, LPIPS_SIZE))))
    return network(*pair).view(len(frames), -1).mean(1)


class Scorer:
    """Scores clips by those of METRICS asked for, as a protocol has them."""

    def __init__(self, metrics: Sequence[str], protocol: Protocol, device: torch.device):
        self.metrics = set(metrics)
        self.protocol = protocol
        if "lpips" in self.metrics:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.lpips_network = LearnedPerceptualImagePatchSimilarity(net_type="alex").net.to(device)

    @torch.no_grad()
    def __call__(self, middle: Tensor, truth: Tensor, start_context: Tensor, end_context: Tensor) -> list[dict]:
        """Per clip: psnr, psnr_clip, psnr_frames (a list), ssim, lpips, temporal_l1, static_l1, sharpness.

        Frames are [B,C,.,H,W] in [-1, 1]. Where the protocol has it, psnr_middle and ssim_middle: of frame M // 2.
        """
        columns: dict[str, Tensor] = {}
        halfway, luma = middle.shape[2] // 2, self.protocol.like_mcvd
        if "psnr" in self.metrics:
            frames = frame_psnr(middle, truth)
            seen = middle.clamp(-1, 1) if self.protocol.like_mcvd else to_float(to_uint8(middle))
            columns |= {"psnr": frames.mean(1), "psnr_clip": clip_psnr(seen, truth), "psnr_frames": frames}
            columns |= {"psnr_middle": frames[:, halfway]} if self.protocol.middle_frame else {}
        if "ssim" in self.metrics:
            columns["ssim"] = ssim(middle, truth, luma)
            if self.protocol.middle_frame:
                columns["ssim_middle"] = ssim(*(clip[:, :, halfway, None] for clip in (middle, truth)), luma)
        if "lpips" in self.metrics:
            columns["lpips"] = lpips(self.lpips_network, middle, truth)
        if "temporal" in self.metrics:
            columns["temporal_l1"] = temporal_error(middle, truth, start_context, end_context)
        if "static" in self.metrics:
            columns["static_l1"] = static_error(middle, truth, start_context, end_context)
        if "sharpness" in self.metrics:
            columns["sharpness"] = sharpness(middle, truth)
        return [{name: values[i].tolist() for name, values in columns.items()} for i in range(len(middle))]
