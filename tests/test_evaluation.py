"""The evaluation as a user runs it: numbers, stops and reruns, protocols, wrong input."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
from conftest import moving_square, tiny_checkpoint, words
from test_metrics import save_small_network

import evaluate_video_ddpm
from data.kinetics_video_dataset import DecodedFrames
from data.video_index import usable_videos
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from evaluation import metrics
from evaluation.evaluator import Evaluator, describe_settings
from evaluation.fvd import feature_distance
from evaluation.results import CONFIDENCE, estimate, read_lines, summarise
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.io import file_sha256, read_image, save_mp4
from utils.video_utils import cross_fade, frame_psnr, split_clip, to_float

pytest.importorskip("torchmetrics")


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 7 clips, one shorter."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(7):
        save_mp4(root / f"{i}.mp4", moving_square(100 + i, frames=12 if i != 4 else 9), fps=10)
    return root


@pytest.fixture
def scored(monkeypatch):
    """The numbers of the clips that were scored, in order."""
    numbers, score = [], Evaluator.score
    monkeypatch.setattr(Evaluator, "score", lambda self, x: numbers.extend(x) or score(self, x))
    return numbers


@pytest.fixture
def evaluate(tmp_path, clips, ckpt, monkeypatch):
    """Run the script without what is slow; returns metrics.json."""
    monkeypatch.setattr(evaluate_video_ddpm, "describe_machine", lambda device: {})

    def run(*flags, out="out", checkpoint=ckpt, status=0, data=("--data_root", clips)):
        argv = ["--out_dir", tmp_path / out, *words("--split all --baselines nearest cross_fade")]
        argv += data
        argv += ["--ckpt", checkpoint, "--steps", 2] if checkpoint else []
        try:
            # Of a flag that is given twice, the last one counts.
            result = evaluate_video_ddpm.main(list(map(str, [*argv, *flags])))
        except SystemExit as stop:
            result = stop.code
        assert result == status
        return None if status else json.loads((tmp_path / out / "metrics.json").read_text())

    return run


def lines_of(folder):
    """The lines of clips without the seconds."""
    lines = read_lines(folder / "per_clip.jsonl")[1:]
    for line in lines:
        for entry in line["methods"].values():
            del entry["seconds"]
    return lines


def test_table_and_sheet_are_whole_and_kept(evaluate, tmp_path, capsys):
    found = evaluate("--num_videos", 3)
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out
    names = ["ours, 2 steps, guidance 1.8", "nearest", "cross-fade"]
    assert [row["method"] for row in found["rows"]] == found["settings"]["methods"] == names
    assert all(name in table for name in names) and found["clips"] == 3
    # Three clips, each as truth, sample and cross-fade, in frames of 96 pixels with borders.
    assert read_image(tmp_path / "out/clips.png").shape == (3, 9 * 102, 8 * 102)
    kept = (tmp_path / "out/per_clip.jsonl").read_bytes()
    for flags in ("--steps 3", "--seed 1", "--window 1", "--protocol mcvd", "--baselines flow"):
        evaluate(*flags.split(), status=2)
        assert "pass --overwrite" in capsys.readouterr().err
    evaluate(checkpoint=None, status=2)
    assert (tmp_path / "out/per_clip.jsonl").read_bytes() == kept
    evaluate("--overwrite", "--num_videos", 1)
    assert len(lines_of(tmp_path / "out")) == 1


def test_scores_are_of_decoded_frames_and_of_noise_by_sample(evaluate, clips, ckpt, tmp_path):
    flags = ("--window", 2, "--num_videos", 3, "--num_samples", 2, "--seed", 5, "--batch_size", 4)
    rows = evaluate(*flags)["rows"]
    pipe = MiddleFramePipeline.from_checkpoint(ckpt, "cpu")
    videos = usable_videos(clips, 8, 3, tmp_path / "cache")
    for line in lines_of(tmp_path / "out"):
        video = videos[line["clip"]]
        assert line["source"]["first_frame"] == 2 and line["source"]["name"] == video.name
        clip = to_float(DecodedFrames(16, "rgb").read(video, range(2, 10)))[None]
        start, middle, end = split_clip(clip, 2)
        faded = frame_psnr(cross_fade(start, end, 4), middle)[0].tolist()
        assert line["methods"]["cross-fade"]["samples"][0]["psnr_frames"] == faded
        samples = line["methods"]["ours, 2 steps, guidance 1.8"]["samples"]
        for sample, scores in enumerate(samples):
            noise = [generator_for(5, SAMPLE, line["clip"], sample)]
            expected = frame_psnr(pipe(start, end, steps=2, generator=noise), middle)[0]
            # Other batches are rounded otherwise: now and then a pixel by one level.
            assert scores["psnr_frames"] == pytest.approx(expected.tolist(), abs=1e-2)
    mean, image, best = (row["scores"]["psnr"]["mean"] for row in rows[:3])
    assert mean < image and mean < best  # the mean image has the least squared error


def test_a_stopped_evaluation_goes_on_to_the_same_numbers(evaluate, clips, tmp_path, scored):
    copy = shutil.copytree(clips, tmp_path / "copy")
    flags = ("--batch_size", 2, "--data_root", copy)
    read = Evaluator.read

    def killed(self, number, source):
        if number == 5:
            raise KeyboardInterrupt
        return read(self, number, source)

    def scored_by(*more, out="out"):
        scored.clear()
        assert evaluate(*flags, *more, out=out)["clips"] == (more or [7])[-1]
        return scored[:]

    assert scored_by(out="whole") == list(range(7))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "read", killed)
        evaluate(*flags, status=130)
    # Killed while it was writing a line, of whose batch both clips are scored again.
    path = tmp_path / "out/per_clip.jsonl"
    os.truncate(path, path.stat().st_size - 20)
    assert len(lines_of(tmp_path / "out")) == 3
    assert scored_by() == [2, 3, 4, 5, 6]
    whole = lines_of(tmp_path / "whole")
    assert lines_of(tmp_path / "out") == whole
    # Fewer clips lose none, and one that has changed is scored again.
    assert scored_by("--num_videos", 3) == scored_by() == []
    (copy / "1.mp4").write_bytes((clips / "5.mp4").read_bytes())
    assert scored_by() == [0, 1]
    changed = [a != b for a, b in zip(lines_of(tmp_path / "out"), whole, strict=True)]
    assert changed == [False, True, *[False] * 5]


def test_rows_are_means_over_samples_paired_by_clip_and_the_best_of_ten_and_of_all():
    rng = np.random.default_rng(0)
    names = ("psnr", "temporal_l1")
    table = rng.normal(size=(2, 2, 5, 12))  # [method,score,clips,N]
    images = rng.uniform(1, 2, size=(2, 5))  # [score,clips]
    lines = [{"clip": clip, "methods": {}} for clip in range(5)]
    for method, scores in zip(("ours", "first"), table, strict=True):
        for line, of_clip, image in zip(lines, scores.swapaxes(0, 1), images.T, strict=True):
            line["methods"][method] = {
                "samples": [
                    {"psnr": a, "temporal_l1": b, "psnr_frames": [a, b]} for a, b in of_clip.T
                ],
                "mean_image": dict(zip(names, image, strict=True)),
                "spread": {
                    "diversity": image[0],
                    "error": image[1],
                    "diversity_blurred": 2.0,
                    "error_blurred": 8.0,
                },
                "nfe": 4,
                "seconds": 1.0,
            }
    rows = summarise(lines, "ours", "first")
    kinds = [("mean", 12), ("mean image", 12), ("best", 10), ("best", 12)]
    assert [(row["kind"], row["count"]) for row in rows] == kinds
    for i, best in enumerate((np.max, np.min)):
        ours, first = table[:, i]
        values = [ours.mean(1), images[i], best(ours[:, :10], axis=1), best(ours, axis=1)]
        assert [row["scores"][names[i]] for row in rows] == [estimate(of_row) for of_row in values]
        assert rows[0]["versus_first"][names[i]] == estimate(ours.mean(1) - first.mean(1))
    assert rows[0]["psnr_frames"] == pytest.approx(table[0].mean((1, 2)).tolist())
    assert rows[0]["scores"]["diversity"] == estimate(images[0])
    assert rows[0]["scores"]["calibration_blurred"]["mean"] == 0.25
    assert not rows[1]["versus_first"] and not summarise(lines, "first", "first")[0]["versus_first"]


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    values = rng.normal(3, 2, size=(400, 60))
    found = [estimate(of_clips) for of_clips in values]
    covered = sum(interval["low"] <= 3 <= interval["high"] for interval in found)
    # 95 % of 400 has a deviation of 4.4; with 60 values about 94 % are covered.
    assert abs(covered / 400 - CONFIDENCE) < 0.035
    assert estimate([5.0]) == {"mean": 5, "low": None, "high": None}
    assert found[0] == estimate(values[0])  # of the same resamples


def test_steps_times_guidance_and_the_prediction_are_rows(evaluate, ckpt, tmp_path):
    # The checkpoint, with an untrained predictor to refine around.
    config = {"image_channels": 3, "endpoint_context": 2, "width": 4}
    predictor = {"config": config, "weights": FramePredictor(**config).state_dict()}
    path = tmp_path / "refining.pt"
    stored = load_checkpoint(ckpt)
    guided = {**stored["model_config"], "guide_channels": 10}
    refining = {"model_config": guided, "ema": VideoUNet3D(**guided).state_dict()}
    save_checkpoint(path, {**stored, **refining, "predictor": predictor})
    flags = ("--num_videos", 1, "--baselines", "--num_samples", 2)
    found = evaluate("--steps", 2, 3, "--guidance_scale", 1, 2, *flags, checkpoint=path)
    rows = [(row["method"], row["nfe"], row["count"]) for row in found["rows"]]
    words = "ours, {} steps, quadratic, guidance {}"
    grid = [(2, 1), (2, 2), (3, 1), (3, 2)]
    expected = [(words.format(steps, scale), steps * scale, 2) for steps, scale in grid]
    assert rows[::3] == [*expected, ("ours, predictor", 0, 1)]
    found = evaluate("--steps", 0, *flags, checkpoint=path, out="other")
    assert [row["method"] for row in found["rows"]] == ["ours, predictor"]
    more = {"steps": 5, "spacing": "quadratic", "guidance_scale": 1.8, "eta": 0.5}
    words = "5 steps, quadratic, guidance 1.8 in [0.3, 0.9], eta 0.5"
    assert describe_settings({**more, "guidance_interval": (0.3, 0.9)}) == words


def test_fvd_is_the_distance_of_whole_clips_averaged_over_samples(evaluate, tmp_path):
    weights = save_small_network(tmp_path / "i3d.pt")
    flags = ("--fvd_weights", weights, "--T", 9, "--num_samples", 2, "--batch_size", 2)
    found = evaluate(*flags)
    lines = lines_of(tmp_path / "out")
    truth = np.array([line["features"] for line in lines])
    for row in found["rows"]:
        if row["kind"] == "mean":
            entries = [line["methods"][row["method"]]["features"] for line in lines]
            samples = np.array(entries).swapaxes(0, 1)
            distances = [feature_distance(sample, truth) for sample in samples]
            assert row["scores"]["fvd"]["mean"] == pytest.approx(np.mean(distances), rel=1e-9)


def test_the_published_protocol_says_what_differs(evaluate, square_videos, tmp_path):
    found = evaluate("--protocol", "mcvd", "--num_videos", 3)
    names = ("num_frames", "num_samples", "window")
    assert [found["settings"][name] for name in names] == [9, 10, "random"]
    table = (tmp_path / "out/table.md").read_text()
    for part in ("25.162", "size is 16, not 64", "trained_frames is 8, not 9", "3 clips"):
        assert part in table
    evaluate("--protocol", "mcvd", "--T", 10, status=2, out="other")
    path = tiny_checkpoint(
        tmp_path, square_videos, *words("--endpoint_context 1 --color_mode gray")
    )
    evaluate("--protocol", "mcvd", checkpoint=path, status=2, out="other")
    rows = evaluate("--num_videos", 2, checkpoint=path, out="gray")["rows"]
    assert [len(row["psnr_frames"]) for row in rows] == [6, 6, 6]


def test_windows_are_central_or_random_by_the_seed(evaluate, tmp_path):
    def starts(out, *flags):
        evaluate(*flags, "--size", 16, out=out, checkpoint=None)
        return [line["source"]["first_frame"] for line in lines_of(tmp_path / out)]

    assert starts("central") == [2, 2, 2, 2, 0, 2, 2]
    a, b, c = (starts(out, "--window", "random", "--seed", out) for out in ("0", "00", "1"))
    assert a == b != c and len(set(a)) > 1 and max(a) <= 4 and a[4] <= 1


def test_the_split_is_that_of_training(evaluate, square_videos, tmp_path, capsys):
    names = {}
    for split in ("val", "train", "all"):
        evaluate("--split", split, out=split, data=("--data_root", square_videos))
        names[split] = {line["source"]["name"] for line in lines_of(tmp_path / split)}
    assert names["val"] and not names["val"] & names["train"]
    assert names["val"] | names["train"] == names["all"]
    assert capsys.readouterr().err.count("was trained on clips of this split") == 2
    evaluate("--split", "val", data=(), out="own")
    assert lines_of(tmp_path / "own") == lines_of(tmp_path / "val")


def test_a_clip_that_cannot_be_read_is_named_and_left_out(evaluate, tmp_path):
    read = Evaluator.read

    def failing(self, number, source):
        if number == 2:
            raise OSError(5, "Input/output error")
        return read(self, number, source)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluator, "read", failing)
        found = evaluate("--batch_size", 1)
    assert found["clips"] == 6 and found["failures"] == ["2.mp4 (OSError: Input/output error)"]
    assert "2.mp4 (OSError" in (tmp_path / "out/table.md").read_text()
    assert evaluate()["clips"] == 7  # another try


def test_what_cannot_be_had_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def left_out(flags="--fvd_weights PT --num_samples 2", size=64, t=9):
        args = evaluate_video_ddpm.build_parser().parse_args(words(f"{flags} --baselines flow"))
        found = evaluate_video_ddpm.find_missing(args, {"size": size, "num_frames": t})
        return set(found).difference(["flow", "rife", "st_lpips"])

    assert left_out(size=11) == {"lpips"}
    assert left_out(size=[64, 10], t=8) == {"lpips", "ssim", "fvd"}
    assert left_out("--num_samples 1") == {"lpips", "fvd"}
    metrics.alexnet_path().parent.mkdir(parents=True)
    metrics.alexnet_path().write_bytes(b"damaged")
    assert left_out() == {"lpips"}
    monkeypatch.setattr(metrics, "ALEXNET_SHA256", file_sha256(metrics.alexnet_path())[:8])
    assert left_out() == set()
    # Installed but broken counts as absent.
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert left_out() == {"ssim", "lpips"}


def test_wrong_input_is_one_line_and_writes_nothing(evaluate, tmp_path, capsys, ckpt):
    with_ckpt = "--steps 2 2000;--steps 0;--size 18;--T 4;--fvd_weights /nowhere --T 9"
    without = "--data_root /nowhere;--window middle;--baselines;--split val"
    cases = [(ckpt, flags) for flags in with_ckpt.split(";")]
    cases += [(None, flags) for flags in without.split(";")]
    for checkpoint, flags in cases:
        evaluate(*flags.split(), checkpoint=checkpoint, status=2)
        err = capsys.readouterr().err
        assert flags.split()[0] in err and err.count("\n") == 1
    evaluate("--window", 40, status=2)
    evaluate(checkpoint=None, data=(), status=2)
    assert capsys.readouterr().err.count("--data_root") == 2
    assert not (tmp_path / "out").exists()
