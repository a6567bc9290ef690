"""What a stress test works with: the erased model, the stock model, the concept, and where its files go."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import Backbone, backbone_for
from erasure.errors import EvaluationError
from erasure.eval.metrics.unlearncanvas import unlearned
from erasure.eval.processes import Processes
from erasure.eval.rows import Record, Row
from erasure.eval.samples import Sample
from erasure.eval.scoring import Judge, score
from erasure.eval.suites import Target
from erasure.interop import paths
from erasure.interop.pipelines import components_of
from erasure.twins import apart_of

Edited = dict[str, list[str]]
"""Canonical paths of parameters by component."""


@dataclass
class Bench:
    """A model under test. Both pipelines are twins, so changes to them affect no other pipeline."""

    pipe: DiffusionPipeline
    """The model with its erasures in force."""
    stock: DiffusionPipeline
    """The model without them."""
    entries: list[Record]
    """The erasures that are in force: `name`, `erasure` and `strength`."""
    target: Target
    """The concept."""
    samples: tuple[Sample, ...]
    """Samples of the suite, with the concept and without it."""
    judge: Judge
    seed: int
    processes: Processes
    progress: bool = False
    """Whether this process shows bars."""
    folder: Path = Path()
    """Where files of the run go; known once it is opened."""

    @property
    def targets(self) -> list[Sample]:
        """The samples whose prompts hold the concept."""
        return [sample for sample in self.samples if sample.role == "target"]

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone of the erased model."""
        return backbone_for(self.pipe)

    def shown(self, row: Row) -> bool | None:
        """Whether a row's image shows the concept; `None` where the judge gave no answer."""
        outcomes = unlearned([row], [self.target])
        return not outcomes.hits[0] if outcomes.hits else None

    def sees(self, samples: Sequence[Sample], images: Sequence[Image.Image]) -> list[bool | None]:
        """Ask the judge whether images of samples show the concept."""
        scores, _ = score(samples, images, self.judge, None)
        return [self.shown(s.row() | scored) for s, scored in zip(samples, scores, strict=True)]

    # Weights --------------------------------------------------------------------------------------------------------

    @cached_property
    def edited(self) -> Edited:
        """Parameters that the erasures change, by component; empty where they work by hooks alone."""
        found: Edited = {}
        stock = components_of(self.stock)
        for name, component in components_of(self.pipe).items():
            if name not in stock:
                continue
            known = paths.canonical_parameters(stock[name])
            changed = [
                path for path in paths.canonical_parameters(component)
                if path in known and differs(paths.parameter(component, path), paths.parameter(stock[name], path))
            ]  # fmt: skip
            if changed:
                found[name] = changed
        return found

    def require_edited(self, advice: str) -> Edited:
        """Give the parameters that the erasures change, or refuse erasures that change none.

        Raises:
            EvaluationError: There are none: the erasures work by hooks.
        """
        if not self.edited:
            names = ", ".join(f"{entry['name']!r} ({entry['erasure'].config.strategy})" for entry in self.entries)
            raise EvaluationError(f"no weight of the model is changed by {names}, which work by hooks alone: {advice}")
        return self.edited

    def linear(self, component: str, *, convolutions: bool = False) -> list[str]:
        """List the weights of a component's linear layers, and of its convolutions if requested."""
        kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
        network = components_of(self.pipe)[component]
        owners = {path: path.rpartition(".") for path in paths.canonical_parameters(network)}
        return [
            path for path, (owner, _, name) in owners.items()
            if name == "weight" and owner and isinstance(paths.layer(network, owner), kinds)
        ]  # fmt: skip

    def rebuilt(self, scale: float = 1.0) -> DiffusionPipeline:
        """Make another pipeline object with the erasures attached at a multiple of their strengths."""
        given = {e["name"]: (e["erasure"], scale * e["strength"]) for e in self.entries}
        return attached(self.stock, given, check_base=False)


def attached(
    pipe: DiffusionPipeline, given: Mapping[str, tuple[Erasure, float]], *, check_base: bool = True
) -> DiffusionPipeline:
    """Make another pipeline object with further erasures attached; the given one does not change.

    Args:
        pipe: The pipeline, with or without erasures.
        given: Erasures with their strengths, by name.
        check_base: Compare the base tensors with the fingerprints in the artifacts.
    """
    touched: dict[str, set[str]] = {}
    for erasure, _ in given.values():
        for component in set(erasure.edits.components) & set(components_of(pipe)):
            touched.setdefault(component, set()).update(erasure.edits.of(component))
    made = apart_of(pipe, {name: sorted(some) for name, some in touched.items()})
    manager = ErasureManager(made)
    with warnings.catch_warnings():
        # What is said about a combination was said to the caller, or is what the test is about.
        warnings.simplefilter("ignore")
        for name, (erasure, strength) in given.items():
            manager.add(erasure, name, strength, check_base=check_base)
    return made


def differs(first: Tensor, second: Tensor) -> bool:
    """Whether two parameters have different values."""
    if first.data_ptr() == second.data_ptr() and first.shape == second.shape:
        return False
    return first.shape != second.shape or first.dtype != second.dtype or not torch.equal(first, second)
