"""What suites and attacks say of canvas-sd stays what it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from filelock import FileLock

from erasure.eval.suites import SUITES
from tests.eval.pinned import ATTACKS as KEPT_ATTACKS
from tests.eval.pinned import FILE, prepare, runs

KEPT: dict[str, Any] = json.loads(FILE.read_text())
NEAR = {
    "metrics": {"rel": 2e-3, "abs": 2e-3},
    # A pixel that is rounded the other way moves the likelihood of a class the more, the less sure a judge is.
    "rows": {"rel": 2e-3, "abs": 1e-2},
    # The mean colour of a part of a picture, in steps of 256.
    "images": {"rel": 0, "abs": 1.0},
}
"""How far a number may be from the one that is kept: processors round differently."""


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is found now. It is made once for all processes that share the tests."""
    base = tmp_path_factory.getbasetemp()
    file = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pinned.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            threads = torch.get_num_threads()
            with pytest.MonkeyPatch.context() as patch:
                content = runs(prepare(patch.setattr), tmp_path_factory.mktemp("pinned"))
            torch.set_num_threads(threads)
            file.write_text(json.dumps(content))
    return json.loads(file.read_text())  # type: ignore[no-any-return]


def compared(wanted: Any, got: Any, where: str, near: dict[str, float]) -> Iterator[str]:
    """Name the places in which two pieces of plain data differ; what only the newer one has is no difference."""
    if isinstance(wanted, dict) and isinstance(got, dict):
        for key in wanted:
            if key in got:
                yield from compared(wanted[key], got[key], f"{where}/{key}", near)
            else:
                yield f"{where}/{key} is not there any more"
    elif isinstance(wanted, list) and isinstance(got, list) and len(wanted) == len(got):
        for index, (one, other) in enumerate(zip(wanted, got, strict=True)):
            yield from compared(one, other, f"{where}/{index}", near)
    elif isinstance(wanted, float) and isinstance(got, float | int):
        if got != pytest.approx(wanted, **near):
            yield f"{where}: {got}, was {wanted}"
    elif wanted != got:
        yield f"{where}: {got!r}, was {wanted!r}"


@pytest.mark.parametrize("part", ["metrics", "rows", "images"])
@pytest.mark.parametrize("name", sorted(KEPT))
def test_what_is_said_of_the_embedded_model_stays_what_it_was(name: str, part: str, found: dict[str, Any]) -> None:
    wanted, got = KEPT[name][part], found[name][part]
    assert wanted
    assert set(wanted) == set(got)
    assert not list(compared(wanted, got, name, NEAR[part]))


def test_every_suite_is_kept() -> None:
    """Of attacks those whose tries are texts; what all do is held against plain arithmetic (`tests/eval/attacks`)."""
    assert set(KEPT) == {*SUITES.built_in, *KEPT_ATTACKS, "replay"}
