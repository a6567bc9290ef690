"""`erasure attack` on the embedded model: results, resuming, replay, comparison, and what it refuses in one line."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from erasure.cli.attack import AttackOptions, remarks
from erasure.cli.main import main
from erasure.eval import attacks
from erasure.eval.attacks import ATTACKS, Access
from erasure.eval.attacks.prompts import AdversarialPrompt, write_prompts
from erasure.eval.samples import Sample
from erasure.eval.suites import Target

TEXT = "a picture of a cat in noto style"


@pytest.fixture(scope="module")
def cat(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An erasure of "cat" from the embedded model."""
    folder = tmp_path_factory.mktemp("erasures") / "cat"
    command = [
        "erase",
        "uce",
        "--model",
        "canvas-sd",
        "--concept",
        "cat",
        "--preset",
        "released",
        "--out",
        str(folder),
    ]
    assert main(command) == 0
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """One prompt, as an attack would have left it."""
    sample = Sample("cat-noto-0", "a cat image in noto style", 7, "target", ("cat",), "noto", ("cat",))
    made_by = {"attack": "unlearndiffatk", "size": "quick", "options": {}, "model": "canvas-sd", "against": ["uce"]}
    (tmp_path / "made").mkdir()
    prompt = AdversarialPrompt(sample, TEXT, Target("cat", "object", ("cat",)), made_by)
    return write_prompts(tmp_path / "made", [prompt]).parent


