"""Checkpoints: written whole or not at all, and read as one error line or as they were."""

import errno
import pickle
import random
import zipfile

import pytest
import torch
from test_model import shaken

from diffusion.pipeline import MiddleFramePipeline
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from utils.checkpoint import load_checkpoint, save_checkpoint

SMALLEST = {
    "base_channels": 4,
    "channel_mults": [1],
    "res_blocks": 1,
    "temporal_attn_levels": [],
}


def stored_network(network, config, seed=0):
    """Config and weights of a network that is not at its start."""
    torch.manual_seed(seed)
    return {"config": config, "weights": shaken(network(**config), seed, by=0.1).state_dict()}


def make_state():
    """What a run of the smallest network would save."""
    return {
        "format": 3,
        "step": 3,
        "model": stored_network(VideoUNet3D, SMALLEST, seed=1)["weights"],
        "ema": stored_network(VideoUNet3D, SMALLEST, seed=2)["weights"],
        "predictor": None,
        "model_config": SMALLEST,
        "diffusion_config": {
            "timesteps": 100,
            "schedule": "cosine",
            "noise_offset": 0.0,
            "noise_correlation": 0.0,
        },
        "clip_config": {"num_frames": 8, "size": 16, "frame_stride": 1, "color_mode": "rgb"},
        "args": {"train": "diffusion", "cfg_drop_prob": 0.1},
        "history": {"train": [[1, 0.5]], "epochs": [{"step": 3, "val_loss": 0.4}]},
    }


def with_value(state, place, value):
    """A copy of a state with another value at a place such as "clip_config.size"."""
    first, _, rest = place.partition(".")
    return {**state, first: with_value(state[first], rest, value) if rest else value}


def same(one, other):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def refused(path):
    with pytest.raises(ValueError, match=path.name) as caught:
        MiddleFramePipeline.from_checkpoint(path, "cpu")
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.pt"


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(ValueError, match="a folder"):
        load_checkpoint(tmp_path)


def test_a_checkpoint_comes_back_as_it_was_and_the_one_before_is_kept(path):
    before = path.with_name("prev.pt")
    save_checkpoint(path, with_value(make_state(), "step", 2))
    save_checkpoint(path, make_state(), previous=before)
    assert same(load_checkpoint(path), make_state())
    assert load_checkpoint(before)["step"] == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), RuntimeError("zip writer")])
def test_a_failing_write_leaves_the_old_file_whole_and_nothing_else(path, monkeypatch, error):
    def write_half(state, file):
        file.write(b"half")
        raise error

    save_checkpoint(path, make_state())
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match=path.name):
        save_checkpoint(path, make_state(), previous=path.with_name("prev.pt"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_damaged_and_truncated_files_are_refused_or_read_as_they_were(path):
    save_checkpoint(path, make_state())
    whole = path.read_bytes()
    draw = random.Random(0)
    refusals = 0
    for number in range(60):
        damaged = bytearray(whole)
        # Every other one in the directory at the end, which no checksum covers.
        first = 0 if number % 2 else len(whole) - 8000
        damaged[draw.randrange(first, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            assert same(load_checkpoint(path), make_state())
        except ValueError as error:
            assert path.name in str(error)
            refusals += 1
    assert refusals > 20
    for size in (0, 3, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)


@pytest.mark.parametrize(("name", "offset", "value"), [("/1", 38, 16), (".pkl", 10, 14)])
def test_an_entry_that_says_it_is_a_folder_or_packed_by_lzma_is_refused(path, name, offset, value):
    save_checkpoint(path, make_state())
    content = bytearray(path.read_bytes())
    entry = content.rindex(f"archive/data{name}".encode()) - 46
    content[entry + offset] = value
    path.write_bytes(content)
    refused(path)


def test_foreign_files_are_refused_and_nothing_in_them_is_run(path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("a checkpoint ran code",)

    refused(path)  # absent
    refused(path.parent)
    for content in (b"hello", pickle.dumps({"format": 2})):
        path.write_bytes(content)
        refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"format": 2}))
    refused(path)
    formats = [with_value(make_state(), "format", value) for value in (2, 4, None, "3")]
    bomb = {**make_state(), "more": Bomb()}
    for foreign in (7, [1, 2], {}, {"format": 2}, *formats, bomb):
        torch.save(foreign, path)
        refused(path)


WRONG_VALUES = {
    "step": [1.5, None],
    "clip_config": [None, {}],
    "clip_config.num_frames": ["8", 0],
    "clip_config.frame_stride": [2**31, 1.0],
    "clip_config.size": [[16], True, [16, -16]],
    "clip_config.color_mode": ["cmyk"],
    "diffusion_config": [{}],
    "diffusion_config.timesteps": [-1],
    "diffusion_config.schedule": ["sigmoid"],
    "diffusion_config.noise_offset": [-0.1, 101, torch.inf],
    "diffusion_config.noise_correlation": [1.0, -0.1, torch.nan, "0.5"],
    "history": [{}],
    "history.train": [[[1, torch.inf]], [[1, "2"]]],
    "history.epochs": [[{"step": 1}], [{"step": 1, "val_loss": torch.nan}]],
    "model_config": [{**SMALLEST, "depth": 3}, {**SMALLEST, "base_channels": 8}],
    "ema": [{}, None, stored_network(FramePredictor, {})["weights"]],
    "ema.more": [torch.zeros(1)],
    "predictor": [{"config": {}}, {"config": {}, "weights": {}}],
    "args": [{}],
}


@pytest.mark.parametrize("place", WRONG_VALUES)
def test_values_that_cannot_be_worked_with_are_refused(path, place):
    for value in WRONG_VALUES[place]:
        save_checkpoint(path, with_value(make_state(), place, value))
        refused(path)
