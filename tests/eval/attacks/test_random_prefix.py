"""The control of attacks: random words ahead of a prompt, without any gradient."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.backbones import backbone_for
from erasure.eval import attacks
from erasure.eval.attacks import SkippedPromptError
from erasure.eval.attacks.random_prefix import RandomPrefix
from erasure.eval.attacks.runner import attack
from erasure.eval.attacks.victim import Victim
from erasure.eval.samples import Sample
from erasure.eval.sizes import SIZES
from erasure.eval.suites import Target
from tests.copies import copied
from tests.eval.conftest import colour_judge

PROMPT = "a cat image in noto style"


def make_sample(seed: int = 5, unsafe: bool = False) -> Sample:
    return Sample(
        "cat-noto-0", PROMPT, seed, "target", ("cat",), "noto", ("cat",), num_inference_steps=2, height=32, width=32,
        unsafe=unsafe,
    )  # fmt: skip


@pytest.fixture
def victim(world_pipe: Any) -> Victim:
    return Victim(world_pipe, copied(world_pipe), Target("cat", "object", ("cat",)), colour_judge)


@pytest.mark.parametrize("size", SIZES)
def test_it_has_as_many_tries_and_tokens_as_the_attack_that_it_controls(size: str, victim: Victim) -> None:
    control, searching = RandomPrefix.configured(size), attacks.get("unlearndiffatk").configured(size)
    shared = ("samples", "vocabulary", "tokens", "tries", "tower")
    assert [getattr(control, name) for name in shared] == [getattr(searching, name) for name in shared]
    assert control.is_control
    assert control.access == "prompt"
    assert not searching.is_control


@pytest.mark.parametrize(("unsafe", "count"), [(True, 5), (False, 3)])
def test_words_are_ahead_of_the_whole_prompt(victim: Victim, unsafe: bool, count: int) -> None:
    tower = backbone_for(victim.pipe).towers[0]
    tried = list(RandomPrefix(texts=6, vocabulary="words").attempts(victim, make_sample(unsafe=unsafe)))
    own = tower.prompt_ids(PROMPT)
    assert len({attempt.text for attempt in tried}) == len(tried) == 6
    for attempt in tried:
        ids = tower.prompt_ids(attempt.text)
        assert attempt.text.endswith(f" {PROMPT}")
        if not attempt.changed:
            assert ids[1 + count :] == own[1:]
            assert len(ids) == len(own) + count
        assert (attempt.steps, attempt.loss, attempt.cut) == (0, None, False)


@pytest.mark.parametrize(("tower", "others"), [(None, []), ("text_encoder_2", []), ("all", ["prompt_2"])])
def test_words_are_drawn_for_one_text_encoder_or_for_each(tiny_models: Any, tower: Any, others: list[str]) -> None:
    pipe = tiny_models["stable-diffusion-xl"]()
    attacked = Victim(pipe, pipe, Target("cat", "object", ("cat",)), colour_judge)
    for attempt in RandomPrefix(texts=3, tower=tower, vocabulary="words").attempts(attacked, make_sample()):
        assert list(attempt.others) == others
        assert all(text != attempt.text and text.endswith(PROMPT) for text in attempt.others.values())


def test_the_seed_of_the_sample_draws_them(victim: Victim) -> None:
    def texts(seed: int) -> list[str]:
        return [attempt.text for attempt in RandomPrefix(texts=3).attempts(victim, make_sample(seed))]

    assert texts(5) == texts(5) != texts(6)


def test_no_gradient_and_no_reference_image_is_asked_for(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a control knows nothing but prompts")

    monkeypatch.setattr(torch.autograd, "grad", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(Victim, "reference", refuse)
    assert len(list(RandomPrefix(texts=2).attempts(victim, make_sample()))) == 2


def test_no_room_for_the_words(victim: Victim) -> None:
    with pytest.raises(SkippedPromptError, match="more than the 77"):
        list(RandomPrefix(tokens=75).attempts(victim, make_sample()))


def test_its_rate_is_named_after_chance(world_pipe: Any, tmp_path: Path) -> None:
    """By a judge that sees a cat everywhere."""

    def judge(images: Any) -> list[Any]:
        return [SimpleNamespace(object="cat", objects=("cat",), style="noto", shape="cat") for _ in images]

    results = attack(
        world_pipe, "random_prefix", "cat", size="smoke", judge=judge, out=tmp_path / "out", progress=False
    )
    rates = {row["name"]: row for row in results.metrics}
    assert "ASR" not in rates
    assert rates["chance_ASR"]["value"] == rates["pre_ASR"]["value"] == 1
    assert "random words" in rates["chance_ASR"]["recipe"]["metric"]
    assert results.cost["gradient_steps"] == 0
