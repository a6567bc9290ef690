"""A CLIP model tells a concept by its words, on pictures whose content is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from erasure import assets
from erasure.assets.scenes import Scene, render
from erasure.errors import ArtifactError, EvaluationError, OptionError
from erasure.eval.detectors import Reading, ask, get
from erasure.eval.metrics.clip_score import ClipModel
from tests.eval.detectors.conftest import noise

NAMES = ("cat", "bomb", "apple")


def pictures() -> list[Image.Image]:
    """Scenes of the embedded world, one for each name."""
    return [Image.fromarray(render(Scene((name,), "noto", "white")).image) for name in NAMES]


def test_what_is_drawn_fits_its_own_name_best() -> None:
    for index, name in enumerate(NAMES):
        others = tuple(each for each in NAMES if each != name)
        detector = get("clip_zero_shot")(flags=(name,), others=others, templates=("a {} on a white background",))
        findings = ask(detector, pictures())
        assert [finding.flagged for finding in findings] == [each == index for each in range(len(NAMES))]
        assert [set(finding.labels) for finding in findings] == [{each} for each in NAMES]


def test_probabilities_are_plain_arithmetic() -> None:
    detector = get("clip_zero_shot")(flags=("cat", "dog"), others=("tree",), templates=("a {}", "the {}"), scale=20.0)
    (finding,) = ask(detector, [noise(64, 64)])
    clip = ClipModel("canvas-clip")
    image = clip.images([noise(64, 64)])[0].astype(float)
    logits = []
    for name in ("cat", "dog", "tree"):
        each = [text / np.linalg.norm(text) for text in clip.texts([f"a {name}", f"the {name}"]).astype(float)]
        mean = np.mean(each, axis=0)
        logits.append(20 * float(image @ mean) / np.linalg.norm(image) / np.linalg.norm(mean))
    expected = np.exp(logits) / np.exp(logits).sum()
    assert list(finding.scores.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert finding.score == pytest.approx(expected[0] + expected[1], abs=1e-6)


def test_choices_that_are_none_are_refused() -> None:
    def refused(error: type[Exception], said: str, **options: Any) -> None:
        with pytest.raises(error, match=said):
            get("clip_zero_shot")(**options).recipe()

    refused(EvaluationError, "needs names to choose from", flags=("cat",))
    refused(EvaluationError, "needs names to choose from", others=("cat",))
    refused(EvaluationError, "'cat' stands twice", flags=("cat",), others=("dog", "cat"))
    refused(EvaluationError, "is empty", flags=("cat",), others=(" ",))
    refused(ArtifactError, "no-such-model", flags=("cat",), others=("dog",), model="no-such-model")
    refused(OptionError, "templates", flags=("cat",), others=("dog",), templates=("a photo",))


def test_other_words_are_another_reading() -> None:
    first = get("clip_zero_shot")(flags=("cat",), others=("dog",)).recipe()
    second = get("clip_zero_shot")(flags=("cat",), others=("tree",)).recipe()
    assert first["preprocessing"] != second["preprocessing"]
    assert first["weights"] == second["weights"]
    assert "open_clip_model.safetensors" in first["weights"]
    assert assets.path("canvas-clip").is_dir()
    judged = get("clip_zero_shot")(flags=("cat",), others=("dog",)).judge(Reading({"cat": 0.5, "dog": 0.5}))
    assert judged.flagged is True
