"""README and docs: commands fit the scripts, links lead somewhere, and README's examples run."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

import sample_video_ddpm

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *DOCS)}
PROGRAMS = ("*_video_ddpm.py", "benchmarks/bench_*.py", "tools/[a-z]*.py")
SCRIPTS = [p.relative_to(ROOT).as_posix() for form in PROGRAMS for p in ROOT.glob(form)]
NAMES = {script: script.removesuffix(".py").replace("/", ".") for script in SCRIPTS}
PARSERS = {script: importlib.import_module(name).build_parser() for script, name in NAMES.items()}


def commands(text):
    """(script, arguments) of every command of the bash blocks that runs one of ours."""
    for block in re.findall(r"```bash\n(.*?)```", text, flags=re.S):
        for line in re.split(r"&&|\n", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            place = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
            if words[:1] == ["torchrun"]:
                torchrun_parser().parse_args(words[1:])
            if place is not None:
                yield words[place], words[place + 1 :]


@pytest.fixture
def folder(tmp_path, ckpt, monkeypatch):
    """The working folder, with what README's examples take; the demo's checkpoint is tiny."""
    for name in ("weights", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs/demo").mkdir(parents=True)
    shutil.copy(ckpt, tmp_path / "outputs/demo/best.pt")
    for name in ("start_0", "start_1", "end_0", "end_1"):
        iio.imwrite(tmp_path / f"{name}.png", np.arange(1800, dtype=np.uint8).reshape(20, 30, 3))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_fits_the_flags_of_its_script(page):
    for script, arguments in commands(PAGES[page]):
        PARSERS[script].parse_args(arguments)  # leaves where it does not


def test_the_first_command_of_the_readme_gives_the_figures_that_follow_it(folder, capsys):
    script, arguments = next(commands(README))
    given = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in arguments]
    assert script == "sample_video_ddpm.py" and sample_video_ddpm.main(sum(given, [])) == 0
    line = r"middle PSNR ([\d.]+) dB \(cross-fade ([\d.]+) dB\)"
    printed, said = (re.search(line, text) for text in (capsys.readouterr().out, README))
    for one, other in zip(printed.groups(), said.groups(), strict=True):
        assert float(one) == pytest.approx(float(other), abs=0.05)


def test_the_python_blocks_of_the_readme_run(folder):
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(block, scope)
    middles = [value for value in scope.values() if isinstance(value, torch.Tensor)]
    assert middles and all(middle.abs().max() <= 1 for middle in middles if middle.dim() == 5)


def test_every_flag_named_in_the_pages_exists():
    known = {"--no-deps", "--index-url", "--extra-index-url"}  # of pip
    for parser in (torchrun_parser(), *PARSERS.values()):
        assert "--help" in parser.format_help()  # which a stray % would break
        known.update(option for action in parser._actions for option in action.option_strings)
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", "".join(PAGES.values()))) <= known


def test_every_file_linked_or_named_in_the_pages_exists():
    rooms = "|".join({path.name for path in ROOT.glob("[a-z]*/")} - {"outputs"})
    names = {path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]}
    for page, text in PAGES.items():
        targets = [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
        targets += [ROOT / path for path in re.findall(rf"\b(?:{rooms})/[\w/]+\.[a-z]\w+", text)]
        assert [target for target in targets if not target.is_file()] == []
        assert set(re.findall(r"\w+\.py\b", text)) <= names
