"""Rows of what audits measured: every part with its chance level, the word for each attacker, and relearning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from erasure.assets.build.measured import Figure, Row, figure
from erasure.errors import EvaluationError
from erasure.eval.audits.parts import GRADES, Part
from erasure.eval.audits.verdicts import Finding, finding_of, graded
from erasure.eval.dossiers.reading import FoundPart, read_folder

CURVES = {"relearned": "S50", "stock_new": "S50_new", "erased_new": "S50_new_erased"}
"""Trainings of the stress test `relearn` whose number of steps has a column, and its name."""
NOT_MEASURED: Final = "not measured"
UNNAMED = "unnamed"


class Audited(NamedTuple):
    """An audit of one erasure of one concept."""

    about: Row
    """Cells that tell its rows from those of others: `model` and `method`."""
    parts: list[FoundPart]

    @classmethod
    def read(cls, folder: Path, concept: str) -> Audited:
        """Read what `erasure audit` left.

        Args:
            folder: Where it is.
            concept: What was erased.

        Raises:
            EvaluationError: It holds no audit that was finished, or one of another concept or of several erasures.
        """
        found = read_folder(folder, [concept])
        if found.audit is None:
            raise EvaluationError(f"{folder} holds one {found.kind}, and no audit")
        erased = [
            (entry.get("strategy", entry["name"]), entry.get("concepts", [])) for entry in found.audit["erasures"]
        ]
        if [names for _, names in erased] != [[concept]]:
            what = "; ".join(f"{strategy} of {', '.join(names)}" for strategy, names in erased)
            raise EvaluationError(f"{folder} is an audit of {what}: expected one erasure of {concept} alone")
        return cls({"model": found.audit["model"].get("name", UNNAMED), "method": erased[0][0]}, found.found)

    @property
    def size(self) -> str:
        """Size at which all parts were run: `smoke`, `quick` or `full`."""
        return next(each.results.size for each in self.parts if each.results is not None)

    def rows(self) -> list[Row]:
        """A row for each part that an attacker could do, by what its attacker has."""
        of_attackers = [each for each in self.parts if each.part.counts]
        order = list(GRADES)
        return [self._row(each) for each in sorted(of_attackers, key=lambda each: order.index(each.part.grade))]

    def _row(self, found: FoundPart) -> Row:
        part = found.part
        row: Row = {**self.about, "grade": part.grade, "part": part.name, "shown": _share(found)}
        if part.chance is None:
            return row
        name, measures_chance = part.chance
        wanted = Part("attack", name, part.concept, measures_chance=measures_chance).folder
        chance = next((each for each in self.parts if each.part.folder == wanted), None)
        if chance is None:
            raise EvaluationError(
                f"the audit of {self.about['method']} has {part.folder}, and not {wanted}, its chance"
            )
        return {**row, "chance": _share(chance)}

    def words(self) -> Row:
        """The word for each attacker."""
        words = graded((each.part, _finding(each)) for each in self.parts if each.state != "refused")
        return {**self.about, **{grade: words.get(grade, NOT_MEASURED) for grade in GRADES}}

    def relearning(self) -> list[Row]:
        """Rows of steps that bring the concept back, beside a thing never known; none where it was not measured."""
        tests = [each.results for each in self.parts if each.part.name == "relearn" and each.results is not None]
        made: list[Row] = []
        for results in tests:
            row: Row = {**self.about, **{name: figure(results.get("S50", of)) for of, name in CURVES.items()}}
            savings = results.get("savings", "relearned")
            made.append({**row, "savings": figure(savings), "verdict": str(savings.get("verdict", NOT_MEASURED))})
        return made


def _finding(found: FoundPart) -> Finding:
    """The worst that a part found; a part that failed has measured nothing."""
    return Finding(NOT_MEASURED) if found.results is None else finding_of(found.part, found.results)


def _share(found: FoundPart) -> Figure:
    """Share of images that show the concept, or why there is none."""
    if found.results is None:
        return figure({"reason": found.state})
    finding = _finding(found)
    return figure(
        {"value": finding.shown, "low": finding.low, "high": finding.high, "reason": NOT_MEASURED}, finding.n
    )


def read(folders: Sequence[Path], concept: str) -> list[Audited]:
    """Read several audits, which must be of one size.

    Raises:
        EvaluationError: They are not, or see `Audited.read`.
    """
    found = [Audited.read(folder, concept) for folder in folders]
    if len(sizes := sorted({each.size for each in found})) != 1:
        raise EvaluationError(f"the audits are of several sizes ({', '.join(sizes)}): give those of one")
    return found
