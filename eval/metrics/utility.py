"""What the erasure costs elsewhere: drift, CLIP score and feature distances on retained prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from erasure.errors import EvaluationError
from erasure.eval.metrics import distances
from erasure.eval.rows import Record, Row
from erasure.eval.statistics import cluster_bootstrap, paired_bootstrap, too_many_missing
from erasure.eval.suites import Plan, Rows


class FeatureSpace(Protocol):
    """A CLIP model, as far as its numbers are named after it."""

    @property
    def name(self) -> str:
        """Name in results."""

    @property
    def fingerprint(self) -> str:
        """Fingerprint that tells it from others of that name."""


def utility_metrics(
    plan: Plan,
    rows: Rows,
    features: Mapping[tuple[str, str], np.ndarray],
    clip: FeatureSpace | None,
    clip_missing: str | None = None,
) -> list[Record]:
    """Metric rows `clip_score`, `clip_score_target`, `drift`, `drift_feature`, `fid[...]`, `cmmd[...]`, `kid[...]`.

    Those with brackets name the feature space in them; without one they are called `fid`, `cmmd` and `kid`.

    Args:
        plan: Samples and recipe.
        rows: Result rows by variant.
        features: Image features by sample id and variant.
        clip: The CLIP model.
        clip_missing: Why there is none.
    """
    found: list[Record] = []
    stamp = plan.recipe | {"clip": f"{clip.name} ({clip.fingerprint})" if clip else None}
    space = f"[{clip.name}]" if clip else ""

    def add(
        name: str, variant: str, prompts: str, definition: str, compute: Callable[[], Record], **more: object
    ) -> None:
        row: Record = {"name": name, "concept": plan.concept, "variant": variant}
        recipe = stamp | {"metric": definition, "prompts": prompts} | more
        try:
            row |= compute()
        except EvaluationError as error:
            reason = clip_missing or str(error) if name != "drift" else str(error)
            row |= {"value": None, "low": None, "high": None, "n": 0, "reason": reason}
        found.append(row | {"recipe": recipe})

    before = rows.get("before", [])
    for variant, table in rows.items():
        kept, target = _split(table)
        cosine = "mean of max(cosine of image and prompt, 0)"
        old = before if variant == "after" else []
        for name, part, prompts in (("clip_score", kept, "retained"), ("clip_score_target", target, "target")):
            if part:
                add(name, variant, prompts, cosine, partial(_clip_mean, part, old, plan.seed))
    if "after" not in rows:
        return found
    kept, _ = _split(rows["after"])
    add("drift", "after", "retained", "mean absolute pixel difference, 0-1, same noise",
        lambda: sample_mean(kept, _drift_value("pixel"), plan.seed, "drift"))  # fmt: skip
    add("drift_feature", "after", "retained", "1 - cosine of image features, same noise",
        lambda: sample_mean(kept, _drift_value("feature"), plan.seed, "drift"))  # fmt: skip
    pairs = [
        (features[row["sample_id"], "before"], features[row["sample_id"], "after"])
        for row in kept
        if (row["sample_id"], "before") in features and (row["sample_id"], "after") in features
    ]
    reference = "images of the stock model for the same prompts and noise"
    small = plan.size == "full"

    def distance(compute: Callable[[np.ndarray, np.ndarray], float]) -> Record:
        if not pairs:
            raise EvaluationError("no image features")
        if reason := too_many_missing(len(kept) - len(pairs), len(kept)):
            raise EvaluationError(reason)
        first, second = (np.stack(side) for side in zip(*pairs, strict=True))
        found: Record = {"value": compute(first, second), "low": None, "high": None, "n": len(pairs)}
        return found | ({"missing": len(kept) - len(pairs)} if len(pairs) < len(kept) else {})

    add(f"fid{space}", "after", "retained", "Frechet distance of Gaussians, float64, eigenvalues",
        lambda: distance(lambda a, b: distances.frechet(a, b, allow_small=small)),
        reference=reference, small_samples="accepted" if small else "refused")  # fmt: skip
    add(f"cmmd{space}", "after", "retained", "1000 x unbiased MMD^2, Gaussian kernel, sigma 10, pairs left out",
        lambda: distance(partial(distances.cmmd, paired=True)), reference=reference)  # fmt: skip
    add(f"kid{space}", "after", "retained", "unbiased MMD^2, cubic kernel, all images, pairs left out",
        lambda: distance(partial(distances.kid, paired=True)), reference=reference)  # fmt: skip
    return found


def _split(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Retained and target rows."""
    return [row for row in rows if row["role"] != "target"], [row for row in rows if row["role"] == "target"]


def _clip_value(row: Row) -> float | None:
    value = row.get("clip_score")
    return None if value is None else min(max(value, 0.0), 1.0)


def _drift_value(kind: str) -> Callable[[Row], float | None]:
    return lambda row: (row.get("drift") or {}).get(kind)


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
