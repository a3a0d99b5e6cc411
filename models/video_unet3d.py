"""VideoUNet3D: a 3-D U-Net over the middle frames, steered by both contexts through FiLM.

Reads like the figure in the README: stem, down levels, bottleneck, up levels, output.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.blocks.attention3d import TemporalAttentionBlock
from models.blocks.resnet3d import Downsample, ResBlock3D, Upsample
from models.conditioning_encoder import ContextFeatures, EndpointEncoder
from models.modules.film import FiLM
from models.modules.frame_conv import FrameConv3d
from models.modules.temporal_attention import sinusoidal_embedding

ATTENTION_HEADS = 4
LARGEST_NUMBER = 4096  # in a model_config: an absurd one in a foreign checkpoint must not exhaust memory or time
LARGEST_LEVELS, LARGEST_RES_BLOCKS = 12, 64  # likewise: even without weights each module takes time


class Level(nn.Module):
    """The residual blocks of one resolution, then temporal attention where asked."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, res_blocks: int, attention: bool):
        super().__init__()
        inputs = [in_channels] + [out_channels] * (res_blocks - 1)
        self.blocks = nn.ModuleList(ResBlock3D(channels, out_channels, time_channels) for channels in inputs)
        self.attention = TemporalAttentionBlock(out_channels, ATTENTION_HEADS) if attention else nn.Identity()

    def forward(self, x: Tensor, time_embedding: Tensor) -> Tensor:
        """[B,C_in,M,H,W] -> [B,C_out,M,H,W]."""
        for block in self.blocks:
            x = block(x, time_embedding)
        return self.attention(x)


