"""A stream of a text encoder's activations: prompts are encoded when needed, and nothing is stored."""

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
"""Number of first rows by which a dataset is identified."""


class _Enough(Exception):
    """Ends a forward pass whose remainder is not needed."""


class _Capture(ModelHook):
    """Hook that records a block's output, and optionally ends the forward pass there."""

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
    """Record a transformer block's output, `(batch, tokens, dim)`, for CLIP (a tensor) and T5 (a tuple).

    Args:
        block: Block of a text encoder.
        stop: End the forward pass after the block, and leave the `with` block.
    """
    hook = _Capture(stop)
    with hooks.hooked(block, hook, _CAPTURE), suppress(_Enough):
        yield hook


def block_of(tower: TextTower, layer: int) -> nn.Module:
    """Find the block of a text encoder whose output is read and edited.

    Raises:
        NoMatchingModuleError: The text encoder has no such block, or the denoiser's input does not depend on it.
    """
    last = _last_block(tower)
    if not 0 <= layer <= last:
        raise NoMatchingModuleError(
            f"{tower.component} has no block {layer} that reaches the denoiser; there are 0 to {last}"
        )
    return tower.blocks[layer]


def default_block(tower: TextTower) -> int:
    """Give the index of the block that an autoencoder reads by default.

    The block is at two thirds of the depth in causal encoders. It is at one sixth in bidirectional ones (T5): each
    block spreads a concept from its words over all the padding, which the denoiser reads too, and a later edit does
    not remove it there. On canvas-sd3 an edit of a dog leaves 0.10 of the squared distance to the anchor's states in
    T5's output when it is made after the first of four blocks, 0.45 after the second and 0.53 after the third.
    """
    blocks = len(tower.blocks)
    return min(2 * blocks // 3 if tower.causal else blocks // 6, _last_block(tower))


def _last_block(tower: TextTower) -> int:
    """Give the index of the last block that the denoiser depends on; `hidden_states[-2]` is the last but one."""
    return len(tower.blocks) + tower.consumed


def block_fingerprint(tower: TextTower, layer: int) -> dict[str, str]:
    """Fingerprint the first matrix of a block, by which an autoencoder identifies its text encoder."""
    return fingerprint(_first_matrix(tower, layer))


def reads_from(tower: TextTower, layer: int, known: Mapping[str, str]) -> bool:
    """Whether a fingerprint is that of this text encoder's block; false where it has no such block."""
    return 0 <= layer <= _last_block(tower) and same_base(_first_matrix(tower, layer), known)


def _first_matrix(tower: TextTower, layer: int) -> Tensor:
    return next(p for p in block_of(tower, layer).parameters() if p.ndim == 2)


@torch.no_grad()
def activations(tower: TextTower, layer: int, tokens: PromptTokens) -> Tensor:
    """Compute a block's output for tokenised prompts, `(batch, tokens, dim)`."""
    with captured(block_of(tower, layer), stop=True) as capture:
        tower.encode(tokens)
    assert capture.output is not None
    return capture.output


class Dataset(Protocol):
    """A dataset of the `datasets` library that is read as a stream."""

    def __iter__(self) -> Iterator[Mapping[str, object]]:
        """Iterate over the rows."""
        ...

    def shuffle(self, *, seed: int, buffer_size: int) -> Iterable[Mapping[str, object]]:
        """Give the rows in random order, from a buffer of `buffer_size` rows."""
        ...


class DatasetPrompts:
    """Prompts of a dataset that is streamed and shuffled in a buffer; the same order in every run.

    Args:
        rows: An iterable dataset of the `datasets` library, each row a dict.
        column: Name of the column of prompts.
        buffer: Number of rows that are shuffled at a time.

    Raises:
        OptionError: The column does not exist, or there are no rows.
    """

    def __init__(self, rows: Dataset, column: str = "text", *, buffer: int = 10_000) -> None:
        first = next(iter(rows), None)
        if first is None:
            raise OptionError("the dataset has no rows: check its name and its split")
        if not isinstance(first.get(column), str):
            texts = [name for name, value in first.items() if isinstance(value, str)]
            raise OptionError(f"the dataset has no column {column!r} of text; there are: {', '.join(texts) or 'none'}")
        self.rows, self.column, self.buffer = rows, column, buffer
        self._place: tuple[int, int] | None = None
        self._reader: Iterator[Mapping[str, object]] = iter(())

    @classmethod
    def open(cls, source: str, column: str = "text", split: str = "train") -> DatasetPrompts:
        """Open a dataset of the Hugging Face Hub, or a local folder, CSV, JSON-lines, Parquet or text file.

        Raises:
            MissingExtraError: `datasets` is not installed.
            OptionError: The dataset cannot be opened.
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
        """Give the prompts of a step. Successive steps continue reading; any other step reads from the beginning."""
        if self._place != (seed, step * count):
            self._reader = self._endless(seed)
            for _ in range(step * count):
                next(self._reader)
        self._place = (seed, (step + 1) * count)
        return [str(next(self._reader)[self.column]) for _ in range(count)]

    def digest(self) -> str:
        """Compute a digest of the first rows, which identifies the dataset."""
        rows = [str(row[self.column]) for row in itertools.islice(self.rows, ROWS_COMPARED)]
        return digest([self.column, self.buffer, rows])

    def _endless(self, seed: int) -> Iterator[Mapping[str, object]]:
        for epoch in itertools.count():
            yield from self.rows.shuffle(seed=seed + 1000 * epoch, buffer_size=self.buffer)


class TokenStream:
    """Token vectors of random prompts, the same for the same step.

    Prompts are padded as the pipeline pads. The start token is left out because it does not depend on the prompt.

    Args:
        tower: Text encoder, which is frozen.
        layer: Block whose output is read.
        prompts: Prompts to draw from: a list, or a streamed dataset.
        batch_size: Number of prompts per step.
        pad_share: Share, 0 to 1, of the padding positions that is kept; they are many and similar.
        seed: Seed of the draw; each process needs its own.

    Raises:
        NoMatchingModuleError: The text encoder has no such block.
        OptionError: There are no prompts.
    """

    def __init__(
        self, tower: TextTower, layer: int, prompts: Sequence[str] | DatasetPrompts, *, batch_size: int = 64,
        pad_share: float = 0.1, seed: int = 0,
    ) -> None:  # fmt: skip
        block_of(tower, layer)
        if not isinstance(prompts, DatasetPrompts) and not len(prompts):
            raise OptionError(
                "an autoencoder is trained on prompts, and none are given: give a list of texts or a dataset"
            )
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
        """Give everything on which the activations depend, as plain data."""
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
        """Make a stream with another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def sample(self, count: int) -> list[str]:
        """Give prompts of the first steps, each once, at most `count`."""
        found: dict[str, None] = {}
        for step in range(2 * count // self.batch_size + 1):
            found.update(dict.fromkeys(self._draw(step, np.random.default_rng([self.seed, step]))))
        return list(found)[:count]
