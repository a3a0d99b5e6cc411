"""Images, videos and checkpoints on disk: exact where they promise it, and never half written."""

import itertools
import os
import struct
import zipfile

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import NETWORK, words
from PIL import Image

from data.video_reader import probe_video, read_frames
from models.video_unet3d import build_model
from train_video_ddpm import build_parser
from training.state import model_config_of
from utils import io
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.io import contact_sheet, observed_frames, read_image, save_gif, save_json, save_mp4, save_png

RNG = np.random.default_rng(0)


def picture(h=12, w=20, channels=3):
    return RNG.integers(0, 256, (h, w, channels), dtype=np.uint8)


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_png_is_lossless(tmp_path, channels):
    image = torch.from_numpy(picture(channels=channels)).permute(2, 0, 1)
    save_png(tmp_path / "a.png", image)
    assert torch.equal(read_image(tmp_path / "a.png"), image.expand(3, -1, -1))


def test_transparency_is_laid_over_white(tmp_path):
    rgba = np.dstack([picture(), np.zeros((12, 20), np.uint8)])
    rgba[:, 10:, 3] = 255
    rgba[0, 0] = (100, 100, 100, 128)
    iio.imwrite(tmp_path / "a.png", rgba)
    image = read_image(tmp_path / "a.png").permute(1, 2, 0).numpy()
    assert np.array_equal(image[:, 10:], rgba[:, 10:, :3])
    assert (image[1:, :10] == 255).all()
    assert image[0, 0].tolist() == [round((100 * 128 + 255 * 127) / 255)] * 3


def test_every_exif_orientation_is_undone(tmp_path):
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12] = 255  # a bright top left quarter
    # how a camera stores the picture for each orientation tag, from 1
    stored = [upright, upright[:, ::-1], upright[::-1, ::-1], upright[::-1], upright.transpose(1, 0, 2)]
    stored += [np.rot90(upright, 1), np.rot90(upright, 2).transpose(1, 0, 2), np.rot90(upright, -1)]
    for tag, pixels in enumerate(stored, 1):
        exif = Image.Exif()
        exif[0x0112] = tag
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), upright), tag


