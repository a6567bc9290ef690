"""Activations of a text tower as a stream: prompts go in, token vectors come out, nothing is stored."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from erasure.backbones import PromptTokens, TextTower
from erasure.cache import module_fingerprint
from erasure.carriers.weights import fingerprint, same_base
from erasure.errors import NoMatchingModuleError, OptionError
from erasure.extras import require
from erasure.files import digest
from erasure.interop import hooks
from erasure.interop.hooks import ModelHook
from erasure.text.words import word_mask

_CAPTURE = "erasure_capture"
ROWS_COMPARED = 1000
"""Rows of a dataset by which it is known."""


class _Enough(Exception):
    """Ends a forward pass whose remainder nobody needs."""


class _Capture(ModelHook):
    """Keeps the last output of a block, and ends the forward pass there if nobody needs more."""

    def __init__(self, stop: bool) -> None:
        super().__init__()
        self.stop = stop
        self.output: Tensor | None = None

    def post_forward(self, module: nn.Module, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        self.output = output[0] if isinstance(output, tuple) else output
        if self.stop:
            raise _Enough
        return output


@contextmanager
def captured(block: nn.Module, *, stop: bool = False) -> Iterator[_Capture]:
    """What a transformer block gives, `(batch, tokens, dim)`, of CLIP (a tensor) and T5 (a tuple) alike.

    Args:
        block: Of a text encoder.
        stop: Leave the rest of the encoder out, and the `with` block with it.
    """
    hook = _Capture(stop)
    with hooks.hooked(block, hook, _CAPTURE), suppress(_Enough):
        yield hook


def block_of(tower: TextTower, layer: int) -> nn.Module:
    """The block of a tower whose output is read and edited.

    Raises:
        NoMatchingModuleError: The tower has no such block, or what the denoiser reads does not pass through it.
    """
    last = _last_block(tower)
    if not 0 <= layer <= last:
        raise NoMatchingModuleError(
            f"{tower.component} has no block {layer} that reaches the denoiser; there are 0 to {last}"
        )
    return tower.blocks[layer]


def default_block(tower: TextTower) -> int:
    """Number of the block whose output an autoencoder reads unless told otherwise.

    Two thirds of the way where attention is causal. A sixth of the way where every token reads every other (T5): each
    block spreads a concept from its words over all the padding, which a denoiser reads too, and a later edit does not
    take it away there. On canvas-sd3 an edit of a dog leaves 0.10 of the squared distance to the anchor's states in
    T5's output when it is made after the first of four blocks, 0.45 after the second and 0.53 after the third.
    """
    blocks = len(tower.blocks)
    return min(2 * blocks // 3 if tower.causal else blocks // 6, _last_block(tower))


def _last_block(tower: TextTower) -> int:
    """Number of the last block whose output reaches the denoiser: `hidden_states[-2]` is that of the last but one."""
    return len(tower.blocks) + tower.consumed


def block_fingerprint(tower: TextTower, layer: int) -> dict[str, str]:
    """By which an autoencoder knows the text encoder it was made for: that of the block's first matrix."""
    return fingerprint(_first_matrix(tower, layer))


def reads_from(tower: TextTower, layer: int, known: Mapping[str, str]) -> bool:
    """Whether a fingerprint is that of this tower's block; not where it has no such block."""
    return 0 <= layer <= _last_block(tower) and same_base(_first_matrix(tower, layer), known)


def _first_matrix(tower: TextTower, layer: int) -> Tensor:
    return next(p for p in block_of(tower, layer).parameters() if p.ndim == 2)


@torch.no_grad()
def activations(tower: TextTower, layer: int, tokens: PromptTokens) -> Tensor:
    """Output of a block for tokenised prompts, `(batch, tokens, dim)`."""
    with captured(block_of(tower, layer), stop=True) as capture:
        tower.encode(tokens)
    assert capture.output is not None
    return capture.output


class Dataset(Protocol):
    """A dataset of the `datasets` library that is read as a stream."""

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        """Go through its rows."""
        ...

    def shuffle(self, *, seed: int, buffer_size: int) -> Iterable[Mapping[str, object]]:
        """The rows in another order, from a buffer of so many."""
        ...


