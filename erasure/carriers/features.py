"""Edits of sparse-autoencoder latents in a text tower's residual stream, behind a gate for each concept.

For a token vector `x` at the output of a block, with the latents `z_i` of some features (JumpReLU) and their decoder
rows `d_i`, the edited vector is

    x' = x + sum_i g_i (gain_i z_i + offset_i [z_i > 0]) d_i

The part of `x` that the autoencoder does not reconstruct stays, so nothing changes where no latent fires. `g_i` is 1
when the gate of a concept with feature `i` is open: when a logistic score of the latents reaches the concept's
threshold at some word. The score uses words and the end token only, so it does not depend on padding or on the rest of
the batch; below all thresholds the output equals the input, bit for bit.

Where an erasure edits several text encoders, each has its own gates, and an open gate also opens those of the same
concept in the others, prompt by prompt (`erasure.interop.rounds`), in a pipeline's `encode_prompt` and in
`Backbone.encode`. A text encoder that is called by itself uses its own gates only.

Gates and thresholds are step functions. Gradients use smooth curves instead (`erasure.carriers.steps`), so that
gradient-based attacks can find what opens or closes a gate; the output is not changed by a bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from erasure.carriers.latents import alike, fired, product
from erasure.carriers.reconstruction import PlacedReconstruction, ReconstructionEdit
from erasure.carriers.remembered import Edited
from erasure.carriers.steps import seeing_jump, smooth_step, straight_through
from erasure.carriers.terms import same_terms
from erasure.carriers.token_ids import current_ids, keep_ids, keeps_ids
from erasure.interop import hooks, paths, rounds
from erasure.interop.hooks import ModelHook
from erasure.text.words import word_mask

_EDIT = "erasure_features_edit"
LOGIT = 1.0
"""Smallest width of the smooth curve of a gate in gradients, in units of logistic scores."""
MEMORY = 8
"""Number of inputs whose edit a block caches, so that a repeated prompt is not scored again."""


class FeatureEdit(NamedTuple):
    """The edit of latents at one block. Latents that concepts share are stored, and changed, once."""

    w_enc: Tensor
    """Encoder, `(dim, features)`."""
    b_enc: Tensor
    """Encoder bias, `(features,)`: a latent is `x @ w_enc + b_enc` where that is above the threshold, else 0."""
    w_dec: Tensor
    """Decoder, `(features, dim)`."""
    threshold: Tensor
    """Thresholds, `(features,)`."""
    gain: Tensor
    """Gain, `(features,)`: -1 removes a latent, `tau - 1` multiplies it by tau."""
    offset: Tensor
    """Offset, `(features,)`, added where the latent fires, so that gain -1 and offset -c clamp it to -c."""
    edits: Tensor
    """Pairs of concept and feature that is edited when the concept's gate is open, `(2, n)` int64."""
    votes: Tensor
    """Pairs of concept and feature in the concept's score, `(2, n)` int64."""
    weight: Tensor
    """Weights of these pairs, `(n,)`. The score of a token is `sum weight z + bias`, a logit."""
    bias: Tensor
    """Bias of each concept's score, `(concepts,)`."""
    gate: Tensor
    """Smallest score, as a logit, that opens a concept's gate, `(concepts,)`."""
    probe: Tensor
    """Weights of a linear probe of the activations, whose score is `x @ probe + probe_bias`, `(dim, concepts)`."""
    probe_bias: Tensor
    """Bias of each concept's probe, `(concepts,)`."""
    probe_gate: Tensor
    """Smallest score of the probe, as a logit, that opens a concept's gate, `(concepts,)`."""
    filler: Tensor
    """States that replace tokens whose own score opens the gate, and the end token and padding after them, instead
    of a change of latents, `(tokens, dim)`; `(0, dim)` when latents are changed."""
    rule: Tensor
    """Score that opens the gate, `()` int64: 0 for that of the latents, 1 for that of the probe."""
    local: Tensor
    """Edited tokens, `()` int64: 1 for those whose own score opens the gate, 0 for all tokens of the prompt."""
    first: Tensor
    """Position of the first word, `()` int64; tokens before it do not depend on the prompt."""
    end: Tensor
    """Id of the end token, `()` int64; what follows its first occurrence is padding."""

    def fits(self) -> bool:
        """Whether the shapes are consistent, and every pair has a valid concept and feature."""
        dim, features = self.w_enc.shape if self.w_enc.ndim == 2 else (-1, -1)
        concepts = self.gate.numel()
        return (
            self.w_dec.shape == (features, dim)
            and all(v.shape == (features,) for v in (self.b_enc, self.threshold, self.gain, self.offset))
            and all(v.shape == (concepts,) for v in (self.gate, self.bias, self.probe_gate, self.probe_bias))
            and self.probe.shape == (dim, concepts)
            and all(p.ndim == 2 and p.shape[0] == 2 for p in (self.edits, self.votes))
            and self.weight.shape == self.votes.shape[1:]
            and self.filler.ndim == 2
            and self.filler.shape[1] == dim
            and all(number.ndim == 0 for number in (self.rule, self.local, self.first, self.end))
            and all(_within(pairs, concepts, features) for pairs in (self.edits, self.votes))
        )

    @property
    def gates(self) -> Tensor:
        """Smallest score that opens each gate, `(concepts,)` in 0-1."""
        return torch.where(self.rule == 1, self.probe_gate, self.gate).double().sigmoid()

    def on(self, device: torch.device, dtype: torch.dtype = torch.float32) -> GatedEdit:
        """Prepare the edit for a device."""
        return GatedEdit(self, device, dtype)


