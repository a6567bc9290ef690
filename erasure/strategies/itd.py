"""ItD: deactivate a concept's features of a sparse autoencoder (Tian et al. 2025, arXiv 2503.09446)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.carriers.features import BlockEdit, FeatureEdit
from erasure.concept import Concept
from erasure.errors import ConceptError
from erasure.needs import Need
from erasure.options import Count, CountOrZero, NotNegative, PathText, Presets, ZeroToOne
from erasure.sae import TrainingOptions, dictionaries, read_prompts
from erasure.sae.edit import Choice, Mode, feature_edit
from erasure.sae.gates import Gate, Labels, WordStates, fit_gate, halves, with_mined
from erasure.sae.mining import fired, mine
from erasure.sae.reading import Mentions, Reading
from erasure.sae.released import PHRASINGS, RECIPES, Statistic, released_edit
from erasure.sae.selection import Evidence, no_feature
from erasure.sae.standin import written_instead
from erasure.sae.stream import default_block
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.prompts import anchor_of
from erasure.text.corpora import context_prompts, seeded_prompts, vocabulary, vocabulary_prompts
from erasure.text.words import aligned_prompts

Factor = Annotated[float, Ge(-1000), Le(1000)]
"""Factor of a latent; far greater ones leave the range of float16, in which they are kept."""


class Side(NamedTuple):
    """What is made of one text encoder."""

    key: str
    """`component/block.path`."""
    edit: BlockEdit
    log: dict[str, float]
    """Figures worth keeping."""
    gates: dict[str, dict[str, Any]]
    """How well each concept's gate tells it, by concept."""


