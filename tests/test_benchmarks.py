"""The benchmarks: their reference variants compute the same things, and their ratios are what they say."""

import copy

import pytest
import torch
from conftest import words

import train_video_ddpm
from benchmarks import bench_loading, bench_sampling, bench_training
from benchmarks.measure import Timing, compare
from data.kinetics_video_dataset import DecodedFrames
from data.video_index import usable_videos
from diffusion.pipeline import MiddleFramePipeline
from diffusion.sampler import sample_middle
from diffusion.schedule import DiffusionSchedule
from training.state import make_lr_schedule
from utils.video_utils import to_float

CPU = torch.device("cpu")


def test_ratios_are_taken_within_each_round():
    rows = compare([Timing("slow", [4.0, 8.0, 6.0], None), Timing("fast", [1.0, 4.0, 2.0], None)], "slow")
    assert [row["ratio"] for row in rows] == [1.0, 3.0]  # 4, 2 and 3 times
    assert (rows[1]["ratio_low"], rows[1]["ratio_high"], rows[1]["clips_per_second"]) == (2.0, 4.0, 0.5)


@pytest.mark.parametrize("guidance_scale", [1.0, 1.8])
def test_the_original_way_of_sampling_gives_the_same_frames_with_two_forwards_per_step(ckpt, guidance_scale):
    model, counts = MiddleFramePipeline.from_checkpoint(ckpt, "cpu").model, []
    original = bench_sampling.OriginalWay(model, guided=guidance_scale != 1)

    def encode(*contexts):
        counts.append(len(contexts[0]))
        return model.encode_contexts(*contexts)

    original.model.encode_contexts = encode
    contexts = torch.rand(2, 2, 3, 2, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = []
    for net in (model, original):
        settings = {"steps": 3, "guidance_scale": guidance_scale, "generator": torch.Generator().manual_seed(1)}
        made.append(sample_middle(net, DiffusionSchedule(), *contexts, num_middle=4, **settings))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)  # float32 convolutions in another order, three steps
    assert counts == [2] * 6


def test_the_original_training_step_leads_to_the_same_weights():
    flags = words("--base_channels 12 --size 16 --batch_size 2 --ema_update_after_step 0")
    args = bench_training.training_arguments("demo", *flags)
    step, state = bench_training.our_step(args, CPU)
    start, made, init_state = copy.deepcopy(state.model), [], bench_training.init_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_training, "init_state", lambda *given: made.append(init_state(*given)) or made[-1])
        original = bench_training.original_step(args, CPU)
    # the rate of the original step does not change
    state.lr_schedule = make_lr_schedule(args.lr, 0, total_steps=10**9, step=0, stored={})
    for _ in range(2):
        step()
        original()
    # Adam divides by the gradient's size: where that is rounding, each step may differ by twice the learning rate
    for name, share in (("model", 1), ("ema", 1 - args.ema_decay)):
        for ours, theirs in zip(getattr(state, name).parameters(), getattr(made[0], name).parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=4 * args.lr * share)
    moved = sum((a - b).abs().sum() for a, b in zip(made[0].ema.parameters(), start.parameters(), strict=True))
    apart = sum((a - b).abs().sum() for a, b in zip(made[0].ema.parameters(), state.ema.parameters(), strict=True))
    assert apart < 0.1 * moved


def test_the_reference_reader_gives_the_same_frames(square_videos, tmp_path):
    videos = usable_videos(square_videos, 8, tmp_path, 2, log=lambda line: None)
    for video in videos:
        ours = DecodedFrames(32, "rgb").read(video, range(2, 10))
        assert torch.equal(bench_loading.read_as_original(video, list(range(2, 10)), 32), to_float(ours))


def test_counted_operations_are_those_of_the_design():
    args = train_video_ddpm.build_parser().defaults()
    # the design counts 239 GFLOP of 3-D convolutions; encoder, FiLM and attention come on top
    assert 239 < bench_training.forward_flops(args) / 1e9 < 1.03 * 239


def test_bad_input_of_a_benchmark_is_one_line(tmp_path, capsys):
    for script, flags in ((bench_sampling, ["--ckpt", "none.pt"]), (bench_loading, ["--data_root", "nowhere"])):
        with pytest.raises(SystemExit) as stop:
            script.main([*flags, "--out_dir", str(tmp_path)])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
