"""Pure functions on clips: form, size, colour, parts, PSNR.

A clip is float [B,C,T,H,W] in [-1, 1].
Its 8-bit form is uint8 with the same axes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PSNR_CEILING = 100.0  # dB of identical frames, so that means stay finite
WIDEST_ASPECT = 4  # longer frames are cut before they are resized

FrameSize = int | Sequence[int]  # pixels: a square's side, or (height, width)


def to_uint8(clip: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded; inverts `to_float` exactly."""
    levels = (clip.float() + 1) * 127.5
    return levels.round().clamp(0, 255).to(torch.uint8)


def to_float(frames: Tensor) -> Tensor:
    """0..255 to float32 in [-1, 1], any shape."""
    return frames.float() / 127.5 - 1


def to_gray(frames: Tensor) -> Tensor:
    """BT.601 luma: uint8 [...,3,H,W] -> [...,1,H,W]."""
    # 0.299, 0.587 and 0.114 in units of 2^-16: integers that sum to one
    # are exact on gray, where float weights would lose a level.
    weights = torch.tensor([19595, 38470, 7471], device=frames.device)
    luma = frames.int() * weights.view(3, 1, 1)
    luma = luma.sum(-3, keepdim=True)
    return ((luma + 2**15) >> 16).to(torch.uint8)


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Two numbers: the given two, or the given one twice."""
    if isinstance(value, int):
        return value, value
    first, second = value
    return first, second


def resize(frames: Tensor, size: Sequence[int]) -> Tensor:
    """Resample [...,C,H,W] to (height, width): bilinear, antialiased."""
    # Imported here because the import takes two seconds.
    from torchvision.transforms.v2 import functional

    return functional.resize(frames, list(size), antialias=True)


def crop_centre(frames: Tensor, size: Sequence[int]) -> Tensor:
    """A view of the central (height, width) of frames [...,C,H,W]."""
    height, width = size
    top = round((frames.shape[-2] - height) / 2)
    left = round((frames.shape[-1] - width) / 2)
    return frames[..., top : top + height, left : left + width]


def resize_and_crop(frames: Tensor, size: FrameSize) -> Tensor:
    """Resize until `size` is just covered, then crop the centre.

    Args:
        frames: uint8 [...,C,H,W]; of that size already, they come
            back bit for bit.
    """
    height, width = as_pair(size)
    h, w = frames.shape[-2:]
    if (h, w) == (height, width):
        return frames

    # Cut very long frames: to cover the size they would become huge.
    highest = max(1, WIDEST_ASPECT * w * height // width)
    widest = max(1, WIDEST_ASPECT * h * width // height)
    h = min(h, highest)
    w = min(w, widest)
    frames = crop_centre(frames, (h, w))

    covering = (h * width // w, width)
    if w * height > width * h:
        covering = (height, w * height // h)
    return crop_centre(resize(frames, covering), (height, width))


def middle_length(num_frames: int, endpoint_context: int) -> int:
    """Frames M = T - 2K to generate; ValueError unless T > 2K."""
    if num_frames <= 2 * endpoint_context:
        rule = "--T must exceed 2 * --endpoint_context so that a middle exists"
        raise ValueError(f"{rule} (got --T {num_frames}, --endpoint_context {endpoint_context})")
    return num_frames - 2 * endpoint_context


def split_clip(clip: Tensor, endpoint_context: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of start_context, middle and end_context.

    Raises: ValueError: if no middle is left, see `middle_length`.
    """
    k = endpoint_context
    m = middle_length(clip.shape[2], k)
    return clip[:, :, :k], clip[:, :, k : k + m], clip[:, :, k + m :]


def join_clip(start_context: Tensor, middle: Tensor, end_context: Tensor) -> Tensor:
    """The clip [B,C,T,H,W]; observed frames stay bit for bit."""
    return torch.cat([start_context, middle, end_context], dim=2)


def cross_fade(start_context: Tensor, end_context: Tensor, num_middle: int) -> Tensor:
    """Blend the nearest observed frames linearly: [B,C,M,H,W]."""
    start = start_context[:, :, -1:]
    end = end_context[:, :, :1]
    # Weights of the end frame: 1/(M+1) .. M/(M+1).
    steps = torch.arange(1, num_middle + 1, device=start.device)
    weight = (steps / (num_middle + 1)).view(1, 1, -1, 1, 1)
    return torch.lerp(start, end, weight.to(start.dtype))


def as_double(values: Tensor) -> Tensor:
    """Values in float64; on the CPU if on MPS, which has none."""
    if values.device.type == "mps":
        values = values.cpu()
    return values.double()


def frame_psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """PSNR of every frame, on 8-bit values.

    Args:
        frames, truth: [B,C,T,H,W] in [-1, 1].

    Returns: [B,T] float64 in dB, at most PSNR_CEILING.
    """
    error = as_double(to_uint8(frames)) - as_double(to_uint8(truth))
    mse = error.square().mean(dim=(1, 3, 4))  # [B,T]
    return (10 * torch.log10(255**2 / mse)).clamp(max=PSNR_CEILING)


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """Mean of `frame_psnr` over each clip's frames, [B]."""
    return frame_psnr(frames, truth).mean(1)
