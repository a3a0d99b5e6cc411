"""Try to break training and loading, for as long as you like, and count the outcomes.

    python tests/soak.py kill --count 200        kill -9 at random instants of training: nothing lost, the same weights
    python tests/soak.py stop --count 50         SIGTERM at random steps: exit status 143, the same weights
    python tests/soak.py hostile                 every hostile file of tests/hostile.py: outcome, memory, seconds
    python tests/soak.py clips --count 10000     a folder with bad files in it: the windows of the good ones alone
    python tests/soak.py fuzz --count 500        mutated videos, checkpoints and images
    python tests/soak.py disk                    a disk that is full (needs root, for a tmpfs)

Exit status 1 if a promise was broken. The test suite runs the same functions with small counts.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

if __package__ in (None, ""):  # run as a file: Python then looks beside it only, not in the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hostile as files
import torch
import torchvision.transforms.v2  # noqa: F401 (in what forks share, not in the time and memory of a trial)
from conftest import TINY_FLAGS, write_squares

import sample_video_ddpm
import train_video_ddpm
from data.kinetics_video_dataset import DecodedFrames, VideoClipDataset
from data.video_index import Video, prepare_videos, probe_or_reason
from training.checkpointer import load_latest
from utils.checkpoint import load_checkpoint
from utils.io import read_image
from utils.video_utils import resize_and_crop

ROOT = Path(__file__).resolve().parents[1]
FORK = False  # whether training processes are forks of this one, and so need not import torch
SECONDS_PER_FILE = 10
MEMORY_PER_FILE = 300 * 10**6  # bytes of growth
WINDOW = {"num_frames": 8, "frame_stride": 1, "random_window": True}


# --- one file, in a process of its own that may crash or hang ---------------------------------------------------------


def look_at_video(path):
    """What training does with a file: find out what is in it, and cut a clip."""
    info, reason = probe_or_reason(path)
    if info is not None and info.frames < 8:
        reason = f"{info.frames} frames"
    if reason:
        return f"refused: {reason}"
    video = Video(str(path), path.name, info, "")
    read = VideoClipDataset([video], DecodedFrames(64, "rgb"), seed=0, **WINDOW)[0, 0]
    if read.clip is None:
        return f"refused: {read.failures[0]}"
    return f"completed: {info.frames} frames{', ' + info.damage if info.damage else ''}"


def look_at_image(path):
    """What sampling does with a start image."""
    try:
        image = read_image(path)
        return f"completed: {tuple(resize_and_crop(image, 64).shape)} of {tuple(image.shape)}"
    except ValueError as error:
        return f"refused: {error}"


def look_at_checkpoint(path):
    """What sampling from it and going on with it come to, in a folder of its own with images and clips beside it."""
    images = [str(path.parent / "image.png")] * 2
    run = path.with_suffix("")
    run.mkdir()
    shutil.copyfile(path, run / "last.pt")
    flags = ["--ckpt", path, "--start_images", *images, "--end_images", *images, "--out_dir", run / "sample"]
    outcomes = []
    resume = ["--out_dir", run, "--resume", "--max_steps", "3"]
    for main, words in ((sample_video_ddpm.main, [*flags, "--steps", "1"]), (train_video_ddpm.main, resume)):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                status = main([*map(str, words), "--device", "cpu"]) or 0
            except SystemExit as stop:
                status = stop.code
        lines = said.getvalue().strip().splitlines() or [""]
        refused = status in (1, 2) and "Traceback" not in said.getvalue()  # 1: its weights are diverged
        outcomes.append("completed" if status == 0 else f"refused: {lines[-1]}" if refused else f"exit {status}")
    shutil.rmtree(run)
    return f"{outcomes[0].split(':')[0]}, resume {outcomes[1]}"


LOOKS = {"video": look_at_video, "image": look_at_image, "checkpoint": look_at_checkpoint}


def memory(name):
    """A figure of this process in bytes, of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def serve(kind):
    """Look at every file whose path comes in, and answer with the outcome, the seconds and the growth of memory."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        path = Path(json.loads(line))
        Path("/proc/self/clear_refs").write_text("5")
        before, clock = memory("VmRSS"), time.monotonic()
        try:
            outcome = LOOKS[kind](path)
        except Exception as error:  # noqa: BLE001 - this is what must never happen, and is counted
            outcome = f"TRACEBACK: {type(error).__name__}: {error}"
        growth = memory("VmHWM") - before
        answers.write(json.dumps([outcome, time.monotonic() - clock, growth]) + "\n")


class Looker:
    """A process that looks at files, started anew where one makes it crash or hang."""

    def __init__(self, kind, seconds=SECONDS_PER_FILE):
        self.kind = kind
        self.seconds = seconds
        self.process = None

    def __call__(self, path):
        """The outcome in words, the seconds and the bytes of one file."""
        if self.process is None:
            words = [sys.executable, __file__, "serve", self.kind]
            self.process = subprocess.Popen(
                words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self.ask(None)  # warm up: its imports are not the file's
        answer = self.ask(path)
        if answer is None:
            self.process.kill()
            status = self.process.wait()
            self.process = None
            return ("HANG" if status == -signal.SIGKILL else f"CRASH: status {status}"), self.seconds, 0
        return tuple(answer)

    def ask(self, path):
        patience = 120 if path is None else self.seconds
        self.process.stdin.write(json.dumps(str(path or "/nonexistent")) + "\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], patience)[0]:
            return None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def broken(outcome, seconds=0, growth=0):
    """Whether an outcome breaks the promise: completed, or refused with a reason, in bounded time and memory."""
    plain = outcome.startswith(("completed", "refused"))
    return not plain or "exit" in outcome or seconds > SECONDS_PER_FILE or growth > MEMORY_PER_FILE


# --- hostile files ----------------------------------------------------------------------------------------------------


def hostile(folder):
    """Look at every hostile file; returns (name, outcome, seconds, bytes) of each."""
    files.make_all(folder)
    found = []
    for kind in ("video", "image"):
        with Looker(kind) as look:
            for path in sorted((folder / f"{kind}s").iterdir()):
                if path.suffix.lower() in (".mp4", ".png"):
                    found.append((path.name, *look(path)))
    return found


# --- mutated files ----------------------------------------------------------------------------------------------------


def flip(data, rng):
    """Some bits turned over."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def cut(data, rng):
    """The beginning alone."""
    return data[: rng.randrange(len(data))]


