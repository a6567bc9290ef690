"""Whole attacks: counts by hand, missing outcomes, resuming, several processes, replay, bad requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from erasure import ErasureManager, progress
from erasure.errors import DivergenceError, EvaluationError
from erasure.eval import Results, attack, attacks, compare, replay
from erasure.eval.attacks import Attack, SkippedPromptError
from erasure.eval.attacks.prompts import read_prompts
from erasure.eval.attacks.together import Drawn, Wanted
from erasure.eval.attacks.victim import Victim
from erasure.eval.attempts import Attempt
from erasure.eval.one_concept import spread
from erasure.eval.samples import Sample
from erasure.eval.schemas import AttackRow, ReplayRow
from erasure.eval.sizes import SIZES
from erasure.eval.statistics import wilson
from erasure.eval.table import read_rows
from tests.eval.conftest import killed_judge


@dataclass(frozen=True, kw_only=True)
class Scripted(Attack):
    """Proposes "one", "one", "two" and "three" ahead of the prompt."""

    sizes = {"smoke": {"samples": 3}}  # noqa: RUF012

    strength: float = 1.0
    skipped: str = ""
    """Sample that it cannot attack."""
    beside: str = ""
    """Word of a text for a second text encoder."""

    @property
    def tries(self) -> int:
        return 4

    def attempts(self, victim: Victim, sample: Sample) -> Iterator[Attempt]:
        if sample.sample_id == self.skipped:
            raise SkippedPromptError("no reference image")
        for number, word in enumerate(("one", "one", "two", "three")):
            others = {"prompt_2": f"{self.beside} {sample.prompt}"} if self.beside else {}
            call = {"prompt": f"{word} {sample.prompt}", **others}
            yield Attempt(call, steps=5, loss=1.0 / (number + 1), changed=word == "two", cut=word == "three")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted attack under its name."""
    monkeypatch.setattr(attacks.ATTACKS, "_registered", dict(attacks.ATTACKS._registered))
    attacks.register("scripted")(Scripted)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images that say what they were drawn from, instead of drawing; and the list of that."""
    seen = []

    def draw(wanted: Wanted) -> Drawn:
        image, sample = Image.linear_gradient("L").resize((8, 8)), wanted.sample
        beside = "".join(f" | {name}: {each}" for name, each in wanted.attempt.others.items())
        said = f"{'stock: ' * wanted.stock}{sample.sample_id}: {wanted.attempt.text or sample.prompt}{beside}"
        image.info["said"] = said
        if not wanted.stock:
            seen.append(said)
        return Drawn(image)

    monkeypatch.setattr(Victim, "draw_alike", lambda self, wanted: list(map(draw, wanted)))
    return seen


def reading(shows: Callable[[str], bool]) -> Any:
    """A judge that sees a cat in what the stock model or some texts drew, and else a dog."""

    def judge(images: Any) -> list[Any]:
        kinds = ("dog", "cat")
        said = [image.info["said"] for image in images]
        return [SimpleNamespace(object=kinds[text.startswith("stock") or shows(text)], style="noto") for text in said]

    judge.version = "reading"  # type: ignore[attr-defined]
    return judge


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Results]:
    def call(pipe: Any, out: str = "out", **options: Any) -> Results:
        return attack(
            pipe, **({"name": "scripted", "concept": "cat", "out": tmp_path / out, "progress": False} | options)
        )

    return call


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "attacks.jsonl", ReplayRow)
    return [{key: value for key, value in row.items() if key not in ("seconds", "recalled")} for row in rows]


# Counting -----------------------------------------------------------------------------------------------------------


def test_rates_by_hand(erased_pipe: Any, run: Any, texts: list[str], scripted: None, tmp_path: Path) -> None:
    shows = ("cat-ink-0: a cat", "cat-ink-1: one", "cat-ink-2: two", "cat-noto-3: three")
    results = run(erased_pipe, judge=reading(lambda said: said.startswith(shows)))
    rows = rows_of(tmp_path / "out")
    assert [row["sample_id"] for row in rows] == [f"cat-{style}-{n}" for style in ("ink", "noto") for n in range(4)]
    assert [row["success"] for row in rows] == [True, True, True, *[False] * 5]
    first, second, third, fourth = rows[:4]
    assert (first["text"], first["texts"], first["steps"], first["images"]) == (None, 0, 0, 1)
    assert (second["text"], second["texts"], second["steps"]) == ("one a cat image in ink style", 1, 5)
    assert (third["text"], third["texts"], third["changed"], third["cut"]) == ("two a cat image in ink style", 3, 1, 0)
    # The text that comes twice is drawn once, and what would be cut is not drawn.
    assert (fourth["text"], fourth["texts"], fourth["images"]) == ("two a cat image in ink style", 4, 3)
    assert (fourth["changed"], fourth["cut"], fourth["losses"]) == (1, 1, [1.0, 0.5, 1 / 3, 0.25])
    assert len(texts) == 1 + 2 + 3 + 5 * 3
    pre, asr = results.get("pre_ASR"), results.get("ASR")
    for row, hits in ((pre, 1), (asr, 3)):
        expected = wilson(hits, 8)
        assert (row["value"], row["low"], row["high"], row["n"]) == (*expected, 8)
        assert row["concept"] == "cat"
        assert row["recipe"]["attack"] == {
            "name": "scripted",
            "samples": 50,
            "strength": 1.0,
            "skipped": "",
            "beside": "",
        }
        assert row["recipe"]["judge"] == "reading"
        assert row["recipe"]["num_inference_steps"] == 2
    assert asr["prompts"] == {"without_attack": 1, "by_attack": 2, "withstood": 5, "missing": 0}
    assert asr["retokenised"] == {"texts": 1 + 3 + 5 * 4, "changed": 1 + 5, "cut": 5}
    assert results.cost["gradient_steps"] == 5 * (1 + 3 + 20)
    assert results.cost["images_generated"] == len(texts) + len(rows), "and the original model's of every prompt"
    assert results.suite == "scripted"
    assert Results.load(tmp_path / "out") == results
    kept = read_prompts(tmp_path / "out")
    assert [prompt.text.split()[0] for prompt in kept] == ["one", "two"]
    assert kept[0].made_by["against"][0].startswith("noise (")
    assert kept[0].sample.prompt == "a cat image in ink style"


def test_texts_for_other_text_encoders_are_kept_and_tried_again(
    erased_pipe: Any, run: Any, texts: list[str], scripted: None, tmp_path: Path
) -> None:
    judge = reading(lambda said: "two a" in said and "prompt_2: four a" in said)
    run(erased_pipe, judge=judge, beside="four")
    kept = read_prompts(tmp_path / "out")
    assert kept
    for prompt in kept:
        assert prompt.others == {"prompt_2": f"four {prompt.sample.prompt}"}
    texts.clear()
    results = replay(erased_pipe, tmp_path / "out", out=tmp_path / "again", judge=judge, progress=False)
    assert results.get("transfer_ASR")["value"] == 1
    assert sum("prompt_2: four a" in text for text in texts) == len(kept)
    file = tmp_path / "out" / "adversarial.jsonl"
    file.write_text(file.read_text().replace('"prompt_2"', '"callback_on_step_end"'))
    with pytest.raises(EvaluationError, match="callback_on_step_end"):
        read_prompts(file)


def test_missing_is_never_safe(erased_pipe: Any, run: Any, texts: list[str], scripted: None, tmp_path: Path) -> None:
    def judge(images: Any) -> list[Any]:
        (image,) = images
        said = image.info["said"]
        if said == "cat-ink-0: a cat image in ink style" or said.startswith("cat-ink-1: one"):
            raise ValueError("cannot see")
        cat = said.startswith(("cat-ink-0: two", "cat-ink-2", "stock"))
        return [SimpleNamespace(object="cat" if cat else "dog", style="noto")]

    results = run(erased_pipe, judge=judge, skipped="cat-noto-2")
    rows = {row["sample_id"]: row for row in rows_of(tmp_path / "out")}
    # Not known without an attack, but the attack shows it.
    assert rows["cat-ink-0"]["before"] == {"judged": None, "shown": None}
    assert rows["cat-ink-0"]["success"] is True
    assert rows["cat-ink-0"]["failures"] == {"before": "ValueError: cannot see"}
    # One of the tries is not known, the others fail.
    assert rows["cat-ink-1"]["success"] is None
    assert rows["cat-ink-1"]["failures"] == {"after": "ValueError: cannot see"}
    assert rows["cat-noto-2"]["success"] is None
    assert rows["cat-noto-2"]["failures"] == {"attack": "no reference image"}
    pre, asr = results.get("pre_ASR"), results.get("ASR")
    assert (pre["value"], pre["n"], pre["missing"]) == (1 / 7, 7, 1)
    assert (asr["value"], asr["n"], asr["missing"]) == (2 / 6, 6, 2)
    assert asr["prompts"] == {"without_attack": 1, "by_attack": 1, "withstood": 4, "missing": 2}


def test_a_concept_that_the_original_model_does_not_draw(erased_pipe: Any, tmp_path: Path) -> None:
    def dogs(images: Any) -> list[Any]:
        return [SimpleNamespace(object="dog", style="noto") for _ in images]

    results = attack(
        erased_pipe, "unlearndiffatk", "cat", size="smoke", out=tmp_path / "out", judge=dogs, progress=False,
        references=2,
    )  # fmt: skip
    for name in ("pre_ASR", "ASR"):
        row = results.get(name)
        assert (row["value"], row["low"], row["high"]) == (None, None, None)
        assert "the judge sees 'cat' where it is asked for in 0% of 2 images of the stock model" in row["reason"]
    assert results.get("ASR")["missing"] == 2
    assert not results.get("control_seen", "before")["holds"]
    assert (tmp_path / "out" / "adversarial.jsonl").read_text() == ""


def test_the_stock_model_is_the_base_of_comparisons(
    world_pipe: Any, erased_pipe: Any, run: Any, texts: list[str], scripted: None
) -> None:
    judge = reading(lambda said: True)
    erased = run(erased_pipe, "erased", judge=judge)
    ErasureManager(erased_pipe).unload()
    stock = run(world_pipe, "stock", judge=judge)
    assert {row["variant"] for row in stock.metrics} == {"before"}
    table = compare([stock.folder, erased.folder])
    assert table.columns == ("pre_ASR", "ASR")
    assert [(row["label"], row["cells"]["ASR"]["value"]) for row in table.rows] == [("base", 1.0), ("erased", 1.0)]
    other = run(world_pipe, "other", judge=judge, strength=2.0, images=False)
    assert (stock.folder / "images" / "before").is_dir()
    assert not (other.folder / "images").exists()
    with pytest.raises(EvaluationError, match=r"attack\.strength: 1\.0 in the first, 2\.0 in the second"):
        compare([stock, other])


def test_samples_are_spread_evenly() -> None:
    assert spread(list(range(20)), 5) == [0, 5, 10, 14, 19]  # type: ignore[arg-type]
    assert spread(list(range(3)), 5) == [0, 1, 2]  # type: ignore[arg-type]
    assert spread(list(range(9)), 1) == [0]  # type: ignore[arg-type]


# On the tiny model --------------------------------------------------------------------------------------------------


@pytest.fixture
def whole(tmp_path: Path, judge: Any) -> Callable[..., Results]:
    """A small attack by UnlearnDiffAtk, with the arbitrary judge."""

    def call(pipe: Any, out: str = "out", **options: Any) -> Results:
        defaults = {
            "size": "smoke", "samples": 5, "timesteps": 2, "iterations": 2, "references": 8, "judge": judge,
            "progress": False, "concept": "cat", "seed": 4, "batch_size": 2,
        }  # fmt: skip
        return attack(pipe, out=tmp_path / out, **(defaults | options))

    return call


def test_a_killed_attack_goes_on_to_the_same_rows(erased_pipe: Any, whole: Any, tmp_path: Path, judge: Any) -> None:
    first = whole(erased_pipe)
    expected = rows_of(tmp_path / "out")
    assert {row["success"] for row in expected} > {True}
    seen: list[tuple[str, int, int]] = []
    interrupted = killed_judge(judge, 16)
    with pytest.raises(KeyboardInterrupt):
        whole(erased_pipe, "killed", judge=interrupted)
    done = rows_of(tmp_path / "killed")
    assert len(done) in (2, 4), "whole batches of prompts"
    with (tmp_path / "killed" / "attacks.jsonl").open("ab") as file:
        file.write(b'{"sample_id": "cat-no')
    again = whole(erased_pipe, "killed", progress=lambda *args: seen.append(args))
    assert rows_of(tmp_path / "killed") == expected
    assert again.metrics == first.metrics
    assert [args[1:] for args in seen] == [(number, 5) for number in range(len(done) + 1, 6)]
    for name in ("adversarial.jsonl", "recipe.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    pictures = [sorted(p.relative_to(tmp_path / f) for p in (tmp_path / f).rglob("*.png")) for f in ("out", "killed")]
    assert pictures[0] == pictures[1]
    assert {path.parts[1] for path in pictures[0]} == {"before", "after", "reference"}


def test_processes_share_the_prompts(erased_pipe: Any, whole: Any, tmp_path: Path, second_of_two: Any) -> None:
    single = whole(erased_pipe)
    processes = second_of_two(single, tmp_path)
    whole(erased_pipe, "two")
    assert len(read_rows(tmp_path / "two" / "attacks-1.jsonl", AttackRow)) == 2
    processes.rank = 0
    # One after the other, so the main process takes half of what is left, and then the rest.
    whole(erased_pipe, "two")
    both = whole(erased_pipe, "two")
    assert not list((tmp_path / "two").glob("attacks-*.jsonl"))
    assert rows_of(tmp_path / "two") == rows_of(tmp_path / "out")
    assert both.metrics == single.metrics


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(erased_pipe: Any, whole: Any, tmp_path: Path, mode: Any) -> None:
    whole(erased_pipe, samples=2)
    with mode():
        whole(erased_pipe, "off", samples=2)
    assert rows_of(tmp_path / "off") == rows_of(tmp_path / "out")


def test_a_nan_stops_the_run_and_keeps_what_is_done(erased_pipe: Any, whole: Any, tmp_path: Path) -> None:
    def nan(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output * torch.nan if torch.is_grad_enabled() else output

    handle = erased_pipe.unet.conv_out.register_forward_hook(nan)

    def cats(images: Any) -> list[Any]:
        cats.seen += 1  # type: ignore[attr-defined]
        return [SimpleNamespace(object="dog" if cats.seen % 2 else "cat", style="noto") for _ in images]  # type: ignore[attr-defined]

    cats.seen = 0  # type: ignore[attr-defined]
    with pytest.raises(DivergenceError, match="step 0"):
        whole(erased_pipe, judge=cats)
    assert not (tmp_path / "out" / "results.json").exists()
    handle.remove()


# Replay -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(erased_pipe: Any, run: Any, texts: list[str], scripted: None, tmp_path: Path) -> Path:
    """Six adversarial prompts: the first two samples need none."""
    run(erased_pipe, "found", judge=reading(lambda said: "one" in said or said.startswith(("cat-ink-0", "cat-ink-1"))))
    texts.clear()
    return tmp_path / "found"


def test_replay_tries_texts_on_another_erasure(
    erased_pipe: Any, found: Path, texts: list[str], tmp_path: Path
) -> None:
    judge = reading(lambda said: "noto" in said and ("one" in said or "noto-0" in said))
    for file, out in ((found, "a"), (found / "adversarial.jsonl", "b")):
        results = replay(erased_pipe, file, "cat", out=tmp_path / out, judge=judge, progress=False)
        pre, after = results.get("transfer_pre_ASR"), results.get("transfer_ASR")
        assert (pre["value"], pre["low"], pre["high"], pre["n"]) == (*wilson(1, 6), 6)
        assert (after["value"], after["low"], after["high"], after["n"]) == (*wilson(4, 6), 6)
        assert after["recipe"]["made_by"]["attack"] == "scripted"
        assert after["recipe"]["made_by"]["against"][0].startswith("noise")
        assert results.cost["gradient_steps"] == 0
    assert len(texts) == 2 * 2 * 6
    rows = rows_of(tmp_path / "a")
    assert [row["success"] for row in rows] == [False, False, True, True, True, True]
    assert rows[0]["text"] == "one a cat image in ink style"
    # Finished: nothing is drawn again. Other prompts are another recipe.
    replay(erased_pipe, found, out=tmp_path / "a", judge=judge, progress=False)
    assert len(texts) == 2 * 2 * 6
    lines = (found / "adversarial.jsonl").read_text().splitlines()
    (tmp_path / "fewer.jsonl").write_text("\n".join(lines[:3]))
    with pytest.raises(EvaluationError, match="samples"):
        replay(erased_pipe, tmp_path / "fewer.jsonl", out=tmp_path / "a", judge=judge, progress=False)


@pytest.mark.parametrize("watched", [True, False])
def test_progress_says_prompts_without_what_steers_a_terminal(
    erased_pipe: Any, found: Path, texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, watched: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "is_watched", lambda: watched)
    monkeypatch.setattr(progress, "BETWEEN_LINES", 0.0)
    rows = [json.loads(line) for line in (found / "adversarial.jsonl").read_text().splitlines()]
    rows[0]["prompt"] = "{bar}\x1b[2J\x9b\u202e\x07" + "z" * 50_000
    file = tmp_path / "hostile.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay(erased_pipe, file, "cat", out=tmp_path / "out", judge=reading(lambda _: False))
    said = capsys.readouterr().err
    assert r"{bar}\x1b[2J\x9b" in said
    assert not set(said) & set("\x1b\x9b\u202e\x07")
    assert "z" * 50 not in said


def test_replay_refuses_prompts_that_do_not_fit(erased_pipe: Any, found: Path, tmp_path: Path) -> None:
    def refused(prompts: Path, said: str, **options: Any) -> None:
        with pytest.raises(EvaluationError, match=said):
            replay(erased_pipe, prompts, out=tmp_path / "out", progress=False, **options)
        assert not (tmp_path / "out").exists()

    refused(tmp_path / "none", "no adversarial prompts at .*none")
    refused(tmp_path, "no adversarial prompts at .*adversarial.jsonl")
    refused(found, "are about 'cat', not about 'dog'", concept="dog")
    refused(found, "no concept 'cow'", concept="cow")
    refused(found, "unknown suite", suite="i3p")
    lines = (found / "adversarial.jsonl").read_text().splitlines()
    file = tmp_path / "file.jsonl"
    file.write_text("")
    refused(file, "holds no prompts: the attack had no success")
    for damaged in (lines[1][:40], "[]", "3", json.dumps({**json.loads(lines[1]), "text": None}),
                    json.dumps({k: v for k, v in json.loads(lines[1]).items() if k != "seed"})):  # fmt: skip
        file.write_text("\n".join([lines[0], damaged]))
        refused(file, "line 2")
    other = json.loads(lines[1])
    other["target"]["name"] = "kitten"
    file.write_text("\n".join([lines[0], json.dumps(other)]))
    refused(file, "several concepts or attacks")
    file.write_text("\n".join([lines[0], lines[0]]))
    refused(file, "several prompts for one sample")


# Bad requests -------------------------------------------------------------------------------------------------------


def test_bad_requests(erased_pipe: Any, run: Any, texts: list[str], scripted: None, tmp_path: Path) -> None:
    judge = reading(lambda said: True)
    for options, said in (
        (
            {"name": "no-such"},
            "unknown attack 'no-such'; there are: completion, .*, sampler, scripted, synonym, .*, unlearndiffatk",
        ),
        ({"size": "huge"}, "no size 'huge'; there are: smoke, quick, full"),
        ({"suite": "i3p"}, "unknown suite"),
        ({"suite": "removal"}, "has no prompts of a concept"),
        ({"concept": "cow"}, "no concept 'cow'"),
    ):
        with pytest.raises(EvaluationError, match=said):
            run(erased_pipe, judge=judge, **options)
    assert not (tmp_path / "out").exists()
    run(erased_pipe, judge=judge, concept=None, size="smoke")
    with pytest.raises(EvaluationError, match=r"suite\.size: \"smoke\" in the first, \"quick\" in the second"):
        run(erased_pipe, judge=judge)
    with pytest.raises(EvaluationError, match=r"suite\.attack\.strength"):
        run(erased_pipe, judge=judge, size="smoke", strength=0.5)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(EvaluationError, match="holds no evaluation"):
        run(erased_pipe, "mine", judge=judge)
    ErasureManager(erased_pipe).fuse()
    with pytest.raises(EvaluationError, match="is fused, which leaves no stock model"):
        run(erased_pipe, "fused", judge=judge)
    ErasureManager(erased_pipe).unfuse()
    ErasureManager(erased_pipe).unload()
    with pytest.raises(EvaluationError, match="name the concept: the erasures attached are of none"):
        run(erased_pipe, "none", judge=judge, concept=None)


def test_the_registry() -> None:
    assert "unlearndiffatk" in attacks.available()
    method = attacks.get("unlearndiffatk")
    assert method.name == "unlearndiffatk"
    for name in attacks.available():
        kind = attacks.get(name)
        assert kind.title
        assert kind.paper
        assert kind.access
        assert all(kind.configured(size).tries > 0 for size in SIZES)
