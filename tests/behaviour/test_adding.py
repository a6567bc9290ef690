"""What holds when concepts are added to an erasure, for every strategy and for strategies on top of each other."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import Concept, Erasure, ErasureManager
from erasure.carriers.weights import delta_of
from erasure.errors import ArtifactError, ConceptError, OptionError, UnsupportedModelError, WrongBaseError
from erasure.interop import paths
from erasure.strategies import get, trained
from erasure.strategies.base import EarlierErasure

from .cases import CASES, FIRST, fit, flat, pairs

NOT_ADDED: dict[str, str] = {}
"""Strategies that nothing can be added with, and a part of the reason that is given."""
MIXED = [
    ("esd", "esd"), ("advunlearn", "advunlearn"), ("uce", "esd"), ("esd", "uce-map"), ("itd", "esd"),
    ("hirm-pinned", "advunlearn"), ("uce-map", "itd"),
]  # fmt: skip
"""Cases on top of each other; every pair of them has a sum, but for two edits of latents."""


def is_anew(case: str) -> bool:
    strategy = get(CASES[case][0])
    return strategy().adds([strategy.name]) == "anew"


def values(pipe: Any, made: Erasure) -> dict[str, torch.Tensor]:
    """What the parameters that it edits hold."""
    found = {}
    for key in made.edits.parameters:
        component, path = key.split("/", 1)
        found[key] = paths.parameter(getattr(pipe, component), path).detach().clone()
    return found


@pairs(CASES, FIRST)
class TestAdding:
    """What holds for every strategy."""

    def test_adds_a_concept_and_keeps_the_earlier_erasure(
        self, case: str, tiny_pipe: Any, made: Erasure, base: dict, base_image: Any, changed_tensors: Any, draw: Any,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        if reason := NOT_ADDED.get(case):
            with pytest.raises(UnsupportedModelError, match=reason):
                fit(tiny_pipe, case, "dog", add_to=made)
            return
        before, config = [tensor.clone() for tensor in flat(made)], dataclasses.asdict(made.config)
        both = fit(tiny_pipe, case, "dog", add_to=made)
        assert changed_tensors(base, tiny_pipe) == set()
        assert all(torch.equal(a, b) for a, b in zip(before, flat(made), strict=True))
        assert dataclasses.asdict(made.config) == config
        assert [concept.target for concept in both.concepts] == ["cat", "dog"]
        assert [(each["concepts"], each["strategy"]) for each in both.config.ledger] == [
            (["cat"], made.config.strategy), (["dog"], made.config.strategy)
        ]  # fmt: skip
        assert all(each["cost"]["seconds"] > 0 and each["version"] for each in both.config.ledger)
        if is_anew(case):
            at_once = fit(tiny_pipe, case, ["cat", "dog"])
            assert all(torch.equal(a, b) for a, b in zip(flat(both), flat(at_once), strict=True))
        elif made.edits.low_rank:
            for key, pair in made.edits.low_rank.items():
                # What the sum has beyond the earlier change is a change of the later one's rank.
                whole = both.edits.low_rank[key]
                beyond = whole.up.double() @ whole.down.double() - pair.up.double() @ pair.down.double()
                sizes = torch.linalg.svdvals(beyond)
                assert sizes[0] > 0
                assert (sizes[len(pair.down) :] < 0.02 * sizes[0]).all()
        manager = ErasureManager(tiny_pipe)
        manager.load(both.save(tmp_path / "both"), name="both")
        assert manager.verify() > 0
        assert not torch.equal(draw(tiny_pipe), base_image)
        manager.unload()
        assert changed_tensors(base, tiny_pipe) == set()


@pytest.mark.parametrize("mixed", MIXED, ids="+".join)
@pytest.mark.parametrize("family", FIRST)
def test_a_strategy_works_on_top_of_another(
    mixed: tuple[str, str],
    family: str,
    tiny_pipe: Any,
    erasures: Any,
    base: dict,
    changed_tensors: Any,
    tmp_path: Path,
) -> None:
    earlier = erasures(mixed[0], family, "cat")
    seen: dict[str, Any] = {}
    name = CASES[mixed[1]][0]
    method = "train" if get(name).trains else "fit"
    original = getattr(get(name), method)

    def spied(self: Any, backbone: Any, concepts: Any, **more: Any) -> Any:
        seen.update(pipe=backbone.pipe, concepts=concepts, **more)
        assert changed_tensors(base, tiny_pipe) == set(), "the earlier erasure reached the user's pipeline"
        seen["erased"] = values(backbone.pipe, earlier)
        seen["fit"] = original(self, backbone, concepts, **more)
        return seen["fit"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get(name), method, spied)
        both = fit(tiny_pipe, mixed[1], "dog", add_to=earlier)
    assert both.config.strategy == " + ".join(dict.fromkeys([earlier.config.strategy, name]))
    assert both.config.cost["seconds"] >= earlier.config.cost["seconds"]
    assert ErasureManager(seen["pipe"]).verify() > 0, "the teacher is the model as the earlier erasure leaves it"
    if get(name).trains:
        assert [concept.target for concept in seen["earlier"].concepts] == ["cat"]
        assert seen["earlier"].fingerprint == earlier.fingerprint
    else:
        assert "cat" in seen["concepts"][0].retain
    manager = ErasureManager(tiny_pipe)
    manager.load(both.save(tmp_path / "both"), name="both")
    for key, erased in seen["erased"].items():
        component, path = key.split("/", 1)
        later = seen["fit"].edits.of(component).get(path)
        wanted = erased if later is None else erased + delta_of(later, erased)
        found = paths.parameter(getattr(tiny_pipe, component), path)
        # Factors in float16 that are shortened are rounded once more.
        torch.testing.assert_close(found, wanted, atol=1e-6 if later is None else 1e-3, rtol=1e-6)
    assert manager.verify() > 0
    manager.unload()
    assert changed_tensors(base, tiny_pipe) == set()


@pytest.mark.parametrize("family", FIRST)
class TestOnOneFamily:
    """What does not depend on the strategy."""

    def test_what_cannot_be_is_refused_before_any_work(
        self, family: str, tiny_models: Any, tiny_pipe: Any, erasures: Any, monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:  # fmt: skip
        cat, latents, twice = (erasures(case, family, "cat") for case in ("uce", "itd", "esd"))
        mixed = fit(tiny_pipe, "esd", "dog", add_to=latents)
        for name in ("uce", "esd", "itd"):
            monkeypatch.setattr(get(name), "fit", lambda *_, **__: pytest.fail("the work was done"))
            monkeypatch.setattr(get(name), "train", lambda *_, **__: pytest.fail("done"), raising=False)
        with pytest.raises(ConceptError, match="'Cat' is erased already"):
            fit(tiny_pipe, "uce", "Cat", add_to=cat)
        with pytest.raises(ConceptError, match="the anchor 'cat'"):
            fit(tiny_pipe, "uce", Concept("dog", anchor="cat"), add_to=cat)
        with pytest.raises(OptionError, match=r"'erase_scale' is 3\.0; allowed: 10\.0, as cat-uce has it"):
            fit(tiny_pipe, "uce", "dog", add_to=cat, erase_scale=3.0)
        with pytest.raises(OptionError, match="'tokens' is 'last'; allowed: 'from_last'"):
            fit(tiny_pipe, "uce", "dog", add_to=cat, preset="released", vocabulary=8)
        with pytest.raises(OptionError, match="the seed is 1"):
            fit(tiny_pipe, "uce", "dog", add_to=cat, seed=1)
        with pytest.raises(OptionError, match="'retain_batch' is 0; allowed: what lets prompts survive"):
            fit(tiny_pipe, "esd", "dog", add_to=twice, retain_batch=0)
        with pytest.raises(UnsupportedModelError, match="edits activations, and so does"):
            fit(tiny_pipe, "itd", "house", add_to=mixed)
        with pytest.raises(WrongBaseError, match="not those that the erasure was made for"):
            fit(tiny_models[family](seed=1), "uce", "dog", add_to=cat)
        with pytest.raises(WrongBaseError, match="is for stable-diffusion"):
            fit(tiny_models["flux"](), "uce", "dog", add_to=cat)
        damaged = cat.save(tmp_path / "damaged")
        (damaged / "erasure_config.json").write_text("{")
        for where in (damaged, tmp_path / "missing"):
            with pytest.raises(ArtifactError):
                fit(tiny_pipe, "uce", "dog", add_to=where)
        assert ErasureManager(tiny_pipe).erasures == {}

    def test_the_new_one_takes_the_place_of_the_earlier_at_its_strength(
        self, family: str, tiny_pipe: Any, erasures: Any
    ) -> None:
        cat, manager = erasures("uce", family, "cat"), ErasureManager(tiny_pipe)
        manager.add(cat, "mine", strength=0.5)
        manager.add(erasures("hirm", family, "cat"), "other")
        both = fit(tiny_pipe, "uce", "dog", add_to=cat, attach=True, name="mine")
        assert manager.erasures["mine"] is both
        assert manager.strengths == {"other": 1.0, "mine": 0.5}

    def test_a_replaced_concept_is_trained_again_with_what_takes_its_place_now(
        self, family: str, tiny_pipe: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = fit(tiny_pipe, "esd", [Concept("cat", anchor="dog"), Concept("house")])
        seen: dict[str, Any] = {}
        original = get("esd").train

        def spied(self: Any, backbone: Any, concepts: Any, **more: Any) -> Any:
            seen.update(concepts=concepts, earlier=more["earlier"])
            return original(self, backbone, concepts, **more)

        monkeypatch.setattr(get("esd"), "train", spied)
        with pytest.warns(UserWarning, match="the anchor of 'cat', is erased"):
            both = fit(tiny_pipe, "esd", Concept("dog", anchor="photo"), add_to=first)
        assert seen["concepts"] == [Concept("dog", anchor="photo"), Concept("cat", anchor="photo")]
        assert seen["earlier"].concepts == [Concept("house")]
        assert both.concepts[0] == Concept("cat", anchor="photo")

    def test_trajectories_of_an_erased_model_are_no_others(
        self, family: str, tiny_pipe: Any, erasures: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An erasure that lives in hooks changes no weight by which a model is known."""
        models: list[str] = []
        fill = trained.storage.fill
        monkeypatch.setattr(
            trained.storage, "fill", lambda source, model, *more: (models.append(model), fill(source, model, *more))
        )
        fit(tiny_pipe, "esd", "dog")
        fit(tiny_pipe, "esd", "dog", add_to=erasures("itd", family, "cat"))
        assert len(set(models)) == 2

    def test_earlier_concepts_are_among_what_must_survive(
        self, family: str, tiny_pipe: Any, erasures: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tasks: list[Any] = []
        original = get("esd").task

        def spied(self: Any, *arguments: Any) -> Any:
            tasks.append(original(self, *arguments))
            assert isinstance(arguments[-1], EarlierErasure)
            return tasks[-1]

        monkeypatch.setattr(get("esd"), "task", spied)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(tiny_pipe, "esd", "dog", add_to=erasures("uce", family, "cat"))
        prompts = [scene.prompt for scene in tasks[0].retain_states.scenes]
        assert set(Concept("cat").prompts()) <= set(prompts)
        assert not any("cat" in (scene.prompt or "") for scene in tasks[0].concept_states.scenes)
