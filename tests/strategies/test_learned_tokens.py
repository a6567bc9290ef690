"""Learned tokens of several vectors are erased: what is drawn by the embedded model, before and after."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import erasure
from erasure import Concept, ErasureManager
from erasure.eval.detectors import CanvasJudge
from erasure.sae.detection import detect_concepts

PROMPT = "a photo of <my-pet>"


@pytest.fixture(scope="module")
def canvas() -> Any:
    pipe = erasure.load_pipeline("canvas-sd", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def objects(pipe: Any, prompt: str) -> list[str]:
    noise = [torch.Generator().manual_seed(seed) for seed in range(2)]
    images = pipe([prompt] * 2, num_inference_steps=10, guidance_scale=2.0, generator=noise).images
    return [answer.object for answer in CanvasJudge()(images)]


@pytest.mark.parametrize("strategy", ["uce", "diff_quickfix"])
@pytest.mark.parametrize("vectors", [("cat", "dog"), ("a", "cat", "a")], ids=" ".join)
def test_what_a_learned_token_draws_is_erased(
    canvas: Any, teach: Any, strategy: str, vectors: tuple[str, ...]
) -> None:
    pipe = copy.deepcopy(canvas)
    teach(pipe, *vectors)
    assert set(objects(pipe, PROMPT)) <= {"cat", "dog"}
    erasure.erase(pipe, Concept("<my-pet>", anchor="house"), strategy, progress=False)
    assert not {"cat", "dog"} & set(objects(pipe, PROMPT))
    assert objects(pipe, "a photo of a dog") == ["dog", "dog"]
    assert ErasureManager(pipe).verify() > 0


@pytest.mark.parametrize("strategy", ["uce", "diff_quickfix"])
def test_what_a_learned_token_draws_takes_the_place(canvas: Any, teach: Any, strategy: str) -> None:
    pipe = copy.deepcopy(canvas)
    teach(pipe, "a", "car", token="<my-car>")
    erasure.erase(pipe, Concept("cat", anchor="<my-car>", retain="<my-car>"), strategy, progress=False)
    assert objects(pipe, "a photo of a cat") == ["car", "car"]
    assert objects(pipe, "a photo of <my-car>") == ["car", "car"]


def test_itd_tells_a_learned_token_with_its_word(canvas: Any, teach: Any) -> None:
    pipe = copy.deepcopy(canvas)
    teach(pipe, "a", "cat")
    erasure.erase(pipe, Concept("<my-pet>", synonyms=("cat",)), "itd", progress=False)
    answers = detect_concepts(pipe, [PROMPT, "a picture of <my-pet> in ink style", "a photo of a dog"])
    assert [each["<my-pet>"].present for each in answers] == [True, True, False]
    assert "cat" not in objects(pipe, PROMPT)
