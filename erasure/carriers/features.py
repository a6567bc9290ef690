"""Edits of sparse-autoencoder latents in a text tower's residual stream, behind a gate for each concept.

For a token vector `x` at the output of a block, with the latents `z_i` of some features (JumpReLU) and their decoder
rows `d_i`, the edited vector is

    x' = x + sum_i g_c(i) (gain_i z_i + offset_i [z_i > 0]) d_i

What the autoencoder does not explain stays, so nothing changes where nothing fires. `g_c` is 1 when concept `c` is in
the prompt: when on some word enough of the concept's features fire together, `max over words of
sum_{i of c} vote_i min(z_i / level_i, 1)` reaching the concept's threshold. The score looks at words and the end token
only, so it does not depend on padding or on what else is in the batch; below all thresholds the output is the input,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from diffusers import HookRegistry
from diffusers.hooks import ModelHook
from torch import Tensor, nn

from erasure import modules

_READ, _EDIT = "erasure_features_read", "erasure_features_edit"


class FeatureEdit(NamedTuple):
    """What becomes of some latents at one block."""

    w_enc: Tensor
    """`(dim, features)`."""
    b_enc: Tensor
    """`(features,)`: a latent is `x @ w_enc + b_enc` where that is above the threshold, else 0."""
    w_dec: Tensor
    """`(features, dim)`."""
    threshold: Tensor
    """`(features,)`."""
    gain: Tensor
    """`(features,)`: -1 takes a latent away, `tau - 1` multiplies it by tau."""
    offset: Tensor
    """`(features,)`: added where the latent fires, so gain -1 and offset -c clamp it to -c."""
    concept: Tensor
    """`(features,)` int64: which concept each feature belongs to."""
    level: Tensor
    """`(features,)`: what a latent usually reaches where the concept is."""
    vote: Tensor
    """`(features,)`: weight of each feature in the score of its concept; they add up to 1 for each concept."""
    gate: Tensor
    """`(concepts,)`: the least score that opens a concept's gate, 0-1."""
    end: Tensor
    """`()` int64: the token that ends a prompt; what follows its first place is padding."""

    def latents(self, x: Tensor) -> Tensor:
        """`(..., features)` of activations `(..., dim)`."""
        before = x @ self.w_enc + self.b_enc
        return torch.where((before > self.threshold) & (before > 0), before, torch.zeros_like(before))

    def scores(self, latents: Tensor, words: Tensor) -> Tensor:
        """How surely each concept is in each prompt, `(batch, concepts)` in 0-1.

        Args:
            latents: `(batch, tokens, features)`.
            words: `(batch, tokens)` bool, see `word_mask`.
        """
        present = latents.new_zeros((*latents.shape[:2], len(self.gate)))
        present = present.index_add(2, self.concept, self.vote * (latents / self.level).clamp(max=1))
        return (present * words[..., None]).amax(1)

    def delta(self, x: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to activations `(batch, tokens, dim)`, and in which prompts a gate is open `(batch,)`."""
        latents = self.latents(x)
        opened = self.scores(latents, words) >= self.gate
        change = self.gain * latents + self.offset * (latents > 0)
        return (change * opened[:, None, self.concept]) @ self.w_dec, opened.any(1)

    def fits(self) -> bool:
        """Whether the shapes go together and every feature belongs to a concept."""
        dim, features = self.w_enc.shape if self.w_enc.ndim == 2 else (-1, -1)
        vectors = (self.b_enc, self.threshold, self.gain, self.offset, self.concept, self.level, self.vote)
        return (
            self.w_dec.shape == (features, dim)
            and all(vector.shape == (features,) for vector in vectors)
            and self.gate.ndim == 1
            and self.end.ndim == 0
            and bool(((self.concept >= 0) & (self.concept < len(self.gate))).all())
        )

    def to(self, device: torch.device) -> FeatureEdit:
        """In float32 on a device."""
        return FeatureEdit(*(t.to(device, torch.float32 if t.is_floating_point() else None) for t in self))


def word_mask(ids: Tensor, end: Tensor) -> Tensor:
    """Positions of words and of the first end token, `(batch, tokens)` bool: no start token, no padding.

    Args:
        ids: `(batch, tokens)`.
        end: `()`, the end token.
    """
    ends = (ids == end).long()
    mask = (ends.cumsum(1) - ends) == 0
    mask[:, 0] = False
    return mask


Terms = list[tuple[float, FeatureEdit]]
"""(strength, edit) pairs of one block."""


class _ReadIds(ModelHook):
    """On the token embedding: keeps the token ids of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: Tensor | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0] if args else None
        return args, kwargs


