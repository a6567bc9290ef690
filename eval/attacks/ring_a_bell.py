"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv 2310.10012): texts near a concept's direction in the text encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from erasure.backbones import TextTower, backbone_for
from erasure.eval.attacks import Access, ControlledAttack, register
from erasure.eval.attacks.prefixes import choosable
from erasure.eval.attacks.tokens import AT_ONCE, Tower, drawn_at_random, prompt_of, the_tower, written
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample, sample_seed
from erasure.options import Count, Positive, ZeroToOne
from erasure.text.corpora import CONTEXTS


@register("ring_a_bell")
@dataclass(frozen=True, kw_only=True)
class RingABell(ControlledAttack):
    """Search texts whose encoding is the prompt's, moved along the concept's direction in the original text encoder.

    The direction is the mean difference of encodings of texts with the concept and of the same without it. A genetic
    algorithm over tokens looks for the text nearest to where the prompt is moved:

        v = mean_pairs( E(with) - E(without) ),    min_text | E(prompt) + coefficient v - E(text) |^2

    summed over tokens and features. The denoiser is never asked, so the texts are for any erasure. Pairs are phrasings
    of ours among words of the tokeniser's, where the paper has a list for each concept. `adaptive` has the erased
    model's text encoder read the texts that are searched, against the original one's target.

    Each generation keeps the better half, and fills up with children of it. The control draws texts at random.
    """

    title: ClassVar[str] = "texts near the concept in the text encoder, by a genetic algorithm"
    paper: ClassVar[str] = "Tsai et al. 2024, arXiv 2310.10012"
    access: ClassVar[Access] = "prompt"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "pairs": 4, "population": 6, "generations": 2, "vocabulary": "words"},
        "quick": {"samples": 10, "population": 60, "generations": 60, "texts": 3, "vocabulary": "words"},
        "full": {},
    }

    tokens: Count = 16
    """Tokens of a text (paper: 16, also 38 and 77)."""
    coefficient: Positive = 3.0
    """How far the prompt is moved (paper: 3 for nudity, about 5 for violence)."""
    pairs: Count = 50
    """Pairs of texts (paper: 50 for nudity, 30 for violence)."""
    population: Annotated[int, Ge(4)] = 200
    """Texts of a generation (paper: 200)."""
    generations: Count = 3000
    """Generations (paper: 3000)."""
    crossover: ZeroToOne = 0.5
    """Share of children with two parents, one's tokens up to a random place and the other's behind it (paper: 0.5)."""
    mutation: ZeroToOne = 0.25
    """Share of children with a random token in one place (paper: 0.25)."""
    texts: Count = 1
    """How often the best text is tried, evenly over the generations, the last time at their end (paper: 1)."""
    adaptive: bool = False
    """Read texts with the erased model's text encoder (released code: no)."""
    tower: Tower | None = None
    """Text encoder that texts are searched in; when left out, the first whose tokens the denoiser reads."""
    vocabulary: Literal["all", "words"] = "all"
    """Tokens that can be chosen: all but the special ones, or those that survive being written as text and read
    again."""

    @property
    def tries(self) -> int:
        """One for each text."""
        return min(self.texts, self.generations)

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        backbone = victim.backbone
        own = the_tower(self, backbone, self.tower)
        original = backbone_for(victim.stock).tower(own.component)
        choices = choosable(own, self.vocabulary).cpu()
        generator = torch.Generator().manual_seed(sample.seed)
        if self.control:
            for _ in range(self.tries):
                yield written(backbone, own, drawn_at_random(choices, self.tokens, generator))
            return
        moved = self.coefficient * self.direction(victim, original)
        target = encoded_texts(original, [sample.prompt])[0] + moved
        reader = own if self.adaptive else original

        def distances(population: Tensor) -> Tensor:
            return torch.cat(
                [
                    (states(reader, rows.tolist()) - target).square().flatten(1).sum(1).cpu()
                    for rows in population.split(AT_ONCE)
                ]
            )

        population = choices[torch.randint(len(choices), (self.population, self.tokens), generator=generator)]
        scores = distances(population)
        ends = [round((number + 1) * self.generations / self.tries) for number in range(self.tries)]
        for generation in range(1, self.generations + 1):
            population, scores = evolved(
                population, scores, distances, choices, self.crossover, self.mutation, generator
            )
            if generation in ends:
                best = int(scores.argmin())
                yield written(backbone, own, population[best].tolist(), loss=float(scores[best]))

    def direction(self, victim: Victim, tower: TextTower) -> Tensor:
        """The concept's direction in a text encoder, `(tokens, dim)`."""
        generator = torch.Generator().manual_seed(sample_seed(victim.seed, f"pairs: {victim.target.name}", self.pairs))
        pairs = paired(tower, victim.target.words, victim.target.domain, self.pairs, generator)
        ahead, behind = (encoded_texts(tower, [pair[side] for pair in pairs]) for side in (0, 1))
        return (ahead - behind).mean(0)


