"""What the erasure costs elsewhere: CLIP score and drift on retained prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.evidence import Evidence
from erasure.eval.metrics import SHARE, Metric, register
from erasure.eval.rows import Record, Row
from erasure.eval.statistics import cluster_bootstrap, paired_bootstrap, too_many_missing


def sample_mean(
    rows: Sequence[Row], value: Callable[[Row], float | None], seed: int, scorer: str | None = None
) -> Record:
    """Mean with a bootstrap interval that draws prompts.

    Args:
        rows: Result rows.
        value: The number of a row, if it has one.
        seed: Of the bootstrap.
        scorer: Whose failures say why a row has none.
    """
    measured = [(value(row), row["prompt"]) for row in rows]
    values = np.array([v for v, _ in measured if v is not None], dtype=np.float64)
    why = next((each["failures"][scorer] for each in rows if scorer in each.get("failures", {})), None)
    if not len(values):
        raise EvaluationError("not measured on any sample" + (f"; the first: {why}" if why else ""))
    if reason := too_many_missing(len(rows) - len(values), len(rows)):
        raise EvaluationError(reason)
    prompts = [prompt for v, prompt in measured if v is not None]
    interval = cluster_bootstrap(lambda picked: float(values[picked].mean()), prompts, seed=seed)
    found = {**interval._asdict(), "n": len(values), "interval": "cluster bootstrap by prompt"}
    if len(values) < len(rows):
        found |= {"missing": len(rows) - len(values)} | ({"reason": f"the first missing: {why}"} if why else {})
    return found


def split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Retained and target rows."""
    return [row for row in rows if row["role"] != "target"], [row for row in rows if row["role"] == "target"]


def utility_row(
    metric: Metric, evidence: Evidence, variant: str, prompts: str, compute: Callable[[], Record], **more: object
) -> Record:
    """A row of what an erasure costs elsewhere, without a value where it cannot be had.

    Args:
        metric: What is computed.
        evidence: What it is computed from.
        variant: Label of the model.
        prompts: Which prompts it is of: `retained` or `target`.
        compute: Gives the value and its interval, or raises EvaluationError with the reason.
        **more: What else the number depends on.
    """
    clip = evidence.clip
    stamp = {"clip": f"{clip.name} ({clip.fingerprint})" if clip else None}
    row: Record = {"name": metric.name, "concept": evidence.concept, "variant": variant}
    try:
        row |= compute()
    except EvaluationError as error:
        lacks_clip = "clip" in metric.needs and evidence.clip_missing is not None
        reason = evidence.clip_missing if lacks_clip else str(error)
        row |= {"value": None, "low": None, "high": None, "n": 0, "reason": reason}
    return row | {"recipe": evidence.recipe(metric.definition, **stamp, prompts=prompts, **more)}


class ClipScore(Metric):
    """Mean cosine of images and their prompts, with its paired change against the stock model."""

    definition = "mean of max(cosine of image and prompt, 0)"
    bounds = SHARE
    needs = ("clip",)
    prompts: ClassVar[str]

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where there are no such prompts."""
        found = []
        for variant, table in evidence.rows.items():
            part = split(table)[self.prompts == "target"]
            before = evidence.before if variant == "after" else []
            if part:
                mean = partial(_clip_mean, part, before, evidence.plan.seed)
                found.append(utility_row(self, evidence, variant, self.prompts, mean))
        return found


@register("clip_score")
class ClipScoreOfRetained(ClipScore):
    """CLIP score of prompts that must survive."""

    title = "CLIP score, retained prompts"
    about = "cosine of image and prompt"
    higher_is_better = True
    prompts = "retained"


@register("clip_score_target")
class ClipScoreOfTarget(ClipScore):
    """CLIP score of prompts with a target."""

    title = "CLIP score, target prompts"
    about = "falls as the target goes"
    higher_is_better = False
    prompts = "target"


class Drift(Metric):
    """How far images of retained prompts move when only the erasure changes."""

    higher_is_better = False
    kind: ClassVar[str]

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where no erasure is in force."""
        if "after" not in evidence.rows:
            return []
        kept, _ = split(evidence.rows["after"])

        def moved(row: Row) -> float | None:
            return (row.get("drift") or {}).get(self.kind)

        mean = partial(sample_mean, kept, moved, evidence.plan.seed, "drift")
        return [utility_row(self, evidence, "after", "retained", mean)]


@register("drift")
class PixelDrift(Drift):
    """Mean absolute difference of pixels."""

    title = "Drift in pixels"
    about = "how far retained images moved, same noise"
    definition = "mean absolute pixel difference, 0-1, same noise"
    bounds = SHARE
    needs = ("pairs",)
    kind = "pixel"


@register("drift_feature")
class FeatureDrift(Drift):
    """One minus the cosine of image features."""

    title = "Drift in features"
    about = "1 - cosine of image features"
    definition = "1 - cosine of image features, same noise"
    bounds = (0.0, 2.0)
    needs = ("clip", "pairs")
    kind = "feature"


def _clip_value(row: Row) -> float | None:
    value = row.get("clip_score")
    return None if value is None else min(max(value, 0.0), 1.0)


def _clip_mean(rows: Sequence[Row], before: Sequence[Row], seed: int) -> Record:
    """Mean CLIP score, with its paired change (after minus before) where there is a before."""
    found = sample_mean(rows, _clip_value, seed)
    first = {row["sample_id"]: _clip_value(row) for row in before}
    pairs = [(first.get(row["sample_id"]), _clip_value(row), row["prompt"]) for row in rows]
    pairs = [pair for pair in pairs if None not in pair]
    if pairs:
        old, new, prompts = zip(*pairs, strict=True)
        found["change"] = paired_bootstrap(old, new, clusters=prompts, seed=seed)._asdict()
    return found
