"""Try to break training and the reading of files at length, and count the outcomes.

    python tests/soak.py kill --count 200   kill -9 at random instants of training
    python tests/soak.py stop --count 50    SIGTERM after random steps of training
    python tests/soak.py fuzz --count 500   mutated videos, images and checkpoints
    python tests/soak.py disk               a disk that is full (needs root, for a tmpfs)

The exit status is 1 if a promise of docs/reliability.md was broken. The test suite runs the same
functions with small counts.
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
from conftest import run, words, write_squares

import train_video_ddpm
from data.kinetics_video_dataset import DecodedFrames, VideoClipDataset
from data.video_index import Video
from data.video_reader import DECODE_ERRORS, probe_video
from diffusion.pipeline import MiddleFramePipeline
from train_video_ddpm import OOM_REMEDY, build_parser as training_parser, train_step
from training.arguments import Stage, resolve_stage
from training.checkpointer import has_checkpoint, load_latest
from training.objective import build_network, configs_of, pick_objective
from training.state import init_state, restore, to_checkpoint
from utils.checkpoint import load_checkpoint
from utils.device import explain_oom
from utils.io import read_image
from utils.video_utils import as_pair

# The smallest network that trains.
SMALL = "--size 8 --base_channels 4 --channel_mults 1 --res_blocks 1 --temporal_attn_levels 0"
SMALL += " --batch_size 2 --num_workers 0 --vis_every 0 --lr 1e-3"
CPU = torch.device("cpu")
FORK = multiprocessing.get_context("fork")
PATIENCE = 300  # seconds after which a process counts as hanging
MEMORY_PER_FILE = 6 * 2**30  # bytes of address space


# --- a run that is killed, stopped or out of room -------------------------------------------------


def same(a, b):
    """Whether nested values of checkpoints are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_end(one, other):
    """Whether two runs ended in the same weights, EMA, moments and history."""
    a = load_checkpoint(one / "last.pt")
    b = load_checkpoint(other / "last.pt")
    names = ("step", "model", "ema", "optimizer", "history", "best_val_loss")
    return all(same(a[name], b[name]) for name in names)


