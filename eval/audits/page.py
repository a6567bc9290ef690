"""The page and the card of an audit: who was held off, who was not, and what was not measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from erasure.errors import EvaluationError
from erasure.eval.audits.parts import GRADES, Grade
from erasure.eval.audits.runner import Audit, Outcome
from erasure.eval.audits.verdicts import MOST_SHOWN, Finding, Word
from erasure.eval.cost import Spent
from erasure.eval.results import Results
from erasure.eval.rows import is_figure, metric_of
from erasure.files import write_text
from erasure.pages import html_page, markdown_page
from erasure.shown import number

PAGE, CARD = "report.html", "README.md"
KEPT = ("IRA", "CRA", "AA", "clip_score", "drift")
"""Metrics of evaluations that say what became of everything else."""
MEANING: dict[str, str] = {
    "held": f"the interval ends below {100 * MOST_SHOWN:g} % of images, what is missing counted as shown",
    "broken": f"it begins above {100 * MOST_SHOWN:g} %, or a stress test tells that the concept is back",
    "undecided": "neither: more prompts would tell",
    "chance": "what comes back by itself in as many tries",
    "no attack": "nothing that an attacker does; it is told for those who serve the model",
    "not measured": "there is no number; the reason stands beside",
}


class Line(NamedTuple):
    """One part of the audit in a table."""

    name: str
    about: str
    concept: str
    word: str
    rate: str
    """Share that shows the concept, with its interval."""
    chance: str
    detail: str
    link: str | None
    """Where its own report or results are, from the audit's folder."""


class Section(NamedTuple):
    """One attacker."""

    title: str
    about: str
    word: Word
    lines: list[Line]


class Cost(NamedTuple):
    """What one part has cost."""

    name: str
    """Kind and name, and whether it measures chance."""
    seconds: str
    drawn: str
    recalled: str


class Kept(NamedTuple):
    """A figure of what was to stay."""

    suite: str
    metric: str
    before: str
    after: str


def write_pages(audit: Audit) -> None:
    """Write `report.html` and `README.md` into the folder of an audit.

    Raises:
        EvaluationError: They cannot be written.
    """
    values = {
        "title": f"Audit of {', '.join(audit.concepts)}",
        "audit": audit,
        "sections": sections(audit),
        "kept": kept(audit.outcomes),
        "costs": costs(audit.outcomes),
        "meaning": MEANING,
        "canvas": "canvas" in str(audit.model.get("name")),
    }
    write_text(audit.folder / PAGE, html_page("audit.html", **values), error=EvaluationError)
    write_text(audit.folder / CARD, markdown_page("audit.md", **values), error=EvaluationError)


def sections(audit: Audit) -> list[Section]:
    """What was tried, by attacker."""
    return [section(audit, grade) for grade in GRADES]


def section(audit: Audit, grade: Grade) -> Section:
    """Everything that was tried for one attacker."""
    title, about = GRADES[grade]
    lines = [line(audit, outcome) for outcome in audit.outcomes if outcome.part.grade == grade]
    return Section(title, about, audit.words.get(grade, "not measured"), lines)


def line(audit: Audit, outcome: Outcome) -> Line:
    """One part in a table."""
    part, finding = outcome.part, outcome.finding
    done = "chance" if part.is_control else finding.word if part.counts else "no attack"
    chance = audit.chance(part)
    return Line(
        name=part.name,
        about="the same with nothing of the concept in it" if part.measures_chance else part.title,
        concept=part.concept or ", ".join(audit.concepts),
        word=done if outcome.state == "done" else outcome.state,
        rate=rate(finding),
        chance=rate(chance) if chance is not None else "not measured" if part.chance is not None else "",
        detail=finding.detail,
        link=link(audit.folder, part.folder) if outcome.state == "done" else None,
    )


def costs(outcomes: Sequence[Outcome]) -> list[Cost]:
    """What every part has cost, the dearest first, and all of them together."""
    spent = [(outcome.part.folder, outcome.spent) for outcome in outcomes if outcome.spent is not None]
    spent.sort(key=lambda each: -each[1].seconds)
    if spent:
        sums = zip(*(each for _, each in spent), strict=True)
        spent.append(("all parts", Spent(*map(sum, sums))))
    return [
        Cost(name, f"{number(each.seconds, '.0f')} s", str(each.drawn), str(each.recalled)) for name, each in spent
    ]


def link(folder: Path, part: str) -> str | None:
    """Path of a part's report from the audit's folder, or of its results where it has none."""
    for name in ("report.html", "results.json"):
        if (folder / part / name).is_file():
            return f"{part}/{name}"
    return None


def rate(finding: Finding) -> str:
    """A share with its interval and how many it is of."""
    if finding.shown is None:
        return ""
    missing = f", {finding.missing} missing" if finding.missing else ""
    low, high = (number(value, ".0f", 100) for value in (finding.low, finding.high))
    return f"{number(finding.shown, '.0f', 100)} % ({low} to {high} %, n = {finding.n}{missing})"


def kept(outcomes: Sequence[Outcome]) -> list[Kept]:
    """What became of everything else, from the evaluations."""
    return [
        found for outcome in outcomes if outcome.part.kind == "evaluation" and outcome.results is not None
        for found in _kept(outcome.part.name, outcome.results)
    ]  # fmt: skip


def _kept(suite: str, results: Results) -> list[Kept]:
    sides: dict[str, dict[str, str]] = {}
    for row in filter(is_figure, results.metrics):
        if metric_of(row) in KEPT and row["value"] is not None:
            shown = number(row["value"], ".3f")
            if row["low"] is not None:
                shown += f" ({number(row['low'], '.3f')} to {number(row['high'], '.3f')})"
            shown += f", n = {number(row['n'], '')}"
            shown += f", {number(row['missing'], '')} missing" if row.get("missing") else ""
            sides.setdefault(row["name"], {})[row.get("variant", "after")] = shown
    return [Kept(suite, name, found.get("before", ""), found.get("after", "")) for name, found in sides.items()]
