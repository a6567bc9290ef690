"""HiRM: erasing in the first block of the text encoder with a loss on its last (arXiv 2602.19631)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from erasure.backbones import Backbone, PromptTokens, TextTower
from erasure.carriers.activations import pin_of
from erasure.carriers.edits import Edits, LowRank
from erasure.concept import Concept
from erasure.needs import Need
from erasure.options import Count, CountOrZero, NotNegative, Positive, Presets
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.first_block import FirstBlock, Reached, Tap, run
from erasure.text.corpora import context_prompts, retain_prompts, vocabulary, vocabulary_prompts
from erasure.text.words import AlignedPrompt, align, aligned_prompts
from erasure.training.loop import Share, Trainer
from erasure.training.turns import Descent, Turn

PAPER: Mapping[str, object] = {
    "lr": 5e-5, "skip_start": False, "templates": False, "joined": True, "contexts": 0, "retain_weight": 0.0,
    "tap": "attention", "unconditional": "erased", "rank": 0,
}  # fmt: skip
"""Options that all of the paper's experiments have in common."""
RANDOM = {**PAPER, "variant": "random", "coefficient": 500.0, "distribution": "uniform", "norm": "token"}
"""HiRM-R. That directions are drawn uniformly is the released code's; the paper says random."""
SEMANTIC = {**PAPER, "variant": "semantic", "coefficient": 1.0, "aligned": False}
"""HiRM-S."""
RELEASED = {**RANDOM, "steps": 50, "lr": 1e-4, "coefficient": 5000.0, "norm": "tensor"}
"""Defaults of the script, with which its command for nudity agrees; those for objects and styles have fewer steps."""
LONGEST = 128
"""Tokens of the prompts that an encoder of free length is trained with: its padding takes most of the time."""


class Drawn(NamedTuple):
    """The prompts of an update."""

    tokens: PromptTokens
    """Of prompts with the concepts."""
    targets: Tensor
    """Where their activations must go, `(prompts, tokens, dim)`."""
    pooled: Tensor | None
    """Where their pooled vectors must go, `(prompts, dim)`."""
    kept: PromptTokens | None
    """Of prompts that must survive, where any must."""
    before: Reached | None
    """What the stock encoder gives for them."""


