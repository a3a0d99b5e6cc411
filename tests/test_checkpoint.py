"""Checkpoints: written whole or not at all, and read as one error line or as they were."""

import errno
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from test_model import shaken

from diffusion.pipeline import MiddleFramePipeline
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint

FRAMES = {"image_channels": 3, "endpoint_context": 2}
NETWORK = {
    **FRAMES,
    "base_channels": 4,
    "channel_mults": [1],
    "res_blocks": 1,
    "temporal_attn_levels": [],
}


def stored_network(network, config, seed=0):
    """Config and weights of a network that is not at its start."""
    torch.manual_seed(seed)
    return {"config": config, "weights": shaken(network(**config), seed, by=0.1).state_dict()}


def make_state(**changes):
    """What a run of the smallest network would save."""
    return {
        "step": 3,
        "model": stored_network(VideoUNet3D, NETWORK, seed=1)["weights"],
        "ema": stored_network(VideoUNet3D, NETWORK, seed=2)["weights"],
        "predictor": None,
        "model_config": NETWORK,
        "diffusion_config": {
            "timesteps": 100,
            "schedule": "cosine",
            "noise_offset": 0.0,
            "noise_correlation": 0.0,
        },
        "clip_config": {"num_frames": 8, "size": 16, "frame_stride": 1, "color_mode": "rgb"},
        "args": {"train": "diffusion", "cfg_drop_prob": 0.1},
        "history": {"train": [[1, 0.5]], "epochs": [{"step": 3, "val_loss": 0.4}]},
        **changes,
    }


def with_value(state, place, value):
    """A copy of a state with another value at a place such as "clip_config.size"."""
    first, _, rest = place.partition(".")
    return {**state, first: with_value(state[first], rest, value) if rest else value}


def same(one, other):
    """Whether two states are equal, tensors bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def refused(path, load=load_checkpoint):
    """A reading that fails in one line with the file's name in it."""
    with pytest.raises(ValueError, match=path.name) as caught:
        load(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.pt"


def test_a_checkpoint_comes_back_as_it_was_and_the_one_before_is_kept(path):
    state = make_state()
    save_checkpoint(path, {**state, "step": 2})
    save_checkpoint(path, state, previous=path.with_name("prev.pt"))
    assert same(load_checkpoint(path), {"format": 2, **state})
    assert load_checkpoint(path.with_name("prev.pt"))["step"] == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), RuntimeError("zip writer")])
def test_a_failing_write_leaves_the_old_file_whole_and_nothing_else(path, monkeypatch, error):
    def write_half(state, file):
        file.write(b"half")
        raise error

    save_checkpoint(path, make_state())
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="some.pt"):
        save_checkpoint(path, make_state(), previous=path.with_name("prev.pt"))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_damaged_and_truncated_files_are_refused_or_read_as_they_were(path):
    state = make_state()
    save_checkpoint(path, state)
    whole = path.read_bytes()
    draw = random.Random(0)
    refusals = 0
    for number in range(60):
        damaged = bytearray(whole)
        # Half of them in the directory at the end, which is not checksummed.
        first = 0 if number % 2 else len(whole) - 8000
        damaged[draw.randrange(first, len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert "some.pt" in str(error)
            refusals += 1
        else:
            assert same(loaded, {"format": 2, **state})
    assert refusals > 20
    for size in (0, 3, 1000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(path)


class Bomb:
    """What would run if a pickle were trusted."""

    def __reduce__(self):
        return pytest.fail, ("a checkpoint ran code",)


def test_foreign_files_are_refused_and_nothing_in_them_is_run(path):
    refused(path)  # absent
    refused(path.parent)
    path.write_text("hello")
    refused(path)
    path.write_bytes(pickle.dumps(make_state()))
    refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"format": 2}))
    refused(path)
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    refused(path.with_suffix(".npz"))
    for foreign in (torch.zeros(3), [1, 2], {}, {"format": 2}, {"state_dict": {}}):
        torch.save(foreign, path)
        refused(path)
    for value in (1, 3, None, "2", torch.zeros(2)):
        torch.save({**make_state(), "format": value}, path)
        refused(path)
    torch.save({"format": 2, **make_state(), "bomb": Bomb()}, path)
    refused(path)


WRONG_VALUES = [
    ("step", 1.5),
    ("clip_config", None),
    ("clip_config.num_frames", "8"),
    ("clip_config.num_frames", 0),
    ("clip_config.frame_stride", 2**31),
    ("clip_config.size", [16]),
    ("clip_config.size", True),
    ("clip_config.color_mode", "cmyk"),
    ("diffusion_config", {}),
    ("diffusion_config.timesteps", -1),
    ("diffusion_config.noise_offset", -0.1),
    ("diffusion_config.noise_offset", 101),
    ("diffusion_config.noise_correlation", 1.0),
    ("diffusion_config.noise_correlation", float("nan")),
    ("diffusion_config.noise_correlation", "0.5"),
    ("history", {}),
    ("history.train", [[1, float("inf")]]),
    ("history.epochs", [{"step": 1}]),
    ("history.epochs", [{"step": 1, "val_loss": float("nan")}]),
]


@pytest.mark.parametrize(("place", "value"), WRONG_VALUES)
def test_values_that_cannot_be_worked_with_are_refused(path, place, value):
    save_checkpoint(path, with_value(make_state(), place, value))
    refused(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("diffusion_config.schedule", "sigmoid"),
        ("model_config", {**NETWORK, "depth": 3}),
        ("model_config", {**NETWORK, "base_channels": 10}),
        ("model_config", {**NETWORK, "base_channels": 8}),  # not that of the weights
        ("ema", {}),
        ("ema", None),
        ("ema.more", torch.zeros(1)),
        ("ema", stored_network(FramePredictor, FRAMES)["weights"]),
        ("predictor", {"config": FRAMES}),
        ("predictor", {"config": FRAMES, "weights": {}}),
        ("args", {}),
    ],
)
def test_networks_that_do_not_fit_their_weights_are_refused(path, place, value):
    save_checkpoint(path, with_value(make_state(), place, value))
    refused(path, lambda path: MiddleFramePipeline.from_checkpoint(path, "cpu"))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_half_precision_weights_become_float32(device):
    half = {name: value.half() for name, value in make_state()["ema"].items()}
    with torch.device(device):
        network = VideoUNet3D(**NETWORK)
    load_weights(network, half, "some.pt")
    assert same(dict(network.state_dict()), {name: value.float() for name, value in half.items()})
