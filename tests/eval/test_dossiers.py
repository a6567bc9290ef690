"""Reports of one erasure: folders are recognised, what is of something else is refused, what is not there is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from erasure import Erasure, erase
from erasure.attach import ErasureManager
from erasure.cli.main import main
from erasure.errors import EvaluationError
from erasure.eval import Results, attack, audit, evaluate, report_on, stress_test
from erasure.eval.dossiers.reading import read_folder

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def made(erased_pipe: Any) -> Erasure:
    return next(iter(ErasureManager(erased_pipe).erasures.values()))


def saved(folder: Path, made: Erasure, *, suite: str = "canvas", model: str = "m1", **more: Any) -> Path:
    """Results as a run leaves them."""
    entry = {"name": made.name, "strategy": made.config.strategy, "fingerprint": made.fingerprint, "strength": 1.0}
    entries = more.pop("erasures", [entry | more.pop("entry", {})])
    row = {"name": "UA", "concept": "cat", "variant": "after", "value": 1.0, "low": 0.9, "high": 1.0, "n": 30,
           "recipe": {}, "missing": 2}  # fmt: skip
    rows = more.pop("metrics", [row])
    folder.mkdir(parents=True, exist_ok=True)
    Results(suite, "quick", {"name": "tiny", "fingerprint": model}, entries, rows, {}).save(folder)
    return folder


def test_parts_of_an_audit_that_were_not_done_are_those_that_were_to_be(tmp_path: Path) -> None:
    about = {"kind": "attack", "concept": "cat", "state": "refused", "detail": "no"}
    wanted = ["attack-img2img-chance", "attack-img2img", "attack-random_prefix"]
    parts = [{**about, "folder": one, "name": one.removeprefix("attack-").removesuffix("-chance")} for one in wanted]
    audited = {"schema_version": 1, "model": {}, "erasures": [], "parts": parts}
    (tmp_path / "audit.json").write_text(json.dumps(audited))
    assert [one.part.folder for one in read_folder(tmp_path, ["cat"]).found] == wanted


def test_what_was_measured_is_on_one_page(erased_pipe: Any, made: Erasure, judge: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {"size": "smoke", "judge": judge, "progress": False}
    evaluate(erased_pipe, "canvas", out=tmp_path / "e", **common)
    attack(erased_pipe, "prompt_embeds", out=tmp_path / "a", samples=1, **common)
    stress_test(erased_pipe, "strength", out=tmp_path / "s", samples=1, retained=1, **common)
    parts: dict[str, Any] = {"suites": ("canvas",), "attacks": ("translation",), "stress": ()}
    audit(erased_pipe, out=tmp_path / "card", **parts, **common)
    folders = [tmp_path / name for name in ("e", "a", "s", "card", "e")]
    found = report_on(folders, made, out=tmp_path / "page", pipe=erased_pipe)
    assert [(o.part.kind, o.part.name, o.state) for o in found.outcomes] == [
        ("evaluation", "canvas", "done"), ("attack", "prompt_embeds", "done"), ("stress", "strength", "done"),
        ("evaluation", "canvas", "done"), ("attack", "translation", "refused"),
    ]  # fmt: skip
    assert found.verified.state == "in force"
    assert found.verified.tensors > 0
    told = "\n".join(found.not_measured)
    for text in ("unlearndiffatk", "quantise", "What chance gives for prompt_embeds", "translation was refused"):
        assert text in told
    assert "No attack" not in told
    page, card = ((tmp_path / "page" / name).read_text() for name in ("report.html", "README.md"))
    for text in (page, card):
        assert "Not measured" in text
        assert "quantise" in text
        assert "in force" in text
    assert "Controls" in page
    assert "data:image/webp" in page
    data = json.loads((tmp_path / "page" / "report.json").read_text())
    assert data["parts"][0]["metrics"]
    assert data["not_measured"] == found.not_measured
    # Its own chance level stands beside an attack once it is there, and a report is written anew.
    attack(erased_pipe, "prompt_embeds", out=tmp_path / "c", samples=1, control=True, **common)
    again = report_on([tmp_path / "a", tmp_path / "c"], made, out=tmp_path / "page")
    assert again.chance(again.outcomes[0].part) is again.outcomes[1].finding
    assert any("was not verified" in line for line in again.not_measured)
    assert any("No evaluation" in line for line in again.not_measured)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entry": {"fingerprint": "0" * 16}}, "is of another erasure"),
        ({"erasures": []}, "without any erasure"),
        ({"erasures": [{"name": "a"}, {"name": "b"}]}, "several erasures together"),
        ({"model": "m2"}, "another base model"),
        ({"entry": {"strength": 0.5}}, "at strength 0.5"),
        ({"suite": "not-a-suite"}, "unknown suite 'not-a-suite'"),
        ({"suite": "stress nothing"}, "unknown stress test"),
    ],
)
def test_what_is_of_something_else_is_refused(
    change: dict[str, Any], message: str, made: Erasure, tmp_path: Path
) -> None:
    first = saved(tmp_path / "first", made)
    other = saved(tmp_path / "other", made, **change)
    with pytest.raises(EvaluationError, match=message):
        report_on([first, other], made, out=tmp_path / "page")
    assert not (tmp_path / "page").exists()
    report_on([first], made, out=tmp_path / "page")


def unfinished(folder: Path, made: Erasure) -> None:
    (folder / "recipe.json").write_text("{}")


def an_erasure(folder: Path, made: Erasure) -> None:
    (folder / "erasure_config.json").write_text("{}")


def leads_out(folder: Path, made: Erasure) -> None:
    part = {"kind": "evaluation", "name": "canvas", "concept": None, "folder": "..", "state": "done", "detail": ""}
    data = {"schema_version": 1, "model": {}, "erasures": [], "parts": [part]}
    (folder / "audit.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder, made: None, "found: nothing"),
        (unfinished, "was not finished"),
        (an_erasure, "belongs behind --erasure"),
        (leads_out, r"\.\."),
    ],
)
def test_what_holds_no_measurement_is_refused(
    write: Callable[[Path, Erasure], None], message: str, made: Erasure, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, made)
    with pytest.raises(Exception, match=message):
        report_on(folder, made, out=tmp_path / "page")


def test_a_folder_that_holds_something_else_is_not_written_to(made: Erasure, tmp_path: Path) -> None:
    first = saved(tmp_path / "first", made)
    with pytest.raises(EvaluationError, match="holds no report"):
        report_on(first, made, out=first)
    assert not (first / "report.html").exists()


def test_hostile_texts_are_shown_and_nothing_else(made: Erasure, tmp_path: Path) -> None:
    row = {"name": "UA", "concept": HOSTILE, "variant": "after", "value": None, "low": None, "high": None, "n": 0,
           "recipe": {}, "reason": HOSTILE}  # fmt: skip
    attacked = saved(tmp_path / HOSTILE.replace("/", "_"), made, suite="typo", metrics=[{**row, "name": "ASR"}],
                     entry={"name": HOSTILE})  # fmt: skip
    (attacked / "attacks.jsonl").write_text("")
    cell = tmp_path / "cell"
    saved(cell / "evaluation-canvas", made, metrics=[row])
    parts = [{"what": "evaluation-canvas", "state": "done", "reason": "", "seconds": 1.0},
             {"what": "attack-x", "state": "failed", "reason": HOSTILE, "seconds": 1.0}]  # fmt: skip
    (cell / "cell.json").write_text(json.dumps({"parts": parts}))
    found = report_on([attacked, cell], made, out=tmp_path / "page")
    assert any("attack-x was failed" in line for line in found.not_measured)
    page, card = ((tmp_path / "page" / name).read_text() for name in ("report.html", "README.md"))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<script" not in card.replace("\\<", "")


def test_the_command_prints_what_is_missing(
    world_pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = erase(world_pipe, "cat", "uce", progress=False)
    first, erasure = saved(tmp_path / "first", made), tmp_path / "erasure"
    made.save(erasure)
    command = ["report", str(first / "results.json"), "--erasure", str(erasure), "--out", str(tmp_path / "page")]
    assert main(command) == 0
    assert "Not measured: No attack was given." in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grades"]["prompts"] in ("held", "undecided")
    assert main(["report", "--erasure", str(erasure), "--out", str(tmp_path / "page")]) == 2
