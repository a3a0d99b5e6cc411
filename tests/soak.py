"""Try to break training and the reading of files at length, and count the outcomes.

    python tests/soak.py kill --count 200   kill -9 at random instants of training
    python tests/soak.py stop --count 50    SIGTERM after random steps of training
    python tests/soak.py fuzz --count 500   mutated videos, images and checkpoints
    python tests/soak.py disk               a disk that is full (needs root, for a tmpfs)

The exit status is 1 if a promise was broken. The test suite runs the same with small counts.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):
    # Python looks for modules beside this file only, not in the repository.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hostile
import torch
import torchvision.transforms.v2  # noqa: F401 - here, that each child need not
from conftest import run, words, write_squares

import train_video_ddpm
from data.kinetics_video_dataset import DecodedFrames, ResumableBatchSampler, read_clip
from data.video_index import Video
from data.video_reader import DECODE_ERRORS, probe_video
from diffusion.pipeline import MiddleFramePipeline
from training.arguments import Stage, resolve_stage
from training.checkpointer import has_checkpoint, load_latest
from training.objective import build_network, pick_objective
from training.state import init_state, restore
from utils.checkpoint import load_checkpoint
from utils.device import explain_oom
from utils.io import read_image
from utils.video_utils import as_pair

# The smallest network that trains.
SMALL = "--size 8 --base_channels 4 --channel_mults 1 --res_blocks 1 --temporal_attn_levels 0"
SMALL += " --batch_size 2 --num_workers 0 --vis_every 0 --vis_steps 2 --lr 1e-3"
FORK = multiprocessing.get_context("fork")


def same(a, b):
    """Whether nested values of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_end(one, other, name="last.pt"):
    """Whether two runs ended in the same weights, EMA, moments and history."""
    a = load_checkpoint(one / name)
    b = load_checkpoint(other / name)
    return all(same(a[key], b[key]) for key in a if key != "args")


def in_child(function, *arguments, patience=300):
    """The exit status of a function in a process of its own, killed after so many seconds."""
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(patience)
    process.kill()
    process.join()
    return process.exitcode


