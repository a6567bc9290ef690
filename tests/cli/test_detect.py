"""`erasure detect`: what is printed and written, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure import assets
from erasure.cli.main import main


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The control picture, noise, and what shows nothing."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    Image.open(assets.ROOT / "detectors" / "control.webp").save(folder / "portrait.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for index in range(3):
        Image.fromarray(noise).rotate(90 * index).save(folder / "more" / f"noise{index}.png")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    return folder


def test_findings_are_printed_and_written(pictures: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "found.json"
    assert main(["detect", "nsfwjs", "--images", str(pictures), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "cannot say" in said
    assert "portrait.png" in said
    assert "Sensitivity was not measured" in said
    assert "of 4 pictures; 1 more cannot be judged, at worst 0.200" in said
    report = json.loads(out.read_text())
    assert report["findings"]["portrait.png"]["scores"]["neutral"] == pytest.approx(0.998, abs=1e-3)
    assert report["findings"]["black.png"]["flagged"] is None
    assert report["flagged"] == {
        "value": 0.0, "low": 0.0, "high": pytest.approx(0.49, abs=0.01), "n": 4, "missing": 1, "worst": 0.2,
        "reason": None,
    }  # fmt: skip
    assert report["recipe"]["known"] is True
    assert report["self_test"]["compared"] == 5
    assert report["controls"] is None


def test_json_alone_is_on_stdout_and_controls_are_measured(pictures: Path, capsys: Any) -> None:
    controls = pictures.parent / "controls"
    for name in ("positive", "negative"):
        (controls / name).mkdir(parents=True)
        (controls / name / "portrait.png").write_bytes((pictures / "portrait.png").read_bytes())
    options = ["--images", str(pictures / "portrait.png"), "--controls", str(controls), "--json", "--threshold", "0.9"]
    assert main(["detect", "nsfwjs", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["findings"]) == ["portrait.png"]
    assert report["recipe"]["threshold"] == 0.9
    assert report["controls"]["sensitivity"]["value"] == 0
    assert report["controls"]["specificity"]["value"] == 1
    assert list(report["controls"]["wrong"]) == ["positive/portrait.png"]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["nsfw_js"], ["unknown detector 'nsfw_js'", "Did you mean 'nsfwjs'"]),
        (["--images", "x"], ["name the detector first"]),
        (["nsfwjs"], ["--images"]),
        (["nsfwjs", "--images", "nothing"], ["is no folder"]),
        (["nsfwjs", "--images", ".", "--threshold", "2"], ["threshold"]),
        (["nudenet", "--images", ".", "--preset", "mase"], ["Did you mean 'mace'"]),
        (["identity", "--images", "picture.png"], ["no gallery"]),
        (["image_classifier", "--images", "picture.png"], ["no model"]),
        (["nsfwjs", "--images", ".", "--out", "no/folder.json"], ["--out"]),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str], names: list[str], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((64, 64), 90).save("picture.png")
    assert main(["detect", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert all(name in said.err for name in names), said.err
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_options_and_presets_are_in_the_help(capsys: Any) -> None:
    with pytest.raises(SystemExit) as end:
        main(["detect", "nudenet", "--help"])
    assert not end.value.code
    said = " ".join(capsys.readouterr().out.split())
    for word in ("--channels", "--flags", "AGPL-3.0", "mace, unlearndiffatk", "extra 'nudity'"):
        assert word in said, word
