"""The inner attack: learned vectors ahead of a prompt that bring back what a student forgot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from erasure.backbones import PromptTokens, TextTower
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
        ConceptError: The tokeniser merges the room with the prompt.
    """
    tokens = tower.tokenize([" ".join([FILLER] * count + [prompt]) for prompt in prompts])
    place = torch.arange(tower.leading, tower.leading + count, device=tokens.ids.device)
    alone = tower.word_ids(FILLER)
    if len(alone) != 1 or not (tokens.ids[:, place] == alone[0]).all():
        raise ConceptError(f"{tower.component}'s tokeniser leaves no room for {count} tokens ahead of a prompt")
    return tokens, place


def random_words(tower: TextTower, rows: int, count: int, generator: torch.Generator) -> Tensor:
    """The embeddings of random words, `(rows, count, dim)` float32."""
    table = paths.token_table(tower.root).weight.detach()
    return table[torch.randint(len(table), (rows, count), generator=generator).to(table.device)].float()


def vocabulary_spread(tower: TextTower) -> float:
    """Standard deviation of the vocabulary's embeddings, the natural unit of steps among them."""
    return float(paths.token_table(tower.root).weight.detach().float().std(0).mean())


def attacked(
    loss: Callable[[Tensor, int], Tensor], vectors: Tensor, *, steps: int, lr: float, signed: bool,
    accumulates: bool = False,
) -> Tensor:  # fmt: skip
    """Vectors that lower a loss, after the last step of Adam.

    Args:
        loss: Of vectors `(rows, tokens, dim)` and the number of the step.
        vectors: To start from.
        steps: How many.
        lr: Adam's learning rate.
        signed: Adam is given the gradient's sign (fast adversarial training) instead of the gradient.
        accumulates: Do as the released code of AdvUnlearn does by mistake: add gradients up over all steps (what is
            added up with `signed` are signs), and give back the vectors from before the last step.

    Raises:
        DivergenceError: The loss is NaN or infinite.
    """
    vectors = vectors.detach().clone().requires_grad_()
    optimiser = torch.optim.Adam([vectors], lr=lr)
    total, before = torch.zeros_like(vectors), vectors.detach().clone()
    for step in range(steps):
        value = loss(vectors, step)
        (gradient,) = torch.autograd.grad(value, vectors)
        if not torch.isfinite(value):
            raise DivergenceError(f"the attack's loss is {value.item()} at its step {step}: lower attack_lr")
        total = total + gradient if accumulates else gradient
        total = total.sign() if signed else total
        before, vectors.grad = vectors.detach().clone(), total
        optimiser.step()
    return before if accumulates else vectors.detach()
