"""Memory of the text encoders' outputs under the current erasures, so that the denoiser's guard recognises them."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from erasure.backbones import TextTower
from erasure.backbones.base import TowerSlice
from erasure.interop import hooks, paths
from erasure.interop.encoders import anatomy_of, block_of, blocks_of
from erasure.interop.hooks import ModelHook
from erasure.interop.protocols import Arguments
from erasure.state import ComponentState, Locked

_ENCODINGS, _OUTPUT = "erasure_encodings", "erasure_block_output"
SAMPLED, REMEMBERED = 8, 4096
"""Number of values of a token's encoding by which it is recognised, and number of remembered prompts."""
AT_ONCE = 4
"""Number of different conditioning tensors in turn while one image is sampled, because guidance may use separate
passes."""


class Known(threading.local):
    """State of this thread's checks."""

    def __init__(self) -> None:
        self.quiet = False
        """Whether checks are off."""
        self.calling = False
        """Whether this thread is inside of a call whose arguments have been checked."""
        self.admitted: tuple[Locked, ...] = ()
        """Locks of the pipelines whose calls are running."""
        self.skipped = 0
        """Number of blocks that a call of the final norm skips."""
        self.checked: deque[tuple[weakref.ref[Tensor], Encodings]] = deque(maxlen=AT_ONCE)
        """Last conditioning tensors of the denoiser, with the encodings in which they were searched."""


KNOWN = Known()


@contextmanager
def unguarded() -> Iterator[None]:
    """Switch this thread's checks off inside of the block, for passes that only measure."""
    before, KNOWN.quiet = KNOWN.quiet, True
    try:
        yield
    finally:
        KNOWN.quiet = before


@contextmanager
def admitted(locked: Locked) -> Iterator[None]:
    """Let this thread run locked networks inside of the block, in a call that the lock has checked."""
    before, KNOWN.admitted = KNOWN.admitted, (*KNOWN.admitted, locked)
    try:
        yield
    finally:
        KNOWN.admitted = before


def is_admitted(locked: Locked) -> bool:
    """Whether this thread is inside of a call that a lock has checked."""
    return locked in KNOWN.admitted


class Encodings:
    """The outputs of text encoders under the current erasures, recognised by some of their values.

    Copies of a pipeline share this object, so each recognises the encodings of the other.

    Args:
        erasures: Names and strengths of those erasures.
        tokens: Slices of the denoiser's tokens with each text encoder's states.
        pooled: Slices of the denoiser's pooled vector with each text encoder's.
        free: Entry of `tokens` whose text encoder has a variable length, if any.
    """

    def __init__(
        self,
        erasures: Iterable[tuple[str, float]],
        tokens: Iterable[TowerSlice],
        pooled: Iterable[TowerSlice],
        free: TowerSlice | None,
    ) -> None:
        self.erasures, self.tokens, self.pooled, self.free = tuple(erasures), tuple(tokens), tuple(pooled), free
        self.rows: deque[tuple[int, Tensor]] = deque(maxlen=REMEMBERED)
        """Each with the number of blocks that it left the text encoder before the one that the denoiser reads."""
        self.blind = False
        """Whether an encoder has been compiled, inside of which nothing can be taken note of."""

    def __deepcopy__(self, memo: dict[int, object]) -> Encodings:
        """Give the same object: see the class."""
        return self

    def remember(self, states: Tensor, skipped: int = 0) -> None:
        """Remember encodings `(batch, tokens, dim)`, or pooled vectors `(batch, dim)`."""
        states = states[:, None] if states.ndim == 2 else states
        self.rows.extend((skipped, row) for row in _sampled(states.detach()).cpu())

    def skipped(self, conditioning: Tensor, components: Collection[str]) -> int | None:
        """Find how many blocks of the text encoders were skipped in the denoiser's conditioning.

        Args:
            conditioning: Conditioning: tokens `(batch, tokens, dim)`, or pooled vectors `(batch, dim)`.
            components: Text encoders whose part is checked.

        Returns:
            0 for the pipeline's default; `None` where a part is not from remembered encodings.
        """
        written, conditioning = (
            (self.tokens, conditioning) if conditioning.ndim == 3 else (self.pooled, conditioning[:, None])
        )
        parts = [conditioning[:, part.places, part.columns] for part in written if part.component in components]
        found = [self._skipped(part) for part in parts]
        counts = [count for count in found if count is not None]
        return None if len(counts) < len(found) else max(counts, key=abs, default=0)

    def _skipped(self, states: Tensor) -> int | None:
        """See `skipped`, of encodings `(batch, tokens, dim)` that are those of one encoder but for a cast.

        A long prompt is encoded in chunks that are put behind one another, with or without the start and the end of
        each, so tokens are looked for in all that is known, not whole prompts. Rows of zeros are no prompt's.
        """
        if self.blind:
            return 0
        asked = _sampled(states.detach()).cpu()
        asked = asked[asked.abs().amax((1, 2)) > 0]
        known: dict[int, list[Tensor]] = {0: []}
        for skipped, row in list(self.rows):
            if row.shape[1] == asked.shape[2]:
                known.setdefault(skipped, []).append(row)
        if not len(asked):
            return None
        counts = [
            next((skipped for skipped, rows in known.items() if _is_made_of(tokens, rows)), None) for tokens in asked
        ]
        return None if None in counts else max((count for count in counts if count is not None), key=abs)