@register("hirm")
@dataclass(frozen=True, kw_only=True)
class HiRM(Strategy):
    """Misdirect what the text encoder makes of the concept by training its first block only.

    The loss is on the output `h` of the last block's attention output projection, at every token position t of a
    prompt with the concept:

        variant random:    mean_t |h_t - c r_t|^2     r_t a fixed random direction
        variant semantic:  mean_t |h_t - c s_t|^2     s_t the stock encoder's h for the prompt with the anchor instead

    each divided by the width of `h`, plus `retain_weight` times the mean squared change of the encoder's output on
    prompts that must survive. Several concepts are trained jointly, one target each. Where the denoiser reads a hidden
    state before the last block, the loss is on the last block that it reads. Every text encoder that it reads is
    trained; where it reads a pooled vector, the same is asked of that. T5 has no token that gathers the prompt, so the
    loss is on all of its states; its first block is large, so that its change is of low rank.

    Protects a hosted pipeline: the denoiser is untouched, so whoever holds the weights can put the stock encoder back,
    and `prompt_embeds=` bypasses it.

    Presets: `paper-r-...` and `paper-s-...` are the paper's settings of each kind of concept for HiRM-R and HiRM-S,
    `released...` the script's defaults and its commands for objects and styles. They train on the bare names, at every
    position, the start token too, and retain nothing; they were made for CLIP ViT-L/14. HiRM-S for nudity is none: it
    subtracts a vector of which the paper does not say all.
    """

    title: ClassVar[str] = "misdirection of the text encoder's first block"
    paper: ClassVar[str] = "HiRM, ICLR 2026, arXiv 2602.19631"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds to a minute, text encoder only"

    variant: Literal["random", "semantic"] = "semantic"
    """Target direction: random (HiRM-R), or towards the anchor or super-category (HiRM-S)."""
    steps: Count = 60
    """Optimiser steps (paper: 15 to 50)."""
    lr: Positive = 1e-3
    """Learning rate of AdamW. This times `steps` is the real strength; the paper's 5e-5 is for CLIP ViT-L/14."""
    coefficient: NotNegative = 1.0
    """c: length of the target per token; in `norm="tensor"` of the whole target."""
    distribution: Literal["gaussian", "uniform"] = "gaussian"
    """Of the random directions; `uniform` on [0, 1) makes all positions share one direction (released code)."""
    norm: Literal["token", "tensor"] = "token"
    """Whether each token's random direction has length 1 or all of them together (released code)."""
    skip_start: bool = True
    """Leave the start token out of the loss: it does not depend on the prompt, so moving it moves every prompt."""
    tap: Literal["auto", "attention", "output"] = "auto"
    """Where the loss is: the last attention's output projection (paper), or the state that the denoiser reads,
    which the concept also reaches past the attention through the residual stream. `auto`: the first, but in encoders
    whose tokens see those that follow (T5)."""
    rank: CountOrZero | None = None
    """Rank of the change of each matrix; 0 changes whole matrices and biases (paper). Left out it is 16 where the
    first block has more than 32 million parameters, as that of T5-XXL, else 0."""
    templates: bool = True
    """Train on every phrasing of the concept instead of its names alone (paper)."""
    joined: bool = False
    """Write all names of a concept into one prompt, commas between, where prompts are bare names (released code)."""
    aligned: bool = True
    """Take each token's semantic target from the token of the anchor's prompt that answers to it; else from the same
    position (paper), where another word stands when concept and anchor have not as many tokens."""
    contexts: CountOrZero = 12
    """Besides, in each step, so many random prompts that name each concept among other words."""
    retain_weight: NotNegative = 1.0
    """Weight of the retention term; 0 is the paper."""
    retain_vocabulary: CountOrZero = 24
    """Random prompts from the tokeniser's own words in each step's retention term."""
    unconditional: Literal["erased", "stock"] = "erased"
    """`stock` pins the empty prompt to the stock encoding, so that guidance is as before."""

    presets: ClassVar[Presets] = {
        "paper-r-object": {**RANDOM, "steps": 25},
        "paper-r-style": {**RANDOM, "steps": 40},
        "paper-r-nudity": {**RANDOM, "steps": 50, "lr": 1e-4},
        "paper-s-object": {**SEMANTIC, "steps": 15},
        "paper-s-style": {**SEMANTIC, "steps": 30},
        "released": RELEASED,
        "released-object": {**RELEASED, "steps": 15},
        "released-style": {**RELEASED, "steps": 20},
    }

    def ignores_retain(self) -> str:
        """See `Strategy.ignores_retain`."""
        return "" if self.retain_weight else "retain_weight"

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Train each text tower that the denoiser reads."""
        edits, log = Edits(), {}
        towers = backbone.towers
        for index, tower in enumerate(towers):

            def report(share: float, index: int = index) -> None:
                progress((index + share) / len(towers))

            changed, loss = self.fit_tower(tower, concepts, seed, report)
            for path, change in changed.items():
                if isinstance(change, LowRank):
                    edits.low_rank[tower.key(path)] = change
                else:
                    edits.deltas[tower.key(path)] = change
            log[f"{tower.component}_loss"] = loss
            if self.unconditional == "stock":
                edits.pinned[tower.component] = pin_of(tower, [""])
        return Fit(edits, log)

    def fit_tower(
        self, tower: TextTower, concepts: Sequence[Concept], seed: int, progress: Callable[[float], None]
    ) -> tuple[dict[str, Tensor | LowRank], float]:
        """Changes of the first block by path, of its parameters or of its layers, and the last loss.

        Raises:
            DivergenceError: The loss became NaN or infinite.
        """
        if not tower.causal:
            tower = dataclasses.replace(tower, max_length=min(tower.max_length, LONGEST))
        generator = torch.Generator().manual_seed(seed)
        block = FirstBlock(tower, self.rank, seed)
        pairs = [pair for concept in concepts for pair in self.prompts(tower, concept)]
        direction = self.direction(tower, generator)
        words = vocabulary(tower, concepts)
        listed = retain_prompts(concepts) if self.retain_weight else []
        first = tower.leading if self.skip_start else 0

        def prepare(_update: int, _share: Share) -> Drawn:
            """The prompts of an update, and what the stock encoder makes of them."""
            batch = [*pairs]
            for concept in concepts if words and self.contexts else ():
                batch += context_prompts(tower, concept, words, self.contexts, generator)
            targets, pooled = self.targets(tower, block.stock, batch, direction)
            tokens = tower.tokenize([pair.prompt for pair in batch])
            if not self.retain_weight:
                return Drawn(tokens, targets, pooled, None, None)
            rows = torch.randint(len(listed), (min(len(listed), 24),), generator=generator)
            extra = vocabulary_prompts(words, self.retain_vocabulary, generator) if words else []
            kept = tower.tokenize(["", *(listed[int(row)] for row in rows), *extra])
            with torch.no_grad():
                return Drawn(tokens, targets, pooled, kept, self.run(tower, block.stock, kept))

        def losses(drawn: Drawn) -> dict[str, Tensor]:
            """How far the encoder is from the targets, and from what it gave for prompts that must survive."""
            reached = self.run(tower, block.changed(), drawn.tokens)
            terms = {"erase": F.mse_loss(reached.tapped[:, first:], drawn.targets[:, first:])}
            if drawn.pooled is not None and reached.pooled is not None:
                terms["erase_pooled"] = F.mse_loss(reached.pooled, drawn.pooled)
            if drawn.kept is not None and drawn.before is not None:
                before, after = drawn.before, self.run(tower, block.changed(), drawn.kept)
                moved = F.mse_loss(after.states, before.states)
                if before.pooled is not None and after.pooled is not None:
                    moved = moved + F.mse_loss(after.pooled, before.pooled)
                terms["retain"] = self.retain_weight * moved
            return terms

        descent = Descent(lr=self.lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-8)
        turn = Turn(name="block", player=block, losses=losses, descent=descent)
        row = Trainer(turns=[turn], prepare=prepare, steps=self.steps, seed=seed).train(progress)
        return block.changes(), sum(row.values())

    def prompts(self, tower: TextTower, concept: Concept) -> list[AlignedPrompt]:
        """The prompts to misdirect."""
        if self.templates:
            return aligned_prompts(tower, concept)
        for words in concept.names:
            tower.check_words(words)
        texts = [", ".join(concept.names)] if self.joined else concept.names
        return [align(tower, "{}", text, concept.anchor or "") for text in texts]

    def run(self, tower: TextTower, parameters: Mapping[str, Tensor], tokens: PromptTokens) -> Reached:
        """What the loss looks at."""
        chosen: Tap = ("attention" if tower.causal else "output") if self.tap == "auto" else self.tap
        return run(tower, parameters, tokens, chosen)

    def direction(self, tower: TextTower, generator: torch.Generator) -> Tensor:
        """The random target of every prompt, `(tokens, dim)`."""
        return random_direction(tower.max_length, tower.width, self.distribution, self.norm, generator)

    @torch.no_grad()
    def targets(
        self, tower: TextTower, stock: Mapping[str, Tensor], pairs: Sequence[AlignedPrompt], direction: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Where the activations must go, `(prompts, tokens, dim)`, and the pooled vectors, `(prompts, dim)`."""
        if self.variant == "semantic":
            anchors = self.run(tower, stock, tower.tokenize([pair.anchor_prompt for pair in pairs]))
            pooled = None if anchors.pooled is None else self.coefficient * anchors.pooled
            if not self.aligned:
                return self.coefficient * anchors.tapped, pooled
            index = torch.stack([pair.positions for pair in pairs]).to(anchors.tapped.device)
            aligned = anchors.tapped.gather(1, index[..., None].expand(-1, -1, anchors.tapped.shape[2]))
            return self.coefficient * aligned, pooled
        device = next(iter(stock.values())).device
        target = (self.coefficient * direction).to(device).expand(len(pairs), -1, -1)
        if not tower.pooled:
            return target, None
        known = self.run(tower, stock, tower.tokenize([""])).pooled
        assert known is not None
        # One direction too, of the same length: that of the first token that the loss looks at, as far as it is long.
        ahead = direction[tower.leading].to(device).repeat(-(-known.shape[1] // direction.shape[1]))
        return target, (self.coefficient * F.normalize(ahead[: known.shape[1]], dim=0)).expand(len(pairs), -1)


def random_direction(
    tokens: int, dim: int, distribution: Literal["gaussian", "uniform"], norm: Literal["token", "tensor"],
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Fixed random targets, `(tokens, dim)`: every row of length 1, or the whole of Frobenius norm 1."""
    draw = torch.randn if distribution == "gaussian" else torch.rand
    values = draw(tokens, dim, generator=generator)
    return values / (values.norm(dim=1, keepdim=True) if norm == "token" else values.norm())
