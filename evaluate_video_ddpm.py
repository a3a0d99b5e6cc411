"""Score generated middle frames against the true ones, beside baselines, under a named protocol.

From a checkpoint and a folder of clips to a table with confidence intervals and a page of pictures. Scores are written
per clip as they come: the same command after a stop goes on where it was. Without --ckpt the baselines are scored.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.kinetics_video_dataset import (
    DecodedFrames,
    Video,
    data_as_trained,
    printable,
    reason_of,
    split_as_trained,
    usable_videos,
)
from data.video_reader import DECODE_ERRORS
from diffusion.noise import SAMPLE, generator_for
from diffusion.sampler import (
    PRESETS,
    SAMPLERS,
    SPACINGS,
    branches,
    check_sampler,
    describe_settings,
    forwards_per_clip,
    sample_middle,
    settings_grid,
)
from diffusion.schedule import DiffusionSchedule
from evaluation import report
from evaluation.baselines import BASELINES, load_baseline, missing_package
from evaluation.evaluator import Evaluator, Method
from evaluation.fvd import I3D, I3D_URL, MIN_FRAMES
from evaluation.metrics import HIGHER_IS_BETTER, METRICS, Scorer, alexnet_path, missing_for
from evaluation.protocols import MCVD, PROTOCOLS, differences_from_mcvd
from evaluation.results import SCORES, PerClipResults, error_by_position, summarise
from models.video_unet3d import build_model, forward_memory
from utils.checkpoint import load_checkpoint, load_weights
from utils.flags import (
    Parser,
    add_checkpoint_flags,
    add_clip_flags,
    add_sampler_flags,
    check_frame_count,
    nonempty_path,
    positive_int,
    resolve_device,
    settle_clip_flags,
    warn_of_guidance,
)
from utils.io import file_sha256, observed_frames, replacing, save_json, save_mp4, side_by_side
from utils.memory import check_memory, explaining_shortage
from utils.records import describe_machine
from utils.video_utils import cross_fade, join_clip, split_clip, to_float, to_uint8

WITHOUT_CHECKPOINT = {"num_frames": 8, "endpoint_context": 2, "frame_stride": 1, "size": 64, "color_mode": "rgb"}
MEMORY_FLAGS = "--batch_size, --size or --T"
FPS = 6  # of the animations


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
    add_checkpoint_flags(group, required=False)
    group.add_argument("--out_dir", type=nonempty_path, default="outputs/evaluation", help="folder for all results")
    group.add_argument("--overwrite", action="store_true", help="begin anew, whatever --out_dir holds")

    group = parser.add_argument_group("data")
    group.add_argument("--data_root", type=nonempty_path, help="folder of MP4 files; None = the checkpoint's own data")
    group.add_argument(
        "--split", choices=("val", "train", "all"),
        help="as training split the folder; all = the whole folder, for clips that training never saw; "
        "None = val, or all without --ckpt",
    )  # fmt: skip
    group.add_argument(
        "--num_videos", type=positive_int, default=256, help="the first so many by name, or all if there are fewer"
    )
    group.add_argument(
        "--window", type=window_place,
        help="which frames of a file: central, random (by --seed and clip) or the number of the first; "
        "None = central, or random under the protocol mcvd",
    )  # fmt: skip
    group.add_argument("--cache_dir", type=nonempty_path, help="folder for the file index; None = as in training")
    add_clip_flags(parser.add_argument_group("clip"))

    group = parser.add_argument_group("scores")
    group.add_argument(
        "--protocol", choices=PROTOCOLS, default="native",
        help="native, or mcvd: the published interpolation protocol, 2 + 2 frames -> 5, so --T 9",
    )  # fmt: skip
    group.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS), help="what to measure")
    group.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=list(BASELINES),
        help="rows beside the model's; may be none",
    )
    group.add_argument(
        "--fvd_weights", type=nonempty_path, metavar="PT",
        help="I3D network in TorchScript (i3d_torchscript.pt) for FVD; None = no FVD",
    )  # fmt: skip

    group = parser.add_argument_group("sampler")
    group.add_argument(
        "--num_samples", type=positive_int, help="different middles for each clip; None = 1, or 10 under mcvd"
    )
    presets = {name: describe_settings(settings) for name, settings in PRESETS.items()}
    add_sampler_flags(group, SAMPLERS, SPACINGS, presets, several=True)
    return parser


# --- settling ---------------------------------------------------------------------------------------------------------


def settle(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> None:
    """Fill the flags that were not given from the protocol and the checkpoint, and check them all.

    Raises: ValueError: naming the flag, the rule and the value.
    """
    published = args.protocol == "mcvd"
    args.sampling = []
    if published:
        if checkpoint is not None and checkpoint["model_config"]["endpoint_context"] != MCVD["endpoint_context"]:
            raise ValueError(f"--protocol mcvd needs a model of --endpoint_context 2, which {args.ckpt} is not")
        for name, flag in (("num_frames", "T"), ("endpoint_context", "endpoint_context")):
            if getattr(args, name) not in (None, MCVD[name]):
                raise ValueError(f"--{flag} must be {MCVD[name]} under --protocol mcvd (got {getattr(args, name)})")
            setattr(args, name, MCVD[name])
    if checkpoint is not None:
        settle_clip_flags(args, checkpoint)
        args.sampling = settings_grid(vars(args))
        for settings in args.sampling:
            check_sampler(checkpoint["diffusion_config"]["timesteps"], settings)
    else:
        if args.split not in (None, "all") or args.data_root is None:
            raise ValueError("without --ckpt, --data_root must be given and --split be all: no training split it")
        for name, value in WITHOUT_CHECKPOINT.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        check_frame_count(args)
    defaults = {
        "split": "all" if checkpoint is None else "val",
        "window": "random" if published else "central",
        "num_samples": 10 if published else 1,
    }
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("metrics", "baselines"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))  # once each, in the order given


def drop_what_is_missing(args: argparse.Namespace, log: Callable[[str], None] = print) -> None:
    """Leave out metrics and baselines that cannot run here, each with a line that says what would bring it."""
    reasons = {metric: missing_for(metric, args.size) for metric in args.metrics}
    if args.fvd_weights is None:
        reasons["fvd"] = f"fvd is left out: it needs --fvd_weights with the file of {I3D_URL}"
    if args.num_frames < MIN_FRAMES:
        reasons["fvd"] = f"fvd is left out: I3D needs clips of {MIN_FRAMES} frames or more (got --T {args.num_frames})"
    if args.num_samples == 1:
        reasons["diversity"] = "diversity is left out: it needs --num_samples 2 or more"
    absent = {name: missing_package(name) for name in args.baselines}
    if find_spec("matplotlib") is None:
        log("plots are left out: they need pip install matplotlib")
    for name, reason in [*reasons.items(), *absent.items()]:
        if reason and name in (*args.metrics, *args.baselines):
            log(reason)
    args.metrics = [name for name in args.metrics if not reasons[name]]
    args.baselines = [name for name in args.baselines if not absent[name]]
    if not args.metrics:
        raise ValueError("--metrics: none of those asked for can be computed here")
    if not args.ckpt and not args.baselines:
        raise ValueError("--baselines: none of those asked for can run here")


# --- clips ------------------------------------------------------------------------------------------------------------


def choose_videos(args: argparse.Namespace, checkpoint: dict[str, Any] | None) -> list[Video]:
    """The files to score; args.data_root is settled, too.

    Raises: ValueError: if there are none long enough.
    """
    cache_dir = args.cache_dir or "outputs/cache"
    if checkpoint is not None:
        args.data_root, cache_dir = data_as_trained(checkpoint, args.data_root, args.cache_dir, save_mp4)
    needed = (args.num_frames - 1) * args.frame_stride + 1 + (args.window if isinstance(args.window, int) else 0)
    if args.split == "all":
        chosen = usable_videos(args.data_root, needed, cache_dir, args.num_videos)
    else:
        train, val = split_as_trained(checkpoint, args.data_root, cache_dir)
        videos = {"train": train, "val": val}[args.split]
        chosen = [video for video in videos if video.info.frames >= needed][: args.num_videos]
        if not chosen:
            raise ValueError(
                f"--data_root {args.data_root}: none of {len(videos)} clips has the {needed} frames needed"
            )
    trained_on = checkpoint["args"].get("data_root") if checkpoint is not None else None
    if args.split != "val" and trained_on and os.path.realpath(trained_on) == os.path.realpath(args.data_root):
        print(f"note: {args.ckpt} was trained on clips of this split", file=sys.stderr)
    few = len(chosen) < args.num_videos and args.split == "val"
    hint = "; --split all takes a whole folder that training never saw" if few else ""
    print(f"scoring {len(chosen)} clips, split {args.split} of {args.data_root}{hint}")
    return chosen


def identify(video: Video, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """What one clip is: its file, the file's hash, and the first frame used."""
    slack = video.info.frames - ((args.num_frames - 1) * args.frame_stride + 1)
    first = args.window
    if args.window == "central":
        first = slack // 2
    elif args.window == "random":
        first = int(np.random.default_rng([args.seed, number]).integers(slack + 1))
    return {"name": printable(video.name), "sha256": file_sha256(video.path), "first_frame": first}


