"""Checks whether an erasure fits a pipeline, before anything is changed."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Container, Mapping, Sequence

import numpy as np
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.backbones import Backbone, backbone_for
from erasure.carriers import weights
from erasure.carriers.edits import TEXT_ENCODERS
from erasure.carriers.embeddings import warn_of_unlike_tokens
from erasure.carriers.membranes import Membrane, features_of
from erasure.carriers.safety import SafetyGuidance
from erasure.errors import (
    AttachError,
    BypassedErasureWarning,
    NoMatchingModuleError,
    TwiceAttachedWarning,
    WrongBaseError,
)  # fmt: skip
from erasure.files.names import problem_of, shown
from erasure.interop import paths
from erasure.interop.pipelines import components_of
from erasure.state import Attached, ComponentState

CONTROLNET = "controlnet"


def is_denoiser(component: str) -> bool:
    """Whether a component's name is that of a denoiser, not of a text encoder."""
    return not component.startswith("text_encoder")


def sources_of(
    pipe: DiffusionPipeline, modules: Mapping[str, nn.Module], name: str, erasure: Erasure, controlnet: bool
) -> dict[str, str]:
    """Map each component that an erasure edits to the component whose edits apply to it.

    Args:
        pipe: The pipeline.
        modules: Networks of the pipeline.
        name: Name of the erasure, for messages.
        erasure: The erasure.
        controlnet: Whether the layers that a ControlNet shares with the denoiser are edited too.

    Raises:
        WrongBaseError: The family differs, or a component is missing in the pipeline or may not be edited.
        ArtifactError: The edits are invalid; see `Edits.check`.
        NoMatchingModuleError: The erasure changes nothing.
        DivergenceError: The erasure has NaN or infinity.
    """
    backbone = backbone_for(pipe)
    if erasure.config.family != backbone.family:
        raise WrongBaseError(
            f"the erasure {name!r} is for {erasure.config.family}, this {type(pipe).__name__} is {backbone.family}: "
            f"load a model of {erasure.config.family}, or make the erasure anew with this one"
        )
    if not len(erasure.edits):
        raise NoMatchingModuleError(f"the erasure {name!r} changes nothing: it holds no tensors")
    erasure.edits.check_finite()
    if erasure.edits.is_empty:
        raise NoMatchingModuleError(f"the erasure {name!r} changes nothing: every edit in it is zero")
    editable = {backbone.denoiser_component, *(tower.component for tower in backbone.towers)}
    for component in {*erasure.components, *erasure.edits.pinned}:
        if component not in editable:
            refuse_left_out(pipe, name, component)
            raise WrongBaseError(
                f"the erasure {name!r} edits {component!r}, which this pipeline lacks or which no erasure may edit "
                f"(here: {', '.join(sorted(editable))})"
            )
    erasure.edits.check()
    sources = {component: component for component in erasure.components}
    if controlnet:
        if CONTROLNET not in modules or backbone.denoiser_component not in sources:
            raise NoMatchingModuleError(
                f"controlnet=True, but {name!r} does not edit the {backbone.denoiser_component} or "
                f"{type(pipe).__name__} has no ControlNet"
            )
        sources[CONTROLNET] = backbone.denoiser_component
    return sources


def refuse_left_out(pipe: DiffusionPipeline, name: str, component: str) -> None:
    """Raise `WrongBaseError` when a pipeline was loaded without an optional component that an erasure needs.

    Args:
        pipe: The pipeline.
        name: Name of the erasure.
        component: Name of the component.
    """
    if component in pipe.components and pipe.components[component] is None:
        raise WrongBaseError(
            f"the erasure {name!r} was made with the {component}, which was left out of this {type(pipe).__name__} "
            f"({component}=None): load the pipeline with it, or make the erasure anew without it"
        )


