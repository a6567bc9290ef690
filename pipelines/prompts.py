"""Texts beside one another: one for all pictures of a call, or one for each."""

from __future__ import annotations

from collections.abc import Iterable

from erasure.errors import OptionError
from erasure.interop.protocols import Settings

BESIDE_PROMPTS = ("prompt_2", "negative_prompt", "negative_prompt_2")
"""Texts of stock calls of which several prompts need one each."""


def texts_of(name: str, given: object) -> list[str]:
    """Texts that were given as one or as several.

    Args:
        name: The option's name, for messages.
        given: A text, or a list of them.

    Raises:
        OptionError: Something else, or none.
    """
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"{name} is {given!r}: give a text, or a list of texts")
    return texts


def one_for_each(name: str, given: object, count: int) -> list[str]:
    """Texts for `count` pictures or prompts, where one may stand for all.

    Args:
        name: The option's name, for messages.
        given: A text, or a list of them.
        count: How many are wanted.

    Raises:
        OptionError: No text, or another number of them.
    """
    texts = texts_of(name, given)
    if isinstance(given, str):
        return texts * count
    if len(texts) != count:
        raise OptionError(f"{name} has {len(texts)} texts for {count}: give one for all, or {count}")
    return texts


def for_each(options: Settings, count: int, repeats: int = 1) -> Settings:
    """Options of a stock call for several prompts, where one text may stand for all.

    Args:
        options: As a user gave them.
        count: How many texts a user may give.
        repeats: How often each of them is handed on, next to one another.

    Raises:
        OptionError: Another number of texts.
    """
    given = {name: value for name in BESIDE_PROMPTS if (value := options.get(name)) is not None}
    each = {name: one_for_each(name, value, count) for name, value in given.items()}
    return {**options, **{name: [text for text in texts for _ in range(repeats)] for name, texts in each.items()}}
