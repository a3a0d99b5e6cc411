"""VideoUNet3D: a 3-D U-Net over the middle frames, conditioned on both contexts by FiLM."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks.attention3d import TemporalAttentionBlock
from models.blocks.resnet3d import Downsample, ResBlock3D, Upsample
from models.conditioning_encoder import ContextFeatures, EndpointEncoder
from models.modules.film import FiLM
from models.modules.frame_conv import FrameConv3d
from models.modules.layers import group_norm, zero_module
from models.modules.temporal_attention import sinusoidal_embedding

ATTENTION_HEADS = 4


class Level(nn.Module):
    """The residual blocks of one resolution, then temporal attention where asked for."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_channels: int,
        res_blocks: int,
        attention: bool,
    ):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (res_blocks - 1)
        self.blocks = nn.ModuleList(
            ResBlock3D(channels, out_channels, time_channels) for channels in inputs
        )
        self.attention = nn.Identity()
        if attention:
            self.attention = TemporalAttentionBlock(out_channels, ATTENTION_HEADS)

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """[B,C_in,M,H,W] -> [B,C_out,M,H,W]."""
        for block in self.blocks:
            x = block(x, time_embedding)
        return self.attention(x)


class VideoUNet3D(nn.Module):
    """Predicts the velocity of noisy middle frames, given both contexts.

    Args:
        image_channels: 3, or 1 for gray.
        base_channels: width C of level 0, a multiple of 4.
        channel_mults: width of each level in units of C.
        res_blocks: residual blocks per level and direction.
        temporal_attn_levels: levels with temporal attention; the bottleneck always has it.
        endpoint_context: observed frames K at each end.
        guide_channels: maps of each middle frame that come beside it; 0 = the last start frame and
            the first end frame stand in for them.

    Raises: ValueError: as `check_architecture`.
    """

    def __init__(
        self,
        image_channels: int = 3,
        base_channels: int = 96,
        channel_mults: Sequence[int] = (1, 2, 4),
        res_blocks: int = 2,
        temporal_attn_levels: Sequence[int] = (1, 2),
        endpoint_context: int = 2,
        guide_channels: int = 0,
    ):
        super().__init__()
        check_architecture(base_channels, channel_mults, res_blocks, temporal_attn_levels)
        self.image_channels = image_channels
        self.base_channels = base_channels
        self.endpoint_context = endpoint_context
        c = base_channels
        time_channels = 4 * c
        widths = [c * mult for mult in channel_mults]  # L

        self.time_mlp = nn.Sequential(
            nn.Linear(c, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.endpoint_encoder = EndpointEncoder(image_channels, endpoint_context, c, widths)
        self.stem = FrameConv3d(image_channels + (guide_channels or 2 * image_channels), c)
        self.stem_film = FiLM(c, c)

        self.down_films = nn.ModuleList()
        self.down_levels = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        self.skip_films = nn.ModuleList()
        self.up_films = nn.ModuleList()
        self.up_levels = nn.ModuleList()
        self.upsamples = nn.ModuleList()
        widths_above = [c, *widths[:-1]]
        widths_below = [*widths[1:], widths[-1]]
        for i, width in enumerate(widths):
            above = widths_above[i]
            attention = i in temporal_attn_levels
            self.down_films.append(FiLM(width, above))
            self.down_levels.append(Level(above, width, time_channels, res_blocks, attention))
            self.downsamples.append(Downsample(width))
            self.skip_films.append(FiLM(width, width))
            self.upsamples.append(Upsample(widths_below[i], width))
            self.up_levels.append(Level(2 * width, width, time_channels, res_blocks, attention))
            self.up_films.append(FiLM(width, width))

        self.bottleneck_film = FiLM(widths[-1], widths[-1])
        self.bottleneck_in = ResBlock3D(widths[-1], widths[-1], time_channels)
        self.bottleneck_attention = TemporalAttentionBlock(widths[-1], ATTENTION_HEADS)
        self.bottleneck_out = ResBlock3D(widths[-1], widths[-1], time_channels)
        self.out = nn.Sequential(
            group_norm(c), nn.SiLU(), zero_module(FrameConv3d(c, image_channels))
        )

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this, as every level halves them."""
        return 2 ** len(self.down_levels)

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        start_context: Tensor,
        end_context: Tensor,
        guide: Tensor | None = None,
    ) -> Tensor:
        """`encode_contexts`, then `denoise`: what training calls."""
        return self.denoise(x_t, t, self.encode_contexts(start_context, end_context, guide))

    def encode_contexts(
        self, start_context: Tensor, end_context: Tensor, guide: Tensor | None = None
    ) -> ContextFeatures:
        """Features of both contexts, the same at every sampler step.

        Args:
            start_context: [B,C_img,K,H,W] in [-1, 1]; zeros for the unconditional branch.
            end_context: the same shape.
            guide: [B,guide_channels,M,H,W]; None for a network without.

        Raises: ValueError: for another shape than the network was built for.
        """
        expected = (self.image_channels, self.endpoint_context)
        for name, context in (("start_context", start_context), ("end_context", end_context)):
            shape = tuple(context.shape)
            if len(shape) != 5 or shape[1:3] != expected or shape != tuple(start_context.shape):
                rule = f"[B,{expected[0]},{expected[1]},H,W], both of one shape"
                raise ValueError(f"{name} must be {rule} (got {shape})")
        check_size(start_context.shape[-2:], self.size_multiple)
        return self.endpoint_encoder(start_context, end_context, guide)

    def denoise(self, x_t: Tensor, t: Tensor, features: ContextFeatures) -> Tensor:
        """The velocity of noisy middle frames.

        Args:
            x_t: [B,C_img,M,H,W], with any M >= 1.
            t: diffusion index per clip, [B] long.
            features: of the same clips, from `encode_contexts`.

        Returns: v, the shape of x_t.
        """
        m = x_t.shape[2]
        embedding = sinusoidal_embedding(t, self.base_channels).to(x_t.dtype)
        time_embedding = self.time_mlp(embedding)  # [B,4C]
        guide = features.guide.expand(-1, -1, m, -1, -1)  # [B,G,M,H,W]
        x = self.stem(torch.cat([x_t, guide], dim=1))  # [B,C,M,H,W]
        x = self.stem_film(x, features.stem)

        skips = []
        for i, condition in enumerate(features.levels):
            x = self.down_films[i](x, condition)
            x = self.down_levels[i](x, time_embedding)  # [B,L[i],M,H/2^i,W/2^i]
            skips.append(self.skip_films[i](x, condition))
            x = self.downsamples[i](x)  # [B,L[i],M,H/2^(i+1),W/2^(i+1)]

        x = self.bottleneck_film(x, features.bottleneck)
        x = self.bottleneck_in(x, time_embedding)  # [B,L[-1],M,H/2^n,W/2^n]
        x = self.bottleneck_attention(x)
        x = self.bottleneck_out(x, time_embedding)

        for i in reversed(range(len(skips))):
            x = torch.cat([self.upsamples[i](x), skips[i]], dim=1)  # [B,2*L[i],M,H/2^i,W/2^i]
            x = self.up_levels[i](x, time_embedding)  # [B,L[i],M,H/2^i,W/2^i]
            x = self.up_films[i](x, features.levels[i])
        return self.out(x)


def check_architecture(
    base_channels: int,
    channel_mults: Sequence[int],
    res_blocks: int,
    temporal_attn_levels: Sequence[int],
) -> None:
    """Raises: ValueError: for what cannot be built, naming the argument, the rule and the value."""
    if base_channels < 1 or base_channels % ATTENTION_HEADS:
        rule = f"--base_channels must be a positive multiple of {ATTENTION_HEADS}"
        raise ValueError(f"{rule} (got {base_channels})")
    if min(channel_mults, default=0) < 1:
        rule = "--channel_mults must be one or more positive integers"
        raise ValueError(f"{rule} (got {list(channel_mults)})")
    if res_blocks < 1:
        raise ValueError(f"--res_blocks must be at least 1 (got {res_blocks})")
    for level in temporal_attn_levels:
        if not 0 <= level < len(channel_mults):
            rule = f"--temporal_attn_levels must lie in [0, {len(channel_mults) - 1}]"
            raise ValueError(f"{rule}, the levels of --channel_mults (got {level})")


def check_size(size: int | Sequence[int], multiple: int) -> None:
    """Raises: ValueError: unless `multiple` divides the side, or height and width, in pixels."""
    sides = [size] if isinstance(size, int) else list(size)
    if any(side % multiple for side in sides):
        got = "x".join(map(str, sides))
        rule = f"--size must be divisible by {multiple}, as each level of the network halves it"
        raise ValueError(f"{rule} (got {got})")
