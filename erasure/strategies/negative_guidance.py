"""What strategies have in common whose target is negative guidance: away from what the stock model predicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from erasure.backbones import TextTower
from erasure.concept import Concept
from erasure.options import NotNegative
from erasure.strategies.prompts import concept_scenes
from erasure.strategies.trained import TrainedStrategy
from erasure.training.objectives import negative_guidance
from erasure.training.states import Scene, States


@dataclass(frozen=True, kw_only=True)
class NegativeGuidance(TrainedStrategy):
    """A trained strategy whose student learns to predict what lies on the other side of a base from the concept."""

    eta: NotNegative = 1.0
    """Negative guidance in the paper's convention: 0 stops at the base, 1 goes as far to its other side. ESD's
    diffusers code starts from the concept's own prediction, so that its numbers are greater by one."""
    base: Literal["anchor", "null"] = "anchor"
    """What prediction the target starts from: the same prompt with the anchor in the concept's place (no prompt where
    a concept has no anchor), or no prompt (ESD's paper)."""
    against: Literal["base", "null"] = "base"
    """What the concept is told from: the base, or the empty prompt."""

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Prompts with the concepts to roll out, and what the teacher is asked besides."""
        anchored = self.base == "anchor" and any(concept.anchor for concept in concepts)
        named = concepts if self.templates else [dataclasses.replace(each, templates=("{}",)) for each in concepts]
        return concept_scenes(tower, named, seed, self.contexts, anchored=anchored, scope=bool(self.scope_weight))

    def target(self, states: States) -> Tensor:
        """What the student must predict for the concept's prompts, shaped as `states.x`; see `negative_guidance`."""
        anchored = self.base == "anchor" and states.asked.shape[1] > bool(self.scope_weight)
        base = states.asked[:, 0] if anchored else states.unprompted
        return self.pushed(states, base, states.own)

    def pushed(self, states: States, base: Tensor, concept: Tensor) -> Tensor:
        """The target from a base on, away from what is predicted for the concept.

        A model that is told its guidance g answers `v0 + g (v - v0)`, with v0 where no prompt is given. Of the same g
        in all terms the target is that of the model it was distilled from, and g times as far; so eta is divided by g.
        """
        eta = (self.eta / states.guidance).view(-1, 1, 1, 1)
        return negative_guidance(base, concept, base if self.against == "base" else states.unprompted, eta)
