"""Metrics of prompts that name two things: which of them the judge sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from erasure.assets.world import noun_phrase
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import SHARE, register
from erasure.eval.metrics.clip_score import cosine
from erasure.eval.metrics.comparisons import ComparedLikeness, ComparedMean, ComparedRate, rates
from erasure.eval.rows import Record, Row, judged_of
from erasure.eval.suites import Rows
from erasure.eval.suites.composition import TEMPLATES

if TYPE_CHECKING:
    from erasure.eval.metrics.clip_score import ClipModel

SEEN = "both objects of the prompt are seen (score of each at least 0.5)"


@register("both_found")
class BothFound(ComparedRate):
    """Whether the judge sees both things of the prompt."""

    title = "Both found"
    about = "the judge sees both things of the prompt"
    definition = SEEN
    higher_is_better = True

    def hit(self, row: Row) -> bool | None:
        """See `ComparedRate.hit`."""
        judged = judged_of(row)
        return None if judged is None else set(row["objects"]) <= set(judged["objects"])


@register("both_found_beside_attend_and_excite")
class BothFoundBesideAttendAndExcite(BothFound):
    """The same, tested against Attend-and-Excite."""

    title = "Both found, beside Attend-and-Excite"
    about = "the same, tested against Attend-and-Excite in the place of the stock model"
    against = "attend_and_excite"

    def compute(self, evidence: Evidence) -> list[Record]:
        """Rows of the ways that are compared with it; the stock model is left out."""
        if self.against not in evidence.rows:
            return []
        others = {variant: table for variant, table in evidence.rows.items() if variant != "stock"}
        found = rates(self.name, self.definition, evidence.plan, others, self.hit, self.against)
        return [row for row in found if "against" in row]


class BothFoundInTemplate(BothFound):
    """The same over the prompts of one template."""

    template: ClassVar[str]

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `rates`; nothing where a way has no such prompt."""
        own = {
            variant: [row for row in table if row["scene"]["template"] == self.template]
            for variant, table in evidence.rows.items()
        }
        if not all(own.values()):
            return []
        return rates(self.name, self.definition, evidence.plan, own, self.hit)


@register("both_found_template_1")
class BothFoundWithArticles(BothFoundInTemplate):
    """Prompts with articles."""

    title = "Both found, with articles"
    about = "the same, on the prompts that name the things with their articles"
    definition = f"{SEEN}; {TEMPLATES[0]}"
    template = TEMPLATES[0]


@register("both_found_template_2")
class BothFoundWithoutArticles(BothFoundInTemplate):
    """Prompts without articles."""

    title = "Both found, without articles"
    about = "the same, on the prompts that name the things without articles"
    definition = f"{SEEN}; {TEMPLATES[1]}"
    template = TEMPLATES[1]


@register("objects_found")
class ObjectsFound(ComparedMean):
    """Share of the prompt's things that are seen."""

    title = "Objects found"
    about = "share of the things that it sees"
    definition = "share of the prompt's objects that are seen"
    higher_is_better = True
    bounds = SHARE
    unit = "%"
    needs = ("judge",)

    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """Half for each of two things."""

        def share(row: Row) -> float | None:
            judged = judged_of(row)
            return None if judged is None else sum(name in judged["objects"] for name in row["objects"]) / 2

        return share


@register("clip_full")
class ClipOfPrompt(ComparedMean):
    """Cosine of image and prompt."""

    title = "CLIP, full prompt"
    about = "cosine of image and prompt"
    definition = "cosine of image and prompt"
    higher_is_better = True
    bounds = (-1.0, 1.0)
    needs = ("clip",)

    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """The score of a row."""
        return lambda row: row["clip_score"]


@register("clip_minimum_object")
class ClipOfLesserObject(ComparedLikeness):
    """Cosine with the thing that is less there."""

    title = "CLIP, lesser object"
    about = "cosine with the thing that is less there"
    definition = "cosine of image and 'a photo of' the object that is less like it"

    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """See `least_similarity`."""
        assert evidence.clip is not None
        least = least_similarity(evidence.rows, evidence.features, evidence.clip)
        return lambda row: least[row["sample_id"], row["variant"]]


def least_similarity(
    rows: Rows, features: Mapping[tuple[str, str], np.ndarray], clip: ClipModel
) -> dict[tuple[str, str], float | None]:
    """The lesser of the cosines of an image with each of its objects, by sample and variant."""
    found: dict[tuple[str, str], float | None] = {}
    for variant, table in rows.items():
        for row in table:
            vector = features.get((row["sample_id"], variant))
            words = clip.texts([f"a photo of {noun_phrase(name)}" for name in row["objects"]])
            each = None if vector is None else cosine(np.stack([vector] * len(words)), words)
            found[row["sample_id"], variant] = None if each is None else float(each.min())
    return found
