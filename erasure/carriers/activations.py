"""Edits of activations through diffusers' hooks: torch's forward hooks do not survive compile and offloading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erasure.interop import hooks, paths
from erasure.interop.hooks import ModelHook

_READ, _WRITE = "erasure_pinned_read", "erasure_pinned_write"


class Pinned(NamedTuple):
    """Prompts whose encoding is held fixed."""

    input_ids: Tensor
    """`(prompts, tokens)` int64, padded as the pipeline pads."""
    hidden_states: Tensor
    """The final hidden states to return, `(prompts, tokens, dim)`."""


class _ReadIds(ModelHook):
    """On the token embedding: finds the rows of the batch that are pinned prompts."""

    def __init__(self, pins: Sequence[Pinned]) -> None:
        super().__init__()
        self.pins = tuple(pins)
        self.hits: list[tuple[Tensor, Tensor]] = []

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids: Any = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
        self.hits = []
        for pin in self.pins if ids is not None else ():
            for row, hidden in zip(pin.input_ids, pin.hidden_states, strict=True):
                if row.shape[-1] == ids.shape[-1]:
                    self.hits.append(((ids == row.to(ids.device)).all(-1), hidden))
        return args, kwargs


class _WriteRows(ModelHook):
    """On the final layer norm: puts the pinned encodings into those rows."""

    def __init__(self, reader: _ReadIds) -> None:
        super().__init__()
        self.reader = reader

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        for rows, hidden in self.reader.hits:
            if output.ndim == 3 and output.shape[0] == rows.shape[0] and output.shape[1:] == hidden.shape:
                output = torch.where(rows[:, None, None], hidden.to(output.device, output.dtype), output)
        return output


class PinnedPrompts:
    """Keeps the encoding of given prompts (the empty one above all) as the stock encoder has it."""

    @staticmethod
    def write(encoder: nn.Module, pins: Sequence[Pinned]) -> None:
        """Make exactly these pins active on a text encoder; none removes the hooks."""
        if PinnedPrompts.is_written(encoder, pins):
            return
        embeddings, final_norm = _places(encoder)
        for module, name in ((embeddings, _READ), (final_norm, _WRITE)):
            hooks.remove_hook(module, name)
        if pins:
            reader = _ReadIds(pins)
            hooks.register_hook(embeddings, reader, _READ)
            hooks.register_hook(final_norm, _WriteRows(reader), _WRITE)

    @staticmethod
    def is_written(encoder: nn.Module, pins: Sequence[Pinned]) -> bool:
        """Whether exactly these pins are active."""
        embeddings, final_norm = _places(encoder)
        reader, writer = hooks.find_hook(embeddings, _READ), hooks.find_hook(final_norm, _WRITE)
        if not isinstance(reader, _ReadIds) or not isinstance(writer, _WriteRows):
            return not pins and reader is None and writer is None
        same = len(reader.pins) == len(pins) and all(a is b for a, b in zip(reader.pins, pins, strict=True))
        return same and writer.reader is reader


def _places(encoder: nn.Module) -> tuple[Any, Any]:
    """Where token ids go in and where hidden states come out; both nothing in a module that is no text encoder."""
    root = paths.transformer_root(encoder)
    return getattr(root, "embeddings", None), getattr(root, "final_layer_norm", None)
