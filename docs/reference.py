"""Writes what pages have of the registry and of measured figures: `python docs/reference.py`.

It writes a page for every method, `docs/reference/NAME.md`, and in README and all other pages the tables that stand
between `<!-- table: NAME -->` and `<!-- end of table -->`, from the files of `docs/measured`. How each table is laid
out says `erasure.assets.build.tables`. Nothing is measured here, and tests compare the pages with what this writes.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erasure.assets.build.measured import Measured, Row
from erasure.assets.build.tables import (
    ABSENT,
    EVERY_METHOD,
    FAMILIES,
    OF_EVERY_METHOD,
    OF_FAMILY,
    SHARED,
    TABLES,
    Shown,
    Table,
    markdown,
)
from erasure.cli.described import options_of
from erasure.errors import ErasureError, EvaluationError
from erasure.registry import Facts
from erasure.strategies import STRATEGIES

DOCS = Path(__file__).parent
FOLDER = DOCS / "reference"
MEASURED = DOCS / "measured"
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
OPEN, CLOSED = "<!-- table: {} -->", "<!-- end of table -->"
MARK = re.compile(r"^<!-- table: ([\w-]+) -->$(.*?)^<!-- end of table -->$", re.MULTILINE | re.DOTALL)
ALMOST = re.compile(r"<!--\s*(?:end of )?table.*", re.IGNORECASE)
"""What is a mark, or is meant to be one."""
FRONT = "methods-and-families"
"""Table of the README: every method, with its mean rate on each model of `COLUMNS`."""
COLUMNS = ("canvas-sd", "canvas-sdxl", "canvas-sd3", "canvas-flux")
OF_UNET = {"cross-attention", "image prompts", "one step"}
"""Needs that no model of `OF_TRANSFORMER` meets."""
OF_TRANSFORMER = ("canvas-sd3", "canvas-flux")
NOTES = {"sfd": "draws in one step"}


def read(name: str) -> Measured:
    """A file of measured figures.

    Args:
        name: Its name, without the ending.

    Raises:
        EvaluationError: It is missing or damaged.
    """
    return Measured.read(MEASURED / f"{name}.json")


# Tables of all pages ------------------------------------------------------------------------------------------------


def marks(text: str, where: str) -> list[str]:
    """Names of the tables of a page.

    Args:
        text: Of the page.
        where: What messages call it.

    Raises:
        EvaluationError: A table has no end, an end has no beginning, or a mark is misspelt.
    """
    found = list(MARK.finditer(text))
    proper = [OPEN.format(each[1]) for each in found] + [CLOSED] * len(found)
    for one in ALMOST.findall(text):
        if one in proper:
            proper.remove(one)
        else:
            raise EvaluationError(
                f"{where} has {one!r}, which belongs to no table: write {OPEN.format('NAME')!r} and {CLOSED!r}, each "
                "in a line of its own"
            )
    if inner := next((each[2] for each in found if ALMOST.search(each[2])), None):
        raise EvaluationError(f"{where} has a table within a table: {ALMOST.findall(inner)[0]!r}")
    return [each[1] for each in found]


def filled(text: str, where: str) -> str:
    """A page with its tables as they are now.

    Args:
        text: Of the page.
        where: What messages call it.

    Raises:
        EvaluationError: See `marks` and `written`.
    """
    marks(text, where)
    return MARK.sub(lambda found: f"{OPEN.format(found[1])}\n\n{written(found[1], where)}\n\n{CLOSED}", text)


def written(name: str, where: str) -> str:
    """The table of a name.

    Raises:
        EvaluationError: There is none of this name, or its file is missing, damaged, or not what the table shows.
    """
    if name == FRONT:
        return front()
    if name not in TABLES:
        raise EvaluationError(f"{where} names the table {name!r}; there are: {', '.join([FRONT, *TABLES])}")
    table, measured = TABLES[name], read(TABLES[name].data)
    table.check(measured)
    return table.markdown(measured)


def marked_pages() -> list[Path]:
    """Pages that are written by hand, and may have tables."""
    return [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def front() -> str:
    """Every method by model: the mean rate (AA), or why there is none."""
    of_all = read(EVERY_METHOD)
    measured = {(row["method"], row["model"]): row for row in on_every_model(read(FAMILIES), of_all).rows}
    lines = []
    for name in dict.fromkeys([*(str(row["method"]) for row in of_all.rows), *STRATEGIES.names()]):
        told = STRATEGIES.facts(name).attributes
        cells = [f"[`{name}`](docs/reference/{name}.md)" + (f" ({NOTES[name]})" if name in NOTES else "")]
        for model in COLUMNS:
            if (row := measured.get((name, model))) is not None:
                size = row.get("size")
                cells.append(f"{Shown(row.get('AA')):3}" + ("" if size == "full" else f" ({size})"))
            elif model in OF_TRANSFORMER and OF_UNET & set(told["needs"]):
                cells.append("refused")
            else:
                cells.append(ABSENT)
        protects = told["protects"]
        cost = re.split("[,;]", told["cost"])[0]
        lines.append([*cells, cost, protects if protects.endswith("s") else f"a {protects}"])
    return markdown(["method", *(f"`{model}`" for model in COLUMNS), "made in", "protects"], lines)


def on_every_model(families: Measured, of_all: Measured) -> Measured:
    """The rows of families, with those of the same concepts on `canvas-sd`.

    Args:
        families: Rows of methods on the larger models.
        of_all: Rows of all methods on `canvas-sd`.
    """
    shared: list[Row] = [
        row | {"model": COLUMNS[0], "size": str(of_all.size)} for row in of_all.rows if row["group"] == SHARED
    ]
    return families.model_copy(update={"rows": [*shared, *families.rows]})


# Pages of methods ---------------------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """The text of every page, by the name of its method."""
    families, of_all = read(FAMILIES), read(EVERY_METHOD)
    return {name: page(STRATEGIES.facts(name), families, of_all) for name in STRATEGIES.names()}


def page(facts: Facts, families: Measured, of_all: Measured) -> str:
    """The page of a method.

    Args:
        facts: What the registry knows of it.
        families: Rows of methods on several models.
        of_all: Rows of all methods on one model.
    """
    told, strategy = facts.attributes, STRATEGIES.get(facts.name)
    source = Path(inspect.getfile(strategy))
    module = source.relative_to(source.parents[1]).as_posix()
    head, _, rest = inspect.cleandoc(inspect.getdoc(strategy) or "").partition("\n\n")
    parts = [
        f"# `{facts.name}`",
        head,
        markdown(
            ("", ""),
            [
                ("what it is", told["title"]),
                ("source", ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", told["paper"])),
                ("code", f"[`erasure/{module}`](../../erasure/{module})"),
                ("needs of a model", ", ".join(told["needs"]) or "nothing"),
                ("is kept as", ", ".join(told["carriers"])),
                ("protects", told["protects"]),
                ("is made in", told["cost"]),
            ],
        ),
        f"`erasure erase {facts.name} --model MODEL --concept CONCEPT --out FOLDER` makes one. What each fact means: "
        "[which method](../methods.md#which-method). What goes around it: [threat model](../threat-model.md).",
        "## How it works",
        rest,
        "## Measured",
        *measured_tables(facts.name, families, of_all),
        "## Options",
        options_table(facts),
        *presets(told["presets"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def measured_tables(name: str, families: Measured, of_all: Measured) -> Iterable[str]:
    """Rows of a method in the tables of families and of all methods, with what they mean; or where else to look."""
    models = on_every_model(families, of_all)
    in_models, in_all = (any(row.get("method") == name for row in each.rows) for each in (models, of_all))
    if in_all:
        yield (
            "Objects and styles erased one by one from `canvas-sd`, as [every method](../numbers.md#every-method), "
            "means with 95 % intervals: the share of images of the concept that do not show it (UA), of others of "
            "its kind that still do what was asked for (IRA), the same of its own group alone and of the other kind "
            "(CRA), and the mean of UA, IRA and CRA (AA). What else was measured stands in "
            "[numbers](../numbers.md#methods-to-compare-with) and in [methods](../methods.md)."
        )
        columns = [("", "{group}: {concepts}"), *OF_EVERY_METHOD[1:]]
        groups = ("objects", "styles")
        yield Table(EVERY_METHOD, columns, where={"method": (name,), "group": groups}).markdown(of_all)
    if in_models:
        yield "Means over [the six concepts](../numbers.md#families) that are measured on every family:"
        yield Table(FAMILIES, OF_FAMILY, where={"method": (name,)}).markdown(models)
    if not (in_models or in_all):
        yield (
            "It has no row in [the tables of all methods](../numbers.md#every-method). What else was measured of it, "
            "if anything, is in [numbers](../numbers.md#methods-to-compare-with) and in [methods](../methods.md)."
        )


def options_table(facts: Facts) -> str:
    """Every option with its default, what is allowed, and what it does."""
    options = options_of(STRATEGIES, facts.name)
    rows = [
        (f"`--{one.name.replace('_', '-')}`", code(one.default), options.describe(one.name), one.help)
        for one in facts.options
    ]
    return markdown(("option", "default", "allowed", "what it does"), rows) if rows else "It has none."


def presets(given: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Every preset with the options that it sets."""
    if given:
        yield "## Presets"
        yield "`--preset NAME` sets several options at once; those that are given beside it win."
        yield markdown(
            ("preset", "sets"),
            [(f"`{name}`", ", ".join(f"`{key}={text(value)}`" for key, value in sets.items()) or "nothing")
             for name, sets in given.items()],
        )  # fmt: skip


def text(value: Any) -> str:
    """A value as a user writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def code(value: Any) -> str:
    """A default; nothing where an option has none."""
    return "" if value is None or value in ("", []) else f"`{text(value)}`"


def main() -> None:
    """Write all pages, and take away those of methods that are gone.

    Raises:
        SystemExit: A page or a file of figures is not as it must be.
    """
    try:
        made = {FOLDER / f"{name}.md": text for name, text in pages().items()}
        for file in marked_pages():
            made[file] = filled(file.read_text(encoding="utf-8"), file.name)
    except ErasureError as error:
        raise SystemExit(f"nothing was written: {error}") from error
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.md"):
        if old not in made:
            old.unlink()
    for file, content in made.items():
        file.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