def test_palettes_gray_and_sixteen_bits_become_eight_bit_rgb(tmp_path):
    rgb = Image.fromarray(picture())
    palette = rgb.quantize(8)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "palette.png").permute(1, 2, 0), np.asarray(palette.convert("RGB")))
    gray = picture(channels=1)[..., 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    assert np.array_equal(read_image(tmp_path / "gray.png")[1], gray)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png")[2], gray)
    rgb.save(tmp_path / "first.gif", save_all=True, append_images=[Image.fromarray(picture())])
    assert read_image(tmp_path / "first.gif").shape == (3, 12, 20)


def test_files_that_are_no_image_are_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("hello")
    iio.imwrite(tmp_path / "whole.png", picture(64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    for name, message in (("missing", "no such image"), ("text", "not a readable"), ("cut", "not a readable")):
        with pytest.raises(ValueError, match=f"{name}.png: {message}"):
            read_image(tmp_path / f"{name}.png")
    monkeypatch.setattr(io, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(ValueError, match="whole.png: not a readable image .* 4095 pixels at most, got 64x"):
        read_image(tmp_path / "whole.png")


# --- videos and sheets ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 6, 32, 48), (1, 6, 32, 32), (3, 5, 15, 21)])
def test_mp4_keeps_every_frame_and_its_size(tmp_path, shape):
    smooth = torch.linspace(0, 200, shape[3]).expand(shape) + torch.arange(shape[1]).view(1, -1, 1, 1) * 8
    save_mp4(tmp_path / "a.mp4", smooth.to(torch.uint8), fps=8)
    info = probe_video(tmp_path / "a.mp4")
    assert (info.frames, info.height, info.width, info.rate) == (shape[1], *shape[2:], 8)
    frames = torch.stack(list(read_frames(tmp_path / "a.mp4", range(info.frames), info)), dim=1)
    # lossy: crf 12 on a smooth ramp stays within a few levels
    assert (frames.float() - smooth.expand(3, -1, -1, -1)).abs().mean() < 4


def test_gif_keeps_frames_and_rate(tmp_path):
    clip = torch.randint(0, 256, (3, 6, 16, 16), dtype=torch.uint8)
    save_gif(tmp_path / "a.gif", clip, fps=8)
    assert iio.imread(tmp_path / "a.gif").shape[:3] == (6, 16, 16)
    assert iio.immeta(tmp_path / "a.gif")["duration"] == pytest.approx(125, abs=10)  # GIF counts in centiseconds


def test_contact_sheet_marks_the_observed_frames():
    clip = torch.full((3, 5, 32, 32), 7, dtype=torch.uint8)
    assert observed_frames(5, 2) == [True, True, False, True, True]
    sheet = contact_sheet([clip, clip], observed_frames(5, 2))
    side = 3 * 32 + 6  # enlarged to 96 pixels, a border of 3
    assert sheet.shape == (3, 2 * side, 5 * side)
    for row, frame in itertools.product(range(2), range(5)):
        corner = tuple(sheet[:, row * side, frame * side].tolist())
        assert corner == (io.GENERATED_COLOUR if frame == 2 else io.OBSERVED_COLOUR)
        assert sheet[0, row * side + side // 2, frame * side + side // 2] == 7


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    save_json(tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_json(tmp_path / "a.json", {"new": 2})
    assert (tmp_path / "a.json").read_text() == '{\n  "old": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# --- checkpoints ------------------------------------------------------------------------------------------------------


def state(**changes):
    """The contents of a checkpoint; a dict among the changes is laid over what is there, unless it is a state dict."""
    values = {"step": 3, "epoch": 0, "step_in_epoch": 3, "best_val_loss": 0.5, "scaler": {}, "ema": {}}
    values |= {"model": {"w": torch.arange(3.0)}, "rng": {"torch": torch.get_rng_state()}}
    values |= {"optimizer": {"state": {}, "param_groups": []}, "history": {"train": [], "epochs": [], "sums": {}}}
    values["lr_scheduler"] = dict.fromkeys(words("peak_lr start_lr start_step warmup_steps total_steps"), 1)
    values["model_config"] = {"image_channels": 3, "channel_mults": [1], "endpoint_context": 2}
    values["diffusion_config"] = {"timesteps": 1000, "schedule": "cosine", "noise_offset": 0.0}
    values["clip_config"] = {"num_frames": 8, "size": 64, "frame_stride": 1, "color_mode": "rgb"}
    values["args"] = {"batch_size": 8, "grad_accum": 1, "seed": 42, "val_ratio": 0.01}
    for name, value in changes.items():
        laid_over = isinstance(value, dict) and name != "model"
        values[name] = values[name] | value if laid_over else value
    return values


def refused(folder, expected):
    """Check that each file NAME.pt is refused in one line that names it and matches."""
    for name, message in expected.items():
        with pytest.raises(ValueError, match=f"{name}.pt: .*{message}") as caught:
            load_checkpoint(folder / f"{name}.pt")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_comes_back_as_it_was_and_holds_only_plain_types(tmp_path):
    saved = state(step=7, args={"data_root": None, "lr": 1e-4, "mults": [1, 2]})
    save_checkpoint(tmp_path / "a.pt", saved)
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded["step"] == 7 and loaded["args"] == saved["args"] and set(loaded) == {"format", *saved}
    assert torch.equal(loaded["model"]["w"], torch.arange(3.0))
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_run_that_once_had_a_vast_loss_can_still_be_loaded(tmp_path):
    history = {"train": [[1, 1e30]], "epochs": [{"step": 1, "val_loss": 1e25, "train_loss": None}]}
    saved = state(history=history | {"sums": {"line_loss": 1e30, "grad_norm": float("inf")}}, best_val_loss=1e25)
    save_checkpoint(tmp_path / "a.pt", saved)
    assert load_checkpoint(tmp_path / "a.pt")["history"] == saved["history"]


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a.pt", state(step=1))

    def fail_half_way(value, file):
        file.write(b"half")
        raise RuntimeError("file write failed")

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError, match="could not be written"):
        save_checkpoint(tmp_path / "a.pt", state(step=2))
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_checkpoints_never_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"format": 1, "model": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt: not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_one_clear_error(tmp_path):
    save_checkpoint(tmp_path / "whole.pt", state())
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    torch.save({"format": 99}, tmp_path / "newer.pt")
    torch.save({"format": 1, "step": 0}, tmp_path / "partial.pt")
    save_checkpoint(tmp_path / "odd.pt", state(model_config=[1, 2]))
    save_checkpoint(tmp_path / "vast.pt", state(diffusion_config={"timesteps": 10**12}))
    save_checkpoint(tmp_path / "untyped.pt", state(clip_config={"size": "64"}))
    (tmp_path / "rotten.pt").write_bytes(whole.replace(torch.arange(3.0).numpy().tobytes(), bytes(12)))
    expected = dict.fromkeys(("cut", "empty", "text"), "not a readable checkpoint") | {"missing": "no such checkpoint"}
    expected |= {"rotten": "wrong checksum of ", "foreign": "has no 'format'", "newer": r"format must be 1 \(got 99\)"}
    keys = {"odd": "model_config", "vast": "diffusion_config.timesteps", "untyped": "clip_config.size"}
    keys |= {"partial": "ema"}
    refused(tmp_path, expected | {name: f"{key} is missing or out of range" for name, key in keys.items()})


def test_weights_of_another_network_are_refused():
    model = torch.nn.Linear(2, 3)
    with pytest.raises(ValueError, match="last.pt: the weights do not fit .*bias"):
        load_weights(model, {"weight": torch.zeros(3, 2)}, "last.pt")
    with pytest.raises(ValueError, match="size mismatch"):
        load_weights(model, {"weight": torch.zeros(2, 2), "bias": torch.zeros(3)}, "last.pt")


def test_a_checkpoint_is_not_believed(tmp_path):
    # small files that would take much memory or time if their word were taken for it
    save_checkpoint(tmp_path / "whole.pt", state())
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "squeezed.pt", "w", 8) as squeezed:
        for name in whole.namelist():
            squeezed.writestr(name, whole.read(name))
    laughs = ["ha"] * 10
    for _ in range(9):
        laughs = [laughs] * 10
    claims = {
        "expanded": {"model": {"w": torch.zeros(1).expand(10**6, 10**6)}},
        "shapeless": {"model": {"w": torch.zeros(10**6, 10**6, device="meta")}},
        "sparse": {"model": {"w": torch.zeros(1000, 1000).to_sparse()}},
        "doubles": {"model": {"w": torch.zeros(3, dtype=torch.float64)}},
        "laughing": {"history": {"train": laughs}},
        "endless": {"step": 10**30},
        "nan": {"best_val_loss": float("nan")},
        "huge": {"best_val_loss": 10**400},
        "sums": {"history": {"sums": {"skipped": float("inf")}}},
        "fraction": {"model_config": {"image_channels": 3.0}},
        "two_colours": {"clip_config": {"color_mode": "gray"}},
    }
    for name, claim in claims.items():
        save_checkpoint(tmp_path / f"{name}.pt", state(**claim))
    dag = []
    for _ in range(40):
        dag = [dag, dag]
    torch.save(state() | {"format": dag}, tmp_path / "listed_format.pt")
    length = struct.pack("<q", 3 * 10**9)[:5]
    write_pickle(tmp_path / "bytearray.pt", b"cbuiltins\nbytearray\n\x8a\x05" + length + b"\x85R")
    tuples = b"K\x01\x85q\x01"  # t = (t, t), forty times, as the key of a dict
    for i in range(2, 42):
        tuples += bytes([ord("h"), i - 1, ord("h"), i - 1, 0x86, ord("q"), i])
    write_pickle(tmp_path / "tuples.pt", b"}(" + tuples + b"K\x01u")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "renamed.pt", "w") as renamed:
        for name in whole.namelist():
            renamed.writestr(name.replace("/data/0", "/data/a"), whole.read(name))
            assert not name.endswith("/data.pkl") or b"X\x01\x00\x00\x000" in whole.read(name)
    expected = {"squeezed": "it is compressed", "expanded": "claim more than the file holds", "tuples": "a tuple twice"}
    expected |= dict.fromkeys(("shapeless", "sparse"), "may not contain GLOBAL torch._utils")
    expected |= {"doubles": "may not contain GLOBAL torch DoubleStorage", "listed_format": "format must be 1"}
    expected |= {"bytearray": "may not contain GLOBAL builtins bytearray", "two_colours": "color_mode disagree"}
    expected |= {"renamed": "not a readable checkpoint .UnpicklingError"}
    keys = {"fraction": "model_config.image_channels"}
    keys |= {"laughing": "history", "huge": "best_val_loss", "nan": "best_val_loss", "endless": "step", "sums": "sums"}
    refused(tmp_path, expected | {name: f"{key} is missing or out of range" for name, key in keys.items()})


def test_stored_arguments_are_held_to_the_rules_of_flags_and_give_no_command():
    parser = build_parser()
    wrong = {
        "channel_mults": [1, 2, "--dry_run"],
        "data_root": ["a", "--resume"],
        "size": True,
        "hflip": "yes",
        "lr": -1,
    }
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"last.pt: its args hold no valid value.*--{name}"):
            parser.parse_stored({name: value}, "last.pt")
    assert parser.parse_stored({"help": True, "dry_run": True, "resume": True, "unknown": 1}, "last.pt") == {}


def write_pickle(path, body):
    """A file of torch.save's form around the opcodes of one value."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        archive.writestr("archive/version", "3\n")


def test_a_network_is_not_made_before_it_is_found_to_be_that_of_the_weights(tmp_path):
    config = model_config_of(build_parser().parse_args(words(NETWORK)))
    weights = build_model(config).state_dict()
    vast = build_model(config | {"base_channels": 4096, "channel_mults": [1, 4096]}, "meta")  # 10^16 weights
    with pytest.raises(ValueError, match="last.pt: the weights do not fit its model_config .size mismatch"):
        load_weights(vast, weights, "last.pt")
    for excess in ({"channel_mults": [1] * 13}, {"res_blocks": 65}, {"base_channels": 4100}):
        with pytest.raises(ValueError, match="at most"):
            build_model(config | excess, "meta")
    model = build_model(config, "meta")
    load_weights(model, weights, "last.pt")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
