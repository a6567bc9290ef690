r"""Concepts as people write them in one text: lists, kinds and anchors.

cat                       one concept, which is what the model's world says it is
cat, dog                  two; `;`, `|` and line breaks part them as well
Van Gogh:style            a style
Van Gogh:style>painting   a style in whose place there will be a painting
cat>dog                   a cat, in whose place there will be a dog
cat>                      a cat in whose place there will be nothing: its words are taken out of prompts
"Tyler, the Creator"      one concept: in double quotes, every character is part of the name
Tyler\, the Creator       the same: so is a character behind a backslash
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, get_args

from erasure.concept import PLACEHOLDER, Kind
from erasure.errors import ConceptError, ConceptWarning
from erasure.files import shown

COMMAS = ",，、،"
BREAKS = ";；؛|｜\n\r"
QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»"}
SPECIAL = f'{COMMAS}{BREAKS}\\:>_"'
"""Special characters, which a backslash makes part of a name."""
KINDS = get_args(Kind)
LONGEST_LIST = 30_000
"""Largest number of characters of a text that names concepts."""
HOW = "in double quotes every character is part of the name, and so is one behind a backslash"
JOINERS = re.compile(r"\s+(?:and|&|\+)\s+", re.IGNORECASE)
PART_OF_A_NAME = re.compile(r"(the|of|jr\.?|sr\.?|i{1,3}|iv|ph\.?d\.?|inc\.?|([a-z]\.)+)(\s|$)", re.IGNORECASE)
"""Pattern of the beginning of a part of a name after a comma, as in "Tyler, the Creator" and "Martin Luther King,
Jr."."""


@dataclass(frozen=True)
class ConceptRequest:
    """One concept as written by a user; fields that are `None` are filled in by the model's world."""

    target: str
    kind: Kind | None = None
    anchor: str | None = None
    """Words of the anchor; "" for no replacement."""
    retain: tuple[str, ...] | None = None
    synonyms: tuple[str, ...] | None = None
    templates: tuple[str, ...] = ()


class Character(NamedTuple):
    """One character of a text."""

    value: str
    literal: bool
    """Whether the character is part of a name even if it is a special character."""


Known = Callable[[str], bool]
"""Says whether a model knows a text as one word."""


def parse_concepts(text: str, known: Known = lambda word: False) -> list[ConceptRequest]:
    """Parse the concepts of a text in the syntax of this module.

    Args:
        text: Text from the user.
        known: Says whether the model knows a word, such as "cat". A list of known words only is certainly a list.

    Raises:
        ConceptError: The text names no concept, or is ambiguous.
    """
    if len(text) > LONGEST_LIST:
        raise ConceptError(f"a list of concepts has {len(text):,} characters, at most {LONGEST_LIST:,} are allowed")
    if known(text):
        return [ConceptRequest(_clean(_characters(text), known))]
    parts, doubtful = _parts(text, known)
    requests = [_request(part, known) for part in parts]
    if not requests:
        raise ConceptError(f"{shown(text)} names no concept, it is empty: name one, for instance 'Van Gogh'")
    names = [request.target for request in requests]
    if doubtful and not all(known(name) for name in names):
        doubted = [name for name in names[1:] if PART_OF_A_NAME.match(name)]
        listed, quoted = "; ".join(names), f'"{text.strip()}"'
        if doubted:
            raise ConceptError(
                f"{shown(text)} may be one name or a list of {len(names)} concepts: write {listed!r} for the list, or "
                f"{quoted!r} for the name ({HOW})"
            )
        warnings.warn(
            f"{shown(text)} is taken for {len(names)} concepts: {listed}. For one name write {quoted!r} ({HOW})",
            ConceptWarning,
            stacklevel=2,
        )
    return requests


def parse_names(texts: Sequence[str], known: Known = lambda word: False) -> tuple[str, ...]:
    """Parse names without kinds and anchors, for instance of a retain list; each text may be a list.

    Raises:
        ConceptError: See `parse_concepts`.
    """
    found = []
    for text in texts:
        for request in parse_concepts(text, known):
            if request.kind is not None or request.anchor is not None:
                raise ConceptError(
                    f"{shown(text)} names a kind or an anchor, which goes with what is erased only ({HOW})"
                )
            found.append(request.target)
    return tuple(found)


def _parts(text: str, known: Known) -> tuple[list[list[Character]], bool]:
    """Split a list into items, and say whether a comma may be part of a name instead."""
    parts: list[list[Character]] = [[]]
    characters = _characters(text)
    commas = False
    for index, character in enumerate(characters):
        value, literal = character
        number = (
            value in COMMAS
            and 0 < index < len(characters) - 1
            and (characters[index - 1].value.isdigit() and characters[index + 1].value.isdigit())
        )
        if literal or value not in COMMAS + BREAKS or number:
            parts[-1].append(character)
        else:
            commas |= value in COMMAS
            parts.append([])
    parts = [part for part in map(_stripped, parts) if part]
    if parts:
        # "cat, dog and bird" and "cat and dog", of which the second may be a name.
        last = _joined(parts[-1], known, beyond_doubt=commas and len(parts) > 1)
        parts[-1:] = last
    return parts, commas and len(parts) > 1


