"""The sweeps whose tables stand in docs: what they are of, and how their tables are written."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import tyro

from erasure.assets.build import __main__ as build
from erasure.assets.build import across, concepts, everything, sweep
from erasure.assets.build.measured import Measured
from erasure.assets.build.tables import SHARED, WEAPONS
from erasure.assets.world import OBJECTS, STYLES, UNSAFE
from erasure.cli.arguments import parse
from erasure.eval.comparison import Comparison
from erasure.eval.rows import Record
from erasure.strategies import STRATEGIES

CHECKOUT = Path(__file__).resolve().parents[2]


def test_what_is_reported_is_what_chose_no_defaults() -> None:
    measured = {concept.target for concept in concepts.concepts()[1::2]}
    plan, on_every_family = sweep.plan("methods"), sweep.plan("across").concepts
    assert set(plan.concepts) == measured
    assert {method.strategy for method in plan.methods} == set(STRATEGIES.names())
    assert {group: set(names) for group, names in plan.groups.items()} == {
        "objects": measured & set(OBJECTS), "styles": measured & set(STYLES), WEAPONS: measured & set(UNSAFE),
        SHARED: set(on_every_family),
    }  # fmt: skip
    assert set(on_every_family) <= measured
    assert len(across.SHOWN) == 2 * len(STYLES)


def test_a_size_that_is_given_is_that_of_everything() -> None:
    assert {measure.size for measure in sweep.plan("across", "smoke").measures} == {"smoke"}
    assert {measure.size for measure in sweep.plan("across").measures} == {"full"}


def test_shares_of_all_methods_are_run_ahead_of_their_tables(tmp_path: Path) -> None:
    groups = everything.steps(tmp_path)
    names = [[step.name for step in group] for group in groups]
    assert [f"methods-{number}" in names[1] for number in range(1, everything.SHARES + 1)] == [
        True
    ] * everything.SHARES
    assert "methods" in names[2]


def understand(program: str, name: str, arguments: Sequence[str]) -> None:
    """Parse the options of a command with what reads them, and carry nothing out.

    Args:
        program: What `python -m` runs.
        name: Of the command.
        arguments: Its options.
    """
    if program == "erasure.assets.build":
        stub = functools.wraps(build.STEPS[name])(lambda **options: None)
        tyro.extras.subcommand_cli_from_dict({name: stub, "another": stub}, args=[name, *arguments])
        return
    module = importlib.import_module(f"{'benchmarks' if program == 'benchmarks' else 'erasure.cli'}.{name}")
    (options,) = (
        each for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and each.__name__.endswith("Options")
    )  # fmt: skip
    parse(options, name, arguments)


@pytest.mark.parametrize("into", [None, Path("measured")])
def test_every_command_of_everything_is_understood(tmp_path: Path, into: Path | None) -> None:
    found = [step for group in everything.steps(tmp_path, into) for step in group]
    assert len({step.name for step in found}) == len(found)
    for program, name, *arguments in (step.arguments for step in found):
        understand(program, name, arguments)


def test_every_command_that_docs_give_for_figures_is_understood() -> None:
    pages = [*(CHECKOUT / "docs").glob("*.md"), *(CHECKOUT / "docs" / "measured").iterdir(), *CHECKOUT.glob("*.md")]
    texts = [page.read_text() for page in pages]
    ends = r"[`\"\n]"
    found = {
        command for text in texts for command in re.findall(rf"python\s-m\s(erasure\.assets\.build.*?){ends}", text)
    }
    assert len(found) > 20
    for command in sorted(found):
        words = [word for word in command.split("#")[0].split() if word != "..."]
        # A page may name the program alone, or its help.
        if len(words) > 1 and words[-1] != "--help":
            understand(*words[:2], words[2:])


def test_everything_makes_all_figures_that_have_a_command() -> None:
    steps = [step.arguments for group in everything.steps(Path(), Path("docs/measured")) for step in group]
    made = {" ".join(["python", "-m", *arguments[:2]]) for arguments in steps}
    commands = {str(Measured.read(file).command) for file in (CHECKOUT / "docs" / "measured").iterdir()}
    wanted = {" ".join(command.split()[:4]) for command in commands if command.startswith("python")}
    # It takes another package, which this one does not bring.
    assert wanted - made == {"python -m benchmarks eval-unlearn"}


def test_no_two_commands_of_a_group_write_one_file(tmp_path: Path) -> None:
    files = {"several": "several", "requests": "requests", "evaluate": "doors", "suite": ""}
    for group in everything.steps(tmp_path, Path("docs/measured")):
        writing = [step for step in group if "--into" in step.arguments]
        named = [files.get(step.arguments[1], step.arguments[1]) or step.arguments[2] for step in writing]
        assert len(set(named)) == len(named)


def test_where_an_erasure_lies_is_where_the_sweep_puts_it(tmp_path: Path) -> None:
    cells = sweep.plan("methods").cells
    found = sweep.erasure_of(tmp_path, "itd", "dog")
    assert found in {tmp_path / cell.folder / sweep.ERASURE for cell in cells}
    for model, strategies in everything.AUDITED.items():
        cells = sweep.plan("methods" if model == "canvas-sd" else "across").cells
        for strategy in strategies:
            found = sweep.erasure_of(tmp_path, strategy, "dog", model)
            assert found in {tmp_path / cell.folder / sweep.ERASURE for cell in cells}


def test_there_is_a_row_for_each_method_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = {"value": 1.0, "low": 0.5, "high": 1.0, "n": 4, "missing": 0, "concepts": 6, "cells": 6}
    done = {"name": "uce", "variant": "after", "model": "canvas-sd", "cells": dict.fromkeys(sweep.RATES, cell),
            "missing": {}, "seconds": 1.0, "size_bytes": 2000, "size": "full", "concept": "mean of 6",
            "suite": "canvas"}  # fmt: skip
    refused = {**done, "model": "canvas-flux", "cells": {}, "missing": {"results": "no trajectories here"}}
    del refused["seconds"]
    means = ({**done, "variant": "before"}, {**done, "name": "hirm"}, done, refused)
    monkeypatch.setattr(sweep, "table_of", lambda plan, out: Comparison(sweep.RATES, means))
    rate = {"value": 1.0, "low": 0.5, "high": 1.0, "n": 4}
    about = {"size": "full", "group": "mean of 6", "concepts": 6}
    measured = {**about, **dict.fromkeys(sweep.RATES, rate), "seconds": 1.0, "kB": 2.0}
    absent = {"value": None, "reason": "no trajectories here"}
    assert sweep.rows(sweep.plan("across"), tmp_path) == [
        {"method": "uce", "model": "canvas-sd", **measured},
        {"method": "uce", "model": "canvas-flux", **about, **dict.fromkeys(sweep.RATES, absent)},
        {"method": "hirm", "model": "canvas-sd", **measured},
    ]


def test_figures_of_further_suites_have_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(suite: str, **values: float) -> Record:
        cells = {name: {"value": value, "low": value, "high": value, "n": 1} for name, value in values.items()}
        return {"name": "uce", "variant": "after", "model": "canvas-sd", "suite": suite, "cells": cells, "missing": {},
                "size": "quick", "concept": "objects: 12", "seconds": 1.0, "size_bytes": 2000}  # fmt: skip

    means = (mean("canvas", UA=0.5, IRA=0.8), mean(sweep.UNSEEN, UA=0.7))
    monkeypatch.setattr(sweep, "table_of", lambda plan, out: Comparison((), means))
    (row,) = sweep.rows(sweep.plan("methods"), tmp_path)
    assert (row["group"], row["concepts"]) == ("objects", 12)
    assert [row[name]["value"] for name in ("UA", "IRA", sweep.UA_UNSEEN)] == [0.5, 0.8, 0.7]  # type: ignore[index]
