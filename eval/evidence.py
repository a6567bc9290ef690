"""What metrics are computed from: the rows of an evaluation, image features, and the controls of its suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from erasure.eval.controls import Control, Controls
from erasure.eval.metrics.clip_score import cosine
from erasure.eval.metrics.outcomes import collect
from erasure.eval.rows import Record, Row, Rows
from erasure.eval.suites import Plan

if TYPE_CHECKING:
    from erasure.eval.metrics.clip_score import ClipModel


CAPTIONS = 200
"""Images on which the CLIP model is tried, at most."""


@dataclass(frozen=True)
class Evidence:
    """What an evaluation has found out, for metrics to be computed from."""

    plan: Plan
    rows: Rows
    """Rows of the samples by variant."""
    features: Mapping[tuple[str, str], np.ndarray] = field(default_factory=dict)
    """Image features by sample id and variant."""
    clip: ClipModel | None = None
    clip_missing: str | None = None
    """Why there is no CLIP model."""
    controls: Sequence[Control] = ()
    """Controls of the suite."""
    detectors: Mapping[str, Record] = field(default_factory=dict)
    """Detectors by label, as results hold them: `recipe`, `self_test` and `controls`."""
    flagging: Sequence[str] = ()
    """Labels of those whose flags are counted."""

    @property
    def concept(self) -> str | None:
        """Label of what was erased."""
        return self.plan.concept

    @property
    def control_failure(self) -> str | None:
        """Why no number means anything, where a control of the suite fails."""
        return next((failure for control in self.controls if (failure := control.failure)), None)

    @property
    def before(self) -> Sequence[Row]:
        """Rows of the stock model; none where it was not drawn."""
        return self.rows.get("before", ())

    def unseen(self, label: str) -> str | None:
        """Say why no rate of a detector's flags is given: the stock model's images do not show it the concept.

        Args:
            label: Of the detector.
        """
        control = next((each for each in self.controls if each.name == f"control_flagged[{label}]"), None)
        if not self.before or control is None:
            return f"there are no images of the stock model to check the detector {label} with"
        if not control.outcomes.hits and not control.outcomes.lost:
            return f"no prompt asks for the concept, so that nothing shows whether the detector {label} would see it"
        return control.failure

    @cached_property
    def captions(self) -> Control:
        """The control of the CLIP model: the stock model's images must be closer to their own captions than to others.

        Each image is held against the caption that stands half of the list further on.
        """
        rows = list(self.before)[:CAPTIONS]
        keys = [(row["sample_id"], "before") for row in rows]
        vectors = {index: self.features[key] for index, key in enumerate(keys) if key in self.features}
        outcomes: list[tuple[Row, str, bool | None]] = [(row, row["sample_id"], None) for row in rows]
        if self.clip is not None and vectors:
            prompts = [row["prompt"] for row in rows]
            texts = self.clip.texts(prompts)
            for index, vector in vectors.items():
                other = (index + len(rows) // 2) % len(rows)
                if prompts[other] == prompts[index]:
                    continue
                both = cosine(np.stack([vector] * 2), texts[[index, other]])
                outcomes[index] = (rows[index], rows[index]["sample_id"], bool(both[0] > both[1]))
        what = "the CLIP model finds an image closer to its own caption than to another"
        return Control("control_caption", None, collect(outcomes), True, what, who="the CLIP model")

    @cached_property
    def answers(self) -> Controls:
        """Controls of the judge's answers on the stock model's rows, for the metrics that ask for single ones."""
        return Controls(self.plan, self.before)

    @cached_property
    def reasons(self) -> Mapping[str, Mapping[str, str | None]]:
        """Why rates of the judge's answers are not given, by variant and metric; see `Controls.reasons`."""
        return {variant: self.answers.reasons(table) for variant, table in self.rows.items()}

    def recipe(self, definition: str, **more: object) -> Record:
        """Recipe of a metric: that of the plan, with the metric's definition."""
        return {**self.plan.recipe, "metric": definition, **more}
