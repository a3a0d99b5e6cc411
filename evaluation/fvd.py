"""Frechet video distance, in features of the literature's I3D network."""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_FRAMES = 9  # I3D halves time three times and then pools over two
I3D_SIZE = 224  # pixels
I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"


def frechet_distance(
    mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray
) -> float:
    """Squared 2-Wasserstein distance of Gaussians, means [D], covariances [D,D].

    |mean_1 - mean_2|^2 + tr(cov_1) + tr(cov_2) - 2 tr((cov_1 cov_2)^(1/2)).
    Source: Dowson & Landau 1982.
    """
    # The last trace is the sum of the singular values of the product of the
    # roots, which is exact for singular covariances, too.
    product = square_root(cov_1) @ square_root(cov_2)
    overlap = np.linalg.svd(product, compute_uv=False).sum()
    shift = np.square(mean_1 - mean_2).sum()
    distance = shift + np.trace(cov_1) + np.trace(cov_2) - 2 * overlap
    return max(0.0, float(distance))


def square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix."""
    values, vectors = np.linalg.eigh(covariance)
    # Eigenvalues below zero are rounding.
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def feature_distance(features: np.ndarray, truth: np.ndarray) -> float:
    """Frechet distance of two sets of features, [N,D] float64, N of 2 or more."""
    moments = []
    for group in (features, truth):
        covariance = np.cov(group, rowvar=False)
        moments += [group.mean(0), np.atleast_2d(covariance)]
    return frechet_distance(*moments)


class I3D:
    """Features of whole clips by StyleGAN-V's I3D, which MCVD uses.

    Source: Unterthiner et al. 2018, arXiv:1812.01717.
    """

    def __init__(self, path: str, device: torch.device):
        if not Path(path).is_file():
            raise ValueError(f"--fvd_weights {path}: no such file")
        try:
            # TorchScript is deprecated, but these weights come in nothing else.
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"--fvd_weights {path}: not a TorchScript network") from error
        self.device = device

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> np.ndarray:
        """Clips [B,C,T,H,W] in [-1, 1], T of 9 or more: [B,D] float64."""
        b, _, t = clips.shape[:3]
        rgb = clips.expand(-1, 3, -1, -1, -1)
        frames = rgb.transpose(1, 2).flatten(0, 1)  # [B*T,3,H,W]
        size = (I3D_SIZE, I3D_SIZE)
        frames = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
        large = frames.unflatten(0, (b, t)).transpose(1, 2)  # [B,3,T,224,224]
        call = {"rescale": False, "resize": False, "return_features": True}
        try:
            return self.network(large.to(self.device), **call).cpu().double().numpy()
        except RuntimeError as error:
            reason = str(error)[-200:]
            raise ValueError(f"--fvd_weights: not the I3D of {I3D_URL} ({reason})") from error
