"""Files of measured figures, from which the tables of README and docs are made: `docs/measured/NAME.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from erasure.errors import EvaluationError
from erasure.eval.statistics import Interval
from erasure.files import read_json, validated, write_text
from erasure.shown import visible

DIGITS = 6
"""Decimals of figures that are written."""
ROUNDING = 0.005
"""Half a unit of the second decimal: bounds of some figures are known to so many."""
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1, max_length=1_000)]


class Figure(TypedDict):
    """A mean or a rate."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    value: int | Number | None
    """`None` where it could not be had."""
    low: NotRequired[Number]
    """Lower bound of the 95 % interval."""
    high: NotRequired[Number]
    n: NotRequired[Annotated[int, Field(ge=0)]]
    """Images or prompts that it is a rate of."""
    reason: NotRequired[Text]
    """Why there is no value."""


Cell = Figure | int | Number | Text
Row = dict[str, Cell]
"""Cells by name: texts and whole numbers that say what was measured, and figures."""


class Measured(BaseModel):
    """Rows of figures that one command measured, and how."""

    model_config = ConfigDict(extra="forbid")
    about: Text
    """Description of what was measured, in a sentence or two."""
    command: Text | None
    """Command that measures it anew; `None` where no single one does."""
    keys: Annotated[list[Text], Field(min_length=1)]
    """Names of the cells that tell rows apart."""
    size: Text | None
    """Size of the suite or attack; `None` where it has none, or where rows have a cell `size`."""
    models: list[Text]
    seeds: list[Annotated[int, Field(ge=0)]] | None
    """`None` where they were not written down."""
    rows: list[Row]
    """Empty where nothing was measured yet."""

    @classmethod
    def read(cls, path: str | Path) -> Measured:
        """Read and check a file.

        Raises:
            EvaluationError: It is missing or damaged, or see `checked`.
        """
        return read_json(path, cls, error=EvaluationError).checked(str(path))

    def checked(self, where: str) -> Measured:
        """The same, if its rows are sound.

        Args:
            where: What messages call it.

        Raises:
            EvaluationError: A row lacks a key, two rows have the same keys, a figure is outside of its interval, or
                lacks a value without a reason. The message says where.
        """
        seen: set[tuple[str, ...]] = set()
        for number, row in enumerate(self.rows, 1):
            key = self.key(row, f"{where}: row {number}")
            if key in seen:
                raise EvaluationError(
                    f"{where}: row {number} has the same {', '.join(self.keys)} as one above: {', '.join(key)}"
                )
            seen.add(key)
            for name, cell in row.items():
                _check(cell, f"{where}: row {number}: {name}")
        return self

    def write(self, path: str | Path) -> None:
        """Write a file that is read as the same again, each row in a line of its own.

        Raises:
            EvaluationError: It does not fit, see `checked`, or cannot be written.
        """
        fitting: Measured = validated(self.model_dump(), Measured, str(path), error=EvaluationError)
        known = fitting.checked(str(path))
        about = known.model_dump(exclude={"rows"})
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in about.items()]
        rows = ",\n".join(f"    {json.dumps(row)}" for row in known.rows)
        text = "\n".join(["{", *lines, f'  "rows": [\n{rows}\n  ]' if rows else '  "rows": []', "}"]) + "\n"
        write_text(path, text, error=EvaluationError)

    def key(self, row: Row, where: str) -> tuple[str, ...]:
        """Give the cells that tell a row apart from the others.

        Raises:
            EvaluationError: The row lacks some of it.
        """
        for name in self.keys:
            if not isinstance(row.get(name), str | int):
                raise EvaluationError(f"{where} has no text or whole number {visible(name)!r}, which keys name")
        return tuple(str(row[name]) for name in self.keys)


def _check(cell: Cell, where: str) -> None:
    """Refuse an interval that does not hold its value, and a value that is missing without a reason."""
    if not isinstance(cell, dict):
        return
    value, low, high = cell["value"], cell.get("low"), cell.get("high")
    if (value is None) != ("reason" in cell):
        raise EvaluationError(f"{where}: give a value, or null and a reason, and not both")
    if (low is None) != (high is None):
        raise EvaluationError(f"{where} has one bound of its interval: give low and high, or neither")
    if value is None or low is None or high is None:
        return
    if not low - ROUNDING <= value <= high + ROUNDING:
        raise EvaluationError(f"{where}: {value} is outside of its interval, {low} to {high}")


def rewrite(
    path: str | Path, rows: Iterable[Row], *, size: str | None = None, models: Sequence[str], seeds: Sequence[int]
) -> str:
    """Put rows that were measured anew into a file: they take the place of rows with the same keys, others stay.

    Args:
        path: The file, which is there already: it says what its table is about.
        rows: The rows.
        size: At which they were measured; `None` where rows have a cell `size`, or where there is none.
        models: Names of the models.
        seeds: Of what was measured.

    Returns:
        A sentence that says how many rows are new, and how many were left as they were.

    Raises:
        EvaluationError: The file cannot be read or written, no row is given, rows do not fit the file, or rows of
            another size would be left beside them.
    """
    path = Path(path)
    if not path.is_file():
        raise EvaluationError(
            f"there is no {path}: give the folder docs/measured of a checkout. For a new table, write the file first, "
            "with what it is about and an empty list of rows"
        )
    known = Measured.read(path)
    fresh: dict[tuple[str, ...], Row] = {}
    for row in rows:
        fresh[known.key(row, f"a new row of {path}")] = row
    if not fresh:
        raise EvaluationError(f"nothing was measured that {path} could be given: it is left as it was")
    old = {known.key(row, str(path)): row for row in known.rows}
    left = [key for key in old if key not in fresh]
    if left and size != known.size:
        raise EvaluationError(
            f"{path} has rows of size {known.size}, and the new ones are of size {size}: {len(left)} rows would be "
            f"left beside them ({', '.join(left[0])}). Measure those too, or at the same size"
        )
    merged = {key: fresh.get(key, row) for key, row in old.items()}
    merged |= {key: row for key, row in fresh.items() if key not in old}
    found = known.model_copy(
        update={
            "size": size,
            "models": list(dict.fromkeys([*(known.models if left else ()), *models])),
            "seeds": sorted({*(known.seeds or () if left else ()), *seeds}),
            "rows": list(merged.values()),
        }
    )
    found.write(path)
    return f"{path}: {len(fresh)} rows written, {len(left)} left as they were. Now run: python docs/reference.py"


def figure(found: Mapping[str, object] | Interval, n: int | None = None) -> Figure:
    """A figure of a mean or a row of results, or of an interval, without what no table shows.

    Args:
        found: Its `value`, and `low`, `high`, `n` and `reason` where it has them.
        n: Images or prompts, where `found` does not say.
    """
    if isinstance(found, Interval):
        found = found._asdict()
    made: dict[str, object] = {"value": None}
    for name in ("value", "low", "high"):
        if isinstance(number := found.get(name), int | float):
            made[name] = number if isinstance(number, int) else round(number, DIGITS)
    count = found.get("n", n)
    if isinstance(count, int):
        made["n"] = count
    if made["value"] is None:
        made = {"value": None, "reason": str(found.get("reason") or "no reason given")}
    return made  # type: ignore[return-value]
