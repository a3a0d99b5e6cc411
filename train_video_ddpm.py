"""Train the middle-frame diffusion model on a folder of MP4 clips, or on built-in clips when none is given.

The first and last K frames of a clip are given, those between are learned. Stop with Ctrl-C at any time; the same
command with --resume goes on from there.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.frame_cache import CachedFrames
from data.kinetics_video_dataset import (
    ClipBatches,
    DecodedFrames,
    ReadFailures,
    VideoClipDataset,
    collate,
    prepare_videos,
    steps_per_epoch,
)
from data.synthetic_videos import make_synthetic_videos
from diffusion.loss import validation_sum
from diffusion.noise import PREVIEW, generator_for
from diffusion.sampler import sample_middle
from diffusion.schedule import SCHEDULES, DiffusionSchedule
from models.video_unet3d import VideoUNet3D, blind_levels, check_architecture, forward_memory
from training.optimisation import (
    autocast,
    choose_amp_dtype,
    learning_rate,
    optimise,
    plan_learning_rate,
    trial_loss,
    use_fast_kernels,
)
from training.state import Saver, TrainingState, load_resumable, model_config_of, new_state, restore
from utils import distributed
from utils.checkpoint import LIMITS
from utils.flags import (
    Parser,
    decay,
    device_name,
    fraction,
    non_negative_float,
    non_negative_int,
    nonempty_path,
    positive_float,
    positive_int,
    probability,
    resolve_device,
)
from utils.io import contact_sheet, enlarge, observed_frames, remove_stale_temporaries, save_mp4, save_png
from utils.memory import check_memory, explaining_shortage
from utils.processes import end_children, loading_process_died
from utils.records import Records, save_run_description, save_training_curves
from utils.video_utils import cross_fade, join_clip, psnr, split_clip, to_float, to_uint8

PREVIEW_CLIPS = 8
MEMORY_FLAGS = "--batch_size (and raise --grad_accum), --size or --T, or pass --activation_checkpointing"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last is what batch systems send ahead of time

# What a checkpoint was trained as: network, clips, diffusion, and the split. On --resume these may not be changed.
FIXED_FLAGS = (
    "num_frames", "size", "frame_stride", "color_mode", "endpoint_context", "base_channels", "channel_mults",
    "res_blocks", "temporal_attn_levels", "timesteps", "beta_schedule", "noise_offset", "cfg_drop_prob",
    "temporal_loss_weight", "seed", "val_ratio",
)  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    # Five minutes on two CPU cores: small frames, a small network, few sampler steps.
    "demo": {
        "out_dir": "outputs/demo", "size": 32, "base_channels": 24, "channel_mults": [1, 2], "res_blocks": 1,
        "temporal_attn_levels": [1], "batch_size": 8, "lr": 2e-3, "warmup_steps": 50, "epochs": 22,
        "ema_decay": 0.99, "vis_every": 11, "vis_steps": 6, "vis_guidance_scale": 1.0, "log_every": 50,
        "num_workers": 0, "cache_videos": True,
    },
}  # fmt: skip


# --- flags ------------------------------------------------------------------------------------------------------------


def build_parser() -> Parser:
    """Every flag, with the reference design's defaults."""
    parser = Parser(__doc__)

    group = parser.add_argument_group("run")
    group.add_argument(
        "--out_dir", type=nonempty_path, default="outputs/train", help="folder for checkpoints, previews and records"
    )
    group.add_argument(
        "--resume", action="store_true",
        help="go on from last.pt in --out_dir with its own arguments; other flags given override it",
    )  # fmt: skip
    group.add_argument(
        "--preset", choices=sorted(PRESETS),
        help="fill the flags that are not given; demo: five CPU minutes on the built-in clips",
    )  # fmt: skip
    group.add_argument(
        "--dry_run", action="store_true",
        help="two steps, a validation, a preview and a save, in a folder dry_run below --out_dir",
    )  # fmt: skip
    group.add_argument("--seed", type=non_negative_int, default=42, help="of split, weights, windows and noise")
    group.add_argument("--device", type=device_name, default="auto", help="auto = cuda where there is one, else cpu")

    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_root", type=nonempty_path, help="folder of MP4 files; None = the built-in clips, rendered once"
    )
    group.add_argument(
        "--val_ratio", type=fraction, default=0.01,
        help="share of files held out, where the folder has no videos_train/ and videos_val/ (or train/ and val/)",
    )  # fmt: skip
    group.add_argument("--max_videos", type=positive_int, help="use at most so many files in all; None = every file")
    group.add_argument("--num_workers", type=non_negative_int, default=4, help="loading processes; 0 = in the main one")
    group.add_argument(
        "--cache_videos", action=argparse.BooleanOptionalAction, default=False,
        help="decode every video once into a memory-mapped file in --cache_dir",
    )  # fmt: skip
    group.add_argument(
        "--cache_dir",
        type=nonempty_path,
        default="outputs/cache",
        help="folder for the file index, cached frames and built-in clips",
    )
    group.add_argument(
        "--hflip", action=argparse.BooleanOptionalAction, default=False, help="mirror half of the training clips"
    )
    group.add_argument(
        "--time_reverse", action=argparse.BooleanOptionalAction, default=False,
        help="play half of the training clips backwards, which swaps their contexts",
    )  # fmt: skip

    group = parser.add_argument_group("clip")
    group.add_argument("--T", dest="num_frames", type=positive_int, default=8, help="frames per clip, above 2 * K")
    group.add_argument("--endpoint_context", type=positive_int, default=2, help="observed frames K at each end")
    group.add_argument("--size", type=positive_int, default=64, help="height and width in pixels, after centre crop")
    group.add_argument(
        "--frame_stride", type=positive_int, default=1, help="source frames from one clip frame to the next"
    )
    group.add_argument("--color_mode", choices=("rgb", "gray"), default="rgb", help="3 channels or 1")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--base_channels", type=positive_int, default=96,
        help="width of the first level, a multiple of 4; prefer 3 * 2^n (24, 48, 96): the norms of 32 and fewer "
        "power-of-two channels erase the time embedding",
    )  # fmt: skip
    group.add_argument(
        "--channel_mults", type=positive_int, nargs="+", default=[1, 2, 4], help="width of each level in base_channels"
    )
    group.add_argument("--res_blocks", type=positive_int, default=2, help="residual blocks per level and direction")
    group.add_argument(
        "--temporal_attn_levels", type=non_negative_int, nargs="*", default=[1, 2],
        help="levels with temporal attention, 0 = full size; the bottleneck always has it",
    )  # fmt: skip

    group = parser.add_argument_group("diffusion")
    group.add_argument("--timesteps", type=positive_int, default=1000, help="length of the noise schedule")
    group.add_argument("--beta_schedule", choices=SCHEDULES, default="cosine", help="shape of the noise schedule")
    group.add_argument(
        "--cfg_drop_prob", type=probability, default=0.08, metavar="P",
        help="chance of zeroing both contexts of a clip, so guidance has an unconditional branch; 0 = never",
    )  # fmt: skip
    group.add_argument(
        "--temporal_loss_weight", type=non_negative_float, default=0.05,
        help="weight of the L1 between predicted and true frame differences; 0 = none",
    )  # fmt: skip
    group.add_argument(
        "--noise_offset", type=non_negative_float, default=0.0,
        help="deviation of a constant added to the noise per clip and channel; 0 = none",
    )  # fmt: skip

    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch_size", type=positive_int, default=8, help="clips per forward pass, of each process")
    group.add_argument("--grad_accum", type=positive_int, default=1, help="forward passes per optimiser step")
    group.add_argument("--lr", type=positive_float, default=1e-4, help="peak learning rate of AdamW, cosine to 0")
    group.add_argument("--warmup_steps", type=non_negative_int, default=0, help="steps of linear rise; 0 = none")
    group.add_argument("--epochs", type=positive_int, default=30, help="passes over the training clips")
    group.add_argument("--max_steps", type=non_negative_int, default=0, help="stop after so many steps; 0 = epochs")
    group.add_argument("--grad_clip", type=non_negative_float, default=1.0, help="largest gradient norm; 0 = any")
    group.add_argument("--ema_decay", type=decay, default=0.999, help="of the averaged weights, per step")
    group.add_argument(
        "--ema_update_after_step", type=non_negative_int, default=100, help="steps for which EMA is a plain copy"
    )
    group.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=True,
        help="autocast the network on CUDA; does nothing on CPU",
    )  # fmt: skip
    group.add_argument(
        "--amp_dtype", choices=("auto", "bf16", "fp16"), default="auto", help="auto = bf16 where the GPU has it"
    )
    group.add_argument(
        "--channels_last", action=argparse.BooleanOptionalAction,
        help="keep the channels of convolutions innermost in memory, the same function; None = on a CPU, where it is "
        "faster",
    )  # fmt: skip
    group.add_argument(
        "--activation_checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="compute each level's activations again in the backward pass instead of keeping them: less memory for "
        "long or large clips, a third more work",
    )  # fmt: skip
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the training forward"
    )

    group = parser.add_argument_group("validation and previews")
    group.add_argument("--vis_every", type=non_negative_int, default=1, help="epochs between previews; 0 = none")
    group.add_argument("--vis_guidance_scale", type=non_negative_float, default=1.5, help="1 = plain conditional")
    group.add_argument("--vis_steps", type=positive_int, default=40, help="sampler steps of a preview")
    group.add_argument(
        "--dynamic_threshold", action=argparse.BooleanOptionalAction, default=False,
        help="previews scale clean predictions by a percentile instead of clipping them",
    )  # fmt: skip

    group = parser.add_argument_group("output")
    group.add_argument("--log_every", type=positive_int, default=20, help="steps between lines of metrics.jsonl")
    group.add_argument(
        "--save_every",
        type=non_negative_int,
        default=0,
        help="steps between saves of last.pt within an epoch; 0 = none. The save before stays as prev.pt",
    )
    group.add_argument(
        "--save_minutes", type=non_negative_float, default=0.0, help="minutes between saves of last.pt; 0 = none"
    )
    group.add_argument(
        "--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="write TensorBoard events"
    )
    group.add_argument("--log_dir", help="folder for TensorBoard events; None = tensorboard below --out_dir")
    return parser


