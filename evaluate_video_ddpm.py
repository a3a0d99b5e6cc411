"""Score generated middle frames against the true ones, beside baselines, under a named protocol.

From a checkpoint and a folder of clips to a table with confidence intervals and a page of pictures. Scores are written
per clip as they come: the same command after a stop goes on where it was. Without --ckpt the baselines are scored.
"""

import argparse
import hashlib
import json
import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from data.video_index import Video, data_as_trained, split_as_trained, usable_videos
from diffusion.pipeline import SETTINGS, MiddleFramePipeline, add_sampler_flags, describe_settings
from evaluation.evaluator import ClipReader, Evaluator, baseline_method, pipeline_method
from evaluation.fvd import I3D, I3D_URL, MIN_FRAMES
from evaluation.metrics import METRICS, Scorer, alexnet_path, missing_for
from evaluation.protocols import PROTOCOLS
from evaluation.report import animations, make_report, write_report
from evaluation.results import PerClipResults
from utils import distributed, flags
from utils.device import describe_machine, explain_oom, resolve_device
from utils.distributed import is_main, print0
from utils.flags import Parser, nonempty_path, positive_int
from utils.interpolators import INTERPOLATORS, missing_package
from utils.io import file_sha256
from utils.video_utils import as_pair, clip_times, middle_length

WITHOUT_CHECKPOINT = {"num_frames": 8, "endpoint_context": 2, "frame_stride": 1, "size": 64, "color_mode": "rgb"}
OOM_REMEDY = "--batch_size, --size or --T"
# Flags that change no score, or only through "sampling".
NOT_SETTINGS = {"ckpt", "fvd_weights", "out_dir", "overwrite", "cache_dir", "batch_size", "num_videos", "compile"}
NOT_SETTINGS |= {"preset", *SETTINGS}


