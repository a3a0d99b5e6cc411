"""Files: images in; images, videos, curves and JSON out; atomic writes."""

import errno
import hashlib
import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import av
import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor

MAX_IMAGE_PIXELS = 4096 * 4096  # checked before decoding
MAX_JPEG_SCANS = 200  # each is a pass over all pixels; about ten are usual
# PNG, JPEG, GIF, BMP, TIFF and WebP. Of forty formats more that Pillow
# knows, one runs a program on the file.
IMAGE_STARTS = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")
# What Pillow raises for damaged files.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError)
IMAGE_ERRORS += (ArithmeticError, struct.error)

TIFF_PHOTOMETRIC = 262
TIFF_SAMPLE_FORMAT = 339

PREVIEW_PIXELS = 96  # small frames are enlarged to about this width
BORDER = 3  # pixels around a frame of a contact sheet
OBSERVED_COLOUR = (240, 150, 30)
GENERATED_COLOUR = (60, 60, 60)


def read_image(path: str | Path) -> Tensor:
    """Read a still image as RGB, uint8 [3,H,W], see `picture_pixels` and `as_rgb`.

    Raises: ValueError: if the file is missing, too large or no image.
    """
    from PIL import Image  # comes with imageio

    path = Path(path).absolute()
    # A FIFO or a device would block for ever.
    if not path.is_file():
        what = "not a regular file" if path.exists() else "no such image file"
        raise ValueError(f"{path}: {what}")
    try:
        check_image_start(path)
        # Pillow warns of large images and of odd metadata.
        with warnings.catch_warnings(action="ignore"), Image.open(path) as picture:
            pixels = picture_pixels(picture)
    except (*IMAGE_ERRORS, Image.DecompressionBombError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path}: not a readable image ({reason})") from error
    return as_rgb(pixels)


def check_image_start(path: Path) -> None:
    """Raises: ValueError: for a file that does not begin as an image, or a JPEG of many scans."""
    with path.open("rb") as file:
        start = file.read(4)
        scans = file.read(2**26).count(b"\xff\xda")
    if not start.startswith(IMAGE_STARTS):
        raise ValueError("neither PNG, JPEG, GIF, BMP, TIFF nor WebP")
    if start.startswith(b"\xff\xd8") and scans > MAX_JPEG_SCANS:
        raise ValueError(f"a JPEG may have {MAX_JPEG_SCANS} scans at most")


def picture_pixels(picture: Any) -> np.ndarray:
    """The pixels of a PIL image, upright: RGBA, uint8 [H,W,4], or deep gray, uint16 [H,W].

    An animation gives its first frame.

    Raises: ValueError: if the image is too large, or its pixels have a sign or more than 16 bits.
    """
    from PIL import ImageOps

    # Nothing is decoded yet.
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        rule = f"an image may have {MAX_IMAGE_PIXELS} pixels at most"
        raise ValueError(f"{rule}, got {picture.width}x{picture.height}")
    tags = getattr(picture, "tag_v2", {})  # of a TIFF
    has_sign = 2 in np.atleast_1d(tags.get(TIFF_SAMPLE_FORMAT, 1))
    kinds = {"I": "32-bit integers", "F": "32-bit floats"}
    if has_sign or picture.mode in kinds:
        got = kinds.get(picture.mode, "signed ones")
        raise ValueError(f"pixels must have 8 or 16 bits without sign, got {got}")
    is_deep = picture.mode.startswith("I;16")
    is_negative = is_deep and tags.get(TIFF_PHOTOMETRIC) == 0  # its white is 0
    picture = ImageOps.exif_transpose(picture)
    if not is_deep:
        return np.asarray(picture.convert("RGBA"))
    return 65535 - np.asarray(picture) if is_negative else np.asarray(picture)


def as_rgb(pixels: np.ndarray) -> Tensor:
    """A picture as uint8 [3,H,W]: 16 bits keep the upper 8, transparency gets white and a warning.

    Args:
        pixels: gray [H,W] of 8 or 16 bits, or RGB or RGBA [H,W,3 or 4] of 8 bits.

    Raises: ValueError: for another form.
    """
    if pixels.dtype.kind == "u" and pixels.dtype.itemsize == 2 and pixels.ndim == 2:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.dtype != np.uint8 or (pixels.ndim != 2 and pixels.shape[2:] not in ((3,), (4,))):
        got = f"{pixels.dtype} {list(pixels.shape)}"
        raise ValueError(f"a frame must be uint8 [H,W], [H,W,3] or [H,W,4] (got {got})")
    if pixels.ndim == 2:
        return torch.from_numpy(pixels.copy()).expand(3, -1, -1).contiguous()
    rgb, alpha = np.split(pixels, [3], axis=2)
    if alpha.min(initial=255) < 255:
        warnings.warn("transparent pixels of frames are laid over white", stacklevel=2)
        alpha = alpha.astype(np.uint16)
        rgb = ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return torch.from_numpy(rgb.transpose(2, 0, 1).copy())


def _frames_last(clip: Tensor) -> np.ndarray:
    rgb = clip.expand(3, -1, -1, -1)
    return rgb.permute(1, 2, 3, 0).cpu().contiguous().numpy()  # [T,H,W,3]


