"""What a stress test draws in: the erased model or the stock model, changed in some way; and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from erasure.eval.attempts import Change, unchanged
from erasure.eval.controls import COLLAPSED, Control
from erasure.eval.evidence import Evidence
from erasure.eval.metrics.outcomes import Outcomes, collect
from erasure.eval.rows import Record, Row
from erasure.eval.variants import Variant

if TYPE_CHECKING:
    from PIL import Image

Sees: TypeAlias = "Callable[[Sequence[Image.Image]], list[bool]]"
"""Whether each picture shows a thing that the suite's judge does not know."""

WHOLE = ("target", "retain")
"""Roles of the samples that a condition of the erased model draws."""


@dataclass(frozen=True)
class Condition(Variant):
    """A model in which samples are drawn. `erased` says whether `change` gets the erased model or the stock model."""

    change: Change = unchanged
    """Change of the model while this condition is drawn."""
    about: str = ""
    """What it is, in a few words, for messages and reports."""
    roles: tuple[str, ...] = WHOLE
    """Roles of the samples that are drawn."""
    control: Literal["", "positive", "negative"] = ""
    """Whether this is a control: of a positive one the images must show the concept, of a negative one they must
    not."""
    needs: tuple[str, ...] = ()
    """Names of the controls that must hold for a verdict on this condition."""
    compared: bool = False
    """Whether the question is if this condition brings the concept back."""
    sees: Sees | None = None
    """Looks for another thing than the concept; the suite's judge looks for the concept where it is left out."""
    thing: str | None = None
    """What `sees` looks for."""
    curve: str = ""
    """Name of the curve that this condition is a point of, if any."""
    step: int = 0
    """Place on the curve: steps of training."""


def with_control(name: str, change: Change, done: str, done_to_stock: str) -> list[Condition]:
    """Make a condition, preceded by its control: the stock model with the same change, which must show the concept.

    Args:
        name: Of the condition; that of its control begins with `stock_`.
        change: Of either model.
        done: What it does to the erased model, in a few words.
        done_to_stock: The same of the stock model.
    """
    control = f"stock_{name}"
    return [
        Condition(
            control, erased=False, change=change, about=done_to_stock, roles=("target",), control="positive"
        ),
        Condition(name, change=change, about=done, needs=(control,), compared=True),
    ]  # fmt: skip


STOCK = Condition("before", erased=False, about="the stock model")
ERASED = Condition("after", about="the erased model as it is")


def outcomes_of(rows: Sequence[Row], field_name: str = "shown", role: str | None = None) -> Outcomes:
    """Give the outcomes of one condition's rows, by a field of the rows.

    Args:
        rows: The rows.
        field_name: `shown` for the concept, `right` for what a retained prompt asks for.
        role: Only samples of this role.
    """
    chosen = [row for row in rows if role in (None, row["role"])]
    # Without the suite's weights: these are counts of prompts, and those of one concept weigh the same.
    return collect([({"prompt": row["prompt"]}, row["sample_id"], row[field_name]) for row in chosen])


@dataclass(frozen=True)
class StressEvidence(Evidence):
    """Evidence of a stress test: the rows by condition, and the conditions themselves."""

    conditions: Mapping[str, Condition] = field(default_factory=dict)
    measured: Mapping[str, Record] = field(default_factory=dict)
    """Figures that need no image, see `StressTest.measured`."""

    @property
    def control_failure(self) -> str | None:
        """Why no number means anything, where a control of the suite fails; one without any image fails too."""
        return next((failure for control in self.controls if (failure := failure_of(control))), None)

    def outcomes(self, name: str) -> Outcomes:
        """Give whether the images of a condition show its concept, without those of retained prompts."""
        return outcomes_of([row for row in self.rows.get(name, ()) if row["role"] != "retain"])

    def label(self, name: str) -> str | None:
        """Give the label of what a condition looks for."""
        return self.conditions[name].thing or self.concept

    def failure(self, name: str) -> str | None:
        """Say why a condition has no verdict; `None` where it has one."""
        if (failure := self.control_failure) is not None:
            return failure
        for needed in self.conditions[name].needs:
            if (failure := failure_of(self.changed(needed))) is not None:
                return failure
        kept = outcomes_of(self.rows.get(name, ()), "right", "retain")
        if kept.hits and kept.rate() < COLLAPSED:
            return (
                f"the changed model draws next to nothing of what is asked for: on prompts without the concept, the "
                f"judge sees the object in {kept.rate():.0%} of {len(kept.hits)} images; at least {COLLAPSED:.0%} are "
                "needed for the absence of the concept to mean anything"
            )
        return None

    def changed(self, name: str) -> Control:
        """Make the control of a condition."""
        condition = self.conditions[name]
        seen = "must show" if condition.control == "positive" else "must not show"
        what = f"the judge sees {self.label(name)!r} where {condition.about} ({seen} it)"
        return Control(
            "control_changed",
            f"{self.label(name)} ({name})",
            self.outcomes(name),
            condition.control == "positive",
            what,
        )


def failure_of(control: Control) -> str | None:
    """Say why a control fails, as one without any image does; `None` where it holds."""
    if not control.outcomes.hits and not control.outcomes.lost:
        return f"{control.name} has no image: {control.what}"
    return control.failure
