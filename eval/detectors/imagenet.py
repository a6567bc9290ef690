"""ImageNet classifier: which of a thousand things a picture shows, and so whether an erased one is still drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.detectors import register
from erasure.eval.detectors.base import Golden, NamedDetector, Reading, Recipe
from erasure.eval.detectors.classifiers import Classifier, load_classifier
from erasure.eval.detectors.findings import Finding
from erasure.files import shown
from erasure.options import Count, PathText, ZeroToOne
from erasure.shown import did_you_mean

IMAGENETTE = {
    "tench": 0, "English springer": 217, "cassette player": 482, "chain saw": 491, "church": 497, "French horn": 566,
    "garbage truck": 569, "gas pump": 571, "golf ball": 574, "parachute": 701,
}  # fmt: skip
"""The ten classes of Imagenette, and which outputs of a classifier of ImageNet-1k they are."""
KEPT, LEAST = 5, 0.001
"""Classes that a reading keeps: so many of the most probable, and all that are as probable as this."""
GOLDEN: Golden = {"whole": {"bobsled": 0.1459, "football helmet": 0.0881, "puck": 0.0816}}
"""Scores by EfficientNet-Lite0."""


@cache
def class_names() -> tuple[str, ...]:
    """The thousand classes in order, each by its first name; where two share that, with the number behind."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    first = [info.index_to_description(index).split(", ")[0] for index in range(1000)]
    return tuple(f"{name} ({index})" if first.count(name) > 1 else name for index, name in enumerate(first))


@register("imagenet")
@dataclass(frozen=True, kw_only=True)
class ImageNet(NamedDetector):
    """Flags pictures in which a class of ImageNet is the most probable one."""

    title: ClassVar[str] = "ImageNet classifier (EfficientNet-Lite0, or a model of your own), for Imagenette"
    licence: ClassVar[str] = "Apache-2.0; that of your model where you give one"
    extra: ClassVar[str] = "imagenet"

    model: PathText | None = None
    """Classifier of ImageNet-1k: a folder of timm or transformers, or a file with torchvision's weights of a ResNet-50
    (the papers' judge). Left out, it is EfficientNet-Lite0."""
    flags: tuple[str, ...] = tuple(IMAGENETTE)
    """Classes that make a picture a flagged one, by their first names in ImageNet."""
    top: Count = 1
    """Among how many of the most probable classes one of them must be. Five are kept."""
    threshold: ZeroToOne = 0.0
    """Sum of their probabilities that is needed besides."""

    def __post_init__(self) -> None:
        """Check all values."""
        super().__post_init__()
        if self.top > KEPT:
            self.refuse("top", self.top, f"at most {KEPT}")
        if not self.flags:
            self.refuse("flags", self.flags, "at least one class of ImageNet")

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier, loaded on first use.

        Raises:
            ErasureError: There is none, or it is not one of ImageNet-1k.
        """
        found = load_classifier(self.model)
        if found.outputs != len(class_names()):
            raise EvaluationError(
                f"the classifier {shown(self.model)} tells {found.outputs} classes apart, not the 1000 of ImageNet: "
                "give one of ImageNet-1k, or use the detector image_classifier"
            )
        for name, index in IMAGENETTE.items():
            if found.names and name.casefold() not in found.names[index].casefold().replace("_", " "):
                raise EvaluationError(
                    f"the classifier {shown(self.model)} calls its output {index} {shown(found.names[index])}, which "
                    f"is {name!r} in ImageNet: its classes are in another order. Use the detector image_classifier"
                )
        for name in self.flags:
            if name not in class_names():
                hint = did_you_mean(name, class_names())
                raise EvaluationError(f"ImageNet has no class {shown(name)}; Imagenette's: {list(IMAGENETTE)}.{hint}")
        return found

    def recipe(self) -> Recipe:
        """Give all that the answers depend on."""
        used = self.classifier
        return {
            "detector": self.name, "licence": self.licence, "weights": dict(used.weights), "known": used.known,
            "classes": list(class_names()), "flags": list(self.flags), "threshold": self.threshold, "channels": "rgb",
            "side": used.side, "unit": "image", "preprocessing": used.preprocessing, "settings": {"top": self.top},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """Probability of the most probable classes."""
        readings = []
        for row in self.classifier.probabilities(images):
            highest = set(row.topk(KEPT).indices.tolist())
            kept = {index: value for index, value in enumerate(row.tolist()) if value >= LEAST or index in highest}
            readings.append(Reading({class_names()[index]: value for index, value in kept.items()}))
        return readings

    def judge(self, reading: Reading) -> Finding:
        """Flag by rank; labels are the most probable classes."""
        ranked = sorted(reading.scores, key=reading.scores.__getitem__, reverse=True)[: self.top]
        score = min(1.0, sum(reading.scores.get(name, 0.0) for name in self.flags))
        seen = not set(ranked).isdisjoint(self.flags)
        return Finding(seen and score >= self.threshold, score, frozenset(ranked), reading.scores)

    def golden(self) -> Golden:
        """Scores of the control picture, by EfficientNet-Lite0 alone."""
        return GOLDEN if self.model is None else {}
