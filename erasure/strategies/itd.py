"""ItD: deactivate a concept's features of a sparse autoencoder (Tian et al. 2025, arXiv 2503.09446)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Le
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.carriers.features import FeatureEdit
from erasure.concept import Concept
from erasure.errors import ConceptError, OptionError, WrongBaseError
from erasure.needs import Need
from erasure.options import Count, CountOrZero, NotNegative, PathText, Presets, ZeroToOne
from erasure.sae import SparseAutoencoder, TrainingOptions, dictionaries, load, read_prompts
from erasure.sae.gates import (
    Gate,
    Labels,
    WordStates,
    fit_gate,
    halves,
    joined,
    locate,
    read_words,
    strongest,
    with_mined,
)
from erasure.sae.mining import fired, mine
from erasure.sae.released import PHRASINGS, RECIPES, Statistic, released_edit
from erasure.sae.selection import Evidence, evidence, no_feature
from erasure.sae.standin import ALONE, columns, stand_in, written
from erasure.sae.stream import activations, reads_from
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.prompts import anchor_of
from erasure.text.corpora import context_prompts, retain_prompts, vocabulary, vocabulary_prompts
from erasure.world import World

Factor = Annotated[float, Ge(-1000), Le(1000)]
"""Factor of a latent; far greater ones leave the range of float16, in which they are kept."""


class Choice(NamedTuple):
    """What an erasure holds of one concept."""

    features: list[int]
    """Latents to edit."""
    magnitude: Tensor
    """`(features,)`: what each usually reaches in prompts with the concept."""
    gate: Gate
    """When to."""
    anchor: Tensor | None = None
    """`(dim,)`: what takes the concept's place; `None` where nothing does."""
    factor: float = ALONE
    """Factor of its latents."""


