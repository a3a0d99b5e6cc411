"""The machine: which device serves, and too little memory is one line that says which flag to lower."""

import pytest
import torch
from conftest import TINY_FLAGS

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from diffusion import pipeline
from diffusion.schedule import DiffusionSchedule
from utils.device import choose_amp_dtype, explain_oom, resolve_device

MPS = torch.device("mps")  # a name alone: nothing here needs one


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    return stop.value.code


def cpu_is_full(*args, **settings):
    return torch.empty(2**60)


def gpu_is_full(*args, **settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    ("shortage", "asked"), [(cpu_is_full, f"to allocate {2**62} bytes"), (gpu_is_full, "to allocate 20.00 GiB")]
)
def test_running_out_is_one_line_all_the_same(ckpt, square_videos, tmp_path, capsys, monkeypatch, shortage, asked):
    monkeypatch.setattr(pipeline, "sample_middle", shortage)
    monkeypatch.setattr(train_video_ddpm, "train_step", shortage)
    data = ["--data_root", square_videos, "--cache_dir", tmp_path]
    sampling, training = ["--ckpt", ckpt, *data], [*data, *TINY_FLAGS]
    for script, flags, remedy in (
        (sample_video_ddpm, sampling, "--batch_size, --size or --T"),
        (evaluate_video_ddpm, sampling, "--batch_size, --size or --T"),
        (train_video_ddpm, training, "--batch_size (and raise --grad_accum)"),
    ):
        assert refused(script.main, *flags, "--out_dir", tmp_path / script.__name__) == 2
        error = capsys.readouterr().err
        assert f"out of memory ({asked}); lower {remedy}" in error.strip().splitlines()[-1]
        assert script is not train_video_ddpm or error.count("\n") == 1


def test_other_errors_are_not_taken_for_a_shortage():
    with pytest.raises(RuntimeError, match="size of tensor"), explain_oom("--size"):
        torch.zeros(2) + torch.zeros(3)


@pytest.mark.parametrize(("gpus", "mps", "chosen"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")])
def test_auto_is_cuda_then_mps_then_the_cpu(monkeypatch, capsys, gpus, mps, chosen):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device("auto") == torch.device(chosen)
    assert resolve_device("mps") == (MPS if mps else torch.device("cpu"))
    assert ("--device mps: there is no MPS device here, going on with cpu" in capsys.readouterr().err) == (not mps)


def test_mps_trains_in_float32_beside_a_schedule_that_stays_in_float64_on_the_cpu():
    assert choose_amp_dtype(MPS) is None
    there, here = DiffusionSchedule(50).to(MPS), DiffusionSchedule(50)
    assert there.alpha_bar.dtype == torch.float64 and there.alpha_bar.device.type == "cpu"
    frames, t = torch.rand(2, 3, 2, 3, 4, 4), torch.tensor([0, 30, 49])
    assert torch.equal(there.add_noise(*frames, t), here.add_noise(*frames, t))
