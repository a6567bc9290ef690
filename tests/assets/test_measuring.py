"""Steps of the build that put figures into the files of docs: of a tiny sweep, of stored results, of an audit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from erasure.assets.build import audited, doors, each, measuring, suites, sweep, words
from erasure.assets.build.measured import Cell, Measured, figure
from erasure.assets.build.tables import TABLES
from erasure.errors import EvaluationError
from erasure.eval.results import Results
from erasure.eval.suites import canvas
from erasure.eval.sweeps.plan import SweepPlan
from erasure.world import World

MEASURED = Path(__file__).resolve().parents[2] / "docs" / "measured"
TINY: dict[str, Any] = {
    "models": ["canvas-sd"], "concepts": ["dog", "ink"], "methods": ["uce"], "suites": ["canvas"], "size": "smoke",
    "groups": {"objects": ["dog"], "styles": ["ink"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a sweep that was really made, of two concepts and few images."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "SMOKE_SAMPLES", 4)
        patch.setattr(World, "num_inference_steps", 2)
        sweep.measure(SweepPlan.of(TINY), folder, (1, 1))
    return folder


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch) -> SweepPlan:
    """That sweep, in the place of those of docs; whatever would be measured is refused."""
    tiny = SweepPlan.of(TINY)

    def refuse(*_: object) -> None:
        raise AssertionError("measured anew")

    monkeypatch.setattr(sweep, "plan", lambda name, size=None: tiny)
    monkeypatch.setattr(sweep, "measure", refuse)
    return tiny


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """Files of docs without rows."""
    folder = tmp_path / "measured"
    folder.mkdir()
    for file in MEASURED.iterdir():
        Measured.read(file).model_copy(update={"rows": [], "models": []}).write(folder / file.name)
    return folder


@pytest.fixture
def folders(swept: Path, tmp_path: Path) -> Path:
    """The same evaluations as somebody else might have laid them out."""
    for concept in ("dog", "ink"):
        cell = swept / "cells" / "canvas-sd" / "uce" / f"{concept}-0"
        shutil.copytree(cell / "evaluation-canvas", tmp_path / "all" / "canvas-sd" / f"{concept}-uce")
    return tmp_path / "all"


def value(cell: Cell) -> object:
    return cell["value"] if isinstance(cell, dict) else cell


def bounds(cell: Cell) -> tuple[float, float]:
    assert isinstance(cell, dict)
    return cell["low"], cell["high"]


def test_a_style_is_kept_where_the_judge_sees_what_was_asked_for(swept: Path, plan: SweepPlan, tmp_path: Path) -> None:
    out = tmp_path / "swept"
    shutil.copytree(swept, out)
    folder = out / "cells/canvas-sd/uce/dog-0/evaluation-canvas"
    file = folder / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [row for row in rows if (row["variant"], row["role"]) == ("after", "target")]
    assert len(asked) > 1
    for index, row in enumerate(asked):
        row["judged"]["style"] = row["style"] if index else "of another kind"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = {"value": round((len(asked) - 1) / len(asked), 6), "n": len(asked)}
    dog, ink = each.rows(plan, out)
    assert dog["own_style"] | kept == dog["own_style"]  # type: ignore[operator]
    assert "own_style" not in ink
    (of_two, _) = each.means([dog, dog | {"concept": "cat", "own_style": {"value": 1.0, "n": 2 * len(asked)}}, ink],
                             {"objects": ["dog", "cat"], "styles": ["ink"]})  # fmt: skip
    assert value(of_two["own_style"]) == pytest.approx(1 - 1 / (3 * len(asked)), abs=1e-6)
    assert of_two["own_style"]["n"] == 3 * len(asked)  # type: ignore[index,call-overload]
    for row in asked:
        row["judged"] = None
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert each.own_style(folder)["reason"] == "no image of an erased object was judged"


def test_families_have_the_same_means_from_folders_and_sweeps(
    swept: Path, folders: Path, plan: SweepPlan, into: Path
) -> None:
    assert [row["group"] for row in sweep.rows(plan, swept)] == ["objects", "styles"]
    measuring.across(folders=folders, into=into)
    (of_folders,) = Measured.read(into / "families.json").rows
    assert (of_folders["method"], of_folders["model"], of_folders["size"]) == ("uce", "canvas-sd", "smoke")
    ungrouped = SweepPlan.of({key: value for key, value in TINY.items() if key != "groups"})
    (of_sweep,) = sweep.rows(ungrouped, swept)
    assert of_folders == {name: of_sweep[name] for name in of_folders}
    assert list(of_folders) == ["method", "model", "size", *sweep.RATES, "seconds", "kB"]


def test_means_of_methods_are_those_of_the_sweep(swept: Path, plan: SweepPlan, into: Path) -> None:
    measuring.methods(out=swept, only_table=True, into=into)
    concepts = Measured.read(into / "methods-concepts.json").rows
    assert [(row["method"], row["concept"]) for row in concepts] == [("uce", "dog"), ("uce", "ink")]
    seen = Results.load(swept / "cells/canvas-sd/uce/dog-0/evaluation-canvas").get("UA")
    assert concepts[0]["UA"] == figure(seen)
    found = Measured.read(into / "methods.json").rows
    assert [(row["method"], row["group"], row["concepts"]) for row in found] == [
        ("uce", "objects", 1), ("uce", "styles", 1),
    ]  # fmt: skip
    both = SweepPlan.of({**TINY, "groups": {"both": ["dog", "ink"]}})
    (of_sweep,) = sweep.rows(both, swept)
    (made,) = each.means(concepts, both.groups)
    assert set(made) == {"method", "group", "concepts", *sweep.METRICS, "own_style", "seconds", "kB"}
    for name in (*sweep.RATES, "drift", "seconds", "kB"):
        assert value(made[name]) == pytest.approx(value(of_sweep[name]), abs=1e-5), name
    for name in (*sweep.RATES, "drift"):
        assert bounds(made[name]) == pytest.approx(bounds(of_sweep[name]), abs=1e-5), name


def test_concepts_that_were_measured_elsewhere_count_in_the_means(
    swept: Path, plan: SweepPlan, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = into / "methods-concepts.json"
    measuring.methods(out=swept, only_table=True, into=into)
    dog, ink = Measured.read(file).rows
    unlike = {**dog, "UA": {"value": 0.5, "low": 0.2, "high": 0.8, "n": 8}, sweep.UA_UNSEEN: {"value": 0.25, "n": 4}}
    Measured.read(file).model_copy(update={"rows": [{**unlike, "concept": "cat"}]}).write(file)
    groups = {"objects": ["dog", "cat"], "styles": ["ink"]}
    both = SweepPlan.of({**TINY, "concepts": ["dog", "cat", "ink"], "groups": groups})
    (made, _) = each.means([dog, {**unlike, "concept": "cat"}, ink], both.groups)
    assert made["concepts"] == 2
    assert value(made["UA"]) == (value(dog["UA"]) + 0.5) / 2  # type: ignore[operator]
    assert made["UA"]["n"] == dog["UA"]["n"] + 8  # type: ignore[index,call-overload]
    # One concept has no figure of unseen phrasings, so there is no mean of two.
    assert value(made[sweep.UA_UNSEEN]) is None
    assert "a cell does not have it" in made[sweep.UA_UNSEEN]["reason"]  # type: ignore[index,call-overload]
    capsys.readouterr()
    found = each.means([dog, {**unlike, "concept": "cat"}, {**dog, "method": "hirm"}], both.groups)
    assert [(row["method"], row["group"], row["concepts"]) for row in found] == [
        ("uce", "objects", 1), ("hirm", "objects", 1),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "no mean of objects has cat: not measured with every method" in printed
    assert "no mean of styles has ink" in printed
    measuring.methods(out=swept, only_table=True, into=into)
    assert [row["concept"] for row in Measured.read(file).rows] == ["cat", "dog", "ink"]


def test_a_concept_that_is_not_measured_to_its_end_has_no_row(swept: Path, plan: SweepPlan, tmp_path: Path) -> None:
    out = tmp_path / "swept"
    shutil.copytree(swept, out)
    (out / "cells/canvas-sd/uce/dog-0/cell.json").unlink()
    assert [row["concept"] for row in each.rows(plan, out)] == ["ink"]


def test_a_row_of_folders_takes_the_place_of_its_own_alone(folders: Path, plan: SweepPlan, into: Path) -> None:
    file = into / "families.json"
    file.write_text((MEASURED / file.name).read_text().replace("canvas-sdxl", "canvas-sd"))
    before = Measured.read(file).rows
    measuring.across(folders=folders, methods=("uce",), models=("canvas-sd",), into=into)
    after = Measured.read(file).rows
    assert [(row["method"], row["model"]) for row in after] == [(row["method"], row["model"]) for row in before]
    changed = [row for row, old in zip(after, before, strict=True) if row != old]
    assert [(row["method"], row["model"], row["size"]) for row in changed] == [("uce", "canvas-sd", "smoke")]


def test_folders_that_lack_a_concept_have_no_row(
    folders: Path, plan: SweepPlan, into: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders / "canvas-sd" / "dog-uce", folders / "canvas-sd" / "dog-hirm")
    made = sweep.rows_of_folders(folders, plan.concepts)
    assert [row["method"] for row in made] == ["uce"]
    assert "hirm on canvas-sd has no row: no results of ink" in capsys.readouterr().out
    with pytest.raises(EvaluationError, match="has results of all of dog, ink for no method"):
        sweep.rows_of_folders(folders, plan.concepts, methods=("hirm",), models=("canvas-sd",))
    with pytest.raises(SystemExit, match="choose among the evaluations of --folders"):
        measuring.across(methods=("uce",), into=into)


def test_folders_of_something_else_are_refused(folders: Path, plan: SweepPlan) -> None:
    place = folders / "canvas-sd"
    shutil.copytree(place / "ink-uce", place / "ink-hirm")
    shutil.copytree(place / "dog-uce", place / "dog-hirm")
    with pytest.raises(EvaluationError, match=r"dog-hirm holds results of suite canvas on canvas-sd with \[\('uce'"):
        sweep.rows_of_folders(folders, plan.concepts, methods=("hirm",))
    data = json.loads((place / "ink-uce" / "results.json").read_text())
    for row in data["metrics"]:
        row["recipe"]["num_inference_steps"] = 50
    (place / "ink-uce" / "results.json").write_text(json.dumps(data))
    with pytest.raises(EvaluationError, match="uce on canvas-sd was measured differently for dog and for ink"):
        sweep.rows_of_folders(folders, plan.concepts, methods=("uce",))


def test_what_no_page_has_a_table_of_is_not_written(into: Path) -> None:
    with pytest.raises(SystemExit, match="no page has a table"):
        measuring.gates(told=False, into=into)


def results_of(suite: str, folder: Path, metrics: list[dict[str, Any]], size: str = "full") -> None:
    rows = [{"concept": None, "recipe": {"suite": suite}, "low": None, "high": None, "n": 4} | row for row in metrics]
    Results(suite=suite, size=size, model={"name": "canvas-sd"}, erasures=[], metrics=rows, cost={}).save(folder)


@pytest.mark.parametrize("name", suites.OF_SUITE)
def test_suites_of_ways_to_draw_are_written(
    name: str, tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = [str(row["variant"]) for row in Measured.read(MEASURED / f"{name}.json").rows]
    metrics = [
        {"name": metric, "variant": variant, "value": 0.1 * number}
        for number, variant in enumerate(variants) for metric in suites.OF_SUITE[name]
    ]  # fmt: skip
    folder = tmp_path / "results" / name
    monkeypatch.setattr(suites, "measure", lambda *_: results_of(name, folder, metrics))
    measuring.suite(name, out=folder, into=into)  # type: ignore[arg-type]
    found = Measured.read(into / f"{name}.json")
    assert [row["variant"] for row in found.rows] == variants
    assert value(found.rows[2][suites.OF_SUITE[name][0]]) == pytest.approx(0.2)
    TABLES[name].check(found)


def test_suites_are_run_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(suites, "evaluate", lambda pipe, name, concepts, **told: asked.append((name, told["size"])))
    suites.measure("removal", tmp_path, "smoke")
    assert asked == [("removal", "smoke")]


def audit_of(folder: Path, method: str, shares: dict[str, float | None], size: str = "quick") -> Path:
    """Write what an audit of the dog leaves, of parts by folder; `None` for one that was refused."""
    erased = [{"name": "e", "strategy": method, "concepts": ["dog"]}]
    parts = []
    for name, share in shares.items():
        kind, _, rest = name.partition("-")
        about = {"kind": kind, "name": rest.removesuffix("-chance"), "concept": "dog", "folder": name, "detail": ""}
        parts.append(about | {"state": "refused" if share is None else "done"})
        if share is None:
            continue
        figures = {"value": share, "low": share / 2, "high": (1 + share) / 2, "n": 10, "concept": "dog"}
        rate = {"name": "chance_ASR" if "chance" in name or "random" in name else "ASR", "variant": "after"} | figures
        metrics = [rate]
        if kind == "stress":
            metrics = [
                {"name": "concept_shown", "variant": "relearned_5"} | figures,
                {"name": "recovered", "variant": "relearned_5", "verdict": "returns"} | figures,
                *(
                    {"name": "S50", "variant": variant, "value": 100 * share, "concept": "dog"}
                    for variant in audited.CURVES
                ),
                {"name": "savings", "variant": "relearned", "verdict": "not told from new"} | figures,
            ]
        results_of(f"stress {about['name']}" if kind == "stress" else str(about["name"]), folder / name, metrics, size)
    audit = {"schema_version": 1, "model": {"name": "canvas-sd"}, "erasures": erased, "parts": parts}
    (folder / "audit.json").write_text(json.dumps(audit))
    return folder


def test_audits_have_a_row_for_each_part_with_its_chance_level(tmp_path: Path, into: Path) -> None:
    parts = {"attack-p4d": 0.7, "attack-p4d-chance": 0.1, "attack-synonym": 0.0, "attack-random_prefix": 0.2,
             "attack-unlearndiffatk": None, "stress-relearn": 0.3}  # fmt: skip
    first = audit_of(tmp_path / "uce", "uce", parts)
    second = audit_of(tmp_path / "esd", "esd", {"attack-synonym": 0.4})
    measuring.audited((first, second), into=into)
    found = Measured.read(into / "audit.json")
    assert found.size == "quick"
    shares = {
        (row["method"], row["part"]): (row["grade"], value(row["shown"]), value(row.get("chance", "no chance")))
        for row in found.rows if row["method"] == "uce" or row["part"] == "synonym"
    }  # fmt: skip
    assert {
        ("uce", "synonym"): ("prompts", 0.0, "no chance"), ("uce", "p4d"): ("gradients", 0.7, 0.1),
        ("uce", "unlearndiffatk"): ("gradients", None, 0.2), ("uce", "relearn"): ("weights", 0.3, "no chance"),
        ("esd", "synonym"): ("prompts", 0.4, "no chance"),
    }.items() <= shares.items()  # fmt: skip
    words = {row["method"]: row for row in Measured.read(into / "audit-words.json").rows}
    assert (words["uce"]["gradients"], words["uce"]["weights"]) == ("broken", "broken")
    assert (words["esd"]["prompts"], words["esd"]["weights"]) == ("broken", audited.NOT_MEASURED)
    (curve,) = (row for row in Measured.read(into / "relearning.json").rows if value(row["S50"]) == 30)
    assert (curve["method"], value(curve["savings"]), curve["verdict"]) == ("uce", 0.3, "not told from new")
    lines = TABLES["audit"].markdown(
        found.model_copy(update={"rows": [row for row in found.rows if row["part"] == "p4d"]})
    )
    assert "`p4d` | 0.70 (0.35-0.85) / 0.10 |" in lines


def test_a_part_that_failed_keeps_an_attacker_from_being_held_off(tmp_path: Path) -> None:
    shares: dict[str, float | None] = {
        "attack-synonym": 0.0,
        "attack-ring_a_bell": None,
        "attack-ring_a_bell-chance": None,
    }
    folder = audit_of(tmp_path / "uce", "uce", shares)
    results = Results.load(folder / "attack-synonym")
    results.get("ASR", "after")["high"] = 0.01
    results.save(folder / "attack-synonym")
    assert audited.Audited.read(folder, "dog").words()["prompts"] == "held"
    file = folder / "audit.json"
    file.write_text(file.read_text().replace("refused", "failed"))
    assert audited.Audited.read(folder, "dog").words()["prompts"] == "undecided"


def test_what_is_no_audit_of_the_concept_alone_is_refused(tmp_path: Path) -> None:
    first = audit_of(tmp_path / "uce", "uce", {"attack-p4d": 0.7})
    with pytest.raises(EvaluationError, match="has attack-p4d, and not attack-p4d-chance, its chance"):
        audited.Audited.read(first, "dog").rows()
    with pytest.raises(EvaluationError, match="is an audit of uce of dog: expected one erasure of cat alone"):
        audited.read([first], "cat")
    with pytest.raises(EvaluationError, match="holds one attack, and no audit"):
        audited.read([first / "attack-p4d"], "dog")
    other = audit_of(tmp_path / "full", "uce", {"attack-synonym": 0.0}, "full")
    with pytest.raises(EvaluationError, match=r"several sizes \(full, quick\)"):
        audited.read([first, other], "dog")


def test_a_model_that_is_measured_has_its_rows() -> None:
    (row,) = words.rows({"word_share": 0.18832, "word_auc_4": 0.98881, "object": 1.0})
    known = next(each for each in Measured.read(MEASURED / "words.json").rows if each["model"] == words.SHIPPED)
    assert row == {"model": words.SHIPPED, "steps": known["steps"], "word_share": 0.1883, "word_auc_4": 0.9888}
    part = {f"tokens_1_{case}": 0.12345 for case in doors.CASES}
    assert doors.rows("canvas-sdxl", {**part, "object": 1.0}) == [
        {"model": "canvas-sdxl", "part": "tokens_1", **dict.fromkeys(doors.CASES, 0.1235)}
    ]
