"""Writes a page for every method, `docs/reference/NAME.md`, from what the registry knows: `python docs/reference.py`.

Measured rows are those of the table of families in `numbers.md`; nothing is measured here. A test compares the pages
with the registry.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from erasure.cli.described import options_of
from erasure.registry import Facts
from erasure.strategies import STRATEGIES

DOCS = Path(__file__).parent
FOLDER = DOCS / "reference"
ARXIV = re.compile(r"arXiv (\d{4}\.\d{4,5})")
FAMILIES = "## Families"
"""Heading of `numbers.md` whose table has the measured rows."""


def pages() -> dict[str, str]:
    """The text of every page, by the name of its method."""
    measured = rows_of_families((DOCS / "numbers.md").read_text(encoding="utf-8"))
    return {name: page(STRATEGIES.facts(name), measured.get(name, [])) for name in STRATEGIES.names()}


def page(facts: Facts, measured: list[str]) -> str:
    """The page of a method.

    Args:
        facts: What the registry knows of it.
        measured: Its rows of the table of families.
    """
    told, strategy = facts.attributes, STRATEGIES.get(facts.name)
    source = Path(inspect.getfile(strategy))
    module = source.relative_to(source.parents[1]).as_posix()
    head, _, rest = inspect.cleandoc(inspect.getdoc(strategy) or "").partition("\n\n")
    parts = [
        f"# `{facts.name}`",
        head,
        table(
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
        measured_table(measured),
        "## Options",
        options_table(facts),
        *presets(told["presets"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def measured_table(rows: list[str]) -> str:
    """Rows of the table of families, with what their rates mean; or where else to look."""
    if not rows:
        return (
            "It has no row in [the table of families](../numbers.md#families). What else was measured of it, if "
            "anything, is in [numbers](../numbers.md#methods-to-compare-with) and in [methods](../methods.md)."
        )
    meaning = (
        "Means over six concepts of the embedded models, with 95 % intervals: the share of images of the concept that "
        "do not show it (UA), of others of its kind that still do what was asked for (IRA), the same of the other "
        "kind (CRA), and the mean of the three (AA). [How they were measured](../numbers.md#families)."
    )
    head = ["| model | UA | IRA | CRA | AA | seconds | kB |", "|---|---|---|---|---|---|---|"]
    return meaning + "\n\n" + "\n".join([*head, *rows])


def options_table(facts: Facts) -> str:
    """Every option with its default, what is allowed, and what it does."""
    options = options_of(STRATEGIES, facts.name)
    rows = [
        (f"`--{one.name.replace('_', '-')}`", code(one.default), options.describe(one.name), one.help)
        for one in facts.options
    ]
    return table(("option", "default", "allowed", "what it does"), rows) if rows else "It has none."


def presets(given: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """Every preset with the options that it sets."""
    if given:
        yield "## Presets"
        yield "`--preset NAME` sets several options at once; those that are given beside it win."
        yield table(
            ("preset", "sets"),
            [(f"`{name}`", ", ".join(f"`{key}={text(value)}`" for key, value in sets.items()) or "nothing")
             for name, sets in given.items()],
        )  # fmt: skip


def rows_of_families(numbers: str) -> dict[str, list[str]]:
    """Rows of the table under `FAMILIES` by method, without the column that names it.

    Args:
        numbers: Text of `numbers.md`. A row whose first cell is empty is of the method above it.
    """
    _, _, section = numbers.partition(f"\n{FAMILIES}\n")
    found: dict[str, list[str]] = {}
    name = ""
    for line in section.partition("\n\n")[2].partition("\n## ")[0].splitlines():
        first, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 7 or set(first) == {"-"} or first == "method":
            continue
        name = first.strip("`") or name
        found.setdefault(name, []).append(f"| {' | '.join(cells)} |")
    return found


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(value: Any) -> str:
    """A value as a user writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def code(value: Any) -> str:
    """A default; nothing where an option has none."""
    return "" if value is None or value in ("", []) else f"`{text(value)}`"


def main() -> None:
    """Write all pages, and take away those of methods that are gone."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for old in FOLDER.glob("*.md"):
        if old.stem not in made:
            old.unlink()
    for name, written in made.items():
        (FOLDER / f"{name}.md").write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main()
