"""The simulated robot clips: the same bytes every time, and one line where they cannot be rendered."""

import os
import subprocess
import sys

import pytest

from data.video_index import prepare_videos
from tools import robot_pushing
from tools.robot_pushing import COLUMNS, check_setup, main


def can_render():
    try:
        check_setup()
    except ValueError:
        return False
    return True


needs_renderer = pytest.mark.skipif(not can_render(), reason=f"rendering {robot_pushing.SETUP}")


@needs_renderer
def test_clips_depend_on_their_seed_alone(tmp_path):
    assert main(["--out_dir", str(tmp_path / "a"), "--train", "2", "--test", "1"]) == 0
    assert main(["--out_dir", str(tmp_path / "b"), "--train", "2", "--test", "1", "--workers", "2"]) == 0
    for name in ("train/00000.mp4", "train/00001.mp4", "test/00000.mp4", "train/index.tsv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    alone, _ = robot_pushing.Scene().clip(1)  # nothing rendered before it
    assert alone.shape == (30, 64, 64, 3)
    again = robot_pushing.scene.clip(1)[0]  # after the clips above
    assert (alone == again).all()


@needs_renderer
def test_a_stopped_rendering_goes_on_and_train_and_test_are_splits(tmp_path, capsys):
    arguments = ["--out_dir", str(tmp_path / "out"), "--test", "1", "--train"]
    assert main([*arguments, "1"]) == 0
    first = tmp_path / "out/train/00000.mp4"
    before = first.stat().st_mtime_ns
    assert main([*arguments, "2"]) == 0
    assert first.stat().st_mtime_ns == before
    head, *lines = [line.split("\t") for line in (tmp_path / "out/train/index.tsv").read_text().splitlines()]
    assert head == list(COLUMNS) and [line[:2] for line in lines] == [["00000.mp4", "0"], ["00001.mp4", "1"]]
    assert (tmp_path / "out/test/index.tsv").read_text().splitlines()[1].startswith("00000.mp4\t1000000\t")
    train, test = prepare_videos(tmp_path / "out", span=30, val_ratio=0.5, seed=0, cache_dir=tmp_path / "cache")
    assert [video.name for video in train] == ["train/00000.mp4", "train/00001.mp4"]
    assert [video.name for video in test] == ["test/00000.mp4"]


def test_without_a_simulator_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(robot_pushing, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        main(["--out_dir", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "pip install metaworld==3.1.1" in err
    assert not (tmp_path / "out").exists()


def test_without_opengl_one_line_says_what_to_install(tmp_path):
    if robot_pushing.find_spec("mujoco") is None:
        pytest.skip("MuJoCo is not installed: pip install metaworld==3.1.1")
    words, environment = [sys.executable, robot_pushing.__file__], os.environ | {"MUJOCO_GL": "bogus"}
    done = subprocess.run([*words, "--out_dir", tmp_path / "out"], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "libegl1" in done.stderr
