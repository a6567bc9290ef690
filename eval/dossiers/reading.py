"""What a folder holds: an evaluation, an attack, a stress test, an audit, or a cell of a sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from erasure.errors import EvaluationError
from erasure.eval.attacks import ATTACKS
from erasure.eval.audits.parts import Kind, Part
from erasure.eval.outcomes import State
from erasure.eval.results import FILE, Results
from erasure.eval.schemas import AuditFile, CellFile
from erasure.eval.stress import STRESS_TESTS
from erasure.eval.suites import SUITES
from erasure.files import inside, read_json, shown

AUDIT, CELL, RECIPE = "audit.json", "cell.json", "recipe.json"
STRESS = "stress "
"""How results of stress tests begin to say what they are of."""


class FoundPart(NamedTuple):
    """One evaluation, attack or stress test of a folder."""

    part: Part
    results: Results | None
    """`None` where it was refused or failed."""
    source: str
    """Name of the folder, as the page calls it."""
    state: State = "done"
    reason: str = ""
    again: bool = False
    """Whether it tries what an earlier attack found."""


class FolderContents(NamedTuple):
    """All that a folder holds."""

    path: Path
    kind: str
    """`evaluation`, `attack`, `stress test`, `audit` or `cell`."""
    found: list[FoundPart]
    remarks: list[str]
    """What was not measured, in a sentence each."""
    audit: AuditFile | None = None


def read_folder(path: str | Path, concepts: list[str]) -> FolderContents:
    """Recognise a folder by what it holds, and read it.

    Args:
        path: The folder, or its `results.json`, `audit.json` or `cell.json`.
        concepts: Targets of the erasure, to number what attacks are of.

    Raises:
        EvaluationError: It holds none of these, one that was not finished, or one that is damaged.
    """
    folder = Path(path)
    if folder.name in (FILE, AUDIT, CELL) and not os.path.isdir(folder):
        folder = folder.parent
    if not os.path.isdir(folder):
        raise EvaluationError(f"{path} is no folder: give those of evaluations, attacks, stress tests or audits")
    if (folder / AUDIT).is_file():
        return _audit(folder, concepts)
    if (folder / CELL).is_file():
        return _cell(folder, concepts)
    if (folder / FILE).is_file():
        found = _part(folder, concepts, folder.name)
        return FolderContents(folder, "stress test" if found.part.kind == "stress" else found.part.kind, [found], [])
    if (folder / RECIPE).is_file():
        raise EvaluationError(
            f"{folder} holds a measurement that was not finished (a {RECIPE}, no {FILE}): run its command again, "
            "which goes on where it stopped, or leave the folder out"
        )
    names = sorted(os.listdir(folder))
    if "erasure_config.json" in names:
        raise EvaluationError(f"{folder} holds an erasure and no measurement: it belongs behind --erasure")
    raise EvaluationError(
        f"{folder} holds no evaluation, attack, stress test or audit (found: {shown(names) if names else 'nothing'}); "
        f"expected {FILE} or {AUDIT} in it"
    )


def _audit(folder: Path, concepts: list[str]) -> FolderContents:
    data: AuditFile = read_json(folder / AUDIT, AuditFile, error=EvaluationError)
    found = []
    for entry in data["parts"]:
        source = f"{folder.name}/{entry['folder']}"
        if entry["state"] == "done":
            found.append(_part(inside(folder, entry["folder"], error=EvaluationError), concepts, source))
            continue
        part = _checked(entry["kind"], entry["name"], entry["concept"], concepts, source)
        chance = replace(part, measures_chance=True)
        part = chance if chance.folder == entry["folder"] else part
        found.append(FoundPart(part, None, source, entry["state"], entry["detail"]))
    return FolderContents(folder, "audit", found, [], data)


def _cell(folder: Path, concepts: list[str]) -> FolderContents:
    data: CellFile = read_json(folder / CELL, CellFile, error=EvaluationError)
    found, remarks = [], []
    for entry in data["parts"]:
        if entry["state"] != "done":
            remarks.append(f"{folder.name}/{entry['what']} was {entry['state']}: {entry['reason']}")
        elif entry["what"] != "erasure":
            source = f"{folder.name}/{entry['what']}"
            found.append(_part(inside(folder, entry["what"], error=EvaluationError), concepts, source))
    return FolderContents(folder, "cell", found, remarks)


def _part(folder: Path, concepts: list[str], source: str) -> FoundPart:
    results = Results.load(folder)
    names = {str(row["name"]) for row in results.metrics}
    kind, name = "evaluation", results.suite
    if name.startswith(STRESS):
        kind, name = "stress", name.removeprefix(STRESS)
    elif name in ATTACKS.names() or (folder / "attacks.jsonl").is_file():
        kind = "attack"
    concept = (
        None if kind == "evaluation" else next((row["concept"] for row in results.metrics if row["concept"]), None)
    )
    part = _checked(kind, name, concept, concepts, source)  # type: ignore[arg-type]
    if kind == "attack" and "chance_ASR" in names and not ATTACKS.facts(name).attributes["is_control"]:
        part = Part(part.kind, part.name, part.concept, part.number, measures_chance=True)
    again = any(name.startswith("transfer_") for name in names)
    return FoundPart(part, results, source, again=again)


def _checked(kind: Kind, name: str, concept: str | None, concepts: list[str], source: str) -> Part:
    """A part whose name is registered.

    Raises:
        EvaluationError: It is not, for instance because another package brings it that is not installed.
    """
    checks = {"evaluation": SUITES.check, "attack": ATTACKS.check, "stress": STRESS_TESTS.check}
    try:
        checks[kind](name)
    except EvaluationError as error:
        raise EvaluationError(f"{source}: {error} Install the package that it comes with, or leave it out") from error
    return Part(kind, name, concept, concepts.index(concept) if concept in concepts else 0)


def read_all(folders: list[Path], concepts: list[str]) -> Iterator[FolderContents]:
    """Read every folder once, however often it is given."""
    seen = set()
    for path in folders:
        read = read_folder(path, concepts)
        if (real := read.path.resolve()) not in seen:
            seen.add(real)
            yield read
