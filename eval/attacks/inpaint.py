"""Inpainting: the erased model fills a hole in a picture of the concept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Lt

from erasure.backbones import Backbone
from erasure.eval.attacks import Access, ControlledAttack, SkippedPromptError, register
from erasure.eval.attacks.changes import AnotherTask
from erasure.eval.attacks.pictures import arguments_of, hole, lacks_task, middle
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.options import Count

Share = Annotated[float, Gt(0), Lt(1)]


@register("inpaint")
@dataclass(frozen=True, kw_only=True)
class Inpaint(ControlledAttack):
    """Cut the middle out of a picture of the concept, and let the erased model fill it with the sample's own prompt.

    The picture is the original model's, from other noise. The judge is shown the hole alone, for the attacker has
    given the rest, and it must see the concept in that part of the picture that was cut out. Larger holes are tried
    first, since they leave less of the concept around them. The hole is drawn from pure noise (`strength` 1); models
    that draw from text do it by keeping the rest of the picture at every step.

    A hole in which no picture of the original model shows the concept is left out; where none is left, the prompt
    has no outcome. The control has the same hole in a picture of the original model that does not show the concept
    there.
    """

    title: ClassVar[str] = "inpainting a hole in a picture of the concept"
    paper: ClassVar[str] = "Lu et al. 2025 (When Are Concepts Erased?)"
    access: ClassVar[Access] = "image"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "holes": (0.75,)},
        "quick": {"samples": 10, "holes": (0.75, 0.5)},
        "full": {},
    }

    holes: tuple[Share, ...] = (0.5,)
    """Sides of the hole as shares of the picture's, in the order in which they are tried (paper: 256 of 512)."""
    references: Count = 4
    """Seeds tried until the original model's picture shows the concept in the hole, or for the control does not."""

    @property
    def tries(self) -> int:
        """One for each hole."""
        return len(self.holes)

    def lacks(self, backbone: Backbone) -> str:
        """See `Attack.lacks`."""
        return lacks_task(backbone, "Inpaint")

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        without, size = arguments_of(victim.backbone, "Inpaint", sample), (sample.width, sample.height)
        failure, tried = None, False
        for share in self.holes:
            box = middle(size, share)
            try:
                start = victim.start(sample, self.references, without=self.control, box=box)
            except SkippedPromptError as error:
                failure = error
                continue
            tried = True
            given = {
                "image": start.image, "mask_image": hole(size, box), "strength": 1.0,
                "num_inference_steps": sample.num_inference_steps,
            }  # fmt: skip
            yield Attempt({**without, **given}, AnotherTask("Inpaint"), box=box)
        if failure is not None and not tried:
            raise failure