def check_fit(
    pipe: DiffusionPipeline, sources: Mapping[str, str], name: str, erasure: Erasure, check_base: bool
) -> frozenset[str]:
    """Check that every edit of an erasure can be put in place.

    Returns:
        Components where the erasure must run beside the layers, because their weights are quantised.

    Args:
        pipe: The pipeline.
        sources: See `sources_of`.
        name: Name of the erasure, for messages.
        erasure: The erasure.
        check_base: Compare the base tensors with the fingerprints in the erasure's config.

    Raises:
        WrongBaseError: Shapes or fingerprints are another model's.
        NoMatchingModuleError: A layer is missing, or a ControlNet has none of the edited layers.
        UnsupportedModelError: A full-rank edit is for quantised weights, or projections are fused.
        AttachError: Quantised and plain weights are mixed, or something else changed an edited parameter.
    """
    beside, modules = [], components_of(pipe)
    digests = erasure.config.base.get("tensors", {}) if check_base else {}
    for component, source in sources.items():
        module = modules[component]
        state = ComponentState.of(module) or ComponentState(component, source)
        edits = {path: terms[0][1] for path, terms in state.edits(Attached(erasure), module).items()}
        if source != component and not edits:
            raise NoMatchingModuleError(f"the {component} has none of the {source}'s layers that {name!r} edits")
        if weights.is_beside(component, module, edits):
            beside.append(component)
        width = getattr(getattr(module, "config", None), "hidden_size", None)
        if source in TEXT_ENCODERS and isinstance(width, int):
            erasure.edits.check_width(source, width)
        if (guidance := erasure.edits.safety.get(component)) is not None:
            check_told(pipe, name, guidance)
        for path in erasure.edits.features_of(component):
            paths.require_block(module, path, component)
        check_branches(component, module, erasure.edits.membranes_of(component))
        written = state.record.written
        written.check_intact(component, module)
        prefix = source + "/"
        expected = {key.removeprefix(prefix): value for key, value in digests.items() if key.startswith(prefix)}
        own = expected if check_base and source == component else None
        weights.check_fits(component, module, written, edits, own)
    for component, digest in erasure.config.base.get("text_encoders", {}).items() if check_base else ():
        encoder = modules.get(component)
        refuse_left_out(pipe, name, component)
        found = None if encoder is None else ComponentState.of(encoder)
        written = weights.WrittenEdits() if found is None else found.record.written
        if encoder is None or not weights.same_base(weights.sample(encoder, written), digest):
            raise WrongBaseError(
                f"{name!r} was fitted to another {component} than this pipeline has, so it would erase something "
                "else: load the base model named in its config, or pass check_base=False if you know that it fits"
            )
    return frozenset(beside)


def check_branches(component: str, module: nn.Module, branches: Mapping[str, Membrane]) -> None:
    """Raise unless a denoiser has the layers that branches run beside.

    Args:
        component: Name of the denoiser, for messages.
        module: The denoiser.
        branches: Branches by path of the layer.

    Raises:
        NoMatchingModuleError: The denoiser lacks a layer.
        WrongBaseError: A layer has another shape, or is of a kind beside which no branch can run.
        UnsupportedModelError: A layer is inside fused projections, which do not run it.
    """
    for path, branch in branches.items():
        weights.refuse_fused(component, module, f"{path}.weight")
        try:
            found = features_of(paths.layer(module, path))
        except AttributeError:
            raise NoMatchingModuleError(
                f"{component} has no {path!r}: the erasure was made for another architecture"
            ) from None
        expected = branch.down.shape[2], branch.up.shape[1]
        if found != expected:
            shape = "is no linear layer" if found is None else f"takes {found[0]} features and gives {found[1]}"
            raise WrongBaseError(
                f"{component}/{path} {shape}, the erasure expects {expected[0]} and {expected[1]}: it was made for "
                "another model"
            )


def check_told(pipe: DiffusionPipeline, name: str, guidance: SafetyGuidance) -> None:
    """Raise `WrongBaseError` unless the encodings of safety guidance fit a denoiser.

    Args:
        pipe: The pipeline.
        name: Name of the erasure.
        guidance: The safety guidance.
    """
    held = {"tokens": guidance.tokens.shape[-1], "pooled": guidance.pooled.shape[-1]}
    read = dict.fromkeys(held, 0)
    for layer in backbone_for(pipe).entry_layers():
        read[layer.source] = len(range(layer.module.in_features)[layer.columns])
    if held != read:
        raise WrongBaseError(
            f"{name!r} holds encodings of {held['tokens']} and {held['pooled']} values, the denoiser of this "
            f"{type(pipe).__name__} reads {read['tokens']} and {read['pooled']}: it was made with other text "
            "encoders; load the base model named in its config"
        )


