"""The simulated robot clips: the same bytes from a seed, and how the hand moves."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tools import robot_pushing
from tools.robot_pushing import HIGH, LOW, Hand


def can_render():
    """Tried in another process, as the LLVM of Mesa and that of torch's compiler collide."""
    command = [sys.executable, "-c", "from tools import robot_pushing as r; r.check_setup()"]
    root = Path(__file__).parents[1]
    return bool(find_spec("metaworld")) and not subprocess.run(command, cwd=root).returncode


def path_of(policy, places, seed=0):
    """Where a hand moves over objects that stay where they are, [T,3] in metres."""
    data = SimpleNamespace(mocap_pos=np.array([[0.1, 0.6, 0.15]]), ctrl=np.zeros(2))
    physics = SimpleNamespace(mj_step=lambda *given: None)
    scene = SimpleNamespace(data=data, model=None, mujoco=physics, places=lambda: places)
    hand = Hand(scene, policy, 0.03, np.random.default_rng(seed))
    path = []
    for _ in range(120):
        hand.move()
        path.append(data.mocap_pos[0].copy())
    return np.array(path)


@pytest.mark.parametrize("policy", robot_pushing.POLICIES)
@pytest.mark.parametrize("places", [{}, {0: np.array([0.0, 0.6]), 1: np.array([0.2, 0.7])}])
def test_the_hand_stays_in_its_space_and_below_its_speed(policy, places):
    path = path_of(policy, places)
    assert (path >= LOW).all() and (path <= HIGH).all()
    lengths = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert lengths.max() <= 0.03 + 1e-9 and lengths.mean() > 0.005


@pytest.mark.parametrize("seed", range(5))
def test_the_hand_goes_down_beside_an_object_and_pushes_through_it(seed):
    place = np.array([0.0, 0.65])
    path = path_of("push", {0: place}, seed)
    away = np.linalg.norm(path[:, :2] - place, axis=1)
    beside = np.argmax(path[:, 2] < 0.06)
    through = np.argmax(away < 0.02)
    assert 0.05 < away[beside] < 0.11  # 7.5 to 8.5 cm, and the noise of a step
    assert through > beside and path[beside:through, 2].max() < 0.06


@pytest.mark.skipif(not can_render(), reason=robot_pushing.NEEDS)
def test_clips_depend_on_their_seed_only_and_a_stopped_run_goes_on(tmp_path):
    def render(folder, count):
        command = [sys.executable, robot_pushing.__file__, "--out_dir", tmp_path / folder]
        subprocess.run([*command, "--train", count, "--test", "1"], check=True)
        clips = sorted((tmp_path / folder).rglob("*.mp4"))
        return [(path.read_bytes(), path.stat().st_mtime_ns) for path in clips]

    before = render("one", "1")
    one = render("one", "2")
    assert [one[0], one[1]] == before
    # Here one process renders all clips, one after the other.
    other = render("other", "2")
    assert len(one) == 3 and [clip for clip, _ in one] == [clip for clip, _ in other]
