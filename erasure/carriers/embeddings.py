"""Learned vectors: soft prompts and adversarial prefixes instead of words, and pipelines' learned tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from erasure.backbones import PromptTokens, TextTower
from erasure.carriers.weights import fingerprint, same_base
from erasure.concept import PLACEHOLDER
from erasure.errors import ConceptError, UnknownTokenWarning
from erasure.interop import hooks, learned, paths
from erasure.interop.hooks import ModelHook

_INJECT = "erasure_injected_embeddings"


class _Inject(ModelHook):
    """Hook on the token embedding: replaces some tokens' embeddings by learned vectors."""

    def __init__(self, place: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.place, self.vectors = place, vectors

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        rows = self.vectors.to(output.dtype).expand(len(output), -1, -1)
        return output.index_copy(1, self.place, rows)


@contextmanager
def injected(tower: TextTower, place: Tensor, vectors: Tensor) -> Iterator[None]:
    """Replace token embeddings at given positions by vectors; differentiable in the vectors.

    Token ids do not change, so the end token is found at its place. The hook is removed also after an error.

    Args:
        tower: Text encoder.
        place: Positions to replace, `(tokens,)`, the same in every prompt.
        vectors: Vectors `(tokens, dim)` for all prompts, or `(prompts, tokens, dim)`.
    """
    table = paths.token_table(tower.root)
    with hooks.hooked(table, _Inject(place, vectors), _INJECT):
        yield


def behind(tower: TextTower, prompts: PromptTokens, prefix: Tensor) -> PromptTokens:
    """Insert tokens before the first word of prompts; a prompt's own tokens stay as far as they fit.

    Args:
        tower: Text encoder that tokenised the prompts.
        prompts: One prompt for each row of the prefix, or one prompt, which is repeated.
        prefix: Token ids, `(rows, tokens)`.

    Returns:
        Prompts with the inserted ids, which carriers that read ids must see. A prompt that is too long is cut and ends
        with the end token, as tokenisers do.
        for is cut and ends with the end token, as tokenisers cut it.
    """
    (rows, count), leading = prefix.shape, tower.leading

    def joined(part: Tensor, inserted: Tensor) -> Tensor:
        part = part.expand(rows, -1)
        return torch.cat([part[:, :leading], inserted, part[:, leading : part.shape[1] - count]], 1)

    ids, mask = joined(prompts.ids, prefix.to(prompts.ids)), prompts.attention_mask
    lengths = [length + count for length in prompts.lengths * (rows // len(prompts.lengths))]
    for row, length in enumerate(lengths):
        if length > tower.max_length:
            ids[row, -1] = tower.end
    return PromptTokens(
        ids,
        [min(length, tower.max_length) for length in lengths],
        None if mask is None else joined(mask, torch.ones_like(prefix)),
    )


Learned = Mapping[str, Mapping[str, Mapping[str, str]]]
"""Learned tokens that texts contain: fingerprints of their vectors, by component and token."""


def learned_tokens(towers: Iterable[TextTower], texts: Iterable[str]) -> Learned:
    """Find the learned tokens (textual inversion) that texts contain; components without any are left out."""
    texts = list(texts)
    each = {
        tower.component: {
            word: fingerprint(learned.vectors(tower.tokenizer, tower.module, word))
            for word in learned.mentioned(texts, tower.tokenizer)
        }
        for tower in towers
    }
    return {component: words for component, words in each.items() if words}


def missing_tokens(towers: Sequence[TextTower], texts: Iterable[str]) -> list[str]:
    """List names in angle brackets that no text encoder has learned, each once."""
    names = list(dict.fromkeys(name for text in texts for name in PLACEHOLDER.findall(text)))
    known = [set(learned.ids_by_word(tower.tokenizer)) for tower in towers]
    return [name for name in names if not any(name in words for words in known)]


def require_tokens(towers: Sequence[TextTower], texts: Iterable[str]) -> None:
    """Refuse texts with a learned token that the model lacks, and would therefore read letter by letter.

    Raises:
        ConceptError: A text contains such a token.
    """
    if missing := missing_tokens(towers, texts):
        raise ConceptError(
            f"the model has no token {missing[0]}, so it would read its letters: load the concept that it stands for "
            "first (--learned FOLDER, pipe.load_concepts(FOLDER)), or write the text without angle brackets"
        )


def refuse_half_learned(towers: Iterable[TextTower], texts: Iterable[str]) -> None:
    """Raise `ConceptError` when texts contain a token that only some of a model's CLIP encoders have learned.

    The other encoders would read the token's letters, and the erasure would be fitted to both readings. T5 learns no
    tokens.
    """
    texts = list(texts)
    each = {tower.component: set(learned.mentioned(texts, tower.tokenizer)) for tower in towers if tower.causal}
    for component, words in each.items():
        if missing := sorted(set().union(*each.values()) - words):
            knowing = next(other for other, known in each.items() if missing[0] in known)
            raise ConceptError(
                f"{missing[0]} is a token that the tokeniser of {knowing} has learned, and that of {component} has "
                f"not, which spells it: load it into both, load_textual_inversion(..., tokenizer="
                f"pipe.{component.replace('text_encoder', 'tokenizer')}, text_encoder=pipe.{component})"
            )


def warn_of_unlike_tokens(name: str, towers: Iterable[TextTower], expected: Learned) -> None:
    """Warn when a pipeline lacks learned tokens of an erasure's concepts, or has other vectors for them.

    Args:
        name: Name of the erasure.
        towers: Text encoders of the pipeline.
        expected: Learned tokens of the pipeline on which the erasure was made.
    """
    for tower in towers:
        known = learned.ids_by_word(tower.tokenizer)
        for word, digests in expected.get(tower.component, {}).items():
            if word not in known:
                what = "which this pipeline lacks"
            elif not same_base(learned.vectors(tower.tokenizer, tower.module, word), digests):
                what = "for which this pipeline has other vectors"
            else:
                continue
            warnings.warn(
                f"the erasure {name!r} was made with the learned token {word} of the {tower.component}, {what}: "
                "prompts with it need not be erased. Load the same token with load_textual_inversion() and attach the "
                "erasure again, or make it anew",
                UnknownTokenWarning,
                stacklevel=2,
            )
