"""Learned vectors: soft prompts and adversarial prefixes in place of words, and the learned tokens of pipelines."""

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
    """On the token embedding: puts learned vectors in place of some tokens."""

    def __init__(self, place: Tensor, vectors: Tensor) -> None:
        super().__init__()
        self.place, self.vectors = place, vectors

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        rows = self.vectors.to(output.dtype).expand(len(output), -1, -1)
        return output.index_copy(1, self.place, rows)


@contextmanager
def injected(tower: TextTower, place: Tensor, vectors: Tensor) -> Iterator[None]:
    """Read vectors instead of the tokens at some places; differentiable.

    The ids stay as they are, so the end token is found where it was. Leaving in the middle of an error takes the hook
    off too.

    Args:
        tower: The text encoder.
        place: `(tokens,)`, the same in every prompt.
        vectors: `(tokens, dim)` for all prompts, or `(prompts, tokens, dim)`.
    """
    table = paths.token_table(tower.root)
    with hooks.hooked(table, _Inject(place, vectors), _INJECT):
        yield


def behind(tower: TextTower, prompts: PromptTokens, prefix: Tensor) -> PromptTokens:
    """Prompts with other tokens ahead of their first word; all of their own tokens stay that there is room for.

    Args:
        tower: The text encoder that they are of.
        prompts: As many as rows of the prefix, or one, which is repeated for all of them.
        prefix: Tokens `(rows, tokens)`.

    Returns:
        Prompts with the ids that are really there: carriers that read ids must see them. One that there is no room
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
"""The learned tokens that texts mention: fingerprints of their vectors, by component and token."""


def learned_tokens(towers: Iterable[TextTower], texts: Iterable[str]) -> Learned:
    """The learned tokens (textual inversion) that texts mention; components without one are left out."""
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
    """Names in angle brackets in texts that no text encoder has learned, each once."""
    names = list(dict.fromkeys(name for text in texts for name in PLACEHOLDER.findall(text)))
    known = [set(learned.ids_by_word(tower.tokenizer)) for tower in towers]
    return [name for name in names if not any(name in words for words in known)]


def require_tokens(towers: Sequence[TextTower], texts: Iterable[str]) -> None:
    """Refuse texts that name a learned token which the model lacks: it would read its letters.

    Raises:
        ConceptError: One does.
    """
    if missing := missing_tokens(towers, texts):
        raise ConceptError(
            f"the model has no token {missing[0]}, so it would read its letters: load the concept that it stands for "
            "first (--learned FOLDER, pipe.load_concepts(FOLDER)), or write the text without angle brackets"
        )


def refuse_half_learned(towers: Iterable[TextTower], texts: Iterable[str]) -> None:
    """Raise `ConceptError` when one CLIP of several has learned a token that texts mention, and another spells it.

    The pipeline would go on drawing what it stands for by the words of the one and the letters of the other, and
    an erasure would be fitted to both. T5 learns no tokens.
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
    """Warn when a pipeline lacks learned tokens that an erasure mentions, or has other vectors for them.

    Args:
        name: Of the erasure.
        towers: Of the pipeline.
        expected: The tokens of the pipeline that the erasure was made with.
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