def resolve_arguments(
    parser: Parser, argv: list[str] | None
) -> tuple[argparse.Namespace, dict[str, Any] | None, Path | None]:
    """What the run will be: flags given, over the checkpoint's on --resume, over the preset's, over the defaults.

    Returns: the arguments, and the checkpoint to go on from with its file (None and None for a fresh run).
    Raises: ValueError: for a missing or present last.pt, or a flag that contradicts the checkpoint.
    """
    given = parser.parse_given(argv)
    values = vars(parser.defaults()) | PRESETS.get(given.get("preset"), {})
    folder = Path(given.get("out_dir", values["out_dir"]))
    there = [path for path in (folder / "last.pt", folder / "prev.pt") if path.exists()]
    checkpoint = source = None
    if given.get("resume"):
        if not there:
            raise ValueError(
                f"--resume: there is no {folder / 'last.pt'} to go on from; without --resume a new run starts"
            )
        checkpoint, source = load_resumable(folder)
        stored = {name: value for name, value in checkpoint["args"].items() if name in values}
        parser.check_stored(stored, source)
        for name in FIXED_FLAGS:
            if name in given and given[name] != stored.get(name):
                flag = "T" if name == "num_frames" else name
                raise ValueError(
                    f"--{flag} is fixed by {source} (got {given[name]}, the checkpoint has {stored.get(name)})"
                )
        for name, value in given.items():
            if name in stored and stored[name] != value:
                print(f"--{name} {value} overrides the checkpoint's {stored[name]}")
        values |= stored | {"out_dir": str(folder)}  # a run may have been moved
    elif there and not given.get("dry_run"):
        raise ValueError(f"--out_dir {folder} already holds a {there[0].name}; pass --resume or choose another folder")
    args = argparse.Namespace(**(values | given))
    check_arguments(args)
    return args, checkpoint, source


