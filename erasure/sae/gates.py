"""Gates that recognise a concept in a prompt: labelled word states, logistic scores, and thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import TextTower
from erasure.interop.protocols import Settings
from erasure.sae.model import FeatureSlice, SparseAutoencoder
from erasure.sae.stream import activations
from erasure.text.encodings import require_finite
from erasure.text.words import is_whole_word, spellings, word_mask

CHUNK = 64
"""Number of prompts encoded at once."""
CANDIDATES = 512
"""Number of candidate latents for a gate's score."""
PENALTY = {"features": 1e-4, "probe": 1e-3}
"""Factor of the squared weights in the logistic regression of each score."""
ROOM = 0.2
"""Position of the threshold: share of the way from the highest score without the concept to the lowest score with
it. Other words for the concept, on which nothing was trained, score between the two; on Canvas a share of one half
missed more of them."""
ROC_RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""False positive rates at which the ROC curve is saved."""


class WordStates(NamedTuple):
    """Activations of prompts at their words and end tokens, concatenated."""

    states: Tensor
    """Activations, `(words, dim)` float32 on the CPU."""
    ids: Tensor
    """Token ids, `(words,)`."""
    prompt: Tensor
    """Index of each word's prompt, ascending, `(words,)`."""
    prompts: int
    """Number of prompts."""

    def of(self, chosen: Tensor) -> WordStates:
        """Select prompts, given as `(prompts,)` bool, and number them anew."""
        keep = chosen[self.prompt]
        number = chosen.long().cumsum(0) - 1
        return WordStates(self.states[keep], self.ids[keep], number[self.prompt[keep]], int(chosen.sum()))

    def greatest(self, values: Tensor) -> Tensor:
        """Take the maximum of values `(words, ...)` over each prompt's words, `(prompts, ...)`."""
        index = self.prompt.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
        empty = values.new_full((self.prompts, *values.shape[1:]), -torch.inf)
        return empty.scatter_reduce(0, index, values, "amax")


class Labels(NamedTuple):
    """Labels of `WordStates`: where a concept is named."""

    holds: Tensor
    """Prompts that name the concept, `(prompts,)` bool."""
    positive: Tensor
    """Last token of each mention, which has read the whole name also under causal attention, `(words,)` bool."""
    negative: Tensor
    """Words of other prompts and, under causal attention, words before the first mention, `(words,)` bool. Other
    words of a prompt with the concept are in neither class."""


def read_words(tower: TextTower, layer: int, prompts: Sequence[str]) -> WordStates:
    """Encode prompts with the stock text encoder and keep the output of a block at their words.

    Raises:
        DivergenceError: The text encoder gives NaN or infinity.
    """
    states, ids, owner = [], [], []
    for first in range(0, len(prompts), CHUNK):
        tokens = tower.tokenize(prompts[first : first + CHUNK])
        words = word_mask(tokens.ids, tower.end, tower.leading)
        states.append(activations(tower, layer, tokens)[words].float().cpu())
        ids.append(tokens.ids[words].cpu())
        owner.append(first + words.nonzero()[:, 0].cpu())
    every = torch.cat(states)
    require_finite(tower, every, f"at block {layer}")
    return WordStates(every, torch.cat(ids), torch.cat(owner), len(prompts))


def joined(parts: Sequence[WordStates]) -> WordStates:
    """Concatenate word states."""
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
    for ids in (ids for name in names for ids in spellings(tower, name)):
        spelling = torch.tensor(ids)
        if len(spelling) > len(words.ids):
            continue
        found = (words.ids.unfold(0, len(spelling), 1) == spelling).all(1)
        start = found.nonzero()[:, 0]
        start = start[words.prompt[start] == words.prompt[start + len(spelling) - 1]]
        start = start[is_whole(tower, words, start, len(spelling))]
        positive[start + len(spelling) - 1] = True
        begins = begins.scatter_reduce(0, words.prompt[start], start, "amin")
    holds = begins < len(words.ids)
    elsewhere = ~holds[words.prompt]
    if tower.causal:
        elsewhere = elsewhere | (torch.arange(len(words.ids)) < begins[words.prompt])
    return Labels(holds, positive, elsewhere)


