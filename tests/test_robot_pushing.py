"""The simulated robot clips: the same bytes from a seed, and one line where nothing can render."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tools import robot_pushing
from tools.robot_pushing import CLOSED, HIGH, LOW, OPEN, Hand


def can_render():
    """Tried in another process, as the LLVM of Mesa and that of torch's compiler may collide."""
    code = "from tools import robot_pushing; robot_pushing.check_setup()"
    command = [sys.executable, "-c", code]
    root = Path(__file__).parents[1]
    return bool(find_spec("metaworld")) and not subprocess.run(command, cwd=root).returncode


def path_of(policy, seed, places, frames=120):
    """A hand over objects that stay where they are: its places [T,3] and its fingers."""
    data = SimpleNamespace(mocap_pos=np.array([[0.1, 0.6, 0.15]]), ctrl=np.zeros(2))
    scene = SimpleNamespace(
        data=data,
        model=None,
        mujoco=SimpleNamespace(mj_step=lambda *given: None),
        places=lambda: {i: np.array(place) for i, place in places.items()},
    )
    hand = Hand(scene, policy, 0.03, np.random.default_rng(seed))
    path = []
    fingers = []
    for _ in range(frames):
        path.append(data.mocap_pos[0].copy())
        fingers.append(tuple(data.ctrl))
        hand.move()
    return np.array(path), fingers


@pytest.mark.parametrize("policy", robot_pushing.POLICIES)
@pytest.mark.parametrize("places", [{}, {3: (0.0, 0.6), 5: (0.2, 0.7)}])
def test_the_hand_stays_in_its_space_and_below_its_speed(policy, places):
    path, _ = path_of(policy, 0, places)
    assert (path >= LOW).all() and (path <= HIGH).all()
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert lengths.max() <= 0.03 + 1e-9 and lengths.mean() > 0.005


@pytest.mark.parametrize("seed", range(5))
def test_the_hand_pushes_through_an_object_and_carries_one_away(seed):
    target = np.array([0.0, 0.65])
    path, _ = path_of("push", seed, {0: target})
    away = np.linalg.norm(path[:, :2] - target, axis=1)
    low = path[:, 2] < 0.06
    beside = np.argmax(low)
    assert 0.05 < away[beside] < 0.11  # it comes down 7.5 to 8.5 cm from the object
    through = np.argmax(away < 0.02)
    assert through > beside and low[beside : through + 1].all()

    path, fingers = path_of("grasp", seed, {0: target})
    closed = fingers.index(CLOSED)
    opened = fingers.index(OPEN, closed)
    assert np.linalg.norm(path[closed] - [*target, LOW[2]]) < 0.03
    assert path[opened, 2] > 0.14 and opened > closed + 3


@pytest.mark.skipif(not can_render(), reason=robot_pushing.NEEDS)
def test_clips_depend_on_their_seed_only_and_a_stopped_run_goes_on(tmp_path):
    def render(folder, *flags):
        words = [sys.executable, robot_pushing.__file__, "--out_dir", tmp_path / folder, *flags]
        subprocess.run([*words, "--test", "1"], check=True)
        return {path.name: path.stat() for path in (tmp_path / folder / "train").iterdir()}

    first = render("one", "--train", "1")
    both = render("one", "--train", "2")
    assert both["00000.mp4"].st_mtime_ns == first["00000.mp4"].st_mtime_ns
    # Here one process renders both clips, one after the other.
    assert render("other", "--train", "2").keys() == both.keys()
    for name in ("train/00000.mp4", "train/00001.mp4", "test/00000.mp4"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_without_a_simulator_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(SystemExit) as stop:
        robot_pushing.main(["--out_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert "pip install metaworld==3.1.1" in err and not (tmp_path / "out").exists()