def check_arguments(args: argparse.Namespace) -> None:
    """The rules that join several flags.

    Raises: ValueError: naming the flag, the rule and the value.
    """
    t, k = args.num_frames, args.endpoint_context
    if t <= 2 * k:
        raise ValueError(
            f"--T must exceed 2 * --endpoint_context so that a middle exists (got --T {t}, --endpoint_context {k})"
        )
    multiple = 2 ** len(args.channel_mults)
    if args.size % multiple:
        raise ValueError(
            f"--size must be divisible by {multiple}, as each of the {len(args.channel_mults)} --channel_mults halves "
            f"it (got {args.size})"
        )
    if args.max_videos == 1:
        raise ValueError("--max_videos must be at least 2, one file for each split (got 1)")
    if args.vis_every and args.vis_steps > args.timesteps:
        raise ValueError(f"--vis_steps must be at most --timesteps {args.timesteps} (got {args.vis_steps})")
    for name, limit in LIMITS.items():
        value, flag = getattr(args, name), "T" if name == "num_frames" else name
        if value is not None and value > limit:
            raise ValueError(f"--{flag} must be at most {limit} (got {value})")
    check_architecture(
        args.base_channels, args.channel_mults, args.res_blocks, args.temporal_attn_levels, args.endpoint_context
    )


