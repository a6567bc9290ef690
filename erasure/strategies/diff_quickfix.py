"""Diff-QuickFix: localising and editing knowledge in the text encoder (Basu et al., ICLR 2024, arXiv 2310.13730)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.concept import Concept
from erasure.interop import paths
from erasure.interop.taps import tapped
from erasure.needs import Need
from erasure.options import CountOrZero, Positive, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.closed_form import bare_or_phrased, factors, low_rank, outputs_added, random_prompts, solve
from erasure.text.corpora import retain_prompts
from erasure.text.words import telling_places

RELEASED = ("{}", "A photo of {}", "An image of {}", "A picture of {}")
"""Prompt templates of the released code."""


@register("diff_quickfix")
@dataclass(frozen=True, kw_only=True)
class DiffQuickFix(Strategy):
    """Rewrite the first self-attention output projection of the text encoder, in closed form.

    Causal tracing finds a concept's visual attributes in the first attention block of CLIP's text encoder. The output
    projection `W` of that block is changed so that its inputs `k` for the concept give its outputs `v` for the anchor:

        W' = argmin sum_e |W' k_e - v_e|^2 + sum_p |W' k_p - W k_p|^2 + lambda |W' - W|^2

    The sum over e runs over the concept's last token and all tokens after it; the sum over p over the tokens of
    prompts that must survive. The change has low rank, so the result is a LoRA. In a model with several text encoders
    each one is changed. T5, in which no published tracing has located concepts, is changed at every token of a prompt.

    Preset `released` is the authors' notebook: four phrasings of every concept, aligned by their last tokens, and
    nothing preserved by default. In the notebook `v_e` contains the layer's bias, so that the layer then adds the bias
    twice. Names on retain lists are preserved with the preset too.

    Protects a hosted pipeline: whoever has the weights can use the stock text encoder again.
    """

    title: ClassVar[str] = "closed-form edit of the text encoder's first attention"
    paper: ClassVar[str] = "Basu et al. 2024, arXiv 2310.13730"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds, text encoder only"

    regularisation: Positive = 0.01
    """Weight lambda of the squared change, in squared units of the layer's inputs (released code: 0.01)."""
    phrasings: Literal["concept", "released"] = "concept"
    """Prompts that name the concept: `concept` the phrasings of its kind, `released` the four of the released code."""
    doubled_bias: bool = False
    """Include the layer's bias in the outputs for the anchor, so that the layer adds the bias twice (released
    code)."""
    tolerance: ZeroToOne = 1e-3
    """Largest relative error of the change that is accepted to make the file smaller, measured over the inputs that
    are erased, replace them or are preserved. 0 keeps the exact change in float32."""
    vocabulary: CountOrZero = 300
    """Number of random prompts, made of the tokeniser's words, that are preserved in addition to the retain lists
    (paper: 0)."""

    presets: ClassVar[Presets] = {
        "released": {"phrasings": "released", "doubled_bias": True, "vocabulary": 0, "regularisation": 0.01,
                     "tolerance": 0.0},
    }  # fmt: skip

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Solve for all concepts at once in each text encoder, in float64."""
        edits, rank = Edits(), 0
        for index, tower in enumerate(backbone.towers):
            path = tower.attention_out(0)
            layer = cast(nn.Linear, paths.layer(tower.root, path))
            keys, anchors = self.erased_inputs(tower, layer, concepts)
            progress((index + 0.4) / len(backbone.towers))
            preserved = self.preserved_inputs(tower, layer, concepts, seed)
            weight = layer.weight.detach().double().cpu()
            change = weight @ solve(keys, anchors, preserved, 1.0, 1.0, self.regularisation)
            if self.doubled_bias and layer.bias is not None:
                bias = layer.bias.detach().double().cpu().expand(len(keys), -1)
                change += outputs_added(keys, bias, preserved, self.regularisation)
            features = torch.cat([keys, anchors, preserved])
            edit = low_rank(*factors(change), features, self.tolerance)
            edits.low_rank[tower.key(path)] = edit
            rank += len(edit.down)
            progress((index + 1) / len(backbone.towers))
        return Fit(edits, {"rank": float(rank)})

    def erased_inputs(self, tower: TextTower, layer: nn.Linear, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
        """Gather the layer's inputs for the concepts and for their anchors, `(inputs, dim)` float64 each."""
        keys, anchors = [], []
        for concept in concepts:
            for pair in bare_or_phrased(tower, concept, bare=RELEASED if self.phrasings == "released" else ()):
                erased, anchor = first_inputs(tower, layer, [pair.prompt, pair.anchor_prompt])
                places = telling_places(tower, pair.prompt)
                places = places[places >= pair.start]
                keys.append(erased[places])
                anchors.append(anchor[pair.positions[places]])
        return torch.cat(keys), torch.cat(anchors)

    def preserved_inputs(self, tower: TextTower, layer: nn.Linear, concepts: Sequence[Concept], seed: int) -> Tensor:
        """Gather the layer's inputs whose outputs must stay, `(inputs, dim)` float64; may be empty."""
        prompts = retain_prompts(concepts)
        if not self.vocabulary:
            prompts.remove("")
        prompts += random_prompts(tower, concepts, self.vocabulary, seed)
        parts = []
        for start in range(0, len(prompts), 32):
            chosen = prompts[start : start + 32]
            inputs = first_inputs(tower, layer, chosen)
            parts += [row[telling_places(tower, prompt)] for row, prompt in zip(inputs, chosen, strict=True)]
        return torch.cat(parts) if parts else torch.zeros(0, layer.in_features, dtype=torch.float64)


@torch.no_grad()
def first_inputs(tower: TextTower, layer: nn.Linear, prompts: Sequence[str]) -> Tensor:
    """Record the inputs of a linear layer for a batch of prompts, `(prompts, tokens, dim)` float64 on the CPU."""
    with tapped(layer, inputs=True) as seen:
        tower.encode(tower.tokenize(prompts))
    return seen[0].double().cpu()
