"""Distances between two sets of images in a named feature space."""

from __future__ import annotations

import numpy as np

from erasure.errors import EvaluationError


def _pair(real: np.ndarray, fake: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(real, dtype=np.float64), np.asarray(fake, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise EvaluationError(f"two feature sets must be (images, dim) with one dim, got {x.shape} and {y.shape}")
    if min(len(x), len(y)) < least:
        raise EvaluationError(f"at least {least} images a side are needed, got {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise EvaluationError("features hold NaN or infinity: leave out the images that they are of, and say how many")
    return x, y


def _sqrt_psd(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet(real: np.ndarray, fake: np.ndarray, *, allow_small: bool = False) -> float:
    r"""Fréchet distance between Gaussians fitted to two feature sets (FID, whatever the features).

    $$\|\mu_1-\mu_2\|^2 + \mathrm{tr}\,\Sigma_1 + \mathrm{tr}\,\Sigma_2
      - 2\,\mathrm{tr}\,(\Sigma_1^{1/2}\Sigma_2\Sigma_1^{1/2})^{1/2}$$

    in float64; the last trace is the sum of the roots of the eigenvalues of a symmetric matrix, so that no general
    matrix root (and no complex remainder) is involved.

    Args:
        real: Features `(images, dim)`.
        fake: Features `(images, dim)`.
        allow_small: Accept fewer than `2 * dim` images, whose covariance is badly determined: such a value ranks
            sets of the same size at best, and the recipe must say so.

    Raises:
        EvaluationError: Too few images, or shapes that do not fit.
    """
    x, y = _pair(real, fake, least=2)
    smallest, dim = min(len(x), len(y)), x.shape[1]
    if smallest < 2 * dim and not allow_small:
        raise EvaluationError(
            f"FID on {dim}-dimensional features needs at least {2 * dim} images a side, got {smallest}: use CMMD or "
            "KID, which are unbiased at any size, or a larger suite"
        )
    sigma_x, sigma_y = np.cov(x, rowvar=False).reshape(dim, dim), np.cov(y, rowvar=False).reshape(dim, dim)
    root = _sqrt_psd(sigma_x)
    middle = root @ sigma_y @ root
    overlap = np.sqrt(np.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0)).sum()
    gap = ((x.mean(0) - y.mean(0)) ** 2).sum()
    return float(max(gap + np.trace(sigma_x) + np.trace(sigma_y) - 2 * overlap, 0.0))


def _unbiased_mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray, paired: bool) -> float:
    def off_diagonal(kernel: np.ndarray) -> float:
        return (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))

    if paired and len(xx) != len(yy):
        raise EvaluationError(f"paired feature sets must be of one size, got {len(xx)} and {len(yy)}")
    # Images that share noise are not independent: their kernel values would pull the estimate below zero.
    between = off_diagonal(xy) if paired else xy.mean()
    return float(off_diagonal(xx) + off_diagonal(yy) - 2 * between)


def cmmd(
    real: np.ndarray, fake: np.ndarray, *, paired: bool = False, sigma: float = 10.0, scale: float = 1000.0
) -> float:
    r"""Unbiased squared MMD with the kernel $\exp(-\|x-y\|^2 / 2\sigma^2)$ on unit-norm features, times `scale`.

    `sigma` and `scale` are those of CMMD (Jayasumana et al., 2024); its released code uses the biased estimate.
    May be slightly negative for sets of one distribution.

    Args:
        real: Features `(images, dim)`.
        fake: Features `(images, dim)`.
        paired: Image i of both sides shares its noise; such pairs are left out of the comparison between the sides,
            which keeps the estimate unbiased, and exactly 0 for equal sets.
        sigma: Width of the kernel.
        scale: Factor on the result.

    Raises:
        EvaluationError: Fewer than two images a side, or shapes that do not fit.
    """
    x, y = _pair(real, fake, least=2)
    x, y = (f / np.maximum(np.linalg.norm(f, axis=1, keepdims=True), 1e-12) for f in (x, y))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squared = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
        return np.exp(-squared.clip(min=0) / (2 * sigma**2))

    return scale * _unbiased_mmd(kernel(x, x), kernel(y, y), kernel(x, y), paired)


def kid(real: np.ndarray, fake: np.ndarray, *, paired: bool = False) -> float:
    r"""Unbiased squared MMD with the kernel $(x \cdot y / d + 1)^3$ over all images (KID without subsets).

    `paired` as in `cmmd`.

    Raises:
        EvaluationError: Fewer than two images a side, or shapes that do not fit.
    """
    x, y = _pair(real, fake, least=2)
    dim = x.shape[1]
    return _unbiased_mmd((x @ x.T / dim + 1) ** 3, (y @ y.T / dim + 1) ** 3, (x @ y.T / dim + 1) ** 3, paired)