# --- stopping ---------------------------------------------------------------------------------------------------------


class StopRequest:
    """Remembers the first of STOP_SIGNALS, so that the loop can stop between two steps; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}

    def _receive(self, number: int, frame: Any) -> None:
        self.signal = number
        self.restore()

    def restore(self) -> None:
        """Put the former handlers back."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def outlive_first_signal(worker: int) -> None:
    """A loading process leaves stopping to the main one, even where a signal goes to the whole process group.

    Its death would break the main process in the middle of a save. The second SIGTERM ends it, as torch's own shutdown
    of a stuck process needs.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


# --- previews ---------------------------------------------------------------------------------------------------------


def preview(
    ema: VideoUNet3D,
    schedule: DiffusionSchedule,
    clip: Tensor,
    args: argparse.Namespace,
    amp_dtype: torch.dtype | None,
    first: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Regenerate the middle of fixed clips [B,C,T,H,W] from fixed noise; `first` is the number of the first of them.

    Returns: the generated clips, and the PSNR [B] in dB of their middle and of the cross-fade's.
    """
    start, middle, end = split_clip(clip, args.endpoint_context)
    m = middle.shape[2]
    with autocast(clip.device, amp_dtype):
        generated = sample_middle(
            ema, schedule, start, end, num_middle=m, steps=args.vis_steps, guidance_scale=args.vis_guidance_scale,
            dynamic_threshold=args.dynamic_threshold, noise_offset=args.noise_offset,
            generator=[generator_for(args.seed, PREVIEW, first + i) for i in range(len(clip))],
        )  # fmt: skip
    faded = cross_fade(start, end, m)
    return join_clip(start, generated, end), psnr(generated, middle), psnr(faded, middle)


def save_preview(stem: Path, clip: Tensor, generated: Tensor, endpoint_context: int) -> Tensor:
    """Write STEM.png, a sheet of true rows above generated ones, and STEM.mp4 of the same; returns the sheet."""
    truth, made = to_uint8(clip).cpu(), to_uint8(generated).cpu()  # [B,C,T,H,W]
    rows = [row for pair in zip(truth, made, strict=True) for row in pair]
    sheet = contact_sheet(rows, observed_frames(clip.shape[2], endpoint_context))
    save_png(stem.with_suffix(".png"), sheet)
    video = torch.cat([torch.cat(list(truth), dim=3), torch.cat(list(made), dim=3)], dim=2)  # [C,T,2H,B*W]
    save_mp4(stem.with_suffix(".mp4"), enlarge(video, clip.shape[-1]), fps=8)
    return sheet


