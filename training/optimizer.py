"""Muon: an optimiser for the matrices of a network, with AdamW for the rest of it."""

from collections import defaultdict

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
# Coefficients of a quintic that moves singular values towards 1 in a few steps.
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# RMS of an update's entries per unit of learning rate; it is AdamW's, so that one rate fits both.
UPDATE_RMS = 0.2
BATCH_VALUES = 2**20  # in a batch of matrices, of which a step holds some ten copies


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
        # Small matrices of equal shape are batched, as a network has many of few shapes.
        by_shape = defaultdict(list)
        for weight in matrices["params"]:
            if weight.grad is not None:
                by_shape[weight.shape].append(weight)
        for shape, weights in by_shape.items():
            count = max(1, BATCH_VALUES // shape.numel())
            for i in range(0, len(weights), count):
                self._turn(weights[i : i + count], matrices)

    def _turn(self, weights: list[nn.Parameter], group: dict) -> None:
        """Update matrices of one shape by their orthogonalised Nesterov momentum."""
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["step"] = torch.zeros(())  # AdamW's loading expects one
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        moments = [self.state[weight]["momentum"] for weight in weights]
        before = torch.stack(moments)  # [N,C_out,...]
        grads = torch.stack([weight.grad for weight in weights])
        beta = group["betas"][0]
        momentum = beta * before + grads
        nesterov = grads + beta * momentum
        update = orthogonalised(nesterov.flatten(2)).reshape(grads.shape)

        scale = UPDATE_RMS * max(grads.shape[1], grads[0, 0].numel()) ** 0.5
        old = torch.stack(weights)
        new = (1 - group["lr"] * group["weight_decay"]) * old - group["lr"] * scale * update
        skip = getattr(self, "found_inf", None)
        if skip is not None:
            new = torch.where(skip > 0, old, new)
            momentum = torch.where(skip > 0, before, momentum)
        torch._foreach_copy_(weights, list(new))
        torch._foreach_copy_(moments, list(momentum))


def orthogonalised(matrices: Tensor) -> Tensor:
    """Matrices [N,R,C] with all singular values moved near 1, but for tiny ones.

    Each step multiplies by a polynomial of the Gram matrix, and all of these commute: they are
    multiplied first, as the Gram matrix is smaller than the convolution's matrix.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    product = identity = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    x = product @ x
    return x.mT if is_tall else x
