"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al., WACV 2024, arXiv 2308.14761)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, EntryLayer, TextTower, TokenRun
from erasure.backbones.conditioning import Source
from erasure.carriers.edits import Edits, InputMap
from erasure.concept import Concept
from erasure.needs import Need
from erasure.options import CountOrZero, NotNegative, Positive, Presets, ZeroToOne
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.closed_form import factors, low_rank, shortened_map, solve
from erasure.text.corpora import retain_prompts, vocabulary, vocabulary_prompts
from erasure.text.encodings import Reader
from erasure.text.words import AlignedPrompt, aligned_prompts, paired_at_the_end, subject_span, telling_places

LARGEST_LORA = 1_000_000
"""Bytes a concept that a LoRA may take in the place of one common map."""


class Change(NamedTuple):
    """What becomes of all layers that read one part of the conditioning: `W' = W + W left right`."""

    layers: Sequence[EntryLayer]
    weights: Sequence[Tensor]
    """Their columns that read it, float64."""
    left: Tensor
    """`(dim, rank)` float64."""
    right: Tensor
    """`(rank, dim)` float64."""
    up: Tensor
    """The same as `left` in fewer numbers, for all layers alike."""
    down: Tensor
    """The same as `right`."""
    features: Tensor
    """`(n, dim)` float64: what is erased, takes its place or is preserved."""


