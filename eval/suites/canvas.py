"""Suites `canvas` and `canvas-unseen`: UnlearnCanvas in miniature, on the embedded world whose classes a judge knows.

Every object in every style, captioned "a cat image in noto style", or in phrasings that the model was never trained
on. Numbers rank methods on Canvas, not on Stable Diffusion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

from erasure.assets.world import HELD_OUT_TEMPLATES, noun_phrase
from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval.controls import LIMITS, Control, Controls, listing_controls
from erasure.eval.detectors import CanvasJudge
from erasure.eval.generation import generate
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.scoring import Judge, score
from erasure.eval.sizes import check_size
from erasure.eval.suites import Plan, Rows, Suite, Target, register
from erasure.interop.protocols import Pipeline
from erasure.parsing import ConceptRequest
from erasure.world import World

TEMPLATE = "{object} image in {style} style"
"""The caption of UnlearnCanvas. Its released scripts disagree on article and full stop."""
TARGET_SEEDS = 4
"""Images per caption that holds an object to erase (several objects share them); a style has captions enough."""
FULL_STYLE_SEEDS = 2
"""Images per caption that holds a style to erase, in the full size; every retained caption has one."""
RATES = ("UA", "UA_shape", "IRA", "CRA", "CRA_retained")
METRICS = (
    "object_accuracy", "style_accuracy", "shape_accuracy", *RATES, "IRA_group", "AA", "replaced_by", "unsafe_share",
    "control_seen", "control_unasked", "control_object", "control_style",
    "clip_score", "clip_score_target", "drift", "drift_feature", "fid", "cmmd", "kid",
)  # fmt: skip
QUICK_RETAINED = 48
SMOKE_SAMPLES = 8
"""Of each, target and retained."""


def world_of(pipe: Pipeline, suite: str) -> World:
    """The world that a pipeline's model declares.

    Args:
        pipe: The pipeline.
        suite: Name of the suite, for the message.

    Raises:
        EvaluationError: It declares none. A judge that knows a closed set of classes has an answer for every image, so
            the images of any other model would count as erased.
    """
    world = World.of(pipe)
    if not world.declared:
        name = str(getattr(pipe, "name_or_path", None) or type(pipe).__name__)
        raise EvaluationError(
            f"suite {suite} judges models of the embedded world only, and {name} declares no world: there is no "
            "canvas.json beside its model_index.json. Name a suite on prompts, which takes any model: prompts, with a "
            "CLIP model (clip) or a detector (detectors). Where this one was made from a model of the embedded world, "
            "copy the canvas.json of that one into its folder and load it from there"
        )
    return world


def target_of(world: World, concept: Concept | ConceptRequest) -> Target:
    """The classes that a concept stands for.

    Raises:
        EvaluationError: The world has no such object, style, group or synonym.
    """
    name = concept.target
    found = world.find(name, concept.kind)
    if found is None:
        raise EvaluationError(
            f"suite canvas has no concept {name!r}; objects: {', '.join(world.objects)}; "
            f"styles: {', '.join(world.styles)}; groups: {', '.join(world.groups)}"
        )
    return Target(name, *found)


@register("canvas")
class CanvasSuite(Suite):
    """UA, IRA, CRA and their mean on the embedded world."""

    name = "canvas"
    title = "UnlearnCanvas in miniature: every object in every style of the embedded world"
    metrics = METRICS
    tested_together = RATES
    templates: tuple[str, ...] = (TEMPLATE,)

    def judge(self) -> Judge:
        """The embedded classifier."""
        return CanvasJudge()

    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Expand to samples; see `Suite.plan`."""
        check_size(size, f"suite {self.name}")
        world = world_of(pipe, self.name)
        targets = tuple(target_of(world, concept) for concept in world.requests(concepts))
        samples = _samples(world, targets, size, seed, self.templates)
        classes = hashlib.sha256(json.dumps([world.objects, world.styles]).encode()).hexdigest()[:12]
        recipe = {
            "suite": self.name,
            "size": size,
            "seed": seed,
            "prompt": " | ".join(self.templates),
            "classes": f"{len(world.objects)} objects x {len(world.styles)} styles ({classes})",
            "num_inference_steps": world.num_inference_steps,
            "guidance_scale": world.guidance_scale,
            "resolution": f"{world.side}x{world.side}",
            "controls": LIMITS,
        }
        return Plan(self.name, size, seed, targets, samples, recipe, world.unsafe, tuple(world.groups.values()))

    def controls(self, stock: Pipeline, judge: Judge, plan: Plan, rows: Rows) -> list[Control]:
        """What the judge says of the suite's own images of the stock model; nothing where nothing is erased."""
        return Controls(plan, rows.get("before", ())).all() if plan.targets else []


