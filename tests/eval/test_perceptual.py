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


class Careful(nn.Module):
    """Float32 features behind a layer with running means and one that drops: every change of it would be seen."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.norm = nn.Linear(3, 4, dtype=dtype), nn.BatchNorm1d(4, dtype=dtype)
        self.drop, self.seen = nn.Dropout(0.5), set()
        self.layer.bias.requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        self.seen.add((x.dtype, self.layer.weight.dtype, torch.is_grad_enabled(), self.training))
        # Casts as real feature networks do, whatever precision somebody thought they should have.
        means = x.to(torch.float32).mean((2, 3)).to(self.norm.weight.dtype)
        found = self.drop(self.norm(self.layer(means / 255)))
        return found if y is None else (found - self.forward(y)).abs().mean(1)


def state(network: nn.Module) -> dict[str, object]:
    values = {
        name: (t.dtype, t.device, t.clone(), t.requires_grad) for name, t in network.state_dict(keep_vars=True).items()
    }
    return values | {f"mode {name}": part.training for name, part in network.named_modules()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("failing", [True, False])
def test_a_network_of_ones_own_is_left_as_it_was(dtype: torch.dtype, training: bool, failing: bool) -> None:
    network = Careful(dtype).train(training)
    network.drop.eval()  # parts may be in different modes
    before, images = state(network), noise(9, 0)
    if failing:
        network.register_forward_hook(lambda *_: 1 / 0)
    for measure in (
        lambda: inception_fid(images, noise(9, 1), feature=network, allow_small=True),
        lambda: lpips(images, noise(9, 1), network),
    ):
        if failing:
            with pytest.raises(ZeroDivisionError):
                measure()
        else:
            measure()
    after = state(network)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, tuple):
            assert value[:2] + value[3:] == after[name][:2] + after[name][3:], name
            assert torch.equal(value[2], after[name][2]), name
        else:
            assert value == after[name], name
    assert {entry[1:] for entry in network.seen} == {(dtype, False, False)}
    # FID hands over bytes, LPIPS the network's own precision.
    assert {entry[0] for entry in network.seen} <= {torch.uint8, dtype}


def test_fid_of_a_network_is_that_of_its_features_in_float64() -> None:
    real, fake, network = noise(40, 0), noise(30, 1, shift=60), Careful()
    value, recipe = inception_fid(real, fake, feature=network)
    network.eval()
    sides = [np.stack([np.asarray(i) for i in images]).transpose(0, 3, 1, 2) for images in (real, fake)]
    with torch.no_grad():
        x, y = (network(torch.from_numpy(side)).double().numpy() for side in sides)
    # The definition, with the general matrix root by eigenvalues of the product.
    product = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T))
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T)) + np.trace(np.cov(y.T))
    assert value == pytest.approx(wanted - 2 * np.sqrt(product.astype(complex)).real.sum(), rel=1e-6)
    assert recipe["precision"] == "features float32, statistics float64"


def test_images_of_several_sizes_are_measured() -> None:
    small = [image.resize((4, 4)) for image in noise(9, 0)]
    mixed = noise(9, 0)[:4] + small[4:]
    kept = inception_fid(noise(9, 0), noise(9, 1), feature=Means(), allow_small=True)[0]
    assert inception_fid(mixed, noise(9, 1), feature=Means(), allow_small=True)[0] == pytest.approx(kept)
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    tiny = Image.new("RGB", (4, 4))
    assert lpips([black, tiny], [white, tiny], Gap()) == pytest.approx(1.0)
    with pytest.raises(EvaluationError, match=r"\(8, 8\) and \(4, 4\) in pair 1"):
        lpips([black, black], [white, tiny], Gap())


def test_a_network_that_answers_something_else_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
            return x[0] if y is None else (x - y).flatten() * torch.nan

    with pytest.raises(EvaluationError, match=r"wanted \(1, dim\)"):
        inception_fid(noise(2, 0), noise(2, 1), feature=Wrong())
    with pytest.raises(EvaluationError, match="not finite"):
        lpips(noise(2, 0), noise(2, 1), Wrong())
    for measure in (lambda: lpips([], [], Gap()), lambda: inception_fid([], [], feature=Means())):
        with pytest.raises(EvaluationError):
            measure()


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
    with pytest.raises(MissingExtraError, match=r"pip install 'torchmetrics\[image\]>=1.5'"):
        lpips(noise(2, 0), noise(2, 1), "alex")
