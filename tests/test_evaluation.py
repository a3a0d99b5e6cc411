"""Evaluation as a user runs it: tables, stops and reruns, batches, protocols, wrong input."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import moving_square, tiny_checkpoint
from test_metrics import save_small_network

import evaluate_video_ddpm
from data.kinetics_video_dataset import DecodedFrames
from data.video_index import usable_videos
from evaluate_video_ddpm import main
from evaluation import report
from evaluation.metrics import Scorer
from evaluation.protocols import PROTOCOLS
from evaluation.results import CONFIDENCE, PerClipResults, estimate, read_lines, summarise
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.io import save_mp4
from utils.video_utils import cross_fade, frame_psnr, split_clip, to_float

pytest.importorskip("torchmetrics", reason="SSIM is part of every table here: pip install -r requirements-dev.txt")
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 7 clips that training never saw, one shorter."""
    root = tmp_path_factory.mktemp("unseen")
    for i in range(7):
        save_mp4(root / f"{i}.mp4", moving_square(100 + i, frames=12 if i != 4 else 9), fps=10)
    return root


@pytest.fixture
def evaluate(tmp_path, ckpt, clips):
    """Run the script on few steps; returns metrics.json without the seconds, which no two runs share."""

    def run(*flags, out="out", checkpoint=ckpt, status=0):
        argv = ["--data_root", clips, "--split", "all", "--out_dir", tmp_path / out, "--cache_dir", tmp_path / "cache"]
        argv += ["--ckpt", checkpoint] if checkpoint else []
        steps = () if "--steps" in flags or not checkpoint else ("--steps", 2)
        baselines = () if "--baselines" in flags else ("--baselines", "nearest", "cross_fade")
        try:
            result = main(list(map(str, [*argv, *steps, *baselines, *flags])))
        except SystemExit as stop:
            result = stop.code
        assert result == status
        path = tmp_path / out / "metrics.json"
        found = json.loads(path.read_text()) if path.is_file() else {"rows": []}
        return found | {"rows": [{key: row[key] for key in row if key != "seconds"} for row in found["rows"]]}

    return run


def lines_of(folder):
    """The per-clip lines without the seconds, which no two runs share."""
    lines = read_lines(folder / "per_clip.jsonl")[1:]
    for line in lines:
        for entry in line["methods"].values():
            del entry["seconds"]
    return sorted(lines, key=lambda line: line["clip"])


def test_a_run_leaves_table_numbers_and_a_page_that_loads_nothing(evaluate, tmp_path, capsys):
    found = evaluate("--num_videos", 5)
    printed = capsys.readouterr().out
    table = (tmp_path / "out/table.md").read_text()
    assert table in printed and "| cross-fade" in table and "| ours, ddim 2 steps, guidance 1.8" in table
    assert found["clips"] == 5 and [row["method"] for row in found["rows"]][1:] == ["nearest", "cross-fade"]
    assert all(found[key] for key in ("versions", "git", "device", "data_fingerprint", "rules"))
    assert len(found["settings"]["checkpoint_sha256"]) == 64
    assert found["settings"]["sampling"] == ["ddim 2 steps, guidance 1.8"]
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # the best, the median and the worst clip
    assert not re.search(r'(src|href)="(?!data:|#)|@import|url\((?!#)', page) and "<script" not in page
    for heading in ("Scores", "Clips", "Error per frame position", "Training", "Settings"):
        assert f"<h2>{heading}</h2>" in page