def train_in_child(command, log, stop):
    """Train as a process group of its own, which gets SIGTERM right after the step `stop`."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.stdout = sys.stderr = log.open("a", buffering=1)

    def step_then_signal(state, *rest):
        train_step(state, *rest)
        if state.step == stop:
            os.killpg(0, signal.SIGTERM)

    train_video_ddpm.train_step = step_then_signal
    sys.exit(train_video_ddpm.main(command))


def start(folder, out_dir, flags, stop=None):
    """A process that trains on folder / "clips", from the beginning or from its last save."""
    out_dir.mkdir(exist_ok=True)
    command = ["--out_dir", out_dir, "--resume"]
    if not has_checkpoint(out_dir):
        data = ["--data_root", folder / "clips", "--cache_dir", folder / "cache"]
        command = ["--out_dir", out_dir, *data, *words(SMALL), *words(flags)]
    command = [str(word) for word in command]
    process = FORK.Process(target=train_in_child, args=(command, out_dir.with_suffix(".log"), stop))
    process.start()
    return process


def finish(process, timeout=PATIENCE):
    """The exit status of a process; None if it goes on after so many seconds."""
    process.join(timeout)
    return process.exitcode


def steps_saved(out_dir):
    """The step that --resume would go on from; None if no checkpoint can be read."""
    if not has_checkpoint(out_dir):
        return 0
    try:
        return load_latest(out_dir)[0]["step"]
    except ValueError:
        return None


def tracebacks(folder):
    """How many runs printed one."""
    return sum("Traceback" in log.read_text() for log in folder.glob("*.log"))


def kill(count, folder, seed=0, steps=24):
    """kill -9 after random times, until each run has come to its end; returns the counts."""
    rng = random.Random(seed)
    flags = f"--max_steps {steps} --save_every 1 --ema_update_after_step 3"
    write_squares(folder / "clips")
    clock = time.monotonic()
    assert finish(start(folder, folder / "straight", flags)) == 0
    lifetime = time.monotonic() - clock
    counts = Counter(kills=0, runs=0, lost=0, different=0, failed=0, left_behind=0)
    while counts["kills"] < count:
        out_dir = folder / f"run_{counts['runs']}"
        reached = 0
        status = None
        while status is None:
            process = start(folder, out_dir, flags)
            is_last = counts["kills"] == count
            status = finish(process, PATIENCE if is_last else rng.uniform(0, lifetime))
            if status is None:
                process.kill()
                process.join()
                saved = steps_saved(out_dir)
                counts["kills"] += 1
                counts["kills_in_training"] += bool(saved)
                counts["lost"] += saved is None or saved < reached
                reached = saved or 0
        counts["runs"] += 1
        counts["failed"] += status != 0
        counts["different"] += status == 0 and not same_end(folder / "straight", out_dir)
        counts["left_behind"] += len(list(out_dir.glob(".*.tmp")))
    counts["tracebacks"] = tracebacks(folder)
    return counts


def stop(count, folder, seed=0, steps=24, workers=2):
    """SIGTERM after random steps, until each run has come to its end; returns the counts."""
    rng = random.Random(seed)
    flags = f"--max_steps {steps} --ema_update_after_step 3 --num_workers {workers}"
    write_squares(folder / "clips")
    assert finish(start(folder, folder / "straight", flags)) == 0
    counts = Counter(stops=0, runs=0, different=0, failed=0)
    while counts["stops"] < count:
        out_dir = folder / f"run_{counts['runs']}"
        reached = 0
        while reached < steps:
            due = reached + rng.randint(1, steps // 2)
            status = finish(start(folder, out_dir, flags, stop=due))
            expected = 128 + signal.SIGTERM if due < steps else 0
            reached = min(due, steps)
            counts["stops"] += due < steps
            counts["failed"] += status != expected or steps_saved(out_dir) != reached
        counts["runs"] += 1
        counts["different"] += not same_end(folder / "straight", out_dir)
    counts["tracebacks"] = tracebacks(folder)
    return counts


def disk(folder, steps=6):
    """Train where there is room for two checkpoints, not for three; returns what happened.

    Raises: OSError: where a tmpfs cannot be mounted.
    """
    flags = f"--max_steps {steps} --save_every 1"
    write_squares(folder / "clips")
    assert finish(start(folder, folder / "straight", flags)) == 0
    size = int(2.7 * (folder / "straight" / "last.pt").stat().st_size)
    room = folder / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(room)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise OSError("a small disk needs root, for a tmpfs")
    try:
        out_dir = room / "run"
        found = {
            "status": finish(start(folder, out_dir, flags)),
            "steps_saved": steps_saved(out_dir),
            "left_behind": len(list(out_dir.glob(".*.tmp"))),
        }
        subprocess.run(["mount", "-o", f"remount,size={9 * size}", str(room)], check=True)
        found["status_with_room"] = finish(start(folder, out_dir, ""))
        found["same_end"] = same_end(folder / "straight", out_dir)
        return found
    finally:
        subprocess.run(["umount", str(room)], check=False)


# --- mutated files --------------------------------------------------------------------------------


def look_at_video(path):
    """What training does with a file: index it, and cut a clip."""
    try:
        info = probe_video(path)
    except DECODE_ERRORS as error:
        raise ValueError(str(error)) from error
    clips = VideoClipDataset(
        [Video(str(path), path.name, info, "")],
        DecodedFrames(16, "rgb"),
        num_frames=min(8, info.frames),
        frame_stride=1,
        seed=0,
        random_window=True,
    )
    if clips[0, 0].clip is None:
        raise ValueError(clips[0, 0].failures[0])


def look_at_checkpoint(path):
    """Sample from a checkpoint, and go on with the run in which it is last.pt."""
    refusals = []
    for use in (sample, resume):
        try:
            with explain_oom(OOM_REMEDY):
                use(path)
        except (ValueError, OSError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def sample(path):
    """One sampler step from a checkpoint."""
    pipe = MiddleFramePipeline.from_checkpoint(path, "cpu")
    context = torch.zeros(1, 3, 2, 8, 8)
    pipe(context, context, num_middle=1, steps=0 if pipe.model is None else 1)


def resume(path):
    """What --resume does with a checkpoint, up to the next one."""
    folder = path.with_suffix("")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / "last.pt")
    stage = Stage(out_dir=folder, given={"resume": True}, preset={})
    start = resolve_stage(training_parser(), stage)
    args = start.args
    args.processes = 1
    state = init_state(args, build_network(args, CPU), CPU, None)
    restore(state, start.checkpoint, clips_per_step=2, epoch_steps=4, source=start.source)
    args.max_steps = state.step + 1
    state.plan_steps(args, epoch_steps=4)
    objective = pick_objective(args, state.ema, start.predictor, val_clips=1, amp_dtype=None)
    channels = 1 if args.color_mode == "gray" else 3
    clip = torch.zeros(1, channels, as_pair(args.num_frames)[1], *as_pair(args.size))
    train_step(state, objective, itertools.repeat(clip), args, None)
    torch.save(to_checkpoint(state, configs_of(args, objective, None), 4), io.BytesIO())


def flip(data, rng):
    """Turn some bits over."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    """Keep the beginning only."""
    return data[: rng.randrange(len(data))]


def splice(data, rng):
    """Put a stretch of the file, zeros or noise in, between bytes or in their place."""
    start = rng.randrange(len(data))
    length = rng.randrange(1, 1 + min(len(data), rng.choice((8, 200, 5000))))
    source = rng.randrange(len(data))
    piece = rng.choice((data[source : source + length], bytes(length), rng.randbytes(length)))
    return data[:start] + piece + data[start + rng.choice((0, length)) :]


MUTATIONS = (flip, cut, splice)


def rezip(data, rng):
    """Mutate the pickle or a tensor of a checkpoint, and make its checksums right again."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    chosen = rng.choice([name for name in names if name.endswith("data.pkl")] * 30 + names)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as copy:
        for name in names:
            content = archive.read(name)
            if name == chosen and content:
                content = rng.choice(MUTATIONS)(content, rng)
            copy.writestr(name, content)
    return out.getvalue()


