"""Erasures as LoRA files that other programs load."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from erasure.artifact import Erasure
from erasure.backbones import backbone_for, family_named
from erasure.backbones.layouts import Place, formed
from erasure.errors import OptionError, UnsupportedModelError
from erasure.exchange import loaders
from erasure.exchange.factors import RESIDUAL, Factors, Split, split
from erasure.exchange.loaders import LOADERS, LayerName, Loader, Model
from erasure.exchange.writing import check_out, write_tensors
from erasure.fitting import check_fit, sources_of
from erasure.interop import paths
from erasure.interop.pipelines import components_of

CONFIG, EXPORT = "erasure_config", "erasure_export"
"""Texts in the header of an exported file: the erasure's config, and what the export did."""
BASE_VERSIONS = {
    loaders.SD: "sd_v1", loaders.XL: "sdxl_base_v1-0", loaders.SD3: "sd3m", loaders.FLUX: "flux1",
}  # fmt: skip
"""`ss_base_model_version` by family, by which programs list LoRA files beside the models that they fit."""
SECOND_KIND, WIDTH_OF_SECOND = "sd_v2", 1024
"""That of Stable Diffusion 2.x, and the width of the text that no layer of the first kind has."""
SIBLINGS = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"))
"""Layers of an attention that may stand in one tensor."""
APART = (
    "write the erased model itself (--to single-file --model MODEL, or pipe.save_erased_pipeline(FOLDER)), or attach "
    "the erasure with this package"
)
HOSTED = (
    "draw with this package (pipe.load_erasure), or ship model and erasure together: "
    "pipe.save_erased_pipeline(FOLDER, fuse=False)"
)


@dataclass(frozen=True)
class Exported:
    """Summary of an export: its file, and how exactly it holds the erasure."""

    path: Path
    to: str
    """Program that it is for."""
    layers: int
    """Layers with low-rank factors."""
    approximated: int
    """Number of layers whose edit has full rank, so that the file holds its truncated SVD."""
    ranks: tuple[int, int]
    """Least and most ranks of a layer."""
    left_out: float
    """Share of the energy of the full-rank edits that the file leaves out."""
    worst: float
    """Share of the energy that the layer which loses most has lost."""
    plain: int
    """Biases, norms and tables."""

    @property
    def facts(self) -> dict[str, object]:
        """Give the fields as plain data, without the path."""
        facts_by_name = dataclasses.asdict(self)
        del facts_by_name["path"]
        return {**facts_by_name, "ranks": list(self.ranks)}

    def __str__(self) -> str:
        """One line for people."""
        low, high = self.ranks
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        plain = f" and {self.plain} biases and norms" if self.plain else ""
        if not self.approximated:
            return f"{self.layers} layers ({ranks}){plain}, exact"
        return (
            f"{self.layers} layers ({ranks}){plain}; {self.approximated} of them are of full rank and stand there by "
            f"their SVD, which leaves out {self.left_out:.2e} of their energy ({self.worst:.2e} in the worst layer)"
        )


def export_lora(
    erasure: Erasure, to: str, out: str | Path, *, pipe: DiffusionPipeline | None = None, rank: int | None = None,
    residual: float = RESIDUAL, overwrite: bool = False,
) -> Exported:  # fmt: skip
    """Write an erasure as a LoRA file for a program.

    Low-rank edits keep their factors; full-rank edits get the smallest rank that keeps their energy.

    Args:
        erasure: The erasure.
        to: `kohya`, `comfyui`, `a1111` or `diffusers`.
        out: File to write, `.safetensors`.
        pipe: The base model, which is needed for the names of some layers and for input maps.
        rank: Largest rank of a layer with a full-rank edit.
        residual: Share of the energy of such an edit that may be left out.
        overwrite: Replace an existing file.

    Raises:
        OptionError: The program is unknown, or an option is invalid.
        UnsupportedModelError: The program cannot apply the erasure; the message says what works.
        WrongBaseError: The pipeline is not the model that the erasure was made for.
        ArtifactError: The file exists or cannot be written.
    """
    if to not in LOADERS:
        raise OptionError(f"there is no export to {to!r}; to a LoRA there is: {', '.join(LOADERS)}")
    out, loader = check_out(out, overwrite=overwrite), LOADERS[to]
    _refuse(erasure, loader, f"the files of {loader.title}")
    if pipe is not None:
        fits = sources_of(pipe, components_of(pipe), erasure.name, erasure, False)
        check_fit(pipe, fits, erasure.name, erasure, True)
    model = _model(erasure, pipe)
    parts = split(erasure.edits, _bases(erasure, pipe), rank, residual)
    tensors = _tensors(parts, loader, model, _rows(pipe, model))
    exported = _exported(out, to, parts)
    write_tensors(out, tensors, _metadata(erasure, loader, exported, parts, tensors))
    return exported


