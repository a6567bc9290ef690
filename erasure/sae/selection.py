"""Selection of the latents of a dictionary that separate a concept from other prompts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.sae.gates import Labels, WordStates
from erasure.sae.model import SparseAutoencoder


class Evidence(NamedTuple):
    """How often and how strongly each latent fires on the words of prompts with and without a concept."""

    target_rate: Tensor
    """Share of the prompts with the concept on which a latent fires, `(d_sae,)`."""
    retain_rate: Tensor
    """Share of the other prompts on which a latent fires, `(d_sae,)`."""
    magnitude: Tensor
    """Mean over prompts with the concept of a latent's largest value, `(d_sae,)`."""

    @property
    def score(self) -> Tensor:
        """Difference of the rates, `(d_sae,)`."""
        return self.target_rate - self.retain_rate


def evidence(target: Tensor, retain: Tensor, floor: float) -> Evidence:
    """Compute the evidence from largest values `(prompts, d_sae)` with and without the concept; see `ItD.floor`."""
    magnitude = target.mean(0)
    fires = [(part > floor * magnitude).float().mean(0) for part in (target, retain)]
    return Evidence(fires[0], fires[1], magnitude)


def top_sets(activity: Tensor, top: int) -> Tensor:
    """Mark the largest latents of each prompt, `(prompts, d_sae)` bool; silent ones are never marked."""
    largest = activity.topk(min(top, activity.shape[1]), dim=1).indices
    return torch.zeros_like(activity, dtype=torch.bool).scatter(1, largest, True) & (activity > 0)


def no_feature(
    tower: TextTower, sae: SparseAutoencoder, words: WordStates, labels: Labels, found: Evidence, name: str
) -> str:
    """Explain why this dictionary cannot erase a concept, and which words the nearest latents would change."""
    others = words.of(~labels.holds)
    listed = []
    for i in found.score.topk(min(3, len(found.score))).indices.tolist():
        values = sae.slice([i]).encode(others.states.to(sae.W_enc.device))[:, 0].cpu()
        order = values.argsort(descending=True)[:200]
        tokens = [tower.tokenizer.decode([token]).strip() for token in others.ids[order[values[order] > 0]].tolist()]
        hit = ", ".join(list(dict.fromkeys(token for token in tokens if token.isalnum()))[:3]) or "nothing else"
        listed.append(
            f"latent {i} fires on {found.target_rate[i]:.0%} of its prompts and on {found.retain_rate[i]:.1%} of the "
            f"others, most on: {hit}"
        )
    return (
        f"no feature of the dictionary of {tower.component} tells {name!r} from the rest. The nearest: "
        f"{'; '.join(listed)}. Raise retain_rate if losing those is acceptable, or train a larger dictionary on "
        "prompts with the concept"
    )
