"""Every stress test on the tiny pipeline: options that make it quick, and judges that answer without a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from erasure.artifact import Erasure, ErasureConfig
from erasure.attach import ErasureManager
from erasure.carriers.edits import Edits
from erasure.concept import Concept
from erasure.eval import Results, stress_test
from erasure.eval.table import read_rows
from tests.conftest import make_tiny_pipe

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
"""A linear layer of the tiny UNet."""


@cache
def tiny_pipe() -> Any:
    """The tiny pipeline, made once: read it, never change it."""
    return make_tiny_pipe()


def make_erasure(target: str = "cat", seed: int = 0, size: float = 0.5) -> Erasure:
    """Noise on the output convolution and on a linear layer of the tiny UNet, called an erasure."""
    unet = tiny_pipe().unet
    generator = torch.Generator().manual_seed(seed)
    deltas = {
        f"unet/{path}.weight": size * torch.randn(unet.get_submodule(path).weight.shape, generator=generator)
        for path in ("conv_out", LAYER)
    }
    config = ErasureConfig("noise", [Concept(target).to_dict()], "stable-diffusion", cost={"seconds": 1.5})
    return Erasure(config, Edits(deltas=deltas))


@pytest.fixture
def stressed_pipe(world_pipe: Any) -> Any:
    """The pipeline of the little world with an erasure of "cat"."""
    ErasureManager(world_pipe).add(make_erasure(), check_base=False)
    return world_pipe


@dataclass(frozen=True)
class Case:
    """How a stress test is run here."""

    options: dict[str, Any]
    """Single options in the place of the smallest size's."""
    conditions: tuple[str, ...]
    """Names of the conditions besides the stock model and the erased one."""


CASES: dict[str, Case] = {
    "quantise": Case(
        {"formats": ("int8", "nf4")}, ("stock_int8", "int8", "stock_nf4", "nf4"),
    ),
    "strength": Case({"strengths": (0.5, 1.0)}, ("strength_0", "strength_0.5")),
    "noise": Case({"levels": (0.02,), "draws": 2}, tuple(
        f"{start}noise_0.02_{number}" for number in (1, 2) for start in ("stock_", "")
    )),
    "merge": Case({"shares": (0.25, 0.75)}, ("merge_0.25", "merge_0.75")),
    "stack": Case({}, ("stock_with_1", "with_1")),
    "relearn": Case({"steps": (1, 2), "rank": 2}, tuple(
        f"{task}_{step}" for task in ("relearned", "stock_concept", "stock_new", "erased_new") for step in (0, 1, 2)
    )),
    "restore": Case({"shares": (1.0,)}, tuple(
        name
        for place in ("text_states", "text_entry", "down_self", "down_cross", "mid_self", "mid_cross", "up_self",
                      "up_cross")
        for name in (f"unrelated_{place}", place)
    )),
    "footprint": Case({"samples": 10, "retained": 10, "permutations": 5}, ()),
}  # fmt: skip
"""By name of the test; the shared tests run over all that are registered, so a new one needs an entry."""


@pytest.fixture
def options(tmp_path: Path, clip_folder: Path) -> Callable[[str], dict[str, Any]]:
    """The options of a stress test, with the files that it needs."""

    def given(name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"samples": 3, "retained": 2, **CASES[name].options}
        if name == "stack":
            folder = tmp_path / "other"
            if not folder.exists():
                write(make_erasure("dog", 7, 0.01), folder)
            found["others"] = (str(folder),)
        if name == "footprint":
            found["clip"] = clip_folder
        return found

    return given


def write(erasure: Erasure, folder: Path) -> None:
    """Save an erasure with the fingerprints of the base that its config must name."""
    from erasure.carriers.weights import fingerprint
    from erasure.interop import paths

    pipe = tiny_pipe()
    parameters = [key.split("/") for key in erasure.edits.parameters]
    known = {f"{part}/{path}": fingerprint(paths.parameter(getattr(pipe, part), path)) for part, path in parameters}
    config = replace(erasure.config, base={"tensors": known}, carriers=erasure.edits.carriers)
    Erasure(config, erasure.edits).save(folder)


def cats(images: Any) -> list[Any]:
    """A judge that sees a cat in every picture."""
    return [SimpleNamespace(object="cat", style="noto") for _ in images]


cats.version = "cats"  # type: ignore[attr-defined]


@pytest.fixture
def judge_of(judge: Any) -> Callable[[str], Any]:
    """The judge of a stress test: one that knows the stock model's images of the suite's prompts.

    Relearning draws other prompts, of which that one knows nothing.
    """
    return lambda name: cats if name == "relearn" else judge


@pytest.fixture
def run(tmp_path: Path, judge_of: Any, options: Any) -> Callable[..., Results]:
    """Run a stress test quickly, with the judge of the little world."""

    def call(pipe: Any, name: str, out: str = "out", **more: Any) -> Results:
        common = {"size": "smoke", "judge": judge_of(name), "progress": False, "batch_size": 8}
        return stress_test(pipe, name, out=tmp_path / out, **{**common, **options(name), **more})

    return call


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Rows of a run without its times."""
    from erasure.eval.stress.runner import StressRow

    rows = read_rows(folder / "samples.jsonl", StressRow)
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
