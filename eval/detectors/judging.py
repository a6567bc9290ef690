"""Detectors as judges: their findings as the answers that suites with classes and attacks count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType

from PIL import Image

from erasure.eval.detectors.base import NamedDetector
from erasure.eval.detectors.findings import Finding, ask
from erasure.files import digest

FLAGGED, CLEAR = "flagged", "not flagged"
"""Answers of a detector that only says whether a picture shows what it looks for."""
NOTHING = "none of them"
"""Answer of a detector that sees no class that it knows."""


class UnjudgedError(Exception):
    """A detector cannot say anything about a picture: its answer is missing."""


@dataclass(frozen=True)
class FindingAnswer:
    """A detector's finding in the form of a judge's answer."""

    object: str | None
    style: str | None = None
    objects: tuple[str, ...] = ()
    object_scores: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    style_scores: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class FindingJudge:
    """Answers from the findings of one detector, or of two: one for objects, one for styles.

    Whoever has the findings already asks `answer`; the detectors are asked but once.
    """

    detectors: Mapping[str, NamedDetector]
    """By label."""
    object_by: str
    """Label of the one that says the object."""
    style_by: str | None = None
    """Label of the one that says the style, if any."""
    names: tuple[str, ...] = ()
    """Classes among which the object is the likeliest that is seen; none where it is told by `FLAGGED` or `CLEAR`."""
    styles: tuple[str, ...] = ()
    """The same for the style."""

    @cached_property
    def fingerprint(self) -> str:
        """Names and fingerprints of the detectors."""
        recipes = {label: dict(self.detectors[label].recipe()) for label in self._used}
        return f"{' + '.join(self._used)} ({digest([recipes, self.names, self.styles])[:12]})"

    @property
    def object_names(self) -> tuple[str, ...]:
        """Objects that an answer may name."""
        return (*self.names, NOTHING) if self.names else (FLAGGED, CLEAR)

    @property
    def style_names(self) -> tuple[str, ...]:
        """Styles that an answer may name."""
        return (*self.styles, NOTHING) if self.style_by else ()

    @property
    def _used(self) -> tuple[str, ...]:
        return (self.object_by, *(() if self.style_by is None else (self.style_by,)))

    def is_of(self, detectors: Mapping[str, NamedDetector]) -> bool:
        """Whether the judge answers by these detectors under these labels."""
        return all(detectors.get(label) == self.detectors[label] for label in self._used)

    def answer(self, findings: Mapping[str, Finding]) -> FindingAnswer | Exception:
        """Convert findings to an answer; an exception where a detector could not judge.

        Args:
            findings: By label of the detector.
        """
        for label in self._used:
            if findings[label].flagged is None:
                return UnjudgedError(f"{label}: {findings[label].reason}")
        first = findings[self.object_by]
        style, scores = None, {}
        if self.style_by is not None:
            second = findings[self.style_by]
            style, scores = likeliest(second, self.styles), dict(second.scores)
        if self.names:
            return FindingAnswer(likeliest(first, self.names), style, (), dict(first.scores), scores)
        flag = FLAGGED if first.flagged else CLEAR
        sure = {} if first.score is None else {FLAGGED: first.score, CLEAR: 1 - first.score}
        return FindingAnswer(flag, style, (), sure, scores)

    def __call__(self, images: Sequence[Image.Image]) -> list[FindingAnswer | Exception]:
        """One answer for each picture."""
        found = {label: ask(self.detectors[label], images) for label in self._used}
        return [self.answer({label: each[index] for label, each in found.items()}) for index in range(len(images))]


@dataclass(frozen=True)
class NoJudge:
    """The judge of a suite without classes."""

    fingerprint: str = "none"

    def __call__(self, images: Sequence[Image.Image]) -> list[FindingAnswer]:
        """No class for any picture."""
        return [FindingAnswer(None) for _ in images]


def likeliest(finding: Finding, names: Sequence[str]) -> str:
    """Give the likeliest of some classes among a finding's labels; `NOTHING` without any."""
    seen = [name for name in names if name in finding.labels]
    return max(seen, key=lambda name: finding.scores.get(name, 0.0), default=NOTHING)
