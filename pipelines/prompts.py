"""Texts of a call: one for all pictures, or one for each."""

from __future__ import annotations

from collections.abc import Iterable

from erasure.errors import OptionError
from erasure.interop.protocols import Settings

BESIDE_PROMPTS = ("prompt_2", "negative_prompt", "negative_prompt_2")
"""Text arguments of stock calls that need one text for each of several prompts."""


def texts_of(name: str, given: object) -> list[str]:
    """Read one text or several as a list.

    Args:
        name: The option's name, for messages.
        given: A text, or a list of them.

    Raises:
        OptionError: The value is not a text or a list of texts, or is empty.
    """
    texts = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise OptionError(f"{name} is {given!r}: give a text, or a list of texts")
    return texts


def one_for_each(name: str, given: object, count: int) -> list[str]:
    """Give texts for `count` pictures or prompts; one text may be used for all.

    Args:
        name: The option's name, for messages.
        given: A text, or a list of them.
        count: Number of texts.

    Raises:
        OptionError: There is no text, or another number of texts.
    """
    texts = texts_of(name, given)
    if isinstance(given, str):
        return texts * count
    if len(texts) != count:
        raise OptionError(f"{name} has {len(texts)} texts for {count}: give one for all, or {count}")
    return texts


def for_each(options: Settings, count: int, repeats: int = 1) -> Settings:
    """Expand the options of a stock call for several prompts, where one text may be used for all.

    Args:
        options: Options from the user.
        count: Number of texts that a user may give.
        repeats: Number of times that each text is repeated in succession.

    Raises:
        OptionError: The number of texts is wrong.
    """
    given = {name: value for name in BESIDE_PROMPTS if (value := options.get(name)) is not None}
    each = {name: one_for_each(name, value, count) for name, value in given.items()}
    return {**options, **{name: [text for text in texts for _ in range(repeats)] for name, texts in each.items()}}
