"""Attack erasures of Canvas, with gradients and by chance, and make the rows of what they withstand."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

import erasure
from erasure.assets.build.measured import Row, figure
from erasure.assets.build.sweep import erasure_of
from erasure.assets.build.tables import NOTHING
from erasure.attach import ErasureManager
from erasure.eval.attacks.runner import STEM, attack
from erasure.eval.results import FILE, Results
from erasure.eval.schemas import AttackRow
from erasure.eval.statistics import holm, mcnemar_exact, transitions, wilson
from erasure.eval.table import read_rows
from erasure.world import World

ATTACKED = ("dog", "butterfly", "turtle", "banana", "burger")
"""Concepts, of those that chose no defaults."""
RATES = {"unlearndiffatk": ("pre_ASR", "ASR"), "random_prefix": ("chance_ASR",)}
"""Attacks, and what the table has of each."""
STOCK = NOTHING
"""Name of the row of the stock model."""


def measure(
    out: Path, made: Path, strategies: tuple[str, ...], size: str, prompts: int, share: tuple[int, int]
) -> None:
    """Attack every erasure with every attack; what is there already is left as it is, and a killed attack goes on.

    Args:
        out: Results, a folder for each concept, strategy and attack.
        made: Folder of step `methods`, whose erasures are attacked; those that are not there are made and kept there.
        strategies: Which erasures, `STOCK` for the model without any.
        size: Of the attacks.
        prompts: About each concept.
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
                if (folder / FILE).is_file():
                    continue
                if strategy != STOCK:
                    manager.load(_erasure(pipe, made, strategy, name), name)
                found = attack(
                    pipe, method, world.concept(name), size=size, out=folder, images=False, progress=False,
                    samples=prompts,
                )  # fmt: skip
                manager.unload()
                values = {rate: found.get(rate, variant(strategy))["value"] for rate in rates}
                print(folder.name, json.dumps(values), flush=True)


def _erasure(pipe: DiffusionPipeline, made: Path, strategy: str, name: str) -> Path:
    """Folder of an erasure, which is made if it is not there."""
    folder = erasure_of(made, strategy, name)
    if not folder.is_dir():
        concept = World.at("canvas-sd").concept(name)
        erasure.erase(pipe, concept, strategy, attach=False, progress=False).save(folder)
    return folder


def variant(strategy: str) -> str:
    """Name that an attack gives to its model in results: `before` for the stock model, `after` for an erased one."""
    return "before" if strategy == STOCK else "after"


def rows(out: Path, strategies: tuple[str, ...]) -> list[Row]:
    """One row for each strategy: rates of all prompts of all concepts, with Wilson's 95 % interval.

    A rate of an attack that was not made on every concept is missing.
    """
    made: list[Row] = []
    for strategy in strategies:
        row: Row = {"method": strategy}
        for method, rates in RATES.items():
            files = [out / f"{name}-{strategy}-{method}" / FILE for name in ATTACKED]
            if not all(file.is_file() for file in files):
                row |= {rate: figure({"reason": "not measured"}) for rate in rates}
                continue
            results = [Results.load(file) for file in files]
            for rate in rates:
                found = [result.get(rate, variant(strategy)) for result in results]
                images = sum(each["n"] for each in found)
                row[rate] = figure(wilson(sum(each["value"] * each["n"] for each in found), images), images)
                row.setdefault("prompts", images)
        made.append(row)
    return made


def pairs(out: Path, strategies: tuple[str, ...], method: str = "unlearndiffatk") -> list[Row]:
    """Compare every two strategies on the prompts on which both were attacked.

    Args:
        out: Results of `measure`.
        strategies: Which; the stock model, on which every prompt succeeds, is left out.
        method: The attack.

    Returns:
        A row for each two: the prompts, how many succeeded on one alone, the exact p-value of McNemar's test, and the
        same adjusted for the number of rows by Holm's method.
    """
    succeeded = {strategy: _succeeded(out, strategy, method) for strategy in strategies if strategy != STOCK}
    made: list[Row] = []
    for one, other in combinations(succeeded, 2):
        both = succeeded[one].keys() & succeeded[other].keys()
        table = transitions([succeeded[one][key] for key in both], [succeeded[other][key] for key in both])
        alone = (table["before_only"], table["after_only"])
        counts = {"prompts": len(both), "only_method": alone[0], "only_other": alone[1]}
        made.append({"method": one, "other": other, **counts, "p": mcnemar_exact(*alone)})
    adjusted = holm([float(row["p"]) for row in made])  # type: ignore[arg-type]
    return [{**row, "p_adjusted": p} for row, p in zip(made, adjusted, strict=True)]


def _succeeded(out: Path, strategy: str, method: str) -> dict[tuple[str, str], bool]:
    """Whether each prompt succeeded, by concept and sample; prompts without an outcome are left out."""
    found: dict[tuple[str, str], bool] = {}
    for name in ATTACKED:
        rows = read_rows(out / f"{name}-{strategy}-{method}" / f"{STEM}.jsonl", AttackRow)
        found |= {(name, row["sample_id"]): row["success"] for row in rows if row["success"] is not None}
    return found
