"""The text encoders of diffusers pipelines, CLIP's and T5's, seen alike."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.errors import ConceptError, UnknownTokenWarning, UnsupportedModelError
from erasure.interop import learned, paths
from erasure.interop.encoders import Anatomy, anatomy_of, blocks_of
from erasure.interop.protocols import EncoderOutput, Tokenizer

SD3_LENGTH, T5_LENGTH = 256, 512
"""Tokens that SD3 pads T5's prompts to, and those that other pipelines do, unless their call says otherwise."""
END_OF_WORD, START_OF_WORD = "</w>", "▁"
"""Marks in the tokens of CLIP's tokeniser, and of T5's."""


class PromptTokens(NamedTuple):
    """A tokenised batch of prompts."""

    ids: Tensor
    """`(batch, tokens)`, padded to the tower's length."""
    lengths: list[int]
    """Tokens of each prompt with start and end, without padding."""
    attention_mask: Tensor | None
    """What the pipeline passes to the tower, if anything."""


class TowerOutput(NamedTuple):
    """What the denoiser reads of a text encoder."""

    states: Tensor
    """`(batch, tokens, dim)`."""
    pooled: Tensor | None = None
    """`(batch, dim)`, where the denoiser reads a vector that sums the prompt up."""
    mask: Tensor | None = None
    """`(batch, tokens)`: 1 at the tokens of the prompt, where the text encoder was told which are padding."""

    @staticmethod
    def cat(parts: Sequence[TowerOutput]) -> TowerOutput:
        """Those of several batches, one after the other."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        return TowerOutput(
            torch.cat([part.states for part in parts]), torch.cat(pooled) if pooled else None,
            torch.cat(masks) if masks else None,
        )  # fmt: skip


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
    def root(self) -> nn.Module:
        """The module that holds `encoder`; paths are relative to it."""
        return paths.transformer_root(self.module)

    # Parts of the encoder, by path -----------------------------------------------------------------------------------

    @property
    def _anatomy(self) -> Anatomy:
        found = anatomy_of(self.root)
        if found is None:
            raise UnsupportedModelError(
                f"{self.component} is a {type(self.module).__name__}, which is neither CLIP's nor T5's"
            )
        return found

    @property
    def causal(self) -> bool:
        """Whether a token sees only those ahead of it: what stands ahead of a word never depends on it."""
        return self._anatomy.causal

    @property
    def width(self) -> int:
        """Length of a token's state."""
        return paths.token_table(self.root).embedding_dim

    @property
    def blocks(self) -> list[nn.Module]:
        """The transformer blocks, first to last."""
        return blocks_of(self.root)

    @property
    def depth(self) -> int:
        """Number of blocks that what the denoiser reads has passed: all of them, or those ahead of a state inside."""
        return len(self.blocks) + (0 if self.pooled else self.consumed + 1)

    @property
    def passes_norm(self) -> bool:
        """Whether what the denoiser reads leaves through the norm behind the last block."""
        return self.pooled or self.consumed == -1

    def block_path(self, layer: int) -> str:
        """Path of a block; a negative number counts from the last."""
        return f"{self._anatomy.blocks}.{layer if layer >= 0 else len(self.blocks) + layer}"

    def attention(self, layer: int) -> str:
        """Path of a block's self-attention."""
        return f"{self.block_path(layer)}.{self._anatomy.attention}"

    def attention_out(self, layer: int) -> str:
        """Path of the output projection of a block's self-attention, a linear layer."""
        return f"{self.block_path(layer)}.{self._anatomy.attention_out}"

    def mlp(self, layer: int) -> str:
        """Path of the part of a block behind its attention."""
        return f"{self.block_path(layer)}.{self._anatomy.mlp}"

    @property
    def norm_path(self) -> str:
        """Path of the norm that the states of the last block leave through."""
        return self._anatomy.norm

    @property
    def leaving(self) -> list[nn.Module]:
        """The modules whose output a denoiser may read: the last norm, or the blocks where it is not passed.

        Pipelines that leave blocks out (`clip_skip`) hand an earlier block's states to that norm, or read them.
        """
        return [self.root.get_submodule(self.norm_path)] if self.consumed == -1 else self.blocks

    @property
    def pooling(self) -> nn.Module:
        """The module that the pooled vector leaves through: its projection, or the last norm where it has none."""
        projection = getattr(self.module, "text_projection", None)
        return projection if isinstance(projection, nn.Module) else self.root.get_submodule(self.norm_path)

    @property
    def pooled_width(self) -> int:
        """Length of the pooled vector."""
        projection = paths.base_layer(self.pooling)
        return projection.out_features if isinstance(projection, nn.Linear) else self.width

    # Text to tokens --------------------------------------------------------------------------------------------------

    @property
    def leading(self) -> int:
        """Tokens ahead of the first word: CLIP's prompts begin with a start token, T5's with the first word."""
        return len(self.tokenizer("").input_ids) - 1

    def key(self, path: str) -> str:
        """`component/path` with the path relative to `root`."""
        return f"{self.component}/{path}"

    def tokenize(self, prompts: Sequence[str]) -> PromptTokens:
        """Tokenise as the pipeline does: learned tokens written out, truncated and padded to `max_length`."""
        texts = learned.written_out(self.pipe, prompts, self.tokenizer)
        made = self.tokenizer(
            texts, padding="max_length", max_length=self.max_length, truncation=True, return_tensors="pt"
        )
        lengths = made.attention_mask.sum(1).tolist()
        device = next(self.root.parameters()).device
        mask = made.attention_mask.to(device) if self.uses_attention_mask else None
        return PromptTokens(made.input_ids.to(device), lengths, mask)

    def written_out(self, text: str) -> str:
        """A text with every vector of its learned tokens as a word of its own, as the pipeline writes it."""
        return learned.written_out(self.pipe, [text], self.tokenizer)[0]

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

    @property
    def end(self) -> int:
        """The token that ends a prompt."""
        return self.tokenizer.eos_token_id

    def words(self) -> dict[str, int]:
        """Every token that is a whole word on its own, with its id, in the order of the ids.

        CLIP marks the end of a word (`cat</w>`), T5 its beginning (`▁cat`); without the mark a token is a part of one.
        """
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        if self.marks_starts:
            words = {token.removeprefix(START_OF_WORD): i for token, i in tokens if token.startswith(START_OF_WORD)}
        else:
            words = {token.removesuffix(END_OF_WORD): i for token, i in tokens if token.endswith(END_OF_WORD)}
        return {word: index for word, index in words.items() if word}

    @property
    def marks_starts(self) -> bool:
        """Whether tokens mark the beginning of a word that follows a blank, as T5's do, and not its end."""
        return self.tokenizer.convert_ids_to_tokens(self.word_ids("a"))[0].startswith(START_OF_WORD)

    # Tokens to states ------------------------------------------------------------------------------------------------

    def encode(self, tokens: PromptTokens) -> TowerOutput:
        """What the denoiser reads of some prompts; differentiable."""
        output = self.module(
            tokens.ids, attention_mask=tokens.attention_mask, output_hidden_states=self.consumed != -1
        )
        pooled = self.pooled_vector(output) if self.pooled else None
        return TowerOutput(self.consumed_states(output), pooled, tokens.attention_mask)

    def consumed_states(self, output: EncoderOutput) -> Tensor:
        """The states that the denoiser reads, `(batch, tokens, dim)`, from what the encoder or its root gives."""
        return output.last_hidden_state if self.consumed == -1 else output.hidden_states[self.consumed]

    def pooled_vector(self, output: EncoderOutput) -> Tensor:
        """The pooled vector, `(batch, dim)`, from what the encoder or its root gives."""
        projected: Tensor | None = getattr(output, "text_embeds", None)
        if projected is not None:
            return projected
        # A projection hangs outside of the root.
        projection = getattr(self.module, "text_projection", None)
        if projection is None:
            return output.pooler_output
        # What is trained runs in float32 beside a projection in half precision.
        return projection(output.pooler_output.to(next(paths.base_layer(projection).parameters()).dtype))

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
        # T5 marks the beginning of a word that it does not know by a token of its own.
        said = [index for index, letter in zip(ids, letters, strict=True) if letter != START_OF_WORD]
        if unknown is not None and all(token == unknown for token in said):
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


