"""Prompts that are attacked in step: who is asked together, that each goes its own way, what is drawn only once."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasure import ErasureManager
from erasure.errors import EvaluationError
from erasure.eval import attack, replay
from erasure.eval.attacks import get
from erasure.eval.attacks.changes import AnotherSampler, ImagePrompt, Resumed
from erasure.eval.attacks.together import Drawn, Slopes, Step, Wanted, by_itself, in_step, merged
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.samples import Sample
from erasure.eval.schemas import AttackRow
from erasure.eval.suites import Target
from erasure.eval.table import read_rows
from tests.copies import copied

SAMPLE = Sample(
    "cat-noto-0", "a cat image in noto style", 5, "target", ("cat",), "noto", ("cat",), num_inference_steps=2,
    height=32, width=32,
)  # fmt: skip
OTHERS = [
    SAMPLE, dataclasses.replace(SAMPLE, sample_id="cat-ink-1", prompt="a cat image in ink style", seed=6),
    dataclasses.replace(SAMPLE, sample_id="cat-ink-2", prompt="a cat and a house image in ink style", seed=7),
]  # fmt: skip
PIXEL = 2
"""How far a row of a batch may be rounded from what is drawn alone, in steps of 256."""


def cats(images: Any) -> list[Any]:
    return [SimpleNamespace(object="cat", style="noto") for _ in images]


@pytest.fixture
def victim(erased_pipe: Any) -> Victim:
    stock = copied(erased_pipe)
    ErasureManager(stock).unload()
    return Victim(erased_pipe, stock, Target("cat", "object", ("cat",)), cats, samples=OTHERS, seed=3)


# Who is asked together -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Doubled(Step):
    number: int

    @property
    def alike(self) -> int:
        return self.number % 2

    @classmethod
    def together(cls, steps: Sequence[Doubled]) -> list[int]:
        return [2 * step.number for step in steps]


def test_what_is_asked_for_at_the_same_time_is_done_together_and_each_gets_its_own() -> None:
    done: list[list[Any]] = []

    def course(numbers: Sequence[int]) -> Generator[Any, Any, list[Any]]:
        found = []
        for number in numbers:
            found.append((yield Doubled(number)))
        found.append((yield Wanted(SAMPLE, Attempt({"prompt": str(numbers)}))))
        return found

    def draw(wanted: Sequence[Wanted]) -> list[Drawn]:
        done.append([each.attempt.text for each in wanted])
        return [Drawn(Image.new("RGB", (len(each.attempt.text or ""), 1))) for each in wanted]

    def step(steps: Sequence[Any]) -> Sequence[object]:
        done.append([each.number for each in steps])
        return Doubled.together(steps)

    ends = in_step([course([1, 3]), course([5]), course([2])], draw, step)
    assert done == [[1, 5], [2], [3], ["[5]", "[2]"], ["[1, 3]"]]
    assert [[each for each in end.result if isinstance(each, int)] for end in ends] == [[2, 6], [10], [4]]
    assert [end.result[-1].image.width for end in ends] == [6, 3, 3]
    assert all(end.seconds > 0 for end in ends)


def test_an_error_of_one_ends_all_and_closes_the_others() -> None:
    closed = []

    def course(name: str) -> Generator[Any, Any, None]:
        try:
            yield Doubled(1)
            raise ValueError(name)
        finally:
            closed.append(name)

    with pytest.raises(ValueError, match="first"):
        in_step([course("first"), course("second")], lambda wanted: [], Doubled.together)
    assert closed == ["first", "second"]


def test_calls_of_different_kinds_are_made_apart() -> None:
    latents = torch.zeros(1, 4, 8, 8)
    like = Wanted(SAMPLE, Attempt({"prompt": "one", "latents": latents}))
    assert like.alike == Wanted(OTHERS[1], Attempt({"prompt": "two", "latents": latents + 1})).alike
    for other in (
        Wanted(SAMPLE, Attempt({"prompt": "one", "latents": latents}), stock=True),
        Wanted(SAMPLE, Attempt({"prompt": "one"})),
        Wanted(SAMPLE, Attempt({"prompt": "one", "latents": torch.zeros(1, 4, 4, 4)})),
        Wanted(SAMPLE, Attempt({"prompt": None, "latents": latents})),
        Wanted(dataclasses.replace(SAMPLE, num_inference_steps=3), like.attempt),
        Wanted(SAMPLE, dataclasses.replace(like.attempt, change=AnotherSampler("DDIMScheduler"))),
    ):
        assert other.alike != like.alike
    same = [Wanted(each, Attempt(change=AnotherSampler("DDIMScheduler", {"eta": 1}))) for each in OTHERS]
    assert len({each.alike for each in same}) == 1
    tried = Attempt(change=ImagePrompt("adapter", torch.zeros(2, 4, 8)))
    assert Wanted(SAMPLE, tried).alike != Wanted(SAMPLE, dataclasses.replace(tried)).alike, "tokens of one row alone"


def test_arguments_are_put_together_row_by_row() -> None:
    first, second = torch.zeros(1, 2), torch.ones(1, 2)
    one, two = Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2))
    calls = [
        {"prompt": "a", "latents": first, "image": one, "negative_prompt": [""], "eta": 1.0, "height": None,
         "callback_on_step_end": Resumed(2, first)},
        {"prompt": "b", "latents": second, "image": two, "negative_prompt": ["x"], "eta": 1.0, "height": None,
         "callback_on_step_end": Resumed(2, second)},
    ]  # fmt: skip
    call = merged(calls)
    resumed = call.pop("callback_on_step_end")
    assert isinstance(resumed, Resumed)
    assert torch.equal(resumed.latents, torch.cat([first, second]))
    latents = call.pop("latents")
    assert isinstance(latents, torch.Tensor)
    assert latents.tolist() == [[0, 0], [1, 1]]
    assert call == {
        "prompt": ["a", "b"], "image": [one, two], "negative_prompt": ["", "x"], "eta": 1.0, "height": None
    }  # fmt: skip


# Each goes its own way -----------------------------------------------------------------------------------------------

DRAWN = {
    "random_prefix": {"texts": 1}, "sampler": {"schedulers": 3, "etas": (1.0,)}, "prompt_embeds": {},
    "completion": {"steps": (1,)}, "img2img": {"strengths": (0.5,)}, "inpaint": {},
    "tina": {"steps": 2, "iterations": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_batch_draws_what_is_drawn_alone(name: str, victim: Victim) -> None:
    method = get(name).configured("smoke", **DRAWN[name])
    tried = [list(method.attempts(victim, sample)) for sample in OTHERS]
    for attempts in zip(*tried, strict=True):
        wanted = [Wanted(sample, attempt) for sample, attempt in zip(OTHERS, attempts, strict=True)]
        assert len({each.alike for each in wanted}) == 1
        for each, drawn in zip(wanted, victim.draw_alike(wanted), strict=True):
            assert isinstance(drawn.image, Image.Image)
            single = np.asarray(victim.draw(each.sample, each.attempt), float)
            assert np.abs(np.asarray(drawn.image, float) - single).max() <= PIXEL


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("unlearndiffatk", {"timesteps": 1, "iterations": 3, "noises": 2}),
        ("p4d", {"tokens": 4, "steps": 3, "every": 3}),
        ("tina", {"steps": 3, "iterations": 2}),
    ],
)
def test_a_search_in_step_finds_what_it_finds_alone(name: str, options: Any, victim: Victim) -> None:
    method, sizes = get(name).configured("smoke", **options), []

    def course(sample: Sample) -> Generator[Any, Any, list[Attempt]]:
        search, answer, found = method.search(victim, sample), None, []
        while True:
            try:
                asked = search.send(answer)
            except StopIteration:
                return found
            if isinstance(asked, Attempt):
                found.append(asked)
                answer = None
            else:
                answer = yield asked

    def step(steps: Sequence[Step]) -> Sequence[object]:
        sizes.append(len(steps))
        return type(steps[0]).together(steps)

    ends = in_step([course(sample) for sample in OTHERS], lambda wanted: [], step)
    assert set(sizes) == {len(OTHERS)}
    for sample, end in zip(OTHERS, ends, strict=True):
        for got, single in zip(end.result, method.attempts(victim, sample), strict=True):
            assert got.text == single.text
            assert got.steps == single.steps
            assert got.loss == pytest.approx(single.loss, rel=1e-4)
            if name == "tina":
                torch.testing.assert_close(got.call["latents"], single.call["latents"], rtol=1e-3, atol=1e-3)


def test_slopes_of_a_batch_are_those_of_each() -> None:
    def squares(given: Any) -> list[torch.Tensor]:
        return [(weight * vector).square().sum() for weight, vector in given]

    vectors = [torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0], requires_grad=True)]
    steps = [Slopes(squares, (2.0 + n, vector), (vector,), "", 8.0) for n, vector in enumerate(vectors)]
    (first, (one,)), (second, (two,)) = Slopes.together(steps)
    assert (first.item(), second.item()) == (20.0, 81.0)
    assert one.tolist() == [8 * 8.0, 8 * 16.0]
    assert two.tolist() == [8 * 54.0]


def test_attempts_are_those_of_the_search_by_itself() -> None:
    def search() -> Generator[Any, Any, None]:
        number = yield Doubled(1)
        yield Attempt({"prompt": str(number)})
        yield Attempt({"prompt": str((yield Doubled(number)))})

    assert [attempt.text for attempt in by_itself(search())] == ["2", "4"]


@pytest.mark.parametrize("name", ["random_prefix", "unlearndiffatk"])
def test_an_attack_in_step_tries_the_same(name: str, erased_pipe: Any, tmp_path: Path) -> None:
    found = []
    for size in (1, 3):
        out = tmp_path / str(size)
        given = {"texts": 2} if name == "random_prefix" else {"timesteps": 2, "iterations": 1}
        results = attack(
            erased_pipe, name, "cat", size="smoke", samples=4, out=out, judge=dogs, progress=False, batch_size=size,
            baseline_cache=tmp_path / f"cache-{size}", **given,
        )  # fmt: skip
        rows = read_rows(out / "attacks.jsonl", AttackRow)
        found.append([[row[key] for key in ("sample_id", "text", "texts", "steps", "images")] for row in rows])
        assert results.cost["batch_size"] == size
    assert found[0] == found[1]
    with pytest.raises(EvaluationError, match="batch_size"):
        attack(
            erased_pipe, name, "cat", size="smoke", samples=4, out=tmp_path / "3", judge=dogs, progress=False,
            batch_size=1, **given,
        )  # fmt: skip
    with pytest.raises(EvaluationError, match="a batch size of 0"):
        attack(erased_pipe, name, "cat", size="smoke", out=tmp_path / "0", judge=dogs, batch_size=0)


def test_large_pictures_are_drawn_one_by_one(erased_pipe: Any) -> None:
    from erasure.eval.attacks.runner import IN_STEP, in_step_of

    large = dataclasses.replace(SAMPLE, height=512, width=512)
    assert [in_step_of(None, each) for each in ([SAMPLE], [SAMPLE, large])] == [IN_STEP, 1]
    assert in_step_of(4, [large]) == 4


# Drawn once ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(erased_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The samples of every call of a pipeline for images."""
    from erasure.eval.attacks import victim

    seen: list[Any] = []

    def generate(pipe: Any, samples: Sequence[Sample], *args: Any, **kwargs: Any) -> Any:
        seen.extend(samples)
        return kept(pipe, samples, *args, **kwargs)

    kept = victim.generate
    monkeypatch.setattr(victim, "generate", generate)
    return seen


