"""MiddleFramePipeline: a trained checkpoint as something to call, from Python and from every script."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.sampler import check_sampler, is_guided, sample_middle, visited_timesteps
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import VideoUNet3D, build_model, check_size
from utils.checkpoint import load_checkpoint, load_weights
from utils.device import autocast, choose_amp_dtype, resolve_device
from utils.io import read_image
from utils.video_utils import middle_length, resize_and_crop, to_float, to_gray

# Settings that go together: the reference design's, and the fewest forwards that lose nothing against 100 DDIM steps in
# PSNR, SSIM and temporal error (measured in docs/results.md).
SETTINGS = ("sampler", "steps", "spacing", "guidance_scale", "guidance_interval", "eta")
SAMPLER_PRESETS: dict[str, dict[str, Any]] = {
    "fast": dict(zip(SETTINGS, ("ddim", 5, "quadratic", 1.8, (0.3, 0.9), 0.0), strict=True)),
    "reference": dict(zip(SETTINGS, ("ddim", 40, "linspace", 1.8, (0.0, 1.0), 0.0), strict=True)),
}
LEFT_OUT = ("model", "ema", "optimizer", "rng")  # of what a checkpoint says of its training: the tensors
Frames = Tensor | Sequence[Any]


class MiddleFramePipeline:
    """Generates the frames between two observed ends.

    Args:
        model: the network, in eval mode, on its device.
        schedule: the noise schedule it was trained with.
        clip_config: num_frames, size, frame_stride and color_mode of training.
        noise_offset: of training.
        amp_dtype: of autocast; None = float32.
        trained: the rest of a checkpoint: step, args, history and configurations.
    """

    def __init__(
        self,
        model: VideoUNet3D,
        schedule: DiffusionSchedule,
        clip_config: Mapping[str, Any],
        noise_offset: float = 0.0,
        amp_dtype: torch.dtype | None = None,
        trained: Mapping[str, Any] | None = None,
    ):
        self.model = model
        self.device = next(model.parameters()).device
        self.schedule = schedule.to(self.device)
        self.clip_config = clip_config
        self.noise_offset = noise_offset
        self.amp_dtype = amp_dtype
        self.trained = trained or {}

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        *,
        use_raw_model: bool = False,
        amp: bool = True,
        compile: bool = False,
    ) -> "MiddleFramePipeline":
        """Load a checkpoint of training.

        Args:
            device: "auto", "cpu", "mps", "cuda" or "cuda:N".
            use_raw_model: take the trained weights instead of their EMA.
            amp: bf16 autocast on a GPU that has it.
            compile: torch.compile the network, for many clips of one shape.

        Raises: ValueError: naming the file or the device, if it cannot be used.
        """
        checkpoint, target = load_checkpoint(path), resolve_device(device)
        try:
            model = build_model(checkpoint["model_config"], "meta")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        load_weights(model, checkpoint["model" if use_raw_model else "ema"], path)
        model = model.to(target).set_memory_format().eval()
        config = checkpoint["diffusion_config"]
        amp_dtype = choose_amp_dtype(target) if amp else None
        trained = {name: value for name, value in checkpoint.items() if name not in LEFT_OUT}
        return cls(
            model.compile_for_sampling() if compile else model,
            DiffusionSchedule(config["timesteps"], config["schedule"]),
            checkpoint["clip_config"],
            config["noise_offset"],
            amp_dtype if amp_dtype is torch.bfloat16 else None,
            trained,
        )

    @property
    def endpoint_context(self) -> int:
        """Observed frames K at each end."""
        return self.model.endpoint_context

    @property
    def is_guidable(self) -> bool:
        """Whether training dropped contexts, so that guidance has an unconditional branch."""
        return bool(self.trained["args"].get("cfg_drop_prob")) if self.trained else True

    def check_clip(self, num_frames: int, size: int) -> None:
        """Raises: ValueError: unless clips of so many frames and pixels can be generated."""
        middle_length(num_frames, self.endpoint_context)
        check_size(size, self.model.size_multiple)

    def context(self, frames: Frames, size: int | None = None) -> Tensor:
        """K observed frames of one end as the network takes them, float [B,C,K,H,W] in [-1, 1] on its device.

        Args:
            frames: a tensor [B,C,K,H,W] or [C,K,H,W] (float in [-1, 1], or uint8), which is taken as it is; or K frames
                in time order, each a path, a PIL image or an array uint8 [H,W] or [H,W,3], resized and centre-cropped.
            size: height and width of frames that are resized; None = as in training.

        Raises: ValueError: naming what is wrong with the frames.
        """
        if not isinstance(frames, Tensor):
            frames = load_frames(frames, size or self.clip_config["size"], self.clip_config["color_mode"])
        frames = to_float(frames) if frames.dtype == torch.uint8 else frames
        return (frames[None] if frames.dim() == 4 else frames).to(self.device)

    def __call__(
        self,
        start: Frames,
        end: Frames,
        *,
        num_middle: int | None = None,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[..., None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw middle frames.

        Args:
            start: the first K frames, see `context`.
            end: the last K frames.
            num_middle: frames to generate; None = as in training.
            num_samples: different middles for each clip.
            generator: one for all, or one per clip and sample; None = torch's global one.
            callback: see `sample_middle`.
            settings: preset ("fast" or "reference") and arguments of `sample_middle` such as steps or guidance_scale;
                what is not given is the preset's, see `sampler_settings`.

        Returns: float32 [B*num_samples,C,M,H,W] in [-1, 1], the samples of a clip beside each other.
        Raises: ValueError: naming the argument, the rule and the value.
        """
        contexts = [self.context(frames).repeat_interleave(num_samples, dim=0) for frames in (start, end)]
        m = num_middle or middle_length(self.clip_config["num_frames"], self.endpoint_context)
        settings = sampler_settings(**settings)
        with autocast(self.device, self.amp_dtype):
            return sample_middle(
                self.model,
                self.schedule,
                *contexts,
                num_middle=m,
                noise_offset=self.noise_offset,
                generator=generator,
                callback=callback,
                **settings,
            )


