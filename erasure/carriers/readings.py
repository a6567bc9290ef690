"""Filters' and gates' readings of prompts, which are found again by the denoiser's conditioning.

A hook on a text encoder reads every prompt. For filters it encodes the prompt once more with each token masked, and
stores the triggers and the prompt's subspace (`erasure.carriers.filters`); for gates it stores their openness
(`erasure.carriers.permeability`). The denoiser gets states only, so a prompt is recognised by some of their values,
also if it was encoded earlier (`prompt_embeds=`) or with skipped blocks (`clip_skip`). Unknown embeddings are not
changed by filters, and open all gates.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from erasure.carriers import filters, permeability
from erasure.carriers.calls import NamedArguments
from erasure.carriers.filters import PromptFilter
from erasure.carriers.permeability import POOLED, PromptGate
from erasure.interop import hooks, paths, rounds
from erasure.interop.encoders import anatomy_of, norm_of
from erasure.interop.protocols import Arguments, EncoderOutput
from erasure.text.words import word_mask

_HOOK = "erasure_readings"
SAMPLED = 32
"""Number of values of a token's state by which it is recognised."""
REMEMBERED = 512
"""Number of readings that are stored."""
REST, ALL = 1, 2
"""What is projected along with triggers: all tokens behind the first one, or all of the prompt."""
AT_ONCE = 16
"""Number of masked prompts that are encoded at once."""
ALIKE = 0.02
"""Tolerance for half precision, as a share of a token's largest value."""


class Triggers(NamedTuple):
    """The trigger words that a filter found in one prompt."""

    own: Tensor
    """Orthonormal rows that span the prompt's own subspace, `(rank, dim)`."""
    triggers: Tensor
    """Tokens that are triggers, `(tokens,)` bool."""
    text: Tensor
    """Start, words and end of the prompt, without padding, `(tokens,)` bool."""


class Reading(NamedTuple):
    """Result of filters and gates for one prompt."""

    edit: PromptFilter | PromptGate
    """The filter or gate that has read the prompt."""
    keys: tuple[Tensor, ...]
    """Some values of the states that the text encoder gives, of its last block and of earlier ones, `(tokens,
    SAMPLED)` each; or of its pooled vector, `(1, SAMPLED)`."""
    ids: Tensor
    """Token ids of the prompt, `(tokens,)`."""
    read: Triggers | Tensor
    """A filter's triggers, or how far a gate is open for each concept, `(concepts,)`."""


class Change(NamedTuple):
    """The change of one row of the conditioning."""

    edit: PromptFilter
    row: int
    own: Tensor
    triggers: Tensor
    steps: int
    """How many of 50 read it, see `filters.steps`."""


_READINGS: deque[Reading] = deque(maxlen=REMEMBERED)
"""The newest ones, of every text encoder: the thread that draws may not be the one that encodes."""


class _Busy(threading.local):
    """Whether this thread encodes masked prompts."""

    on = False


_BUSY = _Busy()


class _Read(NamedArguments):
    """Hook on a text encoder that runs filters and gates on every prompt that is encoded.

    Args:
        encoder: The text encoder.
        edits: The filters and gates that read.
    """

    def __init__(self, encoder: nn.Module, edits: Sequence[PromptFilter | PromptGate]) -> None:
        super().__init__(encoder)
        self.edits = tuple(edits)
        self.given: dict[str, Any] = {}

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Record the token ids that are encoded."""
        if not _BUSY.on:
            self.given = self.by_name(args, kwargs)
        return args, kwargs

    # Which tokens are masked depends on the prompt, and the network runs again for them.
    @torch.compiler.disable
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Run filters and gates on the encoded prompts."""
        if _BUSY.on:
            return output
        given, self.given = self.given, {}
        ids = given.get("input_ids")
        if ids is not None:
            _BUSY.on = True
            try:
                with torch.no_grad(), rounds.without_sharing():
                    self.read(module, ids, given.get("attention_mask"), output)
            finally:
                _BUSY.on = False
        return output

    def read(self, module: nn.Module, ids: Tensor, mask: Tensor | None, output: EncoderOutput) -> None:
        """Keep a reading of each prompt `(tokens,)` of `ids`."""
        states = _states(paths.transformer_root(module), output)
        vectors = _vectors(output)
        for row, prompt in enumerate(ids):
            pooled: Tensor | None = None
            for edit in self.edits:
                of_vector = isinstance(edit, PromptGate) and edit.source == POOLED
                keys = tuple(_sampled(each[row]) for each in (vectors if of_vector else states))
                reading = next(
                    (one for one in list(_READINGS) if one.edit.equals(edit) and _is_same(one, prompt, keys)), None
                )
                if reading is None:
                    found: Triggers | Tensor
                    if isinstance(edit, PromptGate):
                        found = permeability.permeability(edit, states[0][row], prompt)
                    else:
                        first, end, blank = edit.marks.tolist()
                        words = word_mask(prompt[None].cpu(), end, first)[0]
                        places = [place for place in words.nonzero().flatten().tolist() if prompt[place] != end]
                        if pooled is None:
                            pooled = _pooled(module, prompt, None if mask is None else mask[row], places, blank)
                        found = _triggers(edit, prompt, pooled, words, places)
                    reading = Reading(edit, keys, prompt.cpu(), found)
                # The newest stand last.
                _READINGS.append(reading)