def dogs(images: Any) -> list[Any]:
    """A judge that sees the concept in no image of the erased model's, and in no other either."""
    return [SimpleNamespace(object="dog", style="noto") for _ in images]


def test_plain_drawings_are_made_once_for_all_attacks(erased_pipe: Any, calls: list[Any], tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "concept": "cat", "size": "smoke", "samples": 2, "judge": dogs, "progress": False,
        "baseline_cache": tmp_path / "cache",
    }  # fmt: skip
    first = attack(erased_pipe, "random_prefix", out=tmp_path / "one", texts=2, **common)
    assert len(calls) == 2 + 2 + 4, "before, the original's, and the tries"
    assert (first.cost["images_generated"], first.cost["images_from_cache"]) == (8, 0)
    calls.clear()
    second = attack(erased_pipe, "prompt_embeds", out=tmp_path / "two", **common)
    assert len(calls) == 2, "what was tried alone"
    assert (second.cost["images_generated"], second.cost["images_from_cache"]) == (2, 4)
    calls.clear()
    again = attack(erased_pipe, "random_prefix", out=tmp_path / "again", texts=2, **common)
    assert not calls
    assert again.metrics == first.metrics
    names = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png")]
    assert names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    # Another erasure: what the original model drew is there, and nothing else.
    (erasure,) = ErasureManager(erased_pipe).erasures.values()
    manager = ErasureManager(erased_pipe)
    manager.unload()
    manager.add(erasure, "half", strength=0.5, check_base=False)
    attack(erased_pipe, "prompt_embeds", out=tmp_path / "half", **common)
    assert len(calls) == 2 + 2


