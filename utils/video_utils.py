"""Pure tensor functions on clips: representation, size, colour, splitting, joining, and the simplest baseline.

A clip is float [B,C,T,H,W] in [-1, 1]; its 8-bit form is uint8 with the same axes, one clip without the B.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PSNR_CEILING = 100.0  # dB given to two identical frames, so that a mean over frames stays finite
WIDEST_ASPECT = 4  # frames this much longer than wanted are narrowed first: the centre crop discards the rest anyway

FrameSize = int | Sequence[int]  # pixels: the side of squares, or height and width


def to_uint8(clip: Tensor) -> Tensor:
    """[-1, 1] to 0..255, rounded and clamped; the exact inverse of `to_float` on 8-bit values."""
    return ((clip.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(frames: Tensor) -> Tensor:
    """0..255 to float32 in [-1, 1], any shape."""
    return frames.float() / 127.5 - 1


def to_gray(frames: Tensor) -> Tensor:
    """RGB to one channel by rounded ITU-R BT.601 luma: uint8 [...,3,H,W] -> [...,1,H,W]; gray stays as it is.

    Integer weights that sum to one make it exact on gray; torchvision's float ones darken every level by one.
    """
    weights = torch.tensor([19595, 38470, 7471], device=frames.device).view(3, 1, 1)  # 0.299, 0.587, 0.114 of 2^16
    return (((frames.int() * weights).sum(-3, keepdim=True) + 2**15) >> 16).to(torch.uint8)


def as_pair(value: int | Sequence[int]) -> tuple[int, int]:
    """A number twice, or both of two: height and width, or the ends of a range."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def resize(frames: Tensor, size: Sequence[int]) -> Tensor:
    """Frames [...,C,H,W], uint8 or float, at another height and width (`size`): bilinear, with antialiasing."""
    from torchvision.transforms.v2 import functional as transforms  # not at the start, of which it is two seconds

    return transforms.resize(frames, list(size), antialias=True)


def crop_centre(frames: Tensor, size: Sequence[int]) -> Tensor:
    """The centre of frames [...,C,H,W], of a height and width that are at most theirs, as a view."""
    top, left = (round((whole - part) / 2) for whole, part in zip(frames.shape[-2:], size, strict=True))
    return frames[..., top : top + size[0], left : left + size[1]]


def resize_and_crop(frames: Tensor, size: FrameSize, linear_light: bool = False) -> Tensor:
    """Resize with antialiasing until `size` is just covered, then crop the centre: uint8 [...,C,H,W] to that size.

    With `linear_light`, intensities of light are averaged and not 8-bit values, which follow sRGB's curve (IEC
    61966-2-1). Frames that already have the size come back as they are, bit for bit.
    """
    h, w = frames.shape[-2:]
    height, width = as_pair(size)
    if (h, w) == (height, width):
        return frames
    longest = [max(1, WIDEST_ASPECT * w * height // width), max(1, WIDEST_ASPECT * h * width // height)]
    if h > longest[0] or w > longest[1]:
        h, w = min(h, longest[0]), min(w, longest[1])
        frames = crop_centre(frames, (h, w))
    covering = [height, w * height // h] if w * height >= width * h else [h * width // w, width]
    if linear_light:
        encoded = frames.float() / 255
        light = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
        light = resize(light, covering).clamp(0, 1)
        encoded = torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
        frames = (encoded * 255).round().to(torch.uint8)
    else:
        frames = resize(frames, covering)
    return crop_centre(frames, (height, width))


def middle_length(num_frames: int, endpoint_context: int) -> int:
    """Frames M to generate in a clip of T; raises a ValueError unless T > 2 * K, as otherwise there is no middle."""
    if num_frames <= 2 * endpoint_context:
        rule = "num_frames must exceed 2 * endpoint_context so that a middle exists"
        raise ValueError(f"{rule} (got num_frames {num_frames}, endpoint_context {endpoint_context})")
    return num_frames - 2 * endpoint_context


def split_clip(clip: Tensor, endpoint_context: int) -> tuple[Tensor, Tensor, Tensor]:
    """start_context, middle, end_context of a clip [B,C,T,H,W], as views of it; raises as `middle_length`."""
    k, m = endpoint_context, middle_length(clip.shape[2], endpoint_context)
    return clip[:, :, :k], clip[:, :, k : k + m], clip[:, :, k + m :]


def clip_times(num_frames: int, frame_stride: int) -> range:
    """Source frame numbers of a clip's T frames, from 0 on."""
    return range(0, num_frames * frame_stride, frame_stride)


def add_times(start_context: Tensor, end_context: Tensor, times: Sequence[int]) -> list[Tensor]:
    """Both contexts with a channel more, which tells a network when their frames were taken: [B,C+1,K,H,W].

    Of each observed frame it holds log2 of the distance in time to the other context's nearest frame, over 4.

    Args:
        times: source frame number of each of the T frames of the clip, rising.
    """
    k, device = start_context.shape[2], start_context.device
    apart = [[times[-k] - time for time in times[:k]], [time - times[k - 1] for time in times[-k:]]]
    timed = []
    for context, distance in zip((start_context, end_context), apart, strict=True):
        channel = torch.tensor(distance, dtype=context.dtype, device=device).log2().view(1, 1, k, 1, 1) / 4
        timed.append(torch.cat([context, channel.expand(len(context), 1, k, *context.shape[3:])], dim=1))
    return timed


def join_clip(start_context: Tensor, middle: Tensor, end_context: Tensor) -> Tensor:
    """The whole clip [B,C,T,H,W] of its three parts; the observed frames pass through untouched."""
    return torch.cat([start_context, middle, end_context], dim=2)


def cross_fade(start_context: Tensor, end_context: Tensor, num_middle: int) -> Tensor:
    """The baseline without motion: a linear blend of the two nearest observed frames, [B,C,num_middle,H,W]."""
    weight = torch.arange(1, num_middle + 1, device=start_context.device) / (num_middle + 1)  # 1/(M+1) .. M/(M+1)
    weight = weight.view(1, 1, -1, 1, 1).to(start_context.dtype)
    return torch.lerp(start_context[:, :, -1:], end_context[:, :, :1], weight)


def as_double(values: Tensor) -> Tensor:
    """Values as float64 where they are, or on the CPU if they are on MPS, which has no float64."""
    return values.cpu().double() if values.device.type == "mps" else values.double()


def frame_psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of every frame on 8-bit values.

    Both are [B,C,T,H,W] in [-1, 1]. Returns: [B,T] float64 in dB; a frame without error counts as 100 dB.
    """
    difference = as_double(to_uint8(frames)) - as_double(to_uint8(truth))
    mse = difference.square().mean(dim=(1, 3, 4))  # [B,T]
    return (10 * torch.log10(255**2 / mse)).clamp(max=PSNR_CEILING)


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """The mean of `frame_psnr` over each clip's frames, [B] float64 in dB."""
    return frame_psnr(frames, truth).mean(1)
