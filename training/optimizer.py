"""Muon: an optimiser for the matrices of a network, with AdamW for the rest of it."""

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Coefficients of a quintic that moves singular values towards 1 in a few steps.
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# RMS of an update's entries per unit of learning rate; it is AdamW's, so that one rate fits both.
UPDATE_RMS = 0.2


class Muon(torch.optim.AdamW):
    """AdamW whose matrices, convolutions among them, follow their orthogonalised momentum instead.

    A convolution's weight counts as the matrix [C_out, C_in * kernel]; torch.optim.Muon takes no
    convolutions. Heeds `found_inf` as fused AdamW does: where it is 1, nothing changes.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of updates is
        that of Liu et al. 2025, arXiv:2502.16982, eq. 4.
    """

    def __init__(self, model: nn.Module, lr: float):
        matrices = []
        others = []
        for name, parameter in model.named_parameters():
            # The last layer makes pixels and starts at zero, where there is nothing to turn.
            is_matrix = parameter.dim() >= 2 and not name.startswith("out.")
            (matrices if is_matrix else others).append(parameter)
        groups = [
            {"params": others},
            {"params": matrices, "betas": (MOMENTUM, 0.0)},
        ]
        super().__init__(groups, lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        others, matrices = self.param_groups
        self.param_groups = [others]  # all that AdamW is to see
        super().step()
        self.param_groups = [others, matrices]
        for weight in matrices["params"]:
            if weight.grad is not None:
                self._turn(weight, matrices)

    def _turn(self, weight: nn.Parameter, group: dict) -> None:
        """Update one matrix by its momentum, Nesterov's, with all singular values near 1."""
        state = self.state[weight]
        before = state["momentum"] if state else torch.zeros_like(weight)
        beta = group["betas"][0]
        momentum = beta * before + weight.grad
        nesterov = weight.grad + beta * momentum
        update = orthogonalised(nesterov.flatten(1)).reshape(weight.shape)
        scale = UPDATE_RMS * max(len(weight), weight[0].numel()) ** 0.5
        decayed = (1 - group["lr"] * group["weight_decay"]) * weight
        updated = decayed - group["lr"] * scale * update
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            updated = torch.where(skip > 0, weight, updated)
            momentum = torch.where(skip > 0, before, momentum)
        weight.copy_(updated)
        state["step"] = torch.zeros(())  # which AdamW's loading expects of every state
        state["momentum"] = momentum


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix [N,M] with its singular vectors and singular values near 1, but for tiny ones."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if is_tall else x
