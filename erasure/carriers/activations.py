"""Edits of activations through diffusers' hooks: torch's forward hooks do not survive compile and offloading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erasure.carriers.token_ids import current_ids, keep_ids, keeps_ids
from erasure.interop import hooks, paths
from erasure.interop.hooks import ModelHook

_WRITE = "erasure_pinned_write"


class Pinned(NamedTuple):
    """Prompts whose encoding is held fixed."""

    input_ids: Tensor
    """`(prompts, tokens)` int64, padded as the pipeline pads."""
    hidden_states: Tensor
    """The final hidden states to return, `(prompts, tokens, dim)`."""


class _WriteRows(ModelHook):
    """On the final layer norm: puts the pinned encodings in place of those of the same prompts."""

    def __init__(self, pins: Sequence[Pinned]) -> None:
        super().__init__()
        self.pins = tuple(pins)

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        """Replace the rows of the batch that are pinned prompts."""
        ids = current_ids(*output.shape[:2]) if output.ndim == 3 else None
        for pin in self.pins if ids is not None else ():
            for row, hidden in zip(pin.input_ids, pin.hidden_states, strict=True):
                if hidden.shape == output.shape[1:]:
                    same = (ids == row.to(output.device)).all(-1)
                    output = torch.where(same[:, None, None], hidden.to(output.device, output.dtype), output)
        return output


class PinnedPrompts:
    """Keeps the encoding of given prompts (the empty one above all) as the stock encoder has it."""

    @staticmethod
    def write(encoder: nn.Module, pins: Sequence[Pinned]) -> None:
        """Make exactly these pins active on a text encoder; none removes the hooks."""
        if PinnedPrompts.is_written(encoder, pins):
            return
        norm = _final_norm(encoder)
        hooks.remove_hook(norm, _WRITE)
        keep_ids(encoder, _WRITE, bool(pins))
        if pins:
            hooks.register_hook(norm, _WriteRows(pins), _WRITE)

    @staticmethod
    def is_written(encoder: nn.Module, pins: Sequence[Pinned]) -> bool:
        """Whether exactly these pins are active."""
        norm = _final_norm(encoder)
        writer = hooks.find_hook(norm, _WRITE)
        if not isinstance(writer, _WriteRows):
            return not pins and writer is None
        same = len(writer.pins) == len(pins) and all(a is b for a, b in zip(writer.pins, pins, strict=True))
        return same and hooks.runs_hook(norm, _WRITE) and keeps_ids(encoder, _WRITE)


def _final_norm(encoder: nn.Module) -> Any:
    """Give the norm that hidden states leave through; `None` in a module that is no text encoder."""
    return getattr(paths.transformer_root(encoder), "final_layer_norm", None)
