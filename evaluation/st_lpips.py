"""ST-LPIPS: a learned perceptual distance that hardly sees a shift by one pixel.

The weights are those inside the wheel of stlpips-pytorch 0.0.2, which is installed but not
imported.

Source: Ghildyal & Liu 2022, arXiv:2207.13686.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.video_utils import to_float, to_uint8

INSTALL = "pip install --no-deps stlpips-pytorch==0.0.2"
MIN_SIDE = 24  # pixels; smaller frames vanish in the pooling
PADDING = {3: 1, 5: 2, 11: 2}  # by the side of a convolution's kernel


class Backbone(NamedTuple):
    """Where a network pools and is compared, by the number of the convolution."""

    pooled: tuple[int, ...]  # before these
    pool_side: int
    compared: tuple[int, ...]  # after these


BACKBONES = {
    "alex": Backbone((1, 2), 3, (0, 1, 2, 3, 4)),
    "vgg": Backbone((2, 4, 7, 10), 2, (1, 3, 6, 9, 12)),
}


def weights_path(backbone: str) -> Path | None:
    """The file of weights of "alex" or "vgg"; None if the package is not installed."""
    package = find_spec("stlpips_pytorch")
    if package is None:
        return None
    folder = Path(package.submodule_search_locations[0], "weights", "vST0.0")
    return folder / f"{backbone}_shift_tolerant.pth"


class ShiftTolerantLPIPS(nn.Module):
    """The distance between pictures [N,3,H,W] in [-1, 1], sides of MIN_SIDE or more: [N]."""

    def __init__(self, backbone: str):
        super().__init__()
        self.backbone = BACKBONES[backbone]
        stored = torch.load(weights_path(backbone), map_location="cpu", weights_only=True)
        network = {name: value for name, value in stored.items() if name.startswith("net.")}
        self.weights = nn.ParameterList(v for name, v in network.items() if "weight" in name)
        self.biases = nn.ParameterList(v for name, v in network.items() if "bias" in name)
        self.heads = nn.ParameterList(v for name, v in stored.items() if name.startswith("lin"))
        self.register_buffer("shift", stored["scaling_layer.shift"])
        self.register_buffer("scale", stored["scaling_layer.scale"])

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """The weighted squared distance of features, averaged over pixels, summed over depths."""
        total = a.new_zeros(len(a))
        pairs = zip(self.features(a), self.features(b), self.heads, strict=True)
        for features_a, features_b, head in pairs:
            distance = F.conv2d((features_a - features_b).square(), head)  # [N,1,H_i,W_i]
            total = total + distance.mean((1, 2, 3))
        return total

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit vectors at each pixel of five depths, [N,C_i,H_i,W_i]."""
        found = []
        x = (x - self.shift) / self.scale
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i in self.backbone.pooled:
                x = halve(F.max_pool2d(x, self.backbone.pool_side, stride=1))
            side = weight.shape[-1]
            x = F.conv2d(x, weight, bias, padding=PADDING[side])
            if side == 11:  # in place of AlexNet's stride
                x = halve(x)
            x = x.relu()
            if i in self.backbone.compared:
                found.append(F.normalize(x, dim=1))
        return found


def halve(x: Tensor) -> Tensor:
    """Every second pixel of blurred maps, so that a shift of the picture changes little."""
    binomial = torch.tensor([1.0, 2.0, 1.0], device=x.device) / 4
    kernel = torch.outer(binomial, binomial).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, [2] * 4, mode="reflect"), kernel, stride=2, groups=x.shape[1])


@torch.no_grad()
def st_lpips(network: nn.Module, frames: Tensor, truth: Tensor) -> Tensor:
    """The distance of 8-bit frames [B,C,M,H,W] in [-1, 1], averaged over M: [B]."""
    pair = []
    for clip in (frames, truth):
        pictures = to_float(to_uint8(clip)).transpose(1, 2).flatten(0, 1)  # [B*M,C,H,W]
        pair.append(pictures.expand(-1, 3, -1, -1))
    return network(*pair).view(len(frames), -1).mean(1)
