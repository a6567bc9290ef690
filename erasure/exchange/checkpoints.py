"""Erased models as single-file checkpoints, in the layouts that the models were published in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.artifact import Erasure
from erasure.attach import ErasureManager
from erasure.backbones import backbone_for
from erasure.backbones.layouts import Layout, clip_layout, open_clip_layout, to_original, vae_layout
from erasure.baked import trace_of
from erasure.errors import ArtifactError, UnsupportedModelError
from erasure.exchange.loaders import FLUX, SD, SD3, XL
from erasure.exchange.lora_files import refuse_hooks
from erasure.exchange.writing import check_out, write_tensors
from erasure.interop import paths, single_files
from erasure.interop.pipelines import components_of

TITLE = "single-file checkpoints"
DENOISER = "model.diffusion_model."
"""What the names of the denoiser begin with, where a file holds more than that."""
ERASED = "erasures"
"""Text in the header: what the weights are erased of, as `erased.json` has it."""
FOLDER = "pipe.save_erased_pipeline(FOLDER) writes the whole model"


@dataclass(frozen=True)
class Part:
    """One network in a checkpoint."""

    component: str
    prefix: str
    layout: Layout


@dataclass(frozen=True)
class Checkpoint:
    """Summary of a checkpoint that was written."""

    path: Path
    components: tuple[str, ...]
    """Networks in it."""
    tensors: int
    parameters: int

    def __str__(self) -> str:
        """One line for people."""
        parts = ", ".join(self.components)
        return f"{self.parameters / 1e6:,.1f} million values in {self.tensors} tensors: {parts}"


def export_checkpoint(
    erasure: Erasure, pipe: DiffusionPipeline, out: str | Path, *, overwrite: bool = False
) -> Checkpoint:
    """Write a model with an erasure in its weights as a single file.

    The file has the whole model of Stable Diffusion 1.x and SDXL, and the transformer of Stable Diffusion 3 and Flux.
    Before writing, the tensors are converted back by diffusers' own loaders and compared bit for bit.

    Args:
        erasure: The erasure; it is attached to `pipe` meanwhile.
        pipe: The base model, without erasures or adapters in force.
        out: File to write, `.safetensors`.
        overwrite: Replace an existing file.

    Raises:
        UnsupportedModelError: The family has no single-file layout here, the erasure is not only a change of weights,
            or it changes a component that the file does not contain.
        WrongBaseError: The pipeline is not the model that the erasure was made for.
        ArtifactError: The file exists, cannot be written, or was not read back as the model.
    """
    out = check_out(out, overwrite=overwrite)
    refuse_hooks(erasure, TITLE)
    parts = parts_of(pipe)
    held = [part.component for part in parts]
    if missing := [component for component in erasure.components if component not in held]:
        raise UnsupportedModelError(
            f"{erasure.name} changes the {missing[0]}, and the file of a {type(pipe).__name__} holds the "
            f"{', '.join(held)} only: {FOLDER}"
        )
    manager = ErasureManager(pipe)
    manager.add(erasure)
    try:
        manager.verify()
        manager.check_saveable()
        tensors = {key: tensor for part in parts for key, tensor in _written(pipe, part)}
        trace = json.dumps(trace_of(manager)["erasures"])
        _check(pipe, parts, tensors, out)
        write_tensors(out, tensors, {"format": "pt", ERASED: trace, **_said(pipe)})
    finally:
        manager.delete(erasure.name)
    values = sum(tensor.numel() for tensor in tensors.values())
    return Checkpoint(out, tuple(held), len(tensors), values)


def parts_of(pipe: DiffusionPipeline) -> list[Part]:
    """List the networks in the checkpoint of a model.

    Raises:
        UnsupportedModelError: No layout of such a model is known here.
    """
    backbone = backbone_for(pipe)
    layout = backbone.published_layout(backbone.denoiser)
    if layout is None:
        raise UnsupportedModelError(
            f"the layout of single files of {backbone.family} with this {backbone.denoiser_component} is not known "
            f"here: {FOLDER}, which diffusers and what builds on it read"
        )
    if backbone.family in (SD3, FLUX):
        return [Part(backbone.denoiser_component, DENOISER if backbone.family == SD3 else "", layout)]
    modules = components_of(pipe)
    if backbone.family == SD and _width(modules["text_encoder"]) == 1024:
        raise UnsupportedModelError(
            "a single file of Stable Diffusion 2.x holds the last block of its text encoder, which its pipelines "
            f"never use and diffusers leaves out, so it cannot be written from one: {FOLDER}"
        )
    denoiser = Part(backbone.denoiser_component, DENOISER, layout)
    vae = Part("vae", "first_stage_model.", vae_layout(len(pipe.vae.config.up_block_types)))
    if backbone.family == XL:
        clips = [
            Part("text_encoder", "conditioner.embedders.0.transformer.", clip_layout),
            Part("text_encoder_2", "conditioner.embedders.1.model.", open_clip_layout),
        ]
    else:
        clips = [Part("text_encoder", "cond_stage_model.transformer.", clip_layout)]
    return [denoiser, vae, *clips]


def _width(module: nn.Module) -> int:
    return int(paths.token_table(paths.transformer_root(module)).weight.shape[1])


def tensors_of(pipe: DiffusionPipeline, component: str) -> dict[str, Tensor]:
    """Give the parameters and persistent buffers of a network, by canonical path."""
    module = components_of(pipe)[component]
    found = dict(paths.transformer_root(module).state_dict())
    projection = getattr(module, "text_projection", None)
    if isinstance(projection, nn.Linear):
        found["text_projection.weight"] = projection.weight
    return {path: tensor.detach() for path, tensor in found.items() if not path.endswith("position_ids")}


def _written(pipe: DiffusionPipeline, part: Part) -> Iterator[tuple[str, Tensor]]:
    try:
        yield from to_original(tensors_of(pipe, part.component), part.layout, part.prefix).items()
    except KeyError as missing:
        raise UnsupportedModelError(
            f"the {part.component} of this {type(pipe).__name__} has {missing.args[0]!r}, for which the published "
            f"layout has no place: {FOLDER}"
        ) from None


def _said(pipe: DiffusionPipeline) -> dict[str, str]:
    """Describe what programs cannot see from the tensors."""
    kind = pipe.scheduler.config.get("prediction_type")
    return {"modelspec.prediction_type": "v"} if kind == "v_prediction" else {}


def _check(pipe: DiffusionPipeline, parts: list[Part], tensors: Mapping[str, Tensor], out: Path) -> None:
    """Raise `ArtifactError` unless what is to be written reads back as the model."""
    for part in parts:
        module = components_of(pipe)[part.component]
        found = single_files.converted(tensors, module, part.prefix)
        if found is None:
            continue
        expected = tensors_of(pipe, part.component)
        wrong = [path for path, tensor in expected.items() if not _same(found.get(path), tensor)]
        if wrong or set(found) - set(expected):
            first = wrong[0] if wrong else min(set(found) - set(expected))
            raise ArtifactError(
                f"cannot write {out}: the {part.component} would not read back as the model has it (first {first!r}); "
                f"{FOLDER}"
            )


def _same(found: Tensor | None, tensor: Tensor) -> bool:
    return found is not None and found.shape == tensor.shape and torch.equal(found, tensor.cpu())
