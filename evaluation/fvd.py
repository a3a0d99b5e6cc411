"""Frechet video distance: how far the distribution of generated clips is from that of true ones.

The features are those of the I3D network that the literature uses, whose weights the user brings: a distance in others
would not be comparable with anything published.
"""

import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MIN_FRAMES = 9  # I3D halves time three times and then pools over two
I3D_SIZE = 224  # pixels
I3D_URL = "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt"  # StyleGAN-V's, as MCVD uses


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Squared 2-Wasserstein distance of two Gaussians of means [D] and covariances [D,D].

    |mean_1 - mean_2|^2 + tr(cov_1) + tr(cov_2) - 2 tr((cov_1 cov_2)^(1/2)), where the last trace is the sum of the
    singular values of cov_1^(1/2) cov_2^(1/2): exact also for singular covariances, of fewer clips than features.
    Source: Dowson & Landau 1982.
    """
    overlap = np.linalg.svd(square_root(cov_1) @ square_root(cov_2), compute_uv=False).sum()
    distance = np.square(mean_1 - mean_2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * overlap
    return max(0.0, float(distance))


def square_root(covariance: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semi-definite matrix; eigenvalues below zero are rounding."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def feature_distance(features: np.ndarray, truth: np.ndarray) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features, [N,D] each, N of 2 or more."""
    groups = [np.asarray(group, np.float64) for group in (features, truth)]
    moments = [(group.mean(0), np.atleast_2d(np.cov(group, rowvar=False))) for group in groups]
    return frechet_distance(*moments[0], *moments[1])


class I3D:
    """Features of whole clips from the I3D network of StyleGAN-V in TorchScript, which MCVD, LGC-VD and STDiff use.

    Any scripted network with the same call works. Source: Unterthiner et al. 2018, arXiv:1812.01717.
    """

    def __init__(self, path: str | Path, device: torch.device):
        if not Path(path).is_file():
            raise ValueError(f"--fvd_weights {path}: no such file")
        try:
            with warnings.catch_warnings():  # TorchScript is deprecated, but it is what these weights come in
                warnings.simplefilter("ignore", FutureWarning)
                self.network = torch.jit.load(str(path), map_location=device).eval()
        except RuntimeError as error:
            raise ValueError(f"--fvd_weights {path}: not a TorchScript network ({type(error).__name__})") from error
        self.device = device

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> np.ndarray:
        """Features [B,D] of clips [B,C,T,H,W] in [-1, 1], T of 9 or more; gray is repeated."""
        b, t = clips.shape[0], clips.shape[2]
        frames = clips.expand(-1, 3, -1, -1, -1).transpose(1, 2).flatten(0, 1)  # [B*T,3,H,W]
        frames = F.interpolate(frames, size=(I3D_SIZE, I3D_SIZE), mode="bilinear", align_corners=False)
        prepared = frames.unflatten(0, (b, t)).transpose(1, 2).to(self.device)  # [B,3,T,224,224]
        try:
            return self.network(prepared, rescale=False, resize=False, return_features=True).cpu().double().numpy()
        except RuntimeError as error:
            reason = str(error).strip()[-200:]
            raise ValueError(f"--fvd_weights: not the I3D network of {I3D_URL} ({reason})") from error
