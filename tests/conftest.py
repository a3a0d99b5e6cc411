"""What tests share: MP4 files whose frames show their number, and tiny clips, networks and runs."""

import json
import os
import signal

import av
import numpy as np
import pytest
import torch

from utils.io import save_mp4

# On tiny tensors threads cost more than they give, here and in every process that is started.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# A shell's background job ignores it, and what is ignored stays ignored in a run.
signal.signal(signal.SIGINT, signal.default_int_handler)


def words(text):
    """The words of a command line without quotes."""
    return text.split()


NETWORK = "--size 16 --base_channels 12 --channel_mults 1 2 --res_blocks 1 --temporal_attn_levels 1"
TINY_FLAGS = words(f"{NETWORK} --batch_size 2 --num_workers 0 --vis_steps 2 --lr 1e-3")


# --- videos ---------------------------------------------------------------------------------------


def numbered_frames(count, height=64, width=64):
    """Frames [T,H,W,3] uint8: eight stripes are the bits of their number; red at the bottom."""
    stripes = np.arange(width) * 8 // width
    bits = np.arange(count)[:, None] >> stripes & 1  # [T,W]
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[:] = bits[:, None, :, None] * 255
    frames[:, height // 2 :, :, 1:] //= 4
    return frames


def number_of(frame):
    """The number that a decoded frame [3,H,W] shows."""
    height, width = frame.shape[1:]
    row = frame[:, : height // 4].float().mean((0, 1))  # [W]
    bits = [row[int((bit + 0.5) * width / 8)] > 127 for bit in range(8)]
    return sum(int(is_set) << bit for bit, is_set in enumerate(bits))


def write_mp4(
    path,
    frames,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    rate=10,
    options=None,
    pts=None,
    container=None,
):
    """Encode [T,H,W,3]; `pts` gives each frame a time in units of 1 / rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        stream.options = {"threads": "1", **(options or {})}
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pts is not None:
                frame.pts = pts[i]
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.fixture
def make_mp4(tmp_path):
    """A function (name, count, ...) that writes numbered frames below tmp_path / "videos"."""

    def make(name, count=12, height=64, width=64, **settings):
        frames = numbered_frames(count, height, width)
        return write_mp4(tmp_path / "videos" / name, frames, **settings)

    return make


def moving_square(seed, frames=14, size=32):
    """A clip uint8 [3,T,H,W]: a bright square that bounces about on a tinted ground."""
    rng = np.random.default_rng(seed)
    clip = np.empty((frames, size, size, 3), np.uint8)
    clip[:] = rng.integers(20, 120, 3)
    side = size // 4
    room = size - side
    place = rng.uniform(0, room, 2)
    speed = rng.uniform(0.06, 0.1, 2) * size * rng.choice([-1, 1], 2)
    for frame in clip:
        y, x = np.abs((place + room) % (2 * room) - room).astype(int)
        frame[y : y + side, x : x + side] = (250, 200, 60)
        place = place + speed
    return torch.from_numpy(clip).permute(3, 0, 1, 2)


def write_squares(folder, count=10, first=0, size=16):
    """Write clips of moving squares, with seeds from `first` on; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        save_mp4(folder / f"{i:02d}.mp4", moving_square(first + i, size=size), fps=10)
    return folder


@pytest.fixture(scope="session")
def square_videos(tmp_path_factory):
    """A folder of 10 clips, 14 frames of 32x32, not split by folders: 9 train, 1 is held out."""
    return write_squares(tmp_path_factory.mktemp("squares"), size=32)


@pytest.fixture
def prepare(tmp_path):
    """prepare_videos on tmp_path / "videos"; what it logs is in `.text`."""
    from data.video_index import prepare_videos

    def run(span=8, val_ratio=0.2, seed=0, **more):
        lines = []
        settings = {"span": span, "val_ratio": val_ratio, "seed": seed, "log": lines.append, **more}
        splits = prepare_videos(tmp_path / "videos", cache_dir=tmp_path / "cache", **settings)
        run.text = "\n".join(lines)
        return splits

    return run


def names(videos):
    """Their names in order."""
    return [video.name for video in videos]


# --- training -------------------------------------------------------------------------------------


def leave_out_what_is_slow(patch):
    """Flushing to disk, the list of packages, curves, and most of validation's pairs."""
    import diffusion.loss
    import training.logger
    import utils.io

    patch.setattr(os, "fsync", lambda descriptor: None)
    patch.setattr(training.logger, "describe_machine", lambda device: {})
    patch.setattr(utils.io, "save_training_curves", lambda file, history: False)
    patch.setattr(diffusion.loss, "VALIDATION_PAIRS", 4)


@pytest.fixture
def quick(monkeypatch):
    """Training without what is slow, but in fixtures of a wider scope."""
    leave_out_what_is_slow(monkeypatch)


@pytest.fixture(scope="module")
def narrow_predictor():
    """Predictors of a sixteenth of the width, for the tests of a module."""
    from models.predictor import FramePredictor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FramePredictor.__init__, "__defaults__", (3, 2, 4, 4, False, 8, 2.0, 0.7))
        yield


def run(out_dir, flags="", *given, status=0, stop=None, stage=None, by=signal.SIGTERM):
    """Train in this process and check the exit status; returns out_dir.

    Args:
        given: flags before `flags`, as a list.
        stop: the step right after which the signal `by` comes.
        stage: of which --train that is the step; None = of any.
    """
    import train_video_ddpm

    step = train_video_ddpm.train_step

    def step_then_signal(state, objective, batches, args, amp_dtype):
        step(state, objective, batches, args, amp_dtype)
        if state.step == stop and stage in (None, args.train):
            signal.raise_signal(by)

    folders = ["--out_dir", out_dir, "--cache_dir", out_dir.parent / "cache"]
    command = [str(word) for word in [*folders, *given, *words(flags)]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_video_ddpm, "train_step", step_then_signal)
        try:
            result = train_video_ddpm.main(command)
        except SystemExit as left:
            result = left.code
    assert result == (128 + by if stop else status)
    return out_dir


def last(out_dir, name="last.pt"):
    """The newest checkpoint of a run, or another one."""
    from utils.checkpoint import load_checkpoint

    return load_checkpoint(out_dir / name)


def lines(out_dir, kind):
    """The lines of metrics.jsonl of a kind, but for how fast they were."""
    text = (out_dir / "metrics.jsonl").read_text()
    found = [{**json.loads(line), "clips_per_second": 0} for line in text.splitlines()]
    return [line for line in found if line["kind"] == kind]


def check_refusal(capsys, *named):
    """One line was written to stderr, which names all of these."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert [name for name in named if name not in said] == []


@pytest.fixture
def train(square_videos, tmp_path):
    """A function (name, flags, ...) that trains in tmp_path / name without previews, see `run`."""

    def start(name, flags="", **how):
        given = ["--data_root", square_videos, *TINY_FLAGS, "--vis_every", "0"]
        return run(tmp_path / name, flags, *given, **how)

    return start


def tiny_checkpoint(root, videos, *flags):
    """Train two steps, and shake all weights so that contexts and noise show in samples."""
    from utils.checkpoint import load_checkpoint, save_checkpoint

    given = ["--data_root", videos, *TINY_FLAGS, "--max_steps", "2", "--vis_every", "0"]
    path = run(root / "run", "", *given, *flags) / "last.pt"
    checkpoint = load_checkpoint(path)
    generator = torch.Generator().manual_seed(0)
    for weights in (checkpoint["model"], checkpoint["ema"]):
        for name, value in weights.items():
            weights[name] = value + 0.05 * torch.randn(value.shape, generator=generator)
    save_checkpoint(path, checkpoint)
    return path


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory, square_videos):
    """A checkpoint trained on the square videos, 16x16."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), square_videos)
