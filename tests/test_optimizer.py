"""Muon against torch's own and against AdamW."""

import copy

import pytest
import torch
from torch import nn

from models.predictor import FramePredictor
from models.video_unet3d import VideoUNet3D
from training.optimizer import Muon, orthogonalised


class Net(nn.Module):
    """Weights of every kind: tall and wide matrices, a convolution, vectors, an output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tall = nn.Linear(3, 8)
        self.wide = nn.Linear(9, 4)
        self.conv = nn.Conv3d(2, 5, 3)
        self.norm = nn.GroupNorm(2, 6)
        self.out = nn.Conv2d(4, 3, 1)


def step(optimizer, net, seed):
    """One step along random gradients, the same for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def is_matrix(name):
    return name in ("tall.weight", "wide.weight", "conv.weight")


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_an_orthogonalised_matrix_keeps_its_singular_vectors_and_has_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inner = u.T @ orthogonalised(matrix) @ v.T
    assert (inner - inner.diag().diag()).abs().max() < 1e-4
    assert inner.diag().min() > 0.6
    assert inner.diag().max() < 1.3


def test_matrices_follow_torchs_muon_and_all_else_adamw(monkeypatch):
    # torch orthogonalises in bfloat16; here it is to be exact.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    net = Net()
    optimizer = Muon(net, lr=0.1)
    expected = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    matrices = [expected[name].flatten(1) for name in expected if is_matrix(name)]
    others = [expected[name] for name in expected if not is_matrix(name)]
    settings = {"lr": 0.1, "weight_decay": 0.01, "adjust_lr_fn": "match_rms_adamw"}
    oracles = [torch.optim.Muon(matrices, **settings), torch.optim.AdamW(others, lr=0.1)]
    for seed in range(5):
        step(optimizer, net, seed)
        gradients = {name: weight.grad for name, weight in net.named_parameters()}
        turned = [gradients[name].flatten(1) for name in expected if is_matrix(name)]
        rest = [gradients[name] for name in expected if not is_matrix(name)]
        for weight, gradient in zip(matrices + others, turned + rest, strict=True):
            weight.grad = gradient
        for oracle in oracles:
            oracle.step()
    for name, weight in net.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", [FramePredictor, VideoUNet3D])
def test_the_output_layer_and_every_vector_are_left_to_adamw(network):
    with torch.device("meta"):
        model = network()
    others, matrices = Muon(model, lr=0.1).param_groups
    turned = {id(weight) for weight in matrices["params"]}
    for name, weight in model.named_parameters():
        last_layer = name in ("out.weight", "out.2.weight")
        assert (id(weight) in turned) == (weight.dim() > 1 and not last_layer), name
    assert len(others["params"]) + len(turned) == len(list(model.parameters()))


def test_where_a_number_is_not_finite_no_weight_and_no_moment_changes():
    net = Net()
    optimizer = Muon(net, lr=0.1)
    optimizer.found_inf = torch.zeros(())
    step(optimizer, net, seed=0)
    weights = copy.deepcopy(net.state_dict())
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    for parameter in net.parameters():
        parameter.grad.fill_(torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    torch.testing.assert_close(net.state_dict(), weights, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.state_dict()["state"], moments, rtol=0, atol=0)


def test_a_loaded_optimizer_goes_on_as_the_one_that_was_saved():
    net = Net()
    optimizer = Muon(net, lr=0.1)
    step(optimizer, net, seed=0)
    other = copy.deepcopy(net)
    resumed = Muon(other, lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (1, 2):
        step(optimizer, net, seed)
        step(resumed, other, seed)
    torch.testing.assert_close(other.state_dict(), net.state_dict(), rtol=0, atol=0)
