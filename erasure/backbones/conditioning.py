"""The conditioning of a denoiser by a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Source = Literal["tokens", "pooled"]
"""Part of a conditioning: the states of all tokens, or one pooled vector of the prompt."""


@dataclass(frozen=True)
class Conditioning:
    """The text conditioning of the denoiser for a batch of prompts; families leave out what they do not use."""

    tokens: Tensor
    """Token states, `(batch, tokens, dim)`."""
    pooled: Tensor | None = None
    """Pooled vectors, `(batch, dim)`."""
    mask: Tensor | None = None
    """Attention mask, `(batch, tokens)`, 1 for tokens that are attended to."""

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.tokens)

    def of(self, source: Source) -> Tensor:
        """Give one part as vectors: `(batch, tokens, dim)`, or `(batch, 1, dim)` for the pooled vector."""
        if source == "tokens":
            return self.tokens
        assert self.pooled is not None, "a layer reads a pooled vector that the family has not"
        return self.pooled[:, None]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """Select rows, as tensors are indexed."""
        return self._each(lambda part: part[index])

    def to(self, device: torch.device | str) -> Conditioning:
        """Move to a device."""
        return self._each(lambda part: part.to(device))

    def repeated(self, count: int) -> Conditioning:
        """Expand one row to `count` rows, without copies."""
        return self._each(lambda part: part.expand(count, *part.shape[1:]))

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches of one family."""
        return Conditioning(
            torch.cat([part.tokens for part in parts]),
            _joined([part.pooled for part in parts]),
            _joined([part.mask for part in parts]),
        )

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        rest = (None if part is None else change(part) for part in (self.pooled, self.mask))
        return Conditioning(change(self.tokens), *rest)


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
