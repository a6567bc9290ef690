"""Random words ahead of a prompt: the control of every attack that searches such words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from erasure.eval.attacks import Access, Attack, register
from erasure.eval.attacks.prefixes import Prefixed, Towers, choosable, chosen_towers, proposed
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.options import Count


@register("random_prefix")
@dataclass(frozen=True, kw_only=True)
class RandomPrefix(Attack):
    """Try as many texts as `unlearndiffatk` does, with words drawn at random ahead of the prompt.

    Nothing is optimised and nothing but prompts is needed, so its rate is the chance level of such attacks: what any
    words ahead of the prompt bring back, and what the judge takes for the concept by mistake, in so many tries. An
    attack has found something only as far as its rate is above this one.
    """

    title: ClassVar[str] = "random words ahead of the prompt: the chance level of the other attacks"
    paper: ClassVar[str] = "a control"
    access: ClassVar[Access] = "prompt"
    is_control: ClassVar[bool] = True
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "texts": 4, "vocabulary": "words"},
        "quick": {"samples": 10, "texts": 10, "vocabulary": "words"},
        "full": {},
    }

    tokens: Count | None = None
    """Tokens ahead of the prompt; when left out as many as `unlearndiffatk` takes, 5 for unsafe concepts, else 3."""
    texts: Count = 50
    """Texts that are tried for each prompt."""
    tower: Towers | None = None
    """Text encoder whose tokens are drawn, all others reading the same text; `all` for a text for each of them. When
    left out, the first whose tokens the denoiser reads."""
    vocabulary: Literal["all", "words"] = "all"
    """Tokens that can be drawn: all but the special ones, or those that are read as themselves again once they were
    written as text."""

    @property
    def tries(self) -> int:
        """One for each text."""
        return self.texts

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        backbone = victim.backbone
        every = [Prefixed.of(tower, sample, self.tokens) for tower in chosen_towers(self, backbone, self.tower)]
        choices = [choosable(given.tower, self.vocabulary).cpu() for given in every]
        generator = torch.Generator().manual_seed(sample.seed)
        for _ in range(self.texts):
            drawn = [
                words[torch.randint(len(words), (given.count,), generator=generator)].tolist()
                for given, words in zip(every, choices, strict=True)
            ]
            yield proposed(backbone, list(zip(every, drawn, strict=True)), steps=0, loss=None)
