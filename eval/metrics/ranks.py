"""How far down a classifier's list the erased class has gone, and whether what is most like it survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from erasure.eval.evidence import Evidence
from erasure.eval.metrics import SHARE, Metric, register
from erasure.eval.metrics.clip_score import cosine
from erasure.eval.metrics.outcomes import collect, correct, expected, holds, paired, rate_row
from erasure.eval.rows import Record, Row, finding_of
from erasure.eval.suites import Target

DECILES = 10
"""Groups of names by how like they are to the target's."""


def head_of(evidence: Evidence) -> str | None:
    """Label of the detector that says which class an image shows; `None` where there is none.

    Args:
        evidence: What was found out.
    """
    heads = [label for label in evidence.detectors if label not in evidence.flagging]
    return "object" if "object" in heads else heads[0] if heads else None


def rank(scores: Mapping[str, float], members: Sequence[str]) -> int:
    """Place of the likeliest of some classes in a classifier's list, 1 for the first.

    Args:
        scores: Score by class, of the likeliest classes at least.
        members: The classes. Where the list has none of them, they stand behind all that it has.
    """
    own = [scores[name] for name in members if name in scores]
    return len(scores) + 1 if not own else 1 + sum(score > max(own) for score in scores.values())


class Unranked(Metric):
    """1 - share of the images of target prompts on which the target is among the likeliest classes."""

    higher_is_better = True
    bounds = SHARE
    unit = "%"
    needs = ("detectors", "targets")
    among: ClassVar[int]
    """How many classes of the list are looked at."""

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where no detector tells classes apart."""
        label, targets = head_of(evidence), [t for t in evidence.plan.targets if t.domain == "object"]
        if label is None or not targets:
            return []
        classes = evidence.detectors[label]["recipe"]["classes"]
        few = (
            None if len(classes) > self.among
            else f"the detector {label} tells {len(classes)} classes apart, so that any is among the {self.among} "
            "likeliest"
        )  # fmt: skip
        found: list[Record] = []
        tables = {}
        for variant, rows in evidence.rows.items():
            asked = [row for row in rows if row["role"] == "target"]
            outcomes = collect([(row, row["sample_id"], self.gone(row, label, targets)) for row in asked])
            tables[variant] = outcomes
            row = rate_row(
                self.name, evidence.concept, variant, outcomes,
                evidence.recipe(self.definition, detector=evidence.detectors[label]["recipe"]),
                missing_as=False, withheld=few or evidence.reasons[variant]["UA"],
            )  # fmt: skip
            if variant == "after" and row["value"] is not None and "before" in tables:
                row |= paired(tables["before"], outcomes)
            found.append(row)
        return found

    def gone(self, row: Row, label: str, targets: Sequence[Target]) -> bool | None:
        """Whether no target that a prompt asks for is among the likeliest classes of its image.

        Args:
            row: Of the image.
            label: Of the detector.
            targets: Targets among the classes.
        """
        finding = finding_of(row, label)
        own = holds(row, targets)
        if finding is None or not own:
            return None
        return all(rank(finding["scores"], target.members) > self.among for target in own)


@register("UA_top3")
class UnlearningAccuracyTop3(Unranked):
    """Unlearning accuracy, among the three likeliest classes."""

    title = "Unlearning accuracy, top 3"
    about = "images of the target on which it is not even among the three likeliest classes"
    definition = "1 - share of the images of target prompts on which the target is among the 3 likeliest classes"
    among = 3


@register("UA_top5")
class UnlearningAccuracyTop5(Unranked):
    """Unlearning accuracy, among the five likeliest classes."""

    title = "Unlearning accuracy, top 5"
    about = "images of the target on which it is not even among the five likeliest classes"
    definition = "1 - share of the images of target prompts on which the target is among the 5 likeliest classes"
    among = 5


@register("IRA_nearest")
class RetainedByLikeness(Metric):
    """Accuracy on the tenth of the other names that is most like the target's, by a CLIP model's text features.

    The other names are those of the target's own kind: styles for a style. `groups` has all tenths, the least alike
    first; of fewer than ten names each is a group of its own.
    """

    title = "Kept, names most like the target's"
    about = "others of its kind still recognised, of the tenth whose names are most like the target's"
    definition = (
        "accuracy on the tenth of the retained classes whose names are nearest to the target's, by the cosine of a "
        "CLIP model's text features"
    )
    higher_is_better = True
    bounds = SHARE
    unit = "%"
    needs = ("judge", "targets", "clip")

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where nothing is retained."""
        targets = evidence.plan.targets
        domains = sorted({target.domain for target in targets})
        # What else of the targets' kind every image shows that was to stay.
        kept = {
            variant: [
                (row, domain, name)
                for row in rows
                if not holds(row, targets)
                for domain in domains
                if (name := expected(row, domain)) is not None
            ]
            for variant, rows in evidence.rows.items()
        }
        names = sorted({name for each in kept.values() for _, _, name in each})
        if not names:
            return []
        withheld = evidence.clip_missing if evidence.clip is None else None
        groups = [names] if evidence.clip is None else by_likeness(names, self._likeness(evidence, names))
        found: list[Record] = []
        for variant, shown in kept.items():
            tables = [
                collect(
                    [
                        (row, f"{row['sample_id']}/{domain}", correct(row, domain))
                        for row, domain, name in shown
                        if name in group
                    ]
                )
                for group in groups
            ]
            made = rate_row(
                self.name, evidence.concept, variant, tables[-1],
                evidence.recipe(
                    self.definition, nearest=groups[-1],
                    clip=None if evidence.clip is None else evidence.clip.fingerprint,
                ),
                missing_as=False, withheld=withheld or evidence.reasons[variant]["IRA"],
            )  # fmt: skip
            if made["value"] is not None:
                made["groups"] = {
                    f"{place + 1} of {len(groups)}: {group[0] if len(group) == 1 else f'{len(group)} names'}": round(
                        table.rate(), 4
                    )
                    for place, (group, table) in enumerate(zip(groups, tables, strict=True))
                    if table.hits
                }
            found.append(made)
        return found

    @staticmethod
    def _likeness(evidence: Evidence, names: Sequence[str]) -> np.ndarray:
        """Cosine of each name to the target that it is nearest to, `(names,)`."""
        assert evidence.clip is not None
        own = evidence.clip.texts([target.name for target in evidence.plan.targets])
        texts = evidence.clip.texts(list(names))
        return np.stack([cosine(texts, np.broadcast_to(one, texts.shape)) for one in own]).max(0)


def by_likeness(names: Sequence[str], likeness: np.ndarray) -> list[list[str]]:
    """Names in tenths by how like they are, the least first; each alone where they are fewer than ten.

    Args:
        names: At least one.
        likeness: Of each, `(names,)`.
    """
    order = [names[index] for index in np.argsort(likeness, kind="stable")]
    parts = np.array_split(np.arange(len(order)), min(DECILES, len(order)))
    return [[order[index] for index in part] for part in parts]
