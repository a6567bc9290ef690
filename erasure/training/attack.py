"""The inner attack: learned vectors ahead of a prompt that bring back what a student forgot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from erasure.backbones import PromptTokens, TextTower
from erasure.carriers.embeddings import behind
from erasure.errors import ConceptError, DivergenceError
from erasure.interop import paths

FILLER = "a"
"""The word that keeps the place of a learned vector: an end token there would end the prompt."""


def prefixed(tower: TextTower, prompts: Sequence[str], count: int) -> tuple[PromptTokens, Tensor]:
    """Prompts with room for `count` vectors ahead of their first word; all of their own tokens stay.

    Released code counts words where tokens are meant, so that half of "nudity" (two tokens) is cut off there.

    Returns:
        The tokens, and the places of the vectors `(count,)`.

    Raises:
        ConceptError: So many leave no room for a word.
    """
    if tower.leading + count + 1 >= tower.max_length:
        raise ConceptError(
            f"{count} tokens ahead of a prompt leave no room for a word among the {tower.max_length} of "
            f"{tower.component}"
        )
    tokens = tower.tokenize(prompts)
    # The last token of the word: T5 may write it as the mark of a beginning and a letter.
    filler = torch.full((len(prompts), count), tower.word_ids(FILLER)[-1])
    place = torch.arange(tower.leading, tower.leading + count, device=tokens.ids.device)
    return behind(tower, tokens, filler), place


def random_words(tower: TextTower, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """The embeddings of random words, `(rows, count, dim)` float32."""
    table = paths.token_table(tower.root).weight.detach()
    # A table may be longer than the vocabulary: T5's is.
    known = min(len(table), len(tower.tokenizer))
    return table[torch.randint(known, (rows, count), generator=generator).to(table.device)].float()


def vocabulary_spread(tower: TextTower) -> float:
    """Standard deviation of the vocabulary's embeddings, the natural unit of steps among them."""
    return float(paths.token_table(tower.root).weight.detach().float().std(0).mean())


def attacked(
    loss: Callable[[Mapping[str, Tensor], int], Tensor], vectors: Mapping[str, Tensor], *, steps: int,
    lr: Mapping[str, float], signed: bool, accumulates: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Vectors that lower a loss, after the last step of Adam.

    Args:
        loss: Of the vectors and the number of the step.
        vectors: To start from, `(rows, tokens, dim)` by text encoder.
        steps: How many.
        lr: Adam's learning rate by text encoder.
        signed: Adam is given the gradient's sign (fast adversarial training) instead of the gradient.
        accumulates: Do as the released code of AdvUnlearn does by mistake: add gradients up over all steps (what is
            added up with `signed` are signs), and give back the vectors from before the last step.

    Raises:
        DivergenceError: The loss is NaN or infinite.
    """
    now = {name: part.detach().clone().requires_grad_() for name, part in vectors.items()}
    optimiser = torch.optim.Adam([{"params": [part], "lr": lr[name]} for name, part in now.items()])
    totals = {name: torch.zeros_like(part) for name, part in now.items()}
    before = {name: part.detach().clone() for name, part in now.items()}
    for step in range(steps):
        value = loss(now, step)
        gradients = torch.autograd.grad(value, list(now.values()))
        if not torch.isfinite(value):
            raise DivergenceError(f"the attack's loss is {value.item()} at its step {step}: lower attack_lr")
        for (name, part), gradient in zip(now.items(), gradients, strict=True):
            total = totals[name] + gradient if accumulates else gradient
            totals[name] = total.sign() if signed else total
            before[name], part.grad = part.detach().clone(), totals[name]
        optimiser.step()
    return before if accumulates else {name: part.detach() for name, part in now.items()}
