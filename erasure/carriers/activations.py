"""Pinned encodings of prompts, by diffusers' hooks: torch's forward hooks do not survive compile and offload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erasure.backbones import TextTower
from erasure.carriers.token_ids import current_ids, keep_ids, keeps_ids
from erasure.interop import hooks, paths
from erasure.interop.encoders import blocks_of, norm_of
from erasure.interop.hooks import ModelHook

_WRITE = "erasure_pinned_write"
NO_BLOCKS = torch.zeros(0)
"""Value of `Pinned.blocks` when the outputs of blocks are not known."""


class Pinned(NamedTuple):
    """Prompts whose encoding stays fixed, whatever is edited."""

    input_ids: Tensor
    """Token ids, `(prompts, tokens)` int64, padded as the pipeline pads."""
    hidden_states: Tensor
    """Final hidden states that the text encoder returns for them, `(prompts, tokens, dim)`."""
    blocks: Tensor = NO_BLOCKS
    """Output of every block, `(prompts, blocks, tokens, dim)`, for pipelines that skip the last blocks
    (`clip_skip`). Empty in files made before 2026-11, which have the final states only."""

    def fits(self) -> bool:
        """Whether the shapes are consistent."""
        prompts, *size = self.hidden_states.shape
        return (
            self.hidden_states.ndim == 3
            and self.input_ids.shape == self.hidden_states.shape[:2]
            and (not self.blocks.numel() or (self.blocks.ndim == 4 and [*self.blocks[:, 0].shape] == [prompts, *size]))
        )

    def stated(self) -> dict[str, Tensor]:
        """Give the tensors by field, without `blocks` when it is unknown."""
        return {name: tensor for name, tensor in self._asdict().items() if name != "blocks" or tensor.numel()}


def pin_of(tower: TextTower, prompts: Sequence[str]) -> Pinned:
    """Encode prompts with a text encoder as it is now, so that the result can be kept fixed."""
    tokens = tower.tokenize(prompts)
    with torch.no_grad():
        output = tower.module(tokens.ids, attention_mask=tokens.attention_mask, output_hidden_states=True)
    # The first hidden states are the embeddings, which no erasure edits. Pipelines read only the last block of T5.
    blocks = torch.stack(output.hidden_states[1:], 1) if tower.causal else torch.empty(0)
    states = [output.last_hidden_state, blocks]
    return Pinned(tokens.ids.cpu(), *(state.cpu() for state in states))


class _WriteRows(ModelHook):
    """Hook on a block or on the final norm: replaces the output for pinned prompts by the pinned states.

    Args:
        rows: For each group of prompts, their ids `(prompts, tokens)` and the output for them
            `(prompts, tokens, dim)`.
    """

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.rows = tuple(rows)

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Replace the batch's rows of pinned prompts; blocks of T5 return a tuple that begins with the states."""
        if isinstance(output, tuple):
            return self._replaced(output[0]), *output[1:]
        return self._replaced(output)

    def _replaced(self, output: Tensor) -> Tensor:
        ids = current_ids(*output.shape[:2]) if output.ndim == 3 else None
        for known, states in self.rows if ids is not None else ():
            for row, hidden in zip(known, states, strict=True):
                if hidden.shape == output.shape[1:]:
                    same = (ids == row.to(output.device)).all(-1)
                    output = torch.where(same[:, None, None], hidden.to(output.device, output.dtype), output)
        return output

    def writes(self, rows: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether this hook writes exactly these rows."""
        pairs = zip(self.rows, rows, strict=False)
        return len(self.rows) == len(rows) and all(torch.equal(a, c) and _same(b, d) for (a, b), (c, d) in pairs)


class PinnedPrompts:
    """Keeps the stock encoding of given prompts, above all of the empty prompt."""

    @staticmethod
    def write(encoder: nn.Module, pins: Sequence[Pinned]) -> None:
        """Make exactly these pins active on a text encoder; none removes the hooks."""
        if PinnedPrompts.is_written(encoder, pins):
            return
        wanted = _rows(encoder, pins)
        keep_ids(encoder, _WRITE, bool(pins))
        for module in _places(encoder):
            hooks.remove_hook(module, _WRITE)
            if id(module) in wanted:
                hooks.register_hook(module, _WriteRows(wanted[id(module)]), _WRITE)

    @staticmethod
    def is_written(encoder: nn.Module, pins: Sequence[Pinned]) -> bool:
        """Whether exactly these pins are active."""
        wanted = _rows(encoder, pins)
        for module in _places(encoder):
            writer = hooks.find_hook(module, _WRITE)
            rows = wanted.get(id(module), [])
            if rows:
                if not isinstance(writer, _WriteRows) or not writer.writes(rows):
                    return False
                if not hooks.runs_hook(module, _WRITE) or not keeps_ids(encoder, _WRITE):
                    return False
            elif writer is not None:
                return False
        return True


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two states are the same tensor; what was pickled holds another with the same values."""
    alike = first.shape == second.shape
    return alike and (first.data_ptr() == second.data_ptr() or torch.equal(first, second.to(first.device)))


def _rows(encoder: nn.Module, pins: Sequence[Pinned]) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """Give the hidden states that each module writes, by the module's `id`."""
    places = _places(encoder)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for pin in pins if places else ():
        *blocks, norm = places
        found.setdefault(id(norm), []).append((pin.input_ids, pin.hidden_states))
        for index, block in enumerate(blocks[: pin.blocks.shape[1]] if pin.blocks.numel() else ()):
            found.setdefault(id(block), []).append((pin.input_ids, pin.blocks[:, index]))
    return found


def _places(encoder: nn.Module) -> list[nn.Module]:
    """List the blocks of a text encoder and its final norm; empty for other modules."""
    root = paths.transformer_root(encoder)
    norm = norm_of(root)
    return [] if norm is None else [*blocks_of(root), norm]