def load_frames(frames: Sequence[Any], size: int, color_mode: str) -> Tensor:
    """Paths, PIL images or arrays in time order as one context, uint8 [1,C,K,size,size], treated as clip frames are."""
    pictures = []
    for frame in frames:
        if isinstance(frame, (str, Path)):
            picture = read_image(frame)
        else:
            pixels = np.asarray(frame.convert("RGB") if hasattr(frame, "convert") else frame)
            if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] != 3):
                raise ValueError(f"a frame must be uint8 [H,W] or [H,W,3] (got {pixels.dtype} {list(pixels.shape)})")
            picture = torch.from_numpy(np.atleast_3d(pixels).copy()).permute(2, 0, 1).expand(3, -1, -1)
        pictures.append(resize_and_crop(picture, size))
    stacked = torch.stack(pictures)  # [K,3,H,W]
    return (to_gray(stacked) if color_mode == "gray" else stacked).transpose(0, 1)[None]


# --- sampler settings: presets, and flags of scripts ------------------------------------------------------------------


def sampler_settings(preset: str | None = None, **given: Any) -> dict[str, Any]:
    """Arguments of `sample_middle`: those given (None counts as not given), over those of a preset.

    Args:
        preset: of SAMPLER_PRESETS; None = "fast", or "reference" where any of a preset's settings is given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    in_preset = any(name in given for name in SETTINGS)
    return SAMPLER_PRESETS[preset or ("reference" if in_preset else "fast")] | given


def settings_grid(flags: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of a script's sampler flags, of which lists are alternatives; see `sampler_settings`."""
    names = ("preset", *SETTINGS, "clip_x0", "dynamic_threshold")
    values = {
        name: tuple(flags[name]) if name == "guidance_interval" and flags[name] else flags[name] for name in names
    }
    alternatives = [value if isinstance(value, list) else [value] for value in values.values()]
    grid = [sampler_settings(**dict(zip(names, combination, strict=True))) for combination in product(*alternatives)]
    return [settings for i, settings in enumerate(grid) if settings not in grid[:i]]


def check_settings(timesteps: int, settings: Mapping[str, Any]) -> None:
    """Raises: ValueError: as `check_sampler`, for the settings of one sample."""
    check_sampler(timesteps, **{name: settings[name] for name in SETTINGS if name != "guidance_scale"})


def describe_settings(settings: Mapping[str, Any]) -> str:
    """A sampler's settings in few words, as "ddim 40 steps, guidance 1.8"."""
    low, high = settings["guidance_interval"]
    interval = f" in [{low:g}, {high:g}]" if (low, high) != (0, 1) else ""
    spacing = f" {settings['spacing']}" if settings["spacing"] != "linspace" else ""
    eta = f", eta {settings['eta']:g}" if settings["eta"] else ""
    guidance = f"guidance {settings['guidance_scale']:g}{interval}"
    return f"{settings['sampler']} {settings['steps']}{spacing} steps, {guidance}{eta}"


def forwards_per_clip(timesteps: int, settings: Mapping[str, Any]) -> int:
    """Network forwards (nfe) that one sample costs: one per step, and one more where the step is guided."""
    visited = visited_timesteps(timesteps, settings["steps"], settings["spacing"])
    scale, interval = settings["guidance_scale"], settings["guidance_interval"]
    return len(visited) + sum(is_guided(t, timesteps, scale, interval) for t in visited)
