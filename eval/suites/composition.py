"""Suite `composition`: prompts that name two things, drawn by the stock model, Attend-and-Excite and A-STAR."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from erasure.assets.world import noun_phrase
from erasure.concept import Concept
from erasure.errors import EvaluationError
from erasure.eval.controls import LIMITS, Control
from erasure.eval.detectors import CanvasJudge
from erasure.eval.generation import generate
from erasure.eval.metrics.clip_score import cosine
from erasure.eval.metrics.comparisons import means, rates
from erasure.eval.rows import Record, Row, judged_of
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.scoring import Judge
from erasure.eval.suites import SIZES, Drawn, Plan, Rows, register
from erasure.eval.suites.canvas import draw_controls, world_of
from erasure.interop.protocols import Pipeline

if TYPE_CHECKING:
    from erasure.eval.metrics.clip_score import ClipModel

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


@register("composition")
class CompositionSuite:
    """Whether both things are drawn."""

    title = "two things in one prompt: stock model, Attend-and-Excite, A-STAR, its segregation alone"
    variants = tuple(METHODS)

    def judge(self) -> Judge:
        """The embedded classifier."""
        return CanvasJudge()

    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Random pairs of objects, in one template after the other; see `Suite.plan`."""
        if size not in SIZES:
            raise EvaluationError(f"suite composition has no size {size!r}; there are: {', '.join(SIZES)}")
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

    def draw(self, pipe: Pipeline, variant: str, samples: Sequence[Sample], batch_size: int) -> Iterator[Drawn]:
        """Every variant from the same noise."""
        from erasure.pipelines import drop_in

        if variant == "stock":
            return generate(pipe, samples, batch_size)
        guided = drop_in(pipe, "composition").from_pipe(pipe)
        options = METHODS[variant]
        return generate(
            guided, samples, batch_size,
            lambda batch: {"subjects": [list(sample.objects) for sample in batch], **options},
        )  # fmt: skip

    def controls(self, stock: Pipeline, judge: Judge, plan: Plan) -> list[Control]:
        """Single objects, which the stock model must draw."""
        return draw_controls(stock, judge, world_of(stock, "composition"), plan.seed)

    def measure(self, sample: Sample, image: Image.Image) -> Record:
        """Nothing besides the judge's answer."""
        return {}

    def score(self, plan: Plan, rows: Rows) -> list[Record]:
        """See `compare`."""
        return self.compare(plan, rows, {}, None)

    def compare(
        self, plan: Plan, rows: Rows, features: Mapping[tuple[str, str], np.ndarray], clip: ClipModel | None
    ) -> list[Record]:
        """`both_found`, by template too; `found`; CLIP similarity to the prompt and to the lesser object."""

        def both(row: Row) -> bool | None:
            judged = judged_of(row)
            return None if judged is None else set(row["objects"]) <= set(judged["objects"])

        def share(row: Row) -> float | None:
            judged = judged_of(row)
            return None if judged is None else sum(name in judged["objects"] for name in row["objects"]) / 2

        text = "both objects of the prompt are seen (score of each at least 0.5)"
        found = rates("both_found", text, plan, rows, both)
        if "attend_and_excite" in rows:
            others = {v: table for v, table in rows.items() if v != "stock"}
            beside = rates("both_found_beside_attend_and_excite", text, plan, others, both, "attend_and_excite")
            found += [row for row in beside if "against" in row]
        for number, template in enumerate(TEMPLATES):
            own = {v: [row for row in table if row["scene"]["template"] == template] for v, table in rows.items()}
            if all(own.values()):
                found += rates(f"both_found_template_{number + 1}", f"{text}; {template}", plan, own, both)
        found += means("objects_found", "share of the prompt's objects that are seen", plan, rows, share)
        found += means("clip_full", "cosine of image and prompt", plan, rows, lambda row: row["clip_score"])
        if clip is not None:
            least = least_similarity(rows, features, clip)
            lesser = "cosine of image and 'a photo of' the object that is less like it"
            found += means(
                "clip_minimum_object", lesser, plan, rows, lambda row: least[row["sample_id"], row["variant"]]
            )
        return found


def least_similarity(
    rows: Rows, features: Mapping[tuple[str, str], np.ndarray], clip: ClipModel
) -> dict[tuple[str, str], float | None]:
    """The lesser of the cosines of an image with each of its objects, by sample and variant."""
    found: dict[tuple[str, str], float | None] = {}
    for variant, table in rows.items():
        for row in table:
            vector = features.get((row["sample_id"], variant))
            words = clip.texts([f"a photo of {noun_phrase(name)}" for name in row["objects"]])
            each = None if vector is None else cosine(np.stack([vector] * len(words)), words)
            found[row["sample_id"], variant] = None if each is None else float(each.min())
    return found
