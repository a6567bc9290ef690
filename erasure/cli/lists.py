"""Files of prompts and of concepts that users keep: CSV, TSV, JSON, JSON lines, or a text with one on each line."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from erasure.cli.arguments import UsageError
from erasure.files import is_line, lines_of, read_table, read_text, shown
from erasure.files.reading import parsed
from erasure.parsing import KINDS, ConceptRequest

ENDINGS = (".csv", ".tsv", ".txt", ".json", ".jsonl")
"""Endings of files that hold lists."""
DELIMITERS = ",;\t"
LONGEST_PROMPT = 20_000
"""Characters of a prompt."""
LONGEST_PATH = 4096
MOST_GUIDANCE = 1000
"""Largest guidance scale."""

PROMPT = ("prompt", "prompts", "caption", "text")
NEGATIVE = ("negative_prompt", "negative")
SEED = ("seed", "evaluation_seed", "sd_seed")
GUIDANCE = ("guidance", "guidance_scale", "evaluation_guidance", "sd_guidance_scale")
STEPS = ("steps", "num_inference_steps", "evaluation_steps")
HEIGHT = ("height", "image_height", "sd_image_height")
WIDTH = ("width", "image_width", "sd_image_width")
"""Names of columns: ours, those of the files that UCE and ESD are evaluated on, and those of I2P."""
CONCEPT = ("concept", "target", "name", "word")
FIELDS = ("kind", "anchor", "retain", "synonyms", "templates")


@dataclass(frozen=True)
class PromptRow:
    """One prompt, and how it is drawn where the file says it."""

    prompt: str
    negative_prompt: str | None = None
    seed: int | None = None
    guidance: float | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None


Cells = Mapping[str, JsonValue]
"""Values of a row by column."""


def is_list_file(text: str) -> bool:
    """Whether a text names a file that holds a list: one that is there, with an ending of such files.

    A word that happens to be the name of another file is a word.

    Raises:
        UsageError: It looks like the name of a file that is not there, or is the path of a folder or of another file.
    """
    if len(text) > LONGEST_PATH or not is_line(text):
        return False
    path = Path(text)
    if os.path.isfile(text):
        if path.suffix.lower() in ENDINGS:
            return True
        if path.suffix or os.path.basename(text) != text:
            raise UsageError(
                f"{shown(text)} is a file, and a list ends with {', '.join(ENDINGS)}: rename it, or write the text "
                "otherwise"
            )
    if os.path.isdir(text) and len(path.parts) > 1:
        raise UsageError(f"{text} is a folder: name a file in it ({', '.join(ENDINGS)})")
    in_a_folder = len(path.parts) > 1 and os.path.isdir(path.parent)
    if path.suffix.lower() in ENDINGS and (in_a_folder or len(text.split()) == 1):
        raise UsageError(f"there is no file {shown(text)}: check the name, or write it without its ending as a text")
    return False


def read_prompts(path: str | Path) -> list[PromptRow]:
    """The prompts of a file.

    Raises:
        UsageError: It cannot be read, or has no prompts; a row that cannot be drawn, with its line.
    """
    made = []
    for where, row in _rows(path, PROMPT):
        cells = {"prompt": row} if isinstance(row, str) else row
        made.append(
            PromptRow(
                prompt=_text(cells, PROMPT, where) or _missing(where, PROMPT[0]),
                negative_prompt=_text(cells, NEGATIVE, where),
                seed=_integer(cells, SEED, where, -(2**63), 2**64 - 1),
                guidance=_number(cells, GUIDANCE, where, 0, MOST_GUIDANCE),
                steps=_integer(cells, STEPS, where, 1, 10_000),
                height=_integer(cells, HEIGHT, where, 8, 16_384),
                width=_integer(cells, WIDTH, where, 8, 16_384),
            )
        )
    if not made:
        raise UsageError(f"{path} holds no prompt: write one on each line, or in a CSV file's column '{PROMPT[0]}'")
    return made


def read_concepts(path: str | Path) -> list[ConceptRequest | str]:
    """The concepts of a file: texts as on the command line, or rows with the fields of a concept.

    Lines of a text file that begin with `#` are remarks. The columns of a CSV file are `concept`, `kind`, `anchor`,
    `retain`, `synonyms` and `templates`, the last three with `;` between words or templates; an empty cell leaves the
    choice to the model's world, and `-` as an anchor stands for nothing. A file with no other column than `concept`
    holds texts.

    Raises:
        UsageError: It cannot be read, or has no concepts; a row that cannot be one, with its line.
    """
    made: list[ConceptRequest | str] = []
    for where, row in _rows(path, CONCEPT):
        cells = {CONCEPT[0]: row} if isinstance(row, str) else row
        if unknown := [name for name in cells if name not in (*CONCEPT, *FIELDS)]:
            raise UsageError(f"{where} has unknown columns {unknown[:6]}; allowed: {', '.join((CONCEPT[0], *FIELDS))}")
        target = _text(cells, CONCEPT, where) or _missing(where, CONCEPT[0])
        if not cells.keys() & set(FIELDS):
            if not (isinstance(row, str) and target.startswith("#")):
                made.append(target)
            continue
        kind, anchor = _text(cells, ("kind",), where), cells.get("anchor")
        if kind is not None and (kind := kind.lower()) not in KINDS:
            raise UsageError(f"{where} has the kind {shown(kind)}; allowed: {', '.join(KINDS)}")
        if anchor is not None and anchor != "":
            anchor = _text(cells, ("anchor",), where)
        made.append(
            ConceptRequest(
                target,
                next((known for known in KINDS if known == kind), None),
                "" if anchor == "-" else anchor,
                _words(cells, "retain", where),
                _words(cells, "synonyms", where),
                _words(cells, "templates", where) or (),
            )
        )
    if not made:
        raise UsageError(f"{path} holds no concept: write one on each line, or in a CSV file's column '{CONCEPT[0]}'")
    return made


def _missing(where: str, column: str) -> str:
    raise UsageError(f"{where} has no {column}: write one, or take the row out")


# Rows ----------------------------------------------------------------------------------------------------------------


def _rows(path: str | Path, needed: Sequence[str]) -> Iterator[tuple[str, str | Cells]]:
    """The rows of a file, each with its place for messages: a text, or values by column.

    Raises:
        UsageError: It cannot be read; a row that is none.
    """
    content = read_text(path, error=UsageError)
    ending = Path(path).suffix.lower()
    if ending in (".csv", ".tsv"):
        yield from _table(str(path), content, needed)
        return
    if ending == ".json":
        listed: list[JsonValue] = parsed(content.encode(), list[JsonValue], str(path), error=UsageError)
        items: Iterator[tuple[str, JsonValue]] = ((f"{path}, item {n}", item) for n, item in enumerate(listed, 1))
    else:
        lines = ((f"{path}, line {n}", line.strip()) for n, line in enumerate(lines_of(content), 1) if line.strip())
        if ending != ".jsonl":
            yield from lines
            return
        items = ((where, parsed(line.encode(), JsonValue, where, error=UsageError)) for where, line in lines)
    for where, item in items:
        if isinstance(item, str):
            yield where, item
        elif isinstance(item, dict):
            yield where, {_column(name): value for name, value in item.items() if value is not None}
        else:
            raise UsageError(f"{where} is {shown(item)}: write a text, or an object with a '{needed[0]}'")


def _table(path: str, content: str, needed: Sequence[str]) -> Iterator[tuple[str, Cells]]:
    """The rows of a CSV file below its header, whatever stands between its columns."""
    header = next((line for line in lines_of(content) if line.strip()), "")
    columns = {mark: [_column(name.strip('"')) for name in header.split(mark)] for mark in DELIMITERS}
    mark = next((mark for mark, present in columns.items() if set(present) & set(needed)), None)
    if mark is None:
        found = ", ".join(columns[","][:8])
        raise UsageError(
            f"{path} has no column '{needed[0]}' (found: {shown(found)[1:-1]}): name the columns on the first line"
        )
    _, rows = read_table(content, path, mark, error=UsageError, column=_column)
    for line, cells in rows:
        yield f"{path}, line {line}", {name: cell.strip() for name, cell in cells.items() if cell.strip()}


def _column(name: str) -> str:
    """The name of a column as it is looked up."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


