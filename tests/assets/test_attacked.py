"""What erasures withstand: the tables of attacks and of ways around them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

import erasure
from erasure.assets.build import attacks, concepts, ways
from erasure.assets.build.measured import figure
from erasure.attach import ErasureManager
from erasure.errors import BypassedErasureWarning
from erasure.eval.detectors import CanvasJudge
from erasure.eval.results import Results
from erasure.eval.statistics import wilson
from erasure.world import World


def test_what_is_attacked_chose_no_defaults() -> None:
    measured = {concept.target for concept in concepts.concepts()[1::2]}
    assert set(attacks.ATTACKED) <= measured
    assert 2 * len(measured) == len(concepts.concepts()) - len(concepts.concepts()) % 2


def test_an_attack_with_results_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool]] = []

    def search(pipe, method, concept, *, out, samples, **_: object) -> Results:
        assert samples == 3
        asked.append((out.name, bool(ErasureManager(pipe).active_erasures())))
        metrics = [
            {"name": rate, "concept": None, "variant": "before", "value": 0.5} for rate in attacks.RATES[method]
        ]
        return Results(suite="canvas", size="smoke", model={}, erasures=[], metrics=metrics, cost={})

    monkeypatch.setattr(attacks, "attack", search)
    for name in attacks.ATTACKED[1:]:
        for method in attacks.RATES:
            folder = tmp_path / f"{name}-{attacks.STOCK}-{method}"
            folder.mkdir()
            (folder / "results.json").write_text("{}")
    attacks.measure(tmp_path, tmp_path, (attacks.STOCK,), "smoke", 3, (0, 1))
    assert asked == [(f"dog-{attacks.STOCK}-{method}", False) for method in attacks.RATES]


def test_an_erasure_to_attack_is_made_where_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacked = []

    def search(pipe, method, concept, *, out, **_: object) -> Results:
        (entry,) = ErasureManager(pipe).erasures.values()
        attacked.append((method, entry.config.strategy, [each.target for each in entry.concepts]))
        metrics = [{"name": rate, "concept": None, "variant": "after", "value": 0.5} for rate in attacks.RATES[method]]
        return Results(suite="canvas", size="smoke", model={}, erasures=[], metrics=metrics, cost={})

    monkeypatch.setattr(attacks, "attack", search)
    monkeypatch.setattr(attacks, "ATTACKED", ("turtle",))
    for _ in range(2):  # and is taken from there the second time
        attacks.measure(tmp_path, tmp_path, ("sld",), "smoke", 1, (0, 1))
    assert attacked == 2 * [(method, "sld", ["turtle"]) for method in attacks.RATES]
    assert (attacks.erasure_of(tmp_path, "sld", "turtle") / "erasure_config.json").is_file()


def test_two_methods_are_compared_on_the_prompts_that_both_were_attacked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes(strategy: str, **succeeded: list[bool | None]) -> None:
        for name, each in succeeded.items():
            path = tmp_path / f"{name}-{strategy}-unlearndiffatk" / "attacks.jsonl"
            rows[path] = [{"sample_id": f"{name}-{number}", "success": one} for number, one in enumerate(each)]

    rows: dict[Path, list[dict[str, object]]] = {}
    monkeypatch.setattr(attacks, "read_rows", lambda path, _schema: rows[path])
    monkeypatch.setattr(attacks, "ATTACKED", ("dog", "turtle"))
    outcomes("uce", dog=[True] * 5 + [None], turtle=[True, True, True, False])
    outcomes("esd", dog=[False] * 5 + [True], turtle=[True, False, None, True])
    outcomes("itd", dog=[False] * 6, turtle=[False] * 4)
    first, second, third = attacks.pairs(tmp_path, (attacks.STOCK, "uce", "esd", "itd"))
    # 8 prompts: on 6 uce alone, on 1 esd alone; 2 (1/2)^7 (1 + 7) = 1/8.
    counts = {"prompts": 8, "only_method": 6, "only_other": 1}
    assert first == {"method": "uce", "other": "esd", **counts, "p": 0.125, "p_adjusted": 0.25}
    # 9 prompts, 8 and 0 of them: 2 (1/2)^8; the least of three p-values is tripled.
    assert (second["only_method"], second["only_other"], second["p"]) == (8, 0, 2 / 2**8)
    assert second["p_adjusted"] == 3 * 2 / 2**8
    # 3 and 0: 2 (1/2)^3; the greatest is not adjusted below the one before it.
    assert (third["method"], third["other"], third["p"], third["p_adjusted"]) == ("esd", "itd", 0.25, 0.25)


def test_the_table_of_attacks_pools_prompts_of_all_concepts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Measured:
        def __init__(self, folder: str) -> None:
            self.n = 10 if folder.startswith("dog") else 5

        def get(self, rate: str, variant: str) -> dict[str, float]:
            return {"value": 1.0 if self.n == 10 else 0.2, "n": self.n}

    monkeypatch.setattr(Results, "load", lambda path: Measured(path.parent.name))
    for name in attacks.ATTACKED:
        for method in attacks.RATES:
            folder = tmp_path / f"{name}-uce-{method}"
            folder.mkdir()
            (folder / "results.json").write_text("{}")
    rates = dict.fromkeys(("pre_ASR", "ASR", "chance_ASR"), figure(wilson(14, 30), 30))
    assert attacks.rows(tmp_path, ("uce",)) == [{"method": "uce", "prompts": 30, **rates}]
    (tmp_path / "dog-uce-random_prefix" / "results.json").unlink()
    (row,) = attacks.rows(tmp_path, ("uce",))
    assert row == {"method": "uce", "prompts": 30, **rates, "chance_ASR": figure({"reason": "not measured"})}


def test_ways_around_a_text_side_erasure_bring_the_object_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "IMAGES", 2)
    stock, erased = (erasure.load_pipeline("canvas-sd") for _ in range(2))
    for pipe in (stock, erased):
        pipe.set_progress_bar_config(disable=True)
    concept = World.at("canvas-sd").concept("dog")
    erased.erase(concept, "diff_quickfix", progress=False)
    judge, shown = CanvasJudge(), {}
    for way, drawn in ways.ways(stock, erased, concept).items():
        with nullcontext() if way not in ways.SAID else pytest.warns(BypassedErasureWarning):
            shown[way] = sum("dog" in answer.objects for answer in judge([drawn(0), drawn(1)]))
    assert shown[ways.PLAIN] == 0
    assert shown[ways.EMBEDDINGS] == 2
    assert shown[ways.PICTURE] >= 1
    assert shown[ways.LATENTS] >= 1
    plain, embeddings, *_ = ways.rows({way: {"diff_quickfix": count} for way, count in shown.items()})
    assert plain == {"way": ways.PLAIN, "method": "diff_quickfix", "shown": 0, "n": 2}
    assert embeddings["said"] == "warns, on every pipeline that shares the denoiser"
