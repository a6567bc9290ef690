"""Prompt lists of others: read from CSV, TSV, JSONL or the library `datasets`, each row accounted for.

Lists of one set go around under different column names. What tells them apart is therefore a hash of what the rows
say, and not of the file. Nothing is left out silently: rows that cannot be drawn are counted by reason.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from erasure.errors import EvaluationError
from erasure.eval.rows import Record
from erasure.extras import require
from erasure.files import digest, read_bytes, shown

if TYPE_CHECKING:
    from collections.abc import Callable

# No import of torch here: suites are listed without it.

LIMIT = 512 * 2**20
"""Bytes of a file."""
MOST_ROWS = 1_000_000
LONGEST, LONGEST_NAME = 100_000, 1_000
"""Characters of a prompt, and of the name of a class."""
LONGEST_FIELD = 10_000_000
"""Characters of a field of a table."""
HUB = "hf:"
"""Start of a source that is a data set of the Hub."""
ALIASES: Mapping[str, tuple[str, ...]] = {
    "prompt": ("prompt", "Prompt", "caption", "text", "TEXT"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    "width": ("sd_image_width", "width"),
    "height": ("sd_image_height", "height"),
    "classes": ("categories", "category", "class", "artist", "celebrity", "label_str", "concept", "name"),
    "role": ("role",),
    "negative": ("negative_prompt",),
    "nudity": ("nudity_percentage",),
}
"""Columns that say a thing, the ones that are looked for first in front."""
WORDS_FOR_NOTHING = frozenset({"null", "none", "nan", "n/a", "na", "nil"})
"""Texts that some programs take for a missing value. In a file of text they are words, and are drawn as such."""
ROLES = {
    "target": "target", "erase": "target", "unsafe": "target", "1": "target", "true": "target", "retain": "retain",
    "keep": "retain", "safe": "retain", "benign": "retain", "0": "retain", "false": "retain",
}  # fmt: skip
"""Words of a column `role`."""


class KnownList(NamedTuple):
    """A list that is known by the hash of its rows."""

    name: str
    licence: str
    """As far as its source says it."""


CARRIED = "MIT, of the repository that carries it; that of the list itself is not said there"
KNOWN: Mapping[str, KnownList] = {
    "14f4f571612e745f": KnownList("I2P", CARRIED),
    "c6dc960e69eb1cbe": KnownList("I2P, as Diffusion-MU-Attack carries it", CARRIED),
    "651d0e4028643072": KnownList("UnlearnDiffAtk, nudity", CARRIED),
    "23ab789696406cbf": KnownList("UnlearnDiffAtk, Van Gogh", CARRIED),
    "d69f6da799fc8278": KnownList("ESD, Van Gogh", CARRIED),
    "26ce228da785f1be": KnownList("ESD, artists", CARRIED),
    "c9ec0a242486c749": KnownList("ESD, ImageNet", CARRIED),
    "cf3737f1207c90ae": KnownList("ESD, Imagenette", CARRIED),
    "15b2ede7ee155587": KnownList("UCE, Imagenette", CARRIED),
    "0a276c060af581f1": KnownList("COCO-30k, as ESD and UCE carry it", CARRIED),
    "ed63a459d4934e86": KnownList("COCO-10k, as Diffusion-MU-Attack carries it", CARRIED),
}
"""Lists by their hash. None comes with this package."""
PLACES: Mapping[str, str] = {
    "i2p": "I2P is the data set AIML-TUDA/i2p of the Hub (hf:AIML-TUDA/i2p), and "
    "data/unsafe-prompts4703.csv of github.com/rohitgandikota/erasing",
    "nudity-benign": "give prompts of people without nudity, with a column role (retain); rows with nudity (target) "
    "are the positive control. The dual version of Six-CD (github.com/Artanisax/Six-CD, MIT) has both of each scene",
    "coco": "data/coco_30k.csv of github.com/rohitgandikota/erasing has captions of COCO with seeds",
}
"""Where lists can be had."""


@dataclass(frozen=True)
class PromptRow:
    """A row of a prompt list."""

    prompt: str
    number: int
    """Place in the list, from 0; of rows that were left out too."""
    seed: int | None = None
    """Of 64 bits; `None` where the list gives none."""
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    """In pixels."""
    classes: tuple[str, ...] = ()
    """Categories, or the class, artist or person that the prompt asks for."""
    role: str | None = None
    """`target` or `retain`; `None` where the list does not say."""
    negative: str = ""
    nudity: float | None = None
    """Share of images of Stable Diffusion that showed nudity when the list was made, in per cent (I2P)."""

    @property
    def canonical(self) -> list[object]:
        """Give the row's content, independent of column names."""
        return [self.prompt, self.seed, self.guidance, self.width, self.height, sorted(self.classes)]


