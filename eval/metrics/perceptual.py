"""LPIPS and Inception FID through torchmetrics, for those who have the weights (extra `metrics`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from erasure.errors import ArtifactError, EvaluationError
from erasure.eval.metrics import distances
from erasure.eval.rows import Record
from erasure.extras import require
from erasure.images import rgb
from erasure.interop import scopes


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size as `(images, 3, height, width)` uint8.

    Raises:
        EvaluationError: None, several sizes, or an image that cannot be decoded.
    """
    if len({image.size for image in images}) != 1:
        raise EvaluationError("images of one size are needed, at least one")
    rows = [np.asarray(rgb(image, f"image {i}", error=EvaluationError)) for i, image in enumerate(images)]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()


CHUNK = 32
"""Images that a network sees at once."""


def _home(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Give the device of a network's weights, and their precision."""
    tensors = (t for t in (*network.parameters(), *network.buffers()) if t.is_floating_point())
    first = next(tensors, torch.empty(0))
    return first.device, first.dtype


def lpips(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    network: Literal["alex", "vgg", "squeeze"] | nn.Module = "alex",
) -> float:
    """Mean LPIPS distance over pairs of images. The two of a pair have one size; pairs may differ in size.

    Args:
        before: Images.
        after: As many, pair by pair.
        network: A network that torchmetrics knows (torchvision downloads its backbone on first use), or a module
            that maps two batches `(batch, 3, h, w)` in [-1, 1], of its own precision and on its own device, to
            distances `(batch,)` or `(batch, 1, 1, 1)`. It is left as it was.

    Raises:
        MissingExtraError: torchmetrics is not installed.
        EvaluationError: The lists do not pair up, are empty, an image cannot be decoded, or a distance is not finite.
    """
    if len(before) != len(after) or not before:
        raise EvaluationError(
            f"LPIPS compares pairs of images, at least one, got {len(before)} and {len(after)} images"
        )
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        if one.size != other.size:
            raise EvaluationError(
                f"LPIPS compares images of one size, got {one.size} and {other.size} in pair {index}: leave the "
                "pair out and say so, or resize one"
            )
    if isinstance(network, nn.Module):
        distance = network
    else:
        distance = require("torchmetrics.image.lpip").LearnedPerceptualImagePatchSimilarity(net_type=network).net
    device, dtype = _home(distance)
    chunks = []
    with scopes.frozen(distance), torch.no_grad():
        for group in _by_size(before):
            sides = (pixels([images[index] for index in group]) for images in (before, after))
            first, second = ((side.float() / 127.5 - 1).to(device, dtype) for side in sides)
            chunks.append(distance(first, second).flatten().cpu().double())
    found = torch.cat(chunks)
    if len(found) != len(before) or not found.isfinite().all():
        raise EvaluationError(
            f"the LPIPS network gave {len(found)} distances for {len(before)} pairs, "
            f"{int((~found.isfinite()).sum())} of them not finite; wanted is one finite distance a pair"
        )
    return float(found.mean())


def inception_fid(
    real: Sequence[Image.Image],
    fake: Sequence[Image.Image],
    *,
    weights: str | Path | None = None,
    feature: int | nn.Module = 2048,
    allow_small: bool = False,
) -> tuple[float, Record]:
    """FID on the Inception features of torchmetrics, or on those of a network of the caller's, with its recipe.

    The network computes in its own precision, on its own device, and is left as it was; means, covariances and the
    distance are computed in float64.

    Args:
        real: Images of the reference set, of any sizes if the network takes them, as Inception does.
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
        EvaluationError: Too few images, one that cannot be decoded, or features that are not `(batch, dim)`, finite.
    """
    if isinstance(feature, nn.Module):
        network, name, implementation = feature, type(feature).__name__, "erasure"
    else:
        network, implementation = _inception(feature, weights)
        name = f"inception-2015-12-05/{feature}"
    smallest = min(len(real), len(fake))
    if not smallest:
        raise EvaluationError(f"FID compares two sets of images, got {len(real)} and {len(fake)}")
    device, precision = _home(network)
    with scopes.frozen(network), torch.no_grad():
        dim = _features(network, real[:1], device).shape[1]
        if smallest < 2 * dim and not allow_small:
            raise EvaluationError(
                f"FID on {dim}-dimensional features needs at least {2 * dim} images a side, got {smallest}: use CMMD "
                "or KID, or pass allow_small=True and say so"
            )
        sides = [_features(network, images, device) for images in (real, fake)]
    value = distances.frechet(sides[0].numpy(), sides[1].numpy(), allow_small=allow_small)
    recipe = {
        "implementation": implementation,
        "features": name,
        "precision": f"features {str(precision).removeprefix('torch.')}, statistics float64",
        "small_sample": smallest < 2 * dim,
        "n": [len(real), len(fake)],
    }
    return value, recipe


def _inception(width: int, weights: str | Path | None) -> tuple[nn.Module, str]:
    """The Inception network of torchmetrics, and what it comes from."""
    fid = require("torchmetrics.image.fid")
    options: Record = {}
    if weights is not None:
        if not Path(weights).is_file():
            raise ArtifactError(
                f"no Inception weights at {weights}: give torch-fidelity's pt_inception-2015-12-05 file"
            )
        options["feature_extractor_weights_path"] = str(weights)
    import torchmetrics

    network: nn.Module = fid.FrechetInceptionDistance(feature=width, **options).inception
    return network, f"torchmetrics {torchmetrics.__version__}"


def _features(network: nn.Module, images: Sequence[Image.Image], device: torch.device) -> Tensor:
    """Features of all images, `(images, dim)` in float64 on the CPU."""
    found: list[Tensor] = []
    for group in _by_size(images):
        answer = network(pixels([images[index] for index in group]).to(device))
        if not isinstance(answer, Tensor) or answer.ndim != 2 or len(answer) != len(group):
            shape = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
            raise EvaluationError(
                f"the feature network gave {shape} for {len(group)} images, wanted ({len(group)}, dim): give a module "
                "that maps uint8 (batch, 3, h, w) to (batch, dim)"
            )
        found.append(answer.cpu().double())
    return torch.cat(found)


def _by_size(images: Sequence[Image.Image]) -> Iterator[list[int]]:
    """Indices of images of one size, in chunks."""
    groups: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(image.size, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), CHUNK):
            yield group[start : start + CHUNK]