# --- the story --------------------------------------------------------------------------------------------------------


def open_clips(args: argparse.Namespace) -> tuple[VideoClipDataset, VideoClipDataset]:
    """The training and the validation clips.

    Raises: ValueError: if there are none, or no room for the cache.
    """
    threads = os.cpu_count() or 1
    root = args.data_root
    if root is None:
        root = make_synthetic_videos(args.cache_dir, save_mp4, threads)
    train_videos, val_videos = prepare_videos(
        root, span=(args.num_frames - 1) * args.frame_stride + 1, val_ratio=args.val_ratio, seed=args.seed,
        cache_dir=args.cache_dir, max_videos=args.max_videos, workers=threads, log=tqdm.write,
    )  # fmt: skip
    if args.cache_videos:
        source = CachedFrames([*train_videos, *val_videos], args.size, args.color_mode, args.cache_dir, threads)
    else:
        source = DecodedFrames(args.size, args.color_mode)
    window = {"num_frames": args.num_frames, "frame_stride": args.frame_stride, "seed": args.seed}
    augmentation = {"hflip": args.hflip, "time_reverse": args.time_reverse}
    train_clips = VideoClipDataset(train_videos, source, random_window=True, **window, **augmentation)
    return train_clips, VideoClipDataset(val_videos, source, random_window=False, **window)


@contextlib.contextmanager
def going_on_without(path: Path) -> Iterator[None]:
    """Something that a run can do without: if it cannot be written, a line says so."""
    try:
        yield
    except OSError as error:
        tqdm.write(f"WARNING: {path} could not be written ({error.strerror or error})", file=sys.stderr)


def make_out_dir(out_dir: Path, empty: bool) -> None:
    """Make the run's folder, without what killed processes left behind in it.

    Raises: ValueError: if it cannot be made.
    """
    if empty:
        shutil.rmtree(out_dir, ignore_errors=True)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out_dir {out_dir}: cannot be made ({error.strerror})") from error
    remove_stale_temporaries(out_dir)


def describe_run(
    args: argparse.Namespace, state: TrainingState, clips: tuple[int, int], steps: int, amp_dtype: torch.dtype | None
) -> None:
    """Print what is about to happen, and what a flag does not do here."""
    parameters = sum(p.numel() for p in state.model.parameters())
    device = next(state.model.parameters()).device
    precision = {None: "float32", torch.bfloat16: "bf16 autocast", torch.float16: "fp16 autocast"}[amp_dtype]
    print(
        f"{clips[0]} training and {clips[1]} validation clips; {parameters:,} parameters; {device}, {precision}; "
        f"steps {state.step + 1} to {steps}"
        + (f"; {args.processes} processes, {args.processes * args.batch_size} clips at once" * (args.processes > 1)),
        flush=True,
    )
    if args.amp and device.type == "cpu":
        print("--amp does nothing on cpu: training in float32")
    if not args.cfg_drop_prob and args.vis_every and args.vis_guidance_scale != 1:
        print("note: --cfg_drop_prob 0 trains no unconditional branch: previews need --vis_guidance_scale 1")
    blind = blind_levels(args.base_channels, args.channel_mults)
    if blind:
        print(
            f"note: at level {', '.join(map(str, blind))} norms have one channel per group and erase the time "
            f"embedding; --base_channels of 3 * 2^n, such as 24, 48 or 96, keeps it"
        )


def loss_text(loss: float | None) -> str:
    """A mean loss as it is printed; None is that of no step with finite gradients."""
    return "not finite" if loss is None else f"{loss:.4f}"