def _is_made_of(asked: Tensor, known: Sequence[Tensor]) -> bool:
    """Whether every token `(tokens, values)` of an encoding is one of known encodings, the newest looked at first."""
    left = asked
    for row in reversed(known):
        away = (row[None] - left[:, None]).abs().amax(-1).amin(1)
        left = left[away > 0.02 * left.abs().amax(1)]
        if not len(left):
            return True
    return False


def _sampled(states: Tensor) -> Tensor:
    """Some values of each token, `(batch, tokens, values)`."""
    return states[..., :: max(1, states.shape[-1] // SAMPLED)].float()


class _Output(ModelHook):
    """On a block: knows what came out of it last, by which a pipeline's own call of the last norm is understood."""

    def __init__(self) -> None:
        super().__init__()
        self.last: weakref.ref[Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the output, which belongs to a pass that no copy is in; and a reference cannot be pickled."""
        return {**vars(self), "last": None}

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Take note, but inside of a compiled graph."""
        if not torch.compiler.is_compiling():
            self.last = weakref.ref(output[0] if isinstance(output, tuple) else output)
        return output


class _Remember(ModelHook):
    """Where states leave a text encoder: on its final norm, which pipelines also call by itself, or on its blocks.

    Args:
        encodings: What is taken note of.
        skipped: Blocks between this one and the one that the denoiser reads.
        blocks: Ahead of the final norm: the hooks on the blocks, first to last.
    """

    def __init__(self, encodings: Encodings, skipped: int = 0, blocks: Sequence[_Output] = ()) -> None:
        super().__init__()
        self.encodings, self.skipped, self.blocks = encodings, skipped, list(blocks)

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Arguments:
        """Find out which block's output the final norm is given."""
        given = args[0] if args else None
        behind = [count for count, block in enumerate(reversed(self.blocks)) if block.last and block.last() is given]
        KNOWN.skipped = behind[0] if behind else self.skipped
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        """Take note of what comes out, but of canaries."""
        if torch.compiler.is_compiling():
            self.encodings.blind = True
        elif not KNOWN.quiet:
            self.encodings.remember(output[0] if isinstance(output, tuple) else output, KNOWN.skipped)
        return output


def forget(tower: TextTower) -> None:
    """Remove the hooks of a text encoder."""
    for module in {*tower.leaving, *tower.blocks, tower.pooling}:
        hooks.remove_hook(module, _ENCODINGS)
        hooks.remove_hook(module, _OUTPUT)


def watch(tower: TextTower, encodings: Encodings) -> None:
    """Put hooks on a text encoder that remember its outputs."""
    blocks, outputs = tower.blocks, []
    if tower.consumed == -1 and tower.causal:
        outputs = [_Output() for _ in blocks]
        for block, hook in zip(blocks, outputs, strict=True):
            hooks.register_hook(block, hook, _OUTPUT)
    read = len(blocks) + tower.consumed
    for module in tower.leaving:
        own = read - blocks.index(module) if module in blocks else 0
        hooks.register_hook(module, _Remember(encodings, own, outputs), _ENCODINGS)
    if tower.pooled and tower.pooling not in tower.leaving:
        hooks.register_hook(tower.pooling, _Remember(encodings), _ENCODINGS)


def skipped_blocks(states: Iterable[ComponentState], encodings: Encodings, conditioning: Tensor) -> int | None:
    """See `Encodings.skipped`, of the text encoders that are erased; 0 where none is."""
    erased = [state.component for state in states if state.is_text_encoder and state.in_force()]
    return encodings.skipped(conditioning, erased) if erased else 0


def blocks_read(components: Mapping[str, nn.Module]) -> dict[str, int]:
    """Number of the block whose states a denoiser reads, by CLIP text encoder: the only ones with a `clip_skip`."""
    roots = {name: paths.transformer_root(module) for name, module in components.items()}
    anatomies = {name: anatomy_of(root) for name, root in roots.items()}
    clips = {name: len(blocks_of(roots[name])) for name, each in anatomies.items() if each is not None and each.causal}
    # Of several CLIPs side by side pipelines read the last state but one.
    unread = int(len(clips) > 1)
    return {name: blocks - 1 - unread for name, blocks in clips.items()}


def unfit_for_skipping(states: Iterable[ComponentState], read: Mapping[str, int], skip: int) -> str:
    """Name the erasures that act less, or differently, when the last blocks of CLIP are skipped (`clip_skip`).

    These are edits of the denoiser, which are fitted to the states that it reads of itself, edits of a block that is
    left out, and pinned prompts of which only the last state is known.

    Args:
        states: What is attached.
        read: See `blocks_read`.
        skip: Number of skipped blocks.
    """
    found = []
    for state in states:
        if state.is_text_encoder and state.component not in read:
            continue
        for name, attached in state.in_force().items():
            edits = attached.erasure.edits
            places = [*edits.of(state.component), *edits.features_of(state.component)]
            last = read.get(state.component, 0) - skip
            left_out = any((block := block_of(path)) is not None and block > last for path in places)
            pin = edits.pinned.get(state.component)
            if not state.is_text_encoder or left_out or (pin is not None and not pin.blocks.numel()):
                found.append(name)
    return ", ".join(dict.fromkeys(found))
