"""Feature distances, drift and CLIP score against closed forms and naive loops."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.linalg import sqrtm

from erasure.errors import ArtifactError, EvaluationError
from erasure.eval.metrics.clip_score import ClipModel, clip_score, cosine
from erasure.eval.metrics.distances import cmmd, frechet, kid
from erasure.eval.metrics.drift import feature_drift, pixel_drift


def with_moments(mean: np.ndarray, covariance: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Samples whose empirical mean and covariance are exactly those given."""
    raw = np.random.default_rng(seed).normal(size=(n, len(mean)))
    raw -= raw.mean(0)
    whitened = raw @ np.linalg.inv(np.linalg.cholesky(np.cov(raw, rowvar=False))).T
    return whitened @ np.linalg.cholesky(covariance).T + mean


def test_frechet_of_known_gaussians() -> None:
    first, second = np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 1.0, 0.25])
    x = with_moments(np.zeros(3), first, 50, 0)
    y = with_moments(np.array([1.0, 2.0, 0.0]), second, 40, 1)
    # Commuting covariances: |mu|^2 + sum (sqrt a - sqrt b)^2.
    assert frechet(x, y) == pytest.approx(5 + 1 + 1 + 6.25)


def test_frechet_of_rotated_gaussians_agrees_with_the_matrix_root() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(80, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(70, 5)) @ rng.normal(size=(5, 5))
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet(x, y) == pytest.approx(expected)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)


def test_frechet_refuses_few_samples_unless_told() -> None:
    x = np.random.default_rng(0).normal(size=(19, 10))
    with pytest.raises(EvaluationError, match="needs at least 20 images"):
        frechet(x, x)
    assert frechet(x, x, allow_small=True) == pytest.approx(0, abs=1e-9)
    with pytest.raises(EvaluationError, match="one dim"):
        frechet(x, x[:, :5])


def naive_mmd(x: np.ndarray, y: np.ndarray, kernel) -> float:
    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(x[i], y[j]) for i in range(n) for j in range(m)) / (n * m)
    return xx + yy - 2 * xy


def test_mmds_agree_with_double_loops() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(9, 6)), rng.normal(size=(12, 6)) + 0.5
    unit = [f / np.linalg.norm(f, axis=1, keepdims=True) for f in (x, y)]
    assert cmmd(x, y) == pytest.approx(1000 * naive_mmd(*unit, lambda a, b: np.exp(-((a - b) ** 2).sum() / 200)))
    assert kid(x, y) == pytest.approx(naive_mmd(x, y, lambda a, b: (a @ b / 6 + 1) ** 3))


def test_paired_mmds_leave_out_the_pairs() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=(12, 4))
    for distance in (cmmd, kid):
        assert distance(x, x, paired=True) == pytest.approx(0, abs=1e-9)
        assert distance(x, x) < -1e-3
        with pytest.raises(EvaluationError, match="one size"):
            distance(x, x[:5], paired=True)
    # Independent noise on top of shared noise: unbiased though the sides are correlated.
    pairs = [(shared + rng.normal(size=shared.shape), shared + rng.normal(size=shared.shape))
             for shared in (rng.normal(size=(10, 4)) for _ in range(400))]  # fmt: skip
    values = [kid(a, b, paired=True) for a, b in pairs]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20


def test_mmd_is_unbiased_on_one_distribution() -> None:
    rng = np.random.default_rng(5)
    values = [kid(rng.normal(size=(10, 4)), rng.normal(size=(10, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 20
    with pytest.raises(EvaluationError, match="at least 2"):
        cmmd(np.ones((1, 3)), np.ones((5, 3)))


def test_drift_is_zero_to_one() -> None:
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    assert pixel_drift(black, black) == 0
    assert pixel_drift(black, white) == 1
    with pytest.raises(EvaluationError, match="one size"):
        pixel_drift(black, Image.new("RGB", (4, 8)))
    features = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert feature_drift(features, features[::-1]) == pytest.approx([1, 1])
    assert feature_drift(features, 3 * features) == pytest.approx([0, 0])


def test_clip_score_clamps_each_sample() -> None:
    assert cosine(np.array([[3.0, 4.0]]), np.array([[1.0, 0.0]])) == pytest.approx([0.6])
    assert clip_score([0.5, -0.5]) == 0.25


def test_clip_model_reads_a_local_folder(clip_folder, tmp_path) -> None:
    model = ClipModel(clip_folder)
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    together, alone = model.images(images), model.images(images[1:])
    assert together.shape == (2, 16)
    assert together[1] == pytest.approx(alone[0], abs=1e-5)
    texts = model.texts(["a cat", "a dog", "a cat"])
    assert np.array_equal(texts[0], texts[2])
    assert not np.allclose(texts[0], texts[1])
    with pytest.raises(ArtifactError, match=r"open_clip_config\.json"):
        ClipModel(tmp_path)
