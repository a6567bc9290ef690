"""Telling a concept from the words of a prompt: labelled word states, logistic scores, and their thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import TextTower
from erasure.carriers.features import word_mask
from erasure.sae.stream import activations

CHUNK = 64
"""Prompts encoded at once."""
ROC_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""False positive rates at which a curve is written down."""


class WordStates(NamedTuple):
    """The activations of prompts at their words and end tokens, one after the other."""

    states: Tensor
    """`(words, dim)` float32 on the CPU."""
    ids: Tensor
    """`(words,)`."""
    prompt: Tensor
    """`(words,)`: which prompt each word is of, ascending."""
    prompts: int
    """Number of prompts."""

    def of(self, chosen: Tensor) -> WordStates:
        """Those of some prompts, `(prompts,)` bool, numbered anew."""
        keep = chosen[self.prompt]
        number = chosen.long().cumsum(0) - 1
        return WordStates(self.states[keep], self.ids[keep], number[self.prompt[keep]], int(chosen.sum()))

    def greatest(self, values: Tensor) -> Tensor:
        """The greatest of `(words, ...)` in each prompt, `(prompts, ...)`."""
        index = self.prompt.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        empty = values.new_full((self.prompts, *values.shape[1:]), -torch.inf)
        return empty.scatter_reduce(0, index, values, "amax")


class Labels(NamedTuple):
    """Where a concept is in `WordStates`."""

    holds: Tensor
    """`(prompts,)` bool: prompts that name it."""
    positive: Tensor
    """`(words,)` bool: the last token of each mention. Attention is causal, so here the whole name has been read."""
    negative: Tensor
    """`(words,)` bool: words of other prompts, and those ahead of the first mention. What follows may carry either."""


def read_words(tower: TextTower, layer: int, prompts: Sequence[str]) -> WordStates:
    """Encode prompts with the stock tower and keep what their words give at a block."""
    states, ids, owner = [], [], []
    for first in range(0, len(prompts), CHUNK):
        tokens = tower.tokenize(prompts[first : first + CHUNK])
        words = word_mask(tokens.ids, tower.tokenizer.eos_token_id, tower.leading)
        states.append(activations(tower, layer, tokens)[words].float().cpu())
        ids.append(tokens.ids[words].cpu())
        owner.append(first + words.nonzero()[:, 0].cpu())
    return WordStates(torch.cat(states), torch.cat(ids), torch.cat(owner), len(prompts))


def joined(parts: Sequence[WordStates]) -> WordStates:
    """Several, one after the other."""
    starts = torch.tensor([0, *(part.prompts for part in parts)]).cumsum(0)
    return WordStates(
        torch.cat([part.states for part in parts]),
        torch.cat([part.ids for part in parts]),
        torch.cat([part.prompt + start for part, start in zip(parts, starts[:-1], strict=True)]),
        int(starts[-1]),
    )


def locate(tower: TextTower, words: WordStates, names: Sequence[str]) -> Labels:
    """Find the mentions of names, as the tokeniser spells them."""
    positive = torch.zeros(len(words.ids), dtype=torch.bool)
    begins = torch.full((words.prompts,), len(words.ids))
    for name in names:
        spelling = torch.tensor(tower.tokenizer(name, add_special_tokens=False).input_ids)
        if not 0 < len(spelling) <= len(words.ids):
            continue
        found = (words.ids.unfold(0, len(spelling), 1) == spelling).all(1)
        start = found.nonzero()[:, 0]
        start = start[words.prompt[start] == words.prompt[start + len(spelling) - 1]]
        positive[start + len(spelling) - 1] = True
        begins = begins.scatter_reduce(0, words.prompt[start], start, "amin")
    holds = begins < len(words.ids)
    position = torch.arange(len(words.ids))
    return Labels(holds, positive, ~holds[words.prompt] | (position < begins[words.prompt]))


def logistic(x: Tensor, y: Tensor, penalty: float, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Logistic regression with both classes weighing the same, by L-BFGS.

    Args:
        x: `(samples, dim)`.
        y: `(samples,)` bool.
        penalty: Factor of the squared norm of the weights.
        steps: At most.

    Returns:
        Weights `(dim,)` and bias `()`.
    """
    weights = x.new_zeros(x.shape[1] + 1, requires_grad=True)
    share = torch.where(y, 0.5 / y.sum().clamp_min(1), 0.5 / (~y).sum().clamp_min(1)).to(x)
    sign = torch.where(y, -1.0, 1.0).to(x)
    optimiser = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = (share * F.softplus(sign * (x @ weights[:-1] + weights[-1]))).sum()
        value = value + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    optimiser.step(loss)  # type: ignore[arg-type]
    return weights.detach()[:-1], weights.detach()[-1]


def calibrate(target: Tensor, retain: Tensor, rate: float) -> float:
    """The least score of an open gate: at most a share `rate` of the prompts without the concept opens it.

    Where more than that separates the two, it stands in the middle between them, so that both have room.

    Args:
        target: `(prompts,)` scores of prompts with the concept.
        retain: `(prompts,)` of others.
        rate: False positive rate.
    """
    above = retain.sort(descending=True).values
    allowed = min(int(rate * len(above)), len(above) - 1)
    # One float above the first score that may not open it.
    low = torch.nextafter(above[allowed], torch.tensor(torch.inf)).item()
    return max(low, (low + target.quantile(0.01).item()) / 2)


def area(target: Tensor, retain: Tensor) -> float:
    """Area under the ROC curve: the chance that a prompt with the concept scores higher than one without."""
    wins = (target[:, None] > retain[None]).double() + 0.5 * (target[:, None] == retain[None]).double()
    return wins.mean().item()


def roc(target: Tensor, retain: Tensor) -> list[tuple[float, float]]:
    """The curve at `ROC_RATES`: false positive rate, and the true positive rate that goes with it."""
    above = retain.sort(descending=True).values
    at = [above[min(int(rate * len(above)), len(above) - 1)] for rate in ROC_RATES]
    return [
        (rate, round((target > level).double().mean().item(), 4)) for rate, level in zip(ROC_RATES, at, strict=True)
    ]
