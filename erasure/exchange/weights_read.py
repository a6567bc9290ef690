"""Weights of erased models as edits: of ESD, UCE, Concept Ablation, DoCo and AdvUnlearn, or a whole checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.backbones.layouts import unformed
from erasure.carriers.edits import Edits
from erasure.errors import ArtifactError, OptionError, WrongBaseError
from erasure.exchange.lora_read import ReadResult
from erasure.exchange.names_read import Target, editable, weight_tables
from erasure.exchange.reading import Source
from erasure.files import shown
from erasure.interop import paths

ASIDE = (
    "first_stage_model.", "vae.", "model_ema.", "alphas_", "betas", "log_one_minus_alphas", "posterior_",
    "sqrt_alphas", "sqrt_one_minus_alphas", "sqrt_recip", "logvar", "conditioner.embedders.1.model.logit_scale",
    "conditioner.embedders.1.model.text_projection",
)  # fmt: skip
"""Beginnings of tensors of whole checkpoints that no erasure changes: the autoencoder, averages, tables of the noise
schedule, the last projection of a text encoder."""
TABLES = ("position_ids", "pos_embed")
"""Ends of tensors that are computed, and never trained: numbers of places, and their table in SD3."""
LIKE = 0.5
"""Cosine between the weights of a file and those of its base below which it is the base of something else."""


def read_weights(source: Source, pipe: DiffusionPipeline, component: str | None = None) -> ReadResult:
    """The edits that turn a model's weights into those of a file.

    A value that the model has too, rounded as the file's are, counts as unchanged.

    Args:
        source: The file: weights under the names of diffusers, transformers, or the layout that the model was
            published in.
        pipe: The model that they were made from.
        component: The network whose weights they are, where the names fit several.

    Raises:
        ArtifactError: Unknown names, or one tensor under two names with different values.
        WrongBaseError: Shapes or values of another model.
        OptionError: The names fit several networks, or `component` is none.
    """
    aside = [name for name in source.tensors if name.startswith(ASIDE) or name.endswith(TABLES)]
    held = {name: tensor for name, tensor in source.tensors.items() if name not in aside}
    if not held:
        raise WrongBaseError(f"{source.shown} holds nothing that an erasure changes (first {shown(aside[0])})")
    targets = _targets(source, held, pipe, component)
    modules, read = editable(pipe), ReadResult(Edits())
    agreement = torch.zeros(3, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    for name, tensor in held.items():
        for target in targets[name]:
            base = paths.parameter(modules[target.component], target.path).detach().cpu().float()
            value = tensor[target.first : target.first + target.rows] if target.rows is not None else tensor
            value = unformed(value, target.form)
            if value.shape != base.shape or not tensor.is_floating_point():
                raise WrongBaseError(_unlike(source, name, target, value, base))
            if not torch.isfinite(value.float()).all():
                raise ArtifactError(f"{source.shown}: {shown(name)} holds NaN or infinity: fetch it again")
            if target.key in seen:
                if not torch.equal(seen[target.key], value):
                    raise ArtifactError(
                        f"{source.shown} holds {target.key} under two names with different values (one is "
                        f"{shown(name)}): nobody knows which counts"
                    )
                continue
            seen[target.key] = value
            agreement += _products(value, base)
            unchanged = base.to(value.dtype) == value
            delta = torch.where(unchanged, 0.0, value.float() - base)
            if delta.any():
                read.edits.deltas[target.key] = delta
    _check_like(source, agreement, pipe)
    if aside:
        read.notes.append(f"{len(aside)} tensors that no erasure changes were left aside (first {shown(aside[0])})")
    if same := len(seen) - len(read.edits.deltas):
        read.notes.append(f"{same} of {len(seen)} tensors are as in the model")
    return read


def _targets(
    source: Source, held: Mapping[str, Tensor], pipe: DiffusionPipeline, component: str | None
) -> dict[str, list[Target]]:
    """Target of each tensor of a file, by its name."""
    tables = weight_tables(pipe)
    if component is not None and component not in tables:
        raise OptionError(f"there is no network {component!r} to erase from; this model has {', '.join(tables)}")
    chosen = {component: tables[component]} if component is not None else tables
    shapes = {name: {k: _shapes(pipe, table[name]) for k, table in chosen.items() if name in table} for name in held}
    if unknown := [name for name, fits in shapes.items() if not fits]:
        raise WrongBaseError(
            f"{source.shown} holds {len(held)} tensors, and {len(unknown)} of them are none of this "
            f"{type(pipe).__name__} (first {shown(unknown[0])}): it is of another model, or in a form that is not "
            "known; name the model that it was made from (--model)"
        )
    shared = [name for name, fits in shapes.items() if len(fits) > 1]
    fitting = [
        name for name in chosen
        if all(name in shapes[key] and shapes[key][name] == tuple(held[key].shape) for key in shared)
    ]  # fmt: skip
    if shared and len(fitting) != 1:
        known = ", ".join(fitting or chosen)
        raise OptionError(
            f"{source.shown} holds {shown(shared[0])}, which could be of several networks ({known}): say which "
            "(--component)"
        )
    return {name: chosen[fitting[0] if name in shared else next(iter(fits))][name] for name, fits in shapes.items()}


def _shapes(pipe: DiffusionPipeline, targets: Sequence[Target]) -> tuple[int, ...]:
    """Shape of the tensor that holds some parameters."""
    modules = editable(pipe)
    found = [paths.parameter(modules[target.component], target.path).shape for target in targets]
    rows = sum(shape[0] for shape in found) if targets[0].rows is not None else found[0][0]
    return (rows, *found[0][1:])


def _products(value: Tensor, base: Tensor) -> Tensor:
    a, b = value.flatten().double(), base.flatten().double()
    return torch.stack([a @ b, a @ a, b @ b])


def _check_like(source: Source, agreement: Tensor, pipe: DiffusionPipeline) -> None:
    """Raise `WrongBaseError` where the weights of a file have little to do with those of the model."""
    cosine = float(agreement[0] / (agreement[1] * agreement[2]).sqrt().clamp_min(torch.finfo(torch.float64).tiny))
    if cosine < LIKE:
        raise WrongBaseError(
            f"the weights in {source.shown} have little to do with those of this {type(pipe).__name__} (a cosine of "
            f"{cosine:.2f}, and an erasure changes less): they were made from another model; name that one (--model)"
        )


def _unlike(source: Source, name: str, target: Target, value: Tensor, base: Tensor) -> str:
    return (
        f"{source.shown}: {shown(name)} is {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}, and "
        f"{target.key} of the model has {tuple(base.shape)}: the file is of another model; name the one that it was "
        "made from (--model)"
    )
