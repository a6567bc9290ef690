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
from erasure.progress import between
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
"""Factor by which a latent is multiplied. Factors far outside of this range overflow float16, in which they are
saved."""


class TowerResult(NamedTuple):
    """The result for one text encoder."""

    key: str
    """Key of the edited block, `component/block.path`."""
    edit: BlockEdit
    log: dict[str, float]
    """Figures to save with the erasure."""
    gates: dict[str, dict[str, Any]]
    """Measured accuracy of each concept's gate, by concept."""


@register("itd")
@dataclass(frozen=True, kw_only=True)
class ItD(Strategy):
    """Turn off the sparse-autoencoder latents of a concept in prompts that contain it, and add an anchor instead.

    A sparse autoencoder of the text encoder's residual stream x gives latents `z` with decoder rows `d`. The latents
    that fire on most prompts with the concept and on few others are the concept's features F. The erased encoder
    computes

        x' = x + sum_{i in F} (tau - 1) z_i d_i + z_i v_i

    at every token but the first. The rows `v` are fitted so that a token becomes what it is in the same prompt with an
    anchor instead of the concept (`erasure.sae.standin`). This is done only in prompts for which the concept's gate is
    open: a logistic score of latents exceeds a threshold at some word (see `erasure.carriers.features`). Prompts below
    the threshold are not changed at all, and neither is the part of x that the autoencoder does not reconstruct. A
    linear probe of the same activations is fitted and calibrated for comparison.

    In a model with several text encoders each one is edited with a dictionary (the autoencoder's latents) and gates of
    its own, including encoders of which the denoiser reads only a pooled vector, which depends on the edited block.
    When the gate of a concept opens in one encoder, the gates of this concept open in all encoders, prompt by prompt,
    even when the encoders read different texts (`prompt`, `prompt_2`): see `erasure.carriers.features`.

    Several concepts use different latents of the same dictionary, each with its own gate; adding a concept needs no
    training of the dictionary. Protects a hosted pipeline: whoever has the weights can leave the hooks out, and
    `prompt_embeds=` bypasses them.

    The paper's released code differs in three ways. It replaces x by the whole edited reconstruction, so that every
    edited prompt loses what the autoencoder does not reconstruct. It chooses features by a difference of top-K sets.
    It sets one threshold, at 0.99 of the smallest change among the prompts on which it is tested. The presets
    `released` (people), `released-style` and `released-nudity` do the same, with `prompts` as the file of what must
    survive. For people the threshold is set by the largest token and compared with the mean; for nudity there is no
    threshold, because the code crashes there, and the preset edits every prompt. Two differences remain: the code pads
    to the longest prompt of a batch, so its results depend on the batch, where here every prompt is padded as the
    pipeline does; and its negative prompts are not gated.
    """

    title: ClassVar[str] = "deactivation of sparse-autoencoder features in the text encoder"
    paper: ClassVar[str] = "Tian et al. 2025, arXiv 2503.09446"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds with a dictionary, a minute or more for each text encoder without"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)
    presets: ClassVar[Presets] = RECIPES

    dictionary: PathText = ""
    """Folder of a sparse autoencoder (dictionary) that was trained for a text encoder of the model by
    `erasure sae train`; or several, separated by commas, each used for its own encoder, or written as
    `text_encoder_2=FOLDER`. A text encoder without a folder gets the dictionary that is embedded in this package,
    if it was made for this encoder; otherwise a small one is trained first on random prompts of the tokeniser's
    words, and is kept in the cache (`$ERASURE_CACHE`, or `~/.cache/erasure`)."""
    layer: CountOrZero | None = None
    """Block of every text encoder whose output is edited, counted from 0. When left out: the dictionary's own
    block; for a new dictionary, the block at two thirds of the depth, or at one sixth in bidirectional encoders
    (T5)."""
    prompts: PathText = ""
    """Text file of ordinary prompts, one per line, on which features are chosen and gates are calibrated. When left
    out: the prompts saved with the dictionary; without any, random prompts of the tokeniser's words."""
    mode: Mode = "scale"
    """How features are edited. `scale` multiplies a latent by `tau`. `clamp` sets it, wherever it fires, to `tau`
    times its usual value on prompts with the concept. `replace` ignores latents and replaces the states of the
    concept's words, the end token and the padding by those of the empty prompt."""
    tau: Factor | None = None
    """Factor of a latent: 0 removes it, negative values subtract it (released code: -8). When left out: 0 for a
    concept with an anchor, -1 for a concept without one (lower values damage more of the rest of the prompt), and
    `gate_tau` with `parity`."""
    anchored: NotNegative = 1.0
    """How strongly the concept's anchor replaces the latents that are turned off: 1 as in prompts with the anchor,
    0 not at all. A concept without an anchor gets the one that the model's world declares, if any. Not used with
    `replace` and `parity`."""
    features: Count = 32
    """Largest number of latents that are edited for a concept."""
    floor: ZeroToOne = 0.25
    """Share, 0 to 1, of a latent's usual value on prompts with the concept above which the latent counts as firing."""
    target_rate: ZeroToOne = 0.5
    """Smallest share, 0 to 1, of the prompts with the concept on which a feature fires."""
    retain_rate: ZeroToOne = 0.35
    """Largest share, 0 to 1, of the other prompts on which a feature fires. Features that the concept shares with
    similar concepts help to draw it, and are only edited behind the concept's gate."""
    gate: Literal["features", "probe"] = "features"
    """What opens a gate: `features` a score of latents, `probe` the score of a linear probe."""
    votes: Count = 32
    """Largest number of latents in a gate's score."""
    tokens: Literal["prompt", "word"] = "prompt"
    """Which tokens of a prompt with an open gate are edited: `prompt` all of them, `word` only tokens whose own
    score opens the gate."""
    false_positive_rate: ZeroToOne = 0.01
    """Share, 0 to 1, of ordinary prompts without the concept that may open its gate, measured on prompts that were
    not used to choose features. In a model with several text encoders each encoder gets an equal part of the share.
    Prompts with other words for the concept count as prompts without it, unless the words are given as synonyms or
    declared by the model's world."""
    contexts: CountOrZero = 96
    """Number of random prompts that name the concept among other words."""
    vocabulary: Count = 2400
    """Number of random prompts of the tokeniser's words, where there are no ordinary prompts."""
    mining_steps: CountOrZero = 0
    """Number of steps of adversarial feature mining: embeddings are trained to bring images of the concept back
    despite the edit, and latents that fire on them become features. 0 for none (released code: 5000)."""
    parity: Literal["", "itd"] = ""
    """`itd` edits and gates as the paper's released code does; empty uses the methods of this package."""
    top: Count = 128
    """With `parity`: number of the largest latents of a prompt that count as active (released code: 128, for styles
    256)."""
    phrasings: Literal["concept", "celebrity", "style", "names"] = "concept"
    """Prompts that name a concept: `concept` the phrasings of its kind, `celebrity` and `style` those of the
    released code, `names` its bare names."""
    gate_tau: Factor = -8.0
    """With `parity`: factor of the latents while the gate's threshold is measured (released code: -8, for styles
    -6)."""
    gate_statistic: Statistic = "mean"
    """With `parity`: statistic over tokens by which the threshold is set (see `erasure.sae.released`); the gate
    itself always compares the mean."""
    d_sae: Count = 1024
    """Number of latents of a dictionary that has to be trained first."""
    k: Count = 8
    """Number of active latents per token of a dictionary that has to be trained first."""
    steps: Count = 600
    """Number of training steps of a dictionary that has to be trained first."""

    def __post_init__(self) -> None:
        """Refuse values that an option does not allow, or that contradict other options."""
        super().__post_init__()
        if self.k > self.d_sae:
            self.refuse("k", self.k, f"a whole number from 1 to 'd_sae', which is {self.d_sae}")

    def ignores_retain(self) -> str:
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
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
            report = between(progress, index / len(towers), (index + 1) / len(towers))
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
    ) -> TowerResult:  # fmt: skip
        """Find the features of every concept in one text encoder's dictionary, and calibrate its gates.

        Args:
            backbone: The model.
            tower: Text encoder of the model.
            folder: Folder of the dictionary, if one was named for this text encoder.
            concepts: Concepts to erase.
            seed: Seeds every random choice.
            progress: Called with the share of the work that is done, 0 to 1.
        """
        generator = torch.Generator().manual_seed(seed)
        reading = self.read(tower, folder, seed, generator, concepts, between(progress, 0.0, 0.7))
        log: dict[str, float] = {"layer": float(reading.layer)}
        if self.parity:
            edit = released_edit(
                tower, reading.layer, reading.sae, reading.corpus,
                {c.target: self.target_prompts(tower, c, generator) for c in concepts},
                names=[name for concept in concepts for name in concept.names], top=self.top,
                tau=self.gate_tau if self.tau is None else self.tau,
                gate_tau=self.gate_tau, statistic=self.gate_statistic,
            )  # fmt: skip
            return TowerResult(reading.key, edit, log, {})
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
                start = 0.7 + 0.2 * index / len(concepts)
                report = between(progress, start, start + 0.2 / len(concepts))
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
        return TowerResult(reading.key, self.edit(reading, choices), log, gates)

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
        """Find the folder of a text encoder's dictionary: the named one, the embedded one, or a newly trained one."""
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
        """Give phrasings of a concept, and random prompts that name it among other words."""
        templates = PHRASINGS.get(self.phrasings, concept.phrasings())
        prompts = [template.format(words) for words in concept.names for template in templates]
        known = vocabulary(tower, [concept])
        return prompts + [pair.prompt for pair in context_prompts(tower, concept, known, self.contexts, generator)]

    # Features and gates ----------------------------------------------------------------------------------------------

    def choose(self, reading: Reading, mentions: Mentions, chooses: Tensor, name: str, towers: int) -> Choice:
        """Choose the features of a concept and fit its gate.

        Args:
            reading: Activations of ordinary prompts in a text encoder.
            mentions: Prompts with the concept, and where they name it.
            chooses: Marks the prompts on which features are chosen, `(prompts,)` bool; the others calibrate the gate.
            name: Name of the concept.
            towers: Number of text encoders that can open the gate.
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
        """Fit the rows that the concept's latents add to produce the anchor instead, `(features, dim)`."""
        named, generator = replace(concept, anchor=anchor.target), torch.Generator().manual_seed(seed)
        pairs = aligned_prompts(reading.tower, named)
        known = vocabulary(reading.tower, [concept, anchor])
        pairs += context_prompts(reading.tower, named, known, self.contexts, generator)
        return self.anchored * written_instead(reading.tower, reading.layer, reading.sae, features, pairs)

    def fit_gate(self, reading: Reading, words: WordStates, labels: Labels, chooses: Tensor, towers: int) -> Gate:
        """Fit a gate with the strategy's options, see `erasure.sae.gates.fit_gate`."""
        # Any text encoder can open the gate, so each gets an equal part of the rate. A rate of 1 means every prompt.
        rate = self.false_positive_rate if self.false_positive_rate == 1 else self.false_positive_rate / towers
        return fit_gate(reading.sae, words, labels, chooses, votes=self.votes, rate=rate)

    def edit(self, reading: Reading, choices: Sequence[Choice]) -> FeatureEdit:
        """Make the edit with the strategy's options, see `erasure.sae.edit.feature_edit`."""
        return feature_edit(
            reading.tower, reading.layer, reading.sae, choices, mode=self.mode, by_probe=self.gate == "probe",
            local=self.tokens == "word" or self.mode == "replace",
        )  # fmt: skip


def select(found: Evidence, options: ItD) -> list[int]:
    """Choose the features of a concept, the most specific first; none when no latent meets the rates."""
    fits = (found.target_rate >= options.target_rate) & (found.retain_rate <= options.retain_rate)
    fits &= found.magnitude > 0
    value = torch.where(fits, found.score * found.magnitude, torch.full_like(found.score, -torch.inf))
    return value.topk(min(options.features, int(fits.sum()))).indices.tolist()