HOSTILE_VALUES = [None, -1, 0, 10**9, 2**31, 2**62, 10**30, 1.5, float("nan"), float("inf"), -1e30]
HOSTILE_VALUES += ["", "x", "/etc/passwd", b"bytes", [], [1], [10**6] * 3, ("a", 1), {}, True]
HOSTILE_VALUES += [torch.zeros(3), torch.zeros(1).expand(10**6, 10**6)]


def revalue(data, rng):
    """Replace one value of a checkpoint, however deep, or delete it."""
    state = torch.load(io.BytesIO(data))
    place = state
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        is_inner = isinstance(place[key], (dict, list)) and place[key]
        if not is_inner or rng.random() < 0.1:
            break
        place = place[key]
    # A network of a billion blocks is of the files made to exhaust memory, which are not refused.
    if rng.random() < 0.1 or key == "res_blocks":
        del place[key]
    else:
        place[key] = rng.choice(HOSTILE_VALUES)
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def written(path, write):
    """The bytes of the file that a function writes."""
    write(path)
    return path.read_bytes()


def video_bases(folder):
    """Whole videos of several kinds."""
    names = ("b_frames", "another_codec", "fragmented", "two_sizes", "ten_bit")
    return [written(folder / "base.mp4", hostile.GOOD[name]) for name in names]


def image_bases(folder):
    """Whole images of several formats."""
    formats = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")
    return [written(folder / name, hostile.image(format=name)) for name in formats]


def checkpoint_bases(folder):
    """Small checkpoints of a predictor and of the diffusion that refines around it."""
    given = ["--data_root", write_squares(folder / "videos", 4), *words(SMALL)]
    run(folder / "base", "--preset refine --max_steps 1", *given)
    return [path.read_bytes() for path in sorted((folder / "base").glob("**/last.pt"))]


