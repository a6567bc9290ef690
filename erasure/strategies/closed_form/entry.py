"""The base class of methods that rewrite, in closed form, the layers through which text enters the denoiser."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, EntryLayer, TextTower, TokenRun
from erasure.backbones.conditioning import Source
from erasure.carriers.edits import Edits
from erasure.concept import Concept
from erasure.errors import DivergenceError
from erasure.needs import Need
from erasure.options import CountOrZero, ZeroToOne
from erasure.strategies.base import Fit, Strategy
from erasure.strategies.closed_form.prompts import bare_or_phrased, random_prompts
from erasure.strategies.closed_form.written import Change, as_loras
from erasure.text.corpora import retain_prompts
from erasure.text.encodings import Reader
from erasure.text.words import AlignedPrompt, subject_span, telling_places

Tokens = Literal["last", "from_last", "all"]
"""Which tokens of a prompt carry the concept."""
Places = Callable[[TextTower, AlignedPrompt], tuple[Tensor, Tensor]]
"""Gives token positions of a prompt, and the corresponding positions of the anchor prompt, `(places,)` each."""


class EntryGroup(NamedTuple):
    """The layers that read one part of the conditioning, with the features to erase, to replace and to preserve."""

    reader: Reader
    """Encodes prompts."""
    source: Source
    """Which part of the conditioning the layers read: tokens, or pooled vectors."""
    layers: Sequence[EntryLayer]
    concepts: Sequence[Concept]
    erased: Tensor
    """Features to erase, `(erased, dim)` float64."""
    replacing: Tensor
    """Features that replace the erased ones row by row, `(erased, dim)` float64."""
    preserved: Tensor
    """Features for which the layers' outputs must stay, `(preserved, dim)` float64; may be empty."""

    @property
    def weights(self) -> list[Tensor]:
        """Weight columns of each layer that read this part of the conditioning, `(out, dim)` float64 each."""
        return [layer.module.weight.detach()[:, layer.columns].double().cpu() for layer in self.layers]

    @property
    def features(self) -> Tensor:
        """Erased, replacing and preserved features together, `(n, dim)` float64."""
        return torch.cat([self.erased, self.replacing, self.preserved])

    @property
    def mean_square(self) -> float:
        """Mean square of the features' values: about 1 in Stable Diffusion."""
        return float(self.features.square().mean())