def _joined(part: list[Character], known: Known, *, beyond_doubt: bool) -> list[list[Character]]:
    """Split an item at "and", where it joins two items and is not part of a name."""
    plain = "".join("\0" if literal else value for value, literal in part)
    if beyond_doubt and (leading := re.match(r"(and|&|\+)\s+", plain, re.IGNORECASE)):
        return [_stripped(part[leading.end() :])]
    found = list(JOINERS.finditer(plain))
    if not found:
        return [part]
    ends = [0, *(end for match in found for end in match.span()), len(part)]
    items = [_stripped(part[start:end]) for start, end in zip(ends[::2], ends[1::2], strict=True)]
    names = [_request(item, known).target for item in items if item]
    if all(map(known, names)) or (beyond_doubt and len(found) == 1):
        return [item for item in items if item]
    said = "".join(value for value, _ in part)
    warnings.warn(
        f"{shown(said)} is taken for one concept. For {len(names)} write {'; '.join(names)!r}; in double quotes it is "
        "one without this warning",
        ConceptWarning,
        stacklevel=2,
    )
    return [part]


def _request(part: list[Character], known: Known) -> ConceptRequest:
    """Parse one item of a list, `NAME[:KIND][>ANCHOR]`."""
    said = "".join(value for value, _ in part)
    arrows = [index for index, character in enumerate(part) if character == (">", False)]
    if len(arrows) > 1:
        raise ConceptError(f"{shown(said)} has more than one '>': write NAME:KIND>ANCHOR ({HOW})")
    name, anchor = (part[: arrows[0]], part[arrows[0] + 1 :]) if arrows else (part, None)
    if anchor is not None and name and name[-1] in (("-", False), ("=", False)):
        name = name[:-1]  # "cat -> dog"
    name, kind = _kind(name, said)
    if not (target := _clean(name, known)):
        raise ConceptError(
            f"{shown(said)} names no concept: write NAME:KIND>ANCHOR, for instance Van Gogh:style>painting"
        )
    if anchor is None:
        return ConceptRequest(target, kind)
    if _kind(anchor, said)[1] is not None:
        raise ConceptError(f"{shown(said)} has the kind behind the anchor: write NAME:KIND>ANCHOR ({HOW})")
    return ConceptRequest(target, kind, _clean(anchor, known))


def _kind(name: list[Character], said: str) -> tuple[list[Character], Kind | None]:
    """Split off the kind after the last colon of a name.

    A colon that is followed by a space is part of a name, as in "Terminator 2: Judgment Day", unless a kind follows.
    """
    colons = [index for index, character in enumerate(name) if character == (":", False)]
    if not colons:
        return name, None
    behind = name[colons[-1] + 1 :]
    written = "".join(value for value, literal in behind if not literal)
    for kind in KINDS:
        if written.strip().casefold() == kind and len(written) == len(behind):
            return name[: colons[-1]], kind
    if written[:1].isspace():
        return name, None
    raise ConceptError(
        f"unknown kind {''.join(value for value, _ in behind)!r} in {shown(said)}; allowed: {', '.join(KINDS)}. Where "
        f"the colon is part of the name: {HOW}"
    )


def _characters(text: str) -> list[Character]:
    r"""Remove quotes and backslashes from a text.

    Raises:
        ConceptError: Quotes are opened and not closed.
    """
    found: list[Character] = []
    index, begins = 0, True
    while index < len(text):
        value = text[index]
        if value == "\\" and text[index + 1 : index + 2] and text[index + 1] in SPECIAL:
            found.append(Character(text[index + 1], True))
            index, begins = index + 2, False
            continue
        whole = _quoted(text, index) if begins and value in QUOTES else PLACEHOLDER.match(text, index)
        if whole:
            found += [Character(inner, True) for inner in whole[whole.lastindex or 0]]
            index, begins = whole.end(), False
            continue
        found.append(Character(value, False))
        begins = value in f"{COMMAS}{BREAKS}>" or (begins and value.isspace())
        index += 1
    return found


def _quoted(text: str, start: int) -> re.Match[str] | None:
    """Match quotes that hold a whole name; `"Weird Al" Yankovic` has quotes of another kind."""
    closing = re.escape(QUOTES[text[start]])
    found = re.compile(rf".([^{closing}]*){closing}\s*(?=[{re.escape(COMMAS + BREAKS)}:>]|$)").match(text, start)
    if found is None and not re.compile(rf".[^{closing}]*{closing}").match(text, start):
        raise ConceptError(f"{shown(text)} has a quote that is not closed: close it, or write \\{text[start]}")
    return found


def _stripped(part: list[Character]) -> list[Character]:
    """Strip blanks from both ends of a part."""
    inner = [index for index, (value, literal) in enumerate(part) if literal or not value.isspace()]
    return part[inner[0] : inner[-1] + 1] if inner else []


def _clean(part: list[Character], known: Known) -> str:
    """Normalise a name for the tokeniser.

    Characters get their usual form (for instance full-width letters), spaces are single, and underscores, which
    replace spaces in file names, become spaces.
    """
    inner = _stripped(part)
    written = _usual_form(inner)
    if "_" not in written or known(written):
        return written
    plain = _usual_form([Character(" ", False) if character == ("_", False) else character for character in inner])
    if plain != written:
        warnings.warn(
            f"{shown(written)} is taken for {plain!r}, as prompts write it: {HOW}", ConceptWarning, stacklevel=2
        )
    return plain


def _usual_form(part: Sequence[Character]) -> str:
    """Give the text, with characters that are not literal in their usual form."""
    runs = [
        unicodedata.normalize("NFC" if literal else "NFKC", "".join(character.value for character in run))
        for literal, run in groupby(part, key=lambda character: character.literal)
    ]
    return " ".join("".join(runs).split())
