"""HiRM: train the first block of the text encoder with a loss on its last block (arXiv 2602.19631)."""

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
from erasure.progress import between
from erasure.strategies.base import Fit, Strategy, register
from erasure.strategies.first_block import EncoderOutputs, FirstBlock, Tap, run
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
"""Options of HiRM-R. The uniform distribution of directions is from the released code; the paper only says random."""
SEMANTIC = {**PAPER, "variant": "semantic", "coefficient": 1.0, "aligned": False}
"""Options of HiRM-S."""
RELEASED = {**RANDOM, "steps": 50, "lr": 1e-4, "coefficient": 5000.0, "norm": "tensor"}
"""Defaults of the released script, which are also its command for nudity; its commands for objects and styles have
fewer steps."""
LONGEST = 128
"""Number of tokens to which prompts are padded in training where the encoder allows any length (T5), because longer
padding takes most of the time."""


class Drawn(NamedTuple):
    """The prompts and targets of an update."""

    tokens: PromptTokens
    """Tokenised prompts with the concepts."""
    targets: Tensor
    """Targets of the activations for these prompts, `(prompts, tokens, dim)`."""
    pooled: Tensor | None
    """Targets of the pooled vectors for these prompts, `(prompts, dim)`."""
    kept: PromptTokens | None
    """Tokenised prompts that must survive; `None` where there are none."""
    before: EncoderOutputs | None
    """Outputs of the stock encoder for the prompts that must survive."""


