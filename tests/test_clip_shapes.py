"""One network for any length and stride: clips are cut as asked, and their times reach the network."""

from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint, words

import evaluate_video_ddpm
import sample_video_ddpm
from diffusion.noise import generator_for
from diffusion.pipeline import MiddleFramePipeline
from training.clip_shapes import clip_config_of, cut_clips, draw_times
from utils.checkpoint import load_checkpoint
from utils.video_utils import add_times

pytestmark = pytest.mark.usefixtures("quick")
RANGES = words("--T 6 9 --frame_stride 1 2 --predictor learned --predictor_width 8 --predictor_steps 1")


def test_times_are_the_logarithms_of_distances_to_the_other_end():
    start, end = torch.rand(2, 2, 3, 2, 4, 4)
    timed = add_times(start, end, [3, 5, 9, 13, 17, 18])  # strides 2, 4 and 1; 17 - 5 = 12 across
    for context, made, distances in zip((start, end), timed, ([14, 12], [12, 13]), strict=True):
        assert torch.equal(made[:, :3], context)
        for i, distance in enumerate(distances):
            assert torch.allclose(made[:, 3, i], torch.tensor(np.log2(distance) / 4, dtype=torch.float32))


@pytest.mark.parametrize(("window", "strides"), [(45, (1, 4)), (14, (1, 4)), (60, (2, 5)), (23, (2, 5))])
def test_every_length_and_every_stride_that_fits_is_drawn(window, strides):
    seen, mixed = set(), 0
    for i in range(3000):
        times = np.array(draw_times(window, (6, 12), strides, 2, generator_for(i)))
        steps = np.diff(times)
        assert times[0] >= 0 and times[-1] < window and 6 <= len(times) <= 12
        assert set(steps) <= set(range(strides[0], strides[1] + 1)) and len(set(steps[1:-1])) == 1
        seen.add((len(times), steps[1]))
        mixed += len(set(steps)) > 1
    fitting = {(t, s) for t in range(6, 13) for s in range(strides[0], strides[1] + 1) if (t - 1) * s < window}
    assert seen == fitting and mixed > 300


def test_clips_are_cut_at_their_times():
    clips = torch.arange(45.0).view(1, 1, 45, 1, 1).expand(2, 3, 45, 4, 4)  # every frame shows its number
    args = Namespace(num_frames=[6, 12], frame_stride=[1, 4], endpoint_context=2, size=4, color_mode="rgb")
    assert clip_config_of(args) == {"num_frames": 12, "frame_stride": 1, "size": 4, "color_mode": "rgb"}
    for i in range(50):
        times = draw_times(45, (6, 12), (1, 4), 2, generator_for(i))
        start, middle, end = cut_clips(clips, args, generator_for(i))
        frames = torch.cat([start[:, :3], middle, end[:, :3]], dim=2)
        assert frames[1, 2, :, 3, 3].tolist() == times
        assert [start.shape[1], end.shape[1]] == [4, 4] and torch.equal(start, add_times(start[:, :3], end, times)[0])


@pytest.fixture(scope="module")
def timed(tmp_path_factory, square_videos):
    """A tiny checkpoint that was trained on 6 to 9 frames at strides 1 and 2."""
    return tiny_checkpoint(tmp_path_factory.mktemp("timed"), square_videos, *RANGES)


@pytest.mark.parametrize("steps", [0, 2])
def test_the_network_knows_the_times(timed, ckpt, steps):
    start, end = (torch.rand(1, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1).split(2, dim=2)

    def middle(path, times=None, m=2):
        pipe = MiddleFramePipeline.from_checkpoint(path, "cpu")
        return pipe(start, end, num_middle=m, times=times, steps=steps, generator=[generator_for(1)])

    usual = middle(timed)
    assert torch.equal(usual, middle(timed, range(6)))  # of the range the smallest stride
    for other in (range(0, 12, 2), [0, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 6]):
        assert (usual - middle(timed, other)).abs().max() > 1e-3
    assert middle(timed, m=5).shape == (1, 3, 5, 16, 16)
    if steps:
        assert torch.equal(middle(ckpt), middle(ckpt, range(0, 12, 2)))  # trained on one shape: nothing to be told


def test_scripts_take_any_length_and_stride_of_a_checkpoint_of_ranges(timed, square_videos, tmp_path):
    checkpoint = load_checkpoint(timed)
    assert checkpoint["model_config"]["timed"] is True and checkpoint["args"]["num_frames"] == [6, 9]
    common = ["--ckpt", str(timed), "--cache_dir", str(tmp_path / "cache"), "--out_dir"]
    for name, flags in (("a", ""), ("b", "--T 6 --frame_stride 2"), ("c", "--T 13")):
        assert sample_video_ddpm.main([*common, str(tmp_path / name), *words(flags)]) == 0
        made = len(list((tmp_path / name / "frames").glob("*.png")))
        assert made == {"a": 9, "b": 6, "c": 13}[name]
    few = words("--T 7 --frame_stride 2 --metrics psnr --baselines cross_fade --num_videos 2")
    assert evaluate_video_ddpm.main([*common, str(tmp_path / "scores"), *few]) == 0