def comfyui_tensors(
    erasure: Erasure, model: Model, bases: Mapping[str, Tensor], rows: Callable[[str], int | None]
) -> dict[str, Tensor]:
    """Give an erasure's tensors under ComfyUI's names, as its loader of LoRA files takes them.

    Nothing is left out: unlike in a file, edits of full rank stand there as they are.

    Args:
        erasure: The erasure.
        model: The model, with the layout of its denoiser.
        bases: Base weights of the layers whose input is mapped, by `component/module.path`.
        rows: Gives the rows of a layer's weight, by its path in the denoiser; `None` where they are unknown.

    Raises:
        UnsupportedModelError: The erasure does more than change weights, or changes what ComfyUI has no name for.
    """
    refuse_in_comfyui(erasure)
    loader = LOADERS["comfyui"]
    return _tensors(split(erasure.edits, bases, whole=True), loader, model, rows, stacked=True)


def refuse_in_comfyui(erasure: Erasure) -> None:
    """Raise `UnsupportedModelError` where no patches of ComfyUI's models can hold an erasure."""
    _refuse(erasure, LOADERS["comfyui"], "patches of a model in ComfyUI")


def _refuse(erasure: Erasure, loader: Loader, held: str) -> None:
    refuse_hooks(erasure, held)
    if reason := loader.refused.get(erasure.config.family):
        raise UnsupportedModelError(
            f"{loader.title} cannot load an erasure of {erasure.config.family}: {reason}. Or {APART}"
        )


def refuse_hooks(erasure: Erasure, held: str) -> None:
    """Raise `UnsupportedModelError` where an erasure does more than change weights.

    Args:
        erasure: The erasure.
        held: What is to hold it, in the plural.
    """
    if (beyond := erasure.edits.beyond_weights) is not None:
        raise UnsupportedModelError(
            f"{erasure.name} {beyond} while the model runs, and {held} hold weights only: {HOSTED}"
        )
    if erasure.config.sampling is not None:
        raise UnsupportedModelError(
            f"{erasure.name} makes a one-step generator, which is wrong with any other sampler, and {held} cannot "
            f"say how they are to be sampled: {HOSTED}"
        )
    erasure.edits.check()


def _model(erasure: Erasure, pipe: DiffusionPipeline | None) -> Model:
    if pipe is None:
        family = family_named(erasure.config.family)
        return Model(erasure.config.family, None if family is None else family.published_layout(None))
    backbone = backbone_for(pipe)
    return Model(backbone.family, backbone.published_layout(backbone.denoiser))


def _bases(erasure: Erasure, pipe: DiffusionPipeline | None) -> dict[str, Tensor]:
    if pipe is None:
        return {}
    parts = components_of(pipe)
    keys = [(key, *key.split("/", 1)) for key in erasure.edits.maps]
    return {key: paths.parameter(parts[component], f"{path}.weight") for key, component, path in keys}


def _rows(pipe: DiffusionPipeline | None, model: Model) -> Callable[[str], int | None]:
    """Gives the rows of a layer's weight, by its path in the denoiser; `None` where they are unknown."""
    if pipe is None or model.layout is None:
        return lambda path: None
    denoiser = backbone_for(pipe).denoiser
    return lambda path: paths.parameter(denoiser, f"{path}.weight").shape[0]


