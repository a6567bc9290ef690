"""Put everything that was measured of one erasure together; what is of another erasure or model is refused."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from diffusers import DiffusionPipeline

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.cache import model_fingerprint
from erasure.errors import EvaluationError, VerificationError
from erasure.eval.audits.parts import Part, left_out
from erasure.eval.audits.runner import Audit, Outcome
from erasure.eval.audits.verdicts import Finding, finding_of, graded
from erasure.eval.dossiers.reading import FolderContents, FoundPart, read_all
from erasure.eval.rows import Record, Row
from erasure.eval.run import model_name
from erasure.files import at_home, shown, write_json
from erasure.shown import number

JSON = "report.json"
KIND = "report of an erasure"


@dataclass(frozen=True)
class Verified:
    """Whether the erasure is in force on a model."""

    state: str
    """`in force`, `not in force`, or `not measured`."""
    detail: str
    tensors: int = 0
    """How many were compared."""


@dataclass(frozen=True)
class Dossier(Audit):
    """All that was measured of one erasure; `outcomes` are of all folders."""

    erasure: Erasure | None = None
    sources: list[str] = field(default_factory=list)
    """Name of the folder of each outcome, in their order."""
    strength: float = 1.0
    verified: Verified = Verified("not measured", "")
    not_measured: list[str] = field(default_factory=list)
    """What nobody measured, in a sentence each."""

    def chance(self, part: Part) -> Finding | None:
        """What chance gives in as many tries; `None` where that was not measured in the size of the attack."""
        sizes = [one.results.size for one in self.outcomes if one.part is part and one.results is not None]
        for one in self.outcomes:
            same = (one.part.name, one.part.measures_chance) == part.chance and one.part.number == part.number
            if same and one.part.kind == "attack" and one.results is not None and one.results.size in sizes:
                return one.finding
        return None

    def to_dict(self) -> Record:
        """Plain data in the stable schema: as of an audit, with all metrics of each part and what was not measured."""
        data = super().to_dict()
        for entry, outcome, source in zip(data["parts"], self.outcomes, self.sources, strict=True):
            chance = self.chance(outcome.part)
            told = None if chance is None else {key: getattr(chance, key) for key in ("shown", "low", "high", "n")}
            entry |= {
                "folder": source, "size": None if outcome.results is None else outcome.results.size,
                "chance": told,
                "metrics": [] if outcome.results is None else outcome.results.metrics,
            }  # fmt: skip
        return {
            **data, "kind": KIND, "strength": self.strength, "verified": vars(self.verified),
            "not_measured": self.not_measured,
        }  # fmt: skip


def report_on(
    folders: Sequence[str | Path] | str | Path,
    erasure: Erasure | str | Path,
    *,
    out: str | Path,
    pipe: DiffusionPipeline | None = None,
) -> Dossier:
    """Put evaluations, attacks, stress tests and audits of one erasure on one page.

    Writes `report.html`, one file that holds everything, `README.md`, the same as a card, and `report.json`. What
    nobody measured is named. No picture that may be unsafe is in the page, see `erasure.eval.galleries.veiled`.

    Args:
        folders: Folders of evaluations, attacks, stress tests, audits and cells of sweeps, each recognised by what it
            holds.
        erasure: The erasure, its folder or its Hub repository.
        out: Folder of the page.
        pipe: The model: whether the erasure is in force on it is verified, and that it is the one that was measured.
            The erasure is attached for that if it is not, and taken off again.

    Raises:
        EvaluationError: A folder holds no finished measurement, or one of another erasure, of another model, of
            several erasures together or at another strength than the rest; `out` holds something else.
        ArtifactError: The erasure is missing or damaged, or is not of the pipeline's model.
    """
    made = erasure if isinstance(erasure, Erasure) else Erasure.load(erasure)
    page = at_home(out)
    _check_out(page)
    concepts = [concept.target for concept in made.concepts]
    given = [folders] if isinstance(folders, str | Path) else list(folders)
    reads = list(read_all([Path(each) for each in given], concepts))
    if not reads:
        raise EvaluationError("nothing to report: give the folders of evaluations, attacks, stress tests or audits")
    model, strength = _checked(reads, made)
    verified = Verified("not measured", "no model was given to verify it on (--model, pipe=)")
    if pipe is not None:
        verified = _verified(pipe, made, strength, model)
    found = [each for read in reads for each in read.found]
    outcomes = [_outcome(each) for each in found]
    entry = next((e for each in found if each.results for e in each.results.erasures), None)
    parts = [each.part for each in found]
    dossier = Dossier(
        page, model, [entry or _own(made)], concepts, _sizes(found), outcomes,
        graded((one.part, one.finding) for one in outcomes if one.state != "refused"), left_out(parts),
        erasure=made, sources=[each.source for each in found], strength=strength, verified=verified,
    )  # fmt: skip
    dossier = replace(dossier, not_measured=list(_not_measured(dossier, reads)))
    from erasure.eval.dossiers.page import write_pages

    write_json(page / JSON, dossier.to_dict(), error=EvaluationError)
    write_pages(dossier)
    return dossier


def _check_out(page: Path) -> None:
    """Refuse a folder that holds something else, before anything is read."""
    if os.path.lexists(page) and not os.path.isdir(page):
        raise EvaluationError(f"{page} is a file: name a folder")
    names = sorted(os.listdir(page)) if os.path.isdir(page) else []
    if names and JSON not in names:
        raise EvaluationError(
            f"{page} is not empty and holds no report of an erasure (found: {shown(names)}): give another folder"
        )


def _own(made: Erasure) -> Record:
    return {"name": made.name, "strategy": made.config.strategy, "fingerprint": made.fingerprint, "strength": 1.0}


def _sizes(found: Sequence[FoundPart]) -> str:
    return ", ".join(dict.fromkeys(each.results.size for each in found if each.results is not None)) or "none"


def _outcome(found: FoundPart) -> Outcome:
    if found.results is None:
        return Outcome(found.part, found.state, Finding("not measured", detail=found.reason))
    finding = finding_of(found.part, found.results)
    about = f"size {found.results.size}, folder {found.source}"
    again = "what an attack found before, tried again" if found.again else ""
    detail = "; ".join(filter(None, (finding.detail, again, about)))
    return Outcome(found.part, "done", replace(finding, detail=detail), found.results)


# Refusals -----------------------------------------------------------------------------------------------------------


def _checked(reads: Sequence[FolderContents], made: Erasure) -> tuple[Record, float]:
    """The model and the strength of everything that was measured.

    Raises:
        EvaluationError: Something is of another erasure, model or strength.
    """
    first, models, strength = "", None, None
    for read in reads:
        blocks: list[tuple[str, Row, Sequence[Row]]] = [
            (str(read.path), each.results.model, each.results.erasures)
            for each in read.found
            if each.results is not None
        ]
        if read.audit is not None:
            blocks.append((str(read.path), read.audit["model"], read.audit["erasures"]))
        for where, model, erasures in blocks:
            own = _of_this(where, erasures, made)
            fingerprint = model.get("fingerprint")
            if fingerprint is None:
                raise EvaluationError(f"{where} does not say of which model it is: measure it again")
            if models is None:
                first, models = where, dict(model)
            elif models["fingerprint"] != fingerprint:
                _refuse_model(where, model, first, models)
            if strength is None:
                strength = (own, where)
            elif strength[0] != own:
                raise EvaluationError(
                    f"{where} was measured at strength {number(own)}, and {strength[1]} at {number(strength[0])}: "
                    "make a report of each"
                )
    if models is None:
        raise EvaluationError("nothing that is given was finished: there is nothing to report")
    return dict(models), 1.0 if strength is None else strength[0]


def _refuse_model(where: str, model: Row, other: str, known: Row) -> NoReturn:
    """Refuse what was measured on another model.

    Raises:
        EvaluationError: Always.
    """
    raise EvaluationError(
        f"{where} is of another base model: {shown(model.get('name'))} with the fingerprint "
        f"{shown(model['fingerprint'])}, and {other} is of {shown(known.get('name'))} with "
        f"{shown(known['fingerprint'])}. Weights and their precision must be the same: leave it out, or make a report "
        "of each"
    )


def _of_this(where: str, erasures: Sequence[Row], made: Erasure) -> float:
    """The strength at which results are of an erasure, and of it alone.

    Raises:
        EvaluationError: They are of another, of several or of none.
    """
    if not erasures:
        raise EvaluationError(f"{where} was measured without any erasure: leave it out")
    names = ", ".join(
        f"{shown(e['name'])} ({shown(e.get('strategy'))}, {shown(e.get('fingerprint'))})" for e in erasures
    )
    if len(erasures) > 1:
        raise EvaluationError(f"{where} was measured with several erasures together: {names}. A report is of one")
    if erasures[0].get("fingerprint") != made.fingerprint:
        raise EvaluationError(
            f"{where} is of another erasure: {names}, and this one is {shown(made.name)} ({made.config.strategy}, "
            f"{made.fingerprint}). Leave it out, or give the erasure that it is of"
        )
    return float(erasures[0].get("strength", 1.0))


# Verification -------------------------------------------------------------------------------------------------------


def _verified(pipe: DiffusionPipeline, made: Erasure, strength: float, measured: Row) -> Verified:
    """Whether the erasure is in force on a model, which must be the one that was measured.

    Raises:
        EvaluationError: It is another model.
    """
    manager = ErasureManager(pipe)
    model = {"name": model_name(pipe), "fingerprint": model_fingerprint(manager.stock(offloaded=True))}
    if model["fingerprint"] != measured["fingerprint"]:
        _refuse_model("the pipeline", model, "what was measured", measured)
    name = next((name for name, one in manager.erasures.items() if one.fingerprint == made.fingerprint), None)
    attached = name is not None
    name = name or f"{made.name}-reported"
    if not attached:
        manager.add(made, name, strength)
    try:
        compared, own = manager.verify(), manager.strengths.get(name, 1.0)
        other = [each for each in manager.active_erasures() if each != name]
        beside = f", beside {', '.join(other)}" if other else ""
        return Verified("in force", f"{compared} tensors compared, strength {number(own, 'g')}{beside}", compared)
    except VerificationError as error:
        return Verified("not in force", str(error).split("\n")[0])
    finally:
        if not attached:
            manager.delete(name)


# What is not there --------------------------------------------------------------------------------------------------


def _not_measured(dossier: Dossier, reads: Sequence[FolderContents]) -> Iterator[str]:
    """What nobody measured, in a sentence each."""
    parts = [outcome.part for outcome in dossier.outcomes if outcome.state == "done"]
    kinds = {part.kind for part in parts}
    for kind, told in (("evaluation", "evaluation"), ("attack", "attack"), ("stress", "stress test")):
        if kind not in kinds:
            yield f"No {told} was given."
    if not any(read.kind == "audit" for read in reads):
        yield "No audit was given: what stands here was measured part by part."
    if dossier.verified.state == "not measured":
        yield f"Whether it is in force was not verified: {dossier.verified.detail}."
    for kind, told in (("attack", "Attacks"), ("stress", "Stress tests")):
        tried = [part for part in parts if part.kind == kind]
        if tried and (absent := [name for name in left_out(tried) if name in _names(kind)]):
            yield f"{told} that were not tried: {', '.join(absent)}."
        for name in dict.fromkeys(part.name for part in tried):
            of = {part.concept for part in tried if part.name == name}
            if others := [concept for concept in dossier.concepts if concept not in of]:
                yield f"{name} was not tried on {', '.join(others)}."
    for part in parts:
        if part.chance is not None and dossier.chance(part) is None:
            name, own = part.chance
            how = f"{name} --control" if own else name
            yield f"What chance gives for {part.name} of {part.concept} was not measured in its size ({how})."
    for outcome, source in zip(dossier.outcomes, dossier.sources, strict=True):
        if outcome.state != "done":
            yield f"{source} was {outcome.state}: {outcome.finding.detail}."
    for read in reads:
        yield from read.remarks


def _names(kind: str) -> tuple[str, ...]:
    from erasure.eval.attacks import ATTACKS
    from erasure.eval.stress import STRESS_TESTS

    return ATTACKS.names() if kind == "attack" else STRESS_TESTS.names()
