"""`erasure eval` and `erasure demo` on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import erasure
from erasure.cli import demo
from erasure.cli.main import main
from erasure.eval.suites import canvas
from erasure.picture_record import read_record
from erasure.world import World


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Neither read nor fill the user's cache of baseline images."""
    monkeypatch.setenv("ERASURE_CACHE", str(tmp_path_factory.getbasetemp() / "baseline"))


JUDGE = """
from types import SimpleNamespace

def judge(images):
    return [SimpleNamespace(object="cat", style="ink") for _ in images]
"""


def test_eval_measures_what_the_erasure_erases(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(canvas, "SMOKE_SAMPLES", 4)
    folder = tmp_path / "ink"
    assert main(["erase", "uce", "--model", "canvas-sd", "--concept", "ink", "--out", str(folder)]) == 0
    config = json.loads((folder / "erasure_config.json").read_text())
    assert config["concepts"][0]["kind"] == "style"
    capsys.readouterr()
    arguments = ["eval", "canvas", "--model", "canvas-sd", "--erasure", str(folder), "--size", "smoke", "--json"]
    seen = []
    for _ in range(2):  # the second run finds everything there
        assert main([*arguments, "--out", str(tmp_path / "eval")]) == 0
        results = json.loads(capsys.readouterr().out)
        rows = {(row["name"], row["variant"]): row for row in results["metrics"]}
        assert rows["UA", "after"]["concept"] == "ink"
        assert rows["UA", "after"]["value"] > rows["UA", "before"]["value"]
        seen.append((tmp_path / "eval" / "samples.jsonl").read_bytes())
    assert seen[0] == seen[1]
    assert (tmp_path / "eval" / "report.html").is_file()
    # Another judge sees the same images, and none is drawn again. A smoke run is no measurement to be written down.
    (tmp_path / "a_judge_of_mine.py").write_text(JUDGE)
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--out", "again", "--judge", "a_judge_of_mine:judge", "--clip", "none"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["cost"]["images_generated"] == 0
    assert again["metrics"][0]["recipe"]["judge"].startswith("judge (source ")
    assert {row["name"] for row in again["metrics"]} >= {"fid", "cmmd", "kid"}
    assert not json.loads((folder / "erasure_config.json").read_text())["evaluation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--detector", "nfswjs"], "unknown detector 'nfswjs'"),
        (["--detector", "nsfwjs:threshold=2"], "option 'threshold' is"),
        (["--detector", "nsfwjs", "--detector", "nsfwjs"], "two detectors are called 'nsfwjs'"),
        (["--side", "4"], "side is 4, allowed: a whole number from 8"),
    ],
)
def test_eval_refuses_what_a_suite_cannot_take_before_a_model_is_opened(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "i2p", "--model", "no-such-model", "--concept", "nudity", "--prompts", "list.csv"]
    assert main([*command, *options, "--out", str(tmp_path / "eval")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "eval").exists()


def test_eval_without_erasure_needs_a_concept(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["eval", "canvas", "--model", "canvas-sd", "--out", str(tmp_path / "eval")]) == 2
    assert "--concept" in capsys.readouterr().err


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(canvas, "SMOKE_SAMPLES", 2)
    monkeypatch.setattr(World, "num_inference_steps", 2)
    erase, quick = erasure.erase, {"hirm": {"steps": 5}, "uce": {"vocabulary": 8}}
    monkeypatch.setattr(
        erasure, "erase", lambda *given, strategy, **more: erase(*given, strategy=strategy, **quick[strategy], **more)
    )
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--size", "smoke"]) == 0
    said = capsys.readouterr().out
    for part in demo.PARTS:
        name = f"{part.concept.target}-{part.strategy}"
        assert (out / name / "erasure_config.json").is_file()
        assert (out / f"{name}-eval" / "results.json").is_file()
        assert f"{name}-eval/report.html" in (out / "report.html").read_text()
        assert name in said
    assert str(out / "report.html") in said
    assert str(out / "demo.png") in said
    assert "UA" in said
    record = read_record(out / "demo.png")
    assert (record["command"], record["model"], len(record["erasures"])) == ("demo", demo.MODEL, len(demo.PARTS))
    picture = Image.open(out / "demo.png")
    assert picture.width > 800
    assert picture.getcolors(100) is None
