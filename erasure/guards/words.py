"""Whether a text contains a name or an anchor of an erasure's concepts, by an index of words.

The words of an erasure are indexed once by the first run of letters and digits in each. The cost of a check depends on
the length of the text, not on the number of concepts.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping

from erasure.artifact import Erasure

Sorted = Mapping[str, list[str]]
"""Words in lower case, by the first run of letters and digits in each; words of signs alone by the empty text."""
_KNOWN: weakref.WeakKeyDictionary[Erasure, Sorted] = weakref.WeakKeyDictionary()
_RUN = re.compile(r"\w+")


def words_of(erasure: Erasure) -> Sorted:
    """The names and anchors of an erasure's concepts, sorted when they are asked for first."""
    if erasure not in _KNOWN:
        found: dict[str, list[str]] = {}
        for concept in erasure.concepts:
            for word in (*concept.names, concept.anchor):
                plain = (word or "").casefold()
                run = _RUN.search(plain)
                if plain:
                    found.setdefault(run[0] if run else "", []).append(plain)
        _KNOWN[erasure] = found
    return _KNOWN[erasure]


def is_named(erasure: Erasure, text: str) -> bool:
    """Whether a lower-case text contains a name or an anchor of an erasure's concepts as a whole word."""
    known = words_of(erasure)
    likely = (word for run in {"", *_RUN.findall(text)} for word in known.get(run, ()))
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in likely)
