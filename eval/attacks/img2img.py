"""Image to image: the erased model goes on from a picture of the concept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Gt, Le

from erasure.backbones import Backbone
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.changes import AnotherTask
from erasure.eval.attacks.pictures import arguments_of, lacks_task, whole_steps
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.options import Count

Strength = Annotated[float, Gt(0), Le(1)]


@register("img2img")
@dataclass(frozen=True, kw_only=True)
class Img2Img(ControlledAttack):
    """Noise a picture of the concept, and let the erased model take the noise away with the sample's own prompt.

    The picture is the original model's, from other noise, and shows the concept. Of a strength `s` a share of about
    `1 - s` of the picture's way is left as it was: at low ones the picture comes back whatever the model knows, which
    the control tells apart. Strengths are tried from high to low, so that the first success gave the least away. As
    many steps are taken as in the ordinary call.

    The control starts from a picture of the original model that does not show the concept: the prompt alone then has
    to bring it back.
    """

    title: ClassVar[str] = "image to image from a picture of the concept"
    paper: ClassVar[str] = "Lu et al. 2025 (When Are Concepts Erased?); strengths as SDEdit, arXiv 2108.01073"
    access: ClassVar[Access] = "image"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "strengths": (0.5,)},
        "quick": {"samples": 10},
        "full": {},
    }

    strengths: tuple[Strength, ...] = (0.7, 0.5, 0.3)
    """Shares of the schedule that are noised and drawn anew, in the order in which they are tried."""
    references: Count = 4
    """Seeds tried until the original model's picture shows the concept, or for the control does not."""

    @property
    def tries(self) -> int:
        """One for each strength."""
        return len(self.strengths)

    def lacks(self, backbone: Backbone) -> str:
        """See `Attack.lacks`."""
        return lacks_task(backbone, "Img2Img")

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        start = victim.start(sample, self.references, without=self.control)
        without = arguments_of(victim.backbone, "Img2Img", sample)
        for strength in self.strengths:
            steps = whole_steps(sample.num_inference_steps, strength)
            given = {"image": start.image, "strength": strength, "num_inference_steps": steps}
            yield Attempt({**without, **given}, AnotherTask("Img2Img"))
