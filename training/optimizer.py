"""Muon: an optimiser for the matrices of a network, beside AdamW for the rest of it."""

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)  # coefficients that push singular values towards 1 fast, five times
RMS = 0.2  # of an update's entries per unit of learning rate, which is that of AdamW: one rate serves both


class Muon(torch.optim.AdamW):
    """AdamW whose matrices, convolutions among them, are updated by their orthogonalised momentum instead.

    A convolution's weight counts as the matrix [C_out, C_in * kernel]; torch.optim.Muon takes none.
    Heeds `found_inf` as fused AdamW does: where it is 1, nothing changes.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale of updates: Liu et al. 2025,
    arXiv:2502.16982, eq. 4.
    """

    def __init__(self, model: nn.Module, lr: float):
        matrices, others = [], []
        for name, parameter in model.named_parameters():
            makes_pixels = name.startswith(("out.", "predictor.out."))  # starts at zero: no matrix to turn
            (others if makes_pixels or parameter.dim() < 2 else matrices).append(parameter)
        super().__init__([{"params": others}, {"params": matrices, "betas": (MOMENTUM, 0.0)}], lr=lr, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        others, matrices = self.param_groups
        self.param_groups = [others]  # all that AdamW is to see
        super().step()
        self.param_groups = [others, matrices]
        lr, decay, beta = matrices["lr"], matrices["weight_decay"], matrices["betas"][0]
        skip = getattr(self, "found_inf", None)
        for weight in matrices["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            before = state["momentum"] if state else torch.zeros_like(weight)
            momentum = beta * before + weight.grad
            update = orthogonalised((weight.grad + beta * momentum).flatten(1)).reshape(weight.shape)
            updated = (1 - lr * decay) * weight - lr * RMS * max(len(weight), weight[0].numel()) ** 0.5 * update
            if skip is not None:
                updated, momentum = (torch.where(skip > 0, *pair) for pair in ((weight, updated), (before, momentum)))
            weight.copy_(updated)
            state |= {"step": torch.zeros(()), "momentum": momentum}  # AdamW's loading asks every state for a step


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix [N,M] with its singular vectors, and values near 1 but for very small ones, by Newton-Schulz steps."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
