"""Which layers of a model the names in somebody's file are for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from erasure.backbones import Backbone, backbone_for
from erasure.backbones.layouts import Form, Layout, starts
from erasure.errors import UnsupportedModelError
from erasure.exchange.checkpoints import parts_of
from erasure.exchange.loaders import CLIP_IN_COMFYUI, flat
from erasure.interop import paths
from erasure.interop.encoders import T5, anatomy_of
from erasure.interop.pipelines import components_of


class Target(NamedTuple):
    """A parameter of a model, and where it stands in a tensor of a file."""

    component: str
    path: str
    """Canonical path of the module, or of the parameter."""
    first: int = 0
    """Row of the file's tensor at which it begins."""
    rows: int | None = None
    """Number of rows that the target takes; `None` for the whole tensor."""
    form: Form = "same"

    @property
    def key(self) -> str:
        """`component/path`."""
        return f"{self.component}/{self.path}"


Table = dict[str, list[Target]]
"""What a name may be for; several targets of one tensor stand in it by rows."""


def editable(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Give the networks that an erasure may change, by name, without wrappers."""
    backbone = backbone_for(pipe)
    names = [backbone.denoiser_component, *(tower.component for tower in backbone.towers)]
    modules = components_of(pipe)
    return {name: modules[name] for name in dict.fromkeys(names)}


def layers_of(module: nn.Module) -> dict[str, Tensor]:
    """Give the weight of every module that has one, by the module's canonical path."""
    found = {}
    for path in paths.canonical_parameters(module):
        owner, _, name = path.rpartition(".")
        if name == "weight" and owner:
            found[owner] = paths.parameter(module, path)
    return found


def layer_table(pipe: DiffusionPipeline) -> Table:
    """Map names in LoRA files, without endings, to layers."""
    backbone, table = backbone_for(pipe), dict[str, list[Target]]()
    for component, module in editable(pipe).items():
        layers = layers_of(module)
        is_denoiser = component == backbone.denoiser_component
        for path in layers:
            names = _of_denoiser(component, path) if is_denoiser else _of_encoder(backbone, component, module, path)
            for name in names:
                table.setdefault(name, []).append(Target(component, path))
        layout = backbone.published_layout(backbone.denoiser) if is_denoiser else None
        if layout is not None:
            for name, target in _published(component, layers, layout):
                if target not in table.setdefault(name, []):
                    table[name].append(target)
    return table


def _of_denoiser(component: str, path: str) -> list[str]:
    dotted = [path, f"{component}.{path}", f"base_model.model.{path}", f"{component}.base_model.model.{path}"]
    underscored = [f"{prefix}{flat(path)}" for prefix in ("lora_unet_", "lora_transformer_", "lycoris_")]
    # As diffusers called layers of attention once: those of their processors.
    if ".to_" in path:
        old = path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
        dotted += [old, f"{component}.{old}"]
    return [*dotted, *underscored]


def _of_encoder(backbone: Backbone, component: str, module: nn.Module, path: str) -> list[str]:
    names = [f"{component}.{path}", f"{component}.text_model.{path}"]
    if anatomy_of(paths.transformer_root(module)) is T5:
        numbers = ("te2", "te3")
        return [*names, *(f"lora_{n}_{flat(path)}" for n in numbers), f"text_encoders.t5xxl.transformer.{path}"]
    clips = [tower.component for tower in backbone.towers if tower.causal]
    place = clips.index(component)
    ordinals = ["te", "te1"] if place == 0 else ["te2"]
    names += [f"lora_{number}_text_model_{flat(path)}" for number in ordinals]
    encoders = (CLIP_IN_COMFYUI[0], "clip_h") if len(clips) == 1 else (CLIP_IN_COMFYUI[place],)
    return [*names, *(f"text_encoders.{encoder}.transformer.text_model.{path}" for encoder in encoders)]


def _published(component: str, layers: dict[str, Tensor], layout: Layout) -> Iterator[tuple[str, Target]]:
    """Map names of the published layout to layers of a denoiser."""
    rows = {f"{path}.weight": len(weight) for path, weight in layers.items()}
    first = starts(rows, layout)
    for path in layers:
        place = layout(f"{path}.weight")
        if place is None:
            continue
        stem = place.key.rpartition(".")[0] or place.key
        size = rows[f"{path}.weight"] if place.parts > 1 else None
        start = first[f"{path}.weight"] if place.parts > 1 else 0
        target = Target(component, path, start, size, place.form)
        for name in (f"lora_unet_{flat(stem)}", f"diffusion_model.{stem}", f"model.diffusion_model.{stem}", stem):
            yield name, target


def weight_tables(pipe: DiffusionPipeline) -> dict[str, Table]:
    """Map names of whole weights to parameters, by component."""
    backbone = backbone_for(pipe)
    tables: dict[str, Table] = {}
    for component, module in editable(pipe).items():
        table = tables.setdefault(component, {})
        for path in paths.canonical_parameters(module):
            names = [path, f"{component}.{path}"]
            if component != backbone.denoiser_component:
                names += [f"text_model.{path}", f"{component}.text_model.{path}"]
                # A wrapper of AdvUnlearn's keeps the same tensors under several names.
                names += [path.replace("embeddings.", "embedding.", 1)] if path.startswith("embeddings.") else []
            for name in names:
                table[name] = [Target(component, path)]
    for component, prefix, layout in _layouts(pipe):
        if component not in tables:
            continue
        module = editable(pipe)[component]
        rows = {path: len(paths.parameter(module, path)) for path in paths.canonical_parameters(module)}
        first = starts(rows, layout)
        for path, size in rows.items():
            if (place := layout(path)) is not None:
                stacked = place.parts > 1
                target = Target(component, path, first[path] * stacked, size if stacked else None, place.form)
                held = tables[component].setdefault(prefix + place.key, [])
                if all(other.path != path for other in held):
                    held.append(target)
    return tables


def _layouts(pipe: DiffusionPipeline) -> list[tuple[str, str, Layout]]:
    """List a model's networks, with their prefixes and layouts in checkpoints."""
    try:
        parts = parts_of(pipe)
    except UnsupportedModelError:
        return []
    found = [(part.component, part.prefix, part.layout) for part in parts]
    component, _, layout = found[0]
    return [*found, (component, "", layout), (component, "model.diffusion_model.", layout)]