def test_what_is_damaged_is_drawn_again(erased_pipe: Any, tmp_path: Path) -> None:
    common: dict[str, Any] = {
        "concept": "cat", "size": "smoke", "samples": 1, "judge": dogs, "progress": False, "control": True,
        "baseline_cache": tmp_path / "cache", "references": 1,
    }  # fmt: skip
    first = attack(erased_pipe, "img2img", out=tmp_path / "one", **common)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".png", ".safetensors")]
    assert {path.suffix for path in files} == {".png", ".safetensors"}
    wanted = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(b"damaged")
    second = attack(erased_pipe, "img2img", out=tmp_path / "two", **common)
    assert second.cost["images_from_cache"] == 0
    assert second.metrics == first.metrics
    assert {path: path.read_bytes() for path in files} == wanted


def test_what_a_strict_erasure_allows_is_asked_every_time(erased_pipe: Any, calls: list[Any], tmp_path: Path) -> None:
    manager = ErasureManager(erased_pipe)
    (erasure,) = manager.erasures.values()
    manager.unload()
    manager.add(erasure, "cat", strict=True, check_base=False)
    for number in (1, 2):
        calls.clear()
        attack(
            erased_pipe, "img2img", "cat", size="smoke", samples=2, judge=dogs, progress=False, control=True,
            baseline_cache=tmp_path / "cache", out=tmp_path / str(number),
        )  # fmt: skip
        # Ordinary drawings every time; the original's only once. A picture is refused, of both and then of each.
        print(
            number,
            [(c.sample_id, c.prompt) for c in calls],
            [(r["held"], r["after"]) for r in read_rows(tmp_path / str(number) / "attacks.jsonl", AttackRow)],
        )
        assert len(calls) == 2 + (2 if number == 1 else 0) + 4
        assert all(row["held"] for row in read_rows(tmp_path / str(number) / "attacks.jsonl", AttackRow))


def test_a_replay_finds_what_the_attack_has_drawn(erased_pipe: Any, calls: list[Any], tmp_path: Path) -> None:
    def judge(images: Any) -> list[Any]:
        judge.seen += 1  # type: ignore[attr-defined]
        return dogs(images) if judge.seen <= 4 else cats(images)  # type: ignore[attr-defined]

    judge.seen = 0  # type: ignore[attr-defined]
    judge.version = "late"  # type: ignore[attr-defined]
    common: dict[str, Any] = {"progress": False, "judge": judge, "baseline_cache": tmp_path / "cache"}
    attack(erased_pipe, "random_prefix", "cat", size="smoke", samples=2, texts=1, out=tmp_path / "one", **common)
    calls.clear()
    found = replay(erased_pipe, tmp_path / "one", "cat", out=tmp_path / "two", **common)
    assert not calls
    assert found.cost["images_generated"] == 0
