"""The program for a day with a GPU works before there is one: all its pieces, on a CPU, at tiny sizes."""

import contextlib
import runpy
import shutil
import sys

from conftest import words

from benchmarks import gpu_day


def test_every_piece_runs_once_and_the_summary_has_its_tables(square_videos, tmp_path, capsys, monkeypatch, quick):
    def run_here(command, log, deadline):  # as importing torch takes seconds; the test below runs processes
        monkeypatch.setattr(sys, "argv", command)
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                runpy.run_path(str(gpu_day.ROOT / command[0]), run_name="__main__")
            except SystemExit as end:
                assert not end.code, command

    monkeypatch.setattr(gpu_day, "run_command", run_here)
    out = tmp_path / "day"
    out.mkdir()
    for name in ("speed_1", "sampling_small"):  # tests of the pages run these two benchmarks
        (out / f"{name}.log").write_text("| variant | times the reference |\n")
        (out / f"{name}.done").touch()
    flags = f"--dry_run --device cpu --out_dir {out} --cache_dir {tmp_path / 'cache'} --train_root {square_videos}"
    assert gpu_day.main(words(flags)) == 0, capsys.readouterr().out
    summary = (out / "summary.md").read_text()
    assert "FAILED" not in summary
    for heading in words("check_agreement check_synchronisation smoke_bf16 speed_1 train_small score_small"):
        assert f"## {heading}\n" in summary
    assert "sampled frames, levels of 255" in summary and "times the reference" in summary
    (out / "check_agreement.done").unlink()
    shutil.rmtree(tmp_path / "cache")  # nothing but the check may run again
    capsys.readouterr()
    assert gpu_day.main(words(f"{flags} --minutes 1")) == 0
    assert capsys.readouterr().out.splitlines() == ["check_agreement", str(out / "summary.md")]


def test_what_fails_is_named_and_the_rest_runs(tmp_path, capsys, monkeypatch):
    good = gpu_day.Piece("good", [["-c", "print('| fine |')"]])
    bad = gpu_day.Piece("bad", [["-c", "raise SystemExit(3)"]])
    slow = gpu_day.Piece("slow", [["-c", "import time; time.sleep(60)"]])
    monkeypatch.setattr(gpu_day, "plan", lambda args: [bad, good, slow])
    assert gpu_day.main(words(f"--out_dir {tmp_path} --minutes 0.02")) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "ended with status 3" in printed and "the same command goes on" in printed
    assert (
        "| fine |" in (tmp_path / "summary.md").read_text() and "FAILED: bad" in (tmp_path / "summary.md").read_text()
    )
