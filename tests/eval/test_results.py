"""`results.json`, comparisons and the report."""

from __future__ import annotations

import json
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
    assert all(link.startswith("data:image/png;base64,") for link in found.links)
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
