"""Attack erasures of Canvas, with gradients and by chance, and make the rows of what they withstand."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import erasure
from erasure.assets.build.measured import Row, figure
from erasure.assets.build.sweep import erasure_of
from erasure.assets.build.tables import NOTHING
from erasure.attach import ErasureManager
from erasure.eval.attacks.runner import attack
from erasure.eval.results import Results
from erasure.eval.statistics import wilson
from erasure.world import World

ATTACKED = ("dog", "butterfly", "turtle", "banana", "burger")
"""Concepts, of those that chose no defaults."""
RATES = {"unlearndiffatk": ("pre_ASR", "ASR"), "random_prefix": ("chance_ASR",)}
"""Attacks, and what the table has of each."""
STOCK = NOTHING
"""Name of the row of the stock model."""


def measure(out: Path, made: Path, strategies: tuple[str, ...], size: str, share: tuple[int, int]) -> None:
    """Attack every erasure with every attack; what is there already is left as it is, and a killed attack goes on.

    Args:
        out: Results, a folder for each concept, strategy and attack.
        made: Folder of step `table`, whose erasures are attacked.
        strategies: Which erasures, `STOCK` for the model without any.
        size: Of the attacks.
        share: `i n` takes every n-th concept from the i-th on, for several processes at once.
    """
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    manager, world = ErasureManager(pipe), World.at("canvas-sd")
    for name in ATTACKED[share[0] :: share[1]]:
        for strategy in strategies:
            for method, rates in RATES.items():
                folder = out / f"{name}-{strategy}-{method}"
                if (folder / "results.json").is_file():
                    continue
                if strategy != STOCK:
                    manager.load(erasure_of(made, strategy, name), name)
                found = attack(pipe, method, world.concept(name), size=size, out=folder, images=False, progress=False)
                manager.unload()
                values = {rate: found.get(rate, variant(strategy))["value"] for rate in rates}
                print(folder.name, json.dumps(values), flush=True)


def variant(strategy: str) -> str:
    """Name that an attack gives to its model in results: `before` for the stock model, `after` for an erased one."""
    return "before" if strategy == STOCK else "after"


def rows(out: Path, strategies: tuple[str, ...]) -> list[Row]:
    """One row for each strategy: rates of all prompts of all concepts, with Wilson's 95 % interval."""
    made: list[Row] = []
    for strategy in strategies:
        row: Row = {"method": strategy}
        for method, rates in RATES.items():
            results = [Results.load(out / f"{name}-{strategy}-{method}" / "results.json") for name in ATTACKED]
            for rate in rates:
                found = [result.get(rate, variant(strategy)) for result in results]
                images = sum(each["n"] for each in found)
                row[rate] = figure(wilson(sum(each["value"] * each["n"] for each in found), images), images)
        made.append(row)
    return made
