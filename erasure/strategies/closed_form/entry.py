"""What methods share that rewrite, in closed form, the layers through which text enters the denoiser."""

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
"""Gives places of a prompt, and those of the anchor prompt that answer to them, `(places,)` each."""


class Door(NamedTuple):
    """The layers that read one part of the conditioning, and what of it is erased, takes its place or is preserved."""

    reader: Reader
    """Encodes prompts."""
    source: Source
    """Tokens, or pooled vectors."""
    layers: Sequence[EntryLayer]
    concepts: Sequence[Concept]
    erased: Tensor
    """`(erased, dim)` float64."""
    replacing: Tensor
    """`(erased, dim)` float64: what takes the place of each."""
    preserved: Tensor
    """`(preserved, dim)` float64; may be empty."""

    @property
    def weights(self) -> list[Tensor]:
        """The layers' columns that read it, `(out, dim)` float64 each."""
        return [layer.module.weight.detach()[:, layer.columns].double().cpu() for layer in self.layers]

    @property
    def features(self) -> Tensor:
        """All features, `(n, dim)` float64."""
        return torch.cat([self.erased, self.replacing, self.preserved])

    @property
    def mean_square(self) -> float:
        """Mean square of the features' values: about 1 in Stable Diffusion."""
        return float(self.features.square().mean())


@dataclass(frozen=True, kw_only=True)
class EntryEdit(Strategy):
    """A closed form for all linear layers through which text enters the denoiser.

    Layers that read tokens (cross-attention keys and values; in transformers the layer that reads the tokens) are
    solved for together, and so are those that read a pooled vector of the prompt, in the columns that read it. Biases
    cancel and stay untouched. Of a text encoder whose tokens see those that follow (T5), every token of a prompt
    carries the concept, so all are erased; a few of its paddings stand for the rest.
    """

    needs: ClassVar[tuple[Need, ...]] = ("entry layers",)
    protects: ClassVar[str] = "released weights"
    cost: ClassVar[str] = "seconds, text encoder only"

    tokens: Tokens = "from_last"
    """`last`: the concept's last token only. `from_last`: it and all that follow, padding included, which carry the
    concept too because attention is causal; every token where it is not. `all`: every token behind the start, each of
    which answers to the anchor's at the same place."""
    templates: bool = True
    """Erase and preserve every phrasing of a concept. Without, its names alone, whose last token answers to the
    anchor's last, or to the start token where the anchor is empty."""
    style_anchor: str = ""
    """Word that takes the place of a style without anchor; nothing does when empty."""
    preserve_start: bool = True
    """Preserve the start token, which is the same in every prompt."""
    tolerance: ZeroToOne = 1e-3
    """How far the change of each layer may be from the whole to make the file smaller: relative, over the features
    that are erased, take their place or are preserved. 0 keeps all, in float32."""
    vocabulary: CountOrZero = 300
    """Preserved besides the retain lists: random prompts from the tokeniser's own words. 0 switches it off."""

    @abstractmethod
    def changes(self, door: Door, seed: int) -> Sequence[Change]:
        """Solve for the layers of one door."""

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Solve for all concepts at once in float64, once for the layers that read tokens, once for pooled vectors."""
        layers = backbone.entry_layers()
        # A prompt at a time: each encoding is then the same whatever else is erased.
        reader = Reader(backbone, batch=1)
        sources, count = list(dict.fromkeys(layer.source for layer in layers)), 0
        changes: list[Change] = []
        for index, source in enumerate(sources):
            erased, replacing = self.erased_features(reader, source, concepts)
            progress((index + 0.4) / len(sources))
            preserved = self.preserved_features(reader, source, concepts, seed)
            progress((index + 0.7) / len(sources))
            reading = [layer for layer in layers if layer.source == source]
            door = Door(reader, source, reading, concepts, erased, replacing, preserved)
            _check_finite(door)
            changes += self.changes(door, seed)
            count += len(erased)
        edits, rank = self.written(changes, len(concepts))
        progress(1.0)
        return Fit(edits, {"rank": float(rank), "erased_features": float(count)})

    def written(self, changes: Sequence[Change], concepts: int) -> tuple[Edits, int]:
        """The changes as they are kept, and their rank.

        Args:
            changes: Those of all layers.
            concepts: How many concepts they erase.
        """
        made = as_loras(changes, self.tolerance)
        return Edits(made), max(len(pair.down) for pair in made.values())

    def erased_features(
        self, reader: Reader, source: Source, concepts: Sequence[Concept], places: Places | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features to erase and those that take their place, `(features, dim)` each, float64.

        Args:
            reader: Encodes prompts.
            source: Tokens, or pooled vectors: a prompt has one, which carries all of it.
            concepts: What to erase.
            places: Says which places of a prompt carry the concept; as the options say when left out.
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
                own, answering = (places or self.places)(tower, pair)
                erased.append(states[first + own.to(states.device)])
                replacing.append(anchors[first + answering.to(anchors.device)])
        return torch.cat(erased).double().cpu(), torch.cat(replacing).double().cpu()

    def pairs(self, tower: TextTower, concept: Concept) -> list[AlignedPrompt]:
        """The prompts to erase, aligned with what takes their place."""
        default = self.style_anchor if concept.kind == "style" else ""
        return bare_or_phrased(tower, concept, default, bare=() if self.templates else ("{}",))

    def places(self, tower: TextTower, pair: AlignedPrompt) -> tuple[Tensor, Tensor]:
        """Places of a prompt to erase, and those of the anchor prompt that answer to them, `(places,)` each."""
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
                kept.append(telling(reader.read([prompt])([prompt]).of(source)[0], runs, prompt))
        prompts = random_prompts(backbone.reader, concepts, self.vocabulary, seed)
        for start in range(0, len(prompts), 32):
            chosen = prompts[start : start + 32]
            told = backbone.encode(chosen).of(source)
            kept += [telling(states, runs, prompt) for states, prompt in zip(told, chosen, strict=True)]
        return torch.cat(kept).double().cpu()


def telling(states: Tensor, runs: Sequence[TokenRun], prompt: str) -> Tensor:
    """Those of a prompt's features that count; see `telling_places`. All of them without runs of tokens."""
    if not runs:
        return states
    places = torch.cat([run.first + telling_places(run.tower, prompt) for run in runs])
    return states[places.to(states.device)]


def retained_names(concepts: Sequence[Concept]) -> list[str]:
    """The names on all retain lists, each once."""
    return list(dict.fromkeys(words for concept in concepts for words in concept.retain))


def _check_finite(door: Door) -> None:
    """Refuse features and weights that hold NaN or infinity.

    Raises:
        DivergenceError: Some do; the message names where they come from.
    """
    if not torch.isfinite(door.features).all():
        raise DivergenceError(
            f"the text encoders give NaN or infinity ({door.source} of a prompt): are their weights sound? A closed "
            "form needs finite encodings; load the model in float32 or bfloat16"
        )
    for layer in door.layers:
        if not torch.isfinite(layer.module.weight).all():
            raise DivergenceError(f"{layer.key} holds NaN or infinity: are the model's weights sound? Load it anew")