def test_the_numbers_are_those_of_decoded_frames_and_of_the_recorded_window(evaluate, clips, tmp_path):
    found = evaluate("--window", 2, "--num_videos", 3)
    expected = []
    for video in usable_videos(clips, 8, tmp_path / "cache", limit=3):
        start, middle, end = split_clip(to_float(DecodedFrames(16, "rgb").read(video, range(2, 10)))[None], 2)
        expected.append(frame_psnr(cross_fade(start, end, 4), middle).mean().item())
    faded = next(row for row in found["rows"] if row["method"] == "cross-fade")
    assert faded["scores"]["psnr"]["mean"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert [line["source"]["first_frame"] for line in lines_of(tmp_path / "out")] == [2, 2, 2]


def test_a_rerun_and_another_batch_size_give_the_same_scores(evaluate, tmp_path):
    for out, batch in (("a", 16), ("b", 16), ("c", 1), ("d", 3)):
        evaluate("--num_samples", 3, "--batch_size", batch, out=out)
    a, b, c, d = (lines_of(tmp_path / out) for out in "abcd")
    assert a == b
    for other in (c, d):
        for line, reference in zip(other, a, strict=True):
            for name, entry in line["methods"].items():
                for sample, wanted in zip(entry["samples"], reference["methods"][name]["samples"], strict=True):
                    # convolutions of another batch size round differently: now and then a pixel by one level
                    np.testing.assert_allclose(sample["psnr_frames"], wanted["psnr_frames"], atol=1e-3)
                    assert sample["ssim"] == pytest.approx(wanted["ssim"], abs=1e-4)


@pytest.mark.parametrize("cut", [False, True])
def test_a_stopped_evaluation_goes_on_to_the_same_numbers(evaluate, tmp_path, monkeypatch, capsys, cut):
    whole = evaluate("--batch_size", 2, out="whole")
    add, calls = PerClipResults.add, []

    def killed(self, lines, features):
        calls.append(1)
        if len(calls) < 3 or cut:
            add(self, lines, features)
        if len(calls) == 3:
            if cut:  # killed while the lines of a batch were being written: the last one is cut, not the one before
                os.truncate(self.path, self.path.stat().st_size - 20)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PerClipResults, "add", killed)
        evaluate("--batch_size", 2, status=130)
    assert len(lines_of(tmp_path / "out")) == (5 if cut else 4)
    capsys.readouterr()
    assert evaluate("--batch_size", 2)["rows"] == whole["rows"]
    assert "4 of 7 clips were scored before" in capsys.readouterr().out
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")


def test_more_clips_extend_an_evaluation_fewer_lose_none_a_changed_one_is_redone(evaluate, clips, tmp_path, capsys):
    copy = shutil.copytree(clips, tmp_path / "copy")

    def score(count, said):
        assert evaluate("--data_root", copy, "--num_videos", count, "--batch_size", 1)["clips"] == count
        assert f"{said} clips were scored before" in capsys.readouterr().out or not said
        return lines_of(tmp_path / "out")

    score(2, "")
    before = score(4, "2 of 4")
    assert score(2, "2 of 2") == before == score(4, "4 of 4")
    (copy / "1.mp4").write_bytes((clips / "5.mp4").read_bytes())
    after = score(4, "3 of 4")
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]


def test_other_settings_never_overwrite_results(evaluate, tmp_path, capsys):
    evaluate()
    kept = (tmp_path / "out/per_clip.jsonl").read_bytes()
    evaluate(checkpoint=None, status=2)
    assert "holds an evaluation with " in capsys.readouterr().err
    evaluate("--steps", 3, status=2)
    said = "sampling = ['ddim 2 steps, guidance 1.8'] (now ['ddim 3 steps, guidance 1.8'])"
    message = capsys.readouterr().err
    assert said in message and message.count("error") == 1
    assert (tmp_path / "out/per_clip.jsonl").read_bytes() == kept
    assert evaluate("--steps", 3, "--overwrite")["settings"]["sampling"] == ["ddim 3 steps, guidance 1.8"]


def test_samples_have_mean_mean_image_and_best_and_never_the_best_alone(evaluate):
    found = evaluate("--num_samples", 12, "--num_videos", 2, "--metrics", "psnr", "diversity", "temporal")
    ours = {row["samples"]: row["scores"] for row in found["rows"] if row["method"].startswith("ours")}
    assert list(ours) == ["mean of 12", "mean image of 12", "best of 10", "best of 12"]
    mean, image, ten, twelve = (scores["psnr"]["mean"] for scores in ours.values())
    assert mean < ten <= twelve
    assert mean < image  # of squared error the mean image has the least
    assert ours["best of 12"]["temporal_l1"]["mean"] <= ours["mean of 12"]["temporal_l1"]["mean"]
    assert ours["mean of 12"]["diversity"]["mean"] > 0 and "diversity" not in ours["best of 12"]