def is_whole(tower: TextTower, words: WordStates, start: Tensor, count: int) -> Tensor:
    """Mark positions at which whole words stand, `(places,)` bool: no longer word continues after them.

    Args:
        tower: Text encoder whose tokeniser marks where words begin.
        words: Word states of all prompts.
        start: Index of the first token of each, `(places,)`.
        count: Number of tokens of each.
    """
    fits = torch.ones(len(start), dtype=torch.bool)
    if not tower.marks_starts:
        return fits  # the end of a word is marked in its last token
    for row, first in enumerate(start.tolist()):
        own = words.prompt == words.prompt[first]
        ahead = int(own.nonzero()[0])
        ids = words.ids[own].tolist()
        place = first - ahead
        fits[row] = is_whole_word(tower, ids, slice(place, place + count))
    return fits


class Gate(NamedTuple):
    """The gate of a concept: a score of latents, and one of a linear probe."""

    features: list[int]
    """Latents in the score."""
    weight: Tensor
    """Weights of the latents, `(features,)`."""
    bias: float
    """Bias of the latents' score."""
    level: float
    """Smallest score, as a logit, that opens the gate."""
    probe: Tensor
    """Weights of the probe, `(dim,)`."""
    probe_bias: float
    """Bias of the probe's score."""
    probe_level: float
    """Smallest score, as a logit, that opens the gate."""
    figures: Settings
    """Rates measured on the calibration prompts."""


