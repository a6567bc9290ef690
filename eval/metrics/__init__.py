"""Metrics: what is computed from the rows of an evaluation. Each says what it is called, and which way is better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from erasure.errors import EvaluationError
from erasure.eval.rows import metric_of
from erasure.registry import Facts, Registry

if TYPE_CHECKING:
    from erasure.eval.evidence import Evidence
    from erasure.eval.rows import Record, Row

# No import of torch here: reports and the command line read what metrics are called without it.

Need = Literal["judge", "detectors", "clip", "pairs", "targets", "truth", "attack", "stress"]
"""Answers of a judge; findings of detectors; a CLIP model; the stock model's image of the same noise; concepts to
erase; a picture that says what is right; an attack's rows; a stress test's."""
Bounds = tuple[float | None, float | None]
"""Least and greatest value; `None` where there is none."""
SHARE: Bounds = (0.0, 1.0)


class Metric(ABC):
    """A number with its interval, in every variant: subclass it and register it.

    It is registered as an instance, made without arguments.
    """

    name: str = ""
    """Name in results; `register` sets it."""
    title: ClassVar[str] = ""
    """What a report calls it."""
    about: ClassVar[str] = ""
    """What it is, in a few words."""
    definition: ClassVar[str] = ""
    """The same to the letter, for recipes."""
    higher_is_better: ClassVar[bool | None] = None
    """Which way speaks for an erasure (of an attack's rate: for the model that withstands); `None` where neither
    does."""
    bounds: ClassVar[Bounds] = (None, None)
    """Least and greatest value."""
    unit: ClassVar[str] = ""
    """`%` for a share, which is shown in per cent; `dB`; or none."""
    needs: ClassVar[tuple[Need, ...]] = ()
    """What must be there for it to be computed."""
    is_control: ClassVar[bool] = False
    """Whether it says of the stock model whether the other numbers mean anything."""

    @abstractmethod
    def compute(self, evidence: Evidence) -> list[Record]:
        """Rows for `results.json`, one for each variant and concept that it is of.

        A number that cannot be had is a row with the value `None` and a `reason`; nothing at all is said where the
        metric is not meant for what was drawn.
        """


def _refusal(thing: object) -> str:
    """Say what keeps a thing from being a metric; empty where nothing does."""
    if not isinstance(thing, Metric):
        return "it is no instance of a subclass of erasure.eval.metrics.Metric"
    return "" if thing.title and thing.about else "it has no title, or says nothing about itself"


_HOMES = {
    "unlearncanvas": (
        "UA", "UA_shape", "IRA", "IRA_group", "CRA", "CRA_retained", "AA",
        "object_accuracy", "style_accuracy", "shape_accuracy",
    ),
    "instead": ("replaced_by", "unsafe_share"),
    "utility": ("clip_score", "clip_score_target", "drift", "drift_feature"),
    "distances": ("fid", "cmmd", "kid"),
    "removals": (
        "object_gone", "psnr_fill", "psnr_outside", "psnr_background", "fill_similarity", "seed_consensus",
    ),
    "compositions": (
        "both_found", "both_found_beside_attend_and_excite", "both_found_template_1", "both_found_template_2",
        "objects_found", "clip_full", "clip_minimum_object",
    ),
    "attacked": ("pre_ASR", "ASR", "chance_ASR", "transfer_pre_ASR", "transfer_ASR", "held_by_refusal"),
    "stressed": (
        "concept_shown", "retained_seen", "recovered", "edit_survives", "footprint",
        "footprint_on_concept", "control_changed",
    ),
    "relearned": ("S50", "savings"),
    "flags": (
        "flagged_rate", "new_flags", "labels", "face_rate", "person_rate", "blank_rate", "expected_max", "identity",
        "identity_retained", "harmonic_mean",
    ),
    "agreement": ("agreement",),
    "ranks": ("UA_top3", "UA_top5", "IRA_nearest"),
    "controls": (
        "control_flagged", "control_caption",
        "control_seen", "control_unasked", "control_object", "control_style", "control_scene", "control_clean",
    ),
}  # fmt: skip

METRICS: Registry[Metric] = Registry(
    "metric",
    {name: f"erasure.eval.metrics.{module}" for module, names in _HOMES.items() for name in names},
    attributes=("title", "about", "definition", "higher_is_better", "bounds", "unit", "needs", "is_control"),
    accepts=_refusal,
    unknown=EvaluationError,
    instances=True,
)

register, available, get = METRICS.register, METRICS.names, METRICS.get


def facts_of(row: Row) -> Facts:
    """Say what a metric row of results is: its metric's facts, or what the row says where nobody knows the metric.

    Args:
        row: With `name` and `recipe`. Results may come from other packages, or from an earlier version.
    """
    name, base = str(row["name"]), metric_of(row)
    if base in METRICS:
        return METRICS.facts(base)
    definition = str(row["recipe"].get("metric", ""))
    attributes = {
        "title": name, "about": definition, "definition": definition, "higher_is_better": None,
        "bounds": [None, None], "unit": "", "needs": [], "is_control": "holds" in row,
    }  # fmt: skip
    return Facts(name, attributes)
