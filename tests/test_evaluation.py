"""The evaluation as a user runs it: numbers, stops and reruns, protocols, wrong input."""

import json
import os
import re
import shutil
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import moving_square
from test_metrics import save_small_network

from data.kinetics_video_dataset import DecodedFrames
from data.video_index import usable_videos
from diffusion.noise import SAMPLE, generator_for
from diffusion.pipeline import MiddleFramePipeline
from evaluate_video_ddpm import main
from evaluation import report
from evaluation.evaluator import Evaluator, describe_settings
from evaluation.fvd import feature_distance
from evaluation.results import CONFIDENCE, PerClipResults, estimate, read_lines, summarise
from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from utils.checkpoint import save_checkpoint
from utils.io import save_mp4
from utils.video_utils import cross_fade, frame_psnr, split_clip, to_float

pytest.importorskip("torchmetrics")


def random_network(network, **config):
    """A network's config and weights; the layers that start at zero are shaken, too."""
    torch.manual_seed(0)
    weights = network(**config).state_dict()
    weights = {name: value + 0.05 * torch.randn(value.shape) for name, value in weights.items()}
    return {"config": config, "weights": weights}


def make_checkpoint(folder, data_root, refining=False, channels=3, k=2, t=8):
    config = {"image_channels": channels, "endpoint_context": k}
    unet = {"base_channels": 12, "channel_mults": [1, 2], "temporal_attn_levels": [1]}
    network = random_network(VideoUNet3D, **config, **unet, res_blocks=1)
    clip = {"num_frames": t, "size": 16, "frame_stride": 1, "color_mode": "rgb"}
    noise = {"noise_offset": 0.0, "noise_correlation": 0.0}
    args = {"data_root": str(data_root), "cache_dir": str(folder / "cache"), "val_ratio": 0.3}
    checkpoint = {
        "step": 2,
        "ema": network["weights"],
        "model_config": network["config"],
        "predictor": random_network(FramePredictor, **config, width=8) if refining else None,
        "diffusion_config": {"timesteps": 100, "schedule": "cosine", **noise},
        "clip_config": {**clip, "color_mode": "rgb" if channels == 3 else "gray"},
        "args": {**args, "train": "diffusion", "seed": 0, "max_videos": None},
        "history": {"train": [[1, 0.5], [2, 0.4]], "epochs": []},
    }
    save_checkpoint(folder / "tiny.pt", checkpoint)
    return folder / "tiny.pt"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 7 clips, one shorter."""
    root = tmp_path_factory.mktemp("clips")
    for i in range(7):
        save_mp4(root / f"{i}.mp4", moving_square(100 + i, frames=12 if i != 4 else 9), fps=10)
    return root


@pytest.fixture
def ckpt(tmp_path, clips):
    return make_checkpoint(tmp_path, clips)


@pytest.fixture
def scored(monkeypatch):
    """The numbers of the clips that were scored, in order."""
    numbers = []
    score = Evaluator.score
    monkeypatch.setattr(Evaluator, "score", lambda self, x: numbers.extend(x) or score(self, x))
    return numbers


@pytest.fixture
def evaluate(tmp_path, clips, ckpt, monkeypatch):
    """Run the script without plots; returns metrics.json."""
    monkeypatch.setattr(report, "find_spec", lambda name: None)

    def run(*flags, out="out", checkpoint=ckpt, status=0, data=("--data_root", clips)):
        argv = [*data, "--out_dir", tmp_path / out, "--baselines", "nearest", "cross_fade"]
        argv += [] if "--split" in flags else ["--split", "all"]
        argv += ["--ckpt", checkpoint, "--steps", 2] if checkpoint else []
        try:
            # Of a flag that is given twice, the last one counts.
            result = main(list(map(str, [*argv, *flags])))
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


def test_a_run_leaves_a_table_and_a_page_and_other_settings_keep_them(
    evaluate, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "find_spec", find_spec)
    found = evaluate("--num_videos", 3)
    table = (tmp_path / "out/table.md").read_text()
    assert table in capsys.readouterr().out
    names = ["ours, 2 steps, guidance 1.8", "nearest", "cross-fade"]
    assert [row["method"] for row in found["rows"]] == found["settings"]["methods"] == names
    assert all(f"| {name}" in table for name in names) and found["clips"] == 3
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3  # the best, the median, the worst clip
    assert not re.search(r'(src|href)="(?!data:|#)|@import|url\((?!#)|<script', page)
    if find_spec("matplotlib"):
        assert page.count("<svg") == 2  # PSNR, and the curves of training

    kept = (tmp_path / "out/per_clip.jsonl").read_bytes()
    for flags in ("--steps 3", "--seed 1", "--window 1", "--protocol mcvd", "--baselines flow"):
        evaluate(*flags.split(), status=2)
        assert "pass --overwrite" in capsys.readouterr().err
    evaluate(checkpoint=None, status=2)
    assert (tmp_path / "out/per_clip.jsonl").read_bytes() == kept
    found = evaluate("--steps", 3, "--overwrite", "--num_videos", 1)
    assert found["rows"][0]["nfe"] == 6 and len(lines_of(tmp_path / "out")) == 1


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
        faded = frame_psnr(cross_fade(start, end, 4), middle)[0]
        scores = line["methods"]["cross-fade"]["samples"][0]
        assert scores["psnr_frames"] == faded.tolist()
        samples = line["methods"]["ours, 2 steps, guidance 1.8"]["samples"]
        for sample, scores in enumerate(samples):
            noise = [generator_for(5, SAMPLE, line["clip"], sample)]
            expected = frame_psnr(pipe(start, end, steps=2, generator=noise), middle)[0]
            # Other batches are rounded otherwise: now and then a pixel by one level.
            assert scores["psnr_frames"] == pytest.approx(expected.tolist(), abs=1e-2)
    mean, image, best = (row["scores"]["psnr"]["mean"] for row in rows[:3])
    assert mean < image and mean < best  # the mean image has the least squared error


@pytest.mark.parametrize("cut", [False, True])
def test_a_stopped_evaluation_goes_on_to_the_same_numbers(evaluate, clips, tmp_path, scored, cut):
    copy = shutil.copytree(clips, tmp_path / "copy")
    flags = ("--batch_size", 2, "--data_root", copy)
    evaluate(*flags, out="whole")
    add, calls = PerClipResults.add, []

    def killed(self, lines):
        calls.append(1)
        if len(calls) < 3 or cut:
            add(self, lines)
        if len(calls) == 3:
            if cut:  # in the middle of the last line
                os.truncate(self.path, self.path.stat().st_size - 20)
            raise KeyboardInterrupt

    def scored_by(*more):
        scored.clear()
        assert evaluate(*flags, *more)["clips"] == (more or [7])[-1]
        return list(scored)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PerClipResults, "add", killed)
        evaluate(*flags, status=130)
    # Of the batch that was cut, both clips are scored again.
    assert scored_by() == [4, 5, 6]
    assert lines_of(tmp_path / "out") == lines_of(tmp_path / "whole")
    # Fewer clips lose none, and one that has changed is scored again.
    assert scored_by("--num_videos", 3) == scored_by() == []
    (copy / "1.mp4").write_bytes((clips / "5.mp4").read_bytes())
    assert scored_by() == [0, 1]
    lines, before = (lines_of(tmp_path / out) for out in ("out", "whole"))
    assert [a != b for a, b in zip(lines, before, strict=True)] == [0, 1, 0, 0, 0, 0, 0]


def test_rows_are_means_over_samples_paired_by_clip_and_the_best_of_ten_and_of_all():
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 2, 5, 12))  # [method,score,clips,N]
    images = rng.normal(size=(2, 5))  # [score,clips]

    def entry(scores, image):
        samples = [{"psnr": a, "temporal_l1": b} for a, b in scores.T]
        image = {"psnr": image[0], "temporal_l1": image[1]}
        costs = {"nfe": 4, "seconds": 1.0}
        return {"samples": samples, "mean_image": image, "diversity": image["psnr"], **costs}

    lines = []
    for clip in range(5):
        ours, first = (entry(scores[:, clip], images[:, clip]) for scores in table)
        lines.append({"clip": clip, "methods": {"ours": ours, "first": first}})
    rows = summarise(lines, "ours", "first")
    kinds = [("mean", 12), ("mean image", 12), ("best", 10), ("best", 12)]
    assert [(row["kind"], row["count"]) for row in rows] == kinds
    for i, name in enumerate(("psnr", "temporal_l1")):
        best = (np.max, np.min)[i]
        ours, first = table[:, i]
        values = [ours.mean(1), images[i], best(ours[:, :10], axis=1), best(ours, axis=1)]
        assert [row["scores"][name] for row in rows] == [estimate(of_clips) for of_clips in values]
        assert rows[0]["versus_first"][name] == estimate(ours.mean(1) - first.mean(1))
    assert rows[0]["scores"]["diversity"] == estimate(images[0])
    assert not rows[1]["versus_first"] and not summarise(lines, "first", "first")[0]["versus_first"]


def test_the_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [estimate(rng.normal(3, 2, size=60)) for _ in range(400)]
    covered = sum(interval["low"] <= 3 <= interval["high"] for interval in found)
    # 95 % of 400 has a deviation of 4.4; with 60 values about 94 % are covered.
    assert abs(covered / 400 - CONFIDENCE) < 0.035
    assert estimate([5.0]) == {"mean": 5, "low": None, "high": None}
    # The resamples are always the same.
    values = rng.normal(size=60)
    assert estimate(2 * values)["low"] == pytest.approx(2 * estimate(values)["low"], rel=1e-12)


def test_steps_times_guidance_and_the_prediction_are_rows(evaluate, clips, tmp_path):
    path = make_checkpoint(tmp_path, clips, refining=True)
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


def test_fvd_is_the_distance_of_whole_clips_averaged_over_samples(evaluate, tmp_path, capsys):
    weights = save_small_network(tmp_path / "i3d.pt")
    flags = ("--fvd_weights", weights, "--T", 9, "--num_samples", 2, "--batch_size", 2)
    found = evaluate(*flags)
    lines = lines_of(tmp_path / "out")
    truth = np.array([line["features"] for line in lines])
    assert truth[0, 1:].tolist() == [3, 9, 224, 224]
    for row in found["rows"]:
        if row["kind"] == "mean":
            entries = [line["methods"][row["method"]]["features"] for line in lines]
            samples = np.array(entries).swapaxes(0, 1)
            distances = [feature_distance(sample, truth) for sample in samples]
            assert row["scores"]["fvd"]["mean"] == pytest.approx(np.mean(distances), rel=1e-9)
    evaluate("--fvd_weights", weights, out="short")
    assert "fvd is left out: it needs --T 9 or more (got 8)" in capsys.readouterr().out


def test_the_published_protocol_sets_what_it_can_and_says_what_differs(evaluate, tmp_path):
    found = evaluate("--protocol", "mcvd", "--num_videos", 3)
    settings = found["settings"]
    names = ("num_frames", "num_samples", "window")
    assert [settings[name] for name in names] == [9, 10, "random"]
    notes = " / ".join(found["notes"])
    for part in ("size is 16, not 64", "trained_frames is 8, not 9", "3 clips of"):
        assert part in notes
    assert "25.162" in (tmp_path / "out/table.md").read_text()
    evaluate("--protocol", "mcvd", "--T", 10, status=2, out="other")
    path = make_checkpoint(tmp_path, tmp_path, k=1)
    evaluate("--protocol", "mcvd", checkpoint=path, status=2, out="other")


def test_windows_are_central_or_random_by_the_seed(evaluate, tmp_path):
    def starts(out, *flags):
        evaluate(*flags, "--size", 16, out=out, checkpoint=None)
        return [line["source"]["first_frame"] for line in lines_of(tmp_path / out)]

    assert starts("central") == [2, 2, 2, 2, 0, 2, 2]
    a, b, c = (starts(out, "--window", "random", "--seed", out) for out in ("0", "00", "1"))
    assert a == b != c and len(set(a)) > 1 and max(a) <= 4 and a[4] <= 1


def test_the_split_is_that_of_training(ckpt, evaluate, tmp_path, capsys):
    names = {}
    for split in ("val", "train", "all"):
        evaluate("--split", split, out=split)
        names[split] = {line["source"]["name"] for line in lines_of(tmp_path / split)}
    assert names["val"] and not names["val"] & names["train"]
    assert names["val"] | names["train"] == names["all"]
    assert capsys.readouterr().err.count("was trained on clips of this split") == 2
    evaluate("--split", "val", data=(), out="own")
    assert lines_of(tmp_path / "own") == lines_of(tmp_path / "val")


def test_a_clip_that_cannot_be_read_is_named_and_left_out(evaluate, tmp_path):
    read = DecodedFrames.read

    def failing(self, video, wanted):
        if video.name == "2.mp4":
            raise OSError(5, "Input/output error")
        return read(self, video, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DecodedFrames, "read", failing)
        found = evaluate()
    assert found["clips"] == 6 and found["failures"] == ["2.mp4 (OSError: Input/output error)"]
    assert "2.mp4 (OSError" in (tmp_path / "out/report.html").read_text()
    assert evaluate()["clips"] == 7  # another try


WRONG = ("--window middle", "--data_root /nowhere", "--steps 2 2000", "--steps 0", "--size 18")


def test_wrong_input_is_one_line_and_writes_nothing(evaluate, tmp_path, capsys, ckpt):
    cases = [(ckpt, flags) for flags in (*WRONG, "--T 4")]
    cases += [(None, flags) for flags in ("--baselines", "--split val")]
    for checkpoint, flags in cases:
        evaluate(*flags.split(), checkpoint=checkpoint, status=2)
        err = capsys.readouterr().err
        assert flags.split()[0] in err and err.count("\n") == 1
    evaluate("--window", 40, status=2)
    evaluate(checkpoint=None, data=(), status=2)
    assert capsys.readouterr().err.count("--data_root") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("k", "t", "channels"), [(1, 4, 1), (3, 9, 3)])
def test_other_numbers_of_frames_and_colours(tmp_path, clips, evaluate, k, t, channels):
    path = make_checkpoint(tmp_path, clips, k=k, t=t, channels=channels)
    found = evaluate("--num_videos", 2, checkpoint=path)
    assert found["frames"] == list(range(k, t - k))
    assert len(found["positions"]["nearest"]) == t - 2 * k
