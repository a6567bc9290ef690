"""The first block of a text encoder in training, as whole matrices or with changes of low rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from erasure.backbones import PromptTokens, TextTower
from erasure.carriers.edits import LowRank
from erasure.interop import paths
from erasure.interop.taps import tapped
from erasure.training.turns import Player

Tap = Literal["attention", "output"]
LARGE, RANK = 32_000_000, 16
"""Parameters of a block from which on its changes are of low rank, and that rank."""


class Reached(NamedTuple):
    """What a text encoder makes of some prompts, in float32."""

    tapped: Tensor
    """The activation that a loss looks at, `(prompts, tokens, dim)`."""
    states: Tensor
    """What the denoiser reads, `(prompts, tokens, dim)`."""
    pooled: Tensor | None
    """The pooled vectors that it reads, `(prompts, dim)`, if it does."""


def run(tower: TextTower, parameters: Mapping[str, Tensor], tokens: PromptTokens, tap: Tap = "attention") -> Reached:
    """Run a text encoder with other parameters, by their paths now; differentiable in them.

    Args:
        tower: The text encoder.
        parameters: Those of its root.
        tokens: The prompts.
        tap: `output` is the state that the denoiser reads, `attention` the attention output projection of the block
            that makes it.
    """
    with tapped(tower.root.get_submodule(tower.attention_out(tower.consumed))) as seen:
        output = torch.func.functional_call(
            tower.root, dict(parameters), (tokens.ids,),
            {"attention_mask": tokens.attention_mask, "output_hidden_states": tower.consumed != -1},
        )  # fmt: skip
    states = tower.consumed_states(output).float()
    pooled = tower.pooled_vector(output).float() if tower.pooled else None
    return Reached(seen[0].float() if tap == "attention" else states, states, pooled)


class FirstBlock(Player):
    """The linear layers in the attention and the MLP of a text encoder's first block; its norms stay.

    Args:
        tower: The text encoder; left as it is.
        rank: Of the change of each weight, biases stay then; 0 for whole weights and biases. Chosen by the size of the
            block when left out.
        seed: Seeds the factors of low-rank changes.
    """

    def __init__(self, tower: TextTower, rank: int | None = 0, seed: int = 0) -> None:
        super().__init__()
        paths_now = trained_parameters(tower)
        own = dict(tower.root.named_parameters())
        size = sum(own[name].numel() for name in paths_now.values())
        self.rank = rank = (RANK if size > LARGE else 0) if rank is None else rank
        # bfloat16 holds what a large encoder computes, at half the memory; float16 overflows in T5.
        kept = torch.bfloat16 if rank and next(iter(own.values())).dtype == torch.bfloat16 else torch.float32
        self.stock = {name: parameter.detach().to(kept) for name, parameter in own.items()}
        self.canonical = {now: path for path, now in paths_now.items() if not rank or self.stock[now].ndim == 2}
        self.values = nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        for name in self.canonical:
            value = self.stock[name]
            if not rank:
                self.values.append(nn.Parameter(value.clone()))
                continue
            least = min(rank, *value.shape)
            down = (2 * torch.rand(least, value.shape[1], generator=generator) - 1) / value.shape[1] ** 0.5
            up = torch.zeros(len(value), least)
            self.values.extend(nn.Parameter(part.to(value.device)) for part in (down, up))

    def whole(self) -> dict[str, Tensor]:
        """Parameters that are trained in full, by their paths now."""
        return {} if self.rank else dict(zip(self.canonical, self.values, strict=True))

    def pairs(self) -> dict[str, LowRank]:
        """Low-rank changes, by the paths now of the weights that they change."""
        if not self.rank:
            return {}
        downs, ups = list(self.values)[::2], list(self.values)[1::2]
        return {name: LowRank(*pair) for name, *pair in zip(self.canonical, downs, ups, strict=True)}

    def changed(self) -> dict[str, Tensor]:
        """All parameters of the encoder's root by their paths now, with the changes."""
        added = {
            name: (self.stock[name].float() + up @ down).to(self.stock[name].dtype)
            for name, (down, up) in self.pairs().items()
        }
        return {**self.stock, **self.whole(), **added}

    def changes(self) -> dict[str, Tensor | LowRank]:
        """The changes, in float16 on the CPU: whole ones by path of the parameter, others by path of the layer."""
        made: dict[str, Tensor | LowRank] = {
            self.canonical[name]: (value.detach() - self.stock[name]).half().cpu()
            for name, value in self.whole().items()
        }
        for name, pair in self.pairs().items():
            halved = [part.detach().half().cpu().contiguous() for part in pair]
            made[self.canonical[name].removesuffix(".weight")] = LowRank(*halved)
        return made


def trained_parameters(tower: TextTower) -> dict[str, str]:
    """The path now, by canonical path, of the parameters of the linear layers in the first block's attention and MLP.

    Its norms stay (released code, option `first-attn`).
    """
    parts = (f"{tower.attention(0)}.", f"{tower.mlp(0)}.")
    return {
        path: now
        for path, now in paths.canonical_parameters(tower.root).items()
        if path.startswith(parts) and isinstance(paths.layer(tower.root, path.rpartition(".")[0]), nn.Linear)
    }