def _tensors(
    parts: Split, loader: Loader, model: Model, rows: Callable[[str], int | None], *, stacked: bool = False
) -> dict[str, Tensor]:
    named: dict[str, LayerName] = {}
    for key in (*parts.layers, *parts.whole):
        name = loader.names(model, key)
        if isinstance(name, str):
            raise UnsupportedModelError(f"{loader.title} cannot be told of {key!r}: {name}. Or {APART}")
        named[key] = name
    joined: dict[str, Factors] = {}
    tensors: dict[str, Tensor] = {}
    for stem, keys in _by_stem(named).items():
        if any(key in parts.whole for key in keys):
            edits = [(key, _dense(parts, key), named[key].place) for key in keys]
            tensors[f"{stem}.diff"] = _stacked(edits, rows).contiguous()
        else:
            joined[stem] = _joined([(key, parts.layers[key], named[key].place) for key in keys], rows)
    for stem, factors in (of_one_rank(joined) if loader.scheme == "kohya" else joined).items():
        _put(tensors, stem, factors, loader)
    plain: dict[str, list[tuple[str, Tensor, Place | None]]] = {}
    for key, tensor in parts.plain.items():
        module, _, parameter = key.rpartition(".")
        found = loaders.comfyui_plain(model, module, len(tensor), stacked=stacked) if loader.plain else None
        if found is None:
            raise UnsupportedModelError(
                f"the erasure changes {key!r}, and no LoRA file of {loader.title} holds changes of biases, norms or "
                f"tables{'' if loader.plain else '; those of ComfyUI do (--to comfyui)'}. Or {APART}"
            )
        name = f"{found.stem}.{'diff_b' if parameter == 'bias' else 'diff'}"
        plain.setdefault(name, []).append((module, tensor, found.place))
    tensors |= {name: _stacked(edits, rows).contiguous() for name, edits in plain.items()}
    return tensors


def of_one_rank(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """Pad factors with zeros, so that all have the same rank and alpha.

    diffusers takes the most frequent alpha of a file in kohya's names for that of every layer, so layers of other
    ranks would get a wrong scale.
    """
    rank = max((factors.rank for factors in layers.values()), default=0)
    found = {}
    for stem, (down, up, *exported) in layers.items():
        more = rank - down.shape[0]
        wide = torch.cat([down, down.new_zeros(more, *down.shape[1:])])
        found[stem] = Factors(wide, torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], 1), *exported)
    return found


def _by_stem(named: Mapping[str, LayerName]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, name in named.items():
        found.setdefault(name.stem, []).append(key)
    return found


def _put(tensors: dict[str, Tensor], stem: str, factors: Factors, loader: Loader) -> None:
    down, up = factors.down.contiguous(), factors.up.contiguous()
    if loader.scheme == "peft":
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        return
    # The scale is alpha / rank.
    alpha = torch.tensor(float(factors.rank))
    tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}


def _joined(layers: list[tuple[str, Factors, Place | None]], rows: Callable[[str], int | None]) -> Factors:
    """Stack the factors of the layers that a program keeps in one tensor.

    `up` has a block for each layer and zeros elsewhere, so that the product is the edits stacked by rows.
    """
    _, factors, place = layers[0]
    if place is None or (place.parts == 1 and place.form == "same"):
        return factors
    if place.form == "swapped":
        return factors._replace(up=torch.cat(list(reversed(factors.up.chunk(2)))))
    heights = _heights({place.part: (key, f.up.shape[0]) for key, f, place in layers if place}, place, rows)
    ordered = sorted((place.part, factors) for _, factors, place in layers if place)
    rank = sum(factors.rank for _, factors in ordered)
    up = factors.up.new_zeros(sum(heights), rank)
    at = 0
    for part, one in ordered:
        first = sum(heights[:part])
        up[first : first + heights[part], at : at + one.rank] = one.up
        at += one.rank
    return Factors(torch.cat([one.down for _, one in ordered]), up)


def _dense(parts: Split, key: str) -> Tensor:
    if key in parts.whole:
        return parts.whole[key]
    down, up, *_ = parts.layers[key]
    return (up.float().flatten(1) @ down.float().flatten(1)).view(len(up), *down.shape[1:])


