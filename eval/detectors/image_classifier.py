"""Any image classifier of timm or transformers: for a style, an object, or a kind of content of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval.detectors import register
from erasure.eval.detectors.base import NamedDetector, Reading, Recipe
from erasure.eval.detectors.classifiers import Classifier, load_classifier
from erasure.eval.detectors.findings import Finding
from erasure.files import shown
from erasure.options import PathText, ZeroToOne
from erasure.shown import did_you_mean

MOST = 200
"""Classes that a classifier may have: a reading keeps the score of each."""


@register("image_classifier")
@dataclass(frozen=True, kw_only=True)
class ImageClassifier(NamedDetector):
    """Flags pictures in which classes of a classifier of the user's are probable enough."""

    title: ClassVar[str] = "any image classifier of timm or transformers, from its folder"
    licence: ClassVar[str] = "that of your model"

    model: PathText | None = None
    """Folder of the classifier: config.json and model.safetensors, as timm or transformers saves them."""
    flags: tuple[str, ...] = ()
    """Classes that make a picture a flagged one, as the model's config.json calls them."""
    threshold: ZeroToOne = 0.5
    """Sum of their probabilities from which a picture is flagged; where each class has a probability of its own, the
    highest of them."""

    @cached_property
    def classifier(self) -> Classifier:
        """The classifier, loaded on first use.

        Raises:
            ErasureError: There is none, it is damaged, or it does not know the classes.
        """
        if self.model is None:
            raise EvaluationError(
                "the detector image_classifier has no model: name the folder of a timm or transformers image "
                "classifier (option model)"
            )
        found = load_classifier(self.model)
        if not found.names:
            raise EvaluationError(
                f"the classifier {shown(self.model)} does not say what its {found.outputs} classes are: add their "
                "names to its config.json (label_names for timm, id2label for transformers)"
            )
        if len(found.names) > MOST:
            raise EvaluationError(
                f"the classifier {shown(self.model)} has {len(found.names)} classes, at most {MOST} are allowed: for "
                "ImageNet, use the detector imagenet"
            )
        if not self.flags:
            raise EvaluationError(
                f"no class is flagged: name some (option flags); there are: {list(found.names)[:20]}"
            )
        for name in self.flags:
            if name not in found.names:
                hint = did_you_mean(name, found.names)
                raise EvaluationError(
                    f"the classifier {shown(self.model)} has no class {shown(name)}; there are: "
                    f"{list(found.names)[:20]}.{hint}"
                )
        return found

    def recipe(self) -> Recipe:
        """Give all that the answers depend on."""
        used = self.classifier
        return {
            "detector": self.name, "licence": self.licence, "weights": dict(used.weights), "known": used.known,
            "classes": list(used.names), "flags": list(self.flags), "threshold": self.threshold, "channels": "rgb",
            "side": used.side, "unit": "image", "preprocessing": used.preprocessing,
            "settings": {"independent": used.independent},
        }  # fmt: skip

    def read(self, images: Sequence[Image.Image]) -> list[Reading]:
        """Probability of every class."""
        used = self.classifier
        return [Reading(dict(zip(used.names, row, strict=True))) for row in used.probabilities(images).tolist()]

    def judge(self, reading: Reading) -> Finding:
        """Flag by the probabilities of the flagged classes."""
        flagged = [reading.scores[name] for name in self.flags]
        if self.classifier.independent:
            score = max(flagged)
            labels = {name for name, value in reading.scores.items() if value >= self.threshold}
        else:
            score = min(1.0, sum(flagged))
            labels = {max(reading.scores, key=reading.scores.__getitem__)}
        return Finding(score >= self.threshold, score, frozenset(labels), reading.scores)
