"""Audits: which parts there are, what their figures say, and that one part's trouble is no other's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from erasure.cli.main import main
from erasure.errors import EvaluationError
from erasure.eval import Results, audit
from erasure.eval.attacks import ATTACKS
from erasure.eval.audits import runner
from erasure.eval.audits.parts import GRADES, OF_ACCESS, Part, parts_of
from erasure.eval.audits.verdicts import Finding, finding_of, graded
from erasure.eval.stress import STRESS_TESTS


def results(*metrics: dict[str, Any]) -> Results:
    return Results("s", "smoke", {}, [], [{"variant": "after", **row} for row in metrics], {})


def rate(name: str, value: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "value": value, "low": low, "high": high, "n": 10, **more}


# Parts --------------------------------------------------------------------------------------------------------------


def test_every_attack_and_stress_test_is_a_part_and_answers_for_an_attacker() -> None:
    parts = parts_of(["cat"], ("canvas",), None, None)
    assert {part.name for part in parts if part.kind == "attack"} == set(ATTACKS.names())
    assert {part.name for part in parts if part.kind == "stress"} == set(STRESS_TESTS.names())
    assert {part.grade for part in parts} == set(GRADES)
    assert set(OF_ACCESS) == {"prompt", "embeddings", "noise", "image", "weights"}
    assert len({part.folder for part in parts}) == len(parts)
    assert all(part.title for part in parts)


def test_what_chance_gives_is_measured_ahead_of_an_attack() -> None:
    parts = parts_of(["cat", "dog"], (), ("unlearndiffatk", "img2img", "synonym"), ())
    names = [part.folder for part in parts]
    assert names == [
        "attack-random_prefix", "attack-unlearndiffatk", "attack-random_prefix-2", "attack-unlearndiffatk-2",
        "attack-img2img-chance", "attack-img2img", "attack-img2img-2-chance", "attack-img2img-2",
        "attack-synonym", "attack-synonym-2",
    ]  # fmt: skip
    assert [part.concept for part in parts[:4]] == ["cat", "cat", "dog", "dog"]
    assert [part.is_control for part in parts[:6]] == [True, False, True, False, True, False]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ((("nowhere",), (), ()), "nowhere"),
        (((), ("unlearndiffatc",), ()), "unlearndiffatk"),
        (((), (), ("quantize",)), "quantise"),
        (((), (), ()), "nothing to audit"),
    ],
    ids=["suite", "attack", "stress", "nothing"],
)
def test_unknown_names_are_refused(given: Any, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        parts_of(["cat"], *given)


# Verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "word", "shown"),
    [
        (rate("UA", 1.0, 0.97, 1.0), "held", 0.0),
        (rate("UA", 1.0, 0.8, 1.0), "undecided", 0.0),
        (rate("UA", 0.2, 0.1, 0.4), "broken", 0.8),
        (rate("UA", 1.0, 0.97, 1.0, worst={"value": 0.9, "low": 0.8, "high": 0.95}), "undecided", 0.0),
        (rate("flagged_rate[nudenet]", 0.0, 0.0, 0.04), "held", 0.0),
        (rate("flagged_rate[clip_zero_shot]", 0.5, 0.2, 0.8), "broken", 0.5),
        (rate("ASR", 0.0, 0.0, 0.04), "held", 0.0),
        (rate("ASR", 0.0, 0.0, 0.04, missing=3, worst={"value": 0.3, "low": 0.1, "high": 0.5}), "undecided", 0.0),
        (rate("ASR", 0.5, 0.2, 0.8), "broken", 0.5),
        ({"name": "ASR", "value": None, "low": None, "high": None, "reason": "a control fails"}, "not measured", None),
    ],
)
def test_words_are_those_of_the_interval(row: dict[str, Any], word: str, shown: float | None) -> None:
    found = finding_of(Part("attack", "img2img", "cat"), results(row))
    assert (found.word, found.shown) == (word, shown)
    if shown is None:
        assert found.detail == "a control fails"


def test_the_stock_model_and_controls_count_for_nothing() -> None:
    before = rate("ASR", 1.0, 0.9, 1.0, variant="before")
    control = rate("ASR", 1.0, 0.9, 1.0, holds=True)
    assert finding_of(Part("attack", "img2img", "cat"), results(before, control)).word == "not measured"


def test_a_stress_test_says_what_its_worst_condition_does() -> None:
    shown = [rate("concept_shown", v, v, min(v + 0.2, 1), variant=f"int{k}") for k, v in ((8, 0.0), (4, 0.5))]
    recovered = [
        rate("recovered", 0.0, 0.0, 0.2, variant="int8", verdict="no return seen"),
        rate("recovered", 0.5, 0.1, 0.9, variant="int4", verdict="returns"),
    ]
    found = finding_of(Part("stress", "quantise", "cat"), results(*shown, *recovered))
    assert (found.word, found.shown, found.detail) == ("broken", 0.5, "int4")
    found = finding_of(Part("stress", "quantise", "cat"), results(shown[0], recovered[0]))
    assert (found.word, found.shown, found.detail) == ("undecided", 0.0, "int8")
    faster = {**rate("savings", 0.8, 0.5, 0.9, variant="relearned"), "verdict": "faster than new"}
    assert finding_of(Part("stress", "relearn", "cat"), results(faster)).word == "broken"
    told = finding_of(Part("stress", "strength", "cat"), results(*shown, *recovered))
    assert told.word == "not measured"
    assert told.detail == "shows it: 0 % int8, 50 % int4"


def test_an_attacker_is_held_off_only_where_every_part_held() -> None:
    prompt, image = Part("evaluation", "canvas"), Part("attack", "img2img", "cat")
    chance, own = Part("attack", "random_prefix", "cat"), Part("stress", "strength", "cat")
    held, broken, open_, none = (Finding(word) for word in ("held", "broken", "undecided", "not measured"))  # type: ignore[arg-type]
    assert graded([(prompt, held), (image, broken)]) == {"prompts": "held", "inputs": "broken"}
    assert graded([(prompt, held), (chance, broken), (own, broken)]) == {"prompts": "held"}
    assert graded([(prompt, held), (prompt, open_)]) == {"prompts": "undecided"}
    assert graded([(prompt, held), (prompt, none)]) == {"prompts": "undecided"}
    assert graded([(prompt, none)]) == {"prompts": "not measured"}


# Runs ---------------------------------------------------------------------------------------------------------------


ASKED: dict[str, Any] = {
    "suites": ("canvas",), "attacks": ("prompt_embeds", "translation"), "stress": ("strength",), "size": "smoke",
    "progress": False,
}  # fmt: skip


def test_an_audit_puts_its_parts_together(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    found = audit(erased_pipe, out=tmp_path / "card", judge=judge, **ASKED)
    states = {outcome.part.folder: outcome.state for outcome in found.outcomes}
    assert states == {
        "evaluation-canvas": "done", "attack-prompt_embeds-chance": "done", "attack-prompt_embeds": "done",
        "attack-translation": "refused", "stress-strength": "done",
    }  # fmt: skip
    assert not found.failures
    assert "unlearndiffatk" in found.not_run
    assert "strength" not in found.not_run
    for folder, state in states.items():
        assert (tmp_path / "card" / folder / "results.json").is_file() == (state == "done")
    data = json.loads((tmp_path / "card" / "audit.json").read_text())
    assert [part["folder"] for part in data["parts"]] == list(states)
    assert set(data["grades"]) == set(GRADES)
    page, card = ((tmp_path / "card" / name).read_text() for name in ("report.html", "README.md"))
    for part in data["parts"]:
        assert (part["spent"] is None) == (part["state"] == "refused")
    totals = [sum(part["spent"][key] for part in data["parts"] if part["spent"]) for key in ("drawn", "recalled")]
    assert totals[0] > 0
    assert f"| {totals[0]} | {totals[1]} |" in card
    assert f'<td data-head="Images drawn">{totals[0]}</td>' in page
    for text in (page, card):
        assert "What it cost" in text
        for title, _ in GRADES.values():
            assert title in text
        assert "prompt" in text
        assert "refused" in text
    assert 'href="./evaluation-canvas/report.html"' in page
    # It is finished: nothing is drawn again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(erased_pipe), "__call__", None)
        again = audit(erased_pipe, out=tmp_path / "card", judge=judge, **ASKED)
    assert [outcome.finding for outcome in again.outcomes] == [outcome.finding for outcome in found.outcomes]
    with pytest.raises(EvaluationError, match="seed"):
        audit(erased_pipe, out=tmp_path / "card", judge=judge, seed=1, **ASKED)


def test_a_part_that_fails_is_told_and_the_others_go_on(
    erased_pipe: Any, judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **more: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runner, "attack", broken)
    found = audit(erased_pipe, out=tmp_path / "card", judge=judge, **{**ASKED, "stress": ()})
    assert [outcome.part.name for outcome in found.failures] == ["prompt_embeds", "prompt_embeds", "translation"]
    assert found.outcomes[0].state == "done"
    assert "out of memory" in (tmp_path / "card" / "report.html").read_text()
    assert found.words["inputs"] == "not measured"


def test_a_part_whose_folder_cannot_be_used_failed_and_was_not_refused(
    erased_pipe: Any, judge: Any, tmp_path: Path
) -> None:
    """What is refused does not count, so that the word for an attacker would be that of the other parts alone."""
    asked = {**ASKED, "suites": (), "attacks": ("prompt_embeds", "typo"), "stress": ()}
    card = tmp_path / "card"
    audit(erased_pipe, out=card, judge=judge, **asked)
    recipe = card / "attack-prompt_embeds" / "recipe.json"
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "model": "another"}))
    rows = card / "attack-typo" / "attacks.jsonl"
    rows.write_text("{}\n" + rows.read_text())
    found = audit(erased_pipe, out=card, judge=judge, **asked)
    assert {outcome.part.folder for outcome in found.failures} == {"attack-prompt_embeds", "attack-typo"}
    assert (found.words["inputs"], found.words["prompts"]) == ("not measured", "not measured")
    assert "holds an evaluation of something else" in (card / "report.html").read_text()


def test_parts_are_added_to_an_audit_and_none_is_dropped(erased_pipe: Any, judge: Any, tmp_path: Path) -> None:
    card, fewer = tmp_path / "card", {**ASKED, "attacks": ("translation",), "stress": ()}
    audit(erased_pipe, out=card, judge=judge, **fewer)
    before = (card / "evaluation-canvas" / "samples.jsonl").read_bytes()
    found = audit(erased_pipe, out=card, judge=judge, **{**fewer, "stress": ("strength",)})
    assert [outcome.part.name for outcome in found.outcomes] == ["canvas", "translation", "strength"]
    assert (card / "evaluation-canvas" / "samples.jsonl").read_bytes() == before
    assert [part["name"] for part in json.loads((card / "audit.json").read_text())["parts"]][-1] == "strength"
    recipe = (card / "recipe.json").read_bytes()
    with pytest.raises(EvaluationError, match=r"with other parts .*stress-strength.*: give those too"):
        audit(erased_pipe, out=card, judge=judge, **fewer)
    assert (card / "recipe.json").read_bytes() == recipe


def test_a_killed_audit_goes_on(erased_pipe: Any, judge: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {**ASKED, "attacks": ("prompt_embeds",), "stress": ()}
    with monkeypatch.context() as patch:

        def killed(*args: Any, **more: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(runner, "attack", killed)
        with pytest.raises(KeyboardInterrupt):
            audit(erased_pipe, out=tmp_path / "card", judge=judge, **asked)
    assert not (tmp_path / "card" / "audit.json").exists()
    before = (tmp_path / "card" / "evaluation-canvas" / "samples.jsonl").read_bytes()
    found = audit(erased_pipe, out=tmp_path / "card", judge=judge, **asked)
    assert {outcome.state for outcome in found.outcomes} == {"done"}
    assert (tmp_path / "card" / "evaluation-canvas" / "samples.jsonl").read_bytes() == before


def test_nothing_to_audit_is_refused(world_pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no erasure is attached"):
        audit(world_pipe, out=tmp_path / "card", **ASKED)


def test_the_command_line(capsys: Any) -> None:
    assert main(["audit", "--model", "m", "--out", "o"]) == 2
    assert "give --erasure" in capsys.readouterr().err