@register("itd")
@dataclass(frozen=True, kw_only=True)
class ItD(Strategy):
    """Turn off the latents that tell a concept, in prompts that hold it, and write those of an anchor in their place.

    A sparse autoencoder of the text encoder's residual stream gives latents `z` with decoder rows `d`. Those that fire
    on most prompts with the concept and on few of the others are its features F. In use,

        x' = x + sum_{i in F} (tau - 1) z_i d_i + s a

    at every token but the first, with `s` the mean of the features in units of what they usually reach and `a` what
    the anchor's features write (`erasure.sae.standin`). This happens in prompts where the concept's gate is open: a
    logistic score of latents on some word (see `erasure.carriers.features`). What the autoencoder does not explain is
    left as it is, prompts below the threshold too, bit for bit. A linear probe of the same activations is fitted and
    calibrated beside it.

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
    needs: ClassVar[tuple[Need, ...]] = ("one text encoder",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds with a dictionary, a minute or more without"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)
    presets: ClassVar[Presets] = RECIPES

    dictionary: PathText = ""
    """Folder of a sparse autoencoder made for this text encoder (`erasure sae train`). Left out, the embedded one is
    taken for the embedded model; else a small one is trained first on random prompts of the tokeniser's words, and is
    kept in the cache (`$ERASURE_CACHE`, or `~/.cache/erasure`)."""
    layer: CountOrZero | None = None
    """Block whose output is read and edited, from 0 on; the dictionary's own, or two thirds of the way."""
    prompts: PathText = ""
    """Text file of ordinary prompts, one per line, that choose features and calibrate gates; those that came with the
    dictionary when left out, and random prompts of the tokeniser's words when there are none."""
    mode: Literal["scale", "clamp", "replace"] = "scale"
    """`scale` multiplies a latent by tau; `clamp` sets it to tau times what it usually reaches wherever it fires,
    however weakly; `replace` puts the empty prompt's states in place of the words that hold the
    concept, of the end token and of the padding, whatever fires there."""
    tau: Factor | None = None
    """Factor of a latent: 0 takes it away, below 0 pushes the other way (released code: -8). Left out, it
    is 0 for a concept with an anchor, which takes the place, and -1 for one without (farther down, more of the rest of
    the prompt goes too, and something else entirely lies the other way); with `parity`, it is `gate_tau`."""
    anchored: NotNegative = 3.0
    """How strongly the latents of a concept's anchor take the place of those that are turned off, in multiples of what
    they usually reach; 0 leaves the place empty. Without an anchor of its own, a concept has that of the model's
    world, where the model declares one. Not for `replace` and `parity`."""
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
        """Find the features of every concept in the first text encoder's dictionary, and calibrate the gates."""
        tower = backbone.reader
        for name in (name for concept in concepts for name in concept.names):
            tower.check_words(name)
        generator = torch.Generator().manual_seed(seed)
        sae, layer, ordinary = self.open_dictionary(tower, seed, lambda share: progress(0.7 * share))
        if not ordinary:
            ordinary = vocabulary_prompts(vocabulary(tower, concepts), self.vocabulary, generator)
        corpus = read_words(tower, layer, ["", *ordinary])
        key = tower.key(tower.block_path(layer))
        log: dict[str, float] = {"layer": float(layer)}
        if self.parity:
            edit = released_edit(
                tower, layer, sae, corpus, {c.target: self.target_prompts(tower, c, generator) for c in concepts},
                names=[name for concept in concepts for name in concept.names], top=self.top,
                tau=self.gate_tau if self.tau is None else self.tau,
                gate_tau=self.gate_tau, statistic=self.gate_statistic,
            )  # fmt: skip
            return Fit(Edits(features={key: edit}), log)
        activity = strongest(sae, corpus)
        choices = []
        for index, concept in enumerate(concepts):
            words, labels, found = self.labelled(tower, layer, sae, corpus, activity, concept, generator)
            chooses = halves(labels, generator)
            choice = self.choose(tower, sae, words, labels, found, chooses, concept.target)
            anchor = anchor_of(backbone, concept, concepts) if self.anchored and self.mode != "replace" else None
            if anchor is not None:
                mention = words.states[labels.positive].mean(0)
                place = self.replacement(tower, layer, sae, corpus, activity, anchor, mention, seed)
                choice = choice._replace(anchor=place, factor=ALONE if place is None else 0.0)
            if self.tau is not None:
                choice = choice._replace(factor=self.tau)
            if self.mining_steps:
                active = self.edit(tower, layer, sae, [choice])
                share = (0.7 + 0.2 * index / len(concepts), 0.2 / len(concepts))
                mined = mine(
                    backbone, concept, key, active, self.mining_steps, seed,
                    lambda part, share=share: progress(share[0] + share[1] * part),  # type: ignore[misc]
                )  # fmt: skip
                kept = found[~labels.holds]
                new, reached = fired(sae, mined.states, kept, choice.features, self.features, self.false_positive_rate)
                log[f"{concept.target}_mined"] = float(len(new))
                reached = torch.cat([choice.magnitude, reached])
                choice = choice._replace(features=[*choice.features, *new], magnitude=reached)
                words, labels = with_mined(words, labels, mined.states, mined.learned)
                chooses = torch.cat([chooses, torch.arange(mined.states.prompts) % 2 == 0])
                choice = choice._replace(gate=self.fit_gate(sae, words, labels, chooses))
            choices.append(choice)
            log[f"{concept.target}_features"] = float(len(choice.features))
            progress(0.7 + 0.29 * (index + 1) / len(concepts))
        gates = {
            concept.target: {"decides": self.gate, **choice.gate.figures}
            for concept, choice in zip(concepts, choices, strict=True)
        }
        progress(1.0)
        return Fit(Edits(features={key: self.edit(tower, layer, sae, choices)}), log, gates)

    # The dictionary and prompts --------------------------------------------------------------------------------------

    def open_dictionary(
        self, tower: TextTower, seed: int, progress: Callable[[float], None]
    ) -> tuple[SparseAutoencoder, int, list[str]]:
        """The autoencoder, the block it reads, and ordinary prompts.

        Raises:
            OptionError: It does not say which block it reads.
            WrongBaseError: It was made for another text encoder.
        """
        folder = dictionaries.named(self.dictionary) if self.dictionary else dictionaries.embedded(tower)
        if folder is None:
            options = TrainingOptions(
                d_sae=self.d_sae, k=self.k, steps=self.steps, learning_rate=1e-3, dead_after=50_000, save_every=100,
                seed=seed,
            )  # fmt: skip
            middle = 2 * len(tower.blocks) // 3
            prompts = vocabulary_prompts(vocabulary(tower, ()), 20_000, torch.Generator().manual_seed(seed))
            folder = dictionaries.trained(
                tower, middle if self.layer is None else self.layer, prompts, options, progress
            )
        sae = load(folder)
        layer = sae.config.metadata.get("layer") if self.layer is None else self.layer
        if layer is None:
            raise OptionError(f"itd: the dictionary {folder} does not say which block it reads: give option 'layer'")
        width = activations(tower, layer, tower.tokenize([""])).shape[-1]
        known = sae.config.metadata.get("fingerprint")
        if sae.config.d_in != width or (known and not reads_from(tower, layer, known)):
            raise WrongBaseError(
                f"the dictionary {folder} (of {sae.config.metadata.get('model_name', 'an unknown model')}, width "
                f"{sae.config.d_in}) was made for another text encoder than this {tower.component} of width {width}: "
                "train one with erasure sae train"
            )
        ordinary = read_prompts(self.prompts or folder)
        return sae.to(next(tower.root.parameters()).device), layer, ordinary

    def target_prompts(self, tower: TextTower, concept: Concept, generator: torch.Generator) -> list[str]:
        """Phrasings of a concept, and random prompts that name it among other words."""
        templates = PHRASINGS.get(self.phrasings, concept.phrasings())
        prompts = [template.format(words) for words in concept.names for template in templates]
        known = vocabulary(tower, [concept])
        return prompts + [pair.prompt for pair in context_prompts(tower, concept, known, self.contexts, generator)]

    def labelled(
        self, tower: TextTower, layer: int, sae: SparseAutoencoder, corpus: WordStates, activity: Tensor,
        concept: Concept, generator: torch.Generator,
    ) -> tuple[WordStates, Labels, Tensor]:  # fmt: skip
        """Words of prompts with a concept and without it, where it is in them, and the activity of all latents.

        Prompts that hold another word for the concept, which the model's world knows and the concept does not list,
        are left out: they are no prompts without it.
        """
        prompts = self.target_prompts(tower, concept, generator)
        prompts += retain_prompts([concept])
        prompts += [t.format(concept.anchor) for t in concept.phrasings() if concept.anchor]
        extra = read_words(tower, layer, prompts)
        words, active = joined([corpus, extra]), torch.cat([activity, strongest(sae, extra)])
        world = World.of(tower.pipe)
        others = [word for name in concept.names for word in world.words(name) if word not in concept.names]
        labels = locate(tower, words, concept.names)
        clear = labels.holds | ~locate(tower, words, others).holds
        if not clear.all():
            words, active = words.of(clear), active[clear]
            labels = locate(tower, words, concept.names)
        return words, labels, active

    # Features and gates ----------------------------------------------------------------------------------------------

    def choose(
        self, tower: TextTower, sae: SparseAutoencoder, words: WordStates, labels: Labels, activity: Tensor,
        chooses: Tensor, name: str,
    ) -> Choice:  # fmt: skip
        """The features of a concept and its gate.

        Args:
            tower: To name words.
            sae: The dictionary.
            words: Of all prompts.
            labels: Where the concept is.
            activity: `(prompts, d_sae)`, see `strongest`.
            chooses: `(prompts,)` bool: prompts that choose; the others calibrate.
            name: Of the concept.
        """
        found = evidence(activity[labels.holds & chooses], activity[~labels.holds & chooses], self.floor)
        features = select(found, self)
        if not features:
            raise ConceptError(no_feature(tower, sae, words, labels, found, name))
        return Choice(features, found.magnitude[features], self.fit_gate(sae, words, labels, chooses))

    def replacement(
        self, tower: TextTower, layer: int, sae: SparseAutoencoder, corpus: WordStates, activity: Tensor,
        anchor: Concept, mention: Tensor, seed: int,
    ) -> Tensor | None:  # fmt: skip
        """Find what is written where a concept's latents fire, `(dim,)`.

        That is what the latents of its anchor write; or, where the dictionary has none for the anchor, the difference
        of the states at their names. `None` for an anchor that the tokeniser does not know.
        """
        generator = torch.Generator().manual_seed(seed)
        words, labels, active = self.labelled(tower, layer, sae, corpus, activity, anchor, generator)
        if not labels.positive.any():
            return None
        found = evidence(active[labels.holds], active[~labels.holds], self.floor)
        features = select(found, self)
        if features:
            return self.anchored * written(sae, features, found.magnitude[features])
        return words.states[labels.positive].mean(0) - mention

    def fit_gate(self, sae: SparseAutoencoder, words: WordStates, labels: Labels, chooses: Tensor) -> Gate:
        """The gate by the strategy's options; see `erasure.sae.gates.fit_gate`."""
        return fit_gate(sae, words, labels, chooses, votes=self.votes, rate=self.false_positive_rate)

    def edit(self, tower: TextTower, layer: int, sae: SparseAutoencoder, choices: Sequence[Choice]) -> FeatureEdit:
        """The latents of all concepts, each once, with who edits and who counts them; dictionary rows in float16."""
        used = sorted({i for choice in choices for i in (*choice.features, *choice.gate.features)})
        place = {feature: index for index, feature in enumerate(used)}
        part = sae.slice(used)

        anchored = [(c, choice, choice.anchor) for c, choice in enumerate(choices) if choice.anchor is not None]
        latents = [stand_in(sae, choice.features, choice.magnitude, anchor) for _, choice, anchor in anchored]

        def pairs(of: Callable[[Choice], list[int]], more: Sequence[tuple[int, int]] = ()) -> Tensor:
            listed = [*((c, place[i]) for c, choice in enumerate(choices) for i in of(choice)), *more]
            return torch.tensor(listed, dtype=torch.int64).view(-1, 2).T.contiguous()

        reached, factor = torch.zeros(len(used)), torch.full((len(used),), torch.inf)
        for choice in choices:
            index = torch.tensor([place[i] for i in choice.features])
            reached[index] = torch.maximum(reached[index], choice.magnitude)
            # Of several concepts that share a latent, the one that pushes hardest.
            factor[index] = factor[index].clamp(max=choice.factor)
        factor = torch.where(factor.isinf(), 1.0, factor)
        clamp = self.mode == "clamp"
        dim = part.w_enc.shape[0]
        filler = torch.zeros(0, dim)
        if self.mode == "replace":
            filler = activations(tower, layer, tower.tokenize([""]))[0].float().cpu()
        gates = [choice.gate for choice in choices]
        half = {"w_enc": part.w_enc, "b_enc": part.b_enc, "w_dec": part.w_dec, "threshold": part.threshold,
                "gain": torch.full((len(used),), -1.0) if clamp else factor - 1,
                "offset": factor * reached if clamp else torch.zeros(len(used)), "filler": filler}  # fmt: skip
        for name, tensor in columns(latents).items() if latents else ():
            half[name] = torch.cat([half[name].detach().cpu(), tensor], half[name].ndim - 1 if name != "w_dec" else 0)
        return FeatureEdit(
            **{name: tensor.cpu().to(torch.float16) for name, tensor in half.items()},
            edits=pairs(lambda choice: choice.features, [(c, len(used) + n) for n, (c, _, _) in enumerate(anchored)]),
            votes=pairs(lambda choice: choice.gate.features),
            weight=torch.cat([gate.weight for gate in gates]),
            bias=torch.tensor([gate.bias for gate in gates]),
            gate=torch.tensor([gate.level for gate in gates]),
            probe=torch.stack([gate.probe for gate in gates], 1),
            probe_bias=torch.tensor([gate.probe_bias for gate in gates]),
            probe_gate=torch.tensor([gate.probe_level for gate in gates]),
            rule=torch.tensor(int(self.gate == "probe")),
            local=torch.tensor(int(self.tokens == "word" or self.mode == "replace")),
            first=torch.tensor(tower.leading),
            end=torch.tensor(tower.end),
        )


def select(found: Evidence, options: ItD) -> list[int]:
    """The features of a concept, those that say most first; none when no latent tells it from the rest."""
    fits = (found.target_rate >= options.target_rate) & (found.retain_rate <= options.retain_rate)
    fits &= found.magnitude > 0
    value = torch.where(fits, found.score * found.magnitude, torch.full_like(found.score, -torch.inf))
    return value.topk(min(options.features, int(fits.sum()))).indices.tolist()