def save_png(path: str | Path, image: Tensor) -> None:
    """Write uint8 [C,H,W], C = 1 or 3, without loss."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    if pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    # As bytes first: on a full disk imageio prints its own traceback.
    encoded = iio.imwrite("<bytes>", pixels, plugin="pillow", extension=".png")
    Path(path).write_bytes(encoded)


def save_gif(path: str | Path, clip: Tensor, fps: float) -> None:
    """Write a clip uint8 [C,T,H,W] as a looping GIF of at most 50 frames per second."""
    frames = _frames_last(clip)
    # Its unit is 0.01 s, and players take 0 and 1 for 10. Rounding does not add up.
    ends = [round(100 * i / fps) for i in range(len(frames) + 1)]
    duration = [10 * max(2, after - before) for before, after in pairwise(ends)]
    iio.imwrite(path, frames, plugin="pillow", extension=".gif", duration=duration, loop=0)


def save_mp4(
    path: str | Path, clip: Tensor, fps: int, preset: str = "veryfast", lossless: bool = False
) -> None:
    """Write a clip uint8 [C,T,H,W] as H.264; not every player shows a lossless file."""
    frames = _frames_last(clip)
    index_first = {"movflags": "faststart"}
    with av.open(str(path), "w", format="mp4", options=index_first) as container:
        stream = add_h264_stream(container, frames.shape[1:3], fps, lossless)
        stream.options = {**stream.options, "preset": preset}
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def add_h264_stream(
    container: Any, size: Sequence[int], rate: int | Fraction, lossless: bool
) -> av.VideoStream:
    """Add an H.264 stream for frames of (height, width)."""
    codec = "libx264rgb" if lossless else "libx264"
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = size
    odd = stream.height % 2 or stream.width % 2
    stream.pix_fmt = "rgb24" if lossless else "yuv444p" if odd else "yuv420p"
    quality = {"qp": "0"} if lossless else {"crf": "12"}
    # The same clip must give the same bytes, but x264's macroblock tree
    # reads past the rows of narrow frames.
    stream.options = {**quality, "threads": "1", "mbtree": "0"}
    return stream


def enlarge(frames: Tensor, size: int) -> Tensor:
    """Repeat pixels of frames [...,H,W], `size` wide, to about 96."""
    scale = max(1, PREVIEW_PIXELS // size)
    return frames.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def contact_sheet(rows: Sequence[Tensor], observed: Sequence[bool]) -> Tensor:
    """Clips uint8 [C,T,H,W] as rows of bordered frames: uint8 [3,H',W']."""
    sheets = [torch.cat(bordered(clip, observed).unbind(1), dim=2) for clip in rows]
    return torch.cat(sheets, dim=1)


def bordered(clip: Tensor, observed: Sequence[bool]) -> Tensor:
    """Enlarge a clip and mark its observed frames: uint8 [3,T,H',W']."""
    tiles = enlarge(clip.cpu().expand(3, -1, -1, -1), clip.shape[-1])
    height, width = tiles.shape[2:]
    colours = [OBSERVED_COLOUR if given else GENERATED_COLOUR for given in observed]
    frames = torch.tensor(colours, dtype=torch.uint8).T[:, :, None, None]
    frames = frames.repeat(1, 1, height + 2 * BORDER, width + 2 * BORDER)
    frames[:, :, BORDER:-BORDER, BORDER:-BORDER] = tiles
    return frames


def observed_frames(num_frames: int, endpoint_context: int) -> list[bool]:
    """Which frames of a clip are given: the first and the last K."""
    k = endpoint_context
    return [i < k or i >= num_frames - k for i in range(num_frames)]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def temporary_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name for a file or a folder that then replaces `path`.

    After an error it is removed, and `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        temporary.replace(path)
        if os.name != "nt":  # Windows opens no folders
            _fsync_dir(path.parent)
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename:
            raise
        # A full disk does not say which file had no room.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | Path, previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` once it is whole and on disk.

    At any instant, even if power is lost, `path` is the old or the new whole file. The old one is
    kept at `previous`.
    """
    path = Path(path)
    with temporary_path(path) as temporary:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.is_file():
            with temporary_path(previous) as second:
                try:
                    os.link(path, second)
                except OSError:  # this file system has no links
                    shutil.copyfile(path, second)


def remove_stale_temporaries(folder: Path, untouched: float = 0.0) -> None:
    """Delete what killed processes left, unless written to within `untouched` seconds.

    That protects the files of other machines, whose processes cannot be seen.
    """
    if os.name == "nt":  # there, to ask for a process may interrupt it
        return
    for path in folder.glob(".*.tmp"):
        process = path.name.split(".")[-2]
        with suppress(PermissionError, FileNotFoundError):
            try:
                os.kill(int(process), 0)
            except (ProcessLookupError, ValueError):
                if process.isdecimal() and time.time() - path.stat().st_mtime >= untouched:
                    _remove(path)


def make_out_dir(path: str | Path, flag: str = "--out_dir") -> Path:
    """Make the folder that a flag names; ValueError if that fails."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} must be a folder (got {path}: {error.strerror})") from error
    return path


def save_json(path: str | Path, value: Any) -> None:
    """Write a readable JSON file, atomically."""
    with atomic_write(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def save_training_curves(
    file: Path | BinaryIO, history: dict[str, Any], file_format: str = "png"
) -> bool:
    """Plot losses and PSNR over steps; False if there is no matplotlib."""
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    loss.plot(*zip(*history["train"], strict=True), label="training", alpha=0.5)
    _plot_epochs(loss, history, "val_loss", "validation (EMA)")
    _plot_epochs(quality, history, "psnr", "generated")
    _plot_epochs(quality, history, "psnr_cross_fade", "cross-fade")
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    loss.legend()
    quality.set(xlabel="step", ylabel="PSNR of the middle, dB")
    figure.savefig(file, format=file_format, dpi=120)
    return True


def _plot_epochs(axes: Any, history: dict[str, Any], key: str, label: str) -> None:
    shown = [(entry["step"], entry[key]) for entry in history["epochs"] if key in entry]
    if shown:
        axes.plot(*zip(*shown, strict=True), "o-", label=label)
        axes.legend()
