"""Observed frames from files, pictures and arrays, as the network takes them."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.io import as_rgb, picture_pixels, read_image
from utils.video_utils import FrameSize, as_pair, resize_and_crop, to_float, to_gray

Frames = Tensor | Sequence[Any]


def load_context(frames: Frames, size: FrameSize, color_mode: str) -> Tensor:
    """K observed frames of one end, float [B,C,K,H,W] in [-1, 1].

    Args:
        frames: a tensor [B,C,K,H,W] or [C,K,H,W], float in [-1, 1] or uint8, which is taken as
            it is; or what `load_frames` takes.
        size: of the frames in pixels, where they are loaded.
        color_mode: "rgb" or "gray", likewise.
    """
    if not isinstance(frames, Tensor):
        frames = load_frames(frames, size, color_mode)
    if frames.dtype == torch.uint8:
        frames = to_float(frames)
    if not frames.is_floating_point() or frames.dim() not in (4, 5):
        rule = "frames must be [B,C,K,H,W] or [C,K,H,W], float in [-1, 1] or uint8"
        raise ValueError(f"{rule} (got {frames.dtype} {list(frames.shape)})")
    return frames.float() if frames.dim() == 5 else frames.float()[None]


def load_frames(frames: Sequence[Any], size: FrameSize, color_mode: str) -> Tensor:
    """Frames in time order, resized and centre-cropped as clips are; a warning says if they were.

    Args:
        frames: K of them, each a path, a PIL image or an array, see `as_rgb`.

    Returns: uint8 [1,C,K,H,W].
    Raises: ValueError: naming what is wrong with a frame.
    """
    if isinstance(frames, str) or not isinstance(frames, (Sequence, np.ndarray)) or not len(frames):
        raise ValueError(f"frames must be a sequence of K images (got {frames!r})")
    loaded = [load_frame(frame) for frame in frames]
    if any(picture.shape[1:] != as_pair(size) for picture in loaded):
        warnings.warn(f"frames are resized and cropped to {as_pair(size)}", stacklevel=2)
    pictures = torch.stack([resize_and_crop(picture, size) for picture in loaded])
    if color_mode == "gray":
        if any((picture != picture[:1]).any() for picture in loaded):
            warnings.warn("colours of frames become gray", stacklevel=2)
        pictures = to_gray(pictures)
    return pictures.transpose(0, 1)[None]


def load_frame(frame: Any) -> Tensor:
    """A path, a PIL image or an array as `as_rgb` takes it, as uint8 [3,H,W]."""
    if isinstance(frame, (str, Path)):
        return read_image(frame)
    if hasattr(frame, "convert"):
        frame = picture_pixels(frame)
    return as_rgb(np.asarray(frame))
