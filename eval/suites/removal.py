"""Suite `removal`: objects taken out of Canvas scenes, whose background behind them is known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from erasure.assets.scenes import RenderedScene, Scene, render, sample_scene
from erasure.concept import Concept
from erasure.eval.controls import LIMITS, Control
from erasure.eval.detectors import CanvasJudge
from erasure.eval.generation import batches
from erasure.eval.metrics.outcomes import collect
from erasure.eval.rows import Record, Row
from erasure.eval.samples import Sample, sample_seed
from erasure.eval.scoring import Judge, score
from erasure.eval.sizes import check_size
from erasure.eval.suites import Plan, Rows, Suite, register
from erasure.eval.suites.canvas import draw_controls, world_of
from erasure.eval.variants import Drawn, Variant
from erasure.images import SAME_COLOUR, flaw
from erasure.interop import scopes
from erasure.interop.protocols import Pipeline

SCENES = {"smoke": 4, "quick": 24, "full": 120}
SEEDS = 2
"""Results for each scene, for how alike they are."""
MARGIN = 8
"""Pixels around the mask that do not count as background: the latent pixels it touches, and the soft edge."""
NEAR = 2 * SAME_COLOUR
"""Steps of 256 by which the colour of a bare background may miss the one that was given."""
METHODS: dict[str, Record] = {
    "inpainting": {"redirect": False},
    "attentive_eraser": {},
    "aas_only": {"removal_guidance_scale": 1.0},
    "sarg_only": {"suppression_scale": 1.0},
}
"""`aas_only` takes the redirected prediction as it is, `sarg_only` leaves out the suppression of similarity: guidance
needs a redirected branch."""


MOST = 60.0
"""Decibels that equal pixels count as."""


def remove(
    pipe: Pipeline, samples: Sequence[Sample], batch_size: int, options: Record
) -> Iterator[Drawn]:  # fmt: skip
    """Take the object out of every sample's scene, always from the same noise."""
    from erasure.pipelines import drop_in

    remover = drop_in(pipe, "object-removal").from_pipe(pipe)
    for batch in batches(samples, batch_size):
        drawn = [plate(sample) for sample in batch]
        with scopes.quiet(remover):
            images = remover(
                [Image.fromarray(each.image.image) for each in drawn],
                [torch.from_numpy(each.mask) for each in drawn],
                generator=[torch.Generator("cpu").manual_seed(sample.seed) for sample in batch],
                num_inference_steps=batch[0].num_inference_steps, **options,
            ).images  # fmt: skip
        yield batch, images


