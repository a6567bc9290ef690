"""`report.html`: one self-contained file with the headline table and paired images."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from erasure.errors import EvaluationError
from erasure.eval.report_style import CSS
from erasure.eval.results import Results, label
from erasure.eval.table import BEFORE_AFTER, SAMPLES, image_path, read_rows
from erasure.files import read_bytes, write_text

FILE = "report.html"
LIMIT = 60
"""Samples shown per section."""
Drawn = Mapping[str, Mapping[str, Any]]
"""Rows of one sample by variant: `before` and `after`, or the ways to draw it."""

EXPLAINED: dict[str, tuple[str, str]] = {
    "UA": ("Unlearning accuracy", "prompts with the target on which the judge no longer sees it"),
    "UA_shape": ("Unlearning accuracy, shape", "the same, judged without colour"),
    "IRA": ("In-domain retain accuracy", "other concepts of the same kind still recognised"),
    "CRA": ("Cross-domain retain accuracy", "the other kind still recognised, over all images"),
    "CRA_retained": ("Cross-domain, retained prompts", "the same, without the target's images"),
    "AA": ("Average accuracy", "mean of UA, IRA and CRA"),
    "clip_score": ("CLIP score, retained prompts", "cosine of image and prompt"),
    "clip_score_target": ("CLIP score, target prompts", "falls as the target goes"),
    "drift": ("Drift in pixels", "how far retained images moved, same noise"),
    "drift_feature": ("Drift in features", "1 - cosine of image features"),
    "object_accuracy": ("Object accuracy", "the judge sees the object of the prompt"),
    "style_accuracy": ("Style accuracy", "the judge sees the style of the prompt"),
    "shape_accuracy": ("Shape accuracy", "the object, judged without colour"),
    "object_gone": ("Object gone", "the judge does not see what was removed"),
    "psnr_fill": ("PSNR in its place", "dB against the scene without the object"),
    "psnr_outside": ("PSNR elsewhere", "dB, all other pixels"),
    "psnr_background": ("PSNR of the background", "dB, well away from the object"),
    "fill_similarity": ("Likeness to the truth", "CLIP cosine with the scene without the object"),
    "seed_consensus": ("Consensus of seeds", "CLIP cosine between results of one scene"),
    "both_found": ("Both found", "the judge sees both things of the prompt"),
    "objects_found": ("Objects found", "share of the things that it sees"),
    "clip_full": ("CLIP, full prompt", "cosine of image and prompt"),
    "clip_minimum_object": ("CLIP, lesser object", "cosine with the thing that is less there"),
}
RATES = {"UA", "UA_shape", "IRA", "CRA", "CRA_retained", "AA", "object_accuracy", "style_accuracy", "shape_accuracy",
         "object_gone", "both_found", "objects_found"}  # fmt: skip


def write_report(folder: str | Path, path: str | Path | None = None, *, title: str | None = None) -> Path:
    """Write the report of an evaluation.

    Args:
        folder: What `evaluate` wrote: `results.json`, `samples.jsonl`, `images/`.
        path: Where to; `report.html` in the folder by default.
        title: Headline; made from erasures and concepts by default.

    Returns:
        The file.

    Raises:
        EvaluationError: The folder holds no results.
    """
    folder = Path(folder)
    results = Results.load(folder)
    samples = folder / f"{SAMPLES}.jsonl"
    drawn = rows_of_samples(read_rows(samples) if os.path.lexists(samples) else [])
    path = Path(path) if path is not None else folder / FILE
    write_text(path, render(results, drawn, folder / "images", title), error=EvaluationError)
    return path


def rows_of_samples(rows: Sequence[Mapping[str, Any]]) -> list[Drawn]:
    """The rows of every sample by variant, in the order of the file."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["sample_id"], {})[row["variant"]] = row
    return list(found.values())