def test_every_combination_of_sampler_steps_and_guidance_is_a_row(evaluate, tmp_path):
    grid = ["--sampler", "ddim", "dpmpp_2m", "--steps", 2, 3, "--guidance_scale", 1, 2]
    found = evaluate(*grid, "--num_videos", 1, "--baselines", "--metrics", "psnr")
    first = {f"ours, ddim {steps} steps, guidance {scale}": steps * scale for steps in (2, 3) for scale in (1, 2)}
    assert [(row["method"], row["nfe"]) for row in found["rows"]][:4] == list(first.items())
    assert len(found["rows"]) == 8
    if report.find_spec("matplotlib"):
        assert (tmp_path / "out/quality_against_work.svg").is_file()


def test_fvd_covers_whole_clips_and_keeps_its_features_for_a_rerun(evaluate, tmp_path, capsys):
    weights = save_small_network(tmp_path / "i3d.pt")
    flags = ("--fvd_weights", weights, "--metrics", "psnr", "fvd", "--T", 9, "--num_samples", 2, "--batch_size", 2)
    found = evaluate(*flags)
    fvd = {row["method"]: row["scores"].get("fvd") for row in found["rows"] if row["samples"] in ("1", "mean of 2")}
    assert all(value["mean"] > 0 and value["low"] is None for value in fvd.values()) and len(fvd) == 3
    assert len(found["settings"]["fvd_sha256"]) == 64
    stored = [np.load(tmp_path / f"out/features/{i:05d}.npz") for i in range(7)]
    assert "FVD weights: i3d.pt, sha256 " in (tmp_path / "out/table.md").read_text()
    assert stored[0]["truth"].shape == (5,) and stored[0]["truth"][2] == 9
    assert evaluate(*flags)["rows"] == found["rows"]
    evaluate("--fvd_weights", weights, out="short")
    assert "fvd is left out: I3D needs clips of 9 frames or more (got --T 8)" in capsys.readouterr().out


def test_the_published_protocol_sets_what_it_can_and_says_what_differs(evaluate, capsys):
    found = evaluate("--protocol", "mcvd", "--num_videos", 3, "--metrics", "psnr", "ssim")
    settings = found["settings"]
    assert (settings["num_frames"], settings["num_samples"], settings["window"]) == (9, 10, "random")
    assert {row["best of"] for row in found["published"] if row["published, BAIR"] == "MCVD"} == {10, 100}
    said = " / ".join(found["differences"])
    parts = ("size is 16, not 64", "3 clips, not 256", "trained on clips of 8 frames", "raw frames")
    assert [part for part in (*parts, "entered from notes") if part not in said] == []
    assert "25.162" in capsys.readouterr().out
    evaluate("--protocol", "mcvd", "--T", 10, status=2, out="other")
    assert "--T must be 9 under --protocol mcvd (got 10)" in capsys.readouterr().err


def test_nine_frames_are_scored_whole_and_in_their_middle_beside_the_published_rows(evaluate, square_videos, capsys):
    flags = ("--protocol", "vidim", "--data_root", square_videos, "--num_videos", 3, "--metrics", "psnr", "ssim")
    found = evaluate(*flags, checkpoint=None)
    settings = found["settings"]
    assert (settings["num_frames"], settings["endpoint_context"], settings["window"]) == (9, 1, "central")
    assert found["frames"] == list(range(1, 8))
    for row in found["rows"]:
        assert row["scores"]["psnr_middle"]["mean"] == pytest.approx(found["positions"][row["method"]][3])
        assert {"ssim", "ssim_middle"} <= set(row["scores"])
    assert [row["FVD"] for row in found["published"]] == [116.4, 194.6]
    assert "3 clips, not 357 or 400" in found["differences"]
    evaluate("--protocol", "vidim", out="other", status=2)
    assert "--protocol vidim needs a model of --endpoint_context 1" in capsys.readouterr().err


