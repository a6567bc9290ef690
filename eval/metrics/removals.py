"""Metrics of objects taken out of scenes: whether they are gone, and what is in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from erasure.eval.evidence import Evidence
from erasure.eval.metrics import register
from erasure.eval.metrics.clip_score import cosine
from erasure.eval.metrics.comparisons import ComparedLikeness, ComparedMean, ComparedRate
from erasure.eval.rows import Row, judged_of
from erasure.eval.suites import Plan, Rows
from erasure.eval.suites.removal import MARGIN, MOST, plate

if TYPE_CHECKING:
    from erasure.eval.metrics.clip_score import ClipModel


@register("object_gone")
class ObjectGone(ComparedRate):
    """Whether the judge no longer sees what was removed."""

    title = "Object gone"
    about = "the judge does not see what was removed"
    definition = "the object is not seen any more (score below 0.5)"
    higher_is_better = True

    def hit(self, row: Row) -> bool | None:
        """See `ComparedRate.hit`."""
        judged = judged_of(row)
        return None if judged is None else row["objects"][0] not in judged["objects"]


class Decibels(ComparedMean):
    """Peak signal-to-noise ratio against the scene without the object, in some place."""

    higher_is_better = True
    bounds = (None, MOST)
    unit = "dB"
    needs = ("truth",)

    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """What the suite measured of a row's image."""
        return lambda row: row["measured"].get(self.name)


@register("psnr_fill")
class DecibelsOfFill(Decibels):
    """PSNR on the object's pixels."""

    title = "PSNR in its place"
    about = "dB against the scene without the object"
    definition = "dB against the scene without the object, on the object's pixels"


@register("psnr_outside")
class DecibelsOutside(Decibels):
    """PSNR on all other pixels."""

    title = "PSNR elsewhere"
    about = "dB, all other pixels"
    definition = "the same, on all other pixels"


@register("psnr_background")
class DecibelsOfBackground(Decibels):
    """PSNR well away from the object."""

    title = "PSNR of the background"
    about = "dB, well away from the object"
    definition = f"the same, more than {MARGIN} pixels away from it; equal pixels count as {MOST:g} dB"


@register("fill_similarity")
class FillSimilarity(ComparedLikeness):
    """Cosine of each result with the scene without the object."""

    title = "Likeness to the truth"
    about = "CLIP cosine with the scene without the object"
    definition = "cosine of CLIP features with those of the scene without the object"
    needs = ("clip", "truth")

    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """See `likeness`."""
        assert evidence.clip is not None
        near = likeness(evidence.plan, evidence.rows, evidence.features, evidence.clip)
        return lambda row: near[row["sample_id"], row["variant"]]


@register("seed_consensus")
class SeedConsensus(ComparedLikeness):
    """Cosine between results of one scene."""

    title = "Consensus of seeds"
    about = "CLIP cosine between results of one scene"
    definition = "mean cosine of CLIP features between results of one scene with different noise"

    def values(self, evidence: Evidence) -> Callable[[Row], float | None]:
        """See `consensus`."""
        alike = consensus(evidence.rows, evidence.features)
        return lambda row: alike[row["sample_id"], row["variant"]]


def likeness(
    plan: Plan, rows: Rows, features: Mapping[tuple[str, str], np.ndarray], clip: ClipModel
) -> dict[tuple[str, str], float | None]:
    """Cosine of each result with its scene without the object, by sample and variant."""
    clean = dict(
        zip(
            (sample.sample_id for sample in plan.samples),
            clip.images([Image.fromarray(plate(sample).clean) for sample in plan.samples]),
            strict=True,
        )
    )
    keys = [(row["sample_id"], variant) for variant, table in rows.items() for row in table]
    return {
        key: float(cosine(features[key][None], clean[key[0]][None])[0]) if key in features else None for key in keys
    }


def consensus(rows: Rows, features: Mapping[tuple[str, str], np.ndarray]) -> dict[tuple[str, str], float | None]:
    """Mean cosine of each result with the others of its scene, by sample and variant."""
    found: dict[tuple[str, str], float | None] = {}
    for variant, table in rows.items():
        scenes: dict[str, list[str]] = {}
        for row in table:
            scenes.setdefault(row["prompt"], []).append(row["sample_id"])
        for members in scenes.values():
            for one in members:
                pairs = [(one, other) for other in members if other != one]
                known = [p for p in pairs if all((name, variant) in features for name in p)]
                values = [cosine(features[a, variant][None], features[b, variant][None])[0] for a, b in known]
                found[one, variant] = float(np.mean(values)) if values else None
    return found
