"""Too little memory is one line that says which flag to lower, before the work where it can be foreseen."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLAGS

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from models.video_unet3d import forward_memory
from utils import memory

ROOT = Path(__file__).parents[1]


def refused(main, *flags):
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    return stop.value.code


# Peak of one forward above what was resident before it; Linux keeps that mark and can reset it.
MEASURE = """
import sys, torch
from models.video_unet3d import build_model
from pathlib import Path
config, clips, frames, size = eval(sys.argv[1])
model = build_model(config).lay_out().eval()
x, t = torch.zeros(clips, 3, frames, size, size), torch.zeros(clips, dtype=torch.long)
context = torch.zeros(clips, 3, 2, size, size)
status = lambda name: int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) * 1024
with torch.no_grad():
    model.denoise(x[:1, :, :1], t[:1], model.encode_contexts(context[:1], context[:1]))
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    model.denoise(x, t, model.encode_contexts(context, context))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
@pytest.mark.parametrize(("clips", "frames", "size"), [(2, 4, 128), (1, 40, 64)])
def test_the_estimate_is_near_what_a_forward_takes(clips, frames, size):
    config = {
        "image_channels": 3, "base_channels": 24, "channel_mults": [1, 2], "res_blocks": 1,
        "temporal_attn_levels": [1], "endpoint_context": 2,
    }  # fmt: skip
    words = [sys.executable, "-c", MEASURE, repr((config, clips, frames, size))]
    measured = int(subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    # within half of it on either side: allocators round, and keep some of what earlier layers took
    assert 0.67 * measured < forward_memory(config, clips, frames, size) < 1.5 * measured


def test_long_or_large_clips_are_refused_before_anything_is_written(ckpt, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**30)
    for main in (sample_video_ddpm.main, evaluate_video_ddpm.main):
        for flags in (("--T", 5000), ("--size", 2048), ("--batch_size", 8000, "--num_clips", 8000)):
            if main is evaluate_video_ddpm.main:
                flags = flags[:2]
            assert refused(main, "--ckpt", ckpt, "--out_dir", tmp_path / "out", *flags) == 2
            error = capsys.readouterr().err.strip().splitlines()[-1]
            assert "GiB at once on cpu (got 1.0 GiB free); lower --batch_size, --size or --T" in error
    assert not (tmp_path / "out").exists()


def test_free_memory_is_that_of_the_machine_and_its_container(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = memory.free_memory(cpu)
    assert free is None or free > 2**20
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 60\nactive_file 40\n")
    assert memory.free_memory(cpu) in (None, 4100)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(cpu) is None or memory.free_memory(cpu) > 2**20


def test_running_out_is_one_line_all_the_same(ckpt, square_videos, tmp_path, capsys, monkeypatch):
    def cpu(*args, **settings):
        return torch.empty(2**60)

    def gpu(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    for shortage, reason in ((cpu, f"to allocate {2**62} bytes"), (gpu, "to allocate 20.00 GiB")):
        monkeypatch.setattr(sample_video_ddpm, "sample_middle", shortage)
        monkeypatch.setattr(train_video_ddpm, "optimise", shortage)
        assert refused(sample_video_ddpm.main, "--ckpt", ckpt, "--out_dir", tmp_path / shortage.__name__) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "memory ran out" in error and reason in error and "; lower --batch_size, --size or --T" in error
        flags = ["--data_root", square_videos, "--cache_dir", tmp_path, "--out_dir", tmp_path / "run", *TINY_FLAGS]
        assert refused(train_video_ddpm.main, *flags) == 2
        error = capsys.readouterr().err
        assert "memory ran out" in error and "lower --batch_size (and raise --grad_accum)" in error
        assert error.count("\n") == 1


def test_other_errors_are_not_taken_for_a_shortage():
    with pytest.raises(RuntimeError, match="size of tensor"), memory.explaining_shortage("--size"):
        torch.zeros(2) + torch.zeros(3)