def train(folder, out_dir, flags, stop=None):
    """Train on; right after the step `stop` SIGTERM comes to this and the loading processes."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    out_dir.mkdir(exist_ok=True)
    sys.stdout = sys.stderr = out_dir.with_suffix(".log").open("a", buffering=1)
    train_step = train_video_ddpm.train_step

    def step_then_signal(state, *rest):
        train_step(state, *rest)
        if state.step == stop:
            os.killpg(0, signal.SIGTERM)

    train_video_ddpm.train_step = step_then_signal
    given = ["--resume"]
    if not has_checkpoint(out_dir):
        data = ["--data_root", folder / "clips", "--cache_dir", folder / "cache"]
        given = [*data, *words(f"{SMALL} --ema_update_after_step 3 {flags}")]
    sys.exit(train_video_ddpm.main([str(word) for word in ["--out_dir", out_dir, *given]]))


def steps_saved(out_dir):
    """The step that --resume would go on from; ValueError if no checkpoint can be read."""
    return load_latest(out_dir)[0]["step"] if has_checkpoint(out_dir) else 0


def disturb(how, count, folder, seed=0, steps=24):
    """Kill or stop training, until each run has come to its end; returns counts."""
    rng = random.Random(seed)
    flags = f"--max_steps {steps}"
    flags += " --save_every 1" if how == "kill" else " --num_workers 1"
    expected = -signal.SIGKILL if how == "kill" else 128 + signal.SIGTERM
    write_squares(folder / "clips")
    clock = time.monotonic()
    assert in_child(train, folder, folder / "straight", flags) == 0
    lifetime = time.monotonic() - clock
    counts = Counter()
    while counts["disturbed"] < count:
        out_dir = folder / f"run_{counts['runs']}"
        counts["runs"] += 1
        status = expected
        reached = 0
        while status == expected:
            if how == "kill":
                is_last = counts["disturbed"] >= count
                patience = 300 if is_last else rng.uniform(0, lifetime)
                status = in_child(train, folder, out_dir, flags, patience=patience)
            else:
                due = reached + rng.randint(1, steps // 2)
                status = in_child(train, folder, out_dir, flags, due)
                reached = min(due, steps)
            saved = steps_saved(out_dir)
            counts["lost"] += saved < reached
            reached = saved
            counts["disturbed"] += status == expected
        counts["failed"] += status != 0
        counts["different"] += status == 0 and not same_end(folder / "straight", out_dir)
        counts["left_behind"] += len(list(out_dir.glob(".*.tmp")))
    counts["tracebacks"] = sum("Traceback" in log.read_text() for log in folder.glob("*.log"))
    return counts


def disk(folder, steps=6):
    """Train where two checkpoints have room and three have not; OSError without a tmpfs."""
    flags = f"--max_steps {steps} --save_every 1"
    write_squares(folder / "clips")
    assert in_child(train, folder, folder / "straight", flags) == 0
    size = int(2.7 * (folder / "straight" / "last.pt").stat().st_size)
    room = folder / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(room)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise OSError("a small disk needs root, for a tmpfs")
    counts = Counter(runs=1)
    try:
        counts["not_refused"] = in_child(train, folder, room / "run", flags) != 2
        counts["lost"] = steps_saved(room / "run") != 2
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(room)], check=True)
        counts["failed"] = in_child(train, folder, room / "run", flags) != 0
        counts["different"] = not same_end(folder / "straight", room / "run")
    finally:
        subprocess.run(["umount", str(room)], check=False)
    return counts


def look_at_video(path):
    """Index a file and read a clip, as training does."""
    video = Video(str(path), path.name, probe_video(path), "")
    read_clip(DecodedFrames(16, "rgb"), video, 0, min(8, video.info.frames), 1)


def sample(path):
    """One sampler step from a checkpoint, or the prediction of a predictor's."""
    pipe = MiddleFramePipeline.from_checkpoint(path, "cpu")
    context = torch.zeros(1, 3, 2, 8, 8)
    pipe(context, context, num_middle=1, steps=0 if pipe.model is None else 1)


def resume(path):
    """What --resume does with a last.pt, up to the end of the next step."""
    stage = Stage(out_dir=path.parent, given={}, preset={}, resume=True)
    args, checkpoint, source, predictor = resolve_stage(train_video_ddpm.build_parser(), stage)
    device = torch.device("cpu")
    state = init_state(args, build_network(args, device), device, None)
    state.epoch_steps = 4
    restore(state, checkpoint, clips_per_step=2, source=source)
    args.max_steps = state.step + 1
    state.plan_steps(args)
    next(iter(ResumableBatchSampler(8, 2, 1, args.seed, state.data_step, state.data_step + 1)))
    objective = pick_objective(args, state.ema, predictor, val_clips=1, amp_dtype=None)
    channels = 1 if args.color_mode == "gray" else 3
    clip = torch.zeros(1, channels, as_pair(args.num_frames)[1], *as_pair(args.size))
    train_video_ddpm.train_step(state, objective, itertools.repeat(clip), args, None)
    state.history["train"].append([state.step, 0.0])
    state.history["epochs"].append({})


def mangle(data, rng):
    """Change a byte, cut the end off, or put a stretch of the file, zeros or noise in."""
    first = rng.randrange(len(data))
    source = rng.randrange(len(data))
    length = rng.randrange(1, rng.choice((9, 200, 5000)))
    changes = [
        (rng.randbytes(1), 1),
        (b"", len(data)),
        (data[source : source + length], rng.choice((0, length))),
        (bytes(length), rng.choice((0, length))),
        (rng.randbytes(length), rng.choice((0, length))),
    ]
    piece, replaced = rng.choice(changes)
    return data[:first] + piece + data[first + replaced :]