def text_towers(pipe: DiffusionPipeline, length: int | None = None) -> list[TextTower]:
    """The text encoders of a pipeline, in the order in which it uses them.

    What the denoiser reads follows from which encoders there are, as diffusers' pipelines have it: Stable Diffusion
    1.x and 2.x the last state of their one CLIP; SDXL and SD3 the last but one of theirs, SD3 a T5 of 256 tokens
    beside them; Flux a T5 of 512 tokens and nothing but the pooled vector of its CLIP; Chroma a T5 of 512 tokens.

    Args:
        pipe: The pipeline.
        length: Tokens that T5 pads prompts to; as above when left out.

    Raises:
        UnsupportedModelError: No text encoder, or one that is neither CLIP's nor T5's.
    """
    parts = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    encoders = {name: part for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
    if not encoders:
        raise UnsupportedModelError(f"{type(pipe).__name__} has no text encoder")
    is_t5 = {name: not _is_causal(name, part) for name, part in encoders.items()}
    clips = [name for name in parts if not is_t5.get(name, name == "text_encoder_3")]
    towers = []
    for name, encoder in encoders.items():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        if is_t5[name]:
            padded = length or (SD3_LENGTH if name == "text_encoder_3" else T5_LENGTH)
            # Alone it is told which tokens are padding.
            towers.append(TextTower(name, encoder, tokenizer, padded, uses_attention_mask=len(parts) == 1, pipe=pipe))
            continue
        # SD 2.x ships 23 of OpenCLIP's 24 blocks: its last shipped block already is the penultimate one.
        consumed = -2 if len(clips) > 1 else -1
        pooled = "text_encoder_3" in parts or (len(clips) > 1 and name != "text_encoder") or any(is_t5.values())
        mask = bool(getattr(encoder.config, "use_attention_mask", False)) and len(parts) == 1
        towers.append(TextTower(name, encoder, tokenizer, tokenizer.model_max_length, consumed, pooled, mask, pipe))
    return towers


def _is_causal(name: str, encoder: nn.Module) -> bool:
    anatomy = anatomy_of(paths.transformer_root(encoder))
    if anatomy is None:
        raise UnsupportedModelError(f"{name} is a {type(encoder).__name__}, which is neither CLIP's nor T5's")
    return anatomy.causal
