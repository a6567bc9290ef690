"""Learned tokens of textual inversion: words that were added to a tokeniser, with vectors of their own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from erasure.interop import paths
from erasure.interop.protocols import Tokenizer


def written_out(pipe: DiffusionPipeline | None, texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Expand learned tokens in texts as a pipeline does: a token of several vectors becomes as many words.

    Call it only once for a text, because diffusers would expand the result again. Texts without such tokens are not
    tokenised for this.
    """
    if not isinstance(pipe, TextualInversionLoaderMixin):
        return list(texts)
    known = tokenizer.added_tokens_encoder
    several = [word for word in known if f"{word}_1" in known]
    return [
        pipe.maybe_convert_prompt(text, tokenizer) if any(word in text for word in several) else text for text in texts
    ]


def ids_by_word(tokenizer: Tokenizer) -> dict[str, int]:
    """Give the ids of words added to a tokeniser; further vectors of a word are `<word>_1` and so on."""
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return {word: index for word, index in tokenizer.added_tokens_encoder.items() if index not in own}


def mentioned(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """List the learned tokens in texts, each once."""
    known = {index: word for word, index in ids_by_word(tokenizer).items()}
    ids = tokenizer(list(texts)).input_ids if known else []
    return [known[index] for index in dict.fromkeys(token for row in ids for token in row) if index in known]


def vectors(tokenizer: Tokenizer, encoder: nn.Module, word: str) -> Tensor:
    """Give the vectors of a learned token, first to last, `(vectors, dim)`."""
    known = ids_by_word(tokenizer)
    rows = [known[each] for each in words_of(tokenizer, word)]
    return paths.token_table(paths.transformer_root(encoder)).weight.detach()[rows]


def loads_tokens(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's class loads learned tokens."""
    return isinstance(pipe, TextualInversionLoaderMixin)


def add(pipe: DiffusionPipeline, component: str, word: str, vectors: Tensor) -> None:
    """Add a learned token of `(vectors, dim)` to one text encoder of a pipeline and to its tokeniser."""
    name = component.replace("text_encoder", "tokenizer")
    # One vector is a row of its own: of a matrix of one row diffusers makes a word of another name.
    rows = vectors if len(vectors) > 1 else vectors[0]
    with torch.random.fork_rng(devices=[]), quiet_resizing():
        pipe.load_textual_inversion(
            rows, token=word, tokenizer=getattr(pipe, name), text_encoder=getattr(pipe, component)
        )


def remove(pipe: DiffusionPipeline, component: str, word: str) -> None:
    """Remove a learned token from one text encoder and its tokeniser, if it is there.

    The words of its further vectors, which diffusers would leave behind, are removed too.
    """
    tokenizer = getattr(pipe, component.replace("text_encoder", "tokenizer"))
    if words := words_of(tokenizer, word):
        encoder = getattr(pipe, component)
        pipe.unload_textual_inversion(words, tokenizer=tokenizer, text_encoder=encoder)
        encoder.config.vocab_size = paths.token_table(paths.transformer_root(encoder)).num_embeddings


def words_of(tokenizer: Tokenizer, word: str) -> list[str]:
    """List a learned token and the words of its further vectors; empty for other words."""
    known = ids_by_word(tokenizer)
    words = [word] if word in known else []
    while words and (following := f"{word}_{len(words)}") in known:
        words.append(following)
    return words


@contextmanager
def quiet_resizing() -> Iterator[None]:
    """Silence transformers' message on random new rows of a table inside of the block: they are overwritten."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
