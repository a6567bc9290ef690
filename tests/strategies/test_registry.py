from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from erasure.carriers.edits import Edits
from erasure.concept import Concept
from erasure.errors import OptionError, UnknownStrategyError
from erasure.options import CountOrZero, NotNegative
from erasure.strategies import STRATEGIES, Fit, Strategy, available, get, register


@dataclass(frozen=True, kw_only=True)
class Nothing(Strategy):
    """A strategy that does nothing."""

    amount: NotNegative = 1.0
    where: Literal["here", "there"] = "here"
    count: CountOrZero = 2
    presets = {"much": {"amount": 10.0, "count": 5}}  # noqa: RUF012

    def fit(self, backbone: Any, concepts: Sequence[Concept], *, seed: int, progress: Callable[[float], None]) -> Fit:
        return Fit(Edits(), {})


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that the test may change."""
    available()
    monkeypatch.setattr(STRATEGIES, "_registered", dict(STRATEGIES._registered))


def test_built_in_strategies_are_there() -> None:
    assert {"hirm", "uce", "diff_quickfix"} <= set(available())
    for name, strategy in available().items():
        assert strategy.name == name
        for fact in ("title", "paper", "cost", "protects", "needs", "carriers"):
            assert getattr(strategy, fact), f"{name} does not say its {fact}"
        assert strategy.protects in ("hosted pipeline", "released weights")
        for preset in strategy.presets:
            strategy.configured(preset)


def test_the_decorator_registers() -> None:
    assert register("nothing")(Nothing) is Nothing
    assert get("nothing") is Nothing
    assert Nothing.name == "nothing"
    assert "nothing" in available()
    register("nothing")(Nothing)  # again, as when a module is reloaded


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'uce' is registered already: erasure.strategies.uce.UCE"):
        register("uce")(Nothing)
    assert get("uce").__name__ == "UCE"


def test_an_unknown_name_is_a_key_error_that_reads_well() -> None:
    with pytest.raises(UnknownStrategyError, match="Did you mean 'hirm'") as caught:
        get("hirn")
    assert isinstance(caught.value, KeyError)
    assert not str(caught.value).startswith(("'", '"'))


def test_what_is_no_strategy_is_refused() -> None:
    class Undecorated(Nothing):
        """Its options would be those of its parent."""

    for wrong, why in ((int, "no subclass"), (Nothing(), "no subclass"), (Undecorated, "lacks the decorator")):
        with pytest.raises(ValueError, match=why):
            register("wrong")(wrong)
    assert "wrong" not in available()


def test_presets_and_options() -> None:
    assert Nothing.configured() == Nothing()
    assert Nothing.configured("much", amount=3) == Nothing(amount=3, count=5)
    with pytest.raises(OptionError, match="no preset 'little'; there are: much"):
        Nothing.configured("little")
    with pytest.raises(OptionError, match="no option 'amonut'; there are: amount, where, count"):
        Nothing.configured(amonut=1)


@pytest.mark.parametrize(
    "options",
    [{"where": "nowhere"}, {"count": 1.5}, {"count": -1}, {"amount": float("nan")}, {"amount": "1"}, {"amount": None}],
)
def test_values_that_an_option_does_not_allow(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"option '{next(iter(options))}'"):
        Nothing.configured(**options)
