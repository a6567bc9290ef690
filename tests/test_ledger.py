"""What a further request means for the earlier ones: refused, resolved or kept."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure import Concept, Erasure, ErasureConfig, ledger
from erasure.artifact import CONFIG_FILE
from erasure.carriers.edits import Edits
from erasure.carriers.weights import fingerprint
from erasure.errors import ArtifactError, ConceptError, ConceptWarning
from erasure.world import World

KEY = "unet/a.weight"
CANVAS = World.at("canvas-sd")


def made(*concepts: Concept, **config: Any) -> Erasure:
    given = {
        "strategy": "uce", "concepts": [concept.to_dict() for concept in concepts], "family": "stable-diffusion",
        "base": {"tensors": {KEY: fingerprint(torch.ones(2))}}, "carriers": ["weights"],
    }  # fmt: skip
    return Erasure(ErasureConfig(**{**given, **config}), Edits(deltas={KEY: torch.ones(2)}))


def request(*names: str, **changes: Any) -> dict[str, Any]:
    entry = {"concepts": list(names), "strategy": "uce", "options": {"tolerance": 0.0}, "seed": 0, "version": "0.1",
             "cost": {"seconds": 1.5}}  # fmt: skip
    return {**entry, **changes}


def two(**changes: Any) -> Erasure:
    return made(Concept("cat"), Concept("dog"), requests=[request("cat"), request("dog", **changes)])


# On disk -------------------------------------------------------------------------------------------------------------


def test_requests_come_back_from_disk(tmp_path: Path) -> None:
    saved = Erasure.load(two().save(tmp_path / "a"))
    assert saved.config.ledger == [request("cat"), request("dog")]


def test_an_erasure_without_a_ledger_is_one_request(tmp_path: Path) -> None:
    folder = made(Concept("cat"), strategy_config={"tolerance": 0.001, "vocabulary": 5}, seed=3).save(tmp_path / "a")
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config["requests"]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (only,) = Erasure.load(folder).config.ledger
    assert (only["concepts"], only["strategy"], only["seed"]) == (["cat"], "uce", 3)
    told = ledger.entry(Erasure.load(folder).config, {"tolerance": 0.001, "vocabulary": 300})
    assert told["options"] == {"vocabulary": 5}


@pytest.mark.parametrize(
    "requests",
    [
        "cat", ["cat"], [{}], [None], [request("cat")], [request("dog"), request("cat")], [request("cat", "dog", "x")],
        [request(), request("cat", "dog")], [request("cat"), request("dog", strategy="esd")],
        [request("cat"), request("dog", surprise=1)], [request("cat"), request("dog", seed=True)],
        [request("cat"), request("dog", seed=2**80)], [request("cat"), request("dog", options=[])],
        [request("cat"), request("dog", version="a\nb")], [request("cat"), request("dog", cost={"seconds": "1"})],
        [request("cat"), request("dog", concepts="dog")],
        [request("cat"), request("dog", options={"a": float("nan")})],
    ],
    ids=str,
)  # fmt: skip
def test_a_ledger_that_cannot_be_is_refused(tmp_path: Path, requests: Any) -> None:
    folder = two().save(tmp_path / "a")
    config = json.loads((folder / CONFIG_FILE).read_text()) | {"requests": requests}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ArtifactError):
        Erasure.load(folder)


def test_the_card_lists_the_requests_and_escapes_them() -> None:
    card = two(options={"prompts": "a|b <script>"}).card()
    assert "## Requests" in card
    assert "| 1 | cat | uce | tolerance=0.0 | 0 | 0.1 | 1.5 |" in card.replace("\\", "")
    assert "<script>" not in card
    assert "## Requests" not in made(Concept("cat")).card()


def test_a_request_without_seconds_has_a_card() -> None:
    assert "| 2 | dog |" in two(cost={}).card()


# Concepts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["cat", "CAT ", "The cat", "kitten"])
def test_a_concept_that_is_erased_already_is_named(word: str) -> None:
    before = made(Concept("dog"), Concept("cat", synonyms="kitten"), requests=[request("dog"), request("cat")])
    with pytest.raises(ConceptError, match=r"is erased already: as 'cat' \(request 2\) of dog-cat-uce"):
        ledger.merged(World(), before, [Concept("bird"), Concept(word)])


def test_a_synonym_that_is_erased_already_is_named() -> None:
    with pytest.raises(ConceptError, match="'cat' is erased already"):
        ledger.merged(World(), made(Concept("cat")), [Concept("lion", synonyms=("cat",))])


@pytest.mark.parametrize("concept", [Concept("dog", anchor="cats"), Concept("dog", retain=("Cat",))])
def test_an_anchor_or_retained_concept_that_is_erased_already_is_refused(concept: Concept) -> None:
    with pytest.raises(ConceptError, match="request 1"):
        ledger.merged(World(), made(Concept("cat")), [concept])


def test_the_world_suggests_nothing_that_is_erased_already() -> None:
    (dog,) = CANVAS.concepts("dog", erased=[CANVAS.concept("fish"), CANVAS.concept("butterfly")])
    assert dog.anchor == "penguin"
    declared = World(objects=("a", "b", "c"), anchors={"a": "b"}, retain={"a": ("b", "c")})
    assert declared.concepts("a", erased=[Concept("b")])[0].retain == ("c",)


def test_what_an_earlier_concept_retains_may_be_erased_later() -> None:
    with pytest.warns(ConceptWarning, match="'Dog' is erased from now on, and 'cat' retains it no longer"):
        found = ledger.merged(World(), made(Concept("cat", retain=("Dog", "bird"))), [Concept("dog")])
    assert found.earlier == [Concept("cat", retain=("bird",))]
    assert found.moved == []


@pytest.mark.parametrize(
    ("new", "anchor"),
    [(Concept("dog", anchor="fox"), "fox"), (Concept("dog", anchor=""), ""), (Concept("dog"), None),
     (Concept("hound", synonyms=("dogs",), anchor="fox"), "fox")],
    ids=str,
)  # fmt: skip
def test_the_anchor_of_an_earlier_concept_may_be_erased_later(new: Concept, anchor: str | None) -> None:
    with pytest.warns(ConceptWarning, match="'dog', the anchor of 'cat', is erased from now on"):
        found = ledger.merged(World(), made(Concept("cat", anchor="dog"), Concept("cup")), [new])
    assert found.every == [Concept("cat", anchor=anchor), Concept("cup"), new]
    assert found.moved == [Concept("cat", anchor=anchor)]
    assert found.still_erased == [Concept("cup")]


def test_anchors_that_lead_back_leave_the_choice_to_the_strategy() -> None:
    new = [Concept("dog", anchor="fox"), Concept("fox", anchor="dog")]
    with pytest.warns(ConceptWarning):
        found = ledger.merged(World(), made(Concept("cat", anchor="dog")), new)
    assert found.earlier[0].anchor is None


def test_one_after_the_other_means_the_same_as_all_at_once() -> None:
    names = ["cat", "dog", "fish", "ink", "contour", "turtle", "penguin", "butterfly"]
    before = made(*CANVAS.concepts(names[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConceptWarning)
        for name in names[1:]:
            found = ledger.merged(CANVAS, before, CANVAS.concepts(name, erased=before.concepts))
            before = made(*found.every)
    assert before.concepts == CANVAS.concepts(names)


def test_the_ledger_grows_by_one(tmp_path: Path) -> None:
    before = made(Concept("cat"), strategy_config={"vocabulary": 5})
    grown = ledger.extended(before.config, request("dog"), {"vocabulary": 300})
    assert [each["concepts"] for each in grown] == [["cat"], ["dog"]]
    config = dataclasses.replace(before.config, concepts=[{"target": w} for w in ("cat", "dog", "x")], requests=grown)
    config.requests = ledger.extended(dataclasses.replace(config, requests=grown), request("x"), {})
    assert len(config.ledger) == 3
    Erasure(config, before.edits).save(tmp_path / "a")
