"""Hostile texts in every field of every file that is shown: nothing of them acts on a terminal, a page or a card.

Files are made from the schemas, so that a field that is added is tried too.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
import types
import unicodedata
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from erasure.artifact import CONFIG_FILE, Erasure, ErasureConfig
from erasure.cards import model_card
from erasure.carriers.edits import Edits
from erasure.carriers.weights import fingerprint
from erasure.cli import strategies
from erasure.cli.main import main
from erasure.cli.terminal import LARGEST, Terminal
from erasure.concept import Concept
from erasure.errors import ErasureError, EvaluationError
from erasure.eval import Results, write_report
from erasure.eval.report import render
from erasure.eval.schemas import EvaluationRow, ResultsFile
from erasure.pages import BLOCK, FOLDER
from erasure.picture_record import PictureRecord
from erasure.schema import Base, GateFigures, Rates, Sha256

HOSTILE = {
    "markup": "\"'><script>alert(1)</script><img src=//e.example onerror=alert(1)><svg/onload=a()></title></style>",
    "terminal": "[/x][bold]a[/]\x1b]0;b\x07\x1b[2J\x9b31m\u202ec\u2066\r\n\u200b\u2028d",
    "surrogate": "a\ud800b\udcffc",
    "card": "x\n---\nlicense: mit\n---\n| a | b |\n# c ![d](//e.example) `e` <b> [f](javascript:g) ```",
    "rich": "[/x] [link=file:///etc]a[/link] [on red]",
    "long": "z" * 90_000,
}
TERMINAL = 50_000
"""Characters that a command may print."""
KEY = "key of"
"""Marks a step of a path that leads to a key instead of its value."""


# What files hold -----------------------------------------------------------------------------------------------------


def example(hint: Any) -> Any:
    """A value of a type: every field of a table is there, every list has an item."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Sha256:
        return "0" * 64
    if origin in (Annotated, NotRequired):
        return example(inner[0])
    if origin in (Union, types.UnionType):
        return example(next(kind for kind in inner if kind is not type(None)))
    if origin is Literal:
        return inner[0]
    if origin is list:
        return [example(inner[0])]
    if origin is tuple:
        return [example(each) for each in inner]
    if origin is dict:
        return {example(inner[0]): example(inner[1])}
    if dataclasses.is_dataclass(hint) or hasattr(hint, "__total__"):
        return {name: example(kind) for name, kind in get_type_hints(hint, include_extras=True).items()}
    return {str: "word", int: 1, float: 0.5, bool: False, type(None): None}.get(hint, {"anything": ["word", 1]})


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values that hold no others, and of all keys."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        if isinstance(data, dict):
            yield (*path, (KEY, key))
        yield from places(value, (*path, key))
    if not isinstance(data, dict | list):
        yield path


def changed(data: Any, path: tuple[Any, ...], text: str) -> Any:
    """A copy with a text in one place."""
    made = holder = copy.deepcopy(data)
    for step in path[:-1]:
        holder = holder[step]
    last = path[-1]
    if isinstance(last, tuple):
        holder[text] = holder.pop(last[1])
    else:
        holder[last] = text
    return made


def names_of(path: tuple[Any, ...]) -> str:
    return ".".join(f"<{step[1]}>" if isinstance(step, tuple) else str(step) for step in path)


# What may be shown ---------------------------------------------------------------------------------------------------


def check_characters(text: str) -> None:
    """Every character can be seen; only line breaks are free."""
    unseen = {c for c in set(text) - {"\n"} if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}}
    assert not unseen


