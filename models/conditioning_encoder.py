"""What the network knows of the observed frames: one 2-D encoder for both contexts, then fusion."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.modules.layers import ConvNormAct


class ContextFeatures(NamedTuple):
    """Fused features of both contexts, and what the network sees beside every noisy frame."""

    stem: Tensor  # [B,C,H,W]
    levels: list[Tensor]  # one per U-Net level i, [B,L[i],H/2^i,W/2^i]
    bottleneck: Tensor  # [B,L[-1],H/2^n,W/2^n] for n levels
    guide: Tensor  # [B,G,M,H,W]; by itself the two nearest observed frames, [B,2*C_img,1,H,W]


class ContextEncoder(nn.Module):
    """One context to features at every resolution of the U-Net; both ends share its weights."""

    def __init__(self, in_channels: int, base_channels: int, widths: list[int]):
        super().__init__()
        inputs = [base_channels, *widths[1:]]
        outputs = [*widths[1:], widths[-1]]
        self.stem = ConvNormAct(in_channels, base_channels)
        self.project = nn.ModuleList(
            nn.Conv2d(channels, width, 1) for channels, width in zip(inputs, widths, strict=True)
        )
        self.down = nn.ModuleList(
            ConvNormAct(channels, below, stride=2)
            for channels, below in zip(inputs, outputs, strict=True)
        )
        self.project_bottleneck = nn.Conv2d(widths[-1], widths[-1], 1)

    def forward(self, context: Tensor) -> list[Tensor]:
        """[B,C_img*K,H,W] -> stem, one feature per level, bottleneck: len(widths) + 2 maps."""
        x = self.stem(context)
        features = [x]
        for project, down in zip(self.project, self.down, strict=True):
            features.append(project(x))
            x = down(x)
        return [*features, self.project_bottleneck(x)]


class EndpointEncoder(nn.Module):
    """Both contexts through the shared encoder, fused by a 1x1 convolution per resolution."""

    def __init__(
        self, image_channels: int, endpoint_context: int, base_channels: int, widths: list[int]
    ):
        super().__init__()
        context_channels = image_channels * endpoint_context
        self.encoder = ContextEncoder(context_channels, base_channels, widths)
        fused = [base_channels, *widths, widths[-1]]
        self.fuse = nn.ModuleList(ConvNormAct(2 * width, width, kernel_size=1) for width in fused)

    def forward(
        self, start_context: Tensor, end_context: Tensor, guide: Tensor | None = None
    ) -> ContextFeatures:
        """Encode and fuse two contexts, [B,C_img,K,H,W] each; a guide is passed on as it is."""
        # The K frames of a context become channels, [B,C_img*K,H,W].
        start_maps = self.encoder(start_context.flatten(1, 2))
        end_maps = self.encoder(end_context.flatten(1, 2))
        fused = [
            fuse(torch.cat([start, end], dim=1))
            for fuse, start, end in zip(self.fuse, start_maps, end_maps, strict=True)
        ]
        if guide is None:
            guide = torch.cat([start_context[:, :, -1:], end_context[:, :, :1]], dim=1)
        return ContextFeatures(stem=fused[0], levels=fused[1:-1], bottleneck=fused[-1], guide=guide)
