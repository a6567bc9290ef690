"""Activation patching: at which places do the stock model's activations bring the concept back?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Gt, Le
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.backbones import Backbone, backbone_for
from erasure.backbones.sites import AttentionSite
from erasure.errors import EvaluationError
from erasure.eval.generation import batches, generate
from erasure.eval.rows import Record
from erasure.eval.samples import Sample
from erasure.eval.stress import StressTest, register
from erasure.eval.stress.bench import Bench
from erasure.eval.stress.conditions import Condition
from erasure.eval.variants import Draw, Drawn
from erasure.interop import paths

Side = Literal["inputs", "outputs"]
Activations = Tensor | tuple[Tensor, ...]
"""What a module is given first, or gives: tensors of one pass."""


@register("restore")
@dataclass(frozen=True, kw_only=True)
class Restore(StressTest):
    """Copy activations of the stock model into the erased one, one place of the denoiser at a time.

    Both draw the same prompt from the same noise. Where `h <- h_E + share (h_B - h_E)` brings the concept back, all
    behind that place still knows it: the erasure cut it off there or ahead of it. Patched are what the layers that
    read text are given (`text_states`, the work of the text encoders) and what they give (`text_entry`), and the
    outputs of attention layers by part of the denoiser; never a last layer or a latent, which would copy the answer.

    Activations of an unrelated prompt, patched at the same place, are the control: where they show the concept as
    well, the place says nothing.
    """

    title: ClassVar[str] = "activations of the stock model patched into the erased one, place by place"
    paper: ClassVar[str] = "Suppression or Deletion, arXiv 2602.18505"
    control: ClassVar[str] = "activations of an unrelated prompt at the same place must not show the concept"
    sizes: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "smoke": {"samples": 2, "retained": 2},
        "quick": {"samples": 10, "retained": 8},
        "full": {"shares": (0.25, 0.5, 1.0)},
    }

    places: Literal["parts", "layers"] = "parts"
    """Attention layers of a kind in one part of the denoiser together (down, middle, up; thirds of a transformer), or
    each layer alone."""
    shares: tuple[Annotated[float, Gt(0), Le(1)], ...] = (1.0,)
    """Shares of the stock model's activations."""

    def conditions(self, bench: Bench) -> list[Condition]:
        """Give each place and share, and a control for each place."""
        others = [sample.prompt for sample in bench.samples if sample.role == "retain"]
        if not others:
            raise EvaluationError(
                "there is no prompt without the concept to take unrelated activations from: give retained=1 or more, "
                "and a judge that can tell other things"
            )
        if not self.shares:
            self.refuse("shares", self.shares, "at least one share")
        made = []
        for name, place in places_of(bench.backbone, self.places).items():
            made.append(
                Condition(
                    f"unrelated_{name}", draw=patching(bench.stock, place, max(self.shares), others),
                    roles=("target",), control="negative",
                    about=f"activations of an unrelated prompt were patched in at {name}",
                )
            )  # fmt: skip
            for share in dict.fromkeys(self.shares):
                made.append(
                    Condition(
                        name if len(self.shares) == 1 else f"{name}_{share:g}",
                        draw=patching(bench.stock, place, share), roles=("target",), compared=True,
                        needs=(f"unrelated_{name}",),
                        about=f"{share:g} of the stock model's activations were patched in at {name}",
                    )
                )  # fmt: skip
        return made

    def recipe(self, bench: Bench) -> Record:
        """Give the options, with the modules of every place."""
        found = places_of(bench.backbone, self.places)
        return super().recipe(bench) | {"modules": {name: list(place.paths) for name, place in found.items()}}


@dataclass(frozen=True)
class Place:
    """Modules of the denoiser that are patched together."""

    paths: tuple[str, ...]
    side: Side


def places_of(backbone: Backbone, grain: Literal["parts", "layers"]) -> dict[str, Place]:
    """List the places of a denoiser: those of text first, then in order of execution."""
    text = tuple(layer.path for layer in backbone.entry_layers())
    found = {"text_states": Place(text, "inputs"), "text_entry": Place(text, "outputs")}
    sites = backbone.attention_sites()
    groups: dict[str, list[str]] = {}
    for site in sites:
        if grain == "layers":
            groups[site.name.replace(".", "-")] = [site.name]
        else:
            groups.setdefault(f"{_part(site, sites)}_{site.kind}", []).append(site.name)
    return found | {name: Place(tuple(some), "outputs") for name, some in groups.items()}


def _part(site: AttentionSite, sites: Sequence[AttentionSite]) -> str:
    """Name the part of a denoiser that a layer is in: the list of blocks, or a third of it for equal blocks.

    They are alike where text and picture attend to each other in one joint attention.
    """
    blocks, number, *_ = site.name.split(".")
    name = blocks.partition("_")[0]
    if any(other.kind == "cross" for other in sites):
        return name
    count = 1 + max(int(other.name.split(".")[1]) for other in sites if other.name.startswith(f"{blocks}."))
    return f"{name}_{1 + 3 * int(number) // count}"


