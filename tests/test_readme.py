"""README and docs as a user follows them: every command runs (with the sizes lowered), every flag and file exists."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import soak
import torch
from conftest import TINY_FLAGS, moving_square
from test_bair import record, write
from test_robot_pushing import can_render
from torch.distributed.run import get_args_parser as torchrun_parser

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from benchmarks import bench_loading, bench_sampling, bench_training, gpu_day
from models.video_unet3d import VideoUNet3D
from tools import bair_to_mp4, check_videos, export_weights, robot_pushing
from utils.io import save_mp4

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
BLOCKS = [block.replace("\\\n", " ") for block in re.findall(r"```bash\n(.*?)```", TEXT, flags=re.S)]
LINES = [line.strip() for block in BLOCKS for line in re.split(r"&&|\n", block)]
RUNNABLE = (train_video_ddpm, sample_video_ddpm, evaluate_video_ddpm, bench_sampling, bench_training, bench_loading)
RUNNABLE += (robot_pushing, bair_to_mp4, check_videos, export_weights)
SCRIPTS = {module.__name__.replace(".", "/") + ".py": module.build_parser() for module in RUNNABLE}


def commands():
    """(script, arguments) of every command in the pages that runs one of ours."""
    for line in LINES:
        words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", line))  # without a variable set for it
        if words[:1] == ["python"] and words[1] in SCRIPTS:
            yield words[1], words[2:]


def lowered(script, arguments, videos):
    """The same command on small clips, for two steps: later flags win."""
    few_steps = ["--max_steps", "2", "--predictor_steps", "1"]
    given_network = any(word.startswith("weights/") for word in arguments)
    few_steps += ["--size", "16", "24", "--batch_size", "2", "--num_workers", "0"] if given_network else TINY_FLAGS
    two_clips = ["--num_videos", "2", "--num_samples", "2", "--baselines", "nearest", "cross_fade"]
    few = {
        "train_video_ddpm": ["--max_steps", "3"] if "--resume" in arguments else few_steps,
        "sample_video_ddpm": ["--steps", "2"],
        "evaluate_video_ddpm": ["--steps", "2", *two_clips],
        "robot_pushing": ["--train", "1", "--test", "1"],
        "bench_sampling": ["--batch_sizes", "1", "--quality_clips", "2", "--rounds", "1"],
        "bench_training": ["--configuration", "demo", "--batch_sizes", "1", "--rounds", "1"],
        "bench_loading": ["--clips", "16", "--memory_clips", "80", "--num_workers", "1", "--rounds", "1"],
    }
    folders = ("/path/to/data_root", "sim_push/train", "sim_push/test", "droid64", "droid64/test", "bair/videos_val")
    shorter = {"30": "13"}  # the videos here have 14 frames
    arguments = [str(videos) if word in folders else shorter.get(word, word) for word in arguments]
    arguments = [path for word in arguments for path in (sorted(map(str, ROOT.glob(word))) if "*" in word else [word])]
    return [str(ROOT / script), *arguments, *few.get(Path(script).stem, [])]


def python(*words, cwd=ROOT):
    """Run Python with these arguments to its end."""
    words = [sys.executable, *map(str, words)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)


# Runs scripts as `python script arguments` does, one after another in one process, as importing torch takes seconds;
# their validation tries few pairs.
RUN_SCRIPTS = """
import json, runpy, shlex, sys
import diffusion.loss
diffusion.loss.VALIDATION_PAIRS = 8
for call in json.loads(sys.argv[1]):
    sys.argv = call
    try:
        runpy.run_path(call[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{shlex.join(call)} ended with status {end.code}")
"""


def write_ends(folder):
    """The images that the pages sample between, and the video in which they fill a gap."""
    save_mp4(folder / "in.mp4", moving_square(0, frames=24, size=32), fps=10)
    for name in ("start_0", "start_1", "end_0", "end_1"):
        iio.imwrite(folder / f"{name}.png", np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def test_every_command_of_the_pages_runs_in_order(square_videos, tmp_path):
    write_ends(tmp_path)
    for shipped in ("weights", "examples"):
        shutil.copytree(ROOT / shipped, tmp_path / shipped)
    write(tmp_path / "softmotion30_44k/test/traj_0_to_255.tfrecords", record(0))
    found = list(commands())
    counts = Counter(script for script, _ in found)
    assert set(counts) == set(SCRIPTS) and counts["train_video_ddpm.py"] == 21 and counts["evaluate_video_ddpm.py"] >= 4
    skipped = {"benchmarks/bench_training.py"}  # the test below
    skipped |= set() if can_render() else {"tools/robot_pushing.py"}  # its own test says which packages it needs
    calls = [lowered(script, arguments, square_videos) for script, arguments in found if script not in skipped]
    done = python("-c", RUN_SCRIPTS, json.dumps(calls), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    benchmarks = [f"benchmarks/{name}.json" for name in ("sampling", "loading")]
    samples = ["demo_samples/clip_000_sample_000/sample.gif", "sample_motion_ctx2/sample.mp4"]
    for made in ("demo/last.pt", *samples, "evaluation/report.html", *benchmarks):
        assert (tmp_path / "outputs" / made).is_file()
    assert (tmp_path / "bair/videos_val/traj_0_to_255_0000.mp4").is_file()


def test_every_benchmark_of_training_in_the_pages_runs(tmp_path):
    calls = [lowered(script, arguments, "") for script, arguments in commands() if script.endswith("bench_training.py")]
    done = python("-c", RUN_SCRIPTS, json.dumps(calls), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("training_demo", "first_step"):
        assert (tmp_path / f"outputs/benchmarks/{name}.json").is_file()


def test_the_commands_for_several_processes_run(square_videos, tmp_path):
    found = [shlex.split(line) for line in LINES if line.startswith("torchrun")]
    commands = [torchrun_parser().parse_args(words[1:]) for words in found]
    for command in commands:
        SCRIPTS[command.training_script].parse_args(command.training_script_args)  # flags and values are ours
    found = [words for words in found if "train_video_ddpm.py" in words]
    one, two = (command for command in commands if command.training_script == "train_video_ddpm.py")
    assert (one.nproc_per_node, two.nnodes, two.nproc_per_node) == ("4", "2", "8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"HOST:29500": f"127.0.0.1:{port}", "8": "1", "/path/to/data_root": str(square_videos)}
    words = [sys.executable, "-m", "torch.distributed.run", *(given.get(word, word) for word in found[1][1:])]
    words += [*TINY_FLAGS, "--max_steps", "2", f"--out_dir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'cache'}"]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": ENVIRONMENT}
    machines = [subprocess.Popen(words, **settings) for _ in range(2)]
    outputs = [machine.communicate(timeout=120)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    assert "2 processes, 4 clips at once" in "".join(outputs) and (tmp_path / "run" / "last.pt").is_file()


def test_the_python_example_of_the_readme_runs(ckpt, tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    shutil.copy(ckpt, tmp_path / "outputs" / "demo" / "best.pt")
    write_ends(tmp_path)
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(code, scope)
    middles = scope["middles"]
    assert middles.shape == (3, 3, 4, 16, 16) and middles.abs().max() <= 1  # [num_samples,C,M,H,W]
    assert len(iio.imread(tmp_path / "middle.gif", index=None)) == 4


def test_every_promise_names_a_test_that_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", PAGES[ROOT / "docs" / "reliability.md"]))
    assert len(named) > 10 and {name for name in named if f"def {name}(" not in tests} == set()


def test_every_flag_named_in_the_pages_exists():
    parsers = [*SCRIPTS.values(), torchrun_parser(), soak.build_parser(), gpu_day.build_parser()]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {"--variant", "--max_cpu_seconds", "--predictor_share"}  # of the ablation, at the commit that it names
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", re.sub(r"pip install .*", "", TEXT)))
    assert named - known == set()


def test_every_file_linked_or_named_in_the_pages_exists():
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith(("https://", "http://")) or (page.parent / target).is_file(), (page, target)
    sources = {path.name for pattern in ("*.py", "[a-z]*/**/*.py") for path in ROOT.glob(pattern)}
    assert set(re.findall(r"\w+\.py\b", TEXT)) - sources == set()


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 16_000
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", README))
    assert linked == {page.relative_to(ROOT).as_posix() for page in PAGES} - {"README.md"}


def test_the_parameter_count_in_the_readme_is_the_default_networks():
    with torch.device("meta"):
        count = sum(p.numel() for p in VideoUNet3D().parameters())
    assert f"{count:,} parameters" in README


def test_scripts_end_with_one_line_and_status_two_as_processes():
    for script in ("train_video_ddpm.py", "sample_video_ddpm.py", "evaluate_video_ddpm.py"):
        done = python(script, "--size", "-3")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--size" in done.stderr


def test_help_is_complete():
    done = python("-c", RUN_SCRIPTS, json.dumps([[str(ROOT / script), "--help"] for script in SCRIPTS]))
    assert done.returncode == 0, done.stderr
    pages = done.stdout.split("usage: ")[1:]
    assert len(pages) == len(SCRIPTS)
    for page, (script, parser) in zip(pages, SCRIPTS.items(), strict=True):
        assert page.startswith(Path(script).name)
        for action in parser._actions:
            assert all(option in page for option in action.option_strings), (script, action.option_strings)
            assert len(action.help) > 5, (script, action.option_strings)