@register("canvas-unseen")
class UnseenCanvasSuite(CanvasSuite):
    """The same in phrasings that neither the model nor any strategy was trained on, in turn.

    Only those that the stock model follows: of "a blue background with a cat in noto style" it draws one in five.
    """

    name = "canvas-unseen"
    title = "the same in phrasings that the model was never trained on"
    templates = tuple(
        template for template in HELD_OUT_TEMPLATES if "{style}" in template and "{background}" not in template
    )


def draw_controls(stock: Pipeline, judge: Judge, world: World, seed: int) -> list[Control]:
    """Draw objects one by one with the stock model, and ask the judge for them.

    Args:
        stock: The model without erasures.
        judge: The detector.
        world: What the model declares.
        seed: Chooses the objects and their noise.
    """
    drawn = [sample for sample in _samples(world, (), "smoke", seed, (TEMPLATE,)) if sample.objects]
    rows: list[Record] = []
    for batch, images in generate(stock, drawn):
        scores, _ = score(batch, images, judge, None)
        rows += [{**sample.row(), **scored} for sample, scored in zip(batch, scores, strict=True)]
    return listing_controls(rows)


def _samples(
    world: World, targets: Sequence[Target], size: str, seed: int, templates: Sequence[str]
) -> tuple[Sample, ...]:
    """The answer set, in the order of the world.

    It is stratified: target and retained captions are drawn at different rates, and the weights undo that, so that a
    rate over the whole set estimates the rate over one with as many images of every caption.
    """
    erased: dict[str, set[str]] = {"object": set(), "style": set()}
    for target in targets:
        erased[target.domain].update(target.members)
    cells = [(name, style) for name in world.objects for style in world.styles]
    # A cell holds an erased object, an erased style, or nothing erased.
    stratum = {
        c: "object" if c[0] in erased["object"] else "style" if c[1] in erased["style"] else None for c in cells
    }
    counts = _counts(cells, stratum, size, seed)
    share = {}
    for kind in set(stratum.values()):
        members = [cell for cell in cells if stratum[cell] == kind]
        drawn = sum(counts[cell] for cell in members)
        share[kind] = len(members) / drawn if drawn else 0.0
    total, drawn = len(cells), sum(counts.values())
    samples = []
    for number, (name, style) in enumerate(cells):
        for index in range(counts[name, style]):
            turn = number + index
            prompt = templates[turn % len(templates)].format(object=noun_phrase(name), style=style)
            samples.append(
                Sample(
                    sample_id=f"{name}-{style}-{index}".replace(" ", "_"),
                    prompt=prompt,
                    seed=sample_seed(seed, prompt, index),
                    role="target" if stratum[name, style] else "retain",
                    objects=(name,),
                    style=style,
                    erased=tuple(w for w, gone in ((name, erased["object"]), (style, erased["style"])) if w in gone),
                    weight=round(share[stratum[name, style]] * drawn / total, 6),
                    unsafe=name in world.unsafe,
                    num_inference_steps=world.num_inference_steps,
                    guidance_scale=world.guidance_scale,
                    height=world.side,
                    width=world.side,
                )
            )
    return tuple(samples)


def _counts(
    cells: Sequence[tuple[str, str]], stratum: dict[tuple[str, str], str | None], size: str, seed: int
) -> dict[tuple[str, str], int]:
    """Images of every cell (object, style)."""
    retained = [cell for cell in cells if stratum[cell] is None]
    target = [cell for cell in cells if stratum[cell] is not None]
    counts = dict.fromkeys(cells, 0)
    if size == "smoke":
        chosen = _spread(target, SMOKE_SAMPLES, seed)
        kept = _spread(retained, SMOKE_SAMPLES if target else 2 * SMOKE_SAMPLES, seed + 1)
        return counts | dict.fromkeys(chosen, 1) | dict.fromkeys(kept, 1)
    objects = {name for name, style in target if stratum[name, style] == "object"}
    of_style = FULL_STYLE_SEEDS if size == "full" else 1
    for cell in target:
        counts[cell] = max(1, TARGET_SEEDS // len(objects)) if stratum[cell] == "object" else of_style
    kept = retained if size == "full" else _spread(retained, QUICK_RETAINED, seed + 1)
    return counts | dict.fromkeys(kept, 1)


def _spread(cells: Sequence[tuple[str, str]], count: int, seed: int) -> list[tuple[str, str]]:
    """Draw cells without replacement such that objects and styles come up as evenly as possible."""
    rng = np.random.default_rng(seed)
    pool = [cells[i] for i in rng.permutation(len(cells))]
    chosen: list[tuple[str, str]] = []
    used: dict[str, int] = {}
    while pool and len(chosen) < count:
        cell = min(pool, key=lambda c: used.get(c[0], 0) + used.get(c[1], 0) / 8)
        pool.remove(cell)
        chosen.append(cell)
        for name in cell:
            used[name] = used.get(name, 0) + 1
    return chosen
