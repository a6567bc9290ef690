"""RECE: Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024, arXiv 2407.12383)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.options import Count, NotNegative, Positive, Presets
from erasure.strategies.base import register
from erasure.strategies.closed_form import solve, solved
from erasure.strategies.closed_form.entry import Door
from erasure.strategies.uce import UCE
from erasure.text.words import AlignedPrompt, telling_places

SOURCES = {"paper": (0.1, False, 0.1), "released": (1.0, True, 0.5)}
"""Of the paper and of the released code: `preserve_scale`, `preserve_divided` and `regularisation`."""
RECIPES = {"": (1e-3, 1), "-easy": (1e-1, 1), "-nudity": (1e-1, 3), "-unsafe": (1e-1, 2)}
"""By what is erased: `derived_regularisation` and `rounds`."""


@register("rece")
@dataclass(frozen=True, kw_only=True)
class RECE(UCE):
    """Erase the concept as UCE does, then, round by round, the embeddings that bring it back.

    After UCE has made `W'` of each layer `W` through which text enters the denoiser, an embedding `c'` may still give
    the layers what the concept's `c` gave. The one that comes nearest is the minimiser of

        sum_layers |W' c' - W c|^2 + lambda_d |c'|^2,

    which is `c' = (lambda_d I + sum W'^T W')^-1 (sum W'^T W) c`. The term with `lambda_d` keeps it short, so that to
    erase it costs the other concepts little. UCE's closed form then maps every `c'` onto what takes the concept's
    place, and keeps what `W'` gives for preserved features. That is a round; the next one starts from its result.

    All layers that read the same part of the conditioning have `W' = W (I + X)` with one matrix X, after any number of
    rounds, so that a round needs no more of the layers than `sum W^T W`, and the file holds what UCE's does.

    Presets `paper` and `released` are the recipe for styles and for objects that UCE leaves much of (church, garbage
    truck); `-easy` is that for other objects, `-nudity` and `-unsafe` those for such content. They derive `c'` for
    every token of the bare name. The paper gives 0.1 for both coefficients of the closed form; the released code
    starts from a checkpoint of UCE's first code, which has others. That code draws images of a list of prompts
    after every round and keeps the round that does best; here the last round counts.

    Protects released weights against prompts. Some embedding brings the concept back after any number of rounds, as
    the map that all layers share has an inverse; with `derived_regularisation` of 1e-3 rounds make that cost more.
    """

    title: ClassVar[str] = "closed-form edit of keys and values, repeated against derived embeddings"
    paper: ClassVar[str] = "Gong et al. 2024, arXiv 2407.12383"

    rounds: Count = 1
    """How often embeddings are derived and erased after UCE's edit (paper: 1; nudity 3, other unsafe content 2)."""
    derived_regularisation: Positive = 1e-1
    """lambda_d (paper: 1e-3; 1e-1 for unsafe content and for objects that UCE leaves little of). With `relative` in
    mean squares of a column of all layers together. Small ones make it harder to bring the concept back by embeddings
    and cost more of the rest."""
    derived_from: Literal["erased", "prompt"] = "erased"
    """Features that embeddings are derived for: `erased`, those that UCE erases; `prompt`, all tokens of the concept's
    prompts, the start token among them, each of which goes to the anchor's at the same place (released code)."""
    round_preserve_scale: NotNegative = 1.0
    """Weight s_p of a preserved feature in the rounds (paper: 0.1)."""
    round_regularisation: Positive = 0.5
    """lambda of the rounds (paper: 0.1); in the same unit as UCE's."""
    keep_erased: bool = True
    """Keep, with weight s_e, what is erased already as it is before a round. Without (paper), a round takes parts of
    UCE's edit back: on Canvas most of a style."""
    preserve_divided: bool = False
    """Divide UCE's s_p by the number of preserved prompts, down to 0.1 (released code)."""

    presets: ClassVar[Presets] = {
        source + recipe: {
            "tokens": "from_last", "templates": False, "style_anchor": "art", "preserve_start": False, "vocabulary": 0,
            "relative": False, "erase_scale": 1.0, "preserve_scale": preserve_scale, "regularisation": regularisation,
            "preserve_divided": divided, "rounds": rounds, "derived_regularisation": derived,
            "derived_from": "prompt", "round_preserve_scale": 0.1, "round_regularisation": 0.1, "keep_erased": False,
            "tolerance": 0.0,
        }
        for source, (preserve_scale, divided, regularisation) in SOURCES.items()
        for recipe, (derived, rounds) in RECIPES.items()
    }  # fmt: skip

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return super().ignores_retain() or ("" if self.round_preserve_scale else "round_preserve_scale")

    def map_of(self, door: Door) -> Tensor:
        """X of UCE and of all rounds together, `(dim, dim)` float64."""
        identity = torch.eye(door.erased.shape[1], dtype=torch.float64)
        gram = sum((weight.T @ weight for weight in door.weights), torch.zeros_like(identity))
        unit, column = (door.mean_square, float(gram.diagonal().mean())) if self.relative else (1.0, 1.0)
        whole = identity + self.first_map(door, self.regularisation * unit)
        concept, replacing = self.derivable(door)
        gone = door.erased if self.keep_erased else door.erased[:0]
        for _ in range(self.rounds):
            adversarial = derived(whole, gram, concept, self.derived_regularisation * column)
            # What is gone takes its own place, which keeps what the layers give for it by now.
            erased, places = torch.cat([adversarial, gone]), torch.cat([replacing, gone])
            scales = self.erase_scale, self.round_preserve_scale, self.round_regularisation * unit
            whole = whole @ (identity + solve(erased, places, door.preserved, *scales))
            gone = erased if self.keep_erased else gone
        return whole - identity

    def first_map(self, door: Door, regularisation: float) -> Tensor:
        """X of UCE's edit."""
        names = {words for concept in door.concepts for words in concept.retain}
        share = max(round(1 / (1 + len(names)), 3), 0.1) if self.preserve_divided else 1.0
        scale = self.preserve_scale * share
        return solve(door.erased, door.replacing, door.preserved, self.erase_scale, scale, regularisation)

    def derivable(self, door: Door) -> tuple[Tensor, Tensor]:
        """Features that embeddings are derived for, and what takes their place, `(features, dim)` each."""
        if self.derived_from == "erased":
            return door.erased, door.replacing
        return self.erased_features(door.reader, door.source, door.concepts, every_place)

    def places(self, tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
        """See `EntryEdit.places`. Of bare names, places behind the anchor prompt's end are left out."""
        places, answering = super().places(tower, pair)
        at_end = answering == tower.max_length - 1
        kept = ~(at_end & (at_end.cumsum(0) > 1)) | self.templates
        return places[kept], answering[kept]


def derived(whole: Tensor, gram: Tensor, concept: Tensor, regularisation: float) -> Tensor:
    """Embeddings that give edited layers what the concept's gave the stock ones, as nearly as short ones can.

    Args:
        whole: `I + X`, `(dim, dim)`: an edited layer is `W (I + X)`.
        gram: `sum W^T W` over the stock layers, `(dim, dim)`.
        concept: The concept's embeddings, `(n, dim)`.
        regularisation: lambda_d > 0.

    Returns:
        `(n, dim)`.
    """
    matrix = whole.T @ gram @ whole + regularisation * torch.eye(len(gram), dtype=gram.dtype)
    return solved(matrix, whole.T @ gram @ concept.T).T


def every_place(tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
    """All places of a prompt, and the same of the anchor prompt."""
    places = telling_places(tower, pair.prompt)
    return places, places