def splice(data, rng):
    """A stretch from elsewhere in the file, or of zeros or noise, inserted or in place of another."""
    start, length = rng.randrange(len(data)), rng.randrange(1, 1 + min(len(data), rng.choice((8, 200, 5000))))
    source = rng.randrange(len(data))
    piece = rng.choice((data[source : source + length], bytes(length), rng.randbytes(length)))
    return data[:start] + piece + data[start + rng.choice((0, length)) :]


MUTATIONS = (flip, cut, splice)
HOSTILE_VALUES = [None, -1, 0, 10**9, 2**31, 2**62, 10**30, 1.5, float("nan"), float("inf"), -1e30, "", "x"]
HOSTILE_VALUES += ["/etc/passwd", b"bytes", [], [1], [10**6] * 3, ("a", 1), {}, True]


def rezip(data, rng):
    """A checkpoint whose pickle or a tensor is mutated, with checksums that are right again."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    names = archive.namelist()
    chosen = rng.choice([name for name in names if name.endswith("data.pkl")] * 3 + names)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as copy:
        for name in names:
            content = archive.read(name)
            copy.writestr(name, rng.choice(MUTATIONS)(content, rng) if name == chosen and content else content)
    return out.getvalue()


def revalue(data, rng):
    """A checkpoint in which one value, anywhere in it, is another, or gone."""
    state = place = torch.load(io.BytesIO(data))
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], (dict, list)) and place[key] and rng.random() < 0.9):
            break
        place = place[key]
    value = rng.choice([*HOSTILE_VALUES, torch.zeros(3), torch.zeros(1).expand(10**6, 10**6), "delete"])
    if isinstance(value, str) and value == "delete":
        del place[key]
    else:
        place[key] = value
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def mp4_bases(folder):
    """Whole videos of several kinds to mutate."""
    kinds = ("b_frames", "another_codec", "fragmented", "two_sizes", "ten_bit")
    return [written(folder / f"{kind}.mp4", files.GOOD[kind]) for kind in kinds]


def written(path, write):
    """The bytes of the file that a function writes."""
    write(path)
    return path.read_bytes()


def image_bases(folder):
    """Whole images of several formats to mutate."""
    writers = {kind: files.image(format=kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
    writers |= {name: files.GOOD_IMAGES[name] for name in ("turned_by_exif", "palette_with_transparency")}
    return [written(folder / name, write) for name, write in writers.items()]


def checkpoint_bases(folder):
    """A tiny checkpoint to mutate, with the image and the clips that trying it needs beside it."""
    files.picture().save(folder / "image.png")
    write_squares(folder / "videos", 4)
    flags = ["--data_root", folder / "videos", "--cache_dir", folder / "cache", "--out_dir", folder / "base"]
    with contextlib.redirect_stdout(io.StringIO()):
        train_video_ddpm.main([*map(str, flags), *TINY_FLAGS, "--max_steps", "2", "--vis_every", "0"])
    return [(folder / "base" / "last.pt").read_bytes()]


FUZZED = {  # kind of file -> its bases, its mutations, its suffix
    "video": (mp4_bases, MUTATIONS, ".mp4"),
    "image": (image_bases, MUTATIONS, ".png"),
    "checkpoint": (checkpoint_bases, (*MUTATIONS, rezip, revalue), ".pt"),
}


def fuzz(kind, count, folder, seed=0):
    """Try `count` mutated files of a kind; returns the counts of outcomes, and (file, outcome) of broken promises."""
    bases, mutations, suffix = FUZZED[kind]
    bases, counts, bad = bases(folder), Counter(), []
    with Looker(kind) as look:
        for number in range(count):
            rng = random.Random(f"{seed} {kind} {number}")
            mutation = mutations[number % len(mutations)]
            path = folder / f"{mutation.__name__}_{number}{suffix}"
            path.write_bytes(mutation(bases[number // len(mutations) % len(bases)], rng))
            outcome, seconds, growth = look(path)
            if broken(outcome, seconds, growth):
                bad.append((path.name, f"{outcome} ({seconds:.1f} s, {growth / 2**20:.0f} MiB)"))
                counts["BROKEN"] += 1
            else:
                counts[" ".join(outcome.split(":")[:2])[:40] if kind == "checkpoint" else outcome.split(":")[0]] += 1
                path.unlink()
    return counts, bad


# --- training that is killed, stopped, or out of room -----------------------------------------------------------------


def start_training(folder, out_dir, *flags):
    """A training process as a user starts it: from the beginning, or on from its own checkpoint."""
    words = ["--out_dir", out_dir]
    if any((out_dir / name).exists() for name in ("last.pt", "prev.pt")):
        words.append("--resume")
    else:
        words += ["--data_root", folder / "clips", "--cache_dir", folder / "cache", *TINY_FLAGS, "--epochs", "99"]
        words += ["--vis_every", "0", "--log_every", "1", "--ema_update_after_step", "3", *flags]
    return start(list(map(str, words)), out_dir.with_suffix(".log"))


class Forked:
    """A child of this process that runs a function, with the methods of subprocess.Popen: it need not import torch."""

    def __init__(self, function, log):
        self.status = None
        file = log.open("a", buffering=1)
        self.pid = os.fork()
        if self.pid == 0:
            sys.stdout = sys.stderr = file
            for number in (signal.SIGINT, signal.SIGTERM):  # as in a fresh process, whatever pytest made of them
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            try:
                status = function()
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)

    def poll(self):
        if self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if done else None
        return self.status

    def wait(self, timeout=None):
        end = time.monotonic() + (100 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.005)
        return self.status

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(words, log):
    """train_video_ddpm.py with these arguments; what it prints is added to a file."""
    if FORK:
        return Forked(lambda: train_video_ddpm.main(words), log)
    command = [sys.executable, "train_video_ddpm.py", *words]
    with log.open("a") as file:
        return subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})


def wait_for(holds, seconds):
    """Look until something holds.

    Raises: TimeoutError: if it does not in so many seconds.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)


