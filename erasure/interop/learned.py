"""Learned tokens of textual inversion: words that were added to a tokeniser, with vectors of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor, nn

from erasure.interop import paths
from erasure.interop.protocols import Tokenizer


def written_out(pipe: DiffusionPipeline | None, texts: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """Texts as a pipeline hands them to one of its tokenisers: a token of several vectors becomes as many words.

    Call it once for a text: diffusers writes the outcome out again. It tokenises every text, which those that name no
    such token are spared.
    """
    if not isinstance(pipe, TextualInversionLoaderMixin):
        return list(texts)
    known = tokenizer.added_tokens_encoder
    several = [word for word in known if f"{word}_1" in known]
    return [
        pipe.maybe_convert_prompt(text, tokenizer) if any(word in text for word in several) else text for text in texts
    ]


def ids_by_word(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the words that were added to a tokeniser; each further vector of a word is one, `<word>_1` and so on."""
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    return {word: index for word, index in tokenizer.added_tokens_encoder.items() if index not in own}


def mentioned(texts: Iterable[str], tokenizer: Tokenizer) -> list[str]:
    """The learned tokens that texts mention, each once."""
    known = {index: word for word, index in ids_by_word(tokenizer).items()}
    ids = tokenizer(list(texts)).input_ids if known else []
    return [known[index] for index in dict.fromkeys(token for row in ids for token in row) if index in known]


def vectors(tokenizer: Tokenizer, encoder: nn.Module, word: str) -> Tensor:
    """The vectors of a learned token, first to last, `(vectors, dim)`."""
    known = ids_by_word(tokenizer)
    rows = [known[word]]
    while (following := f"{word}_{len(rows)}") in known:
        rows.append(known[following])
    return paths.token_table(paths.transformer_root(encoder)).weight.detach()[rows]