def test_random_windows_are_recorded_and_follow_the_seed(evaluate, tmp_path):
    starts = []
    for out, seed in (("a", 0), ("b", 0), ("c", 1)):
        evaluate("--window", "random", "--seed", seed, "--metrics", "psnr", "--baselines", out=out)
        starts.append([line["source"]["first_frame"] for line in lines_of(tmp_path / out)])
    assert starts[0] == starts[1] != starts[2] and len(set(starts[0])) > 1
    assert starts[0][4] <= 1  # of 9 frames


def test_baselines_can_be_scored_without_a_checkpoint(evaluate):
    found = evaluate("--size", 16, checkpoint=None)
    assert [row["method"] for row in found["rows"]] == ["nearest", "cross-fade"]
    assert found["settings"]["num_frames"] == 8 and found["clips"] == 7


def test_the_split_is_that_of_training(ckpt, tmp_path, capsys):
    names = {}
    for split in ("val", "train", "all"):
        argv = ["--ckpt", str(ckpt), "--split", split, "--out_dir", str(tmp_path / split), "--steps", "1"]
        assert main([*argv, "--baselines", "--metrics", "psnr"]) == 0
        names[split] = {line["source"]["name"] for line in lines_of(tmp_path / split)}
    assert names["val"] and not names["val"] & names["train"] and names["val"] | names["train"] == names["all"]
    printed = capsys.readouterr()
    assert "--split all takes a whole folder" in printed.out
    assert printed.err.count("was trained on clips of this split") == 2  # train and all


def test_a_clip_that_cannot_be_read_is_named_and_left_out(evaluate, monkeypatch, tmp_path, capsys):
    read = DecodedFrames.read

    def failing(self, video, wanted):
        if video.name == "2.mp4":
            raise OSError(5, "Input/output error")
        return read(self, video, wanted)

    monkeypatch.setattr(DecodedFrames, "read", failing)
    found = evaluate()
    assert found["clips"] == 6 and found["failures"] == ["2.mp4 (OSError: Input/output error)"]
    assert "Left out, unreadable: 2.mp4" in capsys.readouterr().out
    assert "2.mp4 (OSError" in (tmp_path / "out/report.html").read_text()
    monkeypatch.setattr(DecodedFrames, "read", read)
    assert evaluate()["clips"] == 7  # another try, and it can be read


WRONG = {
    "--window middle": "--window: must be central, random or a frame number",
    "--window 40": "7 MP4 files: 0 usable",
    "--data_root /nowhere": "--data_root must be a folder",
    "--steps 2 2000": "--steps must lie in",
    "--sampler dpmpp_2m --eta 0.5": "--eta must be 0",
    "--T 4": "--T must exceed 2 * --endpoint_context so that a middle exists (got --T 4, --endpoint_context 2)",
    "--size 18": "--size must be divisible by 4",
    "--color_mode gray": "--color_mode is fixed by",
    "--metrics diversity": "--metrics: none of those asked for",
}


WRONG_WITHOUT_CKPT = {
    "--baselines": "--baselines: none of those asked for can run here",
    "--split val": "without --ckpt, --data_root must be given and --split be all",
}


def test_wrong_input_is_one_line_and_writes_nothing(evaluate, tmp_path, capsys, ckpt):
    cases = [(ckpt, *case) for case in WRONG.items()] + [(None, *case) for case in WRONG_WITHOUT_CKPT.items()]
    for checkpoint, flags, message in cases:
        evaluate(*flags.split(), checkpoint=checkpoint, status=2)
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["--out_dir", str(tmp_path / "out")])
    assert "without --ckpt, --data_root must be given" in capsys.readouterr().err


