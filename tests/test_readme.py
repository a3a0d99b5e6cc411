"""The README as a user follows it: every command runs (with the sizes lowered), every flag and file it names exists."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import soak
import torch
from conftest import TINY_FLAGS
from test_bair import record, write
from test_robot_pushing import can_render
from torch.distributed.run import get_args_parser as torchrun_parser

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from benchmarks import bench_loading, bench_sampling, bench_training
from data import bair_to_mp4, check_videos, robot_pushing
from diffusion.sampler import sample_middle
from models.video_unet3d import VideoUNet3D, build_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", README, flags=re.S)]
SCRIPTS = {
    "train_video_ddpm.py": train_video_ddpm.build_parser(),
    "sample_video_ddpm.py": sample_video_ddpm.build_parser(),
    "evaluate_video_ddpm.py": evaluate_video_ddpm.build_parser(),
    "benchmarks/bench_sampling.py": bench_sampling.build_parser(),
    "benchmarks/bench_training.py": bench_training.build_parser(),
    "benchmarks/bench_loading.py": bench_loading.build_parser(),
    "data/robot_pushing.py": robot_pushing.build_parser(),
    "data/bair_to_mp4.py": bair_to_mp4.build_parser(),
    "data/check_videos.py": check_videos.build_parser(),
}


def commands():
    """(script, arguments) of every command of the README that runs one of ours."""
    for block in BLOCKS:
        for line in re.split(r"&&|\n", block):
            words = shlex.split(re.sub(r"^\s*[A-Z_]+=\S+ ", "", line))  # without a variable set for it
            if words[:1] == ["python"] and words[1] in SCRIPTS:
                yield words[1], words[2:]


def lowered(script, arguments, videos):
    """The same command on small clips, for two steps: later flags win."""
    folders = ("/path/to/data_root", "sim_push/train", "sim_push/test", "bair/videos_val")
    arguments = [str(videos) if word in folders else word for word in arguments]
    if script == "sample_video_ddpm.py":
        arguments = [word for word in arguments if word != "4"] if "--num_clips" in arguments else arguments
        arguments = [word if word != "--num_clips" else "--num_clips=1" for word in arguments]
        return [*arguments, "--steps", "2"]
    if script == "evaluate_video_ddpm.py":
        few = ["--num_videos", "2", "--num_samples", "2", "--steps", "2", "--baselines", "nearest", "cross_fade"]
        return [*arguments, *few]
    if script == "data/robot_pushing.py":
        return [*arguments, "--train", "1", "--test", "1"]
    if script.startswith("data/"):
        return arguments
    if script.startswith("benchmarks/"):
        few = {
            "sampling": ["--batch_sizes", "1", "--quality_clips", "2"],
            "training": ["--configuration", "demo", "--batch_sizes", "1"],
            "loading": ["--clips", "16", "--memory_clips", "80", "--num_workers", "1"],
        }
        return [*arguments, "--rounds", "1", *few[Path(script).stem.removeprefix("bench_")]]
    return (
        [*arguments, "--max_steps", "3"] if "--resume" in arguments else [*arguments, *TINY_FLAGS, "--max_steps", "2"]
    )


# Runs scripts as `python script arguments` does, one after another in one process, as importing torch takes seconds.
RUN_SCRIPTS = """
import json, runpy, shlex, sys
for call in json.loads(sys.argv[1]):
    sys.argv = call
    try:
        runpy.run_path(call[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{shlex.join(call)} ended with status {end.code}")
"""


def test_every_command_of_the_readme_runs_in_order(square_videos, tmp_path):
    for name in ("start_0", "start_1", "end_0", "end_1"):
        iio.imwrite(tmp_path / f"{name}.png", np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    write(tmp_path / "softmotion30_44k/test/traj_0_to_255.tfrecords", record(0))
    found = list(commands())
    counts = Counter(script for script, _ in found)
    assert set(counts) == set(SCRIPTS) and counts["train_video_ddpm.py"] == 5 and counts["evaluate_video_ddpm.py"] >= 4
    calls = [
        [str(ROOT / script), *map(str, lowered(script, arguments, square_videos))]
        for script, arguments in found
        if script != "data/robot_pushing.py" or can_render()  # optional packages: its own test says what they are
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUN_SCRIPTS, json.dumps(calls)], cwd=tmp_path, capture_output=True, text=True,
        env=quiet_environment() | {"PYTHONPATH": str(ROOT)}, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    benchmarks = [f"benchmarks/{name}.json" for name in ("sampling", "training_demo", "first_step", "loading")]
    for made in ("demo/last.pt", "sample_motion_ctx2/sample.mp4", "evaluation/report.html", *benchmarks):
        assert (tmp_path / "outputs" / made).is_file()
    assert (tmp_path / "bair/videos_val/traj_0_to_255_0000.mp4").is_file()


def test_the_commands_for_several_processes_run(square_videos, tmp_path):
    found = [shlex.split(block) for block in BLOCKS if block.startswith("torchrun")]
    one, two = (torchrun_parser().parse_args(words[1:]) for words in found)
    for command in (one, two):
        train_video_ddpm.build_parser().parse_args(command.training_script_args)  # flags and values are ours
        assert command.training_script == "train_video_ddpm.py"
    assert (one.nproc_per_node, two.nnodes, two.nproc_per_node) == ("4", "2", "8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"HOST:29500": f"127.0.0.1:{port}", "8": "1", "/path/to/data_root": str(square_videos)}
    words = [given.get(word, word) for word in found[1]]
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words[1:], *TINY_FLAGS, "--max_steps", "2"],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=quiet_environment(),
        )
        for words in ([*words, "--out_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")],) * 2
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "2 processes, 4 clips at once" in "".join(outputs) and (tmp_path / "run" / "last.pt").is_file()


def test_every_promise_names_a_test_that_exists():
    promises = README.split("## Reliability")[1].split("## ")[0]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", promises))
    assert len(named) > 10 and {name for name in named if f"def {name}(" not in tests} == set()


def quiet_environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def test_every_flag_named_in_the_readme_exists():
    parsers = [*SCRIPTS.values(), torchrun_parser(), soak.build_parser()]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    ours = re.sub(r"pip install .*", "", README)
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", ours))
    assert named - known == set()


def test_every_file_linked_from_the_readme_exists():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target.startswith(("https://", "http://")) or (ROOT / target).is_file(), target


def test_the_parameter_count_in_the_readme_is_the_default_networks():
    with torch.device("meta"):
        count = sum(p.numel() for p in VideoUNet3D().parameters())
    assert f"{count:,} parameters" in README


def test_the_python_example_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", README, flags=re.S).group(1)
    config = {"image_channels": 3, "base_channels": 12, "channel_mults": [1], "res_blocks": 1}
    model = build_model(config | {"temporal_attn_levels": [], "endpoint_context": 2})
    context = torch.zeros(1, 3, 2, 8, 8)
    scope = {"model": model, "start_context": context, "end_context": context}
    exec(code, scope)
    assert scope["middle"].shape == (1, 3, 4, 8, 8) and scope["sample_middle"] is sample_middle


def test_scripts_end_with_one_line_and_status_two_as_processes():
    for script in ("train_video_ddpm.py", "sample_video_ddpm.py", "evaluate_video_ddpm.py"):
        done = subprocess.run(
            [sys.executable, ROOT / script, "--size", "-3"], capture_output=True, text=True, env=quiet_environment()
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--size" in done.stderr


def test_help_is_complete():
    calls = [[str(ROOT / script), "--help"] for script in SCRIPTS]
    done = subprocess.run(
        [sys.executable, "-c", RUN_SCRIPTS, json.dumps(calls)], cwd=ROOT, capture_output=True, text=True,
        env=quiet_environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("usage: ")[1:]
    assert len(pages) == len(SCRIPTS)
    for page, (script, parser) in zip(pages, SCRIPTS.items(), strict=True):
        assert page.startswith(Path(script).name)
        for action in parser._actions:
            assert all(option in page for option in action.option_strings), (script, action.option_strings)
