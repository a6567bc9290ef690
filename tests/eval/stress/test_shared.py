"""What every registered stress test does: end to end, after a kill, over two processes, never without its control."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import ErasureManager
from erasure.cli.stress import StressOptions
from erasure.errors import EvaluationError, OptionError
from erasure.eval import Results, compare, evaluate
from erasure.eval.metrics import METRICS
from erasure.eval.sizes import SIZES
from erasure.eval.stress import STRESS_TESTS, StressTest, runner
from erasure.eval.stress.conditions import Condition
from erasure.eval.table import read_rows
from tests.eval.conftest import killed_judge
from tests.eval.stress.conftest import CASES, cats, rows_of

NAMES = STRESS_TESTS.names()


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """As many threads as each of several processes has: more of them add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_test_has_a_case() -> None:
    assert set(CASES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_described(name: str) -> None:
    kind = STRESS_TESTS.get(name)
    assert all(text and text == text.strip() for text in (kind.title, kind.paper, kind.control))
    assert set(kind.metrics) <= set(METRICS.names())
    assert "control_seen" in kind.metrics
    assert set(kind.sizes) == set(SIZES)
    for size in SIZES:
        kind.configured(size)
    own = {field.name for field in dataclasses.fields(kind)}
    assert own.isdisjoint(field.name for field in dataclasses.fields(StressOptions))
    with pytest.raises(EvaluationError, match="has no size 'huge'"):
        kind.configured("huge")
    with pytest.raises(OptionError, match="'samples' is 0"):
        kind.configured(samples=0)


@pytest.mark.parametrize("name", NAMES)
def test_end_to_end(
    name: str, stressed_pipe: Any, run: Any, tmp_path: Path, tensors_of: Any, changed_tensors: Any
) -> None:
    before = tensors_of(stressed_pipe)
    results = run(stressed_pipe, name)
    assert changed_tensors(before, stressed_pipe) == set()
    ErasureManager(stressed_pipe).verify(least_strength=0)
    assert results.suite == f"stress {name}"
    assert Results.load(tmp_path / "out") == results
    rows = rows_of(tmp_path / "out")
    drawn = dict.fromkeys(row["variant"] for row in rows)
    assert list(drawn) == ["before", "after", *CASES[name].conditions]
    # The same noise everywhere, and the same prompts but for those of another thing.
    seeds = {variant: {r["sample_id"]: r["seed"] for r in rows if r["variant"] == variant} for variant in drawn}
    assert all(
        seeds[variant].get(key, seed) == seed
        for variant in drawn for key, seed in seeds["before"].items()
    )  # fmt: skip
    for row in results.metrics:
        low, high = METRICS.get(row["name"]).bounds
        assert row["recipe"]["stress"]["name"] == name
        assert row["value"] is not None or row["reason"]
        for key in ("value", "low", "high"):
            value = row.get(key)
            assert value is None or ((low is None or low <= value) and (high is None or value <= high)), row
    shown = [row for row in results.metrics if row["name"] == "concept_shown"]
    assert [row["variant"] for row in shown] == list(drawn)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/webp") > 0
    assert results.cost["images_generated"] == len(rows)
    # It is finished: nothing is drawn again.
    kept = (tmp_path / "out" / "samples.jsonl").read_bytes()
    assert run(stressed_pipe, name).metrics == results.metrics
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == kept


@pytest.mark.parametrize("name", ["noise", "relearn", "strength", "footprint"])
def test_a_killed_run_goes_on_to_the_same_rows(
    name: str, stressed_pipe: Any, run: Any, judge_of: Any, tmp_path: Path
) -> None:
    whole = run(stressed_pipe, name, batch_size=2)
    expected, judge = rows_of(tmp_path / "out"), judge_of(name)
    interrupted = killed_judge(judge, min(12, len(expected) // 2 - 2))
    with pytest.raises(KeyboardInterrupt):
        run(stressed_pipe, name, "killed", judge=interrupted, batch_size=2)
    done = rows_of(tmp_path / "killed")
    assert 0 < len(done) < len(expected)
    with (tmp_path / "killed" / "samples.jsonl").open("ab") as file:
        file.write(b'{"sample_id": "cat-no')
    again = run(stressed_pipe, name, "killed", batch_size=2)
    assert rows_of(tmp_path / "killed") == expected
    assert again.metrics == whole.metrics
    assert not list((tmp_path / "killed").rglob("training.ckpt"))


@pytest.mark.parametrize("name", NAMES)
def test_no_verdict_where_the_judge_sees_nothing(name: str, stressed_pipe: Any, run: Any) -> None:
    def dogs(images: Any) -> list[Any]:
        found = cats(images)
        for each in found:
            each.object = "dog"
        return found

    dogs.version = "dogs"  # type: ignore[attr-defined]
    if name == "relearn":
        with pytest.raises(EvaluationError, match="there is nothing to learn from: the judge sees 'cat' in 0 of"):
            run(stressed_pipe, name, judge=dogs)
        return
    few = {} if name == "footprint" else {"samples": 1, "retained": 1}
    results = run(stressed_pipe, name, judge=dogs, **few)
    assert results.get("control_seen", "before")["holds"] is False
    for row in results.metrics:
        if row["name"] in ("concept_shown", "recovered", "S50", "savings"):
            assert row["value"] is None
            assert "positive control" in row["reason"]
        assert row["name"] in ("edit_survives", "footprint", "footprint_on_concept") or "verdict" not in row


def test_no_verdict_where_the_judge_sees_it_everywhere(stressed_pipe: Any, run: Any) -> None:
    results = run(stressed_pipe, "merge", judge=cats)
    assert results.get("control_unasked", "before")["holds"] is False
    assert "negative control" in results.get("recovered", "merge_0.25")["reason"]


COMPARED = [name for name in NAMES if name in ("quantise", "noise", "stack", "restore")]


@pytest.mark.parametrize("name", COMPARED)
def test_no_verdict_where_the_control_of_the_change_fails(
    name: str, stressed_pipe: Any, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runner._Stress._finish

    def finish(self: Any, condition: Condition, batch: Any, images: Any, seconds: float) -> None:
        monkeypatch.setattr(self.bench, "shown", lambda row: condition.name == "before" or fails(condition))
        real(self, condition, batch, images, seconds)

    def fails(condition: Condition) -> bool:
        return condition.control == "negative"

    monkeypatch.setattr(runner._Stress, "_finish", finish)
    results = run(stressed_pipe, name)
    rows = [row for row in results.metrics if row["name"] == "recovered"]
    controls = [row for row in results.metrics if row["name"] == "control_changed"]
    assert rows
    assert controls
    assert not any(row["holds"] for row in controls)
    for row in rows:
        assert row["value"] is None
        assert "control: " in row["reason"]
        assert "verdict" not in row


SCRIPT = """
import sys
import types
from pathlib import Path
root, model, work = map(Path, sys.argv[1:])
sys.path[:0] = [str(root)]
# Other packages may have brought a folder of tests of their own, which would be found first.
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(root / "tests")]
import torch
torch.set_num_threads(1)
from tests.models import make_tiny_pipe
from tests.eval.conftest import seeing_judge, stock_pictures
from erasure.eval.table import read_rows
from tests.eval.stress.conftest import CASES, cats, make_erasure
from erasure import ErasureManager
from erasure.eval import evaluate, stress_test
pipe = make_tiny_pipe()
pipe.register_to_config(_name_or_path=str(model))
judge = seeing_judge(stock_pictures(pipe))
ErasureManager(pipe).add(make_erasure(), check_base=False)
for name in ("noise", "relearn"):
    stress_test(pipe, name, size="smoke", judge=cats, progress=False, batch_size=1, samples=3, retained=2,
                out=work / name, **CASES[name].options)
evaluate(pipe, size="full", judge=judge, baseline_cache=work / "cache", progress=False, batch_size=1,
         out=work / "evaluation")
"""


def test_two_processes_give_what_one_gives(stressed_pipe: Any, run: Any, judge: Any, tmp_path: Path) -> None:
    """Of an evaluation, and of stress tests: a change of weights, and a training that is shared out, where one
    process draws with what another has learned."""
    work = tmp_path / "two"
    work.mkdir()
    (work / "run.py").write_text(SCRIPT)
    root = Path(__file__).parents[3]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # As torchrun starts them, without the seconds that it takes to start itself.
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | world | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(work / "run.py"), str(root), str(tmp_path / "model"), str(work)]
    said = [work / f"said-{rank}.txt" for rank in range(2)]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=said[rank].open("w"),
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        while all(process.poll() is None for process in processes):
            time.sleep(0.1)
        failed = [rank for rank, process in enumerate(processes) if process.poll()]
        assert not failed, said[failed[0]].read_text()[-3000:]
        assert [process.wait(100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for name in ("noise", "relearn"):
        single = run(stressed_pipe, name, name, judge=cats, batch_size=1)
        assert rows_of(work / name) == rows_of(tmp_path / name)
        both = Results.load(work / name)
        assert both.metrics == single.metrics
        assert both.cost["processes"] == 2
    single = evaluate(
        stressed_pipe, size="full", judge=judge, baseline_cache=tmp_path / "cache", progress=False, batch_size=1,
        out=tmp_path / "evaluation",
    )  # fmt: skip
    both = Results.load(work / "evaluation")
    assert evaluated(work / "evaluation") == evaluated(tmp_path / "evaluation")
    assert both.metrics == single.metrics
    assert both.cost["processes"] == 2
    names = sorted(path.name for path in (work / "evaluation").glob("*.jsonl"))
    assert names == ["features.jsonl", "samples.jsonl"]


def evaluated(folder: Path) -> list[dict[str, Any]]:
    """Rows of an evaluation without its times."""
    return [
        {key: value for key, value in row.items() if key != "seconds"} for row in read_rows(folder / "samples.jsonl")
    ]


def test_unlike_recipes_are_not_compared(stressed_pipe: Any, run: Any) -> None:
    first = run(stressed_pipe, "merge")
    again = run(stressed_pipe, "merge", "again")
    other = run(stressed_pipe, "merge", "other", shares=(0.25, 0.5))
    table = compare([first, again])
    assert "recovered" in table.columns
    labels = [row["label"] for row in table.rows]
    assert labels.count("base") == 1
    assert {"out: merge_0.25", "again: merge_0.25"} <= set(labels)
    with pytest.raises(EvaluationError, match=r"stress\.shares"):
        compare([first, other])


def test_another_run_is_not_gone_on_with(stressed_pipe: Any, run: Any) -> None:
    run(stressed_pipe, "merge")
    with pytest.raises(EvaluationError, match="shares"):
        run(stressed_pipe, "merge", shares=(0.5,))


def test_what_cannot_be_tested_is_refused(world_pipe: Any, stressed_pipe: Any, run: Any, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"unknown stress test 'quantize'.*Did you mean 'quantise'"):
        runner.stress_test(stressed_pipe, "quantize")
    with pytest.raises(EvaluationError, match="has no prompts of a concept"):
        run(stressed_pipe, "merge", suite="removal")
    with pytest.raises(EvaluationError, match="names 2 concepts"):
        run(stressed_pipe, "merge", concept="cat and dog")
    with pytest.raises(EvaluationError, match="no other erasure is given"):
        run(stressed_pipe, "stack", others=())
    ErasureManager(stressed_pipe).unload()
    with pytest.raises(EvaluationError, match="no erasure is attached and in force"):
        run(stressed_pipe, "merge", concept="cat")
    assert not (tmp_path / "out").exists()


def test_a_test_without_a_control_is_no_stress_test() -> None:
    class Blind(StressTest):
        def conditions(self, bench: Any) -> list[Condition]:
            return []

    with pytest.raises(ValueError, match="names no control"):
        STRESS_TESTS.register("blind")(Blind)


def test_progress_is_told(stressed_pipe: Any, run: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    run(stressed_pipe, "merge", progress=lambda *args: seen.append(args), shares=(0.5,), batch_size=2)
    assert seen[0] == ("before", 2, 5)
    assert seen[-1] == ("merge_0.5", 5, 5)


def test_missing_answers_are_counted(stressed_pipe: Any, run: Any, judge: Any) -> None:
    calls = 0

    def failing(images: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise ValueError("cannot see")
        return judge(images)

    failing.version = "failing"  # type: ignore[attr-defined]
    results = run(stressed_pipe, "merge", judge=failing, shares=(0.5,), batch_size=2)
    row = results.get("concept_shown", "merge_0.5")
    assert (row["value"], row["n"], row["missing"]) == (None, 0, 3)
    recovered = results.get("recovered", "merge_0.5")
    assert recovered["value"] is None
    rows = [json.loads(line) for line in (results.folder / "samples.jsonl").read_text().splitlines()]
    assert {row["failures"].get("judge") for row in rows if row["variant"] == "merge_0.5"} == {
        "ValueError: cannot see"
    }
