"""The benchmarks: their references compute what ours does, and their ratios are what they say."""

import torch

from benchmarks import bench_sampling, bench_training, measure
from diffusion.sampler import sample_middle
from diffusion.schedule import DiffusionSchedule
from models.video_unet3d import VideoUNet3D


def test_variants_run_in_turn_and_ratios_are_taken_within_each_round():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = measure.time_variants(runs, rounds=2, device=torch.device("cpu"))
    assert "".join(order) == "ababab" and [len(seconds[name]) for name in "ab"] == [2, 2]
    rows = measure.compare({"slow": [4.0, 8.0, 6.0], "fast": [1.0, 4.0, 2.0]}, clips=4)
    assert [row["ratio"] for row in rows] == [1.0, 3.0]  # 4, 2 and 3 times
    assert (rows[1]["ratio_low"], rows[1]["ratio_high"]) == (2.0, 4.0)
    assert [row["clips_per_second"] for row in rows] == [4 / 6, 2.0]


def test_the_original_sampler_gives_the_same_frames_with_two_forwards_per_step():
    torch.manual_seed(0)
    model = VideoUNet3D(base_channels=12, channel_mults=[1, 2], temporal_attn_levels=[1]).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    original = bench_sampling.OriginalDenoiser(model)
    batches = []
    encoder = original.model.endpoint_encoder
    encoder.register_forward_hook(lambda module, given, out: batches.append(len(given[0])))
    contexts = torch.rand(2, 2, 3, 2, 16, 16) * 2 - 1
    middles = []
    for network in (model, original):
        noise = torch.Generator().manual_seed(1)
        settings = {"num_middle": 4, "steps": 3, "guidance_scale": 1.8, "generator": noise}
        middles.append(sample_middle(network, DiffusionSchedule(), *contexts, **settings))
    torch.testing.assert_close(*middles, rtol=1e-4, atol=1e-4)  # float32, in another order
    assert batches == [2] * 6


def test_the_original_training_step_leads_to_the_same_weights():
    changes = {"base_channels": 12, "size": 16, "batch_size": 2, "ema_update_after_step": 0}
    args = bench_training.training_args("demo", **changes)
    cpu = torch.device("cpu")
    step, ours = bench_training.our_step(args, cpu)
    original_step, original = bench_training.original_step(args, cpu)

    def weights(network):
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    start = weights(ours.model)
    for _ in range(3):
        step()
        original_step()
    # Adam divides by the gradient's size: where that is rounding, steps may differ.
    for a, b in ((ours.model, original.model), (ours.ema, original.ema)):
        moved = (weights(b) - start).abs().sum()
        assert (weights(a) - weights(b)).abs().sum() < 0.05 * moved


def test_counted_operations_are_those_of_the_design():
    # 239 GFLOP of 3-D convolutions; encoder, FiLM and attention come on top.
    flops = bench_training.forward_flops(bench_training.training_args("default"))
    assert 239e9 < flops < 1.03 * 239e9


def test_sampling_is_timed_from_a_checkpoint(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench_sampling.REFERENCE_SAMPLER, "steps", 2)
    flags = ["--batch_sizes", "2", "--rounds", "1", "--device", "cpu", "--out_dir", str(tmp_path)]
    assert bench_sampling.main(["--ckpt", str(ckpt), *flags]) == 0
    assert "| ours, 2 steps, guidance 1.8: 4 NFE |" in capsys.readouterr().out
    assert (tmp_path / "sampling.json").is_file()
