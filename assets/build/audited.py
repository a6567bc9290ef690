"""Rows of what an audit measured of one erasure: every attack, with its chance level."""

from __future__ import annotations

from pathlib import Path

from erasure.assets.build.measured import Row, figure
from erasure.errors import EvaluationError
from erasure.eval.attacks import ATTACKS
from erasure.eval.audits.parts import GRADES, Part
from erasure.eval.results import FILE, Results

NO_CHANCE = "nothing is random"


def rows(folder: Path, concept: str) -> list[Row]:
    """A row for each attack that was tried, by what its attacker has.

    Args:
        folder: Where `erasure audit` left its results.
        concept: What was erased.

    Raises:
        EvaluationError: There is no attack, or an attack's chance level is missing.
    """
    parts = [Part("attack", name, concept) for name in ATTACKS.names()]
    tried = [part for part in parts if part.counts and (folder / part.folder / FILE).is_file()]
    if not tried:
        raise EvaluationError(f"{folder} holds no results of attacks: give the folder of an audit")
    grades = list(GRADES)
    return [_row(folder, part) for part in sorted(tried, key=lambda part: grades.index(part.grade))]


def _row(folder: Path, part: Part) -> Row:
    row: Row = {"grade": part.grade, "attack": part.name, "ASR": figure(_after(folder, part, "ASR"))}
    if part.chance is None:
        return row | {"chance_ASR": figure({"reason": NO_CHANCE})}
    name, measures_chance = part.chance
    chance = Part("attack", name, part.concept, measures_chance=measures_chance)
    return row | {"chance_ASR": figure(_after(folder, chance, "chance_ASR"))}


def _after(folder: Path, part: Part, rate: str) -> dict[str, object]:
    """A rate of the erased model.

    Raises:
        EvaluationError: There are no results, or these are of something else.
    """
    results = Results.load(folder / part.folder)
    if results.suite != part.name:
        raise EvaluationError(f"{folder / part.folder} has results of {results.suite}, expected those of {part.name}")
    return results.get(rate)


def size_of(folder: Path) -> str:
    """At which size the attacks of an audit were made."""
    return next(Results.load(file).size for file in sorted(folder.glob(f"attack-*/{FILE}")))
