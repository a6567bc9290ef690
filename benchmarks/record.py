"""The file of a benchmark: one JSON with what each of its parts gave, written after each of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from erasure import files
from erasure.errors import OptionError

FORMAT = 1


class Part(TypedDict, total=False):
    """What is known of a part."""

    state: Literal["started", "done", "failed"]
    """A part that was killed stays `started`."""
    seconds: float
    figures: Mapping[str, object]
    error: str


class Content(TypedDict):
    """The whole file."""

    format: int
    settings: dict[str, object]
    parts: dict[str, Part]


class Record:
    """The parts of one benchmark, on disk after each change.

    Args:
        path: The file; what it holds already is kept.
        settings: What the figures depend on.

    Raises:
        OptionError: The file holds figures of other settings.
        ArtifactError: It cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path, self.content = path, Content(format=FORMAT, settings=dict(settings), parts={})
        if not path.exists():
            return
        held: Content = files.read_json(path, Content)
        if different := files.differences(held["settings"], self.content["settings"]):
            raise OptionError(
                f"{path} holds figures of other settings ({'; '.join(different)}): give another --out, or delete it"
            )
        self.content = held

    def pending(self, names: list[str]) -> list[str]:
        """Those of some parts that are not done; last those that never came to an end, which may kill this run too."""
        states = {name: self.content["parts"].get(name, Part()).get("state") for name in names}
        left = [name for name in names if states[name] != "done"]
        return sorted(left, key=lambda name: states[name] == "started")

    def measure(self, name: str, measure: Callable[[], Mapping[str, object]]) -> str:
        """Measure a part and write down what it gave, or how it failed; what was known of it is forgotten.

        Returns:
            The error, empty where there was none.
        """
        self._write(name, Part(state="started"))
        since = time.perf_counter()
        try:
            figures = measure()
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self._write(name, Part(state="failed", seconds=round(time.perf_counter() - since, 3), error=told))
            return told
        self._write(name, Part(state="done", seconds=round(time.perf_counter() - since, 3), figures=figures))
        return ""

    def _write(self, name: str, part: Part) -> None:
        self.content["parts"][name] = part
        files.write_json(self.path, self.content)
