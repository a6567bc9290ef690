"""The NSFW classifier that is built in gives the scores of its original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from erasure.errors import ArtifactError
from erasure.eval.detectors import Reading, ask, get, nsfwjs
from tests.eval.detectors.conftest import GOLDEN, photograph


@pytest.mark.parametrize("name", GOLDEN)
def test_scores_are_those_of_the_original(name: str) -> None:
    (finding,) = ask(get("nsfwjs")(), [photograph(name)])
    assert finding.scores == pytest.approx(GOLDEN[name]["nsfwjs"], abs=5e-5)
    assert finding.flagged is False


def test_the_sum_of_two_classes_flags() -> None:
    detector = get("nsfwjs")()
    about = dict.fromkeys(nsfwjs.CLASSES, 0.0)
    finding = detector.judge(Reading(about | {"porn": 0.3, "hentai": 0.2, "neutral": 0.5}))
    assert finding.flagged is True
    assert finding.score == pytest.approx(0.5)
    assert detector.judge(Reading(about | {"sexy": 1.0})).flagged is False


def test_weights_that_are_damaged_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(nsfwjs.FILE)
    wrong = {
        "lacks": {name: t for name, t in tensors.items() if name != "head.weight.range"},
        "other": {name: t for name, t in tensors.items() if not name.startswith("head")},
        "infinite": tensors | {"head.bias.range": torch.tensor([float("nan"), 1.0], dtype=torch.float64)},
    }
    for name, held in wrong.items():
        save_file(held, tmp_path / name)
        monkeypatch.setattr(nsfwjs, "FILE", tmp_path / name)
        with pytest.raises(ArtifactError, match="fetch it again"):
            ask(get("nsfwjs")(), [photograph("control.webp")])
    monkeypatch.setattr(nsfwjs, "FILE", tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="cannot be read"):
        get("nsfwjs")().recipe()
