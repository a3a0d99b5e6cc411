"""Shared makings: MP4 files whose pictures say their own frame number, and a tiny dataset and training run."""

import os
import signal

import av
import numpy as np
import pytest
import torch

from utils.io import save_mp4

# Of tiny tensors threads only cost, and spin where tests run beside each other; here, and in every process started.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def numbered_frames(count, height=64, width=64):
    """Frames [T,H,W,3] uint8: the stripes of frame i, left to right, are the bits of i; the bottom half is red."""
    bits = np.arange(count)[:, None] >> np.arange(width) * 8 // width & 1  # [T,W]
    frames = np.broadcast_to(bits[:, None, :, None] * np.uint8(255), (count, height, width, 3)).astype(np.uint8)
    frames[:, height // 2 :, :, 1:] //= 4
    return frames


def number_of(frame):
    """The number that a decoded frame [3,H,W] shows."""
    h, w = frame.shape[1:]
    row = frame[:, : h // 4].float().mean((0, 1))  # [W]
    return sum(int(row[int((bit + 0.5) * w / 8)] > 127) << bit for bit in range(8))


def write_mp4(path, frames, *, codec="libx264", pix_fmt="yuv420p", rate=10, options=None, pts=None, container=None):
    """Encode [T,H,W,3] with any settings of codec and container; `pts` gives each frame a time in units of 1 / rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
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
    """A function of (name, count, ...) that writes numbered frames below tmp_path / "videos" and returns the path."""

    def make(name, count=12, height=64, width=64, **settings):
        return write_mp4(tmp_path / "videos" / name, numbered_frames(count, height, width), **settings)

    return make


def moving_square(seed, frames=14, size=32):
    """A clip to learn from, uint8 [3,T,H,W]: a bright square bouncing about on a tinted ground."""
    rng = np.random.default_rng(seed)
    clip = np.empty((frames, size, size, 3), np.uint8)
    clip[:] = rng.integers(20, 120, 3)
    side, room = size // 4, size - size // 4
    place, speed = rng.uniform(0, room, 2), rng.uniform(0.06, 0.1, 2) * size * rng.choice([-1, 1], 2)
    for frame in clip:
        y, x = np.abs((place + room) % (2 * room) - room).astype(int)
        frame[y : y + side, x : x + side] = (250, 200, 60)
        place = place + speed
    return torch.from_numpy(clip).permute(3, 0, 1, 2)


@pytest.fixture
def quick(monkeypatch):
    """Leave out what costs much and few tests are about: flushing to a busy disk (nobody cuts the power), curves, and
    most of what validation tries.

    Modules that train a lot ask for it: pytestmark = pytest.mark.usefixtures("quick"). Fixtures of a wider scope are
    set up before it, so the runs of those flush and draw.
    """
    import diffusion.loss
    import utils.io

    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(utils.io, "save_training_curves", lambda file, history: False)
    monkeypatch.setattr(diffusion.loss, "VALIDATION_PAIRS", 8)


def write_squares(folder, count=10, first=0, size=16):
    """A folder of so many clips of moving squares, by their seeds from `first` on; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        save_mp4(folder / f"{i:02d}.mp4", moving_square(first + i, size=size), fps=10)
    return folder


@pytest.fixture(scope="session")
def square_videos(tmp_path_factory):
    """A folder of 10 small clips, 14 frames of 32x32, not split by folders."""
    return write_squares(tmp_path_factory.mktemp("squares"), size=32)


def words(text):
    """The words of a command line without quotes."""
    return text.split()


NETWORK = "--size 16 --base_channels 12 --channel_mults 1 2 --res_blocks 1 --temporal_attn_levels 1"
TINY_FLAGS = words(f"{NETWORK} --batch_size 2 --num_workers 0 --vis_steps 2 --lr 1e-3")


def tiny_checkpoint(root, videos, *flags):
    """A tiny checkpoint whose output layer is shaken awake, so that contexts and noise show in its samples."""
    import train_video_ddpm
    from utils.checkpoint import load_checkpoint, save_checkpoint

    folders = ["--data_root", str(videos), "--out_dir", str(root / "run"), "--cache_dir", str(root / "cache")]
    status = train_video_ddpm.main([*folders, *TINY_FLAGS, *words("--max_steps 2 --vis_every 0"), *flags])
    assert status == 0
    checkpoint = load_checkpoint(root / "run" / "last.pt")
    generator = torch.Generator().manual_seed(0)
    for weights in (checkpoint["model"], checkpoint["ema"]):
        for name, value in weights.items():
            weights[name] = value + 0.05 * torch.randn(value.shape, generator=generator)
    save_checkpoint(root / "run" / "last.pt", checkpoint)
    return root / "run" / "last.pt"


@pytest.fixture(scope="session")
def ckpt(tmp_path_factory, square_videos):
    """A checkpoint trained on the square videos, 16x16."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), square_videos)


def run(out_dir, flags="", *given, status=0, stop=None, by=signal.SIGTERM):
    """Train in this process and check the exit status; a signal comes right after the step `stop`, as of a terminal."""
    import train_video_ddpm

    step = train_video_ddpm.train_step

    def step_then_signal(state, *rest):
        step(state, *rest)
        if state.step == stop:
            signal.raise_signal(by)

    given = ["--out_dir", out_dir, "--cache_dir", out_dir.parent / "cache", *given, *words(flags)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_video_ddpm, "train_step", step_then_signal)
        try:
            result = train_video_ddpm.main(list(map(str, given)))
        except SystemExit as left:
            result = left.code
    assert result == (128 + by if stop else status)
    return out_dir


@pytest.fixture
def train(square_videos, tmp_path):
    """A function that trains a tiny run of that name on the square videos; without previews, unless the flags ask."""

    def start(name, flags="", **how):
        tiny = ["--data_root", square_videos, *TINY_FLAGS, "--vis_every", "0", *words(flags)]
        return run(tmp_path / name, "", *tiny, **how)

    return start
