"""The text encoders of diffusers pipelines, CLIP and T5, behind one interface."""

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
"""Number of tokens to which prompts are padded for T5: in SD3, and in other pipelines, unless a call sets it."""
END_OF_WORD, START_OF_WORD = "</w>", "▁"
"""Marks in the tokens of CLIP's tokeniser, and of T5's."""


class PromptTokens(NamedTuple):
    """A tokenised batch of prompts."""

    ids: Tensor
    """Token ids, padded to the text encoder's length, `(batch, tokens)`."""
    lengths: list[int]
    """Number of tokens of each prompt with start and end, without padding."""
    attention_mask: Tensor | None
    """Attention mask that the pipeline passes to the text encoder, if any."""


class TowerOutput(NamedTuple):
    """The outputs of a text encoder that the denoiser reads."""

    states: Tensor
    """Token states, `(batch, tokens, dim)`."""
    pooled: Tensor | None = None
    """Pooled vectors, if the denoiser reads them, `(batch, dim)`."""
    mask: Tensor | None = None
    """Mask of the prompt's tokens, `(batch, tokens)`, where the text encoder has an attention mask."""

    @staticmethod
    def cat(parts: Sequence[TowerOutput]) -> TowerOutput:
        """Concatenate batches."""
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
    """Number of tokens to which the pipeline pads prompts."""
    consumed: int = -1
    """Index into the hidden states that the denoiser reads: -1 the last (after the final norm), -2 the one before."""
    pooled: bool = False
    """Whether the denoiser reads a pooled vector too."""
    uses_attention_mask: bool = False
    pipe: DiffusionPipeline | None = field(default=None, repr=False, compare=False)
    """Pipeline of the text encoder, which replaces learned tokens in prompts before they are tokenised."""

    @property
    def root(self) -> nn.Module:
        """The module with the attribute `encoder`; paths are relative to it."""
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
        """Whether attention is causal, so that tokens before a word do not depend on it."""
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
        """Number of blocks before the state that the denoiser reads."""
        return len(self.blocks) + (0 if self.pooled else self.consumed + 1)

    @property
    def passes_norm(self) -> bool:
        """Whether the state that the denoiser reads has passed the final norm."""
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
        """Path of a block's MLP."""
        return f"{self.block_path(layer)}.{self._anatomy.mlp}"

    @property
    def norm_path(self) -> str:
        """Path of the final norm."""
        return self._anatomy.norm

    @property
    def leaving(self) -> list[nn.Module]:
        """The modules whose output a denoiser can read: the final norm, or the blocks where it is not used.

        Pipelines that skip blocks (`clip_skip`) pass an earlier block's states to that norm, or read them.
        """
        return [self.root.get_submodule(self.norm_path)] if self.consumed == -1 else self.blocks

    @property
    def pooling(self) -> nn.Module:
        """The module that gives the pooled vector: its projection, or the final norm where there is none."""
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
        """Number of tokens before the first word: 1 in CLIP (the start token), 0 in T5."""
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
        """Replace each learned token in a text by one word per vector, as the pipeline does."""
        return learned.written_out(self.pipe, [text], self.tokenizer)[0]

    def prompt_ids(self, prompt: str, *, truncate: bool = False) -> list[int]:
        """Tokenise a prompt with start and end, in full or truncated to the pipeline's limit."""
        limit = self.max_length if truncate else None
        return self.tokenizer(self.written_out(prompt), truncation=truncate, max_length=limit).input_ids

    def word_ids(self, words: str) -> list[int]:
        """Tokenise words without start and end."""
        return self.tokenizer(self.written_out(words), add_special_tokens=False).input_ids

    @property
    def learned_ids(self) -> frozenset[int]:
        """Ids of the vectors of learned tokens (textual inversion)."""
        return frozenset(learned.ids_by_word(self.tokenizer).values())

    @property
    def end(self) -> int:
        """Id of the end token."""
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
        """Encode tokenised prompts; differentiable."""
        output = self.module(
            tokens.ids, attention_mask=tokens.attention_mask, output_hidden_states=self.consumed != -1
        )
        pooled = self.pooled_vector(output) if self.pooled else None
        return TowerOutput(self.consumed_states(output), pooled, tokens.attention_mask)

    def consumed_states(self, output: EncoderOutput) -> Tensor:
        """Take the states that the denoiser reads, `(batch, tokens, dim)`, from the encoder's output."""
        return output.last_hidden_state if self.consumed == -1 else output.hidden_states[self.consumed]

    def pooled_vector(self, output: EncoderOutput) -> Tensor:
        """Take the pooled vector, `(batch, dim)`, from the encoder's output."""
        projected: Tensor | None = getattr(output, "text_embeds", None)
        if projected is not None:
            return projected
        # The projection is outside of the root module.
        projection = getattr(self.module, "text_projection", None)
        if projection is None:
            return output.pooler_output
        # Trained parameters run in float32, before a projection in half precision.
        return projection(output.pooler_output.to(next(paths.base_layer(projection).parameters()).dtype))

    def check_words(self, words: str) -> None:
        """Raise `ConceptError` when a concept has no token, or only unknown ones, in this text encoder.

        Warns when a part of it is unknown, or when it looks like a learned token that is not loaded.
        """
        ids = self.word_ids(words)
        unknown = self.tokenizer.unk_token_id
        letters = self.tokenizer.convert_ids_to_tokens(ids)
        if not ids:
            raise ConceptError(
                f"concept {words!r} has no token in {self.component}'s tokeniser: write it in other words"
            )
        # T5 marks the beginning of an unknown word by a separate token.
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
    """List the text encoders of a pipeline, in the order in which it uses them.

    The states that the denoiser reads depend on the encoders, as in diffusers' pipelines: Stable Diffusion 1.x and 2.x
    read the last state of one CLIP; SDXL and SD3 the last but one of two CLIPs, SD3 with a T5 of 256 tokens; Flux a T5
    of 512 tokens and only the pooled vector of its CLIP; Chroma a T5 of 512 tokens.

    Args:
        pipe: The pipeline.
        length: Number of tokens to which prompts are padded for T5; as above when left out.

    Raises:
        UnsupportedModelError: There is no text encoder, or one that is neither CLIP nor T5.
    """
    parts = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    encoders = {name: part for name, part in sorted(parts.items()) if isinstance(part, nn.Module)}
    if not encoders:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no text encoder: load the pipeline with all its components"
        )
    is_t5 = {name: not _is_causal(name, part) for name, part in encoders.items()}
    clips = [name for name in parts if not is_t5.get(name, name == "text_encoder_3")]
    towers = []
    for name, encoder in encoders.items():
        tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"))
        if is_t5[name]:
            padded = length or (SD3_LENGTH if name == "text_encoder_3" else T5_LENGTH)
            # Without CLIP encoders T5 gets an attention mask.
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
