"""What tests of attacks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import pytest

from erasure.eval import Results
from erasure.eval.attacks import runner


class Processes(Protocol):
    """Two processes, seen from one of them."""

    rank: int


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> Callable[[Results, Path], Processes]:
    """Make attacks take this process for the second of two that write to `two`, until its `rank` is set to 0.

    The main process is not there: where it is waited for, what it would have written by now is put into its place.
    """

    def started(single: Results, folder: Path) -> Processes:
        work = folder / "two"

        class Two:
            count, rank = 2, 1

            @property
            def is_main(self) -> bool:
                return self.rank == 0

            def wait(self) -> None:
                if self.rank == 1 and (work / "attacks-1.jsonl").is_file():
                    single.save(work)

        processes = Two()
        monkeypatch.setattr(runner, "join", lambda *_: processes)
        work.mkdir()
        (work / "recipe.json").write_bytes((folder / "out" / "recipe.json").read_bytes())
        return processes

    return started
