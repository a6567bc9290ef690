"""Detectors as a suite or a command line names them: a name of the registry, a label, and options."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

from erasure.errors import EvaluationError, OptionError
from erasure.eval.detectors import DETECTORS
from erasure.eval.detectors.base import NamedDetector
from erasure.files import shown

# No import of torch here: suites are listed without it.

WRITTEN = re.compile(r"(?:(?P<label>[A-Za-z_][\w-]*)=)?(?P<name>[A-Za-z_]\w*)(?::(?P<options>.+))?", re.DOTALL)
OPTION = re.compile(r",(?=[A-Za-z_]\w*=)")
"""Comma between two options; one within a value has no `option=` behind it."""
EXPECTED = (
    "expected NAME, NAME:option=value,option=value, or LABEL=NAME:..., where several values of an option are "
    "separated by |, for instance nudenet:preset=mace or artists=image_classifier:model=FOLDER,flags=Monet|Van Gogh"
)


@dataclass(frozen=True)
class DetectorChoice:
    """A detector that is still to be made."""

    name: str
    """In the registry of detectors."""
    options: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    preset: str | None = None
    """Options of a paper, under those that are given."""
    label: str = ""
    """Under which its findings are in rows and metrics; its name when empty."""

    @classmethod
    def read(cls, text: str) -> DetectorChoice:
        """Read what a user has written, such as `nudenet:preset=mace,threshold=0.5`.

        Raises:
            EvaluationError: It is not written so, or there is no such detector.
            OptionError: It has no such option, or the option does not allow the value.
        """
        match = WRITTEN.fullmatch(text.strip())
        if match is None:
            raise EvaluationError(f"the detector {shown(text, 200)} cannot be read: {EXPECTED}")
        kind = DETECTORS.get(match["name"])
        options: dict[str, object] = {}
        preset: str | None = None
        for part in OPTION.split(match["options"]) if match["options"] else ():
            option, equals, value = part.partition("=")
            if not equals:
                raise EvaluationError(f"the detector {shown(text, 200)} has a part {shown(part, 100)}: {EXPECTED}")
            if option == "preset":
                preset = value
            elif option not in kind.option_names():
                kind.configured(**{option: value})  # refuses it, and names the nearest
            else:
                options[option] = _value(kind, option, value)
        choice = cls(match["name"], options, preset, match["label"] or "")
        choice.make()
        return choice

    @property
    def key(self) -> str:
        """Label of the findings."""
        return self.label or self.name

    def make(self, **defaults: object) -> NamedDetector:
        """Make the detector.

        Args:
            **defaults: Options that the choice does not name.

        Raises:
            OptionError: It has no such option or preset, or an option does not allow a value.
        """
        return DETECTORS.get(self.name).configured(self.preset, **{**defaults, **self.options})


Chosen: TypeAlias = "Sequence[str | DetectorChoice | NamedDetector] | Mapping[str, NamedDetector]"
"""Detectors as callers give them: texts, choices, or detectors that are made, by label or by their own names."""


def read_choices(given: Iterable[str | DetectorChoice | NamedDetector] | Mapping[str, NamedDetector]) -> Labelled:
    """Read the detectors that a caller gives, by label.

    Raises:
        EvaluationError: Two have one label, or something is no detector.
    """
    pairs: list[tuple[str, DetectorChoice | NamedDetector]] = []
    for each in given.items() if isinstance(given, Mapping) else given:
        if isinstance(each, tuple):
            pairs.append(each)
        elif isinstance(each, NamedDetector):
            pairs.append((each.name, each))
        else:
            choice = DetectorChoice.read(each) if isinstance(each, str) else each
            pairs.append((choice.key, choice))
    labels = [label for label, _ in pairs]
    if double := next((label for label in labels if labels.count(label) > 1), None):
        raise EvaluationError(
            f"two detectors are called {shown(double)}: give each a label of its own, as in first={double}:..."
        )
    for label, each in pairs:
        if not isinstance(each, DetectorChoice | NamedDetector):
            raise EvaluationError(
                f"{shown(label)} is {type(each).__name__}, expected a detector of erasure.eval.detectors: subclass "
                "NamedDetector for one of your own"
            )
    return dict(pairs)


Labelled: TypeAlias = "dict[str, DetectorChoice | NamedDetector]"


def made(choices: Mapping[str, DetectorChoice | NamedDetector]) -> dict[str, NamedDetector]:
    """Make the detectors that are not made yet."""
    return {label: each.make() if isinstance(each, DetectorChoice) else each for label, each in choices.items()}


def _value(kind: type[NamedDetector], option: str, text: str) -> Any:
    """The value of an option as its annotation wants it: a text, a number, True or False, or a list.

    Raises:
        OptionError: The option does not allow it.
    """
    readings: list[object] = [text]
    with contextlib.suppress(ValueError):
        readings.append(json.loads(text))
    parts = [part.strip() for part in text.split("|")]
    readings.append(parts)
    with contextlib.suppress(ValueError):
        readings.append([json.loads(part) for part in parts])
    for reading in readings:
        try:
            return kind.checked(option, reading)
        except OptionError:
            continue
    kind.refuse(option, text, kind.describe(option))
