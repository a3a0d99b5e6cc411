"""Stochastic Moving MNIST: two digits that bounce off the border with a velocity drawn anew.

A clip is a function of (seed, epoch, number): training never repeats, and can be resumed.

Source: Denton & Fergus 2018, arXiv:1802.07687; the rules are those of its code.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.kinetics_video_dataset import ClipRead
from utils.flags import MNIST_PREFIX
from utils.video_utils import FrameSize, as_pair, resize

SIDE = 64  # pixels of a frame
DIGIT = 32  # pixels of a digit, enlarged from 28
DIGITS = 2  # per clip
FASTEST = 4  # pixels per frame and axis
EPOCH_CLIPS = 8192  # of the endless training stream, for logs and validation
VALIDATION_CLIPS = 64
VALIDATION_DIGITS = 5000  # the last of MNIST's training images
TEST_CLIPS = 256
TEST_SEED = 2**40  # that no training is likely to have
# The published test clips draw their digits from the first of MNIST's test images alone.
TEST_IMAGES = 256
FILES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}


def open_moving_mnist(
    data_root: str, num_frames: int, frame_stride: int, size: FrameSize, color_mode: str, seed: int
) -> tuple["MovingMNIST", "MovingMNIST"]:
    """The endless training stream, and fixed held-out clips of other digits.

    Raises: ValueError: for another form of clips than the data set has, or if MNIST is absent.
    """
    if (frame_stride, as_pair(size), color_mode) != (1, (SIDE, SIDE), "gray"):
        rule = f"needs --size {SIDE}, --frame_stride 1 and --color_mode gray"
        raise ValueError(f"--data_root {data_root} {rule}")
    digits = load_digits(data_root, "train")
    held_out = digits[-VALIDATION_DIGITS:]
    return (
        MovingMNIST(digits[:-VALIDATION_DIGITS], EPOCH_CLIPS, num_frames, seed, repeats=False),
        MovingMNIST(held_out, VALIDATION_CLIPS, num_frames, seed, repeats=True),
    )


def open_test_clips(data_root: str, num_frames: int, limit: int = TEST_CLIPS) -> "MovingMNIST":
    """The fixed clips that evaluation scores, the first of them."""
    digits = load_digits(data_root, "test")
    return MovingMNIST(digits, min(limit, TEST_CLIPS), num_frames, TEST_SEED, repeats=True)


def load_digits(data_root: str, split: str) -> Tensor:
    """The images of "train" or "test", enlarged: uint8 [N,DIGIT,DIGIT].

    Args:
        data_root: "smmnist:" and a folder with MNIST's files, packed or not, or `MNIST/raw` with
            them; where it holds none, torchvision downloads them there.

    Raises: ValueError: if they are absent and cannot be downloaded.
    """
    root = data_root.removeprefix(MNIST_PREFIX)
    path = find_file(Path(root), FILES[split])
    if path is None:
        from torchvision.datasets import MNIST

        try:
            MNIST(root, download=True)
        except (RuntimeError, OSError) as error:
            rule = f"must hold {FILES[split]}.gz, or be where it can be downloaded to"
            raise ValueError(f"--data_root {data_root} {rule} ({error})") from error
        path = find_file(Path(root), FILES[split])
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    images = np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    if split == "test":
        images = images[:TEST_IMAGES]
    return resize(torch.from_numpy(images.copy()), (DIGIT, DIGIT))[:, 0]


def find_file(root: Path, name: str) -> Path | None:
    """A file of MNIST below a folder, packed or not."""
    for folder in (root, root / "MNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    return None


def move(rng: np.random.Generator, num_frames: int) -> np.ndarray:
    """The places (y, x) of a digit's corner in each frame, [T,2] in 0..31."""
    highest = SIDE - DIGIT - 1
    place = rng.integers(0, highest + 1, size=2)
    velocity = rng.integers(-FASTEST, FASTEST + 1, size=2)
    places = []
    for _ in range(num_frames):
        for axis in (0, 1):
            if 0 <= place[axis] <= highest:
                continue
            # It leaves the border at any speed, and sideways in any direction.
            inwards = 1 if place[axis] < 0 else -1
            place[axis] = 0 if inwards == 1 else highest
            velocity = rng.integers(-FASTEST, FASTEST + 1, size=2)
            velocity[axis] = inwards * rng.integers(1, FASTEST + 1)
        places.append(place.copy())
        place += velocity
    return np.stack(places)


@dataclass(eq=False, repr=False)
class MovingMNIST(Dataset):
    """Clips of moving digits by keys (epoch, clip number), as VideoClipDataset has them."""

    digits: Tensor  # uint8 [N,DIGIT,DIGIT]
    clips: int
    num_frames: int
    seed: int
    repeats: bool  # whether every epoch has the same clips, as a test set has

    frame_size = (SIDE, SIDE)

    def __len__(self) -> int:
        return self.clips

    def fingerprint(self) -> str:
        """What the files of another data set are to a run: the same in all of its processes."""
        return f"{len(self.digits)} digits, seed {self.seed}"

    def __getitem__(self, key: tuple[int, int]) -> ClipRead:
        """The clip of a key, uint8 [1,T,SIDE,SIDE]; it never fails."""
        epoch, number = key
        rng = np.random.default_rng([self.seed, 0 if self.repeats else epoch + 1, number])
        clip = np.zeros((self.num_frames, SIDE, SIDE), np.int64)
        for _ in range(DIGITS):
            digit = self.digits[rng.integers(len(self.digits))].numpy()
            for frame, (y, x) in zip(clip, move(rng, self.num_frames), strict=True):
                frame[y : y + DIGIT, x : x + DIGIT] += digit
        frames = clip.clip(max=255).astype(np.uint8)
        return ClipRead(torch.from_numpy(frames)[None], [])
