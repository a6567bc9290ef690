from __future__ import annotations

import warnings
from typing import Any

import pytest

from erasure import Concept
from erasure.concept import TEMPLATES, as_concepts, key
from erasure.errors import ConceptError, ConceptWarning


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
        ({"target": "golf ball", "retain": ("Golf_Ball",)}, "retained at once"),
        ({"target": "cat", "synonyms": ("",)}, "synonym of 'cat' is empty"),
        ({"target": "cat", "anchor": "cat"}, "nothing would change"),
        ({"target": "cat", "anchor": " CAT "}, "nothing would change"),
        ({"target": "cat", "anchor": "a cat"}, "nothing would change"),
        ({"target": "cat", "anchor": "cats"}, "nothing would change"),
        ({"target": "knives", "anchor": "knife"}, "nothing would change"),
        ({"target": "golf ball", "anchor": "golf-ball"}, "nothing would change"),
        ({"target": "cat", "synonyms": ("kitten",), "anchor": "Kitten"}, "nothing would change.*|kitten"),
        ({"target": "e\u0301cole", "anchor": "\u00e9cole"}, "nothing would change"),
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
    for again in (Concept("CAT"), "a cat", "c\u200bat", "\uff43\uff41\uff54"):
        with pytest.raises(ConceptError, match="twice"):
            as_concepts(["cat", again])


def test_one_concept_cannot_keep_what_another_erases() -> None:
    for kept in ("cat", "Cat", "a cat"):
        with pytest.raises(ConceptError, match="'cat' is to be erased, and retained by 'dog'"):
            as_concepts([Concept("cat"), Concept("dog", retain=(kept,))])
    with pytest.raises(ConceptError, match="retained by 'dog'"):
        as_concepts([Concept("dog", retain=("kitten",)), Concept("cat", synonyms=("kitten",))])


def test_another_form_of_what_is_erased_is_told_where_it_is_retained() -> None:
    for concepts in (
        [Concept("cat", retain=("Cats",))],
        [Concept("knives", retain=("a knife",))],
        [Concept("dog", synonyms=("puppy",), retain=("cat", "puppies"))],
        [Concept("cat"), Concept("dog", retain=("cats",))],
    ):
        with pytest.warns(ConceptWarning, match="may be another form of '.*', which is erased"):
            as_concepts(concepts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_concepts([Concept("cat", retain=("dog", "catfish")), Concept("bus", retain=("bush",))])


def test_an_anchor_that_is_erased_too_is_told() -> None:
    with pytest.warns(ConceptWarning, match="the anchor 'dogs' of 'cat' is erased too"):
        as_concepts([Concept("cat", anchor="dogs"), Concept("dog", anchor="house")])


def test_texts_are_as_tokenisers_see_them() -> None:
    concept = Concept("Van \u00a0 Gogh\ufeff", anchor=" e\u0301cole", retain=("a  b",), synonyms=("Vin\u00adcent",))
    assert concept == Concept("Van Gogh", anchor="\u00e9cole", retain=("a b",), synonyms=("Vincent",))


@pytest.mark.parametrize(
    "spelling", ["Golf Ball", "golf_ball", "GOLF-BALL", "the golf  ball", "golf\u00a0ball", "golf\u2010ball"]
)
def test_spellings_of_a_word_have_one_key(spelling: str) -> None:
    assert key(spelling) == "golf ball"


@pytest.mark.parametrize("word", ["_", "-", "a", "the", "\u68b5\u9ad8", "\U0001f600"])
def test_no_word_has_an_empty_key(word: str) -> None:
    assert key(word) == word