@register("uce")
@dataclass(frozen=True, kw_only=True)
class UCE(Strategy):
    """Rewrite what the denoiser's text layers make of the concept, in closed form.

    For each linear layer `W` through which text enters the denoiser (cross-attention keys and values; in transformers
    the layer that reads the tokens), minimise

        sum_e s_e |W' c_e - W c_a|^2 + sum_p s_p |W' c_p - W c_p|^2 + lambda |W' - W|^2

    over `W'`, with erased features `c_e`, the features `c_a` that take their place, and preserved features `c_p`. The
    solution is `W' = W + W X` with one matrix `X = (sum_e s_e (c_a - c_e) c_e^T) M^-1`,
    `M = sum_e s_e c_e c_e^T + sum_p s_p c_p c_p^T + lambda I`, shared by all layers; its rank is at most the number of
    erased features. The file holds X once, in as few numbers as keep its effect. Biases cancel and stay untouched.
    A layer that reads a pooled vector of the prompt gets an X of its own, from the pooled vectors of the same prompts,
    in those of its columns that read it. Of a text encoder whose tokens see those that follow (T5), every token of a
    prompt carries the concept, so all are erased; a few of its paddings stand for the rest.

    Preset `released` is the authors' script of 2025: of every bare name the last token is erased, and the anchor's
    last token takes its place; where there is no anchor, that of "art" for a style and the start token for an object.
    Names on the retain lists are preserved, and nothing else.

    Protects released weights against prompts; learned embeddings can bring the concept back.
    """

    title: ClassVar[str] = "closed-form edit of cross-attention keys and values"
    paper: ClassVar[str] = "Gandikota et al. 2024, arXiv 2308.14761"
    needs: ClassVar[tuple[Need, ...]] = ("entry layers",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "seconds, text encoder only"

    erase_scale: Positive = 10.0
    """Weight s_e of an erased feature (released code: 1, with far fewer preserved ones against it)."""
    preserve_scale: NotNegative = 1.0
    """Weight s_p of a preserved feature (released code: 1)."""
    regularisation: Positive = 0.5
    """lambda (released code: 0.5)."""
    relative: bool = True
    """Whether lambda is in mean squares of the features' values, about 1 in Stable Diffusion and very different in
    other text encoders; else it is a plain number (released code)."""
    tokens: Literal["last", "from_last"] = "from_last"
    """`last`: the concept's last token only (released code). `from_last`: it and all that follow, padding included,
    which carry the concept too because attention is causal; every token where it is not."""
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
            "regularisation": 0.5, "relative": False, "erase_scale": 1.0, "preserve_scale": 1.0, "tolerance": 0.0,
        },
    }  # fmt: skip

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return "" if self.preserve_scale else "preserve_scale"

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Solve for all concepts at once in float64, once for the layers that read tokens, once for pooled vectors."""
        layers = backbone.entry_layers()
        # A prompt at a time: each encoding is then the same whatever else is erased.
        reader = Reader(backbone, batch=1)
        changes, count = [], 0
        for source in dict.fromkeys(layer.source for layer in layers):
            erased, replacing = self.erased_features(reader, source, concepts)
            progress(0.4)
            preserved = self.preserved_features(reader, source, concepts, seed)
            progress(0.7)
            features = torch.cat([erased, replacing, preserved])
            weight = self.regularisation * (float(features.square().mean()) if self.relative else 1.0)
            left, right = factors(solve(erased, replacing, preserved, self.erase_scale, self.preserve_scale, weight))
            reading = [layer for layer in layers if layer.source == source]
            weights = [layer.module.weight.detach()[:, layer.columns].double().cpu() for layer in reading]
            up, down = shortened_map(left, right, weights, features, self.tolerance)
            count += len(erased)
            changes.append(Change(reading, weights, left, right, up, down, features))
        edits = self.edits(changes, LARGEST_LORA * len(concepts))
        progress(1.0)
        rank = sum(len(change.down) for change in changes)
        return Fit(edits, {"rank": float(rank), "erased_features": float(count)})

    def edits(self, changes: Sequence[Change], limit: int) -> Edits:
        """The changes as a LoRA, or as maps where a LoRA would take more bytes than a limit; see `saved_as`."""
        # A layer's own factors are as long as the common ones, or a little shorter.
        expected = sum(
            len(change.down) * sum(layer.module.weight.shape) * change.down.element_size()
            for change in changes
            for layer in change.layers
        )
        if self.saved_as == "map" or (self.saved_as == "auto" and expected > limit):
            maps = {}
            for change in changes:
                # The same tensors for all layers: they are kept once.
                down, up = widened(change.down, change.layers[0]), widened(change.up, change.layers[0], axis=0)
                for layer in change.layers:
                    maps[layer.key] = InputMap(down, up, torch.tensor(len(layer.module.weight)))
            return Edits(maps=maps)
        made = {}
        for change in changes:
            for layer, weight in zip(change.layers, change.weights, strict=True):
                pair = low_rank(weight @ change.left, change.right, change.features, self.tolerance)
                made[layer.key] = pair._replace(down=widened(pair.down, layer))
        return Edits(made)

    def erased_features(self, reader: Reader, source: Source, concepts: Sequence[Concept]) -> tuple[Tensor, Tensor]:
        """Features to erase and those that take their place, `(features, dim)` each, float64.

        Args:
            reader: Encodes prompts.
            source: Tokens, or pooled vectors: a prompt has one, which carries all of it.
            concepts: What to erase.
        """
        erased, replacing = [], []
        # A pooled vector has no places, so any run of tokens gives the prompts.
        for run in reader.backbone.token_runs[: None if source == "tokens" else 1]:
            tower, first = run.tower, run.first
            for pair in (pair for concept in concepts for pair in self.pairs(tower, concept)):
                told = reader.read([pair.prompt, pair.anchor_prompt])
                states, anchors = (told([text]).of(source)[0] for text in (pair.prompt, pair.anchor_prompt))
                if source == "pooled":
                    erased.append(states)
                    replacing.append(anchors)
                    continue
                only = self.tokens == "last"
                start = pair.last if only and not tower.causal else pair.start
                stop = pair.last + 1 if only else tower.max_length
                places = telling_places(tower, pair.prompt)
                places = places[(places >= start) & (places < stop)]
                erased.append(states[first + places.to(states.device)])
                replacing.append(anchors[first + pair.positions[places].to(anchors.device)])
        return torch.cat(erased).double().cpu(), torch.cat(replacing).double().cpu()

    def pairs(self, tower: TextTower, concept: Concept) -> list[AlignedPrompt]:
        """The prompts to erase, aligned with what takes their place."""
        default = self.style_anchor if concept.kind == "style" else ""
        if self.templates:
            return aligned_prompts(tower, concept, default)
        anchor = default if concept.anchor is None else concept.anchor
        return [paired_at_the_end(tower, "{}", words, anchor) for words in concept.names]

    @torch.no_grad()
    def preserved_features(self, reader: Reader, source: Source, concepts: Sequence[Concept], seed: int) -> Tensor:
        """Features to keep, `(features, dim)` float64; may be empty. The arguments are those of `erased_features`."""
        backbone = reader.backbone
        runs = backbone.token_runs if source == "tokens" else []
        states = reader.read([""])([""]).of(source)[0]
        kept = [states[:0]]
        for run in runs:
            kept.append(states[run.first : run.first + run.tower.leading * self.preserve_start])
        if self.tokens == "last":
            subjects = {
                template.format(words): words
                for concept in concepts
                for words in concept.retain
                for template in (concept.phrasings() if self.templates else ("{}",))
            }
            for prompt, words in subjects.items():
                states = reader.read([prompt])([prompt]).of(source)[0]
                for run in runs:
                    span = subject_span(run.tower, prompt, words)
                    start = span.start if run.tower.causal else span.first
                    kept.append(states[run.first + start : run.first + span.last + 1])
                if source == "pooled":
                    kept.append(states)
        else:
            for prompt in retain_prompts(concepts) if self.templates else ["", *retained_names(concepts)]:
                kept.append(_telling(reader.read([prompt])([prompt]).of(source)[0], runs, prompt))
        known = vocabulary(backbone.reader, concepts) if self.vocabulary else []
        if known:
            prompts = vocabulary_prompts(known, self.vocabulary, torch.Generator().manual_seed(seed))
            for start in range(0, len(prompts), 32):
                chosen = prompts[start : start + 32]
                told = backbone.encode(chosen).of(source)
                kept += [_telling(states, runs, prompt) for states, prompt in zip(told, chosen, strict=True)]
        return torch.cat(kept).double().cpu()


def _telling(states: Tensor, runs: Sequence[TokenRun], prompt: str) -> Tensor:
    """Those of a prompt's features that count; see `telling_places`. All of them without runs of tokens."""
    if not runs:
        return states
    places = torch.cat([run.first + telling_places(run.tower, prompt) for run in runs])
    return states[places.to(states.device)]


def widened(matrix: Tensor, layer: EntryLayer, axis: int = 1) -> Tensor:
    """A matrix over the columns of a layer that read text, with zeros for those that read something else.

    Args:
        matrix: As long along an axis as there are columns that read text.
        layer: The layer.
        axis: That axis.
    """
    if layer.columns == slice(None):
        return matrix
    length = layer.module.weight.shape[1]
    places = torch.arange(length)[layer.columns]
    shape = [length, matrix.shape[1]] if axis == 0 else [matrix.shape[0], length]
    return matrix.new_zeros(shape).index_copy(axis, places, matrix)


def retained_names(concepts: Sequence[Concept]) -> list[str]:
    """The names on all retain lists, each once."""
    return list(dict.fromkeys(words for concept in concepts for words in concept.retain))