def rezip(data, rng):
    """Mutate the pickle of a checkpoint, and make the archive's checksums right again."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("data.pkl"):
                content = mangle(content, rng)
            copy.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def revalue(data, rng):
    """Put another value in some place of a checkpoint, however deep."""
    state = torch.load(io.BytesIO(data))
    inner = state
    while isinstance(inner, (dict, list)) and inner:
        place = inner
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inner = None if rng.random() < 0.1 else place[key]
    place[key] = rng.choice(HOSTILE_VALUES)
    # A network of a billion blocks is of the files made to exhaust memory, which are not refused.
    if key == "res_blocks":
        del place[key]
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


HOSTILE_VALUES = [None, -1, 0, 10**9, 2**31, 2**62, 10**30, 1.5, float("nan"), float("inf"), -1e30]
HOSTILE_VALUES += ["", "x", "/etc/passwd", b"bytes", [], [1], [10**6] * 3, ("a", 1), {}, True]
HOSTILE_VALUES += [torch.zeros(3), torch.zeros(1).expand(10**6, 10**6)]
LOOKS = {"video": look_at_video, "image": read_image, "sample": sample, "resume": resume}
WRITERS = {
    "video": [hostile.GOOD[name] for name in words("b_frames fragmented two_sizes ten_bit")],
    "image": [hostile.image(format=name) for name in words("PNG JPEG GIF BMP TIFF WEBP")],
}


def make_bases(kind, folder):
    """Whole files to mutate; checkpoints are of a predictor, and of what refines around it."""
    if kind not in WRITERS:
        given = ["--data_root", write_squares(folder / "clips", 4), *words(SMALL)]
        run(folder / "base", "--preset refine --max_steps 1", *given)
    for number, write in enumerate(WRITERS.get(kind, [])):
        write(folder / f"{number}.pt")
    return [path.read_bytes() for path in [*folder.glob("*.pt"), *folder.rglob("last.pt")]]


def look_at(look, path):
    """Exit with 0 for a file that is used, with 2 for one that is refused with a reason."""
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    sys.stdout = sys.stderr = path.with_name("log").open("w", buffering=1)
    try:
        with explain_oom("the size of what the file holds"):
            look(path)
    except DECODE_ERRORS as error:
        sys.exit(2 if str(error) else 1)


def fuzz(kind, count, folder, seed=0):
    """Look at mutated files, and keep those of a crash, hang or traceback; returns counts."""
    bases = make_bases(kind, folder)
    mutations = [mangle] if kind in WRITERS else [mangle, rezip, revalue]
    counts = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {kind} {number}")
        path = folder / str(number) / "last.pt"
        path.parent.mkdir()
        path.write_bytes(mutations[number % len(mutations)](rng.choice(bases), rng))
        status = in_child(look_at, LOOKS[kind], path)
        outcome = {0: "used", 2: "refused"}.get(status, f"status {status} of {path}")
        counts[outcome] += 1
        if status in (0, 2):
            shutil.rmtree(path.parent)
    return counts


def broken(counts):
    """The counts of a trial that must be zero and are not."""
    fine = ("disturbed", "runs", "used", "refused")
    return {name: count for name, count in counts.items() if count and name not in fine}


def build_parser():
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kill", "stop", "fuzz", "disk"))
    parser.add_argument("--count", type=int, default=100, help="of kills, stops or files")
    parser.add_argument("--seed", type=int, default=0, help="of instants and mutations")
    return parser


def main():
    """Entry point; returns the exit status."""
    args = build_parser().parse_args()
    root = Path(tempfile.mkdtemp(prefix="soak_"))
    promises = []
    for kind in LOOKS if args.what == "fuzz" else [args.what]:
        folder = root / kind
        folder.mkdir()
        if kind == "disk":
            counts = disk(folder)
        else:
            trial = fuzz if kind in LOOKS else disturb
            counts = trial(kind, args.count, folder, args.seed)
        promises.append(not broken(counts))
        print(f"{kind}: {dict(counts)}, broken promises: {broken(counts) or 'none'}; see {root}")
    return 0 if all(promises) else 1


if __name__ == "__main__":
    sys.exit(main())