class GatedEdit:
    """A feature edit on a device, with the pairs as matrices.

    Args:
        edit: The edit.
        device: Device.
        dtype: Precision of the arithmetic.
    """

    def __init__(self, edit: FeatureEdit, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        e = FeatureEdit(*(t.to(device, dtype if t.is_floating_point() else None) for t in edit))
        self.edit, self.device = e, device
        concepts, features = len(e.gate), len(e.b_enc)
        # A latent is read once, however many features write where it fires.
        known, self.latent = alike(torch.cat([e.w_enc, e.b_enc[None], e.threshold[None]]))
        self.w_enc, self.b_enc, self.threshold = (
            (e.w_enc, e.b_enc, e.threshold)
            if len(known) == features
            else (e.w_enc[:, known].contiguous(), e.b_enc[known], e.threshold[known])
        )
        self.belongs = torch.zeros(concepts, features, device=device, dtype=dtype)
        self.belongs[e.edits[0], e.edits[1]] = 1
        votes = torch.zeros(features, concepts, device=device, dtype=dtype)
        votes[e.votes[1], e.votes[0]] = e.weight
        self.votes = votes if len(known) == features else votes.new_zeros(len(known), concepts)
        if self.votes is not votes:
            self.votes.index_add_(0, self.latent, votes)
        # Read once: what is asked of a tensor on every call would break a compiled graph.
        self.by_probe, self.local = bool(e.rule == 1), bool(e.local == 1)
        self.first, self.end = int(e.first), int(e.end)
        self.gate = e.probe_gate if self.by_probe else e.gate
        self.level = self.threshold.clamp(min=0)
        self.filler = e.filler if len(e.filler) else None

    def latents(self, x: Tensor) -> Tensor:
        """Compute the latents `(..., latents)` of activations `(..., dim)`."""
        before = self.before(x)
        return torch.where(before > self.level, before, torch.zeros_like(before))

    def before(self, x: Tensor) -> Tensor:
        """Compute the pre-activations `(..., latents)` of activations `(..., dim)`.

        A latent is its pre-activation where that is above its threshold, else 0.
        """
        return x @ self.w_enc + self.b_enc

    def logits(self, x: Tensor, latents: Tensor, by_probe: bool, which: Tensor | None = None) -> Tensor:
        """Compute the logit of each concept at each token, `(batch, tokens, concepts)`.

        Args:
            x: Activations.
            latents: Latents of the activations, `(batch, tokens, given)`.
            by_probe: Use the probe instead of the latents.
            which: Places of those latents among all; they are all of them when left out.
        """
        if by_probe:
            return x @ self.edit.probe + self.edit.probe_bias
        return product(latents, self.votes, which) + self.edit.bias

    def scores(self, x: Tensor, words: Tensor, by_probe: bool | None = None) -> Tensor:
        """Compute the score of each concept in each prompt, `(batch, concepts)` in 0-1.

        Args:
            x: Activations `(batch, tokens, dim)`.
            words: `(batch, tokens)` bool, see `word_mask`.
            by_probe: Use the probe, or the latents; the edit's rule when left out.
        """
        logits = self.logits(x, self.latents(x), self.by_probe if by_probe is None else by_probe)
        return logits.masked_fill(~words[..., None], -torch.inf).amax(1).double().sigmoid()

    def delta(self, x: Tensor, words: Tensor | None, opened_by_others: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Give the change of activations `(batch, tokens, dim)` and the gates that are open `(batch, concepts)`.

        Args:
            x: Activations.
            words: Words, `(batch, tokens)` bool, see `word_mask`; every gate is open everywhere when unknown.
            opened_by_others: Gates that other text encoders have opened, `(batch, concepts)` bool.
        """
        latents, fires, which = fired(self.before(x), self.level, whole=x.requires_grad)
        counted = seeing_jump(latents, self.before(x), self.threshold) if x.requires_grad else latents
        logits = self.logits(x, counted, self.by_probe, which)
        own = logits >= self.gate
        if words is None:
            opened = where = torch.ones_like(own)
        else:
            opened = (own & words[..., None]).any(1, keepdim=True)
            if opened_by_others is not None:
                if self.local:
                    # If no word reaches the threshold itself, the nearest one is edited.
                    score = logits.masked_fill(~words[..., None], -torch.inf)
                    own = own | (opened_by_others[:, None] & ~opened & (score == score.amax(1, keepdim=True)))
                opened = opened | opened_by_others[:, None]
            where = own & opened if self.local else opened
        eager = not (x.requires_grad or torch.compiler.is_compiling())
        if eager and not opened.any():
            return torch.zeros_like(x), opened.any(1)
        smooth = self.smooth(logits, words) if words is not None and x.requires_grad else None
        if self.filler is not None:
            flagged = where.any(-1)
            if words is not None:
                # The end token and the padding summarise the whole prompt, including the concept.
                tail = words.flip(1).cumsum(1).flip(1) <= 1
                flagged = flagged | (opened.any(-1) & tail)
            on = flagged[..., None].to(x.dtype)
            if smooth is not None:
                whole, own_share = (share.amax(-1) for share in smooth)
                on = straight_through(on, torch.where(tail, whole, own_share)[..., None])
            # After the last token of the filler its padding is repeated.
            place = torch.arange(x.shape[1], device=x.device).clamp(max=len(self.filler) - 1)
            change = on * (self.filler[place] - x)
        else:
            on = product(where.to(x.dtype), self.belongs).clamp(max=1)
            if smooth is not None:
                on = straight_through(on.expand(*x.shape[:2], -1), smooth[self.local] @ self.belongs)
            change = self.written(on, latents, fires, which)
        after = torch.arange(x.shape[1], device=x.device) >= self.first
        return change * after[:, None], opened.any(1)

    def written(self, on: Tensor, latents: Tensor, fires: Tensor, which: Tensor | None) -> Tensor:
        """Compute the change by the features, `(batch, tokens, dim)`.

        Args:
            on: Strength of each feature's edit, `(batch, tokens or 1, features)`.
            latents: `(batch, tokens, given)`.
            fires: 1 where a latent fires, else 0, shaped the same.
            which: `(given,)`: places of these among all latents; they are all of them when left out.
        """
        gain, offset, features = self.edit.gain, self.edit.offset, which
        if len(self.level) < len(gain):
            # Several features of one latent: those are looked at that are edited and whose latent fires.
            latent = self.latent
            if not (latents.requires_grad or torch.compiler.is_compiling()):
                there = torch.arange(len(self.level), device=latent.device) if which is None else which
                place = torch.full_like(self.level, -1, dtype=torch.int64)
                place[there] = torch.arange(len(there), device=latent.device)
                features = ((place[latent] >= 0) & on.flatten(0, -2).any(0)).nonzero()[:, 0]
                latent = place[latent[features]]
            latents, fires = latents[..., latent], fires[..., latent]
        if features is not None:
            on, gain, offset = on[..., features], gain[features], offset[features]
        return product(on * (gain * latents + offset * fires), self.edit.w_dec, features)

    def smooth(self, logits: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Give how far each gate is open for gradients: in a prompt as a whole, and at each of its tokens.

        Args:
            logits: `(batch, tokens, concepts)`.
            words: `(batch, tokens)` bool.

        Returns:
            Two tensors `(batch, tokens, concepts)` in 0-1.
        """
        strongest = logits.masked_fill(~words[..., None], -torch.inf).amax(1, keepdim=True)
        prompt, token = (smooth_step(score, self.gate, LOGIT) for score in (strongest, logits))
        return prompt.expand_as(token), token


BlockEdit = FeatureEdit | ReconstructionEdit
"""An edit of one block's output."""


class Term(NamedTuple):
    """An edit of one block in force."""

    strength: float
    """Factor of its change."""
    edit: BlockEdit
    """The edit."""
    shared: str = ""
    """Name by which several text encoders share open gates; empty for no sharing."""


Terms = Sequence[Term | tuple[float, BlockEdit]]
"""Edits of one block, which are added."""


def _within(pairs: Tensor, concepts: int, features: int) -> bool:
    limits = torch.tensor([[concepts], [features]])
    return bool(((pairs >= 0) & (pairs < limits)).all())


class _EditBlock(ModelHook):
    """Hook on a block that edits its output; differentiable, so that attacks can use gradients through it."""

    def __init__(self, terms: Terms) -> None:
        super().__init__()
        self.terms = tuple(Term(*term) for term in terms)
        self._gates = [term.edit.gates.numel() for term in self.terms]
        self._placed: tuple[GatedEdit | PlacedReconstruction, ...] = ()
        self._memory: list[Edited] = []

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        states = output[0] if isinstance(output, tuple) else output
        ids = current_ids(*states.shape[:2])
        opened_by_others = tuple(
            rounds.opened_by_others(term.shared, self, len(states), gates) if term.shared else None
            for term, gates in zip(self.terms, self._gates, strict=True)
        )
        fresh = torch.is_grad_enabled() or torch.compiler.is_compiling()
        edited = (self.edit if fresh else self.recall)(states, ids, opened_by_others)
        for term, opened in zip(self.terms, edited.opened, strict=True):
            if term.shared:
                rounds.share_opened(term.shared, self, opened)
        return (edited.output, *output[1:]) if isinstance(output, tuple) else edited.output

    def place(self, device: torch.device) -> None:
        """Move the tensors to a device."""
        if device.type != "meta":
            self._placed = tuple(term.edit.on(device) for term in self.terms)

    def recall(self, states: Tensor, ids: Tensor | None, opened_by_others: tuple[Tensor | None, ...]) -> Edited:
        """Edit `states`, or give the cached result."""
        for known in self._memory:
            if known.is_of(states, ids, opened_by_others):
                return known
        edited = self.edit(states, ids, opened_by_others)
        self._memory = [edited, *self._memory[: MEMORY - 1]]
        return edited

    def edit(self, states: Tensor, ids: Tensor | None, opened_by_others: tuple[Tensor | None, ...]) -> Edited:
        """Edit `(batch, tokens, dim)`, in the dtype it came in."""
        if not self._placed or self._placed[0].device != states.device:
            self.place(states.device)
        x = states.float()
        change, touched = torch.zeros_like(x), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        gates = []
        for term, edit, others in zip(self.terms, self._placed, opened_by_others, strict=True):
            # Without ids the words are unknown, so every gate opens.
            words = None if ids is None else word_mask(ids.to(x.device), edit.end, edit.first)
            delta, opened = edit.delta(x, words, None if others is None else others.to(x.device))
            change, touched = change + term.strength * delta, touched | opened.any(-1)
            gates.append(opened)
        edited = (x + change).to(states.dtype)
        chosen = torch.where(touched[:, None, None], edited, states)
        # Prompts with closed gates keep every bit, and yet gradients see the change by an open gate.
        chosen = straight_through(chosen, edited) if states.requires_grad else chosen
        return Edited(states, ids, opened_by_others, chosen, tuple(gates))


class EditedFeatures:
    """The feature edits of one text encoder as hooks on its blocks."""

    @staticmethod
    def write(encoder: nn.Module, terms: Mapping[str, Terms]) -> None:
        """Make exactly these edits active, by block path; none removes the hooks."""
        if EditedFeatures.is_written(encoder, terms):
            return
        for module in EditedFeatures._hooked(encoder):
            hooks.remove_hook(module, _EDIT)
        keep_ids(encoder, _EDIT, bool(terms))
        for path, edits in terms.items():
            block = paths.transformer_root(encoder).get_submodule(path)
            hook = _EditBlock(edits)
            hook.place(next(block.parameters()).device)
            hooks.register_hook(block, hook, _EDIT)

    @staticmethod
    def is_written(encoder: nn.Module, terms: Mapping[str, Terms]) -> bool:
        """Whether exactly these edits are active."""
        hooked = EditedFeatures._hooked(encoder)
        if not terms:
            return not hooked
        root = paths.transformer_root(encoder)
        blocks = {id(root.get_submodule(path)): edits for path, edits in terms.items()}
        if {id(module) for module in hooked} != set(blocks) or not keeps_ids(encoder, _EDIT):
            return False
        for module in hooked:
            hook, edits = hooks.find_hook(module, _EDIT), [Term(*term) for term in blocks[id(module)]]
            if not isinstance(hook, _EditBlock) or not hooks.runs_hook(module, _EDIT):
                return False
            if not same_terms(hook.terms, edits):
                return False
        return True

    @staticmethod
    def _hooked(encoder: nn.Module) -> list[nn.Module]:
        """List the modules with one of our hooks."""
        every = paths.transformer_root(encoder).modules()
        return [module for module in every if hooks.find_hook(module, _EDIT) is not None]