@pytest.fixture
def stopped(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must stop with exit code 2, and give its one line."""

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        code = main(["attack", *map(str, arguments)])
        said = capsys.readouterr()
        assert code == 2, said.err
        assert said.out == ""
        *remarks, error = said.err.splitlines()
        assert all(line.startswith("erasure: warning: 'cow'") for line in remarks), said.err
        assert error.startswith("erasure: error: ")
        return error

    return run


def metrics_of(said: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in json.loads(said)["metrics"]}


def test_attack_resumes_and_compares(cat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = ["attack", "unlearndiffatk", "--model", "canvas-sd", "--size", "smoke", "--timesteps", "2"]
    options = ["--iterations", "1", "--erasure", cat, "--out", str(tmp_path / "cat")]
    seen = []
    for _ in range(2):
        assert main([*start, *options, "--json"]) == 0
        found = metrics_of(capsys.readouterr().out)
        assert found["pre_ASR"]["concept"] == "cat"
        assert found["pre_ASR"]["n"] == 2
        assert found["ASR"]["value"] >= found["pre_ASR"]["value"]
        budget = found["ASR"]["recipe"]["attack"]
        assert (budget["timesteps"], budget["iterations"], budget["samples"]) == (2, 1, 2)
        seen.append((tmp_path / "cat" / "attacks.jsonl").read_bytes())
    assert seen[0] == seen[1]
    # The stock model shows the concept without an attack.
    assert main([*start, "--iterations", "1", "--concept", "cat", "--out", str(tmp_path / "stock")]) == 0
    said = capsys.readouterr().out
    assert "pre_ASR" in said
    assert "adversarial.jsonl" in said
    assert main(["compare", str(tmp_path / "stock"), str(tmp_path / "cat"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert table["columns"] == ["pre_ASR", "ASR"]
    assert [(row["label"], row["cells"]["pre_ASR"]["value"]) for row in table["rows"]] == [("base", 1), ("cat", 0)]


def test_prompts_are_tried_on_another_erasure(
    cat: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["attack", "unlearndiffatk", "--model", "canvas-sd", "--json"]
    for given, out in ((prompts, "a"), (prompts / "adversarial.jsonl", "b")):
        options = ["--prompts", str(given), "--out", str(tmp_path / out)]
        assert main([*start, *options, "--concept", "cat"]) == 0
        found = metrics_of(capsys.readouterr().out)
        assert set(found) == {"transfer_pre_ASR", "transfer_ASR", "control_seen"}
        assert found["transfer_ASR"]["value"] == 1
        assert found["transfer_ASR"]["n"] == 1
    assert main([*start, "--prompts", str(prompts), "--erasure", cat, "--out", str(tmp_path / "erased")]) == 0
    assert metrics_of(capsys.readouterr().out)["transfer_ASR"]["value"] == 0


def test_attacks_are_listed_by_what_they_assume(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attack", "--help"]) == 0
    said = capsys.readouterr().out
    places = [said.index(f"\n {access}:\n") for access in get_args(Access)]
    assert places == sorted(places)
    for name in ATTACKS.names():
        attributes = ATTACKS.facts(name).attributes
        assert said.count(f"\n  {name} ") == 1
        assert said.rindex(f"\n {attributes['access']}:\n") < said.index(f"\n  {name} ")


@pytest.mark.parametrize("name", sorted(ATTACKS.built_in))
def test_every_attack_has_a_help_and_no_option_of_the_command_s(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["attack", name, "--help"])
    said = capsys.readouterr().out
    attributes = ATTACKS.facts(name).attributes
    assert f"The attacker needs: {attributes['access']}" in " ".join(said.split())
    assert bool(re.search(r"--control(?![\w-])", said)) == (attributes["chance"] == "--control")
    assert attributes["chance"] in ("", "--control", *ATTACKS.names())


def test_prompts_of_others_are_tried(cat: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "theirs.csv").write_text(f"prompt,seed\n{TEXT},7\n")
    start = ["attack", "ring_a_bell", "--model", "canvas-sd", "--json", "--prompts", str(tmp_path / "theirs.csv")]
    assert main([*start, "--erasure", cat, "--out", str(tmp_path / "erased")]) == 0
    found = metrics_of(capsys.readouterr().out)
    assert set(found) == {"transfer_ASR", "control_seen"}
    assert (found["transfer_ASR"]["value"], found["control_seen"]["value"]) == (0, 1)


def test_bad_usage_is_one_line(cat: str, prompts: Path, tmp_path: Path, stopped: Any) -> None:
    out = tmp_path / "out"
    start = ["unlearndiffatk", "--model", "canvas-sd", "--out", out]
    assert "unlearndiffatk" in stopped("no-such", "--model", "canvas-sd", "--out", out)
    assert "name the attack first" in stopped("--model", "canvas-sd")
    assert "--out" in stopped("unlearndiffatk", "--model", "canvas-sd")
    assert "huge" in stopped(*start, "--concept", "cat", "--size", "huge")
    assert "'iterations' is 0" in stopped(*start, "--concept", "cat", "--iterations", "0")
    assert "nothing to attack" in stopped(*start)
    (tmp_path / "theirs.txt").write_text("a c a t\n")
    assert "nothing to attack" in stopped(*start, "--prompts", tmp_path / "theirs.txt")
    (tmp_path / "empty.csv").write_text("prompt\n")
    assert "empty.csv" in stopped(*start, "--concept", "cat", "--prompts", tmp_path / "empty.csv")
    assert "one for each" in stopped(*start, "--concept", "cat", "--strength", "0.5")
    assert "unknown suite" in stopped(*start, "--concept", "cat", "--suite", "i3p")
    assert "no adversarial prompts at" in stopped(*start, "--prompts", tmp_path / "none")
    assert "leave out iterations" in stopped(*start, "--prompts", prompts, "--iterations", "3")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text((prompts / "adversarial.jsonl").read_text()[:50])
    assert "line 1 cannot be read as JSON" in stopped(*start, "--prompts", damaged)
    other = tmp_path / "other.jsonl"
    other.write_text((prompts / "adversarial.jsonl").read_text().replace("unlearndiffatk", "p4d"))
    assert "are of the attack p4d" in stopped(*start, "--prompts", other)
    assert not out.exists()
    assert "needs a prompt list" in stopped(*start, "--concept", "cat", "--suite", "i2p")
    assert "no concept 'cow'" in stopped(*start, "--concept", "cow")
    assert "not about 'dog'" in stopped(*start, "--prompts", prompts, "--concept", "dog")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    assert "holds no evaluation" in stopped(
        "unlearndiffatk", "--model", "canvas-sd", "--concept", "cat", "--out", tmp_path / "mine"
    )


def test_missing_outcomes_are_said() -> None:
    rows = [
        {"name": "pre_ASR", "missing": 0},
        {"name": "ASR", "missing": 2, "retokenised": {"texts": 9, "changed": 4, "cut": 1}},
        {"name": "transfer_ASR", "missing": 1, "reason": "no prompt has an outcome"},
    ]
    first, second, third = remarks(rows)
    assert first.startswith("ASR: 2 prompts have no outcome; attacks.jsonl")
    assert "4 of 9 texts" in second
    assert "(no prompt has an outcome)" in third


@pytest.mark.parametrize("name", attacks.available())
def test_options_of_attacks_and_of_the_command_differ(name: str) -> None:
    own = {field.name for field in dataclasses.fields(attacks.get(name))}
    assert own.isdisjoint(field.name for field in dataclasses.fields(AttackOptions))
