"""`results.json`, comparisons and the report."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from erasure.errors import EvaluationError
from erasure.eval import Results, compare, write_report


def metric(name: str, value: float | None, variant: str, concept: str = "cat", **recipe: Any) -> dict[str, Any]:
    low, high = (None, None) if value is None else (max(value - 0.1, 0), min(value + 0.1, 1))
    return {
        "name": name, "concept": concept, "variant": variant, "value": value, "low": low, "high": high, "n": 10,
        "recipe": {"suite": "canvas", "size": "quick"} | recipe,
    }  # fmt: skip


def make(strategy: str, value: float, concept: str = "cat", **recipe: Any) -> Results:
    entry = {
        "name": f"{concept}-{strategy}",
        "strategy": strategy,
        "strength": 1.0,
        "size_bytes": 1000,
        "seconds": 2.0,
    }
    rows = [
        metric(n, v, s, concept, **recipe)
        for n, s, v in [("UA", "before", 0.1), ("UA", "after", value), ("AA", "after", 0.8)]
    ]
    rows[1] |= {"mcnemar_p": 1e-6, "transitions": {"both": 1, "before_only": 0, "after_only": 9, "neither": 0}}
    cost = {"seconds": 1.0, "seconds_per_image": {"before": None, "after": 0.2}, "peak_memory_mb": 100.0}
    return Results("canvas", "quick", {"name": "canvas-sd", "fingerprint": "f"}, [entry], rows, cost)


def test_round_trip_in_the_stable_schema(tmp_path) -> None:
    results = make("hirm", 0.9)
    path = results.save(tmp_path)
    data = json.loads(path.read_text())
    names = ["schema_version", "suite", "size", "model", "erasures", "metrics", "cost", "date", "versions"]
    assert list(data) == names
    assert data["schema_version"] == 1
    assert Results.load(path) == Results.load(tmp_path) == results


def test_bad_files_are_explained(tmp_path) -> None:
    file = tmp_path / "results.json"
    with pytest.raises(EvaluationError, match="no results at"):
        Results.load(tmp_path)
    for content, message in [
        ("{", "cannot be read as JSON"),
        ("[]", "should be an object"),
        ('{"schema_version": 2}', "reads up to 1"),
        (json.dumps(make("x", 1).to_dict() | {"cost": None}), "'cost'"),
        (
            json.dumps(make("x", 1).to_dict() | {"metrics": [{"name": "UA"}]}),
            "'metrics.0.concept' is missing; key 'metrics.0.value' is missing",
        ),
    ]:
        file.write_text(content)
        with pytest.raises(EvaluationError, match=message):
            Results.load(tmp_path)
    with pytest.raises(EvaluationError, match="no metric 'FID'"):
        make("x", 1).get("FID")


def test_comparison_shares_the_baseline(tmp_path) -> None:
    table = compare([make("hirm", 0.9), make("uce", 0.7), make("uce", 0.5, "dog")])
    assert table.columns == ("UA", "AA")
    assert [(row["label"], row["concept"]) for row in table.rows] == [
        ("base", "cat"), ("hirm", "cat"), ("uce", "cat"), ("base", "dog"), ("uce", "dog"),
    ]  # fmt: skip
    assert table.rows[1]["cells"]["UA"]["value"] == 0.9
    assert table.rows[1]["seconds"] == 2.0
    means = {row["label"]: row for row in table.means()}
    assert means["uce"]["cells"]["UA"] == pytest.approx(0.6)
    assert means["uce"]["concepts"] == 2
    json.dumps(table.to_dict())


def saved(folder: Path, results: Results) -> Path:
    results.save(folder)
    return folder


def test_runs_are_called_by_their_folders(tmp_path: Path) -> None:
    folders = [saved(tmp_path / name, make("uce", 0.5 + i / 10)) for i, name in enumerate(["a/cat", "b/cat", "a/x"])]
    table = compare(folders)
    after = {row["label"]: row["cells"]["UA"]["value"] for row in table.rows if row["variant"] == "after"}
    assert after == {"a/cat": 0.5, "b/cat": 0.6, "a/x": 0.7}
    assert [row["label"] for row in compare(folders[::2]).rows if row["variant"] == "after"] == ["cat", "x"]
    # The same folder twice, and results that lie nowhere, are counted.
    twice = compare([folders[0], folders[0], make("uce", 0.9), make("uce", 0.8)])
    assert [row["label"] for row in twice.rows if row["variant"] == "after"] == ["cat", "cat #2", "uce", "uce #2"]


def test_two_runs_of_one_method_are_not_averaged_as_concepts(tmp_path: Path) -> None:
    runs = [saved(tmp_path / f"run-{i}", make("uce", value)) for i, value in enumerate((0.2, 0.9))]
    table = compare(runs)
    assert table.means() == []
    assert table.repeated() == []
    # Nor are they a part of a mean over other concepts.
    table = compare([*runs, saved(tmp_path / "dog", make("uce", 0.7, "dog"))])
    assert [row["label"] for row in table.means()] == ["base"]
    assert table.repeated() == ["uce (canvas)"]
    # With labels, every run has its own.
    table = compare([*runs, tmp_path / "dog"], ["first", "second", "first"])
    means = {row["label"]: (row["concepts"], row["cells"]["UA"]) for row in table.means()}
    assert means == {"base": (2, pytest.approx(0.1)), "first": (2, pytest.approx(0.45))}
    with pytest.raises(EvaluationError, match="two results of 'cat' are both labelled 'uce'"):
        compare(runs, ["uce", "uce"])
    with pytest.raises(EvaluationError, match="2 labels for 3 results"):
        compare([*runs, tmp_path / "dog"], ["a", "b"])


def test_methods_with_other_options_or_strengths_have_means_of_their_own(tmp_path: Path) -> None:
    runs = [make("esd", 0.5 + i / 10, concept) for i, concept in enumerate(("cat", "dog", "cat", "dog"))]
    for run, options in zip(runs, ("a", "a", "b", "b"), strict=True):
        run.erasures[0]["options"] = options
    means = {row["label"]: row["cells"]["UA"] for row in compare(runs).means() if row["variant"] == "after"}
    assert means == {"esd, options 1": pytest.approx(0.55), "esd, options 2": pytest.approx(0.75)}
    for run in runs[2:]:
        run.erasures[0] |= {"options": "a", "strength": 0.5}
    assert {row["label"] for row in compare(runs).means()} == {"base", "esd", "esd x0.5"}


def test_a_mean_is_over_concepts_that_all_have_the_value() -> None:
    runs = [make("uce", 0.5), make("uce", 0.7, "dog")]
    runs[1].metrics[1] |= {"value": None, "low": None, "high": None, "reason": "the judge sees no dog"}
    table = compare(runs)
    (mean,) = (row for row in table.means() if row["variant"] == "after")
    assert set(mean["cells"]) == {"AA"}
    dog = next(row for row in table.rows if row["concept"] == "dog" and row["variant"] == "after")
    assert dog["missing"] == {"UA": "the judge sees no dog"}


def test_an_attack_and_an_evaluation_stand_apart(tmp_path: Path) -> None:
    attack = make("uce", 0.9, "dog")
    attack.suite = "unlearndiffatk"
    for row in attack.metrics:
        row |= {"name": "ASR", "recipe": {"suite": "canvas", "attack": "x"}}
    del attack.metrics[2]
    runs = [saved(tmp_path / "eval", make("uce", 0.5)), saved(tmp_path / "attack", attack)]
    table = compare(runs)
    assert table.means() == []
    parts = table.suites()
    assert [(part.columns, {row["suite"] for row in part.rows}) for part in parts] == [
        (("UA", "AA"), {"canvas"}), (("ASR",), {"unlearndiffatk"}),
    ]  # fmt: skip
    # The stock model's row of one holds no numbers of the other.
    assert [set(row["cells"]) for row in table.rows if row["variant"] == "before"] == [{"UA"}, {"ASR"}]


def test_results_say_when_and_with_what(tmp_path: Path) -> None:
    import diffusers
    import torch

    old = make("uce", 0.5)
    data = old.to_dict()
    del data["date"], data["versions"]  # as earlier versions wrote them
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert Results.load(tmp_path) == old
    fields = {key: value for key, value in data.items() if key != "schema_version"}
    now = Results.now(**fields)
    assert abs(datetime.now(UTC) - datetime.fromisoformat(now.date)).total_seconds() < 60
    assert now.versions["torch"] == torch.__version__.partition("+")[0] or now.versions["torch"] == torch.__version__
    assert now.versions["diffusers"] == diffusers.__version__
    assert {"erasure-diffusers", "python", "transformers", "peft", "numpy"} <= set(now.versions)
    assert Results.load(now.save(tmp_path)) == now
    (tmp_path / "results.json").write_text(json.dumps(now.to_dict() | {"date": "yesterday"}))
    with pytest.raises(EvaluationError, match="date"):
        Results.load(tmp_path)


def test_unlike_recipes_are_refused() -> None:
    with pytest.raises(
        EvaluationError, match=r'UA was measured differently .*size: "quick" in the first, "full" in the second'
    ):
        compare([make("hirm", 0.9), make("uce", 0.7, size="full")])
    with pytest.raises(EvaluationError, match="judge"):
        compare([make("hirm", 0.9), make("uce", 0.7, judge="other")])
    with pytest.raises(EvaluationError, match="nothing to compare"):
        compare([])


class Resources(HTMLParser):
    """Everything that a page refers to, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        if tag not in ("meta", "img", "input", "rect", "path", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    results = make("hirm", 0.9, concept="<script>cat")
    results.metrics.append(metric("clip_score", None, "after", "<script>cat") | {"reason": "no CLIP"})
    results.save(tmp_path)
    rows = []
    for variant in ("before", "after"):
        (tmp_path / "images" / variant).mkdir(parents=True)
        for name, role in (("cat-ink-0", "target"), ("gun-ink-0", "retain"), ("dog-ink-0", "retain")):
            Image.new("RGB", (64, 64), "red" if variant == "before" else "blue").save(
                tmp_path / "images" / variant / f"{name}.png"
            )
            wanted = name.split("-")[0]
            seen = "???" if variant == "after" and wanted != "gun" else wanted
            judged = {"object": seen, "objects": [seen], "style": "ink"}
            judged = None if name == "gun-ink-0" and variant == "after" else judged
            rows.append(
                {"sample_id": name, "variant": variant, "prompt": f"a {wanted} <b>", "role": role, "objects": [wanted],
                 "style": "ink", "erased": [wanted] if role == "target" else [], "unsafe": wanted == "gun",
                 "judged": judged}
            )  # fmt: skip
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_report_is_self_contained(evaluated) -> None:
    page = write_report(evaluated).read_text()
    found = Resources()
    found.feed(page)
    assert found.open == []
    # Three pairs, and the lost one once more.
    assert found.tags.count("img") == 8
    assert all(link.startswith(("data:image/webp;base64,", "./images/")) for link in found.links)
    assert "script" not in found.tags
    assert "url(" not in page
    assert "@import" not in page
    assert "&lt;script&gt;cat" in page
    assert "a cat &lt;b&gt;" in page


def test_report_says_what_happened(evaluated) -> None:
    page = write_report(evaluated, evaluated / "other.html", title="Mine").read_text()
    assert "<h1>Mine</h1>" in page
    assert "90.0 %" in page
    assert "McNemar p &lt; 0.0001" in page
    assert "not measured" in page
    assert "Lost (1)" in page
    assert 'class="after good"' in page  # the erased cat
    assert 'class="after bad"' in page  # the lost dog
    assert 'class="after unknown"' in page  # the gun that was not judged
    assert page.count('class="veil"') == 1
    assert "prefers-color-scheme: dark" in page
    assert "image-rendering: pixelated" in page
