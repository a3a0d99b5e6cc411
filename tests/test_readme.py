"""README and docs: commands fit the scripts, links lead somewhere, and README's examples run."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {page: page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
PROGRAMS = ("*_video_ddpm.py", "benchmarks/bench_*.py", "tools/*.py")
SCRIPTS = {
    path.relative_to(ROOT).as_posix(): importlib.import_module(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
    )
    for pattern in PROGRAMS
    for path in sorted(ROOT.glob(pattern))
    if path.stem != "__init__"
}


def commands(text):
    """(script, arguments) of every command of the bash blocks that runs one of ours."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S):
        for line in re.split(r"&&|\n", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            found = [i for i, word in enumerate(words) if word.endswith(".py")]
            if found:
                launcher = [word for word in words[: found[0]] if "=" not in word]
                if launcher[0] == "torchrun":
                    torchrun_parser().parse_args(words[1:])
                yield words[found[0]], words[found[0] + 1 :]


@pytest.fixture
def folder(tmp_path, ckpt, monkeypatch):
    """The working folder, with what README's examples take; the demo's checkpoint is a tiny one."""
    for name in ("weights", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs/demo").mkdir(parents=True)
    shutil.copy(ckpt, tmp_path / "outputs/demo/best.pt")
    for name in ("start_0", "start_1", "end_0", "end_1"):
        picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        iio.imwrite(tmp_path / f"{name}.png", picture)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_fits_the_flags_of_its_script(page):
    for script, arguments in commands(PAGES[page]):
        SCRIPTS[script].build_parser().parse_args(arguments)  # or ends with status 2


def test_the_first_commands_of_the_readme_sample_what_it_says(folder, capsys):
    script, arguments = next(commands(README))
    given = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in arguments]
    assert SCRIPTS[script].main(sum(given, [])) == 0
    line = r"middle PSNR ([\d.]+) dB \(cross-fade ([\d.]+) dB\)"
    printed = re.search(line, capsys.readouterr().out)
    said = re.search(line, README)
    for one, other in zip(printed.groups(), said.groups(), strict=True):
        assert float(one) == pytest.approx(float(other), abs=0.05)


def test_the_python_blocks_of_the_readme_run(folder):
    scope = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.S):
        exec(block, scope)
    middles = [value for value in scope.values() if isinstance(value, torch.Tensor)]
    assert middles and all(middle.abs().max() <= 1 for middle in middles if middle.dim() == 5)


def test_every_flag_named_in_the_pages_exists():
    parsers = [torchrun_parser(), *(script.build_parser() for script in SCRIPTS.values())]
    known = {option for parser in parsers for a in parser._actions for option in a.option_strings}
    text = re.sub(r"(pip|apt-get) install .*", "", "\n".join(PAGES.values()))
    assert set(re.findall(r"(?<![\w-])--[a-zA-Z]\w*", text)) <= known


def test_every_file_linked_or_named_in_the_pages_exists():
    rooms = "|".join(path.name for path in ROOT.iterdir() if path.is_dir())
    names = {path.name for path in ROOT.rglob("*.py")}
    for page, text in PAGES.items():
        targets = [page.parent / link for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
        targets += [ROOT / path for path in re.findall(rf"\b(?:{rooms})/[\w/]+\.[a-z]\w+", text)]
        missing = [target for target in targets if not target.is_file()]
        assert missing == [], page
        assert set(re.findall(r"\w+\.py\b", text)) <= names


def test_the_scripts_end_wrong_input_with_one_line_and_status_two():
    for script in SCRIPTS:
        command = [sys.executable, script, "--no_such_flag"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_complete(script):
    parser = SCRIPTS[script].build_parser()
    page = parser.format_help()
    for flag in parser.flags():
        assert flag.option_strings[0] in page and len(flag.help) > 5
