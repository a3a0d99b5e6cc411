"""Images, videos and records on disk: exact where they promise it, and never half written."""

import itertools
import json
import os
import sys
import time
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from data.video_reader import probe_video, read_frames
from utils import io
from utils.flags import Parser, nonempty_path
from utils.images import load_frame

RNG = np.random.default_rng(0)


def picture(h=12, w=20, channels=3):
    return RNG.integers(0, 256, (h, w, channels), dtype=np.uint8)


def read(path):
    """read_image as [H,W,3]; a PIL image gives the same."""
    pixels = io.read_image(path)
    with Image.open(path) as image:
        assert torch.equal(load_frame(image), pixels)
    return pixels.permute(1, 2, 0).numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    image = torch.from_numpy(picture(channels=channels)).permute(2, 0, 1)
    io.save_png(tmp_path / "a.png", image)
    assert torch.equal(io.read_image(tmp_path / "a.png"), image.expand(3, -1, -1))


def test_transparency_is_laid_over_white(tmp_path):
    rgba = picture(channels=4)
    iio.imwrite(tmp_path / "a.png", rgba)
    colour, alpha = np.split(rgba.astype(float), [3], axis=2)
    expected = (colour * alpha + 255 * (255 - alpha)) / 255
    # Rounded to the nearest level.
    with pytest.warns(UserWarning, match="transparent"):
        assert np.abs(read(tmp_path / "a.png") - expected).max() <= 0.5


def test_every_exif_orientation_is_undone(tmp_path):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 255  # a bright top left quarter
    # How a camera stores the picture, for each orientation from 1 on.
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1]]
    stored += [upright.transpose(1, 0, 2), np.rot90(upright)]
    stored += [np.rot90(upright, 2).transpose(1, 0, 2), np.rot90(upright, -1)]
    for tag, pixels in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read(tmp_path / "a.png"), upright), tag


