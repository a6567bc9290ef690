"""Detection beside drawing: the same rows in the same order, errors carried over, one batch at a time; its cost."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure.errors import EvaluationError
from erasure.eval import evaluate, stress_test
from erasure.eval.beside import Clock, each
from erasure.eval.report import costs
from erasure.eval.schemas import EvaluationRow
from erasure.eval.table import read_rows
from tests.eval.conftest import killed_judge


def numbered(count: int, log: list[str], wait: threading.Event | None = None) -> Iterator[int]:
    for number in range(count):
        log.append(f"draw {number}")
        if wait is not None and number == 1:
            assert wait.wait(10)
        yield number


@pytest.mark.parametrize("beside", [False, True])
def test_batches_are_finished_in_their_order(beside: bool) -> None:
    log: list[str] = []
    worked: list[int] = []
    told: list[tuple[int, list[int]]] = []
    each(numbered(4, log), worked.append, lambda n: told.append((n, list(worked))), beside=beside)
    # What is told of a batch is told before the next one is worked on.
    assert told == [(n, list(range(n + 1))) for n in range(4)]


def test_a_batch_is_worked_on_while_the_next_is_drawn() -> None:
    log: list[str] = []
    working = threading.Event()
    threads = set()

    def work(number: int) -> None:
        threads.add(threading.current_thread())
        working.set()

    # Drawing the second batch waits for the work on the first: in turn this could not end.
    each(numbered(2, log, working), work, lambda number: None, beside=True)
    assert threading.current_thread() not in threads
    assert len(threads) == 1


def test_no_more_than_one_batch_is_worked_on_and_one_drawn() -> None:
    log: list[str] = []
    release = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            release.wait(0.3)  # long enough for the drawing to run ahead, if it did
            log.append("finished 0")

    each(numbered(4, log), work, lambda number: None, beside=True)
    assert log.index("finished 0") < log.index("draw 2")


def test_modes_of_the_drawing_thread_hold_for_the_work() -> None:
    seen = []
    with torch.no_grad():
        each([0], lambda _: seen.append(torch.is_grad_enabled()), lambda _: None, beside=True)
    each([0], lambda _: seen.append(torch.is_grad_enabled()), lambda _: None, beside=True)
    with torch.inference_mode():
        each([0], lambda _: seen.append(torch.is_inference_mode_enabled()), lambda _: None, beside=True)
    assert seen == [False, True, True]


def test_errors_are_carried_over() -> None:
    log: list[str] = []

    def fail(number: int) -> None:
        if number == 1:
            raise EvaluationError("the work failed")

    done: list[int] = []
    with pytest.raises(EvaluationError, match="the work failed"):
        each(numbered(9, log), fail, done.append, beside=True)
    assert done == [0]
    assert log[-1] == "draw 2"

    def drawn() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    worked: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        each(drawn(), worked.append, done.append, beside=True)
    assert (worked, done) == ([0], [0, 0])  # what was under way was finished


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{**row, "seconds": None} for row in read_rows(folder / "samples.jsonl", EvaluationRow)]


def run(pipe: Any, folder: Path, judge: Any, **more: Any) -> Any:
    options: dict[str, Any] = {"size": "smoke", "judge": judge, "clip": "none", "progress": False, "batch_size": 2}
    options |= {"report": False, "baseline_cache": folder.with_suffix(".cache"), **more}
    return evaluate(pipe, "canvas", ["cat"], out=folder, **options)


def test_the_same_rows_and_numbers_beside_and_in_turn(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    told: dict[bool, list[tuple[str, int, int]]] = {True: [], False: []}
    found = {}
    for beside in (False, True):
        tell = lambda *what, log=told[beside]: log.append(what)  # noqa: E731
        found[beside] = run(erased_pipe, tmp_path / str(beside), judge, beside=beside, progress=tell)
    assert rows_of(tmp_path / "True") == rows_of(tmp_path / "False")
    assert found[True].metrics == found[False].metrics
    assert told[True] == told[False] != []


def test_a_run_killed_beside_goes_on_in_turn(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    whole = run(erased_pipe, tmp_path / "whole", judge)
    interrupted = killed_judge(judge, 3)
    with pytest.raises(KeyboardInterrupt):
        run(erased_pipe, tmp_path / "killed", interrupted, beside=True)
    assert len(rows_of(tmp_path / "killed")) == 4
    again = run(erased_pipe, tmp_path / "killed", judge)
    assert again.metrics == whole.metrics
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")


def test_the_cost_says_what_drawing_took(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    cost = run(erased_pipe, tmp_path / "out", judge).cost
    assert 0 < cost["denoiser_share"] < cost["drawing_share"] < 1
    assert cost["drawing_share"] == pytest.approx(cost["generation_seconds"] / cost["seconds"], rel=1e-6)
    again = run(erased_pipe, tmp_path / "out", judge)
    assert again.cost["drawing_share"] is None
    assert again.cost["denoiser_share"] is None
    assert "Of that, in the denoiser" not in dict(costs(again))


def test_stress_tests_say_it_too(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    results = stress_test(
        erased_pipe, "noise", "cat", size="smoke", samples=1, out=tmp_path / "out", judge=judge, progress=False,
        report=False,
    )  # fmt: skip
    assert 0 < results.cost["denoiser_share"] < results.cost["drawing_share"] < 1
    assert "Of that, in the denoiser" in dict(costs(results))


def test_a_call_that_tells_of_one_step_has_no_share_of_the_denoiser(tiny_pipe: Any) -> None:
    clock = Clock()
    tell: Any = clock.call_arguments(tiny_pipe)["callback_on_step_end"]
    tell(tiny_pipe, 0, torch.zeros(()), {})
    clock.called()
    assert clock.denoising is None
    clock.called()
    assert clock.denoising is None