def paired(
    tower: TextTower, names: Sequence[str], domain: str, count: int, generator: torch.Generator
) -> list[tuple[str, str]]:
    """Random texts that name a concept, each with the same text without it.

    Args:
        tower: Whose words stand around it.
        names: What the concept is called.
        domain: `object` or `style`.
        count: Pairs.
        generator: Where the randomness comes from.
    """
    avoided = {part for name in names for part in name.lower().split()}
    plain = (word for word in tower.words() if word.isascii() and word.isalpha())
    words = [word for word in plain if len(word) > 2 and word not in avoided]

    def draw(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    pairs = []
    for _ in range(count):
        template = draw(CONTEXTS[domain])
        while "WORD" in template:
            template = template.replace("WORD", draw(words), 1)
        texts = (template.format(draw(names)), template.format(""))
        pairs.append((texts[0], " ".join(texts[1].split())))
    return pairs


@torch.no_grad()
def encoded_texts(tower: TextTower, texts: Sequence[str]) -> Tensor:
    """States of texts, `(texts, tokens, dim)` float32."""
    parts = [texts[first : first + AT_ONCE] for first in range(0, len(texts), AT_ONCE)]
    return torch.cat([tower.encode(tower.tokenize(part)).states.float() for part in parts])


@torch.no_grad()
def states(tower: TextTower, rows: Sequence[Sequence[int]]) -> Tensor:
    """States of prompts of some tokens, `(rows, tokens, dim)` float32."""
    return tower.encode(prompt_of(tower, rows)).states.float()


def evolved(
    population: Tensor, scores: Tensor, score: Callable[[Tensor], Tensor], choices: Tensor, crossover: float,
    mutation: float, generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next generation with its scores: the better half, and as many children as it lacks.

    Args:
        population: Tokens `(texts, tokens)`.
        scores: Their scores `(texts,)`; lower ones are better.
        score: Gives the scores of children.
        choices: Tokens that may be chosen.
        crossover: Share of children with two parents.
        mutation: Share of children with a random token in one place.
        generator: Where the randomness comes from.
    """
    total, length = population.shape
    kept = scores.argsort(stable=True)[: total // 2]
    parents, count = population[kept], total - total // 2
    pairs = torch.randint(len(parents), (count, 2), generator=generator)
    crossed = torch.rand(count, generator=generator) < crossover
    # From one place on the second parent's: none of it where a child has one parent.
    points = torch.where(crossed, torch.randint(1, max(2, length), (count,), generator=generator), length)
    children = torch.where(torch.arange(length) < points[:, None], parents[pairs[:, 0]], parents[pairs[:, 1]])
    mutated = torch.rand(count, generator=generator) < mutation
    places = torch.randint(length, (count,), generator=generator)
    fresh = choices[torch.randint(len(choices), (count,), generator=generator)]
    at = (torch.arange(length) == places[:, None]) & mutated[:, None]
    children = torch.where(at, fresh[:, None], children)
    return torch.cat([parents, children]), torch.cat([scores[kept], score(children)])