def window_place(text: str) -> str | int:
    """Type of --window: central, random, or the number of the first frame."""
    if text in ("central", "random"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be central, random or a frame number from 0 (got {text})")
    return int(text)


def build_parser() -> Parser:
    """Every flag; those that default to None take the checkpoint's value, or the protocol's."""
    parser = Parser(__doc__)
    group = parser.add_argument_group("checkpoint and output")
    flags.add_checkpoint_flags(group, required=False)
    add = group.add_argument
    add("--out_dir", type=nonempty_path, default="outputs/evaluation", help="folder for all results")
    add("--overwrite", action="store_true", help="begin anew, whatever --out_dir holds")

    add = parser.add_argument_group("data").add_argument
    add("--data_root", type=nonempty_path, help="folder of MP4 files; None = the checkpoint's own data")
    split = "as training split the folder; all = the whole folder, for clips that training never saw"
    add("--split", choices=("val", "train", "all"), help=f"{split}; None = val, or all without --ckpt")
    add("--num_videos", type=positive_int, default=256, help="score the first so many by name, or all there are")
    window = "frames used of a file: central, random (by --seed and clip) or the number of the first"
    add("--window", type=window_place, help=f"{window}; None = the protocol's: central, but random of mcvd")
    add("--cache_dir", type=nonempty_path, help="folder for the file index; None = as in training")
    flags.add_clip_flags(parser.add_argument_group("clip"))

    add = parser.add_argument_group("scores").add_argument
    add("--protocol", choices=PROTOCOLS, default="native", help="native, or published: mcvd, vidim (9 frames)")
    add("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="what to measure")
    every = list(INTERPOLATORS)
    add("--baselines", nargs="*", choices=every, default=every, help="methods beside ours; may be none")
    add("--fvd_weights", type=nonempty_path, metavar="PT", help="I3D in TorchScript, i3d_torchscript.pt; None = no FVD")

    group = parser.add_argument_group("sampler")
    group.add_argument("--num_samples", type=positive_int, help="middles for each clip; None = 1, or 10 under mcvd")
    add_sampler_flags(group, several=True)
    return parser


def resolve_args(args: argparse.Namespace) -> MiddleFramePipeline | None:
    """Load the checkpoint, if any, fill the flags that were not given from the protocol and from it, and check them.

    Raises: ValueError: naming the flag, the rule and the value.
    """
    pipe, protocol = None, PROTOCOLS[args.protocol]
    if args.ckpt:
        device = distributed.init_distributed(resolve_device(args.device))
        pipe = MiddleFramePipeline.from_checkpoint(
            args.ckpt, str(device), use_raw_model=args.use_raw_model, amp=args.amp, compile=args.compile
        )
    elif args.split not in (None, "all") or args.data_root is None:
        raise ValueError("without --ckpt, --data_root must be given and --split be all: no training split it")
    for name, flag in (("endpoint_context", "endpoint_context"), ("num_frames", "T")) if protocol.settings else ():
        value = protocol.settings[name]
        if name == "endpoint_context" and pipe and pipe.endpoint_context != value:
            rule = f"--protocol {args.protocol} needs a model of --endpoint_context {value}"
            raise ValueError(f"{rule}, which {args.ckpt} is not")
        if getattr(args, name) not in (None, value):
            raise ValueError(f"--{flag} must be {value} under --protocol {args.protocol} (got {getattr(args, name)})")
        setattr(args, name, value)
    defaults = WITHOUT_CHECKPOINT | {
        "split": "val" if pipe else "all",
        "window": protocol.window,
        "num_samples": protocol.num_samples[0],
    }
    args.sampling = []
    if pipe:
        args.sampling = pipe.resolve_flags(args)
        if pipe.predictor != "none" and not any(settings["steps"] == 0 for settings in args.sampling):
            args.sampling.append(args.sampling[0] | {"steps": 0})  # what is refined: the predictor alone
        args.sampling = list({describe_settings(settings): settings for settings in args.sampling}.values())
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    middle_length(args.num_frames, args.endpoint_context)
    for name in ("metrics", "baselines"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # once each, in the order given
    return pipe


def drop_unavailable(args: argparse.Namespace) -> None:
    """Leave out metrics and baselines that cannot run here, each with a line that says what would bring it."""
    reasons = {metric: missing_for(metric, min(as_pair(args.size))) for metric in args.metrics}
    if args.fvd_weights is None:
        reasons["fvd"] = f"fvd is left out: it needs --fvd_weights with the file of {I3D_URL}"
    if args.num_frames < MIN_FRAMES:
        reasons["fvd"] = f"fvd is left out: I3D needs clips of {MIN_FRAMES} frames or more (got --T {args.num_frames})"
    if args.num_samples == 1:
        reasons["diversity"] = "diversity is left out: it needs --num_samples 2 or more"
    missing = {name: missing_package(name) for name in args.baselines}
    absent = {name: reason and f"baseline {name} is left out: {reason}" for name, reason in missing.items()}
    if find_spec("matplotlib") is None:
        print0("plots are left out: they need pip install matplotlib")
    for name, reason in [*reasons.items(), *absent.items()]:
        if reason and name in (*args.metrics, *args.baselines):
            print0(reason)
    args.metrics = [name for name in args.metrics if not reasons[name]]
    args.baselines = [name for name in args.baselines if not absent[name]]
    if not args.metrics:
        raise ValueError("--metrics: none of those asked for can be computed here")
    if not args.ckpt and not args.baselines:
        raise ValueError("--baselines: none of those asked for can run here")


def choose_videos(args: argparse.Namespace, trained: dict[str, Any] | None, needed: int) -> list[Video]:
    """The files to score, of `needed` frames or more; args.data_root is resolved, too.

    Raises: ValueError: if there are none long enough.
    """
    cache_dir = args.cache_dir or "outputs/cache"
    if trained:
        args.data_root, cache_dir = data_as_trained(trained["args"], args.data_root, args.cache_dir)
    if args.split == "all":
        chosen = usable_videos(args.data_root, needed, cache_dir, args.num_videos)
    else:
        splits = split_as_trained(trained["args"], trained["clip_config"], args.data_root, cache_dir)
        videos = splits[0] if args.split == "train" else splits[1]
        chosen = [video for video in videos if video.info.frames >= needed][: args.num_videos]
        if not chosen:
            none = f"none of {len(videos)} clips has the {needed} frames needed"
            raise ValueError(f"--data_root {args.data_root}: {none}")
    trained_on = trained["args"].get("data_root") if trained else None
    if args.split != "val" and trained_on and os.path.realpath(trained_on) == os.path.realpath(args.data_root):
        print0(f"note: {args.ckpt} was trained on clips of this split", file=sys.stderr)
    few = len(chosen) < args.num_videos and args.split == "val"
    hint = "; --split all takes a whole folder that training never saw" if few else ""
    print0(f"scoring {len(chosen)} clips, split {args.split} of {args.data_root}{hint}")
    return chosen


def evaluate(args: argparse.Namespace) -> None:
    """From flags to the report; a ValueError or OSError is for the user to mend."""
    pipe = resolve_args(args)
    drop_unavailable(args)
    trained = pipe.trained if pipe else None
    device = pipe.device if pipe else distributed.init_distributed(resolve_device(args.device))
    torch.backends.cudnn.deterministic = True  # a second run gives the same bits on a GPU, too

    # Clips and methods.
    shape = (args.num_frames, args.frame_stride, args.size, args.color_mode)
    protocol = PROTOCOLS[args.protocol]
    reader = ClipReader(*shape, args.window, args.seed, protocol.linear_light)
    videos = distributed.main_process_first(partial(choose_videos, args, trained, reader.needed))
    i3d = I3D(args.fvd_weights, device) if "fvd" in args.metrics else None
    m = args.num_frames - 2 * args.endpoint_context
    times = clip_times(args.num_frames, args.frame_stride)
    gap = {"num_middle": m, "times": times, "hierarchy": args.hierarchy}
    methods = [pipeline_method(pipe, settings, gap, args.num_samples, args.seed) for settings in args.sampling]
    methods += [baseline_method(name, device, m) for name in args.baselines]
    scorer = Scorer(args.metrics, protocol, device)
    evaluator = Evaluator(reader, methods, scorer, i3d, args.batch_size, args.endpoint_context, device)

    # Everything that changes a score, so that results of other settings are never mixed.
    used = {"checkpoint": args.ckpt, "fvd": args.fvd_weights if i3d else None}
    used["lpips"] = alexnet_path() if "lpips" in args.metrics else None
    weights = {name: Path(path) for name, path in used.items() if path}
    hashes = {f"{name}_sha256": file_sha256(path) for name, path in weights.items()}
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS} | hashes
    settings |= {"device": device.type, "data_root": os.path.realpath(args.data_root)}
    settings["sampling"] = [describe_settings(values) for values in args.sampling]

    # Score, and report.
    out_dir = Path(args.out_dir)
    clips = [reader.identify(video, i) for i, video in enumerate(videos)]
    results = PerClipResults(out_dir, settings, clips, args.overwrite)
    evaluator.score_all(videos, results)
    if not is_main():
        return
    scored = [line["source"] for line in results.scored()]
    facts = {
        "weights": {name: str(path) for name, path in weights.items()},
        "settings": settings,
        "checkpoint_step": trained["step"] if trained else None,
        "batch_size": args.batch_size,
        "clips": len(scored),
        "data_fingerprint": hashlib.sha256(json.dumps(scored).encode()).hexdigest(),
    }
    scored_by = {name: path for name, path in weights.items() if name != "checkpoint"}
    named = [f"{n.upper()} weights: {path.name}, sha256 {hashes[f'{n}_sha256']}" for n, path in scored_by.items()]
    trained_frames = trained["clip_config"]["num_frames"] if trained else None
    about = vars(args) | {"trained_frames": trained_frames}
    report = make_report(evaluator, results, args.protocol, named, about)
    pictures = animations(evaluator, videos, results)
    write_report(report, out_dir, pictures, trained["history"] if trained else None, facts | describe_machine(device))


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status.

    0 = done, 1 = lost another process, 2 = wrong input, 130 = stopped (the same command goes on).
    """
    parser = build_parser()
    goes_on = "the same command goes on where it was"
    with parser.one_line_end(f"stopped; {goes_on}"), distributed.watch_peers(goes_on), explain_oom(OOM_REMEDY):
        evaluate(parser.parse_args(argv))
        distributed.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())