class DatasetPrompts:
    """Prompts of a dataset that is read as a stream, shuffled in a buffer: too many to hold, the same at every run.

    Args:
        rows: An iterable dataset of the `datasets` library, each row a dict.
        column: Which of its columns holds the prompts.
        buffer: Rows that are shuffled at a time.

    Raises:
        OptionError: No such column, or no rows.
    """

    def __init__(self, rows: Dataset, column: str = "text", *, buffer: int = 10_000) -> None:
        first = next(iter(rows), None)
        if first is None:
            raise OptionError("the dataset has no rows")
        if not isinstance(first.get(column), str):
            texts = [name for name, value in first.items() if isinstance(value, str)]
            raise OptionError(f"the dataset has no column {column!r} of text; there are: {', '.join(texts) or 'none'}")
        self.rows, self.column, self.buffer = rows, column, buffer
        self._place: tuple[int, int] | None = None
        self._reader: Iterator[Mapping[str, object]] = iter(())

    @classmethod
    def open(cls, source: str, column: str = "text", split: str = "train") -> DatasetPrompts:
        """A dataset of the Hugging Face Hub, or a local folder, CSV, JSON-lines, Parquet or text file.

        Raises:
            MissingExtraError: `datasets` is not installed.
            OptionError: It cannot be opened.
        """
        datasets = require("datasets")
        formats = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
        form = formats.get(Path(source).suffix.lower()) if Path(source).is_file() else None
        try:
            if form is not None:
                return cls(datasets.load_dataset(form, data_files=source, split=split, streaming=True), column)
            return cls(datasets.load_dataset(source, split=split, streaming=True), column)
        except (OSError, ValueError) as error:
            raise OptionError(f"dataset {source!r} cannot be opened: {str(error).splitlines()[0]}") from error

    def draw(self, step: int, count: int, seed: int) -> list[str]:
        """The prompts of a step. Steps in turn go on reading; any other is looked for from the beginning."""
        if self._place != (seed, step * count):
            self._reader = self._endless(seed)
            for _ in range(step * count):
                next(self._reader)
        self._place = (seed, (step + 1) * count)
        return [str(next(self._reader)[self.column]) for _ in range(count)]

    def digest(self) -> str:
        """Tells one dataset from another by its first rows."""
        rows = [str(row[self.column]) for row in itertools.islice(self.rows, ROWS_COMPARED)]
        return digest([self.column, self.buffer, rows])

    def _endless(self, seed: int) -> Iterator[Mapping[str, object]]:
        for epoch in itertools.count():
            yield from self.rows.shuffle(seed=seed + 1000 * epoch, buffer_size=self.buffer)


class TokenStream:
    """Token vectors of random prompts, the same for the same step.

    Tokens are padded as the pipeline pads. The start token is left out: it never depends on the prompt.

    Args:
        tower: The text tower, frozen.
        layer: Which block's output.
        prompts: What to draw from: a list, or a dataset read as a stream.
        batch_size: Prompts per step.
        pad_share: Share of the padding positions that is kept: they are many and much alike.
        seed: Seeds the draw; give each process its own.

    Raises:
        NoMatchingModuleError: The tower has no such block.
        OptionError: No prompts.
    """

    def __init__(
        self, tower: TextTower, layer: int, prompts: Sequence[str] | DatasetPrompts, *, batch_size: int = 64,
        pad_share: float = 0.1, seed: int = 0,
    ) -> None:  # fmt: skip
        block_of(tower, layer)
        if not isinstance(prompts, DatasetPrompts) and not len(prompts):
            raise OptionError("an autoencoder needs prompts to be trained on, and there are none")
        self.tower, self.layer, self.prompts = tower, layer, prompts
        self.batch_size, self.pad_share, self.seed = batch_size, pad_share, seed

    def __call__(self, step: int) -> Tensor:
        """Activations `(tokens, dim)` of a step, float32."""
        rng = np.random.default_rng([self.seed, step])
        tokens = self.tower.tokenize(self._draw(step, rng))
        states = activations(self.tower, self.layer, tokens)
        keep = word_mask(tokens.ids, self.tower.end, self.tower.leading).cpu()
        pads = torch.from_numpy(rng.random(keep.shape) < self.pad_share)
        pads[:, : self.tower.leading] = False
        return states[(keep | pads).to(states.device)].float()

    def recipe(self) -> dict[str, object]:
        """All that the activations depend on, plain data."""
        prompts = self.prompts
        return {
            "component": self.tower.component, "layer": self.layer, "model": module_fingerprint(self.tower.module),
            "prompts": prompts.digest() if isinstance(prompts, DatasetPrompts) else digest(list(prompts)),
            "batch_size": self.batch_size, "pad_share": self.pad_share, "seed": self.seed,
        }  # fmt: skip

    def _draw(self, step: int, rng: np.random.Generator) -> list[str]:
        if isinstance(self.prompts, DatasetPrompts):
            return self.prompts.draw(step, self.batch_size, self.seed)
        return [self.prompts[int(row)] for row in rng.integers(len(self.prompts), size=self.batch_size)]

    def reseeded(self, seed: int) -> TokenStream:
        """Other draws of the same prompts."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def sample(self, count: int) -> list[str]:
        """Prompts of the first steps, each once, at most `count`."""
        found: dict[str, None] = {}
        for step in range(2 * count // self.batch_size + 1):
            found.update(dict.fromkeys(self._draw(step, np.random.default_rng([self.seed, step]))))
        return list(found)[:count]
