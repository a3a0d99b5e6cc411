"""The report on a folder's videos: every finding named, nothing changed."""

import json

import pytest

from tools.check_videos import main


def test_every_unusable_file_is_named_with_its_reason_and_none_is_touched(make_mp4, tmp_path, capsys):
    good = make_mp4("good.mp4", 12)
    make_mp4("short.mp4", 5)
    (good.parent / "text.mp4").write_text("no video")
    before = {path.name: path.read_bytes() for path in good.parent.iterdir()}
    arguments = ["--data_root", str(good.parent), "--cache_dir", str(tmp_path / "cache")]
    assert main([*arguments, "--json", str(tmp_path / "found.json")]) == 0
    out = capsys.readouterr().out
    assert "short.mp4: too short: 5 of 8 frames" in out and "text.mp4: unreadable: InvalidDataError" in out
    assert "good.mp4:" not in out and "3 MP4 files, 1 usable for 8 frames" in out and "64x64 (2)" in out
    assert sorted(json.loads((tmp_path / "found.json").read_text())) == ["short.mp4", "text.mp4"]
    assert {path.name: path.read_bytes() for path in good.parent.iterdir()} == before
    assert main([*arguments, "--T", "5"]) == 0
    assert "short.mp4" not in capsys.readouterr().out


def test_a_folder_without_videos_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--data_root", str(tmp_path), "--cache_dir", str(tmp_path / "cache")])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
