"""What an attack can try besides texts: other noise, embeddings, samplers, weights, and pictures to start from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval import attack, attacks
from erasure.eval.attacks import Attack
from erasure.eval.attacks.prompts import read_prompts
from erasure.eval.attacks.together import Drawn, Wanted
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.eval.schemas import AttackRow
from erasure.eval.suites import Target
from erasure.eval.table import read_rows
from tests.copies import copied
from tests.eval.conftest import colour_judge

SAMPLE = Sample(
    "cat-noto-0", "a cat image in noto style", 5, "target", ("cat",), "noto", ("cat",), num_inference_steps=2,
    height=32, width=32,
)  # fmt: skip


@pytest.fixture
def victim(world_pipe: Any) -> Victim:
    return Victim(world_pipe, copied(world_pipe), Target("cat", "object", ("cat",)), colour_judge)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, float)


def noise(pipe: Any) -> Attempt:
    shape = (1, pipe.unet.config.in_channels, *[32 // pipe.vae_scale_factor] * 2)
    return Attempt({"latents": torch.randn(shape, generator=torch.Generator().manual_seed(1))})


def embeddings(pipe: Any) -> Attempt:
    return Attempt({"prompt": None, "prompt_embeds": torch.zeros(1, 77, pipe.text_encoder.config.hidden_size)})


@contextlib.contextmanager
def euler(pipe: Any) -> Iterator[Any]:
    own = pipe.scheduler
    pipe.scheduler = EulerDiscreteScheduler.from_config(own.config)
    try:
        yield pipe
    finally:
        pipe.scheduler = own


@contextlib.contextmanager
def noisy_weights(pipe: Any) -> Iterator[Any]:
    weight = pipe.unet.conv_out.weight
    own = weight.detach().clone()
    with torch.no_grad():
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    try:
        yield pipe
    finally:
        with torch.no_grad():
            weight.copy_(own)


@contextlib.contextmanager
def from_a_picture(pipe: Any) -> Iterator[Any]:
    yield StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)


def picture(pipe: Any) -> Attempt:
    call = {
        "image": Image.linear_gradient("L").convert("RGB").resize((32, 32)),
        "strength": 1.0, "latents": None, "height": None, "width": None,
    }  # fmt: skip
    return Attempt(call, from_a_picture)


TRIED: dict[str, Callable[[Any], Attempt]] = {
    "other noise": noise,
    "embeddings": embeddings,
    "fewer steps": lambda pipe: Attempt({"num_inference_steps": 1}),
    "another sampler": lambda pipe: Attempt(change=euler),
    "other weights": lambda pipe: Attempt(change=noisy_weights),
    "a picture to start from": picture,
}


@pytest.mark.parametrize("name", TRIED)
def test_an_attempt_changes_one_call_and_nothing_else(name: str, victim: Victim) -> None:
    before = pixels(victim.draw(SAMPLE))
    attempt = TRIED[name](victim.pipe)
    tried = pixels(victim.draw(SAMPLE, attempt))
    assert tried.shape == before.shape
    assert not np.array_equal(tried, before)
    assert np.array_equal(pixels(victim.draw(SAMPLE)), before)
    assert (attempt.is_text, attempt.key, attempt.text) == (False, None, None)


def test_attempts_of_texts_can_be_told_apart_and_written_down() -> None:
    one, same = Attempt({"prompt": "a", "prompt_2": "b"}), Attempt({"prompt_2": "b", "prompt": "a"}, steps=3)
    assert one.is_text
    assert one.key == same.key
    assert (one.text, one.others) == ("a", {"prompt_2": "b"})
    assert one.arguments() == {"prompt": ["a"], "prompt_2": ["b"]}
    assert not Attempt({"prompt": "a", "guidance_scale": 1.0}).is_text


@dataclass(frozen=True, kw_only=True)
class OtherWeights(Attack):
    """Tries the same change twice, and then a text."""

    @property
    def tries(self) -> int:
        return 3

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        yield Attempt(change=noisy_weights)
        yield Attempt(change=noisy_weights)
        yield Attempt({"prompt": f"one {sample.prompt}"})


def test_a_success_that_is_no_text_is_counted_and_not_written_down(
    erased_pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attacks.ATTACKS, "_registered", dict(attacks.ATTACKS._registered))
    attacks.register("other_weights")(OtherWeights)
    drawn: list[Attempt] = []
    draw = Victim.draw_alike

    def seen(self: Victim, wanted: Sequence[Wanted]) -> list[Drawn]:
        (one,), (made,) = wanted, draw(self, wanted)
        assert isinstance(made.image, Image.Image)
        made.image.info["shows"] = one.stock or bool(one.attempt.change is noisy_weights and drawn)
        drawn.extend(each.attempt for each in wanted if each.attempt.change is noisy_weights)
        return [made]

    def judge(images: Any) -> list[Any]:
        return [SimpleNamespace(object=("dog", "cat")[image.info["shows"]], style="noto") for image in images]

    judge.version = "shown"  # type: ignore[attr-defined]
    monkeypatch.setattr(Victim, "draw_alike", seen)
    out = tmp_path / "out"
    results = attack(erased_pipe, "other_weights", "cat", samples=1, out=out, judge=judge, progress=False)
    (row,) = read_rows(out / "attacks.jsonl", AttackRow)
    # The first try did not show it, and the second, which is the same, was drawn too.
    assert (row["success"], row["texts"], row["images"]) == (True, 2, 3)
    assert (row["text"], row["others"]) == (None, {})
    assert results.get("ASR")["prompts"]["by_attack"] == 1
    with pytest.raises(EvaluationError, match="holds no prompts"):
        read_prompts(out)
