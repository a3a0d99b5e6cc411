"""What a run learns, picked once: its network, its loss, and what its checkpoints say of it."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion.loss import (
    DiffusionTask,
    diffusion_loss,
    diffusion_validation_losses,
    predictor_loss,
    predictor_validation_losses,
)
from diffusion.noise import INIT, NoiseConfig, generator_for
from diffusion.pipeline import MiddleFramePipeline, load_network
from diffusion.residual import RESIDUAL_CORRELATION, guide_channels
from diffusion.schedule import DiffusionSchedule
from models.modules.layers import use_fast_layout
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from training.arguments import MODEL_FLAGS, UNSAVED_FLAGS
from training.distributed import print0, rank, world_size
from utils.checkpoint import checkpoint_errors
from utils.video_utils import as_pair


class Objective(NamedTuple):
    """One of the two objectives, with all that it needs."""

    loss: Callable[..., Tensor]  # (model, start, middle, end, generator) -> a loss per clip
    validation_losses: Callable[..., Tensor]  # (model, start, middle, end, clips' numbers)
    pipe: MiddleFramePipeline  # samples with the EMA, for previews


def describe_network(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the network that the run trains."""
    config = {
        "image_channels": 1 if args.color_mode == "gray" else 3,
        "endpoint_context": args.endpoint_context,
    }
    if args.train == "predictor":
        # At 64x64 patches of 4 learn as much a step in half the time, at 32x32 less (LOG.md).
        patch = 4 if min(as_pair(args.size)) >= 64 else 2
        return {**config, "any_length": isinstance(args.num_frames, list), "patch": patch}
    if args.predictor:
        config["guide_channels"] = guide_channels(config["image_channels"])
    return {**config, **{name: getattr(args, name) for name in MODEL_FLAGS}}


def crop_size(size: int | list[int], multiple: int) -> tuple[int, int]:
    """Height and width of the windows on which refining is trained: half the sides, rounded up."""
    height, width = (-(-side // (2 * multiple)) * multiple for side in as_pair(size))
    return height, width


def describe_clips(args: argparse.Namespace) -> dict[str, Any]:
    """What a clip is to sampling, unless told otherwise; of --T 6 12 the longest."""
    return {
        "num_frames": as_pair(args.num_frames)[1],
        "size": args.size,
        "frame_stride": args.frame_stride,
        "color_mode": args.color_mode,
    }


def build_network(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The network that the run trains, with fresh weights by the seed."""
    torch.manual_seed(generator_for(args.seed, INIT).initial_seed())
    network = {"predictor": FramePredictor, "diffusion": VideoUNet3D}[args.train]
    return use_fast_layout(network(**describe_network(args)).to(device))


def compile_network(network: nn.Module, num_frames: int | list[int]) -> None:
    """torch.compile in place, so that the state dict keeps its names, where a compiler is."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in names):
        print0("--compile: no C++ compiler was found, training goes on without", file=sys.stderr)
        return
    # Of a range of lengths there may be more versions than torch keeps, so one has to fit all.
    network.compile(dynamic=None if isinstance(num_frames, list) else False)


def pick_objective(
    args: argparse.Namespace,
    ema: nn.Module,
    predictor: dict[str, Any] | None,
    val_clips: int,
    amp_dtype: torch.dtype | None,
) -> Objective:
    """The objective of --train, around the frozen predictor of that config and weights, if any."""
    device = next(ema.parameters()).device
    with checkpoint_errors(args.predictor):
        frozen = load_network(FramePredictor, predictor, args.predictor, device)
    task = DiffusionTask(
        schedule=DiffusionSchedule(args.timesteps, args.beta_schedule).to(device),
        noise=NoiseConfig(args.noise_offset, RESIDUAL_CORRELATION if frozen else 0.0),
        predictor=frozen,
        temporal_loss_weight=args.temporal_loss_weight,
        cfg_drop_prob=args.cfg_drop_prob,
        part=(rank(), world_size()),
        crop=crop_size(args.size, ema.size_multiple) if frozen else None,
    )
    pipe = partial(
        MiddleFramePipeline,
        schedule=task.schedule,
        clip_config=describe_clips(args),
        noise=task.noise,
        amp_dtype=amp_dtype,
    )
    if args.train == "predictor":
        return Objective(
            loss=partial(predictor_loss, code_size=ema.code_size, part=task.part),
            validation_losses=predictor_validation_losses,
            pipe=pipe(model=None, predictor=ema),
        )
    return Objective(
        loss=partial(diffusion_loss, task=task),
        validation_losses=partial(
            diffusion_validation_losses, task=task, total_clips=val_clips, seed=args.seed
        ),
        pipe=pipe(model=ema, predictor=frozen),
    )


def describe_objective(
    args: argparse.Namespace, objective: Objective, predictor: dict[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint says of the run, beside its state."""
    noise = objective.pipe.noise
    return {
        "predictor": predictor,
        "model_config": describe_network(args),
        "diffusion_config": {
            "timesteps": args.timesteps,
            "schedule": args.beta_schedule,
            "noise_offset": noise.offset,
            "noise_correlation": noise.correlation,
        },
        "clip_config": describe_clips(args),
        "args": {name: value for name, value in vars(args).items() if name not in UNSAVED_FLAGS},
    }
