"""Activations of a text tower as a stream: prompts go in, token vectors come out, nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import HookRegistry
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from erasure import modules
from erasure.backbones import TextTower
from erasure.backbones.base import PromptTokens
from erasure.carriers.weights import fingerprint, same_base
from erasure.errors import NoMatchingModuleError, OptionError

_CAPTURE = "erasure_capture"


class _Capture(ModelHook):
    """Keeps the last output of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.output = output[0] if isinstance(output, tuple) else output
        return output


@contextmanager
def captured(block: nn.Module) -> Iterator[_Capture]:
    """What a transformer block gives, `(batch, tokens, dim)`, of CLIP (a tensor) and T5 (a tuple) alike."""
    hook = _Capture()
    modules.register_hook(block, hook, _CAPTURE)
    try:
        yield hook
    finally:
        HookRegistry.check_if_exists_or_initialize(block).remove_hook(_CAPTURE)


def block_of(tower: TextTower, layer: int) -> nn.Module:
    """The block of a tower whose output is read and edited.

    Raises:
        NoMatchingModuleError: The tower has no such block, or what the denoiser reads does not pass through it.
    """
    # hidden_states[-2] is the output of the last block but one.
    last = len(tower.blocks) + tower.consumed
    if not 0 <= layer <= last:
        raise NoMatchingModuleError(
            f"{tower.component} has no block {layer} that reaches the denoiser; there are 0 to {last}"
        )
    return tower.blocks[layer]


def block_fingerprint(tower: TextTower, layer: int) -> dict[str, str]:
    """By which an autoencoder knows the text encoder it was made for: that of the block's first matrix."""
    return fingerprint(_first_matrix(tower, layer))


def reads_from(tower: TextTower, layer: int, known: Mapping[str, str]) -> bool:
    """Whether a fingerprint is this tower's."""
    return same_base(_first_matrix(tower, layer), known)


def _first_matrix(tower: TextTower, layer: int) -> Tensor:
    return next(p for p in block_of(tower, layer).parameters() if p.ndim == 2)


@torch.no_grad()
def activations(tower: TextTower, layer: int, tokens: PromptTokens) -> Tensor:
    """Output of a block for tokenised prompts, `(batch, tokens, dim)`."""
    with captured(block_of(tower, layer)) as capture:
        tower.encode(tokens)
    assert capture.output is not None
    return capture.output


class TokenStream:
    """Token vectors of random prompts, the same for the same step.

    Tokens are padded as the pipeline pads. The start token is left out: it never depends on the prompt.

    Args:
        tower: The text tower, frozen.
        layer: Which block's output.
        prompts: What to draw from.
        batch_size: Prompts per step.
        pad_share: Share of the padding positions that is kept: they are many and much alike.
        seed: Seeds the draw; give each process its own.

    Raises:
        NoMatchingModuleError: The tower has no such block.
        OptionError: No prompts.
    """

    def __init__(
        self, tower: TextTower, layer: int, prompts: Sequence[str], *, batch_size: int = 64, pad_share: float = 0.1,
        seed: int = 0,
    ) -> None:  # fmt: skip
        block_of(tower, layer)
        if not len(prompts):
            raise OptionError("an autoencoder needs prompts to be trained on, and there are none")
        self.tower, self.layer, self.prompts = tower, layer, prompts
        self.batch_size, self.pad_share, self.seed = batch_size, pad_share, seed

    def __call__(self, step: int) -> Tensor:
        """Activations `(tokens, dim)` of a step, float32."""
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(len(self.prompts), size=self.batch_size)
        tokens = self.tower.tokenize([self.prompts[int(row)] for row in rows])
        states = activations(self.tower, self.layer, tokens)
        keep = token_mask(tokens)
        pads = torch.from_numpy(rng.random(keep.shape) < self.pad_share)
        pads[:, 0] = False
        return states[(keep | pads).to(states.device)].float()


def token_mask(tokens: PromptTokens) -> Tensor:
    """Which positions hold words or the end token, `(batch, tokens)` bool on the CPU: no start token, no padding."""
    position = torch.arange(tokens.ids.shape[1])
    lengths = torch.tensor(tokens.lengths)
    return (position > 0) & (position < lengths[:, None])