# Cells ---------------------------------------------------------------------------------------------------------------


def _cell(cells: Cells, names: Sequence[str]) -> JsonValue:
    """The value of the first column of some that a row has."""
    return next((cells[name] for name in names if cells.get(name) not in (None, "")), None)


def _text(cells: Cells, names: Sequence[str], where: str) -> str | None:
    value = _cell(cells, names)
    if value is None:
        return None
    text = " ".join(value.split()) if isinstance(value, str) else None
    if text is None or len(text) > LONGEST_PROMPT or not is_line(text):
        raise UsageError(
            f"{where} has {shown(value)} as {names[0]}: write a text of at most {LONGEST_PROMPT:,} characters"
        )
    return text or None


def _number(cells: Cells, names: Sequence[str], where: str, least: float, most: float) -> float | None:
    value = _cell(cells, names)
    if value is None:
        return None
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) and value.lower() == "nan":  # an empty cell, as pandas writes it when told to
        return None
    if not least <= number <= most:
        raise UsageError(f"{where} has {shown(value)} as {names[0]}; allowed: a number from {least:g} to {most:g}")
    return number


def _integer(cells: Cells, names: Sequence[str], where: str, least: int, most: int) -> int | None:
    """A whole number, which pandas may have written as `4188.0`."""
    value = _cell(cells, names)
    text = str(value).removesuffix(".0")
    if value is None or text.lower() == "nan":
        return None
    if isinstance(value, bool) or not re.fullmatch(r"-?\d{1,20}", text) or not least <= int(text) <= most:
        raise UsageError(f"{where} has {shown(value)} as {names[0]}; allowed: a whole number from {least} to {most}")
    return int(text)


def _words(cells: Cells, name: str, where: str) -> tuple[str, ...] | None:
    """Several words: a list, or a text with `;` between them."""
    value = cells.get(name)
    words = value.split(";") if isinstance(value, str) else value
    if words is None:
        return None
    if not isinstance(words, list) or not all(isinstance(word, str) and is_line(word) for word in words):
        raise UsageError(
            f"{where} has {shown(value)} as {name}: write words with ';' between them, or a list of texts"
        )
    return tuple(word.strip() for word in map(str, words) if word.strip())
