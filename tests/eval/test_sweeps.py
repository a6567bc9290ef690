"""Sweeps: what their files may say, that cells are made once and alike, and what their means are."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erasure.cli.main import main
from erasure.errors import ConceptWarning, EvaluationError
from erasure.eval import Results
from erasure.eval.statistics import cluster_bootstrap, wilson
from erasure.eval.sweeps import runner
from erasure.eval.sweeps.means import table_of
from erasure.eval.sweeps.plan import SweepPlan, read_share
from erasure.eval.sweeps.runner import outcome_of, sweep
from erasure.files import held
from tests.eval.conftest import WORLD

FILE = """
models = [{model}]
concepts = ["cat"]
methods = [{{ strategy = "uce", options = {{ vocabulary = 0 }} }}]
suites = ["canvas"]
attacks = [{{ name = "prompt_embeds", options = {{ samples = 1 }} }}, "translation"]
size = "smoke"
judge = "tests.eval.conftest:colour_judge"
"""


@pytest.fixture(scope="module")
def world_folder(tiny_pipe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline on disk, with a `canvas.json` beside it."""
    folder = tmp_path_factory.mktemp("sweep") / "tiny"
    shutil.copytree(tiny_pipe_folder, folder)
    (folder / "canvas.json").write_text(json.dumps(WORLD))
    return folder


@pytest.fixture
def file(world_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.toml"
    path.write_text(FILE.format(model=json.dumps(str(world_folder))))
    return path


DATA: dict[str, Any] = {
    "models": ["canvas-sd"], "concepts": ["dog", "cat"], "methods": ["uce", "itd"], "suites": ["canvas"],
}  # fmt: skip


# The file -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": ["uce"]}, "no key 'method'.*mean 'methods'"),
        ({"models": []}, "models is empty"),
        ({"models": "canvas-sd"}, "models is a text, expected a list"),
        ({"concepts": [1]}, "concepts has a whole number, expected texts"),
        ({"concepts": [" "]}, "concepts has ' ', expected texts"),
        ({"concepts": ["dgo"]}, "'dgo', which canvas-sd does not.*mean 'dog'"),
        ({"concepts": ["dog", "dog"]}, "concepts has 'dog' twice"),
        ({"methods": ["ucce"]}, "methods: .*unknown strategy 'ucce'.*mean 'uce'"),
        ({"methods": [{"strategy": "uce", "preset": "papper"}]}, "has no preset 'papper'"),
        ({"methods": [{"strategy": "uce", "options": {"lamp": 1}}]}, "has no option 'lamp'"),
        ({"methods": [{"strategy": "uce", "option": {}}]}, "no key 'option'.*mean 'options'"),
        ({"methods": [{"label": "x"}]}, "says no strategy"),
        ({"methods": ["uce", {"strategy": "uce", "options": {"vocabulary": 0}}]}, "twice.*label of its own"),
        ({"suites": ["canvass"]}, "unknown suite 'canvass'.*mean 'canvas'"),
        ({"suites": [{"name": "canvas", "options": {"side": 4}}]}, "side is 4"),
        ({"attacks": ["tpyo"]}, "attacks: unknown attack 'tpyo'"),
        ({"attacks": [{"name": "typo", "options": {"samples": 0}}]}, "'samples' is 0"),
        ({"stress": ["quantize"]}, "mean 'quantise'"),
        ({"size": "quik"}, "no size 'quik'.*mean 'quick'"),
        ({"seeds": [0, True]}, "seeds has True"),
        ({"seeds": [-1]}, "seeds has -1"),
        ({"images": 1}, "images is a whole number, expected true or false"),
        ({"images": None}, "images is nothing, expected true or false"),
        ({"size": datetime.date(2025, 1, 1)}, "size is a date, expected a text"),
        ({"size": datetime.time(1)}, "size is a time, expected a text"),
        ({"concepts": ("dog",)}, "concepts is a value of type tuple, expected a list"),
        ({"concepts": [b"dog"]}, "concepts has a value of type bytes, expected texts"),
        ({"methods": [Path("uce")]}, r"methods has a value of type \w*Path, expected a text or a table"),
        ({"judge": "nowhere:judge"}, "nowhere"),
        ({"groups": {"pets": ["dog", "gat"]}}, "'gat', which is none of the concepts.*mean 'cat'"),
        ({"groups": {"pets": []}}, "pets is empty"),
    ],
)
def test_what_a_file_may_not_say_is_refused_before_anything_is_made(change: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        SweepPlan.of({**DATA, **change})


def test_what_is_taken_for_an_object_is_told_once(tiny_pipe_folder: Path) -> None:
    data = {**DATA, "models": [str(tiny_pipe_folder)], "concepts": ["Van Gogh", "ink:style", "sky"]}
    with pytest.warns(ConceptWarning, match="'Van Gogh', 'sky': taken for objects") as told:
        SweepPlan.of(data)
    assert len(told) == 1


@pytest.mark.parametrize("key", ["models", "concepts", "methods", "suites"])
def test_what_a_file_must_say(key: str) -> None:
    data = {name: value for name, value in DATA.items() if name != key}
    with pytest.raises(EvaluationError, match="measures nothing" if key == "suites" else f"says no {key}"):
        SweepPlan.of(data)


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "s.toml").write_text("models = [")
    assert main(["sweep", str(tmp_path / "s.toml"), "--out", str(tmp_path / "o")]) == 2
    assert "is no TOML" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_shares_are_disjoint_complete_and_mixed(count: int) -> None:
    plan = SweepPlan.of({**DATA, "concepts": ["dog", "cat", "car", "house"], "seeds": [0, 1, 2]})
    shares = [plan.share(number, count) for number in range(1, count + 1)]
    folders = [str(cell.folder) for share in shares for cell in share]
    assert len(folders) == len(set(folders)) == 24
    assert set(folders) == {str(cell.folder) for cell in plan.cells}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if count <= 4:
        assert all(len({cell.method.label for cell in share}) == 2 for share in shares), "no share is of one method"


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "-1/2", "1/2/3", "a/b", "١/٢"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(EvaluationError, match="share is"):
        read_share(text)


