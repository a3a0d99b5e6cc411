"""VideoUNet3D: a 3-D U-Net over the middle frames, conditioned on both contexts by FiLM, as drawn in the README."""

import contextlib
import inspect
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
from models.modules.layers import group_norm, zero_module
from models.modules.temporal_attention import sinusoidal_embedding
from models.predictor import FramePredictor

ATTENTION_HEADS = 4
MAX_NUMBER = 4096  # in a model_config: an absurd one in a foreign checkpoint must not exhaust memory or time
MAX_LEVELS, MAX_RES_BLOCKS = 12, 64  # likewise: even without weights each module takes time


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
    """Predicts the velocity of noisy middle frames given both contexts; ValueError as `check_architecture`."""

    def __init__(
        self,
        image_channels: int = 3,  # 1 for gray
        base_channels: int = 96,  # width C of the first level, a multiple of 4
        channel_mults: Sequence[int] = (1, 2, 4),  # width of each level in units of C
        res_blocks: int = 2,  # per level and direction
        temporal_attn_levels: Sequence[int] = (1, 2),  # levels with temporal attention; the bottleneck always has it
        endpoint_context: int = 2,  # observed frames K at each end
        predictor_width: int = 0,  # of the predictor that is trained, saved and averaged with it; 0 = none
        timed: bool = False,  # for clips of any length and stride: contexts have a channel of times, see `add_times`
    ):
        super().__init__()
        check_architecture(base_channels, channel_mults, res_blocks, temporal_attn_levels, endpoint_context)
        if type(predictor_width) is not int or not 0 <= predictor_width <= MAX_NUMBER:
            raise ValueError(f"predictor_width must be an integer in [0, {MAX_NUMBER}] (got {predictor_width})")
        if type(timed) is not bool:
            raise ValueError(f"timed must be True or False (got {timed})")
        self.image_channels = image_channels
        self.base_channels = base_channels
        self.endpoint_context = endpoint_context
        self.timed = timed
        self.activation_checkpointing = False  # True: training keeps each stage's inputs alone and recomputes the rest
        c, time_channels = base_channels, 4 * base_channels
        widths = [c * mult for mult in channel_mults]  # L

        self.time_mlp = nn.Sequential(nn.Linear(c, time_channels), nn.SiLU(), nn.Linear(time_channels, time_channels))
        self.endpoint_encoder = EndpointEncoder(image_channels + timed, endpoint_context, c, widths)
        self.stem = FrameConv3d(3 * (image_channels + timed), c)  # x_t and the two nearest frames
        self.stem_film = FiLM(c, c)

        self.down_films, self.down_levels, self.downsamples, self.skip_films = (nn.ModuleList() for _ in range(4))
        self.up_films, self.up_levels, self.upsamples = (nn.ModuleList() for _ in range(3))
        neighbours = zip([c, *widths[:-1]], widths, [*widths[1:], widths[-1]], strict=True)
        for i, (above, width, below) in enumerate(neighbours):
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

        self.out = nn.Sequential(group_norm(c), nn.SiLU(), zero_module(FrameConv3d(c, image_channels)))
        ends = (image_channels, endpoint_context)
        self.predictor = FramePredictor(*ends, predictor_width, timed) if predictor_width else None

    def set_memory_format(self, channels_last: bool | None = None) -> "VideoUNet3D":
        """Lay out convolutions channels-last or, as torch's default, channels-first; outputs agree to rounding.

        None = last on a CPU, where that is faster (benchmarks/LOG.md); on CUDA torch's norms undo it. Returns self.
        """
        channels_last = self.stem.weight.is_cpu if channels_last is None else channels_last
        formats = {4: torch.channels_last, 5: torch.channels_last_3d} if channels_last else {}
        for parameter in self.parameters():
            memory_format = formats.get(parameter.dim(), torch.contiguous_format)
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
        return self

    def compile_for_sampling(self) -> "VideoUNet3D":
        """torch.compile both steps of sampling, for fixed shapes; the state dict keeps its names. Returns self."""
        self.encode_contexts = torch.compile(self.encode_contexts, dynamic=False)
        self.denoise = torch.compile(self.denoise, dynamic=False)
        return self

    @property
    def blind_levels(self) -> list[int]:
        """Levels whose norms have one channel per group: there a norm removes the added time embedding altogether."""
        norms = [level.blocks[0].norm2 for level in self.down_levels]
        return [i for i, norm in enumerate(norms) if norm.num_groups == norm.num_channels]

    @property
    def size_multiple(self) -> int:
        """Height and width must be multiples of this: every level halves them."""
        return 2 ** len(self.down_levels)

    def forward(self, x_t: Tensor, t: Tensor, start_context: Tensor, end_context: Tensor) -> Tensor:
        """`encode_contexts`, then `denoise`: what training calls."""
        return self.denoise(x_t, t, self.encode_contexts(start_context, end_context))

    def encode_contexts(self, start_context: Tensor, end_context: Tensor) -> ContextFeatures:
        """Everything `denoise` needs of the observed frames; independent of x_t and t, so done once per clip.

        Both are [B,C,K,H,W] in [-1, 1], zeros for the unconditional branch; ValueError if they do not fit the network.
        """
        self.check_contexts(start_context, end_context)
        return self.endpoint_encoder(start_context, end_context)

    def check_contexts(self, start_context: Tensor, end_context: Tensor) -> None:
        """Raises: ValueError: unless both are [B,C,K,H,W] of one shape that fits the network."""
        channels = self.image_channels + self.timed
        self._check_frames("start_context", start_context, channels, self.endpoint_context)
        self._check_frames("end_context", end_context, channels, self.endpoint_context)
        if start_context.shape != end_context.shape:
            got = f"{tuple(start_context.shape)} and {tuple(end_context.shape)}"
            raise ValueError(f"start_context and end_context must have one shape (got {got})")

    def denoise(self, x_t: Tensor, t: Tensor, features: ContextFeatures) -> Tensor:
        """The velocity v of noisy middle frames x_t, both [B,C,M,H,W] with any M >= 1, at t, [B] long.

        `features` are those of the same clips by `encode_contexts`; ValueError if x_t does not fit them.
        """
        self._check_frames("x_t", x_t, self.image_channels)
        nearest = features.nearest
        if x_t.shape[:1] + x_t.shape[3:] != nearest.shape[:1] + nearest.shape[2:]:
            got = f"x_t {tuple(x_t.shape)}, nearest observed frames {tuple(nearest.shape)}"
            raise ValueError(f"x_t must have the batch, height and width of its contexts (got {got})")

        time_embedding = self.time_mlp(sinusoidal_embedding(t, self.base_channels).to(x_t.dtype))  # [B,4C]
        nearest = nearest.unsqueeze(2).expand(-1, -1, x_t.shape[2], -1, -1)  # [B,2*C_img,M,H,W]
        maps = [x_t, nearest]
        if self.timed:  # the place of each frame on the way from start to end, in (-1, 1)
            m = x_t.shape[2]
            share = torch.arange(1, m + 1, device=x_t.device, dtype=x_t.dtype) / (m + 1)
            maps.append((2 * share - 1).view(1, 1, m, 1, 1).expand(len(x_t), -1, -1, *x_t.shape[3:]))
        x = self.stem(torch.cat(maps, dim=1))  # [B,C,M,H,W]
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
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(stage, *inputs, use_reentrant=False, preserve_rng_state=False)  # nothing in it is random
        return stage(*inputs)

    def _down(self, i: int, x: Tensor, condition: Tensor, time_embedding: Tensor) -> tuple[Tensor, Tensor]:
        x = self.down_levels[i](self.down_films[i](x, condition), time_embedding)  # [B,L[i],M,H/2^i,W/2^i]
        return self.skip_films[i](x, condition), self.downsamples[i](x)

    def _bottleneck(self, x: Tensor, condition: Tensor, time_embedding: Tensor) -> Tensor:
        x = self.bottleneck_in(self.bottleneck_film(x, condition), time_embedding)
        return self.bottleneck_out(self.bottleneck_attention(x), time_embedding)

    def _up(self, i: int, x: Tensor, skip: Tensor, condition: Tensor, time_embedding: Tensor) -> Tensor:
        x = torch.cat([self.upsamples[i](x), skip], dim=1)  # [B,2*L[i],M,H/2^i,W/2^i]
        return self.up_films[i](self.up_levels[i](x, time_embedding), condition)

    def _check_frames(self, name: str, frames: Tensor, channels: int, count: int | None = None) -> None:
        if frames.dim() != 5 or frames.shape[1] != channels or count not in (None, frames.shape[2]):
            expected = f"[B,{channels},{count or 'M'},H,W]"
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
    """Refuse what cannot be built: ValueError, naming the argument, the rule and the value."""
    numbers = (base_channels, *channel_mults, res_blocks, *temporal_attn_levels, endpoint_context)
    if len(numbers) > MAX_NUMBER or not all(type(number) is int and number <= MAX_NUMBER for number in numbers):
        raise ValueError(f"the network's numbers must be integers of at most {MAX_NUMBER}")
    levels = len(channel_mults)
    if levels > MAX_LEVELS or res_blocks > MAX_RES_BLOCKS:
        rule = f"channel_mults may be {MAX_LEVELS} numbers at most, res_blocks at most {MAX_RES_BLOCKS}"
        raise ValueError(f"{rule} (got {levels}, {res_blocks})")
    if base_channels < 1 or base_channels % ATTENTION_HEADS:
        raise ValueError(f"base_channels must be a positive multiple of {ATTENTION_HEADS} (got {base_channels})")
    if min(channel_mults, default=0) < 1:
        raise ValueError(f"channel_mults must be one or more positive integers (got {list(channel_mults)})")
    for name, number in (("res_blocks", res_blocks), ("endpoint_context", endpoint_context)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1 (got {number})")
    for level in temporal_attn_levels:
        if not 0 <= level < levels:
            rule = f"temporal_attn_levels must lie in [0, {levels - 1}], the levels of channel_mults"
            raise ValueError(f"{rule} (got {level})")


def check_size(size: int | Sequence[int], multiple: int) -> None:
    """Raises: ValueError: unless the network's levels, each of which halves a frame, divide its sides in pixels."""
    if any(side % multiple for side in ([size] if isinstance(size, int) else size)):
        raise ValueError(f"size must be divisible by {multiple}, as each level of the network halves it (got {size})")


def build_model(model_config: Mapping[str, Any], device: str | None = None) -> VideoUNet3D:
    """The one place where a network is made: by training from its flags, by everything else from a checkpoint.

    Args:
        model_config: exactly the arguments of VideoUNet3D; ValueError for another key, or a value out of range.
        device: of its weights; "meta" = shapes alone, for weights that a checkpoint holds; None = torch's default.
    """
    keys = set(inspect.signature(VideoUNet3D).parameters)
    if {*model_config, "predictor_width", "timed"} != keys:  # these two are left out where they are not used
        difference = sorted(map(str, keys.symmetric_difference(model_config)))
        raise ValueError(f"model_config must have the keys {sorted(keys)} (differs in {difference})")
    if not all(isinstance(model_config[key], (list, tuple)) for key in ("channel_mults", "temporal_attn_levels")):
        raise ValueError("model_config: channel_mults and temporal_attn_levels must be lists of integers")
    with torch.device(device) if device else contextlib.nullcontext():
        return VideoUNet3D(**model_config)