def check_name(name: str, attached: Container[str]) -> None:
    """Raise `AttachError` when a name is in use, invalid, or cannot name a folder, as `save_erased_pipeline` does."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,200}", name):
        raise AttachError(f"{shown(name)} cannot name an erasure: use letters, digits, '-' and '_', 200 at most")
    if problem := problem_of(name):
        raise AttachError(f"{shown(name)} cannot name an erasure, because it cannot name a folder: {problem}")
    if name in attached:
        raise AttachError(
            f"an erasure named {name!r} is attached already: pass another name, or delete_erasure({name!r}) first"
        )


def check_strength(strength: float) -> float:
    """Check a strength and give it as a float.

    Raises:
        AttachError: The strength is not a number, negative or not finite.
    """
    try:
        factor = float(strength)
    except (TypeError, ValueError):
        factor = math.nan
    if not (math.isfinite(factor) and factor >= 0):
        raise AttachError(f"{strength!r} is no strength: give a finite number that is not negative; 1 is as made")
    return factor


def strengths_of(names: Sequence[str], strengths: float | Sequence[float] | None) -> dict[str, float]:
    """Assign strengths to erasures; 1 where none is given.

    Raises:
        AttachError: The numbers of strengths and names differ, or a strength is invalid.
    """
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise AttachError(f"{twice!r} is named twice: name each erasure once, with one strength")
    several = strengths.tolist() if isinstance(strengths, (np.ndarray, Tensor)) else strengths
    factors = list(several) if isinstance(several, Sequence) else [several] * len(names)
    if len(factors) != len(names):
        raise AttachError(f"{len(factors)} strengths for {len(names)} erasures: give one for each, or a single number")
    return {name: 1.0 if f is None else check_strength(f) for name, f in zip(names, factors, strict=True)}


def warn_of_misfits(pipe: DiffusionPipeline, name: str, erasure: Erasure, attached: Mapping[str, Erasure]) -> None:
    """Warn of differences due to which an erasure can erase less, or more, than when it was made.

    Args:
        pipe: The pipeline.
        name: Name of the erasure.
        erasure: Erasure to attach.
        attached: Erasures that are attached already, by name.
    """
    backbone = backbone_for(pipe)
    warn_of_unlike_tokens(name, backbone.towers, erasure.config.base.get("learned_tokens", {}))
    warn_of_unlike_lengths(name, erasure, backbone, attached)
    warn_of_same_edits(name, erasure, attached)


def warn_of_same_edits(name: str, erasure: Erasure, attached: Mapping[str, Erasure]) -> None:
    """Warn when the same edits are attached already under another name, which doubles their strength."""
    for other, made in attached.items():
        if made.edits.equals(erasure.edits):
            warnings.warn(
                f"{name!r} makes the same edits as {other!r}, which is attached already: together they have twice the "
                f"strength. delete_erasure({name!r}) takes one off; a single one takes a strength of 2 as well",
                TwiceAttachedWarning,
                stacklevel=5,
            )
            return


def warn_of_unlike_lengths(name: str, erasure: Erasure, backbone: Backbone, attached: Mapping[str, Erasure]) -> None:
    """Warn when an erasure was made for another prompt length than the pipeline's, or than an attached one.

    Args:
        name: Name of the erasure.
        erasure: Erasure to attach.
        backbone: Backbone of the pipeline.
        attached: Erasures that are attached already, by name.
    """
    own, here = _length(erasure, backbone), backbone.text_length
    lengths = {other: length for other, made in attached.items() if (length := _length(made, backbone)) is not None}
    other = next((other for other, length in lengths.items() if length != own), None)
    if own is None or here is None or (own == here and other is None):
        return
    found = f"this {type(backbone.pipe).__name__} pads them to {here} where a call does not say otherwise"
    if other is not None:
        found = f"{other!r}, which is attached already, with texts of {lengths[other]}"
    warnings.warn(
        f"the erasure {name!r} was made with texts of {own} tokens (max_sequence_length), {found}: what the text "
        f"encoder says of a word depends on the length, so it may erase less at another one. Draw with "
        f"max_sequence_length={own}, or make the erasures with texts of one length",
        BypassedErasureWarning,
        stacklevel=5,
    )


def _length(erasure: Erasure, backbone: Backbone) -> int | None:
    """Give the prompt length in tokens for which an erasure was made; `None` where it is irrelevant or unknown."""
    fixed = {tower.component for tower in backbone.towers if tower.causal}
    edited = {*erasure.components, *erasure.edits.pinned}
    return erasure.config.text_length if edited - fixed else None
