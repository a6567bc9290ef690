"""One text encoder seen through its autoencoder: what fires on prompts with a concept, and on those without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.concept import Concept
from erasure.sae.gates import Labels, WordStates, joined, locate, read_words, strongest
from erasure.sae.model import SparseAutoencoder
from erasure.sae.selection import Evidence, evidence
from erasure.text.corpora import retain_prompts
from erasure.world import World


class Mentions(NamedTuple):
    """Prompts with a concept and without it."""

    words: WordStates
    """States at the words of all prompts."""
    labels: Labels
    """Where the concept is in them."""
    activity: Tensor
    """`(prompts, d_sae)`: the greatest value of each latent at the words of a prompt."""

    def evidence(self, floor: float, chosen: Tensor | None = None) -> Evidence:
        """How often latents fire with the concept and without it.

        Args:
            floor: See `ItD.floor`.
            chosen: `(prompts,)` bool: which prompts count; all when left out.
        """
        holds = self.labels.holds
        chosen = torch.ones_like(holds) if chosen is None else chosen
        return evidence(self.activity[holds & chosen], self.activity[~holds & chosen], floor)


@dataclass(frozen=True)
class Reading:
    """A text encoder, its autoencoder, and what ordinary prompts give there."""

    tower: TextTower
    sae: SparseAutoencoder
    layer: int
    """Block whose output is read."""
    corpus: WordStates
    """Words of the ordinary prompts."""
    activity: Tensor
    """Greatest values of the latents in the ordinary prompts, `(prompts, d_sae)`."""

    @classmethod
    def of(cls, tower: TextTower, sae: SparseAutoencoder, layer: int, ordinary: Sequence[str]) -> Reading:
        """Read ordinary prompts, and the empty one."""
        corpus = read_words(tower, layer, ["", *ordinary])
        return cls(tower, sae, layer, corpus, strongest(sae, corpus))

    @property
    def key(self) -> str:
        """`component/block.path` of what is read and edited."""
        return self.tower.key(self.tower.block_path(self.layer))

    def mentions(self, concept: Concept, prompts: Sequence[str]) -> Mentions:
        """Prompts that name a concept beside ordinary ones, those of what must survive, and those of its anchor.

        Prompts that hold another word for the concept, which the model's world knows and the concept does not list,
        are left out: they are no prompts without it.

        Args:
            concept: The concept.
            prompts: That name it.
        """
        every = [*prompts, *retain_prompts([concept])]
        every += [template.format(concept.anchor) for template in concept.phrasings() if concept.anchor]
        extra = read_words(self.tower, self.layer, every)
        words = joined([self.corpus, extra])
        active = torch.cat([self.activity, strongest(self.sae, extra)])
        world = World.of(self.tower.pipe)
        others = [word for name in concept.names for word in world.words(name) if word not in concept.names]
        labels = locate(self.tower, words, concept.names)
        clear = labels.holds | ~locate(self.tower, words, others).holds
        if not clear.all():
            words, active = words.of(clear), active[clear]
            labels = locate(self.tower, words, concept.names)
        return Mentions(words, labels, active)