def _stacked(layers: list[tuple[str, Tensor, Place | None]], rows: Callable[[str], int | None]) -> Tensor:
    """Stack the edits of the layers that a program keeps in one tensor, with zeros for unedited layers."""
    _, delta, place = layers[0]
    if place is None or place.parts == 1:
        return delta if place is None else formed(delta, place.form)
    heights = _heights({place.part: (key, len(delta)) for key, delta, place in layers if place}, place, rows)
    found = delta.new_zeros(sum(heights), *delta.shape[1:])
    for _, one, there in layers:
        if there is not None:
            found[sum(heights[: there.part]) :][: len(one)] = one
    return found


def _heights(edited: Mapping[int, tuple[str, int]], place: Place, rows: Callable[[str], int | None]) -> list[int]:
    """Give the number of rows of every layer in a tensor, edited or not."""
    key, height = next(iter(edited.values()))
    path = key.split("/", 1)[1]
    found = []
    for part in range(place.parts):
        if part in edited:
            found.append(edited[part][1])
            continue
        known = rows(_sibling(path, place, part))
        # Queries, keys and values are of one size in these models; what stands behind them is not.
        if known is None and (part == 3 or 3 in edited):
            raise UnsupportedModelError(
                f"{key!r} stands in one tensor with layers whose size the erasure does not say: name the model "
                "(--model)"
            )
        found.append(height if known is None else known)
    return found


def _sibling(path: str, place: Place, part: int) -> str:
    """Give the path of another layer in the same tensor."""
    head, _, name = path.rpartition(".")
    if place.parts == 4:
        block = head.removesuffix(".attn")
        return f"{block}.proj_mlp" if part == 3 else f"{block}.attn.{SIBLINGS[0][part]}"
    return f"{head}.{next(names for names in SIBLINGS if name in names)[part]}"


def _exported(out: Path, to: str, parts: Split) -> Exported:
    ranks = [factors.rank for factors in parts.layers.values()]
    full = [factors for factors in parts.layers.values() if factors.energy]
    whole = sum(factors.energy for factors in full)
    return Exported(
        out, to, len(parts.layers), len(full), (min(ranks, default=0), max(ranks, default=0)),
        sum(factors.left_out for factors in full) / whole if whole else 0.0,
        max((factors.left_out / factors.energy for factors in full), default=0.0), len(parts.plain),
    )  # fmt: skip


def _metadata(
    erasure: Erasure, loader: Loader, exported: Exported, parts: Split, tensors: Mapping[str, Tensor]
) -> dict[str, str]:
    """Make the header's texts: what programs look for, the erasure's config, and the export's summary."""
    config = erasure.config
    if exported.approximated:
        # What was measured was measured with the edit itself.
        config = dataclasses.replace(config, evaluation={})
    residuals = {key: factors.left_out / factors.energy for key, factors in parts.layers.items() if factors.energy}
    texts = {
        "format": "pt", "modelspec.title": erasure.name, CONFIG: json.dumps(dataclasses.asdict(config)),
        EXPORT: json.dumps({**exported.facts, "left_out_by_layer": residuals}),
    }  # fmt: skip
    if loader.scheme == "kohya":
        texts |= {"ss_network_module": "networks.lora", "ss_output_name": erasure.name}
        rank = str(rank_of(tensors))
        texts |= {"ss_network_dim": rank, "ss_network_alpha": rank}
        if config.family in BASE_VERSIONS:
            texts["ss_base_model_version"] = BASE_VERSIONS[config.family]
        widths = [side for factors in parts.layers.values() for side in (factors.down.shape[1], len(factors.up))]
        if config.family == loaders.SD and WIDTH_OF_SECOND in widths:
            texts["ss_base_model_version"] = SECOND_KIND
    return texts


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Give the largest rank of a layer in a file with kohya's names."""
    return max((len(tensor) for name, tensor in tensors.items() if name.endswith(".lora_down.weight")), default=0)


__all__ = ["CONFIG", "EXPORT", "Exported", "comfyui_tensors", "export_lora", "refuse_hooks", "refuse_in_comfyui"]
