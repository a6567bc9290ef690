"""LPIPS and Inception FID are wired to torchmetrics, shown with tiny modules of the test's own."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from erasure.errors import ArtifactError, EvaluationError, MissingExtraError
from erasure.eval.metrics.distances import frechet
from erasure.eval.metrics.perceptual import inception_fid, lpips


class Means(nn.Module):
    """Mean of each channel: features `(batch, 3)`."""

    num_features = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().mean(dim=(2, 3))


class Gap(nn.Module):
    """A distance of two batches in the layout of LPIPS."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)


def noise(count: int, seed: int, shift: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    tint = rng.integers(0, 100, size=(count, 1, 1, 3)) + shift
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in np.broadcast_to(tint, (count, 8, 8, 3))]


def test_lpips_with_a_module_averages_over_pairs() -> None:
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    assert lpips([black, black], [white, black], Gap()) == pytest.approx(1.0)
    with pytest.raises(EvaluationError, match="pairs"):
        lpips([black], [], Gap())


def test_fid_of_torchmetrics_agrees_with_ours_on_the_same_features() -> None:
    real, fake = noise(40, 0), noise(30, 1, shift=60)
    value, recipe = inception_fid(real, fake, feature=Means())
    features = [np.stack([np.asarray(i, dtype=np.float64).mean((0, 1)) for i in images]) for images in (real, fake)]
    assert value == pytest.approx(frechet(*features), rel=1e-4)
    assert recipe["features"] == "Means"
    assert recipe["n"] == [40, 30]
    assert recipe["small_sample"] is False


def test_few_images_are_refused_unless_told() -> None:
    with pytest.raises(EvaluationError, match="at least 6 images"):
        inception_fid(noise(5, 0), noise(5, 1), feature=Means())
    assert inception_fid(noise(5, 0), noise(5, 1), feature=Means(), allow_small=True)[1]["small_sample"] is True


def test_missing_weights_are_named(tmp_path) -> None:
    with pytest.raises(ArtifactError, match="no Inception weights"):
        inception_fid(noise(2, 0), noise(2, 1), weights=tmp_path / "none.pth")


def test_without_torchmetrics_the_extra_is_named(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingExtraError, match=r"erasure-diffusers\[metrics\]"):
        lpips(noise(2, 0), noise(2, 1), "alex")
