"""One optimiser step: accumulation, clipping, steps that are not finite, EMA, the learning rate."""

import argparse
import itertools
import math

import pytest
import torch
from soak import same

from train_video_ddpm import build_parser, train_step
from training.metrics import TrainMetrics
from training.state import get_lr, init_state
from utils.device import choose_amp_dtype

CPU = torch.device("cpu")


def arguments(**changes):
    """The arguments of a command, by defaults."""
    return argparse.Namespace(**{**build_parser().defaults(), "processes": 1, **changes})


def test_the_learning_rate_rises_linearly_and_falls_as_half_a_cosine():
    for step in range(10):
        assert get_lr(step, 0.01, 10, 110) == pytest.approx(0.01 * (step + 1) / 10)
    for step in range(10, 111):
        expected = 0.005 * (1 + math.cos(math.pi * (step - 10) / 100))
        assert get_lr(step, 0.01, 10, 110) == pytest.approx(expected)


class Sum(torch.nn.Module):
    """A matrix and a vector of ones, whose sum has a gradient of one in each of 16 places."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.ones(3, 4))
        self.vector = torch.nn.Parameter(torch.ones(4))

    def loss(self, model, start, middle, end, generator):
        value = middle.flatten(1).mean(1)
        return value * (model.matrix.sum() + model.vector.sum())


class Steps:
    """Training steps of `Sum`, by plain SGD or as the flags say."""

    def __init__(self, sgd=True, scale=None, **changes):
        self.args = arguments(**{"lr": 0.1, "grad_clip": 0.0, "max_steps": 10**9, **changes})
        self.objective = Sum()
        self.state = init_state(self.args, self.objective, CPU, None)
        if sgd:
            self.state.optimizer = torch.optim.SGD(self.objective.parameters(), lr=1.0, fused=True)
        if scale is not None:
            self.state.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.state.plan_steps(self.args)

    def take(self, *batches):
        """A step over batches of clips, each of one value; returns a weight after it."""
        clips = [torch.tensor(batch)[:, None, None, None, None] for batch in batches]
        frames = (clip.expand(-1, 1, 12, 2, 2) for clip in clips)
        train_step(self.state, self.objective, frames, self.args, None)
        return self.state.model.matrix[0, 0].item()

    def tensors(self):
        """Copies of weights and moments."""
        weights = list(self.state.model.parameters())
        moments = [list(self.state.optimizer.state[weight].values()) for weight in weights]
        return [tensor.detach().clone() for tensor in itertools.chain(weights, *moments)]


def test_batches_that_are_accumulated_are_one_large_batch():
    one = Steps()
    several = Steps(grad_accum=3)
    # The mean is 4.
    assert one.take([1.0, 2.0, 4.0, 4.0, 5.0, 8.0]) == pytest.approx(1 - 0.1 * 4)
    assert several.take([1.0, 2.0], [4.0, 4.0], [5.0, 8.0]) == pytest.approx(1 - 0.1 * 4)
    for steps in (one, several):
        sums = steps.state.metrics.read()
        assert sums["grad_norm"] == pytest.approx(4 * 16**0.5)
        assert sums["line_loss"] == pytest.approx(4 * 16)
        assert (steps.state.step, steps.state.data_step) == (1, 1)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_unscaled_gradient_is_clipped_to_its_largest_norm(scale):
    steps = Steps(grad_clip=2.0, scale=scale)
    # 16 gradients of 4 have a norm of 16; clipped to 2 they are 0.5 each.
    assert steps.take([4.0]) == pytest.approx(1 - 0.1 * 0.5, abs=1e-6)
    assert steps.state.metrics.read()["grad_norm"] == pytest.approx(16)
    # Those of 0.4 have a norm of 1.6, and stay.
    assert steps.take([0.4]) == pytest.approx(0.95 - 0.1 * 0.4, abs=1e-6)
    # An overflow of the loss scaler skips the step.
    assert steps.take([math.inf]) == pytest.approx(0.91, abs=1e-6)
    assert steps.state.metrics.read()["skipped"] == 1


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_no_weight_and_no_moment(optimizer, bad):
    steps = Steps(sgd=False, optimizer=optimizer)
    steps.take([0.1])
    before = steps.tensors()
    steps.take([bad])
    assert same(before, steps.tensors())
    sums = steps.state.metrics.read()
    assert (sums["skipped"], sums["bad_in_row"], sums["line_steps"]) == (1, 1, 1)
    steps.take([0.1])
    assert not same(before, steps.tensors())
    assert steps.state.metrics.read()["bad_in_row"] == 0


def test_ema_copies_the_weights_at_first_and_then_decays_towards_them():
    steps = Steps(ema_decay=0.75, ema_update_after_step=2)
    expected = 0.0
    for number in range(1, 6):
        weight = steps.take([float(number)])
        expected = weight if number <= 2 else 0.75 * expected + 0.25 * weight
        for average in (steps.state.ema.matrix[0, 0], steps.state.ema.vector[0]):
            assert average.item() == pytest.approx(expected, abs=1e-6)
    assert abs(expected - weight) > 0.1


def test_metrics_count_bad_steps_and_leave_what_is_not_finite_out_of_means():
    metrics = TrainMetrics(CPU, threshold=10.0)
    for loss, norm in ((1.0, 1.0), (math.nan, 1.0), (2.0, math.inf), (50.0, 1.0), (3.0, 2.0)):
        metrics.add(torch.tensor(loss), torch.tensor(norm))
    assert metrics.bad_steps() == {"skipped_steps": 2, "diverged_steps": 1}
    assert metrics.take_mean("line") == pytest.approx((1 + 50 + 3) / 3)
    assert metrics.take_mean("line") is None
    assert metrics.take_mean("epoch") == pytest.approx((1 + 50 + 3) / 3)


@pytest.mark.parametrize("bad", [math.nan, 11.0])
def test_twenty_bad_steps_in_a_row_end_a_run_and_a_good_one_between_does_not(bad):
    metrics = TrainMetrics(CPU, threshold=10.0)
    for loss in [bad] * 19 + [10.0] + [bad] * 19:
        metrics.add(torch.tensor(loss), torch.tensor(1.0))
        metrics.read()
    metrics.add(torch.tensor(bad), torch.tensor(1.0))
    with pytest.raises(FloatingPointError):
        metrics.read()


def test_bfloat16_is_for_gpus_that_have_it(monkeypatch):
    for capability, expected in (((8, 0), torch.bfloat16), ((7, 5), torch.float16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert choose_amp_dtype(torch.device("cuda", 1)) == expected
    assert choose_amp_dtype(CPU) is None
