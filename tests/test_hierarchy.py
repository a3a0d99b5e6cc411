"""Long gaps in passes: every frame once, from frames that are there already, between its nearest neighbours."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_checkpoint, words

import evaluate_video_ddpm
import sample_video_ddpm
from diffusion.hierarchy import describe_plan, fill_gap, plan_levels
from diffusion.noise import generator_for
from diffusion.pipeline import MiddleFramePipeline

pytestmark = pytest.mark.usefixtures("quick")


@pytest.mark.parametrize("most", [1, 2, 5, 8])
@pytest.mark.parametrize("num_middle", [1, 2, 7, 8, 9, 26, 100])
def test_every_frame_is_made_once_and_no_pass_is_too_long(num_middle, most):
    levels = plan_levels(num_middle, most)
    passes = [numbers for level in levels for numbers in level]
    assert sorted(sum(passes, [])) == list(range(num_middle)) and max(map(len, passes)) <= most
    if num_middle <= most:
        assert levels == [[list(range(num_middle))]]
    known = {-1, num_middle}
    for level in levels:
        steps = [np.diff([max(k for k in known if k < made[0]), *made]) for made in level]
        assert all(s.max() - s.min() <= 1 for s in steps)  # evenly spread, but for what rounding does
        known |= {number for made in level for number in made}


def test_the_plan_of_a_long_gap_is_told_on_one_line():
    assert describe_plan(plan_levels(26, 8)) == "level 1: 8 frames in 1 pass; level 2: 18 frames in 9 passes"


def test_passes_rest_on_their_nearest_known_neighbours():
    numbers = torch.arange(-2.0, 28).view(1, 1, 30, 1, 1).expand(1, 3, 30, 4, 4)  # every frame shows its number
    seen = []

    def generate(start, end, count, times):
        assert [*start[0, 0, :, 0, 0].tolist(), *times[2:-2], *end[0, 0, :, 0, 0].tolist()] == times
        seen.append(times)
        shown = torch.tensor(times[2 : 2 + count], dtype=torch.float32).view(1, 1, count, 1, 1)
        return shown.expand(1, 3, count, 4, 4)

    made = fill_gap(generate, numbers[:, :, :2], numbers[:, :, -2:], plan_levels(26, 8))
    assert torch.equal(made, numbers[:, :, 2:-2])
    assert seen[0] == [-2, -1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27] and seen[1] == [-2, -1, 0, 1, 2, 5]


def test_scripts_fill_long_gaps_with_a_model_of_ranges_alone(square_videos, ckpt, tmp_path, capsys):
    timed = tiny_checkpoint(tmp_path, square_videos, *words("--T 6 8 --frame_stride 1 3"))
    common = ["--cache_dir", str(tmp_path / "cache"), *words("--T 13 --steps 2 --guidance_scale 1")]
    out = tmp_path / "made"
    assert sample_video_ddpm.main(["--ckpt", str(timed), "--out_dir", str(out), *common, "--hierarchy"]) == 0
    assert json.loads((out / "sample.json").read_text())["nfe"] == 2 * 6
    assert len(list((out / "frames").glob("*"))) == 13
    assert "level 1: 4 frames in 1 pass; level 2: 5 frames in 5 passes" in capsys.readouterr().out
    few = words("--hierarchy --metrics psnr --baselines cross_fade")
    out = tmp_path / "scores"
    assert evaluate_video_ddpm.main(["--ckpt", str(timed), "--out_dir", str(out), *common, *few]) == 0
    assert [row["nfe"] for row in json.loads((out / "metrics.json").read_text())["rows"]] == [12, 0]
    capsys.readouterr()
    for main in (sample_video_ddpm.main, evaluate_video_ddpm.main):
        with pytest.raises(SystemExit) as left:
            main(["--ckpt", str(ckpt), "--out_dir", str(tmp_path / "no"), *common, "--hierarchy"])
        error = capsys.readouterr().err
        assert left.value.code == 2 and "--hierarchy may be used with a model trained on a range" in error


def test_a_long_gap_is_a_function_of_its_seed(square_videos, tmp_path):
    timed = tiny_checkpoint(tmp_path, square_videos, *words("--T 6 8 --frame_stride 1 3"))
    pipe = MiddleFramePipeline.from_checkpoint(timed, "cpu")
    start, end = (torch.rand(2, 3, 4, 16, 16, generator=generator_for(0)) * 2 - 1).split(2, dim=2)

    def middle(seed, clips=slice(None)):
        generators = [generator_for(seed, clip) for clip in range(2)][clips]
        how = {"num_middle": 9, "hierarchy": True, "steps": 2}
        return pipe(start[clips], end[clips], generator=generators, **how)

    both = middle(0)
    assert torch.equal(both, middle(0)) and (both - middle(1)).abs().max() > 0.02
    # convolutions of another batch size may round differently
    torch.testing.assert_close(both[1:], middle(0, slice(1, 2)), rtol=1e-4, atol=1e-4)