# Recording and patching ---------------------------------------------------------------------------------------------


@dataclass
class ActivationRecord:
    """Recorded inputs or outputs of modules, for every pass of one call of a pipeline, on the CPU."""

    passes: dict[str, list[Activations]] = field(default_factory=dict)

    def at(self, path: str, number: int, like: Activations) -> Activations:
        """Get the recorded value of a module in a pass.

        Raises:
            EvaluationError: There was no such pass, or one of another shape: the two models do not run alike.
        """
        known = self.passes.get(path, [])
        if number >= len(known) or _shapes(known[number]) != _shapes(like):
            there = _shapes(known[number]) if number < len(known) else "nothing"
            raise EvaluationError(
                f"activations cannot be patched at {path}: in pass {number + 1} the erased model has {_shapes(like)} "
                f"there and the stock model {there}. An erasure that gives the denoiser other rows than the stock "
                "model has (safety guidance, for instance) cannot be tested this way"
            )
        return known[number]


def _shapes(value: Activations) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in (value if isinstance(value, tuple) else (value,))]


def _kept(value: Activations) -> Activations:
    if isinstance(value, tuple):
        return tuple(each.detach().to("cpu", copy=True) for each in value)
    return value.detach().to("cpu", copy=True)


def _mixed(own: Activations, other: Activations, share: float) -> Activations:
    """Compute `own + share (other - own)`; exactly `other` at a share of 1."""
    if isinstance(own, tuple):
        assert isinstance(other, tuple)
        return tuple(_mixed_one(a, b, share) for a, b in zip(own, other, strict=True))
    assert isinstance(other, Tensor)
    return _mixed_one(own, other, share)


def _mixed_one(own: Tensor, other: Tensor, share: float) -> Tensor:
    given = other.to(own.device, own.dtype)
    return given if share == 1 else torch.lerp(own, given, share)


@contextmanager
def watched(
    denoiser: nn.Module, place: Place, change: Callable[[str, int, Activations], Activations | None]
) -> Iterator[None]:
    """Call a function with modules' inputs or outputs in every pass, and replace them by what it returns."""
    network, counts = paths.uncompiled(denoiser), dict.fromkeys(place.paths, 0)

    def seen(path: str, value: Activations) -> Activations | None:
        counts[path] += 1
        return change(path, counts[path] - 1, value)

    def before(path: str) -> Callable[..., object]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> object:
            given = seen(path, args[0])
            return None if given is None else (given, *args[1:])

        return hook

    def behind(path: str) -> Callable[..., object]:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Activations) -> object:
            return seen(path, output)

        return hook

    with ExitStack() as stack:
        for path in place.paths:
            module = paths.layer(network, path)
            if place.side == "inputs":
                handle = module.register_forward_pre_hook(before(path))
            else:
                handle = module.register_forward_hook(behind(path))
            stack.callback(handle.remove)
        yield


@contextmanager
def recorded(denoiser: nn.Module, place: Place) -> Iterator[ActivationRecord]:
    """Record a place while a pipeline is called once."""
    tape = ActivationRecord()

    def keep(path: str, _number: int, value: Activations) -> None:
        tape.passes.setdefault(path, []).append(_kept(value))

    with watched(denoiser, place, keep):
        yield tape


@contextmanager
def patched(denoiser: nn.Module, place: Place, tape: ActivationRecord, share: float) -> Iterator[None]:
    """Patch a place while a pipeline is called once.

    Args:
        denoiser: That of the erased model.
        place: Which modules.
        tape: What the stock model had there.
        share: Of that.
    """

    def mix(path: str, number: int, value: Activations) -> Activations:
        return _mixed(value, tape.at(path, number, value), share)

    with watched(denoiser, place, mix):
        yield


def patching(stock: DiffusionPipeline, place: Place, share: float, others: Sequence[str] = ()) -> Draw:
    """Make a change that draws with activations of the stock model.

    Args:
        stock: The stock model.
        place: Where they are patched in.
        share: Of them.
        others: Prompts that the stock model draws in the place of the samples' own, in turn.
    """

    def draw(pipe: DiffusionPipeline, samples: Sequence[Sample], batch_size: int) -> Iterator[Drawn]:
        for batch in batches(samples, batch_size):
            more: Record = {"prompt": [_other(others, sample) for sample in batch]} if others else {}
            with recorded(backbone_for(stock).denoiser, place) as tape:
                for _ in generate(stock, batch, len(batch), partial(_always, more)):
                    pass
            with patched(backbone_for(pipe).denoiser, place, tape, share):
                made = list(generate(pipe, batch, len(batch)))
            yield from made

    return draw


def _always(given: Record, _batch: list[Sample]) -> Record:
    return given


def _other(others: Sequence[str], sample: Sample) -> str:
    """Choose an unrelated prompt for a sample, independent of batch and process."""
    return others[sample.seed % len(others)]
