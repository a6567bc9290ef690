"""Texts are cut and escaped one by one; templates leave no way past that."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from erasure.cli.page import Table
from erasure.pages import FOLDER, code_span, html_page, json_block, markdown_text, relative_link
from erasure.shown import LABEL, LIMIT, did_you_mean, message, number, visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("Café 猫 🎨 a　b", "Café 猫 🎨 a　b"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("\x9b31m", r"\x9b31m"),
        ("\x07\x00\x7f", r"\x07\x00\x7f"),
        ("a\rb\nc\td\x0b", r"a\rb\nc\td\x0b"),
        ("\u202eevil\u2066\u061c", r"\u202eevil\u2066\u061c"),
        ("\u200b\u200d\ufeff\u2060\u00ad\U000e0041", r"\u200b\u200d\ufeff\u2060\xad\U000e0041"),
        ("\u2028\u2029\x85", r"\u2028\u2029\x85"),
        ("\u3164\u034f\U000e0100", r"\u3164\u034f\U000e0100"),
        ("\ud800\udcff", r"\ud800\udcff"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, seen: str) -> None:
    assert visible(text) == seen
    assert visible(seen) == seen


def test_what_is_long_is_cut() -> None:
    assert visible("x" * LIMIT) == "x" * LIMIT
    assert visible("x" * 2_000_000) == "x" * LIMIT + "… (2,000,000 characters in all)"
    assert len(visible("\x1b" * 2_000_000)) < LIMIT + 40
    assert visible("x" * 50, LABEL) == "x" * LABEL + "…"
    assert visible(10**5000) == "<int>"


def test_messages_are_one_line() -> None:
    assert message(ValueError("a\n b\tc\x1b")) == r"a b c\x1b"


def test_numbers_are_formatted_whatever_they_are() -> None:
    assert number(0.123456) == "0.1235"
    assert number(1_500_000, ".2f", 1e-6) == "1.50"
    assert number("<b>\x1b", ".1f") == r"<b>\x1b"
    assert number(10**400, ".1f", 0.5).startswith("1000")
    assert number(None) == "None"
    assert len(number("9" * 2_000_000)) < 200


@pytest.mark.parametrize(
    "text",
    ["`", "``", " a", "a`b``c", "`a", "*b*", "[x](javascript:1)", "![x](//e.example/a)", "<b>", "a|b", "https://e.example",
     "www.e.example", "a\\", "&lt;", "~~x~~", "_x_", "a@e.example"],
)  # fmt: skip
def test_markdown_shows_texts_as_they_are(text: str) -> None:
    def shown(markdown: str) -> tuple[set[str], str]:
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(f"before {markdown} after")
        (inline,) = (token for token in tokens if token.type == "inline")
        children = inline.children or []
        return {child.type for child in children}, "".join(child.content for child in children)

    assert shown(markdown_text(text)) == ({"text"}, f"before {text} after")
    types, content = shown(code_span(text))
    assert types == {"text", "code_inline"}
    assert content == f"before {text} after"


@pytest.mark.parametrize("text", ["https://e.example", "HTTP://e", "www.e.example", "a@e.example"])
def test_markdown_makes_no_links_of_addresses(text: str) -> None:
    assert re.search(r"\\:|\\\.|\\@", markdown_text(text))


@pytest.mark.parametrize(
    "path", ["javascript:alert(1)", "//evil.example/a", "https://evil.example", "data:text/html,x", '"><b>', "a b#c"]
)
def test_links_stay_beside_the_page(path: str) -> None:
    made = str(relative_link(path))
    assert made.startswith("./")
    assert not set(made) & set(":\"'<> #?")


def test_json_blocks_are_cut() -> None:
    assert len(json_block({"a": "x" * 2_000_000})) < 25_000
    assert json_block("</pre>\x7f\u202e") == "&#34;&lt;/pre&gt;\\u007f\\u202e&#34;"


def test_pages_allow_their_own_style_and_nothing_else() -> None:
    page = html_page("table.html", title="T", tables=[Table("", ["a"], [["b"]])], most=6, picture=None, links={})
    (style,) = re.findall("<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = re.findall('http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    assert page.index(policy) < page.index("<title>")
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.html")), ids=lambda path: path.name)
def test_templates_leave_escaping_to_the_environment(path) -> None:
    source = path.read_text()
    assert not re.search(r"\|\s*safe|autoescape|Markup|<script|\sstyle=|\son\w+=", source)
    # Every value inside of a tag stands in double quotes.
    for tag in re.findall(r"<\w[^>]*\{\{[^>]*>", source):
        assert "{{" not in re.sub(r'"[^"]*(\{\{.*?\}\}[^"]*)*"', "", tag), tag


def test_the_front_of_a_card_is_yaml() -> None:
    from erasure.artifact import ErasureConfig
    from erasure.cards import metadata

    for base, named in [
        ("someone/model", "someone/model"), ("canvas-sd", None), (None, None), ("a/b\nlicense: mit", None),
        ("/home/me/model", None), ("é/b", None), ("a/b: c", None), ({"a": 1}, None), ("no/off", "no/off"),
    ]:  # fmt: skip
        read = yaml.safe_load(metadata(ErasureConfig("uce", [], "f", base={"model": base})))
        known = {"library_name": "diffusers", "tags": ["diffusers", "concept-erasure", "f", "uce"]}
        assert read == known | ({"base_model": named, "base_model_relation": "adapter"} if named else {})


@pytest.mark.parametrize(("word", "hint"), [("erse", "erase"), ("Erase", "erase"), ("atack", "attack"), ("zz", "")])
def test_the_nearest_word(word: str, hint: str) -> None:
    assert did_you_mean(word, ["erase", "attack"]) == (f" Did you mean {hint!r}?" if hint else "")