@register("hirm")
@dataclass(frozen=True, kw_only=True)
class HiRM(Strategy):
    """Change the text encoder's states for the concept by training its first block only.

    The loss is on the output `h` of the last block's attention output projection, at every token position t of a
    prompt with the concept:

        variant random:    mean_t |h_t - c r_t|^2     r_t a fixed random direction
        variant semantic:  mean_t |h_t - c s_t|^2     s_t the stock encoder's h for the prompt with the anchor instead

    Each loss is divided by the width of `h`. The retain loss, `retain_weight` times the mean squared change of the
    encoder's output on prompts that must survive, is added. Several concepts are trained jointly, each with its own
    target. Where the denoiser reads a hidden state before the last block, the loss is on the last block that it reads.
    Every text encoder that the denoiser reads is trained; where it reads a pooled vector, the same loss is added for
    that vector. T5 has no token that summarises the prompt, so the loss is on all of its states; its first block is
    large, so its change has low rank.

    Protects a hosted pipeline: the denoiser is not changed, so whoever has the weights can use the stock text encoder
    again, and `prompt_embeds=` bypasses the erasure.

    Presets: `paper-r-...` and `paper-s-...` are the paper's settings of each kind of concept for HiRM-R and HiRM-S,
    `released...` the script's defaults and its commands for objects and styles. All of them train on the bare names,
    at every position including the start token, and retain nothing; they were made for CLIP ViT-L/14. There is no
    preset of HiRM-S for nudity, because the paper does not fully define the vector that it subtracts.
    """

    title: ClassVar[str] = "misdirection of the text encoder's first block"
    paper: ClassVar[str] = "HiRM, ICLR 2026, arXiv 2602.19631"
    needs: ClassVar[tuple[Need, ...]] = ("word states",)
    protects: ClassVar[str] = "hosted pipeline"
    cost: ClassVar[str] = "seconds to minutes, text encoder only"

    variant: Literal["random", "semantic"] = "semantic"
    """Target direction: random (HiRM-R), or towards the anchor or super-category (HiRM-S)."""
    steps: Count = 60
    """Number of optimiser steps (paper: 15 to 50)."""
    lr: Positive = 1e-3
    """Learning rate of AdamW. The strength of the erasure grows with `lr` times `steps`; the paper's 5e-5 is for
    CLIP ViT-L/14."""
    coefficient: NotNegative = 1.0
    """Length c of the target of each token; with `norm="tensor"` of the targets of all tokens together."""
    distribution: Literal["gaussian", "uniform"] = "gaussian"
    """Distribution of the random directions; `uniform` on [0, 1) makes the directions of all positions similar
    (released code)."""
    norm: Literal["token", "tensor"] = "token"
    """Whether the random direction of each token has length 1 (`token`), or those of all tokens together (`tensor`,
    released code)."""
    skip_start: bool = True
    """Leave the start token out of the loss. The start token is the same in every prompt, so changing it changes
    every prompt."""
    tap: Literal["auto", "attention", "output"] = "auto"
    """Where the loss is computed: `attention` is the output projection of the last attention (paper); `output` is
    the state that the denoiser reads, which the concept also reaches through the residual stream. `auto` is
    `attention` in causal encoders (CLIP) and `output` in bidirectional ones (T5)."""
    rank: CountOrZero | None = None
    """Rank of the change of each matrix; 0 trains whole matrices and biases (paper). When left out: 16 where the
    first block has more than 32 million parameters (T5-XXL), else 0."""
    templates: bool = True
    """Train on every phrasing of the concept; when off, on its names alone (paper)."""
    joined: bool = False
    """Join all names of a concept with commas into one prompt, where prompts are bare names (released code)."""
    aligned: bool = True
    """Take the semantic target of each token from the corresponding token of the anchor's prompt; when off, from
    the same position (paper), where another word stands when concept and anchor differ in their number of tokens."""
    contexts: CountOrZero = 12
    """Number of random prompts in each step that name each concept among other words, in addition to its phrasings."""
    retain_weight: NotNegative = 1.0
    """Weight of the retain loss (paper: 0)."""
    retain_vocabulary: CountOrZero = 24
    """Number of random prompts, made of the tokeniser's words, in each step's retain loss."""
    unconditional: Literal["erased", "stock"] = "erased"
    """Encoding of the empty prompt: `erased` is that of the trained encoder, `stock` keeps the stock encoding, so
    that guidance does not change."""

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
        """Name of an option that makes retain lists ineffective, see `Strategy.ignores_retain`."""
        return "" if self.retain_weight else "retain_weight"

    def fit(
        self, backbone: Backbone, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]
    ) -> Fit:
        """Train each text encoder that the denoiser reads."""
        edits, log = Edits(), {}
        towers = backbone.towers
        for index, tower in enumerate(towers):
            report = between(progress, index / len(towers), (index + 1) / len(towers))
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
        """Train one text encoder; give the changes of its first block by path, and the last loss.

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
            """Choose the prompts of an update, and run the stock encoder on them."""
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
            """Compute the erasing loss, and the retain loss on prompts that must survive."""
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
        """Give the prompts of a concept to train on, aligned with those of its anchor."""
        if self.templates:
            return aligned_prompts(tower, concept)
        for words in concept.names:
            tower.check_words(words)
        texts = [", ".join(concept.names)] if self.joined else concept.names
        return [align(tower, "{}", text, concept.anchor or "") for text in texts]

    def run(self, tower: TextTower, parameters: Mapping[str, Tensor], tokens: PromptTokens) -> EncoderOutputs:
        """Run a text encoder and record the activation on which the loss is computed."""
        chosen: Tap = ("attention" if tower.causal else "output") if self.tap == "auto" else self.tap
        return run(tower, parameters, tokens, chosen)

    def direction(self, tower: TextTower, generator: torch.Generator) -> Tensor:
        """Draw the random target, the same for every prompt, `(tokens, dim)`."""
        return random_direction(tower.max_length, tower.width, self.distribution, self.norm, generator)

    @torch.no_grad()
    def targets(
        self, tower: TextTower, stock: Mapping[str, Tensor], pairs: Sequence[AlignedPrompt], direction: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Compute the targets of activations `(prompts, tokens, dim)` and of pooled vectors `(prompts, dim)`."""
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
        # The pooled vector gets one direction of the same length: that of the first token in the loss, repeated or cut
        # to fit.
        ahead = direction[tower.leading].to(device).repeat(-(-known.shape[1] // direction.shape[1]))
        return target, (self.coefficient * F.normalize(ahead[: known.shape[1]], dim=0)).expand(len(pairs), -1)


def random_direction(
    tokens: int, dim: int, distribution: Literal["gaussian", "uniform"], norm: Literal["token", "tensor"],
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    """Draw random targets, `(tokens, dim)`: every row of length 1, or the whole of Frobenius norm 1."""
    draw = torch.randn if distribution == "gaussian" else torch.rand
    values = draw(tokens, dim, generator=generator)
    return values / (values.norm(dim=1, keepdim=True) if norm == "token" else values.norm())