def test_palettes_gray_and_sixteen_bits_become_eight_bit_rgb(tmp_path):
    rgb = Image.fromarray(picture())
    palette = rgb.quantize(8)
    palette.save(tmp_path / "palette.png")
    palette.save(tmp_path / "first.gif", save_all=True, append_images=[Image.fromarray(picture())])
    for name in ("palette.png", "first.gif"):
        assert np.array_equal(read(tmp_path / name), np.asarray(palette.convert("RGB")))
    gray = picture(channels=1)
    Image.fromarray(gray[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(read(tmp_path / "gray.png"), gray.repeat(3, 2))
    deep = RNG.integers(0, 2**16, (12, 20), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert np.array_equal(read(tmp_path / "deep.png"), (deep[..., None] // 256).repeat(3, 2))


def test_files_that_are_no_image_are_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    iio.imwrite(tmp_path / "whole.png", picture(64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name in ("missing", "text", "folder", "cut"):
        with pytest.raises(ValueError, match=f"^[^\n]*{name}.png[^\n]*$"):
            io.read_image(tmp_path / f"{name}.png")
    monkeypatch.setattr(io, "MAX_IMAGE_PIXELS", 64 * 64)
    io.read_image(tmp_path / "whole.png")
    monkeypatch.setattr(io, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="4095 pixels at most, got 64x64"):
        io.read_image(tmp_path / "whole.png")


@pytest.mark.parametrize("shape", [(3, 6, 32, 48), (1, 6, 32, 32), (3, 5, 15, 21)])
def test_mp4_and_gif_keep_every_frame_and_the_rate(tmp_path, shape):
    smooth = torch.linspace(0, 200, shape[3]).expand(shape)
    smooth = (smooth + torch.arange(shape[1]).view(1, -1, 1, 1) * 8).to(torch.uint8)
    io.save_gif(tmp_path / "a.gif", smooth, fps=8)
    assert iio.imread(tmp_path / "a.gif").shape[:3] == shape[1:]
    with Image.open(tmp_path / "a.gif") as image:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(image)]
    # Centiseconds that add up to the rate.
    assert abs(sum(durations) - shape[1] * 125) <= 5 and set(durations) <= {120, 130}
    io.save_gif(tmp_path / "a.gif", smooth, fps=100)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.info["duration"] == 20  # less would be shown as 100
    noise = torch.from_numpy(RNG.integers(0, 256, shape, dtype=np.uint8))
    # On a smooth ramp, crf 12 stays within a few levels.
    for clip, lossless, tolerance in ((smooth, False, 4), (noise, True, 0)):
        io.save_mp4(tmp_path / "a.mp4", clip, fps=8, lossless=lossless)
        info = probe_video(tmp_path / "a.mp4")
        assert (info.frames, info.height, info.width, info.rate) == (*shape[1:], 8)
        frames = torch.stack(list(read_frames(tmp_path / "a.mp4", range(info.frames), info)), dim=1)
        assert (frames.float() - clip.float()).abs().mean() <= tolerance


def test_contact_sheet_marks_the_observed_frames():
    clips = [torch.full((3, 5, 32, 32), level, dtype=torch.uint8) for level in (7, 9)]
    assert io.observed_frames(5, 2) == [True, True, False, True, True]
    sheet = io.contact_sheet(clips, io.observed_frames(5, 2))
    side = 3 * 32 + 6  # enlarged to 96 pixels, with a border of 3
    assert sheet.shape == (3, 2 * side, 5 * side)
    for row, frame in itertools.product(range(2), range(5)):
        tile = sheet[:, row * side : (row + 1) * side, frame * side : (frame + 1) * side]
        assert (tile[:, 3:-3, 3:-3] == (7, 9)[row]).all()
        colour = io.GENERATED_COLOUR if frame == 2 else io.OBSERVED_COLOUR
        for corner in (tile[:, 0, 0], tile[:, 2, 2], tile[:, -1, -1]):
            assert tuple(corner.tolist()) == colour


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    io.save_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space.*a.json"):
        io.save_json(tmp_path / "a.json", {"new": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert files(tmp_path) == ["a.json"]


def test_bytes_are_on_disk_before_they_take_the_name(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.write_text("old")
    synced = []

    def fsync(descriptor):
        synced.append((os.fstat(descriptor).st_ino, target.read_text()))

    monkeypatch.setattr(os, "fsync", fsync)
    with io.atomic_write(target) as file:
        file.write(b"new")
    assert synced == [(target.stat().st_ino, "old"), (tmp_path.stat().st_ino, "new")]


@pytest.mark.parametrize("has_links", [True, False])
def test_the_previous_file_is_kept_under_its_other_name(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda path, other: path.rmdir())  # an OSError
    for content in (b"1", b"2", b"3"):
        with io.atomic_write(tmp_path / "last", tmp_path / "prev") as file:
            file.write(content)
    assert (tmp_path / "last").read_bytes() == b"3"
    assert (tmp_path / "prev").read_bytes() == b"2"
    assert files(tmp_path) == ["last", "prev"]


def test_a_temporary_folder_takes_its_name_or_disappears(tmp_path):
    with pytest.raises(KeyboardInterrupt), io.temporary_path(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        raise KeyboardInterrupt
    assert files(tmp_path) == []
    temporary.mkdir()  # what a killed process of the same number left
    with io.temporary_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
    assert files(tmp_path) == ["folder"] and files(tmp_path / "folder") == ["file"]


def test_only_what_killed_processes_left_is_removed(tmp_path):
    gone = 2**22 + 1  # Linux gives no process a number beyond 2^22
    for name in (f".a.{gone}.tmp", f".a.{os.getpid()}.tmp", ".a.tmp", f"a.{gone}.tmp"):
        (tmp_path / name).touch()
    (tmp_path / f".folder.{gone}.tmp").mkdir()
    (tmp_path / f".old.{gone}.tmp").touch()
    os.utime(tmp_path / f".old.{gone}.tmp", (0, time.time() - 5000))
    io.remove_stale_temporaries(tmp_path, untouched=3600)
    assert f".old.{gone}.tmp" not in files(tmp_path) and len(files(tmp_path)) == 5
    io.remove_stale_temporaries(tmp_path)
    assert files(tmp_path) == sorted([f".a.{os.getpid()}.tmp", ".a.tmp", f"a.{gone}.tmp"])


def test_an_output_folder_is_made_or_its_flag_is_named(tmp_path):
    assert io.make_out_dir(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--out_dir"):
        io.make_out_dir(tmp_path / "file")


def test_a_flag_that_is_nearly_right_is_named_and_home_is_expanded(capsys, monkeypatch):
    parser = Parser("")
    parser.add_argument("--batch_size")
    with pytest.raises(SystemExit):
        parser.parse_args(["--bach_size", "3"])
    assert "did you mean --batch_size?" in capsys.readouterr().err
    monkeypatch.setenv("HOME", "/home/me")
    assert nonempty_path("~/clips") == "/home/me/clips"
    assert nonempty_path("a~/clips") == "a~/clips"


@pytest.mark.parametrize(
    ("dtype", "tags", "kind"),
    [("int32", {}, "integers"), ("float32", {}, "floats"), ("uint8", {339: 2}, "signed")],
)
def test_pixels_of_another_depth_are_refused_by_name(tmp_path, dtype, tags, kind):
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "a.tif", tiffinfo=tags)
    with pytest.raises(ValueError, match=f"a.tif.*{kind}"):
        io.read_image(tmp_path / "a.tif")


def test_deep_gray_keeps_its_upper_bits_in_either_byte_order(tmp_path):
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for order in "<>":
        image = Image.fromarray(levels)
        if order == ">":
            image = Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes())
        image.save(tmp_path / "a.tif")
        assert np.array_equal(io.read_image(tmp_path / "a.tif")[0].numpy(), levels >> 8)
    # White is zero.
    Image.fromarray(levels).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert np.array_equal(io.read_image(tmp_path / "a.tif")[0].numpy(), (65535 - levels) >> 8)


def test_a_notebook_in_place_of_a_console_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=len, flush=lambda: None))
    with Parser("").one_line_errors():
        pass
