"""Measure the suites of ways to draw, and make the rows of their tables."""

from __future__ import annotations

from pathlib import Path

import torch

import erasure
from erasure.assets.build.measured import Row, figure
from erasure.eval import evaluate
from erasure.eval.results import Results

OF_SUITE = {
    "removal": ("object_gone", "psnr_fill", "psnr_outside", "fill_similarity", "seed_consensus"),
    "composition": (
        "both_found", "both_found_template_1", "both_found_template_2", "objects_found", "clip_minimum_object",
    ),
}  # fmt: skip
"""Metrics of each table."""


def measure(name: str, out: Path, size: str) -> None:
    """Draw and judge what is left of a suite.

    Args:
        name: Of the suite.
        out: Its folder.
        size: Of the suite.
    """
    torch.set_num_threads(1)
    pipe = erasure.load_pipeline("canvas-sd")
    pipe.set_progress_bar_config(disable=True)
    evaluate(pipe, name, [], size=size, out=out, images=False, report=False, progress=False)


def rows(folder: Path) -> list[Row]:
    """A row for each way to draw, in the suite's order."""
    results = Results.load(folder)
    metrics = OF_SUITE[results.suite]
    variants = dict.fromkeys(row["variant"] for row in results.metrics if row["name"] == metrics[0])
    return [
        {"variant": variant, **{name: figure(results.get(name, variant)) for name in metrics}} for variant in variants
    ]
