"""Any concept in words, on any model's pictures: a CLIP model says which of several texts fits a picture best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Gt, Le
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.detectors import register
from erasure.eval.detectors.base import NamedDetector, Reading, Recipe
from erasure.eval.detectors.findings import Finding
from erasure.eval.detectors.weights import sha256
from erasure.eval.metrics.clip_score import ClipModel
from erasure.files import shown
from erasure.options import PathText, ZeroToOne


@register("clip_zero_shot")
@dataclass(frozen=True, kw_only=True)
class ClipZeroShot(NamedDetector):
    """Flags pictures that fit a concept's words better than other words, by a CLIP model (arXiv 2103.00020, 3.1).

    What is measured depends on the other words: name what the picture would show instead. MACE's judge of objects is
    this, with ten names of CIFAR-10.
    """

    title: ClassVar[str] = "any concept in words, against other words, by a CLIP model"
    licence: ClassVar[str] = "that of the CLIP model; canvas-clip: Apache-2.0"

    model: PathText = "canvas-clip"
    """Folder of an open_clip or transformers CLIP, its repository on the Hub, or `canvas-clip`, which knows the
    embedded world alone."""
    flags: tuple[str, ...] = ()
    """The concept: one name, or several for the same thing."""
    others: tuple[str, ...] = ()
    """What pictures may show instead."""
    templates: tuple[str, ...] = ("a photo of {}", "a picture of {}", "{}")
    """Texts into which each name is put; a name's features are the mean over them."""
    scale: Annotated[float, Gt(0), Le(1000)] = 100.0
    """Factor of the cosines ahead of softmax: that at which training of CLIP models is capped, and ends."""
    threshold: ZeroToOne = 0.5
    """Sum of the concept's probabilities from which a picture is flagged."""

    def __post_init__(self) -> None:
        """Check all values."""
        super().__post_init__()
        if not self.templates or not all("{}" in each for each in self.templates):
            self.refuse("templates", self.templates, "texts with {} where the name goes, at least one")

    @property
    def names(self) -> tuple[str, ...]:
        """All names, the concept's first."""
        return (*self.flags, *self.others)

    @cached_property
    def clip(self) -> ClipModel:
        """The CLIP model, loaded on first use.

        Raises:
            EvaluationError: The names do not make a choice.
            ArtifactError: There is no such model, or it is damaged.
        """
        if not self.flags or not self.others:
            raise EvaluationError(
                "the detector clip_zero_shot needs names to choose from: the concept (option flags) and what may be "
                f"there instead (option others); got {list(self.flags)} and {list(self.others)}"
            )
        if double := next((name for name in self.names if self.names.count(name) > 1 or not name.strip()), None):
            raise EvaluationError(f"the name {shown(double)} stands twice, or is empty: give different names")
        return ClipModel(self.model)

    @cached_property
    def texts(self) -> np.ndarray:
        """Unit features of each name, `(names, dim)`."""
        prompts = [template.replace("{}", name) for name in self.names for template in self.templates]
        each = _unit(self.clip.texts(prompts)).reshape(len(self.names), len(self.templates), -1)
        return _unit(each.mean(1))

    def recipe(self) -> Recipe:
        """Give all that the answers depend on."""
        folder = self.clip.folder
        files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".txt", ".safetensors")]
        return {
            "detector": self.name, "licence": self.licence, "weights": {path.name: sha256(path) for path in files},
            "known": False, "classes": list(self.names), "flags": list(self.flags), "threshold": self.threshold,
            "channels": "rgb", "side": 0, "unit": "image",
            "preprocessing": (
                f"that of the CLIP model; names {list(self.names)} in {list(self.templates)}, scale {self.scale}"
            ),
            "settings": {},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """Probability of each name."""
        if not images:
            return []
        logits = self.scale * _unit(self.clip.images(images)) @ self.texts.T
        grown = np.exp(logits - logits.max(1, keepdims=True))
        rows = (grown / grown.sum(1, keepdims=True)).tolist()
        return [Reading(dict(zip(self.names, row, strict=True))) for row in rows]

    def judge(self, reading: Reading) -> Finding:
        """Flag by the sum of the concept's names; the label is the most probable name."""
        score = min(1.0, sum(reading.scores[name] for name in self.flags))
        label = max(self.names, key=reading.scores.__getitem__)
        return Finding(score >= self.threshold, score, frozenset({label}), reading.scores)


def _unit(features: np.ndarray) -> np.ndarray:
    """Features of length one, in double precision."""
    wide = np.asarray(features, dtype=np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-12)