def _states(root: nn.Module, output: EncoderOutput) -> list[Tensor]:
    """List the states that can be in the conditioning, `(prompts, tokens, dim)` each.

    Pipelines that leave blocks out (`clip_skip`) read an earlier block's, with the last norm behind them or without.
    """
    found, inside = [output.last_hidden_state], getattr(output, "hidden_states", None)
    if inside is not None:
        norm = norm_of(root)
        found += [*inside[1:], *(norm(states) for states in inside[1:] if norm is not None)]
    return [states.detach() for states in found]


def _vectors(output: EncoderOutput) -> list[Tensor]:
    """List the pooled vectors that can be in the conditioning, `(prompts, 1, dim)`; none without pooling."""
    found = [getattr(output, name, None) for name in ("pooler_output", "text_embeds")]
    return [vector.detach()[:, None] for vector in found if vector is not None]


def _sampled(states: Tensor) -> Tensor:
    """Sample some values of states `(..., dim)`, in single precision on the CPU."""
    return states.detach()[..., :: max(1, states.shape[-1] // SAMPLED)].float().cpu()


def _is_same(one: Reading, ids: Tensor, keys: Sequence[Tensor]) -> bool:
    """Whether a prompt was read before, of the same text encoder with the same weights."""
    return (
        len(one.keys) == len(keys)
        and torch.equal(one.ids, ids.cpu())
        and all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one.keys, keys, strict=True))
    )