# Making -------------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Everything but what it has cost: time, and images that were found where an earlier run drew them."""
    names, cost = ("samples.jsonl", "attacks.jsonl"), ("seconds", "recalled")
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors" and path.parent.name == "erasure":
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif path.name in names:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{key: value for key, value in row.items() if key not in cost} for row in rows]
            found[str(path.relative_to(folder))] = json.dumps(kept, sort_keys=True).encode()
        elif path.name == "results.json":
            found[str(path.relative_to(folder))] = json.dumps(json.loads(path.read_text())["metrics"]).encode()
    return found


def test_a_killed_sweep_goes_on_to_the_same_bits(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    outcomes = sweep(file, out=whole)
    assert [outcome.state for outcome in outcomes] == ["refused"]
    states = {part.what: part.state for part in outcomes[0].parts}
    assert states == {
        "erasure": "done", "evaluation-canvas": "done", "attack-prompt_embeds": "done", "attack-translation": "refused"
    }  # fmt: skip
    assert any("translation refused" in reason for reason in outcomes[0].reasons)

    def kill(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    for place in ("evaluate", "attack"):  # once behind the erasure, and once behind the evaluation
        with monkeypatch.context() as patch:
            patch.setattr(runner, place, kill)
            with pytest.raises(KeyboardInterrupt):
                sweep(file, out=killed)
        assert not list(killed.rglob("cell.json"))
    assert [outcome.state for outcome in sweep(file, out=killed)] == ["refused"]
    assert contents(killed) == contents(whole)
    assert len(contents(whole)) == 5

    # What is done is not made again, and another file is refused.
    with monkeypatch.context() as patch:
        patch.setattr(runner, "evaluate", lambda pipe, name, *, out, **_: Results.load(out))
        patch.setattr("erasure.erase", kill)
        sweep(file, out=whole)
    other = tmp_path / "other.toml"
    other.write_text(file.read_text().replace('"cat"', '"dog"'))
    with pytest.raises(EvaluationError, match=r"sweep of something else.*concepts"):
        sweep(other, out=whole)

    # The command lists cells, and gives the table of what there is.
    capsys.readouterr()
    assert main(["sweep", str(file), "--out", str(whole), "--dry-run"]) == 0
    assert "1 cells" in capsys.readouterr().out
    assert main(["sweep", str(file), "--out", str(whole), "--table-only", "--format", "csv"]) == 0
    said = capsys.readouterr().out
    assert "UA" in said
    assert "translation" in said
    assert "refused: " in said

    # Results of other options are no row of this sweep.
    file.write_text(file.read_text().replace("vocabulary = 0", "vocabulary = 8"))
    for flag in ("--dry-run", "--table-only"):
        assert main(["sweep", str(file), "--out", str(whole), flag]) == 2
        assert "holds a sweep of something else" in capsys.readouterr().err


def test_what_fails_is_recorded_and_the_sweep_goes_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("out of memory <script>\x1b[2J")

    out = tmp_path / "out"
    file.write_text(file.read_text().replace(', "translation"', ""))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "attack", broken)
        assert main(["sweep", str(file), "--out", str(out), "--format", "html"]) == 1
    said = capsys.readouterr()
    assert "1 cells failed" in said.err
    assert "\x1b" not in said.out + said.err
    page = (out / "table.html").read_text()
    assert "<script>" not in page
    # Tried again, it ends as it should.
    assert main(["sweep", str(file), "--out", str(out)]) == 0
    assert "1 done" in capsys.readouterr().out


def test_a_method_that_a_model_lacks_something_for_is_refused_with_the_reason(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from erasure.backbones import Backbone

    monkeypatch.setattr(Backbone, "lacks", lambda self, need: f"no {need} here")
    plan = SweepPlan.read(file)
    outcomes = sweep(plan, out=tmp_path / "out")
    assert [outcome.state for outcome in outcomes] == ["refused"]
    assert "here" in outcomes[0].reasons[0]
    (row, *_) = table_of(plan, tmp_path / "out").rows
    assert "here" in row["missing"]["results"]


@contextmanager
def at_work(folder: Path, recipe: dict[str, Any]) -> Iterator[None]:
    """Another process at a cell."""
    with held(folder, recipe, file=runner.RECIPE, what="cell"):
        yield


def test_no_cell_is_done_twice_at_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(file.read_text().replace('"cat"', '"cat", "dog"'))
    plan = SweepPlan.read(file)
    monkeypatch.setattr(runner, "_parts", lambda *args: [runner.PartOutcome("erasure", "done")])
    first, second = plan.cells
    recipe = {**first.recipe, **{key: plan.recipe[key] for key in ("measures", "judge", "images")}}
    with at_work(tmp_path / "out" / first.folder, recipe):
        # The folder of the sweep is taken by its recipe first, as the other process has done.
        (tmp_path / "out" / "recipe.json").write_text(json.dumps(json.loads(json.dumps(plan.recipe))))
        outcomes = sweep(plan, out=tmp_path / "out")
    assert [outcome.state for outcome in outcomes] == ["elsewhere", "done"]
    assert outcome_of(plan, tmp_path / "out", second).state == "done"


def test_a_damaged_cell_is_refused(file: Path, tmp_path: Path) -> None:
    plan = SweepPlan.read(file)
    folder = tmp_path / "out" / plan.cells[0].folder
    folder.mkdir(parents=True)
    (folder / "cell.json").write_text('{"parts": [{"what": 1}]}')
    with pytest.raises(EvaluationError, match=r"cell\.json"):
        outcome_of(plan, tmp_path / "out", plan.cells[0])


# Means --------------------------------------------------------------------------------------------------------------


def measured(value: float | None, n: int, **more: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else wilson(value * n, n)[1:]
    return {"concept": "x", "variant": "after", "value": value, "low": low, "high": high, "n": n, "recipe": {},
            **more}  # fmt: skip


def written(plan: SweepPlan, out: Path, values: dict[Any, Any]) -> None:
    """Results of every cell, by concept and seed."""
    for cell in plan.cells:
        rows = [{"name": name, **row} for name, row in values[cell.concept, cell.seed].items()]
        entry = {"name": "e", "seconds": 2.0, "size_bytes": 1000}
        found = Results("canvas", "quick", {"name": "m"}, [entry], rows, {})
        folder = out / cell.folder / plan.measures[0].folder
        folder.mkdir(parents=True)
        found.save(folder)


def test_means_have_the_outer_bounds_of_bootstrap_and_wilson(tmp_path: Path) -> None:
    plan = SweepPlan.of({**DATA, "methods": ["uce"], "seeds": [0, 1]})
    shares = {("dog", 0): 1.0, ("dog", 1): 0.9, ("cat", 0): 0.5, ("cat", 1): 0.6}
    values = {key: {"UA": measured(share, 10, missing=1), "drift": measured(0.1, 10)} for key, share in shares.items()}
    written(plan, tmp_path, values)
    (row,) = table_of(plan, tmp_path).rows
    cell = row["cells"]["UA"]
    ordered = [shares[one.concept, one.seed] for one in plan.cells]
    drawn = cluster_bootstrap(lambda index: float(np.asarray(ordered)[index].mean()), [c.concept for c in plan.cells])
    spread = wilson(0.75 * 40, 40)
    assert cell["value"] == pytest.approx(0.75)
    assert (cell["low"], cell["high"]) == (min(drawn.low, spread.low), max(drawn.high, spread.high))
    assert (cell["n"], cell["missing"], cell["concepts"], cell["cells"]) == (40, 4, 2, 4)
    assert (row["label"], row["concept"], row["seconds"], row["size_bytes"]) == ("uce", "mean of 2", 2.0, 1000)
    low, high = wilson(1, 10)[1:]
    assert (row["cells"]["drift"]["low"], row["cells"]["drift"]["high"]) == (pytest.approx(low), pytest.approx(high))


def test_there_is_no_mean_over_some_of_the_concepts(tmp_path: Path) -> None:
    plan = SweepPlan.of({**DATA, "methods": ["uce"], "groups": {"dogs": ["dog"], "all": ["dog", "cat"]}})
    values = {("dog", 0): {"UA": measured(1.0, 10)}, ("cat", 0): {"UA": measured(None, 0, reason="a control fails")}}
    written(plan, tmp_path, values)
    dogs, both = table_of(plan, tmp_path).rows
    assert (dogs["concept"], both["concept"]) == ("dogs: 1", "all: 2")
    assert dogs["cells"]["UA"]["value"] == 1.0
    assert "1 of 2 have no value: a control fails" in both["missing"]["UA"]
    shutil.rmtree(tmp_path / plan.cells[1].folder)
    _, both = table_of(plan, tmp_path).rows
    assert not both["cells"]
    assert "not measured yet" in both["missing"]["UA"]


def test_numbers_of_unlike_recipes_have_no_mean(tmp_path: Path) -> None:
    plan = SweepPlan.of({**DATA, "methods": ["uce"]})
    values = {(name, 0): {"UA": measured(1.0, 10, recipe={"torch": name})} for name in plan.concepts}
    written(plan, tmp_path, values)
    with pytest.raises(EvaluationError, match=r"measured differently.*torch"):
        table_of(plan, tmp_path)
