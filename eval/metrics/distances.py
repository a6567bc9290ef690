"""Distances between two sets of images in a named feature space."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import Metric, register
from erasure.eval.metrics.utility import split, utility_row
from erasure.eval.rows import Record
from erasure.eval.statistics import too_many_missing


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


class Distance(Metric):
    """A distance of retained images before and after in the features of a CLIP model, whose name its row has."""

    higher_is_better = False
    needs = ("clip", "pairs")

    @abstractmethod
    def between(self, before: np.ndarray, after: np.ndarray, evidence: Evidence) -> float:
        """The distance of features `(images, dim)` in which image i of both sides shares its noise."""

    def stamp(self, evidence: Evidence) -> Record:
        """What else the number depends on."""
        return {"reference": "images of the stock model for the same prompts and noise"}

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where no erasure is in force."""
        if "after" not in evidence.rows:
            return []
        row = utility_row(
            self, evidence, "after", "retained", partial(self._distance, evidence), **self.stamp(evidence)
        )
        return [row | {"name": f"{self.name}[{evidence.clip.name}]" if evidence.clip else self.name}]

    def _distance(self, evidence: Evidence) -> Record:
        kept, _ = split(evidence.rows["after"])
        both = [[evidence.features.get((row["sample_id"], side)) for side in ("before", "after")] for row in kept]
        pairs = [(first, second) for first, second in both if first is not None and second is not None]
        if not pairs:
            raise EvaluationError("no image features")
        lost = len(kept) - len(pairs)
        if reason := too_many_missing(lost, len(kept)):
            raise EvaluationError(reason)
        first, second = (np.stack(side) for side in zip(*pairs, strict=True))
        value = self.between(first, second, evidence)
        return {"value": value, "low": None, "high": None, "n": len(pairs)} | ({"missing": lost} if lost else {})


@register("fid")
class Fid(Distance):
    """Frechet distance; small samples are accepted in the full size alone."""

    title = "FID"
    about = "Frechet distance of features, retained prompts"
    definition = "Frechet distance of Gaussians, float64, eigenvalues"
    bounds = (0.0, None)

    def between(self, before: np.ndarray, after: np.ndarray, evidence: Evidence) -> float:
        """See `frechet`."""
        return frechet(before, after, allow_small=evidence.plan.size == "full")

    def stamp(self, evidence: Evidence) -> Record:
        """Whether small samples are accepted, too."""
        accepted = "accepted" if evidence.plan.size == "full" else "refused"
        return super().stamp(evidence) | {"small_samples": accepted}


@register("cmmd")
class Cmmd(Distance):
    """Maximum mean discrepancy with a Gaussian kernel."""

    title = "CMMD"
    about = "unbiased distance of features, Gaussian kernel, retained prompts"
    definition = "1000 x unbiased MMD^2, Gaussian kernel, sigma 10, pairs left out"

    def between(self, before: np.ndarray, after: np.ndarray, evidence: Evidence) -> float:
        """See `cmmd`."""
        return cmmd(before, after, paired=True)


@register("kid")
class Kid(Distance):
    """Maximum mean discrepancy with a cubic kernel."""

    title = "KID"
    about = "unbiased distance of features, cubic kernel, retained prompts"
    definition = "unbiased MMD^2, cubic kernel, all images, pairs left out"

    def between(self, before: np.ndarray, after: np.ndarray, evidence: Evidence) -> float:
        """See `kid`."""
        return kid(before, after, paired=True)
