"""ItD: deactivate a concept's features of a sparse autoencoder (Tian et al. 2025, arXiv 2503.09446)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from erasure.backbones import Backbone, TextTower
from erasure.carriers.edits import Edits
from erasure.carriers.features import FeatureEdit, word_mask
from erasure.concept import Concept
from erasure.errors import ConceptError, OptionError, WrongBaseError
from erasure.sae import SAETrainer, SparseAutoencoder, TrainingOptions, load
from erasure.sae.detection import CHUNK, prompt_scores
from erasure.sae.stream import TokenStream, activations, reads_from
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.prompts import context_prompts, retain_prompts, vocabulary, vocabulary_prompts


class Evidence(NamedTuple):
    """How often and how strongly each latent fires on the words of prompts with and without a concept."""

    target_rate: Tensor
    """`(d_sae,)` share of the prompts with the concept."""
    retain_rate: Tensor
    """`(d_sae,)` share of the others."""
    magnitude: Tensor
    """`(d_sae,)` mean of the greatest value in a prompt with the concept."""

    @property
    def score(self) -> Tensor:
        """Difference of the rates, `(d_sae,)`."""
        return self.target_rate - self.retain_rate


class Choice(NamedTuple):
    """The features of one concept."""

    features: list[int]
    """Indices in the dictionary."""
    level: Tensor
    """`(features,)`: what each usually reaches in prompts with the concept."""
    weight: Tensor
    """`(features,)`: how well each tells the concept from the rest."""


@register("itd")
@dataclass(frozen=True, kw_only=True)
class ItD(Strategy):
    """Turn off the latents that only prompts with the concept fire, in prompts that hold it.

    A sparse autoencoder of the text encoder's residual stream gives latents `z` with decoder rows `d`. Those that fire
    on most prompts with the concept and on next to none of the others are its features F. In use,

        x' = x + sum_{i in F} (tau - 1) z_i d_i

    at every token but the first, in prompts where enough of the features fire together on one word (see
    `erasure.carriers.features`). What the autoencoder does not explain is left as it is, prompts below the threshold
    too, bit for bit. The paper's released code instead puts in the whole reconstruction, takes the features by a
    difference of top-K sets, and sets the threshold on the prompts that it is tested on.

    Several concepts are as many slices of the same dictionary, each behind its own threshold; adding one trains
    nothing. Protects a hosted pipeline: whoever holds the weights leaves the hooks out, and `prompt_embeds=` bypasses
    them.
    """

    title: ClassVar[str] = "deactivation of sparse-autoencoder features in the text encoder"
    paper: ClassVar[str] = "Tian et al. 2025, arXiv 2503.09446"
    families: ClassVar[tuple[str, ...]] = ("stable-diffusion",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds with a dictionary, a minute or more without"
    carriers: ClassVar[tuple[str, ...]] = ("activations",)
    signed: ClassVar[tuple[str, ...]] = ("tau",)

    dictionary: str = ""
    """Folder of a sparse autoencoder made for this text encoder (`erasure sae train`). Left out, the embedded one is
    taken for the embedded model, and else a small one is trained first, on random prompts of the tokeniser's words."""
    layer: int | None = None
    """Block whose output is read and edited, from 0 on; the dictionary's own, or two thirds of the way."""
    mode: Literal["scale", "clamp"] = "scale"
    """`scale` multiplies a latent by tau; `clamp` sets it to tau wherever it fires, however weakly."""
    tau: float = -2.0
    """What a latent is multiplied by or set to: 0 takes it away, below 0 pushes the other way (released code: -8)."""
    features: int = 32
    """At most so many latents of a concept."""
    floor: float = 0.25
    """A latent counts, and is edited, only above this share of what it usually reaches in prompts with the concept."""
    target_rate: float = 0.5
    """A feature fires on at least this share of the prompts with the concept."""
    retain_rate: float = 0.25
    """And on at most this share of the others: what a concept shares with a few neighbours is part of what draws it,
    and is changed only behind its gate."""
    false_positive_cost: float = 20.0
    """Weight of the false positive rate against the true positive rate when the gate is set, on prompts that chose no
    feature. Words of the tokeniser that mean the concept, but are not given as synonyms, count as false positives."""
    contexts: int = 96
    """Random prompts that name the concept among other words."""
    vocabulary: int = 2400
    """Random prompts from the tokeniser's own words that do not name it."""
    d_sae: int = 1024
    """Latents of a dictionary that is trained first."""
    k: int = 8
    """Its latents per token."""
    steps: int = 600
    """Its training steps."""

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Find the features of every concept in the first tower's dictionary, and calibrate the gates."""
        tower = backbone.towers[0]
        for words in (name for concept in concepts for name in concept.names):
            tower.check_words(words)
        sae, layer = self.open_dictionary(tower, seed, lambda share: progress(0.8 * share))
        generator = torch.Generator().manual_seed(seed)
        log: dict[str, float] = {"layer": float(layer)}
        choices: list[Choice] = []
        held_out = []
        for index, concept in enumerate(concepts):
            target, retain = self.prompts(tower, concept, generator)
            # Every second prompt chooses features, the others calibrate the gate.
            choosing = [strongest(tower, layer, sae, part[::2]) for part in (target, retain)]
            found = evidence(choosing[0], choosing[1], self.floor)
            features = select(found, self, concept.target)
            choices.append(Choice(features, found.magnitude[features], found.score[features].clamp_min(1e-3)))
            held_out.append((target[1::2], retain[1::2]))
            progress(0.8 + 0.15 * (index + 1) / len(concepts))
        edit = self.edit(tower, sae, choices)
        gates = []
        for index, (concept, parts) in enumerate(zip(concepts, held_out, strict=True)):
            target_scores, retain_scores = (prompt_scores(tower, layer, edit, part)[:, index] for part in parts)
            gates.append(gate := calibrate(target_scores, retain_scores, self.false_positive_cost))
            log |= {
                f"{concept.target}_features": float(len(choices[index].features)),
                f"{concept.target}_tpr": (target_scores >= gate).float().mean().item(),
                f"{concept.target}_fpr": (retain_scores >= gate).float().mean().item(),
                f"{concept.target}_auc": area(target_scores, retain_scores),
            }
        edit = edit._replace(gate=torch.tensor(gates, dtype=torch.float32))
        progress(1.0)
        return Fit(Edits(features={tower.key(f"encoder.layers.{layer}"): edit}), log)

    def open_dictionary(
        self, tower: TextTower, seed: int, progress: Callable[[float], None]
    ) -> tuple[SparseAutoencoder, int]:
        """The autoencoder and the block it reads.

        Raises:
            OptionError: It does not say which block it reads.
            WrongBaseError: It was made for another text encoder.
        """
        folder = Path(self.dictionary) if self.dictionary else embedded_dictionary(tower)
        if folder is None:
            return self.train_dictionary(tower, seed, progress)
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
        return sae.to(next(tower.root.parameters()).device), layer

    def train_dictionary(
        self, tower: TextTower, seed: int, progress: Callable[[float], None]
    ) -> tuple[SparseAutoencoder, int]:
        """A small autoencoder from random prompts."""
        layer = 2 * len(tower.blocks) // 3 if self.layer is None else self.layer
        prompts = vocabulary_prompts(vocabulary(tower, ()), 20_000, torch.Generator().manual_seed(seed))
        options = TrainingOptions(
            d_sae=self.d_sae, k=self.k, steps=self.steps, learning_rate=1e-3, dead_after=50_000, seed=seed
        )
        sae = SAETrainer(TokenStream(tower, layer, prompts, seed=seed), options).train(progress)
        return sae.to(next(tower.root.parameters()).device), layer

    def prompts(self, tower: TextTower, concept: Concept, generator: torch.Generator) -> tuple[list[str], list[str]]:
        """Prompts with a concept, and prompts without it (other concepts that are erased may be in them)."""
        known = vocabulary(tower, [concept])
        target = [template.format(words) for words in concept.names for template in concept.phrasings()]
        target += [pair.prompt for pair in context_prompts(tower, concept, known, self.contexts, generator)]
        retain = retain_prompts([concept])
        retain += [t.format(concept.anchor) for t in concept.phrasings() if concept.anchor]
        retain += vocabulary_prompts(known, self.vocabulary, generator)
        order = [torch.randperm(len(part), generator=generator).tolist() for part in (target, retain)]
        return [target[i] for i in order[0]], [retain[i] for i in order[1]]

    def edit(self, tower: TextTower, sae: SparseAutoencoder, choices: Sequence[Choice]) -> FeatureEdit:
        """The slices of all concepts, one after the other, in float16, with all gates open."""
        part = sae.slice([feature for choice in choices for feature in choice.features])
        count = len(part.b_enc)
        level = torch.cat([choice.level for choice in choices])
        vote = torch.cat([choice.weight / choice.weight.sum() for choice in choices])
        gain = torch.full((count,), self.tau - 1 if self.mode == "scale" else -1.0)
        offset = torch.full((count,), 0.0 if self.mode == "scale" else self.tau)
        concept = torch.tensor([index for index, choice in enumerate(choices) for _ in choice.features])
        tensors = (part.w_enc, part.b_enc, part.w_dec, part.threshold.cpu().maximum(self.floor * level), gain, offset)
        half = [tensor.cpu().to(torch.float16) for tensor in tensors]
        end = torch.tensor(tower.tokenizer.eos_token_id)
        return FeatureEdit._make([*half, concept, level, vote, torch.zeros(len(choices)), end])


