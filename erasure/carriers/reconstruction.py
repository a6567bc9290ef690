"""Sparse-autoencoder reconstructions in the place of token vectors, as the released code of ItD makes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from erasure.carriers.steps import smooth_step, straight_through

SHARE = 0.1
"""Least width of the curve that gradients see in the place of the gate, as a share of the gate's level."""


class ReconstructionEdit(NamedTuple):
    """The edit of the released code of ItD (Tian et al. 2025).

    The autoencoder's reconstruction takes the place of every token vector, with the chosen latents multiplied by a
    factor, in prompts that this changes much.
    """

    w_enc: Tensor
    """Encoder, `(dim, d_sae)`."""
    b_enc: Tensor
    """Encoder bias, with the dictionary's input offset folded in, `(d_sae,)`."""
    w_dec: Tensor
    """Decoder, `(d_sae, dim)`."""
    b_dec: Tensor
    """Decoder bias, `(dim,)`."""
    k: Tensor
    """Number of latents kept per token, `()` int64."""
    factor: Tensor
    """Factor of each latent, `(d_sae,)`: tau for the chosen ones, 1 for the others."""
    gate: Tensor
    """Smallest mean square of the change, over all tokens and dimensions, that is made, `()`."""
    first: Tensor
    """Position from which on latents are multiplied, `()` int64."""
    end: Tensor
    """Id of the token that ends a prompt, `()` int64."""

    def fits(self) -> bool:
        """Whether the shapes are consistent."""
        dim, d_sae = self.w_enc.shape if self.w_enc.ndim == 2 else (-1, -1)
        return (
            self.w_dec.shape == (d_sae, dim)
            and self.b_enc.shape == self.factor.shape == (d_sae,)
            and self.b_dec.shape == (dim,)
            and all(number.ndim == 0 for number in (self.k, self.gate, self.first, self.end))
            and 1 <= int(self.k) <= d_sae
        )

    @property
    def gates(self) -> Tensor:
        """The threshold of the gate, `(1,)`: one gate for all concepts."""
        return self.gate[None]

    def on(self, device: torch.device) -> PlacedReconstruction:
        """Prepare the edit for a device."""
        return PlacedReconstruction(self, device)


class PlacedReconstruction:
    """A reconstruction edit on a device, in float32.

    Args:
        edit: What to do.
        device: Where.
    """

    def __init__(self, edit: ReconstructionEdit, device: torch.device) -> None:
        e = ReconstructionEdit(*(t.to(device, torch.float32 if t.is_floating_point() else None) for t in edit))
        self.edit, self.device = e, device
        self.k, self.first, self.end = int(e.k), int(e.first), int(e.end)

    def edited(self, x: Tensor) -> Tensor:
        """Replace activations `(batch, tokens, dim)` by the edited reconstruction."""
        before = x @ self.edit.w_enc + self.edit.b_enc
        values, indices = before.topk(self.k, dim=-1)
        latents = torch.zeros_like(before).scatter(-1, indices, values.relu())
        after = torch.arange(x.shape[1], device=x.device) >= self.first
        factor = torch.where(after[:, None], self.edit.factor, torch.ones_like(self.edit.factor))
        return (latents * factor) @ self.edit.w_dec + self.edit.b_dec

    def scores(self, x: Tensor, words: Tensor) -> Tensor:
        """Compute the mean square of the change, `(batch, 1)`, over all tokens with padding."""
        return (self.edited(x) - x).square().mean((1, 2))[:, None]

    def delta(self, x: Tensor, words: Tensor | None, opened_by_others: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the change of activations `(batch, tokens, dim)` and whether the gate is open `(batch, 1)`.

        Args:
            x: Activations.
            words: `(batch, tokens)` bool; the gate is open when nobody knows where words are.
            opened_by_others: `(batch, 1)` bool: whether another text encoder has opened it.
        """
        change = self.edited(x) - x
        if words is None:
            return change, torch.ones(len(x), 1, dtype=torch.bool, device=x.device)
        score = change.square().mean((1, 2))
        opened = score >= self.edit.gate
        if opened_by_others is not None:
            opened = opened | opened_by_others[:, 0]
        on = opened.to(x.dtype)
        if x.requires_grad:
            on = straight_through(on, smooth_step(score, self.edit.gate, SHARE * self.edit.gate.abs()))
        return change * on[:, None, None], opened[:, None]
