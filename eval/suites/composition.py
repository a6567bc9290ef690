"""Suite `composition`: prompts that name two things, drawn by the stock model, Attend-and-Excite and A-STAR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations

import numpy as np

from erasure.assets.world import noun_phrase
from erasure.concept import Concept
from erasure.eval.controls import LIMITS, Control
from erasure.eval.detectors import CanvasJudge
from erasure.eval.generation import generate
from erasure.eval.rows import Record
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.scoring import Judge
from erasure.eval.sizes import check_size
from erasure.eval.suites import Plan, Rows, Suite, register
from erasure.eval.suites.canvas import draw_controls, world_of
from erasure.eval.variants import Drawn, Variant
from erasure.interop.protocols import Pipeline

TEMPLATES = ("{left} and {right}", "{bare_left} and {bare_right}")
"""With articles, as the model was trained on, and without, as it was not."""
SAMPLES = {"smoke": 8, "quick": 48, "full": 240}
CANVAS: Record = {"loss": "a_star", "grid": 8, "step_size": 100.0}
METHODS: dict[str, Record] = {
    "stock": {},
    "attend_and_excite": {"loss": "attend_and_excite", "grid": 16, "refine": {}},
    "a_star": {**CANVAS, "segregation_until": 0.4, "retention_until": 0.2},
    "segregation": {**CANVAS, "retention_until": 0.0},
}
"""Each as it did best on 240 other prompts of the embedded model. It draws in 10 steps from pure noise, where a map
that is held from the first step on is that of noise: so A-STAR's retention ends early, and `segregation` is A-STAR
without it. Attend-and-Excite goes without moving latents again and again at three of its steps: that takes eight times
as long, and found no more pairs."""


def compose(
    pipe: Pipeline, samples: Sequence[Sample], batch_size: int, options: Record
) -> Iterator[Drawn]:  # fmt: skip
    """Draw both things of every prompt under guidance, always from the same noise."""
    from erasure.pipelines import drop_in

    guided = drop_in(pipe, "composition").from_pipe(pipe)
    return generate(
        guided, samples, batch_size, lambda batch: {"subjects": [list(sample.objects) for sample in batch], **options}
    )


@register("composition")
class CompositionSuite(Suite):
    """Whether both things are drawn."""

    title = "two things in one prompt: stock model, Attend-and-Excite, A-STAR, its segregation alone"
    metrics = (
        "both_found", "both_found_beside_attend_and_excite", "both_found_template_1", "both_found_template_2",
        "objects_found", "clip_full", "clip_minimum_object", "control_seen", "control_unasked",
    )  # fmt: skip
    variants = tuple(
        Variant(name, partial(compose, options=options) if options else None) for name, options in METHODS.items()
    )
    of_concepts = False
    strict_controls = True

    def judge(self) -> Judge:
        """The embedded classifier."""
        return CanvasJudge()

    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Random pairs of objects, in one template after the other; see `Suite.plan`."""
        check_size(size, "suite composition")
        world = world_of(pipe, "composition")
        rng = np.random.default_rng(seed)
        pairs = list(combinations(world.objects, 2))
        samples = []
        for number in range(SAMPLES[size]):
            names = pairs[rng.integers(len(pairs))]
            left, right = names if rng.random() < 0.5 else names[::-1]
            words = {"left": noun_phrase(left), "right": noun_phrase(right), "bare_left": left, "bare_right": right}
            prompt = TEMPLATES[number % len(TEMPLATES)].format(**words)
            samples.append(
                Sample(
                    sample_id=f"{number:03d}-{left}-{right}".replace(" ", "_"), prompt=prompt,
                    seed=sample_seed(seed, prompt, number), role="pair", objects=(left, right),
                    num_inference_steps=world.num_inference_steps, guidance_scale=world.guidance_scale,
                    height=world.side, width=world.side, scene={"template": TEMPLATES[number % len(TEMPLATES)]},
                )
            )  # fmt: skip
        recipe = {
            "suite": "composition", "size": size, "seed": seed, "prompt": " | ".join(TEMPLATES), "methods": METHODS,
            "num_inference_steps": world.num_inference_steps, "guidance_scale": world.guidance_scale,
            "resolution": f"{world.side}x{world.side}", "controls": LIMITS,
        }  # fmt: skip
        return Plan("composition", size, seed, (), tuple(samples), recipe)

    def controls(self, stock: Pipeline, judge: Judge, plan: Plan, rows: Rows) -> list[Control]:
        """Single objects, which the stock model must draw."""
        return draw_controls(stock, judge, world_of(stock, "composition"), plan.seed)