def pooled_vectors(module: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute one vector for each prompt in the space of a text encoder's states, `(prompts, dim)`.

    That is CLIP's state of the end token, and the first token's of T5, which has no vector of its own for that.
    """
    root = paths.transformer_root(module)
    anatomy = anatomy_of(root)
    output = root(ids, attention_mask=mask)
    return output.pooler_output if anatomy is not None and anatomy.causal else output.last_hidden_state[:, 0]


def _pooled(module: nn.Module, ids: Tensor, mask: Tensor | None, places: Sequence[int], blank: int) -> Tensor:
    """Compute pooled vectors of a prompt: of the whole first, then with each place masked, `(1 + places, dim)`."""
    root = paths.transformer_root(module)
    anatomy = anatomy_of(root)
    if anatomy is not None and anatomy.causal and places:
        # What stands behind the end token has no part in it.
        ids, mask = ids[: max(places) + 2], None if mask is None else mask[: max(places) + 2]
    rows = ids.repeat(1 + len(places), 1)
    rows[torch.arange(1, len(rows)), torch.tensor(places, dtype=torch.int64)] = blank
    parts = [
        pooled_vectors(module, part, None if mask is None else mask.expand(len(part), -1))
        for part in rows.split(AT_ONCE)
    ]
    return torch.cat(parts).float()


def _triggers(edit: PromptFilter, ids: Tensor, pooled: Tensor, words: Tensor, places: Sequence[int]) -> Triggers:
    """Find the trigger words of a filter in a prompt."""
    pooled = pooled.cpu()
    found = torch.zeros(len(ids), dtype=torch.bool)
    own = torch.zeros(0, pooled.shape[1])
    if places:
        alpha, (against_own, follows) = float(edit.figures[0]), edit.rules.tolist()
        found[list(places)] = filters.triggers(pooled[1:], pooled[0], edit.basis.cpu(), alpha, bool(against_own))
        if follows and bool(found.any()):
            # Of a causal text encoder only what stands behind a trigger knows of it.
            found[0 if follows == ALL else int(found.nonzero()[0]) :] = True
        own = filters.span(pooled[1:]).float()
    text = words.clone()
    text[: int(edit.marks[0])] = True
    return Triggers(own, found, text)


def opened(conditioning: Tensor | None, gate: PromptGate, row: int) -> Tensor | None:
    """Compute how far a gate is open for a row's prompt, `(concepts,)`; `None` where the prompt is unknown.

    Args:
        conditioning: What the gate reads: tokens `(batch, tokens, dim)`, or pooled vectors `(batch, dim)`.
        gate: The gate.
        row: Index of the row in the batch.
    """
    if conditioning is None:
        return None
    states = conditioning.detach()[row]
    own = (states[None] if gate.source == POOLED else states[gate.places])[:, gate.columns]
    if not bool(own.any()):
        # What a pipeline may tell where no prompt is given.
        return torch.zeros(len(gate.floor), dtype=torch.float64)
    reading = _found(_sampled(own), gate)
    return reading.read if reading is not None and isinstance(reading.read, Tensor) else None


def changes(conditioning: Tensor, edit: PromptFilter, rows: range) -> list[Change]:
    """Find the changes that a filter makes to some rows of the conditioning; unchanged rows are left out.

    Args:
        conditioning: Conditioning tokens, `(batch, tokens, dim)`.
        edit: The filter.
        rows: Indices of the rows that may be changed.
    """
    found = []
    part = conditioning.detach()[:, edit.places, edit.columns]
    for row in rows:
        reading = _found(_sampled(part[row]), edit)
        if reading is None or not isinstance(reading.read, Triggers) or not bool(reading.read.triggers.any()):
            continue
        own, basis = (each.to(part.device, torch.float32) for each in (reading.read.own, edit.basis))
        text = part[row][reading.read.text.to(part.device)].float()
        count = filters.steps(text.cpu(), filters.projected(text, own, basis).cpu(), edit.figures)
        found.append(Change(edit, row, own, reading.read.triggers.to(part.device), count))
    return found


def _found(asked: Tensor, edit: PromptFilter | PromptGate) -> Reading | None:
    """Find the reading of the prompt whose states match sampled values best; the newest of several."""
    limit = ALIKE * asked.abs().amax(-1, keepdim=True)
    best, away = None, torch.inf
    for reading in reversed(list(_READINGS)):
        if not reading.edit.equals(edit):
            continue
        for key in reading.keys:
            if key.shape != asked.shape:
                continue
            gap = (key - asked).abs()
            if bool((gap <= limit).all()) and float(gap.max()) < away:
                best, away = reading, float(gap.max())
        if away == 0:
            break
    return best


def changed(conditioning: Tensor, change: Change, strength: float) -> Tensor:
    """Project one row's triggers, and give the changed conditioning; differentiable."""
    edit = change.edit
    states = conditioning[change.row, edit.places, edit.columns]
    precise = states.float()
    away = filters.projected(precise, change.own, edit.basis.to(states.device, torch.float32)) - precise
    moved = torch.where(change.triggers[:, None], precise + strength * away, precise).to(conditioning.dtype)
    result = conditioning.clone()
    result[change.row, edit.places, edit.columns] = moved
    return result


class Readings:
    """The filters and gates of one text encoder, as a hook."""

    @staticmethod
    def write(encoder: nn.Module, edits: Sequence[PromptFilter | PromptGate]) -> None:
        """Make exactly these filters and gates read a text encoder's prompts; none removes the hook."""
        if Readings.is_written(encoder, edits):
            return
        hooks.remove_hook(encoder, _HOOK)
        if edits:
            hooks.register_hook(encoder, _Read(encoder, edits), _HOOK)

    @staticmethod
    def is_written(encoder: nn.Module, edits: Sequence[PromptFilter | PromptGate]) -> bool:
        """Whether exactly these filters and gates read the prompts."""
        hook = hooks.find_hook(encoder, _HOOK)
        if not edits:
            return hook is None
        if not isinstance(hook, _Read) or not hooks.runs_hook(encoder, _HOOK) or len(hook.edits) != len(edits):
            return False
        return all(one is other for one, other in zip(hook.edits, edits, strict=True))