def read_clip(video: Video, first: int, args: argparse.Namespace) -> Tensor | str:
    """One clip as uint8 [C,T,size,size], or why it cannot be read."""
    wanted = [first + n * args.frame_stride for n in range(args.num_frames)]
    try:
        return DecodedFrames(args.size, args.color_mode).read(video, wanted)
    except DECODE_ERRORS as error:
        return reason_of(error)


# --- methods ----------------------------------------------------------------------------------------------------------


def model_methods(args: argparse.Namespace, checkpoint: dict[str, Any], device: torch.device) -> list[Method]:
    """The checkpoint's network under every combination of the sampler's flags."""
    model = build_model(checkpoint["model_config"], "meta")
    load_weights(model, checkpoint["model" if args.use_raw_model else "ema"], args.ckpt)
    model = model.to(device).lay_out().eval()
    diffusion = checkpoint["diffusion_config"]
    schedule = DiffusionSchedule(diffusion["timesteps"], diffusion["schedule"]).to(device)
    amp = args.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
    if args.compile:
        model.compile_for_sampling()
    scales = {settings["guidance_scale"] for settings in args.sampling}
    if not checkpoint["args"].get("cfg_drop_prob") and scales != {1}:
        warn_of_guidance(args.ckpt)

    def method(settings: dict[str, Any]) -> Method:
        def generate(start: Tensor, end: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
            generators = [generator_for(args.seed, SAMPLE, *key) for key in keys]
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                return sample_middle(
                    model, schedule, start, end, num_middle=args.num_frames - 2 * args.endpoint_context,
                    noise_offset=diffusion["noise_offset"], generator=generators, **settings,
                )  # fmt: skip

        name = describe_settings(settings)
        family = name.replace(f" {settings['steps']}", "", 1)  # one curve of the plot: any number of steps
        nfe = forwards_per_clip(schedule.timesteps, settings)
        return Method(f"ours, {name}", family, args.num_samples, nfe, generate)

    return [method(settings) for settings in args.sampling]


def baseline_methods(args: argparse.Namespace, device: torch.device) -> list[Method]:
    """The baselines, which have one answer each and run no network of ours."""

    def method(name: str) -> Method:
        baseline = load_baseline(name, device)
        num_middle = args.num_frames - 2 * args.endpoint_context
        return Method(name.replace("_", "-"), "", 1, 0, lambda start, end, keys: baseline(start, end, num_middle))

    return [method(name) for name in args.baselines]


# --- scoring ----------------------------------------------------------------------------------------------------------


def score_all(evaluator: Evaluator, videos: Sequence[Video], results: PerClipResults, args: argparse.Namespace) -> None:
    """Score every clip that `results` does not hold yet, in batches that do not depend on what it holds."""
    group = max(1, args.batch_size // args.num_samples)
    per_clip = sum(method.samples for method in evaluator.methods)
    batches = [range(i, min(i + group, len(videos))) for i in range(0, len(videos), group)]
    waiting = [batch for batch in batches if not results.has(batch)]
    done = len(videos) - sum(map(len, waiting))
    if done:
        print(f"{done} of {len(videos)} clips were scored before")
    with tqdm(total=len(videos) * per_clip, initial=done * per_clip, unit="sample", disable=None) as bar:
        for batch in waiting:
            reads = {i: read_clip(videos[i], results.clips[i]["first_frame"], args) for i in batch}
            failed = [{"clip": i, "failure": read} for i, read in reads.items() if isinstance(read, str)]
            for line in failed:
                tqdm.write(f"could not read {printable(videos[line['clip']].name)} ({line['failure']}); it is left out")
            numbers = [i for i in batch if torch.is_tensor(reads[i])]
            lines, features = [], {}
            if numbers:
                lines, features = evaluator.score(torch.stack([reads[i] for i in numbers]), numbers, bar.update)
            results.add([*lines, *failed], features)
    results.tidy()


# --- report -----------------------------------------------------------------------------------------------------------


def animations(evaluator: Evaluator, videos: Sequence[Video], results: PerClipResults, args: argparse.Namespace) -> str:
    """The best, median and worst clip of the first method: truth, the method's first sample, and the cross-fade.

    Best by the first score that was measured; the clips are the first, the middle and the last where none was.
    """
    method = evaluator.methods[0]
    lines = results.scored()
    titles = ("first", "middle", "last")
    score = next((name for name in SCORES if name in lines[0]["methods"][method.name]["samples"][0]), None)
    if score is not None:
        titles = ("best", "median", "worst")
        lines.sort(
            key=lambda line: line["methods"][method.name]["samples"][0][score], reverse=score in HIGHER_IS_BETTER
        )
    shown = dict(zip(titles, (lines[0], lines[len(lines) // 2], lines[-1]), strict=True))
    parts = []
    for title, line in shown.items():
        number = line["clip"]
        clip = read_clip(videos[number], line["source"]["first_frame"], args)
        if isinstance(clip, str):
            continue
        start, truth, end = split_clip(to_float(clip[None]).to(evaluator.device), args.endpoint_context)
        faded = cross_fade(start, end, truth.shape[2])
        middles = (truth, method.generate(start, end, [(number, 0)]), faded)
        wholes = [to_uint8(join_clip(start, middle, end))[0] for middle in middles]
        frames = side_by_side(wholes, observed_frames(args.num_frames, args.endpoint_context))
        value = line["methods"][method.name]["samples"][0].get(score)
        quality = "" if value is None else f", {report.COLUMNS[score][0]}: {value:.{report.COLUMNS[score][1]}f}"
        caption = f"{title}: {line['source']['name']}{quality} - truth, {method.name}, cross-fade (orange = given)"
        parts.append(report.animation(frames, caption, FPS))
    return "\n".join(parts)


def sum_up(
    args: argparse.Namespace,
    checkpoint: dict[str, Any] | None,
    evaluator: Evaluator,
    results: PerClipResults,
    weights: list[str],
) -> report.Findings:
    """All that was found over the clips; `weights` says which files scores were computed with.

    Raises: ValueError: if no clip could be read.
    """
    lines, methods = results.scored(), [method.name for method in evaluator.methods]
    if not lines:
        raise ValueError(f"--data_root {args.data_root}: no clip could be read: {'; '.join(results.failures())}")
    k, m = args.endpoint_context, args.num_frames - 2 * args.endpoint_context
    features = results.features if "fvd" in args.metrics and len(lines) > 1 else None
    if "fvd" in args.metrics and features is None:
        print("fvd is left out: it needs two clips or more")
    positions = {name: error_by_position(lines, name) for name in methods} if "psnr" in args.metrics else {}
    differences = []
    if args.protocol == "mcvd":
        trained_frames = checkpoint["clip_config"]["num_frames"] if checkpoint else None
        differences = differences_from_mcvd(vars(args), len(lines), trained_frames)
    return report.Findings(
        title=f"{len(lines)} clips of {args.num_frames} frames ({k} + {k} given, {m} generated), "
        f"{args.size}x{args.size} {args.color_mode}, protocol {args.protocol}",
        rows=[row for name in methods for row in summarise(lines, name, methods[0], features)],
        curves={method.name: method.curve for method in evaluator.methods if method.curve},
        protocol=args.protocol,
        differences=differences,
        weights=weights,
        failures=results.failures(),
        frames=range(k, k + m),
        positions=positions,
    )


def write_report(
    findings: report.Findings, out_dir: Path, pictures: str, history: dict[str, Any] | None, facts: dict[str, Any]
) -> None:
    """Print the table and write table.md, metrics.json, report.html and, of a sweep, its plot."""
    text = report.as_markdown(findings)
    print(f"\n{text}")
    with replacing(out_dir / "table.md") as file:
        file.write(text.encode())
    save_json(out_dir / "metrics.json", findings.as_json() | facts)
    with replacing(out_dir / "report.html") as file:
        file.write(report.as_page(findings, pictures, history, facts).encode())
    plot = report.quality_against_work(findings)
    if plot:
        with replacing(out_dir / "quality_against_work.svg") as file:
            file.write(plot.encode())
    print(f"{out_dir / 'report.html'}, {out_dir / 'table.md'}, {out_dir / 'metrics.json'}")


def evaluate(args: argparse.Namespace) -> None:
    """From flags to the report.

    Raises: ValueError or OSError: for what the user can mend.
    """
    checkpoint = load_checkpoint(args.ckpt) if args.ckpt else None
    settle(args, checkpoint)
    drop_what_is_missing(args)
    device = resolve_device(args.device)
    if checkpoint:
        check_memory(
            forward_memory(
                checkpoint["model_config"], args.batch_size * max(map(branches, args.sampling)),
                args.num_frames - 2 * args.endpoint_context, args.size,
            ),
            device, f"--batch_size {args.batch_size} with --T {args.num_frames} and --size {args.size}", MEMORY_FLAGS,
        )  # fmt: skip
    torch.backends.cudnn.deterministic = True  # a second run gives the same bits on a GPU, too
    videos = choose_videos(args, checkpoint)
    i3d = I3D(args.fvd_weights, device) if "fvd" in args.metrics else None

    methods = model_methods(args, checkpoint, device) if checkpoint else []
    methods += baseline_methods(args, device)
    scorer = Scorer(args.metrics, args.protocol == "mcvd", device)
    evaluator = Evaluator(methods, scorer, i3d, args.batch_size, args.endpoint_context, device)

    weights = {"checkpoint": args.ckpt, "fvd": args.fvd_weights if i3d else None}
    weights["lpips"] = alexnet_path() if "lpips" in args.metrics else None
    weights = {name: Path(path) for name, path in weights.items() if path}
    hashes = {f"{name}_sha256": file_sha256(path) for name, path in weights.items()}
    elsewhere = ("ckpt", "fvd_weights", "out_dir", "overwrite", "cache_dir", "batch_size", "num_videos", "compile")
    elsewhere += ("preset", *PRESETS["fast"])  # what they come to is in "sampling"
    settings = {name: value for name, value in vars(args).items() if name not in elsewhere} | hashes
    settings |= {"device": device.type, "data_root": os.path.realpath(args.data_root)}
    settings["sampling"] = [describe_settings(values) for values in args.sampling]
    clips = [identify(video, i, args) for i, video in enumerate(videos)]
    results = PerClipResults(Path(args.out_dir), settings, clips, args.overwrite)
    score_all(evaluator, videos, results, args)

    scored = [line["source"] for line in results.scored()]
    facts = {
        "weights": {name: str(path) for name, path in weights.items()}, "settings": settings,
        "checkpoint_step": checkpoint["step"] if checkpoint else None, "batch_size": args.batch_size,
        "clips": len(scored),
        "data_fingerprint": hashlib.sha256(json.dumps(scored).encode()).hexdigest(), **describe_machine(device),
    }  # fmt: skip
    named = [
        f"{name.upper()} weights: {weights[name].name}, sha256 {hashes[f'{name}_sha256']}"
        for name in ("fvd", "lpips")
        if name in weights
    ]
    findings = sum_up(args, checkpoint, evaluator, results, named)
    pictures = animations(evaluator, videos, results, args)
    write_report(findings, Path(args.out_dir), pictures, checkpoint["history"] if checkpoint else None, facts)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 wrong input, 130 stopped (the same command goes on)."""
    parser = build_parser()
    try:
        with explaining_shortage(MEMORY_FLAGS):
            evaluate(parser.parse_args(argv))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command goes on where it was\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
