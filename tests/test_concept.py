from __future__ import annotations

from typing import Any

import pytest

from erasure import Concept
from erasure.concept import TEMPLATES, as_concepts
from erasure.errors import ConceptError


def test_fields_are_tidied() -> None:
    concept = Concept("  Van Gogh ", kind="style", retain="Monet", synonyms=["Vincent"])
    assert concept.target == "Van Gogh"
    assert concept.retain == ("Monet",)
    assert concept.synonyms == ("Vincent",)
    assert concept.names == ("Van Gogh", "Vincent")


def test_prompts_are_every_phrasing_of_every_name() -> None:
    concept = Concept("cat", synonyms=("kitten",), templates=("a {}", "{} here"))
    assert concept.prompts() == ["a cat", "cat here", "a kitten", "kitten here"]
    assert Concept("cat").phrasings() == TEMPLATES["object"]
    assert Concept("ink", kind="style").phrasings() == TEMPLATES["style"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": ""}, "empty"),
        ({"target": " \n"}, "empty"),
        ({"target": "cat", "kind": "person"}, "allowed: object, style, unsafe"),
        ({"target": "cat", "retain": ("dog", "Cat ")}, "retained at once"),
        ({"target": "cat", "synonyms": ("kitten",), "retain": ("kitten",)}, "retained at once"),
        ({"target": "cat", "templates": ("a photo",)}, "exactly one"),
        ({"target": "cat", "templates": ("{} and {}",)}, "exactly one"),
        ({"target": "cat", "templates": ("{} and {name}",)}, "exactly one"),
    ],
)
def test_bad_concepts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConceptError, match=message):
        Concept(**options)


def test_braces_in_a_target_are_just_text() -> None:
    assert Concept("a {b}", templates=("see {}",)).prompts() == ["see a {b}"]


def test_plain_data_round_trip() -> None:
    concept = Concept("gun", kind="unsafe", anchor="", retain=("car",), synonyms=("pistol",), templates=("the {}",))
    assert Concept.from_dict(concept.to_dict()) == concept
    assert Concept.from_dict({**concept.to_dict(), "added_later": 1}) == concept


def test_words_and_concepts_make_a_list() -> None:
    ink = Concept("ink", kind="style")
    assert as_concepts("cat") == [Concept("cat")]
    assert as_concepts(ink) == [ink]
    assert as_concepts(("cat", ink)) == [Concept("cat"), ink]
    with pytest.raises(ConceptError, match="no concept"):
        as_concepts([])
    with pytest.raises(ConceptError, match="twice"):
        as_concepts(["cat", Concept("CAT")])
