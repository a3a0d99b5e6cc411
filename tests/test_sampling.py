"""Sampling as a user runs it: observed frames stay exact, noise is keyed, wrong input is a line."""

import contextlib
import json
from pathlib import Path

import hostile
import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint
from test_gap_filler import decoded, packets, with_sound

import sample_video_ddpm
from data.video_index import prepare_videos
from data.video_reader import probe_video
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from models.predictor import FramePredictor
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.images import load_context
from utils.io import read_image, save_mp4
from utils.video_utils import resize, resize_and_crop, to_float, to_gray, to_uint8

pytestmark = pytest.mark.usefixtures("quick")
PNGS = ["start_0.png", "start_1.png", "end_0.png", "end_1.png"]
ENDS = "--start_images start_0.png start_1.png --end_images end_0.png end_1.png"


@pytest.fixture(autouse=True)
def pictures(tmp_path, monkeypatch):
    """Four random pictures of the checkpoint's size in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(5)
    for path in PNGS:
        iio.imwrite(path, rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture
def sample(tmp_path, ckpt):
    """Run the script, unless told otherwise in three steps; returns its output folder."""

    def run(flags, checkpoint=ckpt, out="out", steps="--steps 3", status=0):
        argv = f"--ckpt {checkpoint} --out_dir {out} --device cpu {steps} {flags}"
        try:
            result = sample_video_ddpm.main(argv.split())
        except SystemExit as stop:
            result = stop.code
        assert result == status
        return tmp_path / out

    return run


@pytest.fixture(scope="module")
def others(tmp_path_factory, square_videos):
    """Checkpoints of a predictor, of a network that refines around it, and of gray clips."""

    def train(*flags):
        return tiny_checkpoint(tmp_path_factory.mktemp("other"), square_videos, *flags)

    predictor = train("--train", "predictor")
    return {
        "predictor": predictor,
        "refining": train("--predictor", str(predictor)),
        "gray": train("--color_mode", "gray", "--endpoint_context", "1", "--T", "3"),
    }


@pytest.fixture(scope="module")
def levels(tmp_path_factory):
    """Five held-out videos: everywhere in frame i of video v the level is 40 * v + i."""
    root = tmp_path_factory.mktemp("levels")
    for name in ("train/0", *(f"val/{v}" for v in range(5))):
        path = root / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        clip = 40 * int(path.stem) + torch.arange(21, dtype=torch.uint8).view(1, -1, 1, 1)
        save_mp4(path, clip.expand(3, -1, 16, 16), fps=10, lossless=True)
    return root


def copy_with(ckpt, args=(), clip=()):
    state = load_checkpoint(ckpt)
    state["args"].update(args)
    state["clip_config"].update(clip)
    save_checkpoint("copy.pt", state)
    return "copy.pt"


def frames(folder):
    """The written clip, uint8 [T,H,W,3] or, in gray, [T,H,W]."""
    return np.stack([iio.imread(path) for path in sorted((folder / "frames").glob("*.png"))])


def record(folder):
    return json.loads((folder / "sample.json").read_text())


def pixels(middle):
    """What a sample [1,C,M,H,W] becomes in files: [M,H,W,C]."""
    return to_uint8(middle)[0].permute(1, 2, 3, 0).numpy()


def near(a, b):
    """Whether no pixel differs by more than a rounding."""
    return np.abs(a.astype(int) - b).max() <= 1


def decibels(made, truth):
    """Mean PSNR of frames [M,H,W,3] of 0..255."""
    error = (made.astype(float) - truth) ** 2
    return pytest.approx(np.mean(10 * np.log10(255**2 / error.mean((1, 2, 3)))), abs=1e-3)


def test_observed_frames_pass_bit_for_bit_and_every_form_is_written(sample):
    out = sample(f"{ENDS} --fps 5")
    given = [iio.imread(path) for path in PNGS]
    made = frames(out)
    assert len(made) == 8 and np.array_equal(made[[0, 1, 6, 7]], given)
    forms = "end_context.png frames sample.gif sample.json sample.mp4 sheet.png start_context.png"
    assert sorted(path.name for path in out.iterdir()) == forms.split()
    info = probe_video(out / "sample.mp4")
    assert (info.frames, info.width, info.height, info.rate) == (8, 16, 16, 5)
    assert len(iio.imread(out / "sample.gif")) == 8
    assert np.array_equal(iio.imread(out / "start_context.png"), np.hstack(given[:2]))
    assert np.array_equal(iio.imread(out / "end_context.png"), np.hstack(given[2:]))


def test_true_middle_images_give_a_score_and_a_row_of_the_sheet(sample):
    middles = [PNGS[i] for i in (3, 0, 1, 2)]
    out = sample(f"{ENDS} --middle_images {' '.join(middles)}")
    truth = np.stack([iio.imread(path) for path in middles])
    start, end = (iio.imread(path).astype(float) for path in PNGS[1:3])
    faded = np.stack([start + (end - start) * i / 5 for i in range(1, 5)]).round()
    scores = record(out)["scores"]
    assert scores["psnr"] == decibels(frames(out)[2:-2], truth)
    assert scores["psnr_cross_fade"] == decibels(faded, truth)
    plain = sample(ENDS, out="plain")
    assert record(plain)["scores"] is None
    both, one = (iio.imread(folder / "sheet.png") for folder in (out, plain))
    assert np.array_equal(both[len(both) // 2 :], one)  # truth above, generated below


@pytest.mark.parametrize(("flags", "size"), [("", (16, 24)), ("--size 24 16", (24, 16))])
def test_images_are_cropped_to_sizes_that_are_not_square(sample, ckpt, capsys, flags, size):
    rng = np.random.default_rng(1)
    for path, shape in zip(PNGS, [(40, 24), (16, 64), (33, 47), (20, 20)], strict=True):
        iio.imwrite(path, rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
    out = sample(f"{ENDS} --T 5 {flags}", checkpoint=copy_with(ckpt, clip={"size": [16, 24]}))
    assert capsys.readouterr().err.count("note: frames are resized") == 1
    made = frames(out)
    assert made.shape == (5, *size, 3) and record(out)["size"] == list(size)
    for path, frame in zip(PNGS, made[[0, 1, 3, 4]], strict=True):
        assert np.array_equal(frame, resize_and_crop(read_image(path), size).permute(1, 2, 0))


def test_gray_checkpoints_take_luma_and_leave_gray_images_as_they_are(sample, others):
    flags = "--start_images start_0.png --end_images end_1.png"
    made = frames(sample(flags, checkpoint=others["gray"]))
    given = [PNGS[0], PNGS[3]]
    assert made.shape == (3, 16, 16)
    assert np.array_equal(made[[0, 2]], [to_gray(read_image(path))[0].numpy() for path in given])
    for path in given:
        iio.imwrite(path, iio.imread(path)[..., 0])
    made = frames(sample(flags, checkpoint=others["gray"], out="gray"))
    assert np.array_equal(made[[0, 2]], [iio.imread(path) for path in given])


@pytest.mark.parametrize(("stride", "observed"), [(1, [6, 7, 12, 13]), (2, [3, 5, 15, 17])])
def test_clips_are_central_windows_of_evenly_chosen_files(sample, ckpt, levels, stride, observed):
    checkpoint = copy_with(ckpt, clip={"frame_stride": stride})
    out = sample(f"--data_root {levels} --num_clips 2", checkpoint=checkpoint)
    for clip, video in ((0, 0), (1, 2)):
        folder = out / f"clip_{clip:03d}_sample_000"
        made = frames(folder)
        expected = [40 * video + i for i in observed]
        assert made[[0, 1, 6, 7], 3, 5, 0].tolist() == expected
        truth = np.arange(expected[1] + stride, expected[2], stride).reshape(4, 1, 1, 1)
        assert record(folder)["scores"]["psnr"] == decibels(made[2:-2], truth)
        assert record(folder)["source"] == f"val/{video}.mp4"


def test_clips_are_those_that_training_held_out(sample, ckpt, square_videos, tmp_path):
    split = {"val_ratio": 0.5, "seed": 1}
    _, held_out = prepare_videos(square_videos, span=8, cache_dir=tmp_path, **split)
    out = sample(f"--num_clips {len(held_out)}", checkpoint=copy_with(ckpt, args=split))
    sources = [record(folder)["source"] for folder in sorted(out.iterdir())]
    assert sources == [video.name for video in held_out] and len(sources) > 2


def test_noise_depends_on_seed_clip_and_sample_only(sample, ckpt, levels, monkeypatch):
    flags = f"--data_root {levels} --num_clips 3 --num_samples 2 --seed 7"
    out = sample(flags)
    monkeypatch.setattr(sample_video_ddpm, "BATCH_SIZE", 2)
    batches = sample(flags, out="batches")
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    for clip, number in np.ndindex(3, 2):
        name = f"clip_{clip:03d}_sample_{number:03d}"
        made = frames(out / name)
        noise = [generator_for(7, SAMPLE, clip, number)]
        middle = pipe(made[:2], made[-2:], steps=3, generator=noise)
        assert near(made[2:-2], pixels(middle))
        assert near(made, frames(batches / name))


@pytest.mark.parametrize(
    ("name", "value", "nfe"),
    [
        ("steps", 5, 10),
        ("spacing", "quadratic", 80),
        ("guidance_scale", 1.0, 40),
        ("guidance_interval", [0.3, 0.9], 64),
        ("eta", 0.5, 80),
        ("dynamic_threshold", True, 80),
    ],
)
def test_a_flag_replaces_one_value_of_the_default_sampler(sample, ckpt, name, value, nfe):
    words = "" if value is True else " ".join(map(str, np.ravel(value)))
    out = sample(f"{ENDS} --{name} {words}", steps="")
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    expected = {**pipe.sampler, "guidance_interval": [0, 1], "nfe": nfe, name: value}
    assert expected.items() <= record(out).items()
    noise = generator_for(0, SAMPLE, 0, 0)
    middle = pipe(PNGS[:2], PNGS[2:], generator=[noise], **{name: value})
    assert near(frames(out)[2:-2], pixels(middle))


def predicted(config, weights):
    """The frames that a predictor gives between the pictures."""
    network = FramePredictor(**config)
    network.load_state_dict(weights)
    start, end = (load_context(paths, 16, "rgb") for paths in (PNGS[:2], PNGS[2:]))
    with torch.no_grad():
        return pixels(network.eval()(start, end, 4)[0])


def test_zero_steps_give_the_prediction_that_a_checkpoint_refines(sample, others):
    out = sample(f"{ENDS} --steps 0", checkpoint=others["refining"])
    stored = load_checkpoint(others["refining"])["predictor"]
    assert near(frames(out)[2:-2], predicted(stored["config"], stored["weights"]))
    refined = sample(ENDS, checkpoint=others["refining"], steps="", out="refined")
    assert {"steps": 2, "spacing": "quadratic", "nfe": 2}.items() <= record(refined).items()
    assert not near(frames(out), frames(refined))


@pytest.mark.parametrize(("flags", "weights"), [("", "ema"), ("--use_raw_model", "model")])
def test_a_predictors_own_checkpoint_predicts(sample, others, flags, weights):
    stored = load_checkpoint(others["predictor"])
    out = sample(f"{ENDS} {flags}", checkpoint=others["predictor"], steps="")
    assert near(frames(out)[2:-2], predicted(stored["model_config"], stored[weights]))


def test_the_checkpoint_moves_without_its_data(sample, ckpt, tmp_path):
    places = dict.fromkeys(("data_root", "cache_dir", "out_dir"), "gone")
    moved = sample(ENDS, checkpoint=copy_with(ckpt, args=places), out="moved")
    assert np.array_equal(frames(moved), frames(sample(ENDS)))
    assert not (tmp_path / "gone").exists()


def test_gaps_of_a_video_are_filled_and_all_else_stays(sample, ckpt, tmp_path):
    source = with_sound(tmp_path / "in.mp4")
    out = sample("--video in.mp4 --gap 20:28 --gap 10:13 --lossless --seed 3 --size 24 32")
    before = decoded(source)
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    expected = before.clone()
    for number, gap in enumerate((range(10, 13), range(20, 28))):
        start = before[gap.start - 2 : gap.start].transpose(0, 1)
        end = before[gap.stop : gap.stop + 2].transpose(0, 1)
        noise = [generator_for(3, SAMPLE, number)]
        middle = pipe(start, end, num_middle=len(gap), steps=3, generator=noise)
        expected[gap.start : gap.stop] = to_uint8(middle)[0].transpose(0, 1)
    assert torch.equal(decoded(out / "video.mp4"), expected)
    assert packets(out / "video.mp4", "audio") == packets(source, "audio")
    assert record(out)["generated_at"] == [24, 32]


def test_a_full_disk_is_not_blamed_on_the_video(sample, capsys, tmp_path, monkeypatch):
    with_sound(tmp_path / "in.mp4")

    @contextlib.contextmanager
    def open_full_disk(path):
        with Path("/dev/full").open("wb") as file:
            yield file

    monkeypatch.setattr(sample_video_ddpm.io, "atomic_write", open_full_disk)
    sample("--video in.mp4 --gap 10:13", status=2)
    said = capsys.readouterr().err
    assert "No space left on device" in said and "--video" not in said


def test_a_gray_video_stays_gray(sample, tmp_path):
    levels = torch.arange(12).mul(8).view(1, 12, 1, 1).expand(3, 12, 16, 16)
    save_mp4(tmp_path / "gray.mp4", levels.to(torch.uint8), fps=10, lossless=True)
    out = sample("--video gray.mp4 --gap 4:8 --lossless")
    frames = decoded(out / "video.mp4")
    assert torch.equal(frames[:, :1].expand(-1, 3, -1, -1), frames)


def test_a_gap_may_be_generated_at_another_size_and_in_gray(sample, others, tmp_path):
    source = with_sound(tmp_path / "in.mp4")
    out = sample("--video in.mp4 --gap 5:7 --size 16 --lossless", checkpoint=others["gray"])
    small = to_gray(resize(decoded(source), (16, 16))).transpose(0, 1)  # [1,T,16,16]
    pipe = MiddleFramePipeline.from_checkpoint(others["gray"], "cpu")
    noise = [generator_for(0, SAMPLE, 0)]
    middle = pipe(small[:, 4:5], small[:, 7:8], num_middle=2, steps=3, generator=noise)
    # What changes is enlarged and added to the cross-fade of the large frames.
    large = to_float(decoded(source)).transpose(0, 1)
    for i, weight in enumerate((1 / 3, 2 / 3)):
        faded = torch.lerp(large[:, 4], large[:, 7], weight)
        small_fade = torch.lerp(to_float(small[:, 4]), to_float(small[:, 7]), weight)
        change = resize(middle[0, :, i] - small_fade, (24, 32))
        error = decoded(out / "video.mp4")[5 + i].float() - (faded + change + 1) * 127.5
        # Values beyond black and white are cut; halves may round either way.
        assert error[:, ((faded + change).abs() <= 1).all(0)].abs().max() < 0.51
    # Without the flag frames are reduced as clips of training are, and never enlarged.
    sizes = [(24, 32), (64, 64), (480, 640), (1080, 1920)]
    working = [sample_video_ddpm.working_size(*size, (64, 64), 8) for size in sizes]
    assert working == [(24, 32), (64, 64), (64, 88), (64, 112)]


def test_an_earlier_sample_stays_without_overwrite(sample, capsys):
    out = sample(f"{ENDS} --T 9")
    before = frames(out)
    for flags in (ENDS, "--num_samples 2"):
        sample(f"{flags} --seed 1", status=2)
        assert "--overwrite" in capsys.readouterr().err
    assert np.array_equal(frames(out), before)
    sample(f"{ENDS} --seed 1 --overwrite")
    assert len(frames(out)) == 8  # no frame of the longer sample is left
    several = sample(f"{ENDS} --num_samples 2", out="several")
    sample(ENDS, status=2, out="several")
    assert len(list(several.iterdir())) == 2
    # Nothing of them is left beside another one.
    sample(f"{ENDS} --overwrite", out="several")
    assert not list(several.glob("clip_*"))


# By what stands before them: wrong flags and files, the first word of which the line names.
WRONG = {
    ENDS: "--num_clips 2, --data_root ., --middle_images end_0.png, --T 4, --size 18, --eta 2, "
    "--endpoint_context 3, --color_mode gray, --steps 1001, --steps 0, --out_dir text.png/out, "
    "--guidance_interval 0.9 0.3, --dynamic_threshold --ckpt refining.pt",
    f"{ENDS} --ckpt": "cut.pt, no.pt, other.pt",
    f"{ENDS} --end_images end_0.png": "no.png, text.png",
    "--video in.mp4 --gap 3:5": "--gap 1:3, --gap 9:11, --gap 6:6, --gap 4-6, --gap 5:7, --T 8, "
    "--num_samples 2, --data_root .",
    "--gap 3:5 --video": "text.png, two_sizes.mp4",
    "": "--start_images start_0.png --end_images end_0.png end_1.png, --middle_images end_0.png, "
    "--start_images start_0.png start_1.png, --num_clips 99, --data_root nowhere, "
    "--video in.mp4, --gap 4:6, --lossless",
}


def test_wrong_input_is_one_line_and_leaves_no_file(sample, ckpt, others, tmp_path, capsys):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.pt").write_bytes(ckpt.read_bytes()[:5000])
    (tmp_path / "refining.pt").symlink_to(others["refining"])
    state = load_checkpoint(ckpt)
    state["model_config"]["base_channels"] = 24
    save_checkpoint("other.pt", state)
    save_mp4("in.mp4", torch.zeros(3, 12, 16, 16, dtype=torch.uint8), fps=10)
    hostile.two_sizes(tmp_path / "two_sizes.mp4")  # which shows after some frames are written
    for before, several in WRONG.items():
        for flags in several.split(", "):
            out = sample(f"{before} {flags}", status=2)
            error = capsys.readouterr().err
            assert flags.split()[0] in error and error.count("\n") == 1, (flags, error)
            assert list(out.rglob("*")) == [], flags