@register("itd")
@dataclass(frozen=True, kw_only=True)
class ItD(Strategy):
    """Turn off the latents that tell a concept, in prompts that hold it, and write those of an anchor in their place.

    A sparse autoencoder of the text encoder's residual stream gives latents `z` with decoder rows `d`. Those that fire
    on most prompts with the concept and on few of the others are its features F. In use,

        x' = x + sum_{i in F} (tau - 1) z_i d_i + z_i v_i

    at every token but the first, with rows `v` that bring the token to what it is in the same prompt with an anchor in
    the concept's place (`erasure.sae.standin`). This happens in prompts where the concept's gate is open: a
    logistic score of latents on some word (see `erasure.carriers.features`). What the autoencoder does not explain is
    left as it is, prompts below the threshold too, bit for bit. A linear probe of the same activations is fitted and
    calibrated beside it.

    Every text encoder of a model that has several is edited so, with a dictionary and gates of its own, also one of
    which the denoiser reads a pooled vector alone: what is edited in a block flows on to that vector, as the prompt
    does. A gate that opens in one of them opens that of the same concept in the others, prompt by prompt, whatever
    each of them is told (`prompt`, `prompt_2`): see `erasure.carriers.features`.

    Several concepts are slices of the same dictionary, each behind its own gate; adding one trains nothing. Protects a
    hosted pipeline: whoever holds the weights leaves the hooks out, and `prompt_embeds=` bypasses them.

    The paper's released code instead puts in the whole reconstruction, so that what the autoencoder cannot say is lost
    in every prompt that is touched; takes the features by a difference of top-K sets; and sets one threshold, at 0.99
    of the least change of prompts that it is tested on. So do the presets `released` (people), `released-style` and
    `released-nudity`, with `prompts` for a file of what must survive. For people the threshold is set by the greatest
    token and compared with the mean; for nudity there is none: the code crashes there, the preset edits every prompt.
    Two things differ: the code pads to the longest prompt of a batch, on which its results depend, here every prompt
    is padded as the pipeline pads; and its negative prompts pass no gate.
    """

    title: ClassVar[str] = "deactivation of sparse-autoencoder features in the text encoder"
    paper: ClassVar[str] = "Tian et al. 2025, arXiv 2503.09446"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds with a dictionary, a minute or more for each text encoder without"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)
    presets: ClassVar[Presets] = RECIPES

    dictionary: PathText = ""
    """Folder of a sparse autoencoder made for a text encoder of the model (`erasure sae train`); or several, commas
    between, each for the text encoder that it was made for, or as `text_encoder_2=FOLDER`. For a text encoder that is
    left out, the embedded one is taken where it was made for it; else a small one is trained first on random prompts
    of the tokeniser's words, and is kept in the cache (`$ERASURE_CACHE`, or `~/.cache/erasure`)."""
    layer: CountOrZero | None = None
    """Block whose output is read and edited, from 0 on, in every text encoder; the dictionary's own, or two thirds of
    the way, and a sixth of it where every token reads every other (T5)."""
    prompts: PathText = ""
    """Text file of ordinary prompts, one per line, that choose features and calibrate gates; those that came with the
    dictionary when left out, and random prompts of the tokeniser's words when there are none."""
    mode: Mode = "scale"
    """`scale` multiplies a latent by tau; `clamp` sets it to tau times what it usually reaches wherever it fires,
    however weakly; `replace` puts the empty prompt's states in place of the words that hold the
    concept, of the end token and of the padding, whatever fires there."""
    tau: Factor | None = None
    """Factor of a latent: 0 takes it away, below 0 pushes the other way (released code: -8). Left out, it
    is 0 for a concept with an anchor, which takes the place, and -1 for one without (farther down, more of the rest of
    the prompt goes too, and something else entirely lies the other way); with `parity`, it is `gate_tau`."""
    anchored: NotNegative = 1.0
    """How strongly a concept's anchor takes the place of the latents that are turned off: 1 is as in prompts with the
    anchor, 0 leaves the place empty. Without an anchor of its own, a concept has that of the model's world, where the
    model declares one. Not for `replace` and `parity`."""
    features: Count = 32
    """At most so many latents of a concept are edited."""
    floor: ZeroToOne = 0.25
    """A latent counts as firing only above this share of what it usually reaches in prompts with the concept."""
    target_rate: ZeroToOne = 0.5
    """A feature fires on at least this share of the prompts with the concept."""
    retain_rate: ZeroToOne = 0.35
    """And on at most this share of the others: what a concept shares with its neighbours is part of what draws it, and
    is changed only behind its gate."""
    gate: Literal["features", "probe"] = "features"
    """What opens a gate: the score of latents, or the linear probe's."""
    votes: Count = 32
    """Latents in a gate's score."""
    tokens: Literal["prompt", "word"] = "prompt"
    """Edit every token of a prompt whose gate is open, or only those whose own score would open it."""
    false_positive_rate: ZeroToOne = 0.01
    """Share of ordinary prompts without the concept that may open its gate, measured on prompts that chose nothing.
    Of several text encoders each may open it in an equal part of them.
    Other words for the concept count as such unless they are given as synonyms, or the model's world knows them."""
    contexts: CountOrZero = 96
    """Random prompts that name the concept among other words."""
    vocabulary: Count = 2400
    """Random prompts from the tokeniser's own words, where there are no ordinary ones."""
    mining_steps: CountOrZero = 0
    """Steps of adversarial feature mining: embeddings are trained to bring the concept's images back past the edit,
    and what fires on them joins the features. 0 leaves it out; the released code takes 5000."""
    parity: Literal["", "itd"] = ""
    """`itd` edits and gates as the paper's released code does."""
    top: Count = 128
    """With `parity`: latents of a prompt that count as active (released code: 128, for styles 256)."""
    phrasings: Literal["concept", "celebrity", "style", "names"] = "concept"
    """Prompts that name a concept: those of its kind, the released code's for people or styles, or its bare names."""
    gate_tau: Factor = -8.0
    """With `parity`: factor of the latents where the gate's threshold is set (released code: -6 for styles)."""
    gate_statistic: Statistic = "mean"
    """With `parity`: what the threshold is set by (`erasure.sae.released`); the gate compares the mean."""
    d_sae: Count = 1024
    """Latents of a dictionary that is trained first."""
    k: Count = 8
    """Its latents per token."""
    steps: Count = 600
    """Its training steps."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow."""
        super().__post_init__()
        if self.k > self.d_sae:
            self.refuse("k", self.k, f"a whole number from 1 to 'd_sae', which is {self.d_sae}")

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return "parity" if self.parity else ""

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Find the features of every concept in each text encoder's dictionary, and calibrate the gates."""
        towers = backbone.towers
        for tower in towers:
            for name in (name for concept in concepts for name in concept.names):
                tower.check_words(name)
        folders = dictionaries.assigned(self.dictionary, towers)
        edits = Edits()
        log: dict[str, float] = {}
        gates: dict[str, dict[str, Any]] = {}
        for index, tower in enumerate(towers):

            def report(share: float, index: int = index) -> None:
                progress((index + share) / len(towers))

            side = self.fit_tower(backbone, tower, folders.get(tower.component), concepts, seed, report)
            edits.features[side.key] = side.edit
            several = len(towers) > 1
            log |= {f"{tower.component}_{name}" if several else name: value for name, value in side.log.items()}
            gates |= {f"{name} ({tower.component})" if several else name: gate for name, gate in side.gates.items()}
        progress(1.0)
        return Fit(edits, log, gates)

    def fit_tower(
        self, backbone: Backbone, tower: TextTower, folder: Path | None, concepts: Sequence[Concept], seed: int,
        progress: Callable[[float], None],
    ) -> Side:  # fmt: skip
        """Find the features of every concept in one text encoder's dictionary, and calibrate its gates.

        Args:
            backbone: The model.
            tower: Its text encoder.
            folder: The dictionary, if one was named for it.
            concepts: What to erase.
            seed: Seeds every random choice.
            progress: To be called with the share that is done.
        """
        generator = torch.Generator().manual_seed(seed)
        reading = self.read(tower, folder, seed, generator, concepts, lambda share: progress(0.7 * share))
        log: dict[str, float] = {"layer": float(reading.layer)}
        if self.parity:
            edit = released_edit(
                tower, reading.layer, reading.sae, reading.corpus,
                {c.target: self.target_prompts(tower, c, generator) for c in concepts},
                names=[name for concept in concepts for name in concept.names], top=self.top,
                tau=self.gate_tau if self.tau is None else self.tau,
                gate_tau=self.gate_tau, statistic=self.gate_statistic,
            )  # fmt: skip
            return Side(reading.key, edit, log, {})
        choices = []
        for index, concept in enumerate(concepts):
            mentions = reading.mentions(concept, self.target_prompts(tower, concept, generator))
            chooses = halves(mentions.labels, generator)
            choice = self.choose(reading, mentions, chooses, concept.target, len(backbone.towers))
            anchor = anchor_of(backbone, concept, concepts) if self.anchored and self.mode != "replace" else None
            if anchor is not None and tower.word_ids(anchor.target):
                rows = self.written_instead(reading, concept, anchor, choice.features, seed)
                choice = choice._replace(anchor=rows, factor=0.0)
            if self.tau is not None:
                choice = choice._replace(factor=self.tau)
            if self.mining_steps:
                start, share = 0.7 + 0.2 * index / len(concepts), 0.2 / len(concepts)

                def report(part: float, start: float = start, share: float = share) -> None:
                    progress(start + share * part)

                active = self.edit(reading, [choice])
                mined = mine(backbone, concept, reading.key, active, self.mining_steps, seed, report)
                kept = mentions.activity[~mentions.labels.holds]
                new, reached = fired(
                    reading.sae, mined.states, kept, choice.features, self.features, self.false_positive_rate
                )
                log[f"{concept.target}_mined"] = float(len(new))
                reached = torch.cat([choice.magnitude, reached])
                choice = choice._replace(features=[*choice.features, *new], magnitude=reached)
                words, labels = with_mined(mentions.words, mentions.labels, mined.states, mined.learned)
                chooses = torch.cat([chooses, torch.arange(mined.states.prompts) % 2 == 0])
                choice = choice._replace(gate=self.fit_gate(reading, words, labels, chooses, len(backbone.towers)))
            choices.append(choice)
            log[f"{concept.target}_features"] = float(len(choice.features))
            progress(0.7 + 0.29 * (index + 1) / len(concepts))
        gates = {
            concept.target: {"decides": self.gate, **choice.gate.figures}
            for concept, choice in zip(concepts, choices, strict=True)
        }
        return Side(reading.key, self.edit(reading, choices), log, gates)

    # The dictionary and prompts --------------------------------------------------------------------------------------

    def read(
        self, tower: TextTower, folder: Path | None, seed: int, generator: torch.Generator,
        concepts: Sequence[Concept], progress: Callable[[float], None],
    ) -> Reading:  # fmt: skip
        """Open or train the dictionary of a text encoder, and read ordinary prompts with it; see `fit_tower`."""
        folder = self.dictionary_of(tower, folder, seed, progress)
        sae, layer = dictionaries.opened(tower, folder, self.layer)
        ordinary = read_prompts(self.prompts or folder)
        if not ordinary:
            ordinary = vocabulary_prompts(vocabulary(tower, concepts), self.vocabulary, generator)
        return Reading.of(tower, sae, layer, ordinary)

    def dictionary_of(
        self, tower: TextTower, named: Path | None, seed: int, progress: Callable[[float], None]
    ) -> Path:
        """Folder of the dictionary of a text encoder: one that was named, the embedded one, or one that is trained."""
        if folder := named or dictionaries.embedded(tower):
            return folder
        options = TrainingOptions(
            d_sae=self.d_sae, k=self.k, steps=self.steps, learning_rate=1e-3, dead_after=50_000, save_every=100,
            seed=seed,
        )  # fmt: skip
        layer = default_block(tower) if self.layer is None else self.layer
        prompts = seeded_prompts(tuple(vocabulary(tower, ())), 20_000, seed)
        return dictionaries.trained(tower, layer, prompts, options, progress)

    def target_prompts(self, tower: TextTower, concept: Concept, generator: torch.Generator) -> list[str]:
        """Phrasings of a concept, and random prompts that name it among other words."""
        templates = PHRASINGS.get(self.phrasings, concept.phrasings())
        prompts = [template.format(words) for words in concept.names for template in templates]
        known = vocabulary(tower, [concept])
        return prompts + [pair.prompt for pair in context_prompts(tower, concept, known, self.contexts, generator)]

    # Features and gates ----------------------------------------------------------------------------------------------

    def choose(self, reading: Reading, mentions: Mentions, chooses: Tensor, name: str, towers: int) -> Choice:
        """The features of a concept and its gate.

        Args:
            reading: Of a text encoder.
            mentions: Of the concept.
            chooses: `(prompts,)` bool: prompts that choose; the others calibrate.
            name: Of the concept.
            towers: How many text encoders may open the gate.
        """
        found = mentions.evidence(self.floor, chooses)
        features = select(found, self)
        if not features:
            raise ConceptError(no_feature(reading.tower, reading.sae, mentions.words, mentions.labels, found, name))
        gate = self.fit_gate(reading, mentions.words, mentions.labels, chooses, towers)
        return Choice(features, found.magnitude[features], gate)

    def written_instead(
        self, reading: Reading, concept: Concept, anchor: Concept, features: list[int], seed: int
    ) -> Tensor:
        """Fit what the latents of a concept write to bring its anchor, `(features, dim)`, on prompts with either."""
        named, generator = replace(concept, anchor=anchor.target), torch.Generator().manual_seed(seed)
        pairs = aligned_prompts(reading.tower, named)
        known = vocabulary(reading.tower, [concept, anchor])
        pairs += context_prompts(reading.tower, named, known, self.contexts, generator)
        return self.anchored * written_instead(reading.tower, reading.layer, reading.sae, features, pairs)

    def fit_gate(self, reading: Reading, words: WordStates, labels: Labels, chooses: Tensor, towers: int) -> Gate:
        """The gate by the strategy's options; see `erasure.sae.gates.fit_gate`."""
        # Any of them may open it, so each has its part; a rate of 1 is every prompt, whatever the others do.
        rate = self.false_positive_rate if self.false_positive_rate == 1 else self.false_positive_rate / towers
        return fit_gate(reading.sae, words, labels, chooses, votes=self.votes, rate=rate)

    def edit(self, reading: Reading, choices: Sequence[Choice]) -> FeatureEdit:
        """The edit by the strategy's options; see `erasure.sae.edit.feature_edit`."""
        return feature_edit(
            reading.tower, reading.layer, reading.sae, choices, mode=self.mode, by_probe=self.gate == "probe",
            local=self.tokens == "word" or self.mode == "replace",
        )  # fmt: skip


def select(found: Evidence, options: ItD) -> list[int]:
    """The features of a concept, those that say most first; none when no latent tells it from the rest."""
    fits = (found.target_rate >= options.target_rate) & (found.retain_rate <= options.retain_rate)
    fits &= found.magnitude > 0
    value = torch.where(fits, found.score * found.magnitude, torch.full_like(found.score, -torch.inf))
    return value.topk(min(options.features, int(fits.sum()))).indices.tolist()