class _EditBlock(ModelHook):
    """On a block: edits its output. Differentiable, so that an attack can see through it."""

    def __init__(self, reader: _ReadIds, terms: Sequence[tuple[float, FeatureEdit]]) -> None:
        super().__init__()
        self.reader, self.terms = reader, tuple(terms)
        self._placed: tuple[FeatureEdit, ...] = ()

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        edited = self.edit(states)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    def edit(self, states: Tensor) -> Tensor:
        """`(batch, tokens, dim)`, in the dtype it came in."""
        if not self._placed or self._placed[0].w_enc.device != states.device:
            self._placed = tuple(edit.to(states.device) for _, edit in self.terms)
        x = states.float()
        change, touched = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for (strength, _), edit in zip(self.terms, self._placed, strict=True):
            delta, opened = edit.delta(x, self.words(states, edit))
            change, touched = change + strength * delta, touched | opened
        # The start token never depends on the prompt.
        change = torch.cat([torch.zeros_like(change[:, :1]), change[:, 1:]], 1)
        return torch.where(touched[:, None, None], (x + change).to(states.dtype), states)

    def words(self, states: Tensor, edit: FeatureEdit) -> Tensor:
        """Which positions the gate looks at; all but the first when the caller brought embeddings, not tokens."""
        ids = self.reader.ids
        if ids is not None and ids.shape == states.shape[:2]:
            return word_mask(ids, edit.end)
        mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        mask[:, 0] = False
        return mask


class EditedFeatures:
    """The feature edits of one text encoder as hooks on its blocks."""

    @staticmethod
    def write(encoder: nn.Module, terms: Mapping[str, Terms]) -> None:
        """Make exactly these edits active, by block path; none removes the hooks."""
        if EditedFeatures.is_written(encoder, terms):
            return
        for module, name in EditedFeatures._hooked(encoder):
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(name)
        if terms:
            root = modules.transformer_root(encoder)
            reader = _ReadIds()
            modules.register_hook(root.get_submodule("embeddings"), reader, _READ)
            for path, edits in terms.items():
                modules.register_hook(root.get_submodule(path), _EditBlock(reader, edits), _EDIT)

    @staticmethod
    def is_written(encoder: nn.Module, terms: Mapping[str, Terms]) -> bool:
        """Whether exactly these edits are active."""
        found = {id(module): modules.find_hook(module, name) for module, name in EditedFeatures._hooked(encoder)}
        root = modules.transformer_root(encoder)
        if not terms:
            return not found
        reader = found.pop(id(root.get_submodule("embeddings")), None)
        for path, edits in terms.items():
            hook = found.pop(id(root.get_submodule(path)), None)
            if not isinstance(hook, _EditBlock) or hook.reader is not reader or len(hook.terms) != len(edits):
                return False
            if any(a[0] != b[0] or a[1] is not b[1] for a, b in zip(hook.terms, edits, strict=True)):
                return False
        return not found

    @staticmethod
    def _hooked(encoder: nn.Module) -> list[tuple[nn.Module, str]]:
        """Every module that carries one of our hooks, with the hook's name."""
        every = list(modules.transformer_root(encoder).modules())
        return [(m, name) for m in every for name in (_READ, _EDIT) if modules.find_hook(m, name) is not None]