def embedded_dictionary(tower: TextTower) -> Path | None:
    """The autoencoder that comes with the package, when it was made for this text encoder."""
    from erasure import assets

    folder = assets.find("canvas-sae")
    if folder is None:
        return None
    about = load(folder).config.metadata
    fits = about["layer"] < len(tower.blocks) and reads_from(tower, about["layer"], about["fingerprint"])
    return folder if fits else None


@torch.no_grad()
def strongest(tower: TextTower, layer: int, sae: SparseAutoencoder, prompts: Sequence[str]) -> Tensor:
    """The greatest value of each latent at the words of a prompt, `(prompts, d_sae)` on the CPU."""
    made = []
    for first in range(0, len(prompts), CHUNK):
        tokens = tower.tokenize(prompts[first : first + CHUNK])
        mask = word_mask(tokens.ids, torch.tensor(tower.tokenizer.eos_token_id, device=tokens.ids.device))
        latents = sae.encode(activations(tower, layer, tokens).float())
        made.append((latents * mask[..., None]).amax(1).cpu())
    return torch.cat(made)


def evidence(target: Tensor, retain: Tensor, floor: float) -> Evidence:
    """Of the strongest latents `(prompts, d_sae)` of prompts with the concept and without it; see `ItD.floor`."""
    magnitude = target.mean(0)
    fires = [(part > floor * magnitude).float().mean(0) for part in (target, retain)]
    return Evidence(fires[0], fires[1], magnitude)


