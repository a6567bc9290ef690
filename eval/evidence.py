"""What metrics are computed from: the rows of an evaluation, image features, and the controls of its suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from erasure.eval.controls import Control, Controls
from erasure.eval.rows import Record, Row, Rows
from erasure.eval.suites import Plan

if TYPE_CHECKING:
    from erasure.eval.metrics.clip_score import ClipModel


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
