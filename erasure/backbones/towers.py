"""The text encoders of diffusers pipelines, CLIP's and T5's, seen alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, cast

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.concept import PLACEHOLDER
from erasure.errors import ConceptError, UnknownTokenWarning, UnsupportedModelError
from erasure.interop import learned, paths
from erasure.interop.protocols import TextBlock, TextModel, Tokenizer


class PromptTokens(NamedTuple):
    """A tokenised batch of prompts."""

    ids: Tensor
    """`(batch, tokens)`, padded to the tower's length."""
    lengths: list[int]
    """Tokens of each prompt with start and end, without padding."""
    attention_mask: Tensor | None
    """What the pipeline passes to the tower, if anything."""


@dataclass(frozen=True)
class TextTower:
    """One text encoder with its tokeniser."""

    component: str
    """Name in the pipeline, for instance `text_encoder_2`."""
    module: nn.Module
    tokenizer: Tokenizer
    max_length: int
    """Tokens that the pipeline pads to."""
    consumed: int = -1
    """Index into the hidden states that the denoiser reads: -1 the last (after the final norm), -2 the one before."""
    pooled: bool = False
    """Whether the denoiser reads a pooled vector too."""
    uses_attention_mask: bool = False
    pipe: DiffusionPipeline | None = field(default=None, repr=False, compare=False)
    """The pipeline that it is of, which rewrites prompts before they are tokenised."""

    @property
    def root(self) -> TextModel:
        """The module that holds `encoder`; paths are relative to it."""
        return cast(TextModel, paths.transformer_root(self.module))

    @property
    def blocks(self) -> list[TextBlock]:
        """The transformer blocks, first to last."""
        return list(cast(Iterable[TextBlock], self.root.get_submodule(self._blocks)))

    @property
    def _blocks(self) -> str:
        return "encoder.block" if hasattr(self.root.encoder, "block") else "encoder.layers"

    def block_path(self, layer: int) -> str:
        """Where a block hangs, relative to `root`."""
        return f"{self._blocks}.{layer}"

    @property
    def leading(self) -> int:
        """Tokens ahead of the first word: CLIP's prompts begin with a start token, T5's with the first word."""
        return len(self.tokenizer("").input_ids) - 1

    def key(self, path: str) -> str:
        """`component/path` with the path relative to `root`."""
        return f"{self.component}/{path}"

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Tokenise as the pipeline does: learned tokens written out, truncated and padded to `max_length`."""
        texts = [self.written_out(prompt) for prompt in prompts]
        made = self.tokenizer(
            texts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        lengths = [min(len(row), self.max_length) for row in self.tokenizer(texts).input_ids]
        device = next(self.root.parameters()).device
        mask = made.attention_mask.to(device) if self.uses_attention_mask else None
        return PromptTokens(made.input_ids.to(device), lengths, mask)

    def written_out(self, text: str) -> str:
        """A text with every vector of its learned tokens as a word of its own, as the pipeline writes it."""
        return learned.written_out(self.pipe, text, self.tokenizer)

    def prompt_ids(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """The tokens of a prompt, start and end included: all of them, or those that the pipeline's limit leaves."""
        limit = self.max_length if truncate else None
        return self.tokenizer(self.written_out(prompt), truncation=truncate, max_length=limit).input_ids

    def word_ids(self, words: str) -> list[int]:
        """Tokens of words as they stand in a prompt, without start and end."""
        return self.tokenizer(self.written_out(words), add_special_tokens=False).input_ids

    @property
    def learned_ids(self) -> frozenset[int]:
        """The vectors of learned tokens (textual inversion), by id."""
        return frozenset(learned.ids_by_word(self.tokenizer).values())

    def encode(self, tokens: PromptTokens) -> Tensor:
        """The hidden states that the denoiser reads, `(batch, tokens, dim)`; differentiable."""
        want_all = self.consumed != -1
        output = self.module(tokens.ids, attention_mask=tokens.attention_mask, output_hidden_states=want_all)
        return output.hidden_states[self.consumed] if want_all else output.last_hidden_state

    def check_words(self, words: str) -> None:
        """Raise `ConceptError` when a concept has no token, or only unknown ones, in this tower.

        Warns when a part of it is unknown, or when it is named like a learned token that is not loaded.
        """
        ids = self.word_ids(words)
        unknown = self.tokenizer.unk_token_id
        letters = self.tokenizer.convert_ids_to_tokens(ids)
        if not ids:
            raise ConceptError(
                f"concept {words!r} has no token in {self.component}'s tokeniser: write it in other words"
            )
        if unknown is not None and all(token == unknown for token in ids):
            raise ConceptError(
                f"concept {words!r} is unknown to {self.component}'s tokeniser ({len(self.tokenizer)} tokens), so no "
                f"prompt can name it and there is nothing to erase (tokens: {letters})"
            )
        if unknown is not None and unknown in ids:
            warnings.warn(
                f"part of {words!r} is unknown to {self.component}'s tokeniser, which reads {letters}: other words "
                "with the same tokens mean the same to it",
                UnknownTokenWarning,
                stacklevel=2,
            )
        for placeholder in PLACEHOLDER.findall(words):
            spelling = self.word_ids(placeholder)
            if not self.learned_ids & set(spelling):
                warnings.warn(
                    f"{placeholder} is no token of {self.component}'s tokeniser, which spells it "
                    f"{self.tokenizer.convert_ids_to_tokens(spelling)}: if it stands for a learned one, "
                    "load_textual_inversion() comes first",
                    UnknownTokenWarning,
                    stacklevel=2,
                )


def text_towers(pipe: DiffusionPipeline) -> list[TextTower]:
    """The text encoders of a pipeline, in the order in which it uses them.

    What the denoiser reads follows from which encoders there are, as diffusers' pipelines have it: Stable Diffusion
    1.x and 2.x the last state of their one CLIP; SDXL and SD3 the last but one of theirs, SD3 a T5 of 256 tokens
    beside them; Flux a T5 of 512 tokens and nothing but the pooled vector of its CLIP.

    Raises:
        UnsupportedModelError: No text encoder, or one that is neither CLIP's nor T5's.
    """
    parts = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    found = {name: part for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
    if not found:
        raise UnsupportedModelError(f"{type(pipe).__name__} has no text encoder")
    is_t5 = {name: _is_t5(name, part) for name, part in found.items()}
    clips = [name for name in parts if not is_t5.get(name, name == "text_encoder_3")]
    towers = []
    for name, encoder in found.items():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        if is_t5[name]:
            towers.append(TextTower(name, encoder, tokenizer, 256 if name == "text_encoder_3" else 512, pipe=pipe))
            continue
        # SD 2.x ships 23 of OpenCLIP's 24 blocks: its last shipped block already is the penultimate one.
        consumed = -2 if len(clips) > 1 else -1
        pooled = "text_encoder_3" in parts or (len(clips) > 1 and name != "text_encoder") or any(is_t5.values())
        mask = bool(getattr(encoder.config, "use_attention_mask", False)) and len(parts) == 1
        towers.append(TextTower(name, encoder, tokenizer, tokenizer.model_max_length, consumed, pooled, mask, pipe))
    return towers


def _is_t5(name: str, encoder: nn.Module) -> bool:
    inner = getattr(paths.transformer_root(encoder), "encoder", None)
    if hasattr(inner, "block"):
        return True
    if hasattr(inner, "layers"):
        return False
    raise UnsupportedModelError(f"{name} is a {type(encoder).__name__}, which is neither CLIP's nor T5's")