class VideoUNet3D(nn.Module):
    """Predicts the velocity of noisy middle frames given both contexts.

    Args:
        image_channels: 3 for RGB, 1 for gray.
        base_channels: width C of the first level, a multiple of 4.
        channel_mults: width of each level in units of C; its length is the number of levels.
        res_blocks: residual blocks per level and direction.
        temporal_attn_levels: levels with temporal attention (the bottleneck always has it).
        endpoint_context: observed frames K at each end.

    Attributes:
        activation_checkpointing: whether training keeps the inputs of each stage alone and computes the rest again.

    Raises: ValueError: for widths that do not divide into attention heads, or a level that does not exist.
    """

    def __init__(
        self,
        image_channels: int = 3,
        base_channels: int = 96,
        channel_mults: Sequence[int] = (1, 2, 4),
        res_blocks: int = 2,
        temporal_attn_levels: Sequence[int] = (1, 2),
        endpoint_context: int = 2,
    ):
        super().__init__()
        check_architecture(base_channels, channel_mults, res_blocks, temporal_attn_levels, endpoint_context)
        self.image_channels = image_channels
        self.base_channels = base_channels
        self.endpoint_context = endpoint_context
        self.activation_checkpointing = False
        widths = [base_channels * mult for mult in channel_mults]
        time_channels = 4 * base_channels

        self.time_mlp = nn.Sequential(
            nn.Linear(base_channels, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels)
        )
        self.endpoint_encoder = EndpointEncoder(image_channels, endpoint_context, base_channels, widths)

        self.stem = FrameConv3d(3 * image_channels, base_channels)  # x_t and the two nearest frames
        self.stem_film = FiLM(base_channels, base_channels)

        self.down_films, self.down_levels, self.downsamples = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.skip_films, self.up_films = nn.ModuleList(), nn.ModuleList()
        self.up_levels, self.upsamples = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            above = widths[i - 1] if i else base_channels
            below = widths[i + 1] if i + 1 < len(widths) else width
            attention = i in temporal_attn_levels
            self.down_films.append(FiLM(width, above))
            self.down_levels.append(Level(above, width, time_channels, res_blocks, attention))
            self.downsamples.append(Downsample(width))
            self.skip_films.append(FiLM(width, width))
            self.upsamples.append(Upsample(below, width))
            self.up_levels.append(Level(2 * width, width, time_channels, res_blocks, attention))
            self.up_films.append(FiLM(width, width))

        self.bottleneck_film = FiLM(widths[-1], widths[-1])
        self.bottleneck_in = ResBlock3D(widths[-1], widths[-1], time_channels)
        self.bottleneck_attention = TemporalAttentionBlock(widths[-1], ATTENTION_HEADS)
        self.bottleneck_out = ResBlock3D(widths[-1], widths[-1], time_channels)

        self.out = nn.Sequential(
            nn.GroupNorm(math.gcd(32, base_channels), base_channels),
            nn.SiLU(),
            FrameConv3d(base_channels, image_channels),
        )
        nn.init.zeros_(self.out[-1].weight)
        nn.init.zeros_(self.out[-1].bias)

    def set_memory_format(self, channels_last: bool | None = None) -> "VideoUNet3D":
        """Choose where the channels of convolutions lie in memory; outputs agree to rounding.

        Args:
            channels_last: innermost, or outermost as torch's default. None = innermost on a CPU, where activations
                follow and convolutions are faster (benchmarks/LOG.md); on CUDA torch's norms bring the default back.

        Returns: self.
        """
        channels_last = self.stem.weight.is_cpu if channels_last is None else channels_last
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        for parameter in self.parameters():
            if parameter.dim() in (4, 5):
                memory_format = formats.get(parameter.dim(), torch.contiguous_format)
                parameter.data = parameter.data.contiguous(memory_format=memory_format)
        return self

    def compile_for_sampling(self) -> "VideoUNet3D":
        """torch.compile both steps of sampling, for fixed shapes; the state dict keeps its names. Returns self."""
        self.encode_contexts = torch.compile(self.encode_contexts, dynamic=False)
        self.denoise = torch.compile(self.denoise, dynamic=False)
        return self

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: every level halves them."""
        return 2 ** len(self.down_levels)

    def encode_contexts(self, start_context: Tensor, end_context: Tensor) -> ContextFeatures:
        """Everything `denoise` needs of the observed frames; independent of x_t and t, so done once per clip.

        Args:
            start_context: [B,C,K,H,W] in [-1, 1]; zeros for the unconditional branch.
            end_context: the same shape.

        Raises: ValueError: naming the expected and the given shape, or a size that the levels do not divide.
        """
        for name, context in (("start_context", start_context), ("end_context", end_context)):
            self._check_frames(name, context, self.endpoint_context)
        if start_context.shape != end_context.shape:
            raise ValueError(
                "start_context and end_context must have one shape "
                f"(got {tuple(start_context.shape)} and {tuple(end_context.shape)})"
            )
        return self.endpoint_encoder(start_context, end_context)

    def denoise(self, x_t: Tensor, t: Tensor, features: ContextFeatures) -> Tensor:
        """The velocity of x_t.

        Args:
            x_t: noisy middle frames, [B,C,M,H,W], any M >= 1.
            t: diffusion index per clip, [B] long.
            features: of `encode_contexts`, for the same clips.

        Returns: v, [B,C,M,H,W].
        Raises: ValueError: if x_t does not fit the image channels or the contexts' batch and size.
        """
        self._check_frames("x_t", x_t)
        if x_t.shape[:1] + x_t.shape[3:] != features.nearest.shape[:1] + features.nearest.shape[2:]:
            raise ValueError(
                "x_t must have the batch, height and width of its contexts "
                f"(got x_t {tuple(x_t.shape)}, nearest observed frames {tuple(features.nearest.shape)})"
            )
        time_embedding = self.time_mlp(sinusoidal_embedding(t, self.base_channels).to(x_t.dtype))  # [B,4C]
        nearest = features.nearest.unsqueeze(2).expand(-1, -1, x_t.shape[2], -1, -1)  # [B,2*C_img,M,H,W]
        x = self.stem(torch.cat([x_t, nearest], dim=1))  # [B,C,M,H,W]
        x = self.stem_film(x, features.stem)

        skips = []
        for i, condition in enumerate(features.levels):
            skip, x = self._run(self._down, i, x, condition, time_embedding)  # [B,L[i],M,H/2^(i+1),W/2^(i+1)]
            skips.append(skip)
        x = self._run(self._bottleneck, x, features.bottleneck, time_embedding)  # [B,L[-1],M,H/2^n,W/2^n]
        for i in reversed(range(len(self.up_levels))):
            x = self._run(self._up, i, x, skips[i], features.levels[i], time_embedding)  # [B,L[i],M,H/2^i,W/2^i]
        return self.out(x)

    def _run(self, stage: Callable[..., Any], *inputs: Any) -> Any:
        """One stage; with activation checkpointing its inputs alone are kept for the backward pass."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        return stage(*inputs)

    def _down(self, i: int, x: Tensor, condition: Tensor, time_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Down level i, [B,L[i-1],M,H/2^i,W/2^i]: its skip, [B,L[i],M,H/2^i,W/2^i], and that at half the size."""
        x = self.down_levels[i](self.down_films[i](x, condition), time_embedding)
        return self.skip_films[i](x, condition), self.downsamples[i](x)

    def _bottleneck(self, x: Tensor, condition: Tensor, time_embedding: Tensor) -> Tensor:
        x = self.bottleneck_in(self.bottleneck_film(x, condition), time_embedding)
        return self.bottleneck_out(self.bottleneck_attention(x), time_embedding)

    def _up(self, i: int, x: Tensor, skip: Tensor, condition: Tensor, time_embedding: Tensor) -> Tensor:
        """Up level i, [B,L[i+1],M,H/2^(i+1),W/2^(i+1)] and its skip: [B,L[i],M,H/2^i,W/2^i]."""
        x = torch.cat([self.upsamples[i](x), skip], dim=1)  # [B,2*L[i],M,H/2^i,W/2^i]
        return self.up_films[i](self.up_levels[i](x, time_embedding), condition)

    def forward(self, x_t: Tensor, t: Tensor, start_context: Tensor, end_context: Tensor) -> Tensor:
        """`encode_contexts`, then `denoise`: what training calls."""
        return self.denoise(x_t, t, self.encode_contexts(start_context, end_context))

    def _check_frames(self, name: str, frames: Tensor, count: int | None = None) -> None:
        expected = f"[B,{self.image_channels},{count or 'M'},H,W]"
        if frames.dim() != 5 or frames.shape[1] != self.image_channels or count not in (None, frames.shape[2]):
            raise ValueError(f"{name} must be {expected} for this network (got {tuple(frames.shape)})")
        for side in frames.shape[3:]:
            check_size(side, self.size_multiple)


def check_architecture(
    base_channels: int,
    channel_mults: Sequence[int],
    res_blocks: int,
    temporal_attn_levels: Sequence[int],
    endpoint_context: int,
) -> None:
    """Refuse what cannot be built.

    Raises: ValueError: naming the argument, the rule and the value.
    """
    numbers = (base_channels, *channel_mults, res_blocks, *temporal_attn_levels, endpoint_context)
    if len(numbers) > LARGEST_NUMBER or not all(type(number) is int and number <= LARGEST_NUMBER for number in numbers):
        raise ValueError(f"the network's numbers must be integers of at most {LARGEST_NUMBER}")
    if len(channel_mults) > LARGEST_LEVELS or res_blocks > LARGEST_RES_BLOCKS:
        raise ValueError(
            f"channel_mults may be {LARGEST_LEVELS} numbers at most, res_blocks at most {LARGEST_RES_BLOCKS} "
            f"(got {len(channel_mults)}, {res_blocks})"
        )
    if base_channels < 4 or base_channels % ATTENTION_HEADS:
        raise ValueError(f"base_channels must be a positive multiple of {ATTENTION_HEADS} (got {base_channels})")
    if not channel_mults or min(channel_mults) < 1:
        raise ValueError(f"channel_mults must be one or more positive integers (got {list(channel_mults)})")
    if res_blocks < 1:
        raise ValueError(f"res_blocks must be at least 1 (got {res_blocks})")
    if endpoint_context < 1:
        raise ValueError(f"endpoint_context must be at least 1 (got {endpoint_context})")
    unknown = [level for level in temporal_attn_levels if not 0 <= level < len(channel_mults)]
    if unknown:
        raise ValueError(
            f"temporal_attn_levels must lie in [0, {len(channel_mults) - 1}], the levels of channel_mults "
            f"(got {unknown[0]})"
        )


def check_size(size: int, multiple: int) -> None:
    """Raises: ValueError: unless the network's levels, each of which halves a frame, divide its size in pixels."""
    if size % multiple:
        raise ValueError(f"size must be divisible by {multiple}, as each level of the network halves it (got {size})")


def blind_levels(base_channels: int, channel_mults: Sequence[int]) -> list[int]:
    """Levels whose norms have one channel per group: there a norm removes the added time embedding altogether."""
    return [i for i, mult in enumerate(channel_mults) if math.gcd(32, base_channels * mult) == base_channels * mult]


MODEL_CONFIG_KEYS = frozenset(
    ("image_channels", "base_channels", "channel_mults", "res_blocks", "temporal_attn_levels", "endpoint_context")
)


def build_model(model_config: Mapping[str, Any], device: str | None = None) -> VideoUNet3D:
    """The one place where a network is made: by training from its flags, by everything else from a checkpoint.

    Args:
        model_config: exactly the keys of MODEL_CONFIG_KEYS, the arguments of VideoUNet3D.
        device: of its weights; "meta" = shapes alone, for weights that a checkpoint holds; None = torch's default.

    Raises: ValueError: for a missing or unknown key, or a value that cannot be built.
    """
    if set(model_config) != MODEL_CONFIG_KEYS:
        difference = sorted(map(str, MODEL_CONFIG_KEYS.symmetric_difference(model_config)))
        raise ValueError(f"model_config must have the keys {sorted(MODEL_CONFIG_KEYS)} (differs in {difference})")
    if not all(isinstance(model_config[key], (list, tuple)) for key in ("channel_mults", "temporal_attn_levels")):
        raise ValueError("model_config: channel_mults and temporal_attn_levels must be lists of integers")
    with torch.device(device) if device else contextlib.nullcontext():
        return VideoUNet3D(**model_config)
