"""The model card of an erasure: the `README.md` that the Hub shows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from erasure.concept import Concept
from erasure.pages import Markdown, markdown_page
from erasure.shown import number, visible

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from erasure.artifact import ErasureConfig

ROWS = 200
"""Largest number of concepts, gates and measurements in a card."""


def model_card(
    name: str, config: ErasureConfig, concepts: Sequence[Concept], lora_file: str | None = None,
    unread: Sequence[str] = (),
) -> str:  # fmt: skip
    """Write the card.

    Args:
        name: Name of the erasure.
        config: Config of the erasure.
        concepts: Concepts that it erases.
        lora_file: LoRA file that stock diffusers can load, if it is the whole erasure.
        unread: Components whose low-rank edits stock diffusers does not load.

    Returns:
        Markdown with YAML in front.
    """
    return markdown_page(
        "card.md",
        metadata=metadata(config, name),
        name=name,
        base=config.base.get("model") or "unknown",
        concepts=concepts[:ROWS],
        more=max(len(concepts) - ROWS, 0),
        config=config,
        gates=[
            (concept, kind, gate[kind], kind == gate["decides"])
            for concept, gate in list(config.gates.items())[:ROWS]
            for kind in ("features", "probe")
        ],
        evaluation=[(key, figure(value)) for key, value in list(config.evaluation.items())[:ROWS]],
        requests=config.ledger[:ROWS] if config.requests else [],
        unread=unread,
        stock=lora_file and Markdown(f"pipe.load_lora_weights(folder, weight_name={lora_file!r})"),
    )


def baked_card(strengths: Sequence[float], configs: Sequence[ErasureConfig]) -> str:
    """Write the card of a pipeline whose weights are erased.

    Args:
        strengths: Strengths of the erasures in the weights.
        configs: Configs of these erasures.

    Returns:
        Markdown with YAML in front.
    """
    found = [[Concept.from_dict(data) for data in config.concepts[:ROWS]] for config in configs]
    return markdown_page(
        "baked.md",
        metadata=metadata(configs[0]),
        erasures=[
            (concepts, config, number(strength), len(config.concepts) - len(concepts))
            for concepts, config, strength in zip(found, configs, strengths, strict=True)
        ],
        evaluation=[
            (f"{concepts[0].target}, {config.strategy}", key, figure(value))
            for concepts, config in zip(found, configs, strict=True)
            for key, value in list(config.evaluation.items())[:ROWS]
        ],
    )


def figure(value: object) -> str:
    """Format a measured figure: `0.970 [0.932, 0.991]`, a number with four digits, or other data as text."""
    numbers = value if isinstance(value, list) else [value]
    if not all(isinstance(part, int | float) and not isinstance(part, bool) for part in numbers):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if isinstance(value, list) and len(value) == 3:
        middle, low, high = (number(part, ".3f") for part in value)
        return f"{middle} [{low}, {high}]"
    return ", ".join(number(part) if isinstance(part, float) else str(part) for part in numbers)


def metadata(config: ErasureConfig, name: str | None = None) -> Markdown:
    """Write the YAML header of the card, by which the Hub lists the erasure.

    Args:
        config: Config of the erasure.
        name: Name of the erasure; measured results are included only with a name.
    """
    from huggingface_hub import ModelCardData

    base = str(config.base.get("model"))
    # Local paths and embedded models are not known to the Hub.
    known = re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", base, re.ASCII) is not None
    tags = [tag for tag in (config.family, config.strategy) if re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,39}", tag)]
    measured = [] if name is None else results(config)
    data = ModelCardData(
        library_name="diffusers",
        tags=list(dict.fromkeys(["diffusers", "concept-erasure", *tags])),
        base_model=base if known else None,
        base_model_relation="adapter" if known else None,
        model_name=visible(name, 100) if measured else None,
        eval_results=measured or None,
    )
    return Markdown(data.to_yaml())


def results(config: ErasureConfig) -> list[EvalResult]:
    """Convert measured rates to entries of the Hub's `model-index`, one for each metric of each suite.

    Figures of the stock model and data that are not numbers (sizes, dates, names of judges) are left out; the card has
    the whole table.
    """
    from huggingface_hub import EvalResult

    made = []
    for key, value in config.evaluation.items():
        suite, _, metric = key.partition(": ")
        numbers = value if isinstance(value, list) else [value]
        whole = len(numbers) in (1, 3) and all(
            isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in numbers
        )
        if not (suite and metric and whole) or metric == "seed" or " before" in metric:
            continue
        made.append(
            EvalResult(
                task_type="text-to-image",
                dataset_type=_word(suite),
                dataset_name=visible(suite, 100),
                metric_type=_word(metric),
                metric_name=visible(metric, 100),
                metric_value=numbers[0],
                metric_args=None if len(numbers) == 1 else {"low": numbers[1], "high": numbers[2]},
            )
        )
        if len(made) == ROWS:
            break
    return made


def _word(text: str) -> str:
    """Convert a text to an identifier of the Hub."""
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")[:80] or "unnamed"