class Parsed(HTMLParser):
    """Elements with their attributes, and the longest text between two."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.attributes: set[tuple[str, str]] = set()
        self.values: list[tuple[str, str, str]] = []
        self.longest = 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes |= {(tag, ""), *((tag, name) for name, _ in attrs)}
        self.values += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.longest = max(self.longest, len(data))


TEMPLATES = set().union(
    *(Parsed(re.sub(r"{%.*?%}|{{.*?}}", "", path.read_text())).attributes for path in FOLDER.glob("*.html"))
)
"""Elements and attributes of the templates."""


def check_page(source: str) -> None:
    """A page holds what its template holds, loads nothing, and no text fills it."""
    check_characters(source)
    page = Parsed(source)
    assert page.attributes <= TEMPLATES
    for tag, name, value in page.values:
        if name == "src":
            assert re.fullmatch(r"data:image/(png|webp);base64,[A-Za-z0-9+/=]+", value)
        elif name == "href":
            assert value.startswith("./")
        else:
            assert len(value) < 5_000, (tag, name)
    assert page.longest < 2 * BLOCK


def check_terminal(said: Any, code: int, *, whole: bool = False) -> None:
    """Nothing steers the terminal or fills it, unless all was asked for; what fails, fails as it should."""
    assert code in (0, 2), said.err
    check_characters(said.out + said.err)
    assert whole or len(said.out) + len(said.err) < TERMINAL
    if code == 2:
        assert said.err.startswith("erasure: error: ")
        assert said.err.count("\n") == 1


def check_card(card: str, clean: str) -> None:
    """The card has the structure of one of plain words, and its YAML says the same."""

    def read(text: str) -> tuple[dict[str, Any], list[str], set[str]]:
        _, front, body = re.split("^---\n", text, maxsplit=2, flags=re.MULTILINE)
        blocks = MarkdownIt("commonmark").enable("table").parse(body)
        inline = {child.type for block in blocks for child in block.children or ()}
        return yaml.safe_load(front), [block.type for block in blocks], inline

    check_characters(card)
    assert len(card) < 30_000
    (front, blocks, inline), (known, structure, _) = read(card), read(clean)
    # What is no name for the Hub is left out of it, and results have names that can be shown.
    unlike = {key for key in known if front.get(key) != known[key]} | front.keys() - known
    assert unlike <= {"base_model", "base_model_relation", "tags", "model-index"}
    assert front.get("base_model") in (None, known["base_model"])
    assert set(front["tags"]) <= set(known["tags"])
    assert blocks == structure
    assert inline <= {"text", "code_inline", "softbreak"}


# Erasures ------------------------------------------------------------------------------------------------------------

DELTA = "text_encoder/encoder.weight"


def config() -> dict[str, Any]:
    """The config of an erasure, with every field that there is."""
    digests, rates = fingerprint(torch.ones(1)), example(Rates) | {"roc": [[0.01, 0.9], [0.1, 1]]}
    made = example(ErasureConfig) | {
        "concepts": [
            Concept("cat", anchor="dog", retain=("car",), synonyms=("kitten",), templates=("a {}",)).to_dict()
        ],
        "base": example(Base)
        | {"model": "someone/model", "tensors": {DELTA: digests}, "text_encoders": {"text_encoder": digests}},
        "carriers": ["weights"],
        "requests": [
            {
                "concepts": ["cat"],
                "strategy": "word",
                "options": {"word": "word", "listed": ["word", 1]},
                "seed": 0,
                "version": "0.1",
                "cost": {"seconds": 1.0},
            }
        ],
        "gates": {"cat": example(GateFigures) | {"features": rates, "probe": rates}},
        "evaluation": {"UA": 0.97, "remark": "word", "listed": ["word", 1]},
        "format_version": 1,
        "size": [64, 64],
        "sampling": {"steps": 1, "guidance": 1, "level": 900},
    }
    assert set(made) == {field.name for field in dataclasses.fields(ErasureConfig)}
    return made


@pytest.fixture(scope="module")
def erasure_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Erasure(ErasureConfig(**config()), Edits(deltas={DELTA: torch.ones(2)}))
    return made.save(tmp_path_factory.mktemp("hostile") / "made")


def tried(name: str, data: Any) -> list[tuple[Any, ...]]:
    """Where a hostile text goes: everywhere, but the long one, which takes time, only where texts are."""
    every = [path for path in places(data) if path[0] not in ((KEY, "results"), (KEY, "rows"))]
    return [path for path in every if name != "long" or isinstance(path[-1], tuple) or _holds_text(data, path)]


def _holds_text(data: Any, path: tuple[Any, ...]) -> bool:
    for step in path:
        data = data[step]
    return isinstance(data, str)


@pytest.mark.parametrize("name", ["markup", "terminal", "surrogate", "rich", "long"])
@pytest.mark.parametrize("flag", [[], ["--json"]], ids=["table", "json"])
def test_info(name: str, flag: list[str], erasure_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accepted = set()
    for path in tried(name, data := config()):
        (erasure_folder / CONFIG_FILE).write_text(json.dumps(changed(data, path, HOSTILE[name])))
        code = main(["info", str(erasure_folder), *flag])
        check_terminal(capsys.readouterr(), code, whole=bool(flag))
        accepted |= {names_of(path)} if code == 0 else set()
    if name in ("markup", "rich"):  # others are refused by the schema
        assert {"strategy", "protects", "concepts.0.target", "<word>", "evaluation.<UA>"} & accepted


@pytest.mark.parametrize("name", ["markup", "terminal", "surrogate", "rich", "long"])
@pytest.mark.parametrize("flag", [[], ["--json"]], ids=["table", "json"])
def test_info_of_a_picture(name: str, flag: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**example(PictureRecord), "format": 1}
    accepted = set()
    for path in places(data):
        info = PngInfo()
        info.add_itxt("erasure", json.dumps(changed(data, path, HOSTILE[name])))
        Image.new("RGB", (8, 8)).save(tmp_path / "picture.png", pnginfo=info)
        code = main(["info", str(tmp_path / "picture.png"), *flag])
        check_terminal(capsys.readouterr(), code, whole=bool(flag))
        accepted |= {names_of(path)} if code == 0 else set()
    if name in ("markup", "rich"):
        assert {"prompt", "model", "erasures.0.name"} <= accepted


@pytest.mark.parametrize("name", ["markup", "terminal", "surrogate", "card", "long"])
def test_model_card(name: str) -> None:
    def card(data: dict[str, Any]) -> str:
        made = ErasureConfig(**data)
        concepts = [types.SimpleNamespace(**concept) for concept in made.concepts]
        return model_card("name", made, concepts, "weights.safetensors")  # type: ignore[arg-type]

    data = config()
    clean, shown = card(data), 0
    for path in tried(name, data):
        named = path[0] == "requests" and len(path) == 3 and isinstance(path[-1], tuple)
        if path[0] in data and _is_free(path) and not named:  # the schema says how a request's fields are called
            made = card(changed(data, path, HOSTILE[name]))
            check_card(made, clean)
            shown += made != clean
    assert shown > 8


def _is_free(path: tuple[Any, ...]) -> bool:
    """Whether the card can be made with anything there: names of fields, and what decides, are checked when read."""
    keys = path[-1] if not isinstance(path[-1], tuple) else path[-1][1]
    fixed = {
        "target",
        "kind",
        "decides",
        "features",
        "probe",
        "roc",
        "tpr",
        "fpr",
        "auc",
        *get_type_hints(ErasureConfig),
    }
    named = isinstance(path[-1], tuple) and keys in fixed | set(get_type_hints(Base)) | set(config()["concepts"][0])
    return len(path) > 1 and not named and "decides" not in path


def test_a_very_large_erasure_does_not_fill_the_card_or_the_terminal(
    erasure_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config() | {"evaluation": {f"metric {index}": "z" * 990 for index in range(900)}}
    data["gates"] = {f"gate {index}": data["gates"]["cat"] for index in range(900)}
    assert len(model_card("name", ErasureConfig(**data), [Concept("cat")] * 900)) < 1_000_000
    (erasure_folder / CONFIG_FILE).write_text(json.dumps(data))
    assert main(["info", str(erasure_folder)]) == 0
    said = capsys.readouterr().out
    assert len(said) < 5 * LARGEST
    assert "of 900 rows and 2 of 2 columns are shown; --json gives all" in said


# Evaluations ---------------------------------------------------------------------------------------------------------


def evaluation() -> dict[str, Any]:
    """`results.json` and the rows of a sample, with every field that there is."""
    results = example(ResultsFile) | {"date": "2026-01-01T00:00:00+00:00"}
    after = results["metrics"][0] | {"name": "UA", "variant": "after"}
    results["metrics"] = [after | {"variant": "before"}, after, after | {"name": "drift", "value": None}]
    del results["metrics"][1]["mcnemar_p"]  # or the change is not shown
    row = example(EvaluationRow) | {"sample_id": "one", "role": "target", "objects": ["word"]}
    return {"results": results, "rows": [row | {"variant": variant} for variant in ("before", "after")]}


@pytest.fixture
def write_evaluation(tmp_path: Path) -> Callable[[Any], Path]:
    for variant in ("before", "after"):
        (tmp_path / "images" / variant).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / variant / "one.png")

    def write(data: Any) -> Path:
        (tmp_path / "results.json").write_text(json.dumps(data["results"]))
        (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data["rows"]))
        return tmp_path

    return write


@pytest.mark.parametrize("name", ["markup", "terminal", "long"])
def test_report(name: str, write_evaluation: Callable[[Any], Path]) -> None:
    check_page(write_report(write_evaluation(data := evaluation())).read_text())
    pages, refusals = set(), [""]
    for path in tried(name, data):
        try:
            page = write_report(write_evaluation(changed(data, path, HOSTILE[name]))).read_text()
        except EvaluationError as error:
            refusals.append(str(error))
        else:
            check_page(page)
            pages.add(names_of(path))
    assert max(map(len, refusals)) < 10_000
    assert {"results.metrics.0.concept", "rows.0.prompt"} <= pages


@pytest.mark.parametrize("name", ["markup", "terminal", "surrogate", "long"])
def test_report_of_wrong_types(name: str, tmp_path: Path) -> None:
    """What the reader refuses does no harm either."""
    text, data = HOSTILE[name], evaluation()["results"]
    for path in places(data["metrics"]):
        if path[-1] in ("value", "low", "high", "n", "missing", "mcnemar_p", "both", "neither", "reason"):
            made = changed(data, ("metrics", *path), text)
            check_page(render(Results(**{k: v for k, v in made.items() if k != "schema_version"}), [], tmp_path))
    for key in ("transitions", "change"):
        made = changed(data, ("metrics", 1, key), text)
        check_page(render(Results(**{k: v for k, v in made.items() if k != "schema_version"}), [], tmp_path))


@pytest.mark.parametrize("name", ["markup", "terminal", "long"])
def test_compare(
    name: str, write_evaluation: Callable[[Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pages = tmp_path / "page.html", 0
    for path in tried(name, data := evaluation()):
        if path[0] == "results":
            folder = write_evaluation(changed(data, path, HOSTILE[name]))
            code = main(["compare", str(folder), "--out", str(out)])
            check_terminal(capsys.readouterr(), code)
            if code == 0:
                check_page(out.read_text())
                pages += 1
    assert pages > 5 or name == "long"


# The terminal itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_errors_warnings_and_progress(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = HOSTILE[name]
    terminal = Terminal()
    terminal.warn(UserWarning(text), type("Ours", (UserWarning,), {"__module__": "erasure.made"}), "file.py")
    terminal.say(text)
    terminal.table([text, text], [[text, text]], title=text)
    with terminal.progress(1) as progress:
        progress.stage(text)
    for error, code in ((ErasureError(text), 2), (ValueError(text), 1)):
        monkeypatch.setattr(strategies, "run", lambda *_, error=error: (_ for _ in ()).throw(error))
        assert main(["strategies"]) == code
    assert (
        main([text]) == main(["info", "--" + text]) == main(["compare", text]) == main(["demo", "--size", text]) == 2
    )
    said = capsys.readouterr()
    check_characters(said.out + said.err)
    assert len(said.out) + len(said.err) < 100_000
    assert said.err.count("erasure: warning: ") == 1
    assert said.err.count("erasure: error: ") == 6
    assert said.err.count("(unexpected; --debug shows where it happened)") == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_tracebacks(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    try:
        main([HOSTILE[name], "--debug"])
    except ErasureError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    said = capsys.readouterr()
    assert "Traceback" in said.err
    assert "UsageError" in said.err
    check_characters(said.err)
    assert len(said.err) < 20_000


def test_a_terminal_that_knows_few_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        terminal = Terminal()
        terminal.say("Café")
        terminal.table(["猫"], [["é"]])
    assert r"Caf\xe9" in (tmp_path / "out").read_text()
