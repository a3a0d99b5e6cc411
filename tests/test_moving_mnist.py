"""Stochastic Moving MNIST: the distribution of its clips."""

import gzip
import json
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import check_refusal
from skimage.metrics import structural_similarity

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from data.moving_mnist import (
    MovingMNIST,
    load_digits,
    move,
    open_moving_mnist,
    open_test_clips,
)


def draw_tracks(count=40000, num_frames=4):
    """Places [N,T,2] of many digits."""
    rng = np.random.default_rng(0)
    return np.stack([move(rng, num_frames) for _ in range(count)])


def is_uniform(values, expected):
    """Whether exactly the expected values occur, each about as often as any other."""
    counts = Counter(values.ravel().tolist())
    mean = values.size / len(expected)
    # Five deviations: one such test in 100,000 fails by chance, and the seed is fixed.
    near = all(abs(count - mean) < 5 * mean**0.5 for count in counts.values())
    return set(counts) == set(expected) and near


def test_digits_start_anywhere_and_move_by_up_to_four_pixels_per_axis():
    places = draw_tracks()
    assert is_uniform(places[:, 0], range(32))
    central = places[((places[:, 0] >= 4) & (places[:, 0] <= 27)).all(axis=1)]
    first = central[:, 1] - central[:, 0]
    assert is_uniform(first, range(-4, 5))
    assert (np.corrcoef(first.T)[0, 1] < 0.1).all()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("border", "inwards"), [(0, 1), (31, -1)])
def test_a_bounce_stops_at_the_border_and_draws_the_velocity_anew(axis, border, inwards):
    places = draw_tracks()
    velocity = places[:, 1] - places[:, 0]
    # Digits that start inside, and are not at the other axis' border when they bounce.
    would_be = places[:, 1] + velocity
    other = 1 - axis
    leaves = (would_be[:, axis] - border) * inwards < 0
    leaves &= (would_be[:, other] >= 4) & (would_be[:, other] <= 27)
    leaves &= (places[:, 1] > 0).all(axis=1) & (places[:, 1] < 31).all(axis=1)
    assert leaves.sum() > 200
    bounced = places[leaves]
    assert (bounced[:, 2, axis] == border).all()
    after = bounced[:, 3] - bounced[:, 2]
    assert is_uniform(after[:, axis] * inwards, range(1, 5))
    assert is_uniform(after[:, other], range(-4, 5))
    # It is drawn anew, too.
    assert abs(np.corrcoef(velocity[leaves][:, other], after[:, other])[0, 1]) < 0.1


def write_mnist(root, count=300):
    """MNIST's two files of images, packed, of constant gray pictures."""
    levels = np.arange(count) % 256
    images = np.broadcast_to(levels[:, None, None], (count, 28, 28)).astype(np.uint8)
    header = struct.pack(">4i", 2051, count, 28, 28)
    for name in ("train", "t10k"):
        with gzip.open(root / f"{name}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())


def test_test_clips_take_the_first_256_digits_and_training_takes_all(tmp_path):
    write_mnist(tmp_path)
    assert load_digits(f"smmnist:{tmp_path}", "train")[:, 5, 7].tolist() == [
        i % 256 for i in range(300)
    ]
    assert load_digits(f"smmnist:{tmp_path}", "test")[:, 5, 7].tolist() == list(range(256))


def test_a_clip_is_the_sum_of_two_digits_and_a_function_of_its_key():
    digits = torch.full((1, 32, 32), 200, dtype=torch.uint8)
    stream = MovingMNIST(digits, clips=9, num_frames=6, seed=3, repeats=False)
    clip = stream[0, 4].clip
    assert clip.shape == (1, 6, 64, 64)
    # Two squares of 200, cut at white where they overlap.
    overlap = (clip == 255).sum((0, 2, 3))
    assert set(clip.unique().tolist()) <= {0, 200, 255}
    assert ((clip == 200).sum((0, 2, 3)) + 2 * overlap == 2 * 32 * 32).all()
    assert torch.equal(clip, stream[0, 4].clip)
    assert not torch.equal(clip, stream[1, 4].clip)
    fixed = MovingMNIST(digits, clips=9, num_frames=6, seed=3, repeats=True)
    assert torch.equal(fixed[0, 4].clip, fixed[1, 4].clip)
    assert not torch.equal(fixed[0, 4].clip, fixed[0, 5].clip)


def test_digits_are_trained_on_and_scored_as_published(tmp_path, capsys):
    write_mnist(tmp_path, count=6000)
    clips = "--T 13 --endpoint_context 5 --color_mode gray --seed 3"
    model = "--base_channels 4 --channel_mults 1 --res_blocks 1 --temporal_attn_levels"
    run = f"--max_steps 1 --batch_size 2 --num_workers 0 --vis_every 0 --out_dir {tmp_path / 'run'}"
    root = f"smmnist:{tmp_path}"
    digits = [len(part.digits) for part in open_moving_mnist(root, 13, 1, 64, "gray", 3)]
    assert digits == [1000, 5000]  # held-out clips have digits of their own
    assert train_video_ddpm.main([*f"{clips} {model} {run} --data_root {root}".split()]) == 0
    score = f"--ckpt {tmp_path / 'run' / 'last.pt'} --protocol smmnist --steps 1 --num_samples 2"
    score += f" --num_videos 8 --baselines black --out_dir {tmp_path / 'scores'}"
    assert evaluate_video_ddpm.main(score.split()) == 0
    assert "MCVD" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        flags = ["--ckpt", tmp_path / "run" / "last.pt", "--out_dir", tmp_path / "samples"]
        sample_video_ddpm.main([str(flag) for flag in flags])
    check_refusal(capsys, "--data_root", "--protocol smmnist")
    with pytest.raises(SystemExit):
        evaluate_video_ddpm.main(f"{score} --split train".split())
    check_refusal(capsys, "--split", "--protocol smmnist", "got train")
    report = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert report["clips"] == 8 and report["settings"]["split"] == "test"
    # Each score from its definition: the black row of the clips themselves.
    black = next(row for row in report["rows"] if row["method"] == "black")["scores"]
    psnr, similarity = [], []
    for number in range(8):
        middle = open_test_clips(root, 13)[0, number].clip[0, 5:-5].numpy() / 255
        psnr.append(-10 * np.log10(np.square(middle).mean()))
        for frame in middle.round() * 255:
            window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
            similarity.append(structural_similarity(frame, 0 * frame, data_range=255, **window))
    assert abs(black["psnr_clip"]["mean"] - np.mean(psnr)) < 1e-6
    assert abs(black["ssim"]["mean"] - np.mean(similarity)) < 1e-6


def test_clips_of_another_form_are_refused(tmp_path, capsys):
    write_mnist(tmp_path)
    flags = f"--data_root smmnist:{tmp_path} --out_dir {tmp_path / 'run'}"
    with pytest.raises(SystemExit):
        train_video_ddpm.main(flags.split())
    check_refusal(capsys, "--data_root", "--color_mode gray")
