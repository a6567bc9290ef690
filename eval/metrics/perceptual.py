"""LPIPS and Inception FID through torchmetrics, for those who have the weights (extra `metrics`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from erasure.errors import ArtifactError, EvaluationError
from erasure.eval.rows import Record
from erasure.extras import require
from erasure.images import rgb


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as `(images, 3, height, width)` uint8.

    Raises:
        EvaluationError: None, several sizes, or an image that cannot be decoded.
    """
    if len({image.size for image in images}) != 1:
        raise EvaluationError("images of one size are needed, at least one")
    rows = [np.asarray(rgb(image, f"image {i}", error=EvaluationError)) for i, image in enumerate(images)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


def _chunks(batch: Tensor, size: int = 32) -> Sequence[Tensor]:
    return batch.split(size)


def lpips(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    network: Literal["alex", "vgg", "squeeze"] | nn.Module = "alex",
) -> float:
    """Mean LPIPS distance over pairs of images.

    Args:
        before: Images.
        after: As many, pair by pair.
        network: A network that torchmetrics knows (torchvision downloads its backbone on first use), or a module
            that maps two batches `(batch, 3, h, w)` in [-1, 1] to distances `(batch,)` or `(batch, 1, 1, 1)`.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        EvaluationError: The lists do not pair up, or an image cannot be decoded.
    """
    if len(before) != len(after):
        raise EvaluationError(f"LPIPS compares pairs of images, got {len(before)} and {len(after)}")
    first, second = (pixels(images).float() / 127.5 - 1 for images in (before, after))
    if first.shape != second.shape:
        raise EvaluationError(f"LPIPS compares images of one size, got {before[0].size} and {after[0].size}")
    with torch.no_grad():
        if isinstance(network, nn.Module):
            distances = [network(a, b).flatten() for a, b in zip(_chunks(first), _chunks(second), strict=True)]
            return float(torch.cat(distances).mean())
        image = require("torchmetrics.image.lpip", extra="metrics")
        metric = image.LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=False)
        for a, b in zip(_chunks(first), _chunks(second), strict=True):
            metric.update(a, b)
        return float(metric.compute())


def inception_fid(
    real: Sequence[Image.Image],
    fake: Sequence[Image.Image],
    *,
    weights: str | Path | None = None,
    feature: int | nn.Module = 2048,
    allow_small: bool = False,
) -> tuple[float, Record]:
    """FID as torchmetrics computes it, with its recipe.

    Args:
        real: Images of the reference set.
        fake: Images to judge.
        weights: The Inception file of torch-fidelity (`pt_inception-2015-12-05-*.pth`); it is downloaded when left
            out. Not used with a module.
        feature: Width of the Inception layer, or a module that maps uint8 `(batch, 3, h, w)` to `(batch, dim)`.
        allow_small: Accept fewer images than twice the feature width; the recipe says so.

    Returns:
        The distance, and the recipe that names how it was computed.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        ArtifactError: There is no file at `weights`.
        EvaluationError: Too few images, or one that cannot be decoded.
    """
    fid = require("torchmetrics.image.fid", extra="metrics")
    options: Record = {}
    if weights is not None and not isinstance(feature, nn.Module):
        if not Path(weights).is_file():
            raise ArtifactError(
                f"no Inception weights at {weights}: give torch-fidelity's pt_inception-2015-12-05 file"
            )
        options["feature_extractor_weights_path"] = str(weights)
    metric = fid.FrechetInceptionDistance(feature=feature, **options).set_dtype(torch.float64)
    smallest, dim = min(len(real), len(fake)), metric.real_features_sum.numel()
    if smallest < 2 * dim and not allow_small:
        raise EvaluationError(
            f"FID on {dim}-dimensional features needs at least {2 * dim} images a side, got {smallest}: use CMMD or "
            "KID, or pass allow_small=True and say so"
        )
    with torch.no_grad():
        for images, is_real in ((real, True), (fake, False)):
            for batch in _chunks(pixels(images)):
                metric.update(batch, real=is_real)
    import torchmetrics

    recipe = {
        "implementation": f"torchmetrics {torchmetrics.__version__}",
        "features": type(feature).__name__ if isinstance(feature, nn.Module) else f"inception-2015-12-05/{feature}",
        "small_sample": smallest < 2 * dim,
        "n": [len(real), len(fake)],
    }
    return float(metric.compute()), recipe
