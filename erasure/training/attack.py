"""The inner attack: embeddings learned before a prompt's words, which bring an erased concept back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from erasure.backbones import PromptTokens, TextTower
from erasure.carriers.embeddings import behind
from erasure.errors import ConceptError, DivergenceError
from erasure.interop import paths

FILLER = "a"
"""Word at the position of a learned vector. An end token there would end the prompt."""


def prefixed(tower: TextTower, prompts: Sequence[str], count: int) -> tuple[PromptTokens, Tensor]:
    """Insert `count` positions for vectors before the first word of prompts, whose own tokens stay.

    AdvUnlearn's released code counts words instead of tokens, so half of "nudity" (two tokens) is cut off there.

    Returns:
        The tokenised prompts, and the positions of the vectors, `(count,)`.

    Raises:
        ConceptError: So many vectors leave no room for a word.
    """
    if tower.leading + count + 1 >= tower.max_length:
        raise ConceptError(
            f"{count} tokens ahead of a prompt leave no room for a word among the {tower.max_length} of "
            f"{tower.component}"
        )
    tokens = tower.tokenize(prompts)
    # The last token of the word is used, because T5 may split it into a start mark and a letter.
    filler = torch.full((len(prompts), count), tower.word_ids(FILLER)[-1])
    place = torch.arange(tower.leading, tower.leading + count, device=tokens.ids.device)
    return behind(tower, tokens, filler), place


def random_words(tower: TextTower, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Draw embeddings of random words, `(rows, count, dim)` float32."""
    table = paths.token_table(tower.root).weight.detach()
    # The embedding table can be longer than the vocabulary, as in T5.
    known = min(len(table), len(tower.tokenizer))
    return table[torch.randint(known, (rows, count), generator=generator).to(table.device)].float()


def vocabulary_spread(tower: TextTower) -> float:
    """Compute the standard deviation of the vocabulary's embeddings, a natural unit of steps between embeddings."""
    return float(paths.token_table(tower.root).weight.detach().float().std(0).mean())


def attacked(
    loss: Callable[[Mapping[str, Tensor], int], Tensor], vectors: Mapping[str, Tensor], *, steps: int,
    lr: Mapping[str, float], signed: bool, accumulates: bool = False,
) -> dict[str, Tensor]:  # fmt: skip
    """Minimise a loss over vectors with Adam, and give the vectors after the last step.

    Args:
        loss: Computes the loss from the vectors and the step's number.
        vectors: Initial vectors, `(rows, tokens, dim)` by text encoder.
        steps: Number of steps.
        lr: Adam's learning rate by text encoder.
        signed: Give Adam the sign of the gradient instead of the gradient (fast adversarial training).
        accumulates: Reproduce a mistake of AdvUnlearn's released code: add gradients (or with `signed` their signs) up
            over all steps, and give the vectors from before the last step.

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
