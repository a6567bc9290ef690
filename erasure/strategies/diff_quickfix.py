"""Diff-QuickFix: localising and editing knowledge in the text encoder (Basu et al., ICLR 2024, arXiv 2310.13730)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits, LowRank
from erasure.concept import Concept
from erasure.interop.taps import tapped
from erasure.options import CountOrZero, Positive, Presets
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.prompts import aligned_prompts, retain_prompts, vocabulary, vocabulary_prompts
from erasure.strategies.uce import compress, factors, solve


@register("diff_quickfix")
@dataclass(frozen=True, kw_only=True)
class DiffQuickFix(Strategy):
    """Rewrite the first self-attention output projection of the text encoder, in closed form.

    Causal tracing finds a concept's visual attributes in the first attention block of CLIP's text encoder. Its output
    projection `W` is changed so that the inputs `k` it gets for the concept give the outputs `v` it gives for the
    anchor:

        W' = argmin sum_e |W' k_e - v_e|^2 + sum_p |W' k_p - W k_p|^2 + lambda |W' - W|^2

    at the concept's last token and all that follow. Exactly low-rank, so the result is a LoRA.

    Protects a hosted pipeline: whoever holds the weights can put the stock encoder back.
    """

    title: ClassVar[str] = "closed-form edit of the text encoder's first attention"
    paper: ClassVar[str] = "Basu et al. 2024, arXiv 2310.13730"
    families: ClassVar[tuple[str, ...]] = ("stable-diffusion",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds, text encoder only"

    regularisation: Positive = 0.01
    """lambda, in squared units of the layer's inputs (released code: 0.01)."""
    vocabulary: CountOrZero = 300
    """Random prompts from the tokeniser's own words, preserved with the retain lists. 0: nothing is (paper)."""

    presets: ClassVar[Presets] = {"released": {"vocabulary": 0, "regularisation": 0.01}}

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Solve for all concepts at once in each text tower, in float64."""
        edits = Edits()
        for tower in backbone.towers:
            layer = tower.blocks[0].self_attn.out_proj
            keys, values = [], []
            for concept in concepts:
                for pair in aligned_prompts(tower, concept):
                    erased, anchor = first_inputs(tower, layer, [pair.prompt, pair.anchor_prompt])
                    keys.append(erased[pair.start :])
                    values.append(anchor[pair.positions[pair.start :]])
            progress(0.4)
            kept = [first_inputs(tower, layer, retain_prompts(concepts)).flatten(0, 1)] if self.vocabulary else []
            words = vocabulary(tower, concepts) if self.vocabulary else []
            if words:
                prompts = vocabulary_prompts(words, self.vocabulary, torch.Generator().manual_seed(seed))
                kept += [
                    first_inputs(tower, layer, prompts[i : i + 32]).flatten(0, 1) for i in range(0, len(prompts), 32)
                ]
            erased_keys, anchors = torch.cat(keys), torch.cat(values)
            preserved = torch.cat(kept) if kept else erased_keys[:0]
            update = solve(erased_keys, anchors, preserved, 1.0, 1.0, self.regularisation)
            left, down = factors(update)
            edit = LowRank(down, layer.weight.detach().double().cpu() @ left)
            edits.low_rank[tower.key("encoder.layers.0.self_attn.out_proj")] = compress(edit)
            rank = len(down)
            progress(1.0)
        return Fit(edits, {"rank": float(rank)})


@torch.no_grad()
def first_inputs(tower: TextTower, layer: nn.Linear, prompts: Sequence[str]) -> Tensor:
    """Inputs of a linear layer for a batch of prompts, `(prompts, tokens, dim)` float64 on the CPU."""
    with tapped(layer, inputs=True) as seen:
        tower.encode(tower.tokenize(prompts))
    return seen[0].double().cpu()