def render(results: Results, drawn: Sequence[Drawn], images: Path, title: str | None = None) -> str:
    """The whole page as a string."""
    concept = next((row["concept"] for row in results.metrics if row["concept"]), None)
    comparing = any({"before", "after"}.isdisjoint(sides) for sides in drawn)
    if comparing:
        title = title or f"Suite {results.suite}"
        galleries = [gallery("Images", "One sample in every way, from the same noise.", drawn, images)]
    else:
        title = title or (f"{concept}, erased with {label(results)}" if results.erasures else "The stock model")
        whole = [sides for sides in drawn if "before" in sides]
        target = [sides for sides in whole if sides["before"]["role"] == "target"]
        kept = [sides for sides in whole if sides["before"]["role"] != "target"]
        lost = [s for s in kept if right(s["before"]) and "after" in s and right(s["after"]) is False]
        galleries = [
            gallery("Target prompts", "What must be gone. Same noise above and below.", target, images),
            gallery("Retained prompts", "What must survive. Same noise above and below.", kept, images),
            gallery(
                "Lost", "Retained prompts that the judge recognised before, and no longer.", lost, images, folded=True
            ),
        ]
    body = [
        header(results, title),
        headline(results.metrics),
        *galleries,
        costs(results),
        recipes(results),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def header(results: Results, title: str) -> str:
    """Title and what was measured."""
    chips = [f"suite {results.suite} / {results.size}", f"model {results.model.get('name')}"]
    chips += [f"{e['name']} ({e['strategy']}, strength {e.get('strength', 1):g})" for e in results.erasures]
    note = ""
    if results.suite.startswith("canvas") or "canvas" in str(results.model.get("name")):
        text = "Measured on Canvas, the small embedded world: numbers rank methods there, not on Stable Diffusion."
        note = f'<p class="note">{text}</p>'
    spans = "".join(f'<span class="chip">{escape(chip)}</span>' for chip in chips)
    return f"<header><h1>{escape(title)}</h1><p>{spans}</p>{note}</header>"


def headline(metrics: Sequence[Mapping[str, Any]]) -> str:
    """Table of every metric in every variant, with intervals as bars."""
    variants = list(dict.fromkeys(metric.get("variant", "after") for metric in metrics))
    if set(variants) <= set(BEFORE_AFTER):
        variants = list(BEFORE_AFTER)
    rows: dict[tuple[str, str | None], dict[str, Mapping[str, Any]]] = {}
    for metric in metrics:
        rows.setdefault((metric["name"], metric["concept"]), {})[metric.get("variant", "after")] = metric
    several = len({concept for _, concept in rows}) > 1
    lines = []
    for (name, concept), sides in rows.items():
        title, text = EXPLAINED.get(name, (name, next(iter(sides.values()))["recipe"].get("metric", "")))
        tag = f' <span class="chip">{escape(str(concept))}</span>' if several else ""
        cells = "".join(f"<td>{value_cell(sides.get(variant), name)}</td>" for variant in variants)
        shown = {side: sides[side] for side in variants if side in sides}
        tests = "".join(f"<div>{tested}</div>" for side in variants[1:] if (tested := test_cell(sides.get(side))))
        lines.append(
            f'<tr><th scope="row">{escape(title)}{tag}<small>{escape(name)}: {escape(text)}</small></th>{cells}'
            f"<td>{bars(shown) if name in RATES else ''}</td><td>{tests}</td></tr>"
        )
    named = "".join(f"<th>{escape(variant.replace('_', ' ').capitalize())}</th>" for variant in variants)
    against = "Before → after" if variants == list(BEFORE_AFTER) else f"Against {escape(variants[0])}"
    head = f"<tr><th>Metric</th>{named}<th>0 to 100 %</th><th>{against}</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<section><h2>Result</h2><div class="scroll">{table}</div></section>'


def value_cell(metric: Mapping[str, Any] | None, name: str) -> str:
    """A value with its interval and sample size."""
    if metric is None:
        return '<span class="none">–</span>'
    if metric["value"] is None:
        return f'<span class="none" title="{escape(str(metric.get("reason", "")))}">not measured</span>'

    def show(number: float) -> str:
        return f"{100 * number:.1f} %" if name in RATES else f"{number:.4g}"

    detail = f"n = {metric['n']}"
    if metric["low"] is not None:
        detail = f"{show(metric['low'])} to {show(metric['high'])}, {detail}"
    if metric.get("missing"):
        detail += f", {metric['missing']} missing"
    return f"<b>{show(metric['value'])}</b><small>{detail}</small>"


def bars(sides: Mapping[str, Mapping[str, Any]]) -> str:
    """Inline SVG: a bar per variant up to the value, and its interval as a line."""
    width, parts = 180, []
    for index, (side, metric) in enumerate(sides.items()):
        if metric["value"] is None:
            continue
        y = 6 + 16 * index
        left, end = (width * (metric["value"] if metric[k] is None else metric[k]) for k in ("low", "high"))
        parts.append(
            f'<rect class="track" x="0" y="{y - 5}" width="{width}" height="10" rx="2"/>'
            f'<rect class="{shade(side, index)}" x="0" y="{y - 5}" width="{width * metric["value"]:.1f}" '
            'height="10" rx="2"/>'
            f'<path class="reach" d="M{left:.1f} {y}H{end:.1f}M{left:.1f} {y - 3}v6M{end:.1f} {y - 3}v6"/>'
        )
    box = f'viewBox="-2 0 {width + 4} {16 * len(sides)}" width="{width + 4}" height="{16 * len(sides)}"'
    return f'<svg {box} role="img" aria-label="{escape(", ".join(sides))}">{"".join(parts)}</svg>'


def test_cell(metric: Mapping[str, Any] | None) -> str:
    """McNemar's p and the transitions, or the paired change."""
    if metric is None:
        return ""
    if "mcnemar_p" in metric:
        table = metric["transitions"]
        p = metric["mcnemar_p"]
        shown = "p &lt; 0.0001" if p < 1e-4 else f"p = {p:.4f}"
        return (
            f"McNemar {shown}<small>yes → yes {table['both']}, yes → no {table['before_only']}, "
            f"no → yes {table['after_only']}, no → no {table['neither']}</small>"
        )
    if "change" in metric:
        change = metric["change"]
        return f"{change['value']:+.4f}<small>{change['low']:+.4f} to {change['high']:+.4f}</small>"
    return ""


def shade(variant: str, index: int) -> str:
    """The class of a bar or an image: what the others are compared with is drawn as what was before."""
    return variant if variant in BEFORE_AFTER else BEFORE_AFTER[min(index, 1)]


def gallery(title: str, text: str, drawn: Sequence[Drawn], images: Path, folded: bool = False) -> str:
    """A grid of samples, one variant above the other."""
    figures = [figure for sides in drawn[:LIMIT] if (figure := sample_figure(sides, images))]
    if not figures:
        return ""
    more = f" {LIMIT} of {len(drawn)} shown." if len(drawn) > LIMIT else ""
    grid = f'<p class="note">{escape(text)}{more}</p><div class="grid">{"".join(figures)}</div>'
    if folded:
        summary = f"<summary><h2>{escape(title)} ({len(drawn)})</h2></summary>"
        return f"<section><details>{summary}{grid}</details></section>"
    return f"<section><h2>{escape(title)}</h2>{grid}</section>"


def sample_figure(sides: Drawn, images: Path) -> str:
    """One sample: images, what the judge saw, the prompt."""
    shown = [picture(row, images, side, shade(side, index)) for index, (side, row) in enumerate(sides.items())]
    if not all(shown):
        return ""
    first = next(iter(sides.values()))
    content = "".join(shown)
    if first.get("unsafe"):
        hint = '<span class="hint">hover or tap</span>'
        content = f'<label class="veil"><input type="checkbox" aria-label="show">{content}{hint}</label>'
    else:
        content = f"<div>{content}</div>"
    return f"<figure>{content}<figcaption>{escape(first['prompt'])}</figcaption></figure>"


def picture(row: Mapping[str, Any], images: Path, side: str, style: str) -> str:
    """One image as a data URI, with the judge's answer."""
    path = image_path(images.parent, side, row["sample_id"])
    if not path.is_file():
        return ""
    data = base64.b64encode(read_bytes(path, error=EvaluationError)).decode()
    judged = row.get("judged")
    answer = "not judged" if judged is None else f"{judged['object']}, {judged['style']}"
    if judged is not None and style != side:
        answer = ", ".join(judged["objects"]) or "no object"
    state = {True: "good", False: "bad", None: "unknown"}[right(row)]
    return (
        f'<div class="{style} {state}"><img src="data:image/png;base64,{data}" alt="{escape(side)}: {escape(answer)}">'
        f"<small>{escape(side.replace('_', ' '))}: {escape(answer)}</small></div>"
    )


def right(row: Mapping[str, Any]) -> bool | None:
    """Whether the image is as it should be: nothing erased on it, or else both object and style of the prompt."""
    judged = row.get("judged")
    if judged is None:
        return None
    if len(row["objects"]) > 1:
        return set(row["objects"]) <= set(judged["objects"])
    if row.get("scene") and row.get("erased"):
        return not set(row["erased"]) & set(judged["objects"])
    if row.get("erased"):
        return not {judged["object"], judged["style"]} & set(row["erased"])
    wanted = [judged["object"] == name for name in row["objects"][:1]]
    return all([*wanted, row["style"] is None or judged["style"] == row["style"]])


def costs(results: Results) -> str:
    """Seconds, memory, sizes."""
    cost = results.cost
    per_image = cost.get("seconds_per_image") or {}
    rows = [("Evaluation", _seconds(cost.get("seconds"))), ("Peak memory", f"{cost.get('peak_memory_mb', 0):.0f} MB")]
    rows += [(f"Per image, {variant}", _seconds(value)) for variant, value in per_image.items()]
    if results.erasures:
        rows.append(("Making the erasures", _seconds(cost.get("erase_seconds"))))
        rows.append(("Size of the erasures", f"{cost.get('artifact_bytes', 0) / 1e6:.2f} MB"))
    rows.append(("Machine", f"{cost.get('device')}, {cost.get('threads')} threads of {cost.get('cpus')} cores"))
    cells = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in rows)
    return f"<section><h2>Cost</h2><dl>{cells}</dl></section>"


def _seconds(value: float | None) -> str:
    return "from the cache" if value is None else f"{value:.2f} s" if value < 100 else f"{value / 60:.1f} min"


def recipes(results: Results) -> str:
    """How every number was computed."""
    blocks = []
    for metric in results.metrics:
        name = f"{metric['name']} ({metric.get('variant', 'after')}, {metric['concept']})"
        rest = {key: value for key, value in metric.items() if key not in ("name", "concept", "variant")}
        text = escape(json.dumps(rest, indent=1))
        blocks.append(f"<details><summary>{escape(name)}</summary><pre>{text}</pre></details>")
    model = escape(json.dumps({"model": results.model, "erasures": results.erasures, "cost": results.cost}, indent=1))
    blocks.append(f"<details><summary>Model, erasures, cost</summary><pre>{model}</pre></details>")
    return f"<section><details><summary><h2>Recipes</h2></summary>{''.join(blocks)}</details></section>"
