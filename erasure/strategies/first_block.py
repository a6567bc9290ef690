"""Training of a text encoder's first block, as whole matrices or with low-rank changes."""

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
"""Number of a block's parameters above which its changes are low-rank, and their rank."""


class EncoderOutputs(NamedTuple):
    """Outputs of a text encoder for a batch of prompts, in float32."""

    tapped: Tensor
    """Activation on which the loss is computed, `(prompts, tokens, dim)`."""
    states: Tensor
    """Token states that the denoiser reads, `(prompts, tokens, dim)`."""
    pooled: Tensor | None
    """Pooled vectors that the denoiser reads, `(prompts, dim)`; `None` where it reads none."""


def run(
    tower: TextTower, parameters: Mapping[str, Tensor], tokens: PromptTokens, tap: Tap = "attention"
) -> EncoderOutputs:
    """Run a text encoder with other parameters, named by their current paths; differentiable in the parameters.

    Args:
        tower: The text encoder.
        parameters: Parameters of the encoder's root module, by path.
        tokens: Tokenised prompts.
        tap: Activation to record: `output` is the state that the denoiser reads, `attention` the output of the
            attention output projection in the block that makes this state.
    """
    with tapped(tower.root.get_submodule(tower.attention_out(tower.consumed))) as seen:
        output = torch.func.functional_call(
            tower.root, dict(parameters), (tokens.ids,),
            {"attention_mask": tokens.attention_mask, "output_hidden_states": tower.consumed != -1},
        )  # fmt: skip
    states = tower.consumed_states(output).float()
    pooled = tower.pooled_vector(output).float() if tower.pooled else None
    return EncoderOutputs(seen[0].float() if tap == "attention" else states, states, pooled)


class FirstBlock(Player):
    """The trained linear layers of a text encoder's first block, in its attention and its MLP; norms are not trained.

    Args:
        tower: Text encoder, which itself is not changed.
        rank: Rank of the change of each weight, where biases are not trained; 0 trains whole weights and biases.
            Chosen by the size of the block when `None`.
        seed: Seed of the initial low-rank factors.
    """

    def __init__(self, tower: TextTower, rank: int | None = 0, seed: int = 0) -> None:
        super().__init__()
        paths_now = trained_parameters(tower)
        own = dict(tower.root.named_parameters())
        size = sum(own[name].numel() for name in paths_now.values())
        self.rank = rank = (RANK if size > LARGE else 0) if rank is None else rank
        # bfloat16 keeps the range of a large encoder's values in half the memory; float16 overflows in T5.
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
        """Fully trained parameters, by current path."""
        return {} if self.rank else dict(zip(self.canonical, self.values, strict=True))

    def pairs(self) -> dict[str, LowRank]:
        """Low-rank changes, by the current path of the weight that they change."""
        if not self.rank:
            return {}
        downs, ups = list(self.values)[::2], list(self.values)[1::2]
        return {name: LowRank(*pair) for name, *pair in zip(self.canonical, downs, ups, strict=True)}

    def changed(self) -> dict[str, Tensor]:
        """All parameters of the encoder's root module with the changes, by current path."""
        added = {
            name: (self.stock[name].float() + up @ down).to(self.stock[name].dtype)
            for name, (down, up) in self.pairs().items()
        }
        return {**self.stock, **self.whole(), **added}

    def changes(self) -> dict[str, Tensor | LowRank]:
        """The changes in float16 on the CPU: whole ones by path of the parameter, low-rank ones by layer."""
        made: dict[str, Tensor | LowRank] = {
            self.canonical[name]: (value.detach() - self.stock[name]).half().cpu()
            for name, value in self.whole().items()
        }
        for name, pair in self.pairs().items():
            halved = [part.detach().half().cpu().contiguous() for part in pair]
            made[self.canonical[name].removesuffix(".weight")] = LowRank(*halved)
        return made


def trained_parameters(tower: TextTower) -> dict[str, str]:
    """Map canonical paths to current paths for the linear layers' parameters in the first block's attention and MLP.

    Norms are left out, as in the option `first-attn` of HiRM's released code.
    """
    parts = (f"{tower.attention(0)}.", f"{tower.mlp(0)}.")
    return {
        path: now
        for path, now in paths.canonical_parameters(tower.root).items()
        if path.startswith(parts) and isinstance(paths.layer(tower.root, path.rpartition(".")[0]), nn.Linear)
    }
