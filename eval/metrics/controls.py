"""Controls as metrics: what the judge sees on the stock model's images, by which the other numbers stand or fall."""

from __future__ import annotations

from erasure.eval.evidence import Evidence
from erasure.eval.metrics import SHARE, Metric, register
from erasure.eval.rows import Record


class ControlShare(Metric):
    """Rows of the suite's controls of one name."""

    bounds = SHARE
    unit = "%"
    needs = ("judge",)
    is_control = True

    def compute(self, evidence: Evidence) -> list[Record]:
        """One row for each control."""
        return [
            each.row(evidence.plan.recipe) for each in evidence.controls if each.name.partition("[")[0] == self.name
        ]


@register("control_seen")
class Seen(ControlShare):
    """The concept, where it is asked for."""

    title = "Seen where asked for"
    about = "the judge on the stock model's images"
    definition = "share of the stock model's images of a concept on which the judge sees it"
    higher_is_better = True


@register("control_unasked")
class Unasked(ControlShare):
    """The concept, where it is not asked for."""

    title = "Seen where not asked for"
    about = "the judge on the stock model's images"
    definition = "share of the stock model's images of other concepts on which the judge sees it"
    higher_is_better = False


@register("control_object")
class RetainedObjects(ControlShare):
    """Objects that must survive."""

    title = "Retained objects seen"
    about = "the judge on the stock model's images"
    definition = "share of the stock model's images on which the judge sees the object that is asked for"
    higher_is_better = True


@register("control_style")
class RetainedStyles(ControlShare):
    """Styles that must survive."""

    title = "Retained styles seen"
    about = "the judge on the stock model's images"
    definition = "share of the stock model's images on which the judge sees the style that is asked for"
    higher_is_better = True


@register("control_scene")
class InScene(ControlShare):
    """The object in the scene that is given."""

    title = "Seen in the scene"
    about = "the judge on the scenes that are given"
    definition = "share of the scenes on which the judge sees the object"
    higher_is_better = True


@register("control_clean")
class InCleanScene(ControlShare):
    """The object in the scene without it."""

    title = "Seen in the empty scene"
    about = "the judge on the scenes without the object"
    definition = "share of the scenes without the object on which the judge sees it"
    higher_is_better = False


@register("control_flagged")
class Flagged(ControlShare):
    """The concept, by a detector's flags."""

    title = "Flagged where asked for"
    about = "the detector on the stock model's images"
    definition = "share of the stock model's images of target prompts that the detector flags"
    higher_is_better = True


@register("control_caption")
class Caption(Metric):
    """Captions, by the CLIP model that the suite's numbers come from."""

    title = "Caption recognised"
    about = "the CLIP model on the stock model's images"
    definition = "share of the stock model's images that are closer to their own caption than to another one"
    higher_is_better = True
    bounds = SHARE
    unit = "%"
    needs = ("clip",)
    is_control = True

    def compute(self, evidence: Evidence) -> list[Record]:
        """See `Metric.compute`; nothing where the stock model was not drawn."""
        return [evidence.captions.row(evidence.plan.recipe)] if evidence.before else []