def steps_saved(out_dir):
    """Of the checkpoint that --resume would take, 0 where there is none yet; None if it cannot be read."""
    if not any((out_dir / name).exists() for name in ("last.pt", "prev.pt")):
        return 0
    try:
        return load_latest(out_dir)[0]["step"]
    except ValueError:
        return None


def same(a, b):
    """Bitwise equality of nested checkpoints."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_end(one, other):
    """Whether two runs ended in the same weights, averages, moments and history, bit for bit."""
    a, b = (load_checkpoint(folder / "last.pt") for folder in (one, other))
    return all(same(a[key], b[key]) for key in ("step", "model", "ema", "optimizer", "history", "best_val_loss"))


def begin(folder, *flags, **counts):
    """Clips, the undisturbed run on them, and its seconds; returns these and the counts to be made."""
    write_squares(folder / "clips")
    clock = time.monotonic()
    assert start_training(folder, folder / "straight", *flags).wait() == 0
    return time.monotonic() - clock, Counter(counts)


def kill(count, folder, seed=0, steps=24):
    """kill -9 after a random time, again and again, until each run has come to its end; returns the counts."""
    rng, flags = random.Random(seed), ["--max_steps", steps, "--save_every", 1, "--num_workers", 0]
    lifetime, counts = begin(folder, *flags, kills=0, runs=0, lost=0, different=0, failed=0)
    while counts["kills"] < count:
        out_dir, reached, status = folder / f"run_{counts['runs']}", 0, None
        out_dir.mkdir()
        while status is None:
            process = start_training(folder, out_dir, *flags)
            try:
                status = process.wait(rng.uniform(0, lifetime) if counts["kills"] < count else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                counts["kills"] += 1
                saved = steps_saved(out_dir)
                counts["lost"] += saved is None or saved < reached
                counts["in training"] += bool(saved)
                reached = saved or 0
        counts["failed"] += status != 0
        counts["runs"] += 1
        counts["different"] += not same_end(folder / "straight", out_dir)
        counts["left behind"] += len(list(out_dir.glob(".*.tmp")))
    counts["fell back to prev.pt"] = sum("going on from" in log.read_text() for log in folder.glob("run_*.log"))
    return counts


def stop(count, folder, seed=0, steps=40, workers=0):
    """SIGTERM at a random step, again and again, until each run has come to its end; returns the counts."""
    rng, flags = random.Random(seed), ["--max_steps", steps, "--num_workers", workers]
    _, counts = begin(folder, *flags, stops=0, runs=0, status_143=0, different=0, failed=0)
    while counts["stops"] < count:
        out_dir, reached = folder / f"run_{counts['runs']}", 0
        out_dir.mkdir()
        while reached < steps:
            process = start_training(folder, out_dir, *flags)
            due = reached + rng.randint(1, 12) if counts["stops"] < count else steps + 1
            wait_for(lambda: process.poll() is not None or steps_written(out_dir) >= due, 300)  # noqa: B023
            if due <= steps:
                process.send_signal(signal.SIGTERM)
            status, reached = process.wait(), steps_saved(out_dir)
            counts["stops"] += reached < steps
            counts["status_143"] += reached < steps and status == 128 + signal.SIGTERM
            counts["failed"] += reached == steps and status != 0
        counts["runs"] += 1
        counts["different"] += not same_end(folder / "straight", out_dir)
    counts["tracebacks"] = sum("Traceback" in log.read_text() for log in folder.glob("run_*.log"))
    return counts


def steps_written(out_dir):
    """Of the newest whole line of a run's metrics.jsonl."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    return 0


