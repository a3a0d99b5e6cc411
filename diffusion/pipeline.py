"""MiddleFramePipeline: a trained checkpoint as something to call, from Python and from every script."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusion.hierarchy import Levels, fill_gap, plan_levels
from diffusion.noise import WHITE, NoiseConfig, generators_per_clip
from diffusion.residual import Prediction, Predictor
from diffusion.sampler import SAMPLERS, SPACINGS, check_sampler, is_guided, sample_middle, visited_timesteps
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import VideoUNet3D, build_model, check_size
from utils import flags
from utils.checkpoint import load_checkpoint, load_weights
from utils.device import autocast, choose_amp_dtype, resolve_device
from utils.distributed import print0
from utils.interpolators import load_interpolator
from utils.io import read_image
from utils.video_utils import FrameSize, add_times, clip_times, middle_length, resize_and_crop, to_float, to_gray

# Settings that go together: the reference design's; the fewest forwards that lose nothing against 100 DDIM steps in
# PSNR, SSIM and temporal error; and for a model with a predictor three steps, sharper than the prediction for half a dB
# (measured in docs/results.md).
SETTINGS = ("sampler", "steps", "spacing", "guidance_scale", "guidance_interval", "eta")
SAMPLER_PRESETS: dict[str, dict[str, Any]] = {
    "fast": dict(zip(SETTINGS, ("ddim", 5, "quadratic", 1.8, (0.3, 0.9), 0.0), strict=True)),
    "refine": dict(zip(SETTINGS, ("ddim", 3, "quadratic", 1.0, (0.0, 1.0), 0.0), strict=True)),
    "reference": dict(zip(SETTINGS, ("ddim", 40, "linspace", 1.8, (0.0, 1.0), 0.0), strict=True)),
}
PREDICTORS = ("none", "cross_fade", "learned", "flow", "rife")
# Of a Laplace distribution the deviation is 1.4 mean absolute errors; 2 leaves room for outliers.
ERRORS_PER_SCALE = 2.0
PIXEL_LIMIT = 4.0  # scales, 8 mean errors: beyond is 1 value in 3,000 of that distribution; see docs/results.md
LEFT_OUT = ("model", "ema", "optimizer", "rng")  # of what a checkpoint says of its training: the tensors
Frames = Tensor | Sequence[Any]


@dataclass(eq=False, repr=False)
class MiddleFramePipeline:
    """Generates the frames between two observed ends."""

    model: VideoUNet3D  # in eval mode, on its device
    schedule: DiffusionSchedule  # that it was trained with
    clip_config: Mapping[str, Any]  # num_frames, size, frame_stride and color_mode of training
    noise: NoiseConfig = WHITE  # of training
    amp_dtype: torch.dtype | None = None  # of autocast; None = float32
    trained: Mapping[str, Any] = field(default_factory=dict)  # the rest of a checkpoint: step, args, history, configs
    predictor: str = "none"  # of PREDICTORS: what guesses the middle, which the model then refines
    residual_scale: float | str = 1.0  # see `make_predictor`

    def __post_init__(self):
        self.device = next(self.model.parameters()).device
        self.schedule.to(self.device)
        self.predict = make_predictor(self.predictor, self.residual_scale, self.model)

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
        """Load a checkpoint of training; ValueError naming the file or the device if it cannot be used.

        Args:
            device: "auto", "cpu", "mps", "cuda" or "cuda:N".
            use_raw_model: take the trained weights instead of their EMA.
            amp: bf16 autocast on a GPU that has it.
            compile: torch.compile the network, for many clips of one shape.
        """
        checkpoint, target = load_checkpoint(path), resolve_device(device)
        config = checkpoint["diffusion_config"]
        try:
            schedule = DiffusionSchedule(config["timesteps"], config["schedule"])
            model = build_model(checkpoint["model_config"], "meta")
            predictor = config.get("predictor") or "none"
            scale = resolve_scale(predictor, config.get("residual_scale"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if use_raw_model and "model" not in checkpoint:
            raise ValueError(f"{path} holds EMA weights alone: --use_raw_model needs a checkpoint of training")
        load_weights(model, checkpoint["model" if use_raw_model else "ema"], path)
        model = model.to(target).set_memory_format().eval()
        if compile:
            model.compile_for_sampling()
        amp_dtype = torch.bfloat16 if amp and choose_amp_dtype(target) is torch.bfloat16 else None
        if (predictor == "learned") == (model.predictor is None):
            raise ValueError(f"{path}: its diffusion_config and its model_config disagree about the predictor")
        trained = {name: value for name, value in checkpoint.items() if name not in LEFT_OUT}
        how = {"amp_dtype": amp_dtype, "trained": trained, "predictor": predictor, "residual_scale": scale}
        noise = NoiseConfig(config["noise_offset"], config.get("noise_correlation") or 0.0)
        return cls(model, schedule, checkpoint["clip_config"], noise, **how)

    @property
    def endpoint_context(self) -> int:
        """Observed frames K at each end."""
        return self.model.endpoint_context

    @property
    def default_preset(self) -> str | None:
        """The sampler's preset where none is named: a refining model's own; None = see `sampler_settings`."""
        return None if self.predictor == "none" else "refine"

    def resolve_flags(self, args: argparse.Namespace) -> list[dict[str, Any]]:
        """Fill a script's clip flags that were not given as in training, and check them and those of the sampler.

        Returns: every combination of the sampler's flags, each as settings of a call.
        Raises: ValueError: naming the argument, the rule and the value.
        """
        for name in ("num_frames", "size", "frame_stride", "color_mode", "endpoint_context"):
            trained = self.endpoint_context if name == "endpoint_context" else self.clip_config[name]
            given = getattr(args, name)
            if given is None:
                setattr(args, name, trained)
            elif name in ("endpoint_context", "color_mode") and given != trained:
                raise ValueError(f"--{name} is fixed by {args.ckpt} (got {given}, trained with {trained})")
        grid = settings_grid(vars(args), self.default_preset)
        for way in grid:
            self.check_settings(way)
        middle_length(args.num_frames, args.endpoint_context)
        check_size(args.size, self.model.size_multiple)
        if not self.trained["args"].get("cfg_drop_prob") and any(way["guidance_scale"] != 1 for way in grid):
            remedy = f"it needs --guidance_scale 1 (--preset {self.default_preset or 'fast'} beside it)"
            print0(f"note: {args.ckpt} has no trained unconditional branch: {remedy}", file=sys.stderr)
        alone = self.trained["args"].get("predictor_steps") or 0 if self.predictor == "learned" else 0
        if self.trained["step"] <= alone and any(way["steps"] for way in grid):
            print0(f"note: {args.ckpt} has not begun to refine: --steps 0 gives what it has learned", file=sys.stderr)
        return grid

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Refuse settings that neither sampler nor checkpoint takes: ValueError, naming the argument and the value."""
        refines = self.predictor != "none"
        if settings["steps"] == 0 and not refines:
            raise ValueError("steps must be at least 1 for a model without a predictor (got 0)")
        if refines and settings.get("dynamic_threshold"):
            raise ValueError("dynamic_threshold must be off for a model with a predictor (got True)")
        if settings["steps"]:
            checked = {name: settings[name] for name in SETTINGS if name != "guidance_scale"}
            check_sampler(self.schedule.timesteps, **checked)

    def context(self, frames: Frames, size: FrameSize | None = None) -> Tensor:
        """K observed frames of one end as the network takes them, float [B,C,K,H,W] in [-1, 1] on its device.

        A tensor [B,C,K,H,W] or [C,K,H,W] (float in [-1, 1], or uint8) is taken as it is; anything else goes through
        `load_frames`, where None is the size of training. ValueError naming what is wrong with the frames.
        """
        if isinstance(frames, Tensor) and not (frames.is_floating_point() or frames.dtype == torch.uint8):
            raise ValueError(f"frames must be float in [-1, 1] or uint8 (got {frames.dtype})")
        if not isinstance(frames, Tensor):
            frames = load_frames(frames, size or self.clip_config["size"], self.clip_config["color_mode"])
        frames = to_float(frames) if frames.dtype == torch.uint8 else frames.float()
        return (frames[None] if frames.dim() == 4 else frames).to(self.device)

    def plan(self, num_middle: int) -> Levels:
        """The passes that fill a gap, see `plan_levels`; ValueError unless the model was trained on a range."""
        if not self.model.timed:
            raise ValueError("hierarchy may be used with a model trained on a range of --T or --frame_stride alone")
        return plan_levels(num_middle, middle_length(self.clip_config["num_frames"], self.endpoint_context))

    def __call__(
        self,
        start: Frames,
        end: Frames,
        *,
        num_middle: int | None = None,
        times: Sequence[int] | None = None,
        hierarchy: bool = False,
        num_samples: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callable[..., None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Draw middle frames: float32 [B*num_samples,C,M,H,W] in [-1, 1], the samples of a clip beside each other.

        Of a model with a predictor, 0 steps give the prediction alone, and the contexts that guidance drops are the
        network's: both its branches refine one prediction, as in training.

        Args:
            start: the first K frames, as `end` the last, see `context`.
            num_middle: frames to generate; None = as in training, of a range of them the most.
            times: source frame number of each frame of the clip, rising, which a model trained on a range of lengths or
                strides is told; None = evenly, at the stride of training, of a range the least.
            hierarchy: fill the gap in several passes, keyframes first, none longer than the clips of training.
            num_samples: different middles for each clip.
            generator: one for all, or one per clip and sample; None = torch's global one.
            callback: called at every step, see `sample_middle`; of a model with a predictor its x0_hat is a residual.
            settings: of `sampler_settings`, such as preset, steps or guidance_scale; ValueError if out of range.
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1 (got {num_samples})")
        contexts = [self.context(frames).repeat_interleave(num_samples, dim=0) for frames in (start, end)]
        m = middle_length(self.clip_config["num_frames"], self.endpoint_context) if num_middle is None else num_middle
        if m < 1:
            raise ValueError(f"num_middle must be at least 1 (got {m})")
        settings = sampler_settings(self.default_preset, **settings)
        self.check_settings(settings)
        if times is None:
            times = clip_times(m + 2 * self.endpoint_context, self.clip_config["frame_stride"])
        if len(times) != m + 2 * self.endpoint_context or any(b <= a for a, b in pairwise(times)):
            raise ValueError(f"times must be one rising number for each frame of the clip (got {list(times)})")
        if hierarchy:
            levels, k = self.plan(m), self.endpoint_context
            draw = {"generator": generators_per_clip(generator, len(contexts[0])), "callback": callback, **settings}

            def one_pass(start: Tensor, end: Tensor, num_middle: int, numbers: list[int]) -> Tensor:
                return self(start, end, num_middle=num_middle, times=[times[number + k] for number in numbers], **draw)

            return fill_gap(one_pass, *contexts, levels)
        if self.model.timed:
            contexts = add_times(*contexts, times)
        draw = {"noise": self.noise, "generator": generator, "callback": callback}
        with autocast(self.device, self.amp_dtype):
            if self.predictor != "none":  # what is predicted from must fit, as what is sampled from
                self.model.check_contexts(*contexts)
            prediction = self.predict(*contexts, m)
            if settings["steps"] == 0:
                return prediction.frames
            draw["x0_range"] = prediction.residual_range
            frames = {"num_middle": m, "channels": self.model.image_channels}
            residual = sample_middle(self.model, self.schedule, *contexts, **frames, **draw, **settings)
        middle = prediction.to_middle(residual)
        return middle.clamp(-1, 1) if settings.get("clip_x0", True) else middle  # from what its scale rounded


def resolve_scale(predictor: str, scale: float | str | None) -> float | str:
    """The residual scale of a predictor: a number, "measured" on training clips, or "pixel"; None = what suits it.

    Raises: ValueError: for a word that does not suit it, or a number without a predictor.
    """
    suiting = {"none": 1.0, "learned": "pixel"}.get(predictor, "measured")
    if scale is None or scale == suiting:
        return suiting
    if predictor == "none" or isinstance(scale, str):
        allowed = "left out" if predictor == "none" else f"a number or {suiting}"
        raise ValueError(f"residual_scale must be {allowed} with predictor {predictor} (got {scale})")
    return scale


def make_predictor(name: str, scale: float | str, model: VideoUNet3D) -> Predictor:
    """The predictor of that name (of PREDICTORS), without gradients, its frames clipped to [-1, 1].

    Args:
        scale: of residuals, a number above 0, or "pixel": ERRORS_PER_SCALE errors that the learned predictor expects,
            with residuals cut at PIXEL_LIMIT.
        model: whose `predictor` is the learned one; a flow network runs on its device.

    Raises: ValueError: naming the package to install for flow or rife where it is absent.
    """
    if name == "none":
        return lambda start, end, num_middle: Prediction()
    if name != "learned":
        interpolate = load_interpolator(name, next(model.parameters()).device)
        c = model.image_channels  # without the times of a timed model

        def interpolated(start: Tensor, end: Tensor, num_middle: int) -> Prediction:
            return Prediction(interpolate(start[:, :c], end[:, :c], num_middle).clamp(-1, 1), scale)

        return interpolated

    @torch.no_grad()
    def learned(start: Tensor, end: Tensor, num_middle: int) -> Prediction:
        frames, log_error = model.predictor(start, end, num_middle)
        if scale != "pixel":
            return Prediction(frames.clamp(-1, 1), scale)
        return Prediction(frames.clamp(-1, 1), ERRORS_PER_SCALE * log_error.exp(), PIXEL_LIMIT)

    return learned


def load_frames(frames: Sequence[Any], size: FrameSize, color_mode: str) -> Tensor:
    """Frames in time order as one context, uint8 [1,C,K,H,W], resized and centre-cropped as clips are.

    Each is a path, a PIL image or an array uint8 [H,W] or [H,W,3]; ValueError if it is anything else.
    """
    if isinstance(frames, str) or not isinstance(frames, (Sequence, np.ndarray)) or not len(frames):
        raise ValueError(f"frames must be a sequence of K images (got {frames!r})")
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


def sampler_settings(default: str | None = None, preset: str | None = None, **given: Any) -> dict[str, Any]:
    """Arguments of `sample_middle`: those given (None counts as not given), over those of a preset.

    Without a preset it is `default`; without that "fast", or "reference" where any setting of a preset is given.
    """
    given = {name: value for name, value in given.items() if value is not None}
    chosen = preset or default or ("reference" if any(name in given for name in SETTINGS) else "fast")
    if chosen not in SAMPLER_PRESETS:
        raise ValueError(f"preset must be one of {', '.join(SAMPLER_PRESETS)} (got {chosen})")
    return SAMPLER_PRESETS[chosen] | given


def settings_grid(given: Mapping[str, Any], default: str | None = None) -> list[dict[str, Any]]:
    """Every combination of a script's sampler flags, of which lists are alternatives; see `sampler_settings`."""
    values = {name: given[name] for name in ("preset", *SETTINGS, "clip_x0", "dynamic_threshold")}
    values["guidance_interval"] = tuple(given["guidance_interval"] or ()) or None  # a pair is one value
    alternatives = [value if isinstance(value, list) else [value] for value in values.values()]
    combinations = (dict(zip(values, combination, strict=True)) for combination in product(*alternatives))
    grid = [sampler_settings(default, **combination) for combination in combinations]
    return [settings for i, settings in enumerate(grid) if settings not in grid[:i]]


def describe_settings(settings: Mapping[str, Any]) -> str:
    """A sampler's settings in few words, as "ddim 40 steps, guidance 1.8"."""
    if settings["steps"] == 0:
        return "predictor alone"
    low, high = settings["guidance_interval"]
    interval = f" in [{low:g}, {high:g}]" if (low, high) != (0, 1) else ""
    spacing = f" {settings['spacing']}" if settings["spacing"] != "linspace" else ""
    eta = f", eta {settings['eta']:g}" if settings["eta"] else ""
    guidance = f"guidance {settings['guidance_scale']:g}{interval}"
    return f"{settings['sampler']} {settings['steps']}{spacing} steps, {guidance}{eta}"


def forwards_per_clip(timesteps: int, settings: Mapping[str, Any]) -> int:
    """Network forwards (nfe) that one sample costs: one per step, and one more where the step is guided."""
    if settings["steps"] == 0:
        return 0
    visited = visited_timesteps(timesteps, settings["steps"], settings["spacing"])
    guidance = settings["guidance_scale"], settings["guidance_interval"]
    return len(visited) + sum(is_guided(t, timesteps, *guidance) for t in visited)


def add_sampler_flags(group: argparse._ArgumentGroup, several: bool = False) -> None:
    """The flags that say how middle frames are sampled.

    With `several`, --preset, --sampler, --steps and --guidance_scale take any number of values.
    """
    add, grid = group.add_argument, {"nargs": "+"} if several else {}
    each = "; several values = every combination" if several else ""
    described = "; ".join(f"{name} = {describe_settings(settings)}" for name, settings in SAMPLER_PRESETS.items())
    others = "--sampler, --steps, --spacing, --guidance_scale, --guidance_interval or --eta"
    preset = f"sampler settings that go together: {described}; None = refine for a model with a predictor, else fast,"
    preset += f" or reference where {others} is given"
    add("--preset", choices=tuple(SAMPLER_PRESETS), **grid, help=preset)
    sampler = f"ddim, or dpmpp_2m: second order, DPM-Solver++(2M); None = the preset's{each}"
    add("--sampler", choices=SAMPLERS, **grid, help=sampler)
    steps = "sampler steps, 0 = the prediction of a refining model alone"
    add("--steps", type=flags.non_negative_int, **grid, help=f"{steps}; None = the preset's{each}")
    spacing = "linspace = evenly, quadratic = closer together towards clean frames, trailing = evenly, ending a stride"
    add("--spacing", choices=SPACINGS, help=f"timesteps visited: {spacing} above clean; None = the preset's")
    scale = "weight of the contexts: 1 = plain conditional (one forward per step), above 1 = guided, 0 = ignored"
    add("--guidance_scale", type=flags.non_negative_float, **grid, help=f"{scale}; None = the preset's{each}")
    interval = "guide between these shares of the noise schedule only, 0 = clean, 1 = noise; None = the preset's"
    passes = "fill long gaps in passes, keyframes first, none longer than the training's clips"
    add("--hierarchy", action="store_true", help=f"{passes}; for models trained on a range of --T or --frame_stride")
    add("--guidance_interval", type=flags.probability, nargs=2, metavar=("LO", "HI"), help=interval)
    add("--eta", type=flags.probability, help="0 = deterministic .. 1 = DDPM's noise, ddim only; None = the preset's")
    add("--seed", type=flags.seed_int, default=0, help="seed of the noise, per clip and sample")
    add("--clip_x0", **flags.switch(True), help="clip clean predictions to the range of pixels at every step")
    threshold = "scale clean predictions by a percentile instead of clipping them"
    add("--dynamic_threshold", **flags.switch(False), help=threshold)
    batch = "clips per forward pass; lower it on OOM. Results depend on it by rounding only"
    add("--batch_size", type=flags.positive_int, default=8, help=batch)
    add("--amp", **flags.switch(True), help="bf16 autocast on a GPU that has it; does nothing elsewhere")
    add("--compile", **flags.switch(False), help="compile the network: a minute or more at the start, for many clips")
