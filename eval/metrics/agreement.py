"""Whether two detectors say the same of the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from erasure.eval.evidence import Evidence
from erasure.eval.metrics import Metric, register
from erasure.eval.rows import Record, Row, flag_of
from erasure.eval.statistics import cluster_bootstrap, too_many_missing, transitions


def cohens_kappa(first: np.ndarray, second: np.ndarray) -> float:
    """Cohen's kappa of two series of yes and no (Cohen 1960): `(po - pe) / (1 - pe)`.

    `po` is the share of pairs that agree, `pe` the share that would if both said yes as often and independently.

    Args:
        first: Answers of one, `(pictures,)` of booleans, at least one.
        second: Answers of the other, `(pictures,)`.

    Returns:
        1 where all agree, 0 where as many do as by chance, down to -1. Where both only ever say the same one thing,
        chance explains all of it and the ratio is 0 / 0: 1 here, because they agree.
    """
    agreed = float((first == second).mean())
    yes, other = float(first.mean()), float(second.mean())
    chance = yes * other + (1 - yes) * (1 - other)
    return 1.0 if agreed == 1.0 else (agreed - chance) / (1 - chance)


@register("agreement")
class Agreement(Metric):
    """Cohen's kappa of every two detectors whose flags are counted, over all images that both can judge.

    `pairs` counts images that both flag, that one of them flags, and that neither does.
    """

    title = "Agreement of two detectors"
    about = "Cohen's kappa of what two detectors flag: 1 where they always agree, 0 where as often as by chance"
    definition = (
        "Cohen's kappa of the flags of two detectors over all images that both can judge; interval: cluster bootstrap "
        "by prompt"
    )
    bounds = (-1.0, 1.0)
    needs = ("detectors",)

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where fewer than two detectors flag."""
        return [
            self._row(evidence, variant, rows, first, second)
            for first, second in combinations(evidence.flagging, 2)
            for variant, rows in evidence.rows.items()
            if rows
        ]

    def _row(self, evidence: Evidence, variant: str, rows: Sequence[Row], first: str, second: str) -> Record:
        both = [(row, flag_of(row, first), flag_of(row, second)) for row in rows]
        judged = [(row, bool(one), bool(other)) for row, one, other in both if one is not None and other is not None]
        recipes = {label: evidence.detectors[label]["recipe"] for label in (first, second)}
        row: Record = {
            "name": f"{self.name}[{first} / {second}]", "concept": evidence.concept, "variant": variant,
            "value": None, "low": None, "high": None, "n": len(judged),
        }  # fmt: skip
        if missing := len(rows) - len(judged):
            row["missing"] = missing
        reason = too_many_missing(missing, len(rows))
        if reason is None:
            one, other = (np.asarray([pair[index] for pair in judged], dtype=bool) for index in (1, 2))
            counts = transitions(one.tolist(), other.tolist())
            named = {
                "both": counts["both"], f"{first} only": counts["before_only"],
                f"{second} only": counts["after_only"], "neither": counts["neither"],
            }  # fmt: skip
            row["pairs"] = named
            if (one == one[0]).all() and (other == one[0]).all():
                reason = (
                    f"both detectors say {'yes' if one[0] else 'no'} of every image, so that nothing tells agreement "
                    "from chance"
                )
            else:
                interval = cluster_bootstrap(
                    lambda picked: cohens_kappa(one[picked], other[picked]),
                    [each["prompt"] for each, *_ in judged], seed=evidence.plan.seed,
                )  # fmt: skip
                row |= {**interval._asdict(), "interval": "cluster bootstrap by prompt"}
        if reason is not None:
            row["reason"] = reason
        return row | {"recipe": evidence.recipe(self.definition, detectors=recipes)}