def disk(folder, steps=6):
    """Train on a disk that has room for two checkpoints, not for three; returns what happened.

    Raises: OSError: where a tmpfs cannot be mounted.
    """
    room = folder / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(room)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise OSError("a small disk needs root, for a tmpfs")
    try:
        flags = ["--max_steps", steps, "--save_every", 1, "--num_workers", 0]
        begin(folder, *flags)
        out_dir = room / "run"
        out_dir.mkdir()
        status = start_training(folder, out_dir, *flags).wait()
        found = {"status": status, "steps_saved": steps_saved(out_dir)}
        found["said"] = [line for line in out_dir.with_suffix(".log").read_text().splitlines() if str(room) in line]
        found["temporaries"] = len(list(out_dir.glob(".*.tmp")))
        subprocess.run(["mount", "-o", "remount,size=90m", str(room)], check=True)
        found["status_with_room"] = start_training(folder, out_dir).wait()
        found["same_end"] = same_end(folder / "straight", out_dir)
        return found
    finally:
        subprocess.run(["umount", str(room)], check=False)


# --- many clips, some of them bad -------------------------------------------------------------------------------------


class Notes:
    """A FrameSource that decodes nothing: a clip is the number of its file and those of its frames."""

    def __init__(self, broken=()):
        self.broken = set(broken)

    def read(self, video, wanted):
        """See FrameSource."""
        if video.name in self.broken:
            raise ValueError("broken since it was indexed")
        return torch.tensor([int(video.name[:5]), *wanted])


