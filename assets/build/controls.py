"""Controls of itd: as many features behind the concept's own gate, but random ones, or those of another concept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import erasure
from erasure import assets
from erasure.artifact import Erasure
from erasure.assets.build.concepts import concepts
from erasure.assets.build.measured import Row, figure
from erasure.attach import ErasureManager
from erasure.backbones import text_towers
from erasure.carriers.edits import Edits
from erasure.carriers.features import FeatureEdit
from erasure.eval import evaluate
from erasure.eval.statistics import wilson
from erasure.sae import FeatureSlice, load, read_prompts
from erasure.sae.gates import read_words, strongest


class Control(NamedTuple):
    """What one choice of features does, over all concepts."""

    features: str
    erased: float
    """UA: share of the concept's images that do not show it."""
    images: int


def with_edited(made: Erasure, rows: FeatureSlice, gain: Tensor) -> Erasure:
    """An erasure that changes other latents behind the same gate; those that it counts stay."""
    ((key, edit),) = made.edits.features.items()
    assert isinstance(edit, FeatureEdit)
    count, old = rows.w_enc.shape[1], edit.w_enc.shape[1]
    half = FeatureSlice(*(part.to(torch.float16) for part in rows))
    joined = edit._replace(
        w_enc=torch.cat([edit.w_enc, half.w_enc], 1),
        b_enc=torch.cat([edit.b_enc, half.b_enc]),
        w_dec=torch.cat([edit.w_dec, half.w_dec]),
        threshold=torch.cat([edit.threshold, half.threshold]),
        gain=torch.cat([edit.gain, gain.to(torch.float16)]),
        offset=torch.cat([edit.offset, torch.zeros(count, dtype=torch.float16)]),
        edits=torch.stack([torch.zeros(count, dtype=torch.int64), torch.arange(old, old + count)]),
    )
    return Erasure(made.config, Edits(features={key: joined}))


def edited_rows(made: Erasure) -> tuple[FeatureSlice, Tensor]:
    """The latents that an erasure of one concept changes, and by how much."""
    (edit,) = made.edits.features.values()
    assert isinstance(edit, FeatureEdit)
    chosen = edit.edits[1]
    part = FeatureSlice(edit.w_enc[:, chosen], edit.b_enc[chosen], edit.w_dec[chosen], edit.threshold[chosen])
    return part, edit.gain[chosen]


def with_features_of(made: Erasure, other: Erasure) -> Erasure:
    """Edits the features of another concept instead, as many as there are at most."""
    count = len(edited_rows(made)[1])
    rows, gain = edited_rows(other)
    return with_edited(made, FeatureSlice(rows.w_enc[:, :count], *(part[:count] for part in rows[1:])), gain[:count])


def lively_latents(pipe: DiffusionPipeline) -> list[int]:
    """Latents of the dictionary that fire on at least one in fifty ordinary prompts."""
    folder = assets.path("canvas-sae")
    sae, tower = load(folder), text_towers(pipe)[0]
    activity = strongest(sae, read_words(tower, sae.config.metadata["layer"], read_prompts(folder)[:500]))
    return ((activity > 0).float().mean(0) >= 0.02).nonzero()[:, 0].tolist()


def with_random_features(made: Erasure, lively: list[int], seed: int) -> Erasure:
    """Edits as many random latents instead."""
    sae = load(assets.path("canvas-sae"))
    rows, gain = edited_rows(made)
    own = {tuple(row) for row in rows.w_dec.tolist()}
    others = [i for i in lively if tuple(sae.W_dec[i].half().tolist()) not in own]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[: len(gain)]
    return with_edited(made, sae.slice([others[i] for i in order.tolist()]), gain[: len(order)])


def measure(size: str) -> list[Control]:
    """Every concept with its own features, those of the next and of one far from it, and random ones.

    Features are turned off, as with an anchor, but none takes their place: what is gone is gone by them alone.
    """
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    manager, wanted = ErasureManager(pipe), concepts()
    lively = lively_latents(pipe)
    made = [erasure.erase(pipe, concept, "itd", attach=False, progress=False, anchored=0, tau=0) for concept in wanted]
    found: dict[str, list[tuple[float, int]]] = {}
    for index, concept in enumerate(wanted):
        neighbour, stranger = (made[(index + step) % len(made)] for step in (1, len(made) // 2))
        choices = {
            "its own": made[index],
            "of the next concept, mostly of its group": with_features_of(made[index], neighbour),
            "of an unrelated concept": with_features_of(made[index], stranger),
            "random": with_random_features(made[index], lively, index),
        }
        for name, choice in choices.items():
            manager.add(choice, "control")
            result = evaluate(pipe, "canvas", [concept], size=size, images=False, report=False, progress=False)
            manager.unload()
            found.setdefault(name, []).append((result.get("UA")["value"], result.get("UA")["n"]))
    return [
        Control(name, float(np.average([v for v, _ in each], weights=[n for _, n in each])), sum(n for _, n in each))
        for name, each in found.items()
    ]


def rows(found: list[Control]) -> list[Row]:
    """The rates with 95 % intervals."""
    return [
        {"features": each.features, "UA": figure(wilson(each.erased * each.images, each.images), each.images),
         "n": each.images}
        for each in found
    ]  # fmt: skip
