"""What every registry does, over all of them; what is special of strategies stands in their own folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from erasure import registry as module
from erasure.cli.described import stand_in
from erasure.errors import BrokenPluginError, BrokenPluginWarning, ErasureError, OptionError
from erasure.eval.attacks import ATTACKS
from erasure.eval.detectors import DETECTORS
from erasure.eval.metrics import METRICS
from erasure.eval.stress import STRESS_TESTS
from erasure.eval.suites import SUITES
from erasure.registry import INDEX, Registry, index_of
from erasure.strategies import STRATEGIES

REGISTRIES = {
    registry.plural: registry for registry in (STRATEGIES, SUITES, ATTACKS, STRESS_TESTS, DETECTORS, METRICS)
}


@pytest.fixture(params=REGISTRIES)
def registry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """A registry that the test may change."""
    chosen = REGISTRIES[request.param]
    chosen.available()
    monkeypatch.setattr(chosen, "_registered", dict(chosen._registered))
    return chosen


def plugin(monkeypatch: pytest.MonkeyPatch, registry: Registry[Any], *points: tuple[str, str, Any]) -> None:
    """Let other packages name things: name, `module:attribute`, and what loading gives or raises."""
    loaded = {value: thing for _, value, thing in points}

    def load(point: EntryPoint) -> Any:
        if isinstance(loaded[point.value], BaseException):
            raise loaded[point.value]
        return loaded[point.value]

    found = tuple(EntryPoint(name, value, registry.group) for name, value, _ in points)
    monkeypatch.setattr(EntryPoint, "load", load)
    monkeypatch.setattr(module, "_entry_points", lambda group: found if group == registry.group else ())


def another(registry: Registry[Any]) -> Any:
    """A thing of the registry's kind that is not registered."""
    thing = registry.get(registry.names()[0])
    kind = thing if isinstance(thing, type) else type(thing)
    made = type(
        "Another",
        (kind,),
        {"__module__": "elsewhere", "__dataclass_fields__": getattr(kind, "__dataclass_fields__", {})},
    )
    return made if isinstance(thing, type) else made()


def test_the_index_says_what_the_classes_say() -> None:
    assert json.loads(INDEX.read_text()) == json.loads(json.dumps(index_of(REGISTRIES.values()))), "run .ci/registered"


@pytest.mark.parametrize("name", STRATEGIES.names())
def test_a_stand_in_parses_and_refuses_as_the_class(name: str) -> None:
    kind, stand = STRATEGIES.get(name), stand_in(STRATEGIES.facts(name))
    assert asdict(stand()) == asdict(kind())
    for preset in kind.presets:
        assert asdict(stand.configured(preset)) == asdict(kind.configured(preset))
    for option in kind.option_names():
        assert stand.describe(option) == kind.describe(option)
    with pytest.raises(OptionError, match=rf"^{name} has no preset 'none'"):
        stand.configured("none")