def train(args: argparse.Namespace, checkpoint: dict[str, Any] | None, source: Path | None) -> int:
    """Train to the end or to a stop signal; returns the exit status.

    Args:
        args: of the run.
        checkpoint: to go on from; None = a fresh run.
        source: its file.

    Raises: ValueError or OSError: for what the user can mend. FloatingPointError: if the loss is not finite or
        diverged. PeerLostError: if another process of the run is gone.
    """
    device = distributed.join(resolve_device(args.device))
    main_process = distributed.is_main()
    args.processes = distributed.world_size()
    out_dir = Path(args.out_dir)
    if args.dry_run:
        out_dir = out_dir / "dry_run"
    if main_process:
        make_out_dir(out_dir, empty=args.dry_run)
        remove_stale_temporaries(Path(args.cache_dir), untouched=3600)  # half a cache of frames is large
    amp_dtype = choose_amp_dtype(args, device)
    use_fast_kernels(device)

    model_config = checkpoint["model_config"] if checkpoint else model_config_of(args)
    if model_config != model_config_of(args):
        raise ValueError(f"{out_dir / 'last.pt'}: its model_config and its args disagree")
    check_memory(  # activations that are kept for the backward pass come on top
        forward_memory(model_config, args.batch_size, args.num_frames - 2 * args.endpoint_context, args.size),
        device, f"a forward pass of --batch_size {args.batch_size}, --size {args.size}, --T {args.num_frames}",
        MEMORY_FLAGS,
    )  # fmt: skip

    # data
    workers = min(args.num_workers, max(1, (os.cpu_count() or 1) // distributed.processes_here()))
    train_clips, val_clips = distributed.take_turns(lambda: open_clips(args))
    named = [[(video.name, video.info.frames) for video in clips.videos] for clips in (train_clips, val_clips)]
    distributed.check_alike("--data_root: the files", hashlib.sha256(json.dumps(named).encode()).hexdigest()[:16])
    failures = ReadFailures(log=lambda line: tqdm.write(line, file=sys.stderr))  # every process reads other files
    loading = {
        "num_workers": workers, "collate_fn": collate, "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0, "worker_init_fn": outlive_first_signal,
    }  # fmt: skip

    def clips_on_device(batches: Iterable) -> Iterator[Tensor]:
        for clips, failed, tried in batches:
            yield to_float(failures.check(clips, failed, tried).to(device, non_blocking=True))

    # model, optimiser, resume
    state = new_state(args, model_config, device, amp_dtype)
    schedule = DiffusionSchedule(args.timesteps, args.beta_schedule).to(device)
    epoch_steps = steps_per_epoch(len(train_clips), args.batch_size * args.grad_accum * args.processes)
    if checkpoint:
        restore(state, checkpoint, args, epoch_steps)
    distributed.check_alike(f"{out_dir / 'last.pt'}: the step", state.step)
    last_position = args.epochs * epoch_steps
    # steps done and positions differ once a run went on with other clips per step: the latter say what is left
    total_steps = min(state.step + max(0, last_position - state.position), args.max_steps or math.inf)
    if args.dry_run:
        total_steps, last_position = state.step + 2, state.position + 2
    state.plan = plan_learning_rate(args, total_steps, state.step, state.plan)

    def finished() -> bool:
        return state.step >= total_steps or state.position >= last_position

    if finished():
        print(f"nothing to do: the run has all its {state.step} steps; a longer one needs more --epochs or --max_steps")
        return 0
    describe_run(args, state, (len(train_clips), len(val_clips)), total_steps, amp_dtype)
    if args.compile:
        state.model.compile(dynamic=False)  # in place: the state dict keeps its names
    state.parallel = distributed.averaging_gradients(state.model, device)
    if main_process:
        with going_on_without(out_dir / "run.json"):
            save_run_description(out_dir / "run.json", vars(args), device)
        records = Records(out_dir, state.step, (args.log_dir or out_dir / "tensorboard") if args.tensorboard else None)

    order = ClipBatches(
        len(train_clips), args.batch_size, args.grad_accum, args.seed,
        first=state.position * args.grad_accum, last=last_position * args.grad_accum,
        part=(distributed.rank(), args.processes),
    )  # fmt: skip
    batches = clips_on_device(DataLoader(train_clips, batch_sampler=order, **loading))
    in_order = [(0, i) for i in range(len(val_clips))]
    mine = distributed.share(len(val_clips))
    val_batches = [in_order[i : min(i + args.batch_size, mine.stop)] for i in mine[:: args.batch_size]]
    val_loader = DataLoader(val_clips, batch_sampler=val_batches, **loading)
    preview_keys = in_order[:: math.ceil(len(in_order) / PREVIEW_CLIPS)]

    saver = Saver(
        out_dir, args, epoch_steps, last_is_whole=source is not None and source.name == "last.pt",
        trial_loss=lambda: trial_loss(state, schedule, args, amp_dtype),
    )  # fmt: skip

    def validate() -> float:
        parts = (split_clip(clip, args.endpoint_context) for clip in clips_on_device(val_loader))
        with autocast(device, amp_dtype):
            sums = validation_sum(
                state.ema, schedule, parts, len(val_clips), args.seed, args.temporal_loss_weight, args.noise_offset,
                first=mine.start,
            )  # fmt: skip
        loss, pairs = distributed.total(*sums)
        return loss / pairs

    def show(stem: Path) -> dict[str, float]:
        """Generate the preview clips, each process its share, and write them; returns their scores."""
        shown = distributed.share(len(preview_keys))
        made = None
        if shown:
            clip = next(clips_on_device([collate([val_clips[preview_keys[i]] for i in shown])]))
            made = [clip.cpu(), *(part.cpu() for part in preview(state.ema, schedule, clip, args, amp_dtype, shown[0]))]
        parts = [part for part in distributed.gather(made) if part]
        if not main_process:
            return {}
        clip, generated, scores, faded_scores = map(torch.cat, zip(*parts, strict=True))
        with going_on_without(stem):
            records.add_sheet(state.step, save_preview(stem, clip, generated, args.endpoint_context))
        return {"psnr": scores.mean().item(), "psnr_cross_fade": faded_scores.mean().item()}

    def finish_epoch() -> None:
        """Validate, show, record and save."""
        epoch = math.ceil(state.position / epoch_steps)
        val_loss = validate()
        if not math.isfinite(val_loss):
            raise FloatingPointError(f"the validation loss must stay finite (got {val_loss})")
        entry = {
            "step": state.step, "epoch": epoch, "train_loss": state.tally.take_mean("epoch"), "val_loss": val_loss,
            **bad_steps(state.tally.read()),
        }  # fmt: skip
        state.history["epochs"].append(entry)
        losses = f"training loss {loss_text(entry['train_loss'])}  validation loss {val_loss:.4f}"
        line = f"epoch {epoch}/{args.epochs}  {losses}"
        if args.dry_run or (args.vis_every and (epoch % args.vis_every == 0 or finished())):
            entry |= show(out_dir / f"epoch_{epoch:04d}_sample")
        if main_process:
            if "psnr" in entry:
                line += f"  middle PSNR {entry['psnr']:.2f} dB (cross-fade {entry['psnr_cross_fade']:.2f} dB)"
            if "psnr" in entry or finished():
                with going_on_without(out_dir / "training_curves.png"):
                    save_training_curves(out_dir / "training_curves.png", state.history)
            tqdm.write(line)
            records.add("val", **entry)
        if val_loss < state.best_val_loss:
            saver.save_best(state, val_loss)
        saver.save_last(state)

    def write_line(clips: int, since: float) -> None:
        """Record the steps since the last line; the only place between saves that waits for the device."""
        tally = state.tally.read()
        grad_norm, loss = tally["grad_norm"], state.tally.take_mean("line")
        if not main_process:
            return
        clips_per_second = clips / (time.perf_counter() - since)  # the device is done with them now
        if loss is not None:
            state.history["train"].append([state.step, loss])
        lr = learning_rate(state.step - 1, state.plan)
        records.add(
            "train", state.step, epoch=state.position / epoch_steps, loss=loss, lr=lr,
            grad_norm=grad_norm if math.isfinite(grad_norm) else None, **bad_steps(tally),
            clips_per_second=clips_per_second,
            gpu_memory_mib=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
        )  # fmt: skip
        bar.set_postfix(loss=loss_text(loss))
        if bar.disable:
            print(f"step {state.step}  loss {loss_text(loss)}  lr {lr:.2e}  {clips_per_second:.1f} clips/s", flush=True)

    # loop
    stop = StopRequest()
    hidden = None if main_process else True  # None = where it is no terminal
    bar = tqdm(total=total_steps, initial=state.step, desc="training", unit="step", disable=hidden)
    clock, clips_seen = time.perf_counter(), 0
    try:
        (stopped_by,) = distributed.highest(stop.signal or 0)
        while not (finished() or stopped_by):
            optimise(state, schedule, batches, args, amp_dtype)
            bar.update()
            clips_seen += args.batch_size * args.grad_accum * args.processes
            if state.step % args.log_every == 0 or state.step == 1:
                write_line(clips_seen, clock)
                clock, clips_seen = time.perf_counter(), 0
            stopped_by, due = distributed.highest(stop.signal or 0, saver.due(state.step))  # all do the same next
            if state.position % epoch_steps == 0 or finished():
                finish_epoch()
                clock, clips_seen = time.perf_counter(), 0
            elif due:
                saver.save_last(state)
        if stopped_by and not finished():
            saver.save_last(state)  # while our handlers stand: another process's signal may come to this one only now
    except FloatingPointError as error:
        kept = out_dir / "last.pt"
        good = f"the last good checkpoint is {kept}" if kept.is_file() else "no checkpoint was saved yet"
        raise FloatingPointError(f"after step {state.step}: {error}; {good}") from error
    finally:
        bar.close()
        if main_process:
            records.close()
        stop.restore()
    if isinstance(saver.failure, FloatingPointError):
        raise saver.failure
    if saver.failure:
        raise ValueError(f"--out_dir {out_dir}: the work since the last save is lost, as it could not be written")
    if not finished():
        name = signal.Signals(stopped_by).name
        print(f"stopped by {name} after step {state.step}; go on with: {resume_command(args)}", flush=True)
        return 128 + stopped_by
    print(f"done: {state.step} steps, {out_dir / 'last.pt'}")
    return 0


def bad_steps(tally: dict[str, float]) -> dict[str, int]:
    """The counts of the whole run that metrics.jsonl has in every line."""
    return {"skipped_steps": int(tally["skipped"]), "diverged_steps": int(tally["diverged"])}


def resume_command(args: argparse.Namespace) -> str:
    """The command that goes on with a stopped run."""
    return distributed.launch_command("train_video_ddpm.py", "--out_dir", args.out_dir, "--resume")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    It is 0 for done, 1 for a run that diverged or lost another of its processes, 2 for wrong input, 128 + n for one
    stopped by signal n.
    """
    parser = build_parser()
    try:
        with distributed.only_main_speaks(), distributed.watching_peers(), explaining_shortage(MEMORY_FLAGS):
            status = train(*resolve_arguments(parser, argv))
            distributed.leave()
            return status
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except (FloatingPointError, distributed.PeerLostError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except RuntimeError as error:
        if not loading_process_died(error):
            raise
        parser.exit(
            1, f"{parser.prog}: a loading process was killed: too little memory for --num_workers, or a video that "
            "crashes its decoder; --resume goes on from the last save\n",
        )  # fmt: skip
    except KeyboardInterrupt:
        parser.exit(130, "stopped at once, without saving\n")
    finally:
        end_children()  # they outlive a signal, and Python would wait for them


if __name__ == "__main__":
    sys.exit(main())
