"""Every value of every preset, held against `presets.json`, which says where each value is from.

For each strategy the table has what its presets have in `common`, and what each of them has besides: option by option
the value and its source. A preset, an option or a value that is not in the table fails.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from erasure.strategies import STRATEGIES, get

TABLE: dict[str, Any] = json.loads(Path(__file__).with_name("presets.json").read_text(encoding="utf-8"))


class Case(NamedTuple):
    """A preset of a strategy."""

    strategy: str
    preset: str

    def __str__(self) -> str:
        return f"{self.strategy}-{self.preset}"


CASES = [Case(name, preset) for name in sorted(STRATEGIES.built_in) for preset in get(name).presets]


def row(case: Case) -> dict[str, list[Any]]:
    """Value and source of every option."""
    rows = TABLE[case.strategy]
    return {**rows["common"], **rows["presets"][case.preset]}


def test_the_table_has_no_preset_that_does_not_exist() -> None:
    listed = {Case(name, preset) for name, rows in TABLE.items() for preset in rows["presets"]}
    assert listed == set(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_of_a_preset_is_the_one_of_its_source(case: Case) -> None:
    method, wanted = get(case.strategy).configured(case.preset), row(case)
    found = {option: json.loads(json.dumps(getattr(method, option))) for option in method.option_names()}
    assert found == {option: value for option, (value, _) in wanted.items()}
    assert {option: type(value) for option, value in found.items()} == {
        option: type(value) for option, (value, _) in wanted.items()
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_value_says_where_it_is_from(case: Case) -> None:
    assert all(isinstance(source, str) and len(source) > 3 for _, source in row(case).values())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_preset_that_retains_nothing_says_so(case: Case) -> None:
    """Else what a user names as to survive would be dropped without a word."""
    method = get(case.strategy).configured(case.preset)
    option = method.ignores_retain()
    assert not option or option in method.option_names()
    in_closed_form = case.strategy == "mace"  # which trains on nothing that must survive
    if (getattr(method, "retain_batch", 1) == 0 and not in_closed_form) or getattr(method, "retain_weight", 1) == 0:
        assert option
