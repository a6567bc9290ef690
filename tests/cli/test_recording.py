"""What a measurement leaves in an erasure, and what erasures leave in a pipeline's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import erasure
from erasure import Erasure
from erasure.baked import TRACE_FILE, read_trace
from erasure.cli.main import main
from erasure.cli.models import ErasedModelOptions
from erasure.cli.recording import record
from erasure.errors import ArtifactError
from erasure.eval import Results
from erasure.eval.summary import summary

SHARE = {"value": 0.97, "low": 0.932, "high": 0.991, "n": 40, "recipe": {"judge": "CanvasJudge (ab)", "seed": 3}}


def results(suite: str = "canvas", size: str = "quick") -> Results:
    rows: list[dict[str, Any]] = [
        {"name": "UA", "concept": "cat", "variant": "before", **SHARE, "value": 0.05},
        {"name": "UA", "concept": "cat", "variant": "after", **SHARE},
        {"name": "kid[x]", "concept": "cat", "variant": "after", **SHARE, "low": None, "high": None},
        {"name": "fid[x]", "concept": "cat", "variant": "after", **SHARE, "value": None, "reason": "few images"},
    ]
    return Results.now(suite=suite, size=size, model={}, erasures=[], metrics=rows, cost={})


@pytest.fixture
def saved(tiny_pipe: Any, tmp_path: Path) -> Path:
    made = erasure.erase(tiny_pipe, "cat", "uce", vocabulary=4, attach=False, progress=False)
    return made.save(tmp_path / "cat-uce")


def recorded(folder: Path, found: Results, *, strength: tuple[float, ...] = (), **options: Any) -> str:
    sources = options.pop("sources", (str(folder),))
    made = {f"{index}": Erasure.load(source) for index, source in enumerate(sources)}
    return " ".join(record(ErasedModelOptions(model="m", erasure=sources, strength=strength), made, found, **options))


def test_figures_reach_config_card_and_info(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Erasure.load(saved)
    tensors = {path.name: path.read_bytes() for path in saved.glob("*.safetensors")}
    assert "Wrote the figures into the config and the card" in recorded(saved, results())
    after = Erasure.load(saved)
    assert after.config.evaluation == summary(results()) | {
        "canvas: date": after.config.evaluation["canvas: date"], "canvas: size": "quick",
    }  # fmt: skip
    assert after.config.evaluation["canvas: UA"] == [0.97, 0.932, 0.991]
    assert after.config.evaluation["canvas: UA before"] == [0.05, 0.932, 0.991]
    assert after.config.evaluation["canvas: kid[x]"] == 0.97
    assert after.config.evaluation["canvas: judge"] == "CanvasJudge (ab)"
    assert "canvas: fid[x]" not in after.config.evaluation
    # It is the same erasure, to every file of tensors.
    assert after.fingerprint == before.fingerprint
    assert {path.name: path.read_bytes() for path in saved.glob("*.safetensors")} == tensors
    assert "## Measured" in (saved / "README.md").read_text()
    assert r"| canvas: UA | 0.970 \[0.932, 0.991\] |" in (saved / "README.md").read_text()
    assert main(["info", str(saved)]) == 0
    shown = capsys.readouterr().out
    assert "0.970 [0.932, 0.991]" in shown
    assert "CanvasJudge (ab)" in shown


def test_figures_of_other_suites_stay_and_smaller_sizes_replace_nothing(saved: Path) -> None:
    recorded(saved, results(size="full"))
    recorded(saved, results("canvas-unseen"))
    found = Erasure.load(saved).config.evaluation
    assert found["canvas: size"] == "full"
    assert found["canvas-unseen: UA"] == found["canvas: UA"]
    assert "in a larger size" in recorded(saved, results())
    assert recorded(saved, results(size="smoke")) == ""
    assert Erasure.load(saved).config.evaluation == found


def test_figures_without_a_control_that_holds_replace_none(saved: Path) -> None:
    recorded(saved, results())
    found = Erasure.load(saved).config.evaluation
    failed = results()
    control = {"name": "seen_before", "concept": "cat", "variant": "before", **SHARE, "holds": False}
    failed.metrics = [failed.metrics[2], control]
    assert "a control fails" in recorded(saved, failed)
    assert Erasure.load(saved).config.evaluation == found
    missing = results()
    missing.metrics[1] |= {"missing": 2, "worst": {"value": 0.9, "low": 0.8, "high": 0.95}}
    missing.metrics.append(control | {"holds": True})
    recorded(saved, missing)
    found = Erasure.load(saved).config.evaluation
    assert found["canvas: UA, at worst"] == 0.9
    assert "canvas: seen_before before" not in found


def test_what_is_not_of_this_erasure_alone_is_not_recorded(saved: Path, tmp_path: Path) -> None:
    second = Erasure.load(saved).save(tmp_path / "second")
    before = (saved / "erasure_config.json").read_bytes()
    assert "several erasures" in recorded(saved, results(), sources=(str(saved), str(second)))
    assert "at strength 0.5" in recorded(saved, results(), strength=(0.5,))
    assert "other concepts" in recorded(saved, results(), whole=False)
    made = {"hub": Erasure.load(saved)}
    said = record(ErasedModelOptions(model="m", erasure=("someone/no-cats",)), made, results())
    assert "repository of the Hub" in said[0]
    assert recorded(saved, results(), strength=(1.0,)).startswith("Wrote")
    (saved / "erasure_config.json").write_bytes(before)
    made["hub"].config.strategy_config["scale"] = 9
    assert "another one by now" in record(ErasedModelOptions(model="m", erasure=(str(saved),)), made, results())[0]
    assert (saved / "erasure_config.json").read_bytes() == before


def test_an_edited_card_stays_and_a_read_only_place_is_no_error(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (saved / "README.md").read_text() + "\nMine.\n"
    (saved / "README.md").write_text(card)
    (saved / "notes.txt").write_text("mine")
    assert "its card was edited" in recorded(saved, results())
    assert (saved / "README.md").read_text() == card
    assert (saved / "notes.txt").read_text() == "mine"
    assert Erasure.load(saved).config.evaluation

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    assert "Not written into the erasure: cannot write" in recorded(saved, results())
    monkeypatch.undo()
    assert Erasure.load(saved).config.evaluation


def test_a_baked_folder_says_what_was_erased(
    tiny_pipe: Any, tmp_path: Path, draw: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from erasure.pipelines import StableDiffusionErasurePipeline

    pipe = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    pipe.erase("cat", "uce", vocabulary=4, progress=False)
    made = pipe.erasure_manager.erasures["cat-uce"]
    made.config.evaluation = summary(results())
    pipe.set_erasures("cat-uce", 0.75)
    erased = draw(pipe)
    folder = tmp_path / "baked"
    pipe.save_erased_pipeline(folder)
    ((entry, config),) = read_trace(folder)
    assert (entry["name"], entry["strength"], entry["fingerprint"]) == ("cat-uce", 0.75, made.fingerprint)
    assert (config.strategy, config.concepts, config.strategy_config) == (
        "uce", made.config.concepts, made.config.strategy_config,
    )  # fmt: skip
    assert "tensors" not in config.base
    for kind in (StableDiffusionPipeline, DiffusionPipeline):
        stock = kind.from_pretrained(folder)
        stock.set_progress_bar_config(disable=True)
        assert torch.equal(draw(stock), erased)
    card = (folder / "README.md").read_text()
    assert "- cat (object): strategy `uce` of erasure, strength 0.75" in card
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "weights are erased" in shown
    assert "0.75" in shown
    assert "0.970 [0.932, 0.991]" in shown
    assert main(["info", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baked"][0]["config"]["strategy"] == "uce"
    # What it is erased of besides comes behind it; a card of one's own stays.
    again = StableDiffusionErasurePipeline.from_pretrained(folder)
    again.erase("dog", "uce", vocabulary=4, progress=False)
    (tmp_path / "twice").mkdir()
    (tmp_path / "twice" / "README.md").write_text("mine")
    again.save_pretrained(tmp_path / "twice")
    assert [entry["name"] for entry, _ in read_trace(tmp_path / "twice")] == ["cat-uce", "dog-uce"]
    assert (tmp_path / "twice" / "README.md").read_text() == "mine"


def test_every_way_to_save_leaves_a_trace_and_the_stock_model_none(
    tiny_pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from erasure.pipelines import StableDiffusionErasurePipeline

    erasure.erase(tiny_pipe, "cat", "uce", vocabulary=4, progress=False)
    manager = erasure.ErasureManager(tiny_pipe)
    tiny_pipe.save_pretrained(tmp_path / "by the stock class")
    assert read_trace(tmp_path / "by the stock class")[0][0]["name"] == "cat-uce"
    manager.fuse()
    tiny_pipe.save_pretrained(save_directory=str(tmp_path / "fused"))
    assert read_trace(tmp_path / "fused")[0][0]["strength"] == 1
    manager.unfuse()
    manager.disable()
    tiny_pipe.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused" / TRACE_FILE).exists()
    assert main(["info", str(tmp_path / "fused")]) == 2
    assert "no word of what was erased" in capsys.readouterr().err
    manager.enable()
    pipe = StableDiffusionErasurePipeline.from_pipe(tiny_pipe)
    pipe.save_erased_pipeline(tmp_path / "beside", fuse=False)
    assert not (tmp_path / "beside" / "base" / TRACE_FILE).exists()
    assert main(["info", str(tmp_path / "beside"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["beside"][0]["name"] == "cat-uce"
    assert main(["info", str(tmp_path / "beside")]) == 0
    assert "can be taken off" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format_version": 2}, "reads up to 1"),
        ({"erasures": []}, "erasures"),
        ({"more": 1}, "unknown keys"),
        ({"erasures": [{"name": "a", "strength": 1, "fingerprint": "0" * 16, "config": {}}]}, "erasure 1"),
    ],
)
def test_damaged_traces_are_named(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole = {"format_version": 1, "versions": {}, "erasures": []}
    (tmp_path / TRACE_FILE).write_text(json.dumps(whole | change))
    with pytest.raises(ArtifactError, match=said):
        read_trace(tmp_path)
