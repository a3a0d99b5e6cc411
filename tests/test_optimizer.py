"""Muon against torch's own and against AdamW."""

import copy

import pytest
import torch
from torch import nn

import training.optimizer
from training.optimizer import Muon

MATRICES = ("tall.weight", "conv.weight", "twin.weight", "deep.out.weight")


def make_net():
    """Weights of every kind: tall, wide and convolution matrices, vectors, an output layer."""
    torch.manual_seed(0)
    layers = {
        "tall": nn.Linear(3, 8),
        "conv": nn.Conv3d(2, 5, 3),
        "twin": nn.Conv3d(2, 5, 3),
        "norm": nn.GroupNorm(2, 6),
        "deep": nn.ModuleDict({"out": nn.Linear(9, 4)}),
        "out": nn.Conv2d(4, 3, 1),
    }
    return nn.ModuleDict(layers)


def step(optimizer, net, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("batch_values", [2**20, 1])
def test_matrices_follow_torchs_muon_and_all_else_adamw(monkeypatch, batch_values):
    monkeypatch.setattr(training.optimizer, "BATCH_VALUES", batch_values)
    # torch orthogonalises in bfloat16; here it is to be exact.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    net = make_net()
    optimizer = Muon(net, lr=0.1)
    others = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    matrices = {name: others.pop(name).flatten(1) for name in MATRICES}
    oracles = [
        torch.optim.Muon(
            matrices.values(), lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others.values(), lr=0.1),
    ]
    expected = {**matrices, **others}
    for seed in range(5):
        step(optimizer, net, seed)
        for name, weight in net.named_parameters():
            expected[name].grad = weight.grad.reshape(expected[name].shape)
        for oracle in oracles:
            oracle.step()
    for name, weight in net.named_parameters():
        actual = weight.detach().reshape(expected[name].shape)
        torch.testing.assert_close(actual, expected[name], rtol=1e-4, atol=1e-4)


def test_where_a_number_is_not_finite_no_weight_and_no_moment_changes():
    net = make_net()
    optimizer = Muon(net, lr=0.1)
    optimizer.found_inf = torch.zeros(())
    step(optimizer, net, seed=0)
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    for parameter in net.parameters():
        parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = (net.state_dict(), optimizer.state_dict())
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    torch.testing.assert_close(after[1]["state"], before[1]["state"], rtol=0, atol=0)


def test_a_loaded_optimizer_goes_on_as_the_one_that_was_saved():
    net = make_net()
    optimizer = Muon(net, lr=0.1)
    step(optimizer, net, seed=0)
    other = copy.deepcopy(net)
    resumed = Muon(other, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(optimizer, net, seed=1)
    step(resumed, other, seed=1)
    torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)