@pytest.mark.parametrize(("k", "t"), [(1, 4), (3, 9)])
def test_other_numbers_of_observed_and_generated_frames(tmp_path, square_videos, evaluate, k, t, capsys):
    path = tiny_checkpoint(tmp_path, square_videos, "--endpoint_context", str(k), "--T", str(t))
    found = evaluate("--num_videos", 2, checkpoint=path)
    assert list(found["frames"]) == list(range(k, t - k)) and len(found["positions"]["nearest"]) == t - 2 * k
    evaluate("--protocol", "mcvd", checkpoint=path, out="other", status=2)
    assert "--protocol mcvd needs a model of --endpoint_context 2" in capsys.readouterr().err


def test_baselines_of_robot_clips_are_those_of_another_implementation(evaluate, monkeypatch):
    folder = Path(__file__).parents[2] / "shared/data/sim_push"
    if not folder.is_dir():
        pytest.skip("needs the robot clips and their baselines.json in ../shared/data/sim_push")
    wanted = json.loads((folder / "baselines.json").read_text())
    flags = f"--data_root {folder}/train --num_videos 64 --window 8 --metrics psnr ssim temporal".split()
    for protocol, ssim in (("native", "ssim_rgb"), ("mcvd", "ssim_gray")):
        scorer = lambda metrics, _, device, way=PROTOCOLS[protocol]: Scorer(metrics, way, device)  # noqa: E731
        monkeypatch.setattr(evaluate_video_ddpm, "Scorer", scorer)
        for row in evaluate(*flags, checkpoint=None, out=ssim)["rows"]:
            scores = {score: value["mean"] for score, value in row["scores"].items()}
            name = row["method"].replace("-", "")  # nearest, crossfade
            assert scores["psnr"] == pytest.approx(wanted[name]["psnr_frame_mean"], abs=1e-4)
            # the published protocol does not round the cross-fade to integers
            assert scores["psnr_clip"] == pytest.approx(wanted[name]["psnr_clip_mse"], abs=1e-3)
            assert scores["ssim"] == pytest.approx(wanted[name][ssim], abs=1e-4)
            assert scores["temporal_l1"] == pytest.approx(wanted[name]["temporal_l1"], abs=1e-5)


def test_gray_checkpoints_and_those_without_history_are_evaluated(tmp_path, square_videos, evaluate):
    path = tiny_checkpoint(tmp_path, square_videos, "--color_mode", "gray")
    checkpoint = load_checkpoint(path)
    save_checkpoint(path, checkpoint | {"history": checkpoint["history"] | {"train": []}})
    assert evaluate("--num_videos", 2, checkpoint=path)["clips"] == 2
    assert "holds no history" in Path(tmp_path / "out/report.html").read_text()


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [estimate(rng.normal(3, 2, size=60)) for _ in range(400)]
    covered = sum(interval.low <= 3 <= interval.high for interval in found)
    # 95 % of 400 is 380 with a deviation of 4.4; the percentile bootstrap of 60 values covers about 94 %
    assert abs(covered / 400 - CONFIDENCE) < 0.035
    assert estimate([5.0] * 9) == (5, 5, 5)
    assert np.isnan(estimate([5.0]).low)


def test_a_summary_averages_over_samples_first_then_over_clips():
    lines = []
    for i, (a, b, value) in enumerate([(1.0, 3.0, 2.0), (5.0, 11.0, 4.0)]):
        ours = {"samples": [{"psnr": a}, {"psnr": b}], "mean_image": {"psnr": 9.0}, "nfe": 4, "seconds": 1.0}
        first = {"samples": [{"psnr": value}], "nfe": 0, "seconds": 0.0}
        lines.append({"clip": i, "methods": {"m": ours, "first": first}})
    mean, image, best = summarise(lines, "m", "first", None)
    assert mean.scores["psnr"].mean == 5 and image.scores["psnr"].mean == 9 and best.scores["psnr"].mean == 7
    assert (mean.nfe, best.samples) == (4, "best of 2")
    # per clip 0 and 4 more than the first method
    assert mean.versus_first["psnr"] == (2, 0, 4) and not best.versus_first
    assert not summarise(lines, "first", "first", None)[0].versus_first
