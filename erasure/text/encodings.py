"""Cached encodings of prompts by the stock text encoders, made in batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from erasure.backbones import Backbone, Conditioning, TextTower
from erasure.errors import DivergenceError

BATCH = 8
"""Number of prompts encoded at once."""


def require_finite(tower: TextTower, states: Tensor, where: str) -> None:
    """Refuse states of a text encoder that hold NaN or infinity.

    Args:
        tower: The text encoder.
        states: Some of its states, of any shape.
        where: Which states these are, for the message: "for 'a cat'".

    Raises:
        DivergenceError: They hold NaN or infinity.
    """
    if not torch.isfinite(states).all():
        raise DivergenceError(
            f"the {tower.component} gives NaN or infinity {where}: its weights are damaged, or its precision is too "
            "low; load the model again"
        )


class Reader:
    """A cache of prompts' encodings on the CPU.

    Args:
        backbone: Backbone whose text encoders are the stock ones whenever `read` is called.
        batch: Number of prompts encoded at once, which affects the last bits of an encoding.
    """

    def __init__(self, backbone: Backbone, batch: int = BATCH) -> None:
        self.backbone, self.batch = backbone, batch
        self._rows: dict[str, int] = {}
        self._read: list[Conditioning] = []

    @torch.no_grad()
    def read(self, prompts: Sequence[str | None]) -> Reader:
        """Encode the prompts that are not cached yet; give the reader itself."""
        new = [prompt for prompt in dict.fromkeys(text or "" for text in prompts) if prompt not in self._rows]
        self._rows.update({prompt: len(self._rows) + row for row, prompt in enumerate(new)})
        for first in range(0, len(new), self.batch):
            self._read.append(self.backbone.encode(new[first : first + self.batch]).to("cpu"))
        return self

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """Give the encodings of a batch of prompts, on the denoiser's device.

        Args:
            prompts: Prompts; `None` for the null conditioning, see `Backbone.null`.

        Raises:
            KeyError: A prompt is not cached. It is not encoded here, because other encoders may be in force now.
        """
        if len(self._read) > 1:
            self._read = [Conditioning.cat(self._read)]
        rows = torch.tensor([self._rows[prompt or ""] for prompt in prompts])
        conditioning = self._read[0].rows(rows).to(self.backbone.device)
        if None not in prompts:
            return conditioning
        count = len(prompts)
        index = torch.tensor([place + count * (prompt is None) for place, prompt in enumerate(prompts)])
        return Conditioning.cat([conditioning, self.backbone.null(conditioning)]).rows(index.to(self.backbone.device))

    def null(self, count: int) -> Conditioning:
        """Give `count` rows of the null conditioning; see `Backbone.null`."""
        return self([None] * count)
