"""MiddleFramePipeline: a trained checkpoint as something to call, from Python and every script."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.noise import WHITE, NoiseConfig, generators_per_clip
from diffusion.residual import predict, sample_codes, smooth_colours
from diffusion.sampler import (
    REFERENCE_SAMPLER,
    REFINING_SAMPLER,
    check_sampler,
    sample_middle,
)
from diffusion.schedule import DiffusionSchedule
from models.modules.layers import use_fast_layout
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from utils.checkpoint import checkpoint_errors, load_checkpoint, load_weights
from utils.device import autocast, choose_amp_dtype, resolve_device
from utils.images import Frames, load_context
from utils.video_utils import middle_length


@dataclass(eq=False, repr=False)
class MiddleFramePipeline:
    """Generates the frames between two observed ends."""

    model: VideoUNet3D | None  # the denoiser, in eval mode; None = there is a predictor only
    schedule: DiffusionSchedule  # that it was trained with
    clip_config: Mapping[str, Any]  # num_frames, size, frame_stride and color_mode of training
    noise: NoiseConfig = WHITE  # of training
    predictor: FramePredictor | None = None  # whose prediction the model refines
    amp_dtype: torch.dtype | None = None  # of autocast; None = float32
    trained: Mapping[str, Any] = field(default_factory=dict)  # step, args, history

    def __post_init__(self):
        network = self.model or self.predictor
        self.endpoint_context = network.endpoint_context
        self.image_channels = network.image_channels
        self.device = next(network.parameters()).device
        self.schedule.to(self.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        device: str = "auto",
        use_raw_model: bool = False,
    ) -> "MiddleFramePipeline":
        """Load the EMA of a checkpoint, or its raw weights; ValueError if it cannot be used."""
        target = resolve_device(device)
        checkpoint = load_checkpoint(path)
        with checkpoint_errors(path):
            config = checkpoint["diffusion_config"]
            schedule = DiffusionSchedule(config["timesteps"], config["schedule"])
            noise = NoiseConfig(config["noise_offset"], config["noise_correlation"])
            weights = checkpoint["model"] if use_raw_model else checkpoint["ema"]
            denoiser = {"config": checkpoint["model_config"], "weights": weights}
            predictor = checkpoint["predictor"]
            if checkpoint["args"]["train"] == "predictor":
                predictor = denoiser
                denoiser = None
            model = load_network(VideoUNet3D, denoiser, path, target)
            predictor = load_network(FramePredictor, predictor, path, target)
        amp_dtype = choose_amp_dtype(target)  # fp16 needs the loss scaler of training
        return cls(
            model=model,
            schedule=schedule,
            clip_config=checkpoint["clip_config"],
            noise=noise,
            predictor=predictor,
            amp_dtype=amp_dtype if amp_dtype is torch.bfloat16 else None,
            trained={name: checkpoint[name] for name in ("step", "args", "history")},
        )

    @property
    def sampler(self) -> dict[str, Any]:
        """The default settings of a call: those that suit this checkpoint."""
        if self.model is None:
            return {**REFINING_SAMPLER, "steps": 0}
        return dict(REFERENCE_SAMPLER if self.predictor is None else REFINING_SAMPLER)

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The default settings with the values given in their places.

        Raises: ValueError: for what sampler or checkpoint cannot take, naming flag and value.
        """
        settings = {**self.sampler, **given}
        steps = settings["steps"]
        if self.model is None and steps != 0:
            raise ValueError(f"--steps must be 0 for a predictor's own checkpoint (got {steps})")
        if self.predictor is None or steps != 0:
            interval = settings["guidance_interval"]
            spacing = settings["spacing"]
            check_sampler(self.schedule.timesteps, steps, spacing, interval, settings["eta"])
        return settings

    def __call__(
        self,
        start: Frames,
        end: Frames,
        *,
        num_middle: int | None = None,  # frames to generate; None = as in training
        num_samples: int = 1,  # different middles for each clip
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[..., None] | None = None,  # of every step, see `sample_middle`
        clip_x0: bool = True,  # clip clean predictions to the range of pixels at every step
        dynamic_threshold: bool = False,  # scale them by a percentile; not for residuals
        **settings: Any,
    ) -> Tensor:
        """Draw middle frames; the samples of a clip stand beside each other.

        Args:
            start: the first K frames, as `end` the last, see `load_context`.
            generator: one for all, or one per clip and sample; None = torch's global one.
            settings: in place of the default sampler's: steps (0 = the prediction), spacing,
                guidance_scale, guidance_interval, eta.

        Returns: [B*num_samples,C,M,H,W] float32 in [-1, 1].
        Raises: ValueError: naming an argument that is out of range.
        """
        settings = self.settings(settings)
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1 (got {num_samples})")
        if num_middle is None:
            num_middle = middle_length(self.clip_config["num_frames"], self.endpoint_context)
        if num_middle < 1:
            raise ValueError(f"num_middle must be at least 1 (got {num_middle})")
        if dynamic_threshold and self.predictor is not None:
            raise ValueError("--dynamic_threshold must be off for a checkpoint with a predictor")
        config = self.clip_config
        load = partial(load_context, size=config["size"], color_mode=config["color_mode"])
        start = load(start).to(self.device).repeat_interleave(num_samples, dim=0)
        end = load(end).to(self.device).repeat_interleave(num_samples, dim=0)
        expected = (self.image_channels, self.endpoint_context)
        if start.shape != end.shape or start.shape[1:3] != expected:
            rule = f"start and end must be frames [B,{expected[0]},{expected[1]},H,W] alike"
            raise ValueError(f"{rule} (got {tuple(start.shape)} and {tuple(end.shape)})")

        # Predict, and sample what the prediction misses.
        with autocast(self.device, self.amp_dtype):
            if settings["steps"] == 0:
                return predict(self.predictor, start, end, num_middle).frames
            code = None
            if self.predictor is not None:
                generator = generators_per_clip(generator, len(start))
                code = sample_codes(self.predictor, generator, self.device)
            prediction = predict(self.predictor, start, end, num_middle, code)
            residual = sample_middle(
                self.model,
                self.schedule,
                start,
                end,
                num_middle=num_middle,
                guide=prediction.guide,
                clip_x0=clip_x0,
                x0_range=prediction.residual_range,
                dynamic_threshold=dynamic_threshold,
                noise=self.noise,
                generator=generator,
                callback=callback,
                **settings,
            )
        if self.predictor is not None:
            residual = smooth_colours(residual)
        middle = prediction.to_middle(residual) + prediction.detail
        return middle.clamp(-1, 1) if clip_x0 else middle


def load_network(
    network: type, stored: Mapping[str, Any] | None, path: str | Path, device: torch.device
) -> Any:
    """A network of that class by its stored config and weights, in eval mode; None of None."""
    if stored is None:
        return None
    with torch.device("meta"):
        module = network(**stored["config"])
    load_weights(module, stored["weights"], path)
    return use_fast_layout(module.to(device)).eval().requires_grad_(False)