@dataclass(frozen=True)
class PromptList:
    """The rows of a prompt list that can be drawn, and an account of the others."""

    rows: tuple[PromptRow, ...]
    source: str
    """Name of the file or data set, without the path."""
    fingerprint: str
    """Hash of what the rows say: copies with other column names have the same."""
    total: int
    """Rows in the source."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows that are left out, by reason."""
    repeated: int = 0
    """Rows whose text stood in an earlier row too; they are kept."""
    words_for_nothing: int = 0
    """Rows whose whole text is a word such as NULL; they are kept."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column that each thing was read from."""

    @property
    def known(self) -> KnownList | None:
        """Give the known list that this is; `None` for others."""
        return KNOWN.get(self.fingerprint)

    def recipe(self) -> Record:
        """Describe the list as recipes hold it."""
        known = self.known
        return {
            "name": known.name if known else "unknown list", "licence": known.licence if known else None,
            "hash": self.fingerprint, "source": self.source, "rows": self.total, "kept": len(self.rows),
            "dropped": dict(self.dropped), "repeated": self.repeated, "words_for_nothing": self.words_for_nothing,
            "columns": dict(self.columns),
        }  # fmt: skip


def read_prompts(source: str | Path) -> PromptList:
    """Read a prompt list.

    Args:
        source: A file that ends with .csv, .tsv or .jsonl; a folder that the library `datasets` reads or has saved; or
            `hf:NAME`, a data set of the Hub (its split `train`, or `hf:NAME:SPLIT`).

    Raises:
        EvaluationError: There is none, it is not UTF-8, has no column of prompts, a value is not what its column is
            of, or no row can be drawn.
        MissingExtraError: It needs the library `datasets`, which is not installed.
    """
    text = os.path.expanduser(str(source))
    if text.startswith(HUB):
        return collect_rows(_data_set(text.removeprefix(HUB)), text)
    if os.path.isdir(text):
        return collect_rows(_data_folder(text), Path(text).name)
    if not os.path.lexists(text):
        raise EvaluationError(
            f"no prompt list at {shown(text, 200)}: give a .csv, .tsv or .jsonl file, a folder of the library "
            "datasets, or hf:NAME"
        )
    readers: dict[str, Callable[[str, str], Iterator[Mapping[str, object]]]] = {
        ".csv": _table, ".tsv": _table, ".jsonl": _lines,
    }  # fmt: skip
    ending = Path(text).suffix.lower()
    if ending not in readers:
        raise EvaluationError(
            f"the prompt list {shown(text, 200)} ends with {ending!r}: expected .csv, .tsv or .jsonl"
        )
    return collect_rows(readers[ending](_decoded(text), text), Path(text).name)


def _decoded(path: str) -> str:
    """The text of a file in UTF-8, with or without a mark of it at the start."""
    content = bytes(read_bytes(path, LIMIT, error=EvaluationError))
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise EvaluationError(f"the prompt list {shown(path, 200)} is UTF-16: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise EvaluationError(
            f"the prompt list {shown(path, 200)} is not UTF-8 (line {line}, byte 0x{content[error.start]:02x}): save "
            "it as UTF-8"
        ) from error
    if "\0" in text:
        raise EvaluationError(f"the prompt list {shown(path, 200)} holds NUL characters: it is no text, or damaged")
    return text


