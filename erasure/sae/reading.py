"""The latents of a text encoder's autoencoder on prompts with and without a concept."""

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
    """Word states and latents of prompts with a concept and without it."""

    words: WordStates
    """States at all prompts' words."""
    labels: Labels
    """Where the concept is named."""
    activity: Tensor
    """Largest value of each latent at the words of a prompt, `(prompts, d_sae)`."""

    def evidence(self, floor: float, chosen: Tensor | None = None) -> Evidence:
        """Measure how often latents fire with the concept and without it.

        Args:
            floor: See `ItD.floor`.
            chosen: Prompts to use, `(prompts,)` bool; all when left out.
        """
        holds = self.labels.holds
        chosen = torch.ones_like(holds) if chosen is None else chosen
        return evidence(self.activity[holds & chosen], self.activity[~holds & chosen], floor)


@dataclass(frozen=True)
class Reading:
    """A text encoder, its autoencoder, and the word states and latents of ordinary prompts."""

    tower: TextTower
    sae: SparseAutoencoder
    layer: int
    """Block whose output is read."""
    corpus: WordStates
    """Word states of the ordinary prompts."""
    activity: Tensor
    """Largest values of the latents in the ordinary prompts, `(prompts, d_sae)`."""

    @classmethod
    def of(cls, tower: TextTower, sae: SparseAutoencoder, layer: int, ordinary: Sequence[str]) -> Reading:
        """Read ordinary prompts and the empty prompt."""
        corpus = read_words(tower, layer, ["", *ordinary])
        return cls(tower, sae, layer, corpus, strongest(sae, corpus))

    @property
    def key(self) -> str:
        """Key of the block, `component/block.path`."""
        return self.tower.key(self.tower.block_path(self.layer))

    def mentions(self, concept: Concept, prompts: Sequence[str]) -> Mentions:
        """Read prompts that name a concept, together with ordinary prompts, those that must survive, and the anchor's.

        Prompts that contain another word for the concept, known to the model's world but not listed by the concept,
        are left out, because they are not prompts without the concept.

        Args:
            concept: The concept.
            prompts: Prompts that name the concept.
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
