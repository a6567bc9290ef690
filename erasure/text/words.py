"""Positions of words among the tokens of a prompt, and alignment of a concept's prompt with its anchor's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erasure.backbones import TextTower
from erasure.backbones.towers import START_OF_WORD
from erasure.concept import Concept
from erasure.errors import ConceptError

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""Letters of scripts without blanks between words: Thai, Lao, Burmese, Khmer, kana and Han."""
SIGN = "("
"""A sign that no tokeniser joins with the word after it."""


class Span(NamedTuple):
    """Token positions of words in a prompt."""

    first: int
    last: int
    start: int
    """First position that can carry the words' meaning: under causal attention `last`, or the first vector of a
    learned token; under bidirectional attention 0."""


class AlignedPrompt(NamedTuple):
    """A prompt with the concept, the same prompt with its anchor, and the corresponding tokens."""

    prompt: str
    anchor_prompt: str
    start: int
    """First position that can carry the concept; see `Span.start`."""
    last: int
    """Position of the concept's last token."""
    positions: Tensor
    """Corresponding position of the anchor prompt, for each position of the prompt, `(tokens,)`."""


# Masks and spans -----------------------------------------------------------------------------------------------------


def word_mask(ids: Tensor, end: int, first: int = 1) -> Tensor:
    """Mark words and the first end token, `(batch, tokens)` bool, without start token and padding.

    Args:
        ids: Token ids, `(batch, tokens)`.
        end: Id of the end token.
        first: Position of the first word.
    """
    ends = (ids == end).long()
    mask = (ends.cumsum(1) - ends) == 0
    return mask & (torch.arange(ids.shape[1], device=ids.device) >= first)


def spellings(tower: TextTower, words: str) -> list[list[int]]:
    """Tokenise words as after a space and, where that differs, as after a sign.

    T5 marks the beginning of a word after a space, so "cat" and the word in "(cat)" are different tokens.
    """
    behind_blank = tower.word_ids(words)
    sign = tower.word_ids(SIGN)
    behind_sign = tower.word_ids(f"{SIGN}{words}")
    found = [behind_blank]
    if behind_sign[: len(sign)] == sign and behind_sign[len(sign) :] != behind_blank:
        found.append(behind_sign[len(sign) :])
    return [ids for ids in found if ids]


def occurrences(ids: Sequence[int], spelled: Sequence[Sequence[int]], first: int = 0) -> list[slice]:
    """Find the occurrences of token sequences, from left to right.

    Args:
        ids: Tokens of a prompt.
        spelled: Token sequences to find, any of which counts.
        first: Position of the first word.
    """
    return [
        slice(start, start + len(part))
        for start in range(first, len(ids))
        for part in spelled
        if list(ids[start : start + len(part)]) == list(part)
    ]


def subject_span(tower: TextTower, prompt: str, words: str, ahead: str | None = None) -> Span:
    """Find the token positions of `words` in `prompt`, with all vectors of learned tokens.

    Args:
        tower: Tokenises them.
        prompt: The whole prompt.
        words: Words to find.
        ahead: Text before the words in the prompt, which chooses among several occurrences; the last one when left
            out.

    Raises:
        ConceptError: The words are not in the prompt as tokens (cut off, or merged with a neighbour), or not after
            that text.
    """
    ids = tower.prompt_ids(prompt, truncate=True)
    places = whole_words(tower, ids, words)
    if ahead is not None:
        place = tower.leading + len(tower.word_ids(ahead.rstrip()))
        places = [span for span in places if span.start == place]
    if not places:
        raise ConceptError(
            f"{words!r} is not found among the tokens of {prompt!r}: is the prompt longer than {tower.max_length} "
            "tokens, or is the word written together with its neighbours?"
        )
    first, last = places[-1].start, places[-1].stop - 1
    if not tower.causal:
        return Span(first, last, 0)
    learned = tower.learned_ids
    return Span(first, last, next((place for place in range(first, last) if ids[place] in learned), last))


def whole_words(tower: TextTower, ids: Sequence[int], words: str) -> list[slice]:
    """Find words among the tokens of a prompt, from left to right, except as parts of longer words."""
    places = occurrences(ids, spellings(tower, words), tower.leading)
    return [place for place in places if is_whole_word(tower, ids, place)]


def is_whole_word(tower: TextTower, ids: Sequence[int], place: slice) -> bool:
    """Whether tokens of a prompt are a whole word and not a part of a longer one."""
    if not tower.marks_starts:
        return True  # the end of a word is marked in its last token
    if ids[place.start] in tower.learned_ids:
        return True  # a learned token is never a part of another word, and has no mark
    around = list(ids[max(place.start - 1, 0) : place.stop + 1])
    pieces = tower.tokenizer.convert_ids_to_tokens(around)
    before = pieces.pop(0)[-1:] if place.start else ""
    # A separate mark token is the beginning of the word.
    continues = not pieces[0].startswith(START_OF_WORD) and (before.isalnum() or before == START_OF_WORD)
    behind = pieces[place.stop - place.start :]
    # Signs and the mark of the next word do not count as letters.
    return not continues and not (behind and behind[0][:1].isalnum())


