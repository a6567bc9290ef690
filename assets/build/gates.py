"""How surely itd's gates tell every concept of Canvas, on prompts that no strategy has seen."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

import erasure
from erasure.assets.build.concepts import concepts
from erasure.assets.build.measured import Figure, Row, figure
from erasure.assets.world import (
    BACKGROUNDS,
    HELD_OUT_TEMPLATES,
    OBJECTS,
    PAIR_PHRASES,
    STYLES,
    noun_phrase,
)
from erasure.attach import ErasureManager
from erasure.carriers.features import FeatureEdit
from erasure.concept import Concept
from erasure.eval.detectors import CanvasJudge
from erasure.eval.statistics import wilson
from erasure.sae.detection import Detection, detect_concepts

COUNT = 200
"""Prompts of each kind for each concept."""
WITHOUT = "without it"


class Opened(NamedTuple):
    """One kind of prompts, over all concepts."""

    kind: str
    features: float
    """Share of the prompts that open the gate."""
    probe: float
    """Share that the linear probe would open it for."""
    prompts: int


def scene(rng: random.Random, things: str, style: str | None = None) -> str:
    """A prompt about things in a phrasing that the model was not trained on, in a given style or any."""
    templates = [t for t in HELD_OUT_TEMPLATES if style is None or "{style}" in t]
    return rng.choice(templates).format(
        object=things, style=style or rng.choice(STYLES), background=rng.choice(BACKGROUNDS)
    )


def pair(rng: random.Random, first: str, second: str) -> str:
    """Two things in either order."""
    names = [noun_phrase(first), noun_phrase(second)]
    rng.shuffle(names)
    return rng.choice(PAIR_PHRASES).format(left=names[0], right=names[1])


def misspellings(word: str) -> list[str]:
    """A letter left out, doubled, and two swapped, in the middle of a word."""
    i = len(word) // 2
    made = (
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :],
    )
    return [other for other in made if other != word]


def known_misspellings(pipe: erasure.StableDiffusionErasurePipeline) -> dict[str, list[str]]:
    """Those that the stock model draws as what is meant in both of two images."""
    judge = CanvasJudge()
    known: dict[str, list[str]] = {}
    for name in OBJECTS:
        for word in misspellings(name):
            images = [
                pipe(
                    f"{noun_phrase(word)} in noto style", generator=torch.Generator().manual_seed(seed),
                    num_inference_steps=10, guidance_scale=2.0,
                ).images[0]
                for seed in (0, 1)
            ]  # fmt: skip
            if all(answer.object == name for answer in judge(images)):
                known.setdefault(name, []).append(word)
    return known


def prompts(concept: Concept, misspelt: dict[str, list[str]], rng: random.Random) -> dict[str, list[str]]:
    """Prompts with a concept by kind, and prompts without it."""
    name = concept.target
    objects = [other for other in OBJECTS if other != name]
    styles = [other for other in STYLES if other != name]
    draws = range(COUNT)
    if concept.kind == "style":
        found = {
            "unseen phrasings": [scene(rng, noun_phrase(rng.choice(objects)), name) for _ in draws],
            "two objects": [scene(rng, pair(rng, *rng.sample(objects, 2)), name) for _ in draws],
        }
        without = [scene(rng, noun_phrase(rng.choice(objects)), rng.choice(styles)) for _ in draws]
        without += [scene(rng, pair(rng, *rng.sample(objects, 2)), rng.choice(styles)) for _ in draws]
        return {**found, WITHOUT: without}
    found = {
        "unseen phrasings": [scene(rng, noun_phrase(name)) for _ in draws],
        "two objects": [scene(rng, pair(rng, name, rng.choice(objects))) for _ in draws],
    }
    for kind, words in (("synonyms", OBJECTS[name].synonyms), ("misspellings", misspelt.get(name, []))):
        if words:
            found[kind] = [scene(rng, noun_phrase(rng.choice(words))) for _ in draws]
    without = [scene(rng, noun_phrase(rng.choice(objects))) for _ in draws]
    without += [scene(rng, pair(rng, *rng.sample(objects, 2))) for _ in draws]
    return {**found, WITHOUT: without}


def measure(told: bool) -> list[Opened]:
    """Rates over all concepts.

    Args:
        told: Whether the strategy is given the synonyms.
    """
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    misspelt = known_misspellings(pipe)
    counts: dict[str, list[tuple[int, int]]] = {}
    manager = ErasureManager(pipe)
    for concept in concepts():
        synonyms = OBJECTS[concept.target].synonyms if told and concept.target in OBJECTS else ()
        wanted = Concept(concept.target, kind=concept.kind, anchor=concept.anchor, synonyms=synonyms)
        erasure.erase(pipe, wanted, "itd", name="one", progress=False)
        (edit,) = manager.erasures["one"].edits.features.values()
        assert isinstance(edit, FeatureEdit)
        gate = edit.probe_gate.sigmoid().item()
        for kind, texts in prompts(concept, misspelt, random.Random(0)).items():
            found: list[Detection] = [each[concept.target] for each in detect_concepts(manager.pipe, texts)]
            counts.setdefault(kind, []).extend((one.present, (one.probe or 0.0) >= gate) for one in found)
        manager.unload()
    order = [kind for kind in counts if kind != WITHOUT] + [WITHOUT]
    rates = {kind: np.mean(counts[kind], axis=0) for kind in order}
    return [Opened(kind, float(rates[kind][0]), float(rates[kind][1]), len(counts[kind])) for kind in order]


def rows(found: Iterable[Opened]) -> list[Row]:
    """The rates with 95 % intervals."""

    def rate(share: float, prompts: int) -> Figure:
        return figure(wilson(share * prompts, prompts), prompts)

    return [
        {"prompts": each.kind, "features": rate(each.features, each.prompts), "probe": rate(each.probe, each.prompts),
         "n": each.prompts}
        for each in found
    ]  # fmt: skip