def logistic(x: Tensor, y: Tensor, penalty: float, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression with equal weights of both classes, by L-BFGS.

    Args:
        x: Inputs, `(samples, dim)`.
        y: Labels, `(samples,)` bool.
        penalty: Factor of the squared norm of the weights.
        steps: Largest number of steps.

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
    """Choose a gate's threshold, which at most a share `rate` of the prompts without the concept reach.

    Where the scores of both kinds are separated, the threshold lies between them, see `ROOM`.

    Args:
        target: Scores of prompts with the concept, `(prompts,)`.
        retain: Scores of other prompts, `(prompts,)`.
        rate: Allowed false positive rate, 0 to 1.
    """
    above = retain.sort(descending=True).values
    allowed = min(int(rate * len(above)), len(above) - 1)
    # The threshold is at least the next float above the highest score that must not open the gate.
    low = torch.nextafter(above[allowed], torch.tensor(torch.inf)).item()
    return max(low, low + ROOM * (target.quantile(0.01).item() - low))


def area(target: Tensor, retain: Tensor) -> float:
    """Compute the area under the ROC curve: the probability that a prompt with the concept scores higher."""
    wins = (target[:, None] > retain[None]).double() + 0.5 * (target[:, None] == retain[None]).double()
    return wins.mean().item()


def roc(target: Tensor, retain: Tensor) -> list[tuple[float, float]]:
    """Compute the ROC curve at `ROC_RATES`: pairs of false positive rate and true positive rate."""
    above = retain.sort(descending=True).values
    at = [above[min(int(rate * len(above)), len(above) - 1)] for rate in ROC_RATES]
    return [
        (rate, round((target > level).double().mean().item(), 4)) for rate, level in zip(ROC_RATES, at, strict=True)
    ]


def fit_gate(
    sae: SparseAutoencoder, words: WordStates, labels: Labels, chooses: Tensor, *, votes: int, rate: float
) -> Gate:
    """Fit a gate's scores on one part of the prompts, and set its thresholds on the others.

    Args:
        sae: The dictionary.
        words: Word states of all prompts.
        labels: Where the concept is named.
        chooses: Marks the prompts to fit scores on, `(prompts,)` bool.
        votes: Largest number of latents in the score.
        rate: Share, 0 to 1, of the prompts without the concept that may open the gate.
    """
    train = (labels.positive | labels.negative) & chooses[words.prompt]
    x, y = words.states[train], labels.positive[train]
    device = sae.W_enc.device
    wide = most_telling(sae, x, y)
    latents = sae.slice(wide).encode(x.to(device)).cpu()
    scale = latents.amax(0).clamp_min(1e-6)
    first, _ = logistic(latents / scale, y, PENALTY["features"])
    telling = (first.abs() * (latents / scale).std(0)).topk(min(votes, len(wide))).indices
    features = [wide[i] for i in telling.tolist()]
    weight, bias = logistic(latents[:, telling] / scale[telling], y, PENALTY["features"])
    weight = weight / scale[telling]
    centre, spread = x[~y].mean(0), x[~y].std(0).clamp_min(1e-6)
    slope, shift = logistic((x - centre) / spread, y, PENALTY["probe"])
    probe = _stored(slope / spread)
    probe_bias = shift - centre @ probe
    part = FeatureSlice(*(_stored(tensor) for tensor in sae.slice(features)))
    scores = {
        "features": words.greatest(part.encode(words.states.to(device)).cpu() @ weight + bias),
        "probe": words.greatest(words.states @ probe + probe_bias),
    }
    levels, figures = {}, {}
    for kind, score in scores.items():
        target, retain = (held_out(score, part, chooses) for part in (labels.holds, ~labels.holds))
        levels[kind] = level = calibrate(target, retain, rate)
        figures[kind] = {
            "tpr": round((target >= level).double().mean().item(), 4),
            "fpr": round((retain >= level).double().mean().item(), 4),
            "auc": round(area(target, retain), 5),
            "roc": roc(target, retain),
        }
    counted = {"prompts_with": len(target), "prompts_without": len(retain)}
    return Gate(
        features, weight, bias.item(), levels["features"], probe, probe_bias.item(), levels["probe"],
        {**counted, **figures},
    )  # fmt: skip


def _stored(tensor: Tensor) -> Tensor:
    """Round a tensor as saving does, so that thresholds are set with the values in use."""
    return tensor.half().to(tensor.dtype)


def held_out(score: Tensor, part: Tensor, chooses: Tensor) -> Tensor:
    """Give scores of the prompts of a part that are held out; of the whole part when none are."""
    calibrates = part & ~chooses
    return score[calibrates if calibrates.any() else part]


def halves(labels: Labels, generator: torch.Generator) -> Tensor:
    """Choose the prompts to fit on, `(prompts,)` bool: random halves of those with and without the concept."""
    chooses = torch.zeros(len(labels.holds), dtype=torch.bool)
    for part in (labels.holds, ~labels.holds):
        index = part.nonzero()[:, 0]
        chooses[index[torch.randperm(len(index), generator=generator)[: (len(index) + 1) // 2]]] = True
    return chooses


@torch.no_grad()
def strongest(sae: SparseAutoencoder, words: WordStates) -> Tensor:
    """Compute the largest value of each latent at a prompt's words, `(prompts, d_sae)`."""
    made = words.states.new_zeros(words.prompts, sae.config.d_sae)
    for part in torch.arange(len(words.ids)).split(4096):
        latents = sae.encode(words.states[part].to(sae.W_enc.device)).cpu()
        made.scatter_reduce_(0, words.prompt[part][:, None].expand_as(latents), latents, "amax")
    return made


@torch.no_grad()
def most_telling(sae: SparseAutoencoder, x: Tensor, y: Tensor) -> list[int]:
    """Find the latents whose mean differs most between words of a concept and others, in units of their spread.

    Args:
        sae: The dictionary.
        x: Activations, `(words, dim)`.
        y: Words of the concept, `(words,)` bool.
    """
    total = torch.zeros(3, sae.config.d_sae)
    for part in torch.arange(len(x)).split(4096):
        latents = sae.encode(x[part].to(sae.W_enc.device)).cpu()
        total += torch.stack([latents[y[part]].sum(0), latents.sum(0), latents.square().sum(0)])
    inside, mean, square = total[0] / y.sum(), total[1] / len(x), total[2] / len(x)
    spread = (square - mean.square()).clamp_min(0).sqrt()
    contrast = (inside - mean).abs() / (spread + 1e-6)
    return contrast.topk(min(CANDIDATES, sae.config.d_sae)).indices.tolist()


def with_mined(words: WordStates, labels: Labels, mined: WordStates, learned: Tensor) -> tuple[WordStates, Labels]:
    """Add mined prompts to those with the concept.

    Args:
        words: Word states of all prompts.
        labels: Labels of these words.
        mined: Words of mined prompts.
        learned: Learned tokens among the mined words, `(words,)` bool.
    """
    neither = torch.zeros(len(mined.ids), dtype=torch.bool)
    return joined([words, mined]), Labels(
        torch.cat([labels.holds, torch.ones(mined.prompts, dtype=torch.bool)]),
        torch.cat([labels.positive, learned]),
        torch.cat([labels.negative, neither]),
    )