PADDING = 16
"""Number of padding positions that represent all padding in bidirectional encoders."""


def telling_places(tower: TextTower, prompt: str) -> Tensor:
    """Choose the positions of a prompt whose states are collected, `(places,)` ascending.

    These are all positions in causal encoders. In bidirectional ones padding is long and its states are similar, so a
    few represent it; only the first is used for denoisers with a mask of padding.
    """
    places, length = torch.arange(tower.max_length), len(tower.prompt_ids(prompt, truncate=True))
    if tower.uses_attention_mask and not tower.causal:
        return places[: length + 1]
    padding = places[length:]
    if tower.causal or len(padding) <= PADDING:
        return places
    few = torch.linspace(0, len(padding) - 1, PADDING).round().long()
    return torch.cat([places[:length], padding[few]])


# Alignment -----------------------------------------------------------------------------------------------------------


def align(tower: TextTower, template: str, words: str, anchor: str) -> AlignedPrompt:
    """Align a phrasing of a concept with the same phrasing of its anchor.

    Tokens before the concept correspond to themselves; the concept's tokens to the anchor's last one; tokens after it
    to those after the anchor. With an empty anchor the words are removed, and the concept corresponds to the token
    that follows. Concept and anchor are those in the template's place, whatever else of the same name the phrasing
    contains.
    """
    prompt, ahead = template.format(words), template.partition("{}")[0]
    anchor_prompt = " ".join(template.format(anchor).split())
    first, last, start = subject_span(tower, prompt, words, ahead)
    anchor_last = subject_span(tower, anchor_prompt, anchor, ahead).last if anchor else first
    after = anchor_last + 1 if anchor else first
    positions = torch.arange(tower.max_length)
    positions[first : last + 1] = anchor_last
    positions[last + 1 :] = torch.arange(after, after + tower.max_length - last - 1).clamp(max=tower.max_length - 1)
    return AlignedPrompt(prompt, anchor_prompt, start, last, positions)


def aligned_prompts(tower: TextTower, concept: Concept, default_anchor: str = "") -> list[AlignedPrompt]:
    """Align all phrasings of a concept with its anchor.

    Raises:
        ConceptError: The concept has no known token.
    """
    anchor = default_anchor if concept.anchor is None else concept.anchor
    for words in concept.names:
        tower.check_words(words)
    return [align(tower, template, words, anchor) for words in concept.names for template in concept.phrasings()]


def paired_at_the_end(tower: TextTower, template: str, words: str, anchor: str) -> AlignedPrompt:
    """Align a prompt that ends with a concept with the anchor's prompt, by their last tokens.

    The last tokens before the end correspond, and so do the end token and padding. With an empty anchor the last token
    is that of the phrasing, or the start token when the phrasing has no other words.

    Raises:
        ConceptError: The concept has no known token.
    """
    tower.check_words(words)
    prompt, anchor_prompt = template.format(words), template.format(anchor).rstrip()
    last, anchor_last = (len(tower.prompt_ids(text, truncate=True)) - 2 for text in (prompt, anchor_prompt))
    # Without a start token the empty prompt has only its end token, which then replaces the concept.
    anchor_last = max(anchor_last, 0)
    positions = torch.arange(tower.max_length)
    positions[last:] = torch.arange(anchor_last, anchor_last + tower.max_length - last).clamp(max=tower.max_length - 1)
    return AlignedPrompt(prompt, anchor_prompt, last if tower.causal else 0, last, positions)


# Text ----------------------------------------------------------------------------------------------------------------


def without(prompt: str, concept: Concept) -> str:
    """Remove the concept's words from a prompt: every whole-word mention of every name, in any case.

    In scripts without spaces between words, a name may be next to other letters.

    Example:
        >>> without("a cartoon of a car", Concept("car"))
        'a cartoon of a'
    """
    for name in sorted(concept.names, key=len, reverse=True):
        words = r"\s+".join(map(re.escape, name.split()))
        pattern = f"{_edge(name[0], '(?<!')}{words}{_edge(name[-1], '(?!')}"
        prompt = re.sub(pattern, " ", prompt, flags=re.IGNORECASE)
    return " ".join(prompt.split())


def _edge(letter: str, opening: str) -> str:
    """Make a part of a pattern that allows no further letter of the same word beside a name's first or last letter."""
    return rf"{opening}\w)" if re.match(r"\w", letter) and not UNSPACED.match(letter) else ""