def _table(text: str, path: str) -> Iterator[Mapping[str, object]]:
    """Read the rows of a CSV or TSV file, by its ending."""
    separator = "\t" if path.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    usual = csv.field_size_limit(LONGEST_FIELD)
    try:
        header = next(reader, None)
        if not header or not any(map(str.strip, header)):
            raise EvaluationError(
                f"the prompt list {shown(path, 200)} has no header: its first line names the columns"
            )
        names = [name.strip() for name in header]
        if double := next((name for name in names if name and names.count(name) > 1), None):
            raise EvaluationError(
                f"the prompt list {shown(path, 200)} has two columns called {shown(double)}: rename one"
            )
        yield dict.fromkeys(names)  # the columns, ahead of the rows
        for values in reader:
            if not values:
                continue  # an empty line is no row
            if len(values) != len(names):
                raise EvaluationError(
                    f"line {reader.line_num} of the prompt list {shown(path, 200)} has {len(values)} values, its "
                    f"header {len(names)} columns: put texts that hold {separator!r} or line breaks in quotes"
                )
            yield dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise EvaluationError(f"line {reader.line_num} of the prompt list {shown(path, 200)}: {error}") from error
    finally:
        csv.field_size_limit(usual)


def _lines(text: str, path: str) -> Iterator[Mapping[str, object]]:
    """Read the rows of a file with one JSON object per line."""
    rows: list[Mapping[str, object]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise EvaluationError(
                f"line {number} of the prompt list {shown(path, 200)} is no JSON: {error}"
            ) from error
        if not isinstance(row, dict):
            raise EvaluationError(
                f"line {number} of the prompt list {shown(path, 200)} is {type(row).__name__}, expected an object"
            )
        rows.append(row)
    yield dict.fromkeys(name for row in rows for name in row)
    yield from rows


def _data_set(name: str) -> Iterator[Mapping[str, object]]:
    """Read the rows of a dataset of the Hub."""
    datasets = require("datasets")
    base, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(base, split=split or "train")
    except Exception as error:  # the library fails in many ways
        raise EvaluationError(
            f"the data set {shown(base, 200)} (split {split or 'train'}) cannot be read "
            f"({_reason(error)}): check its name, its "
            "split and the connection, or download it and give the file"
        ) from error
    yield dict.fromkeys(found.column_names)
    yield from found


def _data_folder(folder: str) -> Iterator[Mapping[str, object]]:
    """Read the rows of a folder that the library `datasets` has saved, or can read."""
    datasets = require("datasets")
    saved = any(os.path.lexists(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(folder) if saved else datasets.load_dataset(folder, split="train")
        if isinstance(found, datasets.DatasetDict):
            if "train" not in found and len(found) != 1:
                raise EvaluationError(f"it has the splits {sorted(found)}: save one of them")
            found = found["train"] if "train" in found else next(iter(found.values()))
    except Exception as error:  # the library fails in many ways
        raise EvaluationError(
            f"the folder {shown(folder, 200)} is no data set that can be read "
            f"({_reason(error)}): give a file, or what "
            "save_to_disk of the library datasets has written"
        ) from error
    yield dict.fromkeys(found.column_names)
    yield from found


def _reason(error: Exception) -> str:
    """Describe an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def collect_rows(rows: Iterable[Mapping[str, object]], source: str) -> PromptList:
    """Collect the rows of a list that can be drawn.

    Args:
        rows: Names of all columns first, then the rows.
        source: Name for messages and recipes.

    Raises:
        EvaluationError: See `read_prompts`.
    """
    given = iter(rows)
    columns = columns_of(next(given, {}), source)
    kept: list[PromptRow] = []
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    texts: set[str] = set()
    total = repeated = words = 0
    for number, row in enumerate(given):
        if number >= MOST_ROWS:
            raise EvaluationError(f"the prompt list {shown(source, 200)} has more than {MOST_ROWS:,} rows: split it")
        total += 1
        made = _row(_Cells(row, number, columns, source))
        if not made.prompt:
            dropped["no prompt"] += 1
            continue
        # Without a seed of its own a row gets one by how often its text has come, and so another image.
        same = json.dumps(made.canonical)
        if made.seed is not None and same in seen:
            dropped["the same row twice"] += 1
            continue
        seen.add(same)
        repeated += made.prompt in texts
        texts.add(made.prompt)
        words += made.prompt.casefold() in WORDS_FOR_NOTHING
        kept.append(made)
    if not kept:
        raise EvaluationError(
            f"the prompt list {shown(source, 200)} has no row that can be drawn ({total} rows; left out: "
            f"{dict(dropped) or 'none'})"
        )
    fingerprint = digest([row.canonical for row in kept])[:16]
    return PromptList(tuple(kept), source, fingerprint, total, dict(dropped), repeated, words, columns)


def columns_of(names: Mapping[str, object] | Sequence[str], source: str) -> dict[str, str]:
    """Map column names to fields.

    Raises:
        EvaluationError: None is of prompts.
    """
    found = {
        thing: column
        for thing, aliases in ALIASES.items()
        if (column := next((a for a in aliases if a in names), None))
    }
    if "prompt" not in found:
        raise EvaluationError(
            f"the prompt list {shown(source, 200)} has no column of prompts: expected one of "
            f"{', '.join(ALIASES['prompt'])}; found: {shown([name for name in names if name][:20], 300)}"
        )
    return found


@dataclass(frozen=True)
class _Cells:
    """The cells of one row of a list, by what they hold."""

    row: Mapping[str, object]
    number: int
    """Place of the row in the list, counted from 0."""
    columns: Mapping[str, str]
    """Column of each thing that the list has."""
    source: str
    """Name of the list, for messages."""

    def value(self, thing: str) -> object:
        """What the cell holds; `None` where it is empty or the list has no such column."""
        found = self.row.get(self.columns[thing]) if thing in self.columns else None
        return None if isinstance(found, str) and not found.strip() else found

    def refusal(self, thing: str, expected: str) -> EvaluationError:
        """The error for a cell that holds something else than is expected."""
        return EvaluationError(
            f"row {self.number + 1} of the prompt list {shown(self.source, 200)}: {self.columns[thing]} is "
            f"{shown(self.value(thing))}, expected {expected}"
        )

    def text(self, thing: str) -> str:
        """A text, empty where there is none."""
        found = self.value(thing)
        if found is not None and not isinstance(found, str):
            raise self.refusal(thing, "a text")
        return (found or "").strip()

    def number_of(self, thing: str, least: float, most: float) -> float | None:
        """A number within bounds."""
        found = self.value(thing)
        if found is None:
            return None
        expected = f"a number from {least:g} to {most:g}"
        try:
            read = float(str(found))
        except ValueError:
            raise self.refusal(thing, expected) from None
        if isinstance(found, bool) or not (math.isfinite(read) and least <= read <= most):
            raise self.refusal(thing, expected)
        return read

    def whole(self, thing: str, most: int) -> int | None:
        """A whole number from 0 on."""
        found = self.value(thing)
        if found is None:
            return None
        expected = f"a whole number from 0 to {most}"
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        try:  # a float has too few digits for 64 bits
            read = int(str(found).strip().removesuffix(".0"))
        except ValueError:
            raise self.refusal(thing, expected) from None
        if isinstance(found, bool) or not 0 <= read <= most:
            raise self.refusal(thing, expected)
        return read

    def classes(self) -> tuple[str, ...]:
        """Names of classes."""
        return _classes(self.value("classes"), self.columns.get("classes") == "categories")

    def check_letters(self, thing: str, text: str, most: int) -> None:
        """Refuse a text that is too long, or holds halves of letters."""
        if len(text) > most or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise self.refusal(thing, f"a text of Unicode with at most {most:,} characters")


def _row(cells: _Cells) -> PromptRow:
    """Read a row.

    Raises:
        EvaluationError: A cell holds something else than is expected there.
    """
    prompt, classes = cells.text("prompt"), cells.classes()
    cells.check_letters("prompt", str(cells.value("prompt") or ""), LONGEST)
    for name in classes:
        cells.check_letters("classes", name, LONGEST_NAME)
    role = cells.value("role")
    if role is not None and str(role).strip().casefold() not in ROLES:
        raise cells.refusal("role", "target or retain")
    negative = cells.text("negative")
    width, height = (cells.whole(name, 8192) for name in ("width", "height"))
    return PromptRow(
        prompt=prompt, number=cells.number, seed=cells.whole("seed", 2**64 - 1),
        guidance=cells.number_of("guidance", 0, 1000), width=width or None, height=height or None,
        classes=classes, role=None if role is None else ROLES[str(role).strip().casefold()],
        negative=negative, nudity=cells.number_of("nudity", 0, 100),
    )  # fmt: skip


def _classes(value: object, several: bool) -> tuple[str, ...]:
    """Classes of a row: a list, or a text, which holds several with commas between them where the column says so."""
    if value is None:
        return ()
    if isinstance(value, list | tuple):
        parts = [str(part) for part in value]
    else:
        parts = str(value).split(",") if several else [str(value)]
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))
