"""Shared makings: MP4 files whose pictures say their own frame number, and a tiny dataset and training run."""

import os

import av
import numpy as np
import pytest
import torch

import train_video_ddpm
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.io import save_mp4

torch.set_num_threads(1)  # tiny tensors: threads only cost, and spin where tests run beside each other


def numbered_frames(count, height=64, width=64):
    """Frames [T,H,W,3] uint8: the stripes of frame i, left to right, are the bits of i; the bottom half is red."""
    frames = np.zeros((count, height, width, 3), np.uint8)
    for i in range(count):
        for bit in range(8):
            if i >> bit & 1:
                frames[i, :, bit * width // 8 : (bit + 1) * width // 8] = 255
        frames[i, height // 2 :, :, 1:] //= 4
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


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What costs much and few tests are about: flushing to a busy disk (no test cuts the power), and drawing curves.

    Fixtures of a wider scope are set up before this, so the run of `learned` draws its curves.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(train_video_ddpm, "save_training_curves", lambda file, history: False)


@pytest.fixture(scope="session")
def square_videos(tmp_path_factory):
    """A folder of 10 small clips, 14 frames of 32x32, not split by folders."""
    root = tmp_path_factory.mktemp("squares")
    for i in range(10):
        save_mp4(root / f"{i:02d}.mp4", moving_square(i), fps=10)
    return root


TINY_FLAGS = [
    "--size", "16", "--base_channels", "12", "--channel_mults", "1", "2", "--res_blocks", "1",
    "--temporal_attn_levels", "1", "--batch_size", "2", "--num_workers", "0", "--vis_steps", "2", "--lr", "1e-3",
]  # fmt: skip


def tiny_checkpoint(root, videos, *flags):
    """A tiny checkpoint whose output layer is shaken awake, so that contexts and noise show in its samples."""
    status = train_video_ddpm.main(
        ["--data_root", str(videos), "--out_dir", str(root / "run"), "--cache_dir", str(root / "cache"),
         "--max_steps", "2", "--vis_every", "0", *TINY_FLAGS, *flags]
    )  # fmt: skip
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