def clips(count, folder, seed=0, bad_share=0.05, epochs=2):
    """Index a folder of which a share is bad, and one of the good ones alone, and compare all training windows.

    Then let as many files again break after they were indexed, and compare with the rule by which they are replaced.
    """
    rng = random.Random(seed)
    whole = write_squares(folder / "whole", 20)
    bases = sorted(whole.iterdir())
    bad = set(rng.sample(range(count), round(bad_share * count)))
    for name in ("mixed", "good"):
        (folder / name).mkdir()
    for i in range(count):
        for name in ("mixed", "good") if i not in bad else ("mixed",):
            path = folder / name / f"{i:05d}.mp4"
            data = bases[i % len(bases)].read_bytes()
            if i not in bad:
                os.link(bases[i % len(bases)], path)
            else:
                path.write_bytes(rng.choice((b"", b"text", data[: len(data) // 2], rng.randbytes(500))))
    settings = {"span": 8, "val_ratio": 0.05, "seed": 42, "cache_dir": folder / "cache", "log": lambda line: None}
    clock = time.monotonic()
    sides = {name: prepare_videos(folder / name, workers=2, **settings) for name in ("mixed", "good")}
    counts = Counter(files=count, bad=len(bad), seconds=round(time.monotonic() - clock))

    train = {name: VideoClipDataset(sides[name][0], Notes(), seed=42, **WINDOW) for name in sides}
    keys = [(epoch, i) for epoch in range(epochs) for i in range(len(train["good"]))]
    counts["windows"] = len(keys)
    counts["different"] = abs(len(train["good"]) - len(train["mixed"])) + sum(
        not same(train["good"][key].clip, train["mixed"][key].clip) for key in keys
    )
    names = [video.name for video in train["good"].videos]
    broken = set(rng.sample(names, round(bad_share * len(names))))
    replacing = VideoClipDataset(sides["good"][0], Notes(broken), seed=42, **WINDOW)
    for epoch, i in keys:
        read = replacing[epoch, i]
        name, start = by_the_rule(42, epoch, i, names, broken, [video.info.frames for video in train["good"].videos])
        counts["replaced"] += bool(read.failures)
        counts["replaced_differently"] += read.clip.tolist() != [int(name[:5]), *range(start, start + 8)]
    return counts


def by_the_rule(seed, epoch, i, names, broken, lengths):
    """The file and the first frame of a clip of 8, by the rule of docs/reliability.md, written down anew."""
    draw = lambda words: int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big")  # noqa: E731
    for attempt in range(8):
        number = draw(f"{seed},{epoch},{i},{attempt}")
        chosen = i if attempt == 0 else draw(f"file {number}") % len(names)
        if names[chosen] not in broken:
            return names[chosen], (number >> 2) % (lengths[chosen] - 7)
    raise AssertionError("no file in eight attempts")


# --- the command line -------------------------------------------------------------------------------------------------


def run(what, count, seed, folder):
    """One of the trials of the module's docstring: prints the counts, and returns whether every promise held."""
    found, wrong = {}, []
    if what == "kill":
        found["kill"] = counts = kill(count or 200, folder, seed)
        wrong = [counts[name] for name in ("lost", "different", "failed", "left behind")]
    elif what == "stop":
        for workers in (0, 2):
            (folder / str(workers)).mkdir()
            found[f"{workers} workers"] = counts = stop(count or 50, folder / str(workers), seed, workers=workers)
            wrong += [counts[name] for name in ("different", "failed", "tracebacks")]
            wrong.append(counts["stops"] - counts["status_143"])
    elif what == "hostile":
        looks = hostile(folder)
        for name, outcome, seconds, growth in looks:
            found[repr(name)] = f"{outcome} ({seconds:.2f} s, {growth / 1e6:.0f} MB)"
        wrong = [name for name, *rest in looks if broken(*rest)]
        found["files"], found["BROKEN"] = len(looks), wrong
        found["at most"] = f"{max(look[2] for look in looks):.2f} s, {max(look[3] for look in looks) / 1e6:.0f} MB"
    elif what == "clips":
        found["clips"] = counts = clips(count or 10_000, folder, seed)
        wrong = [counts["different"], counts["replaced_differently"]]
    elif what == "fuzz":
        for kind in FUZZED:
            (folder / kind).mkdir()
            found[kind], bad = fuzz(kind, count or 500, folder / kind, seed)
            found |= {str(folder / kind / name): outcome for name, outcome in bad}
            wrong += bad
    else:
        found = disk(folder)
        wrong = [found["steps_saved"] != 2, found["status_with_room"] != 0, not found["same_end"]]
    for name, value in found.items():
        print(f"{name}: {dict(value.most_common()) if isinstance(value, Counter) else value}")
    return not any(wrong)


def build_parser():
    """Every flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kill", "stop", "hostile", "clips", "fuzz", "disk"))
    parser.add_argument("--count", type=int, help="how many; None = as in the table above")
    parser.add_argument("--seed", type=int, default=0, help="of instants and mutations")
    fork = "start training as forks: faster, and no kill hits an import"
    parser.add_argument("--fork", action="store_true", help=fork)
    return parser


def main():
    """Entry point; returns the exit status."""
    global FORK
    args = build_parser().parse_args()
    FORK = args.fork
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    clock = time.monotonic()
    fine = run(args.what, args.count, args.seed, folder)
    print(f"{'all promises held' if fine else f'BROKEN, see {folder}'}; {time.monotonic() - clock:.0f} s")
    if fine:
        shutil.rmtree(folder)
    return 0 if fine else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