FUZZED = {  # kind of file -> what looks at it, its bases, its mutations, its suffix
    "video": (look_at_video, video_bases, MUTATIONS, ".mp4"),
    "image": (read_image, image_bases, MUTATIONS, ".png"),
    "checkpoint": (look_at_checkpoint, checkpoint_bases, (*MUTATIONS, rezip, revalue), ".pt"),
}


def serve(look, pipe):
    """Look at each file whose path comes in, and answer with the outcome."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_PER_FILE, MEMORY_PER_FILE))
    sys.stdout = sys.stderr = Path(os.devnull).open("w")
    while True:
        path = pipe.recv()
        try:
            look(path)
            pipe.send("used")
        except (ValueError, OSError) as error:
            pipe.send("refused" if str(error) and "\n" not in str(error) else f"LINES: {error!r}")
        except Exception as error:  # noqa: BLE001 - what must never happen is counted
            pipe.send(f"TRACEBACK: {error!r}")


def fuzz(kind, count, folder, seed=0):
    """Look at mutated files of a kind; returns counts of outcomes, and the bad ones by file."""
    look, make_bases, mutations, suffix = FUZZED[kind]
    bases = make_bases(folder)
    counts = Counter()
    bad = {}
    process = None
    for number in range(count):
        rng = random.Random(f"{seed} {kind} {number}")
        mutate = mutations[number % len(mutations)]
        path = folder / f"{mutate.__name__}_{number}{suffix}"
        path.write_bytes(mutate(bases[number // len(mutations) % len(bases)], rng))
        # A crash or a hang costs the process, not the trial.
        if process is None:
            pipe, other_end = FORK.Pipe()
            process = FORK.Process(target=serve, args=(look, other_end), daemon=True)
            process.start()
            other_end.close()
        pipe.send(path)
        outcome = "HANG"
        if pipe.poll(PATIENCE):
            try:
                outcome = pipe.recv()
            except EOFError:
                outcome = "CRASH"
        if outcome in ("HANG", "CRASH"):
            process.kill()
            process.join()
            process = None
        counts[f"{mutate.__name__} {outcome.split(':')[0]}"] += 1
        if outcome not in ("used", "refused"):
            bad[str(path)] = outcome
    if process is not None:
        process.kill()
        process.join()
    return counts, bad


# --- the command line -----------------------------------------------------------------------------


def run_trial(what, count, seed, folder):
    """Run one of the trials and print what it found; returns whether every promise held."""
    if what == "fuzz":
        promises = []
        for kind in FUZZED:
            (folder / kind).mkdir()
            counts, bad = fuzz(kind, count or 500, folder / kind, seed)
            print(kind, dict(sorted(counts.items())), *bad.items(), sep="\n    ")
            promises.append(not bad)
        return all(promises)
    if what == "disk":
        found = disk(folder)
        print(found)
        expected = {"status": 2, "steps_saved": 2, "left_behind": 0}
        return found == {**expected, "status_with_room": 0, "same_end": True}
    trial = {"kill": kill, "stop": stop}[what]
    counts = trial(count or {"kill": 200, "stop": 50}[what], folder, seed)
    print(dict(counts))
    broken = ("lost", "different", "failed", "left_behind", "tracebacks")
    return not any(counts[name] for name in broken)


def build_parser():
    """Every flag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("kill", "stop", "fuzz", "disk"))
    parser.add_argument("--count", type=int, help="how many; None = as above")
    parser.add_argument("--seed", type=int, default=0, help="of instants and mutations")
    return parser


def main():
    """Entry point; returns the exit status."""
    args = build_parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    all_held = run_trial(args.what, args.count, args.seed, folder)
    if all_held:
        shutil.rmtree(folder)
    print("all promises held" if all_held else f"BROKEN, see {folder}")
    return 0 if all_held else 1


if __name__ == "__main__":
    sys.exit(main())