@register("removal")
class RemovalSuite(Suite):
    """Whether an object is gone, and what is in its place."""

    title = "objects taken out of scenes whose background is known: inpainting, Attentive Eraser and its parts"
    metrics = (
        "object_gone", "psnr_fill", "psnr_outside", "psnr_background", "fill_similarity", "seed_consensus",
        "control_seen", "control_unasked", "control_scene", "control_clean",
    )  # fmt: skip
    variants = tuple(Variant(name, partial(remove, options=options)) for name, options in METHODS.items())
    of_concepts = False
    strict_controls = True

    def judge(self) -> Judge:
        """The embedded classifier."""
        return CanvasJudge()

    def plan(self, pipe: Pipeline, concepts: Sequence[str | Concept], size: str, seed: int) -> Plan:
        """Random scenes of one and two objects, in every style; one object of each is removed; see `Suite.plan`."""
        check_size(size, "suite removal")
        world = world_of(pipe, "removal")
        rng = np.random.default_rng(seed)
        samples = []
        for number in range(SCENES[size]):
            scene = sample_scene(rng, pairs=0.5, empty=0.0)
            target = int(rng.integers(len(scene.objects)))
            facts = {
                "style": scene.style, "background": scene.background, "objects": list(scene.objects),
                "offsets": [list(offset) for offset in scene.offsets], "target": target,
            }  # fmt: skip
            name = f"{number:03d}-{scene.objects[target]}-{scene.style}".replace(" ", "_")
            for index in range(SEEDS):
                samples.append(
                    Sample(
                        sample_id=f"{name}-{index}", prompt=f"scene {number}: {' and '.join(scene.objects)}",
                        seed=sample_seed(seed, name, index), role="target", objects=(scene.objects[target],),
                        erased=(scene.objects[target],), style=None, scene=facts, height=world.side,
                        width=world.side, num_inference_steps=world.num_inference_steps, guidance_scale=1.0,
                    )
                )  # fmt: skip
        recipe = {
            "suite": "removal", "size": size, "seed": seed, "masks": "true masks of the objects",
            "num_inference_steps": world.num_inference_steps, "methods": METHODS,
            "resolution": f"{world.side}x{world.side}", "controls": LIMITS,
        }  # fmt: skip
        return Plan("removal", size, seed, (), tuple(samples), recipe)

    def controls(self, stock: Pipeline, judge: Judge, plan: Plan, rows: Rows) -> list[Control]:
        """Single objects, which the stock model must draw; and the scenes, with the object and without it."""
        scenes = {sample.prompt: sample for sample in plan.samples}.values()
        seen: dict[bool, list[tuple[Row, str, bool | None]]] = {True: [], False: []}
        for sample in scenes:
            drawn = plate(sample)
            given = {True: drawn.image.image, False: drawn.clean}
            pictures = [Image.fromarray(pixels) for pixels in given.values()]
            scores, _ = score([sample] * 2, pictures, judge, None, self.plain)
            for there, scored in zip(given, scores, strict=True):
                judged = scored["judged"]
                hit = None if judged is None else sample.objects[0] in judged["objects"]
                seen[there].append((sample.row(), sample.sample_id, hit))
        with_it, without = (collect(items) for items in seen.values())
        return [
            *draw_controls(stock, judge, world_of(stock, "removal"), plan.seed),
            Control("control_scene", None, with_it, True, "the judge sees the object in the scene that is given"),
            Control("control_clean", None, without, False, "the judge sees the object in the scene without it"),
        ]

    def plain(self, sample: Sample, image: Image.Image) -> bool:
        """Whether an image of one colour is the background behind the object: that is of this colour as well."""
        clean = plate(sample).clean
        if flaw(Image.fromarray(clean)) is None or image.size != clean.shape[1::-1]:
            return False
        here, there = (np.median(np.asarray(part), axis=(0, 1)) for part in (image.convert("RGB"), clean))
        return bool((np.abs(here - there) <= NEAR).all())

    def measure(self, sample: Sample, image: Image.Image) -> Record:
        """PSNR against the scene without the object: in its place, everywhere else, and well away from it."""
        truth = plate(sample)
        mask = torch.from_numpy(truth.mask)
        near = torch.nn.functional.max_pool2d(mask[None, None].float(), 2 * MARGIN + 1, 1, MARGIN)[0, 0] > 0
        made, clean = (np.asarray(part, dtype=np.float64) / 255 for part in (image.convert("RGB"), truth.clean))
        error = torch.from_numpy(((made - clean) ** 2).mean(-1))
        places = {"psnr_fill": mask, "psnr_outside": ~mask, "psnr_background": ~near}
        return {name: decibels(error[place]) for name, place in places.items()}


class RemovalScene(NamedTuple):
    """A scene with what is to be removed, and without it."""

    image: RenderedScene
    clean: np.ndarray
    """`(h, w, 3)` uint8: the scene without the object."""
    mask: np.ndarray
    """`(h, w)` bool: the object's pixels."""


def plate(sample: Sample) -> RemovalScene:
    """Render a sample's scene."""
    facts = sample.scene
    assert facts is not None
    offsets = tuple((x, y) for x, y in facts["offsets"])
    return _plate(tuple(facts["objects"]), facts["style"], facts["background"], offsets, facts["target"])


@cache
def _plate(
    objects: tuple[str, ...], style: str, background: str, offsets: tuple[tuple[int, int], ...], target: int
) -> RemovalScene:
    scene = Scene(objects, style, background, offsets)
    drawn = render(scene)
    return RemovalScene(drawn, render(scene, without=target).image, drawn.masks[target])


def decibels(error: torch.Tensor) -> float | None:
    """Peak signal-to-noise ratio of squared errors of pixels in 0-1; `None` without pixels."""
    if not error.numel():
        return None
    return min(MOST, -10 * math.log10(max(float(error.mean()), 1e-12)))
