"""What texts name: lists, kinds, anchors, and names that look like lists."""

from __future__ import annotations

import warnings

import pytest

from erasure.errors import ConceptError, ConceptWarning
from erasure.parsing import LONGEST_LIST, ConceptRequest, parse_concepts, parse_names

WORDS = {"cat", "dog", "bird", "ink", "my_token"}


def known(word: str) -> bool:
    return word.strip().lower() in WORDS


def names(text: str) -> list[str]:
    return [request.target for request in parse_concepts(text, known)]


@pytest.mark.parametrize(
    "text",
    [
        "cat, dog", "cat,dog", "cat ,dog,", "cat; dog", "cat|dog", "cat\ndog", "cat\r\n\r\ndog\n",
        "cat、dog", "cat，dog", "cat；dog", "cat and dog", "cat & dog", "cat + dog", "cat, and dog", '"cat", "dog"', 
        "“cat”; dog", "cat AND dog",
    ],
)  # fmt: skip
def test_lists_of_words_that_the_model_knows_are_lists_beyond_doubt(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(text) == ["cat", "dog"]


def test_the_last_two_may_be_joined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names("cat, dog and bird") == names("cat, dog, and bird") == ["cat", "dog", "bird"]
        assert names("cat and dog and bird") == ["cat", "dog", "bird"]
    with pytest.warns(ConceptWarning, match="3 concepts: Monet; Degas; Klee"):
        assert names("Monet, Degas and Klee") == ["Monet", "Degas", "Klee"]


@pytest.mark.parametrize("text", ["Van Gogh; Picasso", "Van Gogh|Picasso", "Van Gogh\nPicasso"])
def test_what_stands_in_no_name_parts_concepts(text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(text) == ["Van Gogh", "Picasso"]


def test_a_list_that_could_be_a_name_is_told() -> None:
    with pytest.warns(ConceptWarning, match="taken for 2 concepts: Monet; Van Gogh. For one name write '\"Monet, Van"):
        assert names("Monet, Van Gogh") == ["Monet", "Van Gogh"]
    with pytest.warns(ConceptWarning, match="taken for one concept. For 2 write 'Simon; Garfunkel'"):
        assert names("Simon and Garfunkel") == ["Simon and Garfunkel"]


@pytest.mark.parametrize(
    "text", ["Tyler, the Creator", "Martin Luther King, Jr.", "Washington, D.C.", "Elizabeth, II", "Clara, of Assisi"]
)
def test_what_looks_like_one_name_is_refused_with_both_ways_to_write_it(text: str) -> None:
    first, _, last = text.partition(", ")
    with pytest.raises(ConceptError) as refused:
        names(text)
    assert f"'{first}; {last}'" in str(refused.value)
    assert f"'\"{text}\"'" in str(refused.value)
    assert names(f"{first}; {last}") == [first, last]
    assert names(f'"{text}"') == [text]
    assert names(text.replace(",", "\\,")) == [text]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('"Simon and Garfunkel"', "Simon and Garfunkel"), ("10,000 Maniacs", "10,000 Maniacs"), ("AC/DC", "AC/DC"),
        ('"Weird Al" Yankovic', '"Weird Al" Yankovic'), ("<my-pet>", "<my-pet>"),
        ("Terminator 2: Judgment Day", "Terminator 2: Judgment Day"), ("Re\\:Zero", "Re:Zero"), ("a\\>b", "a>b"),
        ("back\\slash", "back\\slash"), ("two\\\\", "two\\"), ("  Van   Gogh ", "Van Gogh"), ("ｃａｔ", "cat"),
        ("梵高", "梵高"), ("😀", "😀"), ("my_token", "my_token"), ("Van\\_Gogh", "Van_Gogh"), ('"a_b"', "a_b"),
        ("e\u0301cole", "\u00e9cole"), ('"ｃａｔ"', "ｃａｔ"), ("<my_pet>", "<my_pet>"),
        ("cat\u00a0food", "cat food"),
    ],
)  # fmt: skip
def test_one_name_stays_one_name(text: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names(text) == [name]


def test_underscores_of_file_names_are_blanks() -> None:
    with pytest.warns(ConceptWarning, match="'Van_Gogh' is taken for 'Van Gogh'"):
        assert names("Van_Gogh") == ["Van Gogh"]


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("Van Gogh:style", ConceptRequest("Van Gogh", "style")),
        ("Van Gogh:Style>painting", ConceptRequest("Van Gogh", "style", "painting")),
        ("Van Gogh : style > a painting ", ConceptRequest("Van Gogh", "style", "a painting")),
        ("cat>dog", ConceptRequest("cat", None, "dog")), ("cat -> dog", ConceptRequest("cat", None, "dog")),
        ("cat=>dog", ConceptRequest("cat", None, "dog")), ("cat>", ConceptRequest("cat", None, "")),
        ("gun:unsafe>", ConceptRequest("gun", "unsafe", "")), ('"a:b":style', ConceptRequest("a:b", "style")),
        ("A: B:object", ConceptRequest("A: B", "object")), ("<my-pet>:style", ConceptRequest("<my-pet>", "style")),
        ("<my-pet>>house", ConceptRequest("<my-pet>", None, "house")),
        ("cat><my-car>", ConceptRequest("cat", None, "<my-car>")), ('cat>"a, b"', ConceptRequest("cat", None, "a, b")),
        ("cat>the film: part two", ConceptRequest("cat", None, "the film: part two")),
    ],
)  # fmt: skip
def test_kind_and_anchor_go_with_the_name(text: str, request_: ConceptRequest) -> None:
    assert parse_concepts(text, known) == [request_]


def test_each_of_a_list_has_its_own() -> None:
    assert parse_concepts("cat>dog; Van Gogh:style>painting; gun:unsafe") == [
        ConceptRequest("cat", None, "dog"),
        ConceptRequest("Van Gogh", "style", "painting"),
        ConceptRequest("gun", "unsafe"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no concept"), (" , ;", "names no concept"), (">dog", "names no concept"),
        (":style", "names no concept"),
        ("Van Gogh:stile", "unknown kind 'stile'.*allowed: object, style, unsafe"), ("cat:", "unknown kind ''"),
        ("Re:Zero", "unknown kind 'Zero'.*double quotes"), ("a>b>c", "more than one '>'"), ('"cat', "not closed"),
        ("cat>dog:style", "kind behind the anchor"), ("cat," * LONGEST_LIST, "at most 30,000"),
    ],
)  # fmt: skip
def test_texts_that_cannot_be_read_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConceptError, match=message):
        parse_concepts(text)


def test_names_have_neither_kind_nor_anchor() -> None:
    assert parse_names(["cat; dog", "ink"], known) == ("cat", "dog", "ink")
    for text in ("cat:style", "cat>dog"):
        with pytest.raises(ConceptError, match="kind or an anchor"):
            parse_names([text])
