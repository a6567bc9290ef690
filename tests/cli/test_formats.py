"""`erasure compare --format`: CSV and LaTeX hold what the results hold."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from erasure.cli.formats import COLUMNS, latex
from erasure.cli.main import main
from erasure.eval import Results


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two evaluations with one number each that could be had, and one that could not."""
    made = []
    for name, value in (("uce", 0.123456789), ("=hirm", 0.5)):
        recipe = {"suite": "canvas", "metric": "a share"}
        metrics = [
            {"name": "UA", "concept": "cat", "variant": "after", "value": value, "low": 0.1, "high": 0.9, "n": 10,
             "recipe": recipe},
            {"name": "flagged_rate[x]", "concept": "cat", "variant": "after", "value": None, "low": None,
             "high": None, "n": 0, "reason": "no, not at 5 %", "recipe": recipe},
        ]  # fmt: skip
        erasure = {"name": "cat", "strategy": name, "strength": 1.0, "size_bytes": 10, "seconds": 1.0}
        Results("canvas", "quick", {"name": "m", "fingerprint": "f"}, [erasure], metrics, {}).save(tmp_path / name)
        made.append(str(tmp_path / name))
    return made


def test_csv_has_a_line_for_every_number(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *folders, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == 4
    first, missing = rows[0], rows[1]
    assert (first["metric"], float(first["value"]), first["n"]) == ("UA", 0.123456789, "10")
    assert (missing["value"], missing["reason"]) == ("", "no, not at 5 %")
    # A spreadsheet runs nothing that a label says.
    assert {row["label"] for row in rows} == {"uce", "'=hirm"}


def test_latex_is_a_table_whose_texts_are_no_markup(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.tex"
    assert main(["compare", *folders, "--format", "latex", "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    text = out.read_text()
    assert text.count(r"\begin{tabular}{lrr}") == text.count(r"\end{tabular}") == 1
    assert r"UA & 0.123 {\scriptsize [0.100, 0.900]} & 0.500 {\scriptsize [0.100, 0.900]} \\" in text
    assert r"flagged\_rate[x]" in text
    assert latex(r"50 % of a_b & \input{x} $y$ #1 ~ ^") == (
        r"50 \% of a\_b \& \textbackslash{}input\{x\} \$y\$ \#1 \textasciitilde{} \textasciicircum{}"
    )


def test_json_and_html_are_what_the_older_options_give(
    folders: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *folders, "--json"]) == 0
    old = capsys.readouterr().out
    assert main(["compare", *folders, "--format", "json"]) == 0
    assert capsys.readouterr().out == old
    assert json.loads(old)["columns"] == ["UA", "flagged_rate[x]"]
    assert main(["compare", *folders, "--format", "html"]) == 0
    page = capsys.readouterr().out
    assert main(["compare", *folders, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == page
