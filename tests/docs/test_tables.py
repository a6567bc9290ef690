"""Tables of pages are made of files of measured figures: of all of them, of nothing else, and of sound ones only."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import COMMANDS as BENCHMARKS
from erasure.assets import path as embedded
from erasure.assets.build.measured import Measured, Row, figure, rewrite
from erasure.assets.build.tables import FAMILIES, SHARED, TABLES, Shown, Table, markdown
from erasure.assets.facts import FILE
from erasure.errors import EvaluationError
from erasure.eval.statistics import wilson
from tests.behaviour.cases import REFUSED
from tests.docs.test_pages import ROOT, script

reference = script("reference")
PAGES = {page.relative_to(ROOT).as_posix(): page for page in reference.marked_pages()}
FILES = sorted((ROOT / "docs/measured").iterdir())
MODELS = {"stable-diffusion": "canvas-sd", "stable-diffusion-xl": "canvas-sdxl", "stable-diffusion-3": "canvas-sd3",
          "flux": "canvas-flux"}  # fmt: skip
"""Embedded model by family."""


# Pages and files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_tables_are_what_the_figures_make(name: str) -> None:
    """After a change: `python docs/reference.py`."""
    text = PAGES[name].read_text()
    assert reference.filled(text, name) == text


def test_every_table_is_shown_and_every_file_is_used() -> None:
    shown = [mark for name, page in PAGES.items() for mark in reference.marks(page.read_text(), name)]
    assert set(shown) == {reference.FRONT, *TABLES}
    assert len(shown) == len(set(shown)), "each table has one place"
    assert {file.name for file in FILES} == {f"{table.data}.json" for table in TABLES.values()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_are_sound_and_are_written_as_they_are(file: Path, tmp_path: Path) -> None:
    measured = Measured.read(file)
    measured.write(tmp_path / file.name)
    assert (tmp_path / file.name).read_text() == file.read_text()
    if measured.command is not None and (step := measured.command.removeprefix("python -m ")) != measured.command:
        module, name, *_ = step.split()
        if module == "benchmarks":
            assert name in BENCHMARKS
            return
        assert module == "erasure.assets.build"
        assert hasattr(__import__("erasure.assets.build.__main__", fromlist=[name]), name)


def test_rows_that_are_in_a_file_are_in_its_tables() -> None:
    for file in FILES:
        measured = Measured.read(file)
        tables = [table for table in TABLES.values() if table.data == file.stem]
        for row in measured.rows:
            assert any(
                all(str(row[key]) in values for key, values in table.where.items())
                for table in tables
            ), f"{file.name}: no table shows {row}"  # fmt: skip


@pytest.mark.parametrize("model", ["canvas-sdxl", "canvas-sd3", "canvas-flux"])
def test_ways_into_the_denoiser_are_those_that_the_model_records(model: str) -> None:
    recorded = json.loads((embedded(model) / FILE).read_text())["training"]["accuracy"]
    rows = [row for row in reference.read("doors").rows if row["model"] == model]
    found = {f"{row['part']}_{name}": cell for row in rows for name, cell in row.items() if isinstance(cell, float)}
    assert found == {name: value for name, value in recorded.items() if name in found}
    assert len(found) == sum(
        name.endswith(("_alone_object", "_alone_style", "_without_object", "_swapped_object", "_swapped_change"))
        for name in recorded
    )  # fmt: skip


def test_numbers_of_any_size_are_shown_with_two_digits() -> None:
    assert [f"{Shown(number):short}" for number in (2.4163e-10, 0.12499, 1.0, None)] == ["2.4e-10", "0.12", "1", "-"]


def test_what_the_readme_calls_refused_is_refused() -> None:
    lines = [line.split("|") for line in reference.front().splitlines()[2:]]
    refused = {
        (line[1].split("`")[1], model)
        for line in lines
        for model, cell in zip(reference.COLUMNS, line[2:], strict=False)
        if cell.strip() == "refused"
    }
    known = {(case, MODELS[family]) for case, family in REFUSED if family in MODELS}
    assert refused == {pair for pair in known if "-" not in pair[0]}


@pytest.mark.parametrize("name", ["README.md", "docs/compose.md", "docs/remove.md"])
def test_rates_that_are_quoted_with_three_decimals_are_in_a_table(name: str) -> None:
    known = {
        f"{Shown(cell):3/3}"
        for file in FILES for row in Measured.read(file).rows for cell in row.values() if isinstance(cell, dict)
    }  # fmt: skip
    prose = reference.MARK.sub("", PAGES[name].read_text()).replace("\n", " ").replace("**", "")
    quoted = re.findall(r"\d\.\d{3} \(\d\.\d{3}-\d\.\d{3}\)", prose)
    assert quoted
    assert [each for each in quoted if each not in known] == []


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pages and files of figures, in a folder of their own."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("DOCS", "FOLDER", "MEASURED"):
        at = tmp_path / getattr(reference, name).relative_to(ROOT)
        monkeypatch.setattr(reference, name, at)
    return tmp_path


def test_a_figure_that_changes_changes_on_every_page(checkout: Path) -> None:
    file = checkout / "docs/measured/families.json"
    measured = Measured.read(file)
    row = next(row for row in measured.rows if (row["method"], row["model"]) == ("esd", "canvas-flux"))
    row |= {"AA": {"value": 0.123, "low": 0.11, "high": 0.13}, "size": "smoke"}
    measured.write(file)
    (checkout / "docs/reference/gone.md").write_text("of a method that is gone")
    reference.main()
    assert not (checkout / "docs/reference/gone.md").exists()
    assert "| 0.123 (0.11-0.13) |" in (checkout / "docs/numbers.md").read_text()
    assert "| `canvas-flux` | smoke |" in (checkout / "docs/reference/esd.md").read_text()
    assert "| 0.978 | 0.123 (smoke) |" in (checkout / "README.md").read_text()
    changed = {page for page in PAGES if (checkout / page).read_text() != PAGES[page].read_text()}
    assert changed == {"README.md", "docs/numbers.md"}


def test_all_methods_get_their_rows_once_they_are_measured(checkout: Path) -> None:
    rates = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("UA", "IRA", "CRA", "AA", "drift")}
    row: Row = {"method": "mace", "group": "objects", "concepts": 3, **rates, "seconds": 1.0, "kB": 2.0,
                "IRA_group": {"value": None, "reason": "not asked"}}  # type: ignore[dict-item]  # fmt: skip
    style = row | {"group": "styles", "concepts": 1, "AA": {"value": 0.25, "low": 0.2, "high": 0.3}}
    six = row | {"group": SHARED, "concepts": 6, "AA": {"value": 0.125, "low": 0.1, "high": 0.2}}
    rewrite(checkout / "docs/measured/methods.json", [row, style, six], size="full", models=["canvas-sd"], seeds=[0])
    reference.main()
    shown = "| 0.500 (0.40-0.60) | - | 0.500 (0.40-0.60) | not asked | 0.500 (0.40-0.60) |"
    assert f"| `mace` {shown}" in (checkout / "docs/numbers.md").read_text()
    assert shown in (checkout / "docs/reference/mace.md").read_text()
    assert "(docs/reference/mace.md) | 0.125 | - | refused |" in (checkout / "README.md").read_text()
    assert "| `canvas-sd` | full | 0.500 (0.40-0.60) |" in (checkout / "docs/reference/mace.md").read_text()
    of_styles = "| 0.500 (0.40-0.60) | - | 0.500 (0.40-0.60) | 0.500 (0.40-0.60) | 0.250 (0.20-0.30) |"
    assert f"| `mace` {of_styles}" in (checkout / "docs/numbers.md").read_text()


# What is refused ----------------------------------------------------------------------------------------------------

TABLE = "<!-- table: words -->\n\n| a |\n\n<!-- end of table -->\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TABLE.replace("words", "no-such-table"), "names the table 'no-such-table'; there are: methods-and-families"),
        (TABLE.replace("<!-- end of table -->", ""), "'<!-- table: words -->', which belongs to no table"),
        (TABLE.replace("<!-- table: words -->", ""), "'<!-- end of table -->', which belongs to no table"),
        (TABLE.replace("table:", "table"), "which belongs to no table"),
        (TABLE.replace("<!-- table: words -->", "<!--table: words-->"), "'<!--table: words-->', which belongs"),
        (f"text {TABLE}", "which belongs to no table"),
        (TABLE.replace("| a |", "<!-- table: words -->"), "'<!-- table: words -->', which belongs to no table"),
        (TABLE + TABLE[:22], "which belongs to no table"),
    ],
)
def test_a_mark_that_is_wrong_is_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError) as raised:
        reference.filled(text, "page.md")
    assert str(raised.value).startswith("page.md ")
    assert message in str(raised.value)


def test_nothing_is_written_where_a_page_is_wrong(checkout: Path) -> None:
    page = checkout / "docs/numbers.md"
    page.write_text(page.read_text().replace("<!-- table: words -->", "<!-- table: word -->"))
    (checkout / "docs/reference/esd.md").write_text("old")
    with pytest.raises(SystemExit, match=r"nothing was written: numbers\.md names the table 'word'"):
        reference.main()
    assert (checkout / "docs/reference/esd.md").read_text() == "old"


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no rows": (lambda data: data.pop("rows"), "key 'rows' is missing"),
    "an unknown key": (lambda data: data.update(note=""), "unknown keys ['note']"),
    "no keys": (lambda data: data.update(keys=[]), "'keys'"),
    "a row without a key": (lambda data: data["rows"][1].pop("model"), "row 2 has no text or whole number 'model'"),
    "a key that is no text": (lambda data: data["rows"][0].update(model=0.5), "row 1 has no text or whole number"),
    "a row twice": (lambda data: data["rows"].append(data["rows"][0]), "has the same method, model as one above: uce"),
    "a formatted figure": (lambda data: data["rows"][0]["UA"].update(value="0.99 (0.97-1.00)"), "0.99 (0.97-1.00)"),
    "an unknown bound": (lambda data: data["rows"][0]["UA"].update(mid=0.5), "mid"),
    "one bound": (lambda data: data["rows"][0]["UA"].pop("low"), "row 1: UA has one bound of its interval"),
    "a value outside": (lambda data: data["rows"][0]["UA"].update(value=0.5), "UA: 0.5 is outside of its interval"),
    "a value missing": (lambda data: data["rows"][0]["UA"].update(value=None), "UA: give a value, or null"),
    "a value and a reason": (lambda data: data["rows"][0]["UA"].update(reason="none"), "UA: give a value, or null"),
    "an empty text": (lambda data: data["rows"][0].update(size=""), "size"),
    "a list": (lambda data: data["rows"][0].update(size=["full"]), "size"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MALFORMED)
def test_a_malformed_file_is_refused(fault: str, tmp_path: Path) -> None:
    change, message = MALFORMED[fault]
    data = json.loads((ROOT / f"docs/measured/{FAMILIES}.json").read_text())
    change(data)
    file = tmp_path / "families.json"
    file.write_text(json.dumps(data))
    with pytest.raises(EvaluationError) as raised:
        Measured.read(file)
    assert str(file) in str(raised.value)
    assert message in str(raised.value)


def test_a_file_that_is_no_json_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"rows": [NaN]}')
    for name in ("broken", "missing"):
        with pytest.raises(EvaluationError, match=f"{name}.json"):
            Measured.read(tmp_path / f"{name}.json")


# Layout -------------------------------------------------------------------------------------------------------------


def of_rows(*rows: Row) -> Measured:
    return Measured(about="a", command="c", keys=["name"], size=None, models=[], seeds=None, rows=list(rows))


def test_figures_are_written_in_one_way() -> None:
    rate = {"value": 0.98765, "low": 0.94, "high": 1.0, "n": 12}
    cells: Row = {"name": "x|y", "rate": rate, "none": {"value": None, "reason": "why"}, "kB": 12, "s": 0.06}  # type: ignore[dict-item]
    table = Table("d", tuple((name, name) for name in ("{name}", "{rate:3/2}", "{rate:1}", "{none:3/2}", "{kB:1}",
                                                       "{s:1}")))  # fmt: skip
    (line,) = table.lines(of_rows(cells))[1]
    assert line == ["x|y", "0.988 (0.94-1.00)", "1.0", "why", "12", "0.1"]
    assert table.markdown(of_rows(cells)).splitlines()[2].startswith(r"| x\|y | 0.988 (0.94-1.00) |")
    assert markdown(["", "b"], [["", "c"]]) == "| | b |\n|---|---|\n| | c |"


def test_what_a_row_lacks_is_shown_as_absent() -> None:
    rows: list[Row] = [{"name": "a", "rank": 3}, {"name": "b"}]
    assert Table("d", (("", "{name}"), ("", "{rank}"))).lines(of_rows(*rows))[1] == [["a", "3"], ["b", "-"]]


def test_rows_stand_side_by_side() -> None:
    rows: list[Row] = [
        {"name": name, "method": method, "UA": rate}
        for name, method, rate in (("a", "x", 0.1), ("a", "y", 0.2), ("b", "y", 0.4))
    ]
    measured = of_rows(*rows)
    measured.keys.append("method")
    table = Table("d", (("name", "{name}"),), across="method", each=(("of `{value}`", "{each[UA]:1}"),))
    assert table.lines(measured) == (["name", "of `x`", "of `y`"], [["a", "0.1", "0.2"], ["b", "-", "0.4"]])
    named = Table("d", (("{y[UA]:1}", "{y[UA]:2}"),), across="method")
    assert named.lines(measured) == (["0.2"], [["0.20"], ["0.40"]])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table("d", (("", "{uA}"),)), "shows 'uA', which no row has; there are: name"),
        (Table("d", (("", "{z[name]}"),), across="name"), "shows 'z', which is no name; there are: a"),
        (Table("d", (("", "{name}"),), where={"name": ("b",)}), "has no row with"),
    ],
)
def test_a_table_of_what_is_not_there_is_refused(table: Table, message: str) -> None:
    with pytest.raises(EvaluationError) as raised:
        table.check(of_rows({"name": "a"}))
    assert message in str(raised.value)


# Writing anew -------------------------------------------------------------------------------------------------------


def test_rows_that_are_measured_anew_take_the_place_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    of_rows({"name": "a", "UA": 0.1, "old": 1}, {"name": "b", "UA": 0.2}).write(file)
    said = rewrite(file, [{"name": "c", "UA": 0.4}, {"name": "a", "UA": 0.3}], models=["m"], seeds=[0])
    assert said.startswith(f"{file}: 2 rows written, 1 left as they were")
    found = Measured.read(file)
    assert found.rows == [{"name": "a", "UA": 0.3}, {"name": "b", "UA": 0.2}, {"name": "c", "UA": 0.4}]
    assert (found.models, found.seeds) == (["m"], [0])


def test_what_would_mix_sizes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    of_rows({"name": "a"}, {"name": "b"}).write(file)
    before = file.read_text()
    with pytest.raises(EvaluationError, match="rows of size None, and the new ones are of size smoke: 1 rows"):
        rewrite(file, [{"name": "a"}], size="smoke", models=[], seeds=[])
    with pytest.raises(EvaluationError, match="nothing was measured"):
        rewrite(file, [], models=[], seeds=[])
    with pytest.raises(EvaluationError, match=r"a new row of .* has no text or whole number 'name'"):
        rewrite(file, [{"UA": 0.5}], models=[], seeds=[])
    with pytest.raises(EvaluationError, match="outside of its interval"):
        rewrite(file, [{"name": "a", "UA": {"value": 2.0, "low": 0.0, "high": 1.0}}], models=[], seeds=[])
    with pytest.raises(EvaluationError, match=r"there is no .*other\.json: give the folder docs/measured"):
        rewrite(tmp_path / "other.json", [{"name": "a"}], models=[], seeds=[])
    assert file.read_text() == before
    rewrite(file, [{"name": "a"}, {"name": "b"}], size="smoke", models=[], seeds=[])
    assert Measured.read(file).size == "smoke"


def test_a_figure_of_an_interval_or_a_row_of_results() -> None:
    spread = wilson(1, 3)
    assert figure(spread, 3) == {"value": 0.333333, "low": round(spread.low, 6), "high": round(spread.high, 6), "n": 3}
    row = {"name": "UA", "value": 0.5, "low": None, "high": None, "n": 4, "recipe": {}}
    assert figure(row) == {"value": 0.5, "n": 4}
    assert figure({"value": None, "reason": "few", "n": 1}) == {"value": None, "reason": "few"}
