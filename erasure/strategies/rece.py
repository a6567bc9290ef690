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
from erasure.strategies.closed_form.entry import EntryGroup
from erasure.strategies.uce import UCE
from erasure.text.words import AlignedPrompt, telling_places

SOURCES = {"paper": (0.1, False, 0.1), "released": (1.0, True, 0.5)}
"""Values of `preserve_scale`, `preserve_divided` and `regularisation` in the paper and in the released code."""
RECIPES = {"": (1e-3, 1), "-easy": (1e-1, 1), "-nudity": (1e-1, 3), "-unsafe": (1e-1, 2)}
"""Values of `derived_regularisation` and `rounds`, by suffix of the preset's name."""


@register("rece")
@dataclass(frozen=True, kw_only=True)
class RECE(UCE):
    """Erase the concept as UCE does, then erase in several rounds the embeddings that bring the concept back.

    After UCE has made `W'` of each layer `W` through which text enters the denoiser, an embedding `c'` can still
    produce the outputs that the concept's `c` gave before. The nearest such embedding minimises

        sum_layers |W' c' - W c|^2 + lambda_d |c'|^2,

    so `c' = (lambda_d I + sum W'^T W')^-1 (sum W'^T W) c`. The term with `lambda_d` keeps `c'` short, so that erasing
    it changes other concepts little. UCE's closed form then maps every `c'` onto the features that replace the
    concept, and keeps the outputs of `W'` for preserved features. This is one round; the next round starts from its
    result.

    All layers that read the same part of the conditioning have `W' = W (I + X)` with one matrix X, after any number of
    rounds, so a round needs only `sum W^T W` of the layers, and the file has the same form as that of UCE.

    Presets `paper` and `released` are the recipe for styles, and for objects of which UCE leaves much (church, garbage
    truck); `-easy` is the recipe for other objects, `-nudity` and `-unsafe` are those for such content. Presets derive
    `c'` for every token of the bare name. The paper gives 0.1 for both coefficients of the closed form; the released
    code starts from a checkpoint of UCE's first code, which has other coefficients. That code also draws images of a
    list of prompts after every round and keeps the best round; here the last round is kept.

    Protects released weights against prompts. After any number of rounds some embedding brings the concept back,
    because the matrix `I + X` is invertible; `derived_regularisation` of 1e-3 makes this embedding harder to find.
    """

    title: ClassVar[str] = "closed-form edit of keys and values, repeated against derived embeddings"
    paper: ClassVar[str] = "Gong et al. 2024, arXiv 2407.12383"

    rounds: Count = 1
    """Number of rounds after UCE's edit, in each of which embeddings are derived and erased (paper: 1; nudity 3,
    other unsafe content 2)."""
    derived_regularisation: Positive = 1e-1
    """Weight lambda_d of the squared length of a derived embedding (paper: 1e-3; 1e-1 for unsafe content and for
    objects of which UCE leaves little); with `relative` in units of the mean squared column of all layers together.
    Small values make it harder to bring the concept back by embeddings, and change other concepts more."""
    derived_from: Literal["erased", "prompt"] = "erased"
    """Features for which embeddings are derived: `erased`, those that UCE erases; `prompt`, all tokens of the
    concept's prompts including the start token, each replaced by the anchor's token at the same position (released
    code)."""
    round_preserve_scale: NotNegative = 1.0
    """Weight s_p of a preserved feature in the rounds (paper: 0.1)."""
    round_regularisation: Positive = 0.5
    """Weight lambda of the squared change in the rounds (paper: 0.1), in the unit of UCE's `regularisation`."""
    keep_erased: bool = True
    """Preserve in each round, with weight s_e, the edited outputs for features that are erased already. When off
    (paper), a round undoes a part of UCE's edit: on Canvas, most of a style's."""
    preserve_divided: bool = False
    """Divide UCE's s_p by the number of preserved prompts, to no less than 0.1 (released code)."""

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
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return super().ignores_retain() or ("" if self.round_preserve_scale else "round_preserve_scale")

    def map_of(self, group: EntryGroup) -> Tensor:
        """Compute X of UCE and all rounds together, `(dim, dim)` float64."""
        identity = torch.eye(group.erased.shape[1], dtype=torch.float64)
        gram = sum((weight.T @ weight for weight in group.weights), torch.zeros_like(identity))
        unit, column = (group.mean_square, float(gram.diagonal().mean())) if self.relative else (1.0, 1.0)
        whole = identity + self.first_map(group, self.regularisation * unit)
        concept, replacing = self.derivable(group)
        gone = group.erased if self.keep_erased else group.erased[:0]
        for _ in range(self.rounds):
            adversarial = derived(whole, gram, concept, self.derived_regularisation * column)
            # Features that are erased already replace themselves, which keeps the layers' current outputs for them.
            erased, places = torch.cat([adversarial, gone]), torch.cat([replacing, gone])
            scales = self.erase_scale, self.round_preserve_scale, self.round_regularisation * unit
            whole = whole @ (identity + solve(erased, places, group.preserved, *scales))
            gone = erased if self.keep_erased else gone
        return whole - identity

    def first_map(self, group: EntryGroup, regularisation: float) -> Tensor:
        """Compute X of UCE's edit, `(dim, dim)` float64."""
        names = {words for concept in group.concepts for words in concept.retain}
        share = max(round(1 / (1 + len(names)), 3), 0.1) if self.preserve_divided else 1.0
        scale = self.preserve_scale * share
        return solve(group.erased, group.replacing, group.preserved, self.erase_scale, scale, regularisation)

    def derivable(self, group: EntryGroup) -> tuple[Tensor, Tensor]:
        """Give the features to derive embeddings for, and the features that replace them, `(features, dim)` each."""
        if self.derived_from == "erased":
            return group.erased, group.replacing
        return self.erased_features(group.reader, group.source, group.concepts, every_place)

    def places(self, tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
        """See `EntryEdit.places`; for bare names, positions after the end of the anchor's prompt are left out."""
        places, answering = super().places(tower, pair)
        at_end = answering == tower.max_length - 1
        kept = ~(at_end & (at_end.cumsum(0) > 1)) | self.templates
        return places[kept], answering[kept]


def derived(whole: Tensor, gram: Tensor, concept: Tensor, regularisation: float) -> Tensor:
    """Derive embeddings for which edited layers give about what stock layers give for the concept (RECE).

    Args:
        whole: `I + X`, `(dim, dim)`: an edited layer is `W (I + X)`.
        gram: `sum W^T W` over the stock layers, `(dim, dim)`.
        concept: The concept's embeddings, `(n, dim)`.
        regularisation: lambda_d > 0.

    Returns:
        Derived embeddings, `(n, dim)`.
    """
    matrix = whole.T @ gram @ whole + regularisation * torch.eye(len(gram), dtype=gram.dtype)
    return solved(matrix, whole.T @ gram @ concept.T).T


def every_place(tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
    """Give all positions of a prompt, and the same positions of the anchor prompt."""
    places = telling_places(tower, pair.prompt)
    return places, places