def select(found: Evidence, options: ItD, concept: str) -> list[int]:
    """The features of a concept, those that say most first.

    Raises:
        ConceptError: No latent tells the concept from the rest.
    """
    fits = (found.target_rate >= options.target_rate) & (found.retain_rate <= options.retain_rate)
    fits &= found.magnitude > 0
    if not fits.any():
        near = found.score.topk(min(3, len(found.score))).indices.tolist()
        listed = "; ".join(
            f"latent {i} fires on {found.target_rate[i]:.0%} of them and on {found.retain_rate[i]:.1%} of the others"
            for i in near
        )
        raise ConceptError(
            f"no feature of the dictionary tells {concept!r} from the rest. The nearest: {listed}. Raise retain_rate "
            "if that is acceptable, or train a larger dictionary on prompts with the concept"
        )
    value = torch.where(fits, found.score * found.magnitude, torch.full_like(found.score, -torch.inf))
    return value.topk(min(options.features, int(fits.sum()))).indices.tolist()


def calibrate(target: Tensor, retain: Tensor, cost: float) -> float:
    """The least score of an open gate: the greatest `true positive rate - cost * false positive rate`.

    Of several that are as good, the one in the middle of the widest gap between scores.

    Args:
        target: `(prompts,)` scores of prompts with the concept.
        retain: `(prompts,)` of others.
        cost: Weight of a false positive.
    """
    levels = torch.cat([target, retain]).double().unique()
    if len(levels) == 1:
        return 0.5
    gates, gaps = (levels[1:] + levels[:-1]) / 2, levels[1:] - levels[:-1]
    rates = [(part.double()[None] >= gates[:, None]).double().mean(1) for part in (target, retain)]
    gain = rates[0] - cost * rates[1]
    best = gain >= gain.max() - 1e-9
    return gates[torch.where(best, gaps, -torch.inf).argmax()].item()


def area(target: Tensor, retain: Tensor) -> float:
    """Area under the ROC curve: the chance that a prompt with the concept scores higher than one without."""
    wins = (target[:, None] > retain[None]).double() + 0.5 * (target[:, None] == retain[None]).double()
    return wins.mean().item()
