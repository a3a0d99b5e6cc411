"""Bytes on disk: images in, and PNG, MP4, GIF and contact sheets out."""

import hashlib
import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import av
import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor

MAX_IMAGE_PIXELS = 4096 * 4096  # refuse decompression bombs before decoding them: each pixel takes 16 bytes on the way
# PNG, JPEG, GIF, BMP, TIFF, WebP: Pillow would try some forty formats more, one of which runs a program on the file
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
MAX_JPEG_SCANS = 200  # each costs a pass over all pixels, and can be 33 bytes; progressive files have about ten
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, struct.error)
PREVIEW_PIXELS = 96  # small frames are enlarged to about this
OBSERVED_COLOUR, GENERATED_COLOUR = (240, 150, 30), (60, 60, 60)  # frame borders on contact sheets


def read_image(path: str | Path) -> Tensor:
    """One still image as RGB, uint8 [3,H,W]; a ValueError names the file if it is missing, too large or not an image.

    EXIF orientation is applied, transparency is laid over white, 16-bit gray is reduced to its upper 8 bits, and of an
    animation the first frame is taken.
    """
    path = Path(path).absolute()
    if not path.is_file():  # a FIFO or device would block for ever
        raise ValueError(f"{path}: {'not a regular file' if path.exists() else 'no such image file'}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if not start.startswith(IMAGE_STARTS):
                raise ValueError("neither PNG, JPEG, GIF, BMP, TIFF nor WebP")
            if start.startswith(IMAGE_STARTS[1]) and file.read(2**26).count(b"\xff\xda") > MAX_JPEG_SCANS:
                raise ValueError(f"a JPEG may have {MAX_JPEG_SCANS} scans at most")
        # Pillow warns of large images, where our bound is lower, and of odd metadata.
        with warnings.catch_warnings(action="ignore"), iio.imopen(path, "r", plugin="pillow") as image:
            found = image.properties(index=0)  # of the header alone, where its metadata would decode a whole PNG
            height, width = found.shape[:2]
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(f"an image may have {MAX_IMAGE_PIXELS} pixels at most, got {width}x{height}")
            deep_gray = found.dtype == np.uint16
            pixels = image.read(index=0, mode=None if deep_gray else "RGBA", rotate=True)
    except IMAGE_ERRORS as error:  # all that Pillow raises for one damage or another
        first: BaseException = error
        while first.__cause__ is not None:  # imageio speaks of a missing plugin, whatever it was
            first = first.__cause__
        words = (str(first).splitlines() or [""])[0]
        reason = words if type(first) is ValueError else f"{type(first).__name__}: {words}"
        raise ValueError(f"{path}: not a readable image ({reason})") from error
    if deep_gray:
        return torch.from_numpy((pixels >> 8).astype(np.uint8)).expand(3, -1, -1).contiguous()
    rgb = torch.empty(3, *pixels.shape[:2], dtype=torch.uint8)
    for i, row in enumerate(pixels):  # row by row, as 16-bit copies of a large image would fill the memory
        colour, alpha = np.split(row.astype(np.uint16), [3], axis=1)
        rgb[:, i] = torch.from_numpy(((colour * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8).T)
    return rgb


def frames_last(clip: Tensor) -> np.ndarray:
    """A uint8 clip [C,T,H,W] as the writers want it, [T,H,W,3]; a gray channel is repeated."""
    return clip.expand(3, -1, -1, -1).permute(1, 2, 3, 0).cpu().contiguous().numpy()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write a uint8 image [C,H,W], C = 1 or 3, losslessly."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    pixels = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    # as bytes first: on a full disk imageio would print a traceback of its own
    Path(path).write_bytes(iio.imwrite("<bytes>", pixels, plugin="pillow", extension=".png"))


def save_gif(path: str | Path, clip: Tensor, fps: float) -> None:
    """Write a uint8 clip [C,T,H,W] as a looping GIF."""
    iio.imwrite(path, frames_last(clip), plugin="pillow", extension=".gif", duration=1000 / fps, loop=0)


def save_mp4(path: str | Path, clip: Tensor, fps: int, preset: str = "veryfast", lossless: bool = False) -> None:
    """Write a uint8 clip [C,T,H,W] as H.264; a preview for eyes, since its colours are subsampled where sizes are even.

    Args:
        preset: x264's, from "ultrafast" to "placebo": slower ones lose less at the same size.
        lossless: keep every bit, in RGB; larger, and not every player shows it.
    """
    frames = frames_last(clip)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264rgb" if lossless else "libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        odd = frames.shape[1] % 2 or frames.shape[2] % 2
        stream.pix_fmt = "rgb24" if lossless else "yuv444p" if odd else "yuv420p"
        quality = {"qp": "0"} if lossless else {"crf": "12"}
        # x264's macroblock tree reads past the rows of frames as narrow as ours: the same clip then gives other bytes
        stream.options = quality | {"preset": preset, "threads": "1", "mbtree": "0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def enlarge(frames: Tensor, size: int) -> Tensor:
    """Frames [...,H,W] of `size` pixels repeated so that each is near 96 pixels wide; larger ones are left alone."""
    scale = max(1, PREVIEW_PIXELS // size)
    return frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def contact_sheet(rows: Sequence[Tensor], observed: Sequence[bool]) -> Tensor:
    """Clips uint8 [C,T,H,W] of one shape as rows of bordered frames: one image, uint8 [3,H',W']."""
    return torch.cat([torch.cat(bordered(clip, observed).unbind(1), dim=2) for clip in rows], dim=1)


def bordered(clip: Tensor, observed: Sequence[bool]) -> Tensor:
    """A clip uint8 [C,T,H,W], enlarged, each frame with a border that says if it was given: uint8 [3,T,H',W']."""
    tiles = enlarge(clip.cpu().expand(3, -1, -1, -1), clip.shape[-1])
    colours = torch.tensor([OBSERVED_COLOUR if given else GENERATED_COLOUR for given in observed], dtype=torch.uint8)
    frames = colours.T[:, :, None, None].repeat(1, 1, tiles.shape[2] + 6, tiles.shape[3] + 6)
    frames[:, :, 3:-3, 3:-3] = tiles
    return frames


def observed_frames(num_frames: int, endpoint_context: int) -> list[bool]:
    """Which of a clip's frames are given to the model: the first and the last `endpoint_context`."""
    return [i < endpoint_context or i >= num_frames - endpoint_context for i in range(num_frames)]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: str | Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file whose bytes take the place of `path` once they are whole; what was there is kept at `previous`.

    They go to a temporary name in the same folder and are flushed to disk first, and the folder after them, so that
    `path` is at any instant, a loss of power included, the previous or the next whole file; errors leave it untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            second_name(path, previous)
        temporary.replace(path)
        fsync_dir(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def second_name(path: Path, other: Path) -> None:
    """Make `other` a hard link to `path`, in one instant; a copy where the file system has no links."""
    temporary = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(other)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_dir(folder: Path) -> None:
    """Flush a folder's own entries to disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(folder: Path, untouched: float = 0.0) -> None:
    """Delete the temporary files (.NAME.PROCESS.tmp) of killed processes, if not written to for `untouched` seconds.

    Processes of other machines cannot be seen: where they share the folder, `untouched` protects their files.
    """
    for path in folder.glob(".*.tmp"):
        process = path.name.split(".")[-2]
        if os.name == "nt":  # where asking for a process may interrupt it
            return
        if process.isdecimal() and not is_running(int(process)) and time.time() - path.stat().st_mtime >= untouched:
            path.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # another error: it is somebody else's
    return True


def save_training_curves(file: Path | BinaryIO, history: dict[str, Any], file_format: str = "png") -> bool:
    """Plot losses and PSNR over steps; returns False, having done nothing, if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    loss.plot(*zip(*history["train"], strict=True), label="training", alpha=0.5)
    labels = {"val_loss": "validation (EMA)", "psnr": "generated", "psnr_cross_fade": "cross-fade"}
    for key, label in labels.items():
        axes = loss if key == "val_loss" else quality
        shown = [(entry["step"], entry[key]) for entry in history["epochs"] if key in entry]
        if shown:
            axes.plot(*zip(*shown, strict=True), "o-", label=label)
            axes.legend()
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    loss.legend()
    quality.set(xlabel="step", ylabel="PSNR of the middle, dB")
    figure.savefig(file, format=file_format, dpi=120)
    return True


def save_json(path: str | Path, value: Any) -> None:
    """Write a readable JSON file, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())
