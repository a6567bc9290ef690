"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al., WACV 2024, arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits, InputMap
from erasure.concept import Concept
from erasure.options import CountOrZero, NotNegative, Positive, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.closed_form import factors, low_rank, paired_at_the_end, shortened_map, solve
from erasure.strategies.prompts import (
    AlignedPrompt,
    aligned_prompts,
    retain_prompts,
    subject_span,
    vocabulary,
    vocabulary_prompts,
)

LARGEST_LORA = 1_000_000
"""Bytes a concept that a LoRA may take in the place of one common map."""


@register("uce")
@dataclass(frozen=True, kw_only=True)
class UCE(Strategy):
    """Rewrite what the denoiser's text layers make of the concept, in closed form.

    For each linear layer `W` through which text enters the denoiser (cross-attention keys and values), minimise

        sum_e s_e |W' c_e - W c_a|^2 + sum_p s_p |W' c_p - W c_p|^2 + lambda |W' - W|^2

    over `W'`, with erased features `c_e`, the features `c_a` that take their place, and preserved features `c_p`. The
    solution is `W' = W + W X` with one matrix `X = (sum_e s_e (c_a - c_e) c_e^T) M^-1`,
    `M = sum_e s_e c_e c_e^T + sum_p s_p c_p c_p^T + lambda I`, shared by all layers; its rank is at most the number of
    erased features. The file holds X once, in as few numbers as keep its effect. Biases cancel and stay untouched.

    Preset `released` is the authors' script of 2025: of every bare name the last token is erased, and the anchor's
    last token takes its place; where there is no anchor, that of "art" for a style and the start token for an object.
    Names on the retain lists are preserved, and nothing else.

    Protects released weights against prompts; learned embeddings can bring the concept back.
    """

    title: ClassVar[str] = "closed-form edit of cross-attention keys and values"
    paper: ClassVar[str] = "Gandikota et al. 2024, arXiv 2308.14761"
    families: ClassVar[tuple[str, ...]] = ("stable-diffusion",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "seconds, text encoder only"

    erase_scale: Positive = 10.0
    """Weight s_e of an erased feature (released code: 1, with far fewer preserved ones against it)."""
    preserve_scale: NotNegative = 1.0
    """Weight s_p of a preserved feature (released code: 1)."""
    regularisation: Positive = 0.5
    """lambda, in squared units of the text features (released code: 0.5)."""
    tokens: Literal["last", "from_last"] = "from_last"
    """`last`: the concept's last token only (released code). `from_last`: it and all that follow, padding included,
    which carry the concept too because attention is causal."""
    templates: bool = True
    """Erase and preserve every phrasing of a concept. Without, its names alone (released code), whose last token
    answers to the anchor's last, or to the start token where the anchor is empty."""
    style_anchor: str = ""
    """Word that takes the place of a style without anchor; nothing does when empty (released code: "art")."""
    preserve_start: bool = True
    """Preserve the start token, which is the same in every prompt (released code: no)."""
    tolerance: ZeroToOne = 1e-3
    """How far the change of each layer may be from the whole to make the file smaller: relative, over the features
    that are erased, take their place or are preserved. 0 keeps all, in float32."""
    saved_as: Literal["auto", "lora", "map"] = "auto"
    """`lora`: a LoRA that other programs load too, with factors for every layer. `map`: X once for all layers, some
    thirty times smaller, which this package reads. `auto`: the LoRA while it takes no more than 1 MB a concept."""
    vocabulary: CountOrZero = 300
    """Preserved besides the retain lists: random prompts from the tokeniser's own words. 0 switches it off."""

    presets: ClassVar[Presets] = {
        "released": {
            "tokens": "last", "templates": False, "style_anchor": "art", "preserve_start": False, "vocabulary": 0,
            "regularisation": 0.5, "erase_scale": 1.0, "preserve_scale": 1.0, "tolerance": 0.0,
        },
    }  # fmt: skip

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return "" if self.preserve_scale else "preserve_scale"

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Solve for all concepts at once, in float64."""
        tower = backbone.towers[0]
        erased, replacing = self.erased_features(backbone, tower, concepts)
        progress(0.4)
        preserved = self.preserved_features(backbone, tower, concepts, seed)
        progress(0.7)
        update = solve(erased, replacing, preserved, self.erase_scale, self.preserve_scale, self.regularisation)
        left, right = factors(update)
        weights = {layer.key: layer.module.weight.detach().double().cpu() for layer in backbone.entry_layers()}
        features = torch.cat([erased, replacing, preserved])
        up, down = shortened_map(left, right, list(weights.values()), features, self.tolerance)
        # A layer's own factors are as long as the common ones, or a little shorter.
        expected = sum(len(down) * sum(weight.shape) * down.element_size() for weight in weights.values())
        if self.saved_as == "map" or (self.saved_as == "auto" and expected > LARGEST_LORA * len(concepts)):
            outputs = {key: torch.tensor(len(weight)) for key, weight in weights.items()}
            edits = Edits(maps={key: InputMap(down, up, number) for key, number in outputs.items()})
        else:
            edits = Edits(
                {key: low_rank(weight @ left, right, features, self.tolerance) for key, weight in weights.items()}
            )
        progress(1.0)
        return Fit(edits, {"rank": float(len(down)), "erased_features": float(len(erased))})

    @torch.no_grad()
    def erased_features(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept]
    ) -> tuple[Tensor, Tensor]:
        """Features to erase and those that take their place, `(features, dim)` each, float64."""
        erased, replacing = [], []
        for concept in concepts:
            for pair in self.pairs(tower, concept):
                states, anchors = (
                    backbone.encode([pair.prompt]).tokens[0],
                    backbone.encode([pair.anchor_prompt]).tokens[0],
                )
                stop = pair.last + 1 if self.tokens == "last" else tower.max_length
                erased.append(states[pair.start : stop])
                replacing.append(anchors[pair.positions[pair.start : stop].to(anchors.device)])
        return torch.cat(erased).double().cpu(), torch.cat(replacing).double().cpu()

    def pairs(self, tower: TextTower, concept: Concept) -> list[AlignedPrompt]:
        """The prompts to erase, aligned with what takes their place."""
        default = self.style_anchor if concept.kind == "style" else ""
        if self.templates:
            return aligned_prompts(tower, concept, default)
        anchor = default if concept.anchor is None else concept.anchor
        return [paired_at_the_end(tower, "{}", words, anchor) for words in concept.names]

    @torch.no_grad()
    def preserved_features(
        self, backbone: Backbone, tower: TextTower, concepts: Sequence[Concept], seed: int
    ) -> Tensor:
        """Features to keep, `(features, dim)` float64; may be empty."""
        states = backbone.encode([""]).tokens[0]
        kept = [states[: int(self.preserve_start)]]
        if self.tokens == "last":
            subjects = {
                template.format(words): words
                for concept in concepts
                for words in concept.retain
                for template in (concept.phrasings() if self.templates else ("{}",))
            }
            for prompt, words in subjects.items():
                span = subject_span(tower, prompt, words)
                kept.append(backbone.encode([prompt]).tokens[0, span.start : span.last + 1])
        else:
            for prompt in retain_prompts(concepts) if self.templates else ["", *retained_names(concepts)]:
                kept.append(backbone.encode([prompt]).tokens[0])
        known = vocabulary(tower, concepts) if self.vocabulary else []
        if known:
            prompts = vocabulary_prompts(known, self.vocabulary, torch.Generator().manual_seed(seed))
            for first in range(0, len(prompts), 32):
                kept.append(backbone.encode(prompts[first : first + 32]).tokens.flatten(0, 1))
        return torch.cat(kept).double().cpu()


def retained_names(concepts: Sequence[Concept]) -> list[str]:
    """The names on all retain lists, each once."""
    return list(dict.fromkeys(words for concept in concepts for words in concept.retain))