@dataclass(frozen=True, kw_only=True)
class EntryEdit(Strategy):
    """An edit in closed form of all linear layers through which text enters the denoiser.

    One solution is computed for all layers that read tokens (cross-attention keys and values; in transformers the
    layer that projects the tokens), and another for the layers that read a pooled vector of the prompt, in the weight
    columns that read it. Biases do not change, because they cancel. In a text encoder with bidirectional attention
    (T5) every token of a prompt carries the concept, so all of them are erased; a few padding tokens represent the
    rest of the padding.
    """

    needs: ClassVar[tuple[Need, ...]] = ("entry layers",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "seconds, text encoder only"

    tokens: Tokens = "from_last"
    """Which tokens of a prompt are erased. `last`: only the last token of the concept. `from_last`: the last token
    and all tokens after it, padding included, which also carry the concept because attention is causal; every token
    where attention is bidirectional. `all`: every token after the start token, each replaced by the token at the
    same position of the anchor prompt."""
    templates: bool = True
    """Erase and preserve every phrasing of a concept. When off, only bare names are used; their last token is
    replaced by the last token of the anchor's name, or by the start token where the anchor is empty."""
    style_anchor: str = ""
    """Word that replaces a style that has no anchor; empty for none."""
    preserve_start: bool = True
    """Preserve the start token, which is the same in every prompt."""
    tolerance: ZeroToOne = 1e-3
    """Largest relative error of each layer's change that is accepted to make the file smaller, measured over the
    features that are erased, replace them or are preserved. 0 keeps the exact change in float32."""
    vocabulary: CountOrZero = 300
    """Number of random prompts, made of the tokeniser's words, that are preserved in addition to the retain lists;
    0 for none."""

    @abstractmethod
    def changes(self, group: EntryGroup, seed: int) -> Sequence[Change]:
        """Compute the changes of the layers that read one part of the conditioning."""

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Solve for all concepts at once in float64, once for the layers that read tokens, once for pooled vectors."""
        layers = backbone.entry_layers()
        # Prompts are encoded one at a time, so that an encoding does not depend on the other erased concepts.
        reader = Reader(backbone, batch=1)
        sources, count = list(dict.fromkeys(layer.source for layer in layers)), 0
        changes: list[Change] = []
        for index, source in enumerate(sources):
            erased, replacing = self.erased_features(reader, source, concepts)
            progress((index + 0.4) / len(sources))
            preserved = self.preserved_features(reader, source, concepts, seed)
            progress((index + 0.7) / len(sources))
            reading = [layer for layer in layers if layer.source == source]
            group = EntryGroup(reader, source, reading, concepts, erased, replacing, preserved)
            _check_finite(group)
            changes += self.changes(group, seed)
            count += len(erased)
        edits, rank = self.written(changes, len(concepts))
        progress(1.0)
        return Fit(edits, {"rank": float(rank), "erased_features": float(count)})

    def written(self, changes: Sequence[Change], concepts: int) -> tuple[Edits, int]:
        """Convert the changes into edits to save, and give their rank.

        Args:
            changes: Changes of all layers.
            concepts: Number of concepts that the changes erase.
        """
        made = as_loras(changes, self.tolerance)
        return Edits(made), max(len(pair.down) for pair in made.values())

    def erased_features(
        self, reader: Reader, source: Source, concepts: Sequence[Concept], places: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute the features to erase and the features that replace them, `(features, dim)` float64 each.

        Args:
            reader: Encodes prompts.
            source: Which features: tokens, or pooled vectors, of which a prompt has one.
            concepts: Concepts to erase.
            places: Gives the token positions of a prompt that carry the concept; chosen by the options when left out.
        """
        erased, replacing = [], []
        # A pooled vector has no token positions, so any one run of tokens gives the prompts.
        for run in reader.backbone.token_runs[: None if source == "tokens" else 1]:
            tower, first = run.tower, run.first
            for pair in (pair for concept in concepts for pair in self.pairs(tower, concept)):
                encoded = reader.read([pair.prompt, pair.anchor_prompt])
                states, anchors = (encoded([text]).of(source)[0] for text in (pair.prompt, pair.anchor_prompt))
                if source == "pooled":
                    erased.append(states)
                    replacing.append(anchors)
                    continue
                own, answering = (places or self.places)(tower, pair)
                erased.append(states[first + own.to(states.device)])
                replacing.append(anchors[first + answering.to(anchors.device)])
        return torch.cat(erased).double().cpu(), torch.cat(replacing).double().cpu()

    def pairs(self, tower: TextTower, concept: Concept) -> list[AlignedPrompt]:
        """Give the prompts to erase, aligned with the anchor's prompts that replace them."""
        default = self.style_anchor if concept.kind == "style" else ""
        return bare_or_phrased(tower, concept, default, bare=() if self.templates else ("{}",))

    def places(self, tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
        """Give token positions of a prompt to erase, and the corresponding ones of its anchor, `(places,)` each."""
        places = telling_places(tower, pair.prompt)
        if self.tokens == "all":
            places = places[places >= tower.leading]
            return places, places
        only = self.tokens == "last"
        start = pair.last if only and not tower.causal else pair.start
        stop = pair.last + 1 if only else tower.max_length
        places = places[(places >= start) & (places < stop)]
        return places, pair.positions[places]

    @torch.no_grad()
    def preserved_features(self, reader: Reader, source: Source, concepts: Sequence[Concept], seed: int) -> Tensor:
        """Compute the features to preserve, `(features, dim)` float64; may be empty.

        The arguments are as in `erased_features`.
        """
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
                kept.append(telling(reader.read([prompt])([prompt]).of(source)[0], runs, prompt))
        prompts = random_prompts(backbone.reader, concepts, self.vocabulary, seed)
        for start in range(0, len(prompts), 32):
            chosen = prompts[start : start + 32]
            encoded = backbone.encode(chosen).of(source)
            kept += [telling(states, runs, prompt) for states, prompt in zip(encoded, chosen, strict=True)]
        return torch.cat(kept).double().cpu()


def telling(states: Tensor, runs: Sequence[TokenRun], prompt: str) -> Tensor:
    """Select the features of a prompt at `telling_places`; all features when there are no runs of tokens."""
    if not runs:
        return states
    places = torch.cat([run.first + telling_places(run.tower, prompt) for run in runs])
    return states[places.to(states.device)]


def retained_names(concepts: Sequence[Concept]) -> list[str]:
    """List the names on all retain lists, each once."""
    return list(dict.fromkeys(words for concept in concepts for words in concept.retain))


def _check_finite(group: EntryGroup) -> None:
    """Refuse features and weights that hold NaN or infinity.

    Raises:
        DivergenceError: A feature or a weight is not finite; the message names its origin.
    """
    if not torch.isfinite(group.features).all():
        raise DivergenceError(
            f"the text encoders give NaN or infinity ({group.source} of a prompt): are their weights sound? A closed "
            "form needs finite encodings; load the model in float32 or bfloat16"
        )
    for layer in group.layers:
        if not torch.isfinite(layer.module.weight).all():
            raise DivergenceError(f"{layer.key} holds NaN or infinity: are the model's weights sound? Load it anew")
