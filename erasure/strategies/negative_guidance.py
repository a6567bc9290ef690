"""The base class of strategies whose target is negative guidance: away from the stock prediction for the concept."""

from __future__ import annotations

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
    """A trained strategy whose target is a base's prediction, moved away from the prediction for the concept."""

    eta: NotNegative = 1.0
    """Strength of the negative guidance in the ESD paper's convention: 0 stops at the base's prediction, 1 goes
    beyond it by the difference of concept and contrast. ESD's diffusers code starts from the concept's own
    prediction, so its numbers are larger by one."""
    base: Literal["anchor", "null"] = "anchor"
    """Prediction from which the target starts: `anchor` the same prompt with the anchor in the concept's place (the
    empty prompt where a concept has no anchor), or `null` the empty prompt (ESD's paper)."""
    against: Literal["base", "null"] = "base"
    """Contrast: prediction that is subtracted from the concept's prediction, that of the base or of the empty
    prompt."""

    def scenes(self, tower: TextTower, concepts: Sequence[Concept], seed: int) -> list[Scene]:
        """Give prompts with the concepts to sample, and the prompts for which the teacher predicts in addition."""
        anchored = self.base == "anchor" and any(concept.anchor for concept in concepts)
        named = self.phrased(concepts)
        return concept_scenes(tower, named, seed, self.contexts, anchored=anchored, scope=bool(self.scope_weight))

    def target(self, states: States) -> Tensor:
        """Compute the target for the concept's prompts, shaped as `states.x`; see `negative_guidance`."""
        anchored = self.base == "anchor" and states.asked.shape[1] > bool(self.scope_weight)
        base = states.asked[:, 0] if anchored else states.unprompted
        return self.pushed(states, base, states.own)

    def pushed(self, states: States, base: Tensor, concept: Tensor) -> Tensor:
        """Compute the target from the predictions for a base and for the concept.

        A guidance-distilled model with guidance scale g predicts `v0 + g (v - v0)`, where v0 is the prediction for the
        empty prompt. With the same g in all terms, the target's distance from the base is g times as large as without
        distillation, so eta is divided by g.
        """
        eta = (self.eta / states.guidance).view(-1, 1, 1, 1)
        return negative_guidance(base, concept, base if self.against == "base" else states.unprompted, eta)
