"""Predict and refine: the change of variable, the learned predictor, its training, and what the scripts do with it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import run, tiny_checkpoint, words
from soak import same
from test_training import all_finite, last

import evaluate_video_ddpm
import sample_video_ddpm
import train_video_ddpm
from diffusion.loss import ERROR_WEIGHT, LOWEST_LOG_ERROR, SQUARED_WEIGHT, predictor_loss
from diffusion.noise import generator_for
from diffusion.pipeline import MiddleFramePipeline, make_predictor, resolve_scale
from diffusion.residual import Prediction
from models.predictor import LOG_ERROR_RANGE, FramePredictor, warp
from models.video_unet3d import VideoUNet3D
from training.optimizer import Muon, orthogonalised
from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.interpolators import load_interpolator
from utils.video_utils import cross_fade, psnr, split_clip

pytestmark = pytest.mark.usefixtures("quick")
REFINE = "--predictor learned --predictor_width 8"


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator_for(seed)) * 2 - 1


def contexts(b=2, k=2, size=16):
    return noise(b, 3, 2 * k, size, size).split(k, dim=2)


@pytest.fixture(scope="module")
def refining(tmp_path_factory, square_videos):
    """A tiny checkpoint with a learned predictor and the scale that this expects."""
    return tiny_checkpoint(tmp_path_factory.mktemp("refining"), square_videos, *words(REFINE), "--predictor_steps", "1")


# --- the change of variable -------------------------------------------------------------------------------------------


def test_the_middle_of_a_residual_is_the_middle_again_and_its_range_that_of_frames():
    middle, frames = noise(2, 3, 4, 8, 8), noise(2, 3, 4, 8, 8, seed=1)
    prediction = Prediction(frames, noise(2, 1, 4, 8, 8, seed=2).exp())
    # three float32 operations on numbers of about 1, of which the scale is at least 1/e
    torch.testing.assert_close(prediction.to_middle(prediction.to_residual(middle)), middle, rtol=0, atol=2e-6)
    for edge, bound in zip((-1.0, 1.0), prediction.residual_range, strict=True):
        torch.testing.assert_close(prediction.to_middle(bound), torch.full_like(middle, edge), rtol=0, atol=2e-6)


def test_where_the_predictor_is_sure_and_wrong_the_residual_is_cut_and_nowhere_else(refining):
    pipe = MiddleFramePipeline.from_checkpoint(refining, device="cpu")
    prediction = pipe.predict(*contexts(), 4)
    unit = 3.9 * noise(2, 3, 4, 16, 16, seed=3)  # in scales
    sure_and_wrong = torch.zeros_like(unit)
    sure_and_wrong[..., 0, 0] = 100 * unit[..., 0, 0].sign()
    residual = prediction.to_residual(prediction.to_middle(unit + sure_and_wrong))
    expected = torch.where(sure_and_wrong != 0, 4 * sure_and_wrong.sign(), unit)
    torch.testing.assert_close(residual, expected, rtol=0, atol=1e-4)  # float32 frames of about 1 in units of 0.1
    assert make_predictor("learned", 0.3, pipe.model)(*contexts(), 4).limit == math.inf  # numbers are of all pixels


def test_without_a_predictor_every_number_stays_as_it_is():
    middle = noise(2, 3, 4, 8, 8)
    nothing = make_predictor("none", 1.0, None)(*contexts(), 4)
    assert torch.equal(nothing.to_residual(middle), middle) and torch.equal(nothing.to_middle(middle), middle)
    assert nothing.residual_range == (-1, 1)


@pytest.mark.parametrize(
    ("predictor", "given", "scale"),
    [("none", None, 1.0), ("cross_fade", None, "measured"), ("learned", None, "pixel"), ("flow", 0.3, 0.3)],
)
def test_each_predictor_has_a_scale_that_suits_it(predictor, given, scale):
    assert resolve_scale(predictor, given) == scale


# --- the learned predictor --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 4, 7])
def test_an_untrained_predictor_is_the_cross_fade(m):
    start, end = contexts()
    frames, log_error = FramePredictor(width=8)(start, end, m)
    # the sigmoid of a logit and a bilinear sample at a pixel's own place round a few times
    torch.testing.assert_close(frames, cross_fade(start, end, m), rtol=0, atol=1e-5)
    assert log_error.shape == (2, 1, m, 16, 16) and log_error.eq(log_error[0, 0, 0, 0, 0]).all()


@pytest.mark.parametrize(("channels", "k", "size"), [(3, 2, 16), (1, 1, 24), (3, 3, 20)])
def test_a_predictor_takes_any_number_of_frames_and_every_weight_of_it_learns(channels, k, size):
    predictor = FramePredictor(channels, k, width=8)
    torch.nn.init.normal_(predictor.out.weight, std=0.1, generator=generator_for(1))
    start, end = noise(2, channels, 2 * k, size, size).split(k, dim=2)
    frames, log_error = predictor(start, end, 5)
    assert frames.shape == (2, channels, 5, size, size) and log_error.shape == (2, 1, 5, size, size)
    low, high = LOG_ERROR_RANGE
    assert log_error.min() >= low and log_error.max() <= high
    assert (frames[:, :, 0] - frames[:, :, 4]).abs().max() > 0.1  # each frame has its own time
    (frames.square().mean() + log_error.mean()).backward()
    assert all(weight.grad.abs().max() > 0 for weight in predictor.parameters())


def test_a_warp_moves_pixels_by_whole_and_half_displacements():
    frames = noise(1, 3, 6, 8)
    moved = warp(frames, torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8))
    torch.testing.assert_close(moved[:, :, 1:, :-2], frames[:, :, :-1, 2:], rtol=0, atol=1e-5)
    assert torch.allclose(moved[:, :, 0, :-2], frames[:, :, 0, 2:], atol=1e-5)  # beyond the edge the edge is repeated
    half = warp(frames, torch.tensor([0.5, 0.0]).view(1, 2, 1, 1).expand(1, 2, 6, 8))
    torch.testing.assert_close(half[..., :-1], (frames[..., :-1] + frames[..., 1:]) / 2, rtol=0, atol=1e-5)


def test_no_displacement_is_no_warp_whatever_autocast_would_do():
    frames = noise(1, 3, 48, 40)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(warp(frames, torch.zeros(1, 2, 48, 40)), frames, rtol=0, atol=1e-4)


def test_the_lowest_error_that_a_predictor_expects_makes_no_loss_negative():
    assert LOG_ERROR_RANGE[0] == LOWEST_LOG_ERROR
    middle = noise(1, 3, 2, 8, 8)
    sure = lambda start, end, m: (middle, torch.full((1, 1, 2, 8, 8), LOWEST_LOG_ERROR))  # noqa: E731
    assert predictor_loss(sure, None, middle, None).item() == 0


def test_the_expected_error_is_learned_as_the_width_of_a_laplace_distribution_and_moves_no_frame():
    middle = noise(2, 3, 4, 8, 8)
    frames, log_error = (middle + 0.2).requires_grad_(), torch.zeros(2, 1, 4, 8, 8, requires_grad=True)
    loss = predictor_loss(lambda start, end, m: (frames, log_error), None, middle, None)
    assert loss.shape == (2,)
    by_hand = 0.2 + SQUARED_WEIGHT * 0.04 + ERROR_WEIGHT * (0.2 - LOWEST_LOG_ERROR)
    torch.testing.assert_close(loss, torch.full((2,), by_hand))
    loss.mean().backward()
    # d/dx of |x - m| + 2 (x - m)^2: nothing of the likelihood, which reaches the log error alone: b - |error|
    torch.testing.assert_close(frames.grad * frames.numel(), torch.full_like(frames, 1 + 2 * SQUARED_WEIGHT * 0.2))
    expected = torch.full_like(log_error, ERROR_WEIGHT * (1 - 0.2))
    torch.testing.assert_close(log_error.grad * log_error.numel(), expected)
    right = torch.full_like(log_error, math.log(0.2)).requires_grad_()
    predictor_loss(lambda start, end, m: (frames.detach(), right), None, middle, None).mean().backward()
    assert right.grad.abs().max() < 1e-6


# --- the optimiser ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_values_near_one(shape):
    matrix = noise(*shape)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix) @ v.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-4  # five products of float32 matrices
    assert inner.diag().min() > 0.6 and inner.diag().max() < 1.3


def test_muon_moves_matrices_by_turned_steps_the_rest_as_adamw_does_and_nothing_where_gradients_are_not_finite():
    nets = [torch.nn.Sequential(torch.nn.Conv3d(2, 6, 3), torch.nn.GroupNorm(2, 6)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    before = nets[0][0].weight.detach().clone()
    optimizers = [Muon(nets[0], 0.1), torch.optim.AdamW(nets[1].parameters(), 0.1, fused=True)]
    for net, optimizer in zip(nets, optimizers, strict=True):
        net(noise(1, 2, 4, 5, 5)).square().sum().backward()
        optimizer.step()
    for name, weight in nets[1].named_parameters():
        assert torch.equal(weight, nets[0].get_parameter(name)) == (weight.dim() < 2)
    moved = nets[0][0].weight.detach() - (1 - 0.1 * 0.01) * before
    turned = orthogonalised(nets[0][0].weight.grad.flatten(1)).view_as(before)  # all gradients of the first step are it
    torch.testing.assert_close(moved, -0.1 * 0.2 * 54**0.5 * turned, rtol=1e-4, atol=1e-6)
    kept = {name: value.clone() for name, value in nets[0].state_dict().items()}
    momentum = optimizers[0].state[nets[0][0].weight]["momentum"].clone()
    nets[0][0].weight.grad.fill_(math.nan)
    optimizers[0].found_inf = torch.ones(())
    optimizers[0].step()
    assert all(torch.equal(value, kept[name]) for name, value in nets[0].state_dict().items())
    assert torch.equal(momentum, optimizers[0].state[nets[0][0].weight]["momentum"])


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("k", [2, 3, 5])  # before, at and after the step at which refining begins
def test_resuming_is_exact_on_either_side_of_the_predictors_end(train, optimizer, k):
    flags = f"--epochs 2 {REFINE} --predictor_steps 3 --optimizer {optimizer} --vis_every 1 --warmup_steps 1"
    straight, stopped = train("straight", flags), train("stopped", flags, stop=k)
    run(stopped, "--resume")
    a, b = last(straight), last(stopped)
    for key in words("step history best_val_loss lr_scheduler model ema optimizer diffusion_config"):
        assert same(a[key], b[key]), key


def test_the_predictor_learns_first_and_alone_and_is_then_fixed_at_its_average(train, monkeypatch):
    seen, step = [], train_video_ddpm.train_step

    def step_and_remember(state, *rest):
        step(state, *rest)
        seen.append({name: value.clone() for name, value in state.model.state_dict().items()})

    monkeypatch.setattr(train_video_ddpm, "train_step", step_and_remember)
    flags = f"--max_steps 5 {REFINE} --predictor_steps 3 --ema_decay 0.5 --ema_update_after_step 0 --warmup_steps 0"
    checkpoint = last(train("a", flags))

    def moved(i, j):
        return {name.startswith("predictor.") for name in seen[i] if not torch.equal(seen[i][name], seen[j][name])}

    assert moved(0, 1) == moved(1, 2) == {True} and moved(3, 4) == {False}
    for name, value in checkpoint["model"].items():
        if name.startswith("predictor."):
            assert torch.equal(value, checkpoint["ema"][name]) and torch.equal(value, seen[4][name])
    assert checkpoint["diffusion_config"]["predictor"] == "learned"
    assert checkpoint["diffusion_config"]["residual_scale"] == "pixel"


def test_a_trained_predictor_beats_the_cross_fade(train, capsys):
    out = train("a", f"--epochs 40 --max_steps 160 {REFINE} --predictor_steps 150 --optimizer muon --predictor_lr 1e-2")
    pipe = MiddleFramePipeline.from_checkpoint(out / "last.pt", "cpu")
    clip = next(iter(held_out(out)))
    start, middle, end = split_clip(clip, 2)
    ours, faded = pipe(start, end, steps=0), cross_fade(start, end, 4)
    assert psnr(ours, middle).mean() > psnr(faded, middle).mean() + 1


def held_out(out):
    """Clips of squares that no training saw."""
    from conftest import moving_square

    yield torch.stack([moving_square(seed, frames=8, size=16) for seed in range(100, 108)]).float() / 127.5 - 1


@pytest.mark.parametrize("flags", ["--predictor cross_fade", "--predictor cross_fade --residual_scale 0.4"])
def test_a_predictor_that_needs_no_training_is_refined_from_the_first_step(train, flags):
    checkpoint = last(train("a", f"--max_steps 2 {flags}"))
    scale = checkpoint["diffusion_config"]["residual_scale"]
    assert all_finite(checkpoint["model"])
    assert scale == 0.4 if "0.4" in flags else 0.02 < scale < 0.5


def test_a_measured_scale_is_kept_by_the_same_command_with_resume(train):
    flags = "--max_steps 3 --predictor cross_fade --residual_scale measured --predictor_steps 7"
    out = train("a", flags, stop=1)
    scale = last(out)["diffusion_config"]["residual_scale"]
    run(out, f"--resume {flags}")
    assert last(out)["step"] == 3 and last(out)["diffusion_config"]["residual_scale"] == scale


def test_a_measured_scale_is_the_deviation_of_what_the_predictor_misses(train, square_videos):
    from training.validation import measure_scale

    clips = list(held_out(None))
    parts = [split_clip(clip, 2) for clip in clips]
    missed = torch.cat([(middle - cross_fade(start, end, 4)).flatten() for start, middle, end in parts])
    model = VideoUNet3D(base_channels=4, channel_mults=(1,), res_blocks=1, temporal_attn_levels=())
    assert measure_scale(parts, "cross_fade", model) == pytest.approx(missed.square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["flow", "rife"])
def test_predictors_of_optional_packages_say_what_to_install(train, capsys, monkeypatch, name):
    monkeypatch.setattr("utils.interpolators.find_spec", lambda module: None)
    train("a", f"--max_steps 2 --predictor {name}", status=2)
    assert f"--predictor {name} cannot run here: it needs pip install" in capsys.readouterr().err


WRONG = [
    ("--residual_scale 0.3", "--residual_scale must be left out with predictor none (got 0.3)"),
    ("--predictor cross_fade --residual_scale pixel", "must be a number or measured with predictor cross_fade"),
    ("--predictor learned --residual_scale measured", "must be a number or pixel with predictor learned"),
    ("--predictor learned --predictor_steps 9 --max_steps 9", "--predictor_steps must be below the 9 steps of the run"),
    ("--predictor learned --predictor_width 9999", "--predictor_width must be an integer in [0, 4096] (got 9999)"),
    ("--predictor cross_fade --dynamic_threshold", "--dynamic_threshold must be off with --predictor"),
    ("--predictor learned --residual_scale -1", "must be a number above 0 (got -1)"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_wrong_use_is_one_line_and_status_two(train, capsys, flags, message):
    train("a", flags, status=2)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_of_a_dry_run_one_step_is_the_predictors_and_the_checkpoint_says_so(train):
    out = train("a", f"{REFINE} --dry_run")
    checkpoint = last(out / "dry_run")
    assert (checkpoint["step"], checkpoint["args"]["predictor_steps"]) == (2, 1)


def test_a_run_keeps_its_predictor(train, capsys):
    out = train("a", f"--max_steps 4 {REFINE} --predictor_steps 2", stop=3)
    for flags in ("--predictor cross_fade", "--residual_scale 0.3", "--predictor_steps 3", "--optimizer muon"):
        run(out, f"--resume {flags}", status=2)
        assert f"{flags.split()[0]} is fixed by" in capsys.readouterr().err


# --- what the scripts do with it --------------------------------------------------------------------------------------


def test_no_steps_give_the_prediction_alone_and_others_refine_it_within_the_range_of_frames(refining):
    pipe, (start, end) = MiddleFramePipeline.from_checkpoint(refining, "cpu"), contexts(1)
    with torch.no_grad():
        frames, log_error = pipe.model.predictor(start, end, 4)
    assert torch.equal(pipe(start, end, steps=0), frames.clamp(-1, 1))
    drawn = [pipe(start, end, steps=2, generator=[generator_for(seed)]) for seed in range(2)]
    assert all(middle.abs().max() <= 1 for middle in drawn) and (drawn[0] - drawn[1]).abs().max() > 0.01
    # the residual is of the scale that the predictor expects: twice its mean absolute error
    scale = 2 * log_error.exp()
    one = pipe(start, end, steps=1, clip_x0=False, generator=[generator_for(0)])
    residual = (one - frames.clamp(-1, 1)) / scale
    again = pipe(start, end, steps=1, generator=[generator_for(0)])
    torch.testing.assert_close(again, (frames.clamp(-1, 1) + scale * residual).clamp(-1, 1), rtol=0, atol=1e-5)


def test_guidance_drops_the_contexts_of_the_network_and_not_those_of_the_prediction(refining):
    pipe, (start, end) = MiddleFramePipeline.from_checkpoint(refining, "cpu"), contexts(1)
    seen, predict = [], pipe.predict
    pipe.predict = lambda *given: seen.append(given) or predict(*given)
    unguided, ignoring = (
        pipe(start, end, steps=2, guidance_scale=scale, generator=[generator_for(0)]) for scale in (1, 0)
    )
    assert all(torch.equal(given[0], start) and torch.equal(given[1], end) for given in seen) and len(seen) == 2
    assert (unguided - ignoring).abs().max() > 1e-4


def test_settings_that_do_not_fit_the_checkpoint_are_refused(refining, ckpt, tmp_path, capsys):
    for path, flags, message in (
        (ckpt, "--steps 0", "--steps must be at least 1 for a model without a predictor"),
        (refining, "--dynamic_threshold", "--dynamic_threshold must be off for a model with a predictor"),
    ):
        with pytest.raises(SystemExit) as left:
            sample_video_ddpm.main(["--ckpt", str(path), "--out_dir", str(tmp_path), *words(flags)])
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_sampling_takes_the_presets_of_a_refining_model_and_keeps_observed_frames(refining, tmp_path):
    out = tmp_path / "out"
    assert sample_video_ddpm.main(["--ckpt", str(refining), "--out_dir", str(out)]) == 0
    about = json.loads((out / "sample.json").read_text())
    assert (about["guidance_scale"], about["nfe"]) == (1.0, about["steps"])
    assert sample_video_ddpm.main(words(f"--ckpt {refining} --out_dir {tmp_path / 'none'} --steps 0")) == 0
    assert json.loads((tmp_path / "none/sample.json").read_text())["nfe"] == 0


def test_evaluation_scores_the_predictor_alone_beside_what_refines_it(refining, tmp_path, capsys):
    flags = f"--ckpt {refining} --out_dir {tmp_path} --num_videos 1 --num_samples 2 --baselines cross_fade"
    assert evaluate_video_ddpm.main(words(f"{flags} --metrics psnr static sharpness")) == 0
    rows = json.loads((tmp_path / "metrics.json").read_text())["rows"]
    alone = [row for row in rows if row["method"] == "ours, predictor alone"]
    assert len(alone) == 1 and alone[0]["nfe"] == 0 and alone[0]["samples"] == "1"
    assert rows[0]["method"].startswith("ours, ddim") and rows[0]["nfe"] > 0
    assert {"static_l1", "sharpness"} <= set(alone[0]["scores"])
    assert "sharpness" not in next(row for row in rows if row["samples"].startswith("best"))["scores"]
    text = (tmp_path / "table.md").read_text()
    assert "static error: mean |error| where the true clip" in text and "1 is as sharp" in text


def test_a_checkpoint_whose_parts_disagree_about_the_predictor_is_refused(refining, tmp_path):
    checkpoint = load_checkpoint(refining)
    checkpoint["diffusion_config"] |= {"predictor": "cross_fade", "residual_scale": 0.5}
    save_checkpoint(tmp_path / "odd.pt", checkpoint)
    with pytest.raises(ValueError, match=r"odd\.pt: its diffusion_config and its model_config disagree"):
        MiddleFramePipeline.from_checkpoint(tmp_path / "odd.pt", "cpu")
    for key, value in (("predictor", "oracle"), ("residual_scale", "pixels"), ("residual_scale", 0.0)):
        checkpoint = load_checkpoint(refining)
        checkpoint["diffusion_config"][key] = value
        save_checkpoint(tmp_path / "odd.pt", checkpoint)
        with pytest.raises(ValueError, match=rf"odd\.pt: diffusion_config\.{key} is missing or out of range"):
            load_checkpoint(tmp_path / "odd.pt")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("model_config", "predictor_width", "8"),
        ("model_config", "predictor_width", True),
        ("model_config", "predictor_width", torch.tensor(8)),
        ("diffusion_config", "predictor", None),
        ("diffusion_config", "residual_scale", "measured"),
    ],
)
def test_a_checkpoint_with_odd_values_is_refused_by_name(refining, tmp_path, part, key, value):
    checkpoint = load_checkpoint(refining)
    checkpoint[part][key] = value
    save_checkpoint(tmp_path / "odd.pt", checkpoint)
    with pytest.raises(ValueError, match=r"odd\.pt: "):
        MiddleFramePipeline.from_checkpoint(tmp_path / "odd.pt", "cpu")


def test_a_scale_that_only_the_learned_predictor_has_is_refused_with_another(ckpt, tmp_path):
    checkpoint = load_checkpoint(ckpt)
    checkpoint["diffusion_config"] |= {"predictor": "cross_fade", "residual_scale": "pixel"}
    save_checkpoint(tmp_path / "odd.pt", checkpoint)
    with pytest.raises(ValueError, match=r"odd\.pt: residual_scale must be"):
        MiddleFramePipeline.from_checkpoint(tmp_path / "odd.pt", "cpu")


@pytest.mark.parametrize("how", [{"steps": 0}, {"steps": 2}])
def test_contexts_that_do_not_fit_are_refused_before_they_are_predicted_from(refining, how):
    pipe, (start, end) = MiddleFramePipeline.from_checkpoint(refining, "cpu"), contexts(1)
    for pair, message in (
        ((start[:, :, :1], end[:, :, :1]), "start_context must be"),
        ((start[:, :1], end[:, :1]), "start_context must be"),
        ((start, end.expand(2, -1, -1, -1, -1)), "must have one shape"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(*pair, **how)
    with pytest.raises(ValueError, match="num_middle must be at least 1"):
        pipe(start, end, num_middle=0, **how)


def test_sampling_from_a_predictor_that_is_still_learning_says_so(train, tmp_path, capsys):
    out = train("a", f"--max_steps 4 {REFINE} --predictor_steps 3", stop=2)
    for steps, said in (("2", True), ("0", False)):
        capsys.readouterr()
        sample_video_ddpm.main(words(f"--ckpt {out / 'last.pt'} --out_dir {tmp_path / steps} --steps {steps}"))
        assert ("has not begun to refine" in capsys.readouterr().err) == said


def test_flow_is_clipped_to_the_range_of_frames():
    pytest.importorskip("cv2", reason="needs opencv-python-headless")
    start, end = contexts(1)
    model = VideoUNet3D(base_channels=4, channel_mults=(1,), res_blocks=1, temporal_attn_levels=())
    prediction = make_predictor("flow", 0.5, model)(start, end, 3)
    expected = load_interpolator("flow", torch.device("cpu"))(start, end, 3)
    assert np.array_equal(prediction.frames, expected.clamp(-1, 1)) and prediction.scale == 0.5