def test_names_and_facts_need_no_torch() -> None:
    code = (
        "import sys; from erasure.strategies import STRATEGIES; from erasure.eval.suites import SUITES;"
        "from erasure.eval.attacks import ATTACKS; from erasure.eval.detectors import DETECTORS;"
        "from erasure.eval.metrics import METRICS; from erasure.eval.stress import STRESS_TESTS;"
        "every = (STRATEGIES, SUITES, ATTACKS, STRESS_TESTS, DETECTORS, METRICS);"
        "print([r.facts(n) for r in every for n in r.names()]);"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_facts_are_those_of_the_thing(registry: Registry[Any]) -> None:
    for name in registry.names():
        assert registry.facts(name) == registry.describe(name)
        assert registry.facts(name).attributes["title"]


def test_an_unknown_name_suggests_the_nearest(registry: Registry[Any]) -> None:
    for name in registry.names():
        slips = [name.upper(), f" {name}", name.replace("_", "-").replace("-", " ")]
        # A letter of a very short name is half of it, and one number is as near as the next.
        slips += [name[:-1] + "x"] if len(name) > 2 and name[-1].isalpha() else []
        for wrong in slips:
            if wrong == name:
                continue
            with pytest.raises(registry.unknown, match=rf"unknown {registry.kind} .*Did you mean '{name}'\?"):
                registry.get(wrong)
    with pytest.raises(registry.unknown, match=rf"there are: {', '.join(registry.names())}\.$"):
        registry.get("zzzzzz")


def test_a_taken_name_is_refused(registry: Registry[Any]) -> None:
    name = registry.names()[0]
    before = registry.get(name)
    with pytest.raises(ValueError, match=rf"a {registry.kind} named '{name}' is registered already: erasure\."):
        registry.add(name, another(registry))
    assert registry.get(name) is before
    registry.add(name, before)  # again, as when a module is reloaded


def test_the_same_class_name_in_another_module_is_another_thing(registry: Registry[Any]) -> None:
    first, second = another(registry), another(registry)
    (second if isinstance(second, type) else type(second)).__module__ = "somewhere.else"
    registry.add("new", first)
    with pytest.raises(ValueError, match=r"registered already: elsewhere\.Another"):
        registry.add("new", second)


def test_a_name_is_taken_before_its_module_is_imported(registry: Registry[Any], monkeypatch: Any) -> None:
    thing, name = another(registry), registry.names()[0]
    before = registry.get(name)
    monkeypatch.setattr(module, "import_module", lambda path: registry._registered.update({name: before}))
    registry._registered.clear()
    with pytest.raises(ValueError, match="registered already"):
        registry.add(name, thing)


def test_another_package_adds_one(registry: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    thing = another(registry)
    plugin(monkeypatch, registry, ("more", "elsewhere:Another", thing))
    assert "more" in registry.names()
    assert registry.get("more") is thing
    assert registry.available()["more"].name == "more"
    assert registry.facts("more") == registry.describe("more")


def test_a_package_that_is_installed_meanwhile_is_found_and_files_are_read_once(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert "more" not in registry.names()
    info = tmp_path / "others-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: others\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.group}]\nmore = others_more:Thing\n")
    (tmp_path / "others_more.py").write_text("Thing = 7\n")
    with monkeypatch.context() as patch:
        asked: list[None] = []
        found = module.entry_points
        patch.setattr(module, "entry_points", lambda: (asked.append(None), found())[1])
        for _ in range(3):
            assert "more" in registry.names()
        assert len(asked) == 1
    with pytest.raises(BrokenPluginError, match=f"{registry.kind} 'more' of the package 'others' cannot be loaded"):
        registry.get("more")
    shutil.rmtree(info)
    assert "more" not in registry.names()


def test_what_is_known_is_not_looked_for_in_other_packages(
    registry: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_entry_points", lambda group: pytest.fail("every package was read"))
    for name in registry.built_in:
        registry.check(name)
        assert name in registry
        assert registry.facts(name).name == name


def test_another_package_does_not_replace_ours(registry: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    name = registry.names()[0]
    before = registry.get(name)
    plugin(monkeypatch, registry, (name, "elsewhere:Another", another(registry)))
    assert registry.get(name) is before


@pytest.mark.parametrize(
    "broken", [ImportError("no module"), RuntimeError("boom"), SystemExit(3), AttributeError("gone"), 7, object()]
)
def test_a_broken_package_breaks_nothing_else(
    broken: object, registry: Registry[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = set(registry.names())
    plugin(monkeypatch, registry, ("broken", "elsewhere:Broken", broken))
    with pytest.warns(BrokenPluginWarning, match=f"{registry.kind} 'broken' of elsewhere:Broken cannot be loaded"):
        assert set(registry.available()) == ours
    with pytest.raises(BrokenPluginError, match="update that package, or uninstall it") as caught:
        registry.get("broken")
    assert isinstance(caught.value, ErasureError)
    for name in ours:
        registry.get(name)


def test_two_packages_that_name_the_same(registry: Registry[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    things = another(registry), another(registry)
    plugin(monkeypatch, registry, ("more", "first:Another", things[0]), ("more", "second:Another", things[1]))
    with pytest.raises(BrokenPluginError, match="first:Another and second:Another"):
        registry.get("more")
