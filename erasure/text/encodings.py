"""The encodings of prompts by stock text encoders, made in batches and once each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from erasure.backbones import Backbone, Conditioning

BATCH = 8
"""Prompts encoded at once."""


class Reader:
    """Encodings of prompts, made once each and kept on the CPU.

    Args:
        backbone: With the stock text encoders in force whenever `read` is called.
        batch: Prompts encoded at once. Their number moves the last bits of an encoding.
    """

    def __init__(self, backbone: Backbone, batch: int = BATCH) -> None:
        self.backbone, self.batch = backbone, batch
        self._rows: dict[str, int] = {}
        self._read: list[Conditioning] = []

    @torch.no_grad()
    def read(self, prompts: Sequence[str | None]) -> Reader:
        """Encode those prompts that are not known yet; gives the reader itself."""
        new = [prompt for prompt in dict.fromkeys(text or "" for text in prompts) if prompt not in self._rows]
        self._rows.update({prompt: len(self._rows) + row for row, prompt in enumerate(new)})
        for first in range(0, len(new), self.batch):
            self._read.append(self.backbone.encode(new[first : first + self.batch]).to("cpu"))
        return self

    def __call__(self, prompts: Sequence[str | None]) -> Conditioning:
        """Encodings of a batch of prompts, on the denoiser's device.

        Args:
            prompts: `None` for what the denoiser is told where no prompt is given; see `Backbone.null`.

        Raises:
            KeyError: One has not been read. To read it now could be too late, with other encoders in force.
        """
        if len(self._read) > 1:
            self._read = [Conditioning.cat(self._read)]
        rows = torch.tensor([self._rows[prompt or ""] for prompt in prompts])
        told = self._read[0].rows(rows).to(self.backbone.device)
        if None not in prompts:
            return told
        count = len(prompts)
        index = torch.tensor([place + count * (prompt is None) for place, prompt in enumerate(prompts)])
        return Conditioning.cat([told, self.backbone.null(told)]).rows(index.to(self.backbone.device))

    def null(self, count: int) -> Conditioning:
        """What the denoiser is told `count` times where no prompt is given; see `Backbone.null`."""
        return self([None] * count)
