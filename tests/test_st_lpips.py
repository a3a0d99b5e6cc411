"""ST-LPIPS equals the package whose weights it reads."""

import sys
from types import ModuleType

import pytest
import torch

from evaluation.st_lpips import (
    BACKBONES,
    INSTALL,
    MIN_SIDE,
    ShiftTolerantLPIPS,
    st_lpips,
    weights_path,
)
from utils.video_utils import to_float, to_uint8

pytestmark = pytest.mark.skipif(weights_path("alex") is None, reason=INSTALL)


def pictures(side=40, seed=0):
    """A batch, and the same with noise."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.rand(3, 3, side, side, generator=generator) * 2 - 1
    noise = torch.randn(3, 3, side, side, generator=generator)
    return truth, (truth + 0.2 * noise).clamp(-1, 1)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("side", [MIN_SIDE, 41])
def test_the_distance_is_the_packages(backbone, side, monkeypatch):
    # What the package imports and does not need here.
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):
        module = ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    from stlpips_pytorch.stlpips import LPIPS

    theirs = LPIPS(net=backbone, variant="shift_tolerant", verbose=False)
    truth, noisy = pictures(side)
    with torch.no_grad():
        expected = theirs(noisy, truth).flatten()
        torch.testing.assert_close(ShiftTolerantLPIPS(backbone)(noisy, truth), expected)


def test_a_clips_distance_is_the_mean_of_its_frames_and_gray_counts_as_colour():
    network = ShiftTolerantLPIPS("alex")
    truth, noisy = pictures()
    # Three 8-bit frames as a gray clip, [1,1,3,H,W].
    truth = to_float(to_uint8(truth[:, :1]))
    noisy = to_float(to_uint8(noisy[:, :1]))
    with torch.no_grad():
        frames = network(noisy.expand(-1, 3, -1, -1), truth.expand(-1, 3, -1, -1))
    clip = st_lpips(network, noisy.transpose(0, 1)[None], truth.transpose(0, 1)[None])
    torch.testing.assert_close(clip, frames.mean(0, keepdim=True))
