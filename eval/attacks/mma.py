"""MMA-Diffusion's text attack (Yang et al., CVPR 2024, arXiv 2311.17516): the prompt's meaning without its words.

Written from the paper's description and that of greedy coordinate gradient (Zou et al. 2023, arXiv 2307.15043).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import TextTower, backbone_for
from erasure.carriers.embeddings import injected
from erasure.eval.attacks import Access, ControlledAttack, SkippedPromptError, register
from erasure.eval.attacks.prefixes import as_text, choosable
from erasure.eval.attacks.tokens import AT_ONCE, Tower, drawn_at_random, prompt_of, summary, the_tower, written
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.interop import paths
from erasure.options import Count


@register("mma")
@dataclass(frozen=True, kw_only=True)
class MMA(ControlledAttack):
    """Search texts that the text encoder takes for the sample's prompt, without any of the concept's words.

    With `f` the vector that sums a text up (CLIP's pooled one; of a T5 the mean over tokens),

        min_text  1 - cos( f(prompt), f(text) )

    by greedy coordinate gradient: of each step, the tokens along whose embeddings the loss falls most steeply are
    candidates for each place; of many texts with one token replaced the best becomes the next, better than the last or
    not; texts that are read as other tokens are left out. The best of all steps is tried. Tokens that hold a word of
    the concept cannot be chosen, so a filter of words lets the text through. The denoiser is never asked.

    Other than in the released code, gradients are those of the tokens that they choose for (there they are those of
    their neighbours). The control draws texts at random.
    """

    title: ClassVar[str] = "texts that the text encoder takes for the prompt, without the concept's words"
    paper: ClassVar[str] = "Yang et al. 2024, arXiv 2311.17516"
    access: ClassVar[Access] = "prompt"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 1, "tokens": 6, "steps": 2, "restarts": 1, "candidates": 8, "steepest": 8,
                  "vocabulary": "words"},
        "quick": {"samples": 10, "tokens": 10, "steps": 30, "restarts": 3, "candidates": 64, "steepest": 64,
                  "vocabulary": "words"},
        "full": {},
    }  # fmt: skip

    tokens: Count = 20
    """Tokens of a text (paper: 20)."""
    steps: Count = 1000
    """Steps of a search (paper: 1000)."""
    restarts: Count = 10
    """Searches, each with a text that is tried (paper: 10)."""
    candidates: Count = 512
    """Texts with one token replaced that a step looks at (paper: 512)."""
    steepest: Count = 256
    """Tokens of each place that they are taken from (paper: 256)."""
    adaptive: bool = False
    """Read texts with the erased model's text encoder; the prompt stays the original one's (released code: no)."""
    tower: Tower | None = None
    """Text encoder that texts are searched in; when left out, the first whose tokens the denoiser reads."""
    vocabulary: Literal["all", "words"] = "all"
    """Tokens that can be chosen: all but the special ones, or those that survive being written as text and read
    again; in both cases without those that hold a word of the concept."""

    @property
    def tries(self) -> int:
        """One for each search."""
        return self.restarts

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        """Propose attempts in the way that the class describes; see `Attack.attempts`."""
        backbone = victim.backbone
        own = the_tower(self, backbone, self.tower)
        original = backbone_for(victim.stock).tower(own.component)
        reader = own if self.adaptive else original
        # Where attention is causal, what sums a text up has seen no padding. An erasure might look at it.
        padded = self.adaptive or not reader.causal
        choices = permitted(own, choosable(own, self.vocabulary).cpu(), [victim.target.name, *victim.target.words])
        generator = torch.Generator().manual_seed(sample.seed)
        with torch.no_grad():
            wanted = summary(original, original.tokenize([sample.prompt])).float()
        for _ in range(self.restarts):
            ids = drawn_at_random(choices, self.tokens, generator)
            if self.control:
                yield written(backbone, own, ids)
                continue
            best, least = ids, float(distances(reader, [ids], wanted, padded=padded)[0])
            for _ in range(self.steps):
                slopes = token_gradients(reader, ids, wanted, choices, padded=padded)
                rows = [row for row in replaced(ids, slopes, choices, self.candidates, self.steepest, generator)
                        if own.word_ids(as_text(own, row)) == row]  # fmt: skip
                if not rows:
                    continue
                losses = distances(reader, rows, wanted, padded=padded)
                ids, loss = rows[int(losses.argmin())], float(losses.min())
                if loss < least:
                    best, least = ids, loss
            yield written(backbone, own, best, steps=self.steps, loss=least)


def permitted(tower: TextTower, choices: Tensor, names: Sequence[str]) -> Tensor:
    """Those of some tokens that hold no word of a concept.

    Raises:
        SkippedPromptError: All do.
    """
    banned = {part for name in names for part in name.lower().split()}
    texts = [as_text(tower, [token]).lower() for token in choices.tolist()]
    kept = choices[torch.tensor([not any(word in text for word in banned) for text in texts])]
    if not len(kept):
        raise SkippedPromptError(f"every token that can be chosen holds one of {', '.join(sorted(banned))}")
    return kept


@torch.no_grad()
def distances(tower: TextTower, rows: Sequence[list[int]], wanted: Tensor, *, padded: bool = True) -> Tensor:
    """`1 - cos` of what sums up prompts of some tokens and a vector `(1, dim)`: `(rows,)` on the CPU."""
    parts = [rows[first : first + AT_ONCE] for first in range(0, len(rows), AT_ONCE)]
    return torch.cat(
        [
            1 - F.cosine_similarity(summary(tower, prompt_of(tower, part, padded=padded)).float(), wanted).cpu()
            for part in parts
        ]
    )


def token_gradients(
    tower: TextTower, ids: list[int], wanted: Tensor, choices: Tensor, *, padded: bool = True
) -> Tensor:
    """Slope of the distance along every token that could stand in each place, of norm 1 in each, `(places, choices)`.

    Args:
        tower: The text encoder.
        ids: Tokens of the prompt, without start and end.
        wanted: Vector that it is held against, `(1, dim)`.
        choices: Tokens that could stand there.
        padded: See `prompt_of`.
    """
    table = paths.token_table(tower.root).weight.detach()
    vectors = table[torch.tensor(ids, device=table.device)].float().requires_grad_()
    place = torch.arange(tower.leading, tower.leading + len(ids), device=table.device)
    with torch.enable_grad(), injected(tower, place, vectors):
        found = summary(tower, prompt_of(tower, [ids], padded=padded)).float()
        loss = 1 - F.cosine_similarity(found, wanted).sum()
        (slope,) = torch.autograd.grad(loss, vectors)
    along = slope @ table[choices.to(table.device)].float().T
    return F.normalize(along, dim=-1).cpu()


def replaced(
    ids: Sequence[int], slopes: Tensor, choices: Tensor, count: int, steepest: int, generator: torch.Generator
) -> list[list[int]]:
    """Texts with one token replaced by one of the steepest of its place; the places come up equally often.

    Args:
        ids: The text.
        slopes: `(places, choices)`.
        choices: Tokens.
        count: Texts.
        steepest: Tokens of each place that are looked at.
        generator: Where the randomness comes from.
    """
    top = (-slopes).topk(min(steepest, len(choices)), dim=-1).indices
    places = torch.arange(count) * len(ids) // count
    ranks = torch.randint(top.shape[1], (count,), generator=generator)
    tokens = choices[top[places, ranks]].tolist()
    return [[*ids[:place], token, *ids[place + 1 :]] for place, token in zip(places.tolist(), tokens, strict=True)]
