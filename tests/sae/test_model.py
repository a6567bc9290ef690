"""The autoencoder against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from erasure.errors import OptionError
from erasure.sae import SAEConfig
from erasure.sae.model import SparseAutoencoder, geometric_median, jump_relu, sparse_decode

MakeSAE = Callable[..., SparseAutoencoder]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_reconstruction_is_the_plain_sum(architecture: str, make_sae: MakeSAE) -> None:
    sae = make_sae(architecture)
    x = torch.randn(3, 7, 12)
    for token, found in zip(x.reshape(-1, 12), sae(x).reshape(-1, 12), strict=True):
        before = [float((token - sae.b_dec) @ sae.W_enc[:, i] + sae.b_enc[i]) for i in range(40)]
        largest = sorted(range(40), key=lambda i: -before[i])[:5]
        fires = [i in largest if architecture == "topk" else before[i] > 0.8 for i in range(40)]
        expected = sae.b_dec.double().clone()
        for i in range(40):
            if fires[i] and before[i] > 0:
                expected += before[i] * sae.W_dec[i].double()
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_slice_is_the_dictionary_without_competition(make_sae: MakeSAE) -> None:
    sae = make_sae("jumprelu")
    x = torch.randn(9, 12)
    features = [3, 17, 0, 39]
    part = sae.slice(features)
    torch.testing.assert_close(part.encode(x), sae.encode(x)[:, features], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.w_dec, sae.W_dec[features])


def test_a_slice_of_nothing_is_empty(make_sae: MakeSAE) -> None:
    assert make_sae().slice([]).encode(torch.randn(2, 12)).shape == (2, 0)


def test_jump_relu_never_passes_negative_values() -> None:
    x = torch.tensor([-2.0, -0.1, 0.0, 0.3, 0.6])
    assert jump_relu(x, torch.tensor(-1.0)).tolist() == pytest.approx([0, 0, 0, 0.3, 0.6])
    assert jump_relu(x, torch.tensor(0.3)).tolist() == pytest.approx([0, 0, 0, 0, 0.6])


def test_sparse_decode_equals_the_dense_product_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(6, 20, generator=generator, dtype=torch.float64).relu()
    latents[2] = 0
    w_dec = torch.randn(20, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    rows, indices = latents.nonzero(as_tuple=True)
    values = latents[rows, indices].requires_grad_()
    offsets = torch.searchsorted(rows, torch.arange(6))
    torch.testing.assert_close(sparse_decode(values, indices, offsets, w_dec), latents @ w_dec)
    assert torch.autograd.gradcheck(lambda v, w: sparse_decode(v, indices, offsets, w), (values, w_dec))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_scale_folds_into_the_weights(architecture: str, make_sae: MakeSAE) -> None:
    sae = make_sae(architecture)
    x = torch.randn(20, 12)
    expected = sae(x * 0.37) / 0.37
    sae.fold_scale(0.37)
    torch.testing.assert_close(sae(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


def test_geometric_median_is_where_the_pulls_cancel_and_outliers_do_not_move_it() -> None:
    points = torch.randn(301, 5, generator=torch.Generator().manual_seed(0))
    median = geometric_median(points)
    pulls = (points - median) / (points - median).norm(dim=1, keepdim=True)
    assert pulls.sum(0).norm() < 1e-2 * len(points)
    points[:30] += 1e4
    assert geometric_median(points).norm() < 1


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, 0, 1), (4, 8, 0), (4, 8, 9)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(OptionError, match="cannot be"):
        SAEConfig(d_in=sizes[0], d_sae=sizes[1], k=sizes[2])
